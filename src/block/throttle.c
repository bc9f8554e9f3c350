/* The driver throttle: a filter whose requests keep to the limits of a group (throttle_group.h).
 *
 * While the node is quiesced, or given up, its limits do not hold: whoever quiesces waits for what
 * is inside, and should not wait for minutes. */
#include "block/internal.h"
#include "block/throttle_group.h"

static int find_group(struct node *n, struct json_object *options, struct throttle_group **ret,
                      struct error *err)
{
    const char *name = json_get_string(options, "throttle-group", NULL);

    if (!name)
        return error_set(err, EINVAL, "Please specify a throttle group");
    *ret = throttle_group_find(n->graph, name);
    if (!*ret)
        return error_set(err, EINVAL, "Throttle group '%s' does not exist", name);
    return 0;
}

static int throttle_open(struct node *n, struct json_object *options, struct error *err)
{
    struct throttle_group *group;
    int r = node_open_child(n, options, "file", ROLE_FILTERED | ROLE_PRIMARY, true, &n->file, err);

    if (r == 0)
        r = find_group(n, options, &group, err);
    if (r < 0)
        return r;
    throttle_member_join(n->state, group);
    n->size_bytes = n->file->node->size_bytes;
    n->write_flags = REQ_WRITE_UNCHANGED | n->file->node->write_flags;
    n->write_zeroes_flags = REQ_WRITE_UNCHANGED | n->file->node->write_zeroes_flags;
    return 0;
}

static void throttle_close(struct node *n)
{
    throttle_member_leave(n->state);
}

static int throttle_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    throttle_member_admit(n->state, false, r.length, n->gate || n->cancelled);
    return edge_read(n->file, r, buf, flags);
}

static int throttle_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    throttle_member_admit(n->state, true, r.length, n->gate || n->cancelled);
    return edge_write(n->file, r, buf, flags);
}

static int throttle_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    throttle_member_admit(n->state, true, r.length, n->gate || n->cancelled);
    return edge_write_zeroes(n->file, r, flags);
}

static int throttle_discard(struct node *n, struct range r)
{
    throttle_member_admit(n->state, true, r.length, n->gate || n->cancelled);
    return edge_discard(n->file, r);
}

static void throttle_quiesced(struct node *n)
{
    throttle_member_release(n->state);
}

/* Another group; the node is quiesced. */
static int throttle_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                                   void **plan, struct error *err)
{
    struct throttle_group *group;
    int r = find_group(n, options, &group, err);

    (void)read_only;
    if (r == 0)
        *plan = group;
    return r;
}

static void throttle_reopen_commit(struct node *n, void *plan)
{
    struct throttle_member *m = n->state;

    if (m->group == plan)
        return;
    throttle_member_leave(m);
    throttle_member_join(m, plan);
}

static void throttle_reopen_abort(struct node *n, void *plan)
{
    (void)n;
    (void)plan;
}

static const char *const throttle_options[] = {"throttle-group", NULL};

const struct driver driver_throttle = {
    .name = "throttle",
    .state_size = sizeof(struct throttle_member),
    .is_filter = true,
    .strong_options = throttle_options,
    .known_options = throttle_options,
    .mutable_options = throttle_options,
    .open = throttle_open,
    .close = throttle_close,
    .read = throttle_read,
    .write = throttle_write,
    .write_zeroes = throttle_write_zeroes,
    .discard = throttle_discard,
    .quiesced = throttle_quiesced,
    .cancel = throttle_quiesced,
    .reopen_prepare = throttle_reopen_prepare,
    .reopen_commit = throttle_reopen_commit,
    .reopen_abort = throttle_reopen_abort,
};
