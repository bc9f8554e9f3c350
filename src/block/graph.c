/* The graph: its nodes by name, its drivers, its lock; what hangs on a node.
 *
 * A node lives while somebody refers to it: the edges that lead to it, the monitor, and
 * code that keeps it across a wait. The last reference closes it: first the hooks of later
 * rooms (they save bitmaps, through children that still work), then the driver, then its
 * edges, which may close more nodes.
 *
 * The graph's lock is for tasks that change what stands where. It is recursive, because
 * opening a node opens its children, and closing one may happen at the end of anything. */

#include "block/internal.h"

#include "base/id.h"
#include "base/log.h"
#include "rt/clock.h"

#include <stdio.h>

/* ---- pointers by key, of a node or of the graph ---- */

static void *get_data(const struct node_data *list, const void *key)
{
    for (const struct node_data *d = list; d; d = d->next)
        if (d->key == key)
            return d->data;
    return NULL;
}

static void set_data(struct node_data **list, const void *key, void *data)
{
    struct node_data *d;

    for (d = *list; d; d = d->next) {
        if (d->key == key) {
            d->data = data;
            return;
        }
    }
    d = xnew(struct node_data);
    *d = (struct node_data){.next = *list, .key = key, .data = data};
    *list = d;
}

static void free_data(struct node_data *list)
{
    while (list) {
        struct node_data *d = list;
        list = d->next;
        free(d);
    }
}

struct graph *graph_new(void)
{
    struct graph *g = xnew(struct graph);

    TAILQ_INIT(&g->nodes);
    LIST_INIT(&g->quieted);
    TAILQ_INIT(&g->hooks);
    mutex_init(&g->lock);
    graph_add_driver(g, &driver_file);
    graph_add_driver(g, &driver_host_device);
    graph_add_driver(g, &driver_raw);
    graph_add_driver(g, &driver_null_co);
    graph_add_driver(g, &driver_qcow2);
    graph_add_driver(g, &driver_blkdebug);
    graph_add_driver(g, &driver_throttle);
    graph_add_driver(g, &driver_nbd);
    return g;
}

void graph_close_all(struct graph *g)
{
    struct node *n;

again:
    TAILQ_FOREACH (n, &g->nodes, in_graph) {
        if (n->monitor_owned) {
            node_set_monitor_owned(n, false);
            goto again; /* other nodes may have gone with it */
        }
    }
}

void graph_free(struct graph *g)
{
    struct node *n;

    if (!g)
        return;
    graph_close_all(g);
    TAILQ_FOREACH (n, &g->nodes, in_graph)
        log_error("node '%s' is still used at the end", n->name);
    if (!TAILQ_EMPTY(&g->nodes))
        return; /* what is still used must stay */
    struct graph_hook *hook;
    while ((hook = TAILQ_LAST(&g->hooks, hook_list))) {
        TAILQ_REMOVE(&g->hooks, hook, link);
        if (hook->gone)
            hook->gone(hook);
    }
    free_data(g->data);
    free(g->drivers);
    free(g);
}

/* ---- the lock ---- */

bool graph_lock_is_mine(struct graph *g)
{
    return g->lock_depth && g->lock.owner == task_self();
}

void graph_lock(struct graph *g)
{
    if (!graph_lock_is_mine(g))
        mutex_lock_shielded(&g->lock);
    g->lock_depth++;
}

bool graph_trylock(struct graph *g)
{
    if (!graph_lock_is_mine(g) && !mutex_trylock(&g->lock))
        return false;
    g->lock_depth++;
    return true;
}

void graph_unlock(struct graph *g)
{
    assert(graph_lock_is_mine(g));
    if (!--g->lock_depth)
        mutex_unlock(&g->lock);
}

void graph_unlockp(struct graph **g)
{
    graph_unlock(*g);
}

/* ---- drivers ---- */

void graph_add_driver(struct graph *g, const struct driver *d)
{
    const struct driver **drivers;

    assert(!graph_find_driver(g, d->name));
    drivers = realloc(g->drivers, (g->n_drivers + 1) * sizeof *drivers);
    if (!drivers)
        abort();
    g->drivers = drivers;
    g->drivers[g->n_drivers++] = d;
}

const struct driver *graph_find_driver(struct graph *g, const char *name)
{
    for (size_t i = 0; i < g->n_drivers; i++)
        if (!strcmp(g->drivers[i]->name, name))
            return g->drivers[i];
    return NULL;
}

/* ---- names ---- */

struct node *graph_find(struct graph *g, const char *name)
{
    struct node *n;

