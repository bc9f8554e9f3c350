/* The bytes of a tide file (docs/format/tide.md): what is written is read again, what a disk has
 * damaged is refused, and so is what nobody can have written; and the table that the ring tells,
 * against one that is simply kept. */
#include "tideutil.h"

#include "persist/crc.h"

#include <endian.h>

static void put(uint8_t *at, unsigned width, uint64_t value)
{
    uint64_t le = htole64(value);
    memcpy(at, &le, width);
}

static uint64_t get(const uint8_t *at, unsigned width)
{
    uint64_t le = 0;
    memcpy(&le, at, width);
    return le64toh(le);
}

/* The bytes that its length speaks of, in memory of exactly that size. */
static int decode_exact(const uint8_t *buf, size_t length, struct super *s, struct error *err)
{
    uint8_t *exact = malloc(length);
    assert_non_null(exact);
    memcpy(exact, buf, length);
    int r = super_decode(exact, length, s, err);
    free(exact);
    return r;
}

static void superblocks_come_back(void **state)
{
    struct rng rng = {test_seed()};
    uint8_t *buf = malloc(TIDE_SUPER_BYTES);
    assert_non_null(buf);
    for (int i = 0; i < 400; i++) {
        struct super s, copy, back = {0};
        struct error err = ERROR_INIT;
        size_t length;
        some_super(&rng, &s, i % 20);
        super_copy(&copy, &s);
        memset(buf, 0xaa, TIDE_SUPER_BYTES);
        if (super_encode(&s, buf, &length, &err) < 0)
            fail_msg("round %d: %s", i, err.text);
        assert_true(length && length % TIDE_ALIGN == 0 && length <= TIDE_SUPER_BYTES);
        if (decode_exact(buf, length, &back, &err) < 0)
            fail_msg("round %d: %s", i, err.text);
        assert_true(super_equal(&s, &back) && super_equal(&copy, &back));
        super_fini(&back);
        /* what an older and longer one has left behind does not matter */
        if (super_decode(buf, TIDE_SUPER_BYTES, &back, &err) < 0)
            fail_msg("round %d: %s", i, err.text);
        super_fini(&back);
        super_fini(&copy);
        super_fini(&s);
    }
    free(buf);
}

static void a_superblock_may_be_full_but_not_fuller(void **state)
{
    struct rng rng = {test_seed()};
    struct super s, back = {0};
    struct error err = ERROR_INIT;
    uint8_t *buf = malloc(TIDE_SUPER_BYTES);
    size_t length = 0, n = 0;
    int r = 0;
    some_super(&rng, &s, 0);
    s.level = TIDE_PROCESS;
    free(s.table.items);
    s.table.items = xcalloc(10000, sizeof *s.table.items);
    while (r == 0) {
        struct tide_bitmap *b = &s.table.items[s.table.n++];
        *b = (struct tide_bitmap){.name = xasprintf("%0*zu", (int)(1 + n++ * 7 % 1000), s.table.n),
                                  .granularity_bits = 16,
                                  .current = {0, s.next_epoch++}};
        r = super_encode(&s, buf, &length, &err);
        assert_true(n < 10000);
    }
    assert_int_equal(r, -ENOSPC);
    assert_non_null(strstr(err.text, "do not fit into a superblock of 262144 bytes"));
    error_clear(&err);
    s.table.n--;
    assert_int_equal(super_encode(&s, buf, &length, &err), 0);
    assert_true(length > TIDE_SUPER_BYTES - 2048);
    assert_int_equal(super_decode(buf, length, &back, &err), 0);
    assert_true(super_equal(&s, &back));
    super_fini(&back);
    s.table.n++;
    super_fini(&s);
    free(buf);
}

static void no_damaged_byte_of_a_superblock_passes(void **state)
{
    struct rng rng = {test_seed()};
    uint8_t *buf = malloc(TIDE_SUPER_BYTES);
    for (int i = 0; i < 4; i++) {
        struct super s, back = {0};
        size_t length;
        some_super(&rng, &s, 6);
        assert_int_equal(super_encode(&s, buf, &length, NULL), 0);
        size_t used = get(buf + 16, 4);
        for (size_t at = 0; at < length; at++) {
            struct error err = ERROR_INIT;
            uint8_t was = buf[at];
            buf[at] ^= (uint8_t)(1 + rng_below(&rng, 255));
            int r = super_decode(buf, length, &back, &err);
            assert_int_equal(r, at < used ? -EBADMSG : 0);
            if (r == 0) {
                assert_true(super_equal(&s, &back));
                super_fini(&back);
            } else {
                assert_true(err.text[0] && !strchr(err.text, '\n'));
            }
            buf[at] = was;
        }
        super_fini(&s);
    }
    free(buf);
}

