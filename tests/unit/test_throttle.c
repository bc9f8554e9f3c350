/* Limits in virtual time: what passes in so many seconds, who waits, bursts, sharing, and what
 * lifts the limits. */
#include "blockutil.h"
#include "virtual.h"

#include "block/throttle_group.h"

/* As TEST, in virtual time. */
#define TEST_VIRTUAL(name)                                                                         \
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
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
    }                                                                                              \
    static void name##_body(struct graph *g)

static int parse(const char *json, struct throttle_limits *l, struct error *err)
{
    CLEANUP(memory_freep) char *text = xstrdup(json);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    CLEANUP(json_putp) struct json_object *options = json_tokener_parse(text);

    CHECK(options);
    throttle_limits_init(l);
    int r = throttle_limits_parse(l, options, err);
    return r == 0 ? throttle_limits_check(l, err) : r;
}

static void add_group(struct graph *g, const char *name, const char *json)
{
    struct throttle_limits l;
    struct error err = ERROR_INIT;
    int r = parse(json, &l, &err);

    if (r == 0)
        r = throttle_group_add(g, name, &l, &err);
    CHECK_OK(r, err);
}

static struct edge *open_throttled(struct graph *g, struct test_user *u, const char *name,
                                   const char *group)
{
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver': 'throttle', 'node-name': '%s', 'throttle-group': '%s', "
                           "'file': {'driver': 'fake', 'size': 1048576}}",
                           name, group);
    CLEANUP(node_unrefp) struct node *n = open_ok(g, json);

    return attach(u, n, PERM_ALL, PERM_ALL);
}

struct stream {
    struct edge *edge;
    bool write;
    uint64_t bytes;    /* of a request */
    uint64_t until_ns; /* begins none after it */
    uint64_t done;     /* requests */
};

static int run_stream(void *arg)
{
    struct stream *s = arg;
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(s->bytes);

    memset(buf, 1, s->bytes);
    while (clock_now_ns() < s->until_ns) {
        struct range r = range_make(0, s->bytes);
        CHECK((s->write ? edge_write(s->edge, r, buf, 0) : edge_read(s->edge, r, buf, 0)) == 0);
        s->done++;
    }
    return 0;
}

static void run_streams(struct stream *s, size_t n, uint64_t seconds)
{
    SCOPE(all);
    for (size_t i = 0; i < n; i++) {
        s[i].until_ns = clock_after_ns(seconds * NSEC_PER_SEC);
        scope_spawn(&all, run_stream, &s[i]);
    }
    CHECK(scope_join(&all) == 0);
}

static bool about(uint64_t got, uint64_t wanted)
{
    if (got * 100 >= wanted * 95 && got * 100 <= wanted * 105)
        return true;
    fprintf(stderr, "%llu, not about %llu\n", (unsigned long long)got, (unsigned long long)wanted);
    return false;
}

