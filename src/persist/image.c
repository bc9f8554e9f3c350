/* Persistent bitmaps of qcow2 nodes: when they are read, marked as in use, and saved.
 *
 *                        in the image        in memory
 *     read-only          as found            readonly: can be read, exported, backed up from
 *     read-write         in_use, durably     recording as `auto` says
 *     saved              in_use 0            until the node is gone, or read-only
 *
 * in_use is made durable before the node is handed out (as QEMU does it), so no write can come
 * before it. Two ways lead to a writable node whose image does not say in_use: setting it failed
 * after a reopen to read-write, or a save failed so that nobody knows which directory the disk has.
 * Then writes are refused (-EPERM as QEMU while bitmaps are read-only; -EIO while the header cannot
 * be written) until that is put right.
 *
 * A bitmap that cannot be used is shown as inconsistent and stays in the image, in use, until
 * somebody removes it. What goes wrong while saving at a close is told in the log: nobody is there
 * any more to get an error. The image then still says in_use, and the next open knows. */
#include "persist/image.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/bitmaps.h"
#include "dirty/dirty.h"

#include <stdio.h>

/* Of one qcow2 node, from its opening to its closing. */
struct image {
    struct node *node;
    struct write_observer observer;
    bool heal;    /* the directory has entries that no program takes: written anew at the close */
    bool blocked; /* bitmaps may be read-only on a node that may be written */
    char **leaky; /* bitmaps whose clusters are not freed with them; sorted */
    size_t n_leaky;
};

/* What the bits of one image may take when it is opened. 64 bitmaps of 64 TiB at 64 KiB, all
 * dirty, fit in; QEMU has a limit of 512 MiB a bitmap, and 65,535 bitmaps. */
#define BITS_MAX (8 * GiB)

static bool is_stored(const struct dirty_bitmap *bm)
{
    return dirty_persistent(bm) && dirty_name(bm);
}

/* ---- before writes and changes of size ---- */

static void observer_mark(struct write_observer *o, struct range r)
{
}

static int observer_before_write(struct write_observer *o, struct range r)
{
    struct image *im = container_of(o, struct image, observer);

    if (im->blocked) {
        struct dirty_bitmap *bm = dirty_first(im->node);
        while (bm && !dirty_readonly(bm))
            bm = dirty_next(bm);
        if (bm)
            return -EPERM;
        im->blocked = false; /* the last of them was removed */
    }
    return qcow2_bitmaps_settle(im->node) < 0 ? -EIO : 0;
}

static int observer_resizing(struct write_observer *o, uint64_t from, uint64_t to,
                             struct error *err)
{
    struct image *im = container_of(o, struct image, observer);

    for (struct dirty_bitmap *bm = dirty_first(im->node); bm; bm = dirty_next(bm)) {
        if (!is_stored(bm))
            continue;
        int r = dirty_check(bm, DIRTY_CHECK_DEFAULT, err);
        /* QEMU lets it grow, and loses the bitmap when it is to be saved. */
        if (r == 0 && to > from &&
            (r = qcow2_bitmap_check_size(im->node, dirty_granularity(bm), to, err)) < 0)
            error_wrap(err, "Bitmap '%s'", dirty_name(bm));
        if (r < 0)
            return r;
    }
    return qcow2_bitmaps_settle(im->node) < 0
               ? error_set_errno(err, EIO, "Failed to update bitmap extension")
               : 0;
}

/* ---- clusters that must not be freed ---- */

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool is_leaky(const struct image *im, const char *name)
{
    return im->n_leaky && bsearch(&name, im->leaky, im->n_leaky, sizeof *im->leaky, by_text);
}

static void forget_leaky(struct image *im)
{
    for (size_t i = 0; i < im->n_leaky; i++)
        free(im->leaky[i]);
    free(im->leaky);
    im->leaky = NULL;
    im->n_leaky = 0;
}

static void remember_leaky(struct image *im, const struct qcow2_bitmap_list *l)
{
    forget_leaky(im);
    im->leaky = xcalloc(l->n + 1, sizeof *im->leaky);
    for (size_t i = 0; i < l->n; i++)
        if (l->items[i].leak && !l->items[i].unfit)
            im->leaky[im->n_leaky++] = xstrdup(l->items[i].name);
    qsort(im->leaky, im->n_leaky, sizeof *im->leaky, by_text);
}

