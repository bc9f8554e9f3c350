/* Which node keeps its bitmaps where, and the room's place in the graph.
 *
 *     qcow2          in the image (image.c), and between two saves in a tide file, too (guarded.c);
 *                    version 2, which has no place for them, as raw
 *     raw, file      in a tide file (keeper.c) beside the image
 *     other nodes    nowhere
 */
#include "persist/persist.h"

#include "base/log.h"
#include "block/driver.h"
#include "block/qcow2/bitmaps.h"
#include "block/qcow2/guard.h"
#include "dirty/dirty.h"
#include "persist/image.h"
#include "persist/keeper.h"
#include "persist/options.h"
#include "rt/io.h"

struct persist {
    struct graph_hook hook;
    struct dirty_store store;
    char *runtime; /* NULL: none */
    struct keepers keepers;
    struct { /* of tests; slots 0: as the options say */
        unsigned region_bits, slots, slice;
    } limits;
    struct checkpoint_options checkpoints; /* of tests; if they have set them */
    bool has_checkpoints;
};

/* Of one node, from its opening to its closing. */
struct persist_node {
    struct node *node;
    struct write_observer observer;
    struct image *image;   /* NULL: not qcow2, or version 2 */
    struct keeper *keeper; /* NULL: no tide file */
    char *why_none;        /* there is no place for one; NULL: there is, or none is wanted */
    bool off, told;
    bool was_read_only; /* it is being reopened, and others may have written it until then */
};

static const char graph_key[1], node_key[1];

static struct persist_node *node_of(const struct node *n)
{
    return node_get_data(n, node_key);
}

static struct keeper *keeper_of(const struct node *n)
{
    struct persist_node *pn = node_of(n);

    return pn ? pn->keeper : NULL;
}

/* ---- writes and sizes ---- */

static struct persist_node *observed(struct write_observer *o)
{
    return container_of(o, struct persist_node, observer);
}

/* A node whose bitmaps are saved at the end alone. */
static int use_image(struct node *n, struct image *im, struct error *err)
{
    bool records = false;

    for (struct dirty_bitmap *bm = dirty_first(n); bm; bm = dirty_next(bm))
        records |= keeper_keeps(bm) && dirty_recording(bm);
    return records ? image_use(im, err) : 0;
}

/* Any stored bitmap may be what changes. */
static int use_image_for_change(struct persist_node *pn, struct error *err)
{
    for (struct dirty_bitmap *bm = pn->image ? dirty_first(pn->node) : NULL; bm;
         bm = dirty_next(bm))
        if (keeper_keeps(bm))
            return image_use(pn->image, err);
    return 0;
}

static int observer_before_write(struct write_observer *o, struct range r)
{
    struct persist_node *pn = observed(o);
    int result = pn->image ? image_before_write(pn->image) : 0;

    if (result < 0)
        return result;
    if (pn->keeper)
        return keeper_before_write(pn->keeper, r);
    if (!image_in_use(pn->image) && use_image(pn->node, pn->image, NULL) < 0)
        return -EIO;
    return 0;
}

static void observer_mark(struct write_observer *o, struct range r)
{
    if (observed(o)->keeper)
        keeper_mark(observed(o)->keeper, r);
}

static void observer_written(struct write_observer *o, struct range r, int result)
{
    if (observed(o)->keeper)
        keeper_written(observed(o)->keeper, r);
}

static void observer_flushed(struct write_observer *o)
{
    if (observed(o)->keeper)
        keeper_flushed(observed(o)->keeper);
}

static int observer_resizing(struct write_observer *o, uint64_t from, uint64_t to,
                             struct error *err)
{
    struct persist_node *pn = observed(o);
    int r = pn->image ? image_resizing(pn->image, from, to, err) : 0;

    if (r < 0)
        return r;
    return pn->keeper ? keeper_resizing(pn->keeper, to, err) : use_image_for_change(pn, err);
}

static void observer_resized(struct write_observer *o, uint64_t from, uint64_t to)
{
    if (observed(o)->keeper)
        keeper_resized(observed(o)->keeper);
}

/* ---- opening and closing ---- */

static bool is_kept(const struct node *n)
{
    static const char *const drivers[] = {"raw", "file", "host_device", "nbd", "qcow2"};

    for (size_t i = 0; i < ARRAY_SIZE(drivers); i++)
        if (!strcmp(node_driver_name(n), drivers[i]))
            return true;
    return false;
}

