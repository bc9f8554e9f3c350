/* The mirror job's bitmap: its outcomes, cell by cell, and the run after. */
#include "mirrorutil.h"

enum outcome {
    COMPLETED,
    NO_PIVOT,
    FAILED,
    READ_FAILED,
    CANCELLED_EARLY,
    CANCELLED,
    CANCELLED_PENDING,
    SOURCE_FLUSH,
    TARGET_FLUSH,
    OUTCOMES
};
/* In the middle of what is dirty: one chunk is copied at a time, so those before it are on the
 * target then, and those after it are not. */
enum { FIRST = 8, BAD = 24, LAST = 38 };

static bool same_chunk(int c)
{
    return !memcmp(mem_of(s)->bytes + c * 65536, mem_of(t)->bytes + c * 65536, 65536);
}

static void one_outcome(struct graph *g, const char *args, enum outcome what, bool enabled)
{
    bool never = strstr(args, "never"), always = strstr(args, "always");
    struct guest gu;
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    memset(mem_of(t)->bytes, 0x11, SIZE);
    struct dirty_bitmap *bm = bitmap_on_s(g, 65536);
    guest_on(&gu, s, 1);
    bool user[CHUNKS] = {0}, during[CHUNKS] = {0};
    for (int c = FIRST; c <= LAST; c += 2) {
        write_at(gu.edge, (uint64_t)c * 65536, 512, 0x22);
        user[c] = true;
    }
    if (!enabled)
        command_ok(g, "block-dirty-bitmap-disable", parse("{'node':'s','name':'b'}"));
    if (what == FAILED) {
        mem_of(t)->bad_write = range_make(BAD * 65536, 65536);
        mem_of(t)->write_errno = EIO;
    }
    if (what == READ_FAILED) {
        mem_of(s)->bad_read = range_make(BAD * 65536, 65536);
        mem_of(s)->read_errno = EIO;
    }
    struct event hold;
    event_init(&hold);
    if (what == CANCELLED_EARLY) {
        mem_of(t)->hold = &hold;
        mem_of(t)->held = range_make(BAD * 65536, 65536);
    }
    mirror_ok(parse(
        "{'device':'s','target':'t','job-id':'j','auto-finalize':false,'buf-size':1,%s}", args));
    CHECK(dirty_busy(bm));
    if (what == FAILED || what == READ_FAILED) {
        wait_for("j", "null");
    } else if (what == CANCELLED_EARLY) {
        while (!mem_of(t)->holding)
            turns(1);
        turns(30);
        CHECK(!strstr(events, "READY"));
        write_at(gu.edge, 10 * 65536 + 512, 512, 0x33);
        write_at(gu.edge, 50 * 65536, 512, 0x33);
        during[10] = during[50] = enabled;
        cancel_softly("j");
        event_set(&hold);
        mem_of(t)->hold = NULL;
    } else {
        wait_for("j", "READY");
        CHECK(dirty_busy(bm) && bitmap_count(dirty_bits(bm)) == 16 * 65536); /* never at ready */
        write_at(gu.edge, 10 * 65536 + 512, 512, 0x33); /* again, and something else */
        write_at(gu.edge, 50 * 65536, 512, 0x33);
        during[10] = during[50] = enabled;
    }
    bool no_flush = what == SOURCE_FLUSH || what == TARGET_FLUSH;
    if (what == COMPLETED || what == CANCELLED_PENDING || no_flush)
        verb_ok("j", JOB_VERB_COMPLETE);
    if (no_flush) {
        wait_for("j", "PENDING");
        mem_of(what == SOURCE_FLUSH ? s : t)->flush_errno = EIO;
        write_at(gu.edge, 51 * 65536, 512, 0x33);
        during[51] = enabled;
        verb_ok("j", JOB_VERB_FINALIZE);
    }
    if (what == NO_PIVOT)
        cancel_softly("j");
    if (what == COMPLETED || what == NO_PIVOT) {
        wait_for("j", "PENDING");
        CHECK(dirty_busy(bm));
        verb_ok("j", JOB_VERB_FINALIZE);
    }
    if (what == CANCELLED_PENDING)
        wait_for("j", "PENDING");
    if (what == CANCELLED || what == CANCELLED_PENDING)
        verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");

    bool good = what == COMPLETED || what == NO_PIVOT;
    CHECK(!dirty_busy(bm) && dirty_enabled(bm) == enabled);
    CHECK(!!strstr(events, "Input/output error") ==
          (no_flush || what == FAILED || what == READ_FAILED));
    bool after = gu.edge->node == s && enabled;
    bool half = what == FAILED || what == READ_FAILED || what == CANCELLED_EARLY;
    for (int c = FIRST; half && c <= LAST; c += 2) /* see BAD; a guest's write brings its own */
        CHECK(!mem_of(t)->written[c] == (c >= BAD) || (c == BAD && what == CANCELLED_EARLY));
    mem_of(s)->flush_errno = mem_of(t)->flush_errno = 0;
    bool here[CHUNKS];
    for (int c = 0; c < CHUNKS; c++)
        here[c] = same_chunk(c);
    write_at(gu.edge, 60 * 65536, 512, 0x44);
    for (int c = 0; c < CHUNKS; c++) {
        bool want;
        if (good && !never)
            want = false;
        else if (!good && always && !no_flush)
            want = during[c] || !here[c]; /* also what a disabled bitmap has not recorded */
        else
            want = user[c] || during[c];
        want |= always && no_flush && mem_of(t)->written[c]; /* nobody knows what it has there */
        if (c == 60)
            want = after;
        bool is = bitmap_any(dirty_bits(bm), range_make((uint64_t)c * 65536, 65536));
        /* What it does not name is on the target. */
        if (enabled && !is && gu.edge->node == s)
            CHECK(same_chunk(c));
        if (is != want)
            fail_msg("%s, outcome %d, %s: chunk %d is %s", args, what,
                     enabled ? "enabled" : "disabled", c, is ? "dirty" : "clean");
    }
    if (gu.edge->node == s) {
        /* A second run goes on where this one ended, and copies nothing but what is named. */
        mem_of(t)->bad_times = mem_of(s)->bad_times = 0;
        write_at(gu.edge, 61 * 65536, 512, 0x45);
        memset(mem_of(t)->written, 0, CHUNKS * sizeof *mem_of(t)->written);
        bool named[CHUNKS];
        for (int c = 0; c < CHUNKS; c++)
            named[c] = bitmap_any(dirty_bits(bm), range_make((uint64_t)c * 65536, 65536));
        events[0] = '\0';
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j',%s}", args));
        wait_for("j", "READY");
        cancel_softly("j");
        wait_for("j", "null");
        for (int c = 0; c < CHUNKS; c++)
            CHECK(!mem_of(t)->written[c] == !named[c]);
        if (enabled)
            CHECK(same(SIZE) && (never || bitmap_count(dirty_bits(bm)) == 0));
    }
    edge_detach(gu.edge);
    close_disks();
}

