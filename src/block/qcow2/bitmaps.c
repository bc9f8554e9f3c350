/* Bitmaps in the image: reading, saving, removing.
 *
 * Saving never changes what the directory on disk names:
 *
 *     bits of all bitmaps, tables, the directory      into clusters that were free
 *       -- refcounts; flush --
 *     header: extension, autoclear bit                one write: from here on the new one counts
 *       -- flush --
 *     old bits, tables and directory                  are freed (step 5 of qcow2.h)
 *
 * Cut before the header: the old directory, whose bitmaps in use say so, and leaked clusters. After
 * it: the new one. QEMU's in_use is set in place, one flag a bitmap and nothing else changes:
 * whichever of these flags a cut leaves unset, no content has changed yet. */
#include "block/qcow2/bitmaps.h"

#include "base/cursor.h"
#include "base/log.h"
#include "block/qcow2/bitmaps_internal.h"
#include "block/qcow2/qcow2.h"

#include <stdio.h>

#define TABLE_RESERVED_MASK ((uint64_t)0xff000000000001fe)
#define TABLE_ALL_ONES ((uint64_t)1)

bool node_is_qcow2(const struct node *n)
{
    return n->driver == &driver_qcow2;
}

static int check_writable(struct qcow2 *q, struct error *err)
{
    if (q->unusable)
        return error_set_errno(err, ENOMEDIUM, "Failed to update bitmap extension");
    if (!qcow2_writable(q))
        return error_set(err, EACCES, "No write access");
    return 0;
}

static uint64_t serial_bytes(uint64_t size_bytes, uint64_t granularity)
{
    return div_round_up(div_round_up(size_bytes, granularity), 8);
}

/* ---- reading ---- */

int qcow2_bitmaps_read(struct node *n, struct qcow2_bitmap_list **ret, struct error *err)
{
    struct qcow2 *q = n->state;
    const struct qcow2_header *h = &q->header;
    CLEANUP(memory_freep) uint8_t *dir = NULL;
    uint64_t length = h->has_bitmaps ? h->bitmap_directory_bytes : 0;

    if (length) {
        dir = malloc(length);
        if (!dir)
            return error_set(err, ENOMEM, "Failed to allocate space for bitmap directory");
        int r = file_read(q, h->bitmap_directory_offset, dir, length);
        if (r < 0)
            return error_set_errno(err, -r, "Failed to read bitmap directory");
    }
    int r = qcow2_bitmap_directory_decode(dir ? dir : (const uint8_t *)"", length,
                                          h->has_bitmaps ? h->nb_bitmaps : 0, n->size_bytes,
                                          q->cluster_size, ret);
    return r < 0 ? error_set_errno(err, -r, "Failed to read bitmap directory") : 0;
}

/* The table of an entry, in host order; each entry checked. */
static int read_bitmap_table(struct qcow2 *q, const struct qcow2_bitmap *b, uint64_t **ret)
{
    uint64_t bytes = (uint64_t)b->table_entries * 8;
    if (b->unfit || !bytes || b->table_offset + bytes > q->fresh_from)
        return -EINVAL;
    CLEANUP(memory_freep) uint64_t *table = malloc(bytes);
    if (!table)
        return -ENOMEM;
    int r = file_read(q, b->table_offset, table, bytes);
    if (r < 0)
        return r;
    for (uint32_t i = 0; i < b->table_entries; i++) {
        uint64_t e = table[i] = be64toh(table[i]);
        uint64_t offset = e & ENTRY_OFFSET_MASK;
        if ((e & TABLE_RESERVED_MASK) || into_cluster(q, offset) ||
            (offset && (e & TABLE_ALL_ONES)))
            return -EINVAL;
    }
    *ret = steal(table);
    return 0;
}

