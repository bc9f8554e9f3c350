/* Images that lie: cut short, with fields and entries that cannot be, with entries at metadata.
 * Each is one clear error or reads as something; nothing crashes, and where QEMU has words for it,
 * they are QEMU's (asked of the installed qemu-io). */
#include "qcow2util.h"

#include "base/cursor.h"
#include "base/log.h"

static int open_disk(struct graph *g, unsigned disk, bool read_only, struct node **n,
                     struct error *err)
{
    char text[1024];
    return try_open(g, n, err,
                    json_text(text,
                              "{'driver':'qcow2','read-only':%s,'backing':null,"
                              "'file':{'driver':'memdisk','disk':%u}}",
                              read_only ? "true" : "false", disk));
}

static void put(struct memdisk *d, uint64_t offset, int bytes, uint64_t value)
{
    memdisk_reserve(d, offset + 8);
    for (int i = 0; i < bytes; i++)
        d->bytes[offset + i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
    d->size = max_u64(d->size, offset + bytes);
}

static uint64_t get(const struct memdisk *d, uint64_t offset, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++)
        v = v << 8 | d->bytes[offset + i];
    return v;
}

static void make_image(struct graph *g, uint64_t size, const char *more)
{
    memdisk_reset(0);
    create_ok(g, 0, size, more);
    struct test_user u;
    struct node *n = open_image(g, 0, ",'backing':null");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    uint8_t *buf = malloc(256 * KiB);
    memset(buf, 0x5a, 256 * KiB);
    CHECK(edge_write(e, range_make(0, 256 * KiB), buf, 0) == 0);
    CHECK(edge_write(e, range_make(size / 2, 4096), buf, 0) == 0);
    free(buf);
    edge_detach(e);
    node_unref(n);
}

/* ---- header fields, in QEMU's words ---- */

struct patch {
    uint64_t offset;
    int bytes;
    uint64_t value;
    const char *text; /* ours, where QEMU can do it or has other words; NULL: QEMU's, or it opens */
};

static void qemu_says(const char *path, char *text, size_t size)
{
    char cmd[1024];
    snprintf(cmd, sizeof cmd, "qemu-io -f qcow2 -c quit %s 2>&1 | grep -v warning", path);
    FILE *f = popen(cmd, "r");
    CHECK(f);
    text[0] = 0;
    char line[1024];
    while (fgets(line, sizeof line, f)) {
        char *at = strstr(line, ": can't open device ");
        if (!at)
            continue;
        at = strchr(at + 20, ':');
        snprintf(text, size, "%s", at ? at + 2 : "");
        text[strcspn(text, "\n")] = 0;
    }
    pclose(f);
}

static void check_patch(struct graph *g, const uint8_t *image, uint64_t size, const struct patch *p)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    char expected[512] = "";
    memdisk_reset(0);
    memdisk_reserve(&memdisks[0], size);
    memcpy(memdisks[0].bytes, image, size);
    memdisks[0].size = size;
    put(&memdisks[0], p->offset, p->bytes, p->value);
    if (p->text) {
        snprintf(expected, sizeof expected, "%s", p->text);
    } else {
        if (!have_qemu_img())
            return;
        const char *path = scratch_path("patched");
        dump_disk(&memdisks[0], path);
        qemu_says(path, expected, sizeof expected);
        unlink(path);
    }
    int r = open_disk(g, 0, false, &n, &err);
    if (strcmp(err.text, expected)) {
        fprintf(stderr, "at %llu, %d bytes %#llx: ours '%s', expected '%s'\n",
                (unsigned long long)p->offset, p->bytes, (unsigned long long)p->value, err.text,
                expected);
        abort();
    }
    CHECK((r < 0) == (expected[0] != 0));
    if (r == 0)
        node_unref(n);
}

