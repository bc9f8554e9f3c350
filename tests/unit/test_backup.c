/* The backup job: the instant under load, the three sets, QEMU's texts, errors that stop, backups
 * of one node that stack and end together. The table of outcomes is in test_outcomes.c. */
#include "jobutil.h"

#include "job/mirror.h"

enum { SIZE = 4 * 1024 * 1024 };

static struct node *s, *t;

static void two_disks(struct graph *g, uint64_t size, uint64_t cluster)
{
    s = disk(g, "s", size, 0);
    t = disk(g, "t", size, cluster);
}

static void close_disks(void)
{
    node_unref(steal(s));
    node_unref(steal(t));
}

static struct dirty_bitmap *bitmap_on_s(struct graph *g, const char *name, unsigned granularity)
{
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'s','name':'%s','granularity':%u}", name, granularity));
    return dirty_find(s, name);
}

static void write_at(struct edge *e, uint64_t start, uint64_t length, uint8_t value)
{
    uint8_t *buf = xcalloc(1, length);
    memset(buf, value, length);
    CHECK(edge_write(e, range_make(start, length), buf, 0) == 0);
    free(buf);
}

/* ---- the instant, under load ---- */

static void backup_under_writes(struct graph *g, uint64_t size, uint64_t cluster, bool incremental,
                                uint64_t seed)
{
    struct guest guests[3];
    uint8_t *then = xcalloc(1, size), *before = xcalloc(1, size);
    two_disks(g, size, cluster);
    fill_disk(s, seed);
    memcpy(mem_of(t)->bytes, mem_of(s)->bytes, size); /* the last backup, when incremental */
    mem_of(s)->yields = 2;
    mem_of(t)->yields = 4;
    struct dirty_bitmap *bm = bitmap_on_s(g, "b", 65536);
    SCOPE(tasks);
    for (int i = 0; i < 3; i++)
        guest_on(&guests[i], s, seed * 3 + i);
    /* Changes before the start belong to the increment. */
    write_at(guests[0].edge, 3 * 65536 + 512, 512, 0x5a);
    write_at(guests[0].edge, size - 512, 512, 0xa5);
    if (!incremental)
        memset(mem_of(t)->bytes, 0xee, size);

    for (int i = 0; i < 3; i++)
        scope_spawn(&tasks, guest_task, &guests[i]);
    turns(5);
    /* What has completed before must be in; what begins after must not. The command takes the
     * instant with guests in full flight, so only the job's own view is exact: its start. */
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *data =
        parse("{'device':'s','target':'t','job-id':'j','sync':'%s','bitmap':'b'"
              "%s,'x-perf':{'max-workers':%d}}",
              incremental ? "incremental" : "full",
              incremental ? "" : ",'bitmap-mode':'on-success'", 1 + (int)(seed % 9));
    graph_quiesce_begin(g, &s, 1); /* nested: the transaction's instant is this one */
    memcpy(then, mem_of(s)->bytes, size);
    int r = transaction_run_one(g, js, "blockdev-backup", data, &err);
    CHECK_OK(r, err);
    CHECK(dirty_busy(bm));
    graph_quiesce_end(g, &s, 1);

    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:concluded"));
    CHECK(memcmp(then, mem_of(t)->bytes, size) == 0);
    for (int i = 0; i < 3; i++) {
        guests[i].stop = true;
        CHECK(guests[i].failed == 0);
    }
    CHECK(scope_join(&tasks) == 0);
    /* Everything written since the instant is in the bitmap. */
    CHECK(!dirty_busy(bm) && dirty_enabled(bm));
    for (uint64_t i = 0; i < size; i++)
        CHECK(then[i] == mem_of(s)->bytes[i] || bitmap_get(dirty_bits(bm), i));
    for (int i = 0; i < 3; i++)
        edge_detach(guests[i].edge);
    free(then);
    free(before);
    close_disks();
    events[0] = '\0';
}

JOB_TEST(a_backup_is_the_disk_at_its_instant)
{
    for (uint64_t seed = 1; seed < 8; seed++) {
        backup_under_writes(g, SIZE, 0, false, seed);
        backup_under_writes(g, SIZE, 65536, true, seed);
        backup_under_writes(g, SIZE + 512 * 7, 2 * MiB, false, seed);
        backup_under_writes(g, SIZE + 512 * 7, 2 * MiB, true, seed);
    }
}

