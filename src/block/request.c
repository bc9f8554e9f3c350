/* Requests: from an edge through the gate and the range lock to the driver.
 *
 *   edge_write
 *     gate          waits while the node is quiesced (the quiescer closes it, and waits until
 *                   nobody is `inside`)
 *     range lock    shared; exclusive if it must be alone or does not end on the alignment
 *     observers     before_write ..., mark ...: bits before data (block.h)
 *     driver        in pieces of max_transfer, through aligned buffers where the caller's is not
 *     observers     written; the generation moves on; a flush for FUA that the driver cannot do
 *
 * A piece that is not aligned to what the driver takes is read, changed and written back
 * while its range is locked exclusively. The path of an aligned request allocates nothing.
 *
 * A flush with nothing written since the last one costs nothing: write_generation counts
 * completed writes, and a flush is good for what had completed when it was asked for. */

#include "block/internal.h"

#include "base/broken.h"

#include <isa-l/mem_routines.h>

void *block_buffer(size_t n)
{
    void *p;

    return posix_memalign(&p, 4096, n ? n : 1) ? NULL : p;
}

/* ---- the gate ---- */

struct node *request_enter(struct edge *e)
{
    for (;;) {
        struct node *n = e->node;
        if (!n->gate || graph_lock_is_mine(n->graph)) {
            n->inside++;
            return n;
        }
        (void)!waitq_wait(&n->at_gate); /* shielded; the edge may lead elsewhere now */
    }
}

void request_leave(struct node *n)
{
    assert(n->inside);
    if (!--n->inside && !waitq_empty(&n->emptied))
        waitq_wake_all(&n->emptied);
}

static void quiesce_one(struct node *n)
{
    n->gate++;
    if (n->driver->quiesced)
        n->driver->quiesced(n);
    while (n->inside && !BROKEN(quiesced_without_waiting))
        (void)!waitq_wait(&n->emptied);
}

/* Is one of the others, not closed yet, above N? */
static bool has_parent_in(struct node *n, struct node *const *nodes, size_t count,
                          const bool *closed)
{
    for (size_t i = 0; i < count; i++)
        if (!closed[i] && nodes[i] != n && node_reaches(nodes[i], n))
            return true;
    return false;
}

/* What one graph_quiesce_begin has closed: the nodes that it was given, and those between them. */
struct quiet {
    LIST_ENTRY(quiet) link;
    size_t given, count;
    struct node *nodes[]; /* of those between: references */
};

static bool is_between(struct node *n, struct node *const *nodes, size_t count)
{
    bool below = false, above = false;

    for (size_t i = 0; i < count; i++) {
        if (nodes[i] == n)
            return false;
        below |= node_reaches(nodes[i], n);
        above |= node_reaches(n, nodes[i]);
    }
    return below && above;
}

/* A request inside such a node would wait at the gate below it, with what somebody who has come
 * through the node above (the quiescer's own flush) then waits for. */
static struct quiet *quiet_new(struct graph *g, struct node *const *nodes, size_t count)
{
    struct node *n;
    size_t all = count;

    TAILQ_FOREACH (n, &g->nodes, in_graph)
        all += is_between(n, nodes, count);
    struct quiet *q = xcalloc(1, sizeof *q + all * sizeof *q->nodes);
    for (q->given = count; q->count < count; q->count++)
        q->nodes[q->count] = nodes[q->count];
    TAILQ_FOREACH (n, &g->nodes, in_graph)
        if (is_between(n, nodes, count) && !BROKEN(quiesced_with_gaps))
            q->nodes[q->count++] = node_ref(n);
    LIST_INSERT_HEAD(&g->quieted, q, link);
    return q;
}

static bool was_given(const struct quiet *q, struct node *const *nodes, size_t count)
{
    size_t i = 0;

    while (i < count && i < q->given && q->nodes[i] == nodes[i])
        i++;
    return i == count && i == q->given;
}

void graph_quiesce_begin(struct graph *g, struct node *const *nodes, size_t count)
{
    SHIELD();

    graph_lock(g);
    struct quiet *q = quiet_new(g, nodes, count);
    bool *closed = xcalloc(q->count + 1, sizeof *closed);
    for (size_t done = 0; done < q->count;) {
        for (size_t i = 0; i < q->count; i++) {
            if (closed[i] || has_parent_in(q->nodes[i], q->nodes, q->count, closed))
                continue;
            quiesce_one(q->nodes[i]);
            closed[i] = true;
            done++;
        }
    }
    free(closed);
}

