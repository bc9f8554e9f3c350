/* Backups of and to real qcow2 files: chains of increments, sync=top, fleecing in its three forms.
 * qemu-img is asked whether the files are well. */
#include "jobutil.h"

#include <sys/wait.h>

enum { SIZE = 3 * 1024 * 1024 + 512 * 3 };

static char dir[64];

static void make_dir(void)
{
    strcpy(dir, "/tmp/tidemark-unit-XXXXXX");
    CHECK(mkdtemp(dir));
}

static int shell(const char *fmt, ...) PRINTF(1, 2);
static int shell(const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    int status = system(text);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void remove_dir(void)
{
    if (shell("command -v qemu-img >/dev/null") == 0)
        CHECK(shell("for f in %s/*.qcow2; do qemu-img check -q -U $f || exit 1; done", dir) == 0);
    CHECK(shell("rm -r %s", dir) == 0);
}

static void make_qcow2(struct graph *g, const char *name, unsigned cluster, const char *backing)
{
    struct error err = ERROR_INIT;
    char more[200] = "";
    CLEANUP(json_putp)
    struct json_object *file =
        parse("{'driver':'file','filename':'%s/%s.qcow2','size':0}", dir, name);
    int r = graph_create(g, file, &err);
    CHECK_OK(r, err);
    if (backing)
        snprintf(more, sizeof more, ",'backing-file':'%s/%s.qcow2','backing-fmt':'qcow2'", dir,
                 backing);
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'qcow2','size':%d,'cluster-size':%u,'file':{'driver':'file',"
              "'filename':'%s/%s.qcow2'}%s}",
              SIZE, cluster, dir, name, more);
    r = graph_create(g, o, &err);
    CHECK_OK(r, err);
}

static struct node *open_qcow2(struct graph *g, const char *name, const char *backing_node)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    char more[100] = "";
    if (backing_node)
        snprintf(more, sizeof more, ",'backing':'%s'", backing_node);
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'qcow2','node-name':'%s','file':{'driver':'file','filename':"
              "'%s/%s.qcow2'},'discard':'unmap'%s}",
              name, dir, name, more);
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    return n;
}

static uint8_t *content(struct node *n)
{
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    uint8_t *buf = xcalloc(1, SIZE);
    CHECK(edge_read(e, range_make(0, SIZE), buf, 0) == 0);
    edge_detach(e);
    return buf;
}

static uint64_t allocated(struct node *n)
{
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ, PERM_ALL);
    uint64_t sum = 0, length;
    for (uint64_t at = 0; at < SIZE; at += length) {
        int r = edge_allocated_above(e, n, true, range_make(at, SIZE - at), &length);
        CHECK(r >= 0);
        if (r)
            sum += length;
    }
    edge_detach(e);
    return sum;
}

