/* Changes of state, sessions, and the write path of a kept disk. See keeper.h.
 *
 * Order on disk (DESIGN.md section 6), each point a history that loses a write if it is turned
 * round:
 *
 *     epochs reserved -> area written under one     a cut between would let the next life use the
 *                                                   same epoch again: old sectors would look new
 *     area written -> superblock that names it      or a set is empty where it must be dirty
 *     superblock that names it -> marks go there    the node is quiesced meanwhile
 *     segment made -> superblock that names it      a kill between finds no words for a named epoch
 *     superblock -> segments that it dropped go     or a kill finds nothing for what is still named
 *     superblock says in use -> data                or a foreign writer looks like us
 *     image flushed -> witness -> superblock clean  or the witness is of a time before our writes
 */
#include "persist/keeper.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/file.h"
#include "persist/keeper_internal.h"
#include "rt/clock.h"

#include <inttypes.h>
#include <stdio.h>

/* So many epochs are reserved by each superblock. */
enum { EPOCHS_AHEAD = 1024 };

/* ---- sets ---- */

static struct kept_set *set_of(const struct keeper *k, const struct bitmap *bits)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (s->bits == bits)
            return s;
    return NULL;
}

/* The set under EPOCH, which is one of the superblock's; NULL: none, or gone from memory. */
static struct kept_set *set_at(const struct keeper *k, uint64_t epoch)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (epoch && s->bits && s->epoch == epoch)
            return s;
    return NULL;
}

static struct kept_bitmap *kept_bitmap_of(const struct keeper *k, const struct dirty_bitmap *bm)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (s->of->handle == bm)
            return s->of;
    return NULL;
}

static struct kept_set *set_new(struct keeper *k, struct dirty_bitmap *bm, struct bitmap *bits)
{
    struct kept_bitmap *of = kept_bitmap_of(k, bm);
    struct kept_set *s = xnew(struct kept_set);

    if (!of) {
        of = xnew(struct kept_bitmap);
        of->handle = bm;
    }
    of->sets++;
    s->of = of;
    s->bits = bits;
    LIST_INSERT_HEAD(&k->sets, s, link);
    return s;
}

static void set_free(struct kept_set *s)
{
    LIST_REMOVE(s, link);
    if (--s->of->sets == 0)
        free(s->of);
    segment_remove(s->segment);
    free(s);
}

struct kept_set *keeper_adopt(struct keeper *k, struct dirty_bitmap *bm, struct bitmap *bits,
                              const struct tide_bitmap *entry, struct tide_area area)
{
    struct kept_set *s = set_new(k, bm, bits);

    memcpy(s->of->extent, entry->extent, sizeof s->of->extent);
    s->extent = area.extent;
    s->epoch = area.epoch;
    return s;
}

/* An extent of S's bitmap that no other set of it has, nor the durable superblock names. */
static unsigned free_extent(struct keeper *k, const struct kept_set *s, const char *name)
{
    bool taken[TIDE_EXTENTS] = {false};
    struct kept_set *other;

    LIST_FOREACH (other, &k->sets, link)
        if (other != s && other->of == s->of && other->epoch)
            taken[other->extent] = true;
    for (unsigned i = 0; i < TIDE_EXTENTS; i++)
        if (!taken[i])
            return i;
    assert(!"a third extent is always free");
    return 0;
}

/* ---- the places of a superblock's sets ---- */

/* A change of state that is being made. */
struct change {
    struct super next;
    const struct bitmap **current, **successor; /* as in next.table */
    bool begins;                                /* a session */
    struct tide_id old_session;
};

static void change_fini(struct change *c)
{
    super_fini(&c->next);
    free(c->current);
    free(c->successor);
}

static int make_segment(struct keeper *k, struct dirty_bitmap *bm, struct kept_set *s,
                        const struct tide_id *session, struct error *err)
{
    struct bitmap *old = s->bits, *bits;
    struct segment *segment;

    if (!k->options.runtime || (s->segment && !s->segment_ended))
        return 0;
    int r = segment_create(k->options.runtime, session, s->epoch, bitmap_size(old),
                           bitmap_granularity(old), &segment, &bits, err);
    if (r < 0)
        return r;
    /* No write marks OLD meanwhile: it is new and guests wait, or no write has passed us yet. */
    bitmap_merge(bits, old);
    s->bits = bits;
    dirty_rehome(bm, old, bits);
    bitmap_free(old);
    segment_close(s->segment);
    s->segment = segment;
    s->segment_ended = false;
    return 0;
}

