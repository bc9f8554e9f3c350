/* What bitmaps are becomes durable: at a commit what they say, and once their disk has been flushed
 * that a clear, an add or an enable holds. Until then each such bitmap is pending: a crash gives
 * what was before it.
 *
 *     dirty_begin     the change gets a number; what is pending of earlier ones is settled
 *     dirty_commit    durable: all bitmaps of the nodes as they are now, pending ones twice over
 *     dirty_settle    flushes the nodes, and commits that nothing of this change is pending
 *
 * All bitmaps of a change are settled together, on whatever disks they are; one that is not kept is
 * pending, too, but nobody flushes for it. */
#include "dirty/internal.h"

#include "base/log.h"

/* ---- what is durable ---- */

static bool is_pending(const struct dirty_bitmap *bm)
{
    return !bm->hidden && (bm->before || bm->unbased);
}

/* Does one of these bitmaps stop to record by what is to be committed? */
static bool something_ends(struct node *const *nodes, size_t n)
{
    const struct dirty_bitmap *bm;

    for (size_t i = 0; i < n; i++) {
        const struct dirty_node *home = dirty_home(nodes[i]);
        if (!home)
            continue;
        TAILQ_FOREACH (bm, &home->list, link)
            if (bm->kept && (bm->hidden || bm->ended))
                return true;
    }
    return false;
}

/* Guests wait for a flush, but what comes later comes too late:
 *  - the bits that stand between what was before a clear and the successor are in neither;
 *  - where one bitmap ends and another begins, a cut between would have neither (ENDING). */
static bool must_settle_now(const struct dirty_bitmap *bm, bool ending)
{
    return (ending && is_pending(bm)) ||
           (bm->before && bm->successor && bitmap_count(bm->bits) > 0);
}

static void settled(struct dirty_bitmap *bm)
{
    struct bitmap *before = steal(bm->before);

    if (!bm->before_lent)
        dirty_free_bits(bm, before);
    bm->before_lent = false;
    bm->unbased = bm->settling = false;
    dirty_set_generation(bm, bm->generation + 1, NULL);
}

/* Changes that are to be settled: all bitmaps of one, on whatever node, or none. A disk has pending
 * bitmaps of one at most (dirty_begin). */
struct changes {
    uint64_t *ids;
    size_t n;
};

static void changes_fini(struct changes *c)
{
    free(c->ids);
}

static bool is_of(const struct dirty_bitmap *bm, const struct changes *c)
{
    for (size_t i = 0; is_pending(bm) && i < c->n; i++)
        if (c->ids[i] == bm->change)
            return true;
    return false;
}

static void add_change(struct changes *c, const struct dirty_bitmap *bm)
{
    uint64_t *more = is_of(bm, c) ? NULL : xcalloc(c->n + 1, sizeof *more);

    if (!more)
        return;
    if (c->n)
        memcpy(more, c->ids, c->n * sizeof *more);
    more[c->n++] = bm->change;
    free(c->ids);
    c->ids = more;
}

/* The nodes, and the further ones that have bitmaps of these changes. Caller frees. */
static struct node **with_others(struct node *const *nodes, size_t n, const struct changes *c,
                                 size_t *count)
{
    struct graph *g = node_graph(nodes[0]);
    size_t all = n;

    for (struct node *m = graph_first(g); m; m = graph_next(m))
        all++;
    struct node **ret = xcalloc(all, sizeof *ret);
    memcpy(ret, nodes, n * sizeof *ret);
    *count = n;
    for (struct node *m = graph_first(g); m; m = graph_next(m)) {
        bool wanted = false;
        for (struct dirty_bitmap *bm = dirty_first(m); bm && !wanted; bm = dirty_next(bm))
            wanted = bm->kept && bm->change && is_of(bm, c);
        for (size_t i = 0; wanted && i < n; i++)
            wanted = nodes[i] != m;
        if (wanted)
            ret[(*count)++] = m;
    }
    return ret;
}

/* Makes N as durable as it was when the changes of C began. The error of a flush is told once, and
 * a guest may have had it: then the losses tell. */
static int make_durable(struct node *n, const struct changes *c, struct error *err)
{
    struct dirty_store *s = dirty_store_of(n);
    int r = s->flush(s, n);

    for (struct dirty_bitmap *bm = dirty_first(n); r == 0 && bm; bm = dirty_next(bm))
        if (bm->kept && is_of(bm, c) && node_lost_since(n, bm->losses))
            r = -EIO;
    return r < 0 ? error_set_errno(err, -r, "Failed to flush node '%s'", node_name(n)) : 0;
}

