/* A client of a disk: keeps its backups, and believes what it was told.
 *
 * It has a bitmap (persistent where the disk can have such), and what it has kept: the content that
 * its chain of backups, restored, would give. After each backup that succeeded, the chain with this
 * one on top must be the disk at the instant of its start. Whenever nobody writes, and
 * whenever the program has come back, where the disk differs from what is kept the bitmap must be
 * set, or say that it cannot be trusted; and after a clean close, it must not be set where nobody
 * wrote. A backup that was reported is still there when the power has gone.
 *
 * Some increments are made by a mirror from the bitmap: it is asked to end when it is ready,
 * without a pivot, and its instant is somewhere between that and its end.
 *
 * A bitmap that is inconsistent is removed, or made anew by comparing the disk with what is kept;
 * now and then one that is good is, too. */
#include "history.h"

#include "dirty/dirty.h"
#include "job/mirror.h"
#include "job/transaction.h"
#include "persist/persist.h"
#include "rt/io.h"

#include <errno.h>

struct backup {
    bool running; /* a job has it: what becomes of it is not known */
    bool told;    /* ... but it has been reported: */
    bool succeeded;
    bool full, keeps; /* keeps: success moves the bitmap's base */
    bool always;      /* what a failed one has achieved counts */
    bool clears, cut; /* the bitmap, in the same command; which has not been answered */
    bool mirror;
    bool compares; /* no backup: the bitmap is made anew, with what is kept for a base */
    bool holds;    /* its instant may have come */
    bool unsure;   /* a sync of the disk failed in its life */
    char job[24], node[24], path[SIM_PATH];
    uint64_t generation; /* of the bitmap, before it */
    uint64_t from; /* of the instant; that itself is known when the command has returned, or the
                    * mirror has ended */
    struct instant instant;
    unsigned losses; /* since it was begun, as the client's */
};

struct client {
    struct history *h;
    struct disk *d;
    char bitmap[256];
    unsigned number;
    bool can_persist; /* the disk takes persistent bitmaps */
    bool has_chain;   /* kept is the base of the bitmap */
    uint32_t *kept;
    uint64_t base_from; /* what was written before is not to be dirty */
    bool in_chunks;     /* what remained of a failed job in mode always is: 64 KiB */
    unsigned losses;    /* of power, and kills that left no segments, that it came through */
    bool told_bad;      /* it was said to be inconsistent, and has not been removed */
    bool no_segments;
    struct backup backup;
    /* the last one that was reported: */
    char last_path[SIM_PATH];
    uint32_t *last;
    bool *last_has;
    unsigned next;
    bool clean;      /* the program was closed well */
    bool had_bitmap; /* at the close, and good */
    bool expects;    /* had a good persistent one when last looked at */
    enum left left;
};

static void *start(struct history *h, struct disk *d)
{
    struct client *c = xnew(struct client);
    c->h = h;
    c->d = d;
    c->kept = xcalloc(d->model.n, sizeof *c->kept);
    c->last = xcalloc(d->model.n, sizeof *c->last);
    c->last_has = xcalloc(d->model.n, sizeof *c->last_has);
    c->number = h->n_clients;
    /* A superblock of more than one sector, which can be torn. */
    snprintf(c->bitmap, sizeof c->bitmap,
             settings.persist && c->number % 2 == 0 ? "bm%u-%0200u" : "bm%u", c->number, 0u);
    return c;
}

static void finish(void *self)
{
    struct client *c = self;
    instant_fini(&c->backup.instant);
    free(c->kept);
    free(c->last);
    free(c->last_has);
    free(c);
}

static struct dirty_bitmap *bitmap(struct client *c)
{
    return dirty_find(c->d->n, c->bitmap);
}

/* ---- judging ---- */

