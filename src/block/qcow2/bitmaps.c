/* Bitmaps in the image: reading them, and telling that they are in use.
 *
 * QEMU's in_use is set in place, one flag a bitmap, and nothing else changes in the directory:
 * whichever of these flags a cut leaves unset, no content has changed yet. (QEMU takes the
 * autoclear bit away for the time of that write; a cut there loses all bitmaps.)
 *
 * Bits are believed only when table and clusters are counted once, lie in the file, and are nobody
 * else's: what a damaged image names twice, the other user may have written. Such a bitmap is
 * quarantined, and its clusters are never freed. */
#include "block/qcow2/bitmaps.h"

#include "base/broken.h"
#include "block/qcow2/bitmaps_internal.h"
#include "block/qcow2/qcow2.h"

#include <stdio.h>

bool node_is_qcow2(const struct node *n)
{
    return n->driver == &driver_qcow2;
}

int qcow2_bitmaps_check_writable(struct qcow2 *q, struct error *err)
{
    if (qcow2_unusable(q))
        return error_set_errno(err, ENOMEDIUM, "Failed to update bitmap extension");
    if (!qcow2_writable(q))
        return error_set(err, EACCES, "No write access");
    return 0;
}

uint64_t qcow2_bitmap_serial_bytes(uint64_t size_bytes, uint64_t granularity)
{
    return div_round_up(div_round_up(size_bytes, granularity), 8);
}

const char *qcow2_bitmap_overlap(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    bool has_bitmaps = q->header.has_bitmaps;

    q->header.has_bitmaps = false; /* the directory is not asked about */
    const char *what = metadata_overlap(q, offset, length, META_NONE);
    q->header.has_bitmaps = has_bitmaps;
    return what;
}

/* ---- the directory ---- */

static int misplaced(struct qcow2 *q, struct qcow2_bitmap_list **ret)
{
    const struct qcow2_header *h = &q->header;
    uint64_t offset = h->bitmap_directory_offset, bytes = h->bitmap_directory_bytes;
    const char *what = NULL;

    if (!range_fits(offset, bytes, q->fresh_from))
        what = "the end of the file";
    else if (bytes)
        what = qcow2_bitmap_overlap(q, offset, bytes);
    if (!what)
        return 0;
    struct qcow2_bitmap_list *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->misplaced = true;
    snprintf(l->broken, sizeof l->broken,
             "The bitmap directory of %llu bytes at %#llx overlaps with %s",
             (unsigned long long)bytes, (unsigned long long)offset, what);
    *ret = l;
    return 1;
}

static int read_directory(struct qcow2 *q, struct qcow2_bitmap_list **ret)
{
    const struct qcow2_header *h = &q->header;
    CLEANUP(memory_freep) uint8_t *dir = NULL;
    int r = h->has_bitmaps ? misplaced(q, ret) : 0;
    if (r)
        return r < 0 ? r : 0;
    for (;;) {
        uint64_t offset = h->bitmap_directory_offset;
        uint64_t length = h->has_bitmaps ? h->bitmap_directory_bytes : 0;
        free(dir);
        dir = malloc(length + 1);
        r = !dir ? -ENOMEM : length ? file_read(q, offset, dir, length) : 0;
        if (r < 0)
            return r;
        /* A query does not hold the graph's lock: the directory may have been replaced. */
        if (length && (!h->has_bitmaps || h->bitmap_directory_offset != offset))
            continue;
        return qcow2_bitmap_directory_decode(dir, length, h->has_bitmaps ? h->nb_bitmaps : 0,
                                             q->node->size_bytes, q->cluster_size, ret);
    }
}

int qcow2_bitmaps_read(struct node *n, struct qcow2_bitmap_list **ret, struct error *err)
{
    SHIELD();
    int r = read_directory(n->state, ret);
    return r < 0 ? error_set_errno(err, -r, "Failed to read bitmap directory") : 0;
}

/* ---- tables ---- */

int qcow2_bitmap_read_table(struct qcow2 *q, const struct qcow2_bitmap *b, uint64_t **ret)
{
    uint64_t bytes = (uint64_t)b->table_entries * 8;
    if (b->unfit || !bytes || !range_fits(b->table_offset, bytes, q->fresh_from))
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
        if ((e & BITMAP_TABLE_RESERVED_MASK) || into_cluster(q, offset) ||
            (offset && (e & BITMAP_TABLE_ALL_ONES)))
            return -EINVAL;
    }
    *ret = steal(table);
    return 0;
}

/* ---- whose clusters are they? ---- */

enum { CLAIMS_MIN = 4096 };

/* Who names what: first tables, then each cluster of bits. */
struct claim {
    uint64_t offset, end;
    size_t index; /* in the list */
};

struct claims {
    struct claim *items;
    size_t n, capacity;
};

static int by_offset(const void *a, const void *b)
{
    const struct claim *x = a, *y = b;
    return x->offset != y->offset ? (x->offset < y->offset ? -1 : 1)
                                  : (x->index < y->index ? -1 : x->index > y->index);
}

