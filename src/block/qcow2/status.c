/* What is where. Clusters that are allocated may have holes in the file below them: of images that
 * were made with all their metadata, or written in small pieces. Whether to look there is decided
 * once, as QEMU does: when the file has clearly fewer blocks than clusters are in use. */
#include "block/qcow2/qcow2.h"

static uint64_t allocated_below(const struct qcow2 *q)
{
    struct node *n = q->file->node;
    while (!n->driver->allocated_bytes && n->file)
        n = n->file->node;
    return n->driver->allocated_bytes ? n->driver->allocated_bytes(n) : UINT64_MAX;
}

static bool detect_holes(struct qcow2 *q)
{
    uint64_t allocated = allocated_below(q), used = 0;
    if (allocated == UINT64_MAX)
        return false;
    uint64_t have = allocated >> q->cluster_bits, end = clusters_of(q, file_size(q));
    uint64_t threshold = max_u64(have * 10 / 9, have + 2);
    for (uint64_t i = 0; i < end && used < threshold; i++) {
        uint16_t count;
        i = refcount_skip_unknown(q, i, end);
        if (i == end)
            break;
        if (refcount_get(q, i, &count) < 0)
            return false;
        used += count != 0;
    }
    return used >= threshold;
}

int qcow2_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct qcow2 *q = n->state;
    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    if (want_zero && !q->holes_known) {
        q->has_holes = detect_holes(q);
        q->holes_known = true;
    }
    struct mapping m, next;
    int res = map_lookup(q, r.start, r.length, &m);
    if (res < 0)
        return res;
    /* Across slices, so that a large image is not told in small pieces. */
    while (m.length < r.length) {
        if (map_lookup(q, r.start + m.length, r.length - m.length, &next) < 0 ||
            next.type != m.type || next.host != (m.host ? m.host + m.length : 0))
            break;
        m.length += next.length;
    }

    *ret = (struct block_status){.length = m.length};
    if (m.host) {
        ret->flags |= STATUS_OFFSET_VALID;
        ret->map = m.host;
        ret->file = q->file->node;
    }
    switch (m.type) {
    case MAP_UNALLOCATED:
        break;
    case MAP_ZERO:
        ret->flags |= STATUS_ZERO | STATUS_ALLOCATED;
        break;
    case MAP_COMPRESSED:
        ret->flags |= STATUS_COMPRESSED | STATUS_DATA | STATUS_ALLOCATED;
        break;
    case MAP_NORMAL:
        ret->flags |= STATUS_DATA | STATUS_ALLOCATED;
        if (want_zero && q->has_holes)
            ret->flags |= STATUS_RECURSE;
        break;
    }
    return 0;
}
