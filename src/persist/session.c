/* Sessions of a kept disk: from its first change to its close. See keeper.h. */
#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "block/file.h"
#include "persist/crc.h"
#include "persist/image.h"
#include "persist/keeper_internal.h"
#include "rt/clock.h"
#include "rt/io.h"

#include <inttypes.h>
#include <stdio.h>

/* ---- sessions ---- */

static void id_make(struct tide_id *id)
{
    random_bytes(id->bytes, sizeof id->bytes);
    id->bytes[0] |= 1; /* never none */
}

/* Of which node over the image bitmaps are: of its driver, and of what has made its disk of the
 * image's bytes below it. A raw format of the whole file is nothing there, but below another one,
 * with which it would share its name. */
static void describe_node(const struct node *n, char text[SUPER_DRIVER_BYTES])
{
    CLEANUP(memory_freep) char *all = NULL;
    bool raws = true;

    for (const struct edge *e; n; n = (e = node_primary(n)) ? e->node : NULL) {
        uint64_t offset = raw_offset(n);
        bool is_whole = !strcmp(node_driver_name(n), "raw") && !offset;
        if (all && (!n->driver->is_format || (is_whole && !raws)))
            continue;
        raws = raws && is_whole;
        CLEANUP(memory_freep) char *above = steal(all);
        all = xasprintf(offset ? "%s%s%s@%" PRIu64 : "%s%s%s", above ? above : "", above ? "/" : "",
                        node_driver_name(n), offset);
    }
    memset(text, 0, SUPER_DRIVER_BYTES);
    if (strlen(all) < SUPER_DRIVER_BYTES)
        strcpy(text, all);
    else
        snprintf(text, SUPER_DRIVER_BYTES, "%.20s#%08" PRIx32, all,
                 crc_end(crc_add(CRC_BEGIN, all, strlen(all))));
}

bool keeper_is_of_node(const struct keeper *k, const struct super *s)
{
    char text[SUPER_DRIVER_BYTES];

    describe_node(k->node, text);
    return !strcmp(s->driver, text);
}

void keeper_describe(struct keeper *k, struct super *s)
{
    s->level = k->options.level;
    describe_node(k->node, s->driver);
    s->size_bytes = node_size(k->node);
    s->resizing_bytes = k->resizing_bytes ? k->resizing_bytes : s->size_bytes;
    s->region_bits = k->options.region_bits;
    s->slots = k->options.slots;
    s->in_use = true;
}

int keeper_descriptor(const struct keeper *k)
{
    const struct node *n = k->node;

    while (n && strcmp(node_driver_name(n), "file") && strcmp(node_driver_name(n), "host_device")) {
        struct edge *e = node_primary(n);
        n = e ? e->node : NULL;
    }
    const struct file_state *s = n ? n->state : NULL;
    return s && s->now ? s->now->fd : -1;
}

/* Without a place for run segments a kill is like a power loss. */
static void use_runtime(struct keeper *k)
{
    struct error err = ERROR_INIT;

    if (k->options.runtime && segments_directory(k->options.runtime, &err) < 0) {
        log_warning("Node '%s': %s: after a kill its bitmaps will be as after a power loss",
                    node_name(k->node), err.text);
        free((char *)steal(k->options.runtime));
    }
    const char *doubt = k->options.runtime ? segments_doubt(k->options.runtime) : NULL;
    const struct keeper *peer;
    LIST_FOREACH (peer, k->options.peers, in_peers)
        if (doubt && peer->runtime_told && peer->options.runtime &&
            !strcmp(peer->options.runtime, k->options.runtime))
            doubt = NULL; /* once is enough */
    k->runtime_told = true;
    if (doubt)
        log_warning("The runtime directory '%s' %s", k->options.runtime, doubt);
}

/* A device is synced for it, and the page cache tells an error once. So the node flushes first:
 * then it knows that guests' writes are lost, and takes no more (block/host.c). */
static int take_witness(struct keeper *k, int fd, struct witness *ret)
{
    struct stat st;

    int r = io_fstat(fd, &st);
    if (r == 0 && S_ISBLK(st.st_mode) && !BROKEN(witness_before_flush))
        r = node_flush(k->node);
    return r < 0 ? r : witness_take(fd, ret);
}

/* A resize of a killed program may be in the page cache yet. Its superblock knows both sizes, that
 * of a new session one. The node flushes: an error is told once, and guests are to hear of it. */
