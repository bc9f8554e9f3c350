/* Differing: finds where a disk differs from an older one while guests go on writing to it. The
 * compare job's engine.
 *
 *     what differs at the instant  <=  found  OR  what guests have written since
 *
 * A bitmap's successor has the second, each write before it reaches the disk. So nothing needs to
 * be kept from the instant: what is read later is that moment's content, or is in the successor
 * already. Neither holes and zeroes on both sides are read, nor what is known to be dirty.
 *
 * A granule is found only if a byte of it differs, or while it was being written. Where the older
 * disk has ended, it is compared as zeroes: that is what an image over it reads there. */
#pragma once

#include "bitmap/bitmap.h"
#include "block/block.h"

struct diff;
struct dirty_bitmap;

/* DISK and BASE are lent edges; BITMAP, on DISK's node, is busy with a successor that records. */
int diff_new(struct edge *disk, struct edge *base, struct dirty_bitmap *bitmap, struct diff **ret,
             struct error *err) MUST_CHECK;
void diff_free(struct diff *d);                        /* nobody compares any more */
const struct bitmap *diff_found(const struct diff *d); /* of BITMAP's granularity; lent */
/* Bytes of the disk; `done` ones need no more looking at. */
void diff_progress(const struct diff *d, uint64_t *done, uint64_t *total);

/* Compares what remains. 0; -EINTR after diff_interrupt; else the first failure's -errno,
 * *DISK_FAILED telling which side. One at a time; again after a failure is a retry. */
int diff_run(struct diff *d, bool *disk_failed) MUST_CHECK;
uint64_t diff_failed_at(const struct diff *d); /* in bytes, after a failure */
/* The disk is not as large as it was: nothing is compared then, and diff_run fails. */
bool diff_resized(const struct diff *d);
void diff_interrupt(struct diff *d); /* until diff_resume; does not wait */
void diff_resume(struct diff *d);
/* Bytes of the disk that are compared a second, 0: no limit; at once. */
void diff_set_speed(struct diff *d, uint64_t speed);
