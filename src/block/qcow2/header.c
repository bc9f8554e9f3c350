/* Decoding trusts nothing: the cursor cannot leave the buffer, every length is compared with
 * what is left, and every table's size with QEMU's limit before anybody allocates by it. */
#include "block/qcow2/header.h"

#include "base/cursor.h"

#include <stdio.h>

bool qcow2_header_probe(const uint8_t *buf, size_t length)
{
    struct cursor c = cursor_over(buf, length);
    uint32_t magic = get_be32(&c);
    uint32_t version = get_be32(&c);
    return !c.overrun && magic == QCOW2_MAGIC && version >= 2;
}

int qcow2_header_decode(const uint8_t *buf, size_t length, struct qcow2_header *h,
                        struct error *err)
{
    struct cursor c = cursor_over(buf, length);

    if (get_be32(&c) != QCOW2_MAGIC)
        return error_set(err, EINVAL, "Image is not in qcow2 format");
    h->version = get_be32(&c);
    if (h->version != 2 && h->version != 3)
        return error_set(err, ENOTSUP, "Unsupported qcow2 version %u", h->version);
    h->backing_offset = get_be64(&c);
    h->backing_length = get_be32(&c);
    h->cluster_bits = get_be32(&c);
    h->size_bytes = get_be64(&c);
    h->crypt_method = get_be32(&c);
    h->l1_size = get_be32(&c);
    h->l1_offset = get_be64(&c);
    h->reftable_offset = get_be64(&c);
    h->reftable_clusters = get_be32(&c);
    h->nb_snapshots = get_be32(&c);
    h->snapshots_offset = get_be64(&c);
    if (c.overrun)
        return error_set(err, EINVAL, "qcow2 header ends after %zu bytes", length);

    if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS || h->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
        return error_set(err, EINVAL, "Unsupported cluster size: 2^%u", h->cluster_bits);

    if (h->version == 2) {
        h->refcount_order = 4;
        h->header_length = QCOW2_HEADER_V2_BYTES;
    } else {
        h->incompatible = get_be64(&c);
        h->compatible = get_be64(&c);
        h->autoclear = get_be64(&c);
        h->refcount_order = get_be32(&c);
        h->header_length = get_be32(&c);
        if (c.overrun)
            return error_set(err, EINVAL, "qcow2 header ends after %zu bytes", length);
        if (h->header_length < QCOW2_HEADER_V3_MIN_BYTES)
            return error_set(err, EINVAL, "qcow2 header too short");
        if (h->header_length > QCOW2_HEADER_V3_MIN_BYTES) {
            h->compression_type = get_u8(&c);
            if (c.overrun)
                return error_set(err, EINVAL, "qcow2 header ends after %zu bytes", length);
        }
    }
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    if (h->header_length > cluster_size)
        return error_set(err, EINVAL, "qcow2 header exceeds cluster size");
    if (h->backing_offset > cluster_size)
        return error_set(err, EINVAL, "Invalid backing file offset");
    return 0;
}

static char *text_of(const uint8_t *bytes, size_t n)
{
    char *s = xcalloc(1, n + 1);
    memcpy(s, bytes, n);
    return s;
}

static int decode_bitmaps(struct qcow2_header *h, struct cursor c, struct error *err)
{
    if (cursor_left(&c) != 24)
        return error_set(err, EINVAL, "bitmaps_ext: Invalid extension length: Invalid argument");
    if (!(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS)) {
        h->bitmaps_dropped = true;
        return 0;
    }
    h->nb_bitmaps = get_be32(&c);
    uint32_t reserved = get_be32(&c);
    h->bitmap_directory_bytes = get_be64(&c);
    h->bitmap_directory_offset = get_be64(&c);
    if (reserved)
        return error_set(err, EINVAL, "bitmaps_ext: Reserved field is not zero: Invalid argument");
    if (h->nb_bitmaps > QCOW2_MAX_BITMAPS)
        return error_set(err, EINVAL,
                         "bitmaps_ext: Image has %u bitmaps, exceeding the QEMU supported maximum "
                         "of %d",
                         h->nb_bitmaps, QCOW2_MAX_BITMAPS);
    if (h->nb_bitmaps == 0)
        return error_set(err, EINVAL, "found bitmaps extension with zero bitmaps");
    if (h->bitmap_directory_offset & (qcow2_header_cluster_size(h) - 1))
        return error_set(err, EINVAL, "bitmaps_ext: invalid bitmap directory offset");
    if (h->bitmap_directory_bytes > QCOW2_MAX_BITMAP_DIRECTORY_BYTES)
        return error_set(err, EINVAL,
                         "bitmaps_ext: bitmap directory size (%llu) exceeds the maximum supported "
                         "size (%llu)",
                         (unsigned long long)h->bitmap_directory_bytes,
                         (unsigned long long)QCOW2_MAX_BITMAP_DIRECTORY_BYTES);
    h->has_bitmaps = true;
    return 0;
}

