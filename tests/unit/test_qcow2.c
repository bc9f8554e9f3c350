/* The qcow2 driver against a byte model, over all cluster sizes, both versions, with and without
 * a backing image; qemu-img says at the end whether the image is sound and holds the same. */
#include "qcow2util.h"

struct disk_model {
    uint8_t *bytes;
    uint64_t size;
};

static void add_drivers(struct graph *g)
{
    graph_add_driver(g, &driver_memdisk);
}

static void compare_all(struct edge *e, const struct disk_model *m)
{
    uint8_t *buf = malloc(m->size);
    CHECK(buf);
    memset(buf, 0xee, m->size);
    CHECK(edge_read(e, range_make(0, m->size), buf, 0) == 0);
    for (uint64_t i = 0; i < m->size; i++)
        if (buf[i] != m->bytes[i]) {
            fprintf(stderr, "byte %#llx is %#x, not %#x\n", (unsigned long long)i, buf[i],
                    m->bytes[i]);
            abort();
        }
    free(buf);
}

/* What qemu-img reads of disk DISK (with disk 1 below it, if BACKING) is the model. */
static void compare_by_qemu(unsigned disk, const struct disk_model *m)
{
    if (!have_qemu_img())
        return;
    const char *path = scratch_path("image"), *raw = scratch_path("raw");
    dump_disk(&memdisks[disk], path);
    CHECK(run("qemu-img convert -f qcow2 -O raw %s %s", path, raw) == 0);
    FILE *f = fopen(raw, "rb");
    CHECK(f);
    uint8_t *buf = malloc(m->size + 1);
    CHECK(fread(buf, 1, m->size + 1, f) == m->size);
    CHECK(!memcmp(buf, m->bytes, m->size));
    fclose(f);
    free(buf);
    unlink(path);
    unlink(raw);
}

static void check_status(struct edge *e, const struct disk_model *m, struct range r)
{
    struct block_status st;
    CHECK(edge_status_above(e, NULL, true, r, &st) == 0);
    CHECK(st.length && st.length <= r.length);
    if (st.flags & STATUS_ZERO)
        for (uint64_t i = 0; i < st.length; i++)
            CHECK(m->bytes[r.start + i] == 0);
}

static void random_step(struct rng *rng, struct edge *e, struct disk_model *m, uint64_t cluster,
                        uint8_t *buf)
{
    uint64_t start = rng_below(rng, m->size);
    uint64_t most = min_u64(m->size - start, 6 * cluster + 5000);
    struct range r = range_make(start, rng_below(rng, most) + 1);
    if (rng_below(rng, 2)) {
        start = align_down(start, rng_below(rng, 2) ? cluster : 512);
        r = range_make(start, min_u64(align_up(r.length, 512), m->size - start));
        if (rng_below(rng, 2))
            r.length = min_u64(align_up(r.length, cluster), m->size - start);
    }
    switch (rng_below(rng, 8)) {
    case 0:
    case 1:
    case 2: {
        uint8_t pattern = (uint8_t)rng_next(rng);
        for (uint64_t i = 0; i < r.length; i++)
            buf[i] = (uint8_t)(pattern + i * 7);
        CHECK(edge_write(e, r, buf, 0) == 0);
        memcpy(m->bytes + r.start, buf, r.length);
        break;
    }
    case 3:
        CHECK(edge_write_zeroes(e, r, rng_below(rng, 2) ? REQ_MAY_UNMAP : 0) == 0);
        memset(m->bytes + r.start, 0, r.length);
        break;
    case 4:
        CHECK(edge_discard(e, r) == 0);
        /* What was there or zeroes, the driver's choice: ask. */
        CHECK(edge_read(e, r, buf, 0) == 0);
        for (uint64_t i = 0; i < r.length; i++)
            CHECK(buf[i] == 0 || buf[i] == m->bytes[r.start + i]);
        memcpy(m->bytes + r.start, buf, r.length);
        break;
    case 5:
    case 6:
        memset(buf, 0xee, r.length);
        CHECK(edge_read(e, r, buf, 0) == 0);
        CHECK(!memcmp(buf, m->bytes + r.start, r.length));
        check_status(e, m, r);
        break;
    case 7:
        if (rng_below(rng, 4) == 0)
            CHECK(edge_flush(e) == 0);
        break;
    }
}

/* What comes back after a shrink reads as zeroes, also where a backing image has something. */
static void random_resize(struct rng *rng, struct edge *e, struct disk_model *m)
{
    struct error err = ERROR_INIT;
    uint64_t size = align_up(rng_below(rng, min_u64(m->size * 3 / 2, 14 * MiB)) + 1, 512);
    int r = edge_truncate(e, size, true, &err);
    CHECK_OK(r, err);
    m->bytes = realloc(m->bytes, size);
    CHECK(m->bytes);
    if (size > m->size)
        memset(m->bytes + m->size, 0, size - m->size);
    m->size = size;
}

