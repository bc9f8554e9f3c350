#include "history.h"

#include "../unit/qcow2check.h"
#include "base/log.h"
#include "copy/copy.h"
#include "dirty/dirty.h"
#include "job/driver.h"
#include "persist/persist.h"
#include "rt/io.h"
#include "rt/task.h"

#include <errno.h>
#include <stdarg.h>
#include <unistd.h>

struct settings settings;

_Noreturn void violation_at(const char *file, int line, struct history *h, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    heap_life(false);
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "%s:%d: seed %llu: %s\nrepeat with: tests/sim/sim --seed %llu%s%s%s --trace\n",
            file, line, (unsigned long long)h->seed, text, (unsigned long long)h->seed,
            settings.groups    ? " --groups"
            : settings.persist ? " --persist"
                               : "",
            settings.strict ? " --strict" : "",
            settings.exhaustive  ? " --exhaustive 1000000"
            : settings.no_faults ? " --no-faults"
                                 : "");
    _exit(1);
}

/* ---- small things ---- */

struct json_object *history_json(const char *fmt, ...)
{
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    struct json_object *o = json_tokener_parse(text);
    if (!o) {
        fprintf(stderr, "sim: not JSON: %s\n", text);
        abort();
    }
    return o;
}

int history_open(struct life *l, const char *json, struct node **ret, struct error *err)
{
    CLEANUP(json_putp) struct json_object *o = history_json("%s", json);
    return graph_open(l->g, o, ret, err);
}

int history_read_all(struct edge *e, uint64_t size, uint8_t *buf)
{
    for (uint64_t at = 0; at < size; at += 64 * KiB) {
        int r = edge_read(e, range_make(at, min_u64(64 * KiB, size - at)), buf + at, 0);
        if (r < 0)
            return r;
    }
    return 0;
}

char *history_user_describe(struct user *u)
{
    return xstrdup("simulated guest");
}

static void ignore_edge(struct user *u, struct edge *e)
{
}

const struct user_ops history_user_ops = {history_user_describe, ignore_edge, ignore_edge};

bool history_job_begins(struct disk *d, bool alone)
{
    if (d->alone || (alone && d->jobs))
        return false;
    d->jobs++;
    d->alone = alone;
    return true;
}

void history_job_over(struct disk *d)
{
    d->jobs--;
    d->alone = false;
}

static struct json_object *job_info(struct json_object *all, const char *id)
{
    for (size_t i = 0; i < json_object_array_length(all); i++) {
        struct json_object *one = json_object_array_get_idx(all, i);
        if (!strcmp(json_get_string(one, "id", ""), id))
            return one;
    }
    return NULL;
}

bool history_job_lives(struct life *l, const char *id)
{
    CLEANUP(json_putp) struct json_object *all = jobs_query(l->js);
    return job_info(all, id);
}

bool history_job_ready(struct life *l, const char *id)
{
    CLEANUP(json_putp) struct json_object *all = jobs_query(l->js);
    return !strcmp(json_get_string(job_info(all, id), "status", ""), "ready");
}

void history_nap(struct life *l, uint64_t max_us)
{
    if (settings.small) /* so that clients do something while there are guests */
        max_us = min_u64(max_us, 2000);
    (void)!sleep_until(clock_after_ns(1000 * dice_below(&l->h->dice, max_us + 1)));
}

static const char *const lefts[] = {"a clean close", "a failing close", "a kill", "a power loss"};

const char *history_left(enum left left)
{
    return lefts[left];
}

bool history_is_loss(const struct history *h, enum life_end end, bool power, bool no_segments)
{
    return power || (no_segments && (end == END_KILLED || h->with_faults)) ||
           (h->faulty && end == END_KILLED);
}

bool history_may_refuse(const struct history *h, int r)
{
    return h->with_faults || (h->no_memory && r == -ENOSPC);
}

uint64_t history_budget(const struct disk *d, uint64_t granularity, unsigned losses)
{
    return losses * d->slots * max_u64(d->region_bytes, granularity);
}

bool history_must_keep(const struct disk *d, enum left left, bool no_segments)
{
    const struct history *h = d->h;
    if (d->foreign || h->clock_set || h->m.n_faults)
        return false;
    return left == LEFT_CLEAN || !d->process || (left == LEFT_KILLED && !no_segments);
}

/* ---- guests ---- */

struct guest {
    struct life *life;
    struct disk *disk;
    unsigned actions;
};

/* Somewhere, of any length, sometimes where others are, too. */
static void somewhere(struct dice *d, unsigned hot, uint64_t sectors, uint64_t *first, uint64_t *n)
{
    static const uint8_t lengths[] = {1, 1, 1, 2, 3, 8, 8, 16, 40, 130};
    *n = 1 + dice_below(d, lengths[dice_below(d, ARRAY_SIZE(lengths))]);
    *first =
        dice_below(d, 100) < hot ? dice_below(d, min_u64(16, sectors)) : dice_below(d, sectors);
    if (settings.small)
        *n = 1 + *n % 2;
    *n = min_u64(*n, sectors - *first);
}

