/* What the tests of the tide file share: random superblocks, and whether two are equal. */
#pragma once

#include "unit.h"

#include "persist/super.h"
#include "seed.h"

/* In a task cmocka's own assertions would jump to another stack. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #cond);                   \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_OK(call, err)                                                                        \
    do {                                                                                           \
        int check_result = (call);                                                                 \
        if (check_result < 0) {                                                                    \
            fprintf(stderr, "%s:%d: %d: %s\n", __FILE__, __LINE__, check_result, (err).text);      \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static inline struct tide_id some_id(struct rng *rng)
{
    struct tide_id id;
    for (size_t i = 0; i < sizeof id.bytes; i++)
        id.bytes[i] = (uint8_t)rng_next(rng);
    id.bytes[0] |= 1;
    return id;
}

/* A text of 1 to MAX bytes, short ones more often; with SERIAL in it, so that no two are equal. */
static inline char *some_text(struct rng *rng, size_t max, unsigned serial)
{
    size_t n = 12 + rng_below(rng, (max - 12) >> rng_below(rng, 10));
    char *text = xcalloc(max + 1, 1);
    for (size_t i = 0; i < n; i++)
        text[i] = (char)(1 + rng_below(rng, 255));
    snprintf(text, n, "%u", serial); /* ends here, or goes on below */
    text[strlen(text)] = 'x';
    return text;
}

static inline uint64_t next_extent(struct super *s, unsigned granularity_bits)
{
    uint64_t at = s->extents_end;
    uint64_t size = max_u64(s->size_bytes, s->resizing_bytes);
    s->extents_end += tide_extent_bytes(size, granularity_bits);
    return at;
}

static inline bool is_used(const struct tide_bitmap *b, unsigned extent)
{
    return extent == b->current.extent || (b->successor.epoch && extent == b->successor.extent);
}

static inline void some_bitmap(struct rng *rng, struct super *s, struct tide_bitmap *b,
                               unsigned serial)
{
    *b = (struct tide_bitmap){
        .name = some_text(rng, TIDE_NAME_MAX, serial),
        .granularity_bits = 9 + (unsigned)rng_below(rng, 23),
        .enabled = rng_below(rng, 2),
        .inconsistent = rng_below(rng, 2),
        .based = rng_below(rng, 2),
        .generation = rng_next(rng),
        .last_job = rng_below(rng, 2) ? some_text(rng, 200, serial) : NULL,
    };
    b->current = (struct tide_area){(unsigned)rng_below(rng, TIDE_EXTENTS), s->next_epoch++};
    if (rng_below(rng, 2)) {
        unsigned other = 1 + (unsigned)rng_below(rng, TIDE_EXTENTS - 1);
        b->successor =
            (struct tide_area){(b->current.extent + other) % TIDE_EXTENTS, s->next_epoch++};
    }
    for (unsigned e = 0; e < TIDE_EXTENTS; e++)
        if ((s->level == TIDE_POWER && is_used(b, e)) || rng_below(rng, 2))
            b->extent[e] = next_extent(s, b->granularity_bits);
}

static inline void some_table(struct rng *rng, struct super *s, struct tide_table *t, size_t n)
{
    t->items = xcalloc(n + 1, sizeof *t->items);
    for (t->n = 0; t->n < n; t->n++)
        some_bitmap(rng, s, &t->items[t->n], (unsigned)t->n);
}

static inline struct tide_member some_member(struct rng *rng)
{
    return (struct tide_member){some_id(rng), some_text(rng, 300, 0)};
}

