/* What the tests of copying and of jobs share: a disk in memory that can be slow and that can
 * fail, guests that write at random, a stage with a graph and a registry, events as text. */
#pragma once

#include "blockutil.h"

#include "block/driver.h"
#include "copy/copy.h"
#include "dirty/dirty.h"
#include "job/driver.h"
#include "job/transaction.h"
#include "rt/task.h"

#include <stdio.h>

/* ---- the disk ---- */

struct mem {
    uint8_t *bytes;
    uint64_t cluster;
    unsigned yields; /* a request takes up to so many turns of the loop */
    struct rng rng;
    struct range bad_read, bad_write; /* requests that touch them fail ... */
    int read_errno, write_errno;
    int bad_times; /* ... so many times; -1: always */
    int flush_errno;
    unsigned flushes;
    uint64_t read_bytes;
    struct event *hold;                     /* writes wait for it */
    struct event *hold_read;                /* reads wait for it, once begun */
    struct range held;                      /* ... those that touch this */
    struct event *hold_flush, *hold_status; /* these wait for it */
    unsigned holding;                       /* now */
    unsigned *written;                      /* times each 64 KiB was written */
    bool check_once;                        /* and it must be once at most */
    bool *hollow; /* which 64 KiB are not allocated, until they are written; NULL: none */
};

static inline struct mem *mem_of(struct node *n)
{
    return n->state;
}

static inline int mem_open(struct node *n, struct json_object *options, struct error *err)
{
    struct mem *m = n->state;
    n->size_bytes = json_get_uint(options, "size", 0);
    n->limits.request_alignment = 512;
    m->cluster = json_get_uint(options, "cluster", 0);
    m->bytes = xcalloc(1, n->size_bytes);
    m->written = xcalloc(n->size_bytes / 65536 + 1, sizeof *m->written);
    m->bad_times = -1;
    m->rng.s = test_seed();
    return 0;
}

static inline void mem_close(struct node *n)
{
    free(mem_of(n)->bytes);
    free(mem_of(n)->written);
    free(mem_of(n)->hollow);
}

static inline void mem_be_slow(struct mem *m)
{
    for (uint64_t i = m->yields ? rng_below(&m->rng, m->yields + 1) : 0; i; i--) {
        SHIELD();
        CHECK(task_yield() == 0);
    }
}

static inline void mem_wait_for(struct mem *m, struct event *hold)
{
    SHIELD();
    if (!hold)
        return;
    m->holding++;
    CHECK(event_wait(hold) == 0);
    m->holding--;
}

static inline bool mem_bad(struct mem *m, struct range bad, struct range r)
{
    if (!range_overlaps(bad, r) || m->bad_times == 0)
        return false;
    if (m->bad_times > 0)
        m->bad_times--;
    return true;
}

static inline int mem_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct mem *m = n->state;
    mem_be_slow(m);
    if (mem_bad(m, m->bad_read, r))
        return -m->read_errno;
    if (m->hold_read && range_overlaps(m->held, r)) {
        SHIELD();
        CHECK(event_wait(m->hold_read) == 0);
    }
    memcpy(buf, m->bytes + r.start, r.length);
    m->read_bytes += r.length;
    mem_be_slow(m);
    return 0;
}

/* BUF NULL: zeroes. */
static inline int mem_change(struct node *n, struct range r, const void *buf)
{
    struct mem *m = n->state;
    mem_be_slow(m);
    if (m->hold && range_overlaps(m->held, r)) {
        SHIELD();
        m->holding++;
        CHECK(event_wait(m->hold) == 0);
        m->holding--;
    }
    if (mem_bad(m, m->bad_write, r))
        return -m->write_errno;
    if (buf)
        memcpy(m->bytes + r.start, buf, r.length);
    else
        memset(m->bytes + r.start, 0, r.length);
    for (uint64_t c = r.start / 65536; c * 65536 < range_end(r); c++) {
        m->written[c]++;
        if (m->hollow)
            m->hollow[c] = false;
        CHECK(!m->check_once || m->written[c] == 1);
    }
    mem_be_slow(m);
    return 0;
}

