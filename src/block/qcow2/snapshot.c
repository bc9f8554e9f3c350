/* Internal snapshots are kept as they are: what they share with the active image has no "copied"
 * bit and is copied before it is written. Here we only learn where their tables are, so that
 * nothing is written over them and a repair counts what they name.
 *
 *     0   l1_table_offset u64     12  id length u16    14  name length u16
 *     8   l1_size u32             36  extra data length u32
 *     40  extra data, id, name, padding to 8 */
#include "base/cursor.h"
#include "block/qcow2/qcow2.h"

enum { EXTRA_MAX_BYTES = 1024 };
#define TABLE_MAX_BYTES (1024 * (uint64_t)QCOW2_MAX_SNAPSHOTS)

int qcow2_read_snapshots(struct qcow2 *q, struct error *err)
{
    const struct qcow2_header *h = &q->header;
    if (!h->nb_snapshots)
        return 0;
    struct snapshot *list = calloc(h->nb_snapshots, sizeof *list);
    if (!list)
        return error_set_errno(err, ENOMEM, "Failed to read snapshot table");
    q->snapshots = list;

    uint64_t at = 0;
    for (uint32_t i = 0; i < h->nb_snapshots; i++) {
        uint8_t bytes[QCOW2_SNAPSHOT_HEADER_BYTES];
        at = align_up(at, 8);
        int r = h->snapshots_offset + at + sizeof bytes > q->fresh_from
                    ? -EINVAL
                    : file_read(q, h->snapshots_offset + at, bytes, sizeof bytes);
        if (r < 0)
            return error_set_errno(err, -r, "Failed to read snapshot table");
        struct cursor c = cursor_over(bytes, sizeof bytes);
        list[i].l1_offset = get_be64(&c);
        list[i].l1_size = get_be32(&c);
        uint64_t text = get_be16(&c);
        text += get_be16(&c);
        get_bytes(&c, 20);
        uint32_t extra = get_be32(&c);
        if (extra > EXTRA_MAX_BYTES)
            return error_set(err, EFBIG, "Too much extra metadata in snapshot table entry %u", i);
        at += sizeof bytes + extra + text;
        if (at > TABLE_MAX_BYTES)
            return error_set(err, EFBIG, "Snapshot table is too big");
    }
    q->snapshot_table_bytes = at;
    return 0;
}