static void run_model(struct graph *g, unsigned bits, const char *version, bool backing,
                      const char *open_options, unsigned steps)
{
    struct rng rng = {test_seed() ^ bits ^ (uint64_t)backing << 8};
    uint64_t cluster = (uint64_t)1 << bits;
    uint64_t size = max_u64(256 * KiB, min_u64(40 * cluster, 12 * MiB)) + 512 * (bits % 3);
    struct disk_model m = {calloc(1, size), size};
    uint8_t *buf = malloc(32 * MiB);
    char more[512], options[512];
    struct test_user u;

    memdisk_reset(0);
    memdisk_reset(1);
    if (backing) {
        /* Shorter than the image. */
        uint64_t below = size - size / 4;
        struct memdisk *d = &memdisks[1];
        memdisk_reserve(d, below);
        d->size = align_down(below, 512);
        for (uint64_t i = 0; i < d->size; i++)
            m.bytes[i] = d->bytes[i] = (uint8_t)(i / 512 * 3 + 1);
    }
    snprintf(more, sizeof more, ",'cluster-size':%llu,'version':'%s'", (unsigned long long)cluster,
             version);
    create_ok(g, 0, size, more);
    check_disk(&memdisks[0], false);
    snprintf(options, sizeof options, "%s,'discard':'unmap',%s", open_options,
             backing ? "'backing':{'driver':'raw','file':{'driver':'memdisk','disk':1}}"
                     : "'backing':null");

    for (unsigned round = 0; round < 3; round++) {
        struct node *n = open_image(g, 0, options);
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL);
        CHECK(node_size(n) == m.size);
        compare_all(e, &m);
        for (unsigned i = 0; i < steps; i++)
            random_step(&rng, e, &m, cluster, buf);
        compare_all(e, &m);
        for (int i = 0; i < 4 && (!backing || !strcmp(version, "v3")); i++) {
            random_resize(&rng, e, &m);
            compare_all(e, &m);
            random_step(&rng, e, &m, cluster, buf);
        }
        edge_detach(e);
        node_unref(n);
        check_disk(&memdisks[0], false);
        if (!backing)
            compare_by_qemu(0, &m);
    }
    free(buf);
    free(m.bytes);
}

TEST(random_requests_agree_with_a_byte_model)
{
    add_drivers(g);
    for (unsigned bits = 9; bits <= 21; bits++) {
        run_model(g, bits, "v3", false, "", bits < 18 ? 150 : 40);
        run_model(g, bits, "v3", true, "", bits < 18 ? 100 : 30);
    }
    run_model(g, 9, "v2", false, "", 150);
    run_model(g, 16, "v2", false, "", 150);
    run_model(g, 16, "v2", true, "", 150);
    run_model(g, 21, "v2", true, "", 30);
}

TEST(small_caches_agree_with_a_byte_model)
{
    add_drivers(g);
    const char *tiny = ",'l2-cache-size':1,'refcount-cache-size':1,'l2-cache-entry-size':512";
    for (unsigned bits = 9; bits <= 16; bits++) {
        run_model(g, bits, "v3", false, tiny, 200);
        run_model(g, bits, "v3", true, tiny, 100);
    }
}

/* ---- many at once ---- */

enum { WORKERS = 12, STRIPE = 1536 };

struct worker {
    struct edge *e;
    struct disk_model *m;
    unsigned id;
    uint64_t seed;
};

static int work(void *arg)
{
    struct worker *w = arg;
    struct rng rng = {w->seed};
    uint8_t buf[STRIPE];
    uint64_t stripes = w->m->size / STRIPE;
    for (int i = 0; i < 300; i++) {
        uint64_t stripe = rng_below(&rng, stripes / WORKERS) * WORKERS + w->id;
        struct range r = range_make(stripe * STRIPE, STRIPE);
        switch (rng_below(&rng, 6)) {
        case 0:
        case 1:
        case 2:
            memset(buf, (int)rng_next(&rng), sizeof buf);
            CHECK(edge_write(w->e, r, buf, 0) == 0);
            memcpy(w->m->bytes + r.start, buf, sizeof buf);
            break;
        case 3:
            CHECK(edge_write_zeroes(w->e, r, REQ_MAY_UNMAP) == 0);
            memset(w->m->bytes + r.start, 0, r.length);
            break;
        case 4:
            CHECK(edge_read(w->e, r, buf, 0) == 0);
            CHECK(!memcmp(buf, w->m->bytes + r.start, r.length));
            break;
        case 5:
            if (rng_below(&rng, 5) == 0)
                CHECK(edge_flush(w->e) == 0);
            break;
        }
    }
    return 0;
}

