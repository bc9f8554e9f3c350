/* What bitmaps must say: see histories.h. A stupid one: a byte for each sector, and the table of
 * modes and outcomes as ARCHITECTURE.md has it. */
#include "histories.h"

/* ---- sets ---- */

void set_init(struct set *s, const struct disk *d)
{
    s->must = xcalloc(1, d->sectors);
    s->may = xcalloc(1, d->sectors);
}

void set_fini(struct set *s)
{
    free(s->must);
    free(s->may);
    *s = (struct set){0};
}

/* Whole granules of sectors that touch FIRST .. LAST. */
static void mark(const struct marks *m, uint8_t *bits, uint64_t first, uint64_t last)
{
    uint64_t granule = m->granularity / SECTOR;
    first -= first % granule;
    last = min_u64(last - last % granule + granule, m->disk->sectors);
    memset(bits + first, 1, last - first);
}

static void merge(const struct marks *m, uint8_t *bits, const uint8_t *from)
{
    for (uint64_t i = 0; i < m->disk->sectors; i++) {
        if (from[i] && !bits[i])
            mark(m, bits, i, i);
    }
}

/* ---- bitmaps ---- */

struct marks *marks_new(struct disk *d, const char *name, uint64_t granularity, bool enabled)
{
    struct marks *m = xnew(struct marks);
    m->disk = d;
    snprintf(m->name, sizeof m->name, "%s", name);
    m->granularity = granularity;
    m->enabled = enabled;
    set_init(&m->now, d);
    set_init(&m->next, d);
    TAILQ_INSERT_TAIL(&d->marks, m, link);
    return m;
}

void marks_free(struct marks *m)
{
    TAILQ_REMOVE(&m->disk->marks, m, link);
    set_fini(&m->now);
    set_fini(&m->next);
    free(m);
}

void marks_add(struct marks *m, const struct set *s)
{
    merge(m, m->now.must, s->must);
    merge(m, m->now.may, s->may);
}

static void empty(const struct marks *m, struct set *s)
{
    memset(s->must, 0, m->disk->sectors);
    memset(s->may, 0, m->disk->sectors);
}

void marks_clear(struct marks *m)
{
    empty(m, &m->now);
}

void marks_start(struct marks *m)
{
    HOLDS(!m->busy);
    m->busy = true;
    empty(m, &m->next);
}

void marks_end(struct marks *m, const struct set *what)
{
    HOLDS(m->busy);
    m->busy = false;
    if (what) {
        merge(m, m->next.must, what->must);
        merge(m, m->next.may, what->may);
    }
    struct set frozen = m->now;
    m->now = m->next;
    m->next = frozen;
}

void marks_note(struct disk *d, struct range r, bool must)
{
    struct marks *m;
    plan_look();
    TAILQ_FOREACH (m, &d->marks, link) {
        struct set *s = m->busy ? &m->next : &m->now;
        uint64_t first = r.start / SECTOR, last = (range_end(r) - 1) / SECTOR;
        if (!m->enabled)
            continue;
        mark(m, s->may, first, last);
        if (must)
            mark(m, s->must, first, last);
    }
}

static void check_bits(const struct marks *m, struct bitmap *bits)
{
    uint64_t granule = m->granularity / SECTOR;
    for (uint64_t i = 0; i < m->disk->sectors; i += granule) {
        bool dirty = bitmap_get(bits, i * SECTOR);
        if (m->now.must[i] && !dirty)
            WRONG("bitmap %s of %s is clean at %#llx, where it must be dirty", m->name,
                  m->disk->name, (unsigned long long)i * SECTOR);
        if (dirty && !m->now.may[i])
            WRONG("bitmap %s of %s is dirty at %#llx, where nothing has changed", m->name,
                  m->disk->name, (unsigned long long)i * SECTOR);
    }
}

