/* Groups of real backups: while a member waits its nodes and its bitmap stay busy; ended badly in
 * whatever state, each bitmap is as its mode says, whichever event is reported; and a group that
 * is given up before it starts leaves nothing. */
#include "jobutil.h"
#include "virtual.h"

enum { SIZE = 4 * MiB, DISKS = 2, GRANULARITY = 4096, CHUNK = 65536 };
static struct node *s[DISKS], *t[DISKS];
static struct guest guests[DISKS];
static struct bitmap *want[DISKS]; /* what must be dirty: what was, and what guests have written */

static const char *const source_names[DISKS] = {"s0", "s1"}, *const job_names[DISKS] = {"j0", "j1"};

/* As JOB_TEST, in virtual time. */
#define VIRTUAL_TEST(name)                                                                         \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_virtually(name##_task, NULL), 0);                                     \
    }                                                                                              \
    JOB_TASK(name)

static void write_at(unsigned d, uint64_t start, uint64_t length, uint8_t byte)
{
    uint8_t *buf = xcalloc(1, length);
    memset(buf, byte, length);
    CHECK(edge_write(guests[d].edge, range_make(start, length), buf, 0) == 0);
    bitmap_mark(want[d], range_make(start, length));
    free(buf);
}

static void set_up(struct graph *g)
{
    for (unsigned d = 0; d < DISKS; d++) {
        s[d] = disk(g, source_names[d], SIZE, 0);
        t[d] = disk(g, d ? "t1" : "t0", SIZE, 0);
        fill_disk(s[d], d + 3);
        memcpy(mem_of(t[d])->bytes, mem_of(s[d])->bytes, SIZE); /* the chain so far */
        guest_on(&guests[d], s[d], d + 1);
        want[d] = bitmap_new(SIZE, GRANULARITY);
        command_ok(
            g, "block-dirty-bitmap-add",
            parse("{'node':'%s','name':'b','granularity':%d}", source_names[d], GRANULARITY));
        write_at(d, d * MiB / 2, MiB + 4096, 0x11);
        write_at(d, 3 * MiB, 65536, 0x12);
    }
}

static void tear_down(void)
{
    for (unsigned d = 0; d < DISKS; d++) {
        edge_detach(guests[d].edge);
        bitmap_free(want[d]);
        node_unref(s[d]);
        node_unref(t[d]);
    }
}

static struct dirty_bitmap *bits(unsigned d)
{
    return dirty_find(s[d], "b");
}

static int start_group(struct graph *g, const char *mode, const bool *slow, const char *more,
                       struct error *err)
{
    CLEANUP(json_putp) struct json_object *grouped = parse("{'completion-mode':'grouped'}");
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    for (unsigned d = 0; d < DISKS; d++)
        json_object_array_add(
            actions, parse("{'type':'blockdev-backup','data':{'device':'s%u','target':'t%u',"
                           "'job-id':'j%u','sync':'bitmap','bitmap':'b','bitmap-mode':'%s',"
                           "'auto-finalize':false,'speed':%u}}",
                           d, d, d, mode, slow[d] ? 1 : 0));
    if (more)
        json_object_array_add(actions, parse("%s", more));
    return transaction_run(g, js, actions, grouped, err);
}

static enum job_status status_of(const char *id)
{
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs) {
        if (strcmp(j->id, id) == 0)
            return j->status;
    }
    return JOB_NULL;
}

/* Nothing can be done to the nodes and the bitmap of member D. */
static void check_busy(struct graph *g, unsigned d)
{
    static const char *const verbs[] = {"clear", "enable", "disable", "remove"};
    struct error err = ERROR_INIT;
    for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++) {
        char type[40];
        snprintf(type, sizeof type, "block-dirty-bitmap-%s", verbs[i]);
        CHECK(command(g, &err, type, parse("{'node':'s%u','name':'b'}", d)) < 0);
        CHECK_TEXT(err, "Bitmap 'b' is currently in use by another operation and cannot be used");
        error_clear(&err);
    }
    CHECK(command(g, &err, "blockdev-backup",
                  parse("{'device':'s%u','target':'t%u','job-id':'k','sync':'full'}", 1 - d, d)) <
          0);
    CHECK(strstr(err.text, "is busy: block device is in use by block job: backup"));
    CHECK(node_check_op(t[d], BLOCK_OP_RESIZE, NULL) < 0);
}

