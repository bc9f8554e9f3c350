/* An NBD server over its connections: one is lost, another comes, or is given up.
 *
 *             open                                 lost
 *     (none) ------> connected --------------------------------> lost
 *                      ^     requests: sent                        | requests: wait until
 *                      |                                           | wait_until_ns, then -EIO
 *                      +-------------------------------------------+
 *                        the attendant has connected again, and it is the same disk
 *
 * One task, the attendant, serves the connection until it is lost; then what was in flight ends,
 * and he tries again and again, for as long as the node is open. With reconnect-delay N a request
 * that was in flight, or comes while there is no connection, waits up to N seconds and is then sent
 * (again); without, it fails with -EIO at once.
 *
 * A server that comes back is another one for all we know: it is taken only if its disk has the
 * same size and takes the same requests.
 *
 * And it may have lost what it had not flushed, and a flush on the new connection would not tell.
 * Without reconnect-delay the next flush fails, and node_has_lost() is for those who would not
 * see that (a backup, when the guest has asked for that flush). With reconnect-delay the user has
 * said that the server comes back with what it had.
 *
 * Giving up (node_cancel): what has not ended within GRACE_NS is ended by cutting the connection,
 * which is the only way to get its buffer back; who waits for a connection stops waiting. */
#include "block/nbd.h"

#include "base/log.h"
#include "rt/clock.h"

#include <libnbd.h>

#define GRACE_NS (NSEC_PER_SEC / 2)
#define ATTEMPT_NS (10 * NSEC_PER_SEC) /* a server that says nothing: the monitor waits, too */
#define PAUSE_MIN_NS (NSEC_PER_SEC / 10)
#define PAUSE_MAX_NS (5 * NSEC_PER_SEC)

static void pulse(struct nbd_remote *re)
{
    event_set(&re->changed);
    event_reset(&re->changed);
}

static uint64_t after_ns(uint64_t from, uint64_t delay)
{
    return delay < NEVER_NS - from ? from + delay : NEVER_NS;
}

/* ---- connecting ---- */

struct attempt {
    const struct nbd_target *target;
    struct nbd_connection *connection;
    struct error *err;
    struct event ended;
};

static int attempt(void *arg)
{
    struct attempt *a = arg;

    task_set_name("nbd connect");
    (void)!nbd_connection_open(a->target, &a->connection, a->err);
    event_set(&a->ended);
    return 0;
}

/* One attempt, given up at DEADLINE_NS. */
static int connect_once(const struct nbd_target *target, uint64_t deadline_ns,
                        struct nbd_connection **ret, struct error *err)
{
    struct attempt a = {.target = target, .err = err};

    error_clear(err);
    event_init(&a.ended);
    {
        SCOPE(attempts);
        scope_spawn(&attempts, attempt, &a);
        if (event_wait_until(&a.ended, deadline_ns) == -ETIMEDOUT && !a.ended.set) {
            scope_cancel(&attempts);
            SHIELD();
            (void)!event_wait(&a.ended);
            if (!a.connection) {
                error_clear(err);
                CLEANUP(memory_freep) char *name = nbd_target_filename(target);
                (void)error_set_errno(err, ETIMEDOUT, "Failed to connect to '%s'", name);
            }
        }
    }
    if (!a.connection)
        return -(err->code ? err->code : EIO);
    if (task_cancelled()) {
        nbd_connection_close(a.connection, false);
        return error_set_errno(err, ECANCELED, "Failed to connect");
    }
    *ret = a.connection;
    return 0;
}

/* Is it still the disk that the node has promised? */
static int check_same(const struct nbd_remote *re, const struct nbd_offer *now, struct error *err)
{
    const struct nbd_offer *was = &re->offer;

    if (now->size_bytes != was->size_bytes)
        return error_set(err, EINVAL, "the export has %llu bytes now and had %llu",
                         (unsigned long long)now->size_bytes, (unsigned long long)was->size_bytes);
    if (now->read_only && !re->node->read_only)
        return error_set(err, EACCES, "the export is read-only now");
    if (now->min_block > was->min_block || now->max_block < was->max_block)
        return error_set(err, EINVAL,
                         "the export takes requests of %u to %u bytes now and took %u to %u",
                         now->min_block, now->max_block, was->min_block, was->max_block);
    return 0;
}

/* Tries until there is a connection; an error only when cancelled. */
static int connect_again(struct nbd_remote *re)
{
    CLEANUP(memory_freep) struct error *err = xnew(struct error);
    uint64_t pause = PAUSE_MIN_NS;

    for (;;) {
        struct nbd_connection *c = NULL;
        int r = sleep_until(clock_after_ns(pause));
        if (r < 0)
            return r;
        r = connect_once(&re->target, clock_after_ns(ATTEMPT_NS), &c, err);
        if (r == 0) {
            r = check_same(re, nbd_connection_offer(c), err);
            if (r == 0) {
                re->now = c;
                return 0;
            }
            nbd_connection_close(c, true);
        }
        if (task_cancelled())
            return -ECANCELED;
        if (!re->told)
            log_warning("Node '%s': no other connection yet: %s", node_name(re->node), err->text);
        re->told = true;
        /* While requests wait for it, soon. */
        pause =
            min_u64(2 * pause, clock_now_ns() < re->wait_until_ns ? NSEC_PER_SEC : PAUSE_MAX_NS);
    }
}

