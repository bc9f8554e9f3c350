/* The client of the histories: see histories.h.
 *
 * It does at random what real ones do, and keeps its books as they should: a backup that succeeded
 * is kept; one that failed is thrown away (the target is again what it was), but with `always` what
 * was achieved is kept. It also tries what must be refused. */
#include "histories.h"

#include "job/mirror.h"
#include "rt/clock.h"

/* ---- jobs ---- */

static void group_unref(struct group *g)
{
    if (--g->refs == 0)
        free(g);
}

static struct work *work_new(struct disk *source, struct disk *target, struct group *g)
{
    struct work *w = xnew(struct work);
    snprintf(w->id, sizeof w->id, "j%u", history->next_name++);
    w->source = source;
    w->target = target;
    w->group = g;
    g->refs++;
    return w;
}

/* It is known from here on; it begins when it says that it runs. */
static void work_is_coming(struct work *w)
{
    snprintf(w->status, sizeof w->status, "undefined");
    TAILQ_INSERT_TAIL(&history->works, w, link);
}

/* Guests still wait: this is the instant. */
static void work_begins(struct work *w)
{
    plan_settles();
    w->begun = true;
    w->instant = xcalloc(1, w->source->size);
    memcpy(w->instant, w->source->bytes, w->source->size);
    w->began = history->writes;
    w->aborting = UINT32_MAX;
    w->fired = disk_fired(w->source) + disk_fired(w->target);
    w->flushes = w->source->fired_flushes + w->target->fired_flushes;
    if (w->marks)
        marks_start(w->marks);
    if (w->lane)
        w->lane->work = w;
}

static void work_free(struct work *w)
{
    group_unref(w->group);
    free(w->instant);
    free(w);
}

static struct work *work_named(const char *id)
{
    struct work *w;
    TAILQ_FOREACH (w, &history->works, link) {
        if (strcmp(w->id, id) == 0)
            return w;
    }
    return NULL;
}

static bool may_fail(const struct work *w)
{
    return w->asked_cancel || w->group->excused ||
           disk_fired(w->source) + disk_fired(w->target) != w->fired;
}

static void keep(struct lane *l)
{
    if (!l->kept)
        l->kept = xcalloc(1, l->source->size);
    memcpy(l->kept, l->target->bytes, l->source->size);
}

/* An image that is not kept is forgotten. Where its content matters, it is looked at soon. */
static void keep_image(struct work *w, bool success)
{
    struct lane *l = w->lane;
    l->unfinished = false;
    if (success) {
        if (!l->kept)
            l->kept = xcalloc(1, l->source->size);
        memcpy(l->kept, w->instant, l->source->size);
        l->survived = xcalloc(1, w->target->file->size);
        memcpy(l->survived, w->target->file->durable, w->target->file->size);
        l->look = LOOK_COMPLETE;
        l->newest = w->target;
    } else if (w->mode == MODE_ALWAYS && w->marks->enabled) {
        l->unfinished = true;
        l->look = LOOK_UNFINISHED;
        l->newest = w->target;
    } else if (w->starts_chain) {
        free(steal(l->kept));
        l->newest = NULL;
    }
}

/* What the client makes of it. */
static void keep_books(struct work *w, bool success)
{
    struct lane *l = w->lane;
    if (!l)
        return;
    l->work = NULL;
    if (l->images) {
        keep_image(w, success);
        return;
    }
    if (success || (w->mode == MODE_ALWAYS && w->marks->enabled)) {
        keep(l);
    } else if (w->starts_chain) {
        free(steal(l->kept)); /* the bitmap says nothing about an older one */
    }
    if (w->mirror && w->vdisk->disk == w->target) {
        /* The target is the disk now, and no backup any more. */
        l->target = NULL;
        free(steal(l->kept));
    }
}

/* Chains whose disk is mirrored: do they go on with the other disk? */
static void carry_or_not(const struct work *w, bool moved)
{
    for (unsigned i = 0; i < history->n_lanes; i++) {
        struct lane *l = &history->lanes[i];
        if (!l->carried || l->source != w->source)
            continue;
        l->moved = moved;
        if (!moved)
            l->carried = NULL;
    }
}