TEST(parallel_writers_of_one_cluster_keep_each_others_data)
{
    add_drivers(g);
    for (unsigned bits = 9; bits <= 17; bits += 4) {
        memdisk_reset(0);
        memdisk_reset(1);
        struct disk_model m = {calloc(1, 768 * KiB), 768 * KiB};
        memdisk_reserve(&memdisks[1], m.size);
        memdisks[1].size = m.size;
        memset(memdisks[1].bytes, 0x77, m.size);
        memset(m.bytes, 0x77, m.size);
        char more[128];
        snprintf(more, sizeof more, ",'cluster-size':%u", 1u << bits);
        create_ok(g, 0, m.size, more);
        struct test_user u;
        struct node *n = open_image(g, 0,
                                    ",'l2-cache-size':1,'refcount-cache-size':1,'discard':'unmap','"
                                    "backing':{'driver':'raw','file':{"
                                    "'driver':'memdisk','disk':1}}");
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        struct worker workers[WORKERS];
        {
            SCOPE(scope);
            for (unsigned i = 0; i < WORKERS; i++) {
                workers[i] = (struct worker){e, &m, i, test_seed() + i * 77 + bits};
                scope_spawn(&scope, work, &workers[i]);
            }
            CHECK(scope_join(&scope) == 0);
        }
        compare_all(e, &m);
        edge_detach(e);
        node_unref(n);
        check_disk(&memdisks[0], false);
        free(m.bytes);
    }
}

/* ---- targets: what is behind the image is there later ---- */

/* A backup's target is opened without what its header names. Zeroes that it was given, whole
 * clusters and parts, must not let through what that has. */
static void zeroes_into_a_target(struct graph *g, const char *version, uint64_t cluster)
{
    enum { CLUSTERS = 64 };
    const uint64_t size = CLUSTERS * cluster;
    const struct range zeroed[] = {
        range_make(0, 3 * cluster),
        range_make(8 * cluster + cluster / 2, 2 * cluster), /* the edges: see below */
        range_make(20 * cluster, cluster / 2),
        range_make(20 * cluster + cluster / 2, cluster / 2),
        range_make(63 * cluster, cluster),
    };
    struct test_user u;
    char more[400];
    const char *name = scratch_path("below"); /* for qemu-img's check alone */
    uint8_t *buf = malloc(size), *below = malloc(size);

    memdisk_reset(0);
    memdisk_reset(1);
    memdisk_reserve(&memdisks[1], size);
    memdisks[1].size = size;
    memset(memdisks[1].bytes, 0x77, size);
    memset(below, 0x77, size);
    snprintf(more, sizeof more,
             ",'cluster-size':%llu,'version':'%s','backing-file':'%s','backing-fmt':'raw'",
             (unsigned long long)cluster, version, name);
    FILE *f = fopen(name, "w");
    CHECK(f && fclose(f) == 0);
    create_ok(g, 0, size, more);

    struct node *n = open_image(g, 0, ",'discard':'unmap','backing':null");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    for (size_t i = 0; i < ARRAY_SIZE(zeroed); i++)
        CHECK(edge_write_zeroes(e, zeroed[i], i % 2 ? REQ_MAY_UNMAP : 0) == 0);
    edge_detach(e);
    node_unref(n);
    check_disk(&memdisks[0], false);
    unlink(name);

    n = open_image(g, 0, ",'backing':{'driver':'raw','file':{'driver':'memdisk','disk':1}}");
    e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    CHECK(edge_read(e, range_make(0, size), buf, 0) == 0);
    for (size_t i = 0; i < ARRAY_SIZE(zeroed); i++) {
        memset(below + zeroed[i].start, 0, zeroed[i].length);
        /* What else is in a cluster that was given a part goes with it. */
        memset(below + align_down(zeroed[i].start, cluster), 0, cluster);
        memset(below + align_down(range_end(zeroed[i]) - 1, cluster), 0, cluster);
    }
    CHECK(memcmp(buf, below, size) == 0);
    edge_detach(e);
    node_unref(n);
    free(buf);
    free(below);
}

TEST(zeroes_in_a_target_hide_what_is_behind_it_later)
{
    add_drivers(g);
    for (unsigned bits = 9; bits <= 16; bits++) {
        zeroes_into_a_target(g, "v3", (uint64_t)1 << bits);
        zeroes_into_a_target(g, "v2", (uint64_t)1 << bits);
    }
}

