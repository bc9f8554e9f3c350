/* The content of files: sectors with their versions, sizes, blocks, times. */
#include "content.h"

#include <errno.h>
#include <fcntl.h>
#include <isa-l/mem_routines.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <unistd.h>

/* ---- pools: what is small and has been used is used again ---- */

struct pool {
    size_t size; /* of an item: not smaller than a pointer */
    void *free, *chunks;
};
enum { POOL_ITEMS = 256 };

static void *pool_take(struct pool *p)
{
    if (!p->free) {
        char *chunk = xcalloc(POOL_ITEMS + 1, p->size);
        *(void **)(void *)chunk = p->chunks; /* so that a leak checker sees them all */
        p->chunks = chunk;
        for (size_t k = POOL_ITEMS; k; k--) {
            *(void **)(void *)(chunk + k * p->size) = p->free;
            p->free = chunk + k * p->size;
        }
    }
    void *item = p->free;
    p->free = *(void **)item;
    return item;
}

static void pool_give(struct pool *p, void *item)
{
    *(void **)item = p->free;
    p->free = item;
}

static struct pool payloads = {.size = sizeof(struct payload)};
static struct pool versions = {.size = sizeof(struct version)};
static struct pool sectors = {.size = sizeof(struct sector)};

static struct payload *payload_new(const uint8_t *bytes)
{
    if (!isal_zero_detect((void *)(uintptr_t)bytes, SIM_SECTOR))
        return NULL;
    struct payload *p = pool_take(&payloads);
    p->users = 1;
    memcpy(p->bytes, bytes, SIM_SECTOR);
    return p;
}

static struct payload *payload_ref(struct payload *p)
{
    if (p)
        p->users++;
    return p;
}

static void payload_unref(struct payload *p)
{
    if (p && !--p->users)
        pool_give(&payloads, p);
}

/* *AT holds P from now on, too. */
static void payload_set(struct payload **at, struct payload *p)
{
    payload_ref(p);
    payload_unref(*at);
    *at = p;
}

static void payload_read(const struct payload *p, void *to, size_t in, size_t n)
{
    if (p)
        memcpy(to, p->bytes + in, n);
    else
        memset(to, 0, n);
}

/* P, but N bytes from IN on are those of FROM, which are at the same place. A new reference. */
static struct payload *payload_with(struct payload *p, struct payload *from, size_t in, size_t n)
{
    uint8_t bytes[SIM_SECTOR];
    if (n == SIM_SECTOR)
        return payload_ref(from);
    payload_read(p, bytes, 0, SIM_SECTOR);
    payload_read(from, bytes + in, in, n);
    return payload_new(bytes);
}

static bool same(const struct payload *a, const struct payload *b)
{
    return a == b || (a && b && memcmp(a->bytes, b->bytes, SIM_SECTOR) == 0);
}

/* ---- parcels ---- */

struct parcel {
    uint64_t at;
    size_t n;
    struct payload *sectors[];
};

static size_t parcel_sectors(const struct parcel *p)
{
    return p->n ? (size_t)(div_round_up(p->at + p->n, SIM_SECTOR) - p->at / SIM_SECTOR) : 0;
}

struct parcel *parcel_new(const void *buf, size_t n, uint64_t at)
{
    size_t most = n / SIM_SECTOR + 2, k = 0;
    struct parcel *p = malloc(sizeof *p + most * sizeof(struct payload *));
    assert(p);
    p->at = at;
    p->n = n;
    for (size_t done = 0; done < n;) {
        uint64_t in = (at + done) % SIM_SECTOR;
        size_t here = min_u64(n - done, SIM_SECTOR - in);
        const uint8_t *from = (const uint8_t *)buf + done;
        uint8_t bytes[SIM_SECTOR];
        if (here < SIM_SECTOR) {
            memset(bytes, 0, sizeof bytes);
            memcpy(bytes + in, from, here);
            from = bytes;
        }
        p->sectors[k++] = payload_new(from);
        done += here;
    }
    return p;
}