void graph_quiesce_end(struct graph *g, struct node *const *nodes, size_t count)
{
    struct quiet *q;

    LIST_FOREACH (q, &g->quieted, link)
        if (was_given(q, nodes, count))
            break;
    assert(q);
    LIST_REMOVE(q, link);
    for (size_t i = q->count; i--;) {
        struct node *n = q->nodes[i];
        assert(n->gate);
        if (!--n->gate)
            waitq_wake_all(&n->at_gate);
        if (i >= q->given)
            node_unref(n);
    }
    free(q);
    graph_unlock(g);
}

struct node_cancel {
    struct node *nodes[GRAPH_DEPTH_MAX]; /* references: the graph may change meanwhile */
    size_t count;
};

struct node_cancel *node_cancel_begin(struct node *n)
{
    struct node_cancel *c = xnew(struct node_cancel);
    struct edge *e;

    for (;; n = e->node) {
        c->nodes[c->count++] = node_ref(n);
        if (n->cancelled++ == 0 && n->driver->cancel)
            n->driver->cancel(n);
        e = node_primary(n);
        if (!e || c->count == ARRAY_SIZE(c->nodes))
            return c;
    }
}

void node_cancel_end(struct node_cancel *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->count; i++) {
        c->nodes[i]->cancelled--;
        node_unref(c->nodes[i]);
    }
    free(c);
}

int node_lock_range(struct node *n, struct range_holder *h, struct range r,
                    enum range_lock_mode mode)
{
    return rangelock_take(&n->locks, h, r, mode);
}

/* ---- calls of the driver ---- */

static bool is_aligned_for(const struct node *n, struct range r, const void *buf)
{
    return range_aligned(r, n->limits.request_alignment) &&
           !((uintptr_t)buf & (n->limits.memory_alignment - 1));
}

/* The next piece of R that the driver takes in one call. */
static struct range next_piece(const struct node *n, struct range r, uint64_t limit)
{
    if (limit && r.length > limit)
        r.length =
            max_u64(align_down(limit, n->limits.request_alignment), n->limits.request_alignment);
    return r;
}

static struct range rest_of(struct range r, struct range piece)
{
    return range_between(range_end(piece), range_end(r));
}

/* Everything aligned. What lies beyond the end reads as zeroes. */
static int read_aligned(struct node *n, struct range r, uint8_t *buf, unsigned flags)
{
    uint64_t end = align_up(n->size_bytes, n->limits.request_alignment);

    if (range_end(r) > end) {
        uint64_t inside = r.start < end ? end - r.start : 0;
        memset(buf + inside, 0, r.length - inside);
        r.length = inside;
    }
    while (r.length) {
        struct range piece = next_piece(n, r, n->limits.max_transfer);
        int result = n->driver->read(n, piece, buf, flags);
        if (result < 0)
            return result;
        buf += piece.length;
        r = rest_of(r, piece);
    }
    return 0;
}

static int read_bounced(struct node *n, struct range r, uint8_t *buf, unsigned flags)
{
    struct range whole = range_round_out(r, n->limits.request_alignment);
    uint8_t *bounce = block_buffer(min_u64(whole.length, BOUNCE_BYTES));
    int result = 0;

    if (!bounce)
        return -ENOMEM;
    while (whole.length && result == 0) {
        struct range piece = next_piece(n, whole, BOUNCE_BYTES);
        struct range part = range_intersect(piece, r);

        result = read_aligned(n, piece, bounce, flags & ~(unsigned)REQ_REGISTERED_BUF);
        if (result == 0)
            memcpy(buf + (part.start - r.start), bounce + (part.start - piece.start), part.length);
        whole = rest_of(whole, piece);
    }
    free(bounce);
    return result;
}

static int write_aligned(struct node *n, struct range r, const uint8_t *buf, unsigned flags)
{
    int result = 0;

    node_debug_event(n, DEBUG_pwritev);
    while (r.length && result == 0) {
        struct range piece = next_piece(n, r, n->limits.max_transfer);
        result = n->driver->write(n, piece, buf, flags);
        buf += piece.length;
        r = rest_of(r, piece);
    }
    node_debug_event(n, DEBUG_pwritev_done);
    return result < 0 ? result : 0;
}

