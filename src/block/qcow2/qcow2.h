/* What the files of the qcow2 driver share. Nobody outside this folder includes it, except
 * through bitmaps.h, which needs only the name of the struct.
 *
 * WHAT IS ON DISK WHEN. One rule carries everything: an entry that points at a cluster reaches the
 * disk after that cluster's reference count has, and a reference count is lowered only after
 * no entry on the disk points there any more. All metadata is changed in memory; writeback.c
 * takes a copy of everything that is dirty at one instant and writes it in this order:
 *
 *     guest data, COW data      written at once by the request, before its entry is made
 *     1 refcount blocks         only ever raised here: too early is a leak, never corruption
 *       -- flush --             (if 2 follows)
 *     2 refcount table          its entries point at blocks written in 1
 *       -- flush --             (if 3 or 4 follows; data written so far becomes durable, too)
 *     3 L2 tables               their entries point at clusters counted in 1
 *       -- flush --             (if 4 follows)
 *     4 L1 table                its entries point at tables written in 3
 *       -- flush --             (if something was freed)
 *     5 frees                   clusters that no entry on disk names any more: wait until no
 *                               request uses them, pass the discard on, lower the refcounts in
 *                               memory; 1 of the next round writes them
 *
 * So a cluster is not used again before its old reference is gone from the disk, and the order
 * between the two caches has one direction only: there are no cycles to resolve. A cut at
 * any place, with any subset of the writes since the last flush, leaves leaks and nothing else.
 *
 * WHO WAITS FOR WHOM. One loop, no locks on the hot path. A cached table may be used until the
 * next wait and no longer. Requests that change entries (allocation, discard, zeroes) hold their
 * guest clusters in `allocations`, exclusively, and look again after they have got them;
 * reads and writes in place take nothing but a place in the epoch, so that step 5 can wait for
 * those that may still use a freed cluster. `alloc_lock` guards the search for free clusters,
 * `l1_lock` the making of an L2 table; as a rule both are held for reads of metadata at most (a
 * refcount table or an L1 table that grows is flushed under them). */
#pragma once

#include "base/buffer.h"
#include "block/driver.h"
#include "block/qcow2/header.h"
#include "rt/rangelock.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <endian.h>

#define ENTRY_COPIED ((uint64_t)1 << 63)
#define ENTRY_COMPRESSED ((uint64_t)1 << 62)
#define ENTRY_ZERO ((uint64_t)1)
#define ENTRY_OFFSET_MASK ((uint64_t)0x00fffffffffffe00)
#define REFTABLE_OFFSET_MASK (~(uint64_t)0x1ff)
enum { REFCOUNT_MAX = 0xffff, ENTRIES_PER_SECTOR = 64, SECTOR = 512 };

struct qcow2;

/* ---- cache.c: slices of L2 tables and refcount blocks ---- */

struct cache_slot {
    uint64_t offset; /* in the file; 0: free */
    uint8_t *data;   /* as on disk, big endian */
    enum { SLOT_FREE, SLOT_LOADING, SLOT_VALID } state;
    bool is_dirty;
    unsigned writing; /* copies of it under way: what is on disk is old */
    struct cache_slot *hash_next;
    TAILQ_ENTRY(cache_slot) lru; /* the least recently used first */
    TAILQ_ENTRY(cache_slot) dirty;
};
TAILQ_HEAD(cache_slots, cache_slot);

struct cache {
    struct qcow2 *q;
    const char *name; /* "L2 table", "refcount block": for messages */
    uint32_t slice_bytes;
    unsigned slice_bits;
    uint32_t n_slots;
    struct cache_slot *slots;
    struct cache_slot **buckets;
    uint32_t bucket_mask;
    struct cache_slots lru, dirty;
    struct waitq changed; /* a slot has been loaded or has become free or clean */
    bool evict_by_write;  /* a dirty slot may be written alone, at any time (refcounts) */
    unsigned alone;       /* such writes under way */
    uint32_t n_dirty;
};

int cache_init(struct cache *c, struct qcow2 *q, const char *name, uint32_t slice_bytes,
               uint64_t cache_bytes);
void cache_fini(struct cache *c);
/* The slice at OFFSET (a multiple of the slice size), read if need be. *RET may be used until the
 * caller next waits. */
