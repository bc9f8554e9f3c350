/* The disk of the histories: see histories.h.
 *
 * A request takes its time, before and after what it does. A write that fails may have done a part
 * of its work, as a real one. `durable` is what a power loss now would leave at least: the content
 * when the last successful flush began. */
#include "histories.h"

#include "rt/clock.h"

static struct disk *disk_of(struct node *n)
{
    return *(struct disk **)n->state;
}

static void take_time(struct disk *d)
{
    SHIELD();
    if (d->slow_ns)
        HOLDS(sleep_until(clock_after_ns(dice(d->slow_ns))) == 0);
}

static bool strikes(struct disk *d, enum request kind, struct range r)
{
    struct fault *f = &d->fault;
    if (f->times == 0 || f->kind != kind)
        return false;
    if (kind != REQUEST_FLUSH && !range_overlaps(f->where, r))
        return false;
    f->times--;
    d->fired++;
    d->fired_flushes += kind == REQUEST_FLUSH;
    trace("%s: a fault strikes", d->name);
    return true;
}

static int open_disk(struct node *n, struct json_object *options, struct error *err)
{
    struct disk *d = history->disks[json_get_uint(options, "disk", 0)];
    *(struct disk **)n->state = d;
    n->size_bytes = d->grows ? d->starts : d->size;
    n->limits.request_alignment = SECTOR;
    if (one_in(2))
        n->write_zeroes_flags = REQ_MAY_UNMAP;
    return 0;
}

static void close_disk(struct node *n)
{
}

static int do_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    struct disk *d = disk_of(n);
    take_time(d);
    if (strikes(d, REQUEST_READ, r))
        return -d->fault.code;
    struct range here =
        range_intersect(r, range_make(0, d->size)); /* a write may have failed there */
    memset(buf, 0, r.length);
    if (!range_empty(here))
        memcpy(buf, d->bytes + here.start, here.length);
    take_time(d);
    return 0;
}

/* BUF NULL: zeroes. */
static int change(struct node *n, struct range r, const void *buf)
{
    struct disk *d = disk_of(n);
    struct range done = r;

    take_time(d);
    if (range_end(r) > (d->room ? d->room : d->size)) {
        d->fired++;
        trace("%s: is full", d->name);
        return -ENOSPC;
    }
    bool bad = strikes(d, REQUEST_WRITE, r);
    if (bad)
        done.length = align_down(dice(r.length + 1), SECTOR);
    history->writes++;
    if (n->gate)
        d->gates[(d->n_gates - 1) % GATES] = history->writes;
    if (done.length)
        marks_note(d, done, true);
    for (uint64_t i = done.start / SECTOR; i < range_end(done) / SECTOR; i++)
        d->wrote[i] = history->writes;
    if (buf)
        memcpy(d->bytes + done.start, buf, done.length);
    else
        memset(d->bytes + done.start, 0, done.length);
    take_time(d);
    history->writes++; /* nobody has been told before */
    for (uint64_t i = r.start / SECTOR; !bad && i < range_end(r) / SECTOR; i++)
        d->took[i] = history->writes;
    return bad ? -d->fault.code : 0;
}

static int do_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    return change(n, r, buf);
}

static int do_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    return change(n, r, NULL);
}

static int do_discard(struct node *n, struct range r)
{
    return change(n, r, NULL);
}

static int do_flush(struct node *node)
{
    struct disk *d = disk_of(node);
    take_time(d);
    /* What is there when it begins, of what has changed since the last one. */
    uint32_t began = history->writes;
    uint64_t n = 0;
    for (uint64_t i = 0; i < d->sectors; i++)
        n += d->wrote[i] > d->flushed;
    uint64_t *sectors = xcalloc(n + 1, sizeof *sectors), k = 0;
    uint8_t *then = xcalloc(n + 1, SECTOR);
    for (uint64_t i = 0; i < d->sectors; i++) {
        if (d->wrote[i] <= d->flushed)
            continue;
        sectors[k] = i;
        memcpy(then + k++ * SECTOR, d->bytes + i * SECTOR, SECTOR);
    }
    take_time(d);
    bool bad = strikes(d, REQUEST_FLUSH, range_make(0, d->size));
    for (k = 0; !bad && k < n; k++)
        memcpy(d->durable + sectors[k] * SECTOR, then + k * SECTOR, SECTOR);
    if (!bad)
        d->flushed = began;
    free(sectors);
    free(then);
    return bad ? -d->fault.code : 0;
}

static bool is_zero(const struct disk *d, uint64_t at)
{
    return d->bytes[at] == 0 && memcmp(d->bytes + at, d->bytes + at + 1, SECTOR - 1) == 0;
}

static int do_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct disk *d = disk_of(n);
    take_time(d);
    uint64_t at = align_down(r.start, SECTOR);
    bool zero = at >= d->size || is_zero(d, at);
    while (at < range_end(r) && (at < d->size ? is_zero(d, at) : true) == zero)
        at += SECTOR;
    ret->length = min_u64(at - r.start, r.length);
    ret->flags = STATUS_ALLOCATED | (zero ? STATUS_ZERO : STATUS_DATA);
    return 0;
}

