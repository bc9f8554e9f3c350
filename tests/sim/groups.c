/* A client of several disks, whose bitmaps it changes together: sim --groups.
 *
 * It has one bitmap of the same name on each of its disks and keeps one copy of each disk, a raw
 * file, which its backups bring up to date. It adds and removes the bitmaps, clears them, and backs
 * up, all disks in one transaction (or, completion-mode grouped, also at its end), in any order of
 * the disks; and it believes what it was told. A disk may be absent in a life, with its tide file,
 * or come later than the others (history.c). Whenever that can be asked:
 *
 *  - a change has been made to all disks or to none, and to all if its success was reported;
 *  - where a disk differs from what its bitmap counts from (the copy; or, after a clear, the disk
 * at that instant) the bitmap is set: a copy plus one increment is the disk, always;
 *  - in doubt, where one of these disks is missing, the same holds for either answer, and queries
 *    tell the doubt; when all disks are there nobody is in doubt, and no bitmap is busy. */
#include "history.h"

#include "dirty/dirty.h"
#include "job/transaction.h"
#include "persist/persist.h"
#include "rt/io.h"

#include <errno.h>
#include <stdarg.h>

/* What a bitmap counts from. */
enum base { BASE_NONE, BASE_COPY, BASE_INSTANT };

enum change { NOTHING, ADD, CLEAR, FULL, INCREMENT, REMOVE };
static const char *const changes[] = {"nothing",        "add and full backup", "clear",
                                      "clear and full", "increment",           "remove"};

struct side {
    struct disk *d;
    bool used;
    bool exists, good; /* when last looked at */
    uint64_t generation;
    enum base base;
    char copy[SIM_PATH];
    struct instant instant;
    /* of the change under way: */
    char job[24], node[24], next_copy[SIM_PATH];
    uint64_t from;
    struct instant next_instant;
    bool told, succeeded;
    bool unsure;      /* a sync of the disk failed in its life */
    bool unknown;     /* an image was closed well meanwhile, and has another generation ... */
    bool seen, moved; /* ... after a crash: what has become of it here ... */
    uint64_t found;   /* ... and its generation then: a clean close of an image forgets it */
};

struct groups {
    struct history *h;
    unsigned number, next;
    char bitmap[16];
    struct side sides[MAX_DISKS];
    /* the change under way, or cut: */
    enum change change;
    bool commanded; /* the command has succeeded */
    bool grouped, always, disturbed;
    bool power; /* has gone since */
    bool removed_in_doubt;
    bool seen_whole;  /* in this life, with all disks */
    bool removal_cut; /* before this change: a doubt may be of that one yet */
};

static struct side *side_from(struct groups *c, unsigned i)
{
    while (i < MAX_DISKS && !c->sides[i].used)
        i++;
    return i < MAX_DISKS ? &c->sides[i] : NULL;
}

static struct side *first_side(struct groups *c)
{
    return side_from(c, 0);
}

static struct side *next_side(struct groups *c, const struct side *s)
{
    return side_from(c, (unsigned)(s - c->sides) + 1);
}

static void *start(struct history *h, struct disk *d)
{
    struct groups *c = xnew(struct groups);
    unsigned leave = MAX_DISKS; /* of three disks two, or all */

    c->h = h;
    c->number = h->n_clients;
    snprintf(c->bitmap, sizeof c->bitmap, "group%u", c->number);
    if (h->n_disks > 2 && !one_in(&h->more_dice, 3))
        leave = (unsigned)dice_below(&h->more_dice, h->n_disks);
    for (unsigned i = 0; i < h->n_disks; i++) {
        c->sides[i].d = &h->disks[i];
        c->sides[i].used = i != leave;
    }
    return c;
}

static void finish(void *self)
{
    struct groups *c = self;
    for (unsigned i = 0; i < MAX_DISKS; i++) {
        instant_fini(&c->sides[i].instant);
        instant_fini(&c->sides[i].next_instant);
    }
    free(c);
}

static bool is_here(const struct side *s)
{
    return s->d->n && !s->d->coming;
}

static struct dirty_bitmap *bitmap_of(struct groups *c, struct side *s)
{
    return is_here(s) ? dirty_find(s->d->n, c->bitmap) : NULL;
}

