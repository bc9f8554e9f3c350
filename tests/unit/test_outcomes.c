/* The table of a backup's outcomes, bit for bit: what becomes of the bitmap for each command, sync
 * mode, bitmap mode, and way in which a job can end.
 *
 *     mode \ outcome   never started   success               failed, cancelled (alone or group)
 *     on-success       unchanged       successor             bitmap OR successor
 *     always           unchanged       successor             remaining OR successor
 *     never            unchanged       bitmap OR successor   bitmap OR successor
 *
 * A cell is a history whose moments are held: writes before, the job stopped at a chunk, writes to
 * chunks that it has copied, to such that it will, to such that it will not; what ends it; writes
 * after. The model beside it is a flag for each sector and set. It says which chunks have been
 * copied, which the target must confirm, and what is dirty. Then a second run must make the target
 * the disk of its own instant. Time is virtual. */
#include "jobutil.h"
#include "virtual.h"

#include "job/backup.h"

enum {
    UNIT = 65536,
    SIZE = 2 * MiB + 3 * 512,
    SECTORS = SIZE / 512,
    UNITS = (SIZE + UNIT - 1) / UNIT,
    /* Places, in UNITs. */
    HELD = 5,   /* where a job waits in the middle of its work */
    FAILS = 14, /* where it fails */
};

/* When the thing happens. */
enum moment {
    CREATED, /* before anything runs */
    AT_0,    /* the job has been started, and has not run */
    FIRST,   /* its first chunk is on its way */
    MIDDLE,  /* one at HELD */
    WAITING, /* it has run, its sibling has not */
    PENDING, /* all have run, the user finalizes */
};

enum cause {
    NOTHING,
    REFUSED,
    READ_ERROR,
    WRITE_ERROR,
    NO_SPACE,
    CANCEL,
    STOP_CANCEL, /* on-target-error=stop, then cancelled */
    STOP_RESUME, /* ... then mended and resumed */
    SOURCE_STOP_RESUME,
    SAVE_FAILS, /* a copy-before-write, once */
    SAVE_FAILS_CANCEL,
    SAVE_FAILS_ALL_FAILS, /* and the job's own copy of that chunk */
    TARGET_FLUSH,
    SOURCE_FLUSH,
    SIBLING_FAILS,
    SIBLING_CANCELLED,
    SIBLING_FLUSH,
};

enum fate { UNSTARTED, SUCCEEDED, FAILED };

enum { GROUPED = 1, SIBLING_FIRST = 2, LATE_FAILURE = 4 /* what is on its way fails, too */ };

