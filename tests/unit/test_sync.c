/* The primitives: who asks first gets first, what was handed over is not lost, and each
 * wait can be cancelled without leaving a trace. */
#include "unit.h"

#include "rt/clock.h"
#include "rt/sync.h"
#include "seed.h"

#include <errno.h>

#define IN_LOOP(name)                                                                              \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        memset(order, 0, sizeof order);                                                            \
        assert_int_equal(loop_run(LOOP_AUTO, name##_task, NULL), 0);                               \
    }                                                                                              \
    static int name##_task(void *arg)

static char order[128];

static void note(char c)
{
    size_t n = strlen(order);
    assert_true(n + 1 < sizeof order);
    order[n] = c;
}

static void settle(void)
{
    for (int i = 0; i < 4; i++)
        assert_int_equal(task_yield(), 0);
}

/* ---- mutex ---- */

struct locker {
    struct mutex *m;
    char name;
    int result;
};

static int locks(void *arg)
{
    struct locker *l = arg;
    l->result = mutex_lock(l->m);
    if (l->result < 0)
        return l->result;
    note(l->name);
    settle();
    note(l->name);
    mutex_unlock(l->m);
    return 0;
}

IN_LOOP(a_mutex_is_handed_over_in_order)
{
    struct mutex m;
    mutex_init(&m);
    struct locker l[4] = {{&m, 'a'}, {&m, 'b'}, {&m, 'c'}, {&m, 'd'}};
    SCOPE(s);
    for (int i = 0; i < 4; i++)
        scope_spawn(&s, locks, &l[i]);
    assert_int_equal(task_yield(), 0);
    assert_false(mutex_trylock(&m));
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "aabbccdd");
    assert_true(mutex_trylock(&m));
    mutex_unlock(&m);
    return 0;
}

IN_LOOP(a_cancelled_locker_leaves_the_queue)
{
    struct mutex m;
    mutex_init(&m);
    struct locker l[3] = {{&m, 'a'}, {&m, 'b'}, {&m, 'c'}};
    SCOPE(s);
    scope_spawn(&s, locks, &l[0]);
    struct task *b = scope_spawn(&s, locks, &l[1]);
    scope_spawn(&s, locks, &l[2]);
    assert_int_equal(task_yield(), 0);
    task_cancel(b);
    assert_int_equal(scope_join(&s), 0);
    assert_int_equal(l[1].result, -ECANCELED);
    assert_string_equal(order, "aacc");
    return 0;
}

static int locks_shielded(void *arg)
{
    LOCKED(arg);
    note('s');
    assert_int_equal(task_yield(), -ECANCELED);
    return 0;
}

IN_LOOP(a_shielded_locker_gets_it_though_cancelled)
{
    struct mutex m;
    mutex_init(&m);
    SCOPE(s);
    {
        LOCKED(&m);
        scope_spawn(&s, locks_shielded, &m);
        settle();
        scope_cancel(&s);
        settle();
        note('m');
    }
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "ms");
    assert_true(mutex_trylock(&m));
    mutex_unlock(&m);
    return 0;
}

/* Handed over, then cancelled before it ran: it has the lock and gives it back. */
IN_LOOP(a_lock_handed_to_a_cancelled_task_is_not_lost)
{
    struct mutex m;
    mutex_init(&m);
    struct locker l = {&m, 'a'};
    assert_int_equal(mutex_lock(&m), 0);
    SCOPE(s);
    struct task *t = scope_spawn(&s, locks_shielded, &m);
    settle();
    mutex_unlock(&m);
    task_cancel(t);
    scope_spawn(&s, locks, &l);
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "saa");
    return 0;
}

/* ---- event ---- */

static int awaits(void *arg)
{
    int r = event_wait(arg);
    note(r ? 'c' : 'w');
    return r;
}

IN_LOOP(an_event_wakes_all_and_stays)
{
    struct event e;
    event_init(&e);
    SCOPE(s);
    for (int i = 0; i < 3; i++)
        scope_spawn(&s, awaits, &e);
    settle();
    assert_string_equal(order, "");
    event_set(&e);
    assert_int_equal(event_wait(&e), 0);
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "www");
    event_reset(&e);
    {
        SCOPE(again);
        scope_spawn(&again, awaits, &e);
        settle();
    }
    assert_string_equal(order, "wwwc");
    return 0;
}

static int awaits_an_hour(void *arg)
{
    int r = event_wait_until(arg, clock_after_ns(3600 * NSEC_PER_SEC));
    note(r == 0 ? 'w' : r == -ECANCELED ? 'c' : 't');
    return r;
}