/* ---- what counts as achieved (the table of outcomes is in test_outcomes.c) ---- */

/* A failed job with `always` flushes the target, then the source. What a guest makes the filter
 * save after the target's flush is not durable there, so it remains. */
JOB_TEST(what_guests_save_while_a_failed_job_flushes_remains)
{
    struct guest gu;
    struct event hold;
    event_init(&hold);
    two_disks(g, SIZE, 65536);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    struct dirty_bitmap *bm = bitmap_on_s(g, "b", 4096);
    guest_on(&gu, s, 1);
    write_at(gu.edge, 0, MiB, 0x22);
    mem_of(t)->bad_write = range_make(5 * 65536, 65536);
    mem_of(t)->write_errno = EIO;
    mem_of(s)->hold_flush = &hold;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'bitmap','bitmap':'b',"
                     "'bitmap-mode':'always','x-perf':{'max-workers':1,'max-chunk':65536}}"));
    for (int i = 0; !mem_of(s)->holding; i++) {
        CHECK(i < 5000);
        turns(1);
    }
    CHECK(mem_of(t)->flushes == 1);
    write_at(gu.edge, 10 * 65536, 512, 0x33);
    CHECK(mem_of(t)->bytes[10 * 65536 + 8192] == 0x22 && mem_of(t)->flushes == 1);
    event_set(&hold);
    wait_for("j", "null");
    CHECK(bitmap_count_range(dirty_bits(bm), range_make(0, 5 * 65536)) == 0);
    CHECK(bitmap_count_range(dirty_bits(bm), range_make(5 * 65536, 11 * 65536)) == 11 * 65536);
    mem_of(s)->hold_flush = NULL;
    edge_detach(gu.edge);
    close_disks();
}

/* ---- what is refused, in QEMU's words ---- */

static void refused(struct graph *g, const char *text, struct json_object *data)
{
    struct error err = ERROR_INIT;
    CHECK(command(g, &err, "blockdev-backup", data) < 0);
    CHECK_TEXT(err, text);
}

JOB_TEST(of_forty_combinations_twelve_are_accepted)
{
    static const char *const syncs[] = {"full", "top", "none", "incremental", "bitmap"};
    static const char *const modes[] = {"", "on-success", "always", "never"};
    int accepted = 0;
    two_disks(g, SIZE, 65536);
    bitmap_on_s(g, "b", 65536);
    for (int i = 0; i < 5 * 2 * 4; i++) {
        bool bitmap = i & 1;
        struct json_object *data =
            parse("{'device':'s','target':'t','job-id':'j','sync':'%s','auto-finalize':false}",
                  syncs[i / 8]);
        if (bitmap)
            json_add_string(data, "bitmap", "b");
        if (i / 2 % 4)
            json_add_string(data, "bitmap-mode", modes[i / 2 % 4]);
        struct error err = ERROR_INIT;
        if (command(g, &err, "blockdev-backup", data) == 0) {
            accepted++;
            verb_ok("j", JOB_VERB_CANCEL);
            wait_for("j", "null");
            events[0] = '\0';
        }
        CHECK(!dirty_busy(dirty_find(s, "b")));
        CHECK(!dirty_next(dirty_first(s)));
    }
    CHECK(accepted == 12);
#define START "{'device':'s','target':'t','job-id':'j',"
    refused(g, "must provide a valid bitmap name for 'incremental' sync mode",
            parse(START "'sync':'incremental'}"));
    refused(g, "must provide a valid bitmap name for 'bitmap' sync mode",
            parse(START "'sync':'bitmap','bitmap-mode':'never'}"));
    refused(g, "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            parse(START "'sync':'incremental','bitmap':'b','bitmap-mode':'always'}"));
    refused(g, "Bitmap 'x' could not be found",
            parse(START "'sync':'bitmap','bitmap':'x','bitmap-mode':'always'}"));
    refused(g, "Bitmap sync mode must be given when providing a bitmap",
            parse(START "'sync':'bitmap','bitmap':'b'}"));
    refused(g, "sync mode 'none' does not produce meaningful bitmap outputs",
            parse(START "'sync':'none','bitmap':'b','bitmap-mode':'always'}"));
    refused(g,
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
            parse(START "'sync':'full','bitmap':'b','bitmap-mode':'never'}"));
    refused(g, "Cannot specify bitmap sync mode without a bitmap",
            parse(START "'sync':'full','bitmap-mode':'never'}"));
    refused(g, "Source and target cannot be the same",
            parse("{'device':'s','target':'s','job-id':'j','sync':'full'}"));
    refused(g, "Cannot find device='x' nor node-name='x'",
            parse("{'device':'x','target':'s','job-id':'j','sync':'full'}"));
    refused(g, "max-workers must be between 1 and 2147483647",
            parse(START "'sync':'full','x-perf':{'max-workers':0}}"));
    refused(g, "max-chunk must be zero (which means no limit) or positive",
            parse(START "'sync':'full','x-perf':{'max-chunk':-1}}"));
    refused(g, "Required max-chunk (4096) is less than backup cluster size (65536)",
            parse(START "'sync':'full','x-perf':{'max-chunk':4096}}"));
    refused(g, "Invalid job ID '1'",
            parse("{'device':'s','target':'t','job-id':'1','sync':'full'}"));
    refused(g, "Parameter 'speed' expects a non-negative value",
            parse(START "'sync':'full','speed':-1}"));
    CLEANUP(node_unrefp) struct node *small = disk(g, "small", MiB, 0);
    refused(g, "Source and target image have different sizes",
            parse("{'device':'s','target':'small','job-id':'j','sync':'bitmap','bitmap':'b',"
                  "'bitmap-mode':'always'}"));
    CHECK(!dirty_busy(dirty_find(s, "b")) && !dirty_next(dirty_first(s)));
    dirty_set_readonly(dirty_find(s, "b"), true);
    refused(g, "Bitmap 'b' is readonly and cannot be modified",
            parse(START "'sync':'bitmap','bitmap':'b','bitmap-mode':'always'}"));
    dirty_set_readonly(dirty_find(s, "b"), false);
    dirty_set_busy(dirty_find(s, "b"), true);
    refused(g, "Bitmap 'b' is currently in use by another operation and cannot be used",
            parse(START "'sync':'bitmap','bitmap':'b','bitmap-mode':'never'}"));
    dirty_set_busy(dirty_find(s, "b"), false);
    close_disks();
}

