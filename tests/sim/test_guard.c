/* Bitmaps of a qcow2 image beside its tide file, on a simulated machine: scripts of one life that
 * is killed at each event, with the power or without, and goes on from what was left.
 *
 * A script is words; `a` and `b` are bitmaps, numbers are sectors, which are granules, too:
 *
 *     w5        the guest writes sector 5
 *     f         it flushes
 *     i         the disk is idle: bitmaps are saved in the image
 *     +a +da    add, disabled     -a  remove      ea da  enable, disable      ca  clear
 *     mab       a is merged into b                       xab  and cleared in the same transaction
 *     sa na     a backup advances a; with bitmap-mode never it does not
 *     r128      the disk gets 128 sectors                ro rw  reopened
 *     ! .       tide files fail from now on; no more     !i !h  syncs of the image fail, its writes
 *               too (and those of the tide file beside it)
 *     k         killed; at the end: otherwise it ends well
 *
 * What must be true: the image opens; where the content differs from a bitmap's base its bit is
 * set, or the bitmap is inconsistent; and without a fault none is. */
#include "../unit/unit.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/guard.h"
#include "copy/copy.h"
#include "dirty/dirty.h"
#include "job/driver.h"
#include "job/job.h"
#include "job/transaction.h"
#include "machine.h"
#include "persist/persist.h"
#include "rt/io.h"
#include "rt/task.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <unistd.h>

enum { SECTORS = 128, FIRST_SIZE = 64, BITMAPS = 2, SECTOR = 512 };
#define IMAGE "/d/a.qcow2"

static struct machine m;
static const char *place_in_time = "";
static bool picky = true; /* a word that cannot be done is a mistake */

#define MUST_HOLD(cond, ...)                                                                       \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: %s: %s is not so: ", __FILE__, __LINE__, place_in_time,        \
                    #cond);                                                                        \
            fprintf(stderr, "" __VA_ARGS__);                                                       \
            fputc('\n', stderr);                                                                   \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

/* ---- what the client of the bitmaps knows ---- */

struct known {
    bool there, enabled;
    bool distrusted; /* it was inconsistent, and nobody could remove it */
    uint32_t base[SECTORS];
    bool exempt[SECTORS]; /* written while it did not record */
    bool must[SECTORS];   /* from a merge: dirty, whatever the content is */
};
struct knowledge {
    struct known bitmaps[BITMAPS];
};

static struct {
    struct knowledge now, then; /* THEN, if what is under way has come to its end */
    bool doubt, rebases[BITMAPS], unbased[BITMAPS];
    uint64_t generation[BITMAPS];
    uint32_t content[SECTORS], stamp;
    bool faulty;  /* what is not sure may be lost */
    bool failed;  /* a sync has: what the medium has is not what the page cache has */
    bool foreign; /* another program has written */
    bool
        foreign_unsynced; /* and its header is in the page cache only: the one before may be back */
    bool saved;           /* the image's copies are exact */
    uint64_t seen[BITMAPS]; /* generations at the last look */
    bool rebased[BITMAPS];  /* since then */
} know;

static const char *const names[BITMAPS] = {"a", "b"};

/* ---- a life ---- */

static struct {
    const char *script, *options;
    bool foreign, read_only, no_runtime;
    bool leaves;          /* the client leaves what is inconsistent where it is */
    unsigned tide_writes; /* it is killed at one of the first so many after it was opened; 0: not */
    uint64_t opened;      /* the event at which it was */
    struct graph *g;
    struct jobs *js;
    struct node *n;
    struct edge *e;
    struct user user;
} now;

static char *describe(struct user *u)
{
    return xstrdup("guest");
}

static void ignore_edge(struct user *u, struct edge *e)
{
}

static const struct user_ops user_ops = {describe, ignore_edge, ignore_edge};

static struct json_object *json(const char *fmt, ...)
{
    char text[1024];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    struct json_object *o = json_tokener_parse(text);
    MUST_HOLD(o, "%s", text);
    return o;
}

