/* Nodes, edges and requests: what users of the block layer (exports, jobs, filters, the
 * monitor) must know. Drivers also include block/driver.h.
 *
 *     export "e0"      job "j0"                 users
 *         | edge "root"   | edge
 *         v               v
 *       node f0 (copy-before-write)             nodes: a driver each
 *         | edge "file"  \ edge "target"
 *         v               v
 *       node d0 (qcow2)   node t0
 *         | edge "file"
 *       node p0 (file)
 *
 * All of a graph lives on one loop. Requests run in tasks and travel along edges, from a
 * parent to a child; a request is shielded (rt/task.h): once begun it ends, it is not
 * cancelled half way. Changes of the graph hold graph_lock(); requests never do. Where an
 * edge must not be used for a while (a filter comes in, the instant of a backup is taken)
 * its node is quiesced: new requests wait at the node's gate, those inside end. Because a
 * request names the edge and not the node, it goes to the new node when the gate opens. */
#pragma once

#include "base/error.h"
#include "base/json.h"
#include "base/range.h"
#include "rt/rangelock.h"

struct graph;
struct node;
struct driver;
struct edge;

/* ---- the graph ---- */

struct graph *graph_new(void);
/* Closes all nodes that the monitor holds; nobody else may hold one any more. */
void graph_free(struct graph *g);
DEFINE_CLEANUP(struct graph *, graph_free, graph_freep)
/* The monitor gives all its nodes back; those that nobody else holds are closed. Waits. */
void graph_close_all(struct graph *g);

/* Who changes edges, names or drivers' options holds this; recursive for one task, waits
 * for other tasks, shielded. */
void graph_lock(struct graph *g);
bool graph_trylock(struct graph *g); /* false: somebody has it */
void graph_unlock(struct graph *g);
void graph_unlockp(struct graph **g);
#define GRAPH_LOCKED(g)                                                                            \
    CLEANUP(graph_unlockp) struct graph *TASK_CONCAT(graph_locked_, __LINE__) = (g);               \
    graph_lock(TASK_CONCAT(graph_locked_, __LINE__))

/* NULL: no such node. Names are unique, 1..31 bytes as QEMU's; made ones start with '#'. */
struct node *graph_find(struct graph *g, const char *node_name);
/* As graph_find, and the error QEMU gives: class GenericError,
 * "Cannot find device='' nor node-name='NAME'" is formatted by the caller's own text. */
struct node *graph_first(struct graph *g); /* in the order of creation */
struct node *graph_next(struct node *n);

/* Opens a node as blockdev-add does: OPTIONS is the nested, typed object that the schema
 * has passed ("driver", "node-name", children as objects or as names of existing nodes).
 * The caller gets a reference. Files may be created by nobody here. */
int graph_open(struct graph *g, struct json_object *options, struct node **ret,
               struct error *err) MUST_CHECK;
/* As QEMU opens a file name given without -blockdev (drive-backup's target, a backing
 * file): FILENAME may be "json:{...}", "file:PATH" or a path; FORMAT NULL probes
 * (raw|qcow2). EXTRA holds further options and may be NULL. */
int graph_open_filename(struct graph *g, const char *filename, const char *format,
                        struct json_object *extra, bool read_only, struct node **ret,
                        struct error *err) MUST_CHECK;

/* The monitor's own reference, taken by blockdev-add and given back by blockdev-del. */
void node_set_monitor_owned(struct node *n, bool owned); /* takes or drops a reference */
bool node_monitor_owned(const struct node *n);

/* ---- nodes ---- */

struct node *node_ref(struct node *n);
void node_unref(struct node *n); /* the last one closes it: waits, shielded */
DEFINE_CLEANUP(struct node *, node_unref, node_unrefp)

const char *node_name(const struct node *n);
const char *node_driver_name(const struct node *n);
struct graph *node_graph(const struct node *n);
uint64_t node_size(const struct node *n); /* bytes */
bool node_read_only(const struct node *n);
bool node_grows_by_content(const struct node *n); /* what a larger size shows is not zeroes */
const char *node_filename(const struct node *n);  /* as QEMU's exact_filename / json:{} */
/* Below a filter, where the data is: n itself when it is no filter. */
struct node *node_skip_filters(struct node *n);
struct node *node_backing(struct node *n); /* the next image of the chain or NULL, below filters */
uint64_t node_cluster_size(const struct node *n); /* 0: unknown (bdrv_get_info) */
uint32_t node_request_alignment(const struct node *n);

/* ---- permissions: what a parent does with a child and lets others do ---- */

enum {
    PERM_CONSISTENT_READ = 1,
    PERM_WRITE = 2,
    PERM_WRITE_UNCHANGED = 4,
    PERM_RESIZE = 8,
    PERM_ALL = 15,
};

