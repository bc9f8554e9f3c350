/* The power is cut: what the file below was told is kept in a log, and for many places in it
 * an image is made of what was flushed and any subset of what was not. Such an image may have leaks
 * and nothing worse, and what the guest had flushed must be in it. */
#include "qcow2util.h"

#include "block/qcow2/guard.h"
#include "block/qcow2/header.h"

enum { SECTORS = 1536 };

/* What a sector may hold: all that was written since it was last surely durable. */
struct version {
    uint32_t stamp;
    size_t began; /* position in the log */
};
struct history {
    struct version *items;
    size_t n;
};
struct guest_flush {
    size_t ended;      /* position in the log */
    uint32_t *durable; /* per sector: items of its history that had completed when it began */
};

struct guest {
    struct edge *e;
    struct memdisk *d;
    struct history sectors[SECTORS];
    uint32_t completed[SECTORS]; /* items of the history that have completed */
    struct guest_flush *flushes;
    size_t n_flushes;
    uint32_t next_stamp;
    uint64_t cluster;
};

static void remember(struct guest *w, uint64_t sector, uint32_t stamp)
{
    struct history *h = &w->sectors[sector];
    h->items = realloc(h->items, (h->n + 1) * sizeof *h->items);
    h->items[h->n++] = (struct version){stamp, w->d->n_log};
}

static void complete(struct guest *w, uint64_t first, uint64_t n)
{
    for (uint64_t i = first; i < first + n; i++)
        w->completed[i] = (uint32_t)w->sectors[i].n;
}

static void stamp_write(struct guest *w, uint64_t first, uint64_t n)
{
    uint32_t stamp = ++w->next_stamp;
    uint32_t *buf = malloc(n * 512);
    for (uint64_t i = 0; i < n * 128; i++)
        buf[i] = stamp;
    for (uint64_t i = first; i < first + n; i++)
        remember(w, i, stamp);
    CHECK(edge_write(w->e, range_make(first * 512, n * 512), buf, 0) == 0);
    complete(w, first, n);
    free(buf);
}

static void stamp_zero(struct guest *w, uint64_t first, uint64_t n, bool discard)
{
    struct range r = range_make(first * 512, n * 512);
    for (uint64_t i = first; i < first + n; i++)
        remember(w, i, 0);
    CHECK((discard ? edge_discard(w->e, r) : edge_write_zeroes(w->e, r, REQ_MAY_UNMAP)) == 0);
    if (discard) { /* what was there may have stayed: find out, that is then what there is */
        uint32_t *buf = malloc(r.length);
        CHECK(edge_read(w->e, r, buf, 0) == 0);
        for (uint64_t i = 0; i < n; i++)
            if (buf[i * 128])
                remember(w, first + i, buf[i * 128]);
        free(buf);
    }
    complete(w, first, n);
}

static void guest_flush(struct guest *w)
{
    uint32_t *durable = malloc(sizeof w->completed);
    memcpy(durable, w->completed, sizeof w->completed);
    CHECK(edge_flush(w->e) == 0);
    w->flushes = realloc(w->flushes, (w->n_flushes + 1) * sizeof *w->flushes);
    w->flushes[w->n_flushes++] = (struct guest_flush){w->d->n_log, durable};
}

static void guest_fini(struct guest *w)
{
    for (int i = 0; i < SECTORS; i++)
        free(w->sectors[i].items);
    for (size_t i = 0; i < w->n_flushes; i++)
        free(w->flushes[i].durable);
    free(w->flushes);
}

/* ---- cutting ---- */