/* Where BITS of BM are, in *RET; a new set gets a place. */
static int place(struct keeper *k, struct change *c, struct tide_bitmap *entry,
                 struct dirty_bitmap *bm, struct bitmap **bits, struct tide_area *ret,
                 struct error *err)
{
    struct kept_set *s = set_of(k, *bits);
    bool is_new = !s;

    if (is_new) {
        s = set_new(k, bm, *bits);
        s->extent = free_extent(k, s, entry->name);
        s->epoch = k->epoch++;
    }
    int r = make_segment(k, bm, s, &c->next.session, err);
    if (r < 0) {
        if (is_new)
            set_free(s);
        return r;
    }
    *bits = s->bits;
    *ret = (struct tide_area){s->extent, s->epoch};
    return 0;
}

static bool is_kept(const struct dirty_bitmap *bm)
{
    return dirty_persistent(bm) && dirty_name(bm);
}

/* Room in the tide file for what the entry names. A new file makes its own. */
static int allocate(struct keeper *k, struct change *c, struct tide_bitmap *entry,
                    struct kept_bitmap *of, struct error *err)
{
    const unsigned used[] = {entry->current.extent, entry->successor.extent};
    int r = 0;

    memcpy(entry->extent, of->extent, sizeof entry->extent);
    if (!k->tide || k->options.level == TIDE_PROCESS)
        return 0;
    for (unsigned i = 0; r == 0 && i < ARRAY_SIZE(used); i++) {
        if (entry->extent[used[i]] || (i == 1 && !entry->successor.epoch))
            continue;
        r = tide_allocate(k->tide, &c->next,
                          tide_extent_bytes(max_u64(c->next.size_bytes, c->next.resizing_bytes),
                                            entry->granularity_bits),
                          &entry->extent[used[i]], err);
    }
    memcpy(of->extent, entry->extent, sizeof of->extent);
    return r;
}

static int add_entry(struct keeper *k, struct change *c, struct dirty_bitmap *bm, struct error *err)
{
    struct tide_bitmap *entry = &c->next.table.items[c->next.table.n];
    struct dirty_state st;

    dirty_get_state(bm, &st);
    *entry = (struct tide_bitmap){
        .name = xstrdup(dirty_name(bm)),
        .granularity_bits = log2_u64(dirty_granularity(bm)),
        .enabled = st.enabled,
        .inconsistent = st.inconsistent,
        .based = st.based,
        .generation = st.generation,
        .last_job = st.job ? xstrdup(st.job) : NULL,
    };
    size_t i = c->next.table.n++;
    int r = place(k, c, entry, bm, &st.current, &entry->current, err);
    if (r == 0 && st.successor)
        r = place(k, c, entry, bm, &st.successor, &entry->successor, err);
    if (r == 0)
        r = allocate(k, c, entry, set_of(k, st.current)->of, err);
    c->current[i] = st.current;
    c->successor[i] = st.successor;
    return r;
}

static int build_table(struct keeper *k, struct change *c, struct error *err)
{
    size_t n = 0;
    int r = 0;

    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        n += is_kept(bm);
    tide_table_fini(&c->next.table);
    c->next.table.items = xcalloc(n + 1, sizeof *c->next.table.items);
    c->current = xcalloc(n + 1, sizeof *c->current);
    c->successor = xcalloc(n + 1, sizeof *c->successor);
    for (struct dirty_bitmap *bm = dirty_first(k->node); r == 0 && bm; bm = dirty_next(bm))
        if (is_kept(bm))
            r = add_entry(k, c, bm, err);
    return r;
}

/* ---- what areas must have before the superblock that relies on it ---- */

static bool was_durable(const struct keeper *k, uint64_t epoch)
{
    const struct tide_table *t = &tide_super(k->tide)->table;

    for (size_t i = 0; i < t->n; i++)
        if (t->items[i].current.epoch == epoch || t->items[i].successor.epoch == epoch)
            return true;
    return false;
}

static int write_area(struct keeper *k, const struct tide_bitmap *entry, struct tide_area area,
                      const struct bitmap *bits, const struct range *ranges, size_t n)
{
    return tide_write_area(k->tide, entry->extent[area.extent], area.epoch, bits, ranges, n);
}

