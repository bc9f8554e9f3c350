/* The mirror job and its guests: no write is lost or reordered, whoever writes where, and whatever
 * happens to the nodes meanwhile. */
#include "mirrorutil.h"

/* A guest that knows what it has written: every byte that it reads must be its own. */
struct careful {
    struct test_user user;
    struct edge *edge;
    struct rng rng;
    struct range area;
    uint8_t *model;
    unsigned writes;
    bool stop, rest, busy;
};

static int careful_task(void *arg)
{
    struct careful *c = arg;
    SHIELD();
    uint8_t *buf = xcalloc(1, 200000);
    while (!c->stop) {
        c->busy = !c->rest;
        if (c->rest) {
            CHECK(task_yield() == 0);
            continue;
        }
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

/* ---- a target that is to move ---- */

/* What is there already would be of another place. */
JOB_TEST(a_target_does_not_move)
{
    struct error err = ERROR_INIT;
    two_disks(g, SIZE, 0);
    fill_disk(s, 5);
    struct node *r = open_node(g, parse("{'driver':'raw','node-name':'r','file':'t'}"));
    mirror_ok(parse("{'device':'s','target':'r','job-id':'j','sync':'full'}"));
    wait_for("j", "READY");
    CLEANUP(json_putp)
    struct json_object *list =
        parse("[{'driver':'raw','node-name':'r','file':'t','offset':512,'size':%d}]", SIZE - 512);
    CHECK(graph_reopen(g, list, &err) == -EPERM);
    CHECK(!strcmp(err.text, "Node 'r' may not be resized: an unnamed block device uses it"));
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "null");
    node_unref(r);
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

/* ---- a disk that moves ---- */

/* Four guests, who know what they have written, on a disk that moves between three places; one of
 * them comes and goes below the filter. Mirrors are paused, changed, hit by errors, given up early,
 * when ready, when pending, completed with and without the pivot. */
struct move {
    struct node *disks[3], *at;
    struct careful guests[4]; /* the last is the one below */
    struct rng rng;
};

static void rest(struct move *m, bool yes)
{
    for (int i = 0; i < 4; i++)
        m->guests[i].rest = yes;
    for (int i = 0; yes && i < 4; i++) {
        while (m->guests[i].busy && m->guests[i].edge)
            CHECK(task_yield() == 0);
    }
}

static void disturb(struct move *m, struct node *target)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *blocking = parse("{'id':'j','type':'mirror','copy-mode':'write-blocking'}");
    int r = 0;

    for (uint64_t i = rng_below(&m->rng, 4); i; i--) {
        switch (rng_below(&m->rng, 5)) {
        case 0:
            r = jobs_do(js, "j", JOB_VERB_PAUSE, &err);
            turns(rng_below(&m->rng, 30));
            r = jobs_do(js, "j", JOB_VERB_RESUME, &err);
            break;
        case 1:
            r = jobs_change(js, blocking, &err);
            break;
        case 2:
            r = jobs_set_speed(js, "j", (int64_t)rng_below(&m->rng, 1 << 24), &err);
            turns(10);
            r = jobs_set_speed(js, "j", 0, &err);
            break;
        case 3:
            mem_of(target)->bad_write = range_make(rng_below(&m->rng, SIZE), 65536);
            mem_of(target)->bad_times = 1;
            break;
        }
        turns(rng_below(&m->rng, 60));
    }
    (void)r;                       /* it may have ended */
    mem_of(target)->bad_times = 0; /* it may soon be the guests' disk */
}

static bool gone(void)
{
    return strstr(events, "j:null");
}

static void wait_or_gone(const char *what)
{
    char text[32];
    snprintf(text, sizeof text, "j:%s", what);
    for (unsigned i = 0; !strstr(events, text) && !gone(); i++) {
        CHECK(i < 4000);
        CHECK(sleep_until(clock_after_ns(i < 300 ? 0 : 1000000)) == 0);
    }
}

static void end_it(struct move *m, struct node *target, bool manual, bool *pivot)
{
    struct error err = ERROR_INIT;
    uint64_t how = rng_below(&m->rng, 6);
    int r;

    *pivot = how < 3;
    bool rests = how == 3;
    if (rests)
        rest(m, true);
    r = how < 3   ? jobs_do(js, "j", JOB_VERB_COMPLETE, &err)
        : how < 5 ? jobs_do_block(js, "j", JOB_VERB_CANCEL, false, &err)
                  : jobs_do(js, "j", JOB_VERB_CANCEL, &err);
    if (manual && how < 5) {
        wait_or_gone("PENDING");
        turns(rng_below(&m->rng, 40));
        r = jobs_do(js, "j", rng_below(&m->rng, 4) ? JOB_VERB_FINALIZE : JOB_VERB_CANCEL, &err);
    }
    (void)r;
    wait_or_gone("null");
    *pivot = *pivot && strstr(events, "j:COMPLETED j:");
    if (rests && strstr(events, "j:COMPLETED j:"))
        CHECK(memcmp(mem_of(m->at)->bytes, mem_of(target)->bytes, SIZE) == 0);
}

static void one_move(struct move *m)
{
    struct node *target;
    bool manual = rng_below(&m->rng, 3) == 0, blocking = rng_below(&m->rng, 2), pivot = false;
    struct careful *below = &m->guests[3];

    do
        target = m->disks[rng_below(&m->rng, 3)];
    while (target == m->at);
    for (int i = 0; i < 3; i++)
        mem_of(m->disks[i])->yields = (unsigned)rng_below(&m->rng, 4);
    events[0] = '\0';
    mirror_ok(parse("{'device':'%s','target':'%s','job-id':'j','sync':'full','copy-mode':'%s',"
                    "'granularity':%u,'buf-size':%u,'auto-finalize':%s,'on-target-error':'%s'}",
                    node_name(m->at), node_name(target), blocking ? "write-blocking" : "background",
                    512u << rng_below(&m->rng, 12), 65536u << rng_below(&m->rng, 6),
                    manual ? "false" : "true", rng_below(&m->rng, 3) ? "ignore" : "report"));
    below->edge = attach(&below->user, m->at, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
    rest(m, false);
    turns(rng_below(&m->rng, 100));
    disturb(m, target);
    if (rng_below(&m->rng, 6) == 0 && !gone()) {
        verb_ok("j", JOB_VERB_CANCEL);
        wait_or_gone("null");
    } else {
        rest(m, true); /* a mirror in the background may never catch up */
        wait_or_gone("READY");
        rest(m, false);
        disturb(m, target);
        if (!gone())
            end_it(m, target, manual, &pivot);
    }
    turns(rng_below(&m->rng, 40));
    rest(m, true);
    if (pivot)
        m->at = target;
    for (int i = 0; i < 4; i++) {
        struct careful *c = &m->guests[i];
        CHECK(c->edge->node == m->at);
        CHECK(memcmp(c->model, mem_of(m->at)->bytes + c->area.start, c->area.length) == 0);
    }
    edge_detach(steal(below->edge));
}

JOB_TEST(a_disk_that_moves)
{
    const uint64_t first = test_seed();
    for (uint64_t seed = first; seed < first + 5; seed++) {
        struct move m = {.rng = {seed}};
        SCOPE(tasks);
        for (int i = 0; i < 3; i++) {
            char name[2] = {(char)('a' + i), 0};
            m.disks[i] = disk(g, name, SIZE, i == 2 ? 256 * 1024 : 0);
            mem_of(m.disks[i])->write_errno = EIO;
            fill_disk(m.disks[i], seed + (uint64_t)i);
        }
        m.at = m.disks[0];
        for (unsigned i = 0; i < 4; i++) {
            struct range area = range_make((uint64_t)SIZE / 4 * i, SIZE / 4);
            m.guests[i] = (struct careful){.rng = {seed * 91 + i}, .area = area, .rest = true};
            m.guests[i].model = xcalloc(1, area.length);
            memcpy(m.guests[i].model, mem_of(m.at)->bytes + area.start, area.length);
            if (i < 3)
                m.guests[i].edge =
                    attach(&m.guests[i].user, m.at, PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL);
            scope_spawn(&tasks, careful_task, &m.guests[i]);
        }
        for (int i = 0; i < 12; i++)
            one_move(&m);
        for (int i = 0; i < 4; i++)
            m.guests[i].stop = true;
        CHECK(scope_join(&tasks) == 0);
        for (int i = 0; i < 4; i++) {
            if (m.guests[i].edge)
                edge_detach(m.guests[i].edge);
            free(m.guests[i].model);
        }
        for (int i = 0; i < 3; i++)
            node_unref(m.disks[i]);
    }
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_disk_that_moves),
    cmocka_unit_test(no_write_is_lost_over_a_pivot),
    cmocka_unit_test(writes_to_one_place_from_above_and_below),
    cmocka_unit_test(a_node_below_a_filter_is_replaced),
    cmocka_unit_test(a_pivot_that_fails_moves_nobody),
    cmocka_unit_test(a_target_does_not_move),
    cmocka_unit_test(a_source_that_becomes_another_file),
    cmocka_unit_test(a_source_of_another_size),
};

UNIT_MAIN(tests)