static bool all_open(struct groups *c)
{
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        if (!is_here(s))
            return false;
    return true;
}

/* With I/O errors a bitmap may be lost, or a change be half made that nobody was told of. */
static bool anything_may_be(struct groups *c)
{
    return c->h->m.n_faults > 0;
}

/* ---- where a disk differs from a base ---- */

static bool differs(struct side *s, enum base base, const uint8_t *copy, uint64_t copy_bytes,
                    const struct instant *instant, const uint8_t *disk, uint64_t i)
{
    uint32_t stamp, had = 0;

    (void)!stamp_read(disk + i * MODEL_SECTOR, &stamp);
    if (base == BASE_INSTANT)
        return !instant_has(instant, i, stamp);
    if ((i + 1) * MODEL_SECTOR <= copy_bytes)
        (void)!stamp_read(copy + i * MODEL_SECTOR, &had);
    return stamp != had;
}

/* What the disk holds, as its guests would read it; NULL: it cannot be read, by a fault. */
static uint8_t *content_of(struct groups *c, struct side *s, uint64_t *size)
{
    if (!s->d->qcow2)
        return machine_dump(&c->h->m, s->d->path, size);
    *size = node_size(s->d->n);
    uint8_t *buf = xcalloc(1, *size),
            *disk = NULL; /* the life's: it may be killed while it reads */
    int r = history_read_all(s->d->edge, *size, buf);
    if (r < 0 && !anything_may_be(c))
        violation(c->h, "%s cannot be read", s->d->node);
    if (r == 0) {
        HEAP_OF_THE_MACHINE();
        disk = xcalloc(1, *size);
        memcpy(disk, buf, *size);
    }
    free(buf);
    return disk;
}

/* Nobody writes. A, or B, is set wherever the disk is not what BASE says. */
static void judge_bits(struct groups *c, struct side *s, const char *when, enum base base,
                       const struct instant *instant, struct bitmap *a, struct bitmap *b)
{
    uint64_t size = 0, copy_bytes = 0;

    if (base == BASE_NONE || s->d->sync_failed)
        return;
    uint8_t *disk = content_of(c, s, &size);
    uint8_t *copy = base == BASE_COPY ? machine_dump(&c->h->m, s->copy, &copy_bytes) : NULL;
    if (base == BASE_COPY && !copy)
        violation(c->h, "the copy %s is lost %s", s->copy, when);
    for (uint64_t i = 0; disk && i < s->d->model.n && (i + 1) * MODEL_SECTOR <= size; i++) {
        if (!differs(s, base, copy, copy_bytes, instant, disk, i) ||
            (a && bitmap_get(a, i * MODEL_SECTOR)) || (b && bitmap_get(b, i * MODEL_SECTOR)))
            continue;
        uint32_t stamp;
        char known[400];
        (void)!stamp_read(disk + i * MODEL_SECTOR, &stamp);
        model_describe(&s->d->model, i, known, sizeof known);
        violation(c->h,
                  "LOST: %s, %s: sector %llu holds %#x (known: %s), which is not what %s has, and "
                  "'%s' is clear",
                  s->d->node, when, (unsigned long long)i, stamp, known,
                  base == BASE_COPY ? s->copy : "what was cleared", c->bitmap);
    }
    HEAP_OF_THE_MACHINE();
    free(disk);
    free(copy);
}

static void judge_side(struct groups *c, struct side *s, const char *when)
{
    struct dirty_bitmap *bm = bitmap_of(c, s);
    struct dirty_state st;

    if (!bm || dirty_inconsistent(bm))
        return;
    dirty_get_state(bm, &st);
    judge_bits(c, s, when, s->base, &s->instant, st.current, st.successor);
    if (dirty_held(bm) && c->change == CLEAR && !c->removal_cut)
        judge_bits(c, s, when, BASE_INSTANT, &s->next_instant, NULL, st.successor);
}

/* ---- what has become of a change that was cut ---- */

static bool is_last_job(struct groups *c, struct side *s)
{
    struct dirty_state st;
    dirty_get_state(bitmap_of(c, s), &st);
    return st.job && !strcmp(st.job, s->job);
}