static void pivot(struct work *w, bool success)
{
    struct vdisk *v = w->vdisk;
    struct disk *should_be = success && w->asked_complete ? w->target : w->source;
    struct node *n = node_skip_filters(v->edge->node);
    if (n != should_be->node)
        WRONG("mirror %s: guests are on %s, not on %s", w->id, node_name(n), should_be->name);
    v->disk = should_be;
    if (v->disk == w->target)
        trace("%s takes the place of %s", w->target->name, w->source->name);
    carry_or_not(w, v->disk == w->target);
}

static void work_over(struct work *w, bool success, const char *error)
{
    struct group *g = w->group;
    HOLDS(!w->over);
    w->over = true;
    if (may_fail(w))
        g->excused = true;
    if (!success && !g->excused) {
        struct work *other; /* the sibling that failed may come later */
        TAILQ_FOREACH (other, &history->works, link) {
            if (other->group == g && may_fail(other))
                g->excused = true;
        }
    }
    if (!success && !g->excused)
        WRONG("job %s fails for no reason: %s", w->id, error);
    *(success ? &g->succeeded : &g->failed) += 1;
    if (g->succeeded && g->failed)
        WRONG("job %s %s, another of its group did not", w->id, success ? "succeeds" : "fails");
    check_outcome(w, success);
    if (w->mirror)
        pivot(w, success);
    keep_books(w, success);
}

void client_event(void *opaque, const char *name, struct json_object *data)
{
    const char *id = json_get_string(data, "id", json_get_string(data, "device", "?"));
    const char *status = json_get_string(data, "status", "");
    const char *error = json_get_string(data, "error", NULL);
    struct work *w = work_named(id);

    trace("%s: %s %s%s", id, name, status, error ? error : "");
    if (!w)
        WRONG("event %s of %s, which is nobody", name, id);
    if (strcmp(name, "JOB_STATUS_CHANGE") == 0) {
        snprintf(w->status, sizeof w->status, "%s", status);
        if (strcmp(status, "running") == 0 && !w->begun)
            work_begins(w);
        if (strcmp(status, "aborting") == 0 && w->aborting == UINT32_MAX)
            w->aborting = history->writes;
        if (strcmp(status, "pending") == 0)
            w->gates = w->source->n_gates;
        if (strcmp(status, "null") == 0) {
            HOLDS(w->over == w->begun); /* else its transaction was called off */
            TAILQ_REMOVE(&history->works, w, link);
            work_free(w);
        }
    } else if (strcmp(name, "BLOCK_JOB_COMPLETED") == 0) {
        if (!error && w->asked_force)
            WRONG("job %s was cancelled by force and succeeds", id);
        work_over(w, !error, error);
    } else if (strcmp(name, "BLOCK_JOB_CANCELLED") == 0) {
        work_over(w, false, "cancelled");
    } else if (strcmp(name, "BLOCK_JOB_ERROR") == 0) {
        if (strcmp(json_get_string(data, "action", ""), "stop") == 0)
            w->paused = true;
    }
}

static const char *some_on_error(void)
{
    static const char *const all[] = {"report", "report", "ignore", "stop", "enospc"};
    return all[dice(ARRAY_SIZE(all))];
}

static const char *const mode_names[] = {NULL, "on-success", "always", "never"};

/* Options that backups and mirrors have in common. */
static void add_options(struct work *w, struct json_object *o)
{
    json_add_string(o, "device", w->source->name);
    json_add_string(o, "target", w->target->name);
    json_add_string(o, "job-id", w->id);
    if (w->marks) {
        json_add_string(o, "bitmap", w->marks->name);
        if (strcmp(json_get_string(o, "sync", ""), "incremental") != 0 || one_in(2))
            json_add_string(o, "bitmap-mode", mode_names[w->mode]);
    }
    if (history->serious)
        return;
    if (one_in(2))
        json_add_uint(o, "speed", 65536 << dice(10));
    json_add_string(o, "on-source-error", some_on_error());
    json_add_string(o, "on-target-error", some_on_error());
    w->manual_finalize = one_in(4);
    w->group->by_hand |= w->manual_finalize;
    w->manual_dismiss = one_in(6);
    json_add_bool(o, "auto-finalize", !w->manual_finalize);
    json_add_bool(o, "auto-dismiss", !w->manual_dismiss);
}