TEST(header_fields_that_cannot_be_are_refused_in_qemus_words)
{
    graph_add_driver(g, &driver_memdisk);
    make_image(g, 64 * MiB, "");
    uint64_t size = memdisks[0].size;
    uint8_t *image = malloc(size);
    memcpy(image, memdisks[0].bytes, size);
    static const struct patch patches[] = {
        {0, 1, 0x51, NULL},
        {3, 1, 0, NULL},
        {4, 4, 1, NULL},
        {4, 4, 4, NULL},
        {20, 4, 8, NULL},
        {20, 4, 22, NULL},
        {20, 4, 0xffffffff, NULL},
        {8, 8, 65537, NULL},
        {8, 8, UINT64_MAX, NULL},
        {16, 4, 0, NULL},
        {24, 8, 1ull << 62, NULL},
        {24, 8, 1ull << 40, NULL},
        {36, 4, 0x7fffffff, NULL},
        {36, 4, 0xffffffff, NULL},
        {36, 4, 0, NULL},
        {40, 8, 1, NULL},
        {40, 8, 1ull << 63, NULL},
        {48, 8, 7, NULL},
        {48, 8, 1ull << 63, NULL},
        {56, 4, 0, NULL},
        {56, 4, 0xffff, NULL},
        {60, 4, 0x10001, NULL},
        {64, 8, 0, NULL},
        {60, 4, 0xffffffff, NULL},
        {100, 4, 103, NULL},
        {100, 4, 65537, NULL},
        {96, 4, 7, NULL},
        {96, 4, 0xffffffff, NULL},
        {72, 8, 1ull << 5, NULL},
        {72, 8, 1ull << 63, NULL},
        {72, 8, 0x60, NULL},
        {72, 8, 2, NULL}, /* corrupt */
        {72, 8, 8, NULL}, /* compression type without one */
        {104, 1, 1, NULL},
        {104, 1, 2, NULL},
        {112, 8, 0xe2792aca00000010ull, NULL},
        {112, 8, 0xe2792aca00ffffffull, NULL},
        {112, 8, 0x12345678ffffffffull, NULL},
        {112, 8, 0x0537be7700000010ull, NULL},
        /* ours */
        {96, 4, 3, "qcow2: refcount width of 8 bits is not supported (only 16)"},
        {72, 8, 4, "qcow2: external data file is not supported"},
        {72, 8, 16, "qcow2: extended L2 entries are not supported"},
        {32, 4, 2, "qcow2: LUKS encryption is not supported"},
        {32, 4, 1, "Use of AES-CBC encrypted qcow2 images is not supported"},
        {40, 8, 1ull << 40,
         "Could not read L1 table: offset 0x10000000000 is beyond the end of the file"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(patches); i++)
        check_patch(g, image, size, &patches[i]);
    free(image);
}

/* ---- entries ---- */

static char last_event[600];
static void on_event(void *opaque, const char *name, struct json_object *data)
{
    (void)opaque;
    snprintf(last_event, sizeof last_event, "%s %s%s", name, json_get_string(data, "msg", "?"),
             json_get_bool(data, "fatal", false) ? " (fatal)" : "");
}

struct entry_case {
    uint64_t l1, l2, refblock, reftable; /* 0: as it was; else first entry */
    bool write;                          /* read or write the first cluster */
    uint64_t at;
    int result;
    const char *event;
};

TEST(entries_that_cannot_be_are_named)
{
    graph_add_driver(g, &driver_memdisk);
    graph_set_event_listener(g, on_event, NULL);
    const uint64_t copied = ENTRY_COPIED;
    /* An image of 64 MiB: header, refcount table 0x10000, block 0x20000, L1 0x30000, L2 0x40000. */
    const struct entry_case cases[] = {
        {.l1 = copied | 0x40200,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED L2 table offset 0x40200 unaligned (L1 index: 0) (fatal)"},
        {.l1 = copied | 0x7700000000,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED L2 table offset 0x7700000000 beyond the end of the file "
                  "(L1 index: 0)"},
        {.l1 = copied | 0x20000,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED L2 table offset 0x20000 (L1 index: 0) overlaps with "
                  "refcount block"},
        {.l1 = copied | 0x30000,
         .result = -EIO,
         .write = true,
         .event = "BLOCK_IMAGE_CORRUPTED L2 table offset 0x30000 (L1 index: 0) overlaps with "
                  "active L1 table"},
        {.l2 = copied | 0x50200,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED Cluster allocation offset 0x50200 unaligned (L2 offset: "
                  "0x40000, L2 index: 0) (fatal)"},
        {.l2 = copied | 0x550000000000,
         .result = -EIO,
         .event =
             "BLOCK_IMAGE_CORRUPTED Cluster allocation offset 0x550000000000 beyond the end of "
             "the file"},
        {.l2 = copied | 0x10000,
         .result = -EIO,
         .write = true,
         .event = "BLOCK_IMAGE_CORRUPTED Preventing invalid write on metadata (overlaps with "
                  "refcount table) (fatal)"},
        {.l2 = copied | 0x40000,
         .result = -EIO,
         .write = true,
         .event =
             "BLOCK_IMAGE_CORRUPTED Preventing invalid write on metadata (overlaps with active "
             "L2 table) (fatal)"},
        {.refblock = 1,
         .write = true,
         .at = 20 * MiB,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED Preventing invalid write on metadata (overlaps with "
                  "qcow2_header) (fatal)"},
        {.reftable = 0x20200,
         .write = true,
         .at = 20 * MiB,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED Refblock offset 0x20200 unaligned (reftable index: 0) "
                  "(fatal)"},
        {.reftable = 0x7700000000,
         .write = true,
         .at = 20 * MiB,
         .result = -EIO,
         .event = "BLOCK_IMAGE_CORRUPTED Refblock offset 0x7700000000 beyond the end of the file "
                  "(reftable index: 0) (fatal)"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        const struct entry_case *c = &cases[i];
        make_image(g, 64 * MiB, "");
        struct memdisk *d = &memdisks[0];
        CHECK(get(d, 0x30000, 8) == (copied | 0x40000));
        if (c->l1)
            put(d, 0x30000, 8, c->l1);
        if (c->l2)
            put(d, 0x40000, 8, c->l2);
        if (c->reftable)
            put(d, 0x10000, 8, c->reftable);
        if (c->refblock)
            memset(d->bytes + 0x20000, 0, 65536);
        struct error err = ERROR_INIT;
        struct node *n = NULL;
        CHECK_OK(open_disk(g, 0, false, &n, &err), err);
        struct test_user u;
        struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        uint8_t buf[4096] = {1};
        last_event[0] = 0;
        int r = c->write ? edge_write(e, range_make(c->at, sizeof buf), buf, 0)
                         : edge_read(e, range_make(c->at, sizeof buf), buf, 0);
        if (r != c->result || strcmp(last_event, c->event)) {
            fprintf(stderr, "case %zu: %d, '%s' and not\n'%s'\n", i, r, last_event, c->event);
            abort();
        }
        bool fatal = strstr(c->event, "(fatal)");
        CHECK(edge_read(e, range_make(5 * MiB, 512), buf, 0) == (fatal   ? -ENOMEDIUM
                                                                 : c->l1 ? -EIO
                                                                         : 0));
        edge_detach(e);
        node_unref(n);
        CHECK(!!(d->bytes[79] & 2) == fatal);
        if (fatal) {
            r = open_disk(g, 0, false, &n, &err);
            CHECK(r == -EACCES);
            CHECK_TEXT(err, "qcow2: Image is corrupt; cannot be opened read/write");
            error_clear(&err);
            CHECK(open_disk(g, 0, true, &n, &err) == 0);
            node_unref(n);
        }
    }
}

/* ---- anything ---- */

/* Opens whatever disk 0 holds and uses it; the results do not matter. */
static void use_it(struct graph *g, struct rng *rng)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    uint8_t *buf = calloc(1, 256 * KiB);
    bool read_only = rng_below(rng, 3) == 0;
    if (open_disk(g, 0, read_only, &n, &err) == 0) {
        struct test_user u;
        struct edge *e = attach(
            &u, n, PERM_CONSISTENT_READ | (read_only ? 0 : PERM_WRITE | PERM_RESIZE), PERM_ALL);
        for (int i = 0; i < 12 && node_size(n); i++) {
            uint64_t at = rng_below(rng, min_u64(node_size(n), GiB));
            struct range r =
                range_make(at, min_u64(node_size(n) - at, rng_below(rng, 200 * KiB) + 1));
            struct block_status st;
            (void)!edge_read(e, r, buf, 0);
            (void)!edge_status_above(e, NULL, true, r, &st);
            if (read_only)
                continue;
            (void)!edge_write(e, r, buf, 0);
            (void)!edge_write_zeroes(e, r, REQ_MAY_UNMAP);
            (void)!edge_discard(e, r);
            if (i == 5)
                (void)!edge_truncate(e, 3 * MiB, true, NULL);
            (void)!edge_flush(e);
        }
        struct json_object *info = json_object_new_object();
        n->driver->image_info(n, info);
        json_object_put(info);
        edge_detach(e);
        node_unref(n);
    } else {
        CHECK(err.text[0] && !strchr(err.text, '\n'));
    }
    free(buf);
}

TEST(an_image_cut_short_anywhere_is_an_error_or_readable)
{
    graph_add_driver(g, &driver_memdisk);
    struct rng rng = {test_seed()};
    make_image(g, 8 * MiB,
               ",'cluster-size':4096,'backing-file':'base.qcow2','backing-fmt':'qcow2'");
    uint64_t size = memdisks[0].size;
    uint8_t *image = malloc(size);
    memcpy(image, memdisks[0].bytes, size);
    for (uint64_t length = 0; length < size;
         length += length < 700 ? 1 : rng_below(&rng, 900) + 1) {
        memdisk_reset(0);
        memdisks[0].yield = false;
        memdisk_reserve(&memdisks[0], length + 1);
        memcpy(memdisks[0].bytes, image, length);
        memdisks[0].size = align_up(length, 512); /* block/ rounds up, too */
        use_it(g, &rng);
    }
    free(image);
}

TEST(damaged_metadata_never_crashes)
{
    graph_add_driver(g, &driver_memdisk);
    log_set_level(LOG_LEVEL_ERROR + 1);
    struct rng rng = {test_seed()};
    for (unsigned bits = 9; bits <= 16; bits += 7) {
        char more[64];
        snprintf(more, sizeof more, ",'cluster-size':%u", 1u << bits);
        make_image(g, 8 * MiB, more);
        uint64_t size = memdisks[0].size;
        uint8_t *image = malloc(size);
        memcpy(image, memdisks[0].bytes, size);
        uint64_t meta = 6ull << bits;
        for (int i = 0; i < 1200; i++) {
            memdisk_reset(0);
            struct memdisk *d = &memdisks[0];
            d->yield = i & 1;
            memdisk_reserve(d, size);
            memcpy(d->bytes, image, size);
            d->size = size;
            for (uint64_t k = rng_below(&rng, 6) + 1; k; k--) {
                uint64_t at = rng_below(&rng, 3) ? align_down(rng_below(&rng, meta), 8)
                                                 : rng_below(&rng, 160);
                switch (rng_below(&rng, 4)) {
                case 0:
                    put(d, at, 1, rng_next(&rng));
                    break;
                case 1:
                    put(d, at, 8, rng_next(&rng));
                    break;
                case 2: /* plausible entries */
                    put(d, at, 8,
                        (rng_below(&rng, size >> bits) << bits) |
                            (rng_below(&rng, 2) ? ENTRY_COPIED : 0) |
                            (rng_below(&rng, 3) == 0 ? ENTRY_COMPRESSED : 0) |
                            (rng_below(&rng, 4) == 0));
                    break;
                case 3:
                    put(d, at, 4, rng_below(&rng, 2) ? UINT32_MAX : rng_below(&rng, 70000));
                    break;
                }
            }
            use_it(g, &rng);
        }
        free(image);
    }
}

/* A file that is nothing but a hole, almost: what is asked about each cluster of it takes for ever.
 */
static uint64_t enough_bytes(struct node *n)
{
    (void)n;
    return 16 * MiB; /* more than clusters are in use */
}

TEST(a_huge_hole_behind_the_image_costs_nothing)
{
    struct driver sparse = driver_memdisk;
    sparse.name = sparse.protocol = "sparse";
    sparse.allocated_bytes = enough_bytes;
    graph_add_driver(g, &driver_memdisk);
    graph_add_driver(g, &sparse);
    make_image(g, 4 * MiB, ",'cluster-size':512");
    memdisks[0].size = (uint64_t)1 << 42;
    struct test_user u;
    struct block_status st;
    struct error err = ERROR_INIT;
    struct node *n =
        open_ok(g, "{'driver':'qcow2','file':{'driver':'sparse','disk':0},'backing':null}");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL);
    uint64_t begun_ns = clock_now_ns();
    CHECK(edge_status_above(e, NULL, true, range_make(0, 512), &st) == 0);
    CHECK(clock_now_ns() - begun_ns < NSEC_PER_SEC);
    CHECK_OK(edge_truncate(e, 2 * MiB, true, &err), err);
    CHECK(clock_now_ns() - begun_ns < 2 * NSEC_PER_SEC);
    CHECK(memdisks[0].size < 4 * MiB);
    edge_detach(e);
    node_unref(n);
}

/* A refcount table whose entries, but for the last, which cannot be, all name one block, which is
 * full: to find no free cluster there takes long, and no wait. */
enum { TABLE_ENTRIES = 1 << 16, PER_CLUSTER = 512 / 8 };

static void one_full_block(struct memdisk *d)
{
    const uint64_t block = align_up(d->size, 512), table = block + 512;
    for (unsigned i = 0; i < 512 / 2; i++)
        put(d, block + 2 * i, 2, 1);
    for (unsigned i = 0; i < TABLE_ENTRIES; i++)
        put(d, table + 8 * i, 8, i < TABLE_ENTRIES - 1 ? block : (uint64_t)1 << 40);
    put(d, 48, 8, table);
    put(d, 56, 4, TABLE_ENTRIES / PER_CLUSTER);
}

struct idler {
    bool end;
    unsigned turns;
};

static int idle_until_end(void *arg)
{
    struct idler *w = arg;
    for (; !w->end; w->turns++)
        CHECK(task_yield() == 0);
    return 0;
}

TEST(who_looks_for_a_free_cluster_lets_others_run)
{
    graph_add_driver(g, &driver_memdisk);
    make_image(g, 4 * MiB, ",'cluster-size':512");
    one_full_block(&memdisks[0]);
    memdisks[0].yield = false;
    struct test_user u;
    struct idler idler = {false};
    uint8_t buf[512] = {1};
    struct node *n =
        open_ok(g, "{'driver':'qcow2','file':{'driver':'memdisk','disk':0},'backing':null}");
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    {
        SCOPE(others);
        scope_spawn(&others, idle_until_end, &idler);
        CHECK(edge_write(e, range_make(3 * MiB, sizeof buf), buf, 0) == -EIO);
        idler.end = true;
    }
    CHECK(idler.turns > TABLE_ENTRIES / 128);
    edge_detach(e);
    node_unref(n);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(who_looks_for_a_free_cluster_lets_others_run),
    cmocka_unit_test(a_huge_hole_behind_the_image_costs_nothing),
    cmocka_unit_test(header_fields_that_cannot_be_are_refused_in_qemus_words),
    cmocka_unit_test(entries_that_cannot_be_are_named),
    cmocka_unit_test(an_image_cut_short_anywhere_is_an_error_or_readable),
    cmocka_unit_test(damaged_metadata_never_crashes),
};

UNIT_MAIN(tests)
