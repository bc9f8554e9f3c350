/* Which clusters of the file are free, and how many entries name those that are not.
 *
 *     refcount table (in memory, header says where)
 *        [0]  [1]  [2] ...          each names a block of 2^refblock_bits counts
 *         |
 *         v
 *     refcount block: u16 for each cluster    cached in slices
 *
 * Allocation is first fit from `free_hint`, under alloc_lock, and raises counts in memory. Where
 * no block exists yet, all clusters that it would speak for are free: the block is put among
 * them and counts itself. When the table is full, a new one is written with the blocks that
 * cover it, flushed, and the header turned to it: a rare, synchronous step.
 *
 * Counts are lowered by step 5 of writeback.c only, or for clusters that no entry has ever named.
 */
#include "block/qcow2/qcow2.h"

#define SPACE_AHEAD_MIN (1 * MiB)
#define SPACE_AHEAD_MAX (16 * MiB)

static uint64_t refblock_entries(const struct qcow2 *q)
{
    return (uint64_t)1 << q->refblock_bits;
}

/* Where in the file the slice with CLUSTER's count is, in a block at BLOCK. */
static uint64_t slice_offset(const struct qcow2 *q, uint64_t block, uint64_t cluster)
{
    uint64_t byte = 2 * (cluster & (refblock_entries(q) - 1));
    return block + align_down(byte, q->refcount_cache.slice_bytes);
}

static uint32_t index_in_slice(const struct qcow2 *q, uint64_t cluster)
{
    return (uint32_t)(cluster & (q->refcount_cache.slice_bytes / 2 - 1));
}

static uint16_t count_load(const struct cache_slot *s, uint32_t i)
{
    uint16_t v;
    memcpy(&v, s->data + 2 * (size_t)i, sizeof v);
    return be16toh(v);
}

static void count_store(struct cache_slot *s, uint32_t i, uint16_t v)
{
    v = htobe16(v);
    memcpy(s->data + 2 * (size_t)i, &v, sizeof v);
}

/* The block that has CLUSTER's count; 0: there is none. */
static int block_of(struct qcow2 *q, uint64_t cluster, uint64_t *ret)
{
    uint64_t index = cluster >> q->refblock_bits;
    *ret = 0;
    if (index >= q->reftable.n)
        return 0;
    uint64_t block = q->reftable.entries[index] & REFTABLE_OFFSET_MASK;
    if (into_cluster(q, block)) {
        qcow2_signal_corruption(q, true, -1, -1,
                                "Refblock offset %#llx unaligned (reftable index: %#llx)",
                                (unsigned long long)block, (unsigned long long)index);
        return -EIO;
    }
    *ret = block;
    return 0;
}

/* The slice with CLUSTER's count; *RET NULL when there is no block. */
static int slice_get(struct qcow2 *q, uint64_t cluster, struct cache_slot **ret)
{
    uint64_t block;
    int r = block_of(q, cluster, &block);
    *ret = NULL;
    if (r < 0 || !block)
        return r;
    uint64_t at = slice_offset(q, block, cluster);
    if (!cache_peek(&q->refcount_cache, at) && block >= q->fresh_from) {
        qcow2_signal_corruption(
            q, true, -1, -1,
            "Refblock offset %#llx beyond the end of the file (reftable index: %#llx)",
            (unsigned long long)block, (unsigned long long)(cluster >> q->refblock_bits));
        return -EIO;
    }
    return cache_get(&q->refcount_cache, at, ret);
}

uint64_t refcount_skip_unknown(const struct qcow2 *q, uint64_t cluster, uint64_t end)
{
    for (uint64_t i = cluster >> q->refblock_bits; i < q->reftable.n && cluster < end;
         cluster = ++i << q->refblock_bits)
        if (q->reftable.entries[i] & REFTABLE_OFFSET_MASK)
            return cluster;
    return end;
}

uint64_t refcount_end(const struct qcow2 *q)
{
    uint32_t n = q->reftable.n;
    while (n && !(q->reftable.entries[n - 1] & REFTABLE_OFFSET_MASK))
        n--;
    return (uint64_t)n << q->refblock_bits;
}

