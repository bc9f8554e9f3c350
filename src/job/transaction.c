/* Transactions: see transaction.h for their course.
 *
 * Each kind of action is a row of four functions. prepare does the thing so that the
 * actions after it see it; commit makes it final and cannot fail; abort undoes it; clean comes
 * after either. Between the first prepare and the last commit the touched nodes are quiesced and
 * the graph is locked: no guest write, no other command and no end of a job falls in there.
 *
 * A bitmap that is removed is hidden until the commit: its name is free for the actions after it,
 * and abort brings it back. What its image holds of it goes at prepare, because that may fail;
 * after an abort it is stored again when the image is closed.
 *
 * A snapshot flushes its node, puts the overlay above it and holds who has moved there until all is
 * decided. Only when all is committed, and its bitmaps have their base (which they say in its tide
 * file), does the node become read-only (and its persistent bitmaps are saved in it); that may
 * fail, and then it stays as it is, which nobody above can tell.
 *
 * Image files that prepare has made are removed after an abort, when nobody has them open any more;
 * a file that was there before is not ours to remove, although making an image in it has cost it
 * its content: that happens at prepare, as with QEMU.
 *
 * When all is committed and the bitmaps then cannot get their base (dirty_settle), who asked gets
 * an error, too: the jobs are cancelled, their new targets go (not that of one that is complete by
 * then), and so do the bitmaps that were added. A snapshot stays, because guests have written to
 * the overlay meanwhile. */
#include "job/transaction.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "dirty/dirty.h"
#include "job/backup.h"
#include "job/compare.h"
#include "rt/io.h"
#include "rt/task.h"

struct transaction;

struct action {
    const struct action_kind *kind;
    struct transaction *transaction;
    struct json_object *data; /* lent */
    TAILQ_ENTRY(action) link;

    struct dirty_bitmap *bitmap; /* NULL: prepare has not come so far */
    struct node *added_to;       /* its node, lent; NULL: it was there before */
    uint64_t serial;             /* its serial, then */
    struct bitmap *undo;         /* its bits as they were */
    bool was_enabled, was_based;
    struct job *job;
    struct node *quiet; /* a filter or an overlay that has come in: quiesced, with a reference */
    char *made;         /* an image file that was not there before */

    struct node *below;         /* snapshot: lent */
    struct node_append *append; /* NULL: it has no overlay (yet) */
    bool stands_behind;         /* that is committed: to become read-only */
};

struct action_kind {
    const char *name;
    bool in_groups; /* may have completion-mode grouped */
    int (*prepare)(struct action *a, struct error *err);
    void (*commit)(struct action *a);
    void (*abort)(struct action *a);
    void (*clean)(struct action *a);
};

struct transaction {
    struct graph *graph;
    struct jobs *jobs;
    struct job_group *group; /* NULL: individual */
    TAILQ_HEAD(action_list, action) actions;
    struct node **nodes; /* named ones, which are quiesced, and overlays that it has opened */
    size_t node_count, named_count;
    bool failed;
};

/* ---- bitmaps ---- */

static int find_node(struct action *a, const char *key, struct node **ret, struct error *err)
{
    const char *name = json_get_string(a->data, key, "");
    *ret = graph_find(a->transaction->graph, name);
    if (!*ret)
        return error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'", name, name);
    return 0;
}

static int find_bitmap(struct action *a, unsigned checks, struct dirty_bitmap **ret,
                       struct error *err)
{
    int r = dirty_lookup(a->transaction->graph, json_get_string(a->data, "node", ""),
                         json_get_string(a->data, "name", ""), NULL, ret, err);
    return r < 0 ? r : dirty_check(*ret, checks, err);
}

