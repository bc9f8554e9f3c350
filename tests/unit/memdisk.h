/* A file in memory for tests of image formats: driver "memdisk" (option disk: which one). What it
 * holds outlives the node. It grows by writes as a file does, can keep a log of what was written
 * and when it was flushed, and can be replayed: that is how the power is cut in tests. */
#pragma once

#include "block/driver.h"

#include <stdio.h>

/* What was written before MEM_FLUSH is durable from the MEM_FLUSHED that follows it. */
enum mem_op_kind { MEM_WRITE, MEM_FLUSH, MEM_FLUSHED, MEM_TRUNCATE };
struct mem_op {
    enum mem_op_kind kind;
    uint64_t offset, length;
    uint8_t *data; /* NULL: zeroes */
};

struct memdisk {
    uint8_t *bytes;
    uint64_t size, capacity;
    bool record;
    bool yield; /* requests take turns */
    struct mem_op *log;
    size_t n_log, log_capacity;
    int fail_write_after; /* > 0: the write with this number from now on fails */
    int fail_flush_after;
    int fail_more; /* and that many that follow */
    uint64_t writes, write_bytes, reads, flushes;
    struct range hold; /* writes into it wait until it is empty */
    bool hold_one;     /* the first one does; others overtake it */
    unsigned held;
};

static struct memdisk memdisks[4];

static inline void memdisk_reserve(struct memdisk *d, uint64_t size)
{
    if (size <= d->capacity)
        return;
    uint64_t capacity = max_u64(size, d->capacity * 2);
    d->bytes = realloc(d->bytes, capacity);
    assert(d->bytes);
    memset(d->bytes + d->capacity, 0, capacity - d->capacity);
    d->capacity = capacity;
}

static inline void memdisk_forget_log(struct memdisk *d)
{
    for (size_t i = 0; i < d->n_log; i++)
        free(d->log[i].data);
    free(d->log);
    d->log = NULL;
    d->n_log = d->log_capacity = 0;
}

static inline void memdisk_reset(unsigned i)
{
    struct memdisk *d = &memdisks[i];
    memdisk_forget_log(d);
    free(d->bytes);
    *d = (struct memdisk){.yield = true};
}

static inline void memdisk_log(struct memdisk *d, enum mem_op_kind kind, uint64_t offset,
                               uint64_t length, const void *data)
{
    if (!d->record)
        return;
    if (d->n_log == d->log_capacity) {
        d->log_capacity = d->log_capacity ? d->log_capacity * 2 : 256;
        d->log = realloc(d->log, d->log_capacity * sizeof *d->log);
        assert(d->log);
    }
    struct mem_op *op = &d->log[d->n_log++];
    *op = (struct mem_op){kind, offset, length, NULL};
    if (data) {
        op->data = malloc(length);
        assert(op->data);
        memcpy(op->data, data, length);
    }
}

static inline void memdisk_apply(struct memdisk *d, const struct mem_op *op)
{
    switch (op->kind) {
    case MEM_FLUSH:
    case MEM_FLUSHED:
        break;
    case MEM_TRUNCATE:
        memdisk_reserve(d, op->length);
        if (op->length < d->size)
            memset(d->bytes + op->length, 0, min_u64(d->size, d->capacity) - op->length);
        d->size = op->length;
        break;
    case MEM_WRITE:
        memdisk_reserve(d, op->offset + op->length);
        if (op->data)
            memcpy(d->bytes + op->offset, op->data, op->length);
        else
            memset(d->bytes + op->offset, 0, op->length);
        d->size = max_u64(d->size, op->offset + op->length);
        break;
    }
}

static inline struct memdisk *memdisk_of(struct node *n)
{
    return *(struct memdisk **)n->state;
}

static inline int memdisk_open(struct node *n, struct json_object *options, struct error *err)
{
    uint64_t i = json_get_uint(options, "disk", 0);
    (void)err;
    assert(i < ARRAY_SIZE(memdisks));
    *(struct memdisk **)n->state = &memdisks[i];
    n->size_bytes = memdisks[i].size;
    n->limits.request_alignment = (uint32_t)json_get_uint(options, "request-alignment", 1);
    n->limits.memory_alignment = 1;
    n->write_zeroes_flags = REQ_MAY_UNMAP | REQ_NO_FALLBACK;
    return 0;
}