static void cut(const struct memdisk *base, const struct memdisk *d, size_t at, struct rng *rng,
                struct memdisk *ret)
{
    size_t flushed = 0, last_begin = 0;
    for (size_t i = 0; i < at; i++) {
        if (d->log[i].kind == MEM_FLUSH)
            last_begin = i;
        if (d->log[i].kind == MEM_FLUSHED)
            flushed = last_begin;
    }
    memdisk_reserve(ret, base->size + 1);
    memcpy(ret->bytes, base->bytes, base->size);
    memset(ret->bytes + base->size, 0, ret->capacity - base->size);
    ret->size = base->size;
    unsigned odds = (unsigned)rng_below(rng, 5); /* 0: nothing survives ... 4: everything, a kill */
    for (size_t i = 0; i < at; i++)
        if (i < flushed || rng_below(rng, 4) < odds)
            memdisk_apply(ret, &d->log[i]);
}

static void check_content(struct graph *g, struct guest *w, unsigned disk, size_t at,
                          const char *options)
{
    const struct guest_flush *f = NULL;
    for (size_t i = 0; i < w->n_flushes && w->flushes[i].ended <= at; i++)
        f = &w->flushes[i];
    struct test_user u;
    struct node *n = open_image(g, disk, options);
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    uint32_t *buf = malloc(SECTORS * 512);
    CHECK(edge_read(e, range_make(0, SECTORS * 512), buf, 0) == 0);
    for (uint64_t s = 0; s < SECTORS; s++) {
        uint32_t v = buf[s * 128];
        size_t first = f && f->durable[s] ? f->durable[s] - 1 : 0;
        bool ok = false;
        for (size_t i = first; i < w->sectors[s].n && w->sectors[s].items[i].began <= at; i++)
            ok |= w->sectors[s].items[i].stamp == v;
        if (!ok) {
            fprintf(stderr,
                    "cut at %zu: sector %llu holds %#x, which it may not after the last flush\n",
                    at, (unsigned long long)s, v);
            abort();
        }
    }
    free(buf);
    edge_detach(e);
    node_unref(n);
}

static void cut_everywhere(struct graph *g, struct guest *w, const struct memdisk *base,
                           const char *options, int cuts, int witnessed)
{
    struct rng rng = {test_seed() ^ w->cluster};
    struct memdisk *now = &memdisks[2];
    for (int i = 0; i < cuts; i++) {
        size_t at = rng_below(&rng, w->d->n_log + 1);
        uint64_t odds_seed = rng.s;
        cut(base, w->d, at, &rng, now);
        const char *damage = disk_damage(now);
        if (damage) {
            dump_disk(now, "/tmp/qcow2-crash-damaged.img");
            fprintf(stderr, "cut at %zu of %zu (state %#llx): %s\n", at, w->d->n_log,
                    (unsigned long long)odds_seed, damage);
            abort();
        }
        if (i % 8 == 0 && options)
            check_content(g, w, 2, at, options);
        if (i < witnessed)
            check_disk(now, true);
    }
}

/* ---- what the guests do ---- */

static void busy_guest(struct guest *w, struct rng *rng, int steps)
{
    uint64_t per_cluster = w->cluster / 512;
    for (int i = 0; i < steps; i++) {
        uint64_t first = rng_below(rng, SECTORS), n = rng_below(rng, 3 * per_cluster) + 1;
        if (rng_below(rng, 3) == 0)
            first = align_down(first, per_cluster), n = align_up(n, per_cluster);
        n = min_u64(n, SECTORS - first);
        switch (rng_below(rng, 10)) {
        case 0:
            stamp_zero(w, first, n, false);
            break;
        case 1:
        case 2:
            stamp_zero(w, first, n, true);
            break;
        case 3:
            guest_flush(w);
            break;
        default:
            stamp_write(w, first, n);
        }
    }
}

struct striped {
    struct guest *w;
    struct rng rng;
    unsigned id;
};
enum { GUESTS = 8 };

static int striped_guest(void *arg)
{
    struct striped *s = arg;
    for (int i = 0; i < 40; i++) {
        if (rng_below(&s->rng, 12) == 0)
            guest_flush(s->w);
        else
            stamp_write(s->w, rng_below(&s->rng, SECTORS / GUESTS) * GUESTS + s->id, 1);
    }
    return 0;
}

