/* The filter copy-before-write: saves what is about to be overwritten.
 *
 *     guest write --> copy_hold: old chunks to the target --> readers of the old state done?
 *                                                                  |
 *                                         the write goes to `file` <-
 *
 * What the disk held at the instant is read through snapshot-access: from the target where a
 * guest write has been held (`held`), from `file` elsewhere. A reader of `file` keeps its range
 * against the guest write that comes after the save, so that he never reads what is newer.
 *
 * When saving fails, on-cbw-error decides who suffers: the guest's write (it fails, the
 * snapshot stays whole), or the snapshot (it is broken for good, guests notice nothing). */
#include "copy/cbw.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "dirty/dirty.h"
#include "rt/clock.h"
#include "rt/sync.h"
#include "rt/task.h"

struct cbw {
    struct edge *target;
    struct copy *copy;
    struct dirty_bitmap *readable; /* what snapshot-access may read */
    struct dirty_bitmap *held;     /* chunks for which guest writes have been held */
    struct rangelock readers;      /* of `file`, shared; writers pass exclusively */
    bool break_snapshot;
    uint64_t timeout_ns; /* 0: none */
    int broken;          /* the snapshot's first failure, negative errno */
    bool idle;           /* saves nothing any more */
    bool given_up;       /* a save that fails is no reason to refuse a guest's write */
    struct scope late;   /* saves that outlived their timeout */
};

/* ---- saving ---- */

struct save {
    struct copy *copy;
    struct range range;
    struct event done;
    int result;
    bool abandoned;
};

static int save_task(void *arg)
{
    struct save *s = arg;
    SHIELD();
    s->result = copy_hold(s->copy, s->range);
    if (s->abandoned)
        free(s);
    else
        event_set(&s->done);
    return 0;
}

static int save_until(struct cbw *st, struct range r, uint64_t deadline_ns)
{
    struct save *s = xnew(struct save);
    *s = (struct save){.copy = st->copy, .range = r};
    event_init(&s->done);
    scope_spawn(&st->late, save_task, s);
    int ret = event_wait_until(&s->done, deadline_ns);
    if (ret < 0) {
        s->abandoned = true; /* it goes on; close waits for it */
        return ret;
    }
    ret = s->result;
    free(s);
    return ret;
}

/* 0: the write may go on. */
static int save_before(struct node *n, struct range r, unsigned flags)
{
    struct cbw *st = n->state;
    if ((flags & REQ_WRITE_UNCHANGED) || st->broken || st->idle || BROKEN(cbw_without_wait))
        return 0;

    SHIELD();
    int ret;
    if (st->timeout_ns)
        ret = save_until(st, r, clock_after_ns(st->timeout_ns));
    else
        ret = copy_hold(st->copy, r);
    if (ret < 0 && !st->break_snapshot && !st->given_up)
        return ret;

    r = range_round_out(r, copy_chunk_bytes(st->copy));
    if (ret == 0)
        bitmap_mark(dirty_bits(st->held), r);
    else if (!st->broken)
        st->broken = ret;

    RANGE_HOLDER(passing);
    ret = rangelock_take(&st->readers, &passing, r, RANGE_EXCLUSIVE);
    assert(ret == 0);
    return 0;
}

/* ---- the driver ---- */

static int parse_options(struct node *n, struct cbw *st, struct json_object *options,
                         struct dirty_bitmap **bitmap, struct error *err)
{
    const char *on_error = json_get_string(options, "on-cbw-error", "break-guest-write");
    if (strcmp(on_error, "break-snapshot") == 0)
        st->break_snapshot = true;
    else if (strcmp(on_error, "break-guest-write") != 0)
        return error_set(err, EINVAL, "Parameter 'on-cbw-error' does not accept value '%s'",
                         on_error);
    uint64_t seconds = json_get_uint(options, "cbw-timeout", 0);
    if (seconds > UINT32_MAX)
        return error_set(err, EINVAL, "Parameter 'cbw-timeout' expects uint32_t");
    st->timeout_ns = seconds * NSEC_PER_SEC;

    struct json_object *ref = json_get(options, "bitmap");
    if (ref) {
        struct node *unused;
        return dirty_lookup(n->graph, json_get_string(ref, "node", ""),
                            json_get_string(ref, "name", ""), &unused, bitmap, err);
    }
    return 0;
}

