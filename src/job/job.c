/* The state machine of all jobs, and the groups in which they end.
 *
 * One function moves a job (job_move); it checks the table and raises the event. Everything runs
 * on the loop, so between two waits nothing moves; the waits are in run(), in prepare, commit,
 * abort and clean, and where an aborting group waits for a member's run() to return. While a
 * group is being concluded it says so (`concluding`) and verbs wait. */
#include "dirty/dirty.h"
#include "job/driver.h"

#include "base/broken.h"
#include "base/id.h"
#include "base/log.h"
#include "rt/clock.h"
#include "rt/task.h"

enum { REST_NS = 100 * 1000 * 1000 };
#define NEGATIVE_SPEED "Parameter 'speed' expects a non-negative value"

#define TO(s) (1u << JOB_##s)

static const uint16_t may_become[JOB_STATUSES] = {
    [JOB_UNDEFINED] = TO(CREATED),
    [JOB_CREATED] = TO(RUNNING) | TO(ABORTING) | TO(NULL),
    [JOB_RUNNING] = TO(PAUSED) | TO(READY) | TO(WAITING) | TO(ABORTING),
    [JOB_PAUSED] = TO(RUNNING),
    [JOB_READY] = TO(STANDBY) | TO(WAITING) | TO(ABORTING),
    [JOB_STANDBY] = TO(READY),
    [JOB_WAITING] = TO(PENDING) | TO(ABORTING),
    [JOB_PENDING] = TO(ABORTING) | TO(CONCLUDED),
    [JOB_ABORTING] = TO(ABORTING) | TO(CONCLUDED),
    [JOB_CONCLUDED] = TO(NULL),
};

#define ALIVE (TO(CREATED) | TO(RUNNING) | TO(PAUSED) | TO(READY) | TO(STANDBY))
static const uint16_t accepted_in[JOB_VERBS] = {
    [JOB_VERB_CANCEL] = ALIVE | TO(WAITING) | TO(PENDING),
    [JOB_VERB_PAUSE] = ALIVE,
    [JOB_VERB_RESUME] = ALIVE,
    [JOB_VERB_SET_SPEED] = ALIVE,
    [JOB_VERB_COMPLETE] = TO(READY) | TO(STANDBY),
    [JOB_VERB_FINALIZE] = TO(PENDING),
    [JOB_VERB_DISMISS] = TO(CONCLUDED),
    [JOB_VERB_CHANGE] = ALIVE,
};

#define RAN (TO(WAITING) | TO(PENDING) | TO(ABORTING) | TO(CONCLUDED) | TO(NULL))

struct job_group {
    unsigned refs; /* one a job, one of whoever fills it */
    struct job_list jobs;
    bool aborting;
    bool committed;  /* every bitmap has its outcome: nobody can fail any more */
    bool concluding; /* somebody ends it just now */
    struct waitq member_ran;
};

const char *job_status_name(enum job_status s)
{
    static const char *const names[JOB_STATUSES] = {
        "undefined", "created", "running",  "paused",    "ready", "standby",
        "waiting",   "pending", "aborting", "concluded", "null",
    };
    return names[s];
}

const char *job_verb_name(enum job_verb v)
{
    static const char *const names[JOB_VERBS] = {
        "cancel", "pause", "resume", "set-speed", "complete", "finalize", "dismiss", "change",
    };
    return names[v];
}

bool job_may_become(enum job_status from, enum job_status to)
{
    return may_become[from] & (1u << to);
}

bool job_accepts(enum job_status s, enum job_verb v)
{
    return accepted_in[v] & (1u << s);
}

static bool has_run(const struct job *j)
{
    return RAN & (1u << j->status);
}

/* ---- events ---- */

static void raise_event(struct job *j, const char *name, struct json_object *data)
{
    if (j->jobs->listener)
        j->jobs->listener(j->jobs->listener_opaque, name, data);
    json_object_put(data);
}

static void job_move(struct job *j, enum job_status to)
{
    assert(job_may_become(j->status, to));
    if (j->status == to)
        return;
    j->status = to;

    struct json_object *data = json_object_new_object();
    json_add_string(data, "id", j->id);
    json_add_string(data, "status", job_status_name(to));
    raise_event(j, "JOB_STATUS_CHANGE", data);
}

void job_get_progress(struct job *j, uint64_t *done, uint64_t *total)
{
    if (j->driver->progress)
        j->driver->progress(j, done, total);
    else {
        *done = j->done;
        *total = j->total;
    }
}