JOB_TEST(a_chain_of_increments_is_the_disk_at_each_instant)
{
    make_dir();
    struct guest gu;
    make_qcow2(g, "s", 65536, NULL);
    struct node *s = open_qcow2(g, "s", NULL);
    guest_on(&gu, s, 5);
    gu.writes = 30;
    guest_task(&gu);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    uint8_t *then[6];
    SCOPE(tasks);
    gu.writes = UINT32_MAX;
    scope_spawn(&tasks, guest_task, &gu);
    for (int i = 0; i < 6; i++) {
        char name[8], last[8];
        snprintf(name, sizeof name, "t%d", i);
        snprintf(last, sizeof last, "t%d", i - 1);
        if (i) /* target clusters of many sizes */
            make_qcow2(g, name, 4096u << (i * 3 % 10), i ? last : NULL);
        graph_quiesce_begin(g, &s, 1);
        then[i] = content(s);
        command_ok(g, "drive-backup",
                   parse("{'device':'s','target':'%s/%s.qcow2','mode':'%s','format':'qcow2',"
                         "'sync':'%s','bitmap':'b','bitmap-mode':'on-success','job-id':'j'}",
                         dir, name, i ? "existing" : "absolute-paths", i ? "incremental" : "full"));
        graph_quiesce_end(g, &s, 1);
        wait_for("j", "null");
        CHECK(strstr(events, "j:COMPLETED j:"));
        events[0] = '\0';
        if (i % 2)
            turns(30);
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    for (int i = 0; i < 6; i++) {
        char name[8];
        snprintf(name, sizeof name, "t%d", i);
        struct node *t = open_qcow2(g, name, NULL);
        uint8_t *now = content(t);
        CHECK(memcmp(then[i], now, SIZE) == 0);
        free(now);
        free(then[i]);
        node_unref(t);
    }
    CHECK(gu.failed == 0);
    edge_detach(gu.edge);
    node_unref(s);
    remove_dir();
}

static void put(struct node *n, uint64_t start, uint64_t length, uint8_t value)
{
    struct test_user u;
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    uint8_t *buf = xcalloc(1, length);
    memset(buf, value, length);
    CHECK(edge_write(e, range_make(start, length), buf, 0) == 0);
    free(buf);
    edge_detach(e);
}

JOB_TEST(sync_top_takes_what_the_top_layer_has)
{
    make_dir();
    make_qcow2(g, "base", 65536, NULL);
    struct node *base = open_qcow2(g, "base", NULL);
    put(base, 0, MiB, 0x11);
    node_unref(base);
    make_qcow2(g, "s", 65536, "base");
    struct node *s = open_qcow2(g, "s", NULL);
    put(s, 65536, 65536, 0x22);
    put(s, 2 * MiB + 5, 1, 0x33);
    put(s, SIZE - 1, 1, 0x44);
    uint8_t *then = content(s);
    command_ok(g, "drive-backup", parse("{'device':'s','target':'%s/t.qcow2','sync':'top'}", dir));
    wait_for("s", "null");
    CHECK(strstr(events, "s:COMPLETED s:"));
    struct node *t = open_qcow2(g, "t", NULL);
    CHECK(node_backing(t) != NULL);
    CHECK(allocated(t) == 2 * 65536 + SIZE % 65536);
    uint8_t *now = content(t);
    CHECK(memcmp(then, now, SIZE) == 0);
    free(then);
    free(now);
    node_unref(s);
    node_unref(t);
    remove_dir();
}

/* An image that nobody has written is a hole, and stays one. */
JOB_TEST(holes_are_not_copied_as_data)
{
    make_dir();
    make_qcow2(g, "s", 65536, NULL);
    struct node *s = open_qcow2(g, "s", NULL);
    put(s, MiB, 65536, 0x11);
    put(s, 2 * MiB, 65536, 0); /* zeroes that nobody announced as such */
    command_ok(g, "drive-backup", parse("{'device':'s','target':'%s/t.qcow2','sync':'full'}", dir));
    wait_for("s", "null");
    CHECK(shell("test $(stat -c %%b %s/t.qcow2) -lt $(( (65536 * 8) / 512 ))", dir) == 0);
    struct node *t = open_qcow2(g, "t", NULL);
    uint8_t *now = content(t), *then = content(s);
    CHECK(memcmp(then, now, SIZE) == 0);
    free(then);
    free(now);
    node_unref(s);
    node_unref(t);
    remove_dir();
}

/* ---- fleecing: somebody else reads the old state ---- */

struct fleece {
    struct edge *edge;
    uint8_t *then;
    struct rng rng;
    unsigned reads;
    bool stop;
};

static int fleece_task(void *arg)
{
    struct fleece *fl = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, 200000);
    while (!fl->stop) {
        uint64_t start = rng_below(&fl->rng, SIZE);
        uint64_t length = 1 + rng_below(&fl->rng, min_u64(SIZE - start, 200000));
        CHECK(edge_read(fl->edge, range_make(start, length), buf, 0) == 0);
        CHECK(memcmp(buf, fl->then + start, length) == 0);
        fl->reads++;
        CHECK(task_yield() == 0);
    }
    free(buf);
    return 0;
}

static void read_under_writes(struct node *old, struct node *disk, struct guest *gu, uint8_t *then)
{
    struct test_user u;
    struct fleece fl = {attach(&u, old, PERM_CONSISTENT_READ, PERM_ALL), then, {77}};
    SCOPE(tasks);
    gu->writes = 100;
    gu->done = 0;
    scope_spawn(&tasks, guest_task, gu);
    scope_spawn(&tasks, fleece_task, &fl);
    while (gu->done < 100)
        turns(1);
    fl.stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(gu->failed == 0 && fl.reads > 3);
    edge_detach(fl.edge);
    uint8_t *now = content(disk);
    CHECK(memcmp(now, then, SIZE) != 0);
    free(now);
}

JOB_TEST(fleecing_by_sync_none_onto_an_overlay)
{
    make_dir();
    struct guest gu;
    make_qcow2(g, "s", 65536, NULL);
    make_qcow2(g, "t", 65536, NULL);
    struct node *s = open_qcow2(g, "s", NULL);
    guest_on(&gu, s, 3);
    gu.writes = 40;
    guest_task(&gu);
    struct node *t = open_qcow2(g, "t", "s");
    uint8_t *then = content(s);
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','sync':'none','job-id':'j'}"));
    read_under_writes(t, s, &gu, then);
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    CHECK(gu.edge->node == s);
    edge_detach(gu.edge);
    free(then);
    node_unref(t);
    node_unref(s);
    remove_dir();
}

struct asking {
    struct edge *edge;
    struct block_status status;
    bool done;
};

static int ask_status(void *arg)
{
    struct asking *a = arg;
    SHIELD();
    CHECK(edge_status_above(a->edge, NULL, true, range_make(0, 65536), &a->status) == 0);
    a->done = true;
    return 0;
}

static int write_zeroes_once(void *arg)
{
    struct guest *gu = arg;
    SHIELD();
    CHECK(edge_write_zeroes(gu->edge, range_make(0, 65536), 0) == 0);
    gu->done++;
    return 0;
}