static int add_prepare(struct action *a, struct error *err)
{
    struct node *n;
    const char *name = json_get_string(a->data, "name", "");
    if (!*name)
        return error_set(err, EINVAL, "Bitmap name cannot be empty");
    int r = find_node(a, "node", &n, err);
    if (r < 0)
        return r;
    uint64_t granularity = 0;
    if (json_has(a->data, "granularity")) {
        granularity = json_get_uint(a->data, "granularity", 0);
        if (granularity == 0)
            return error_set(err, EINVAL, DIRTY_BAD_GRANULARITY);
    }
    unsigned flags = 0;
    if (json_get_bool(a->data, "persistent", false))
        flags |= DIRTY_PERSISTENT;
    if (json_get_bool(a->data, "disabled", false))
        flags |= DIRTY_DISABLED;
    r = dirty_add(n, name, granularity, flags, &a->bitmap, err);
    if (r == 0) {
        a->added_to = n;
        a->serial = dirty_serial(a->bitmap);
    }
    return r;
}

static void add_abort(struct action *a)
{
    if (a->bitmap)
        dirty_release(a->bitmap);
}

static int remove_prepare(struct action *a, struct error *err)
{
    struct dirty_bitmap *bm;
    int r = find_bitmap(a, DIRTY_CHECK_READONLY, &bm, err);
    if (r == 0 && !dirty_held(bm)) /* in doubt: who can tell may never come back */
        r = dirty_check(bm, DIRTY_CHECK_BUSY, err);
    if (r == 0)
        r = dirty_remove_stored(bm, err);
    if (r < 0)
        return r;
    dirty_hide(bm);
    a->bitmap = bm;
    return 0;
}

static void remove_commit(struct action *a)
{
    dirty_release(a->bitmap);
}

static void remove_abort(struct action *a)
{
    if (a->bitmap)
        dirty_unhide(a->bitmap);
}

static int clear_prepare(struct action *a, struct error *err)
{
    struct dirty_bitmap *bm;
    int r = find_bitmap(a, DIRTY_CHECK_DEFAULT, &bm, err);
    if (r < 0)
        return r;
    a->undo = dirty_clear(bm);
    if (!a->undo)
        return error_set(err, ENOMEM, "No memory to clear bitmap '%s'", dirty_name(bm));
    a->bitmap = bm;
    return 0;
}

static void undo_commit(struct action *a)
{
    if (a->undo)
        dirty_forget(a->bitmap, steal(a->undo));
}

static void undo_abort(struct action *a)
{
    if (BROKEN(failed_merge_not_undone))
        undo_commit(a);
    if (a->undo)
        dirty_restore(a->bitmap, steal(a->undo));
}

static int enable_disable(struct action *a, bool enable, struct error *err)
{
    struct dirty_bitmap *bm;
    int r = find_bitmap(a, DIRTY_CHECK_ALLOW_READONLY, &bm, err);
    if (r < 0)
        return r;
    bool was_enabled = dirty_enabled(bm), was_based = dirty_based(bm);
    r = dirty_set_enabled(bm, enable, err);
    if (r < 0)
        return r;
    a->bitmap = bm;
    a->was_enabled = was_enabled;
    a->was_based = was_based;
    return 0;
}

static int enable_prepare(struct action *a, struct error *err)
{
    return enable_disable(a, true, err);
}

static int disable_prepare(struct action *a, struct error *err)
{
    return enable_disable(a, false, err);
}

static void enable_disable_abort(struct action *a)
{
    if (a->bitmap)
        dirty_undo_enabled(a->bitmap, a->was_enabled, a->was_based);
}

/* A source is a name on the same node, or {node, name}. */
static int merge_source(struct action *a, struct node *n, struct json_object *source,
                        struct dirty_bitmap **ret, struct error *err)
{
    if (json_object_is_type(source, json_type_string)) {
        const char *name = json_object_get_string(source);
        *ret = dirty_find(n, name);
        if (!*ret)
            return error_set(err, ENOENT, "Dirty bitmap '%s' not found", name);
        return 0;
    }
    return dirty_lookup(a->transaction->graph, json_get_string(source, "node", ""),
                        json_get_string(source, "name", ""), NULL, ret, err);
}

