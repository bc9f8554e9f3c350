/* The real clock, dice and files, without a thread or a descriptor of its own: what is asked for is
 * done by the task that asks. For lives that are short and many, where the hand-over of each
 * operation to a worker took most of the time. Others run before an operation or after it, as
 * dice say that fall alike each time: so another one that began earlier may still be to come, and
 * "the N-th operation" is the same one in each life. Sockets are not here. */
#pragma once

#include "blockutil.h"

#include "rt/clock.h"
#include "rt/workers.h"
#include "rt/world.h"

#include <malloc.h>
#include <time.h>

struct plain_world {
    struct world world;
    struct rng order;
};

static inline int64_t plain_perform(struct world *w, struct io_op *op)
{
    struct plain_world *p = container_of(w, struct plain_world, world);

    if (posix_at_once(op->kind))
        return posix_do(op);
    /* Up to three turns: more than one other may overtake. */
    uint64_t before = rng_below(&p->order, 4);
    for (uint64_t i = 0; i < before; i++)
        task_yield_uncancelled();
    int64_t r = posix_do(op);
    if (!before)
        task_yield_uncancelled();
    return r;
}

static inline bool plain_turn(struct world *w, uint64_t deadline_ns)
{
    if (deadline_ns == NEVER_NS)
        return false; /* nothing is ever in flight */
    if (!deadline_ns)
        return true;
    struct timespec until = {(time_t)(deadline_ns / NSEC_PER_SEC),
                             (long)(deadline_ns % NSEC_PER_SEC)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    return true;
}

static inline void plain_world_init(struct plain_world *p)
{
    /* Or each buffer of some hundred KiB is mapped anew, and its pages are. */
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    *p = (struct plain_world){
        .world = {"plain", posix_now_ns, posix_wall_us, posix_random, plain_perform, plain_turn},
        .order = {20240229},
    };
}
