/* See persist.h. */
#include "persist/persist.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/bitmaps.h"
#include "dirty/dirty.h"
#include "persist/qcow2_bitmaps.h"

struct persist {
    struct graph_hook hook;
    struct dirty_store store;
};

static int store_can_add(struct dirty_store *s, struct node *n, const char *name,
                         uint64_t granularity_bytes, struct error *err)
{
    if (node_is_qcow2(n))
        return qcow2_persist_can_add(n, name, granularity_bytes, err);
    return error_set_errno(err, ENOTSUP, "Can't store persistent bitmaps to %s", node_name(n));
}

static int store_remove(struct dirty_store *s, struct node *n, const char *name, struct error *err)
{
    return node_is_qcow2(n) ? qcow2_bitmap_remove(n, name, err) : 0;
}

static int hook_opened(struct graph_hook *h, struct node *n, struct error *err)
{
    return node_is_qcow2(n) ? qcow2_persist_load(n, err) : 0;
}

static void hook_closing(struct graph_hook *h, struct node *n)
{
    struct error err = ERROR_INIT;
    if (node_is_qcow2(n) && !node_read_only(n) && qcow2_persist_save(n, &err) < 0)
        log_error("node '%s': its persistent bitmaps could not be stored: %s", node_name(n),
                  err.text);
}

static int hook_reopening(struct graph_hook *h, struct node *n, bool to_read_only,
                          struct error *err)
{
    if (!node_is_qcow2(n))
        return 0;
    return to_read_only ? qcow2_persist_save(n, err) : qcow2_persist_use(n, err);
}

static void hook_gone(struct graph_hook *h)
{
    free(container_of(h, struct persist, hook));
}

void persist_init(struct graph *g)
{
    struct persist *p = xnew(struct persist);

    p->hook.gone = hook_gone;
    p->hook.opened = hook_opened;
    p->hook.closing = hook_closing;
    p->hook.reopening = hook_reopening;
    p->store.can_add = store_can_add;
    p->store.remove = store_remove;
    graph_add_hook(g, &p->hook);
    dirty_set_store(g, &p->store);
}