/* A parent that is no node. Embedded in an export or a job. */
struct user;
struct user_ops {
    /* "block device 'x'", "backup job 'job0'": as QEMU names it in conflicts; caller frees. */
    char *(*describe)(struct user *u);
    void (*moved)(struct user *u, struct edge *e);   /* the edge now leads to another node */
    void (*resized)(struct user *u, struct edge *e); /* the node's size changed */
};
struct user {
    const struct user_ops *ops;
};

struct edge {
    struct node *node;   /* the child; changes only under graph_lock and quiesced */
    struct node *parent; /* a node, or NULL: */
    struct user *user;
    char *name; /* "root", "file", "backing", "target", ... */
    unsigned role;
    unsigned perm, shared;         /* PERM_*: needed; allowed to others */
    bool frozen;                   /* by edge_freeze */
    bool stay;                     /* node_insert_filter leaves this edge where it is */
    TAILQ_ENTRY(edge) in_parents;  /* of node */
    TAILQ_ENTRY(edge) in_children; /* of parent */
};

/* Attaches USER to NODE as "root"; the edge holds a reference to the node. -EPERM with QEMU's text
 * on a permission conflict, and nothing has changed. */
int edge_attach_user(struct user *u, struct node *n, const char *name, unsigned perm,
                     unsigned shared, struct edge **ret, struct error *err) MUST_CHECK;
void edge_detach(struct edge *e); /* drops its reference; shielded, may close nodes */
DEFINE_CLEANUP(struct edge *, edge_detach, edge_detachp)
int edge_set_perm(struct edge *e, unsigned perm, unsigned shared, struct error *err) MUST_CHECK;
/* E may not be moved or cut until it is thawed: somebody relies on it. -EPERM if it leads to a
 * filter that comes and goes with a job; so such a filter can always be taken out. */
int edge_freeze(struct edge *e, struct error *err) MUST_CHECK;
void edge_thaw(struct edge *e);

/* ---- changing what stands where; all hold graph_lock ---- */

/* FILTER (opened, its edge to NODE attached) takes NODE's place under all of NODE's parents but
 * the filter itself and edges that `stay`. Quiesces by itself unless already quiesced. */
int node_insert_filter(struct node *filter, struct node *n, struct error *err) MUST_CHECK;
/* The reverse: parents of FILTER get its filtered child back; FILTER is then without parents. */
int node_remove_filter(struct node *filter, struct error *err) MUST_CHECK;
int node_replace(struct node *from, struct node *to, struct error *err) MUST_CHECK;
/* OVERLAY, which may have nothing behind it yet, comes above N: N becomes its backing image, N's
 * users (but edges that `stay`) move to it. Quiesces by itself; who wants to undo it later keeps N
 * and OVERLAY quiesced until then. *RET is to be given to one of the next two. */
struct node_append;
int node_append(struct node *overlay, struct node *n, struct node_append **ret,
                struct error *err) MUST_CHECK;
void node_append_keep(struct node_append *a);
void node_append_undo(struct node_append *a); /* those that have moved, and only those, come back */

/* Closes the gates of these nodes, and of those that lie between two of them, and waits until no
 * request is inside; nests. Takes parents before children whatever the order given, so that a
 * request inside a parent can still finish in its child. The quiescer sends no request to them
 * meanwhile. Shielded; holds graph_lock from begin to end, which names the same nodes. */
void graph_quiesce_begin(struct graph *g, struct node *const *nodes, size_t n);
void graph_quiesce_end(struct graph *g, struct node *const *nodes, size_t n);

/* Giving up on a disk: until node_cancel_end, requests to N that hang end soon with -ECANCELED,
 * those under way and new ones, where the drivers from N down to where its data is can do that. */
struct node_cancel;
struct node_cancel *node_cancel_begin(struct node *n);
void node_cancel_end(struct node_cancel *c);

/* Why an operation on NODE is refused while something else has it: "Node 'x' is busy: REASON".
 * OPS: what is blocked. The blocker is embedded in who blocks. */
enum block_op {
    BLOCK_OP_BACKUP_SOURCE,
    BLOCK_OP_BACKUP_TARGET,
    BLOCK_OP_MIRROR_SOURCE,
    BLOCK_OP_MIRROR_TARGET,
    BLOCK_OP_COMMIT_SOURCE,
    BLOCK_OP_COMMIT_TARGET,
    BLOCK_OP_STREAM,
    BLOCK_OP_RESIZE,
    BLOCK_OP_EXTERNAL_SNAPSHOT,
    BLOCK_OP_INTERNAL_SNAPSHOT,
    BLOCK_OP_REPLACE,
    BLOCK_OPS,
};
struct op_blocker {
    unsigned ops; /* 1 << BLOCK_OP_* */
    char *reason; /* "block device is in use by block job: backup" */
    TAILQ_ENTRY(op_blocker) link;
};
void node_block_ops(struct node *n, struct op_blocker *b);
void node_unblock_ops(struct node *n, struct op_blocker *b);
int node_check_op(struct node *n, enum block_op op, struct error *err); /* -EBUSY */

