/* null-co: a disk of any size that keeps nothing, for measuring what is above it.
 * Without read-zeroes it tells nothing about its content, but what it gives is zeroes all the
 * same: never what the memory held before. */

#include "block/internal.h"

#include "rt/clock.h"
#include "rt/sync.h"

struct null_state {
    uint64_t latency_ns;
    struct event cut; /* ends what waits for its latency, which then fails */
    bool read_zeroes;
};

static int null_wait(struct node *n)
{
    struct null_state *s = n->state;

    if (!n->cancelled)
        event_reset(&s->cut);
    if (!s->latency_ns || event_wait_until(&s->cut, clock_after_ns(s->latency_ns)) == -ETIMEDOUT)
        return 0;
    return -ECANCELED;
}

static void null_cancel(struct node *n)
{
    struct null_state *s = n->state;

    event_set(&s->cut);
}

static int null_open(struct node *n, struct json_object *options, struct error *err)
{
    struct null_state *s = n->state;
    int64_t size = json_get_int(options, "size", (int64_t)GiB);

    event_init(&s->cut);
    if (json_get_int(options, "latency-ns", 0) < 0 ||
        json_get_uint(options, "latency-ns", 0) > INT64_MAX)
        return error_set(err, EINVAL, "latency-ns is invalid");
    s->latency_ns = json_get_uint(options, "latency-ns", 0);
    s->read_zeroes = json_get_bool(options, "read-zeroes", false);
    if (size < 0)
        return error_set_errno(err, EINVAL, "Could not refresh total sector count");
    n->size_bytes = (uint64_t)size;
    n->write_flags = REQ_FUA;
    if (!json_has(options, "size") && !json_has(options, "read-zeroes")) {
        free(n->filename);
        n->filename = xstrdup("null-co://");
    }
    return 0;
}

static int null_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    (void)flags;
    memset(buf, 0, r.length);
    return null_wait(n);
}

static int null_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    (void)r;
    (void)buf;
    (void)flags;
    return null_wait(n);
}

static int null_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    const struct null_state *s = n->state;

    (void)want_zero;
    *ret = (struct block_status){.flags = STATUS_OFFSET_VALID | (s->read_zeroes ? STATUS_ZERO : 0),
                                 .length = r.length,
                                 .map = r.start,
                                 .file = n};
    return 0;
}

static int null_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                               void **plan, struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

static uint64_t null_allocated_bytes(struct node *n)
{
    (void)n;
    return 0;
}

static const char *const null_strong[] = {"size", "read-zeroes", NULL};
static const char *const null_options[] = {"size", "read-zeroes", "latency-ns", NULL};

const struct driver driver_null_co = {
    .name = "null-co",
    .protocol = "null-co",
    .state_size = sizeof(struct null_state),
    .strong_options = null_strong,
    .known_options = null_options,
    .open = null_open,
    .read = null_read,
    .write = null_write,
    .flush = null_wait,
    .status = null_status,
    .cancel = null_cancel,
    .reopen_prepare = null_reopen_prepare,
    .allocated_bytes = null_allocated_bytes,
};
