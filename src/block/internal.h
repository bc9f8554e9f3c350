/* What the files of this room share and no other room sees. */
#pragma once

#include "block/driver.h"

#include <sys/queue.h>

enum {
    BLOCK_SECTOR = 512,     /* sizes are rounded up to it, as clients expect */
    OPEN_DEPTH_MAX = 200,   /* nodes below each other that one command may open */
    GRAPH_DEPTH_MAX = 250,  /* nodes below each other: a request's stack is as deep */
    PROBE_BYTES = 512,      /* of an image's start, to guess its format */
    BOUNCE_BYTES = 1 << 20, /* the largest temporary buffer of one request */
};
/* As QEMU's, so that any alignment up to 1 GiB can be added without a wrap. */
#define SIZE_BYTES_MAX ((uint64_t)INT64_MAX & ~(GiB - 1))

struct graph {
    TAILQ_HEAD(, node) nodes; /* named ones, in the order of creation */
    const struct driver **drivers;
    size_t n_drivers;
    TAILQ_HEAD(hook_list, graph_hook) hooks;
    struct node_data *data; /* graph_get_data */
    struct mutex lock;
    unsigned lock_depth;        /* of its owner */
    LIST_HEAD(, quiet) quieted; /* graph_quiesce_begin, and not ended yet */
    uint64_t names_made;        /* for "#block..." */
    uint64_t losses;            /* so many times a node has lost something: graph_losses */
    unsigned open_depth;
    struct opening *opening; /* the images whose backing images are being opened */
    unsigned visit;          /* number of the last walk, see node.visited */
    graph_event_fn *listener;
    void *listener_opaque;
};

struct node_data {
    struct node_data *next;
    const void *key;
    void *data;
};

/* What a reopen will make of a node; the permission check looks here first. */
struct node_reopen {
    bool read_only, auto_read_only, cache_direct;
};

/* ---- graph.c ---- */
struct node *node_new(struct graph *g);
/* Gives it its name and puts it into the graph's list. NAME NULL: a made one. */
int node_assign_name(struct node *n, const char *name, struct error *err);
/* A node whose driver is not open. */
void node_discard(struct node *n);
/* Nodes on the longest way down, itself included. */
unsigned node_height(struct node *n);
unsigned graph_height(struct graph *g);
bool node_reaches(struct node *from, const struct node *to);

/* ---- perm.c ---- */
void node_cumulative_perm(const struct node *n, unsigned *perm, unsigned *shared);
char *perm_names(unsigned perm);              /* "consistent read, write"; the caller frees */
char *perm_parent_name(const struct edge *e); /* "node 'x'", or as its user says; likewise */
/* Recomputes what the subtrees of these nodes need, and asks the drivers. All or nothing. */
int perm_refresh(struct graph *g, struct node *const *roots, size_t n, struct error *err);

/* In two steps, for what must be decided together with something else: prepare (and
 * nothing has changed when it fails), then commit or abort. */
struct perm_change {
    struct node **nodes; /* parents before children */
    size_t n_nodes, n_checked;
    struct perm_undo {
        struct edge *edge;
        unsigned perm, shared;
    } * undo;
    size_t n_undo, undo_capacity;
};
int perm_prepare(struct graph *g, struct node *const *roots, size_t n, struct perm_change *change,
                 struct error *err);
void perm_commit(struct perm_change *change);
void perm_abort(struct perm_change *change);

/* ---- edge.c ---- */
struct edge *edge_new(struct node *parent, struct user *user, struct node *child, const char *name,
                      unsigned role);            /* takes a reference to CHILD; asks nobody */
void edge_unlink(struct edge *e);                /* and frees; keeps the reference to the node */
void edge_move(struct edge *e, struct node *to); /* references are the caller's */

void edge_hide(struct edge *e);
void edge_show(struct edge *e);
void edge_block_backing(struct node *parent, struct node *backing);
void edge_unblock_backing(struct node *parent, struct node *backing);

/* ---- open.c ---- */
/* The node that OPTIONS describes or names, as child of PARENT (NULL: nobody's). */
int open_inherit(struct graph *g, const char *filename, struct json_object *options,
                 struct node *parent, const char *key, unsigned role, struct node **ret,
                 struct error *err);
struct generic_options {
    bool direct, no_flush, read_only, auto_read_only, force_share, discard_unmap;
    int detect_zeroes;
};
/* The protocol that FILENAME is of: a device's, PREFIX_ALLOWED "PROTOCOL:REST", or `file`. */
int find_protocol(struct graph *g, const char *filename, bool prefix_allowed,
                  const struct driver **ret, struct error *err);
/* FILENAME without the prefix of D, which takes paths. */
const char *path_of(const struct driver *d, const char *filename);
/* What the generic members of OPTIONS say, after inheritance from PARENT by ROLE. */
int generic_options_parse(struct json_object *options, const struct node *parent, unsigned role,
                          struct generic_options *ret, struct error *err);

/* ---- edge.c ---- */
/* The filter of a backup, on N itself or on what has it for its file: it has the disk as it was,
 * which cannot have another size or become another. NULL: none. */
const struct node *filter_that_keeps(const struct node *n);

/* ---- filename.c ---- */
bool path_has_protocol(const char *path);
char *path_combine(const char *base, const char *name); /* NAME beside the file BASE */
/* FILENAME as seen from the directory of N's image; the caller frees. NULL and an error. */
char *node_absolute_filename(struct node *n, const char *filename, struct error *err);
/* "json:{...}" to nested options. */
int json_filename_parse(const char *filename, struct json_object **ret, struct error *err);
/* Dotted members become nested objects, in place. */
void json_unflatten(struct json_object *obj);
/* Lists and objects become dotted members, as QEMU keeps options: "inject-error.0.event". */
void json_add_flat(struct json_object *to, const char *key, struct json_object *value);
struct json_object *node_full_options(struct node *n);
/* As QEMU writes it: ", " and ": ", members in the order of its hash table. */
char *json_as_qemu(struct json_object *obj);
unsigned json_qemu_order(const char *key);

/* ---- request.c ---- */
void node_resized(struct node *n, uint64_t from);          /* tells observers, users and parents */
void node_content_changed(struct node *n, struct range r); /* without a write: tells observers */
void node_content_replaced(struct node *n); /* all of it, and so that of whoever stands on it */

/* ---- status.c ---- */
int node_status(struct node *n, bool want_zero, struct range r, struct block_status *ret);
