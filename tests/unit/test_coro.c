/* Coroutines alone: stacks keep what is on them, nest, and can be many. Runs by assembly
 * and, with TIDEMARK_CORO=ucontext, by the reference. */
#include "unit.h"

#include "rt/coro.h"
#include "rt/task.h"

#include <sys/wait.h>
#include <unistd.h>

static struct coro host, a, b;
static char trail[64];

static void note(char c)
{
    size_t n = strlen(trail);
    if (n + 1 < sizeof trail)
        trail[n] = c;
}

static void plays_a(void *arg)
{
    double keep = *(double *)arg;
    note('a');
    coro_switch(&a, &b);
    note('A');
    assert_true(keep > 1.4 && keep < 1.5);
    coro_switch(&a, &host);
    coro_leave(&a, &host);
}

static void plays_b(void *arg)
{
    note('b');
    coro_switch(&b, &a);
    note('B');
    coro_leave(&b, &host);
}

static void switches_keep_both_stacks(void **state)
{
    double root = 1.41421356;
    memset(trail, 0, sizeof trail);
    coro_init_host(&host);
    coro_init(&a, plays_a, &root);
    coro_init(&b, plays_b, NULL);
    coro_switch(&host, &a);
    note('h');
    coro_switch(&host, &b);
    note('H');
    coro_switch(&host, &a);
    assert_string_equal(trail, "abAhBH");
    coro_fini(&a);
    coro_fini(&b);
    coro_fini_host(&host);
}

static void uses_stack(void *arg)
{
    volatile char big[100 * 1024];
    for (size_t i = 0; i < sizeof big; i += 512)
        big[i] = (char)i;
    assert_int_equal(big[512 * 7], (char)(512 * 7));
    coro_leave(&a, &host);
}

static void a_hundred_kilobytes_fit(void **state)
{
    coro_init_host(&host);
    coro_init(&a, uses_stack, NULL);
    coro_switch(&host, &a);
    coro_fini(&a);
    coro_fini_host(&host);
}

/* The guard page: an overflow is a fault, not a neighbour's memory. */
static void an_overflow_is_a_fault(void **state)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        freopen("/dev/null", "w", stderr);
        coro_init_host(&host);
        coro_init(&a, uses_stack, NULL);
        ((volatile char *)a.stack)[-1] = 1;
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) != 0));
}

static void the_kind_is_the_chosen_one(void **state)
{
    const char *want = getenv("TIDEMARK_CORO");
    if (want)
        assert_string_equal(coro_kind(), want);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(switches_keep_both_stacks),
    cmocka_unit_test(a_hundred_kilobytes_fit),
    cmocka_unit_test(an_overflow_is_a_fault),
    cmocka_unit_test(the_kind_is_the_chosen_one),
};
UNIT_MAIN(tests)
