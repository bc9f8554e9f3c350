/* Metadata from memory to the file, in the order that qcow2.h draws.
 *
 * Everything that is dirty is copied at one instant, without a wait in between, and only the copies
 * are written. Requests go on meanwhile and make slices dirty again: what they change is for the
 * next round, so an entry made after the instant cannot reach the disk before its refcount, which
 * was raised after the instant, too. A copy's slot is `writing` until the round ends and is not
 * evicted: the disk has not got its content yet.
 *
 * When a write or flush fails, all copies of the round are dirty again and the frees wait on: the
 * next round begins from step 1. */
#include "block/qcow2/qcow2.h"

#include "base/broken.h"
#include "base/log.h"

#include <stdio.h>

enum { MERGE_BYTES = 1 << 20, WRITERS = 8 };

/* ---- tables in memory ---- */

int table_alloc(struct table *t, uint32_t n)
{
    uint64_t *entries = calloc(n ? n : 1, sizeof *entries);
    uint64_t *dirty = calloc(n / ENTRIES_PER_SECTOR / 64 + 1, sizeof *dirty);
    if (!entries || !dirty) {
        free(entries);
        free(dirty);
        return -ENOMEM;
    }
    *t = (struct table){.entries = entries, .dirty = dirty, .n = n};
    return 0;
}

void table_free(struct table *t)
{
    free(t->entries);
    free(t->dirty);
    *t = (struct table){0};
}

static void mark_sector(struct table *t, uint32_t sector)
{
    t->dirty[sector / 64] |= (uint64_t)1 << sector % 64;
    t->any_dirty = true;
}

void table_set(struct table *t, uint32_t index, uint64_t value)
{
    t->entries[index] = value;
    mark_sector(t, index / ENTRIES_PER_SECTOR);
}

/* ---- copies ---- */

struct copy {
    uint64_t offset;
    uint8_t *data;
    uint64_t length;
};

/* Pieces in ascending order in one buffer, neighbours merged into one write. */
struct copies {
    struct copy *items;
    size_t n;
    uint8_t *data;
    struct cache_slot **slots; /* of a cache */
    size_t n_slots;
    uint32_t *sectors; /* of a table */
    size_t n_sectors;
};

static void copies_free(struct copies *c)
{
    free(c->items);
    free(c->data);
    free(c->slots);
    free(c->sectors);
}

static void append(struct copies *c, uint64_t offset, uint8_t *at, uint64_t length)
{
    struct copy *last = c->n ? &c->items[c->n - 1] : NULL;
    if (last && last->offset + last->length == offset && last->length < MERGE_BYTES)
        last->length += length;
    else
        c->items[c->n++] = (struct copy){offset, at, length};
}

static int by_offset(const void *a, const void *b)
{
    uint64_t x = (*(struct cache_slot *const *)a)->offset;
    uint64_t y = (*(struct cache_slot *const *)b)->offset;
    return x < y ? -1 : x > y;
}

static int copy_cache(struct cache *c, struct copies *out)
{
    if (!c->n_dirty)
        return 0;
    out->slots = malloc(c->n_dirty * sizeof *out->slots);
    out->items = malloc(c->n_dirty * sizeof *out->items);
    out->data = block_buffer((size_t)c->n_dirty * c->slice_bytes);
    if (!out->slots || !out->items || !out->data)
        return -ENOMEM;
    struct cache_slot *s;
    TAILQ_FOREACH (s, &c->dirty, dirty)
        out->slots[out->n_slots++] = s;
    qsort(out->slots, out->n_slots, sizeof *out->slots, by_offset);
    uint8_t *at = out->data;
    for (size_t i = 0; i < out->n_slots; i++) {
        s = out->slots[i];
        memcpy(at, s->data, c->slice_bytes);
        append(out, s->offset, at, c->slice_bytes);
        at += c->slice_bytes;
        cache_mark_clean(c, s);
        s->writing++;
    }
    return 0;
}