static int settle_size(const struct keeper *k, const struct super *s, struct error *err)
{
    struct edge *e = node_primary(k->node);
    int r = 0;

    if (s->size_bytes != s->resizing_bytes && !BROKEN(size_left_in_cache))
        r = e ? edge_flush(e) : node_flush(k->node);
    return r < 0 ? error_set_errno(err, -r, "Could not flush the image") : 0;
}

int keeper_begin_session(struct keeper *k, struct change *c, struct error *err)
{
    struct super *s = &c->next;
    int fd = k->options.image ? -1 : keeper_descriptor(k), r = 0;

    c->begins = true;
    /* The same until it has begun: segments of an attempt that failed say it. */
    if (tide_id_none(&k->next_session))
        id_make(&k->next_session);
    s->session = k->next_session;
    if (k->epoch == 0)
        k->epoch = s->next_epoch ? s->next_epoch : 1;
    if ((k->void_tide && !BROKEN(guard_same_uuid)) || tide_id_none(&s->uuid)) {
        if (tide_id_none(&k->next_uuid))
            id_make(&k->next_uuid);
        s->uuid = k->next_uuid;
    }
    s->ring_sequence = k->ring_next ? k->ring_next : 1;
    if ((r = settle_size(k, s, err)) < 0)
        return r;
    if (fd >= 0 && (r = take_witness(k, fd, &s->witness)) < 0)
        return error_set_errno(err, -r, "Could not look at the image of node '%s'",
                               node_name(k->node));
    use_runtime(k);
    return 0;
}

struct segments keeper_segments(const struct keeper *k, const struct super *s)
{
    return (struct segments){k->options.runtime, s->uuid, s->session};
}

static bool is_used(void *opaque, uint64_t epoch)
{
    const struct keeper *k = opaque;
    const struct kept_set *s;

    LIST_FOREACH (s, &k->sets, link)
        if (s->epoch == epoch)
            return true;
    return false;
}

/* Those of the session before, and those that a program has left which was killed before it could
 * name them, or before it had taken away what it named no more: perhaps again and again. */
void keeper_drop_segments(struct keeper *k, const struct super *s)
{
    const struct segments of = keeper_segments(k, s);

    if (of.runtime)
        segments_sweep(&of, is_used, k);
}

void keeper_session_begun(struct keeper *k)
{
    const struct super *s = tide_super(k->tide);

    struct error err = ERROR_INIT;

    /* Only now: the old one tells of the old session as long as that holds. */
    const struct segments of = keeper_segments(k, s);
    if (of.runtime && stamp_create(&of, &k->stamp, &err) < 0)
        log_warning("Node '%s': %s", node_name(k->node), err.text);
    k->stamped = false;
    keeper_stamp_use(k, keeper_is_engaged(k));
    k->next_session = k->next_uuid = (struct tide_id){{0}};
    k->in_use = true;
    k->stale = k->void_tide = false;
    k->ring_next = s->ring_sequence + (s->level == TIDE_POWER); /* which has opened the ring */
    if (k->options.level == TIDE_POWER)
        k->hot = hot_new(
            &(struct hot_options){s->region_bits, s->slots, k->options.checkpoints.marked_max},
            &keeper_hot_ops, k);
    checkpoint_start(k);
}

/* ---- opening and closing ---- */

/* What tells that others have written the image, or that a segment is gone, may itself be gone
 * after the next crash: a file's times go with the power. So before anybody hears that the bitmaps
 * are inconsistent, the tide file says it; if it cannot, not even on a full tmpfs, it goes. */
static void keep_verdict(struct keeper *k)
{
    struct error err = ERROR_INIT;
    bool any = false;

    if (k->options.image && !k->guarded)
        return; /* the image says it, and will not vouch for this file again */
    for (size_t i = 0; k->tide && i < tide_super(k->tide)->table.n; i++)
        any |= !tide_super(k->tide)->table.items[i].inconsistent;
    if (!any && !(k->tide && tide_is_doubtful(k->tide)))
        return;
    LOCKED(&k->lock);
    if (!BROKEN(verdict_given_up_on))
        keeper_begin_use(k);
    else if (keeper_change_state(k, &err) < 0)
        log_warning("Node '%s': %s", node_name(k->node), err.text);
}

int keeper_open(struct node *n, const struct keeper_options *o, struct keeper **ret,
                struct error *err)
{
    struct keeper *k = xnew(struct keeper);

