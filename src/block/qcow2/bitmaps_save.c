/* Bitmaps in the image: saving, removing, and what may be added.
 *
 * Saving never changes what the directory on disk names:
 *
 *     bits of all bitmaps, tables, the directory      into clusters that were free
 *       -- refcounts; flush --                        (guest data, too, is durable then)
 *     header: extension, autoclear bit                one write: from here on the new one counts
 *       -- flush --
 *     old bits, tables and directory                  are freed (step 5 of qcow2.h)
 *
 * Cut before the header: the old directory, whose bitmaps are in use and say so, and leaked
 * clusters. After it: the new one.
 *
 * No room, or an error, before the header: what was taken is given back, the old directory stands.
 * When the header's own write or flush fails, nobody knows which one the disk has. Then the old
 * header is written once more; if that fails, too, the node is `unsettled`: the clusters of both
 * stay counted, and nothing may change before the old header is there (a directory with in_use 0
 * must not be found beside newer content). */
#include "block/qcow2/bitmaps.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/qcow2/bitmaps_internal.h"
#include "block/qcow2/qcow2.h"

/* ---- clusters taken for a save that the header does not name yet ---- */

struct taken {
    struct range *items;
    size_t n, capacity;
};

static void taken_fini(struct taken *t)
{
    free(t->items);
}

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
    /* (One cluster is always whole, and the search for many begins at the first free one.) */
    int r = whole && *got > 1 ? refcount_alloc_bytes(q, bytes, offset)
                              : refcount_alloc(q, *got, offset, got, &fresh);
    if (r == 0)
        t->items[t->n++] = range_make(*offset, *got << q->cluster_bits);
    return r;
}

/* All but the first KEEP. */
static void give_back(struct qcow2 *q, struct taken *t, size_t keep)
{
    for (; t->n > keep; t->n--) {
        struct range r = t->items[t->n - 1];
        if (!q->unusable)
            refcount_unalloc(q, r.start, r.length >> q->cluster_bits);
    }
}

/* ---- one bitmap ---- */

/* The last cluster is never "all ones" unless all its bits are of the disk: QEMU would set those
 * behind the end, too, and its jobs would walk there. */
static enum bitmap_chunk chunk_kind(const struct qcow2 *q, const struct bitmap *bm, uint64_t first)
{
    uint64_t bits = div_round_up(bitmap_size(bm), bitmap_granularity(bm));
    enum bitmap_chunk kind = bitmap_serial_kind(bm, first, q->cluster_size);

    return kind == BITMAP_CHUNK_ONES && (first + q->cluster_size) * 8 > bits ? BITMAP_CHUNK_MIXED
                                                                             : kind;
}

