/* A speed limit in slices of 100 ms: what is spent beyond a slice's share is paid for by waiting
 * before the next piece. Pure arithmetic; the caller brings the clock. */
#pragma once

#include "base/macros.h"

struct rate {
    uint64_t speed; /* bytes a second, 0: no limit */
    uint64_t start_ns;
    uint64_t spent; /* bytes since start_ns */
};

/* Takes effect at once, also for what has been spent already. */
void rate_set(struct rate *r, uint64_t speed);
/* 0: now; else the moment when more may be spent. */
uint64_t rate_ready_at(struct rate *r, uint64_t now_ns);
void rate_spend(struct rate *r, uint64_t now_ns, uint64_t bytes);
