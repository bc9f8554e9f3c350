/* Open is recovery: what the bitmaps of a disk are, decided here and nowhere else.
 *
 *     tide file                  image        segments   ring    bitmaps
 *     none                       -            -          -       none
 *     unreadable                 -            -          -       none; told in the log
 *     of another node's driver   -            -          -       none (see below)
 *     closed                     as it was    -          -       as stored: clean
 *     closed                     changed      -          -       inconsistent
 *     in use                     changed      -          -       inconsistent
 *     in use                     ours         there      -       exact
 *     in use, level power        ours         gone       whole   superset
 *     in use, level power        ours         gone       holes   inconsistent
 *     in use, level process      ours         gone       -       inconsistent
 *
 * Segments: those of the session that the tide file names. Of a qcow2 image the guard is the
 * witness (guarded.c), and what it has stored and is not in use is exact, whatever the tide file
 * says. Bitmaps of another driver's node over the same image become inconsistent before this one is
 * written (writes.c).
 *
 * And, bitmap by bitmap: what was inconsistent, or has no durable base, stays so. A bitmap that a
 * job held is its current OR its successor: as if the job had failed.
 *
 * Nothing is written here. What has been found is written anew when the node is first written to or
 * closed (keeper.c: a session begins); until then the next open finds no less. Only that bitmaps
 * are inconsistent is written at once (session.c): what has told it may be gone next time. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/image.h"
#include "persist/keeper_internal.h"
#include "rt/io.h"

#include <stdio.h>

/* What there is to go by. */
struct found {
    const struct tide_table *sets; /* that hold */
    enum recovery verdict;
    uint32_t *table; /* of hot regions; NULL: none are to be added */
    bool segments;
};

static enum witness_verdict ask_witness(struct keeper *k, const struct super *s, char *why,
                                        size_t why_bytes)
{
    struct witness now;
    uint64_t last_write_ns = 0, boot_us = 0;
    int fd = keeper_descriptor(k);

    if (k->options.image)
        return keeper_ask_guard(k, s, why, why_bytes);
    if (fd < 0)
        return s->witness.kind == WITNESS_NONE ? WITNESS_UNKNOWN : WITNESS_CHANGED;
    if (witness_take(fd, &now) < 0 || io_boot_us(&boot_us) < 0) {
        snprintf(why, why_bytes, "the image cannot be looked at");
        return WITNESS_CHANGED;
    }
    if (!s->in_use)
        return witness_compare_clean(&s->witness, &now, why, why_bytes);
    const struct segments of = keeper_segments(k, s);
    if (!of.runtime || stamp_find(&of, &last_write_ns) < 0)
        last_write_ns = 0;
    return witness_compare_crash(&s->witness, &now, last_write_ns, boot_us * 1000, why, why_bytes);
}

enum witness_verdict keeper_ask_witness(struct keeper *k, const struct super *s, char *why,
                                        size_t why_bytes)
{
    *why = '\0';
    enum witness_verdict v = ask_witness(k, s, why, why_bytes);
    k->recovery.witness = v == WITNESS_SAME ? "same" : v == WITNESS_UNKNOWN ? "none" : "changed";
    return v;
}

void keeper_decide(struct keeper *k, enum recovery verdict, const char *reason)
{
    k->recovery.verdict = verdict;
    k->recovery.bytes_added = 0;
    free(k->recovery.reason);
    k->recovery.reason = xstrdup(reason);
}

void keeper_distrust(struct keeper *k, const char *why)
{
    keeper_decide(k, RECOVERY_NONE, why);
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (keeper_keeps(bm))
            dirty_set_inconsistent(bm);
}

/* Are all sets that hold there as segments? */
static bool have_segments(struct keeper *k, const struct super *s, const struct tide_table *t)
{
    const struct segments of = keeper_segments(k, s);
    if (!of.runtime)
        return false;
    for (size_t i = 0; i < t->n; i++) {
        const struct tide_bitmap *b = &t->items[i];
        const uint64_t epochs[] = {b->current.epoch, b->successor.epoch};
        for (unsigned j = 0; j < 2; j++) {
            CLEANUP(bitmap_freep) struct bitmap *bits = NULL;
            if (!epochs[j] || b->inconsistent)
                continue;
            bits = bitmap_new(s->size_bytes, 1ull << b->granularity_bits);
            if (!bits || segment_read(&of, epochs[j], bits, NULL) < 0)
                return false;
        }
    }
    return true;
}

