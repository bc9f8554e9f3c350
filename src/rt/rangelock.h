/* Range locks: overlapping holders exclude each other unless all of them share; whoever
 * asks first gets first (a waiting exclusive request is not overtaken by later overlapping
 * shared ones). A holder lives on its taker's stack, so taking one allocates nothing. */
#pragma once

#include "base/range.h"
#include "rt/sync.h"

struct range_holder {
    TAILQ_ENTRY(range_holder) link;
    struct range range;
    enum range_lock_mode mode;
    bool granted;
    unsigned blockers; /* how many before it, granted or waiting, exclude it */
    struct task *waiting;
    struct rangelock *lock; /* NULL: not held */
};

struct rangelock {
    TAILQ_HEAD(, range_holder) holders; /* granted and waiting, in the order of asking */
};

void rangelock_init(struct rangelock *l);
bool rangelock_idle(const struct rangelock *l);
int rangelock_take(struct rangelock *l, struct range_holder *h, struct range r,
                   enum range_lock_mode mode) MUST_CHECK;
bool rangelock_try(struct rangelock *l, struct range_holder *h, struct range r,
                   enum range_lock_mode mode);
void rangelock_release(struct range_holder *h); /* nothing when not held */
#define RANGE_HOLDER(name) CLEANUP(rangelock_release) struct range_holder name = {.lock = NULL}
