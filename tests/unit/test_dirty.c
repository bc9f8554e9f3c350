/* Named bitmaps of a node against a byte per granule; the mode table; QEMU's texts. */
#include "block/driver.h"
#include "dirty/dirty.h"
#include "seed.h"
#include "unit.h"

/* ---- a disk that remembers nothing but whether its writes were marked in time ---- */

static struct node *watched_node; /* every write into it asks: are my bits set? */
static int write_result, truncate_result;

static int disk_open(struct node *n, struct json_object *options, struct error *err)
{
    n->size_bytes = json_get_uint(options, "size", 0);
    n->limits.request_alignment = 1;
    return 0;
}

static void disk_close(struct node *n)
{
}

static int disk_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    for (struct dirty_bitmap *bm = dirty_first(n); bm && n == watched_node; bm = dirty_next(bm))
        if (dirty_enabled(bm))
            assert_int_equal(bitmap_count_range(dirty_bits(bm), r), r.length);
    return write_result;
}

static int disk_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    memset(buf, 0, r.length);
    return 0;
}

static int disk_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    if (truncate_result < 0)
        return error_set(err, -truncate_result, "no");
    n->size_bytes = size_bytes;
    return 0;
}

static uint64_t disk_cluster_size(const struct node *n)
{
    return json_get_uint(n->options, "cluster", 0);
}

static const struct driver disk_driver = {
    .name = "test-disk",
    .open = disk_open,
    .close = disk_close,
    .read = disk_read,
    .write = disk_write,
    .truncate = disk_truncate,
    .cluster_size = disk_cluster_size,
};

static char *user_describe(struct user *u)
{
    return xstrdup("the test");
}

struct world {
    struct user user;
    struct graph *g;
    struct node *n;
    struct edge *e;
};

static const struct user_ops user_ops = {.describe = user_describe};

static void world_init(struct world *w, uint64_t size, uint64_t cluster)
{
    struct json_object *o = json_object_new_object();
    struct error err = ERROR_INIT;

    *w = (struct world){.user = {&user_ops}, .g = graph_new()};
    graph_add_driver(w->g, &disk_driver);
    dirty_init(w->g);
    json_add_string(o, "driver", "test-disk");
    json_add_string(o, "node-name", "disk");
    json_add_uint(o, "size", size);
    json_add_uint(o, "cluster", cluster);
    if (graph_open(w->g, o, &w->n, &err) < 0 ||
        edge_attach_user(&w->user, w->n, "root", PERM_ALL, PERM_ALL, &w->e, &err) < 0)
        fail_msg("%s", err.text);
    json_object_put(o);
    watched_node = w->n;
    write_result = 0;
}

static void world_fini(struct world *w)
{
    edge_detach(w->e);
    node_unref(w->n);
    graph_free(w->g);
}

#define WORLD(w, size, cluster)                                                                    \
    CLEANUP(world_fini) struct world w;                                                            \
    world_init(&w, size, cluster)

static void world_write(struct world *w, struct range r)
{
    CLEANUP(memory_freep) void *buf = xcalloc(r.length + 1, 1);
    assert_int_equal(edge_write(w->e, r, buf, 0), write_result);
}

static void world_resize(struct world *w, uint64_t size)
{
    struct error err = ERROR_INIT;

    GRAPH_LOCKED(w->g);
    if (edge_truncate(w->e, size, true, &err) < 0)
        fail_msg("%s", err.text);
}

static struct dirty_bitmap *add(struct world *w, const char *name, uint64_t granularity,
                                unsigned flags)
{
    struct dirty_bitmap *bm = NULL;
    struct error err = ERROR_INIT;

    if (dirty_add(w->n, name, granularity, flags, &bm, &err) < 0)
        fail_msg("%s", err.text);
    return bm;
}

static void conclude(struct dirty_bitmap *bm, bool advance, const struct bitmap *remaining)
{
    struct dirty_outcome o = {bm, advance, remaining, "job0"};
    assert_int_equal(dirty_conclude(&o, 1, NULL), 0);
}

static void start(struct dirty_bitmap *bm)
{
    struct error err = ERROR_INIT;

    if (dirty_start(bm, &err) < 0)
        fail_msg("%s", err.text);
}

static bool is_dirty(struct dirty_bitmap *bm, uint64_t offset)
{
    return bitmap_get(dirty_bits(bm), offset);
}

#define must_fail(call, what)                                                                      \
    do {                                                                                           \
        struct error err = ERROR_INIT;                                                             \
        assert_true((call) < 0);                                                                   \
        assert_string_equal(err.text, what);                                                       \
    } while (0)

/* ---- the tests, each as a task of a loop ---- */

static int marks_are_set_before_the_data_and_stay_when_it_fails(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 4096, 0), *b = add(&w, "b", 65536, 0);
    struct dirty_bitmap *off = add(&w, "off", 512, DIRTY_DISABLED);

    world_write(&w, range_make(5000, 10)); /* the driver has looked */
    assert_int_equal(bitmap_count(dirty_bits(a)), 4096);
    assert_int_equal(bitmap_count(dirty_bits(b)), 65536);
    assert_int_equal(bitmap_count(dirty_bits(off)), 0);
    write_result = -EIO;
    world_write(&w, range_make(900000, 10));
    assert_true(is_dirty(a, 900000));

    assert_int_equal(dirty_set_enabled(off, true, NULL), 0);
    assert_int_equal(dirty_set_enabled(a, false, NULL), 0);
    world_write(&w, range_make(0, 1));
    assert_true(is_dirty(off, 0) && !is_dirty(a, 0) && is_dirty(b, 0));
    return 0;
}

