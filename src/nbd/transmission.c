/* The transmission phase.
 *
 *     reader: decode a request -> take a slot and its bytes -> (write) read the payload -> task
 *     task:   the block layer -> replies into the outbox -> whoever finds nobody sending, sends
 *
 * Replies may overtake each other. One task at a time writes to the socket, and takes all that
 * has gathered in the outbox with one call, so that a deep queue costs few calls. A client that
 * does not read its replies fills the outbox, keeps its slots, and so stops its own reader. */
#include "block/driver.h"
#include "nbd/internal.h"

#include <stdio.h>

enum {
    REQUESTS_MAX = 128,           /* under way on one connection */
    REQUEST_BYTES_MAX = 64 << 20, /* buffers of one connection: two of the largest requests */
    SPARSE_READ_MIN = 32 << 10,   /* shorter reads do not ask where holes are */
    SPARSE_HOLE_MIN = 4 << 10,    /* shorter runs of zeroes are sent as data */
    REPLIES_A_CALL = 32,
};

struct pending {
    struct connection *c;
    struct nbd_request rq;
    uint8_t *data;   /* rq.length bytes of a read or a write, else NULL */
    size_t held;     /* bytes taken from the connection's budget */
    unsigned unsent; /* replies in the outbox, and one while the task runs */
};

struct reply {
    uint8_t header[NBD_CHUNK_SIZE + 12];
    struct iovec iov[2]; /* header, payload */
    void *owned;         /* freed when sent; NULL: payload is the request's data */
    struct pending *of;
    STAILQ_ENTRY(reply) link;
};

/* ---- sending ---- */

static void pending_put(struct pending *p)
{
    if (--p->unsent)
        return;
    semaphore_give(&p->c->bytes, p->held);
    semaphore_give(&p->c->requests, 1);
    free(p->data);
    free(p);
}

static void reply_free(struct reply *rp)
{
    pending_put(rp->of);
    free(rp->owned);
    free(rp);
}

/* Sends what is in the outbox and what others add meanwhile. */
static void send_all(struct connection *c)
{
    c->sending = true;
    while (!STAILQ_EMPTY(&c->outbox)) {
        struct reply *batch[REPLIES_A_CALL];
        struct iovec iov[2 * REPLIES_A_CALL];
        int replies = 0, pieces = 0;

        while (replies < REPLIES_A_CALL && !STAILQ_EMPTY(&c->outbox)) {
            struct reply *rp = STAILQ_FIRST(&c->outbox);
            STAILQ_REMOVE_HEAD(&c->outbox, link);
            batch[replies++] = rp;
            iov[pieces++] = rp->iov[0];
            if (rp->iov[1].iov_len)
                iov[pieces++] = rp->iov[1];
        }
        if (!c->broken && io_sendv_full(c->fd, iov, pieces) < 0) {
            c->broken = true;
            io_shutdown(c->fd); /* the reader ends, too */
        }
        for (int i = 0; i < replies; i++)
            reply_free(batch[i]);
    }
    c->sending = false;
}

/* Header so far is in rp->header; LENGTH of it, then PAYLOAD. Does not wait. */
static void reply_queue(struct reply *rp, size_t length, const void *payload, size_t n)
{
    struct connection *c = rp->of->c;

    rp->iov[0] = (struct iovec){rp->header, length};
    rp->iov[1] = (struct iovec){(void *)payload, n};
    STAILQ_INSERT_TAIL(&c->outbox, rp, link);
}

static struct reply *reply_new(struct pending *p)
{
    struct reply *rp = xnew(struct reply);

    rp->of = p;
    p->unsent++;
    return rp;
}

static void reply_simple(struct pending *p, uint32_t error, const void *payload, size_t n)
{
    struct reply *rp = reply_new(p);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);

    nbd_put_simple_reply(&out, p->rq.cookie, error);
    reply_queue(rp, NBD_SIMPLE_REPLY_SIZE, payload, n);
}