static void make_images(void)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *file = json("{'driver':'file','filename':'" IMAGE "','size':0}");
    CLEANUP(json_putp)
    struct json_object *target =
        json("{'driver':'file','filename':'/d/t','size':%d}", FIRST_SIZE * SECTOR);
    CLEANUP(json_putp)
    struct json_object *image = json("{'driver':'qcow2','file':{'driver':'file','filename':'" IMAGE
                                     "'},'size':%d,'cluster-size':4096}",
                                     FIRST_SIZE * SECTOR);
    MUST_HOLD(graph_create(now.g, file, &err) == 0 && graph_create(now.g, image, &err) == 0 &&
                  graph_create(now.g, target, &err) == 0,
              "%s", err.text);
    int fd = io_open("/d/t", O_RDWR, 0);
    MUST_HOLD(fd >= 0 && io_fsync(fd) == 0 && io_sync_dir_of("/d/t") == 0, "/d/t");
    io_close(fd);
}

static void use(void)
{
    struct error err = ERROR_INIT;

    now.user = (struct user){&user_ops};
    MUST_HOLD(edge_attach_user(&now.user, now.n, "root",
                               PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE, PERM_ALL, &now.e,
                               &err) == 0,
              "%s", err.text);
}

/* ---- judging ---- */

static void read_content(void)
{
    uint64_t n = node_size(now.n) / SECTOR;
    struct error err = ERROR_INIT;
    struct user user = {&user_ops};
    struct edge *e;

    MUST_HOLD(edge_attach_user(&user, now.n, "judge", PERM_CONSISTENT_READ, PERM_ALL, &e, &err) ==
                  0,
              "%s", err.text);
    memset(know.content, 0, sizeof know.content);
    for (uint64_t i = 0; i < n; i++) {
        uint32_t buf[SECTOR / 4];
        MUST_HOLD(edge_read(e, range_make(i * SECTOR, SECTOR), buf, 0) == 0, "%llu",
                  (unsigned long long)i);
        know.content[i] = buf[0];
    }
    edge_detach(e);
}

static uint64_t generation_of(unsigned i)
{
    struct dirty_bitmap *bm = dirty_find(now.n, names[i]);
    struct dirty_state st = {0};

    if (bm)
        dirty_get_state(bm, &st);
    return st.generation;
}

/* What is not as K says; NULL: all is. */
static const char *what_is_wrong(unsigned which, const struct known *k)
{
    static char text[200];
    struct dirty_bitmap *bm = dirty_find(now.n, names[which]);
    const uint64_t n = node_size(now.n) / SECTOR;

    if (!bm)
        return !k->there || know.foreign || know.faulty || k->distrusted ? NULL : "it is gone";
    if (!k->there)
        return dirty_inconsistent(bm) ? NULL : "it is there"; /* it does not lie */
    if (dirty_inconsistent(bm))
        return know.foreign || know.faulty || know.unbased[which] || k->distrusted
                   ? NULL
                   : "it is inconsistent";
    if (dirty_busy(bm))
        return "it is busy";
    if (dirty_enabled(bm) != k->enabled)
        return "it is switched otherwise";
    if (bitmap_size(dirty_bits(bm)) != n * SECTOR)
        return "it has another size";
    for (uint64_t i = 0; i < n; i++) {
        bool differs = know.content[i] != k->base[i] && !k->exempt[i];
        if ((differs || k->must[i]) && !bitmap_get(dirty_bits(bm), i * SECTOR)) {
            snprintf(text, sizeof text, "sector %llu is clean: it holds %u, its base %u",
                     (unsigned long long)i, know.content[i], k->base[i]);
            return text;
        }
    }
    return NULL;
}

/* The client has seen what is not to be trusted, and does what it must. */
static void take_note(unsigned which)
{
    struct dirty_bitmap *bm = dirty_find(now.n, names[which]);
    struct error err = ERROR_INIT;

    if (!bm || !dirty_inconsistent(bm) || now.read_only)
        return;
    if (now.leaves) {
        know.now.bitmaps[which].distrusted = true;
        return;
    }
    know.then = know.now;
    know.then.bitmaps[which].there = know.then.bitmaps[which].distrusted = false;
    know.doubt = true;
    MUST_HOLD(transaction_run_one(now.g, now.js, "block-dirty-bitmap-remove",
                                  json("{'node':'d','name':'%s'}", names[which]), &err) == 0,
              "%s", err.text);
    know.doubt = false;
    know.now = know.then;
}