void parcel_free(struct parcel *p)
{
    for (size_t k = p ? parcel_sectors(p) : 0; k--;)
        payload_unref(p->sectors[k]);
    free(p);
}

/* The piece of P that begins at AT, which is where one begins: its sector, place and length. */
static struct payload *piece(const struct parcel *p, uint64_t at, size_t *in, size_t *n)
{
    *in = at % SIM_SECTOR;
    *n = min_u64(p->at + p->n - at, SIM_SECTOR - *in);
    return p->sectors[at / SIM_SECTOR - p->at / SIM_SECTOR];
}

/* ---- files ---- */

struct inode *content_new(struct store *s, bool in_memory)
{
    struct inode *i = xnew(struct inode);
    i->store = s;
    i->number = s->next_inode++;
    i->in_memory = in_memory;
    i->birth_ns = s->wall_ns;
    i->times = i->durable_times = (struct times){s->wall_ns, s->wall_ns};
    TAILQ_INIT(&i->locks);
    TAILQ_INIT(&i->dirty);
    TAILQ_INSERT_TAIL(&s->inodes, i, link);
    return i;
}

static void forget_versions(struct sector *sec, uint64_t upto)
{
    struct version *v;
    while ((v = sec->versions) && v->order < upto) {
        sec->versions = v->newer;
        payload_unref(v->payload);
        pool_give(&versions, v);
    }
}

/* It has no versions any more. */
static void clean(struct inode *i, struct sector *sec)
{
    TAILQ_REMOVE(&i->dirty, sec, link);
    i->sectors[sec->number] = NULL;
    pool_give(&sectors, sec);
}

void content_free(struct inode *i)
{
    for (size_t k = 0; k < i->n_blocks; k++)
        i->store->free_blocks += i->blocks[k] != BLOCK_HOLE;
    i->store->free_memory += (int64_t)i->capacity;
    struct sector *sec;
    while ((sec = TAILQ_FIRST(&i->dirty))) {
        forget_versions(sec, UINT64_MAX);
        clean(i, sec);
    }
    for (size_t k = 0; k < i->n_sectors; k++) {
        payload_unref(i->now[k]);
        payload_unref(i->durable[k]);
    }
    while (!TAILQ_EMPTY(&i->locks)) {
        struct lock *l = TAILQ_FIRST(&i->locks);
        TAILQ_REMOVE(&i->locks, l, link);
        free(l);
    }
    TAILQ_REMOVE(&i->store->inodes, i, link);
    free(i->now);
    free(i->durable);
    free(i->sectors);
    free(i->blocks);
    free(i->resizings);
    free(i->bytes);
    free(i);
}

static void *grown(void *row, size_t *n, size_t want, size_t size)
{
    if (want <= *n)
        return row;
    size_t more = max_u64(want, *n * 2);
    row = realloc(row, more * size);
    assert(row);
    memset((char *)row + *n * size, 0, (more - *n) * size);
    *n = more;
    return row;
}

/* There are N sectors, at the least. */
static void reach(struct inode *i, size_t n)
{
    i->now = grown(i->now, &i->n_now, n, sizeof *i->now);
    i->durable = grown(i->durable, &i->n_durable, n, sizeof(struct payload *));
    i->sectors = grown(i->sectors, &i->n_sectors, n, sizeof *i->sectors);
}

static void modified(struct inode *i)
{
    i->times.mtime_ns = i->times.ctime_ns = i->store->wall_ns;
}

/* ---- blocks ---- */

