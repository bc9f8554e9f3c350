/* Growing and shrinking.
 *
 * The header is turned to a longer L1 table, and to the new size, in one write, after the new table
 * and its refcounts are durable. A shrink first stores the smaller size, then gives clusters
 * back: a cut in between leaves entries beyond the end, which the next growth finds and drops.
 * block/ runs this while no other request is inside; a flush may come all the same. */
#include "block/qcow2/qcow2.h"

static uint64_t l1_needed(const struct qcow2 *q, uint64_t size)
{
    unsigned bits = q->cluster_bits + q->l2_bits;
    return (size >> bits) + ((size & (((uint64_t)1 << bits) - 1)) != 0);
}

/* A longer L1 table somewhere else. Holds l1_lock, so no entry changes. */
static int grow_l1(struct qcow2 *q, uint64_t n, uint64_t size, struct error *err)
{
    LOCKED(&q->l1_lock);
    if (n > QCOW2_MAX_L1_BYTES / 8)
        return error_set_errno(err, EFBIG, "Failed to grow the L1 table");

    struct table bigger = {0};
    uint64_t offset = 0, bytes = align_up(n * 8, SECTOR);
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(bytes);
    int r = buf ? table_alloc(&bigger, (uint32_t)n) : -ENOMEM;
    file_event(q, DEBUG_l1_grow_alloc_table);
    if (r == 0)
        r = refcount_alloc_bytes(q, n * 8, &offset);
    if (r == 0)
        r = qcow2_sync(q); /* the tables that it will name, and its own refcounts */
    if (r == 0) {
        memcpy(bigger.entries, q->l1.entries, q->l1.n * sizeof *bigger.entries);
        memset(buf, 0, bytes);
        for (uint32_t i = 0; i < n; i++)
            entry_store(buf, i, bigger.entries[i]);
        file_event(q, DEBUG_l1_grow_write_table);
        r = file_write(q, offset, buf, bytes);
    }
    if (r == 0)
        r = file_flush(q);
    struct qcow2_header old = q->header;
    if (r == 0) {
        q->header.l1_offset = offset;
        q->header.l1_size = (uint32_t)n;
        q->header.size_bytes = size;
        file_event(q, DEBUG_l1_grow_activate_table);
        r = qcow2_write_header(q);
        if (r == 0)
            r = file_flush(q);
        if (r < 0) {
            q->header.l1_offset = old.l1_offset;
            q->header.l1_size = old.l1_size;
            q->header.size_bytes = old.size_bytes;
            offset = 0; /* the disk may have the new one: it is leaked, never given away */
            qcow2_take_header_back(q);
        }
    }
    if (r < 0) {
        table_free(&bigger);
        if (offset && r != -ENOMEDIUM)
            refcount_unalloc(q, offset, clusters_of(q, n * 8));
        return error_set_errno(err, -r, "Failed to grow the L1 table");
    }
    uint64_t old_offset = q->l1.offset, old_bytes = (uint64_t)q->l1.n * 8;
    table_free(&q->l1);
    q->l1 = bigger;
    q->l1.offset = offset;
    if (old_bytes)
        qcow2_free_later(q, old_offset, old_bytes, FREE_OTHER);
    return 0;
}

static int write_size(struct qcow2 *q, uint64_t size, struct error *err)
{
    uint64_t old = q->header.size_bytes;
    q->header.size_bytes = size;
    int r = qcow2_write_header(q);
    if (r == 0)
        r = file_flush(q);
    if (r < 0) {
        q->header.size_bytes = old;
        qcow2_take_header_back(q);
        return error_set_errno(err, -r, "Failed to update the image size");
    }
    return 0;
}

/* L2 tables that speak only for what is cut off. */
static int drop_l2_tables(struct qcow2 *q, uint64_t first)
{
    LOCKED(&q->l1_lock);
    for (uint64_t i = first; i < q->l1.n; i++) {
        uint64_t offset = q->l1.entries[i] & ENTRY_OFFSET_MASK;
        if (!offset)
            continue;
        if (into_cluster(q, offset))
            return -EIO;
        table_set(&q->l1, (uint32_t)i, 0);
        cache_forget(&q->l2_cache, offset, q->cluster_size);
        metadata_remove(q, offset);
        qcow2_free_later(q, offset, q->cluster_size, FREE_OTHER);
    }
    return 0;
}

static int cut_off(struct qcow2 *q, uint64_t from, uint64_t size, struct error *err)
{
    uint64_t first = align_up(size, q->cluster_size), end = align_up(from, q->cluster_size);
    int r = qcow2_discard_clusters(q, range_between(first, end), FREE_ALWAYS, true);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to discard cropped clusters");
    r = drop_l2_tables(q, l1_needed(q, size));
    if (r < 0)
        return error_set_errno(err, -r, "Failed to reduce the number of L2 tables");
    /* Twice: the second round writes the refcounts that the first has lowered. */
    r = qcow2_sync(q);
    if (r == 0)
        r = qcow2_writeback(q);
    return r < 0 ? error_set_errno(err, -r, "Failed to discard cropped clusters") : 0;
}

