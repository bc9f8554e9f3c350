/* From guest offsets to clusters of the file, and changing where they lead.
 *
 *     guest offset = | L1 index | L2 index | offset in the cluster |
 *     L1 (in memory) --> L2 table (cached in slices) --> cluster
 *
 * Bit 63 ("copied") of an L1 or L2 entry says that the reference count is exactly one, so that
 * what it names may be changed in place. Without it a snapshot may share it: it is copied first. */
#include "block/qcow2/qcow2.h"

static uint32_t l2_index_of(const struct qcow2 *q, uint64_t guest)
{
    return (uint32_t)(guest >> q->cluster_bits) & (((uint32_t)1 << q->l2_bits) - 1);
}

static uint64_t l1_index_of(const struct qcow2 *q, uint64_t guest)
{
    return guest >> q->cluster_bits >> q->l2_bits;
}

/* An L1 entry that names a table; -EIO when it cannot. Asked when a slice is not cached yet. */
static int check_l2_offset(struct qcow2 *q, uint64_t l2_offset, uint64_t l1_index)
{
    if (into_cluster(q, l2_offset)) {
        qcow2_signal_corruption(q, true, -1, -1,
                                "L2 table offset %#llx unaligned (L1 index: %#llx)",
                                (unsigned long long)l2_offset, (unsigned long long)l1_index);
        return -EIO;
    }
    if (l2_offset >= q->fresh_from) {
        qcow2_signal_corruption(
            q, false, -1, -1, "L2 table offset %#llx beyond the end of the file (L1 index: %#llx)",
            (unsigned long long)l2_offset, (unsigned long long)l1_index);
        return -EIO;
    }
    const char *what = metadata_overlap(q, l2_offset, q->cluster_size, META_L2);
    if (what && q->overlap_checks) {
        qcow2_signal_corruption(q, false, -1, -1,
                                "L2 table offset %#llx (L1 index: %#llx) overlaps with %s",
                                (unsigned long long)l2_offset, (unsigned long long)l1_index, what);
        return -EIO;
    }
    return 0;
}

static int get_slice(struct qcow2 *q, uint64_t l2_offset, uint64_t guest, struct cache_slot **ret)
{
    uint64_t byte = 8 * (uint64_t)l2_index_of(q, guest);
    uint64_t at = l2_offset + align_down(byte, q->l2_cache.slice_bytes);
    struct cache_slot *s = cache_peek(&q->l2_cache, at);
    if (!s) {
        int r = check_l2_offset(q, l2_offset, l1_index_of(q, guest));
        if (r < 0)
            return r;
    }
    return cache_get(&q->l2_cache, at, ret);
}

static enum mapping_type type_of(uint64_t entry)
{
    if (entry & ENTRY_COMPRESSED)
        return MAP_COMPRESSED;
    if (entry & ENTRY_ZERO)
        return MAP_ZERO;
    return entry & ENTRY_OFFSET_MASK ? MAP_NORMAL : MAP_UNALLOCATED;
}

int map_check_entry(struct qcow2 *q, uint64_t entry, uint64_t l2_offset, uint32_t l2_index)
{
    if (entry & ENTRY_COMPRESSED)
        return 0;
    if ((entry & ENTRY_ZERO) && q->header.version < 3) {
        qcow2_signal_corruption(
            q, true, -1, -1,
            "Zero cluster entry found in pre-v3 image (L2 offset: %#llx, L2 index: %#x)",
            (unsigned long long)l2_offset, l2_index);
        return -EIO;
    }
    if (into_cluster(q, entry & ENTRY_OFFSET_MASK)) {
        qcow2_signal_corruption(
            q, true, -1, -1,
            "Cluster allocation offset %#llx unaligned (L2 offset: %#llx, L2 index: %#x)",
            (unsigned long long)(entry & ENTRY_OFFSET_MASK), (unsigned long long)l2_offset,
            l2_index);
        return -EIO;
    }
    return 0;
}

int map_lookup(struct qcow2 *q, uint64_t guest, uint64_t length, struct mapping *ret)
{
    uint64_t index = l1_index_of(q, guest);
    uint64_t l2_offset = index < q->l1.n ? q->l1.entries[index] & ENTRY_OFFSET_MASK : 0;

    if (!l2_offset) {
        unsigned span_bits = q->cluster_bits + q->l2_bits;
        uint64_t end = guest + length, at = guest;
        while (at < end && !(index < q->l1.n && (q->l1.entries[index] & ENTRY_OFFSET_MASK)))
            at = ++index << span_bits;
        *ret = (struct mapping){.type = MAP_UNALLOCATED, .length = min_u64(at, end) - guest};
        return 0;
    }

    struct cache_slot *s;
    int r = get_slice(q, l2_offset, guest, &s);
    if (r < 0)
        return r;
    uint32_t i = l2_index_of(q, guest) & (q->slice_entries - 1);
    uint64_t first = entry_load(s->data, i);
    r = map_check_entry(q, first, l2_offset, l2_index_of(q, guest));
    if (r < 0)
        return r;

    uint64_t inside = into_cluster(q, guest);
    uint64_t run = q->cluster_size - inside;
    enum mapping_type type = type_of(first);
    uint64_t next = first;
    for (i++; run < length && type != MAP_COMPRESSED && i < q->slice_entries; i++) {
        uint64_t e = entry_load(s->data, i);
        if (type == MAP_NORMAL || (type == MAP_ZERO && (first & ENTRY_OFFSET_MASK)))
            next += q->cluster_size;
        if (e != next)
            break;
        run += q->cluster_size;
    }
    uint64_t host = type == MAP_COMPRESSED ? 0 : first & ENTRY_OFFSET_MASK;
    *ret = (struct mapping){
        .type = type,
        .copied = first & ENTRY_COPIED,
        .length = min_u64(run, length),
        .host = host ? host + inside : 0,
        .entry = first,
    };
    return 0;
}