/* Takes blocks for [at, at+n); how many bytes from AT have theirs. */
static uint64_t take_blocks(struct inode *i, uint64_t at, uint64_t n, uint8_t kind)
{
    uint64_t end = at + n;
    i->blocks = grown(i->blocks, &i->n_blocks, div_round_up(end, SIM_BLOCK), 1);
    for (uint64_t b = at / SIM_BLOCK; b * SIM_BLOCK < end; b++) {
        if (i->blocks[b] == BLOCK_HOLE) {
            if (i->store->free_blocks <= 0)
                return b * SIM_BLOCK > at ? b * SIM_BLOCK - at : 0;
            i->store->free_blocks--;
        }
        i->blocks[b] = (uint8_t)max_u64(i->blocks[b], kind);
    }
    return n;
}

static void give_blocks(struct inode *i, uint64_t at, uint64_t end)
{
    for (uint64_t b = div_round_up(at, SIM_BLOCK); b < i->n_blocks && (b + 1) * SIM_BLOCK <= end;
         b++) {
        i->store->free_blocks += i->blocks[b] != BLOCK_HOLE;
        i->blocks[b] = BLOCK_HOLE;
    }
}

/* A hole that the power has undone: its block is taken, whether there is room or not. */
static void written_again(struct inode *i, uint64_t b)
{
    i->blocks = grown(i->blocks, &i->n_blocks, b + 1, 1);
    i->store->free_blocks -= i->blocks[b] == BLOCK_HOLE;
    i->blocks[b] = BLOCK_WRITTEN;
}

/* ---- sectors ---- */

/* Steals the reference. */
static void put(struct inode *i, size_t number, struct payload *p, bool direct)
{
    struct sector *sec = i->sectors[number];
    if (!sec) {
        i->sectors[number] = sec = pool_take(&sectors);
        *sec = (struct sector){.number = (uint32_t)number};
        TAILQ_INSERT_TAIL(&i->dirty, sec, link);
    }
    struct version *v = pool_take(&versions), **last = &sec->versions;
    while (*last)
        last = &(*last)->newer;
    *v = (struct version){.order = store_moment(i->store), .payload = p};
    *last = v;
    payload_set(&i->now[number], p);
    sec->direct = direct;
}

static void zero_range(struct inode *i, uint64_t at, uint64_t end)
{
    for (uint64_t s = at / SIM_SECTOR; s < i->n_sectors && s * SIM_SECTOR < end; s++) {
        uint64_t from = max_u64(at, s * SIM_SECTOR), to = min_u64(end, (s + 1) * SIM_SECTOR);
        struct payload *now = i->now[s];
        size_t in = from % SIM_SECTOR, n = to - from;
        bool differs = now && isal_zero_detect(now->bytes + in, (int)n);
        if (differs || i->sectors[s])
            put(i, s, payload_with(now, NULL, in, n), false);
    }
}

static void set_size(struct inode *i, uint64_t size)
{
    if (size == i->size)
        return;
    i->resizings = realloc(i->resizings, (i->n_resizings + 1) * sizeof *i->resizings);
    assert(i->resizings);
    i->resizings[i->n_resizings++] = (struct resizing){store_moment(i->store), size};
    i->size = size;
}

/* ---- tmpfs ---- */

static int memory_reserve(struct inode *i, uint64_t n)
{
    if (n <= i->capacity)
        return 0;
    n = align_up(n, SIM_BLOCK);
    if ((int64_t)(n - i->capacity) > i->store->free_memory)
        return -ENOSPC;
    if (i->mapped) {
        fprintf(stderr, "sim: a file on tmpfs grows while it is mapped: not simulated\n");
        abort();
    }
    i->store->free_memory -= (int64_t)(n - i->capacity);
    i->bytes = realloc(i->bytes, n);
    assert(i->bytes);
    memset(i->bytes + i->capacity, 0, n - i->capacity);
    i->capacity = n;
    return 0;
}

int inode_map(struct inode *i, size_t n, void **ret)
{
    if (!i->in_memory || align_up(i->size, SIM_BLOCK) < n || i->capacity < n)
        return -ENODEV; /* not simulated: what would be a SIGBUS later, and maps of disk files */
    i->mapped++;
    *ret = i->bytes;
    return 0;
}

