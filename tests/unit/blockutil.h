/* What the tests of the block layer share: running a test in a loop, opening nodes from JSON text,
 * a user with an edge. */
#pragma once

#include "unit.h"

#include "fakedisk.h"

#include "rt/clock.h"
#include "rt/io.h"

#include <stdlib.h>
#include <unistd.h>

/* cmocka leaves a failed test by longjmp, which must not leave a coroutine: so an assertion that
 * fails inside the loop ends the program, with its text. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #cond);                   \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_TEXT(err, expected)                                                                  \
    do {                                                                                           \
        if (strcmp((err).text, expected)) {                                                        \
            fprintf(stderr, "%s:%d: the error is\n  %s\nnot\n  %s\n", __FILE__, __LINE__,          \
                    (err).text, expected);                                                         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_OK(r, err)                                                                           \
    do {                                                                                           \
        if ((r) < 0) {                                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, (err).text);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* TEST(name) { ... } is a task with a graph `g` that knows the fake drivers. */
#define TEST(name)                                                                                 \
    static void name##_body(struct graph *g);                                                      \
    static int name##_task(void *arg)                                                              \
    {                                                                                              \
        (void)arg;                                                                                 \
        CLEANUP(graph_freep) struct graph *g = graph_new();                                        \
        graph_add_driver(g, &driver_fake);                                                         \
        graph_add_driver(g, &driver_fakefilter);                                                   \
        name##_body(g);                                                                            \
        return 0;                                                                                  \
    }                                                                                              \
    static void name(void **state)                                                                 \
    {                                                                                              \
        (void)state;                                                                               \
        assert_int_equal(loop_run(LOOP_AUTO, name##_task, NULL), 0);                               \
    }                                                                                              \
    static void name##_body(struct graph *g)

/* Opens what the JSON text (single quotes are taken for double ones) says. */
static inline int try_open(struct graph *g, struct node **ret, struct error *err, const char *json)
{
    CLEANUP(memory_freep) char *text = xstrdup(json);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    struct json_tokener *tok = json_tokener_new_ex(512);
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse_ex(tok, text, -1);
    json_tokener_free(tok);
    CHECK(options);
    return graph_open(g, options, ret, err);
}

static inline struct node *open_ok(struct graph *g, const char *json)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    int r = try_open(g, &n, &err, json);

    CHECK_OK(r, err);
    return n;
}

static inline char *test_user_describe(struct user *u)
{
    (void)u;
    return xstrdup("block device 'test'");
}

struct test_user {
    struct user user;
    unsigned moved, resized;
};
static inline void test_user_moved(struct user *u, struct edge *e)
{
    (void)e;
    container_of(u, struct test_user, user)->moved++;
}
static inline void test_user_resized(struct user *u, struct edge *e)
{
    (void)e;
    container_of(u, struct test_user, user)->resized++;
}
static const struct user_ops test_user_ops = {test_user_describe, test_user_moved,
                                              test_user_resized};

static inline struct edge *attach(struct test_user *u, struct node *n, unsigned perm,
                                  unsigned shared)
{
    struct error err = ERROR_INIT;
    struct edge *e = NULL;

    *u = (struct test_user){.user = {&test_user_ops}};
    int r = edge_attach_user(&u->user, n, "root", perm, shared, &e, &err);
    CHECK_OK(r, err);
    return e;
}

struct rng {
    uint64_t s;
};
static inline uint64_t rng_next(struct rng *r)
{
    r->s ^= r->s << 13;
    r->s ^= r->s >> 7;
    r->s ^= r->s << 17;
    return r->s;
}
static inline uint64_t rng_below(struct rng *r, uint64_t n)
{
    return rng_next(r) % n;
}
static inline uint64_t test_seed(void)
{
    const char *s = getenv("TEST_SEED");
    return s ? strtoull(s, NULL, 0) : 0x9E3779B97F4A7C15ull;
}