static void tell(void)
{
    fprintf(stderr, "-- %s life, script '%s'\n", now.read_only ? "read-only" : "a", now.script);
    for (unsigned i = 0; i < BITMAPS; i++) {
        struct dirty_bitmap *bm = dirty_find(now.n, names[i]);
        fprintf(stderr, "   %s: known %d%s; %s %s generation %llu\n", names[i],
                know.now.bitmaps[i].there, know.doubt ? " in doubt" : "",
                bm ? "there" : "not there", bm && dirty_inconsistent(bm) ? "inconsistent" : "",
                (unsigned long long)generation_of(i));
    }
}

static void judge(void)
{
    bool then = false;
    const char *why = NULL;
    unsigned i;

    read_content();
    if (getenv("TELL"))
        tell();
    for (i = 0; i < BITMAPS && !why; i++)
        why = what_is_wrong(i, &know.now.bitmaps[i]);
    if (why && know.doubt) {
        const char *other = NULL;
        unsigned j;
        for (j = 0; j < BITMAPS && !other; j++) {
            struct dirty_bitmap *bm = dirty_find(now.n, names[j]);
            other = what_is_wrong(j, &know.then.bitmaps[j]);
            if (!other && know.rebases[j] && know.generation[j] == generation_of(j) && bm &&
                !dirty_inconsistent(bm))
                other = "it has another base, and the old generation";
        }
        then = !other;
        if (other)
            fprintf(stderr, "(or bitmap '%s': %s)\n", names[j - 1], other);
        else
            why = NULL;
    }
    MUST_HOLD(!why, "bitmap '%s': %s", names[i - 1], why);
    if (then)
        know.now = know.then;
    for (i = 0; i < BITMAPS; i++) {
        uint64_t generation = generation_of(i);
        MUST_HOLD(!generation || !know.rebased[i] || generation != know.seen[i],
                  "bitmap '%s' has another base, and the generation of before", names[i]);
        know.seen[i] = generation;
        know.rebased[i] = false;
    }
    know.doubt = know.foreign = false;
    know.faulty &= know.failed;
    for (i = 0; i < BITMAPS; i++)
        know.unbased[i] = know.rebases[i] = false;
    for (i = 0; i < BITMAPS; i++) {
        struct dirty_bitmap *bm = dirty_find(now.n, names[i]);
        know.now.bitmaps[i].there &= bm != NULL;
        know.now.bitmaps[i].distrusted = bm && dirty_inconsistent(bm);
    }
    for (i = 0; i < BITMAPS; i++)
        take_note(i);
}

/* ---- what scripts do ---- */

static bool failing(void)
{
    return m.faults.write || m.faults.sync;
}

static void begin_doubt(void)
{
    know.then = know.now;
    for (unsigned i = 0; i < BITMAPS; i++)
        know.generation[i] = generation_of(i);
    know.doubt = true;
}

static void end_doubt(int r, const struct error *err)
{
    for (unsigned i = 0; i < BITMAPS; i++) {
        know.rebased[i] = now.foreign && (know.rebased[i] || (r == 0 && know.rebases[i]));
        if (!now.foreign)
            know.seen[i] = generation_of(i);
    }
    if (r == 0)
        know.now = know.then;
    else
        MUST_HOLD(failing(), "%s: %s", now.script, err->text);
    know.doubt = false;
    memset(know.unbased, 0, sizeof know.unbased);
    memset(know.rebases, 0, sizeof know.rebases);
}

static unsigned bitmap_named(char c)
{
    MUST_HOLD(c == 'a' || c == 'b', "%s", now.script);
    return (unsigned)(c - 'a');
}

static void act(struct json_object *actions)
{
    struct error err = ERROR_INIT;
    int r = transaction_run(now.g, now.js, actions, NULL, &err);

    end_doubt(r, &err);
    json_object_put(actions);
}

#define ACTION(name) "{'type':'block-dirty-bitmap-" name "','data':{'node':'d',"

static void new_base(unsigned i)
{
    struct known *k = &know.then.bitmaps[i];

    memcpy(k->base, know.content, sizeof k->base);
    memset(k->exempt, 0, sizeof k->exempt);
    memset(k->must, 0, sizeof k->must);
    know.rebases[i] = true;
}

