/* Transactions: actions see those before them, all or nothing, one instant for all disks, groups.
 */
#include "jobutil.h"

#include <sys/stat.h>

static struct node *n;

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

#define ADD(name) "{'type':'block-dirty-bitmap-add','data':{'node':'s','name':'" name "'}}"
#define ON(verb, name)                                                                             \
    "{'type':'block-dirty-bitmap-" verb "','data':{'node':'s','name':'" name "'}}"
#define MERGE(target, ...)                                                                         \
    "{'type':'block-dirty-bitmap-merge','data':{'node':'s','target':'" target                      \
    "','bitmaps':[" __VA_ARGS__ "]}}"
#define ABORT "{'type':'abort','data':{}}"

static void mark(const char *name, uint64_t at)
{
    bitmap_mark(dirty_bits(dirty_find(n, name)), range_make(at, 1));
}

static uint64_t count(const char *name)
{
    return bitmap_count(dirty_bits(dirty_find(n, name)));
}

JOB_TEST(single_commands_are_transactions_of_one)
{
    struct error err = ERROR_INIT;
    n = disk(g, "s", 4 * MiB, 0);
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'s','name':'b','granularity':4096,'disabled':true}"));
    CHECK(dirty_granularity(dirty_find(n, "b")) == 4096 && !dirty_enabled(dirty_find(n, "b")));
    command_ok(g, "block-dirty-bitmap-enable", parse("{'node':'s','name':'b'}"));
    CHECK(dirty_enabled(dirty_find(n, "b")));
    mark("b", 5);
    command_ok(g, "block-dirty-bitmap-clear", parse("{'node':'s','name':'b'}"));
    CHECK(count("b") == 0);
    command_ok(g, "block-dirty-bitmap-disable", parse("{'node':'s','name':'b'}"));

    static const struct {
        const char *type, *data, *text;
    } cases[] = {
        {"add", "{'node':'s','name':''}", "Bitmap name cannot be empty"},
        {"add", "{'node':'x','name':'c'}", "Cannot find device='x' nor node-name='x'"},
        {"add", "{'node':'s','name':'b'}", "Bitmap already exists: b"},
        {"add", "{'node':'s','name':'c','granularity':0}", DIRTY_BAD_GRANULARITY},
        {"add", "{'node':'s','name':'c','granularity':511}", DIRTY_BAD_GRANULARITY},
        {"remove", "{'node':'x','name':'b'}", "Node 'x' not found"},
        {"remove", "{'node':'s','name':'c'}", "Dirty bitmap 'c' not found"},
        {"clear", "{'node':'s','name':'c'}", "Dirty bitmap 'c' not found"},
        {"enable", "{'node':'s','name':'c'}", "Dirty bitmap 'c' not found"},
        {"merge", "{'node':'s','target':'c','bitmaps':['b']}", "Dirty bitmap 'c' not found"},
        {"merge", "{'node':'s','target':'b','bitmaps':['c']}", "Dirty bitmap 'c' not found"},
        {"merge", "{'node':'s','target':'b','bitmaps':[{'node':'x','name':'c'}]}",
         "Node 'x' not found"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        char type[64];
        snprintf(type, sizeof type, "block-dirty-bitmap-%s", cases[i].type);
        error_clear(&err);
        CHECK(command(g, &err, type, parse("%s", cases[i].data)) < 0);
        CHECK_TEXT(err, cases[i].text);
    }
    command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'s','name':'b'}"));
    CHECK(!dirty_first(n));
    node_unref(n);
}

JOB_TEST(each_action_sees_those_before_it)
{
    n = disk(g, "s", 4 * MiB, 0);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'a'}"));
    mark("a", 0);
    mark("a", MiB);
    run_ok(
        g,
        parse(
            "[" ADD("t") "," ON("disable", "t") "," MERGE("t", "'a'") "," ON("clear", "a") "," ADD(
                "u") "," MERGE("u", "'t',{'node':'s','name':'a'}") "," ON("remove",
                                                                          "t") "," ADD("t") "]"));
    CHECK(count("a") == 0 && count("u") == 2 * 65536 && count("t") == 0);
    CHECK(dirty_enabled(dirty_find(n, "t")));
    node_unref(n);
}

