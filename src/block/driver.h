/* What a driver implements, and what it may touch of its node. */
#pragma once

#include "block/block.h"
#include "block/debug_event.h"
#include "rt/sync.h"

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
    bool probed; /* the driver was guessed from the content */
    bool closing;
    bool watched;                /* node_set_watched */
    bool hooked;                 /* the hooks' `opened` has been called */
    struct json_object *options; /* as opened, with children as node names */
    struct node *inherits_from;  /* the parent that opened this node for itself; NULL: named */
    const struct node_reopen *reopening; /* what a reopen under way will make of this node */
    char *full_filename;                 /* of node_filename() */
    struct op_blocker *backing_blocker;  /* as a backing image most operations are refused */

    uint64_t size_bytes; /* the driver sets it at open; truncate updates it */
    struct node_limits limits;
    unsigned write_flags;        /* REQ_* that the driver's write honours (REQ_FUA) */
    unsigned write_zeroes_flags; /* REQ_* that write_zeroes honours */

    TAILQ_HEAD(edge_list, edge) children; /* in the order attached */
    struct edge_list parents;             /* the newest first */
    struct edge *file, *backing;          /* shortcuts into children; NULL: none */
    TAILQ_HEAD(, write_observer) observers;
    TAILQ_HEAD(, op_blocker) blockers;
    TAILQ_ENTRY(node) in_graph;

    unsigned gate;      /* quiesce depth */
    unsigned cancelled; /* node_cancel_begin */
    unsigned inside;    /* requests that passed the gate */
    struct waitq at_gate, emptied;
    struct mutex flush_lock;
    bool truncating;
    unsigned visited;       /* graph walks */
    unsigned height;        /* found by the walk that visited it: node_height */
    struct rangelock locks; /* serialising requests, copy-before-write, unaligned edges */
    uint64_t lost_at;       /* number of its last loss: node_has_lost; 0: there was none */
    uint64_t write_generation, flushed_generation; /* a flush with nothing written costs nothing */
    struct node_counters {
        uint64_t rd_bytes, wr_bytes, rd_ops, wr_ops, flush_ops, unmap_ops, unmap_bytes;
        uint64_t wr_highest_offset;
    } counters;
    struct node_data *data; /* node_get_data */
};

struct driver {
    const char *name;     /* "qcow2": the QMP name */
    const char *protocol; /* "file" for file names "file:..."; NULL: there is a `file` child */
    bool takes_path; /* the option `filename` must be given; PROTOCOL: before it is no part of it */
    const char *const *more_protocols; /* other words for it in file names; NULL-terminated */
    const char *no_directory; /* its file names are no paths; what errors call it. NULL: are */
    bool grows_by_content;    /* node_grows_by_content() */
    size_t state_size;
    bool is_filter;            /* content is that of its ROLE_FILTERED child */
    bool child_stays;          /* a filter that has its child's bitmaps: no other for it */
    bool comes_and_goes;       /* no edge to it can be frozen */
    bool named_as_file;        /* its file name is that of its primary child */
    bool flushes_primary_only; /* a flush from above is not one of its other children */
    bool supports_backing;
    bool is_format;                             /* has a file child and may be probed */
    int (*probe)(const uint8_t *buf, size_t n); /* score 0..100 of the first bytes */

    /* Options that change what a guest sees: with one of them the node's file name is json:{}. */
    const char *const *strong_options; /* NULL-terminated; NULL: none */
    /* All of the driver's own options but children; others are refused. NULL: not checked. */
    const char *const *known_options;
    const char *const
        *mutable_options; /* those that a reopen may leave out: back to their default */

    /* "PROTOCOL:REST" as options; NULL: the option `filename` has it all. */
    int (*parse_filename)(const char *filename, struct json_object *options, struct error *err);

    /* OPTIONS: this node's object, generic options already taken, "file" made a node's name. The
     * driver opens its children with node_open_child, sets size_bytes (block/ rounds it up to 512)
     * and limits. Waits. On error its close is not called; block/ detaches its children.
     * The backing image is not the driver's: block/ opens it after `open`, from options.backing or
     * from what image_backing says. */
    int (*open)(struct node *n, struct json_object *options, struct error *err);
    void (*close)(struct node *n);

    /* R is aligned to limits.request_alignment and inside the size rounded up to it. */
    int (*read)(struct node *n, struct range r, void *buf, unsigned flags);
    int (*write)(struct node *n, struct range r, const void *buf, unsigned flags);
    int (*write_zeroes)(struct node *n, struct range r, unsigned flags); /* NULL: written out */
    int (*discard)(struct node *n, struct range r);                      /* NULL: nothing happens */
    int (*prefetch)(struct node *n, struct range r); /* brings it near; NULL: not needed */
    int (*flush)(struct node *n); /* to the medium, its children are flushed by block/ after it */
    int (*flush_to_os)(struct node *n); /* caches into the children, no sync; before flush */
    int (*finish)(struct node *n);      /* all that closing would write yet; NULL: nothing */
    int (*truncate)(struct node *n, uint64_t size_bytes, bool exact, struct error *err);
    /* Of this layer only; NULL: all data (filters: the child's). */
    int (*status)(struct node *n, bool want_zero, struct range r, struct block_status *ret);
    uint64_t (*measure_length)(
        struct node *n); /* after a child's size has changed; filters: theirs */

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

