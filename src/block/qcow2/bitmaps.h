/* The bitmaps extension: dirty bitmaps kept inside the image, read and written as QEMU does.
 *
 *     header extension --> directory --> per bitmap: name, granularity, flags, table
 *                                                     table --> clusters of bits, in serial form
 *                                                               (or "all zeroes", "all ones")
 *
 * While somebody uses a bitmap its `in_use` flag is set in the image: if the flag is found set at
 * the next open, the bits were never saved and the bitmap is inconsistent. Saving writes everything
 * anew elsewhere and turns the header to it, so a cut leaves either the old directory (in_use)
 * or the new one.
 *
 * Nothing in there can prevent the image from being opened. What is bad goes one of three ways:
 *
 *     quarantined    a bitmap with a name, whose bits cannot be had (extra data; a table that leads
 *                    nowhere, onto metadata or onto another bitmap): inconsistent, kept as it is on
 *                    disk until somebody removes it
 *     unfit          no bitmap at all, QEMU refuses an image with it: reported, and left out of the
 *                    directory when that is next written
 *     broken         the directory ends in the middle, or is somewhere it cannot be: what could be
 *                    read is used
 */
#pragma once

#include "bitmap/bitmap.h"
#include "block/block.h"

enum {
    QCOW2_BITMAP_NAME_MAX = 1023,
    QCOW2_BITMAP_GRANULARITY_BITS_MIN = 9,
    QCOW2_BITMAP_GRANULARITY_BITS_MAX = 31,
};
#define QCOW2_BITMAP_SERIAL_MAX (512 * MiB)

struct qcow2_bitmap {
    char *name; /* "" for an entry that is too broken to have one */
    unsigned granularity_bits;
    bool in_use;
    bool automatic;   /* `auto`: it records */
    bool quarantined; /* its bits are not to be had; REASON says why */
    bool unfit;       /* no bitmap at all; quarantined, too */
    bool foreign;     /* it has extra data: another program may know how to use it; quarantined */
    bool leak;        /* its clusters may be somebody else's: they are not freed with it */
    char reason[128];

    /* where it is; the caller leaves these alone */
    uint64_t table_offset;
    uint32_t table_entries;
    uint8_t *raw; /* the directory entry as found, with its padding */
    size_t raw_length;
};

struct qcow2_bitmap_list {
    struct qcow2_bitmap *items; /* in the directory's order */
    size_t n;
    char broken[160]; /* why the rest of the directory was given up; "": it was not */
    bool misplaced;   /* all of it: the directory cannot be where the header says */
};

void qcow2_bitmap_list_free(struct qcow2_bitmap_list *l);
DEFINE_CLEANUP(struct qcow2_bitmap_list *, qcow2_bitmap_list_free, qcow2_bitmap_list_freep)
struct qcow2_bitmap *qcow2_bitmap_find(struct qcow2_bitmap_list *l, const char *name);

/* A directory of N_EXPECTED bitmaps; a pure function. Never fails for what it finds, only with
 * -ENOMEM. SIZE_BYTES is the disk's, CLUSTER_SIZE the image's. */
int qcow2_bitmap_directory_decode(const uint8_t *buf, size_t length, uint32_t n_expected,
                                  uint64_t size_bytes, uint64_t cluster_size,
                                  struct qcow2_bitmap_list **ret);

/* Is this node qcow2, and could it hold bitmaps? */
bool node_is_qcow2(const struct node *n);

/* The directory of the image; an empty list when there is none. An I/O error is an error, bad
 * content is not. */
int qcow2_bitmaps_read(struct node *n, struct qcow2_bitmap_list **ret,
                       struct error *err) MUST_CHECK;

/* Looks at all tables, after the directory was read, and quarantines what leads nowhere, and what
 * would not fit into BITS_MAX bytes of memory with those before it: a table of a few bytes can
 * stand for 512 MiB. -ENOMEM. */
int qcow2_bitmaps_check(struct node *n, struct qcow2_bitmap_list *list,
                        uint64_t bits_max) MUST_CHECK;

/* The bits of one; BM is empty and has the image's size and the entry's granularity. For one that
 * is in_use or quarantined there is nothing to be read. */
int qcow2_bitmap_load(struct node *n, const struct qcow2_bitmap *b, struct bitmap *bm,
                      struct error *err) MUST_CHECK;

/* Sets in_use of those of LIST that are not in it yet, and returns when it is durable: before the
 * first change of content after bitmaps were loaded. BAD: only of those that are quarantined, which
 * QEMU could not open the image with. */
int qcow2_bitmaps_set_in_use(struct node *n, struct qcow2_bitmap_list *list, bool bad,
                             struct error *err) MUST_CHECK;

struct qcow2_bitmap_save {
    const char *name;
    /* NULL: only the stored entry's clusters are given up (LEAK), which are not its own; it stays,
     * in use, with a table of its own. One with extra data stays as it is. */
    const struct bitmap *bits;
    bool automatic;
    bool leak; /* do not free the clusters of the stored entry that this one replaces */
};
/* Replaces the directory: these with in_use 0, in the place of those stored under the same
 * name, new ones at the end; all other entries are kept, but unfit ones. Nothing left: the
 * extension goes. Durable when it returns; on error the old directory stands. Strict: one that
 * cannot be saved is an error. Otherwise it stays in use in the image (if it ever was there),
 * `failed` says why, and the others are saved. */
int qcow2_bitmaps_save(struct node *n, struct qcow2_bitmap_save *list, size_t count, bool strict,
                       struct error *err) MUST_CHECK;
/* Forgets the directory altogether, and frees nothing: for one that is misplaced. */
int qcow2_bitmaps_drop(struct node *n, struct error *err) MUST_CHECK;
/* Removes one entry (of any state) and frees its clusters, unless LEAK; nothing happens when it is
 * not there. */
int qcow2_bitmap_remove(struct node *n, const char *name, bool leak, struct error *err) MUST_CHECK;

/* After a save has failed so that nobody knows which directory the disk has: makes it the old one.
 * 0 at once when that is known. Before the next change of content. */
int qcow2_bitmaps_settle(struct node *n) MUST_CHECK;

/* Bytes of a directory entry for a bitmap of this name. */
uint64_t qcow2_bitmap_entry_bytes(const char *name);
/* Would QEMU still open the image with one more such bitmap? Its texts. OTHERS: how many persistent
 * bitmaps the node has, and the bytes that their entries take. */
int qcow2_bitmap_check_new(struct node *n, const char *name, uint64_t granularity_bytes,
                           uint32_t others, uint64_t others_bytes, struct error *err) MUST_CHECK;
/* The one reason that can come up after it was made: the disk has grown. */
int qcow2_bitmap_check_size(struct node *n, uint64_t granularity_bytes, uint64_t size_bytes,
                            struct error *err) MUST_CHECK;
