/* A client that keeps checkpoints, as libvirt does: a row of bitmaps, the oldest first, of which
 * only the newest records. It changes them by transactions, several actions at once.
 *
 *     row       [0]      [1]      [2]
 *     base      t0       t1       t2          the disk's content at that instant
 *     records   t0..t1   t1..t2   t2..now
 *
 * What must hold whenever nobody writes, and whenever the program has come back: where the disk is
 * not what it was at the base of [i], one of [i], [i+1] .. is set, or one says that it cannot be
 * trusted. Paused: the newest is disabled, too, and `now` is the instant of that.
 *
 * A transaction of which it was not told the end has happened or has not; it looks what there is,
 * and asks the generation. */
#include "history.h"

#include "dirty/dirty.h"
#include "job/transaction.h"

enum { CHECKPOINTS = 3 };

enum kind {
    NOTHING,
    START,
    CHECKPOINT,
    DELETE_BACK,
    DELETE_FORWARD,
    MOVE,
    DROP,
    CLEAR,
    PAUSE,
    RESUME,
    AGAIN
};
static const char *const kinds[] = {"nothing",        "start",  "checkpoint", "delete back",
                                    "delete forward", "move",   "drop",       "clear",
                                    "pause",          "resume", "again"};

struct checkpoint {
    char name[16];
    struct instant base;
    uint64_t generation;
    unsigned losses; /* since its base, as client.c */
};

struct actor {
    struct history *h;
    struct disk *d;
    unsigned number, next;
    uint32_t granularity;
    bool can_persist;
    struct checkpoint row[CHECKPOINTS];
    unsigned n;
    bool paused;
    struct instant end; /* when paused */
    bool bad;           /* something was said to be inconsistent */
    char told_bad[16];  /* that one; "": removed since, or being removed */
    struct {
        enum kind kind; /* under way, and its end was not told */
        unsigned at;
        char name[16]; /* of a new one */
        uint64_t from;
        struct instant instant;
        unsigned losses; /* since it was begun */
    } doing;
    enum left left;
    bool no_segments;
};

static void *start(struct history *h, struct disk *d)
{
    struct actor *a = xnew(struct actor);
    a->h = h;
    a->d = d;
    a->number = h->n_clients;
    a->granularity = 512u << dice_below(&h->more_dice, 6);
    return a;
}

/* ---- the row ---- */

static void take_out(struct actor *a, unsigned i)
{
    instant_fini(&a->row[i].base);
    memmove(&a->row[i], &a->row[i + 1], (CHECKPOINTS - 1 - i) * sizeof a->row[0]);
    a->row[CHECKPOINTS - 1] = (struct checkpoint){0};
    a->n--;
}

static void forget_all(struct actor *a)
{
    while (a->n)
        take_out(a, 0);
    instant_fini(&a->end);
    a->paused = a->bad = false;
}

static void finish(void *self)
{
    struct actor *a = self;
    forget_all(a);
    instant_fini(&a->doing.instant);
    free(a);
}

/* ---- what the program says ---- */

struct seen {
    bool exists, good, recording;
    uint64_t generation;
};

static struct seen look(struct actor *a, const char *name)
{
    struct seen s = {0};
    CLEANUP(json_putp) struct json_object *all = dirty_info(a->d->n);
    for (size_t i = 0; all && i < json_object_array_length(all); i++) {
        struct json_object *one = json_object_array_get_idx(all, i);
        if (strcmp(json_get_string(one, "name", ""), name))
            continue;
        s.exists = true;
        s.good = !json_get_bool(one, "inconsistent", false);
        s.recording = json_get_bool(one, "recording", false);
        s.generation = json_get_uint(one, "x-tidemark-generation", 0);
    }
    return s;
}

/* ---- judging ---- */

/* May the sector be as it was at the base? */
static bool may_be_same(const struct actor *a, const struct instant *base, uint64_t i, uint32_t now)
{
    if (!a->paused)
        return instant_has(base, i, now);
    for (unsigned k = 0; k < a->end.held[i].n; k++)
        if (instant_has(base, i, a->end.held[i].stamps[k]))
            return true;
    return false;
}