/* Options that would do nothing are refused. */
static int check_not_kept(const struct node *n, struct error *err)
{
    if (!json_has(n->options, "x-tidemark-persist"))
        return 0;
    return error_set(err, EINVAL,
                     "Node '%s' with driver '%s' does not support the option 'x-tidemark-persist'",
                     node_name(n), node_driver_name(n));
}

static int open_keeper(struct persist *p, struct persist_node *pn, struct error *err)
{
    struct node *n = pn->node;
    CLEANUP(place_fini) struct place place = {0};
    struct keeper_options o = {.peers = &p->keepers, .image = pn->image, .runtime = p->runtime};

    int r = is_kept(n) ? persist_options_read(n, &o, &place, err) : check_not_kept(n, err);
    if (r < 0 || place.off || !place.tide) {
        pn->why_none = steal(place.why_none);
        pn->off = place.off;
        return r;
    }
    o.path = place.tide;
    o.slice = RING_SLICE;
    if (p->limits.slots) {
        o.region_bits = p->limits.region_bits;
        o.slots = p->limits.slots;
        o.slice = p->limits.slice;
        o.checkpoints.marked_max = o.slots / 2;
    }
    if (p->has_checkpoints) {
        o.checkpoints.idle_ns = p->checkpoints.idle_ns;
        o.checkpoints.period_ns = p->checkpoints.period_ns;
        o.checkpoints.flush_rest_ns = p->checkpoints.flush_rest_ns;
        if (o.checkpoints.flush_rest_ns == UINT64_MAX) {
            o.checkpoints.flush = false;
            o.checkpoints.marked_max = 0;
        }
    }
    return keeper_open(n, &o, &pn->keeper, err);
}

/* The image saves its bitmaps at a clean end, as QEMU's do; who wants more has not said where. */
static void tell_why_none(struct persist_node *pn)
{
    if (!pn->image || pn->off || !pn->why_none || pn->told || pn->node->read_only)
        return;
    pn->told = true;
    log_warning("Node '%s': its bitmaps do not survive a crash: %s", node_name(pn->node),
                pn->why_none);
}

/* No tide file, whatever an earlier life had: what a guard vouches for ends now, before anybody
 * writes. */
static int open_image_alone(struct persist_node *pn, struct error *err)
{
    int r = pn->node->read_only ? 0 : qcow2_guard_void(pn->node, err);

    r = r < 0 ? r : image_load_rest(pn->image, false, err);
    if (r == 0 && dirty_first(pn->node))
        tell_why_none(pn);
    return r;
}

static void close_node(struct persist_node *pn)
{
    struct error err = ERROR_INIT;

    if (pn->keeper)
        keeper_close(pn->keeper);
    else if (pn->image && image_save(pn->image, false, &err) < 0)
        log_line(LOG_LEVEL_INFO, "Lost persistent bitmaps during inactivation of node '%s': %s",
                 node_name(pn->node), err.text);
    if (pn->image)
        image_close(pn->image);
    free(pn->why_none);
    free(pn);
}

static int open_node(struct persist *p, struct persist_node *pn, struct error *err)
{
    struct node *n = pn->node;
    int r = 0;

    if (node_is_qcow2(n) && qcow2_can_guard(n))
        r = image_open(n, &pn->image, err);
    if (r == 0)
        r = open_keeper(p, pn, err);
    if (r == 0 && pn->image && !pn->keeper)
        r = open_image_alone(pn, err);
    return r;
}

static int hook_opened(struct graph_hook *h, struct node *n, struct error *err)
{
    struct persist *p = container_of(h, struct persist, hook);
    struct persist_node *pn = xnew(struct persist_node);

    pn->node = n;
    int r = open_node(p, pn, err);
    if (r < 0 || (!pn->image && !pn->keeper && !pn->why_none)) {
        if (pn->image)
            image_close(steal(pn->image)); /* nothing is saved that was not loaded */
        close_node(pn);
        return r;
    }
    if (pn->image || pn->keeper) {
        pn->observer = (struct write_observer){
            .before_write = observer_before_write,
            .mark = observer_mark,
            .written = observer_written,
            .flushed = observer_flushed,
            .resizing = observer_resizing,
            .resized = observer_resized,
        };
        node_observe(n, &pn->observer);
    }
    node_set_data(n, node_key, pn);
    return 0;
}

static void hook_closing(struct graph_hook *h, struct node *n)
{
    struct persist_node *pn = node_of(n);

    if (!pn)
        return;
    if (pn->image || pn->keeper)
        node_unobserve(n, &pn->observer);
    close_node(pn);
    node_set_data(n, node_key, NULL);
}