int refcount_get(struct qcow2 *q, uint64_t cluster, uint16_t *ret)
{
    struct cache_slot *s;
    int r = slice_get(q, cluster, &s);
    *ret = r == 0 && s ? count_load(s, index_in_slice(q, cluster)) : 0;
    return r;
}

int refcount_add(struct qcow2 *q, uint64_t cluster, uint64_t n, int delta)
{
    uint32_t per_slice = q->refcount_cache.slice_bytes / 2;
    while (n) {
        struct cache_slot *s;
        int r = slice_get(q, cluster, &s);
        if (r < 0)
            return r;
        uint32_t i = index_in_slice(q, cluster);
        uint32_t end = (uint32_t)min_u64(per_slice, i + n);
        for (; i < end; i++, cluster++, n--) {
            int count = (s ? count_load(s, i) : 0) + delta;
            if (!s || count < 0 || count > REFCOUNT_MAX) {
                qcow2_signal_corruption(q, delta > 0, (int64_t)(cluster << q->cluster_bits), -1,
                                        "Refcount of cluster at %#llx would become %d",
                                        (unsigned long long)(cluster << q->cluster_bits), count);
                return -EIO;
            }
            count_store(s, i, (uint16_t)count);
            if (count == 0 && cluster < q->free_hint)
                q->free_hint = cluster;
        }
        cache_mark_dirty(&q->refcount_cache, s);
    }
    return 0;
}

void refcount_unalloc(struct qcow2 *q, uint64_t offset, uint64_t clusters)
{
    int r = refcount_add(q, offset >> q->cluster_bits, clusters, -1);
    (void)r; /* a leak at worst */
}

static void note_used(struct qcow2 *q, uint64_t end_cluster)
{
    q->fresh_from = max_u64(q->fresh_from, end_cluster << q->cluster_bits);
}

/* Also where the file has never held anything: the blocks on disk must be there before it is full,
 * or what it had room for could not be flushed. */
static int clear_clusters(struct qcow2 *q, uint64_t cluster, uint64_t n)
{
    note_used(q, cluster + n);
    return file_write_zeroes(q, cluster << q->cluster_bits, n << q->cluster_bits);
}

/* Makes the blocks for [BASE, BASE + K + N) where there are none, in the K clusters from BASE on,
 * and counts K + N. All of that is free. Holds alloc_lock. The table's entries are set last and in
 * one go: a round of writeback that sees them sees the counts, too. */
static int make_blocks(struct qcow2 *q, uint64_t base, uint64_t k, uint64_t n)
{
    uint64_t first = base >> q->refblock_bits;
    struct range area = range_make(base << q->cluster_bits, (k + n) << q->cluster_bits);
    if (range_end(area) > ENTRY_OFFSET_MASK)
        return -EFBIG;
    int r = qcow2_check_overlap(q, area.start, area.length, META_NONE);
    if (r == 0)
        r = clear_clusters(q, base, k);
    if (r < 0)
        return r;
    for (uint64_t c = base; c < base + k + n; c++) {
        struct cache_slot *s;
        uint64_t block = (base + ((c >> q->refblock_bits) - first)) << q->cluster_bits;
        r = cache_get(&q->refcount_cache, slice_offset(q, block, c), &s);
        if (r < 0)
            return r;
        count_store(s, index_in_slice(q, c), 1);
        cache_mark_dirty(&q->refcount_cache, s);
    }
    note_used(q, base + k + n);
    for (uint64_t i = 0; i < k; i++) {
        uint64_t block = (base + i) << q->cluster_bits;
        table_set(&q->reftable, (uint32_t)(first + i), block);
        metadata_add(q, block, META_REFBLOCK);
    }
    return 0;
}

/* In repair, the first run of N clusters from CLUSTER on that nothing refers to. */
static uint64_t skip_referenced(const struct qcow2 *q, uint64_t cluster, uint64_t n)
{
    for (uint64_t i = 0; q->repairing && i < n && cluster + i < q->repairing_n;) {
        if (q->repairing[cluster + i]) {
            cluster += i + 1;
            i = 0;
        } else {
            i++;
        }
    }
    return cluster;
}

