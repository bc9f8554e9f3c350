/* The mirror job: its events, cancelling, errors, verbs, QEMU's and Proxmox's texts. */
#include "mirrorutil.h"

/* ---- a disk at rest ---- */

JOB_TEST(events_are_qemus)
{
    two_disks(g, SIZE, 0);
    fill_disk(s, 5);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    wait_for("j", "READY");
    CHECK(strcmp(events, "j:created j:running j:ready j:READY ") == 0);
    CHECK(same(SIZE) && s->refs > 1);
    verb_ok("j", JOB_VERB_PAUSE);
    wait_for("j", "standby");
    verb_ok("j", JOB_VERB_RESUME);
    turns(20);
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strcmp(events,
                 "j:created j:running j:ready j:READY j:standby j:ready j:waiting j:pending "
                 "j:COMPLETED j:concluded j:null ") == 0);
    CHECK(mem_of(t)->flushes >= 1);
    close_disks();
}

JOB_TEST(cancelling)
{
    struct guest gu;
    struct event hold;
    two_disks(g, SIZE, 0);
    guest_on(&gu, s, 1);
    fill_disk(s, 6);

    /* before it is ready: by force, whatever was said */
    event_init(&hold);
    mem_of(t)->hold = &hold;
    mem_of(t)->held = range_make(0, SIZE);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    turns(20);
    cancel_softly("j");
    event_set(&hold);
    wait_for("j", "null");
    CHECK(strstr(events, "j:running j:aborting j:CANCELLED j:concluded j:null"));
    mem_of(t)->hold = NULL;
    events[0] = '\0';

    /* after it: without force it completes, and nobody moves */
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    wait_for("j", "READY");
    write_at(gu.edge, 1000 * 512, 512, 0x77);
    cancel_softly("j");
    wait_for("j", "null");
    CHECK(strstr(events, "j:waiting j:pending j:COMPLETED j:concluded j:null"));
    CHECK(same(SIZE) && gu.edge->node == s);
    events[0] = '\0';

    /* by force: as if it had not been issued */
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    wait_for("j", "READY");
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    CHECK(strstr(events, "j:aborting j:CANCELLED j:concluded j:null"));
    events[0] = '\0';

    /* while it is pending */
    mirror_ok(
        parse("{'device':'s','target':'t','job-id':'j','sync':'full','auto-finalize':false}"));
    wait_for("j", "READY");
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "PENDING");
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    CHECK(strstr(events, "j:PENDING j:aborting j:CANCELLED"));
    CHECK(gu.edge->node == s);
    edge_detach(gu.edge);
    CHECK(TAILQ_EMPTY(&s->parents) && TAILQ_EMPTY(&t->parents) && !dirty_first(s));
    close_disks();
}

static int one_write(void *arg)
{
    struct guest *gu = arg;
    write_at(gu->edge, 65536 * 3, 65536, 0x99);
    gu->done++;
    return 0;
}

enum hang { HANGS_AT_ONCE, HANGS_ZEROED, HANGS_FOLLOWING, HANGS_ENDING, HANGS_GUEST, HANGS };

/* A target that does not answer for an hour: cancelling by force does not wait for it, and no guest
 * does any longer. */