int cache_get(struct cache *c, uint64_t offset, struct cache_slot **ret);
/* As cache_get, when the slice is known to hold zeroes and was never read or written. */
int cache_get_zeroed(struct cache *c, uint64_t offset, struct cache_slot **ret);
struct cache_slot *cache_peek(struct cache *c, uint64_t offset); /* NULL: not there; no wait */
void cache_mark_dirty(struct cache *c, struct cache_slot *s);
void cache_mark_clean(struct cache *c, struct cache_slot *s);
/* Forgets [offset, offset+length): the cluster is no table any more. Waits for copies under way. */
void cache_forget(struct cache *c, uint64_t offset, uint64_t length);

/* ---- tables that are wholly in memory: L1 and refcount table ---- */

struct table {
    uint64_t *entries; /* host order */
    uint64_t *dirty;   /* a bit a 512-byte sector */
    uint32_t n;        /* entries that the file has room for */
    uint64_t offset;
    bool any_dirty;
};

int table_alloc(struct table *t, uint32_t n); /* zeroed; -ENOMEM */
void table_free(struct table *t);
void table_set(struct table *t, uint32_t index, uint64_t value); /* and marks dirty */

/* ---- clusters that hold metadata, for overlap checks (overlap.c) ---- */

enum metadata_kind { META_NONE, META_L2, META_REFBLOCK };
struct metadata_set {
    uint64_t *keys;        /* offset | kind; 0: empty, 1: deleted */
    size_t capacity, used; /* used counts deleted ones, too */
    uint64_t factor;       /* odd, of the hash, another one for each image */
};

struct snapshot {
    uint64_t l1_offset;
    uint32_t l1_size;
};

/* What was freed and waits for step 5. */
struct freed {
    uint64_t offset;
    uint64_t clusters;
    uint8_t type; /* enum free_type */
};
enum free_type { FREE_ALWAYS, FREE_NEVER, FREE_REQUEST, FREE_SNAPSHOT, FREE_OTHER };

struct freed_list {
    struct freed *items;
    size_t n, capacity;
};

struct qcow2 {
    struct node *node;
    struct edge *file;
    struct qcow2_header header; /* as it stands on disk, unless a change is under way */

    unsigned cluster_bits;
    uint64_t cluster_size;
    unsigned l2_bits; /* log2 of entries of an L2 table */
    uint32_t slice_entries;
    unsigned slice_entry_bits;
    unsigned refblock_bits; /* log2 of entries of a refcount block */

    struct table l1, reftable;
    struct cache l2_cache, refcount_cache;
    struct metadata_set metadata;
    struct snapshot *snapshots;
    uint64_t snapshot_table_bytes;

    struct rangelock allocations; /* guest clusters whose entries somebody is changing */
    struct mutex alloc_lock, l1_lock, header_lock;
    uint64_t free_hint;   /* cluster: all before it are in use, or so we believe */
    uint64_t fresh_from;  /* byte: the file has never held anything from here on; what an entry
                           * names beyond it is nowhere */
    uint64_t space_end;   /* byte: to here the file has blocks, or will get them one by one */
    uint64_t space_taken; /* bytes allocated since the image was opened */
    bool no_space_ahead;  /* the file below cannot do it */
    uint16_t *repairing;  /* references counted while refcounts are being rebuilt */
    uint64_t repairing_n;

    /* Requests that use clusters found in an entry, see step 5. */
    unsigned epoch, in_epoch[2];
    struct waitq epoch_left;

    struct mutex writeback_lock;
    uint64_t writebacks_begun;
    int writeback_result; /* of the last round */
    struct freed_list freed;
    uint64_t freed_clusters;

    bool pass_discard[FREE_OTHER + 1];
    bool request_as_node; /* pass_discard[FREE_REQUEST] was not given: the node's discard= */
    bool overlap_checks;
    bool signaled_corruption;
    bool bitmaps_unsettled;      /* which bitmap directory the disk's header names is not known */
    bool header_unsure;          /* see qcow2_take_header_back() */
    bool guard_unsure;           /* the disk's header may have a guard that memory has not */
    bool unusable;               /* see qcow2_unusable() */
    uint64_t losses;             /* graph_losses() when it was opened */
    bool holes_known, has_holes; /* status.c */
    bool lazy_refcounts;         /* option; accepted, never needed */
    uint64_t compressed_at;      /* the compressed cluster in `compressed`; 0: none */
    uint8_t *compressed;
};

static inline uint64_t into_cluster(const struct qcow2 *q, uint64_t offset)
{
    return offset & (q->cluster_size - 1);
}

static inline uint64_t clusters_of(const struct qcow2 *q, uint64_t bytes)
{
    return (bytes >> q->cluster_bits) + (into_cluster(q, bytes) != 0);
}

