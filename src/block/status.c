/* Block status: what an image holds where, and which layer of a chain says so.
 *
 * node_status answers for one layer (filters and raw pass the question down); the walk
 * from layer to layer stops at the first that decides. Beyond the end of a shorter
 * backing image there are zeroes, and they count as that image's. */

#include "block/internal.h"

static bool backing_is_short(const struct node *n, uint64_t start)
{
    return start >= n->backing->node->size_bytes;
}

/* What a driver says for R, which is aligned and inside the node. */
static int ask_driver(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct edge *filtered = node_filtered(n);
    int result;

    *ret = (struct block_status){.length = r.length};
    if (n->driver->status) {
        result = n->driver->status(n, want_zero, r, ret);
        if (result == 0 && !ret->length)
            result = -EIO; /* a driver must get on */
        return result;
    }
    if (filtered) {
        ret->flags = STATUS_RAW | STATUS_OFFSET_VALID;
        ret->map = r.start;
        ret->file = filtered->node;
        return 0;
    }
    ret->flags = STATUS_DATA | STATUS_ALLOCATED;
    if (n->driver->protocol) {
        ret->flags |= STATUS_OFFSET_VALID;
        ret->map = r.start;
        ret->file = n;
    }
    return 0;
}

/* The same of a child, which stays where it is meanwhile. */
static int ask_child(struct node *n, struct node *child, bool want_zero, struct range r,
                     struct block_status *ret)
{
    struct edge *e;
    int result;

    TAILQ_FOREACH (e, &n->children, in_children)
        if (e->node == child)
            break;
    if (!e)
        return -EIO;
    child = request_enter(e);
    result = node_status(child, want_zero, r, ret);
    request_leave(child);
    return result;
}

/* The file below may know that what the format takes for data are zeroes. */
static void look_below(struct node *n, struct block_status *st)
{
    struct block_status below;

    if (ask_child(n, st->file, true, range_make(st->map, st->length), &below) < 0)
        return; /* only a hint would be lost */
    if ((below.flags & STATUS_EOF) && (!below.length || (below.flags & STATUS_ZERO))) {
        st->flags |= STATUS_ZERO; /* beyond the file's end */
        return;
    }
    if (below.length) {
        st->length = min_u64(st->length, below.length);
        st->flags |= below.flags & STATUS_ZERO;
    }
}

/* The first run of R in this layer. length 0 and STATUS_EOF: R begins at or beyond the end. */
int node_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct range whole;
    int result;

    *ret = (struct block_status){0};
    if (r.start >= n->size_bytes) {
        ret->flags = STATUS_EOF;
        return 0;
    }
    r.length = min_u64(r.length, n->size_bytes - r.start);
    if (!r.length)
        return 0;

    whole = range_round_out(r, n->limits.request_alignment);
    result = ask_driver(n, want_zero, whole, ret);
    if (result < 0)
        return result;
    /* Back from the aligned range to the asked one. */
    uint64_t before = r.start - whole.start;
    if (ret->length <= before)
        return -EIO;
    ret->length = min_u64(ret->length - before, r.length);
    if (ret->flags & STATUS_OFFSET_VALID)
        ret->map += before;

    if (ret->flags & STATUS_RAW) {
        struct node *file = ret->file;
        uint64_t map = ret->map, length = ret->length;
        result = ask_child(n, file, want_zero, range_make(map, length), ret);
        if (result < 0)
            return result;
        if (!ret->length) {
            /* This layer is longer than what it stands on. */
            *ret = (struct block_status){.flags = STATUS_ZERO | STATUS_ALLOCATED, .length = length};
        }
        ret->flags &= ~(unsigned)STATUS_EOF;
    } else {
        if (ret->flags & (STATUS_DATA | STATUS_ZERO))
            ret->flags |= STATUS_ALLOCATED;
        else if (n->driver->supports_backing &&
                 (!n->backing || (want_zero && backing_is_short(n, r.start))))
            ret->flags |= STATUS_ZERO;
        if ((ret->flags & STATUS_RECURSE) && want_zero && ret->file && ret->file != n &&
            (ret->flags & STATUS_DATA) && (ret->flags & STATUS_OFFSET_VALID) &&
            !(ret->flags & STATUS_ZERO))
            look_below(n, ret);
        ret->flags &= ~(unsigned)STATUS_RECURSE;
    }
    if (r.start + ret->length == n->size_bytes)
        ret->flags |= STATUS_EOF;
    return 0;
}

/* N is pinned by who asks; the layers below are pinned while they are asked. DEPTH is N's, from 1.
 *
 * Where N is transparent its range is held while the layers below are asked: in a fleecing image a
 * cluster is saved before the guest changes it below, and the answer must not be that N has
 * nothing and that below there are the guest's new zeroes. */
static int status_above(struct node *n, struct node *base, bool include_base, bool want_zero,
                        struct range r, unsigned depth, struct block_status *ret)
{
    struct block_status below;
    RANGE_HOLDER(held);
    struct edge *e;
    bool eof;
    int result;

    if (node_filtered_or_backing(n)) {
        result = node_lock_range(n, &held, r, RANGE_SHARED);
        if (result < 0)
            return result;
    }
    result = node_status(n, want_zero, r, ret);
    if (result < 0)
        return result;
    ret->depth = depth;
    if (!ret->length || (ret->flags & STATUS_ALLOCATED) || n == base)
        return 0;
    e = node_filtered_or_backing(n);
    if (!e || (!include_base && e->node == base))
        return 0;

    eof = ret->flags & STATUS_EOF;
    r.length = ret->length;
    struct node *child = request_enter(e);
    result = status_above(child, base, include_base, want_zero, r, depth + 1, &below);
    request_leave(child);
    if (result < 0)
        return result;
    if (!below.length)
        below = (struct block_status){.flags = STATUS_ZERO | STATUS_ALLOCATED,
                                      .length = r.length,
                                      .file = child,
                                      .depth = depth + 1};
    below.flags &= ~(unsigned)STATUS_EOF; /* of a layer that may be shorter */
    if (eof && below.length == r.length)
        below.flags |= STATUS_EOF;
    *ret = below;
    return 0;
}

static bool status_range_ok(const struct node *n, struct range r)
{
    return r.length && range_fits(r.start, r.length, n->size_bytes);
}

static int above(struct node *n, struct node *base, bool include_base, bool want_zero,
                 struct range r, struct block_status *ret)
{
    if (!include_base && n == base) {
        *ret = (struct block_status){.length = r.length};
        return 0;
    }
    return status_above(n, base, include_base, want_zero, r, 1, ret);
}

int edge_status_above(struct edge *e, struct node *base, bool want_zero, struct range r,
                      struct block_status *ret)
{
    SHIELD();
    struct node *n = request_enter(e);
    int result = -EIO;

    if (status_range_ok(n, r))
        result = above(n, base, false, want_zero, r, ret);
    if (result == 0)
        ret->depth = ret->flags & STATUS_ALLOCATED ? ret->depth - 1 : 0;
    request_leave(n);
    return result;
}

int edge_allocated_above(struct edge *e, struct node *base, bool include_base, struct range r,
                         uint64_t *length)
{
    SHIELD();
    struct node *n = request_enter(e);
    struct block_status st;
    int result = -EIO;

    if (status_range_ok(n, r))
        result = above(n, base, include_base && base, false, r, &st);
    request_leave(n);
    if (result < 0)
        return result;
    *length = st.length;
    return st.flags & STATUS_ALLOCATED ? (int)st.depth : 0;
}
