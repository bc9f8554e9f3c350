/* What is known to be durably dirty: a write to it tells nobody anything new, and needs no hot
 * region.
 *
 * A granule is known when its bit is durable in every area that marks go to. That is learned from a
 * cleaning, and from nothing else: of what was dirty in all those sets before their sectors were
 * copied, when the sync after it has completed. (What was marked later may be in no copy.)
 *
 * It belongs to the superblock of that moment. Any later one may name other areas, or another file:
 * then nothing is known any more. So whoever asks says which superblock there is now.
 *
 * A write that passes by this has pinned nothing, and must not give anything back when it has
 * ended: so they are remembered while they are under way. */
#pragma once

#include "bitmap/bitmap.h"
#include "persist/super.h"

struct lesson; /* what a cleaning will make known */

struct durable {
    struct tide_id uuid, session; /* of the superblock */
    uint64_t sequence;
    uint64_t granularity; /* 0: nothing is known */
    uint64_t size_bytes;
    uint8_t *bits;           /* serial form */
    struct range *under_way; /* writes that have passed */
    size_t n_under_way, room;
    uint64_t passed; /* so far */
};

void durable_fini(struct durable *d); /* no write is under way; a zeroed one is allowed */

/* Before a cleaning: what it will make durable in all of SETS, the live ones of all bitmaps that
 * record. Bits of those stay set until the superblock is another: so it may be asked before the
 * copies are made. NULL: nothing, or no memory for it. */
struct lesson *durable_ask(const struct super *s, const struct bitmap *const *sets, size_t n_sets,
                           const struct range *ranges, size_t n);
/* After it, synced; nothing if the superblock is another by now. Frees L; NULL is allowed. */
void durable_learn(struct durable *d, const struct super *s, struct lesson *l);
void lesson_free(struct lesson *l);
DEFINE_CLEANUP(struct lesson *, lesson_free, lesson_freep)

/* Is all of R known? A few nanoseconds. */
bool durable_has(const struct durable *d, const struct super *s, struct range r);
/* A write of R passes by that. */
void durable_pass(struct durable *d, struct range r);
/* A write of R has ended. Had it, or one that is its like, passed? */
bool durable_passed(struct durable *d, struct range r);