JOB_TEST(a_target_that_hangs_is_given_up)
{
    for (int how = 0; how < HANGS; how++) {
        struct guest gu;
        SCOPE(writer);
        two_disks(g, SIZE, 0);
        memset(mem_of(s)->bytes, how == HANGS_ZEROED ? 0 : 0x11, SIZE);
        struct dirty_bitmap *bm = bitmap_on_s(g, 65536);
        guest_on(&gu, s, 1);
        write_at(gu.edge, 65536 * 5, 512, 0x12);
        struct node *over = open_node(
            g, parse("{'driver':'blkdebug','node-name':'over','image':'t','discard':'unmap',"
                     "'x-tidemark-delay':[{'event':'%s','iotype':'%s','delay-ns':3600000000000}]}",
                     how == HANGS_AT_ONCE || how == HANGS_ZEROED ? "none" : "l2_load",
                     how == HANGS_ZEROED ? "write-zeroes" : "write"));
        mirror_ok(parse("{'device':'s','target':'over','job-id':'j','on-target-error':'stop',%s,"
                        "'copy-mode':'%s'}",
                        how == HANGS_ZEROED || how == HANGS_GUEST
                            ? "'sync':'full'"
                            : "'sync':'bitmap','bitmap':'b','bitmap-mode':'always'",
                        how == HANGS_GUEST ? "write-blocking" : "background"));
        if (how != HANGS_AT_ONCE && how != HANGS_ZEROED) {
            wait_for("j", "READY");
            turns(20);
            node_debug_event(over, DEBUG_l2_load); /* from now on it hangs */
            scope_spawn(&writer, one_write, &gu);
            if (how == HANGS_FOLLOWING)
                CHECK(sleep_until(clock_after_ns(200000000)) == 0); /* it is lazy when idle */
            turns(50);
            CHECK(gu.done == (how != HANGS_GUEST));
            if (how == HANGS_ENDING)
                verb_ok("j", JOB_VERB_COMPLETE);
        }
        turns(50);
        CHECK(over->inside > 0);
        verb_ok("j", JOB_VERB_CANCEL);
        wait_for("j", "null");
        CHECK(strstr(events, "j:aborting j:CANCELLED j:concluded j:null"));
        CHECK(!strstr(events, "ERROR")); /* it is no failure of the target's */
        CHECK(scope_join(&writer) == 0);
        CHECK(gu.edge->node == s && !over->inside && !over->cancelled && !t->cancelled);
        if (how == HANGS_AT_ONCE)
            CHECK(bitmap_any(dirty_bits(bm), range_make(65536 * 5, 512)));
        else if (how != HANGS_ZEROED)
            CHECK(mem_of(s)->bytes[65536 * 3] == 0x99 &&
                  bitmap_any(dirty_bits(bm), range_make(65536 * 3, 512)));
        edge_detach(gu.edge);
        node_unref(over);
        close_disks();
    }
}

static int finalize(void *arg)
{
    verb_ok(arg, JOB_VERB_FINALIZE);
    return 0;
}

/* In the last step guests wait for the target. If it hangs, they are not left waiting for ever. */
JOB_TEST(a_target_that_hangs_at_the_end)
{
    for (int how = 0; how < 2; how++) {
        struct guest gu;
        struct error err = ERROR_INIT;
        SCOPE(others);
        two_disks(g, SIZE, 0);
        struct dirty_bitmap *bm = bitmap_on_s(g, 65536);
        guest_on(&gu, s, 1);
        struct node *over = open_node(
            g, parse("{'driver':'blkdebug','node-name':'over','image':'t','discard':'unmap',"
                     "'x-tidemark-delay':[{'event':'l2_load','iotype':'write','delay-ns':"
                     "3600000000000}]}"));
        mirror_ok(parse("{'device':'s','target':'over','job-id':'j','sync':'incremental','bitmap':"
                        "'b','auto-finalize':false}"));
        wait_for("j", "READY");
        verb_ok("j", JOB_VERB_COMPLETE);
        wait_for("j", "PENDING");
        write_at(gu.edge, 65536 * 5, 512, 0x12);
        node_debug_event(over, DEBUG_l2_load); /* from now on it hangs */
        char id[] = "j";
        scope_spawn(&others, finalize, id);
        turns(20);
        scope_spawn(&others, one_write, &gu);
        turns(50);
        CHECK(over->inside && !gu.done);
        if (how == 0) {
            CHECK(jobs_do(js, "j", JOB_VERB_CANCEL, &err) < 0);
            CHECK_TEXT(err, "Job not found"); /* it has ended meanwhile */
        } else {
            jobs_give_up(js);
        }
        wait_for("j", "null");
        CHECK(strstr(events, "j:PENDING j:aborting j:COMPLETED(Operation canceled) j:concluded"));
        CHECK(scope_join(&others) == 0);
        CHECK(gu.done && gu.edge->node == s && bitmap_count(dirty_bits(bm)) == 2 * 65536);
        edge_detach(gu.edge);
        node_unref(over);
        close_disks();
    }
}

