/* Permissions: who may do what with a node, so that two users do not spoil each other's work.
 *
 * Each edge says what its parent needs of the child (perm) and what it lets the others do
 * (shared). What a node needs of its children follows from what its parents need in sum, by the
 * driver's or the role's rule; so a change at an edge is worked out downwards, parents before
 * children. First everything is computed and the drivers are asked (the file driver takes
 * its locks there, and waits); if anybody refuses, the edges get their old values
 * back. Names and texts are QEMU's: clients match on them.
 *
 * One thing QEMU does not do: a node whose bitmaps record (node_set_watched) lets nobody else write
 * what it stands on, by another way through the graph or in another program; for a node that
 * stands on nothing, like `file`, its driver is told. Two raw nodes over parts of one disk are in
 * each other's way then, too: who wrote where is not asked. */

#include "block/internal.h"

#include "base/broken.h"

#include <stdio.h>

char *perm_names(unsigned perm)
{
    static const char *const names[] = {"consistent read", "write", "write unchanged", "resize"};
    char text[64] = "";

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (!(perm & (1u << i)))
            continue;
        if (text[0])
            strcat(text, ", ");
        strcat(text, names[i]);
    }
    return xstrdup(text);
}

void node_cumulative_perm(const struct node *n, unsigned *perm, unsigned *shared)
{
    const struct edge *e;

    *perm = 0;
    *shared = PERM_ALL;
    TAILQ_FOREACH (e, &n->parents, in_parents) {
        *perm |= e->perm;
        *shared &= e->shared;
    }
}

bool node_will_be_writable(const struct node *n)
{
    return n->reopening ? !n->reopening->read_only : !n->read_only;
}

/* ---- the rules by role ---- */

static void perm_of_backing(unsigned *perm, unsigned *shared)
{
    *perm &= PERM_CONSISTENT_READ;
    /* Whoever can live with changing data can live with a changing backing image. */
    *shared = *shared & PERM_WRITE ? PERM_WRITE | PERM_RESIZE : 0;
    *shared |= PERM_CONSISTENT_READ | PERM_WRITE_UNCHANGED;
}

static void perm_of_storage(const struct node *n, unsigned role, unsigned *perm, unsigned *shared)
{
    if (role & ROLE_METADATA) {
        /* A format touches its metadata also when no guest writes, and cannot have
         * anybody else write to it. */
        if (node_will_be_writable(n))
            *perm |= PERM_WRITE | PERM_RESIZE;
        *perm |= PERM_CONSISTENT_READ;
        *shared &= ~(unsigned)(PERM_WRITE | PERM_RESIZE);
    }
    if (role & ROLE_DATA) {
        *shared &= ~(unsigned)PERM_RESIZE;
        if (*perm & PERM_WRITE_UNCHANGED)
            *perm |= PERM_WRITE;
        if (*perm & PERM_WRITE)
            *perm |= PERM_RESIZE; /* a write may lie beyond the file's end */
    }
}

void node_default_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                             unsigned *need, unsigned *share)
{
    if (e->role & ROLE_COW)
        perm_of_backing(&perm, &shared);
    else if (!(e->role & ROLE_FILTERED)) /* a filter passes on what it is asked for */
        perm_of_storage(n, e->role, &perm, &shared);
    *need = perm;
    *share = shared;
}

/* What comes past a watched node would be in none of its bitmaps. */
static unsigned share_watched(const struct node *n, unsigned shared)
{
    bool alone = n->watched && node_will_be_writable(n) && !BROKEN(watched_child_shared);

    return alone ? shared & ~(unsigned)(PERM_WRITE | PERM_RESIZE) : shared;
}

static void child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                       unsigned *need, unsigned *share)
{
    if (n->driver->child_perm)
        n->driver->child_perm(n, e, perm, shared, need, share);
    else
        node_default_child_perm(n, e, perm, shared, need, share);
    if (!(e->role & ROLE_COW) && (e->role & (ROLE_PRIMARY | ROLE_FILTERED)))
        *share = share_watched(n, *share);
    if (e->node->force_share)
        *share = PERM_ALL;
}

/* ---- conflicts ---- */

char *perm_parent_name(const struct edge *e)
{
    if (e->parent)
        return xasprintf("node '%s'", e->parent->name);
    if (e->user && e->user->ops->describe)
        return e->user->ops->describe(e->user);
    return xstrdup("a block device");
}

static int check_conflicts(const struct node *n, struct error *err)
{
    const struct edge *a, *b;

    TAILQ_FOREACH (a, &n->parents, in_parents) {
        TAILQ_FOREACH (b, &n->parents, in_parents) {
            if (a == b || !(b->perm & ~a->shared))
                continue;

            CLEANUP(memory_freep) char *a_user = perm_parent_name(a);
            CLEANUP(memory_freep) char *b_user = perm_parent_name(b);
            CLEANUP(memory_freep) char *names = perm_names(b->perm & ~a->shared);
            return error_set(err, EPERM,
                             "Permission conflict on node '%s': permissions '%s' are both required "
                             "by %s (uses node '%s' as '%s' child) and unshared by %s (uses node "
                             "'%s' as '%s' child).",
                             n->name, names, b_user, n->name, b->name, a_user, n->name, a->name);
        }
    }
    return 0;
}

/* ---- working it out ---- */