/* ---- reading and writing ---- */

size_t inode_read(struct inode *i, void *buf, size_t n, uint64_t at)
{
    uint8_t *to = buf;
    if (at >= i->size)
        return 0;
    n = min_u64(n, i->size - at);
    if (i->in_memory) {
        size_t have = at < i->capacity ? min_u64(n, i->capacity - at) : 0;
        memcpy(to, i->bytes + at, have);
        memset(to + have, 0, n - have);
        return n;
    }
    for (uint64_t end = at + n; at < end;) {
        uint64_t s = at / SIM_SECTOR, next = min_u64(end, (s + 1) * SIM_SECTOR);
        if (s < i->n_sectors && i->now[s]) {
            memcpy(to, i->now[s]->bytes + at % SIM_SECTOR, next - at);
        } else {
            while (next < end && (++s >= i->n_sectors || !i->now[s]))
                next = min_u64(end, next + SIM_SECTOR);
            memset(to, 0, next - at);
        }
        to += next - at;
        at = next;
    }
    return n;
}

static int64_t write_memory(struct inode *i, const struct parcel *p)
{
    uint64_t end = p->at + p->n;
    int r = memory_reserve(i, end);
    if (r < 0)
        return r;
    for (uint64_t at = p->at; at < end;) {
        size_t in, here;
        struct payload *from = piece(p, at, &in, &here);
        payload_read(from, i->bytes + at, in, here);
        at += here;
    }
    i->size = max_u64(i->size, end);
    modified(i);
    return (int64_t)p->n;
}

bool inode_unreadable(const struct inode *i, uint64_t at, uint64_t n)
{
    const uint64_t bad = (i->bad_sector - 1) * SIM_SECTOR;
    return i->bad_sector && at < bad + SIM_SECTOR && at + n > bad;
}

int64_t inode_write_parcel(struct inode *i, const struct parcel *p, bool direct,
                           struct choices *lands)
{
    if (i->in_memory)
        return write_memory(i, p);
    uint64_t have = take_blocks(i, p->at, p->n, BLOCK_WRITTEN);
    if (!have && p->n)
        return -ENOSPC;
    uint64_t end = p->at + min_u64(p->n, have);
    reach(i, div_round_up(end, SIM_SECTOR));
    for (uint64_t at = p->at; at < end;) {
        size_t in, here;
        struct payload *from = piece(p, at, &in, &here);
        here = min_u64(here, end - at);
        uint64_t s = at / SIM_SECTOR;
        struct payload *after = payload_with(i->now[s], from, in, here);
        if (!lands || (lands->exhaustive && at + here <= i->size && same(after, i->now[s])) ||
            choose_lands(lands)) {
            put(i, s, after, direct);
            if (i->bad_sector == s + 1)
                i->bad_sector = 0;
            if (at + here > i->size)
                set_size(i, at + here);
            modified(i);
        } else {
            payload_unref(after);
        }
        at += here;
    }
    return (int64_t)(end - p->at);
}

int64_t inode_write(struct inode *i, const void *buf, size_t n, uint64_t at, bool direct,
                    struct choices *lands)
{
    struct parcel *p = parcel_new(buf, n, at);
    int64_t r = inode_write_parcel(i, p, direct, lands);
    parcel_free(p);
    return r;
}

int inode_resize(struct inode *i, uint64_t size)
{
    if (i->in_memory) {
        int r = memory_reserve(i, size);
        if (r < 0)
            return r;
        if (size < i->size)
            memset(i->bytes + size, 0, i->size - size);
        i->size = size;
    } else if (size < i->size) {
        uint64_t old = i->size;
        set_size(i, size);
        zero_range(i, size, old);
        give_blocks(i, size, UINT64_MAX - SIM_BLOCK);
    } else {
        set_size(i, size);
    }
    modified(i);
    return 0;
}

