/* Mirror: makes the target equal to the source, keeps it equal while guests write, and at the end
 * puts it in the source's place (or not).
 *
 *     mark what is to be copied --> copy until nothing is dirty --> ready: follow what guests write
 *                                                                     |
 *         complete: pivot; cancel without force: no pivot  <----------+
 *                                |
 *     guests wait: copy the last chunks; flush the target; move the users; guests go on
 *
 * The last step is taken when the job is finalized, not when it is asked to complete: so nobody
 * waits while it is pending, and what was written meanwhile is in the target, too. It can still
 * fail, and then everybody stays where he is.
 *
 * With a bitmap (sync=bitmap, incremental) what is to be copied is what it says at the start. It is
 * busy, and has a successor that records; the copy lives in copy/follow, and
 *
 *     mode \ outcome   completed, pivot or not       failed, cancelled
 *     on-success       written since that moment     bitmap OR successor
 *     always           written since that moment     remaining OR successor
 *     never            bitmap OR successor           bitmap OR successor
 *
 * "That moment" is the last step, with guests waiting: ready does nothing to a bitmap. Before a bit
 * is lost the target is flushed, then the source. If it is the pivot that fails, nothing remains,
 * and the successor has what was written since. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "job/mirror_internal.h"
#include "rt/task.h"

enum { CATCH_UP_PASSES = 8, LAST_STEP_MIN = 16 * 1024 * 1024 };

/* ---- running ---- */

static bool is_ready(const struct job *j)
{
    return j->status == JOB_READY || j->status == JOB_STANDBY;
}

static bool ending(const struct mirror *m)
{
    return m->completing || m->job.cancelled;
}

void mirror_guest_write_failed(void *opaque, int code)
{
    struct mirror *m = opaque;
    if (m->job.ended || m->job.force_cancel || m->failed)
        return; /* what is dirty is seen at the end */
    if (!job_go_on_after(&m->job, m->on_target_error, false, code))
        m->failed = -code;
    job_kick(&m->job);
}

static int on_error(struct mirror *m, bool read_failed, int r)
{
    if (m->job.force_cancel)
        return -ECANCELED; /* it may have failed because of that */
    enum job_on_error how = read_failed ? m->on_source_error : m->on_target_error;
    if (!job_go_on_after(&m->job, how, read_failed, -r))
        return r;
    job_rest(&m->job);
    return 0;
}

/* A reopen can change it, of either. */
static bool same_size(const struct mirror *m)
{
    return node_size(m->source) == node_size(m->target);
}

static int check_sizes(const struct mirror *m, struct error *err)
{
    return same_size(m) ? 0
                        : error_set(err, EINVAL, "Source and target image have different sizes");
}

/* What is to be copied. 0, or -ECANCELED, or an error that ends the job. */
static int begin(struct mirror *m)
{
    struct job *j = &m->job;
    bool zeroed = !m->zero_target || m->target_is_zero;
    if (m->sync == SYNC_NONE || m->sync == SYNC_BITMAP)
        return 0;
    for (;;) {
        follow_resume(m->follow);
        if (job_pause_point(j) < 0)
            return -ECANCELED;
        if (!same_size(m))
            return 0; /* found out again, and said */
        int r = 1;
        if (!zeroed) {
            r = follow_zero_target(m->follow);
            if (r == 0)
                return 0; /* everything is marked */
            if (r < 0 && r != -EINTR && (r = on_error(m, false, r)) < 0)
                return r;
            zeroed = r == 1;
            if (!zeroed)
                continue;
        }
        struct node *base = m->sync == SYNC_TOP ? m->top : NULL;
        bool skip_zeroes = m->sync == SYNC_FULL && m->target_is_zero;
        r = follow_mark_allocated(m->follow, base, skip_zeroes);
        if (r != -EINTR)
            return r;
    }
}

/* Something that flushes do not speak for. */
static bool has_lost(const struct mirror *m)
{
    return node_lost_since(m->source, m->losses) || node_lost_since(m->target, m->losses);
}

/* With nobody inside the source or the filter. */
static int drain(struct mirror *m, bool *read_failed)
{
    int r = same_size(m) ? follow_drain(m->follow, read_failed) : -EINTR;
    if (r == 0 && !BROKEN(mirror_target_not_flushed))
        r = edge_flush(m->to);
    if (r == 0 && m->bitmap && !BROKEN(mirror_source_not_flushed)) {
        r = edge_flush(mirror_top_source(m->filter));
        *read_failed = r < 0;
    }
    if (r == 0 && has_lost(m))
        r = -EIO;
    return r;
}

