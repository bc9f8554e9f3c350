/* What the files of a keeper share.
 *
 *     keeper.c     changes of state
 *     sets.c       the sets of bits and their places
 *     session.c    from the first change to the close
 *     writes.c     the write path; hot.c, durable.c: what it need not wait for
 *     guarded.c    a qcow2 image beside the tide file
 *     checkpoint.c when hot regions leave
 *     group.c      changes of several disks at once
 *     recover.c    open
 */
#pragma once

#include "persist/durable.h"
#include "persist/hot.h"
#include "persist/keeper.h"
#include "persist/segment.h"
#include "persist/tide.h"
#include "rt/sync.h"

/* So many epochs are reserved by each superblock. */
enum { EPOCHS_AHEAD = 64 };

/* One set of bits that has a place. */
struct kept_set {
    struct bitmap *bits; /* dirty/'s, over SEGMENT's words once it has one */
    bool gone;           /* no bitmap has it: ours, for a tide file that must name it once more */
    struct kept_bitmap *of;
    unsigned extent;
    uint64_t epoch;
    struct segment *segment; /* NULL: the session has not begun, or there is no runtime directory */
    bool segment_ended;      /* it is of an earlier session */
    LIST_ENTRY(kept_set) link;
};

/* One named bitmap of the node, for as long as it has sets. */
struct kept_bitmap {
    struct dirty_bitmap *handle; /* compared only */
    uint64_t extent[TIDE_EXTENTS];
    unsigned sets;
};

/* See checkpoint.c. */
struct checkpoints {
    struct scope tasks;
    struct event wanted;    /* there is something to do, or to wait for */
    bool resting;           /* nothing has changed since an idle checkpoint */
    bool flush_wanted;      /* a guest has flushed, and it is cheap */
    unsigned writes;        /* under way */
    uint64_t last_ns;       /* when the last write ended */
    uint64_t idle_since_ns; /* that, when the last idle checkpoint began */
    uint64_t period_began_ns;
    uint64_t next_flush_ns; /* no sooner */
    uint64_t done[3];       /* by reason */
};

struct keeper {
    LIST_ENTRY(keeper) in_peers;
    struct node *node;
    struct keeper_options options;
    struct mutex lock;      /* one change of state at a time */
    struct mutex area_lock; /* one writer of areas at a time: no sector is in flight twice */
    struct mutex ring_lock; /* a transaction is under way */
    struct tide *tide;      /* NULL: none so far */
    struct stamp *stamp;
    struct scope tasks;
    struct hot *hot;        /* level power, while a session is open */
    struct durable durable; /* the same */
    LIST_HEAD(, kept_set) sets;
    struct checkpoints checkpoints;

    bool collecting;   /* a task is about to free sets */
    bool beating;      /* a task does it for the stamp, as long as writes are in flight */
    bool stamped;      /* an image is in use, which counts as a write (keeper_stamp_use) */
    bool recording;    /* some bitmap does: writes need hot regions */
    bool takes;        /* they take them: as `recording`, but not less while some are under way */
    uint64_t taken;    /* by so many writes, or waited for */
    bool in_use;       /* a session is open: the superblock says so, durably */
    bool runtime_told; /* whether its runtime directory is a good one */
    bool led;          /* a reopen has led the node to another image than `options.path` is of */
    bool voided;    /* no other node's bitmaps of the image are there, or they are inconsistent */
    bool stale;     /* recovery has found what is to be written anew */
    bool damaged;   /* or a damaged sector of an area: the close writes all of them */
    bool lost;      /* no tide file can be had: bitmaps are inconsistent after the next crash */
    bool giving_up; /* so what would be believed is being taken away, under `lock` */
    bool refusing;  /* nor can the old one be taken away: writes are refused */
    bool void_tide; /* it is damaged, or the qcow2 image does not vouch for it: it gets a successor,
                     * with another uuid */
    /* Of a qcow2 image: */
    bool guarded;                /* it does, durably */
    bool foreign;                /* it does not even name it */
    bool from_tide;              /* recovery has found bitmaps there that the image has not */
    struct tide_id next_session; /* that is about to begin; none: nobody has tried yet */
    struct tide_id next_uuid;    /* of the tide file that it makes */
    uint64_t epoch;              /* the next one */
    uint64_t ring_next;
    uint64_t resizing_bytes; /* equal to the disk's size: it is not being resized */

