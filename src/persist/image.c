/* Persistent bitmaps of qcow2 nodes: when they are read, marked as in use, and saved.
 *
 *                        in the image            in memory
 *     read-only          as found                readonly: can be read, exported, backed up from
 *     read-write         as found                recording as `auto` says
 *     first change       in_use, durably
 *     saved              in_use 0
 *
 * QEMU sets in_use when it opens an image; here it is set before the first change, of content that
 * a bitmap records or of a bitmap: so an image that was only looked at is as it was, and one that
 * has been saved while it is idle can be used by anybody after a crash. in_use is durable before
 * the change that it speaks of is submitted.
 *
 * Two ways lead to a writable node whose image cannot say in_use: what is stored could not be
 * looked at after a reopen to read-write, or a save failed so that nobody knows which directory the
 * disk has. Then writes are refused (-EPERM as QEMU while bitmaps are read-only; -EIO while the
 * header cannot be written) until that is put right.
 *
 * A bitmap that cannot be used is shown as inconsistent and stays in the image, in use, until
 * somebody removes it. What goes wrong while saving at a close is told in the log: nobody is there
 * any more to get an error. The image then still says in_use, and the next open knows. */
#include "persist/image.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/bitmaps.h"
#include "dirty/dirty.h"
#include "rt/clock.h"
#include "rt/sync.h"

#include <stdio.h>