static void guest_write(struct guest *gu)
{
    struct history *h = gu->life->h;
    struct disk *d = gu->disk;
    uint64_t first, n;
    somewhere(&h->dice, h->mood.hot, d->model.n, &first, &n);
    if (h->limits.slots && !one_in(&h->more_dice, 16)) /* up to three regions, mostly */
        n = min_u64(n, (UINT64_C(2) << h->limits.region_bits) / MODEL_SECTOR);
    if (!model_has_room(&d->model, first, n))
        return;
    enum { DISCARD, ZEROES, WRITE } kind = WRITE;
    unsigned chance = (unsigned)dice_below(&h->dice, 100), flags = 0;
    if (chance < h->mood.discards + h->mood.zeroes)
        kind = chance < h->mood.discards ? DISCARD : ZEROES;
    else if (dice_below(&h->dice, 100) < h->mood.fua)
        flags = REQ_FUA;
    struct range r = range_make(first * MODEL_SECTOR, n * MODEL_SECTOR);
    uint32_t stamp = kind != WRITE ? 0 : ++h->next_stamp;
    uint64_t begun = model_begin(&d->model, first, n, stamp);
    int result;
    machine_note(&h->m, "guest %s %llu+%llu stamp %u%s", kind == DISCARD ? "discards" : "writes",
                 (unsigned long long)first, (unsigned long long)n, stamp, flags ? " fua" : "");
    if (kind == DISCARD) {
        result = edge_discard(d->edge, r);
    } else if (kind == ZEROES) {
        result = edge_write_zeroes(d->edge, r, one_in(&h->dice, 2) ? REQ_MAY_UNMAP : 0);
    } else {
        uint8_t *buf = malloc(r.length);
        assert(buf);
        for (uint64_t i = 0; i < n; i++)
            stamp_fill(buf + i * MODEL_SECTOR, stamp);
        result = edge_write(d->edge, r, buf, flags);
        free(buf);
    }
    h->writes++;
    machine_note(&h->m, "guest's stamp %u: %d", stamp, result);
    /* what is discarded may be there or not */
    model_end(&d->model, first, n, begun, result == 0 && kind != DISCARD, flags & REQ_FUA);
    if (result < 0 && !h->with_faults)
        violation(h, "a write fails without reason: %s", strerror(-result));
}

static void guest_flush(struct guest *gu)
{
    struct history *h = gu->life->h;
    struct disk *d = gu->disk;
    uint64_t begun = model_now(&d->model);
    int r = edge_flush(d->edge);
    h->flushes++;
    machine_note(&h->m, "guest's flush: %d", r);
    if (r == 0 && d->sync_failed && begun > d->sync_failed_at)
        violation(h, "%s: a flush succeeds after a sync of the file has failed", d->node);
    model_flushed(&d->model, begun, r == 0);
    if (r == 0)
        d->n_other_sizes = 0; /* it was not resized beside guests */
    if (r < 0 && !h->with_faults)
        violation(h, "a flush fails without reason: %s", strerror(-r));
}

static void guest_read(struct guest *gu)
{
    struct history *h = gu->life->h;
    struct disk *d = gu->disk;
    uint64_t first, n;
    somewhere(&h->dice, h->mood.hot, d->model.n, &first, &n);
    uint8_t *buf = malloc(n * MODEL_SECTOR);
    assert(buf);
    int r = edge_read(d->edge, range_make(first * MODEL_SECTOR, n * MODEL_SECTOR), buf, 0);
    for (uint64_t i = 0; r == 0 && i < n; i++) {
        uint32_t stamp;
        /* Who writes at the same time may be seen half: only what is whole is asked for. */
        if (!stamp_read(buf + i * MODEL_SECTOR, &stamp) && d->model.cells[first + i].n < 2 &&
            !d->sync_failed)
            violation(h, "%s: sector %llu is torn", d->node, (unsigned long long)(first + i));
    }
    free(buf);
}

static int guest_task(void *arg)
{
    struct guest *gu = arg;
    struct history *h = gu->life->h;
    SHIELD();
    for (unsigned i = 0; i < gu->actions; i++) {
        if (dice_below(&h->dice, 100) < h->mood.flushes)
            guest_flush(gu);
        else if (one_in(&h->dice, 16))
            guest_read(gu);
        else
            guest_write(gu);
        if (one_in(&h->dice, 3))
            history_nap(gu->life, 2000);
    }
    gu->life->guests_running--;
    return 0;
}

/* ---- what a life finds ---- */

/* The whole disk against the model. Nobody writes. */
static void judge_content(struct life *l, struct disk *d)
{
    struct history *h = l->h;
    uint8_t *buf = malloc(d->size);
    assert(buf);
    /* A qcow2 image's tables are in the program's memory until a flush, as QEMU's are. */
    bool only_flushed = d->left == LEFT_POWERLESS || (d->left != LEFT_CLEAN && d->qcow2);
    int r = history_read_all(d->edge, d->size, buf);
    if (r < 0)
        violation(h, "%s cannot be read: %s", d->node, strerror(-r));
    for (uint64_t i = 0; i < d->model.n; i++) {
        uint32_t stamp;
        char known[400];
        bool whole = stamp_read(buf + i * MODEL_SECTOR, &stamp);
        if (whole && (only_flushed ? model_may_survive(&d->model, i, stamp)
                                   : model_may_read(&d->model, i, stamp))) {
            model_seen(&d->model, i, stamp, d->left == LEFT_POWERLESS);
            continue;
        }
        model_describe(&d->model, i, known, sizeof known);
        violation(h, "%s: sector %llu holds %#x%s after %s; known: %s", d->node,
                  (unsigned long long)i, stamp, whole ? "" : " (torn)", lefts[d->left], known);
    }
    d->left = LEFT_CLEAN;
    free(buf);
}

static bool qemu_img_finds_damage(struct history *h, const uint8_t *bytes, uint64_t size)
{
    static unsigned dumped;
    char path[256], command[600];
    if (!settings.qemu_img || dumped++ % settings.qemu_img_every)
        return false;
    snprintf(path, sizeof path, "%s/sim-%d.qcow2", settings.qemu_img, (int)getpid());
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f))
        violation(h, "cannot write %s", path);
    snprintf(command, sizeof command, "qemu-img check -q -f qcow2 %s >%s.out 2>&1", path, path);
    int r = system(command);
    if (r == 0 || WEXITSTATUS(r) == 3) {
        snprintf(command, sizeof command, "%s.out", path);
        unlink(command);
        unlink(path);
        return false;
    }
    snprintf(command, sizeof command, "tail -5 %s.out >&2", path);
    (void)!system(command);
    fprintf(stderr, "sim: qemu-img check: %d; the image is %s\n", WEXITSTATUS(r), path);
    return true;
}