/* Nobody waits while the job is pending, and what is written then is in the target, too. */
JOB_TEST(writes_while_it_is_pending)
{
    for (int blocking = 0; blocking < 2; blocking++) {
        struct guest gu;
        two_disks(g, SIZE, 0);
        guest_on(&gu, s, 1);
        fill_disk(s, 6);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','auto-finalize':"
                        "false,'copy-mode':'%s'}",
                        blocking ? "write-blocking" : "background"));
        wait_for("j", "READY");
        verb_ok("j", JOB_VERB_COMPLETE);
        wait_for("j", "PENDING");
        write_at(gu.edge, 7 * 512, 90 * 512, 0x33);
        write_at(gu.edge, SIZE - 512, 512, 0x34);
        verb_ok("j", JOB_VERB_FINALIZE);
        wait_for("j", "null");
        CHECK(same(SIZE) && gu.edge->node == t && mem_of(t)->bytes[SIZE - 1] == 0x34);
        edge_detach(gu.edge);
        close_disks();
    }
}

JOB_TEST(none_copies_what_is_written)
{
    struct guest gu;
    two_disks(g, SIZE, 0);
    guest_on(&gu, s, 1);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'none','granularity':65536}"));
    wait_for("j", "READY");
    CHECK(all_zero(mem_of(t)->bytes, SIZE));
    write_at(gu.edge, 65536 * 3 + 1024, 512, 0x22);
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(memcmp(mem_of(t)->bytes + 65536 * 3, mem_of(s)->bytes + 65536 * 3, 65536) == 0);
    CHECK(all_zero(mem_of(t)->bytes, 65536 * 3));
    CHECK(all_zero(mem_of(t)->bytes + 65536 * 4, SIZE - 65536 * 4));
    edge_detach(gu.edge);
    close_disks();
}

JOB_TEST(an_empty_disk)
{
    two_disks(g, 0, 0);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    wait_for("j", "READY");
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:concluded"));
    close_disks();
}

/* ---- errors ---- */

JOB_TEST(errors_report_stop_and_ignore)
{
    static const struct {
        const char *args;
        bool read;
        int code;
        const char *event;
    } rows[] = {
        {"'on-target-error':'report'", false, EIO, "j:ERROR(write report) "},
        {"'on-source-error':'report'", true, EIO, "j:ERROR(read report) "},
        {"'on-target-error':'stop'", false, EIO, "j:ERROR(write stop) "},
        {"'on-source-error':'stop'", true, EIO, "j:ERROR(read stop) "},
        {"'on-target-error':'enospc'", false, ENOSPC, "j:ERROR(write stop) "},
        {"'on-target-error':'enospc'", false, EIO, "j:ERROR(write report) "},
        {"'on-target-error':'ignore'", false, EIO, "j:ERROR(write ignore) "},
        {"'on-source-error':'ignore'", true, EIO, "j:ERROR(read ignore) "},
    };
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        two_disks(g, SIZE, 0);
        memset(mem_of(s)->bytes, 0x42, SIZE);
        struct mem *bad = mem_of(rows[i].read ? s : t);
        bad->bad_times = 1;
        bad->bad_read = bad->bad_write = range_make(SIZE / 2, 512);
        bad->read_errno = bad->write_errno = rows[i].code;
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full',%s}", rows[i].args));
        wait_for("j", "ERROR");
        if (!strstr(events, rows[i].event))
            fail_msg("row %zu: %s", i, events);
        if (strstr(rows[i].event, "report")) {
            wait_for("j", "null");
            CHECK(strstr(events, rows[i].code == EIO ? "COMPLETED(Input/output error)" : "?"));
        } else {
            if (strstr(rows[i].event, "stop")) {
                wait_for("j", "paused");
                verb_ok("j", JOB_VERB_RESUME);
            }
            wait_for("j", "READY");
            cancel_softly("j");
            wait_for("j", "null");
            CHECK(same(SIZE));
        }
        CHECK(TAILQ_EMPTY(&s->parents) && TAILQ_EMPTY(&t->parents) && !dirty_first(s));
        close_disks();
    }
}