static const struct outcome {
    const char *name;
    enum moment moment;
    enum cause cause;
    enum fate fate;
    const char *events; /* all of the job's, in their order, between created and concluded */
    unsigned flags;
} outcomes[] = {
#define RAN "running waiting pending "
#define CANCELLED "aborting CANCELLED"
#define IO_ERROR "aborting COMPLETED(Input/output error)"
#define READ_IO_ERROR "running ERROR(read report) " IO_ERROR
#define WRITE_IO_ERROR "running ERROR(write report) " IO_ERROR
#define NO_SPACE_LEFT "running ERROR(write report) aborting COMPLETED(No space left on device)"
#define STOPPED(what) "running ERROR(" what " stop) paused running "
    {"aborted by the next action", CREATED, NOTHING, UNSTARTED, "aborting", 0},
    {"the next backup is refused", CREATED, REFUSED, UNSTARTED, "aborting", 0},
    {"its group is refused", CREATED, REFUSED, UNSTARTED, "aborting", GROUPED},
    {"cancelled in created", CREATED, CANCEL, UNSTARTED, "aborting", 0},
    {"success", MIDDLE, NOTHING, SUCCEEDED, RAN "COMPLETED", 0},
    {"success, finalized", PENDING, NOTHING, SUCCEEDED, RAN "PENDING COMPLETED", 0},
    {"success of the group", MIDDLE, NOTHING, SUCCEEDED, RAN "COMPLETED", GROUPED},
    {"success of the group, finalized", PENDING, NOTHING, SUCCEEDED, RAN "PENDING COMPLETED",
     GROUPED},
    {"a save failed", MIDDLE, SAVE_FAILS, SUCCEEDED, RAN "COMPLETED", 0},
    {"stopped by the target and resumed", MIDDLE, STOP_RESUME, SUCCEEDED,
     STOPPED("write") "waiting pending COMPLETED", 0},
    {"stopped by the source and resumed", MIDDLE, SOURCE_STOP_RESUME, SUCCEEDED,
     STOPPED("read") "waiting pending COMPLETED", 0},
    {"read error at 0", AT_0, READ_ERROR, FAILED, READ_IO_ERROR, 0},
    {"read error", MIDDLE, READ_ERROR, FAILED, READ_IO_ERROR, 0},
    {"write error at 0", FIRST, WRITE_ERROR, FAILED, WRITE_IO_ERROR, 0},
    {"write error", MIDDLE, WRITE_ERROR, FAILED, WRITE_IO_ERROR, 0},
    {"write error in a group", MIDDLE, WRITE_ERROR, FAILED, WRITE_IO_ERROR, GROUPED},
    {"no space", MIDDLE, NO_SPACE, FAILED, NO_SPACE_LEFT, 0},
    {"a save failed, and the copy", MIDDLE, SAVE_FAILS_ALL_FAILS, FAILED, NO_SPACE_LEFT, 0},
    {"a save failed, cancelled", MIDDLE, SAVE_FAILS_CANCEL, FAILED, "running " CANCELLED, 0},
    {"cancelled at 0", AT_0, CANCEL, FAILED, "running " CANCELLED, 0},
    {"cancelled at the first chunk", FIRST, CANCEL, FAILED, "running " CANCELLED, 0},
    {"cancelled in the middle", MIDDLE, CANCEL, FAILED, "running " CANCELLED, 0},
    {"cancelled, and a late failure", MIDDLE, CANCEL, FAILED, "running " CANCELLED, LATE_FAILURE},
    {"stopped, cancelled", MIDDLE, STOP_CANCEL, FAILED, STOPPED("write") CANCELLED, 0},
    {"cancelled in waiting", WAITING, CANCEL, FAILED, "running waiting " CANCELLED, GROUPED},
    {"cancelled in pending", PENDING, CANCEL, FAILED, RAN "PENDING " CANCELLED, 0},
    {"cancelled in pending, group", PENDING, CANCEL, FAILED, RAN "PENDING " CANCELLED, GROUPED},
    {"target's flush", PENDING, TARGET_FLUSH, FAILED, RAN "PENDING " IO_ERROR, 0},
    {"source's flush", PENDING, SOURCE_FLUSH, FAILED, RAN "PENDING " IO_ERROR, 0},
    {"target's flush in a group", PENDING, TARGET_FLUSH, FAILED, RAN "PENDING " IO_ERROR, GROUPED},
    {"sibling fails, first chunk", FIRST, SIBLING_FAILS, FAILED, "running " CANCELLED, GROUPED},
    {"sibling fails, middle", MIDDLE, SIBLING_FAILS, FAILED, "running " CANCELLED, GROUPED},
    {"sibling fails, late failure", MIDDLE, SIBLING_FAILS, FAILED, "running " CANCELLED,
     GROUPED | LATE_FAILURE},
    {"sibling fails, waiting", WAITING, SIBLING_FAILS, FAILED, "running waiting " CANCELLED,
     GROUPED | SIBLING_FIRST},
    {"sibling cancelled, at 0", AT_0, SIBLING_CANCELLED, FAILED, "running " CANCELLED,
     GROUPED | SIBLING_FIRST},
    {"sibling cancelled, first chunk", FIRST, SIBLING_CANCELLED, FAILED, "running " CANCELLED,
     GROUPED},
    {"sibling cancelled, middle", MIDDLE, SIBLING_CANCELLED, FAILED, "running " CANCELLED, GROUPED},
    {"sibling cancelled, waiting", WAITING, SIBLING_CANCELLED, FAILED, "running waiting " CANCELLED,
     GROUPED},
    {"sibling cancelled, pending", PENDING, SIBLING_CANCELLED, FAILED, RAN "PENDING " CANCELLED,
     GROUPED},
    {"first sibling's flush", PENDING, SIBLING_FLUSH, FAILED, RAN "PENDING " CANCELLED,
     GROUPED | SIBLING_FIRST},
    {"last sibling's flush", PENDING, SIBLING_FLUSH, FAILED, RAN "PENDING " CANCELLED, GROUPED},
};

/* Which modes each sync takes; "" is no bitmap-mode. */
static const struct {
    const char *sync, *mode;
} ways[] = {
    {"bitmap", "on-success"}, {"bitmap", "always"},
    {"bitmap", "never"},      {"incremental", "on-success"},
    {"incremental", ""},      {"full", "on-success"},
    {"full", "always"},       {"top", "on-success"},
    {"top", "always"},
};

struct cell {
    const char *command, *sync, *mode;
    uint64_t granularity, cluster; /* of the bitmap; of the target */
    bool enabled;
    const struct outcome *outcome;
};

/* ---- the model: a flag a sector and set ---- */

struct sets {
    uint64_t granularity, chunk;
    bool enabled;
    bool user[SECTORS], successor[SECTORS], after[SECTORS];
    bool wanted[SECTORS], left[SECTORS]; /* whole chunks */
};

