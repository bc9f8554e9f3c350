/* Following: brings a target after a source that guests go on changing. The mirror job's engine.
 *
 * What the target does not have yet is a set of chunks. It stands as a nameless dirty bitmap in
 * the source's list, as queries show it. Workers take chunks from it and copy what the source has
 * now; whatever a guest changes is put back into it when the write has completed. So the set is
 * empty at a moment at which no write is under way only if both disks are equal.
 *
 *     guest --> filter mirror_top --+--------------------> source --> written: chunk dirty again
 *                                   | (write-blocking:
 *                                   +--> the same bytes to the target, before the guest's reply)
 *
 *     worker: lock chunk; clear its bit; what is there now?; read; write; on failure dirty again
 *
 * The bit is cleared before the read, never after: a write that completes in between finds it
 * clear, and sets it. */
#pragma once

#include "bitmap/bitmap.h"
#include "block/block.h"

struct follow;

struct follow_options {
    uint64_t granularity; /* bytes of a chunk; 0: by the target's cluster */
    uint64_t buffer;      /* bytes on their way at once; 0: 16 MiB */
    bool unmap;           /* zeroes may become holes */
    bool whole_clusters;  /* the target may have nothing behind its clusters: no part of one */
    bool blocking;        /* copy mode write-blocking */
    bool recall;          /* follow_touched() will be asked for */
};

/* SOURCE (of the filter) and TARGET are lent edges of equal size; if the source gets another one,
 * that is as follow_interrupt, and nothing more may be copied. Nothing is dirty. The source's
 * node is quiesced; graph_lock held. */
int follow_new(struct edge *source, struct edge *target, const struct follow_options *options,
               struct follow **ret, struct error *err) MUST_CHECK;
void follow_free(struct follow *f); /* the same holds; nobody copies any more */

/* What the target does not have; lent. Chunks on their way are not in it. */
struct bitmap *follow_dirty(struct follow *f);
/* What has been written to the target, or tried, in whole clusters if it was; lent. */
const struct bitmap *follow_touched(const struct follow *f);
/* Quiesced: guests' writes go to the target no more, and are marked, until follow_run. */
void follow_hold_back(struct follow *f);
uint64_t follow_buffer(const struct follow *f);
/* Bytes copied so far, and that plus what is dirty or on its way. */
void follow_progress(const struct follow *f, uint64_t *done, uint64_t *total);
void follow_set_speed(struct follow *f, uint64_t speed); /* bytes a second, 0: no limit */

/* To begin with. FULL: first makes the target all zeroes if that is cheap, and else marks all;
 * then marks what the source's chain down to BASE (included; NULL: all of it) has.
 * ZERO: the target is known to be zero. -EINTR after follow_interrupt. */
int follow_zero_target(struct follow *f) MUST_CHECK; /* 1: done, 0: it cannot cheaply */
int follow_mark_allocated(struct follow *f, struct node *base, bool skip_zeroes) MUST_CHECK;

/* Copies until at most ENOUGH bytes are dirty and nothing is on its way, in at most PASSES over the
 * disk (0: as many as it takes). 0; -EINTR after follow_interrupt; else the first failure's -errno,
 * *READ_FAILED telling which side. One at a time. */
int follow_run(struct follow *f, uint64_t enough, unsigned passes, bool *read_failed) MUST_CHECK;
/* Copies what is dirty in the calling task, which has the source and the filter quiesced. */
int follow_drain(struct follow *f, bool *read_failed) MUST_CHECK;
/* Waits until a while after something has become dirty, or follow_interrupt. */
void follow_idle(struct follow *f);
void follow_interrupt(struct follow *f); /* until follow_resume */
void follow_resume(struct follow *f);

/* ---- write-blocking ---- */

bool follow_blocking(const struct follow *f);
void follow_set_blocking(struct follow *f); /* the source's node is quiesced */
/* Write-blocking, and the target had all that the source has at some moment, since when only such
 * writes came that went to both. */
bool follow_synced(const struct follow *f);
/* Called when a guest's write could not be written to the target (CODE: positive errno); must not
 * wait. Until the next follow_run such writes are only marked. */
void follow_on_failure(struct follow *f, void (*fn)(void *opaque, int code), void *opaque);

/* ---- the filter mirror_top ---- */

/* Makes a mirror_top node over SOURCE and puts it in SOURCE's place. NAME NULL: a made one. SOURCE
 * is quiesced, and so is the filter when this returns (end it with graph_quiesce_end). The filter
 * has one reference, the caller's. graph_lock held. */
int mirror_top_insert(struct node *source, const char *name, struct node **filter,
                      struct error *err) MUST_CHECK;
struct edge *mirror_top_source(struct node *filter);
/* Whom writes through FILTER shall reach; NULL: nobody. The filter is quiesced. */
void mirror_top_set_follow(struct node *filter, struct follow *f);
/* FILTER, quiesced until it is out, needs nothing of the source any more (once its permissions are
 * worked out again). */
void mirror_top_stop(struct node *filter);
/* Takes it out again (quiesced) and drops the caller's reference. */
void mirror_top_remove(struct node *filter);

/* ---- between mirror_top.c and follow.c ---- */

struct follow_write {
    struct range range;
    struct range_holder held;
    bool reported;  /* the source has, once */
    bool disturbed; /* another was written there at the same time */
    TAILQ_ENTRY(follow_write) link;
};
/* Shall this write reach the target before it is answered? Then begin; write the source; end,
 * with the source's RESULT and BUF (NULL: zeroes). */
bool follow_wants(const struct follow *f, struct range r, unsigned flags);
void follow_write_begin(struct follow *f, struct follow_write *w, struct range r);
void follow_write_end(struct follow *f, struct follow_write *w, int result, const void *buf,
                      unsigned flags);

extern const struct driver mirror_top_driver;
