/* Changes of state, sessions, and the write path of a kept disk. See keeper.h.
 *
 * Order on disk, each point a history that loses a write if it is turned
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
 *
 * and where the disk is a qcow2 image: guarded.c.
 */
#include "persist/keeper.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "block/file.h"
#include "block/qcow2/guard.h"
#include "persist/keeper_internal.h"
#include "rt/clock.h"
#include "rt/io.h"

#include <inttypes.h>
#include <stdio.h>

/* ---- a change of state ---- */

void keeper_look(struct keeper *k)
{
    k->recording = false;
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        k->recording |= keeper_keeps(bm) && dirty_recording(bm);
    /* A write gives back what it has taken, also when the last bitmap has ended meanwhile (its base
     * could not be had). They begin to record with no write inside the node. */
    if (k->recording || !k->taken)
        k->takes = k->recording;
}

/* Sets that no bitmap has and that the durable superblock does not name. */
void keeper_collect(struct keeper *k)
{
    struct kept_set *s, *next;

    for (s = LIST_FIRST(&k->sets); s; s = next) {
        next = LIST_NEXT(s, link);
        if (s->gone && !keeper_names(k, s->epoch))
            keeper_set_free(s);
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

static void forget_extents(struct keeper *k)
{
    struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        memset(s->of->extent, 0, sizeof s->of->extent);
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
        /* It may have the name already, and not durably. What is in use then is found by nobody;
         * where there was none, one that is not in use stands in the next one's way. */
        if (old)
            tide_check_name(old);
        else
            (void)io_unlink(k->options.path);
        k->tide = old;
        return r;
    }
    if (table) {
        const struct super *s = tide_super(k->tide);
        k->ring_next = s->ring_sequence + ring_full_table(s->slots, min_u64(s->slots, RING_SLICE));
    }
    if (k->void_tide && old) {
        const struct segments of = keeper_segments(k, tide_super(old));
        const bool other = !tide_id_equal(&of.uuid, &tide_super(k->tide)->uuid);
        keeper_drop_segments(k, tide_super(old));
        if (of.runtime && other)
            stamp_unlink(&of); /* nobody will look for it again */
        k->guarded &= !other;
    }
    tide_close(old);
    forget_extents(k); /* the old file's, which a bitmap may have that the new one does not name */
    learn_extents(k);
    return 0;
}

/* No tide file can be had. What is left of the old one must not be believed: until it is gone
 * writes wait (keeper_before_write), and bitmaps are what they were. */
void keeper_give_up(struct keeper *k, const struct error *why)
{
    struct error err = ERROR_INIT;

    log_error("Node '%s': %s: its bitmaps do not survive from now on", node_name(k->node),
              why->text);
    k->lost = true;
    k->giving_up = !BROKEN(give_up_not_awaited);
    int r = 0;
    if (k->options.image) {
        /* Memory has them all, and a clean end saves them in the image. */
        keeper_decide(k, RECOVERY_NONE, why->text);
        r = BROKEN(give_up_keeps_guard) ? 0 : qcow2_guard_void(k->node, &err);
        k->guarded = false;
    } else {
        struct tide *old;
        {
            LOCKED(&k->area_lock); /* nobody is in it */
            LOCKED(&k->ring_lock);
            old = steal(k->tide);
        }
        if (old)
            r = tide_remove(old, &err);
        keeper_distrust(k, why->text);
    }
    k->giving_up = false;
    if (r < 0) {
        log_error("Node '%s': %s: writes are refused", node_name(k->node), err.text);
        k->refusing = true;
    }
    if (k->hot)
        hot_fail(k->hot);
}

int keeper_build(struct keeper *k, struct change *c, struct error *err)
{
    int r = 0;

    if (k->tide)
        super_copy(&c->next, tide_super(k->tide));
    if (!k->in_use)
        r = keeper_begin_session(k, c, err);
    if (r == 0)
        keeper_describe(k, &c->next);
    if (r == 0 && k->in_use && BROKEN(flip_empties_ring))
        c->next.ring_sequence = k->ring_next;
    if (r == 0)
        r = keeper_build_table(k, c, err);
    if (r == 0)
        keeper_carry_groups(k, &c->next);
    return r;
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
    if (r == -ENOENT || r == -EBADMSG || r == -ENODATA)
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

/* What must be on disk before a superblock with C's table may be. */
int keeper_write_before(struct keeper *k, struct change *c, struct error *err)
{
    if (tide_failed(k->tide))
        return error_set(err, EIO, "tide file '%s' has failed before", k->options.path);
    int r = reserve_epochs(k, err);
    set_next_epoch(k, &c->next);
    LOCKED(&k->area_lock);
    return r < 0 ? r : keeper_write_unannounced(k, c, err);
}

static int write_change(struct keeper *k, struct change *c, struct error *err)
{
    if (tide_failed(k->tide) || k->void_tide || outgrown(k, &c->next))
        return replace_tide(k, c, err);
    if (c->begins && BROKEN(ring_emptied_first)) {
        CLEANUP(super_fini) struct super early = {0};
        set_next_epoch(k, &c->next);
        super_copy(&early, &c->next);
        (void)!tide_write_super(k->tide, &early, NULL);
    }
    int r = keeper_write_before(k, c, err);
    return r < 0 ? r : tide_write_super(k->tide, &c->next, err);
}

void keeper_changed(struct keeper *k, const struct change *c)
{
    learn_extents(k);
    keeper_look(k);
    if (c->begins) {
        keeper_session_begun(k);
        keeper_drop_segments(k, tide_super(k->tide));
    }
    keeper_collect(k);
}

int keeper_make_tide(struct keeper *k, struct error *err)
{
    CLEANUP(change_fini) struct change c = {0};

    int r = k->tide ? 0 : check_nobodys(k, err);
    if (k->tide) { /* others may yet ask for its records */
        super_copy(&c.next, tide_super(k->tide));
        tide_table_fini(&c.next.table);
        keeper_carry_groups(k, &c.next);
    }
    if (r == 0)
        r = keeper_begin_session(k, &c, err);
    if (r < 0)
        return r;
    keeper_describe(k, &c.next);
    r = replace_tide(k, &c, err);
    if (r < 0)
        return r;
    keeper_changed(k, &c);
    return 0;
}

int keeper_change_state(struct keeper *k, struct error *err)
{
    CLEANUP(change_fini) struct change c = {0};
    struct error why = ERROR_INIT;

    /* First one that says nothing: segments are found by its uuid. */
    int r = k->tide ? 0 : keeper_make_tide(k, err);
    if (r == 0)
        r = keeper_build(k, &c, err);
    if (r < 0)
        return r;
    CLEANUP(super_fini) struct super again = {0};
    super_copy(&again, &c.next);
    r = write_change(k, &c, &why);
    if (r < 0 && k->tide && tide_failed(k->tide) && !BROKEN(failed_flip_reported)) {
        /* Nobody knows what the disk has. A new file says it. */
        super_fini(&c.next);
        super_copy(&c.next, &again);
        error_clear(&why);
        r = replace_tide(k, &c, &why);
    }
    if (r < 0) {
        if (k->tide && tide_failed(k->tide) && !BROKEN(failed_flip_reported))
            keeper_give_up(k, &why);
        if (err)
            *err = why;
        return r;
    }
    keeper_changed(k, &c);
    return 0;
}

static const struct bitmap *bits_at(const struct keeper *k, struct tide_area area, bool *all)
{
    const struct kept_set *s = keeper_set_at(k, area.epoch);

    *all &= s || !area.epoch;
    return s ? s->bits : NULL;
}

/* Not what dirty/ says, which may be half of a transaction that fails yet. */
int keeper_renew(struct keeper *k, struct error *err)
{
    CLEANUP(change_fini) struct change c = {0};
    bool all = true;

    super_copy(&c.next, tide_super(k->tide));
    if (tide_id_none(&k->doubt.group)) /* else it says what is to be carried on */
        keeper_carry_groups(k, &c.next);
    c.current = xcalloc(c.next.table.n + 1, sizeof *c.current);
    c.successor = xcalloc(c.next.table.n + 1, sizeof *c.successor);
    for (size_t i = 0; i < c.next.table.n; i++) {
        c.current[i] = bits_at(k, c.next.table.items[i].current, &all);
        c.successor[i] = bits_at(k, c.next.table.items[i].successor, &all);
    }
    if (!all)
        return keeper_change_state(k, err);
    int r = replace_tide(k, &c, err);
    if (r < 0)
        keeper_give_up(k, err);
    return r;
}

/* Is the durable superblock what dirty/ says already? */
static bool is_unchanged(const struct keeper *k)
{
    const struct super *s = tide_super(k->tide);
    const struct tide_table *t = &s->table;
    size_t n = 0;

    /* Nobody knows what it is, or it is prepared for what will not be. */
    if (tide_failed(k->tide) || (!tide_id_none(&s->group) && tide_id_none(&k->doubt.group)))
        return false;
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!keeper_keeps(bm))
            continue;
        dirty_get_state(bm, &st);
        const struct tide_bitmap *e = tide_table_find((struct tide_table *)t, dirty_name(bm));
        const struct kept_set *current = keeper_set_of(k, st.current);
        const struct kept_set *successor = st.successor ? keeper_set_of(k, st.successor) : NULL;
        if (!e || !current || (st.successor && !successor) || st.folded || st.unannounced ||
            e->current.epoch != current->epoch ||
            e->successor.epoch != (successor ? successor->epoch : 0) || e->enabled != st.enabled ||
            e->inconsistent != st.inconsistent || e->based != st.based ||
            e->generation != st.generation)
            return false;
        n++;
    }
    return n == t->n;
}