/* Of one qcow2 node, from its opening to its closing. */
struct image {
    struct node *node;
    struct qcow2_bitmap_list *list; /* while it is opened: as found */
    bool in_use;                    /* the image says so, durably */
    bool unsaved;                   /* it has not what memory has */
    struct mutex using;
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

int image_before_write(struct image *im)
{
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

int image_resizing(struct image *im, uint64_t from, uint64_t to, struct error *err)
{
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
static int make_dirty(struct node *n, struct qcow2_bitmap *b, struct dirty_bitmap **ret,
                      struct error *err)
{
    const unsigned flags = DIRTY_PERSISTENT | DIRTY_LOADED | (b->automatic ? 0 : DIRTY_DISABLED);
    bool usable = !b->in_use && !b->quarantined;
    struct error why = ERROR_INIT;
    struct dirty_bitmap *bm;

    *ret = NULL;
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
    /* QEMU's format has no place for it. Whoever has seen one before must not take this for the
     * same, nor for the next. */
    dirty_set_generation(bm, clock_wall_us(), NULL);
    *ret = bm;
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

static struct qcow2_bitmap *find(const struct image *im, const char *name)
{
    struct qcow2_bitmap *b = im->list ? qcow2_bitmap_find(im->list, name) : NULL;

    return b && !b->unfit ? b : NULL;
}

bool image_names(const struct image *im, const char *name)
{
    return find(im, name);
}

bool image_has(const struct image *im, const char *name)
{
    const struct qcow2_bitmap *b = find(im, name);

    return b && !b->in_use && !b->quarantined;
}

bool image_has_in_use(const struct image *im)
{
    for (size_t i = 0; im->list && i < im->list->n; i++)
        if (im->list->items[i].in_use && !im->list->items[i].unfit)
            return true;
    return false;
}

int image_load(struct image *im, const char *name, struct dirty_bitmap **ret, struct error *err)
{
    return make_dirty(im->node, find(im, name), ret, err);
}

static int read_list(struct image *im, struct error *err)
{
    struct node *n = im->node;

    int r = qcow2_bitmaps_read(n, &im->list, err);
    if (r < 0)
        return r;
    r = qcow2_bitmaps_check(n, im->list, BITS_MAX);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to read bitmap directory");
    report(n, im->list);
    remember_leaky(im, im->list);
    im->heal = im->list->broken[0] || im->n_leaky;
    for (size_t i = 0; i < im->list->n; i++)
        im->heal |= im->list->items[i].unfit;
    return 0;
}

/* That a bitmap is in use may be in the page cache alone, of a program that was killed before its
 * flush, and no bitmap of it records any more: what is written from now on must not outlive it. */
static int keep_in_use(struct node *n, const struct qcow2_bitmap_list *l, struct error *err)
{
    bool any = false;

    for (size_t i = 0; i < l->n; i++)
        any |= l->items[i].in_use;
    /* The other two would find that it is durable already, by this flush. */
    if (!any || BROKEN(found_in_use_not_flushed) || BROKEN(guard_found_in_use_believed) ||
        BROKEN(size_left_in_cache))
        return 0;
    int r = edge_flush(node_primary(n));
    return r < 0 ? error_set_errno(err, -r, "Could not flush the image") : 0;
}

int image_load_rest(struct image *im, bool unsaved, struct error *err)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = steal(im->list);
    struct node *n = im->node;
    int r = 0;

    im->unsaved = unsaved;
    for (size_t i = 0; r == 0 && i < l->n; i++) {
        struct dirty_bitmap *bm;
        if (!l->items[i].unfit && !dirty_find(n, l->items[i].name))
            r = make_dirty(n, &l->items[i], &bm, err);
    }
    if (r < 0)
        return r;
    dirty_loaded(n);
    if (n->read_only)
        set_readonly(n, true);
    else if (l->misplaced)
        /* What is written from now on could make such a directory look like a good one. */
        r = qcow2_bitmaps_drop(n, err);
    else
        r = qcow2_bitmaps_set_in_use(n, l, true, err);
    return r < 0 || n->read_only ? r : keep_in_use(n, l, err);
}

/* ---- in use ---- */

bool image_in_use(const struct image *im)
{
    return im->in_use;
}

int image_use(struct image *im, struct error *err)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = NULL;
    LOCKED(&im->using);

    /* What the disk has may say that nothing is in use, and would be believed beside a change. */
    if (qcow2_bitmaps_settle(im->node) < 0)
        return error_set_errno(err, EIO, "Failed to update bitmap extension");
    if (im->in_use)
        return 0;
    int r = qcow2_bitmaps_read(im->node, &l, err);
    if (r == 0)
        r = qcow2_bitmaps_set_in_use(im->node, l, false, err);
    if (r == 0)
        im->in_use = im->unsaved = true;
    return r;
}

/* ---- saving ---- */

static bool has_to_be_saved(const struct dirty_bitmap *bm)
{
    return is_stored(bm) && !dirty_inconsistent(bm) && !dirty_readonly(bm) && !dirty_busy(bm);
}

/* Does memory say all that is to be said of it? Not while a job has it, nor between a clear and the
 * flush that makes it hold. */
static bool is_settled(const struct dirty_bitmap *bm)
{
    struct dirty_state st;

    dirty_get_state(bm, &st);
    return !st.successor && !st.folded && !st.unannounced && st.based && !dirty_busy(bm);
}

static int check_settled(const struct image *im, struct error *err)
{
    for (struct dirty_bitmap *bm = dirty_first(im->node); bm; bm = dirty_next(bm))
        if (is_stored(bm) && !dirty_inconsistent(bm) && !is_settled(bm))
            return error_set(err, EBUSY, "Bitmap '%s' is in use", dirty_name(bm));
    return 0;
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

int image_save(struct image *im, bool strict, struct error *err)
{
    LOCKED(&im->using);

    if (!im->unsaved && !im->heal && !im->node->read_only)
        return 0;
    int r = strict ? check_settled(im, err) : 0;
    if (r == 0)
        r = save(im, strict, err);
    if (r == 0)
        im->in_use = im->unsaved = false;
    return r;
}

/* ---- opening, closing ---- */

void image_close(struct image *im)
{
    qcow2_bitmap_list_free(im->list);
    forget_leaky(im);
    free(im);
}

int image_open(struct node *n, struct image **ret, struct error *err)
{
    struct image *im = xnew(struct image);

    im->node = n;
    mutex_init(&im->using);
    int r = read_list(im, err);
    if (r < 0)
        image_close(im);
    else
        *ret = im;
    return r;
}

static int save_for_reading(struct image *im, struct error *err)
{
    for (struct dirty_bitmap *bm = dirty_first(im->node); bm; bm = dirty_next(bm)) {
        int r = is_stored(bm) ? dirty_check(bm, DIRTY_CHECK_BUSY, err) : 0;
        if (r < 0)
            return r;
    }
    int r = image_save(im, true, err);
    if (r == 0)
        set_readonly(im->node, true);
    return r;
}

/* The stored ones must be as they were when they were read. (Those that were added since are not
 * stored and not read-only. Those that came from elsewhere have their own witness.) */
static void compare(struct image *im, struct qcow2_bitmap_list *l, bool trust)
{
    struct node *n = im->node;

    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm)) {
        if (!is_stored(bm) || !dirty_readonly(bm) || dirty_inconsistent(bm))
            continue;
        const struct qcow2_bitmap *b = qcow2_bitmap_find(l, dirty_name(bm));
        if ((b && !b->in_use) || (im->unsaved && trust))
            continue;
        log_warning("Node '%s': bitmap '%s' is inconsistent: it %s in the image meanwhile",
                    node_name(n), dirty_name(bm), b ? "has come into use" : "has gone");
        dirty_set_inconsistent(bm);
    }
}

static int make_writable(struct image *im, bool trust, struct error *err)
{
    struct node *n = im->node;
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *l = NULL;

    int r = qcow2_bitmaps_read(n, &l, err);
    if (r < 0)
        return r;
    compare(im, l, trust);
    r = l->misplaced ? qcow2_bitmaps_drop(n, err) : 0;
    if (r == 0)
        r = keep_in_use(n, l, err);
    if (r == 0)
        set_readonly(n, false);
    return r;
}

int image_reopen(struct image *im, bool to_read_only, bool trust, struct error *err)
{
    struct error why = ERROR_INIT;

    if (to_read_only)
        return save_for_reading(im, err);
    int r = make_writable(im, trust, &why);
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