/* ---- loading ---- */

/* B becomes a dirty bitmap. An error only for one that could be used and is not to be lost because
 * memory is short now. */
static int make_dirty(struct node *n, struct qcow2_bitmap *b, struct error *err)
{
    const unsigned flags = DIRTY_PERSISTENT | DIRTY_LOADED | (b->automatic ? 0 : DIRTY_DISABLED);
    bool usable = !b->in_use && !b->quarantined;
    struct error why = ERROR_INIT;
    struct dirty_bitmap *bm;

    int r = dirty_add(n, b->name, (uint64_t)1 << b->granularity_bits, flags, &bm, &why);
    if (r < 0 && !usable) {
        log_warning("Node '%s': stored bitmap '%s' is not shown: %s", node_name(n), b->name,
                    why.text);
        return 0;
    }
    if (r == 0 && usable) {
        r = qcow2_bitmap_load(n, b, dirty_bits(bm), &why);
        if (r < 0 && r != -ENOMEM) {
            log_warning("Node '%s': stored bitmap '%s' is inconsistent: %s", node_name(n), b->name,
                        why.text);
            b->quarantined = true;
            usable = false;
            r = 0;
        }
    }
    if (r < 0) {
        if (err)
            *err = why;
        return r;
    }
    if (!usable)
        dirty_set_inconsistent(bm);
    return 0;
}

static void report(const struct node *n, const struct qcow2_bitmap_list *l)
{
    if (l->broken[0])
        log_warning("Node '%s': %s", node_name(n), l->broken);
    for (size_t i = 0; i < l->n; i++) {
        const struct qcow2_bitmap *b = &l->items[i];
        if (b->quarantined)
            log_warning("Node '%s': stored bitmap '%s' %s: %s", node_name(n), b->name,
                        b->unfit ? "is left out" : "cannot be used", b->reason);
    }
}

static void set_readonly(struct node *n, bool readonly)
{
    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (is_stored(bm))
            dirty_set_readonly(bm, readonly);
}

static int load(struct image *im, struct error *err)
{
    struct node *n = im->node;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = NULL;

    int r = qcow2_bitmaps_read(n, &l, err);
    if (r < 0)
        return r;
    r = qcow2_bitmaps_check(n, l, BITS_MAX);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to read bitmap directory");
    report(n, l);
    remember_leaky(im, l);
    im->heal = l->broken[0] || im->n_leaky;
    for (size_t i = 0; i < l->n; i++) {
        if (l->items[i].unfit)
            im->heal = true;
        else if ((r = make_dirty(n, &l->items[i], err)) < 0)
            return r;
    }
    dirty_loaded(n);
    if (n->read_only) {
        set_readonly(n, true);
        return 0;
    }
    /* What is written from now on could make such a directory look like a good one. */
    return l->misplaced ? qcow2_bitmaps_drop(n, err) : qcow2_bitmaps_set_in_use(n, l, err);
}

/* ---- saving ---- */

static bool has_to_be_saved(const struct dirty_bitmap *bm)
{
    return is_stored(bm) && !dirty_inconsistent(bm) && !dirty_readonly(bm) && !dirty_busy(bm);
}

/* Inconsistent ones, and what is read-only, stay in the image as they are there; so does one that
 * somebody left busy, as in use: its bits are in two places. */
static int save(struct image *im, bool strict, struct error *err)
{
    struct node *n = im->node;
    size_t count = 0, i = 0;

    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        count += has_to_be_saved(bm);
    if (!count && (!im->heal || n->read_only))
        return 0;
    count += im->n_leaky;
    CLEANUP(memory_freep) struct qcow2_bitmap_save *list = calloc(count + 1, sizeof *list);
    if (!list)
        return error_set_errno(err, ENOMEM, "Failed to update bitmap extension");
    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm)) {
        bool leak = is_stored(bm) && is_leaky(im, dirty_name(bm));
        if (!has_to_be_saved(bm) && !leak)
            continue;
        list[i++] = (struct qcow2_bitmap_save){
            .name = dirty_name(bm),
            .bits = has_to_be_saved(bm) ? dirty_bits(bm) : NULL,
            .automatic = dirty_enabled(bm),
            .leak = leak,
        };
    }
    int r = qcow2_bitmaps_save(n, list, i, strict, err);
    if (r == 0) {
        im->heal = false;
        forget_leaky(im);
    }
    return r;
}