bool keeper_has_bitmaps(const struct keeper *k)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (keeper_keeps(bm))
            return true;
    return false;
}

bool keeper_has_to_commit(const struct keeper *k)
{
    return (k->tide || keeper_has_bitmaps(k)) && !k->lost && !k->node->read_only &&
           !(k->tide && is_unchanged(k));
}

int keeper_commit(struct keeper *k, struct error *err)
{
    LOCKED(&k->lock); /* a change may be under way that is of a moment ago */
    if (BROKEN(failed_flip_reported) && k->tide && tide_failed(k->tide))
        return error_set(err, EIO, "tide file '%s' has failed before", k->options.path);
    struct error why = ERROR_INIT;
    int r = keeper_has_to_commit(k) ? keeper_change_state(k, &why) : 0;
    if (r == -E2BIG && k->options.image) {
        keeper_give_up(k, &why); /* the image takes more, and keeps them until a clean end */
        r = 0;
    }
    if (r < 0 && err)
        *err = why;
    bool engages = keeper_has_bitmaps(k) && !k->node->read_only &&
                   !(BROKEN(image_in_use_after_superblock) && k->in_use);
    keeper_look(k); /* also when there is no superblock any more */
    return r == 0 && engages ? keeper_engage(k, err) : r;
}

int keeper_begin(struct keeper *k, struct error *err)
{
    if (k->node->read_only)
        return 0;
    if (k->options.image) {
        LOCKED(&k->lock);
        return keeper_has_bitmaps(k) && !(BROKEN(image_in_use_after_superblock) && k->in_use)
                   ? keeper_engage(k, err)
                   : 0;
    }
    if (!k->stale || !k->tide || k->lost)
        return 0;
    LOCKED(&k->lock);
    return k->stale ? keeper_change_state(k, err) : 0;
}