/* BLOCK_JOB_COMPLETED, _CANCELLED and _READY say the same things. */
static void raise_block_job(struct job *j, const char *name, const char *why)
{
    if (!j->driver->block_job)
        return;
    uint64_t done, total;
    job_get_progress(j, &done, &total);

    struct json_object *data = json_object_new_object();
    json_add_string(data, "type", j->driver->type);
    json_add_string(data, "device", j->id);
    json_add_uint(data, "len", total);
    json_add_uint(data, "offset", done);
    json_add_int(data, "speed", j->speed);
    if (why)
        json_add_string(data, "error", why);
    raise_event(j, name, data);
}

static void raise_pending(struct job *j)
{
    if (!j->driver->block_job)
        return;
    struct json_object *data = json_object_new_object();
    json_add_string(data, "type", j->driver->type);
    json_add_string(data, "id", j->id);
    raise_event(j, "BLOCK_JOB_PENDING", data);
}

/* ---- groups ---- */

struct job_group *job_group_new(void)
{
    struct job_group *grp = xnew(struct job_group);
    grp->refs = 1;
    TAILQ_INIT(&grp->jobs);
    waitq_init(&grp->member_ran);
    return grp;
}

void job_group_unref(struct job_group *grp)
{
    if (--grp->refs == 0)
        free(grp);
}

static void group_add(struct job_group *grp, struct job *j)
{
    grp->refs++;
    j->group = grp;
    TAILQ_INSERT_HEAD(&grp->jobs, j, in_group);
}

static void group_remove(struct job *j)
{
    struct job_group *grp = j->group;
    if (!grp)
        return;
    TAILQ_REMOVE(&grp->jobs, j, in_group);
    j->group = NULL;
    job_group_unref(grp);
}

bool job_settling(const struct job *j)
{
    return j->held || (j->group && j->group->concluding);
}

/* ---- making and unmaking ---- */

static char *describe_user(struct user *u)
{
    struct job *j = container_of(u, struct job, user);
    return xasprintf("%s job '%s'", j->driver->type, j->id);
}

static char *describe_device(struct user *u)
{
    return xstrdup("an unnamed block device");
}

static void ignore_edge(struct user *u, struct edge *e)
{
}

static const struct user_ops job_user_ops = {
    .describe = describe_user,
    .moved = ignore_edge,
    .resized = ignore_edge,
};

static const struct user_ops job_device_ops = {
    .describe = describe_device,
    .moved = ignore_edge,
    .resized = ignore_edge,
};

void job_ref(struct job *j)
{
    j->refs++;
}

void job_unref(struct job *j)
{
    if (--j->refs)
        return;
    assert(j->status == JOB_NULL && !j->group && TAILQ_EMPTY(&j->nodes));
    if (j->driver->free)
        j->driver->free(j);
    free(j->id);
    free(j);
}

static void let_go(struct job *j)
{
    group_remove(j);
    j->held = false;
    job_move(j, JOB_NULL);
    TAILQ_REMOVE(&j->jobs->list, j, in_jobs);
    waitq_wake_all(&j->jobs->settled);
    job_unref(j);
}

void job_discard(struct job *j)
{
    assert(j->status == JOB_CREATED && TAILQ_EMPTY(&j->nodes));
    let_go(j);
}

int job_create(struct jobs *js, const struct job_driver *d, const struct job_options *options,
               struct job **ret, struct error *err)
{
    const char *id = options->id;
    if (!id)
        return error_set(err, EINVAL, "An explicit job ID is required");
    if (!id_well_formed(id))
        return error_set(err, EINVAL, "Invalid job ID '%s'", id);
    struct job *other;
    TAILQ_FOREACH (other, &js->list, in_jobs) {
        if (strcmp(other->id, id) == 0)
            return error_set(err, EEXIST, "Job ID '%s' already in use", id);
    }
    assert(d->size >= sizeof(struct job));
    struct job *j = xcalloc(1, d->size);
    j->driver = d;
    j->jobs = js;
    j->id = xstrdup(id);
    j->refs = 1;
    j->auto_finalize = !options->manual_finalize;
    j->auto_dismiss = !options->manual_dismiss;
    j->held = options->held;
    j->pause_count = 1;
    j->speed = options->speed;
    j->user.ops = &job_user_ops;
    j->device.ops = &job_device_ops;
    waitq_init(&j->wake);
    event_init(&j->nudge);
    TAILQ_INIT(&j->nodes);
    TAILQ_INSERT_HEAD(&js->list, j, in_jobs);