/* A longer table, for at least MIN_ENTRIES. Holds alloc_lock; what it writes is durable when it
 * returns. The old table and all blocks that it names are on disk before (qcow2_sync), the new
 * table and the blocks that cover it before the header names it, and the old one is freed after. */
static int grow_reftable(struct qcow2 *q, uint64_t min_entries)
{
    uint64_t per_cluster = q->cluster_size / 8;
    uint64_t base = skip_referenced(q, (uint64_t)q->reftable.n << q->refblock_bits, 1);
    uint64_t clusters =
        max_u64((uint64_t)q->header.reftable_clusters * 3 / 2 + 1, min_entries / per_cluster + 1);
    uint64_t first, k;
    for (;;) {
        first = base >> q->refblock_bits;
        k = 1;
        while (((base + k + clusters - 1) >> q->refblock_bits) - first + 1 > k)
            k++;
        uint64_t moved = skip_referenced(q, base, k + clusters);
        if (moved != base) {
            base = moved;
            continue;
        }
        uint64_t needed = first + k;
        if (clusters * per_cluster >= needed)
            break;
        clusters = needed / per_cluster + 1;
    }
    if (clusters << q->cluster_bits > QCOW2_MAX_REFTABLE_BYTES)
        return -EFBIG;

    int r = qcow2_sync(q);
    if (r < 0)
        return r;

    struct table bigger;
    r = table_alloc(&bigger, (uint32_t)(clusters * per_cluster));
    if (r < 0)
        return r;
    memcpy(bigger.entries, q->reftable.entries, q->reftable.n * sizeof *bigger.entries);
    bigger.offset = (base + k) << q->cluster_bits;
    for (uint64_t i = 0; i < k; i++)
        bigger.entries[first + i] = (base + i) << q->cluster_bits;

    size_t bytes = (k + clusters) << q->cluster_bits;
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(bytes);
    if (!buf) {
        table_free(&bigger);
        return -ENOMEM;
    }
    memset(buf, 0, bytes);
    for (uint64_t c = base; c < base + k + clusters; c++) {
        size_t block = ((c >> q->refblock_bits) - first) << q->cluster_bits;
        uint16_t one = htobe16(1);
        memcpy(buf + block + 2 * (c & (refblock_entries(q) - 1)), &one, sizeof one);
    }
    for (uint32_t i = 0; i < bigger.n; i++)
        entry_store(buf + (k << q->cluster_bits), i, bigger.entries[i]);

    r = qcow2_check_overlap(q, base << q->cluster_bits, bytes, META_NONE);
    file_event(q, DEBUG_refblock_alloc_write_blocks);
    if (r == 0)
        r = file_write(q, base << q->cluster_bits, buf, bytes);
    if (r == 0)
        r = file_flush(q);
    note_used(q, base + k + clusters);
    if (r < 0) {
        table_free(&bigger);
        return r;
    }

    uint64_t old_offset = q->reftable.offset, old_clusters = q->header.reftable_clusters;
    q->header.reftable_offset = bigger.offset;
    q->header.reftable_clusters = (uint32_t)clusters;
    file_event(q, DEBUG_refblock_alloc_switch_table);
    r = qcow2_write_header(q);
    if (r == 0)
        r = file_flush(q);
    if (r < 0) {
        /* Which of the two the disk has is not known. Both say the same about everything
         * that is in use, so the old one stays ours, and the new one is leaked. */
        q->header.reftable_offset = old_offset;
        q->header.reftable_clusters = (uint32_t)old_clusters;
        qcow2_take_header_back(q);
        table_free(&bigger);
        return r;
    }
    table_free(&q->reftable);
    q->reftable = bigger;
    for (uint64_t i = 0; i < k; i++) {
        uint64_t block = (base + i) << q->cluster_bits;
        cache_forget(&q->refcount_cache, block, q->cluster_size);
        metadata_add(q, block, META_REFBLOCK);
    }
    qcow2_free_later(q, old_offset, old_clusters << q->cluster_bits, FREE_OTHER);
    return 0;
}