JOB_TEST(what_fails_has_changed_nothing)
{
    n = disk(g, "s", 4 * MiB, 0);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'a'}"));
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b','disabled':true}"));
    mark("a", 0);
    mark("b", MiB);
    struct dirty_bitmap *a = dirty_find(n, "a"), *b = dirty_find(n, "b");
    static const char *const lists[] = {
        "[" ON("clear", "a") "," ON("clear", "b") "," ABORT "]",
        "[" MERGE("a", "'b'") "," MERGE("b", "'a'") "," ON("clear", "a") "," ABORT "]",
        "[" ON("enable", "b") "," ON("disable", "a") "," ON("disable", "b") "," ABORT "]",
        "[" ON("remove", "a") "," ADD("a") "," ON("disable", "a") "," MERGE("a", "'b'") "," ON(
            "remove", "b") "," ABORT "]",
        "[" ADD("c") "," MERGE("c", "'a','b'") "," ON("remove", "c") "," ADD("c") "," ABORT "]",
        "[" ON("clear", "a") "," MERGE("b", "'a'") "," ON("clear",
                                                          "a") "," MERGE("a", "'b'") "," ABORT "]",
    };
    for (unsigned i = 0; i < ARRAY_SIZE(lists); i++) {
        run_fails(g, "Transaction aborted using Abort action", parse("%s", lists[i]));
        CHECK(dirty_find(n, "a") == a && dirty_find(n, "b") == b && !dirty_find(n, "c"));
        CHECK(count("a") == 65536 && bitmap_get(dirty_bits(a), 0));
        CHECK(count("b") == 65536 && bitmap_get(dirty_bits(b), MiB));
        CHECK(dirty_enabled(a) && !dirty_enabled(b));
    }
    run_fails(g, "Dirty bitmap 'x' not found",
              parse("[" MERGE("a", "'b','x'") "," ON("clear", "a") "]"));
    CHECK(count("a") == 65536);
    run_fails(g, "Transaction action 'blockdev-snapshot-internal-sync' is not supported",
              parse("[" ON("clear", "a") ",{'type':'blockdev-snapshot-internal-sync','data':{}}]"));
    CHECK(count("a") == 65536);
    run_ok(g, json_object_new_array());
    node_unref(n);
}

JOB_TEST(a_guests_marks_survive_an_undone_clear)
{
    n = disk(g, "s", 4 * MiB, 0);
    struct guest gu;
    mem_of(n)->yields = 3;
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'a'}"));
    guest_on(&gu, n, 1);
    uint8_t *then = xcalloc(1, 4 * MiB);
    SCOPE(tasks);
    scope_spawn(&tasks, guest_task, &gu);
    for (int i = 0; i < 40; i++) {
        turns(7);
        run_fails(g, "Transaction aborted using Abort action",
                  parse("[" ON("clear", "a") "," ABORT "]"));
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    for (uint64_t i = 0; i < 4 * MiB; i++)
        CHECK(then[i] == mem_of(n)->bytes[i] || bitmap_get(dirty_bits(dirty_find(n, "a")), i));
    edge_detach(gu.edge);
    free(then);
    node_unref(n);
}

/* ---- backups ---- */

#define BACKUP(device, target, id, more)                                                           \
    "{'type':'blockdev-backup','data':{'device':'" device "','target':'" target "','job-id':'" id  \
    "','sync':'full'" more "}}"

enum { CHUNKS = 4 * MiB / 65536 };

/* Is what the bitmap says exactly what was written since THEN, chunk by chunk? */
static void check_written_since(struct graph *g, const unsigned *then)
{
    graph_quiesce_begin(g, &n, 1);
    const struct bitmap *bits = dirty_bits(dirty_find(n, "b"));
    CHECK(bitmap_granularity(bits) == 65536);
    for (uint64_t c = 0; c < CHUNKS; c++)
        CHECK(bitmap_get(bits, c * 65536) == (mem_of(n)->written[c] != then[c]));
    graph_quiesce_end(g, &n, 1);
}

/* The three ways to begin a chain: with a new bitmap, with one that is cleared, and (the way for
 * groups) with one that the backup itself moves on. */
