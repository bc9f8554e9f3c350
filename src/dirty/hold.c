/* What a job has of a bitmap, and what a doubt has: the bits are frozen, a successor records. See
 * dirty.c. */
#include "dirty/internal.h"

#include "base/broken.h"

/* ---- a job's hold on a bitmap ---- */

static int start(struct dirty_bitmap *bm, bool record, struct error *err)
{
    struct bitmap *bits = bitmap_new(bitmap_size(bm->bits), dirty_granularity(bm));
    if (!bits)
        return dirty_no_memory(bm->home->node, bm->name, dirty_granularity(bm), err);
    dirty_assert_quiet(bm->home->node);
    bm->successor = dirty_enlist(bm->home, NULL, bits);
    bm->successor->kept = bm->kept;
    bm->successor->enabled = record;
    int r = dirty_watch(bm, err); /* is, unless it is inconsistent */
    if (r < 0) {
        dirty_release(steal(bm->successor));
        return r;
    }
    bm->enabled = false;
    bm->busy = true;
    return 0;
}

int dirty_start(struct dirty_bitmap *bm, struct error *err)
{
    int r = dirty_check(bm, DIRTY_CHECK_BUSY, err);
    return r < 0 ? r : start(bm, bm->enabled || BROKEN(successor_of_disabled_records), err);
}

int dirty_start_rebuild(struct dirty_bitmap *bm, uint64_t base_bytes, struct error *err)
{
    int r = dirty_check(bm, DIRTY_CHECK_BUSY | DIRTY_CHECK_READONLY, err);
    /* If its job fails it must be disabled again, and a kill would have to know that. */
    if (r == 0 && !bm->enabled && !bm->inconsistent)
        r = error_set(err, EINVAL, "Bitmap '%s' is disabled and cannot be rebuilt: enable it first",
                      bm->name);
    struct dirty_store *s = dirty_store_of(bm->home->node);
    if (r == 0 && bm->kept && s && s->can_rebuild)
        r = s->can_rebuild(s, bm->home->node, err);
    if (r == 0)
        r = start(bm, true, err);
    if (r < 0)
        return r;
    bm->successor->peak_bytes = max_u64(bm->successor->peak_bytes, base_bytes);
    return 0;
}

/* The successor's bits become those of BM, which is not busy any more. A new base has its place in
 * the list, the old one keeps its own; that is how QEMU's queries show it. */
static void succeed(struct dirty_bitmap *bm, bool new_base)
{
    struct dirty_bitmap *s = bm->successor;

    assert(s && bm->busy && !bm->enabled);
    if (!new_base && BROKEN(rolled_back_in_place)) {
        dirty_free_bits(bm, steal(s->bits));
    } else {
        dirty_free_bits(bm, bm->bits);
        bm->bits = steal(s->bits);
    }
    bm->enabled = s->enabled;
    bm->marked_since = true;
    if (bm->inconsistent || s->inconsistent)
        dirty_set_inconsistent(bm);
    bm->peak_bytes = new_base ? s->peak_bytes : max_u64(bm->peak_bytes, s->peak_bytes);
    if (new_base)
        bm->peak_before = 0; /* else an undo of a clear in the same transaction comes yet */
    bm->busy = false;
    bm->successor = NULL;
    if (new_base) {
        TAILQ_REMOVE(&bm->home->list, bm, link);
        TAILQ_INSERT_BEFORE(s, bm, link);
    }
    dirty_release(s);
}

int dirty_restart(struct dirty_bitmap *bm, struct error *err)
{
    struct dirty_bitmap *s = bm->successor;
    struct node *n = bm->home->node;

    assert(s);
    dirty_assert_quiet(n);
    struct bitmap *clean = bitmap_new(bitmap_size(s->bits), dirty_granularity(bm));
    struct bitmap *all = bitmap_dup(s->bits);
    if (!clean || !all) {
        bitmap_free(clean);
        bitmap_free(all);
        return dirty_no_memory(n, bm->name, dirty_granularity(bm), err);
    }
    bitmap_merge(all, bm->bits);
    /* In two steps: the store has room for one new set beside the two that it has. */
    struct bitmap *old = bm->bits;
    bm->bits = all;
    int r = dirty_commit(&n, 1, err);
    if (r < 0) {
        bm->bits = old;
        dirty_free_bits(bm, all);
        bitmap_free(clean);
        return r;
    }
    dirty_free_bits(bm, old);
    old = s->bits;
    s->bits = clean;
    r = dirty_commit(&n, 1, err);
    if (r < 0) {
        s->bits = old; /* where guests mark next: or they would in a set that nothing names */
        if (!BROKEN(failed_restart_stands))
            dirty_commit_undone(&n, 1);
    }
    dirty_free_bits(s, r < 0 ? clean : old);
    return r;
}

