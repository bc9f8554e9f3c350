/* blockdev-create: a new image is laid out in one go.
 *
 *     header | refcount table | refcount blocks | L1 table | with preallocation: L2 tables, data
 *
 * All counts are known beforehand, so nothing is opened and nothing grows. The header, which makes
 * an image of it, is written last, after a flush of everything that it names. */
#include "block/internal.h"
#include "block/qcow2/qcow2.h"

#include <stdio.h>

struct plan {
    struct qcow2_header header;
    const char *preallocation;
    bool with_data; /* L2 tables and data clusters exist from the start */
    uint64_t cluster_size;
    unsigned cluster_bits;
    /* in clusters */
    uint64_t reftable_at, reftable_n, refblocks_at, refblocks_n, l1_at, l1_n, l2_at, l2_n;
    uint64_t data_at, data_n, total;
};

static int check_sizes(struct json_object *o, struct plan *p, struct error *err)
{
    uint64_t size = json_get_uint(o, "size", 0);
    if (size % SECTOR)
        return error_set(err, EINVAL, "Image size must be a multiple of %d bytes", SECTOR);
    p->header.version = strcmp(json_get_string(o, "version", "v3"), "v2") ? 3 : 2;
    bool extended_l2 = json_get_bool(o, "extended-l2", false);
    if (extended_l2 && p->header.version < 3)
        return error_set(err, EINVAL,
                         "Extended L2 entries are only supported with compatibility level 1.1 and "
                         "above (use version=v3 or greater)");
    uint64_t cluster_size = json_get_uint(o, "cluster-size", 65536);
    if (!is_power_of_2(cluster_size) || cluster_size < 512 || cluster_size > 2 * MiB)
        return error_set(err, EINVAL, "Cluster size must be a power of two between 512 and 2048k");
    if (extended_l2 && cluster_size < 16384)
        return error_set(err, EINVAL,
                         "Extended L2 entries are only supported with cluster sizes of at least "
                         "16384 bytes");
    p->header.cluster_bits = p->cluster_bits = log2_u64(cluster_size);
    p->cluster_size = cluster_size;
    p->header.size_bytes = size;
    return 0;
}

static int check_refcounts(struct json_object *o, struct plan *p, struct error *err)
{
    bool lazy = json_get_bool(o, "lazy-refcounts", false);
    if (p->header.version < 3 && lazy)
        return error_set(err, EINVAL,
                         "Lazy refcounts only supported with compatibility level 1.1 and above "
                         "(use version=v3 or greater)");
    uint64_t bits = json_get_uint(o, "refcount-bits", 16);
    if (bits > 64 || !is_power_of_2(bits))
        return error_set(err, EINVAL,
                         "Refcount width must be a power of two and may not exceed 64 bits");
    if (p->header.version < 3 && bits != 16)
        return error_set(err, EINVAL,
                         "Different refcount widths than 16 bits require compatibility level 1.1 "
                         "or above (use version=v3 or greater)");
    if (bits != 16)
        return error_set(err, ENOTSUP,
                         "qcow2: refcount width of %llu bits is not supported (only 16)",
                         (unsigned long long)bits);
    p->header.refcount_order = 4;
    if (lazy)
        p->header.compatible |= QCOW2_COMPAT_LAZY_REFCOUNTS;
    return 0;
}

