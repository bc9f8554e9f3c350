/* Bitmaps that survive the program: those with `persistent: true`, of every node that has a place
 * for them. What is promised: where content differs from a bitmap's base, its bit is set, or the
 * bitmap says that it cannot be trusted.
 *
 *     ended well     as they were
 *     killed         as they were
 *     power lost     at level `power` a superset, larger by the hot regions at most
 *     else           inconsistent: the image was changed by others, or nothing tells
 *
 * Between two changes of a qcow2 image its own copies tell, in QEMU's format (image.c); otherwise a
 * tide file beside the image does, and run segments in the runtime directory (keeper.h).
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
/* For tests: as if N had been idle for long. */
void persist_save_idle(struct node *n);
/* For tests, whose lives are short: when hot regions leave (options.h), whatever nodes' options
 * say, and how long there is rest between two flushes that make them. UINT64_MAX: neither
 * flushes nor amounts make any. Before nodes are opened. */
void persist_set_checkpoints(struct graph *g, uint64_t idle_ns, uint64_t period_ns,
                             uint64_t flush_rest_ns);
/* x-tidemark-recovery of query-named-block-nodes; NULL: nothing is kept for this node. */
struct json_object *persist_info(struct node *n);
/* x-tidemark-hot-regions: what keeping the bitmaps costs; NULL: nothing so far. */
struct json_object *persist_hot_info(struct node *n);