bool keeper_has_segments(struct keeper *k, const struct super *s)
{
    return have_segments(k, s, &s->table);
}

static int weigh(struct keeper *k, struct found *f, struct error *err)
{
    const struct super *s = tide_super(k->tide);
    char why[160];

    if (s->size_bytes != node_size(k->node) && s->resizing_bytes != node_size(k->node)) {
        keeper_decide(k, RECOVERY_NONE, "the disk has another size");
        return 0;
    }
    enum witness_verdict v = keeper_ask_witness(k, s, why, sizeof why);
    if (v == WITNESS_CHANGED) {
        keeper_decide(k, RECOVERY_NONE, why);
        return 0;
    }
    if (v == WITNESS_UNKNOWN && s->table.n && k->options.no_witness == NO_WITNESS_REFUSE)
        return error_set(err, EPERM,
                         "nothing tells whether others have written the image of node '%s' since "
                         "'%s' was: 'no-witness' must say whether to 'believe' or 'distrust' its "
                         "bitmaps",
                         node_name(k->node), k->options.path);
    if (v == WITNESS_UNKNOWN && k->options.no_witness == NO_WITNESS_DISTRUST) {
        keeper_decide(
            k, RECOVERY_NONE,
            "nothing tells whether others have written the image ('no-witness' is 'distrust')");
        return 0;
    }
    if (!s->in_use) {
        keeper_decide(k, RECOVERY_CLEAN, "");
        return 0;
    }
    if (have_segments(k, s, f->sets)) {
        f->segments = true;
        keeper_decide(k, RECOVERY_EXACT, "the last program was killed");
        return 0;
    }
    if (s->level == TIDE_PROCESS) {
        keeper_decide(k, RECOVERY_NONE, "the run segment is gone, and the level is 'process'");
        return 0;
    }
    struct error bad = ERROR_INIT;
    f->table = xcalloc(s->slots, sizeof *f->table);
    if (tide_read_ring(k->tide, f->table, &k->ring_next, &bad) < 0) {
        keeper_decide(k, RECOVERY_NONE, bad.text);
        return 0;
    }
    keeper_decide(k, RECOVERY_SUPERSET, "the power failed, or the run segment is gone");
    return 0;
}

/* ---- the bits ---- */

static int read_set(struct keeper *k, const struct found *f, const struct tide_bitmap *b,
                    struct tide_area area, struct bitmap *bits, struct error *err)
{
    const struct super *s = tide_super(k->tide);
    const struct segments of = keeper_segments(k, s);
    uint64_t bad = 0;

    if (!area.epoch)
        return 0;
    if (f->segments)
        return segment_read(&of, area.epoch, bits, err);
    if (!b->extent[area.extent])
        return 0;
    /* In a closed file nothing is torn; in one that was in use a torn sector is under hot regions,
     * and what is not makes a superset. */
    int r = tide_read_area(k->tide, b->extent[area.extent], area.epoch, bits, true, &bad, err);
    if (r == 0 && bad)
        log_warning("'%s': %llu bytes of bitmap '%s' were damaged and count as dirty",
                    k->options.path, (unsigned long long)bad, b->name);
    return r;
}

static void add_hot(struct keeper *k, const struct found *f, struct bitmap *bits)
{
    const struct super *s = tide_super(k->tide);
    uint64_t before = bitmap_count(bits), size = bitmap_size(bits);

    for (uint32_t i = 0; i < s->slots; i++) {
        uint64_t start = (uint64_t)f->table[i] << s->region_bits;
        if (f->table[i] != REGION_NONE && start < size)
            bitmap_mark(bits,
                        range_between(start, min_u64(start + (1ull << s->region_bits), size)));
    }
    k->recovery.bytes_added += bitmap_count(bits) - before;
}

