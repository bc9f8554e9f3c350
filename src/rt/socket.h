/* Stream sockets by QAPI SocketAddress: {"type": "unix", "path": P, "abstract": B, "tight": B},
 * {"type": "inet", "host": H, "port": "P", "to": N, "ipv4": B, "ipv6": B, "keep-alive": B} and
 * {"type": "fd", "str": "N"}. The error texts are QEMU's. */
#pragma once

#include "base/error.h"
#include "base/json.h"
#include "rt/io.h"

enum { SOCKET_MAX_LISTEN = 8 };

/* What one address listens on: a host name may stand for several. Accept with io_accept on
 * each of fds. */
struct listener {
    int fds[SOCKET_MAX_LISTEN];
    size_t count;
    char *unlink_path; /* a Unix socket's file, removed by listener_close; NULL: none */
};

int listener_open(struct listener *l, struct json_object *addr, int backlog, struct error *err);
/* Ends waiting accepts and removes the socket's file. */
void listener_close(struct listener *l);
/* A connection to ADDR; its fd. Name resolution happens on a worker thread. */
int socket_connect(struct json_object *addr, struct error *err);

/* {"data": {...}, "type": T} of the QMP commands (SocketAddressLegacy) as the flat form above; a
 * new reference. */
struct json_object *socket_address_flatten(struct json_object *legacy);

/* Sends at once what is sent (TCP_NODELAY); nothing on other sockets. */
void socket_set_nodelay(int fd);
