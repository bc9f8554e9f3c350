/* The raw driver: a guest's disk is the file, or the part of it from `offset`, `size` long.
 *
 * When the format was guessed, the guest could write a header that makes the next guess another:
 * so writes to the first sector are refused if they would be taken for another format. */

#include "block/internal.h"

struct raw_state {
    uint64_t offset, size;
    bool has_size;
};

static int raw_apply(struct raw_state *s, struct json_object *options, uint64_t file_size,
                     struct error *err)
{
    uint64_t offset = json_get_uint(options, "offset", 0);
    bool has_size = json_has(options, "size");
    uint64_t size = json_get_uint(options, "size", 0);

    if (option_check_size(options, "offset", err) < 0 ||
        option_check_size(options, "size", err) < 0)
        return -EINVAL;
    if (offset > file_size)
        return error_set(err, EINVAL,
                         "Offset (%llu) cannot be greater than size of the containing file (%lld)",
                         (unsigned long long)offset, (long long)file_size);
    if (has_size && file_size - offset < size)
        return error_set(err, EINVAL,
                         "The sum of offset (%llu) and size (%llu) has to be smaller or equal to "
                         "the  actual size of the containing file (%lld)",
                         (unsigned long long)offset, (unsigned long long)size,
                         (long long)file_size);
    if (has_size && size % BLOCK_SECTOR)
        return error_set(err, EINVAL, "Specified size is not multiple of 512");
    *s = (struct raw_state){offset, has_size ? size : file_size - offset, has_size};
    return 0;
}

static int raw_open(struct node *n, struct json_object *options, struct error *err)
{
    struct raw_state *s = n->state;
    bool part = json_get_uint(options, "offset", 0) || json_has(options, "size");
    int r = node_open_child(n, options, "file", ROLE_PRIMARY | (part ? ROLE_DATA : ROLE_FILTERED),
                            true, &n->file, err);

    if (r < 0)
        return r;
    r = raw_apply(s, options, n->file->node->size_bytes, err);
    if (r < 0)
        return r;
    n->size_bytes = s->size;
    n->write_flags = REQ_WRITE_UNCHANGED | (n->file->node->write_flags & REQ_FUA);
    n->write_zeroes_flags = REQ_WRITE_UNCHANGED | (n->file->node->write_zeroes_flags &
                                                   (REQ_FUA | REQ_MAY_UNMAP | REQ_NO_FALLBACK));
    if (n->probed)
        n->limits.request_alignment = BLOCK_SECTOR;
    return 0;
}

static int adjust(const struct raw_state *s, struct range *r, bool write)
{
    if (s->has_size && !range_fits(r->start, r->length, s->size))
        return write ? -ENOSPC : -EINVAL;
    if (range_end(*r) > SIZE_BYTES_MAX - s->offset)
        return -EINVAL;
    r->start += s->offset;
    return 0;
}

static int raw_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    int result = adjust(n->state, &r, false);

    node_debug_event(n->file->node, DEBUG_read_aio);
    return result < 0 ? result : edge_read(n->file, r, buf, flags);
}

/* Would these first bytes make another driver of it? */
static bool looks_raw(struct node *n, const void *buf)
{
    const struct graph *g = n->graph;

    for (size_t i = 0; i < g->n_drivers; i++) {
        const struct driver *d = g->drivers[i];
        if (d != n->driver && d->probe && d->probe(buf, PROBE_BYTES) > 1)
            return false;
    }
    return true;
}

static int raw_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    int result;

    if (n->probed && r.start == 0 && r.length >= PROBE_BYTES && !looks_raw(n, buf))
        return -EPERM;
    result = adjust(n->state, &r, true);
    node_debug_event(n->file->node, DEBUG_write_aio);
    return result < 0 ? result : edge_write(n->file, r, buf, flags);
}

static int raw_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    int result = adjust(n->state, &r, true);

    return result < 0 ? result : edge_write_zeroes(n->file, r, flags);
}

static int raw_discard(struct node *n, struct range r)
{
    int result = adjust(n->state, &r, true);

    return result < 0 ? result : edge_discard(n->file, r);
}

static int raw_prefetch(struct node *n, struct range r)
{
    int result = adjust(n->state, &r, false);

    return result < 0 ? result : edge_read(n->file, r, NULL, REQ_PREFETCH);
}

