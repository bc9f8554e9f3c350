/* Hot regions against a model that may lose its power at any moment: what was marked and is not
 * durable must be in the table that the ring tells, whichever of the writes under way have landed.
 */
#include "persist/hot.h"

#include "seed.h"
#include "unit.h"
#include "virtual.h"

enum { REGION_BITS = 9, REGIONS = 24, GUESTS = 5, SLOTS_MAX = 16 };

struct model {
    struct rng rng;
    struct hot *hot;
    unsigned slots;
    unsigned marks[REGIONS];    /* so many times marked */
    unsigned durable[REGIONS];  /* of them, in a copy that is durable */
    uint32_t told[SLOTS_MAX];   /* the table that the ring tells */
    uint32_t coming[SLOTS_MAX]; /* by the transaction under way */
    bool committing, cleaning, repairing;
    unsigned failures; /* in a hundred */
    unsigned writes;
    unsigned guests; /* that have not ended */
    struct scope repairs;
};

static bool in_table(const struct model *w, const uint32_t *table, uint32_t region)
{
    for (unsigned i = 0; i < w->slots; i++)
        if (table[i] == region)
            return true;
    return false;
}

/* The power fails now. */
static void check(const struct model *w)
{
    const char *broken;
    uint32_t unwritten[SLOTS_MAX];
    const size_t n = hot_unwritten(w->hot, unwritten);

    for (size_t i = 1; i < n; i++)
        assert_true(unwritten[i - 1] < unwritten[i]);
    for (uint32_t i = 0; i < REGIONS; i++) {
        if (w->marks[i] == w->durable[i])
            continue;
        size_t at = 0;
        while (at < n && unwritten[at] != i)
            at++;
        assert_true(at < n); /* else a clean end would forget it, too */
        assert_true(in_table(w, w->told, i));
        assert_true(!w->committing || in_table(w, w->coming, i));
    }
    if (!hot_valid(w->hot, &broken))
        fail_msg("%s", broken);
}

static void pass_time(struct model *w, unsigned most_us)
{
    int r = sleep_until(clock_after_ns(rng_below(&w->rng, most_us) * 1000));
    (void)r;
}

static int op_commit(void *owner, struct ring_block *b, const uint32_t *table)
{
    struct model *w = owner;

    assert_false(w->committing);
    while (w->repairing)
        pass_time(w, 10);
    assert_true(b->n_changes > 0 && b->n_changes <= RING_CHANGES);
    memcpy(w->coming, table, w->slots * sizeof *table);
    for (unsigned i = 0; i < b->n_changes; i++) {
        assert_int_equal(table[b->changes[i].slot], b->changes[i].region);
        for (unsigned j = 0; j < i; j++)
            assert_int_not_equal(b->changes[i].slot, b->changes[j].slot);
    }
    w->committing = true;
    check(w);
    pass_time(w, 100);
    bool fails = rng_below(&w->rng, 100) < w->failures;
    if (!fails || rng_below(&w->rng, 2))
        memcpy(w->told, w->coming, sizeof w->told);
    w->committing = false;
    check(w);
    return fails ? -EIO : 0;
}

static int op_clean(void *owner, const uint32_t *regions, size_t n)
{
    struct model *w = owner;
    unsigned copies[REGIONS];

    assert_false(w->cleaning);
    while (w->repairing)
        pass_time(w, 10);
    w->cleaning = true;
    for (size_t i = 0; i < n; i++) {
        assert_true(regions[i] < REGIONS);
        copies[i] = w->marks[regions[i]];
        if (rng_below(&w->rng, 4) == 0)
            pass_time(w, 30);
    }
    pass_time(w, 300);
    bool fails = rng_below(&w->rng, 100) < w->failures;
    for (size_t i = 0; i < n; i++)
        if (!fails || rng_below(&w->rng, 2))
            w->durable[regions[i]] = (unsigned)max_u64(w->durable[regions[i]], copies[i]);
    w->cleaning = false;
    check(w);
    return fails ? -EIO : 0;
}

