/* Nobody writes past a node whose bitmaps record: not by another edge of the graph, not by another
 * program, whatever comes in between, and whoever was there first. */
#include "jobutil.h"

#include "persist/persist.h"
#include "persist/tide.h"

#include <fcntl.h>

#define ADD "block-dirty-bitmap-add"
#define BITMAP "{'node':'r','name':'b'}"
#define MISSES "Bitmap 'b' of node 'r' would miss what others write: "

static struct node *below, *raw;
static struct test_user u;
static struct edge *edge; /* U's, or NULL */

static void open_both(struct graph *g)
{
    graph_add_driver(g, &driver_fake);
    graph_add_driver(g, &driver_fakefilter);
    below = open_ok(g, "{'driver':'fake','node-name':'d'}");
    raw = open_ok(g, "{'driver':'raw','node-name':'r','file':'d'}");
    edge = NULL;
}

static void close_both(void)
{
    edge_detach(steal(edge));
    node_unref(raw);
    node_unref(below);
}

static bool try_attach(struct node *n, unsigned perm, struct error *err)
{
    u = (struct test_user){.user = {&test_user_ops}};
    return edge_attach_user(&u.user, n, "root", perm, PERM_ALL, &edge, err) == 0;
}

/* May others write N? */
static bool is_open(struct node *n)
{
    struct test_user v = {.user = {&test_user_ops}};
    struct edge *e = NULL;

    if (edge_attach_user(&v.user, n, "root", PERM_WRITE, PERM_ALL, &e, NULL) < 0)
        return false;
    edge_detach(e);
    return true;
}

static void refused(struct graph *g, const char *type, const char *data, const char *text)
{
    struct error err = ERROR_INIT;

    CHECK(command(g, &err, type, parse("%s", data)) < 0);
    CHECK_TEXT(err, text);
}

#define CONFLICT                                                                                   \
    "Permission conflict on node 'd': permissions 'write' are both required by block device "      \
    "'test' (uses node 'd' as 'root' child) and unshared by node 'r' (uses node 'd' as 'file' "    \
    "child)."

JOB_TEST(a_bitmap_and_another_writer_refuse_each_other)
{
    struct error err = ERROR_INIT;
    open_both(g);

    CHECK(try_attach(below, PERM_WRITE, &err));
    refused(g, ADD, BITMAP, MISSES CONFLICT);
    CHECK(!dirty_first(raw) && raw->file->shared == PERM_ALL && !node_watched(raw));
    command_ok(g, ADD, parse("{'node':'r','name':'b','disabled':true}"));
    refused(g, "block-dirty-bitmap-enable", BITMAP, MISSES CONFLICT);
    CHECK(!dirty_enabled(dirty_find(raw, "b")) && dirty_first(raw) == dirty_find(raw, "b"));
    edge_detach(steal(edge));

    command_ok(g, "block-dirty-bitmap-enable", parse(BITMAP));
    CHECK(!try_attach(below, PERM_WRITE, &err));
    CHECK_TEXT(err, CONFLICT);
    CHECK(!try_attach(below, PERM_RESIZE, NULL));
    CHECK(try_attach(below, PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED, NULL));
    edge_detach(steal(edge));
    CHECK(is_open(raw)); /* through the node anybody may */

    command_ok(g, "block-dirty-bitmap-disable", parse(BITMAP));
    CHECK(is_open(below));
    command_ok(g, "block-dirty-bitmap-enable", parse(BITMAP));
    command_ok(g, ADD, parse("{'node':'r','name':'c'}"));
    command_ok(g, "block-dirty-bitmap-remove", parse(BITMAP));
    CHECK(!is_open(below));
    command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'r','name':'c'}"));
    CHECK(is_open(below));
    close_both();
}

JOB_TEST(what_comes_in_between_is_no_way_round)
{
    open_both(g);
    command_ok(g, ADD, parse(BITMAP));
    CLEANUP(node_unrefp)
    struct node *f = open_ok(g, "{'driver':'fakefilter','node-name':'f','file':'d'}");
    CHECK(!is_open(f));
    CHECK(node_insert_filter(f, below, NULL) == 0); /* between the two */
    CHECK(raw->file->node == f && !is_open(f) && !is_open(below));
    CHECK(node_remove_filter(f, NULL) == 0);
    CHECK(raw->file->node == below && !is_open(f) && !is_open(below));
    /* Above the node all is as ever. */
    CLEANUP(node_unrefp)
    struct node *top = open_ok(g, "{'driver':'fakefilter','node-name':'top','file':'r'}");
    CHECK(is_open(top) && is_open(raw));
    command_ok(g, ADD, parse("{'node':'top','name':'t'}"));
    CHECK(is_open(top) && !is_open(raw) && !is_open(below));
    command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'top','name':'t'}"));
    close_both();
}