static void a_torn_superblock_is_none(void **state)
{
    struct rng rng = {test_seed()};
    uint8_t *a = malloc(TIDE_SUPER_BYTES), *b = malloc(TIDE_SUPER_BYTES);
    for (int i = 0; i < 200; i++) {
        struct super s, back = {0};
        size_t before, after;
        some_super(&rng, &s, 12);
        memset(a, 0, TIDE_SUPER_BYTES);
        assert_int_equal(super_encode(&s, a, &before, NULL), 0);
        s.sequence += 2;
        s.next_epoch++; /* every sector may be the same but the first */
        assert_int_equal(super_encode(&s, b, &after, NULL), 0);
        bool old = false, new = false;
        for (size_t at = 0; at < after; at += 512) {
            bool differs = memcmp(a + at, b + at, 512) != 0;
            if (rng_below(&rng, 2)) {
                memcpy(a + at, b + at, 512);
                new = new || differs;
            } else {
                old = old || differs;
            }
        }
        int r = super_decode(a, TIDE_SUPER_BYTES, &back, NULL);
        assert_int_equal(r, old && new ? -EBADMSG : 0);
        super_fini(&back);
        super_fini(&s);
    }
    free(a);
    free(b);
}

/* ---- what nobody can have written, with a checksum that is right ---- */

static void fix_crc(uint8_t *buf)
{
    size_t used = get(buf + 16, 4);
    uint32_t crc = crc_add(crc_add(CRC_BEGIN, buf, 12), buf + 16, used - 16);
    put(buf + 12, 4, crc_end(crc));
}

/* Two bitmaps "a" and "b" of 64 KiB on 16 GiB (their extents: 4 of 36 KiB from 768 KiB on);
 * prepared the same two under the names "a" and "c"; one record of two members. */
enum { HEAD = 272, BITMAP = 56 };
enum { BITMAP_A = HEAD, BITMAP_B = BITMAP_A + BITMAP + 1, COORDINATOR = BITMAP_B + BITMAP + 1 + 3 };
enum { NEXT_A = COORDINATOR + 18 + 4, NEXT_C = NEXT_A + BITMAP + 1 };
enum { RECORD = NEXT_C + BITMAP + 1 };
enum { MEMBER_1 = RECORD + 20, MEMBER_2 = MEMBER_1 + 18 + 4, END = MEMBER_2 + 18 + 2 };

static void known_super(struct super *s)
{
    struct rng rng = {7};
    const uint64_t extent = tide_extent_bytes(16 * GiB, 16);
    *s = (struct super){.uuid = some_id(&rng),
                        .session = some_id(&rng),
                        .size_bytes = 16 * GiB,
                        .resizing_bytes = 16 * GiB,
                        .region_bits = 24,
                        .slots = 1024,
                        .next_epoch = 100,
                        .extents_end = TIDE_EXTENTS_OFFSET + 4 * extent,
                        .driver = "raw"};
    const char *names[4] = {"a", "b", "a", "c"};
    s->table.items = xcalloc(2, sizeof *s->table.items);
    s->next.items = xcalloc(2, sizeof *s->next.items);
    s->table.n = s->next.n = 2;
    for (unsigned i = 0; i < 4; i++) {
        struct tide_bitmap *b = i < 2 ? &s->table.items[i] : &s->next.items[i - 2];
        *b = (struct tide_bitmap){.name = xstrdup(names[i]),
                                  .granularity_bits = 16,
                                  .current = {0, 10 * i + 1},
                                  .successor = {1, 10 * i + 2}};
        b->extent[0] = TIDE_EXTENTS_OFFSET + (i % 2 * 2) * extent;
        b->extent[1] = b->extent[0] + extent;
    }
    s->table.items[1].last_job = xstrdup("job");
    s->group = some_id(&rng);
    s->coordinator = (struct tide_member){some_id(&rng), xstrdup("/c/d")};
    s->records = xcalloc(1, sizeof *s->records);
    s->n_records = 1;
    s->records[0] = (struct tide_record){some_id(&rng), xcalloc(2, sizeof(struct tide_member)), 2};
    s->records[0].members[0] = (struct tide_member){some_id(&rng), xstrdup("/c/d")};
    s->records[0].members[1] = (struct tide_member){some_id(&rng), xstrdup("/e")};
}