    k->node = n;
    k->options = *o;
    k->options.path = xstrdup(o->path);
    k->options.runtime = o->runtime ? xstrdup(o->runtime) : NULL;
    mutex_init(&k->lock);
    mutex_init(&k->area_lock);
    mutex_init(&k->ring_lock);
    scope_init(&k->tasks);
    checkpoint_init(k);
    LIST_INIT(&k->sets);
    LIST_INSERT_HEAD(k->options.peers, k, in_peers);
    int r = keeper_recover(k, err);
    if (r < 0) {
        keeper_free(k);
        return r;
    }
    keeper_look(k);
    if (k->recovery.verdict == RECOVERY_NONE && !n->read_only && !BROKEN(verdict_not_kept))
        keep_verdict(k);
    keepers_ask_again(k->options.peers);
    *ret = k;
    return 0;
}

void keeper_free(struct keeper *k)
{
    struct keeper *peer;
    struct kept_set *s;

    LIST_REMOVE(k, in_peers);
    LIST_FOREACH (peer, k->options.peers, in_peers)
        peer->voided = false; /* a tide file is left, perhaps of that one's image */
    checkpoint_stop(k);
    hot_free(k->hot);
    durable_fini(&k->durable);
    keeper_forget_doubt(k);
    scope_fini(&k->tasks);
    while ((s = LIST_FIRST(&k->sets)))
        keeper_set_free(s);
    stamp_close(k->stamp);
    tide_close(k->tide);
    free(k->recovery.reason);
    free(k->options.path);
    free((char *)k->options.runtime);
    free(k);
}

/* Everything that memory knows is in the areas, the image is as durable as they are, and its
 * witness is taken after both: then the superblock may say that it is closed.
 *
 * An area lacks no more than what is in UNWRITTEN: a power loss a moment ago would have relied on
 * that, too. NULL: it may lack anything, and so does one that has just got its room. */
static int close_session(struct keeper *k, const struct range *unwritten, size_t n_unwritten,
                         struct error *err)
{
    const struct range all = range_make(0, node_size(k->node));
    CLEANUP(super_fini) struct super s = {0};
    struct edge *e = k->options.image ? NULL : node_primary(k->node);
    int fd = keeper_descriptor(k);

    /* Of a format all that its close would write, which would move the file's times. */
    int r = !k->options.image && node_has_to_finish(k->node) && !BROKEN(witness_before_metadata)
                ? node_finish(k->node)
            : e ? edge_flush(e)
                : node_flush(k->node);
    if (r < 0)
        return error_set_errno(err, -r, "Could not flush the image");
    super_copy(&s, tide_super(k->tide));
    keeper_drop_old_records(k, &s);
    for (size_t i = 0; r == 0 && i < s.table.n; i++) {
        struct tide_bitmap *b = &s.table.items[i];
        struct tide_area *areas[] = {&b->current, &b->successor};
        for (unsigned j = 0; r == 0 && j < 2; j++) {
            struct kept_set *set = keeper_set_at(k, areas[j]->epoch);
            if (!set)
                continue;
            bool some = unwritten && b->extent[areas[j]->extent];
            if (!b->extent[areas[j]->extent])
                r = tide_allocate(k->tide, &s, tide_extent_bytes(s.size_bytes, b->granularity_bits),
                                  &b->extent[areas[j]->extent], err);
            if (r == 0 &&
                (r = keeper_write_area(k, b, *areas[j], set->bits, some ? unwritten : &all,
                                       some ? n_unwritten : 1)) < 0)
                error_set_errno(err, -r, "Could not write '%s'", k->options.path);
        }
    }
    if (r == 0 && (r = tide_sync(k->tide)) < 0)
        error_set_errno(err, -r, "Could not write '%s'", k->options.path);
    if (r == 0 && fd >= 0 && (r = io_fsync(fd)) < 0) /* a flush leaves the file's times behind */
        error_set_errno(err, -r, "Could not flush the image");
    if (r == 0 && fd >= 0 && (r = witness_take(fd, &s.witness)) < 0)
        error_set_errno(err, -r, "Could not look at the image");
    if (r < 0)
        return r;
    if (BROKEN(group_close_drops_record))
        while (s.n_records)
            super_drop_record(&s, &s.records[0].group);
    if (keeper_in_doubt(k))
        keeper_carry_groups(k, &s); /* in the extents that these have now */
    s.in_use = false;
    s.ring_sequence = k->ring_next;
    return tide_write_super(k->tide, &s, err);
}

/* Of a session that has ended well: its sets' are closed with them. */
static void drop_all_segments(struct keeper *k, const struct super *old)
{
    const struct segments of = keeper_segments(k, old);
    struct kept_set *s;

    if (!of.runtime)
        return;
    LIST_FOREACH (s, &k->sets, link)
        if (s->segment && !s->segment_ended)
            segment_drop(s->segment);
        else
            segment_unlink(&of, s->epoch);
    stamp_unlink(&of);
}

