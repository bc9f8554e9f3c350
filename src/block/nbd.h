/* The other side of an NBD node: a server at the end of a connection that can break. For the files
 * of this driver, and for persist/, which needs a name for the disk.
 *
 *     nbd.c             the driver: requests, limits, what the server says of holes
 *     nbd_connect.c     one connection, from the greeting to the last byte
 *     nbd_remote.c      the server over its connections: lost, tried again, given up
 *     nbd_filename.c    nbd://..., nbd:..., and the disk's name */
#pragma once

#include "block/internal.h"

struct nbd_handle;

enum {
    NBD_NAME_MAX = 4096, /* of exports and of contexts */
    NBD_BLOCK_MAX = 65536,
    NBD_PORT = 10809,
};
#define NBD_PAYLOAD_MAX (32 * MiB)

/* What to connect to, from the node's options. */
struct nbd_target {
    struct json_object *server; /* SocketAddress, flat */
    char *export;
    char *context; /* asked for instead of base:allocation; NULL: not */
    uint64_t reconnect_ns, open_ns;
};

/* What the server has said of the export. */
struct nbd_offer {
    uint64_t size_bytes;
    uint32_t min_block, max_block; /* as the node takes them; min_block a power of 2 */
    bool read_only, flush, fua, trim, zero, fast_zero, cache, context;
};

struct nbd_command {
    enum nbd_what {
        NBD_DO_READ,
        NBD_DO_WRITE,
        NBD_DO_ZERO,
        NBD_DO_TRIM,
        NBD_DO_CACHE,
        NBD_DO_FLUSH,
        NBD_DO_STATUS,
    } what;
    struct range range;
    void *buf;         /* read, write */
    uint32_t flags;    /* LIBNBD_CMD_FLAG_* */
    uint64_t length;   /* read: so much has come; status: of the first extent, 0: none was told */
    uint64_t *written; /* counts those that succeed; NULL: none */
    uint32_t state;    /* LIBNBD_STATE_*, or what the context calls so */

    /* the connection's */
    struct event ended;
    int error; /* errno as the server has it; ENOTCONN: the connection was lost */
    bool done;
    uint64_t since_ns;
    TAILQ_ENTRY(nbd_command) link;
};

/* ---- nbd_connect.c ---- */

struct nbd_connection;

/* Connects and shakes hands, once. Cancellable. */
int nbd_connection_open(const struct nbd_target *to, struct nbd_connection **ret,
                        struct error *err) MUST_CHECK;
const struct nbd_offer *nbd_connection_offer(const struct nbd_connection *c);
/* Moves bytes until the connection is lost, or the task is cancelled. */
void nbd_connection_run(struct nbd_connection *c);
/* What is in flight ends with ENOTCONN; no buffer is touched after it. */
void nbd_connection_close(struct nbd_connection *c, bool goodbye);
/* Sends CMD and waits until it has ended; its buffer is ours until then. Shielded. Whoever does not
 * want to wait longer than PATIENCE_NS cuts the connection (UINT64_MAX: he waits). */
void nbd_connection_do(struct nbd_connection *c, struct nbd_command *cmd, uint64_t patience_ns);
void nbd_connection_cut(struct nbd_connection *c); /* it is then lost, soon */
/* The moment at which the oldest command in flight was sent; NEVER_NS: none is. */
uint64_t nbd_connection_oldest_ns(const struct nbd_connection *c);

/* ---- nbd_remote.c ---- */

struct nbd_remote {
    struct node *node;
    struct nbd_target target;
    struct nbd_offer offer;     /* of the first connection: what the node has promised */
    struct nbd_connection *now; /* NULL: lost */
    uint64_t wait_until_ns;     /* lost: requests wait until then for another one */
    struct event changed;       /* pulsed: any of these has */
    struct scope tasks;
    uint64_t lost; /* connections so far */
    bool told;     /* that it is lost, in the log */
    uint64_t written,
        flushed; /* counts of writes that were answered; those after `flushed` are not durable */
    bool doubt;  /* some of those were on a connection that was lost */
};

/* Takes TARGET over, also on error. Waits for the server, for target.open_ns if it is not there. */
int nbd_remote_open(struct nbd_remote *re, struct node *n, struct nbd_target *target,
                    struct error *err) MUST_CHECK;
/* From here on somebody attends to the connection: the node can have requests. */
void nbd_remote_start(struct nbd_remote *re);
void nbd_remote_close(struct nbd_remote *re);
int nbd_remote_do(struct nbd_remote *re, struct nbd_command *cmd) MUST_CHECK;
int nbd_remote_flush(struct nbd_remote *re) MUST_CHECK;
void nbd_remote_cancel(struct nbd_remote *re); /* node->cancelled has risen */

/* ---- nbd_filename.c ---- */

int nbd_parse_filename(const char *filename, struct json_object *options, struct error *err);
/* server, and what older releases called so, from OPTIONS. */
int nbd_read_target(struct json_object *options, struct nbd_target *ret, struct error *err);
void nbd_target_fini(struct nbd_target *t);
/* "nbd://HOST:PORT/EXPORT", as QEMU spells it; "" when it cannot be said so. */
char *nbd_target_filename(const struct nbd_target *t);
/* The same disk has the same, whoever asks from which directory; caller frees. */
char *nbd_disk_name(const struct node *n);
