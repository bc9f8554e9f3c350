/* Waiting for each other inside one loop. All are FIFO-fair; all waits return 0 or
 * -ECANCELED (never under SHIELD()). None needs a fini; none may be in use when its memory goes. */
#pragma once

#include "rt/task.h"

/* ---- waitq: the queue the others are made of ---- */
struct waiter;
struct waitq {
    TAILQ_HEAD(, waiter) waiters;
};
void waitq_init(struct waitq *q);
int waitq_wait(struct waitq *q) MUST_CHECK;
bool waitq_wake_one(struct waitq *q); /* false: nobody waited */
void waitq_wake_all(struct waitq *q);
bool waitq_empty(const struct waitq *q);

/* ---- mutex ---- */
struct mutex {
    struct task *owner;
    struct waitq waiting;
};
void mutex_init(struct mutex *m);
int mutex_lock(struct mutex *m) MUST_CHECK;
bool mutex_trylock(struct mutex *m);
void mutex_unlock(struct mutex *m);
void mutex_unlockp(struct mutex **m);
/* Locks for the rest of the block and cannot be cancelled while it waits. */
void mutex_lock_shielded(struct mutex *m);
#define LOCKED(m)                                                                                  \
    CLEANUP(mutex_unlockp) struct mutex *TASK_CONCAT(locked_, __LINE__) = (m);                     \
    mutex_lock_shielded(TASK_CONCAT(locked_, __LINE__))

/* ---- event: happened or not ---- */
struct event {
    bool set;
    struct waitq waiting;
};
void event_init(struct event *e);
void event_set(struct event *e); /* wakes all; stays set */
void event_reset(struct event *e);
int event_wait(struct event *e) MUST_CHECK;
/* As event_wait, and -ETIMEDOUT at the moment DEADLINE_NS (rt/clock.h). */
int event_wait_until(struct event *e, uint64_t deadline_ns) MUST_CHECK;

/* ---- semaphore ---- */
struct semaphore {
    uint64_t free;
    struct waitq waiting;
};
void semaphore_init(struct semaphore *s, uint64_t free);
int semaphore_take(struct semaphore *s,
                   uint64_t n) MUST_CHECK; /* all N or none, in order of asking */
void semaphore_give(struct semaphore *s, uint64_t n);

/* ---- channel: pointers from many to many, bounded ---- */
struct channel {
    void **slots;
    size_t capacity, head, length;
    bool closed;
    struct waitq readers, writers;
};
void channel_init(struct channel *c, size_t capacity);
void channel_fini(struct channel *c);
int channel_send(struct channel *c, void *item) MUST_CHECK;  /* -EPIPE: closed */
int channel_recv(struct channel *c, void **item) MUST_CHECK; /* -EPIPE: closed and empty */
void channel_close(struct channel *c);

/* ---- for rangelock.h ---- */
enum range_lock_mode { RANGE_SHARED, RANGE_EXCLUSIVE };
