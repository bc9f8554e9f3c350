/* blkdebug: which request a rule meets, once or always, in which state; configuration files; forced
 * limits; the events that a qcow2 image raises on its file. */
#include "blockutil.h"

#include "rt/task.h"

#include <stdio.h>
#include <sys/stat.h>

static struct edge *open_debug(struct graph *g, struct test_user *u, const char *more)
{
    CLEANUP(memory_freep)
    char *json = xasprintf("{'driver': 'blkdebug', 'node-name': 'b', 'discard': 'unmap', 'image': "
                           "{'driver': 'fake', 'node-name': 'f', 'size': 1048576, 'discard': "
                           "'unmap'}%s}",
                           more);
    struct node *n = open_ok(g, json);
    struct edge *e = attach(u, n, PERM_ALL & ~(unsigned)PERM_RESIZE, PERM_ALL);

    node_unref(n);
    return e;
}

static int read_at(struct edge *e, uint64_t at)
{
    uint8_t buf[512];

    return edge_read(e, range_make(at, sizeof buf), buf, 0);
}

static int write_at(struct edge *e, uint64_t at, uint64_t length)
{
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(length);

    memset(buf, 0x5a, length);
    return edge_write(e, range_make(at, length), buf, 0);
}

static struct fake_state *below(struct graph *g)
{
    return fake_of(graph_find(g, "f"));
}

TEST(a_rule_without_conditions_meets_every_request_but_status)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e = open_debug(g, &u, ", 'inject-error': [{'event': 'none', 'errno': 28}]");
    struct block_status st;

    CHECK(read_at(e, 0) == -ENOSPC);
    CHECK(write_at(e, 0, 512) == -ENOSPC);
    CHECK(edge_write_zeroes(e, range_make(0, 4096), 0) == -ENOSPC);
    CHECK(edge_discard(e, range_make(0, 4096)) == -ENOSPC);
    CHECK(edge_flush(e) == -ENOSPC);
    CHECK(edge_status_above(e, NULL, true, range_make(0, 4096), &st) == 0);
    CHECK(below(g)->writes == 0 && below(g)->reads == 0);
}

TEST(once_is_once)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e = open_debug(
        g, &u,
        ", 'inject-error': [{'event': 'none', 'once': true, 'iotype': 'write'}, "
        "{'event': 'none', 'once': true, 'iotype': 'write', 'errno': 28, 'immediately': true}]");

    CHECK(read_at(e, 0) == 0);
    CHECK(write_at(e, 0, 512) == -EIO);
    CHECK(write_at(e, 0, 512) == -ENOSPC);
    CHECK(write_at(e, 0, 512) == 0);
    CHECK(below(g)->writes == 1);
}

static int note_turn(void *arg)
{
    *(bool *)arg = true;
    return 0;
}

/* A failure comes as from a disk, when others have had their turn; `immediately` at once. */
TEST(immediately_is_before_anybody_elses_turn)
{
    static const struct {
        const char *rule;
        bool at_once;
    } cases[] = {{"", false}, {", 'immediately': false", false}, {", 'immediately': true", true}};
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        for (int kind = 0; kind < 3; kind++) {
            struct test_user u;
            bool others = false;
            SCOPE(tasks);
            CLEANUP(memory_freep)
            char *rules =
                xasprintf(", 'inject-error': [{'event': 'none', 'once': true%s}]", cases[i].rule);
            struct edge *e = open_debug(g, &u, rules);
            scope_spawn(&tasks, note_turn, &others);
            int r = kind == 0   ? read_at(e, 0)
                    : kind == 1 ? write_at(e, 0, 512)
                                : edge_write_zeroes(e, range_make(0, 4096), 0);
            CHECK(r == -EIO && others == !cases[i].at_once);
            CHECK(scope_join(&tasks) == 0 && others);
            edge_detach(e);
        }
    }
}

TEST(a_sector_is_met_by_requests_that_touch_it)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e = open_debug(g, &u, ", 'inject-error': [{'event': 'none', 'sector': 8}]");

    CHECK(read_at(e, 4096 - 512) == 0);
    CHECK(read_at(e, 4096) == -EIO);
    CHECK(read_at(e, 4096 - 1) == -EIO);
    CHECK(read_at(e, 4096 + 512) == 0);
    CHECK(write_at(e, 0, 8192) == -EIO);
    CHECK(edge_flush(e) == 0); /* it has no place */
}

