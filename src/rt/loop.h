/* The loop and its tasks from inside rt/: what task.c, timer.c, sync.c and the worlds share. */
#pragma once

#include "rt/coro.h"
#include "rt/task.h"
#include "rt/world.h"

/* ---- timers: a heap of deadlines ---- */

struct timer {
    uint64_t deadline_ns;
    uint64_t order;                /* of two at the same moment, the one set first fires first */
    size_t place;                  /* in the heap, from 1; 0: not set */
    void (*fire)(struct timer *t); /* the timer is no longer set; must not wait */
};

struct timers {
    struct timer **heap; /* from 1 */
    size_t count, capacity;
    uint64_t next_order;
};

/* NEVER_NS sets nothing. */
void timer_set(struct timer *t, uint64_t deadline_ns, void (*fire)(struct timer *t));
void timer_clear(struct timer *t);                /* nothing when not set */
uint64_t timers_next_ns(const struct timers *ts); /* NEVER_NS: none */
void timers_fire(struct timers *ts, uint64_t now_ns);
void timers_fini(struct timers *ts);

/* ---- tasks ---- */

enum task_state { TASK_READY, TASK_RUNNING, TASK_WAITING, TASK_ENDED };

struct task {
    struct coro coro;
    struct loop *loop;
    struct scope *scope;
    TAILQ_ENTRY(task) sibling; /* in its scope */
    TAILQ_ENTRY(task) queue;   /* of the loop: ready, idle or doomed */
    TAILQ_ENTRY(task) all;
    task_fn *fn;
    void *arg;
    const char *name;
    enum task_state state;
    bool cancelled;
    bool deaf; /* suspended where cancelling does not wake it */
    int woken; /* what task_suspend returns */
    unsigned shields;
    struct nosuspend *nosuspend;
};
TAILQ_HEAD(task_queue, task);

struct loop {
    struct world *world;
    struct coro host;
    struct task *running;
    struct task_queue batch; /* these run before the loop looks at the world again */
    struct task_queue ready; /* these after that */
    struct task_queue idle;  /* ended; their stacks wait for the next */
    struct task_queue doomed;
    struct task_queue all; /* not ended */
    size_t tasks, idle_count;
    struct timers timers;
    bool dead;          /* loop_die: nobody runs any more */
    struct loop *outer; /* what ran on this thread before */
};

struct loop *loop_here(void); /* of this thread; NULL: none */

/* Stops the program when a wait is forbidden here. */
void task_check_may_wait(const char *what);

/* Stops the program, naming the running task. For our own mistakes. */
_Noreturn void rt_panic(const char *fmt, ...) PRINTF(1, 2);
