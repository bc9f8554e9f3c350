/* Following a source that changes: see follow.h for what it promises.
 *
 * A chunk is in one of these states:
 *
 *     bit    its lock held by    state
 *     set    nobody              to be copied
 *     set    worker              about to be copied
 *     clear  worker              on its way; set again when it fails or is written meanwhile
 *     clear  nobody              the target has it
 *     any    guest's write       write-blocking: source and target are being written
 *
 * Guests' writes are reported by the source's node after they have completed, well or not, so that
 * also those are seen that do not come through the filter. A write that the filter itself brings to
 * the target is not marked, or write-blocking would never be done: the filter says so beforehand,
 * and one report of a range within its own is taken for it. A second one that touches it means that
 * another was written meanwhile (below the filter), and nobody knows whose bytes the source has:
 * then what the filter has does not go to the target, and the chunk is marked.
 */
#include "copy/follow.h"

#include "base/broken.h"
#include "block/driver.h"
#include "copy/crew.h"
#include "dirty/dirty.h"
#include "rt/clock.h"
#include "rt/sync.h"
#include "rt/task.h"

enum {
    WORKERS = 16,
    IO_MIN = 1024 * 1024,
    IO_MAX = 16 * 1024 * 1024,
    ZERO_RUN_MAX = 64 * 1024 * 1024,  /* of zeroes: nothing is read */
    STATUS_AHEAD = 128 * 1024 * 1024, /* asked about at once */
};
#define IDLE_NS (NSEC_PER_SEC / 10)

static const struct crew_ops crew_ops;

struct follow {
    struct edge *source, *target; /* lent */
    uint64_t size, granularity;
    uint64_t unit; /* what is copied is whole ones of these: granularity, or more */
    uint64_t buffer, io_bytes;
    unsigned workers;
    bool unmap, blocking;
    bool whole;  /* never a part of a unit, if the target does not have it */
    bool failed; /* a guest's write has not reached the target, and no run since */
    bool synced; /* nothing was dirty or on its way, and nothing became dirty since */
    void (*on_failure)(void *opaque, int code);
    void *opaque;

    struct write_observer observer;
    struct dirty_bitmap *shown;
    struct bitmap *dirty;   /* its bits */
    struct bitmap *touched; /* on the target, or tried; NULL: nobody will ask */
    struct rangelock locks;
    TAILQ_HEAD(, follow_write) writes;

    struct crew crew;
    bool idle;
    struct event nudge;       /* ends being idle */
    uint64_t done, in_flight; /* bytes */

    struct range hint; /* what block status said last; guests may have changed it */
    bool hint_zero;
};

/* ---- what guests write ---- */

static void mark(struct follow *f, struct range r)
{
    bitmap_mark(f->dirty, r);
    f->synced = false;
    if (f->idle)
        event_set(&f->nudge);
}

static void observer_mark(struct write_observer *o, struct range r)
{
    /* The source may still have the old bytes: only `written` counts. */
}

static void observer_written(struct write_observer *o, struct range r, int result)
{
    struct follow *f = container_of(o, struct follow, observer);
    struct follow_write *w;
    bool own = false;

    TAILQ_FOREACH (w, &f->writes, link) {
        if (!range_overlaps(w->range, r))
            continue;
        if (!w->reported && w->range.start <= r.start && range_end(r) <= range_end(w->range))
            own = w->reported = true;
        else
            w->disturbed = true;
    }
    if (!own)
        mark(f, r);
}

static void observer_changed(struct write_observer *o, struct range r)
{
    mark(container_of(o, struct follow, observer), r);
}

/* Another size is the end of it: whoever has the follow sees that when it comes back to him. */
static void observer_resized(struct write_observer *o, uint64_t from, uint64_t to)
{
    follow_interrupt(container_of(o, struct follow, observer));
}

/* ---- coming and going ---- */

static uint64_t default_granularity(struct node *target)
{
    uint64_t cluster = node_cluster_size(target);
    if (cluster == 0 || !is_power_of_2(cluster))
        return 64 * KiB;
    return max_u64(4 * KiB, min_u64(cluster, 64 * KiB));
}

static void size_buffers(struct follow *f, uint64_t buffer)
{
    f->buffer = align_up(buffer ? buffer : (uint64_t)WORKERS * IO_MIN, f->granularity);
    f->io_bytes = min_u64(max_u64(f->buffer / WORKERS, IO_MIN), f->buffer);
    f->io_bytes = min_u64(align_up(f->io_bytes, 4096), IO_MAX);
    f->workers = (unsigned)max_u64(1, min_u64(WORKERS, f->buffer / f->io_bytes));
}

