/* Jobs: work that goes on behind a command, as its user sees it.
 *
 * All jobs (backup, compare, create, mirror; later commit, stream) are one state machine, QEMU's,
 * with its states, verbs, events and words. A job runs as a task in a scope that the registry
 * owns; it ends through its group (job/driver.h): alone, or together with others.
 *
 *     created -> running <-> paused
 *                   |   \-> ready <-> standby
 *                   v        v
 *                waiting -> pending -> concluded -> null
 *                   \--------\--> aborting --^
 *
 * A verb that meets a job in the middle of being concluded (flushes, bitmaps made durable) waits
 * until that is over and then looks again, so a client sees each job before or after its end,
 * never half way. So verbs are called by tasks that do not hold graph_lock(). */
#pragma once

#include "base/error.h"
#include "base/json.h"
#include "block/block.h"

struct jobs;
struct job;

enum job_status {
    JOB_UNDEFINED,
    JOB_CREATED,
    JOB_RUNNING,
    JOB_PAUSED,
    JOB_READY,
    JOB_STANDBY,
    JOB_WAITING,
    JOB_PENDING,
    JOB_ABORTING,
    JOB_CONCLUDED,
    JOB_NULL,
    JOB_STATUSES,
};

enum job_verb {
    JOB_VERB_CANCEL,
    JOB_VERB_PAUSE,
    JOB_VERB_RESUME,
    JOB_VERB_SET_SPEED,
    JOB_VERB_COMPLETE,
    JOB_VERB_FINALIZE,
    JOB_VERB_DISMISS,
    JOB_VERB_CHANGE,
    JOB_VERBS,
};

const char *job_status_name(enum job_status s); /* "created", ... as JobStatus */
const char *job_verb_name(enum job_verb v);     /* "set-speed", ... as JobVerb */

/* ---- the registry: one a loop ---- */

struct jobs *jobs_new(struct graph *g);
/* All jobs have ended and been dismissed (jobs_cancel_all). */
void jobs_free(struct jobs *js);
DEFINE_CLEANUP(struct jobs *, jobs_free, jobs_freep)
struct graph *jobs_graph(struct jobs *js);

/* JOB_STATUS_CHANGE and BLOCK_JOB_COMPLETED, _CANCELLED, _ERROR, _READY, _PENDING go to one
 * listener, in order, with QEMU's members. DATA is lent. It must not wait. */
typedef void jobs_event_fn(void *opaque, const char *name, struct json_object *data);
void jobs_set_listener(struct jobs *js, jobs_event_fn *fn, void *opaque);

/* Jobs that are being concluded do not wait for what hangs any longer. */
void jobs_give_up(struct jobs *js);
/* Cancels every job by force and waits until all are concluded and gone; shielded. The end of
 * the program; also before nodes are closed. */
void jobs_cancel_all(struct jobs *js);

/* ---- the commands ---- */

/* job-cancel (which forces), job-pause, job-resume, job-complete, job-finalize, job-dismiss:
 * VERB on the job ID, or "Job not found". */
int jobs_do(struct jobs *js, const char *id, enum job_verb verb, struct error *err) MUST_CHECK;

/* block-job-cancel (FORCE as given, default false), -pause, -resume, -complete, -finalize,
 * -dismiss: as above for block jobs only; class DeviceNotActive, "Block job 'x' not found". */
int jobs_do_block(struct jobs *js, const char *device, enum job_verb verb, bool force,
                  struct error *err) MUST_CHECK;
/* block-job-set-speed: bytes a second, 0 for no limit. */
int jobs_set_speed(struct jobs *js, const char *device, int64_t speed,
                   struct error *err) MUST_CHECK;

/* block-job-change: OPTIONS has `id`, `type`, and what that type of job can change. */
int jobs_change(struct jobs *js, struct json_object *options, struct error *err) MUST_CHECK;

struct json_object *jobs_query(struct jobs *js);       /* query-jobs: array of JobInfo */
struct json_object *jobs_query_block(struct jobs *js); /* query-block-jobs: of BlockJobInfo */

/* blockdev-create: a job that makes an image (OPTIONS: BlockdevCreateOptions, lent). It stays
 * concluded until it is dismissed, as QEMU's. */
int create_job_start(struct jobs *js, const char *job_id, struct json_object *options,
                     struct error *err) MUST_CHECK;
/* blockdev-backup, drive-backup, x-tidemark-compare: actions of a transaction, see
 * job/transaction.h. */