JOB_TEST(the_bitmap_follows_its_table)
{
    static const char *const modes[] = {
        "'sync':'incremental','bitmap':'b'",
        "'sync':'bitmap','bitmap':'b','bitmap-mode':'on-success'",
        "'sync':'bitmap','bitmap':'b','bitmap-mode':'always'",
        "'sync':'bitmap','bitmap':'b','bitmap-mode':'never'",
        "'sync':'bitmap','bitmap':'b','bitmap-mode':'always','copy-mode':'write-blocking'",
    };
    for (size_t m = 0; m < ARRAY_SIZE(modes); m++)
        for (int what = 0; what < OUTCOMES; what++)
            for (int enabled = 0; enabled < 2; enabled++)
                one_outcome(g, modes[m], what, enabled);
}

/* The bitmap's granularity is the job's, in what is copied and in what it shows. */
JOB_TEST(the_bitmaps_granularity_is_the_jobs)
{
    for (unsigned granularity = 4096; granularity <= 1048576; granularity *= 16) {
        struct guest gu;
        two_disks(g, SIZE, 0);
        fill_disk(s, 3);
        bitmap_on_s(g, granularity);
        guest_on(&gu, s, 1);
        write_at(gu.edge, SIZE / 2 + 512, 512, 0x51);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'incremental','bitmap':"
                        "'b'}"));
        wait_for("j", "READY");
        CHECK(t->counters.wr_bytes == granularity);
        CHECK(!memcmp(mem_of(s)->bytes + SIZE / 2, mem_of(t)->bytes + SIZE / 2, granularity));
        write_at(gu.edge, SIZE / 4, 512, 0x52);
        cancel_softly("j");
        wait_for("j", "null");
        CHECK(t->counters.wr_bytes == 2 * granularity);
        edge_detach(gu.edge);
        close_disks();
    }
}

/* The pivot is the last that can fail. By then the target had all, durably: `always` keeps that.
 * The others keep what the bitmap said. */
