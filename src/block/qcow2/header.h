/* The first cluster of a qcow2 image, decoded and encoded. Pure functions: no disk, no node;
 * a test, a fuzzer and the driver all call the same ones.
 *
 *     0    magic "QFI\xfb"            56   refcount_table_clusters  u32
 *     4    version           u32      60   nb_snapshots             u32
 *     8    backing offset    u64      64   snapshots_offset         u64
 *     16   backing length    u32      -- version 3 only:
 *     20   cluster_bits      u32      72   incompatible features    u64
 *     24   size              u64      80   compatible features      u64
 *     32   crypt_method      u32      88   autoclear features       u64
 *     36   l1_size           u32      96   refcount_order           u32
 *     40   l1_table_offset   u64      100  header_length            u32
 *     48   refcount table    u64      104  compression_type u8, 7 bytes of padding
 *
 * Then header extensions (magic u32, length u32, data padded to 8), an end marker, and the name
 * of the backing file; all inside the first cluster. What we do not know of extensions and fields
 * is kept and written back. */
#pragma once

#include "base/error.h"
#include "base/range.h"

enum {
    QCOW2_MAGIC = 0x514649fb,
    QCOW2_MIN_CLUSTER_BITS = 9,
    QCOW2_MAX_CLUSTER_BITS = 21,
    QCOW2_HEADER_V2_BYTES = 72,
    QCOW2_HEADER_V3_MIN_BYTES = 104,
    QCOW2_HEADER_BYTES = 112, /* what we know of */
    QCOW2_MAX_BACKING_NAME = 1023,
    QCOW2_MAX_BITMAPS = 65535,
    QCOW2_MAX_SNAPSHOTS = 65536,
    QCOW2_SNAPSHOT_HEADER_BYTES = 40,
};
#define QCOW2_MAX_L1_BYTES (32 * MiB)
#define QCOW2_MAX_REFTABLE_BYTES (8 * MiB)
#define QCOW2_MAX_BITMAP_DIRECTORY_BYTES (1024 * (uint64_t)QCOW2_MAX_BITMAPS)

#define QCOW2_INCOMPAT_DIRTY ((uint64_t)1 << 0)
#define QCOW2_INCOMPAT_CORRUPT ((uint64_t)1 << 1)
#define QCOW2_INCOMPAT_DATA_FILE ((uint64_t)1 << 2)
#define QCOW2_INCOMPAT_COMPRESSION ((uint64_t)1 << 3)
#define QCOW2_INCOMPAT_EXTENDED_L2 ((uint64_t)1 << 4)
#define QCOW2_INCOMPAT_KNOWN ((uint64_t)0x1f)
#define QCOW2_COMPAT_LAZY_REFCOUNTS ((uint64_t)1 << 0)
#define QCOW2_AUTOCLEAR_BITMAPS ((uint64_t)1 << 0)
#define QCOW2_AUTOCLEAR_RAW_DATA_FILE ((uint64_t)1 << 1)
#define QCOW2_AUTOCLEAR_GUARD ((uint64_t)1 << 63) /* ours: guard.h */
/* Bits that this program keeps true (the guard's where somebody does); every other one is cleared
 * when we may write. */
#define QCOW2_AUTOCLEAR_KNOWN (QCOW2_AUTOCLEAR_BITMAPS | QCOW2_AUTOCLEAR_RAW_DATA_FILE)

enum {
    QCOW2_EXT_END = 0,
    QCOW2_EXT_BACKING_FORMAT = (int)0xe2792aca,
    QCOW2_EXT_FEATURE_NAMES = 0x6803f857,
    QCOW2_EXT_BITMAPS = 0x23852875,
    QCOW2_EXT_CRYPTO = 0x0537be77,
    QCOW2_EXT_DATA_FILE = 0x44415441,
    QCOW2_EXT_GUARD = 0x74696465, /* ours: "tide" */
};

struct qcow2_extension {
    uint32_t magic;
    uint32_t length; /* bytes */
    uint8_t *data;
};

struct qcow2_header {
    uint32_t version;
    uint32_t cluster_bits;
    uint64_t size_bytes;
    uint32_t crypt_method;
    uint32_t l1_size; /* entries */
    uint64_t l1_offset;
    uint64_t reftable_offset;
    uint32_t reftable_clusters;
    uint32_t nb_snapshots;
    uint64_t snapshots_offset;
    uint64_t incompatible, compatible, autoclear;
    uint32_t refcount_order;
    uint32_t header_length;
    uint8_t compression_type; /* 0 zlib, 1 zstd */

    uint64_t backing_offset; /* 0: no backing file */
    uint32_t backing_length;
    char *backing_file; /* NULL: none */
    char *backing_format;
    char *data_file;

    bool has_bitmaps;     /* the extension is there and its autoclear bit is set */
    bool bitmaps_dropped; /* it was there without the bit: nothing in it may be trusted */
    uint32_t nb_bitmaps;
    uint64_t bitmap_directory_offset, bitmap_directory_bytes;

    uint8_t *unknown_fields; /* of a longer header than we know */
    size_t unknown_fields_length;
    struct qcow2_extension *unknown; /* extensions kept as they are, in the order found */
    size_t nb_unknown;

    size_t extensions_end; /* when last encoded */
    size_t encoded_length; /* bytes of the first cluster in use when last decoded or encoded */
};

static inline uint64_t qcow2_header_cluster_size(const struct qcow2_header *h)
{
    return (uint64_t)1 << h->cluster_bits;
}

/* Whether these are the first bytes of a qcow2 image of a version that exists. */
bool qcow2_header_probe(const uint8_t *buf, size_t length);

/* The fixed part: LENGTH bytes of the start of the file, QCOW2_HEADER_BYTES are enough (a shorter
 * file is padded with zeroes by the caller). H is empty before; qcow2_header_fini frees what it
 * owns, also after an error. */
int qcow2_header_decode(const uint8_t *buf, size_t length, struct qcow2_header *h,
                        struct error *err);
/* Fields beyond the fixed part, extensions and backing file name: BUF is the whole first cluster.
 */
int qcow2_header_decode_rest(const uint8_t *buf, size_t length, struct qcow2_header *h,
                             struct error *err);
/* What QEMU refuses in the values, in its words; then what we do not do yet, by its name. */
int qcow2_header_check(const struct qcow2_header *h, struct error *err);
void qcow2_header_fini(struct qcow2_header *h);

/* Writes H to BUF, one cluster, zeroed first. Returns the bytes in use, or -ENOSPC when
 * extensions and backing name do not fit. Sets backing_offset, backing_length, header_length,
 * extensions_end and encoded_length. A backing name that does not fit into the first sector stays
 * where backing_offset says that it is, or gets a place beyond that, in sectors of its own: so
 * whoever writes those first can turn to it by writing the first sector. */
int qcow2_header_encode(struct qcow2_header *h, uint8_t *buf);

/* Replaces (or with DATA NULL removes) one of the extensions that are kept as they are. For
 * private extensions: they need nothing else. */
void qcow2_header_set_extension(struct qcow2_header *h, uint32_t magic, const void *data,
                                uint32_t length);
const struct qcow2_extension *qcow2_header_find_extension(const struct qcow2_header *h,
                                                          uint32_t magic);

/* "TABLE too large" or "TABLE offset invalid": the limits of QEMU for a table in the file. */
int qcow2_check_table(uint64_t offset, uint64_t entries, size_t entry_bytes, uint64_t max_bytes,
                      uint64_t cluster_size, const char *table, struct error *err);