static int cbw_open(struct node *n, struct json_object *options, struct error *err)
{
    struct cbw *st = n->state;
    struct dirty_bitmap *bitmap = NULL;
    struct edge *file;

    int r = node_open_child(n, options, "file", ROLE_FILTERED | ROLE_PRIMARY, true, &file, err);
    if (r < 0)
        return r;
    r = node_open_child(n, options, "target", ROLE_DATA, true, &st->target, err);
    if (r < 0)
        return r;
    r = parse_options(n, st, options, &bitmap, err);
    if (r < 0)
        return r;

    n->size_bytes = node_size(file->node);
    n->write_flags = REQ_WRITE_UNCHANGED | (REQ_FUA & file->node->write_flags);
    n->write_zeroes_flags = REQ_WRITE_UNCHANGED | ((REQ_FUA | REQ_MAY_UNMAP | REQ_NO_FALLBACK) &
                                                   file->node->write_zeroes_flags);

    /* A bitmap that cannot be trusted, or that a job has, says nothing about now. */
    if (bitmap && dirty_check(bitmap, DIRTY_CHECK_ALLOW_READONLY, err) < 0)
        return error_wrap(err,
                          "Cannot create block-copy-state: Failed to merge bitmap '%s' to internal "
                          "copy-bitmap",
                          dirty_name(bitmap));
    if (bitmap && bitmap_size(dirty_bits(bitmap)) != n->size_bytes)
        return error_set(err, EINVAL,
                         "Cannot create block-copy-state: Failed to merge bitmap '%s' to internal "
                         "copy-bitmap: Bitmaps are of different sizes (destination size is %llu "
                         "and source size is %llu) and can't be merged",
                         dirty_name(bitmap), (unsigned long long)n->size_bytes,
                         (unsigned long long)bitmap_size(dirty_bits(bitmap)));

    r = copy_new(file, st->target, bitmap ? dirty_bits(bitmap) : NULL, &st->copy, err);
    if (r < 0)
        return error_wrap(err, "Cannot create block-copy-state");
    uint64_t chunk = copy_chunk_bytes(st->copy);
    r = dirty_add(n, NULL, chunk, DIRTY_DISABLED, &st->held, err);
    if (r == 0)
        r = dirty_add(n, NULL, chunk, DIRTY_DISABLED, &st->readable, err);
    if (r < 0) {
        if (st->held)
            dirty_release(st->held);
        copy_free(st->copy);
        return r;
    }
    bitmap_merge(dirty_bits(st->readable), copy_remaining(st->copy));
    rangelock_init(&st->readers);
    scope_init(&st->late);
    return 0;
}

static void cbw_close(struct node *n)
{
    struct cbw *st = n->state;
    scope_fini(&st->late);
    /* Our two bitmaps go with the node's list. */
    copy_free(st->copy);
}

static int cbw_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    return edge_read(n->file, r, buf, flags);
}

static int cbw_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    int ret = save_before(n, r, flags);
    return ret < 0 ? ret : edge_write(n->file, r, buf, flags);
}

static int cbw_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    int ret = save_before(n, r, flags);
    return ret < 0 ? ret : edge_write_zeroes(n->file, r, flags);
}

static int cbw_discard(struct node *n, struct range r)
{
    int ret = save_before(n, r, 0);
    return ret < 0 ? ret : edge_discard(n->file, r);
}

/* What is cut off could not be saved any more, and the target has one size only. */
static int cbw_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct cbw *st = n->state;
    if (!st->idle && !st->broken && size_bytes != n->size_bytes)
        return error_set(err, EBUSY, "Node '%s' keeps the disk as it was, and cannot be resized",
                         n->name);
    return edge_truncate(n->file, size_bytes, exact, err);
}

static void cbw_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                           unsigned *need, unsigned *share)
{
    if (!(e->role & ROLE_FILTERED)) {
        /* The target. Guests may write to the disk even where it is the target's backing
         * image; its size was compared once. */
        *need = PERM_WRITE;
        *share = PERM_ALL & ~PERM_RESIZE;
        return;
    }
    node_default_child_perm(n, e, perm, shared, need, share);
    if (!TAILQ_EMPTY(&n->parents)) {
        if (perm & PERM_WRITE)
            *need |= PERM_CONSISTENT_READ;
        *share &= ~(PERM_WRITE | PERM_RESIZE); /* who writes, writes through us */
    }
}

/* ---- the old state ---- */

static struct cbw *snapshot_of(struct node *n)
{
    return n->driver == &cbw_driver ? n->state : NULL;
}

