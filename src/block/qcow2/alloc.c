/* Writing where no cluster of our own is yet: take clusters, fill them, then make the entries.
 *
 *     hold the guest clusters --> look again --> count host clusters --> write head, data, tail
 *          --> set the entries in the cached L2 slice --> free what they named before
 *
 * The entries are made after the data has been written, so nobody reads what is not there; that
 * they reach the disk after the refcounts and after the data is writeback.c's order. Two writes
 * to one cluster wait for each other here; any others go on side by side, also while one of them
 * writes its data.
 *
 * What the write does not cover of its first and last cluster keeps its content: from the
 * backing image, from a cluster shared with a snapshot, inflated from a compressed one, or zero.
 * Clusters at the end of a file that has never been that long are zero already, and then
 * only the data is written. Otherwise edges and data go out in one write if that is small. */
#include "block/qcow2/qcow2.h"

enum { MERGED_BYTES = 256 << 10, ALLOC_BYTES = 4 << 20 };

/* One run of clusters that is being given a place. */
struct placing {
    struct range guest; /* whole clusters */
    uint64_t host;
    bool reused; /* a zero cluster that had a place all along */
    bool fresh;
};

/* Do the bytes [from, to) of the guest read as zeroes for a reason that the table tells? */
static bool edge_is_zero(struct qcow2 *q, uint64_t from, uint64_t to)
{
    struct mapping m;
    if (from >= to || from >= q->node->size_bytes)
        return true;
    if (map_lookup(q, from, to - from, &m) < 0)
        return false;
    return m.type == MAP_ZERO || (m.type == MAP_UNALLOCATED && !q->node->backing);
}

static int write_filled(struct qcow2 *q, const struct placing *p, struct range r,
                        const uint8_t *buf)
{
    uint64_t head = r.start - p->guest.start;
    uint64_t tail = range_end(p->guest) - range_end(r);
    uint64_t end = range_end(r);

    if (p->fresh && edge_is_zero(q, p->guest.start, r.start) &&
        edge_is_zero(q, end, range_end(p->guest))) {
        file_event(q, DEBUG_write_aio);
        return file_write(q, p->host + head, buf, r.length);
    }
    if (!head && !tail) {
        file_event(q, DEBUG_write_aio);
        return file_write(q, p->host, buf, r.length);
    }

    if (p->guest.length <= MERGED_BYTES) {
        CLEANUP(memory_freep) uint8_t *all = block_buffer(p->guest.length);
        if (!all)
            return -ENOMEM;
        file_event(q, DEBUG_cow_read);
        int ret = head ? qcow2_read_range(q, range_make(p->guest.start, head), all) : 0;
        if (ret == 0 && tail)
            ret = qcow2_read_range(q, range_make(end, tail), all + head + r.length);
        if (ret < 0)
            return ret;
        memcpy(all + head, buf, r.length);
        file_event(q, DEBUG_write_aio);
        return file_write(q, p->host, all, p->guest.length);
    }

    /* Large: the edges by themselves, in pieces. */
    CLEANUP(memory_freep) uint8_t *edge = block_buffer(MERGED_BYTES);
    if (!edge)
        return -ENOMEM;
    struct range edges[2] = {range_make(p->guest.start, head), range_make(end, tail)};
    for (int i = 0; i < 2; i++) {
        uint64_t place = p->host + (edges[i].start - p->guest.start);
        if (!edges[i].length)
            continue;
        if (edge_is_zero(q, edges[i].start, range_end(edges[i]))) {
            int ret = p->fresh ? 0 : file_write_zeroes(q, place, edges[i].length);
            if (ret < 0)
                return ret;
            continue;
        }
        for (uint64_t at = 0; at < edges[i].length; at += MERGED_BYTES) {
            uint64_t n = min_u64(MERGED_BYTES, edges[i].length - at);
            file_event(q, DEBUG_cow_read);
            int ret = qcow2_read_range(q, range_make(edges[i].start + at, n), edge);
            file_event(q, DEBUG_cow_write);
            if (ret == 0)
                ret = file_write(q, place + at, edge, n);
            if (ret < 0)
                return ret;
        }
    }
    file_event(q, DEBUG_write_aio);
    return file_write(q, p->host + head, buf, r.length);
}