/* The images as they lie there: nothing worse than leaks. */
static void judge_files(struct history *h, const char *when)
{
    for (unsigned i = 0; i < h->n_disks; i++) {
        uint64_t size;
        struct disk *d = &h->disks[i];
        uint8_t *bytes = d->qcow2 ? machine_dump(&h->m, d->path, &size) : NULL;
        const char *damage = bytes ? qcow2_damage(bytes, size) : NULL;
        if (damage)
            violation(h, "%s after %s: %s", d->path, when, damage);
        if (bytes && qemu_img_finds_damage(h, bytes, size))
            violation(h, "%s after %s: qemu-img check says so", d->path, when);
        free(bytes);
    }
}

/* ---- glimpses: what if the power went now? ---- */

static uint64_t entry_at(const uint8_t *bytes, uint64_t size, uint64_t at)
{
    return at + 8 <= size ? entry_load(bytes + at, 0) : 0;
}

/* One sector of the disk in the bytes of its image, which have been checked. */
static const uint8_t *imagined_sector(const struct disk *d, const uint8_t *bytes, uint64_t size,
                                      uint64_t l1_offset, uint64_t sector)
{
    static const uint8_t zeroes[MODEL_SECTOR];
    uint64_t at = sector * MODEL_SECTOR;
    if (d->qcow2) {
        uint64_t in = at % d->cluster, cluster = at / d->cluster, entries = d->cluster / 8;
        uint64_t l1e = entry_at(bytes, size, l1_offset + cluster / entries * 8);
        uint64_t l2 = l1e & ENTRY_OFFSET_MASK;
        uint64_t e = l2 ? entry_at(bytes, size, l2 + cluster % entries * 8) : 0;
        if (!(e & ENTRY_OFFSET_MASK) || (e & ENTRY_ZERO))
            return zeroes;
        at = (e & ENTRY_OFFSET_MASK) + in;
    }
    return at < size ? bytes + at : zeroes; /* behind SIZE there are zeroes, to the sector's end */
}

static void glimpse_disk(struct history *h, struct disk *d)
{
    struct choices c = {0};
    uint64_t size, l1 = 0;
    choices_by_dice(&c, &h->m.glimpse_dice);
    uint8_t *bytes = machine_imagine(&h->m, d->path, &c, &size);
    const char *damage = d->qcow2 ? qcow2_damage(bytes, size) : NULL;
    if (damage)
        violation(h, "%s, if the power went at event %llu: %s", d->path,
                  (unsigned long long)h->m.events, damage);
    if (d->qcow2)
        memcpy(&l1, bytes + 40, 8);
    for (uint64_t i = 0; i < d->model.n; i++) {
        uint32_t stamp;
        char known[400];
        const uint8_t *sector = imagined_sector(d, bytes, size, be64toh(l1), i);
        if (stamp_read(sector, &stamp) && model_may_survive(&d->model, i, stamp))
            continue;
        model_describe(&d->model, i, known, sizeof known);
        violation(h, "%s, if the power went at event %llu: sector %llu holds %#x; known: %s",
                  d->node, (unsigned long long)h->m.events, (unsigned long long)i, stamp, known);
    }
    free(bytes);
}

static void glimpse(void *opaque)
{
    struct history *h = opaque;
    h->glimpses++;
    for (unsigned i = 0; i < h->n_disks; i++)
        if (h->disks[i].made)
            glimpse_disk(h, &h->disks[i]);
}

/* ---- a life ---- */

static void create_image(struct life *l, struct disk *d)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *file = history_json("{'driver':'file','filename':'%s','size':%llu}",
                                            d->path, d->qcow2 ? 0ull : (unsigned long long)d->size);
    int r = graph_create(l->g, file, &err);
    if (r == 0 && d->qcow2) {
        CLEANUP(json_putp)
        struct json_object *image =
            history_json("{'driver':'qcow2','file':{'driver':'file','filename':'%s'},'size':%llu,"
                         "'cluster-size':%u}",
                         d->path, (unsigned long long)d->size, d->cluster);
        r = graph_create(l->g, image, &err);
    }
    if (r < 0)
        violation(l->h, "%s cannot be made: %s", d->path, err.text);
}

static void use_disk(struct life *l, struct disk *d)
{
    struct error err = ERROR_INIT;
    d->user = (struct user){&history_user_ops};
    if (edge_attach_user(&d->user, d->n, "root", PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL,
                         &d->edge, &err) < 0)
        violation(l->h, "%s cannot be used: %s", d->node, err.text);
}

static void set_size(struct life *l, struct disk *d, uint64_t to)
{
    struct error err = ERROR_INIT;
    struct user u = {&history_user_ops};
    struct edge *e;
    bool cut_before = d->cut_in_flight;
    d->cut_in_flight = true; /* if it is cut here */
    /* A root: beside another kind of parent no mirror begins. */
    int r = edge_attach_user(&u, d->n, "root", PERM_RESIZE, PERM_ALL, &e, &err);
    if (r == 0) {
        l->h->m.store.free_memory += INT32_MAX; /* on a full tmpfs it is refused, which is dull */
        r = edge_truncate(e, to, false, &err);
        l->h->m.store.free_memory -= INT32_MAX;
        edge_detach(e);
    }
    d->cut_in_flight = cut_before;
    if (r < 0)
        violation(l->h, "%s cannot be resized to %llu: %s", d->node, (unsigned long long)to,
                  err.text);
}

static bool may_have_size(const struct disk *d, uint64_t size)
{
    for (unsigned i = 0; i < d->n_other_sizes; i++)
        if (d->other_sizes[i] == size)
            return true;
    return d->size == size;
}

/* It gets another size, or has had it. */
static void note_size(struct disk *d, uint64_t size)
{
    if (may_have_size(d, size))
        return;
    assert(d->n_other_sizes < OTHER_SIZES);
    d->other_sizes[d->n_other_sizes++] = size;
}