static void judge(struct actor *a, const char *when)
{
    struct disk *d = a->d;
    if (!a->n || a->bad || d->sync_failed)
        return;
    uint8_t *buf = malloc(d->size);
    assert(buf);
    int r = history_read_all(d->edge, d->size, buf);
    if (r < 0)
        violation(a->h, "%s cannot be read %s: %s", d->node, when, strerror(-r));
    uint64_t per_bit = a->granularity / MODEL_SECTOR;
    for (unsigned at = a->n; at-- > 0;) {
        const struct checkpoint *c = &a->row[at];
        uint64_t for_nothing = 0;
        bool set = false, touched = false;
        for (uint64_t i = 0; i < d->model.n; i++) {
            uint32_t stamp;
            if (i % per_bit == 0) {
                set = touched = false;
                for (unsigned k = at; k < a->n && !set; k++)
                    set =
                        bitmap_get(dirty_bits(dirty_find(d->n, a->row[k].name)), i * MODEL_SECTOR);
                for (uint64_t k = i; k < min_u64(i + per_bit, d->model.n); k++)
                    touched |= d->model.cells[k].last_active > c->base.from;
                if (set && !touched)
                    for_nothing += per_bit * MODEL_SECTOR;
            }
            memcpy(&stamp, buf + i * MODEL_SECTOR, sizeof stamp); /* judge_content: all are whole */
            if (!set && !may_be_same(a, &c->base, i, stamp))
                violation(
                    a->h,
                    "LOST: %s, %s: sector %llu holds %#x, at the base of '%s' it had %#x, and "
                    "no bitmap since is set",
                    d->node, when, (unsigned long long)i, stamp, c->name,
                    c->base.held[i].stamps[0]);
        }
        if (!a->h->m.n_faults && for_nothing > history_budget(d, a->granularity, c->losses))
            violation(a->h, "%s, %s: %llu bytes are dirty for nothing since '%s', after %u losses",
                      d->node, when, (unsigned long long)for_nothing, c->name, c->losses);
    }
    free(buf);
}

/* ---- transactions ---- */

static void add(struct json_object *list, struct actor *a, const char *what, const char *name)
{
    json_object_array_add(
        list, history_json("{'type':'block-dirty-bitmap-%s','data':{'node':'%s','name':'%s'}}",
                           what, a->d->node, name));
}

static void add_new(struct json_object *list, struct actor *a, const char *name)
{
    json_object_array_add(
        list, history_json("{'type':'block-dirty-bitmap-add','data':{'node':'%s','name':'%s',"
                           "'granularity':%u,'persistent':%s}}",
                           a->d->node, name, a->granularity, a->can_persist ? "true" : "false"));
}

static void add_merge(struct json_object *list, struct actor *a, unsigned from, unsigned to)
{
    json_object_array_add(
        list, history_json("{'type':'block-dirty-bitmap-merge','data':{'node':'%s','target':'%s',"
                           "'bitmaps':['%s']}}",
                           a->d->node, a->row[to].name, a->row[from].name));
}

/* All that have a name of ours go. */
static void add_removals(struct json_object *list, struct actor *a)
{
    char prefix[16];
    snprintf(prefix, sizeof prefix, "act%u-", a->number);
    for (struct dirty_bitmap *bm = dirty_first(a->d->n); bm; bm = dirty_next(bm))
        if (dirty_name(bm) && !strncmp(dirty_name(bm), prefix, strlen(prefix)))
            add(list, a, "remove", dirty_name(bm));
}

static enum kind draw_kind(struct actor *a, unsigned *at)
{
    struct dice *more = &a->h->more_dice;
    *at = a->n ? (unsigned)dice_below(more, a->n) : 0;
    if (!a->n || a->bad || one_in(more, 16))
        return START;
    unsigned last = a->n - 1;
    enum kind otherwise = a->paused ? RESUME : a->n < CHECKPOINTS ? CHECKPOINT : MOVE;
    switch (dice_below(more, 9)) {
    case 0:
        return *at > 0 ? DELETE_BACK : otherwise;
    case 1:
        return *at < last ? DELETE_FORWARD : otherwise;
    case 2:
    case 3:
        return a->paused ? RESUME : last ? MOVE : CLEAR;
    case 4:
        return last ? DROP : otherwise;
    case 5:
        return a->paused ? RESUME : PAUSE;
    case 6:
        return a->paused || last ? otherwise : AGAIN;
    default:
        return a->paused ? NOTHING : otherwise;
    }
}