/* Has a set got bits that no commit has taken? */
static bool has_unannounced(const struct keeper *k)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm)) {
        struct dirty_state st;
        dirty_get_state(bm, &st);
        if (st.unannounced)
            return true;
    }
    return false;
}

/* Ends the session, if there is one, and tells what went wrong: then it is as after a kill. */
static void end_session(struct keeper *k)
{
    struct error err = ERROR_INIT;
    CLEANUP(super_fini) struct super old = {0};
    CLEANUP(memory_freep) struct range *unwritten = NULL;
    size_t n_unwritten = 0;
    int r = 0;

    /* An image has no place for two outcomes: while it is in doubt its tide file has all. */
    if (k->options.image && (k->lost || k->node->read_only || !keeper_in_doubt(k))) {
        keeper_end_guarded(k);
        return;
    }
    if (k->stale && !k->node->read_only && k->tide)
        r = keeper_commit(k, &err); /* what recovery has found is not found twice */
    if (r < 0 && !BROKEN(full_tmpfs_ends_nothing) && keeper_do_without_runtime(k, &err))
        r = keeper_commit(k, &err);
    checkpoint_stop(k);
    if (k->hot && k->tide && !k->damaged && !has_unannounced(k))
        unwritten = keeper_unwritten(k, &n_unwritten);
    hot_free(steal(k->hot));
    durable_fini(&k->durable);
    LOCKED(&k->lock); /* what is gone from memory may yet be collected (keeper_bits_gone) */
    if (!k->in_use || !k->tide || k->lost)
        return;
    super_copy(&old, tide_super(k->tide));
    if (old.table.n == 0)
        keeper_drop_old_records(k, &old);
    if (r == 0 && tide_failed(k->tide))
        r = -EIO;
    if (r == 0)
        r = old.table.n == 0 && old.n_records == 0 ? tide_remove(steal(k->tide), &err)
                                                   : close_session(k, unwritten, n_unwritten, &err);
    k->in_use = k->damaged = false;
    if (r == 0)
        drop_all_segments(k, &old);
    else
        log_warning("Node '%s': %s: its bitmaps are recovered when it is next opened",
                    node_name(k->node), err.text);
    stamp_close(steal(k->stamp));
}

void keeper_close(struct keeper *k)
{
    end_session(k);
    keeper_free(k);
}

void keeper_set_readonly(struct keeper *k, bool readonly)
{
    for (struct dirty_bitmap *bm = dirty_first(k->node); bm; bm = dirty_next(bm))
        if (keeper_keeps(bm))
            dirty_set_readonly(bm, readonly);
}

/* Opens the tide file for writing. One that was read has had no lock: is it what was read? Not if
 * somebody had a session then: marks in its segments and its areas change no superblock. */
static int open_again(struct keeper *k, bool *same, struct error *err)
{
    struct tide *t;

    *same = true;
    if (!tide_read_only(k->tide))
        return 0;
    const struct super *was = tide_super(k->tide);
    int r = tide_open(k->options.path, false, &t, err);
    if (r < 0)
        return r;
    const struct super *is = tide_super(t);
    *same = tide_id_equal(&was->uuid, &is->uuid) && was->sequence == is->sequence &&
            (!tide_is_beside_writer(k->tide) || BROKEN(read_beside_writer_believed));
    tide_close(k->tide);
    k->tide = t;
    return 0;
}

/* Is the image as the bitmaps of memory are? The node can be written to in any case: what cannot be
 * found out makes them inconsistent. */
static void go_on(struct keeper *k, bool undone)
{
    struct error err = ERROR_INIT;
    char why[160] = "its tide file has been written meanwhile";
    bool same;

    int r = open_again(k, &same, &err);
    if (r < 0) {
        tide_close(steal(k->tide)); /* it was read only; the next change makes a new one */
        if (r == -ENOENT)
            snprintf(why, sizeof why, "its tide file has gone meanwhile");
        else
            snprintf(why, sizeof why, "%.*s", (int)sizeof why - 1, err.text);
    } else if (same && undone && !k->options.image) {
        return;
    } else if (same) {
        enum witness_verdict v = keeper_ask_witness(k, tide_super(k->tide), why, sizeof why);
        if (v == WITNESS_SAME ||
            (v == WITNESS_UNKNOWN && k->options.no_witness == NO_WITNESS_BELIEVE))
            return;
        if (v == WITNESS_UNKNOWN)
            snprintf(why, sizeof why, "nothing tells whether others have written the image");
    }
    log_warning("Node '%s': its bitmaps are inconsistent: %s", node_name(k->node), why);
    if (k->options.image)
        keeper_decide(k, RECOVERY_NONE, why); /* it knows for itself what it still has */
    else
        keeper_distrust(k, why);
    k->stale = k->tide;
    k->void_tide = k->options.image || (k->tide && tide_is_doubtful(k->tide));
    if (!k->options.image && !BROKEN(verdict_not_kept))
        keep_verdict(k);
}

