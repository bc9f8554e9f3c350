/* Time and dice, from whatever world the loop lives in. */
#include "rt/clock.h"

#include "rt/loop.h"

#include <errno.h>

uint64_t clock_now_ns(void)
{
    struct world *w = world_here();
    return w->now_ns(w);
}

uint64_t clock_wall_us(void)
{
    struct world *w = world_here();
    return w->wall_us(w);
}

void random_bytes(void *buf, size_t n)
{
    struct world *w = world_here();
    w->random(w, buf, n);
}

struct sleeper {
    struct timer timer;
    struct task *task;
    bool rung;
};

static void ring(struct timer *t)
{
    struct sleeper *s = container_of(t, struct sleeper, timer);
    s->rung = true;
    task_wake(s->task);
}

int sleep_until(uint64_t deadline_ns)
{
    if (deadline_ns <= clock_now_ns())
        return task_yield();
    struct sleeper s = {.task = task_self()};
    timer_set(&s.timer, deadline_ns, ring);
    int r = task_suspend();
    timer_clear(&s.timer);
    return s.rung ? 0 : r;
}