static struct json_object *actions_of(struct actor *a)
{
    struct json_object *list = json_object_new_array();
    unsigned at = a->doing.at, last = a->n - 1;
    switch (a->doing.kind) {
    case NOTHING:
        break;
    case START:
        add_removals(list, a);
        add_new(list, a, a->doing.name);
        break;
    case CHECKPOINT:
        add(list, a, "disable", a->row[last].name);
        add_new(list, a, a->doing.name);
        break;
    case DELETE_BACK:
        add_merge(list, a, at, at - 1);
        if (at == last && !a->paused)
            add(list, a, "enable", a->row[at - 1].name);
        add(list, a, "remove", a->row[at].name);
        break;
    case DELETE_FORWARD:
        add_merge(list, a, at, at + 1);
        add(list, a, "remove", a->row[at].name);
        break;
    case MOVE:
        add_merge(list, a, last, last - 1);
        add(list, a, "clear", a->row[last].name);
        break;
    case DROP:
        add(list, a, "remove", a->row[0].name);
        break;
    case CLEAR:
        add(list, a, "clear", a->row[last].name);
        break;
    case PAUSE:
        add(list, a, "disable", a->row[last].name);
        break;
    case RESUME:
        for (unsigned i = 0; i < last; i++)
            add(list, a, "remove", a->row[i].name);
        add(list, a, "clear", a->row[last].name);
        add(list, a, "enable", a->row[last].name);
        break;
    case AGAIN:
        add(list, a, "remove", a->row[last].name);
        add_new(list, a, a->row[last].name);
        break;
    }
    return list;
}

/* ---- what has become of it ---- */

static void rebase(struct actor *a, unsigned i)
{
    instant_fini(&a->row[i].base);
    a->row[i].base = a->doing.instant;
    a->doing.instant = (struct instant){0};
    a->row[i].losses = a->doing.losses;
}

static void append(struct actor *a)
{
    a->n++;
    memcpy(a->row[a->n - 1].name, a->doing.name, sizeof a->doing.name);
    rebase(a, a->n - 1);
}

/* It has happened. */
static void follow(struct actor *a)
{
    HEAP_OF_THE_MACHINE();
    unsigned at = a->doing.at, last = a->n - 1;
    switch (a->doing.kind) {
    case NOTHING:
        break;
    case START:
        forget_all(a);
        append(a);
        break;
    case CHECKPOINT:
        append(a);
        break;
    case DELETE_FORWARD:
        instant_fini(&a->row[at + 1].base);
        a->row[at + 1].base = a->row[at].base;
        a->row[at].base = (struct instant){0};
        a->row[at + 1].losses = a->row[at].losses;
        take_out(a, at);
        break;
    case DELETE_BACK:
        take_out(a, at);
        break;
    case MOVE:
    case CLEAR:
    case AGAIN:
        rebase(a, last);
        break;
    case DROP:
        take_out(a, 0);
        break;
    case PAUSE:
        a->paused = true;
        a->end = a->doing.instant;
        a->doing.instant = (struct instant){0};
        break;
    case RESUME:
        a->paused = false;
        instant_fini(&a->end);
        rebase(a, last);
        while (a->n > 1)
            take_out(a, 0);
        break;
    }
}

static void done(struct actor *a)
{
    HEAP_OF_THE_MACHINE();
    instant_fini(&a->doing.instant);
    a->doing.kind = NOTHING;
    a->doing.losses = 0;
}

static void learn_generations(struct actor *a)
{
    for (unsigned i = 0; i < a->n; i++)
        a->row[i].generation = look(a, a->row[i].name).generation;
}

/* A qcow2 image that was closed well since has no generation, and a new one begins far away (before
 * the old one, if somebody has set the clock back): then nobody knows. */
static bool is_another(struct actor *a, uint64_t now, uint64_t before)
{
    a->bad |= a->d->qcow2 && (now < before || now > before + 16);
    return now != before;
}

/* Cut, and the program is back. */
static bool has_happened(struct actor *a)
{
    unsigned last = a->n - 1;
    switch (a->doing.kind) {
    case NOTHING:
        return false;
    case START:
    case CHECKPOINT:
        return look(a, a->doing.name).exists;
    case DELETE_BACK:
    case DELETE_FORWARD:
        return !look(a, a->row[a->doing.at].name).exists;
    case DROP:
        return !look(a, a->row[0].name).exists;
    case MOVE:
    case CLEAR:
    case AGAIN:
        return is_another(a, look(a, a->row[last].name).generation, a->row[last].generation);
    case PAUSE:
        return !look(a, a->row[last].name).recording;
    case RESUME:
        return look(a, a->row[last].name).recording;
    }
    return false;
}

static void act(struct actor *a, struct life *l)
{
    struct error err = ERROR_INIT;
    a->doing.kind = draw_kind(a, &a->doing.at);
    if (a->doing.kind == NOTHING)
        return;
    snprintf(a->doing.name, sizeof a->doing.name, "act%u-%u", a->number, ++a->next);
    CLEANUP(json_putp) struct json_object *list = actions_of(a);
    machine_note(&a->h->m, "client %u: %s", a->number, kinds[a->doing.kind]);
    if (a->doing.kind == START)
        a->told_bad[0] = '\0';
    a->doing.from = model_hold(&a->d->model);
    int r = transaction_run(l->g, l->js, list, NULL, &err);
    {
        HEAP_OF_THE_MACHINE();
        model_instant(&a->d->model, a->doing.from, &a->doing.instant);
    }
    machine_note(&a->h->m, "client %u: %s: %d", a->number, kinds[a->doing.kind], r);
    if (r < 0 && !history_may_refuse(a->h, r) && !(r == -EBUSY && history_in_doubt(a->d->n)))
        violation(a->h, "%s: %s", kinds[a->doing.kind], err.text);
    if (r == 0)
        follow(a);
    else
        a->bad = true;
    done(a);
    learn_generations(a);
}

