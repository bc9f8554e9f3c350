/* Edges: attaching and cutting them, and changing what stands where.
 *
 * Whatever moves an edge does it under graph_lock, with the node quiesced that the edge leaves, and
 * with the permissions of both sides worked out afterwards: if those cannot be had, the edges go
 * back and nothing has happened. */

#include "block/internal.h"

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

struct moved {
    struct edge *edge;
    struct node *from;
};

/* ALL: also edges that `stay`. */
static int move_parents(struct node *from, struct node *to, bool all, struct error *err)
{
    struct graph *g = from->graph;
    struct node *roots[] = {to, from};
    struct moved *moved = NULL;
    size_t n = 0, capacity = 0;
    struct edge *e, *next;
    int r = 0;

    TAILQ_FOREACH (e, &from->parents, in_parents)
        capacity++;
    moved = xcalloc(capacity + 1, sizeof *moved);

    for (e = TAILQ_FIRST(&from->parents); e; e = next) {
        next = TAILQ_NEXT(e, in_parents);
        /* An edge that TO itself stands on would become a loop. */
        if (e->parent && node_reaches(to, e->parent))
            continue;
        if (!all && e->stay)
            continue;
        if (e->frozen) {
            r = error_set(err, EPERM, "Cannot change '%s' link to '%s'", e->name, from->name);
            break;
        }
        moved[n++] = (struct moved){e, from};
    }
    if (r == 0) {
        for (size_t i = 0; i < n; i++) {
            node_ref(to);
            edge_move(moved[i].edge, to);
        }
        r = perm_refresh(g, roots, 2, err);
        if (r < 0) {
            /* In reverse, so that the parents' order is what it was. */
            for (size_t i = n; i--;) {
                edge_move(moved[i].edge, from);
                node_unref(to);
            }
        }
    }
    if (r == 0) {
        for (size_t i = 0; i < n; i++) {
            e = moved[i].edge;
            if (e->parent && e == e->parent->backing && e->parent->backing_blocker) {
                node_unblock_ops(from, e->parent->backing_blocker);
                node_block_ops(to, e->parent->backing_blocker);
            }
            if (e->user && e->user->ops->moved)
                e->user->ops->moved(e->user, e);
            node_unref(from); /* the caller holds one more */
        }
    }
    free(moved);
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
     * it keeps its edge, but has nobody any more who would need anything. */
    return move_quiesced(filter, e->node, true, err);
}

int node_replace(struct node *from, struct node *to, struct error *err)
{
    return move_quiesced(from, to, false, err);
}
