/* The set of dirty regions against a byte per granule, and against itself. */
#include "bitmap/bitmap.h"
#include "seed.h"
#include "unit.h"

#include <errno.h>
#include <unistd.h>

struct model {
    uint64_t size, granularity, n;
    uint8_t *dirty; /* one byte a granule */
};

static struct model model_new(uint64_t size, uint64_t granularity)
{
    uint64_t n = div_round_up(size, granularity);
    return (struct model){size, granularity, n, xcalloc(n + 1, 1)};
}

static void model_fini(struct model *m)
{
    free(m->dirty);
}

static void model_mark(struct model *m, struct range r)
{
    for (uint64_t g = r.start / m->granularity; r.length && g < m->n; g++)
        if (g * m->granularity < range_end(r))
            m->dirty[g] = 1;
        else
            break;
}

static void model_clear(struct model *m, struct range r)
{
    for (uint64_t g = r.start / m->granularity; g < m->n; g++) {
        uint64_t end = min_u64((g + 1) * m->granularity, m->size);
        if (end > range_end(r))
            break;
        if (g * m->granularity >= r.start && r.length)
            m->dirty[g] = 0;
    }
}

static bool model_get(const struct model *m, uint64_t offset)
{
    return offset < m->size && m->dirty[offset / m->granularity];
}

/* How many bytes from FROM on are as dirty as it is. */
static uint64_t model_same(const struct model *m, uint64_t from)
{
    uint64_t g = from / m->granularity;
    uint8_t what = m->dirty[g];

    while (g < m->n && m->dirty[g] == what)
        g++;
    return min_u64(g * m->granularity, m->size) - from;
}

static void must_be_valid(const struct bitmap *bm, const char *after)
{
    const char *broken;

    if (!bitmap_valid(bm, &broken))
        fail_msg("after %s: %s", after, broken);
}

/* Every bit, by walking the runs; and the count. */
static void must_equal(const struct bitmap *bm, const struct model *m, const char *after)
{
    struct range run;
    uint64_t at = 0, count = 0, g = 0;

    must_be_valid(bm, after);
    assert_int_equal(bitmap_size(bm), m->size);
    while (bitmap_next(bm, at, UINT64_MAX, &run)) {
        assert_true(run.length > 0 && run.start >= at && range_end(run) <= m->size);
        for (; g * m->granularity < run.start; g++)
            if (m->dirty[g])
                fail_msg("after %s: granule %llu is clean", after, (unsigned long long)g);
        for (; g * m->granularity < range_end(run); g++, count++)
            if (!m->dirty[g])
                fail_msg("after %s: granule %llu is dirty", after, (unsigned long long)g);
        at = range_end(run);
    }
    for (; g < m->n; g++)
        if (m->dirty[g])
            fail_msg("after %s: granule %llu is clean", after, (unsigned long long)g);
    assert_int_equal(bitmap_count(bm), count * m->granularity);
}

/* Random questions, asked of both. */
static void must_answer_alike(const struct bitmap *bm, const struct model *m, struct rng *rng)
{
    struct range r = rng_range(rng, m->size), run;
    uint64_t from = r.start, max = r.length + 1, clean = 0, count = 0, length, at;

    assert_int_equal(bitmap_get(bm, from), model_get(m, from));
    assert_false(bitmap_get(bm, m->size + rng_below(rng, 3)));

    at = from;
    if (at < m->size && !model_get(m, at))
        at += model_same(m, at);
    bool found = bitmap_next(bm, from, max, &run);
    assert_int_equal(found, at < m->size);
    if (found) {
        assert_int_equal(run.start, at);
        assert_int_equal(run.length, min_u64(model_same(m, at), max));
    }

    at = from;
    if (at < m->size && model_get(m, at))
        at += model_same(m, at);
    found = bitmap_next_clean(bm, from, &clean);
    assert_int_equal(found, at < m->size);
    if (found)
        assert_int_equal(clean, at);

    if (from < m->size) {
        assert_int_equal(bitmap_status(bm, from, max, &length), model_get(m, from));
        assert_int_equal(length, min_u64(model_same(m, from), max));
    }

    for (at = r.start; at < range_end(r);) {
        uint64_t n = min_u64(model_same(m, at), range_end(r) - at);
        count += model_get(m, at) ? n : 0;
        at += n;
    }
    assert_int_equal(bitmap_count_range(bm, r), count);
    assert_int_equal(bitmap_any(bm, r), count > 0);
}

