/* The file below: thin, so that a trace of one image's I/O has one place to stand. Reading
 * beyond its end gives zeroes, writing beyond it makes it grow (block/ sees to both). */
#include "block/qcow2/qcow2.h"

#include "base/log.h"

int file_read(struct qcow2 *q, uint64_t offset, void *buf, uint64_t length)
{
    return edge_read(q->file, range_make(offset, length), buf, 0);
}

int file_write(struct qcow2 *q, uint64_t offset, const void *buf, uint64_t length)
{
    return edge_write(q->file, range_make(offset, length), buf, 0);
}

int file_write_zeroes(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    return edge_write_zeroes(q->file, range_make(offset, length), 0);
}

int file_flush(struct qcow2 *q)
{
    return edge_flush(q->file);
}

uint64_t file_size(const struct qcow2 *q)
{
    return node_size(q->file->node);
}

bool qcow2_unusable(struct qcow2 *q)
{
    if (q->unusable || q->node->read_only || !node_lost_since(q->file->node, q->losses))
        return q->unusable;
    log_error("qcow2: the server of '%s' has lost what was not flushed: the image must be opened "
              "again",
              node_name(q->node));
    return q->unusable = true;
}
