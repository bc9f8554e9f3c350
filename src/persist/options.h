/* x-tidemark-persist of a node's options: at which level its bitmaps are kept, and where.
 *
 *     level              off, process, power (default)
 *     region-size        bytes of a hot region (16 MiB); more of them is more often in the ring
 *     budget             bytes that are hot at most (16 GiB): copied for nothing per power loss
 *     tide-file          where the tide file is; default: IMAGE.tide, after links are resolved
 *     state-directory    or the directory that has it, under a name made of the image's
 *     runtime-directory  where run segments are; default: the program's
 *     no-witness         believe (default), refuse or distrust bitmaps of an image that cannot tell
 *                        whether others have written it
 *
 *     checkpoint-idle    milliseconds without a write after which all hot regions leave (2000)
 *     checkpoint-period  milliseconds after which those leave that were not written to (60000)
 *     checkpoint-amount  bytes of regions with bits that are not in the tide file, above which
 *                        these are written there (half of the budget)
 *     checkpoint-flush   after a guest's flush, if it is cheap, all leave (on)
 *
 * 0 or off: not then. Why so: checkpoint.c, docs/checkpoints.md
 *
 * The tide file must outlive what the level promises: at level power, one that was placed on tmpfs
 * is refused. A block device has no place beside it: /dev is such a tmpfs. */
#pragma once

#include "block/block.h"
#include "persist/keeper.h"

struct place {
    bool off;       /* the node's bitmaps are not to be kept */
    char *tide;     /* NULL: there is no place, which is said when one is needed */
    char *why_none; /* and what to do about it */
};

/* Fills in what the options say of level, sizes, runtime (lent by N) and witness; the rest of O is
 * the caller's. *RET is to be place_fini'd, also after an error. */
int persist_options_read(const struct node *n, struct keeper_options *o, struct place *ret,
                         struct error *err) MUST_CHECK;
/* May a node that was opened read-only, and keeps nothing, become writable? */
int persist_options_may_write(const struct node *n, struct error *err) MUST_CHECK;
void place_fini(struct place *p);