/* Through a buffer of ours; the ends that R does not cover are read first. BUF NULL: zeroes.
 * The caller holds the range, rounded outwards, exclusively if R is not aligned. */
static int write_bounced(struct node *n, struct range r, const uint8_t *buf, unsigned flags)
{
    uint32_t align = n->limits.request_alignment;
    struct range whole = range_round_out(r, align);
    uint8_t *bounce = block_buffer(min_u64(whole.length, BOUNCE_BYTES));
    int result = 0;

    if (!bounce)
        return -ENOMEM;
    while (whole.length && result == 0) {
        struct range piece = next_piece(n, whole, BOUNCE_BYTES);
        struct range part = range_intersect(piece, r);

        if (part.start > piece.start) {
            node_debug_event(n, DEBUG_pwritev_rmw_head);
            result = read_aligned(n, range_make(piece.start, align), bounce, 0);
            if (result == 0)
                node_debug_event(n, DEBUG_pwritev_rmw_after_head);
        }
        if (result == 0 && range_end(part) < range_end(piece) &&
            !(part.start > piece.start && piece.length == align)) {
            node_debug_event(n, DEBUG_pwritev_rmw_tail);
            result = read_aligned(n, range_make(range_end(piece) - align, align),
                                  bounce + piece.length - align, 0);
            if (result == 0)
                node_debug_event(n, DEBUG_pwritev_rmw_after_tail);
        }
        if (result < 0)
            break;
        if (buf)
            memcpy(bounce + (part.start - piece.start), buf + (part.start - r.start), part.length);
        else
            memset(bounce + (part.start - piece.start), 0, part.length);
        result = write_aligned(n, piece, bounce, flags & ~(unsigned)REQ_REGISTERED_BUF);
        whole = rest_of(whole, piece);
    }
    free(bounce);
    return result;
}

/* The driver likes multiples of ALIGN (which need not be a power of two) and takes no more than
 * LIMIT (0: any number) at once: an end that is no multiple goes by itself. */
static struct range next_liked_piece(struct range r, uint64_t align, uint64_t limit)
{
    uint64_t into = r.start % align;

    if (into)
        r.length = min_u64(r.length, align - into);
    else if (r.length >= align)
        r.length -= r.length % align;
    if (limit && r.length > limit)
        r.length = limit;
    return r;
}

/* R is aligned to request_alignment. -ENOTSUP: the driver cannot, and must not be by-passed. */
static int zeroes_aligned(struct node *n, struct range r, unsigned flags)
{
    uint64_t align = n->limits.write_zeroes_alignment;
    uint64_t limit = n->limits.max_write_zeroes;
    unsigned known = flags & n->write_zeroes_flags;
    int result = 0;

    if (align < n->limits.request_alignment)
        align = n->limits.request_alignment;
    if ((flags & REQ_NO_FALLBACK) && !(n->write_zeroes_flags & REQ_NO_FALLBACK))
        return -ENOTSUP;
    node_debug_event(n, DEBUG_pwritev_zero);
    while (r.length && result == 0) {
        struct range piece = next_liked_piece(r, align, limit);

        result = -ENOTSUP;
        if (n->driver->write_zeroes)
            result = n->driver->write_zeroes(n, piece, known);
        if (result == -ENOTSUP && !(flags & REQ_NO_FALLBACK))
            result = write_bounced(n, piece, NULL, flags & n->write_flags);
        r = rest_of(r, piece);
    }
    node_debug_event(n, DEBUG_pwritev_done);
    return result;
}

static int zeroes_any(struct node *n, struct range r, unsigned flags)
{
    uint32_t align = n->limits.request_alignment;
    struct range body = range_round_in(r, align);
    int result = 0;

    if (range_aligned(r, align))
        return zeroes_aligned(n, r, flags);
    if (flags & REQ_NO_FALLBACK)
        return -ENOTSUP;
    if (!body.length)
        return write_bounced(n, r, NULL, flags & n->write_flags);
    if (body.start > r.start)
        result = write_bounced(n, range_between(r.start, body.start), NULL, flags & n->write_flags);
    if (result == 0)
        result = zeroes_aligned(n, body, flags);
    if (result == 0 && range_end(body) < range_end(r))
        result = write_bounced(n, range_between(range_end(body), range_end(r)), NULL,
                               flags & n->write_flags);
    return result;
}

