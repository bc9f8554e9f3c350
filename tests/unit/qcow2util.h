/* What the tests of qcow2 share: images in memory, and qemu-img as a witness (where it is
 * installed; without it those parts of a test are left out, and the test says so). */
#pragma once

#include "blockutil.h"
#include "memdisk.h"

#include "block/qcow2/qcow2.h"

#include <stdarg.h>
#include <sys/wait.h>

PRINTF(2, 3) static inline char *json_text(char *buf, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(buf, 1024, fmt, ap);
    va_end(ap);
    for (char *p = buf; *p; p++)
        if (*p == '\'')
            *p = '"';
    return buf;
}

/* Makes an image on memdisk DISK; MORE: further options, beginning with a comma. */
static inline int try_create(struct graph *g, unsigned disk, uint64_t size, const char *more,
                             struct error *err)
{
    char text[1024];
    json_text(text, "{'driver':'qcow2','file':{'driver':'memdisk','disk':%u},'size':%llu%s}", disk,
              (unsigned long long)size, more);
    CLEANUP(json_putp) struct json_object *o = json_tokener_parse(text);
    CHECK(o);
    return graph_create(g, o, err);
}

static inline void create_ok(struct graph *g, unsigned disk, uint64_t size, const char *more)
{
    struct error err = ERROR_INIT;
    int r = try_create(g, disk, size, more, &err);
    CHECK_OK(r, err);
}

static inline struct node *open_image(struct graph *g, unsigned disk, const char *more)
{
    char text[1024];
    return open_ok(g, json_text(text, "{'driver':'qcow2','file':{'driver':'memdisk','disk':%u}%s}",
                                disk, more));
}

static inline const char *scratch_path(const char *name)
{
    static char path[4][256];
    static unsigned next;
    char *p = path[next++ % 4];
    const char *dir = getenv("TMPDIR");
    snprintf(p, 256, "%s/tidemark-qcow2-%d-%s",
             dir                        ? dir
             : access("/dev/shm", W_OK) ? "/tmp"
                                        : "/dev/shm",
             (int)getpid(), name);
    return p;
}

static inline bool have_qemu_img(void)
{
    static int known = -1;
    if (known < 0)
        known = system("command -v qemu-img >/dev/null 2>&1") == 0;
    if (!known)
        print_message("no qemu-img here: its part of this test is left out\n");
    return known;
}