static int merge_prepare(struct action *a, struct error *err)
{
    struct node *n;
    struct dirty_bitmap *bm, *source;
    int r = dirty_lookup(a->transaction->graph, json_get_string(a->data, "node", ""),
                         json_get_string(a->data, "target", ""), &n, &bm, err);
    if (r < 0)
        return r;
    a->bitmap = bm;

    struct json_object *sources = json_get(a->data, "bitmaps");
    size_t count = sources ? json_object_array_length(sources) : 0;
    for (size_t i = 0; i < count; i++) {
        r = merge_source(a, n, json_object_array_get_idx(sources, i), &source, err);
        if (r == 0)
            r = dirty_merge(bm, source, a->undo ? NULL : &a->undo, err);
        if (r < 0)
            return r; /* abort undoes the first ones */
    }
    return 0;
}

/* ---- what a backup and a snapshot share ---- */

/* Makes an image: BACKING (may be NULL) is recorded as what stands behind it. */
static int make_image(struct action *a, const char *filename, const char *format, uint64_t size,
                      struct node *backing, struct error *err)
{
    const char *path = strncmp(filename, "file:", 5) == 0 ? filename + 5 : filename;
    struct stat st;
    bool is_new = io_stat(path, &st) == -ENOENT || BROKEN(older_file_removed);
    int r = graph_create_filename(a->transaction->graph, filename, format,
                                  backing ? node_filename(backing) : NULL,
                                  backing ? node_driver_name(backing) : NULL, size, err);
    /* Also half an image. The name may be a link, which is not ours. */
    if (is_new && io_realpath(path, &a->made) < 0)
        a->made = NULL;
    return r;
}

/* N has come above a node that is quiesced, with that node's users: they wait at its gate now. */
static void hold(struct action *a, struct node *n)
{
    a->quiet = node_ref(n);
    graph_quiesce_begin(a->transaction->graph, &a->quiet, 1);
}

static void remove_made(struct action *a)
{
    if (a->made && !BROKEN(made_file_stays) && io_unlink(a->made) < 0)
        log_warning("the file '%s', made in vain, cannot be removed", a->made);
}

static void let_go(struct action *a)
{
    if (a->quiet) {
        graph_quiesce_end(a->transaction->graph, &a->quiet, 1);
        node_unref(steal(a->quiet));
    }
    if (a->transaction->failed)
        remove_made(a);
}

/* ---- jobs ---- */

static void job_action_commit(struct action *a)
{
    job_start(a->job);
}

static void job_action_abort(struct action *a)
{
    if (a->job)
        job_cancel_and_wait(a->job);
}

static void job_action_clean(struct action *a)
{
    let_go(a);
}

static int compare_prepare(struct action *a, struct error *err)
{
    struct compare_request rq = {.data = a->data, .group = a->transaction->group};
    int r = find_node(a, "device", &rq.disk, err);
    if (r == 0)
        r = find_node(a, "target", &rq.target, err);
    if (r == 0)
        r = compare_create(a->transaction->jobs, &rq, &a->job, err);
    if (r == 0)
        job_ref(a->job);
    return r;
}

static int start_backup(struct action *a, struct backup_request *rq, struct error *err)
{
    rq->data = a->data;
    rq->group = a->transaction->group;
    int r = backup_create(a->transaction->jobs, rq, &a->job, err);
    if (r < 0)
        return r;
    job_ref(a->job);                            /* with a group, another member's abort ends it */
    a->quiet = node_ref(backup_filter(a->job)); /* which is quiesced */
    return 0;
}

static int blockdev_backup_prepare(struct action *a, struct error *err)
{
    struct backup_request rq = {.sync = json_get_string(a->data, "sync", "")};
    int r = find_node(a, "device", &rq.source, err);
    if (r == 0)
        r = find_node(a, "target", &rq.target, err);
    return r < 0 ? r : start_backup(a, &rq, err);
}

