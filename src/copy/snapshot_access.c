/* The driver snapshot-access: shows the disk as it was when the copy-before-write filter below was
 * made. Read only by nature; a discard tells the filter what nobody wants any more.
 *
 * What it asks of the filter is no request to it, so it holds the filter as one would: a job's
 * filter goes with the job, and must not go while somebody reads through it. */
#include "block/driver.h"
#include "copy/cbw.h"
#include "copy/follow.h"

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
    struct node *filter = request_enter(n->file);
    int result = cbw_snapshot_read(filter, r, buf);
    request_leave(filter);
    return result;
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
    struct node *filter = request_enter(n->file);
    int result = cbw_snapshot_discard(filter, r);
    request_leave(filter);
    return result;
}

static int access_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct node *filter = request_enter(n->file);
    int result = cbw_snapshot_status(filter, want_zero, r, ret);
    request_leave(filter);
    return result;
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
    graph_add_driver(g, &mirror_top_driver);
}
