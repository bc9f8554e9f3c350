/* The write path of a kept disk: regions become hot, their bits durable. See hot.h. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/keeper_internal.h"

/* ---- hot regions ---- */

static int hot_op_commit(void *owner, struct ring_block *b, const uint32_t *table)
{
    struct keeper *k = owner;
    LOCKED(&k->ring_lock);

    if (!k->tide)
        return -EIO;
    b->session = tide_super(k->tide)->session;
    b->sequence = k->ring_next;
    ring_slice(b, table, k->options.slots, k->options.slice);
    int r = tide_write_ring(k->tide, b);
    if (r == 0)
        k->ring_next++;
    return r;
}

/* Both sets of every bitmap, looked up anew after each wait: a change of state may drop one
 * meanwhile (then its bits are in another), and what it adds was empty or has been written. */
static int hot_op_clean(void *owner, const uint32_t *regions, size_t n)
{
    struct keeper *k = owner;
    CLEANUP(memory_freep) struct range *ranges = xcalloc(n, sizeof *ranges);
    LOCKED(&k->area_lock);

    if (!k->tide)
        return -EIO;
    const unsigned shift = tide_super(k->tide)->region_bits;
    const uint64_t size = node_size(k->node);
    for (size_t i = 0; i < n; i++) {
        uint64_t start = (uint64_t)regions[i] << shift;
        ranges[i] = start < size ? range_between(start, min_u64(start + (1ull << shift), size))
                                 : range_make(0, 0);
    }
    struct tide *t = k->tide;
    for (size_t i = 0; i < tide_super(t)->table.n; i++) {
        for (unsigned j = 0; j < 2; j++) {
            if (k->tide != t)
                return 0; /* a new file has all of it */
            if (i >= tide_super(t)->table.n)
                break;
            const struct tide_bitmap *e = &tide_super(t)->table.items[i];
            struct tide_area area = j ? e->successor : e->current;
            struct kept_set *s = keeper_set_at(k, area.epoch);
            if (!s || (j == 0 && e->successor.epoch && BROKEN(only_live_cleaned)))
                continue;
            int r = keeper_write_area(k, e, area, s->bits, ranges, n);
            if (r < 0)
                return r;
        }
    }
    return tide_sync(t);
}

/* A task: the tide file has failed. */
static int make_anew(void *arg)
{
    struct keeper *k = arg;
    struct error err = ERROR_INIT;

    SHIELD();
    LOCKED(&k->lock);
    if (!k->lost && k->tide && tide_failed(k->tide) && keeper_renew(k, &err) < 0)
        log_error("Node '%s': %s", node_name(k->node), err.text);
    if (k->hot && !k->lost)
        hot_retry(k->hot);
    return 0;
}

static void hot_op_failed(void *owner, int error)
{
    struct keeper *k = owner;

    log_warning("Node '%s': '%s': %s: a new one is made", node_name(k->node), k->options.path,
                strerror(-error));
    scope_spawn(&k->tasks, make_anew, k);
}

const struct hot_ops keeper_hot_ops = {hot_op_commit, hot_op_clean, hot_op_failed};

/* ---- writes ---- */

/* The bits of R are durable in every set that records. */
static int sync_marks(struct keeper *k, struct range r)
{
    int result = 0;
    LOCKED(&k->area_lock);

    for (size_t i = 0; k->tide && result == 0 && i < tide_super(k->tide)->table.n; i++) {
        const struct tide_bitmap *e = &tide_super(k->tide)->table.items[i];
        const bool live = e->successor.epoch && !BROKEN(large_write_in_users_bitmap);
        const struct tide_area area = live ? e->successor : e->current;
        struct kept_set *s = e->enabled ? keeper_set_at(k, area.epoch) : NULL;
        if (s)
            result = keeper_write_area(k, e, area, s->bits, &r, 1);
    }
    if (result == 0)
        result = k->tide ? tide_sync(k->tide) : -EIO;
    return result;
}

/* Too many regions for the table: the bits are set, and made durable, before the data. */
static int write_through(struct keeper *k, struct range r)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!keeper_keeps(bm) || !dirty_recording(bm))
            continue;
        dirty_get_state(bm, &st);
        bitmap_mark(st.successor ? st.successor : st.current, r);
    }
    int result = BROKEN(large_write_not_synced) ? 0 : sync_marks(k, r);
    if (result < 0) {
        make_anew(k); /* and the new file has them */
        result = k->lost ? 0 : sync_marks(k, r);
    }
    return k->refusing ? -EIO : result;
}

static int begin_use(struct keeper *k)
{
    struct error err = ERROR_INIT;
    LOCKED(&k->lock);

    if (k->in_use || k->lost)
        return 0;
    if (keeper_change_state(k, &err) == 0)
        return 0;
    if (!k->lost && k->options.runtime) {
        /* A full tmpfs is no reason to lose them. */
        log_warning("Node '%s': %s: after a kill its bitmaps will be as after a power loss",
                    node_name(k->node), err.text);
        free((char *)steal(k->options.runtime));
        error_clear(&err);
        if (keeper_change_state(k, &err) == 0)
            return 0;
    }
    log_error("Node '%s': %s: its bitmaps do not survive a crash", node_name(k->node), err.text);
    if (!k->lost)
        keeper_give_up(k, &err);
    return 0;
}

int keeper_before_write(struct keeper *k, struct range r)
{
    if (!k->in_use && !k->lost) {
        if (!k->tide && !k->recording)
            return 0;
        int result = begin_use(k);
        if (result < 0)
            return result;
    }
    if (k->refusing)
        return -EIO;
    if (k->lost)
        return 0;
    if (k->hot && k->recording) {
        int result = hot_take(k->hot, r);
        if (result == -E2BIG)
            result = write_through(k, r);
        if (result < 0 && (!k->lost || k->refusing)) /* else there is nothing left to lose */
            return result;
    }
    if (k->stamp)
        stamp_write_begun(k->stamp);
    return 0;
}

void keeper_mark(struct keeper *k, struct range r)
{
    if (k->hot && k->recording)
        hot_marked(k->hot, r);
}

void keeper_written(struct keeper *k, struct range r)
{
    if (k->hot && k->recording)
        hot_give(k->hot, r);
    if (k->stamp)
        stamp_write_done(k->stamp);
}