/* Flushes the node, if some kept bitmap of these changes is there, and then they are settling. */
static int flush_changed(struct node *n, const struct changes *c, struct error *err)
{
    struct dirty_store *s = dirty_store_of(n);
    bool flushed = false;
    int r = 0;

    for (struct dirty_bitmap *bm = dirty_first(n); r == 0 && bm; bm = dirty_next(bm)) {
        if (!bm->kept || !is_of(bm, c) || bm->settling || !s || !s->flush)
            continue;
        if (!flushed && !BROKEN(settled_without_flush))
            r = make_durable(n, c, err);
        flushed = bm->settling = true;
    }
    return r;
}

static int commit(struct node *const *nodes, size_t n, bool ending, struct error *err)
{
    CLEANUP(changes_fini) struct changes now = {0};
    size_t count = 0;
    int r = 0;

    for (size_t i = 0; i < n; i++)
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm))
            if (bm->kept && must_settle_now(bm, ending))
                add_change(&now, bm);
    CLEANUP(memory_freep) struct node **all = n ? with_others(nodes, n, &now, &count) : NULL;
    for (size_t i = 0; r == 0 && i < count; i++)
        r = flush_changed(all[i], &now, err);
    struct dirty_store *s = n ? dirty_store_of(nodes[0]) : NULL;
    if (r == 0 && s && s->commit)
        r = s->commit(s, all, count, err);
    for (size_t i = 0; i < count; i++) {
        for (struct dirty_bitmap *bm = dirty_first(all[i]); bm; bm = dirty_next(bm)) {
            if (bm->settling && r == 0)
                settled(bm);
            bm->settling = false;
            /* Nothing of a read-only node is written: so it goes on to be told. */
            if (r == 0 && (!node_read_only(all[i]) || BROKEN(read_only_counts)))
                bm->ended = bm->unannounced = false;
        }
        if (dirty_home(all[i]))
            dirty_unwatch(dirty_home(all[i]));
    }
    return r;
}

int dirty_commit(struct node *const *nodes, size_t n, struct error *err)
{
    return commit(nodes, n, something_ends(nodes, n), err);
}

void dirty_commit_undone(struct node *const *nodes, size_t n)
{
    struct error err = ERROR_INIT;

    if (dirty_commit(nodes, n, &err) < 0)
        log_error("%s", err.text);
}

static bool something_is_pending(struct node *n)
{
    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (bm->kept && is_pending(bm))
            return true;
    return false;
}

/* What waits for its dirty_settle on these nodes is settled before something new is: what was
 * before a clear, and what has been marked since, are two sets already, and another clear would
 * have no place for the second. Each change by itself, with all its disks: together they would be
 * one group, and a disk of one in doubt when the first disk of another is not there. */
int dirty_begin(struct node *const *nodes, size_t n, struct error *err)
{
    struct dirty_graph *dg = n ? dirty_graph_of(nodes[0]) : NULL;

    if (dg)
        dg->changes++;
    int r = dirty_join(nodes, n, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (something_is_pending(nodes[i]))
            r = BROKEN(pending_settled_together) ? commit(nodes, n, true, err)
                                                 : commit(&nodes[i], 1, true, err);
    return r;
}

int dirty_join(struct node *const *nodes, size_t n, struct error *err)
{
    struct dirty_store *s = n ? dirty_store_of(nodes[0]) : NULL;

    return s && s->begin ? s->begin(s, nodes, n, err) : 0;
}

/* What these are not any more. One that cannot say it is no reason for the others to be believed:
 * then each says it for itself, and a keeper that cannot gives its tide file up. */
static void say_what_is_not(struct node *const *nodes, size_t n)
{
    struct error err = ERROR_INIT;
    int r = dirty_commit(nodes, n, &err);

    if (r < 0)
        log_warning("%s", err.text);
    for (size_t i = 0; r < 0 && n > 1 && i < n && !BROKEN(said_together_or_not); i++) {
        error_clear(&err);
        if (dirty_commit(&nodes[i], 1, &err) < 0)
            log_warning("%s", err.text);
    }
}

/* The disk cannot be made durable: nothing that was cleared may stay so, nothing be trusted that
 * has no base. */
static void unsettle(struct node *const *nodes, size_t n, const struct changes *c)
{
    for (size_t i = 0; i < n; i++) {
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm)) {
            if (!is_of(bm, c))
                continue;
            if (bm->before) {
                bitmap_merge(bm->successor ? bm->successor->bits : bm->bits, bm->before);
                bm->unannounced = true;
                dirty_free_bits(bm, steal(bm->before));
                bm->peak_bytes = max_u64(bm->peak_bytes, bm->peak_before);
            }
            if (bm->unbased)
                dirty_set_inconsistent(bm);
            bm->unbased = false;
        }
    }
    say_what_is_not(nodes, n);
}

