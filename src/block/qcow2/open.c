/* Opening, closing, options, and the driver's table.
 *
 * Opening reads header, L1 table, refcount table and snapshot table, each checked against QEMU's
 * limits before memory is taken for it. Where we may write: autoclear bits that we do not keep
 * true are cleared, and an image with the dirty bit gets its refcounts counted anew (repair.c). */
#include "block/qcow2/qcow2.h"

#include "base/log.h"

#include <stdio.h>

static int probe(const uint8_t *buf, size_t n)
{
    return qcow2_header_probe(buf, n) ? 100 : 0;
}

int qcow2_write_header(struct qcow2 *q)
{
    LOCKED(&q->header_lock);
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(q->cluster_size);
    if (!buf)
        return -ENOMEM;
    struct qcow2_header *h = &q->header;
    const uint64_t name_was = h->backing_offset;
    const uint32_t name_had = h->backing_length;
    int n = qcow2_header_encode(h, buf);
    if (n < 0)
        return n;
    const uint64_t name = h->backing_offset;
    bool apart = n > SECTOR && h->extensions_end <= SECTOR && (name == name_was || name >= SECTOR);
    if (apart && name != name_was) {
        int r = file_write(q, name, buf + name, align_up((uint64_t)n, SECTOR) - name);
        if (r == 0)
            r = file_flush(q);
        if (r < 0) {
            h->backing_offset = name_was; /* the disk's header says so */
            h->backing_length = name_had;
            return r;
        }
    }
    if (apart)
        return file_write(q, 0, buf, SECTOR);
    /* What a longer one has left behind it stays: if it is to be torn, then not there, where the
     * old one may have its backing file's name. */
    return file_write(q, 0, buf, align_up((uint64_t)n, SECTOR));
}

/* ---- options ---- */

struct options {
    uint64_t l2_cache_bytes, refcount_cache_bytes;
    uint32_t slice_bytes;
    bool pass_discard[FREE_OTHER + 1];
    bool request_as_node;
    bool overlap_checks;
    bool lazy_refcounts;
};

enum {
    L2_CACHE_MAX_BYTES = 32 << 20,
    REFCOUNT_CACHE_BYTES = 1 << 20, /* 256 slices of 4 KiB: 32 GiB of a file with 64 KiB clusters */
    SLICE_BYTES = 4096,
    CACHE_SLICES_MIN = 16,
};

static int parse_caches(const struct qcow2 *q, struct json_object *o, struct options *ret,
                        struct error *err)
{
    bool both = json_has(o, "cache-size"), l2 = json_has(o, "l2-cache-size");
    bool refcount = json_has(o, "refcount-cache-size");
    uint64_t combined = json_get_uint(o, "cache-size", 0);
    uint64_t needed = align_up(clusters_of(q, q->header.size_bytes) * 8, q->cluster_size);
    uint64_t l2_max = json_get_uint(o, "l2-cache-size", L2_CACHE_MAX_BYTES);

    if (option_check_size(o, "cache-size", err) < 0 ||
        option_check_size(o, "l2-cache-size", err) < 0 ||
        option_check_size(o, "refcount-cache-size", err) < 0)
        return -EINVAL;
    ret->refcount_cache_bytes = json_get_uint(o, "refcount-cache-size", REFCOUNT_CACHE_BYTES);
    ret->l2_cache_bytes = min_u64(l2_max, needed);
    if (both) {
        if (l2 && refcount)
            return error_set(err, EINVAL,
                             "cache-size, l2-cache-size and refcount-cache-size may not be set at "
                             "the same time");
        if (l2 && l2_max > combined)
            return error_set(err, EINVAL, "l2-cache-size may not exceed cache-size");
        if (refcount && ret->refcount_cache_bytes > combined)
            return error_set(err, EINVAL, "refcount-cache-size may not exceed cache-size");
        if (l2)
            ret->refcount_cache_bytes = combined - ret->l2_cache_bytes;
        else if (refcount)
            ret->l2_cache_bytes = combined - ret->refcount_cache_bytes;
        else {
            ret->refcount_cache_bytes = min_u64(combined / 4, REFCOUNT_CACHE_BYTES);
            ret->l2_cache_bytes = combined - ret->refcount_cache_bytes;
        }
    }
    /* More than the whole table is never used. */
    ret->l2_cache_bytes = min_u64(ret->l2_cache_bytes, max_u64(needed, SLICE_BYTES));
    if (ret->l2_cache_bytes > INT32_MAX)
        return error_set(err, EINVAL, "L2 cache size too big");
    if (ret->refcount_cache_bytes > INT32_MAX)
        return error_set(err, EINVAL, "Refcount cache size too big");

