/* The sets of bits of a kept disk: which have a place on disk, and what a superblock says of them.
 */
#include "base/broken.h"
#include "block/driver.h"
#include "persist/keeper_internal.h"

/* A superblock may not have room for fewer, if their names are long; it never has for more. */
enum { BITMAPS_MAX = TIDE_SUPER_BYTES / 64 };

/* ---- sets ---- */

struct kept_set *keeper_set_of(const struct keeper *k, const struct bitmap *bits)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (s->bits == bits)
            return s;
    return NULL;
}

/* The set under EPOCH, which is one of the superblock's; NULL: there is none. */
struct kept_set *keeper_set_at(const struct keeper *k, uint64_t epoch)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (epoch && s->epoch == epoch)
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

void keeper_set_free(struct kept_set *s)
{
    LIST_REMOVE(s, link);
    if (--s->of->sets == 0)
        free(s->of);
    if (s->gone)
        bitmap_free(s->bits);
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

void change_fini(struct change *c)
{
    super_fini(&c->next);
    free(c->current);
    free(c->successor);
}

static int make_segment(struct keeper *k, struct kept_set *s, const struct segments *of,
                        struct error *err)
{
    struct bitmap *old = s->bits, *bits;
    struct segment *segment;

    if (!of->runtime || (s->segment && !s->segment_ended))
        return 0;
    int r = segment_create(of, s->epoch, bitmap_size(old), bitmap_granularity(old), &segment, &bits,
                           err);
    if (r < 0)
        return r;
    /* No write marks OLD meanwhile: it is new and guests wait, or no write has passed us yet. */
    bitmap_merge(bits, old);
    /* The set stays the one it is: a transaction's undo may hold it, too. */
    bitmap_swap(old, bits);
    bitmap_free(bits);
    segment_close(s->segment);
    s->segment = segment;
    s->segment_ended = false;
    return 0;
}

/* Where BITS of BM are, in *RET; a new set gets a place. */
static int place(struct keeper *k, struct change *c, struct tide_bitmap *entry,
                 struct dirty_bitmap *bm, struct bitmap *bits, struct tide_area *ret,
                 struct error *err)
{
    struct kept_set *s = keeper_set_of(k, bits);
    bool is_new = !s;

    if (is_new) {
        s = set_new(k, bm, bits);
        s->extent = free_extent(k, s, entry->name);
        s->epoch = k->epoch++;
    }
    const struct segments of = keeper_segments(k, &c->next);
    int r = make_segment(k, s, &of, err);
    if (r < 0) {
        if (is_new)
            keeper_set_free(s);
        return r;
    }
    *ret = (struct tide_area){s->extent, s->epoch};
    return 0;
}

bool keeper_keeps(const struct dirty_bitmap *bm)
{
    return dirty_persistent(bm) && dirty_name(bm);
}

/* Room in the tide file for what the entry names. A new file makes its own, and so does the one
 * that takes the place of a file that has failed. */
static int allocate(struct keeper *k, struct change *c, struct tide_bitmap *entry,
                    struct kept_bitmap *of, struct error *err)
{
    const unsigned used[] = {entry->current.extent, entry->successor.extent};
    int r = 0;

    memcpy(entry->extent, of->extent, sizeof entry->extent);
    if (!k->tide || k->options.level == TIDE_PROCESS)
        return 0;
    struct error why = ERROR_INIT;
    for (unsigned i = 0; !tide_failed(k->tide) && r == 0 && i < ARRAY_SIZE(used); i++) {
        if (entry->extent[used[i]] || (i == 1 && !entry->successor.epoch))
            continue;
        r = tide_allocate(k->tide, &c->next,
                          tide_extent_bytes(max_u64(c->next.size_bytes, c->next.resizing_bytes),
                                            entry->granularity_bits),
                          &entry->extent[used[i]], &why);
    }
    if (tide_failed(k->tide))
        r = 0;
    else if (r < 0 && err)
        *err = why;
    /* The bitmap has them when the superblock does (learn_extents): if this change fails another
     * one may be given the same room. */
    if (BROKEN(extents_of_failed_kept))
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
    int r = place(k, c, entry, bm, st.current, &entry->current, err);
    if (r == 0 && st.successor)
        r = place(k, c, entry, bm, st.successor, &entry->successor, err);
    if (r == 0)
        r = allocate(k, c, entry, keeper_set_of(k, st.current)->of, err);
    c->current[i] = st.current;
    c->successor[i] = st.successor;
    return r;
}

int keeper_build_table(struct keeper *k, struct change *c, struct error *err)
{
    enum { ENTRY_BYTES = 56 }; /* in a superblock, besides the name, at least */
    size_t n = 0, bytes = 0;
    int r = 0;

    if (k->tide)
        keeper_collect(k); /* what the last change has dropped has no place any more */
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (keeper_keeps(bm)) {
            n++;
            bytes += ENTRY_BYTES + strlen(dirty_name(bm));
        }
    /* An image may have 65,535. Not after a segment has been made for each, while all wait. */
    if (bytes > TIDE_SUPER_BYTES)
        return error_set(err, ENOSPC, "%zu bitmaps do not fit into a superblock of %llu bytes", n,
                         (unsigned long long)TIDE_SUPER_BYTES);
    tide_table_fini(&c->next.table);
    c->next.table.items = xcalloc(n + 1, sizeof *c->next.table.items);
    c->current = xcalloc(n + 1, sizeof *c->current);
    c->successor = xcalloc(n + 1, sizeof *c->successor);
    if (n > BITMAPS_MAX)
        return error_set(err, E2BIG, "tide file '%s' has no room for %zu bitmaps", k->options.path,
                         n);
    for (struct dirty_bitmap *bm = dirty_first(k->node); r == 0 && bm; bm = dirty_next(bm))
        if (keeper_keeps(bm))
            r = add_entry(k, c, bm, err);
    return r;
}

/* ---- what areas must have before the superblock that relies on it ---- */

bool keeper_names(const struct keeper *k, uint64_t epoch)
{
    const struct tide_table *t = &tide_super(k->tide)->table;

    for (size_t i = 0; i < t->n; i++)
        if (t->items[i].current.epoch == epoch || t->items[i].successor.epoch == epoch)
            return true;
    return false;
}

int keeper_write_area(struct keeper *k, const struct tide_bitmap *entry, struct tide_area area,
                      const struct bitmap *bits, const struct range *ranges, size_t n)
{
    return tide_write_area(k->tide, entry->extent[area.extent], area.epoch, bits, ranges, n);
}

/* Does the bitmap stop to record? After a power loss it is not given hot regions any more. */
static bool ends(const struct keeper *k, const struct tide_bitmap *e)
{
    const struct tide_bitmap *was =
        tide_table_find((struct tide_table *)&tide_super(k->tide)->table, e->name);

    return was && was->enabled && !e->enabled;
}

/* Bits that were not announced: all of a set that is new (a merge, a recovery), and what has been
 * folded into one that is known. And those that nothing will announce any more: of a bitmap that is
 * disabled, and of a session that did not end well when another begins. */
int keeper_write_unannounced(struct keeper *k, struct change *c, struct error *err)
{
    const struct range all = range_make(0, node_size(k->node));
    const bool from_crash = c->begins && tide_super(k->tide)->in_use;
    bool written = false;
    int r = 0;

    if (k->options.level == TIDE_PROCESS)
        return 0;
    for (size_t i = 0; i < c->next.table.n; i++) {
        const struct tide_bitmap *e = &c->next.table.items[i];
        struct dirty_bitmap *bm = dirty_find(k->node, e->name);
        struct dirty_state st;
        dirty_get_state(bm, &st);
        const bool all_of_it = from_crash || ends(k, e) || st.unannounced;
        if (BROKEN(fold_not_synced))
            st.folded = NULL;
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
                (keeper_names(k, sets[j].area.epoch) && !sets[j].folded && !all_of_it))
                continue;
            if (BROKEN(merge_not_synced) && !c->begins && !sets[j].folded && !all_of_it)
                continue;
            r = keeper_write_area(k, e, sets[j].area, sets[j].bits, &all, 1);
            written = true;
        }
    }
    if (r == 0 && written)
        r = tide_sync(k->tide);
    return r < 0 ? error_set_errno(err, -r, "Could not write '%s'", k->options.path) : 0;
}