static void take_base(struct side *s, enum base base, const char *copy, struct instant *instant)
{
    HEAP_OF_THE_MACHINE();
    s->base = base;
    instant_fini(&s->instant);
    if (base == BASE_INSTANT) {
        s->instant = *instant;
        *instant = (struct instant){0};
    }
    if (base == BASE_COPY)
        memcpy(s->copy, copy, SIM_PATH);
}

/* The bitmap of this disk can be seen, and is in no doubt: has it moved? */
static void see(struct groups *c, struct side *s)
{
    struct dirty_bitmap *bm = bitmap_of(c, s);
    struct dirty_state st = {0};

    if (bm)
        dirty_get_state(bm, &st);
    s->seen = true;
    s->found = st.generation;
    /* far from the old one, and before it if somebody has set the clock back */
    const bool another =
        bm && s->d->qcow2 && (st.generation < s->generation || st.generation > s->generation + 16);
    /* the superblock that tells it may be the one that cannot be read */
    const bool unread = bm && dirty_inconsistent(bm) && c->h->spoiled;
    if (another || unread) {
        s->unknown = true;
        take_base(s, BASE_NONE, NULL, NULL);
        return;
    }
    switch (c->change) {
    case NOTHING:
        return;
    case ADD:
        s->moved = bm;
        break;
    case REMOVE:
        s->moved = !bm;
        break;
    default:
        s->moved = bm && st.generation != s->generation;
    }
    machine_note(&c->h->m, "%s: %s of %s has%s been made; generation %llu", s->d->node,
                 changes[c->change], c->bitmap, s->moved ? "" : " not",
                 (unsigned long long)st.generation);
    if (bm && c->change != ADD && s->moved && st.generation != s->generation + 1)
        violation(c->h, "%s: '%s' had generation %llu, and has %llu", s->d->node, c->bitmap,
                  (unsigned long long)s->generation, (unsigned long long)st.generation);
    if (c->change == INCREMENT && s->moved && !is_last_job(c, s))
        violation(c->h, "%s: '%s' has moved on by job '%s', not '%s'", s->d->node, c->bitmap,
                  st.job, s->job);
    if (s->unsure || s->d->sync_failed) /* what was read may have changed under everybody's hands */
        take_base(s, BASE_NONE, NULL, NULL);
    else if (s->moved && c->change == CLEAR)
        take_base(s, BASE_INSTANT, NULL, &s->next_instant);
    else if (s->moved && (c->change == ADD || c->change == FULL))
        take_base(s, s->told && s->succeeded ? BASE_COPY : BASE_NONE, s->next_copy, NULL);
    else if (s->moved && c->change == REMOVE)
        take_base(s, BASE_NONE, NULL, NULL);
}

/* Without a tide file, for which a full disk has no room, an image keeps its bitmaps until a clean
 * end, and no longer; a raw disk does not. */
static bool has_no_tide(struct groups *c, struct side *s)
{
    return c->h->m.n_full && (s->d->qcow2 || !bitmap_of(c, s));
}

/* All sides have been seen. */
static void judge_change(struct groups *c)
{
    bool one = false, all = true, each = c->change == INCREMENT && !c->grouped;
    uint64_t generation = 0;
    bool first = true;

    if (c->change == INCREMENT && c->always && c->disturbed)
        each = true; /* what members of a group that has failed have achieved is theirs alone */
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        if (s->unknown || has_no_tide(c, s))
            return;
        one |= s->moved;
        all &= s->moved;
        if (c->change == INCREMENT && s->told && s->succeeded && !s->moved && !anything_may_be(c))
            violation(c->h, "%s: the %s of '%s' was reported, and is not there", s->d->node,
                      changes[c->change], c->bitmap);
    }
    if (one && !all && !each && !anything_may_be(c)) {
        char text[200] = "";
        for (struct side *s = first_side(c); s; s = next_side(c, s))
            snprintf(text + strlen(text), sizeof text - strlen(text), " %s%s", s->d->node,
                     s->moved ? " has" : " has not");
        violation(c->h, "half a group: %s of '%s':%s", changes[c->change], c->bitmap, text);
    }
    if (c->change != INCREMENT && c->commanded && !all && !anything_may_be(c))
        violation(c->h, "the %s of '%s' was reported, and has not happened", changes[c->change],
                  c->bitmap);
    /* a new bitmap has its base when the disks are durable, which is the second group */
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        if (c->change != ADD || !s->moved || anything_may_be(c))
            continue;
        if (!first && s->found != generation)
            violation(c->h, "half a group: '%s' has its base on some of its disks", c->bitmap);
        generation = s->found;
        first = false;
    }
}