JOB_TEST(a_chain_starts_with_no_write_lost_or_doubled)
{
    static const char *const ways[] = {
        "[" ADD("b") "," BACKUP("s", "t", "j", "") "]",
        "[" ON("clear", "b") "," BACKUP("s", "t", "j", "") "]",
        "[" BACKUP("s", "t", "j", ",'bitmap':'b','bitmap-mode':'on-success'") "]",
    };
    struct node *t = disk(g, "t", 4 * MiB, 0);
    struct guest gu[3];
    n = disk(g, "s", 4 * MiB, 0);
    fill_disk(n, 5);
    mem_of(n)->yields = mem_of(t)->yields = 3;
    SCOPE(tasks);
    for (unsigned i = 0; i < ARRAY_SIZE(gu); i++) {
        guest_on(&gu[i], n, i);
        scope_spawn(&tasks, guest_task, &gu[i]);
    }
    for (unsigned round = 0; round < 9; round++) {
        struct error err = ERROR_INIT;
        unsigned then[CHUNKS];
        turns(20);
        /* No guest's write is inside; some wait at the gate, as they would in the transaction. */
        graph_quiesce_begin(g, &n, 1);
        memcpy(then, mem_of(n)->written, sizeof then);
        uint8_t *instant = xcalloc(1, 4 * MiB);
        memcpy(instant, mem_of(n)->bytes, 4 * MiB);
        int r = run(g, &err, parse("%s", ways[round % 3]), round % 3 == 2 ? "grouped" : NULL);
        CHECK_OK(r, err);
        graph_quiesce_end(g, &n, 1);
        wait_for("j", "null");
        CHECK(strstr(events, "j:COMPLETED j:"));
        events[0] = '\0';
        CHECK(memcmp(mem_of(t)->bytes, instant, 4 * MiB) == 0);
        check_written_since(g, then);
        turns(20);
        check_written_since(g, then);
        if (round % 3 == 2)
            command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'s','name':'b'}"));
        free(instant);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(gu); i++)
        gu[i].stop = true;
    CHECK(scope_join(&tasks) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(gu); i++) {
        CHECK(gu[i].failed == 0);
        edge_detach(gu[i].edge);
    }
    node_unref(n);
    node_unref(t);
}

/* As libvirt starts an increment: always on a copy, merged from wherever the bits are. The copy and
 * what the bitmaps go on to record have one instant. */
JOB_TEST(a_backup_on_a_copy_of_many_bitmaps)
{
    struct node *t = disk(g, "t", 4 * MiB, 0), *other = disk(g, "o", 4 * MiB, 0);
    struct guest gu;
    n = disk(g, "s", 4 * MiB, 0);
    mem_of(n)->yields = mem_of(t)->yields = 3;
    guest_on(&gu, n, 1);
    gu.writes = 5;
    guest_task(&gu);
    memcpy(mem_of(t)->bytes, mem_of(n)->bytes, 4 * MiB); /* the full backup */
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'o','name':'x','granularity':4096}"));
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'y','granularity':1048576}"));
    gu.writes = 2;
    guest_task(&gu);
    bitmap_mark(dirty_bits(dirty_find(other, "x")), range_make(3 * MiB - 5, 10));
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b','disabled':true}"));
    gu.writes = UINT32_MAX;
    SCOPE(tasks);
    scope_spawn(&tasks, guest_task, &gu);
    for (int round = 0; round < 6; round++) {
        struct error err = ERROR_INIT;
        turns(15);
        graph_quiesce_begin(g, &n, 1);
        uint8_t *instant = xcalloc(1, 4 * MiB);
        memcpy(instant, mem_of(n)->bytes, 4 * MiB);
        static const char tmp[] =
            "{'type':'block-dirty-bitmap-add','data':{'node':'s','name':'tmp',"
            "'granularity':512,'disabled':true}}";
        char actions[2048];
        snprintf(
            actions, sizeof actions,
            "[%s," MERGE("tmp", "'b','y',{'node':'o','name':'x'}") "," ON(
                "clear",
                "y") ","
                     "{'type':'blockdev-backup','data':{'device':'s','target':'t','job-id':'j',"
                     "'sync':'%s','bitmap':'tmp'%s}}]",
            tmp, round % 2 ? "bitmap" : "incremental", round % 2 ? ",'bitmap-mode':'never'" : "");
        int r = run(g, &err, parse("%s", actions), NULL);
        CHECK_OK(r, err);
        CHECK(!dirty_enabled(dirty_find(n, "tmp")) && !dirty_recording(dirty_find(n, "tmp")));
        CHECK(bitmap_get(dirty_bits(dirty_find(n, "tmp")), 3 * MiB + 4095));
        CHECK(!bitmap_count(dirty_bits(dirty_find(n, "y"))));
        graph_quiesce_end(g, &n, 1);
        wait_for("j", "null");
        CHECK(strstr(events, "j:COMPLETED j:"));
        events[0] = '\0';
        CHECK(memcmp(mem_of(t)->bytes, instant, 4 * MiB) == 0);
        CHECK(round % 2 || count("tmp") == 0); /* what guests wrote is not the copy's affair */
        command_ok(g, "block-dirty-bitmap-remove", parse("{'node':'s','name':'tmp'}"));
        free(instant);
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    edge_detach(gu.edge);
    node_unref(n);
    node_unref(t);
    node_unref(other);
}