static void set_units(bool *set, uint64_t unit, uint64_t start, uint64_t length, bool value)
{
    uint64_t end = min_u64(align_up(start + length, unit), SIZE);
    for (uint64_t i = align_down(start, unit); i < end; i += 512)
        set[i / 512] = value;
}

static bool any_in_unit(const bool *set, uint64_t unit, uint64_t at)
{
    for (uint64_t i = align_down(at, unit); i < min_u64(align_down(at, unit) + unit, SIZE);
         i += 512)
        if (set[i / 512])
            return true;
    return false;
}

/* ---- the stage ---- */

struct play {
    struct graph *g;
    const struct cell *cell;
    struct sets sets;
    struct node *s, *t, *s2, *t2;
    struct guest guest;
    struct dirty_bitmap *bitmap;
    struct event hold, hold_sibling;
    uint8_t *then, *old; /* the source at the instant, the target before */
};

#define MUST(p, cond)                                                                              \
    do {                                                                                           \
        if (!(cond))                                                                               \
            fail_cell(p, __LINE__, #cond);                                                         \
    } while (0)

static void fail_cell(const struct play *p, int line, const char *what)
{
    const struct cell *c = p->cell;
    fprintf(stderr,
            "%s:%d: %s sync=%s bitmap-mode=%s granularity %llu chunk %llu %s, %s: %s is not so\n"
            "events: %s\n",
            __FILE__, line, c->command, c->sync, c->mode, (unsigned long long)c->granularity,
            (unsigned long long)p->sets.chunk, c->enabled ? "enabled" : "disabled",
            c->outcome->name, what, events);
    abort();
}

static bool is_sync(const struct play *p, const char *sync)
{
    return strcmp(p->cell->sync, sync) == 0;
}

static bool is_mode(const struct play *p, const char *mode)
{
    return strcmp(p->cell->mode, mode) == 0;
}

static bool takes_bitmap(const struct play *p)
{
    return is_sync(p, "bitmap") || is_sync(p, "incremental");
}

enum kind { DATA, ZEROES, DISCARD };

static int change(struct play *p, enum kind kind, uint64_t start, uint64_t length)
{
    static uint8_t value = 0x20, buf[2 * UNIT];
    struct range r = range_make(start, length);

    value = value < 0x80 ? value + 1 : 0x20;
    memset(buf, value, length);
    return kind == DATA     ? edge_write(p->guest.edge, r, buf, 0)
           : kind == ZEROES ? edge_write_zeroes(p->guest.edge, r, 0)
                            : edge_discard(p->guest.edge, r);
}

/* A guest's write; MARKED is the set that records it. */
static void guest(struct play *p, bool *marked, enum kind kind, uint64_t start, uint64_t length)
{
    MUST(p, change(p, kind, start, length) == 0);
    if (p->sets.enabled)
        set_units(marked, p->sets.granularity, start, length, true);
    if (marked != p->sets.after) /* saved, where it remained */
        set_units(p->sets.left, p->sets.chunk, start, length, false);
}

static void write_before(struct play *p)
{
    bool *user = p->sets.user;
    guest(p, user, DATA, 2 * UNIT + 1024, 512);
    guest(p, user, DATA, HELD * UNIT, 4096);
    guest(p, user, DATA, 9 * UNIT, UNIT);
    guest(p, user, DATA, FAILS * UNIT - 512, 1024);
    guest(p, user, DATA, 18 * UNIT + 512, UNIT - 1024);
    guest(p, user, DATA, 22 * UNIT, 512);
    guest(p, user, DATA, 26 * UNIT, UNIT);
    guest(p, user, DATA, SIZE - 512, 512);
}

static void write_during(struct play *p)
{
    bool *successor = p->sets.successor;
    if (p->cell->outcome->moment != FIRST)
        guest(p, successor, DATA, 2 * UNIT + 4096, 512); /* copied */
    guest(p, successor, DATA, 23 * UNIT - 512, 1024);    /* half of it is to be copied */
    guest(p, successor, DATA, 17 * UNIT, 512);
    guest(p, successor, ZEROES, 26 * UNIT + 4096, 8192);
    guest(p, successor, DISCARD, 29 * UNIT, 4096);
    guest(p, successor, DATA, SIZE - 1024, 512);
}

static void write_late(struct play *p)
{
    guest(p, p->sets.successor, DATA, 3 * UNIT, 512);
    guest(p, p->sets.successor, DATA, 10 * UNIT, 512);
    guest(p, p->sets.successor, DATA, 20 * UNIT + 512, UNIT);
}

static void write_after(struct play *p)
{
    guest(p, p->sets.after, DATA, 7 * UNIT + 512, 512);
    guest(p, p->sets.after, DATA, 28 * UNIT, 512);
}

/* A disk with a backing image of the same size. */
static struct node *disk_over(struct graph *g, const char *name, const char *below)
{
    struct error err = ERROR_INIT;
    struct node *n = NULL;
    CLEANUP(node_unrefp) struct node *b = disk(g, below, SIZE, 0);
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'mem','node-name':'%s','size':%d,'discard':'unmap','backing':'%s'}", name,
              SIZE, below);
    memset(mem_of(b)->bytes, 0x11, SIZE);
    int r = graph_open(g, o, &n, &err);
    CHECK_OK(r, err);
    return n;
}