/* Sizes around every edge: words, levels, pages, and from calloc to a mapping. */
static const struct {
    uint64_t size, granularity;
    int steps;
} shapes[] = {
    {0, 512, 20},
    {1, 512, 50},
    {512, 512, 50},
    {513, 512, 50},
    {63 * 512, 512, 300},
    {64 * 512, 512, 300},
    {64 * 512 + 1, 512, 300},
    {64 * 64 * 512, 512, 500},
    {64 * 64 * 512 + 7, 512, 500},
    {1024 * 1024 - 1, 4096, 500},
    {(1 << 20) + 512, 65536, 300},
    {129 * MiB + 12345, 4096, 300},
    {5 * GiB + 7, 2 * GiB, 200},
    {640 * MiB + 3, 512, 60},
};

static void marks_and_clears_agree_with_a_byte_per_granule(void **state)
{
    struct rng rng = {test_seed()};

    for (size_t s = 0; s < ARRAY_SIZE(shapes); s++) {
        const uint64_t size = shapes[s].size;
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(size, shapes[s].granularity);
        CLEANUP(model_fini) struct model m = model_new(size, shapes[s].granularity);

        must_equal(bm, &m, "new");
        for (int i = 0; i < shapes[s].steps; i++) {
            struct range r = rng_range(&rng, size);
            uint64_t what = rng_below(&rng, 40);
            const char *did = "mark";
            if (what == 0) {
                did = "mark_all";
                bitmap_mark_all(bm);
                memset(m.dirty, 1, m.n);
            } else if (what == 1) {
                did = "clear_all";
                bitmap_clear_all(bm);
                memset(m.dirty, 0, m.n);
            } else if (what == 2) { /* beyond the end is cut */
                did = "mark to beyond the end";
                bitmap_mark(bm, range_make(r.start, size + r.length));
                model_mark(&m, range_between(r.start, size));
            } else if (what == 3) {
                did = "clear to the end";
                bitmap_clear(bm, range_make(r.start, size - r.start));
                model_clear(&m, range_between(r.start, size));
            } else if (what < 22) {
                bitmap_mark(bm, r);
                model_mark(&m, r);
            } else {
                did = "clear";
                bitmap_clear(bm, r);
                model_clear(&m, r);
            }
            must_equal(bm, &m, did);
            for (int q = 0; q < 10; q++)
                must_answer_alike(bm, &m, &rng);
        }
    }
}

static void marking_rounds_outwards_and_clearing_inwards(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(10000, 4096);
    struct range run;

    bitmap_mark(bm, range_make(4095, 2));
    assert_int_equal(bitmap_count(bm), 8192);
    bitmap_clear(bm, range_between(1, 8191));
    assert_int_equal(bitmap_count(bm), 8192);
    bitmap_clear(bm, range_between(1, 8192));
    assert_int_equal(bitmap_count(bm), 4096);

    /* The last granule is cut by the size: whole for the count, cut in a run, and cleared
     * only by what reaches the size. */
    bitmap_mark(bm, range_make(9999, 1));
    assert_int_equal(bitmap_count(bm), 8192);
    assert_true(bitmap_next(bm, 4096, UINT64_MAX, &run));
    assert_int_equal(run.start, 8192);
    assert_int_equal(run.length, 10000 - 8192);
    assert_int_equal(bitmap_count_range(bm, range_make(0, 10000)), 4096 + 10000 - 8192);
    bitmap_clear(bm, range_between(8192, 9999));
    assert_true(bitmap_get(bm, 9999));
    bitmap_clear(bm, range_between(8192, 10000));
    assert_false(bitmap_get(bm, 9999));

    bitmap_mark(bm, range_make(5000, 0)); /* nothing */
    bitmap_mark(bm, range_make(10000, 5));
    bitmap_mark(bm, range_make(UINT64_MAX, UINT64_MAX));
    assert_int_equal(bitmap_count(bm), 4096);
}

static void large_clears_give_back_whole_pages_only(void **state)
{
    struct rng rng = {test_seed()};
    const uint64_t size = 1 * GiB + 12345;
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(size, 512);
    CLEANUP(model_fini) struct model m = model_new(size, 512);

    for (int i = 0; i < 10; i++) {
        uint64_t start = rng_below(&rng, size / 2);
        struct range r = range_make(start, 300 * MiB + rng_below(&rng, size / 2 - 300 * MiB));
        bitmap_mark_all(bm);
        memset(m.dirty, 1, m.n);
        bitmap_clear(bm, r);
        model_clear(&m, r);
        must_equal(bm, &m, "a large clear");
    }
}