/* ---- observers ---- */

static int announce(struct node *n, struct range r)
{
    struct write_observer *o, *undo;

    TAILQ_FOREACH (o, &n->observers, link) {
        int result = o->before_write ? o->before_write(o, r) : 0;
        if (result < 0) {
            TAILQ_FOREACH (undo, &n->observers, link) {
                if (undo == o)
                    break;
                if (undo->written)
                    undo->written(undo, r, result);
            }
            return result;
        }
    }
    NOSUSPEND();
    TAILQ_FOREACH (o, &n->observers, link)
        o->mark(o, r);
    return 0;
}

static void announce_end(struct node *n, struct range r, int result)
{
    struct write_observer *o;

    TAILQ_FOREACH (o, &n->observers, link)
        if (o->written)
            o->written(o, r, result);
}

static void announce_flush(struct node *n)
{
    struct write_observer *o;
    NOSUSPEND();

    TAILQ_FOREACH (o, &n->observers, link)
        if (o->flushed)
            o->flushed(o);
}

void node_content_changed(struct node *n, struct range r)
{
    struct write_observer *o;

    TAILQ_FOREACH (o, &n->observers, link) {
        o->mark(o, r);
        if (o->changed)
            o->changed(o, r);
    }
}

void node_content_replaced(struct node *n)
{
    struct edge *e;

    if (n->size_bytes)
        node_content_changed(n, range_make(0, n->size_bytes));
    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (e->parent && (e->role & ROLE_PRIMARY))
            node_content_replaced(e->parent);
}

/* ---- reading ---- */

int edge_read(struct edge *e, struct range r, void *buf, unsigned flags)
{
    SHIELD();
    RANGE_HOLDER(held);
    struct node *n = request_enter(e);
    int result;

    if (!range_fits(r.start, r.length, e->user ? n->size_bytes : SIZE_BYTES_MAX)) {
        result = -EIO;
    } else if (!r.length) {
        result = 0;
    } else if (flags & REQ_PREFETCH) {
        r = range_round_out(r, n->limits.request_alignment);
        result = n->driver->prefetch ? n->driver->prefetch(n, r) : 0;
    } else {
        result =
            node_lock_range(n, &held, r, flags & REQ_SERIALISING ? RANGE_EXCLUSIVE : RANGE_SHARED);
        if (result == 0)
            result = is_aligned_for(n, r, buf) ? read_aligned(n, r, buf, flags)
                                               : read_bounced(n, r, buf, flags);
        rangelock_release(&held);
        if (result == 0) {
            n->counters.rd_ops++;
            n->counters.rd_bytes += r.length;
        }
    }
    request_leave(n);
    return result;
}

/* ---- changing ---- */

enum change { CHANGE_WRITE, CHANGE_ZEROES, CHANGE_DISCARD };

/* May the edge do it, and there? */
static int check_change(const struct edge *e, const struct node *n, struct range r, unsigned flags)
{
    unsigned enough = PERM_WRITE | (flags & REQ_WRITE_UNCHANGED ? PERM_WRITE_UNCHANGED : 0);

    if (!range_fits(r.start, r.length, SIZE_BYTES_MAX))
        return -EIO;
    if (range_end(r) > n->size_bytes && !(e->perm & PERM_RESIZE))
        return -EIO;
    return n->read_only || !(e->perm & enough) ? -EPERM : 0;
}

static int discard_pieces(struct node *n, struct range r);

static int drive_change(struct node *n, enum change what, struct range r, const void *buf,
                        unsigned flags)
{
    switch (what) {
    case CHANGE_WRITE:
        return is_aligned_for(n, r, buf) ? write_aligned(n, r, buf, flags & n->write_flags)
                                         : write_bounced(n, r, buf, flags & n->write_flags);
    case CHANGE_ZEROES:
        return zeroes_any(n, r, flags);
    case CHANGE_DISCARD:
        return discard_pieces(n, r);
    }
    return -EINVAL;
}

