/* The write path of a kept disk: regions become hot, their bits durable. See hot.h. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/keeper_internal.h"
#include "persist/options.h"
#include "rt/clock.h"

/* ---- hot regions ---- */

static int hot_op_commit(void *owner, struct ring_block *b, const uint32_t *table)
{
    struct keeper *k = owner;
    LOCKED(&k->ring_lock);

    if (!k->tide)
        return -EIO;
    b->session = tide_super(k->tide)->session;
    b->sequence = k->ring_next;
    ring_slice(b, table, k->options.slots, k->options.slice);
    int r = tide_write_ring(k->tide, b);
    if (r == 0)
        k->ring_next++;
    return r;
}

/* The entry of the superblock that names this epoch; NULL: none does any more. */
static const struct tide_bitmap *entry_at(const struct keeper *k, uint64_t epoch,
                                          struct tide_area *area)
{
    const struct tide_table *t = &tide_super(k->tide)->table;

    for (size_t i = 0; i < t->n; i++) {
        const struct tide_bitmap *e = &t->items[i];
        if (e->current.epoch != epoch && e->successor.epoch != epoch)
            continue;
        *area = e->current.epoch == epoch ? e->current : e->successor;
        return e;
    }
    return NULL;
}

/* The areas of the sets that the superblock names at this moment, or of those alone that record. A
 * change of state may be made durable while they are written, so that the table has another order,
 * and a set another place in it, or none (then its bits are in another, or not needed): so each is
 * known by its epoch, and looked up anew. What comes into the table meanwhile was empty, or has
 * been written. Under k->area_lock. */
static int write_sets(struct keeper *k, bool recording, const struct range *ranges, size_t n)
{
    const struct tide *t = k->tide;
    const struct tide_table *table = &tide_super(t)->table;
    CLEANUP(memory_freep) uint64_t *epochs = xcalloc(2 * table->n + 1, sizeof *epochs);
    size_t count = 0;
    int r = 0;

    for (size_t i = 0; i < table->n; i++) {
        const struct tide_bitmap *e = &table->items[i];
        if (recording && !e->enabled)
            continue;
        bool live = e->successor.epoch && !(recording && BROKEN(large_write_in_users_bitmap));
        if (recording ? !live : !(live && BROKEN(only_live_cleaned)))
            epochs[count++] = e->current.epoch;
        if (live)
            epochs[count++] = e->successor.epoch;
    }
    for (size_t i = 0; r == 0 && i < count && k->tide == t; i++) { /* a new file has all of it */
        struct tide_area area;
        const struct tide_bitmap *e = entry_at(k, epochs[i], &area);
        const struct kept_set *s = e ? keeper_set_at(k, epochs[i]) : NULL;
        if (s)
            r = keeper_write_area(k, e, area, s->bits, ranges, n);
    }
    return r;
}

/* A write may have made the disk larger than the areas are; whoever did waits for a new tide file,
 * with all bits (keeper_resized), and until that is there no bitmap is believed. */
static uint64_t known_size(const struct keeper *k)
{
    const struct super *s = tide_super(k->tide);

    return min_u64(node_size(k->node), max_u64(s->size_bytes, s->resizing_bytes));
}

static void ranges_of(const struct keeper *k, const uint32_t *regions, size_t n,
                      struct range *ranges)
{
    const unsigned shift = tide_super(k->tide)->region_bits;
    const uint64_t size = known_size(k);

    for (size_t i = 0; i < n; i++) {
        uint64_t start = (uint64_t)regions[i] << shift;
        ranges[i] = start < size ? range_between(start, min_u64(start + (1ull << shift), size))
                                 : range_make(0, 0);
    }
}

struct range *keeper_unwritten(const struct keeper *k, size_t *n)
{
    CLEANUP(memory_freep) uint32_t *regions = xcalloc(k->options.slots, sizeof *regions);
    struct range *ranges = xcalloc(k->options.slots, sizeof *ranges);

    *n = hot_unwritten(k->hot, regions);
    ranges_of(k, regions, *n, ranges);
    return ranges;
}

/* Does the superblock say that marks for S go there? */
static bool is_live(const struct keeper *k, const struct kept_set *s)
{
    struct tide_area area;
    const struct tide_bitmap *e = s && s->epoch ? entry_at(k, s->epoch, &area) : NULL;

    return e && e->enabled && !e->inconsistent &&
           (e->successor.epoch ? e->successor.epoch : e->current.epoch) == s->epoch;
}

