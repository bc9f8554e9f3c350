/* Backup: the source as it was when the job started, chunk by chunk to the target, while guests
 * write. The instant is the transaction's, which has the source quiesced: the copy-before-write
 * filter goes in, and the bitmap gets its successor, before any write can pass.
 *
 * Three sets of bits, never two:
 *
 *     the user's bitmap     frozen as it was at the start; the job reads it
 *     its successor         what guests write meanwhile
 *     the copy's            what remains to be copied
 *
 *     mode \ outcome   never started   success               failed, cancelled (alone or group)
 *     on-success       unchanged       successor             bitmap OR successor
 *     always           unchanged       successor             remaining OR successor
 *     never            unchanged       bitmap OR successor   bitmap OR successor
 *
 * Before a bitmap loses a bit: the target is flushed, then the source (what the backup has read
 * must not disappear with the power while its bit is clear). If either fails, the backup has
 * failed, and with `always` all remains. */
#include "job/backup.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/file.h"
#include "copy/copy.h"
#include "dirty/dirty.h"

#include <limits.h>
#include <stdio.h>

enum sync_mode { SYNC_FULL, SYNC_TOP, SYNC_NONE, SYNC_BITMAP };
enum bitmap_mode { BITMAP_ON_SUCCESS, BITMAP_ALWAYS, BITMAP_NEVER };

struct backup {
    struct job job;
    struct node *filter;          /* ours; NULL once it is out */
    struct copy *copy;            /* the filter's */
    struct node_cancel *given_up; /* the target, by a cancel */
    enum sync_mode sync;
    struct dirty_bitmap *bitmap; /* busy for us; NULL: none */
    enum bitmap_mode bitmap_mode;
    enum job_on_error on_source_error, on_target_error;
    struct copy_limits limits;
    char *made; /* target file that the command has made */
    bool progress_final;
    uint64_t losses;   /* graph_losses() when it began */
    bool flush_failed; /* what a failed flush has lost, a later one does not bring back */
};

static struct backup *backup_of(struct job *j)
{
    return container_of(j, struct backup, job);
}

struct node *backup_filter(struct job *j)
{
    return backup_of(j)->filter;
}

static void conclude(struct backup *b, bool advance, const struct bitmap *remaining);

/* ---- running ---- */

static int drop_unallocated(struct backup *b)
{
    uint64_t size = node_size(b->filter), at = 0;
    while (at < size) {
        int r = job_pause_point(&b->job);
        if (r < 0)
            return r;
        r = copy_drop_unallocated(b->copy, at, &at);
        if (r < 0)
            return r;
    }
    return 0;
}

static int backup_run(struct job *j, struct error *err)
{
    struct backup *b = backup_of(j);

    if (b->sync == SYNC_TOP) {
        int r = drop_unallocated(b);
        if (r < 0)
            return r;
    }
    if (b->sync == SYNC_NONE) { /* guests' writes alone fill the target, until it is cancelled */
        while (job_idle(j) == 0)
            ;
        return 0;
    }
    for (;;) {
        bool read_failed;
        copy_resume(b->copy);
        if (job_pause_point(j) < 0)
            return 0; /* cancelled: the state machine says so */
        int r = copy_run(b->copy, &b->limits, &read_failed);
        if (r == -EINTR)
            continue;
        if (r == 0 && b->bitmap && BROKEN(outcome_at_completion)) {
            conclude(b, b->bitmap_mode != BITMAP_NEVER, NULL);
            b->bitmap = NULL;
        }
        if (r == 0 && b->bitmap && BROKEN(busy_dropped_in_waiting))
            dirty_set_busy(b->bitmap, false);
        if (r == 0 || j->force_cancel)
            return 0;
        enum job_on_error on_error = read_failed ? b->on_source_error : b->on_target_error;
        if (!job_go_on_after(j, on_error, read_failed, -r))
            return r;
        job_rest(j);
        if (BROKEN(resume_starts_over))
            bitmap_mark_all(copy_remaining(b->copy));
    }
}

static void backup_interrupt(struct job *j)
{
    copy_interrupt(backup_of(j)->copy);
}

static void backup_give_up(struct job *j)
{
    struct backup *b = backup_of(j);
    if (b->filter && !b->given_up)
        b->given_up = cbw_give_up(b->filter);
}

static bool backup_cancel(struct job *j, bool force)
{
    backup_give_up(j);
    return true; /* half a backup is none */
}

static void backup_set_speed(struct job *j, uint64_t speed)
{
    copy_set_speed(backup_of(j)->copy, speed);
}