    uint64_t slice = json_get_uint(o, "l2-cache-entry-size", 0);
    if (json_has(o, "l2-cache-entry-size") &&
        (slice < SECTOR || slice > q->cluster_size || !is_power_of_2(slice)))
        return error_set(err, EINVAL,
                         "L2 cache entry size must be a power of two between 512 and the cluster "
                         "size (%llu)",
                         (unsigned long long)q->cluster_size);
    ret->slice_bytes = (uint32_t)(slice ? slice : min_u64(SLICE_BYTES, q->cluster_size));
    return 0;
}

static int parse_overlap(struct json_object *o, bool *ret, struct error *err)
{
    struct json_object *check = json_get(o, "overlap-check");
    const char *level = "cached";
    if (check && json_object_is_type(check, json_type_object))
        level = json_get_string(check, "template", "cached");
    else if (check)
        level = json_object_get_string(check);
    if (strcmp(level, "none") && strcmp(level, "constant") && strcmp(level, "cached") &&
        strcmp(level, "all"))
        return error_set(err, EINVAL,
                         "Unsupported value '%s' for qcow2 option 'overlap-check'. Allowed are any "
                         "of the following: none, constant, cached, all",
                         level);
    *ret = strcmp(level, "none") != 0;
    return 0;
}

static int parse_options(const struct qcow2 *q, struct json_object *o, struct options *ret,
                         struct error *err)
{
    *ret = (struct options){0};
    int r = parse_caches(q, o, ret, err);
    if (r < 0)
        return r;
    if (json_has(o, "encrypt"))
        return error_set(err, EINVAL,
                         "No encryption in image header, but options specified format '%s'",
                         json_get_string(json_get(o, "encrypt"), "format", ""));
    if (json_has(o, "data-file"))
        return error_set(err, EINVAL,
                         "'data-file' can only be set for images with an external data file");
    bool lazy = q->header.compatible & QCOW2_COMPAT_LAZY_REFCOUNTS;
    ret->lazy_refcounts = json_get_bool(o, "lazy-refcounts", lazy);
    if (ret->lazy_refcounts && q->header.version < 3)
        return error_set(err, EINVAL,
                         "Lazy refcounts require a qcow2 image with at least qemu 1.1 "
                         "compatibility level");
    ret->pass_discard[FREE_ALWAYS] = true;
    ret->pass_discard[FREE_NEVER] = false;
    ret->request_as_node = !json_has(o, "pass-discard-request");
    ret->pass_discard[FREE_REQUEST] = json_get_bool(o, "pass-discard-request", false);
    ret->pass_discard[FREE_SNAPSHOT] = json_get_bool(o, "pass-discard-snapshot", true);
    ret->pass_discard[FREE_OTHER] = json_get_bool(o, "pass-discard-other", false);
    return parse_overlap(o, &ret->overlap_checks, err);
}

static void apply_options(struct qcow2 *q, const struct options *o)
{
    memcpy(q->pass_discard, o->pass_discard, sizeof q->pass_discard);
    q->request_as_node = o->request_as_node;
    q->overlap_checks = o->overlap_checks;
    q->lazy_refcounts = o->lazy_refcounts;
}

/* ---- opening ---- */

static int read_header(struct qcow2 *q, struct error *err)
{
    uint8_t start[QCOW2_HEADER_BYTES];
    int r = file_read(q, 0, start, sizeof start);
    if (r < 0)
        return error_set_errno(err, -r, "Could not read qcow2 header");
    r = qcow2_header_decode(start, sizeof start, &q->header, err);
    if (r < 0)
        return r;
    uint64_t size = qcow2_header_cluster_size(&q->header);
    CLEANUP(memory_freep) uint8_t *cluster = block_buffer(size);
    if (!cluster)
        return error_set_errno(err, ENOMEM, "Could not read qcow2 header");
    r = file_read(q, 0, cluster, size);
    if (r < 0)
        return error_set_errno(err, -r, "Could not read qcow2 header");
    r = qcow2_header_decode_rest(cluster, size, &q->header, err);
    if (r < 0)
        return r;
    if ((q->header.incompatible & QCOW2_INCOMPAT_CORRUPT) && !q->node->read_only)
        return error_set(err, EACCES, "qcow2: Image is corrupt; cannot be opened read/write");
    return qcow2_header_check(&q->header, err);
}

static int read_table(struct qcow2 *q, struct table *t, uint64_t offset, uint64_t n,
                      const char *what, struct error *err)
{
    int r = table_alloc(t, (uint32_t)n);
    if (r < 0)
        return error_set_errno(err, -r, "Could not allocate %s", what);
    t->offset = offset;
    if (!n)
        return 0;
    if (offset >= file_size(q))
        return error_set(err, EINVAL,
                         "Could not read %s: offset %#llx is beyond the end of the file", what,
                         (unsigned long long)offset);
    r = file_read(q, offset, t->entries, n * 8);
    if (r < 0)
        return error_set_errno(err, -r, "Could not read %s", what);
    for (uint64_t i = 0; i < n; i++)
        t->entries[i] = be64toh(t->entries[i]);
    return 0;
}