int qcow2_bitmap_load(struct node *n, const struct qcow2_bitmap *b, struct bitmap *bm,
                      struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    CLEANUP(memory_freep) uint64_t *table = NULL;
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(q->cluster_size);
    uint64_t length = bitmap_serial_length(bm);
    int r = buf ? read_bitmap_table(q, b, &table) : -ENOMEM;
    if (r < 0)
        return error_set_errno(
            err, -r, "Could not read bitmap_table table from image for bitmap '%s'", b->name);
    if (clusters_of(q, length) != b->table_entries)
        return error_set_errno(err, EINVAL, "Could not read bitmap '%s' from image", b->name);
    for (uint32_t i = 0; i < b->table_entries; i++) {
        uint64_t first = (uint64_t)i << q->cluster_bits;
        uint64_t offset = table[i] & ENTRY_OFFSET_MASK;
        if (!offset) {
            if (table[i] & TABLE_ALL_ONES)
                bitmap_mark(bm, bitmap_serial_span(bm, first, q->cluster_size));
            continue;
        }
        r = offset < q->fresh_from ? file_read(q, offset, buf, q->cluster_size) : -EINVAL;
        if (r < 0)
            return error_set_errno(err, -r, "Could not read bitmap '%s' from image", b->name);
        bitmap_deserialise(bm, first, buf, q->cluster_size);
    }
    return 0;
}

/* ---- in_use, in place ---- */

static void raw_set_flags(struct qcow2_bitmap *b)
{
    uint32_t flags;
    memcpy(&flags, b->raw + 12, sizeof flags);
    flags = be32toh(flags) & ~(uint32_t)(BITMAP_FLAG_IN_USE | BITMAP_FLAG_AUTO);
    flags |= (b->in_use ? BITMAP_FLAG_IN_USE : 0) | (b->automatic ? BITMAP_FLAG_AUTO : 0);
    flags = htobe32(flags);
    memcpy(b->raw + 12, &flags, sizeof flags);
}

int qcow2_bitmaps_set_in_use(struct node *n, struct qcow2_bitmap_list *list, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    int r = check_writable(q, err);
    if (r < 0)
        return r;
    uint64_t at = q->header.bitmap_directory_offset;
    bool changed = false;
    for (size_t i = 0; i < list->n; i++) {
        struct qcow2_bitmap *b = &list->items[i];
        if (!b->in_use && !b->quarantined) {
            b->in_use = true;
            raw_set_flags(b);
            /* The sector-sized neighbourhood of the flags is one write; the rest of the
             * entry is as it was. */
            r = file_write(q, at + 8, b->raw + 8, 8);
            changed = true;
        }
        if (r < 0)
            return error_set_errno(err, -r, "Can't update bitmap directory");
        at += b->raw_length;
    }
    r = changed ? file_flush(q) : 0;
    return r < 0 ? error_set_errno(err, -r, "Can't update bitmap directory") : 0;
}

/* ---- saving ---- */

/* Clusters taken for a save that the header does not name yet. */
struct taken {
    struct range *items;
    size_t n, capacity;
};

static int take(struct qcow2 *q, struct taken *t, uint64_t bytes, bool whole, uint64_t *offset,
                uint64_t *got)
{
    if (t->n == t->capacity) {
        size_t capacity = t->capacity ? t->capacity * 2 : 32;
        struct range *items = realloc(t->items, capacity * sizeof *items);
        if (!items)
            return -ENOMEM;
        t->items = items;
        t->capacity = capacity;
    }
    bool fresh;
    *got = clusters_of(q, bytes);
    int r = whole ? refcount_alloc_bytes(q, bytes, offset)
                  : refcount_alloc(q, *got, offset, got, &fresh);
    if (r == 0)
        t->items[t->n++] = range_make(*offset, *got << q->cluster_bits);
    return r;
}

static void give_back(struct qcow2 *q, struct taken *t)
{
    for (size_t i = 0; i < t->n && !q->unusable; i++)
        refcount_unalloc(q, t->items[i].start, t->items[i].length >> q->cluster_bits);
}

