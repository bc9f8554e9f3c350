/* A history: some lives of the program on one simulated machine, drawn from one seed, and
 * what must be true of them.
 *
 *     life 0      makes the images, and ends well
 *     life 1..n   (3 to 5) opens them; judges what it finds against what the guests know (model.h);
 * then guests, the disks' clients and their jobs, until all have done enough (a clean close), or
 * the machine kills it at some event; then maybe the power goes
 *
 * What is asked beyond the guests' content is asked by clients (client_ops): a client belongs to a
 * disk, outlives the lives, and believes what it was told. Its functions run inside the life
 * (tasks) or between lives; its own memory is the machine's: take it under
 * HEAP_OF_THE_MACHINE(), or in start() and ended(), where it is. Whatever must not be is said
 * with violation(), which ends the program with the command that repeats it. */
#pragma once

#include "block/block.h"
#include "job/job.h"
#include "machine.h"
#include "model.h"

enum { MAX_DISKS = 3, MAX_GUESTS = 4, MAX_CLIENTS = 9, OTHER_SIZES = 32 };
#define SIM_RUNTIME "/run/tidemark"

struct history;
struct life;
struct disk;

enum life_end { END_CLEAN, END_KILLED };
enum left { LEFT_CLEAN, LEFT_FAILING, LEFT_KILLED, LEFT_POWERLESS, LEFTS };

struct client_ops {
    const char *name;
    /* Before the first life. */
    void *(*start)(struct history *h, struct disk *d);
    /* In the first life, when the image exists and is open; no guests yet. May be NULL. */
    void (*made)(void *c, struct life *l);
    /* In each further life: opened, content judged, no guests yet, no faults. May be NULL. */
    void (*opened)(void *c, struct life *l);
    /* A task beside the guests, until l->stopping. May be NULL. */
    void (*run)(void *c, struct life *l);
    /* Guests and run() have ended; before the clean close. May be NULL. */
    void (*quiet)(void *c, struct life *l);
    /* An event of a job; must not wait. May be NULL. */
    void (*event)(void *c, struct life *l, const char *name, struct json_object *data);
    /* The client does not look at this life; FOREIGN: which is another program's. */
    void (*absent)(void *c, bool foreign);
    /* The life is over. POWER: and the power is gone, too; NO_SEGMENTS: or but for what is on
     * tmpfs nothing has. May be NULL. */
    void (*ended)(void *c, enum life_end end, bool power, bool no_segments);
    void (*finish)(void *c);
};
extern const struct client_ops backup_client; /* client.c */
extern const struct client_ops bitmap_client; /* actions.c */
extern const struct client_ops groups_client; /* groups.c; of no one disk */

struct disk {
    struct history *h;
    unsigned number;
    char node[16], path[SIM_PATH], extra[200]; /* extra: further options of its nodes, as JSON */
    bool qcow2, direct;
    bool process; /* its bitmaps are kept at level process */
    uint32_t cluster;
    uint64_t size;
    /* Other sizes that it may have after a crash: it was resized, and not flushed since. */
    uint64_t other_sizes[OTHER_SIZES];
    unsigned n_other_sizes;
    bool size_settles; /* the power went since it was last opened: the size found then is durable */
    uint64_t slots, region_bytes; /* of hot regions */
    struct model model;
    bool made;        /* and durable */
    bool absent;      /* in this life, with its tide file; it may come late */
    bool coming;      /* it does, and has not been judged yet */
    bool sync_failed; /* in this life: a flush must not succeed any more */
    uint64_t sync_failed_at;
    enum left left;     /* how the last life left it */
    bool cut_in_flight; /* killed in this boot with writes in flight */
    bool foreign;       /* somebody else has written it since its clients looked */
    bool blind;         /* and nothing may tell that */
    /* in a life */
    struct node *n;
    struct edge *edge;
    struct user user;
    unsigned jobs; /* of clients */
    bool alone;    /* there is one, which can be with no other: a mirror, a comparison */
};

struct history {
    uint64_t seed;
    struct machine m;
    struct dice dice;      /* what guests and clients do, and how lives end */
    struct dice more_dice; /* of what only histories with tide files have */
    struct disk disks[MAX_DISKS];
    unsigned n_disks, n_guests, lives;
    struct {
        const struct client_ops *ops;
        void *self;
        struct disk *disk;
    } clients[MAX_CLIENTS];
    unsigned n_clients;
    bool with_faults;   /* I/O errors may have made anything fail */
    bool after_foreign; /* the last life was another program's */
    bool with_runtime;  /* there is a directory for run segments */
    bool memory_short;  /* in some lives tmpfs is full, or nearly so ... */
    bool no_memory;     /* ... as in this one */
    struct dice memory_dice;
    struct dice bad_dice;     /* of bad sectors: */
    bool spoiled;             /* there are or were some, and what they had counts as dirty */
    bool runtime_disturbed;   /* at some time segments were lost, or old ones came back */
    bool faulty;              /* the last life had I/O errors: perhaps when it made its segments */
    bool clock_set;           /* at some time */
    struct saved_file *saved; /* segments */
    unsigned saved_of, life_number; /* the life in whose middle they were copied */
    uint32_t next_stamp;
    struct { /* of guests: how they are in this history; of 100 each */
        unsigned discards, zeroes, flushes, fua, hot;
    } mood;
    struct { /* of tide files; slots 0: as the options say */
        unsigned region_bits, slots, slice;
    } limits;
    struct { /* when hot regions leave: persist_set_checkpoints() */
        uint64_t idle_ns, period_ns, rest_ns;
    } checkpoints;
    struct life *life;       /* that runs; NULL: between */
    struct bitmaps_counted { /* persistent ones, by how the last life was left */
        uint64_t before, good;
    } bitmaps[LEFTS];
    struct { /* in lives that ended well */
        uint64_t idle, period, flush, left;
    } checkpoints_done;
    uint64_t last_life_events;
    uint64_t writes, flushes, jobs, kills, power_losses, glimpses;
    uint64_t groups, doubts; /* changes of several disks; bitmaps found in doubt */
};

