/* The room's own: a bitmap from inside, for dirty.c (bitmaps come, go and change), hold.c (what a
 * job or a doubt has of one) and settle.c (what is durable). */
#pragma once

#include "dirty/dirty.h"

#include "base/broken.h"
#include "block/driver.h"

struct dirty_graph {
    struct graph_hook hook;
    struct dirty_store *store; /* lent; NULL: bitmaps live in memory only */
    uint64_t changes;          /* so many have begun (dirty_begin) */
};

TAILQ_HEAD(dirty_list, dirty_bitmap);
LIST_HEAD(dirty_bucket, dirty_bitmap);

/* What a node has of this room, from its opening to its closing. */
struct dirty_node {
    struct node *node;
    struct write_observer observer;
    struct dirty_list list; /* newest first, hidden ones too */
    /* Those with names once more, by the hash of the name: an image may bring 65,535. */
    struct dirty_bucket *buckets;
    size_t n_buckets, n_named;
};

struct dirty_bitmap {
    struct dirty_node *home;
    char *name; /* NULL: nameless */
    uint64_t serial;
    struct bitmap *bits;
    struct dirty_bitmap *successor; /* nameless, in the list; NULL: no job holds this one */
    bool enabled, busy, persistent, inconsistent, readonly, hidden;
    bool kept;         /* persistent, or the successor of one that is */
    bool marked_since; /* a write has marked since the last clear or merge that can be undone */
    bool unbased;      /* its base is not durable yet: add, clear, enable before dirty_settle */
    bool concluding;   /* its successor is about to become the bitmap */
    bool rebased;      /* and with that a part of it has a new base, by JOB */
    bool rebuilt;      /* and that holds for all of it */
    bool settling;     /* its base is about to become durable */
    uint64_t change;   /* that it is pending of, with which it settles; 0: none, it is alone */
    uint64_t losses;   /* graph_losses() when that began */
    bool ended;        /* disabled, and that is not durable yet */
    bool before_lent;  /* BEFORE is a transaction's for its undo: dirty_forget frees it */
    char *why_held;    /* in doubt, and what to say of it; NULL: it is not */
    const char *job;
    struct bitmap *before; /* what it was before a clear that is not durable yet; NULL: none */
    /* Bits have been OR-ed into a set that the store knows, and no commit has taken them yet: of a
     * clear or a start that is undone, or of the answer to a doubt. */
    bool unannounced;
    const struct bitmap *folded; /* OR-ed into the successor by the outcome under way */
    uint64_t generation;
    char *last_job;
    uint64_t peak_bytes;
    uint64_t peak_before; /* the peak that undoing a clear brings back */
    TAILQ_ENTRY(dirty_bitmap) link;
    LIST_ENTRY(dirty_bitmap) in_bucket;
};

struct dirty_graph *dirty_graph_of(const struct node *n); /* NULL: the graph has no bitmaps */
struct dirty_node *dirty_home(const struct node *n);      /* NULL: the node has none */
struct dirty_store *dirty_store_of(const struct node *n);

/* Nobody is inside the node: asserted by whoever changes what is marked. */
void dirty_assert_quiet(const struct node *n);
/* A set that was BM's, which the store may know. */
void dirty_free_bits(struct dirty_bitmap *bm, struct bitmap *bits);
/* A bitmap of HOME with these bits, the newest. */
struct dirty_bitmap *dirty_enlist(struct dirty_node *home, const char *name, struct bitmap *bits);
int dirty_no_memory(const struct node *n, const char *name, uint64_t granularity_bytes,
                    struct error *err);
/* While one of its bitmaps records nobody writes past the node: from now on, or perhaps no more. */
int dirty_watch(struct dirty_bitmap *bm, struct error *err) MUST_CHECK;
void dirty_unwatch(struct dirty_node *home);
