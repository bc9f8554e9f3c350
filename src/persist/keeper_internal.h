/* What keeper.c and recover.c share. */
#pragma once

#include "persist/hot.h"
#include "persist/keeper.h"
#include "persist/segment.h"
#include "persist/tide.h"
#include "rt/sync.h"

/* One set of bits that has a place. */
struct kept_set {
    struct bitmap *bits; /* dirty/'s, over SEGMENT's words once it has one; NULL: gone */
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

struct keeper {
    struct node *node;
    struct keeper_options options;
    struct mutex lock;      /* one change of state at a time */
    struct mutex area_lock; /* one writer of areas at a time: no sector is in flight twice */
    struct mutex ring_lock; /* a transaction is under way */
    struct tide *tide;      /* NULL: none so far */
    struct stamp *stamp;
    struct scope tasks;
    struct hot *hot; /* level power, while a session is open */
    LIST_HEAD(, kept_set) sets;

    bool recording; /* some bitmap does: writes need hot regions */
    bool in_use;    /* a session is open: the superblock says so, durably */
    bool stale;     /* recovery has found what is to be written anew */
    bool lost;      /* no tide file can be had: bitmaps are inconsistent after the next crash */
    bool refusing;  /* nor can the old one be taken away: writes are refused */
    uint64_t epoch; /* the next one */
    uint64_t ring_next;
    uint64_t resizing_bytes; /* equal to the disk's size: it is not being resized */

    struct {
        enum recovery verdict;
        char *reason;
        uint64_t bytes_added; /* that are dirty only because they were hot */
        const char *witness;  /* "same", "none", "changed"; NULL: was not asked */
    } recovery;
};

/* A set whose place is known from the tide file; its segment comes with the session. */
struct kept_set *keeper_adopt(struct keeper *k, struct dirty_bitmap *bm, struct bitmap *bits,
                              const struct tide_bitmap *entry, struct tide_area area);
/* The descriptor that carries the image's data; -1: none that we know. */
int keeper_descriptor(const struct keeper *k);
void keeper_look(struct keeper *k); /* which bitmaps record */
void keeper_set_readonly(struct keeper *k, bool readonly);
void keeper_free(struct keeper *k);
/* Has anybody else written the image since the tide file was written? WHY says what tells so. */
enum witness_verdict keeper_ask_witness(struct keeper *k, const struct super *s, char *why,
                                        size_t why_bytes);
/* Reads the tide file and makes its bitmaps the node's. */
int keeper_recover(struct keeper *k, struct error *err) MUST_CHECK;