JOB_TEST(a_backup_keeps_others_away_from_its_nodes)
{
    two_disks(g, SIZE, 65536);
    CLEANUP(node_unrefp) struct node *u = disk(g, "u", SIZE, 0);
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','sync':'none','filter-node-name':'f'}"));
    refused(g, "Node 't' is busy: block device is in use by block job: backup",
            parse("{'device':'s','target':'t','job-id':'k','sync':'none'}"));
    refused(g, "Node 't' is busy: block device is in use by block job: backup",
            parse("{'device':'t','target':'u','job-id':'k','sync':'none'}"));
    refused(g, "Node 'f' is busy: block device is in use by block job: backup",
            parse("{'device':'f','target':'u','job-id':'k','sync':'none'}"));
    refused(g, "Job ID 's' already in use", parse("{'device':'s','target':'u','sync':'none'}"));
    refused(g, "Could not create node: Duplicate nodes with node-name='f'",
            parse("{'device':'s','target':'u','job-id':'k','sync':'none','filter-node-name':'f'}"));
    struct error err = ERROR_INIT;
    CHECK(jobs_do(js, "s", JOB_VERB_COMPLETE, &err) < 0);
    CHECK_TEXT(err, "Job 's' in state 'running' cannot accept command verb 'complete'");
    verb_ok("s", JOB_VERB_CANCEL);
    wait_for("s", "null");
    CHECK(graph_find(g, "f") == NULL);
    close_disks();
}

/* ---- while it runs ---- */