/* Each way in which one of many sources cannot be merged, at each place among them. */
JOB_TEST(a_merge_that_fails_changes_nothing)
{
    struct node *small = disk(g, "small", 2 * MiB, 0), *t = disk(g, "t", 4 * MiB, 0);
    n = disk(g, "s", 4 * MiB, 0);
    static const char *const names[] = {"a", "b", "c", "busy", "broken"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        command_ok(g, "block-dirty-bitmap-add",
                   parse("{'node':'s','name':'%s','granularity':%u}", names[i], 512u << i));
        mark(names[i], i * MiB / 2);
    }
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'small','name':'x'}"));
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'bitmap','bitmap':'busy',"
                     "'bitmap-mode':'never','auto-finalize':false}"));
    wait_for("j", "pending");
    dirty_set_inconsistent(dirty_find(n, "broken"));
    static const struct {
        const char *source, *text;
    } bad[] = {
        {"'x'", "Dirty bitmap 'x' not found"},
        {"{'node':'s','name':'x'}", "Dirty bitmap 'x' not found"},
        {"{'node':'x','name':'a'}", "Node 'x' not found"},
        {"{'node':'small','name':'x'}",
         "Bitmaps are of different sizes (destination size is 4194304, source size is 2097152) and "
         "can't be merged"},
        {"'busy'", "Bitmap 'busy' is currently in use by another operation and cannot be used"},
        {"'broken'", "Bitmap 'broken' is inconsistent and cannot be used"},
    };
    char before[65], after[65];
    CHECK(dirty_sha256(dirty_find(n, "a"), before, NULL) == 0);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        for (unsigned place = 0; place < 3; place++) {
            struct error err = ERROR_INIT;
            char sources[256];
            snprintf(sources, sizeof sources, "%s%s%s", place > 0 ? "'b'," : "", bad[i].source,
                     place < 2 ? ",'c'" : "");
            CHECK(command(g, &err, "block-dirty-bitmap-merge",
                          parse("{'node':'s','target':'a','bitmaps':[%s]}", sources)) < 0);
            CHECK_TEXT(err, bad[i].text);
            run_fails(g, bad[i].text,
                      parse("[" ADD("d") "," MERGE("d", "'a','b','c'") "," MERGE("a", "'c'") "," ON(
                                "clear", "b") "," MERGE("a", "%s") "]",
                            sources));
            CHECK(dirty_sha256(dirty_find(n, "a"), after, NULL) == 0);
            CHECK(strcmp(before, after) == 0 && !dirty_find(n, "d"));
            CHECK(count("b") == 1024 && count("c") == 2048);
        }
    }
    static const char *const targets[] = {"busy", "broken"};
    for (unsigned i = 0; i < ARRAY_SIZE(targets); i++) {
        struct error err = ERROR_INIT;
        uint64_t dirty = count(targets[i]);
        CHECK(command(g, &err, "block-dirty-bitmap-merge",
                      parse("{'node':'s','target':'%s','bitmaps':['a','b']}", targets[i])) < 0);
        CHECK_TEXT(err, bad[4 + i].text);
        CHECK(count(targets[i]) == dirty);
    }
    verb_ok("j", JOB_VERB_FINALIZE);
    wait_for("j", "null");
    node_unref(n);
    node_unref(t);
    node_unref(small);
}

/* A guest that writes the same number to one disk, then to the other: a backup of both may have
 * the first ahead by one, never the second, and never the first by more. */
struct pair_guest {
    struct edge *a, *b;
    bool stop;
};