static void look_at_side(struct groups *c, struct side *s)
{
    struct dirty_bitmap *bm = bitmap_of(c, s);
    struct dirty_state st = {0};

    if (bm)
        dirty_get_state(bm, &st);
    s->exists = bm;
    s->generation = st.generation;
    s->good = bm && !dirty_inconsistent(bm);
    if (!s->good)
        s->base = BASE_NONE;
}

static void end_change(struct groups *c)
{
    HEAP_OF_THE_MACHINE();
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        instant_fini(&s->next_instant);
        s->told = s->succeeded = s->seen = s->moved = s->unknown = s->unsure = false;
        s->job[0] = '\0';
    }
    c->change = NOTHING;
    c->commanded = c->grouped = c->always = c->disturbed = c->power = false;
}

static bool tells_doubt(struct node *n, char coordinator[static SIM_PATH])
{
    CLEANUP(json_putp) struct json_object *info = persist_info(n);
    struct json_object *doubt = info ? json_get(info, "in-doubt") : NULL;
    if (!doubt || strlen(json_get_string(doubt, "group", "")) != 32)
        return false;
    snprintf(coordinator, SIM_PATH, "%s", json_get_string(doubt, "coordinator", ""));
    return coordinator[0];
}

/* The disk of this tide file, which may be one of another group with which the change was settled.
 */
static bool is_open(struct groups *c, const char *tide)
{
    for (unsigned i = 0; i < c->h->n_disks; i++) {
        const struct disk *d = &c->h->disks[i];
        size_t n = strlen(d->path);
        if (strncmp(tide, d->path, n) == 0 && strcmp(tide + n, ".tide") == 0)
            return d->n && !d->coming;
    }
    return false;
}

static void look(struct groups *c, const char *when)
{
    bool all = true;

    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        struct dirty_bitmap *bm = bitmap_of(c, s);
        if (!is_here(s)) {
            all = false;
            continue;
        }
        if (bm && dirty_held(bm)) {
            char knows[SIM_PATH];
            if (!tells_doubt(s->d->n, knows))
                violation(c->h, "%s: '%s' is in doubt, and no query says so", s->d->node,
                          c->bitmap);
            if (is_open(c, knows) && !anything_may_be(c) && !c->h->m.n_full)
                violation(c->h, "%s: '%s' is in doubt, and %s, which knows, is there", s->d->node,
                          c->bitmap, knows);
            c->h->doubts++;
            all = false;
            judge_side(c, s, when);
            continue;
        }
        if (!s->seen) {
            if (settings.strict && s->good && !c->power && !s->d->process && !c->h->clock_set &&
                c->change != ADD && !c->removed_in_doubt &&
                (bm ? dirty_inconsistent(bm) : c->change != REMOVE))
                violation(c->h, "%s: '%s' is %s after a kill", s->d->node, c->bitmap,
                          bm ? "inconsistent" : "gone");
            /* On a full disk a tide file may have to go, which the log says. What is inconsistent,
             * and an image has not, ends with the session. */
            if (s->exists && (s->good || !s->d->qcow2) && !bm && c->change != REMOVE &&
                !anything_may_be(c) && !c->removed_in_doubt && !c->h->m.n_full)
                violation(c->h, "%s: '%s' is gone", s->d->node, c->bitmap);
            see(c, s);
        }
        s->good &= bm && !dirty_inconsistent(bm);
        if (bm && dirty_busy(bm) && !anything_may_be(c)) /* an end that cannot be kept is none */
            violation(c->h, "%s: '%s' is busy, and no job runs", s->d->node, c->bitmap);
        judge_side(c, s, when);
    }
    if (!all)
        return;
    if (c->change != NOTHING && !c->removed_in_doubt)
        judge_change(c);
    c->removal_cut |= c->change == REMOVE;
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        look_at_side(c, s);
    end_change(c);
}