/* ---- images that qemu-img made ---- */

TEST(compressed_clusters_are_read_and_written_over)
{
    add_drivers(g);
    if (!have_qemu_img())
        return;
    const char *raw = scratch_path("src"), *img = scratch_path("img");
    for (unsigned bits = 9; bits <= 21; bits += 3) {
        struct disk_model m = {calloc(1, 4 * MiB), 4 * MiB};
        for (uint64_t i = 0; i < m.size; i++)
            m.bytes[i] = (uint8_t)(i >> 9 & 1 ? i * i >> 7 : i >> 12);
        FILE *f = fopen(raw, "wb");
        CHECK(fwrite(m.bytes, 1, m.size, f) == m.size && fclose(f) == 0);
        CHECK(run("qemu-img convert -c -f raw -O qcow2 -o cluster_size=%u %s %s", 1u << bits, raw,
                  img) == 0);
        load_disk(0, img);
        struct test_user u;
        struct node *n = open_image(g, 0, ",'discard':'unmap'");
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        compare_all(e, &m);
        struct rng rng = {test_seed() + bits};
        uint8_t *buf = malloc(16 * MiB);
        for (int i = 0; i < 60; i++)
            random_step(&rng, e, &m, (uint64_t)1 << bits, buf);
        compare_all(e, &m);
        free(buf);
        edge_detach(e);
        node_unref(n);
        check_disk(&memdisks[0], false);
        compare_by_qemu(0, &m);
        free(m.bytes);
    }
    unlink(raw);
    unlink(img);
}

TEST(internal_snapshots_stay_as_they_were)
{
    add_drivers(g);
    if (!have_qemu_img())
        return;
    const char *img = scratch_path("snap"), *out = scratch_path("snapout");
    struct disk_model before = {calloc(1, MiB), MiB}, m = {calloc(1, MiB), MiB};
    struct test_user u;
    for (unsigned bits = 9; bits <= 16; bits += 7) {
        memset(m.bytes, 0, m.size);
        memdisk_reset(0);
        char more[128];
        snprintf(more, sizeof more, ",'cluster-size':%u", 1u << bits);
        create_ok(g, 0, MiB, more);
        struct rng rng = {test_seed() + bits};
        uint8_t *buf = malloc(16 * MiB);
        for (int round = 0; round < 2; round++) {
            struct node *n = open_image(g, 0, ",'discard':'unmap'");
            struct edge *e =
                attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL);
            for (int i = 0; i < 120; i++)
                random_step(&rng, e, &m, (uint64_t)1 << bits, buf);
            compare_all(e, &m);
            edge_detach(e);
            node_unref(n);
            check_disk(&memdisks[0], false);
            if (round == 0) {
                dump_disk(&memdisks[0], img);
                CHECK(run("qemu-img snapshot -c s1 %s", img) == 0);
                load_disk(0, img);
                memcpy(before.bytes, m.bytes, MiB);
            }
        }
        compare_by_qemu(0, &m);
        dump_disk(&memdisks[0], img);
        CHECK(run("qemu-img convert -f qcow2 -l snapshot.name=s1 -O raw %s %s", img, out) == 0);
        FILE *f = fopen(out, "rb");
        CHECK(f && fread(buf, 1, MiB, f) == MiB && !memcmp(buf, before.bytes, MiB));
        fclose(f);
        free(buf);
    }
    free(m.bytes);
    free(before.bytes);
    unlink(img);
    unlink(out);
}

/* ---- new images ---- */

TEST(new_images_are_sound_at_every_size)
{
    add_drivers(g);
    static const uint64_t sizes[] = {0, 512, 65536 - 512, 65536, 3 * MiB + 1024, 8 * GiB, 9 * TiB};
    static const char *const preallocations[] = {"off", "metadata", "falloc", "full"};
    uint8_t buf[512];
    memset(buf, 0x33, sizeof buf);
    for (unsigned bits = 9; bits <= 21; bits += 3)
        for (size_t i = 0; i < ARRAY_SIZE(sizes); i++)
            for (size_t p = 0; p < ARRAY_SIZE(preallocations); p++) {
                struct error err = ERROR_INIT;
                char more[128];
                bool too_big = sizes[i] > (uint64_t)(QCOW2_MAX_L1_BYTES / 8) << (2 * bits - 3);
                if (p && sizes[i] > 4 * MiB)
                    continue;
                memdisk_reset(0);
                snprintf(more, sizeof more, ",'cluster-size':%u,'preallocation':'%s'", 1u << bits,
                         preallocations[p]);
                int r = try_create(g, 0, sizes[i], more, &err);
                if (too_big) {
                    CHECK(r == -EFBIG);
                    CHECK_TEXT(err, "Could not resize image: Failed to grow the L1 table: "
                                    "File too large");
                    continue;
                }
                CHECK_OK(r, err);
                struct test_user u;
                struct node *n = open_image(g, 0, "");
                struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
                CHECK(node_size(n) == sizes[i]);
                CHECK(!disk_damage(&memdisks[0]));
                if (sizes[i]) {
                    struct block_status st;
                    CHECK(edge_status_above(e, NULL, true, range_make(0, 512), &st) == 0);
                    CHECK(!!(st.flags & STATUS_ALLOCATED) == (p > 0));
                    CHECK(edge_write(e, range_make(sizes[i] - 512, 512), buf, 0) == 0);
                }
                edge_detach(e);
                node_unref(n);
                CHECK(!disk_damage(&memdisks[0]));
                if (bits % 2)
                    check_disk(&memdisks[0], false);
            }
}