/* Bits to clusters, in runs; the table gets their places. */
static int store_bits(struct qcow2 *q, const struct bitmap *bm, uint64_t *table, uint32_t n,
                      struct taken *taken)
{
    enum { RUN_BYTES = 4 << 20 };
    uint64_t run_max = min_u64(max_u64(RUN_BYTES >> q->cluster_bits, 1), n);
    CLEANUP(memory_freep) uint8_t *buf = NULL; /* many have no use for it */
    for (uint32_t i = 0; i < n;) {
        uint64_t first = (uint64_t)i << q->cluster_bits;
        enum bitmap_chunk kind = chunk_kind(q, bm, first);
        if (kind != BITMAP_CHUNK_MIXED) {
            table[i++] = kind == BITMAP_CHUNK_ONES ? BITMAP_TABLE_ALL_ONES : 0;
            continue;
        }
        uint64_t run = 1;
        while (run < run_max && i + run < n &&
               chunk_kind(q, bm, first + (run << q->cluster_bits)) == BITMAP_CHUNK_MIXED)
            run++;
        uint64_t offset;
        if (!buf && !(buf = block_buffer(run_max << q->cluster_bits)))
            return -ENOMEM;
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

int qcow2_bitmap_check_size(struct node *n, uint64_t granularity_bytes, uint64_t size_bytes,
                            struct error *err)
{
    const struct qcow2 *q = n->state;
    uint64_t bytes = qcow2_bitmap_serial_bytes(size_bytes, granularity_bytes);

    if (clusters_of(q, bytes) << q->cluster_bits > QCOW2_BITMAP_SERIAL_MAX)
        return error_set(err, EINVAL,
                         "Too much space will be occupied by the bitmap. Use larger granularity");
    return 0;
}

static int check_storable(struct qcow2 *q, const struct qcow2_bitmap_save *s, struct error *err)
{
    unsigned bits = log2_u64(bitmap_granularity(s->bits));

    if (!*s->name || strlen(s->name) > QCOW2_BITMAP_NAME_MAX)
        return error_set(err, EINVAL, "Name length exceeds maximum (%u characters)",
                         QCOW2_BITMAP_NAME_MAX);
    if (bits < QCOW2_BITMAP_GRANULARITY_BITS_MIN || bits > QCOW2_BITMAP_GRANULARITY_BITS_MAX)
        return error_set(err, EINVAL, "Granularity of bitmap '%s' is 2^%u, not 2^9 to 2^31",
                         s->name, bits);
    if (bitmap_size(s->bits) != q->node->size_bytes)
        return error_set(err, EINVAL, "Bitmap '%s' is of %llu bytes, the image of %llu", s->name,
                         (unsigned long long)bitmap_size(s->bits),
                         (unsigned long long)q->node->size_bytes);
    if (!q->node->size_bytes) /* a table must not be empty, nor longer than the bits */
        return error_set(err, EINVAL, "The image is empty");
    return qcow2_bitmap_check_size(q->node, bitmap_granularity(s->bits), bitmap_size(s->bits), err);
}

/* Bits and table of one; its directory entry is appended to DIR. On error nothing is appended. */
static int store_one(struct qcow2 *q, const struct qcow2_bitmap_save *s, struct buffer *dir,
                     struct taken *taken, struct error *err)
{
    size_t entry_bytes = qcow2_bitmap_entry_bytes(s->name);
    uint64_t offset, got;

    int r = check_storable(q, s, err);
    if (r < 0)
        return error_wrap(err, "Bitmap '%s' doesn't satisfy the constraints", s->name);
    uint32_t n = (uint32_t)clusters_of(q, bitmap_serial_length(s->bits));
    CLEANUP(memory_freep) uint64_t *table = calloc(n, sizeof *table);
    r = table ? store_bits(q, s->bits, table, n, taken) : -ENOMEM;
    if (r == 0)
        r = take(q, taken, (uint64_t)n * 8, true, &offset, &got);
    if (r == 0) {
        for (uint32_t i = 0; i < n; i++)
            table[i] = htobe64(table[i]);
        r = file_write(q, offset, table, (uint64_t)n * 8);
    }
    uint8_t *entry = r == 0 ? buffer_reserve(dir, entry_bytes) : NULL;
    if (r == 0 && !entry)
        r = -ENOMEM;
    if (r < 0)
        return error_set_errno(err, -r, "Failed to write bitmap '%s' to file", s->name);
    qcow2_bitmap_entry_encode(entry, s->name, offset, n, log2_u64(bitmap_granularity(s->bits)),
                              false, s->automatic);
    dir->length += entry_bytes;
    return 0;
}

/* ---- the directory ---- */

static void free_bitmap(struct qcow2 *q, const struct qcow2_bitmap *b, bool leak)
{
    CLEANUP(memory_freep) uint64_t *table = NULL;
    if (leak || qcow2_bitmap_read_table(q, b, &table) < 0) {
        log_warning("qcow2 '%s': clusters of bitmap '%s' are leaked: they may be in use",
                    node_name(q->node), b->name);
        return;
    }
    for (uint32_t i = 0; i < b->table_entries; i++)
        if (table[i] & ENTRY_OFFSET_MASK)
            qcow2_free_later(q, table[i] & ENTRY_OFFSET_MASK, q->cluster_size, FREE_ALWAYS);
    qcow2_free_later(q, b->table_offset, (uint64_t)b->table_entries * 8, FREE_OTHER);
}

struct place {
    uint64_t offset, bytes;
    uint32_t n; /* 0: no directory, no extension */
};

static struct place place_of(const struct qcow2_header *h)
{
    return h->has_bitmaps ? (struct place){h->bitmap_directory_offset, h->bitmap_directory_bytes,
                                           h->nb_bitmaps}
                          : (struct place){0};
}

/* The header says P, durably, when this returns 0; on an error the disk may have either. */
static int turn_header(struct qcow2 *q, struct place p)
{
    struct qcow2_header *h = &q->header;

    h->has_bitmaps = p.n > 0;
    h->nb_bitmaps = p.n;
    h->bitmap_directory_offset = p.offset;
    h->bitmap_directory_bytes = p.bytes;
    if (p.n)
        h->autoclear |= QCOW2_AUTOCLEAR_BITMAPS;
    else
        h->autoclear &= ~QCOW2_AUTOCLEAR_BITMAPS;
    int r = qcow2_write_header(q);
    return r < 0 ? r : file_flush(q);
}

int qcow2_bitmaps_settle(struct node *n)
{
    SHIELD();
    struct qcow2 *q = n->state;

    if (!q->bitmaps_unsettled)
        return 0;
    int r = turn_header(q, place_of(&q->header));
    if (r == 0)
        q->bitmaps_unsettled = false;
    return r;
}

/* Writes DIR, of N entries, and turns the header to it. Durable. The old directory is freed. */
static int switch_directory(struct qcow2 *q, const struct buffer *dir, uint32_t n,
                            struct taken *taken, bool free_old, struct error *err)
{
    struct place old = place_of(&q->header), new = {0, dir->length, n};
    uint64_t got;
    int r = 0;

    if (n > QCOW2_MAX_BITMAPS)
        return error_set(err, EINVAL, "Too many persistent bitmaps");
    if (dir->length > QCOW2_MAX_BITMAP_DIRECTORY_BYTES)
        return error_set(err, EINVAL, "Bitmap directory is too large");
    if (n) {
        r = take(q, taken, dir->length, true, &new.offset, &got);
        if (r == 0)
            r = file_write(q, new.offset, dir->data, dir->length);
    }
    if (r == 0 && !BROKEN(guard_bits_with_flag))
        r = qcow2_sync(q);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to update bitmap extension");

    r = turn_header(q, new);
    if (r < 0) {
        if (turn_header(q, old) < 0) {
            q->bitmaps_unsettled = true;
            taken->n = 0; /* the disk may name them: leaked rather than given away */
        }
        return error_set_errno(err, -r, "Failed to update bitmap extension");
    }
    q->bitmaps_unsettled = false;
    taken->n = 0;
    if (old.bytes && free_old)
        qcow2_free_later(q, old.offset, old.bytes, FREE_OTHER);
    return 0;
}

int qcow2_bitmaps_drop(struct node *n, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    CLEANUP(taken_fini) struct taken taken = {0};
    struct buffer none = {0};

    int r = qcow2_bitmaps_check_writable(q, err);
    return r < 0 ? r : switch_directory(q, &none, 0, &taken, false, err);
}

/* ---- all of them ---- */

struct saving {
    struct qcow2 *q;
    struct qcow2_bitmap_save **by_name; /* sorted */
    bool *done;                         /* of the caller's list: has its place in the directory */
    struct qcow2_bitmap_save *list;
    size_t count;
    struct buffer dir;
    uint32_t entries;
    struct taken taken;
    bool strict;
};

static void saving_fini(struct saving *s)
{
    free(s->by_name);
    free(s->done);
    buffer_fini(&s->dir);
    taken_fini(&s->taken);
}

static int by_name(const void *a, const void *b)
{
    const struct qcow2_bitmap_save *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static int by_name_of(const void *key, const void *b)
{
    const struct qcow2_bitmap_save *const *y = b;
    return strcmp(key, (*y)->name);
}

static int keep_as_it_is(struct saving *s, const struct qcow2_bitmap *b)
{
    s->entries++;
    return buffer_append(&s->dir, b->raw, b->raw_length);
}

static void report_unfit(struct qcow2 *q, const struct qcow2_bitmap *b)
{
    log_warning("qcow2 '%s': bitmap '%s' is dropped from the directory: %s", node_name(q->node),
                b->name, b->reason);
}

/* OLD's table leads nowhere or to what is somebody else's; QEMU's check fails on it. */
static int put_empty(struct saving *s, const struct qcow2_bitmap *old)
{
    const uint64_t table = 0;
    uint64_t offset, got;

    int r = take(s->q, &s->taken, sizeof table, true, &offset, &got);
    if (r == 0)
        r = file_write(s->q, offset, &table, sizeof table);
    uint8_t *entry = r == 0 ? buffer_reserve(&s->dir, qcow2_bitmap_entry_bytes(old->name)) : NULL;
    if (r < 0 || !entry)
        return r < 0 ? r : -ENOMEM;
    qcow2_bitmap_entry_encode(entry, old->name, offset, 1, old->granularity_bits, true,
                              old->automatic);
    s->dir.length += qcow2_bitmap_entry_bytes(old->name);
    s->entries++;
    return 0;
}

/* SAVE in the place of OLD (NULL: it is new). *REPLACED: nothing names OLD's clusters any more. */
static int put_one(struct saving *s, struct qcow2_bitmap_save *save, struct qcow2_bitmap *old,
                   bool *replaced, struct error *err)
{
    size_t taken_before = s->taken.n;
    struct error why = ERROR_INIT;

    *replaced = false;
    s->done[save - s->list] = true;
    if (!save->bits)
        return !old ? 0 : old->foreign ? keep_as_it_is(s, old) : put_empty(s, old);
    int r = store_one(s->q, save, &s->dir, &s->taken, &why);
    if (r == 0) {
        s->entries++;
        *replaced = old != NULL;
        return 0;
    }
    if (s->strict) {
        *err = why;
        return r;
    }
    log_line(LOG_LEVEL_INFO, "Lost persistent bitmap '%s' of node '%s': %s", save->name,
             node_name(s->q->node), why.text);
    give_back(s->q, &s->taken, taken_before);
    if (!old)
        return 0;
    if (save->leak && put_empty(s, old) == 0)
        return 0;
    give_back(s->q, &s->taken, taken_before);
    old->in_use = true; /* it is, but that must not depend on the caller */
    qcow2_bitmap_update_raw(old);
    return keep_as_it_is(s, old);
}

/* The new directory; REPLACED says of which old ones the clusters are free then. */
static int put_all(struct saving *s, struct qcow2_bitmap_list *old, bool *replaced,
                   struct error *err)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < old->n; i++) {
        struct qcow2_bitmap *b = &old->items[i];
        if (b->unfit) {
            report_unfit(s->q, b);
            continue;
        }
        struct qcow2_bitmap_save **save =
            bsearch(b->name, s->by_name, s->count, sizeof *s->by_name, by_name_of);
        r = save ? put_one(s, *save, b, &replaced[i], err) : keep_as_it_is(s, b);
        if (save)
            b->leak = (*save)->leak;
    }
    for (size_t i = 0; r == 0 && i < s->count; i++) {
        bool ignored;
        if (!s->done[i])
            r = put_one(s, &s->list[i], NULL, &ignored, err);
    }
    return r;
}

int qcow2_bitmaps_save(struct node *n, struct qcow2_bitmap_save *list, size_t count, bool strict,
                       struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct error own = ERROR_INIT;
    CLEANUP(saving_fini) struct saving s = {.q = q, .list = list, .count = count, .strict = strict};
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *old = NULL;
    CLEANUP(memory_freep) bool *replaced = NULL;

    if (!err)
        err = &own;
    int r = qcow2_bitmaps_check_writable(q, err);
    if (r == 0 && q->header.version < 3 && count)
        r = error_set(err, EINVAL, "Cannot store dirty bitmaps in qcow2 v2 files");
    if (r == 0)
        r = qcow2_bitmaps_read(n, &old, err);
    if (r < 0)
        return r;
    if (old->broken[0])
        log_warning("qcow2 '%s': %s; what was not read is dropped", node_name(n), old->broken);

    s.by_name = malloc((count + 1) * sizeof *s.by_name);
    s.done = calloc(count + 1, sizeof *s.done);
    replaced = calloc(old->n + 1, sizeof *replaced);
    if (!s.by_name || !s.done || !replaced)
        return error_set_errno(err, ENOMEM, "Failed to update bitmap extension");
    for (size_t i = 0; i < count; i++)
        s.by_name[i] = &list[i];
    qsort(s.by_name, count, sizeof *s.by_name, by_name);

    r = put_all(&s, old, replaced, err);
    if (r == 0 && (s.entries || q->header.has_bitmaps))
        r = switch_directory(q, &s.dir, s.entries, &s.taken, !old->misplaced, err);
    if (r < 0) {
        give_back(q, &s.taken, 0);
        return error_set_errno(err, -r, "Failed to update bitmap extension");
    }
    for (size_t i = 0; i < old->n; i++)
        if (replaced[i])
            free_bitmap(q, &old->items[i], old->items[i].leak);
    /* The node may be read-only in a moment, and write nothing more. The second round writes the
     * refcounts that the first has lowered; what fails now leaves leaks. */
    if (strict && (qcow2_sync(q) < 0 || qcow2_sync(q) < 0))
        log_warning("qcow2 '%s': clusters of replaced bitmaps are leaked", node_name(n));
    return 0;
}

int qcow2_bitmap_remove(struct node *n, const char *name, bool leak, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *old = NULL;
    CLEANUP(saving_fini) struct saving s = {.q = q};
    const struct qcow2_bitmap *gone = NULL;

    int r = qcow2_bitmaps_read(n, &old, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < old->n; i++) {
        const struct qcow2_bitmap *b = &old->items[i];
        if (b->unfit)
            report_unfit(q, b);
        else if (!strcmp(b->name, name))
            gone = b;
        else
            r = keep_as_it_is(&s, b);
    }
    if (r < 0)
        return error_set_errno(err, -r, "Failed to update bitmap extension");
    if (!gone)
        return 0;
    r = qcow2_bitmaps_check_writable(q, err);
    if (r == 0)
        r = switch_directory(q, &s.dir, s.entries, &s.taken, true, err);
    if (r < 0) {
        give_back(q, &s.taken, 0);
        return r;
    }
    free_bitmap(q, gone, leak);
    return 0;
}

int qcow2_bitmap_check_new(struct node *n, const char *name, uint64_t granularity_bytes,
                           uint32_t others, uint64_t others_bytes, struct error *err)
{
    struct qcow2 *q = n->state;
    unsigned bits = log2_u64(granularity_bytes);
    int r;

    if (q->header.version < 3)
        r = error_set(err, EINVAL, "Cannot store dirty bitmaps in qcow2 v2 files");
    else if (bits > QCOW2_BITMAP_GRANULARITY_BITS_MAX)
        r = error_set(err, EINVAL, "Granularity exceeds maximum (%llu bytes)",
                      1ULL << QCOW2_BITMAP_GRANULARITY_BITS_MAX);
    else if (bits < QCOW2_BITMAP_GRANULARITY_BITS_MIN)
        r = error_set(err, EINVAL, "Granularity is under minimum (%llu bytes)",
                      1ULL << QCOW2_BITMAP_GRANULARITY_BITS_MIN);
    else if ((r = qcow2_bitmap_check_size(n, granularity_bytes, n->size_bytes, err)) < 0)
        ;
    else if (strlen(name) > QCOW2_BITMAP_NAME_MAX)
        r = error_set(err, EINVAL, "Name length exceeds maximum (%u characters)",
                      QCOW2_BITMAP_NAME_MAX);
    else if (others + 1 > QCOW2_MAX_BITMAPS)
        r = error_set(err, EINVAL, "Maximum number of persistent bitmaps is already reached");
    else if (others_bytes + qcow2_bitmap_entry_bytes(name) > QCOW2_MAX_BITMAP_DIRECTORY_BYTES)
        r = error_set(err, EINVAL, "Not enough space in the bitmap directory");
    if (r < 0 && err)
        error_wrap(err, "Can't make bitmap '%s' persistent in '%s'", name, node_name(n));
    return r;
}