/* A write beyond the end: the node grows just before it is marked. */
static void grow(struct node *n, uint64_t end)
{
    struct write_observer *o;
    uint64_t from = n->size_bytes;

    n->size_bytes = align_up(end, BLOCK_SECTOR);
    TAILQ_FOREACH (o, &n->observers, link)
        if (o->resized)
            o->resized(o, from, n->size_bytes);
    node_resized(n, from);
}

static int change(struct edge *e, enum change what, struct range r, const void *buf, unsigned flags)
{
    RANGE_HOLDER(held);
    struct node *n = request_enter(e);
    int result = check_change(e, n, r, flags);
    bool observed = !(flags & REQ_WRITE_UNCHANGED) && !TAILQ_EMPTY(&n->observers);
    bool fua = flags & REQ_FUA;

    if (result < 0 || !r.length)
        goto out;
    if (what == CHANGE_WRITE && n->detect_zeroes && n->driver->write_zeroes &&
        isal_zero_detect((void *)(uintptr_t)buf, r.length) == 0) {
        what = CHANGE_ZEROES;
        flags &= ~(unsigned)REQ_REGISTERED_BUF;
        if (n->detect_zeroes == DETECT_ZEROES_UNMAP)
            flags |= REQ_MAY_UNMAP;
    }
    if (!n->discard_unmap)
        flags &= ~(unsigned)REQ_MAY_UNMAP;

    bool aligned = range_aligned(r, n->limits.request_alignment);
    result =
        node_lock_range(n, &held, range_round_out(r, n->limits.request_alignment),
                        aligned && !(flags & REQ_SERIALISING) ? RANGE_SHARED : RANGE_EXCLUSIVE);
    if (result == 0)
        result = check_change(e, n, r, flags); /* the node may have shrunk meanwhile */
    if (result < 0)
        goto out;
    if (range_end(r) > n->size_bytes)
        grow(n, range_end(r));
    bool late = BROKEN(marked_after_data) || BROKEN(failed_write_not_marked);
    if (observed && !late)
        result = announce(n, r);
    if (result == 0) {
        result = drive_change(n, what, r, buf, flags);
        if (observed && late && (result == 0 || BROKEN(marked_after_data)))
            announce(n, r);
        n->write_generation++;
        if (observed)
            announce_end(n, r, result);
    }
    rangelock_release(&held);
    if (result < 0)
        goto out;

    if (what == CHANGE_DISCARD) {
        n->counters.unmap_ops++;
        n->counters.unmap_bytes += r.length;
    } else {
        n->counters.wr_ops++;
        n->counters.wr_bytes += r.length;
    }
    if (range_end(r) > n->counters.wr_highest_offset)
        n->counters.wr_highest_offset = range_end(r);
    if (fua) {
        unsigned native =
            what == CHANGE_ZEROES ? n->write_zeroes_flags & n->write_flags : n->write_flags;
        if (!(native & REQ_FUA))
            result = node_flush(n);
    }
out:
    request_leave(n);
    return result;
}

int edge_write(struct edge *e, struct range r, const void *buf, unsigned flags)
{
    SHIELD();

    return change(e, CHANGE_WRITE, r, buf, flags);
}

int edge_write_zeroes(struct edge *e, struct range r, unsigned flags)
{
    SHIELD();

    return change(e, CHANGE_ZEROES, r, NULL, flags);
}

/* Advice: ends that are not aligned, and what the driver cannot, stay as they are. */
static int discard_pieces(struct node *n, struct range r)
{
    uint64_t align = max_u64(n->limits.discard_alignment, n->limits.request_alignment);

    if (!n->driver->discard) /* another node than a moment ago */
        return 0;
    while (r.length) {
        struct range piece = next_liked_piece(r, align, n->limits.max_discard);
        int result = n->driver->discard(n, piece);

        if (result < 0 && result != -ENOTSUP)
            return result;
        r = rest_of(r, piece);
    }
    return 0;
}