int inode_allocate(struct inode *i, int mode, uint64_t at, uint64_t n)
{
    uint64_t end = at + n;
    bool grows = !(mode & FALLOC_FL_KEEP_SIZE) && end > i->size;
    if (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        return -EOPNOTSUPP;
    if (i->in_memory) {
        int r = memory_reserve(i, mode & FALLOC_FL_PUNCH_HOLE ? 0 : end);
        if (r < 0)
            return r;
        if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE) && at < i->capacity)
            memset(i->bytes + at, 0, min_u64(end, i->capacity) - at);
        i->size = grows ? end : i->size;
        modified(i);
        return 0;
    }
    if (mode & FALLOC_FL_PUNCH_HOLE) {
        zero_range(i, at, end);
        give_blocks(i, at, end);
    } else {
        if (take_blocks(i, at, n, BLOCK_RESERVED) < n)
            return -ENOSPC;
        if (mode & FALLOC_FL_ZERO_RANGE) {
            zero_range(i, at, end);
            for (uint64_t b = div_round_up(at, SIM_BLOCK); (b + 1) * SIM_BLOCK <= end; b++)
                i->blocks[b] = BLOCK_RESERVED;
        }
    }
    if (grows)
        set_size(i, end);
    modified(i);
    return 0;
}

int64_t inode_seek(struct inode *i, uint64_t at, int whence)
{
    if (whence == SEEK_END)
        return (int64_t)(i->size + at);
    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return -EINVAL;
    if (at >= i->size)
        return -ENXIO;
    if (i->in_memory)
        return (int64_t)(whence == SEEK_DATA ? at : i->size);
    while (at < i->size) {
        bool data = at / SIM_BLOCK < i->n_blocks && i->blocks[at / SIM_BLOCK] == BLOCK_WRITTEN;
        if (data == (whence == SEEK_DATA))
            return (int64_t)at;
        at = align_down(at, SIM_BLOCK) + SIM_BLOCK;
    }
    return whence == SEEK_HOLE ? (int64_t)i->size : -ENXIO;
}

/* ---- syncing ---- */

static void sync_sector(struct inode *i, struct sector *sec, uint64_t upto)
{
    for (struct version *v = sec->versions; v && v->order < upto; v = v->newer)
        payload_set(&i->durable[sec->number], v->payload);
    forget_versions(sec, upto);
    if (!sec->versions)
        clean(i, sec);
}

static void sync_size(struct inode *i, uint64_t upto)
{
    size_t n = 0;
    while (n < i->n_resizings && i->resizings[n].order < upto)
        i->durable_size = i->resizings[n++].size;
    if (!n)
        return;
    i->n_resizings -= n;
    memmove(i->resizings, i->resizings + n, i->n_resizings * sizeof *i->resizings);
    i->durable_times = i->times;
}

void inode_sync(struct inode *i, uint64_t upto, bool with_times)
{
    struct sector *sec, *next;
    for (sec = TAILQ_FIRST(&i->dirty); sec; sec = next) {
        next = TAILQ_NEXT(sec, link);
        sync_sector(i, sec, upto);
    }
    sync_size(i, upto);
    if (with_times)
        i->durable_times = i->times;
}

void inode_sync_range(struct inode *i, uint64_t at, size_t n, uint64_t upto)
{
    for (uint64_t s = at / SIM_SECTOR; s * SIM_SECTOR < at + n && s < i->n_sectors; s++)
        if (i->sectors[s])
            sync_sector(i, i->sectors[s], upto);
    sync_size(i, upto);
}