/* ---- a cluster in use is not given away ---- */

struct one_write {
    struct edge *e;
    struct range r;
    uint8_t *buf;
    bool done;
};

static int write_once(void *arg)
{
    struct one_write *w = arg;
    CHECK(edge_write(w->e, w->r, w->buf, 0) == 0);
    w->done = true;
    return 0;
}

static int flush_once(void *arg)
{
    struct one_write *w = arg;
    CHECK(edge_flush(w->e) == 0);
    w->done = true;
    return 0;
}

static void let_run(int turns)
{
    for (int i = 0; i < turns; i++)
        CHECK(task_yield() == 0);
}

/* A write is on its way to a cluster; the cluster is discarded; other writes must not get it
 * before the first has arrived, or it would land in their data. */
TEST(a_cluster_with_a_write_in_flight_is_not_given_away)
{
    add_drivers(g);
    memdisk_reset(0);
    create_ok(g, 0, 4 * MiB, "");
    struct test_user u;
    struct node *n = open_image(g, 0, ",'discard':'unmap','pass-discard-request':false");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    uint8_t *old = malloc(65536), *new = malloc(65536), *seen = malloc(65536);
    memset(old, 0x11, 65536);
    memset(new, 0x22, 65536);
    CHECK(edge_write(e, range_make(0, 65536), old, 0) == 0);
    struct block_status st;
    CHECK(edge_status_above(e, NULL, true, range_make(0, 65536), &st) == 0);
    uint64_t host = st.map;
    {
        SCOPE(scope);
        struct one_write late = {e, range_make(0, 4096), old, false}, flush = {.e = e};
        memdisks[0].hold = range_make(host, 65536);
        scope_spawn(&scope, write_once, &late);
        let_run(20);
        CHECK(memdisks[0].held == 1);
        CHECK(edge_discard(e, range_make(0, 65536)) == 0);
        scope_spawn(&scope, flush_once, &flush);
        let_run(200);
        CHECK(!flush.done); /* waits for the write */
        /* These go elsewhere meanwhile, and are not held up. */
        CHECK(edge_write(e, range_make(MiB, 65536), new, 0) == 0);
        CHECK(edge_status_above(e, NULL, true, range_make(MiB, 65536), &st) == 0 && st.map != host);
        memdisks[0].hold = range_make(0, 0);
        CHECK(scope_join(&scope) == 0);
        CHECK(late.done && flush.done);
    }
    CHECK(edge_write(e, range_make(2 * MiB, 65536), new, 0) == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(2 * MiB, 65536), &st) == 0);
    CHECK(st.map == host); /* now it is free */
    CHECK(edge_read(e, range_make(2 * MiB, 65536), seen, 0) == 0 && !memcmp(seen, new, 65536));
    CHECK(edge_read(e, range_make(0, 65536), seen, 0) == 0 && !seen[0] && !seen[4096]);
    free(old);
    free(new);
    free(seen);
    edge_detach(e);
    node_unref(n);
    check_disk(&memdisks[0], false);
}

struct one_count {
    struct qcow2 *q;
    uint64_t cluster;
};

static int count_once(void *arg)
{
    struct one_count *c = arg;
    uint16_t count;
    CHECK(refcount_get(c->q, c->cluster, &count) == 0 && count == 1);
    return 0;
}

/* All slices of the cache are dirty, and somebody wants another one: the oldest is written by
 * itself, which takes its time. What is counted there meanwhile is flushed, and stays so. */