static void clash(struct qcow2_bitmap_list *l, const struct claim *c)
{
    l->items[c->index].leak = true;
    qcow2_bitmap_quarantine(&l->items[c->index], "its cluster at %#llx is named twice",
                            (unsigned long long)c->offset);
}

/* All that overlaps clashes; what is left stands for each place once, and so is bounded by the
 * file, whatever the tables say. */
static void settle_claims(struct qcow2_bitmap_list *l, struct claims *c)
{
    size_t kept = 0;

    if (c->n)
        qsort(c->items, c->n, sizeof *c->items, by_offset);
    for (size_t i = 0; i < c->n; i++) {
        struct claim *last = kept ? &c->items[kept - 1] : NULL;
        if (!last || last->end <= c->items[i].offset) {
            c->items[kept++] = c->items[i];
            continue;
        }
        clash(l, last);
        clash(l, &c->items[i]);
        last->end = max_u64(last->end, c->items[i].end);
    }
    c->n = kept;
}

static int claim(struct qcow2_bitmap_list *l, struct claims *c, struct claim one)
{
    if (c->n == c->capacity) {
        settle_claims(l, c);
        if (c->n * 2 >= c->capacity) {
            size_t capacity = c->capacity ? c->capacity * 2 : CLAIMS_MIN;
            struct claim *items = realloc(c->items, capacity * sizeof *items);
            if (!items)
                return -ENOMEM;
            c->items = items;
            c->capacity = capacity;
        }
    }
    c->items[c->n++] = one;
    return 0;
}

/* Asks for no refcount that would be found to be corrupt: that is not for this file to say. */
static bool is_counted_once(struct qcow2 *q, uint64_t cluster)
{
    uint64_t index = cluster >> q->refblock_bits;
    uint64_t block = index < q->reftable.n ? q->reftable.entries[index] & REFTABLE_OFFSET_MASK : 0;
    uint16_t count;

    if (!block || into_cluster(q, block) || block >= q->fresh_from)
        return false;
    return refcount_get(q, cluster, &count) == 0 && count == 1;
}

/* Why the clusters are not a bitmap's own; NULL: they are. */
static const char *not_its_own(struct qcow2 *q, uint64_t offset, uint64_t bytes)
{
    if (!range_fits(offset, bytes, q->fresh_from))
        return "the end of the file";
    const char *what = metadata_overlap(q, offset, bytes, META_NONE);
    if (what)
        return what;
    if (q->header.incompatible & QCOW2_INCOMPAT_DIRTY)
        return NULL; /* nobody can say from the counts */
    for (uint64_t i = 0; i < clusters_of(q, bytes); i++)
        if (!is_counted_once(q, (offset >> q->cluster_bits) + i))
            return "free space, or something else";
    return NULL;
}

static struct claim table_of(const struct qcow2 *q, const struct qcow2_bitmap_list *l, size_t i)
{
    const struct qcow2_bitmap *b = &l->items[i];
    uint64_t end = b->table_offset + ((uint64_t)b->table_entries * 8);
    return (struct claim){b->table_offset, align_up(end, q->cluster_size), i};
}

static void check_table(struct qcow2 *q, struct qcow2_bitmap *b)
{
    const char *what = not_its_own(q, b->table_offset, (uint64_t)b->table_entries * 8);

    if (!what)
        return;
    b->leak = true;
    qcow2_bitmap_quarantine(b, "its table at %#llx overlaps with %s",
                            (unsigned long long)b->table_offset, what);
}

/* Its table is its own. */
static int check_bits(struct qcow2 *q, struct qcow2_bitmap_list *l, size_t index,
                      struct claims *claims, uint64_t *bits_left)
{
    struct qcow2_bitmap *b = &l->items[index];
    CLEANUP(memory_freep) uint64_t *table = NULL;
    uint64_t serial =
        qcow2_bitmap_serial_bytes(q->node->size_bytes, (uint64_t)1 << b->granularity_bits);
    uint64_t bits = 0; /* bytes of them */

    int r = qcow2_bitmap_read_table(q, b, &table);
    if (r == -ENOMEM)
        return r;
    if (r < 0) {
        b->leak = true;
        qcow2_bitmap_quarantine(b, "its table at %#llx cannot be read: %s",
                                (unsigned long long)b->table_offset, strerror(-r));
        return 0;
    }
    if (!b->in_use && clusters_of(q, serial) != b->table_entries)
        qcow2_bitmap_quarantine(b, "its table has %u entries, not %llu", b->table_entries,
                                (unsigned long long)clusters_of(q, serial));
    for (uint32_t i = 0; r == 0 && i < b->table_entries; i++) {
        uint64_t at = table[i] & ENTRY_OFFSET_MASK;
        const char *what = at ? not_its_own(q, at, q->cluster_size) : NULL;
        if (what) {
            b->leak = true;
            qcow2_bitmap_quarantine(b, "its bits at %#llx overlap with %s", (unsigned long long)at,
                                    what);
            return 0;
        }
        if (table[i])
            bits += q->cluster_size;
        if (at)
            r = claim(l, claims, (struct claim){at, at + q->cluster_size, index});
    }
    if (r < 0 || b->in_use || b->quarantined)
        return r;
    if (bits > *bits_left)
        qcow2_bitmap_quarantine(b, "no memory for %llu bytes of bits, %llu are left",
                                (unsigned long long)bits, (unsigned long long)*bits_left);
    else
        *bits_left -= bits;
    return r;
}

