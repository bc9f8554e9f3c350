/* Listening, and how many may come in.
 *
 *     acceptor (one a descriptor): wait for a client -> wait for a slot -> accept -> serve
 *     serve: handshake, watched by a clock -> transmission -> slot given back
 *
 * A client that is slow to shake hands, that lies or that leaves costs its own connection and
 * nothing else. */
#include "nbd/internal.h"

#include "base/log.h"

#include <poll.h>

/* ---- the bytes of one client ---- */

static int fill_inbox(struct connection *c)
{
    ssize_t n = io_recv(c->fd, c->inbox, INBOX_SIZE);
    if (n <= 0)
        return n < 0 ? (int)n : -ECONNRESET;
    c->inbox_at = 0;
    c->inbox_end = (size_t)n;
    return 0;
}

int connection_read(struct connection *c, void *buf, size_t n)
{
    uint8_t *to = buf;

    for (;;) {
        size_t have = min_u64(n, c->inbox_end - c->inbox_at);
        memcpy(to, c->inbox + c->inbox_at, have);
        c->inbox_at += have;
        to += have;
        n -= have;
        if (!n)
            return 0;
        /* What is big goes straight to where it is wanted. */
        if (n >= INBOX_SIZE / 4)
            return io_recv_full(c->fd, to, n);
        int r = fill_inbox(c);
        if (r < 0)
            return r;
    }
}

int connection_skip(struct connection *c, uint64_t n)
{
    uint8_t scrap[4096];

    while (n) {
        size_t part = min_u64(n, sizeof scrap);
        int r = connection_read(c, scrap, part);
        if (r < 0)
            return r;
        n -= part;
    }
    return 0;
}

/* ---- one client, from hello to goodbye ---- */

static int end_when_late(void *arg)
{
    struct connection *c = arg;

    uint64_t limit_ns = c->server->handshake_max_seconds * NSEC_PER_SEC;
    if (sleep_until(clock_after_ns(limit_ns)) == 0) {
        log_info("nbd: client is disconnected, its handshake took longer than %u seconds",
                 c->server->handshake_max_seconds);
        io_shutdown(c->fd);
    }
    return 0;
}

static int shake_hands(struct connection *c, struct error *err)
{
    SCOPE(watch);

    if (c->server->handshake_max_seconds)
        scope_spawn(&watch, end_when_late, c);
    return handshake(c, err);
}

static int serve(void *arg)
{
    struct connection *c = arg;
    struct nbd_server *server = c->server;
    struct error err = ERROR_INIT;

    int r = shake_hands(c, &err);
    if (r == 0)
        r = transmission(c, &err);
    if (r < 0 && err.code)
        log_info("nbd: client is disconnected: %s", err.text);

    if (c->export) {
        TAILQ_REMOVE(&c->export->connections, c, in_export);
        export_unref(c->export);
    }
    io_close(c->fd);
    free(c->meta.bitmaps);
    free(c->inbox);
    free(c);
    server->connections--;
    waitq_wake_all(&server->slot_free);
    return 0;
}

static void take_in(struct nbd_server *s, int fd)
{
    struct connection *c = xnew(struct connection);

    c->server = s;
    c->fd = fd;
    c->inbox = malloc(INBOX_SIZE);
    if (!c->inbox) {
        free(c);
        io_close(fd);
        return;
    }
    STAILQ_INIT(&c->outbox);
    socket_set_nodelay(fd);
    s->connections++;
    scope_spawn(&s->clients, serve, c);
}

/* ---- listening ---- */

struct acceptor {
    struct nbd_server *server;
    int fd;
};

static int accept_clients(void *arg)
{
    CLEANUP(memory_freep) struct acceptor *a = arg;
    struct nbd_server *s = a->server;

    for (;;) {
        int r = event_wait(&s->exports->accepting);
        if (r >= 0)
            r = io_poll(a->fd, POLLIN, NEVER_NS);
        while (r >= 0 && s->max_connections && s->connections >= s->max_connections)
            r = waitq_wait(&s->slot_free);
        if (r < 0)
            return 0;
        int fd = io_accept(a->fd);
        if (fd == -ECANCELED)
            return 0;
        if (fd >= 0) {
            take_in(s, fd);
        } else if (fd != -ECONNABORTED && fd != -EAGAIN) {
            /* Out of descriptors or memory: others go on, and we try again in a while. */
            log_warning("nbd: accepting a client: %s", strerror(-fd));
            if (sleep_until(clock_after_ns(NSEC_PER_SEC / 10)) < 0)
                return 0;
        }
    }
}

int nbd_server_start(struct exports *x, const struct nbd_server_options *options, struct error *err)
{
    if (x->server)
        return error_set(err, EEXIST, "NBD server already running");

    CLEANUP(memory_freep) struct nbd_server *s = xnew(struct nbd_server);
    int r = listener_open(&s->listener, options->addr, SOMAXCONN, err);
    if (r < 0)
        return r;
    s->exports = x;
    s->max_connections = options->max_connections;
    s->handshake_max_seconds = options->handshake_max_seconds;
    waitq_init(&s->slot_free);
    scope_init(&s->acceptors);
    scope_init(&s->clients);
    for (size_t i = 0; i < s->listener.count; i++) {
        struct acceptor *a = xnew(struct acceptor);
        *a = (struct acceptor){s, s->listener.fds[i]};
        scope_spawn(&s->acceptors, accept_clients, a);
    }
    x->server = steal(s);
    return 0;
}

int nbd_server_stop(struct exports *x, struct error *err)
{
    struct nbd_server *s = x->server;

    if (!s)
        return error_set(err, EINVAL, "NBD server not running");
    SHIELD();
    exports_close_all(x);
    scope_fini(&s->acceptors);
    listener_close(&s->listener);
    scope_fini(&s->clients);
    x->server = NULL;
    free(s);
    return 0;
}

bool nbd_server_running(struct exports *x)
{
    return x->server != NULL;
}