static void the_largest_disk_has_no_wrapping_arithmetic(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(INT64_MAX, 2 * GiB);
    struct range run;
    uint64_t length, clean;

    bitmap_mark(bm, range_make(INT64_MAX - 1, 1));
    assert_int_equal(bitmap_count(bm), 2 * GiB);
    assert_true(bitmap_next(bm, 0, UINT64_MAX, &run));
    assert_int_equal(run.start, INT64_MAX - 2 * GiB + 1);
    assert_int_equal(range_end(run), INT64_MAX);
    assert_false(bitmap_status(bm, 0, UINT64_MAX, &length));
    assert_int_equal(length, run.start);
    assert_false(bitmap_next_clean(bm, run.start, &clean));
    bitmap_mark_all(bm);
    assert_int_equal(bitmap_count(bm), (uint64_t)1 << 63);
    assert_int_equal(bitmap_count_range(bm, range_make(0, UINT64_MAX)), INT64_MAX);
    must_be_valid(bm, "mark_all");
    bitmap_clear(bm, range_make(1, UINT64_MAX - 1));
    assert_int_equal(bitmap_count(bm), 2 * GiB);
    must_be_valid(bm, "clear");
}

static void scatter(struct rng *rng, struct bitmap *bm, struct model *m, int n)
{
    for (int i = 0; i < n; i++) {
        struct range r = rng_range(rng, m->size);
        bitmap_mark(bm, r);
        model_mark(m, r);
        r = rng_range(rng, m->size);
        bitmap_clear(bm, r);
        model_clear(m, r);
    }
}

static void serial_form_has_the_lowest_bit_first(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(20 * 512 + 1, 512);
    uint8_t buf[8];

    bitmap_mark(bm, range_make(0, 1));
    bitmap_mark(bm, range_make(9 * 512, 1));
    bitmap_mark(bm, range_make(20 * 512, 1));
    assert_int_equal(bitmap_serial_length(bm), 3);
    memset(buf, 0xaa, sizeof buf);
    bitmap_serialise(bm, 0, buf, sizeof buf);
    assert_memory_equal(buf, "\x01\x02\x10\0\0\0\0\0", 8);

    /* Ones in the padding are not bits. */
    memset(buf, 0xff, sizeof buf);
    bitmap_deserialise(bm, 0, buf, sizeof buf);
    must_be_valid(bm, "deserialise");
    assert_int_equal(bitmap_count(bm), 21 * 512);
    assert_int_equal(bitmap_serial_kind(bm, 0, 4096), BITMAP_CHUNK_ONES);
}

/* mark; serialise; deserialise: whole and in pieces of any alignment. */
static void serialised_and_read_back_is_the_same(void **state)
{
    struct rng rng = {test_seed()};

    for (int round = 0; round < 200; round++) {
        const uint64_t granularity = 512 << rng_below(&rng, 4);
        const uint64_t size = rng_below(&rng, round % 10 ? 2 * MiB : 900 * MiB);
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(size, granularity);
        CLEANUP(bitmap_freep) struct bitmap *back = bitmap_new(size, granularity);
        CLEANUP(model_fini) struct model m = model_new(size, granularity);
        const uint64_t length = bitmap_serial_length(bm);
        CLEANUP(memory_freep) uint8_t *whole = xcalloc(length + 16, 1);
        CLEANUP(memory_freep) uint8_t *pieces = xcalloc(length + 16, 1);

        scatter(&rng, bm, &m, (int)rng_below(&rng, 20));
        bitmap_serialise(bm, 0, whole, length + 16);
        for (uint64_t g = 0; g < m.n; g++)
            assert_int_equal(whole[g / 8] >> (g % 8) & 1, m.dirty[g]);
        for (uint64_t g = m.n; g < (length + 16) * 8; g++)
            assert_int_equal(whole[g / 8] >> (g % 8) & 1, 0);

        bitmap_mark(back, rng_range(&rng, size)); /* is to be replaced */
        for (uint64_t at = 0; at < length;) {
            uint64_t n = 1 + rng_below(&rng, length - at + 10);
            bitmap_serialise(bm, at, pieces + at, min_u64(n, length + 16 - at));
            bitmap_deserialise(back, at, pieces + at, min_u64(n, length + 16 - at));
            must_be_valid(back, "deserialise");
            at += n;
        }
        assert_memory_equal(whole, pieces, length);
        must_equal(back, &m, "deserialise");

        for (int i = 0; i < 30; i++) {
            struct range r = rng_range(&rng, length + 4);
            struct range span = bitmap_serial_span(bm, r.start, r.length);
            uint64_t ones = 0, zeroes = 0;
            for (uint64_t g = r.start * 8; g < range_end(r) * 8 && g < m.n; g++)
                *(m.dirty[g] ? &ones : &zeroes) += 1;
            enum bitmap_chunk kind = bitmap_serial_kind(bm, r.start, r.length);
            assert_int_equal(kind, !ones     ? BITMAP_CHUNK_ZEROES
                                   : !zeroes ? BITMAP_CHUNK_ONES
                                             : BITMAP_CHUNK_MIXED);
            assert_int_equal(div_round_up(span.length, granularity), ones + zeroes);
            if (ones + zeroes)
                assert_int_equal(span.start, r.start * 8 * granularity);
        }
    }
}