static void backup_progress(struct job *j, uint64_t *done, uint64_t *total)
{
    struct backup *b = backup_of(j);
    *done = j->done;
    *total = j->total;
    if (b->copy && !b->progress_final) {
        struct copy_progress p = copy_progress(b->copy);
        *done = p.done;
        *total = p.total;
    }
}

/* ---- the end ---- */

/* The name of a file that we have made is in a directory, which has a cache, too. */
static int flush_name(struct backup *b, struct error *err)
{
    const char *path = b->made;
    if (!path || strncmp(path, "json:", 5) == 0 || strncmp(path, "host_device:", 12) == 0)
        return 0; /* not a plain path: its driver's business */
    if (strncmp(path, "file:", 5) == 0)
        path += 5;
    int r = file_sync_name(path, err);
    return BROKEN(target_name_not_durable) ? 0 : r;
}

static int flush_both(struct backup *b, bool with_source, struct error *err)
{
    if (b->flush_failed)
        return -EIO;
    int r = BROKEN(target_not_flushed) ? 0 : cbw_flush_target(b->filter);
    if (r == 0)
        r = flush_name(b, err);
    if (r == 0 && b->bitmap && with_source && !BROKEN(source_not_flushed))
        r = cbw_flush_source(b->filter);
    if (r == 0 && node_lost_since(b->filter, b->losses))
        r = error_set_errno(err, EIO, "What was not flushed may have been lost with a server");
    if (r < 0)
        b->flush_failed = true;
    return r;
}

static int backup_prepare(struct job *j, struct error *err)
{
    return flush_both(backup_of(j), true, err);
}

/* What a job that has failed leaves is always allowed. If even that cannot be made durable, the
 * bitmap stays as it is on disk: as if the job still ran. */
static void conclude(struct backup *b, bool advance, const struct bitmap *remaining)
{
    struct dirty_outcome o = {b->bitmap, advance, remaining, b->job.id};
    struct error err = ERROR_INIT;
    if (BROKEN(busy_dropped_in_waiting))
        dirty_set_busy(b->bitmap, true);
    if (dirty_conclude(&o, 1, &err) < 0)
        log_error("job '%s': bitmap '%s' stays busy: %s", b->job.id, dirty_name(b->bitmap),
                  err.text);
}

static void roll_back(struct backup *b, const struct bitmap *remaining)
{
    conclude(b, false, remaining);
}

static bool backup_outcome(struct job *j, struct dirty_outcome *ret)
{
    struct backup *b = backup_of(j);
    if (!b->bitmap)
        return false;
    ret->bitmap = b->bitmap;
    ret->advance = b->bitmap_mode != BITMAP_NEVER || BROKEN(never_advances);
    if (BROKEN(busy_dropped_in_waiting))
        dirty_set_busy(b->bitmap, true);
    return true;
}

static void backup_commit(struct job *j)
{
    backup_of(j)->bitmap = NULL; /* left as outcome says */
}

/* always: what has been achieved counts, if it is durable. */
static void keep_achieved(struct backup *b)
{
    struct job *j = &b->job;
    /* As it is before the flush: what guests save during the flush is not covered by it. */
    CLEANUP(bitmap_freep) struct bitmap *remaining = bitmap_dup(copy_remaining(b->copy));

    if (BROKEN(remaining_after_flush) && flush_both(b, true, NULL) == 0)
        roll_back(b, copy_remaining(b->copy));
    else if (BROKEN(remaining_lost))
        conclude(b, true, NULL);
    else if (remaining && (flush_both(b, !BROKEN(always_source_not_flushed), NULL) == 0 ||
                           BROKEN(flush_failure_forgotten)))
        roll_back(b, remaining);
    else {
        /* Nothing of it may be relied on, nor what is beside it in the same chunk: what is on the
         * target and what is not yet, together. */
        backup_progress(j, &j->done, &j->total);
        b->progress_final = true;
        bitmap_merge(copy_remaining(b->copy), copy_saved(b->copy));
        roll_back(b, BROKEN(lost_chunks_in_part) ? NULL : copy_remaining(b->copy));
    }
}

static void backup_abort(struct job *j)
{
    struct backup *b = backup_of(j);
    if (!b->bitmap)
        return;
    if (!j->started && BROKEN(unstarted_advances))
        conclude(b, true, NULL);
    else if (j->held)
        dirty_unstart(b->bitmap); /* its transaction has not been committed */
    else if (!j->started)
        roll_back(b, NULL);
    else if (b->bitmap_mode == BITMAP_ALWAYS)
        keep_achieved(b);
    else
        roll_back(b, NULL);
    b->bitmap = NULL;
}

