/* What a kind of job implements, and what it may touch of its job. The callers of the commands
 * include job/job.h only.
 *
 * The life of a job, seen from its driver:
 *
 *     job_create -> job_start -> run -+-> prepare -> commit --+-> clean -> free
 *          |                          +-> (failed, cancelled) |
 *          +---- never started -------------> abort ----------+
 *
 * Jobs end in groups: a job that has run waits until all of its group have; if all succeeded, all
 * are prepared, then their bitmaps are left as outcome() says, durably all or none (the last
 * chance to fail), then committed. If one fails or is cancelled, the
 * others are cancelled by force and all are aborted. A job without a group is alone in its own. */
#pragma once

#include "job/job.h"
#include "rt/sync.h"

struct job_group;
struct dirty_outcome;

struct job_driver {
    const char *type; /* "backup": JobType */
    size_t size;      /* of the struct that starts with a struct job */
    bool block_job;   /* has the block-job-* verbs and BLOCK_JOB_* events */

    /* The work; in the job's own task, shielded: a job is cancelled by its flags and interrupt,
     * so that it can always clean up. Looks at job_pause_point() often enough. */
    int (*run)(struct job *j, struct error *err);
    /* Once the whole group has run well; may wait, may fail. */
    int (*prepare)(struct job *j, struct error *err);
    /* How it leaves its bitmap now that it has succeeded; false: it has none. */
    bool (*outcome)(struct job *j, struct dirty_outcome *ret);
    void (*commit)(struct job *j); /* may wait, cannot fail */
    void (*abort)(struct job *j);  /* j->started tells whether it ever ran */
    void (*clean)(struct job *j);  /* after either; lets go of nodes */
    void (*free)(struct job *j);   /* what the struct owns beside itself */

    /* Somebody wants run() to come to a job_pause_point(): pause, cancel. Does not wait. */
    void (*interrupt)(struct job *j);
    /* What a cancel request means; true: like one by force. NULL: always by force. */
    bool (*cancel)(struct job *j, bool force);
    /* It is being concluded, and somebody has lost patience: what hangs shall fail. NULL: nothing
     * that could hang is done then. */
    void (*give_up)(struct job *j);
    void (*set_speed)(struct job *j, uint64_t speed);
    int (*complete)(struct job *j, struct error *err);
    /* block-job-change; NULL: nothing can be changed. OPTIONS are lent. */
    int (*change)(struct job *j, struct json_object *options, struct error *err);
    /* NULL: j->done and j->total. */
    void (*progress)(struct job *j, uint64_t *done, uint64_t *total);
    /* What query-block-jobs shows of this type alone; NULL: nothing. */
    void (*info)(struct job *j, struct json_object *info);
};

/* on-source-error, on-target-error: what to do when a request of the job fails. */
enum job_on_error {
    JOB_ON_ERROR_REPORT, /* the job fails */
    JOB_ON_ERROR_IGNORE, /* tried again at once */
    JOB_ON_ERROR_ENOSPC, /* stop when it is ENOSPC, else report */
    JOB_ON_ERROR_STOP,   /* the job pauses until its user resumes it */
    JOB_ON_ERROR_AUTO,   /* enospc */
};
/* What ARGS say under KEY (BlockdevOnError's names); report, where they are silent. */
int job_get_on_error(struct json_object *args, const char *key, enum job_on_error *ret,
                     struct error *err) MUST_CHECK;

struct job_node {
    struct edge *edge;
    struct op_blocker blocker;
    TAILQ_ENTRY(job_node) link;
};

struct job {
    const struct job_driver *driver;
    struct jobs *jobs;
    char *id;
    unsigned refs;
    enum job_status status; /* changed by job_move alone */
    struct job_group *group;
    TAILQ_ENTRY(job) in_jobs, in_group;

    bool auto_finalize, auto_dismiss;
    bool held;         /* a transaction has it: verbs wait */
    bool started;      /* job_start */
    bool ended;        /* run() has returned */
    bool cancelled;    /* somebody asked */
    bool force_cancel; /* and it shall be as if it had not been issued */
    bool user_paused;
    unsigned pause_count; /* reasons to pause; one until it starts */
    struct waitq wake;    /* run() waits here when it has nothing to do */
    struct event nudge;   /* ends its rest */