static inline int mem_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    return mem_change(n, r, buf);
}

static inline int mem_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    return mem_change(n, r, NULL);
}

static inline int mem_discard(struct node *n, struct range r)
{
    return mem_change(n, r, NULL);
}

static inline int mem_flush(struct node *n)
{
    mem_be_slow(mem_of(n));
    mem_wait_for(mem_of(n), mem_of(n)->hold_flush);
    mem_of(n)->flushes++;
    return -mem_of(n)->flush_errno;
}

static inline bool all_zero(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (p[i])
            return false;
    }
    return true;
}

static inline unsigned mem_kind(struct node *n, uint64_t at)
{
    struct mem *m = n->state;
    if (m->hollow && m->hollow[at / 65536])
        return 0;
    return (all_zero(m->bytes + at, min_u64(512, n->size_bytes - at)) ? STATUS_ZERO : STATUS_DATA) |
           STATUS_ALLOCATED;
}

static inline int mem_status(struct node *n, bool want_zero, struct range r,
                             struct block_status *ret)
{
    struct mem *m = n->state;
    mem_be_slow(m);
    mem_wait_for(m, m->hold_status);
    ret->flags = mem_kind(n, r.start);
    uint64_t length = 512;
    while (length < r.length && r.start + length < n->size_bytes &&
           mem_kind(n, r.start + length) == ret->flags)
        length += 512;
    ret->length = min_u64(length, r.length);
    return 0;
}

static inline uint64_t mem_cluster(const struct node *n)
{
    return ((struct mem *)n->state)->cluster;
}

static const struct driver mem_driver = {
    .name = "mem",
    .protocol = "mem",
    .state_size = sizeof(struct mem),
    .supports_backing = true,
    .open = mem_open,
    .close = mem_close,
    .read = mem_read,
    .write = mem_write,
    .write_zeroes = mem_write_zeroes,
    .discard = mem_discard,
    .flush = mem_flush,
    .status = mem_status,
    .cluster_size = mem_cluster,
};

/* ---- the stage ---- */

static struct jobs *js;
static char events[16384];

static inline void on_event(void *opaque, const char *name, struct json_object *data)
{
    char line[256];
    const char *id = json_get_string(data, "id", json_get_string(data, "device", "?"));
    const char *what = strcmp(name, "JOB_STATUS_CHANGE") == 0 ? json_get_string(data, "status", "?")
                                                              : name + strlen("BLOCK_JOB_");
    if (json_has(data, "error"))
        snprintf(line, sizeof line, "%s:%s(%s) ", id, what, json_get_string(data, "error", ""));
    else if (json_has(data, "action"))
        snprintf(line, sizeof line, "%s:%s(%s %s) ", id, what,
                 json_get_string(data, "operation", ""), json_get_string(data, "action", ""));
    else
        snprintf(line, sizeof line, "%s:%s ", id, what);
    if (strlen(events) + strlen(line) < sizeof events)
        strcat(events, line);
}

/* Lets the others run until NAME's events end with WHAT ("null"). */
static inline void wait_for(const char *id, const char *what)
{
    char text[128];
    snprintf(text, sizeof text, "%s:%s", id, what);
    for (unsigned i = 0; !strstr(events, text); i++) {
        CHECK(i < 20000);
        CHECK(sleep_until(clock_after_ns(i < 200 ? 0 : 5000000)) == 0);
    }
}

static inline void turns(unsigned n)
{
    while (n--)
        CHECK(task_yield() == 0);
}