static int pair_task(void *arg)
{
    struct pair_guest *pg = arg;
    SHIELD();
    uint8_t *block = xcalloc(1, 512);
    for (uint32_t i = 1; !pg->stop; i++) {
        memcpy(block, &i, sizeof i);
        CHECK(edge_write(pg->a, range_make(MiB, 512), block, 0) == 0);
        CHECK(edge_write(pg->b, range_make(2 * MiB, 512), block, 0) == 0);
    }
    free(block);
    return 0;
}

JOB_TEST(all_disks_have_one_instant)
{
    struct test_user ua, ub;
    struct node *d[4];
    for (int i = 0; i < 4; i++) {
        d[i] = disk(g, (const char *[]){"s", "s2", "t", "t2"}[i], 4 * MiB, 0);
        mem_of(d[i])->yields = 4;
        memset(mem_of(d[i])->bytes, 1, 4 * MiB);
    }
    struct pair_guest pg = {attach(&ua, d[0], PERM_WRITE, PERM_ALL),
                            attach(&ub, d[1], PERM_WRITE, PERM_ALL)};
    SCOPE(tasks);
    scope_spawn(&tasks, pair_task, &pg);
    for (int round = 0; round < 30; round++) {
        turns(17 + round);
        run_ok(g, parse("[" BACKUP("s2", "t2", "j2", "") "," BACKUP("s", "t", "j", "") "]"));
        wait_for("j", "null");
        wait_for("j2", "null");
        events[0] = '\0';
        uint32_t a, b;
        memcpy(&a, mem_of(d[2])->bytes + MiB, 4);
        memcpy(&b, mem_of(d[3])->bytes + 2 * MiB, 4);
        CHECK(a == b || a == b + 1);
    }
    pg.stop = true;
    CHECK(scope_join(&tasks) == 0);
    edge_detach(pg.a);
    edge_detach(pg.b);
    for (int i = 0; i < 4; i++)
        node_unref(d[i]);
}

