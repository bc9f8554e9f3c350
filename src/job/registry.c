/* The registry of jobs, and the monitor's verbs and queries on it.
 *
 * Each verb finds its job, waits while the job is being concluded or prepared by somebody, finds it
 * anew (it may be gone, or another may have its name), checks the table and acts. */
#include "job/driver.h"

#include "rt/task.h"

struct jobs *jobs_new(struct graph *g)
{
    struct jobs *js = xnew(struct jobs);
    js->graph = g;
    TAILQ_INIT(&js->list);
    scope_init(&js->tasks);
    waitq_init(&js->settled);
    return js;
}

void jobs_free(struct jobs *js)
{
    assert(TAILQ_EMPTY(&js->list));
    scope_fini(&js->tasks);
    free(js);
}

struct graph *jobs_graph(struct jobs *js)
{
    return js->graph;
}

void jobs_set_listener(struct jobs *js, jobs_event_fn *fn, void *opaque)
{
    js->listener = fn;
    js->listener_opaque = opaque;
}

/* A job that is being concluded takes no verb, but it need not wait for ever. */
static void give_up(struct job *j)
{
    if (job_settling(j) && !j->held && j->driver->give_up)
        j->driver->give_up(j);
}

void jobs_give_up(struct jobs *js)
{
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs)
        give_up(j);
}

void jobs_cancel_all(struct jobs *js)
{
    SHIELD();
    struct job *j;
    while ((j = TAILQ_FIRST(&js->list))) {
        job_ref(j);
        while (j->held) { /* its transaction ends first */
            int r = waitq_wait(&js->settled);
            assert(r == 0);
        }
        give_up(j);
        job_cancel_and_wait(j);
        if (j->status == JOB_CONCLUDED) {
            int r = job_dismiss(j, NULL);
            assert(r == 0);
        }
        job_unref(j);
    }
    /* Their tasks have a few lines left. */
    int r = scope_join(&js->tasks);
    assert(r == 0);
}

static struct job *find_id(struct jobs *js, const char *id)
{
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs) {
        if (strcmp(j->id, id) == 0)
            break;
    }
    return j;
}

/* *RET stays NULL when there is none; -ECANCELED when the caller was cancelled meanwhile. */
static int find_settled(struct jobs *js, const char *id, bool block_only, struct job **ret)
{
    *ret = NULL;
    for (;;) {
        struct job *j = find_id(js, id);
        if (!j || (block_only && !j->driver->block_job))
            return 0;
        if (!job_settling(j)) {
            *ret = j;
            return 0;
        }
        int r = waitq_wait(&js->settled);
        if (r < 0)
            return r;
    }
}

static int find(struct jobs *js, const char *id, struct job **ret, struct error *err)
{
    int r = find_settled(js, id, false, ret);
    if (r < 0)
        return error_set_errno(err, -r, "Job '%s'", id);
    return *ret ? 0 : error_set(err, ENOENT, "Job not found");
}

static int find_block(struct jobs *js, const char *id, struct job **ret, struct error *err)
{
    int r = find_settled(js, id, true, ret);
    if (r < 0)
        return error_set_errno(err, -r, "Block job '%s'", id);
    if (!*ret)
        return error_set_class(err, ERROR_DEVICE_NOT_ACTIVE, ENOENT, "Block job '%s' not found",
                               id);
    return 0;
}

static int act(struct job *j, enum job_verb verb, bool force, struct error *err)
{
    SHIELD();
    int r = 0;
    /* A job that is not paused says that first, whatever its state. */
    if (verb != JOB_VERB_RESUME)
        r = job_check_verb(j, verb, err);
    if (r < 0)
        return r;
    switch (verb) {
    case JOB_VERB_CANCEL:
        job_cancel(j, force);
        return 0;
    case JOB_VERB_PAUSE:
        return job_user_pause(j, err);
    case JOB_VERB_RESUME:
        return job_user_resume(j, err);
    case JOB_VERB_COMPLETE:
        return job_complete(j, err);
    case JOB_VERB_FINALIZE:
        return job_finalize(j, err);
    case JOB_VERB_DISMISS:
        return job_dismiss(j, err);
    case JOB_VERB_SET_SPEED:
    case JOB_VERB_CHANGE:
    case JOB_VERBS:
        break;
    }
    assert(!"a verb without arguments");
    return -EINVAL;
}

