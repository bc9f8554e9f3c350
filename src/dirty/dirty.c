/* Named dirty bitmaps: the list of a node, its marks, and what a job does to a bitmap.
 *
 * One write observer per node marks all that record, in one pass and before the data is
 * submitted. A failed write leaves marks: a superset. Nothing here takes a mark away, except a
 * clear, with no request inside the node (asserted).
 *
 *     bitmap, enabled        |#..#.....|  marks go here
 *        start   bits        |#..#.....|  frozen: the job reads them
 *                successor   |.........|  marks go here
 *        advance bits  :=    successor                 the handle keeps its name and its users
 *        roll back           successor |= remaining; bits := successor
 *
 * The handle (struct dirty_bitmap) of the bitmap lives on, the successor's bits move into it in
 * one step without a wait: no mark can fall between.
 *
 * Resizing. `peak_bytes` is the largest size that the disk has had since the bitmap was last empty
 * by a clear. A grow within it brings bytes back that were cut off: they read as zeroes now, the
 * base of the bitmap has something else there, so they are dirty. Bytes beyond the peak are in
 * nobody's base.
 *
 * What can go wrong: memory for a new set, or for one that is to follow a growing disk: an error
 * before anything has changed. Only a node that grows under a write from above (a file under
 * its format) cannot refuse; then the bitmap says that it cannot be trusted (inconsistent). */
#include "dirty/internal.h"

#include "base/log.h"

#include <gnutls/crypto.h>
#include <inttypes.h>
#include <stdio.h>

enum { BUCKETS_MIN = 16 }; /* a power of two */

static const char graph_key[1], node_key[1];

struct dirty_graph *dirty_graph_of(const struct node *n)
{
    return graph_get_data(node_graph(n), graph_key);
}

struct dirty_node *dirty_home(const struct node *n)
{
    return node_get_data(n, node_key);
}

void dirty_assert_quiet(const struct node *n)
{
    assert((n->inside == 0 || BROKEN(quiesced_without_waiting)) &&
           "what is marked changes while a write is under way");
}

/* How a bitmap is called in a message about it. */
static const char *title(const char *name)
{
    return name ? name : "(without name)";
}

/* ---- by name ---- */

static struct dirty_bucket *bucket_of(const struct dirty_node *home, const char *name)
{
    uint64_t hash = 0xcbf29ce484222325;

    for (; *name; name++)
        hash = (hash ^ (uint8_t)*name) * 0x100000001b3;
    return &home->buckets[(hash ^ hash >> 32) & (home->n_buckets - 1)];
}

static void index_grow(struct dirty_node *home)
{
    struct dirty_bitmap *bm;

    free(home->buckets);
    home->n_buckets = home->n_buckets ? home->n_buckets * 4 : BUCKETS_MIN;
    home->buckets = xcalloc(home->n_buckets, sizeof *home->buckets);
    TAILQ_FOREACH_REVERSE(bm, &home->list, dirty_list, link)
    if (bm->name)
        LIST_INSERT_HEAD(bucket_of(home, bm->name), bm, in_bucket);
}

/* ---- sets that the store knows ---- */

struct dirty_store *dirty_store_of(const struct node *n)
{
    struct dirty_graph *dg = graph_get_data(node_graph(n), graph_key);

    return dg ? dg->store : NULL;
}

/* BM has a base that is not durable yet. */
static void is_changed(struct dirty_bitmap *bm)
{
    struct dirty_graph *dg = dirty_graph_of(bm->home->node);

    bm->change = dg ? dg->changes : 0;
    bm->losses = graph_losses(node_graph(bm->home->node));
}

void dirty_free_bits(struct dirty_bitmap *bm, struct bitmap *bits)
{
    struct dirty_store *s = dirty_store_of(bm->home->node);

    if (bits && bm->kept && s && s->bits_gone && s->bits_gone(s, bm->home->node, bits))
        return;
    bitmap_free(bits);
}

/* ---- the observer ---- */