/* Says where the first part of R is to be read, cuts R to it, and holds R when it is `file`. */
static int snapshot_lock(struct node *n, struct range *r, struct range_holder *held,
                         struct edge **from)
{
    struct cbw *st = n->state;
    for (;;) {
        uint64_t clean, length;
        if (st->broken || range_end(*r) > n->size_bytes)
            return -EACCES;
        if (bitmap_next_clean(dirty_bits(st->readable), r->start, &clean) && clean < range_end(*r))
            return -EACCES;
        bool saved = bitmap_status(dirty_bits(st->held), r->start, r->length, &length);
        r->length = min_u64(r->length, length);
        if (saved) {
            /* What a backup of a part did not want, and a guest has overwritten, is nowhere. */
            if (bitmap_next_clean(copy_saved(st->copy), r->start, &clean) && clean < range_end(*r))
                return -EACCES;
            rangelock_release(held);
            *from = st->target;
            return 0;
        }
        if (held->lock) {
            *from = n->file;
            return 0;
        }
        /* A writer that was before us may have saved it meanwhile: look again. */
        int ret = rangelock_take(&st->readers, held, *r, RANGE_SHARED);
        if (ret < 0)
            return ret;
    }
}

int cbw_snapshot_read(struct node *n, struct range r, void *buf)
{
    if (!snapshot_of(n))
        return -ENOTSUP;
    uint8_t *to = buf;
    while (!range_empty(r)) {
        RANGE_HOLDER(held);
        struct range part = r;
        struct edge *from = NULL;
        int ret = snapshot_lock(n, &part, &held, &from);
        if (ret == 0)
            ret = edge_read(from, part, to, 0);
        if (ret < 0)
            return ret;
        to += part.length;
        r = range_between(range_end(part), range_end(r));
    }
    return 0;
}

int cbw_snapshot_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    if (!snapshot_of(n))
        return -ENOTSUP;
    RANGE_HOLDER(held);
    struct edge *from = NULL;
    int result = snapshot_lock(n, &r, &held, &from);
    if (result < 0)
        return result;
    result = edge_status_above(from, NULL, want_zero, r, ret);
    if (result == 0) {
        ret->flags |= STATUS_ALLOCATED;
        ret->depth = 0;
    }
    return result;
}

int cbw_snapshot_discard(struct node *n, struct range r)
{
    struct cbw *st = snapshot_of(n);
    if (!st)
        return -ENOTSUP;
    bitmap_clear(dirty_bits(st->readable), r);
    copy_drop(st->copy, r);
    return edge_discard(st->target, r);
}

/* ---- for the backup job ---- */

int cbw_insert(struct node *source, struct node *target, const char *name, struct node **filter,
               struct error *err)
{
    struct graph *g = source->graph;
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    CLEANUP(node_unrefp) struct node *n = NULL;

    json_add_string(options, "driver", cbw_driver.name);
    if (name)
        json_add_string(options, "node-name", name);
    json_add_string(options, "file", node_name(source));
    json_add_string(options, "target", node_name(target));
    json_add_string(options, "discard", "unmap"); /* the source decides */
    int r = graph_open(g, options, &n, err);
    if (r < 0)
        return error_wrap(err, "Could not create node");

    /* Guests must not come in before the instant: the source's gate would hold them inside. */
    graph_quiesce_begin(g, &n, 1);
    r = node_insert_filter(n, source, err);
    if (r < 0) {
        graph_quiesce_end(g, &n, 1);
        return r;
    }
    *filter = steal(n);
    return 0;
}

void cbw_remove(struct node *filter)
{
    struct cbw *st = filter->state;
    struct error err = ERROR_INIT;

    st->idle = true;
    if (node_remove_filter(filter, &err) < 0) {
        /* It stays, and lets everything through. */
        log_warning("the filter '%s' cannot be removed: %s", node_name(filter), err.text);
        return;
    }
    node_unref(filter);
}

struct copy *cbw_copy(struct node *filter)
{
    struct cbw *st = snapshot_of(filter);
    return st ? st->copy : NULL;
}

struct node_cancel *cbw_give_up(struct node *filter)
{
    struct cbw *st = filter->state;
    st->given_up = true;
    return node_cancel_begin(st->target->node);
}

int cbw_flush_target(struct node *filter)
{
    struct cbw *st = filter->state;
    return edge_flush(st->target);
}

int cbw_flush_source(struct node *filter)
{
    return edge_flush(filter->file);
}

const struct driver cbw_driver = {
    .name = "copy-before-write",
    .state_size = sizeof(struct cbw),
    .is_filter = true,
    .child_stays = true, /* what remains is a bitmap of the child */
    .named_as_file = true,
    .flushes_primary_only = true, /* a slow target is not in a guest's way */
    .known_options = (const char *const[]){"bitmap", "on-cbw-error", "cbw-timeout", NULL},
    .open = cbw_open,
    .close = cbw_close,
    .read = cbw_read,
    .write = cbw_write,
    .write_zeroes = cbw_write_zeroes,
    .discard = cbw_discard,
    .truncate = cbw_truncate,
    .child_perm = cbw_child_perm,
};