/* ---- changes ---- */

/* Often the machine dies during what comes now. */
static void maybe_die(struct groups *c, struct life *l, unsigned one)
{
    if (l->number <= c->h->lives && one_in(&c->h->dice, one))
        c->h->m.doomed = 1 + (unsigned)dice_below(&c->h->dice, 10);
}

static int make_copy(struct groups *c, struct life *l, struct side *s, const char *path, bool make,
                     struct node **ret, struct error *err)
{
    char json[300];
    int r = 0;

    if (make) {
        CLEANUP(json_putp)
        struct json_object *file = history_json("{'driver':'file','filename':'%s','size':%llu}",
                                                path, (unsigned long long)s->d->size);
        r = graph_create(l->g, file, err);
    }
    snprintf(json, sizeof json,
             "{'driver':'raw','node-name':'%s','x-tidemark-persist':{'level':'off'},"
             "'file':{'driver':'file','filename':'%s'}}",
             s->node, path);
    return r < 0 ? r : history_open(l, json, ret, err);
}

static void add_action(struct json_object *list, const char *type, const char *fmt, ...)
    PRINTF(3, 4);
static void add_action(struct json_object *list, const char *type, const char *fmt, ...)
{
    char data[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(data, sizeof data, fmt, ap);
    va_end(ap);
    json_object_array_add(list, history_json("{'type':'%s','data':%s}", type, data));
}

static void add_actions(struct groups *c, struct side *s, struct json_object *list)
{
    if (c->change == ADD)
        add_action(list, "block-dirty-bitmap-add",
                   "{'node':'%s','name':'%s','granularity':%u,'persistent':true}", s->d->node,
                   c->bitmap, 512u << dice_below(&c->h->dice, 4));
    if (c->change == CLEAR || c->change == FULL)
        add_action(list, "block-dirty-bitmap-clear", "{'node':'%s','name':'%s'}", s->d->node,
                   c->bitmap);
    if (c->change == REMOVE)
        add_action(list, "block-dirty-bitmap-remove", "{'node':'%s','name':'%s'}", s->d->node,
                   c->bitmap);
    if (c->change == ADD || c->change == FULL)
        add_action(list, "blockdev-backup",
                   "{'job-id':'%s','device':'%s','target':'%s','sync':'full'}", s->job, s->d->node,
                   s->node);
    if (c->change == INCREMENT)
        add_action(list, "blockdev-backup",
                   "{'job-id':'%s','device':'%s','target':'%s','sync':'bitmap','bitmap':'%s',"
                   "'bitmap-mode':'%s'}",
                   s->job, s->d->node, s->node, c->bitmap, c->always ? "always" : "on-success");
}

/* Any of the disks may be the first. */
static size_t in_any_order(struct groups *c, struct side **row)
{
    size_t n = 0;
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        row[n++] = s;
    for (size_t i = n; i > 1; i--) {
        size_t k = dice_below(&c->h->dice, i);
        struct side *other = row[k];
        row[k] = row[i - 1];
        row[i - 1] = other;
    }
    return n;
}

static void await_jobs(struct groups *c, struct life *l)
{
    struct error err = ERROR_INIT;
    bool cancel = one_in(&c->h->dice, 8), some = true;
    uint64_t patience = clock_after_ns(600 * NSEC_PER_SEC);

    for (unsigned i = 0; some; i++) {
        some = false;
        for (struct side *s = first_side(c); s; s = next_side(c, s)) {
            if (!history_job_lives(l, s->job))
                continue;
            some = true;
            if (!cancel || !one_in(&c->h->dice, 4))
                continue;
            c->disturbed = true;
            cancel = false;
            (void)!jobs_do(l->js, s->job, JOB_VERB_CANCEL, &err);
        }
        if (i == 2)
            maybe_die(c, l, 4);
        history_nap(l, 300 << min_u64(i, 8));
        if (clock_now_ns() > patience)
            violation(c->h, "jobs of '%s' do not end", c->bitmap);
    }
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        if (!s->told)
            violation(c->h, "the job %s has gone without a word", s->job);
}

static void event(void *self, struct life *l, const char *name, struct json_object *data)
{
    struct groups *c = self;

    if (strcmp(name, "BLOCK_JOB_COMPLETED") && strcmp(name, "BLOCK_JOB_CANCELLED"))
        return;
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        if (!s->job[0] || strcmp(json_get_string(data, "device", ""), s->job))
            continue;
        s->told = true;
        s->succeeded = !strcmp(name, "BLOCK_JOB_COMPLETED") && !json_has(data, "error");
        c->disturbed |= !s->succeeded;
    }
}

