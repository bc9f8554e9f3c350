/* The bitmap directory of a qcow2 image: whatever is in it, decoding ends, what is called fit can
 * be written again, and comes back the same. The first 12 bytes choose cluster size, number of
 * bitmaps and size of the disk. */
#include "base/cursor.h"
#include "block/qcow2/bitmaps_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void encode_and_compare(const struct qcow2_bitmap *b, uint64_t disk, uint64_t cluster)
{
    size_t n = qcow2_bitmap_entry_bytes(b->name);
    uint8_t *entry = malloc(n); /* exactly as long as it is said to be */
    struct qcow2_bitmap_list *again = NULL;

    if (!entry)
        abort();
    qcow2_bitmap_entry_encode(entry, b->name, b->table_offset, b->table_entries,
                              b->granularity_bits, b->in_use, b->automatic);
    if (qcow2_bitmap_directory_decode(entry, n, 1, disk, cluster, &again) < 0 || again->n != 1 ||
        again->broken[0])
        abort();
    const struct qcow2_bitmap *c = &again->items[0];
    if (c->quarantined || strcmp(c->name, b->name) || c->table_offset != b->table_offset ||
        c->table_entries != b->table_entries || c->in_use != b->in_use ||
        c->automatic != b->automatic || c->granularity_bits != b->granularity_bits ||
        c->raw_length != n || memcmp(c->raw, entry, n))
        abort();
    qcow2_bitmap_list_free(again);
    free(entry);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cursor c = cursor_over(data, size);
    uint64_t cluster = (uint64_t)1 << (9 + get_u8(&c) % 13);
    get_u8(&c);
    uint32_t expected = get_be16(&c);
    uint64_t disk = get_be64(&c) & INT64_MAX, at = 0;
    struct qcow2_bitmap_list *l = NULL;

    if (c.overrun)
        return 0;
    if (qcow2_bitmap_directory_decode(c.at, cursor_left(&c), expected, disk, cluster, &l) < 0)
        abort();
    if (l->n > expected || (l->n < expected && !l->broken[0]))
        abort();
    for (size_t i = 0; i < l->n; i++) {
        struct qcow2_bitmap *b = &l->items[i];
        if (memcmp(b->raw, c.at + at, b->raw_length)) /* what is kept is what was there */
            abort();
        at += b->raw_length;
        if (b->quarantined != !!b->reason[0] || (b->unfit && !b->quarantined) ||
            (b->foreign && b->unfit))
            abort();
        if (!b->unfit && qcow2_bitmap_find(l, b->name) != b)
            abort();
        if (!b->quarantined)
            encode_and_compare(b, disk, cluster);
        qcow2_bitmap_update_raw(b);
    }
    qcow2_bitmap_list_free(l);
    return 0;
}