static void add(unsigned i, bool enabled)
{
    begin_doubt();
    new_base(i);
    know.then.bitmaps[i].there = know.unbased[i] = true;
    know.then.bitmaps[i].enabled = enabled;
    know.rebases[i] = false;
    act(json("[" ACTION("add") "'name':'%s','persistent':true,'granularity':512,'disabled':%s}}]",
             names[i], enabled ? "false" : "true"));
}

static void remove_bitmap(unsigned i)
{
    begin_doubt();
    know.then.bitmaps[i].there = false;
    act(json("[" ACTION("remove") "'name':'%s'}}]", names[i]));
}

static void switch_it(unsigned i, bool enabled)
{
    begin_doubt();
    know.unbased[i] = enabled && !know.now.bitmaps[i].enabled;
    know.then.bitmaps[i].enabled = enabled;
    act(enabled ? json("[" ACTION("enable") "'name':'%s'}}]", names[i])
                : json("[" ACTION("disable") "'name':'%s'}}]", names[i]));
}

static void clear(unsigned i)
{
    begin_doubt();
    new_base(i);
    act(json("[" ACTION("clear") "'name':'%s'}}]", names[i]));
}

static void merge(unsigned from, unsigned to, bool and_clear)
{
    begin_doubt();
    struct bitmap *bits = dirty_bits(dirty_find(now.n, names[from]));
    for (unsigned i = 0; i < node_size(now.n) / SECTOR; i++)
        know.then.bitmaps[to].must[i] |= bitmap_get(bits, i * SECTOR);
    if (and_clear)
        new_base(from);
    act(and_clear ? json("[" ACTION("merge") "'target':'%s','bitmaps':['%s']}}," ACTION(
                             "clear") "'name':'%s'}}]",
                         names[to], names[from], names[from])
                  : json("[" ACTION("merge") "'target':'%s','bitmaps':['%s']}}]", names[to],
                         names[from]));
}

static void write_sector(unsigned i)
{
    uint32_t buf[SECTOR / 4];

    know.stamp++;
    for (unsigned j = 0; j < SECTOR / 4; j++)
        buf[j] = know.stamp;
    for (unsigned j = 0; j < BITMAPS; j++) {
        know.now.bitmaps[j].exempt[i] |= !know.now.bitmaps[j].enabled;
        know.then.bitmaps[j].exempt[i] |= !know.then.bitmaps[j].enabled;
    }
    int r = edge_write(now.e, range_make((uint64_t)i * SECTOR, SECTOR), buf, 0);
    MUST_HOLD(r == 0 || failing(), "%s: %s", now.script, strerror(-r));
    if (r == 0)
        know.content[i] = know.stamp;
    else
        read_content();
}

static void rest(void)
{
    (void)!sleep_until(clock_after_ns(NSEC_PER_SEC / 1000));
}

/* The guest writes meanwhile. */
static void back_up(unsigned which, bool advance)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *target = json("{'driver':'file','node-name':'t','filename':'/d/t'}");
    struct node *t;

    MUST_HOLD(graph_open(now.g, target, &t, &err) == 0, "%s", err.text);
    begin_doubt();
    if (advance)
        new_base(which);
    CLEANUP(json_putp)
    struct json_object *actions =
        json("[{'type':'blockdev-backup','data':{'device':'d','target':'t','job-id':'j',"
             "'sync':'bitmap','bitmap':'%s','bitmap-mode':'%s'}}]",
             names[which], advance ? "on-success" : "never");
    int r = transaction_run(now.g, now.js, actions, NULL, &err);
    if (r == 0) {
        write_sector(40);
        write_sector(0);
        persist_save_idle(now.n);
        for (bool ended = false; !ended; rest()) {
            CLEANUP(json_putp) struct json_object *all = jobs_query(now.js);
            ended = json_object_array_length(all) == 0;
        }
        if (advance && failing())
            know.now = generation_of(which) == know.generation[which] ? know.now : know.then;
    }
    end_doubt(failing() ? -EIO : r, &err);
    node_unref(t);
}

static void resize(unsigned sectors)
{
    struct error err = ERROR_INIT;
    int r = edge_truncate(now.e, (uint64_t)sectors * SECTOR, true, &err);

    MUST_HOLD(r == 0 || failing(), "%s", err.text);
    read_content();
}

