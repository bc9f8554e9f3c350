/* Snapshots: overlays that come above a disk in use, alone and in transactions that fail; what is
 * refused; which files stay. What guests were answered is kept in a model. */
#include "jobutil.h"

#include "job/mirror.h"

#include <sys/stat.h>

enum { SIZE = 4 * 1024 * 1024, CLUSTER = 65536 };

/* ---- a disk that can become read-only: raw over a disk in memory ---- */

static char dir[64];
static struct node *base_file; /* where the first disk's bytes are */

static void make_dir(void)
{
    snprintf(dir, sizeof dir, "%s/tidemark-unit-XXXXXX", unit_tmp());
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

static bool there(const char *name)
{
    CLEANUP(memory_freep) char *path = xasprintf("%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

/* Each image by itself: what stands behind the first one only we can open. */
static void remove_dir(void)
{
    if (shell("command -v qemu-img >/dev/null") == 0)
        CHECK(shell("cd %s; for f in *.qcow2; do test ! -e $f || qemu-img check -q -U \"json:{"
                    "\\\"driver\\\":\\\"qcow2\\\",\\\"backing\\\":null,\\\"file\\\":{"
                    "\\\"driver\\\":\\\"file\\\",\\\"filename\\\":\\\"$f\\\"}}\" || exit 1; done",
                    dir) == 0);
    CHECK(shell("rm -r %s", dir) == 0);
}

static struct node *open_json(struct graph *g, struct json_object *options)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    int r = graph_open(g, options, &n, &err);
    CHECK_OK(r, err);
    json_object_put(options);
    return n;
}

static struct node *raw_disk(struct graph *g, const char *name)
{
    base_file = disk(g, "mem", SIZE, 0);
    mem_of(base_file)->yields = 3;
    return open_json(g, parse("{'driver':'raw','node-name':'%s','file':'mem'}", name));
}

static void close_raw_disk(struct node *n)
{
    node_unref(n);
    node_unref(steal(base_file));
}

/* BELOW: what stands behind it already, or NULL. */
static struct node *overlay_on(struct graph *g, const char *name, uint64_t size,
                               const struct node *below)
{
    struct error err = ERROR_INIT;
    CLEANUP(memory_freep) char *path = xasprintf("%s/%s.qcow2", dir, name);
    int r = graph_create_filename(g, path, "qcow2", NULL, NULL, size, &err);
    CHECK_OK(r, err);
    char backing[48] = "null";
    if (below)
        snprintf(backing, sizeof backing, "'%s'", node_name(below));
    return open_json(g, parse("{'driver':'qcow2','node-name':'%s','backing':%s,'file':"
                              "{'driver':'file','filename':'%s'}}",
                              name, backing, path));
}

static struct node *bare_overlay(struct graph *g, const char *name, uint64_t size)
{
    return overlay_on(g, name, size, NULL);
}

/* ---- a guest that knows what it has been answered ---- */

struct model_guest {
    struct test_user user;
    struct edge *edge;
    struct rng rng;
    struct range own; /* nobody else writes there */
    uint8_t *model;
    unsigned writes;
    bool stop;
};

static int model_task(void *arg)
{
    struct model_guest *mg = arg;
    SHIELD();
    while (!mg->stop) {
        uint64_t length = 512 * (1 + rng_below(&mg->rng, 40));
        uint64_t start = mg->own.start + 512 * rng_below(&mg->rng, (mg->own.length - length) / 512);
        uint8_t *buf = xcalloc(1, length);
        bool zeroes = rng_below(&mg->rng, 6) == 0;
        if (!zeroes)
            fill_random(&mg->rng, buf, length);
        int r = zeroes ? edge_write_zeroes(mg->edge, range_make(start, length), 0)
                       : edge_write(mg->edge, range_make(start, length), buf, 0);
        CHECK(r == 0);
        memcpy(mg->model + start, buf, length);
        free(buf);
        mg->writes++;
        CHECK(task_yield() == 0);
    }
    return 0;
}

struct load {
    struct model_guest guests[3];
    struct scope tasks;
    uint8_t *model;
};

static void load_begin(struct load *l, struct node *n)
{
    l->model = xcalloc(1, SIZE);
    scope_init(&l->tasks);
    for (unsigned i = 0; i < ARRAY_SIZE(l->guests); i++) {
        struct model_guest *mg = &l->guests[i];
        *mg = (struct model_guest){.rng = {test_seed() + i}, .model = l->model};
        mg->own = range_make(i * (SIZE / 4), SIZE / 4); /* the last quarter stays as it was */
        mg->edge = attach(&mg->user, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        scope_spawn(&l->tasks, model_task, mg);
    }
}

static void load_written(struct load *l, unsigned more)
{
    for (unsigned i = 0; i < ARRAY_SIZE(l->guests); i++)
        for (unsigned goal = l->guests[i].writes + more; l->guests[i].writes < goal;)
            CHECK(sleep_until(clock_after_ns(0)) == 0);
}

/* Ends the guests; the disk that they have been answered must be there. */
static void load_end(struct load *l)
{
    uint8_t *buf = xcalloc(1, SIZE);
    for (unsigned i = 0; i < ARRAY_SIZE(l->guests); i++)
        l->guests[i].stop = true;
    CHECK(scope_join(&l->tasks) == 0);
    scope_fini(&l->tasks);
    CHECK(edge_read(l->guests[0].edge, range_make(0, SIZE), buf, 0) == 0);
    CHECK(memcmp(buf, l->model, SIZE) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(l->guests); i++)
        edge_detach(l->guests[i].edge);
    free(buf);
    free(l->model);
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

/* ---- running transactions ---- */

static int run(struct graph *g, struct error *err, struct json_object *actions, const char *mode)
{
    CLEANUP(json_putp)
    struct json_object *properties = mode ? parse("{'completion-mode':'%s'}", mode) : NULL;
    int r = transaction_run(g, js, actions, properties, err);
    json_object_put(actions);
    return r;
}

static void run_ok(struct graph *g, struct json_object *actions)
{
    struct error err = ERROR_INIT;
    int r = run(g, &err, actions, NULL);
    CHECK_OK(r, err);
}

static void run_fails(struct graph *g, const char *text, struct json_object *actions)
{
    struct error err = ERROR_INIT;
    CHECK(run(g, &err, actions, NULL) < 0);
    CHECK_TEXT(err, text);
}

static void fails(struct graph *g, const char *type, const char *text, struct json_object *data)
{
    struct error err = ERROR_INIT;
    if (command(g, &err, type, data) == 0)
        fprintf(stderr, "no error: %s\n", text);
    CHECK_TEXT(err, text);
}

static unsigned nodes_of(struct graph *g)
{
    unsigned count = 0;
    for (struct node *n = graph_first(g); n; n = graph_next(n))
        count++;
    return count;
}

#define SNAPSHOT(node, overlay)                                                                    \
    "{'type':'blockdev-snapshot','data':{'node':'" node "','overlay':'" overlay "'}}"
#define ADD(node, name)                                                                            \
    "{'type':'block-dirty-bitmap-add','data':{'node':'" node "','name':'" name "'}}"
#define ABORT "{'type':'abort','data':{}}"
#define ABORTED "Transaction aborted using Abort action"

static char *sync_action(const char *node, const char *overlay)
{
    return xasprintf("{'type':'blockdev-snapshot-sync','data':{'node-name':'%s',"
                     "'snapshot-node-name':'%s','snapshot-file':'%s/%s.qcow2'}}",
                     node, overlay, dir, overlay);
}

/* ---- the tests ---- */

JOB_TEST(guests_go_on_above_a_growing_chain)
{
    enum { LAYERS = 7 };
    static const char *const names[] = {"s", "o1", "o2", "o3", "o4", "o5", "o6", "o7"};
    uint8_t *then[LAYERS];
    struct load l;
    make_dir();
    struct node *n = raw_disk(g, "s");
    load_begin(&l, n);
    for (unsigned i = 0; i < LAYERS; i++) {
        load_written(&l, 3);
        command_ok(g, "blockdev-snapshot-sync",
                   parse("{'node-name':'%s','snapshot-node-name':'%s','snapshot-file':"
                         "'%s/%s.qcow2'}",
                         names[i], names[i + 1], dir, names[i + 1]));
        struct node *below = graph_find(g, names[i]), *above = graph_find(g, names[i + 1]);
        CHECK(node_read_only(below) && !node_read_only(above) && node_backing(above) == below);
        for (unsigned k = 0; k < ARRAY_SIZE(l.guests); k++)
            CHECK(l.guests[k].edge->node == above);
        then[i] = content(below);
    }
    load_written(&l, 5);
    for (unsigned i = 0; i < LAYERS; i++) {
        CLEANUP(memory_freep) uint8_t *now = content(graph_find(g, names[i]));
        CHECK(memcmp(now, then[i], SIZE) == 0);
        CHECK(!i || memcmp(then[i - 1], then[i], SIZE) != 0);
        if (i)
            free(then[i - 1]);
    }
    free(then[LAYERS - 1]);
    load_end(&l); /* the overlays were theirs alone, and go with them */
    CHECK(nodes_of(g) == 2);
    close_raw_disk(n);
    remove_dir();
}

/* The bitmap of an overlay that comes in the same step: exactly what the overlay has. */
JOB_TEST(a_bitmap_of_the_overlay_begins_at_the_instant)
{
    struct load l;
    make_dir();
    struct node *n = raw_disk(g, "s");
    load_begin(&l, n);
    for (unsigned round = 0; round < 6; round++) {
        char below[8], above[8];
        snprintf(below, sizeof below, round ? "o%u" : "s", round);
        snprintf(above, sizeof above, "o%u", round + 1);
        CLEANUP(memory_freep) char *sync = sync_action(below, above);
        load_written(&l, 2);
        if (round % 2) {
            struct node *o = bare_overlay(g, above, SIZE);
            run_ok(g, parse("[{'type':'blockdev-snapshot','data':{'node':'%s','overlay':'%s'}},"
                            "{'type':'block-dirty-bitmap-add','data':{'node':'%s','name':'b'}}]",
                            below, above, above));
            node_unref(o);
        } else {
            run_ok(g, parse("[%s,{'type':'block-dirty-bitmap-add','data':{'node':'%s',"
                            "'name':'b'}}]",
                            sync, above));
        }
        load_written(&l, 2);
        struct node *o = graph_find(g, above);
        graph_quiesce_begin(g, &o, 1);
        struct bitmap *bits = dirty_bits(dirty_find(o, "b"));
        CHECK(bitmap_granularity(bits) == CLUSTER && bitmap_count(bits) > 0);
        struct test_user u;
        struct edge *e = attach(&u, o, PERM_CONSISTENT_READ, PERM_ALL);
        for (uint64_t at = 0; at < SIZE; at += CLUSTER) {
            uint64_t length;
            int has = edge_allocated_above(e, o, true, range_make(at, CLUSTER), &length);
            CHECK(has >= 0 && length == CLUSTER && bitmap_get(bits, at) == (has > 0));
        }
        edge_detach(e);
        graph_quiesce_end(g, &o, 1);
    }
    load_end(&l);
    close_raw_disk(n);
    remove_dir();
}

/* A snapshot and a full backup of the overlay, which is the disk at that instant, in one step. */
JOB_TEST(a_backup_of_the_overlay_begins_at_the_instant)
{
    struct load l;
    make_dir();
    struct node *n = raw_disk(g, "s"), *t = disk(g, "t", SIZE, 0);
    mem_of(t)->yields = 3;
    load_begin(&l, n);
    load_written(&l, 3);
    CLEANUP(memory_freep) char *sync = sync_action("s", "o");
    run_ok(g, parse("[%s," ADD("o", "b") ",{'type':'blockdev-backup','data':{'device':'o',"
                                         "'target':'t','job-id':'j','sync':'full'}}]",
                    sync));
    CHECK(node_read_only(n));
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CLEANUP(memory_freep) uint8_t *then = content(n);
    CHECK(memcmp(then, mem_of(t)->bytes, SIZE) == 0);
    load_end(&l);
    close_raw_disk(n);
    node_unref(t);
    remove_dir();
}

JOB_TEST(a_transaction_that_fails_moves_nobody)
{
    struct load l;
    make_dir();
    struct node *n = raw_disk(g, "s"), *t = disk(g, "t", SIZE, 0);
    struct node *o = bare_overlay(g, "o", SIZE);
    unsigned nodes = nodes_of(g);
    CLEANUP(memory_freep) char *one = sync_action("s", "o1");
    CLEANUP(memory_freep) char *two = sync_action("o1", "o2");
    load_begin(&l, n);
    for (unsigned i = 0; i < 24; i++) {
        const char *const parts[][2] = {
            {one, ABORT},
            {SNAPSHOT("s", "o") "," ADD("o", "b"), ABORT},
            {one, two},
            {one, "{'type':'blockdev-backup','data':{'device':'o1','target':'t','job-id':'j',"
                  "'sync':'full'}}"},
        };
        load_written(&l, 1);
        run_fails(g, ABORTED,
                  parse("[%s,%s," ADD("s", "c") "," ABORT "]", parts[i % 4][0], parts[i % 4][1]));
        for (unsigned k = 0; k < ARRAY_SIZE(l.guests); k++)
            CHECK(l.guests[k].edge->node == n);
        CHECK(!node_backing(o) && !dirty_first(o) && !dirty_first(n) && !node_read_only(n));
        CHECK(nodes_of(g) == nodes && !there("o1.qcow2") && !there("o2.qcow2"));
    }
    CHECK(node_check_op(n, BLOCK_OP_REPLACE, NULL) == 0);
    run_ok(g, parse("[" SNAPSHOT("s", "o") "]")); /* and now it can */
    CHECK(l.guests[1].edge->node == o);
    load_end(&l);
    node_unref(o);
    node_unref(t);
    close_raw_disk(n);
    remove_dir();
}

/* Who had the overlay before keeps it when others have to go back. */
JOB_TEST(undoing_leaves_who_was_there_before)
{
    struct test_user writer, reader;
    make_dir();
    struct node *n = raw_disk(g, "s"), *o = bare_overlay(g, "o", SIZE);
    struct edge *w = attach(&writer, o, PERM_WRITE, PERM_ALL);
    struct edge *r = attach(&reader, n, PERM_CONSISTENT_READ, PERM_ALL);
    run_fails(g, ABORTED, parse("[" SNAPSHOT("s", "o") "," ABORT "]"));
    CHECK(w->node == o && r->node == n);
    run_ok(g, parse("[" SNAPSHOT("s", "o") "]"));
    CHECK(w->node == o && r->node == o);
    edge_detach(w);
    edge_detach(r);
    node_unref(o);
    close_raw_disk(n);
    remove_dir();
}

JOB_TEST(what_is_refused_changes_nothing)
{
    struct test_user reader;
    make_dir();
    struct node *n = raw_disk(g, "s"), *o = bare_overlay(g, "o", SIZE);
    struct node *small = bare_overlay(g, "small", SIZE / 2), *t = disk(g, "t", SIZE, 0);
    struct node *f = open_json(g, parse("{'driver':'copy-before-write','node-name':'f','file':'t',"
                                        "'target':'small'}"));
    struct edge *r = attach(&reader, o, PERM_CONSISTENT_READ, PERM_ALL);
    struct node *raw = open_json(g, parse("{'driver':'raw','node-name':'raw','file':'t'}"));
    unsigned nodes = nodes_of(g);

    static const struct {
        const char *node, *overlay, *text;
    } cases[] = {
        {"x", "o", "Cannot find device='x' nor node-name='x'"},
        {"s", "x", "Cannot find device='x' nor node-name='x'"},
        {"s", "o", "The overlay is already in use"},
        {"s", "f", "Filters cannot be used as overlays"},
        {"s", "raw", "The overlay does not support backing images"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++)
        fails(g, "blockdev-snapshot", cases[i].text,
              parse("{'node':'%s','overlay':'%s'}", cases[i].node, cases[i].overlay));
    edge_detach(r);
    node_unref(f);
    node_unref(raw);

    mem_of(base_file)->flush_errno = EIO;
    struct test_user writer;
    struct edge *w = attach(&writer, n, PERM_WRITE, PERM_ALL);
    CHECK(edge_write_zeroes(w, range_make(0, 512), 0) == 0);
    fails(g, "blockdev-snapshot", "An IO error has occurred", parse("{'node':'s','overlay':'o'}"));
    fails(g, "blockdev-snapshot-sync", "An IO error has occurred",
          parse("{'node-name':'s','snapshot-node-name':'n','snapshot-file':'%s/n'}", dir));
    mem_of(base_file)->flush_errno = 0;
    CHECK(!there("n") && w->node == n);

    static const struct {
        const char *data, *text;
    } sync[] = {
        {"", "Cannot find device='' nor node-name=''"},
        {"'device':'x',", "Cannot find device='x' nor node-name=''"},
        {"'node-name':'s',", "New overlay node-name missing"},
        {"'node-name':'s','snapshot-node-name':'o',", "New overlay node-name already in use"},
        {"'node-name':'s','snapshot-node-name':'1',", "Invalid node-name: '1'"},
        {"'device':'s','snapshot-node-name':'1',", "Invalid node-name: '1'"},
        {"'device':'s','format':'raw',", "Backing file not supported for file format 'raw'"},
        {"'device':'s','format':'x',", "Unknown file format 'x'"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(sync); i++)
        fails(g, "blockdev-snapshot-sync", sync[i].text,
              parse("{%s'snapshot-file':'%s/n'}", sync[i].data, dir));
    CHECK(!there("n") && w->node == n && nodes_of(g) == nodes - 2);

    /* The second is refused by what the first has done, and so the first is undone. */
    run_fails(g, "Node 's' is busy: node is used as backing hd of 'o'",
              parse("[" SNAPSHOT("s", "o") "," SNAPSHOT("s", "small") "]"));
    run_fails(g, "The overlay already has a backing image",
              parse("[" SNAPSHOT("s", "o") "," SNAPSHOT("t", "o") "]"));
    CHECK(w->node == n && !node_backing(o) && !node_backing(small));
    edge_detach(w);
    node_unref(o);
    node_unref(small);
    node_unref(t);
    close_raw_disk(n);
    remove_dir();
}

JOB_TEST(beside_a_backup)
{
    struct load l;
    struct error err = ERROR_INIT;
    make_dir();
    struct node *n = raw_disk(g, "s"), *t = disk(g, "t", SIZE, 0);
    struct node *o = bare_overlay(g, "o", SIZE), *small = bare_overlay(g, "small", SIZE / 2);
    mem_of(t)->yields = 3;
    load_begin(&l, n);
    load_written(&l, 3);
    graph_quiesce_begin(g, &n, 1);
    CLEANUP(memory_freep) uint8_t *then = content(n);
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':65536,"
                     "'filter-node-name':'f'}"));
    graph_quiesce_end(g, &n, 1);
    load_written(&l, 2);
    fails(g, "blockdev-snapshot", "Node 't' is busy: block device is in use by block job: backup",
          parse("{'node':'t','overlay':'o'}"));
    fails(g, "blockdev-snapshot", "Node 'f' keeps the disk as it was, and cannot be resized",
          parse("{'node':'s','overlay':'small'}"));
    run_ok(g, parse("[" SNAPSHOT("s", "o") "]"));
    CHECK(strcmp(node_name(l.guests[0].edge->node), "f") == 0);
    load_written(&l, 3);
    CHECK(jobs_set_speed(js, "j", 0, &err) == 0);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(memcmp(then, mem_of(t)->bytes, SIZE) == 0);
    CHECK(l.guests[0].edge->node == o && node_backing(o) == n);
    load_end(&l);
    node_unref(o);
    node_unref(small);
    node_unref(t);
    close_raw_disk(n);
    remove_dir();
}

/* What is on top is the disk as it was at the instant, not the overlay that comes in the same step,
 * which has nothing yet. */
JOB_TEST(a_backup_of_what_is_on_top_below_a_new_overlay)
{
    make_dir();
    struct node *n = raw_disk(g, "s"), *t = disk(g, "t", SIZE, 0), *o = bare_overlay(g, "o", SIZE);
    memset(mem_of(base_file)->bytes, 0x11, SIZE);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    run_ok(g,
           parse("[{'type':'blockdev-backup','data':{'device':'s','target':'t','job-id':'j',"
                 "'sync':'top','bitmap':'b','bitmap-mode':'on-success'}}," SNAPSHOT("s", "o") "]"));
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(memcmp(mem_of(base_file)->bytes, mem_of(t)->bytes, SIZE) == 0);
    node_unref(o);
    node_unref(t);
    close_raw_disk(n);
    remove_dir();
}

/* The same of a mirror, whose source is a filter: it is interrupted while it looks what is on top,
 * and then the overlay comes below that. */
JOB_TEST(a_mirror_of_what_is_on_top_below_a_new_overlay)
{
    struct event hold;
    struct error err = ERROR_INIT;
    event_init(&hold);
    make_dir();
    struct node *b = disk(g, "b", SIZE, 0), *t = disk(g, "t", SIZE, 0);
    struct node *n =
        open_json(g, parse("{'driver':'mem','node-name':'s','size':%d,'backing':'b'}", SIZE));
    struct node *over = open_json(g, parse("{'driver':'blkdebug','node-name':'over','image':'s'}"));
    struct node *o = bare_overlay(g, "o", SIZE);
    memset(mem_of(n)->bytes, 0x11, 65536);
    memset(mem_of(n)->bytes + SIZE / 2, 0x22, 65536);
    mem_of(n)->hold_status = &hold;
    CLEANUP(json_putp)
    struct json_object *args = parse("{'device':'over','target':'t','job-id':'j','sync':'top'}");
    int r = mirror_blockdev(js, args, &err);
    CHECK_OK(r, err);
    while (!mem_of(n)->holding)
        turns(1);
    verb_ok("j", JOB_VERB_PAUSE);
    event_set(&hold);
    mem_of(n)->hold_status = NULL;
    wait_for("j", "paused");
    run_ok(g, parse("[" SNAPSHOT("s", "o") "]"));
    verb_ok("j", JOB_VERB_RESUME);
    wait_for("j", "READY");
    CHECK(memcmp(mem_of(n)->bytes, mem_of(t)->bytes, SIZE) == 0);
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    node_unref(over);
    node_unref(o);
    node_unref(n);
    node_unref(t);
    node_unref(b);
    remove_dir();
}

/* The overlay takes the filter of a backup with it and then lets go of the disk. What the backup
 * goes by, its own set and the user's bitmap, is the disk's. */
JOB_TEST(a_disk_stays_while_a_backup_has_its_bitmaps)
{
    struct error err = ERROR_INIT;
    make_dir();
    struct node *n = raw_disk(g, "s"), *t = disk(g, "t", SIZE, 0), *o = bare_overlay(g, "o", SIZE);
    memset(mem_of(base_file)->bytes, 0x11, SIZE);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':65536,"
                     "'bitmap':'b','bitmap-mode':'always'}"));
    run_ok(g, parse("[" SNAPSHOT("s", "o") "]"));
    CLEANUP(json_putp)
    struct json_object *list =
        parse("[{'driver':'qcow2','node-name':'o','backing':null,'file':{'driver':'file',"
              "'filename':'%s/o.qcow2'}}]",
              dir);
    int r = graph_reopen(g, list, &err);
    CHECK_OK(r, err);
    close_raw_disk(n);
    CHECK(graph_find(g, "s") == n);
    CHECK(jobs_set_speed(js, "j", 0, &err) == 0);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(!graph_find(g, "s"));
    node_unref(o);
    node_unref(t);
    remove_dir();
}

/* A request's stack is as deep as the graph. */
JOB_TEST(the_graph_does_not_become_too_deep)
{
    char name[16] = "s", above[16];
    make_dir();
    struct node *n = raw_disk(g, "s"), *stack[246] = {NULL};
    for (unsigned i = 0; i < 246; i++) {
        snprintf(above, sizeof above, "r%u", i);
        stack[i] = open_json(
            g, parse("{'driver':'raw','node-name':'%s','file':'%s'}", above, i ? name : "s"));
        strcpy(name, above);
    }
    /* 248 nodes in a row; each overlay is one more. */
    struct node *o[3] = {bare_overlay(g, "o0", SIZE), bare_overlay(g, "o1", SIZE),
                         bare_overlay(g, "o2", SIZE)};
    run_ok(g, parse("[" SNAPSHOT("s", "o0") "]"));
    run_ok(g, parse("[" SNAPSHOT("o0", "o1") "]"));
    run_fails(g, "More than 250 nodes on top of each other", parse("[" SNAPSHOT("o1", "o2") "]"));
    CHECK(!node_backing(o[2]));
    CLEANUP(memory_freep) uint8_t *all = content(stack[245]);
    for (unsigned i = 246; i--;)
        node_unref(stack[i]);
    for (unsigned i = 3; i--;)
        node_unref(o[i]);
    close_raw_disk(n);
    remove_dir();
}

/* ---- at random ---- */

struct history {
    struct graph *g;
    struct rng rng;
    struct load load;
    struct node *nodes[64]; /* references */
    uint8_t *then[64];      /* of those that are below others: what they must hold, or NULL */
    unsigned n, made;       /* nodes; the last is the one that guests have */
    char top[16], next[16];
};

static void name_next(struct history *h)
{
    snprintf(h->next, sizeof h->next, "n%u", h->made++);
}

/* The guests have NODE now; who was theirs before is kept as it was at the instant. */
static void new_top(struct history *h, struct node *node)
{
    CHECK(h->n < ARRAY_SIZE(h->nodes) && node);
    h->nodes[h->n++] = node;
    strcpy(h->top, node_name(node));
    for (unsigned i = 0; i < ARRAY_SIZE(h->load.guests); i++)
        CHECK(h->load.guests[i].edge->node == node);
}

static void step_snapshot(struct history *h, bool given)
{
    struct node *old = h->nodes[h->n - 1], *o = NULL;
    char add[200] = "";
    if (rng_below(&h->rng, 2))
        snprintf(add, sizeof add,
                 ",{'type':'block-dirty-bitmap-add','data':{'node':'%s','name':'b'}}", h->next);
    if (given) {
        o = bare_overlay(h->g, h->next, SIZE);
        run_ok(h->g, parse("[{'type':'blockdev-snapshot','data':{'node':'%s','overlay':'%s'}}%s]",
                           h->top, h->next, add));
    } else {
        CLEANUP(memory_freep) char *sync = sync_action(h->top, h->next);
        run_ok(h->g, parse("[%s%s]", sync, add));
        o = node_ref(graph_find(h->g, h->next));
    }
    CHECK(node_read_only(old) && node_backing(o) == old);
    h->then[h->n - 1] = content(old);
    new_top(h, o);
}

static void step_failure(struct history *h)
{
    CLEANUP(memory_freep) char *one = sync_action(h->top, h->next);
    CLEANUP(memory_freep) char *two = sync_action(h->next, "never");
    run_fails(h->g, ABORTED,
              parse("[%s%s%s,{'type':'drive-backup','data':{'device':'%s','sync':'full',"
                    "'format':'raw','target':'%s/vain','job-id':'v'}}," ABORT "]",
                    one, rng_below(&h->rng, 2) ? "," : "," ABORT ",", two,
                    rng_below(&h->rng, 2) ? h->next : h->top, dir));
    CHECK(h->load.guests[0].edge->node == h->nodes[h->n - 1] && !there("vain"));
}

static void step_backup(struct history *h, struct node *target)
{
    struct node *n = h->nodes[h->n - 1];
    graph_quiesce_begin(h->g, &n, 1);
    CLEANUP(memory_freep) uint8_t *then = content(n);
    command_ok(h->g, "blockdev-backup",
               parse("{'device':'%s','target':'t','job-id':'j','sync':'full','filter-node-name':"
                     "'f'}",
                     h->top));
    graph_quiesce_end(h->g, &n, 1);
    if (rng_below(&h->rng, 2)) { /* a snapshot below the filter */
        name_next(h);
        struct node *o = bare_overlay(h->g, h->next, SIZE);
        run_ok(h->g, parse("[{'type':'blockdev-snapshot','data':{'node':'%s','overlay':'%s'}}]",
                           h->top, h->next));
        wait_for("j", "null");
        h->then[h->n - 1] = content(n);
        new_top(h, o);
    }
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:") && memcmp(then, mem_of(target)->bytes, SIZE) == 0);
}

/* To an image of its own, or to an overlay of what is below; the guests move there. */
static void step_mirror(struct history *h)
{
    struct error err = ERROR_INIT;
    struct node *old = h->nodes[h->n - 1], *below = node_backing(old);
    bool top = below && rng_below(&h->rng, 2);
    struct node *m = overlay_on(h->g, h->next, SIZE, top ? below : NULL);
    CLEANUP(json_putp)
    struct json_object *args = parse("{'device':'%s','target':'%s','job-id':'j','sync':'%s',"
                                     "'copy-mode':'write-blocking'}",
                                     h->top, h->next, top ? "top" : "full");
    int r = mirror_blockdev(js, args, &err);
    CHECK_OK(r, err);
    wait_for("j", "ready");
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    new_top(h, m);
}

JOB_TEST(chains_at_random)
{
    for (unsigned round = 0; round < 12; round++) {
        struct history h = {.g = g, .rng = {test_seed() * 31 + round}};
        make_dir();
        h.nodes[h.n++] = raw_disk(g, "s");
        strcpy(h.top, "s");
        struct node *t = disk(g, "t", SIZE, 0);
        mem_of(t)->yields = 2;
        load_begin(&h.load, h.nodes[0]);
        for (unsigned step = 0; step < 10; step++) {
            load_written(&h.load, 1 + (unsigned)rng_below(&h.rng, 3));
            name_next(&h);
            events[0] = '\0';
            switch (rng_below(&h.rng, 6)) {
            case 0:
            case 1:
                step_snapshot(&h, rng_below(&h.rng, 2));
                break;
            case 2:
            case 3:
                step_failure(&h);
                break;
            case 4:
                step_backup(&h, t);
                break;
            case 5:
                step_mirror(&h);
                break;
            }
        }
        load_written(&h.load, 2);
        for (unsigned i = 0; i < h.n; i++) {
            CLEANUP(memory_freep) uint8_t *now = h.then[i] ? content(h.nodes[i]) : NULL;
            CHECK(!now || memcmp(now, h.then[i], SIZE) == 0);
            free(h.then[i]);
        }
        load_end(&h.load);
        for (unsigned i = h.n; i--;)
            node_unref(h.nodes[i]);
        node_unref(steal(base_file));
        node_unref(t);
        CHECK(nodes_of(g) == 0);
        remove_dir();
    }
}

/* ---- depth ---- */

/* In a task of its own, as guests' requests are. */
static int go_down(void *arg)
{
    struct edge *e = arg;
    struct block_status st;
    CLEANUP(memory_freep) uint8_t *expected = xcalloc(1, SIZE);
    CLEANUP(memory_freep) uint8_t *buf = xcalloc(1, SIZE);
    SHIELD();
    memcpy(expected, mem_of(base_file)->bytes, SIZE);
    CHECK(edge_read(e, range_make(0, SIZE), buf, 0) == 0);
    CHECK(memcmp(buf, expected, SIZE) == 0);
    memset(expected + 777, 5, 100);
    CHECK(edge_write(e, range_make(777, 100), expected + 777, 0) == 0);
    memset(expected + MiB + 5, 0, 9);
    CHECK(edge_write_zeroes(e, range_make(MiB + 5, 9), 0) == 0);
    CHECK(edge_discard(e, range_make(2 * MiB + 5, CLUSTER * 2)) == 0 && edge_flush(e) == 0);
    CHECK(edge_status_above(e, NULL, true, range_make(3 * MiB, MiB), &st) == 0);
    CHECK(edge_read(e, range_make(0, 2 * MiB), buf, 0) == 0);
    CHECK(memcmp(buf, expected, 2 * MiB) == 0);
    edge_detach(e); /* closes them all, each below the one before */
    return 0;
}

/* A chain of images as deep as may be: a request goes down to its end and comes back. */
JOB_TEST(a_request_can_go_down_the_deepest_chain)
{
    struct error err = ERROR_INIT;
    char name[16] = "s", above[16];
    struct test_user u;
    make_dir();
    struct node *n = raw_disk(g, "s");
    mem_of(base_file)->yields = 0;
    fill_disk(base_file, 7);
    struct edge *e = attach(&u, n, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    unsigned depth = 2;
    for (;; depth++) {
        snprintf(above, sizeof above, "o%u", depth);
        if (command(g, &err, "blockdev-snapshot-sync",
                    parse("{'node-name':'%s','snapshot-node-name':'%s','snapshot-file':"
                          "'%s/%s.qcow2'}",
                          name, above, dir, above)) < 0)
            break;
        strcpy(name, above);
    }
    CHECK_TEXT(err, "More than 250 nodes on top of each other");
    CHECK(depth == 250 && !there("o250.qcow2"));
    SCOPE(tasks);
    scope_spawn(&tasks, go_down, e);
    CHECK(scope_join(&tasks) == 0);
    CHECK(nodes_of(g) == 2);
    close_raw_disk(n);
    CHECK(shell("rm -r %s", dir) == 0);
}

/* ---- files ---- */

JOB_TEST(only_what_a_transaction_has_made_is_removed)
{
    struct error err = ERROR_INIT;
    make_dir();
    struct node *n = raw_disk(g, "s");
    static const char *const lists[] = {
        "{'type':'drive-backup','data':{'device':'s','target':'%1$s/%2$s','sync':'full',"
        "'format':'qcow2','job-id':'j'}}",
        "{'type':'drive-backup','data':{'device':'s','target':'file:%1$s/%2$s','sync':'none',"
        "'format':'qcow2','auto-dismiss':false,'job-id':'k'}}",
        "{'type':'drive-backup','data':{'device':'s','target':'%1$s/%2$s','sync':'full',"
        "'format':'raw','job-id':'j'}}",
        "{'type':'blockdev-snapshot-sync','data':{'device':'s','snapshot-file':'%1$s/%2$s'}}",
        "{'type':'blockdev-snapshot-sync','data':{'node-name':'s','snapshot-node-name':'o',"
        "'snapshot-file':'file:%1$s/%2$s'}}",
    };
    CHECK(shell("cd %s; mkdir real; echo old >there; ln -s real/link link", dir) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(lists) + 3; i++) {
        bool grouped = i >= ARRAY_SIZE(lists); /* the backups once more */
        for (unsigned k = 0; k < 3; k++) {
            char action[512], all[1024];
            const char *const names[] = {"new", "there", "link"};
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
            snprintf(action, sizeof action, lists[i % ARRAY_SIZE(lists)], dir, names[k]);
#pragma GCC diagnostic pop
            snprintf(all, sizeof all, "[%s,%s]", action, ABORT);
            error_clear(&err);
            CHECK(run(g, &err, parse("%s", all), grouped ? "grouped" : NULL) < 0);
            CHECK_TEXT(err, ABORTED);
            CHECK(!there("new") && there("there") && !there("real/link"));
            CHECK(shell("test -L %s/link", dir) == 0);
        }
    }
    /* A command alone, which fails after its file is made: the name is taken, the size is another.
     */
    CHECK(shell("echo old >%s/there", dir) == 0);
    struct node *t = disk(g, "t", SIZE, 0);
    CHECK(command(g, &err, "drive-backup",
                  parse("{'device':'s','target':'%s/new','sync':'full','format':'qcow2',"
                        "'job-id':'j','filter-node-name':'t'}",
                        dir)) < 0);
    CHECK(!there("new"));
    error_clear(&err);
    CHECK(command(g, &err, "drive-backup",
                  parse("{'device':'s','target':'%s/there','sync':'full','format':'raw',"
                        "'mode':'existing','job-id':'j'}",
                        dir)) < 0);
    CHECK(there("there"));
    node_unref(t);
    close_raw_disk(n);
    remove_dir();
}

static int can_add(struct dirty_store *st, struct node *n, const char *name,
                   uint64_t granularity_bytes, struct error *err)
{
    return 0;
}

/* The disk cannot be made durable, but that is found out when the backup is over. */
static int flush_fails(struct dirty_store *st, struct node *n)
{
    wait_for("j", "null");
    return -EIO;
}

/* A transaction fails in its last step, when one of its backups is complete, and the bitmap of that
 * one has moved on: what the bitmap has no more is in the file. */
JOB_TEST(a_complete_backup_is_not_removed)
{
    struct error err = ERROR_INIT;
    struct test_user u;
    struct dirty_store store = {.can_add = can_add, .flush = flush_fails};
    make_dir();
    struct node *n = raw_disk(g, "s");
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    struct edge *e = attach(&u, n, PERM_WRITE, PERM_ALL);
    CHECK(edge_write_zeroes(e, range_make(0, 65536), 0) == 0);
    dirty_set_store(g, &store);
    CHECK(run(g, &err,
              parse("[{'type':'block-dirty-bitmap-add','data':{'node':'s','name':'p','persistent':"
                    "true}},{'type':'drive-backup','data':{'device':'s','target':'%s/new','sync':"
                    "'incremental','bitmap':'b','format':'qcow2','job-id':'j'}}]",
                    dir),
              NULL) < 0);
    CHECK(strstr(events, "j:COMPLETED j:") && bitmap_count(dirty_bits(dirty_find(n, "b"))) == 0);
    CHECK(there("new"));
    dirty_set_store(g, NULL);
    edge_detach(e);
    close_raw_disk(n);
    remove_dir();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(guests_go_on_above_a_growing_chain),
    cmocka_unit_test(a_bitmap_of_the_overlay_begins_at_the_instant),
    cmocka_unit_test(a_backup_of_the_overlay_begins_at_the_instant),
    cmocka_unit_test(a_transaction_that_fails_moves_nobody),
    cmocka_unit_test(undoing_leaves_who_was_there_before),
    cmocka_unit_test(what_is_refused_changes_nothing),
    cmocka_unit_test(beside_a_backup),
    cmocka_unit_test(a_backup_of_what_is_on_top_below_a_new_overlay),
    cmocka_unit_test(a_mirror_of_what_is_on_top_below_a_new_overlay),
    cmocka_unit_test(a_disk_stays_while_a_backup_has_its_bitmaps),
    cmocka_unit_test(chains_at_random),
    cmocka_unit_test(the_graph_does_not_become_too_deep),
    cmocka_unit_test(a_request_can_go_down_the_deepest_chain),
    cmocka_unit_test(only_what_a_transaction_has_made_is_removed),
    cmocka_unit_test(a_complete_backup_is_not_removed),
};

UNIT_MAIN(tests)
