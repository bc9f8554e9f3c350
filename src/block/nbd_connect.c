/* One connection to an NBD server: greeting, negotiation, then commands, many at once.
 *
 * The protocol is libnbd's. It sends and receives by itself when we tell it that the socket, which
 * is not blocking, is ready; so all it asks of us is in nbd_aio_get_direction(), and two tasks (one
 * per direction, for a command that could not be sent at once must not wait for an answer to come)
 * wait for that on our loop. libnbd is called on the loop's thread alone and calls back from inside
 * of its functions, where it holds its lock: there we only note what has ended and wake who waits.
 *
 *     nbd_connection_do --> nbd_aio_pread() ... sends what the socket takes
 *                             |
 *     run: reader, writer --> nbd_aio_notify_*() --> command_ended --> nbd_connection_do returns
 *
 * What a server sends is checked by libnbd, as far as it is the protocol's: lengths, cookies,
 * chunks outside of what was asked for. It does not see that a part of a read was not brought at
 * all; nor whether what the server says of the export makes sense: that is checked here. (Block
 * sizes that are none libnbd takes for not said.) */
#include "block/nbd.h"

#include "rt/clock.h"
#include "rt/io.h"
#include "rt/socket.h"

#include <libnbd.h>
#include <poll.h>
#include <stdio.h>

#define GOODBYE_NS (NSEC_PER_SEC / 2)

struct nbd_connection {
    struct nbd_handle *nbd;
    int fd; /* libnbd's */
    const char *context;
    struct nbd_offer offer;
    struct event may_read, may_write, over;
    bool answered; /* to the option that was sent last */
    int option_error;
    TAILQ_HEAD(, nbd_command) in_flight;
};

/* ---- moving on ---- */

static bool is_over(const struct nbd_connection *c)
{
    return nbd_aio_is_dead(c->nbd) || nbd_aio_is_closed(c->nbd);
}

static void set_to(struct event *e, bool on)
{
    if (on && !e->set)
        event_set(e);
    else if (!on)
        event_reset(e);
}

/* After whatever may have moved libnbd on. */
static void look(struct nbd_connection *c)
{
    unsigned direction = nbd_aio_get_direction(c->nbd);

    set_to(&c->may_read, direction & LIBNBD_AIO_DIRECTION_READ);
    set_to(&c->may_write, direction & LIBNBD_AIO_DIRECTION_WRITE);
    if (is_over(c))
        event_set(&c->over);
}

static int reader(void *arg)
{
    struct nbd_connection *c = arg;

    task_set_name("nbd reader");
    while (!c->over.set) {
        if (event_wait(&c->may_read) < 0 || io_poll(c->fd, POLLIN, NEVER_NS) < 0)
            return 0;
        if (nbd_aio_get_direction(c->nbd) & LIBNBD_AIO_DIRECTION_READ)
            (void)nbd_aio_notify_read(c->nbd);
        look(c);
        if (task_yield() < 0) /* a server that never stops to send is not alone here */
            return 0;
    }
    return 0;
}

static int writer(void *arg)
{
    struct nbd_connection *c = arg;

    task_set_name("nbd writer");
    while (!c->over.set) {
        if (event_wait(&c->may_write) < 0 || io_poll(c->fd, POLLOUT, NEVER_NS) < 0)
            return 0;
        if (nbd_aio_get_direction(c->nbd) & LIBNBD_AIO_DIRECTION_WRITE)
            (void)nbd_aio_notify_write(c->nbd);
        look(c);
        if (task_yield() < 0)
            return 0;
    }
    return 0;
}

void nbd_connection_run(struct nbd_connection *c)
{
    SCOPE(pumps);

    look(c);
    scope_spawn(&pumps, reader, c);
    scope_spawn(&pumps, writer, c);
    (void)!event_wait(&c->over);
}