    int result; /* 0 or -errno */
    struct error error;
    uint64_t done, total; /* progress */
    int64_t speed;        /* bytes a second, 0: no limit */
    enum { JOB_IO_OK, JOB_IO_FAILED, JOB_IO_NOSPACE } io_status;

    struct user user;   /* of its edges */
    struct user device; /* of those that QEMU has through an unnamed block device */
    TAILQ_HEAD(, job_node) nodes;
};

struct job_options {
    const char *id;
    int64_t speed;
    bool manual_finalize, manual_dismiss;
    bool held;
    struct job_group *group; /* NULL: alone */
};

/* A job in state created; its first reference is the registry's. */
int job_create(struct jobs *js, const struct job_driver *d, const struct job_options *options,
               struct job **ret, struct error *err) MUST_CHECK;
/* Begins to run when the caller next waits. */
void job_start(struct job *j);
/* Undoes a job_create whose driver could not set itself up: nothing of the driver is called but
 * free. */
void job_discard(struct job *j);
/* Ends a job by force, whatever its state, and waits until it is concluded; with one that never
 * started, that is abort and clean. */
void job_cancel_and_wait(struct job *j);

void job_ref(struct job *j);
void job_unref(struct job *j);

/* Keeps NODE as NAME for the job's life and blocks all operations on it. NAME "root": others are
 * told of an unnamed block device, as QEMU calls what a mirror writes to. */
int job_add_node(struct job *j, struct node *n, const char *name, unsigned perm, unsigned shared,
                 struct error *err) MUST_CHECK;
void job_drop_nodes(struct job *j); /* graph_lock held */

/* ---- for run() ---- */

/* Waits here while the job is paused. 0, or -ECANCELED when it was cancelled by force. */
int job_pause_point(struct job *j) MUST_CHECK;
/* Waits until somebody wants something: pause, cancel, complete, job_kick. Then as above. */
int job_idle(struct job *j) MUST_CHECK;
void job_kick(struct job *j);
/* State ready, and its event. */
void job_ready(struct job *j);
/* A request failed with CODE (positive errno): raises BLOCK_JOB_ERROR, and pauses the job if
 * that is what the user wants. True: go on (through job_pause_point); false: fail. */
bool job_go_on_after(struct job *j, enum job_on_error on_error, bool is_read, int code);
/* After that, before it goes on: a tenth of a second, or until somebody wants something. What fails
 * for ever and is ignored costs no processor then, and does not flood the monitor with events. */
void job_rest(struct job *j);

/* ---- groups ---- */

struct job_group *job_group_new(void);
void job_group_unref(struct job_group *grp);
DEFINE_CLEANUP(struct job_group *, job_group_unref, job_group_unrefp)

/* ---- inside the room: registry.c and job.c ---- */

TAILQ_HEAD(job_list, job);
struct jobs {
    struct graph *graph;
    struct job_list list; /* newest first */
    struct scope tasks;
    struct waitq settled; /* a group has been concluded, or a job let go by its transaction */
    jobs_event_fn *listener;
    void *listener_opaque;
};

int job_check_verb(struct job *j, enum job_verb v, struct error *err) MUST_CHECK;
bool job_settling(const struct job *j); /* verbs wait */
bool job_may_become(enum job_status from, enum job_status to);
bool job_accepts(enum job_status s, enum job_verb v);
void job_get_progress(struct job *j, uint64_t *done, uint64_t *total);
const char *job_io_status_name(const struct job *j);

/* What the verbs do, once they are allowed. */
void job_cancel(struct job *j, bool force);
void job_pause(struct job *j);  /* internal: counted, not shown as the user's */
void job_resume(struct job *j); /* its counterpart */
int job_user_pause(struct job *j, struct error *err) MUST_CHECK;
int job_user_resume(struct job *j, struct error *err) MUST_CHECK;
int job_set_speed(struct job *j, int64_t speed, struct error *err) MUST_CHECK;
int job_complete(struct job *j, struct error *err) MUST_CHECK;
int job_finalize(struct job *j, struct error *err) MUST_CHECK;
int job_dismiss(struct job *j, struct error *err) MUST_CHECK;