static int defaults_and_texts_are_those_of_qemu(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    char longest[DIRTY_NAME_MAX + 2];
    char text[DIRTY_NAME_MAX + 100];

    struct dirty_bitmap *a = add(&w, "a", 0, 0);
    assert_int_equal(dirty_granularity(a), 65536);
    {
        static const uint64_t rows[][2] = {
            {512, 4096}, {8192, 8192}, {65536, 65536}, {2 * MiB, 65536}};
        for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
            WORLD(v, 1 * MiB, rows[i][0]);
            assert_int_equal(dirty_granularity(add(&v, "x", 0, 0)), rows[i][1]);
        }
        watched_node = w.n;
    }
    add(&w, "huge", 2 * GiB, 0);

    must_fail(dirty_add(w.n, "", 0, 0, NULL, &err), "Bitmap name cannot be empty");
    must_fail(dirty_add(w.n, "x", 256, 0, NULL, &err), DIRTY_BAD_GRANULARITY);
    must_fail(dirty_add(w.n, "x", 1000, 0, NULL, &err), DIRTY_BAD_GRANULARITY);
    must_fail(dirty_add(w.n, "x", 4 * GiB, 0, NULL, &err), DIRTY_BAD_GRANULARITY);
    must_fail(dirty_add(w.n, "a", 512, 0, NULL, &err), "Bitmap already exists: a");
    must_fail(dirty_add(w.n, "p", 0, DIRTY_PERSISTENT, NULL, &err),
              "Can't store persistent bitmaps to disk: Operation not supported");
    memset(longest, 'n', sizeof longest);
    longest[DIRTY_NAME_MAX + 1] = '\0';
    snprintf(text, sizeof text, "Bitmap name too long: %s", longest);
    must_fail(dirty_add(w.n, longest, 0, 0, NULL, &err), text);
    longest[DIRTY_NAME_MAX] = '\0';
    dirty_release(add(&w, longest, 0, 0));

    must_fail(dirty_lookup(w.g, "x", "a", NULL, NULL, &err), "Node 'x' not found");
    must_fail(dirty_lookup(w.g, "disk", "x", NULL, NULL, &err), "Dirty bitmap 'x' not found");
    struct node *n = NULL;
    struct dirty_bitmap *found = NULL;
    assert_int_equal(dirty_lookup(w.g, "disk", "a", &n, &found, NULL), 0);
    assert_true(n == w.n && found == a);

    dirty_set_inconsistent(a);
    must_fail(dirty_check(a, DIRTY_CHECK_DEFAULT, &err),
              "Bitmap 'a' is inconsistent and cannot be used");
    assert_false(dirty_recording(a));
    dirty_set_readonly(a, true);
    must_fail(dirty_check(a, DIRTY_CHECK_DEFAULT, &err),
              "Bitmap 'a' is readonly and cannot be modified");
    must_fail(dirty_check(a, DIRTY_CHECK_ALLOW_READONLY, &err),
              "Bitmap 'a' is inconsistent and cannot be used");
    dirty_set_busy(a, true);
    must_fail(dirty_check(a, DIRTY_CHECK_DEFAULT, &err),
              "Bitmap 'a' is currently in use by another operation and cannot be used");
    must_fail(dirty_start(a, &err),
              "Bitmap 'a' is currently in use by another operation and cannot be used");
    assert_int_equal(dirty_check(a, 0, NULL), 0);
    dirty_set_busy(a, false);

    /* The size of the node does not matter any more: bitmaps of another node do. */
    WORLD(v, 2 * MiB, 0);
    struct dirty_bitmap *b = add(&v, "b", 0, 0), *c = add(&w, "c", 0, 0);
    must_fail(dirty_merge(c, b, NULL, &err),
              "Bitmaps are of different sizes (destination size is 1048576, source size is "
              "2097152) and can't be merged");
    must_fail(dirty_merge(c, a, NULL, &err), "Bitmap 'a' is inconsistent and cannot be used");
    return 0;
}

static int queries_show_the_newest_first(void *arg)
{
    WORLD(w, 1024000, 0);
    assert_null(dirty_info(w.n));
    struct dirty_bitmap *a = add(&w, "a", 65536, 0);
    add(&w, NULL, 512, DIRTY_DISABLED);
    struct dirty_bitmap *b = add(&w, "b", 65536, DIRTY_DISABLED);
    dirty_set_inconsistent(b);
    world_write(&w, range_make(1023999, 1));
    start(a);

    CLEANUP(json_putp) struct json_object *info = dirty_info(w.n);
    CLEANUP(json_putp)
    struct json_object *want = json_tokener_parse(
        "[{'count':0,'granularity':65536,'recording':true,'busy':false,'persistent':false},"
        "{'name':'b','count':0,'granularity':65536,'recording':false,'busy':false,"
        "'persistent':false,'inconsistent':true},"
        "{'count':0,'granularity':512,'recording':false,'busy':false,'persistent':false},"
        "{'name':'a','count':65536,'granularity':65536,'recording':true,'busy':true,"
        "'persistent':false}]");
    assert_string_equal(json_object_to_json_string(info), json_object_to_json_string(want));

    dirty_hide(b);
    assert_null(dirty_find(w.n, "b"));
    struct dirty_bitmap *again = add(&w, "b", 512, 0);
    assert_true(dirty_find(w.n, "b") == again && dirty_first(w.n) == again);
    dirty_release(again);
    dirty_unhide(b);
    assert_true(dirty_find(w.n, "b") == b);
    conclude(a, true, NULL);
    assert_true(dirty_first(w.n) == a);
    return 0;
}