static void reopen(bool read_only)
{
    struct error err = ERROR_INIT;

    if (now.e)
        edge_detach(steal(now.e));
    MUST_HOLD(node_set_read_only(now.n, read_only, &err) == 0 || failing(), "%s", err.text);
    if (!read_only)
        use();
}

static void let_fail(const char *path, bool writes)
{
    m.faults = (struct faults){.write = writes ? 10000 : 0, .sync = 10000};
    snprintf(m.faults.path, sizeof m.faults.path, "%s", path);
    know.faulty = know.failed = true;
}

static bool can_do(const char *w);

static void do_word(const char *w)
{
    if (!picky && !can_do(w))
        return;
    know.saved &= *w == 'i' || *w == 'f' || *w == 'k';
    switch (*w) {
    case 'w':
        write_sector((unsigned)atoi(w + 1));
        break;
    case 'f':
        MUST_HOLD(edge_flush(now.e) == 0 || failing(), "%s", now.script);
        break;
    case 'i':
        persist_save_idle(now.n);
        know.saved |= !failing();
        break;
    case '+':
        add(bitmap_named(w[1] == 'd' ? w[2] : w[1]), w[1] != 'd');
        break;
    case '-':
        remove_bitmap(bitmap_named(w[1]));
        break;
    case 'e':
    case 'd':
        switch_it(bitmap_named(w[1]), *w == 'e');
        break;
    case 'c':
        clear(bitmap_named(w[1]));
        break;
    case 'm':
    case 'x':
        merge(bitmap_named(w[1]), bitmap_named(w[2]), *w == 'x');
        break;
    case 's':
    case 'n':
        back_up(bitmap_named(w[1]), *w == 's');
        break;
    case 'r':
        if (w[1] == 'o' || w[1] == 'w')
            reopen(w[1] == 'o');
        else
            resize((unsigned)atoi(w + 1));
        break;
    case '!':
        let_fail(w[1] ? IMAGE : ".tide", w[1] != 'i');
        break;
    case '.':
        m.faults = (struct faults){0};
        break;
    case 'k':
        machine_kill(&m);
        break;
    default:
        MUST_HOLD(false, "%s", w);
    }
}

static int live(void *arg)
{
    struct error err = ERROR_INIT;
    char *words, *word, *rest_of;
    struct stat st;

    m.faults = (struct faults){0};
    know.foreign |= now.foreign;
    now.g = graph_new();
    copy_register_drivers(now.g);
    dirty_init(now.g);
    persist_init(now.g);
    persist_set_limits(now.g, 12, 4, 2);
    persist_set_checkpoints(now.g, 0, 0, UINT64_MAX);
    if (!now.no_runtime)
        persist_set_runtime(now.g, "/run");
    now.js = jobs_new(now.g);
    if (io_stat(IMAGE, &st) == -ENOENT)
        make_images();
    CLEANUP(json_putp)
    struct json_object *o =
        json("{'driver':'qcow2','node-name':'d','read-only':%s,"
             "'x-tidemark-persist':{%s},"
             "'file':{'driver':'file','filename':'" IMAGE "'}}",
             now.read_only ? "true" : "false", now.foreign ? "'level':'off'" : now.options);
    MUST_HOLD(graph_open(now.g, o, &now.n, &err) == 0, "%s", err.text);
    now.e = NULL;
    if (now.foreign) {
        read_content();
    } else {
        judge();
    }
    if (!now.read_only)
        use();
    now.opened = m.events - m.life_events;
    if (now.tide_writes)
        m.doomed = 1 + (unsigned)dice_below(&m.dice, now.tide_writes);
    words = xstrdup(now.script);
    for (word = strtok_r(words, " ", &rest_of); word; word = strtok_r(NULL, " ", &rest_of))
        do_word(word);
    free(words);
    if (now.e)
        edge_detach(now.e);
    node_unref(now.n);
    jobs_free(now.js);
    graph_free(now.g);
    know.saved |= !failing();
    return 0;
}

static bool header_is_unsynced(void)
{
    const struct inode *image = store_find(&m.store, IMAGE);

    return image && image->n_sectors && image->sectors[0];
}