/* In write-blocking mode the target's failure is the job's, never the guest's. */
JOB_TEST(a_guests_write_survives_a_bad_target)
{
    for (int i = 0; i < 3; i++) {
        static const char *const how[] = {"report", "stop", "ignore"};
        struct guest gu;
        two_disks(g, SIZE, 0);
        guest_on(&gu, s, 1);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','copy-mode':"
                        "'write-blocking','on-target-error':'%s'}",
                        how[i]));
        wait_for("j", "READY");
        mem_of(t)->bad_times = 1;
        mem_of(t)->bad_write = range_make(0, SIZE);
        mem_of(t)->write_errno = EIO;
        write_at(gu.edge, 65536 * 5 + 512, 512, 0x99);
        CHECK(strstr(events, "j:ERROR(write "));
        if (i == 0) {
            wait_for("j", "null");
            CHECK(strstr(events, "COMPLETED(Input/output error)"));
        } else {
            if (i == 1) {
                wait_for("j", "standby");
                write_at(gu.edge, 65536 * 9 + 512, 512, 0x9a);
                verb_ok("j", JOB_VERB_RESUME);
            }
            verb_ok("j", JOB_VERB_COMPLETE);
            wait_for("j", "null");
            CHECK(same(SIZE) && mem_of(t)->bytes[65536 * 5 + 512] == 0x99);
        }
        edge_detach(gu.edge);
        close_disks();
    }
}

JOB_TEST(a_target_that_is_zero_gets_no_zeroes)
{
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes + SIZE / 2, 0x42, 65536);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','target-is-zero':true,"
                    "'granularity':65536}"));
    wait_for("j", "READY");
    CHECK(same(SIZE));
    for (unsigned c = 0; c < CHUNKS; c++)
        CHECK(mem_of(t)->written[c] == (c == CHUNKS / 2));
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    close_disks();
}

/* ---- guests in full flight ---- */

struct load {
    struct guest guests[3];
    struct scope tasks;
};

static void load_begin(struct load *l, uint64_t seed)
{
    scope_init(&l->tasks);
    for (int i = 0; i < 3; i++) {
        guest_on(&l->guests[i], s, seed * 3 + i);
        scope_spawn(&l->tasks, guest_task, &l->guests[i]);
    }
}

