/* The copy engine. See copy.h for what it promises.
 *
 * A chunk is in one of three states, and two facts tell which:
 *
 *     bit in `remaining`   its lock held   state
 *            set                no         to be copied
 *            set                yes        on its way (or just failed)
 *            clear              any        on the target
 *
 * The bit is cleared after the target has taken the chunk, before the lock is released, with no
 * wait between. So a failed copy leaves the chunk where it was, and whoever finds the bit clear
 * needs no lock: what was saved stays saved.
 *
 * The job looks for work at a cursor that all its workers share; guests take chunks wherever they
 * write. Both come to copy_piece(), which asks again under the lock what still remains. */
#include "copy/copy.h"

#include "base/broken.h"
#include "block/driver.h"
#include "copy/crew.h"
#include "dirty/dirty.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <isa-l/mem_routines.h>

enum {
    CHUNK_MIN = 64 * 1024,
    RUN_MAX = 1024 * 1024,            /* of data, unless a chunk is larger */
    ZERO_RUN_MAX = 64 * 1024 * 1024,  /* of zeroes: nothing is read */
    STATUS_AHEAD = 128 * 1024 * 1024, /* asked about at once */
    WORKERS = 64,
};

static const struct crew_ops crew_ops;

struct copy {
    struct edge *source, *target; /* lent */
    struct node *top;             /* the source without its filters, as it was; a reference */
    uint64_t size, chunk;
    unsigned write_flags;
    struct dirty_bitmap *shown; /* `remaining` as queries see it */
    struct bitmap *remaining;
    struct bitmap *saved;
    struct rangelock locks;
    unsigned busy;

    struct crew crew;
    uint64_t run_max; /* of this copy_run: the longest run of data */
    uint64_t done;    /* bytes, whole chunks */

    struct range known; /* what block status said last; true for chunks that remain */
    bool known_zero;
};

/* Is NODE in the subtree of TOP? */
static bool reaches(struct node *top, struct node *node)
{
    if (top == node)
        return true;
    struct edge *e;
    TAILQ_FOREACH (e, &top->children, in_children) {
        if (reaches(e->node, node))
            return true;
    }
    return false;
}

int copy_new(struct edge *source, struct edge *target, const struct bitmap *what, struct copy **ret,
             struct error *err)
{
    struct copy *c = xnew(struct copy);
    c->source = source;
    c->target = target;
    c->size = node_size(source->node);
    c->chunk = max_u64(CHUNK_MIN, node_cluster_size(node_skip_filters(target->node)));
    /* Somebody may read the target while it is made from its own backing image (fleecing): what he
     * reads from there must not be what a guest has written since. */
    if (reaches(target->node, source->node))
        c->write_flags = REQ_SERIALISING;

    struct node *n = source->node;
    graph_quiesce_begin(node_graph(n), &n, 1);
    int r = dirty_add(n, NULL, c->chunk, DIRTY_DISABLED, &c->shown, err);
    graph_quiesce_end(node_graph(n), &n, 1);
    c->saved = r < 0 ? NULL : bitmap_new(c->size, c->chunk);
    if (r == 0 && !c->saved) {
        dirty_release(c->shown);
        r = error_set_errno(err, ENOMEM, "No memory for what has been copied of node '%s'",
                            node_name(n));
    }
    if (r < 0) {
        free(c);
        return r;
    }
    c->remaining = dirty_bits(c->shown);
    if (what)
        bitmap_merge_range(c->remaining, what, range_make(0, c->size));
    else
        bitmap_mark_all(c->remaining);
    rangelock_init(&c->locks);
    crew_init(&c->crew, &crew_ops, c, max_u64(RUN_MAX, c->chunk));
    c->top = node_ref(node_skip_filters(n));
    node_ref(n); /* an overlay may come between us and it, and part from it: its list has `shown` */
    *ret = c;
    return 0;
}

void copy_free(struct copy *c)
{
    assert(!c->busy && rangelock_idle(&c->locks));
    CLEANUP(node_unrefp) struct node *n = dirty_node(c->shown);
    graph_quiesce_begin(node_graph(n), &n, 1);
    dirty_release(c->shown);
    graph_quiesce_end(node_graph(n), &n, 1);
    node_unref(c->top);
    bitmap_free(c->saved);
    crew_fini(&c->crew);
    free(c);
}

uint64_t copy_chunk_bytes(const struct copy *c)
{
    return c->chunk;
}

struct bitmap *copy_remaining(struct copy *c)
{
    return c->remaining;
}

const struct bitmap *copy_saved(const struct copy *c)
{
    return c->saved;
}

struct copy_progress copy_progress(const struct copy *c)
{
    return (struct copy_progress){c->done, c->done + bitmap_count(c->remaining)};
}

/* ---- one piece ---- */

static int write_run(struct copy *c, struct range r, bool zero, bool *read_failed)
{
    unsigned flags = c->write_flags;
    *read_failed = false;
    if (zero)
        return edge_write_zeroes(c->target, r, flags | REQ_MAY_UNMAP);

    void *buf = crew_take_buffer(&c->crew, r.length);
    if (!buf)
        return -ENOMEM;
    int ret = edge_read(c->source, r, buf, 0);
    if (ret < 0)
        *read_failed = true;
    else if (isal_zero_detect(buf, r.length) == 0)
        ret = edge_write_zeroes(c->target, r, flags | REQ_MAY_UNMAP);
    else
        ret = edge_write(c->target, r, buf, flags | REQ_REGISTERED_BUF);
    crew_give_buffer(&c->crew, buf, r.length);
    return ret;
}