static bool somebody_doubts(struct groups *c)
{
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        if (history_in_doubt(s->d->n))
            return true;
    return false;
}

static bool has_jobs(enum change what)
{
    return what == ADD || what == FULL || what == INCREMENT;
}

static void change_now(struct groups *c, struct life *l, enum change what)
{
    struct node *targets[MAX_DISKS] = {NULL};
    struct side *row[MAX_DISKS];
    struct error err = ERROR_INIT;
    const bool copies = has_jobs(what);
    int r = 0;

    size_t n = in_any_order(c, row);
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        s->seen = s->moved = s->told = s->succeeded = s->unsure = false;
        snprintf(s->job, sizeof s->job, "job%u-%u-%u", c->number, ++c->next, s->d->number);
        snprintf(s->node, sizeof s->node, "copy%u-%u-%u", c->number, c->next, s->d->number);
        if (what == INCREMENT)
            memcpy(s->next_copy, s->copy, SIM_PATH);
        else
            snprintf(s->next_copy, SIM_PATH, "/d/copy%u-%u-%u", c->number, c->next, s->d->number);
    }
    c->always = what == INCREMENT && one_in(&c->h->dice, 2);
    c->grouped = what == INCREMENT && !one_in(&c->h->dice, 4);
    for (size_t i = 0; r == 0 && copies && i < n; i++)
        r = make_copy(c, l, row[i], row[i]->next_copy, what != INCREMENT, &targets[i], &err);
    if (r == 0) {
        CLEANUP(json_putp) struct json_object *list = json_object_new_array();
        CLEANUP(json_putp)
        struct json_object *together = history_json("{'completion-mode':'grouped'}");
        c->change = what;
        for (size_t i = 0; i < n; i++)
            add_actions(c, row[i], list);
        for (struct side *s = first_side(c); s; s = next_side(c, s))
            s->from = model_hold(&s->d->model);
        maybe_die(c, l, 4);
        machine_note(&c->h->m, "%s of %s", changes[what], c->bitmap);
        r = transaction_run(l->g, l->js, list, c->grouped ? together : NULL, &err);
        machine_note(&c->h->m, "%s of %s: %d", changes[what], c->bitmap, r);
        HEAP_OF_THE_MACHINE();
        for (struct side *s = first_side(c); s; s = next_side(c, s))
            model_instant(&s->d->model, s->from, &s->next_instant);
    }
    c->commanded = r == 0;
    c->removal_cut &= r < 0;
    if (r < 0 && !history_may_refuse(c->h, r) && !(r == -EBUSY && somebody_doubts(c)))
        violation(c->h, "%s of '%s': %s", changes[what], c->bitmap, err.text);
    if (r == 0 && copies)
        await_jobs(c, l);
    for (size_t i = 0; i < n; i++)
        if (targets[i])
            node_unref(targets[i]);
    c->h->groups += r == 0;
    if (c->change == NOTHING)
        return;
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        see(c, s);
        if (r < 0 && s->moved && !anything_may_be(c))
            violation(c->h, "%s: the %s of '%s' failed, and has happened", s->d->node,
                      changes[what], c->bitmap);
    }
    judge_change(c);
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        look_at_side(c, s);
    end_change(c);
}

static void change(struct groups *c, struct life *l, enum change what)
{
    struct side *s;
    bool begun = true;

    if (!has_jobs(what)) {
        change_now(c, l, what);
        return;
    }
    for (s = first_side(c); s && begun; s = begun ? next_side(c, s) : s)
        begun = history_job_begins(s->d, false);
    if (begun)
        change_now(c, l, what);
    for (struct side *done = first_side(c); done != s; done = next_side(c, done))
        history_job_over(done->d);
}