static void set_stage(struct play *p)
{
    const struct cell *c = p->cell;
    uint64_t chunk = max_u64(UNIT, c->cluster);

    p->s = is_sync(p, "top") ? disk_over(p->g, "s", "below") : disk(p->g, "s", SIZE, 0);
    p->t = disk(p->g, "t", SIZE, c->cluster);
    p->s2 = disk(p->g, "s2", 3 * UNIT, 0);
    p->t2 = disk(p->g, "t2", 3 * UNIT, 0);
    memset(mem_of(p->s)->bytes, 0x11, SIZE);
    memset(mem_of(p->s2)->bytes, 0x12, 3 * UNIT);
    /* What a bitmap speaks for is on the target, or below it. */
    memset(mem_of(p->t)->bytes, is_sync(p, "full") ? 0xee : 0x11, SIZE);
    event_init(&p->hold);
    event_init(&p->hold_sibling);
    p->sets = (struct sets){.granularity = c->granularity, .chunk = chunk, .enabled = true};

    command_ok(p->g, "block-dirty-bitmap-add",
               parse("{'node':'s','name':'b','granularity':%u}", (unsigned)c->granularity));
    p->bitmap = dirty_find(p->s, "b");
    guest_on(&p->guest, p->s, 1);
    write_before(p);
    if (!c->enabled)
        command_ok(p->g, "block-dirty-bitmap-disable", parse("{'node':'s','name':'b'}"));
    p->sets.enabled = c->enabled;
    if (is_sync(p, "top")) {
        static const uint8_t below[] = {0, 1, 6, 16, 17, 18, 19, 24, 25, 26, 27, 30, 31};
        mem_of(p->s)->hollow = xcalloc(UNITS, sizeof(bool));
        for (size_t i = 0; i < ARRAY_SIZE(below); i++) {
            mem_of(p->s)->hollow[below[i]] = true;
            memcpy(mem_of(p->t)->bytes + below[i] * UNIT, mem_of(p->s)->bytes + below[i] * UNIT,
                   UNIT);
        }
    }
    static uint8_t then[SIZE], old[SIZE];
    p->then = then;
    p->old = old;
    memcpy(p->then, mem_of(p->s)->bytes, SIZE);
    memcpy(p->old, mem_of(p->t)->bytes, SIZE);
    memset(mem_of(p->t)->written, 0, UNITS * sizeof *mem_of(p->t)->written);

    /* What the job is to copy. One that never looks at what the top layer has wants all. */
    bool *wanted = p->sets.wanted;
    for (uint64_t i = 0; i < SIZE; i += 512) {
        bool want = true;
        if (takes_bitmap(p))
            want = p->sets.user[i / 512];
        else if (is_sync(p, "top") &&
                 (c->outcome->moment != AT_0 || c->outcome->cause == READ_ERROR))
            want = !mem_of(p->s)->hollow[i / UNIT];
        if (want)
            set_units(wanted, chunk, i, 512, true);
    }
    memcpy(p->sets.left, wanted, sizeof p->sets.left);
}

static void clear_stage(struct play *p)
{
    edge_detach(p->guest.edge);
    node_unref(p->s);
    node_unref(p->t);
    node_unref(p->s2);
    node_unref(p->t2);
    events[0] = '\0';
}

static bool stops(enum cause cause)
{
    return cause == STOP_CANCEL || cause == STOP_RESUME || cause == SOURCE_STOP_RESUME;
}

/* The arguments of a backup from s to t. drive-backup opens its target by name: a raw node over t.
 */