static int drive_backup_prepare(struct action *a, struct error *err)
{
    struct backup_request rq = {.sync = json_get_string(a->data, "sync", "")};
    const char *mode = json_get_string(a->data, "mode", "absolute-paths");
    const char *target = json_get_string(a->data, "target", "");
    bool existing = strcmp(mode, "existing") == 0;
    int r = find_node(a, "device", &rq.source, err);
    if (r < 0)
        return r;
    if (!existing && strcmp(mode, "absolute-paths") != 0)
        return error_set(err, EINVAL, "Parameter 'mode' does not accept value '%s'", mode);
    const char *format =
        json_get_string(a->data, "format", existing ? NULL : node_driver_name(rq.source));
    r = node_check_op(rq.source, BLOCK_OP_BACKUP_SOURCE, err); /* before a file is made */
    if (r < 0)
        return r;

    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    json_add_string(options, "discard", "unmap");
    json_add_string(options, "detect-zeroes", "unmap");
    struct node *backing = NULL;
    if (strcmp(rq.sync, "top") == 0) {
        backing = node_backing(rq.source);
        if (!backing)
            rq.sync = "full";
    } else if (strcmp(rq.sync, "none") == 0) {
        backing = rq.source;
        json_add_string(options, "backing", node_name(backing));
    }
    if (!existing) {
        r = make_image(a, target, format, node_size(rq.source), backing, err);
        if (r < 0)
            return r;
        rq.made = target;
    }
    r = graph_open_filename(a->transaction->graph, target, format, options, false, &rq.target, err);
    if (r < 0)
        return r;
    r = start_backup(a, &rq, err);
    node_unref(rq.target);
    return r;
}

/* ---- snapshots ---- */

/* The node is quiesced; what was written to it shall not depend on its overlay. */
static int prepare_node(struct action *a, struct error *err)
{
    int r = node_check_op(a->below, BLOCK_OP_EXTERNAL_SNAPSHOT, err);
    if (r == 0 && !node_read_only(a->below) && node_flush(a->below) < 0 &&
        !BROKEN(snapshot_without_flush))
        r = error_set(err, EIO, "An IO error has occurred");
    return r;
}

/* It was not there when the nodes were collected, and its bitmaps are to be durable, too. */
static int join(struct transaction *t, struct node *overlay, struct error *err)
{
    t->nodes[t->node_count++] = node_ref(overlay);
    return dirty_join(&overlay, 1, err);
}

static int put_overlay(struct action *a, struct node *overlay, struct error *err)
{
    hold(a, overlay);
    return node_append(overlay, a->below, &a->append, err);
}

static int snapshot_prepare(struct action *a, struct error *err)
{
    struct node *overlay;
    int r = find_node(a, "node", &a->below, err);
    if (r == 0)
        r = prepare_node(a, err);
    if (r == 0)
        r = find_node(a, "overlay", &overlay, err);
    return r < 0 ? r : put_overlay(a, overlay, err);
}

/* By its device, for which a node's name is as good, or by its name. */
static int find_snapshot_node(struct action *a, bool *by_name, struct error *err)
{
    struct graph *g = a->transaction->graph;
    const char *device = json_get_string(a->data, "device", NULL);
    const char *name = json_get_string(a->data, "node-name", NULL);

    a->below = device ? graph_find(g, device) : NULL;
    *by_name = name;
    if (!a->below && name)
        a->below = graph_find(g, name);
    return a->below ? 0
                    : error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'",
                                device ? device : "", name ? name : "");
}

/* The overlay is opened as its node is; what stands behind it comes later. */
static struct json_object *overlay_options(struct node *below, const char *name)
{
    struct json_object *options = json_object_new_object(), *cache = json_object_new_object();
    if (name)
        json_add_string(options, "node-name", name);
    json_add(options, "backing", NULL);
    json_add_bool(cache, "direct", below->cache_direct);
    json_add_bool(cache, "no-flush", below->cache_no_flush);
    json_add(options, "cache", cache);
    json_add_bool(options, "read-only", below->read_only);
    json_add_bool(options, "auto-read-only", below->auto_read_only);
    if (below->discard_unmap)
        json_add_string(options, "discard", "unmap");
    return options;
}

