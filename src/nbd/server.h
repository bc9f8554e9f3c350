/* The NBD server: a listening socket, its clients, its limits. One a registry of exports. */
#pragma once

#include "nbd/export.h"

enum {
    NBD_DEFAULT_MAX_CONNECTIONS = 100, /* QEMU's, since CVE-2024-7409 */
    NBD_HANDSHAKE_MAX_SECONDS = 10,    /* QEMU's: who takes longer is disconnected */
};

struct nbd_server_options {
    struct json_object *addr;       /* SocketAddress, flat; lent */
    uint32_t max_connections;       /* 0: no limit */
    uint32_t handshake_max_seconds; /* 0: no limit */
};

int nbd_server_start(struct exports *x, const struct nbd_server_options *options,
                     struct error *err);
/* Removes all NBD exports, disconnects all clients, waits. */
int nbd_server_stop(struct exports *x, struct error *err);
bool nbd_server_running(struct exports *x);
