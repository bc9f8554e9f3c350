/* Named dirty bitmaps on a node: who marks them and when, and what may be done to them.
 *
 * A bitmap is a row of flags over a pure set (bitmap/bitmap.h). Marking happens through the node's
 * write observer, before the data is submitted; so whatever clears bits or switches what is
 * marked does it with the node quiesced (graph_quiesce_begin), or a write in flight would land
 * under a clear bit. Functions that need that say "quiesced" and assert it.
 *
 * While a job has a bitmap it is busy: frozen as it was, with a successor that records in its
 * place if (and only if) it was recording. The end is one of two:
 *
 *     advance     the successor becomes the bitmap (same name)         job succeeded
 *     roll back   what the job leaves dirty is OR-ed INTO THE SUCCESSOR, which then becomes
 *                 the bitmap: nobody's marks ever change hands         failed, cancelled, never
 *
 * Nameless bitmaps (a successor, the copy engine's sets) stand in the same list, newest first,
 * as queries show them. */
#pragma once

#include "bitmap/bitmap.h"
#include "block/block.h"

struct dirty_bitmap;

enum { DIRTY_NAME_MAX = 1023 }; /* bytes, QEMU's limit */

/* block_resize. What a shrink has cut off since a bitmap's last clear and a grow brings back reads
 * as zeroes now, and is dirty in every bitmap, recording or not; other new bytes are clean. Of a
 * bitmap that was loaded nobody knows what was cut off in an earlier run: until its next clear all
 * that grows is dirty. */

/* While a named bitmap records, its node is watched (node_set_watched): adding, enabling or loading
 * one fails where somebody else writes what the node stands on, and the other way round. */

/* Registers the room with the graph; once per graph, before nodes are opened. */
void dirty_init(struct graph *g);

/* ---- finding and asking ---- */

struct dirty_bitmap *dirty_find(struct node *n, const char *name); /* NULL: none */
/* Newest first, nameless ones included. */
struct dirty_bitmap *dirty_first(struct node *n);
struct dirty_bitmap *dirty_next(struct dirty_bitmap *bm);
struct node *dirty_node(const struct dirty_bitmap *bm);
const char *dirty_name(const struct dirty_bitmap *bm); /* NULL: nameless */
uint64_t dirty_granularity(const struct dirty_bitmap *bm);
bool dirty_busy(const struct dirty_bitmap *bm);
bool dirty_enabled(const struct dirty_bitmap *bm); /* its own switch, whatever its successor does */
bool dirty_recording(const struct dirty_bitmap *bm); /* as queries say: it or its successor */
bool dirty_persistent(const struct dirty_bitmap *bm);
bool dirty_inconsistent(const struct dirty_bitmap *bm);
bool dirty_readonly(const struct dirty_bitmap *bm);
/* The set itself; of a busy bitmap, as it was at the start. Lent. */
struct bitmap *dirty_bits(struct dirty_bitmap *bm);
/* BlockDirtyInfo of every bitmap of the node, newest first; NULL when there is none. */
struct json_object *dirty_info(struct node *n);
/* SHA-256 of the content, as x-debug-block-dirty-bitmap-sha256 of QEMU 7.2: 64 hex digits. */
int dirty_sha256(struct dirty_bitmap *bm, char hex[65], struct error *err);

/* QEMU's texts for what is not allowed now: which of these states forbid it. */
enum {
    DIRTY_CHECK_BUSY = 1,
    DIRTY_CHECK_READONLY = 2,
    DIRTY_CHECK_INCONSISTENT = 4,
    DIRTY_CHECK_DEFAULT = 7,
    DIRTY_CHECK_ALLOW_READONLY = DIRTY_CHECK_BUSY | DIRTY_CHECK_INCONSISTENT,
};
int dirty_check(struct dirty_bitmap *bm, unsigned checks, struct error *err);
/* As QEMU finds bitmaps for commands: node by device or node name, then the bitmap; texts
 * "Node 'x' not found", "Dirty bitmap 'y' not found". */
int dirty_lookup(struct graph *g, const char *node, const char *name, struct node **n,
                 struct dirty_bitmap **bm, struct error *err) MUST_CHECK;

/* ---- changing; graph_lock held ---- */

enum {
    DIRTY_PERSISTENT = 1,
    DIRTY_DISABLED = 2,
    DIRTY_LOADED = 4, /* comes from the store, which is not asked whether it can be added */
};
/* GRANULARITY 0: QEMU's default for the node (a client's own 0 is refused before, by the text
 * DIRTY_BAD_GRANULARITY). NAME NULL: nameless. Quiesced unless DIRTY_DISABLED.
 * Checks name, granularity, uniqueness, and (persistent) whether the node's format can store it. */