static void reply_error(struct pending *p, int code, const char *text)
{
    if (!p->c->structured) {
        reply_simple(p, nbd_error(code), NULL, 0);
        return;
    }
    struct reply *rp = reply_new(p);
    size_t n = min_u64(strlen(text), NBD_MAX_STRING);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);
    nbd_put_chunk(&out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, p->rq.cookie, (uint32_t)(6 + n));
    put_be32(&out, nbd_error(code));
    put_be16(&out, (uint16_t)n);
    rp->owned = xstrdup(text);
    reply_queue(rp, NBD_CHUNK_SIZE + 6, rp->owned, n);
}

/* The disk said no, not we: the client hears it, and so does who listens to events. What a disk
 * cannot do at all (-ENOTSUP) is no error of it. */
static void reply_failed(struct pending *p, int r, const char *what)
{
    bool is_read = p->rq.type == NBD_CMD_READ || p->rq.type == NBD_CMD_CACHE ||
                   p->rq.type == NBD_CMD_BLOCK_STATUS;

    if (r != -ENOTSUP && r != -ENOMEM)
        export_io_error(p->c->export, is_read, -r);
    reply_error(p, -r, what);
}

static void reply_result(struct pending *p, int r, const char *what)
{
    if (r < 0)
        reply_failed(p, r, what);
    else
        reply_simple(p, 0, NULL, 0);
}

/* ---- reading ---- */

static void chunk_data(struct pending *p, uint64_t at, uint32_t n, bool last)
{
    struct reply *rp = reply_new(p);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);

    nbd_put_chunk(&out, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_TYPE_OFFSET_DATA, p->rq.cookie,
                  8 + n);
    put_be64(&out, at);
    reply_queue(rp, NBD_CHUNK_SIZE + 8, p->data + (at - p->rq.offset), n);
}

/* All of the request in one piece. A structured reply without data has a type of its own. */
static void chunk_data_or_none(struct pending *p)
{
    if (p->rq.length) {
        chunk_data(p, p->rq.offset, p->rq.length, true);
        return;
    }
    struct reply *rp = reply_new(p);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);
    nbd_put_chunk(&out, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, p->rq.cookie, 0);
    reply_queue(rp, NBD_CHUNK_SIZE, NULL, 0);
}

static void chunk_hole(struct pending *p, uint64_t at, uint32_t n, bool last)
{
    struct reply *rp = reply_new(p);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);

    nbd_put_chunk(&out, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_TYPE_OFFSET_HOLE, p->rq.cookie,
                  12);
    put_be64(&out, at);
    put_be32(&out, n);
    reply_queue(rp, NBD_CHUNK_SIZE + 12, NULL, 0);
}

/* The next run at AT: zeroes worth telling, or data up to the next such zeroes. */
static int next_run(struct edge *e, uint64_t at, uint64_t end, bool *zero, uint64_t *run_end)
{
    uint64_t pos = at;

    while (pos < end) {
        struct block_status st;
        int r = edge_status_above(e, NULL, true, range_between(pos, end), &st);
        if (r < 0)
            return r;
        bool is_hole = (st.flags & STATUS_ZERO) && st.length >= SPARSE_HOLE_MIN;
        if (is_hole && pos == at) {
            *zero = true;
            *run_end = pos + st.length;
            return 0;
        }
        if (is_hole)
            break;
        pos += st.length;
    }
    *zero = false;
    *run_end = pos;
    return 0;
}

static void read_sparse(struct pending *p)
{
    struct edge *e = p->c->export->edge;
    uint64_t at = p->rq.offset, end = at + p->rq.length;

    while (at < end) {
        uint64_t run_end = at; /* gcc -O1 does not see that next_run() sets both */
        bool zero = false;
        int r = next_run(e, at, end, &zero, &run_end);
        if (r < 0) {
            reply_failed(p, r, "unable to check for holes");
            return;
        }
        if (!zero)
            r = edge_read(e, range_between(at, run_end), p->data + (at - p->rq.offset), 0);
        if (r < 0) {
            reply_failed(p, r, "reading from file failed");
            return;
        }
        (zero ? chunk_hole : chunk_data)(p, at, (uint32_t)(run_end - at), run_end == end);
        at = run_end;
    }
}

