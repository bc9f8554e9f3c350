/* What a driver implements, and what it may touch of its node. */
#pragma once

#include "block/block.h"

/* What a child is to its parent (QEMU's BdrvChildRole). */
enum {
    ROLE_DATA = 1,     /* guest data is stored there */
    ROLE_METADATA = 2, /* the parent's own metadata */
    ROLE_FILTERED = 4, /* the child of a filter: same content */
    ROLE_COW = 8,      /* the backing image */
    ROLE_PRIMARY = 16, /* the one that stands for the node */
    ROLE_IMAGE = ROLE_DATA | ROLE_METADATA | ROLE_PRIMARY,
};

struct node_limits {
    uint32_t request_alignment;      /* power of 2, 1.. ; the driver gets multiples of it */
    uint32_t memory_alignment;       /* of buffers, for O_DIRECT */
    uint64_t max_transfer;           /* bytes of one driver call; 0: none */
    uint64_t write_zeroes_alignment; /* bytes; 0: request_alignment */
    uint64_t max_write_zeroes;
    uint64_t discard_alignment;
    uint64_t max_discard;
};

/* The node as drivers see it. Users go through block.h's functions. */
struct node {
    struct graph *graph;
    const struct driver *driver;
    void *state; /* the driver's, state_size bytes, zeroed before open */
    char name[32];
    char *filename; /* exact_filename, "" when there is none */
    unsigned refs;
    bool monitor_owned;
    bool implicit; /* a filter that a command made by itself */

    bool read_only, auto_read_only, force_share;
    bool cache_direct, cache_no_flush, cache_writeback;
    bool discard_unmap; /* discard=unmap */
    enum { DETECT_ZEROES_OFF, DETECT_ZEROES_ON, DETECT_ZEROES_UNMAP } detect_zeroes;
    struct json_object *options; /* as opened, with children as node names */

    uint64_t size_bytes; /* the driver sets it at open; truncate updates it */
    struct node_limits limits;
    unsigned write_flags;        /* REQ_* that the driver's write honours (REQ_FUA) */
    unsigned write_zeroes_flags; /* REQ_* that write_zeroes honours */

    TAILQ_HEAD(, edge) children; /* in the order attached */
    TAILQ_HEAD(, edge) parents;
    struct edge *file, *backing; /* shortcuts into children; NULL: none */
    TAILQ_HEAD(, write_observer) observers;
    TAILQ_HEAD(, op_blocker) blockers;
    TAILQ_ENTRY(node) in_graph;

    unsigned gate;   /* quiesce depth */
    unsigned inside; /* requests that passed the gate */
    struct waitq at_gate, emptied;
    struct rangelock locks; /* serialising requests, copy-before-write, unaligned edges */
    uint64_t write_generation, flushed_generation; /* a flush with nothing written costs nothing */
    struct node_counters {
        uint64_t rd_bytes, wr_bytes, rd_ops, wr_ops, flush_ops, unmap_ops, unmap_bytes;
        uint64_t wr_highest_offset;
    } counters;
    struct node_data *data; /* node_get_data */
};

struct driver {
    const char *name;     /* "qcow2": the QMP name */
    const char *protocol; /* "file" for file names "file:..."; NULL otherwise */
    size_t state_size;
    bool is_filter; /* content is that of its ROLE_FILTERED child */
    bool supports_backing;
    bool is_format;                             /* has a file child and may be probed */
    int (*probe)(const uint8_t *buf, size_t n); /* score 0..100 of the first bytes */

    /* OPTIONS: this node's object, generic options already taken. The driver opens its children
     * with node_open_child, sets size_bytes and limits. Waits. On error its close is not called. */
    int (*open)(struct node *n, struct json_object *options, struct error *err);
    void (*close)(struct node *n);

    /* R is aligned to limits.request_alignment and inside the size rounded up to it. */
    int (*read)(struct node *n, struct range r, void *buf, unsigned flags);
    int (*write)(struct node *n, struct range r, const void *buf, unsigned flags);
    int (*write_zeroes)(struct node *n, struct range r, unsigned flags); /* NULL: written out */
    int (*discard)(struct node *n, struct range r);                      /* NULL: nothing happens */
    int (*flush)(struct node *n); /* to the medium, its children are flushed by block/ after it */
    int (*flush_to_os)(struct node *n); /* caches into the children, no sync; before flush */
    int (*truncate)(struct node *n, uint64_t size_bytes, bool exact, struct error *err);
    /* Of this layer only; NULL: all data (filters: the child's). */
    int (*status)(struct node *n, bool want_zero, struct range r, struct block_status *ret);
    uint64_t (*measure_length)(struct node *n); /* a file may grow behind us; NULL: size_bytes */

    /* Perms that the node's parents have in sum changed. check may fail and wait; then commit or
     * abort. NULL: anything goes. */
    int (*check_perm)(struct node *n, unsigned perm, unsigned shared, struct error *err);
    void (*commit_perm)(struct node *n, unsigned perm, unsigned shared);
    void (*abort_perm)(struct node *n);
    /* What the node needs of child E given what its parents need; NULL: by E's role as QEMU does.
     */
    void (*child_perm)(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                       unsigned *need, unsigned *share);

    /* blockdev-reopen: OPTIONS new; prepare checks and opens aside, then commit or abort. */
    int (*reopen_prepare)(struct node *n, struct json_object *options, bool read_only, void **plan,
                          struct error *err);
    void (*reopen_commit)(struct node *n, void *plan);
    void (*reopen_abort)(struct node *n, void *plan);

    int (*create)(struct graph *g, struct json_object *options, struct error *err);
    uint64_t (*cluster_size)(const struct node *n);
    uint64_t (*allocated_bytes)(struct node *n); /* actual-size */
    /* Adds format-specific members to ImageInfo (cluster-size, dirty-flag, format-specific, ...).
     */
    void (*image_info)(struct node *n, struct json_object *info);
    /* Name and format of the backing file as the header has them; false: none. */
    bool (*image_backing)(struct node *n, const char **filename, const char **format);
};

void graph_add_driver(struct graph *g, const struct driver *d);
const struct driver *graph_find_driver(struct graph *g, const char *name);

/* Opens (or refers to) the child that options[KEY] names and attaches it. REQUIRED false: *ret NULL
 * when the option is absent. A JSON null for "backing" means none. */
int node_open_child(struct node *n, struct json_object *options, const char *key, unsigned role,
                    bool required, struct edge **ret, struct error *err) MUST_CHECK;
int node_attach_child(struct node *n, struct node *child, const char *key, unsigned role,
                      struct edge **ret, struct error *err) MUST_CHECK;

/* Takes bytes of this node's own range lock, e.g. around a read-modify-write. */
int node_lock_range(struct node *n, struct range_holder *h, struct range r,
                    enum range_lock_mode mode);

/* Buffers aligned for every node (4096). NULL: out of memory. free() releases. */
void *block_buffer(size_t n);
