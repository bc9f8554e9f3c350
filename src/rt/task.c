/* Tasks, scopes, and the loop that runs them.
 *
 *   ready --> batch --> running --(ends)--> idle, its stack kept for the next
 *     ^                    |
 *     +----- waiting <-----+  (task_suspend)
 *
 * The loop runs in turns. A turn takes all that are ready as its batch; a task that
 * suspends goes straight to the next of the batch, without a visit to the loop's own stack.
 * What becomes ready meanwhile belongs to the next turn, so that no two tasks which keep
 * waking each other can keep the loop from its timers and its descriptors. Between turns
 * the world is asked, at the latest every TURNS_WITHOUT_WORLD turns: submissions of a whole
 * turn and more go to the kernel in one system call.
 *
 * Waking and cancelling. A task that is woken and cancelled before it has run sees the wake:
 * what it was given (a lock, an item) is not lost. It sees the cancellation in its next
 * wait. So a primitive that finds its waiter gone from its queue knows that it was woken. */
#include "rt/loop.h"

#include "base/log.h"
#include "rt/clock.h"

#include <errno.h>
#include <execinfo.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

enum {
    IDLE_STACKS_MAX = 1024, /* each keeps what it once touched, typically 8 to 16 KiB */
    TURNS_WITHOUT_WORLD = 8,
};

static _Thread_local struct loop *current;

struct loop *loop_here(void)
{
    return current;
}

struct task *task_self(void)
{
    return current ? current->running : NULL;
}

static struct task *self(void)
{
    if (!current || !current->running)
        rt_panic("a wait outside of a task");
    return current->running;
}

void task_set_name(const char *name)
{
    self()->name = name;
}

_Noreturn void rt_panic(const char *fmt, ...)
{
    char text[512];
    void *frames[32];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    struct task *t = task_self();
    log_error("%s (task '%s')", text, t && t->name ? t->name : t ? "unnamed" : "none");
    backtrace_symbols_fd(frames, backtrace(frames, ARRAY_SIZE(frames)), STDERR_FILENO);
    abort();
}

/* ---- switching ---- */

static void make_ready(struct task *t, int result)
{
    t->woken = result;
    t->state = TASK_READY;
    TAILQ_INSERT_TAIL(&t->loop->ready, t, queue);
}

/* Leaves the running task T, whose state is set, for the next of the batch. */
static void switch_away(struct loop *l, struct task *t)
{
    struct task *next = TAILQ_FIRST(&l->batch);
    if (next) {
        TAILQ_REMOVE(&l->batch, next, queue);
        next->state = TASK_RUNNING;
        l->running = next;
        coro_switch(&t->coro, &next->coro);
    } else {
        l->running = NULL;
        coro_switch(&t->coro, &l->host);
    }
}

void task_check_may_wait(const char *what)
{
    struct task *t = self();
    if (t->nosuspend)
        rt_panic("%s inside NOSUSPEND() of %s:%d", what, t->nosuspend->file, t->nosuspend->line);
}

static int suspend(struct task *t, bool deaf)
{
    task_check_may_wait("a wait");
    t->deaf = deaf;
    t->state = TASK_WAITING;
    switch_away(t->loop, t);
    return t->woken;
}

int task_suspend(void)
{
    struct task *t = self();
    if (t->cancelled && !t->shields)
        return -ECANCELED;
    return suspend(t, t->shields > 0);
}

void task_suspend_uncancelled(void)
{
    suspend(self(), true);
}

void task_wake(struct task *t)
{
    if (t->state == TASK_WAITING)
        make_ready(t, 0);
    else if (t->state == TASK_READY)
        t->woken = 0; /* cancelled and not run yet: the wake counts */
    else
        rt_panic("task '%s' is woken but does not wait", t->name ? t->name : "unnamed");
}

void task_yield_uncancelled(void)
{
    struct task *t = self();
    task_check_may_wait("a yield");
    make_ready(t, 0);
    switch_away(t->loop, t);
}

int task_yield(void)
{
    if (task_cancelled())
        return -ECANCELED;
    task_yield_uncancelled();
    return 0;
}

void task_cancel(struct task *t)
{
    if (t->cancelled)
        return;
    t->cancelled = true;
    if (t->state == TASK_WAITING && !t->deaf)
        make_ready(t, -ECANCELED);
}

bool task_cancelled(void)
{
    struct task *t = self();
    return t->cancelled && !t->shields;
}

void shield_begin(int *unused)
{
    self()->shields++;
}

void shield_end(int *unused)
{
    struct task *t = self();
    assert(t->shields);
    t->shields--;
}