    if (options->group)
        group_add(options->group, j);
    else {
        CLEANUP(job_group_unrefp) struct job_group *alone = job_group_new();
        group_add(alone, j);
    }
    job_move(j, JOB_CREATED);
    if (options->speed < 0) {
        job_discard(j);
        return error_set(err, EINVAL, NEGATIVE_SPEED);
    }
    *ret = j;
    return 0;
}

int job_add_node(struct job *j, struct node *n, const char *name, unsigned perm, unsigned shared,
                 struct error *err)
{
    struct edge *e = NULL;
    struct user *u = strcmp(name, "root") == 0 ? &j->device : &j->user;
    int r = edge_attach_user(u, n, name, perm, shared, &e, err);
    if (r < 0)
        return r;
    e->stay = true; /* a later filter goes over what we work on, not between */

    struct job_node *jn = xnew(struct job_node);
    jn->edge = e;
    jn->blocker.ops = (1u << BLOCK_OPS) - 1;
    jn->blocker.reason = xasprintf("block device is in use by block job: %s", j->driver->type);
    node_block_ops(n, &jn->blocker);
    TAILQ_INSERT_HEAD(&j->nodes, jn, link);
    return 0;
}

static void unblock_nodes(struct job *j)
{
    struct job_node *jn;
    TAILQ_FOREACH (jn, &j->nodes, link)
        node_unblock_ops(jn->edge->node, &jn->blocker);
}

void job_drop_nodes(struct job *j)
{
    unblock_nodes(j);
    struct job_node *jn;
    while ((jn = TAILQ_FIRST(&j->nodes))) {
        TAILQ_REMOVE(&j->nodes, jn, link);
        edge_detach(jn->edge);
        free(jn->blocker.reason);
        free(jn);
    }
}

/* ---- the end ---- */

static void settle_result(struct job *j)
{
    if (!j->result && j->force_cancel)
        j->result = -ECANCELED;
    if (j->result) {
        if (!j->error.code)
            error_set(&j->error, -j->result, "%s", strerror(-j->result));
        job_move(j, JOB_ABORTING);
    }
}

static void finalize_one(struct job *j)
{
    const struct job_driver *d = j->driver;

    if (!j->group->committed)
        settle_result(j);
    if (j->result) {
        if (d->abort)
            d->abort(j);
    } else if (d->commit) {
        d->commit(j);
    }
    if (d->clean)
        d->clean(j);

    if (j->started) {
        if (j->force_cancel)
            raise_block_job(j, "BLOCK_JOB_CANCELLED", NULL);
        else
            raise_block_job(j, "BLOCK_JOB_COMPLETED", j->result ? j->error.text : NULL);
    }
    group_remove(j);
    job_move(j, JOB_CONCLUDED);
    if (j->auto_dismiss || !j->started)
        let_go(j);
}

static void ask_to_cancel(struct job *j, bool force)
{
    force = j->driver->cancel ? j->driver->cancel(j, force) : true;

    if (j->user_paused) {
        j->io_status = JOB_IO_OK;
        j->user_paused = false;
        assert(j->pause_count > 0);
        j->pause_count--;
    }
    /* A gentle request comes too late for a job that is done. */
    if (force || !j->ended) {
        j->cancelled = true;
        j->force_cancel |= force;
    }
}

static void group_abort(struct job *first)
{
    struct job_group *grp = first->group;
    if (grp->aborting) {
        waitq_wake_all(&grp->member_ran);
        return; /* another member does it for us */
    }
    struct jobs *js = first->jobs;
    grp->aborting = grp->concluding = true;
    grp->refs++;

    struct job *j;
    TAILQ_FOREACH (j, &grp->jobs, in_group) {
        if (j != first && !(j->ended && BROKEN(sibling_not_cancelled))) {
            ask_to_cancel(j, true);
            if (j->started)
                job_kick(j);
            else
                settle_result(j);
        }
    }
    while ((j = TAILQ_FIRST(&grp->jobs))) {
        if (!has_run(j)) {
            int r = waitq_wait(&grp->member_ran);
            assert(r == 0); /* shielded */
            continue;
        }
        finalize_one(j);
    }
    grp->concluding = false;
    waitq_wake_all(&js->settled);
    job_group_unref(grp);
}

/* All bitmaps of the group at once. Whoever is cancelled from here on is too late. */
static int group_outcomes(struct job_group *grp, struct error *err)
{
    struct job *j;
    size_t n = 0, count = 0;
    TAILQ_FOREACH (j, &grp->jobs, in_group)
        count++;
    CLEANUP(memory_freep) struct dirty_outcome *list = xcalloc(count, sizeof *list);

    TAILQ_FOREACH (j, &grp->jobs, in_group) {
        list[n].job = j->id;
        n += j->driver->outcome && j->driver->outcome(j, &list[n]);
    }
    return n ? dirty_conclude(list, n, err) : 0;
}