/* Nobody writes. Where the disk is not what was kept, the bitmap must be set. */
static void judge_bitmap(struct client *c, const char *when, bool exact)
{
    struct dirty_bitmap *bm = bitmap(c);
    if (!c->has_chain || !bm || dirty_inconsistent(bm) || c->d->sync_failed)
        return;
    uint8_t *buf = malloc(c->d->size);
    uint64_t for_nothing = 0, budget = 0;
    struct dirty_state st;
    const uint64_t outwards = max_u64(dirty_granularity(bm), c->in_chunks ? 64 * KiB : 0);
    assert(buf);
    dirty_get_state(bm, &st);
    int r = history_read_all(c->d->edge, c->d->size, buf);
    if (r < 0)
        violation(c->h, "%s cannot be read %s: %s", c->d->node, when, strerror(-r));
    if (!exact && c->losses && !c->h->m.n_faults)
        budget = history_budget(c->d, outwards, c->losses);
    exact = exact && !c->h->spoiled;
    for (uint64_t i = 0; i < c->d->model.n; i++) {
        uint32_t stamp;
        (void)!stamp_read(buf + i * MODEL_SECTOR, &stamp);
        bool set = bitmap_get(dirty_bits(bm), i * MODEL_SECTOR);
        /* So it stays if its job's end cannot be made durable. */
        if (dirty_busy(bm) && st.successor)
            set |= bitmap_get(st.successor, i * MODEL_SECTOR);
        if (stamp != c->kept[i] && !set)
            violation(c->h,
                      "LOST: %s, %s: sector %llu holds %#x, the chain has %#x, and '%s' is clear",
                      c->d->node, when, (unsigned long long)i, stamp, c->kept[i], c->bitmap);
        if ((!exact && !budget) || !set)
            continue;
        uint64_t region = outwards / MODEL_SECTOR;
        uint64_t first = align_down(i, region);
        bool touched = false;
        for (uint64_t k = first; k < min_u64(first + region, c->d->model.n); k++)
            touched |= c->d->model.cells[k].last_active > c->base_from;
        for_nothing += touched ? 0 : MODEL_SECTOR;
        if (for_nothing > budget)
            violation(c->h,
                      "%s, %s: '%s' is set at sector %llu, where nobody wrote; %llu bytes for "
                      "nothing, after %u losses",
                      c->d->node, when, c->bitmap, (unsigned long long)i,
                      (unsigned long long)for_nothing, c->losses);
    }
    free(buf);
}

/* ---- targets ---- */

static int make_target(struct client *c, struct life *l, struct node **ret, struct error *err)
{
    struct backup *b = &c->backup;
    CLEANUP(json_putp)
    struct json_object *file = history_json("{'driver':'file','filename':'%s','size':0}", b->path);
    CLEANUP(json_putp)
    struct json_object *image =
        history_json("{'driver':'qcow2','file':{'driver':'file','filename':'%s'},'size':%llu,"
                     "'cluster-size':%d}",
                     b->path, (unsigned long long)c->d->size, one_in(&c->h->dice, 2) ? 4096 : 512);
    char json[300];
    snprintf(json, sizeof json,
             "{'driver':'qcow2','node-name':'%s','file':{'driver':'file','filename':'%s'}}",
             b->node, b->path);
    int r = graph_create(l->g, file, err);
    if (r == 0)
        r = graph_create(l->g, image, err);
    return r < 0 ? r : history_open(l, json, ret, err);
}

/* What a target has: the sectors, and which of them it has at all. */
static int read_target(struct client *c, struct node *n, uint32_t *stamps, bool *has)
{
    struct error err = ERROR_INIT;
    struct user u = {&history_user_ops};
    struct edge *e;
    uint8_t *buf = malloc(c->d->size);
    assert(buf);
    int r = edge_attach_user(&u, n, "judge", PERM_CONSISTENT_READ, PERM_ALL, &e, &err);
    if (r < 0)
        return r;
    r = history_read_all(e, c->d->size, buf);
    for (uint64_t at = 0; r >= 0 && at < c->d->size;) {
        uint64_t length = 0;
        r = edge_allocated_above(e, NULL, false, range_make(at, c->d->size - at), &length);
        for (uint64_t i = at / MODEL_SECTOR; r >= 0 && i * MODEL_SECTOR < at + length; i++)
            has[i] = r > 0;
        at += length;
    }
    for (uint64_t i = 0; r >= 0 && i < c->d->model.n; i++)
        if (!stamp_read(buf + i * MODEL_SECTOR, &stamps[i]))
            violation(c->h, "%s: sector %llu of a backup is torn", c->d->node,
                      (unsigned long long)i);
    edge_detach(e);
    free(buf);
    return r < 0 ? r : 0;
}