static void know_metadata(struct qcow2 *q)
{
    for (uint32_t i = 0; i < q->reftable.n; i++)
        metadata_add(q, q->reftable.entries[i] & REFTABLE_OFFSET_MASK, META_REFBLOCK);
    for (uint32_t i = 0; i < q->l1.n; i++)
        metadata_add(q, q->l1.entries[i] & ENTRY_OFFSET_MASK, META_L2);
}

static uint64_t known_autoclear(const struct node *n)
{
    return QCOW2_AUTOCLEAR_KNOWN | qcow2_guard_known(n);
}

static void drop_untrusted(struct qcow2 *q, bool *write_header)
{
    struct qcow2_header *h = &q->header;
    if (h->bitmaps_dropped) {
        if (h->version < 3)
            log_warning("This qcow2 v2 image contains bitmaps, but they may have been modified by "
                        "a program without persistent bitmap support; so now they must all be "
                        "considered inconsistent");
        else
            log_warning("a program lacking bitmap support modified this file, so all bitmaps are "
                        "now considered inconsistent");
        *write_header = true; /* without the extension */
    }
    const uint64_t known = known_autoclear(q->node);
    if (h->autoclear & ~known)
        *write_header = true;
    if (*write_header && qcow2_writable(q))
        h->autoclear &= known;
}

static void state_free(struct qcow2 *q)
{
    cache_fini(&q->l2_cache);
    cache_fini(&q->refcount_cache);
    table_free(&q->l1);
    table_free(&q->reftable);
    free(q->metadata.keys);
    free(q->snapshots);
    free(q->freed.items);
    free(q->compressed);
    qcow2_header_fini(&q->header);
}

