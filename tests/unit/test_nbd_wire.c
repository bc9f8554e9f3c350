#include "nbd/wire.h"
#include "seed.h"
#include "unit.h"

static size_t put_string(uint8_t *at, const char *s)
{
    struct out_cursor out = out_cursor_over(at, 4 + strlen(s));
    put_be32(&out, (uint32_t)strlen(s));
    put_bytes(&out, s, strlen(s));
    return 4 + strlen(s);
}

static void info_requests_are_taken_apart(void **state)
{
    uint8_t data[64];
    struct nbd_info_request q;
    size_t n = put_string(data, "disk");
    struct out_cursor out = out_cursor_over(data + n, 8);

    put_be16(&out, 2);
    put_be16(&out, NBD_INFO_BLOCK_SIZE);
    put_be16(&out, 77);
    n += 6;
    assert_int_equal(nbd_info_decode(data, n, "go", &q, NULL), 0);
    assert_true(nbd_string_equals(q.name, "disk"));
    assert_true(q.wants_block_size);
    assert_false(q.wants_name);
}

static void cut_option_data_is_refused_at_every_length(void **state)
{
    uint8_t data[64];
    size_t n = put_string(data, "disk");
    struct out_cursor out = out_cursor_over(data + n, 4);
    struct nbd_info_request info;
    struct nbd_meta_request meta;
    struct error err;

    put_be16(&out, 1);
    put_be16(&out, NBD_INFO_NAME);
    n += 4;
    for (size_t cut = 0; cut < n; cut++) {
        err = (struct error)ERROR_INIT;
        uint8_t *exact = malloc(cut + !cut); /* so that ASan sees a read beyond */
        memcpy(exact, data, cut);
        assert_int_equal(nbd_info_decode(exact, cut, "info", &info, &err), -EINVAL);
        assert_non_null(strstr(err.text, "info"));
        free(exact);
    }
    assert_int_equal(nbd_info_decode(data, n, "info", &info, NULL), 0);
    data[n] = 0;
    assert_int_equal(nbd_info_decode(data, n + 1, "info", &info, NULL), -EINVAL);

    n = put_string(data, "disk");
    out = out_cursor_over(data + n, 4);
    put_be32(&out, 1);
    n += 4;
    n += put_string(data + n, "base:allocation");
    for (size_t cut = 0; cut < n; cut++)
        assert_int_equal(nbd_meta_decode(data, cut, "meta", &meta, NULL), -EINVAL);
    assert_int_equal(nbd_meta_decode(data, n, "meta", &meta, NULL), 0);
    struct nbd_string query;
    assert_true(nbd_meta_next(&meta, &query));
    assert_true(nbd_string_equals(query, "base:allocation"));
    assert_false(nbd_meta_next(&meta, &query));
}

static void a_huge_count_of_queries_ends_with_the_data(void **state)
{
    uint8_t data[64];
    struct nbd_meta_request meta;
    size_t n = put_string(data, "d");
    struct out_cursor out = out_cursor_over(data + n, 4);

    put_be32(&out, UINT32_MAX);
    assert_int_equal(nbd_meta_decode(data, n + 4, "meta", &meta, NULL), -EINVAL);
}

static void names_with_nul_are_refused(void **state)
{
    uint8_t data[] = {0, 0, 0, 3, 'a', 0, 'b', 0, 0};
    struct nbd_info_request q;
    struct error err = ERROR_INIT;

    assert_int_equal(nbd_info_decode(data, sizeof data, "go", &q, &err), -EINVAL);
    assert_string_equal(err.text, "Unexpected embedded NUL in option go");
}

static struct nbd_request request(unsigned type, uint64_t offset, uint32_t length, unsigned flags)
{
    return (struct nbd_request){
        .type = (uint16_t)type, .flags = (uint16_t)flags, .offset = offset, .length = length};
}

