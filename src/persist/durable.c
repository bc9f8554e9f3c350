/* See durable.h. */
#include "persist/durable.h"

#include "base/broken.h"

#include <stdlib.h>
#include <string.h>

struct lesson {
    struct tide_id uuid, session;
    uint64_t sequence;
    uint64_t granularity;
    size_t n;
    struct part {
        uint64_t first; /* byte of the serial form */
        size_t length;
        uint8_t *bits;
    } parts[];
};

void durable_fini(struct durable *d)
{
    free(d->bits);
    free(d->under_way);
    *d = (struct durable){0};
}

void lesson_free(struct lesson *l)
{
    for (size_t i = 0; l && i < l->n; i++)
        free(l->parts[i].bits);
    free(l);
}

/* ---- learning ---- */

/* Granules [from, to), in bytes of the serial form. */
struct span {
    uint64_t from, to;
    uint64_t first;
    size_t length;
};

/* The granules that lie in R, the last of the disk also if it is cut. */
static struct span span_of(struct range r, uint64_t granularity, uint64_t size)
{
    struct span s = {.from = div_round_up(r.start, granularity),
                     .to = range_end(r) == size ? div_round_up(size, granularity)
                                                : range_end(r) / granularity};
    s.first = s.from / 8;
    s.length = s.from < s.to ? (size_t)(div_round_up(s.to, 8) - s.first) : 0;
    return s;
}

/* BITS &= what COARSE says, whose granules are larger. */
static void and_coarse(uint8_t *bits, const struct span *s, uint64_t granularity,
                       const struct bitmap *coarse)
{
    const uint64_t times = bitmap_granularity(coarse) / granularity;

    for (uint64_t i = s->from, next; i < s->to; i = next) {
        next = min_u64(align_down(i, times) + times, s->to);
        if (bitmap_get(coarse, i * granularity))
            continue;
        for (uint64_t k = i; k < next; k++)
            bits[k / 8 - s->first] &= (uint8_t) ~(1u << k % 8);
    }
}

/* What of S is dirty in all sets; NULL: nothing. */
static uint8_t *common(const struct bitmap *const *sets, size_t n_sets, const struct span *s,
                       uint64_t granularity)
{
    uint8_t *bits = malloc(2 * s->length), *other = bits + s->length;
    bool any = bits;

    if (any) {
        memset(bits, 0xff, s->length);
        bits[0] &= (uint8_t)(0xffu << s->from % 8);
        if (s->to % 8)
            bits[s->length - 1] &= (uint8_t)((1u << s->to % 8) - 1);
    }
    for (size_t i = 0; any && i < n_sets; i++) {
        if (bitmap_granularity(sets[i]) > granularity) {
            and_coarse(bits, s, granularity, sets[i]);
        } else {
            bitmap_serialise(sets[i], s->first, other, s->length);
            for (size_t k = 0; k < s->length; k++)
                bits[k] &= other[k];
        }
        any = false;
        for (size_t k = 0; k < s->length; k++)
            any |= bits[k];
    }
    if (any)
        return bits;
    free(bits);
    return NULL;
}

struct lesson *durable_ask(const struct super *s, const struct bitmap *const *sets, size_t n_sets,
                           const struct range *ranges, size_t n)
{
    uint64_t granularity = UINT64_MAX;

    for (size_t i = 0; i < n_sets; i++)
        granularity = min_u64(granularity, bitmap_granularity(sets[i]));
    struct lesson *l = n_sets ? calloc(1, sizeof *l + n * sizeof l->parts[0]) : NULL;
    if (!l)
        return NULL;
    l->uuid = s->uuid;
    l->session = s->session;
    l->sequence = s->sequence;
    l->granularity = granularity;
    for (size_t i = 0; i < n; i++) {
        const struct span span = span_of(ranges[i], granularity, s->size_bytes);
        uint8_t *bits = span.length ? common(sets, n_sets, &span, granularity) : NULL;
        if (bits)
            l->parts[l->n++] = (struct part){span.first, span.length, bits};
    }
    return l;
}

static bool is_of(const struct durable *d, const struct super *s)
{
    return d->granularity && ((d->sequence == s->sequence && tide_id_equal(&d->uuid, &s->uuid) &&
                               tide_id_equal(&d->session, &s->session)) ||
                              BROKEN(durable_kept_over_a_flip));
}

void durable_learn(struct durable *d, const struct super *s, struct lesson *l)
{
    CLEANUP(lesson_freep) struct lesson *freed = l;

    if (!l || !l->n || l->sequence != s->sequence || !tide_id_equal(&l->uuid, &s->uuid) ||
        !tide_id_equal(&l->session, &s->session))
        return;
    if (!is_of(d, s) || d->granularity != l->granularity || d->size_bytes != s->size_bytes) {
        free(d->bits);
        d->bits = calloc(1, (size_t)(div_round_up(s->size_bytes, l->granularity) + 7) / 8);
        d->granularity = d->bits ? l->granularity : 0;
        d->size_bytes = s->size_bytes;
        d->uuid = l->uuid;
        d->session = l->session;
        d->sequence = l->sequence;
    }
    for (size_t i = 0; d->bits && i < l->n; i++)
        for (size_t k = 0; k < l->parts[i].length; k++)
            d->bits[l->parts[i].first + k] |= l->parts[i].bits[k];
}

/* ---- asking ---- */

bool durable_has(const struct durable *d, const struct super *s, struct range r)
{
    if (!is_of(d, s) || range_empty(r) || range_end(r) > d->size_bytes)
        return false;
    const uint64_t last = (range_end(r) - 1) / d->granularity;
    for (uint64_t i = r.start / d->granularity; i <= last; i++)
        if (!(d->bits[i / 8] >> i % 8 & 1))
            return false;
    return true;
}

void durable_pass(struct durable *d, struct range r)
{
    if (d->n_under_way == d->room) {
        struct range *old = d->under_way;
        d->room = d->room ? 2 * d->room : 32;
        d->under_way = xcalloc(d->room, sizeof *d->under_way);
        if (old)
            memcpy(d->under_way, old, d->n_under_way * sizeof *old);
        free(old);
    }
    d->under_way[d->n_under_way++] = r;
    d->passed++;
}

bool durable_passed(struct durable *d, struct range r)
{
    for (size_t i = 0; i < d->n_under_way; i++) {
        if (d->under_way[i].start != r.start || d->under_way[i].length != r.length)
            continue;
        d->under_way[i] = d->under_way[--d->n_under_way];
        return true;
    }
    return false;
}
