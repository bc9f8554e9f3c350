/* Seeds for tests that choose at random: TEST_SEED=N repeats a run, and what a failing run
 * prints is what to set. Without it the choice is always the same. */
#pragma once

#include "base/range.h"

#include <stdio.h>

static inline uint64_t test_seed(void)
{
    const char *text = getenv("TEST_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : 20240229;

    fprintf(stderr, "TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

struct rng {
    uint64_t state;
};

/* splitmix64: any seed is a good one. */
static inline uint64_t rng_next(struct rng *rng)
{
    uint64_t z = rng->state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* 0..N-1; 0 when N is 0. */
static inline uint64_t rng_below(struct rng *rng, uint64_t n)
{
    return n ? rng_next(rng) % n : 0;
}

/* Somewhere in [0, size), of any magnitude: short ranges are as likely as long ones. */
static inline struct range rng_range(struct rng *rng, uint64_t size)
{
    uint64_t start = rng_below(rng, size);
    uint64_t most = size - start;

    return range_make(start, min_u64(rng_below(rng, most + 1) >> rng_below(rng, 24), most));
}
