/* The bitmap directory, decoded. Nothing in it can prevent an image from being opened: what is not
 * understood is set aside with its reason, and the entries around it are used.
 *
 *     0   table offset  u64      16  type u8 (1)           20  extra data length u32
 *     8   table entries u32      17  granularity bits u8   24  extra data, name, padding to 8
 *     12  flags         u32      18  name length u16 */
#include "base/cursor.h"
#include "block/qcow2/bitmaps_internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

void qcow2_bitmap_list_free(struct qcow2_bitmap_list *l)
{
    if (!l)
        return;
    for (size_t i = 0; i < l->n; i++) {
        free(l->items[i].name);
        free(l->items[i].raw);
    }
    free(l->items);
    free(l);
}

struct qcow2_bitmap *qcow2_bitmap_find(struct qcow2_bitmap_list *l, const char *name)
{
    for (size_t i = 0; i < l->n; i++)
        if (!l->items[i].unfit && !strcmp(l->items[i].name, name))
            return &l->items[i];
    return NULL;
}

uint64_t qcow2_bitmap_entry_bytes(const char *name)
{
    return align_up(BITMAP_ENTRY_BYTES + strlen(name), 8);
}

void qcow2_bitmap_update_raw(struct qcow2_bitmap *b)
{
    uint32_t flags;
    memcpy(&flags, b->raw + 12, sizeof flags);
    flags = be32toh(flags) & ~(uint32_t)(BITMAP_FLAG_IN_USE | BITMAP_FLAG_AUTO);
    flags |= (b->in_use ? BITMAP_FLAG_IN_USE : 0) | (b->automatic ? BITMAP_FLAG_AUTO : 0);
    flags = htobe32(flags);
    memcpy(b->raw + 12, &flags, sizeof flags);
}

void qcow2_bitmap_entry_encode(uint8_t *entry, const char *name, uint64_t table_offset,
                               uint32_t table_entries, unsigned granularity_bits, bool in_use,
                               bool automatic)
{
    size_t bytes = qcow2_bitmap_entry_bytes(name);
    struct out_cursor c = out_cursor_over(entry, bytes);

    memset(entry, 0, bytes); /* the padding must be zero */
    put_be64(&c, table_offset);
    put_be32(&c, table_entries);
    put_be32(&c, (in_use ? BITMAP_FLAG_IN_USE : 0) | (automatic ? BITMAP_FLAG_AUTO : 0));
    put_u8(&c, 1);
    put_u8(&c, (uint8_t)granularity_bits);
    put_be16(&c, (uint16_t)strlen(name));
    put_be32(&c, 0);
    put_bytes(&c, name, strlen(name));
}

void qcow2_bitmap_quarantine(struct qcow2_bitmap *b, const char *fmt, ...)
{
    va_list ap;
    if (b->quarantined)
        return;
    b->quarantined = true;
    va_start(ap, fmt);
    vsnprintf(b->reason, sizeof b->reason, fmt, ap);
    va_end(ap);
}

struct entry {
    uint64_t table_offset;
    uint32_t table_entries, flags, extra;
    uint8_t type, granularity_bits;
    uint16_t name_length;
};

static void judge(struct qcow2_bitmap *b, const struct entry *e, const uint8_t *name,
                  uint64_t size_bytes, uint64_t cluster_size)
{
    uint64_t bytes = (uint64_t)e->table_entries * cluster_size;

    if (e->name_length == 0 || memchr(name, 0, e->name_length))
        qcow2_bitmap_quarantine(b, "its name is empty or has a zero byte");
    else if (e->name_length > QCOW2_BITMAP_NAME_MAX)
        qcow2_bitmap_quarantine(b, "its name has %u bytes", e->name_length);
    else if (e->type != 1)
        qcow2_bitmap_quarantine(b, "its type is %u, not 1", e->type);
    else if (e->flags & ~(uint32_t)BITMAP_FLAGS_KNOWN)
        qcow2_bitmap_quarantine(b, "it has unknown flags %#x",
                                e->flags & ~(uint32_t)BITMAP_FLAGS_KNOWN);
    else if (e->granularity_bits < QCOW2_BITMAP_GRANULARITY_BITS_MIN ||
             e->granularity_bits > QCOW2_BITMAP_GRANULARITY_BITS_MAX)
        qcow2_bitmap_quarantine(b, "its granularity is 2^%u, not 2^9 to 2^31", e->granularity_bits);
    else if (!e->table_offset || e->table_offset % cluster_size || e->table_offset >> 56)
        qcow2_bitmap_quarantine(b, "its table offset is %#llx",
                                (unsigned long long)e->table_offset);
    else if (!e->table_entries || e->table_entries > BITMAP_TABLE_ENTRIES_MAX ||
             bytes > QCOW2_BITMAP_SERIAL_MAX)
        qcow2_bitmap_quarantine(b, "its table has %u entries", e->table_entries);
    else if (!b->in_use && size_bytes > (bytes * 8) << e->granularity_bits)
        qcow2_bitmap_quarantine(b, "its table of %u entries is too small for the disk",
                                e->table_entries);
    b->unfit = b->quarantined;

    /* A legal one that this program, as QEMU, does not know how to use. It is kept as it is. */
    b->foreign = e->extra && !b->unfit;
    if (b->foreign)
        qcow2_bitmap_quarantine(b, "Bitmap extra data is not supported");
}