IN_LOOP(an_event_with_a_deadline_may_come_first_or_be_cancelled)
{
    struct event e;
    event_init(&e);
    SCOPE(s);
    scope_spawn(&s, awaits_an_hour, &e);
    struct task *t = scope_spawn(&s, awaits_an_hour, &e);
    settle();
    task_cancel(t);
    settle();
    event_set(&e);
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "cw");
    event_reset(&e);
    {
        SHIELD();
        assert_int_equal(event_wait_until(&e, clock_after_ns(1000000)), -ETIMEDOUT);
    }
    return 0;
}

/* ---- semaphore ---- */

struct taker {
    struct semaphore *s;
    uint64_t n;
    char name;
};

static int takes(void *arg)
{
    struct taker *t = arg;
    int r = semaphore_take(t->s, t->n);
    if (r == 0)
        note(t->name);
    return r;
}

IN_LOOP(a_semaphore_serves_in_order_of_asking)
{
    struct semaphore sem;
    semaphore_init(&sem, 3);
    struct taker t[] = {{&sem, 2, 'a'}, {&sem, 4, 'b'}, {&sem, 1, 'c'}};
    SCOPE(s);
    for (int i = 0; i < 3; i++)
        scope_spawn(&s, takes, &t[i]);
    settle();
    assert_string_equal(order, "a"); /* c would fit, but b asked before it */
    semaphore_give(&sem, 2);
    settle();
    assert_string_equal(order, "a");
    semaphore_give(&sem, 2);
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "abc");
    assert_int_equal(sem.free, 0);
    return 0;
}

IN_LOOP(who_stood_behind_a_cancelled_taker_moves_up)
{
    struct semaphore sem;
    semaphore_init(&sem, 1);
    struct taker t[] = {{&sem, 100, 'b'}, {&sem, 1, 'c'}};
    SCOPE(s);
    struct task *big = scope_spawn(&s, takes, &t[0]);
    scope_spawn(&s, takes, &t[1]);
    settle();
    assert_string_equal(order, "");
    task_cancel(big);
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "c");
    return 0;
}

/* ---- channel ---- */

enum { ITEMS = 1000 };

struct ends {
    struct channel *c;
    uint64_t from, sum, count;
};

static int sends(void *arg)
{
    struct ends *e = arg;
    for (uint64_t i = 1; i <= ITEMS; i++) {
        int r = channel_send(e->c, (void *)(uintptr_t)(e->from + i));
        if (r < 0)
            return r;
    }
    return 0;
}

static int receives(void *arg)
{
    struct ends *e = arg;
    void *item;
    int r;
    while ((r = channel_recv(e->c, &item)) == 0) {
        e->sum += (uintptr_t)item;
        e->count++;
        if (e->count % 7 == 0 && (r = task_yield()) < 0)
            return r;
    }
    return r == -EPIPE ? 0 : r;
}

IN_LOOP(a_channel_loses_and_doubles_nothing)
{
    for (size_t capacity = 1; capacity <= 64; capacity *= 4) {
        struct channel c;
        channel_init(&c, capacity);
        struct ends in[3] = {{&c, 0}, {&c, 10000}, {&c, 20000}}, out[4] = {{&c}, {&c}, {&c}, {&c}};
        SCOPE(readers);
        for (int i = 0; i < 4; i++)
            scope_spawn(&readers, receives, &out[i]);
        SCOPE(writers);
        for (int i = 0; i < 3; i++)
            scope_spawn(&writers, sends, &in[i]);
        assert_int_equal(scope_join(&writers), 0);
        channel_close(&c);
        assert_int_equal(channel_send(&c, NULL), -EPIPE);
        assert_int_equal(scope_join(&readers), 0);
        uint64_t sum = 0, count = 0;
        for (int i = 0; i < 4; i++) {
            sum += out[i].sum;
            count += out[i].count;
        }
        assert_int_equal(count, 3 * ITEMS);
        assert_int_equal(sum, (uint64_t)3 * ITEMS * (ITEMS + 1) / 2 + 30000 * ITEMS);
        channel_fini(&c);
    }
    return 0;
}

IN_LOOP(closing_a_channel_keeps_what_is_in_it_and_refuses_who_waits)
{
    struct channel c;
    void *item;
    channel_init(&c, 2);
    struct ends in = {&c, 0};
    SCOPE(s);
    scope_spawn(&s, sends, &in);
    settle();
    channel_close(&c);
    assert_int_equal(scope_join(&s), -EPIPE);
    assert_int_equal(channel_recv(&c, &item), 0);
    assert_int_equal((uintptr_t)item, 1);
    assert_int_equal(channel_recv(&c, &item), 0);
    assert_int_equal((uintptr_t)item, 2);
    assert_int_equal(channel_recv(&c, &item), -EPIPE);
    channel_fini(&c);
    return 0;
}