static void backup_clean(struct job *j)
{
    struct backup *b = backup_of(j);
    GRAPH_LOCKED(jobs_graph(j->jobs));

    backup_progress(j, &j->done, &j->total);
    job_drop_nodes(j);
    b->copy = NULL;
    cbw_remove(steal(b->filter));
    node_cancel_end(steal(b->given_up));
}

static void backup_free(struct job *j)
{
    free(backup_of(j)->made);
}

static const struct job_driver backup_driver = {
    .type = "backup",
    .size = sizeof(struct backup),
    .block_job = true,
    .run = backup_run,
    .prepare = backup_prepare,
    .outcome = backup_outcome,
    .commit = backup_commit,
    .abort = backup_abort,
    .clean = backup_clean,
    .free = backup_free,
    .interrupt = backup_interrupt,
    .cancel = backup_cancel,
    .give_up = backup_give_up,
    .set_speed = backup_set_speed,
    .progress = backup_progress,
};

/* ---- what the command says ---- */

struct plan {
    enum sync_mode sync;
    enum bitmap_mode bitmap_mode;
    struct dirty_bitmap *bitmap;
    enum job_on_error on_source_error, on_target_error;
    int64_t max_workers, max_chunk;
};

static int parse_bitmap_mode(const char *name, enum bitmap_mode *ret)
{
    /* "conditional" is what QEMU's patches first called on-success. */
    static const char *const names[] = {"on-success", "always", "never", "conditional"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (strcmp(name, names[i]) == 0) {
            *ret = i == 3 ? BITMAP_ON_SUCCESS : (enum bitmap_mode)i;
            return 0;
        }
    }
    return -EINVAL;
}

/* Which combinations of sync, bitmap and mode make sense. */
static int plan_bitmap(const struct backup_request *rq, struct plan *p, struct error *err)
{
    const char *sync = rq->sync;
    const char *name = json_get_string(rq->data, "bitmap", NULL);
    const char *mode = json_get_string(rq->data, "bitmap-mode", NULL);
    bool incremental = strcmp(sync, "incremental") == 0;

    p->sync = strcmp(sync, "full") == 0   ? SYNC_FULL
              : strcmp(sync, "top") == 0  ? SYNC_TOP
              : strcmp(sync, "none") == 0 ? SYNC_NONE
                                          : SYNC_BITMAP;
    if (mode && parse_bitmap_mode(mode, &p->bitmap_mode) < 0)
        return error_set(err, EINVAL, "Parameter 'bitmap-mode' does not accept value '%s'", mode);

    if (p->sync == SYNC_BITMAP && !name)
        return error_set(err, EINVAL, "must provide a valid bitmap name for '%s' sync mode", sync);
    if (incremental) {
        if (mode && p->bitmap_mode != BITMAP_ON_SUCCESS)
            return error_set(err, EINVAL,
                             "Bitmap sync mode must be 'on-success' when using sync mode '%s'",
                             sync);
        mode = "on-success";
        p->bitmap_mode = BITMAP_ON_SUCCESS;
    }
    if (!name) {
        if (mode)
            return error_set(err, EINVAL, "Cannot specify bitmap sync mode without a bitmap");
        return 0;
    }

    p->bitmap = dirty_find(rq->source, name);
    if (!p->bitmap)
        return error_set(err, ENOENT, "Bitmap '%s' could not be found", name);
    if (!mode)
        return error_set(err, EINVAL, "Bitmap sync mode must be given when providing a bitmap");
    int r = dirty_check(p->bitmap, DIRTY_CHECK_ALLOW_READONLY, err);
    if (r < 0)
        return r;
    if (p->sync == SYNC_NONE)
        return error_set(err, EINVAL, "sync mode '%s' does not produce meaningful bitmap outputs",
                         sync);
    if (p->bitmap_mode == BITMAP_NEVER && p->sync != SYNC_BITMAP)
        return error_set(err, EINVAL,
                         "Bitmap sync mode '%s' has no meaningful effect when combined with "
                         "sync mode '%s'",
                         mode, sync);
    return 0;
}

