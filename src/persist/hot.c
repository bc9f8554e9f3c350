/* The table of hot regions, its committer and its cleaner. See hot.h.
 *
 * What must hold, and what breaks when it does not (tests/faults/list: hot_...):
 *
 *     a region is hot only when its transaction has completed    else its writes are forgotten
 *     a pinned region does not leave                             its marks may come yet
 *     the marks since the last copy are counted before the copy  else they leave with the region
 *     a region whose removal is submitted is not hot             else a write passes, is forgotten
 *     a slot is free when its removal has completed              else one block changes it twice
 *     a waiting write gets all its regions in one step           else two wait for each other
 *
 * Slots stand in lists, least recently used first: `clean` (may leave now), `used` (hot; may be
 * pinned), `leaving`, `free`. A region is found through a hash of slots, open addressing over a
 * power of two. */
#include "persist/hot.h"

#include "base/broken.h"
#include "rt/clock.h"

#include <errno.h>
#include <sys/queue.h>

enum {
    OTHERS_MAX_NS = NSEC_PER_SEC / 500, /* a transaction waits no longer for those about to come */
    IN_VAIN_MAX = 31,                   /* so many do not wait after some that waited in vain */
};

enum slot_state { SLOT_FREE, SLOT_ENTERING, SLOT_HOT, SLOT_LEAVING };

struct slot {
    uint32_t region;
    uint32_t pins;
    enum slot_state state;
    bool marked;            /* since the copy that the cleaner has taken, or ever */
    bool clean;             /* in the list of those that may leave */
    bool asked;             /* by a checkpoint, to leave; hot, and nobody has taken it since */
    uint32_t period;        /* in which it was last taken, see HOT_UNUSED */
    TAILQ_ENTRY(slot) link; /* in `clean`, `used`, `leaving` or `free` */
};
TAILQ_HEAD(slot_list, slot);

/* A write that waits for its regions. */
struct taker {
    struct range r; /* in regions */
    struct task *task;
    int result;
    TAILQ_ENTRY(taker) link;
};

struct hot {
    struct hot_options options;
    const struct hot_ops *ops;
    void *owner;
    struct slot *slots;
    uint32_t *table; /* what the ring says, or will when the transaction under way has completed */
    uint16_t *index; /* hash of regions to slot + 1 */
    uint32_t index_mask;
    struct slot_list free, clean, used, leaving;
    unsigned n_free, n_clean, n_used, n_leaving;
    unsigned n_marked, n_asked;
    uint64_t n_pins;
    uint32_t period;
    TAILQ_HEAD(, taker) takers; /* the oldest first */
    unsigned n_takers;
    struct waitq commit_wanted, clean_wanted;
    unsigned expected;           /* so many takers waited when the last transaction completed */
    uint64_t others_until_ns;    /* they are waited for, no longer */
    struct event most_here;      /* as many wait again, or nobody will come */
    unsigned in_vain, unawaited; /* so many transactions do not wait for others, and still do not */
    struct waitq asked; /* who waits until nobody is asked to leave, and those asked have left */
    struct event go;    /* not set: something has failed */
    bool starved;       /* the committer finds no slot for all that the oldest write waits for */
    bool stopping, dead;
    struct scope tasks;
    struct hot_stats stats;
};

/* ---- regions by number ---- */

static uint32_t hash_of(const struct hot *h, uint32_t region)
{
    return (region * UINT32_C(2654435761)) >> 7 & h->index_mask;
}

static struct slot *find(const struct hot *h, uint32_t region)
{
    for (uint32_t i = hash_of(h, region); h->index[i]; i = (i + 1) & h->index_mask) {
        struct slot *s = &h->slots[h->index[i] - 1];
        if (s->region == region)
            return s;
    }
    return NULL;
}

static void index_add(struct hot *h, struct slot *s)
{
    uint32_t i = hash_of(h, s->region);

    while (h->index[i])
        i = (i + 1) & h->index_mask;
    h->index[i] = (uint16_t)(s - h->slots + 1);
}

static void index_remove(struct hot *h, const struct slot *s)
{
    uint32_t i = hash_of(h, s->region);

    while (h->index[i] != s - h->slots + 1)
        i = (i + 1) & h->index_mask;
    h->index[i] = 0;
    /* What was pushed behind it by a collision moves up. */
    for (uint32_t j = (i + 1) & h->index_mask; h->index[j]; j = (j + 1) & h->index_mask) {
        uint16_t moved = h->index[j];
        h->index[j] = 0;
        index_add(h, &h->slots[moved - 1]);
    }
}