TEST(refcounts_that_are_written_late_undo_no_later_ones)
{
    enum { SLICE = 512, REACH = 128 << 10 }; /* bytes of the file that a slice counts */
    add_drivers(g);
    memdisk_reset(0);
    create_ok(g, 0, 8 * MiB, ",'cluster-size':512");
    struct test_user u;
    struct node *n =
        open_image(g, 0, ",'discard':'unmap','pass-discard-request':false,'refcount-cache-size':1");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    struct qcow2 *q = n->state;
    uint8_t *buf = malloc(4 * MiB);
    memset(buf, 0x33, 4 * MiB);
    CHECK(edge_write(e, range_make(0, 4 * MiB), buf, 0) == 0);
    CHECK(edge_flush(e) == 0);
    for (uint64_t i = 0; i < q->refcount_cache.n_slots; i++)
        CHECK(edge_discard(e, range_make(i * REACH, 4096)) == 0);
    CHECK(edge_flush(e) == 0); /* frees in each */
    CHECK(q->refcount_cache.n_dirty == q->refcount_cache.n_slots);
    {
        SCOPE(scope);
        struct one_count other = {q, 4 * MiB / 512};
        struct one_write flush = {.e = e};
        memdisks[0].hold = range_make(q->reftable.entries[0], SLICE);
        memdisks[0].hold_one = true;
        scope_spawn(&scope, count_once, &other);
        let_run(20);
        CHECK(memdisks[0].held == 1);
        CHECK(edge_write(e, range_make(6 * MiB, 512), buf, 0) == 0);
        CHECK(q->free_hint < REACH / 512); /* it was counted there */
        scope_spawn(&scope, flush_once, &flush);
        let_run(200);
        memdisks[0].hold = range_make(0, 0);
        CHECK(scope_join(&scope) == 0);
        CHECK(flush.done);
    }
    CHECK(!disk_damage(&memdisks[0]));
    free(buf);
    edge_detach(e);
    node_unref(n);
    check_disk(&memdisks[0], false);
}

/* ---- errors below ---- */

TEST(a_failed_write_or_flush_leaves_the_image_sound)
{
    add_drivers(g);
    struct rng rng = {test_seed()};
    uint8_t *buf = malloc(MiB), *seen = malloc(MiB);
    memset(buf, 0x42, MiB);
    for (int i = 0; i < 150; i++) {
        memdisk_reset(0);
        char more[64];
        snprintf(more, sizeof more, ",'cluster-size':%u", 1u << (9 + 2 * rng_below(&rng, 4)));
        create_ok(g, 0, 2 * MiB, more);
        struct test_user u;
        struct node *n = open_image(g, 0, ",'discard':'unmap','l2-cache-size':1");
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        for (int k = 0; k < 30; k++) {
            uint64_t at = rng_below(&rng, 2 * MiB - 30000);
            struct range r = range_make(at, rng_below(&rng, 30000) + 1);
            if (k % 5 == 2) {
                memdisks[0].fail_write_after = (int)rng_below(&rng, 5) + 1;
                memdisks[0].fail_flush_after = (int)rng_below(&rng, 5) + 1;
            }
            if (k % 7 == 3)
                (void)!edge_discard(e, r);
            else if (k % 4 == 1)
                (void)!edge_flush(e);
            else if (edge_write(e, r, buf, 0) == 0)
                CHECK(edge_read(e, r, seen, 0) == 0 && !memcmp(buf, seen, r.length));
        }
        memdisks[0].fail_write_after = memdisks[0].fail_flush_after = 0;
        CHECK(edge_flush(e) == 0);
        const char *damage = disk_damage(&memdisks[0]);
        if (damage) {
            fprintf(stderr, "round %d: %s\n", i, damage);
            abort();
        }
        edge_detach(e);
        node_unref(n);
        CHECK(!disk_damage(&memdisks[0]));
        if (i < 20)
            check_disk(&memdisks[0], true);
    }
    free(buf);
    free(seen);
}

/* After a resize that has failed, somewhere: the size is the old one, and all of the disk can be
 * written, flushed, and found again, by a program that was killed then. */