JOB_TEST(queries_show_the_three_sets)
{
    struct guest gu;
    two_disks(g, SIZE, 65536);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    bitmap_on_s(g, "b", 65536);
    guest_on(&gu, s, 1);
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':1,"
                     "'bitmap':'b','bitmap-mode':'on-success','filter-node-name':'f'}"));
    turns(100);
    write_at(gu.edge, 3 * MiB, 512, 0x22);
    struct json_object *list = dirty_info(s);
    CHECK(json_object_array_length(list) == 3);
    struct json_object *remaining = json_object_array_get_idx(list, 0);
    struct json_object *successor = json_object_array_get_idx(list, 1);
    struct json_object *user = json_object_array_get_idx(list, 2);
    CHECK(!json_has(remaining, "name") && !json_get_bool(remaining, "recording", true));
    CHECK(json_get_int(remaining, "count", 0) == SIZE - MiB - 65536);
    CHECK(!json_has(successor, "name") && json_get_bool(successor, "recording", false));
    CHECK(json_get_int(successor, "count", 0) == 65536);
    CHECK(json_get_bool(user, "busy", false) && json_get_bool(user, "recording", false));
    json_object_put(list);
    list = dirty_info(graph_find(g, "f"));
    CHECK(json_object_array_length(list) == 2);
    CHECK(json_get_int(json_object_array_get_idx(list, 0), "count", 0) == SIZE);
    CHECK(json_get_int(json_object_array_get_idx(list, 1), "count", 0) == 65536);
    json_object_put(list);
    list = jobs_query_block(js);
    struct json_object *info = json_object_array_get_idx(list, 0);
    CHECK(json_get_int(info, "offset", 0) == MiB + 65536 && json_get_int(info, "len", 0) == SIZE);
    CHECK(strcmp(json_get_string(info, "status", ""), "running") == 0);
    json_object_put(list);

    verb_ok("j", JOB_VERB_PAUSE);
    wait_for("j", "paused");
    write_at(gu.edge, 3 * MiB + 65536, 512, 0x22); /* guests go on */
    verb_ok("j", JOB_VERB_RESUME);
    CHECK(jobs_set_speed(js, "j", 0, NULL) == 0);
    wait_for("j", "null");
    CHECK(strcmp(events, "j:created j:running j:paused j:running j:waiting j:pending j:COMPLETED "
                         "j:concluded j:null ") == 0);
    CHECK(mem_of(t)->bytes[3 * MiB] == 0x11);
    edge_detach(gu.edge);
    close_disks();
}

JOB_TEST(an_error_stops_the_job_until_it_is_resumed)
{
    struct guest gu;
    two_disks(g, SIZE, 65536);
    fill_disk(s, 7);
    uint8_t *then = xcalloc(1, SIZE);
    memcpy(then, mem_of(s)->bytes, SIZE);
    guest_on(&gu, s, 1);
    mem_of(t)->bad_write = range_make(2 * MiB, 65536);
    mem_of(t)->write_errno = ENOSPC;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full',"
                     "'on-target-error':'enospc','auto-dismiss':false}"));
    wait_for("j", "paused");
    CHECK(strstr(events, "j:ERROR(write stop) j:paused"));
    struct json_object *list = jobs_query_block(js);
    struct json_object *info = json_object_array_get_idx(list, 0);
    CHECK(strcmp(json_get_string(info, "io-status", ""), "nospace") == 0);
    CHECK(json_get_bool(info, "paused", false));
    json_object_put(list);
    write_at(gu.edge, 0, 65536, 0x99);
    mem_of(t)->bad_write = range_make(0, 0);
    verb_ok("j", JOB_VERB_RESUME);
    wait_for("j", "concluded");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(memcmp(then, mem_of(t)->bytes, SIZE) == 0);
    verb_ok("j", JOB_VERB_DISMISS);
    events[0] = '\0';

    /* ignore: tried again at once; report: fails. */
    memset(mem_of(s)->bytes + MiB, 0x44, 65536);
    mem_of(s)->bad_read = range_make(MiB, 512);
    mem_of(s)->read_errno = EIO;
    mem_of(s)->bad_times = 3;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full',"
                     "'on-source-error':'ignore'}"));
    wait_for("j", "null");
    CHECK(strstr(events, "j:ERROR(read ignore)") && strstr(events, "j:COMPLETED j:"));
    events[0] = '\0';
    mem_of(s)->bad_times = -1;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    wait_for("j", "null");
    CHECK(strcmp(events, "j:created j:running j:ERROR(read report) j:aborting "
                         "j:COMPLETED(Input/output error) j:concluded j:null ") == 0);
    free(then);
    edge_detach(gu.edge);
    close_disks();
}

static int write_once(void *arg)
{
    struct guest *gu = arg;
    uint8_t buf[512];
    memset(buf, 0x77, sizeof buf);
    CHECK(edge_write(gu->edge, range_make(65536 * 3, sizeof buf), buf, 0) == 0);
    gu->done++;
    return 0;
}

/* A target that does not answer for an hour. Cancelling does not wait for it, and the guest whose
 * old data was to be saved there writes. */
