/* Listening and connecting by QAPI SocketAddress.
 *
 * Making sockets never waits and is done here at once; resolving a name may, and goes to a
 * worker thread. */
#include "rt/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/un.h>

struct json_object *socket_address_flatten(struct json_object *legacy)
{
    struct json_object *data = json_get(legacy, "data");
    struct json_object *flat = data ? json_copy(data) : json_object_new_object();

    json_add_string(flat, "type", json_get_string(legacy, "type", ""));
    return flat;
}

void socket_set_nodelay(int fd)
{
    int on = 1;
    (void)io_setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* ---- Unix ---- */

static int unix_address(struct json_object *addr, struct sockaddr_un *un, socklen_t *length,
                        struct error *err)
{
    const char *path = json_get_string(addr, "path", "");
    bool abstract = json_get_bool(addr, "abstract", false);
    size_t n = strlen(path);

    if (n > sizeof un->sun_path - abstract)
        return error_set(err, ENAMETOOLONG, "UNIX socket path '%s' is too long", path);
    *un = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(un->sun_path + abstract, path, n);
    *length = sizeof *un;
    if (abstract && json_get_bool(addr, "tight", true))
        *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + n);
    return 0;
}

static int listen_unix(struct listener *l, struct json_object *addr, int backlog, struct error *err)
{
    const char *path = json_get_string(addr, "path", "");
    bool abstract = json_get_bool(addr, "abstract", false);
    struct sockaddr_un un;
    socklen_t length;

    int r = unix_address(addr, &un, &length, err);
    if (r < 0)
        return r;
    int fd = io_socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0)
        return error_set_errno(err, -fd, "Failed to create Unix socket");
    const char *failed = "Failed to unlink socket %s";
    r = abstract ? 0 : io_unlink_socket(path);
    if (r == 0 || r == -ENOENT) {
        failed = "Failed to bind socket to %s";
        r = io_bind(fd, (struct sockaddr *)&un, length);
    }
    if (r < 0) {
        error_set_errno(err, -r, failed, path);
    } else {
        r = io_listen(fd, backlog);
        if (r < 0)
            error_set_errno(err, -r, "Failed to listen on socket");
    }
    if (r < 0) {
        io_close(fd);
        return r;
    }
    l->fds[l->count++] = fd;
    l->unlink_path = abstract ? NULL : xstrdup(path);
    return 0;
}

/* ---- inet ---- */

struct resolve {
    const char *host, *port;
    struct addrinfo hints, *found;
    int status; /* of getaddrinfo */
};

static int resolve_on_worker(void *arg)
{
    struct resolve *q = arg;
    q->status =
        getaddrinfo(*q->host ? q->host : NULL, *q->port ? q->port : NULL, &q->hints, &q->found);
    return 0;
}

static int resolve(struct json_object *addr, int flags, struct addrinfo **found, struct error *err)
{
    bool v4 = json_get_bool(addr, "ipv4", false), v6 = json_get_bool(addr, "ipv6", false);
    struct resolve q = {
        .host = json_get_string(addr, "host", ""),
        .port = json_get_string(addr, "port", ""),
        .hints = {.ai_flags = flags, .ai_socktype = SOCK_STREAM, .ai_family = AF_UNSPEC},
    };

    if (json_get_bool(addr, "numeric", false))
        q.hints.ai_flags |= AI_NUMERICHOST | AI_NUMERICSERV;
    if (json_has(addr, "ipv4") && json_has(addr, "ipv6") && !v4 && !v6)
        return error_set(err, EINVAL, "Cannot disable IPv4 and IPv6 at same time");
    if ((v4 && !v6) || (json_has(addr, "ipv6") && !v6))
        q.hints.ai_family = AF_INET;
    else if ((v6 && !v4) || (json_has(addr, "ipv4") && !v4))
        q.hints.ai_family = AF_INET6;
    (void)worker_run(resolve_on_worker, &q);
    if (q.status)
        return error_set(err, EINVAL, "address resolution failed for %s:%s: %s", q.host, q.port,
                         gai_strerror(q.status));
    *found = q.found;
    return 0;
}

static void set_port(struct sockaddr *sa, unsigned port)
{
    if (sa->sa_family == AF_INET)
        ((struct sockaddr_in *)sa)->sin_port = htons((uint16_t)port);
    else if (sa->sa_family == AF_INET6)
        ((struct sockaddr_in6 *)sa)->sin6_port = htons((uint16_t)port);
}

static unsigned get_port(const struct sockaddr *sa)
{
    if (sa->sa_family == AF_INET)
        return ntohs(((const struct sockaddr_in *)sa)->sin_port);
    return ntohs(((const struct sockaddr_in6 *)sa)->sin6_port);
}

/* One descriptor on one address, on the first free port of FROM..TO. */
static int listen_inet_one(const struct addrinfo *ai, unsigned from, unsigned to, int backlog,
                           struct error *err)
{
    int last = EADDRINUSE;