static const struct tide_bitmap *find(const struct tide_table *t, const struct tide_bitmap *b)
{
    return tide_table_find((struct tide_table *)t, b->name);
}

/* OTHER: what B is if a group that is in doubt was committed; NULL: the same, or no doubt. */
static int make_dirty(struct keeper *k, const struct found *f, const struct tide_bitmap *b,
                      const struct tide_bitmap *other, struct error *err)
{
    const struct super *s = tide_super(k->tide);
    const unsigned flags = DIRTY_PERSISTENT | DIRTY_LOADED | (b->enabled ? 0 : DIRTY_DISABLED);
    bool usable = f->verdict != RECOVERY_NONE && !b->inconsistent && (b->based || !s->in_use);
    struct image *image = k->options.image;
    struct dirty_bitmap *bm;
    int r;

    if (image && image_has(image, b->name)) {
        r = image_load(image, b->name, &bm, err);
        /* Another program may have cleared it: then it is none that a client has seen. */
        if (r == 0 && bm && f->verdict != RECOVERY_NONE)
            dirty_set_generation(bm, b->generation, b->last_job);
        return r;
    }
    /* Then it says inconsistent, too, and knows how its clusters are to be freed. And a tide file
     * that the image does not name knows nothing of it. */
    if (image && f->verdict == RECOVERY_NONE && (image_names(image, b->name) || k->foreign))
        return 0;
    k->from_tide = true;
    r = dirty_add(k->node, b->name, 1ull << b->granularity_bits, flags, &bm, err);
    if (r < 0)
        return r;
    dirty_set_generation(bm, b->generation, b->last_job);
    if (!usable) {
        dirty_set_inconsistent(bm);
        return 0;
    }
    struct bitmap *bits = dirty_bits(bm);
    uint64_t size = bitmap_size(bits);
    if (size != s->size_bytes && (r = bitmap_resize(bits, s->size_bytes)) < 0)
        return error_set_errno(err, -r, "Bitmap '%s'", b->name);
    struct error why = ERROR_INIT;
    r = read_set(k, f, b, b->current, bits, &why);
    if (r == 0)
        r = read_set(k, f, b, b->successor, bits, &why);
    if (r == 0 && other)
        r = read_set(k, f, other, other->current, bits, &why);
    if (r == 0 && other)
        r = read_set(k, f, other, other->successor, bits, &why);
    if (r == -EBADMSG) {
        log_warning("Node '%s': bitmap '%s' is inconsistent: %s", node_name(k->node), b->name,
                    why.text);
        dirty_set_inconsistent(bm);
        return 0;
    }
    if (r < 0 && err)
        *err = why;
    if (r < 0)
        return r;
    if (f->table && b->enabled)
        add_hot(k, f, bits);
    if (size != s->size_bytes) {
        /* Cut while it was resized: what grew is dirty. */
        if ((r = bitmap_resize(bits, size)) < 0)
            return error_set_errno(err, -r, "Bitmap '%s'", b->name);
        if (size > s->size_bytes)
            bitmap_mark(bits, range_between(s->size_bytes, size));
    }
    bool as_it_was = f->verdict == RECOVERY_CLEAN || (f->segments && BROKEN(segment_reused));
    if (as_it_was && !b->successor.epoch)
        keeper_adopt(k, bm, bits, b, b->current);
    return 0;
}

/* Bitmaps that the group has moved on, or not: whose base nobody knows. */
static void hold_doubtful(struct keeper *k, const struct tide_table *old,
                          const struct tide_table *new)
{
    for (size_t i = 0; i < old->n; i++) {
        const struct tide_bitmap *was = &old->items[i], *is = find(new, was);
        struct dirty_bitmap *bm = dirty_find(k->node, was->name);
        if (bm &&
            (!is || is->generation != was->generation || is->current.epoch != was->current.epoch ||
             is->successor.epoch != was->successor.epoch))
            dirty_set_busy(bm, true);
    }
}

