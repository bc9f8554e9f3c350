/* Dirty bitmaps in a qcow2 image, between two runs. See persist.h for when; block/qcow2/bitmaps.c
 * for how it is laid out and in which order written.
 *
 * What is loaded is `in_use` in the image, durably, before the node can be written: if we die, the
 * next program sees that the bits in the image are not to be trusted. A bitmap that was found so,
 * or whose bits cannot be read, is inconsistent here; its entry in the image is left as it is. */
#include "persist/qcow2_bitmaps.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/bitmaps.h"
#include "dirty/dirty.h"

static int load_one(struct node *n, const struct qcow2_bitmap *b, struct error *err)
{
    struct dirty_bitmap *bm = NULL;
    uint64_t granularity = (uint64_t)1 << b->granularity_bits;
    int r = dirty_add(n, b->name, granularity, DIRTY_PERSISTENT | DIRTY_LOADED | DIRTY_DISABLED,
                      &bm, err);
    if (r < 0)
        return r;
    bool usable = !b->in_use && !b->quarantined;
    if (usable) {
        struct error why = ERROR_INIT;
        if (qcow2_bitmap_load(n, b, dirty_bits(bm), &why) < 0) {
            log_warning("node '%s': bitmap '%s' is inconsistent: %s", node_name(n), b->name,
                        why.text);
            usable = false;
        }
    } else if (b->quarantined) {
        log_warning("node '%s': bitmap '%s' is inconsistent: %s", node_name(n), b->name, b->reason);
    }
    if (!usable)
        dirty_set_inconsistent(bm);
    else if (b->automatic)
        dirty_set_enabled(bm, true);
    if (node_read_only(n))
        dirty_set_readonly(bm, true);
    return 0;
}

int qcow2_persist_load(struct node *n, struct error *err)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *list = NULL;
    struct error why = ERROR_INIT;

    if (qcow2_bitmaps_read(n, &list, &why) < 0) {
        log_warning("node '%s': its bitmaps cannot be read: %s", node_name(n), why.text);
        return 0;
    }
    if (list->broken[0])
        log_warning("node '%s': %s: what follows is not used", node_name(n), list->broken);
    for (size_t i = 0; i < list->n; i++) {
        const struct qcow2_bitmap *b = &list->items[i];
        if (b->unfit) {
            log_warning("node '%s': entry %zu of the bitmap directory ('%.64s') is not used: %s",
                        node_name(n), i, b->name, b->reason);
            continue;
        }
        error_clear(&why);
        if (load_one(n, b, &why) < 0)
            log_warning("node '%s': bitmap '%s' is not used: %s", node_name(n), b->name, why.text);
    }
    if (!list->n || node_read_only(n))
        return 0;
    return qcow2_bitmaps_set_in_use(n, list, err);
}

/* ---- saving ---- */

static struct qcow2_bitmap_save to_save(struct dirty_bitmap *bm, const struct qcow2_bitmap *stored)
{
    struct qcow2_bitmap_save s = {
        .name = dirty_name(bm), .bits = dirty_bits(bm), .automatic = dirty_enabled(bm)};

    if (dirty_inconsistent(bm)) {
        s.in_use = true;
        if (stored) { /* as the image has it */
            s.bits = NULL;
            s.automatic = stored->automatic;
        }
    } else if (dirty_busy(bm)) {
        /* A job that nobody ended: what it has not folded back is not in the bits. */
        log_warning("bitmap '%s' is busy and is stored as inconsistent", s.name);
        s.in_use = true;
    }
    return s;
}

int qcow2_persist_save(struct node *n, struct error *err)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *old = NULL;
    CLEANUP(memory_freep) struct qcow2_bitmap_save *list = NULL;
    size_t count = 0, total = 0;
    struct dirty_bitmap *bm;

    for (bm = dirty_first(n); bm; bm = dirty_next(bm))
        total += dirty_persistent(bm) && dirty_name(bm);
    if (!total)
        return 0;
    int r = qcow2_bitmaps_read(n, &old, err);
    if (r < 0)
        return r;
    list = xcalloc(total, sizeof *list);

    /* The stored ones keep their order, new ones follow. */
    for (size_t i = 0; i < old->n; i++) {
        bm = old->items[i].unfit ? NULL : dirty_find(n, old->items[i].name);
        if (bm && dirty_persistent(bm) && !old->items[i].quarantined)
            list[count++] = to_save(bm, &old->items[i]);
    }
    for (bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (dirty_persistent(bm) && dirty_name(bm) && !qcow2_bitmap_find(old, dirty_name(bm)))
            list[count++] = to_save(bm, NULL);
    r = qcow2_bitmaps_save(n, list, count, err);
    if (r < 0)
        return r;
    for (bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (dirty_persistent(bm))
            dirty_set_readonly(bm, true);
    return 0;
}

int qcow2_persist_use(struct node *n, struct error *err)
{
    CLEANUP(qcow2_bitmap_list_freep) struct qcow2_bitmap_list *list = NULL;
    struct dirty_bitmap *bm;
    int r = qcow2_bitmaps_read(n, &list, err);

    if (r == 0 && list->n)
        r = qcow2_bitmaps_set_in_use(n, list, err);
    if (r < 0)
        return r;
    for (bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (dirty_persistent(bm))
            dirty_set_readonly(bm, false);
    return 0;
}

int qcow2_persist_can_add(struct node *n, const char *name, uint64_t granularity_bytes,
                          struct error *err)
{
    uint32_t others = 0;
    uint64_t bytes = 0;

    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        if (dirty_persistent(bm) && dirty_name(bm)) {
            others++;
            bytes += qcow2_bitmap_entry_bytes(dirty_name(bm));
        }
    return qcow2_bitmap_check_new(n, name, granularity_bytes, others, bytes, err);
}