static void start(struct guest *w, struct graph *g, const char *options, uint64_t cluster,
                  struct node **n, struct test_user *u, struct memdisk *base)
{
    *w = (struct guest){.d = &memdisks[0], .cluster = cluster};
    *n = open_image(g, 0, options);
    w->e = attach(u, *n, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL);
    uint32_t *buf = malloc(SECTORS * 512);
    CHECK(edge_read(w->e, range_make(0, SECTORS * 512), buf, 0) == 0);
    for (uint64_t i = 0; i < SECTORS; i++) {
        remember(w, i, buf[i * 128]);
        w->completed[i] = 1;
    }
    free(buf);
    memdisk_reserve(base, w->d->size + 1);
    memcpy(base->bytes, w->d->bytes, w->d->size);
    base->size = w->d->size;
    w->d->record = true;
}

enum between { NOTHING, SNAPSHOT, COMPRESSED };

/* What qemu-img does with the image between two lives. */
static void let_qemu_work(enum between what, uint64_t cluster)
{
    if (what == NOTHING || !have_qemu_img())
        return;
    const char *img = scratch_path("between"), *out = scratch_path("compressed");
    dump_disk(&memdisks[0], img);
    if (what == SNAPSHOT) {
        CHECK(run("qemu-img snapshot -c kept %s", img) == 0);
    } else {
        CHECK(run("qemu-img convert -c -f qcow2 -O qcow2 -o cluster_size=%llu %s %s",
                  (unsigned long long)cluster, img, out) == 0);
        CHECK(rename(out, img) == 0);
    }
    load_disk(0, img);
    unlink(img);
}

static void power_cuts(struct graph *g, unsigned bits, bool backing, bool parallel,
                       const char *caches, enum between between)
{
    char more[256], options[512];
    struct guest w;
    struct test_user u;
    struct node *n;
    uint64_t cluster = (uint64_t)1 << bits;
    struct rng rng = {test_seed() + bits + backing};

    for (unsigned i = 0; i < 4; i++)
        memdisk_reset(i);
    memdisk_reserve(&memdisks[1], SECTORS * 512);
    memdisks[1].size = SECTORS * 512;
    for (uint32_t i = 0; i < SECTORS * 128; i++)
        ((uint32_t *)memdisks[1].bytes)[i] = 0xb0000000 + i / 128;
    snprintf(more, sizeof more, ",'cluster-size':%llu", (unsigned long long)cluster);
    create_ok(g, 0, SECTORS * 512, more);
    snprintf(options, sizeof options, "%s,'discard':'unmap',%s", caches,
             backing ? "'backing':{'driver':'raw','file':{'driver':'memdisk','disk':1}}"
                     : "'backing':null");

    /* Two lives of one image: the second finds holes and freed clusters. */
    for (int life = 0; life < 2; life++) {
        if (life)
            let_qemu_work(between, cluster);
        start(&w, g, options, cluster, &n, &u, &memdisks[3]);
        if (parallel) {
            struct striped guests[GUESTS];
            SCOPE(scope);
            for (unsigned i = 0; i < GUESTS; i++) {
                guests[i] = (struct striped){&w, {rng_next(&rng)}, i};
                scope_spawn(&scope, striped_guest, &guests[i]);
            }
            CHECK(scope_join(&scope) == 0);
        } else {
            busy_guest(&w, &rng, 120);
        }
        edge_detach(w.e);
        node_unref(n);
        w.d->record = false;
        cut_everywhere(g, &w, &memdisks[3], options, 400, 12);
        CHECK(!disk_damage(w.d));
        check_disk(w.d, false);
        memdisk_forget_log(w.d);
        guest_fini(&w);
    }
}