void marks_check(const struct marks *m)
{
    struct dirty_bitmap *bm = dirty_find(m->disk->node, m->name);
    if (!bm)
        WRONG("bitmap %s of %s is gone", m->name, m->disk->name);
    if (dirty_busy(bm) != m->busy)
        WRONG("bitmap %s of %s is %s", m->name, m->disk->name, m->busy ? "not busy" : "busy");
    if (dirty_recording(bm) != m->enabled)
        WRONG("bitmap %s of %s is %s", m->name, m->disk->name, m->enabled ? "disabled" : "enabled");
    HOLDS(!dirty_inconsistent(bm) && dirty_granularity(bm) == m->granularity);
    check_bits(m, dirty_bits(bm));
}

/* ---- outcomes ---- */

static void check_same(const struct work *w, const char *what, const uint8_t *is,
                       const uint8_t *should_be)
{
    if (memcmp(is, should_be, w->source->size) == 0)
        return;
    for (uint64_t i = 0;; i++) {
        if (is[i] != should_be[i])
            WRONG("job %s: %s differs at %#llx", w->id, what, (unsigned long long)i);
    }
}

/* Only what the bitmap said was to be copied. */
static void check_part(const struct work *w)
{
    for (uint64_t i = 0; i < w->source->sectors; i++) {
        uint64_t at = i * SECTOR;
        if (w->marks->now.must[i] && memcmp(w->target->bytes + at, w->instant + at, SECTOR) != 0)
            WRONG("job %s: the target is not the disk at its instant at %#llx, which was dirty",
                  w->id, (unsigned long long)at);
    }
}

static bool forgets(const struct work *w)
{
    return w->marks && (w->mode == MODE_ON_SUCCESS || w->mode == MODE_ALWAYS);
}

/* What loses its bit must not vanish with the power. */
static void check_durable(const struct work *w)
{
    const struct disk *s = w->source;
    if (w->lane && !w->target->file)
        check_same(w, "the target after a power loss", w->target->durable, w->target->bytes);
    for (uint64_t i = 0; forgets(w) && i < s->sectors; i++) {
        uint64_t at = i * SECTOR;
        if (s->wrote[i] <= w->began && memcmp(s->durable + at, w->instant + at, SECTOR) != 0)
            WRONG("job %s: the source after a power loss differs at %#llx, and the bitmap is clean",
                  w->id, (unsigned long long)at);
    }
}

static void backup_succeeded(struct work *w)
{
    if (w->target->file)
        ; /* the client looks through the whole chain, later */
    else if (w->lane || w->sync == SYNC_FULL)
        check_same(w, "the target from the disk at the job's instant", w->target->bytes,
                   w->instant);
    else
        check_part(w);
    check_durable(w);
    if (w->marks)
        marks_end(w->marks, w->mode == MODE_NEVER ? &w->marks->now : NULL);
}

static bool is_here(const struct work *w, uint64_t sector)
{
    uint64_t at = sector * SECTOR;
    return memcmp(w->target->bytes + at, w->instant + at, SECTOR) == 0 &&
           memcmp(w->target->durable + at, w->instant + at, SECTOR) == 0;
}

/* The chunks that a failed backup did not bring to the target, and durably. */
static void not_copied(const struct work *w, struct set *s)
{
    const struct disk *d = w->source, *t = w->target;
    uint64_t chunk = disk_chunk(t) / SECTOR;
    bool lost = !t->file && d->fired_flushes + t->fired_flushes != w->flushes;

    for (uint64_t c = 0; c < d->sectors; c += chunk) {
        bool wanted = w->sync == SYNC_FULL, wanted_maybe = wanted, missing = lost;
        uint64_t end = min_u64(c + chunk, d->sectors);
        for (uint64_t i = c; i < end; i++) {
            wanted |= w->marks->now.must[i];
            wanted_maybe |= w->marks->now.may[i];
            /* Of an image nobody knows here what it has. */
            missing |= t->file || t->took[i] <= w->began || t->took[i] > w->aborting;
            missing |= t->file || !is_here(w, i);
        }
        for (uint64_t i = c; i < end; i++) {
            s->must[i] = wanted && !t->file && !is_here(w, i) &&
                         (w->sync == SYNC_FULL || w->lane || w->marks->now.must[i]);
            s->may[i] = wanted_maybe && missing;
        }
    }
}