/* ---- requests; tasks only; -errno ---- */

enum {
    REQ_FUA = 1,             /* durable when it returns */
    REQ_MAY_UNMAP = 2,       /* write_zeroes may make a hole */
    REQ_NO_FALLBACK = 4,     /* write_zeroes: -ENOTSUP rather than writing zeroes out */
    REQ_WRITE_UNCHANGED = 8, /* content stays as the guest sees it: no bit is marked */
    REQ_SERIALISING = 16,    /* exclusive over its range among all requests of the node */
    REQ_PREFETCH = 32,       /* read: only bring it near */
    REQ_REGISTERED_BUF = 64, /* buffer aligned for O_DIRECT already (hint) */
};

/* BUF has at least r.length bytes. Reads and writes of any alignment are taken; the node's driver
 * gets aligned ones. A user's range beyond the node's size: -EIO. What a parent node reads beyond
 * the end is zeroes. An edge with PERM_RESIZE may write beyond the end; the node then grows. A
 * write needs PERM_WRITE (PERM_WRITE_UNCHANGED does for REQ_WRITE_UNCHANGED), else -EPERM. */
int edge_read(struct edge *e, struct range r, void *buf, unsigned flags) MUST_CHECK;
int edge_write(struct edge *e, struct range r, const void *buf, unsigned flags) MUST_CHECK;
int edge_write_zeroes(struct edge *e, struct range r, unsigned flags) MUST_CHECK;
int edge_discard(struct edge *e, struct range r) MUST_CHECK; /* advice: what cannot be is 0 */
/* Of what is read-only what was there before we opened it is flushed once, too. */
int edge_flush(struct edge *e) MUST_CHECK;
/* Makes everything durable that N consists of, with its backing images: also of read-only nodes,
 * and what others wrote before we opened it. graph_lock held; waits. */
int node_flush_tree(struct node *n) MUST_CHECK;
/* Grows or shrinks. PREALLOC "off" only, for now. */
int edge_truncate(struct edge *e, uint64_t size_bytes, bool exact, struct error *err) MUST_CHECK;

enum {
    STATUS_DATA = 1,      /* reading may give other than zeroes */
    STATUS_ZERO = 2,      /* reads as zeroes */
    STATUS_ALLOCATED = 4, /* this layer decides the content, not its backing */
    STATUS_OFFSET_VALID = 8,
    STATUS_COMPRESSED = 16,
    STATUS_EOF = 32,
    /* From drivers to block/ only: */
    STATUS_RAW = 64,      /* ask FILE at MAP instead */
    STATUS_RECURSE = 128, /* with DATA and OFFSET_VALID: FILE at MAP may know of zeroes */
};
struct block_status {
    unsigned flags;
    uint64_t length;   /* > 0: so many bytes from the start have these flags */
    uint64_t map;      /* offset in FILE if STATUS_OFFSET_VALID */
    struct node *file; /* lent */
    unsigned depth;    /* layer that decided: 0 this one, 1 its backing; 0 also when nobody */
};
/* Of the whole chain under the edge down to but excluding BASE (NULL: to the bottom), for the
 * first run in R. WANT_ZERO false allows a quicker, coarser answer. */
int edge_status_above(struct edge *e, struct node *base, bool want_zero, struct range r,
                      struct block_status *ret) MUST_CHECK;
/* QEMU's bdrv_is_allocated_above: depth (>0) of the layer in which the first run of R is
 * allocated counted from 1, 0 when unallocated down to BASE; *length its bytes. */
int edge_allocated_above(struct edge *e, struct node *base, bool include_base, struct range r,
                         uint64_t *length) MUST_CHECK;

/* ---- who wants to know of writes (dirty/ registers here) ---- */

/* Order for each write, write-zeroes and discard that changes content, after range locks and before
 * the driver: all observers' before_write (may wait, may refuse), then, with no wait between, all
 * mark, then the driver; after completion all written. Who refused gets no `written`; those
 * whose before_write had succeeded before it get one with the error.
 * Observers come and go while no request is inside the node (quiesced): a write in flight
 * has not been announced to a newcomer. */
