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
 * An entry that cannot be understood is `quarantined`: reported, kept as it is, never used. It
 * never prevents the image from being opened. */
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
    bool quarantined; /* not understood; REASON says why */
    bool unfit;       /* no bitmap at all: QEMU refuses an image with it; goes at the next save */
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

/* The bits of one; BM is empty and has the image's size and the entry's granularity. For one that
 * is in_use or quarantined there is nothing to be read. */
int qcow2_bitmap_load(struct node *n, const struct qcow2_bitmap *b, struct bitmap *bm,
                      struct error *err) MUST_CHECK;

/* Sets in_use of those of LIST that are not in it yet, and returns when it is durable: before the
 * first change of content after bitmaps were loaded. */
int qcow2_bitmaps_set_in_use(struct node *n, struct qcow2_bitmap_list *list,
                             struct error *err) MUST_CHECK;

struct qcow2_bitmap_save {
    const char *name;
    const struct bitmap *bits; /* NULL: keep the stored entry of this name as it is */
    bool automatic;
    bool in_use; /* an inconsistent one stays so */
};
/* Replaces the directory by these, in this order, with in_use as given; quarantined entries are
 * kept. N 0 and nothing kept: the extension goes. Durable when it returns; on error the old
 * directory stands. */
int qcow2_bitmaps_save(struct node *n, const struct qcow2_bitmap_save *list, size_t count,
                       struct error *err) MUST_CHECK;
/* Removes one entry (of any state) and frees its clusters; nothing happens when it is not there. */
int qcow2_bitmap_remove(struct node *n, const char *name, struct error *err) MUST_CHECK;

/* Bytes of a directory entry for a bitmap of this name. */
uint64_t qcow2_bitmap_entry_bytes(const char *name);
/* Would QEMU still open the image with one more such bitmap? Its texts. OTHERS: how many persistent
 * bitmaps the node has, and the bytes that their entries take. */
int qcow2_bitmap_check_new(struct node *n, const char *name, uint64_t granularity_bytes,
                           uint32_t others, uint64_t others_bytes, struct error *err) MUST_CHECK;