JOB_TEST(a_transaction_that_fails_has_changed_nothing)
{
    static const char *const lists[] = {
        "[{'type':'block-dirty-bitmap-disable','data':" BITMAP "},"
        "{'type':'abort','data':{}}]",
        "[{'type':'block-dirty-bitmap-remove','data':" BITMAP "},"
        "{'type':'abort','data':{}}]",
        "[{'type':'block-dirty-bitmap-remove','data':" BITMAP "},"
        "{'type':'block-dirty-bitmap-add','data':" BITMAP "},"
        "{'type':'abort','data':{}}]",
    };
    open_both(g);
    command_ok(g, ADD, parse(BITMAP));
    for (unsigned i = 0; i < ARRAY_SIZE(lists); i++) {
        struct error err = ERROR_INIT;
        CLEANUP(json_putp) struct json_object *list = parse("%s", lists[i]);
        CHECK(transaction_run(g, js, list, NULL, &err) < 0);
        CHECK_TEXT(err, "Transaction aborted using Abort action");
        CHECK(!is_open(below) && dirty_enabled(dirty_find(raw, "b")));
    }
    command_ok(g, "block-dirty-bitmap-disable", parse(BITMAP));
    CLEANUP(json_putp)
    struct json_object *enable = parse("[{'type':'block-dirty-bitmap-enable','data':" BITMAP "},"
                                       "{'type':'abort','data':{}}]");
    CHECK(transaction_run(g, js, enable, NULL, NULL) < 0);
    CHECK(is_open(below));
    close_both();
}

JOB_TEST(while_it_is_read_only_others_may_write)
{
    struct error err = ERROR_INIT;
    graph_add_driver(g, &driver_fake);
    below = open_ok(g, "{'driver':'fake','node-name':'d'}");
    raw = open_ok(g, "{'driver':'raw','node-name':'r','read-only':true,'file':'d'}");
    command_ok(g, ADD, parse(BITMAP));
    CHECK(try_attach(below, PERM_WRITE, NULL));
    CLEANUP(json_putp)
    struct json_object *options =
        parse("[{'driver':'raw','node-name':'r','read-only':false,'file':'d'}]");
    CHECK(graph_reopen(g, options, &err) < 0);
    CHECK_TEXT(err, CONFLICT);
    edge_detach(steal(edge));
    CHECK(graph_reopen(g, options, NULL) == 0);
    CHECK(!is_open(below));
    close_both();
}

/* As if all had been written, though the node itself stays what it is. */
JOB_TEST(what_it_stands_on_becomes_another_file)
{
    struct error err = ERROR_INIT;

    open_both(g);
    struct node *other = open_ok(g, "{'driver':'fake','node-name':'other'}");
    struct node *top = open_ok(g, "{'driver':'raw','node-name':'top','file':'r'}");
    command_ok(g, ADD, parse("{'node':'top','name':'t'}"));
    CLEANUP(json_putp)
    struct json_object *options = parse("[{'driver':'raw','node-name':'r','file':'other'}]");
    int r = graph_reopen(g, options, &err);
    CHECK_OK(r, err);
    CHECK(bitmap_count(dirty_bits(dirty_find(top, "t"))) == node_size(top));
    node_unref(top);
    node_unref(other);
    close_both();
}

JOB_TEST(a_job_that_makes_an_inconsistent_one_anew)
{
    struct error err = ERROR_INIT;
    open_both(g);
    command_ok(g, ADD, parse(BITMAP));
    struct dirty_bitmap *bm = dirty_find(raw, "b");
    dirty_set_inconsistent(bm);
    command_ok(g, ADD, parse("{'node':'r','name':'c','disabled':true}"));
    CHECK(is_open(below));
    GRAPH_LOCKED(g);
    CHECK(try_attach(below, PERM_WRITE, NULL));
    CHECK(dirty_start_rebuild(bm, 0, &err) == -EPERM);
    CHECK_TEXT(err, MISSES CONFLICT);
    CHECK(!dirty_busy(bm) && dirty_next(dirty_first(raw)) == bm && !dirty_next(bm));
    edge_detach(steal(edge));
    CHECK(dirty_start_rebuild(bm, 0, NULL) == 0);
    CHECK(!is_open(below));
    CHECK(dirty_conclude(&(struct dirty_outcome){.bitmap = bm, .job = "j"}, 1, NULL) == 0);
    CHECK(dirty_inconsistent(bm) && is_open(below));
    CHECK(dirty_start_rebuild(bm, 0, NULL) == 0);
    CHECK(dirty_conclude(&(struct dirty_outcome){.bitmap = bm, .job = "j", .rebuilt = true}, 1,
                         NULL) == 0);
    CHECK(!dirty_inconsistent(bm) && !is_open(below));
    close_both();
}