static void group_conclude(struct job_group *grp)
{
    struct jobs *js = TAILQ_FIRST(&grp->jobs)->jobs;
    grp->concluding = true;
    grp->refs++;

    struct job *j, *failed = NULL;
    TAILQ_FOREACH (j, &grp->jobs, in_group) {
        if (j->driver->prepare)
            j->result = j->driver->prepare(j, &j->error);
        settle_result(j);
        if (j->result) {
            failed = j;
            break;
        }
    }
    if (!failed) {
        j = TAILQ_FIRST(&grp->jobs);
        j->result = group_outcomes(grp, &j->error);
        if (j->result)
            failed = j;
        else
            grp->committed = true;
    }
    if (failed) {
        group_abort(BROKEN(another_spared) ? TAILQ_LAST(&grp->jobs, job_list) : failed);
    } else {
        while ((j = TAILQ_FIRST(&grp->jobs)))
            finalize_one(j);
        grp->concluding = false;
        waitq_wake_all(&js->settled);
    }
    job_group_unref(grp);
}

static void group_success(struct job *done)
{
    struct job_group *grp = done->group;
    job_move(done, JOB_WAITING);

    if (BROKEN(nodes_let_go_in_waiting))
        unblock_nodes(done);

    struct job *j;
    TAILQ_FOREACH (j, &grp->jobs, in_group) {
        if (!has_run(j))
            return;
        assert(j->result == 0);
    }
    bool all_auto = true;
    TAILQ_FOREACH (j, &grp->jobs, in_group) {
        job_move(j, JOB_PENDING);
        if (!j->auto_finalize) {
            raise_pending(j);
            all_auto = false;
        }
    }
    if (all_auto || (BROKEN(last_member_decides) && done->auto_finalize))
        group_conclude(grp);
}

/* The job has nothing left to do but to end: after run(), or cancelled before it started. */
static void job_ran(struct job *j)
{
    assert(j->group && !has_run(j));
    settle_result(j);
    if (j->result)
        group_abort(j);
    else
        group_success(j);
}

/* ---- running ---- */

static int job_task(void *arg)
{
    struct job *j = arg;
    SHIELD();
    task_set_name(j->id);

    int r = job_pause_point(j);
    (void)r; /* run() finds out by itself, and may have to undo */
    j->result = j->driver->run(j, &j->error);
    j->ended = true;
    job_ran(j);
    job_unref(j);
    return 0;
}

void job_start(struct job *j)
{
    assert(j->status == JOB_CREATED && !j->started);
    j->started = true;
    j->held = false;
    j->pause_count--;
    job_move(j, JOB_RUNNING);
    waitq_wake_all(&j->jobs->settled);
    job_ref(j);
    scope_spawn(&j->jobs->tasks, job_task, j);
}

int job_pause_point(struct job *j)
{
    SHIELD();
    if (j->pause_count > 0 && !j->force_cancel) {
        enum job_status was = j->status;
        job_move(j, was == JOB_READY ? JOB_STANDBY : JOB_PAUSED);
        while (j->pause_count > 0 && !j->force_cancel) {
            int r = waitq_wait(&j->wake);
            assert(r == 0);
        }
        job_move(j, was);
    }
    return j->force_cancel ? -ECANCELED : 0;
}

int job_idle(struct job *j)
{
    SHIELD();
    if (j->pause_count == 0 && !j->force_cancel) {
        int r = waitq_wait(&j->wake);
        assert(r == 0);
    }
    return job_pause_point(j);
}

void job_kick(struct job *j)
{
    if (!j->started || j->ended)
        return;
    if (j->driver->interrupt)
        j->driver->interrupt(j);
    waitq_wake_all(&j->wake);
    event_set(&j->nudge);
}

void job_ready(struct job *j)
{
    job_move(j, JOB_READY);
    raise_block_job(j, "BLOCK_JOB_READY", NULL);
}

int job_get_on_error(struct json_object *args, const char *key, enum job_on_error *ret,
                     struct error *err)
{
    static const char *const names[] = {"report", "ignore", "enospc", "stop", "auto"};
    const char *name = json_get_string(args, key, "report");

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
        if (strcmp(name, names[i]) == 0) {
            *ret = (enum job_on_error)i;
            return 0;
        }
    return error_set(err, EINVAL, "Parameter '%s' does not accept value '%s'", key, name);
}

