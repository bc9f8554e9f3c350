/* A disk in memory for tests of what stands on nodes: driver "fake" (options size,
 * request-alignment, memory-alignment, max-transfer), with a script: requests can be held, fail,
 * and are logged. And "fakefilter", which passes everything to its `file`.
 *
 * Include it in one file of a test; register with graph_add_driver(g, &driver_fake). */
#pragma once

#include "block/driver.h"
#include "rt/sync.h"

#include <stdio.h>

struct fake_state {
    uint8_t *bytes;
    uint8_t *allocated; /* one a 512-byte sector: written since it was made */
    unsigned reads, writes, zeroes, discards, flushes;
    bool hold_writes; /* writes wait for `go` before they touch the bytes */
    struct waitq go;
    unsigned held;
    int fail_read, fail_write, fail_flush; /* -errno once; 0: not */
    bool opaque;                           /* status says: all data */
};

static inline struct fake_state *fake_of(struct node *n)
{
    return n->state;
}

static inline int fake_once(int *error)
{
    int r = *error;

    *error = 0;
    return r;
}

static inline void fake_release(struct node *n)
{
    fake_of(n)->hold_writes = false;
    waitq_wake_all(&fake_of(n)->go);
}

static inline void fake_check(struct node *n, struct range r, const void *buf)
{
    uint64_t align = n->limits.request_alignment;

    assert(r.length && range_aligned(r, align));
    assert(range_end(r) <= align_up(n->size_bytes, align));
    assert(!((uintptr_t)buf & (n->limits.memory_alignment - 1)));
    assert(!n->limits.max_transfer || r.length <= n->limits.max_transfer);
}

static inline int fake_open(struct node *n, struct json_object *options, struct error *err)
{
    struct fake_state *s = n->state;

    (void)err;
    n->size_bytes = json_get_uint(options, "size", MiB);
    n->limits.request_alignment = (uint32_t)json_get_uint(options, "request-alignment", 1);
    n->limits.memory_alignment = (uint32_t)json_get_uint(options, "memory-alignment", 1);
    n->limits.max_transfer = json_get_uint(options, "max-transfer", 0);
    s->bytes = xcalloc(1, 2 * n->size_bytes + 65536);
    s->allocated = xcalloc(1, (2 * n->size_bytes + 65536) / 512);
    s->opaque = json_get_bool(options, "opaque", false);
    waitq_init(&s->go);
    if (json_get_bool(options, "fua", false))
        n->write_flags = REQ_FUA;
    n->write_zeroes_flags = REQ_MAY_UNMAP | REQ_NO_FALLBACK;
    return 0;
}

static inline void fake_close(struct node *n)
{
    free(fake_of(n)->bytes);
    free(fake_of(n)->allocated);
}

static inline int fake_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct fake_state *s = n->state;

    (void)flags;
    fake_check(n, r, buf);
    s->reads++;
    (void)!task_yield();
    memcpy(buf, s->bytes + r.start, r.length);
    return fake_once(&s->fail_read);
}

static inline int fake_hold(struct node *n)
{
    struct fake_state *s = n->state;
    int r = 0;

    if (s->hold_writes) {
        s->held++;
        r = waitq_wait(&s->go);
        s->held--;
    } else {
        (void)!task_yield();
    }
    return r ? r : fake_once(&s->fail_write);
}

static inline int fake_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    struct fake_state *s = n->state;

    (void)flags;
    fake_check(n, r, buf);
    s->writes++;
    int result = fake_hold(n);
    if (result == 0) {
        memcpy(s->bytes + r.start, buf, r.length);
        memset(s->allocated + r.start / 512, 1, div_round_up(range_end(r), 512) - r.start / 512);
    }
    return result;
}

static inline int fake_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct fake_state *s = n->state;

    (void)flags;
    fake_check(n, range_make(r.start, n->limits.request_alignment), NULL);
    s->zeroes++;
    int result = fake_hold(n);
    if (result == 0) {
        memset(s->bytes + r.start, 0, r.length);
        /* whole sectors become holes */
        struct range in = range_round_in(r, 512);
        memset(s->allocated + in.start / 512, 0, in.length / 512);
    }
    return result;
}

