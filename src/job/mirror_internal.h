/* A mirror job, for mirror.c, which runs and ends it, and mirror_start.c, which makes it. */
#pragma once

#include "copy/follow.h"
#include "dirty/dirty.h"
#include "job/driver.h"

enum sync_mode { SYNC_FULL, SYNC_TOP, SYNC_NONE, SYNC_BITMAP };
enum bitmap_mode { BITMAP_ON_SUCCESS, BITMAP_NEVER, BITMAP_ALWAYS };
/* What the target gets behind it at the end: what it has; what its header names; a given node. */
enum backing_mode { BACKING_AS_IT_IS, BACKING_OPENED, BACKING_GIVEN };

struct mirror {
    struct job job;
    struct node *source, *target; /* references */
    struct node *top;             /* the source without its filters, as it was; a reference */
    struct node *filter;          /* ours; NULL once it is out */
    struct follow *follow;        /* NULL once it is out */
    struct edge *main, *to;       /* the job's, to the filter and to the target */
    enum sync_mode sync;
    bool zero_target, target_is_zero;
    enum backing_mode backing_mode;
    struct node *backing;        /* a reference; for BACKING_GIVEN, NULL: none */
    struct dirty_bitmap *bitmap; /* busy for us; NULL: none */
    enum bitmap_mode bitmap_mode;
    enum job_on_error on_source_error, on_target_error;
    char *replaces; /* NULL: the source */
    struct node *to_replace;
    struct op_blocker replace_blocker;
    struct node_cancel *given_up; /* the target, by a cancel by force */
    uint64_t losses;              /* graph_losses() when it began */
    bool completing;
    bool caught_up; /* the last step's copy is done and durable, and the successor begins there */
    int failed;     /* by a guest's write, negative errno */
};

static inline struct mirror *mirror_of(struct job *j)
{
    return container_of(j, struct mirror, job);
}

extern const struct job_driver mirror_driver;

/* A guest's write did not reach the target: CODE is a negative errno. OPAQUE is the mirror. */
void mirror_guest_write_failed(void *opaque, int code);

/* May TO be replaced by a copy of N: is their content the same for sure? */
bool mirror_can_replace(struct node *n, const struct node *to);