static struct json_object *arguments(const struct play *p, const char *sync, const char *mode)
{
    const struct outcome *o = p->cell->outcome;
    struct json_object *data = parse("{'device':'s','job-id':'j','sync':'%s','bitmap':'b',"
                                     "'x-perf':{'max-workers':1,'max-chunk':%u}}",
                                     sync, (unsigned)p->sets.chunk);
    if (*mode)
        json_add_string(data, "bitmap-mode", mode);
    if (strcmp(p->cell->command, "drive-backup") == 0) {
        json_add_string(data, "target", "json:{\"driver\":\"raw\",\"file\":\"t\"}");
        json_add_string(data, "mode", "existing");
    } else
        json_add_string(data, "target", "t");
    json_add_bool(data, "auto-finalize", o->moment != PENDING);
    if (stops(o->cause))
        json_add_string(
            data, o->cause == SOURCE_STOP_RESUME ? "on-source-error" : "on-target-error", "stop");
    return data;
}

static struct json_object *action(const char *type, struct json_object *data)
{
    struct json_object *a = json_object_new_object();
    json_add_string(a, "type", type);
    json_add(a, "data", data);
    return a;
}

/* Starts it, with its sibling k when it has one. */
static int start(struct play *p, struct error *err)
{
    const struct outcome *o = p->cell->outcome;
    bool refused = o->moment == CREATED;
    CLEANUP(json_putp) struct json_object *actions = json_object_new_array();
    CLEANUP(json_putp) struct json_object *grouped = parse("{'completion-mode':'grouped'}");
    struct json_object *mine = action(p->cell->command, arguments(p, p->cell->sync, p->cell->mode));
    struct json_object *other = NULL;

    if (refused && o->cause == NOTHING)
        other = action("abort", json_object_new_object());
    else if (refused || (o->flags & GROUPED))
        other = action("blockdev-backup",
                       parse("{'device':'s2','target':'%s','job-id':'k','sync':'full',"
                             "'auto-finalize':%s}",
                             refused ? "nosuch" : "t2", o->moment == PENDING ? "false" : "true"));
    if (o->flags & SIBLING_FIRST)
        json_object_array_add(actions, other);
    json_object_array_add(actions, mine);
    if (other && !(o->flags & SIBLING_FIRST))
        json_object_array_add(actions, other);
    return transaction_run(p->g, js, actions, o->flags & GROUPED ? grouped : NULL, err);
}

/* A job that its maker cancels before it has been started. */
static void create_and_cancel(struct play *p)
{
    struct error err = ERROR_INIT;
    struct job *job = NULL;
    CLEANUP(json_putp)
    struct json_object *data = arguments(p, p->cell->sync, p->cell->mode);
    struct backup_request rq = {
        .data = data, .sync = p->cell->sync, .source = p->s, .target = p->t};
    GRAPH_LOCKED(p->g);

    graph_quiesce_begin(p->g, &p->s, 1);
    int r = backup_create(js, &rq, &job, &err);
    CHECK_OK(r, err);
    job_ref(job);
    struct node *filter = node_ref(backup_filter(job));
    MUST(p, dirty_busy(p->bitmap));
    job_cancel_and_wait(job);
    graph_quiesce_end(p->g, &filter, 1);
    node_unref(filter);
    job_unref(job);
    graph_quiesce_end(p->g, &p->s, 1);
}

static void never_start(struct play *p)
{
    struct error err = ERROR_INIT;

    if (p->cell->outcome->cause == CANCEL) {
        create_and_cancel(p);
        return;
    }
    MUST(p, start(p, &err) < 0);
    if (p->cell->outcome->cause == NOTHING)
        CHECK_TEXT(err, "Transaction aborted using Abort action");
    else
        CHECK_TEXT(err, "Cannot find device='nosuch' nor node-name='nosuch'");
}

/* The chunk of a place. */
static struct range chunk_at(const struct play *p, uint64_t unit)
{
    uint64_t start = align_down(unit * UNIT, p->sets.chunk);
    return range_make(start, min_u64(p->sets.chunk, SIZE - start));
}

/* The job has copied what is below END. */
static void copied_below(struct play *p, uint64_t end)
{
    for (uint64_t i = 0; i < end; i += 512)
        p->sets.left[i / 512] = false;
}

static void target_fails(struct play *p, struct range where, int code, int times)
{
    struct mem *t = mem_of(p->t);
    t->bad_write = where;
    t->write_errno = code;
    t->bad_times = times;
}

/* The chunk that the job is at, once it is held. */
static struct range held_chunk(const struct play *p)
{
    uint64_t unit = 0;
    if (p->cell->outcome->moment != FIRST)
        return chunk_at(p, HELD);
    while (!p->sets.wanted[unit * UNIT / 512] && unit < UNITS - 1)
        unit++;
    return chunk_at(p, unit);
}

