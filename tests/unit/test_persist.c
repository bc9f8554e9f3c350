/* Persistent bitmaps in qcow2: saved and loaded against a byte a granule, with qemu-img as a
 * witness; the power cut anywhere; every write failing; limits. */
#include "persistutil.h"

enum { MODELS = 4 };

/* ---- a byte a granule ---- */

struct model {
    bool used, enabled, persistent;
    char name[32];
    uint64_t granularity, n;
    uint8_t *bits;
};

static void model_init(struct model *m, uint64_t size, const char *name, uint64_t granularity,
                       bool enabled, bool persistent)
{
    *m = (struct model){true, enabled, persistent, "", granularity, div_round_up(size, granularity),
                        NULL};
    snprintf(m->name, sizeof m->name, "%s", name);
    m->bits = xcalloc(m->n, 1);
}

static void model_fini(struct model *m)
{
    free(m->bits);
    *m = (struct model){0};
}

static void models_mark(struct model *m, struct range r)
{
    for (size_t i = 0; i < MODELS; i++)
        if (m[i].used && m[i].enabled)
            for (uint64_t j = r.start / m[i].granularity;
                 j <= (range_end(r) - 1) / m[i].granularity; j++)
                m[i].bits[j] = 1;
}

static void model_compare(const struct model *m, struct world *w, bool read_only)
{
    struct dirty_bitmap *bm = dirty_find(w->n, m->name);
    const char *broken;
    CHECK(bm);
    CHECK(dirty_persistent(bm) && !dirty_inconsistent(bm) && !dirty_busy(bm));
    CHECK(dirty_readonly(bm) == read_only);
    CHECK(dirty_enabled(bm) == m->enabled);
    CHECK(dirty_granularity(bm) == m->granularity);
    CHECK(bitmap_valid(dirty_bits(bm), &broken));
    for (uint64_t j = 0; j < m->n; j++)
        CHECK(bitmap_get(dirty_bits(bm), j * m->granularity) == m->bits[j]);
}

/* What qemu-img says of the stored ones: names, granularity, flags. */
static void ask_qemu(const struct memdisk *d, const struct model *m, bool in_use)
{
    if (!have_qemu_img())
        return;
    const char *path = scratch_path("info");
    dump_disk(d, path);
    char cmd[512], text[16384] = "";
    snprintf(cmd, sizeof cmd, "qemu-img info -U -f qcow2 --output=json %s", path);
    FILE *f = popen(cmd, "r");
    CHECK(f && fread(text, 1, sizeof text - 1, f) > 0);
    CHECK(pclose(f) == 0);
    unlink(path);
    CLEANUP(json_putp) struct json_object *info = json_tokener_parse(text);
    struct json_object *list =
        json_get(json_get(json_get(info, "format-specific"), "data"), "bitmaps");
    size_t wanted = 0;
    for (size_t i = 0; i < MODELS; i++)
        wanted += m[i].used && m[i].persistent;
    CHECK((list ? json_object_array_length(list) : 0) == wanted);
    for (size_t i = 0; i < wanted; i++) {
        struct json_object *one = json_object_array_get_idx(list, i), *flags;
        const struct model *found = NULL;
        for (size_t j = 0; j < MODELS; j++)
            if (m[j].used && !strcmp(m[j].name, json_get_string(one, "name", "")))
                found = &m[j];
        CHECK(found && json_get_uint(one, "granularity", 0) == found->granularity);
        flags = json_get(one, "flags");
        bool use = false, automatic = false;
        for (size_t j = 0; j < json_object_array_length(flags); j++) {
            const char *s = json_object_get_string(json_object_array_get_idx(flags, j));
            use = use || !strcmp(s, "in-use");
            automatic = automatic || !strcmp(s, "auto");
        }
        CHECK(use == in_use && automatic == found->enabled);
    }
}

/* ---- saving and loading ---- */