/* Copies what remains in PIECE (chunks, cut by the size), under its lock. */
static int copy_piece(struct copy *c, struct range piece, bool zero, bool *read_failed)
{
    SHIELD();
    RANGE_HOLDER(held);
    int r = rangelock_take(&c->locks, &held, piece, RANGE_EXCLUSIVE);
    assert(r == 0);

    struct range run;
    uint64_t from = piece.start;
    c->busy++;
    while (r == 0 && from < range_end(piece) &&
           bitmap_next(c->remaining, from, range_end(piece) - from, &run)) {
        run = range_intersect(run, piece);
        if (range_empty(run))
            break;
        if (BROKEN(chunk_taken_before_copied))
            bitmap_clear(c->remaining, run);
        r = write_run(c, run, zero, read_failed);
        if (r == 0) {
            bitmap_clear(c->remaining, run);
            bitmap_mark(c->saved, run);
            c->done += align_up(run.length, c->chunk);
        }
        from = range_end(run);
    }
    c->busy--;
    return r;
}

int copy_hold(struct copy *c, struct range r)
{
    uint64_t most = max_u64(RUN_MAX, c->chunk);
    struct range all = range_round_out(r, c->chunk), run;
    all = range_intersect(all, range_make(0, c->size));

    while (!range_empty(all) && bitmap_next(c->remaining, all.start, most, &run)) {
        run = range_intersect(run, all);
        if (range_empty(run))
            break;
        bool read_failed;
        int ret = copy_piece(c, run, false, &read_failed);
        if (ret < 0 && BROKEN(failed_save_not_remaining))
            bitmap_clear(c->remaining, run);
        if (ret < 0)
            return ret;
        all = range_between(range_end(run), range_end(all));
    }
    return 0;
}

/* ---- the job ---- */

/* What block status says of the chunks from RUN's start: cuts RUN to what is of one kind. */
static bool run_is_zero(struct copy *c, struct range *run)
{
    if (run->start < c->known.start || run->start >= range_end(c->known)) {
        struct block_status st;
        struct range ask = range_make(run->start, min_u64(STATUS_AHEAD, c->size - run->start));
        bool zero = false;
        uint64_t length = 0;
        if (edge_status_above(c->source, NULL, true, ask, &st) == 0) {
            zero = st.flags & STATUS_ZERO;
            length = min_u64(st.length, ask.length);
        }
        /* Less than a chunk of a kind is a chunk of data; so is what cannot be told. */
        if (run->start + length < c->size)
            length = align_down(length, c->chunk);
        if (length == 0) {
            zero = false;
            length = min_u64(c->chunk, c->size - run->start);
        }
        c->known = range_make(run->start, length);
        c->known_zero = zero;
    }
    *run = range_intersect(*run, c->known);
    return c->known_zero;
}

static bool next_piece(void *opaque, uint64_t from, struct piece *ret)
{
    struct copy *c = opaque;
    struct range run;
    uint64_t longest = c->crew.rate.speed ? c->run_max : max_u64(c->run_max, ZERO_RUN_MAX);

    if (!bitmap_next(c->remaining, from, longest, &run))
        return false;
    bool zero = run_is_zero(c, &run);
    if (!zero)
        run.length = min_u64(run.length, c->run_max);
    *ret = (struct piece){run, zero, align_up(run.length, c->chunk), zero ? 0 : run.length, 0};
    return true;
}

static int copy_one(void *opaque, const struct piece *p, bool *read_failed)
{
    return copy_piece(opaque, p->range, p->zero, read_failed);
}

static const struct crew_ops crew_ops = {.next = next_piece, .copy = copy_one};

int copy_run(struct copy *c, const struct copy_limits *limits, bool *read_failed)
{
    SHIELD();
    uint64_t max_run = max_u64(RUN_MAX, c->chunk);
    unsigned workers = WORKERS;
    if (limits && limits->max_run_bytes)
        max_run = max_u64(c->chunk, align_down(min_u64(max_run, limits->max_run_bytes), c->chunk));
    if (limits && limits->max_workers)
        workers = limits->max_workers;

    c->run_max = max_run;
    for (;;) {
        int r = crew_pass(&c->crew, workers, read_failed);
        /* What guests failed to save while we were beyond it is ours again. */
        if (r < 0 || bitmap_count(c->remaining) == 0)
            return r;
    }
}

void copy_interrupt(struct copy *c)
{
    crew_interrupt(&c->crew);
}

void copy_resume(struct copy *c)
{
    crew_resume(&c->crew);
}

void copy_set_speed(struct copy *c, uint64_t speed)
{
    crew_set_speed(&c->crew, speed);
}

int copy_drop_unallocated(struct copy *c, uint64_t offset, uint64_t *next)
{
    struct node *top = c->top;
    uint64_t end = offset, length;

    if (BROKEN(top_is_the_overlay))
        top = node_skip_filters(c->source->node);
    while (end < c->size) {
        length = 0;
        int r = edge_allocated_above(c->source, top, true, range_make(end, c->size - end), &length);
        if (r < 0)
            return r;
        if (length == 0)
            break;
        if (r > 0) {
            /* A chunk that is allocated in part is copied whole. */
            copy_drop(c, range_between(offset, align_down(end, c->chunk)));
            *next = min_u64(align_up(end + length, c->chunk), c->size);
            return 0;
        }
        end += length;
    }
    copy_drop(c, range_between(offset, c->size));
    *next = c->size;
    return 0;
}

void copy_drop(struct copy *c, struct range r)
{
    if (!range_empty(r))
        bitmap_clear(c->remaining, r);
}