int follow_new(struct edge *source, struct edge *target, const struct follow_options *options,
               struct follow **ret, struct error *err)
{
    struct node *n = source->node;
    struct dirty_bitmap *shown;
    uint64_t granularity =
        options->granularity ? options->granularity : default_granularity(target->node);
    int r = dirty_add(n, NULL, granularity, options->blocking ? DIRTY_DISABLED : 0, &shown, err);
    if (r < 0)
        return r;

    struct follow *f = xnew(struct follow);
    f->source = source;
    f->target = target;
    f->size = node_size(n);
    f->granularity = f->unit = granularity;
    f->whole = options->whole_clusters;
    if (f->whole)
        f->unit = max_u64(granularity, node_cluster_size(node_skip_filters(target->node)));
    f->unmap = options->unmap;
    f->blocking = options->blocking;
    f->touched = options->recall ? bitmap_new(f->size, f->unit) : NULL;
    if (options->recall && !f->touched) {
        dirty_release(shown);
        free(f);
        return error_set_errno(err, ENOMEM, "bitmap of node '%s'", node_name(n));
    }
    size_buffers(f, options->buffer);
    f->shown = shown;
    f->dirty = dirty_bits(shown);
    rangelock_init(&f->locks);
    crew_init(&f->crew, &crew_ops, f, f->io_bytes);
    event_init(&f->nudge);
    TAILQ_INIT(&f->writes);
    f->observer.mark = observer_mark;
    f->observer.written = observer_written;
    f->observer.changed = observer_changed;
    f->observer.resized = observer_resized;
    node_observe(n, &f->observer);
    *ret = f;
    return 0;
}

void follow_free(struct follow *f)
{
    assert(rangelock_idle(&f->locks) && TAILQ_EMPTY(&f->writes) && f->in_flight == 0);
    node_unobserve(dirty_node(f->shown), &f->observer);
    dirty_release(f->shown);
    bitmap_free(f->touched);
    crew_fini(&f->crew);
    free(f);
}

struct bitmap *follow_dirty(struct follow *f)
{
    return f->dirty;
}

const struct bitmap *follow_touched(const struct follow *f)
{
    return f->touched;
}

void follow_hold_back(struct follow *f)
{
    f->failed = true;
}

uint64_t follow_buffer(const struct follow *f)
{
    return f->buffer;
}

void follow_progress(const struct follow *f, uint64_t *done, uint64_t *total)
{
    *done = f->done;
    *total = f->done + f->in_flight + bitmap_count(f->dirty);
}

void follow_set_speed(struct follow *f, uint64_t speed)
{
    crew_set_speed(&f->crew, speed);
}

void follow_interrupt(struct follow *f)
{
    crew_interrupt(&f->crew);
    event_set(&f->nudge);
}

void follow_resume(struct follow *f)
{
    crew_resume(&f->crew);
}

/* ---- to begin with ---- */

static bool zeroes_cheaply(const struct follow *f)
{
    const struct node *n = f->target->node;
    return n->discard_unmap && (n->write_zeroes_flags & REQ_MAY_UNMAP);
}

int follow_zero_target(struct follow *f)
{
    if (!zeroes_cheaply(f)) {
        bitmap_mark_all(f->dirty);
        return 0;
    }
    for (uint64_t at = 0; at < f->size;) {
        struct range r = range_make(at, min_u64(f->size - at, GiB));
        int ret = edge_write_zeroes(f->target, r, f->unmap ? REQ_MAY_UNMAP : 0);
        if (ret < 0)
            return ret;
        if (f->crew.interrupted)
            return -EINTR;
        at = range_end(r);
    }
    return 1;
}

int follow_mark_allocated(struct follow *f, struct node *base, bool skip_zeroes)
{
    for (uint64_t at = 0; at < f->size;) {
        struct range r = range_make(at, f->size - at);
        uint64_t length = 0;
        int ret;
        if (skip_zeroes) {
            struct block_status st;
            ret = edge_status_above(f->source, NULL, true, r, &st);
            if (ret == 0) {
                length = st.length;
                ret = !(st.flags & STATUS_ZERO);
            }
        } else {
            ret = edge_allocated_above(f->source, base, base != NULL, r, &length);
        }
        if (ret < 0)
            return ret;
        if (length == 0)
            length = r.length;
        if (ret > 0)
            bitmap_mark(f->dirty, range_make(at, length));
        if (f->crew.interrupted)
            return -EINTR;
        at += length;
    }
    return 0;
}