static inline int fake_discard(struct node *n, struct range r)
{
    struct fake_state *s = n->state;

    s->discards++;
    memset(s->bytes + r.start, 0, r.length);
    struct range in = range_round_in(r, 512);
    memset(s->allocated + in.start / 512, 0, in.length / 512);
    return 0;
}

static inline int fake_flush(struct node *n)
{
    struct fake_state *s = n->state;

    s->flushes++;
    (void)!task_yield();
    return fake_once(&s->fail_flush);
}

static inline int fake_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct fake_state *s = n->state;

    (void)exact;
    (void)err;
    s->bytes = realloc(s->bytes, 2 * size_bytes + 65536);
    s->allocated = realloc(s->allocated, (2 * size_bytes + 65536) / 512);
    assert(s->bytes && s->allocated);
    if (size_bytes > n->size_bytes) {
        memset(s->bytes + n->size_bytes, 0, size_bytes - n->size_bytes);
        memset(s->allocated + n->size_bytes / 512, 0, (size_bytes - n->size_bytes) / 512 + 1);
    }
    return 0;
}

static inline int fake_status(struct node *n, bool want_zero, struct range r,
                              struct block_status *ret)
{
    struct fake_state *s = n->state;
    uint64_t sector = r.start / 512, end = div_round_up(range_end(r), 512);
    uint64_t align = max_u64(512, n->limits.request_alignment), at;
    bool data = s->allocated[sector];

    (void)want_zero;
    if (s->opaque)
        data = true;
    for (at = sector; at < end && (s->opaque || s->allocated[at] == data); at++)
        ;
    *ret = (struct block_status){.flags = STATUS_OFFSET_VALID | (data ? STATUS_DATA : STATUS_ZERO),
                                 .map = r.start,
                                 .file = n};
    ret->length = min_u64(at * 512, range_end(r)) - r.start;
    if (ret->length < align) { /* a mixed block is data */
        ret->length = min_u64(n->limits.request_alignment, r.length);
        ret->flags = STATUS_OFFSET_VALID | STATUS_DATA;
    } else if (!range_aligned(*(&r), n->limits.request_alignment) ||
               ret->length % n->limits.request_alignment) {
        ret->length = align_down(ret->length, n->limits.request_alignment);
    }
    return 0;
}

static inline int fake_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                                      void **plan, struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

static const struct driver driver_fake __attribute__((unused)) = {
    .name = "fake",
    .protocol = "fake",
    .state_size = sizeof(struct fake_state),
    .open = fake_open,
    .close = fake_close,
    .read = fake_read,
    .write = fake_write,
    .write_zeroes = fake_write_zeroes,
    .discard = fake_discard,
    .flush = fake_flush,
    .truncate = fake_truncate,
    .status = fake_status,
    .reopen_prepare = fake_reopen_prepare,
};

/* ---- the filter ---- */

struct fakefilter_state {
    unsigned reads, writes;
};

static inline int fakefilter_open(struct node *n, struct json_object *options, struct error *err)
{
    int r = node_open_child(n, options, "file", ROLE_FILTERED | ROLE_PRIMARY, true, &n->file, err);

    if (r < 0)
        return r;
    n->size_bytes = n->file->node->size_bytes;
    n->write_flags = n->file->node->write_flags & REQ_FUA;
    n->write_zeroes_flags = n->file->node->write_zeroes_flags;
    return 0;
}

static inline int fakefilter_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    ((struct fakefilter_state *)n->state)->reads++;
    return edge_read(n->file, r, buf, flags);
}

static inline int fakefilter_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    ((struct fakefilter_state *)n->state)->writes++;
    (void)!task_yield(); /* inside the filter, not yet below */
    return edge_write(n->file, r, buf, flags);
}

static inline int fakefilter_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    ((struct fakefilter_state *)n->state)->writes++;
    return edge_write_zeroes(n->file, r, flags);
}

static inline int fakefilter_discard(struct node *n, struct range r)
{
    return edge_discard(n->file, r);
}

static const struct driver driver_fakefilter __attribute__((unused)) = {
    .name = "fakefilter",
    .is_filter = true,
    .state_size = sizeof(struct fakefilter_state),
    .open = fakefilter_open,
    .read = fakefilter_read,
    .write = fakefilter_write,
    .write_zeroes = fakefilter_write_zeroes,
    .discard = fakefilter_discard,
    .reopen_prepare = fake_reopen_prepare,
};
