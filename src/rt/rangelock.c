/* Range locks: one list in the order of asking. Who asks counts those before it that it
 * conflicts with, granted or waiting; each of them that leaves takes one off, and at zero
 * the lock is granted. So nobody is overtaken by one whom it excludes, and leaving costs
 * one walk of the list: as long as there are requests in flight on one node. */
#include "rt/rangelock.h"

#include "rt/loop.h"

#include <errno.h>

void rangelock_init(struct rangelock *l)
{
    TAILQ_INIT(&l->holders);
}

bool rangelock_idle(const struct rangelock *l)
{
    return TAILQ_EMPTY(&l->holders);
}

static bool conflicts(const struct range_holder *a, const struct range_holder *b)
{
    return (a->mode == RANGE_EXCLUSIVE || b->mode == RANGE_EXCLUSIVE) &&
           range_overlaps(a->range, b->range);
}

static unsigned count_before(const struct rangelock *l, const struct range_holder *h)
{
    const struct range_holder *other;
    unsigned n = 0;
    TAILQ_FOREACH (other, &l->holders, link)
        n += conflicts(other, h);
    return n;
}

static void leave(struct range_holder *h)
{
    struct range_holder *later = h;
    while ((later = TAILQ_NEXT(later, link))) {
        if (later->blockers && conflicts(h, later) && --later->blockers == 0) {
            later->granted = true;
            task_wake(later->waiting);
        }
    }
    TAILQ_REMOVE(&h->lock->holders, h, link);
    h->lock = NULL;
    h->granted = false;
}

int rangelock_take(struct rangelock *l, struct range_holder *h, struct range r,
                   enum range_lock_mode mode)
{
    *h = (struct range_holder){.range = r, .mode = mode, .lock = l};
    h->blockers = count_before(l, h);
    TAILQ_INSERT_TAIL(&l->holders, h, link);
    if (!h->blockers) {
        h->granted = true;
        return 0;
    }
    h->waiting = task_self();
    int result = task_suspend();
    h->waiting = NULL;
    if (h->granted)
        return 0;
    leave(h);
    return result;
}

bool rangelock_try(struct rangelock *l, struct range_holder *h, struct range r,
                   enum range_lock_mode mode)
{
    *h = (struct range_holder){.range = r, .mode = mode};
    if (count_before(l, h))
        return false;
    h->lock = l;
    h->granted = true;
    TAILQ_INSERT_TAIL(&l->holders, h, link);
    return true;
}

void rangelock_release(struct range_holder *h)
{
    if (h->lock)
        leave(h);
}