#define DIRTY_BAD_GRANULARITY "Granularity must be power of 2 and at least 512"
int dirty_add(struct node *n, const char *name, uint64_t granularity_bytes, unsigned flags,
              struct dirty_bitmap **ret, struct error *err) MUST_CHECK;
/* Takes it from the image, when persistent, and then from the list. A transaction does the first
 * (which may fail, and wait) and hides it, then releases it at commit. */
int dirty_remove(struct dirty_bitmap *bm, struct error *err) MUST_CHECK;
int dirty_remove_stored(struct dirty_bitmap *bm, struct error *err) MUST_CHECK;
void dirty_release(struct dirty_bitmap *bm); /* from memory only: nameless ones, undone adds */
/* What no other bitmap has had before: for who has waited, and wants to know whether it is still
 * there. NULL: it is not. */
uint64_t dirty_serial(const struct dirty_bitmap *bm);
struct dirty_bitmap *dirty_find_serial(struct node *n, uint64_t serial);
/* For a transaction: hidden (dropped at commit, back at abort); a hidden one records on. Nothing
 * but the handle finds it, and its name is free. */
void dirty_hide(struct dirty_bitmap *bm);
void dirty_unhide(struct dirty_bitmap *bm);
/* Quiesced. An error only if it is to record and somebody else writes below the node. */
int dirty_set_enabled(struct dirty_bitmap *bm, bool enabled, struct error *err) MUST_CHECK;
/* A transaction's undo: ENABLED and BASED are what dirty_enabled and dirty_based said before. */
void dirty_undo_enabled(struct dirty_bitmap *bm, bool enabled, bool based);
bool dirty_based(const struct dirty_bitmap *bm); /* is its base durable? */
void dirty_set_busy(struct dirty_bitmap *bm, bool busy);
void dirty_set_readonly(struct dirty_bitmap *bm, bool readonly);
void dirty_set_inconsistent(struct dirty_bitmap *bm);
/* Empties it and gives the caller the old bits, for a transaction's undo. Quiesced. NULL: no
 * memory, and nothing has changed. */
struct bitmap *dirty_clear(struct dirty_bitmap *bm) MUST_CHECK;
/* Undo of a clear or merge, the last one first: BM is OLD again; where writes have marked bits
 * since, these stay (and what a merge has added, then). Steals OLD. */
void dirty_restore(struct dirty_bitmap *bm, struct bitmap *old);
/* There will be no undo. Steals OLD. */
void dirty_forget(struct dirty_bitmap *bm, struct bitmap *old);
/* BM |= bits of SRC (any granularity), after QEMU's checks of both. *UNDO, when UNDO is not NULL,
 * gets the bits as they were. Quiesced. */
int dirty_merge(struct dirty_bitmap *bm, struct dirty_bitmap *src, struct bitmap **undo,
                struct error *err) MUST_CHECK;

/* ---- a job's hold on a bitmap: the handle BM stays good through all of these ---- */

/* Quiesced: busy, and a successor records if the bitmap did. Durable after dirty_commit(). */
int dirty_start(struct dirty_bitmap *bm, struct error *err) MUST_CHECK;
/* The same for a job that finds out anew where the node differs from a base of BASE_BYTES: it takes
 * an inconsistent bitmap, too, and none that is disabled. The successor records in any case. */
int dirty_start_rebuild(struct dirty_bitmap *bm, uint64_t base_bytes, struct error *err) MUST_CHECK;
/* The start never happened (its transaction was not committed): bitmap OR successor, not busy. */
void dirty_unstart(struct dirty_bitmap *bm);
/* Quiesced: the successor forgets what it has recorded, because the job has that, too; should the
 * job fail yet, the bitmap has it. On error the bitmap says no less than before. */
int dirty_restart(struct dirty_bitmap *bm, struct error *err) MUST_CHECK;

/* How a job leaves a bitmap. */
struct dirty_outcome {
    struct dirty_bitmap *bitmap;
    /* The successor becomes the bitmap: the job has all that the bitmap says. Otherwise REMAINING
     * (NULL: the whole bitmap as at the start) is OR-ed into the successor first. */
    bool advance;
    const struct bitmap *remaining;
    const char *job; /* its id */
    /* After dirty_start_rebuild: REMAINING is all that differs from the base, and the bitmap can be
     * trusted, whatever it was. */
    bool rebuilt;
};
/* Several bitmaps, also of several nodes: durably all or none of them; waits. On error they are as
 * before, busy. The caller has flushed what was copied to, then the node (advance; remaining); all
 * that base and node consist of, also what others have written there (rebuilt). */