static void rounds(struct graph *g, uint64_t cluster, uint64_t size, unsigned n, struct rng *rng)
{
    struct model m[MODELS] = {0};
    char more[64];

    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    snprintf(more, sizeof more, ",\"cluster-size\":%llu", (unsigned long long)cluster);
    create_ok(g, 0, size, more);
    for (unsigned round = 0; round < n; round++) {
        struct world *w = world_open(0, false);
        for (size_t i = 0; i < MODELS; i++) {
            if (m[i].used)
                model_compare(&m[i], w, false);
            if (m[i].used && rng_below(rng, 6) == 0) {
                remove_bitmap(w, m[i].name);
                model_fini(&m[i]);
            }
            if (!m[i].used && rng_below(rng, 2)) {
                bool enabled = rng_below(rng, 4), persistent = rng_below(rng, 5);
                char name[32];
                snprintf(name, sizeof name, "b%u-%zu", round, i);
                model_init(&m[i], size, name, (uint64_t)512 << rng_below(rng, 10), enabled,
                           persistent);
                add(w, name, m[i].granularity,
                    (persistent ? DIRTY_PERSISTENT : 0) | (enabled ? 0 : DIRTY_DISABLED));
            }
        }
        for (uint64_t i = rng_below(rng, 30); i; i--) {
            uint64_t start = rng_below(rng, size);
            struct range r =
                range_make(start, min_u64(rng_below(rng, 4) ? rng_below(rng, 70000) + 1 : size / 3,
                                          size - start));
            CHECK(write_at(w, r, (uint8_t)i) == 0);
            models_mark(m, r);
        }
        world_close(w);
        for (size_t i = 0; i < MODELS; i++)
            if (m[i].used && !m[i].persistent)
                model_fini(&m[i]);
        check_disk(&memdisks[0], false);
        ask_qemu(&memdisks[0], m, false);

        w = world_open(0, true);
        for (size_t i = 0; i < MODELS; i++)
            if (m[i].used)
                model_compare(&m[i], w, true);
        world_close(w);
    }
    for (size_t i = 0; i < MODELS; i++)
        model_fini(&m[i]);
}

TEST(what_is_saved_is_loaded_again)
{
    struct rng rng = {test_seed()};
    rounds(g, 64 * KiB, 8 * MiB + 512, 12, &rng);
}

TEST(tables_of_many_clusters)
{
    struct rng rng = {test_seed()};
    rounds(g, 512, 9 * MiB, 8, &rng);
}

TEST(large_clusters)
{
    struct rng rng = {test_seed()};
    rounds(g, 2 * MiB, 5 * MiB, 4, &rng);
}

/* All ones takes no cluster, and QEMU reads it. */
TEST(all_dirty_takes_a_table_only)
{
    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 64 * MiB, ",\"cluster-size\":512");
    struct world *w = world_open(0, false);
    add(w, "ones", 512, DIRTY_PERSISTENT);
    struct dirty_bitmap *bm = dirty_find(w->n, "ones");
    bitmap_mark_all(dirty_bits(bm));
    uint64_t before = memdisks[0].size;
    world_close(w);
    CHECK(memdisks[0].size - before < 32 * KiB);
    check_disk(&memdisks[0], false);
    w = world_open(0, true);
    bm = dirty_find(w->n, "ones");
    CHECK(bm && bitmap_count(dirty_bits(bm)) == 64 * MiB);
    world_close(w);
}

/* ---- in use ---- */

TEST(a_killed_process_leaves_inconsistent_ones_that_can_be_removed)
{
    struct error err = ERROR_INIT;

    stored_bitmap(g, 8 * MiB, "");
    struct world *w = world_open(0, false);
    copy_disk(1, 0); /* nothing has changed so far */
    CHECK(write_at(w, range_make(0, 512), 2) == 0);
    copy_disk(2, 0);
    world_close(w);

    w = world_open(1, true);
    CHECK(!dirty_inconsistent(dirty_find(w->n, "a")));
    world_close(w);
    copy_disk(1, 2);
    w = world_open(1, false);
    for (struct dirty_bitmap *bm = dirty_first(w->n); bm; bm = dirty_next(bm)) {
        CHECK(dirty_inconsistent(bm) && dirty_persistent(bm) && !dirty_enabled(bm));
        CHECK(dirty_check(bm, DIRTY_CHECK_DEFAULT, &err) == -EINVAL);
        error_clear(&err);
    }
    CHECK(write_at(w, range_make(0, 65536), 2) == 0);
    CHECK(edge_truncate(w->e, 9 * MiB, true, &err) == -EINVAL);
    CHECK_TEXT(err, "Bitmap 'a' is inconsistent and cannot be used");
    remove_bitmap(w, "a");
    world_close(w);
    check_disk(&memdisks[1], false);

    w = world_open(1, false);
    CHECK(!dirty_find(w->n, "a") && dirty_inconsistent(dirty_find(w->n, "off")));
    remove_bitmap(w, "off");
    world_close(w);
    CHECK(check_disk(&memdisks[1], false) == 0);
    w = world_open(1, false);
    CHECK(!dirty_first(w->n));
    world_close(w);
}