/* ---- slots ---- */

static void set_clean(struct hot *h, struct slot *s, bool clean)
{
    if (s->clean == clean)
        return;
    TAILQ_REMOVE(clean ? &h->used : &h->clean, s, link);
    TAILQ_INSERT_TAIL(clean ? &h->clean : &h->used, s, link);
    h->n_used -= clean ? 1 : -1u;
    h->n_clean += clean ? 1 : -1u;
    s->clean = clean;
}

/* It has just been used: the last one to leave of its kind. */
static void touch(struct hot *h, struct slot *s)
{
    struct slot_list *l = s->clean ? &h->clean : &h->used;

    TAILQ_REMOVE(l, s, link);
    TAILQ_INSERT_TAIL(l, s, link);
}

static void set_marked(struct hot *h, struct slot *s, bool marked)
{
    h->n_marked += (unsigned)marked - (unsigned)s->marked;
    s->marked = marked;
}

/* It has left, or is in use again. */
static void unask(struct hot *h, struct slot *s)
{
    if (!s->asked)
        return;
    s->asked = false;
    h->n_asked--;
}

static bool is_hot(const struct slot *s)
{
    return s && (s->state == SLOT_HOT ||
                 (s->state == SLOT_LEAVING && BROKEN(checkpoint_left_still_hot)));
}

static struct range regions_of(const struct hot *h, struct range r)
{
    if (r.length == 0)
        return range_make(0, 0);
    uint64_t first = r.start >> h->options.region_bits;
    return range_between(first, ((range_end(r) - 1) >> h->options.region_bits) + 1);
}

static bool is_large(const struct hot *h, struct range regions)
{
    return regions.length > RING_CHANGES || regions.length > h->options.slots / 2;
}

static bool all_hot(const struct hot *h, struct range regions)
{
    for (uint64_t i = regions.start; i < range_end(regions); i++)
        if (!is_hot(find(h, (uint32_t)i)))
            return false;
    return true;
}

static void tell_leavers(struct hot *h)
{
    if (!h->n_asked && !h->n_leaving)
        waitq_wake_all(&h->asked);
}

static void pin(struct hot *h, struct range regions)
{
    for (uint64_t i = regions.start; i < range_end(regions); i++) {
        struct slot *s = find(h, (uint32_t)i);
        s->pins++;
        h->n_pins++;
        s->period = h->period;
        if (!BROKEN(checkpoint_leaves_marked))
            unask(h, s);
        if (!s->clean && s->state == SLOT_HOT)
            touch(h, s);
    }
    tell_leavers(h);
}

/* ---- writes ---- */

/* What is missing fills a transaction (a region that two wait for counts twice). */
static bool fills_transaction(const struct hot *h)
{
    const struct taker *t;
    unsigned n = 0;

    TAILQ_FOREACH (t, &h->takers, link)
        for (uint64_t i = t->r.start; i < range_end(t->r); i++)
            if (!find(h, (uint32_t)i) && ++n == RING_CHANGES)
                return true;
    return false;
}

/* Is the next transaction worth beginning at once? */
static bool most_are_here(const struct hot *h)
{
    return h->n_takers >= h->expected / 4 * 3 + h->expected % 4 || fills_transaction(h);
}

bool hot_try_take(struct hot *h, struct range r)
{
    const struct range regions = regions_of(h, r);

    /* Nobody overtakes when there is no slot for who waits: as long as others come and pin what is
     * there, there would be none. */
    if (h->dead || (h->starved && h->n_takers) || !all_hot(h, regions))
        return false;
    if (!BROKEN(hot_not_pinned))
        pin(h, regions);
    return true;
}

int hot_take(struct hot *h, struct range r)
{
    struct taker t = {.r = regions_of(h, r)};

    if (is_large(h, t.r))
        return -E2BIG;
    if (hot_try_take(h, r))
        return 0;
    if (h->dead)
        return -EIO;
    t.task = task_self();
    TAILQ_INSERT_TAIL(&h->takers, &t, link);
    h->n_takers++;
    if (!h->most_here.set && most_are_here(h))
        event_set(&h->most_here);
    waitq_wake_one(&h->commit_wanted);
    SHIELD();
    int suspended = task_suspend();
    assert(suspended == 0); /* shielded */
    return t.result;
}

/* Gives every write what it waits for, the oldest first, up to the first that lacks something:
 * those after it must not take what it will need. */