/* True: it came to its end. */
static bool run(const char *script, uint64_t kill_at)
{
    now.script = script;
    int r = machine_live(&m, kill_at, live, NULL);
    MUST_HOLD(r == 0 || r == -EOWNERDEAD, "%s: %d", script, r);
    m.faults = (struct faults){0};
    know.foreign_unsynced = (now.foreign || know.foreign_unsynced) && header_is_unsynced();
    return r == 0;
}

/* Level process has nothing else than the run segments, and the image while it is saved. */
static void lose_segments(void)
{
    know.faulty |= strstr(now.options, "process") && !know.saved;
}

static void lose_power(void)
{
    lose_segments();
    know.foreign |= know.foreign_unsynced;
    know.foreign_unsynced = false;
    machine_lose_power(&m);
}

static void start(uint64_t seed)
{
    log_set_level(getenv("TELL") ? LOG_LEVEL_DEBUG : LOG_LEVEL_ERROR + 1);
    memset(&know, 0, sizeof know);
    memset(&now, 0, sizeof now);
    now.options = "";
    machine_init(&m, seed);
    m.tracing = getenv("TRACE");
}

/* ---- a script is killed at each event ---- */

struct course {
    const char *name, *before, *script, *after, *options;
    const char *between; /* another program's script, before SCRIPT */
    bool foreign, no_runtime, leaves;
    unsigned dices; /* different ends; 0: one */
    /* What only a kill and a power loss soon afterwards tell: AFTER is killed at one of its first
     * so many writes to the tide file, SCRIPT at each event since the opening. */
    unsigned again;
};

enum after { KILLED, POWERLESS, KILLED_TWICE, AFTERS };

/* True: the script came to its end. */
static bool begin_course(const struct course *c, uint64_t seed, uint64_t kill_at)
{
    start(seed);
    now.options = c->options ? c->options : "";
    now.no_runtime = c->no_runtime;
    now.leaves = c->leaves;
    run(c->before, 0);
    if (c->between) {
        now.foreign = true;
        run(c->between, 0);
    }
    now.foreign = c->foreign;
    bool ended = run(c->script, kill_at);
    now.foreign = false;
    return ended;
}

static uint64_t events_of_opening(const struct course *c)
{
    begin_course(c, 1, 0);
    machine_fini(&m);
    return now.opened;
}

static void a_course(const struct course *c)
{
    static const char *const afters[] = {"killed", "powerless", "killed, and powerless later"};
    static char where[400];
    const char *only = getenv("ONLY_AT"), *more = getenv(c->again ? "TEST_HISTORIES" : "TEST_DICE");
    const unsigned dices = more ? (unsigned)atoi(more) : c->dices ? c->dices : 1;

    place_in_time = where;
    for (unsigned after = c->again ? KILLED_TWICE : 0; after < AFTERS; after++) {
        bool ended = false;
        uint64_t first = c->again ? events_of_opening(c) : 1;
        for (uint64_t n = only ? strtoull(only, NULL, 0) : first; !ended; n++) {
            for (unsigned dice = 0; dice < (after == KILLED ? 1 : dices); dice++) {
                snprintf(where, sizeof where, "'%s' | '%s', %s at event %llu, dice %u, then '%s'",
                         c->before, c->script, afters[after], (unsigned long long)n, dice,
                         c->after);
                ended = begin_course(c, n * 1000 + dice, n);
                if (after == POWERLESS)
                    lose_power();
                now.tide_writes = c->again;
                run(c->after, after == KILLED_TWICE && !c->again && (n + dice) % 2
                                  ? 1 + dice_below(&m.dice, 400)
                                  : 0);
                now.tide_writes = 0;
                if (after == KILLED_TWICE)
                    lose_power();
                now.read_only = true;
                run("", 0);
                now.read_only = false;
                run("w9", 0);
                machine_fini(&m);
            }
            if (only)
                break;
        }
    }
}