JOB_TEST(a_compare_whose_transaction_fails)
{
    open_both(g);
    command_ok(g, ADD, parse(BITMAP));
    dirty_set_inconsistent(dirty_find(raw, "b"));
    struct node *t = disk(g, "t", node_size(raw), 0);
    static const char *const ends[] = {",{'type':'abort','data':{}}", ""};
    for (unsigned i = 0; i < ARRAY_SIZE(ends); i++) {
        CLEANUP(json_putp)
        struct json_object *list =
            parse("[{'type':'x-tidemark-compare','data':{'device':'r','target':'t','job-id':'j',"
                  "'bitmap':'b'}}%s]",
                  ends[i]);
        CHECK((transaction_run(g, js, list, NULL, NULL) < 0) == (i == 0));
        if (i) {
            CHECK(!is_open(below));
            CHECK(jobs_do(js, "j", JOB_VERB_CANCEL, NULL) == 0);
        }
        wait_for("j", "null");
        CHECK(dirty_inconsistent(dirty_find(raw, "b")) && is_open(below));
        events[0] = '\0';
    }
    node_unref(t);
    close_both();
}

/* ---- files ---- */

static char path[64] = "/tmp/watched-XXXXXX";

static struct node *open_file(struct graph *g, const char *more, struct error *err)
{
    struct node *n = NULL;
    char json[256];

    snprintf(json, sizeof json, "{'driver':'file','filename':'%s'%s}", path, more);
    int r = try_open(g, &n, err, json);
    CHECK((r == 0) == (n != NULL));
    return n;
}

JOB_TEST(a_bitmap_of_a_file_keeps_other_programs_away)
{
    struct error err = ERROR_INIT;
    close(mkstemp(path));
    CHECK(truncate(path, 1 << 20) == 0);
    CLEANUP(node_unrefp) struct node *a = open_file(g, ",'node-name':'a'", &err);
    CLEANUP(node_unrefp) struct node *b = open_file(g, ",'node-name':'b'", &err);

    CHECK(is_open(b));
    command_ok(g, ADD, parse("{'node':'a','name':'x'}"));
    CHECK(is_open(a));
    CHECK(!try_attach(b, PERM_WRITE, &err));
    CHECK_TEXT(err, "Failed to get \"write\" lock");
    command_ok(g, "block-dirty-bitmap-disable", parse("{'node':'a','name':'x'}"));
    CHECK(try_attach(b, PERM_WRITE, &err));
    error_clear(&err);
    CHECK(command(g, &err, "block-dirty-bitmap-enable", parse("{'node':'a','name':'x'}")) < 0);
    CHECK_TEXT(err, "Bitmap 'x' of node 'a' would miss what others write: Failed to get shared "
                    "\"write\" lock");
    edge_detach(steal(edge));
    unlink(path);
}

static int stored(void *arg)
{
    bool first = arg;
    struct graph *g = graph_new();
    struct error err = ERROR_INIT;
    char json[256];

    dirty_init(g);
    persist_init(g);
    struct jobs *jobs = jobs_new(g);
    snprintf(json, sizeof json, "{'driver':'file','node-name':'d','filename':'%s'}", path);
    below = open_ok(g, json);
    if (!first)
        CHECK(try_attach(below, PERM_WRITE, NULL));
    raw = NULL;
    int r = try_open(g, &raw, &err, "{'driver':'raw','node-name':'r','file':'d'}");
    if (first) {
        CHECK_OK(r, err);
        CLEANUP(json_putp)
        struct json_object *list =
            parse("[{'type':'block-dirty-bitmap-add','data':{'node':'r','name':'b',"
                  "'persistent':true}}]");
        CHECK(transaction_run(g, jobs, list, NULL, NULL) == 0);
    } else {
        /* What it would load is not true any more at the next moment. */
        CHECK(r == -EPERM && !graph_find(g, "r"));
        CHECK_TEXT(err, CONFLICT);
        edge_detach(steal(edge));
        CHECK(try_open(g, &raw, &err, "{'driver':'raw','node-name':'r','file':'d'}") == 0);
        CHECK(dirty_find(raw, "b") && !dirty_inconsistent(dirty_find(raw, "b")));
        CHECK(!is_open(below));
    }
    node_unref(raw);
    node_unref(below);
    jobs_free(jobs);
    graph_free(g);
    return 0;
}