static int drain_quiesced(struct mirror *m, bool *read_failed)
{
    struct node *nodes[] = {m->filter, m->source};
    struct graph *g = jobs_graph(m->job.jobs);
    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    int r = drain(m, read_failed);
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    return r;
}

/* Bytes that guests can wait for at the end. Without this a mirror in copy mode background could
 * never complete while they write steadily. */
static uint64_t last_step(const struct mirror *m)
{
    return max_u64(LAST_STEP_MIN, follow_buffer(m->follow));
}

static int mirror_run(struct job *j, struct error *err)
{
    struct mirror *m = mirror_of(j);
    int r = check_sizes(m, err);
    if (r == 0)
        r = begin(m);
    if (r < 0)
        return r == -ECANCELED ? 0 : r;

    for (;;) {
        bool read_failed = false, ready = is_ready(j);
        follow_resume(m->follow);
        if (job_pause_point(j) < 0)
            return 0; /* cancelled: the state machine says so */
        if ((r = check_sizes(m, err)) < 0)
            return r;
        if (m->failed)
            return m->failed;
        uint64_t enough = ready && ending(m) ? last_step(m) : 0;
        r = follow_run(m->follow, enough, 0, &read_failed);
        if (r == 0 && !ready) {
            r = edge_flush(m->to);
            if (r == 0)
                job_ready(j);
            if (r == 0 && m->bitmap && BROKEN(mirror_bitmap_cleared_at_ready))
                bitmap_clear_all(dirty_bits(m->bitmap));
        } else if (r == 0 && ending(m)) {
            r = drain_quiesced(m, &read_failed);
            if (r == 0 && !m->failed)
                return 0;
        } else if (r == 0) {
            follow_idle(m->follow);
        }
        if (r < 0 && r != -EINTR && (r = on_error(m, read_failed, r)) < 0)
            return r;
    }
}

static void mirror_interrupt(struct job *j)
{
    struct mirror *m = mirror_of(j);
    if (m->follow)
        follow_interrupt(m->follow);
}

/* Not once all is taken apart: then it may be the guests' disk. */
static void mirror_give_up(struct job *j)
{
    struct mirror *m = mirror_of(j);
    if (m->filter && !m->given_up)
        m->given_up = node_cancel_begin(m->target);
}

/* Half a mirror is none; once it is ready, cancelling means completing without the pivot. By force
 * it also means that nobody waits any longer for a target that hangs. */
static bool mirror_cancel(struct job *j, bool force)
{
    force = force || !is_ready(j);
    if (force)
        mirror_give_up(j);
    return force;
}

static void mirror_set_speed(struct job *j, uint64_t speed)
{
    struct mirror *m = mirror_of(j);
    if (m->follow)
        follow_set_speed(m->follow, speed);
}

static void mirror_progress(struct job *j, uint64_t *done, uint64_t *total)
{
    struct mirror *m = mirror_of(j);
    *done = j->done;
    *total = j->total;
    if (m->follow)
        follow_progress(m->follow, done, total);
}

static void mirror_info(struct job *j, struct json_object *info)
{
    struct mirror *m = mirror_of(j);
    json_add_bool(info, "actively-synced", m->follow && follow_synced(m->follow));
}

static int mirror_complete(struct job *j, struct error *err)
{
    struct mirror *m = mirror_of(j);
    if (!is_ready(j))
        return error_set(err, EINVAL, "The active block job '%s' cannot be completed", j->id);
    if (m->replaces && !m->to_replace) {
        struct node *n = graph_find(jobs_graph(j->jobs), m->replaces);
        if (!n)
            return error_set(err, ENOENT, "Node name '%s' not found", m->replaces);
        m->to_replace = node_ref(n);
        m->replace_blocker.ops = (1u << BLOCK_OPS) - 1;
        m->replace_blocker.reason = xstrdup("block device is in use by block-job-complete");
        node_block_ops(n, &m->replace_blocker);
    }
    m->completing = true;
    job_kick(j);
    return 0;
}

static int mirror_change(struct job *j, struct json_object *options, struct error *err)
{
    struct mirror *m = mirror_of(j);
    const char *mode = json_get_string(options, "copy-mode", "");
    struct graph *g = jobs_graph(j->jobs);

    GRAPH_LOCKED(g);
    if (!m->follow || follow_blocking(m->follow) == !strcmp(mode, "write-blocking"))
        return 0;
    if (strcmp(mode, "write-blocking") != 0)
        return error_set(err, ENOTSUP, "Change to copy mode '%s' is not implemented", mode);
    graph_quiesce_begin(g, &m->source, 1);
    follow_set_blocking(m->follow);
    graph_quiesce_end(g, &m->source, 1);
    return 0;
}