static const struct hostile {
    unsigned at, width;
    uint64_t value;
    const char
        *expected; /* NULL: what follows is shifted, and so refused for one reason or another */
} hostile[] = {
    {0, 1, 'X', "it does not begin as one"},
    {8, 4, 2, "its version is 2, and this program knows 1"},
    {16, 4, 271, "its length is 271, not 272..4096"},
    {16, 4, 4097, "its length is 4097, not 272..4096"},
    {16, 4, END + 1, "1 bytes follow after the last field"},
    {16, 4, END - 1, "the path of a group's member is not one, or ends beyond the end"},
    {20, 4, 5, "flags are 0x5, of which 0x4 are unknown"},
    {24, 8, UINT64_C(1) << 63,
     "sequence 9223372036854775808, ring's first 0, next epoch 100: not "
     "all below 2^63"},
    {64, 8, UINT64_C(1) << 63, "the disk's size is 9223372036854775808"},
    {64, 8, 64 * TiB,
     "bitmap 0: extent 0, 138551296 bytes at 786432, is not within 786432 to 933888"},
    {72, 8, UINT64_C(1) << 63, "the disk's size is 9223372036854775808"},
    {80, 4, 8, "region_bits is 8, not 9..62"},
    {80, 4, 63, "region_bits is 63, not 9..62"},
    {84, 4, 3, "slots is 3, not 4..55440"},
    {84, 4, 55441, "slots is 55441, not 4..55440"},
    {88, 8, UINT64_MAX, "ring's first 18446744073709551615"},
    {96, 8, 12, "bitmap 1: the successor area's epoch is 12, and the next one to be used 12"},
    {96, 8, UINT64_MAX, "next epoch 18446744073709551615"},
    {104, 8, 933887, "the extents end at 933887"},
    {104, 8, 933888 - 4096,
     "bitmap 1: extent 1, 36864 bytes at 897024, is not within 786432 to "
     "929792"},
    {104, 8, 0, "the extents end at 0"},
    {104, 8, UINT64_C(1) << 63, "the extents end at 9223372036854775808"},
    {112, 4, 3, "the witness is of kind 3"},
    {112, 4, UINT32_MAX, "the witness is of kind 4294967295"},
    {208, 4, UINT32_MAX, "4294967295 bitmaps do not fit into 315 bytes"},
    {240, 1, 0, "the driver's name is not one"},
    {271, 1, 'x', "the driver's name is not one"},
    {BITMAP_A + 32, 8, 786432, "two extents overlap"},
    {BITMAP_A + 32, 8, 933888, "bitmap 0: extent 2, 36864 bytes at 933888, is not within"},
    {208, 4, 3, NULL},
    {212, 4, UINT32_MAX, "4294967295 prepared bitmaps do not fit into"},
    {216, 4, UINT32_MAX, "4294967295 commit records do not fit into"},
    {BITMAP_A, 2, 0, NULL},
    {BITMAP_A, 2, 0xffff, "bitmap 0: its name is not one, or ends beyond the end"},
    {BITMAP_A + BITMAP, 1, 0, "bitmap 0: its name is not one, or ends beyond the end"},
    {BITMAP_A + BITMAP, 1, 'b', "two bitmaps of the same name, of 1 bytes"},
    {NEXT_C + BITMAP, 1, 'a', "two prepared bitmaps of the same name, of 1 bytes"},
    {BITMAP_A + 2, 2, 1, "bitmap 0: flags are 0x0, and its job's id has 1 bytes"},
    {BITMAP_B + 2, 2, 0xffff, "bitmap 1: its job's id is not one, or ends beyond the end"},
    {BITMAP_B + BITMAP + 1, 1, 0, "bitmap 1: its job's id is not one, or ends beyond the end"},
    {BITMAP_A + 4, 1, 8, "bitmap 0: granularity_bits is 8, not 9..31"},
    {BITMAP_A + 4, 1, 32, "bitmap 0: granularity_bits is 32, not 9..31"},
    {NEXT_A + 4, 1, 0, "prepared bitmap 0: granularity_bits is 0, not 9..31"},
    {NEXT_A + 4, 1, 15, NULL},
    {BITMAP_A + 5, 1, 64, "bitmap 0: flags are 0x40, and its job's id has 0 bytes"},
    {NEXT_A + 5, 1, 16, "prepared bitmap 0 depends on an answer that nobody waits for"},
    {BITMAP_A + 6, 1, 3, "bitmap 0: the current area is in extent 3, not 0..2"},
    {BITMAP_A + 7, 1, 3, "bitmap 0: the successor area is in extent 3, not 0..2"},
    {BITMAP_A + 7, 1, 0, "bitmap 0: current and successor are both in extent 0"},
    {BITMAP_A + 16, 8, 0, "bitmap 0: extent 0, 36864 bytes at 0, is not within"},
    {BITMAP_A + 16, 8, 786433,
     "bitmap 0: extent 0 begins at 786433, which is not a multiple of "
     "4096"},
    {BITMAP_A + 16, 8, 782336, "bitmap 0: extent 0, 36864 bytes at 782336, is not within"},
    {BITMAP_A + 24, 8, 786432, "two extents overlap: 36864 bytes at 786432, and one at 786432"},
    {BITMAP_A + 24, 8, 790528, "two extents overlap: 36864 bytes at 786432, and one at 790528"},
    {BITMAP_A + 24, 8, UINT64_MAX - 4095,
     "bitmap 0: extent 1, 36864 bytes at 18446744073709547520"},
    {BITMAP_B + 24, 8, 786432, "two extents overlap"},
    {NEXT_A + 24, 8, 827392, "two extents overlap"},
    {BITMAP_A + 40, 8, 0, "bitmap 0 has no current area"},
    {BITMAP_A + 40, 8, 100,
     "bitmap 0: the current area's epoch is 100, and the next one to be used "
     "100"},
    {BITMAP_A + 48, 8, 1, "two areas of one table have the epoch 1"},
    {BITMAP_A + 48, 8, 11, "two areas of one table have the epoch 11"},
    {COORDINATOR + 16, 2, 0, NULL},
    {COORDINATOR + 16, 2, 0xffff, "the path of a coordinator is not one, or ends beyond the end"},
    {COORDINATOR + 18, 1, 0, "the path of a coordinator is not one, or ends beyond the end"},
    {RECORD + 16, 4, 0, NULL},
    {RECORD + 16, 4, UINT32_MAX, "2147483647 members of a group do not fit into"},
    {MEMBER_2 + 16, 2, 0, NULL},
    {MEMBER_2 + 18, 1, 0, "the path of a group's member is not one, or ends beyond the end"},
};