static void observer_mark(struct write_observer *o, struct range r)
{
    struct dirty_node *home = container_of(o, struct dirty_node, observer);
    struct dirty_bitmap *bm;

    TAILQ_FOREACH (bm, &home->list, link) {
        if (!bm->enabled)
            continue;
        bm->marked_since = true;
        bitmap_mark(bm->bits, r);
    }
}

static bool has_marked(const struct dirty_bitmap *bm)
{
    return bm->name && bm->kept && dirty_recording(bm);
}

/* What no write has announced is durable in no place: no hot region says it after a power loss, and
 * a close would not write it. So it is written now, while nobody is inside. (Not where a request
 * has called: a resize makes all durable itself.) If it cannot be, nobody may believe the bitmaps.
 */
static void observer_changed(struct write_observer *o, struct range r)
{
    struct dirty_node *home = container_of(o, struct dirty_node, observer);
    struct node *n = home->node;
    struct error err = ERROR_INIT;
    struct dirty_bitmap *bm;
    bool any = false;

    TAILQ_FOREACH (bm, &home->list, link)
        if (has_marked(bm))
            any = bm->unannounced = true;
    if (!any || !graph_lock_is_mine(node_graph(n)) || BROKEN(changed_not_durable) ||
        dirty_commit(&n, 1, &err) == 0)
        return;
    log_error("Node '%s': its bitmaps are inconsistent: %s", node_name(n), err.text);
    TAILQ_FOREACH (bm, &home->list, link)
        if (has_marked(bm))
            dirty_set_inconsistent(bm);
    error_clear(&err);
    if (dirty_commit(&n, 1, &err) < 0)
        log_error("Node '%s': %s", node_name(n), err.text);
}

/* Room for a disk of TO bytes, and then the size; NULL has room. */
static int make_room(struct dirty_bitmap *bm, struct bitmap *bits, uint64_t to)
{
    struct dirty_store *s = dirty_store_of(bm->home->node);
    int r = 0;

    if (bits && bm->kept && s && s->grow)
        r = s->grow(s, bm->home->node, bits, to);
    return bits && r == 0 ? bitmap_resize(bits, to) : r;
}

/* What grows is zeroes, as in the last backup: unless the bitmap once had it, or the disk has it
 * from somewhere else. */
static void follow_size(struct dirty_bitmap *bm, uint64_t from, uint64_t to)
{
    const struct node *n = bm->home->node;
    /* By a reopen: nobody has made room, and the graph is ours. */
    bool reopened = to > from && !n->truncating && graph_lock_is_mine(node_graph(n));
    bool strange = node_grows_by_content(n) || reopened;
    int r = reopened ? make_room(bm, bm->bits, to) : bitmap_resize(bm->bits, to);

    if (r == 0 && bm->before)
        r = reopened ? make_room(bm, bm->before, to) : bitmap_resize(bm->before, to);
    if (r < 0) {
        log_warning("no memory for dirty bitmap '%s' of node '%s' at %" PRIu64
                    " bytes: it is inconsistent from now on",
                    title(bm->name), node_name(bm->home->node), to);
        dirty_set_inconsistent(bm);
    }
    if (to > from)
        bitmap_mark(bm->bits, range_between(from, strange ? to : min_u64(to, bm->peak_bytes)));
    if (to > from && bm->before) /* which may have to be the bitmap again */
        bitmap_mark(bm->before, range_between(from, strange ? to : min_u64(to, bm->peak_before)));
    bm->peak_bytes = max_u64(bm->peak_bytes, to);
    bm->peak_before = bm->before ? max_u64(bm->peak_before, to) : 0;
}

static void observer_resized(struct write_observer *o, uint64_t from, uint64_t to)
{
    struct dirty_node *home = container_of(o, struct dirty_node, observer);
    struct dirty_bitmap *bm;

    TAILQ_FOREACH (bm, &home->list, link)
        follow_size(bm, from, to);
}