/* Smaller, and as large as it was: what was cut off reads as zeroes. Or larger first. */
static void resize_disk(struct life *l, struct disk *d)
{
    struct dice *more = &l->h->more_dice;
    uint64_t first = 1 + dice_below(more, d->model.n - 1), n = d->model.n - first;
    if (d->n_other_sizes == OTHER_SIZES)
        return;
    if (one_in(more, 3)) {
        /* What grows is dirty, outwards to whole granules. */
        d->model.cells[d->model.n - 1].last_active = model_now(&d->model);
        const uint64_t larger = d->size + (1 + dice_below(more, 64)) * 16 * KiB;
        note_size(d, larger);
        set_size(l, d, larger);
        set_size(l, d, d->size);
        return;
    }
    if (!model_has_room(&d->model, first, n))
        return;
    uint64_t begun = model_begin(&d->model, first, n, 0);
    note_size(d, first * MODEL_SECTOR);
    set_size(l, d, first * MODEL_SECTOR);
    if (one_in(more, 2))
        history_nap(l, 2000);
    set_size(l, d, d->size);
    model_end(&d->model, first, n, begun, true, false);
}

/* Read-only for a while, and back. */
static void close_for_a_while(struct life *l, struct disk *d)
{
    struct error err = ERROR_INIT;
    edge_detach(d->edge);
    int r = node_set_read_only(d->n, true, &err);
    if (r == 0) {
        (void)!sleep_until(clock_after_ns(NSEC_PER_SEC / 10));
        others_while_closed(l->h, d);
        r = node_set_read_only(d->n, false, &err);
    }
    if (r < 0)
        violation(l->h, "%s cannot be reopened: %s", d->node, err.text);
    use_disk(l, d);
}

static void open_disk(struct life *l, struct disk *d)
{
    struct error err = ERROR_INIT;
    char json[600];
    snprintf(json, sizeof json,
             "{'driver':'%s','node-name':'%s','discard':'unmap','cache':{'direct':%s},"
             "'file':{'driver':'file','filename':'%s'}%s}",
             d->qcow2 ? "qcow2" : "raw", d->node, d->direct ? "true" : "false", d->path,
             l->foreign ? ",'x-tidemark-persist':{'level':'off'}" : d->extra);
    int r = history_open(l, json, &d->n, &err);
    if (r < 0)
        violation(l->h, "%s cannot be opened: %s", d->path, err.text);
    const uint64_t found = node_size(d->n);
    if (!may_have_size(d, found))
        violation(l->h, "%s has %llu bytes, not %llu", d->node, (unsigned long long)found,
                  (unsigned long long)d->size);
    if (d->size_settles)
        d->n_other_sizes = 0;
    d->size_settles = false;
    if (found != d->size) { /* cut while it was resized */
        note_size(d, found);
        set_size(l, d, d->size);
    }
    use_disk(l, d);
}

/* A disk is taken away, or brought back, with its tide file. */
static void come_and_go(struct history *h, struct disk *d, bool absent)
{
    char tide[SIM_PATH + 8], away[SIM_PATH + 16];
    HEAP_OF_THE_MACHINE();

    if (d->absent == absent)
        return;
    d->absent = absent;
    snprintf(tide, sizeof tide, "%s.tide", d->path);
    snprintf(away, sizeof away, "%s.away", tide);
    if (store_rename(&h->m.store, absent ? tide : away, absent ? away : tide) == 0)
        store_sync_dir(&h->m.store, store_dir(&h->m.store, "/d"), store_moment(&h->m.store) + 1);
    machine_note(&h->m, "%s %s", d->node, absent ? "is away" : "comes");
}

bool history_in_doubt(struct node *n)
{
    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (dirty_held(bm))
            return true;
    return false;
}

void history_open_late(struct life *l)
{
    struct history *h = l->h;

    if (!l->late || !one_in(&h->more_dice, 4))
        return;
    l->late = false;
    for (unsigned i = 0; i < h->n_disks; i++) {
        struct disk *d = &h->disks[i];
        if (!d->absent)
            continue;
        const struct faults faults = h->m.faults; /* it comes well */
        h->m.faults = (struct faults){.path = ""};
        d->coming = true;
        come_and_go(h, d, false);
        open_disk(l, d);
        judge_content(l, d);
        d->coming = false;
        for (unsigned k = 0; k < h->n_clients; k++)
            if (h->clients[k].disk == d && h->clients[k].ops->opened)
                h->clients[k].ops->opened(h->clients[k].self, l);
        h->m.faults = faults;
    }
}

struct client_call {
    struct life *life;
    unsigned number;
};

static int client_task(void *arg)
{
    struct client_call *call = arg;
    struct history *h = call->life->h;
    SHIELD();
    h->clients[call->number].ops->run(h->clients[call->number].self, call->life);
    return 0;
}

/* Its client knows of nothing then, but for the end of the life. */
static bool is_absent(const struct disk *d)
{
    return d && d->absent;
}

#define ALL_CLIENTS(h, function, ...)                                                              \
    for (unsigned k = 0; k < (h)->n_clients; k++)                                                  \
        if ((h)->clients[k].ops->function && !is_absent((h)->clients[k].disk))                     \
    (h)->clients[k].ops->function((h)->clients[k].self __VA_OPT__(, ) __VA_ARGS__)

#define PRESENT_CLIENTS(l, function, ...)                                                          \
    for (unsigned k = 0; k < (l)->h->n_clients; k++)                                               \
        if ((l)->h->clients[k].ops->function && !((l)->absent >> k & 1) &&                         \
            !is_absent((l)->h->clients[k].disk))                                                   \
    (l)->h->clients[k].ops->function((l)->h->clients[k].self, __VA_ARGS__)

bool history_absent(const struct life *l, const void *client)
{
    for (unsigned k = 0; k < l->h->n_clients; k++)
        if (l->h->clients[k].self == client)
            return l->absent >> k & 1;
    return false;
}