/* Bits to clusters, in runs; the table gets their places. */
static int store_bits(struct qcow2 *q, const struct bitmap *bm, uint64_t *table, uint32_t n,
                      struct taken *taken)
{
    enum { RUN_BYTES = 4 << 20 };
    uint64_t run_max = max_u64(RUN_BYTES >> q->cluster_bits, 1);
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(run_max << q->cluster_bits);
    if (!buf)
        return -ENOMEM;
    for (uint32_t i = 0; i < n;) {
        uint64_t first = (uint64_t)i << q->cluster_bits;
        enum bitmap_chunk kind = bitmap_serial_kind(bm, first, q->cluster_size);
        if (kind != BITMAP_CHUNK_MIXED) {
            table[i++] = kind == BITMAP_CHUNK_ONES ? TABLE_ALL_ONES : 0;
            continue;
        }
        uint64_t run = 1;
        while (run < run_max && i + run < n &&
               bitmap_serial_kind(bm, first + (run << q->cluster_bits), q->cluster_size) ==
                   BITMAP_CHUNK_MIXED)
            run++;
        uint64_t offset;
        int r = take(q, taken, run << q->cluster_bits, false, &offset, &run);
        if (r < 0)
            return r;
        bitmap_serialise(bm, first, buf, run << q->cluster_bits);
        r = file_write(q, offset, buf, run << q->cluster_bits);
        if (r < 0)
            return r;
        for (uint64_t j = 0; j < run; j++)
            table[i++] = offset + (j << q->cluster_bits);
    }
    return 0;
}

/* Bits and table of one; its directory entry is appended to DIR. */
static int store_one(struct qcow2 *q, const struct qcow2_bitmap_save *s, struct buffer *dir,
                     struct taken *taken, struct error *err)
{
    uint64_t granularity = bitmap_granularity(s->bits);
    uint64_t bytes = bitmap_serial_length(s->bits), n = clusters_of(q, bytes);
    unsigned bits = log2_u64(granularity);
    size_t name_length = strlen(s->name);

    if (!name_length || name_length > QCOW2_BITMAP_NAME_MAX)
        return error_set(err, EINVAL, "Name length exceeds maximum (%u characters)",
                         QCOW2_BITMAP_NAME_MAX);
    if (bits < QCOW2_BITMAP_GRANULARITY_BITS_MIN || bits > QCOW2_BITMAP_GRANULARITY_BITS_MAX)
        return error_set(err, EINVAL, "Granularity of bitmap '%s' is 2^%u, not 2^9 to 2^31",
                         s->name, bits);
    if (n << q->cluster_bits > QCOW2_BITMAP_SERIAL_MAX || n > BITMAP_TABLE_ENTRIES_MAX)
        return error_set(err, EINVAL, "Bitmap '%s' is too big", s->name);
    if (bitmap_size(s->bits) != q->node->size_bytes)
        return error_set(err, EINVAL, "Bitmap '%s' is of %llu bytes, the image of %llu", s->name,
                         (unsigned long long)bitmap_size(s->bits),
                         (unsigned long long)q->node->size_bytes);
    n = max_u64(n, 1); /* of an empty disk: a table must not be empty */

    CLEANUP(memory_freep) uint64_t *table = calloc(n, sizeof *table);
    uint64_t offset, got;
    int r = table ? store_bits(q, s->bits, table, (uint32_t)clusters_of(q, bytes), taken) : -ENOMEM;
    if (r == 0)
        r = take(q, taken, n * 8, true, &offset, &got);
    if (r == 0) {
        for (uint64_t i = 0; i < n; i++)
            table[i] = htobe64(table[i]);
        r = file_write(q, offset, table, n * 8);
    }
    uint8_t *entry = r == 0 ? buffer_reserve(dir, qcow2_bitmap_entry_bytes(s->name)) : NULL;
    if (r == 0 && !entry)
        r = -ENOMEM;
    if (r < 0)
        return error_set_errno(err, -r, "Failed to write bitmap '%s' to file", s->name);
    size_t entry_bytes = qcow2_bitmap_entry_bytes(s->name);
    memset(entry, 0, entry_bytes);
    struct out_cursor c = out_cursor_over(entry, entry_bytes);
    put_be64(&c, offset);
    put_be32(&c, (uint32_t)n);
    put_be32(&c, (s->in_use ? BITMAP_FLAG_IN_USE : 0) | (s->automatic ? BITMAP_FLAG_AUTO : 0));
    put_u8(&c, 1);
    put_u8(&c, (uint8_t)bits);
    put_be16(&c, (uint16_t)name_length);
    put_be32(&c, 0);
    put_bytes(&c, s->name, name_length);
    dir->length += entry_bytes;
    return 0;
}