static void grant(struct hot *h)
{
    struct taker *t;

    while ((t = TAILQ_FIRST(&h->takers)) && (h->dead || all_hot(h, t->r))) {
        TAILQ_REMOVE(&h->takers, t, link);
        h->n_takers--;
        if (h->dead)
            t->result = -EIO;
        else if (!BROKEN(hot_not_pinned))
            pin(h, t->r);
        task_wake(t->task);
    }
}

static bool too_many_marked(const struct hot *h)
{
    return h->options.marked_max && h->n_marked > h->options.marked_max;
}

/* Deliberate faults: marks since the copy are not looked at. */
static bool leaves_marked(const struct slot *s)
{
    return BROKEN(hot_leaves_marked) || (s->asked && BROKEN(checkpoint_leaves_marked));
}

void hot_marked(struct hot *h, struct range r)
{
    const struct range regions = regions_of(h, r);

    if (is_large(h, regions))
        return;
    for (uint64_t i = regions.start; i < range_end(regions); i++) {
        struct slot *s = find(h, (uint32_t)i);
        if (!s)
            continue;
        set_marked(h, s, true);
        if (s->state == SLOT_HOT && !leaves_marked(s))
            set_clean(h, s, false);
    }
    if (too_many_marked(h))
        waitq_wake_one(&h->clean_wanted);
}

void hot_give(struct hot *h, struct range r)
{
    const struct range regions = regions_of(h, r);

    if (is_large(h, regions))
        return;
    for (uint64_t i = regions.start; i < range_end(regions); i++) {
        struct slot *s = find(h, (uint32_t)i);
        if (!s || s->pins == 0)
            continue;
        h->n_pins--;
        if (--s->pins == 0 && h->n_takers)
            waitq_wake_one(&h->commit_wanted);
    }
    if (h->n_takers || too_many_marked(h))
        waitq_wake_one(&h->clean_wanted);
}

/* ---- committing ---- */

static bool need_cleaning(const struct hot *h)
{
    return h->starved || h->n_free + h->n_clean < (h->options.slots + 3) / 4;
}

static bool is_wanted_by_oldest(const struct hot *h, uint32_t region)
{
    const struct taker *t = TAILQ_FIRST(&h->takers);

    return t && region >= t->r.start && region < range_end(t->r);
}

static bool may_leave(const struct hot *h, const struct slot *s)
{
    return !s->pins && !is_wanted_by_oldest(h, s->region);
}

/* S, which is clean, has left, or will have when the transaction is durable. */
static void leave(struct hot *h, struct slot *s)
{
    assert(!s->marked || leaves_marked(s));
    TAILQ_REMOVE(&h->clean, s, link);
    h->n_clean--;
    s->clean = false;
    set_marked(h, s, false);
    unask(h, s);
}

/* A slot that something else may have: a free one, or that of a region that leaves. */
static struct slot *take_slot(struct hot *h)
{
    struct slot *s = TAILQ_FIRST(&h->free);

    if (s) {
        TAILQ_REMOVE(&h->free, s, link);
        h->n_free--;
        return s;
    }
    TAILQ_FOREACH (s, &h->clean, link) {
        if (!may_leave(h, s))
            continue;
        leave(h, s);
        index_remove(h, s);
        return s;
    }
    return NULL;
}

static void enter(struct hot *h, struct ring_block *b, struct slot *s, uint32_t region)
{
    s->region = region;
    s->state = BROKEN(hot_before_durable) ? SLOT_HOT : SLOT_ENTERING;
    s->pins = 0;
    set_marked(h, s, false);
    s->period = h->period;
    TAILQ_INSERT_TAIL(&h->used, s, link);
    h->n_used++;
    index_add(h, s);
    b->changes[b->n_changes++] = (struct ring_change){(uint16_t)(s - h->slots), region};
    h->table[s - h->slots] = region;
}

/* The oldest waiting write, which is served first, misses a region that has found no slot. */
static bool lacks_slots(const struct hot *h)
{
    const struct taker *t = TAILQ_FIRST(&h->takers);

    for (uint64_t i = t ? t->r.start : 0; t && i < range_end(t->r); i++)
        if (!find(h, (uint32_t)i))
            return true;
    return false;
}