/* They have been settled by a later flush that succeeded, and the disk says now that it cannot be
 * made durable: an error is told to one of two flushes. Nor may a change be told to have failed and
 * stand. Until that is durable, guests wait: what they write is not marked any more. */
static void distrust(struct node *const *nodes, size_t n, const struct changes *c)
{
    struct graph *g = node_graph(nodes[0]);

    if (!BROKEN(distrusted_beside_guests))
        graph_quiesce_begin(g, nodes, n);
    for (size_t i = 0; i < n; i++)
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm))
            for (size_t k = 0; bm->kept && k < c->n; k++)
                if (bm->change == c->ids[k])
                    dirty_set_inconsistent(bm);
    say_what_is_not(nodes, n);
    if (!BROKEN(distrusted_beside_guests))
        graph_quiesce_end(g, nodes, n);
}

/* What becomes pending while these are flushed is of another change, and needs another flush. */
static int settle(struct node *const *nodes, size_t n, const struct changes *c, struct error *err)
{
    bool any = false, any_kept = false;
    int r = 0;

    for (size_t i = 0; r == 0 && i < n; i++) {
        struct dirty_store *s = dirty_store_of(nodes[i]);
        bool flush = false;
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm))
            flush |= bm->kept && is_of(bm, c);
        if (flush && s && s->flush && !BROKEN(settled_without_flush))
            r = make_durable(nodes[i], c, err);
    }
    GRAPH_LOCKED(node_graph(nodes[0]));
    for (size_t i = 0; i < n; i++)
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm)) {
            any |= is_of(bm, c);
            any_kept |= bm->kept && is_of(bm, c);
            bm->settling =
                r == 0 && is_pending(bm) && (is_of(bm, c) || BROKEN(settled_without_flush));
        }
    /* Somebody has settled them meanwhile, with a flush of their own; but not those that are in
     * memory only, for which nobody flushes. */
    if (r < 0 && !any_kept)
        distrust(nodes, n, c);
    if (!any)
        return r;
    if (r == 0)
        r = dirty_commit(nodes, n, err);
    if (r < 0)
        unsettle(nodes, n, c);
    return r;
}

int dirty_settle(struct node *const *nodes, size_t n, struct error *err)
{
    CLEANUP(changes_fini) struct changes pending = {0};
    size_t count = 0;

    for (size_t i = 0; i < n; i++)
        for (struct dirty_bitmap *bm = dirty_first(nodes[i]); bm; bm = dirty_next(bm))
            if (is_pending(bm))
                add_change(&pending, bm);
    if (!pending.n)
        return 0;
    CLEANUP(memory_freep) struct node **all = with_others(nodes, n, &pending, &count);
    for (size_t i = n; i < count; i++)
        node_ref(all[i]);
    int r = settle(all, count, &pending, err);
    for (size_t i = n; i < count; i++)
        node_unref(all[i]);
    return r;
}

void dirty_set_generation(struct dirty_bitmap *bm, uint64_t generation, const char *job)
{
    bm->generation = generation;
    free(bm->last_job);
    bm->last_job = job ? xstrdup(job) : NULL;
}

void dirty_get_state(const struct dirty_bitmap *bm, struct dirty_state *ret)
{
    const struct dirty_bitmap *s = bm->successor;

    *ret = (struct dirty_state){
        .current = bm->bits,
        .successor = s ? s->bits : NULL,
        .enabled = dirty_recording(bm),
        .inconsistent = bm->inconsistent,
        .based = !bm->unbased,
        .unannounced = bm->unannounced,
        .generation = bm->generation + bm->rebased,
        .job = bm->rebased ? bm->job : bm->last_job,
    };
    if (bm->concluding) {
        ret->current = BROKEN(rolled_back_in_place) && !bm->rebased ? bm->bits : s->bits;
        ret->successor = NULL;
        ret->folded = bm->folded;
        ret->inconsistent = (bm->inconsistent && !bm->rebuilt) || s->inconsistent;
        ret->based = ret->based || bm->rebuilt;
    }
    if (bm->settling) {
        ret->based = true;
        ret->generation++;
        ret->job = NULL;
    } else if (bm->before && !(bm->concluding && bm->rebased)) {
        /* Cleared, but that may not be durable before the disk is. So far it is as if a job held
         * what was there before. */
        ret->successor = ret->successor ? ret->successor : ret->current;
        ret->current = bm->before;
        if (BROKEN(enabled_though_not_cleared))
            ret->based = true;
    }
}