JOB_TEST(a_pivot_that_fails_keeps_the_bitmap)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    for (int m = 0; m < 3; m++) {
        struct guest gu;
        two_disks(g, SIZE, 0);
        memset(mem_of(s)->bytes, 0x11, SIZE);
        memset(mem_of(t)->bytes, 0x11, SIZE);
        struct node *over = user_filter(g);
        guest_on(&gu, over, 1);
        command_ok(g, "block-dirty-bitmap-add",
                   parse("{'node':'over','name':'b','granularity':65536}"));
        struct dirty_bitmap *bm = dirty_find(over, "b");
        write_at(gu.edge, 3 * 65536, 512, 0x21);
        for (int run = 0; run < 2; run++) {
            mirror_ok(parse("{'device':'over','target':'t','job-id':'j','sync':'bitmap','bitmap':"
                            "'b','bitmap-mode':'%s','replaces':'s','auto-finalize':false}",
                            modes[m]));
            wait_for("j", "READY");
            write_at(gu.edge, (5 + run) * 65536, 512, 0x22);
            if (run == 0) {
                verb_ok("j", JOB_VERB_COMPLETE);
                CHECK(edge_freeze(over->file, NULL) == 0);
            } else {
                cancel_softly("j");
            }
            wait_for("j", "PENDING");
            write_at(gu.edge, (8 + run) * 65536, 512, 0x23);
            verb_ok("j", JOB_VERB_FINALIZE);
            wait_for("j", "null");
            edge_thaw(over->file);
            CHECK(gu.edge->node == over && over->file->node == s && !dirty_busy(bm));
            CHECK(!!strstr(events, "Operation not permitted") == (run == 0));
            events[0] = '\0';
            if (run == 0) {
                CHECK(same(SIZE));
                write_at(gu.edge, 20 * 65536, 512, 0x24);
            }
            for (int c = 0; c < CHUNKS; c++) {
                bool before = c == 3 || c == 5 || c == 8, again = c == 6 || c == 9 || c == 20;
                bool dirty = bitmap_any(dirty_bits(bm), range_make(c * 65536, 65536));
                if (run == 0)
                    CHECK(dirty == (c == 20 || (before && m != 1)));
                else /* what was named, and what was written meanwhile, and nothing else */
                    CHECK(!mem_of(t)->written[c] == !(again || (before && m != 1)));
            }
            memset(mem_of(t)->written, 0, CHUNKS * sizeof *mem_of(t)->written);
        }
        CHECK(same(SIZE) && bitmap_count(dirty_bits(bm)) == (m == 2 ? 6 * 65536 : 0));
        edge_detach(gu.edge);
        node_unref(over);
        close_disks();
    }
}

static int finalize(void *arg)
{
    verb_ok("j", JOB_VERB_FINALIZE);
    return 0;
}

/* Guests are at the target already, and its bitmap waits for somebody who changes the graph. Who
 * loses patience now gives up no target: it is the guests' disk. */
static int change_graph(void *arg)
{
    struct graph *g = arg;
    GRAPH_LOCKED(g);
    CHECK(!strstr(events, "concluded") && dirty_busy(dirty_find(s, "b")));
    CHECK(!TAILQ_EMPTY(&t->parents));
    jobs_give_up(js);
    CHECK(t->cancelled == 0);
    return 0;
}

/* Who has lost patience before that has not given up the guests' disk either. */
JOB_TEST(a_target_is_not_given_up_once_guests_are_there)
{
    for (int before = 0; before < 2; before++) {
        struct guest gu;
        struct event hold;
        event_init(&hold);
        two_disks(g, SIZE, 0);
        bitmap_on_s(g, 65536);
        guest_on(&gu, s, 1);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'incremental',"
                        "'bitmap':'b','auto-finalize':false}"));
        wait_for("j", "READY");
        verb_ok("j", JOB_VERB_COMPLETE);
        wait_for("j", "PENDING");
        write_at(gu.edge, 0, 512, 0x33);
        mem_of(t)->hold_flush = &hold;
        SCOPE(tasks);
        scope_spawn(&tasks, finalize, NULL);
        while (!mem_of(t)->holding)
            turns(1);
        if (before)
            jobs_give_up(js);
        CHECK(t->cancelled == (unsigned)before);
        scope_spawn(&tasks, change_graph, g);
        turns(1);
        event_set(&hold);
        CHECK(scope_join(&tasks) == 0);
        wait_for("j", "null");
        CHECK(gu.edge->node == t && t->cancelled == 0);
        mem_of(t)->hold_flush = NULL;
        edge_detach(gu.edge);
        close_disks();
    }
}

/* A bitmap of the filter above what is replaced stays with the filter, and so with the guest: after
 * the pivot it names what is written to the new disk, which brings the old one up to that again. */