static void refused(uint8_t *buf, size_t length, const char *expected, const char *what,
                    unsigned at)
{
    struct super back = {0};
    struct error err = ERROR_INIT;
    size_t used = get(buf + 16, 4);
    if (used >= HEAD && used <= length)
        fix_crc(buf);
    if (decode_exact(buf, length, &back, &err) != -EBADMSG)
        fail_msg("%s %u: not refused", what, at);
    if (strchr(err.text, '\n') || (expected && !strstr(err.text, expected)))
        fail_msg("%s %u: the error is\n  %s\nnot\n  %s", what, at, err.text, expected);
}

static void hostile_superblocks_are_refused_by_name(void **state)
{
    struct super s, back = {0};
    uint8_t good[4096], buf[4096];
    size_t length;
    known_super(&s);
    assert_int_equal(super_encode(&s, good, &length, NULL), 0);
    assert_int_equal(length, sizeof good);
    assert_int_equal(get(good + 16, 4), END);
    assert_int_equal(good[NEXT_C + BITMAP], 'c');
    assert_int_equal(good[MEMBER_2 + 18], '/');

    for (size_t i = 0; i < ARRAY_SIZE(hostile); i++) {
        const struct hostile *h = &hostile[i];
        memcpy(buf, good, sizeof buf);
        put(buf + h->at, h->width, h->value);
        refused(buf, sizeof buf, h->expected, "hostile field at", h->at);
    }

    const unsigned ids[] = {32, 48, COORDINATOR, RECORD, MEMBER_1, MEMBER_2};
    for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
        memcpy(buf, good, sizeof buf);
        memset(buf + ids[i], 0, 16);
        refused(buf, sizeof buf, NULL, "no id at", ids[i]);
    }
    memcpy(buf, good, sizeof buf); /* no group, and yet something is prepared for it */
    memset(buf + 224, 0, 16);
    refused(buf, sizeof buf, "2 bitmaps are prepared for no group", "group at", 224);

    memset(buf, 0, sizeof buf);
    struct error err = ERROR_INIT;
    assert_int_equal(super_decode(buf, sizeof buf, &back, &err), -EBADMSG);
    assert_string_equal(err.text, "it was never written");
    super_fini(&s);
}