static int open_target(struct client *c, struct life *l, const char *path, struct node **ret)
{
    struct error err = ERROR_INIT;
    char json[300];
    snprintf(json, sizeof json,
             "{'driver':'qcow2','node-name':'judged%u','read-only':true,"
             "'file':{'driver':'file','filename':'%s'}}",
             c->number, path);
    return history_open(l, json, ret, &err);
}

static uint64_t generation(struct client *c);

/* The chain with B on top is the disk at its instant? And it becomes the chain, if B keeps. */
static void take_in(struct client *c, struct node *target)
{
    struct backup *b = &c->backup;
    CLEANUP(memory_freep) uint32_t *stamps = xcalloc(c->d->model.n, sizeof *stamps);
    CLEANUP(memory_freep) bool *has = xcalloc(c->d->model.n, sizeof *has);
    int r = read_target(c, target, stamps, has);
    if (r < 0 && c->h->with_faults) {
        c->has_chain = c->has_chain && !b->keeps; /* its own reading failed: it is no use to it */
        return;
    }
    if (r < 0)
        violation(c->h, "the backup of %s cannot be read: %s", c->d->node, strerror(-r));
    memcpy(c->last, stamps, c->d->model.n * sizeof *stamps);
    memcpy(c->last_has, has, c->d->model.n * sizeof *has);
    snprintf(c->last_path, sizeof c->last_path, "%s", b->succeeded ? b->path : "");
    for (uint64_t i = 0; i < c->d->model.n; i++) {
        uint32_t stamp = b->full || has[i] ? stamps[i] : c->kept[i];
        if (b->succeeded && (b->full || c->has_chain) && !instant_has(&b->instant, i, stamp))
            violation(
                c->h,
                "%s, %s: the restored chain has %#x in sector %llu (of the %s), which is not what "
                "the disk had at the instant of the backup (%#x)",
                c->d->node, b->job, stamp, (unsigned long long)i,
                b->full || has[i] ? "backup" : "base",
                b->instant.held[i].n ? b->instant.held[i].stamps[0] : 0);
        if (b->keeps)
            c->kept[i] = stamp;
    }
    /* A job can succeed before its command is answered: the disk is still being flushed for the
     * clear, and a cut there leaves the bitmap with the bits that it had, and its generation. */
    const bool was_cleared = !b->clears || !b->cut || generation(c) != b->generation;
    if (b->keeps && b->succeeded && was_cleared) {
        c->base_from = b->instant.from;
        c->in_chunks = false;
        c->losses = b->losses;
    } else if (b->keeps && b->succeeded) {
        c->in_chunks |= !c->has_chain; /* of a failed job that it has not kept */
    }
    c->has_chain |= b->keeps && b->succeeded;
}

/* ---- jobs ---- */

static void event(void *self, struct life *l, const char *name, struct json_object *data)
{
    struct client *c = self;
    struct backup *b = &c->backup;
    if (!b->running || strcmp(json_get_string(data, "device", ""), b->job))
        return;
    if (!strcmp(name, "BLOCK_JOB_COMPLETED") || !strcmp(name, "BLOCK_JOB_CANCELLED")) {
        b->told = true;
        b->succeeded = !strcmp(name, "BLOCK_JOB_COMPLETED") && !json_has(data, "error");
    }
}

static void end_backup(struct client *c)
{
    HEAP_OF_THE_MACHINE();
    instant_fini(&c->backup.instant);
    c->backup = (struct backup){0};
}