int dirty_conclude(const struct dirty_outcome *outcomes, size_t n, struct error *err) MUST_CHECK;

/* ---- in doubt ---- */

/* Whether a loaded BM has moved on, together with bitmaps of other disks, is not known yet: it is
 * busy, its bits are those of a no, its successor's, which *YES gets and the caller fills in, those
 * of a yes. Writes are recorded in the successor, if RECORD. Nobody can use it, but it can be
 * removed; WHY is what refusals say. Quiesced. */
int dirty_hold(struct dirty_bitmap *bm, bool record, const char *why, struct bitmap **yes,
               struct error *err) MUST_CHECK;
bool dirty_held(const struct dirty_bitmap *bm);

/* It is known: what the bitmap is then. */
struct dirty_answer {
    bool yes;
    bool enabled, inconsistent;
    uint64_t generation;
    const char *job;
};
/* Quiesced; durable after dirty_commit(). What is not to be there at all is then released. */
void dirty_answer(struct dirty_bitmap *bm, const struct dirty_answer *a);

/* ---- what is durable ---- */

/* Before bitmaps of these nodes are changed by what is to be committed. */
int dirty_begin(struct node *const *nodes, size_t n, struct error *err) MUST_CHECK;
/* Nodes that are new in the change that has begun last: it is still one. */
int dirty_join(struct node *const *nodes, size_t n, struct error *err) MUST_CHECK;
/* Makes what these nodes' bitmaps are now durable, all or nothing; waits. Quiesced, if what is
 * marked has changed. On error the caller undoes its changes and calls it again. */
int dirty_commit(struct node *const *nodes, size_t n, struct error *err) MUST_CHECK;
/* That second call. What has failed may be durable all the same: this says what holds, and if it
 * fails, too, the log does. */
void dirty_commit_undone(struct node *const *nodes, size_t n);
/* The second half of clear, add and enable, which guests need not wait for: when what they
 * wrote before is durable too, the bitmaps of these nodes have their base. On error those that had
 * none are inconsistent, and what was cleared is dirty. */
int dirty_settle(struct node *const *nodes, size_t n, struct error *err) MUST_CHECK;

/* What of a bitmap is to be durable; for the store. */
struct dirty_state {
    struct bitmap *current;
    struct bitmap *successor; /* NULL: none */
    /* Bits of the set that writes mark that no write has announced; NULL: none. */
    const struct bitmap *folded;
    bool unannounced; /* either set may have such bits; so until a commit succeeds */
    bool enabled;     /* records (a busy one: its successor) */
    bool inconsistent;
    bool based; /* false: its base is not durable yet */
    uint64_t generation;
    const char *job; /* that has raised the generation; NULL: none */
};
void dirty_get_state(const struct dirty_bitmap *bm, struct dirty_state *ret);
/* All that the store has of N is loaded: if nothing records, N need not be watched. */
void dirty_loaded(struct node *n);
/* For a loaded one. */
void dirty_set_generation(struct dirty_bitmap *bm, uint64_t generation, const char *job);

/* ---- where bitmaps are kept between runs; persist/ registers here ---- */

struct dirty_store {
    /* May a persistent bitmap be added? QEMU's texts. */
    int (*can_add)(struct dirty_store *s, struct node *n, const char *name,
                   uint64_t granularity_bytes, struct error *err);
    int (*remove)(struct dirty_store *s, struct node *n, const char *name, struct error *err);
    /* Would it be kept if it could be trusted again? May be NULL. */
    int (*can_rebuild)(struct dirty_store *s, struct node *n, struct error *err);
    int (*begin)(struct dirty_store *s, struct node *const *nodes, size_t n,
                 struct error *err); /* dirty_begin's */
    /* dirty_commit's and dirty_settle's work: what dirty_get_state says of N nodes' persistent
     * bitmaps becomes durable, of all or of none. */
    int (*commit)(struct dirty_store *s, struct node *const *nodes, size_t n, struct error *err);
    /* All that was written to the node before is durable. */
    int (*flush)(struct dirty_store *s, struct node *n);
    /* The disk is about to grow to TO bytes: the words under this set must be enough for it. */
    int (*grow)(struct dirty_store *s, struct node *n, struct bitmap *bits, uint64_t to);
    /* No bitmap has this set any more. True: the store frees it, else the caller. */
    bool (*bits_gone)(struct dirty_store *s, struct node *n, struct bitmap *bits);
};
void dirty_set_store(struct graph *g, struct dirty_store *s);