/* Whatever a field says: no crash, and what is taken can be written again. */
static void random_fields_do_no_harm(void **state)
{
    struct rng rng = {test_seed()};
    uint8_t *buf = malloc(TIDE_SUPER_BYTES);
    unsigned taken = 0;
    for (int i = 0; i < 3000; i++) {
        struct super s, back = {0};
        size_t length, again;
        some_super(&rng, &s, 3);
        assert_int_equal(super_encode(&s, buf, &length, NULL), 0);
        size_t used = get(buf + 16, 4);
        for (uint64_t n = 1 + rng_below(&rng, 3); n--;) {
            size_t at = 16 + rng_below(&rng, used - 16);
            buf[at] = (uint8_t)(rng_below(&rng, 2) ? rng_next(&rng) : 0xff * rng_below(&rng, 2));
        }
        if (rng_below(&rng, 8) == 0)
            put(buf + 16, 4, HEAD + rng_below(&rng, used - HEAD + 1));
        used = get(buf + 16, 4);
        if (used >= HEAD && used <= length)
            fix_crc(buf);
        struct error err = ERROR_INIT;
        if (decode_exact(buf, length, &back, &err) == 0) {
            taken++;
            if (super_encode(&back, buf, &again, &err) < 0)
                fail_msg("round %d: %s", i, err.text);
            super_fini(&back);
        }
        super_fini(&s);
    }
    assert_true(taken > 100);
    free(buf);
}

/* ---- the ring ---- */

static void some_block(struct rng *rng, struct ring_block *b, const struct tide_id *session)
{
    memset(b, 0, sizeof *b);
    b->session = *session;
    b->sequence = rng_next(rng);
    b->n_changes = (unsigned)rng_below(rng, RING_CHANGES + 1);
    for (unsigned i = 0; i < b->n_changes; i++) {
        b->changes[i].slot = (uint16_t)rng_next(rng);
        b->changes[i].region = (uint32_t)rng_next(rng);
    }
    b->slice_first = (unsigned)rng_below(rng, 65536);
    b->slice_length = (unsigned)rng_below(rng, RING_SLICE + 1);
    for (unsigned i = 0; i < b->slice_length; i++)
        b->slice[i] = (uint32_t)rng_next(rng);
}

static void ring_blocks_come_back_whole_or_not(void **state)
{
    struct rng rng = {test_seed()};
    struct tide_id session = some_id(&rng), other = some_id(&rng);
    uint8_t buf[RING_BLOCK];
    struct ring_block b, back;
    for (int i = 0; i < 200; i++) {
        some_block(&rng, &b, &session);
        memset(&back, 0, sizeof back);
        memset(buf, 0xaa, sizeof buf);
        ring_encode(&b, buf);
        assert_int_equal(ring_decode(buf, &session, &back), RING_OURS);
        assert_memory_equal(&back, &b, offsetof(struct ring_block, slice));
        assert_memory_equal(back.slice, b.slice, b.slice_length * sizeof *b.slice);
        assert_int_equal(ring_decode(buf, &other, &back), RING_OTHER);
    }
    for (size_t at = 0; at < sizeof buf; at++) {
        uint8_t was = buf[at];
        buf[at] ^= (uint8_t)(1 + rng_below(&rng, 255));
        assert_int_equal(ring_decode(buf, &session, &back), RING_BAD);
        buf[at] = was;
    }
    put(buf + 12, 2, RING_CHANGES + 1);
    put(buf + 8, 4, crc_end(crc_add(CRC_BEGIN, buf + 12, RING_BLOCK - 12)));
    assert_int_equal(ring_decode(buf, &session, &back), RING_BAD);
    put(buf + 12, 2, 0);
    put(buf + 14, 2, RING_SLICE + 1);
    put(buf + 8, 4, crc_end(crc_add(CRC_BEGIN, buf + 12, RING_BLOCK - 12)));
    assert_int_equal(ring_decode(buf, &session, &back), RING_BAD);
    memset(buf, 0, sizeof buf);
    assert_int_equal(ring_decode(buf, &session, &back), RING_OTHER);
}