/* The bitmap after the group has failed. */
static void check_failed(unsigned d, const char *mode)
{
    const struct bitmap *found = dirty_bits(bits(d));
    CHECK(dirty_check(bits(d), DIRTY_CHECK_DEFAULT, NULL) == 0);
    CHECK(dirty_enabled(bits(d)));
    for (uint64_t at = 0; at < SIZE; at += GRANULARITY) {
        bool dirty = bitmap_get(found, at);
        if (strcmp(mode, "always") == 0) {
            const uint8_t *source = mem_of(s[d])->bytes + at, *target = mem_of(t[d])->bytes + at;
            struct range chunk = range_make(align_down(at, CHUNK), CHUNK), any;
            CHECK(dirty || memcmp(source, target, GRANULARITY) == 0);
            /* Never more than had been, but for the chunks of the copy. */
            CHECK(!dirty ||
                  (bitmap_next(want[d], chunk.start, 1, &any) && any.start < range_end(chunk)));
        } else {
            CHECK(dirty == bitmap_get(want[d], at));
        }
    }
}

enum way { CANCEL, CANCEL_FORCE, FAIL, WAYS };

/* The members are in states FIRST and SECOND when VICTIM ends. */
static void end_badly(struct graph *g, const char *mode, enum job_status first,
                      enum job_status second, unsigned victim, enum way way)
{
    const enum job_status states[DISKS] = {first, second};
    bool slow[DISKS];
    struct error err = ERROR_INIT;
    set_up(g);
    for (unsigned d = 0; d < DISKS; d++)
        slow[d] = states[d] == JOB_RUNNING || states[d] == JOB_PAUSED;
    events[0] = '\0';
    int r = start_group(g, mode, slow, NULL, &err);
    CHECK_OK(r, err);
    turns(300);
    for (unsigned d = 0; d < DISKS; d++) {
        if (states[d] == JOB_PAUSED)
            verb_ok(job_names[d], JOB_VERB_PAUSE);
        turns(100);
    }
    for (unsigned d = 0; d < DISKS; d++) {
        CHECK(status_of(job_names[d]) == states[d]);
        check_busy(g, d);
        write_at(d, 2 * MiB + 65536, 65536, 0x77); /* not in the bitmap so far */
        write_at(d, MiB / 2, 512, 0x78);           /* ... and in it */
    }
    if (way == FAIL) {
        CHECK(states[victim] == JOB_RUNNING);
        mem_of(t[victim])->bad_write = range_make(0, SIZE);
        mem_of(t[victim])->write_errno = ENOSPC;
        CHECK(jobs_set_speed(js, job_names[victim], 0, NULL) == 0);
    } else {
        r = way == CANCEL ? jobs_do(js, job_names[victim], JOB_VERB_CANCEL, &err)
                          : jobs_do_block(js, job_names[victim], JOB_VERB_CANCEL, true, &err);
        CHECK_OK(r, err);
    }
    turns(500);
    for (unsigned d = 0; d < DISKS; d++) {
        char text[64];
        bool failed = way == FAIL && d == victim;
        snprintf(text, sizeof text,
                 failed ? "%s:COMPLETED(No space left on device) " : "%s:CANCELLED ", job_names[d]);
        CHECK(strstr(events, text));
        CHECK(status_of(job_names[d]) == JOB_NULL);
        check_failed(d, mode);
        mem_of(t[d])->bad_times = 0;
    }
    /* Each alone is completed by a second run. */
    for (unsigned d = 0; d < DISKS; d++) {
        events[0] = '\0';
        command_ok(g, "blockdev-backup",
                   parse("{'device':'s%u','target':'t%u','job-id':'again','sync':'bitmap',"
                         "'bitmap':'b','bitmap-mode':'%s'}",
                         d, d, mode));
        wait_for("again", "null");
        CHECK(strstr(events, "again:COMPLETED again:"));
        CHECK(memcmp(mem_of(s[d])->bytes, mem_of(t[d])->bytes, SIZE) == 0);
    }
    tear_down();
}

VIRTUAL_TEST(each_bitmap_follows_its_table_when_the_group_fails)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    static const enum job_status states[] = {JOB_RUNNING, JOB_PAUSED, JOB_WAITING};
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned c = 0; c < 9; c++) {
            enum job_status first = states[c % 3], second = states[c / 3];
            if (first == JOB_WAITING && second == JOB_WAITING)
                first = second = JOB_PENDING;
            for (unsigned victim = 0; victim < DISKS; victim++) {
                for (int way = 0; way < WAYS; way++) {
                    if (way == FAIL && (victim ? second : first) != JOB_RUNNING)
                        continue;
                    end_badly(g, modes[m], first, second, victim, (enum way)way);
                }
            }
        }
    }
}

