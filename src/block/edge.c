/* Edges: attaching and cutting them, and changing what stands where.
 *
 * Whatever moves an edge does it under graph_lock, with the node quiesced that the edge leaves, and
 * with the permissions of both sides worked out afterwards: if those cannot be had, the edges go
 * back and nothing has happened. */

#include "block/internal.h"

#include "base/broken.h"
#include "base/log.h"

struct edge *edge_new(struct node *parent, struct user *user, struct node *child, const char *name,
                      unsigned role)
{
    struct edge *e = xnew(struct edge);

    *e = (struct edge){.node = node_ref(child),
                       .parent = parent,
                       .user = user,
                       .name = xstrdup(name),
                       .role = role,
                       .shared = PERM_ALL};
    TAILQ_INSERT_HEAD(&child->parents, e, in_parents);
    if (parent) {
        TAILQ_INSERT_TAIL(&parent->children, e, in_children);
        if (role & ROLE_COW) {
            assert(!parent->backing);
            parent->backing = e;
        } else if (role & ROLE_PRIMARY) {
            assert(!parent->file);
            parent->file = e;
        }
    }
    return e;
}

void edge_unlink(struct edge *e)
{
    TAILQ_REMOVE(&e->node->parents, e, in_parents);
    if (e->parent) {
        TAILQ_REMOVE(&e->parent->children, e, in_children);
        if (e->parent->file == e)
            e->parent->file = NULL;
        if (e->parent->backing == e)
            e->parent->backing = NULL;
    }
    free(e->name);
    free(e);
}

/* Takes the edge out of all lists, to be shown again or freed. */
void edge_hide(struct edge *e)
{
    TAILQ_REMOVE(&e->node->parents, e, in_parents);
    TAILQ_REMOVE(&e->parent->children, e, in_children);
    if (e->parent->file == e)
        e->parent->file = NULL;
    if (e->parent->backing == e)
        e->parent->backing = NULL;
}

void edge_show(struct edge *e)
{
    TAILQ_INSERT_HEAD(&e->node->parents, e, in_parents);
    TAILQ_INSERT_TAIL(&e->parent->children, e, in_children);
    if (e->role & ROLE_COW)
        e->parent->backing = e;
    else if (e->role & ROLE_PRIMARY)
        e->parent->file = e;
}

void edge_move(struct edge *e, struct node *to)
{
    TAILQ_REMOVE(&e->node->parents, e, in_parents);
    e->node = to;
    TAILQ_INSERT_HEAD(&to->parents, e, in_parents);
}

/* A backing image must stay as it is: most of what a job could do with it is refused. */
void edge_block_backing(struct node *parent, struct node *backing)
{
    struct op_blocker *b = xnew(struct op_blocker);

    b->ops = ~(1u << BLOCK_OP_COMMIT_TARGET | 1u << BLOCK_OP_STREAM | 1u << BLOCK_OP_BACKUP_SOURCE |
               1u << BLOCK_OP_BACKUP_TARGET);
    b->reason = xasprintf("node is used as backing hd of '%s'", parent->name);
    node_block_ops(backing, b);
    parent->backing_blocker = b;
}

void edge_unblock_backing(struct node *parent, struct node *backing)
{
    struct op_blocker *b = steal(parent->backing_blocker);

    if (!b)
        return;
    node_unblock_ops(backing, b);
    free(b->reason);
    free(b);
}

int edge_attach_user(struct user *u, struct node *n, const char *name, unsigned perm,
                     unsigned shared, struct edge **ret, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(n->graph);
    struct edge *e = edge_new(NULL, u, n, name, 0);

    e->perm = perm;
    e->shared = shared;
    int r = perm_refresh(n->graph, &n, 1, err);
    if (r < 0) {
        edge_unlink(e);
        node_unref(n);
        return r;
    }
    *ret = e;
    return 0;
}

int node_attach_child(struct node *n, struct node *child, const char *key, unsigned role,
                      struct edge **ret, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(n->graph);
    struct edge *e;
    int r;

    if (node_reaches(child, n))
        return error_set(err, EINVAL, "Making '%s' a %s child of '%s' would create a cycle",
                         child->name, key, n->name);
    if (node_height(child) >= GRAPH_DEPTH_MAX)
        return error_set(err, ELOOP, "More than %d nodes on top of each other", GRAPH_DEPTH_MAX);
    e = edge_new(n, NULL, child, key, role);
    r = perm_refresh(n->graph, &n, 1, err);
    if (r < 0) {
        edge_unlink(e);
        node_unref(child);
        return r;
    }
    if (role & ROLE_COW)
        edge_block_backing(n, child);
    if (ret)
        *ret = e;
    return 0;
}

