/* What the tests of the mirror job share: two disks, the command, and some of what is asked of it.
 */
#pragma once

#include "jobutil.h"

#include "job/mirror.h"

enum { SIZE = 4 * 1024 * 1024, CHUNKS = SIZE / 65536 };

static struct node *s, *t;

static inline void two_disks(struct graph *g, uint64_t size, uint64_t cluster)
{
    s = disk(g, "s", size, 0);
    t = disk(g, "t", size, cluster);
}

static inline void close_disks(void)
{
    node_unref(steal(s));
    node_unref(steal(t));
    events[0] = '\0';
}

static inline int mirror(struct error *err, struct json_object *args)
{
    int r = mirror_blockdev(js, args, err);
    json_object_put(args);
    return r;
}

static inline void mirror_ok(struct json_object *args)
{
    struct error err = ERROR_INIT;
    int r = mirror(&err, args);
    CHECK_OK(r, err);
}

static inline void mirror_fails(const char *text, struct json_object *args)
{
    struct error err = ERROR_INIT;
    CHECK(mirror(&err, args) < 0);
    if (strcmp(err.text, text) != 0)
        fail_msg("'%s' instead of '%s'", err.text, text);
}

static inline void cancel_softly(const char *id)
{
    struct error err = ERROR_INIT;
    int r = jobs_do_block(js, id, JOB_VERB_CANCEL, false, &err);
    CHECK_OK(r, err);
}

static inline bool same(uint64_t size)
{
    return memcmp(mem_of(s)->bytes, mem_of(t)->bytes, size) == 0;
}

static inline void write_at(struct edge *e, uint64_t start, uint64_t length, uint8_t value)
{
    uint8_t *buf = xcalloc(1, length);
    memset(buf, value, length);
    CHECK(edge_write(e, range_make(start, length), buf, 0) == 0);
    free(buf);
}

static inline struct dirty_bitmap *bitmap_on_s(struct graph *g, unsigned granularity)
{
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'%s','name':'b','granularity':%u}", node_name(s), granularity));
    return dirty_find(s, "b");
}

static inline struct node *open_node(struct graph *g, struct json_object *options)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    int r = graph_open(g, options, &n, &err);
    CHECK_OK(r, err);
    json_object_put(options);
    return n;
}

/* A filter of the user's: what is below it is replaced, its users stay on it. */
static inline struct node *user_filter(struct graph *g)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'mirror_top','node-name':'over','source':'s','discard':'unmap'}");
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    return n;
}
