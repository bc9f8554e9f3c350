/* The registry of exports, and the life of one:
 *
 *     added --- user's reference, one more per client ---> shut down: clients are disconnected,
 *               no new ones, user's reference dropped ---> last reference: node and bitmaps let
 *               go in a task of their own (closing may wait) ---> BLOCK_EXPORT_DELETED
 *
 * The texts are QEMU 7.2's. */
#include "base/id.h"
#include "base/log.h"
#include "block/driver.h"
#include "nbd/internal.h"

struct exports *exports_new(struct graph *g)
{
    struct exports *x = xnew(struct exports);

    x->graph = g;
    x->next_serial = 1;
    TAILQ_INIT(&x->list);
    scope_init(&x->closers);
    waitq_init(&x->changed);
    event_init(&x->accepting);
    event_set(&x->accepting);
    return x;
}

void exports_set_accepting(struct exports *x, bool accepting)
{
    if (accepting)
        event_set(&x->accepting);
    else
        event_reset(&x->accepting);
}

void exports_free(struct exports *x)
{
    exports_close_all(x);
    if (x->server)
        (void)nbd_server_stop(x, NULL);
    scope_fini(&x->closers);
    free(x);
}

/* ---- finding ---- */

static struct export *find_id(struct exports *x, const char *id)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link)
        if (!strcmp(e->id, id))
            return e;
    return NULL;
}

struct export *export_find_name(struct exports *x, struct nbd_string name)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link)
        if (e->user_owned && nbd_string_equals(name, e->name))
            return e;
    return NULL;
}

void exports_each_node(struct exports *x, void (*fn)(void *opaque, struct node *n), void *opaque)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link)
        fn(opaque, e->edge->node);
}

struct json_object *exports_info(struct exports *x)
{
    struct json_object *list = json_object_new_array();
    struct export *e;

    TAILQ_FOREACH (e, &x->list, link) {
        struct json_object *info = json_object_new_object();
        json_add_string(info, "id", e->id);
        json_add_string(info, "type", "nbd");
        json_add_string(info, "node-name", node_name(e->edge->node));
        json_add_bool(info, "shutting-down", !e->user_owned);
        json_object_array_add(list, info);
    }
    return list;
}

/* ---- adding ---- */

static char *describe(struct user *u)
{
    return xstrdup("an unnamed block device");
}

static int hold_bitmap(struct export *e, size_t i, struct error *err);

/* The export leads to another node now (an overlay, a mirror's target). Its bitmaps stay where they
 * are, and their nodes must stay as long as it shows them. */
static void moved(struct user *u, struct edge *edge)
{
    struct export *e = container_of(u, struct export, user);

    for (size_t i = 0; edge == e->edge && i < e->bitmap_count; i++) {
        struct error err = ERROR_INIT;
        if (e->bitmap_edges[i] && dirty_node(e->bitmaps[i]) == edge->node)
            edge_detach(steal(e->bitmap_edges[i]));
        else if (!e->bitmap_edges[i] && hold_bitmap(e, i, &err) < 0)
            log_error("export '%s': %s", e->id, err.text); /* it needs nothing: cannot be */
    }
}

static const struct user_ops export_user_ops = {.describe = describe, .moved = moved};

static void export_free(struct export *e)
{
    for (size_t i = 0; i < e->bitmap_count; i++) {
        dirty_set_busy(e->bitmaps[i], false);
        if (e->bitmap_edges[i])
            edge_detach(e->bitmap_edges[i]);
    }
    free(e->bitmaps);
    free(e->bitmap_edges);
    if (e->edge)
        edge_detach(e->edge);
    free(e->id);
    free(e->name);
    free(e->description);
    free(e);
}
DEFINE_CLEANUP(struct export *, export_free, export_freep)

/* What stands under a node and shows through it: a filter's child, an image's backing. */
static struct node *filtered_or_backing(struct node *n)
{
    struct edge *e;
    TAILQ_FOREACH (e, &n->children, in_children)
        if (e->role & (ROLE_FILTERED | ROLE_COW))
            return e->node;
    return NULL;
}

/* A name alone is looked for down the chain; {"node", "name"} says exactly where. */
static int find_bitmap(struct export *e, struct json_object *which, struct dirty_bitmap **ret,
                       struct error *err)
{
    struct dirty_bitmap *bm = NULL;