/* Makes room before the driver grows the disk, while it can still be refused. */
static int observer_resizing(struct write_observer *o, uint64_t from, uint64_t to,
                             struct error *err)
{
    struct dirty_node *home = container_of(o, struct dirty_node, observer);
    struct dirty_bitmap *bm;

    if (to <= from)
        return 0;
    TAILQ_FOREACH (bm, &home->list, link) {
        if (make_room(bm, bm->bits, to) == 0 && make_room(bm, bm->before, to) == 0)
            continue;
        observer_resized(o, to, from); /* smaller again, which cannot fail */
        return error_set(err, ENOMEM, "No memory for bitmap '%s' of node '%s' at %" PRIu64 " bytes",
                         title(bm->name), node_name(home->node), to);
    }
    return 0;
}

/* ---- nobody writes past a node whose bitmaps record ---- */

/* A transaction's disable or remove that can be undone yet counts as recording: what it gives up it
 * might not get back. */
static bool has_to_watch(const struct dirty_node *home)
{
    const struct dirty_bitmap *bm;

    TAILQ_FOREACH (bm, &home->list, link)
        if (bm->name && (dirty_recording(bm) || bm->ended))
            return true;
    return false;
}

int dirty_watch(struct dirty_bitmap *bm, struct error *err)
{
    struct node *n = bm->home->node;

    if (node_watched(n) || !bm->name || !dirty_recording(bm))
        return 0;
    int r = node_set_watched(n, true, err);
    return r < 0 ? error_wrap(err, "Bitmap '%s' of node '%s' would miss what others write",
                              bm->name, node_name(n))
                 : 0;
}

void dirty_unwatch(struct dirty_node *home)
{
    if (node_watched(home->node) && !has_to_watch(home))
        (void)!node_set_watched(home->node, false, NULL);
}

void dirty_loaded(struct node *n)
{
    if (dirty_home(n))
        dirty_unwatch(dirty_home(n));
}

/* ---- the room's place in the graph ---- */

/* The observer stays for the node's life: it could not come and go while requests are inside, and
 * bitmaps that do not record may. */
static struct dirty_node *make_home(struct node *n)
{
    struct dirty_node *home = dirty_home(n);

    if (!home) {
        home = xnew(struct dirty_node);
        home->node = n;
        home->observer.mark = observer_mark;
        home->observer.changed = observer_changed;
        home->observer.resizing = observer_resizing;
        home->observer.resized = observer_resized;
        TAILQ_INIT(&home->list);
        node_set_data(n, node_key, home);
        node_observe(n, &home->observer);
    }
    return home;
}

static int hook_opened(struct graph_hook *h, struct node *n, struct error *err)
{
    make_home(n);
    return 0;
}

static void hook_closing(struct graph_hook *h, struct node *n)
{
    struct dirty_node *home = dirty_home(n);

    if (!home)
        return;
    struct dirty_bitmap *bm;
    TAILQ_FOREACH (bm, &home->list, link) {
        bm->busy = false;
        bm->successor = NULL; /* is in the list itself */
        free(steal(bm->why_held));
    }
    while ((bm = TAILQ_FIRST(&home->list)))
        dirty_release(bm);
    node_unobserve(n, &home->observer);
    node_set_data(n, node_key, NULL);
    free(home->buckets);
    free(home);
}

static void hook_gone(struct graph_hook *h)
{
    free(container_of(h, struct dirty_graph, hook));
}

void dirty_init(struct graph *g)
{
    struct dirty_graph *dg = xnew(struct dirty_graph);

    dg->hook.opened = hook_opened;
    dg->hook.closing = hook_closing;
    dg->hook.gone = hook_gone;
    graph_set_data(g, graph_key, dg);
    graph_add_hook(g, &dg->hook);
}

void dirty_set_store(struct graph *g, struct dirty_store *s)
{
    struct dirty_graph *dg = graph_get_data(g, graph_key);

    dg->store = s;
}

/* ---- finding and asking ---- */

static struct dirty_bitmap *skip_hidden(struct dirty_bitmap *bm)
{
    while (bm && bm->hidden)
        bm = TAILQ_NEXT(bm, link);
    return bm;
}