    for (unsigned port = from; port <= to; port++) {
        int on = 1;
        int fd = io_socket(ai->ai_family, SOCK_STREAM, 0);
        if (fd < 0)
            return error_set_errno(err, -fd, "Failed to create a socket");
        set_port(ai->ai_addr, port);
        (void)io_setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (ai->ai_family == AF_INET6)
            (void)io_setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
        int r = io_bind(fd, ai->ai_addr, ai->ai_addrlen);
        if (r == 0)
            r = io_listen(fd, backlog);
        if (r == 0)
            return fd;
        last = -r;
        io_close(fd);
        if (last != EADDRINUSE)
            return error_set_errno(err, last, "Failed to bind socket");
    }
    return error_set_errno(err, last, "Failed to find an available port");
}

static int listen_inet(struct listener *l, struct json_object *addr, int backlog, struct error *err)
{
    struct addrinfo *found = NULL;
    struct error first = ERROR_INIT;

    if (json_get_bool(addr, "keep-alive", false))
        return error_set(err, EINVAL, "keep-alive option is not supported for passive sockets");
    int r = resolve(addr, AI_PASSIVE, &found, err);
    if (r < 0)
        return r;
    for (struct addrinfo *ai = found; ai && l->count < SOCKET_MAX_LISTEN; ai = ai->ai_next) {
        unsigned from = get_port(ai->ai_addr);
        int fd =
            listen_inet_one(ai, from, (unsigned)json_get_uint(addr, "to", from), backlog, &first);
        if (fd >= 0)
            l->fds[l->count++] = fd;
    }
    freeaddrinfo(found);
    if (!l->count) {
        if (!first.code)
            error_set(&first, EADDRNOTAVAIL, "no address to listen on");
        if (err && !err->code)
            *err = first;
        return -first.code;
    }
    return 0;
}

/* ---- a descriptor that somebody gave us ---- */

static int given_fd(struct json_object *addr, struct error *err)
{
    const char *word = json_get_string(addr, "str", "");
    char *end;
    int type;
    socklen_t n = sizeof type;

    errno = 0;
    long fd = strtol(word, &end, 10);
    if (errno || end == word || *end || fd < 0 || fd > INT32_MAX)
        return error_set(err, EINVAL, "Unable to parse FD number %s", word);
    if (io_getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &n) < 0)
        return error_set(err, EINVAL, "File descriptor '%s' is not a socket", word);
    return (int)fd;
}

static int listen_fd(struct listener *l, struct json_object *addr, int backlog, struct error *err)
{
    int fd = given_fd(addr, err);
    if (fd < 0)
        return fd;
    int r = io_listen(fd, backlog);
    if (r < 0)
        return error_set_errno(err, -r, "Failed to listen on fd socket");
    l->fds[l->count++] = fd;
    return 0;
}

/* ---- listeners ---- */

int listener_open(struct listener *l, struct json_object *addr, int backlog, struct error *err)
{
    const char *type = json_get_string(addr, "type", "");

    *l = (struct listener){0};
    if (!strcmp(type, "unix"))
        return listen_unix(l, addr, backlog, err);
    if (!strcmp(type, "inet"))
        return listen_inet(l, addr, backlog, err);
    if (!strcmp(type, "fd"))
        return listen_fd(l, addr, backlog, err);
    return error_set(err, ENOTSUP, "socket address type '%s' is not supported", type);
}

void listener_close(struct listener *l)
{
    for (size_t i = 0; i < l->count; i++) {
        io_shutdown(l->fds[i]);
        io_close(l->fds[i]);
    }
    if (l->unlink_path)
        (void)io_unlink_socket(l->unlink_path);
    free(l->unlink_path);
    *l = (struct listener){0};
}

/* ---- connecting ---- */

int socket_connect(struct json_object *addr, struct error *err)
{
    const char *type = json_get_string(addr, "type", "");

    if (!strcmp(type, "fd"))
        return given_fd(addr, err);
    if (!strcmp(type, "unix")) {
        struct sockaddr_un un;
        socklen_t length;
        int r = unix_address(addr, &un, &length, err);
        if (r < 0)
            return r;
        int fd = io_socket(AF_UNIX, SOCK_STREAM, 0);
        if (fd < 0)
            return error_set_errno(err, -fd, "Failed to create socket");
        r = io_connect(fd, (struct sockaddr *)&un, length);
        if (r < 0) {
            io_close(fd);
            return error_set_errno(err, -r, "Failed to connect to '%s'",
                                   json_get_string(addr, "path", ""));
        }
        return fd;
    }
    if (strcmp(type, "inet"))
        return error_set(err, ENOTSUP, "socket address type '%s' is not supported", type);

    struct addrinfo *found = NULL;
    int r = resolve(addr, 0, &found, err);
    if (r < 0)
        return r;
    int fd = -1, last = EADDRNOTAVAIL;
    for (struct addrinfo *ai = found; ai && fd < 0; ai = ai->ai_next) {
        int s = io_socket(ai->ai_family, SOCK_STREAM, 0);
        r = s < 0 ? s : io_connect(s, ai->ai_addr, ai->ai_addrlen);
        if (r < 0) {
            last = -r;
            io_close(s);
        } else {
            fd = s;
        }
    }
    freeaddrinfo(found);
    if (fd < 0)
        return error_set_errno(err, last, "Failed to connect to '%s:%s'",
                               json_get_string(addr, "host", ""),
                               json_get_string(addr, "port", ""));
    socket_set_nodelay(fd);
    if (json_get_bool(addr, "keep-alive", false)) {
        int on = 1;
        (void)io_setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    }
    return fd;
}
