/* The mirror job: equality under load, the pivot, cancelling, errors, the bitmap's outcomes, QEMU's
 * and Proxmox's texts. */
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
    events[0] = '\0';
}

static int mirror(struct error *err, struct json_object *args)
{
    int r = mirror_blockdev(js, args, err);
    json_object_put(args);
    return r;
}

static void mirror_ok(struct json_object *args)
{
    struct error err = ERROR_INIT;
    int r = mirror(&err, args);
    CHECK_OK(r, err);
}

static void mirror_fails(const char *text, struct json_object *args)
{
    struct error err = ERROR_INIT;
    CHECK(mirror(&err, args) < 0);
    if (strcmp(err.text, text) != 0)
        fail_msg("'%s' instead of '%s'", err.text, text);
}

static void cancel_softly(const char *id)
{
    struct error err = ERROR_INIT;
    int r = jobs_do_block(js, id, JOB_VERB_CANCEL, false, &err);
    CHECK_OK(r, err);
}

static bool same(uint64_t size)
{
    return memcmp(mem_of(s)->bytes, mem_of(t)->bytes, size) == 0;
}

static void write_at(struct edge *e, uint64_t start, uint64_t length, uint8_t value)
{
    uint8_t *buf = xcalloc(1, length);
    memset(buf, value, length);
    CHECK(edge_write(e, range_make(start, length), buf, 0) == 0);
    free(buf);
}

static struct dirty_bitmap *bitmap_on_s(struct graph *g, unsigned granularity)
{
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'s','name':'b','granularity':%u}", granularity));
    return dirty_find(s, "b");
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

/* A guest that knows what it has written: every byte that it reads must be its own. */
struct careful {
    struct test_user user;
    struct edge *edge;
    struct rng rng;
    struct range area;
    uint8_t *model;
    unsigned writes;
    bool stop;
};

static int careful_task(void *arg)
{
    struct careful *c = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, 200000);
    while (!c->stop) {
        uint64_t start = align_down(rng_below(&c->rng, c->area.length), 512);
        uint64_t length = align_up(rng_below(&c->rng, 199000) + 1, 512);
        length = min_u64(length, c->area.length - start);
        struct range r = range_make(c->area.start + start, length);
        int ret;
        if (rng_below(&c->rng, 5) == 0) {
            ret = edge_write_zeroes(c->edge, r, REQ_MAY_UNMAP);
            memset(c->model + start, 0, length);
        } else {
            fill_random(&c->rng, buf, length);
            ret = edge_write(c->edge, r, buf, 0);
            memcpy(c->model + start, buf, length);
        }
        CHECK(ret == 0);
        c->writes++;
        if (rng_below(&c->rng, 3) == 0) {
            CHECK(edge_read(c->edge, r, buf, 0) == 0);
            CHECK(memcmp(buf, c->model + start, length) == 0);
        }
        CHECK(task_yield() == 0);
    }
    free(buf);
    return 0;
}

enum { CAREFUL = 3 };