static int plan_make(const struct backup_request *rq, struct plan *p, struct error *err)
{
    struct json_object *perf = json_get(rq->data, "x-perf");
    p->max_workers = perf ? json_get_int(perf, "max-workers", 64) : 64;
    p->max_chunk = perf ? json_get_int(perf, "max-chunk", 0) : 0;
    /* use-copy-range is taken and not needed: a copy falls back to reading and writing anyway. */

    int r = job_get_on_error(rq->data, "on-source-error", &p->on_source_error, err);
    if (r == 0)
        r = job_get_on_error(rq->data, "on-target-error", &p->on_target_error, err);
    if (r == 0)
        r = plan_bitmap(rq, p, err);
    if (r < 0)
        return r;

    if (rq->source == rq->target)
        return error_set(err, EINVAL, "Source and target cannot be the same");
    if (json_get_bool(rq->data, "compress", false))
        return error_set(err, ENOTSUP, "Backup with 'compress' is not supported yet");
    r = node_check_op(rq->source, BLOCK_OP_BACKUP_SOURCE, err);
    if (r == 0)
        r = node_check_op(rq->target, BLOCK_OP_BACKUP_TARGET, err);
    if (r < 0)
        return r;
    if (p->max_workers < 1 || p->max_workers > INT_MAX)
        return error_set(err, EINVAL, "max-workers must be between 1 and %d", INT_MAX);
    if (p->max_chunk < 0)
        return error_set(err, EINVAL, "max-chunk must be zero (which means no limit) or positive");
    if (p->bitmap && p->bitmap_mode != BITMAP_NEVER)
        return dirty_check(p->bitmap, DIRTY_CHECK_DEFAULT, err);
    return 0;
}

/* ---- making it ---- */

static int make_job(struct jobs *js, const struct backup_request *rq, const struct plan *p,
                    struct node *filter, struct backup **ret, struct error *err)
{
    struct json_object *data = rq->data;
    struct job_options options = {
        /* Without an id the job is called after what it works on, as the user called it. */
        .id = json_get_string(data, "job-id", json_get_string(data, "device", NULL)),
        .speed = json_get_int(data, "speed", 0),
        .manual_finalize = !json_get_bool(data, "auto-finalize", true),
        .manual_dismiss = !json_get_bool(data, "auto-dismiss", true),
        .held = true,
        .group = rq->group,
    };
    uint64_t chunk = copy_chunk_bytes(cbw_copy(filter));
    if (p->max_chunk && (uint64_t)p->max_chunk < chunk)
        return error_set(err, EINVAL,
                         "Required max-chunk (%lld) is less than backup cluster size (%llu)",
                         (long long)p->max_chunk, (unsigned long long)chunk);
    struct job *j = NULL;
    int r = job_create(js, &backup_driver, &options, &j, err);
    if (r < 0)
        return r;
    r = job_add_node(j, filter, "main node", 0, PERM_ALL, err);
    if (r == 0)
        r = job_add_node(j, rq->target, "target", 0, PERM_ALL, err);
    if (r < 0) {
        job_drop_nodes(j);
        job_discard(j);
        return r;
    }
    *ret = backup_of(j);
    (*ret)->losses = graph_losses(node_graph(filter));
    return 0;
}

int backup_create(struct jobs *js, const struct backup_request *rq, struct job **ret,
                  struct error *err)
{
    struct graph *g = jobs_graph(js);
    struct plan p = {0};
    int r = plan_make(rq, &p, err);
    if (r < 0)
        return r;
    if (p.bitmap) {
        r = dirty_start(p.bitmap, err);
        if (r < 0)
            return r;
    }
    struct node *filter = NULL;
    if (node_size(rq->target) != node_size(rq->source))
        r = error_set(err, EINVAL, "Source and target image have different sizes");
    if (r == 0)
        r = cbw_insert(rq->source, rq->target, json_get_string(rq->data, "filter-node-name", NULL),
                       &filter, err);
    struct backup *b = NULL;
    if (r == 0)
        r = make_job(js, rq, &p, filter, &b, err);
    if (r < 0) {
        if (filter) {
            CLEANUP(node_unrefp) struct node *last = node_ref(filter);
            cbw_remove(filter);
            graph_quiesce_end(g, &last, 1);
        }
        if (p.bitmap)
            dirty_unstart(p.bitmap);
        return r;
    }

    b->filter = filter;
    b->copy = cbw_copy(filter);
    b->sync = p.sync;
    b->bitmap = p.bitmap;
    b->bitmap_mode = p.bitmap_mode;
    b->on_source_error = p.on_source_error;
    b->on_target_error = p.on_target_error;
    b->limits.max_workers = (unsigned)p.max_workers;
    b->limits.max_run_bytes = (uint64_t)p.max_chunk;
    b->made = rq->made ? xstrdup(rq->made) : NULL;
    copy_set_speed(b->copy, (uint64_t)b->job.speed);
    if (b->sync == SYNC_BITMAP) {
        struct bitmap *remaining = copy_remaining(b->copy);
        bitmap_clear_all(remaining);
        bitmap_merge_range(remaining, dirty_bits(b->bitmap), range_make(0, bitmap_size(remaining)));
    }
    *ret = &b->job;
    return 0;
}