/* "Unsupported qcow2 feature(s): NAME, ...": names from the image's own table where it has them. */
static int refuse_features(const struct qcow2_header *h, const uint8_t *names, size_t length,
                           struct error *err)
{
    uint64_t unknown = h->incompatible & ~QCOW2_INCOMPAT_KNOWN;
    char list[1024] = "";
    size_t used = 0;

    for (size_t at = 0; names && at + 48 <= length; at += 48) {
        unsigned bit = names[at + 1];
        if (names[at] != 0 || bit > 63 || !(unknown >> bit & 1) || !names[at + 2])
            continue;
        int n = snprintf(list + used, sizeof list - used, "%s%.46s", used ? ", " : "",
                         (const char *)names + at + 2);
        if (n < 0 || (size_t)n >= sizeof list - used)
            break;
        used += (size_t)n;
        unknown &= ~((uint64_t)1 << bit);
    }
    if (unknown && used + 40 < sizeof list)
        snprintf(list + used, sizeof list - used, "%sUnknown incompatible feature: %llx",
                 used ? ", " : "", (unsigned long long)unknown);
    return error_set(err, ENOTSUP, "Unsupported qcow2 feature(s): %s", list);
}

static void keep_extension(struct qcow2_header *h, uint32_t magic, const void *data,
                           uint32_t length)
{
    h->unknown = realloc(h->unknown, (h->nb_unknown + 1) * sizeof *h->unknown);
    if (!h->unknown)
        abort();
    struct qcow2_extension *e = &h->unknown[h->nb_unknown++];
    *e = (struct qcow2_extension){magic, length, xcalloc(1, length + 1)};
    memcpy(e->data, data, length);
}

/* One pass; with NAMES not NULL only the feature name table is looked for. */
static int walk_extensions(const uint8_t *buf, uint64_t end, struct qcow2_header *h,
                           const uint8_t **names, size_t *names_length, struct error *err)
{
    uint64_t at = h->header_length;
    while (at < end) {
        if (end - at < 8)
            return names ? 0 : error_set(err, EINVAL, "Header extension too large");
        struct cursor c = cursor_over(buf + at, end - at);
        uint32_t magic = get_be32(&c);
        uint32_t length = get_be32(&c);
        at += 8;
        if (length > end - at)
            return names ? 0 : error_set(err, EINVAL, "Header extension too large");
        if (magic == QCOW2_EXT_END)
            break;
        const uint8_t *data = buf + at;
        at += align_up(length, 8);
        if (names) {
            if (magic == QCOW2_EXT_FEATURE_NAMES) {
                *names = data;
                *names_length = length;
                return 0;
            }
            continue;
        }

        int r = 0;
        switch (magic) {
        case (uint32_t)QCOW2_EXT_BACKING_FORMAT:
            if (length >= 16)
                return error_set(err, EINVAL, "ERROR: ext_backing_format: len=%u too large (>=16)",
                                 length);
            free(h->backing_format);
            h->backing_format = text_of(data, length);
            break;
        case QCOW2_EXT_FEATURE_NAMES:
            break; /* we write our own */
        case QCOW2_EXT_CRYPTO:
            if (h->crypt_method != 2)
                return error_set(err, EINVAL,
                                 "CRYPTO header extension only expected with LUKS encryption "
                                 "method");
            keep_extension(h, magic, data, length);
            break;
        case QCOW2_EXT_BITMAPS:
            r = decode_bitmaps(h, cursor_over(data, length), err);
            break;
        case QCOW2_EXT_DATA_FILE:
            free(h->data_file);
            h->data_file = text_of(data, length);
            break;
        default:
            keep_extension(h, magic, data, length);
        }
        if (r < 0)
            return r;
    }
    h->encoded_length = max_u64(h->encoded_length, min_u64(at, end));
    return 0;
}