/* ---- the end ---- */

bool mirror_can_replace(struct node *n, const struct node *to)
{
    for (;;) {
        struct edge *e = node_filtered(n);
        if (n == to)
            return true;
        if (!e || n->driver->child_stays)
            return false;
        n = e->node;
    }
}

static int pivot(struct mirror *m)
{
    struct error err = ERROR_INIT;
    struct node *from = m->to_replace ? m->to_replace : m->source;
    int r = 0;

    if (!mirror_can_replace(m->source, from))
        r = error_set(&err, EPERM,
                      "Can no longer replace '%s' by '%s', because it can no longer be guaranteed "
                      "that doing so would not lead to an abrupt change of visible data",
                      node_name(from), node_name(m->target));
    /* The target shall be to its new users what the source was to them. If it cannot, and they do
     * not mind, that is fine. */
    if (r == 0 && node_read_only(from) != node_read_only(m->target) &&
        node_set_read_only(m->target, node_read_only(from), NULL) < 0)
        log_warning("job '%s': node '%s' cannot be made read-%s as '%s' is", m->job.id,
                    node_name(m->target), node_read_only(from) ? "only" : "write", node_name(from));
    if (r == 0)
        r = node_replace(from, m->target, &err);
    if (r < 0)
        log_error("job '%s': %s", m->job.id, err.text);
    return r < 0 ? -EPERM : 0;
}

/* Behind the target goes what it was made on; guests' permissions, which the filter gives up for
 * it, are tried on the target beforehand. */
static int attach_backing(struct mirror *m)
{
    struct error err = ERROR_INIT;
    struct node *target = node_skip_filters(m->target);
    unsigned perm = 0, shared = PERM_ALL;
    struct edge *e;
    int r;

    TAILQ_FOREACH (e, &m->filter->parents, in_parents) {
        perm |= e->perm;
        shared &= e->shared;
    }
    r = edge_set_perm(m->to, perm, shared, &err);
    if (r == 0)
        r = edge_set_perm(m->to, 0, PERM_ALL, &err);
    if (r == 0 && m->backing_mode == BACKING_OPENED) {
        r = node_open_backing(target, &err);
    } else if (r == 0 && m->backing && !target->backing) {
        mirror_top_stop(m->filter);
        r = edge_set_perm(m->main, 0, PERM_ALL & ~PERM_RESIZE, &err);
        if (r == 0)
            r = node_attach_child(target, m->backing, "backing", ROLE_COW, NULL, &err);
        if (r == 0)
            json_add_string(target->options, "backing", node_name(m->backing));
    }
    if (r < 0)
        log_error("job '%s': %s", m->job.id, err.text);
    return r < 0 ? -EPERM : 0;
}

/* Takes everything apart; nobody is inside the source or the filter. Users are moved to the
 * target, or come back to the source. */
static int take_apart(struct mirror *m, bool success)
{
    struct error err = ERROR_INIT;
    int r = 0;

    mirror_progress(&m->job, &m->job.done, &m->job.total);
    mirror_top_set_follow(m->filter, NULL);
    follow_free(steal(m->follow));
    /* Less than before: cannot fail. Users may want what we did not let them have. */
    r = edge_set_perm(m->main, 0, PERM_ALL, &err);
    if (r == 0)
        r = edge_set_perm(m->to, 0, PERM_ALL, &err);
    if (success && m->backing_mode != BACKING_AS_IT_IS)
        r = attach_backing(m);
    if (r == 0 && success && m->completing)
        r = pivot(m);
    m->main = m->to = NULL;
    job_drop_nodes(&m->job);
    mirror_top_remove(steal(m->filter));
    node_cancel_end(steal(m->given_up));
    return r;
}

static int exit_quiesced(struct mirror *m, bool success, struct error *err)
{
    struct graph *g = jobs_graph(m->job.jobs);
    CLEANUP(node_unrefp) struct node *filter = node_ref(m->filter);
    struct node *nodes[] = {filter, m->source};
    bool read_failed;
    int r = 0;

    GRAPH_LOCKED(g);
    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    if (success && !BROKEN(mirror_pivots_before_last_chunk))
        r = drain(m, &read_failed);
    if (success && BROKEN(mirror_gate_opens_before_pivot)) {
        graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
        (void)!task_yield();
        graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    }
    if (r == 0 && success && m->bitmap && m->bitmap_mode != BITMAP_NEVER &&
        !BROKEN(mirror_restart_forgotten))
        r = dirty_restart(m->bitmap, err);
    m->caught_up = success && r == 0;
    if (r == 0)
        r = take_apart(m, success);
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    return r;
}