int keeper_reopen(struct keeper *k, bool to_read_only, bool undone, struct error *err)
{
    struct kept_set *s;
    int r = 0;

    if (!to_read_only) {
        if (k->tide)
            go_on(k, undone);
        if (k->options.image)
            r = image_reopen(k->options.image, false, !k->void_tide, err);
        if (r == 0)
            r = keeper_recheck_guard(k, err);
        if (r < 0)
            return r;
        keeper_set_readonly(k, false);
        dirty_loaded(k->node);
        return 0;
    }
    for (struct dirty_bitmap *bm = dirty_first(k->node); r == 0 && bm; bm = dirty_next(bm))
        if (keeper_keeps(bm) && !dirty_held(bm))
            r = dirty_check(bm, DIRTY_CHECK_BUSY, err);
    if (r == 0)
        keeper_before_save(k);
    if (r == 0 && k->options.image)
        r = image_reopen(k->options.image, true, true, err);
    if (r < 0)
        return r;
    end_session(k);
    LIST_FOREACH (s, &k->sets, link)
        s->segment_ended = true;
    keeper_set_readonly(k, true);
    return 0;
}

const char *keeper_path(const struct keeper *k)
{
    return k->options.path;
}

bool keeper_has_tide(const struct keeper *k)
{
    return k->tide;
}

int keeper_can_keep(const struct keeper *k, struct error *err)
{
    if (k->refusing || (k->lost && !k->options.image))
        return error_set(err, EIO, "The tide file '%s' cannot be written", k->options.path);
    return 0;
}

int keeper_can_add(struct keeper *k, const char *name, uint64_t granularity_bytes,
                   struct error *err)
{
    int r = keeper_can_keep(k, err);
    if (r < 0)
        return r;
    if (k->node->read_only)
        return error_set(err, EACCES, "Node '%s' is read-only", node_name(k->node));
    if (strlen(name) > TIDE_NAME_MAX)
        return error_set(err, EINVAL, "Bitmap name is too long: %zu bytes", strlen(name));
    return 0;
}

struct json_object *keeper_info(struct keeper *k)
{
    if (k->recovery.verdict == RECOVERY_NEW)
        return NULL;
    static const char *const names[] = {"new", "clean", "exact", "superset", "none"};
    struct json_object *info = json_object_new_object();

    json_add_string(info, "state", names[k->recovery.verdict]);
    if (k->recovery.reason && *k->recovery.reason)
        json_add_string(info, "reason", k->recovery.reason);
    json_add_uint(info, "bytes-added", k->recovery.bytes_added);
    if (k->recovery.witness)
        json_add_string(info, "witness", k->recovery.witness);
    if (keeper_in_doubt(k)) {
        struct json_object *doubt = json_object_new_object();
        char group[33];
        keeper_group_text(&k->doubt.group, group);
        json_add_string(doubt, "group", group);
        json_add_string(doubt, "coordinator", k->doubt.coordinator.path);
        json_add(info, "in-doubt", doubt);
    }
    return info;
}

struct json_object *keeper_hot_info(const struct keeper *k)
{
    struct hot_stats now;

    if (!k->hot)
        return NULL;
    hot_stats(k->hot, &now);
    struct json_object *info = json_object_new_object();
    json_add_uint(info, "region-size", 1ull << k->options.region_bits);
    json_add_uint(info, "slots", k->options.slots);
    json_add_uint(info, "hot", now.hot);
    json_add_uint(info, "clean", now.clean);
    json_add_uint(info, "waiting", now.waiting);
    json_add_uint(info, "commits", now.commits);
    json_add_uint(info, "entered", now.entered);
    json_add_uint(info, "cleanings", now.cleanings);
    json_add_uint(info, "cleaned", now.cleaned);
    json_add_uint(info, "passed", k->durable.passed);
    json_add_uint(info, "marked", now.marked);
    json_add_uint(info, "left", now.left);
    json_add_uint(info, "amount-cleanings", now.amount_cleanings);
    checkpoint_info(k, info);
    return info;
}