static int open_image(struct qcow2 *q, struct json_object *options, struct error *err)
{
    int r = read_header(q, err);
    if (r < 0)
        return r;
    const struct qcow2_header *h = &q->header;
    q->cluster_bits = h->cluster_bits;
    q->cluster_size = qcow2_header_cluster_size(h);
    q->l2_bits = q->cluster_bits - 3;
    q->refblock_bits = q->cluster_bits - 1;
    q->space_end = q->fresh_from = align_up(file_size(q), q->cluster_size);

    r = read_table(q, &q->l1, h->l1_offset, h->l1_size, "L1 table", err);
    if (r < 0)
        return r;
    struct options o;
    r = parse_options(q, options, &o, err);
    if (r < 0)
        return r;
    apply_options(q, &o);
    q->slice_entries = o.slice_bytes / 8;
    r = read_table(q, &q->reftable, h->reftable_offset,
                   (uint64_t)h->reftable_clusters << (q->cluster_bits - 3), "reference count table",
                   err);
    if (r < 0)
        return r;
    uint32_t refcount_slice = (uint32_t)min_u64(SLICE_BYTES, q->cluster_size);
    uint64_t min_slices = CACHE_SLICES_MIN;
    r = cache_init(&q->l2_cache, q, "L2 table", o.slice_bytes,
                   max_u64(o.l2_cache_bytes, min_slices * o.slice_bytes));
    if (r == 0)
        r = cache_init(&q->refcount_cache, q, "refcount block", refcount_slice,
                       max_u64(o.refcount_cache_bytes, min_slices * refcount_slice));
    if (r < 0)
        return error_set(err, ENOMEM, "Could not allocate metadata caches");
    q->refcount_cache.evict_by_write = true;
    know_metadata(q);
    r = qcow2_read_snapshots(q, err);
    if (r < 0)
        return r;

    q->node->size_bytes = align_down(h->size_bytes, SECTOR);
    bool write_header = false;
    drop_untrusted(q, &write_header);
    if (write_header && qcow2_writable(q)) {
        r = qcow2_write_header(q);
        if (r == 0) /* before anything is written of which those bits would not know */
            r = file_flush(q);
        if (r < 0)
            return error_set_errno(err, -r, "Could not update qcow2 header");
    }
    if ((h->incompatible & QCOW2_INCOMPAT_DIRTY) && qcow2_writable(q)) {
        r = qcow2_repair(q, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int open_node(struct node *n, struct json_object *options, struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    q->node = n;
    rangelock_init(&q->allocations);
    mutex_init(&q->alloc_lock);
    mutex_init(&q->l1_lock);
    mutex_init(&q->header_lock);
    mutex_init(&q->writeback_lock);
    waitq_init(&q->epoch_left);

    int r = node_open_child(n, options, "file", ROLE_IMAGE, true, &q->file, err);
    if (r < 0)
        return r;
    q->losses = graph_losses(n->graph);
    r = open_image(q, options, err);
    if (r < 0) {
        state_free(q);
        return r;
    }
    n->limits.request_alignment = 1;
    n->limits.memory_alignment = q->file->node->limits.memory_alignment;
    n->limits.write_zeroes_alignment = q->cluster_size;
    n->limits.discard_alignment = q->cluster_size;
    n->write_zeroes_flags = q->header.version >= 3 ? REQ_MAY_UNMAP | REQ_NO_FALLBACK : 0;
    return 0;
}

/* Twice: the second round writes the refcounts that the first has lowered. */
static int write_all(struct qcow2 *q)
{
    int r = qcow2_sync(q);
    return r < 0 ? r : qcow2_sync(q);
}

static int finish(struct node *n)
{
    struct qcow2 *q = n->state;
    if (n->read_only || qcow2_unusable(q))
        return 0;
    int r = write_all(q);
    if (r == 0)
        refcount_trim_space(q);
    return r;
}

static void close_node(struct node *n)
{
    SHIELD();
    struct qcow2 *q = n->state;
    int r = finish(n);
    if (r < 0)
        log_error("qcow2: closing '%s': metadata could not be written: %s", node_name(n),
                  strerror(-r));
    state_free(q);
}

static int flush_to_os(struct node *n)
{
    struct qcow2 *q = n->state;
    if (qcow2_unusable(q))
        return -ENOMEDIUM;
    return n->read_only ? 0 : qcow2_writeback(q);
}

/* ---- reopening: discard and overlap options, and read-only ---- */

static int reopen_prepare(struct node *n, struct json_object *options, bool read_only, void **plan,
                          struct error *err)
{
    SHIELD();
    struct qcow2 *q = n->state;
    struct options *o = xnew(struct options);
    int r = parse_options(q, options, o, err);
    if (r == 0 && !read_only && n->read_only) {
        if (q->header.incompatible & QCOW2_INCOMPAT_CORRUPT)
            r = error_set(err, EACCES, "qcow2: Image is corrupt; cannot be opened read/write");
        else if (q->header.incompatible & QCOW2_INCOMPAT_DIRTY)
            r = error_set(err, EACCES,
                          "qcow2: Image is dirty; it is repaired when it is opened "
                          "read/write");
        else if (q->header.autoclear & ~known_autoclear(n))
            r = error_set(err, EACCES,
                          "qcow2: Image has unknown autoclear bits; they are cleared when it is "
                          "opened read/write");
    }
    if (r == 0 && read_only && !n->read_only && !qcow2_unusable(q)) {
        r = write_all(q);
        if (r == 0)
            refcount_trim_space(q);
        if (r < 0)
            error_set_errno(err, -r, "Failed to flush the L2 table cache");
    }
    if (r < 0) {
        free(o);
        return r;
    }
    *plan = o;
    return 0;
}

static void reopen_commit(struct node *n, void *plan)
{
    apply_options(n->state, plan);
    free(plan);
}

static void reopen_abort(struct node *n, void *plan)
{
    free(plan);
}

static uint64_t cluster_size_of(const struct node *n)
{
    const struct qcow2 *q = n->state;
    return q->cluster_size;
}

static bool image_backing(struct node *n, const char **filename, const char **format)
{
    const struct qcow2 *q = n->state;
    *filename = q->header.backing_file;
    *format = q->header.backing_format;
    return q->header.backing_file != NULL;
}

static const char *const strong_options[] = {"encrypt", NULL};
static const char *const mutable_options[] = {
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    NULL,
};
static const char *const known_options[] = {
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "encrypt",
    "data-file",
    NULL,
};

const struct driver driver_qcow2 = {
    .name = "qcow2",
    .strong_options = strong_options,
    .known_options = known_options,
    .mutable_options = mutable_options,
    .state_size = sizeof(struct qcow2),
    .supports_backing = true,
    .is_format = true,
    .probe = probe,
    .open = open_node,
    .close = close_node,
    .read = qcow2_read,
    .write = qcow2_write,
    .write_zeroes = qcow2_write_zeroes,
    .discard = qcow2_discard,
    .flush_to_os = flush_to_os,
    .finish = finish,
    .truncate = qcow2_truncate,
    .status = qcow2_status,
    .reopen_prepare = reopen_prepare,
    .reopen_commit = reopen_commit,
    .reopen_abort = reopen_abort,
    .create = qcow2_create,
    .cluster_size = cluster_size_of,
    .image_info = qcow2_image_info,
    .image_backing = image_backing,
};