static int a_hidden_bitmap_records_on(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 512, 0);

    dirty_hide(a);
    assert_null(dirty_first(w.n));
    world_write(&w, range_make(0, 512));
    dirty_unhide(a);
    assert_int_equal(bitmap_count(dirty_bits(a)), 512);
    return 0;
}

/* The digests are what qemu-storage-daemon 7.2 answered for the same bits. */
static int sha256_is_over_whole_words(void *arg)
{
    WORLD(w, 1024000, 0);
    struct dirty_bitmap *a = add(&w, "a", 65536, 0);
    char hex[65];

    assert_int_equal(dirty_sha256(a, hex, NULL), 0);
    assert_string_equal(hex, "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc");
    world_write(&w, range_make(0, 1));
    world_write(&w, range_make(1022976, 1024));
    assert_int_equal(dirty_sha256(a, hex, NULL), 0);
    assert_string_equal(hex, "ff1a03bec701df63f26cac64b4e0bb6009b26158b441e2131a79d72c76ba390a");
    return 0;
}

/* The table of ARCHITECTURE.md: granule 0 before, 1 during the job; 2 and 3 never. */
static int a_job_ends_as_the_table_says(void *arg)
{
    for (int enabled = 0; enabled < 2; enabled++)
        for (int outcome = 0; outcome < 4; outcome++) {
            WORLD(w, 1 * MiB, 0);
            struct dirty_bitmap *old = add(&w, "old", 4096, 0);
            struct dirty_bitmap *a = add(&w, "a", 4096, 0);
            struct dirty_bitmap *new = add(&w, "new", 4096, 0);
            struct bitmap *remaining = bitmap_new(1 * MiB, 65536);

            world_write(&w, range_make(0, 1));
            assert_int_equal(dirty_set_enabled(a, enabled, NULL), 0);
            start(a);
            assert_true(dirty_busy(a));
            assert_false(dirty_enabled(a));
            assert_int_equal(dirty_recording(a), enabled);
            world_write(&w, range_make(4096, 1));
            assert_int_equal(bitmap_count(dirty_bits(a)), 4096); /* frozen */

            bitmap_mark(remaining, range_make(200000, 1));
            if (outcome == 0)
                conclude(a, true, NULL);
            else if (outcome == 1)
                conclude(a, false, NULL);
            else if (outcome == 2)
                conclude(a, false, remaining);
            else
                dirty_unstart(a);
            bitmap_free(remaining);

            assert_true(dirty_find(w.n, "a") == a);
            assert_false(dirty_busy(a));
            assert_int_equal(dirty_enabled(a), enabled);
            assert_int_equal(is_dirty(a, 0), outcome == 1 || outcome == 3);
            assert_int_equal(is_dirty(a, 4096), enabled);
            assert_int_equal(is_dirty(a, 8192), false);
            assert_int_equal(bitmap_count_range(dirty_bits(a), range_make(128 * KiB, 512 * KiB)),
                             outcome == 2 ? 65536 : 0);
            /* A new base, or part of one, is new; one wholly rolled back stays where it was. */
            assert_true(dirty_next(dirty_first(w.n)) == (outcome == 0 || outcome == 2 ? new : a));
            assert_null(dirty_next(old));
            world_write(&w, range_make(8192, 1));
            assert_int_equal(is_dirty(a, 8192), enabled);
        }
    return 0;
}

static int undo_brings_back_exactly_what_was(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 4096, 0), *b = add(&w, "b", 65536, DIRTY_DISABLED);

    world_write(&w, range_make(0, 1));
    bitmap_mark(dirty_bits(b), range_make(500000, 1));
    struct bitmap *undo1 = dirty_clear(a), *undo2 = NULL;
    assert_int_equal(bitmap_count(dirty_bits(a)), 0);
    assert_int_equal(dirty_merge(a, b, &undo2, NULL), 0);
    assert_int_equal(bitmap_count(dirty_bits(a)), 65536);
    dirty_restore(a, undo2);
    assert_int_equal(bitmap_count(dirty_bits(a)), 0);
    dirty_restore(a, undo1);
    assert_int_equal(bitmap_count(dirty_bits(a)), 4096);
    assert_true(is_dirty(a, 0));

    undo1 = dirty_clear(a); /* a write that came between is not lost */
    world_write(&w, range_make(900000, 1));
    dirty_restore(a, undo1);
    assert_true(is_dirty(a, 0) && is_dirty(a, 900000));
    assert_int_equal(dirty_merge(a, a, NULL, NULL), 0);
    return 0;
}

static int what_a_shrink_cut_off_comes_back_dirty(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 4096, 0), *off = add(&w, "off", 4096, DIRTY_DISABLED);
    struct dirty_bitmap *loaded = add(&w, "l", 4096, DIRTY_LOADED);

    world_resize(&w, 256 * KiB);
    struct dirty_bitmap *late = add(&w, "late", 4096, 0);
    assert_int_equal(bitmap_count(dirty_bits(a)), 0);
    world_resize(&w, 512 * KiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 256 * KiB);
    assert_int_equal(bitmap_count(dirty_bits(off)), 256 * KiB);
    assert_int_equal(bitmap_count(dirty_bits(late)), 0); /* its base was small */
    world_resize(&w, 2 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 768 * KiB); /* up to 1 MiB, the rest is new */
    assert_int_equal(bitmap_count(dirty_bits(loaded)), 1792 * KiB);
    assert_int_equal(bitmap_count(dirty_bits(late)), 0);
    assert_false(is_dirty(a, 1 * MiB));

    /* A clear after the shrink: the base is small. */
    world_resize(&w, 1 * MiB);
    dirty_forget(a, dirty_clear(a));
    dirty_forget(loaded, dirty_clear(loaded));
    world_resize(&w, 2 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 0);
    assert_int_equal(bitmap_count(dirty_bits(loaded)), 0);

    /* A clear that is undone, and a base that comes by a merge, bring their past. */
    world_resize(&w, 1 * MiB);
    dirty_restore(a, dirty_clear(a));
    struct dirty_bitmap *merged = add(&w, "merged", 4096, 0);
    assert_int_equal(dirty_merge(merged, a, NULL, NULL), 0);
    world_resize(&w, 2 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 1 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(merged)), 1 * MiB);
    return 0;
}