static int check_options(struct json_object *o, struct plan *p, struct error *err)
{
    int r = check_sizes(o, p, err);
    if (r < 0)
        return r;
    const char *backing = json_get_string(o, "backing-file", NULL);
    const char *format = json_get_string(o, "backing-fmt", NULL);
    p->preallocation = json_get_string(o, "preallocation", "off");
    p->with_data = strcmp(p->preallocation, "off") != 0;
    if (backing && p->with_data)
        return error_set(err, EINVAL,
                         "Backing file and preallocation can only be used at the same time if "
                         "extended_l2 is on");
    if (format && !backing)
        return error_set(err, EINVAL, "Backing format cannot be used without backing file");
    r = check_refcounts(o, p, err);
    if (r < 0)
        return r;
    if (json_get_bool(o, "data-file-raw", false) && !json_has(o, "data-file"))
        return error_set(err, EINVAL, "data-file-raw requires data-file");
    if (json_has(o, "data-file"))
        return error_set(err, ENOTSUP, "qcow2: external data file is not supported");
    const char *compression = json_get_string(o, "compression-type", "zlib");
    if (strcmp(compression, "zlib") && p->header.version < 3)
        return error_set(err, EINVAL,
                         "Non-zlib compression type is only supported with compatibility level 1.1 "
                         "and above (use version=v3 or greater)");
    if (strcmp(compression, "zlib"))
        return error_set(err, ENOTSUP, "qcow2: compression type %s is not supported", compression);
    if (json_get_bool(o, "extended-l2", false))
        return error_set(err, ENOTSUP, "qcow2: extended L2 entries are not supported");
    if (json_has(o, "encrypt"))
        return error_set(err, ENOTSUP, "qcow2: encryption is not supported");

    if (p->header.size_bytes > INT64_MAX)
        return error_set(err, EINVAL, "Could not resize image: Image size cannot be negative");
    if (p->header.size_bytes > SIZE_BYTES_MAX)
        return error_set(err, EINVAL, "Could not resize image: offset(%llu) exceeds maximum(%llu)",
                         (unsigned long long)p->header.size_bytes,
                         (unsigned long long)SIZE_BYTES_MAX);
    if (backing) {
        p->header.backing_file = xstrdup(backing);
        p->header.backing_format = format ? xstrdup(format) : NULL;
    }
    return 0;
}

/* Where everything goes. */
static int lay_out(struct plan *p, struct error *err)
{
    unsigned l2_span_bits = p->cluster_bits + p->cluster_bits - 3;
    uint64_t size = p->header.size_bytes, per_block = p->cluster_size / 2;
    uint64_t l1_entries =
        (size >> l2_span_bits) + ((size & (((uint64_t)1 << l2_span_bits) - 1)) != 0);
    if (l1_entries > QCOW2_MAX_L1_BYTES / 8)
        return error_set_errno(err, EFBIG, "Could not resize image: Failed to grow the L1 table");
    p->l1_n = div_round_up(l1_entries * 8, p->cluster_size);
    p->l2_n = p->with_data ? l1_entries : 0;
    p->data_n = p->with_data ? div_round_up(size, p->cluster_size) : 0;
    p->reftable_n = p->refblocks_n = 1;
    for (;;) {
        p->total = 1 + p->reftable_n + p->refblocks_n + p->l1_n + p->l2_n + p->data_n;
        uint64_t blocks = div_round_up(p->total, per_block);
        uint64_t tables = div_round_up(blocks * 8, p->cluster_size);
        if (blocks <= p->refblocks_n && tables <= p->reftable_n)
            break;
        p->refblocks_n = max_u64(blocks, p->refblocks_n);
        p->reftable_n = max_u64(tables, p->reftable_n);
    }
    if (p->reftable_n * p->cluster_size > QCOW2_MAX_REFTABLE_BYTES)
        return error_set_errno(err, EFBIG,
                               "Could not resize image: Failed to resize refcount "
                               "structures");
    p->reftable_at = 1;
    p->refblocks_at = p->reftable_at + p->reftable_n;
    p->l1_at = p->refblocks_at + p->refblocks_n;
    p->l2_at = p->l1_at + p->l1_n;
    p->data_at = p->l2_at + p->l2_n;
    p->header.reftable_offset = p->reftable_at << p->cluster_bits;
    p->header.reftable_clusters = (uint32_t)p->reftable_n;
    p->header.l1_size = (uint32_t)l1_entries;
    p->header.l1_offset = p->l1_n ? p->l1_at << p->cluster_bits : 0;
    return 0;
}

/* The content of metadata cluster NUMBER. */
static void fill(const struct plan *p, uint64_t number, uint8_t *buf)
{
    uint64_t entries = p->cluster_size / 8;
    memset(buf, 0, p->cluster_size);
    if (number < p->refblocks_at) {
        uint64_t first = (number - p->reftable_at) * entries;
        for (uint64_t i = 0; i < entries && first + i < p->refblocks_n; i++)
            entry_store(buf, (uint32_t)i, (p->refblocks_at + first + i) << p->cluster_bits);
    } else if (number < p->l1_at) {
        uint64_t first = (number - p->refblocks_at) * (p->cluster_size / 2);
        for (uint64_t i = 0; i < p->cluster_size / 2 && first + i < p->total; i++)
            buf[2 * i + 1] = 1;
    } else if (number < p->l2_at) {
        uint64_t first = (number - p->l1_at) * entries;
        for (uint64_t i = 0; i < entries && first + i < p->l2_n; i++)
            entry_store(buf, (uint32_t)i, (p->l2_at + first + i) << p->cluster_bits | ENTRY_COPIED);
    } else {
        uint64_t first = (number - p->l2_at) * entries;
        for (uint64_t i = 0; i < entries && first + i < p->data_n; i++)
            entry_store(buf, (uint32_t)i,
                        (p->data_at + first + i) << p->cluster_bits | ENTRY_COPIED);
    }
}