static int hook_reopening(struct graph_hook *h, struct node *n, bool to_read_only,
                          struct error *err)
{
    struct persist_node *pn = node_of(n);

    if (pn && to_read_only)
        pn->was_read_only = false; /* so far: it may be refused */
    if (pn && pn->keeper)
        return keeper_reopen(pn->keeper, to_read_only, !pn->was_read_only, err);
    if (!pn || !pn->image)
        return 0;
    int r = to_read_only ? 0 : qcow2_guard_void(n, err);
    return r < 0 ? r : image_reopen(pn->image, to_read_only, true, err);
}

/* Has it bitmaps that are kept, or a tide file yet that has had some? */
static bool has_kept(struct node *n)
{
    struct dirty_bitmap *bm = node_of(n) ? dirty_first(n) : NULL;

    while (bm && !keeper_keeps(bm))
        bm = dirty_next(bm);
    return bm || (keeper_of(n) && keeper_has_tide(keeper_of(n)));
}

/* N, or one that stands on it; NULL: none. */
static struct node *kept_on(struct node *n)
{
    struct node *kept = has_kept(n) ? n : NULL;
    struct edge *e;

    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (!kept && e->parent && node_primary(e->parent) == e)
            kept = kept_on(e->parent);
    return kept;
}

/* N, and those that stand on it, come to another image: it may have bitmaps of other nodes. */
static void tell_led(struct node *n)
{
    struct edge *e;

    if (keeper_of(n))
        keeper_led(keeper_of(n));
    TAILQ_FOREACH (e, &n->parents, in_parents)
        if (e->parent && node_primary(e->parent) == e)
            tell_led(e->parent);
}

/* Tide file, guard and in_use are of the image that was opened, and say nothing on another. */
static int hook_may_reopen(struct graph_hook *h, struct node *n, bool writable, bool other,
                           struct error *err)
{
    struct node *kept = other ? kept_on(n) : NULL;

    if (kept)
        return error_set(err, EBUSY,
                         "Node '%s' has, or had, persistent bitmaps, which are of the image that "
                         "it was opened with: 'file' of node '%s' cannot become another",
                         node_name(kept), node_name(n));
    if (other)
        tell_led(n);
    if (writable && node_of(n))
        node_of(n)->was_read_only = true;
    return writable && !node_of(n) && is_kept(n) ? persist_options_may_write(n, err) : 0;
}

static void hook_gone(struct graph_hook *h)
{
    struct persist *p = container_of(h, struct persist, hook);

    free(p->runtime);
    free(p);
}

/* ---- the store of dirty/ ---- */

/* A reopen may have led it to another. */
static int check_place(struct persist_node *pn, struct error *err)
{
    CLEANUP(place_fini) struct place place = {0};
    struct keeper_options o = {.image = pn->image};

    int r = persist_options_read(pn->node, &o, &place, err);
    if (r < 0 || (place.tide && !strcmp(place.tide, keeper_path(pn->keeper))))
        return r;
    return error_set(err, ENOTSUP,
                     "Can't store persistent bitmaps to %s: it was opened with another image",
                     node_name(pn->node));
}

static int store_can_add(struct dirty_store *s, struct node *n, const char *name,
                         uint64_t granularity_bytes, struct error *err)
{
    struct persist_node *pn = node_of(n);
    int r = pn && pn->keeper ? check_place(pn, err) : 0;

    if (r < 0)
        return r;
    if (pn && pn->image) {
        tell_why_none(pn);
        return image_can_add(pn->image, name, granularity_bytes, err);
    }
    if (node_is_qcow2(n) && !keeper_of(n)) /* version 2: QEMU's text */
        return qcow2_bitmap_check_new(n, name, granularity_bytes, 0, 0, err);
    if (pn && pn->why_none)
        return error_set(err, ENOTSUP, "Can't store persistent bitmaps to %s: %s", node_name(n),
                         pn->why_none);
    if (!pn)
        return error_set_errno(err, ENOTSUP, "Can't store persistent bitmaps to %s", node_name(n));
    return keeper_can_add(pn->keeper, name, granularity_bytes, err);
}

static int store_remove(struct dirty_store *s, struct node *n, const char *name, struct error *err)
{
    struct persist_node *pn = node_of(n);

    return pn && pn->image ? image_remove(pn->image, name, err) : 0;
}