static int a_resize_that_fails_changes_no_bitmap(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 65536, 0), *b = add(&w, "b", 512, 0);

    GRAPH_LOCKED(w.g);
    world_write(&w, range_make(1 * MiB - 1, 1));
    must_fail(edge_truncate(w.e, (uint64_t)1 << 62, true, &err),
              "No memory for bitmap 'b' of node 'disk' at 4611686018427387904 bytes");
    truncate_result = -EIO;
    must_fail(edge_truncate(w.e, 2 * MiB, true, &err), "no");
    truncate_result = -ENOTSUP;
    must_fail(edge_truncate(w.e, 512, true, &err), "no");
    truncate_result = 0;
    assert_int_equal(bitmap_size(dirty_bits(a)), 1 * MiB);
    assert_int_equal(bitmap_size(dirty_bits(b)), 1 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 65536);
    assert_int_equal(bitmap_count(dirty_bits(b)), 512);
    assert_false(dirty_inconsistent(b));
    return 0;
}

static int what_a_failed_shrink_may_have_lost_is_dirty(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 65536, 0);

    GRAPH_LOCKED(w.g);
    truncate_result = -EIO;
    must_fail(edge_truncate(w.e, 512 * KiB, true, &err), "no");
    truncate_result = 0;
    assert_int_equal(node_size(w.n), 1 * MiB);
    assert_int_equal(bitmap_count_range(dirty_bits(a), range_make(0, 512 * KiB)), 0);
    assert_int_equal(bitmap_count(dirty_bits(a)), 512 * KiB);
    return 0;
}

/* A transaction of clear and backup that is aborted: the backup's end must not make the undo of
 * the clear forget how large the disk has been. */
static int an_undone_start_leaves_the_undo_of_a_clear_whole(void *arg)
{
    WORLD(w, 2 * MiB, 0);
    struct dirty_bitmap *a = add(&w, "a", 4096, 0);

    world_resize(&w, 1 * MiB);
    struct bitmap *undo = dirty_clear(a);
    start(a);
    dirty_unstart(a);
    dirty_restore(a, undo);
    world_resize(&w, 2 * MiB);
    assert_int_equal(bitmap_count(dirty_bits(a)), 1 * MiB);
    return 0;
}

/* ---- random histories against a byte per granule ---- */

enum { NAMES = 5, GRANULES_MAX = 256 };

struct model {
    bool there, enabled, busy;
    uint64_t granularity, peak;
    uint8_t bits[GRANULES_MAX], next[GRANULES_MAX]; /* next: the successor's */
    uint64_t next_peak;
    struct dirty_bitmap *bm;
};

static void model_mark(uint8_t *bits, uint64_t granularity, struct range r)
{
    for (uint64_t o = r.start; o < range_end(r); o += 512)
        bits[o / granularity] = 1;
}

static uint64_t model_granules(const struct model *m, uint64_t size)
{
    return div_round_up(size, m->granularity);
}

static void model_resize(struct model *m, uint8_t *bits, uint64_t *peak, uint64_t from, uint64_t to)
{
    memset(bits + model_granules(m, to), 0, GRANULES_MAX - model_granules(m, to));
    if (to > from)
        model_mark(bits, m->granularity, range_between(from, min_u64(to, *peak)));
    *peak = max_u64(*peak, to);
}