int edge_discard(struct edge *e, struct range r)
{
    SHIELD();
    struct node *n = request_enter(e); /* holds it while its options are looked at */
    int result = 0;

    if (!range_fits(r.start, r.length, n->size_bytes))
        result = -EIO;
    else if (n->read_only)
        result = -EPERM;
    else if (n->discard_unmap && n->driver->discard)
        result = 1;
    r = range_round_in(r, n->limits.request_alignment);
    request_leave(n);
    if (result <= 0)
        return result;
    return r.length ? change(e, CHANGE_DISCARD, r, NULL, 0) : 0;
}

/* ---- flush ---- */

/* To a read-only node others may have written before we opened it, and that may be in the cache of
 * a file or of a server: there it is flushed, once. Formats and filters above it have nothing. */
static bool never_flushed(const struct node *n)
{
    const struct edge *e;

    if (TAILQ_EMPTY(&n->children))
        return n->driver->flush && !n->cache_no_flush &&
               n->flushed_generation < n->write_generation;
    TAILQ_FOREACH (e, &n->children, in_children)
        if (never_flushed(e->node))
            return true;
    return false;
}

static int flush_read_only_child(struct edge *e)
{
    if (!never_flushed(e->node) || BROKEN(backing_not_flushed))
        return 0;
    struct node *n = request_enter(e);
    int result = node_flush(n);
    request_leave(n);
    return result;
}

int node_flush(struct node *n)
{
    LOCKED(&n->flush_lock);
    uint64_t generation = n->write_generation;
    struct edge *e, *primary = node_primary(n);
    bool has_own = !n->read_only || !primary;
    int result = 0;

    if (primary && has_own)
        node_debug_event(primary->node, DEBUG_flush_to_os);
    if (n->driver->flush_to_os && has_own)
        result = n->driver->flush_to_os(n);
    if (has_own && result == 0 && !n->cache_no_flush && n->flushed_generation < generation) {
        if (primary)
            node_debug_event(primary->node, DEBUG_flush_to_disk);
        if (n->driver->flush)
            result = n->driver->flush(n);
    }
    TAILQ_FOREACH (e, &n->children, in_children) {
        if (result < 0)
            break;
        if (n->driver->flushes_primary_only && !(e->role & ROLE_PRIMARY))
            continue;
        /* Also one that nobody writes to any more: what was written may still be in its cache. (A
         * node that closes leaves that to who has the child next.) */
        if ((e->perm & (PERM_WRITE | PERM_WRITE_UNCHANGED)) || (!e->node->read_only && !n->closing))
            result = edge_flush(e);
        else if (!n->closing)
            result = flush_read_only_child(e);
    }
    if (has_own && result == 0 && !n->cache_no_flush && n->flushed_generation < generation)
        n->flushed_generation = generation;
    return result;
}

bool node_has_to_finish(const struct node *n)
{
    for (const struct edge *e; n; n = (e = node_primary(n)) ? e->node : NULL)
        if (n->driver->finish)
            return true;
    return false;
}

int node_finish(struct node *n)
{
    SHIELD();
    int r = n->read_only ? 0 : node_flush(n);

    for (const struct edge *e; r == 0 && n; n = (e = node_primary(n)) ? e->node : NULL)
        if (n->driver->finish && !n->read_only)
            r = n->driver->finish(n);
    return r;
}

void node_has_lost(struct node *n)
{
    n->lost_at = ++n->graph->losses;
}

uint64_t graph_losses(const struct graph *g)
{
    return g->losses;
}

static bool lost_since(const struct node *n, uint64_t then, bool flushed_only)
{
    const struct edge *e;

    if (n->graph->losses == then)
        return false;
    if (n->lost_at > then)
        return true;
    TAILQ_FOREACH (e, &n->children, in_children)
        if (!(flushed_only && n->driver->flushes_primary_only && !(e->role & ROLE_PRIMARY)) &&
            lost_since(e->node, then, flushed_only))
            return true;
    return false;
}

bool node_lost_since(const struct node *n, uint64_t then)
{
    return lost_since(n, then, false);
}

bool node_flush_lost_since(const struct node *n, uint64_t then)
{
    return lost_since(n, then, true);
}

int node_flush_tree(struct node *n)
{
    struct edge *e;
    int result = 0;

    if (TAILQ_EMPTY(&n->children))
        return n->driver->flush && !n->cache_no_flush ? n->driver->flush(n) : 0;
    if (!n->read_only)
        result = node_flush(n);
    TAILQ_FOREACH (e, &n->children, in_children) {
        if (result < 0)
            break;
        result = node_flush_tree(e->node);
    }
    return result;
}