/* pwritev is raised by each write itself: state 1 -> 2 -> 3. */
TEST(states_lead_from_rule_to_rule)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e =
        open_debug(g, &u,
                   ", 'set-state': [{'event': 'pwritev', 'state': 1, 'new_state': 2}, "
                   "{'event': 'pwritev', 'state': 2, 'new_state': 3}], "
                   "'inject-error': [{'event': 'pwritev', 'state': 2, 'errno': 28, 'once': true}]");

    CHECK(write_at(e, 0, 512) == 0);
    CHECK(write_at(e, 0, 512) == -ENOSPC);
    CHECK(write_at(e, 0, 512) == 0);
    CHECK(write_at(e, 0, 512) == 0);
}

/* A newer event's rules take the place of the older one's, an event without rules does not. */
TEST(the_last_event_with_rules_decides)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e = open_debug(g, &u,
                                ", 'inject-error': [{'event': 'none', 'iotype': 'read'}, "
                                "{'event': 'pwritev', 'iotype': 'read', 'errno': 28}]");

    CHECK(read_at(e, 0) == -EIO);
    CHECK(edge_flush(e) == 0);
    CHECK(read_at(e, 0) == -EIO);
    CHECK(write_at(e, 0, 512) == 0);
    CHECK(read_at(e, 0) == -ENOSPC);
}

TEST(error_zero_spares_a_request)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e =
        open_debug(g, &u,
                   ", 'inject-error': [{'event': 'none', 'errno': 0, 'sector': 0, 'once': true}, "
                   "{'event': 'none', 'errno': 5}]");

    CHECK(read_at(e, 0) == 0);
    CHECK(read_at(e, 0) == 0); /* and is not used up by it */
    CHECK(read_at(e, 512) == -EIO);
}

TEST(a_delayed_request_waits_and_then_works)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e =
        open_debug(g, &u,
                   ", 'x-tidemark-delay': [{'event': 'none', 'iotype': 'write', 'once': true, "
                   "'delay-ns': 30000000}]");
    uint64_t before = clock_now_ns();

    CHECK(write_at(e, 0, 512) == 0);
    CHECK(clock_now_ns() - before >= 30000000);
    CHECK(below(g)->writes == 1);
}

/* What the fake disk asserts of its requests, seen through forced limits: all data arrives. */
TEST(forced_limits_cut_requests)
{
    struct test_user u;
    CLEANUP(edge_detachp)
    struct edge *e = open_debug(g, &u,
                                ", 'align': 4096, 'max-transfer': 8192, 'opt-write-zero': 12288, "
                                "'max-write-zero': 24576, 'opt-discard': 12288");
    uint8_t *bytes = below(g)->bytes;

    CHECK(node_request_alignment(e->node) == 4096);
    CHECK(write_at(e, 1000, 50000) == 0);
    for (unsigned i = 0; i < 60000; i++)
        CHECK(bytes[i] == (i >= 1000 && i < 51000 ? 0x5a : 0));
    CHECK(below(g)->writes == 7); /* 0..53248, 8 KiB each */
    CHECK(edge_write_zeroes(e, range_make(2000, 40000), 0) == 0);
    for (unsigned i = 0; i < 60000; i++)
        CHECK(bytes[i] == ((i >= 1000 && i < 2000) || (i >= 42000 && i < 51000) ? 0x5a : 0));
    CHECK(below(g)->zeroes == 1); /* 12288..36864; what is smaller is written out */
    unsigned writes = below(g)->writes;
    CHECK(edge_write_zeroes(e, range_make(0, 49152), 0) == 0);
    CHECK(below(g)->zeroes == 3 && below(g)->writes == writes); /* two of 24576 */
    CHECK(edge_discard(e, range_make(0, 50000)) == 0);
}

