/* Differing: see diff.h for what it promises.
 *
 *     disk \ base      zeroes                 data
 *     zeroes           neither is read        base is read: all zeroes?
 *     data             disk is read: ditto    both are read, at once
 *
 * What is zeroes is asked for, in units of 64 KiB; less than a unit of a kind is data. Guests may
 * change that while we look: then the successor has it before, and what we do with it is nothing
 * to anybody.
 *
 * `remaining` has what is not compared yet, in units. Only this engine changes it. */
#include "copy/diff.h"

#include "base/broken.h"
#include "block/driver.h"
#include "copy/crew.h"
#include "dirty/dirty.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <isa-l/mem_routines.h>

enum {
    WORKERS = 16,
    UNIT = 64 * 1024,
    RUN_MAX = 1024 * 1024, /* of data */
};
#define STATUS_AHEAD GiB /* asked about at once */

enum { READ_DISK = 1, READ_BASE = 2 }; /* a piece's tag */

struct side {
    struct edge *edge;
    uint64_t size;
    struct range known; /* what block status said last */
    bool known_zero;
};

struct diff {
    struct side disk, base;
    struct dirty_bitmap *bitmap;
    struct bitmap *found, *remaining;
    struct crew crew;
    uint64_t done, failed_at; /* bytes */
};

static const struct crew_ops crew_ops;

int diff_new(struct edge *disk, struct edge *base, struct dirty_bitmap *bitmap, struct diff **ret,
             struct error *err)
{
    struct diff *d = xnew(struct diff);

    d->disk = (struct side){.edge = disk, .size = node_size(disk->node)};
    d->base = (struct side){.edge = base, .size = node_size(base->node)};
    d->bitmap = bitmap;
    d->found = bitmap_new(d->disk.size, dirty_granularity(bitmap));
    d->remaining = bitmap_new(d->disk.size, UNIT);
    crew_init(&d->crew, &crew_ops, d, RUN_MAX);
    if (!d->found || !d->remaining) {
        diff_free(d);
        return error_set(err, ENOMEM, "No memory for what differs on node '%s'",
                         node_name(disk->node));
    }
    bitmap_mark_all(d->remaining);
    *ret = d;
    return 0;
}

void diff_free(struct diff *d)
{
    bitmap_free(d->found);
    bitmap_free(d->remaining);
    crew_fini(&d->crew);
    free(d);
}

const struct bitmap *diff_found(const struct diff *d)
{
    return d->found;
}

void diff_progress(const struct diff *d, uint64_t *done, uint64_t *total)
{
    *done = d->done;
    *total = d->disk.size;
}

/* ---- what need not be read ---- */

/* What S has from RUN's start, in whole units: cuts RUN to what is of one kind. */
static bool side_is_zero(struct side *s, struct range *run)
{
    if (run->start >= s->size)
        return true;
    if (run->start < s->known.start || run->start >= range_end(s->known)) {
        struct range ask = range_make(run->start, min_u64(STATUS_AHEAD, s->size - run->start));
        struct block_status st;
        uint64_t length = 0;
        s->known_zero = false;
        if (edge_status_above(s->edge, NULL, true, ask, &st) == 0) {
            s->known_zero = st.flags & STATUS_ZERO;
            length = min_u64(st.length, ask.length);
        }
        /* The last unit is one although the size cuts it. */
        if (run->start + length == s->size)
            length = align_up(length, UNIT);
        length = align_down(length, UNIT);
        if (length == 0) {
            s->known_zero = false;
            length = UNIT;
        }
        s->known = range_make(run->start, length);
    }
    *run = range_intersect(*run, s->known);
    return s->known_zero;
}

/* The start of RUN is dirty whatever the disks hold: cuts RUN to so much, in whole units. */
static bool is_dirty_anyway(const struct diff *d, struct range *run)
{
    struct dirty_state st;
    uint64_t length;

    dirty_get_state(d->bitmap, &st);
    const struct bitmap *sets[] = {st.successor, d->found};
    for (unsigned i = 0; i < ARRAY_SIZE(sets); i++) {
        if (!bitmap_status(sets[i], run->start, run->length, &length))
            continue;
        if (length < run->length)
            length = align_down(length, UNIT);
        if (length) {
            run->length = length;
            return true;
        }
    }
    return false;
}