    if (json_object_is_type(which, json_type_object)) {
        int r = dirty_lookup(e->registry->graph, json_get_string(which, "node", ""),
                             json_get_string(which, "name", ""), NULL, &bm, err);
        if (r < 0)
            return r;
    } else {
        const char *name = json_object_get_string(which);
        struct node *top = e->edge->node, *n = top;
        while (n && !(bm = dirty_find(n, name)))
            n = filtered_or_backing(n);
        if (!bm)
            return error_set(err, ENOENT, "Bitmap '%s' is not found", name);
        /* What a client reads must hold still while it reads. */
        if (!e->writable && !node_read_only(top) && dirty_enabled(bm))
            return error_set(err, EINVAL, "Enabled bitmap '%s' incompatible with readonly export",
                             name);
    }
    int r = dirty_check(bm, DIRTY_CHECK_ALLOW_READONLY, err);
    if (r < 0)
        return r;
    *ret = bm;
    return 0;
}

/* A bitmap may be on another node than the export's: that one must not go before the export. */
static int hold_bitmap(struct export *e, size_t i, struct error *err)
{
    struct node *n = dirty_node(e->bitmaps[i]);

    if (n == e->edge->node)
        return 0;
    int r = edge_attach_user(&e->user, n, "bitmap", 0, PERM_ALL, &e->bitmap_edges[i], err);
    if (r >= 0)
        e->bitmap_edges[i]->stay = true; /* the bitmap stays where it is, whatever comes above */
    return r;
}

static int take_bitmaps(struct export *e, struct json_object *list, struct error *err)
{
    size_t n = list ? json_object_array_length(list) : 0;

    CLEANUP(memory_freep) struct dirty_bitmap **found = xcalloc(n + 1, sizeof(*found));
    for (size_t i = 0; i < n; i++) {
        int r = find_bitmap(e, json_object_array_get_idx(list, i), &found[i], err);
        if (r < 0)
            return r;
    }
    e->bitmaps = steal(found);
    e->bitmap_edges = xcalloc(n + 1, sizeof(*e->bitmap_edges));
    for (; e->bitmap_count < n; e->bitmap_count++) {
        int r = hold_bitmap(e, e->bitmap_count, err);
        if (r < 0)
            return r;
        /* Only now, so that the same bitmap named twice is not refused as busy by ourselves. */
        dirty_set_busy(e->bitmaps[e->bitmap_count], true);
    }
    return 0;
}

static int set_up(struct export *e, struct json_object *options, struct node *n, struct error *err)
{
    struct exports *x = e->registry;
    const char *node = json_get_string(options, "node-name", "");
    const char *name = json_get_string(options, "name", node);
    const char *description = json_get_string(options, "description", NULL);

    unsigned perm = PERM_CONSISTENT_READ | (e->writable ? PERM_WRITE : 0);
    int r = edge_attach_user(&e->user, n, "root", perm, PERM_ALL, &e->edge, err);
    if (r < 0)
        return r;
    if (!x->server)
        return error_set(err, EINVAL, "NBD server not running");
    if (strlen(name) > NBD_MAX_STRING)
        return error_set(err, EINVAL, "export name '%s' too long", name);
    if (description && strlen(description) > NBD_MAX_STRING)
        return error_set(err, EINVAL, "description '%s' too long", description);
    struct nbd_string as_asked = {name, (uint32_t)strlen(name)};
    if (export_find_name(x, as_asked))
        return error_set(err, EEXIST, "NBD server already has export named '%s'", name);

    /* Clients were told a size: nobody resizes the node under them. */
    r = edge_set_perm(e->edge, perm, PERM_ALL & ~PERM_RESIZE, err);
    if (r < 0)
        return r;
    e->name = xstrdup(name);
    e->description = description ? xstrdup(description) : NULL;
    e->size_bytes = align_down(node_size(n), 512);
    e->flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE;
    if (x->server->max_connections != 1)
        e->flags |= NBD_FLAG_CAN_MULTI_CONN;
    if (e->writable)
        e->flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    else
        e->flags |= NBD_FLAG_READ_ONLY;
    e->allocation_depth = json_get_bool(options, "allocation-depth", false);
    return take_bitmaps(e, json_get(options, "bitmaps"), err);
}