static void on_event(void *opaque, const char *name, struct json_object *data)
{
    struct life *l = opaque;
    struct history *h = l->h;
    const char *what = json_get_string(data, "status", json_get_string(data, "error", ""));
    machine_note(&h->m, "event %s %s %s", name,
                 json_get_string(data, "device", json_get_string(data, "id", "")), what);
    HEAP_OF_THE_MACHINE();
    PRESENT_CLIENTS(l, event, l, name, data);
}

static void enough_room(struct history *h)
{
    if (h->m.store.free_blocks < INT32_MAX / 2)
        h->m.store.free_blocks += INT32_MAX;
}

static void count_checkpoints(struct history *h)
{
    for (unsigned i = 0; i < h->n_disks; i++) {
        CLEANUP(json_putp)
        struct json_object *info = h->disks[i].n ? persist_hot_info(h->disks[i].n) : NULL;
        if (!info)
            continue;
        h->checkpoints_done.idle += json_get_uint(info, "idle-checkpoints", 0);
        h->checkpoints_done.period += json_get_uint(info, "period-checkpoints", 0);
        h->checkpoints_done.flush += json_get_uint(info, "flush-checkpoints", 0);
        h->checkpoints_done.left += json_get_uint(info, "left", 0);
    }
}

static void clients_look(struct life *l)
{
    struct history *h = l->h;
    PRESENT_CLIENTS(l, opened, l);
    for (unsigned i = 0; i < h->n_disks && !l->absent; i++) /* else somebody has not looked yet */
        h->disks[i].foreign = h->disks[i].blind = false;
}

/* What needs a disk without guests and jobs. */
static void in_between(struct life *l)
{
    struct history *h = l->h;
    for (unsigned i = 0; i < h->n_disks; i++) {
        struct disk *d = &h->disks[i];
        if (d->qcow2 || d->sync_failed)
            continue;
        if (one_in(&h->more_dice, 12))
            resize_disk(l, d);
        if (one_in(&h->more_dice, 8) && !h->with_faults)
            close_for_a_while(l, d);
    }
    clients_look(l);
}

static void live(struct life *l)
{
    struct history *h = l->h;
    struct guest guests[MAX_GUESTS];
    struct client_call calls[MAX_CLIENTS];
    {
        SCOPE(tasks);
        {
            SCOPE(guest_tasks);
            h->m.faults = l->faults;
            if (l->free_blocks >= 0)
                h->m.store.free_blocks = l->free_blocks;
            l->guests_running = h->n_guests;
            l->stopping = false;
            for (unsigned i = 0; i < h->n_guests; i++) {
                struct disk *d = &h->disks[dice_below(&h->dice, h->n_disks)];
                while (d->absent)
                    d = &h->disks[dice_below(&h->dice, h->n_disks)];
                guests[i] = (struct guest){
                    l, d,
                    4 + (unsigned)dice_below(&h->dice,
                                             settings.small || settings.exhaustive ? 4 : 40)};
                scope_spawn(&guest_tasks, guest_task, &guests[i]);
            }
            for (unsigned i = 0; i < h->n_clients; i++) {
                calls[i] = (struct client_call){l, i};
                if (h->clients[i].ops->run && !(l->absent >> i & 1) &&
                    !is_absent(h->clients[i].disk))
                    scope_spawn(&tasks, client_task, &calls[i]);
            }
            (void)!scope_join(&guest_tasks);
        }
        l->stopping = true;
        (void)!scope_join(&tasks);
    }
    enough_room(h);
    h->m.faults = (struct faults){.path = ""};
    ALL_CLIENTS(h, quiet, l);
    count_checkpoints(h);
    others_copy_segments(h);
    /* Idle, and then it dies. */
    if (settings.persist && one_in(&h->more_dice, 6)) {
        for (unsigned i = 0; i < h->n_disks; i++)
            if (h->disks[i].n)
                persist_save_idle(h->disks[i].n);
        if (l->number <= h->lives && one_in(&h->more_dice, 2))
            h->m.kill_at = h->m.events + 1;
    }
}

static int life_main(void *arg)
{
    struct life *l = arg;
    struct history *h = l->h;
    l->g = graph_new();
    dirty_init(l->g);
    persist_init(l->g);
    if (h->limits.slots)
        persist_set_limits(l->g, h->limits.region_bits, h->limits.slots, h->limits.slice);
    persist_set_checkpoints(l->g, h->checkpoints.idle_ns, h->checkpoints.period_ns,
                            h->checkpoints.rest_ns);
    if (h->with_runtime)
        persist_set_runtime(l->g, SIM_RUNTIME);
    copy_register_drivers(l->g);
    l->js = jobs_new(l->g);
    jobs_set_listener(l->js, on_event, l);
    h->life = l;
    unsigned first = settings.groups ? (unsigned)dice_below(&h->more_dice, h->n_disks) : 0;
    for (unsigned i = 0; i < h->n_disks; i++) {
        struct disk *d = &h->disks[(first + i) % h->n_disks];
        if (d->absent)
            continue;
        if (!l->number)
            create_image(l, d);
        open_disk(l, d);
        judge_content(l, d);
    }
    if (!l->number) {
        for (unsigned i = 0; i < h->n_disks; i++) /* what is made is durable when it is flushed */
            if (edge_flush(h->disks[i].edge) < 0)
                violation(h, "%s cannot be flushed", h->disks[i].node);
            else
                h->disks[i].made = true;
        ALL_CLIENTS(h, made, l);
    } else {
        clients_look(l);
        if (with_others())
            in_between(l);
        live(l);
        if (with_others() && one_in(&h->more_dice, 4)) {
            in_between(l);
            live(l);
        }
    }
    machine_note(&h->m, "closing");
    jobs_cancel_all(l->js);
    for (unsigned i = 0; i < h->n_disks; i++) {
        if (!h->disks[i].n)
            continue;
        edge_detach(h->disks[i].edge);
        node_unref(h->disks[i].n);
    }
    jobs_free(l->js);
    graph_free(l->g);
    return 0;
}

/* ---- between lives ---- */

