/* Bit areas in the tide file: what is written is read, under its epoch and nowhere else; what the
 * disk has damaged is dirt; and two writes of one area never race. */
#include "tidefile.h"

static bool same_bits(const struct bitmap *a, const struct bitmap *b)
{
    uint64_t n = bitmap_serial_length(a);
    CLEANUP(memory_freep) uint8_t *x = malloc(n + 1);
    CLEANUP(memory_freep) uint8_t *y = malloc(n + 1);
    bitmap_serialise(a, 0, x, n);
    bitmap_serialise(b, 0, y, n);
    return bitmap_serial_length(b) == n && memcmp(x, y, n) == 0;
}

static void expect_area(struct tide *t, uint64_t extent, uint64_t epoch,
                        const struct bitmap *expected)
{
    struct error err = ERROR_INIT;
    uint64_t bad = 1;
    CLEANUP(bitmap_freep)
    struct bitmap *bits = bitmap_new(bitmap_size(expected), bitmap_granularity(expected));
    CHECK_OK(tide_read_area(t, extent, epoch, bits, true, &bad, &err), err);
    CHECK(bad == 0);
    CHECK(same_bits(bits, expected));
}

TIDE_TEST(areas_hold_bits_under_their_epoch)
{
    enum { RANGES = 4 };
    for (int round = 0; round < 12; round++) {
        struct super s;
        uint64_t size = 1 + rng_below(&p->rng, 40 * GiB >> rng_below(&p->rng, 20));
        small_super(p, &s, size);
        s.table.items[0].granularity_bits = 9 + (unsigned)rng_below(&p->rng, 9);
        const uint64_t granularity = UINT64_C(1) << s.table.items[0].granularity_bits;
        struct tide *t = create(p, &s);
        uint64_t extent = some_extent;
        CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(size, granularity);
        CLEANUP(bitmap_freep) struct bitmap *none = bitmap_new(size, granularity);
        expect_area(t, extent, 1, none);
        for (int i = 0; i < 20; i++) {
            struct range dirt[RANGES];
            uint64_t from = 0;
            for (int k = 0; k < RANGES; k++) {
                dirt[k] = rng_range(&p->rng, size - from);
                dirt[k].start += from;
                dirt[k].length = min_u64(dirt[k].length, size / 8);
                from = range_end(dirt[k]);
                bitmap_mark(bits, dirt[k]);
            }
            CHECK(tide_write_area(t, extent, 1, bits, dirt, RANGES) == 0);
            expect_area(t, extent, 1, bits);
        }
        CHECK(tide_sync(t) == 0);
        t = reopen(p, t);
        expect_area(t, extent, 1, bits);
        expect_area(t, extent, 2, none);
        expect_area(t, s.table.items[0].extent[1], 2, none);

        /* under a new epoch the old bits are gone, with nothing but a superblock */
        struct super next;
        super_copy(&next, tide_super(t));
        next.table.items[0].current.epoch = next.next_epoch++;
        CHECK(tide_write_super(t, &next, NULL) == 0);
        expect_area(t, extent, 3, none);
        CLEANUP(bitmap_freep) struct bitmap *few = bitmap_new(size, granularity);
        const struct range last = range_make(size - 1, 1);
        bitmap_mark(few, last);
        CHECK(tide_write_area(t, extent, 3, few, &last, 1) == 0);
        expect_area(t, extent, 3, few);
        tide_close(t);
        super_fini(&s);
    }
}

TIDE_TEST(a_new_file_holds_the_bits_it_was_given)
{
    struct error err = ERROR_INIT;
    for (int in_use = 0; in_use < 2; in_use++)
        for (int level = 0; level < 2; level++) {
            struct super s;
            struct tide *t;
            small_super(p, &s, 16 * GiB);
            s.in_use = in_use;
            s.level = level ? TIDE_PROCESS : TIDE_POWER;
            CLEANUP(bitmap_freep) struct bitmap *a = bitmap_new(s.size_bytes, 65536);
            CLEANUP(bitmap_freep) struct bitmap *b = bitmap_new(s.size_bytes, 65536);
            for (int i = 0; i < 50; i++)
                bitmap_mark(i % 2 ? a : b, rng_range(&p->rng, s.size_bytes));
            const struct bitmap *current[] = {a}, *successor[] = {b};
            CHECK_OK(tide_create(p->path, &s, current, successor, NULL, &t, &err), err);
            t = reopen(p, t);
            const struct tide_bitmap *one = &tide_super(t)->table.items[0];
            if (in_use && level) {
                uint64_t bad;
                CHECK(!one->extent[0] && !one->extent[1]);
                CHECK(tide_read_area(t, 0, 1, a, true, &bad, &err) == -EBADMSG);
                CHECK(strstr(err.text, "has no area of 36864 bytes at 0"));
                error_clear(&err);
            } else {
                expect_area(t, one->extent[0], 1, a);
                expect_area(t, one->extent[1], 2, b);
            }
            tide_close(t);
            super_fini(&s);
        }
}

