/* Hot regions: where the disk may be dirty without its bits being durable.
 *
 * A region is a fixed part of the disk (16 MiB). The table says in SLOTS slots which are hot, and
 * the ring of the tide file says so durably. A write may go on when all its regions are hot (or it
 * needs none, because its bits are durable already); if not, they join the next transaction of the
 * ring. After a power loss everything in a hot region counts as dirty: slots x region size is the
 * most that is ever copied for nothing.
 *
 *     free --> entering --> hot <--> clean --> its slot is entering for another region, or
 *      ^                                |
 *      +----------- leaving <-----------+     at a checkpoint
 *
 *     entering   in the transaction under way
 *     hot        pinned by writes, or marked since the last copy of its bits, or not yet clean
 *     clean      hot yet, and its bits are synced
 *     leaving    the transaction under way says that the slot is free
 *
 * Either way out is a removal: from the moment that it is submitted the region is not hot.
 *
 * - Group commit: one transaction is in flight at a time, and carries what all waiting writes miss,
 *   up to RING_CHANGES; it waits a moment for those whom the last one has let go. A region is hot
 *   when its transaction has completed.
 * - A write takes all its regions or none; it is granted by the one who completed the transaction,
 *   before anybody can evict. Only the regions of the oldest waiting write are kept from leaving
 *   while it waits: otherwise writes of several regions would wait for each other for ever.
 * - A region leaves only if, at the moment its removal is submitted, nothing has pinned it and
 *   nothing was marked in it since the copy of its bits that was synced (marks have their bit set
 *   before hot_marked(), so a copy taken later has it). From that moment on it is not hot; who
 *   writes to it waits until that transaction has completed and another one has brought it back.
 * - Cleaning runs ahead, in bulk, so that a quarter of the slots can always leave at once, and that
 *   no more than a given number of regions have bits that no copy has.
 * - A checkpoint (hot_leave) asks regions to leave though nobody needs their slots. They are
 *   cleaned with one sync, and leave RING_CHANGES a transaction; one that is written to meanwhile
 *   is asked no more and stays. Without checkpoints everything that was ever hot would count as
 *   dirty after a power loss; when and why there are any: checkpoint.c.
 *
 * What can go wrong: a transaction or a cleaning fails. Then nobody is told anything: those who
 * wait go on waiting until hot_retry(), when the owner has made a new tide file, or hot_fail(). */
#pragma once

#include "base/range.h"
#include "persist/super.h"
#include "rt/sync.h"

struct hot;

struct hot_ops {
    /* Writes one transaction durably: B has its changes, the rest is the owner's to fill in; TABLE
     * is as it will be after them. */
    int (*commit)(void *owner, struct ring_block *b, const uint32_t *table);
    /* Makes the bits of these regions durable in every live area. */
    int (*clean)(void *owner, const uint32_t *regions, size_t n);
    /* One of the two has failed: do something about it, then hot_retry() or hot_fail(). */
    void (*failed)(void *owner, int error);
};

struct hot_options {
    unsigned region_bits;
    unsigned slots; /* 4 .. 65535 */
    /* More regions with marks that no copy has are cleaned, whoever needs a slot; 0: any number. */
    unsigned marked_max;
};

/* An empty table: the session begins. Two tasks of its own: one commits, one cleans; so both of the
 * ops may be under way at once, but neither twice. */
struct hot *hot_new(const struct hot_options *o, const struct hot_ops *ops, void *owner);
/* No write and no hot_leave() is under way; waits for its tasks; NULL is allowed. */
void hot_free(struct hot *h);

/* Before a write of R: waits until all its regions are hot, and pins them. More than RING_CHANGES
 * regions, or half of the slots: -E2BIG at once (the caller sets the bits in the areas instead).
 * -EIO after hot_fail().
 */
int hot_take(struct hot *h, struct range r) MUST_CHECK;
/* The same if it needs no wait. The write path's first question: a few nanoseconds. */
bool hot_try_take(struct hot *h, struct range r);
/* Something in R was marked; between take and give, with no wait since the bits were set. */
void hot_marked(struct hot *h, struct range r);
void hot_give(struct hot *h, struct range r); /* after the data has completed */

/* A checkpoint: these hot regions leave. What is in use stays: regions that are pinned, or waited
 * for, or are taken before their removal is submitted. Waits until each has left or stays. */
enum hot_which {
    HOT_ALL,
    HOT_UNUSED, /* nobody has taken them since the last call with this */
};
/* 0, -EIO after hot_fail(), -ECANCELED. */
int hot_leave(struct hot *h, enum hot_which which) MUST_CHECK;
/* Is a checkpoint cheap, one transaction, and in nobody's way? There are regions to leave, but no
 * more than RING_CHANGES, no write has pinned one or waits for one. Takes no time. */
bool hot_is_cheap(const struct hot *h);

/* The table as it must be told by a new tide file, together with the bits of the same moment (no
 * wait between): what is entering is not in it. TABLE has SLOTS entries. */
void hot_table(const struct hot *h, uint32_t *table);
/* The hot regions whose bits the areas may lack, in order; REGIONS has room for SLOTS. They have
 * those of all others. */
size_t hot_unwritten(const struct hot *h, uint32_t *regions);
/* After a failure, when the owner has a new tide file: what failed is tried again. */
void hot_retry(struct hot *h);
void hot_fail(struct hot *h); /* cold writes get -EIO from now on */

struct hot_stats {
    uint64_t commits, entered, cleanings, cleaned;
    uint64_t left;             /* at checkpoints */
    uint64_t amount_cleanings; /* of the cleanings, those that marked_max has asked for */
    unsigned hot, clean, waiting;
    unsigned marked; /* hot regions with marks that no copy has */
};
void hot_stats(const struct hot *h, struct hot_stats *ret);
bool hot_valid(const struct hot *h, const char **broken);
