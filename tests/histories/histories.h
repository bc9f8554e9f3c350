/* Random histories: disks, guests that write, a client that makes bitmaps and runs jobs, faults,
 * all on a clock of their own; and a model that knows what must come of it.
 *
 *     world    virtual time (test_histories.c)
 *     disk     a disk in memory: slow, failing, with a cache that a flush makes durable (disk.c)
 *     guest    writes at random, and knows what it should read (guests.c)
 *     model    what each bitmap must say, by the tables of ARCHITECTURE.md (model.c)
 *     client   starts, disturbs and ends jobs; keeps its backups or throws them away (client.c);
 *              its transactions (changes.c); its chains of real images (images.c)
 *
 * The model is told of a write by the disk itself, below everything that is tested. For each bitmap
 * it has two sets of sectors: those that MUST be dirty, and those that MAY be. They differ only
 * where something failed. After each step:
 *
 *     must  is a part of  the bitmap  is a part of  may
 *     where the disk and what a client would restore differ, its bitmap is dirty
 *
 * and whatever a job calls a success is compared byte by byte, also what would be left of it
 * after a power loss. */
#pragma once

#include "unit.h"

#include "seed.h"

#include "base/json.h"
#include "block/driver.h"
#include "dirty/dirty.h"
#include "job/job.h"
#include "rt/task.h"

#include <stdarg.h>
#include <stdio.h>

enum {
    SECTOR = 512,
    CHUNK_MIN = 65536,
    DISKS_MAX = 80,
    LANES_MAX = 16,
    VDISKS_MAX = 4,
    GUESTS_MAX = 3, /* of a disk */
    GATES = 64,
};
#define MSEC ((uint64_t)1000000)

struct history;
extern struct history *history; /* the one that runs */

/* ---- saying what happened ---- */

