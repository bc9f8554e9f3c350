/* Directories and tables of bitmaps that lie: the image opens, what is good stays usable, nobody's
 * clusters are given away, and memory is bounded. */
#include "persistutil.h"

enum fate { GOOD, INCONSISTENT, GONE };

/* After POKEs to disk 1: "off" (the first of the directory is "off", the second "a") is fine and
 * "a" is as said, read-only, read-write and after that; and after "a" is gone the image is clean or
 * leaks. */
static void expect(enum fate fate, int line)
{
    struct error err = ERROR_INIT;

    copy_disk(3, 1);
    if (fate != GONE) {
        /* removed at once */
        struct world *w = world_open(1, false);
        remove_bitmap(w, "a");
        CHECK(write_at(w, range_make(0, 300000), 4) == 0);
        world_close(w);
        check_disk(&memdisks[1], true);
        copy_disk(1, 3);
    }
    for (unsigned i = 0; i < 3; i++) {
        struct world *w = NULL;
        int r = world_try(1, i == 0, &w, &err);
        CHECK_OK(r, err);
        struct dirty_bitmap *a = dirty_find(w->n, "a"), *off = dirty_find(w->n, "off");
        enum fate now = !a ? GONE : dirty_inconsistent(a) ? INCONSISTENT : GOOD;
        if (now != fate || !off || dirty_inconsistent(off)) {
            fprintf(stderr, "line %d, open %u: %d, not %d\n", line, i, (int)now, (int)fate);
            abort();
        }
        if (i == 2 && a)
            remove_bitmap(w, "a");
        if (w->e)
            CHECK(write_at(w, range_make(0, 300000), 4) == 0);
        world_close(w);
        if (i)
            check_disk(&memdisks[1], true);
    }
    struct world *w = world_open(1, false);
    CHECK(!dirty_find(w->n, "a") && !dirty_inconsistent(dirty_find(w->n, "off")));
    world_close(w);
}
#define POKED(at, value, bytes, fate)                                                              \
    do {                                                                                           \
        copy_disk(1, 0);                                                                           \
        poke(1, at, value, bytes);                                                                 \
        expect(fate, __LINE__);                                                                    \
    } while (0)

TEST(one_bad_entry_does_not_spoil_the_others)
{
    stored_bitmap(g, 8 * MiB, "");
    struct qcow2_header h = header_of(0);
    CHECK(h.nb_bitmaps == 2);
    uint64_t dir = h.bitmap_directory_offset, off = dir, a = dir + 32, cluster = 65536;
    CHECK(peek(0, off + 18, 2) == 3 && peek(0, a + 18, 2) == 1);
    uint64_t table = peek(0, a, 8), data = peek(0, table, 8), off_table = peek(0, off, 8);
    CHECK(data && data % cluster == 0);
    qcow2_header_fini(&h);

    copy_disk(1, 0);
    expect(GOOD, __LINE__);
    /* the table: unaligned, null, in the header, L1, refcount table, beyond the end, free,
     * another's */
    POKED(a, table + 512, 8, GONE);
    POKED(a, 0, 8, GONE);
    POKED(a, (uint64_t)1 << 60, 8, GONE);
    POKED(a, cluster, 8, INCONSISTENT);
    POKED(a, 3 * cluster, 8, INCONSISTENT);
    POKED(a, 1000 * cluster, 8, INCONSISTENT);
    POKED(a, 1 * TiB, 8, INCONSISTENT);
    POKED(a, dir, 8, INCONSISTENT);
    /* entries */
    POKED(a + 8, 0, 4, GONE);
    POKED(a + 8, 2, 4, INCONSISTENT);
    POKED(a + 8, UINT32_MAX, 4, GONE);
    POKED(a + 8, 8192, 4, INCONSISTENT);
    /* flags, type, granularity, lengths */
    POKED(a + 12, 3, 4, INCONSISTENT);
    POKED(a + 12, 0x80000002, 4, GONE);
    POKED(a + 16, 2, 1, GONE);
    POKED(a + 17, 8, 1, GONE);
    POKED(a + 17, 32, 1, GONE);
    POKED(a + 17, 255, 1, GONE);
    POKED(a + 18, 0, 2, GONE);
    POKED(a + 18, 9, 2, GONE);
    POKED(a + 18, 0xffff, 2, GONE);
    POKED(a + 20, 1, 4, GONE); /* extra data: "a" is that, and the name is what was padding */
    POKED(a + 20, UINT32_MAX, 4, GONE);
    POKED(a + 24, 0, 1, GONE);
    /* the table's entry */
    POKED(table, data + 512, 8, INCONSISTENT);
    POKED(table, data | 1, 8, INCONSISTENT);
    POKED(table, data | 2, 8, INCONSISTENT);
    POKED(table, data | (uint64_t)1 << 60, 8, INCONSISTENT);
    POKED(table, 1000 * cluster, 8, INCONSISTENT);
    POKED(table, 3 * cluster, 8, INCONSISTENT);
    POKED(table, dir, 8, INCONSISTENT);
    POKED(table, 0, 8, GOOD); /* nobody can know */
    POKED(table, 1, 8, GOOD);
    /* Both name one cluster: neither can be believed, nothing is freed. */
    copy_disk(1, 0);
    poke(1, table, off_table, 8);
    struct world *w = world_open(1, false);
    CHECK(dirty_inconsistent(dirty_find(w->n, "a")) && dirty_inconsistent(dirty_find(w->n, "off")));
    remove_bitmap(w, "a");
    remove_bitmap(w, "off");
    world_close(w);
    check_disk(&memdisks[1], true);
}