static void backup_failed(struct work *w)
{
    struct set remaining;
    if (!w->marks)
        return;
    if (w->mode != MODE_ALWAYS) {
        marks_end(w->marks, &w->marks->now);
        return;
    }
    set_init(&remaining, w->source);
    not_copied(w, &remaining);
    marks_end(w->marks, &remaining);
    set_fini(&remaining);
}

/* Both are equal but where guests have written since the last step. That is when the source's gate
 * was closed after the job became pending: mostly once. */
static void mirror_succeeded(struct work *w)
{
    struct disk *s = w->source, *t = w->target;
    struct set since;

    if (s->n_gates == w->gates)
        WRONG("mirror %s ends while its guests go on", w->id);
    HOLDS(s->n_gates - w->gates <= GATES);
    uint32_t first = s->gates[w->gates % GATES], last = s->gates[(s->n_gates - 1) % GATES];
    set_init(&since, s);
    for (uint64_t i = 0; i < s->sectors; i++) {
        uint64_t at = i * SECTOR;
        since.must[i] = s->wrote[i] > last;
        since.may[i] = s->announced[i] > first;
        if (since.may[i] || vdisk_in_use(w->vdisk, range_make(at, SECTOR), first))
            continue;
        if (memcmp(s->bytes + at, t->bytes + at, SECTOR) != 0)
            WRONG("mirror %s: target and source differ at %#llx", w->id, (unsigned long long)at);
        if (memcmp(t->durable + at, t->bytes + at, SECTOR) != 0)
            WRONG("mirror %s: the target after a power loss differs at %#llx", w->id,
                  (unsigned long long)at);
        if (forgets(w) && memcmp(s->durable + at, s->bytes + at, SECTOR) != 0)
            WRONG("mirror %s: the source after a power loss differs at %#llx", w->id,
                  (unsigned long long)at);
    }
    if (w->marks && w->mode == MODE_NEVER) {
        marks_end(w->marks, &w->marks->now);
    } else if (w->marks) {
        empty(w->marks, &w->marks->next);
        if (!w->marks->enabled)
            empty(w->marks, &since);
        marks_end(w->marks, &since);
    }
    set_fini(&since);
}

/* always: what the target lacks, and what was written. */
static void mirror_failed(struct work *w)
{
    const struct disk *s = w->source, *t = w->target;
    uint64_t unit = max_u64(disk_chunk(t), w->marks ? w->marks->granularity : 0) / SECTOR;
    struct set remaining;

    if (!w->marks)
        return;
    if (w->mode != MODE_ALWAYS) {
        marks_end(w->marks, &w->marks->now);
        return;
    }
    set_init(&remaining, s);
    for (uint64_t c = 0; c < s->sectors; c += unit) {
        bool maybe = false;
        for (uint64_t i = c; i < min_u64(c + unit, s->sectors); i++)
            maybe |= w->marks->now.may[i] || (w->marks->enabled && s->announced[i] > w->began);
        for (uint64_t i = c; i < min_u64(c + unit, s->sectors); i++) {
            uint64_t at = i * SECTOR;
            remaining.may[i] = maybe;
            remaining.must[i] = w->lane && w->marks->enabled &&
                                (memcmp(s->bytes + at, t->bytes + at, SECTOR) != 0 ||
                                 memcmp(s->bytes + at, t->durable + at, SECTOR) != 0);
        }
    }
    marks_end(w->marks, &remaining);
    set_fini(&remaining);
}

void check_outcome(struct work *w, bool success)
{
    if (w->mirror)
        success ? mirror_succeeded(w) : mirror_failed(w);
    else
        success ? backup_succeeded(w) : backup_failed(w);
}