static int write_data_area(const struct plan *p, struct edge *file, struct error *err)
{
    struct range data = range_make(p->data_at << p->cluster_bits, p->data_n << p->cluster_bits);
    int r = 0;
    if (!data.length)
        return 0;
    if (!strcmp(p->preallocation, "metadata")) {
        if (node_size(file->node) < range_end(data))
            return edge_truncate(file, range_end(data), false, err);
        return 0;
    }
    if (!strcmp(p->preallocation, "falloc")) {
        r = edge_write_zeroes(file, data, 0);
    } else {
        CLEANUP(memory_freep) uint8_t *zeroes = block_buffer(MiB);
        if (!zeroes)
            return error_set_errno(err, ENOMEM, "Could not resize image");
        memset(zeroes, 0, MiB);
        for (uint64_t at = 0; r == 0 && at < data.length; at += MiB)
            r = edge_write(file, range_make(data.start + at, min_u64(MiB, data.length - at)),
                           zeroes, 0);
    }
    return r < 0 ? error_set_errno(err, -r,
                                   "Could not resize image: Failed to allocate data "
                                   "clusters")
                 : 0;
}

static int write_image(struct plan *p, struct edge *file, struct error *err)
{
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(p->cluster_size);
    if (!buf)
        return error_set_errno(err, ENOMEM, "Could not write qcow2 header");
    struct qcow2_header *h = &p->header;
    int r = h->backing_file && strlen(h->backing_file) > QCOW2_MAX_BACKING_NAME
                ? -EINVAL
                : qcow2_header_encode(h, buf);
    if (r < 0)
        return error_set_errno(err, -r, "Could not assign backing file '%s' with format '%s'",
                               h->backing_file ? h->backing_file : "",
                               h->backing_format ? h->backing_format : "(null)");

    for (uint64_t n = p->reftable_at; n < p->data_at; n++) {
        fill(p, n, buf);
        r = edge_write(file, range_make(n << p->cluster_bits, p->cluster_size), buf, 0);
        if (r < 0)
            return error_set_errno(err, -r, "Could not write refcount table");
    }
    r = write_data_area(p, file, err);
    if (r < 0)
        return r;
    r = edge_flush(file);
    if (r < 0)
        return error_set_errno(err, -r, "Could not write refcount table");
    qcow2_header_encode(h, buf);
    r = edge_write(file, range_make(0, p->cluster_size), buf, 0);
    if (r == 0)
        r = edge_flush(file);
    return r < 0 ? error_set_errno(err, -r, "Could not write qcow2 header") : 0;
}

static char *describe_creator(struct user *u)
{
    return xstrdup("an unnamed block device");
}

static const struct user_ops creator_ops = {.describe = describe_creator};

int qcow2_create(struct graph *g, struct json_object *options, struct error *err)
{
    SHIELD();
    CLEANUP(node_unrefp) struct node *n = NULL;
    CLEANUP(edge_detachp) struct edge *file = NULL;
    struct plan p = {.preallocation = NULL};
    struct json_object *ref = json_get(options, "file");
    int r = 0;

    if (ref && json_object_is_type(ref, json_type_string)) {
        const char *name = json_object_get_string(ref);
        n = graph_find(g, name);
        if (!n)
            return error_set(err, ENOENT, "Cannot find device='%s' nor node-name='%s'", name, name);
        node_ref(n);
    } else {
        r = graph_open(g, ref, &n, err);
    }
    if (r == 0)
        r = check_options(options, &p, err);
    if (r == 0)
        r = lay_out(&p, err);
    struct user creator = {&creator_ops};
    if (r == 0)
        r = edge_attach_user(&creator, n, "root", PERM_CONSISTENT_READ | PERM_WRITE | PERM_RESIZE,
                             PERM_ALL, &file, err);
    if (r == 0)
        r = write_image(&p, file, err);
    qcow2_header_fini(&p.header);
    return r;
}