static inline uint64_t entry_load(const uint8_t *data, uint32_t index)
{
    uint64_t v;
    memcpy(&v, data + 8 * (size_t)index, sizeof v);
    return be64toh(v);
}

static inline void entry_store(uint8_t *data, uint32_t index, uint64_t v)
{
    v = htobe64(v);
    memcpy(data + 8 * (size_t)index, &v, sizeof v);
}

/* ---- file.c: the file below ---- */

/* What is about to be done with it, for blkdebug below. */
static inline void file_event(struct qcow2 *q, enum debug_event event)
{
    node_debug_event(q->file->node, event);
}
int file_read(struct qcow2 *q, uint64_t offset, void *buf, uint64_t length);
int file_write(struct qcow2 *q, uint64_t offset, const void *buf, uint64_t length);
int file_write_zeroes(struct qcow2 *q, uint64_t offset, uint64_t length);
int file_flush(struct qcow2 *q);
uint64_t file_size(const struct qcow2 *q);

/* ---- writeback.c ---- */

/* Everything that was dirty when it was called is written, in order; -errno and it stays dirty. The
 * last writes are not flushed: block/ does that. */
int qcow2_writeback(struct qcow2 *q);
/* The same, and flushed. */
int qcow2_sync(struct qcow2 *q);
/* A change of the header has not come to its end, and q->header is again what it was: the disk
 * may have either. It is written once more; if that fails, then before anything else is. */
void qcow2_take_header_back(struct qcow2 *q);
/* Gives back [offset, offset+length) (bytes; whole clusters are touched), after the entry that
 * named it has been changed in memory. */
void qcow2_free_later(struct qcow2 *q, uint64_t offset, uint64_t length, enum free_type type);

static inline unsigned epoch_enter(struct qcow2 *q)
{
    q->in_epoch[q->epoch]++;
    return q->epoch;
}

static inline void epoch_leave(struct qcow2 *q, unsigned e)
{
    if (--q->in_epoch[e] == 0 && e != q->epoch)
        waitq_wake_all(&q->epoch_left);
}

/* ---- refcount.c ---- */

/* Finds up to WANTED adjacent free clusters and counts them once; *GOT >= 1. FRESH: the file has
 * never held anything there, so they read as zeroes. */
int refcount_alloc(struct qcow2 *q, uint64_t wanted, uint64_t *offset, uint64_t *got, bool *fresh);
/* All of BYTES, adjacent. */
int refcount_alloc_bytes(struct qcow2 *q, uint64_t bytes, uint64_t *offset);
/* At once: only for what no entry on the disk has ever named. */
void refcount_unalloc(struct qcow2 *q, uint64_t offset, uint64_t clusters);
int refcount_get(struct qcow2 *q, uint64_t cluster, uint16_t *ret);
/* The first cluster of [CLUSTER, END) that has a count; END: none. */
uint64_t refcount_skip_unknown(const struct qcow2 *q, uint64_t cluster, uint64_t end);
/* Clusters before this have counts; there are no blocks from here on. */
uint64_t refcount_end(const struct qcow2 *q);
/* Adds DELTA to each; below 0 or above the maximum is corruption, and -EIO. */
int refcount_add(struct qcow2 *q, uint64_t cluster, uint64_t n, int delta);
int refcount_set(struct qcow2 *q, uint64_t cluster,
                 uint16_t value); /* makes the block if need be */

/* Gives back the space that was taken ahead, before the image is closed. */
void refcount_trim_space(struct qcow2 *q);

/* ---- cluster.c: from guest to host ---- */

enum mapping_type { MAP_UNALLOCATED, MAP_ZERO, MAP_NORMAL, MAP_COMPRESSED };
struct mapping {
    enum mapping_type type;
    bool copied;     /* refcount is one: may be written in place */
    uint64_t length; /* bytes from the asked offset on for which this holds */
    uint64_t host;   /* NORMAL, ZERO with an allocated cluster (else 0): where the asked byte is */
    uint64_t entry;  /* the first one, as it is */
};
/* The first run of [GUEST, GUEST+LENGTH), at most to the end of a slice (for what has no L2 table,
 * of all L1 entries without). Waits only when the slice is not cached. */
int map_lookup(struct qcow2 *q, uint64_t guest, uint64_t length, struct mapping *ret);
/* The slice of GUEST's entry, of a table that may be changed: made or copied if need be. INDEX: the
 * entry in it. *RET may be used until the next wait. */