static void plan_backup(struct plan *p, struct work *w)
{
    struct json_object *o = json_object_new_object();
    bool incremental = w->sync == SYNC_BITMAP && w->mode == MODE_ON_SUCCESS && one_in(2);
    json_add_string(o, "sync",
                    w->sync == SYNC_FULL ? one_in(8) ? "top" : "full"
                    : incremental        ? "incremental"
                                         : "bitmap");
    add_options(w, o);
    if (one_in(2)) {
        struct json_object *perf = json_object_new_object();
        json_add_uint(perf, "max-workers", 1 + dice(4));
        if (one_in(2))
            json_add_uint(perf, "max-chunk", disk_chunk(w->target) * (1 + dice(3)));
        json_add(o, "x-perf", perf);
    }
    plan_action(p, "blockdev-backup", o);
}

/* ---- lanes ---- */

static bool mirrored(const struct disk *d)
{
    struct work *w;
    TAILQ_FOREACH (w, &history->works, link) {
        if (w->mirror && w->source == d)
            return true;
    }
    return false;
}

static unsigned jobs_of(const struct disk *d)
{
    struct work *w;
    unsigned n = 0;
    TAILQ_FOREACH (w, &history->works, link)
        n += w->source == d || w->target == d;
    return n;
}

static uint64_t some_cluster(void)
{
    return one_in(2) ? 0 : 65536ull << dice(3);
}

/* An idle one of the disk, with a target; BEGUN: it has its bitmap already. */
static struct lane *some_lane(struct disk *d, bool begun)
{
    struct lane *found = NULL;
    unsigned n = 0, of_disk = 0;
    for (unsigned i = 0; i < history->n_lanes; i++) {
        struct lane *l = &history->lanes[i];
        if (l->source != d)
            continue;
        of_disk++;
        if (!l->work && !l->look && (l->marks || !begun) && one_in(++n))
            found = l;
    }
    if (!begun && (!found || one_in(4)) && of_disk < 2 && history->n_lanes < LANES_MAX) {
        found = &history->lanes[history->n_lanes++];
        *found = (struct lane){.source = d, .images = one_in(3)};
    }
    if (found && found->images) /* a new one each time, see lay_out */
        return history->n_disks + 4 * VDISKS_MAX < DISKS_MAX ? found : NULL;
    if (found && !found->target) {
        if (history->n_disks == DISKS_MAX)
            return NULL;
        found->target = disk_new(d->size, some_cluster());
        disk_fill(found->target);
    }
    return found;
}

/* The target as the client has kept it. */
static void lay_out(struct lane *l, bool full)
{
    if (l->images) {
        if (full || !l->unfinished)
            l->target = image_new(l->source->size, full ? NULL : l->newest);
        return;
    }
    if (!l->kept)
        return;
    memcpy(l->target->bytes, l->kept, l->source->size);
    memcpy(l->target->durable, l->kept, l->source->size);
    l->target->flushed = history->writes;
}

/* The next backup of a lane, added to P. */
static struct work *next_backup(struct plan *p, struct lane *l, struct group *g)
{
    bool full = !l->kept || (!history->serious && one_in(6));
    lay_out(l, full);
    struct work *w = work_new(l->source, l->target, g);
    bool in_group = p->mode && strcmp(p->mode, "grouped") == 0;

    w->lane = l;
    w->sync = full ? SYNC_FULL : SYNC_BITMAP;
    if (!l->marks) {
        plan_add(p, l->source, "l", false, &l->marks);
        w->starts_chain = true;
    } else if (full && !in_group && one_in(2)) {
        plan_change(p, CLEAR, l->marks);
        w->starts_chain = true;
    } else {
        static const enum mode modes[] = {MODE_ON_SUCCESS, MODE_ON_SUCCESS, MODE_ALWAYS,
                                          MODE_NEVER};
        w->marks = l->marks;
        w->mode = history->serious ? MODE_ON_SUCCESS : modes[dice(full ? 3 : 4)];
    }
    plan_backup(p, w);
    work_is_coming(w);
    return w;
}

static bool may_be_backed_up(const struct disk *d)
{
    return !mirrored(d) && jobs_of(d) < 3;
}