/* Bits that were not announced: all of a set that is new (a merge, a recovery), and what has been
 * folded into one that is known. */
static int write_unannounced(struct keeper *k, struct change *c, struct error *err)
{
    const struct range all = range_make(0, node_size(k->node));
    bool written = false;
    int r = 0;

    if (k->options.level == TIDE_PROCESS)
        return 0;
    for (size_t i = 0; i < c->next.table.n; i++) {
        const struct tide_bitmap *e = &c->next.table.items[i];
        struct dirty_bitmap *bm = dirty_find(k->node, e->name);
        struct dirty_state st;
        dirty_get_state(bm, &st);
        bool folded_here = st.folded && !e->successor.epoch,
             folded_there = st.folded && !folded_here;
        const struct {
            struct tide_area area;
            const struct bitmap *bits;
            bool folded;
        } sets[] = {{e->current, c->current[i], folded_here},
                    {e->successor, c->successor[i], folded_there}};
        for (unsigned j = 0; j < ARRAY_SIZE(sets) && r == 0; j++) {
            if (!sets[j].bits || bitmap_count(sets[j].bits) == 0 ||
                (was_durable(k, sets[j].area.epoch) && !sets[j].folded))
                continue;
            r = write_area(k, e, sets[j].area, sets[j].bits, &all, 1);
            written = true;
        }
    }
    if (r == 0 && written)
        r = tide_sync(k->tide);
    return r < 0 ? error_set_errno(err, -r, "Could not write '%s'", k->options.path) : 0;
}

/* ---- sessions ---- */

static void id_make(struct tide_id *id)
{
    random_bytes(id->bytes, sizeof id->bytes);
    id->bytes[0] |= 1; /* never none */
}

static void describe(struct keeper *k, struct super *s)
{
    s->level = k->options.level;
    snprintf(s->driver, sizeof s->driver, "%s", node_driver_name(k->node));
    s->size_bytes = node_size(k->node);
    s->resizing_bytes = k->resizing_bytes ? k->resizing_bytes : s->size_bytes;
    s->region_bits = k->options.region_bits;
    s->slots = k->options.slots;
    s->in_use = true;
}

int keeper_descriptor(const struct keeper *k)
{
    const struct node *n = k->node;

    while (n && strcmp(node_driver_name(n), "file")) {
        struct edge *e = node_primary(n);
        n = e ? e->node : NULL;
    }
    const struct file_state *s = n ? n->state : NULL;
    return s && s->now ? s->now->fd : -1;
}

/* Without a place for run segments a kill is like a power loss. */
static void use_runtime(struct keeper *k)
{
    struct error err = ERROR_INIT;

    if (k->options.runtime && segments_directory(k->options.runtime, &err) < 0) {
        log_warning("Node '%s': %s: after a kill its bitmaps will be as after a power loss",
                    node_name(k->node), err.text);
        free((char *)steal(k->options.runtime));
    }
}

static int begin_session(struct keeper *k, struct change *c, struct error *err)
{
    struct super *s = &c->next;
    int fd = keeper_descriptor(k), r = 0;

    c->begins = true;
    c->old_session = s->session;
    id_make(&s->session);
    if (k->epoch == 0)
        k->epoch = s->next_epoch ? s->next_epoch : 1;
    if (tide_id_none(&s->uuid))
        id_make(&s->uuid);
    s->ring_sequence = k->ring_next ? k->ring_next : 1;
    if (fd >= 0 && (r = witness_take(fd, &s->witness)) < 0)
        return error_set_errno(err, -r, "Could not look at the image of node '%s'",
                               node_name(k->node));
    use_runtime(k);
    if (k->options.runtime)
        r = stamp_create(k->options.runtime, &s->session, &k->stamp, err);
    return r;
}

/* The segments of a session that no superblock names any more. */
static void drop_session(struct keeper *k, const struct tide_id *session, const struct super *old)
{
    if (!k->options.runtime || tide_id_none(session))
        return;
    for (size_t i = 0; i < old->table.n; i++) {
        segment_unlink(k->options.runtime, session, old->table.items[i].current.epoch);
        if (old->table.items[i].successor.epoch)
            segment_unlink(k->options.runtime, session, old->table.items[i].successor.epoch);
    }
    stamp_unlink(k->options.runtime, session);
}