struct write_observer {
    int (*before_write)(struct write_observer *o, struct range r); /* may be NULL */
    void (*mark)(struct write_observer *o, struct range r);
    void (*written)(struct write_observer *o, struct range r, int result); /* may be NULL */
    /* Before the driver changes the size; may wait, may refuse; no request is under way. After it
     * come `resized` or, when the driver has failed, `resized` with from == to. May be NULL. */
    int (*resizing)(struct write_observer *o, uint64_t from, uint64_t to, struct error *err);
    /* The node's size has changed from..to; no request is under way, none has seen the new size.
     * (A write that grows a node from above calls it, too, just before its mark.) */
    void (*resized)(struct write_observer *o, uint64_t from, uint64_t to); /* may be NULL */
    /* A flush that a user or a parent asked for has succeeded; must not wait: it is not over for
     * who asked before this returns. May be NULL. */
    void (*flushed)(struct write_observer *o);
    /* Content has changed without a write (a reopen); after `mark`, no request is under way; may
     * wait. May be NULL. */
    void (*changed)(struct write_observer *o, struct range r);
    TAILQ_ENTRY(write_observer) link;
};
void node_observe(struct node *n, struct write_observer *o);
void node_unobserve(struct node *n, struct write_observer *o);
/* Whoever counts on seeing each write to N (a bitmap that records) has it watched: while N can be
 * written to, nobody but N may write or resize what it stands on, its backing image excepted.
 * -EPERM or the file's lock error if somebody does, and nothing has changed. graph_lock held;
 * waits. */
int node_set_watched(struct node *n, bool watched, struct error *err) MUST_CHECK;
bool node_watched(const struct node *n);

/* ---- what later rooms hang on nodes ---- */

/* Called for every node; registered once per graph (dirty/, persist/). opened: in the order of
 * registration; closing and gone: in the reverse (persist/ saves what dirty/ then frees). */
struct graph_hook {
    /* After the driver has opened (or reopened, with the new read_only); an error fails the open.
     */
    int (*opened)(struct graph_hook *h, struct node *n, struct error *err);
    /* Before the driver closes; requests to its children still work. Cannot fail the close. */
    void (*closing)(struct graph_hook *h, struct node *n);
    /* Before anything of a reopen is done: the node is to become writable, or (OTHER) `file` is to
     * be another one. An error refuses it; may be NULL. */
    int (*may_reopen)(struct graph_hook *h, struct node *n, bool writable, bool other,
                      struct error *err);
    /* Node goes from read-write to read-only (saves), or back (loads); may be NULL. */
    int (*reopening)(struct graph_hook *h, struct node *n, bool to_read_only, struct error *err);
    /* All nodes are closed and the graph goes: free what hangs on it, and the hook; may be NULL. */
    void (*gone)(struct graph_hook *h);
    TAILQ_ENTRY(graph_hook) link;
};
void graph_add_hook(struct graph *g, struct graph_hook *h);

/* A pointer of a later room per node, by a key that the room owns (the address of a static). */
void *node_get_data(const struct node *n, const void *key);
void node_set_data(struct node *n, const void *key, void *data);
/* The same for the graph: NULL until set. */
void *graph_get_data(const struct graph *g, const void *key);
void graph_set_data(struct graph *g, const void *key, void *data);

/* ---- reports ---- */

/* BlockDeviceInfo without dirty-bitmaps (those are dirty/'s), as query-named-block-nodes shows it
 * (which lists the newest node first; query-blockstats goes in the order of creation). */
struct json_object *node_info(struct node *n, bool flat, struct error *err);
/* BlockStats of query-blockstats for one node. */
struct json_object *node_stats(struct node *n);

/* blockdev-reopen of several nodes at once, all or nothing. OPTIONS: array of BlockdevOptions. */
int graph_reopen(struct graph *g, struct json_object *options, struct error *err) MUST_CHECK;
/* The same for one option of one node; all else stays as it is. graph_lock held. */
int node_set_read_only(struct node *n, bool read_only, struct error *err) MUST_CHECK;
/* blockdev-create's work: OPTIONS is BlockdevCreateOptions. Runs in the create job. */
int graph_create(struct graph *g, struct json_object *options, struct error *err) MUST_CHECK;
/* drive-backup's mode=absolute-paths: makes FILENAME in FORMAT, SIZE, optional backing. */
int graph_create_filename(struct graph *g, const char *filename, const char *format,
                          const char *backing_filename, const char *backing_format,
                          uint64_t size_bytes, struct error *err) MUST_CHECK;

/* Events that nodes raise (BLOCK_IMAGE_CORRUPTED, BLOCK_WRITE_THRESHOLD): NAME and DATA (lent) go
 * to the listener, set once by qmp/. */
typedef void graph_event_fn(void *opaque, const char *name, struct json_object *data);
void graph_set_event_listener(struct graph *g, graph_event_fn *fn, void *opaque);
void graph_raise(struct graph *g, const char *name, struct json_object *data);