/* A table that is free of holes in its cluster: all slices that nobody has written read as zeroes.
 * Its blocks are there from now on, so that what a file system had room for can be flushed when it
 * is full. */
static int new_l2_table(struct qcow2 *q, uint64_t *offset)
{
    uint64_t got;
    bool fresh;
    int r = refcount_alloc(q, 1, offset, &got, &fresh);
    if (r < 0)
        return r;
    cache_forget(&q->l2_cache, *offset, q->cluster_size); /* of a table that was here before */
    file_event(q, DEBUG_l2_alloc_write);
    r = file_write_zeroes(q, *offset, q->cluster_size);
    if (r < 0)
        refcount_unalloc(q, *offset, 1);
    return r;
}

/* The table is shared with a snapshot: its entries go to a new cluster. Holds l1_lock; slices of
 * the old one are clean, for nobody changes a shared table. */
static int copy_l2_table(struct qcow2 *q, uint64_t index, uint64_t old)
{
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(q->cluster_size);
    uint64_t offset, got;
    bool fresh;
    if (!buf)
        return -ENOMEM;
    int r = check_l2_offset(q, old, index);
    file_event(q, DEBUG_l2_alloc_cow_read);
    if (r == 0)
        r = file_read(q, old, buf, q->cluster_size);
    if (r == 0)
        r = refcount_alloc(q, 1, &offset, &got, &fresh);
    if (r < 0)
        return r;
    cache_forget(&q->l2_cache, offset, q->cluster_size);
    file_event(q, DEBUG_l2_alloc_write);
    r = file_write(q, offset, buf, q->cluster_size);
    if (r < 0) {
        refcount_unalloc(q, offset, 1);
        return r;
    }
    metadata_remove(q, old);
    metadata_add(q, offset, META_L2);
    table_set(&q->l1, (uint32_t)index, offset | ENTRY_COPIED);
    qcow2_free_later(q, old, q->cluster_size, FREE_OTHER);
    return 0;
}

static int make_writable_table(struct qcow2 *q, uint64_t index)
{
    LOCKED(&q->l1_lock);
    uint64_t entry = q->l1.entries[index];
    if (entry & ENTRY_COPIED && entry & ENTRY_OFFSET_MASK)
        return 0; /* somebody was faster */
    if (entry & ENTRY_OFFSET_MASK)
        return copy_l2_table(q, index, entry & ENTRY_OFFSET_MASK);

    uint64_t offset;
    int r = new_l2_table(q, &offset);
    if (r < 0)
        return r;
    /* Where a slice is the whole table it must be written even if nothing is put into it: the
     * entry in L1 needs a file that reaches it. */
    struct cache_slot *s;
    r = cache_get_zeroed(&q->l2_cache, offset, &s);
    if (r < 0) {
        refcount_unalloc(q, offset, 1);
        return r;
    }
    cache_mark_dirty(&q->l2_cache, s);
    table_set(&q->l1, (uint32_t)index, offset | ENTRY_COPIED);
    metadata_add(q, offset, META_L2);
    return 0;
}

int map_writable_slice(struct qcow2 *q, uint64_t guest, struct cache_slot **ret, uint32_t *index)
{
    uint64_t l1_index = l1_index_of(q, guest);
    if (l1_index >= q->l1.n)
        return -EIO;
    for (;;) {
        uint64_t entry = q->l1.entries[l1_index];
        if (!(entry & ENTRY_OFFSET_MASK) || !(entry & ENTRY_COPIED)) {
            int r = make_writable_table(q, l1_index);
            if (r < 0)
                return r;
            continue;
        }
        int r = get_slice(q, entry & ENTRY_OFFSET_MASK, guest, ret);
        if (r < 0)
            return r;
        if (q->l1.entries[l1_index] != entry)
            continue; /* moved while the slice was read */
        *index = l2_index_of(q, guest) & (q->slice_entries - 1);
        return 0;
    }
}

void map_set(struct qcow2 *q, struct cache_slot *s, uint32_t index, uint64_t entry)
{
    entry_store(s->data, index, entry);
    cache_mark_dirty(&q->l2_cache, s);
}

struct range compressed_extent(const struct qcow2 *q, uint64_t entry)
{
    unsigned shift = 62 - (q->cluster_bits - 8);
    uint64_t offset = entry & (((uint64_t)1 << shift) - 1) & (((uint64_t)1 << 56) - 1);
    uint64_t sectors = (entry >> shift & (((uint64_t)1 << (q->cluster_bits - 8)) - 1)) + 1;
    return range_make(offset, sectors * SECTOR - (offset & (SECTOR - 1)));
}

void map_free_entry(struct qcow2 *q, uint64_t entry, enum free_type type)
{
    if (entry & ENTRY_COMPRESSED) {
        struct range r = compressed_extent(q, entry);
        qcow2_free_later(q, r.start, r.length, type);
        return;
    }
    uint64_t host = entry & ENTRY_OFFSET_MASK;
    if (!host)
        return;
    if (into_cluster(q, host)) {
        qcow2_signal_corruption(q, false, -1, -1, "Cannot free unaligned cluster %#llx",
                                (unsigned long long)host);
        return;
    }
    qcow2_free_later(q, host, q->cluster_size, type);
}
