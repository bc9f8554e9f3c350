/* Open is recovery: what the bitmaps of a disk are, decided here and nowhere else.
 *
 *     tide file                  image        segments   ring    bitmaps
 *     none                       -            -          -       none
 *     unreadable                 -            -          -       none; told in the log
 *     of another node            -            -          -       none (see below)
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
 * says. Bitmaps of another node over the same image (with another driver, or a raw one of another
 * part of it) become inconsistent before this one is written (writes.c).
 *
 * And, bitmap by bitmap: what was inconsistent, or has no durable base, stays so. A bitmap that a
 * job held is its current OR its successor: as if the job had failed. One that was to move on with
 * other disks is found by the answer to whether it has; without an answer both are kept (group.c).
 *
 * Nothing is written here (tide.c takes away what is torn). What has been found is written anew
 * when the node is first written to or closed (keeper.c: a session begins); until then the next
 * open finds no less. Only that bitmaps are inconsistent is written at once (session.c): what has
 * told it may be gone next time. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "persist/image.h"
#include "persist/keeper_internal.h"
#include "rt/io.h"

#include <stdio.h>

/* What there is to go by. */
struct found {
    const struct tide_table *sets, *others; /* that hold; NULL, or in doubt: or these */
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
    CLEANUP(memory_freep) uint32_t *table = xcalloc(s->slots, sizeof *table);
    struct error bad = ERROR_INIT;
    char why[160];

    /* Also if the table is not asked for: the next session begins its ring over the block that a
     * crash has torn. Elsewhere that one stays, and behind one that the next crash tears it would
     * be the second, with which the ring is not believed. */
    int ring = s->in_use && s->level == TIDE_POWER
                   ? tide_read_ring(k->tide, table, &k->ring_next, &bad)
                   : 0;
    if (BROKEN(torn_block_stays))
        k->ring_next = s->ring_sequence;
    /* What tells that there is something wrong must not be overwritten while the superblock is that
     * of the old session: the file gets a successor. */
    if (ring < 0 && !BROKEN(damage_overwritten))
        k->void_tide = true;
    if (tide_is_doubtful(k->tide)) {
        k->void_tide = true;
        k->guarded = false; /* an image without bitmaps is written without one, too */
        keeper_decide(k, RECOVERY_NONE,
                      "a superblock of the tide file, which may be the newest, cannot be read");
        return 0;
    }
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
    if (have_segments(k, s, f->sets) && (!f->others || have_segments(k, s, f->others))) {
        f->segments = true;
        keeper_decide(k, RECOVERY_EXACT, "the last program was killed");
        return 0;
    }
    if (s->level == TIDE_PROCESS) {
        keeper_decide(k, RECOVERY_NONE, "the run segment is gone, and the level is 'process'");
        return 0;
    }
    if (ring < 0) {
        keeper_decide(k, RECOVERY_NONE, bad.text);
        return 0;
    }
    f->table = steal(table);
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
    if (r == 0 && bad) {
        log_warning("'%s': %llu bytes of bitmap '%s' were damaged and count as dirty",
                    k->options.path, (unsigned long long)bad, b->name);
        k->damaged = true;
    }
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

/* Is there anything in what B says, of a disk that was left as S says? */
static bool is_usable(const struct found *f, const struct super *s, const struct tide_bitmap *b)
{
    return f->verdict != RECOVERY_NONE && !b->inconsistent && (b->based || !s->in_use);
}

/* Is nothing in the tide file that the image does not tell? We were killed before it could name the
 * file; or another program has opened an image that had been saved, and kept its bitmaps. */
static bool image_tells_all(const struct image *image, const struct tide_table *t)
{
    for (size_t i = 0; i < t->n; i++)
        if (!image_has(image, t->items[i].name))
            return false;
    return !image_has_in_use(image);
}

/* BITS, which have the disk's size, get what B had; HOT: and what was hot. -EBADMSG: that cannot be
 * told any more. */
static int load(struct keeper *k, const struct found *f, const struct tide_bitmap *b, bool hot,
                struct bitmap *bits, struct error *why)
{
    const struct super *s = tide_super(k->tide);
    const uint64_t size = bitmap_size(bits);
    int r;