int qcow2_header_decode_rest(const uint8_t *buf, size_t length, struct qcow2_header *h,
                             struct error *err)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    if (length < cluster_size)
        return error_set(err, EINVAL, "Could not read qcow2 header: only %zu bytes", length);

    if (h->header_length > QCOW2_HEADER_BYTES) {
        h->unknown_fields_length = h->header_length - QCOW2_HEADER_BYTES;
        h->unknown_fields = xcalloc(1, h->unknown_fields_length);
        memcpy(h->unknown_fields, buf + QCOW2_HEADER_BYTES, h->unknown_fields_length);
    }
    uint64_t end = h->backing_offset ? h->backing_offset : cluster_size;
    if (h->incompatible & ~QCOW2_INCOMPAT_KNOWN) {
        const uint8_t *names = NULL;
        size_t names_length = 0;
        walk_extensions(buf, end, h, &names, &names_length, NULL);
        return refuse_features(h, names, names_length, err);
    }
    int r = walk_extensions(buf, end, h, NULL, NULL, err);
    if (r < 0)
        return r;

    if (h->backing_offset) {
        if (h->backing_length > QCOW2_MAX_BACKING_NAME ||
            h->backing_length > cluster_size - h->backing_offset)
            return error_set(err, EINVAL, "Backing file name too long");
        h->backing_file = text_of(buf + h->backing_offset, h->backing_length);
        h->encoded_length = max_u64(h->encoded_length, h->backing_offset + h->backing_length);
    }
    return 0;
}

int qcow2_check_table(uint64_t offset, uint64_t entries, size_t entry_bytes, uint64_t max_bytes,
                      uint64_t cluster_size, const char *table, struct error *err)
{
    if (entries > max_bytes / entry_bytes)
        return error_set(err, EFBIG, "%s too large", table);
    if (offset > INT64_MAX - entries * entry_bytes || (offset & (cluster_size - 1)))
        return error_set(err, EINVAL, "%s offset invalid", table);
    return 0;
}

int qcow2_header_check(const struct qcow2_header *h, struct error *err)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    bool compression_bit = h->incompatible & QCOW2_INCOMPAT_COMPRESSION;

    if (h->compression_type > 1)
        return error_set(err, ENOTSUP, "qcow2: unknown compression type: %u", h->compression_type);
    if (h->compression_type == 0 && compression_bit)
        return error_set(err, EINVAL,
                         "qcow2: Compression type incompatible feature bit must not be set");
    if (h->compression_type != 0 && !compression_bit)
        return error_set(err, EINVAL,
                         "qcow2: Compression type incompatible feature bit must be set");
    bool extended_l2 = h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2;
    if (extended_l2 && h->cluster_bits < 14)
        return error_set(err, EINVAL, "Unsupported subcluster size: %llu",
                         (unsigned long long)cluster_size / 32);
    if (h->refcount_order > 6)
        return error_set(err, EINVAL,
                         "Reference count entry width too large; may not exceed 64 bits");

    if (h->reftable_clusters == 0)
        return error_set(err, EINVAL, "Image does not contain a reference count table");
    int r = qcow2_check_table(h->reftable_offset, h->reftable_clusters, cluster_size,
                              QCOW2_MAX_REFTABLE_BYTES, cluster_size, "Reference count table", err);
    if (r < 0)
        return r;
    r = qcow2_check_table(h->snapshots_offset, h->nb_snapshots, QCOW2_SNAPSHOT_HEADER_BYTES,
                          QCOW2_SNAPSHOT_HEADER_BYTES * (uint64_t)QCOW2_MAX_SNAPSHOTS, cluster_size,
                          "Snapshot table", err);
    if (r < 0)
        return r;
    r = qcow2_check_table(h->l1_offset, h->l1_size, sizeof(uint64_t), QCOW2_MAX_L1_BYTES,
                          cluster_size, "Active L1 table", err);
    if (r < 0)
        return r;
    unsigned l1_shift = h->cluster_bits + (h->cluster_bits - (extended_l2 ? 4 : 3));
    uint64_t needed =
        (h->size_bytes >> l1_shift) + ((h->size_bytes & (((uint64_t)1 << l1_shift) - 1)) != 0);
    if (needed > INT32_MAX)
        return error_set(err, EFBIG, "Image is too big");
    if (h->l1_size < needed)
        return error_set(err, EINVAL, "L1 table is too small");

    /* What we do not do (yet). */
    if (h->crypt_method == 1)
        return error_set(err, ENOTSUP, "Use of AES-CBC encrypted qcow2 images is not supported");
    if (h->crypt_method == 2)
        return error_set(err, ENOTSUP, "qcow2: LUKS encryption is not supported");
    if (h->crypt_method != 0)
        return error_set(err, EINVAL, "Unsupported encryption method %u", h->crypt_method);
    if (h->incompatible & QCOW2_INCOMPAT_DATA_FILE)
        return error_set(err, ENOTSUP, "qcow2: external data file is not supported");
    if (h->autoclear & QCOW2_AUTOCLEAR_RAW_DATA_FILE)
        return error_set(err, EINVAL, "data-file-raw requires a data file");
    if (extended_l2)
        return error_set(err, ENOTSUP, "qcow2: extended L2 entries are not supported");
    if (h->compression_type != 0)
        return error_set(err, ENOTSUP, "qcow2: compression type zstd is not supported");
    if (h->refcount_order != 4)
        return error_set(err, ENOTSUP,
                         "qcow2: refcount width of %u bits is not supported (only 16)",
                         1u << h->refcount_order);
    return 0;
}