static int mirror_prepare(struct job *j, struct error *err)
{
    struct mirror *m = mirror_of(j);
    bool read_failed;
    SHIELD();
    int r = check_sizes(m, err);
    if (r < 0)
        return r;

    /* What has become dirty while it was pending is copied before guests have to wait. */
    follow_resume(m->follow);
    r = follow_run(m->follow, last_step(m), CATCH_UP_PASSES, &read_failed);
    if (r == 0)
        r = exit_quiesced(m, true, err);
    return check_sizes(m, err) < 0 ? -EINVAL : r;
}

static void roll_back(struct mirror *m, const struct bitmap *remaining)
{
    struct dirty_outcome o = {steal(m->bitmap), false, remaining, m->job.id};
    struct error err = ERROR_INIT;
    if (dirty_conclude(&o, 1, &err) < 0)
        log_error("job '%s': bitmap '%s' stays busy: %s", m->job.id, dirty_name(o.bitmap),
                  err.text);
}

static bool mirror_outcome(struct job *j, struct dirty_outcome *ret)
{
    struct mirror *m = mirror_of(j);
    if (!m->bitmap)
        return false;
    ret->bitmap = m->bitmap;
    ret->advance = m->bitmap_mode != BITMAP_NEVER;
    return true;
}

static void mirror_commit(struct job *j)
{
    mirror_of(j)->bitmap = NULL; /* left as outcome says */
}

/* always: what the target lacks. Taken with no guest's write on its way to the target (what it
 * brings along may fail yet), nor any later, and before the flush, which would not cover it. */
static struct bitmap *lacking(struct mirror *m)
{
    struct graph *g = jobs_graph(m->job.jobs);
    struct node *nodes[] = {m->filter, m->source};
    if (BROKEN(mirror_remaining_while_written))
        return bitmap_dup(follow_dirty(m->follow));
    GRAPH_LOCKED(g);
    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    follow_hold_back(m->follow);
    struct bitmap *ret = bitmap_dup(follow_dirty(m->follow));
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    return ret;
}

/* always: what of the bitmap remains. NULL: nobody can say, so all. If it cannot be made durable it
 * is what has been written to the target, too, in whole clusters: beside what was to be copied
 * there, more may be lost. */
static struct bitmap *remaining_of(struct mirror *m)
{
    struct bitmap *bits = dirty_bits(m->bitmap), *ret;
    if (m->caught_up) /* it was the pivot that failed: nothing, and that is durable */
        return bitmap_new(bitmap_size(bits), dirty_granularity(m->bitmap));
    if (!m->follow)
        return NULL;
    ret = lacking(m);
    if (ret &&
        (edge_flush(m->to) < 0 || edge_flush(mirror_top_source(m->filter)) < 0 || has_lost(m))) {
        if (BROKEN(lost_chunks_in_part))
            bitmap_free(steal(ret));
        else
            bitmap_merge_range(ret, follow_touched(m->follow), range_make(0, bitmap_size(ret)));
    }
    return ret;
}

static void mirror_abort(struct job *j)
{
    struct mirror *m = mirror_of(j);
    if (m->bitmap) {
        CLEANUP(bitmap_freep)
        struct bitmap *remaining = m->bitmap_mode == BITMAP_ALWAYS ? remaining_of(m) : NULL;
        roll_back(m, remaining);
    }
    if (m->follow) {
        int r = exit_quiesced(m, false, NULL);
        (void)r; /* it fails already */
    }
}

static void mirror_clean(struct job *j)
{
    struct mirror *m = mirror_of(j);
    GRAPH_LOCKED(jobs_graph(j->jobs));

    if (m->to_replace) {
        node_unblock_ops(m->to_replace, &m->replace_blocker);
        free(m->replace_blocker.reason);
        node_unref(steal(m->to_replace));
    }
    node_unref(steal(m->source));
    node_unref(steal(m->target));
    node_unref(steal(m->top));
    node_unref(steal(m->backing));
}

static void mirror_free(struct job *j)
{
    free(mirror_of(j)->replaces);
}

const struct job_driver mirror_driver = {
    .type = "mirror",
    .size = sizeof(struct mirror),
    .block_job = true,
    .run = mirror_run,
    .prepare = mirror_prepare,
    .outcome = mirror_outcome,
    .commit = mirror_commit,
    .abort = mirror_abort,
    .clean = mirror_clean,
    .free = mirror_free,
    .interrupt = mirror_interrupt,
    .cancel = mirror_cancel,
    .give_up = mirror_give_up,
    .set_speed = mirror_set_speed,
    .complete = mirror_complete,
    .change = mirror_change,
    .progress = mirror_progress,
    .info = mirror_info,
};