/* The same for one task, until DONE says so. */
static int pump(struct nbd_connection *c, bool (*done)(const struct nbd_connection *c),
                uint64_t deadline_ns)
{
    while (!done(c)) {
        unsigned direction = nbd_aio_get_direction(c->nbd);
        int events = (direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                     (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
        if (is_over(c) || !events)
            return -ECONNRESET;
        int r = io_poll(c->fd, events, deadline_ns);
        if (r < 0)
            return r;
        direction = nbd_aio_get_direction(c->nbd);
        if ((r & ~POLLOUT) && (direction & LIBNBD_AIO_DIRECTION_READ))
            (void)nbd_aio_notify_read(c->nbd);
        else if ((r & ~POLLIN) && (direction & LIBNBD_AIO_DIRECTION_WRITE))
            (void)nbd_aio_notify_write(c->nbd);
    }
    return 0;
}

/* ---- shaking hands ---- */

static bool is_greeted(const struct nbd_connection *c)
{
    return nbd_aio_is_negotiating(c->nbd) || nbd_aio_is_ready(c->nbd);
}

static bool is_answered(const struct nbd_connection *c)
{
    return c->answered;
}

static int option_answered(void *opaque, int *error)
{
    struct nbd_connection *c = opaque;

    c->answered = true;
    c->option_error = *error;
    return 1;
}

/* libnbd's text without the name of its function in front. */
static const char *libnbd_text(void)
{
    const char *text = nbd_get_error(), *colon;

    if (!text)
        return "no reason given";
    colon = strstr(text, ": ");
    return colon && !strncmp(text, "nbd_", 4) ? colon + 2 : text;
}

static int failed(int r, struct error *err)
{
    if (r == -ECANCELED || r == -ENOMEM)
        return error_set_errno(err, -r, "Failed to connect to the NBD server");
    return error_set(err, ECONNRESET, "Failed to negotiate with the NBD server: %s", libnbd_text());
}

static int option_failed(const struct nbd_connection *c, struct error *err)
{
    switch (c->option_error) {
    case ENOENT:
        return error_set(err, ENOENT, "Requested export not available");
    case EPERM:
        return error_set(err, EPERM, "Denied by server for option 7 (go)");
    }
    return error_set(err, c->option_error, "The NBD server refuses the export: %s", libnbd_text());
}

static int choose_export(struct nbd_connection *c, const struct nbd_target *to, struct error *err)
{
    const char *protocol = nbd_get_protocol(c->nbd);

    if (nbd_aio_is_ready(c->nbd)) { /* an old server has no options */
        if (protocol && !strcmp(protocol, "oldstyle") && to->export && *to->export)
            return error_set(err, EINVAL, "Server does not support non-empty export names");
        return 0;
    }
    nbd_completion_callback answered = {.callback = option_answered, .user_data = c};
    if (nbd_aio_opt_go(c->nbd, answered) < 0)
        return failed(-EIO, err);
    int r = pump(c, is_answered, NEVER_NS);
    if (r < 0)
        return failed(r, err);
    if (c->option_error)
        return option_failed(c, err);
    return nbd_aio_is_ready(c->nbd) ? 0 : failed(-EIO, err);
}

static int read_sizes(struct nbd_connection *c, struct error *err)
{
    struct nbd_offer *o = &c->offer;
    int64_t size = nbd_get_size(c->nbd);
    int64_t min = nbd_get_block_size(c->nbd, LIBNBD_SIZE_MINIMUM);
    int64_t max = nbd_get_block_size(c->nbd, LIBNBD_SIZE_MAXIMUM);

    if (size < 0 || (uint64_t)size > SIZE_BYTES_MAX)
        return error_set(err, EFBIG, "The NBD server's export is larger than %llu bytes",
                         (unsigned long long)SIZE_BYTES_MAX);
    if (min < 0 || max < 0 || (min && (!is_power_of_2((uint64_t)min) || min > NBD_BLOCK_MAX)))
        return error_set(err, EINVAL,
                         "server minimum block size %lld is not a power of two up to %d",
                         (long long)min, NBD_BLOCK_MAX);
    if (min && size % min)
        return error_set(err, EINVAL, "export size %lld is not multiple of minimum block size %lld",
                         (long long)size, (long long)min);
    /* Servers that do not say it: those that know of holes, or have sizes that are no multiple of
     * a sector, take anything. */
    if (!min)
        min = o->context || size % BLOCK_SECTOR ? 1 : BLOCK_SECTOR;
    if (max && (max < min || max % min))
        return error_set(err, EINVAL, "server maximum block size %lld is not valid",
                         (long long)max);
    o->size_bytes = (uint64_t)size;
    o->min_block = (uint32_t)min;
    o->max_block = (uint32_t)min_u64(max ? (uint64_t)max : NBD_PAYLOAD_MAX, NBD_PAYLOAD_MAX);
    return 0;
}

static int read_offer(struct nbd_connection *c, const struct nbd_target *to, struct error *err)
{
    struct nbd_offer *o = &c->offer;

    o->context = nbd_can_meta_context(c->nbd, c->context) > 0;
    if (to->context && !o->context)
        return error_set(err, EINVAL, "requested x-dirty-bitmap %s not found", to->context);
    o->read_only = nbd_is_read_only(c->nbd) > 0;
    o->flush = nbd_can_flush(c->nbd) > 0;
    o->fua = nbd_can_fua(c->nbd) > 0;
    o->trim = nbd_can_trim(c->nbd) > 0;
    o->zero = nbd_can_zero(c->nbd) > 0;
    o->fast_zero = o->zero && nbd_can_fast_zero(c->nbd) > 0;
    o->cache = nbd_can_cache(c->nbd) > 0;
    return read_sizes(c, err);
}

static int shake_hands(struct nbd_connection *c, const struct nbd_target *to, struct error *err)
{
    c->nbd = nbd_create();
    if (!c->nbd)
        return failed(-ENOMEM, err);
    if (nbd_set_opt_mode(c->nbd, true) < 0 ||
        nbd_set_export_name(c->nbd, to->export ? to->export : "") < 0 ||
        nbd_add_meta_context(c->nbd, c->context) < 0)
        return failed(-EIO, err);
    int fd = c->fd;
    if (nbd_aio_connect_socket(c->nbd, fd) < 0) {
        c->fd = -1; /* libnbd has closed it */
        return failed(-EIO, err);
    }
    int r = pump(c, is_greeted, NEVER_NS);
    if (r < 0)
        return failed(r, err);
    r = choose_export(c, to, err);
    return r < 0 ? r : read_offer(c, to, err);
}

int nbd_connection_open(const struct nbd_target *to, struct nbd_connection **ret, struct error *err)
{
    int fd = socket_connect(to->server, err);

    if (fd < 0)
        return fd;
    struct nbd_connection *c = xnew(struct nbd_connection);
    c->fd = fd;
    c->context = to->context ? to->context : LIBNBD_CONTEXT_BASE_ALLOCATION;
    event_init(&c->may_read);
    event_init(&c->may_write);
    event_init(&c->over);
    TAILQ_INIT(&c->in_flight);
    int r = shake_hands(c, to, err);
    if (r < 0) {
        nbd_connection_close(c, false);
        return r;
    }
    *ret = c;
    return 0;
}

const struct nbd_offer *nbd_connection_offer(const struct nbd_connection *c)
{
    return &c->offer;
}

/* ---- the end ---- */

static bool is_sent(const struct nbd_connection *c)
{
    return !(nbd_aio_get_direction(c->nbd) & LIBNBD_AIO_DIRECTION_WRITE);
}

static void end_command(struct nbd_connection *c, struct nbd_command *cmd, int error)
{
    cmd->error = error;
    cmd->done = true;
    TAILQ_REMOVE(&c->in_flight, cmd, link);
    event_set(&cmd->ended);
}

void nbd_connection_close(struct nbd_connection *c, bool goodbye)
{
    SHIELD();
    struct nbd_command *cmd;

    if (c->nbd && goodbye && nbd_aio_is_ready(c->nbd) && nbd_aio_disconnect(c->nbd, 0) == 0)
        (void)pump(c, is_sent, clock_after_ns(GOODBYE_NS)); /* or he finds out himself */
    if (c->nbd)
        nbd_close(c->nbd); /* and the descriptor, if it has that */
    else
        io_close(c->fd);
    /* libnbd has forgotten their buffers. */
    while ((cmd = TAILQ_FIRST(&c->in_flight)))
        end_command(c, cmd, ENOTCONN);
    free(c);
}

void nbd_connection_cut(struct nbd_connection *c)
{
    io_shutdown(c->fd);
}

uint64_t nbd_connection_oldest_ns(const struct nbd_connection *c)
{
    const struct nbd_command *cmd = TAILQ_FIRST(&c->in_flight);

    return cmd ? cmd->since_ns : NEVER_NS;
}

/* ---- commands ---- */

struct command_of {
    struct nbd_connection *c;
    struct nbd_command *cmd;
};

static int command_ended(void *opaque, int *error)
{
    struct command_of *of = opaque;
    struct nbd_command *cmd = of->cmd;
    bool gap = cmd->what == NBD_DO_READ && cmd->length != cmd->range.length;

    if (cmd->written && !*error)
        ++*cmd->written;
    end_command(of->c, cmd, *error ? *error : gap ? EIO : 0);
    return 1;
}

/* A piece of what is read, or a hole there, which libnbd has filled with zeroes. */
static int chunk_came(void *opaque, const void *buf, size_t n, uint64_t offset, unsigned status,
                      int *error)
{
    struct command_of *of = opaque;

    (void)buf;
    (void)offset;
    (void)error;
    if (status == LIBNBD_READ_DATA || status == LIBNBD_READ_HOLE)
        of->cmd->length += n;
    return 0;
}

/* The first extent; others, of other contexts, were not asked for. */
static int extents_came(void *opaque, const char *context, uint64_t offset, uint32_t *entries,
                        size_t n, int *error)
{
    struct command_of *of = opaque;

    (void)error;
    if (of->cmd->length || strcmp(context, of->c->context) != 0 || offset != of->cmd->range.start ||
        n < 2)
        return 0;
    of->cmd->length = entries[0];
    of->cmd->state = entries[1];
    return 0;
}

static int64_t send_command(struct nbd_connection *c, struct nbd_command *cmd,
                            struct command_of *of)
{
    nbd_completion_callback ended = {.callback = command_ended, .user_data = of};
    nbd_chunk_callback chunks = {.callback = chunk_came, .user_data = of};
    nbd_extent_callback extents = {.callback = extents_came, .user_data = of};
    struct range r = cmd->range;

    switch (cmd->what) {
    case NBD_DO_READ:
        return nbd_aio_pread_structured(c->nbd, cmd->buf, r.length, r.start, chunks, ended,
                                        cmd->flags);
    case NBD_DO_WRITE:
        return nbd_aio_pwrite(c->nbd, cmd->buf, r.length, r.start, ended, cmd->flags);
    case NBD_DO_ZERO:
        return nbd_aio_zero(c->nbd, r.length, r.start, ended, cmd->flags);
    case NBD_DO_TRIM:
        return nbd_aio_trim(c->nbd, r.length, r.start, ended, cmd->flags);
    case NBD_DO_CACHE:
        return nbd_aio_cache(c->nbd, r.length, r.start, ended, cmd->flags);
    case NBD_DO_FLUSH:
        return nbd_aio_flush(c->nbd, ended, cmd->flags);
    case NBD_DO_STATUS:
        return nbd_aio_block_status(c->nbd, r.length, r.start, extents, ended, cmd->flags);
    }
    return -1;
}

void nbd_connection_do(struct nbd_connection *c, struct nbd_command *cmd, uint64_t patience_ns)
{
    SHIELD();
    struct command_of of = {c, cmd};

    event_init(&cmd->ended);
    cmd->error = 0;
    cmd->done = false;
    cmd->length = 0;
    cmd->since_ns = clock_now_ns();
    TAILQ_INSERT_TAIL(&c->in_flight, cmd, link);
    if (send_command(c, cmd, &of) < 0 && !cmd->done) {
        int error = nbd_get_errno();
        end_command(c, cmd, is_over(c) ? ENOTCONN : error ? error : EIO);
    }
    if (!c->over.set)
        look(c);
    if (!cmd->done && patience_ns != UINT64_MAX &&
        event_wait_until(&cmd->ended, clock_after_ns(patience_ns)) == -ETIMEDOUT)
        nbd_connection_cut(c);
    while (!cmd->done)
        (void)!event_wait(&cmd->ended);
}
