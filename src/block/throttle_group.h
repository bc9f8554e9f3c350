/* A group of disks that share limits: so many bytes and so many requests a second.
 *
 * Six buckets (bytes and requests; all, reads, writes). What passes fills them, time empties them
 * at their rate, and while one is full whoever comes next waits. A bucket without a burst rate
 * holds a tenth of a second; one with holds burst rate x burst length, and a second, smaller bucket
 * keeps the rate below the burst rate. A request is let in before it is counted: it may fill a
 * bucket over the brim, and those after it pay.
 *
 * Of each direction one request waits for the clock; it has the ticket. The others wait for the
 * ticket, which goes round the members, so that a busy disk does not starve a quiet one. */
#pragma once

#include "block/block.h"
#include "rt/sync.h"

struct throttle_bucket {
    uint64_t rate;          /* units a second; 0: no limit */
    uint64_t burst_rate;    /* units a second; 0: none */
    uint64_t burst_seconds; /* how long the burst rate may last */
    double level, burst_level;
};

enum throttle_bucket_name {
    BPS_TOTAL,
    BPS_READ,
    BPS_WRITE,
    IOPS_TOTAL,
    IOPS_READ,
    IOPS_WRITE,
    THROTTLE_BUCKETS,
};

struct throttle_limits {
    struct throttle_bucket buckets[THROTTLE_BUCKETS];
    uint64_t request_bytes; /* a larger request counts as several; 0: as one */
};

/* No limits. */
void throttle_limits_init(struct throttle_limits *l);
/* What OPTIONS (an object's: `limits` and x-* members) say, with QEMU's texts. */
int throttle_limits_parse(struct throttle_limits *l, struct json_object *options,
                          struct error *err) MUST_CHECK;
int throttle_limits_check(const struct throttle_limits *l, struct error *err) MUST_CHECK;

struct throttle_group;

/* Made by an object, found by name; lives until it is removed, which it cannot be while it has
 * members. */
int throttle_group_add(struct graph *g, const char *name, const struct throttle_limits *l,
                       struct error *err) MUST_CHECK;
int throttle_group_remove(struct graph *g, const char *name); /* -EBUSY: somebody is in it */
struct throttle_group *throttle_group_find(struct graph *g, const char *name);
const struct throttle_limits *throttle_group_limits(const struct throttle_group *group);
/* Checked limits, from now on, also for those who wait; the buckets stay as full as they are. */
void throttle_group_set_limits(struct throttle_group *group, const struct throttle_limits *l);
/* ThrottleLimits with all members. */
struct json_object *throttle_limits_show(const struct throttle_limits *l);
/* The end of the program: nobody waits any more, in any group. */
void throttle_groups_lift(struct graph *g);

struct throttle_waiter;
struct throttle_member {
    struct throttle_group *group;
    TAILQ_HEAD(, throttle_waiter) waiting[2]; /* reads, writes */
    TAILQ_ENTRY(throttle_member) link;
};
void throttle_member_join(struct throttle_member *m, struct throttle_group *group);
/* Nobody waits in it. */
void throttle_member_leave(struct throttle_member *m);

/* Waits until BYTES may pass. UNLIMITED true: does not, but counts. */
void throttle_member_admit(struct throttle_member *m, bool is_write, uint64_t bytes,
                           bool unlimited);
/* Those that wait now are let through. */
void throttle_member_release(struct throttle_member *m);
