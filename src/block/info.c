/* What query-named-block-nodes, query-block and query-blockstats say of a node. */

#include "block/internal.h"

/* Allocated on the host, UINT64_MAX: unknown. */
static uint64_t allocated_bytes(struct node *n)
{
    uint64_t sum = 0;
    struct edge *e;

    if (n->driver->allocated_bytes)
        return n->driver->allocated_bytes(n);
    if (n->driver->protocol)
        return UINT64_MAX;
    TAILQ_FOREACH (e, &n->children, in_children) {
        if (!(e->role & (ROLE_DATA | ROLE_METADATA | ROLE_FILTERED)))
            continue;
        uint64_t bytes = allocated_bytes(e->node);
        if (bytes == UINT64_MAX)
            return bytes;
        sum += bytes;
    }
    return sum;
}

/* A filter, and raw, are as clean as what they stand on. */
static void add_dirty_flag(struct node *n, struct json_object *info)
{
    struct json_object *below, *flag;

    if (json_has(info, "dirty-flag") || !n->file ||
        !(n->driver->is_filter || n->driver == &driver_raw))
        return;
    below = json_object_new_object();
    if (n->file->node->driver->image_info)
        n->file->node->driver->image_info(n->file->node, below);
    add_dirty_flag(n->file->node, below);
    flag = json_get(below, "dirty-flag");
    if (flag)
        json_add_bool(info, "dirty-flag", json_object_get_boolean(flag));
    json_object_put(below);
}

static struct json_object *image_info(struct node *n)
{
    struct json_object *info = json_object_new_object();
    uint64_t allocated = allocated_bytes(n), cluster = node_cluster_size(n);
    const char *backing = NULL, *format = NULL;

    json_add_string(info, "filename", node_filename(n));
    json_add_string(info, "format", n->driver->name);
    json_add_uint(info, "virtual-size", n->size_bytes);
    if (allocated != UINT64_MAX)
        json_add_uint(info, "actual-size", allocated);
    if (cluster)
        json_add_uint(info, "cluster-size", cluster);
    if (n->driver->image_info)
        n->driver->image_info(n, info);
    add_dirty_flag(n, info);
    if (n->driver->image_backing && n->driver->image_backing(n, &backing, &format) && backing &&
        backing[0]) {
        CLEANUP(memory_freep) char *full = node_absolute_filename(n, backing, NULL);
        json_add_string(info, "backing-filename", backing);
        if (full)
            json_add_string(info, "full-backing-filename", full);
        if (format && format[0])
            json_add_string(info, "backing-filename-format", format);
    }
    return info;
}

struct json_object *node_info(struct node *n, bool flat, struct error *err)
{
    static const char *const limits[] = {"bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"};
    static const char *const detect[] = {"off", "on", "unmap"};
    SHIELD();
    GRAPH_LOCKED(n->graph); /* asking for sizes waits; what stands here must stay */
    struct json_object *info = json_object_new_object(), *cache = json_object_new_object(), *image;
    int64_t depth = 0;
    struct edge *e;

    (void)err;
    json_add_string(info, "file", node_filename(n));
    json_add_bool(info, "ro", n->read_only);
    json_add_string(info, "drv", n->driver->name);
    json_add_bool(info, "encrypted", false);
    json_add_bool(cache, "writeback", n->cache_writeback);
    json_add_bool(cache, "direct", n->cache_direct);
    json_add_bool(cache, "no-flush", n->cache_no_flush);
    json_add(info, "cache", cache);
    json_add_string(info, "node-name", n->name);
    if (n->backing)
        json_add_string(info, "backing_file", node_filename(n->backing->node));
    json_add_string(info, "detect_zeroes", detect[n->detect_zeroes]);
    for (size_t i = 0; i < ARRAY_SIZE(limits); i++)
        json_add_int(info, limits[i], 0);
    json_add_int(info, "write_threshold", 0);

    image = image_info(n);
    json_add(info, "image", image);
    while (!flat && (e = node_filtered_or_backing(n))) {
        struct json_object *next = image_info(e->node);
        depth++;
        json_add(image, "backing-image", next);
        image = next;
        n = e->node;
    }
    json_add_int(info, "backing_file_depth", depth);
    return info;
}

/* ---- statistics ---- */

/* The child whose statistics are shown inside: where the data is. */
static struct node *stats_child(struct node *n)
{
    struct edge *e = node_primary(n), *only = NULL;

    if (e && (e->role & (ROLE_DATA | ROLE_FILTERED)))
        return e->node;
    TAILQ_FOREACH (e, &n->children, in_children) {
        if (!(e->role & ROLE_DATA))
            continue;
        if (only)
            return NULL;
        only = e;
    }
    return only ? only->node : NULL;
}

struct json_object *node_stats(struct node *n)
{
    static const char *const zero[] = {"flush_total_time_ns",
                                       "wr_total_time_ns",
                                       "rd_total_time_ns",
                                       "unmap_total_time_ns",
                                       "rd_merged",
                                       "wr_merged",
                                       "unmap_merged",
                                       "failed_rd_operations",
                                       "failed_wr_operations",
                                       "failed_flush_operations",
                                       "failed_unmap_operations",
                                       "invalid_rd_operations",
                                       "invalid_wr_operations",
                                       "invalid_flush_operations",
                                       "invalid_unmap_operations"};
    const struct node_counters *c = &n->counters;
    struct json_object *info = json_object_new_object(), *stats = json_object_new_object();
    struct node *child = stats_child(n);

    json_add_uint(stats, "rd_bytes", c->rd_bytes);
    json_add_uint(stats, "wr_bytes", c->wr_bytes);
    json_add_uint(stats, "unmap_bytes", c->unmap_bytes);
    json_add_uint(stats, "rd_operations", c->rd_ops);
    json_add_uint(stats, "wr_operations", c->wr_ops);
    json_add_uint(stats, "unmap_operations", c->unmap_ops);
    json_add_uint(stats, "flush_operations", c->flush_ops);
    json_add_uint(stats, "wr_highest_offset", c->wr_highest_offset);
    for (size_t i = 0; i < ARRAY_SIZE(zero); i++)
        json_add_int(stats, zero[i], 0);
    json_add_bool(stats, "account_invalid", false);
    json_add_bool(stats, "account_failed", false);
    json_add(stats, "timed_stats", json_object_new_array());

    json_add_string(info, "node-name", n->name);
    json_add(info, "stats", stats);
    if (n->driver->specific_stats)
        json_add(info, "driver-specific", n->driver->specific_stats(n));
    if (child)
        json_add(info, "parent", node_stats(child));
    return info;
}