    if (size != s->size_bytes && (r = bitmap_resize(bits, s->size_bytes)) < 0)
        return error_set_errno(why, -r, "Bitmap '%s'", b->name);
    r = read_set(k, f, b, b->current, bits, why);
    if (r == 0)
        r = read_set(k, f, b, b->successor, bits, why);
    if (r == 0 && f->table && hot)
        add_hot(k, f, bits);
    if (size != s->size_bytes) {
        /* Cut while it was resized: what grew is dirty. */
        int resized = bitmap_resize(bits, size);
        if (resized < 0)
            return error_set_errno(why, -resized, "Bitmap '%s'", b->name);
        if (size > s->size_bytes)
            bitmap_mark(bits, range_between(s->size_bytes, size));
    }
    return r;
}

static void tell_unreadable(struct keeper *k, const struct tide_bitmap *b, const struct error *why)
{
    log_warning("Node '%s': bitmap '%s' is inconsistent: %s", node_name(k->node), b->name,
                why->text);
}

static int add(struct keeper *k, const struct tide_bitmap *b, unsigned granularity_bits,
               bool enabled, struct dirty_bitmap **ret, struct error *err)
{
    const unsigned flags = DIRTY_PERSISTENT | DIRTY_LOADED | (enabled ? 0 : DIRTY_DISABLED);

    k->from_tide = true;
    int r = dirty_add(k->node, b->name, 1ull << granularity_bits, flags, ret, err);
    if (r == 0)
        dirty_set_generation(*ret, b->generation, b->last_job);
    return r;
}

/* Has the image what holds of the bitmap of this name? Either it is exact, or it says inconsistent,
 * too, and knows how its clusters are to be freed. And a tide file that the image does not name
 * knows nothing of it. */
static bool is_images_own(const struct keeper *k, const struct found *f, const char *name)
{
    struct image *image = k->options.image;

    return image && !BROKEN(tide_preferred_to_image) &&
           (image_has(image, name) ||
            (f->verdict == RECOVERY_NONE && (image_names(image, name) || k->foreign)));
}

/* Of such a bitmap. NO, YES: what the tide file says of it, by either answer if that is in doubt;
 * NULL: nothing.
 *
 * No doubt is of the bits of a copy that is exact. Before a group is prepared its members' copies
 * are in use, durably, and only a save says again that they are not: ours, which leaves out what is
 * held, so whoever made it knew the answer; or another program's, which takes over no copy that is
 * in use. But here nobody knows which of two generations it has: then it is none that a client has
 * seen. */
static int load_images_own(struct keeper *k, const struct found *f, const struct tide_bitmap *no,
                           const struct tide_bitmap *yes, const char *name, struct error *err)
{
    struct dirty_bitmap *bm;

    if (!image_has(k->options.image, name))
        return 0;
    int r = image_load(k->options.image, name, &bm, err);
    /* Without our guard others may have given it another base: then, too. */
    if (r == 0 && bm && k->guarded && no && yes && no->generation == yes->generation)
        dirty_set_generation(bm, no->generation, no->last_job);
    return r;
}

static int make_dirty(struct keeper *k, const struct found *f, const struct tide_bitmap *b,
                      struct error *err)
{
    struct error why = ERROR_INIT;
    struct dirty_bitmap *bm;

    if (is_images_own(k, f, b->name))
        return load_images_own(k, f, b, b, b->name, err);
    int r = add(k, b, b->granularity_bits, b->enabled, &bm, err);
    if (r < 0)
        return r;
    if (is_usable(f, tide_super(k->tide), b)) {
        r = load(k, f, b, b->enabled, dirty_bits(bm), &why);
        if (r < 0 && r != -EBADMSG) {
            if (err)
                *err = why;
            return r;
        }
        if (r < 0)
            tell_unreadable(k, b, &why);
    } else {
        r = -EBADMSG;
    }
    bool as_it_was = f->verdict == RECOVERY_CLEAN || (f->segments && BROKEN(segment_reused));
    if (r < 0)
        dirty_set_inconsistent(bm);
    else if (as_it_was && !b->successor.epoch)
        keeper_adopt(k, bm, dirty_bits(bm), b, b->current);
    return 0;
}

/* ---- in doubt ---- */

/* What B, which is of one of the two tables in doubt, says of the bits. In the end it says itself
 * whether it can be trusted. */
static int load_outcome(struct keeper *k, const struct found *f, struct tide_bitmap *b, bool hot,
                        struct bitmap *bits, struct error *err)
{
    struct error why = ERROR_INIT;
    int r = 0;

    b->inconsistent = !is_usable(f, tide_super(k->tide), b);
    b->based = true;
    if (b->inconsistent)
        return 0;
    if (bitmap_granularity(bits) == 1ull << b->granularity_bits) {
        r = load(k, f, b, hot, bits, &why);
    } else { /* removed, and another one of the name added */
        CLEANUP(bitmap_freep)
        struct bitmap *its = bitmap_new(bitmap_size(bits), 1ull << b->granularity_bits);
        r = its ? load(k, f, b, hot, its, &why)
                : error_set_errno(&why, ENOMEM, "Bitmap '%s'", b->name);
        if (r == 0)
            bitmap_merge(bits, its);
    }
    if (r == -ENOMEM) {
        if (err)
            *err = why;
        return r;
    }
    if (r < 0)
        tell_unreadable(k, b, &why);
    b->inconsistent = r < 0;
    return 0;
}

/* NO, YES: what a bitmap is by either answer; NULL: it is not there. */
static int hold(struct keeper *k, const struct found *f, struct tide_bitmap *no,
                struct tide_bitmap *yes, struct error *err)
{
    const unsigned bits = !yes  ? no->granularity_bits
                          : !no ? yes->granularity_bits
                                : min_u64(no->granularity_bits, yes->granularity_bits);
    const bool record = (no && no->enabled) || (yes && yes->enabled);
    struct bitmap *of_yes;
    struct dirty_bitmap *bm;
    char group[33];