static int copy_table(struct table *t, struct copies *out)
{
    if (!t->any_dirty)
        return 0;
    uint32_t sectors = (t->n + ENTRIES_PER_SECTOR - 1) / ENTRIES_PER_SECTOR, n = 0;
    for (uint32_t i = 0; i < sectors; i++)
        n += t->dirty[i / 64] >> i % 64 & 1;
    out->sectors = malloc((n + 1) * sizeof *out->sectors);
    out->items = malloc((n + 1) * sizeof *out->items);
    out->data = block_buffer((size_t)(n + 1) * SECTOR);
    if (!out->sectors || !out->items || !out->data)
        return -ENOMEM;
    uint8_t *at = out->data;
    for (uint32_t i = 0; i < sectors; i++) {
        if (!(t->dirty[i / 64] >> i % 64 & 1))
            continue;
        uint32_t first = i * ENTRIES_PER_SECTOR;
        uint32_t count = t->n - first < ENTRIES_PER_SECTOR ? t->n - first : ENTRIES_PER_SECTOR;
        memset(at, 0, SECTOR); /* the rest of the table's last cluster is the table's, too */
        for (uint32_t j = 0; j < count; j++)
            entry_store(at, j, t->entries[first + j]);
        append(out, t->offset + (uint64_t)i * SECTOR, at, SECTOR);
        out->sectors[out->n_sectors++] = i;
        at += SECTOR;
        t->dirty[i / 64] &= ~((uint64_t)1 << i % 64);
    }
    t->any_dirty = false;
    return 0;
}

static void cache_copies_done(struct cache *c, struct copies *out, bool failed)
{
    for (size_t i = 0; i < out->n_slots; i++) {
        if (failed)
            cache_mark_dirty(c, out->slots[i]);
        out->slots[i]->writing--;
    }
    if (out->n_slots)
        waitq_wake_all(&c->changed);
}

static void table_copies_done(struct table *t, struct copies *out, bool failed)
{
    for (size_t i = 0; failed && i < out->n_sectors; i++)
        mark_sector(t, out->sectors[i]);
}

struct writers {
    struct qcow2 *q;
    struct copies *copies;
    enum metadata_kind kind;
    enum debug_event event;
    size_t next;
};

static int write_some(void *arg)
{
    SHIELD();
    struct writers *w = arg;
    while (w->next < w->copies->n) {
        struct copy *c = &w->copies->items[w->next++];
        /* L1 and refcount table lie where the header says; their own range is not asked about. */
        int r = w->kind == META_NONE ? 0 : qcow2_check_overlap(w->q, c->offset, c->length, w->kind);
        file_event(w->q, w->event);
        if (r == 0)
            r = file_write(w->q, c->offset, c->data, c->length);
        if (r < 0)
            return r;
    }
    return 0;
}

static int write_copies(struct qcow2 *q, struct copies *c, enum metadata_kind kind,
                        enum debug_event event)
{
    struct writers w = {q, c, kind, event, 0};
    if (c->n <= 2 || graph_lock_is_mine(q->node->graph))
        return write_some(&w);
    SCOPE(writers);
    for (size_t i = 0; i < WRITERS && i < c->n; i++)
        scope_spawn(&writers, write_some, &w);
    return scope_join(&writers);
}

/* ---- step 5 ---- */

void qcow2_free_later(struct qcow2 *q, uint64_t offset, uint64_t length, enum free_type type)
{
    uint64_t first = align_down(offset, q->cluster_size);
    uint64_t clusters = clusters_of(q, offset + length - first);
    struct freed_list *l = &q->freed;
    q->freed_clusters += clusters;
    struct freed *last = l->n ? &l->items[l->n - 1] : NULL;
    if (last && last->type == type && last->offset + (last->clusters << q->cluster_bits) == first) {
        last->clusters += clusters;
        return;
    }
    if (l->n == l->capacity) {
        size_t capacity = l->capacity ? l->capacity * 2 : 64;
        struct freed *items = realloc(l->items, capacity * sizeof *items);
        if (!items)
            return; /* a leak in the image, and nothing worse */
        l->items = items;
        l->capacity = capacity;
    }
    l->items[l->n++] = (struct freed){first, clusters, (uint8_t)type};
}

static void free_now(struct qcow2 *q, const struct freed *f)
{
    uint64_t cluster = f->offset >> q->cluster_bits;
    bool pass = f->type == FREE_REQUEST && q->request_as_node ? q->node->discard_unmap
                                                              : q->pass_discard[f->type];

    file_event(q, DEBUG_cluster_free);
    for (uint64_t i = 0; i < f->clusters;) {
        /* Discard those whose last reference this is, while nobody can take them yet. */
        uint64_t run = 0;
        uint16_t count;
        while (pass && i + run < f->clusters && refcount_get(q, cluster + i + run, &count) == 0 &&
               count == 1)
            run++;
        if (run) {
            struct range r = range_make((cluster + i) << q->cluster_bits, run << q->cluster_bits);
            int ignored = edge_discard(q->file, r); /* advice */
            (void)ignored;
        } else {
            run = pass ? 1 : f->clusters;
        }
        int r = refcount_add(q, cluster + i, run, -1);
        if (r < 0)
            log_warning("qcow2 '%s': %llu clusters at %#llx are leaked: %s", node_name(q->node),
                        (unsigned long long)run, (unsigned long long)f->offset, strerror(-r));
        i += run;
    }
}

