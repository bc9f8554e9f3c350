/* Taking content away: discard, and zeroes that cost no data.
 *
 * Both change entries in memory, under the same hold on guest clusters as allocation, and give
 * clusters back by way of step 5 (qcow2.h): nothing is free before the disk has forgotten it. */
#include "base/broken.h"
#include "block/qcow2/qcow2.h"

enum { FREED_CLUSTERS_MAX = 1 << 16, FREED_RUNS_MAX = 4096, HOLD_BYTES = 1 << 30 };

/* What a cluster's entry becomes; false: it stays. */
typedef bool new_entry_fn(struct qcow2 *q, uint64_t old, uint64_t *entry, bool *drop, int flags);

enum { DISCARD_FULL = 1, ZERO_UNMAP = 2 };

static bool discarded(struct qcow2 *q, uint64_t old, uint64_t *entry, bool *drop, int flags)
{
    bool allocated = (old & ENTRY_COMPRESSED) || (old & ENTRY_OFFSET_MASK);
    *drop = true;
    if (flags & DISCARD_FULL)
        *entry = 0;
    else if (q->node->backing || allocated)
        *entry = q->header.version >= 3 ? ENTRY_ZERO : 0;
    else
        return false;
    return *entry != old;
}

static bool zeroed(struct qcow2 *q, uint64_t old, uint64_t *entry, bool *drop, int flags)
{
    bool allocated = old & ENTRY_OFFSET_MASK;
    *drop = (old & ENTRY_COMPRESSED) || ((flags & ZERO_UNMAP) && allocated);
    *entry = *drop ? ENTRY_ZERO : old | ENTRY_ZERO;
    return *entry != old;
}

/* For a cluster that has been seen to be empty: if others have written it since, it stays. */
static bool zeroed_unless_data(struct qcow2 *q, uint64_t old, uint64_t *entry, bool *drop,
                               int flags)
{
    bool data = (old & ENTRY_COMPRESSED) || ((old & ENTRY_OFFSET_MASK) && !(old & ENTRY_ZERO));
    return !data && zeroed(q, old, entry, drop, flags);
}

static bool needs_no_table(struct qcow2 *q, new_entry_fn *fn, int flags)
{
    uint64_t entry;
    bool drop;
    return !fn(q, 0, &entry, &drop, flags);
}

/* For all clusters of R (whole ones), which the caller holds. */
static int change_entries(struct qcow2 *q, struct range r, new_entry_fn *fn, int flags,
                          enum free_type type)
{
    while (r.length) {
        struct mapping m;
        int ret = map_lookup(q, r.start, r.length, &m);
        if (ret < 0)
            return ret;
        if (m.type == MAP_UNALLOCATED && needs_no_table(q, fn, flags)) {
            r.start += m.length;
            r.length -= m.length;
            continue;
        }
        struct cache_slot *s;
        uint32_t i;
        ret = map_writable_slice(q, r.start, &s, &i);
        if (ret < 0)
            return ret;
        for (; r.length && i < q->slice_entries; i++) {
            uint64_t old = entry_load(s->data, i), entry;
            bool drop;
            if (fn(q, old, &entry, &drop, flags)) {
                map_set(q, s, i, entry);
                if (drop)
                    map_free_entry(q, old, type);
            }
            r.start += q->cluster_size;
            r.length -= q->cluster_size;
        }
        if (q->freed_clusters > FREED_CLUSTERS_MAX || q->freed.n > FREED_RUNS_MAX) {
            ret = qcow2_writeback(q);
            if (ret < 0)
                return ret;
        }
    }
    return 0;
}

static int change_range(struct qcow2 *q, struct range r, new_entry_fn *fn, int flags,
                        enum free_type type)
{
    while (r.length) {
        if (qcow2_unusable(q))
            return -ENOMEDIUM;
        struct range part = range_make(r.start, min_u64(r.length, HOLD_BYTES));
        RANGE_HOLDER(holder);
        int ret = rangelock_take(&q->allocations, &holder, part, RANGE_EXCLUSIVE);
        if (ret == 0)
            ret = change_entries(q, part, fn, flags, type);
        if (ret < 0)
            return ret;
        r.start += part.length;
        r.length -= part.length;
    }
    return 0;
}

