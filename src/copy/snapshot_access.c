/* The driver snapshot-access: shows the disk as it was when the copy-before-write filter below was
 * made. Read only by nature; a discard tells the filter what nobody wants any more. */
#include "block/driver.h"
#include "copy/cbw.h"

static int access_open(struct node *n, struct json_object *options, struct error *err)
{
    struct edge *file;
    int r = node_open_child(n, options, "file", ROLE_DATA | ROLE_PRIMARY, true, &file, err);
    if (r < 0)
        return r;
    n->size_bytes = node_size(file->node);
    return 0;
}

static int access_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    return cbw_snapshot_read(n->file->node, r, buf);
}

static int access_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    return -ENOTSUP;
}

static int access_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    return -ENOTSUP;
}

static int access_discard(struct node *n, struct range r)
{
    return cbw_snapshot_discard(n->file->node, r);
}

static int access_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    return cbw_snapshot_status(n->file->node, want_zero, r, ret);
}

/* The filter's own permissions serve us. */
static void access_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                              unsigned *need, unsigned *share)
{
    *need = 0;
    *share = PERM_ALL;
}

const struct driver snapshot_access_driver = {
    .name = "snapshot-access",
    .known_options = (const char *const[]){NULL},
    .named_as_file = true,
    .open = access_open,
    .read = access_read,
    .write = access_write,
    .write_zeroes = access_write_zeroes,
    .discard = access_discard,
    .status = access_status,
    .child_perm = access_child_perm,
};

void copy_register_drivers(struct graph *g)
{
    graph_add_driver(g, &cbw_driver);
    graph_add_driver(g, &snapshot_access_driver);
}
