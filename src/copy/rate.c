/* The speed limit of a job: see rate.h. */
#include "copy/rate.h"

#define SLICE_NS (NSEC_PER_SEC / 10)

static uint64_t slice_share(const struct rate *r)
{
    return max_u64(r->speed / 10, 1);
}

/* The end of what has been spent, at least one slice after its start. */
static uint64_t paid_at(const struct rate *r)
{
    unsigned __int128 ns = (unsigned __int128)r->spent * SLICE_NS / slice_share(r);
    uint64_t limit = UINT64_MAX - r->start_ns;
    return r->start_ns + (ns < SLICE_NS ? SLICE_NS : ns > limit ? limit : (uint64_t)ns);
}

void rate_set(struct rate *r, uint64_t speed)
{
    r->speed = speed;
    if (!speed)
        r->spent = 0;
}

static void new_slice(struct rate *r, uint64_t now_ns)
{
    if (now_ns >= paid_at(r)) {
        r->start_ns = now_ns;
        r->spent = 0;
    }
}

uint64_t rate_ready_at(struct rate *r, uint64_t now_ns)
{
    if (!r->speed)
        return 0;
    new_slice(r, now_ns);
    return r->spent < slice_share(r) ? 0 : paid_at(r);
}

void rate_spend(struct rate *r, uint64_t now_ns, uint64_t bytes)
{
    if (!r->speed)
        return; /* a limit that comes later is not charged for what went before */
    new_slice(r, now_ns);
    r->spent += bytes;
}
