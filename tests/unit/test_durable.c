/* What is known to be durably dirty: learned of all sets, for one superblock. */
#include "unit.h"

#include "persist/durable.h"

enum { GRANULE = 512, SIZE = 64 * 1024 };

static struct super super_of(uint64_t sequence)
{
    return (struct super){.uuid = {{1}},
                          .session = {{2}},
                          .sequence = sequence,
                          .size_bytes = SIZE,
                          .resizing_bytes = SIZE};
}

static struct bitmap *dirty(uint64_t granularity, uint64_t at, uint64_t length)
{
    struct bitmap *bm = bitmap_new(SIZE, granularity);

    assert_non_null(bm);
    bitmap_mark(bm, range_make(at, length));
    return bm;
}

static void learn(struct durable *d, const struct super *s, const struct bitmap *const *sets,
                  size_t n, struct range r)
{
    durable_learn(d, s, durable_ask(s, sets, n, &r, 1));
}

static bool has(const struct durable *d, const struct super *s, uint64_t at, uint64_t length)
{
    return durable_has(d, s, range_make(at, length));
}

static void only_what_all_sets_have(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *fine = dirty(GRANULE, 512, 7 * 512);
    CLEANUP(bitmap_freep) struct bitmap *other = dirty(GRANULE, 1024, 2048);
    CLEANUP(bitmap_freep) struct bitmap *coarse = dirty(4 * GRANULE, 2048, 1);
    const struct bitmap *const sets[] = {coarse, fine, other};
    const struct super s = super_of(1);
    struct durable d = {0};

    assert_false(has(&d, &s, 0, 1));
    learn(&d, &s, sets, 3, range_make(0, 8192));
    for (uint64_t at = 0; at < 8192; at += 512)
        assert_int_equal(has(&d, &s, at, 512), at == 2048 || at == 2560);
    assert_true(has(&d, &s, 2048, 1024) && has(&d, &s, 2100, 900));
    assert_false(has(&d, &s, 2048, 1025) || has(&d, &s, 2047, 2) || has(&d, &s, 2048, 0));
    /* Learned beside it; what is known stays. */
    learn(&d, &s, sets + 1, 2, range_make(0, 2048));
    assert_true(has(&d, &s, 1024, 2048));
    assert_false(has(&d, &s, 1023, 2) || has(&d, &s, 1024, 2049));
    learn(&d, &s, sets, 0, range_make(0, 8192));
    assert_false(has(&d, &s, 4096, 512));
    durable_fini(&d);
}

/* Ranges may be no multiples of eight granules, or less than one. */
static void only_what_lies_in_the_ranges(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *all = dirty(GRANULE, 0, SIZE);
    const struct bitmap *const sets[] = {all};
    const struct super s = super_of(1);

    for (uint64_t from = 0; from < 24 * 256; from += 256) {
        for (uint64_t to = from; to < 24 * 256; to += 256) {
            struct durable d = {0};
            learn(&d, &s, sets, 1, range_between(from, to));
            for (uint64_t at = 0; at < 32 * 512; at += 512)
                assert_int_equal(has(&d, &s, at, 512), from <= at && at + 512 <= to);
            durable_fini(&d);
        }
    }
}

static void the_last_granule_may_be_cut(void **state)
{
    struct super s = super_of(1);
    CLEANUP(bitmap_freep) struct bitmap *all = bitmap_new(SIZE - 100, GRANULE);
    const struct bitmap *const sets[] = {all};
    struct durable d = {0};

    s.size_bytes = SIZE - 100;
    bitmap_mark_all(all);
    learn(&d, &s, sets, 1, range_between(SIZE - 1024, s.size_bytes));
    assert_true(has(&d, &s, SIZE - 1024, 924));
    assert_false(has(&d, &s, SIZE - 512, 413)); /* beyond the disk */
    durable_fini(&d);
}

static void another_superblock_knows_nothing(void **state)
{
    CLEANUP(bitmap_freep) struct bitmap *all = dirty(GRANULE, 0, SIZE);
    CLEANUP(bitmap_freep) struct bitmap *coarse = dirty(4096, 0, SIZE);
    const struct bitmap *const sets[] = {all}, *const coarser[] = {coarse};
    const struct super s = super_of(1), next = super_of(2);
    struct super session = s, uuid = s;
    const struct range r = range_make(0, 4096);
    struct durable d = {0};

    session.session.bytes[0]++;
    uuid.uuid.bytes[0]++;
    learn(&d, &s, sets, 1, r);
    assert_true(has(&d, &s, 0, 4096));
    assert_false(has(&d, &next, 0, 4096) || has(&d, &session, 0, 4096) || has(&d, &uuid, 0, 4096));
    /* A cleaning that a change of state has overtaken teaches nothing. */
    durable_learn(&d, &next, durable_ask(&s, sets, 1, &r, 1));
    assert_false(has(&d, &next, 0, 512));
    assert_true(has(&d, &s, 0, 4096));
    /* The next one begins anew, perhaps with other granules. */
    learn(&d, &next, coarser, 1, range_make(8192, 4096));
    assert_true(has(&d, &next, 8192, 4096));
    assert_false(has(&d, &next, 0, 4096) || has(&d, &s, 0, 4096));
    durable_fini(&d);
}

static void who_has_passed_gives_nothing_back(void **state)
{
    struct durable d = {0};

    for (unsigned i = 0; i < 100; i++)
        durable_pass(&d, range_make(i / 2 * 512, 512));
    assert_int_equal(d.passed, 100);
    assert_false(durable_passed(&d, range_make(512, 1024)));
    for (unsigned i = 0; i < 50; i++) {
        assert_true(durable_passed(&d, range_make(i * 512, 512)));
        assert_true(durable_passed(&d, range_make(i * 512, 512)));
        assert_false(durable_passed(&d, range_make(i * 512, 512)));
    }
    durable_fini(&d);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(only_what_all_sets_have),
    cmocka_unit_test(only_what_lies_in_the_ranges),
    cmocka_unit_test(the_last_granule_may_be_cut),
    cmocka_unit_test(another_superblock_knows_nothing),
    cmocka_unit_test(who_has_passed_gives_nothing_back),
};

UNIT_MAIN(tests)