#define COURSE(name, ...)                                                                          \
    static void name(void **state)                                                                 \
    {                                                                                              \
        a_course(&(struct course){#name, __VA_ARGS__});                                            \
    }

COURSE(first_writes, "+a w1 f", "w2 w20 f w30", "w3 w33 k", .dices = 4)
COURSE(a_bitmap_is_added, "w1", "w2 +a w3", "w4 k")
COURSE(a_bitmap_is_added_beside_another, "+a w1 ca", "+b w3 -a w4", "w5 k")
COURSE(clears, "+a w1 f", "w2 ca w3", "w4 k")
COURSE(clears_after_an_idle_save, "+a w1 f", "w2 i ca w3", "w4 k")
COURSE(a_merge_and_a_clear, "+a +b w1 w2 i cb w3", "xab w4 i", "w5 k")
COURSE(switches, "+a +db w1", "w2 da w3 eb w4 i ea db w5", "w6 k")
COURSE(removes, "+a +b w1", "w2 -a w3 i -b w4", "w5 k")
COURSE(a_backup_advances, "+a w1 w2", "w3 sa w4", "w5 k")
COURSE(a_backup_does_not_advance, "+a w1 w2", "w3 na i w4", "w5 k")
COURSE(idle_saves, "+a w1", "w2 i w3 i i w2 w40 i", "w5 i w6 k")
COURSE(closes, "+a +db w1", "w2", "w5 k")
COURSE(closes_unchanged, "+a +db w1 k", "", "w5 k")
COURSE(reopens, "+a w1", "w2 ro rw w3 ro", "w5 k")
COURSE(grows, "+a +db w1", "w2 r128 w100 i r120 w99", "w5 k")
COURSE(shrinks, "+a w1 w60 f", "r32 w2 i r64 w50", "w5 k")
COURSE(a_size_in_the_page_cache_is_lost, "+a w1 w60 f", "r32", "w5 k", .again = 6, .dices = 4)
COURSE(in_use_in_the_page_cache_is_lost, "+a +b w1", "w2", "w5 w20 w40 k", .again = 9, .dices = 4)
COURSE(a_recovery_is_cut, "+a +b w1 i w2 k", "w3 cb w4", "w5 k")
COURSE(level_process, "+a w1", "w2 i w3 ca w4", "", "'level':'process'")
COURSE(another_program_writes, "+a w1 i w2 k", "w3", "w5 k", .foreign = true)
COURSE(another_program_writes_a_saved_image, "+a w1 i k", "w3", "w5 k", .foreign = true)
COURSE(another_program_is_killed_at_its_first_write, "+a w20 f sa", "w20", "w20 k", .foreign = true,
       .leaves = true, .dices = 4)
COURSE(after_another_program, "+a w1 i w2 k", "w4 i", "w5 k", .between = "w3 k")
COURSE(another_program_clears, "+a w1 i k", "w3", "w5 k", .between = "w3 ca w4")
COURSE(without_a_runtime_directory, "+a w1", "w2 i ca w3", "w4 k", .no_runtime = true)
COURSE(the_tide_file_fails_for_good, "+a w1", "w2 ! w3 w30 w40 w50 w60", "w4 k")
COURSE(the_tide_file_fails_at_the_first_change, "+a w1", "! w3 w30 ca w4 i w5", "w4 k")
COURSE(switches_when_nothing_can_be_kept, "+a w1", "da ! ca . ea w2 i w3", "w4 k")
COURSE(everything_fails, "+a w1", "w2 !h w3 ca w30 w40", "w4 k")
COURSE(the_image_cannot_be_synced, "+a w1", "!i w2 w3 ca w30", "w4 k")

/* ---- any words ---- */

static bool can_do(const char *w)
{
    const bool writable = now.e != NULL;
    const char *of = strpbrk(w, "ab");
    unsigned last = 0;

    if (*w == 'r' && (w[1] == 'o' || w[1] == 'w'))
        return writable == (w[1] == 'o');
    if (!writable)
        return *w == 'i';
    if (*w == 'w' || *w == 'f')
        return *w == 'f' || (uint64_t)atoi(w + 1) < node_size(now.n) / SECTOR;
    if (now.foreign && *w != 'c' && *w != 'i')
        return false;
    for (; of && *of; of++) {
        struct dirty_bitmap *bm = dirty_find(now.n, *of == 'a' ? "a" : "b");
        if (*w == '+' ? bm != NULL : !bm || dirty_inconsistent(bm))
            return false;
        last = (unsigned)(*of - 'a');
    }
    return (*w != 's' && *w != 'n') ||
           (node_size(now.n) == FIRST_SIZE * SECTOR && know.now.bitmaps[last].enabled);
}

static void any_words(void **state)
{
    static const char *const words[] = {
        "w1",  "w2", "w3", "w9", "w17", "w25", "w33", "w41",  "w60", "w1",  "w2",
        "w3",  "f",  "i",  "i",  "i",   "+a",  "+b",  "+da",  "+db", "-a",  "-b",
        "ea",  "eb", "da", "db", "ca",  "cb",  "ca",  "cb",   "mab", "mba", "xab",
        "xba", "sa", "sb", "na", "nb",  "r32", "r64", "r128", "ro",  "rw",  "rw"};
    const char *histories = getenv("TEST_HISTORIES"), *first = getenv("TEST_SEED");
    uint64_t n = histories ? strtoull(histories, NULL, 0) : 300;
    uint64_t from = first ? strtoull(first, NULL, 0) : 1;
    static char where[2000], script[400];

    picky = false;
    for (uint64_t seed = from; seed < from + n; seed++) {
        struct dice dice = {seed * 0x9E3779B97F4A7C15ull};
        int length = snprintf(where, sizeof where,
                              "TEST_SEED=%llu TEST_HISTORIES=1:", (unsigned long long)seed);
        place_in_time = where;
        start(seed);
        now.options = one_in(&dice, 6) ? "'level':'process'" : "";
        now.no_runtime = one_in(&dice, 5);
        for (unsigned life = 0; life < 5; life++) {
            *script = '\0';
            for (uint64_t i = dice_below(&dice, 9); i; i--)
                strcat(strcat(script, words[dice_below(&dice, ARRAY_SIZE(words))]), " ");
            now.foreign = life && one_in(&dice, 8);
            uint64_t kill_at = one_in(&dice, 5) ? 0 : 1 + dice_below(&dice, 900);
            length +=
                snprintf(where + length, sizeof where - (size_t)length, " | %s%s%llu",
                         now.foreign ? "(foreign) " : "", script, (unsigned long long)kill_at);
            bool ended = run(script, life ? kill_at : 0);
            now.foreign = false;
            if (!ended && now.no_runtime)
                lose_segments();
            if (!ended && one_in(&dice, 2)) {
                lose_power();
                length += snprintf(where + length, sizeof where - (size_t)length, " powerless");
            }
        }
        run("", 0);
        machine_fini(&m);
    }
    picky = true;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(any_words),
    cmocka_unit_test(first_writes),
    cmocka_unit_test(a_bitmap_is_added),
    cmocka_unit_test(a_bitmap_is_added_beside_another),
    cmocka_unit_test(clears),
    cmocka_unit_test(clears_after_an_idle_save),
    cmocka_unit_test(a_merge_and_a_clear),
    cmocka_unit_test(switches),
    cmocka_unit_test(removes),
    cmocka_unit_test(a_backup_advances),
    cmocka_unit_test(a_backup_does_not_advance),
    cmocka_unit_test(idle_saves),
    cmocka_unit_test(closes),
    cmocka_unit_test(closes_unchanged),
    cmocka_unit_test(reopens),
    cmocka_unit_test(grows),
    cmocka_unit_test(shrinks),
    cmocka_unit_test(a_size_in_the_page_cache_is_lost),
    cmocka_unit_test(in_use_in_the_page_cache_is_lost),
    cmocka_unit_test(a_recovery_is_cut),
    cmocka_unit_test(level_process),
    cmocka_unit_test(another_program_writes),
    cmocka_unit_test(another_program_writes_a_saved_image),
    cmocka_unit_test(another_program_is_killed_at_its_first_write),
    cmocka_unit_test(after_another_program),
    cmocka_unit_test(another_program_clears),
    cmocka_unit_test(without_a_runtime_directory),
    cmocka_unit_test(the_tide_file_fails_for_good),
    cmocka_unit_test(the_tide_file_fails_at_the_first_change),
    cmocka_unit_test(switches_when_nothing_can_be_kept),
    cmocka_unit_test(everything_fails),
    cmocka_unit_test(the_image_cannot_be_synced),
};
UNIT_MAIN(tests)