IN_LOOP(both_ends_of_a_channel_can_be_cancelled)
{
    struct channel c;
    void *item;
    channel_init(&c, 1);
    struct ends e = {&c, 0};
    {
        SCOPE(s);
        scope_spawn(&s, receives, &e);
        settle();
        scope_cancel(&s);
        assert_int_equal(scope_join(&s), 0);
    }
    {
        SCOPE(s);
        scope_spawn(&s, sends, &e);
        settle();
        scope_cancel(&s);
        assert_int_equal(scope_join(&s), 0);
    }
    assert_int_equal(channel_recv(&c, &item), 0); /* the first; the second was not sent */
    assert_int_equal(c.length, 0);
    assert_true(waitq_empty(&c.readers) && waitq_empty(&c.writers));
    channel_fini(&c);
    return 0;
}

/* ---- waitq ---- */

static int queues(void *arg)
{
    int r = waitq_wait(arg);
    note(r ? 'c' : 'w');
    return r;
}

IN_LOOP(a_waitq_wakes_one_or_all)
{
    struct waitq q;
    waitq_init(&q);
    assert_false(waitq_wake_one(&q));
    SCOPE(s);
    for (int i = 0; i < 4; i++)
        scope_spawn(&s, queues, &q);
    settle();
    assert_true(waitq_wake_one(&q));
    settle();
    assert_string_equal(order, "w");
    waitq_wake_all(&q);
    assert_true(waitq_empty(&q));
    assert_int_equal(scope_join(&s), 0);
    assert_string_equal(order, "wwww");
    return 0;
}

/* ---- all together, at random: nobody is lost, the mutex holds, the units come back ---- */

struct crowd {
    struct mutex m;
    struct semaphore sem;
    struct event e;
    int inside, entered;
    struct rng rng;
};

static int mingles(void *arg)
{
    struct crowd *c = arg;
    for (int i = 0; i < 50; i++) {
        uint64_t units = 1 + rng_below(&c->rng, 5);
        int r = semaphore_take(&c->sem, units);
        if (r < 0)
            return r;
        r = mutex_lock(&c->m);
        if (r == 0) {
            assert_int_equal(c->inside++, 0);
            r = rng_below(&c->rng, 2) ? task_yield() : 0;
            c->entered++;
            c->inside--;
            mutex_unlock(&c->m);
        }
        semaphore_give(&c->sem, units);
        if (r < 0)
            return r;
        if (rng_below(&c->rng, 8) == 0) {
            r = event_wait_until(&c->e, clock_after_ns(rng_below(&c->rng, 100000)));
            if (r == -ECANCELED)
                return r;
        }
    }
    return 0;
}

IN_LOOP(a_crowd_some_of_whom_are_cancelled)
{
    struct crowd c = {.rng = {test_seed()}};
    mutex_init(&c.m);
    semaphore_init(&c.sem, 7);
    event_init(&c.e);
    for (int round = 0; round < 20; round++) {
        struct task *t[40];
        SCOPE(s);
        for (int i = 0; i < 40; i++)
            t[i] = scope_spawn(&s, mingles, &c);
        uint64_t spare = rng_below(&c.rng, 40);
        for (uint64_t i = 0; i < 4; i++) {
            uint64_t turns = rng_below(&c.rng, 4);
            for (uint64_t k = 0; k < turns; k++)
                assert_int_equal(task_yield(), 0);
            task_cancel(t[(spare + i) % 40]); /* long before it could have ended */
        }
        assert_int_equal(scope_join(&s), 0);
        assert_null(c.m.owner);
        assert_int_equal(c.sem.free, 7);
        assert_true(waitq_empty(&c.m.waiting) && waitq_empty(&c.sem.waiting));
        assert_true(waitq_empty(&c.e.waiting));
    }
    assert_true(c.entered >= 20 * 36 * 50);
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_mutex_is_handed_over_in_order),
    cmocka_unit_test(a_cancelled_locker_leaves_the_queue),
    cmocka_unit_test(a_shielded_locker_gets_it_though_cancelled),
    cmocka_unit_test(a_lock_handed_to_a_cancelled_task_is_not_lost),
    cmocka_unit_test(an_event_wakes_all_and_stays),
    cmocka_unit_test(an_event_with_a_deadline_may_come_first_or_be_cancelled),
    cmocka_unit_test(a_semaphore_serves_in_order_of_asking),
    cmocka_unit_test(who_stood_behind_a_cancelled_taker_moves_up),
    cmocka_unit_test(a_channel_loses_and_doubles_nothing),
    cmocka_unit_test(closing_a_channel_keeps_what_is_in_it_and_refuses_who_waits),
    cmocka_unit_test(both_ends_of_a_channel_can_be_cancelled),
    cmocka_unit_test(a_waitq_wakes_one_or_all),
    cmocka_unit_test(a_crowd_some_of_whom_are_cancelled),
};
UNIT_MAIN(tests)