/* Extra data is the business of whoever wrote it: shown, kept, and removed only when asked to. */
TEST(extra_data_is_kept)
{
    stored_bitmap(g, 8 * MiB, "");
    struct qcow2_header h = header_of(0);
    uint64_t dir = h.bitmap_directory_offset, a = dir + 32;
    qcow2_header_fini(&h);
    /* "a" gets 8 bytes of it: 24 + 8 + 1 */
    uint8_t *bytes = memdisks[0].bytes;
    memmove(bytes + a + 32, bytes + a + 24, 8);
    memcpy(bytes + a + 24, "12345678", 8);
    poke(0, a + 20, 8, 4);
    for (uint64_t at = 512; at < 4096; at++) /* the directory's length, in the extension */
        if (peek(0, at, 8) == 64 && peek(0, at + 8, 8) == dir)
            poke(0, at, 72, 8);
    for (uint64_t at = 100; at < 512; at++)
        if (peek(0, at, 8) == 64 && peek(0, at + 8, 8) == dir)
            poke(0, at, 72, 8);
    for (unsigned i = 0; i < 2; i++) {
        struct world *w = world_open(0, false);
        CHECK(dirty_inconsistent(dirty_find(w->n, "a")));
        CHECK(!dirty_inconsistent(dirty_find(w->n, "off")));
        CHECK(write_at(w, range_make(0, 65536), 4) == 0);
        world_close(w);
        h = header_of(0);
        dir = h.bitmap_directory_offset;
        CHECK(h.nb_bitmaps == 2 && h.bitmap_directory_bytes == 72);
        qcow2_header_fini(&h);
        CHECK(!memcmp(bytes = memdisks[0].bytes + dir + 32 + 24, "12345678a", 9));
        CHECK(peek(0, dir + 32 + 12, 4) == 3); /* it should have recorded, and nobody did */
    }
    struct world *w = world_open(0, false);
    remove_bitmap(w, "a");
    world_close(w);
    check_disk(&memdisks[0], false);
}