static int hot_op_commit(void *owner, struct ring_block *b, const uint32_t *table);
static int hot_op_clean(void *owner, const uint32_t *regions, size_t n);
static void hot_op_failed(void *owner, int error);

static void session_begun(struct keeper *k)
{
    static const struct hot_ops ops = {hot_op_commit, hot_op_clean, hot_op_failed};
    const struct super *s = tide_super(k->tide);

    k->in_use = true;
    k->stale = false;
    k->ring_next = s->ring_sequence;
    if (k->options.level == TIDE_POWER)
        k->hot = hot_new(&(struct hot_options){s->region_bits, s->slots}, &ops, k);
}

/* ---- a change of state ---- */

void keeper_look(struct keeper *k)
{
    k->recording = false;
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        k->recording |= is_kept(bm) && dirty_recording(bm);
}

/* Sets that are gone from memory and that the durable superblock does not name. */
static void collect(struct keeper *k)
{
    struct kept_set *s, *next;

    for (s = LIST_FIRST(&k->sets); s; s = next) {
        next = LIST_NEXT(s, link);
        if (!s->bits && !was_durable(k, s->epoch))
            set_free(s);
    }
}

static void learn_extents(struct keeper *k)
{
    const struct tide_table *t = &tide_super(k->tide)->table;
    struct kept_set *s;

    for (size_t i = 0; i < t->n; i++)
        LIST_FOREACH (s, &k->sets, link)
            if (s->epoch == t->items[i].current.epoch)
                memcpy(s->of->extent, t->items[i].extent, sizeof s->of->extent);
}

/* All that are used so far are reserved, and never fewer than before. */
static void set_next_epoch(struct keeper *k, struct super *s)
{
    uint64_t now = k->tide ? tide_super(k->tide)->next_epoch : 0;

    s->next_epoch = k->epoch <= now ? now : k->epoch + EPOCHS_AHEAD;
}

/* A new tide file with all that NEXT says, in place of the one that there is. */
static int replace_tide(struct keeper *k, struct change *c, struct error *err)
{
    struct tide *old = k->tide;
    CLEANUP(memory_freep) uint32_t *table = NULL;
    LOCKED(&k->area_lock); /* nobody is in the old one */
    LOCKED(&k->ring_lock);

    for (size_t i = 0; i < c->next.table.n; i++)
        memset(c->next.table.items[i].extent, 0, sizeof c->next.table.items[i].extent);
    if (k->hot) {
        table = xcalloc(k->options.slots, sizeof *table);
        hot_table(k->hot, table);
        c->next.ring_sequence = k->ring_next;
    }
    set_next_epoch(k, &c->next);
    int r = tide_create(k->options.path, &c->next, c->current, c->successor, table, &k->tide, err);
    if (r < 0) {
        k->tide = old;
        return r;
    }
    if (table) {
        const struct super *s = tide_super(k->tide);
        k->ring_next = s->ring_sequence + ring_full_table(s->slots, min_u64(s->slots, RING_SLICE));
    }
    tide_close(old);
    learn_extents(k);
    return 0;
}

/* No tide file can be had. What is left of the old one must not be believed. */
static void give_up(struct keeper *k, const struct error *why)
{
    struct error err = ERROR_INIT;

    log_error("Node '%s': %s: its bitmaps do not survive from now on", node_name(k->node),
              why->text);
    k->lost = true;
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (is_kept(bm))
            dirty_set_inconsistent(bm);
    if (k->tide && tide_remove(steal(k->tide), &err) < 0) {
        log_error("Node '%s': %s: writes are refused", node_name(k->node), err.text);
        k->refusing = true;
    }
    if (k->hot)
        hot_fail(k->hot);
}

static int build(struct keeper *k, struct change *c, struct error *err)
{
    int r = 0;

    if (k->tide)
        super_copy(&c->next, tide_super(k->tide));
    if (!k->in_use)
        r = begin_session(k, c, err);
    if (r == 0)
        describe(k, &c->next);
    return r < 0 ? r : build_table(k, c, err);
}

