/* Tasks and scopes: no task outlives its scope, the first error cancels the rest, and
 * cancellation comes with the next wait. */
#include "unit.h"

#include "rt/clock.h"
#include "rt/io.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <errno.h>
#include <sys/wait.h>
#include <unistd.h>

static int run(task_fn *fn, void *arg)
{
    return loop_run(LOOP_AUTO, fn, arg);
}

static int answers(void *arg)
{
    return *(int *)arg;
}

static void the_loop_returns_what_main_returned(void **state)
{
    int n = 42;
    assert_int_equal(run(answers, &n), 42);
    n = -EBADMSG;
    assert_int_equal(run(answers, &n), -EBADMSG);
    assert_null(task_self());
}

/* ---- spawn and join ---- */

static char order[128];

static void note(char c)
{
    size_t n = strlen(order);
    if (n + 1 < sizeof order)
        order[n] = c;
}

static int notes_twice(void *arg)
{
    note(*(const char *)arg);
    assert_int_equal(task_yield(), 0);
    note(*(const char *)arg);
    return 0;
}

static int spawns_three(void *arg)
{
    SCOPE(s);
    scope_spawn(&s, notes_twice, (char[]){"a"});
    scope_spawn(&s, notes_twice, (char[]){"b"});
    scope_spawn(&s, notes_twice, (char[]){"c"});
    note('m');
    assert_false(scope_empty(&s));
    assert_int_equal(scope_join(&s), 0);
    assert_true(scope_empty(&s));
    note('M');
    return 0;
}

static void tasks_run_when_the_spawner_waits_in_their_order(void **state)
{
    memset(order, 0, sizeof order);
    assert_int_equal(run(spawns_three, NULL), 0);
    assert_string_equal(order, "mabcabcM");
}

/* ---- cancellation ---- */

struct ends {
    int cancelled, finished;
};

static int sleeps_for_ever(void *arg)
{
    struct ends *e = arg;
    int r = sleep_until(NEVER_NS);
    assert_int_equal(r, -ECANCELED);
    assert_true(task_cancelled());
    assert_int_equal(task_yield(), -ECANCELED); /* and from every wait after it */
    assert_int_equal(sleep_until(0), -ECANCELED);
    e->cancelled++;
    return r;
}

static int fails(void *arg)
{
    assert_int_equal(task_yield(), 0);
    return -ENOSPC;
}

static int joins_a_failure(void *arg)
{
    SCOPE(s);
    for (int i = 0; i < 5; i++)
        scope_spawn(&s, sleeps_for_ever, arg);
    scope_spawn(&s, fails, NULL);
    int r = scope_join(&s);
    assert_int_equal(s.error, -ENOSPC);
    return r;
}

static void the_first_error_cancels_the_siblings(void **state)
{
    struct ends e = {0};
    assert_int_equal(run(joins_a_failure, &e), -ENOSPC);
    assert_int_equal(e.cancelled, 5);
}

static int returns_early(void *arg)
{
    SCOPE(s);
    for (int i = 0; i < 5; i++)
        scope_spawn(&s, sleeps_for_ever, arg);
    assert_int_equal(task_yield(), 0);
    return 7;
}

static void leaving_early_cancels_and_joins(void **state)
{
    struct ends e = {0};
    assert_int_equal(run(returns_early, &e), 7);
    assert_int_equal(e.cancelled, 5);
}

static int cancels_its_scope(void *arg)
{
    SCOPE(s);
    scope_spawn(&s, sleeps_for_ever, arg);
    assert_int_equal(task_yield(), 0);
    scope_cancel(&s);
    scope_spawn(&s, sleeps_for_ever, arg); /* starts cancelled */
    return scope_join(&s);
}

static void cancelling_a_scope_is_no_error_of_its_tasks(void **state)
{
    struct ends e = {0};
    assert_int_equal(run(cancels_its_scope, &e), 0);
    assert_int_equal(e.cancelled, 2);
}

static int joins_sleepers(void *arg)
{
    SCOPE(s);
    scope_spawn(&s, sleeps_for_ever, arg);
    SCOPE(inner);
    scope_spawn(&inner, sleeps_for_ever, arg);
    assert_int_equal(scope_join(&inner), -ECANCELED);
    assert_true(scope_empty(&inner));
    return scope_join(&s);
}