/* Makes CLUSTER's count exist: a block for it, and room for that in the table. */
static int make_block_for(struct qcow2 *q, uint64_t cluster)
{
    uint64_t index = cluster >> q->refblock_bits;
    file_event(q, DEBUG_refblock_alloc);
    if (index >= q->reftable.n)
        return grow_reftable(q, index + 1);
    uint64_t at = skip_referenced(q, cluster, 1);
    if (at >> q->refblock_bits == index)
        return make_blocks(q, at, 1, 0);

    /* Only in repair: everything in the block's own reach is in use. Its place is where a block
     * exists already, or can count itself. */
    CLEANUP(memory_freep) uint8_t *zeroes = xcalloc(1, q->cluster_size);
    for (;; at = skip_referenced(q, at + 1, 1)) {
        struct cache_slot *s;
        uint64_t block;
        int r = block_of(q, at, &block);
        if (r == 0 && !block)
            r = at >> q->refblock_bits >= q->reftable.n
                    ? grow_reftable(q, (at >> q->refblock_bits) + 1)
                    : make_blocks(q, at, 1, 0);
        if (r == 0)
            r = slice_get(q, at, &s);
        if (r < 0)
            return r;
        if (!s || count_load(s, index_in_slice(q, at)))
            continue;
        count_store(s, index_in_slice(q, at), 1);
        cache_mark_dirty(&q->refcount_cache, s);
        note_used(q, at + 1);
        r = file_write(q, at << q->cluster_bits, zeroes, q->cluster_size);
        if (r < 0)
            return r;
        table_set(&q->reftable, (uint32_t)index, at << q->cluster_bits);
        metadata_add(q, at << q->cluster_bits, META_REFBLOCK);
        return 0;
    }
}

static bool is_free(const struct qcow2 *q, const struct cache_slot *s, uint32_t i, uint64_t cluster)
{
    return count_load(s, i) == 0 &&
           !(q->repairing && cluster < q->repairing_n && q->repairing[cluster]);
}

/* The file gets its blocks ahead of the clusters that will want them, in larger pieces the more
 * has been written: a flush then has no new extents to record for each cluster, and they lie
 * together. (ext4, 32 scattered clusters a flush: five times the flushes.) Blocks are zero until
 * they are written, so what is fresh stays fresh. A file system that cannot is asked once. */
static void take_space(struct qcow2 *q, uint64_t need)
{
    if (need <= q->space_end || q->no_space_ahead || q->space_taken < SPACE_AHEAD_MIN)
        return;
    uint64_t start = max_u64(q->space_end, q->fresh_from);
    uint64_t end = need + align_up(min_u64(q->space_taken, SPACE_AHEAD_MAX), q->cluster_size);
    q->space_end = end;
    int r = edge_write_zeroes(q->file, range_between(start, end), REQ_NO_FALLBACK);
    if (r < 0)
        q->no_space_ahead = true;
}

/* Also beside guests: whoever takes a cluster behind the end that is cut off waits. */
void refcount_trim_space(struct qcow2 *q)
{
    LOCKED(&q->alloc_lock);
    if (q->space_end <= q->fresh_from || file_size(q) <= q->fresh_from)
        return;
    struct error ignored = ERROR_INIT;
    int r = edge_truncate(q->file, q->fresh_from, false, &ignored);
    (void)r; /* it is only space */
    q->space_end = 0;
}

/* A table can name one full block a million times: to look through that takes no wait. */
static void let_others_run(unsigned *looked)
{
    if (++*looked % 64 == 0)
        (void)!task_yield();
}