/* One that may be written, of up to MOST bitmaps. */
static inline void some_super(struct rng *rng, struct super *s, size_t most)
{
    uint64_t size = rng_below(rng, UINT64_C(1) << (10 + rng_below(rng, 37)));
    *s = (struct super){
        .uuid = some_id(rng),
        .session = some_id(rng),
        .sequence = rng_next(rng) >> 2,
        .in_use = rng_below(rng, 2),
        .level = rng_below(rng, 2) ? TIDE_POWER : TIDE_PROCESS,
        .size_bytes = size,
        .resizing_bytes = rng_below(rng, 2) ? size : rng_below(rng, 2 * size + 1),
        .region_bits = 20 + (unsigned)rng_below(rng, 43),
        .slots = 4 + (uint32_t)rng_below(rng, TIDE_SLOTS_MAX - 3),
        .ring_sequence = rng_next(rng) >> 2,
        .next_epoch = 1 + (rng_next(rng) >> 2),
        .extents_end = TIDE_EXTENTS_OFFSET,
    };
    snprintf(s->driver, sizeof s->driver, "driver%llu", (unsigned long long)rng_next(rng));
    s->witness.kind = (enum witness_kind)rng_below(rng, 3);
    for (size_t i = 0; i < sizeof s->witness.boot; i++) {
        s->witness.boot[i] = (uint8_t)rng_next(rng);
        s->witness.filesystem[i] = (uint8_t)rng_next(rng);
    }
    s->witness.inode = rng_next(rng);
    s->witness.birth_ns = rng_next(rng);
    s->witness.size_bytes = rng_next(rng);
    s->witness.mtime_ns = rng_next(rng);
    s->witness.ctime_ns = rng_next(rng);
    s->witness.counted = rng_next(rng);
    s->witness.sectors = rng_next(rng);

    some_table(rng, s, &s->table, rng_below(rng, most + 1));
    if (rng_below(rng, 2)) { /* prepared: some of the same extents, some new ones */
        size_t kept = rng_below(rng, s->table.n + 1);
        s->group = some_id(rng);
        s->coordinator = some_member(rng);
        some_table(rng, s, &s->next, rng_below(rng, most + 1));
        for (size_t i = 0; i < kept && i < s->next.n; i++) {
            s->next.items[i].granularity_bits = s->table.items[i].granularity_bits;
            s->next.items[i].current.extent = s->table.items[i].current.extent;
            s->next.items[i].successor = (struct tide_area){0, 0};
            memcpy(s->next.items[i].extent, s->table.items[i].extent,
                   sizeof s->next.items[i].extent);
        }
    }
    s->n_records = rng_below(rng, 3);
    s->records = s->n_records ? xcalloc(s->n_records, sizeof *s->records) : NULL;
    for (size_t i = 0; i < s->n_records; i++) {
        struct tide_record *r = &s->records[i];
        r->group = some_id(rng);
        r->n = 1 + rng_below(rng, 3);
        r->members = xcalloc(r->n, sizeof *r->members);
        for (size_t k = 0; k < r->n; k++)
            r->members[k] = some_member(rng);
    }
}

static inline bool text_equal(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

static inline bool area_equal(const struct tide_area *a, const struct tide_area *b)
{
    return a->extent == b->extent && a->epoch == b->epoch;
}

static inline bool table_equal(const struct tide_table *a, const struct tide_table *b)
{
    for (size_t i = 0; i < a->n && a->n == b->n; i++) {
        const struct tide_bitmap *x = &a->items[i], *y = &b->items[i];
        if (!text_equal(x->name, y->name) || x->granularity_bits != y->granularity_bits ||
            x->enabled != y->enabled || x->inconsistent != y->inconsistent ||
            x->based != y->based || x->generation != y->generation ||
            !text_equal(x->last_job, y->last_job) ||
            memcmp(x->extent, y->extent, sizeof x->extent) != 0 ||
            !area_equal(&x->current, &y->current) || !area_equal(&x->successor, &y->successor))
            return false;
    }
    return a->n == b->n;
}

static inline bool member_equal(const struct tide_member *a, const struct tide_member *b)
{
    return tide_id_equal(&a->uuid, &b->uuid) && text_equal(a->path, b->path);
}

static inline bool witness_equal(const struct witness *a, const struct witness *b)
{
    return a->kind == b->kind && memcmp(a->boot, b->boot, sizeof a->boot) == 0 &&
           memcmp(a->filesystem, b->filesystem, sizeof a->filesystem) == 0 &&
           a->inode == b->inode && a->birth_ns == b->birth_ns && a->size_bytes == b->size_bytes &&
           a->mtime_ns == b->mtime_ns && a->ctime_ns == b->ctime_ns && a->counted == b->counted &&
           a->sectors == b->sectors;
}

static inline bool super_equal(const struct super *a, const struct super *b)
{
    if (!tide_id_equal(&a->uuid, &b->uuid) || !tide_id_equal(&a->session, &b->session) ||
        a->sequence != b->sequence || a->in_use != b->in_use || a->level != b->level ||
        a->size_bytes != b->size_bytes || a->resizing_bytes != b->resizing_bytes ||
        a->region_bits != b->region_bits || a->slots != b->slots ||
        a->ring_sequence != b->ring_sequence || a->next_epoch != b->next_epoch ||
        a->extents_end != b->extents_end || strcmp(a->driver, b->driver) != 0 ||
        !witness_equal(&a->witness, &b->witness) || !table_equal(&a->table, &b->table) ||
        !tide_id_equal(&a->group, &b->group) || !member_equal(&a->coordinator, &b->coordinator) ||
        !table_equal(&a->next, &b->next) || a->n_records != b->n_records)
        return false;
    for (size_t i = 0; i < a->n_records; i++) {
        const struct tide_record *x = &a->records[i], *y = &b->records[i];
        if (!tide_id_equal(&x->group, &y->group) || x->n != y->n)
            return false;
        for (size_t k = 0; k < x->n; k++)
            if (!member_equal(&x->members[k], &y->members[k]))
                return false;
    }
    return true;
}