JOB_TEST(a_target_that_hangs_is_given_up)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    for (int m = 0; m < 3; m++) {
        struct guest gu;
        struct node *over = NULL;
        struct error err = ERROR_INIT;
        SCOPE(writer);
        s = disk(g, "s", SIZE, 0);
        t = disk(g, "t", SIZE, 0);
        CLEANUP(json_putp)
        struct json_object *slow =
            parse("{'driver':'blkdebug','node-name':'over','image':'t','x-tidemark-delay':"
                  "[{'event':'none','iotype':'write','delay-ns':3600000000000}]}");
        int r = graph_open(g, slow, &over, &err);
        CHECK_OK(r, err);
        memset(mem_of(s)->bytes, 0x42, SIZE);
        command_ok(g, "block-dirty-bitmap-add",
                   parse("{'node':'s','name':'b','granularity':65536}"));
        struct dirty_bitmap *bm = dirty_find(s, "b");
        guest_on(&gu, s, 1);
        CHECK(edge_write(gu.edge, range_make(65536 * 5, 65536), mem_of(s)->bytes, 0) == 0);
        CHECK(edge_write(gu.edge, range_make(65536 * 3, 65536), mem_of(s)->bytes, 0) == 0);
        command_ok(g, "blockdev-backup",
                   parse("{'device':'s','target':'over','job-id':'j','sync':'bitmap','bitmap':'b',"
                         "'bitmap-mode':'%s','on-target-error':'stop'}",
                         modes[m]));
        turns(20);
        scope_spawn(&writer, write_once, &gu);
        turns(20);
        CHECK(over->inside && !gu.done);
        verb_ok("j", JOB_VERB_CANCEL);
        wait_for("j", "null");
        CHECK(strstr(events, "j:aborting j:CANCELLED j:concluded") && !strstr(events, "ERROR"));
        CHECK(scope_join(&writer) == 0);
        CHECK(gu.done == 1 && !gu.failed && mem_of(s)->bytes[65536 * 3] == 0x77);
        CHECK(!over->inside && !over->cancelled);
        CHECK(bitmap_count(dirty_bits(bm)) == 2 * 65536); /* nothing was achieved */
        edge_detach(gu.edge);
        node_unref(over);
        node_unref(steal(s));
        node_unref(steal(t));
        events[0] = '\0';
    }
}

JOB_TEST(a_guests_write_that_could_not_be_saved_is_not_in_the_backup)
{
    struct guest gu;
    two_disks(g, SIZE, 65536);
    fill_disk(s, 7);
    uint8_t *then = xcalloc(1, SIZE), buf[512] = {1};
    memcpy(then, mem_of(s)->bytes, SIZE);
    guest_on(&gu, s, 1);
    mem_of(t)->bad_write = range_make(3 * MiB, 65536);
    mem_of(t)->write_errno = EIO;
    mem_of(t)->bad_times = 1;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':1}"));
    turns(50);
    CHECK(edge_write(gu.edge, range_make(3 * MiB, 512), buf, 0) == -EIO);
    CHECK(jobs_set_speed(js, "j", 0, NULL) == 0);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:"));
    CHECK(memcmp(then, mem_of(t)->bytes, SIZE) == 0);
    free(then);
    edge_detach(gu.edge);
    close_disks();
}

/* ---- two of one node ---- */

JOB_TEST(two_backups_of_one_node_have_their_own_instants)
{
    struct guest guests[2];
    two_disks(g, SIZE, 65536);
    CLEANUP(node_unrefp) struct node *u = disk(g, "u", SIZE, 2 * MiB);
    uint8_t *first = xcalloc(1, SIZE), *second = xcalloc(1, SIZE);
    SCOPE(tasks);
    fill_disk(s, 3);
    mem_of(s)->yields = mem_of(t)->yields = mem_of(u)->yields = 3;
    for (int i = 0; i < 2; i++) {
        guest_on(&guests[i], s, 30 + i);
        scope_spawn(&tasks, guest_task, &guests[i]);
    }
    for (int i = 0; i < 2; i++) {
        graph_quiesce_begin(g, &s, 1);
        memcpy(i ? second : first, mem_of(s)->bytes, SIZE);
        command_ok(g, "blockdev-backup",
                   parse("{'device':'s','target':'%s','job-id':'j%d','sync':'full','x-perf':"
                         "{'max-workers':2,'max-chunk':%d}}",
                         i ? "u" : "t", i, i ? 2097152 : 65536));
        graph_quiesce_end(g, &s, 1);
        turns(20);
    }
    wait_for("j0", "null");
    wait_for("j1", "null");
    guests[0].stop = guests[1].stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(memcmp(first, second, SIZE) != 0);
    CHECK(memcmp(first, mem_of(t)->bytes, SIZE) == 0);
    CHECK(memcmp(second, mem_of(u)->bytes, SIZE) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(guests[i].failed == 0 && guests[i].edge->node == s);
        edge_detach(guests[i].edge);
    }
    free(first);
    free(second);
    close_disks();
}