JOB_TEST(a_backup_that_cannot_be_prepared_undoes_those_before_it)
{
    struct node *t = disk(g, "t", 4 * MiB, 0);
    struct guest gu;
    n = disk(g, "s", 4 * MiB, 0);
    mem_of(n)->yields = 3;
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    guest_on(&gu, n, 3);
    SCOPE(tasks);
    scope_spawn(&tasks, guest_task, &gu);
    for (int i = 0; i < 20; i++) {
        turns(9);
        run_fails(
            g, "Cannot find device='x' nor node-name='x'",
            parse("[" ON("clear", "b") "," BACKUP(
                "s", "t", "j", ",'bitmap':'b','bitmap-mode':'on-success'") "," BACKUP("x", "t", "k",
                                                                                      "") "]"));
        CHECK(!dirty_busy(dirty_find(n, "b")) && !dirty_next(dirty_first(n)));
        CHECK(strcmp(events, "j:created j:aborting j:concluded j:null ") == 0);
        events[0] = '\0';
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(gu.failed == 0 && gu.edge->node == n);
    edge_detach(gu.edge);
    node_unref(n);
    node_unref(t);
}

JOB_TEST(a_group_ends_together)
{
    struct error err = ERROR_INIT;
    struct node *t = disk(g, "t", 4 * MiB, 0), *t2 = disk(g, "t2", 4 * MiB, 0);
    struct node *s2 = disk(g, "s2", 4 * MiB, 0);
    n = disk(g, "s", 4 * MiB, 0);
    fill_disk(n, 1);
    fill_disk(s2, 2);
    CHECK(run(g, &err, parse("[" ADD("b") "," BACKUP("s", "t", "j", "") "]"), "grouped") < 0);
    CHECK_TEXT(err, "Action 'block-dirty-bitmap-add' does not support Transaction property "
                    "completion-mode = grouped");
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    mark("b", 7);
#define BOTH                                                                                       \
    "[" BACKUP("s", "t", "j", ",'bitmap':'b','bitmap-mode':'on-success'") "," BACKUP("s2", "t2",   \
                                                                                     "j2", "") "]"
    mem_of(t2)->bad_write = range_make(2 * MiB, 65536);
    mem_of(t2)->write_errno = ENOSPC;
    memset(mem_of(s2)->bytes + 2 * MiB, 1, 65536);
    error_clear(&err);
    CHECK(run(g, &err, parse(BOTH), "grouped") == 0);
    wait_for("j", "null");
    wait_for("j2", "null");
    CHECK(strstr(events, "j:CANCELLED") && strstr(events, "j2:COMPLETED(No space"));
    CHECK(count("b") == 65536 && !dirty_busy(dirty_find(n, "b")));
    events[0] = '\0';
    mem_of(t2)->bad_write = range_make(0, 0);
    CHECK(run(g, &err, parse(BOTH), "grouped") == 0);
    wait_for("j", "null");
    wait_for("j2", "null");
    CHECK(strstr(events, "j:COMPLETED j:") && strstr(events, "j2:COMPLETED j2:"));
    CHECK(count("b") == 0);
    /* Aborted before they start. */
    events[0] = '\0';
    CHECK(run(g, &err,
              parse("[" BACKUP("s", "t", "j", "") "," BACKUP("s2", "t2", "j2", "") "," ABORT "]"),
              "grouped") < 0);
    wait_for("j", "null");
    wait_for("j2", "null");
    CHECK(!strstr(events, "running"));
    node_unref(n);
    node_unref(s2);
    node_unref(t);
    node_unref(t2);
}

/* A group is of jobs: whatever else, first or after a backup, is refused by its name, and nothing
 * of the transaction has happened. */
JOB_TEST(a_group_takes_jobs_only)
{
    static const struct {
        const char *type, *data;
    } others[] = {
        {"block-dirty-bitmap-add", "{'node':'s','name':'new'}"},
        {"block-dirty-bitmap-remove", "{'node':'s','name':'b'}"},
        {"block-dirty-bitmap-clear", "{'node':'s','name':'b'}"},
        {"block-dirty-bitmap-enable", "{'node':'s','name':'off'}"},
        {"block-dirty-bitmap-disable", "{'node':'s','name':'b'}"},
        {"block-dirty-bitmap-merge", "{'node':'s','target':'off','bitmaps':['b']}"},
        {"blockdev-snapshot", "{'node':'s','overlay':'o'}"},
        {"blockdev-snapshot-sync",
         "{'node-name':'s','snapshot-file':'/nowhere/x','snapshot-node-name':'x'}"},
    };
    struct node *t = disk(g, "t", 4 * MiB, 0), *o = disk(g, "o", 4 * MiB, 0);
    n = disk(g, "s", 4 * MiB, 0);
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'b'}"));
    command_ok(g, "block-dirty-bitmap-add", parse("{'node':'s','name':'off','disabled':true}"));
    mark("b", 7);
    for (size_t i = 0; i < ARRAY_SIZE(others); i++) {
        for (int later = 0; later < 2; later++) {
            struct error err = ERROR_INIT;
            CLEANUP(memory_freep)
            char *text = xasprintf("Action '%s' does not support Transaction property "
                                   "completion-mode = grouped",
                                   others[i].type);
            CLEANUP(memory_freep)
            char *other = xasprintf("{'type':'%s','data':%s}", others[i].type, others[i].data);
            const char *backup = BACKUP("s", "t", "j", ",'bitmap':'b','bitmap-mode':'on-success'");
            events[0] = '\0';
            CHECK(run(g, &err, parse("[%s,%s]", later ? backup : other, later ? other : backup),
                      "grouped") < 0);
            CHECK_TEXT(err, text);
            CHECK(strcmp(events, later ? "j:created j:aborting j:concluded j:null " : "") == 0);
            CHECK(count("b") == 65536 && count("off") == 0 && !dirty_busy(dirty_find(n, "b")));
            CHECK(dirty_enabled(dirty_find(n, "b")) && !dirty_enabled(dirty_find(n, "off")));
            CHECK(!dirty_find(n, "new") && TAILQ_EMPTY(&n->parents) && TAILQ_EMPTY(&t->parents));
        }
    }
    node_unref(n);
    node_unref(t);
    node_unref(o);
}

/* ---- drive-backup and create, on real files ---- */

static char dir[64]; /* of the test that runs; goes with its one file */

static char *temp_path(const char *name)
{
    strcpy(dir, "/tmp/tidemark-unit-XXXXXX");
    CHECK(mkdtemp(dir));
    return xasprintf("%s/%s", dir, name);
}