    /* The gate has closed: what is inside should not be held up on purpose any longer. */
    void (*quiesced)(struct node *n);
    /* n->cancelled has risen from 0: nothing shall hang here any more. NULL: nothing does. */
    void (*cancel)(struct node *n);
    /* Something above does EVENT with this node; must not wait. Raised by node_debug_event. */
    void (*debug_event)(struct node *n, enum debug_event event);

    int (*create)(struct graph *g, struct json_object *options, struct error *err);
    uint64_t (*cluster_size)(const struct node *n);
    uint64_t (*allocated_bytes)(struct node *n); /* actual-size */
    /* Adds format-specific members to ImageInfo (cluster-size, dirty-flag, format-specific, ...).
     */
    void (*image_info)(struct node *n, struct json_object *info);
    struct json_object *(*specific_stats)(struct node *n); /* of query-blockstats */
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

/* Opens the backing image that N's header names, for a node that was opened without one. */
int node_open_backing(struct node *n, struct error *err) MUST_CHECK;

static inline void node_debug_event(struct node *n, enum debug_event event)
{
    if (n->driver->debug_event)
        n->driver->debug_event(n, event);
}

/* Whoever holds the graph's lock may have nodes quiesced, and only his own task's requests pass
 * their gates. So a driver does not spread a request of his over tasks: they would wait there. */
bool graph_lock_is_mine(struct graph *g);

/* All that was written to N and below is durable. Inside the gate, or by who has it quiesced. */
int node_flush(struct node *n) MUST_CHECK;
/* Flushes N and writes what it and those below would write when they close: then, if nobody writes
 * to them meanwhile, their files stay as they are. */
int node_finish(struct node *n) MUST_CHECK;
bool node_has_to_finish(const struct node *n); /* has its chain formats that write such things? */
/* What was written to N and not flushed may have gone, while the node stayed: a server went. */
void node_has_lost(struct node *n);
/* So many losses there have been. Whoever counts on what he writes or reads from now on keeps this
 * number: a flush tells of a loss once, and perhaps somebody else. */
uint64_t graph_losses(const struct graph *g);
/* Has N, or a node that is below it now, lost something since graph_losses() was THEN? */
bool node_lost_since(const struct node *n, uint64_t then);
/* The same of those nodes alone that a flush of N speaks for. */
bool node_flush_lost_since(const struct node *n, uint64_t then);

/* Takes bytes of this node's own range lock, e.g. around a read-modify-write. The request that the
 * driver is working on holds its own range, shared, already: a driver must not take it again. */
int node_lock_range(struct node *n, struct range_holder *h, struct range r,
                    enum range_lock_mode mode);

/* Holds the node under E, which then stays where it is and open, for work there that is no request.
 * Waits while the node is quiesced. */
struct node *request_enter(struct edge *e);
void request_leave(struct node *n);

/* Buffers aligned for every node (4096). NULL: out of memory. free() releases. */
void *block_buffer(size_t n);

/* QEMU's rule for the child at E: what the node needs of it and shares, given what its own parents
 * need and share. For a driver's child_perm that differs only a little. */
void node_default_child_perm(struct node *n, struct edge *e, unsigned perm, unsigned shared,
                             unsigned *need, unsigned *share);
/* The filtered child of a filter, else the backing child; NULL: none. */
struct edge *node_filtered_or_backing(const struct node *n);
struct edge *node_filtered(const struct node *n); /* of a filter */
struct edge *node_primary(const struct node *n);  /* the child with ROLE_PRIMARY */
/* A number of bytes must not be negative: the schema lets it through, QEMU's options do not. */
int option_check_size(struct json_object *options, const char *name, struct error *err);
/* A driver that can only read: makes the node read-only if auto-read-only allows it, else -EACCES
 * with TEXT ("Image is read-only" when NULL). */
int node_apply_auto_read_only(struct node *n, const char *text, struct error *err);
/* The node would be writable, also after a reopen that is under way. */
bool node_will_be_writable(const struct node *n);

/* The drivers of this room; graph_new adds them. */
extern const struct driver driver_file, driver_host_device, driver_raw, driver_null_co,
    driver_qcow2, driver_blkdebug, driver_throttle, driver_nbd;

/* Where in its file the disk of a raw node begins; of other nodes: 0. */
uint64_t raw_offset(const struct node *n);