/* ---- each member by its own mode ---- */

enum { THREE = 3, CHUNKS = SIZE / CHUNK, BAD = 13 };
static const char *const three_modes[THREE] = {"on-success", "always", "never"};
static const char *const three_sources[THREE] = {"s0", "s1", "s2"};
static const char *const three_targets[THREE] = {"t0", "t1", "t2"};
static const char *const three_jobs[THREE] = {"j0", "j1", "j2"};

struct member {
    struct node *s, *t;
    struct guest guest;
    bool user[CHUNKS], during[CHUNKS]; /* one granule of it, the first */
};

static void member_writes(struct member *m, int chunk, bool *which)
{
    uint8_t buf[512];
    memset(buf, 0x60 + chunk, sizeof buf);
    CHECK(edge_write(m->guest.edge, range_make((uint64_t)chunk * CHUNK, sizeof buf), buf, 0) == 0);
    which[chunk] = true;
}

static void member_init(struct graph *g, struct member *m, unsigned d)
{
    *m = (struct member){.s = disk(g, three_sources[d], SIZE, 0),
                         .t = disk(g, three_targets[d], SIZE, 0)};
    fill_disk(m->s, d + 3);
    memcpy(mem_of(m->t)->bytes, mem_of(m->s)->bytes, SIZE);
    guest_on(&m->guest, m->s, d + 1);
    command_ok(g, "block-dirty-bitmap-add",
               parse("{'node':'%s','name':'b','granularity':%d}", three_sources[d], GRANULARITY));
    for (int c = 3; c < 30; c += 2)
        member_writes(m, c, m->user);
}

/* Granule by granule. What has not been copied remains as whole chunks. */
static void member_check(const struct member *m, const char *mode)
{
    const struct bitmap *bits = dirty_bits(dirty_find(m->s, "b"));
    bool always = strcmp(mode, "always") == 0;
    CHECK(dirty_check(dirty_find(m->s, "b"), DIRTY_CHECK_DEFAULT, NULL) == 0);
    for (uint64_t at = 0; at < SIZE; at += GRANULARITY) {
        uint64_t c = at / CHUNK;
        bool first = at % CHUNK == 0, remains = m->user[c] && !mem_of(m->t)->written[c];
        bool dirty = (first && m->during[c]) || (always ? remains : first && m->user[c]);
        if (bitmap_get(bits, at) != dirty)
            fail_msg("%s: chunk %d, granule %d is %s", mode, (int)c,
                     (int)(at % CHUNK / GRANULARITY), dirty ? "clean" : "dirty");
    }
}

/* VICTIM fails in the middle, when the others have copied all and wait. */
static void one_of_three_fails(struct graph *g, unsigned victim)
{
    struct error err = ERROR_INIT;
    struct member members[THREE];
    CLEANUP(json_putp) struct json_object *grouped = parse("{'completion-mode':'grouped'}");
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    for (unsigned d = 0; d < THREE; d++) {
        member_init(g, &members[d], d);
        json_object_array_add(actions,
                              parse("{'type':'blockdev-backup','data':{'device':'%s','target':'%s',"
                                    "'job-id':'%s','sync':'bitmap','bitmap':'b','bitmap-mode':'%s',"
                                    "'speed':%d,'x-perf':{'max-workers':1,'max-chunk':%d}}}",
                                    three_sources[d], three_targets[d], three_jobs[d],
                                    three_modes[d], d == victim, CHUNK));
    }
    events[0] = '\0';
    mem_of(members[victim].t)->bad_write = range_make(BAD * CHUNK, CHUNK);
    mem_of(members[victim].t)->write_errno = ENOSPC;
    int r = transaction_run(g, js, actions, grouped, &err);
    CHECK_OK(r, err);
    turns(300);
    for (unsigned d = 0; d < THREE; d++) {
        CHECK(status_of(three_jobs[d]) == (d == victim ? JOB_RUNNING : JOB_WAITING));
        member_writes(&members[d], 5, members[d].during);  /* in its bitmap: saved before */
        member_writes(&members[d], 21, members[d].during); /* the victim does not come so far */
        member_writes(&members[d], 40, members[d].during);
    }
    CHECK(jobs_set_speed(js, three_jobs[victim], 0, NULL) == 0);
    turns(500);
    for (unsigned d = 0; d < THREE; d++) {
        char text[64];
        snprintf(text, sizeof text,
                 d == victim ? "%s:COMPLETED(No space left on device) " : "%s:CANCELLED ",
                 three_jobs[d]);
        CHECK(strstr(events, text));
        for (int c = 3; c < 30; c += 2) /* as far as it came, and what guests have made it save */
            CHECK(!mem_of(members[d].t)->written[c] == (d == victim && c >= BAD && c != 21));
        member_check(&members[d], three_modes[d]);
    }
    for (unsigned d = 0; d < THREE; d++) { /* each alone goes on */
        mem_of(members[d].t)->bad_times = 0;
        command_ok(g, "blockdev-backup",
                   parse("{'device':'%s','target':'%s','job-id':'again%u','sync':'bitmap',"
                         "'bitmap':'b','bitmap-mode':'%s'}",
                         three_sources[d], three_targets[d], d, three_modes[d]));
        char id[16];
        snprintf(id, sizeof id, "again%u", d);
        wait_for(id, "null");
        CHECK(memcmp(mem_of(members[d].s)->bytes, mem_of(members[d].t)->bytes, SIZE) == 0);
        edge_detach(members[d].guest.edge);
        node_unref(members[d].s);
        node_unref(members[d].t);
    }
}