JOB_TEST(drive_backup_makes_its_target)
{
    CLEANUP(memory_freep) char *path = temp_path("t.img");
    struct error err = ERROR_INIT;
    n = disk(g, "s", 4 * MiB, 0);
    fill_disk(n, 4);
    CHECK(command(g, &err, "drive-backup",
                  parse("{'device':'s','target':'%s','sync':'full','format':'raw',"
                        "'mode':'existing'}",
                        path)) < 0);
    CHECK(strstr(err.text, "No such file"));
    for (int i = 0; i < 2; i++) {
        command_ok(g, "drive-backup",
                   parse("{'device':'s','target':'%s','sync':'top','format':'raw','mode':'%s'}",
                         path, i ? "existing" : "absolute-paths"));
        wait_for("s", "null");
        CHECK(strstr(events, "s:COMPLETED s:"));
        events[0] = '\0';
        FILE *f = fopen(path, "r");
        uint8_t *buf = xcalloc(1, 4 * MiB + 1);
        CHECK(f && fread(buf, 1, 4 * MiB + 1, f) == 4 * MiB);
        CHECK(memcmp(buf, mem_of(n)->bytes, 4 * MiB) == 0);
        fclose(f);
        free(buf);
        fill_disk(n, 5);
    }
    CHECK(unlink(path) == 0 && rmdir(dir) == 0);
    node_unref(n);
}

JOB_TEST(the_create_job_makes_an_image_and_stays)
{
    CLEANUP(memory_freep) char *path = temp_path("c.img");
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *o = parse("{'driver':'file','filename':'%s','size':65536}", path);
    CLEANUP(json_putp) struct json_object *none = parse("{'driver':'null-co','size':65536}");
    CHECK(create_job_start(js, "c", none, &err) < 0);
    CHECK_TEXT(err, "Driver does not support blockdev-create");
    CHECK(create_job_start(js, "c", o, &err) == 0);
    wait_for("c", "concluded");
    CHECK(strcmp(events, "c:created c:running c:waiting c:pending c:concluded ") == 0);
    struct stat st;
    CHECK(stat(path, &st) == 0 && st.st_size == 65536);
    struct json_object *list = jobs_query(js);
    struct json_object *info = json_object_array_get_idx(list, 0);
    CHECK(json_get_int(info, "total-progress", 0) == 1);
    CHECK(json_get_int(info, "current-progress", 0) == 1);
    json_object_put(list);
    list = jobs_query_block(js);
    CHECK(json_object_array_length(list) == 0);
    json_object_put(list);
    verb_ok("c", JOB_VERB_DISMISS);
    CHECK(unlink(path) == 0 && rmdir(dir) == 0);
}

/* ---- where the bitmaps are kept ---- */

static struct {
    struct dirty_store store;
    unsigned calls, bad; /* the call that fails, from 1 */
    struct graph *graph;
    enum { MEDDLE_NOT, REPLACED, HELD } meddle; /* during the next flush, which then fails */
} keeper;

static int keeper_commit(struct dirty_store *st, struct node *const *nodes, size_t count,
                         struct error *err)
{
    return ++keeper.calls == keeper.bad ? error_set(err, EIO, "the keeper is full") : 0;
}

static int keeper_can_add(struct dirty_store *st, struct node *at, const char *name,
                          uint64_t granularity_bytes, struct error *err)
{
    return 0;
}

static int keeper_flush(struct dirty_store *st, struct node *at)
{
    int how = keeper.meddle;
    keeper.meddle = MEDDLE_NOT;
    if (how == REPLACED) {
        run_ok(keeper.graph, parse("[" ON("remove", "new") "]"));
        run_ok(keeper.graph, parse("[" ADD("new") "]"));
    } else if (how == HELD) {
        dirty_set_busy(dirty_find(at, "new"), true);
    }
    return how == MEDDLE_NOT ? 0 : -EIO;
}