TEST(impossible_limits_are_refused)
{
    static const char *const cases[][2] = {
        {"'align': 3", "Cannot meet constraints with align 3"},
        {"'align': 2147483647", "Cannot meet constraints with align 2147483647"},
        {"'align': 4096, 'max-transfer': 512", "Cannot meet constraints with max-transfer 512"},
        {"'align': 512, 'opt-write-zero': 100", "Cannot meet constraints with opt-write-zero 100"},
        {"'opt-write-zero': 4096, 'max-write-zero': 2048",
         "Cannot meet constraints with max-write-zero 2048"},
        {"'align': 512, 'opt-discard': 100", "Cannot meet constraints with opt-discard 100"},
        {"'opt-discard': 3, 'max-discard': 4", "Cannot meet constraints with max-discard 4"},
        {"'align': -1", "Parameter 'align' expects a non-negative number below 2^64"},
        {"'inject-error': []", "Block protocol 'blkdebug' doesn't support the option "
                               "'inject-error'"},
        {"'config': '/nosuch/file'", "Could not read blkdebug config file: No such file or "
                                     "directory"},
        {"'inject-error': [{'event': 'nosuch'}]", "invalid parameter value: nosuch"},
        {"'inject-error': [{}]", "Missing event name for rule"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        CLEANUP(memory_freep)
        char *json =
            xasprintf("{'driver': 'blkdebug', 'image': {'driver': 'fake'}, %s}", cases[i][0]);
        struct error err = ERROR_INIT;
        struct node *n = NULL;
        CHECK(try_open(g, &n, &err, json) < 0);
        CHECK_TEXT(err, cases[i][1]);
    }
}

TEST(permissions_are_taken_and_kept_from_others)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver': 'fake', 'node-name': 'f'}");
    CLEANUP(node_unrefp)
    struct node *b = open_ok(g, "{'driver': 'blkdebug', 'node-name': 'b', 'image': 'f', "
                                "'take-child-perms': ['write'], "
                                "'unshare-child-perms': ['write', 'resize']}");

    CHECK(b && f);
    CHECK(try_open(g, &n, &err,
                   "{'driver': 'blkdebug', 'node-name': 'c', 'image': 'f', "
                   "'take-child-perms': ['write']}") == -EPERM);
    CHECK(strstr(err.text, "permissions 'write' are both required by node 'c'"));
}

static const char *write_config(const char *text)
{
    static char path[64];

    snprintf(path, sizeof path, "/tmp/tidemark-blkdebug-%ld", (long)getpid());
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
    return path;
}

TEST(a_configuration_file_is_as_good_as_options)
{
    static const char *const bad[][2] = {
        {"event = \"none\"\n", "no group defined"},
        {"[nosuch]\nevent = \"none\"\n", "There is no option group 'nosuch'"},
        {"[inject-error]\nerrno = \"5\"\n", "Missing event name for rule"},
        {"[inject-error]\nevent=\"none\"\n", "Invalid parameter 'event=\"none\"'"},
        {"[inject-error]\nevent = \"none\"\nerrno = \"x\"\n", "Parameter 'errno' expects a number"},
        {"[inject-error]\nevent = \"none\"\nonce = \"1\"\n",
         "Parameter 'once' expects 'on' or 'off'"},
        {"[set-state]\nevent = \"none\"\nerrno = \"1\"\n", "Invalid parameter 'errno'"},
        {"[inject-error]\n \n", "parse error"},
    };
    struct test_user u;
    const char *path = write_config("# a comment\n\n[inject-error]\nevent = \"none\"\n"
                                    "iotype = \"read\"\nerrno = \"28\"\nonce = \"on\"\n"
                                    "[inject-error]\nevent = \"none\"\nsector = \"1\"\n");
    CLEANUP(memory_freep) char *more = xasprintf(", 'config': '%s'", path);
    {
        CLEANUP(edge_detachp) struct edge *e = open_debug(g, &u, more);
        CLEANUP(memory_freep) char *name = xasprintf("json:{");
        CHECK(!strncmp(node_filename(e->node), name, strlen(name)));
        CHECK(read_at(e, 0) == -ENOSPC);
        CHECK(read_at(e, 0) == 0);
        CHECK(write_at(e, 512, 512) == -EIO);
        CHECK(write_at(e, 512, 512) == -EIO);
    }
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        CLEANUP(memory_freep)
        char *json = xasprintf("{'driver': 'blkdebug', 'image': {'driver': 'fake'}, 'config': "
                               "'%s'}",
                               write_config(bad[i][0]));
        struct error err = ERROR_INIT;
        struct node *n = NULL;
        CHECK(try_open(g, &n, &err, json) < 0);
        CHECK_TEXT(err, bad[i][1]);
    }
    unlink(path);
}