    const char *name = no ? no->name : yes->name;
    if (is_images_own(k, f, name))
        return load_images_own(k, f, no, yes, name, err);
    int r = add(k, no ? no : yes, bits, record, &bm, err);
    if (r < 0)
        return r;
    if (!no)
        dirty_set_generation(bm, 0, NULL);
    keeper_group_text(&k->doubt.group, group);
    CLEANUP(memory_freep)
    char *why = xasprintf("whether it has moved on with group %s is known to '%s' alone, which is "
                          "not there",
                          group, k->doubt.coordinator.path);
    r = dirty_hold(bm, record, why, &of_yes, err);
    if (r == 0 && no)
        r = load_outcome(k, f, no, false, dirty_bits(bm), err);
    if (r == 0 && yes)
        r = load_outcome(k, f, yes, record, of_yes, err);
    if (r == 0 && no && !yes && f->table && record) /* what is written is in the successor */
        add_hot(k, f, of_yes);
    if (r == 0 && (!no || no->inconsistent) && (!yes || yes->inconsistent))
        dirty_set_inconsistent(bm);
    return r;
}

static bool is_same(const struct tide_bitmap *a, const struct tide_bitmap *b)
{
    return a && b && a->generation == b->generation && a->current.epoch == b->current.epoch &&
           a->successor.epoch == b->successor.epoch && a->enabled == b->enabled &&
           a->inconsistent == b->inconsistent && a->based == b->based;
}

/* A bitmap that is the same by either answer is in no doubt. */
static int make_in_doubt(struct keeper *k, const struct found *f, struct error *err)
{
    struct tide_table *no = &k->doubt.no, *yes = &k->doubt.yes;
    int r = 0;

    for (size_t i = 0; r == 0 && i < no->n; i++) {
        struct tide_bitmap *is = tide_table_find(yes, no->items[i].name);
        r = is_same(&no->items[i], is) ? make_dirty(k, f, &no->items[i], err)
                                       : hold(k, f, &no->items[i], is, err);
    }
    for (size_t i = 0; r == 0 && i < yes->n; i++)
        if (!tide_table_find(no, yes->items[i].name))
            r = hold(k, f, NULL, &yes->items[i], err);
    return r;
}

static void tell(const struct keeper *k)
{
    const struct tide_table *t = &tide_super(k->tide)->table;
    const char *name = node_name(k->node);

    if (keeper_in_doubt(k))
        log_warning("Node '%s': whether its bitmaps have moved on with others is known to '%s' "
                    "alone, which is not there: they stay busy until it is, or can be removed",
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
    if (r == -EBADMSG || r == -ENODATA) {
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
    if (!keeper_is_of_node(k, s)) {
        tide_close(steal(k->tide));
        return 0;
    }
    k->epoch = BROKEN(epoch_reused) ? behind_named(s) : s->next_epoch;
    k->ring_next = s->ring_sequence;
    bool doubt;
    if (k->options.image && !s->in_use && s->table.n == 0 && !tide_is_doubtful(k->tide)) {
        k->recovery.verdict = RECOVERY_NEW; /* it has records of groups, and no bitmaps */
        return 0;
    }
    CLEANUP(tide_table_fini) struct tide_table sets = {0};
    keeper_resolve(k, s, &sets, &doubt);
    f.sets = &sets;
    f.others = doubt ? &s->next : NULL;
    r = watch(k, f.sets, err);
    if (r == 0 && doubt)
        r = watch(k, f.others, err);
    if (r == 0)
        r = weigh(k, &f, err);
    f.verdict = k->recovery.verdict;
    if (f.verdict == RECOVERY_NONE)
        free(steal(f.table));
    if (r == 0 && doubt)
        r = make_in_doubt(k, &f, err);
    for (size_t i = 0; r == 0 && !doubt && i < sets.n; i++)
        r = make_dirty(k, &f, &sets.items[i], err);
    free(f.table);
    if (r < 0)
        return r;
    dirty_loaded(k->node);
    k->stale = f.verdict != RECOVERY_CLEAN || !tide_id_none(&s->group);
    if (f.verdict == RECOVERY_NONE && k->options.image &&
        image_tells_all(k->options.image, f.sets) &&
        (!f.others || image_tells_all(k->options.image, f.others)))
        k->recovery.verdict = RECOVERY_NEW; /* as if the file was not there */
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