TEST(a_resize_is_saved_though_no_bitmap_records)
{
    struct error err = ERROR_INIT;

    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 8 * MiB, "");
    struct world *w = world_open(0, false);
    add(w, "off", 65536, DIRTY_PERSISTENT | DIRTY_DISABLED);
    world_close(w);
    w = world_open(0, false);
    CHECK_OK(edge_truncate(w->e, 8 * GiB, true, &err), err);
    copy_disk(1, 0); /* killed */
    world_close(w);
    w = world_open(0, false);
    struct dirty_bitmap *bm = dirty_find(w->n, "off");
    CHECK(bm && !dirty_inconsistent(bm) && bitmap_size(dirty_bits(bm)) == 8 * GiB);
    world_close(w);
    w = world_open(1, false);
    CHECK(dirty_inconsistent(dirty_find(w->n, "off")));
    world_close(w);
}

TEST(a_read_only_node_leaves_the_image_alone)
{
    stored_bitmap(g, 8 * MiB, "");
    memdisks[0].writes = 0;
    struct world *w = world_open(0, true);
    CHECK(dirty_readonly(dirty_find(w->n, "a")) && dirty_enabled(dirty_find(w->n, "a")));
    add(w, "new", 65536, DIRTY_PERSISTENT); /* as QEMU: said to be lost at the end */
    world_close(w);
    CHECK(memdisks[0].writes == 0);
}

static int reopen(struct world *w, bool read_only, struct error *err)
{
    char text[256];
    json_text(text, "[{'driver':'qcow2','node-name':'n','read-only':%s,'file':'%s'}]",
              read_only ? "true" : "false", node_name(w->n->file->node));
    CLEANUP(json_putp) struct json_object *o = json_tokener_parse(text);
    CHECK(o);
    return graph_reopen(w->g, o, err);
}

TEST(reopening_read_only_saves_and_the_first_write_after_takes_into_use)
{
    struct error err = ERROR_INIT;
    struct model m[MODELS] = {0};

    stored_bitmap(g, 8 * MiB, "");
    model_init(&m[0], 8 * MiB, "a", 65536, true, true);
    model_init(&m[1], 8 * MiB, "off", 4096, false, true);
    models_mark(m, range_make(0, 4096));
    models_mark(m, range_make(4 * MiB, 100000));
    struct world *w = world_open(0, false);
    CHECK(write_at(w, range_make(MiB, 65536), 7) == 0);
    models_mark(m, range_make(MiB, 65536));
    edge_detach(w->e);
    w->e = NULL;
    int r = reopen(w, true, &err);
    CHECK_OK(r, err);
    model_compare(&m[0], w, true);
    ask_qemu(&memdisks[0], m, false);
    check_disk(&memdisks[0], false);

    r = reopen(w, false, &err);
    CHECK_OK(r, err);
    model_compare(&m[0], w, false);
    ask_qemu(&memdisks[0], m, false);
    w->e = attach(&w->user, w->n, PERM_ALL, PERM_ALL);
    CHECK(write_at(w, range_make(2 * MiB, 1), 7) == 0);
    models_mark(m, range_make(2 * MiB, 1));
    ask_qemu(&memdisks[0], m, true);
    copy_disk(1, 0);
    world_close(w);
    w = world_open(0, true);
    model_compare(&m[0], w, true);
    model_compare(&m[1], w, true);
    world_close(w);
    w = world_open(1, true);
    CHECK(dirty_inconsistent(dirty_find(w->n, "a")));
    world_close(w);
    model_fini(&m[0]);
    model_fini(&m[1]);
}