/* A new file: the bits of this moment, and the table. */
static int repair(void *arg)
{
    struct model *w = arg;
    uint32_t table[SLOTS_MAX];
    unsigned marks[REGIONS];

    while (w->committing || w->cleaning || w->repairing)
        pass_time(w, 10);
    w->repairing = true;
    hot_table(w->hot, table);
    memcpy(marks, w->marks, sizeof marks);
    pass_time(w, 50);
    /* What was marked meanwhile was hot. */
    memcpy(w->told, table, w->slots * sizeof *table);
    memcpy(w->durable, marks, sizeof marks);
    w->repairing = false;
    check(w);
    hot_retry(w->hot);
    return 0;
}

static void op_failed(void *owner, int error)
{
    struct model *w = owner;

    scope_spawn(&w->repairs, repair, w);
}

static int guest(void *arg)
{
    struct model *w = arg;

    for (unsigned n = 0; n < w->writes; n++) {
        unsigned first = (unsigned)rng_below(&w->rng, REGIONS);
        unsigned count = 1 + (unsigned)rng_below(&w->rng, min_u64(w->slots / 2, REGIONS - first));
        struct range r = range_make((uint64_t)first << REGION_BITS, (uint64_t)count << REGION_BITS);
        if (rng_below(&w->rng, 2))
            r = range_make(r.start + 100, r.length - 200);
        if (!hot_try_take(w->hot, r))
            assert_int_equal(hot_take(w->hot, r), 0);
        if (rng_below(&w->rng, 4) == 0) {
            /* Another observer makes it wait between the take and the marks. */
            pass_time(w, 20);
        }
        for (unsigned i = first; i < first + count; i++)
            w->marks[i]++;
        hot_marked(w->hot, r);
        check(w);
        pass_time(w, 50);
        hot_give(w->hot, r);
        if (rng_below(&w->rng, 8) == 0)
            pass_time(w, 1000);
    }
    w->guests--;
    return 0;
}

/* Now and then, in the midst of all that, regions are asked to leave. */
static int checkpoints(void *arg)
{
    struct model *w = arg;
    unsigned pause_us = 1 << (4 + rng_below(&w->rng, 9));

    while (w->guests) {
        pass_time(w, pause_us);
        enum hot_which which = rng_below(&w->rng, 2) ? HOT_ALL : HOT_UNUSED;
        assert_int_equal(hot_leave(w->hot, which), 0);
        check(w);
    }
    return 0;
}

static int history(void *arg)
{
    static const struct hot_ops ops = {op_commit, op_clean, op_failed};
    struct model *w = arg;
    struct hot_stats stats;

    for (unsigned i = 0; i < SLOTS_MAX; i++)
        w->told[i] = REGION_NONE;
    scope_init(&w->repairs);
    unsigned marked_max = (unsigned)rng_below(&w->rng, w->slots + 1);
    w->hot = hot_new(&(struct hot_options){REGION_BITS, w->slots, marked_max}, &ops, w);
    {
        SCOPE(guests);
        w->guests = GUESTS;
        for (unsigned i = 0; i < GUESTS; i++)
            scope_spawn(&guests, guest, w);
        if (rng_below(&w->rng, 4))
            scope_spawn(&guests, checkpoints, w);
        assert_int_equal(scope_join(&guests), 0);
    }
    /* Nobody writes: all leave, and a power loss adds nothing. */
    assert_int_equal(hot_leave(w->hot, HOT_ALL), 0);
    assert_int_equal(scope_join(&w->repairs), 0);
    hot_stats(w->hot, &stats);
    assert_true(stats.commits > 0 && stats.cleanings > 0 && stats.waiting == 0);
    assert_true(stats.left > 0 && stats.hot == 0 && stats.marked == 0);
    for (unsigned i = 0; i < w->slots; i++)
        assert_int_equal(w->told[i], REGION_NONE);
    for (uint32_t i = 0; i < REGIONS; i++)
        assert_int_equal(w->marks[i], w->durable[i]);
    hot_free(w->hot);
    scope_fini(&w->repairs);
    return 0;
}

static void random_histories(unsigned failures)
{
    const char *count = getenv("TEST_COUNT");
    uint64_t seed = test_seed(), n = count ? strtoull(count, NULL, 0) : 300;

    for (uint64_t i = 0; i < n; i++) {
        struct model w = {.rng = {seed + i}, .failures = failures, .writes = 60};
        w.slots = 4 + (unsigned)rng_below(&w.rng, SLOTS_MAX - 4 + 1);
        assert_int_equal(run_virtually(history, &w), 0);
    }
}