/* One to four lanes at one instant. */
static void start_backups(void)
{
    struct plan p = {0};
    struct lane *lanes[VDISKS_MAX];
    struct group *shared = xnew(struct group);
    unsigned n = 0, wanted = one_in(3) ? 1 : 1 + (unsigned)dice(VDISKS_MAX);
    bool grouped = wanted > 1 && !one_in(4), called_off = !history->serious && one_in(12);

    shared->refs = 1;
    p.mode = grouped ? "grouped" : one_in(2) ? "individual" : NULL;
    for (unsigned i = 0; i < wanted; i++) {
        struct vdisk *v = &history->vdisks[dice(history->n_vdisks)];
        struct lane *l = may_be_backed_up(v->disk) ? some_lane(v->disk, grouped) : NULL;
        bool twice = false;
        for (unsigned k = 0; l && k < n; k++)
            twice |= lanes[k] == l;
        if (!l || twice || (!l->marks && called_off))
            continue;
        struct group *g = shared;
        if (!grouped)
            g = xnew(struct group);
        next_backup(&p, l, g);
        lanes[n++] = l;
    }
    if (n && called_off) {
        struct error err = ERROR_INIT;
        plan_call_off(&p);
        HOLDS(plan_carry_out(&p, &err) < 0);
    } else if (n) {
        plan_carry_out_ok(&p);
    }
    group_unref(shared);
}

/* A backup by a bitmap that belongs to no chain, perhaps a disabled one, onto anything. */
static void start_stray_backup(struct disk *d)
{
    struct plan p = {0};
    struct marks *m = some_marks(d, false);
    if (!m || is_lanes(m) || !may_be_backed_up(d) || history->n_disks == DISKS_MAX)
        return;
    struct disk *target = disk_new(d->size, some_cluster());
    disk_fill(target);
    struct work *w = work_new(d, target, xnew(struct group));
    w->marks = m;
    w->sync = one_in(4) ? SYNC_FULL : SYNC_BITMAP;
    w->mode = (enum mode)(MODE_ON_SUCCESS + dice(w->sync == SYNC_FULL ? 2 : 3));
    plan_backup(&p, w);
    work_is_coming(w);
    plan_carry_out_ok(&p);
}

/* ---- mirrors ---- */

static void start_mirror(void)
{
    unsigned n = 0, all = history->n_vdisks, first = (unsigned)dice(all);
    while (n < all && jobs_of(history->vdisks[(first + n) % all].disk))
        n++;
    if (n == all)
        return;
    struct vdisk *v = &history->vdisks[(first + n) % all];
    struct disk *d = v->disk;
    struct error err = ERROR_INIT;
    struct lane *l = NULL;
    if (one_in(2))
        l = some_lane(d, true);
    if (l && (!l->kept || l->images))
        return;
    if (!l && history->n_disks == DISKS_MAX)
        return;
    struct disk *target = l ? l->target : disk_new(d->size, some_cluster());
    struct work *w = work_new(d, target, xnew(struct group));
    CLEANUP(json_putp) struct json_object *o = json_object_new_object();

    w->mirror = true;
    w->vdisk = v;
    w->lane = l;
    if (l) {
        lay_out(l, false);
        w->marks = l->marks;
        w->sync = SYNC_BITMAP;
        w->mode = (enum mode)(MODE_ON_SUCCESS + dice(3));
        json_add_string(o, "sync",
                        w->mode == MODE_ON_SUCCESS && one_in(2) ? "incremental" : "bitmap");
    } else {
        disk_fill(target);
        json_add_string(o, "sync", "full");
        if (one_in(2))
            json_add_uint(o, "granularity", 512ull << dice(10));
    }
    add_options(w, o);
    if (one_in(2))
        json_add_uint(o, "buf-size", 65536 << dice(6));
    json_add_string(o, "copy-mode", one_in(2) ? "write-blocking" : "background");
    if (one_in(3))
        json_add_bool(o, "unmap", false);
    trace("  blockdev-mirror %s", json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN));
    work_is_coming(w);
    if (mirror_blockdev(history->jobs, o, &err) < 0)
        WRONG("a mirror is refused: %s", err.text);
}

/* ---- verbs ---- */

static bool is(const struct work *w, const char *status)
{
    return strcmp(w->status, status) == 0;
}

/* The work if it was done and W is still there: a verb may wait, and the state may have changed. */
static struct work *verb(struct work *w, enum job_verb v)
{
    struct error err = ERROR_INIT;
    char id[12];
    snprintf(id, sizeof id, "%s", w->id);
    int r = jobs_do(history->jobs, id, v, &err);
    trace("  %s %s: %s", job_verb_name(v), id, r < 0 ? err.text : "done");
    return r == 0 ? work_named(id) : NULL;
}

