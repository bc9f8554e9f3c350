/* The nbd driver: a disk that an NBD server has.
 *
 * What the server can is asked once, at open (nbd_connect.c); what happens when it goes away is
 * nbd_remote.c's. Here a request becomes a command. The node's alignment and its largest request
 * are the server's, so a request is one command, and reads and writes travel in the caller's
 * buffer.
 *
 * Sizes of nodes are multiples of a sector; a server's need not be. What lies between reads as
 * zeroes, can be written with zeroes, and with nothing else.
 *
 * tls-creds is refused: there is no TLS yet. The name of the disk, by which its bitmaps are found
 * again, is nbd_disk_name(): its server can tell nothing of who has written it (persist/witness.h).
 */
#include "block/nbd.h"

#include <isa-l/mem_routines.h>
#include <libnbd.h>

/* ---- open, reopen, close ---- */

static void take_offer(struct node *n, const struct nbd_offer *o)
{
    n->size_bytes = o->size_bytes;
    n->limits.request_alignment = o->min_block;
    n->limits.max_transfer = o->max_block;
    n->limits.max_write_zeroes = o->max_block;
    n->limits.max_discard = align_down(INT32_MAX, o->min_block);
    if (o->fua)
        n->write_flags = REQ_FUA;
    n->write_zeroes_flags = n->write_flags;
    if (o->zero)
        n->write_zeroes_flags |= REQ_MAY_UNMAP;
    if (o->fast_zero)
        n->write_zeroes_flags |= REQ_NO_FALLBACK;
}

static int nbd_node_open(struct node *n, struct json_object *options, struct error *err)
{
    struct nbd_remote *re = n->state;
    struct nbd_target target = {0};

    int r = nbd_read_target(options, &target, err);
    if (r < 0)
        return r;
    free(n->filename);
    n->filename = nbd_target_filename(&target);
    r = nbd_remote_open(re, n, &target, err);
    if (r < 0)
        return r;
    if (re->offer.read_only)
        r = node_apply_auto_read_only(n, "request on write denied without write permission", err);
    if (r < 0) {
        nbd_remote_close(re);
        return r;
    }
    take_offer(n, &re->offer);
    n->write_generation = 1; /* what a killed program wrote may lie in the server's cache only */
    nbd_remote_start(re);
    return 0;
}

static void nbd_node_close(struct node *n)
{
    nbd_remote_close(n->state);
}

static int nbd_node_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                                   void **plan, struct error *err)
{
    const struct nbd_remote *re = n->state;

    (void)options;
    (void)plan;
    if (!read_only && re->offer.read_only)
        return error_set(err, EACCES, "Can't reopen read-only NBD mount as read/write");
    return 0;
}

static int nbd_node_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    const struct nbd_remote *re = n->state;

    if (size_bytes != re->offer.size_bytes && exact)
        return error_set(err, ENOTSUP, "Cannot resize NBD nodes");
    if (size_bytes > re->offer.size_bytes)
        return error_set(err, EINVAL, "Cannot grow NBD nodes");
    return 0;
}

/* ---- requests ---- */

/* R without what lies beyond the server's end; the bytes that were. */
static uint64_t cut(const struct nbd_remote *re, struct range *r)
{
    uint64_t end = re->offer.size_bytes, was = r->length;

    r->length = r->start < end ? min_u64(r->length, end - r->start) : 0;
    return was - r->length;
}

static int nbd_node_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct nbd_remote *re = n->state;
    uint64_t beyond = cut(re, &r);
    struct nbd_command cmd = {.what = NBD_DO_READ, .range = r, .buf = buf};

    (void)flags;
    memset((uint8_t *)buf + r.length, 0, beyond);
    return r.length ? nbd_remote_do(re, &cmd) : 0;
}

static int nbd_node_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    struct nbd_remote *re = n->state;
    uint64_t beyond = cut(re, &r);
    struct nbd_command cmd = {
        .what = NBD_DO_WRITE,
        .range = r,
        .buf = (void *)(uintptr_t)buf,
        .flags = flags & REQ_FUA ? LIBNBD_CMD_FLAG_FUA : 0,
    };

    if (beyond && isal_zero_detect((uint8_t *)cmd.buf + r.length, beyond) != 0)
        return -ENOSPC;
    return r.length ? nbd_remote_do(re, &cmd) : 0;
}