TEST(a_power_cut_leaves_leaks_at_most)
{
    graph_add_driver(g, &driver_memdisk);
    for (unsigned bits = 9; bits <= 17; bits += 2) {
        power_cuts(g, bits, false, false, "", NOTHING);
        power_cuts(g, bits, true, false, "", NOTHING);
    }
    power_cuts(g, 19, true, false, "", NOTHING); /* space is taken ahead */
    power_cuts(g, 9, true, false, ",'l2-cache-size':1,'refcount-cache-size':1", NOTHING);
    power_cuts(g, 12, true, false, ",'l2-cache-size':1,'refcount-cache-size':1", NOTHING);
}

TEST(a_power_cut_among_parallel_writers_leaves_leaks_at_most)
{
    graph_add_driver(g, &driver_memdisk);
    power_cuts(g, 9, false, true, ",'l2-cache-size':1,'refcount-cache-size':1", NOTHING);
    power_cuts(g, 12, true, true, "", NOTHING);
    power_cuts(g, 14, false, true, "", NOTHING);
}

TEST(a_power_cut_with_shared_and_compressed_clusters_leaves_leaks_at_most)
{
    graph_add_driver(g, &driver_memdisk);
    power_cuts(g, 9, false, false, "", SNAPSHOT);
    power_cuts(g, 12, false, true, "", SNAPSHOT);
    power_cuts(g, 16, false, false, "", SNAPSHOT);
    power_cuts(g, 9, false, false, "", COMPRESSED);
    power_cuts(g, 12, false, true, "", COMPRESSED);
    power_cuts(g, 16, false, false, "", COMPRESSED);
}

/* With clusters of 512 bytes a cluster of the table is full at 8 MiB. */
TEST(a_power_cut_while_the_refcount_table_grows_leaves_leaks_at_most)
{
    graph_add_driver(g, &driver_memdisk);
    struct guest w;
    struct test_user u;
    struct node *n;
    struct rng rng = {test_seed()};
    enum { SIZE = 24 << 20, CHUNK = 96 << 10 };
    for (unsigned i = 0; i < 4; i++)
        memdisk_reset(i);
    create_ok(g, 0, SIZE, ",'cluster-size':512");
    start(&w, g, "", 512, &n, &u, &memdisks[3]);
    w.d->yield = false;
    uint8_t *buf = malloc(CHUNK);
    memset(buf, 0x5a, CHUNK);
    for (uint64_t at = 0; at < SIZE; at += CHUNK) {
        CHECK(edge_write(w.e, range_make(at, CHUNK), buf, 0) == 0);
        if (rng_below(&rng, 40) == 0)
            CHECK(edge_flush(w.e) == 0);
    }
    free(buf);
    edge_detach(w.e);
    node_unref(n);
    w.d->record = false;
    CHECK(entry_load(w.d->bytes + 48, 0) > 8 * MiB); /* it has moved */
    check_disk(w.d, false);
    struct memdisk *now = &memdisks[2];
    size_t headers = 0;
    for (size_t i = 0; i < w.d->n_log; i++) {
        const struct mem_op *op = &w.d->log[i];
        if (op->kind != MEM_WRITE || op->offset)
            continue;
        headers++; /* the header has been written: around it, at each step */
        for (size_t at = i > 30 ? i - 30 : 0; at < i + 30 && at < w.d->n_log; at += 3) {
            cut(&memdisks[3], w.d, at, &rng, now);
            const char *damage = disk_damage(now);
            if (damage) {
                fprintf(stderr, "cut at %zu, the header at %zu: %s\n", at, i, damage);
                abort();
            }
        }
        cut(&memdisks[3], w.d, i + 1, &rng, now);
        check_disk(now, true);
    }
    CHECK(headers >= 1);
    guest_fini(&w);
}