int edge_flush(struct edge *e)
{
    SHIELD();
    struct node *n = request_enter(e);
    int result = node_flush(n);

    if (result == 0) {
        n->counters.flush_ops++;
        if (!n->read_only)
            announce_flush(n);
    }
    request_leave(n);
    return result;
}

/* ---- size ---- */

void node_resized(struct node *n, uint64_t from)
{
    struct edge *e;

    TAILQ_FOREACH (e, &n->parents, in_parents) {
        struct node *p = e->parent;

        if (e->user) {
            if (e->user->ops->resized)
                e->user->ops->resized(e->user, e);
            continue;
        }
        /* A parent that changes its own size right now tells it itself. */
        if (!(e->role & ROLE_PRIMARY) || p->truncating)
            continue;
        uint64_t old = p->size_bytes, size = old;
        if (p->driver->measure_length)
            size = align_up(p->driver->measure_length(p), BLOCK_SECTOR);
        else if (p->driver->is_filter && (e->role & ROLE_FILTERED))
            size = n->size_bytes;
        if (size == old)
            continue;
        struct write_observer *o;
        p->size_bytes = size;
        TAILQ_FOREACH (o, &p->observers, link)
            if (o->resized)
                o->resized(o, old, size);
        node_resized(p, old);
    }
}

static int truncate_driver(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct edge *filtered = node_filtered(n);

    if (n->driver->truncate)
        return n->driver->truncate(n, size_bytes, exact, err);
    if (filtered)
        return edge_truncate(filtered, size_bytes, exact, err);
    return error_set(err, ENOTSUP, "Image format driver does not support resize");
}

/* With every other request of the node out of the way. */
static int truncate_alone(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    uint64_t from = n->size_bytes, to = align_up(size_bytes, BLOCK_SECTOR);
    struct write_observer *o, *undo;
    int result = 0;

    TAILQ_FOREACH (o, &n->observers, link) {
        if (o->resizing && (result = o->resizing(o, from, to, err)) < 0) {
            TAILQ_FOREACH (undo, &n->observers, link) {
                if (undo == o)
                    break;
                if (undo->resizing && undo->resized)
                    undo->resized(undo, from, from);
            }
            return result;
        }
    }
    n->truncating = true;
    result = truncate_driver(n, size_bytes, exact, err);
    n->write_generation++;
    if (result == 0) {
        if (n->driver->measure_length)
            to = align_up(n->driver->measure_length(n), BLOCK_SECTOR);
        n->size_bytes = to;
    } else if (to < from && result != -ENOTSUP && result != -EINVAL) {
        /* Of what was to be cut off a part may be gone. */
        node_content_changed(n, range_between(to, from));
    }
    TAILQ_FOREACH (o, &n->observers, link)
        if (o->resized && (result == 0 || o->resizing))
            o->resized(o, from, result == 0 ? to : from);
    n->truncating = false; /* observers have seen that it was no reopen */
    if (result == 0 && from != to)
        node_resized(n, from);
    return result;
}

int edge_truncate(struct edge *e, uint64_t size_bytes, bool exact, struct error *err)
{
    SHIELD();
    RANGE_HOLDER(held);
    struct node *n = request_enter(e);
    int result;

    if (size_bytes > INT64_MAX) {
        result = error_set(err, EINVAL, "Image size cannot be negative");
    } else if (size_bytes > SIZE_BYTES_MAX) {
        result = error_set(err, EINVAL, "offset(%lld) exceeds maximum(%llu)", (long long)size_bytes,
                           (unsigned long long)SIZE_BYTES_MAX);
    } else if (n->read_only) {
        result = error_set(err, EACCES, "Image is read-only");
    } else if (!(e->perm & PERM_RESIZE)) {
        result = error_set(err, EPERM, "Node '%s' may not be resized by this user", n->name);
    } else {
        result = node_lock_range(n, &held, range_make(0, INT64_MAX), RANGE_EXCLUSIVE);
        if (result == 0)
            result = truncate_alone(n, size_bytes, exact, err);
        rangelock_release(&held);
    }
    request_leave(n);
    return result;
}