/* What is known of its end is believed; N: the target's node, or NULL. */
static void conclude(struct client *c, struct node *n)
{
    struct backup *b = &c->backup;
    struct inode *file = store_find(&c->h->m.store, b->path);
    if ((b->unsure || c->d->sync_failed) && (b->succeeded || b->always)) {
        /* What was read from it may have changed under everybody's hands: no use to anybody. */
        c->has_chain = c->has_chain && !b->keeps;
        end_backup(c);
        return;
    }
    /* What a failed job has achieved counts, but for a target that could not be flushed: it may
     * have lost what it seems to have, also beside what was to be copied (it copies in chunks). */
    if (b->succeeded || (b->always && !b->full && file && !file->syncs_failed)) {
        take_in(c, n);
    } else if (b->full && b->keeps) {
        c->has_chain = false; /* the bitmap was cleared for it */
    }
    c->in_chunks |= b->always && !b->full && !b->succeeded;
    end_backup(c);
}

static struct json_object *actions(struct client *c, const char *bitmap_action, const char *sync,
                                   const char *mode)
{
    struct backup *b = &c->backup;
    struct json_object *list = json_object_new_array();
    struct disk *d = c->d;
    if (!strcmp(bitmap_action, "add"))
        json_object_array_add(
            list, history_json("{'type':'block-dirty-bitmap-add','data':{'node':'%s','name':'%s',"
                               "'granularity':%u,'persistent':%s}}",
                               d->node, c->bitmap, 512u << dice_below(&c->h->dice, 8),
                               c->can_persist ? "true" : "false"));
    if (!strcmp(bitmap_action, "clear"))
        json_object_array_add(list,
                              history_json("{'type':'block-dirty-bitmap-clear','data':{'node':'%s',"
                                           "'name':'%s'}}",
                                           d->node, c->bitmap));
    /* Slow ones, during which much happens. */
    uint64_t speed = 0;
    if (settings.persist && one_in(&c->h->more_dice, 3))
        speed = (1 + dice_below(&c->h->more_dice, 16)) * 128 * KiB;
    char more[400] = "";
    if (!b->full)
        snprintf(more, sizeof more, ",'bitmap':'%s','bitmap-mode':'%s'", c->bitmap, mode);
    json_object_array_add(
        list, history_json("{'type':'blockdev-backup','data':{'job-id':'%s','device':'%s',"
                           "'target':'%s','sync':'%s','speed':%llu%s}}",
                           b->job, d->node, b->node, sync, (unsigned long long)speed, more));
    return list;
}

static void hold(struct client *c)
{
    c->backup.from = model_hold(&c->d->model);
    c->backup.holds = true;
}

static void take_instant(struct client *c)
{
    HEAP_OF_THE_MACHINE();
    model_instant(&c->d->model, c->backup.from, &c->backup.instant);
}

static void end_mirror(struct client *c, struct life *l)
{
    struct error err = ERROR_INIT;

    hold(c);
    if (jobs_do_block(l->js, c->backup.job, JOB_VERB_CANCEL, false, &err) < 0)
        violation(c->h, "the mirror %s is ready, and cannot be ended: %s", c->backup.job, err.text);
}

static void await_job(struct client *c, struct life *l)
{
    struct backup *b = &c->backup;
    struct error err = ERROR_INIT;
    bool cancel = one_in(&c->h->dice, settings.persist ? 3 : 6);
    uint64_t patience = clock_after_ns(600 * NSEC_PER_SEC);
    for (unsigned i = 0; history_job_lives(l, b->job); i++) {
        if (cancel && one_in(&c->h->dice, 4)) {
            (void)!jobs_do(l->js, b->job, JOB_VERB_CANCEL, &err);
            cancel = false;
        }
        if (b->mirror && !b->holds && history_job_ready(l, b->job) && one_in(&c->h->more_dice, 2))
            end_mirror(c, l);
        history_nap(l, 500 << min_u64(i, 8));
        if (clock_now_ns() > patience)
            violation(c->h, "the job %s does not end", b->job);
    }
    if (!b->told)
        violation(c->h, "the job %s has gone without a word", b->job);
    if (b->mirror && b->holds)
        take_instant(c);
    if (!b->succeeded && !c->h->with_faults && !l->faults.write)
        machine_note(&c->h->m, "%s was cancelled", b->job);
}