static int random_histories_agree_with_a_model(void *arg)
{
    struct rng rng = {test_seed()};
    static const char *const names[NAMES] = {"a", "b", "c", "d", "e"};

    for (int history = 0; history < 600; history++) {
        uint64_t size = 512 * (1 + rng_below(&rng, GRANULES_MAX));
        WORLD(w, size, 0);
        struct model models[NAMES] = {0};

        for (int step = 0; step < 150; step++) {
            const int i = (int)rng_below(&rng, NAMES);
            struct model *m = &models[i], *src = &models[rng_below(&rng, NAMES)];
            const uint64_t what = rng_below(&rng, 14);

            if (!m->there) {
                *m = (struct model){.there = true, .peak = size, .enabled = rng_below(&rng, 3)};
                m->granularity = 512 << rng_below(&rng, 6);
                m->bm = add(&w, names[i], m->granularity, m->enabled ? 0 : DIRTY_DISABLED);
            } else if (what == 0 && !m->busy) {
                assert_int_equal(dirty_remove(m->bm, NULL), 0);
                m->there = false;
            } else if (what == 1 && !m->busy) {
                dirty_forget(m->bm, dirty_clear(m->bm));
                memset(m->bits, 0, sizeof m->bits);
                m->peak = size;
            } else if (what == 2 && !m->busy) {
                m->enabled = !m->enabled;
                assert_int_equal(dirty_set_enabled(m->bm, m->enabled, NULL), 0);
            } else if (what == 3 && !m->busy && src->there && !src->busy) {
                assert_int_equal(dirty_merge(m->bm, src->bm, NULL, NULL), 0);
                for (uint64_t g = 0; g < model_granules(src, size); g++)
                    if (src->bits[g])
                        model_mark(m->bits, m->granularity,
                                   range_between(g * src->granularity,
                                                 min_u64((g + 1) * src->granularity, size)));
                m->peak = max_u64(m->peak, src->peak);
            } else if (what <= 5 && !m->busy) {
                start(m->bm);
                m->busy = true;
                m->next_peak = size;
                memset(m->next, 0, sizeof m->next);
            } else if (what == 6 && m->busy) {
                conclude(m->bm, true, NULL);
                memcpy(m->bits, m->next, sizeof m->bits);
                m->peak = m->next_peak;
                m->busy = false;
            } else if (what == 7 && m->busy) {
                if (rng_below(&rng, 2))
                    conclude(m->bm, false, NULL);
                else
                    dirty_unstart(m->bm);
                for (int g = 0; g < GRANULES_MAX; g++)
                    m->bits[g] |= m->next[g];
                m->peak = max_u64(m->peak, m->next_peak);
                m->busy = false;
            } else if (what == 8) {
                uint64_t to = 512 * (1 + rng_below(&rng, GRANULES_MAX));
                world_resize(&w, to);
                for (struct model *k = models; k < models + NAMES; k++)
                    if (k->there) {
                        model_resize(k, k->bits, &k->peak, size, to);
                        if (k->busy)
                            model_resize(k, k->next, &k->next_peak, size, to);
                    }
                size = to;
            } else {
                struct range r = range_round_out(rng_range(&rng, size), 512);
                world_write(&w, r);
                for (struct model *k = models; k < models + NAMES; k++)
                    if (k->there && k->enabled)
                        model_mark(k->busy ? k->next : k->bits, k->granularity, r);
            }

            for (struct model *k = models; k < models + NAMES; k++) {
                const char *broken = NULL;
                assert_true(dirty_find(w.n, names[k - models]) == (k->there ? k->bm : NULL));
                if (!k->there)
                    continue;
                assert_int_equal(dirty_recording(k->bm), k->enabled);
                assert_int_equal(dirty_busy(k->bm), k->busy);
                assert_int_equal(bitmap_size(dirty_bits(k->bm)), size);
                assert_true(bitmap_valid(dirty_bits(k->bm), &broken));
                for (uint64_t g = 0; g < model_granules(k, size); g++)
                    if (is_dirty(k->bm, g * k->granularity) != k->bits[g])
                        fail_msg("history %d, step %d, bitmap %s, granule %d", history, step,
                                 names[k - models], (int)g);
            }
        }
    }
    return 0;
}

/* ---- a store ---- */

struct test_store {
    struct dirty_store store;
    int asked, removed, gone, grown;
};

static int store_can_add(struct dirty_store *s, struct node *n, const char *name,
                         uint64_t granularity_bytes, struct error *err)
{
    container_of(s, struct test_store, store)->asked++;
    if (granularity_bytes == 512)
        return error_set(err, EINVAL, "too fine");
    return 0;
}

static int store_remove(struct dirty_store *s, struct node *n, const char *name, struct error *err)
{
    container_of(s, struct test_store, store)->removed++;
    if (!strcmp(name, "stuck"))
        return error_set(err, EIO, "stuck");
    return 0;
}

static bool store_bits_gone(struct dirty_store *s, struct node *n, struct bitmap *bits)
{
    container_of(s, struct test_store, store)->gone++;
    return false;
}

static int store_grow(struct dirty_store *s, struct node *n, struct bitmap *bits, uint64_t to)
{
    container_of(s, struct test_store, store)->grown++;
    return 0;
}

/* A set that the store knows must not be freed, or made larger, behind its back. */
static int the_store_hears_of_successors(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .bits_gone = store_bits_gone,
                            .grow = store_grow}}; /* outlives the world */
    WORLD(w, 1 * MiB, 0);
    struct error err = ERROR_INIT;

    dirty_set_store(w.g, &s.store);
    struct dirty_bitmap *p = add(&w, "p", 4096, DIRTY_PERSISTENT);
    assert_int_equal(dirty_start(p, &err), 0);
    world_resize(&w, 2 * MiB);
    assert_int_equal(s.grown, 2);
    assert_int_equal(dirty_restart(p, &err), 0);
    assert_int_equal(s.gone, 2); /* the bitmap's old set and the successor's */
    dirty_unstart(p);
    assert_int_equal(s.gone, 3);
    return 0;
}

static int store_cannot_rebuild(struct dirty_store *s, struct node *n, struct error *err)
{
    return error_set(err, EIO, "nothing is kept any more");
}

/* It would be good until the program ends, and then be gone. */
static int what_would_not_be_kept_is_not_rebuilt(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .bits_gone = store_bits_gone,
                            .can_rebuild = store_cannot_rebuild}};
    WORLD(w, 1 * MiB, 0);

    dirty_set_store(w.g, &s.store);
    struct dirty_bitmap *p = add(&w, "p", 4096, DIRTY_PERSISTENT);
    struct dirty_bitmap *here = add(&w, "here", 4096, 0);
    dirty_set_inconsistent(p);
    dirty_set_inconsistent(here);
    must_fail(dirty_start_rebuild(p, 1 * MiB, &err), "nothing is kept any more");
    assert_true(!dirty_busy(p));
    assert_int_equal(dirty_start_rebuild(here, 1 * MiB, NULL), 0);
    dirty_unstart(here);
    return 0;
}

