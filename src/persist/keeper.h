/* The bitmaps of one disk, kept through crashes: what is where, and every change of it.
 *
 * Three places hold a set of bits: memory (whose lowest level is a file on tmpfs, segment.h), a bit
 * area of the tide file (tide.h), and nothing else. The superblock says which sets are whose. The
 * keeper makes the superblock say what dirty/ says (dirty_get_state): a set that it has not seen
 * yet gets a place and an epoch of its own first. So there is one way to change anything:
 *
 *     dirty/ changes in memory   -->   keeper_commit()   -->   reply, event, next step
 *
 * Life of a disk under a keeper:
 *
 *     opened      recovery (recover.c): bitmaps as the tide file tells; nothing is written
 *     first change (a write that bitmaps record, or a change of state)
 *                 a new session: new segments; what recovery found is written anew, then the
 *                 superblock that names the session; then the old segments go
 *     writes      hot regions (hot.h), level power
 *     closed      areas written, image flushed, witness taken, superblock says clean
 */
#pragma once

#include "dirty/dirty.h"
#include "persist/super.h"

struct image;
struct keeper;
LIST_HEAD(keepers, keeper); /* of one graph: they find each other when a group is recovered */

/* Bitmaps of an image that cannot tell whether others have written it (witness.h): */
enum no_witness {
    NO_WITNESS_BELIEVE,
    NO_WITNESS_REFUSE,   /* the image is not opened */
    NO_WITNESS_DISTRUST, /* they are inconsistent */
};

/* When hot regions leave (checkpoint.c); 0: they do not. */
struct checkpoint_options {
    uint64_t idle_ns, period_ns;
    unsigned marked_max; /* regions whose marks no copy has */
    bool flush;
    uint64_t flush_rest_ns; /* between two of those */
};

struct keeper_options {
    struct keepers *peers;
    struct image *image; /* of a qcow2 node, which says by itself whether others have written it and
                            whose copies are exact while they are not in use; NULL: of another */
    char *path;          /* of the tide file; owned by who fills it in */
    const char *runtime; /* directory for segments; NULL: none, a kill is like a power loss */
    enum tide_level level;
    unsigned region_bits;
    unsigned slots;
    unsigned slice; /* of the slots, that each transaction of the ring tells */
    enum no_witness no_witness;
    struct checkpoint_options checkpoints;
};

/* What open has found, for queries. */
enum recovery { RECOVERY_NEW, RECOVERY_CLEAN, RECOVERY_EXACT, RECOVERY_SUPERSET, RECOVERY_NONE };

bool keeper_keeps(const struct dirty_bitmap *bm); /* persistent ones that have a name */

/* N is being opened and nobody writes to it yet. If there is a tide file, its bitmaps become N's,
 * and so do those that its image has stored. An error only if the disk must not be opened: the file
 * is locked, or there is no memory. */
int keeper_open(struct node *n, const struct keeper_options *o, struct keeper **ret,
                struct error *err) MUST_CHECK;
/* The node closes: nobody writes. What cannot be saved is told in the log. */
void keeper_close(struct keeper *k);

/* Read-only and back. What others did meanwhile is found out as when it is opened; nobody did if
 * the node was not read-only after all (UNDONE). */
int keeper_reopen(struct keeper *k, bool to_read_only, bool undone, struct error *err) MUST_CHECK;

/* The node, of which nothing is kept, is about to be led to another image; nobody writes. */
void keeper_led(struct keeper *k);

const char *keeper_path(const struct keeper *k); /* of its tide file */
bool keeper_has_tide(const struct keeper *k);
/* Is there a tide file, or can one be had? */
int keeper_can_keep(const struct keeper *k, struct error *err) MUST_CHECK;
/* May one more bitmap be added? */
int keeper_can_add(struct keeper *k, const char *name, uint64_t granularity_bytes,
                   struct error *err) MUST_CHECK;
/* The superblock says what dirty/ says. */
int keeper_commit(struct keeper *k, struct error *err) MUST_CHECK;

/* The same for several disks: durably all or none. */
int keepers_commit(struct keeper *const *ks, size_t n, struct error *err) MUST_CHECK;
/* Before a transaction changes anything in memory: what recovery has found is written anew; the
 * images say that their copies are in use. -EBUSY: they cannot change together, see group.c. */
int keepers_begin(struct keeper *const *ks, size_t n, struct error *err) MUST_CHECK;

/* Around a write, see struct write_observer. */
int keeper_before_write(struct keeper *k, struct range r) MUST_CHECK;
void keeper_mark(struct keeper *k, struct range r);
void keeper_written(struct keeper *k, struct range r);
void keeper_flushed(struct keeper *k);

/* Between resizing and resized the superblock allows for both sizes. */
int keeper_resizing(struct keeper *k, uint64_t to, struct error *err) MUST_CHECK;
void keeper_resized(struct keeper *k);
int keeper_grow(struct keeper *k, struct bitmap *bits, uint64_t to) MUST_CHECK;

/* The disk has been idle: its image gets the bitmaps, which are in use there no more until the next
 * change. Guests wait meanwhile. False: not now, because a job has one of them or the graph is
 * being changed. What goes wrong is told in the log. In a task of its own. */
bool keeper_save_idle(struct keeper *k);

/* True: the keeper has a set of these bits, and frees them when no superblock names it. */
bool keeper_bits_gone(struct keeper *k, struct bitmap *bits);
/* x-tidemark-recovery of query-named-block-nodes; NULL: it has no bitmaps to recover. */
struct json_object *keeper_info(struct keeper *k);
/* x-tidemark-hot-regions; NULL: none are in use. */
struct json_object *keeper_hot_info(const struct keeper *k);