static void nothing_marked_is_forgotten(void **state)
{
    random_histories(0);
}

static void failures_are_put_right(void **state)
{
    random_histories(5);
}

static int too_large(void *arg)
{
    static const struct hot_ops ops = {op_commit, op_clean, op_failed};
    struct model w = {.slots = 8};

    w.hot = hot_new(&(struct hot_options){REGION_BITS, w.slots, 0}, &ops, &w);
    assert_int_equal(hot_take(w.hot, range_make(0, 5 << REGION_BITS)), -E2BIG);
    hot_marked(w.hot, range_make(0, 5 << REGION_BITS));
    hot_give(w.hot, range_make(0, 5 << REGION_BITS));
    assert_true(hot_try_take(w.hot, range_make(0, 0)));
    hot_fail(w.hot);
    assert_int_equal(hot_take(w.hot, range_make(0, 1)), -EIO);
    hot_free(w.hot);
    return 0;
}

static void a_large_write_is_the_callers(void **state)
{
    assert_int_equal(run_virtually(too_large, NULL), 0);
}

/* ---- what a checkpoint takes, and what stays ---- */

static struct range region(uint32_t i)
{
    return range_make((uint64_t)i << REGION_BITS, 1 << REGION_BITS);
}

static void begin_write(struct model *w, uint32_t i)
{
    assert_int_equal(hot_take(w->hot, region(i)), 0);
    w->marks[i]++;
    hot_marked(w->hot, region(i));
}

static void write_to(struct model *w, uint32_t i)
{
    begin_write(w, i);
    hot_give(w->hot, region(i));
}

static unsigned count_hot(struct model *w)
{
    struct hot_stats stats;

    hot_stats(w->hot, &stats);
    return stats.hot;
}

static const struct hot_ops model_ops = {op_commit, op_clean, op_failed};

static void with_table(struct model *w, const struct hot_ops *ops, unsigned slots,
                       unsigned marked_max)
{
    *w = (struct model){.rng = {test_seed()}, .slots = slots};
    for (unsigned i = 0; i < SLOTS_MAX; i++)
        w->told[i] = REGION_NONE;
    w->hot = hot_new(&(struct hot_options){REGION_BITS, slots, marked_max}, ops, w);
}

static int what_is_in_use(void *arg)
{
    struct model w;

    with_table(&w, &model_ops, 8, 0);
    assert_false(hot_is_cheap(w.hot)); /* none is there */
    write_to(&w, 0);
    assert_true(hot_is_cheap(w.hot));
    begin_write(&w, 1);
    assert_false(hot_is_cheap(w.hot));
    assert_int_equal(hot_leave(w.hot, HOT_ALL), 0);
    assert_true(!in_table(&w, w.told, 0) && in_table(&w, w.told, 1));
    hot_give(w.hot, region(1));

    /* In a period the region is used, in the next it is not. */
    write_to(&w, 2);
    assert_int_equal(hot_leave(w.hot, HOT_UNUSED), 0);
    assert_int_equal(count_hot(&w), 2);
    write_to(&w, 2);
    assert_int_equal(hot_leave(w.hot, HOT_UNUSED), 0);
    assert_true(in_table(&w, w.told, 2) && count_hot(&w) == 1);
    assert_int_equal(hot_leave(w.hot, HOT_UNUSED), 0);
    assert_int_equal(count_hot(&w), 0);

    hot_fail(w.hot);
    assert_int_equal(hot_leave(w.hot, HOT_ALL), -EIO);
    hot_free(w.hot);
    return 0;
}

static void a_checkpoint_leaves_what_is_in_use(void **state)
{
    assert_int_equal(run_virtually(what_is_in_use, NULL), 0);
}