static const struct bitmap *durable_successor;

/* The second one fails, and is on the disk. */
static int store_commit_that_fails_once(struct dirty_store *s, struct node *const *nodes, size_t n,
                                        struct error *err)
{
    static int commits;
    struct dirty_state st;

    dirty_get_state(dirty_find(nodes[0], "p"), &st);
    durable_successor = st.successor;
    return ++commits == 2 ? error_set(err, EIO, "failed, and landed") : 0;
}

/* Where guests go on to mark is what a crash finds. */
static int a_restart_that_failed_does_not_stand(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .bits_gone = store_bits_gone,
                            .commit = store_commit_that_fails_once}};
    WORLD(w, 1 * MiB, 0);
    struct dirty_state st;

    dirty_set_store(w.g, &s.store);
    struct dirty_bitmap *p = add(&w, "p", 4096, DIRTY_PERSISTENT);
    assert_int_equal(dirty_start(p, NULL), 0);
    world_write(&w, range_make(0, 512));
    graph_quiesce_begin(w.g, &w.n, 1);
    assert_int_equal(dirty_restart(p, NULL), -EIO);
    graph_quiesce_end(w.g, &w.n, 1);
    dirty_get_state(p, &st);
    assert_true(bitmap_get(st.successor, 0));
    assert_ptr_equal(st.successor, durable_successor);
    dirty_unstart(p);
    return 0;
}

static int conclude_later(void *arg)
{
    return dirty_conclude(arg, 1, NULL);
}

/* Nobody else's commit may find a bitmap of a group at its end before the group is: sim --groups,
 * seed 143. */
static int an_outcome_waits_for_its_turn(void *arg)
{
    WORLD(w, 1 * MiB, 0);
    struct dirty_state st;
    SCOPE(tasks);

    struct dirty_bitmap *p = add(&w, "p", 4096, 0);
    assert_int_equal(dirty_start(p, NULL), 0);
    struct dirty_outcome o = {.bitmap = p, .advance = true, .job = "j"};
    graph_lock(w.g);
    scope_spawn(&tasks, conclude_later, &o);
    for (int i = 0; i < 5; i++)
        assert_int_equal(task_yield(), 0);
    dirty_get_state(p, &st);
    assert_true(st.successor && st.generation == 0);
    graph_unlock(w.g);
    assert_int_equal(scope_join(&tasks), 0);
    dirty_get_state(p, &st);
    assert_true(!st.successor && st.generation == 1);
    return 0;
}

static bool settling;
static struct dirty_bitmap *later;

/* While the first change is flushed another one is made. */
static int store_flush(struct dirty_store *s, struct node *n)
{
    if (!later || !settling)
        return 0;
    struct error err = ERROR_INIT;
    struct graph *g = node_graph(n);
    struct bitmap *old;
    graph_quiesce_begin(g, &n, 1);
    struct dirty_bitmap *bm = later;
    later = NULL;
    assert_int_equal(dirty_begin(&n, 1, &err), 0);
    old = dirty_clear(bm);
    assert_non_null(old);
    assert_int_equal(dirty_commit(&n, 1, &err), 0);
    dirty_forget(bm, old);
    graph_quiesce_end(g, &n, 1);
    return 0;
}

/* A clear is durable after a flush that began after it, not one that somebody else has begun
 * before. */
static int a_clear_waits_for_a_flush_of_its_own(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .flush = store_flush}};
    WORLD(w, 1 * MiB, 0);
    struct dirty_state st;

    dirty_set_store(w.g, &s.store);
    struct dirty_bitmap *one = add(&w, "one", 4096, DIRTY_PERSISTENT);
    struct dirty_bitmap *two = add(&w, "two", 4096, DIRTY_PERSISTENT);
    assert_int_equal(dirty_settle(&w.n, 1, NULL), 0);
    world_write(&w, range_make(0, 512));
    struct bitmap *old = dirty_clear(one);
    assert_int_equal(dirty_commit(&w.n, 1, NULL), 0);
    dirty_forget(one, old);
    later = two;
    settling = true;
    assert_int_equal(dirty_settle(&w.n, 1, NULL), 0);
    settling = false;
    dirty_get_state(one, &st);
    assert_true(!st.successor && st.generation == 2);
    dirty_get_state(two, &st);
    assert_true(st.successor && st.generation == 1);
    assert_int_equal(dirty_settle(&w.n, 1, NULL), 0);
    dirty_get_state(two, &st);
    assert_true(!st.successor && st.generation == 2);
    return 0;
}

/* The flush fails; while it was under way another change has begun, with one that did not. */
static int store_flush_that_fails(struct dirty_store *s, struct node *n)
{
    if (!settling)
        return 0;
    struct error err = ERROR_INIT;
    struct graph *g = node_graph(n);
    settling = false;
    graph_quiesce_begin(g, &n, 1);
    assert_int_equal(dirty_begin(&n, 1, &err), 0);
    assert_int_equal(dirty_commit(&n, 1, &err), 0);
    graph_quiesce_end(g, &n, 1);
    return -EIO;
}

/* Before it is durable that a bitmap is inconsistent it would be believed after a kill, and what
 * guests write is not marked any more: so none is inside. */
static int store_commit_of_inconsistent(struct dirty_store *s, struct node *const *nodes, size_t n,
                                        struct error *err)
{
    static bool is_durable;
    for (size_t i = 0; i < n; i++)
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm)) {
            assert_true(!dirty_inconsistent(bm) || is_durable || nodes[i]->gate > 0);
            is_durable |= dirty_inconsistent(bm);
        }
    return 0;
}