/* A file whose name is not durable is gone after a power loss, with what guests have flushed. */
static void flush_name(struct action *a)
{
    if (a->made && io_sync_dir_of(a->made) < 0)
        log_warning("the directory of '%s' cannot be flushed", a->made);
}

static int snapshot_sync_prepare(struct action *a, struct error *err)
{
    struct graph *g = a->transaction->graph;
    const char *name = json_get_string(a->data, "snapshot-node-name", NULL);
    const char *file = json_get_string(a->data, "snapshot-file", "");
    const char *format = json_get_string(a->data, "format", "qcow2");
    const char *mode = json_get_string(a->data, "mode", "absolute-paths");
    bool by_name;
    int r = find_snapshot_node(a, &by_name, err);
    if (r == 0)
        r = prepare_node(a, err);
    if (r < 0)
        return r;
    if (by_name && !name)
        return error_set(err, EINVAL, "New overlay node-name missing");
    if (name && graph_find(g, name))
        return error_set(err, EEXIST, "New overlay node-name already in use");

    if (strcmp(mode, "existing") != 0) {
        r = make_image(a, file, format, node_size(a->below), a->below, err);
        if (r < 0)
            return r;
        flush_name(a);
    }
    CLEANUP(json_putp) struct json_object *options = overlay_options(a->below, name);
    CLEANUP(node_unrefp) struct node *overlay = NULL;
    r = graph_open_filename(g, file, format, options, false, &overlay, err);
    if (r == 0)
        r = put_overlay(a, overlay, err);
    return r < 0 ? r : join(a->transaction, overlay, err);
}

static void snapshot_commit(struct action *a)
{
    node_append_keep(steal(a->append));
    a->stands_behind = true;
}

static void snapshot_abort(struct action *a)
{
    if (a->append)
        node_append_undo(steal(a->append));
}

/* ---- the table ---- */

static int abort_prepare(struct action *a, struct error *err)
{
    return error_set(err, ECANCELED, "Transaction aborted using Abort action");
}

static const struct action_kind kinds[] = {
    {"abort", true, abort_prepare, NULL, NULL, NULL},
    {"block-dirty-bitmap-add", false, add_prepare, NULL, add_abort, NULL},
    {"block-dirty-bitmap-remove", false, remove_prepare, remove_commit, remove_abort, NULL},
    {"block-dirty-bitmap-clear", false, clear_prepare, undo_commit, undo_abort, NULL},
    {"block-dirty-bitmap-enable", false, enable_prepare, NULL, enable_disable_abort, NULL},
    {"block-dirty-bitmap-disable", false, disable_prepare, NULL, enable_disable_abort, NULL},
    {"block-dirty-bitmap-merge", false, merge_prepare, undo_commit, undo_abort, NULL},
    {"blockdev-snapshot", false, snapshot_prepare, snapshot_commit, snapshot_abort, let_go},
    {"blockdev-snapshot-sync", false, snapshot_sync_prepare, snapshot_commit, snapshot_abort,
     let_go},
    {"blockdev-backup", true, blockdev_backup_prepare, job_action_commit, job_action_abort,
     job_action_clean},
    {"drive-backup", true, drive_backup_prepare, job_action_commit, job_action_abort,
     job_action_clean},
    {"x-tidemark-compare", true, compare_prepare, job_action_commit, job_action_abort,
     job_action_clean},
};

static const struct action_kind *kind_named(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (strcmp(kinds[i].name, name) == 0)
            return &kinds[i];
    }
    return NULL;
}

/* ---- the course ---- */

static int add_action(struct transaction *t, const char *type, struct json_object *data,
                      struct error *err)
{
    const struct action_kind *kind = kind_named(type);
    if (!kind)
        return error_set(err, ENOTSUP, "Transaction action '%s' is not supported", type);
    struct action *a = xnew(struct action);
    a->kind = kind;
    a->transaction = t;
    a->data = data;
    TAILQ_INSERT_TAIL(&t->actions, a, link);
    return 0;
}

