/* blockdev-mirror and drive-mirror: what they ask for is checked, then the job is made and begins.
 */
#include "job/mirror.h"

#include "base/broken.h"
#include "block/driver.h"
#include "job/mirror_internal.h"
#include "rt/task.h"

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
    if (!mirror_can_replace(p->source, n))
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

    int r = job_get_on_error(p->args, "on-source-error", &p->on_source_error, err);
    if (r == 0)
        r = job_get_on_error(p->args, "on-target-error", &p->on_target_error, err);
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

/* The superblock that names the successor is durable before guests mark it: else what they write
 * meanwhile is in no place that a crash leaves. */
static int start_bitmap(struct dirty_bitmap *bm, struct error *err)
{
    struct node *n = dirty_node(bm);
    int r = dirty_start(bm, err);
    if (r < 0 || BROKEN(mirror_start_not_durable))
        return r;
    r = dirty_commit(&n, 1, err);
    if (r == 0)
        return 0;
    dirty_unstart(bm);
    dirty_commit_undone(&n, 1);
    return r;
}

static int add_follow(struct mirror *m, const struct plan *p, struct error *err)
{
    struct follow_options options = {
        .granularity = p->granularity,
        .buffer = (uint64_t)p->buf_size,
        .unmap = json_get_bool(p->args, "unmap", true),
        .whole_clusters = p->whole_clusters,
        .blocking = strcmp(json_get_string(p->args, "copy-mode", ""), "write-blocking") == 0,
        .recall = p->bitmap && p->bitmap_mode == BITMAP_ALWAYS,
    };
    int r = follow_new(mirror_top_source(m->filter), m->to, &options, &m->follow, err);
    if (r < 0)
        return r;
    follow_on_failure(m->follow, mirror_guest_write_failed, m);
    follow_set_speed(m->follow, (uint64_t)m->job.speed);
    if (!p->bitmap)
        return 0;
    r = start_bitmap(p->bitmap, err);
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
    m->top = node_ref(node_skip_filters(p->source));
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

    graph_quiesce_begin(g, &p->source, 1);
    /* Before the bitmap is looked at: what it finds out may make it inconsistent. */
    int r = json_has(p->args, "bitmap") ? dirty_begin(&p->source, 1, err) : 0;
    if (r == 0)
        r = plan_make(p, err);
    if (r == 0)
        r = mirror_top_insert(p->source, json_get_string(p->args, "filter-node-name", NULL),
                              &filter, err);
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