static void a_stored_bitmap_is_not_loaded_beside_a_writer(void **state)
{
    int fd = mkstemp(strcpy(path, "/tmp/watched-XXXXXX"));
    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
    close(fd);
    assert_int_equal(loop_run(LOOP_AUTO, stored, path), 0);
    assert_int_equal(loop_run(LOOP_AUTO, stored, NULL), 0);
    unlink(path);
    strcat(path, ".tide");
    unlink(path);
}

/* ---- the image of a raw node, written through a file node alone ---- */

static bool stored_is_inconsistent(void)
{
    char name[80];
    struct tide *t;

    snprintf(name, sizeof name, "%s.tide", path);
    CHECK(tide_open(name, true, &t, NULL) == 0);
    CHECK(tide_super(t)->table.n == 1 && !strcmp(tide_super(t)->driver, "raw"));
    bool is = tide_super(t)->table.items[0].inconsistent;
    tide_close(t);
    return is;
}

static void write_block(struct edge *e)
{
    char buf[4096] = {1};
    CHECK(edge_write(e, range_make(0, sizeof buf), buf, 0) == 0);
}

static int past_it(void *arg)
{
    struct graph *g = graph_new();
    char json[256];
    struct test_user v;

    dirty_init(g);
    persist_init(g);
    struct jobs *jobs = jobs_new(g);
    snprintf(json, sizeof json, "{'driver':'file','node-name':'d','filename':'%s'}", path);
    below = open_ok(g, json);
    raw = open_ok(g, "{'driver':'raw','node-name':'r','file':'d'}");
    CLEANUP(json_putp)
    struct json_object *add = parse("[{'type':'block-dirty-bitmap-add','data':{'node':'r',"
                                    "'name':'b','persistent':true}}]");
    CLEANUP(json_putp)
    struct json_object *disable =
        parse("[{'type':'block-dirty-bitmap-disable','data':" BITMAP "}]");
    CHECK(transaction_run(g, jobs, add, NULL, NULL) == 0);
    struct edge *e = attach(&v, raw, PERM_ALL, PERM_ALL);
    write_block(e); /* through both */
    CHECK(!stored_is_inconsistent());
    CHECK(transaction_run(g, jobs, disable, NULL, NULL) == 0);
    CHECK(try_attach(below, PERM_WRITE, NULL));
    write_block(edge); /* past a bitmap that does not record */
    CHECK(!stored_is_inconsistent());
    edge_detach(e);
    node_unref(raw);
    CHECK(!stored_is_inconsistent());
    write_block(edge); /* and it is not open any more */
    CHECK(stored_is_inconsistent());
    edge_detach(steal(edge));
    raw = open_ok(g, "{'driver':'raw','node-name':'r','file':'d'}");
    CHECK(dirty_inconsistent(dirty_find(raw, "b")));
    node_unref(raw);
    node_unref(below);
    jobs_free(jobs);
    graph_free(g);
    return 0;
}

static void bitmaps_that_are_written_past_are_inconsistent(void **state)
{
    int fd = mkstemp(strcpy(path, "/tmp/watched-XXXXXX"));
    CHECK(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
    close(fd);
    assert_int_equal(loop_run(LOOP_AUTO, past_it, NULL), 0);
    unlink(path);
    strcat(path, ".tide");
    unlink(path);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_bitmap_and_another_writer_refuse_each_other),
    cmocka_unit_test(what_comes_in_between_is_no_way_round),
    cmocka_unit_test(a_transaction_that_fails_has_changed_nothing),
    cmocka_unit_test(while_it_is_read_only_others_may_write),
    cmocka_unit_test(what_it_stands_on_becomes_another_file),
    cmocka_unit_test(a_job_that_makes_an_inconsistent_one_anew),
    cmocka_unit_test(a_compare_whose_transaction_fails),
    cmocka_unit_test(a_bitmap_of_a_file_keeps_other_programs_away),
    cmocka_unit_test(a_stored_bitmap_is_not_loaded_beside_a_writer),
    cmocka_unit_test(bitmaps_that_are_written_past_are_inconsistent),
};
UNIT_MAIN(tests)
