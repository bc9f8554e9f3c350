/* Persistent bitmaps of qcow2 nodes; called by persist.c's hook and store only. */
#pragma once

#include "block/block.h"

/* A node has been opened: what its image holds becomes dirty bitmaps. Fails only when the image may
 * be written and `in_use` cannot be. */
int qcow2_persist_load(struct node *n, struct error *err);
/* The node closes or goes read-only: saves. Problems are logged. */
int qcow2_persist_save(struct node *n, struct error *err);
/* After a save that kept the node open, it may be written again: `in_use`, durably. */
int qcow2_persist_use(struct node *n, struct error *err);
int qcow2_persist_can_add(struct node *n, const char *name, uint64_t granularity_bytes,
                          struct error *err);