static int start_backup(struct client *c, struct life *l, const char *bitmap_action,
                        const char *mode, struct error *err)
{
    struct backup *b = &c->backup;
    CLEANUP(json_putp)
    struct json_object *list = actions(c, bitmap_action, b->full ? "full" : "bitmap", mode);

    hold(c);
    b->running = true;
    int r = transaction_run(l->g, l->js, list, NULL, err);
    take_instant(c);
    return r;
}

static int start_mirror(struct client *c, struct life *l, const char *mode, struct error *err)
{
    struct backup *b = &c->backup;
    struct dice *dice = &c->h->more_dice;
    uint64_t speed = one_in(dice, 3) ? (1 + dice_below(dice, 16)) * 128 * KiB : 0;
    CLEANUP(json_putp)
    struct json_object *args =
        history_json("{'job-id':'%s','device':'%s','target':'%s','sync':'bitmap','bitmap':'%s',"
                     "'bitmap-mode':'%s','speed':%llu,'copy-mode':'%s'}",
                     b->job, c->d->node, b->node, c->bitmap, mode, (unsigned long long)speed,
                     one_in(dice, 2) ? "background" : "write-blocking");

    machine_note(&c->h->m, "%s: a mirror, %s", b->job, mode);
    b->running = true;
    return mirror_blockdev(l->js, args, err);
}

static void back_up(struct client *c, struct life *l, const char *bitmap_action)
{
    static const char *const modes[] = {"on-success", "always", "never"};
    struct error err = ERROR_INIT;
    struct backup *b = &c->backup;
    const char *mode = modes[dice_below(&c->h->dice, ARRAY_SIZE(modes))];
    if (settings.persist && one_in(&c->h->more_dice, 3))
        mode = "always";
    struct node *target = NULL;
    const bool mirror = !*bitmap_action && one_in(&c->h->more_dice, 4);

    if (!history_job_begins(c->d, mirror))
        return;
    *b = (struct backup){.full = *bitmap_action, .always = !strcmp(mode, "always")};
    b->keeps = b->full || strcmp(mode, "never");
    b->clears = !strcmp(bitmap_action, "clear");
    b->mirror = mirror;
    snprintf(b->job, sizeof b->job, "job%u-%u", c->number, ++c->next);
    snprintf(b->node, sizeof b->node, "target%u-%u", c->number, c->next);
    snprintf(b->path, sizeof b->path, "/d/backup%u-%u", c->number, c->next);
    int r = make_target(c, l, &target, &err);
    if (r == 0) {
        b->generation = generation(c);
        r = b->mirror ? start_mirror(c, l, mode, &err)
                      : start_backup(c, l, bitmap_action, mode, &err);
    }
    if (r < 0) {
        if (!history_may_refuse(c->h, r) && !(r == -EBUSY && history_in_doubt(c->d->n)))
            violation(c->h, "no backup can be started: %s", err.text);
        end_backup(c);
    } else {
        if (b->full)
            c->has_chain = false; /* until it has succeeded */
        c->h->jobs++;
        await_job(c, l);
        conclude(c, target);
    }
    if (target)
        node_unref(target);
    history_job_over(c->d);
}

/* ---- a bitmap that is made anew ---- */

/* What is kept, as somebody restores it: PATH is of no use after the job. */
static void restore_kept(struct client *c, const char *path)
{
    HEAP_OF_THE_MACHINE();
    struct inode *file;
    uint8_t *buf = malloc(c->d->size);

    assert(buf);
    for (uint64_t i = 0; i < c->d->model.n; i++)
        stamp_fill(buf + i * MODEL_SECTOR, c->kept[i]);
    if (store_create(&c->h->m.store, path, true, &file) < 0)
        violation(c->h, "%s is there already", path);
    /* It is on some other disk, which is not full. */
    c->h->m.store.free_blocks += INT32_MAX / 2;
    int64_t n = inode_write(file, buf, c->d->size, 0, false, NULL);
    c->h->m.store.free_blocks -= INT32_MAX / 2;
    assert(n == (int64_t)c->d->size);
    free(buf);
}