static void free_bitmap(struct qcow2 *q, const struct qcow2_bitmap *b)
{
    CLEANUP(memory_freep) uint64_t *table = NULL;
    if (read_bitmap_table(q, b, &table) < 0) {
        log_warning("qcow2 '%s': clusters of bitmap '%s' are leaked: its table is not valid",
                    node_name(q->node), b->name);
        return;
    }
    for (uint32_t i = 0; i < b->table_entries; i++)
        if (table[i] & ENTRY_OFFSET_MASK)
            qcow2_free_later(q, table[i] & ENTRY_OFFSET_MASK, q->cluster_size, FREE_OTHER);
    qcow2_free_later(q, b->table_offset, (uint64_t)b->table_entries * 8, FREE_OTHER);
}

/* Writes DIR, of N entries, and turns the header to it. Durable. The old directory is freed. */
static int switch_directory(struct qcow2 *q, const struct buffer *dir, uint32_t n,
                            struct taken *taken, struct error *err)
{
    struct qcow2_header *h = &q->header, old = *h;
    uint64_t offset = 0, got;
    int r = 0;
    if (n > QCOW2_MAX_BITMAPS)
        return error_set(err, EINVAL, "Too many persistent bitmaps");
    if (dir->length > QCOW2_MAX_BITMAP_DIRECTORY_BYTES)
        return error_set(err, EINVAL, "Bitmap directory is too large");
    if (n) {
        r = take(q, taken, dir->length, true, &offset, &got);
        if (r == 0)
            r = file_write(q, offset, dir->data, dir->length);
    }
    if (r == 0)
        r = qcow2_sync(q);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to update bitmap extension");

    h->has_bitmaps = n > 0;
    h->nb_bitmaps = n;
    h->bitmap_directory_offset = offset;
    h->bitmap_directory_bytes = n ? dir->length : 0;
    h->autoclear &= ~QCOW2_AUTOCLEAR_BITMAPS;
    if (n)
        h->autoclear |= QCOW2_AUTOCLEAR_BITMAPS;
    r = qcow2_write_header(q);
    bool unknown = r < 0 && r != -ENOSPC; /* -ENOSPC may be ours: nothing was written */
    if (r == 0) {
        r = file_flush(q);
        unknown = r < 0;
    }
    if (r < 0) {
        h->has_bitmaps = old.has_bitmaps;
        h->nb_bitmaps = old.nb_bitmaps;
        h->bitmap_directory_offset = old.bitmap_directory_offset;
        h->bitmap_directory_bytes = old.bitmap_directory_bytes;
        h->autoclear = old.autoclear;
        if (unknown)
            taken->n = 0; /* the disk may name them: leaked rather than given away */
        return error_set_errno(err, -r, "Failed to update bitmap extension");
    }
    taken->n = 0;
    if (old.has_bitmaps && old.bitmap_directory_bytes)
        qcow2_free_later(q, old.bitmap_directory_offset, old.bitmap_directory_bytes, FREE_OTHER);
    return 0;
}

static const struct qcow2_bitmap_save *saved_as(const struct qcow2_bitmap_save *list, size_t count,
                                                const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (!strcmp(list[i].name, name))
            return &list[i];
    return NULL;
}

int qcow2_bitmaps_save(struct node *n, const struct qcow2_bitmap_save *list, size_t count,
                       struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *old = NULL;
    CLEANUP(buffer_fini) struct buffer dir = {0};
    struct taken taken = {0};
    uint32_t entries = 0;

    int r = check_writable(q, err);
    if (r == 0 && q->header.version < 3 && count)
        r = error_set(err, EINVAL, "Cannot store dirty bitmaps in qcow2 v2 files");
    if (r == 0)
        r = qcow2_bitmaps_read(n, &old, err);
    if (r < 0)
        return r;
    if (old->broken[0])
        log_warning("qcow2 '%s': %s; what follows is dropped", node_name(n), old->broken);

    /* Kept: what we do not understand and QEMU might. Not kept: what it would refuse. */
    for (size_t i = 0; r == 0 && i < old->n; i++) {
        struct qcow2_bitmap *b = &old->items[i];
        if (b->unfit) {
            log_warning("qcow2 '%s': bitmap '%s' is dropped: %s", node_name(n), b->name, b->reason);
            continue;
        }
        if (!b->quarantined || saved_as(list, count, b->name))
            continue;
        r = buffer_append(&dir, b->raw, b->raw_length);
        entries++;
    }
    for (size_t i = 0; r == 0 && i < count; i++) {
        const struct qcow2_bitmap_save *s = &list[i];
        if (s->bits) {
            r = store_one(q, s, &dir, &taken, err);
        } else {
            struct qcow2_bitmap *b = qcow2_bitmap_find(old, s->name);
            if (!b)
                continue;
            if (!b->quarantined) { /* one that is not understood is kept to the bit */
                b->in_use = s->in_use;
                b->automatic = s->automatic;
                raw_set_flags(b);
            }
            r = buffer_append(&dir, b->raw, b->raw_length);
        }
        entries++;
    }
    if (r == 0 && (entries || q->header.has_bitmaps))
        r = switch_directory(q, &dir, entries, &taken, err);
    if (r < 0)
        give_back(q, &taken);
    else
        for (size_t i = 0; i < old->n; i++) {
            const struct qcow2_bitmap *b = &old->items[i];
            const struct qcow2_bitmap_save *s = saved_as(list, count, b->name);
            bool kept = !b->unfit && (s ? !s->bits : b->quarantined);
            if (!kept && !b->unfit)
                free_bitmap(q, b);
        }
    free(taken.items);
    return r < 0 ? error_set_errno(err, -r, "Failed to update bitmap extension") : 0;
}