    /* A group that was prepared when the last program ended, and whose first member cannot be
     * asked: its bitmaps are held (dirty_hold), and both outcomes are carried on (group.c). */
    struct {
        struct tide_id group; /* none: no doubt */
        struct tide_member coordinator;
        struct tide_table no, yes; /* what the bitmaps are then; places and bits: dirty/'s */
    } doubt;

    struct {
        enum recovery verdict;
        char *reason;
        uint64_t bytes_added; /* that are dirty only because they were hot */
        const char *witness;  /* "same", "none", "changed"; NULL: was not asked */
    } recovery;
};

/* A change of state that is being made. */
struct change {
    struct super next;
    const struct bitmap **current, **successor; /* as in next.table */
    bool begins;                                /* a session */
};

/* ---- sets.c ---- */

struct kept_set *keeper_set_of(const struct keeper *k, const struct bitmap *bits);
/* The set under EPOCH, which is one of the superblock's; NULL: none, or gone from memory. */
struct kept_set *keeper_set_at(const struct keeper *k, uint64_t epoch);
void keeper_set_free(struct kept_set *s);
/* A set whose place is known from the tide file; its segment comes with the session. */
struct kept_set *keeper_adopt(struct keeper *k, struct dirty_bitmap *bm, struct bitmap *bits,
                              const struct tide_bitmap *entry, struct tide_area area);
/* C->next.table says what dirty/ says; sets that are new get a place. */
int keeper_build_table(struct keeper *k, struct change *c, struct error *err) MUST_CHECK;
void change_fini(struct change *c);
/* Does the durable superblock name a set of this epoch? */
bool keeper_names(const struct keeper *k, uint64_t epoch);
int keeper_write_area(struct keeper *k, const struct tide_bitmap *entry, struct tide_area area,
                      const struct bitmap *bits, const struct range *ranges, size_t n) MUST_CHECK;
/* Bits that were not announced: all of a set that is new (a merge, a recovery), and what has been
 * folded into one that is known. */
int keeper_write_unannounced(struct keeper *k, struct change *c, struct error *err) MUST_CHECK;

/* ---- keeper.c ---- */

/* Under k->lock: one change, whatever it takes; a tide file that fails is replaced. */
int keeper_change_state(struct keeper *k, struct error *err) MUST_CHECK;
/* Under k->lock: a new tide file that says what the one that has failed is known to say. ERR is not
 * NULL. */
int keeper_renew(struct keeper *k, struct error *err) MUST_CHECK;
void keeper_give_up(struct keeper *k, const struct error *why);
int keeper_begin(struct keeper *k, struct error *err) MUST_CHECK;
/* The steps of a change, for groups. */
bool keeper_has_to_commit(const struct keeper *k);
bool keeper_has_bitmaps(const struct keeper *k);
int keeper_build(struct keeper *k, struct change *c, struct error *err) MUST_CHECK;
/* A tide file that says nothing yet, the first of a disk or in place of one that its image does not
 * vouch for; its session has begun. */
int keeper_make_tide(struct keeper *k, struct error *err) MUST_CHECK;
int keeper_write_before(struct keeper *k, struct change *c, struct error *err) MUST_CHECK;
/* C's table is durable. */
void keeper_changed(struct keeper *k, const struct change *c);
void keeper_collect(struct keeper *k);
void keeper_look(struct keeper *k); /* which bitmaps record */

/* ---- session.c ---- */

int keeper_begin_session(struct keeper *k, struct change *c, struct error *err) MUST_CHECK;
void keeper_describe(struct keeper *k, struct super *s);
/* Is S of this node, and not of one with another driver, or of another part of the image? */
bool keeper_is_of_node(const struct keeper *k, const struct super *s);
void keeper_session_begun(struct keeper *k);
/* The segments of the tide file that says S, and that no set has, go: what a killed program has
 * left. */
void keeper_drop_segments(struct keeper *k, const struct super *s);
struct segments keeper_segments(const struct keeper *k, const struct super *s);
/* The descriptor that carries the image's data; -1: none that we know. */
int keeper_descriptor(const struct keeper *k);
void keeper_set_readonly(struct keeper *k, bool readonly);
void keeper_free(struct keeper *k);

/* ---- guarded.c ---- */