/* Who cannot wait for a disk that may never come back removes what is in doubt. */
static void remove_in_doubt(struct groups *c, struct life *l)
{
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        struct dirty_bitmap *bm = bitmap_of(c, s);
        struct error err = ERROR_INIT;
        if (!bm || !dirty_held(bm))
            continue;
        c->removed_in_doubt = true;
        int r = transaction_run_one(
            l->g, l->js, "block-dirty-bitmap-remove",
            history_json("{'node':'%s','name':'%s'}", s->d->node, c->bitmap), &err);
        bm = bitmap_of(c, s); /* the answer may have come meanwhile */
        if (r < 0 && bm && dirty_held(bm) && !history_may_refuse(c->h, r))
            violation(c->h, "'%s', in doubt, cannot be removed: %s", c->bitmap, err.text);
    }
}

/* They are not all there, or not all good: the rest goes. */
static void remove_rest(struct groups *c, struct life *l)
{
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        struct error err = ERROR_INIT;
        if (!bitmap_of(c, s))
            continue;
        s->exists = s->good = false;
        s->base = BASE_NONE;
        int r = transaction_run_one(
            l->g, l->js, "block-dirty-bitmap-remove",
            history_json("{'node':'%s','name':'%s'}", s->d->node, c->bitmap), &err);
        if (r < 0 && !history_may_refuse(c->h, r))
            violation(c->h, "'%s' cannot be removed: %s", c->bitmap, err.text);
    }
    for (struct side *s = first_side(c); s; s = next_side(c, s))
        look_at_side(c, s);
}

static void act(struct groups *c, struct life *l)
{
    bool some = false, all = true, copies = true;

    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        struct dirty_bitmap *bm = bitmap_of(c, s);
        some |= bm != NULL;
        all &= bm && !dirty_inconsistent(bm);
        copies &= s->base == BASE_COPY;
    }
    if (some && (!all || c->removed_in_doubt)) {
        remove_rest(c, l);
        return;
    }
    c->removed_in_doubt = false;
    if (!all)
        change(c, l, ADD);
    else if (one_in(&c->h->dice, 16))
        change(c, l, REMOVE);
    else if (one_in(&c->h->dice, 2))
        change(c, l, CLEAR);
    else
        change(c, l, copies ? INCREMENT : FULL);
}

static void run(void *self, struct life *l)
{
    struct groups *c = self;

    while (!l->stopping) {
        history_nap(l, 5000);
        if (l->stopping)
            return;
        history_open_late(l);
        /* Whoever has opened it: what was lost while a disk was away is seen before anything new.
         */
        if (all_open(c) && !c->seen_whole) {
            c->seen_whole = true;
            look(c, "when the last disk has come");
        }
        if (all_open(c) && c->change == NOTHING)
            act(c, l);
        else if (one_in(&c->h->dice, 64))
            remove_in_doubt(c, l);
        else if (all_open(c))
            look(c, "when a disk has come");
    }
}

/* ---- the ends of lives ---- */

static void opened(void *self, struct life *l)
{
    struct groups *c = self;
    look(c, "at open");
}

static void quiet(void *self, struct life *l)
{
    struct groups *c = self;
    look(c, "at rest");
}

static void ended(void *self, enum life_end end, bool power, bool no_segments)
{
    struct groups *c = self;

    c->power |= power;
    c->seen_whole = false;
    for (struct side *s = first_side(c); s; s = next_side(c, s)) {
        s->seen &= c->change != NOTHING; /* else it is to be looked at anew */
        s->unsure |= c->change != NOTHING && s->d->sync_failed;
        if (c->change != NOTHING && !s->next_instant.held) /* cut inside the command */
            model_instant(&s->d->model, s->from, &s->next_instant);
    }
}

const struct client_ops groups_client = {
    .name = "groups",
    .start = start,
    .opened = opened,
    .run = run,
    .quiet = quiet,
    .event = event,
    .ended = ended,
    .finish = finish,
};