static int cancels_one(void *arg)
{
    SCOPE(s);
    struct task *t = scope_spawn(&s, joins_sleepers, arg);
    scope_spawn(&s, answers, &(int){0});
    for (int i = 0; i < 3; i++)
        assert_int_equal(task_yield(), 0);
    task_cancel(t);
    task_cancel(t); /* once is enough */
    return scope_join(&s);
}

static void cancelling_goes_down_scope_in_scope(void **state)
{
    struct ends e = {0};
    assert_int_equal(run(cancels_one, &e), 0);
    assert_int_equal(e.cancelled, 2);
}

static int works_in_a_shield(void *arg)
{
    struct ends *e = arg;
    {
        SHIELD();
        assert_int_equal(sleep_until(clock_after_ns(2000000)), 0);
        {
            SHIELD();
            assert_int_equal(task_yield(), 0);
        }
        assert_false(task_cancelled());
        assert_int_equal(task_yield(), 0);
        e->finished++;
    }
    assert_int_equal(task_yield(), -ECANCELED);
    return -ECANCELED;
}

static int cancels_a_shielded_one(void *arg)
{
    SCOPE(s);
    scope_spawn(&s, works_in_a_shield, arg);
    assert_int_equal(task_yield(), 0);
    return 0;
}

static void a_shield_keeps_cancellation_out_until_it_ends(void **state)
{
    struct ends e = {0};
    assert_int_equal(run(cancels_a_shielded_one, &e), 0);
    assert_int_equal(e.finished, 1);
}

/* A task that was woken and then cancelled, before it ran, was woken. */
static int waits_for_event(void *arg)
{
    assert_int_equal(event_wait(arg), 0);
    assert_int_equal(task_yield(), -ECANCELED);
    return 0;
}

static int suspends(void *arg)
{
    assert_int_equal(task_suspend(), 0);
    assert_int_equal(task_suspend(), -ECANCELED);
    return 0;
}

static int wakes_and_cancels(void *arg)
{
    struct event e;
    event_init(&e);
    SCOPE(s);
    struct task *t = scope_spawn(&s, waits_for_event, &e);
    assert_int_equal(task_yield(), 0);
    event_set(&e);
    task_cancel(t);
    assert_int_equal(scope_join(&s), 0);

    event_reset(&e);
    SCOPE(s2);
    t = scope_spawn(&s2, waits_for_event, &e);
    assert_int_equal(task_yield(), 0);
    task_cancel(t); /* the other way round: it has not run yet, so the wake counts */
    event_set(&e);
    assert_int_equal(scope_join(&s2), 0);

    SCOPE(s3);
    t = scope_spawn(&s3, suspends, NULL);
    assert_int_equal(task_yield(), 0);
    task_cancel(t);
    task_wake(t);
    return scope_join(&s3);
}

static void a_wake_is_not_lost_to_a_cancellation(void **state)
{
    assert_int_equal(run(wakes_and_cancels, NULL), 0);
}

/* ---- many ---- */

enum { MANY = 10000 };

static int counts(void *arg)
{
    int *n = arg;
    for (int i = 0; i < 3; i++)
        if (task_yield() < 0)
            return -ECANCELED;
    ++*n;
    return 0;
}

static int spawns_many(void *arg)
{
    SCOPE(s);
    for (int i = 0; i < MANY; i++)
        scope_spawn(&s, counts, arg);
    return scope_join(&s);
}

static void ten_thousand_tasks(void **state)
{
    int n = 0;
    assert_int_equal(run(spawns_many, &n), 0);
    assert_int_equal(n, MANY);
}

static int nests(void *arg)
{
    int left = *(int *)arg;
    if (!left)
        return sleep_until(NEVER_NS);
    left--;
    SCOPE(s);
    scope_spawn(&s, nests, &left);
    return scope_join(&s);
}

static int nests_deep(void *arg)
{
    int n = 500;
    SCOPE(s);
    scope_spawn(&s, nests, &n);
    if (sleep_until(clock_after_ns(1000000)) < 0)
        return -1;
    return 0;
}

static void five_hundred_scopes_inside_each_other_are_cancelled(void **state)
{
    assert_int_equal(run(nests_deep, NULL), 0);
}

