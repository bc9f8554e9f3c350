/* The filter mirror_top: stands above the source of a mirror job, so that users come through it
 * and can be moved to the target. In copy mode write-blocking a guest's write goes to both disks
 * before it is answered; if the target refuses, the guest notices nothing, and the job copies
 * that part later (or ends). */
#include "copy/follow.h"

#include "base/log.h"
#include "block/driver.h"

struct mirror_top {
    struct follow *follow; /* lent; NULL: nobody listens */
    bool stopped;          /* no request comes any more */
};

static int mirror_top_open(struct node *n, struct json_object *options, struct error *err)
{
    const char *name = json_get_string(options, "source", "");
    struct node *source = graph_find(n->graph, name);
    if (!source)
        return error_set(err, ENOENT, "Cannot find device='' nor node-name='%s'", name);
    json_object_object_del(options, "source");
    int r = node_attach_child(n, source, "backing", ROLE_FILTERED | ROLE_PRIMARY, NULL, err);
    if (r < 0)
        return r;
    n->size_bytes = node_size(source);
    n->write_flags = REQ_WRITE_UNCHANGED | (REQ_FUA & source->write_flags);
    n->write_zeroes_flags = REQ_WRITE_UNCHANGED | ((REQ_FUA | REQ_MAY_UNMAP | REQ_NO_FALLBACK) &
                                                   source->write_zeroes_flags);
    return 0;
}

static int mirror_top_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    return edge_read(n->file, r, buf, flags);
}

static int mirror_top_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    struct follow *f = ((struct mirror_top *)n->state)->follow;
    if (!f || !follow_wants(f, r, flags))
        return edge_write(n->file, r, buf, flags);

    struct follow_write w;
    follow_write_begin(f, &w, r);
    int ret = edge_write(n->file, r, buf, flags);
    follow_write_end(f, &w, ret, buf, flags);
    return ret;
}

static int mirror_top_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct follow *f = ((struct mirror_top *)n->state)->follow;
    if (!f || !follow_wants(f, r, flags))
        return edge_write_zeroes(n->file, r, flags);

    struct follow_write w;
    follow_write_begin(f, &w, r);
    int ret = edge_write_zeroes(n->file, r, flags);
    follow_write_end(f, &w, ret, NULL, flags);
    return ret;
}

/* What a discard leaves is the source's affair: it is marked, and what is there then is copied. */
static int mirror_top_discard(struct node *n, struct range r)
{
    return edge_discard(n->file, r);
}

static void mirror_top_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                                  unsigned *need, unsigned *share)
{
    node_default_child_perm(n, e, perm, shared, need, share);
    if (((struct mirror_top *)n->state)->stopped) {
        *need = 0;
        *share = PERM_ALL;
    }
}

int mirror_top_insert(struct node *source, const char *name, struct node **filter,
                      struct error *err)
{
    struct graph *g = source->graph;
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    CLEANUP(node_unrefp) struct node *n = NULL;

    json_add_string(options, "driver", mirror_top_driver.name);
    if (name)
        json_add_string(options, "node-name", name);
    json_add_string(options, "source", node_name(source));
    json_add_string(options, "discard", "unmap"); /* the source decides */
    if (node_read_only(source))
        json_add_bool(options, "read-only", true);
    int r = graph_open(g, options, &n, err);
    if (r < 0)
        return r;
    n->implicit = !name;

    graph_quiesce_begin(g, &n, 1);
    r = node_insert_filter(n, source, err);
    if (r < 0) {
        graph_quiesce_end(g, &n, 1);
        return r;
    }
    *filter = steal(n);
    return 0;
}

struct edge *mirror_top_source(struct node *filter)
{
    return filter->file;
}

void mirror_top_set_follow(struct node *filter, struct follow *f)
{
    struct mirror_top *st = filter->state;
    st->follow = f;
}

void mirror_top_stop(struct node *filter)
{
    struct mirror_top *st = filter->state;
    st->stopped = true;
}

void mirror_top_remove(struct node *filter)
{
    struct error err = ERROR_INIT;
    if (node_remove_filter(filter, &err) < 0) {
        /* It stays, and lets everything through. */
        log_warning("the filter '%s' cannot be removed: %s", node_name(filter), err.text);
        return;
    }
    node_unref(filter);
}

const struct driver mirror_top_driver = {
    .name = "mirror_top",
    .state_size = sizeof(struct mirror_top),
    .is_filter = true,
    .comes_and_goes = true,
    .named_as_file = true,
    .known_options = (const char *const[]){"source", NULL},
    .open = mirror_top_open,
    .read = mirror_top_read,
    .write = mirror_top_write,
    .write_zeroes = mirror_top_write_zeroes,
    .discard = mirror_top_discard,
    .child_perm = mirror_top_child_perm,
};
