/* What the tests of persistent bitmaps share: a program's life, killed or ended well, and bytes of
 * the image that are looked at and changed behind its back. */
#pragma once

#include "qcow2util.h"

#include "base/log.h"
#include "block/qcow2/bitmaps.h"
#include "dirty/dirty.h"
#include "persist/persist.h"

/* A program's life: graph, the image on memdisk DISK as node "n", a guest. */
struct world {
    struct graph *g;
    struct node *n;
    struct edge *e; /* NULL: read-only */
    struct test_user user;
};

static inline int world_try(unsigned disk, bool read_only, struct world **ret, struct error *err)
{
    struct world *w = xnew(struct world);
    char text[1024];

    w->g = graph_new();
    graph_add_driver(w->g, &driver_memdisk);
    dirty_init(w->g);
    persist_init(w->g);
    json_text(text,
              "{'driver':'qcow2','node-name':'n','read-only':%s,'file':{'driver':'memdisk',"
              "'disk':%u}}",
              read_only ? "true" : "false", disk);
    int r = try_open(w->g, &w->n, err, text);
    if (r < 0) {
        graph_free(w->g);
        free(w);
        return r;
    }
    if (!read_only)
        w->e = attach(&w->user, w->n, PERM_ALL, PERM_ALL);
    *ret = w;
    return 0;
}

static inline struct world *world_open(unsigned disk, bool read_only)
{
    struct error err = ERROR_INIT;
    struct world *w = NULL;
    int r = world_try(disk, read_only, &w, &err);
    CHECK_OK(r, err);
    return w;
}

static inline void world_close(struct world *w)
{
    if (w->e)
        edge_detach(w->e);
    node_unref(w->n);
    graph_free(w->g);
    free(w);
}

static inline struct dirty_bitmap *add(struct world *w, const char *name, uint64_t granularity,
                                       unsigned flags)
{
    struct error err = ERROR_INIT;
    struct dirty_bitmap *bm = NULL;
    struct graph *g = w->g;
    GRAPH_LOCKED(g);
    graph_quiesce_begin(g, &w->n, 1);
    int r = dirty_begin(&w->n, 1, &err);
    if (r == 0)
        r = dirty_add(w->n, name, granularity, flags, &bm, &err);
    if (r == 0)
        r = dirty_commit(&w->n, 1, &err);
    graph_quiesce_end(g, &w->n, 1);
    CHECK_OK(r, err);
    return bm;
}

static inline void remove_bitmap(struct world *w, const char *name)
{
    struct error err = ERROR_INIT;
    GRAPH_LOCKED(w->g);
    struct dirty_bitmap *bm = dirty_find(w->n, name);
    CHECK(bm);
    int r = dirty_begin(&w->n, 1, &err);
    CHECK_OK(r, err);
    r = dirty_remove(bm, &err);
    CHECK_OK(r, err);
}

static inline int write_at(struct world *w, struct range r, uint8_t byte)
{
    uint8_t *buf = malloc(r.length + 1);
    CHECK(buf);
    memset(buf, byte, r.length);
    int result = edge_write(w->e, r, buf, 0);
    free(buf);
    return result;
}

/* The bytes of a disk at this moment, as a killed process leaves them. */
static inline void copy_disk(unsigned to, unsigned from)
{
    memdisk_reset(to);
    memdisk_reserve(&memdisks[to], memdisks[from].size);
    memcpy(memdisks[to].bytes, memdisks[from].bytes, memdisks[from].size);
    memdisks[to].size = memdisks[from].size;
}

static inline void stored_bitmap(struct graph *g, uint64_t size, const char *more)
{
    graph_add_driver(g, &driver_memdisk);
    memdisk_reset(0);
    create_ok(g, 0, size, more);
    struct world *w = world_open(0, false);
    add(w, "a", 64 * KiB, DIRTY_PERSISTENT);
    add(w, "off", 4096, DIRTY_PERSISTENT | DIRTY_DISABLED);
    CHECK(write_at(w, range_make(0, 4096), 1) == 0);
    CHECK(write_at(w, range_make(size / 2, 100000), 1) == 0);
    world_close(w);
}

static inline struct qcow2_header header_of(unsigned disk)
{
    struct qcow2_header h = {0};
    struct error err = ERROR_INIT;
    int r = qcow2_header_decode(memdisks[disk].bytes, QCOW2_HEADER_BYTES, &h, &err);
    if (r == 0)
        r = qcow2_header_decode_rest(memdisks[disk].bytes, qcow2_header_cluster_size(&h), &h, &err);
    CHECK_OK(r, err);
    return h;
}

static inline void poke(unsigned disk, uint64_t at, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        memdisks[disk].bytes[at + i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
}

static inline uint64_t peek(unsigned disk, uint64_t at, unsigned bytes)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < bytes; i++)
        v = v << 8 | memdisks[disk].bytes[at + i];
    return v;
}

static inline void refused(struct world *w, const char *name, uint64_t granularity,
                           const char *text)
{
    struct error err = ERROR_INIT;
    GRAPH_LOCKED(w->g);
    CHECK(dirty_add(w->n, name, granularity, DIRTY_PERSISTENT | DIRTY_DISABLED, NULL, &err) < 0);
    CHECK_TEXT(err, text);
}