/* ---- opening, closing ---- */

static void forget(struct image *im)
{
    node_unobserve(im->node, &im->observer);
    forget_leaky(im);
    free(im);
}

int image_open(struct node *n, struct image **ret, struct error *err)
{
    struct image *im = xnew(struct image);
    im->node = n;
    im->observer.mark = observer_mark;
    im->observer.before_write = observer_before_write;
    im->observer.resizing = observer_resizing;
    node_observe(n, &im->observer);

    int r = load(im, err);
    if (r < 0)
        forget(im);
    else
        *ret = im;
    return r;
}

void image_close(struct image *im)
{
    struct error err = ERROR_INIT;

    if (save(im, false, &err) < 0)
        log_line(LOG_LEVEL_INFO, "Lost persistent bitmaps during inactivation of node '%s': %s",
                 node_name(im->node), err.text);
    forget(im);
}

static int save_for_reading(struct image *im, struct error *err)
{
    for (struct dirty_bitmap *bm = dirty_first(im->node); bm; bm = dirty_next(bm)) {
        int r = is_stored(bm) ? dirty_check(bm, DIRTY_CHECK_BUSY, err) : 0;
        if (r < 0)
            return r;
    }
    int r = save(im, true, err);
    if (r == 0)
        set_readonly(im->node, true);
    return r;
}

/* The stored ones must be as they were when they were read. (Those that were added since are not
 * stored and not read-only.) */
static void compare(struct node *n, struct qcow2_bitmap_list *l)
{
    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm)) {
        if (!is_stored(bm) || !dirty_readonly(bm) || dirty_inconsistent(bm))
            continue;
        const struct qcow2_bitmap *b = qcow2_bitmap_find(l, dirty_name(bm));
        if (b && !b->in_use)
            continue;
        log_warning("Node '%s': bitmap '%s' is inconsistent: it %s in the image meanwhile",
                    node_name(n), dirty_name(bm), b ? "has come into use" : "has gone");
        dirty_set_inconsistent(bm);
    }
}

static int make_writable(struct image *im, struct error *err)
{
    struct node *n = im->node;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = NULL;

    int r = qcow2_bitmaps_read(n, &l, err);
    if (r < 0)
        return r;
    compare(n, l);
    r = l->misplaced ? qcow2_bitmaps_drop(n, err) : qcow2_bitmaps_set_in_use(n, l, err);
    if (r == 0)
        set_readonly(n, false);
    return r;
}

int image_reopen(struct image *im, bool to_read_only, struct error *err)
{
    struct error why = ERROR_INIT;

    if (to_read_only)
        return save_for_reading(im, err);
    int r = make_writable(im, &why);
    im->blocked = r < 0;
    if (r < 0) {
        log_line(LOG_LEVEL_INFO, "%s: Failed to make dirty bitmaps writable: %s",
                 node_name(im->node), why.text);
        if (err)
            *err = why;
    }
    return r;
}

int image_can_add(struct image *im, const char *name, uint64_t granularity_bytes, struct error *err)
{
    uint32_t others = 0;
    uint64_t others_bytes = 0;

    for (struct dirty_bitmap *bm = dirty_first(im->node); bm; bm = dirty_next(bm)) {
        if (!dirty_name(bm))
            continue;
        if (!strcmp(dirty_name(bm), name))
            return error_set(err, EEXIST, "Bitmap already exists: %s", name);
        if (is_stored(bm)) {
            others++;
            others_bytes += qcow2_bitmap_entry_bytes(dirty_name(bm));
        }
    }
    return qcow2_bitmap_check_new(im->node, name, granularity_bytes, others, others_bytes, err);
}

int image_remove(struct image *im, const char *name, struct error *err)
{
    return qcow2_bitmap_remove(im->node, name, is_leaky(im, name), err);
}
