/* Compare: makes a bitmap anew from the disk and the last backup of it, while guests write. For a
 * bitmap that cannot be trusted any more: the next increment needs no full backup then.
 *
 * The instant is the transaction's, which has the disk quiesced: the bitmap gets a successor, that
 * of an inconsistent one, too. At the end
 *
 *     success             what differs OR successor; consistent, recording, generation raised
 *     failed, cancelled   bitmap OR successor; what was inconsistent stays so
 *     never started       unchanged
 *
 * One superblock at the end makes it trusted (dirty_conclude); a crash before that finds it as it
 * was. The base of the bitmap is then the target. So before that everything that both disks consist
 * of is flushed, also the images that are open read-only, and what others wrote to the disk before
 * we had it: nothing that was found equal may become different with the power. */
#include "job/compare.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "copy/diff.h"
#include "dirty/dirty.h"

struct compare {
    struct job job;
    struct node *disk, *target;  /* lent; the job's edges keep them */
    struct dirty_bitmap *bitmap; /* busy for us; NULL: no more */
    struct diff *diff;
    enum job_on_error on_source_error, on_target_error;
    uint64_t losses; /* graph_losses() when it began */
};

static struct compare *compare_of(struct job *j)
{
    return container_of(j, struct compare, job);
}

/* ---- running ---- */

static int compare_run(struct job *j, struct error *err)
{
    struct compare *c = compare_of(j);

    for (;;) {
        bool disk_failed;
        diff_resume(c->diff);
        if (job_pause_point(j) < 0)
            return 0; /* cancelled: the state machine says so */
        int r = diff_run(c->diff, &disk_failed);
        if (r == -EINTR)
            continue;
        if (r == 0 || j->force_cancel)
            return 0;
        if (diff_resized(c->diff))
            return error_set(err, EINVAL, "Node '%s' has got another size", node_name(c->disk));
        if (!job_go_on_after(j, disk_failed ? c->on_source_error : c->on_target_error, true, -r))
            return error_set_errno(err, -r, "Could not read node '%s' at offset %llu",
                                   node_name(disk_failed ? c->disk : c->target),
                                   (unsigned long long)diff_failed_at(c->diff));
        job_rest(j);
    }
}

static void compare_interrupt(struct job *j)
{
    diff_interrupt(compare_of(j)->diff);
}

static void compare_set_speed(struct job *j, uint64_t speed)
{
    diff_set_speed(compare_of(j)->diff, speed);
}

static void compare_progress(struct job *j, uint64_t *done, uint64_t *total)
{
    struct compare *c = compare_of(j);
    if (c->diff)
        diff_progress(c->diff, &j->done, &j->total);
    *done = j->done;
    *total = j->total;
}

/* ---- the end ---- */

static int flush(struct node *n, struct error *err)
{
    int r = node_flush_tree(n);
    return r < 0 ? error_set_errno(err, -r, "Could not flush node '%s'", node_name(n)) : 0;
}

static int compare_prepare(struct job *j, struct error *err)
{
    struct compare *c = compare_of(j);
    GRAPH_LOCKED(jobs_graph(j->jobs));

    int r = BROKEN(compare_base_not_flushed) ? 0 : flush(c->target, err);
    if (r == 0 && !BROKEN(compare_disk_not_flushed))
        r = flush(c->disk, err);
    if (r == 0 && (node_lost_since(c->disk, c->losses) || node_lost_since(c->target, c->losses)))
        r = error_set_errno(err, EIO, "What was not flushed may have been lost with a server");
    return r;
}

static bool compare_outcome(struct job *j, struct dirty_outcome *ret)
{
    struct compare *c = compare_of(j);
    ret->bitmap = c->bitmap;
    ret->remaining = diff_found(c->diff);
    ret->rebuilt = true;
    return true;
}

static void compare_commit(struct job *j)
{
    compare_of(j)->bitmap = NULL; /* left as outcome says */
}

/* What was inconsistent does not record any more: the store stops to follow its writes, and that
 * changes with no write under way. */
static void stop_recording(struct compare *c)
{
    struct graph *g = jobs_graph(c->job.jobs);
    struct error err = ERROR_INIT;
    GRAPH_LOCKED(g);

    graph_quiesce_begin(g, &c->disk, 1);
    if (dirty_commit(&c->disk, 1, &err) < 0)
        log_error("job '%s': %s", c->job.id, err.text);
    graph_quiesce_end(g, &c->disk, 1);
}