int map_writable_slice(struct qcow2 *q, uint64_t guest, struct cache_slot **ret, uint32_t *index);
/* Changes one entry; the slice is dirty then. */
void map_set(struct qcow2 *q, struct cache_slot *s, uint32_t index, uint64_t entry);
/* What ENTRY pointed at goes, its clusters' references are dropped after it. */
void map_free_entry(struct qcow2 *q, uint64_t entry, enum free_type type);
struct range compressed_extent(const struct qcow2 *q, uint64_t entry);
/* Of the whole image: an L2 entry that cannot be, reported as QEMU does; -EIO. */
int map_check_entry(struct qcow2 *q, uint64_t entry, uint64_t l2_offset, uint32_t l2_index);

/* ---- io.c, alloc.c, discard.c, resize.c, status.c: the driver's calls ---- */

int qcow2_read(struct node *n, struct range r, void *buf, unsigned flags);
int qcow2_write(struct node *n, struct range r, const void *buf, unsigned flags);
int qcow2_write_zeroes(struct node *n, struct range r, unsigned flags);
int qcow2_discard(struct node *n, struct range r);
int qcow2_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err);
int qcow2_status(struct node *n, bool want_zero, struct range r, struct block_status *ret);
/* What the guest sees of R (inside the image or its last cluster); zeroes beyond its size. */
int qcow2_read_range(struct qcow2 *q, struct range r, uint8_t *buf);
/* A piece that is not to be written in place; *DONE bytes of it were written, 0: look again. */
int qcow2_write_allocating(struct qcow2 *q, struct range r, const uint8_t *buf, uint64_t *done);
/* Frees (entry 0, or ZERO where it must not fall through) the whole clusters of R. FULL: entry 0
 * always. */
int qcow2_discard_clusters(struct qcow2 *q, struct range r, enum free_type type, bool full);
int qcow2_zero_clusters(struct qcow2 *q, struct range r, bool unmap);

/* Inflates one cluster; a pure function for a worker thread, and for the fuzzer. */
int qcow2_inflate(const void *in, size_t in_bytes, void *out, size_t out_bytes);

/* ---- overlap.c ---- */

void metadata_add(struct qcow2 *q, uint64_t offset, enum metadata_kind kind);
void metadata_remove(struct qcow2 *q, uint64_t offset);
enum metadata_kind metadata_at(const struct qcow2 *q, uint64_t cluster_offset);
/* What a write of [offset, offset+length) would destroy; NULL: nothing. IGNORE: of this kind
 * itself. */
const char *metadata_overlap(struct qcow2 *q, uint64_t offset, uint64_t length,
                             enum metadata_kind ignore);
/* The same, and if there is something the image is marked corrupt: -EIO. */
int qcow2_check_overlap(struct qcow2 *q, uint64_t offset, uint64_t length,
                        enum metadata_kind ignore);
/* Raises BLOCK_IMAGE_CORRUPTED; FATAL (and we may write): sets the corrupt bit, and nothing works
 * on this node any more. OFFSET and LENGTH -1: none. */
void qcow2_signal_corruption(struct qcow2 *q, bool fatal, int64_t offset, int64_t length,
                             const char *fmt, ...) PRINTF(5, 6);

/* ---- open.c ---- */

/* Writes the header as q->header says: one write, not flushed. Holds header_lock. */
int qcow2_write_header(struct qcow2 *q);

/* ---- guard.c ---- */

/* The autoclear bit of the guard, if somebody keeps the guards of N's graph; else 0. */
uint64_t qcow2_guard_known(const struct node *n);
/* A fatal corruption was found, or a server below has lost what was not flushed, perhaps tables of
 * which memory thinks that they are on disk. Every request ends with -ENOMEDIUM, and nothing is
 * written any more: the image must be opened again. */
bool qcow2_unusable(struct qcow2 *q);

static inline bool qcow2_writable(const struct qcow2 *q)
{
    return !q->node->read_only && !(q->header.incompatible & QCOW2_INCOMPAT_CORRUPT);
}

/* ---- snapshot.c ---- */
int qcow2_read_snapshots(struct qcow2 *q, struct error *err);

/* ---- repair.c ---- */
/* Counts all references anew and makes the refcounts agree; then clears the dirty bit. */
int qcow2_repair(struct qcow2 *q, struct error *err);

/* ---- create.c, info.c ---- */
int qcow2_create(struct graph *g, struct json_object *options, struct error *err);
void qcow2_image_info(struct node *n, struct json_object *info);