/* Reserves epochs, when sets are about to be written under new ones. */
static int reserve_epochs(struct keeper *k, struct error *err)
{
    const struct super *now = tide_super(k->tide);
    CLEANUP(super_fini) struct super s = {0};

    if (k->options.level == TIDE_PROCESS || k->epoch <= now->next_epoch)
        return 0;
    super_copy(&s, now);
    s.next_epoch = k->epoch + EPOCHS_AHEAD;
    return tide_write_super(k->tide, &s, err);
}

/* Another node over the same image, with another format, may have its bitmaps there. */
static int check_nobodys(struct keeper *k, struct error *err)
{
    struct error why = ERROR_INIT;
    struct tide *t;

    int r = tide_open(k->options.path, false, &t, &why);
    if (r == -ENOENT || r == -EBADMSG)
        return 0;
    if (r == 0) {
        r = error_set(err, EBUSY, "tide file '%s' has bitmaps of a node with driver '%s'",
                      k->options.path, tide_super(t)->driver);
        tide_close(t);
    } else if (err) {
        *err = why;
    }
    return r;
}

/* Is the disk to become larger than the extents that the bitmaps have? */
static bool outgrown(const struct keeper *k, const struct super *next)
{
    const struct super *now = tide_super(k->tide);
    uint64_t had = max_u64(now->size_bytes, now->resizing_bytes);
    uint64_t needs = max_u64(next->size_bytes, next->resizing_bytes);

    for (size_t i = 0; i < next->table.n; i++) {
        unsigned bits = next->table.items[i].granularity_bits;
        if (tide_extent_bytes(needs, bits) > tide_extent_bytes(had, bits))
            return true;
    }
    return false;
}

static int write_change(struct keeper *k, struct change *c, struct error *err)
{
    if (!k->tide) {
        int r = check_nobodys(k, err);
        if (r < 0)
            return r;
    }
    if (!k->tide || tide_failed(k->tide) || outgrown(k, &c->next))
        return replace_tide(k, c, err);
    int r = reserve_epochs(k, err);
    set_next_epoch(k, &c->next);
    if (r == 0) {
        LOCKED(&k->area_lock);
        r = write_unannounced(k, c, err);
    }
    if (r == 0)
        r = tide_write_super(k->tide, &c->next, err);
    return r;
}

static int change_state(struct keeper *k, struct error *err)
{
    CLEANUP(change_fini) struct change c = {0};
    struct error why = ERROR_INIT;

    int r = build(k, &c, err);
    if (r < 0)
        return r;
    CLEANUP(super_fini) struct super old = {0};
    if (c.begins && k->tide)
        super_copy(&old, tide_super(k->tide));
    CLEANUP(super_fini) struct super again = {0};
    super_copy(&again, &c.next);
    r = write_change(k, &c, &why);
    if (r < 0 && k->tide && tide_failed(k->tide)) {
        /* Nobody knows what the disk has. A new file says it. */
        super_fini(&c.next);
        super_copy(&c.next, &again);
        error_clear(&why);
        r = replace_tide(k, &c, &why);
    }
    if (r < 0) {
        if (k->tide)
            give_up(k, &why);
        if (err)
            *err = why;
        return r;
    }
    learn_extents(k);
    keeper_look(k);
    if (c.begins) {
        session_begun(k);
        drop_session(k, &c.old_session, &old);
    }
    collect(k);
    return 0;
}

int keeper_commit(struct keeper *k, struct error *err)
{
    bool any = k->tide;

    for (struct dirty_bitmap *bm = dirty_first(k->node); bm && !any; bm = dirty_next(bm))
        any = is_kept(bm);
    if (!any || k->lost)
        return 0;
    LOCKED(&k->lock);
    return change_state(k, err);
}

/* ---- hot regions ---- */

static int hot_op_commit(void *owner, struct ring_block *b, const uint32_t *table)
{
    struct keeper *k = owner;
    LOCKED(&k->ring_lock);

    if (!k->tide)
        return -EIO;
    b->session = tide_super(k->tide)->session;
    b->sequence = k->ring_next;
    ring_slice(b, table, k->options.slots, RING_SLICE);
    int r = tide_write_ring(k->tide, b);
    if (r == 0)
        k->ring_next++;
    return r;
}

/* Both sets of every bitmap, looked up anew after each wait: a change of state may drop one
 * meanwhile (then its bits are in another), and what it adds was empty or has been written. */