bool job_go_on_after(struct job *j, enum job_on_error on_error, bool is_read, int code)
{
    bool stop = on_error == JOB_ON_ERROR_STOP;
    if (on_error == JOB_ON_ERROR_ENOSPC || on_error == JOB_ON_ERROR_AUTO)
        stop = code == ENOSPC;
    bool ignore = on_error == JOB_ON_ERROR_IGNORE;

    struct json_object *data = json_object_new_object();
    json_add_string(data, "device", j->id);
    json_add_string(data, "operation", is_read ? "read" : "write");
    json_add_string(data, "action", stop ? "stop" : ignore ? "ignore" : "report");
    raise_event(j, "BLOCK_JOB_ERROR", data);

    if (stop) {
        if (!j->user_paused) { /* what the user resumes is the user's pause */
            j->user_paused = true;
            j->pause_count++;
        }
        if (j->io_status == JOB_IO_OK)
            j->io_status = code == ENOSPC ? JOB_IO_NOSPACE : JOB_IO_FAILED;
    }
    return stop || ignore;
}

void job_rest(struct job *j)
{
    SHIELD();
    if (j->pause_count > 0 || j->force_cancel || BROKEN(ignored_at_once))
        return;
    event_reset(&j->nudge);
    int r = event_wait_until(&j->nudge, clock_after_ns(REST_NS));
    (void)r; /* the moment, or somebody wants something */
}

/* ---- what verbs do ---- */

int job_check_verb(struct job *j, enum job_verb v, struct error *err)
{
    if (job_accepts(j->status, v))
        return 0;
    return error_set(err, EPERM, "Job '%s' in state '%s' cannot accept command verb '%s'", j->id,
                     job_status_name(j->status), job_verb_name(v));
}

void job_cancel(struct job *j, bool force)
{
    if (j->status == JOB_CONCLUDED) {
        let_go(j);
        return;
    }
    ask_to_cancel(j, force);
    if (!j->started)
        job_ran(j);
    else if (!j->ended)
        job_kick(j);
    else if (j->force_cancel)
        group_abort(j);
}

void job_cancel_and_wait(struct job *j)
{
    SHIELD();
    struct jobs *js = j->jobs;
    job_ref(j);
    while (j->group && j->group->concluding) {
        int r = waitq_wait(&js->settled);
        assert(r == 0);
    }
    if (j->status != JOB_NULL && j->status != JOB_CONCLUDED)
        job_cancel(j, true);
    while (j->status != JOB_NULL && j->status != JOB_CONCLUDED) {
        int r = waitq_wait(&js->settled);
        assert(r == 0);
    }
    job_unref(j);
}

void job_pause(struct job *j)
{
    j->pause_count++;
    job_kick(j);
}

void job_resume(struct job *j)
{
    assert(j->pause_count > 0);
    if (--j->pause_count == 0)
        job_kick(j);
}

int job_user_pause(struct job *j, struct error *err)
{
    if (j->user_paused)
        return error_set(err, EBUSY, "Job is already paused");
    j->user_paused = true;
    job_pause(j);
    return 0;
}

int job_user_resume(struct job *j, struct error *err)
{
    if (!j->user_paused || j->pause_count == 0)
        return error_set(err, EINVAL, "Can't resume a job that was not paused");
    int r = job_check_verb(j, JOB_VERB_RESUME, err);
    if (r < 0)
        return r;
    j->io_status = JOB_IO_OK;
    j->user_paused = false;
    job_resume(j);
    return 0;
}

int job_set_speed(struct job *j, int64_t speed, struct error *err)
{
    if (speed < 0)
        return error_set(err, EINVAL, NEGATIVE_SPEED);
    j->speed = speed;
    if (j->driver->set_speed)
        j->driver->set_speed(j, (uint64_t)speed);
    return 0;
}

int job_complete(struct job *j, struct error *err)
{
    if (j->cancelled || !j->driver->complete)
        return error_set(err, EINVAL, "The active block job '%s' cannot be completed", j->id);
    return j->driver->complete(j, err);
}

int job_finalize(struct job *j, struct error *err)
{
    group_conclude(j->group);
    return 0;
}

int job_dismiss(struct job *j, struct error *err)
{
    let_go(j);
    return 0;
}

const char *job_io_status_name(const struct job *j)
{
    static const char *const names[] = {"ok", "failed", "nospace"};
    return names[j->io_status];
}