static int many_marked(void *arg)
{
    struct hot_stats stats;
    struct model w;

    with_table(&w, &model_ops, 16, 4);
    for (uint32_t i = 0; i < 4; i++)
        write_to(&w, i);
    pass_time(&w, 1);
    hot_stats(w.hot, &stats);
    assert_true(stats.marked == 4 && stats.cleanings == 0);
    write_to(&w, 4);
    assert_int_equal(sleep_until(clock_after_ns(NSEC_PER_SEC)), 0);
    hot_stats(w.hot, &stats);
    assert_true(stats.marked == 0 && stats.cleanings == 1 && stats.amount_cleanings == 1);
    assert_true(stats.hot == 5); /* they are cleaned, and stay */
    hot_free(w.hot);
    return 0;
}

static void too_many_marks_are_copied(void **state)
{
    assert_int_equal(run_virtually(many_marked, NULL), 0);
}

static int op_clean_fails(void *owner, const uint32_t *regions, size_t n)
{
    struct model *w = owner;

    w->cleaning = true;
    pass_time(w, 1000);
    return -EIO;
}

static void op_never_put_right(void *owner, int error)
{
}

/* sim --groups, seed 72004483 */
static int failing_end(void *arg)
{
    static const struct hot_ops ops = {op_commit, op_clean_fails, op_never_put_right};
    struct model w;

    with_table(&w, &ops, 16, 4);
    for (uint32_t i = 0; i < 5; i++)
        write_to(&w, i);
    while (!w.cleaning)
        assert_int_equal(task_yield(), 0);
    hot_free(w.hot);
    return 0;
}

static void what_fails_at_the_end_is_waited_for_by_nobody(void **state)
{
    assert_int_equal(run_virtually(failing_end, NULL), 0);
}

static int waiter_task(void *arg)
{
    struct model *w = arg;
    int r = hot_leave(w->hot, HOT_ALL);

    assert_int_equal(r, -ECANCELED);
    return 0;
}

static int cancelled_checkpoint(void *arg)
{
    struct model w;

    with_table(&w, &model_ops, 8, 0);
    write_to(&w, 0);
    {
        SCOPE(tasks);
        scope_spawn(&tasks, waiter_task, &w);
        assert_int_equal(task_yield(), 0);
        scope_cancel(&tasks);
        SHIELD();
        (void)!scope_join(&tasks);
    }
    hot_free(w.hot);
    return 0;
}

static void a_checkpoint_can_be_given_up(void **state)
{
    assert_int_equal(run_virtually(cancelled_checkpoint, NULL), 0);
}

/* ---- how many transactions ---- */

enum { COMMIT_US = 100, CROWD = 8, ROUNDS = 100, CROWD_SLOTS = 1024 };

struct crowd {
    struct hot *hot;
    unsigned client_us; /* what a client needs for a write besides */
    unsigned late_us;   /* every other begins so much later */
    unsigned begun, commits;
    uint32_t next_region;
};

static int op_commit_slowly(void *owner, struct ring_block *b, const uint32_t *table)
{
    struct crowd *c = owner;

    c->commits++;
    return sleep_until(clock_after_ns(COMMIT_US * 1000));
}

static int op_clean_at_once(void *owner, const uint32_t *regions, size_t n)
{
    return 0;
}

static void write_to_another(struct crowd *c)
{
    const struct range r = region(c->next_region++);

    assert_int_equal(hot_take(c->hot, r), 0);
    hot_give(c->hot, r);
}

static int writer_of_new_regions(void *arg)
{
    struct crowd *c = arg;

    assert_int_equal(sleep_until(clock_after_ns(c->begun++ % 2 * c->late_us * 1000)), 0);
    for (unsigned i = 0; i < ROUNDS; i++) {
        write_to_another(c);
        assert_int_equal(sleep_until(clock_after_ns(c->client_us * 1000)), 0);
    }
    return 0;
}

static void begin_crowd(struct crowd *c, unsigned clients, unsigned client_us, unsigned late_us)
{
    static const struct hot_ops ops = {op_commit_slowly, op_clean_at_once, op_never_put_right};

    *c = (struct crowd){.client_us = client_us, .late_us = late_us};
    c->hot = hot_new(&(struct hot_options){REGION_BITS, CROWD_SLOTS, 0}, &ops, c);
    SCOPE(tasks);
    for (unsigned i = 0; i < clients; i++)
        scope_spawn(&tasks, writer_of_new_regions, c);
    SHIELD();
    assert_int_equal(scope_join(&tasks), 0);
}