void dirty_unstart(struct dirty_bitmap *bm)
{
    struct dirty_bitmap *s = bm->successor;

    dirty_assert_quiet(bm->home->node);
    bitmap_merge(bm->bits, s->bits);
    bm->unannounced |= bitmap_count(s->bits) > 0;
    bm->enabled = s->enabled;
    bm->peak_bytes = max_u64(bm->peak_bytes, s->peak_bytes);
    bm->marked_since = true;
    if (bm->inconsistent || s->inconsistent)
        dirty_set_inconsistent(bm);
    bm->busy = false;
    bm->successor = NULL;
    dirty_release(s);
    dirty_unwatch(bm->home);
}

/* ---- in doubt ---- */

int dirty_hold(struct dirty_bitmap *bm, bool record, const char *why, struct bitmap **yes,
               struct error *err)
{
    int r = start(bm, record, err);
    if (r < 0)
        return r;
    bm->why_held = xstrdup(why);
    bm->successor->peak_bytes = bm->peak_bytes;
    *yes = bm->successor->bits;
    return 0;
}

bool dirty_held(const struct dirty_bitmap *bm)
{
    return bm->why_held;
}

void dirty_answer(struct dirty_bitmap *bm, const struct dirty_answer *a)
{
    struct dirty_bitmap *s = bm->successor;

    assert(bm->why_held && s);
    dirty_assert_quiet(bm->home->node);
    free(steal(bm->why_held));
    if (!a->yes) { /* what was written since is in the successor, as everywhere */
        bitmap_merge(s->bits, bm->bits);
        bm->unannounced = true;
    }
    succeed(bm, false);
    bm->enabled = a->enabled;
    if (a->inconsistent || bm->inconsistent)
        dirty_set_inconsistent(bm);
    dirty_set_generation(bm, a->generation, a->job);
}

/* Does what the job has done give the bitmap a new base? */
static bool rebases(const struct dirty_outcome *o)
{
    return o->advance || o->remaining;
}

static void fold(const struct dirty_outcome *o)
{
    struct dirty_bitmap *bm = o->bitmap, *s = bm->successor;

    assert(s && bm->busy);
    if (!o->advance) {
        bm->folded = o->remaining ? o->remaining : bm->bits;
        if (BROKEN(successor_not_merged))
            bitmap_clear_all(s->bits);
        if (BROKEN(rolled_back_in_place) && !o->remaining)
            bitmap_merge(bm->bits, s->bits);
        else
            bitmap_merge_range(s->bits, bm->folded, range_make(0, bitmap_size(bm->folded)));
    }
    bm->concluding = true;
    bm->rebased = rebases(o);
    bm->rebuilt = o->rebuilt;
    bm->job = o->job;
}

static void unfold(const struct dirty_outcome *o)
{
    o->bitmap->concluding = o->bitmap->rebased = o->bitmap->rebuilt = false;
    o->bitmap->folded = NULL; /* its bits stay in the successor: a superset */
    o->bitmap->job = NULL;
}

static void follow(const struct dirty_outcome *o)
{
    struct dirty_bitmap *bm = o->bitmap;

    if (o->rebuilt)
        bm->inconsistent = false;
    if (o->advance || o->rebuilt) {
        /* Whoever has advanced has flushed the node: a clear before is durable, too. */
        dirty_free_bits(bm, steal(bm->before));
        bm->unbased = false;
    }
    if (rebases(o))
        dirty_set_generation(bm, bm->generation + 1, o->job);
    unfold(o);
    succeed(bm, rebases(o));
}

int dirty_conclude(const struct dirty_outcome *outcomes, size_t n, struct error *err)
{
    CLEANUP(memory_freep) struct node **nodes = xcalloc(n + 1, sizeof *nodes);

    for (size_t i = 0; i < n; i++)
        nodes[i] = outcomes[i].bitmap->home->node;
    /* Not in the middle of a transaction, whose commit would make durable what is folded so far:
     * half of a group. */
    GRAPH_LOCKED(node_graph(nodes[0]));
    for (size_t i = 0; i < n; i++)
        fold(&outcomes[i]);
    int r = dirty_commit(nodes, n, err);
    for (size_t i = 0; i < n; i++) {
        if (r < 0)
            unfold(&outcomes[i]);
        else
            follow(&outcomes[i]);
        dirty_unwatch(outcomes[i].bitmap->home); /* a rebuild that has failed */
    }
    return r;
}
