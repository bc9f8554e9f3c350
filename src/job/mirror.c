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
#include "job/mirror.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "copy/follow.h"
#include "dirty/dirty.h"
#include "job/driver.h"
#include "rt/task.h"

#include <stdio.h>

enum sync_mode { SYNC_FULL, SYNC_TOP, SYNC_NONE, SYNC_BITMAP };
enum bitmap_mode { BITMAP_ON_SUCCESS, BITMAP_NEVER, BITMAP_ALWAYS };
/* What the target gets behind it at the end: what it has; what its header names; a given node. */
enum backing_mode { BACKING_AS_IT_IS, BACKING_OPENED, BACKING_GIVEN };
enum { CATCH_UP_PASSES = 8, LAST_STEP_MIN = 16 * 1024 * 1024 };

struct mirror {
    struct job job;
    struct node *source, *target; /* references */
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

static struct mirror *mirror_of(struct job *j)
{
    return container_of(j, struct mirror, job);
}

/* ---- running ---- */

static bool is_ready(const struct job *j)
{
    return j->status == JOB_READY || j->status == JOB_STANDBY;
}

static bool ending(const struct mirror *m)
{
    return m->completing || m->job.cancelled;
}

static void guest_write_failed(void *opaque, int code)
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
        struct node *base = m->sync == SYNC_TOP ? node_skip_filters(m->source) : NULL;
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

static void mirror_give_up(struct job *j)
{
    struct mirror *m = mirror_of(j);
    if (m->target && !m->given_up)
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

/* May TO be replaced by a copy of N: is their content the same for sure? */
static bool can_replace(struct node *n, const struct node *to)
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

    if (!can_replace(m->source, from))
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
 * brings along may fail yet), and before the flush, which does not cover what comes later. */
static struct bitmap *lacking(struct mirror *m)
{
    struct graph *g = jobs_graph(m->job.jobs);
    struct node *nodes[] = {m->filter, m->source};
    if (BROKEN(mirror_remaining_while_written))
        return bitmap_dup(follow_dirty(m->follow));
    GRAPH_LOCKED(g);
    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    struct bitmap *ret = bitmap_dup(follow_dirty(m->follow));
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    return ret;
}

/* always: what of the bitmap remains. NULL: nobody can say, so all. */
static struct bitmap *remaining_of(struct mirror *m)
{
    struct bitmap *bits = dirty_bits(m->bitmap), *ret;
    if (m->caught_up) /* it was the pivot that failed: nothing, and that is durable */
        return bitmap_new(bitmap_size(bits), dirty_granularity(m->bitmap));
    if (!m->follow)
        return NULL;
    ret = lacking(m);
    if (ret &&
        (edge_flush(m->to) < 0 || edge_flush(mirror_top_source(m->filter)) < 0 || has_lost(m)))
        bitmap_free(steal(ret));
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
    node_cancel_end(steal(m->given_up));
    node_unref(steal(m->source));
    node_unref(steal(m->target));
    node_unref(steal(m->backing));
}

static void mirror_free(struct job *j)
{
    free(mirror_of(j)->replaces);
}

static const struct job_driver mirror_driver = {
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

/* ---- what the command says ---- */

struct plan {
    struct json_object *args; /* lent */
    struct node *source, *target;
    const char *sync_name;
    enum sync_mode sync;
    enum backing_mode backing_mode;
    struct node *backing;
    bool zero_target, whole_clusters;
    struct dirty_bitmap *bitmap;
    enum bitmap_mode bitmap_mode;
    enum job_on_error on_source_error, on_target_error;
    uint64_t granularity;
    int64_t buf_size;
};

static int plan_on_error(struct json_object *args, const char *key, enum job_on_error *ret,
                         struct error *err)
{
    const char *value = json_get_string(args, key, NULL);
    int r = job_on_error_parse(value, JOB_ON_ERROR_REPORT);
    if (r < 0)
        return error_set(err, EINVAL, "Parameter '%s' does not accept value '%s'", key, value);
    *ret = (enum job_on_error)r;
    return 0;
}

static int parse_bitmap_mode(const char *name)
{
    static const char *const names[] = {"on-success", "never", "always", "conditional"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (strcmp(name, names[i]) == 0)
            return i == 3 ? BITMAP_ON_SUCCESS : (int)i;
    }
    return -EINVAL;
}

/* The words of Proxmox's patches, in the order of their checks. */
static int plan_bitmap(struct plan *p, const char *sync, struct error *err)
{
    const char *name = json_get_string(p->args, "bitmap", NULL);
    const char *mode = json_get_string(p->args, "bitmap-mode", NULL);
    int r = mode ? parse_bitmap_mode(mode) : 0;

    if (r < 0)
        return error_set(err, EINVAL, "Parameter 'bitmap-mode' does not accept value '%s'", mode);
    p->bitmap_mode = (enum bitmap_mode)r;
    if (p->sync == SYNC_BITMAP && !name)
        return error_set(err, EINVAL, "Must provide a valid bitmap name for '%s' sync mode", sync);
    if (strcmp(sync, "incremental") == 0) {
        if (mode && p->bitmap_mode != BITMAP_ON_SUCCESS)
            return error_set(err, EINVAL,
                             "Bitmap sync mode must be 'on-success' when using sync mode '%s'",
                             sync);
        mode = "on-success";
    }
    if (!name)
        return mode ? error_set(err, EINVAL, "Cannot specify bitmap sync mode without a bitmap")
                    : 0;
    if (p->sync != SYNC_BITMAP)
        return error_set(err, EINVAL, "Sync mode '%s' not supported with bitmap.", sync);
    if (p->granularity)
        return error_set(err, EINVAL, "Granularity and bitmap cannot both be set");
    if (!mode)
        return error_set(err, EINVAL, "bitmap-mode must be specified if a bitmap is provided");
    p->bitmap = dirty_find(p->source, name);
    if (!p->bitmap)
        return error_set(err, ENOENT, "Dirty bitmap '%s' not found", name);
    r = dirty_check(p->bitmap, DIRTY_CHECK_ALLOW_READONLY, err);
    if (r == 0 && p->bitmap_mode != BITMAP_NEVER)
        r = dirty_check(p->bitmap, DIRTY_CHECK_DEFAULT, err);
    if (r < 0)
        return r;
    p->granularity = dirty_granularity(p->bitmap);
    /* Clusters of the target that we do not touch may be nowhere: never write a part of one. */
    p->whole_clusters = true;
    return 0;
}

static int plan_replaces(struct plan *p, struct error *err)
{
    const char *name = json_get_string(p->args, "replaces", NULL);
    if (!name)
        return 0;
    struct node *n = graph_find(node_graph(p->source), name);
    if (!n)
        return error_set(err, ENOENT, "Failed to find node with node-name='%s'", name);
    int r = node_check_op(n, BLOCK_OP_REPLACE, err);
    if (r < 0)
        return r;
    if (!can_replace(p->source, n))
        return error_set(err, EINVAL,
                         "Cannot replace '%s' by a node mirrored from '%s', because it cannot be "
                         "guaranteed that doing so would not lead to an abrupt change of visible "
                         "data",
                         name, node_name(p->source));
    if (node_size(n) != node_size(p->source))
        return error_set(err, EINVAL, "cannot replace image with a mirror image of different size");
    return 0;
}

static bool chain_contains(struct node *top, const struct node *n)
{
    struct edge *e;
    for (;;) {
        if (top == n)
            return true;
        e = node_filtered_or_backing(top);
        if (!e)
            return false;
        top = e->node;
    }
}

static int plan_make(struct plan *p, struct error *err)
{
    const char *sync = p->sync_name;
    p->sync = strcmp(sync, "full") == 0   ? SYNC_FULL
              : strcmp(sync, "top") == 0  ? SYNC_TOP
              : strcmp(sync, "none") == 0 ? SYNC_NONE
                                          : SYNC_BITMAP;
    p->granularity = json_get_uint(p->args, "granularity", 0);
    p->buf_size = json_get_int(p->args, "buf-size", 0);

    int r = plan_on_error(p->args, "on-source-error", &p->on_source_error, err);
    if (r == 0)
        r = plan_on_error(p->args, "on-target-error", &p->on_target_error, err);
    if (r < 0)
        return r;
    if (p->granularity && (p->granularity < 512 || p->granularity > 64 * MiB))
        return error_set(err, EINVAL,
                         "Parameter 'granularity' expects a value in range [512B, 64MB]");
    if (p->granularity & (p->granularity - 1))
        return error_set(err, EINVAL, "Parameter 'granularity' expects a power of 2");
    r = node_check_op(p->source, BLOCK_OP_MIRROR_SOURCE, err);
    if (r == 0)
        r = node_check_op(p->target, BLOCK_OP_MIRROR_TARGET, err);
    if (r < 0)
        return r;
    if (p->sync == SYNC_TOP && !node_backing(p->source)) {
        p->sync = SYNC_FULL;
        sync = "full"; /* also in what is said of it */
    }
    r = plan_bitmap(p, sync, err);
    if (r == 0)
        r = plan_replaces(p, err);
    if (r < 0)
        return r;
    if (p->buf_size < 0)
        return error_set(err, EINVAL, "Invalid parameter 'buf-size'");
    if (node_skip_filters(p->source) == node_skip_filters(p->target))
        return error_set(err, EINVAL, "Can't mirror node into itself");
    return 0;
}

/* ---- making it ---- */

static int add_nodes(struct mirror *m, const struct plan *p, struct error *err)
{
    struct job *j = &m->job;
    const unsigned no_resize = PERM_ALL & ~PERM_RESIZE;
    int r = job_add_node(j, m->filter, "main node", PERM_CONSISTENT_READ, no_resize, err);
    if (r < 0)
        return r;
    m->main = TAILQ_FIRST(&j->nodes)->edge;
    if (chain_contains(p->source, node_skip_filters(p->target)))
        return error_set(err, EINVAL,
                         "Cannot mirror to a filter on top of a node in the source's backing "
                         "chain");
    r = job_add_node(j, p->target, "root", PERM_WRITE, PERM_WRITE_UNCHANGED, err);
    if (r < 0)
        return r;
    m->to = TAILQ_FIRST(&j->nodes)->edge;
    return job_add_node(j, p->source, "source", 0, no_resize, err);
}

static int add_follow(struct mirror *m, const struct plan *p, struct error *err)
{
    struct follow_options options = {
        .granularity = p->granularity,
        .buffer = (uint64_t)p->buf_size,
        .unmap = json_get_bool(p->args, "unmap", true),
        .whole_clusters = p->whole_clusters,
        .blocking = strcmp(json_get_string(p->args, "copy-mode", ""), "write-blocking") == 0,
    };
    int r = follow_new(mirror_top_source(m->filter), m->to, &options, &m->follow, err);
    if (r < 0)
        return r;
    follow_on_failure(m->follow, guest_write_failed, m);
    follow_set_speed(m->follow, (uint64_t)m->job.speed);
    if (!p->bitmap)
        return 0;
    r = dirty_start(p->bitmap, err);
    if (r < 0) {
        follow_free(steal(m->follow));
        return r;
    }
    m->bitmap = p->bitmap;
    m->bitmap_mode = p->bitmap_mode;
    bitmap_merge(follow_dirty(m->follow), dirty_bits(m->bitmap));
    return 0;
}

/* The filter and the source are quiesced. Steals FILTER. */
static int make_job(struct jobs *js, const struct plan *p, struct node *filter, struct mirror **ret,
                    struct error *err)
{
    struct json_object *args = p->args;
    struct job_options options = {
        .id = json_get_string(args, "job-id", json_get_string(args, "device", NULL)),
        .speed = json_get_int(args, "speed", 0),
        .manual_finalize = !json_get_bool(args, "auto-finalize", true),
        .manual_dismiss = !json_get_bool(args, "auto-dismiss", true),
    };
    const char *replaces = json_get_string(args, "replaces", NULL);
    struct job *j = NULL;
    int r = job_create(js, &mirror_driver, &options, &j, err);
    if (r < 0) {
        mirror_top_remove(filter);
        return r;
    }
    struct mirror *m = mirror_of(j);
    m->filter = filter;
    r = add_nodes(m, p, err);
    if (r == 0)
        r = add_follow(m, p, err);
    if (r < 0) {
        job_drop_nodes(j);
        mirror_top_remove(steal(m->filter));
        job_discard(j);
        return r;
    }
    m->source = node_ref(p->source);
    m->target = node_ref(p->target);
    m->losses = graph_losses(node_graph(m->source));
    m->sync = p->sync;
    m->zero_target = p->zero_target;
    m->backing_mode = p->backing_mode;
    m->backing = p->backing ? node_ref(p->backing) : NULL;
    m->target_is_zero = json_get_bool(args, "target-is-zero", false);
    m->on_source_error = p->on_source_error;
    m->on_target_error = p->on_target_error;
    m->replaces = replaces ? xstrdup(replaces) : NULL;
    mirror_top_set_follow(filter, m->follow);
    *ret = m;
    return 0;
}

static int start(struct jobs *js, struct plan *p, struct error *err)
{
    struct graph *g = jobs_graph(js);
    struct node *filter = NULL;
    struct mirror *m = NULL;
    int r = plan_make(p, err);
    if (r < 0)
        return r;

    graph_quiesce_begin(g, &p->source, 1);
    r = mirror_top_insert(p->source, json_get_string(p->args, "filter-node-name", NULL), &filter,
                          err);
    if (r == 0) {
        CLEANUP(node_unrefp) struct node *held = node_ref(filter);
        r = make_job(js, p, filter, &m, err);
        graph_quiesce_end(g, &held, 1);
    }
    graph_quiesce_end(g, &p->source, 1);
    if (r == 0)
        job_start(&m->job);
    return r;
}

static int find_node(struct graph *g, struct json_object *args, const char *key, struct node **ret,
                     struct error *err)
{
    const char *name = json_get_string(args, key, "");
    *ret = graph_find(g, name);
    if (!*ret)
        return error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
    return 0;
}

static int find_root(struct graph *g, struct json_object *args, struct node **ret,
                     struct error *err)
{
    struct edge *e;
    int r = find_node(g, args, "device", ret, err);
    if (r < 0)
        return r;
    TAILQ_FOREACH (e, &(*ret)->parents, in_parents) {
        if (e->parent || strcmp(e->name, "root") != 0)
            return error_set(err, EINVAL, "Need a root block node");
    }
    return 0;
}

int mirror_blockdev(struct jobs *js, struct json_object *args, struct error *err)
{
    struct graph *g = jobs_graph(js);
    const char *sync = json_get_string(args, "sync", "");
    struct plan p = {.args = args, .sync_name = sync, .zero_target = strcmp(sync, "full") == 0};

    SHIELD();
    GRAPH_LOCKED(g);
    int r = find_root(g, args, &p.source, err);
    if (r == 0)
        r = find_node(g, args, "target", &p.target, err);
    return r < 0 ? r : start(js, &p, err);
}

/* P->target becomes a reference. */
static int open_target(struct plan *p, struct error *err)
{
    const char *name = json_get_string(p->args, "node-name", NULL);
    const char *target = json_get_string(p->args, "target", "");
    bool existing = strcmp(json_get_string(p->args, "mode", ""), "existing") == 0;
    const char *format =
        json_get_string(p->args, "format", existing ? NULL : node_driver_name(p->source));

    struct node *behind = node_backing(p->source);
    if (!behind && strcmp(p->sync_name, "top") == 0)
        p->sync_name = "full";
    bool full = strcmp(p->sync_name, "full") == 0, none = strcmp(p->sync_name, "none") == 0;
    if (none || full)
        behind = none ? p->source : NULL;
    p->backing = none || strcmp(p->sync_name, "top") == 0 ? behind : NULL;
    p->backing_mode = existing ? BACKING_OPENED : BACKING_GIVEN;
    p->zero_target = existing && full;
    /* Until it has its backing image back, nothing is behind the target's clusters. */
    p->whole_clusters = behind || (existing && !full);

    int r = 0;
    if (!existing)
        r = graph_create_filename(
            node_graph(p->source), target, format, behind ? node_filename(behind) : NULL,
            behind ? node_driver_name(behind) : NULL, node_size(p->source), err);
    if (r < 0)
        return r;
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    if (name)
        json_add_string(options, "node-name", name);
    if (p->source->discard_unmap)
        json_add_string(options, "discard", "unmap");
    json_add(options, "backing", NULL);
    return graph_open_filename(node_graph(p->source), target, format, options, false, &p->target,
                               err);
}

int mirror_drive(struct jobs *js, struct json_object *args, struct error *err)
{
    struct graph *g = jobs_graph(js);
    struct plan p = {.args = args, .sync_name = json_get_string(args, "sync", "")};

    SHIELD();
    GRAPH_LOCKED(g);
    int r = find_root(g, args, &p.source, err);
    if (r == 0)
        r = node_check_op(p.source, BLOCK_OP_MIRROR_SOURCE, err); /* before a file is made */
    if (r == 0 && json_has(args, "replaces") && !json_has(args, "node-name"))
        r = error_set(err, EINVAL,
                      "a node-name must be provided when replacing a named node of the graph");
    if (r == 0)
        r = open_target(&p, err);
    if (r < 0)
        return r;
    r = start(js, &p, err);
    node_unref(p.target);
    return r;
}