/* ---- sizes ---- */

int keeper_resizing(struct keeper *k, uint64_t to, struct error *err)
{
    if (!k->tide && !k->recording && !k->lost && keeper_void_others(k) < 0)
        return error_set(err, EIO, "The bitmaps of '%s' cannot be made inconsistent",
                         k->options.path);
    if (!k->tide && !k->recording && !(k->options.image && keeper_has_bitmaps(k)))
        return 0;
    LOCKED(&k->lock);
    int r = keeper_engage(k, err);
    if (r < 0 || k->lost)
        return r;
    k->resizing_bytes = to;
    r = keeper_change_state(k, err);
    if (r < 0)
        k->resizing_bytes = 0;
    else
        keeper_stamp_begun(k);
    return r;
}

/* The disk has become another by a reopen, or with what it stands on: nobody could say it before.
 * The areas have no room for what has grown, and the superblock is of another disk. */
static bool is_unforeseen(const struct keeper *k)
{
    return k->in_use && k->tide && !k->lost &&
           tide_super(k->tide)->size_bytes != node_size(k->node);
}

void keeper_resized(struct keeper *k)
{
    struct error err = ERROR_INIT;

    const bool announced = k->resizing_bytes;
    if (!announced && !is_unforeseen(k))
        return;
    LOCKED(&k->lock);
    /* Until the image's size is durable it may have either. */
    struct edge *e = node_primary(k->node);
    int r = BROKEN(resize_not_flushed) ? 0 : e ? edge_flush(e) : node_flush(k->node);
    k->resizing_bytes = r < 0 && k->tide ? tide_super(k->tide)->size_bytes : 0;
    if (k->stamp && announced)
        stamp_write_done(k->stamp);
    /* The areas are as large as the disk was. */
    forget_extents(k);
    CLEANUP(change_fini) struct change c = {0};
    if (keeper_build(k, &c, &err) < 0 || replace_tide(k, &c, &err) < 0)
        keeper_give_up(k, &err);
    else
        keeper_collect(k);
}

int keeper_grow(struct keeper *k, struct bitmap *bits, uint64_t to)
{
    struct kept_set *s = keeper_set_of(k, bits);

    if (!s || !s->segment)
        return 0;
    if (!s->segment_ended)
        return segment_grow(s->segment, bits, to, NULL);
    /* Its file is gone; the next session makes another. */
    struct bitmap *own = bitmap_dup(bits);
    if (!own)
        return -ENOMEM;
    bitmap_swap(bits, own);
    bitmap_free(own);
    segment_close(steal(s->segment));
    s->segment_ended = false;
    return 0;
}

static int collect_later(void *arg)
{
    struct keeper *k = arg;

    SHIELD();
    LOCKED(&k->lock);
    k->collecting = false;
    if (k->tide)
        keeper_collect(k);
    return 0;
}

bool keeper_bits_gone(struct keeper *k, struct bitmap *bits)
{
    struct kept_set *s = keeper_set_of(k, bits);

    if (!s)
        return false;
    s->gone = true;
    /* Its segment would stay on tmpfs if we were killed before the next change. Not here: nobody
     * may wait. */
    if (k->in_use && !k->collecting) {
        k->collecting = true;
        scope_spawn(&k->tasks, collect_later, k);
    }
    return true;
}