static void sync_failed(void *opaque, const char *path)
{
    struct history *h = opaque;
    for (unsigned i = 0; i < h->n_disks; i++) {
        struct disk *d = &h->disks[i];
        if (strcmp(d->path, path))
            continue;
        model_taint(&d->model);
        d->sync_failed = true;
        d->sync_failed_at = model_now(&d->model);
    }
}

static void between(struct history *h, enum life_end end, bool faulty)
{
    bool power = one_in(&h->dice, end == END_CLEAN ? 4 : 2);
    if (settings.exhaustive)
        power = end == END_KILLED && h->m.choices.power_goes;
    h->life = NULL;
    h->faulty = faulty;
    h->m.faults = (struct faults){.path = ""};
    enough_room(h);
    if (h->m.store.free_memory < INT32_MAX / 2)
        h->m.store.free_memory += INT32_MAX;
    for (unsigned i = 0; i < h->n_disks; i++) {
        /* Who opened a file again after a failed sync would find in the page cache, clean, what the
         * disk never got, and nobody could tell: so then the machine goes down. */
        power |= h->disks[i].sync_failed;
        h->disks[i].cut_in_flight =
            end == END_KILLED && (h->disks[i].cut_in_flight || model_in_flight(&h->disks[i].model));
        model_cut(&h->disks[i].model);
        h->disks[i].jobs = 0;
        h->disks[i].alone = false;
        if (end == END_KILLED && h->disks[i].left <= LEFT_FAILING) /* (or it was not looked at) */
            h->disks[i].left = LEFT_KILLED;
        if (end == END_CLEAN && faulty && h->disks[i].left == LEFT_CLEAN)
            h->disks[i].left = LEFT_FAILING;
    }
    judge_files(h, end == END_KILLED ? "a kill" : "a clean close");
    if (end == END_KILLED)
        h->kills++;
    if (power) {
        machine_lose_power(&h->m);
        others_spoil(h);
        for (unsigned i = 0; i < h->n_disks; i++) {
            h->disks[i].left = LEFT_POWERLESS;
            h->disks[i].size_settles = true;
            h->disks[i].cut_in_flight = false;
        }
        judge_files(h, "a power loss");
        h->power_losses++;
    }
    for (unsigned i = 0; i < h->n_disks; i++)
        come_and_go(h, &h->disks[i], false);
    bool no_segments = others_disturb_segments(h) || !h->with_runtime || h->no_memory;
    ALL_CLIENTS(h, ended, end, power, no_segments);
    for (unsigned i = 0; i < h->n_disks; i++)
        h->disks[i].sync_failed = false;
    others_between(h, end, power);
    machine_pass_time(&h->m, dice_below(&h->dice, 10) * NSEC_PER_SEC / 4);
    if (one_in(&h->dice, 20)) { /* somebody sets the clock */
        machine_set_wall(&h->m, (int64_t)dice_below(&h->dice, 20000000) - 10000000);
        h->clock_set = true;
        for (unsigned i = 0; i < h->n_disks; i++) /* the witness goes by it */
            h->disks[i].blind |= h->disks[i].foreign;
    }
}

/* How its bitmaps are kept. */
static void draw_level(struct history *h, struct disk *d)
{
    struct dice *more = &h->more_dice;
    d->process = one_in(more, 8);
    const char *level = d->process ? "process" : "power";
    d->slots = h->limits.slots ? h->limits.slots : 4;
    d->region_bytes = h->limits.slots ? UINT64_C(1) << h->limits.region_bits : MiB;
    if (h->limits.slots)
        snprintf(d->extra, sizeof d->extra, ",'x-tidemark-persist':{'level':'%s'}", level);
    else
        snprintf(d->extra, sizeof d->extra,
                 ",'x-tidemark-persist':{'level':'%s','region-size':%llu,'budget':%llu}", level,
                 (unsigned long long)d->region_bytes,
                 (unsigned long long)(d->slots * d->region_bytes));
}

static void draw_disk(struct history *h, unsigned number)
{
    static const uint32_t clusters[] = {512, 512, 1024, 4096, 65536};
    struct disk *d = &h->disks[number];
    *d = (struct disk){
        .h = h,
        .number = number,
        .qcow2 = !one_in(&h->dice, 4),
        .direct = one_in(&h->dice, 2),
        .cluster = clusters[dice_below(&h->dice, ARRAY_SIZE(clusters))],
        .size = (1 + dice_below(&h->dice, 4)) * 64 * KiB,
    };
    if (one_in(&h->dice, 3))
        d->size -= 512 * dice_below(&h->dice, 100);
    if (d->qcow2 && d->cluster == 512 && one_in(&h->dice, 3)) /* many L2 tables */
        d->size += MiB;
    if (settings.persist) { /* that is about tide files: as many raw ones */
        struct dice *more = &h->more_dice;
        d->qcow2 = one_in(more, 2);
        if (!d->qcow2)
            d->size = (16 + dice_below(more, 48)) * 4 * KiB;
        if (one_in(more, 16)) /* bits of more than one sector */
            d->size += 2 * MiB;
    }
    if (settings.small) {
        d->size = 16 * MODEL_SECTOR;
        d->cluster = 512;
    }
    d->slots = 1024;
    d->region_bytes = 16 * MiB;
    if (settings.persist)
        draw_level(h, d);
    snprintf(d->node, sizeof d->node, "disk%u", number);
    snprintf(d->path, sizeof d->path, "/d/disk%u.%s", number, d->qcow2 ? "qcow2" : "raw");
    model_init(&d->model, d->size / MODEL_SECTOR);
}

static unsigned one_of(struct dice *d, unsigned a, unsigned b, unsigned c, unsigned e)
{
    const unsigned all[] = {a, b, c, e};
    return all[dice_below(d, 4)];
}