static void compare_abort(struct job *j)
{
    struct compare *c = compare_of(j);
    struct dirty_outcome o = {.bitmap = c->bitmap, .job = j->id};
    struct error err = ERROR_INIT;

    if (BROKEN(cancelled_compare_counts) && j->started) {
        o.remaining = diff_found(c->diff);
        o.rebuilt = true;
    }
    if (j->held)
        dirty_unstart(c->bitmap); /* its transaction has not been committed */
    else if (dirty_conclude(&o, 1, &err) < 0)
        log_error("job '%s': bitmap '%s' stays busy: %s", j->id, dirty_name(c->bitmap), err.text);
    else if (dirty_inconsistent(c->bitmap))
        stop_recording(c);
    c->bitmap = NULL;
}

static void compare_clean(struct job *j)
{
    struct compare *c = compare_of(j);
    uint64_t done, total;
    GRAPH_LOCKED(jobs_graph(j->jobs));

    compare_progress(j, &done, &total); /* stays */
    diff_free(steal(c->diff));
    job_drop_nodes(j);
}

static const struct job_driver compare_driver = {
    .type = "x-tidemark-compare",
    .size = sizeof(struct compare),
    .block_job = true,
    .run = compare_run,
    .prepare = compare_prepare,
    .outcome = compare_outcome,
    .commit = compare_commit,
    .abort = compare_abort,
    .clean = compare_clean,
    .interrupt = compare_interrupt,
    .set_speed = compare_set_speed,
    .progress = compare_progress,
};

/* ---- making it ---- */

static int make_job(struct jobs *js, const struct compare_request *rq, struct compare **ret,
                    struct error *err)
{
    struct json_object *data = rq->data;
    const struct job_options options = {
        .id = json_get_string(data, "job-id", json_get_string(data, "device", NULL)),
        .speed = json_get_int(data, "speed", 0),
        .manual_finalize = !json_get_bool(data, "auto-finalize", true),
        .manual_dismiss = !json_get_bool(data, "auto-dismiss", true),
        .held = true,
        .group = rq->group,
    };
    struct job *j = NULL;
    int r = job_create(js, &compare_driver, &options, &j, err);
    if (r < 0)
        return r;
    r = job_add_node(j, rq->disk, "main node", PERM_CONSISTENT_READ, PERM_ALL & ~PERM_RESIZE, err);
    if (r == 0)
        r = job_add_node(j, rq->target, "target", PERM_CONSISTENT_READ,
                         PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED, err);
    if (r < 0) {
        job_drop_nodes(j);
        job_discard(j);
        return r;
    }
    *ret = compare_of(j);
    return 0;
}

static int make_diff(struct compare *c, struct dirty_bitmap *bm, struct error *err)
{
    struct job_node *target = TAILQ_FIRST(&c->job.nodes), *disk = TAILQ_NEXT(target, link);
    int r = diff_new(disk->edge, target->edge, bm, &c->diff, err);
    if (r < 0) {
        job_drop_nodes(&c->job);
        job_discard(&c->job);
    }
    return r;
}

int compare_create(struct jobs *js, const struct compare_request *rq, struct job **ret,
                   struct error *err)
{
    const char *name = json_get_string(rq->data, "bitmap", "");
    struct dirty_bitmap *bm = dirty_find(rq->disk, name);
    enum job_on_error on_source_error = 0, on_target_error = 0;
    struct compare *c;

    int r = job_get_on_error(rq->data, "on-source-error", &on_source_error, err);
    if (r == 0)
        r = job_get_on_error(rq->data, "on-target-error", &on_target_error, err);
    if (r < 0)
        return r;
    if (rq->disk == rq->target)
        return error_set(err, EINVAL, "Source and target cannot be the same");
    if (!bm)
        return error_set(err, ENOENT, "Bitmap '%s' could not be found", name);
    r = node_check_op(rq->disk, BLOCK_OP_BACKUP_SOURCE, err);
    if (r == 0)
        r = node_check_op(rq->target, BLOCK_OP_BACKUP_SOURCE, err);
    if (r == 0)
        r = dirty_start_rebuild(bm, node_size(rq->target), err);
    if (r < 0)
        return r;
    r = make_job(js, rq, &c, err);
    if (r == 0)
        r = make_diff(c, bm, err);
    if (r < 0) {
        dirty_unstart(bm);
        return r;
    }
    c->disk = rq->disk;
    c->target = rq->target;
    c->bitmap = bm;
    c->losses = graph_losses(node_graph(c->disk));
    c->on_source_error = on_source_error;
    c->on_target_error = on_target_error;
    diff_set_speed(c->diff, (uint64_t)c->job.speed);
    *ret = &c->job;
    return 0;
}
