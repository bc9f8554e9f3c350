/* A qcow2 image beside its tide file: which of the two tells of the bitmaps, and when.
 *
 * The image stays QEMU's. As long as it does not say in_use its own copies of the bitmaps are the
 * truth, whatever the tide file says; when it does, the tide file is, if the guard in the header
 * (block/qcow2/guard.h) vouches for it: if not, another program has written the image.
 *
 * At the first change, each durable before the next is begun:
 *
 *     tide file with the bitmaps as they are     or the guard would vouch for an older one; a new
 *                                                uuid unless our own crash is continued, so that
 *                                                no header names a file of another time
 *     extension -> bit                           guard.h
 *     in_use                                     or the image's copies, which miss what comes now,
 *                                                would be believed: by us, and by QEMU
 *     the change
 *
 * Saving, when the disk is idle or closed, with nobody inside the node (a write whose bit is not in
 * the copies must not pass while they still count as in use):
 *
 *     bits -> directory with in_use 0            qcow2/bitmaps_save.c
 *     at a close: tide file away -> guard away   cut between, the guard vouches for nothing, and
 *                                                nothing is in use
 *
 * To the byte, and what a reader must conclude: docs/format/qcow2-guard.md. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/guard.h"
#include "persist/image.h"
#include "persist/keeper_internal.h"

#include <stdio.h>

/* QEMU leaves the bit when it reopens for writing what it has opened read-only (as the backing
 * image that it commits into). As long as the boot lasts the stamp tells, but for the second of its
 * slack. */
static bool is_written_since(struct keeper *k, const struct super *s)
{
    const struct segments of = keeper_segments(k, s);
    uint64_t last_write_ns;
    int fd = keeper_descriptor(k);

    return s->in_use && fd >= 0 && of.runtime && stamp_find(&of, &last_write_ns) == 0 &&
           witness_written_since(fd, last_write_ns) && !BROKEN(guard_alone);
}

enum witness_verdict keeper_ask_guard(struct keeper *k, const struct super *s, char *why,
                                      size_t why_bytes)
{
    struct qcow2_guard g = {0};
    const char *reason = NULL;

    k->guarded = k->foreign = false;
    if (qcow2_guard_read(k->node, &g, NULL) < 0)
        reason = "the image's header cannot be read";
    else if (!g.named)
        reason = "the image does not name its tide file";
    else if (memcmp(g.uuid, s->uuid.bytes, sizeof g.uuid))
        reason = "the image names another tide file";
    else if (!g.set && !BROKEN(guard_bit_ignored))
        reason = "another program has opened the image for writing";
    else if (is_written_since(k, s))
        reason = "another program has written the image";
    snprintf(why, why_bytes, "%s", reason ? reason : "");
    if (BROKEN(guard_after_segment) && keeper_has_segments(k, s))
        reason = NULL;
    k->guarded = !reason;
    k->foreign = !g.named || memcmp(g.uuid, s->uuid.bytes, sizeof g.uuid);
    k->void_tide = !k->guarded || (k->void_tide && !BROKEN(guard_hides_damage));
    return reason ? WITNESS_CHANGED : WITNESS_SAME;
}

/* What it vouches for is somewhere else, or gone; writes that we do not tell of may come now. */
static int drop_stray_guard(struct keeper *k, struct error *err)
{
    struct qcow2_guard g;

    if (k->guarded || k->node->read_only)
        return 0;
    int r = qcow2_guard_read(k->node, &g, err);
    if (r == 0 && g.set)
        return qcow2_guard_void(k->node, err);
    /* That another program has taken the bit away may be in the page cache only. */
    if (r == 0 && g.named && !BROKEN(verdict_not_durable) && edge_flush(node_primary(k->node)) < 0)
        r = error_set_errno(err, EIO, "Could not flush the image");
    return r;
}

/* Bitmaps that have never been saved are nowhere but in the tide file. One that the image names
 * and that is not there had some, or a close that had nothing to save was cut before its end. */
static bool names_missing_tide(const struct keeper *k)
{
    struct qcow2_guard g = {0};

    return !k->tide && qcow2_guard_read(k->node, &g, NULL) == 0 && g.named && g.set;
}

int keeper_recover_image(struct keeper *k, struct error *err)
{
    struct image *image = k->options.image;

    if (k->recovery.verdict == RECOVERY_NEW && image_has_in_use(image)) {
        keeper_decide(k, RECOVERY_NONE, "the image has bitmaps in use, and there is no tide file");
        log_warning("Node '%s': %s", node_name(k->node), k->recovery.reason);
    }
    int r = image_load_rest(image, k->from_tide, err);
    if (r == 0 && k->recovery.verdict == RECOVERY_NEW && keeper_has_bitmaps(k)) {
        keeper_decide(k, RECOVERY_CLEAN, "");
    } else if (r == 0 && k->recovery.verdict == RECOVERY_NEW && names_missing_tide(k)) {
        keeper_decide(k, RECOVERY_NONE, "the image names a tide file, and there is none");
        log_warning("Node '%s': %s: bitmaps that were only there are lost", node_name(k->node),
                    k->recovery.reason);
    }
    return r < 0 ? r : drop_stray_guard(k, err);
}

int keeper_recheck_guard(struct keeper *k, struct error *err)
{
    return k->options.image ? drop_stray_guard(k, err) : 0;
}