TEST_VIRTUAL(bytes_of_a_minute)
{
    struct test_user u;
    add_group(g, "g", "{'limits': {'bps-total': 1000000}}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct stream s[2] = {{e, true, 4096}, {e, false, 4096}};

    run_streams(s, 2, 60);
    CHECK(about((s[0].done + s[1].done) * 4096, 60 * 1000000));
    CHECK(about(s[0].done, s[1].done));
}

/* New limits hold for those who wait, too; what they have used up stays used up. */
TEST_VIRTUAL(limits_of_a_group_in_use)
{
    struct test_user u;
    struct throttle_limits l;
    struct error err = ERROR_INIT;
    add_group(g, "g", "{'limits': {'bps-write': 1, 'bps-total-max-length': 1}}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct stream s[2] = {{e, true, 4096, clock_after_ns(60 * NSEC_PER_SEC)},
                          {e, true, 4096, clock_after_ns(60 * NSEC_PER_SEC)}};
    SCOPE(all);
    scope_spawn(&all, run_stream, &s[0]);
    scope_spawn(&all, run_stream, &s[1]);
    CHECK(sleep_until(clock_after_ns(30 * NSEC_PER_SEC)) == 0);
    CHECK(s[0].done + s[1].done == 1); /* the next would come in an hour */
    CHECK(parse("{'limits': {'bps-write': 1000000}}", &l, &err) == 0);
    throttle_group_set_limits(throttle_group_find(g, "g"), &l);
    CHECK(scope_join(&all) == 0);
    CHECK(about((s[0].done + s[1].done) * 4096, 30 * 1000000));

    CLEANUP(json_putp)
    struct json_object *shown =
        throttle_limits_show(throttle_group_limits(throttle_group_find(g, "g")));
    CHECK(json_object_object_length(shown) == 19);
    CHECK(json_get_int(shown, "bps-write", 0) == 1000000);
    CHECK(json_get_int(shown, "iops-read-max-length", 0) == 1);
}

TEST_VIRTUAL(reads_and_writes_by_themselves)
{
    struct test_user u;
    add_group(g, "g", "{'x-bps-read': 2000000, 'x-bps-write': 500000}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct stream s[3] = {{e, true, 8192}, {e, false, 8192}, {e, false, 8192}};

    run_streams(s, 3, 60);
    CHECK(about(s[0].done * 8192, 60 * 500000));
    CHECK(about((s[1].done + s[2].done) * 8192, 60 * 2000000));
}

TEST_VIRTUAL(requests_and_their_size)
{
    struct test_user u;
    add_group(g, "g", "{'limits': {'iops-total': 100, 'iops-size': 4096}}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct stream small = {e, true, 512}, large = {e, true, 65536};

    run_streams(&small, 1, 100);
    CHECK(about(small.done, 100 * 100));
    run_streams(&large, 1, 160);
    CHECK(about(large.done, 160 * 100 / 16));
}

/* 10 s at 5 MB/s, then 1 MB/s; after a rest as long as it takes to leak, again. */
TEST_VIRTUAL(bursts_have_a_length)
{
    struct test_user u;
    add_group(g, "g",
              "{'limits': {'bps-write': 1000000, 'bps-write-max': 5000000, "
              "'bps-write-max-length': 10}}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct stream s = {e, true, 65536};

    run_streams(&s, 1, 10);
    CHECK(about(s.done * 65536, 50 * 1000000));
    s.done = 0;
    run_streams(&s, 1, 100); /* 50 MB of burst are left less what leaked meanwhile, then 1 MB/s */
    CHECK(about(s.done * 65536, 110 * 1000000));
    s.done = 0;
    CHECK(sleep_until(clock_after_ns(100 * NSEC_PER_SEC)) == 0);
    run_streams(&s, 1, 10);
    CHECK(about(s.done * 65536, 50 * 1000000));
}

/* Ten streams on one disk do not push aside the one on the other. */
TEST_VIRTUAL(members_take_turns)
{
    struct test_user u, v;
    add_group(g, "g", "{'limits': {'iops-total': 200}}");
    CLEANUP(edge_detachp) struct edge *a = open_throttled(g, &u, "a", "g");
    CLEANUP(edge_detachp) struct edge *b = open_throttled(g, &v, "b", "g");
    struct stream s[11];
    uint64_t of_a = 0;

    for (size_t i = 0; i < 10; i++)
        s[i] = (struct stream){a, true, 512};
    s[10] = (struct stream){b, true, 512};
    run_streams(s, 11, 60);
    for (size_t i = 0; i < 10; i++) {
        of_a += s[i].done;
        CHECK(s[i].done > 60 * 200 / 2 / 10 * 8 / 10);
    }
    CHECK(about(of_a + s[10].done, 60 * 200));
    CHECK(about(s[10].done, 60 * 200 / 2));
}

static int one_write(void *arg)
{
    uint8_t buf[512] = {1};

    return edge_write(arg, range_make(0, sizeof buf), buf, 0);
}

/* One request a second fills it: the next ones wait long, unless the node is quiesced. */
TEST_VIRTUAL(a_quiesced_node_has_no_limits)
{
    struct test_user u;
    add_group(g, "g", "{'limits': {'bps-total': 1}}");
    CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
    struct node *n = e->node;
    SCOPE(writers);

    for (int i = 0; i < 4; i++)
        scope_spawn(&writers, one_write, e);
    CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC)) == 0);
    CHECK(!scope_empty(&writers));
    uint64_t before = clock_now_ns();
    graph_quiesce_begin(g, &n, 1);
    CHECK(clock_now_ns() == before);
    CHECK(scope_join(&writers) == 0);
    graph_quiesce_end(g, &n, 1);
    /* and all four were counted */
    CHECK(one_write(e) == 0);
    CHECK(about(clock_now_ns() - before, 4 * 512 * NSEC_PER_SEC));
}

TEST_VIRTUAL(at_the_end_nobody_waits)
{
    struct test_user u, v;
    add_group(g, "g", "{'limits': {'iops-write': 1}}");
    CLEANUP(edge_detachp) struct edge *a = open_throttled(g, &u, "a", "g");
    CLEANUP(edge_detachp) struct edge *b = open_throttled(g, &v, "b", "g");
    SCOPE(writers);

    for (int i = 0; i < 20; i++)
        scope_spawn(&writers, one_write, i % 2 ? a : b);
    CHECK(sleep_until(clock_after_ns(NSEC_PER_SEC)) == 0);
    throttle_groups_lift(g);
    CHECK(scope_join(&writers) == 0);
    CHECK(clock_now_ns() <= 2 * NSEC_PER_SEC);
}

TEST_VIRTUAL(a_group_in_use_stays)
{
    struct test_user u;
    struct error err = ERROR_INIT;
    struct throttle_limits l;

    add_group(g, "g", "{}");
    add_group(g, "h", "{'limits': {'bps-total': 1000}}");
    throttle_limits_init(&l);
    CHECK(throttle_group_add(g, "g", &l, &err) == -EEXIST);
    CHECK_TEXT(err, "A group with this name already exists");
    {
        CLEANUP(edge_detachp) struct edge *e = open_throttled(g, &u, "t", "g");
        struct stream s = {e, true, 512};
        CHECK(throttle_group_remove(g, "g") == -EBUSY);
        s.until_ns = clock_now_ns() + 1;
        for (int i = 0; i < 1000; i++)
            CHECK(one_write(e) == 0);
        CHECK(clock_now_ns() < s.until_ns); /* no limits: no time */

        CLEANUP(json_putp)
        struct json_object *list = json_tokener_parse(
            "[{\"driver\": \"throttle\", \"node-name\": \"t\", \"throttle-group\": \"h\"}]");
        struct json_object *one = json_object_array_get_idx(list, 0);
        struct edge *file = TAILQ_FIRST(&e->node->children);
        json_add_string(one, "file", node_name(file->node));
        error_clear(&err);
        int r = graph_reopen(g, list, &err);
        CHECK_OK(r, err);
        CHECK(throttle_group_remove(g, "g") == 0);
        CHECK(throttle_group_remove(g, "h") == -EBUSY);
        s.until_ns = clock_now_ns();
        for (int i = 0; i < 20; i++)
            CHECK(one_write(e) == 0);
        CHECK(clock_now_ns() - s.until_ns > 9 * NSEC_PER_SEC);
    }
    CHECK(throttle_group_remove(g, "h") == 0);
    CHECK(!throttle_group_find(g, "h"));
}

TEST_VIRTUAL(limits_that_make_no_sense)
{
    static const char *const cases[][2] = {
        {"{'limits': {'bps-total': -1}}",
         "bps/iops/max values must be within [0, 1000000000000000]"},
        {"{'limits': {'bps-total': 1, 'bps-read': 1}}",
         "bps/iops/max total values and read/write values cannot be used at the same time"},
        {"{'limits': {'iops-total-max': 1, 'iops-read-max': 1}}",
         "bps/iops/max total values and read/write values cannot be used at the same time"},
        {"{'limits': {'bps-total': 10, 'bps-total-max': 5}}",
         "bps_max/iops_max cannot be lower than bps/iops"},
        {"{'x-bps-total-max': 5}", "bps_max/iops_max require corresponding bps/iops values"},
        {"{'limits': {'bps-total-max-length': 5}}", "burst length set without burst rate"},
        {"{'limits': {'bps-total-max-length': 0}}", "the burst length cannot be 0"},
        {"{'limits': {'iops-size': 5}}", "iops size requires an iops value to be set"},
        {"{'x-iops-size': -5}", "Property values cannot be negative"},
        {"{'limits': {'bps-read-max-length': 4294967296}}",
         "bps-read-max-length value must be in the range [0, 4294967295]"},
        {"{'x-bps-read-max-length': 4294967296}",
         "x-bps-read-max-length value must be in therange [0, 4294967295]"},
        {"{'limits': {'bps-total': 1, 'bps-total-max': 100000000000000, 'bps-total-max-length': "
         "11}}",
         "burst length too high for this burst rate"},
    };

    (void)g;
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct throttle_limits l;
        struct error err = ERROR_INIT;
        CHECK(parse(cases[i][0], &l, &err) == -EINVAL);
        CHECK_TEXT(err, cases[i][1]);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(bytes_of_a_minute),        cmocka_unit_test(reads_and_writes_by_themselves),
    cmocka_unit_test(requests_and_their_size),  cmocka_unit_test(bursts_have_a_length),
    cmocka_unit_test(members_take_turns),       cmocka_unit_test(a_quiesced_node_has_no_limits),
    cmocka_unit_test(at_the_end_nobody_waits),  cmocka_unit_test(a_group_in_use_stays),
    cmocka_unit_test(limits_of_a_group_in_use), cmocka_unit_test(limits_that_make_no_sense),
};
UNIT_MAIN(tests)