JOB_TEST(a_bitmap_above_what_is_replaced)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    for (int i = 0; i < 6; i++) {
        bool never = i % 3 == 2;
        struct guest gu;
        two_disks(g, SIZE, 0);
        memset(mem_of(s)->bytes, 0x11, SIZE);
        memset(mem_of(t)->bytes, 0x11, SIZE);
        struct node *over = user_filter(g), *ends[2] = {s, t};
        guest_on(&gu, over, 1);
        command_ok(g, "block-dirty-bitmap-add",
                   parse("{'node':'over','name':'b','granularity':65536}"));
        struct dirty_bitmap *bm = dirty_find(over, "b");
        write_at(gu.edge, 3 * 65536, 512, 0x21);
        for (int run = 0; run < 2; run++) { /* there and back */
            struct node *from = ends[run], *to = ends[!run];
            bool named[CHUNKS];
            events[0] = '\0';
            memset(mem_of(to)->written, 0, CHUNKS * sizeof *mem_of(to)->written);
            mirror_ok(parse("{'device':'over','target':'%s','job-id':'j','sync':'bitmap',"
                            "'bitmap':'b','bitmap-mode':'%s','replaces':'%s','copy-mode':'%s',"
                            "'auto-finalize':false}",
                            node_name(to), modes[i % 3], node_name(from),
                            i < 3 ? "background" : "write-blocking"));
            CHECK(dirty_busy(bm));
            wait_for("j", "READY");
            write_at(gu.edge, (5 + run) * 65536, 512, 0x22);
            verb_ok("j", JOB_VERB_COMPLETE);
            wait_for("j", "PENDING");
            write_at(gu.edge, (8 + run) * 65536, 512, 0x23);
            for (int c = 0; c < CHUNKS; c++)
                named[c] = bitmap_any(dirty_bits(bm), range_make(c * 65536, 65536));
            verb_ok("j", JOB_VERB_FINALIZE);
            wait_for("j", "null");
            CHECK(strstr(events, "j:COMPLETED j:concluded") && !dirty_busy(bm));
            CHECK(gu.edge->node == over && over->file->node == to && same(SIZE));
            for (int c = 0; c < CHUNKS; c++)
                CHECK(!mem_of(to)->written[c] == !(named[c] || c == 5 + run || c == 8 + run));
            CHECK(bitmap_count(dirty_bits(bm)) == (never ? (run ? 6u : 3u) * 65536 : 0));
            write_at(gu.edge, (20 + run) * 65536, 512, 0x24);
            CHECK(!same(SIZE) && mem_of(to)->bytes[(20 + run) * 65536] == 0x24);
            for (int c = 0; c < CHUNKS; c++) {
                bool before = c == 3 || c == 5 || c == 8 || (run && (c == 6 || c == 9 || c == 20));
                bool dirty = bitmap_any(dirty_bits(bm), range_make(c * 65536, 65536));
                CHECK(dirty == (c == 20 + run || (never && before)));
            }
        }
        edge_detach(gu.edge);
        node_unref(over);
        close_disks();
    }
}

/* The target may be an image of the changes alone: never a part of one of its clusters. */
JOB_TEST(an_image_of_changes_has_whole_clusters)
{
    enum { CLUSTER = 256 * 1024 };
    for (int blocking = 0; blocking < 2; blocking++) {
        struct guest gu;
        two_disks(g, SIZE, CLUSTER);
        memset(mem_of(s)->bytes, 0x11, SIZE);
        struct dirty_bitmap *bm = bitmap_on_s(g, 65536);
        guest_on(&gu, s, 1);
        write_at(gu.edge, 5 * CLUSTER + 1024, 512, 0x22);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'incremental','bitmap':'b',"
                        "'copy-mode':'%s'}",
                        blocking ? "write-blocking" : "background"));
        wait_for("j", "READY");
        write_at(gu.edge, 7 * CLUSTER + 65536 * 3 + 512, 512, 0x33);
        if (blocking) /* at once */
            CHECK(memcmp(mem_of(t)->bytes + 7 * CLUSTER, mem_of(s)->bytes + 7 * CLUSTER, CLUSTER) ==
                  0);
        cancel_softly("j");
        wait_for("j", "null");
        for (int c = 0; c < SIZE / CLUSTER; c++) {
            if (c == 5 || c == 7)
                CHECK(memcmp(mem_of(t)->bytes + c * CLUSTER, mem_of(s)->bytes + c * CLUSTER,
                             CLUSTER) == 0);
            else
                CHECK(all_zero(mem_of(t)->bytes + c * CLUSTER, CLUSTER));
        }
        CHECK(bitmap_count(dirty_bits(bm)) == 0);
        edge_detach(gu.edge);
        close_disks();
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_bitmaps_granularity_is_the_jobs),
    cmocka_unit_test(the_bitmap_follows_its_table),
    cmocka_unit_test(a_pivot_that_fails_keeps_the_bitmap),
    cmocka_unit_test(a_target_is_not_given_up_once_guests_are_there),
    cmocka_unit_test(a_bitmap_above_what_is_replaced),
    cmocka_unit_test(an_image_of_changes_has_whole_clusters),
};

UNIT_MAIN(tests)
