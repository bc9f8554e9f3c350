/* The only clock and the only source of randomness. A deadline is a moment, not a
 * duration, so it survives a retry. In the simulator both belong to the seed. */
#pragma once

#include "rt/task.h"

#define NEVER_NS UINT64_MAX

uint64_t clock_now_ns(void);  /* monotonic, since an unspecified start */
uint64_t clock_wall_us(void); /* microseconds since 1970, for people and events */
int sleep_until(uint64_t deadline_ns) MUST_CHECK; /* 0 or -ECANCELED */
static inline uint64_t clock_after_ns(uint64_t delay_ns)
{
    return clock_now_ns() + delay_ns;
}
void random_bytes(void *buf, size_t n);