/* ---- copying ---- */

static int copy_part(struct follow *f, struct range r, void **buf, bool *read_failed)
{
    if (!*buf) {
        *buf = crew_take_buffer(&f->crew, f->io_bytes);
        if (!*buf)
            return -ENOMEM;
    }
    int ret = edge_read(f->source, r, *buf, 0);
    if (ret < 0) {
        *read_failed = true;
        return ret;
    }
    return edge_write(f->target, r, *buf, REQ_REGISTERED_BUF);
}

/* The first part of R that is of one kind, and which. What cannot be told is data. */
static struct range look(struct follow *f, struct range r, bool *zero)
{
    struct block_status st;
    *zero = false;
    if (edge_status_above(f->source, NULL, true, r, &st) == 0 && st.length) {
        *zero = st.flags & STATUS_ZERO;
        r.length = min_u64(r.length, st.length);
    }
    if (!*zero)
        r.length = min_u64(r.length, f->io_bytes);
    return r;
}

/* Copies RUN, dirty or not; the caller holds its lock. */
static int copy_held(struct follow *f, struct range run, bool *read_failed)
{
    void *buf = NULL;
    struct range rest = run;
    int r = 0;

    if (f->touched)
        bitmap_mark(f->touched, run);
    if (!BROKEN(mirror_clears_after_copy))
        bitmap_clear(f->dirty, run);
    f->in_flight += run.length;
    while (r == 0 && !range_empty(rest)) {
        bool zero;
        struct range part = look(f, rest, &zero);
        if (zero)
            r = edge_write_zeroes(f->target, part, f->unmap ? REQ_MAY_UNMAP : 0);
        else
            r = copy_part(f, part, &buf, read_failed);
        if (r == 0)
            rest = range_between(range_end(part), range_end(rest));
    }
    f->in_flight -= run.length;
    f->done += run.length - rest.length;
    if (BROKEN(mirror_clears_after_copy))
        bitmap_clear(f->dirty, run);
    if (r < 0)
        mark(f, rest);
    crew_give_buffer(&f->crew, buf, f->io_bytes);
    return r;
}

static int copy_run(struct follow *f, struct range run, bool *read_failed)
{
    RANGE_HOLDER(held);
    int r = rangelock_take(&f->locks, &held, run, RANGE_EXCLUSIVE);
    assert(r == 0);
    return copy_held(f, run, read_failed);
}

/* Cuts RUN to what a worker should take, as far as can be told without its lock. */
static struct range cut_run(struct follow *f, struct range run, bool *zero)
{
    if (run.start < f->hint.start || run.start >= range_end(f->hint)) {
        struct block_status st;
        struct range ask = range_make(run.start, min_u64(STATUS_AHEAD, f->size - run.start));
        f->hint = range_make(run.start, 1);
        f->hint_zero = false;
        if (edge_status_above(f->source, NULL, true, ask, &st) == 0 && st.length) {
            f->hint = range_make(run.start, min_u64(st.length, ask.length));
            f->hint_zero = st.flags & STATUS_ZERO;
        }
    }
    uint64_t most = max_u64(f->io_bytes, f->unit);
    *zero = f->hint_zero;
    if (*zero)
        most = max_u64(most, min_u64(range_end(f->hint) - run.start, ZERO_RUN_MAX));
    run.length = min_u64(run.length, align_down(most, f->unit));
    run = range_round_out(run, f->unit);
    return range_intersect(run, range_make(0, f->size));
}

static bool next_piece(void *opaque, uint64_t from, struct piece *ret)
{
    struct follow *f = opaque;
    struct range run;
    bool zero;

    if (!bitmap_next(f->dirty, from, ZERO_RUN_MAX, &run))
        return false;
    run = cut_run(f, run, &zero);
    /* Memory is `buffer`, and its workers are as many as that has room for. */
    *ret = (struct piece){run, zero, zero && zeroes_cheaply(f) ? 0 : run.length, 0, 0};
    return true;
}

static int copy_piece(void *opaque, const struct piece *p, bool *read_failed)
{
    struct follow *f = opaque;

    /* Another may have taken it meanwhile. */
    return bitmap_any(f->dirty, p->range) ? copy_run(f, p->range, read_failed) : 0;
}

