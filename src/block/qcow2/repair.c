/* Counting all references anew. An image with the dirty bit (lazy refcounts, and a process that
 * died) has right entries and counts that may be wrong; before it may be written they must agree.
 *
 * The counts are made in memory from header, tables, L1 and L2 of the active image and of every
 * snapshot, and bitmaps; then each count that differs is set. While that goes on, `repairing`
 * keeps the allocator (new refcount blocks) away from clusters that something refers to. Counts are
 * raised before any is lowered, everything is flushed, and then the dirty bit goes. */
#include "block/qcow2/bitmaps.h"
#include "block/qcow2/qcow2.h"

struct census {
    struct qcow2 *q;
    uint16_t *counts;
    uint64_t n; /* clusters of the file */
};

/* What a damaged image cannot be repaired for: it names the thing. */
static int count(struct census *c, uint64_t offset, uint64_t length, const char *what,
                 struct error *err)
{
    if (!length)
        return 0;
    uint64_t first = offset >> c->q->cluster_bits;
    uint64_t last = (offset + length - 1) >> c->q->cluster_bits;
    if (offset + length < offset || last >= c->n)
        return error_set(err, EIO,
                         "Could not repair dirty image: %s at %#llx is beyond the end of "
                         "the file",
                         what, (unsigned long long)offset);
    for (uint64_t i = first; i <= last; i++) {
        if (c->counts[i] == REFCOUNT_MAX)
            return error_set(err, EIO,
                             "Could not repair dirty image: too many references to "
                             "cluster at %#llx",
                             (unsigned long long)(i << c->q->cluster_bits));
        c->counts[i]++;
    }
    return 0;
}

static int count_l2(struct census *c, uint64_t l2_offset, struct error *err)
{
    struct qcow2 *q = c->q;
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(q->cluster_size);
    int r = buf ? file_read(q, l2_offset, buf, q->cluster_size) : -ENOMEM;
    if (r < 0)
        return error_set_errno(err, -r, "Could not repair dirty image");
    for (uint32_t i = 0; r == 0 && i < (uint32_t)1 << q->l2_bits; i++) {
        uint64_t e = entry_load(buf, i);
        if (e & ENTRY_COMPRESSED) {
            struct range extent = compressed_extent(q, e);
            /* Its last sectors need not exist. */
            uint64_t end = min_u64(range_end(extent), c->n << q->cluster_bits);
            r = extent.start < end
                    ? count(c, extent.start, end - extent.start, "compressed cluster", err)
                    : count(c, extent.start, 1, "compressed cluster", err);
            continue;
        }
        r = map_check_entry(q, e, l2_offset, i);
        if (r < 0)
            return error_set_errno(err, -r, "Could not repair dirty image");
        if (e & ENTRY_OFFSET_MASK)
            r = count(c, e & ENTRY_OFFSET_MASK, q->cluster_size, "cluster", err);
    }
    return r;
}

static int count_l1(struct census *c, const uint64_t *entries, uint32_t n, uint64_t offset,
                    struct error *err)
{
    int r = count(c, offset, (uint64_t)n * 8, "L1 table", err);
    for (uint32_t i = 0; r == 0 && i < n; i++) {
        uint64_t l2 = entries[i] & ENTRY_OFFSET_MASK;
        if (!l2)
            continue;
        if (into_cluster(c->q, l2))
            return error_set(err, EIO,
                             "Could not repair dirty image: L2 table offset %#llx unaligned",
                             (unsigned long long)l2);
        r = count(c, l2, c->q->cluster_size, "L2 table", err);
        if (r == 0)
            r = count_l2(c, l2, err);
    }
    return r;
}

static int count_snapshots(struct census *c, struct error *err)
{
    struct qcow2 *q = c->q;
    int r = count(c, q->header.snapshots_offset, q->snapshot_table_bytes, "snapshot table", err);
    for (uint32_t i = 0; r == 0 && i < q->header.nb_snapshots; i++) {
        const struct snapshot *s = &q->snapshots[i];
        r = qcow2_check_table(s->l1_offset, s->l1_size, 8, QCOW2_MAX_L1_BYTES, q->cluster_size,
                              "Snapshot L1 table", err);
        if (r < 0)
            return r;
        CLEANUP(memory_freep) uint64_t *l1 = malloc((size_t)s->l1_size * 8 + 8);
        r = l1 ? file_read(q, s->l1_offset, l1, (uint64_t)s->l1_size * 8) : -ENOMEM;
        if (r < 0)
            return error_set_errno(err, -r, "Could not repair dirty image");
        for (uint32_t j = 0; j < s->l1_size; j++)
            l1[j] = be64toh(l1[j]);
        r = count_l1(c, l1, s->l1_size, s->l1_offset, err);
    }
    return r;
}