void inode_sync_failed(struct inode *i, uint64_t upto)
{
    struct sector *sec, *next;
    bool to_lose = i->n_resizings > 0;
    for (sec = TAILQ_FIRST(&i->dirty); sec; sec = next) {
        uint32_t n = 0;
        struct version *v;
        struct payload **now = &i->now[sec->number], **durable = &i->durable[sec->number];
        next = TAILQ_NEXT(sec, link);
        for (v = sec->versions; v && v->order < upto; v = v->newer)
            n++;
        to_lose |= n > 0;
        uint32_t which = choose_survivor(i->store->choices, n);
        for (v = sec->versions; which; which--, v = v->newer)
            payload_set(durable, v->payload);
        forget_versions(sec, upto);
        if (sec->versions)
            continue;
        if (sec->direct || choose(i->store->choices, 2))
            payload_set(now, *durable); /* the page is dropped */
        clean(i, sec);
    }
    i->syncs_failed += to_lose;
}

/* ---- the power goes ---- */

static size_t surviving_sizes(const struct inode *i, struct choices *c)
{
    size_t n = choose_survivor(c, (uint32_t)i->n_resizings);
    if (n && !c->exhaustive && c->lands_percent < 100)
        n = choose(c, (uint32_t)i->n_resizings + 1);
    return n;
}

/* One of those of different content: HAVE, or a version between FROM and TO. */
static struct payload *one_of_all(struct choices *c, const struct sector *sec, uint64_t from,
                                  uint64_t to, struct payload *have)
{
    enum { MOST = 32 };
    struct payload *all[MOST] = {have};
    uint32_t n = 1;
    for (const struct version *v = sec->versions; v; v = v->newer) {
        bool known = v->order <= from || v->order >= to;
        for (uint32_t k = 0; k < n && !known; k++)
            known = same(all[k], v->payload);
        if (known)
            continue;
        assert(n < MOST);
        all[n++] = v->payload;
    }
    return all[choose(c, n)];
}

/* What the medium has of a sector, when the first SIZES changes of the size are there. */
static struct payload *survivor(const struct inode *i, const struct sector *sec, size_t sizes,
                                struct choices *c)
{
    uint64_t from = 0, to = UINT64_MAX; /* the orders that can be there */
    uint64_t at = (uint64_t)sec->number * SIM_SECTOR, before = i->durable_size;
    struct payload *survives = i->durable[sec->number];
    for (size_t k = 0; k < i->n_resizings; k++) {
        bool cuts = i->resizings[k].size <= at && before > at;
        before = i->resizings[k].size;
        if (cuts && k < sizes) {
            from = i->resizings[k].order;
            survives = NULL;
        } else if (cuts) {
            to = min_u64(to, i->resizings[k].order);
        }
    }
    uint64_t size = sizes ? i->resizings[sizes - 1].size : i->durable_size;
    if (c->exhaustive) /* what is behind the end is nothing, whatever it was */
        return size <= at ? NULL : one_of_all(c, sec, from, to, survives);
    uint32_t n = 0;
    struct version *v;
    for (v = sec->versions; v; v = v->newer)
        n += v->order > from && v->order < to;
    uint32_t which = choose_survivor(c, n);
    for (v = sec->versions; which; v = v->newer)
        if (v->order > from && v->order < to && --which == 0)
            survives = v->payload;
    return survives;
}

uint8_t *inode_imagine(const struct inode *i, const struct parcel *const *writes, size_t n_writes,
                       struct choices *c, uint64_t *size)
{
    size_t sizes = surviving_sizes(i, c);
    *size = sizes ? i->resizings[sizes - 1].size : i->durable_size;
    uint8_t *bytes = malloc(align_up(*size, SIM_SECTOR) + SIM_SECTOR);
    assert(bytes);
    uint64_t done = 0; /* runs of zeroes are cleared at once */
    for (size_t k = 0; k < i->n_sectors && k * SIM_SECTOR < *size; k++) {
        const struct payload *p =
            i->sectors[k] ? survivor(i, i->sectors[k], sizes, c) : i->durable[k];
        if (!p)
            continue;
        memset(bytes + done, 0, k * SIM_SECTOR - done);
        memcpy(bytes + k * SIM_SECTOR, p->bytes, SIM_SECTOR);
        done = (k + 1) * SIM_SECTOR;
    }
    if (done < *size)
        memset(bytes + done, 0, *size - done);
    for (size_t w = 0; w < n_writes; w++)
        for (uint64_t at = writes[w]->at, end = at + writes[w]->n; at < end && at < *size;) {
            size_t in, here;
            const struct payload *p = piece(writes[w], at, &in, &here);
            if (choose_lands(c))
                payload_read(p, bytes + at, in, here);
            at += here;
        }
    memset(bytes + *size, 0, align_up(*size, SIM_SECTOR) + SIM_SECTOR - *size);
    return bytes;
}