extern bool telling; /* each step, and each guest's request */
void trace(const char *fmt, ...) PRINTF(1, 2);
_Noreturn void wrong_at(const char *file, int line, const char *fmt, ...) PRINTF(3, 4);
#define WRONG(...) wrong_at(__FILE__, __LINE__, __VA_ARGS__)
#define HOLDS(cond)                                                                                \
    do {                                                                                           \
        if (!(cond))                                                                               \
            WRONG("%s is not so", #cond);                                                          \
    } while (0)

static inline uint64_t dice(uint64_t n);
static inline bool one_in(uint64_t n)
{
    return dice(n) == 0;
}

/* ---- disks ---- */

enum request { REQUEST_READ, REQUEST_WRITE, REQUEST_FLUSH };

struct fault {
    enum request kind;
    int code, times; /* it strikes so often */
    struct range where;
};

TAILQ_HEAD(mark_list, marks);

struct disk {
    char name[12];
    struct node *node; /* a reference */
    uint64_t size, sectors;
    uint64_t cluster;           /* as the node says; 0: unknown */
    uint64_t slow_ns;           /* a request takes up to so long */
    struct disk *file, *behind; /* of a qcow2 image, which has no bytes of its own */
    bool grows;                 /* such a file; `size` is what it has room for ... */
    uint64_t starts, room;      /* ... this what it has when it is opened; 0, or where it is full */
    uint8_t *bytes, *durable;
    struct fault fault;
    unsigned fired, fired_flushes; /* requests that a fault has struck */
    /* For each sector history->writes when a write changed it last (also one
     * that failed half way); that succeeded; that was announced to observers. */
    uint32_t *wrote, *took, *announced;
    uint32_t flushed; /* history->writes when the last flush began that succeeded */
    struct write_observer observer;
    struct mark_list marks;
    /* Each time its gate was closed: history->writes when the last request was out. */
    uint32_t gates[GATES];
    unsigned n_gates;
    char sentinel[12]; /* the bitmap of the last plan */
};

extern const struct driver history_disk;
struct disk *disk_new(uint64_t size, uint64_t cluster);
struct disk *disk_new_file(uint64_t room);
void disk_free(struct disk *d);
/* A file with this content. */
struct disk *disk_new_file_of(const struct disk *like, const uint8_t *bytes);
void disk_fill(struct disk *d);
void disk_arm(struct disk *d); /* with a random fault */
void disk_disarm(struct disk *d);
/* Requests that a fault has struck. */
static inline unsigned disk_fired(const struct disk *d)
{
    return d->file ? d->file->fired : d->fired;
}
static inline uint64_t disk_chunk(const struct disk *d)
{
    return d->cluster > CHUNK_MIN ? d->cluster : CHUNK_MIN;
}

/* ---- what a guest uses: a disk that a mirror may put in another's place ---- */

struct guest {
    struct vdisk *vdisk;
    struct range busy; /* its request that is under way */
    bool spoiled;      /* another has written there meanwhile */
};

struct vdisk {
    struct disk *disk; /* now */
    struct user user;
    struct edge *edge;
    uint8_t *shadow;   /* what reading gives ... */
    bool *unknown;     /* ... unless this, by sector */
    uint32_t *touched; /* history->writes when a guest's request was given or answered */
    struct guest guests[GUESTS_MAX];
    unsigned writes;
};

void vdisk_init(struct vdisk *v, struct disk *d);
void vdisk_fini(struct vdisk *v);
void vdisk_check(struct vdisk *v); /* guests rest */
/* Has a guest written to R, a sector, since then, or does he just now? */
bool vdisk_in_use(const struct vdisk *v, struct range r, uint32_t since);
void guests_start(struct vdisk *v, struct scope *tasks);

/* ---- the model of a bitmap ---- */

struct set {
    uint8_t *must, *may; /* a byte for each sector; whole granules */
};

struct marks {
    struct disk *disk;
    char name[12];
    uint64_t granularity;
    bool enabled; /* of a busy one: its successor */
    bool busy;
    struct set now;  /* of a busy one: frozen */
    struct set next; /* the successor's */
    TAILQ_ENTRY(marks) link;
};

struct marks *marks_new(struct disk *d, const char *name, uint64_t granularity, bool enabled);
void marks_free(struct marks *m);
void marks_add(struct marks *m, const struct set *s); /* OR, rounded to granules */
void marks_clear(struct marks *m);
void marks_start(struct marks *m);
/* The successor takes over, together with WHAT (NULL: nothing). */
void marks_end(struct marks *m, const struct set *what);
void marks_check(const struct marks *m);
void set_init(struct set *s, const struct disk *d);
void set_fini(struct set *s);
/* A write of R has reached the disk; or has been announced. */
void marks_note(struct disk *d, struct range r, bool must);

/* ---- transactions ---- */

enum change_kind { ADD, CLEAR, ENABLE, DISABLE, MERGE, REMOVE };
struct change {
    enum change_kind what;
    struct marks *marks, *from;
    struct disk *disk; /* of ADD, and so on */
    char name[12];
    uint64_t granularity;
    bool disabled;
    struct marks **ret;
};

/* A transaction, and what it does to the model. */
struct plan {
    struct json_object *actions;
    const char *mode; /* completion-mode */
    bool called_off;  /* it has an abort */
    struct change changes[8];
    unsigned n;
    struct disk *disk;
    char sentinel[12]; /* of a plan without jobs: a bitmap of `disk` that comes with it */
    bool settled;      /* it has taken effect, and the model has followed */
};

struct json_object *parse(const char *fmt, ...) PRINTF(1, 2); /* with ' for " */
void plan_action(struct plan *p, const char *type, struct json_object *data);
void plan_call_off(struct plan *p);
void plan_add(struct plan *p, struct disk *d, const char *prefix, bool disabled,
              struct marks **ret);
void plan_change(struct plan *p, enum change_kind what, struct marks *m);
void plan_merge(struct plan *p, struct marks *to, struct marks *from);
int plan_carry_out(struct plan *p, struct error *err) MUST_CHECK;
void plan_carry_out_ok(struct plan *p);
void plan_settles(void); /* the one that is under way takes effect now */
void plan_look(void);    /* ... if it has */
/* For a plan without jobs, when it is complete: a bitmap of D that shows when it takes effect. */
void plan_watch(struct plan *p, struct disk *d);

struct marks *some_marks(struct disk *d, bool busy);
bool is_lanes(const struct marks *m);
void change_bitmaps(struct disk *d);
void try_a_busy_one(struct disk *d);

/* ---- the client ---- */

enum sync { SYNC_FULL, SYNC_BITMAP };
enum mode { MODE_NONE, MODE_ON_SUCCESS, MODE_ALWAYS, MODE_NEVER };

/* A chain of backups: a bitmap, and a target that after each success is the disk at that instant.
 */
struct lane {
    struct disk *source, *target;
    struct marks *marks; /* NULL: not made yet */
    uint8_t *kept;       /* what would be restored; NULL: nothing yet */
    struct work *work;   /* what runs */
    /* With `images` the target is the newest image of a chain of qcow2 files. */
    bool images;
    bool unfinished;     /* the newest is to be completed by the next backup */
    struct disk *newest; /* that is kept */
    enum { LOOK_NOT, LOOK_COMPLETE, LOOK_UNFINISHED } look; /* its content must be looked at */
    uint8_t *survived; /* the newest file after a power loss just then */
    /* A mirror is about to put another disk in the source's place: a bitmap of that one, which
     * records from before. When it has (`moved`), the chain's bitmap is merged into it, and the
     * chain goes on there. */
    struct marks *carried;
    bool moved;
};

struct disk *image_new(uint64_t size, struct disk *behind);
void lane_look(struct lane *l); /* waits */

struct group {
    unsigned refs;
    bool excused;    /* it may fail */
    bool by_hand;    /* when all are pending they wait for ... */
    bool finalizing; /* ... this */
    unsigned succeeded, failed;
};

/* A job. */
struct work {
    char id[12];
    bool mirror;
    struct disk *source, *target;
    struct lane *lane;
    struct vdisk *vdisk; /* of a mirror */
    struct marks *marks; /* that it holds, or NULL */
    enum sync sync;
    enum mode mode;
    bool starts_chain; /* full, while a bitmap records from the same instant */
    struct group *group;
    uint8_t *instant;         /* the source when it started */
    uint32_t began, aborting; /* history->writes then, and when it began to abort */
    unsigned gates;           /* of the source, when it became pending */
    unsigned fired, flushes;  /* faults of both disks until then */
    char status[12];
    bool manual_finalize, manual_dismiss;
    bool paused, asked_cancel, asked_force, asked_complete;
    bool begun, over; /* it runs; its outcome is applied */
    TAILQ_ENTRY(work) link;
};

struct history {
    uint64_t seed;
    struct rng rng;
    struct graph *graph;
    struct jobs *jobs;
    uint32_t writes;
    struct disk *disks[DISKS_MAX];
    unsigned n_disks, n_lanes, n_vdisks, next_name;
    struct vdisk vdisks[VDISKS_MAX];
    struct lane lanes[LANES_MAX];
    TAILQ_HEAD(, work) works;
    struct plan *plan; /* whose command is under way */
    bool stop;         /* guests */
    bool serious;      /* nothing fails any more, nobody disturbs */
};

static inline uint64_t dice(uint64_t n)
{
    return rng_below(&history->rng, n);
}

void client_event(void *opaque, const char *name, struct json_object *data);
void client_step(void);
void client_finish(void); /* lets all jobs end, then makes the last increments */
void client_fini(void);
/* The job that has it is being finalized or aborted: nobody can say how far that is. One that waits
 * for its client to finalize it is not: its bitmap is as busy as before. */
bool about_to_end(const struct marks *m);
void check_everything(void);
void check_outcome(struct work *w, bool success); /* and applies it to the model */