/* What ends it; the model follows. */
static void strike(struct play *p)
{
    const struct outcome *o = p->cell->outcome;
    struct range fails = chunk_at(p, FAILS);
    bool on_its_way = o->moment == FIRST || o->moment == MIDDLE;
    struct mem *t2 = mem_of(p->t2);

    switch (o->cause) {
    case NOTHING:
    case REFUSED:
        break;
    case READ_ERROR:
    case SOURCE_STOP_RESUME:
        mem_of(p->s)->bad_read = o->moment == AT_0 ? range_make(0, SIZE) : fails;
        mem_of(p->s)->read_errno = EIO;
        break;
    case WRITE_ERROR:
    case NO_SPACE:
    case STOP_CANCEL:
    case STOP_RESUME:
        target_fails(p, o->moment == FIRST ? range_make(0, SIZE) : fails,
                     o->cause == WRITE_ERROR ? EIO : ENOSPC, -1);
        break;
    case SAVE_FAILS:
    case SAVE_FAILS_CANCEL:
    case SAVE_FAILS_ALL_FAILS:
        target_fails(p, fails, ENOSPC, o->cause == SAVE_FAILS_ALL_FAILS ? -1 : 1);
        MUST(p, change(p, DATA, FAILS * UNIT, 512) == -ENOSPC);
        MUST(p,
             memcmp(p->then + fails.start, mem_of(p->s)->bytes + fails.start, fails.length) == 0);
        if (o->cause == SAVE_FAILS_CANCEL)
            verb_ok("j", JOB_VERB_CANCEL);
        break;
    case CANCEL:
        event_set(&p->hold_sibling); /* from waiting, the verb waits until all have stopped */
        verb_ok("j", JOB_VERB_CANCEL);
        break;
    case TARGET_FLUSH:
        mem_of(p->t)->flush_errno = EIO;
        break;
    case SOURCE_FLUSH:
        mem_of(p->s)->flush_errno = EIO;
        break;
    case SIBLING_FAILS:
        t2->bad_write = range_make(0, 3 * UNIT);
        t2->write_errno = EIO;
        break;
    case SIBLING_CANCELLED:
        verb_ok("k", JOB_VERB_CANCEL);
        break;
    case SIBLING_FLUSH:
        t2->flush_errno = EIO;
        break;
    }
    event_set(&p->hold_sibling);
    if (o->moment != AT_0)
        turns(30);
    if (o->flags & LATE_FAILURE)
        target_fails(p, range_make(0, SIZE), EIO, -1);
    event_set(&p->hold);

    switch (o->cause) {
    case READ_ERROR:
    case WRITE_ERROR:
    case NO_SPACE:
    case SAVE_FAILS_ALL_FAILS:
    case STOP_CANCEL:
        if (o->moment == MIDDLE)
            copied_below(p, fails.start);
        break;
    case NOTHING:
    case SAVE_FAILS:
    case STOP_RESUME:
    case SOURCE_STOP_RESUME:
        copied_below(p, SIZE);
        break;
    default:
        /* It stops behind what is on its way. */
        if (on_its_way && !(o->flags & LATE_FAILURE))
            copied_below(p, range_end(held_chunk(p)));
    }
}

static void stop(struct play *p)
{
    wait_for("j", "paused");
    struct json_object *list = jobs_query_block(js);
    struct json_object *info = json_object_array_get_idx(list, 0);
    MUST(p, strcmp(json_get_string(info, "io-status", ""),
                   p->cell->outcome->cause == SOURCE_STOP_RESUME ? "failed" : "nospace") == 0);
    MUST(p, json_get_bool(info, "paused", false));
    json_object_put(list);
    MUST(p, dirty_busy(p->bitmap));
    write_late(p);
    if (p->cell->outcome->cause == STOP_CANCEL) {
        verb_ok("j", JOB_VERB_CANCEL);
        return;
    }
    target_fails(p, range_make(0, 0), 0, -1);
    mem_of(p->s)->bad_read = range_make(0, 0);
    mem_of(p->t)->check_once = true; /* it goes on where it stopped */
    verb_ok("j", JOB_VERB_RESUME);
}

static void run(struct play *p)
{
    const struct outcome *o = p->cell->outcome;
    struct error err = ERROR_INIT;

    if (o->moment != AT_0) {
        mem_of(p->t)->hold = &p->hold;
        mem_of(p->t)->held = held_chunk(p);
    }
    mem_of(p->t2)->hold = &p->hold_sibling;
    mem_of(p->t2)->held = range_make(0, 3 * UNIT);
    int r = start(p, &err);
    CHECK_OK(r, err);
    MUST(p, dirty_busy(p->bitmap));
    if (o->moment != AT_0) {
        for (unsigned i = 0; !mem_of(p->t)->holding; i++) {
            MUST(p, i < 5000);
            turns(1);
        }
        if (o->moment != FIRST)
            copied_below(p, held_chunk(p).start);
        write_during(p);
    }
    if (o->moment == WAITING || o->moment == PENDING) {
        event_set(&p->hold);
        if (o->moment == PENDING)
            event_set(&p->hold_sibling);
        wait_for("j", o->moment == WAITING ? "waiting" : "PENDING");
        MUST(p, dirty_busy(p->bitmap));
        copied_below(p, SIZE);
        write_late(p);
    }
    strike(p);
    if (stops(o->cause))
        stop(p);
    if (o->moment == PENDING && o->cause != CANCEL && o->cause != SIBLING_CANCELLED)
        verb_ok("j", JOB_VERB_FINALIZE);
    wait_for("j", "null");
    if (o->flags & GROUPED)
        wait_for("k", "null");
}