/* The stupid model: the ring as bytes, and the table after each transaction kept whole. */
struct history {
    struct rng rng;
    unsigned slots, slice;
    struct tide_id session;
    uint64_t first, next; /* sequences */
    bool torn;            /* the block at `next` is */
    uint8_t ring[TIDE_RING_BLOCKS][RING_BLOCK];
    uint32_t *table, *read;
};

/* The next transaction; TORN: not all of its sectors arrive, and the table stays as it was, unless
 * the rest was the same. */
static void transact(struct history *h, bool torn)
{
    uint8_t buf[RING_BLOCK], *at = h->ring[h->next % TIDE_RING_BLOCKS];
    struct ring_block b = {.session = h->session, .sequence = h->next};
    uint32_t *before = xcalloc(h->slots, sizeof *before);
    memcpy(before, h->table, h->slots * sizeof *before);
    b.n_changes = (unsigned)rng_below(&h->rng, RING_CHANGES + 1);
    for (unsigned i = 0; i < b.n_changes; i++) {
        uint16_t slot = (uint16_t)rng_below(&h->rng, h->slots);
        uint32_t region =
            rng_below(&h->rng, 4) ? (uint32_t)rng_below(&h->rng, 100000) : REGION_NONE;
        b.changes[i].slot = slot;
        b.changes[i].region = h->table[slot] = region;
    }
    ring_slice(&b, h->table, h->slots, h->slice);
    ring_encode(&b, buf);
    for (unsigned s = 0; s < RING_BLOCK; s += 512)
        if (!torn || rng_below(&h->rng, 2))
            memcpy(at + s, buf + s, 512);
    h->torn = memcmp(at, buf, RING_BLOCK) != 0;
    if (!h->torn)
        h->next++;
    else
        memcpy(h->table, before, h->slots * sizeof *before);
    free(before);
}

static int rebuild(struct history *h, uint64_t *next, struct error *err)
{
    struct ring_block *blocks = xcalloc(TIDE_RING_BLOCKS + 1, sizeof *blocks);
    size_t n = 0;
    unsigned from = (unsigned)rng_below(&h->rng, TIDE_RING_BLOCKS);
    for (unsigned i = 0; i < TIDE_RING_BLOCKS; i++)
        n += ring_decode(h->ring[(from + i) % TIDE_RING_BLOCKS], &h->session, &blocks[n]) ==
             RING_OURS;
    int r = ring_rebuild(blocks, n, h->first, h->read, h->slots, next, err);
    free(blocks);
    return r;
}