static int nbd_node_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct nbd_remote *re = n->state;

    if (!re->offer.zero)
        return -ENOTSUP;
    (void)cut(re, &r);
    struct nbd_command cmd = {
        .what = NBD_DO_ZERO,
        .range = r,
        .flags = (flags & REQ_FUA ? LIBNBD_CMD_FLAG_FUA : 0) |
                 (flags & REQ_MAY_UNMAP ? 0 : LIBNBD_CMD_FLAG_NO_HOLE) |
                 (flags & REQ_NO_FALLBACK ? LIBNBD_CMD_FLAG_FAST_ZERO : 0),
    };
    return r.length ? nbd_remote_do(re, &cmd) : 0;
}

static int nbd_node_discard(struct node *n, struct range r)
{
    struct nbd_remote *re = n->state;

    (void)cut(re, &r);
    struct nbd_command cmd = {.what = NBD_DO_TRIM, .range = r};
    return r.length && re->offer.trim ? nbd_remote_do(re, &cmd) : 0;
}

static int nbd_node_prefetch(struct node *n, struct range r)
{
    struct nbd_remote *re = n->state;

    (void)cut(re, &r);
    struct nbd_command cmd = {.what = NBD_DO_CACHE, .range = r};
    return r.length && re->offer.cache ? nbd_remote_do(re, &cmd) : 0;
}

static int nbd_node_flush(struct node *n)
{
    return nbd_remote_flush(n->state);
}

/* One extent, cut to what was asked for, and to the alignment: part of a block is data. */
static void take_extent(const struct node *n, struct range r, const struct nbd_command *cmd,
                        struct block_status *ret)
{
    uint32_t align = n->limits.request_alignment, state = cmd->state;
    uint64_t length = min_u64(cmd->length, r.length);

    /* Depths of a chain are data from the second on. */
    if (state > 2 && json_has(n->options, "x-dirty-bitmap"))
        state = 2;
    if (length < align) {
        length = align;
        state = 0;
    } else if (length < r.length) {
        length = align_down(length, align);
    }
    ret->length = length;
    ret->flags = STATUS_OFFSET_VALID | (state & LIBNBD_STATE_HOLE ? 0 : STATUS_DATA) |
                 (state & LIBNBD_STATE_ZERO ? STATUS_ZERO : 0);
}

static int nbd_node_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct nbd_remote *re = n->state;
    struct range asked = r;

    (void)want_zero;
    *ret = (struct block_status){
        .flags = STATUS_DATA | STATUS_OFFSET_VALID, .length = r.length, .map = r.start, .file = n};
    (void)cut(re, &asked);
    if (!asked.length) {
        *ret = (struct block_status){.flags = STATUS_ZERO, .length = r.length};
        return 0;
    }
    if (!re->offer.context)
        return 0;
    asked.length =
        min_u64(asked.length, align_down(INT32_MAX, max_u64(n->limits.request_alignment, 512)));
    struct nbd_command cmd = {
        .what = NBD_DO_STATUS, .range = asked, .flags = LIBNBD_CMD_FLAG_REQ_ONE};
    int result = nbd_remote_do(re, &cmd);
    if (result < 0)
        return result;
    if (!cmd.length)
        return -EIO; /* a server that does not say what it was asked for */
    take_extent(n, asked, &cmd, ret);
    return 0;
}

static void nbd_node_cancel(struct node *n)
{
    nbd_remote_cancel(n->state);
}

static const char *const nbd_protocols[] = {"nbd+tcp", "nbd+unix", NULL};
static const char *const nbd_strong[] = {"path",      "host",         "port",   "export",
                                         "tls-creds", "tls-hostname", "server", NULL};
static const char *const nbd_options[] = {"path",
                                          "host",
                                          "port",
                                          "export",
                                          "tls-creds",
                                          "tls-hostname",
                                          "x-dirty-bitmap",
                                          "reconnect-delay",
                                          "open-timeout",
                                          "server",
                                          NULL};

const struct driver driver_nbd = {
    .name = "nbd",
    .protocol = "nbd",
    .more_protocols = nbd_protocols,
    .no_directory = "NBD",
    .state_size = sizeof(struct nbd_remote),
    .strong_options = nbd_strong,
    .known_options = nbd_options,
    .parse_filename = nbd_parse_filename,
    .open = nbd_node_open,
    .close = nbd_node_close,
    .read = nbd_node_read,
    .write = nbd_node_write,
    .write_zeroes = nbd_node_write_zeroes,
    .discard = nbd_node_discard,
    .prefetch = nbd_node_prefetch,
    .flush = nbd_node_flush,
    .truncate = nbd_node_truncate,
    .status = nbd_node_status,
    .reopen_prepare = nbd_node_reopen_prepare,
    .cancel = nbd_node_cancel,
};