static void cancel(struct work *w, bool force)
{
    struct error err = ERROR_INIT;
    char id[12];
    snprintf(id, sizeof id, "%s", w->id);
    bool was = w->asked_cancel, gentle = w->mirror && (is(w, "ready") || is(w, "standby"));
    if (!force && gentle && w->asked_complete)
        return; /* one or the other */
    w->asked_cancel = true;
    int r = jobs_do_block(history->jobs, id, JOB_VERB_CANCEL, force, &err);
    trace("  cancel %s%s: %s", id, force ? " by force" : "", r < 0 ? err.text : "done");
    w = work_named(id);
    if (!w || w->over)
        return;
    if (r < 0)
        w->asked_cancel = was;
    if (r == 0)
        w->paused = false;
}

static void disturb(struct work *w)
{
    struct error err = ERROR_INIT;
    char id[12]; /* W may go meanwhile */
    snprintf(id, sizeof id, "%s", w->id);
    switch (dice(8)) {
    case 0:
    case 1:
        cancel(w, one_in(2));
        break;
    case 2:
        w = w->paused ? NULL : verb(w, JOB_VERB_PAUSE);
        if (w)
            w->paused = true;
        break;
    case 3:
        if (jobs_set_speed(history->jobs, id, one_in(2) ? 0 : 65536 << dice(8), &err) < 0)
            trace("  speed: %s", err.text);
        break;
    case 4:
        if (w->mirror && one_in(2)) {
            CLEANUP(json_putp)
            struct json_object *o =
                parse("{'id':'%s','type':'mirror','copy-mode':'write-blocking'}", id);
            if (jobs_change(history->jobs, o, &err) < 0)
                trace("  change: %s", err.text);
        }
        break;
    default:
        break;
    }
}

/* Before a mirror's target takes over: what guests write to it from then on is known to each chain
 * of the disk, too. */
static void begin_to_carry(struct work *w)
{
    struct plan p = {0};
    char id[12];
    snprintf(id, sizeof id, "%s", w->id);
    for (unsigned i = 0; i < history->n_lanes && p.n < 4; i++) {
        struct lane *l = &history->lanes[i];
        if (l->source == w->source && l->kept && !l->work && !l->look && !l->carried)
            plan_add(&p, w->target, "c", false, &l->carried);
    }
    if (!p.n)
        return;
    plan_watch(&p, w->target);
    struct disk *source = w->source;
    plan_carry_out_ok(&p);
    w = work_named(id);
    if (!w || w->over) /* meanwhile, and without a pivot */
        carry_or_not(&(struct work){.source = source}, false);
}

/* After it: what the chain's bitmap has of the time before is merged. */
static void carry_on(void)
{
    for (unsigned i = 0; i < history->n_lanes; i++) {
        struct lane *l = &history->lanes[i];
        struct plan p = {0};
        if (!l->moved)
            continue;
        trace("chain %u goes on with %s", i, l->carried->disk->name);
        plan_merge(&p, l->carried, l->marks);
        plan_watch(&p, l->carried->disk);
        plan_carry_out_ok(&p);
        l->source = l->carried->disk;
        l->marks = l->carried;
        l->carried = NULL;
        l->moved = false;
    }
}

/* What a job needs from its client to come to an end. */
static void help(struct work *w)
{
    struct error err = ERROR_INIT;
    char id[12];
    snprintf(id, sizeof id, "%s", w->id);
    if (w->paused) {
        w->paused = false;
        verb(w, JOB_VERB_RESUME);
    } else if (is(w, "ready") && !w->asked_complete && !w->asked_cancel) {
        if (w->mirror && !w->lane && !one_in(4))
            begin_to_carry(w);
        w = work_named(id);
        if (!w || !is(w, "ready"))
            return;
        if (one_in(3)) {
            cancel(w, false);
        } else {
            w->asked_complete = true;
            if (!verb(w, JOB_VERB_COMPLETE) && work_named(id))
                work_named(id)->asked_complete = false;
        }
    } else if (is(w, "pending") && w->manual_finalize) {
        w->group->finalizing = true;
        verb(w, JOB_VERB_FINALIZE);
    } else if (is(w, "concluded") && w->manual_dismiss) {
        verb(w, JOB_VERB_DISMISS);
    }
    if (history->serious && work_named(id) && !is(w, "concluded"))
        (void)!jobs_set_speed(history->jobs, id, 0, &err);
}