static void draw_mood(struct history *h)
{
    h->mood.discards = one_of(&h->dice, 0, 5, 10, 40);
    h->mood.zeroes = one_of(&h->dice, 0, 5, 10, 30);
    h->mood.flushes = one_of(&h->dice, 0, 5, 15, 30);
    h->mood.fua = one_of(&h->dice, 0, 5, 10, 50);
    h->mood.hot = one_of(&h->dice, 0, 30, 30, 80);
}

/* Regions of a few granules, and few of them, so that they come and go. */
static void draw_limits(struct history *h)
{
    struct dice *more = &h->more_dice;
    if (!settings.persist || one_in(more, 16))
        return;
    h->limits.region_bits = 10 + (unsigned)dice_below(more, 4);
    h->limits.slots = 4 + (unsigned)dice_below(more, 5);
    h->limits.slice = 1 + (unsigned)dice_below(more, h->limits.slots);
}

/* Guests rest for up to 2 ms, clients for 20: some of it is long enough to be idle. Half of the
 * histories have none: who copies bits all the time puts right what something else has lost. */
static void draw_checkpoints(struct history *h)
{
    static const uint64_t idle_us[] = {0, 10, 100, 500, 1500, 5000, 2000000};
    static const uint64_t period_us[] = {0, 500, 5000, 50000};
    static const uint64_t rest_us[] = {0, 0, 5000, 1000000};
    struct dice d = {h->seed ^ 0xc4ec}; /* of its own, so that the rest stays as it was */
    h->checkpoints.rest_ns = UINT64_MAX;
    if (one_in(&d, 2))
        return;
    h->checkpoints.idle_ns = 1000 * idle_us[dice_below(&d, ARRAY_SIZE(idle_us))];
    h->checkpoints.period_ns = 1000 * period_us[dice_below(&d, ARRAY_SIZE(period_us))];
    h->checkpoints.rest_ns = 1000 * rest_us[dice_below(&d, ARRAY_SIZE(rest_us))];
}

/* A tmpfs that is full at times: then there are no run segments, or some. */
static void draw_memory(struct history *h)
{
    h->memory_dice = (struct dice){h->seed ^ 0x7f5};
    h->memory_short = settings.persist && !settings.exhaustive && one_in(&h->memory_dice, 6);
}

static void take_memory(struct history *h)
{
    h->no_memory = h->memory_short && one_in(&h->memory_dice, 2);
    if (!h->no_memory)
        return;
    h->m.store.free_memory = (int64_t)dice_below(&h->memory_dice, 12) * SIM_BLOCK;
    h->runtime_disturbed = true; /* there may be no place for a stamp */
    machine_note(&h->m, "%llu bytes of tmpfs are free", (unsigned long long)h->m.store.free_memory);
}

static struct faults draw_faults(struct history *h)
{
    static const unsigned rates[] = {0, 0, 50, 200, 1000};
    struct faults f = {.path = ""};
    if (!h->with_faults || one_in(&h->dice, 3))
        return f;
    f.read = one_in(&h->dice, 3) ? rates[dice_below(&h->dice, ARRAY_SIZE(rates))] : 0;
    f.write = rates[dice_below(&h->dice, ARRAY_SIZE(rates))];
    f.sync = rates[dice_below(&h->dice, ARRAY_SIZE(rates))];
    f.space = one_in(&h->dice, 2) ? rates[dice_below(&h->dice, ARRAY_SIZE(rates))] : 0;
    return f;
}

/* When a life is killed: at an early event as likely as at a late one; often never. */
static uint64_t draw_kill(struct history *h)
{
    if (one_in(&h->dice, 4))
        return 0;
    if (settings.persist && !one_in(&h->more_dice, 3)) /* not in its opening */
        return 150 + dice_below(&h->more_dice, 1200);
    return 1 + dice_below(&h->dice, (uint64_t)16 << dice_below(&h->dice, 8));
}

/* A program that writes qcow2 images as QEMU does: it keeps their bitmaps until its own end, and
 * takes away what it does not know. */
static bool is_foreign(struct history *h, unsigned number)
{
    for (unsigned i = 0; i < h->n_disks; i++)
        if (!h->disks[i].qcow2)
            return false;
    return settings.persist && !settings.groups && number > 1 && one_in(&h->more_dice, 3);
}

static void one_life(struct history *h, unsigned number)
{
    struct life l = {.h = h, .number = number, .faults_before = h->m.n_faults};
    h->life_number = number;
    for (unsigned i = 0; i < h->n_disks; i++)
        h->disks[i].n = NULL, h->disks[i].coming = false;
    if (settings.groups && number && !one_in(&h->more_dice, 3)) {
        come_and_go(h, &h->disks[dice_below(&h->more_dice, h->n_disks)], true);
        l.late = one_in(&h->more_dice, 2);
    }
    uint64_t kill_at = number ? draw_kill(h) : 0;
    if (settings.groups && !one_in(&h->more_dice, 4))
        kill_at = 0; /* its clients see to that */
    l.foreign = is_foreign(h, number);
    /* Who has not seen what another program did cannot know it from what comes after. */
    for (unsigned k = 0; k < h->n_clients && with_others() && number; k++)
        if (l.foreign || one_in(&h->more_dice, h->after_foreign ? 2 : 8))
            l.absent |= 1u << k;
    if ((l.foreign || h->after_foreign) && one_in(&h->more_dice, 2))
        kill_at = 1 + dice_below(&h->more_dice, 128);
    h->after_foreign = l.foreign;
    for (unsigned k = 0; k < h->n_clients; k++)
        if (l.absent >> k & 1)
            h->clients[k].ops->absent(h->clients[k].self, l.foreign);
    if (number == 1 && settings.kill_at)
        kill_at = settings.kill_at;
    l.faults = number ? draw_faults(h) : (struct faults){.path = ""};
    l.free_blocks = -1;
    if (h->with_faults && number && one_in(&h->dice, 4))
        l.free_blocks = (int64_t)dice_below(&h->dice, 200);
    machine_note(&h->m, "%slife %u, killed at %llu; faults %u %u %u %u",
                 l.foreign ? "foreign " : "", number, (unsigned long long)kill_at, l.faults.read,
                 l.faults.write, l.faults.sync, l.faults.space);
    h->m.kill_near = settings.persist && one_in(&h->more_dice, 3) ? ".tide" : NULL;
    if (settings.exhaustive)
        h->m.kill_near = NULL; /* each event once */
    if (number)
        take_memory(h);
    int r = machine_live(&h->m, kill_at, life_main, &l);
    if (r < 0 && r != -EOWNERDEAD)
        violation(h, "the program ended with %s", strerror(-r));
    h->last_life_events = h->m.events - h->m.life_events;
    between(h, r < 0 ? END_KILLED : END_CLEAN, h->m.n_faults != l.faults_before);
}