static void resize_that_fails(struct graph *g, uint64_t from, uint64_t to, int write, int flush,
                              int more)
{
    struct memdisk *d = &memdisks[0];
    struct error err = ERROR_INIT;
    struct test_user u, after;
    struct disk_model m = {malloc(from), from};

    memdisk_reset(0);
    create_ok(g, 0, from, ",'cluster-size':512");
    struct node *n = open_image(g, 0, "");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL);
    memset(m.bytes, 0x11, from);
    CHECK(edge_write(e, range_make(0, from / 4), m.bytes, 0) == 0);
    CHECK(edge_write(e, range_make(from - 8192, 8192), m.bytes, 0) == 0);
    CHECK(edge_flush(e) == 0);
    d->fail_write_after = write;
    d->fail_flush_after = flush;
    d->fail_more = more;
    int r = edge_truncate(e, to, true, &err);
    d->fail_write_after = d->fail_flush_after = d->fail_more = 0;
    if (r < 0) {
        CHECK(node_size(n) == from);
        memset(m.bytes, 0x22, from);
        CHECK(edge_write(e, range_make(0, from), m.bytes, 0) == 0);
        CHECK(edge_flush(e) == 0);
        CHECK(!disk_damage(d));
        memdisk_reset(1);
        memdisk_reserve(&memdisks[1], d->size + 1);
        memcpy(memdisks[1].bytes, d->bytes, d->size);
        memdisks[1].size = d->size;
        struct node *found = open_image(g, 1, "");
        struct edge *there = attach(&after, found, PERM_CONSISTENT_READ, PERM_ALL);
        CHECK(node_size(found) == from);
        compare_all(there, &m);
        edge_detach(there);
        node_unref(found);
    }
    edge_detach(e);
    node_unref(n);
    CHECK(!disk_damage(d));
    free(m.bytes);
}

TEST(a_resize_that_fails_loses_no_write_that_follows)
{
    add_drivers(g);
    for (int i = 1; i < 40; i++)
        for (int more = 0; more < 2; more++) {
            resize_that_fails(g, 256 * KiB, 8 * MiB, i, 0, more);
            resize_that_fails(g, 256 * KiB, 8 * MiB, 0, i, more);
            resize_that_fails(g, 256 * KiB, 64 * KiB, i, 0, more);
            resize_that_fails(g, 256 * KiB, 64 * KiB, 0, i, more);
        }
}

static int reopen_over(struct graph *g, const char *file, struct error *err)
{
    char text[1024];
    json_text(text, "[{'driver':'qcow2','node-name':'q','file':'%s'}]", file);
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse(text);
    return graph_reopen(g, options, err);
}

/* Tables in memory are those of one file: filters over it come and go, another one does not. */
TEST(a_reopen_does_not_bring_an_image_another_file)
{
    add_drivers(g);
    for (unsigned i = 0; i < 2; i++) {
        memdisk_reset(i);
        create_ok(g, i, MiB, "");
    }
    struct error err = ERROR_INIT;
    struct test_user u;
    struct node *one = open_ok(g, "{'driver':'memdisk','disk':0,'node-name':'one'}");
    struct node *filter = open_ok(g, "{'driver':'fakefilter','file':'one','node-name':'filter'}");
    struct node *other = open_ok(g, "{'driver':'memdisk','disk':1,'node-name':'other'}");
    struct node *n = open_ok(g, "{'driver':'qcow2','file':'one','node-name':'q'}");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    uint8_t buf[4096] = {1};
    CHECK(edge_write(e, range_make(0, sizeof buf), buf, 0) == 0);
    CHECK_OK(reopen_over(g, "filter", &err), err);
    CHECK(edge_write(e, range_make(0, sizeof buf), buf, 0) == 0);
    CHECK_OK(reopen_over(g, "one", &err), err);
    uint64_t writes = memdisks[1].writes;
    int r = reopen_over(g, "other", &err);
    CHECK(edge_write(e, range_make(512 * KiB, sizeof buf), buf, 0) == 0 && edge_flush(e) == 0);
    CHECK(memdisks[1].writes == writes);
    CHECK(r < 0);
    CHECK_TEXT(err, "Node 'q' cannot have its metadata in another file");
    edge_detach(e);
    node_unref(n);
    node_unref(other);
    node_unref(filter);
    node_unref(one);
}

/* An image that was opened read-only says yet that nobody has written it, to whom we do not know.
 */
TEST(unknown_autoclear_bits_do_not_outlive_a_reopen_for_writing)
{
    add_drivers(g);
    memdisk_reset(0);
    create_ok(g, 0, MiB, "");
    memdisks[0].bytes[88] |= 0x40;
    struct error err = ERROR_INIT;
    struct node *n = open_image(g, 0, ",'read-only':true,'node-name':'n'");
    CHECK(node_set_read_only(n, false, &err) < 0);
    CHECK_TEXT(err, "qcow2: Image has unknown autoclear bits; they are cleared when it is opened "
                    "read/write");
    CHECK(node_read_only(n) && memdisks[0].bytes[88] & 0x40);
    node_unref(n);
    n = open_image(g, 0, "");
    CHECK(!(memdisks[0].bytes[88] & 0x40));
    node_unref(n);
}

/* ---- the dirty bit ---- */