bool keeper_is_engaged(const struct keeper *k)
{
    return !k->options.image || image_in_use(k->options.image);
}

static void vouch(struct keeper *k)
{
    struct error err = ERROR_INIT;

    if (k->guarded || k->lost)
        return;
    if (qcow2_guard_set(k->node, tide_super(k->tide)->uuid.bytes, &err) < 0)
        keeper_give_up(k, &err);
    else
        k->guarded = true;
}

int keeper_engage(struct keeper *k, struct error *err)
{
    if (keeper_is_engaged(k))
        return k->options.image ? image_use(k->options.image, err) : 0;
    if (BROKEN(guard_in_use_before_tide)) {
        int r = image_use(k->options.image, err);
        if (r < 0)
            return r;
    }
    if (BROKEN(guard_bit_before_tide) && k->tide &&
        qcow2_guard_set(k->node, tide_super(k->tide)->uuid.bytes, err) < 0)
        return -EIO;
    if (!k->in_use && !k->lost)
        keeper_begin_use(k);
    keeper_stamp_use(k, true);
    vouch(k);
    checkpoint_changed(k); /* what is to be saved when the disk is idle */
    return image_use(k->options.image, err);
}

bool keeper_save_idle(struct keeper *k)
{
    SHIELD();
    struct graph *g = node_graph(k->node);
    struct error err = ERROR_INIT;

    /* Who closes the node has the graph, and waits for us. */
    if (!k->options.image || !image_in_use(k->options.image))
        return true;
    if (!graph_trylock(g))
        return false;
    if (!BROKEN(guard_save_without_gate))
        graph_quiesce_begin(g, &k->node, 1);
    int r;
    {
        LOCKED(&k->lock);
        r = k->node->read_only ? 0 : image_save(k->options.image, true, &err);
        keeper_stamp_use(k, image_in_use(k->options.image));
    }
    if (!BROKEN(guard_save_without_gate))
        graph_quiesce_end(g, &k->node, 1);
    graph_unlock(g);
    if (r < 0 && r != -EBUSY)
        log_warning("Node '%s': %s: its bitmaps are not saved while it is idle", node_name(k->node),
                    err.text);
    return r != -EBUSY;
}

/* Others may yet ask for the records of a group: the file stays with them alone. */
static int leave_records(struct keeper *k, struct error *err)
{
    CLEANUP(super_fini) struct super s = {0};

    super_copy(&s, tide_super(k->tide));
    tide_table_fini(&s.table);
    keeper_carry_groups(k, &s); /* nothing is in doubt: it asks nobody any more */
    s.in_use = false;
    return tide_write_super(k->tide, &s, err);
}

static bool is_kept(void *opaque, uint64_t epoch)
{
    return false;
}

static void end_tide(struct keeper *k)
{
    CLEANUP(super_fini) struct super old = {0};
    struct error err = ERROR_INIT;

    if (k->tide) {
        super_copy(&old, tide_super(k->tide));
        keeper_drop_old_records(k, &old);
        int r = old.n_records ? leave_records(k, &err) : tide_remove(steal(k->tide), &err);
        if (r < 0)
            log_warning("Node '%s': %s", node_name(k->node), err.text);
        error_clear(&err);
        const struct segments of = keeper_segments(k, &old);
        if (of.runtime) {
            segments_sweep(&of, is_kept, NULL);
            stamp_unlink(&of);
        }
    }
    struct kept_set *set;
    LIST_FOREACH (set, &k->sets, link) /* if the node becomes writable again, they get new ones */
        memset(set->of->extent, 0, sizeof set->of->extent);
    k->guarded = false;
    if (qcow2_guard_clear(k->node, &err) < 0)
        log_warning("Node '%s': %s", node_name(k->node), err.text);
}

/* Saving writes to the image: until it is done its times must be ours. */
void keeper_before_save(struct keeper *k)
{
    struct error err = ERROR_INIT;
    LOCKED(&k->lock);

    if (k->options.image && k->tide && k->stale && !k->in_use && !k->lost && !k->node->read_only &&
        keeper_has_bitmaps(k) && keeper_engage(k, &err) < 0)
        log_warning("Node '%s': %s", node_name(k->node), err.text);
}

void keeper_end_guarded(struct keeper *k)
{
    struct error err = ERROR_INIT;

    keeper_before_save(k);
    checkpoint_stop(k);
    hot_free(steal(k->hot));
    durable_fini(&k->durable);
    LOCKED(&k->lock); /* what is gone from memory may yet be collected (keeper_bits_gone) */
    const bool read_only = k->node->read_only; /* then there is what was added since, at most */
    int r = image_save(k->options.image, !k->lost && !read_only, &err);
    if (r < 0 && (k->lost || read_only))
        log_line(LOG_LEVEL_INFO, "Lost persistent bitmaps during inactivation of node '%s': %s",
                 node_name(k->node), err.text);
    else if (r < 0)
        log_warning("Node '%s': %s: its bitmaps are recovered when it is next opened",
                    node_name(k->node), err.text);
    /* What it writes later than the stamp says would count as another's. */
    if (r < 0 && !read_only && !BROKEN(stamp_ends_before_driver) && node_finish(k->node) < 0)
        log_warning("Node '%s': what it writes in closing may count as another program's",
                    node_name(k->node));
    if (!read_only && (r == 0 || k->lost))
        end_tide(k);
    k->in_use = false;
    stamp_close(steal(k->stamp));
}