struct life {
    struct history *h;
    unsigned number;
    struct graph *g;
    struct jobs *js;
    unsigned guests_running;
    bool stopping;          /* clients end */
    unsigned absent;        /* 1 << number: clients that do not look */
    bool foreign;           /* another program's, which knows nothing of tide files or clients */
    bool late;              /* who is absent may come yet */
    struct faults faults;   /* once all is open and judged */
    int64_t free_blocks;    /* so are they; negative: enough */
    uint64_t faults_before; /* m.n_faults, when it began */
};

struct settings {
    bool tracing, no_faults;
    bool persist;         /* persistent bitmaps on raw images, too */
    bool strict;          /* a kill must not cost a bitmap */
    bool groups;          /* several raw disks, whose bitmaps change together */
    bool small;           /* so little that all can be enumerated that a crash may leave */
    const char *qemu_img; /* a directory: images are dumped there and checked by qemu-img */
    unsigned qemu_img_every;
    uint64_t kill_at;           /* of life 1, by event; 0: drawn */
    struct choices *exhaustive; /* small ones, and all that a power loss can leave */
};
extern struct settings settings;

/* Are there others than the program and its clients (others.c)? Several disks have enough of each
 * other. */
static inline bool with_others(void)
{
    return settings.persist && !settings.groups && !settings.small;
}

/* May a command fail with R? By an I/O error; or there is no room for the run segment of what it
 * makes. */
bool history_may_refuse(const struct history *h, int r);

/* Runs one; returns the hash of its trace. */
uint64_t history_run(uint64_t seed, struct history *totals);

#define violation(h, ...) violation_at(__FILE__, __LINE__, h, __VA_ARGS__)
_Noreturn void violation_at(const char *file, int line, struct history *h, const char *fmt, ...)
    PRINTF(4, 5);

/* ---- others.c ---- */

/* After a life without a power loss; true: its run segments are not what it has left. */
bool others_disturb_segments(struct history *h);
/* At the end of a life; they may come back later. */
void others_copy_segments(struct history *h);
/* The power has gone: one sector of a tide file may be bad, of an area or an older ring block. */
void others_spoil(struct history *h);
void others_between(struct history *h, enum life_end end, bool power);
/* D is read-only, its tide file closed. */
void others_while_closed(struct history *h, struct disk *d);
void others_fini(struct history *h);

/* ---- for clients ---- */

bool history_absent(const struct life *l, const void *client);

/* JSON text, single quotes for double ones. Of the heap in use. */
struct json_object *history_json(const char *fmt, ...) PRINTF(1, 2);
/* Opens a node; the error is in ERR. */
int history_open(struct life *l, const char *json, struct node **ret, struct error *err);
/* Reads all of a disk or image into BUF. 0 or -errno. */
int history_read_all(struct edge *e, uint64_t size, uint8_t *buf);
char *history_user_describe(struct user *u);
extern const struct user_ops history_user_ops;
/* Does a bitmap that came through this end have what was hot? NO_SEGMENTS: as for `ended`. */
bool history_is_loss(const struct history *h, enum life_end end, bool power, bool no_segments);
/* How much of D may be dirty for nothing in a bitmap that came through so many losses. */
uint64_t history_budget(const struct disk *d, uint64_t granularity, unsigned losses);
/* Must a good persistent bitmap of D be good yet, after this? NO_SEGMENTS: as for `ended`. */
bool history_must_keep(const struct disk *d, enum left left, bool no_segments);
const char *history_left(enum left left);
/* Is a bitmap of the node in doubt, until the disk that knows is there? A change that was settled
 * together with a group's is then, too. */
bool history_in_doubt(struct node *n);
/* A disk that is absent comes, perhaps. */
void history_open_late(struct life *l);
/* Sleeps up to so many microseconds of the machine's time. */
void history_nap(struct life *l, uint64_t max_us);
/* A job of D begins; false: not beside what is there. */
bool history_job_begins(struct disk *d, bool alone);
void history_job_over(struct disk *d);
bool history_job_lives(struct life *l, const char *id);
bool history_job_ready(struct life *l, const char *id);