/* Entries for the run; the slice may have to be read again. Holds the guest clusters, so the old
 * entries are those that were looked at. *LINKED bytes of the run have theirs, also after an error.
 */
static int link_run(struct qcow2 *q, const struct placing *p, uint64_t *linked)
{
    uint64_t at;
    for (at = 0; at < p->guest.length; *linked = at) {
        struct cache_slot *s;
        uint32_t i;
        int r = map_writable_slice(q, p->guest.start + at, &s, &i);
        if (r < 0)
            return r;
        for (; at < p->guest.length && i < q->slice_entries; at += q->cluster_size, i++) {
            uint64_t old = entry_load(s->data, i);
            map_set(q, s, i, (p->host + at) | ENTRY_COPIED);
            if (!p->reused)
                map_free_entry(q, old, FREE_NEVER);
        }
    }
    return 0;
}

/* How far, from the first cluster of R on, clusters need a new place; or the first of them
 * has one that is not used yet (zero, allocated, our own): then those that follow on in the file.
 */
static int find_run(struct qcow2 *q, struct range r, struct placing *p, uint64_t *clusters)
{
    uint64_t start = align_down(r.start, q->cluster_size);
    uint64_t end = min_u64(align_up(range_end(r), q->cluster_size), start + ALLOC_BYTES);
    uint64_t at = start;
    p->reused = false;
    while (at < end) {
        struct mapping m;
        int ret = map_lookup(q, at, end - at, &m);
        if (ret < 0)
            return ret;
        if (m.type == MAP_NORMAL && m.copied)
            break;
        bool reusable = m.type == MAP_ZERO && m.host && m.copied;
        if (reusable) {
            if (at == start) {
                p->reused = true;
                p->host = m.host;
                at += m.length;
            }
            break;
        }
        at += m.length;
    }
    *clusters = (at - start) >> q->cluster_bits;
    return 0;
}

int qcow2_write_allocating(struct qcow2 *q, struct range r, const uint8_t *buf, uint64_t *done)
{
    struct range hold = range_round_out(r, q->cluster_size);
    uint64_t limit = max_u64(ALLOC_BYTES, q->cluster_size);
    if (hold.length > limit)
        hold.length = limit;
    *done = 0;

    RANGE_HOLDER(holder);
    int ret = rangelock_take(&q->allocations, &holder, hold, RANGE_EXCLUSIVE);
    if (ret < 0)
        return ret;

    struct placing p = {.guest.start = hold.start};
    uint64_t clusters;
    r.length = min_u64(range_end(r), range_end(hold)) - r.start;
    ret = find_run(q, r, &p, &clusters);
    if (ret < 0 || !clusters)
        return ret; /* nothing: another write has given it a place meanwhile */

    if (p.reused) {
        ret = qcow2_check_overlap(q, p.host, clusters << q->cluster_bits, META_NONE);
        if (ret < 0)
            return ret;
    } else {
        /* The table first: what can fail without a trace in the image should fail before. */
        struct cache_slot *s;
        uint32_t i;
        ret = map_writable_slice(q, hold.start, &s, &i);
        if (ret == 0)
            ret = refcount_alloc(q, clusters, &p.host, &clusters, &p.fresh);
        if (ret < 0)
            return ret;
    }
    p.guest.length = clusters << q->cluster_bits;
    r.length = min_u64(range_end(r), range_end(p.guest)) - r.start;

    uint64_t linked = 0;
    ret = write_filled(q, &p, r, buf);
    if (ret == 0)
        ret = link_run(q, &p, &linked);
    if (ret < 0) {
        if (!p.reused && !q->unusable)
            refcount_unalloc(q, p.host + linked, clusters - (linked >> q->cluster_bits));
        return ret;
    }
    *done = r.length;
    return 0;
}