/* Whatever stands in directory and tables, the image can be used, and is no worse for it. */
TEST(random_rubbish_in_directory_and_tables)
{
    struct rng rng = {test_seed()};

    log_set_level(LOG_LEVEL_ERROR);
    stored_bitmap(g, 2 * MiB, ",\"cluster-size\":4096");
    struct qcow2_header h = header_of(0);
    uint64_t dir = h.bitmap_directory_offset;
    uint64_t tables[] = {peek(0, dir, 8), peek(0, dir + 32, 8), dir, dir};
    qcow2_header_fini(&h);
    for (unsigned i = 0; i < 400; i++) {
        copy_disk(1, 0);
        for (uint64_t j = rng_below(&rng, 4) + 1; j; j--) {
            uint64_t at = tables[rng_below(&rng, 4)] + rng_below(&rng, 64);
            unsigned how = (unsigned)rng_below(&rng, 3);
            memdisks[1].bytes[at] ^= how == 0   ? (uint8_t)(1 << rng_below(&rng, 8))
                                     : how == 1 ? (uint8_t)rng_next(&rng)
                                                : 0xff;
        }
        for (unsigned k = 0; k < 3; k++) {
            struct world *w = world_open(1, k == 0);
            if (w->e) {
                CHECK(write_at(w, range_make(rng_below(&rng, MiB), 70000), 4) == 0);
                struct dirty_bitmap *bm = dirty_first(w->n);
                if (bm && rng_below(&rng, 2)) {
                    char *name = xstrdup(dirty_name(bm));
                    remove_bitmap(w, name);
                    free(name);
                }
                struct qcow2 *q = w->n->state;
                CHECK(!q->unusable && !q->signaled_corruption);
            }
            world_close(w);
        }
        /* The guest's data and metadata are sound; what of bitmaps is bad stays. */
        if (i % 20 == 0) {
            struct world *w = world_open(1, false);
            while (dirty_first(w->n))
                remove_bitmap(w, dirty_name(dirty_first(w->n)));
            world_close(w);
            check_disk(&memdisks[1], true);
        }
    }
    log_set_level(LOG_LEVEL_INFO);
}

TEST(a_directory_that_cannot_be_where_it_is)
{
    struct error err = ERROR_INIT;

    stored_bitmap(g, 8 * MiB, "");
    struct qcow2_header h = header_of(0);
    uint64_t at = 0, dir = h.bitmap_directory_offset;
    qcow2_header_fini(&h);
    for (uint64_t i = 100; !at && i < 4096; i++)
        if (peek(0, i, 8) == dir)
            at = i;
    CHECK(at);
    uint64_t end = align_up(memdisks[0].size, 65536); /* where the guest's next cluster goes */
    const uint64_t places[] = {0,   65536,        3 * 65536, 4 * 65536,
                               end, 1000 * 65536, TiB,       UINT64_MAX << 16};
    for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
        copy_disk(1, 0);
        poke(1, at, places[i], 8);
        for (unsigned k = 0; k < 3; k++) {
            struct world *w = NULL;
            int r = world_try(1, k == 0, &w, &err);
            CHECK_OK(r, err);
            CHECK(!dirty_first(w->n));
            if (w->e)
                CHECK(write_at(w, range_make(k * MiB, 3 * MiB), 4) == 0);
            if (k == 2)
                add(w, "new", 65536, DIRTY_PERSISTENT);
            world_close(w);
        }
        check_disk(&memdisks[1], true);
        struct world *w = world_open(1, true);
        CHECK(dirty_find(w->n, "new"));
        world_close(w);
    }
}

/* Lazy refcounts and a process that died: counts are made anew, also of bitmaps; bad ones are not
 * in the way. */