void nosuspend_begin(struct nosuspend *n)
{
    struct task *t = task_self();
    if (!t)
        return;
    n->outer = t->nosuspend;
    t->nosuspend = n;
}

void nosuspend_end(struct nosuspend *n)
{
    struct task *t = task_self();
    if (t)
        t->nosuspend = n->outer;
}

/* ---- a task's life ---- */

static void task_ended(struct task *t, int result)
{
    struct loop *l = t->loop;
    struct scope *s = t->scope;

    if (t->shields || t->nosuspend)
        rt_panic("task '%s' ends inside a SHIELD or NOSUSPEND", t->name ? t->name : "unnamed");
    TAILQ_REMOVE(&s->tasks, t, sibling);
    TAILQ_REMOVE(&l->all, t, all);
    t->state = TASK_ENDED;
    t->scope = NULL;
    l->tasks--;
    /* Who was cancelled says so, and that is no news: whoever cancelled it knows. */
    if (result < 0 && !(result == -ECANCELED && t->cancelled)) {
        if (!s->error)
            s->error = result;
        scope_cancel(s);
    }
    if (TAILQ_EMPTY(&s->tasks) && s->joiner)
        task_wake(s->joiner);
    coro_rest(&t->coro);
    if (l->idle_count < IDLE_STACKS_MAX) {
        l->idle_count++;
        TAILQ_INSERT_HEAD(&l->idle, t, queue);
    } else {
        TAILQ_INSERT_HEAD(&l->doomed, t, queue);
    }
}

/* A stack serves one task after the other. It is told to leave for good by fn NULL. */
static void task_main(void *arg)
{
    struct task *t = arg;
    while (t->fn) {
        task_ended(t, t->fn(t->arg));
        switch_away(t->loop, t);
    }
    coro_leave(&t->coro, &t->loop->host);
}

static void task_free(struct loop *l, struct task *t)
{
    t->fn = NULL;
    coro_switch(&l->host, &t->coro);
    coro_fini(&t->coro);
    free(t);
}

static void free_all(struct loop *l, struct task_queue *queue)
{
    struct task *t;
    while ((t = TAILQ_FIRST(queue))) {
        TAILQ_REMOVE(queue, t, queue);
        task_free(l, t);
    }
}

/* ---- scopes ---- */

void scope_init(struct scope *s)
{
    TAILQ_INIT(&s->tasks);
    s->joiner = NULL;
    s->error = 0;
    s->cancelled = false;
}

bool scope_empty(const struct scope *s)
{
    return TAILQ_EMPTY(&s->tasks);
}

struct task *scope_spawn(struct scope *s, task_fn *fn, void *arg)
{
    struct loop *l = current;
    if (!l)
        rt_panic("a task is started outside of a loop");
    struct task *t = TAILQ_FIRST(&l->idle);
    if (t) {
        TAILQ_REMOVE(&l->idle, t, queue);
        l->idle_count--;
    } else {
        t = xnew(struct task);
        t->loop = l;
        coro_init(&t->coro, task_main, t);
    }
    coro_work(&t->coro);
    t->scope = s;
    t->fn = fn;
    t->arg = arg;
    t->name = NULL;
    t->cancelled = s->cancelled;
    t->deaf = false;
    TAILQ_INSERT_TAIL(&s->tasks, t, sibling);
    TAILQ_INSERT_TAIL(&l->all, t, all);
    l->tasks++;
    make_ready(t, 0);
    return t;
}

void scope_cancel(struct scope *s)
{
    struct task *t;
    s->cancelled = true;
    TAILQ_FOREACH (t, &s->tasks, sibling)
        task_cancel(t);
}

static void await_all(struct scope *s)
{
    while (!scope_empty(s)) {
        assert(!s->joiner || s->joiner == task_self());
        s->joiner = self();
        task_suspend_uncancelled();
        s->joiner = NULL;
    }
}

int scope_join(struct scope *s)
{
    while (!scope_empty(s)) {
        assert(!s->joiner);
        s->joiner = self();
        int r = task_suspend();
        s->joiner = NULL;
        if (r < 0) {
            scope_cancel(s);
            await_all(s);
            return s->error ? s->error : r;
        }
    }
    return s->error;
}

void scope_fini(struct scope *s)
{
    if (scope_empty(s))
        return;
    scope_cancel(s);
    await_all(s);
}

/* ---- the loop ---- */

static void deadlock(struct loop *l)
{
    struct task *t;
    int listed = 0;
    log_error("%zu tasks wait for each other, and for nothing else:", l->tasks);
    TAILQ_FOREACH (t, &l->all, all) {
        if (listed++ == 20)
            break;
        log_error("    %s%s", t->name ? t->name : "unnamed", t->cancelled ? " (cancelled)" : "");
    }
    abort();
}