static int shrink(struct qcow2 *q, uint64_t from, uint64_t size, struct error *err)
{
    int r = write_size(q, size, err);
    if (r < 0)
        return r;
    r = cut_off(q, from, size, err);
    if (r < 0) { /* the guest still has all of it */
        q->header.size_bytes = from;
        qcow2_take_header_back(q);
        return r;
    }

    /* The end of the file, if nobody uses it. */
    uint64_t clusters = clusters_of(q, file_size(q)), n = min_u64(clusters, refcount_end(q));
    uint16_t count = 0;
    while (n && refcount_get(q, n - 1, &count) == 0 && !count)
        n--;
    if (n && n < clusters && count) {
        struct error ignored = ERROR_INIT;
        r = edge_truncate(q->file, n << q->cluster_bits, false, &ignored);
        if (r == 0)
            q->space_end = q->fresh_from = n << q->cluster_bits;
    }
    return 0;
}

/* What the last cluster holds behind the old end must read as zeroes when the image has grown over
 * it; and a longer backing image must not show through. */
static int clear_behind(struct qcow2 *q, uint64_t from, uint64_t to, struct error *err)
{
    struct edge *backing = q->node->backing;
    uint64_t cluster_end = align_up(from, q->cluster_size);
    int r = 0;
    if (from < cluster_end) {
        struct range rest = range_between(from, min_u64(cluster_end, to));
        struct mapping m;
        r = map_lookup(q, from, rest.length, &m);
        if (r == 0 && (m.type == MAP_NORMAL || m.type == MAP_COMPRESSED ||
                       (m.type == MAP_UNALLOCATED && backing && node_size(backing->node) > from))) {
            CLEANUP(memory_freep) uint8_t *zeroes = calloc(1, rest.length);
            r = zeroes ? qcow2_write(q->node, rest, zeroes, 0) : -ENOMEM;
        }
    }
    if (r == 0 && backing && node_size(backing->node) > cluster_end && to > cluster_end) {
        uint64_t end = min_u64(align_up(node_size(backing->node), q->cluster_size),
                               align_up(to, q->cluster_size));
        r = q->header.version >= 3 ? qcow2_zero_clusters(q, range_between(cluster_end, end), true)
                                   : -ENOTSUP;
    }
    return r < 0 ? error_set_errno(err, -r, "Failed to zero out the new area") : 0;
}

static int grow(struct qcow2 *q, uint64_t from, uint64_t size, struct error *err)
{
    /* Entries beyond the end are left from a shrink that was cut: they must not come back. */
    uint64_t first = align_up(from, q->cluster_size);
    uint64_t reach = min_u64((uint64_t)q->l1.n << (q->cluster_bits + q->l2_bits),
                             align_up(size, q->cluster_size));
    if (reach > first && !q->header.nb_snapshots) {
        int r = qcow2_discard_clusters(q, range_between(first, reach), FREE_ALWAYS, true);
        if (r < 0)
            return error_set_errno(err, -r, "Failed to zero out the new area");
    }
    uint64_t n = l1_needed(q, size);
    if (n > q->l1.n) {
        int r = grow_l1(q, n, from, err); /* the size stays until the new area is in order */
        if (r < 0)
            return r;
    }
    q->node->size_bytes = size; /* clear_behind writes there */
    int r = clear_behind(q, from, size, err);
    if (r == 0) {
        r = qcow2_sync(q);
        if (r < 0)
            error_set_errno(err, -r, "Failed to zero out the new area");
    }
    if (r == 0)
        r = write_size(q, size, err);
    if (r < 0)
        q->node->size_bytes = from;
    return r;
}

int qcow2_truncate(struct node *node, uint64_t size, bool exact, struct error *err)
{
    struct qcow2 *q = node->state;
    SHIELD();
    if (qcow2_unusable(q))
        return error_set_errno(err, ENOMEDIUM, "Failed to update the image size");
    if (size % SECTOR)
        return error_set(err, EINVAL, "The new size must be a multiple of %u", SECTOR);
    if (q->header.nb_snapshots && q->header.version < 3)
        return error_set(err, ENOTSUP, "Can't resize a v2 image which has snapshots");
    uint64_t from = node->size_bytes;
    if (size < from && q->header.nb_snapshots)
        return error_set(err, ENOTSUP, "Can't shrink an image which has snapshots");
    int r = size < from ? shrink(q, from, size, err) : size > from ? grow(q, from, size, err) : 0;
    if (r == 0)
        node->size_bytes = size;
    return r;
}
