/* A crew: workers that copy a disk piece by piece, so many at once, at a rate. What the engines of
 * backup (copy.h) and mirror (follow.h) have in common; what is a piece, and how it is copied, is
 * theirs.
 *
 *     crew_pass: next piece --> does the rate allow it? --> worker and memory free? --> copy
 *                    ^                  | wait                                           |
 *                    +------------------+<-----------------------------------------------+
 *
 * After a failure or an interruption no piece is begun any more. */
#pragma once

#include "copy/rate.h"

#include "base/range.h"
#include "rt/sync.h"

struct piece {
    struct range range;
    bool zero;       /* nothing is to be read */
    uint64_t cost;   /* bytes that count for the rate */
    uint64_t memory; /* bytes of buffers that it takes at most */
    unsigned tag;    /* the owner's own */
};

struct crew_ops {
    /* The first piece that begins at FROM or later. False: there is none. May wait; is asked again
     * if the rate does not allow the piece yet. */
    bool (*next)(void *opaque, uint64_t from, struct piece *ret);
    /* 0 or -errno, *READ_FAILED telling which side. Shielded. */
    int (*copy)(void *opaque, const struct piece *p, bool *read_failed);
};

struct crew {
    const struct crew_ops *ops;
    void *opaque;
    struct rate rate;
    bool interrupted;
    struct event nudge; /* ends the waiting for the rate */
    struct semaphore memory;
    uint64_t buffer_bytes;
    void *kept[16];
    unsigned kept_count;
};

/* BUFFER_BYTES: of most buffers. */
void crew_init(struct crew *c, const struct crew_ops *ops, void *opaque, uint64_t buffer_bytes);
void crew_fini(struct crew *c); /* nobody works */

/* All pieces from the disk's start to its end, by so many WORKERS. 0; -EINTR after crew_interrupt,
 * also before; else the first failure. What was begun has ended. Shielded; one at a time. */
int crew_pass(struct crew *c, unsigned workers, bool *read_failed) MUST_CHECK;
void crew_interrupt(struct crew *c); /* until crew_resume; does not wait */
void crew_resume(struct crew *c);
void crew_set_speed(struct crew *c, uint64_t speed); /* bytes a second, 0: no limit; at once */

/* Fresh memory of a megabyte costs as much as reading it from a fast disk; so it is kept. NULL: out
 * of memory. */
void *crew_take_buffer(struct crew *c, uint64_t bytes);
void crew_give_buffer(struct crew *c, void *buf, uint64_t bytes);