/* A task may start others in a scope that it lives in itself, and in one on the heap. */
static int spreads(void *arg)
{
    struct scope *s = arg;
    static int left;
    if (!left)
        left = 100;
    if (--left)
        scope_spawn(s, spreads, s);
    return task_yield();
}

static int spawns_into_its_own_scope(void *arg)
{
    SCOPE(s);
    scope_spawn(&s, spreads, &s);
    return scope_join(&s);
}

static void a_scope_grows_from_within(void **state)
{
    assert_int_equal(run(spawns_into_its_own_scope, NULL), 0);
}

static int outlives_main(void *arg)
{
    int r = sleep_until(clock_after_ns(3000000));
    *(bool *)arg = true;
    return r;
}

static struct scope heap_scope;

static int leaves_a_task(void *arg)
{
    scope_init(&heap_scope);
    scope_spawn(&heap_scope, outlives_main, arg);
    return 1;
}

static void the_loop_ends_after_all_tasks(void **state)
{
    bool done = false;
    assert_int_equal(run(leaves_a_task, &done), 1);
    assert_true(done);
}

/* ---- our own mistakes stop the program ---- */

static bool aborts(task_fn *fn)
{
    pid_t child = fork();
    if (child == 0) {
        freopen("/dev/null", "w", stderr);
        run(fn, NULL);
        _exit(0);
    }
    int status;
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status) &&
           WTERMSIG(status) == SIGABRT;
}

static int waits_in_nosuspend(void *arg)
{
    NOSUSPEND();
    return task_yield();
}

static int waits_after_nosuspend(void *arg)
{
    {
        NOSUSPEND();
        {
            NOSUSPEND();
        }
    }
    return task_yield();
}

static int waits_for_itself(void *arg)
{
    struct event e;
    event_init(&e);
    return event_wait(&e);
}

static void a_wait_inside_nosuspend_stops_the_program(void **state)
{
    assert_true(aborts(waits_in_nosuspend));
    assert_int_equal(run(waits_after_nosuspend, NULL), 0);
}

static void waiting_for_what_cannot_come_stops_the_program(void **state)
{
    assert_true(aborts(waits_for_itself));
}

static int holds_memory(void *arg)
{
    char *volatile only_here = malloc(100);
    int r = sleep_until(NEVER_NS);
    free(only_here);
    return r;
}

static int exits(void *arg)
{
    char *volatile only_here = malloc(100);
    SCOPE(s);
    scope_spawn(&s, holds_memory, NULL);
    assert_int_equal(task_yield(), 0);
    exit(only_here ? 0 : 1);
}

/* What only suspended tasks can reach is no leak: LeakSanitizer knows their stacks. */
static void a_program_may_exit_inside_a_task(void **state)
{
    pid_t child = fork();
    if (child == 0) {
        char *volatile only_here = malloc(100);
        run(exits, NULL);
        free(only_here);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static int runs_another_loop(void *arg)
{
    int n = 9;
    assert_int_equal(run(answers, &n), 9);
    return task_yield();
}

static void loops_nest_on_a_thread(void **state)
{
    assert_int_equal(run(runs_another_loop, NULL), 0);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(the_loop_returns_what_main_returned),
    cmocka_unit_test(tasks_run_when_the_spawner_waits_in_their_order),
    cmocka_unit_test(the_first_error_cancels_the_siblings),
    cmocka_unit_test(leaving_early_cancels_and_joins),
    cmocka_unit_test(cancelling_a_scope_is_no_error_of_its_tasks),
    cmocka_unit_test(cancelling_goes_down_scope_in_scope),
    cmocka_unit_test(a_shield_keeps_cancellation_out_until_it_ends),
    cmocka_unit_test(a_wake_is_not_lost_to_a_cancellation),
    cmocka_unit_test(ten_thousand_tasks),
    cmocka_unit_test(five_hundred_scopes_inside_each_other_are_cancelled),
    cmocka_unit_test(a_scope_grows_from_within),
    cmocka_unit_test(the_loop_ends_after_all_tasks),
    cmocka_unit_test(a_wait_inside_nosuspend_stops_the_program),
    cmocka_unit_test(waiting_for_what_cannot_come_stops_the_program),
    cmocka_unit_test(a_program_may_exit_inside_a_task),
    cmocka_unit_test(loops_nest_on_a_thread),
};
UNIT_MAIN(tests)