static int crowd(void *arg)
{
    struct crowd c;

    begin_crowd(&c, CROWD, 3, 3);
    assert_in_range(c.commits, ROUNDS, ROUNDS * 4 / 3);

    /* Seven of them do not come again: the eighth waits for them once, half a transaction. */
    uint64_t began = clock_now_ns();
    write_to_another(&c);
    assert_in_range(clock_now_ns() - began, COMMIT_US * 1000, COMMIT_US * 1500);
    began = clock_now_ns();
    write_to_another(&c);
    assert_int_equal(clock_now_ns() - began, COMMIT_US * 1000);
    hot_free(c.hot);
    return 0;
}

static void a_transaction_waits_for_those_who_come(void **state)
{
    assert_int_equal(run_virtually(crowd, NULL), 0);
}

/* They come in two halves, always later than they are waited for. */
static int slow_crowd(void *arg)
{
    struct crowd c;
    uint64_t began = clock_now_ns();

    begin_crowd(&c, CROWD, 60, 30);
    assert_in_range(c.commits, 2 * ROUNDS, 2 * ROUNDS + 2);
    assert_in_range(clock_now_ns() - began, 2 * ROUNDS * COMMIT_US * UINT64_C(1000),
                    2 * ROUNDS * COMMIT_US * UINT64_C(1050));
    hot_free(c.hot);
    return 0;
}

static void a_transaction_does_not_wait_in_vain(void **state)
{
    assert_int_equal(run_virtually(slow_crowd, NULL), 0);
}

/* As many wait as two transactions can carry, and come again before half of one is over: each is
 * full, and nothing is gained by waiting for those whom the last has let go. */
static int full_transactions(void *arg)
{
    enum { MANY = 2 * RING_CHANGES, COMMITS = ROUNDS * MANY / RING_CHANGES };
    struct crowd c;
    uint64_t began = clock_now_ns();

    begin_crowd(&c, MANY, COMMIT_US * 45 / 100, 0);
    assert_in_range(clock_now_ns() - began, 0, (COMMITS + 3) * COMMIT_US * UINT64_C(1000));
    hot_free(c.hot);
    return 0;
}

static void a_full_transaction_waits_for_nobody(void **state)
{
    assert_int_equal(run_virtually(full_transactions, NULL), 0);
}

/* ---- who may overtake ---- */

struct crush {
    struct hot *hot;
    unsigned begun, rounds; /* of all who write to what is hot */
};

enum { CRUSH = 8, CRUSH_SLOTS = 4, CRUSH_ROUNDS = CRUSH * 100 };

/* Two of them have each region, one half a write after the other: it is pinned all the time. */
static int writer_of_hot_regions(void *arg)
{
    struct crush *c = arg;
    const unsigned i = c->begun++;
    const struct range r = region(i / 2);

    assert_int_equal(sleep_until(clock_after_ns(i % 2 * 5000)), 0);
    while (c->rounds++ < CRUSH_ROUNDS) {
        assert_int_equal(hot_take(c->hot, r), 0);
        assert_int_equal(sleep_until(clock_after_ns(10000)), 0);
        hot_give(c->hot, r);
    }
    return 0;
}

static int crush(void *arg)
{
    static const struct hot_ops ops = {op_commit_slowly, op_clean_at_once, op_never_put_right};
    struct crowd commits = {NULL};
    struct crush c = {
        .hot = hot_new(&(struct hot_options){REGION_BITS, CRUSH_SLOTS, 0}, &ops, &commits)};
    {
        SCOPE(tasks);
        for (unsigned i = 0; i < CRUSH; i++)
            scope_spawn(&tasks, writer_of_hot_regions, &c);
        assert_int_equal(sleep_until(clock_after_ns(NSEC_PER_SEC / 1000)), 0);
        assert_int_equal(hot_take(c.hot, region(CRUSH_SLOTS)), 0);
        assert_in_range(c.rounds, CRUSH, CRUSH_ROUNDS - 1); /* not only when they have ended */
        hot_give(c.hot, region(CRUSH_SLOTS));
        SHIELD();
        assert_int_equal(scope_join(&tasks), 0);
    }
    hot_free(c.hot);
    return 0;
}

