/* The cache of one kind of table, in slices (4 KiB, or a cluster if that is smaller).
 *
 * A slot that a caller has got is valid until the caller waits: there are no pins, so nobody can
 * hold up eviction, and memory is bounded by the slots whatever requests are in flight.
 *
 * Who loads is the one that made the slot; the others wait and look again. A dirty L2 slice
 * is never written alone (that would need the order of writeback.c): when no clean slot is left,
 * all that is dirty is written back, and the cost is shared by half a cache of evictions. Refcount
 * slices only ever hold refcounts that are not too low, so one may be written at any time. */
#include "block/qcow2/qcow2.h"

int cache_init(struct cache *c, struct qcow2 *q, const char *name, uint32_t slice_bytes,
               uint64_t cache_bytes)
{
    *c = (struct cache){.q = q, .name = name, .slice_bytes = slice_bytes};
    c->slice_bits = log2_u64(slice_bytes);
    uint64_t n = max_u64(cache_bytes / slice_bytes, 8);
    if (n > UINT32_MAX / 4)
        return -ENOMEM;
    c->n_slots = (uint32_t)n;
    uint32_t buckets = 2;
    while (buckets < c->n_slots * 2)
        buckets *= 2;
    c->bucket_mask = buckets - 1;
    c->slots = calloc(c->n_slots, sizeof *c->slots);
    c->buckets = calloc(buckets, sizeof(void *));
    if (!c->slots || !c->buckets) {
        cache_fini(c);
        return -ENOMEM;
    }
    TAILQ_INIT(&c->lru);
    TAILQ_INIT(&c->dirty);
    waitq_init(&c->changed);
    for (uint32_t i = 0; i < c->n_slots; i++)
        TAILQ_INSERT_TAIL(&c->lru, &c->slots[i], lru);
    return 0;
}

void cache_fini(struct cache *c)
{
    for (uint32_t i = 0; c->slots && i < c->n_slots; i++)
        free(c->slots[i].data);
    free(c->slots);
    free(c->buckets);
    c->slots = NULL;
    c->buckets = NULL;
}

static struct cache_slot **bucket_of(struct cache *c, uint64_t offset)
{
    uint64_t h = (offset >> c->slice_bits) * 0x9e3779b97f4a7c15u;
    return &c->buckets[(h >> 32) & c->bucket_mask];
}

static struct cache_slot *find(struct cache *c, uint64_t offset)
{
    struct cache_slot *s = *bucket_of(c, offset);
    while (s && s->offset != offset)
        s = s->hash_next;
    return s;
}

static void unhash(struct cache *c, struct cache_slot *s)
{
    struct cache_slot **p = bucket_of(c, s->offset);
    while (*p != s)
        p = &(*p)->hash_next;
    *p = s->hash_next;
    s->offset = 0;
    s->state = SLOT_FREE;
}

static void touch(struct cache *c, struct cache_slot *s)
{
    if (TAILQ_NEXT(s, lru)) {
        TAILQ_REMOVE(&c->lru, s, lru);
        TAILQ_INSERT_TAIL(&c->lru, s, lru);
    }
}

struct cache_slot *cache_peek(struct cache *c, uint64_t offset)
{
    struct cache_slot *s = find(c, offset);
    return s && s->state == SLOT_VALID ? s : NULL;
}

/* Writes one dirty slice by itself; whether it is clean then is for the caller to see. */
static int write_alone(struct cache *c, struct cache_slot *s)
{
    uint64_t offset = s->offset;
    int r = qcow2_check_overlap(c->q, offset, c->slice_bytes, META_REFBLOCK);
    if (r < 0)
        return r;
    CLEANUP(memory_freep) uint8_t *copy = block_buffer(c->slice_bytes);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, s->data, c->slice_bytes);
    cache_mark_clean(c, s);
    s->writing++;
    c->alone++;
    file_event(c->q, DEBUG_refblock_update_part);
    r = file_write(c->q, offset, copy, c->slice_bytes);
    c->alone--;
    s->writing--;
    if (r < 0)
        cache_mark_dirty(c, s);
    waitq_wake_all(&c->changed);
    return r;
}

/* A slot that nobody has: free, or the least recently used clean one. NULL and *R 0: something
 * has been done about it, look again. */
static struct cache_slot *take_slot(struct cache *c, int *r)
{
    struct cache_slot *s, *dirty = NULL;
    bool busy = false;
    *r = 0;
    TAILQ_FOREACH (s, &c->lru, lru) {
        if (s->state == SLOT_FREE && !s->writing)
            return s;
        if (s->state == SLOT_LOADING || s->writing) {
            busy = true;
            continue;
        }
        if (s->is_dirty) {
            if (!dirty)
                dirty = s;
            continue;
        }
        unhash(c, s);
        return s;
    }
    if (dirty)
        *r = c->evict_by_write ? write_alone(c, dirty) : qcow2_writeback(c->q);
    else if (busy)
        *r = waitq_wait(&c->changed);
    return NULL;
}

static int get(struct cache *c, uint64_t offset, bool zeroed, struct cache_slot **ret)
{
    for (;;) {
        struct cache_slot *s = find(c, offset);
        if (s && s->state == SLOT_VALID) {
            touch(c, s);
            *ret = s;
            return 0;
        }
        int r;
        if (s) {
            r = waitq_wait(&c->changed);
            if (r < 0)
                return r;
            continue;
        }
        s = take_slot(c, &r);
        if (r < 0)
            return r;
        if (!s)
            continue;
        if (!s->data) {
            s->data = block_buffer(c->slice_bytes);
            if (!s->data)
                return -ENOMEM;
        }
        struct cache_slot **bucket = bucket_of(c, offset);
        s->offset = offset;
        s->hash_next = *bucket;
        *bucket = s;
        touch(c, s);
        if (zeroed) {
            memset(s->data, 0, c->slice_bytes);
            s->state = SLOT_VALID;
            *ret = s;
            return 0;
        }
        s->state = SLOT_LOADING;
        file_event(c->q, c == &c->q->l2_cache ? DEBUG_l2_load : DEBUG_refblock_load);
        r = file_read(c->q, offset, s->data, c->slice_bytes);
        if (r < 0)
            unhash(c, s);
        else
            s->state = SLOT_VALID;
        waitq_wake_all(&c->changed);
        if (r < 0)
            return r;
        *ret = s;
        return 0;
    }
}

int cache_get(struct cache *c, uint64_t offset, struct cache_slot **ret)
{
    return get(c, offset, false, ret);
}

int cache_get_zeroed(struct cache *c, uint64_t offset, struct cache_slot **ret)
{
    return get(c, offset, true, ret);
}

void cache_mark_dirty(struct cache *c, struct cache_slot *s)
{
    if (s->is_dirty)
        return;
    s->is_dirty = true;
    TAILQ_INSERT_TAIL(&c->dirty, s, dirty);
    c->n_dirty++;
}

void cache_mark_clean(struct cache *c, struct cache_slot *s)
{
    s->is_dirty = false;
    TAILQ_REMOVE(&c->dirty, s, dirty);
    c->n_dirty--;
}

void cache_forget(struct cache *c, uint64_t offset, uint64_t length)
{
    for (uint64_t at = offset; at < offset + length; at += c->slice_bytes) {
        struct cache_slot *s;
        while ((s = find(c, at)) != NULL && (s->writing || s->state == SLOT_LOADING)) {
            SHIELD();
            if (waitq_wait(&c->changed) < 0)
                break;
        }
        if (!s)
            continue;
        if (s->is_dirty)
            cache_mark_clean(c, s);
        unhash(c, s);
    }
}
