/* The set of dirty regions: one bit for each GRANULARITY bytes of a disk. Pure memory: no
 * names, no disks, no waiting.
 *
 * Marking cannot fail and clearing cannot fail: marks stand in the write path, after the
 * last point where a write may be refused. All address space is taken by bitmap_new; large
 * bitmaps are backed by the kernel page by page as they become dirty, so memory follows what
 * is dirty, not the size of the disk. (When the machine has no page left, the process dies;
 * that is a crash like any other, and src/persist is there for it.)
 *
 * Every offset and length is in bytes of the disk. Ranges beyond the size are cut. */
#pragma once

#include "base/range.h"

struct bitmap;

#define BITMAP_GRANULARITY_MIN ((uint64_t)512)
#define BITMAP_GRANULARITY_MAX (2 * GiB)

/* All clean. The granularity is a power of two within the limits above, the size is below
 * 2^63. NULL when there is no memory or address space for it. */
struct bitmap *bitmap_new(uint64_t size_bytes, uint64_t granularity_bytes);

/* The same over words that somebody else keeps (a mapped file), at least
 * bitmap_word_count() of them: they *are* the bits, in host order, and what they hold counts.
 * Bits beyond the size are cleared. The words must outlive the bitmap. */
struct bitmap *bitmap_new_over(uint64_t *words, uint64_t size_bytes, uint64_t granularity_bytes);
/* Of words that are known to be zero: they are not read; pages that nobody has touched stay so. */
struct bitmap *bitmap_new_over_zeroes(uint64_t *words, uint64_t size_bytes,
                                      uint64_t granularity_bytes);
uint64_t bitmap_word_count(uint64_t size_bytes, uint64_t granularity_bytes);
/* Its lent words are at WORDS now, with the same content and, after them, clean room for a disk of
 * ROOM_BYTES. -ENOMEM, and they are where they were. */
int bitmap_move(struct bitmap *bm, uint64_t *words, uint64_t room_bytes) MUST_CHECK;
/* Each has what the other had: content, size, words. */
void bitmap_swap(struct bitmap *a, struct bitmap *b);

struct bitmap *bitmap_dup(const struct bitmap *bm); /* NULL: no memory */
void bitmap_free(struct bitmap *bm);                /* NULL is allowed */
DEFINE_CLEANUP(struct bitmap *, bitmap_free, bitmap_freep)

uint64_t bitmap_size(const struct bitmap *bm);
uint64_t bitmap_granularity(const struct bitmap *bm);

/* Marking rounds outwards, clearing inwards: rounding never loses dirt. The last granule may
 * be cut by the size; a range that reaches the size has it whole. */
void bitmap_mark(struct bitmap *bm, struct range r);
void bitmap_clear(struct bitmap *bm, struct range r);
void bitmap_mark_all(struct bitmap *bm);
void bitmap_clear_all(struct bitmap *bm); /* gives the memory back */

bool bitmap_get(const struct bitmap *bm, uint64_t offset); /* false beyond the size */

/* The first dirty run at or after FROM, cut to MAX (> 0) bytes and to the size.
 * False when everything from FROM to the end is clean. A caller that goes round, marks and
 * clears as it likes in between: there is no iterator to spoil. */
bool bitmap_next(const struct bitmap *bm, uint64_t from, uint64_t max, struct range *found);

/* The first clean offset at or after FROM; false when there is none below the size. */
bool bitmap_next_clean(const struct bitmap *bm, uint64_t from, uint64_t *offset);

/* Whether FROM (below the size) is dirty, and for how many bytes, at most MAX (> 0), that
 * stays so. */
bool bitmap_status(const struct bitmap *bm, uint64_t from, uint64_t max, uint64_t *length);

bool bitmap_any(const struct bitmap *bm, struct range r); /* is any byte of R dirty? */

/* Dirty granules times granularity, as QEMU's `count`: the last granule counts whole even
 * where the size cuts it. Costs nothing. */
uint64_t bitmap_count(const struct bitmap *bm);

/* Dirty bytes inside R, cut to R and to the size: the sum over pieces is that of the whole. */
uint64_t bitmap_count_range(const struct bitmap *bm, struct range r);

/* DST |= SRC; rounds outwards where granularities differ. Sizes are equal. Cannot fail. */
void bitmap_merge(struct bitmap *dst, const struct bitmap *src);

/* The same for what lies in R only; sizes may differ, what is beyond DST's is left out. */
void bitmap_merge_range(struct bitmap *dst, const struct bitmap *src, struct range r);

/* DST := SRC, rounded outwards where granularities differ. Sizes are equal. Cannot fail. */
void bitmap_copy(struct bitmap *dst, const struct bitmap *src);

/* Bits beyond the new size are dropped, new ones are clean (but a granule that the old size
 * cut stays as it was). Shrinking, and growing back to what it was, cannot fail; otherwise 0, or
 * -ENOMEM, or -ENOTSUP for a bitmap whose lent words are too few, and nothing has changed. */
int bitmap_resize(struct bitmap *bm, uint64_t new_size_bytes) MUST_CHECK;

/* The serial form, as qcow2 keeps it: bit i % 8 (lowest first) of byte i / 8 stands for
 * granule i. FIRST and LENGTH count bytes of this form, any alignment; multiples of 8 are
 * faster. What lies beyond bitmap_serial_length() is written as zero and ignored on reading,
 * so a caller may work in whole clusters. (QEMU's SHA-256 of a bitmap is over this form, padded
 * to a multiple of 8 bytes and never empty.) */
uint64_t bitmap_serial_length(const struct bitmap *bm);
void bitmap_serialise(const struct bitmap *bm, uint64_t first, void *buf, size_t length);
void bitmap_deserialise(struct bitmap *bm, uint64_t first, const void *buf, size_t length);

/* What a chunk of the serial form holds, without writing it out; padding takes either side.
 * qcow2 needs no data cluster for the first two. */
enum bitmap_chunk { BITMAP_CHUNK_ZEROES, BITMAP_CHUNK_ONES, BITMAP_CHUNK_MIXED };
enum bitmap_chunk bitmap_serial_kind(const struct bitmap *bm, uint64_t first, uint64_t length);

/* The bytes of disk that a chunk of the serial form speaks for; mark or clear this range to
 * read a table entry that says all ones or all zeroes. Empty beyond the end. */
struct range bitmap_serial_span(const struct bitmap *bm, uint64_t first, uint64_t length);

/* Bytes of memory that this bitmap takes now, lent words not counted. Asks the kernel: not
 * for the write path. */
uint64_t bitmap_memory(const struct bitmap *bm);

/* Checks every invariant and names the first broken one. Reads every word. */
bool bitmap_valid(const struct bitmap *bm, const char **broken);