void edge_detach(struct edge *e)
{
    SHIELD();
    struct node *n, *parent;
    struct graph *g;

    if (!e)
        return;
    n = e->node;
    parent = e->parent;
    g = n->graph;
    GRAPH_LOCKED(g);
    if (parent && (e->role & ROLE_COW))
        edge_unblock_backing(parent, n);
    edge_unlink(e);
    /* What the others need has become less; that a driver cannot follow is no reason to stay. */
    if (n->refs > 1 && !n->closing && n->name[0])
        (void)perm_refresh(g, &n, 1, NULL);
    node_unref(n);
}

int edge_freeze(struct edge *e, struct error *err)
{
    if (e->node->driver->comes_and_goes)
        return error_set(err, EPERM, "Cannot freeze '%s' link to '%s'", e->name, e->node->name);
    e->frozen = true;
    return 0;
}

void edge_thaw(struct edge *e)
{
    e->frozen = false;
}

/* ---- moving ---- */

struct edges {
    struct edge **items;
    size_t n;
};

/* Those of FROM's parents that TO is to have. ALL: also edges that `stay`. */
static int choose_parents(struct node *from, struct node *to, bool all, struct edges *ret,
                          struct error *err)
{
    struct edge *e;
    size_t capacity = 0;

    TAILQ_FOREACH (e, &from->parents, in_parents)
        capacity++;
    *ret = (struct edges){xcalloc(capacity + 1, sizeof *ret->items), 0};

    TAILQ_FOREACH (e, &from->parents, in_parents) {
        /* An edge that TO itself stands on would become a loop. */
        if (e->parent && node_reaches(to, e->parent))
            continue;
        if (!all && e->stay)
            continue;
        if (e->frozen)
            return error_set(err, EPERM, "Cannot change '%s' link to '%s'", e->name, from->name);
        ret->items[ret->n++] = e;
    }
    return 0;
}

static int check_move(struct node *from, struct node *to, struct error *err)
{
    struct node *roots[] = {to, from};

    if (graph_height(from->graph) > GRAPH_DEPTH_MAX)
        return error_set(err, ELOOP, "More than %d nodes on top of each other", GRAPH_DEPTH_MAX);
    return perm_refresh(from->graph, roots, ARRAY_SIZE(roots), err);
}

/* Everybody has moved: who must know? */
static void settle_move(const struct edges *moved, struct node *from, struct node *to)
{
    for (size_t i = 0; i < moved->n; i++) {
        struct edge *e = moved->items[i];
        if (e->parent && e == e->parent->backing && e->parent->backing_blocker) {
            node_unblock_ops(from, e->parent->backing_blocker);
            node_block_ops(to, e->parent->backing_blocker);
        }
        if (e->user && e->user->ops->moved)
            e->user->ops->moved(e->user, e);
        node_unref(from); /* the caller holds one more */
    }
}

/* FORCE: also when permissions cannot be had; ERR then says why. */
static int move_edges(const struct edges *chosen, struct node *from, struct node *to, bool force,
                      struct error *err)
{
    for (size_t i = 0; i < chosen->n; i++) {
        node_ref(to);
        edge_move(chosen->items[i], to);
    }
    int r = check_move(from, to, err);
    if (r < 0 && !force) {
        /* In reverse, so that the parents' order is what it was. */
        for (size_t i = chosen->n; i--;) {
            edge_move(chosen->items[i], from);
            node_unref(to);
        }
        return r;
    }
    settle_move(chosen, from, to);
    return r;
}

static int move_parents(struct node *from, struct node *to, bool all, struct error *err)
{
    struct edges chosen;
    int r = choose_parents(from, to, all, &chosen, err);

    if (r == 0)
        r = move_edges(&chosen, from, to, false, err);
    free(chosen.items);
    return r;
}

static int move_quiesced(struct node *from, struct node *to, bool all, struct error *err)
{
    SHIELD();
    struct graph *g = from->graph;
    GRAPH_LOCKED(g);
    CLEANUP(node_unrefp) struct node *held_from = node_ref(from);
    int r;

    (void)held_from;

    graph_quiesce_begin(g, &from, 1);
    r = move_parents(from, to, all, err);
    graph_quiesce_end(g, &from, 1);
    return r;
}

int node_insert_filter(struct node *filter, struct node *n, struct error *err)
{
    return move_quiesced(n, filter, false, err);
}

int node_remove_filter(struct node *filter, struct error *err)
{
    struct edge *e = node_filtered(filter);

    assert(e);
    if (e->frozen)
        return error_set(err, EPERM, "Cannot change '%s' link to '%s'", e->name, e->node->name);
    /* What the filter needs of its child must not stand in the way of those who come back:
     * it keeps its edge, but has nobody any more who would need anything. A bitmap of its own goes
     * with it, and has seen all writes. */
    bool watched = filter->watched;
    filter->watched = false;
    int r = move_quiesced(filter, e->node, true, err);
    if (r < 0)
        filter->watched = watched;
    return r;
}