void qcow2_header_fini(struct qcow2_header *h)
{
    for (size_t i = 0; i < h->nb_unknown; i++)
        free(h->unknown[i].data);
    free(h->unknown);
    free(h->unknown_fields);
    free(h->backing_file);
    free(h->backing_format);
    free(h->data_file);
    *h = (struct qcow2_header){0};
}

/* ---- encoding ---- */

enum { SECTOR = 512, EXTENSION_HEADER = 8 };

static void put_extension(struct out_cursor *c, uint32_t magic, const void *data, uint32_t length)
{
    static const uint8_t padding[8];
    put_be32(c, magic);
    put_be32(c, length);
    if (length)
        put_bytes(c, data, length);
    put_bytes(c, padding, align_up(length, 8) - length);
}

static const struct {
    uint8_t type; /* 0 incompatible, 1 compatible, 2 autoclear */
    uint8_t bit;
    char name[46];
} feature_names[] = {
    {0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
    {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
    {2, 0, "bitmaps"},          {2, 1, "raw external data"},   {2, 63, "tidemark bitmaps"},
};
_Static_assert(sizeof feature_names[0] == 48, "an entry of the feature name table has 48 bytes");

/* Names of the features that the image has: other programs need no more to tell their users what
 * they do not know. Returns the bytes. */
static uint32_t name_features(const struct qcow2_header *h, uint8_t *table)
{
    const uint64_t bits[] = {h->incompatible, h->compatible, h->autoclear};
    uint32_t bytes = 0;

    for (size_t i = 0; i < ARRAY_SIZE(feature_names); i++) {
        if (!(bits[feature_names[i].type] >> feature_names[i].bit & 1))
            continue;
        memcpy(table + bytes, &feature_names[i], sizeof feature_names[i]);
        bytes += sizeof feature_names[i];
    }
    return bytes;
}

/* Where the backing file's name goes, with extensions up to END. */
static uint64_t name_place(const struct qcow2_header *h, uint64_t end)
{
    const uint64_t was = h->backing_offset, was_end = was + h->backing_length;
    const uint64_t length = strlen(h->backing_file);

    if (end + length <= SECTOR || end > SECTOR)
        return end;
    if (was >= end && h->backing_length == length)
        return was;
    const uint64_t beyond = align_up(max_u64(SECTOR, was_end), SECTOR);
    return beyond + length <= qcow2_header_cluster_size(h) ? beyond : end;
}

int qcow2_header_encode(struct qcow2_header *h, uint8_t *buf)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    struct out_cursor c = out_cursor_over(buf, cluster_size);
    memset(buf, 0, cluster_size);

    if (h->version >= 3)
        h->header_length = (uint32_t)(QCOW2_HEADER_BYTES + h->unknown_fields_length);
    put_be32(&c, QCOW2_MAGIC);
    put_be32(&c, h->version);
    put_be64(&c, 0); /* backing name: below */
    put_be32(&c, 0);
    put_be32(&c, h->cluster_bits);
    put_be64(&c, h->size_bytes);
    put_be32(&c, h->crypt_method);
    put_be32(&c, h->l1_size);
    put_be64(&c, h->l1_offset);
    put_be64(&c, h->reftable_offset);
    put_be32(&c, h->reftable_clusters);
    put_be32(&c, h->nb_snapshots);
    put_be64(&c, h->snapshots_offset);
    if (h->version >= 3) {
        put_be64(&c, h->incompatible);
        put_be64(&c, h->compatible);
        put_be64(&c, h->autoclear);
        put_be32(&c, h->refcount_order);
        put_be32(&c, h->header_length);
        uint8_t last[8] = {h->compression_type};
        put_bytes(&c, last, sizeof last);
        if (h->unknown_fields)
            put_bytes(&c, h->unknown_fields, h->unknown_fields_length);
    }

    /* All in one sector with the autoclear bits, as a rule: what a torn write leaves is one header
     * or the other. A long name of a backing file has sectors of its own. */
    if (h->has_bitmaps) {
        uint8_t data[24];
        struct out_cursor d = out_cursor_over(data, sizeof data);
        put_be32(&d, h->nb_bitmaps);
        put_be32(&d, 0);
        put_be64(&d, h->bitmap_directory_bytes);
        put_be64(&d, h->bitmap_directory_offset);
        put_extension(&c, QCOW2_EXT_BITMAPS, data, sizeof data);
    }
    if (h->backing_format)
        put_extension(&c, (uint32_t)QCOW2_EXT_BACKING_FORMAT, h->backing_format,
                      (uint32_t)strlen(h->backing_format));
    if (h->data_file)
        put_extension(&c, QCOW2_EXT_DATA_FILE, h->data_file, (uint32_t)strlen(h->data_file));
    for (size_t i = 0; i < h->nb_unknown; i++)
        put_extension(&c, h->unknown[i].magic, h->unknown[i].data, h->unknown[i].length);
    uint8_t names[sizeof feature_names];
    uint32_t names_bytes = h->version >= 3 ? name_features(h, names) : 0;
    size_t rest = 2 * EXTENSION_HEADER + (h->backing_file ? strlen(h->backing_file) : 0);
    if (names_bytes && (size_t)(c.at - buf) + names_bytes + rest <= SECTOR)
        put_extension(&c, QCOW2_EXT_FEATURE_NAMES, names, names_bytes);
    put_extension(&c, QCOW2_EXT_END, NULL, 0);

    if (c.overrun)
        return -ENOSPC;
    h->extensions_end = (size_t)(c.at - buf);
    const uint64_t place = h->backing_file ? name_place(h, h->extensions_end) : 0;
    h->backing_offset = 0;
    h->backing_length = 0;
    if (h->backing_file) {
        h->backing_offset = place;
        h->backing_length = (uint32_t)strlen(h->backing_file);
        c = out_cursor_over(buf + place, cluster_size - place);
        put_bytes(&c, h->backing_file, h->backing_length);
        struct out_cursor b = out_cursor_over(buf + 8, 12);
        put_be64(&b, h->backing_offset);
        put_be32(&b, h->backing_length);
    }
    if (c.overrun)
        return -ENOSPC;
    h->encoded_length = (size_t)(c.at - buf);
    return (int)h->encoded_length;
}

void qcow2_header_set_extension(struct qcow2_header *h, uint32_t magic, const void *data,
                                uint32_t length)
{
    for (size_t i = 0; i < h->nb_unknown; i++) {
        if (h->unknown[i].magic != magic)
            continue;
        free(h->unknown[i].data);
        memmove(&h->unknown[i], &h->unknown[i + 1], (h->nb_unknown - i - 1) * sizeof *h->unknown);
        h->nb_unknown--;
        break;
    }
    if (data)
        keep_extension(h, magic, data, length);
}

const struct qcow2_extension *qcow2_header_find_extension(const struct qcow2_header *h,
                                                          uint32_t magic)
{
    for (size_t i = 0; i < h->nb_unknown; i++)
        if (h->unknown[i].magic == magic)
            return &h->unknown[i];
    return NULL;
}