/* The overlay has nothing yet; while the disk below is asked, the guest's zeroes come. They must
 * not be taken for what was there. */
JOB_TEST(block_status_of_a_fleecing_image_is_that_of_the_instant)
{
    make_dir();
    struct guest gu;
    struct test_user u;
    struct event hold;
    event_init(&hold);
    make_qcow2(g, "t", 65536, NULL);
    struct node *s = disk(g, "s", SIZE, 0), *t = open_qcow2(g, "t", "s");
    memset(mem_of(s)->bytes, 0x11, SIZE);
    guest_on(&gu, s, 3);
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','sync':'none','job-id':'j'}"));
    struct asking a = {attach(&u, t, PERM_CONSISTENT_READ, PERM_ALL)};
    SCOPE(tasks);
    mem_of(s)->hold_status = &hold;
    scope_spawn(&tasks, ask_status, &a);
    for (int i = 0; !mem_of(s)->holding; i++) {
        CHECK(i < 60000);
        CHECK(sleep_until(clock_after_ns(1000000)) == 0); /* the overlay is a real file */
    }
    scope_spawn(&tasks, write_zeroes_once, &gu);
    CHECK(sleep_until(clock_after_ns(50000000)) == 0);
    event_set(&hold);
    CHECK(scope_join(&tasks) == 0);
    CHECK(a.done && gu.done == 1 && mem_of(s)->bytes[0] == 0);
    CHECK(!(a.status.flags & STATUS_ZERO));
    mem_of(s)->hold_status = NULL;
    edge_detach(a.edge);
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    edge_detach(gu.edge);
    node_unref(t);
    node_unref(s);
    remove_dir();
}

JOB_TEST(drive_backup_with_sync_none_makes_the_overlay)
{
    make_dir();
    struct guest gu;
    make_qcow2(g, "s", 65536, NULL);
    struct node *s = open_qcow2(g, "s", NULL);
    guest_on(&gu, s, 3);
    gu.writes = 40;
    guest_task(&gu);
    uint8_t *then = content(s);
    command_ok(g, "drive-backup",
               parse("{'device':'s','target':'%s/t.qcow2','sync':'none','job-id':'j'}", dir));
    struct node *t = NULL;
    for (struct node *n = graph_first(g); n; n = graph_next(n)) {
        if (n->backing && n->backing->node == s)
            t = n;
    }
    CHECK(t);
    read_under_writes(t, s, &gu, then);
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    edge_detach(gu.edge);
    free(then);
    node_unref(s);
    remove_dir();
}

/* As qmpbackup does: the filter and snapshot-access by blockdev-add, then a backup of the latter.
 */
JOB_TEST(a_backup_of_snapshot_access_through_a_fleecing_image)
{
    make_dir();
    struct guest gu;
    make_qcow2(g, "s", 65536, NULL);
    make_qcow2(g, "fleece", 65536, NULL);
    make_qcow2(g, "t", 65536, NULL);
    struct node *s = open_qcow2(g, "s", NULL), *fleece = open_qcow2(g, "fleece", NULL);
    struct node *t = open_qcow2(g, "t", NULL);
    struct error err = ERROR_INIT;
    struct node *f = NULL, *a = NULL;
    CLEANUP(json_putp)
    struct json_object *of = parse("{'driver':'copy-before-write','node-name':'f','file':'s',"
                                   "'target':'fleece','on-cbw-error':'break-snapshot'}");
    CLEANUP(json_putp)
    struct json_object *oa = parse("{'driver':'snapshot-access','node-name':'a','file':'f'}");
    int r = graph_open(g, of, &f, &err);
    CHECK_OK(r, err);
    guest_on(&gu, f, 3);
    gu.writes = 5;
    r = graph_open(g, oa, &a, &err);
    CHECK_OK(r, err);
    uint8_t *then = content(s);
    command_ok(g, "blockdev-backup",
               parse("{'device':'a','target':'t','sync':'full','job-id':'j'}"));
    SCOPE(tasks);
    gu.writes = 60;
    scope_spawn(&tasks, guest_task, &gu);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(scope_join(&tasks) == 0);
    uint8_t *now = content(t);
    CHECK(memcmp(then, now, SIZE) == 0);
    free(now);
    free(then);
    edge_detach(gu.edge);
    node_unref(a);
    node_unref(f);
    node_unref(t);
    node_unref(fleece);
    node_unref(s);
    remove_dir();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_chain_of_increments_is_the_disk_at_each_instant),
    cmocka_unit_test(sync_top_takes_what_the_top_layer_has),
    cmocka_unit_test(holes_are_not_copied_as_data),
    cmocka_unit_test(fleecing_by_sync_none_onto_an_overlay),
    cmocka_unit_test(block_status_of_a_fleecing_image_is_that_of_the_instant),
    cmocka_unit_test(drive_backup_with_sync_none_makes_the_overlay),
    cmocka_unit_test(a_backup_of_snapshot_access_through_a_fleecing_image),
};

UNIT_MAIN(tests)