TEST(bitmaps_of_an_image_with_the_dirty_bit)
{
    struct error err = ERROR_INIT;

    stored_bitmap(g, 8 * MiB, "");
    struct qcow2_header h = header_of(0);
    uint64_t dir = h.bitmap_directory_offset, a = dir + 32, ext = 0, cluster = 65536;
    uint64_t table = peek(0, a, 8), refblock = peek(0, h.reftable_offset, 8);
    qcow2_header_fini(&h);
    for (uint64_t i = 100; !ext && i < 4096; i++)
        if (peek(0, i, 8) == dir)
            ext = i;
    poke(0, 72, 1, 8);
    struct {
        uint64_t at, value;
        unsigned bytes;
        enum fate fate;
    } cases[] = {
        {72, 1, 8, GOOD},
        {refblock + 2 * (table / cluster), 0, 2, GOOD},
        {refblock + 2 * (table / cluster), 3, 2, GOOD},
        {refblock + 2 * (dir / cluster), 0, 2, GOOD},
        {a, 1000 * cluster, 8, INCONSISTENT},
        {a, cluster, 8, INCONSISTENT},
        {table, 1000 * cluster, 8, INCONSISTENT},
        {table, TiB, 8, INCONSISTENT},
        {table, 513, 8, INCONSISTENT},
        {a + 8, UINT32_MAX, 4, GONE},
        {ext, TiB, 8, GONE},
        {ext, cluster, 8, GONE},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        for (int at_once = 0; at_once < 2; at_once++) { /* else read-only first */
            copy_disk(1, 0);
            poke(1, cases[i].at, cases[i].value, cases[i].bytes);
            if (!at_once)
                world_close(world_open(1, true));
            struct world *w = NULL;
            int r = world_try(1, false, &w, &err);
            CHECK_OK(r, err);
            struct dirty_bitmap *bm = dirty_find(w->n, "a");
            CHECK((!bm ? GONE : dirty_inconsistent(bm) ? INCONSISTENT : GOOD) == cases[i].fate);
            CHECK(write_at(w, range_make(0, 300000), 4) == 0);
            world_close(w);
            check_disk(&memdisks[1], true);
            CHECK(!(peek(1, 72, 8) & 1));
        }
    }
}

TEST(bits_of_all_bitmaps_are_bounded_together)
{
    struct error err = ERROR_INIT;
    struct qcow2_bitmap_list *l = NULL;

    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 64 * MiB, ",\"cluster-size\":512");
    struct world *w = world_open(0, false);
    for (unsigned i = 0; i < 3; i++) { /* 16 KiB of bits each, "all ones" */
        char name[] = {(char)('a' + i), 0};
        bitmap_mark_all(dirty_bits(add(w, name, 512, DIRTY_PERSISTENT)));
    }
    add(w, "clean", 512, DIRTY_PERSISTENT);
    world_close(w);
    for (uint64_t limit = 0; limit <= 4; limit++) {
        w = world_open(0, true);
        CHECK(qcow2_bitmaps_read(w->n, &l, &err) == 0 && l->n == 4);
        CHECK(qcow2_bitmaps_check(w->n, l, limit * 16 * KiB) == 0);
        uint64_t usable = 0;
        for (size_t i = 0; i < l->n; i++)
            usable += !l->items[i].quarantined && strcmp(l->items[i].name, "clean");
        CHECK(!qcow2_bitmap_find(l, "clean")->quarantined);
        CHECK(usable == min_u64(limit, 3));
        qcow2_bitmap_list_free(l);
        world_close(w);
    }
}

/* Tables that lie on top of each other name more clusters than there are. */
TEST(tables_upon_tables)
{
    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 64 * MiB, ",\"cluster-size\":512");
    struct world *w = world_open(0, false);
    struct dirty_bitmap *bm = add(w, "good", 512, DIRTY_PERSISTENT);
    for (uint64_t at = 0; at < 64 * MiB; at += 2 * MiB)
        bitmap_mark(dirty_bits(bm), range_make(at, 1)); /* a cluster each */
    world_close(w);
    /* 40 more entries in a directory of our own that all name the table of "good" */
    struct qcow2_header h = header_of(0);
    uint64_t dir = h.bitmap_directory_offset, ext = 0;
    CHECK(h.nb_bitmaps == 1 && h.bitmap_directory_bytes == 32);
    qcow2_header_fini(&h);
    for (uint64_t i = 100; !ext && i < 512; i++)
        if (peek(0, i, 8) == 32 && peek(0, i + 8, 8) == dir)
            ext = i - 8;
    CHECK(ext);
    for (unsigned n = 2; n <= 15; n++) { /* the directory's cluster has room for 16 */
        memcpy(memdisks[0].bytes + dir + 32 * (n - 1), memdisks[0].bytes + dir, 32);
        memdisks[0].bytes[dir + 32 * (n - 1) + 24] = (uint8_t)('A' + n);
        poke(0, ext, n, 4);
        poke(0, ext + 8, 32 * n, 8);
        w = world_open(0, true);
        unsigned shown = 0;
        for (bm = dirty_first(w->n); bm; bm = dirty_next(bm)) {
            CHECK(dirty_inconsistent(bm));
            shown++;
        }
        CHECK(shown == n);
        world_close(w);
    }
    w = world_open(0, false);
    CHECK(write_at(w, range_make(0, MiB), 1) == 0);
    world_close(w);
    check_disk(&memdisks[0], true); /* each has a table of its own now */
}