static void lose(struct nbd_remote *re)
{
    struct nbd_connection *c = re->now;

    if (re->written != re->flushed && !re->target.reconnect_ns) {
        re->doubt = true;
        node_has_lost(re->node);
    }
    re->wait_until_ns =
        re->target.reconnect_ns ? after_ns(clock_now_ns(), re->target.reconnect_ns) : 0;
    re->now = NULL;
    re->lost++;
    re->told = false;
    log_warning("Node '%s': the connection to '%s' is lost", node_name(re->node),
                node_filename(re->node));
    nbd_connection_close(c, false);
    pulse(re);
}

static int attendant(void *arg)
{
    struct nbd_remote *re = arg;

    task_set_name("nbd attendant");
    for (;;) {
        nbd_connection_run(re->now);
        if (task_cancelled())
            return 0;
        lose(re);
        if (connect_again(re) < 0)
            return 0;
        log_info("Node '%s': connected again", node_name(re->node));
        pulse(re);
    }
}

/* ---- open and close ---- */

static int connect_first(struct nbd_remote *re, struct error *err)
{
    uint64_t patience = re->target.open_ns ? re->target.open_ns : ATTEMPT_NS;
    uint64_t until = after_ns(clock_now_ns(), patience), pause = PAUSE_MIN_NS;

    for (;;) {
        int r = connect_once(&re->target, until, &re->now, err);
        if (r == 0 || !re->target.open_ns || clock_after_ns(pause) >= until)
            return r;
        (void)!sleep_until(clock_after_ns(pause));
        pause = min_u64(2 * pause, NSEC_PER_SEC);
    }
}

int nbd_remote_open(struct nbd_remote *re, struct node *n, struct nbd_target *target,
                    struct error *err)
{
    CLEANUP(memory_freep) struct error *own = err ? NULL : xnew(struct error);

    re->node = n;
    re->target = *target;
    *target = (struct nbd_target){0};
    event_init(&re->changed);
    scope_init(&re->tasks);
    int r = connect_first(re, err ? err : own);
    if (r < 0) {
        nbd_target_fini(&re->target);
        return r;
    }
    re->offer = *nbd_connection_offer(re->now);
    return 0;
}

void nbd_remote_start(struct nbd_remote *re)
{
    scope_spawn(&re->tasks, attendant, re);
}

void nbd_remote_close(struct nbd_remote *re)
{
    scope_fini(&re->tasks);
    if (re->now)
        nbd_connection_close(steal(re->now), true);
    nbd_target_fini(&re->target);
}

/* ---- requests ---- */

/* There is a connection; -EIO: there is none, and nobody waits for it any longer than UNTIL_NS. */
static int wait_connected(struct nbd_remote *re, uint64_t until_ns)
{
    while (!re->now) {
        uint64_t until = min_u64(re->wait_until_ns, until_ns);
        if (re->node->cancelled)
            return -ECANCELED;
        if (clock_now_ns() >= until)
            return -EIO;
        (void)!event_wait_until(&re->changed, until);
    }
    return 0;
}

static bool is_change(const struct nbd_command *cmd)
{
    return cmd->what == NBD_DO_WRITE || cmd->what == NBD_DO_ZERO || cmd->what == NBD_DO_TRIM;
}

int nbd_remote_do(struct nbd_remote *re, struct nbd_command *cmd)
{
    uint64_t until = NEVER_NS;

    for (;;) {
        int r = wait_connected(re, until);
        if (r < 0)
            return r;
        cmd->written = is_change(cmd) ? &re->written : NULL;
        uint64_t lost = re->lost;
        nbd_connection_do(re->now, cmd, re->node->cancelled ? GRACE_NS : UINT64_MAX);
        if (!cmd->error)
            return 0;
        if (cmd->error != ENOTCONN)
            return -cmd->error;
        while (re->lost == lost) /* the attendant is about to see that */
            (void)!event_wait(&re->changed);
        if (re->node->cancelled)
            return -ECANCELED;
        if (until == NEVER_NS) /* not for ever with a server that dies of it each time */
            until = after_ns(clock_now_ns(), re->target.reconnect_ns);
        if (clock_now_ns() >= until)
            return -EIO;
    }
}

int nbd_remote_flush(struct nbd_remote *re)
{
    struct nbd_command cmd = {.what = NBD_DO_FLUSH};
    uint64_t written = re->written;

    if (re->doubt) { /* told once */
        re->doubt = false;
        re->flushed = re->written;
        return -EIO;
    }
    if (re->node->closing && !re->now && re->written == re->flushed)
        return 0; /* nothing of ours is at stake */
    if (re->offer.flush) {
        int r = nbd_remote_do(re, &cmd);
        if (r < 0)
            return r;
    }
    re->flushed = max_u64(re->flushed, written);
    return 0;
}

/* ---- giving up ---- */

static int cutter(void *arg)
{
    struct nbd_remote *re = arg;
    uint64_t asked_ns = clock_now_ns();

    task_set_name("nbd cutter");
    if (sleep_until(after_ns(asked_ns, GRACE_NS)) == 0 && re->node->cancelled && re->now &&
        nbd_connection_oldest_ns(re->now) <= asked_ns)
        nbd_connection_cut(re->now);
    return 0;
}

void nbd_remote_cancel(struct nbd_remote *re)
{
    pulse(re);
    scope_spawn(&re->tasks, cutter, re);
}