static int count_bitmaps(struct census *c, struct error *err)
{
    struct qcow2 *q = c->q;
    if (!q->header.has_bitmaps)
        return 0;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *list = NULL;
    int r = qcow2_bitmaps_read(q->node, &list, err);
    if (r < 0 || list->misplaced)
        return r; /* what is where it cannot be does not keep the image from being opened */
    r = count(c, q->header.bitmap_directory_offset, q->header.bitmap_directory_bytes,
              "bitmap directory", err);
    for (size_t i = 0; r == 0 && i < list->n; i++) {
        const struct qcow2_bitmap *b = &list->items[i];
        uint64_t bytes = (uint64_t)b->table_entries * 8;
        if (b->unfit || b->table_offset + bytes > q->fresh_from)
            continue; /* nothing of it is used; its clusters may be given away */
        CLEANUP(memory_freep) uint64_t *table = malloc(bytes);
        r = table ? file_read(q, b->table_offset, table, bytes) : -ENOMEM;
        if (r < 0)
            return error_set_errno(err, -r, "Could not repair dirty image");
        r = count(c, b->table_offset, bytes, "bitmap table", err);
        for (uint32_t j = 0; r == 0 && j < b->table_entries; j++) {
            uint64_t at = be64toh(table[j]) & ENTRY_OFFSET_MASK;
            if (at && !into_cluster(q, at) && at >> q->cluster_bits < c->n)
                r = count(c, at, q->cluster_size, "bitmap data", err);
        }
    }
    return r;
}

static int take_census(struct census *c, struct error *err)
{
    struct qcow2 *q = c->q;
    int r = count(c, 0, q->cluster_size, "header", err);
    if (r == 0)
        r = count(c, q->header.reftable_offset,
                  (uint64_t)q->header.reftable_clusters << q->cluster_bits, "refcount table", err);
    for (uint32_t i = 0; r == 0 && i < q->reftable.n; i++) {
        uint64_t block = q->reftable.entries[i] & REFTABLE_OFFSET_MASK;
        if (into_cluster(q, block))
            return error_set(err, EIO,
                             "Could not repair dirty image: Refblock offset %#llx "
                             "unaligned (reftable index: %#x)",
                             (unsigned long long)block, i);
        if (block)
            r = count(c, block, q->cluster_size, "refcount block", err);
    }
    if (r == 0)
        r = count_l1(c, q->l1.entries, q->l1.n, q->l1.offset, err);
    if (r == 0)
        r = count_snapshots(c, err);
    return r < 0 ? r : count_bitmaps(c, err);
}

/* Refcount blocks and the table may have been made while counts were raised: they are not in the
 * census. */
static bool made_meanwhile(struct qcow2 *q, uint64_t cluster)
{
    struct range r = range_make(cluster << q->cluster_bits, q->cluster_size);
    return metadata_at(q, r.start) == META_REFBLOCK ||
           range_overlaps(r, range_make(q->reftable.offset, (uint64_t)q->reftable.n * 8));
}

static int raise_counts(struct census *c)
{
    for (uint64_t i = 0; i < c->n; i++) {
        uint16_t now;
        int r = c->counts[i] ? refcount_get(c->q, i, &now) : 0;
        if (r == 0 && c->counts[i] && now < c->counts[i])
            r = refcount_set(c->q, i, c->counts[i]);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Of every block there is, also beyond the end of the file. */
static int lower_counts(struct census *c)
{
    struct qcow2 *q = c->q;
    for (uint32_t b = 0; b < q->reftable.n; b++) {
        uint64_t i = (uint64_t)b << q->refblock_bits, end = (uint64_t)(b + 1) << q->refblock_bits;
        if (!(q->reftable.entries[b] & REFTABLE_OFFSET_MASK))
            continue;
        for (; i < end; i++) {
            uint16_t should = i < c->n ? c->counts[i] : 0, now;
            int r = refcount_get(q, i, &now);
            if (r == 0 && now > should && (should || !made_meanwhile(q, i)))
                r = refcount_set(q, i, should);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

int qcow2_repair(struct qcow2 *q, struct error *err)
{
    struct census c = {.q = q, .n = clusters_of(q, file_size(q))};
    c.counts = calloc(c.n ? c.n : 1, sizeof *c.counts);
    if (!c.counts)
        return error_set_errno(err, ENOMEM, "Could not repair dirty image");
    int r = take_census(&c, err);
    if (r == 0) {
        q->repairing = c.counts;
        q->repairing_n = c.n;
        r = raise_counts(&c);
        if (r == 0)
            r = lower_counts(&c);
        q->repairing = NULL;
        q->free_hint = 0;
        if (r == 0)
            r = qcow2_sync(q);
        if (r == 0)
            r = qcow2_sync(q);
        if (r == 0) {
            q->header.incompatible &= ~QCOW2_INCOMPAT_DIRTY;
            r = qcow2_write_header(q);
        }
        if (r == 0)
            r = file_flush(q);
        if (r < 0)
            error_set_errno(err, -r, "Could not repair dirty image");
    }
    free(c.counts);
    return r;
}