static void merge_across_granularities_loses_nothing(void **state)
{
    struct rng rng = {test_seed()};

    for (int round = 0; round < 300; round++) {
        const uint64_t size = rng_below(&rng, 4 * MiB);
        const uint64_t from_granularity = 512 << rng_below(&rng, 9);
        const uint64_t to_granularity = 512 << rng_below(&rng, 9);
        CLEANUP(bitmap_freep) struct bitmap *from = bitmap_new(size, from_granularity);
        CLEANUP(bitmap_freep) struct bitmap *to = bitmap_new(size, to_granularity);
        CLEANUP(model_fini) struct model mf = model_new(size, from_granularity);
        CLEANUP(model_fini) struct model mt = model_new(size, to_granularity);

        scatter(&rng, from, &mf, (int)rng_below(&rng, 10));
        scatter(&rng, to, &mt, (int)rng_below(&rng, 10));
        struct range cut = rng_range(&rng, size);
        bool whole = rng_below(&rng, 2), copy = whole && rng_below(&rng, 2);
        if (whole)
            cut = range_make(0, size);
        if (copy)
            memset(mt.dirty, 0, mt.n);
        for (uint64_t g = 0; g < mf.n; g++)
            if (mf.dirty[g])
                model_mark(
                    &mt, range_intersect(range_make(g * from_granularity, from_granularity), cut));
        if (copy)
            bitmap_copy(to, from);
        else if (whole)
            bitmap_merge(to, from);
        else
            bitmap_merge_range(to, from, cut);
        must_equal(to, &mt, "merge");
        must_equal(from, &mf, "being merged");

        CLEANUP(bitmap_freep) struct bitmap *dup = bitmap_dup(to);
        must_equal(dup, &mt, "dup");
    }
}

static void merge_range_leaves_out_what_the_smaller_has_not(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *large = bitmap_new(1 * MiB, 4096);
    CLEANUP(bitmap_freep) struct bitmap *small = bitmap_new(64 * KiB, 65536);

    bitmap_mark(large, range_make(500 * KiB, 1));
    bitmap_merge_range(small, large, range_make(0, UINT64_MAX));
    assert_int_equal(bitmap_count(small), 0);
    bitmap_mark(small, range_make(3, 1));
    bitmap_merge_range(large, small, range_make(0, UINT64_MAX));
    assert_int_equal(bitmap_count(large), 64 * KiB + 4096);
}

static void resize_drops_what_is_beyond_and_adds_clean(void **state)
{
    struct rng rng = {test_seed()};

    for (int round = 0; round < 40; round++) {
        const uint64_t granularity = 512 << rng_below(&rng, 5);
        const uint64_t most = round % 8 ? 3 * MiB : 1200 * MiB; /* calloc, or a mapping too */
        uint64_t size = rng_below(&rng, most);
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(size, granularity);
        struct model m = model_new(size, granularity);

        for (int i = 0; i < 12; i++) {
            scatter(&rng, bm, &m, 4);
            uint64_t next = rng_below(&rng, 4) ? rng_below(&rng, most)
                                               : size + rng_below(&rng, 2 * granularity);
            if (rng_below(&rng, 16) == 0)
                next = 0;
            struct model grown = model_new(next, granularity);
            memcpy(grown.dirty, m.dirty, min_u64(m.n, grown.n));
            model_fini(&m);
            m = grown;
            size = next;
            assert_int_equal(bitmap_resize(bm, size), 0);
            must_equal(bm, &m, "resize");
        }
        model_fini(&m);
    }
}

