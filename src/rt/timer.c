/* Deadlines in a binary heap. One loop has tens of them, rarely hundreds: a request that
 * has no deadline sets none. */
#include "rt/loop.h"

#include "rt/clock.h"

static bool earlier(const struct timer *a, const struct timer *b)
{
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->order < b->order;
}

static void put(struct timers *ts, size_t place, struct timer *t)
{
    ts->heap[place] = t;
    t->place = place;
}

static void settle(struct timers *ts, size_t place, struct timer *t)
{
    while (place > 1 && earlier(t, ts->heap[place / 2])) {
        put(ts, place, ts->heap[place / 2]);
        place /= 2;
    }
    for (;;) {
        size_t child = place * 2;
        if (child > ts->count)
            break;
        if (child < ts->count && earlier(ts->heap[child + 1], ts->heap[child]))
            child++;
        if (!earlier(ts->heap[child], t))
            break;
        put(ts, place, ts->heap[child]);
        place = child;
    }
    put(ts, place, t);
}

void timer_set(struct timer *t, uint64_t deadline_ns, void (*fire)(struct timer *t))
{
    struct timers *ts = &loop_here()->timers;
    t->place = 0;
    if (deadline_ns == NEVER_NS)
        return;
    t->deadline_ns = deadline_ns;
    t->order = ts->next_order++;
    t->fire = fire;
    if (ts->count + 2 > ts->capacity) {
        size_t capacity = ts->capacity ? ts->capacity * 2 : 64;
        struct timer **heap = realloc(ts->heap, capacity * sizeof *heap);
        if (!heap)
            rt_panic("no memory for %zu timers", capacity);
        ts->heap = heap;
        ts->capacity = capacity;
    }
    ts->count++;
    settle(ts, ts->count, t);
}

static void take_out(struct timers *ts, struct timer *t)
{
    size_t place = t->place;
    struct timer *last = ts->heap[ts->count--];
    t->place = 0;
    if (last != t)
        settle(ts, place, last);
}

void timer_clear(struct timer *t)
{
    if (t->place)
        take_out(&loop_here()->timers, t);
}

uint64_t timers_next_ns(const struct timers *ts)
{
    return ts->count ? ts->heap[1]->deadline_ns : NEVER_NS;
}

void timers_fire(struct timers *ts, uint64_t now_ns)
{
    while (ts->count && ts->heap[1]->deadline_ns <= now_ns) {
        struct timer *t = ts->heap[1];
        take_out(ts, t);
        t->fire(t);
    }
}

void timers_fini(struct timers *ts)
{
    assert(!ts->count);
    free(ts->heap);
    memset(ts, 0, sizeof *ts);
}
