/* What a disk may hold, as its guests know it: per sector all writes that can still be there.
 *
 * Each write has a stamp of its own, and times of a clock that counts what guests do: when it was
 * begun, and when it ended (never: in flight, or cut). A write D stands above a write C when C had
 * ended before D was begun. Then
 *
 *     a read gives           any write that no successful one stands above
 *     a power loss leaves    any write that no durable one stands above
 *
 * and durable is what had succeeded before a flush was begun that succeeded, or was written with
 * FUA. When a sync of the file has failed, what was not durable by then is tainted: the disk may
 * never get it, and the page may be gone; only a new write makes the sector good. */
#pragma once

#include "base/macros.h"

enum { MODEL_SECTOR = 512, MODEL_WRITES = 12 };
#define MODEL_NEVER UINT64_MAX

struct write_known {
    uint32_t stamp; /* 0: zeroes */
    bool ok, durable, tainted;
    uint64_t begun, ended;
};

struct cell {
    uint8_t n;
    bool unsettled;       /* is in the row: more than one write, or one that is not durable */
    uint64_t last_active; /* when the last write began or ended */
    struct write_known writes[MODEL_WRITES];
};

struct model {
    uint64_t n, now;
    uint64_t keep_from; /* what was possible since then is not forgotten; NEVER: nobody asks */
    unsigned holders;
    struct cell *cells;
    uint32_t *row; /* of unsettled cells */
    size_t n_row;
};

void model_init(struct model *m, uint64_t sectors);
void model_fini(struct model *m);
uint64_t model_now(struct model *m); /* a new moment */

/* Can every sector remember one more? */
bool model_has_room(const struct model *m, uint64_t first, uint64_t n);
/* Returns the moment, by which it is ended. */
uint64_t model_begin(struct model *m, uint64_t first, uint64_t n, uint32_t stamp);
void model_end(struct model *m, uint64_t first, uint64_t n, uint64_t begun, bool ok, bool durable);
void model_flushed(struct model *m, uint64_t begun, bool ok);
void model_taint(struct model *m); /* a sync of the file failed */

bool model_in_flight(const struct model *m);
void model_cut(struct model *m); /* killed: what is in flight never ends */
bool model_may_read(const struct model *m, uint64_t sector, uint32_t stamp);
bool model_may_survive(const struct model *m, uint64_t sector, uint32_t stamp);
/* It was read, after a kill or, AFTER_POWER, when nothing else is left. */
void model_seen(struct model *m, uint64_t sector, uint32_t stamp, bool after_power);

/* What a sector may have held at one instant between FROM (model_hold) and TO (now). */
struct instant {
    uint64_t from, to, n;
    struct held {
        uint8_t n;
        uint32_t stamps[MODEL_WRITES];
    } * held;
};
uint64_t model_hold(struct model *m);
void model_instant(struct model *m, uint64_t from, struct instant *ret); /* and lets go */
bool instant_has(const struct instant *i, uint64_t sector, uint32_t stamp);
void instant_fini(struct instant *i);
/* For messages. */
void model_describe(const struct model *m, uint64_t sector, char *text, size_t size);

/* ---- sectors as bytes ---- */
void stamp_fill(void *sector, uint32_t stamp);
/* False: no stamp's sector, whole. */
bool stamp_read(const void *sector, uint32_t *stamp);