static int hot_op_clean(void *owner, const uint32_t *regions, size_t n)
{
    struct keeper *k = owner;
    CLEANUP(memory_freep) struct range *ranges = xcalloc(n, sizeof *ranges);
    LOCKED(&k->area_lock);

    if (!k->tide)
        return -EIO;
    const unsigned shift = tide_super(k->tide)->region_bits;
    const uint64_t size = node_size(k->node);
    for (size_t i = 0; i < n; i++) {
        uint64_t start = (uint64_t)regions[i] << shift;
        ranges[i] = start < size ? range_between(start, min_u64(start + (1ull << shift), size))
                                 : range_make(0, 0);
    }
    struct tide *t = k->tide;
    for (size_t i = 0; i < tide_super(t)->table.n; i++) {
        for (unsigned j = 0; j < 2; j++) {
            if (k->tide != t)
                return 0; /* a new file has all of it */
            if (i >= tide_super(t)->table.n)
                break;
            const struct tide_bitmap *e = &tide_super(t)->table.items[i];
            struct tide_area area = j ? e->successor : e->current;
            struct kept_set *s = set_at(k, area.epoch);
            if (!s)
                continue;
            int r = write_area(k, e, area, s->bits, ranges, n);
            if (r < 0)
                return r;
        }
    }
    return tide_sync(t);
}

static int make_anew(void *arg)
{
    struct keeper *k = arg;
    struct error err = ERROR_INIT;

    SHIELD();
    LOCKED(&k->lock);
    if (!k->lost && k->tide && tide_failed(k->tide) && change_state(k, &err) < 0)
        log_error("Node '%s': %s", node_name(k->node), err.text);
    if (k->hot && !k->lost)
        hot_retry(k->hot);
    return 0;
}

static void hot_op_failed(void *owner, int error)
{
    struct keeper *k = owner;

    log_warning("Node '%s': '%s': %s: a new one is made", node_name(k->node), k->options.path,
                strerror(-error));
    scope_spawn(&k->tasks, make_anew, k);
}

/* ---- writes ---- */

/* The bits of R are durable in every set that records. */
static int sync_marks(struct keeper *k, struct range r)
{
    int result = 0;
    LOCKED(&k->area_lock);

    for (size_t i = 0; k->tide && result == 0 && i < tide_super(k->tide)->table.n; i++) {
        const struct tide_bitmap *e = &tide_super(k->tide)->table.items[i];
        const struct tide_area area = e->successor.epoch ? e->successor : e->current;
        struct kept_set *s = e->enabled ? set_at(k, area.epoch) : NULL;
        if (s)
            result = write_area(k, e, area, s->bits, &r, 1);
    }
    if (result == 0)
        result = k->tide ? tide_sync(k->tide) : -EIO;
    return result;
}

/* Too many regions for the table: the bits are set, and made durable, before the data. */
static int write_through(struct keeper *k, struct range r)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!is_kept(bm) || !dirty_recording(bm))
            continue;
        dirty_get_state(bm, &st);
        bitmap_mark(st.successor ? st.successor : st.current, r);
    }
    if (sync_marks(k, r) < 0)
        make_anew(k); /* and the new file has them */
    return k->refusing ? -EIO : 0;
}

static int begin_use(struct keeper *k)
{
    struct error err = ERROR_INIT;
    LOCKED(&k->lock);

    if (k->in_use || k->lost)
        return 0;
    if (change_state(k, &err) == 0)
        return 0;
    log_error("Node '%s': %s: its bitmaps do not survive a crash", node_name(k->node), err.text);
    if (!k->lost)
        give_up(k, &err);
    return 0;
}

int keeper_before_write(struct keeper *k, struct range r)
{
    if (!k->in_use && !k->lost) {
        if (!k->tide && !k->recording)
            return 0;
        int result = begin_use(k);
        if (result < 0)
            return result;
    }
    if (k->refusing)
        return -EIO;
    if (k->lost)
        return 0;
    if (k->hot && k->recording) {
        int result = hot_take(k->hot, r);
        if (result == -E2BIG)
            result = write_through(k, r);
        if (result < 0)
            return result;
    }
    if (k->stamp)
        stamp_write_begun(k->stamp);
    return 0;
}

void keeper_mark(struct keeper *k, struct range r)
{
    if (k->hot && k->recording)
        hot_marked(k->hot, r);
}