/* BELOW: some of the guests are below the mirror's filter, who see the source itself. */
static void no_write_is_lost(struct graph *g, const char *more, bool complete, bool below,
                             uint64_t seed)
{
    struct careful cs[CAREFUL];
    SCOPE(tasks);
    two_disks(g, SIZE, seed % 3 == 2 ? 256 * 1024 : 0);
    fill_disk(s, seed);
    memset(mem_of(t)->bytes, 0xee, SIZE);
    mem_of(s)->yields = seed % 4;
    mem_of(t)->yields = 1 + seed % 3;
    if (below)
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','filter-node-name':'f'%s}", more));
    for (int i = 0; i < CAREFUL; i++) {
        uint64_t from = align_down((uint64_t)SIZE * i / CAREFUL, 512);
        uint64_t to = align_down((uint64_t)SIZE * (i + 1) / CAREFUL, 512);
        cs[i] = (struct careful){.rng = {seed * 77 + i}, .area = range_between(from, to)};
        cs[i].model = xcalloc(1, to - from);
        memcpy(cs[i].model, mem_of(s)->bytes + from, to - from);
        cs[i].edge = attach(&cs[i].user, below && i ? graph_find(g, "f") : s,
                            PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
        scope_spawn(&tasks, careful_task, &cs[i]);
    }
    turns(3);
    if (!below)
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j'%s}", more));
    if (strstr(more, "write-blocking") && !below) {
        wait_for("j", "READY"); /* with guests that never rest */
    } else {
        turns(100);
        for (int i = 0; i < CAREFUL; i++)
            cs[i].stop = true;
        CHECK(scope_join(&tasks) == 0);
        wait_for("j", "READY");
        for (int i = 0; i < CAREFUL; i++) {
            cs[i].stop = false;
            scope_spawn(&tasks, careful_task, &cs[i]);
        }
        turns(20);
    }
    if (complete)
        verb_ok("j", JOB_VERB_COMPLETE);
    else
        cancel_softly("j");
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:concluded j:null"));
    turns(30);
    for (int i = 0; i < CAREFUL; i++)
        cs[i].stop = true;
    CHECK(scope_join(&tasks) == 0);
    for (int i = 0; i < CAREFUL; i++) {
        CHECK(cs[i].edge->node == (complete ? t : s));
        CHECK(memcmp(cs[i].model, mem_of(cs[i].edge->node)->bytes + cs[i].area.start,
                     cs[i].area.length) == 0);
        edge_detach(cs[i].edge);
        free(cs[i].model);
    }
    close_disks();
}

JOB_TEST(no_write_is_lost_over_a_pivot)
{
    const uint64_t first = test_seed();
    for (uint64_t seed = first; seed < first + 8; seed++) {
        no_write_is_lost(g, ",'sync':'full'", true, true, seed);
        no_write_is_lost(g, ",'sync':'full','copy-mode':'write-blocking'", true, true, seed);
        no_write_is_lost(g, ",'sync':'full'", true, false, seed);
        no_write_is_lost(g, ",'sync':'full','copy-mode':'write-blocking'", true, false, seed);
        no_write_is_lost(g, ",'sync':'full','granularity':4096,'buf-size':65536", true, false,
                         seed);
        no_write_is_lost(g, ",'sync':'full','granularity':1048576,'copy-mode':'write-blocking'",
                         true, false, seed);
        no_write_is_lost(g, ",'sync':'full','target-is-zero':false", false, false, seed);
    }
}

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

static struct node *open_node(struct graph *g, struct json_object *options)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    int r = graph_open(g, options, &n, &err);
    CHECK_OK(r, err);
    json_object_put(options);
    return n;
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

/* Two guests write to the same place at once, one of them below the filter: the source has one of
 * the two, and the target the same. */
struct writer {
    struct edge *edge;
    uint64_t start, length;
    uint8_t value;
    unsigned flags;
};

static int writer_task(void *arg)
{
    struct writer *w = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, w->length);
    memset(buf, w->value, w->length);
    CHECK(edge_write(w->edge, range_make(w->start, w->length), buf, w->flags) == 0);
    free(buf);
    return 0;
}

