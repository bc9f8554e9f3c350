/* Metadata must not be overwritten, and a damaged image says where it is: a write that would
 * land on a table stops here, the corrupt bit is set, and the node does nothing any more.
 *
 * Where L2 tables and refcount blocks are stands in a hash set, so that the check costs one look
 * a cluster and not a walk over the L1 table for each write. */
#include "block/qcow2/qcow2.h"

#include "base/log.h"
#include "rt/clock.h"

#include <stdarg.h>
#include <stdio.h>

enum { KEY_EMPTY = 0, KEY_DELETED = 1, KIND_MASK = 0x1ff };

/* Where nobody who makes an image can tell: if all its tables came to one place, each would be
 * looked for among all. */
static size_t key_place(const struct metadata_set *m, uint64_t offset)
{
    uint64_t h = (offset >> 9) * m->factor;
    h = (h ^ h >> 32) * m->factor;
    return (size_t)(h >> 32) & (m->capacity - 1);
}

static uint64_t *key_find(const struct metadata_set *m, uint64_t offset)
{
    if (!m->capacity)
        return NULL;
    for (size_t i = key_place(m, offset);; i = (i + 1) & (m->capacity - 1)) {
        uint64_t k = m->keys[i];
        if (k == KEY_EMPTY)
            return NULL;
        if (k != KEY_DELETED && (k & ~(uint64_t)KIND_MASK) == offset)
            return &m->keys[i];
    }
}

static bool grow(struct metadata_set *m)
{
    struct metadata_set bigger = {.capacity = m->capacity ? m->capacity * 2 : 256,
                                  .factor = m->factor};
    if (!bigger.factor)
        random_bytes(&bigger.factor, sizeof bigger.factor);
    bigger.factor |= 1;
    bigger.keys = calloc(bigger.capacity, sizeof *bigger.keys);
    if (!bigger.keys)
        return false;
    for (size_t i = 0; i < m->capacity; i++) {
        uint64_t k = m->keys[i];
        if (k == KEY_EMPTY || k == KEY_DELETED)
            continue;
        size_t at = key_place(&bigger, k & ~(uint64_t)KIND_MASK);
        while (bigger.keys[at])
            at = (at + 1) & (bigger.capacity - 1);
        bigger.keys[at] = k;
        bigger.used++;
    }
    free(m->keys);
    *m = bigger;
    return true;
}

void metadata_add(struct qcow2 *q, uint64_t offset, enum metadata_kind kind)
{
    struct metadata_set *m = &q->metadata;
    if (!offset || into_cluster(q, offset) || key_find(m, offset))
        return;
    /* Without memory the set is not complete: a check less, nothing that worked before fails. */
    if (m->used * 2 >= m->capacity && !grow(m))
        return;
    size_t at = key_place(m, offset);
    while (m->keys[at] > KEY_DELETED)
        at = (at + 1) & (m->capacity - 1);
    if (m->keys[at] == KEY_EMPTY)
        m->used++;
    m->keys[at] = offset | kind;
}

void metadata_remove(struct qcow2 *q, uint64_t offset)
{
    uint64_t *k = key_find(&q->metadata, offset);
    if (k)
        *k = KEY_DELETED;
}

enum metadata_kind metadata_at(const struct qcow2 *q, uint64_t cluster_offset)
{
    uint64_t *k = key_find(&q->metadata, cluster_offset);
    return k ? (enum metadata_kind)(*k & KIND_MASK) : META_NONE;
}

const char *metadata_overlap(struct qcow2 *q, uint64_t offset, uint64_t length,
                             enum metadata_kind ignore)
{
    const struct qcow2_header *h = &q->header;
    struct range r = range_make(offset, length);

    if (offset < q->cluster_size)
        return "qcow2_header";
    if (range_overlaps(r, range_make(q->l1.offset, (uint64_t)q->l1.n * 8)))
        return "active L1 table";
    if (range_overlaps(r, range_make(q->reftable.offset, (uint64_t)q->reftable.n * 8)))
        return "refcount table";
    if (range_overlaps(r, range_make(h->snapshots_offset, q->snapshot_table_bytes)))
        return "snapshot table";
    for (uint32_t i = 0; q->snapshots && i < h->nb_snapshots; i++)
        if (range_overlaps(
                r, range_make(q->snapshots[i].l1_offset, (uint64_t)q->snapshots[i].l1_size * 8)))
            return "inactive L1 table";
    if (h->has_bitmaps &&
        range_overlaps(r, range_make(h->bitmap_directory_offset, h->bitmap_directory_bytes)))
        return "bitmap directory";

    uint64_t end = offset + length;
    for (uint64_t c = align_down(offset, q->cluster_size); c < end; c += q->cluster_size) {
        enum metadata_kind kind = metadata_at(q, c);
        if (kind != META_NONE && kind != ignore)
            return kind == META_L2 ? "active L2 table" : "refcount block";
    }
    return NULL;
}

int qcow2_check_overlap(struct qcow2 *q, uint64_t offset, uint64_t length,
                        enum metadata_kind ignore)
{
    if (q->unusable)
        return -ENOMEDIUM;
    if (!q->overlap_checks)
        return 0;
    const char *what = metadata_overlap(q, offset, length, ignore);
    if (!what)
        return 0;
    qcow2_signal_corruption(q, true, (int64_t)offset, (int64_t)length,
                            "Preventing invalid write on metadata (overlaps with %s)", what);
    return -EIO;
}

void qcow2_signal_corruption(struct qcow2 *q, bool fatal, int64_t offset, int64_t length,
                             const char *fmt, ...)
{
    SHIELD();
    fatal = fatal && !q->node->read_only;
    if (q->signaled_corruption && (!fatal || (q->header.incompatible & QCOW2_INCOMPAT_CORRUPT)))
        return;
    q->signaled_corruption = true;

    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    log_error(fatal ? "qcow2: Marking image as corrupt: %s; further corruption events will be "
                      "suppressed"
                    : "qcow2: Image is corrupt: %s; further non-fatal corruption events will be "
                      "suppressed",
              text);

    struct json_object *data = json_object_new_object();
    json_add_string(data, "device", "");
    if (*node_name(q->node))
        json_add_string(data, "node-name", node_name(q->node));
    json_add_string(data, "msg", text);
    if (offset >= 0)
        json_add_int(data, "offset", offset);
    if (length >= 0)
        json_add_int(data, "size", length);
    json_add_bool(data, "fatal", fatal);
    graph_raise(node_graph(q->node), "BLOCK_IMAGE_CORRUPTED", data);
    json_object_put(data);

    if (!fatal)
        return;
    q->unusable = true; /* what is in memory is not written any more */
    if (q->header.version >= 3) {
        q->header.incompatible |= QCOW2_INCOMPAT_CORRUPT;
        int r = qcow2_write_header(q);
        if (r == 0)
            r = file_flush(q);
        if (r < 0)
            log_error("qcow2: the corrupt bit could not be written: %s", strerror(-r));
    }
}