void content_lose_power(struct inode *i)
{
    struct choices *c = i->store->choices;
    struct sector *sec;
    size_t sizes = surviving_sizes(i, c);

    while ((sec = TAILQ_FIRST(&i->dirty))) {
        payload_set(&i->durable[sec->number], survivor(i, sec, sizes, c));
        forget_versions(sec, UINT64_MAX);
        clean(i, sec);
    }
    for (size_t k = 0; k < sizes; k++)
        i->durable_size = i->resizings[k].size;
    i->n_resizings = 0;
    i->size = i->durable_size;
    for (size_t k = 0; k < i->n_sectors; k++) {
        if ((k + 1) * SIM_SECTOR > i->size && i->durable[k]) {
            uint64_t keep = max_u64(i->size, k * SIM_SECTOR) - k * SIM_SECTOR;
            struct payload *cut = payload_with(i->durable[k], NULL, keep, SIM_SECTOR - keep);
            payload_unref(i->durable[k]);
            i->durable[k] = cut;
        }
        payload_set(&i->now[k], i->durable[k]);
        if (i->now[k])
            written_again(i, k / (SIM_BLOCK / SIM_SECTOR));
    }
    bool differ = i->times.mtime_ns != i->durable_times.mtime_ns ||
                  i->times.ctime_ns != i->durable_times.ctime_ns;
    if ((differ || !c->exhaustive) && choose_lands(c))
        i->durable_times = i->times;
    i->times = i->durable_times;
}

/* ---- asking ---- */

static struct statx_timestamp stamp(uint64_t ns)
{
    return (struct statx_timestamp){.tv_sec = (int64_t)(ns / NSEC_PER_SEC),
                                    .tv_nsec = (uint32_t)(ns % NSEC_PER_SEC)};
}

void inode_stat(struct inode *i, struct statx *ret)
{
    struct dir *d;
    struct name *n;
    *ret = (struct statx){
        .stx_mask = STATX_BASIC_STATS | STATX_BTIME,
        .stx_mode = S_IFREG | 0600,
        .stx_blksize = SIM_BLOCK,
        .stx_ino = i->number,
        .stx_size = i->size,
        .stx_dev_major = i->in_memory ? 0 : 254,
        .stx_dev_minor = 1,
        .stx_btime = stamp(i->birth_ns),
        .stx_mtime = stamp(i->times.mtime_ns),
        .stx_ctime = stamp(i->times.ctime_ns),
        .stx_atime = stamp(i->birth_ns),
        .stx_blocks = i->capacity / 512,
    };
    for (size_t b = 0; b < i->n_blocks; b++)
        ret->stx_blocks += i->blocks[b] != BLOCK_HOLE ? SIM_BLOCK / 512 : 0;
    TAILQ_FOREACH (d, &i->store->dirs, link)
        TAILQ_FOREACH (n, &d->names, link)
            ret->stx_nlink += n->now == i;
}

uint8_t *inode_dump(struct inode *i, uint64_t *size)
{
    uint8_t *bytes = malloc(i->size + 1);
    assert(bytes);
    *size = inode_read(i, bytes, i->size, 0);
    bytes[*size] = 0;
    return bytes;
}