/* It failed: what is kept is as much its base as before. */
static void conclude_compare(struct client *c, bool succeeded)
{
    if (succeeded) {
        c->has_chain = !c->backup.unsure && !c->d->sync_failed;
        c->base_from = 0; /* what differs has been written at some time */
        c->told_bad = false;
    }
    end_backup(c);
}

static void compare(struct client *c, struct life *l)
{
    struct error err = ERROR_INIT;
    struct backup *b = &c->backup;
    struct node *base = NULL;
    char json[400];

    if (!history_job_begins(c->d, true))
        return;
    *b = (struct backup){.compares = true, .keeps = true};
    snprintf(b->job, sizeof b->job, "job%u-%u", c->number, ++c->next);
    snprintf(b->path, sizeof b->path, "/d/base%u-%u", c->number, c->next);
    restore_kept(c, b->path);
    snprintf(json, sizeof json,
             "{'driver':'raw','node-name':'base%u-%u','read-only':true,"
             "'file':{'driver':'file','filename':'%s'}}",
             c->number, c->next, b->path);
    int r = history_open(l, json, &base, &err);
    if (r == 0) {
        uint64_t speed = one_in(&c->h->more_dice, 2) ? 256 * KiB : 0;
        b->generation = generation(c);
        b->running = true;
        r = transaction_run_one(
            l->g, l->js, "x-tidemark-compare",
            history_json("{'job-id':'%s','device':'%s','target':'base%u-%u','bitmap':'%s',"
                         "'speed':%llu}",
                         b->job, c->d->node, c->number, c->next, c->bitmap,
                         (unsigned long long)speed),
            &err);
    }
    if (r < 0) {
        if (!history_may_refuse(c->h, r) && !(r == -EBUSY && history_in_doubt(c->d->n)))
            violation(c->h, "no comparison can be started: %s", err.text);
        end_backup(c);
    } else {
        c->h->jobs++;
        await_job(c, l);
        conclude_compare(c, b->succeeded);
    }
    if (base)
        node_unref(base);
    snprintf(json, sizeof json, "/d/base%u-%u", c->number, c->next);
    (void)!io_unlink(json);
    history_job_over(c->d);
}

static void forget_last(struct client *c)
{
    char path[SIM_PATH];
    memcpy(path, c->last_path, sizeof path);
    c->last_path[0] = '\0'; /* from here on it may be gone */
    if (path[0])
        (void)!io_unlink(path);
}

static void remove_bitmap(struct client *c, struct life *l)
{
    struct error err = ERROR_INIT;
    c->expects = c->told_bad = false; /* from here on it may be gone */
    int r =
        transaction_run_one(l->g, l->js, "block-dirty-bitmap-remove",
                            history_json("{'node':'%s','name':'%s'}", c->d->node, c->bitmap), &err);
    c->has_chain = false;
    if (r < 0 && !history_may_refuse(c->h, r))
        violation(c->h, "'%s' cannot be removed: %s", c->bitmap, err.text);
}

static void run(void *self, struct life *l)
{
    struct client *c = self;
    while (!l->stopping) {
        struct dirty_bitmap *bm = bitmap(c);
        history_nap(l, 20000);
        if (l->stopping)
            return;
        if (one_in(&c->h->more_dice, 4))
            persist_save_idle(c->d->n);
        if (bm && one_in(&c->h->more_dice, dirty_inconsistent(bm) ? 2 : 12))
            compare(c, l);
        else if (bm && (dirty_inconsistent(bm) || one_in(&c->h->dice, 12)))
            remove_bitmap(c, l);
        else if (!bm || !c->has_chain)
            back_up(c, l, bm ? "clear" : "add");
        else
            back_up(c, l, one_in(&c->h->dice, 8) ? "clear" : "");
        bm = bitmap(c);
        c->expects = bm && dirty_persistent(bm) && !dirty_inconsistent(bm);
        if (one_in(&c->h->dice, 2))
            forget_last(c);
    }
}

/* ---- the ends of lives ---- */