/* ---- what must be ---- */

static void check_copied(struct play *p)
{
    struct mem *t = mem_of(p->t);
    for (uint64_t i = 0; i < SIZE; i += 512) {
        bool copied = p->sets.wanted[i / 512] && !p->sets.left[i / 512];
        MUST(p, (t->written[i / UNIT] > 0) == copied);
        MUST(p, memcmp(t->bytes + i, (copied ? p->then : p->old) + i, 512) == 0);
    }
}

static void check_bitmap(struct play *p)
{
    const struct sets *m = &p->sets;
    enum fate fate = p->cell->outcome->fate;
    enum cause cause = p->cell->outcome->cause;
    bool flush_failed = cause == TARGET_FLUSH || cause == SOURCE_FLUSH;

    MUST(p, !dirty_busy(p->bitmap) && dirty_enabled(p->bitmap) == p->cell->enabled);
    MUST(p, dirty_first(p->s) == p->bitmap && !dirty_next(p->bitmap));
    for (uint64_t i = 0; i < SIZE; i += 512) {
        /* What is not known to be durable counts as not achieved, in whole chunks. */
        const bool *left = flush_failed ? m->wanted : m->left;
        bool user = m->user[i / 512];
        bool successor = m->successor[i / 512];
        bool dirty;
        if (fate == UNSTARTED)
            dirty = user;
        else if (is_mode(p, "never"))
            dirty = user || successor;
        else if (fate == SUCCEEDED)
            dirty = successor;
        else if (is_mode(p, "always"))
            dirty = any_in_unit(left, m->granularity, i) || successor;
        else
            dirty = user || successor;
        dirty |= m->after[i / 512];
        if (bitmap_get(dirty_bits(p->bitmap), i) != dirty) {
            fprintf(stderr, "byte %#llx is %s\n", (unsigned long long)i, dirty ? "clean" : "dirty");
            fail_cell(p, __LINE__, "the table");
        }
    }
}

static void mend(struct play *p)
{
    struct mem *all[] = {mem_of(p->s), mem_of(p->t), mem_of(p->t2)};
    for (size_t i = 0; i < ARRAY_SIZE(all); i++) {
        all[i]->bad_read = all[i]->bad_write = range_make(0, 0);
        all[i]->flush_errno = 0;
        all[i]->hold = NULL;
        all[i]->check_once = false;
    }
}

/* A second run onto the same target makes it the disk of the new instant. After a failure with
 * `always`, or a success, the bitmap alone says what is missing. */
static void run_again(struct play *p)
{
    enum fate fate = p->cell->outcome->fate;
    bool by_bitmap =
        takes_bitmap(p) || fate == SUCCEEDED || (fate == FAILED && is_mode(p, "always"));
    const char *mode = by_bitmap && !takes_bitmap(p) ? "always" : p->cell->mode;
    struct error err = ERROR_INIT;

    events[0] = '\0';
    CLEANUP(json_putp)
    struct json_object *data =
        arguments(p, by_bitmap && !takes_bitmap(p) ? "bitmap" : p->cell->sync, mode);
    json_add_bool(data, "auto-finalize", true);
    int r = transaction_run_one(p->g, js, p->cell->command, data, &err);
    CHECK_OK(r, err);
    wait_for("j", "null");
    MUST(p, strstr(events, "j:COMPLETED j:concluded"));
    MUST(p, memcmp(mem_of(p->s)->bytes, mem_of(p->t)->bytes, SIZE) == 0);
    if (strcmp(mode, "never") != 0)
        MUST(p, bitmap_count(dirty_bits(p->bitmap)) == 0);
}

/* The job's own events, without its sibling's, are exactly these. */
static bool events_are(const char *expected)
{
    char own[sizeof events] = "", wanted[512], text[sizeof events];
    char *next = strcpy(text, events), *word;
    bool mine = false;
    while ((word = strsep(&next, " ")) != NULL) {
        if (strncmp(word, "j:", 2) == 0 || strncmp(word, "k:", 2) == 0) {
            mine = *word == 'j';
            word += 2;
        } /* else the last one goes on */
        if (mine && *word)
            strcat(strcat(own, word), " ");
    }
    snprintf(wanted, sizeof wanted, "created %s concluded null ", expected);
    return strcmp(own, wanted) == 0;
}