TEST(while_in_use_cannot_be_set_writes_are_refused)
{
    struct error err = ERROR_INIT;

    stored_bitmap(g, 8 * MiB, "");
    struct world *w = world_open(0, true);
    int r = reopen(w, false, &err);
    CHECK_OK(r, err);
    w->e = attach(&w->user, w->n, PERM_ALL, PERM_ALL);
    memdisks[0].fail_write_after = 1;
    CHECK(write_at(w, range_make(MiB, 512), 7) == -EIO);
    copy_disk(1, 0);
    memdisks[0].fail_write_after = 0;
    CHECK(write_at(w, range_make(MiB, 512), 7) == 0);
    copy_disk(2, 0);
    world_close(w);
    w = world_open(1, false);
    CHECK(!dirty_inconsistent(dirty_find(w->n, "a")));
    CHECK(write_at(w, range_make(MiB, 512), 7) == 0);
    world_close(w);
    w = world_open(2, false);
    CHECK(dirty_inconsistent(dirty_find(w->n, "a")));
    world_close(w);
}

/* ---- the power goes; writes fail ---- */

static uint8_t *content_of(struct world *w, uint64_t size)
{
    uint8_t *buf = malloc(size);
    struct test_user user;
    CHECK(buf);
    struct edge *e = w->e ? w->e : attach(&user, w->n, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(edge_read(e, range_make(0, size), buf, 0) == 0);
    if (!w->e)
        edge_detach(e);
    return buf;
}

/* What differs from zeroes, the base of "a", is dirty in it, or it cannot be trusted. Returns
 * whether it can. */
static bool check_never_wrong(unsigned disk, uint64_t size)
{
    struct world *w = world_open(disk, true);
    struct dirty_bitmap *bm = dirty_find(w->n, "a");
    bool good = bm && !dirty_inconsistent(bm);
    CHECK(bm);
    uint8_t *content = content_of(w, size);
    for (uint64_t i = 0; good && i < size; i++)
        CHECK(!content[i] || bitmap_get(dirty_bits(bm), i));
    free(content);
    world_close(w);
    return good;
}

TEST(the_power_may_go_at_any_moment)
{
    enum { SIZE = 2 << 20 };
    struct rng rng = {test_seed()};
    unsigned good = 0, bad = 0;

    stored_bitmap(g, SIZE, ",\"cluster-size\":4096");
    uint64_t start_size = memdisks[0].size;
    uint8_t *start = malloc(start_size);
    CHECK(start);
    memcpy(start, memdisks[0].bytes, start_size);
    memdisks[0].record = true;
    struct world *w = world_open(0, false);
    for (unsigned i = 0; i < 6; i++) {
        CHECK(write_at(w, range_make(rng_below(&rng, SIZE - 30000), rng_below(&rng, 30000) + 1),
                       3) == 0);
        if (i == 3)
            CHECK(edge_flush(w->e) == 0);
    }
    world_close(w);
    memdisks[0].record = false;
    struct memdisk *d = &memdisks[0], *to = &memdisks[1];
    for (size_t cut = 0; cut <= d->n_log; cut++) {
        for (unsigned variant = 0; variant < 4; variant++) {
            size_t flushed = 0;
            for (size_t i = 0; i < cut; i++)
                if (d->log[i].kind == MEM_FLUSH)
                    flushed = i;
            memdisk_reset(1);
            memdisk_reserve(to, start_size);
            memcpy(to->bytes, start, start_size);
            to->size = start_size;
            /* all of it; the last write only; any */
            for (size_t i = 0; i < cut; i++)
                if (i < flushed || (variant == 0) || (variant == 1 && i + 1 == cut) ||
                    (variant > 1 && rng_below(&rng, 2)))
                    memdisk_apply(to, &d->log[i]);
            if (variant == 1 || rng_below(&rng, 8) == 0)
                check_disk(to, true);
            if (check_never_wrong(1, SIZE))
                good++;
            else
                bad++;
            /* Nothing stands in the way of using it again. */
            w = world_open(1, false);
            CHECK(write_at(w, range_make(0, 512), 9) == 0);
            world_close(w);
            check_never_wrong(1, SIZE);
        }
    }
    CHECK(good && bad);
    CHECK(check_never_wrong(0, SIZE)); /* no cut */
    free(start);
}

TEST(every_write_and_flush_may_fail)
{
    enum { SIZE = 2 << 20 };
    unsigned good = 0, refused = 0;

    stored_bitmap(g, SIZE, ",\"cluster-size\":4096");
    copy_disk(2, 0);
    for (int flush = 0; flush < 2; flush++) {
        for (int at = 1;; at++) {
            copy_disk(1, 2);
            int *after = flush ? &memdisks[1].fail_flush_after : &memdisks[1].fail_write_after;
            *after = at;
            struct world *w = world_open(1, false); /* which writes nothing */
            refused += write_at(w, range_make(300000, 4096), 5) == -EIO;
            (void)!write_at(w, range_make(700000, 100000), 5);
            (void)!edge_flush(w->e);
            world_close(w);
            bool over = *after > 0;
            *after = 0;
            good += check_never_wrong(1, SIZE);
            check_disk(&memdisks[1], true);
            if (over)
                break;
        }
    }
    CHECK(refused >= 2 && good > 2);
}

/* The new header is on the disk, its flush fails, and the old one cannot be written. */
TEST(neither_directory_is_given_away_while_nobody_knows)
{
    struct error err = ERROR_INIT;
    unsigned unsettled = 0;

    stored_bitmap(g, 2 * MiB, ",\"cluster-size\":4096");
    copy_disk(2, 0);
    for (int flush = 1; flush < 8; flush++) {
        for (int at = 1; at < 24; at++) {
            copy_disk(1, 2);
            struct world *w = world_open(1, false);
            CHECK(write_at(w, range_make(0, 512), 1) == 0);
            edge_detach(w->e);
            w->e = NULL;
            memdisks[1].fail_write_after = at;
            memdisks[1].fail_flush_after = flush;
            error_clear(&err);
            (void)!reopen(w, true, &err);
            struct qcow2 *q = w->n->state;
            bool unknown = q->bitmaps_unsettled;
            unsettled += unknown;
            memdisks[1].fail_write_after = memdisks[1].fail_flush_after = 0;
            if (unknown) { /* a guest may flush, and then it dies */
                CHECK(qcow2_sync(q) == 0 && qcow2_sync(q) == 0);
                copy_disk(3, 1);
                check_never_wrong(3, 2 * MiB);
                check_disk(&memdisks[3], true);
            }
            world_close(w);
            check_never_wrong(1, 2 * MiB);
        }
    }
    CHECK(unsettled);
}

/* The header cannot be written when the node is to become read-only: nobody knows whether the image
 * says in_use, so no guest may write before it does. */
TEST(after_a_header_of_unknown_state_writes_wait_for_it)
{
    struct error err = ERROR_INIT;
    unsigned refused = 0;

    stored_bitmap(g, 2 * MiB, ",\"cluster-size\":4096");
    copy_disk(2, 0);
    for (int at = 1; at < 40; at++) {
        copy_disk(1, 2);
        struct world *w = world_open(1, false);
        CHECK(write_at(w, range_make(0, 512), 1) == 0);
        edge_detach(w->e);
        w->e = NULL;
        memdisks[1].fail_write_after = at;
        memdisks[1].fail_flush_after = 0;
        error_clear(&err);
        bool ok = reopen(w, true, &err) == 0;
        bool over = memdisks[1].fail_write_after > 0;
        struct qcow2 *q = w->n->state;
        if (!ok) {
            q->bitmaps_unsettled = true; /* as if the second try had failed, too */
            w->e = attach(&w->user, w->n, PERM_ALL, PERM_ALL);
            memdisks[1].fail_write_after = 1;
            CHECK(write_at(w, range_make(300000, 4096), 5) == -EIO);
            memdisks[1].fail_write_after = 0;
            CHECK(write_at(w, range_make(300000, 4096), 5) == 0);
            CHECK(!q->bitmaps_unsettled);
            copy_disk(3, 1);
            check_never_wrong(3, 2 * MiB);
            refused++;
        }
        world_close(w);
        check_never_wrong(1, 2 * MiB);
        check_disk(&memdisks[1], true);
        if (over)
            break;
    }
    CHECK(refused > 1);
}

/* ---- what may be added ---- */

TEST(what_qemu_would_refuse_is_not_added)
{
    char *long_name = xcalloc(1, 1025), *text;

    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 4 * TiB, "");
    struct world *w = world_open(0, false);
    refused(w, "b", 512,
            "Can't make bitmap 'b' persistent in 'n': Too much space will be occupied by the "
            "bitmap. Use larger granularity");
    add(w, "b", 1024, DIRTY_PERSISTENT); /* 512 MiB: just so */
    refused(w, "b", 1024, "Bitmap already exists: b");
    memset(long_name, 'n', 1024);
    text = xasprintf("Can't make bitmap '%s' persistent in 'n': Name length exceeds maximum (1023 "
                     "characters)",
                     long_name);
    refused(w, long_name, 65536, text);
    long_name[1023] = 0;
    add(w, long_name, 2 * GiB, DIRTY_PERSISTENT);
    world_close(w);
    check_disk(&memdisks[0], false);
    w = world_open(0, true);
    CHECK(dirty_find(w->n, long_name) && dirty_find(w->n, "b"));
    world_close(w);

    memdisk_reset(0);
    create_ok(g, 0, MiB, ",\"version\":\"v2\"");
    w = world_open(0, false);
    refused(w, "b", 65536,
            "Can't make bitmap 'b' persistent in 'n': Cannot store dirty bitmaps in qcow2 v2 "
            "files");
    world_close(w);
    free(text);
    free(long_name);
}