int refcount_alloc(struct qcow2 *q, uint64_t wanted, uint64_t *offset, uint64_t *got, bool *fresh)
{
    file_event(q, DEBUG_cluster_alloc);
    LOCKED(&q->alloc_lock);
    uint32_t per_slice = q->refcount_cache.slice_bytes / 2;
    unsigned looked = 0;
    for (;;) {
        uint64_t from = q->free_hint, cluster = from;
        if (cluster > ENTRY_OFFSET_MASK >> q->cluster_bits)
            return -EFBIG;
        take_space(q, (cluster + min_u64(wanted, per_slice)) << q->cluster_bits);
        struct cache_slot *s;
        int r = slice_get(q, cluster, &s);
        if (r < 0)
            return r;
        if (!s) {
            r = make_block_for(q, cluster);
            if (r < 0)
                return r;
            continue;
        }
        /* No wait from here on: what looks free is free. (A free of something below may have
         * lowered the hint while the slice was read; then this one is taken all the same.) */
        uint32_t i = index_in_slice(q, cluster);
        while (i < per_slice && !is_free(q, s, i, cluster))
            i++, cluster++;
        if (i == per_slice) {
            if (q->free_hint >= from)
                q->free_hint = cluster;
            let_others_run(&looked);
            continue;
        }
        uint64_t n = 0;
        while (n < wanted && i + n < per_slice && is_free(q, s, i + (uint32_t)n, cluster + n))
            n++;
        r = qcow2_check_overlap(q, cluster << q->cluster_bits, n << q->cluster_bits, META_NONE);
        if (r < 0)
            return r;
        for (uint64_t j = 0; j < n; j++)
            count_store(s, i + (uint32_t)j, 1);
        cache_mark_dirty(&q->refcount_cache, s);
        if (q->free_hint >= from)
            q->free_hint = cluster + n;
        *offset = cluster << q->cluster_bits;
        *got = n;
        *fresh = *offset >= q->fresh_from;
        note_used(q, cluster + n);
        q->space_taken += n << q->cluster_bits;
        return 0;
    }
}

int refcount_alloc_bytes(struct qcow2 *q, uint64_t bytes, uint64_t *offset)
{
    file_event(q, DEBUG_cluster_alloc_bytes);
    LOCKED(&q->alloc_lock);
    uint64_t n = clusters_of(q, bytes), run = 0, cluster;
    uint64_t end = refcount_end(q);
    unsigned looked = 0;

    for (cluster = q->free_hint; cluster < end && run < n; cluster++) {
        struct cache_slot *s;
        if (!index_in_slice(q, cluster))
            let_others_run(&looked);
        int r = slice_get(q, cluster, &s);
        if (r < 0)
            return r;
        run = s && is_free(q, s, index_in_slice(q, cluster), cluster) ? run + 1 : 0;
    }
    if (run == n) {
        uint64_t first = cluster - n;
        int r = qcow2_check_overlap(q, first << q->cluster_bits, n << q->cluster_bits, META_NONE);
        if (r == 0)
            r = refcount_add(q, first, n, 1);
        if (r < 0)
            return r;
        note_used(q, first + n);
        *offset = first << q->cluster_bits;
        return 0;
    }

    /* Behind everything that is covered: the blocks, then what was asked for. */
    for (;;) {
        uint64_t base = skip_referenced(q, refcount_end(q), 1), k = 1;
        uint64_t first = base >> q->refblock_bits;
        while (((base + k + n - 1) >> q->refblock_bits) - first + 1 > k)
            k++;
        if (first + k > q->reftable.n) {
            int r = grow_reftable(q, first + k);
            if (r < 0)
                return r;
            continue;
        }
        int r = make_blocks(q, base, k, n);
        if (r < 0)
            return r;
        *offset = (base + k) << q->cluster_bits;
        return 0;
    }
}

int refcount_set(struct qcow2 *q, uint64_t cluster, uint16_t value)
{
    struct cache_slot *s;
    for (;;) {
        int r = slice_get(q, cluster, &s);
        if (r < 0)
            return r;
        if (s)
            break;
        if (!value)
            return 0;
        LOCKED(&q->alloc_lock);
        r = make_block_for(q, cluster);
        if (r < 0)
            return r;
    }
    if (count_load(s, index_in_slice(q, cluster)) != value) {
        count_store(s, index_in_slice(q, cluster), value);
        cache_mark_dirty(&q->refcount_cache, s);
    }
    return 0;
}