/* Of a group that may yet be committed nobody knows which table counts. */
static bool is_plain(const struct super *s)
{
    return tide_id_none(&s->group) && s->size_bytes == s->resizing_bytes;
}

/* What a cleaning of RANGES makes known: of the sets that writes mark at this moment, all of which
 * the superblock must name. */
static struct lesson *ask_durable(const struct keeper *k, const struct range *ranges, size_t n)
{
    const struct super *super = tide_super(k->tide);
    const struct bitmap *sets[TIDE_SUPER_BYTES / 64];
    size_t n_sets = 0;

    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!keeper_keeps(bm) || !dirty_recording(bm))
            continue;
        dirty_get_state(bm, &st);
        sets[n_sets] = st.successor ? st.successor : st.current;
        if (BROKEN(durable_in_users_bitmap))
            sets[n_sets] = st.current;
        else if (n_sets + 1 == ARRAY_SIZE(sets) || !is_live(k, keeper_set_of(k, sets[n_sets])))
            return NULL;
        n_sets++;
    }
    return is_plain(super) ? durable_ask(super, sets, n_sets, ranges, n) : NULL;
}

/* Both sets of every bitmap. */
static int hot_op_clean(void *owner, const uint32_t *regions, size_t n)
{
    struct keeper *k = owner;
    CLEANUP(memory_freep) struct range *ranges = xcalloc(n, sizeof *ranges);
    LOCKED(&k->area_lock);

    if (!k->tide)
        return -EIO;
    ranges_of(k, regions, n, ranges);
    const struct tide *t = k->tide;
    CLEANUP(lesson_freep) struct lesson *learned = ask_durable(k, ranges, n);
    int r = write_sets(k, false, ranges, n);
    if (r < 0 || k->tide != t)
        return r;
    r = BROKEN(clean_not_synced) ? 0 : tide_sync(k->tide);
    if (r == 0)
        durable_learn(&k->durable, tide_super(t), steal(learned));
    return r;
}

/* A deliberate fault: dirty in memory. */
static bool is_marked(const struct keeper *k, struct range r)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!keeper_keeps(bm) || !dirty_recording(bm))
            continue;
        dirty_get_state(bm, &st);
        if (bitmap_count_range(st.successor ? st.successor : st.current, r) < r.length)
            return false;
    }
    return true;
}

/* Durably dirty already, in all sets that a write marks. */
static bool is_known(const struct keeper *k, struct range r)
{
    if (BROKEN(durable_in_memory) && is_marked(k, r))
        return true;
    return k->tide && !tide_failed(k->tide) && !k->lost &&
           durable_has(&k->durable, tide_super(k->tide), r);
}

/* A task: the tide file has failed. */
static int make_anew(void *arg)
{
    struct keeper *k = arg;
    struct error err = ERROR_INIT;

    SHIELD();
    LOCKED(&k->lock);
    if (!k->lost && k->tide && tide_failed(k->tide) && keeper_renew(k, &err) < 0)
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

const struct hot_ops keeper_hot_ops = {hot_op_commit, hot_op_clean, hot_op_failed};

/* ---- writes ---- */

/* The bits of R are durable in every set that records. */
static int sync_marks(struct keeper *k, struct range r)
{
    LOCKED(&k->area_lock);

    if (k->tide)
        r = range_intersect(r, range_make(0, known_size(k)));
    int result = k->tide ? write_sets(k, true, &r, 1) : 0;
    if (result == 0)
        result = k->tide ? tide_sync(k->tide) : -EIO;
    return result;
}

/* Too many regions for the table: the bits are set, and made durable, before the data. */
static int write_through(struct keeper *k, struct range r)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        if (!keeper_keeps(bm) || !dirty_recording(bm))
            continue;
        dirty_get_state(bm, &st);
        bitmap_mark(st.successor ? st.successor : st.current, r);
    }
    int result = BROKEN(large_write_not_synced) ? 0 : sync_marks(k, r);
    if (result < 0) {
        make_anew(k); /* and the new file has them */
        result = k->lost ? 0 : sync_marks(k, r);
    }
    return k->refusing ? -EIO : result;
}

bool keeper_do_without_runtime(struct keeper *k, struct error *why)
{
    if (k->lost || !k->options.runtime)
        return false;
    log_warning("Node '%s': %s: after a kill its bitmaps will be as after a power loss",
                node_name(k->node), why->text);
    free((char *)steal(k->options.runtime));
    error_clear(why);
    return true;
}