static void run_batch(struct loop *l)
{
    TAILQ_CONCAT(&l->batch, &l->ready, queue);
    struct task *next;
    while (!l->dead && (next = TAILQ_FIRST(&l->batch))) {
        TAILQ_REMOVE(&l->batch, next, queue);
        next->state = TASK_RUNNING;
        l->running = next;
        coro_switch(&l->host, &next->coro);
    }
}

/* ---- a program that is killed ---- */

void loop_die(void)
{
    struct loop *l = current;
    struct task *t = l->running;
    l->dead = true;
    if (t) {
        l->running = NULL;
        coro_switch(&t->coro, &l->host);
        abort();
    }
}

/* Their stacks go as they are. */
static void bury_all(struct loop *l)
{
    struct task *t;
    free_all(l, &l->doomed);
    free_all(l, &l->idle);
    while ((t = TAILQ_FIRST(&l->all))) {
        TAILQ_REMOVE(&l->all, t, all);
        coro_rest(&t->coro);
        coro_fini(&t->coro);
        free(t);
    }
    l->tasks = 0;
    l->timers.count = 0; /* they lay on the stacks */
}

struct main_call {
    task_fn *fn;
    void *arg;
    int result;
};

static int call_main(void *arg)
{
    struct main_call *call = arg;
    task_set_name("main");
    call->result = call->fn(call->arg);
    return 0;
}

int loop_run_in(struct world *w, task_fn *main, void *arg)
{
    struct loop *l = xnew(struct loop);
    l->world = w;
    l->outer = current;
    TAILQ_INIT(&l->batch);
    TAILQ_INIT(&l->ready);
    TAILQ_INIT(&l->idle);
    TAILQ_INIT(&l->doomed);
    TAILQ_INIT(&l->all);
    coro_init_host(&l->host);

    /* A peer that has gone is -EPIPE; for sockets MSG_NOSIGNAL says so, for pipes this. */
    struct sigaction pipe_action;
    if (!sigaction(SIGPIPE, NULL, &pipe_action) && pipe_action.sa_handler == SIG_DFL)
        signal(SIGPIPE, SIG_IGN);

    current = l;
    struct scope root;
    scope_init(&root);
    struct main_call call = {.fn = main, .arg = arg, .result = -EOWNERDEAD};
    scope_spawn(&root, call_main, &call);

    unsigned turns = 0;
    while (l->tasks) {
        run_batch(l);
        if (l->dead)
            break;
        free_all(l, &l->doomed);
        if (l->timers.count)
            timers_fire(&l->timers, w->now_ns(w));
        if (!TAILQ_EMPTY(&l->ready)) {
            if (++turns < TURNS_WITHOUT_WORLD)
                continue;
            w->turn(w, 0);
        } else if (l->tasks && !w->turn(w, timers_next_ns(&l->timers)) && !l->dead) {
            deadlock(l);
        }
        if (l->dead)
            break;
        turns = 0;
    }
    if (l->dead)
        bury_all(l);
    free_all(l, &l->idle);
    timers_fini(&l->timers);
    coro_fini_host(&l->host);
    current = l->outer;
    free(l);
    return call.result;
}

/* ---- which world ---- */

static struct world *open_world(enum loop_backend backend, void (**close)(struct world *w),
                                int *error)
{
    struct world *w = NULL;
    const char *want = getenv("TIDEMARK_LOOP");
    if (backend == LOOP_AUTO && want && !strcmp(want, "threads"))
        backend = LOOP_THREADS;
    else if (backend == LOOP_AUTO && want && !strcmp(want, "io_uring"))
        backend = LOOP_IO_URING;
    else if (backend == LOOP_AUTO && want && *want)
        log_warning("TIDEMARK_LOOP is '%s', neither io_uring nor threads", want);
    if (backend != LOOP_THREADS) {
        w = world_uring_open(error);
        *close = world_uring_close;
    }
    if (!w && backend != LOOP_IO_URING) {
        w = world_threads_open(error);
        *close = world_threads_close;
    }
    return w;
}

int loop_run(enum loop_backend backend, task_fn *main, void *arg)
{
    void (*close)(struct world * w) = NULL;
    int error = 0;
    struct world *w = open_world(backend, &close, &error);
    if (!w)
        return error;
    int r = loop_run_in(w, main, arg);
    close(w);
    return r;
}

const char *loop_backend_name(void)
{
    return current ? current->world->name : "none";
}
