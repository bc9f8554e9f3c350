/* Checkpoints: when hot regions leave the ring though nobody needs their slots.
 *
 * What is hot counts as dirty after a power loss. Without checkpoints that is everything that was
 * written since the session began, up to the whole budget; with them it is what was in use in the
 * last seconds. How regions leave, and what keeps that safe, is hot.h's; here is when:
 *
 *     idle      nobody has written for checkpoint-idle: all leave, and a power loss adds nothing.
 *               Costs one copy of bits, a sync, and a transaction for each 64 regions, while the
 *               disk rests; then the first write waits for a transaction, as the first of all did.
 *               A qcow2 image gets its bitmaps then, too (guarded.c)
 *     period    every checkpoint-period: those leave that nobody has written to since the one
 *               before. What is in use stays, so that a steady writer pays nothing for it
 *     amount    more regions than checkpoint-amount have marks that no copy has: they are copied
 *               (by the cleaner, hot.c), and stay. So the other kinds, and a close, never have
 *               more than that to copy
 *     flush     a guest's flush has completed, so it has come to some end itself: all leave, if
 *               they are few enough for one transaction, no write is under way, and none has left
 *               so within the last second. Begun when the guest has its answer; if it writes on at
 *               once, the region it writes to is in use again, and stays
 *     close     writes what no copy has, and says so (session.c); an image gets all (guarded.c)
 *
 * One task a session does the first two and the fourth. It sleeps without a timer when there is
 * nothing to come: since an idle checkpoint nobody has written. It ends before the session does. */
#include "persist/keeper_internal.h"
#include "rt/clock.h"

#include <errno.h>

enum reason { BY_IDLE, BY_PERIOD, BY_FLUSH };
static const char *const reasons[] = {"idle-checkpoints", "period-checkpoints",
                                      "flush-checkpoints"};

/* Counts those that made something leave. */
static void leave(struct keeper *k, enum hot_which which, enum reason reason)
{
    struct hot_stats before, after;

    if (!k->hot)
        return;
    hot_stats(k->hot, &before);
    int r = hot_leave(k->hot, which);
    (void)r; /* given up, or nothing can be kept any more: who comes next finds out, too */
    hot_stats(k->hot, &after);
    k->checkpoints.done[reason] += after.left > before.left;
}

void keeper_idle(struct keeper *k)
{
    leave(k, HOT_ALL, BY_IDLE);
    if (keeper_rests(k) && !keeper_save_idle(k))
        checkpoint_changed(k); /* not now: it is tried again */
}

bool keeper_rests(const struct keeper *k)
{
    const struct checkpoints *c = &k->checkpoints;

    return !c->writes && c->last_ns == c->idle_since_ns;
}

/* ---- the task ---- */

static uint64_t after(uint64_t from_ns, uint64_t delay_ns)
{
    return delay_ns && delay_ns < NEVER_NS - from_ns ? from_ns + delay_ns : NEVER_NS;
}

static void begin_period(struct keeper *k, uint64_t now)
{
    k->checkpoints.period_began_ns = now;
}

static void do_idle(struct keeper *k, uint64_t now)
{
    struct checkpoints *c = &k->checkpoints;

    if (c->writes) { /* one that is under way will be the last */
        c->last_ns = now;
        return;
    }
    c->idle_since_ns = c->last_ns;
    keeper_idle(k);
    c->resting = keeper_rests(k);
}

static void do_period(struct keeper *k, uint64_t now)
{
    struct checkpoints *c = &k->checkpoints;
    uint64_t began = c->period_began_ns;

    begin_period(k, now);
    leave(k, HOT_UNUSED, BY_PERIOD);
    /* Without idle checkpoints: nobody has used any, so all have left. */
    c->resting = !k->options.checkpoints.idle_ns && !c->writes && c->last_ns < began;
}

static int checkpointer(void *arg)
{
    struct keeper *k = arg;
    struct checkpoints *c = &k->checkpoints;
    const struct checkpoint_options *o = &k->options.checkpoints;

    for (;;) {
        uint64_t idle_ns = c->resting ? NEVER_NS : after(c->last_ns, o->idle_ns);
        uint64_t period_ns = c->resting ? NEVER_NS : after(c->period_began_ns, o->period_ns);
        int r = event_wait_until(&c->wanted, min_u64(idle_ns, period_ns));
        if (r < 0 && r != -ETIMEDOUT)
            return 0; /* the session ends */
        event_reset(&c->wanted);
        uint64_t now = clock_now_ns();
        if (c->flush_wanted) {
            leave(k, HOT_ALL, BY_FLUSH);
            c->flush_wanted = false;
        } else if (!c->resting && now >= after(c->last_ns, o->idle_ns)) {
            do_idle(k, now);
        } else if (!c->resting && now >= after(c->period_began_ns, o->period_ns)) {
            do_period(k, now);
        }
    }
}

void checkpoint_init(struct keeper *k)
{
    event_init(&k->checkpoints.wanted);
    scope_init(&k->checkpoints.tasks);
    k->checkpoints.resting = true;
}

void checkpoint_start(struct keeper *k)
{
    checkpoint_stop(k);
    checkpoint_changed(k);
    scope_spawn(&k->checkpoints.tasks, checkpointer, k);
}

void checkpoint_stop(struct keeper *k)
{
    scope_fini(&k->checkpoints.tasks);
    scope_init(&k->checkpoints.tasks);
    k->checkpoints.resting = true;
    k->checkpoints.flush_wanted = false;
}

/* ---- what others do ---- */

void checkpoint_changed(struct keeper *k)
{
    struct checkpoints *c = &k->checkpoints;

    c->last_ns = clock_now_ns();
    if (!c->resting)
        return;
    c->resting = false;
    begin_period(k, c->last_ns);
    event_set(&c->wanted);
}

void checkpoint_write_begun(struct keeper *k)
{
    k->checkpoints.writes++;
}

void checkpoint_write_ended(struct keeper *k)
{
    assert(k->checkpoints.writes);
    k->checkpoints.writes--;
    checkpoint_changed(k);
}

void keeper_flushed(struct keeper *k)
{
    struct checkpoints *c = &k->checkpoints;

    if (!k->options.checkpoints.flush || !k->hot || c->flush_wanted || c->writes ||
        !hot_is_cheap(k->hot))
        return;
    uint64_t now = clock_now_ns();
    if (now < c->next_flush_ns)
        return;
    c->next_flush_ns = now + k->options.checkpoints.flush_rest_ns;
    c->flush_wanted = true;
    event_set(&c->wanted);
}

void checkpoint_info(const struct keeper *k, struct json_object *info)
{
    for (unsigned i = 0; i < ARRAY_SIZE(reasons); i++)
        json_add_uint(info, reasons[i], k->checkpoints.done[i]);
}