static void made(void *self, struct life *l)
{
    struct client *c = self;
    struct error err = ERROR_INIT;
    if (!c->d->qcow2 && !settings.persist)
        return;
    c->can_persist =
        transaction_run_one(
            l->g, l->js, "block-dirty-bitmap-add",
            history_json("{'node':'%s','name':'try','persistent':true}", c->d->node), &err) == 0;
    if (c->can_persist &&
        transaction_run_one(l->g, l->js, "block-dirty-bitmap-remove",
                            history_json("{'node':'%s','name':'try'}", c->d->node), &err) < 0)
        violation(c->h, "a bitmap cannot be removed: %s", err.text);
}

/* What the bitmap says of itself. */
static struct json_object *info_of(struct client *c, struct json_object *all)
{
    for (size_t i = 0; all && i < json_object_array_length(all); i++) {
        struct json_object *one = json_object_array_get_idx(all, i);
        if (!strcmp(json_get_string(one, "name", ""), c->bitmap))
            return one;
    }
    return NULL;
}

static uint64_t generation(struct client *c)
{
    CLEANUP(json_putp) struct json_object *all = dirty_info(c->d->n);
    return json_get_uint(info_of(c, all), "x-tidemark-generation", UINT64_MAX);
}

/* Nobody was told of the end of the job that ran: has it moved the bitmap on? -1: it cannot say. */
static int has_moved(struct client *c, const struct backup *b)
{
    CLEANUP(json_putp) struct json_object *all = dirty_info(c->d->n);
    struct json_object *one = info_of(c, all);
    uint64_t now = json_get_uint(one, "x-tidemark-generation", UINT64_MAX);
    if (now == b->generation)
        return 0;
    return now == b->generation + 1 &&
                   !strcmp(json_get_string(one, "x-tidemark-last-job", ""), b->job)
               ? 1
               : -1;
}

static void quiet(void *self, struct life *l)
{
    struct client *c = self;
    struct dirty_bitmap *bm = bitmap(c);
    const bool absent = history_absent(l, c);
    /* Else it has not asked yet what became of it, or has not looked since somebody else wrote. */
    if (!c->backup.running && !(absent && c->d->blind))
        judge_bitmap(c, "at rest", !c->losses && !absent && c->h->m.n_faults == l->faults_before);
    c->had_bitmap = bm && dirty_persistent(bm) && !dirty_inconsistent(bm) &&
                    c->h->m.n_faults == l->faults_before;
}

static void ended(void *self, enum life_end end, bool power, bool no_segments)
{
    struct client *c = self;
    if (c->backup.running && c->backup.holds && !c->backup.instant.held) {
        /* Cut inside the command, or the mirror's end: any time since. */
        c->backup.cut = true;
        model_instant(&c->d->model, c->backup.from, &c->backup.instant);
    }
    c->backup.unsure |= c->backup.running && c->d->sync_failed;
    if (power)
        c->left = LEFT_POWERLESS;
    else if (c->left == LEFT_CLEAN && end == END_KILLED)
        c->left = LEFT_KILLED;
    c->clean = end == END_CLEAN && c->d->n; /* else it was away */
    c->no_segments |= no_segments;
    unsigned loss = history_is_loss(c->h, end, power, no_segments);
    c->losses += loss;
    c->backup.losses += c->backup.running ? loss : 0;
}

/* What another program leaves is good or not; what is good must be right. */
static void absent(void *self, bool foreign)
{
    struct client *c = self;
    c->expects = c->expects && !foreign;
    c->had_bitmap = false;
}

/* The backup reported last is as it was. */
static void judge_last(struct client *c, struct life *l)
{
    struct node *n = NULL;
    CLEANUP(memory_freep) uint32_t *stamps = xcalloc(c->d->model.n, sizeof *stamps);
    CLEANUP(memory_freep) bool *has = xcalloc(c->d->model.n, sizeof *has);
    int r = open_target(c, l, c->last_path, &n);
    if (r == 0)
        r = read_target(c, n, stamps, has);
    if (r < 0)
        violation(c->h, "the backup %s is lost: %s", c->last_path, strerror(-r));
    for (uint64_t i = 0; i < c->d->model.n; i++)
        if (stamps[i] != c->last[i])
            violation(c->h, "the backup %s: sector %llu was %#x and is %#x", c->last_path,
                      (unsigned long long)i, c->last[i], stamps[i]);
    node_unref(n);
}