/* What waiting writes miss, the oldest first, as much as there is room for. */
static void gather_missing(struct hot *h, struct ring_block *b)
{
    struct taker *t;

    TAILQ_FOREACH (t, &h->takers, link) {
        for (uint64_t i = t->r.start; i < range_end(t->r); i++) {
            if (b->n_changes == RING_CHANGES)
                return;
            if (find(h, (uint32_t)i))
                continue; /* hot, or entering already */
            struct slot *s = take_slot(h);
            if (!s)
                return;
            enter(h, b, s, (uint32_t)i);
        }
    }
}

/* Those that a checkpoint has asked and that have been cleaned, in what room is left. */
static void gather_leaving(struct hot *h, struct ring_block *b)
{
    struct slot *s, *next;

    for (s = h->n_asked ? TAILQ_FIRST(&h->clean) : NULL; s; s = next) {
        next = TAILQ_NEXT(s, link);
        if (b->n_changes == RING_CHANGES)
            return;
        if (!s->asked || !may_leave(h, s))
            continue;
        leave(h, s);
        s->state = SLOT_LEAVING;
        if (!BROKEN(checkpoint_left_still_hot))
            index_remove(h, s);
        TAILQ_INSERT_TAIL(&h->leaving, s, link);
        h->n_leaving++;
        b->changes[b->n_changes++] = (struct ring_change){(uint16_t)(s - h->slots), REGION_NONE};
        h->table[s - h->slots] = REGION_NONE;
    }
}

/* B's transaction has completed. */
static void committed(struct hot *h, const struct ring_block *b)
{
    for (unsigned i = 0; i < b->n_changes; i++) {
        struct slot *s = &h->slots[b->changes[i].slot];
        if (s->state != SLOT_LEAVING) {
            s->state = SLOT_HOT;
            h->stats.entered++;
            continue;
        }
        if (BROKEN(checkpoint_left_still_hot)) {
            index_remove(h, s);
            h->n_pins -= s->pins;
            s->pins = 0;
            set_marked(h, s, false);
        }
        s->state = SLOT_FREE;
        TAILQ_REMOVE(&h->leaving, s, link);
        h->n_leaving--;
        TAILQ_INSERT_TAIL(&h->free, s, link);
        h->n_free++;
        h->stats.left++;
    }
    h->stats.commits++;
    tell_leavers(h);
}

/* Until the owner has put right what has failed. False: it could not. */
static bool wait_after_failure(struct hot *h, int error)
{
    if (h->dead || h->stopping) /* the owner puts nothing right any more */
        return false;
    event_reset(&h->go);
    h->ops->failed(h->owner, error);
    int r = event_wait(&h->go);
    return r == 0 && !h->dead && !h->stopping;
}

/* Those whom the last transaction has let go are about to come with their next writes. If the next
 * one began without them they would wait for two: for this one, then for their own, and each would
 * carry half of what it could. So most of them are waited for, for half the time that one takes at
 * most; more and more seldom if they do not come in that time, which is so if a disk is quick. */
static void await_others(struct hot *h)
{
    if (!h->n_takers || most_are_here(h) || clock_now_ns() >= h->others_until_ns)
        return;
    if (h->unawaited) {
        h->unawaited--;
        return;
    }
    event_reset(&h->most_here);
    int r = event_wait_until(&h->most_here, h->others_until_ns);
    assert(r == 0 || r == -ETIMEDOUT); /* shielded */
    /* Some who are nearly late come in time now and then: one success is no reason to wait always.
     */
    h->in_vain = r == 0 ? h->in_vain / 2 : (unsigned)min_u64(2 * h->in_vain + 1, IN_VAIN_MAX);
    h->unawaited = h->in_vain;
}

static int commit_timed(struct hot *h, struct ring_block *b)
{
    uint64_t began = clock_now_ns();
    int r = h->ops->commit(h->owner, b, h->table);
    uint64_t now = clock_now_ns();

    h->expected = h->n_takers;
    h->others_until_ns = now + min_u64((now - began) / 2, OTHERS_MAX_NS);
    return r;
}

static int committer(void *arg)
{
    struct hot *h = arg;
    struct ring_block *b = xnew(struct ring_block);

    SHIELD();
    while (await_others(h), !h->stopping && !h->dead) {
        b->n_changes = 0;
        gather_missing(h, b);
        h->starved = lacks_slots(h);
        gather_leaving(h, b);
        if (b->n_changes == 0) {
            if (h->starved)
                waitq_wake_one(&h->clean_wanted);
            int r = waitq_wait(&h->commit_wanted);
            assert(r == 0); /* shielded */
            continue;
        }
        if (need_cleaning(h))
            waitq_wake_one(&h->clean_wanted);
        if (BROKEN(hot_before_durable))
            grant(h);
        int r;
        do
            r = commit_timed(h, b);
        while (r < 0 && wait_after_failure(h, r));
        if (r < 0)
            break;
        committed(h, b);
        grant(h);
    }
    free(b);
    return 0;
}