void keeper_begin_use(struct keeper *k)
{
    struct error err = ERROR_INIT;

    if (keeper_change_state(k, &err) == 0 ||
        (keeper_do_without_runtime(k, &err) && keeper_change_state(k, &err) == 0))
        return;
    log_error("Node '%s': %s: its bitmaps do not survive a crash", node_name(k->node), err.text);
    if (!k->lost)
        keeper_give_up(k, &err);
}

static int begin_use(struct keeper *k)
{
    struct error err = ERROR_INIT;
    LOCKED(&k->lock);

    if (!k->in_use && !k->lost)
        keeper_begin_use(k);
    if (keeper_engage(k, &err) == 0)
        return 0;
    log_warning("Node '%s': %s: a write is refused", node_name(k->node), err.text);
    return -EIO;
}

/* Is this write the first change since the open, or since the image has been saved? What a killed
 * program has left tells of its last write: then it is, also where no bitmap records. */
static bool is_first(const struct keeper *k)
{
    if (k->options.image && !(BROKEN(guard_hot_passes) && k->in_use))
        return !keeper_is_engaged(k) &&
               (k->recording || (!k->in_use && !k->lost && k->tide && keeper_has_bitmaps(k)));
    return !k->in_use && !k->lost && (k->tide || k->recording);
}

/* ---- bitmaps of another driver over the same image ---- */

/* Does somebody write N who is not behind a node (raw, qcow2) that keeps bitmaps of its own? */
static bool is_written_directly(const struct node *n)
{
    const struct edge *e;

    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (e->parent ? !e->parent->driver->is_format && is_written_directly(e->parent)
                      : e->perm & (PERM_WRITE | PERM_RESIZE))
            return true;
    return false;
}

static bool peer_has_it(const struct keeper *k, const char *path)
{
    const struct keeper *peer;

    LIST_FOREACH (peer, k->options.peers, in_peers)
        if (peer != k && peer->tide && !peer->node->read_only && !strcmp(peer->options.path, path))
            return true;
    return false;
}

void keeper_led(struct keeper *k)
{
    k->led = true;
    k->voided = false;
}

/* Where bitmaps of the image are that K's node has now. NULL: there is no such place. */
static int find_path(const struct keeper *k, char **ret, struct error *err)
{
    CLEANUP(place_fini) struct place place = {0};
    struct keeper_options o = {.image = k->options.image};

    int r = k->led ? persist_options_read(k->node, &o, &place, err) : 0;
    if (r == 0)
        *ret = k->led ? steal(place.tide) : xstrdup(k->options.path);
    return r;
}

/* Closes T. */
static int void_tide(struct keeper *k, struct tide *t, const char *path, struct error *err)
{
    CLEANUP(tide_closep) struct tide *closed = t;
    CLEANUP(super_fini) struct super s = {0};
    struct tide_table *const tables[] = {&s.table, &s.next};
    bool any = false;

    if (tide_is_doubtful(t)) {
        log_warning("Node '%s': the image is written past the bitmaps that '%s' may have of a node "
                    "with another driver: they are lost",
                    node_name(k->node), path);
        return tide_remove(steal(closed), err);
    }
    super_copy(&s, tide_super(t));
    for (unsigned i = 0; i < ARRAY_SIZE(tables); i++)
        for (size_t j = 0; j < tables[i]->n; j++) {
            any |= !tables[i]->items[j].inconsistent;
            tables[i]->items[j].inconsistent = true;
        }
    if (!any)
        return 0;
    log_warning("Node '%s': the image is written past the bitmaps that '%s' has of a node with "
                "driver '%s': they are inconsistent from now on",
                node_name(k->node), path, s.driver);
    return tide_write_super(t, &s, err);
}

/* K has no bitmaps, but its image may have some, of a node with another driver: a `file` node alone
 * over the image of a raw one. What a user of K writes is in none of them; so they are made
 * inconsistent first, durably. While the other node is open its bitmaps do not record (else there
 * would be no such user, node_set_watched), and what does not record misses nothing. So it is with
 * another program that has the tide file. */