    TAILQ_FOREACH (n, &g->nodes, in_graph)
        if (!strcmp(n->name, name))
            return n;
    return NULL;
}

struct node *graph_first(struct graph *g)
{
    return TAILQ_FIRST(&g->nodes);
}

struct node *graph_next(struct node *n)
{
    return TAILQ_NEXT(n, in_graph);
}

int node_assign_name(struct node *n, const char *name, struct error *err)
{
    struct graph *g = n->graph;
    char made[sizeof n->name];

    if (!name) {
        /* Two digits at random at the end, so that no script relies on the number. */
        uint8_t random;
        do {
            random_bytes(&random, 1);
            snprintf(made, sizeof made, "#block%llu%02u", (unsigned long long)g->names_made++,
                     random % 100);
        } while (graph_find(g, made));
        name = made;
    } else if (!id_well_formed(name)) {
        return error_set(err, EINVAL, "Invalid node-name: '%s'", name);
    }
    if (graph_find(g, name))
        return error_set(err, EINVAL, "Duplicate nodes with node-name='%s'", name);
    if (strlen(name) >= sizeof n->name)
        return error_set(err, EINVAL, "Node name too long");

    strcpy(n->name, name);
    TAILQ_INSERT_TAIL(&g->nodes, n, in_graph);
    return 0;
}

/* ---- nodes ---- */

struct node *node_new(struct graph *g)
{
    struct node *n = xnew(struct node);

    n->graph = g;
    n->refs = 1;
    n->filename = xstrdup("");
    n->cache_writeback = true;
    TAILQ_INIT(&n->children);
    TAILQ_INIT(&n->parents);
    TAILQ_INIT(&n->observers);
    TAILQ_INIT(&n->blockers);
    waitq_init(&n->at_gate);
    waitq_init(&n->emptied);
    mutex_init(&n->flush_lock);
    rangelock_init(&n->locks);
    return n;
}

/* Takes the children away and frees the node; its driver is not open (any more). */
static void node_release(struct node *n)
{
    struct graph *g = n->graph;
    struct edge *e;
    struct node *other;

    while ((e = TAILQ_LAST(&n->children, edge_list)))
        edge_detach(e);
    assert(TAILQ_EMPTY(&n->parents));
    TAILQ_FOREACH (other, &g->nodes, in_graph)
        if (other->inherits_from == n)
            other->inherits_from = NULL;
    free_data(n->data);
    json_object_put(n->options);
    free(n->state);
    free(n->filename);
    free(n->full_filename);
    free(n);
}

void node_discard(struct node *n)
{
    if (n->name[0])
        TAILQ_REMOVE(&n->graph->nodes, n, in_graph);
    n->name[0] = '\0';
    n->closing = true;
    node_release(n);
}

static void node_close(struct node *n)
{
    SHIELD();
    struct graph *g = n->graph;
    GRAPH_LOCKED(g);
    struct graph_hook *hook;

    assert(TAILQ_EMPTY(&n->parents));
    n->closing = true;
    TAILQ_REMOVE(&g->nodes, n, in_graph);
    while (n->inside) /* a request that its user did not wait for */
        if (waitq_wait(&n->emptied) < 0)
            break;
    if (n->hooked) {
        TAILQ_FOREACH_REVERSE(hook, &g->hooks, hook_list, link)
        if (hook->closing)
            hook->closing(hook, n);
    }
    if (!n->read_only && node_flush(n) < 0)
        log_warning("node '%s': the last flush before closing has failed", n->name);
    assert(TAILQ_EMPTY(&n->observers));
    if (n->driver->close)
        n->driver->close(n);
    node_release(n);
}

struct node *node_ref(struct node *n)
{
    assert(n->refs || n->closing);
    n->refs++;
    return n;
}

void node_unref(struct node *n)
{
    if (!n)
        return;
    assert(n->refs);
    if (--n->refs || n->closing)
        return;
    node_close(n);
}

void node_set_monitor_owned(struct node *n, bool owned)
{
    if (n->monitor_owned == owned)
        return;
    n->monitor_owned = owned;
    if (owned)
        node_ref(n);
    else
        node_unref(n);
}

bool node_monitor_owned(const struct node *n)
{
    return n->monitor_owned;
}

const char *node_name(const struct node *n)
{
    return n->name;
}

const char *node_driver_name(const struct node *n)
{
    return n->driver->name;
}

struct graph *node_graph(const struct node *n)
{
    return n->graph;
}

uint64_t node_size(const struct node *n)
{
    return n->size_bytes;
}

bool node_read_only(const struct node *n)
{
    return n->read_only;
}

uint32_t node_request_alignment(const struct node *n)
{
    return n->limits.request_alignment;
}