/* ---- cleaning ---- */

/* Those that a checkpoint has asked to leave, and if slots will be needed half of all, the least
 * recently used ones; nobody has pinned them. Their marks count from here on. */
static size_t choose(struct hot *h, uint32_t *regions, struct slot **slots)
{
    bool by_need = need_cleaning(h), by_amount = too_many_marked(h);
    size_t ahead = by_need || by_amount ? (h->options.slots + 1) / 2 : 0, n = 0;
    struct slot *s;

    if (!ahead && !h->n_asked)
        return 0;
    TAILQ_FOREACH (s, &h->used, link) {
        if (s->state != SLOT_HOT || s->pins || !(s->asked || n < ahead))
            continue;
        set_marked(h, s, false);
        slots[n] = s;
        regions[n++] = s->region;
    }
    h->stats.amount_cleanings += n && by_amount && !by_need;
    return n;
}

static int by_region(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static int cleaner(void *arg)
{
    struct hot *h = arg;
    CLEANUP(memory_freep) uint32_t *regions = xcalloc(h->options.slots, sizeof *regions);
    CLEANUP(memory_freep)
    struct slot **slots = xcalloc(h->options.slots, sizeof(struct slot *));

    SHIELD();
    while (!h->stopping && !h->dead) {
        size_t n = choose(h, regions, slots);
        if (n == 0) {
            int r = waitq_wait(&h->clean_wanted);
            assert(r == 0); /* shielded */
            continue;
        }
        qsort(regions, n, sizeof *regions, by_region);
        int r;
        do
            r = h->ops->clean(h->owner, regions, n);
        while (r < 0 && wait_after_failure(h, r));
        if (r < 0)
            break;
        /* None of them can have left meanwhile: they were not clean. */
        for (size_t i = 0; i < n; i++)
            if (!slots[i]->marked || leaves_marked(slots[i])) {
                set_marked(h, slots[i], false);
                set_clean(h, slots[i], true);
            }
        h->stats.cleanings++;
        h->stats.cleaned += n;
        waitq_wake_one(&h->commit_wanted);
    }
    return 0;
}

/* ---- checkpoints ---- */

int hot_leave(struct hot *h, enum hot_which which)
{
    for (unsigned i = 0; i < h->options.slots && !h->dead; i++) {
        struct slot *s = &h->slots[i];
        if (s->state != SLOT_HOT || s->pins || s->asked ||
            (which == HOT_UNUSED && s->period == h->period))
            continue;
        s->asked = true;
        h->n_asked++;
    }
    if (which == HOT_UNUSED)
        h->period++;
    if (h->n_asked) {
        waitq_wake_one(&h->clean_wanted);
        waitq_wake_one(&h->commit_wanted);
    }
    while (!h->dead && (h->n_asked || h->n_leaving)) {
        int r = waitq_wait(&h->asked);
        if (r < 0)
            return r;
    }
    return h->dead ? -EIO : 0;
}

bool hot_is_cheap(const struct hot *h)
{
    unsigned hot = h->n_clean + h->n_used;

    return !h->dead && !h->n_takers && !h->n_pins && !h->n_leaving && hot && hot <= RING_CHANGES;
}

/* ---- the whole ---- */

struct hot *hot_new(const struct hot_options *o, const struct hot_ops *ops, void *owner)
{
    struct hot *h = xnew(struct hot);
    size_t index = 16;

    assert(o->slots >= TIDE_SLOTS_MIN && o->slots < UINT16_MAX);
    h->options = *o;
    h->ops = ops;
    h->owner = owner;
    h->slots = xcalloc(o->slots, sizeof *h->slots);
    h->table = xcalloc(o->slots, sizeof *h->table);
    while (index < 2 * (size_t)o->slots)
        index *= 2;
    h->index = xcalloc(index, sizeof *h->index);
    h->index_mask = (uint32_t)index - 1;
    TAILQ_INIT(&h->free);
    TAILQ_INIT(&h->clean);
    TAILQ_INIT(&h->used);
    TAILQ_INIT(&h->leaving);
    TAILQ_INIT(&h->takers);
    for (unsigned i = 0; i < o->slots; i++) {
        h->table[i] = REGION_NONE;
        TAILQ_INSERT_TAIL(&h->free, &h->slots[i], link);
    }
    h->n_free = o->slots;
    waitq_init(&h->commit_wanted);
    waitq_init(&h->clean_wanted);
    waitq_init(&h->asked);
    event_init(&h->most_here);
    event_init(&h->go);
    scope_init(&h->tasks);
    scope_spawn(&h->tasks, committer, h);
    scope_spawn(&h->tasks, cleaner, h);
    return h;
}

void hot_free(struct hot *h)
{
    if (!h)
        return;
    assert(h->n_takers == 0 && waitq_empty(&h->asked));
    h->stopping = true;
    waitq_wake_all(&h->commit_wanted);
    waitq_wake_all(&h->clean_wanted);
    event_set(&h->most_here);
    event_set(&h->go);
    {
        SHIELD();
        int r = scope_join(&h->tasks);
        (void)r; /* they return 0 */
    }
    scope_fini(&h->tasks);
    free(h->slots);
    free(h->table);
    free(h->index);
    free(h);
}

void hot_table(const struct hot *h, uint32_t *table)
{
    for (unsigned i = 0; i < h->options.slots; i++)
        table[i] = h->slots[i].state == SLOT_HOT ? h->slots[i].region : REGION_NONE;
}

size_t hot_unwritten(const struct hot *h, uint32_t *regions)
{
    const struct slot *s;
    size_t n = 0;

    TAILQ_FOREACH (s, &h->used, link)
        regions[n++] = s->region;
    qsort(regions, n, sizeof *regions, by_region);
    return n;
}

void hot_retry(struct hot *h)
{
    event_set(&h->go);
}

void hot_fail(struct hot *h)
{
    h->dead = true;
    event_set(&h->most_here);
    event_set(&h->go);
    waitq_wake_all(&h->commit_wanted);
    waitq_wake_all(&h->clean_wanted);
    waitq_wake_all(&h->asked);
    grant(h);
}

void hot_stats(const struct hot *h, struct hot_stats *ret)
{
    *ret = h->stats;
    ret->clean = h->n_clean;
    ret->waiting = h->n_takers;
    ret->marked = h->n_marked;
    for (unsigned i = 0; i < h->options.slots; i++)
        ret->hot += h->slots[i].state == SLOT_HOT;
}

bool hot_valid(const struct hot *h, const char **broken)
{
    unsigned n_free = 0, n_clean = 0, n_used = 0, n_leaving = 0, n_marked = 0, n_asked = 0;
    uint64_t n_pins = 0;
    const struct slot *s;
    const char *why = NULL;

    TAILQ_FOREACH (s, &h->free, link)
        n_free++;
    TAILQ_FOREACH (s, &h->clean, link) {
        n_clean++;
        if (!s->clean || s->marked || s->state != SLOT_HOT)
            why = "a clean slot is marked or not hot";
    }
    TAILQ_FOREACH (s, &h->used, link) {
        n_used++;
        if (s->clean || s->state == SLOT_FREE)
            why = "a used slot is free or clean";
    }
    TAILQ_FOREACH (s, &h->leaving, link) {
        n_leaving++;
        if (s->clean || s->asked || s->marked || s->pins || s->state != SLOT_LEAVING)
            why = "a slot that leaves is in use";
    }
    if (n_free != h->n_free || n_clean != h->n_clean || n_used != h->n_used ||
        n_leaving != h->n_leaving || n_free + n_clean + n_used + n_leaving != h->options.slots)
        why = "the lists do not add up";
    for (unsigned i = 0; !why && i < h->options.slots; i++) {
        s = &h->slots[i];
        bool held = s->state == SLOT_ENTERING || s->state == SLOT_HOT;
        if (held ? find(h, s->region) != s : find(h, s->region) == s)
            why = "a region is not found, or is though it is not there";
        if (h->table[i] != (held ? s->region : REGION_NONE))
            why = "the table says another region";
        if (s->asked && (s->pins || s->state != SLOT_HOT))
            why = "a slot in use is asked to leave";
        n_marked += s->marked;
        n_asked += s->asked;
        n_pins += s->pins;
    }
    if (!why && (n_marked != h->n_marked || n_asked != h->n_asked || n_pins != h->n_pins))
        why = "the counts do not add up";
    if (broken)
        *broken = why;
    return !why;
}
