/* Commands about nodes: adding and removing, resizing, looking. */
#include "block/driver.h"
#include "dirty/dirty.h"
#include "persist/persist.h"
#include "qmp/cmd.h"

int cmd_blockdev_add(struct qmp_call *call, struct error *err)
{
    CLEANUP(node_unrefp) struct node *n = NULL;

    if (!json_has(call->args, "node-name"))
        return error_set(err, EINVAL, "'node-name' must be specified for the root node");
    int r = graph_open(call->qmp->graph, call->args, &n, err);
    if (r < 0)
        return r;
    node_set_monitor_owned(n, true);
    return 0;
}

/* Does an export or the like have it? Jobs block operations instead: that is told first. */
static bool has_device(struct node *n)
{
    struct edge *e;

    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (!e->parent && !strcmp(e->name, "root"))
            return true;
    return false;
}

int cmd_blockdev_del(struct qmp_call *call, struct error *err)
{
    struct graph *g = call->qmp->graph;
    const char *name = json_get_string(call->args, "node-name", "");

    GRAPH_LOCKED(g);
    struct node *n = graph_find(g, name);
    if (!n)
        return error_set(err, ENODEV, "Failed to find node with node-name='%s'", name);
    if (has_device(n))
        return error_set(err, EBUSY, "Node %s is in use", name);
    struct op_blocker *b = TAILQ_FIRST(&n->blockers);
    if (b)
        return error_set(err, EBUSY, "Node '%s' is busy: %s", name, b->reason);
    if (!node_monitor_owned(n))
        return error_set(err, EBUSY, "Node %s is not owned by the monitor", name);
    if (n->refs > 1)
        return error_set(err, EBUSY, "Block device %s is in use", name);
    node_set_monitor_owned(n, false);
    return 0;
}

int cmd_blockdev_reopen(struct qmp_call *call, struct error *err)
{
    return graph_reopen(call->qmp->graph, json_get(call->args, "options"), err);
}

/* ---- resizing ---- */

static char *resizer_describe(struct user *u)
{
    return xstrdup("an unnamed block device");
}

int cmd_block_resize(struct qmp_call *call, struct error *err)
{
    static const struct user_ops ops = {.describe = resizer_describe};
    struct graph *g = call->qmp->graph;
    const char *device = json_get_string(call->args, "device", NULL);
    const char *name = json_get_string(call->args, "node-name", NULL);
    int64_t size = json_get_int(call->args, "size", 0);
    struct user u = {&ops};
    CLEANUP(edge_detachp) struct edge *e = NULL;

    GRAPH_LOCKED(g);
    /* a node's name is as good as a device's */
    struct node *n = device ? graph_find(g, device) : NULL;
    if (!n && name)
        n = graph_find(g, name);
    if (!n)
        return error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'",
                         device ? device : "", name ? name : "");
    if (size < 0)
        return error_set(err, EINVAL, "Parameter 'size' expects a >0 size");
    if (node_check_op(n, BLOCK_OP_RESIZE, NULL) < 0)
        return error_set(err, EBUSY, "Device '%s' is in use", node_name(n));
    int r = edge_attach_user(&u, n, "root", PERM_RESIZE, PERM_ALL, &e, err);
    if (r < 0)
        return r;
    return edge_truncate(e, (uint64_t)size, false, err);
}

/* ---- looking ---- */

/* BlockDeviceInfo with the bitmaps. NULL and an error when it cannot be told. */
static struct json_object *device_info(struct node *n, bool flat, struct error *err)
{
    struct json_object *info = node_info(n, flat, err);
    struct json_object *bitmaps = info ? dirty_info(n) : NULL;

    if (bitmaps)
        json_add(info, "dirty-bitmaps", bitmaps);
    struct json_object *recovery = info ? persist_info(n) : NULL;
    if (recovery)
        json_add(info, "x-tidemark-recovery", recovery);
    struct json_object *hot = info ? persist_hot_info(n) : NULL;
    if (hot)
        json_add(info, "x-tidemark-hot-regions", hot);
    return info;
}

int cmd_query_named_block_nodes(struct qmp_call *call, struct error *err)
{
    bool flat = json_get_bool(call->args, "flat", false);
    struct graph *g = call->qmp->graph;
    size_t count = 0;

    GRAPH_LOCKED(g);
    call->ret = json_object_new_array();
    for (struct node *n = graph_first(g); n; n = graph_next(n))
        count++;
    /* newest first */
    for (struct node *n = graph_first(g); n; n = graph_next(n)) {
        struct json_object *info = device_info(n, flat, err);
        if (!info)
            return err->code ? -err->code : -EIO;
        json_object_array_put_idx(call->ret, --count, info);
    }
    return 0;
}

static bool used_by_node(struct node *n)
{
    struct edge *e;

    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (e->parent)
            return true;
    return false;
}

struct exported {
    struct node *node;
    bool found;
};

static void is_exported(void *opaque, struct node *n)
{
    struct exported *x = opaque;

    x->found |= n == x->node;
}

static bool has_own_name(struct node *n)
{
    return !n->implicit && node_name(n)[0] != '#';
}

/* Below filters that jobs have put there: a disk keeps its name while it is backed up. */
static struct node *skip_made_filters(struct node *n)
{
    while (!has_own_name(n) && node_filtered(n))
        n = node_filtered(n)->node;
    return n;
}

/* QEMU tells of its devices here. We have none, and so of what stands for disks: the nodes at
 * the top, and those that are exported. */
int cmd_query_block(struct qmp_call *call, struct error *err)
{
    struct graph *g = call->qmp->graph;

    GRAPH_LOCKED(g);
    call->ret = json_object_new_array();
    for (struct node *n = graph_first(g); n; n = graph_next(n)) {
        struct exported x = {.node = n};
        struct node *shown = skip_made_filters(n);
        exports_each_node(call->qmp->exports, is_exported, &x);
        if (!x.found && (used_by_node(n) || !has_own_name(shown)))
            continue;
        struct json_object *info = device_info(shown, false, err);
        if (!info)
            return err->code ? -err->code : -EIO;
        struct json_object *one = json_object_new_object();
        json_add_string(one, "device", node_name(shown));
        json_add_string(one, "type", "unknown");
        json_add_bool(one, "removable", false);
        json_add_bool(one, "locked", false);
        json_add(one, "inserted", info);
        json_object_array_add(call->ret, one);
    }
    return 0;
}

/* Without query-nodes QEMU tells of devices with a name, of which there are none. */
int cmd_query_blockstats(struct qmp_call *call, struct error *err)
{
    struct graph *g = call->qmp->graph;

    GRAPH_LOCKED(g);
    call->ret = json_object_new_array();
    if (json_get_bool(call->args, "query-nodes", false))
        for (struct node *n = graph_first(g); n; n = graph_next(n))
            json_object_array_add(call->ret, node_stats(n));
    return 0;
}