/* Tables first: those that are not their owners' say nothing about bits. */
int qcow2_bitmaps_check(struct node *n, struct qcow2_bitmap_list *l, uint64_t bits_max)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct claims claims = {0};
    int r = 0;

    for (size_t i = 0; r == 0 && i < l->n; i++) {
        if (l->items[i].unfit)
            continue;
        check_table(q, &l->items[i]);
        if (!l->items[i].leak)
            r = claim(l, &claims, table_of(q, l, i));
    }
    settle_claims(l, &claims);
    for (size_t i = 0; r == 0 && i < l->n; i++)
        if (!l->items[i].unfit && !l->items[i].leak)
            r = check_bits(q, l, i, &claims, &bits_max);
    settle_claims(l, &claims);
    free(claims.items);
    return r;
}

int qcow2_bitmap_load(struct node *n, const struct qcow2_bitmap *b, struct bitmap *bm,
                      struct error *err)
{
    SHIELD();
    enum { RUN_BYTES = 1 << 20 };
    struct qcow2 *q = n->state;
    uint64_t run_max = max_u64(RUN_BYTES >> q->cluster_bits, 1), run;
    CLEANUP(memory_freep) uint64_t *table = NULL;
    CLEANUP(memory_freep) uint8_t *buf = NULL; /* many have no use for it */
    int r = qcow2_bitmap_read_table(q, b, &table);
    if (r < 0)
        return error_set_errno(
            err, -r, "Could not read bitmap_table table from image for bitmap '%s'", b->name);
    if (clusters_of(q, bitmap_serial_length(bm)) != b->table_entries)
        return error_set_errno(err, EINVAL, "Could not read bitmap '%s' from image", b->name);
    for (uint32_t i = 0; i < b->table_entries; i += (uint32_t)run) {
        uint64_t first = (uint64_t)i << q->cluster_bits;
        uint64_t offset = table[i] & ENTRY_OFFSET_MASK;
        run = 1;
        if (!offset) {
            if (table[i] & BITMAP_TABLE_ALL_ONES)
                bitmap_mark(bm, bitmap_serial_span(bm, first, q->cluster_size));
            continue;
        }
        while (run < run_max && i + run < b->table_entries &&
               table[i + run] == offset + (run << q->cluster_bits))
            run++;
        if (!buf)
            buf = block_buffer(min_u64(run_max, b->table_entries) << q->cluster_bits);
        r = !buf ? -ENOMEM
            : range_fits(offset, run << q->cluster_bits, q->fresh_from)
                ? file_read(q, offset, buf, run << q->cluster_bits)
                : -EINVAL;
        if (r < 0)
            return error_set_errno(err, -r, "Could not read bitmap '%s' from image", b->name);
        bitmap_deserialise(bm, first, buf, run << q->cluster_bits);
    }
    return 0;
}

/* ---- in_use, in place ---- */

int qcow2_bitmaps_set_in_use(struct node *n, struct qcow2_bitmap_list *l, bool bad,
                             struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    uint64_t length = 0, at = 0, from = UINT64_MAX, to = 0;
    bool found = false;
    int r;

    for (size_t i = 0; i < l->n; i++) {
        struct qcow2_bitmap *b = &l->items[i];
        found |= b->in_use;
        /* Also one that is quarantined: it should record and does not, so what it says will not
         * be true; or QEMU could not open the image because of it. An unfit one nobody believes.
         */
        if (!b->in_use && !b->unfit && (b->automatic || !b->foreign) && (b->quarantined || !bad)) {
            b->in_use = true;
            qcow2_bitmap_update_raw(b);
            from = min_u64(from, length + 8);
            to = length + 16;
        }
        length += b->raw_length;
    }
    if (from > to && (bad || !found))
        return 0;
    if ((r = qcow2_bitmaps_check_writable(q, err)) < 0)
        return r;
    if (from > to) {
        /* It says so already; but a program that was killed before its flush may have said it. */
        r = BROKEN(guard_found_in_use_believed) ? 0 : file_flush(q);
        return r < 0 ? error_set_errno(err, -r, "Can't update bitmap directory") : 0;
    }

    CLEANUP(memory_freep) uint8_t *dir = malloc(length);
    if (!dir)
        return error_set_errno(err, ENOMEM, "Can't update bitmap directory");
    for (size_t i = 0; i < l->n; at += l->items[i++].raw_length)
        memcpy(dir + at, l->items[i].raw, l->items[i].raw_length);
    r = file_write(q, q->header.bitmap_directory_offset + from, dir + from, to - from);
    if (r == 0 && !BROKEN(guard_in_use_not_flushed))
        r = file_flush(q);
    return r < 0 ? error_set_errno(err, -r, "Can't update bitmap directory") : 0;
}