VIRTUAL_TEST(each_member_follows_its_own_mode)
{
    for (unsigned victim = 0; victim < THREE; victim++)
        one_of_three_fails(g, victim);
}

/* A last flush fails when the group is finalized: nobody advances, also who has been prepared. */
VIRTUAL_TEST(a_flush_that_fails_at_finalize_fails_all)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    for (unsigned c = 0; c < 12; c++) {
        struct error err = ERROR_INIT;
        unsigned bad = c % 2;
        const char *mode = modes[c / 2 % 3];
        struct node *const *disks = c / 6 ? s : t;
        set_up(g);
        events[0] = '\0';
        int r = start_group(g, mode, (bool[DISKS]){false, false}, NULL, &err);
        CHECK_OK(r, err);
        turns(300);
        mem_of(disks[bad])->flush_errno = EIO;
        verb_ok("j0", JOB_VERB_FINALIZE);
        CHECK(strstr(events, bad ? "j1:COMPLETED(Input/output error) "
                                 : "j0:COMPLETED(Input/output error) "));
        CHECK(strstr(events, bad ? "j0:CANCELLED " : "j1:CANCELLED "));
        for (unsigned d = 0; d < DISKS; d++) {
            check_failed(d, mode);
            if (d == bad && strcmp(mode, "always") == 0) /* nothing of it can be relied on */
                CHECK(bitmap_count(dirty_bits(bits(d))) >= bitmap_count(want[d]));
        }
        mem_of(disks[bad])->flush_errno = 0;
        tear_down();
    }
}