static void one_history(uint64_t seed)
{
    struct history h = {.rng = {seed}};
    struct error err = ERROR_INIT;
    uint64_t next = 0;
    h.slice = 1 + (unsigned)rng_below(&h.rng, RING_SLICE);
    h.slots = 4 + (unsigned)rng_below(&h.rng, (uint64_t)(TIDE_RING_BLOCKS - 1) * h.slice - 3);
    if ((TIDE_RING_BLOCKS - 1) * h.slice < 8)
        h.slots = 4;
    h.table = xcalloc(h.slots, sizeof *h.table);
    h.read = xcalloc(h.slots, sizeof *h.read);
    h.first = h.next = rng_next(&h.rng) >> 2;
    for (int life = 0; life < 4; life++) {
        h.session = some_id(&h.rng);
        h.first = h.next;
        h.torn = false; /* or of the life before, which does not matter */
        for (unsigned i = 0; i < h.slots; i++)
            h.table[i] = REGION_NONE;
        transact(&h, false); /* there is one in every session */
        for (int crash = 0; crash < 3; crash++) {
            for (uint64_t n = rng_below(&h.rng, 150 >> rng_below(&h.rng, 7)); n--;)
                transact(&h, false);
            if (!h.torn && rng_below(&h.rng, 2))
                transact(&h, true);
            if (rebuild(&h, &next, &err) < 0)
                fail_msg("seed %llu: %s", (unsigned long long)seed, err.text);
            if (next != h.next || memcmp(h.table, h.read, h.slots * sizeof *h.table) != 0)
                fail_msg("seed %llu: %u slots, slice %u: not the table after %llu transactions",
                         (unsigned long long)seed, h.slots, h.slice,
                         (unsigned long long)(h.next - h.first));
        }
        /* A hole anywhere in what is needed is seen, and elsewhere does not matter. */
        uint64_t n = h.next - h.first, needed = ring_full_table(h.slots, h.slice);
        if (n > 1) {
            uint64_t back = 1 + rng_below(&h.rng, min_u64(n, TIDE_RING_BLOCKS) - 1);
            uint8_t *at = h.ring[(h.next - 1 - back) % TIDE_RING_BLOCKS];
            at[rng_below(&h.rng, RING_BLOCK)] ^= 1;
            bool hole = back < needed; /* all since the start are needed when they are fewer */
            int r = rebuild(&h, &next, &err);
            if (r != (hole ? -EBADMSG : 0))
                fail_msg("seed %llu: block %llu of %llu, %llu needed: %d", (unsigned long long)seed,
                         (unsigned long long)back, (unsigned long long)n,
                         (unsigned long long)needed, r);
            assert_true(hole ? strstr(err.text, "is missing") != NULL
                             : memcmp(h.table, h.read, h.slots * sizeof *h.table) == 0);
            error_clear(&err);
        }
    }
    free(h.table);
    free(h.read);
}

static void the_ring_tells_the_table(void **state)
{
    const char *one = getenv("TEST_SEED"), *more = getenv("TEST_HISTORIES");
    uint64_t n = more ? strtoull(more, NULL, 0) : 300;
    if (one)
        one_history(strtoull(one, NULL, 0));
    else
        for (uint64_t seed = 1; seed <= n; seed++)
            one_history(seed);
}

static void a_ring_without_a_transaction_is_lost(void **state)
{
    struct error err = ERROR_INIT;
    uint32_t table[16];
    uint64_t next = 0;
    struct ring_block opening = {.sequence = 77};
    memset(table, 0, sizeof table);
    assert_int_equal(ring_rebuild(NULL, 0, 77, table, ARRAY_SIZE(table), &next, &err), -EBADMSG);
    assert_string_equal(err.text, "the hot ring is lost: it has no transaction from 77 on");
    error_clear(&err);
    assert_int_equal(ring_rebuild(&opening, 1, 77, table, ARRAY_SIZE(table), &next, NULL), 0);
    assert_int_equal(next, 78);
    for (size_t i = 0; i < ARRAY_SIZE(table); i++)
        assert_int_equal(table[i], REGION_NONE);
}

static void hostile_transactions_are_refused(void **state)
{
    struct error err = ERROR_INIT;
    uint32_t table[16];
    uint64_t next;
    struct ring_block b = {.sequence = 5, .n_changes = 1, .slice_length = 16};
    b.changes[0].slot = 16;
    assert_int_equal(ring_rebuild(&b, 1, 5, table, 16, &next, &err), -EBADMSG);
    assert_string_equal(err.text, "transaction 5 of the hot ring changes slot 16 of 16");
    error_clear(&err);
    b.changes[0].slot = 15;
    b.slice_length = 17;
    assert_int_equal(ring_rebuild(&b, 1, 5, table, 16, &next, &err), -EBADMSG);
    assert_string_equal(err.text, "transaction 5 of the hot ring holds 17 slots from 0 on, of 16");
    error_clear(&err);
    b.slice_length = 16;
    b.slice_first = 16;
    assert_int_equal(ring_rebuild(&b, 1, 5, table, 16, &next, NULL), -EBADMSG);
    b.slice_first = 15;
    assert_int_equal(ring_rebuild(&b, 1, 5, table, 16, &next, NULL), 0);
    /* from before the session's first one: not of it, whatever its id says */
    assert_int_equal(ring_rebuild(&b, 1, 6, table, 16, &next, &err), -EBADMSG);
    assert_string_equal(err.text, "the hot ring is lost: it has no transaction from 6 on");
    error_clear(&err);
}

