/* The driver blkdebug: a filter that fails or delays requests by rules, and forces limits on those
 * who use it.
 *
 *     request --> rules (blkdebug_rules.h): wait? fail? --> image
 *
 * A request that fails has not reached the image. Events come from the node above (a format names
 * what it is about to do with its file) and from the requests themselves (request.c). */

#include "block/blkdebug_rules.h"
#include "block/internal.h"

#include "rt/clock.h"
#include "rt/sync.h"

#include <limits.h>

struct blkdebug {
    struct debug_rules rules;
    unsigned take, unshare; /* PERM_*, of the image */
    struct event cut;       /* ends the delays of requests, which then fail */
};

/* ---- opening ---- */

static const char *const size_options[] = {"align",          "max-transfer", "opt-write-zero",
                                           "max-write-zero", "opt-discard",  "max-discard"};

static int parse_perms(struct json_object *options, const char *name, unsigned *ret,
                       struct error *err)
{
    static const char *const names[] = {"consistent-read", "write", "write-unchanged", "resize"};
    struct json_object *list = json_get(options, name);

    for (size_t i = 0;
         list && json_object_is_type(list, json_type_array) && i < json_object_array_length(list);
         i++) {
        const char *perm = json_object_get_string(json_object_array_get_idx(list, i));
        size_t bit = 0;
        while (bit < ARRAY_SIZE(names) && strcmp(names[bit], perm ? perm : ""))
            bit++;
        if (bit == ARRAY_SIZE(names))
            return error_set(err, EINVAL, "Parameter '%s' does not accept value '%s'", name,
                             perm ? perm : "null");
        *ret |= 1u << bit;
    }
    return 0;
}

/* An empty list of rules is nothing that QEMU's options could say. */
static int refuse_empty_lists(struct json_object *options, struct error *err)
{
    static const char *const lists[] = {"inject-error", "set-state", "take-child-perms",
                                        "unshare-child-perms"};

    for (size_t i = 0; i < ARRAY_SIZE(lists); i++) {
        struct json_object *list = json_get(options, lists[i]);
        if (list && json_object_is_type(list, json_type_array) && !json_object_array_length(list))
            return error_set(err, EINVAL,
                             "Block protocol 'blkdebug' doesn't support the option '%s'", lists[i]);
    }
    return 0;
}

static int take_limit(struct json_object *options, const char *name, uint64_t multiple_of,
                      uint64_t *ret, struct error *err)
{
    uint64_t value = json_get_uint(options, name, 0);

    if (value && (value >= INT_MAX || value % multiple_of))
        return error_set(err, EINVAL, "Cannot meet constraints with %s %llu", name,
                         (unsigned long long)value);
    *ret = value;
    return 0;
}

static int take_limits(struct node *n, struct json_object *options, struct error *err)
{
    struct node_limits *l = &n->limits;
    uint64_t align = json_get_uint(options, "align", 0);
    int r;

    if (align && (align >= INT_MAX || !is_power_of_2(align)))
        return error_set(err, EINVAL, "Cannot meet constraints with align %llu",
                         (unsigned long long)align);
    l->request_alignment = (uint32_t)align;
    align = max_u64(align, n->file->node->limits.request_alignment);
    r = take_limit(options, "max-transfer", align, &l->max_transfer, err);
    if (r == 0)
        r = take_limit(options, "opt-write-zero", align, &l->write_zeroes_alignment, err);
    if (r == 0)
        r = take_limit(options, "max-write-zero", max_u64(l->write_zeroes_alignment, align),
                       &l->max_write_zeroes, err);
    if (r == 0)
        r = take_limit(options, "opt-discard", align, &l->discard_alignment, err);
    if (r == 0)
        r = take_limit(options, "max-discard", max_u64(l->discard_alignment, align),
                       &l->max_discard, err);
    return r;
}

/* "blkdebug:CONFIG:IMAGE", or the path of an image when the driver was named. */
static int blkdebug_parse_filename(const char *filename, struct json_object *options,
                                   struct error *err)
{
    struct json_object *image;
    const char *colon;

    if (!strncmp(filename, "blkdebug:", 9)) {
        filename += 9;
        colon = strchr(filename, ':');
        if (!colon)
            return error_set(err, EINVAL, "blkdebug requires both config file and image path");
        if (colon != filename) {
            CLEANUP(memory_freep)
            char *config = xasprintf("%.*s", (int)(colon - filename), filename);
            json_add_string(options, "config", config);
        }
        filename = colon + 1;
    }
    if (json_has(options, "image"))
        return error_set(err, EINVAL, "Can't specify 'image' and a file name at the same time");
    image = json_object_new_object();
    json_add_string(image, "driver", "file");
    json_add_string(image, "filename", filename);
    json_add(options, "image", image);
    return 0;
}

/* "blkdebug:CONFIG:IMAGE" when that says it all; no name otherwise. */
static void take_filename(struct node *n, struct json_object *options)
{
    static const char *const untold[] = {"inject-error", "set-state", "x-tidemark-delay"};
    const char *image = node_filename(n->file->node);

    if (!strncmp(image, "json:", 5))
        return;
    for (size_t i = 0; i < ARRAY_SIZE(untold); i++)
        if (json_has(options, untold[i]))
            return;
    for (size_t i = 0; i < ARRAY_SIZE(size_options); i++)
        if (json_has(options, size_options[i]))
            return;
    free(n->filename);
    n->filename = xasprintf("blkdebug:%s:%s", json_get_string(options, "config", ""), image);
}

