/* The simulated machine: a clock, dice, storage, and the world (rt/world.h) in which the real
 * program runs on it, one life after the other.
 *
 * A life is loop_run_in() from its main task's start until that returns, or until the machine
 * kills it: no task runs any further, its memory is taken back (heap.h), its descriptors, locks and
 * mappings are gone; each operation that was in flight has landed or not, sector by
 * sector. Then the power may go, too. Each submission and each completion of an operation is an
 * event, and a life can be killed at any. The same seed gives the same events: `hash` says so. */
#pragma once

#include "disk.h"
#include "heap.h"
#include "rt/clock.h"
#include "rt/world.h"

/* What goes wrong, in hundredths of a percent of the operations on files whose path contains
 * `path` ("": all). A write that fails may have landed; a sync that fails loses what it likes. */
struct faults {
    char path[SIM_PATH];
    unsigned read, write, sync, space;
};

struct open_inode {
    struct inode *inode;
    int flags;
    bool in_use;
    unsigned pending; /* operations in flight */
    char path[SIM_PATH];
};

enum { SIM_FDS = 256, SIM_FD_FIRST = 1000 };
TAILQ_HEAD(operations, operation);

struct machine {
    struct world world;
    struct store store;
    struct choices choices; /* of crashes and failures */
    struct dice dice;       /* the machine's own: how long things take, what fails */
    struct dice program;    /* what the program draws */
    uint64_t now_ns, boot_ns, wall_start_us;
    uint8_t boot_id[16];
    uint64_t boots;
    struct open_inode fds[SIM_FDS];
    struct operations in_flight, completed; /* completed: their tasks have not run again yet */
    uint64_t events, kill_at;               /* events so far; the life dies at this one (0: not) */
    const char *kill_near; /* but with a write of such a path in flight, if it can */
    uint64_t life_events;  /* events when this life began */
    unsigned doomed; /* it dies about when the so-manieth write to a tide file begins; 0: not */
    bool killed, alive;
    struct faults faults;
    unsigned slow; /* operations take up to so many microseconds */
    bool tracing;
    uint64_t hash;
    /* Called when the machine makes a sync of PATH fail: what was not durable may be lost. */
    void (*sync_failed)(void *opaque, const char *path);
    void *opaque;
    /* Called now and then, one in GLIMPSES events: what if the power went? By dice of its own. */
    void (*glimpse)(void *opaque);
    unsigned glimpses;
    struct dice glimpse_dice;
    uint64_t counts[64]; /* of operations, by kind */
    uint64_t n_full;     /* so often the disk had no room */
    uint64_t n_faults;
};

void machine_init(struct machine *m, uint64_t seed);
void machine_fini(struct machine *m);

/* Runs a life. 0 or what MAIN returned; -EOWNERDEAD: it was killed (KILL_AT events from now; 0:
 * never). Afterwards nothing of it is left but what the page cache has. */
int machine_live(struct machine *m, uint64_t kill_at, task_fn *main, void *arg);
/* Kills the life that runs: does not return to the task that calls. */
void machine_kill(struct machine *m);
/* Between lives. */
void machine_lose_power(struct machine *m);
void machine_pass_time(struct machine *m, uint64_t ns);
void machine_set_wall(struct machine *m, int64_t by_us); /* somebody sets the clock */

/* Somebody else writes, between lives or during one: QEMU, dd. */
void machine_foreign_write(struct machine *m, const char *path, const void *buf, size_t n,
                           uint64_t at);
/* The whole content of PATH, as the page cache has it; NULL: no such file. Caller frees. */
uint8_t *machine_dump(struct machine *m, const char *path, uint64_t *size);

/* What PATH may be if the power went now; NULL: there is no such file. Caller frees. */
uint8_t *machine_imagine(struct machine *m, const char *path, struct choices *c, uint64_t *size);

/* A line of the trace, and into the hash either way. */
void machine_note(struct machine *m, const char *fmt, ...) PRINTF(2, 3);
void machine_mix(struct machine *m, uint64_t value);