/* ---- areas ---- */

static void sectors_hold_for_one_place_and_epoch(void **state)
{
    struct rng rng = {test_seed()};
    struct tide_id uuid = some_id(&rng), stranger = some_id(&rng);
    uint8_t payload[AREA_PAYLOAD], sector[AREA_SECTOR];
    const uint8_t *back = NULL;
    uint64_t other = 1;
    for (size_t i = 0; i < sizeof payload; i++)
        payload[i] = (uint8_t)rng_next(&rng);
    area_encode(sector, &uuid, 787968, 42, payload);
    assert_int_equal(area_decode(sector, &uuid, 787968, 42, &back, &other), AREA_DATA);
    assert_memory_equal(back, payload, sizeof payload);
    assert_int_equal(other, 0);
    assert_int_equal(area_decode(sector, &uuid, 787968, 43, &back, &other), AREA_CLEAN);
    assert_int_equal(other, 42);
    assert_int_equal(area_decode(sector, &uuid, 788480, 42, &back, &other), AREA_BAD);
    assert_int_equal(area_decode(sector, &stranger, 787968, 42, &back, &other), AREA_BAD);
    assert_int_equal(area_decode(sector, &stranger, 787968, 43, &back, &other), AREA_BAD);
    for (size_t at = 0; at < sizeof sector; at++) {
        uint8_t was = sector[at];
        sector[at] ^= (uint8_t)(1 + rng_below(&rng, 255));
        assert_int_equal(area_decode(sector, &uuid, 787968, 42, &back, &other), AREA_BAD);
        assert_int_equal(area_decode(sector, &uuid, 787968, 43, &back, &other), AREA_BAD);
        sector[at] = was;
    }
    memset(sector, 0, sizeof sector);
    assert_int_equal(area_decode(sector, &uuid, 787968, 42, &back, &other), AREA_CLEAN);
    assert_int_equal(other, 0);
    sector[300] = 1; /* not all zero: damaged */
    assert_int_equal(area_decode(sector, &uuid, 787968, 42, &back, &other), AREA_BAD);
}

static void areas_have_room_for_each_bit(void **state)
{
    static const uint64_t sizes[] = {0, 1, 512, 65536, MiB + 1, 16 * TiB, INT64_MAX};
    for (size_t i = 0; i < ARRAY_SIZE(sizes); i++)
        for (unsigned bits = 9; bits <= 31; bits++) {
            uint64_t granules = div_round_up(sizes[i], UINT64_C(1) << bits);
            uint64_t sectors = area_sectors(sizes[i], bits),
                     bytes = tide_extent_bytes(sizes[i], bits);
            assert_true(sectors * AREA_PAYLOAD >= div_round_up(granules, 8));
            assert_true(sectors == 0 || (sectors - 1) * AREA_PAYLOAD < div_round_up(granules, 8));
            assert_true(bytes >= sectors * AREA_SECTOR && bytes >= 4096 && bytes % 4096 == 0);
            assert_true(bytes <= sectors * AREA_SECTOR + 4096);
        }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(superblocks_come_back),
    cmocka_unit_test(a_superblock_may_be_full_but_not_fuller),
    cmocka_unit_test(no_damaged_byte_of_a_superblock_passes),
    cmocka_unit_test(a_torn_superblock_is_none),
    cmocka_unit_test(hostile_superblocks_are_refused_by_name),
    cmocka_unit_test(random_fields_do_no_harm),
    cmocka_unit_test(ring_blocks_come_back_whole_or_not),
    cmocka_unit_test(the_ring_tells_the_table),
    cmocka_unit_test(a_ring_without_a_transaction_is_lost),
    cmocka_unit_test(hostile_transactions_are_refused),
    cmocka_unit_test(sectors_hold_for_one_place_and_epoch),
    cmocka_unit_test(areas_have_room_for_each_bit),
};

UNIT_MAIN(tests)
