/* A tide file on a real file system, seen through a world that writes down what is asked of it and
 * fails what the test wants to fail. TIDE_TEST(name) is a task in that world with a directory of
 * its own, once as it is and once where the file system has no O_DIRECT. */
#pragma once
#include "tideutil.h"

#include "persist/tide.h"
#include "rt/clock.h"
#include "rt/sync.h"
#include "rt/world.h"

#include <fcntl.h>
#include <unistd.h>

/* ---- a world over the real one ---- */

enum { OPS = 4096 };

struct spy {
    uint64_t read_bytes; /* asked for */
    struct world world, *real;
    struct io_op ops[OPS]; /* what was asked for and has an effect; paths are not kept */
    size_t n;
    enum io_kind fail; /* the next one of this kind at or after `fail_from` ... */
    uint64_t fail_from;
    unsigned spared; /* (so many of them are not meant) */
    int error;       /* ... gets this; 0: none */
    bool happened;   /* and yet it happened */
    bool no_direct;
    bool slow; /* others run while it is written */
};

static inline struct spy *spy_of(struct world *w)
{
    return container_of(w, struct spy, world);
}

static inline uint64_t spy_now(struct world *w)
{
    return spy_of(w)->real->now_ns(spy_of(w)->real);
}

static inline uint64_t spy_wall(struct world *w)
{
    return spy_of(w)->real->wall_us(spy_of(w)->real);
}

static inline void spy_random(struct world *w, void *buf, size_t n)
{
    spy_of(w)->real->random(spy_of(w)->real, buf, n);
}

static inline bool spy_turn(struct world *w, uint64_t deadline_ns)
{
    return spy_of(w)->real->turn(spy_of(w)->real, deadline_ns);
}

static inline bool has_effect(enum io_kind kind)
{
    return kind == IO_WRITE || kind == IO_DATASYNC || kind == IO_SYNC || kind == IO_FALLOCATE ||
           kind == IO_TRUNCATE || kind == IO_UNLINK || kind == IO_RENAME || kind == IO_SYNC_DIR;
}

static inline int64_t spy_perform(struct world *w, struct io_op *op)
{
    struct spy *s = spy_of(w);
    if (has_effect(op->kind)) {
        CHECK(s->n < OPS);
        s->ops[s->n++] = *op;
    }
    if (op->kind == IO_READ)
        s->read_bytes += op->length;
    if (s->no_direct && op->kind == IO_OPEN && op->flags & O_DIRECT)
        return -EINVAL;
    if (s->slow && op->kind == IO_WRITE)
        task_yield_uncancelled();
    if (s->error && op->kind == s->fail && op->offset >= s->fail_from && s->spared-- == 0) {
        int error = s->error;
        s->error = 0;
        if (s->happened)
            CHECK(s->real->perform(s->real, op) >= 0);
        else
            task_yield_uncancelled();
        return error;
    }
    return s->real->perform(s->real, op);
}

/* The I-th operation of this kind, or -1. */
static inline int find_op(const struct spy *s, enum io_kind kind, uint64_t from, size_t first)
{
    for (size_t i = first; i < s->n; i++)
        if (s->ops[i].kind == kind && s->ops[i].offset >= from)
            return (int)i;
    return -1;
}

static inline void fail_next(struct spy *s, enum io_kind kind, uint64_t from, int error,
                             bool happened)
{
    s->fail = kind;
    s->fail_from = from;
    s->spared = 0;
    s->error = error;
    s->happened = happened;
}

/* ---- a test: a task in this world, with a directory and a path in it ---- */

struct place {
    struct spy *spy;
    char dir[64], path[80], temporary[84];
    struct rng rng;
};

struct test {
    void (*body)(struct place *);
    struct place *place;
};

static inline int run_body(void *arg)
{
    struct test *t = arg;
    t->body(t->place);
    return 0;
}

static inline int run_in_place(void (*body)(struct place *), bool no_direct)
{
    struct spy *spy = xnew(struct spy);
    struct place p = {.spy = spy, .rng = {test_seed()}};
    const char *tmp = getenv("TIDEMARK_TMP");
    int error = 0;

    snprintf(p.dir, sizeof p.dir, "%.40s/tide-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(p.dir));
    snprintf(p.path, sizeof p.path, "%s/a.tide", p.dir);
    snprintf(p.temporary, sizeof p.temporary, "%s.new", p.path);
    spy->world = (struct world){"spy", spy_now, spy_wall, spy_random, spy_perform, spy_turn};
    spy->no_direct = no_direct;
    spy->real = world_threads_open(&error);
    assert_non_null(spy->real);
    struct test test = {body, &p};
    int r = loop_run_in(&spy->world, run_body, &test);
    world_threads_close(spy->real);
    free(spy);
    unlink(p.path);
    unlink(p.temporary);
    rmdir(p.dir);
    return r;
}

#define TIDE_TEST(name)                                                                            \
    static void name##_body(struct place *p);                                                      \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_in_place(name##_body, false), 0);                                     \
        assert_int_equal(run_in_place(name##_body, true), 0);                                      \
    }                                                                                              \
    static void name##_body(struct place *p)

static uint64_t some_extent;

/* One bitmap of 64 KiB granularity with both areas, on SIZE bytes. */
static inline void small_super(struct place *p, struct super *s, uint64_t size)
{
    *s = (struct super){.uuid = some_id(&p->rng),
                        .session = some_id(&p->rng),
                        .in_use = true,
                        .size_bytes = size,
                        .resizing_bytes = size,
                        .region_bits = 24,
                        .slots = 1024,
                        .ring_sequence = 1000,
                        .next_epoch = 3,
                        .driver = "raw"};
    s->table.items = xcalloc(1, sizeof *s->table.items);
    s->table.n = 1;
    s->table.items[0] = (struct tide_bitmap){.name = xstrdup("b"),
                                             .granularity_bits = 16,
                                             .enabled = true,
                                             .current = {0, 1},
                                             .successor = {1, 2}};
}

static inline struct tide *create(struct place *p, struct super *s)
{
    struct error err = ERROR_INIT;
    struct tide *t = NULL;
    CHECK_OK(tide_create(p->path, s, NULL, NULL, NULL, &t, &err), err);
    if (s->table.n)
        some_extent = s->table.items[0].extent[0];
    return t;
}

static inline struct tide *reopen(struct place *p, struct tide *t)
{
    struct error err = ERROR_INIT;
    tide_close(t);
    CHECK_OK(tide_open(p->path, false, &t, &err), err);
    return t;
}

/* Raises the generation of the first bitmap, by a superblock. */
static inline int raise_generation(struct tide *t, struct error *err)
{
    struct super s;
    super_copy(&s, tide_super(t));
    s.table.items[0].generation++;
    int r = tide_write_super(t, &s, err);
    if (r == 0)
        CHECK(!s.table.items);
    super_fini(&s);
    return r;
}

static inline uint64_t generation(const struct tide *t)
{
    return tide_super(t)->table.items[0].generation;
}

/* Changes bytes behind everybody's back. */
static inline void scribble(struct place *p, uint64_t at, size_t n)
{
    int fd = open(p->path, O_RDWR);
    CHECK(fd >= 0);
    for (size_t i = 0; i < n; i++) {
        uint8_t byte;
        CHECK(pread(fd, &byte, 1, (off_t)(at + i)) == 1);
        byte ^= 0x55;
        CHECK(pwrite(fd, &byte, 1, (off_t)(at + i)) == 1);
    }
    CHECK(fsync(fd) == 0);
    close(fd);
}