JOB_TEST(two_jobs_of_one_node_end_close_together)
{
    struct guest gu;
    two_disks(g, SIZE, 65536);
    CLEANUP(node_unrefp) struct node *u = disk(g, "u", SIZE, 65536);
    mem_of(s)->yields = mem_of(t)->yields = mem_of(u)->yields = 2;
    guest_on(&gu, s, 4);
    SCOPE(tasks);
    scope_spawn(&tasks, guest_task, &gu);
    for (int round = 0; round < 50; round++) {
        bool cancel = round % 3 == 0;
        for (int i = 0; i < 2; i++)
            command_ok(g, "blockdev-backup",
                       parse("{'device':'s','target':'%s','job-id':'j%d','sync':'%s'}",
                             i ? "u" : "t", i, cancel ? "none" : "full"));
        turns(round % 11);
        if (cancel) {
            verb_ok(round % 2 ? "j0" : "j1", JOB_VERB_CANCEL);
            turns(round % 5);
            verb_ok(round % 2 ? "j1" : "j0", JOB_VERB_CANCEL);
        }
        wait_for("j0", "null");
        wait_for("j1", "null");
        events[0] = '\0';
        for (struct node *n = graph_first(g); n; n = graph_next(n))
            CHECK(n == s || n == t || n == u);
    }
    gu.stop = true;
    CHECK(scope_join(&tasks) == 0);
    CHECK(gu.failed == 0);
    edge_detach(gu.edge);
    close_disks();
}

/* Its filter is a node like others, and somebody may keep a bitmap there: that goes with it. */
JOB_TEST(a_bitmap_of_the_filter_goes_with_it)
{
    for (int mirror = 0; mirror < 2; mirror++) {
        struct guest gu;
        struct error err = ERROR_INIT;
        two_disks(g, SIZE, 0);
        guest_on(&gu, s, 1);
        CLEANUP(json_putp)
        struct json_object *args = parse("{'device':'s','target':'t','job-id':'j','sync':'full',"
                                         "'filter-node-name':'f','auto-finalize':false}");
        int r = mirror ? mirror_blockdev(js, args, &err)
                       : transaction_run_one(g, js, "blockdev-backup", args, &err);
        CHECK_OK(r, err);
        command_ok(g, "block-dirty-bitmap-add", parse("{'node':'f','name':'b'}"));
        write_at(gu.edge, 0, 512, 0x31);
        CHECK(bitmap_get(dirty_bits(dirty_find(gu.edge->node, "b")), 0));
        verb_ok("j", JOB_VERB_CANCEL);
        wait_for("j", "null");
        CHECK(!graph_find(g, "f") && gu.edge->node == s);
        edge_detach(gu.edge);
        close_disks();
        events[0] = '\0';
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_backup_is_the_disk_at_its_instant),
    cmocka_unit_test(what_guests_save_while_a_failed_job_flushes_remains),
    cmocka_unit_test(of_forty_combinations_twelve_are_accepted),
    cmocka_unit_test(a_backup_keeps_others_away_from_its_nodes),
    cmocka_unit_test(queries_show_the_three_sets),
    cmocka_unit_test(a_target_that_hangs_is_given_up),
    cmocka_unit_test(an_error_stops_the_job_until_it_is_resumed),
    cmocka_unit_test(a_guests_write_that_could_not_be_saved_is_not_in_the_backup),
    cmocka_unit_test(two_backups_of_one_node_have_their_own_instants),
    cmocka_unit_test(two_jobs_of_one_node_end_close_together),
    cmocka_unit_test(a_bitmap_of_the_filter_goes_with_it),
};

UNIT_MAIN(tests)
