/* The copy engine: brings the chunks of a set from a source to a target while guests go on
 * writing to the source. All jobs that copy do it through here.
 *
 * What remains to be copied is a set of chunks (at least 64 KiB, and the target's cluster). It
 * stands as a nameless dirty bitmap in the source's list, as queries show it. A chunk leaves
 * the set when it has reached the target; one whose copy failed stays.
 *
 *     job's workers --copy_run-----+                       +--> source (read)
 *                                  +--> lock of the chunk --+
 *     guest's write --copy_hold----+    still remaining?    +--> target (write), then clear
 *
 * Whoever copies holds the chunk's lock, so no chunk is copied twice, and a guest write to a
 * chunk on its way waits for that one. Chunks that remain have not been written since the
 * instant, because every write goes through copy_hold first; so what block status says of them
 * stays true, and holes and zeroes are never read. The speed limit holds for the job, never for
 * guests. */
#pragma once

#include "bitmap/bitmap.h"
#include "block/block.h"

struct copy;

/* SOURCE and TARGET are lent edges of equal size. WHAT: the set to copy (NULL: all), of any
 * granularity. graph_lock held. */
int copy_new(struct edge *source, struct edge *target, const struct bitmap *what, struct copy **ret,
             struct error *err) MUST_CHECK;
void copy_free(struct copy *c); /* nobody copies any more; graph_lock held */
DEFINE_CLEANUP(struct copy *, copy_free, copy_freep)

uint64_t copy_chunk_bytes(const struct copy *c);
/* What remains; lent. May be changed before the first copy. */
struct bitmap *copy_remaining(struct copy *c);
const struct bitmap *copy_saved(const struct copy *c); /* what has reached the target; lent */

/* Copied so far, and that plus what remains: bytes in whole chunks, guests' part included. */
struct copy_progress {
    uint64_t done;
    uint64_t total;
};
struct copy_progress copy_progress(const struct copy *c);

/* Bytes a second of copy_run, 0: no limit; takes effect at once. */
void copy_set_speed(struct copy *c, uint64_t speed);

struct copy_limits {
    unsigned max_workers;   /* chunks on their way at once; 0: 64 */
    uint64_t max_run_bytes; /* longest run of chunks copied as one; 0: 1 MiB or a chunk */
};
/* Copies what remains, from the start, until nothing does. 0; -EINTR after copy_interrupt();
 * else the first failure's -errno, *READ_FAILED telling which side. What was on its way has
 * ended when it returns. One at a time; again after a failure is a retry. */
int copy_run(struct copy *c, const struct copy_limits *limits, bool *read_failed) MUST_CHECK;
/* Lets copy_run start nothing more and return -EINTR, also one that begins later, until
 * copy_resume. Does not wait. */
void copy_interrupt(struct copy *c);
void copy_resume(struct copy *c);

/* Before a guest writes to R: copies those chunks under R that remain and waits for those on
 * their way. */
int copy_hold(struct copy *c, struct range r) MUST_CHECK;

/* Takes chunks that the source itself (not its backing chain) did not have out of the set (an
 * overlay may have come above it since), from OFFSET; *NEXT is where to go on, *NEXT == size at the
 * end. For sync=top. */
int copy_drop_unallocated(struct copy *c, uint64_t offset, uint64_t *next) MUST_CHECK;
/* The same for a known range, rounded inwards: nobody wants it any more. */
void copy_drop(struct copy *c, struct range r);

/* Registers the drivers copy-before-write, snapshot-access and mirror_top; once per graph. */
void copy_register_drivers(struct graph *g);

/* ---- the copy-before-write filter, as the backup job uses it ---- */

/* Makes a copy-before-write node over SOURCE with this TARGET and puts it in SOURCE's place.
 * NAME NULL: a made one. SOURCE is quiesced, and so is the filter when this returns (end it with
 * graph_quiesce_end). The filter has one reference, the caller's. graph_lock held. */
int cbw_insert(struct node *source, struct node *target, const char *name, struct node **filter,
               struct error *err) MUST_CHECK;
/* Takes it out again, quiesced or not, and drops the caller's reference. */
void cbw_remove(struct node *filter);
struct copy *cbw_copy(struct node *filter); /* lent; NULL when the node is none */
/* Nobody wants what is saved any more: no guest waits for a target that hangs. The caller ends the
 * cancel when the filter is out. */
struct node_cancel *cbw_give_up(struct node *filter) MUST_CHECK;
/* Flushes the target, then the source, through the filter's edges. */
int cbw_flush_target(struct node *filter) MUST_CHECK;
int cbw_flush_source(struct node *filter) MUST_CHECK;