static void run(void *self, struct life *l)
{
    struct actor *a = self;
    while (!l->stopping) {
        history_nap(l, 20000);
        if (l->stopping)
            return;
        /* A failed sync, or a tide file that cannot be had, makes them inconsistent. */
        for (unsigned i = 0; i < a->n; i++)
            a->bad |= !look(a, a->row[i].name).good;
        act(a, l);
    }
}

/* ---- the ends of lives ---- */

static void made(void *self, struct life *l)
{
    struct actor *a = self;
    struct error err = ERROR_INIT;
    struct json_object *one =
        history_json("{'node':'%s','name':'try','persistent':true}", a->d->node);
    a->can_persist =
        transaction_run_one(l->g, l->js, "block-dirty-bitmap-add", one, &err) == 0 &&
        transaction_run_one(l->g, l->js, "block-dirty-bitmap-remove",
                            history_json("{'node':'%s','name':'try'}", a->d->node), &err) == 0;
}

static void quiet(void *self, struct life *l)
{
    struct actor *a = self;
    for (unsigned i = 0; i < a->n; i++)
        a->bad |= !look(a, a->row[i].name).good;
    /* Else it has not looked yet what became of it, or since somebody else wrote. */
    if (a->doing.kind == NOTHING && !(a->d->blind && history_absent(l, a)))
        judge(a, "at rest");
}

static void absent(void *self, bool foreign)
{
    struct actor *a = self;
    a->bad |= foreign;
}

static void ended(void *self, enum life_end end, bool power, bool no_segments)
{
    struct actor *a = self;
    if (a->doing.kind != NOTHING && !a->doing.instant.held)
        model_instant(&a->d->model, a->doing.from, &a->doing.instant);
    if (power)
        a->left = LEFT_POWERLESS;
    else if (a->left == LEFT_CLEAN && end == END_KILLED)
        a->left = LEFT_KILLED;
    a->no_segments |= no_segments;
    unsigned loss = history_is_loss(a->h, end, power, no_segments);
    for (unsigned i = 0; i < a->n; i++)
        a->row[i].losses += loss;
    a->doing.losses += a->doing.kind != NOTHING ? loss : 0;
}

/* Those that were there must be there yet, but for what the transaction that was cut gives a new
 * base: that may have been cut between. */
static void judge_kept(struct actor *a)
{
    bool new_base = a->doing.kind == START || a->doing.kind == CHECKPOINT ||
                    a->doing.kind == RESUME || a->doing.kind == AGAIN;
    if (a->bad || !a->can_persist)
        return;
    for (unsigned i = 0; i < a->n; i++) {
        struct seen s = look(a, a->row[i].name);
        if (s.exists && s.good)
            continue;
        if (settings.strict && history_must_keep(a->d, a->left, a->no_segments) &&
            !(new_base && (i == a->n - 1 || a->doing.kind == START)))
            violation(a->h, "'%s' of %s is %s after %s", a->row[i].name, a->d->path,
                      s.exists ? "inconsistent" : "gone", history_left(a->left));
        a->bad = true;
        if (s.exists)
            memcpy(a->told_bad, a->row[i].name, sizeof a->told_bad);
    }
}

static void opened(void *self, struct life *l)
{
    struct actor *a = self;
    if (!a->can_persist && a->left != LEFT_CLEAN)
        a->bad = true;
    if (a->told_bad[0] && look(a, a->told_bad).good)
        violation(a->h, "'%s' of %s was inconsistent, and is good after %s", a->told_bad,
                  a->d->path, history_left(a->left));
    if (a->doing.kind != NOTHING && has_happened(a))
        follow(a);
    judge_kept(a);
    done(a);
    learn_generations(a);
    a->bad |= a->d->blind;
    a->left = LEFT_CLEAN;
    a->no_segments = false;
    judge(a, "at open");
}

const struct client_ops bitmap_client = {
    .name = "bitmaps",
    .start = start,
    .made = made,
    .opened = opened,
    .run = run,
    .quiet = quiet,
    .absent = absent,
    .ended = ended,
    .finish = finish,
};