static void play_cell(struct graph *g, const struct cell *c)
{
    struct play *p = xnew(struct play);
    p->g = g;
    p->cell = c;
    set_stage(p);
    if (c->outcome->fate == UNSTARTED)
        never_start(p);
    else
        run(p);
    MUST(p, events_are(c->outcome->events));
    MUST(p, p->guest.edge->node == p->s);
    if (c->outcome->fate != UNSTARTED)
        check_copied(p);
    mend(p);
    write_after(p);
    check_bitmap(p);
    if (c->enabled) /* else nobody knows what guests have written */
        run_again(p);
    clear_stage(p);
    free(p);
}

static void play_cells(struct graph *g, const char *command, bool enabled, uint64_t granularity,
                       uint64_t cluster)
{
    for (size_t w = 0; w < ARRAY_SIZE(ways); w++) {
        for (size_t o = 0; o < ARRAY_SIZE(outcomes); o++) {
            struct cell c = {command, ways[w].sync, ways[w].mode, granularity,
                             cluster, enabled,      &outcomes[o]};
            play_cell(g, &c);
        }
    }
}

JOB_TASK(blockdev_backup)
{
    play_cells(g, "blockdev-backup", true, 65536, 65536);
}

JOB_TASK(drive_backup)
{
    play_cells(g, "drive-backup", true, 65536, 65536);
}

JOB_TASK(disabled_bitmap)
{
    play_cells(g, "blockdev-backup", false, 65536, 0);
    play_cells(g, "drive-backup", false, 4096, 4096);
}

JOB_TASK(granularities)
{
    play_cells(g, "blockdev-backup", true, 512, 65536);
    play_cells(g, "blockdev-backup", true, 4096, 4 * UNIT);
    play_cells(g, "blockdev-backup", true, 4 * UNIT, 65536);
}

static unsigned errors_ignored(void)
{
    unsigned n = 0;
    for (const char *e = events; (e = strstr(e, "ERROR(read ignore)")); e++)
        n++;
    return n;
}

/* A disk that fails for ever, and a user who wants that ignored: some ten tries a second, each with
 * its event, and every verb works. */
JOB_TASK(ignored_for_ever)
{
    struct node *s = disk(g, "s", SIZE, 0), *t = disk(g, "t", SIZE, 0);
    memset(mem_of(s)->bytes, 0x11, SIZE);
    mem_of(s)->bad_read = range_make(0, 512);
    mem_of(s)->read_errno = EIO;
    command_ok(g, "blockdev-backup",
               parse("{'device':'s','target':'t','job-id':'j','sync':'full','auto-dismiss':false,"
                     "'on-source-error':'ignore'}"));
    turns(1000);
    CHECK(errors_ignored() == 1);
    CHECK(sleep_until(clock_after_ns(5 * NSEC_PER_SEC)) == 0);
    CHECK(errors_ignored() >= 40 && errors_ignored() <= 60);
    uint64_t now = clock_now_ns();
    verb_ok("j", JOB_VERB_PAUSE);
    wait_for("j", "paused");
    CHECK(clock_now_ns() == now);
    verb_ok("j", JOB_VERB_RESUME);
    turns(20);
    verb_ok("j", JOB_VERB_CANCEL);
    wait_for("j", "concluded");
    CHECK(clock_now_ns() == now && strstr(events, "j:CANCELLED"));
    verb_ok("j", JOB_VERB_DISMISS);
    node_unref(s);
    node_unref(t);
}

#define VIRTUAL(name, task)                                                                        \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run_virtually(task##_task, NULL), 0);                                     \
    }
VIRTUAL(each_outcome_of_blockdev_backup, blockdev_backup)
VIRTUAL(each_outcome_of_drive_backup, drive_backup)
VIRTUAL(each_outcome_with_a_disabled_bitmap, disabled_bitmap)
VIRTUAL(each_outcome_where_granularity_and_chunk_differ, granularities)
VIRTUAL(what_is_ignored_for_ever_floods_nobody, ignored_for_ever)

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(each_outcome_of_blockdev_backup),
    cmocka_unit_test(each_outcome_of_drive_backup),
    cmocka_unit_test(each_outcome_with_a_disabled_bitmap),
    cmocka_unit_test(each_outcome_where_granularity_and_chunk_differ),
    cmocka_unit_test(what_is_ignored_for_ever_floods_nobody),
};

UNIT_MAIN(tests)