int node_replace(struct node *from, struct node *to, struct error *err)
{
    return move_quiesced(from, to, false, err);
}

/* ---- an overlay ---- */

struct node_append {
    struct node *overlay, *below; /* references */
    struct edges moved;
};

const struct node *filter_that_keeps(const struct node *n)
{
    const struct edge *e;
    const struct node *found = NULL;

    TAILQ_FOREACH (e, &n->parents, in_parents) {
        if (found || !e->parent || !(e->role & ROLE_PRIMARY))
            continue;
        found = e->parent->driver->child_stays ? e->parent : filter_that_keeps(e->parent);
    }
    return found;
}

static int check_size(const struct node *overlay, const struct node *n, struct error *err)
{
    const struct node *f = overlay->size_bytes == n->size_bytes ? NULL : filter_that_keeps(n);

    return f ? error_set(err, EBUSY, "Node '%s' keeps the disk as it was, and cannot be resized",
                         f->name)
             : 0;
}

static int check_overlay(const struct node *overlay, struct node *n, struct error *err)
{
    unsigned perm, shared;

    /* Who only writes (a mirror) does not mind that what is behind it changes. */
    node_cumulative_perm(overlay, &perm, &shared);
    if (perm & PERM_CONSISTENT_READ)
        return error_set(err, EBUSY, "The overlay is already in use");
    if (overlay->driver->is_filter)
        return error_set(err, EINVAL, "Filters cannot be used as overlays");
    if (overlay->backing)
        return error_set(err, EINVAL, "The overlay already has a backing image");
    if (!overlay->driver->supports_backing)
        return error_set(err, EINVAL, "The overlay does not support backing images");
    if (node_reaches(n, overlay))
        return error_set(err, EINVAL, "Making '%s' a backing child of '%s' would create a cycle",
                         n->name, overlay->name);
    return check_size(overlay, n, err);
}

/* A parent's size follows that of the node which it stands on now. */
static void follow_size(struct node *from, struct node *to)
{
    if (to->size_bytes != from->size_bytes)
        node_resized(to, from->size_bytes);
}

static void release_append(struct node_append *a)
{
    node_unref(a->overlay);
    node_unref(a->below);
    free(a->moved.items);
    free(a);
}

int node_append(struct node *overlay, struct node *n, struct node_append **ret, struct error *err)
{
    SHIELD();
    struct node *nodes[] = {overlay, n};
    struct graph *g = n->graph;
    GRAPH_LOCKED(g);
    int r = check_overlay(overlay, n, err);

    if (r < 0)
        return r;
    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    struct node_append *a = xnew(struct node_append);
    a->overlay = node_ref(overlay);
    a->below = node_ref(n);
    /* At once: what N's users need may be in the way only of an overlay that is not theirs. */
    struct edge *e = edge_new(overlay, NULL, n, "backing", ROLE_COW);
    r = choose_parents(n, overlay, false, &a->moved, err);
    if (r == 0)
        r = move_edges(&a->moved, n, overlay, false, err);
    if (r == 0) {
        edge_block_backing(overlay, n);
        json_add_string(overlay->options, "backing", n->name);
        follow_size(n, overlay);
        *ret = a;
    } else {
        edge_unlink(e);
        node_unref(n);
        release_append(a);
    }
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    return r;
}

void node_append_keep(struct node_append *a)
{
    release_append(a);
}

void node_append_undo(struct node_append *a)
{
    SHIELD();
    struct node *nodes[] = {a->overlay, a->below};
    struct graph *g = a->below->graph;
    GRAPH_LOCKED(g);
    struct error err = ERROR_INIT;
    struct edges back = {xcalloc(a->moved.n + 1, sizeof *back.items), 0};

    graph_quiesce_begin(g, nodes, ARRAY_SIZE(nodes));
    edge_detach(a->overlay->backing);
    json_object_object_del(a->overlay->options, "backing");
    /* The last to come is the first to go back, so that the order is what it was. One that could
     * not come back to the overlay from a filter stays there. */
    for (size_t i = a->moved.n; i--;)
        if (a->moved.items[i]->node == a->overlay && !BROKEN(users_stay_at_undone_overlay))
            back.items[back.n++] = a->moved.items[i];
    if (move_edges(&back, a->overlay, a->below, true, &err) < 0)
        log_error("node '%s' cannot be had again as it was: %s", a->below->name, err.text);
    follow_size(a->overlay, a->below);
    free(back.items);
    graph_quiesce_end(g, nodes, ARRAY_SIZE(nodes));
    release_append(a);
}