static struct work *some_work(void)
{
    struct work *w, *found = NULL;
    unsigned n = 0;
    TAILQ_FOREACH (w, &history->works, link) {
        if (one_in(++n))
            found = w;
    }
    return found;
}

/* ---- steps ---- */

void client_step(void)
{
    carry_on(); /* waits */
    struct vdisk *v = &history->vdisks[dice(history->n_vdisks)];
    struct disk *d = history->disks[dice(history->n_disks)];
    struct work *w = some_work();
    uint64_t choice = dice(24);

    if (w && !one_in(4))
        d = one_in(3) ? w->source : w->target;
    if (choice < 3)
        change_bitmaps(v->disk);
    else if (choice < 4)
        try_a_busy_one(v->disk);
    else if (choice < 9)
        start_backups();
    else if (choice < 10)
        start_stray_backup(v->disk);
    else if (choice < 12)
        start_mirror();
    else if (choice < 15)
        disk_arm(d);
    else if (choice < 16)
        disk_disarm(d);
    else if (choice < 20 && w)
        disturb(w);
    else if (w)
        help(w);
}

static void finish_jobs(void)
{
    for (unsigned i = 0; !TAILQ_EMPTY(&history->works); i++) {
        struct work *w = some_work();
        if (i == 60000)
            WRONG("job %s does not end: %s", w->id, w->status);
        help(w);
        HOLDS(sleep_until(clock_after_ns(MSEC)) == 0);
    }
}

void client_finish(void)
{
    history->serious = true;
    for (unsigned i = 0; i < history->n_disks; i++)
        disk_disarm(history->disks[i]);
    finish_jobs();
    check_everything();
    carry_on();
    for (unsigned i = 0; i < history->n_lanes; i++) {
        struct lane *l = &history->lanes[i];
        struct plan p = {0};
        if (!l->kept || !(l->target || l->images))
            continue;
        struct group *g = xnew(struct group);
        struct work *w = next_backup(&p, l, g);
        HOLDS(w->sync == SYNC_BITMAP && !w->starts_chain);
        plan_carry_out_ok(&p);
    }
    finish_jobs();
    check_everything();
    for (unsigned i = 0; history->stop && i < history->n_lanes; i++) {
        struct lane *l = &history->lanes[i];
        if (l->kept && memcmp(l->kept, l->source->bytes, l->source->size) != 0)
            WRONG("the chain of %s is not the disk", l->source->name);
    }
}

void client_fini(void)
{
    for (unsigned i = 0; i < history->n_lanes; i++)
        free(history->lanes[i].kept);
}

/* ---- what must always hold ---- */

static void check_lane(const struct lane *l)
{
    struct dirty_bitmap *bm;
    if (!l->kept || l->work || l->look)
        return;
    bm = dirty_find(l->source->node, l->marks->name);
    HOLDS(bm);
    for (uint64_t i = 0; i < l->source->size; i += SECTOR) {
        if (memcmp(l->kept + i, l->source->bytes + i, SECTOR) == 0 || bitmap_get(dirty_bits(bm), i))
            continue;
        WRONG("%s differs from its backup at %#llx, and bitmap %s is clean", l->source->name,
              (unsigned long long)i, l->marks->name);
    }
}

bool about_to_end(const struct marks *m)
{
    struct work *w;
    TAILQ_FOREACH (w, &history->works, link) {
        if (w->marks != m || w->over)
            continue;
        if (is(w, "aborting") ||
            (is(w, "pending") && !(w->group->by_hand && !w->group->finalizing)))
            return true;
    }
    return false;
}

void check_everything(void)
{
    struct marks *m;
    for (unsigned i = 0; i < history->n_lanes; i++)
        lane_look(&history->lanes[i]); /* waits; nothing after it does */
    for (unsigned i = 0; i < history->n_disks; i++) {
        TAILQ_FOREACH (m, &history->disks[i]->marks, link) {
            if (!about_to_end(m))
                marks_check(m);
        }
    }
    for (unsigned i = 0; i < history->n_lanes; i++)
        check_lane(&history->lanes[i]);
}