static int raw_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    const struct raw_state *s = n->state;

    (void)want_zero;
    ret->flags = STATUS_RAW | STATUS_OFFSET_VALID;
    ret->length = r.length;
    ret->map = r.start + s->offset;
    ret->file = n->file->node;
    return 0;
}

static int raw_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct raw_state *s = n->state;
    int r;

    if (s->has_size)
        return error_set(err, ENOTSUP, "Cannot resize fixed-size raw disks");
    if (SIZE_BYTES_MAX - size_bytes < s->offset)
        return error_set(err, EINVAL, "Disk size too large for the chosen offset");
    r = edge_truncate(n->file, size_bytes + s->offset, exact, err);
    if (r == 0)
        s->size = size_bytes;
    return r;
}

static uint64_t raw_measure_length(struct node *n)
{
    struct raw_state *s = n->state;
    uint64_t length = n->file->node->size_bytes;

    length = length > s->offset ? length - s->offset : 0;
    s->size = s->has_size ? min_u64(s->size, length) : length;
    return s->size;
}

/* The default takes WRITE and RESIZE as a format does that has metadata; raw has none. */
static void raw_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                           unsigned *need, unsigned *share)
{
    node_default_child_perm(n, e, perm, shared, need, share);
    *need &= ~(unsigned)(PERM_WRITE | PERM_RESIZE);
    *need |= perm & (PERM_WRITE | PERM_RESIZE);
}

/* Cannot E have the disk moved under it? A node above that counts on the size (a copy-before-write
 * filter with a snapshot to keep, a format) cannot; nor who lets nobody else write, as a job its
 * target: what it has written, or compared, is to stay where it is. Others, as exports and a job
 * of its source, are told. */
static bool counts_on_place(const struct edge *e)
{
    return !(e->shared & PERM_RESIZE) && (e->parent || !(e->shared & PERM_WRITE));
}

static int check_may_move(const struct node *n, const struct raw_state *to, struct error *err)
{
    const struct raw_state *s = n->state;
    const struct edge *e;

    if (to->offset == s->offset && to->size == s->size)
        return 0;
    TAILQ_FOREACH (e, &n->parents, in_parents) {
        if (!counts_on_place(e))
            continue;
        CLEANUP(memory_freep) char *user = perm_parent_name(e);
        return error_set(err, EPERM, "Node '%s' may not be resized: %s uses it", n->name, user);
    }
    return 0;
}

static int raw_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                              void **plan, struct error *err)
{
    struct raw_state *s = xnew(struct raw_state);
    int r = raw_apply(s, options, n->file->node->size_bytes, err);

    (void)read_only;
    if (r == 0)
        r = check_may_move(n, s, err);
    if (r < 0) {
        free(s);
        return r;
    }
    *plan = s;
    return 0;
}

/* With another offset each byte of the disk is another: as if all had been written. */
static void raw_reopen_commit(struct node *n, void *plan)
{
    struct raw_state *s = n->state, *to = plan;

    bool moved = to->offset != s->offset;

    *s = *to;
    free(to);
    if (moved)
        node_content_replaced(n);
}

static void raw_reopen_abort(struct node *n, void *plan)
{
    (void)n;
    free(plan);
}

uint64_t raw_offset(const struct node *n)
{
    const struct raw_state *s = n->driver == &driver_raw ? n->state : NULL;

    return s ? s->offset : 0;
}

static uint64_t raw_cluster_size(const struct node *n)
{
    return node_cluster_size(n->file->node);
}

static int raw_probe(const uint8_t *buf, size_t n)
{
    (void)buf;
    (void)n;
    return 1; /* when nobody else wants it */
}

static const char *const raw_options[] = {"offset", "size", NULL};

const struct driver driver_raw = {
    .name = "raw",
    .state_size = sizeof(struct raw_state),
    .is_format = true,
    .probe = raw_probe,
    .strong_options = raw_options,
    .known_options = raw_options,
    .mutable_options = raw_options,
    .open = raw_open,
    .read = raw_read,
    .write = raw_write,
    .write_zeroes = raw_write_zeroes,
    .discard = raw_discard,
    .prefetch = raw_prefetch,
    .status = raw_status,
    .truncate = raw_truncate,
    .measure_length = raw_measure_length,
    .child_perm = raw_child_perm,
    .reopen_prepare = raw_reopen_prepare,
    .reopen_commit = raw_reopen_commit,
    .reopen_abort = raw_reopen_abort,
    .cluster_size = raw_cluster_size,
};