static inline void memdisk_close(struct node *n)
{
    (void)n;
}

static inline void memdisk_turn(struct memdisk *d)
{
    if (d->yield)
        (void)!task_yield();
}

static inline int memdisk_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct memdisk *d = memdisk_of(n);
    (void)flags;
    d->reads++;
    memdisk_turn(d);
    uint64_t have = r.start < d->capacity ? min_u64(r.length, d->capacity - r.start) : 0;
    if (have)
        memcpy(buf, d->bytes + r.start, have);
    memset((uint8_t *)buf + have, 0, r.length - have);
    return 0;
}

static inline bool memdisk_fails(struct memdisk *d, int *after)
{
    if (!*after || --*after)
        return false;
    if (d->fail_more) {
        d->fail_more--;
        *after = 1;
    }
    return true;
}

static inline int memdisk_change(struct node *n, struct range r, const void *buf)
{
    struct memdisk *d = memdisk_of(n);
    struct mem_op op = {MEM_WRITE, r.start, r.length, (uint8_t *)(uintptr_t)buf};
    d->writes++;
    d->write_bytes += r.length;
    bool overtakes = d->hold_one && d->held;
    while (range_overlaps(r, d->hold) && !overtakes) {
        d->held++;
        (void)!task_yield();
        d->held--;
    }
    memdisk_turn(d);
    if (memdisk_fails(d, &d->fail_write_after))
        return -EIO;
    memdisk_apply(d, &op);
    memdisk_log(d, MEM_WRITE, r.start, r.length, buf);
    memdisk_turn(d);
    return 0;
}

static inline int memdisk_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    (void)flags;
    return memdisk_change(n, r, buf);
}

static inline int memdisk_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    (void)flags;
    return memdisk_change(n, r, NULL);
}

/* A discard gives rubbish, so that nobody relies on it. */
static inline int memdisk_discard(struct node *n, struct range r)
{
    uint8_t *rubbish = malloc(r.length);
    assert(rubbish);
    memset(rubbish, 0xd5, r.length);
    int result = memdisk_change(n, r, rubbish);
    free(rubbish);
    return result;
}

static inline int memdisk_flush(struct node *n)
{
    struct memdisk *d = memdisk_of(n);
    /* What completes while the flush runs need not be covered by it: the log has it at its start.
     */
    memdisk_log(d, MEM_FLUSH, 0, 0, NULL);
    d->flushes++;
    memdisk_turn(d);
    if (memdisk_fails(d, &d->fail_flush_after))
        return -EIO;
    memdisk_log(d, MEM_FLUSHED, 0, 0, NULL);
    return 0;
}

static inline int memdisk_truncate(struct node *n, uint64_t size_bytes, bool exact,
                                   struct error *err)
{
    struct memdisk *d = memdisk_of(n);
    struct mem_op op = {MEM_TRUNCATE, 0, size_bytes, NULL};
    (void)exact;
    (void)err;
    memdisk_apply(d, &op);
    memdisk_log(d, MEM_TRUNCATE, 0, size_bytes, NULL);
    return 0;
}

static inline int memdisk_reopen_prepare(struct node *n, struct json_object *options,
                                         bool read_only, void **plan, struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

static const struct driver driver_memdisk __attribute__((unused)) = {
    .name = "memdisk",
    .protocol = "memdisk",
    .state_size = sizeof(struct memdisk *),
    .open = memdisk_open,
    .close = memdisk_close,
    .read = memdisk_read,
    .write = memdisk_write,
    .write_zeroes = memdisk_write_zeroes,
    .discard = memdisk_discard,
    .flush = memdisk_flush,
    .truncate = memdisk_truncate,
    .reopen_prepare = memdisk_reopen_prepare,
};