TEST(a_file_name_may_have_it_all)
{
    struct test_user u;
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    char disk[] = "/tmp/tidemark-blkdebug-disk-XXXXXX";
    int fd = mkstemp(disk);
    const char *path =
        write_config("[inject-error]\nevent = \"none\"\niotype = \"read\"\nerrno = \"28\"\n");
    CLEANUP(memory_freep) char *name = xasprintf("blkdebug:%s:%s", path, disk);

    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
    int r = graph_open_filename(g, name, "raw", NULL, false, &n, &err);
    CHECK_OK(r, err);
    {
        CLEANUP(edge_detachp) struct edge *e = attach(&u, n, PERM_ALL, PERM_ALL);
        CHECK(!strcmp(node_filename(n), name));
        node_unref(n);
        CHECK(write_at(e, 0, 512) == 0);
        CHECK(read_at(e, 0) == -ENOSPC);
    }
    CHECK(graph_open_filename(g, "blkdebug:x", "raw", NULL, false, &n, &err) == -EINVAL);
    CHECK_TEXT(err, "blkdebug requires both config file and image path");
    unlink(disk);
    unlink(path);
    close(fd);
}

/* ---- events of a qcow2 image, on the disk that it stands on ---- */

static unsigned seen[DEBUG_EVENTS_COUNT];

static void note_event(struct node *n, enum debug_event event)
{
    (void)n;
    seen[event]++;
}

static bool took(enum debug_event event)
{
    bool was = seen[event];

    seen[event] = 0;
    return was;
}

TEST(a_qcow2_image_names_what_it_does)
{
    struct driver listener = driver_fake;
    struct test_user u;
    struct error err = ERROR_INIT;
    CLEANUP(json_putp) struct json_object *create = json_object_new_object();
    uint8_t buf[4096] = {1};

    listener.name = "listener";
    listener.debug_event = note_event;
    graph_add_driver(g, &listener);
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver': 'listener', 'node-name': 'f', 'size': 8388608}");
    json_add_string(create, "driver", "qcow2");
    json_add_string(create, "file", "f");
    json_add_uint(create, "size", 64 * MiB);
    int r = graph_create(g, create, &err);
    CHECK_OK(r, err);
    CLEANUP(node_unrefp)
    struct node *n = open_ok(g, "{'driver': 'qcow2', 'node-name': 'n', 'file': 'f'}");
    CLEANUP(edge_detachp) struct edge *e = attach(&u, n, PERM_ALL, PERM_ALL);

    memset(seen, 0, sizeof seen);
    CHECK(edge_write(e, range_make(0, sizeof buf), buf, 0) == 0);
    CHECK(took(DEBUG_cluster_alloc) && took(DEBUG_write_aio) && took(DEBUG_pwritev));
    CHECK(took(DEBUG_cow_read) && !took(DEBUG_l2_update));
    CHECK(edge_flush(e) == 0);
    CHECK(took(DEBUG_l2_update) && took(DEBUG_l1_update) && took(DEBUG_refblock_update_part));
    CHECK(took(DEBUG_flush_to_os) && took(DEBUG_flush_to_disk));
    CHECK(edge_read(e, range_make(0, sizeof buf), buf, 0) == 0);
    CHECK(took(DEBUG_read_aio) && !took(DEBUG_cluster_alloc));
    CHECK(edge_write(e, range_make(512, 512), buf, 0) == 0);
    CHECK(took(DEBUG_write_aio) && !took(DEBUG_cluster_alloc) && !took(DEBUG_cow_read));
    CHECK(edge_truncate(e, (uint64_t)1 << 40, true, &err) == 0);
    CHECK(took(DEBUG_l1_grow_alloc_table) && took(DEBUG_l1_grow_write_table) &&
          took(DEBUG_l1_grow_activate_table));
    CHECK(took(DEBUG_cluster_alloc_bytes) && took(DEBUG_cluster_free));
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_rule_without_conditions_meets_every_request_but_status),
    cmocka_unit_test(once_is_once),
    cmocka_unit_test(immediately_is_before_anybody_elses_turn),
    cmocka_unit_test(a_sector_is_met_by_requests_that_touch_it),
    cmocka_unit_test(states_lead_from_rule_to_rule),
    cmocka_unit_test(the_last_event_with_rules_decides),
    cmocka_unit_test(error_zero_spares_a_request),
    cmocka_unit_test(a_delayed_request_waits_and_then_works),
    cmocka_unit_test(forced_limits_cut_requests),
    cmocka_unit_test(impossible_limits_are_refused),
    cmocka_unit_test(permissions_are_taken_and_kept_from_others),
    cmocka_unit_test(a_configuration_file_is_as_good_as_options),
    cmocka_unit_test(a_file_name_may_have_it_all),
    cmocka_unit_test(a_qcow2_image_names_what_it_does),
};
UNIT_MAIN(tests)