static void load_stop(struct load *l)
{
    for (int i = 0; i < 3; i++)
        l->guests[i].stop = true;
    CHECK(scope_join(&l->tasks) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(l->guests[i].failed == 0);
}

static void load_end(struct load *l)
{
    for (int i = 0; i < 3; i++)
        edge_detach(l->guests[i].edge);
    scope_fini(&l->tasks);
}

/* ---- verbs and texts ---- */

JOB_TEST(what_is_refused)
{
    two_disks(g, SIZE, 0);
    struct node *small = disk(g, "small", 65536, 0);
    bitmap_on_s(g, 65536);
#define ARGS "'device':'s','target':'t','job-id':'j'"
    mirror_fails("Cannot find device='x' nor node-name='x'",
                 parse("{'device':'x','target':'t','job-id':'j','sync':'full'}"));
    mirror_fails("Parameter 'granularity' expects a value in range [512B, 64MB]",
                 parse("{" ARGS ",'sync':'full','granularity':511}"));
    mirror_fails("Parameter 'granularity' expects a power of 2",
                 parse("{" ARGS ",'sync':'full','granularity':1025}"));
    mirror_fails("Invalid parameter 'buf-size'", parse("{" ARGS ",'sync':'full','buf-size':-1}"));
    mirror_fails("Parameter 'speed' expects a non-negative value",
                 parse("{" ARGS ",'sync':'full','speed':-1}"));
    mirror_fails("Can't mirror node into itself",
                 parse("{'device':'s','target':'s','job-id':'j','sync':'full'}"));
    mirror_fails("Duplicate nodes with node-name='t'",
                 parse("{" ARGS ",'sync':'full','filter-node-name':'t'}"));
    mirror_fails("Failed to find node with node-name='x'",
                 parse("{" ARGS ",'sync':'full','replaces':'x'}"));
    mirror_fails("Cannot replace 't' by a node mirrored from 's', because it cannot be guaranteed "
                 "that doing so would not lead to an abrupt change of visible data",
                 parse("{" ARGS ",'sync':'full','replaces':'t'}"));
    mirror_fails("Must provide a valid bitmap name for 'bitmap' sync mode",
                 parse("{" ARGS ",'sync':'bitmap'}"));
    mirror_fails("Must provide a valid bitmap name for 'incremental' sync mode",
                 parse("{" ARGS ",'sync':'incremental','bitmap-mode':'never'}"));
    mirror_fails("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
                 parse("{" ARGS ",'sync':'incremental','bitmap':'b','bitmap-mode':'never'}"));
    mirror_fails("Cannot specify bitmap sync mode without a bitmap",
                 parse("{" ARGS ",'sync':'full','bitmap-mode':'never'}"));
    mirror_fails("Sync mode 'full' not supported with bitmap.",
                 parse("{" ARGS ",'sync':'full','bitmap':'b','bitmap-mode':'never'}"));
    mirror_fails("Granularity and bitmap cannot both be set",
                 parse("{" ARGS ",'sync':'bitmap','bitmap':'b','granularity':65536}"));
    mirror_fails("bitmap-mode must be specified if a bitmap is provided",
                 parse("{" ARGS ",'sync':'bitmap','bitmap':'b'}"));
    mirror_fails("Dirty bitmap 'x' not found",
                 parse("{" ARGS ",'sync':'incremental','bitmap':'x'}"));
    events[0] = '\0';
    mirror_ok(parse("{'device':'s','target':'small','job-id':'j','sync':'full'}"));
    wait_for("j", "null");
    CHECK(strcmp(events, "j:created j:running j:aborting "
                         "j:COMPLETED(Source and target image have different sizes) "
                         "j:concluded j:null ") == 0);

    events[0] = '\0';
    mirror_ok(parse("{" ARGS ",'sync':'incremental','bitmap':'b','filter-node-name':'f'}"));
    wait_for("j", "READY");
    mirror_fails("Need a root block node",
                 parse("{'device':'s','target':'small','job-id':'k','sync':'full'}"));
    struct guest gu;
    struct error err = ERROR_INIT;
    guest_on(&gu, graph_find(g, "f"), 1);
    CHECK(edge_freeze(gu.edge, &err) == -EPERM); /* the filter must be able to go */
    CHECK_TEXT(err, "Cannot freeze 'root' link to 'f'");
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    CHECK(!graph_find(g, "f") && gu.edge->node == s);
    edge_detach(gu.edge);
    CHECK(TAILQ_EMPTY(&s->parents) && TAILQ_EMPTY(&t->parents));
    node_unref(small);
    close_disks();
}

/* ---- Proxmox's words: sync, bitmap and bitmap-mode ---- */

enum { NO_BITMAP, MISSING, PRESENT };
#define NAME_BITMAP(sync) "Must provide a valid bitmap name for '" sync "' sync mode"
#define WITHOUT "Cannot specify bitmap sync mode without a bitmap"
#define NOT_WITH(sync) "Sync mode '" sync "' not supported with bitmap."
#define ONLY_ON_SUCCESS "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
#define NO_MODE "bitmap-mode must be specified if a bitmap is provided"
#define NOT_FOUND "Dirty bitmap 'x' not found"

static const struct combination {
    const char *sync;
    int bitmap;
    const char *texts[4]; /* without a mode, on-success, always, never; NULL: taken */
} combinations[] = {
    {"full", NO_BITMAP, {NULL, WITHOUT, WITHOUT, WITHOUT}},
    {"full", MISSING, {NOT_WITH("full"), NOT_WITH("full"), NOT_WITH("full"), NOT_WITH("full")}},
    {"full", PRESENT, {NOT_WITH("full"), NOT_WITH("full"), NOT_WITH("full"), NOT_WITH("full")}},
    {"top", NO_BITMAP, {NULL, WITHOUT, WITHOUT, WITHOUT}},
    {"top", MISSING, {NOT_WITH("top"), NOT_WITH("top"), NOT_WITH("top"), NOT_WITH("top")}},
    {"top", PRESENT, {NOT_WITH("top"), NOT_WITH("top"), NOT_WITH("top"), NOT_WITH("top")}},
    {"none", NO_BITMAP, {NULL, WITHOUT, WITHOUT, WITHOUT}},
    {"none", MISSING, {NOT_WITH("none"), NOT_WITH("none"), NOT_WITH("none"), NOT_WITH("none")}},
    {"none", PRESENT, {NOT_WITH("none"), NOT_WITH("none"), NOT_WITH("none"), NOT_WITH("none")}},
    {"incremental",
     NO_BITMAP,
     {NAME_BITMAP("incremental"), NAME_BITMAP("incremental"), NAME_BITMAP("incremental"),
      NAME_BITMAP("incremental")}},
    {"incremental", MISSING, {NOT_FOUND, NOT_FOUND, ONLY_ON_SUCCESS, ONLY_ON_SUCCESS}},
    {"incremental", PRESENT, {NULL, NULL, ONLY_ON_SUCCESS, ONLY_ON_SUCCESS}},
    {"bitmap",
     NO_BITMAP,
     {NAME_BITMAP("bitmap"), NAME_BITMAP("bitmap"), NAME_BITMAP("bitmap"), NAME_BITMAP("bitmap")}},
    {"bitmap", MISSING, {NO_MODE, NOT_FOUND, NOT_FOUND, NOT_FOUND}},
    {"bitmap", PRESENT, {NO_MODE, NULL, NULL, NULL}},
};

/* One combination by one command; TEXT NULL: it is taken, and then cancelled. */
static void combine(const struct combination *c, const char *mode, bool drive, const char *text)
{
    static const char *const names[] = {NULL, "x", "b"};
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *args =
        parse("{'device':'%s','job-id':'j','sync':'%s'}", node_name(s), c->sync);
    if (names[c->bitmap])
        json_add_string(args, "bitmap", names[c->bitmap]);
    if (mode)
        json_add_string(args, "bitmap-mode", mode);
    json_add_string(args, "target", drive ? "json:{\"driver\":\"raw\",\"file\":\"t\"}" : "t");
    if (drive)
        json_add_string(args, "mode", "existing");
    events[0] = '\0';
    int r = drive ? mirror_drive(js, args, &err) : mirror_blockdev(js, args, &err);
    if (text ? r == 0 || strcmp(err.text, text) != 0 : r < 0)
        fail_msg("%s: '%s' instead of '%s'", json_object_to_json_string(args),
                 r < 0 ? err.text : "taken", text ? text : "taken");
    CHECK(dirty_busy(dirty_find(s, "b")) == (!text && c->bitmap == PRESENT));
    if (!text) {
        verb_ok("j", JOB_VERB_CANCEL);
        wait_for("j", "null");
    }
    for (struct dirty_bitmap *bm = dirty_first(s); bm; bm = dirty_next(bm))
        CHECK(dirty_name(bm) && !dirty_busy(bm));
    CHECK(TAILQ_EMPTY(&t->parents) && bitmap_count(dirty_bits(dirty_find(s, "b"))) == 3 * 65536);
}

/* Without a backing image `top` is `full`, also in what is said of it. */
JOB_TEST(which_bitmap_goes_with_which_sync)
{
    static const char *const modes[] = {NULL, "on-success", "always", "never"};
    unsigned taken = 0, all = 0;
    for (int backed = 0; backed < 2; backed++) {
        struct node *below = disk(g, "below", SIZE, 0);
        two_disks(g, SIZE, 0);
        if (backed) {
            node_unref(s);
            s = open_node(g, parse("{'driver':'mem','node-name':'top','size':%d,'backing':'below',"
                                   "'discard':'unmap'}",
                                   SIZE));
        }
        bitmap_mark(dirty_bits(bitmap_on_s(g, 65536)), range_make(65536, 3 * 65536));
        for (size_t i = 0; i < ARRAY_SIZE(combinations); i++) {
            for (int m = 0; m < 4; m++) {
                const char *text = combinations[i].texts[m];
                taken += !text;
                all++;
                if (!backed && text && strcmp(text, NOT_WITH("top")) == 0)
                    text = NOT_WITH("full");
                for (int drive = 0; drive < 2; drive++)
                    combine(&combinations[i], modes[m], drive, text);
            }
        }
        close_disks();
        node_unref(below);
    }
    CHECK(all == 2 * 60 && taken == 2 * 8);
}

JOB_TEST(the_copy_mode_is_changed)
{
    struct error err = ERROR_INIT;
    struct load l;
    two_disks(g, SIZE, 0);
    fill_disk(s, 3);
    mem_of(s)->yields = mem_of(t)->yields = 2;
    load_begin(&l, 3);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full'}"));
    turns(100);
    struct json_object *options = parse("{'id':'j','type':'mirror','copy-mode':'write-blocking'}");
    CHECK(jobs_change(js, options, &err) == 0);
    CHECK(jobs_change(js, options, &err) == 0); /* as it is */
    json_object_put(options);
    wait_for("j", "READY"); /* with guests that never rest */
    options = parse("{'id':'j','type':'mirror','copy-mode':'background'}");
    CHECK(jobs_change(js, options, &err) < 0);
    CHECK(strcmp(err.text, "Change to copy mode 'background' is not implemented") == 0);
    json_object_put(options);
    options = parse("{'id':'j','type':'commit'}");
    CHECK(jobs_change(js, options, &err) < 0);
    json_object_put(options);
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    load_stop(&l);
    CHECK(l.guests[0].edge->node == t);
    load_end(&l);
    close_disks();
}

/* What query-block-jobs says of it. */
static bool synced(void)
{
    CLEANUP(json_putp) struct json_object *list = jobs_query_block(js);
    struct json_object *info = json_object_array_get_idx(list, 0);
    CHECK(json_has(info, "actively-synced"));
    return json_get_bool(info, "actively-synced", false);
}

/* True only of a write-blocking mirror, from the moment that the target had all until a write
 * comes that does not reach it in time. */
JOB_TEST(actively_synced)
{
    struct guest gu, below;
    struct error err = ERROR_INIT;
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes, 0x42, SIZE);
    guest_on(&gu, s, 1);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','on-target-error':"
                    "'stop','auto-finalize':false}"));
    guest_on(&below, s, 2);
    CHECK(!synced());
    wait_for("j", "READY");
    turns(20);
    CHECK(!synced()); /* what is written now is copied later */
    struct json_object *options = parse("{'id':'j','type':'mirror','copy-mode':'write-blocking'}");
    CHECK(jobs_change(js, options, &err) == 0);
    json_object_put(options);
    CHECK(synced());
    write_at(gu.edge, 65536, 512, 0x43);
    CHECK(synced() && same(SIZE));

    write_at(below.edge, 65536, 512, 0x44); /* not through the filter */
    CHECK(!synced());
    for (int i = 0; !synced(); i++)
        CHECK(i < 2000 && sleep_until(clock_after_ns(1000000)) == 0);
    CHECK(same(SIZE));

    mem_of(t)->bad_times = 1;
    mem_of(t)->bad_write = range_make(0, SIZE);
    mem_of(t)->write_errno = EIO;
    write_at(gu.edge, 65536, 512, 0x45);
    CHECK(!synced());
    wait_for("j", "standby");
    CHECK(!synced());
    verb_ok("j", JOB_VERB_RESUME);
    for (int i = 0; !synced(); i++)
        CHECK(i < 2000 && sleep_until(clock_after_ns(1000000)) == 0);
    CHECK(same(SIZE));
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "PENDING");
    CHECK(synced());
    verb_ok("j", JOB_VERB_FINALIZE);
    wait_for("j", "null");
    edge_detach(gu.edge);
    edge_detach(below.edge);
    close_disks();
}