static int by_name(const void *a, const void *b)
{
    struct qcow2_bitmap *x = *(struct qcow2_bitmap *const *)a,
                        *y = *(struct qcow2_bitmap *const *)b;
    int r = strcmp(x->name, y->name);
    return r ? r : x < y ? -1 : x > y; /* the first in the directory has the name */
}

static int find_twins(struct qcow2_bitmap_list *l)
{
    struct qcow2_bitmap **sorted = malloc((l->n + 1) * sizeof *sorted);
    size_t n = 0;
    if (!sorted)
        return -ENOMEM;
    for (size_t i = 0; i < l->n; i++)
        if (!l->items[i].unfit)
            sorted[n++] = &l->items[i];
    qsort(sorted, n, sizeof *sorted, by_name);
    for (size_t i = 1; i < n; i++) {
        if (!strcmp(sorted[i - 1]->name, sorted[i]->name)) {
            sorted[i]->quarantined = false; /* this is the better reason */
            qcow2_bitmap_quarantine(sorted[i], "there is another bitmap of this name");
            sorted[i]->unfit = true;
            sorted[i]->foreign = false;
        }
    }
    free(sorted);
    return 0;
}

/* Appends one, and takes copies of NAME and of the raw bytes. */
static int append(struct qcow2_bitmap_list *l, size_t *capacity, const struct entry *e,
                  const uint8_t *name, const uint8_t *raw, size_t raw_length,
                  struct qcow2_bitmap **ret)
{
    if (l->n == *capacity) {
        size_t more = *capacity ? *capacity * 2 : 16;
        struct qcow2_bitmap *items = realloc(l->items, more * sizeof *items);
        if (!items)
            return -ENOMEM;
        l->items = items;
        *capacity = more;
    }
    struct qcow2_bitmap *b = &l->items[l->n++];
    *b = (struct qcow2_bitmap){
        .name = calloc(1, e->name_length + (size_t)1),
        .granularity_bits = e->granularity_bits,
        .in_use = e->flags & BITMAP_FLAG_IN_USE,
        .automatic = e->flags & BITMAP_FLAG_AUTO,
        .table_offset = e->table_offset,
        .table_entries = e->table_entries,
        .raw = malloc(raw_length),
        .raw_length = raw_length,
    };
    if (!b->name || !b->raw)
        return -ENOMEM;
    memcpy(b->name, name, e->name_length);
    memcpy(b->raw, raw, raw_length);
    *ret = b;
    return 0;
}

int qcow2_bitmap_directory_decode(const uint8_t *buf, size_t length, uint32_t n_expected,
                                  uint64_t size_bytes, uint64_t cluster_size,
                                  struct qcow2_bitmap_list **ret)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = calloc(1, sizeof *l);
    struct cursor c = cursor_over(buf, length);
    size_t capacity = 0;
    if (!l)
        return -ENOMEM;

    while (cursor_left(&c)) {
        const uint8_t *start = c.at;
        struct entry e = {0};
        e.table_offset = get_be64(&c);
        e.table_entries = get_be32(&c);
        e.flags = get_be32(&c);
        e.type = get_u8(&c);
        e.granularity_bits = get_u8(&c);
        e.name_length = get_be16(&c);
        e.extra = get_be32(&c);
        get_bytes(&c, e.extra);
        const uint8_t *name = get_bytes(&c, e.name_length);
        size_t used = c.overrun ? 0 : (size_t)(c.at - start);
        get_bytes(&c, align_up(used, 8) - used);
        if (c.overrun) {
            snprintf(l->broken, sizeof l->broken, "Broken bitmap directory");
            break;
        }
        if (l->n == n_expected) {
            /* What is left over from something else may look like a good bitmap. */
            snprintf(l->broken, sizeof l->broken,
                     "More bitmaps found than specified in header extension");
            break;
        }
        struct qcow2_bitmap *b;
        if (append(l, &capacity, &e, name, start, (size_t)(c.at - start), &b) < 0)
            return -ENOMEM;
        judge(b, &e, name, size_bytes, cluster_size);
    }
    if (!l->broken[0] && l->n < n_expected)
        snprintf(l->broken, sizeof l->broken,
                 "Less bitmaps found than specified in header extension");
    if (find_twins(l) < 0)
        return -ENOMEM;
    *ret = steal(l);
    return 0;
}