/* Whoever is told that his clear has failed has a bitmap that nobody believes, or the one that he
 * had: sim --seed 10006687. What is in memory only, as a job's own bitmap, is pending still. */
static int a_clear_that_failed_does_not_stand(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .flush = store_flush_that_fails,
                            .commit = store_commit_of_inconsistent}};
    WORLD(w, 1 * MiB, 0);

    dirty_set_store(w.g, &s.store);
    struct dirty_bitmap *one = add(&w, "one", 4096, DIRTY_PERSISTENT);
    assert_int_equal(dirty_settle(&w.n, 1, NULL), 0);
    world_write(&w, range_make(0, 512));
    graph_quiesce_begin(w.g, &w.n, 1);
    assert_int_equal(dirty_begin(&w.n, 1, NULL), 0);
    struct bitmap *old = dirty_clear(one);
    add(&w, "here", 512, 0);
    assert_int_equal(dirty_commit(&w.n, 1, NULL), 0);
    dirty_forget(one, old);
    graph_quiesce_end(w.g, &w.n, 1);
    settling = true;
    assert_int_equal(dirty_settle(&w.n, 1, NULL), -EIO);
    assert_false(settling);
    assert_true(dirty_inconsistent(one) || bitmap_get(dirty_bits(one), 0));
    return 0;
}

static unsigned said_inconsistent;

/* One of two disks takes nothing any more, and so no group of them. */
static int store_commit_of_one(struct dirty_store *s, struct node *const *nodes, size_t n,
                               struct error *err)
{
    struct dirty_bitmap *bm = dirty_find(nodes[0], "bm");

    if (!bm || !dirty_inconsistent(bm))
        return 0;
    if (n > 1 || !strcmp(node_name(nodes[0]), "disk"))
        return error_set(err, EIO, "no");
    said_inconsistent++;
    return 0;
}

/* That it fails for the one is no reason to believe the other after a kill. */
static int a_disk_that_fails_leaves_no_other_believed(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .flush = store_flush_that_fails,
                            .commit = store_commit_of_one}};
    WORLD(w, 1 * MiB, 0);
    struct node *nodes[2] = {w.n};
    struct bitmap *old[2];
    CLEANUP(json_putp) struct json_object *o = json_object_new_object();
    json_add_string(o, "driver", "test-disk");
    json_add_string(o, "node-name", "other");
    json_add_uint(o, "size", 1 * MiB);

    dirty_set_store(w.g, &s.store);
    assert_int_equal(graph_open(w.g, o, &nodes[1], NULL), 0);
    graph_quiesce_begin(w.g, nodes, 2);
    for (int i = 0; i < 2; i++)
        assert_int_equal(dirty_add(nodes[i], "bm", 4096, DIRTY_PERSISTENT, NULL, NULL), 0);
    assert_int_equal(dirty_commit(nodes, 2, NULL), 0);
    graph_quiesce_end(w.g, nodes, 2);
    assert_int_equal(dirty_settle(nodes, 2, NULL), 0);
    graph_quiesce_begin(w.g, nodes, 2);
    assert_int_equal(dirty_begin(nodes, 2, NULL), 0);
    for (int i = 0; i < 2; i++)
        assert_non_null(old[i] = dirty_clear(dirty_find(nodes[i], "bm")));
    assert_int_equal(dirty_commit(nodes, 2, NULL), 0);
    for (int i = 0; i < 2; i++)
        dirty_forget(dirty_find(nodes[i], "bm"), old[i]);
    graph_quiesce_end(w.g, nodes, 2);
    settling = true;
    said_inconsistent = 0;
    assert_int_equal(dirty_settle(nodes, 2, NULL), -EIO);
    assert_int_equal(said_inconsistent, 1);
    node_unref(nodes[1]);
    return 0;
}

static void clear(struct world *w, struct dirty_bitmap *bm)
{
    struct bitmap *old = dirty_clear(bm);

    assert_int_equal(dirty_commit(&w->n, 1, NULL), 0);
    dirty_forget(bm, old);
}

/* One that has been written to and cleared, over a loss of what was written: it is not settled yet.
 */
static struct dirty_bitmap *lose_what_was_cleared(struct world *w, struct test_store *s)
{
    dirty_set_store(w->g, &s->store);
    struct dirty_bitmap *bm = add(w, "bm", 4096, DIRTY_PERSISTENT);
    assert_int_equal(dirty_settle(&w->n, 1, NULL), 0);
    world_write(w, range_make(0, 512));
    clear(w, bm);
    node_has_lost(w->n);
    return bm;
}

/* The error of a flush is told once, here to a guest: what was lost is lost for the clear, too. */
static int a_clear_does_not_hold_over_a_loss(void *arg)
{
    struct test_store s = {{store_can_add, store_remove, .flush = store_flush}};
    WORLD(w, 1 * MiB, 0);
    struct dirty_state st;

    struct dirty_bitmap *bm = lose_what_was_cleared(&w, &s);
    assert_int_equal(dirty_settle(&w.n, 1, NULL), -EIO);
    dirty_get_state(bm, &st);
    assert_true(!st.successor && bitmap_get(dirty_bits(bm), 0));
    /* The next one begins after it. */
    clear(&w, bm);
    assert_int_equal(dirty_settle(&w.n, 1, NULL), 0);
    assert_int_equal(bitmap_count(dirty_bits(bm)), 0);
    return 0;
}

static bool full;