/* Resizing: the structure only; what is beyond a shrunk end comes and goes. */
TEST(a_power_cut_while_resizing_leaves_leaks_at_most)
{
    graph_add_driver(g, &driver_memdisk);
    for (unsigned bits = 9; bits <= 13; bits += 2) {
        struct guest w;
        struct test_user u;
        struct node *n;
        struct rng rng = {test_seed() + bits};
        char more[64];
        for (unsigned i = 0; i < 4; i++)
            memdisk_reset(i);
        snprintf(more, sizeof more, ",'cluster-size':%u", 1u << bits);
        create_ok(g, 0, SECTORS * 512, more);
        start(&w, g, ",'discard':'unmap'", (uint64_t)1 << bits, &n, &u, &memdisks[3]);
        uint8_t *buf = calloc(1, MiB);
        for (int i = 0; i < 25; i++) {
            struct error err = ERROR_INIT;
            uint64_t size = align_up(rng_below(&rng, 3 * MiB) + 64 * KiB, 512);
            CHECK(edge_truncate(w.e, size, true, &err) == 0);
            for (int k = 0; k < 6; k++) {
                uint64_t at = rng_below(&rng, size);
                memset(buf, 0x5a, 9000);
                CHECK(edge_write(w.e, range_make(at, min_u64(size - at, 9000)), buf, 0) == 0);
            }
            if (rng_below(&rng, 3) == 0)
                CHECK(edge_flush(w.e) == 0);
        }
        free(buf);
        edge_detach(w.e);
        node_unref(n);
        w.d->record = false;
        cut_everywhere(g, &w, &memdisks[3], NULL, 600, 20);
        CHECK(!disk_damage(w.d));
        check_disk(w.d, false);
        guest_fini(&w);
    }
}

/* ---- the header, sector by sector ---- */

static void cut_sectors(const struct memdisk *base, const struct memdisk *d, size_t at,
                        struct rng *rng, struct memdisk *ret)
{
    size_t flushed = 0, last_begin = 0;
    for (size_t i = 0; i < at; i++) {
        if (d->log[i].kind == MEM_FLUSH)
            last_begin = i;
        if (d->log[i].kind == MEM_FLUSHED)
            flushed = last_begin;
    }
    memdisk_reserve(ret, base->size + 1);
    memcpy(ret->bytes, base->bytes, base->size);
    ret->size = base->size;
    for (size_t i = 0; i < at; i++) {
        const struct mem_op *op = &d->log[i];
        if (op->kind != MEM_WRITE || i < flushed) {
            memdisk_apply(ret, op);
            continue;
        }
        for (uint64_t done = 0; done < op->length; done += 512) {
            struct mem_op one = *op;
            one.offset += done;
            one.length = min_u64(512, op->length - done);
            one.data += done;
            if (rng_below(rng, 2))
                memdisk_apply(ret, &one);
        }
    }
}

static void check_header(const struct memdisk *d, const char *name, uint64_t cluster)
{
    struct error err = ERROR_INIT;
    struct qcow2_header h = {0};
    int r = qcow2_header_decode(d->bytes, cluster, &h, &err);
    if (r == 0)
        r = qcow2_header_decode_rest(d->bytes, cluster, &h, &err);
    CHECK_OK(r, err);
    CHECK(h.backing_file && !strcmp(h.backing_file, name));
    CHECK(h.backing_format && !strcmp(h.backing_format, "raw"));
    CHECK(!(h.autoclear & QCOW2_AUTOCLEAR_GUARD) ||
          qcow2_header_find_extension(&h, QCOW2_EXT_GUARD));
    qcow2_header_fini(&h);
}