static void do_read(struct pending *p)
{
    struct edge *e = p->c->export->edge;
    const struct nbd_request *rq = &p->rq;
    int r = 0;

    if (rq->flags & NBD_CMD_FLAG_FUA)
        r = edge_flush(e);
    if (r < 0) {
        reply_failed(p, r, "flush failed");
        return;
    }
    if (p->c->structured && !(rq->flags & NBD_CMD_FLAG_DF) && rq->length >= SPARSE_READ_MIN) {
        read_sparse(p);
        return;
    }
    r = edge_read(e, range_make(rq->offset, rq->length), p->data, 0);
    if (r < 0)
        reply_failed(p, r, "reading from file failed");
    else if (p->c->structured)
        chunk_data_or_none(p);
    else
        reply_simple(p, 0, p->data, rq->length);
}

/* ---- block status ---- */

static int allocation_extents(struct export *e, struct range r, struct nbd_extents *x)
{
    while (!range_empty(r)) {
        struct block_status st;
        int rc = edge_status_above(e->edge, NULL, true, r, &st);
        if (rc < 0)
            return rc;
        uint32_t flags = (st.flags & STATUS_DATA ? 0 : NBD_STATE_HOLE) |
                         (st.flags & STATUS_ZERO ? NBD_STATE_ZERO : 0);
        if (!nbd_extents_add(x, st.length, flags))
            return 0;
        r = range_between(r.start + st.length, range_end(r));
    }
    return 0;
}

static int depth_extents(struct export *e, struct range r, struct nbd_extents *x)
{
    while (!range_empty(r)) {
        uint64_t length;
        int depth = edge_allocated_above(e->edge, NULL, false, r, &length);
        if (depth < 0)
            return depth;
        if (!nbd_extents_add(x, length, (uint32_t)depth))
            return 0;
        r = range_between(r.start + length, range_end(r));
    }
    return 0;
}

static void bitmap_extents(struct bitmap *bm, struct range r, struct nbd_extents *x)
{
    while (!range_empty(r)) {
        struct range dirty;
        if (!bitmap_next(bm, r.start, range_end(r) - r.start, &dirty) ||
            dirty.start >= range_end(r)) {
            (void)nbd_extents_add(x, r.length, 0);
            return;
        }
        dirty = range_intersect(dirty, r);
        if (!nbd_extents_add(x, dirty.start - r.start, 0) ||
            !nbd_extents_add(x, dirty.length, NBD_STATE_DIRTY))
            return;
        r = range_between(range_end(dirty), range_end(r));
    }
}

/* One context's answer; -errno when its extents cannot be had. */
static int status_chunk(struct pending *p, uint32_t context, bool last)
{
    struct export *e = p->c->export;
    struct range r = range_make(p->rq.offset, p->rq.length);
    bool one = p->rq.flags & NBD_CMD_FLAG_REQ_ONE;
    /* No more extents than the request has sectors: a small question costs little memory. */
    uint32_t capacity = one ? 1 : (uint32_t)min_u64(NBD_MAX_EXTENTS, p->rq.length / 512 + 2);
    struct nbd_extents x = {.capacity = capacity, .wire = malloc(8 * (size_t)capacity)};
    int rc = 0;

    if (!x.wire)
        return -ENOMEM;
    if (context == CONTEXT_BASE_ALLOCATION)
        rc = allocation_extents(e, r, &x);
    else if (context == CONTEXT_ALLOCATION_DEPTH)
        rc = depth_extents(e, r, &x);
    else
        bitmap_extents(dirty_bits(e->bitmaps[context - CONTEXT_FIRST_BITMAP]), r, &x);
    if (rc < 0) {
        free(x.wire);
        return rc;
    }
    size_t n = nbd_extents_finish(&x);
    struct reply *rp = reply_new(p);
    struct out_cursor out = out_cursor_over(rp->header, sizeof rp->header);
    nbd_put_chunk(&out, last ? NBD_REPLY_FLAG_DONE : 0, NBD_REPLY_TYPE_BLOCK_STATUS, p->rq.cookie,
                  (uint32_t)(4 + n));
    put_be32(&out, context);
    rp->owned = x.wire;
    reply_queue(rp, NBD_CHUNK_SIZE + 4, x.wire, n);
    return 0;
}