TEST(an_image_with_wrong_refcounts_and_the_dirty_bit_is_repaired)
{
    add_drivers(g);
    struct rng rng = {test_seed()};
    for (unsigned bits = 9; bits <= 16; bits++) {
        memdisk_reset(0);
        char more[96];
        struct disk_model m = {calloc(1, MiB), MiB};
        snprintf(more, sizeof more, ",'cluster-size':%u,'lazy-refcounts':true", 1u << bits);
        create_ok(g, 0, MiB, more);
        uint8_t *buf = malloc(16 * MiB);
        struct test_user u;
        for (int round = 0; round < 3; round++) {
            struct node *n = open_image(g, 0, ",'discard':'unmap'");
            struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
            CHECK(!(memdisks[0].bytes[79] & 1));
            compare_all(e, &m);
            for (int i = 0; i < 60; i++)
                random_step(&rng, e, &m, (uint64_t)1 << bits, buf);
            edge_detach(e);
            node_unref(n);
            check_disk(&memdisks[0], false);
            /* Rubbish in the counts; in one round, blocks are lost altogether. */
            uint64_t cs = (uint64_t)1 << bits;
            uint8_t *table = memdisks[0].bytes + entry_load(memdisks[0].bytes + 48, 0);
            for (uint64_t i = 0; i < cs / 8; i++) {
                uint64_t block = entry_load(table, (uint32_t)i);
                if (!block)
                    continue;
                for (uint64_t k = 0; k < cs; k += 2)
                    if (rng_below(&rng, 3) == 0 && block + k < memdisks[0].size)
                        memdisks[0].bytes[block + k + 1] = (uint8_t)rng_below(&rng, 4);
                if (round == 1 && (i || rng_below(&rng, 2)))
                    entry_store(table, (uint32_t)i, 0);
            }
            memdisks[0].bytes[79] |= 1;
        }
        memdisks[0].bytes[79] &= 0xfe;
        free(buf);
        free(m.bytes);
    }
}

/* A process of QEMU's died with lazy refcounts. */
TEST(what_qemu_left_dirty_is_repaired)
{
    add_drivers(g);
    if (!have_qemu_img())
        return;
    const char *img = scratch_path("lazy");
    CHECK(run("qemu-img create -q -f qcow2 -o lazy_refcounts=on,cluster_size=4096 %s 4M", img) ==
          0);
    run("qemu-io -c 'write -P 7 0 1M' -c 'write -P 8 2M 64k' -c 'discard 8k 16k' -c abort %s "
        ">/dev/null 2>&1",
        img);
    load_disk(0, img);
    CHECK(memdisks[0].bytes[79] & 1);
    struct test_user u;
    struct node *n = open_image(g, 0, ",'read-only':true");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    uint8_t buf[512];
    CHECK(edge_read(e, range_make(2 * MiB, 512), buf, 0) == 0 && buf[0] == 8 && buf[511] == 8);
    edge_detach(e);
    node_unref(n);
    CHECK(memdisks[0].bytes[79] & 1); /* reading does not repair */
    n = open_image(g, 0, "");
    e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    CHECK(edge_write(e, range_make(3 * MiB, 512), buf, 0) == 0);
    edge_detach(e);
    node_unref(n);
    CHECK(!(memdisks[0].bytes[79] & 1));
    check_disk(&memdisks[0], false);
    unlink(img);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(random_requests_agree_with_a_byte_model),
    cmocka_unit_test(small_caches_agree_with_a_byte_model),
    cmocka_unit_test(parallel_writers_of_one_cluster_keep_each_others_data),
    cmocka_unit_test(zeroes_in_a_target_hide_what_is_behind_it_later),
    cmocka_unit_test(compressed_clusters_are_read_and_written_over),
    cmocka_unit_test(internal_snapshots_stay_as_they_were),
    cmocka_unit_test(new_images_are_sound_at_every_size),
    cmocka_unit_test(a_cluster_with_a_write_in_flight_is_not_given_away),
    cmocka_unit_test(refcounts_that_are_written_late_undo_no_later_ones),
    cmocka_unit_test(a_failed_write_or_flush_leaves_the_image_sound),
    cmocka_unit_test(a_resize_that_fails_loses_no_write_that_follows),
    cmocka_unit_test(a_reopen_does_not_bring_an_image_another_file),
    cmocka_unit_test(unknown_autoclear_bits_do_not_outlive_a_reopen_for_writing),
    cmocka_unit_test(an_image_with_wrong_refcounts_and_the_dirty_bit_is_repaired),
    cmocka_unit_test(what_qemu_left_dirty_is_repaired),
};

UNIT_MAIN(tests)