static void lent_words_may_move(void **state)
{
    struct rng rng = {test_seed()};
    for (int i = 0; i < 20; i++) {
        const uint64_t size = 1 + rng_below(&rng, 4 * MiB), larger = size + rng_below(&rng, GiB);
        const uint64_t n = bitmap_word_count(size, 512);
        CLEANUP(memory_freep) uint64_t *here = xcalloc(n, 8);
        CLEANUP(memory_freep) uint64_t *there = xcalloc(bitmap_word_count(larger, 512), 8);
        CLEANUP(model_fini) struct model m = model_new(size, 512);
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new_over(here, size, 512);
        scatter(&rng, bm, &m, 50);
        memcpy(there, here, n * 8);
        assert_int_equal(bitmap_move(bm, there, larger), 0);
        must_equal(bm, &m, "a move");
        const uint64_t count = bitmap_count(bm);
        assert_int_equal(bitmap_resize(bm, larger), 0);
        must_be_valid(bm, "growing into the room");
        assert_int_equal(bitmap_count(bm), count);
        memset(here, 0xff, n * 8);
        bitmap_mark(bm, range_make(larger - 1, 1));
        must_be_valid(bm, "a mark in the room");
    }
}

static void lent_words_are_the_bits(void **state)
{
    struct rng rng = {test_seed()};
    const uint64_t size = 40 * MiB + 513;
    const uint64_t n = bitmap_word_count(size, 512);
    CLEANUP(memory_freep) uint64_t *words = xcalloc(n, 8);
    CLEANUP(model_fini) struct model m = model_new(size, 512);

    {
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new_over_zeroes(words, size, 512);
        scatter(&rng, bm, &m, 50);
        must_equal(bm, &m, "marks");
        assert_true(bitmap_memory(bm) < n * 8 / 32);
        assert_int_equal(bitmap_resize(bm, size * 2), -ENOTSUP);
    }
    words[n - 1] = ~UINT64_C(0); /* what is beyond the size does not count */
    model_mark(&m, range_between((n - 1) * 64 * 512, size));
    {
        CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new_over(words, size, 512);
        must_equal(bm, &m, "a new life");
        bitmap_clear_all(bm);
        memset(m.dirty, 0, m.n);
        must_equal(bm, &m, "clear_all");
    }
    for (uint64_t w = 0; w < n; w++)
        assert_int_equal(words[w], 0);
}