static void guard_with_backing_name(struct graph *g, unsigned length, unsigned bits, bool by_qemu)
{
    const uint8_t uuid[16] = {1, 2, 3};
    char name[1100] = "/nowhere/";
    struct error err = ERROR_INIT;
    struct rng rng = {test_seed() + length + bits};

    for (unsigned i = 0; i < 4; i++)
        memdisk_reset(i);
    while (strlen(name) < length)
        strcat(name, strlen(name) % 7 ? "x" : "y");
    if (by_qemu) {
        const char *img = scratch_path("named");
        CHECK(run("qemu-img create -q -f qcow2 -u -o cluster_size=%u -b %s -F raw %s 1M",
                  1u << bits, name, img) == 0);
        load_disk(0, img);
        unlink(img);
    } else {
        char more[1400];
        snprintf(more, sizeof more, ",'cluster-size':%u,'backing-file':'%s','backing-fmt':'raw'",
                 1u << bits, name);
        create_ok(g, 0, MiB, more);
    }
    struct memdisk *d = &memdisks[0], *base = &memdisks[3];
    check_header(d, name, 1u << bits);
    memdisk_reserve(base, d->size + 1);
    memcpy(base->bytes, d->bytes, d->size);
    base->size = d->size;
    d->record = true;
    struct node *n = open_image(g, 0, ",'backing':null");
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_ALL, PERM_ALL);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(qcow2_guard_set(n, uuid, &err), err);
        CHECK_OK(qcow2_guard_void(n, &err), err);
        CHECK_OK(qcow2_guard_clear(n, &err), err);
    }
    edge_detach(e);
    node_unref(n);
    d->record = false;
    for (size_t at = 0; at <= d->n_log; at++)
        for (int i = 0; i < 20; i++) {
            cut_sectors(base, d, at, &rng, &memdisks[2]);
            check_header(&memdisks[2], name, 1u << bits);
        }
}

TEST(a_torn_header_keeps_the_name_of_its_backing_file)
{
    graph_add_driver(g, &driver_memdisk);
    for (unsigned length = 12; length <= 1020; length += length < 500 ? 23 : 101)
        for (unsigned bits = 12; bits <= 16; bits += 4) {
            if (length < 800)
                guard_with_backing_name(g, length, bits, false);
            if (have_qemu_img())
                guard_with_backing_name(g, length, bits, true);
        }
}

/* Another program's bit says that nobody has written since; a cut may leave any one write alone. */
TEST(unknown_autoclear_bits_are_gone_before_the_first_write)
{
    graph_add_driver(g, &driver_memdisk);
    for (unsigned i = 0; i < 4; i++)
        memdisk_reset(i);
    create_ok(g, 0, MiB, "");
    struct memdisk *d = &memdisks[0];
    struct test_user u;
    uint8_t buf[4096] = {1};
    for (int life = 0; life < 2; life++) {
        struct node *n = open_image(g, 0, "");
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        CHECK(edge_write(e, range_make(0, sizeof buf), buf, 0) == 0);
        edge_detach(e);
        node_unref(n);
        d->bytes[88] |= 0x40;
        d->record = true;
    }
    size_t header = 0, flushed = 0, data = 0;
    for (size_t i = 0; i < d->n_log; i++) {
        const struct mem_op *op = &d->log[i];
        if (op->kind == MEM_WRITE && op->offset == 0)
            header = i + 1;
        else if (op->kind == MEM_FLUSHED && header && !flushed)
            flushed = i + 1;
        else if (op->kind == MEM_WRITE && op->length == sizeof buf && !data)
            data = i + 1;
    }
    CHECK(header && data && flushed && header < flushed && flushed < data);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(unknown_autoclear_bits_are_gone_before_the_first_write),
    cmocka_unit_test(a_torn_header_keeps_the_name_of_its_backing_file),
    cmocka_unit_test(a_power_cut_leaves_leaks_at_most),
    cmocka_unit_test(a_power_cut_among_parallel_writers_leaves_leaks_at_most),
    cmocka_unit_test(a_power_cut_with_shared_and_compressed_clusters_leaves_leaks_at_most),
    cmocka_unit_test(a_power_cut_while_the_refcount_table_grows_leaves_leaks_at_most),
    cmocka_unit_test(a_power_cut_while_resizing_leaves_leaks_at_most),
};

UNIT_MAIN(tests)