/* JOB_TASK(name) { ... }: a task with a graph `g`, the registry `js` and no events so far. */
#define JOB_TASK(name)                                                                             \
    static void name##_body(struct graph *g);                                                      \
    static int name##_task(void *arg)                                                              \
    {                                                                                              \
        CLEANUP(graph_freep) struct graph *g = graph_new();                                        \
        dirty_init(g);                                                                             \
        copy_register_drivers(g);                                                                  \
        graph_add_driver(g, &mem_driver);                                                          \
        js = jobs_new(g);                                                                          \
        jobs_set_listener(js, on_event, NULL);                                                     \
        events[0] = '\0';                                                                          \
        name##_body(g);                                                                            \
        jobs_cancel_all(js);                                                                       \
        jobs_free(js);                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    static void name##_body(struct graph *g)

/* The same as a test. */
#define JOB_TEST(name)                                                                             \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(loop_run(LOOP_AUTO, name##_task, NULL), 0);                               \
    }                                                                                              \
    JOB_TASK(name)

static inline struct json_object *parse(const char *fmt, ...) PRINTF(1, 2);
static inline struct json_object *parse(const char *fmt, ...)
{
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *p = text; *p; p++) {
        if (*p == '\'')
            *p = '"';
    }
    struct json_object *o = json_tokener_parse(text);
    CHECK(o);
    return o;
}

static inline struct node *disk(struct graph *g, const char *name, uint64_t size, uint64_t cluster)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'mem','node-name':'%s','size':%llu,'cluster':%llu,'discard':'unmap'}",
              name, (unsigned long long)size, (unsigned long long)cluster);
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    return n;
}

/* Runs one command by its arguments in JSON. */
static inline int command(struct graph *g, struct error *err, const char *type,
                          struct json_object *data)
{
    int r = transaction_run_one(g, js, type, data, err);
    json_object_put(data);
    return r;
}

static inline void command_ok(struct graph *g, const char *type, struct json_object *data)
{
    struct error err = ERROR_INIT;
    int r = command(g, &err, type, data);
    CHECK_OK(r, err);
}

static inline void verb_ok(const char *id, enum job_verb v)
{
    struct error err = ERROR_INIT;
    int r = jobs_do(js, id, v, &err);
    CHECK_OK(r, err);
}

/* ---- guests ---- */

struct guest {
    struct test_user user;
    struct edge *edge;
    struct rng rng;
    unsigned writes; /* to do; UINT_MAX: until stop */
    unsigned done, failed;
    bool stop;
};

static inline void fill_random(struct rng *rng, uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)rng_next(rng);
}

static inline int guest_task(void *arg)
{
    struct guest *gu = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, 300000);
    while (gu->writes-- && !gu->stop) {
        uint64_t size = node_size(gu->edge->node);
        uint64_t start = align_down(rng_below(&gu->rng, size), 512);
        uint64_t most = min_u64(size - start, 300000);
        uint64_t length = align_up(rng_below(&gu->rng, most >> rng_below(&gu->rng, 9)) + 1, 512);
        length = min_u64(length, align_down(most, 512));
        int r;
        switch (rng_below(&gu->rng, 8)) {
        case 0:
            r = edge_write_zeroes(gu->edge, range_make(start, length), 0);
            break;
        case 1:
            r = edge_discard(gu->edge, range_make(start, length));
            break;
        default:
            fill_random(&gu->rng, buf, length);
            r = edge_write(gu->edge, range_make(start, length), buf, 0);
        }
        gu->done++;
        gu->failed += r < 0;
        CHECK(task_yield() == 0);
    }
    free(buf);
    return 0;
}

static inline void guest_on(struct guest *gu, struct node *n, uint64_t seed)
{
    *gu = (struct guest){.rng = {seed * 2654435761u + 1}, .writes = UINT32_MAX};
    gu->edge = attach(&gu->user, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
}

static inline void fill_disk(struct node *n, uint64_t seed)
{
    struct rng rng = {seed + 99};
    struct mem *m = mem_of(n);
    fill_random(&rng, m->bytes, n->size_bytes);
    /* holes of several lengths */
    for (int i = 0; i < 6; i++) {
        uint64_t at = rng_below(&rng, n->size_bytes), len = rng_below(&rng, n->size_bytes / 4);
        memset(m->bytes + at, 0, min_u64(len, n->size_bytes - at));
    }
}
