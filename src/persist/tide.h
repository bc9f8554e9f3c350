/* The tide file: the part of a disk's bitmaps that outlives the power. All of its I/O, and no
 * policy.
 *
 *     0          superblock slot A                256 KiB each, written alternately, RWF_DSYNC
 *     256 KiB    superblock slot B
 *     512 KiB    hot ring                         64 blocks of 4 KiB, RWF_DSYNC, one in flight
 *     768 KiB    extents of bit areas             up to three a bitmap
 *
 * It is allocated in full, superblocks and ring are written in full when it is made, so that no
 * sync waits for the file system's journal; O_DIRECT where that works, because a page cache would
 * tell of things that the disk does not have; 0600; locked for as long as it is open.
 *
 * Order on disk, all of which is the caller's to keep, and why: persist/keeper.c. Here only: a
 * superblock replaces the older slot and never the newer one; a new file is synced, then renamed
 * into place, then its directory is synced.
 *
 * A write that has failed may have happened. After any failed write or sync the file is `failed`:
 * every further one is -EIO, and the caller makes a new file (tide_create over it), which decides.
 * The old one stays open, and so locked, until the caller closes it. */
#pragma once

#include "bitmap/bitmap.h"
#include "persist/super.h"

struct tide;

/* A new file at PATH, in place of one that may be there, that says S (whose sequence it raises, and
 * whose extents it places) with the contents of CURRENT[i] and SUCCESSOR[i] (NULL: clean; and so
 * may be the array) for S->table.items[i], and with a ring that says TABLE (S->slots entries) from
 * S->ring_sequence on, in ring_full_table(S->slots, RING_SLICE) transactions, after which the
 * caller goes on; NULL: empty, in one if S is in use at level power. Level process: the areas of a
 * file that is in use are not placed. It is written under a name of its own, PATH.new, synced,
 * renamed, its directory synced. The sets are copied before the first wait. S becomes what was
 * written; a bitmap of S->next shares the extents of those of S->table that it named before, and
 * new ones of its own are clean. On error S is as it was, what was at PATH is still there, or
 * nobody knows (ERR says which), and nothing is open. -EBUSY: somebody else is making one. */
int tide_create(const char *path, struct super *s, const struct bitmap *const *current,
                const struct bitmap *const *successor, const uint32_t *table, struct tide **ret,
                struct error *err) MUST_CHECK;

/* Locks it (unless READ_ONLY; another's lock is awaited for two seconds, because the kernel may be
 * slow to bury a killed one), syncs it, so that what is read is what the disk has, and reads the
 * newest valid superblock; what a crash has torn of another one is taken away, durably, unless
 * READ_ONLY (or the file has failed). -ENOENT: none there. -EBUSY: another has it. -EBADMSG: no
 * valid superblock, or one of another version, or the file is shorter than it says; ERR says which.
 * -ENODATA: none either, but one cannot be read, and may be later. */
int tide_open(const char *path, bool read_only, struct tide **ret, struct error *err) MUST_CHECK;
void tide_close(struct tide *t); /* the file stays; NULL is allowed; nothing is in flight */
/* The file goes, its directory is synced. Closes T in any case. */
int tide_remove(struct tide *t, struct error *err) MUST_CHECK;
/* The same of one that cannot be opened. */
int tide_unlink(const char *path, struct error *err) MUST_CHECK;
DEFINE_CLEANUP(struct tide *, tide_close, tide_closep)

const char *tide_path(const struct tide *t);
bool tide_failed(const struct tide *t);
/* It has failed, too, when its name means another file: nobody would find what is written to it. */
void tide_check_name(struct tide *t);
bool tide_read_only(const struct tide *t);
/* One of the two superblocks could not be read, and may be newer than tide_super(). */
bool tide_is_doubtful(const struct tide *t);
/* It was read without its lock while a program with a session had it. */
bool tide_is_beside_writer(const struct tide *t);
/* The last one that is known to be durable. */
const struct super *tide_super(const struct tide *t);

/* Writes S with the next sequence number into the older slot, and when it is durable adopts it:
 * then tide_super() is equal to S, whose content is stolen (what tide_super() pointed to is freed).
 * On error S stays the caller's. One at a time: a second caller waits (and its S should have been
 * made from what the first one wrote). If S begins a session at level power, its ring is opened
 * before, by an empty transaction with S->ring_sequence; the caller goes on behind it. -ENOSPC,
 * -EINVAL: S cannot be written, see super_encode(); nothing has happened and the file is as good as
 * it was. Anything else: it has failed. */
int tide_write_super(struct tide *t, struct super *s, struct error *err) MUST_CHECK;

/* Room for an extent where neither tide_super() nor S has one (so what was given before is in S by
 * now), allocated, and durable before a superblock names it; S->extents_end moves. -ENOSPC: the
 * file is as good as it was. */
int tide_allocate(struct tide *t, struct super *s, uint64_t bytes, uint64_t *offset,
                  struct error *err) MUST_CHECK;

/* Durable when it returns. One at a time: asserted. */
int tide_write_ring(struct tide *t, const struct ring_block *b) MUST_CHECK;
/* The table that the ring tells for the session of tide_super(), TABLE has S->slots entries. */
int tide_read_ring(struct tide *t, uint32_t *table, uint64_t *next_sequence,
                   struct error *err) MUST_CHECK;

/* Writes the blocks of BITS (8 sectors each) that hold a dirty bit in any of the N ranges (bytes of
 * the disk, ascending) to the area; not durable until tide_sync(). They are copied before the first
 * wait, or, when the same area is being written, when that has ended: two writes of one area are
 * never in flight together, or the older copy might land last.
 *
 * Bits of an epoch are only ever set: so a block without any was never written under it, reads as
 * clean, and is left alone. EPOCH is below the next_epoch of tide_super(): asserted. -ENOMEM:
 * nothing was written, the file has not failed. */
int tide_write_area(struct tide *t, uint64_t extent_offset, uint64_t epoch,
                    const struct bitmap *bits, const struct range *ranges, size_t n) MUST_CHECK;
/* What was written to areas before is durable. -EIO also when anything has failed meanwhile. */
int tide_sync(struct tide *t) MUST_CHECK;
/* BITS |= what the area holds. *BAD_BYTES counts the bytes of disk under damaged or unreadable
 * sectors, which are all marked when MARK_BAD; sectors of another epoch are clean. -EBADMSG: there
 * is no such extent, or it has a sector of an epoch that tide_super() has not reached, which means
 * that a newer superblock was durable and is lost. */
int tide_read_area(struct tide *t, uint64_t extent_offset, uint64_t epoch, struct bitmap *bits,
                   bool mark_bad, uint64_t *bad_bytes, struct error *err) MUST_CHECK;