/* A write that is under way while the last bitmap that records ends, for the disk could not be made
 * durable, gives back its place among the hot regions. */
struct writer {
    struct edge *e;
    uint64_t start;
    unsigned *done;
};

static int write_one(void *arg)
{
    struct writer *w = arg;
    static const uint8_t data[512] = {1};

    CHECK(edge_write(w->e, range_make(w->start, sizeof data), data, 0) == 0);
    ++*w->done;
    return 0;
}

TEST(writes_give_back_what_they_have_taken)
{
    enum { SLOTS = 4, REGION = 65536, WRITES = 2 * SLOTS };
    CLEANUP(memory_freep) char *tide = xasprintf("/tmp/tidemark-test-%d.tide", (int)getpid());
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver':'raw','node-name':'n','file':{'driver':'memdisk','disk':0},"
                           "'x-tidemark-persist':{'tide-file':'%s','no-witness':'believe'}}",
                           tide);
    struct world w = {.g = graph_new()};
    struct writer writers[WRITES];
    unsigned done = 0;

    (void)unlink(tide);
    memdisk_reset(0);
    memdisk_reserve(&memdisks[0], WRITES * REGION);
    memdisks[0].size = WRITES * REGION;
    graph_add_driver(w.g, &driver_memdisk);
    dirty_init(w.g);
    persist_init(w.g);
    persist_set_limits(w.g, 16, SLOTS, 2);
    w.n = open_ok(w.g, json);
    w.e = attach(&w.user, w.n, PERM_ALL, PERM_ALL);
    for (unsigned i = 0; i < WRITES; i++)
        writers[i] = (struct writer){w.e, (uint64_t)i * REGION, &done};

    CHECK(write_one(&writers[0]) == 0); /* something to flush */
    done = 0;

    SCOPE(tasks);
    struct dirty_bitmap *bm = add(&w, "bad", 65536, DIRTY_PERSISTENT);
    memdisks[0].hold = range_make(0, WRITES * REGION);
    for (unsigned i = 0; i < SLOTS; i++)
        scope_spawn(&tasks, write_one, &writers[i]);
    while (memdisks[0].held < SLOTS)
        CHECK(task_yield() == 0);
    memdisks[0].fail_flush_after = 1;
    CHECK(dirty_settle(&w.n, 1, NULL) == -EIO && dirty_inconsistent(bm));
    memdisks[0].hold.length = 0;
    while (done < SLOTS)
        CHECK(task_yield() == 0);
    add(&w, "good", 65536, DIRTY_PERSISTENT);
    CHECK(dirty_settle(&w.n, 1, NULL) == 0);
    for (unsigned i = SLOTS; i < WRITES; i++)
        scope_spawn(&tasks, write_one, &writers[i]);
    for (unsigned i = 0; done < WRITES && i < 500; i++)
        CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC / 100)) == 0);
    CHECK(done == WRITES);
    CHECK(scope_join(&tasks) == 0);
    edge_detach(w.e);
    node_unref(w.n);
    graph_free(w.g);
    CHECK(unlink(tide) == 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(one_bad_entry_does_not_spoil_the_others),
    cmocka_unit_test(extra_data_is_kept),
    cmocka_unit_test(random_rubbish_in_directory_and_tables),
    cmocka_unit_test(a_directory_that_cannot_be_where_it_is),
    cmocka_unit_test(bitmaps_of_an_image_with_the_dirty_bit),
    cmocka_unit_test(bits_of_all_bitmaps_are_bounded_together),
    cmocka_unit_test(tables_upon_tables),
    cmocka_unit_test(writes_give_back_what_they_have_taken),
};
UNIT_MAIN(tests)