int keeper_void_others(struct keeper *k)
{
    CLEANUP(memory_freep) char *path = NULL;
    struct error err = ERROR_INIT;
    struct tide *t;

    if (k->voided || !is_written_directly(k->node))
        return 0;
    int r = find_path(k, &path, &err);
    if (path && peer_has_it(k, path))
        return 0;
    LOCKED(&k->lock);
    if (r == 0)
        r = k->voided || k->tide || !path ? -ENOENT : tide_open(path, false, &t, &err);
    else if (r == -ENOENT || r == -EBADMSG || r == -EBUSY || r == -ENODATA)
        r = -EIO;
    if (r == 0) {
        r = void_tide(k, t, path, &err);
    } else if (r == -ENODATA && !BROKEN(unreadable_left)) {
        /* When it can be read again it tells nothing of what is written now. */
        log_warning("Node '%s': %s: it is removed", node_name(k->node), err.text);
        error_clear(&err);
        r = tide_unlink(path, &err);
    } else if (r == -ENOENT || r == -EBADMSG || r == -EBUSY || r == -ENODATA) {
        r = 0;
    }
    if (r < 0)
        log_error("Node '%s': %s: its bitmaps would be believed: the write is refused",
                  node_name(k->node), err.text);
    k->voided = r == 0;
    return r < 0 ? -EIO : 0;
}

/* ---- the stamp ---- */

static int beat(void *arg)
{
    struct keeper *k = arg;

    while (k->stamp && stamp_in_flight(k->stamp) && sleep_until(clock_after_ns(STAMP_BEAT_NS)) == 0)
        if (k->stamp && stamp_in_flight(k->stamp) && !BROKEN(stamp_without_beat))
            stamp_beat(k->stamp);
    k->beating = false;
    return 0;
}

void keeper_stamp_begun(struct keeper *k)
{
    if (!k->stamp)
        return;
    stamp_write_begun(k->stamp);
    if (!k->beating) {
        k->beating = true;
        scope_spawn(&k->tasks, beat, k);
    }
}

/* A format's tables are written also when nobody writes: as long as an image is in use, or the
 * session of one that has no place for bitmaps lasts, so. */
void keeper_stamp_use(struct keeper *k, bool in_use)
{
    bool has_tables =
        k->options.image || (node_has_to_finish(k->node) && !BROKEN(metadata_unstamped));

    if (!has_tables || !k->stamp || k->stamped == in_use)
        return;
    k->stamped = in_use;
    if (in_use)
        keeper_stamp_begun(k);
    else
        stamp_write_done(k->stamp);
}

/* ---- around a write ---- */

static void one_has_given(struct keeper *k)
{
    assert(k->taken);
    if (--k->taken == 0)
        k->takes = k->recording;
}

/* The old tide file, or the guard, may still be found by the next program: a write that passes now
 * would be in none of the bitmaps that it has. */
static void await_end(struct keeper *k)
{
    if (k->giving_up) {
        LOCKED(&k->lock);
    }
}

static int let_pass(struct keeper *k, struct range r)
{
    /* Asked before "is it hot?": a write to a hot region is a first change, too. */
    int result = is_first(k) ? begin_use(k) : 0;

    if (result == 0 && !k->in_use && !k->lost && !k->tide && !k->recording)
        result = BROKEN(others_not_voided) ? 0 : keeper_void_others(k);
    if (result < 0)
        return result;
    await_end(k);
    if (k->refusing)
        return -EIO;
    if (k->lost)
        return 0;
    if (k->hot && k->takes && is_known(k, r)) {
        durable_pass(&k->durable, r);
    } else if (k->hot && k->takes) {
        k->taken++;
        result = hot_take(k->hot, r);
        if (result == -E2BIG)
            result = write_through(k, r);
        if (result < 0 && (!k->lost || k->refusing)) { /* else there is nothing left to lose */
            one_has_given(k);
            return result;
        }
    }
    keeper_stamp_begun(k);
    return 0;
}

int keeper_before_write(struct keeper *k, struct range r)
{
    int result = let_pass(k, r);

    if (result == 0)
        checkpoint_write_begun(k);
    return result;
}

void keeper_mark(struct keeper *k, struct range r)
{
    if (k->hot && k->takes && !is_known(k, r)) /* else no copy lacks it */
        hot_marked(k->hot, r);
}

void keeper_written(struct keeper *k, struct range r)
{
    const bool passed = durable_passed(&k->durable, r);

    if (!passed && k->hot && k->takes && !k->lost) { /* then some have taken nothing */
        hot_give(k->hot, r);
        one_has_given(k);
    }
    if (k->stamp)
        stamp_write_done(k->stamp);
    checkpoint_write_ended(k);
}