static const struct crew_ops crew_ops = {.next = next_piece, .copy = copy_piece};

int follow_run(struct follow *f, uint64_t enough, unsigned passes, bool *read_failed)
{
    SHIELD();
    *read_failed = false;
    f->failed = false;
    while (!f->crew.interrupted) {
        uint64_t dirty = bitmap_count(f->dirty);
        f->synced = dirty == 0;
        if (dirty <= enough)
            return 0;
        int r = crew_pass(&f->crew, f->workers, read_failed);
        if (r < 0)
            return r;
        if (passes && --passes == 0)
            return 0;
    }
    return -EINTR;
}

int follow_drain(struct follow *f, bool *read_failed)
{
    struct range run;
    *read_failed = false;
    while (bitmap_next(f->dirty, 0, f->io_bytes, &run)) {
        run = range_intersect(range_round_out(run, f->unit), range_make(0, f->size));
        int r = copy_run(f, run, read_failed);
        if (r < 0)
            return r;
    }
    return 0;
}

void follow_idle(struct follow *f)
{
    SHIELD();
    int r;
    f->idle = true;
    while (!f->crew.interrupted && bitmap_count(f->dirty) == 0) {
        event_reset(&f->nudge);
        r = event_wait(&f->nudge);
        assert(r == 0);
    }
    f->idle = false;
    /* What is written once is often written again. */
    event_reset(&f->nudge);
    if (!f->crew.interrupted)
        r = event_wait_until(&f->nudge, clock_after_ns(IDLE_NS));
    (void)r;
}

/* ---- write-blocking ---- */

bool follow_blocking(const struct follow *f)
{
    return f->blocking;
}

bool follow_synced(const struct follow *f)
{
    return f->blocking && f->synced;
}

void follow_set_blocking(struct follow *f)
{
    (void)!dirty_set_enabled(f->shown, false, NULL);
    f->blocking = true;
}

void follow_on_failure(struct follow *f, void (*fn)(void *opaque, int code), void *opaque)
{
    f->on_failure = fn;
    f->opaque = opaque;
}

bool follow_wants(const struct follow *f, struct range r, unsigned flags)
{
    return f->blocking && !BROKEN(write_blocking_is_background) && !f->failed &&
           !(flags & REQ_WRITE_UNCHANGED) && !range_empty(r) && range_end(r) <= f->size;
}

void follow_write_begin(struct follow *f, struct follow_write *w, struct range r)
{
    w->range = r;
    w->held.lock = NULL;
    int ret = rangelock_take(&f->locks, &w->held, range_round_out(r, f->unit), RANGE_EXCLUSIVE);
    assert(ret == 0); /* shielded, as every request */
    w->reported = w->disturbed = false;
    TAILQ_INSERT_TAIL(&f->writes, w, link);
}

/* The same bytes to the target. A chunk that is covered in part is as clean as it was. */
static int pass_on(struct follow *f, struct range r, const void *buf, unsigned flags)
{
    int ret;

    if (f->touched)
        bitmap_mark(f->touched, r);
    bitmap_clear(f->dirty, r);
    f->in_flight += r.length;
    if (buf)
        ret = edge_write(f->target, r, buf, 0);
    else
        ret = edge_write_zeroes(f->target, r, f->unmap ? flags & (unsigned)REQ_MAY_UNMAP : 0);
    f->in_flight -= r.length;
    if (ret == 0)
        f->done += r.length;
    else if (!BROKEN(refused_guest_write_not_marked))
        mark(f, r);
    return ret;
}

void follow_write_end(struct follow *f, struct follow_write *w, int result, const void *buf,
                      unsigned flags)
{
    struct range r = w->range;
    bool read_failed;
    int ret = 0;

    TAILQ_REMOVE(&f->writes, w, link);
    if (result < 0 || w->disturbed)
        mark(f, r); /* nobody knows what the source has there now */
    else if (f->whole && !range_aligned(r, f->unit))
        ret = copy_held(f, range_intersect(range_round_out(r, f->unit), range_make(0, f->size)),
                        &read_failed);
    else
        ret = pass_on(f, r, buf, flags);
    if (ret < 0) {
        f->failed = true;
        if (f->on_failure)
            f->on_failure(f->opaque, -ret);
    }
    rangelock_release(&w->held);
}
