/* Guests: each has one request at a time, several of them share a disk. They write where no other
 * is writing (else nobody could say what is there afterwards; now and then they do it anyway), and
 * what they read must be what was written, wherever a mirror has moved them meanwhile. */
#include "histories.h"

#include "rt/clock.h"

static char *describe(struct user *u)
{
    return xstrdup("a guest");
}

static void nothing(struct user *u, struct edge *e)
{
}

static const struct user_ops ops = {describe, nothing, nothing};

void vdisk_init(struct vdisk *v, struct disk *d)
{
    struct error err = ERROR_INIT;
    v->disk = d;
    v->user.ops = &ops;
    if (edge_attach_user(&v->user, d->node, "root", PERM_CONSISTENT_READ | PERM_WRITE, PERM_ALL,
                         &v->edge, &err) < 0)
        WRONG("%s", err.text);
    v->shadow = xcalloc(1, d->size);
    memcpy(v->shadow, d->bytes, d->size);
    v->unknown = xcalloc(d->sectors, sizeof *v->unknown);
    v->touched = xcalloc(d->sectors, sizeof *v->touched);
}

void vdisk_fini(struct vdisk *v)
{
    edge_detach(v->edge);
    free(v->shadow);
    free(v->unknown);
    free(v->touched);
}

static struct range sectors_of(struct range r)
{
    uint64_t first = r.start / SECTOR;
    return range_make(first, (range_end(r) + SECTOR - 1) / SECTOR - first);
}

static void forget(struct vdisk *v, struct range r)
{
    struct range s = sectors_of(r);
    memset(v->unknown + s.start, true, s.length);
}

static void touch(struct vdisk *v, struct range r)
{
    struct range s = sectors_of(r);
    for (uint64_t i = s.start; i < range_end(s); i++)
        v->touched[i] = history->writes + 1;
}

static bool another_is_there(const struct guest *g, struct range r)
{
    for (unsigned i = 0; i < GUESTS_MAX; i++) {
        const struct guest *other = &g->vdisk->guests[i];
        if (other != g && range_overlaps(other->busy, r))
            return true;
    }
    return false;
}

static void spoil(struct guest *g, struct range r)
{
    for (unsigned i = 0; i < GUESTS_MAX; i++) {
        struct guest *other = &g->vdisk->guests[i];
        if (other != g && range_overlaps(other->busy, r))
            other->spoiled = g->spoiled = true;
    }
}

static void compare(struct vdisk *v, struct range r, const uint8_t *got)
{
    if (memcmp(got, v->shadow + r.start, r.length) == 0)
        return;
    for (uint64_t i = r.start; i < range_end(r); i++) {
        if (v->unknown[i / SECTOR] || got[i - r.start] == v->shadow[i])
            continue;
        WRONG("a guest of %s reads at %#llx what it has not written", v->disk->name,
              (unsigned long long)i);
    }
}

static struct range somewhere(const struct vdisk *v)
{
    uint64_t size = v->disk->size;
    struct range r = rng_range(&history->rng, size);
    r.length = min_u64(r.length, 200000) + 1;
    if (!one_in(6)) {
        r.start = align_down(r.start, SECTOR);
        r.length = align_up(r.length, one_in(2) ? SECTOR : 4096);
    }
    r.length = min_u64(r.length, size - r.start);
    return r;
}

/* A write, or zeroes; the shadow follows when it is known what is there. */
static void guest_writes(struct guest *g, struct range r, bool zero)
{
    struct vdisk *v = g->vdisk;
    if (another_is_there(g, r) && !one_in(20))
        return;
    g->busy = r;
    g->spoiled = false;
    spoil(g, r);
    touch(v, r);
    uint8_t *buf = xcalloc(1, r.length);
    memset(buf, (int)dice(256), r.length);
    for (uint64_t i = 0; i + 8 < r.length; i += SECTOR)
        memcpy(buf + i, &(uint64_t){dice(UINT64_MAX)}, 8);
    int ret = zero ? edge_write_zeroes(v->edge, r, one_in(2) ? REQ_MAY_UNMAP : 0)
                   : edge_write(v->edge, r, buf, one_in(10) ? REQ_FUA : 0);
    touch(v, r);
    if (telling)
        trace("    guest %d of %s: %s %#llx+%#llx: %d%s", (int)(g - v->guests), v->disk->name,
              zero ? "zeroes" : "write", (unsigned long long)r.start, (unsigned long long)r.length,
              ret, g->spoiled ? ", spoiled" : "");
    if (ret < 0 || g->spoiled)
        forget(v, r);
    else if (zero)
        memset(v->shadow + r.start, 0, r.length);
    else
        memcpy(v->shadow + r.start, buf, r.length);
    if (ret == 0 && !g->spoiled) {
        struct range in = range_round_in(r, SECTOR);
        memset(v->unknown + in.start / SECTOR, false, in.length / SECTOR);
    }
    g->busy = range_make(0, 0);
    v->writes++;
    free(buf);
}

static void guest_reads(struct guest *g, struct range r)
{
    struct vdisk *v = g->vdisk;
    if (another_is_there(g, r))
        return;
    g->busy = r;
    g->spoiled = false;
    uint8_t *buf = xcalloc(1, r.length);
    if (edge_read(v->edge, r, buf, 0) == 0 && !g->spoiled)
        compare(v, r, buf);
    g->busy = range_make(0, 0);
    free(buf);
}

static int guest_task(void *arg)
{
    struct guest *g = arg;
    struct vdisk *v = g->vdisk;
    SHIELD();

    while (!history->stop) {
        if (history->serious) /* a mirror in the background comes to an end only so */
            HOLDS(sleep_until(clock_after_ns(dice(2000 * MSEC))) == 0);
        else if (!one_in(4))
            HOLDS(sleep_until(clock_after_ns(dice(4 * MSEC))) == 0);
        struct range r = somewhere(v);
        switch (dice(10)) {
        case 0:
            guest_reads(g, r);
            break;
        case 1:
            guest_writes(g, r, true);
            break;
        case 2:
            if (another_is_there(g, r))
                break;
            g->busy = r;
            forget(v, r);
            touch(v, r);
            (void)!edge_discard(v->edge, r);
            if (telling)
                trace("    guest %d of %s: discard %#llx+%#llx", (int)(g - v->guests),
                      v->disk->name, (unsigned long long)r.start, (unsigned long long)r.length);
            touch(v, r);
            forget(v, r);
            g->busy = range_make(0, 0);
            break;
        case 3:
            if (one_in(3))
                (void)!edge_flush(v->edge);
            break;
        default:
            guest_writes(g, r, false);
        }
        HOLDS(task_yield() == 0);
    }
    return 0;
}

void guests_start(struct vdisk *v, struct scope *tasks)
{
    unsigned n = 1 + (unsigned)dice(GUESTS_MAX);
    for (unsigned i = 0; i < n; i++) {
        v->guests[i].vdisk = v;
        scope_spawn(tasks, guest_task, &v->guests[i]);
    }
}

void vdisk_check(struct vdisk *v)
{
    uint8_t *buf = xcalloc(1, v->disk->size);
    int r = edge_read(v->edge, range_make(0, v->disk->size), buf, 0);
    HOLDS(r == 0);
    compare(v, range_make(0, v->disk->size), buf);
    free(buf);
}

bool vdisk_in_use(const struct vdisk *v, struct range r, uint32_t since)
{
    for (unsigned i = 0; i < GUESTS_MAX; i++) {
        if (range_overlaps(v->guests[i].busy, r))
            return true;
    }
    return v->touched[r.start / SECTOR] > since;
}