VIRTUAL_TEST(a_group_given_up_before_it_starts_leaves_nothing)
{
    static const struct {
        const char *action, *text;
    } cases[] = {
        {"{'type':'abort','data':{}}", "Transaction aborted using Abort action"},
        {"{'type':'blockdev-backup','data':{'device':'s0','target':'t0','job-id':'j0',"
         "'sync':'full'}}",
         NULL},
        {"{'type':'blockdev-backup','data':{'device':'nosuch','target':'t0','job-id':'k',"
         "'sync':'full'}}",
         "Cannot find device='nosuch' nor node-name='nosuch'"},
        {"{'type':'block-dirty-bitmap-clear','data':{'node':'s0','name':'b'}}",
         "Action 'block-dirty-bitmap-clear' does not support Transaction property completion-mode "
         "= grouped"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        struct error err = ERROR_INIT;
        set_up(g);
        events[0] = '\0';
        CHECK(start_group(g, "always", (bool[DISKS]){false, false}, cases[i].action, &err) < 0);
        if (cases[i].text)
            CHECK_TEXT(err, cases[i].text);
        CHECK(strstr(events, "j0:aborting ") && strstr(events, "j1:aborting "));
        CHECK(!strstr(events, "running") && !strstr(events, "CANCELLED"));
        CHECK(TAILQ_EMPTY(&js->list));
        for (unsigned d = 0; d < DISKS; d++) {
            check_failed(d, "on-success"); /* unchanged, to the bit */
            CHECK(node_check_op(t[d], BLOCK_OP_RESIZE, NULL) == 0);
            write_at(d, 2 * MiB, 512, 1); /* no filter is in the way, and marks go where they did */
            CHECK(bitmap_get(dirty_bits(bits(d)), 2 * MiB));
        }
        tear_down();
    }
}

/* ---- where the bitmaps are kept ---- */

static struct {
    struct dirty_store store;
    unsigned calls, last_nodes;
    unsigned bad_from, bad_to; /* the calls that fail, counted from 1 */
} keeper;

static int keeper_commit(struct dirty_store *st, struct node *const *nodes, size_t count,
                         struct error *err)
{
    keeper.calls++;
    keeper.last_nodes = (unsigned)count;
    CHECK(task_yield() == 0);
    if (keeper.calls >= keeper.bad_from && keeper.calls < keeper.bad_to)
        return error_set(err, EIO, "the keeper is full");
    return 0;
}

static void keep_with(struct graph *g, unsigned bad_from, unsigned bad_to)
{
    memset(&keeper, 0, sizeof keeper);
    keeper.store.commit = keeper_commit;
    dirty_set_store(g, &keeper.store);
    set_up(g);
    keeper.calls = 0;
    keeper.bad_from = bad_from;
    keeper.bad_to = bad_to;
    events[0] = '\0';
}

/* All bitmaps of a group become durable in one step, and if that fails nobody has succeeded. */
VIRTUAL_TEST(the_bitmaps_of_a_group_are_concluded_in_one_step)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned fails = 0; fails < 3; fails++) {
            struct error err = ERROR_INIT;
            keep_with(g, 0, 0);
            int r = start_group(g, modes[m], (bool[DISKS]){false, false}, NULL, &err);
            CHECK_OK(r, err);
            CHECK(keeper.calls > 0 && keeper.last_nodes == DISKS);
            keeper.calls = 0;
            turns(300);
            CHECK(keeper.calls == 0 && status_of("j0") == JOB_PENDING);
            for (unsigned d = 0; d < DISKS; d++)
                write_at(d, 2 * MiB + 65536, 65536, 0x77);
            keeper.bad_from = 1; /* the group's; or also what each then tries alone */
            keeper.bad_to = fails == 2 ? 1000 : fails + 1;
            verb_ok("j1", JOB_VERB_FINALIZE);
            if (!fails) {
                CHECK(keeper.calls == 1 && keeper.last_nodes == DISKS);
                CHECK(strstr(events, "j0:COMPLETED j0:") && strstr(events, "j1:COMPLETED j1:"));
            } else {
                CHECK(keeper.calls >= 1 + DISKS && keeper.last_nodes == 1);
                CHECK(strstr(events, "j1:COMPLETED(the keeper is full)"));
                CHECK(strstr(events, "j0:CANCELLED "));
            }
            for (unsigned d = 0; d < DISKS; d++) {
                if (fails == 2)
                    CHECK(dirty_check(bits(d), DIRTY_CHECK_BUSY, NULL) < 0);
                else if (fails)
                    check_failed(d, modes[m]);
                else if (m < 2)
                    CHECK(bitmap_count(dirty_bits(bits(d))) == 65536);
            }
            tear_down();
            dirty_set_store(g, NULL);
        }
    }
}

VIRTUAL_TEST(a_group_whose_start_cannot_be_kept_does_not_start)
{
    struct error err = ERROR_INIT;
    keep_with(g, 1, 2);
    CHECK(start_group(g, "always", (bool[DISKS]){false, false}, NULL, &err) < 0);
    CHECK_TEXT(err, "the keeper is full");
    CHECK(!strstr(events, "running") && TAILQ_EMPTY(&js->list));
    for (unsigned d = 0; d < DISKS; d++)
        check_failed(d, "on-success");
    tear_down();
    dirty_set_store(g, NULL);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(each_bitmap_follows_its_table_when_the_group_fails),
    cmocka_unit_test(each_member_follows_its_own_mode),
    cmocka_unit_test(a_flush_that_fails_at_finalize_fails_all),
    cmocka_unit_test(a_group_given_up_before_it_starts_leaves_nothing),
    cmocka_unit_test(the_bitmaps_of_a_group_are_concluded_in_one_step),
    cmocka_unit_test(a_group_whose_start_cannot_be_kept_does_not_start),
};

UNIT_MAIN(tests)