/* The nodes whose guests must wait: those that actions name as theirs. */
static void collect_nodes(struct transaction *t)
{
    static const char *const keys[] = {"node", "device", "node-name", "overlay"};
    struct action *a;
    size_t count = 0;
    TAILQ_FOREACH (a, &t->actions, link)
        count += ARRAY_SIZE(keys) + 1; /* an overlay */
    t->nodes = xcalloc(count + 1, sizeof *t->nodes);

    TAILQ_FOREACH (a, &t->actions, link) {
        for (size_t k = 0; k < ARRAY_SIZE(keys); k++) {
            const char *name = json_get_string(a->data, keys[k], NULL);
            struct node *n = name ? graph_find(t->graph, name) : NULL;
            for (size_t i = 0; n && i < t->node_count; i++) {
                if (t->nodes[i] == n)
                    n = NULL;
            }
            if (n)
                t->nodes[t->node_count++] = node_ref(n);
        }
    }
    t->named_count = t->node_count;
}

/* Deliberate faults only: guests come in, or are kept out again, before all is done. */
static void let_guests_in(struct transaction *t, bool in)
{
    struct action *a;

    if (in)
        graph_quiesce_end(t->graph, t->nodes, t->named_count);
    TAILQ_FOREACH (a, &t->actions, link) {
        if (a->quiet && in)
            graph_quiesce_end(t->graph, &a->quiet, 1);
        else if (a->quiet)
            graph_quiesce_begin(t->graph, &a->quiet, 1);
    }
    if (!in)
        graph_quiesce_begin(t->graph, t->nodes, t->named_count);
}

static bool has_action(const struct transaction *t, const char *name)
{
    const struct action *a;

    TAILQ_FOREACH (a, &t->actions, link)
        if (strcmp(a->kind->name, name) == 0)
            return true;
    return false;
}

/* Deliberate faults only: is what these actions do left for the next one to make durable? */
static bool is_put_off(const struct transaction *t)
{
    return (BROKEN(add_not_durable) && has_action(t, "block-dirty-bitmap-add")) ||
           (BROKEN(enable_not_durable) && has_action(t, "block-dirty-bitmap-enable"));
}

static int make_durable(struct transaction *t, struct error *err)
{
    if (is_put_off(t))
        return 0;
    if (BROKEN(start_before_superblock))
        let_guests_in(t, true);
    int r = dirty_commit(t->nodes, t->node_count, err);
    if (BROKEN(start_before_superblock))
        let_guests_in(t, false);
    return r;
}

static int run_locked(struct transaction *t, struct error *err)
{
    struct action *a, *failed = NULL;
    int r = 0;

    TAILQ_FOREACH (a, &t->actions, link) {
        if (t->group && !a->kind->in_groups && !BROKEN(group_takes_any_action))
            r = error_set(err, EINVAL,
                          "Action '%s' does not support Transaction property completion-mode = "
                          "grouped",
                          a->kind->name);
        else
            r = a->kind->prepare(a, err);
        if (r < 0) {
            failed = a;
            break;
        }
    }
    bool prepared = !failed;
    if (prepared && (r = make_durable(t, err)) < 0)
        failed = TAILQ_LAST(&t->actions, action_list);
    t->failed = failed;
    if (failed) {
        for (a = failed; a; a = TAILQ_PREV(a, action_list, link)) {
            if (a->kind->abort)
                a->kind->abort(a);
        }
        if (prepared)
            dirty_commit_undone(t->nodes, t->node_count);
    } else {
        TAILQ_FOREACH (a, &t->actions, link) {
            if (a->kind->commit)
                a->kind->commit(a);
        }
    }
    TAILQ_FOREACH (a, &t->actions, link) {
        if (a->kind->clean)
            a->kind->clean(a);
    }
    return r;
}

/* What stands behind an overlay is not written any more. If it cannot be had so, it stays writable:
 * that is no reason to undo what is done. */
static void make_read_only(struct transaction *t)
{
    struct action *a;

    TAILQ_FOREACH (a, &t->actions, link) {
        struct error err = ERROR_INIT;
        if (a->stands_behind && node_set_read_only(a->below, true, &err) < 0)
            log_warning("node '%s' stays writable behind its overlay: %s", node_name(a->below),
                        err.text);
    }
}