/* While the transaction waits for the last flush, others work with what it has added. */
JOB_TEST(what_others_have_made_of_it_stays)
{
    n = disk(g, "s", 4 * MiB, 0);
    keeper.graph = g;
    keeper.bad = 0;
    keeper.store.commit = keeper_commit;
    keeper.store.can_add = keeper_can_add;
    keeper.store.flush = keeper_flush;
    dirty_set_store(g, &keeper.store);
    for (keeper.meddle = REPLACED; keeper.meddle <= HELD; keeper.meddle++) {
        int how = keeper.meddle;
        run_fails(g, "Failed to flush node 's': Input/output error",
                  parse("[{'type':'block-dirty-bitmap-add','data':{'node':'s','name':'new',"
                        "'persistent':true}}," ADD("other") "]"));
        CHECK(!dirty_find(n, "other"));
        struct dirty_bitmap *bm = dirty_find(n, "new");
        CHECK(bm && dirty_inconsistent(bm) == (how == HELD));
        dirty_set_busy(bm, false);
        dirty_release(bm);
        keeper.meddle = how;
    }
    keeper.meddle = MEDDLE_NOT;
    keeper.store.flush = NULL;
    dirty_set_store(g, NULL);
    node_unref(n);
}

/* The transaction's own commit fails, or the one that gives the bitmap its base. */
JOB_TEST(what_cannot_be_kept_has_not_happened)
{
    CLEANUP(memory_freep) char *path = temp_path("t.img");
    struct stat st;
    n = disk(g, "s", 4 * MiB, 0);
    struct node *t = disk(g, "t", 4 * MiB, 0);
    run_ok(g, parse("[" ADD("b") "]"));
    mark("b", 5);
    keeper.store.commit = keeper_commit;
    dirty_set_store(g, &keeper.store);
    for (int grouped = 0; grouped < 2; grouped++) {
        for (keeper.bad = 1; keeper.bad <= 2; keeper.bad++) {
            struct error err = ERROR_INIT;
            if (grouped && keeper.bad == 2)
                continue; /* nothing in it has to be settled */
            keeper.calls = 0;
            events[0] = '\0';
            struct json_object *actions = json_object_new_array();
            if (!grouped) {
                json_object_array_add(actions, parse(ON("clear", "b")));
                json_object_array_add(actions, parse(ADD("new")));
            }
            json_object_array_add(
                actions, parse("{'type':'blockdev-backup','data':{'device':'s','target':'t',"
                               "'sync':'full','speed':1,'job-id':'j'}}"));
            json_object_array_add(actions,
                                  parse("{'type':'drive-backup','data':{'device':'s','target':'%s',"
                                        "'format':'raw','sync':'full','speed':1,'job-id':'k'}}",
                                        path));
            CHECK(run(g, &err, actions, grouped ? "grouped" : NULL) < 0);
            CHECK_TEXT(err, "the keeper is full");
            CHECK(keeper.calls > keeper.bad); /* what holds was said again */
            CLEANUP(json_putp) struct json_object *jobs = jobs_query(js);
            CHECK(json_object_array_length(jobs) == 0);
            CHECK(bitmap_get(dirty_bits(dirty_find(n, "b")), 5) && !dirty_busy(dirty_find(n, "b")));
            CHECK(!dirty_inconsistent(dirty_find(n, "b")));
            CHECK(!dirty_find(n, "new") && dirty_first(n) == dirty_find(n, "b"));
            CHECK(stat(path, &st) < 0);
            CHECK(!!strstr(events, "k:running") == (keeper.bad == 2));
        }
    }
    CHECK(rmdir(dir) == 0);
    dirty_set_store(g, NULL);
    node_unref(n);
    node_unref(t);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(single_commands_are_transactions_of_one),
    cmocka_unit_test(each_action_sees_those_before_it),
    cmocka_unit_test(what_fails_has_changed_nothing),
    cmocka_unit_test(a_guests_marks_survive_an_undone_clear),
    cmocka_unit_test(a_chain_starts_with_no_write_lost_or_doubled),
    cmocka_unit_test(a_backup_on_a_copy_of_many_bitmaps),
    cmocka_unit_test(a_merge_that_fails_changes_nothing),
    cmocka_unit_test(all_disks_have_one_instant),
    cmocka_unit_test(a_backup_that_cannot_be_prepared_undoes_those_before_it),
    cmocka_unit_test(a_group_ends_together),
    cmocka_unit_test(a_group_takes_jobs_only),
    cmocka_unit_test(drive_backup_makes_its_target),
    cmocka_unit_test(what_others_have_made_of_it_stays),
    cmocka_unit_test(what_cannot_be_kept_has_not_happened),
    cmocka_unit_test(the_create_job_makes_an_image_and_stays),
};

UNIT_MAIN(tests)