static void free_taken(struct qcow2 *q, struct freed_list *taken)
{
    /* Requests that found the clusters in an entry before it was changed may still read or write
     * them. They wait for nothing but that, so this ends. */
    unsigned old = q->epoch;
    q->epoch ^= 1;
    while (q->in_epoch[old]) {
        if (waitq_wait(&q->epoch_left) < 0)
            continue;
    }
    q->compressed_at = 0;
    for (size_t i = 0; i < taken->n; i++)
        free_now(q, &taken->items[i]);
    free(taken->items);
    *taken = (struct freed_list){0};
}

/* ---- the header ---- */

/* What is written from now on is where the header in memory says. */
static int settle_header(struct qcow2 *q)
{
    if (!q->header_unsure)
        return 0;
    int r = qcow2_write_header(q);
    if (r == 0)
        r = file_flush(q);
    if (r == 0)
        q->header_unsure = false;
    return r;
}

void qcow2_take_header_back(struct qcow2 *q)
{
    if (BROKEN(failed_header_stands) || qcow2_unusable(q))
        return;
    q->header_unsure = true;
    (void)!settle_header(q);
}

/* ---- a round ---- */

/* Evictions belong to step 1, and none may arrive after a newer copy of its slice. One that fails
 * leaves that dirty. */
static void wait_for_lone_writes(struct cache *c)
{
    while (c->alone && !BROKEN(lone_writes_not_awaited))
        if (waitq_wait(&c->changed) < 0)
            break;
}

static int one_round(struct qcow2 *q)
{
    struct copies refcounts = {0}, reftable = {0}, l2 = {0}, l1 = {0};
    struct freed_list taken;
    int r;

    wait_for_lone_writes(&q->refcount_cache);
    {
        NOSUSPEND(); /* the instant */
        r = copy_cache(&q->refcount_cache, &refcounts);
        if (r == 0)
            r = copy_table(&q->reftable, &reftable);
        if (r == 0)
            r = copy_cache(&q->l2_cache, &l2);
        if (r == 0)
            r = copy_table(&q->l1, &l1);
        taken = q->freed;
        q->freed = (struct freed_list){0};
        q->freed_clusters = 0;
    }

    if (r == 0)
        r = write_copies(q, &refcounts, META_REFBLOCK, DEBUG_refblock_update_part);
    if (r == 0 && reftable.n) {
        r = BROKEN(reftable_before_its_blocks) ? 0 : file_flush(q);
        if (r == 0)
            r = write_copies(q, &reftable, META_NONE, DEBUG_refblock_alloc_hookup);
    }
    if (r == 0 && (l2.n || l1.n)) {
        r = BROKEN(l2_before_refcounts_and_data) ? 0 : file_flush(q);
        if (r == 0)
            r = write_copies(q, &l2, META_L2, DEBUG_l2_update);
    }
    if (r == 0 && l1.n) {
        r = l2.n ? file_flush(q) : 0;
        if (r == 0)
            r = write_copies(q, &l1, META_NONE, DEBUG_l1_update);
    }
    if (r == 0 && taken.n && !BROKEN(freed_while_referenced))
        r = file_flush(q);

    cache_copies_done(&q->refcount_cache, &refcounts, r < 0);
    cache_copies_done(&q->l2_cache, &l2, r < 0);
    table_copies_done(&q->reftable, &reftable, r < 0);
    table_copies_done(&q->l1, &l1, r < 0);
    copies_free(&refcounts);
    copies_free(&reftable);
    copies_free(&l2);
    copies_free(&l1);

    if (r == 0) {
        if (taken.n)
            free_taken(q, &taken);
        return 0;
    }
    for (size_t i = 0; i < taken.n; i++)
        qcow2_free_later(q, taken.items[i].offset, taken.items[i].clusters << q->cluster_bits,
                         (enum free_type)taken.items[i].type);
    free(taken.items);
    return r;
}

int qcow2_writeback(struct qcow2 *q)
{
    SHIELD();
    uint64_t begun = q->writebacks_begun;
    LOCKED(&q->writeback_lock);
    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    /* A round that began after the call has written what the caller means. */
    if (q->writebacks_begun != begun && q->writeback_result == 0)
        return 0;
    q->writebacks_begun++;
    q->writeback_result = settle_header(q);
    if (q->writeback_result == 0)
        q->writeback_result = one_round(q);
    return q->writeback_result;
}

int qcow2_sync(struct qcow2 *q)
{
    int r = qcow2_writeback(q);
    return r < 0 ? r : file_flush(q);
}
