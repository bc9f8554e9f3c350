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

/* The entry of the superblock that names this epoch; NULL: none does any more. */
static const struct tide_bitmap *entry_at(const struct keeper *k, uint64_t epoch,
                                          struct tide_area *area)
{
    const struct tide_table *t = &tide_super(k->tide)->table;

    for (size_t i = 0; i < t->n; i++) {
        const struct tide_bitmap *e = &t->items[i];
        if (e->current.epoch != epoch && e->successor.epoch != epoch)
            continue;
        *area = e->current.epoch == epoch ? e->current : e->successor;
        return e;
    }
    return NULL;
}

/* The areas of the sets that the superblock names at this moment, or of those alone that record. A
 * change of state may be made durable while they are written, so that the table has another order,
 * and a set another place in it, or none (then its bits are in another, or not needed): so each is
 * known by its epoch, and looked up anew. What comes into the table meanwhile was empty, or has
 * been written. Under k->area_lock. */
static int write_sets(struct keeper *k, bool recording, const struct range *ranges, size_t n)
{
    const struct tide *t = k->tide;
    const struct tide_table *table = &tide_super(t)->table;
    CLEANUP(memory_freep) uint64_t *epochs = xcalloc(2 * table->n + 1, sizeof *epochs);
    size_t count = 0;
    int r = 0;

    for (size_t i = 0; i < table->n; i++) {
        const struct tide_bitmap *e = &table->items[i];
        if (recording && !e->enabled)
            continue;
        if (!recording || !e->successor.epoch)
            epochs[count++] = e->current.epoch;
        if (e->successor.epoch)
            epochs[count++] = e->successor.epoch;
    }
    for (size_t i = 0; r == 0 && i < count && k->tide == t; i++) { /* a new file has all of it */
        struct tide_area area;
        const struct tide_bitmap *e = entry_at(k, epochs[i], &area);
        const struct kept_set *s = e ? keeper_set_at(k, epochs[i]) : NULL;
        if (s)
            r = keeper_write_area(k, e, area, s->bits, ranges, n);
    }
    return r;
}

/* Both sets of every bitmap. */
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
    const struct tide *t = k->tide;
    int r = write_sets(k, false, ranges, n);
    if (r < 0 || k->tide != t)
        return r;
    return BROKEN(clean_not_synced) ? 0 : tide_sync(k->tide);
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
    LOCKED(&k->area_lock);

    int result = k->tide ? write_sets(k, true, &r, 1) : 0;
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
    int result = sync_marks(k, r);
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

static int let_pass(struct keeper *k, struct range r)
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

int keeper_before_write(struct keeper *k, struct range r)
{
    int result = let_pass(k, r);

    if (result == 0)
        checkpoint_write_begun(k);
    return result;
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
    checkpoint_write_ended(k);
}