static int blkdebug_open(struct node *n, struct json_object *options, struct error *err)
{
    struct blkdebug *d = n->state;
    int r = 0;

    event_init(&d->cut);
    for (size_t i = 0; r == 0 && i < ARRAY_SIZE(size_options); i++)
        r = option_check_size(options, size_options[i], err);
    if (r == 0)
        r = debug_rules_load(&d->rules, json_get_string(options, "config", NULL), options, err);
    if (r == 0)
        r = parse_perms(options, "take-child-perms", &d->take, err);
    if (r == 0)
        r = parse_perms(options, "unshare-child-perms", &d->unshare, err);
    if (r == 0)
        r = node_open_child(n, options, "image", ROLE_FILTERED | ROLE_PRIMARY, true, &n->file, err);
    if (r == 0)
        r = take_limits(n, options, err);
    if (r == 0)
        r = refuse_empty_lists(options, err);
    if (r < 0) {
        debug_rules_fini(&d->rules);
        return r;
    }
    n->size_bytes = n->file->node->size_bytes;
    n->write_flags = REQ_WRITE_UNCHANGED | (n->file->node->write_flags & REQ_FUA);
    n->write_zeroes_flags = REQ_WRITE_UNCHANGED | (n->file->node->write_zeroes_flags &
                                                   (REQ_FUA | REQ_MAY_UNMAP | REQ_NO_FALLBACK));
    take_filename(n, options);
    debug_rules_event(&d->rules, DEBUG_none);
    return 0;
}

static void blkdebug_close(struct node *n)
{
    struct blkdebug *d = n->state;

    debug_rules_fini(&d->rules);
}

/* ---- requests ---- */

static int judge(struct node *n, enum debug_iotype iotype, struct range r)
{
    struct blkdebug *d = n->state;
    struct debug_verdict v = debug_rules_judge(&d->rules, iotype, r);
    int result;

    if (!n->cancelled)
        event_reset(&d->cut);

    if (v.delay_ns) {
        result = event_wait_until(&d->cut, clock_after_ns(v.delay_ns));
        if (result != -ETIMEDOUT)
            return -ECANCELED;
    }
    if (v.error && !v.immediately) {
        result = task_yield();
        if (result < 0)
            return result;
    }
    return -v.error;
}

static void blkdebug_cancel(struct node *n)
{
    struct blkdebug *d = n->state;

    event_set(&d->cut);
}

static int blkdebug_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    int result = judge(n, IOTYPE_READ, r);

    return result < 0 ? result : edge_read(n->file, r, buf, flags);
}

static int blkdebug_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    int result = judge(n, IOTYPE_WRITE, r);

    return result < 0 ? result : edge_write(n->file, r, buf, flags);
}

/* What is smaller than what the node likes is written out, so that this gets tested. */
static int blkdebug_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    if (r.length < max_u64(n->limits.write_zeroes_alignment, n->limits.request_alignment))
        return -ENOTSUP;
    int result = judge(n, IOTYPE_WRITE_ZEROES, r);

    return result < 0 ? result : edge_write_zeroes(n->file, r, flags);
}

static int blkdebug_discard(struct node *n, struct range r)
{
    int result = judge(n, IOTYPE_DISCARD, r);

    return result < 0 ? result : edge_discard(n->file, r);
}

static int blkdebug_flush(struct node *n)
{
    return judge(n, IOTYPE_FLUSH, range_make(0, 0)); /* block/ flushes the image after it */
}

static int blkdebug_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    int result = judge(n, IOTYPE_BLOCK_STATUS, r);

    (void)want_zero;
    if (result < 0)
        return result;
    *ret = (struct block_status){.flags = STATUS_RAW | STATUS_OFFSET_VALID,
                                 .length = r.length,
                                 .map = r.start,
                                 .file = n->file->node};
    return 0;
}

static void blkdebug_event(struct node *n, enum debug_event event)
{
    struct blkdebug *d = n->state;

    debug_rules_event(&d->rules, event);
}

/* ---- the rest ---- */

static void blkdebug_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                                unsigned *need, unsigned *share)
{
    const struct blkdebug *d = n->state;

    node_default_child_perm(n, e, perm, shared, need, share);
    *need |= d->take;
    *share &= ~d->unshare;
}

/* Rules and limits stay as they were opened. */
static int blkdebug_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                                   void **plan, struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

static const char *const blkdebug_strong[] = {
    "config",         "inject-error",   "set-state",   "x-tidemark-delay", "align", "max-transfer",
    "opt-write-zero", "max-write-zero", "opt-discard", "max-discard",      NULL};
static const char *const blkdebug_options[] = {
    "config",      "inject-error", "set-state",        "x-tidemark-delay",
    "align",       "max-transfer", "opt-write-zero",   "max-write-zero",
    "opt-discard", "max-discard",  "take-child-perms", "unshare-child-perms",
    NULL};

const struct driver driver_blkdebug = {
    .name = "blkdebug",
    .protocol = "blkdebug",
    .state_size = sizeof(struct blkdebug),
    .is_filter = true,
    .strong_options = blkdebug_strong,
    .known_options = blkdebug_options,
    .parse_filename = blkdebug_parse_filename,
    .open = blkdebug_open,
    .close = blkdebug_close,
    .read = blkdebug_read,
    .write = blkdebug_write,
    .write_zeroes = blkdebug_write_zeroes,
    .discard = blkdebug_discard,
    .flush = blkdebug_flush,
    .status = blkdebug_status,
    .cancel = blkdebug_cancel,
    .debug_event = blkdebug_event,
    .child_perm = blkdebug_child_perm,
    .reopen_prepare = blkdebug_reopen_prepare,
};