static int store_commit(struct dirty_store *s, struct node *const *nodes, size_t n,
                        struct error *err)
{
    return full ? -ENOSPC : 0;
}

/* What a clear that has failed gets back is in a set that the store knows already: the store hears
 * of it until it has taken it, also if the commit that undoes the clear fails: sim --groups, seed
 * 70022850. */
static int what_comes_back_is_told_until_it_is_taken(void *arg)
{
    struct test_store s = {
        {store_can_add, store_remove, .flush = store_flush, .commit = store_commit}};
    WORLD(w, 1 * MiB, 0);
    struct dirty_state st;

    struct dirty_bitmap *bm = lose_what_was_cleared(&w, &s);
    full = true;
    assert_int_equal(dirty_settle(&w.n, 1, NULL), -EIO);
    full = false;
    dirty_get_state(bm, &st);
    assert_true(!st.successor && bitmap_get(st.current, 0) && st.unannounced);
    assert_int_equal(dirty_commit(&w.n, 1, NULL), 0);
    dirty_get_state(bm, &st);
    assert_false(st.unannounced);
    return 0;
}

static int the_store_is_asked_and_told(void *arg)
{
    struct test_store s = {{store_can_add, store_remove}}; /* outlives the world */
    WORLD(w, 1 * MiB, 0);

    dirty_set_store(w.g, &s.store);
    must_fail(dirty_add(w.n, "p", 512, DIRTY_PERSISTENT, NULL, &err), "too fine");
    struct dirty_bitmap *p = add(&w, "p", 4096, DIRTY_PERSISTENT);
    struct dirty_bitmap *stuck = add(&w, "stuck", 4096, DIRTY_PERSISTENT | DIRTY_LOADED);
    struct dirty_bitmap *here = add(&w, "here", 512, 0);
    assert_int_equal(s.asked, 2);
    assert_true(dirty_persistent(p) && !dirty_persistent(here));
    assert_int_equal(dirty_remove(here, NULL), 0);
    assert_int_equal(s.removed, 0);
    assert_int_equal(dirty_remove(p, NULL), 0);
    must_fail(dirty_remove(stuck, &err), "stuck");
    assert_int_equal(s.removed, 2);
    assert_true(dirty_find(w.n, "stuck") == stuck);
    assert_null(dirty_find(w.n, "p"));
    return 0;
}

#define IN_LOOP(name)                                                                              \
    static void loop_##name(void **state)                                                          \
    {                                                                                              \
        assert_int_equal(loop_run(LOOP_AUTO, name, NULL), 0);                                      \
    }
#define TEST(name)                                                                                 \
    {                                                                                              \
#name, loop_##name, NULL, NULL, NULL                                                       \
    }
IN_LOOP(marks_are_set_before_the_data_and_stay_when_it_fails)
IN_LOOP(defaults_and_texts_are_those_of_qemu)
IN_LOOP(queries_show_the_newest_first)
IN_LOOP(a_hidden_bitmap_records_on)
IN_LOOP(sha256_is_over_whole_words)
IN_LOOP(a_job_ends_as_the_table_says)
IN_LOOP(undo_brings_back_exactly_what_was)
IN_LOOP(what_a_shrink_cut_off_comes_back_dirty)
IN_LOOP(a_resize_that_fails_changes_no_bitmap)
IN_LOOP(what_a_failed_shrink_may_have_lost_is_dirty)
IN_LOOP(an_undone_start_leaves_the_undo_of_a_clear_whole)
IN_LOOP(the_store_is_asked_and_told)
IN_LOOP(the_store_hears_of_successors)
IN_LOOP(what_would_not_be_kept_is_not_rebuilt)
IN_LOOP(a_restart_that_failed_does_not_stand)
IN_LOOP(an_outcome_waits_for_its_turn)
IN_LOOP(a_clear_waits_for_a_flush_of_its_own)
IN_LOOP(a_clear_that_failed_does_not_stand)
IN_LOOP(a_disk_that_fails_leaves_no_other_believed)
IN_LOOP(a_clear_does_not_hold_over_a_loss)
IN_LOOP(what_comes_back_is_told_until_it_is_taken)
IN_LOOP(random_histories_agree_with_a_model)

static const struct CMUnitTest tests[] = {
    TEST(marks_are_set_before_the_data_and_stay_when_it_fails),
    TEST(defaults_and_texts_are_those_of_qemu),
    TEST(queries_show_the_newest_first),
    TEST(a_hidden_bitmap_records_on),
    TEST(sha256_is_over_whole_words),
    TEST(a_job_ends_as_the_table_says),
    TEST(undo_brings_back_exactly_what_was),
    TEST(what_a_shrink_cut_off_comes_back_dirty),
    TEST(a_resize_that_fails_changes_no_bitmap),
    TEST(what_a_failed_shrink_may_have_lost_is_dirty),
    TEST(an_undone_start_leaves_the_undo_of_a_clear_whole),
    TEST(the_store_is_asked_and_told),
    TEST(the_store_hears_of_successors),
    TEST(what_would_not_be_kept_is_not_rebuilt),
    TEST(a_restart_that_failed_does_not_stand),
    TEST(an_outcome_waits_for_its_turn),
    TEST(a_clear_waits_for_a_flush_of_its_own),
    TEST(a_clear_that_failed_does_not_stand),
    TEST(a_disk_that_fails_leaves_no_other_believed),
    TEST(a_clear_does_not_hold_over_a_loss),
    TEST(what_comes_back_is_told_until_it_is_taken),
    TEST(random_histories_agree_with_a_model),
};
UNIT_MAIN(tests)