JOB_TEST(writes_to_one_place_from_above_and_below)
{
    enum { ROUNDS = 200, PLACE = 64 * 1024 };
    struct rng rng = {test_seed()};
    for (int round = 0; round < ROUNDS; round++) {
        struct guest above, below;
        struct writer ws[8];
        SCOPE(tasks);
        two_disks(g, SIZE, 0);
        guest_on(&above, s, 1);
        mirror_ok(parse("{'device':'s','target':'t','job-id':'j','sync':'full',"
                        "'granularity':%u,'copy-mode':'%s'}",
                        4096u << rng_below(&rng, 5), round % 4 ? "write-blocking" : "background"));
        guest_on(&below, s, 2);
        wait_for("j", "READY");
        mem_of(s)->yields = 1 + round % 5;
        mem_of(t)->yields = round % 3;
        for (unsigned i = 0; i < ARRAY_SIZE(ws); i++) {
            uint64_t length = 4096 * (1 + rng_below(&rng, 16));
            ws[i] = (struct writer){.edge = rng_below(&rng, 2) ? above.edge : below.edge,
                                    .start = align_down(rng_below(&rng, PLACE), 4096),
                                    .length = length,
                                    .value = (uint8_t)(i + 1),
                                    .flags = rng_below(&rng, 2) ? REQ_FUA : 0};
            scope_spawn(&tasks, writer_task, &ws[i]);
            turns(rng_below(&rng, 4));
        }
        CHECK(scope_join(&tasks) == 0);
        cancel_softly("j");
        wait_for("j", "null");
        if (!same(SIZE))
            fail_msg("round %d, seed %llu", round, (unsigned long long)test_seed());
        edge_detach(above.edge);
        edge_detach(below.edge);
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

/* ---- the bitmap ---- */

enum outcome {
    COMPLETED,
    NO_PIVOT,
    FAILED,
    READ_FAILED,
    CANCELLED_EARLY,
    CANCELLED,
    CANCELLED_PENDING,
    SOURCE_FLUSH,
    OUTCOMES
};
enum { CHUNKS = SIZE / 65536, BAD = 38 };

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
    for (int c = 8; c < 40; c += 2) {
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
    mirror_ok(parse("{'device':'s','target':'t','job-id':'j','auto-finalize':false,%s}", args));
    CHECK(dirty_busy(bm));
    if (what == FAILED || what == READ_FAILED) {
        wait_for("j", "null");
    } else if (what == CANCELLED_EARLY) {
        turns(30);
        CHECK(mem_of(t)->holding && !strstr(events, "READY"));
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
    if (what == COMPLETED || what == CANCELLED_PENDING || what == SOURCE_FLUSH)
        verb_ok("j", JOB_VERB_COMPLETE);
    if (what == SOURCE_FLUSH) {
        wait_for("j", "PENDING");
        mem_of(s)->flush_errno = EIO;
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
    bool after = gu.edge->node == s && enabled;
    bool half = what == FAILED || what == READ_FAILED || what == CANCELLED_EARLY;
    mem_of(s)->flush_errno = 0;
    write_at(gu.edge, 60 * 65536, 512, 0x44);
    for (int c = 0; c < CHUNKS; c++) {
        bool want;
        if (good && !never)
            want = false;
        else if (!good && always && what != SOURCE_FLUSH)
            want = during[c] || (half && what != CANCELLED_EARLY && c == BAD);
        else
            want = user[c] || during[c];
        if (c == 60)
            want = after;
        bool is = bitmap_any(dirty_bits(bm), range_make((uint64_t)c * 65536, 65536));
        /* What it does not name is on the target. */
        if (enabled && !is && gu.edge->node == s)
            CHECK(same_chunk(c));
        /* What was not on the target for another reason remains, too. */
        if (half && always && user[c] && is)
            continue;
        /* What a bitmap does not record remains nevertheless, if it has not been copied again. */
        if (!good && always && !enabled && (c == 10 || c == 50 || c == 51))
            continue;
        if (is != want)
            fail_msg("%s, outcome %d: chunk %d is %s", args, what, c, is ? "dirty" : "clean");
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

/* A filter of the user's: what is below it is replaced, its users stay on it. */
static struct node *user_filter(struct graph *g)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'mirror_top','node-name':'over','source':'s','discard':'unmap'}");
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    return n;
}

/* The pivot is the last that can fail. */
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
            for (int c = 0; run == 0 && c < CHUNKS; c++)
                CHECK(bitmap_any(dirty_bits(bm), range_make(c * 65536, 65536)) ==
                      (c == 3 || c == 5 || c == 8));
            CHECK(!!strstr(events, "Operation not permitted") == (run == 0));
            events[0] = '\0';
        }
        CHECK(same(SIZE) && bitmap_count(dirty_bits(bm)) == (m == 2 ? 5 * 65536 : 0));
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

/* ---- the pivot ---- */

JOB_TEST(a_node_below_a_filter_is_replaced)
{
    struct guest gu;
    two_disks(g, SIZE, 0);
    fill_disk(s, 8);
    struct node *over = user_filter(g);
    guest_on(&gu, over, 1);
    mirror_ok(parse("{'device':'over','target':'t','job-id':'j','sync':'full','replaces':'s'}"));
    wait_for("j", "READY");
    write_at(gu.edge, 4096, 512, 0x71);
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strstr(events, "j:COMPLETED j:concluded"));
    CHECK(gu.edge->node == over && over->file->node == t && TAILQ_EMPTY(&s->parents));
    CHECK(same(SIZE));
    write_at(gu.edge, 8192, 512, 0x72);
    CHECK(mem_of(t)->bytes[8192] == 0x72 && !same(SIZE));
    edge_detach(gu.edge);
    node_unref(over);
    close_disks();
}

JOB_TEST(a_pivot_that_fails_moves_nobody)
{
    struct guest gu;
    two_disks(g, SIZE, 0);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    struct node *over = user_filter(g);
    struct dirty_bitmap *bm = bitmap_on_s(g, 65536);
    guest_on(&gu, over, 1);
    mirror_ok(parse("{'device':'over','target':'t','job-id':'j','sync':'full','replaces':'s'}"));
    wait_for("j", "READY");
    CHECK(edge_freeze(over->file, NULL) == 0);
    verb_ok("j", JOB_VERB_COMPLETE);
    wait_for("j", "null");
    CHECK(strstr(events, "j:aborting j:COMPLETED(Operation not permitted) j:concluded j:null"));
    CHECK(gu.edge->node == over && over->file->node == s);
    edge_thaw(over->file);
    write_at(gu.edge, 8192, 512, 0x72);
    CHECK(mem_of(s)->bytes[8192] == 0x72);
    CHECK(TAILQ_EMPTY(&t->parents) && bitmap_count(dirty_bits(bm)) == 65536);
    edge_detach(gu.edge);
    node_unref(over);
    close_disks();
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

/* ---- a source that is reopened ---- */

/* The source is another file from one moment to the next: all of it counts as written. */
JOB_TEST(a_source_that_becomes_another_file)
{
    for (int blocking = 0; blocking < 2; blocking++) {
        struct guest gu;
        struct error err = ERROR_INIT;
        two_disks(g, SIZE, 0);
        struct node *other = disk(g, "other", SIZE, 0);
        fill_disk(s, 5);
        fill_disk(other, 6);
        struct node *r = open_node(g, parse("{'driver':'raw','node-name':'r','file':'s'}"));
        guest_on(&gu, r, 1);
        mirror_ok(parse("{'device':'r','target':'t','job-id':'j','sync':'full','copy-mode':'%s'}",
                        blocking ? "write-blocking" : "background"));
        wait_for("j", "READY");
        CLEANUP(json_putp)
        struct json_object *list = parse("[{'driver':'raw','node-name':'r','file':'other'}]");
        int ret = graph_reopen(g, list, &err);
        CHECK_OK(ret, err);
        verb_ok("j", JOB_VERB_COMPLETE);
        wait_for("j", "null");
        CHECK(gu.edge->node == t);
        CHECK(memcmp(mem_of(t)->bytes, mem_of(other)->bytes, SIZE) == 0);
        edge_detach(gu.edge);
        node_unref(r);
        node_unref(other);
        close_disks();
    }
}

/* The source gets another size, before the job has begun to copy, while it copies, when it is
 * ready, pending: it ends, and the bitmap keeps what it said. */
JOB_TEST(a_source_of_another_size)
{
    static const char *const when[] = {"running", "copying", "READY", "PENDING"};
    for (int how = 0; how < 8; how++) {
        struct guest gu;
        struct event hold;
        struct error err = ERROR_INIT;
        two_disks(g, SIZE, 0);
        struct node *other = disk(g, "other", how < 4 ? SIZE * 2 : SIZE / 2, 0);
        struct node *r = open_node(g, parse("{'driver':'raw','node-name':'r','file':'s'}"));
        fill_disk(s, 5);
        fill_disk(other, 6);
        command_ok(g, "block-dirty-bitmap-add", parse("{'node':'r','name':'b'}"));
        struct dirty_bitmap *bm = dirty_find(r, "b");
        guest_on(&gu, r, 1);
        write_at(gu.edge, SIZE / 4, 512, 0x31);
        if (how % 4 == 1) {
            event_init(&hold);
            mem_of(t)->hold = &hold;
            mem_of(t)->held = range_make(0, SIZE);
        }
        mirror_ok(parse("{'device':'r','target':'t','job-id':'j','auto-finalize':false,%s}",
                        how % 2 ? "'sync':'incremental','bitmap':'b'" : "'sync':'full'"));
        if (how % 4 == 1)
            turns(20);
        else if (how % 4 >= 2)
            wait_for("j", "READY");
        if (how % 4 == 3) {
            verb_ok("j", JOB_VERB_COMPLETE);
            wait_for("j", "PENDING");
        }
        CLEANUP(json_putp)
        struct json_object *list = parse("[{'driver':'raw','node-name':'r','file':'other'}]");
        int ret = graph_reopen(g, list, &err);
        CHECK_OK(ret, err);
        if (how % 4 == 1) {
            event_set(&hold);
            mem_of(t)->hold = NULL;
        }
        if (how % 4 == 3)
            verb_ok("j", JOB_VERB_FINALIZE);
        wait_for("j", "null");
        if (!strstr(events, "COMPLETED(Source and target image have different sizes)"))
            fail_msg("%s: %s", when[how % 4], events);
        CHECK(gu.edge->node == r && !dirty_busy(bm));
        CHECK(bitmap_any(dirty_bits(bm), range_make(SIZE / 4, 512)));
        edge_detach(gu.edge);
        node_unref(r);
        node_unref(other);
        close_disks();
    }
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
    cmocka_unit_test(no_write_is_lost_over_a_pivot),
    cmocka_unit_test(events_are_qemus),
    cmocka_unit_test(cancelling),
    cmocka_unit_test(a_target_that_hangs_is_given_up),
    cmocka_unit_test(writes_to_one_place_from_above_and_below),
    cmocka_unit_test(writes_while_it_is_pending),
    cmocka_unit_test(none_copies_what_is_written),
    cmocka_unit_test(an_empty_disk),
    cmocka_unit_test(errors_report_stop_and_ignore),
    cmocka_unit_test(a_guests_write_survives_a_bad_target),
    cmocka_unit_test(the_bitmap_follows_its_table),
    cmocka_unit_test(a_pivot_that_fails_keeps_the_bitmap),
    cmocka_unit_test(an_image_of_changes_has_whole_clusters),
    cmocka_unit_test(a_node_below_a_filter_is_replaced),
    cmocka_unit_test(a_pivot_that_fails_moves_nobody),
    cmocka_unit_test(a_target_that_is_zero_gets_no_zeroes),
    cmocka_unit_test(a_source_that_becomes_another_file),
    cmocka_unit_test(a_source_of_another_size),
    cmocka_unit_test(what_is_refused),
    cmocka_unit_test(the_copy_mode_is_changed),
    cmocka_unit_test(actively_synced),
    cmocka_unit_test(sizes_of_what_is_copied),
    cmocka_unit_test(a_speed_limit_takes_effect),
};

UNIT_MAIN(tests)