/* buf-size is what is on its way at once, granularity what a write of a few bytes costs. */
JOB_TEST(sizes_of_what_is_copied)
{
    static const struct {
        unsigned granularity, buf_size, at_once;
    } rows[] = {
        {4096, 1, 1}, {65536, 131072, 1}, {1048576, 1, 1}, {65536, 2 << 20, 2}, {0, 0, SIZE >> 20},
    };
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        struct guest gu;
        struct event hold;
        two_disks(g, SIZE, 0);
        memset(mem_of(s)->bytes, 0x11, SIZE);
        event_init(&hold);
        mem_of(t)->hold = &hold;
        mem_of(t)->held = range_make(0, SIZE);
        guest_on(&gu, s, 1);
        struct json_object *args =
            parse("{'device':'s','target':'t','job-id':'j','sync':'full','buf-size':%u}",
                  rows[i].buf_size);
        if (rows[i].granularity)
            json_add_uint(args, "granularity", rows[i].granularity);
        mirror_ok(args);
        turns(50);
        CHECK(mem_of(t)->holding == rows[i].at_once);
        event_set(&hold);
        turns(1); /* those that were held, and no more yet */
        mem_of(t)->hold = NULL;
        wait_for("j", "READY");
        uint64_t before = t->counters.wr_bytes;
        write_at(gu.edge, SIZE / 2 + 512, 512, 0x12);
        cancel_softly("j");
        wait_for("j", "null");
        CHECK(same(SIZE));
        CHECK(t->counters.wr_bytes - before == (rows[i].granularity ? rows[i].granularity : 65536));
        edge_detach(gu.edge);
        close_disks();
    }
}