static void tell(const struct keeper *k)
{
    const struct tide_table *t = &tide_super(k->tide)->table;
    const char *name = node_name(k->node);

    if (!tide_id_none(&k->doubt.group))
        log_warning("Node '%s': whether its bitmaps have moved on with others is known to '%s' "
                    "alone, which is not there: they stay busy",
                    name, k->doubt.coordinator.path);

    switch (k->recovery.verdict) {
    case RECOVERY_NEW:
    case RECOVERY_CLEAN:
        break;
    case RECOVERY_EXACT:
        log_info("Node '%s': %zu bitmap(s) recovered exactly: %s", name, t->n, k->recovery.reason);
        break;
    case RECOVERY_SUPERSET:
        log_warning("Node '%s': %zu bitmap(s) recovered, %llu bytes more than changed at most: %s",
                    name, t->n, (unsigned long long)k->recovery.bytes_added, k->recovery.reason);
        break;
    case RECOVERY_NONE:
        log_warning("Node '%s': %zu bitmap(s) are inconsistent: %s", name, t->n,
                    k->recovery.reason);
        break;
    }
}

/* Before the witness is asked, so that nobody writes after its answer. */
static int watch(struct keeper *k, const struct tide_table *t, struct error *err)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->items[i].enabled && !t->items[i].inconsistent)
            return node_set_watched(k->node, true, err);
    return 0;
}

/* The first epoch that no set of S has: but areas may hold bits under it already. */
static uint64_t behind_named(const struct super *s)
{
    uint64_t epoch = 1;

    for (size_t i = 0; i < s->table.n; i++)
        epoch = max_u64(
            epoch, max_u64(s->table.items[i].current.epoch, s->table.items[i].successor.epoch) + 1);
    return epoch;
}

static int recover(struct keeper *k, struct error *err)
{
    struct error why = ERROR_INIT;
    struct found f = {0};

    int r = tide_open(k->options.path, k->node->read_only, &k->tide, &why);
    if (r == -ENOENT) {
        k->recovery.verdict = RECOVERY_NEW;
        return 0;
    }
    if (r == -EBADMSG) {
        log_warning("Node '%s': %s: its bitmaps are lost", node_name(k->node), why.text);
        keeper_decide(k, RECOVERY_NONE, why.text);
        return 0;
    }
    if (r < 0) {
        if (err)
            *err = why;
        return r;
    }
    const struct super *s = tide_super(k->tide);
    if (strcmp(s->driver, node_driver_name(k->node))) {
        tide_close(steal(k->tide));
        return 0;
    }
    k->epoch = BROKEN(epoch_reused) ? behind_named(s) : s->next_epoch;
    k->ring_next = s->ring_sequence;
    bool doubt;
    f.sets = keeper_resolve(k, s, &doubt);
    if (k->options.image && !s->in_use && s->table.n == 0) {
        k->recovery.verdict = RECOVERY_NEW; /* it has records of groups, and no bitmaps */
        return 0;
    }
    r = watch(k, f.sets, err);
    if (r == 0)
        r = weigh(k, &f, err);
    f.verdict = k->recovery.verdict;
    if (f.verdict == RECOVERY_NONE)
        free(steal(f.table));
    for (size_t i = 0; r == 0 && i < f.sets->n; i++)
        r = make_dirty(k, &f, &f.sets->items[i], doubt ? find(&s->next, &f.sets->items[i]) : NULL,
                       err);
    if (doubt && r == 0)
        hold_doubtful(k, f.sets, &s->next);
    free(f.table);
    if (r < 0)
        return r;
    dirty_loaded(k->node);
    k->stale = f.verdict != RECOVERY_CLEAN || !tide_id_none(&s->group);
    tell(k);
    return 0;
}

int keeper_recover(struct keeper *k, struct error *err)
{
    struct image *image = k->options.image;

    int r = recover(k, err);
    if (r == 0 && image)
        r = keeper_recover_image(k, err);
    if (r == 0 && k->node->read_only)
        keeper_set_readonly(k, true);
    return r;
}