static void collect(struct node *n, unsigned visit, struct perm_change *c)
{
    struct edge *e;
    struct node **nodes;

    if (n->visited == visit)
        return;
    n->visited = visit;
    /* The newest child first, so that of several conflicts the same one is reported as by QEMU. */
    TAILQ_FOREACH_REVERSE(e, &n->children, edge_list, in_children)
    collect(e->node, visit, c);
    nodes = realloc(c->nodes, (c->n_nodes + 1) * sizeof *nodes);
    if (!nodes)
        abort();
    c->nodes = nodes;
    c->nodes[c->n_nodes++] = n;
}

static void set_edge(struct perm_change *c, struct edge *e, unsigned perm, unsigned shared)
{
    if (e->perm == perm && e->shared == shared)
        return;
    if (c->n_undo == c->undo_capacity) {
        size_t capacity = c->undo_capacity ? 2 * c->undo_capacity : 16;
        struct perm_undo *undo = realloc(c->undo, capacity * sizeof *undo);
        if (!undo)
            abort();
        c->undo = undo;
        c->undo_capacity = capacity;
    }
    c->undo[c->n_undo++] = (struct perm_undo){e, e->perm, e->shared};
    e->perm = perm;
    e->shared = shared;
}

static int refresh_node(struct node *n, struct perm_change *c, struct error *err)
{
    unsigned perm, shared, need, share;
    struct edge *e;
    int r;

    r = check_conflicts(n, err);
    if (r < 0)
        return r;
    node_cumulative_perm(n, &perm, &shared);

    if (perm & (PERM_WRITE | PERM_WRITE_UNCHANGED)) {
        if (!node_will_be_writable(n)) {
            if (n->read_only)
                return error_set(err, EPERM, "Block node is read-only");
            return error_set(err, EPERM,
                             "Read-only block node '%s' cannot support read-write users", n->name);
        }
        /* The last block would have to be written beyond the end. */
        if (!(perm & PERM_RESIZE) && n->limits.request_alignment &&
            n->size_bytes % n->limits.request_alignment)
            return error_set(err, EPERM,
                             "Cannot get 'write' permission without 'resize': Image size is not a "
                             "multiple of request alignment");
    }
    if (n->driver->check_perm) {
        r = n->driver->check_perm(n, perm, share_watched(n, shared), err);
        if (r < 0)
            return r;
    }
    TAILQ_FOREACH (e, &n->children, in_children) {
        child_perm(n, e, perm, shared, &need, &share);
        set_edge(c, e, need, share);
    }
    return 0;
}

static void perm_change_fini(struct perm_change *c)
{
    free(c->nodes);
    free(c->undo);
    *c = (struct perm_change){0};
}

int perm_prepare(struct graph *g, struct node *const *roots, size_t n, struct perm_change *c,
                 struct error *err)
{
    unsigned visit = ++g->visit;

    *c = (struct perm_change){0};
    for (size_t i = 0; i < n; i++)
        collect(roots[i], visit, c);
    /* Children were collected before their parents. */
    for (size_t i = 0; i < c->n_nodes / 2; i++) {
        struct node *swap = c->nodes[i];
        c->nodes[i] = c->nodes[c->n_nodes - 1 - i];
        c->nodes[c->n_nodes - 1 - i] = swap;
    }
    for (; c->n_checked < c->n_nodes; c->n_checked++) {
        int r = refresh_node(c->nodes[c->n_checked], c, err);
        if (r < 0) {
            perm_abort(c);
            return r;
        }
    }
    return 0;
}

void perm_commit(struct perm_change *c)
{
    for (size_t i = 0; i < c->n_nodes; i++) {
        struct node *n = c->nodes[i];
        unsigned perm, shared;

        node_cumulative_perm(n, &perm, &shared);
        if (n->driver->commit_perm)
            n->driver->commit_perm(n, perm, share_watched(n, shared));
    }
    perm_change_fini(c);
}

void perm_abort(struct perm_change *c)
{
    while (c->n_undo) {
        struct perm_undo *u = &c->undo[--c->n_undo];
        u->edge->perm = u->perm;
        u->edge->shared = u->shared;
    }
    while (c->n_checked) {
        struct node *n = c->nodes[--c->n_checked];
        if (n->driver->abort_perm)
            n->driver->abort_perm(n);
    }
    perm_change_fini(c);
}

int perm_refresh(struct graph *g, struct node *const *roots, size_t n, struct error *err)
{
    struct perm_change change;
    int r = perm_prepare(g, roots, n, &change, err);

    if (r == 0)
        perm_commit(&change);
    return r;
}

bool node_watched(const struct node *n)
{
    return n->watched;
}

int node_set_watched(struct node *n, bool watched, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(n->graph);

    if (n->watched == watched || n->closing)
        return 0;
    n->watched = watched;
    int r = perm_refresh(n->graph, &n, 1, err);
    if (r < 0 && watched)
        n->watched = false;
    return watched ? r : 0; /* that others could not follow is no reason to stay */
}

int edge_set_perm(struct edge *e, unsigned perm, unsigned shared, struct error *err)
{
    SHIELD();
    GRAPH_LOCKED(e->node->graph);
    unsigned old_perm = e->perm, old_shared = e->shared;
    bool tighter = (perm & ~old_perm) || (old_shared & ~shared);

    e->perm = perm;
    e->shared = shared;
    int r = perm_refresh(e->node->graph, &e->node, 1, tighter ? err : NULL);
    if (r < 0) {
        e->perm = old_perm;
        e->shared = old_shared;
        /* Who gives something back is not told that others could not follow. */
        return tighter ? r : 0;
    }
    return 0;
}