void keeper_written(struct keeper *k, struct range r)
{
    if (k->hot && k->recording)
        hot_give(k->hot, r);
    if (k->stamp)
        stamp_write_done(k->stamp);
}

/* ---- sizes ---- */

int keeper_resizing(struct keeper *k, uint64_t to, struct error *err)
{
    if ((!k->tide && !k->recording) || k->lost)
        return 0;
    LOCKED(&k->lock);
    k->resizing_bytes = to;
    int r = change_state(k, err);
    if (r < 0)
        k->resizing_bytes = 0;
    return r;
}

void keeper_resized(struct keeper *k)
{
    struct error err = ERROR_INIT;

    if (!k->resizing_bytes)
        return;
    LOCKED(&k->lock);
    k->resizing_bytes = 0;
    /* The areas are as large as the disk was. */
    struct kept_set *s;
    LIST_FOREACH (s, &k->sets, link)
        memset(s->of->extent, 0, sizeof s->of->extent);
    CLEANUP(change_fini) struct change c = {0};
    if (build(k, &c, &err) < 0 || replace_tide(k, &c, &err) < 0)
        give_up(k, &err);
    else
        collect(k);
}

int keeper_grow(struct keeper *k, struct bitmap *bits, uint64_t to)
{
    struct kept_set *s = set_of(k, bits);

    return s && s->segment ? segment_grow(s->segment, bits, to, NULL) : 0;
}

void keeper_bits_gone(struct keeper *k, struct bitmap *bits)
{
    struct kept_set *s = set_of(k, bits);

    if (s)
        s->bits = NULL;
}

/* ---- opening and closing ---- */

int keeper_open(struct node *n, const struct keeper_options *o, struct keeper **ret,
                struct error *err)
{
    struct keeper *k = xnew(struct keeper);

    k->node = n;
    k->options = *o;
    k->options.path = xstrdup(o->path);
    k->options.runtime = o->runtime ? xstrdup(o->runtime) : NULL;
    mutex_init(&k->lock);
    mutex_init(&k->area_lock);
    mutex_init(&k->ring_lock);
    scope_init(&k->tasks);
    LIST_INIT(&k->sets);
    int r = keeper_recover(k, err);
    if (r < 0) {
        keeper_free(k);
        return r;
    }
    keeper_look(k);
    *ret = k;
    return 0;
}

void keeper_free(struct keeper *k)
{
    struct kept_set *s;

    if (k->hot)
        hot_free(k->hot);
    scope_fini(&k->tasks);
    while ((s = LIST_FIRST(&k->sets)))
        set_free(s);
    stamp_close(k->stamp);
    tide_close(k->tide);
    free(k->recovery.reason);
    free(k->options.path);
    free((char *)k->options.runtime);
    free(k);
}

/* Everything that memory knows is in the areas, the image is as durable as they are, and its
 * witness is taken after both: then the superblock may say that it is closed. */
static int close_session(struct keeper *k, struct error *err)
{
    const struct range all = range_make(0, node_size(k->node));
    CLEANUP(super_fini) struct super s = {0};
    struct edge *e = node_primary(k->node);
    int fd = keeper_descriptor(k);

    int r = e ? edge_flush(e) : node_flush(k->node);
    if (r < 0)
        return error_set_errno(err, -r, "Could not flush the image");
    super_copy(&s, tide_super(k->tide));
    for (size_t i = 0; r == 0 && i < s.table.n; i++) {
        struct tide_bitmap *b = &s.table.items[i];
        struct tide_area *areas[] = {&b->current, &b->successor};
        for (unsigned j = 0; r == 0 && j < 2; j++) {
            struct kept_set *set = set_at(k, areas[j]->epoch);
            if (!set)
                continue;
            if (!b->extent[areas[j]->extent])
                r = tide_allocate(k->tide, &s, tide_extent_bytes(s.size_bytes, b->granularity_bits),
                                  &b->extent[areas[j]->extent], err);
            if (r == 0 && (r = write_area(k, b, *areas[j], set->bits, &all, 1)) < 0)
                error_set_errno(err, -r, "Could not write '%s'", k->options.path);
        }
    }
    if (r == 0 && (r = tide_sync(k->tide)) < 0)
        error_set_errno(err, -r, "Could not write '%s'", k->options.path);
    if (r == 0 && fd >= 0 && (r = witness_take(fd, &s.witness)) < 0)
        error_set_errno(err, -r, "Could not look at the image");
    if (r < 0)
        return r;
    s.in_use = false;
    s.ring_sequence = k->ring_next;
    return tide_write_super(k->tide, &s, err);
}

