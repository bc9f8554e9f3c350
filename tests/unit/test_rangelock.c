/* Range locks against a stupid model: an array of who asked, in order, where somebody holds
 * if and only if nobody before conflicts. */
#include "unit.h"

#include "rt/rangelock.h"
#include "seed.h"

#include <errno.h>

static int run(task_fn *fn, void *arg)
{
    return loop_run(LOOP_AUTO, fn, arg);
}

enum { TASKS = 60, STEPS = 3000, DISK = 100 };

struct asker {
    struct crowd *crowd;
    struct range r;
    enum range_lock_mode mode;
    bool asked, holds, let_go, gone, cancelled;
    uint64_t turn; /* of asking */
    struct task *task;
    struct waitq go;
};

struct crowd {
    struct rangelock lock;
    struct asker a[TASKS];
    uint64_t turns;
};

static int asks(void *arg)
{
    struct asker *a = arg;
    RANGE_HOLDER(h);
    a->asked = true;
    a->turn = a->crowd->turns++;
    int r = rangelock_take(&a->crowd->lock, &h, a->r, a->mode);
    if (r == 0) {
        a->holds = true;
        SHIELD();
        if (!a->let_go)
            assert_int_equal(waitq_wait(&a->go), 0);
    } else {
        assert_int_equal(r, -ECANCELED);
        assert_true(a->cancelled);
    }
    a->holds = false;
    a->asked = false;
    a->gone = true;
    return 0;
}

static bool model_conflict(const struct asker *a, const struct asker *b)
{
    return (a->mode == RANGE_EXCLUSIVE || b->mode == RANGE_EXCLUSIVE) && a->r.length &&
           b->r.length && a->r.start < b->r.start + b->r.length &&
           b->r.start < a->r.start + a->r.length;
}

static void check(struct crowd *c, int step)
{
    size_t asked = 0, listed = 0;
    struct range_holder *h;
    for (int i = 0; i < TASKS; i++) {
        struct asker *a = &c->a[i];
        if (!a->asked)
            continue;
        asked++;
        bool may = true;
        for (int k = 0; k < TASKS; k++)
            if (c->a[k].asked && c->a[k].turn < a->turn && model_conflict(a, &c->a[k]))
                may = false;
        if (may != a->holds)
            fail_msg("step %d: asker %d %s, should be the other way", step, i,
                     a->holds ? "holds" : "waits");
    }
    TAILQ_FOREACH (h, &c->lock.holders, link)
        listed++;
    assert_int_equal(asked, listed);
}

static int agrees(void *arg)
{
    struct rng rng = {test_seed()};
    struct crowd *c = xnew(struct crowd);
    rangelock_init(&c->lock);
    assert_true(rangelock_idle(&c->lock));
    int taken = 0;
    {
        SCOPE(s);
        for (int step = 0; step < STEPS; step++) {
            int moves = (int)rng_below(&rng, 3) + 1; /* several between two checks */
            while (moves--) {
                struct asker *a = &c->a[rng_below(&rng, TASKS)];
                if (!a->task) {
                    uint64_t start = rng_below(&rng, DISK);
                    *a = (struct asker){
                        .crowd = c,
                        .r = range_make(start, rng_below(&rng, 12)),
                        .mode = rng_below(&rng, 2) ? RANGE_SHARED : RANGE_EXCLUSIVE,
                    };
                    waitq_init(&a->go);
                    a->task = scope_spawn(&s, asks, a);
                } else if (a->gone) {
                    a->task = NULL;
                } else if (a->holds && !a->let_go) {
                    a->let_go = true;
                    taken++;
                    waitq_wake_one(&a->go);
                } else if (a->asked && !a->holds && rng_below(&rng, 4) == 0) {
                    a->cancelled = true;
                    a->let_go = true; /* should it be granted before it knows */
                    task_cancel(a->task);
                }
            }
            for (int i = 0; i < 3; i++)
                assert_int_equal(task_yield(), 0);
            check(c, step);
        }
        for (int i = 0; i < TASKS; i++) {
            c->a[i].let_go = true;
            if (c->a[i].task && c->a[i].holds)
                waitq_wake_one(&c->a[i].go);
        }
        assert_int_equal(scope_join(&s), 0);
    }
    assert_true(rangelock_idle(&c->lock));
    assert_true(taken > STEPS / 10);
    free(c);
    return 0;
}

static void agrees_with_the_model(void **state)
{
    assert_int_equal(run(agrees, NULL), 0);
}

static int tries(void *arg)
{
    struct rangelock l;
    rangelock_init(&l);
    RANGE_HOLDER(a);
    assert_true(rangelock_try(&l, &a, range_make(10, 10), RANGE_SHARED));
    {
        RANGE_HOLDER(b);
        RANGE_HOLDER(c);
        RANGE_HOLDER(d);
        RANGE_HOLDER(e);
        assert_true(rangelock_try(&l, &b, range_make(15, 10), RANGE_SHARED));
        assert_false(rangelock_try(&l, &c, range_make(19, 1), RANGE_EXCLUSIVE));
        assert_true(rangelock_try(&l, &d, range_make(25, 1), RANGE_EXCLUSIVE));
        assert_true(rangelock_try(&l, &e, range_make(12, 0), RANGE_EXCLUSIVE));
    }
    RANGE_HOLDER(f);
    assert_true(rangelock_try(&l, &f, range_make(20, 10), RANGE_EXCLUSIVE));
    rangelock_release(&f);
    rangelock_release(&f); /* nothing when not held */
    assert_true(rangelock_try(&l, &f, range_make(20, 10), RANGE_EXCLUSIVE));
    return 0;
}

static void try_does_not_wait(void **state)
{
    assert_int_equal(run(tries, NULL), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(agrees_with_the_model),
    cmocka_unit_test(try_does_not_wait),
};
UNIT_MAIN(tests)