int export_add(struct exports *x, struct json_object *options, struct error *err)
{
    const char *id = json_get_string(options, "id", "");
    const char *node = json_get_string(options, "node-name", "");
    const char *type = json_get_string(options, "type", "");
    bool writable = json_get_bool(options, "writable", false);

    if (!id_well_formed(id))
        return error_set(err, EINVAL, "Invalid block export id");
    if (find_id(x, id))
        return error_set(err, EEXIST, "Block export id '%s' is already in use", id);
    if (strcmp(type, "nbd"))
        return error_set(err, ENOTSUP, "No driver found for the requested export type");

    GRAPH_LOCKED(x->graph);
    struct node *n = graph_find(x->graph, node);
    if (!n)
        return error_set(err, ENODEV, "Cannot find device='' nor node-name='%s'", node);
    if (node_read_only(n) && writable)
        return error_set(err, EROFS, "Cannot export read-only node as writable");

    CLEANUP(export_freep) struct export *e = xnew(struct export);
    e->user.ops = &export_user_ops;
    e->registry = x;
    e->serial = x->next_serial++;
    e->id = xstrdup(id);
    e->refs = 1;
    e->user_owned = true;
    e->writable = writable;
    e->writethrough = json_get_bool(options, "writethrough", false);
    TAILQ_INIT(&e->connections);

    int r = set_up(e, options, n, err);
    if (r < 0)
        return r;
    TAILQ_INSERT_HEAD(&x->list, e, link);
    (void)steal(e);
    return 0;
}

int export_add_legacy(struct exports *x, struct json_object *options, struct error *err)
{
    const char *device = json_get_string(options, "device", "");
    struct node *n = graph_find(x->graph, device);

    if (!n)
        return error_set(err, ENODEV, "Cannot find device='%s' nor node-name='%s'", device, device);

    CLEANUP(json_putp) struct json_object *full = json_copy(options);
    json_object_object_del(full, "device");
    if (!json_has(full, "name"))
        json_add_string(full, "name", device);
    json_add_string(full, "type", "nbd");
    json_add_string(full, "id", json_get_string(full, "name", ""));
    json_add_string(full, "node-name", device);
    if (json_has(full, "bitmap")) {
        struct json_object *list = json_object_new_array();
        json_object_array_add(list, json_object_get(json_get(full, "bitmap")));
        json_object_object_del(full, "bitmap");
        json_add(full, "bitmaps", list);
    }
    /* The old command downgrades where the new one refuses. */
    if (node_read_only(n))
        json_add_bool(full, "writable", false);
    return export_add(x, full, err);
}

/* ---- removing ---- */

static int let_go(void *arg)
{
    struct export *e = arg;
    struct exports *x = e->registry;
    SHIELD();

    CLEANUP(json_putp) struct json_object *data = json_object_new_object();
    json_add_string(data, "id", e->id);
    TAILQ_REMOVE(&x->list, e, link);
    GRAPH_LOCKED(x->graph);
    export_free(e);
    graph_raise(x->graph, "BLOCK_EXPORT_DELETED", data);
    waitq_wake_all(&x->changed);
    return 0;
}

void export_io_error(struct export *e, bool is_read, int code)
{
    uint64_t now = clock_now_ns(), *told = &e->error_told_ns[!is_read];

    if (*told && now - *told < IO_ERROR_EVERY_NS)
        return;
    *told = now;
    CLEANUP(json_putp) struct json_object *data = json_object_new_object();
    json_add_string(data, "device", "");
    json_add_string(data, "node-name", node_name(e->edge->node));
    json_add_string(data, "operation", is_read ? "read" : "write");
    json_add_string(data, "action", "report");
    json_add_bool(data, "nospace", code == ENOSPC);
    json_add_string(data, "reason", strerror(code));
    graph_raise(e->registry->graph, "BLOCK_IO_ERROR", data);
}

void export_ref(struct export *e)
{
    e->refs++;
}

void export_unref(struct export *e)
{
    assert(e->refs > 0);
    if (--e->refs == 0)
        scope_spawn(&e->registry->closers, let_go, e);
}

void export_shut_down(struct export *e)
{
    struct connection *c;

    if (!e->user_owned)
        return;
    e->user_owned = false;
    TAILQ_FOREACH (c, &e->connections, in_export)
        io_shutdown(c->fd);
    export_unref(e);
}

int export_del(struct exports *x, const char *id, bool hard, struct error *err)
{
    struct export *e = find_id(x, id);

    if (!e)
        return error_set(err, ENOENT, "Export '%s' is not found", id);
    if (!e->user_owned)
        return error_set(err, EBUSY, "Export '%s' is already shutting down", id);
    if (!hard && e->refs > 1)
        return error_set(err, EBUSY, "export '%s' still in use", id);
    export_shut_down(e);
    return 0;
}

void exports_close_all(struct exports *x)
{
    struct export *e;
    SHIELD();

    TAILQ_FOREACH (e, &x->list, link)
        export_shut_down(e);
    while (!TAILQ_EMPTY(&x->list) && waitq_wait(&x->changed) == 0) {
    }
}