static bool next_piece(void *opaque, uint64_t from, struct piece *ret)
{
    struct diff *d = opaque;
    struct range run;

    if (diff_resized(d) || !bitmap_next(d->remaining, from, STATUS_AHEAD, &run))
        return false;
    *ret = (struct piece){.zero = true};
    if (!is_dirty_anyway(d, &run)) {
        if (!side_is_zero(&d->disk, &run))
            ret->tag |= READ_DISK;
        if (!side_is_zero(&d->base, &run))
            ret->tag |= READ_BASE;
        if (BROKEN(compare_trusts_holes) && ret->tag != (READ_DISK | READ_BASE))
            ret->tag = 0;
    }
    if (ret->tag) {
        ret->zero = false;
        run.length = min_u64(run.length, RUN_MAX);
        ret->cost = run.length;
        ret->memory = ret->tag == (READ_DISK | READ_BASE) ? 2 * run.length : run.length;
    }
    ret->range = run;
    return true;
}

/* ---- comparing ---- */

struct reading {
    const struct side *side;
    struct range range;
    uint8_t *buf;
    int result;
};

static int read_side(void *arg)
{
    struct reading *rd = arg;
    uint64_t size = rd->side->size;
    struct range r = range_between(rd->range.start, min_u64(range_end(rd->range), size));
    SHIELD();

    rd->result = edge_read(rd->side->edge, r, rd->buf, REQ_REGISTERED_BUF);
    memset(rd->buf + r.length, 0, rd->range.length - r.length);
    return 0;
}

static int read_sides(struct reading *disk, struct reading *base, bool *disk_failed)
{
    SCOPE(other);

    if (base->buf && disk->buf)
        scope_spawn(&other, read_side, base);
    else if (base->buf)
        read_side(base);
    if (disk->buf)
        read_side(disk);
    int r = scope_join(&other);
    assert(r == 0);
    *disk_failed = disk->result < 0;
    return disk->result < 0 ? disk->result : base->result;
}

/* NULL: zeroes. */
static bool equal(uint8_t *a, uint8_t *b, uint64_t at, uint64_t length)
{
    if (a && b)
        return memcmp(a + at, b + at, length) == 0;
    return isal_zero_detect((a ? a : b) + at, length) == 0;
}

static void find(struct diff *d, struct range r, uint8_t *disk, uint8_t *base)
{
    const uint64_t granularity = bitmap_granularity(d->found), end = range_end(r);

    if (equal(disk, base, 0, r.length))
        return;
    for (uint64_t at = r.start, next; at < end; at = next) {
        next = min_u64(align_down(at, granularity) + granularity, end);
        if (!equal(disk, base, at - r.start, next - at))
            bitmap_mark(d->found, range_between(at, next));
    }
}

static int compare_data(struct diff *d, const struct piece *p, bool *disk_failed)
{
    struct reading disk = {.side = &d->disk, .range = p->range},
                   base = {.side = &d->base, .range = p->range};
    int r = 0;

    if (p->tag & READ_DISK && !(disk.buf = crew_take_buffer(&d->crew, p->range.length)))
        r = -ENOMEM;
    if (p->tag & READ_BASE && !(base.buf = crew_take_buffer(&d->crew, p->range.length)))
        r = -ENOMEM;
    if (r == 0)
        r = read_sides(&disk, &base, disk_failed);
    if (r == 0)
        find(d, p->range, disk.buf, base.buf);
    crew_give_buffer(&d->crew, disk.buf, p->range.length);
    crew_give_buffer(&d->crew, base.buf, p->range.length);
    return r;
}

static int compare_piece(void *opaque, const struct piece *p, bool *disk_failed)
{
    struct diff *d = opaque;
    struct range run = p->range;
    int r = 0;

    if (diff_resized(d))
        return -EINVAL;
    /* A guest may have written to all of it since the piece was cut. */
    if (p->tag && !(is_dirty_anyway(d, &run) && run.length == p->range.length))
        r = compare_data(d, p, disk_failed);
    if (r < 0)
        d->failed_at = p->range.start;
    if (r < 0 && !BROKEN(compare_forgets_failures))
        return r;
    bitmap_clear(d->remaining, p->range);
    d->done += p->range.length;
    return r;
}

static const struct crew_ops crew_ops = {.next = next_piece, .copy = compare_piece};

int diff_run(struct diff *d, bool *disk_failed)
{
    int r = crew_pass(&d->crew, WORKERS, disk_failed);
    return r == 0 && bitmap_count(d->remaining) ? -EINVAL : r;
}

bool diff_resized(const struct diff *d)
{
    return node_size(d->disk.edge->node) != d->disk.size;
}

uint64_t diff_failed_at(const struct diff *d)
{
    return d->failed_at;
}

void diff_interrupt(struct diff *d)
{
    crew_interrupt(&d->crew);
}

void diff_resume(struct diff *d)
{
    crew_resume(&d->crew);
}

void diff_set_speed(struct diff *d, uint64_t speed)
{
    crew_set_speed(&d->crew, speed);
}
