/* Waiting for each other. Each primitive hands over: who gives a lock, units or an item
 * puts it into the waiter's hands before it wakes it, so nobody who comes later can take it
 * in between, and a waiter that is cancelled after that still has it. */
#include "rt/sync.h"

#include "rt/clock.h"
#include "rt/loop.h"

#include <errno.h>

struct waiter {
    TAILQ_ENTRY(waiter) link;
    struct task *task;
    struct waitq *queue; /* NULL: woken */
    int result;
    uint64_t units; /* semaphore */
    void *item;     /* channel */
    struct timer timer;
};

static void wake(struct waiter *w, int result)
{
    TAILQ_REMOVE(&w->queue->waiters, w, link);
    w->queue = NULL;
    w->result = result;
    task_wake(w->task);
}

static int wait_in(struct waitq *q, struct waiter *w)
{
    w->task = task_self();
    w->queue = q;
    TAILQ_INSERT_TAIL(&q->waiters, w, link);
    int r = task_suspend();
    if (!w->queue)
        return w->result;
    TAILQ_REMOVE(&q->waiters, w, link);
    return r;
}

/* ---- waitq ---- */

void waitq_init(struct waitq *q)
{
    TAILQ_INIT(&q->waiters);
}

bool waitq_empty(const struct waitq *q)
{
    return TAILQ_EMPTY(&q->waiters);
}

int waitq_wait(struct waitq *q)
{
    struct waiter w = {0};
    return wait_in(q, &w);
}

bool waitq_wake_one(struct waitq *q)
{
    struct waiter *w = TAILQ_FIRST(&q->waiters);
    if (!w)
        return false;
    wake(w, 0);
    return true;
}

void waitq_wake_all(struct waitq *q)
{
    while (waitq_wake_one(q))
        ;
}

/* ---- mutex ---- */

void mutex_init(struct mutex *m)
{
    m->owner = NULL;
    waitq_init(&m->waiting);
}

bool mutex_trylock(struct mutex *m)
{
    if (m->owner)
        return false;
    m->owner = task_self();
    return true;
}

int mutex_lock(struct mutex *m)
{
    if (mutex_trylock(m))
        return 0;
    if (m->owner == task_self())
        rt_panic("a task locks a mutex that it holds");
    return waitq_wait(&m->waiting);
}

void mutex_unlock(struct mutex *m)
{
    if (m->owner != task_self())
        rt_panic("a task unlocks a mutex that it does not hold");
    struct waiter *next = TAILQ_FIRST(&m->waiting.waiters);
    m->owner = next ? next->task : NULL;
    if (next)
        wake(next, 0);
}

void mutex_unlockp(struct mutex **m)
{
    if (*m)
        mutex_unlock(*m);
}

void mutex_lock_shielded(struct mutex *m)
{
    SHIELD();
    int r = mutex_lock(m);
    assert(r == 0);
}

/* ---- event ---- */

void event_init(struct event *e)
{
    e->set = false;
    waitq_init(&e->waiting);
}

void event_set(struct event *e)
{
    e->set = true;
    waitq_wake_all(&e->waiting);
}

void event_reset(struct event *e)
{
    e->set = false;
}

int event_wait(struct event *e)
{
    return e->set ? 0 : waitq_wait(&e->waiting);
}

static void event_timed_out(struct timer *t)
{
    struct waiter *w = container_of(t, struct waiter, timer);
    if (w->queue)
        wake(w, -ETIMEDOUT);
}

int event_wait_until(struct event *e, uint64_t deadline_ns)
{
    if (e->set)
        return 0;
    struct waiter w = {0};
    timer_set(&w.timer, deadline_ns, event_timed_out);
    int r = wait_in(&e->waiting, &w);
    timer_clear(&w.timer);
    return r;
}

/* ---- semaphore ---- */

void semaphore_init(struct semaphore *s, uint64_t free)
{
    s->free = free;
    waitq_init(&s->waiting);
}

void semaphore_give(struct semaphore *s, uint64_t n)
{
    struct waiter *w;
    s->free += n;
    while ((w = TAILQ_FIRST(&s->waiting.waiters)) && w->units <= s->free) {
        s->free -= w->units;
        wake(w, 0);
    }
}

int semaphore_take(struct semaphore *s, uint64_t n)
{
    if (waitq_empty(&s->waiting) && n <= s->free) {
        s->free -= n;
        return 0;
    }
    struct waiter w = {.units = n};
    int r = wait_in(&s->waiting, &w);
    if (r < 0)
        semaphore_give(s, 0); /* who stood behind us may want less */
    return r;
}

/* ---- channel ---- */

void channel_init(struct channel *c, size_t capacity)
{
    assert(capacity);
    *c = (struct channel){.slots = xcalloc(capacity, sizeof *c->slots), .capacity = capacity};
    waitq_init(&c->readers);
    waitq_init(&c->writers);
}

void channel_fini(struct channel *c)
{
    assert(waitq_empty(&c->readers) && waitq_empty(&c->writers));
    free(c->slots);
    c->slots = NULL;
}

static void channel_put(struct channel *c, void *item)
{
    c->slots[(c->head + c->length++) % c->capacity] = item;
}

int channel_send(struct channel *c, void *item)
{
    if (c->closed)
        return -EPIPE;
    struct waiter *reader = TAILQ_FIRST(&c->readers.waiters);
    if (reader) {
        reader->item = item;
        wake(reader, 0);
        return 0;
    }
    if (c->length < c->capacity) {
        channel_put(c, item);
        return 0;
    }
    struct waiter w = {.item = item};
    return wait_in(&c->writers, &w);
}

int channel_recv(struct channel *c, void **item)
{
    if (c->length) {
        *item = c->slots[c->head];
        c->head = (c->head + 1) % c->capacity;
        c->length--;
        struct waiter *writer = TAILQ_FIRST(&c->writers.waiters);
        if (writer) {
            channel_put(c, writer->item);
            wake(writer, 0);
        }
        return 0;
    }
    if (c->closed)
        return -EPIPE;
    struct waiter w = {0};
    int r = wait_in(&c->readers, &w);
    if (r == 0)
        *item = w.item;
    return r;
}

void channel_close(struct channel *c)
{
    struct waiter *w;
    c->closed = true;
    while ((w = TAILQ_FIRST(&c->readers.waiters)))
        wake(w, -EPIPE);
    while ((w = TAILQ_FIRST(&c->writers.waiters)))
        wake(w, -EPIPE);
}
