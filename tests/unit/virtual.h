/* A world whose clock jumps from deadline to deadline, so that an hour costs nothing. No I/O. */
#pragma once

#include "base/range.h"
#include "rt/clock.h"
#include "rt/world.h"

#include <errno.h>
#include <string.h>

struct virtual_world {
    struct world world;
    uint64_t now_ns;
};

static inline uint64_t virtual_now(struct world *w)
{
    return container_of(w, struct virtual_world, world)->now_ns;
}

static inline void virtual_random(struct world *w, void *buf, size_t n)
{
    (void)w;
    memset(buf, 7, n);
}

static inline int64_t virtual_io(struct world *w, struct io_op *op)
{
    (void)w;
    (void)op;
    return -EOPNOTSUPP;
}

static inline bool virtual_turn(struct world *w, uint64_t deadline_ns)
{
    struct virtual_world *v = container_of(w, struct virtual_world, world);

    if (deadline_ns == NEVER_NS)
        return false;
    v->now_ns = max_u64(v->now_ns, deadline_ns);
    return true;
}

/* loop_run in virtual time. */
static inline int run_virtually(task_fn *main, void *arg)
{
    struct virtual_world v = {
        .world = {"virtual", virtual_now, virtual_now, virtual_random, virtual_io, virtual_turn}};
    return loop_run_in(&v.world, main, arg);
}