/* Does the image vouch for the tide file that says S? */
enum witness_verdict keeper_ask_guard(struct keeper *k, const struct super *s, char *why,
                                      size_t why_bytes);
/* The rest of recovery: what the image has stored. A guard that vouches for something else goes. */
int keeper_recover_image(struct keeper *k, struct error *err) MUST_CHECK;
/* What is true of the guard after the image has become writable. */
int keeper_recheck_guard(struct keeper *k, struct error *err) MUST_CHECK;
/* Under k->lock: a session is open (or the bitmaps are lost) and the image says that its copies are
 * in use, before the first change. An error: it cannot be made to say so. */
int keeper_engage(struct keeper *k, struct error *err) MUST_CHECK;
bool keeper_is_engaged(const struct keeper *k);
/* The image has everything: the tide file goes, then its guard. */
void keeper_end_guarded(struct keeper *k);
/* What was recovered is about to be saved in the image: begins a session, if there is none. */
void keeper_before_save(struct keeper *k);
/* A full tmpfs is no reason to lose bitmaps: after WHY, which it tells and takes. False: there is
 * nothing that could be done without. */
bool keeper_do_without_runtime(struct keeper *k, struct error *why);
/* Under k->lock: opens the session, and gives up what it must. */
void keeper_begin_use(struct keeper *k);

/* ---- writes.c ---- */

extern const struct hot_ops keeper_hot_ops;
/* While there is a table: the parts of the disk where areas may lack bits; caller frees. */
struct range *keeper_unwritten(const struct keeper *k, size_t *n);
/* Before a change that no bitmap of K's image hears of. */
int keeper_void_others(struct keeper *k) MUST_CHECK;
/* From now on the image's times may be of a write of ours. */
void keeper_stamp_begun(struct keeper *k);
/* As long as an image, or a format without bitmaps of its own, is in use they may be at any moment.
 * Nothing of other disks. */
void keeper_stamp_use(struct keeper *k, bool in_use);

/* ---- checkpoint.c ---- */

void checkpoint_init(struct keeper *k);
void checkpoint_start(struct keeper *k); /* the session begins */
void checkpoint_stop(struct keeper *k);  /* before it ends: waits */
/* Around each write that the keeper has let pass. */
void checkpoint_write_begun(struct keeper *k);
void checkpoint_write_ended(struct keeper *k);
/* Something has changed that an idle checkpoint is to save: the disk rests no more. */
void checkpoint_changed(struct keeper *k);
/* The disk has been idle: called in a task that is cancelled and waited for before the session
 * ends, so it must not take the graph's lock, and what must not be cut is to be shielded. */
void keeper_idle(struct keeper *k);
/* In keeper_idle: has nobody written since? */
bool keeper_rests(const struct keeper *k);
void checkpoint_info(const struct keeper *k, struct json_object *info);

/* ---- group.c ---- */

/* What a change leaves as it is: a group that is in doubt, records of groups that others need. */
void keeper_carry_groups(struct keeper *k, struct super *next);
/* The table of S that holds, in *RET: with a group that was prepared, the one that the group's
 * record tells. *DOUBT: nobody knows; then it is the older, and k->doubt has both. */
void keeper_resolve(struct keeper *k, const struct super *s, struct tide_table *ret, bool *doubt);
void keeper_forget_doubt(struct keeper *k);
/* Records of groups that nobody asks for any more. */
void keeper_drop_old_records(struct keeper *k, struct super *s);
/* Does some bitmap of K wait for the answer? */
bool keeper_in_doubt(const struct keeper *k);
/* Hexadecimal. */
void keeper_group_text(const struct tide_id *group, char text[33]);
/* A disk has been opened: who is in doubt asks again. The graph is locked. */
void keepers_ask_again(struct keepers *all);

/* ---- recover.c ---- */

/* None of the bitmaps can be trusted, and queries say why. */
void keeper_distrust(struct keeper *k, const char *why);
/* Has anybody else written the image since the tide file was written? WHY says what tells so. */
enum witness_verdict keeper_ask_witness(struct keeper *k, const struct super *s, char *why,
                                        size_t why_bytes);
void keeper_decide(struct keeper *k, enum recovery verdict, const char *reason);
bool keeper_has_segments(struct keeper *k, const struct super *s);
/* Reads the tide file and makes its bitmaps the node's. */
int keeper_recover(struct keeper *k, struct error *err) MUST_CHECK;
