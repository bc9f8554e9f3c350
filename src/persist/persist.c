/* See persist.h. */
#include "persist/persist.h"

#include "dirty/dirty.h"

struct persist {
    struct graph_hook hook;
    struct dirty_store store;
};

static int store_can_add(struct dirty_store *s, struct node *n, const char *name,
                         uint64_t granularity_bytes, struct error *err)
{
    return error_set_errno(err, ENOTSUP, "Can't store persistent bitmaps to %s", node_name(n));
}

static void hook_gone(struct graph_hook *h)
{
    free(container_of(h, struct persist, hook));
}

void persist_init(struct graph *g)
{
    struct persist *p = xnew(struct persist);

    p->hook.gone = hook_gone;
    p->store.can_add = store_can_add;
    graph_add_hook(g, &p->hook);
    dirty_set_store(g, &p->store);
}