struct dirty_bitmap *dirty_first(struct node *n)
{
    struct dirty_node *home = dirty_home(n);

    return home ? skip_hidden(TAILQ_FIRST(&home->list)) : NULL;
}

struct dirty_bitmap *dirty_next(struct dirty_bitmap *bm)
{
    return skip_hidden(TAILQ_NEXT(bm, link));
}

struct dirty_bitmap *dirty_find(struct node *n, const char *name)
{
    struct dirty_node *home = dirty_home(n);
    struct dirty_bitmap *bm;

    if (!home || !home->n_buckets)
        return NULL;
    LIST_FOREACH (bm, bucket_of(home, name), in_bucket)
        if (!bm->hidden && !strcmp(bm->name, name))
            return bm;
    return NULL;
}

struct node *dirty_node(const struct dirty_bitmap *bm)
{
    return bm->home->node;
}

const char *dirty_name(const struct dirty_bitmap *bm)
{
    return bm->name;
}

uint64_t dirty_granularity(const struct dirty_bitmap *bm)
{
    return bitmap_granularity(bm->bits);
}

bool dirty_busy(const struct dirty_bitmap *bm)
{
    return bm->busy;
}

bool dirty_enabled(const struct dirty_bitmap *bm)
{
    return bm->enabled;
}

bool dirty_recording(const struct dirty_bitmap *bm)
{
    return bm->enabled || (bm->successor && bm->successor->enabled);
}

bool dirty_persistent(const struct dirty_bitmap *bm)
{
    return bm->persistent;
}

bool dirty_inconsistent(const struct dirty_bitmap *bm)
{
    return bm->inconsistent;
}

bool dirty_readonly(const struct dirty_bitmap *bm)
{
    return bm->readonly;
}

struct bitmap *dirty_bits(struct dirty_bitmap *bm)
{
    return bm->bits;
}

struct json_object *dirty_info(struct node *n)
{
    struct json_object *list = NULL;

    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm)) {
        struct json_object *info = json_object_new_object();
        if (bm->name)
            json_add_string(info, "name", bm->name);
        json_add_uint(info, "count", bitmap_count(bm->bits));
        json_add_uint(info, "granularity", dirty_granularity(bm));
        json_add_bool(info, "recording", dirty_recording(bm));
        json_add_bool(info, "busy", bm->busy);
        json_add_bool(info, "persistent", bm->persistent);
        if (bm->inconsistent)
            json_add_bool(info, "inconsistent", true);
        if (bm->persistent)
            json_add_uint(info, "x-tidemark-generation", bm->generation);
        if (bm->persistent && bm->last_job)
            json_add_string(info, "x-tidemark-last-job", bm->last_job);
        if (!list)
            list = json_object_new_array();
        json_object_array_add(list, info);
    }
    return list;
}