static void requests_are_checked(void **state)
{
    const uint64_t size = 1 << 20;
    const struct {
        struct nbd_request rq;
        bool read_only, structured;
        int want;
    } rows[] = {
        {request(NBD_CMD_READ, 0, 4096, 0), true, false, 0},
        {request(NBD_CMD_READ, size, 0, 0), true, false, 0},
        {request(NBD_CMD_READ, size, 1, 0), true, false, -EINVAL},
        {request(NBD_CMD_READ, UINT64_MAX, 2, 0), true, false, -EINVAL},
        {request(NBD_CMD_READ, 0, 1, NBD_CMD_FLAG_DF), true, false, -EINVAL},
        {request(NBD_CMD_READ, 0, 1, NBD_CMD_FLAG_DF), true, true, 0},
        {request(NBD_CMD_READ, 0, NBD_MAX_PAYLOAD + 1, 0), true, true, -EINVAL},
        {request(NBD_CMD_WRITE, 0, 1, 0), true, true, -EROFS},
        {request(NBD_CMD_WRITE, size - 1, 2, 0), false, true, -ENOSPC},
        {request(NBD_CMD_WRITE, size - 1, 1, NBD_CMD_FLAG_FUA), false, true, 0},
        {request(NBD_CMD_WRITE_ZEROES, 0, 1, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO), false,
         true, 0},
        {request(NBD_CMD_WRITE_ZEROES, 0, 1, NBD_CMD_FLAG_REQ_ONE), false, true, -EINVAL},
        {request(NBD_CMD_BLOCK_STATUS, 0, 1, NBD_CMD_FLAG_REQ_ONE), true, true, 0},
        {request(NBD_CMD_TRIM, 0, 1, 0), true, true, -EROFS},
        {request(NBD_CMD_FLUSH, 0, 0, 1 << 15), true, true, -EINVAL},
    };

    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        struct error err = ERROR_INIT;
        int r = nbd_request_check(&rows[i].rq, size, rows[i].read_only, rows[i].structured, &err);
        if (r != rows[i].want)
            fail_msg("row %zu: %d (%s), not %d", i, r, err.text, rows[i].want);
    }
}

/* Extents against the plain list of their flags, one a block. */
static void extents_merge_neighbours_and_stop_when_full(void **state)
{
    struct rng rng = {test_seed()};

    for (int round = 0; round < 200; round++) {
        uint8_t wire[8 * 16];
        struct nbd_extents x = {.wire = wire, .capacity = 1 + (uint32_t)rng_below(&rng, 16)};
        uint32_t flags[64];
        uint32_t given = 0;
        bool room = true;

        while (room && given < 64) {
            uint32_t n = 1 + (uint32_t)rng_below(&rng, 4), f = (uint32_t)rng_below(&rng, 3);
            n = n > 64 - given ? 64 - given : n;
            room = nbd_extents_add(&x, n, f);
            for (uint32_t i = 0; room && i < n; i++)
                flags[given + i] = f;
            given += room ? n : 0;
        }
        struct cursor in = cursor_over(wire, nbd_extents_finish(&x));
        uint32_t at = 0, last = UINT32_MAX;
        while (cursor_left(&in)) {
            uint32_t n = get_be32(&in), f = get_be32(&in);
            assert_int_not_equal(f, last);
            last = f;
            for (uint32_t i = 0; i < n; i++)
                assert_int_equal(flags[at + i], f);
            at += n;
        }
        assert_int_equal(at, given);
        assert_int_equal(x.total, given);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(info_requests_are_taken_apart),
    cmocka_unit_test(cut_option_data_is_refused_at_every_length),
    cmocka_unit_test(a_huge_count_of_queries_ends_with_the_data),
    cmocka_unit_test(names_with_nul_are_refused),
    cmocka_unit_test(requests_are_checked),
    cmocka_unit_test(extents_merge_neighbours_and_stop_when_full),
};
UNIT_MAIN(tests)