TIDE_TEST(clean_blocks_are_not_written_and_holes_not_read)
{
    struct super s;
    small_super(p, &s, 16 * TiB);
    struct tide *t = create(p, &s);
    uint64_t extent = some_extent, written = 0;
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    for (uint64_t at = 0; at < s.size_bytes; at += TiB)
        bitmap_mark(bits, range_make(at, 1));
    const struct range all = range_make(0, s.size_bytes);
    p->spy->n = 0;
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    for (size_t i = 0; i < p->spy->n; i++)
        written += p->spy->ops[i].length;
    CHECK(written == 16 * 4096);
    CHECK(tide_sync(t) == 0);
    t = reopen(p, t);
    p->spy->read_bytes = 0;
    expect_area(t, extent, 1, bits);
    CHECK(p->spy->read_bytes < 16 * 256 * KiB);
    /* and all of it, 33 MiB */
    bitmap_mark_all(bits);
    p->spy->n = 0;
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    CHECK(p->spy->n < 100); /* in large pieces */
    CHECK(tide_sync(t) == 0);
    expect_area(t, extent, 1, bits);
    tide_close(t);
    super_fini(&s);
}

/* More stretches than are asked for at once, too far from each other to be read together. */
TIDE_TEST(bits_all_over_a_large_disk)
{
    struct super s;
    small_super(p, &s, 512 * GiB);
    s.table.items[0].granularity_bits = 9;
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(512 * GiB, 512);
    for (uint64_t i = 0; i < 300; i++) {
        const struct range r = range_make(i * (512 * GiB / 300), 1);
        bitmap_mark(bits, r);
        CHECK(tide_write_area(t, some_extent, 1, bits, &r, 1) == 0);
    }
    expect_area(t, some_extent, 1, bits);
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(damaged_sectors_are_dirt)
{
    struct error err = ERROR_INIT;
    struct super s;
    const uint64_t per_sector = UINT64_C(496) * 8 * 65536;
    uint64_t bad;
    small_super(p, &s, 16 * GiB);
    struct tide *t = create(p, &s);
    uint64_t extent = some_extent;
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    const struct range all = range_make(0, s.size_bytes);
    bitmap_mark(bits, range_make(3 * per_sector + 5, 1));
    bitmap_mark(bits, range_make(s.size_bytes - 1, 1));
    CHECK(tide_write_area(t, extent, 1, bits, &all, 1) == 0);
    CHECK(tide_sync(t) == 0);
    tide_close(t);
    scribble(p, extent + 3 * 512 + 8, 1);  /* its epoch: not just another one */
    scribble(p, extent + 66 * 512 + 9, 2); /* the last one that counts, cut by the size */
    scribble(p, extent + 67 * 512 + 9, 2); /* stands for nothing */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    const uint64_t last = s.size_bytes - 66 * per_sector;
    for (int mark = 0; mark < 2; mark++) {
        CLEANUP(bitmap_freep) struct bitmap *read = bitmap_new(s.size_bytes, 65536);
        CHECK_OK(tide_read_area(t, extent, 1, read, mark, &bad, &err), err);
        CHECK(bad == per_sector + last);
        CHECK(bitmap_count(read) == (mark ? per_sector + last : 0));
        CHECK(!mark || bitmap_get(read, 3 * per_sector + 5));
    }
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(unreadable_blocks_are_dirt)
{
    struct error err = ERROR_INIT;
    struct super s;
    uint64_t bad;
    small_super(p, &s, 16 * GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(s.size_bytes, 65536);
    CLEANUP(bitmap_freep) struct bitmap *read = bitmap_new(s.size_bytes, 65536);
    const struct range all = range_make(0, s.size_bytes);
    bitmap_mark(bits, range_make(0, s.size_bytes - 65536));
    CHECK(tide_write_area(t, some_extent, 1, bits, &all, 1) == 0);
    fail_next(p->spy, IO_READ, some_extent, -EIO, false);
    CHECK_OK(tide_read_area(t, some_extent, 1, read, true, &bad, &err), err);
    CHECK(bad == 0 && same_bits(read, bits)); /* one by one it goes */
    tide_close(t);
    super_fini(&s);
}

TIDE_TEST(a_sector_of_the_future_tells_of_a_lost_superblock)
{
    struct error err = ERROR_INIT;
    struct super s, next;
    const struct range all = range_make(0, GiB);
    uint64_t bad;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    bitmap_mark_all(bits);
    super_copy(&next, tide_super(t));
    next.table.items[0].current.epoch = next.next_epoch++;
    CHECK_OK(tide_write_super(t, &next, &err), err);
    CHECK(tide_write_area(t, some_extent, 3, bits, &all, 1) == 0);
    t = reopen(p, t);
    tide_close(t);
    scribble(p, TIDE_SUPER_BYTES + 300, 1); /* not torn: it was durable, and is damaged */
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    CHECK(tide_super(t)->next_epoch == 3);
    CHECK(tide_read_area(t, some_extent, 1, bits, true, &bad, &err) == -EBADMSG);
    CHECK(
        strstr(err.text, "is of epoch 3, and the newest superblock there is knows none from 3 on"));
    tide_close(t);
    super_fini(&s);
}

struct writer {
    struct tide *t;
    struct bitmap *bits;
    int result;
    bool done;
};

static int writes_area(void *arg)
{
    struct writer *w = arg;
    const struct range all = range_make(0, bitmap_size(w->bits));
    w->result = tide_write_area(w->t, some_extent, 1, w->bits, &all, 1);
    w->done = true;
    return 0;
}

/* An older copy that lands after a newer one would take its bits back. */
TIDE_TEST(writes_of_one_area_take_turns)
{
    struct super s;
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    struct writer first = {t, bits, 0, false}, second = first;
    p->spy->slow = true;
    {
        SCOPE(both);
        bitmap_mark(bits, range_make(0, 1));
        scope_spawn(&both, writes_area, &first);
        CHECK(task_yield() == 0);
        bitmap_mark(bits, range_make(MiB, 1));
        p->spy->n = 0;
        scope_spawn(&both, writes_area, &second);
        CHECK(task_yield() == 0);
        CHECK(first.done || p->spy->n == 0);
        CHECK(scope_join(&both) == 0);
    }
    CHECK(first.result == 0 && second.result == 0);
    expect_area(t, some_extent, 1, bits);
    tide_close(t);
    super_fini(&s);
}

/* The page cache has an error once: who syncs meanwhile must not be told that all is well. */
TIDE_TEST(a_failed_area_fails_the_syncs_after_it)
{
    struct super s;
    const struct range all = range_make(0, GiB);
    small_super(p, &s, GiB);
    struct tide *t = create(p, &s);
    CLEANUP(bitmap_freep) struct bitmap *bits = bitmap_new(GiB, 65536);
    bitmap_mark(bits, range_make(0, 1));
    fail_next(p->spy, IO_WRITE, 0, -EIO, true);
    CHECK(tide_write_area(t, some_extent, 1, bits, &all, 1) == -EIO);
    CHECK(tide_failed(t) && tide_sync(t) == -EIO);
    t = reopen(p, t);
    fail_next(p->spy, IO_DATASYNC, 0, -EIO, true);
    CHECK(tide_sync(t) == -EIO);
    CHECK(tide_sync(t) == -EIO && tide_write_area(t, some_extent, 1, bits, &all, 1) == -EIO);
    tide_close(t);
    super_fini(&s);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(areas_hold_bits_under_their_epoch),
    cmocka_unit_test(a_new_file_holds_the_bits_it_was_given),
    cmocka_unit_test(clean_blocks_are_not_written_and_holes_not_read),
    cmocka_unit_test(bits_all_over_a_large_disk),
    cmocka_unit_test(damaged_sectors_are_dirt),
    cmocka_unit_test(unreadable_blocks_are_dirt),
    cmocka_unit_test(a_sector_of_the_future_tells_of_a_lost_superblock),
    cmocka_unit_test(writes_of_one_area_take_turns),
    cmocka_unit_test(a_failed_area_fails_the_syncs_after_it),
};

UNIT_MAIN(tests)