static int do_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct disk *d = disk_of(n);
    if (!d->grows)
        return error_set(err, ENOTSUP, "a disk of the histories has its size");
    if (size_bytes > (d->room ? d->room : d->size)) {
        d->fired++;
        return error_set(err, ENOSPC, "%s is full", d->name);
    }
    memset(d->bytes + size_bytes, 0, d->size - size_bytes);
    return 0;
}

static void gate_closes(struct node *n)
{
    struct disk *d = disk_of(n);
    d->gates[d->n_gates++ % GATES] = history->writes;
}

static uint64_t cluster_size(const struct node *n)
{
    return (*(struct disk **)n->state)->cluster;
}

const struct driver history_disk = {
    .name = "history-disk",
    .protocol = "history-disk",
    .state_size = sizeof(struct disk *),
    .open = open_disk,
    .close = close_disk,
    .read = do_read,
    .write = do_write,
    .write_zeroes = do_write_zeroes,
    .discard = do_discard,
    .flush = do_flush,
    .status = do_status,
    .truncate = do_truncate,
    .quiesced = gate_closes,
    .cluster_size = cluster_size,
};

static void observe(struct write_observer *o, struct range r)
{
    struct disk *d = container_of(o, struct disk, observer);
    r = range_intersect(r, range_make(0, d->size));
    if (range_empty(r))
        return;
    marks_note(d, r, false);
    for (uint64_t i = r.start / SECTOR; i * SECTOR < range_end(r); i++)
        d->announced[i] = history->writes + 1;
}

static struct disk *disk_make(uint64_t size, uint64_t cluster, bool grows)
{
    struct disk *d = xnew(struct disk);

    HOLDS(history->n_disks < DISKS_MAX);
    snprintf(d->name, sizeof d->name, "d%u", history->n_disks);
    history->disks[history->n_disks++] = d;
    d->size = size;
    d->sectors = size / SECTOR;
    d->cluster = cluster;
    d->grows = grows;
    d->slow_ns = one_in(4) ? 0 : one_in(3) ? 3 * MSEC : MSEC / 4;
    d->bytes = xcalloc(1, size);
    d->durable = xcalloc(1, size);
    d->wrote = xcalloc(d->sectors, sizeof *d->wrote);
    d->took = xcalloc(d->sectors, sizeof *d->took);
    d->announced = xcalloc(d->sectors, sizeof *d->announced);
    TAILQ_INIT(&d->marks);
    return d;
}

static void disk_open(struct disk *d)
{
    struct error err = ERROR_INIT;
    CLEANUP(json_putp)
    struct json_object *o =
        parse("{'driver':'history-disk','node-name':'%s','disk':%u,'discard':'unmap'}", d->name,
              (unsigned)strtoul(d->name + 1, NULL, 10));
    if (graph_open(history->graph, o, &d->node, &err) < 0)
        WRONG("%s", err.text);
    d->observer.mark = observe;
    node_observe(d->node, &d->observer);
}

struct disk *disk_new(uint64_t size, uint64_t cluster)
{
    struct disk *d = disk_make(size, cluster, false);
    disk_open(d);
    return d;
}

struct disk *disk_new_file(uint64_t room)
{
    struct disk *d = disk_make(room, 0, true);
    disk_open(d);
    return d;
}

struct disk *disk_new_file_of(const struct disk *like, const uint8_t *bytes)
{
    struct disk *d = disk_make(like->size, 0, true);
    d->starts = d->size;
    memcpy(d->bytes, bytes, d->size);
    disk_open(d);
    return d;
}

void disk_free(struct disk *d)
{
    struct marks *m;
    if (d->bytes)
        node_unobserve(d->node, &d->observer);
    node_unref(d->node);
    while ((m = TAILQ_FIRST(&d->marks)))
        marks_free(m);
    free(d->bytes);
    free(d->durable);
    free(d->wrote);
    free(d->took);
    free(d->announced);
    free(d);
}

void disk_fill(struct disk *d)
{
    for (uint64_t i = 0; i < d->size; i += SECTOR) {
        memset(d->bytes + i, (int)dice(256), SECTOR);
        memcpy(d->bytes + i, &i, sizeof i);
    }
    for (int i = 0; i < 4; i++) {
        struct range hole = rng_range(&history->rng, d->size / 2);
        memset(d->bytes + hole.start, 0, hole.length);
    }
    memcpy(d->durable, d->bytes, d->size);
}

void disk_arm(struct disk *d)
{
    static const enum request kinds[] = {REQUEST_READ, REQUEST_WRITE, REQUEST_WRITE, REQUEST_FLUSH};
    if (d->file)
        d = d->file;
    d->fault = (struct fault){
        .kind = kinds[dice(ARRAY_SIZE(kinds))],
        .code = one_in(3) ? ENOSPC : EIO,
        .times = one_in(4) ? 40 : 1 + (int)dice(3), /* an end: some try until it works */
        .where = range_make(align_down(dice(d->size), SECTOR), 1 + dice(d->size / 2)),
    };
    trace("%s: armed: kind %d, %d times", d->name, d->fault.kind, d->fault.times);
}

void disk_disarm(struct disk *d)
{
    d->fault.times = 0;
    d->room = 0;
}