int dirty_sha256(struct dirty_bitmap *bm, char hex[65], struct error *err)
{
    /* The words that QEMU keeps: whole ones, at least one. */
    const uint64_t length = max_u64(align_up(bitmap_serial_length(bm->bits), 8), 8);
    uint8_t chunk[16 * 1024], digest[32];
    gnutls_hash_hd_t hash;

    int r = gnutls_hash_init(&hash, GNUTLS_DIG_SHA256);
    if (r < 0)
        return error_set(err, EIO, "SHA-256 is not available: %s", gnutls_strerror(r));
    for (uint64_t at = 0; at < length; at += sizeof chunk) {
        size_t n = min_u64(length - at, sizeof chunk);
        bitmap_serialise(bm->bits, at, chunk, n);
        gnutls_hash(hash, chunk, n);
    }
    gnutls_hash_deinit(hash, digest);
    for (size_t i = 0; i < sizeof digest; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    return 0;
}

int dirty_check(struct dirty_bitmap *bm, unsigned checks, struct error *err)
{
    const char *name = bm->name ? bm->name : "";

    if ((checks & DIRTY_CHECK_BUSY) && bm->why_held)
        return error_set(err, EBUSY, "Bitmap '%s' is in doubt and cannot be used: %s", name,
                         bm->why_held);
    if ((checks & DIRTY_CHECK_BUSY) && bm->busy)
        return error_set(err, EBUSY,
                         "Bitmap '%s' is currently in use by another operation and cannot be used",
                         name);
    if ((checks & DIRTY_CHECK_READONLY) && bm->readonly)
        return error_set(err, EACCES, "Bitmap '%s' is readonly and cannot be modified", name);
    if ((checks & DIRTY_CHECK_INCONSISTENT) && bm->inconsistent)
        return error_set(err, EINVAL, "Bitmap '%s' is inconsistent and cannot be used", name);
    return 0;
}

int dirty_lookup(struct graph *g, const char *node, const char *name, struct node **n,
                 struct dirty_bitmap **bm, struct error *err)
{
    struct node *found = graph_find(g, node);
    if (!found)
        return error_set(err, ENOENT, "Node '%s' not found", node);
    struct dirty_bitmap *b = dirty_find(found, name);
    if (!b)
        return error_set(err, ENOENT, "Dirty bitmap '%s' not found", name);

    if (n)
        *n = found;
    if (bm)
        *bm = b;
    return 0;
}

/* ---- coming and going ---- */

/* The cluster size, where there is one, but neither tiny nor huge. */
static uint64_t default_granularity(const struct node *n)
{
    uint64_t cluster = node_cluster_size(n);

    if (cluster == 0 || !is_power_of_2(cluster))
        return 64 * KiB;
    return max_u64(4 * KiB, min_u64(cluster, 64 * KiB));
}

int dirty_no_memory(const struct node *n, const char *name, uint64_t granularity_bytes,
                    struct error *err)
{
    return error_set(err, ENOMEM,
                     "No memory for bitmap '%s' of node '%s': %" PRIu64
                     " bytes at granularity %" PRIu64,
                     title(name), node_name(n), node_size(n), granularity_bytes);
}

static int check_new_name(struct node *n, const char *name, struct error *err)
{
    if (dirty_find(n, name))
        return error_set(err, EEXIST, "Bitmap already exists: %s", name);
    if (strlen(name) > DIRTY_NAME_MAX)
        return error_set(err, EINVAL, "Bitmap name too long: %s", name);
    return 0;
}

static int check_can_store(struct node *n, const char *name, uint64_t granularity_bytes,
                           struct error *err)
{
    struct dirty_store *s = dirty_store_of(n);

    if (s && s->can_add)
        return s->can_add(s, n, name, granularity_bytes, err);
    return error_set_errno(err, ENOTSUP, "Can't store persistent bitmaps to %s", node_name(n));
}

/* At the head of the list. Steals BITS. */
struct dirty_bitmap *dirty_enlist(struct dirty_node *home, const char *name, struct bitmap *bits)
{
    static uint64_t last_serial;
    struct dirty_bitmap *bm = xnew(struct dirty_bitmap);

    bm->home = home;
    bm->serial = ++last_serial;
    bm->name = name ? xstrdup(name) : NULL;
    bm->bits = bits;
    bm->peak_bytes = bitmap_size(bits);
    TAILQ_INSERT_HEAD(&home->list, bm, link);
    if (!name)
        return bm;
    if (++home->n_named > home->n_buckets)
        index_grow(home);
    else
        LIST_INSERT_HEAD(bucket_of(home, name), bm, in_bucket);
    return bm;
}

/* A bitmap that takes the place of one that the same transaction removes goes on with its
 * generation: who was not told the end must see which of the two it is. */
static uint64_t generation_before(const struct dirty_node *home, const char *name)
{
    const struct dirty_bitmap *bm;

    if (!name || !home->n_buckets)
        return 0;
    LIST_FOREACH (bm, bucket_of(home, name), in_bucket)
        if (bm->hidden && !strcmp(bm->name, name))
            return bm->generation;
    return 0;
}

int dirty_add(struct node *n, const char *name, uint64_t granularity_bytes, unsigned flags,
              struct dirty_bitmap **ret, struct error *err)
{
    int r;

    if (name && !*name)
        return error_set(err, EINVAL, "Bitmap name cannot be empty");
    if (!granularity_bytes)
        granularity_bytes = default_granularity(n);
    if (!is_power_of_2(granularity_bytes) || granularity_bytes < BITMAP_GRANULARITY_MIN ||
        granularity_bytes > BITMAP_GRANULARITY_MAX)
        return error_set(err, EINVAL, DIRTY_BAD_GRANULARITY);
    if ((flags & (DIRTY_PERSISTENT | DIRTY_LOADED)) == DIRTY_PERSISTENT &&
        (r = check_can_store(n, name, granularity_bytes, err)) < 0)
        return r;
    if (name && (r = check_new_name(n, name, err)) < 0) /* after it: that may have waited */
        return r;

    struct bitmap *bits = bitmap_new(node_size(n), granularity_bytes);
    if (!bits)
        return dirty_no_memory(n, name, granularity_bytes, err);
    if (!(flags & DIRTY_DISABLED))
        dirty_assert_quiet(n);
    uint64_t generation = BROKEN(added_again_unseen) ? 0 : generation_before(make_home(n), name);
    struct dirty_bitmap *bm = dirty_enlist(make_home(n), name, bits);
    bm->generation = generation;
    bm->enabled = !(flags & DIRTY_DISABLED);
    bm->persistent = bm->kept = flags & DIRTY_PERSISTENT;
    if (flags & DIRTY_LOADED)
        bm->peak_bytes = UINT64_MAX;
    else
        bm->unbased = true;
    is_changed(bm);
    if ((r = dirty_watch(bm, err)) < 0) {
        dirty_release(bm);
        return r;
    }
    if (ret)
        *ret = bm;
    return 0;
}

void dirty_release(struct dirty_bitmap *bm)
{
    struct dirty_node *home = bm->home;

    if (bm->why_held) {
        struct dirty_bitmap *s = steal(bm->successor);
        bm->busy = false;
        free(steal(bm->why_held));
        if (s)
            dirty_release(s);
    }
    assert(!bm->busy && !bm->successor);
    TAILQ_REMOVE(&home->list, bm, link);
    if (bm->name) {
        LIST_REMOVE(bm, in_bucket);
        home->n_named--;
    }
    if (bm->name)
        dirty_unwatch(home);
    dirty_free_bits(bm, bm->before);
    dirty_free_bits(bm, bm->bits);
    free(bm->last_job);
    free(bm->name);
    free(bm);
}

uint64_t dirty_serial(const struct dirty_bitmap *bm)
{
    return bm->serial;
}

struct dirty_bitmap *dirty_find_serial(struct node *n, uint64_t serial)
{
    struct dirty_bitmap *bm = dirty_first(n);
    while (bm && bm->serial != serial)
        bm = dirty_next(bm);
    return bm;
}

int dirty_remove_stored(struct dirty_bitmap *bm, struct error *err)
{
    struct dirty_store *s = dirty_store_of(bm->home->node);

    if (!bm->persistent || !s || !s->remove)
        return 0;
    return s->remove(s, bm->home->node, bm->name, err);
}

int dirty_remove(struct dirty_bitmap *bm, struct error *err)
{
    int r = dirty_remove_stored(bm, err);
    if (r < 0)
        return r;
    dirty_release(bm);
    return 0;
}

void dirty_hide(struct dirty_bitmap *bm)
{
    bm->hidden = true;
}

void dirty_unhide(struct dirty_bitmap *bm)
{
    assert(!bm->name || !dirty_find(bm->home->node, bm->name));
    bm->hidden = false;
}

/* ---- changing ---- */

int dirty_set_enabled(struct dirty_bitmap *bm, bool enabled, struct error *err)
{
    if (bm->enabled == enabled)
        return 0;
    dirty_assert_quiet(bm->home->node);
    bm->enabled = enabled;
    int r = dirty_watch(bm, err);
    if (r < 0) {
        bm->enabled = false;
        return r;
    }
    bm->ended = !enabled;
    bm->unbased = enabled; /* what was written while it was disabled is in no base of anybody */
    is_changed(bm);
    return 0;
}

void dirty_undo_enabled(struct dirty_bitmap *bm, bool enabled, bool based)
{
    bm->enabled = enabled;
    bm->unbased = !based;
    bm->ended = false;
    dirty_unwatch(bm->home);
}

bool dirty_based(const struct dirty_bitmap *bm)
{
    return !bm->unbased;
}

void dirty_set_busy(struct dirty_bitmap *bm, bool busy)
{
    bm->busy = busy;
}

void dirty_set_readonly(struct dirty_bitmap *bm, bool readonly)
{
    bm->readonly = readonly;
}

void dirty_set_inconsistent(struct dirty_bitmap *bm)
{
    bm->inconsistent = true;
    bm->enabled = false;
}

struct bitmap *dirty_clear(struct dirty_bitmap *bm)
{
    const uint64_t size = bitmap_size(bm->bits);
    struct bitmap *old = bm->bits;

    assert(!bm->successor);
    struct bitmap *clean = bitmap_new(size, bitmap_granularity(old));
    if (!clean)
        return NULL;
    dirty_assert_quiet(bm->home->node);
    if (BROKEN(clear_in_place)) {
        bitmap_merge(clean, old);
        bitmap_clear_all(old);
        bm->unbased = true;
        return clean;
    }
    if (!bm->before) {
        bm->before = old;
        bm->before_lent = true;
    }
    bm->bits = clean;
    is_changed(bm);
    bm->peak_before = max_u64(bm->peak_before, bm->peak_bytes);
    bm->peak_bytes = size;
    bm->marked_since = false;
    return old;
}

void dirty_restore(struct dirty_bitmap *bm, struct bitmap *old)
{
    assert(bitmap_size(old) == bitmap_size(bm->bits));
    if (bm->marked_since && !BROKEN(undone_clear_drops_marks)) {
        bitmap_merge(old, bm->bits);
        bm->unannounced = true;
    }
    if (bm->before == old) {
        bm->before = NULL;
        bm->before_lent = false;
    }
    dirty_free_bits(bm, bm->bits);
    bm->bits = old;
    bm->peak_bytes = max_u64(bm->peak_bytes, bm->peak_before);
}

void dirty_forget(struct dirty_bitmap *bm, struct bitmap *old)
{
    if (bm->before == old)
        bm->before_lent = false; /* dirty_settle frees it */
    else
        dirty_free_bits(bm, old);
}

int dirty_merge(struct dirty_bitmap *bm, struct dirty_bitmap *src, struct bitmap **undo,
                struct error *err)
{
    int r;

    if ((r = dirty_check(bm, DIRTY_CHECK_DEFAULT, err)) < 0 ||
        (r = dirty_check(src, DIRTY_CHECK_ALLOW_READONLY, err)) < 0)
        return r;
    if (bitmap_size(bm->bits) != bitmap_size(src->bits))
        return error_set(err, EINVAL,
                         "Bitmaps are of different sizes (destination size is %" PRIu64
                         ", source size is %" PRIu64 ") and can't be merged",
                         bitmap_size(bm->bits), bitmap_size(src->bits));
    /* A new set rather than bits in the old one: the store knows which sets it has. */
    struct bitmap *old = bm->bits, *merged = bitmap_dup(old);
    if (!merged)
        return dirty_no_memory(bm->home->node, bm->name, dirty_granularity(bm), err);
    dirty_assert_quiet(bm->home->node);
    bitmap_merge(merged, src->bits);
    bm->bits = merged;
    if (undo) {
        *undo = old;
        bm->marked_since = false;
    } else {
        dirty_free_bits(bm, old);
    }
    bm->peak_bytes = max_u64(bm->peak_bytes, src->peak_bytes);
    return 0;
}