PRINTF(1, 2) static inline int run(const char *fmt, ...)
{
    char cmd[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(cmd, sizeof cmd, fmt, ap);
    va_end(ap);
    int r = system(cmd);
    return r < 0 ? r : WEXITSTATUS(r);
}

static inline void dump_disk(const struct memdisk *d, const char *path)
{
    FILE *f = fopen(path, "wb");
    CHECK(f);
    CHECK(fwrite(d->bytes, 1, d->size, f) == d->size);
    CHECK(fclose(f) == 0);
}

static inline void load_disk(unsigned disk, const char *path)
{
    memdisk_reset(disk);
    struct memdisk *d = &memdisks[disk];
    FILE *f = fopen(path, "rb");
    CHECK(f && fseek(f, 0, SEEK_END) == 0);
    uint64_t size = (uint64_t)ftell(f);
    rewind(f);
    memdisk_reserve(d, size + 1);
    CHECK(fread(d->bytes, 1, size, f) == size);
    d->size = size;
    fclose(f);
}

/* qemu-img check: 0 clean, 3 leaks only; anything else is printed and ends the test. */
static inline int check_disk(const struct memdisk *d, bool leaks_allowed)
{
    if (!have_qemu_img())
        return 0;
    const char *path = scratch_path("check");
    dump_disk(d, path);
    int r = run("qemu-img check -f qcow2 %s >%s.out 2>&1", path, path);
    if (r != 0 && !(r == 3 && leaks_allowed)) {
        run("tail -20 %s.out >&2", path);
        fprintf(stderr, "qemu-img check: %d; the image is %s\n", r, path);
        abort();
    }
    unlink(path);
    run("rm -f %s.out", path);
    return r;
}

/* ---- a check of our own, quick enough for thousands of cuts ---- */

/* Are all references counted (leaks are fine), and do the copied bits tell the truth? NULL: yes. */
static inline const char *disk_damage(const struct memdisk *d)
{
    static char text[256];
    struct qcow2_header h = {0};
    struct error err = ERROR_INIT;
    uint8_t start[QCOW2_HEADER_BYTES] = {0};
    const char *damage = NULL;
    memcpy(start, d->bytes, min_u64(sizeof start, d->size));
    if (qcow2_header_decode(start, sizeof start, &h, &err) < 0)
        return "no header";
    uint64_t cs = qcow2_header_cluster_size(&h);
    if (d->size < cs || qcow2_header_decode_rest(d->bytes, cs, &h, &err) < 0 ||
        qcow2_header_check(&h, &err) < 0) {
        snprintf(text, sizeof text, "header: %.200s", err.text);
        qcow2_header_fini(&h);
        return text;
    }
    uint64_t n = div_round_up(d->size, cs);
    uint16_t *refs = calloc(n, 2), *counts = calloc(n, 2);
#define DAMAGE(...)                                                                                \
    do {                                                                                           \
        snprintf(text, sizeof text, __VA_ARGS__);                                                  \
        damage = text;                                                                             \
        goto out;                                                                                  \
    } while (0)
#define REF(off, what)                                                                             \
    do {                                                                                           \
        if ((off) / cs >= n)                                                                       \
            DAMAGE("%s at %#llx is beyond the end %#llx", what, (unsigned long long)(off),         \
                   (unsigned long long)d->size);                                                   \
        refs[(off) / cs]++;                                                                        \
    } while (0)
#define AT(off) ((off) + 8 <= d->capacity ? entry_load(d->bytes + (off), 0) : 0)
    REF((uint64_t)0, "header");
    for (uint32_t i = 0; i < h.reftable_clusters; i++)
        REF(h.reftable_offset + i * cs, "refcount table");
    for (uint64_t i = 0; i < h.reftable_clusters * cs / 8; i++) {
        uint64_t block = AT(h.reftable_offset + i * 8);
        if (!block)
            continue;
        REF(block, "refcount block");
        for (uint64_t j = 0; j < cs / 2 && i * (cs / 2) + j < n; j++)
            if (block + 2 * j + 2 <= d->capacity)
                counts[i * (cs / 2) + j] =
                    (uint16_t)(d->bytes[block + 2 * j] << 8 | d->bytes[block + 2 * j + 1]);
    }
    for (uint64_t i = 0; i < div_round_up(h.l1_size * 8ull, cs); i++)
        REF(h.l1_offset + i * cs, "L1 table");
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t i = 0; i < h.l1_size; i++) {
            uint64_t l1e = AT(h.l1_offset + 8 * (uint64_t)i), l2 = l1e & ENTRY_OFFSET_MASK;
            if (!l2)
                continue;
            if (pass == 0)
                REF(l2, "L2 table");
            else if ((l1e & ENTRY_COPIED) && counts[l2 / cs] != 1)
                DAMAGE("L2 table at %#llx is counted %u times", (unsigned long long)l2,
                       counts[l2 / cs]);
            for (uint64_t j = 0; j < cs / 8; j++) {
                uint64_t e = AT(l2 + 8 * j), host = e & ENTRY_OFFSET_MASK;
                if (!host || (e & ENTRY_COMPRESSED))
                    continue;
                if (pass == 0)
                    REF(host, "cluster");
                else if ((e & ENTRY_COPIED) && counts[host / cs] != 1)
                    DAMAGE("cluster at %#llx is counted %u times", (unsigned long long)host,
                           counts[host / cs]);
            }
        }
    if (h.has_bitmaps) {
        for (uint64_t i = 0; i < div_round_up(h.bitmap_directory_bytes, cs); i++)
            REF(h.bitmap_directory_offset + i * cs, "bitmap directory");
        for (uint64_t at = h.bitmap_directory_offset, k = 0; k < h.nb_bitmaps; k++) {
            uint64_t table = AT(at), entries = AT(at + 8) >> 32;
            uint64_t name = AT(at + 16) >> 32 & 0xffff;
            for (uint64_t i = 0; i < div_round_up(entries * 8, cs); i++)
                REF(table + i * cs, "bitmap table");
            for (uint64_t i = 0; i < entries; i++)
                if (AT(table + 8 * i) & ENTRY_OFFSET_MASK)
                    REF(AT(table + 8 * i) & ENTRY_OFFSET_MASK, "bitmap data");
            at += align_up(24 + name, 8);
        }
    }
    for (uint64_t i = 0; i < n; i++)
        if (counts[i] < refs[i])
            DAMAGE("cluster %#llx has %u references and a count of %u",
                   (unsigned long long)(i * cs), refs[i], counts[i]);
out:
#undef DAMAGE
#undef REF
#undef AT
    free(refs);
    free(counts);
    qcow2_header_fini(&h);
    return damage;
}
