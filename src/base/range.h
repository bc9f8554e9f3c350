/* A span of a disk in bytes, [start, start + length). Never wraps: whoever makes one
 * from foreign numbers asks range_fits() first. */
#pragma once

#include "base/macros.h"

struct range {
    uint64_t start;  /* bytes */
    uint64_t length; /* bytes */
};

static inline struct range range_make(uint64_t start, uint64_t length)
{
    return (struct range){start, length};
}

/* From START up to END, empty when END is not beyond START. */
static inline struct range range_between(uint64_t start, uint64_t end)
{
    return (struct range){start, end > start ? end - start : 0};
}

static inline uint64_t range_end(struct range r)
{
    return r.start + r.length;
}

static inline bool range_empty(struct range r)
{
    return r.length == 0;
}

/* True when [start, start+length) lies inside [0, size) without wrapping. */
static inline bool range_fits(uint64_t start, uint64_t length, uint64_t size)
{
    return start <= size && length <= size - start;
}

static inline bool range_overlaps(struct range a, struct range b)
{
    return a.length && b.length && a.start < range_end(b) && b.start < range_end(a);
}

static inline bool range_contains(struct range outer, struct range inner)
{
    return inner.start >= outer.start && range_end(inner) <= range_end(outer);
}

/* The common part; empty (length 0) when there is none. */
static inline struct range range_intersect(struct range a, struct range b)
{
    return range_between(max_u64(a.start, b.start), min_u64(range_end(a), range_end(b)));
}

/* Rounds outwards to multiples of ALIGN (a power of two). */
static inline struct range range_round_out(struct range r, uint64_t align)
{
    return range_between(align_down(r.start, align), align_up(range_end(r), align));
}

/* Rounds inwards; may become empty. */
static inline struct range range_round_in(struct range r, uint64_t align)
{
    return range_between(align_up(r.start, align), align_down(range_end(r), align));
}

static inline bool range_aligned(struct range r, uint64_t align)
{
    return !((r.start | r.length) & (align - 1));
}