static void add_client(struct history *h, struct disk *d, const struct client_ops *ops)
{
    h->clients[h->n_clients].ops = ops;
    h->clients[h->n_clients].disk = d;
    h->clients[h->n_clients].self = ops->start(h, d);
    h->n_clients++;
}

/* So little that all can be tried that a crash may leave: a disk or two of 16 sectors, writes of
 * one or two, one client whose commands copy nothing. */
static void draw_small(struct history *h)
{
    h->n_disks = settings.groups ? 2 : 1;
    h->n_guests = 1;
    h->lives = 1;
    h->mood.flushes = 30;
    h->limits.region_bits = 10;
    h->limits.slots = 4;
    h->limits.slice = 1 + h->limits.slice % 2;
}

uint64_t history_run(uint64_t seed, struct history *totals)
{
    struct history *h = xnew(struct history);
    *h = (struct history){.seed = seed, .dice = {seed}, .more_dice = {seed ^ 0x5ea5}};
    machine_init(&h->m, seed);
    h->m.tracing = settings.tracing;
    h->m.sync_failed = sync_failed;
    h->m.glimpse = glimpse;
    h->m.glimpses = 150;
    h->m.opaque = h;
    h->with_faults = one_in(&h->dice, 4) && !settings.no_faults && !settings.exhaustive;
    h->n_disks = one_in(&h->dice, 3) ? 2 : 1;
    h->n_guests = 1 + (unsigned)dice_below(&h->dice, MAX_GUESTS);
    h->lives = 3 + (unsigned)dice_below(&h->dice, 3);
    h->m.slow = (unsigned)dice_below(&h->dice, 20000);
    draw_mood(h);
    draw_limits(h);
    draw_checkpoints(h);
    draw_memory(h);
    h->with_runtime = !one_in(&h->dice, 6);
    if (settings.groups) {
        h->n_disks = 2 + one_in(&h->more_dice, 3);
        h->lives += 3;
        h->m.glimpses = 1000;
    }
    if (settings.small)
        draw_small(h);
    for (unsigned i = 0; i < h->n_disks; i++) {
        draw_disk(h, i);
        struct disk *d = &h->disks[i];
        if (settings.small && !settings.groups)
            add_client(h, d, &bitmap_client);
        if (settings.small || (settings.groups && !one_in(&h->more_dice, 4)))
            continue; /* few have one of its own */
        for (unsigned k = one_in(&h->dice, 3) ? 2 : 1; k; k--)
            add_client(h, d, &backup_client);
        for (unsigned k = with_others() ? 2 : 0; k && one_in(&h->more_dice, 2); k--)
            add_client(h, d, &bitmap_client);
    }
    for (unsigned k = !settings.groups ? 0
                      : settings.small ? 1
                                       : 1 + (unsigned)dice_below(&h->more_dice, 3);
         k && h->n_clients < MAX_CLIENTS; k--) {
        h->clients[h->n_clients].ops = &groups_client;
        h->clients[h->n_clients].self = groups_client.start(h, NULL);
        h->n_clients++;
    }
    if (settings.exhaustive) {
        h->lives = 1;
        h->n_guests = settings.small ? 1 : 1 + h->n_guests % 2;
        h->m.choices = *settings.exhaustive;
        *settings.exhaustive = (struct choices){0};
    }
    for (unsigned i = 0; i <= h->lives; i++)
        one_life(h, i);
    /* one more, in which nothing goes wrong: what is left is judged */
    h->n_guests = 0;
    h->with_faults = false;
    struct life last = {.h = h, .number = h->lives + 1, .free_blocks = -1};
    for (unsigned i = 0; i < h->n_disks; i++)
        h->disks[i].n = NULL, h->disks[i].coming = false;
    int r = machine_live(&h->m, 0, life_main, &last);
    if (r < 0)
        violation(h, "the program ended with %s", strerror(-r));

    uint64_t hash = h->m.hash;
    if (settings.exhaustive) {
        *settings.exhaustive = h->m.choices;
        h->m.choices = (struct choices){0};
    }
    totals->last_life_events = h->last_life_events;
    totals->writes += h->writes;
    totals->flushes += h->flushes;
    totals->jobs += h->jobs;
    totals->kills += h->kills;
    for (int i = 0; i < LEFTS; i++) {
        totals->bitmaps[i].before += h->bitmaps[i].before;
        totals->bitmaps[i].good += h->bitmaps[i].good;
    }
    totals->checkpoints_done.idle += h->checkpoints_done.idle;
    totals->checkpoints_done.period += h->checkpoints_done.period;
    totals->checkpoints_done.flush += h->checkpoints_done.flush;
    totals->checkpoints_done.left += h->checkpoints_done.left;
    totals->glimpses += h->glimpses;
    totals->power_losses += h->power_losses;
    totals->groups += h->groups;
    totals->doubts += h->doubts;
    totals->m.events += h->m.events;
    totals->m.n_faults += h->m.n_faults;
    for (unsigned i = 0; i < h->n_clients; i++)
        h->clients[i].ops->finish(h->clients[i].self);
    for (unsigned i = 0; i < h->n_disks; i++)
        model_fini(&h->disks[i].model);
    others_fini(h);
    machine_fini(&h->m);
    free(h);
    return hash;
}