static void do_block_status(struct pending *p)
{
    struct meta_contexts *m = &p->c->meta;
    size_t left = m->count;
    int r = 0;

    if (!p->rq.length) {
        reply_error(p, EINVAL, "need non-zero length");
        return;
    }
    if (!left) {
        reply_error(p, EINVAL, "CMD_BLOCK_STATUS not negotiated");
        return;
    }
    if (m->base_allocation)
        r = status_chunk(p, CONTEXT_BASE_ALLOCATION, !--left);
    if (r >= 0 && m->allocation_depth)
        r = status_chunk(p, CONTEXT_ALLOCATION_DEPTH, !--left);
    for (size_t i = 0; r >= 0 && i < p->c->export->bitmap_count; i++)
        if (m->bitmaps[i])
            r = status_chunk(p, CONTEXT_FIRST_BITMAP + (uint32_t)i, !--left);
    if (r < 0)
        reply_failed(p, r, "can't get block status");
}

/* ---- the others ---- */

static void do_write(struct pending *p)
{
    struct export *e = p->c->export;
    bool fua = e->writethrough || (p->rq.flags & NBD_CMD_FLAG_FUA);

    int r = edge_write(e->edge, range_make(p->rq.offset, p->rq.length), p->data, fua ? REQ_FUA : 0);
    reply_result(p, r, "writing to file failed");
}

static void do_write_zeroes(struct pending *p)
{
    struct export *e = p->c->export;
    unsigned flags = 0;

    if (e->writethrough || (p->rq.flags & NBD_CMD_FLAG_FUA))
        flags |= REQ_FUA;
    if (!(p->rq.flags & NBD_CMD_FLAG_NO_HOLE))
        flags |= REQ_MAY_UNMAP;
    if (p->rq.flags & NBD_CMD_FLAG_FAST_ZERO)
        flags |= REQ_NO_FALLBACK;
    int r = edge_write_zeroes(e->edge, range_make(p->rq.offset, p->rq.length), flags);
    reply_result(p, r, "writing to file failed");
}

static void do_trim(struct pending *p)
{
    struct export *e = p->c->export;

    int r = edge_discard(e->edge, range_make(p->rq.offset, p->rq.length));
    if (r >= 0 && (e->writethrough || (p->rq.flags & NBD_CMD_FLAG_FUA)))
        r = edge_flush(e->edge);
    reply_result(p, r, "discard failed");
}

/* That a server below has lost what was not flushed is told to one flush, and that may have been
 * another client's, a job's or a format's. */
static void do_flush(struct pending *p)
{
    struct edge *e = p->c->export->edge;

    int r = edge_flush(e);
    if (r == 0 && node_flush_lost_since(e->node, p->c->losses))
        r = -EIO;
    p->c->losses = graph_losses(node_graph(e->node));
    reply_result(p, r, "flush failed");
}

static void do_cache(struct pending *p)
{
    /* Reading it brings it near; the data itself goes nowhere. */
    int r = edge_read(p->c->export->edge, range_make(p->rq.offset, p->rq.length), p->data,
                      REQ_PREFETCH);
    reply_result(p, r, "caching data failed");
}

