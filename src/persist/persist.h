/* Bitmaps that survive the program. So far: those with `persistent: true` on qcow2 nodes, kept in
 * the image's own bitmaps extension (block/qcow2/bitmaps.h), interchangeably with QEMU.
 *
 *     node opens        each stored bitmap becomes a dirty bitmap; if the node may be written, all
 * are marked `in_use` in the image, durably, before it can be used node closes, or   each is stored
 * anew, `in_use` is taken back, durably goes read-only killed            `in_use` is found at the
 * next open: the bitmap is inconsistent; it can be looked at and removed, and never keeps the image
 * from being opened
 *
 * All of it hangs on the graph as a hook and as the store of dirty/: nobody calls it. */
#pragma once

#include "block/block.h"

/* After dirty_init, before nodes are opened. */
void persist_init(struct graph *g);

/* Where run segments are: a directory on tmpfs, or NULL for none. Before nodes are opened. */
void persist_set_runtime(struct graph *g, const char *directory);
/* For tests, whose disks are small: regions of 1 << REGION_BITS bytes, SLOTS of them, and so many
 * of those in each transaction of the ring. Before nodes are opened. */
void persist_set_limits(struct graph *g, unsigned region_bits, unsigned slots, unsigned slice);
/* For tests, whose lives are short: when hot regions leave (options.h), whatever nodes' options
 * say, and how long there is rest between two flushes that make them. UINT64_MAX: neither
 * flushes nor amounts make any. Before nodes are opened. */
void persist_set_checkpoints(struct graph *g, uint64_t idle_ns, uint64_t period_ns,
                             uint64_t flush_rest_ns);
/* x-tidemark-recovery of query-named-block-nodes; NULL: nothing is kept for this node. */
struct json_object *persist_info(struct node *n);
/* x-tidemark-hot-regions: what keeping the bitmaps costs; NULL: nothing so far. */
struct json_object *persist_hot_info(struct node *n);