/* Ends the session, if there is one, and tells what went wrong: then it is as after a kill. */
static void end_session(struct keeper *k)
{
    struct error err = ERROR_INIT;
    CLEANUP(super_fini) struct super old = {0};
    int r = 0;

    if (k->stale && !k->node->read_only && k->tide)
        r = keeper_commit(k, &err); /* what recovery has found is not found twice */
    hot_free(steal(k->hot));
    if (!k->in_use || !k->tide || k->lost)
        return;
    super_copy(&old, tide_super(k->tide));
    if (r == 0 && tide_failed(k->tide))
        r = -EIO;
    if (r == 0)
        r = old.table.n == 0 ? tide_remove(steal(k->tide), &err) : close_session(k, &err);
    if (r == 0)
        drop_session(k, &old.session, &old);
    else
        log_warning("Node '%s': %s: its bitmaps are recovered when it is next opened",
                    node_name(k->node), err.text);
    stamp_close(steal(k->stamp));
    k->in_use = false;
}

void keeper_close(struct keeper *k)
{
    end_session(k);
    keeper_free(k);
}

void keeper_set_readonly(struct keeper *k, bool readonly)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (is_kept(bm))
            dirty_set_readonly(bm, readonly);
}

/* Nobody of ours can have written the tide file if it says the same as before. */
static int open_again(struct keeper *k, struct error *err)
{
    CLEANUP(tide_closep) struct tide *t = NULL;
    char why[160] = "its tide file has been written meanwhile";
    bool same;

    const struct super *was = tide_super(k->tide);
    int r = tide_open(k->options.path, false, &t, err);
    if (r < 0)
        return r;
    const struct super *is = tide_super(t);
    same = tide_id_equal(&was->uuid, &is->uuid) && was->sequence == is->sequence &&
           keeper_ask_witness(k, is, why, sizeof why) != WITNESS_CHANGED;
    tide_close(k->tide);
    k->tide = steal(t);
    if (same)
        return 0;
    log_warning("Node '%s': its bitmaps are inconsistent: %s", node_name(k->node), why);
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (is_kept(bm))
            dirty_set_inconsistent(bm);
    k->stale = true;
    return 0;
}

int keeper_reopen(struct keeper *k, bool to_read_only, struct error *err)
{
    struct kept_set *s;
    int r = 0;

    if (!to_read_only) {
        if (k->tide)
            r = open_again(k, err);
        if (r == 0)
            keeper_set_readonly(k, false);
        return r;
    }
    for (struct dirty_bitmap *bm = dirty_first(k->node); r == 0 && bm; bm = dirty_next(bm))
        if (is_kept(bm))
            r = dirty_check(bm, DIRTY_CHECK_BUSY, err);
    if (r < 0)
        return r;
    end_session(k);
    LIST_FOREACH (s, &k->sets, link)
        s->segment_ended = true;
    keeper_set_readonly(k, true);
    return 0;
}

int keeper_can_add(struct keeper *k, const char *name, uint64_t granularity_bytes,
                   struct error *err)
{
    if (k->refusing || k->lost)
        return error_set(err, EIO, "The tide file '%s' cannot be written", k->options.path);
    if (strlen(name) > TIDE_NAME_MAX)
        return error_set(err, EINVAL, "Bitmap name is too long: %zu bytes", strlen(name));
    return 0;
}

struct json_object *keeper_info(struct keeper *k)
{
    if (k->recovery.verdict == RECOVERY_NEW)
        return NULL;
    static const char *const names[] = {"new", "clean", "exact", "superset", "none"};
    struct json_object *info = json_object_new_object();

    json_add_string(info, "state", names[k->recovery.verdict]);
    if (k->recovery.reason && *k->recovery.reason)
        json_add_string(info, "reason", k->recovery.reason);
    json_add_uint(info, "bytes-added", k->recovery.bytes_added);
    if (k->recovery.witness)
        json_add_string(info, "witness", k->recovery.witness);
    return info;
}