int qcow2_discard_clusters(struct qcow2 *q, struct range r, enum free_type type, bool full)
{
    return change_range(q, r, discarded, full ? DISCARD_FULL : 0, type);
}

int qcow2_zero_clusters(struct qcow2 *q, struct range r, bool unmap)
{
    return change_range(q, r, zeroed, unmap ? ZERO_UNMAP : 0, FREE_REQUEST);
}

/* The whole clusters of R; its end counts as whole where the image ends. */
static struct range whole_clusters(struct qcow2 *q, struct range r)
{
    uint64_t end = range_end(r) >= q->node->size_bytes ? align_up(range_end(r), q->cluster_size)
                                                       : align_down(range_end(r), q->cluster_size);
    return range_between(align_up(r.start, q->cluster_size), end);
}

int qcow2_discard(struct node *n, struct range r)
{
    struct qcow2 *q = n->state;
    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    /* Version 2 cannot say "zero": what lies below would come back. */
    if (q->header.version < 3 && n->backing)
        return -ENOTSUP;
    r = whole_clusters(q, r);
    return r.length ? qcow2_discard_clusters(q, r, FREE_REQUEST, false) : 0;
}

/* All of R reads as zeroes for a reason that the tables tell. */
static int all_zero(struct qcow2 *q, struct range r, bool *ret)
{
    *ret = true;
    if (range_end(r) > q->node->size_bytes)
        r = range_between(r.start, q->node->size_bytes);
    while (r.length && *ret) {
        struct mapping m;
        int res = map_lookup(q, r.start, r.length, &m);
        if (res < 0)
            return res;
        *ret = m.type == MAP_ZERO || (m.type == MAP_UNALLOCATED && !q->node->backing);
        r.start += m.length;
        r.length -= m.length;
    }
    return 0;
}

/* A part of a cluster: it is zero already, or -ENOTSUP: it must be written. Its cluster then says
 * "zero", as QEMU's does, also where nothing is behind the image now: a backup's target gets
 * something behind it later. */
static int zero_part(struct qcow2 *q, struct range r)
{
    struct range cluster = range_between(align_down(r.start, q->cluster_size),
                                         align_up(range_end(r), q->cluster_size));
    bool zero;

    int ret = r.length ? all_zero(q, r, &zero) : 0;
    if (ret < 0 || !r.length)
        return ret;
    if (zero && !BROKEN(part_left_unallocated))
        ret = change_range(q, cluster, zeroed_unless_data, 0, FREE_REQUEST);
    if (ret == 0)
        ret = all_zero(q, r, &zero); /* others may have written another part of it meanwhile */
    return ret < 0 ? ret : zero ? 0 : -ENOTSUP;
}

/* Version 2 cannot say "zero". What is not allocated is zero only if nothing will ever be behind
 * it: a backup's target names in its header what it is opened without. */
static int zero_old(struct qcow2 *q, struct range r)
{
    bool zero;

    if (q->header.backing_file && !BROKEN(below_forgotten))
        return -ENOTSUP;
    int ret = all_zero(q, r, &zero);
    return ret < 0 ? ret : zero ? 0 : -ENOTSUP;
}

int qcow2_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct qcow2 *q = n->state;
    struct range inner = whole_clusters(q, r);

    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    if (q->header.version < 3)
        return zero_old(q, r);
    if (!inner.length)
        return zero_part(q, r);
    int ret = zero_part(q, range_between(r.start, inner.start));
    if (ret == 0)
        ret = zero_part(q, range_between(min_u64(range_end(inner), range_end(r)), range_end(r)));
    return ret < 0 ? ret : qcow2_zero_clusters(q, inner, flags & REQ_MAY_UNMAP);
}