TEST(a_disk_grows_only_as_far_as_its_bitmaps_can_be_stored)
{
    struct error err = ERROR_INIT;

    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, 2 * TiB, "");
    struct world *w = world_open(0, false);
    add(w, "b", 512, DIRTY_PERSISTENT);
    add(w, "free", 512, 0);
    {
        GRAPH_LOCKED(w->g);
        CHECK(edge_truncate(w->e, 2 * TiB + MiB, true, &err) == -EINVAL);
        CHECK_TEXT(err, "Bitmap 'b': Too much space will be occupied by the bitmap. Use larger "
                        "granularity");
        error_clear(&err);
        int r = edge_truncate(w->e, TiB + 512, true, &err);
        CHECK_OK(r, err);
    }
    world_close(w);
    check_disk(&memdisks[0], false);
    w = world_open(0, true);
    CHECK(bitmap_size(dirty_bits(dirty_find(w->n, "b"))) == TiB + 512);
    CHECK(!dirty_inconsistent(dirty_find(w->n, "b")));
    world_close(w);
}

/* As many as may be, and one more. */
TEST(bitmaps_without_number)
{
    enum { N = 65535 };
    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    memdisks[0].yield = false;
    create_ok(g, 0, MiB, ",\"cluster-size\":512");
    struct world *w = world_open(0, false);
    for (unsigned i = 0; i < N; i++) {
        char name[16];
        struct error err = ERROR_INIT;
        snprintf(name, sizeof name, "%x", i);
        GRAPH_LOCKED(w->g);
        /* LOADED: the store is not asked, which counts them all each time */
        int r = dirty_add(w->n, name, 65536, DIRTY_PERSISTENT | DIRTY_DISABLED | DIRTY_LOADED, NULL,
                          &err);
        CHECK_OK(r, err);
    }
    refused(w, "more", 65536,
            "Can't make bitmap 'more' persistent in 'n': Maximum number of persistent bitmaps is "
            "already reached");
    {
        struct error err = ERROR_INIT;
        GRAPH_LOCKED(w->g);
        int r = dirty_commit(&w->n, 1, &err);
        CHECK_OK(r, err);
    }
    world_close(w);
    w = world_open(0, false);
    CHECK(dirty_find(w->n, "0") && dirty_find(w->n, "fffe"));
    world_close(w);
    struct qcow2_header h = header_of(0);
    CHECK(h.nb_bitmaps == N);
    qcow2_header_fini(&h);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(what_is_saved_is_loaded_again),
    cmocka_unit_test(tables_of_many_clusters),
    cmocka_unit_test(large_clusters),
    cmocka_unit_test(all_dirty_takes_a_table_only),
    cmocka_unit_test(a_killed_process_leaves_inconsistent_ones_that_can_be_removed),
    cmocka_unit_test(a_resize_is_saved_though_no_bitmap_records),
    cmocka_unit_test(a_read_only_node_leaves_the_image_alone),
    cmocka_unit_test(reopening_read_only_saves_and_the_first_write_after_takes_into_use),
    cmocka_unit_test(while_in_use_cannot_be_set_writes_are_refused),
    cmocka_unit_test(the_power_may_go_at_any_moment),
    cmocka_unit_test(every_write_and_flush_may_fail),
    cmocka_unit_test(neither_directory_is_given_away_while_nobody_knows),
    cmocka_unit_test(after_a_header_of_unknown_state_writes_wait_for_it),
    cmocka_unit_test(what_qemu_would_refuse_is_not_added),
    cmocka_unit_test(a_disk_grows_only_as_far_as_its_bitmaps_can_be_stored),
    cmocka_unit_test(bitmaps_without_number),
};
UNIT_MAIN(tests)