/* How many bitmaps come through what, for the totals. */
static void count_bitmaps(struct client *c, struct dirty_bitmap *bm)
{
    struct bitmaps_counted *n = &c->h->bitmaps[c->left];
    bool good = bm && !dirty_inconsistent(bm);
    if (c->expects) {
        n->before++;
        n->good += good;
        if (settings.strict && !good && history_must_keep(c->d, c->left, c->no_segments))
            violation(c->h, "'%s' of %s is %s after %s", c->bitmap, c->d->path,
                      bm ? "inconsistent" : "gone", history_left(c->left));
    }
    if (good && c->told_bad)
        violation(c->h, "'%s' of %s was inconsistent, and is good after %s", c->bitmap, c->d->path,
                  history_left(c->left));
    c->told_bad = bm && !good;
    c->expects = good && dirty_persistent(bm);
    c->left = LEFT_CLEAN;
    c->no_segments = false;
}

static void opened(void *self, struct life *l)
{
    struct client *c = self;
    struct backup *b = &c->backup;
    struct dirty_bitmap *bm;
    if (c->last_path[0])
        judge_last(c, l);
    if (b->running && b->compares) {
        int moved = has_moved(c, b);
        machine_note(&c->h->m, "%s: a comparison, %d", b->job, moved);
        if (moved < 0)
            c->told_bad = false;
        conclude_compare(c, b->told ? b->succeeded : moved > 0);
    } else if (b->running && b->told && b->succeeded) {
        struct node *n = NULL;
        int r = open_target(c, l, b->path, &n);
        if (r < 0)
            violation(c->h, "the backup %s is lost: %s", b->path, strerror(-r));
        conclude(c, n);
        node_unref(n);
    } else if (b->running && b->told) {
        /* Its target has not been kept, or the bitmap may have been cleared for it. */
        c->has_chain = c->has_chain && !b->always && !b->full;
        end_backup(c);
    } else if (b->running) {
        int moved = b->keeps ? has_moved(c, b) : 0;
        machine_note(&c->h->m, "%s: %s", b->job,
                     moved < 0 ? "who knows"
                     : moved   ? "has moved"
                               : "has not moved");
        struct node *n = NULL;
        /* One of mode always says so of one that has failed, too: what its target has counts. */
        bool perhaps = moved > 0 && b->always && !b->full;
        struct inode *file = store_find(&c->h->m.store, b->path);
        if (moved > 0 && open_target(c, l, b->path, &n) < 0)
            violation(c->h, "the backup %s moved its bitmap on, and is lost", b->path);
        b->succeeded = moved > 0 && !perhaps;
        if (b->succeeded && !b->holds)
            violation(c->h, "%s moved its bitmap on, and was never asked to end", b->job);
        if (b->succeeded || (perhaps && !file->syncs_failed))
            conclude(c, n);
        else /* who cannot know, or has not kept what mode always counts, starts anew */
            c->has_chain = c->has_chain && !moved && !b->always && !b->full;
        if (n)
            node_unref(n);
        end_backup(c);
    }
    bm = bitmap(c);
    count_bitmaps(c, bm);
    if (c->clean && c->had_bitmap && (!bm || dirty_inconsistent(bm)) && !c->d->foreign &&
        !c->h->spoiled)
        violation(c->h, "'%s' of %s was closed well, and is %s", c->bitmap, c->d->node,
                  bm ? "inconsistent" : "gone");
    if (!bm || dirty_inconsistent(bm) || c->d->blind)
        c->has_chain = false;
    judge_bitmap(c, "at open", !c->losses && (settings.strict || (c->clean && c->had_bitmap)));
    c->had_bitmap = c->clean = false;
}

const struct client_ops backup_client = {
    .name = "backup",
    .start = start,
    .made = made,
    .opened = opened,
    .run = run,
    .quiet = quiet,
    .event = event,
    .absent = absent,
    .ended = ended,
    .finish = finish,
};