static void who_has_no_slot_is_not_overtaken(void **state)
{
    assert_int_equal(run_virtually(crush, NULL), 0);
}

/* All slots are pinned nearly all the time, each by a write that comes again at once; a large one
 * gets its regions as the slots fall free, not one with each transaction. */
enum { PINNED_SLOTS = 128, LARGE = 64, PIN_US = 1000 };

struct pinners {
    struct crowd c;
    unsigned begun;
    bool end;
};

static int pinner(void *arg)
{
    struct pinners *p = arg;
    const struct range r = region(p->begun);
    uint64_t until =
        clock_after_ns(5 * PIN_US * 1000 + p->begun++ * (PIN_US * 1000 / PINNED_SLOTS));

    while (!p->end) {
        assert_int_equal(hot_take(p->c.hot, r), 0);
        hot_marked(p->c.hot, r);
        assert_int_equal(sleep_until(until), 0);
        hot_give(p->c.hot, r);
        until = clock_after_ns(PIN_US * 1000);
    }
    return 0;
}

static int large_among_pinners(void *arg)
{
    static const struct hot_ops ops = {op_commit_slowly, op_clean_at_once, op_never_put_right};
    const struct range large =
        range_make((uint64_t)PINNED_SLOTS << REGION_BITS, LARGE << REGION_BITS);
    struct pinners p = {.begun = 0};

    p.c.hot = hot_new(&(struct hot_options){REGION_BITS, PINNED_SLOTS, 0}, &ops, &p.c);
    {
        SCOPE(tasks);
        for (unsigned i = 0; i < PINNED_SLOTS; i++)
            scope_spawn(&tasks, pinner, &p);
        assert_int_equal(sleep_until(clock_after_ns(10 * PIN_US * 1000)), 0);
        unsigned before = p.c.commits;
        assert_int_equal(hot_take(p.c.hot, large), 0);
        assert_in_range(p.c.commits - before, 1, LARGE / 4);
        p.end = true;
        hot_give(p.c.hot, large);
        SHIELD();
        assert_int_equal(scope_join(&tasks), 0);
    }
    hot_free(p.c.hot);
    return 0;
}

static void a_large_write_is_not_overtaken_again_and_again(void **state)
{
    assert_int_equal(run_virtually(large_among_pinners, NULL), 0);
}

static int overtake(void *arg)
{
    static const struct hot_ops ops = {op_commit_slowly, op_clean_at_once, op_never_put_right};
    struct crowd c = {NULL};

    c.hot = hot_new(&(struct hot_options){REGION_BITS, 64, 0}, &ops, &c);
    write_to_another(&c);
    {
        SCOPE(tasks);
        c.client_us = 1;
        scope_spawn(&tasks, writer_of_new_regions, &c);
        assert_int_equal(sleep_until(clock_after_ns(10000)), 0);
        assert_true(hot_try_take(c.hot, region(0))); /* while others wait */
        hot_give(c.hot, region(0));
        assert_false(hot_try_take(c.hot, region(1))); /* is entering */
        SHIELD();
        assert_int_equal(scope_join(&tasks), 0);
    }
    hot_free(c.hot);
    return 0;
}

static void what_is_hot_waits_for_nobody(void **state)
{
    assert_int_equal(run_virtually(overtake, NULL), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(nothing_marked_is_forgotten),
    cmocka_unit_test(failures_are_put_right),
    cmocka_unit_test(a_large_write_is_the_callers),
    cmocka_unit_test(a_checkpoint_leaves_what_is_in_use),
    cmocka_unit_test(too_many_marks_are_copied),
    cmocka_unit_test(a_checkpoint_can_be_given_up),
    cmocka_unit_test(what_fails_at_the_end_is_waited_for_by_nobody),
    cmocka_unit_test(a_transaction_waits_for_those_who_come),
    cmocka_unit_test(a_transaction_does_not_wait_in_vain),
    cmocka_unit_test(a_full_transaction_waits_for_nobody),
    cmocka_unit_test(who_has_no_slot_is_not_overtaken),
    cmocka_unit_test(a_large_write_is_not_overtaken_again_and_again),
    cmocka_unit_test(what_is_hot_waits_for_nobody),
};
UNIT_MAIN(tests)