/* Before a cancel by force waits for the job's end. */
static void hurry(struct jobs *js, const char *id, enum job_verb verb, bool force)
{
    struct job *j = find_id(js, id);
    if (j && verb == JOB_VERB_CANCEL && force)
        give_up(j);
}

int jobs_do(struct jobs *js, const char *id, enum job_verb verb, struct error *err)
{
    struct job *j = NULL;
    hurry(js, id, verb, true);
    int r = find(js, id, &j, err);
    return r < 0 ? r : act(j, verb, true, err);
}

int jobs_do_block(struct jobs *js, const char *device, enum job_verb verb, bool force,
                  struct error *err)
{
    struct job *j = NULL;
    hurry(js, device, verb, force);
    int r = find_block(js, device, &j, err);
    if (r < 0)
        return r;
    if (verb == JOB_VERB_CANCEL && j->user_paused && !force)
        return error_set(err, EBUSY, "The block job for device '%s' is currently paused", device);
    return act(j, verb, force, err);
}

int jobs_set_speed(struct jobs *js, const char *device, int64_t speed, struct error *err)
{
    struct job *j = NULL;
    int r = find_block(js, device, &j, err);
    if (r < 0)
        return r;
    r = job_check_verb(j, JOB_VERB_SET_SPEED, err);
    return r < 0 ? r : job_set_speed(j, speed, err);
}

int jobs_change(struct jobs *js, struct json_object *options, struct error *err)
{
    struct job *j = NULL;
    const char *type = json_get_string(options, "type", "");
    int r = find_block(js, json_get_string(options, "id", ""), &j, err);
    if (r == 0)
        r = job_check_verb(j, JOB_VERB_CHANGE, err);
    if (r < 0)
        return r;
    if (strcmp(type, j->driver->type) != 0)
        return error_set(err, EINVAL, "Job '%s' is '%s' job, not '%s'", j->id, j->driver->type,
                         type);
    if (!j->driver->change)
        return error_set(err, EINVAL, "Job type does not support change");
    SHIELD();
    job_ref(j); /* it may end meanwhile */
    r = j->driver->change(j, options, err);
    job_unref(j);
    return r;
}

struct json_object *jobs_query(struct jobs *js)
{
    struct json_object *list = json_object_new_array();
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs) {
        uint64_t done, total;
        job_get_progress(j, &done, &total);
        struct json_object *info = json_object_new_object();
        json_add_string(info, "id", j->id);
        json_add_string(info, "type", j->driver->type);
        json_add_string(info, "status", job_status_name(j->status));
        json_add_uint(info, "current-progress", done);
        json_add_uint(info, "total-progress", total);
        if (j->error.code)
            json_add_string(info, "error", j->error.text);
        json_object_array_add(list, info);
    }
    return list;
}

struct json_object *jobs_query_block(struct jobs *js)
{
    struct json_object *list = json_object_new_array();
    struct job *j;
    TAILQ_FOREACH (j, &js->list, in_jobs) {
        if (!j->driver->block_job)
            continue;
        uint64_t done, total;
        job_get_progress(j, &done, &total);
        struct json_object *info = json_object_new_object();
        json_add_string(info, "type", j->driver->type);
        json_add_string(info, "device", j->id);
        json_add_uint(info, "len", total);
        json_add_uint(info, "offset", done);
        json_add_bool(info, "busy", false); /* QEMU's tells whether a coroutine runs: never */
        json_add_bool(info, "paused", j->pause_count > 0);
        json_add_int(info, "speed", j->speed);
        json_add_string(info, "io-status", job_io_status_name(j));
        json_add_bool(info, "ready", j->status == JOB_READY || j->status == JOB_STANDBY);
        json_add_string(info, "status", job_status_name(j->status));
        json_add_bool(info, "auto-finalize", j->auto_finalize);
        json_add_bool(info, "auto-dismiss", j->auto_dismiss);
        if (j->result)
            json_add_string(info, "error", j->error.text);
        if (j->driver->info)
            j->driver->info(j, info);
        json_object_array_add(list, info);
    }
    return list;
}
