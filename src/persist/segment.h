/* Run segments: bits that outlive the process. One file on tmpfs for each (tide file's session,
 * area, epoch), mapped: its words are the lowest level of a struct bitmap. It decides nothing:
 * superblocks say which epochs count.
 *
 *     RUNTIME/run-UUID-EPOCH     4 KiB header (session, epoch, size, granularity, boot), then words
 *     RUNTIME/run-UUID-stamp     when the session last wrote to the disk
 *
 * UUID is the tide file's, so that what a killed program has left is found; only what says the
 * session of the superblock counts.
 *
 * Reserved in full when made, so that a full tmpfs is an error there and never a SIGBUS later;
 * 0600. RUNTIME is $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/tidemark or /run/tidemark (daemon/
 * decides), or an option of the disk. Where it is no tmpfs, a segment may be found after a power
 * loss: it names its boot, and those of another boot are none.
 *
 * The header is written when all of the file is reserved, and what the bitmap has so far is in the
 * words before a superblock names the session and the epoch: until then nobody looks for it.
 *
 * To the byte: docs/format/segment.md. */
#pragma once

#include "bitmap/bitmap.h"
#include "persist/super.h"

struct segment; /* one mapped file */

/* Whose segments. */
struct segments {
    const char *runtime;
    struct tide_id uuid, session;
};

/* Makes the directory, if need be, and sees that it is ours alone. */
int segments_directory(const char *runtime, struct error *err) MUST_CHECK;

/* All clean, in place of one that an earlier session may have left. *BITS are over its words: freed
 * before the segment. */
int segment_create(const struct segments *of, uint64_t epoch, uint64_t size_bytes,
                   uint64_t granularity_bytes, struct segment **ret, struct bitmap **bits,
                   struct error *err) MUST_CHECK;
/* One that an earlier process has left, for reading. -ENOENT: there is none (another boot, or
 * removed). -EBADMSG: not whole, or of another size or granularity. BITS |= its words. */
int segment_read(const struct segments *of, uint64_t epoch, struct bitmap *bits,
                 struct error *err) MUST_CHECK;
/* The disk is to have another size: room for it is reserved, then bitmap_resize cannot fail. */
int segment_grow(struct segment *s, struct bitmap *bits, uint64_t size_bytes,
                 struct error *err) MUST_CHECK;
void segment_close(struct segment *s);  /* the file stays */
void segment_remove(struct segment *s); /* closes, and the file goes, if it has not been dropped */
void segment_drop(struct segment *s);   /* the file goes, its words stay until it is closed */
void segment_unlink(const struct segments *of, uint64_t epoch);
/* All of this uuid that KEEP does not want, whatever their session, go. */
void segments_sweep(const struct segments *of, bool (*keep)(void *opaque, uint64_t epoch),
                    void *opaque);
/* Why what is in RUNTIME may not last until the next start, or writes may wait for it; NULL: it is
 * good. */
const char *segments_doubt(const char *runtime);

/* The moment (wall clock, ns) of our last write to the disk, kept in a file of the session beside
 * the segments: for witness_compare_crash(). A store to mapped memory, for the write path.
 *
 * While writes are in flight the stamp beats: each beat says that up to now a change of the file
 * may be ours. After a kill the kernel may finish what it has, a little later than the last beat;
 * the file's lock, which is given up only then, keeps others away so long. STAMP_SLACK_NS is for
 * both, and for a loop that is late: what somebody else writes within it after a kill is not seen.
 */
struct stamp;
#define STAMP_BEAT_NS (NSEC_PER_SEC / 4)
#define STAMP_SLACK_NS NSEC_PER_SEC
int stamp_create(const struct segments *of, struct stamp **ret, struct error *err) MUST_CHECK;
void stamp_close(struct stamp *s);
void stamp_unlink(const struct segments *of);
void stamp_write_begun(struct stamp *s);
void stamp_write_done(struct stamp *s);
void stamp_beat(struct stamp *s);
bool stamp_in_flight(const struct stamp *s);
/* What an earlier process left: the latest moment at which a write of it can have reached the file.
 * -ENOENT. */
int stamp_find(const struct segments *of, uint64_t *last_write_ns) MUST_CHECK;