/* The bitmaps have not got the base that the jobs count on. One may be complete all the same: what
 * its bitmap has lost is in its file. */
static void end_jobs(struct transaction *t)
{
    struct action *a;
    TAILQ_FOREACH (a, &t->actions, link) {
        if (a->job) {
            job_cancel_and_wait(a->job);
            if (a->job->result < 0 || BROKEN(complete_backup_removed))
                remove_made(a);
        }
    }
}

/* Nothing can be done with them: they are inconsistent. Others had the graph meanwhile, and may
 * have removed them, or hold them. */
static void remove_added(struct transaction *t)
{
    struct error err = ERROR_INIT;
    struct action *a;
    bool any = false;

    GRAPH_LOCKED(t->graph);
    graph_quiesce_begin(t->graph, t->nodes, t->node_count);
    TAILQ_FOREACH (a, &t->actions, link) {
        struct dirty_bitmap *bm = a->added_to ? dirty_find_serial(a->added_to, a->serial) : NULL;
        if (bm && !dirty_busy(bm)) {
            dirty_release(bm);
            any = true;
        }
    }
    if (any && dirty_commit(t->nodes, t->node_count, &err) < 0)
        log_warning("%s", err.text);
    graph_quiesce_end(t->graph, t->nodes, t->node_count);
}

static int run(struct transaction *t, struct error *err)
{
    SHIELD();
    graph_lock(t->graph);
    collect_nodes(t);
    graph_quiesce_begin(t->graph, t->nodes, t->named_count);
    int r = dirty_begin(t->nodes, t->node_count, err);
    if (r == 0)
        r = run_locked(t, err);
    graph_quiesce_end(t->graph, t->nodes, t->named_count);
    graph_unlock(t->graph);
    if (r == 0 && !is_put_off(t)) {
        r = dirty_settle(t->nodes, t->node_count, err);
        if (r < 0) {
            end_jobs(t);
            remove_added(t);
        }
    }
    make_read_only(t);
    for (size_t i = 0; i < t->node_count; i++)
        node_unref(t->nodes[i]);
    return r;
}

static void transaction_init(struct transaction *t, struct graph *g, struct jobs *js)
{
    *t = (struct transaction){.graph = g, .jobs = js};
    TAILQ_INIT(&t->actions);
}

static void transaction_fini(struct transaction *t)
{
    struct action *a;
    while ((a = TAILQ_FIRST(&t->actions))) {
        TAILQ_REMOVE(&t->actions, a, link);
        if (a->job)
            job_unref(a->job);
        free(a->made);
        free(a);
    }
    free(t->nodes);
    if (t->group)
        job_group_unref(t->group);
}

int transaction_run(struct graph *g, struct jobs *js, struct json_object *actions,
                    struct json_object *properties, struct error *err)
{
    CLEANUP(transaction_fini) struct transaction t;
    transaction_init(&t, g, js);

    const char *mode =
        properties ? json_get_string(properties, "completion-mode", "individual") : "individual";
    if (strcmp(mode, "grouped") == 0)
        t.group = job_group_new();
    else if (strcmp(mode, "individual") != 0)
        return error_set(err, EINVAL, "Parameter 'completion-mode' does not accept value '%s'",
                         mode);
    for (size_t i = 0; i < json_object_array_length(actions); i++) {
        struct json_object *action = json_object_array_get_idx(actions, i);
        int r = add_action(&t, json_get_string(action, "type", ""), json_get(action, "data"), err);
        if (r < 0)
            return r;
    }
    return run(&t, err);
}

int transaction_run_one(struct graph *g, struct jobs *js, const char *type,
                        struct json_object *data, struct error *err)
{
    CLEANUP(transaction_fini) struct transaction t;
    transaction_init(&t, g, js);
    int r = add_action(&t, type, data, err);
    return r < 0 ? r : run(&t, err);
}
