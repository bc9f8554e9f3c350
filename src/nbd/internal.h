/* What the files of nbd/ share: the registry, its exports, the server and its connections. */
#pragma once

#include "dirty/dirty.h"
#include "nbd/server.h"
#include "nbd/wire.h"
#include "rt/clock.h"
#include "rt/socket.h"

struct nbd_server;
struct connection;

struct export
{
    struct user user;
    struct exports *registry;
    uint64_t serial; /* never used twice in a registry */
    char *id;
    char *name;        /* as clients ask for it */
    char *description; /* NULL: none */
    struct edge *edge;
    uint64_t size_bytes; /* a whole number of sectors, as QEMU's */
    unsigned flags;      /* NBD_FLAG_*, less what depends on the client */
    bool writable, writethrough, allocation_depth;
    struct dirty_bitmap **bitmaps; /* busy while the export lives */
    struct edge **bitmap_edges;    /* hold the nodes they are on; NULL: the export's own */
    size_t bitmap_count;

    unsigned refs;
    bool user_owned;           /* false: shutting down, no new clients */
    uint64_t error_told_ns[2]; /* when BLOCK_IO_ERROR was last raised: of a read, of a write */
    TAILQ_HEAD(, connection) connections;
    TAILQ_ENTRY(export) link;
};

struct exports {
    struct graph *graph;
    TAILQ_HEAD(, export) list; /* newest first */
    uint64_t next_serial;
    struct nbd_server *server; /* NULL: not running */
    struct scope closers;      /* what lets nodes go after the last reference */
    struct waitq changed;      /* an export has gone */
    struct event accepting;    /* clients are served */
};

struct export *export_find_name(struct exports *x, struct nbd_string name);
/* A client's request failed: raises BLOCK_IO_ERROR, but for each direction at most once in
 * IO_ERROR_EVERY_NS, so that a broken disk does not drown who listens. */
enum { IO_ERROR_EVERY_NS = 1000 * 1000 * 1000 };
void export_io_error(struct export *e, bool is_read, int code);
void export_ref(struct export *e);
void export_unref(struct export *e);
/* Drops the user's reference and disconnects the clients; nothing when it has happened. */
void export_shut_down(struct export *e);

struct nbd_server {
    struct exports *exports;
    struct listener listener;
    uint32_t max_connections, handshake_max_seconds;
    uint32_t connections;
    struct waitq slot_free;
    struct scope acceptors;
    struct scope clients;
};

enum { INBOX_SIZE = 64 << 10 };

/* The contexts a client chose, of the export with that serial. */
struct meta_contexts {
    uint64_t export_serial;
    bool base_allocation, allocation_depth;
    bool *bitmaps; /* one for each of the export's */
    size_t count;
};
enum { CONTEXT_BASE_ALLOCATION = 0, CONTEXT_ALLOCATION_DEPTH = 1, CONTEXT_FIRST_BITMAP = 2 };

struct reply;
struct connection {
    struct nbd_server *server;
    int fd;
    struct export *export; /* referenced; NULL until chosen */
    bool fixed_newstyle, no_zeroes, structured;
    struct meta_contexts meta;
    TAILQ_ENTRY(connection) in_export;
    uint64_t losses; /* graph_losses() that this client has been told of (do_flush) */

    uint8_t *inbox; /* INBOX_SIZE bytes: what has come and is not used yet */
    size_t inbox_at, inbox_end;

    struct semaphore requests; /* how many may be under way */
    struct semaphore bytes;    /* and how much they may hold */
    STAILQ_HEAD(, reply) outbox;
    bool sending, broken;
};

/* Exactly N bytes from the client, or -errno (-ECONNRESET: it left). */
int connection_read(struct connection *c, void *buf, size_t n);
int connection_skip(struct connection *c, uint64_t n);

/* 0: a client that has chosen an export (in c->export); 1: it said goodbye; -errno. */
int handshake(struct connection *c, struct error *err);
/* Serves requests until the client leaves. */
int transmission(struct connection *c, struct error *err);