static int store_can_rebuild(struct dirty_store *s, struct node *n, struct error *err)
{
    struct persist_node *pn = node_of(n);

    return pn && pn->keeper ? keeper_can_keep(pn->keeper, err) : 0;
}

/* Images without a tide file. */
static int use_images_for_change(struct node *const *nodes, size_t n, struct error *err)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < n; i++) {
        struct persist_node *pn = node_of(nodes[i]);
        if (pn && !pn->keeper && !nodes[i]->read_only)
            r = use_image_for_change(pn, err);
    }
    return r;
}

/* Each once. */
static size_t keepers_of(struct node *const *nodes, size_t n, struct keeper **ks)
{
    size_t count = 0;

    for (size_t i = 0; i < n; i++) {
        struct keeper *k = keeper_of(nodes[i]);
        for (size_t j = 0; k && j < count; j++)
            if (ks[j] == k)
                k = NULL;
        if (k)
            ks[count++] = k;
    }
    return count;
}

static int store_begin(struct dirty_store *s, struct node *const *nodes, size_t n,
                       struct error *err)
{
    CLEANUP(memory_freep) struct keeper **ks = xcalloc(n + 1, sizeof(struct keeper *));

    int r = use_images_for_change(nodes, n, err);
    return r < 0 ? r : keepers_begin(ks, keepers_of(nodes, n, ks), err);
}

static int store_commit(struct dirty_store *s, struct node *const *nodes, size_t n,
                        struct error *err)
{
    CLEANUP(memory_freep) struct keeper **ks = xcalloc(n + 1, sizeof(struct keeper *));

    int r = use_images_for_change(nodes, n, err);
    return r < 0 ? r : keepers_commit(ks, keepers_of(nodes, n, ks), err);
}

static int store_flush(struct dirty_store *s, struct node *n)
{
    return keeper_of(n) ? node_flush(n) : 0;
}

static int store_grow(struct dirty_store *s, struct node *n, struct bitmap *bits, uint64_t to)
{
    return keeper_of(n) ? keeper_grow(keeper_of(n), bits, to) : 0;
}

static bool store_bits_gone(struct dirty_store *s, struct node *n, struct bitmap *bits)
{
    return keeper_of(n) && keeper_bits_gone(keeper_of(n), bits);
}

/* ---- the room ---- */

void persist_init(struct graph *g)
{
    struct persist *p = xnew(struct persist);

    p->hook = (struct graph_hook){
        .opened = hook_opened,
        .closing = hook_closing,
        .may_reopen = hook_may_reopen,
        .reopening = hook_reopening,
        .gone = hook_gone,
    };
    p->store = (struct dirty_store){
        .can_add = store_can_add,
        .remove = store_remove,
        .can_rebuild = store_can_rebuild,
        .begin = store_begin,
        .commit = store_commit,
        .flush = store_flush,
        .grow = store_grow,
        .bits_gone = store_bits_gone,
    };
    graph_set_data(g, graph_key, p);
    graph_add_hook(g, &p->hook);
    dirty_set_store(g, &p->store);
    qcow2_claim_guards(g);
}

void persist_set_runtime(struct graph *g, const char *directory)
{
    struct persist *p = graph_get_data(g, graph_key);

    free(p->runtime);
    p->runtime = directory ? xstrdup(directory) : NULL;
}

void persist_set_limits(struct graph *g, unsigned region_bits, unsigned slots, unsigned slice)
{
    struct persist *p = graph_get_data(g, graph_key);

    assert(slots >= TIDE_SLOTS_MIN && slice && slice <= RING_SLICE);
    p->limits.region_bits = region_bits;
    p->limits.slots = slots;
    p->limits.slice = slice;
}

void persist_save_idle(struct node *n)
{
    if (keeper_of(n))
        (void)keeper_save_idle(keeper_of(n));
}

void persist_set_checkpoints(struct graph *g, uint64_t idle_ns, uint64_t period_ns,
                             uint64_t flush_rest_ns)
{
    struct persist *p = graph_get_data(g, graph_key);

    p->has_checkpoints = true;
    p->checkpoints.idle_ns = idle_ns;
    p->checkpoints.period_ns = period_ns;
    p->checkpoints.flush_rest_ns = flush_rest_ns;
}

struct json_object *persist_info(struct node *n)
{
    return keeper_of(n) ? keeper_info(keeper_of(n)) : NULL;
}

struct json_object *persist_hot_info(struct node *n)
{
    return keeper_of(n) ? keeper_hot_info(keeper_of(n)) : NULL;
}