uint64_t node_cluster_size(const struct node *n)
{
    const struct edge *e;

    if (n->driver->cluster_size)
        return n->driver->cluster_size(n);
    e = node_filtered(n);
    return e ? node_cluster_size(e->node) : 0;
}

/* ---- who stands below ---- */

struct edge *node_filtered(const struct node *n)
{
    struct edge *e;

    if (!n->driver || !n->driver->is_filter)
        return NULL;
    TAILQ_FOREACH (e, &n->children, in_children)
        if (e->role & ROLE_FILTERED)
            return e;
    return NULL;
}

struct edge *node_filtered_or_backing(const struct node *n)
{
    struct edge *e = node_filtered(n);

    return e ? e : n->backing;
}

struct edge *node_primary(const struct node *n)
{
    struct edge *e;

    TAILQ_FOREACH (e, &n->children, in_children)
        if (e->role & ROLE_PRIMARY)
            return e;
    return NULL;
}

bool node_grows_by_content(const struct node *n)
{
    const struct edge *e = node_primary(n);

    if (e) /* whose metadata is not there either decides itself what is */
        return !(e->role & ROLE_METADATA) && node_grows_by_content(e->node);
    return n->driver->grows_by_content;
}

struct node *node_skip_filters(struct node *n)
{
    struct edge *e;

    while ((e = node_filtered(n)))
        n = e->node;
    return n;
}

struct node *node_backing(struct node *n)
{
    n = node_skip_filters(n);
    return n->backing ? n->backing->node : NULL;
}

static bool reaches(struct node *from, const struct node *to, unsigned visit)
{
    struct edge *e;

    if (from == to)
        return true;
    if (from->visited == visit)
        return false;
    from->visited = visit;
    TAILQ_FOREACH (e, &from->children, in_children)
        if (reaches(e->node, to, visit))
            return true;
    return false;
}

bool node_reaches(struct node *from, const struct node *to)
{
    return reaches(from, to, ++from->graph->visit);
}

static unsigned height(struct node *n, unsigned visit)
{
    struct edge *e;

    if (n->visited == visit)
        return n->height;
    n->visited = visit;
    n->height = 1;
    TAILQ_FOREACH (e, &n->children, in_children)
        n->height = (unsigned)max_u64(n->height, 1 + height(e->node, visit));
    return n->height;
}

unsigned node_height(struct node *n)
{
    return height(n, ++n->graph->visit);
}

unsigned graph_height(struct graph *g)
{
    unsigned visit = ++g->visit, highest = 0;
    struct node *n;

    TAILQ_FOREACH (n, &g->nodes, in_graph)
        highest = (unsigned)max_u64(highest, height(n, visit));
    return highest;
}

/* ---- why not ---- */

void node_block_ops(struct node *n, struct op_blocker *b)
{
    TAILQ_INSERT_HEAD(&n->blockers, b, link);
}

void node_unblock_ops(struct node *n, struct op_blocker *b)
{
    TAILQ_REMOVE(&n->blockers, b, link);
}

int node_check_op(struct node *n, enum block_op op, struct error *err)
{
    struct op_blocker *b;

    TAILQ_FOREACH (b, &n->blockers, link)
        if (b->ops & (1u << op))
            return error_set(err, EBUSY, "Node '%s' is busy: %s", n->name, b->reason);
    return 0;
}

/* ---- what later rooms hang here ---- */

void graph_add_hook(struct graph *g, struct graph_hook *h)
{
    TAILQ_INSERT_TAIL(&g->hooks, h, link);
}

void *node_get_data(const struct node *n, const void *key)
{
    return get_data(n->data, key);
}

void node_set_data(struct node *n, const void *key, void *data)
{
    set_data(&n->data, key, data);
}

void *graph_get_data(const struct graph *g, const void *key)
{
    return get_data(g->data, key);
}

void graph_set_data(struct graph *g, const void *key, void *data)
{
    set_data(&g->data, key, data);
}

void node_observe(struct node *n, struct write_observer *o)
{
    assert(!n->inside);
    TAILQ_INSERT_TAIL(&n->observers, o, link);
}

void node_unobserve(struct node *n, struct write_observer *o)
{
    assert(!n->inside);
    TAILQ_REMOVE(&n->observers, o, link);
}

void graph_set_event_listener(struct graph *g, graph_event_fn *fn, void *opaque)
{
    g->listener = fn;
    g->listener_opaque = opaque;
}

void graph_raise(struct graph *g, const char *name, struct json_object *data)
{
    if (g->listener)
        g->listener(g->listener_opaque, name, data);
}