int qcow2_bitmap_remove(struct node *n, const char *name, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *old = NULL;
    CLEANUP(buffer_fini) struct buffer dir = {0};
    struct taken taken = {0};
    const struct qcow2_bitmap *gone = NULL;
    uint32_t entries = 0;

    int r = qcow2_bitmaps_read(n, &old, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < old->n; i++) {
        const struct qcow2_bitmap *b = &old->items[i];
        if (!gone && !strcmp(b->name, name)) {
            gone = b;
            continue;
        }
        r = buffer_append(&dir, b->raw, b->raw_length);
        entries++;
    }
    if (r < 0)
        return error_set_errno(err, -r, "Failed to update bitmap extension");
    if (!gone)
        return 0;
    r = check_writable(q, err);
    if (r == 0)
        r = switch_directory(q, &dir, entries, &taken, err);
    if (r < 0)
        give_back(q, &taken);
    else if (!gone->unfit)
        free_bitmap(q, gone);
    free(taken.items);
    return r;
}

int qcow2_bitmap_check_new(struct node *n, const char *name, uint64_t granularity_bytes,
                           uint32_t others, uint64_t others_bytes, struct error *err)
{
    struct qcow2 *q = n->state;
    unsigned bits = log2_u64(granularity_bytes);
    uint64_t bytes = serial_bytes(n->size_bytes, granularity_bytes);
    int r;

    if (q->header.version < 3)
        r = error_set(err, EINVAL, "Cannot store dirty bitmaps in qcow2 v2 files");
    else if (bits > QCOW2_BITMAP_GRANULARITY_BITS_MAX)
        r = error_set(err, EINVAL, "Granularity exceeds maximum (%llu bytes)",
                      1ULL << QCOW2_BITMAP_GRANULARITY_BITS_MAX);
    else if (bits < QCOW2_BITMAP_GRANULARITY_BITS_MIN)
        r = error_set(err, EINVAL, "Granularity is under minimum (%llu bytes)",
                      1ULL << QCOW2_BITMAP_GRANULARITY_BITS_MIN);
    else if (clusters_of(q, bytes) << q->cluster_bits > QCOW2_BITMAP_SERIAL_MAX)
        r = error_set(err, EINVAL,
                      "Too much space will be occupied by the bitmap. Use larger granularity");
    else if (strlen(name) > QCOW2_BITMAP_NAME_MAX)
        r = error_set(err, EINVAL, "Name length exceeds maximum (%u characters)",
                      QCOW2_BITMAP_NAME_MAX);
    else if (others + 1 > QCOW2_MAX_BITMAPS)
        r = error_set(err, EINVAL, "Maximum number of persistent bitmaps is already reached");
    else if (others_bytes + qcow2_bitmap_entry_bytes(name) > QCOW2_MAX_BITMAP_DIRECTORY_BYTES)
        r = error_set(err, EINVAL, "Not enough space in the bitmap directory");
    else
        return 0;
    return err ? error_wrap(err, "Can't make bitmap '%s' persistent in '%s'", name, node_name(n))
               : r;
}