JOB_TEST(a_speed_limit_takes_effect)
{
    struct error err = ERROR_INIT;
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes, 0x42, SIZE);
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full','speed':1024}"));
    turns(200);
    CHECK(!strstr(events, "READY"));
    CHECK(jobs_set_speed(js, "j", 0, &err) == 0);
    wait_for("j", "READY");
    cancel_softly("j");
    wait_for("j", "null");
    CHECK(same(SIZE));
    close_disks();
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(events_are_qemus),
    cmocka_unit_test(cancelling),
    cmocka_unit_test(a_target_that_hangs_is_given_up),
    cmocka_unit_test(a_target_that_hangs_at_the_end),
    cmocka_unit_test(writes_while_it_is_pending),
    cmocka_unit_test(none_copies_what_is_written),
    cmocka_unit_test(an_empty_disk),
    cmocka_unit_test(errors_report_stop_and_ignore),
    cmocka_unit_test(a_guests_write_survives_a_bad_target),
    cmocka_unit_test(a_target_that_is_zero_gets_no_zeroes),
    cmocka_unit_test(what_is_refused),
    cmocka_unit_test(which_bitmap_goes_with_which_sync),
    cmocka_unit_test(the_copy_mode_is_changed),
    cmocka_unit_test(actively_synced),
    cmocka_unit_test(sizes_of_what_is_copied),
    cmocka_unit_test(a_speed_limit_takes_effect),
};

UNIT_MAIN(tests)
