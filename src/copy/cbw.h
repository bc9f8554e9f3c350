/* What the filter snapshot-access asks of the filter copy-before-write: the disk as it was. */
#pragma once

#include "copy/copy.h"

/* -EACCES: not in the snapshot, or the snapshot is broken; -ENOTSUP: NODE is no such filter. */
int cbw_snapshot_read(struct node *n, struct range r, void *buf) MUST_CHECK;
int cbw_snapshot_status(struct node *n, bool want_zero, struct range r,
                        struct block_status *ret) MUST_CHECK;
/* Nobody wants this part any more: it can no longer be read, and is not saved. */
int cbw_snapshot_discard(struct node *n, struct range r) MUST_CHECK;

extern const struct driver cbw_driver, snapshot_access_driver;