static void dispatch(struct pending *p)
{
    char text[80];

    switch (p->rq.type) {
    case NBD_CMD_READ:
        do_read(p);
        break;
    case NBD_CMD_WRITE:
        do_write(p);
        break;
    case NBD_CMD_FLUSH:
        do_flush(p);
        break;
    case NBD_CMD_TRIM:
        do_trim(p);
        break;
    case NBD_CMD_CACHE:
        do_cache(p);
        break;
    case NBD_CMD_WRITE_ZEROES:
        do_write_zeroes(p);
        break;
    case NBD_CMD_BLOCK_STATUS:
        do_block_status(p);
        break;
    default:
        snprintf(text, sizeof text, "invalid request type (%u) received", p->rq.type);
        reply_error(p, EINVAL, text);
    }
}

static int answer(void *arg)
{
    struct pending *p = arg;
    struct connection *c = p->c;
    SHIELD(); /* a request once taken is finished; a gone client only loses the reply */

    dispatch(p);
    pending_put(p);
    if (!c->sending)
        send_all(c);
    return 0;
}

/* ---- the reader ---- */

/* Answers a request that is refused before it reached the block layer. */
static int answer_refused(struct connection *c, struct pending *p, const struct error *why)
{
    reply_error(p, why->code, why->text);
    pending_put(p);
    if (!c->sending)
        send_all(c);
    return 0;
}

static bool has_buffer(const struct nbd_request *rq)
{
    return (rq->type == NBD_CMD_READ || rq->type == NBD_CMD_WRITE || rq->type == NBD_CMD_CACHE) &&
           rq->length > 0;
}

static int one_request(struct connection *c, struct scope *tasks, const struct nbd_request *rq,
                       struct error *err)
{
    struct export *e = c->export;
    struct error refused = ERROR_INIT;
    bool too_long = rq->length > NBD_MAX_PAYLOAD && has_buffer(rq);
    size_t hold = has_buffer(rq) && !too_long ? rq->length : 0;

    int r = semaphore_take(&c->requests, 1);
    if (r < 0)
        return r;
    r = semaphore_take(&c->bytes, hold);
    if (r < 0)
        return r;
    struct pending *p = xnew(struct pending);
    *p = (struct pending){.c = c, .rq = *rq, .held = hold, .unsent = 1};
    (void)nbd_request_check(rq, e->size_bytes, !e->writable, c->structured, &refused);
    if (hold) {
        p->data = block_buffer(hold);
        if (!p->data)
            error_set(&refused, ENOMEM, "No memory");
    }
    if (rq->type == NBD_CMD_WRITE && !too_long) {
        r = p->data ? connection_read(c, p->data, rq->length) : connection_skip(c, rq->length);
        if (r < 0) {
            pending_put(p);
            return r;
        }
    }
    if (refused.code) {
        r = answer_refused(c, p, &refused);
        /* A payload that long is not read, and so the next request cannot be found. */
        if (too_long && rq->type == NBD_CMD_WRITE)
            return error_set(err, EINVAL, "%s", refused.text);
        return r;
    }
    scope_spawn(tasks, answer, p);
    return 0;
}

int transmission(struct connection *c, struct error *err)
{
    SCOPE(tasks);

    semaphore_init(&c->requests, REQUESTS_MAX);
    semaphore_init(&c->bytes, REQUEST_BYTES_MAX);
    c->losses = graph_losses(node_graph(c->export->edge->node));
    for (;;) {
        uint8_t buf[NBD_REQUEST_SIZE];
        struct nbd_request rq;

        int r = connection_read(c, buf, sizeof buf);
        if (r >= 0)
            r = nbd_request_decode(buf, &rq, err);
        if (r < 0)
            return r;
        if (rq.type == NBD_CMD_DISC)
            return scope_join(&tasks);
        r = one_request(c, &tasks, &rq, err);
        if (r < 0)
            return r;
    }
}