static uint64_t resident_bytes(void)
{
    unsigned long long total, resident;
    FILE *f = fopen("/proc/self/statm", "re");

    assert_int_equal(fscanf(f, "%llu %llu", &total, &resident), 2);
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static void memory_follows_what_is_dirty_on_64_tib(void **state)
{
    struct rng rng = {test_seed()};
    enum { MARKS = 2000 };
    const uint64_t size = 64 * TiB, before = resident_bytes();
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(size, 4096);
    struct range run;
    uint64_t at, found = 0, clean;

    assert_non_null(bm);
    assert_true(bitmap_memory(bm) < 64 * KiB);
    for (int i = 0; i < MARKS; i++)
        bitmap_mark(bm, range_make(rng_below(&rng, size), 1));
    /* Going over it reads nothing where nothing is: pages read would be resident. */
    for (at = 0; bitmap_next(bm, at, UINT64_MAX, &run); at = range_end(run))
        found += run.length;
    assert_int_equal(found, bitmap_count(bm));
    assert_true(found > MARKS * 4096 * 9 / 10);
    assert_true(bitmap_next_clean(bm, 0, &clean));
    assert_int_equal(bitmap_count_range(bm, range_make(0, size)), found);
    assert_true(bitmap_any(bm, range_make(size / 2, size / 2)));
    /* A page of leaf for each mark, and the levels above: 2^34 / 64^2 bytes the next. */
    assert_true(bitmap_memory(bm) < 3 * MARKS * 4096);
    assert_true(resident_bytes() - before < 6 * MARKS * 4096);

    bitmap_mark(bm, range_make(10 * TiB, 1 * TiB)); /* 32 MiB of leaf */
    assert_true(bitmap_memory(bm) > 32 * MiB);
    bitmap_clear(bm, range_make(10 * TiB + 4096, 1 * TiB));
    assert_true(bitmap_memory(bm) < 3 * MARKS * 4096);
    bitmap_clear_all(bm);
    assert_true(bitmap_memory(bm) < 64 * KiB);
    assert_int_equal(bitmap_count(bm), 0);
    assert_false(bitmap_next(bm, 0, 1, &run));

    bitmap_mark(bm, range_make(size - 1, 1));
    assert_true(bitmap_next(bm, 0, UINT64_MAX, &run));
    assert_int_equal(run.start, size - 4096);
    CLEANUP(bitmap_freep) struct bitmap *dup = bitmap_dup(bm);
    assert_int_equal(bitmap_resize(dup, size / 2), 0);
    assert_int_equal(bitmap_count(dup), 0);
    assert_int_equal(bitmap_resize(bm, size + 1), 0);
    assert_int_equal(bitmap_count(bm), 4096);
    assert_true(bitmap_memory(bm) + bitmap_memory(dup) < 1 * MiB);
}

static void many_small_bitmaps_are_cheap(void **state)
{
    enum { MANY = 65535 };
    const uint64_t before = resident_bytes();
    CLEANUP(memory_freep) struct bitmap **all = xcalloc(MANY, sizeof *all);

    for (int i = 0; i < MANY; i++) {
        all[i] = bitmap_new(1 * MiB, 65536);
        assert_non_null(all[i]);
        bitmap_mark(all[i], range_make(i % MiB, 1));
        assert_true(bitmap_memory(all[i]) <= 256);
    }
    if (!UNIT_SANITIZED)
        assert_true(resident_bytes() - before < 32 * MiB);
    for (int i = 0; i < MANY; i++)
        bitmap_free(all[i]);
}

static void too_large_is_refused_and_nothing_changes(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *bm = bitmap_new(1 * MiB, 512);

    assert_null(bitmap_new(INT64_MAX, 512)); /* 2 PiB of bits */
    bitmap_mark(bm, range_make(1000, 1));
    assert_int_equal(bitmap_resize(bm, INT64_MAX), -ENOMEM);
    assert_int_equal(bitmap_size(bm), 1 * MiB);
    assert_int_equal(bitmap_count(bm), 512);
    must_be_valid(bm, "a resize without memory");

    /* Back to where it was: no memory is asked for. */
    CLEANUP(bitmap_freep) struct bitmap *large = bitmap_new(64 * TiB, 4096);
    const uint64_t before = resident_bytes();
    for (int i = 0; i < 100; i++) {
        assert_int_equal(bitmap_resize(large, rng_below(&(struct rng){(uint64_t)i}, 64 * TiB)), 0);
        assert_int_equal(bitmap_resize(large, 64 * TiB), 0);
        assert_int_equal(bitmap_count(large), 0);
        bitmap_mark(large, range_make(64 * TiB - 1, 1)); /* is cut off again */
    }
    assert_true(bitmap_memory(large) < 1 * MiB); /* a few pages of the levels each time */
    assert_true(resident_bytes() - before < 1 * MiB);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(marks_and_clears_agree_with_a_byte_per_granule),
    cmocka_unit_test(marking_rounds_outwards_and_clearing_inwards),
    cmocka_unit_test(large_clears_give_back_whole_pages_only),
    cmocka_unit_test(the_largest_disk_has_no_wrapping_arithmetic),
    cmocka_unit_test(serial_form_has_the_lowest_bit_first),
    cmocka_unit_test(serialised_and_read_back_is_the_same),
    cmocka_unit_test(merge_across_granularities_loses_nothing),
    cmocka_unit_test(merge_range_leaves_out_what_the_smaller_has_not),
    cmocka_unit_test(resize_drops_what_is_beyond_and_adds_clean),
    cmocka_unit_test(lent_words_are_the_bits),
    cmocka_unit_test(lent_words_may_move),
    cmocka_unit_test(memory_follows_what_is_dirty_on_64_tib),
    cmocka_unit_test(many_small_bitmaps_are_cheap),
    cmocka_unit_test(too_large_is_refused_and_nothing_changes),
};
UNIT_MAIN(tests)
