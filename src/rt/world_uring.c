/* The real world with io_uring.
 *
 * What tasks ask for in one turn of the loop is submitted with one system call, which also
 * waits for completions. An operation lives on its task's stack; its address travels through
 * the kernel and back, so the task does not leave before the completion has come. To cancel
 * is to submit a cancellation and go on waiting: whichever of the two wins, the completion
 * says. A deadline is a timer of the loop that cancels.
 *
 * What the ring has no operation for, or would only hand to a thread of the kernel's, goes to
 * our worker threads; they are heard through a poll on their eventfd. Descriptors that are
 * not sockets (pipes, terminals) and those that are non-blocking are polled, then tried.
 *
 * Sockets go through the ring like files. Trying recv or send at once and only then asking
 * the ring was measured: 4 to 18 % more processor time with 16 busy sockets. */
#include "rt/clock.h"
#include "rt/loop.h"
#include "rt/workers.h"

#include <errno.h>
#include <liburing.h>
#include <limits.h>
#include <poll.h>

#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#else
#define RUNNING_ON_VALGRIND 0
#endif

enum { SUBMISSIONS = 256, COMPLETIONS = 4096 };

struct world_uring {
    struct world world;
    struct io_uring ring;
    struct workers *workers;
    size_t in_flight;
    bool hears_workers; /* a poll on their eventfd is in the ring */
    bool completes_in_enter;
};

struct request {
    struct world_uring *world;
    struct task *task;
    struct timer timer;
    int result;
    bool done, cancel_sent, timed_out;
};

static struct world_uring *uring_of(struct world *w)
{
    return container_of(w, struct world_uring, world);
}

/* ---- the ring ---- */

static void completed(struct world_uring *u, const struct io_uring_cqe *cqe)
{
    struct request *rq = io_uring_cqe_get_data(cqe);
    if (!rq) /* a cancellation: the cancelled one speaks for itself */
        return;
    if ((void *)rq == u->workers) {
        u->hears_workers = false;
        workers_collect(u->workers, true);
        return;
    }
    rq->result = cqe->res;
    rq->done = true;
    u->in_flight--;
    task_wake(rq->task);
}

static void collect(struct world_uring *u)
{
    struct io_uring_cqe *cqes[64];
    unsigned n;
    while ((n = io_uring_peek_batch_cqe(&u->ring, cqes, ARRAY_SIZE(cqes)))) {
        for (unsigned i = 0; i < n; i++)
            completed(u, cqes[i]);
        io_uring_cq_advance(&u->ring, n);
    }
}

/* When the queue is full, what is in it goes to the kernel first. Whoever prepares one sets
 * its data last: preparing clears it. */
static struct io_uring_sqe *submission(struct world_uring *u)
{
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&u->ring))) {
        int r = io_uring_submit(&u->ring);
        if (r == -EBUSY || r == -EAGAIN)
            collect(u);
        else if (r < 0 && r != -EINTR)
            rt_panic("io_uring_submit: %s", strerror(-r));
    }
    return sqe;
}

static void hear_workers(struct world_uring *u)
{
    if (u->hears_workers || !workers_busy(u->workers))
        return;
    struct io_uring_sqe *sqe = submission(u);
    io_uring_prep_poll_add(sqe, workers_fd(u->workers), POLLIN);
    io_uring_sqe_set_data(sqe, u->workers);
    u->hears_workers = true;
}

static void send_cancel(struct request *rq)
{
    if (rq->done || rq->cancel_sent)
        return;
    rq->cancel_sent = true;
    struct io_uring_sqe *sqe = submission(rq->world);
    io_uring_prep_cancel(sqe, rq, 0);
    io_uring_sqe_set_data(sqe, NULL);
}

static void request_timed_out(struct timer *t)
{
    struct request *rq = container_of(t, struct request, timer);
    rq->timed_out = !rq->cancel_sent;
    send_cancel(rq);
}

/* What has been prepared is waited for; a cancellable one is cancelled in the kernel when its
 * task is, and then waited for. */
static int64_t await(struct request *rq, bool cancellable, uint64_t deadline_ns)
{
    rq->task = task_self();
    rq->world->in_flight++;
    timer_set(&rq->timer, deadline_ns, request_timed_out);
    while (!rq->done) {
        if (!cancellable) {
            task_suspend_uncancelled();
        } else if (task_suspend() < 0) {
            send_cancel(rq);
            cancellable = false;
        }
    }
    timer_clear(&rq->timer);
    if (rq->cancel_sent && (rq->result == -ECANCELED || rq->result == -EINTR))
        return rq->timed_out ? -ETIMEDOUT : -ECANCELED;
    return rq->result;
}

/* ---- operations ---- */

static void prepare(struct io_uring_sqe *sqe, const struct io_op *op, struct msghdr *message)
{
    int fd = op->fd;
    unsigned length = (unsigned)min_u64(op->length, 1u << 30);
    switch (op->kind) {
    case IO_READ:
        io_uring_prep_read(sqe, fd, op->buf, length, op->offset);
        break;
    case IO_WRITE:
        io_uring_prep_write(sqe, fd, op->buf, length, op->offset);
        sqe->rw_flags = op->flags;
        break;
    case IO_DATASYNC:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
        break;
    case IO_SYNC:
        io_uring_prep_fsync(sqe, fd, 0);
        break;
    case IO_FALLOCATE:
        io_uring_prep_fallocate(sqe, fd, op->flags, (off_t)op->offset, (off_t)op->length);
        break;
    case IO_RECV:
        io_uring_prep_recv(sqe, fd, op->buf, length, 0);
        break;
    case IO_SEND:
        io_uring_prep_send(sqe, fd, op->buf, length, MSG_NOSIGNAL);
        break;
    case IO_SENDV:
        *message = (struct msghdr){.msg_iov = op->buf, .msg_iovlen = min_u64(op->length, IOV_MAX)};
        io_uring_prep_sendmsg(sqe, fd, message, MSG_NOSIGNAL);
        break;
    case IO_ACCEPT:
        io_uring_prep_accept(sqe, fd, NULL, NULL, SOCK_CLOEXEC);
        break;
    case IO_CONNECT:
        io_uring_prep_connect(sqe, fd, op->buf, (socklen_t)op->length);
        break;
    default:
        io_uring_prep_poll_add(sqe, fd, (unsigned)op->flags);
        break;
    }
}

static int64_t ask(struct world_uring *u, const struct io_op *op, bool cancellable)
{
    struct request rq = {.world = u};
    struct msghdr message;
    struct io_uring_sqe *sqe = submission(u);
    prepare(sqe, op, &message);
    io_uring_sqe_set_data(sqe, &rq);
    return await(&rq, cancellable, op->kind == IO_POLL ? op->deadline_ns : NEVER_NS);
}

static int64_t file(struct world_uring *u, struct io_op *op)
{
    for (;;) {
        int64_t r = ask(u, op, false);
        if (r == -EAGAIN || r == -EOPNOTSUPP)
            return workers_perform(u->workers, op); /* not by this way; the calls may know more */
        if (r == -EINTR)
            continue;
        return r;
    }
}

static int64_t polled(struct world_uring *u, const struct io_op *op)
{
    bool reads = op->kind == IO_RECV || op->kind == IO_ACCEPT;
    struct io_op poll = {
        .kind = IO_POLL,
        .fd = op->fd,
        .flags = reads ? POLLIN : POLLOUT,
        .deadline_ns = NEVER_NS,
    };
    for (;;) {
        int64_t r = ask(u, &poll, true);
        if (r < 0 && r != -EINTR)
            return r;
        r = posix_try(op);
        if (r != -EAGAIN)
            return r;
    }
}

static int64_t stream(struct world_uring *u, const struct io_op *op)
{
    for (;;) {
        int64_t r = ask(u, op, true);
        if (r == -ENOTSOCK || r == -EAGAIN)
            return op->kind == IO_CONNECT ? r : polled(u, op);
        if (r == -EINTR)
            continue;
        return r;
    }
}

static int64_t uring_perform(struct world *w, struct io_op *op)
{
    struct world_uring *u = uring_of(w);
    switch (op->kind) {
    case IO_READ:
    case IO_WRITE:
    case IO_DATASYNC:
    case IO_SYNC:
    case IO_FALLOCATE:
        return file(u, op);
    case IO_RECV:
    case IO_SEND:
    case IO_SENDV:
    case IO_ACCEPT:
    case IO_CONNECT:
        return stream(u, op);
    case IO_POLL:
        return ask(u, op, true);
    default:
        return workers_serve(u->workers, op);
    }
}

/* ---- the turn ---- */

static int enter(struct world_uring *u, uint64_t deadline_ns)
{
    if (deadline_ns == 0)
        return u->completes_in_enter ? io_uring_submit_and_get_events(&u->ring)
                                     : io_uring_submit(&u->ring);
    struct __kernel_timespec ts, *timeout = NULL;
    struct io_uring_cqe *first;
    if (deadline_ns != NEVER_NS) {
        uint64_t now = posix_now_ns(NULL);
        uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
        ts.tv_sec = (long long)(left / NSEC_PER_SEC);
        ts.tv_nsec = (long long)(left % NSEC_PER_SEC);
        timeout = &ts;
    }
    return io_uring_submit_and_wait_timeout(&u->ring, &first, 1, timeout, NULL);
}

static bool uring_turn(struct world *w, uint64_t deadline_ns)
{
    struct world_uring *u = uring_of(w);
    hear_workers(u);
    if (!u->in_flight && !u->hears_workers) {
        if (deadline_ns == NEVER_NS)
            return false;
        if (deadline_ns == 0)
            return true;
    }
    if (io_uring_cq_ready(&u->ring))
        deadline_ns = 0; /* what is here already need not be waited for */
    int r = enter(u, deadline_ns);
    if (r < 0 && r != -ETIME && r != -EINTR && r != -EBUSY && r != -EAGAIN)
        rt_panic("io_uring_enter: %s", strerror(-r));
    collect(u);
    return true;
}

/* ---- open and close ---- */

/* The newer flags keep the kernel from interrupting us: completions are made when we ask for
 * them (6.1), or at least not from an interrupt of ours (5.19). */
static int make_ring(struct world_uring *u)
{
    static const unsigned flags[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN,
        0,
    };
    int r = -EINVAL;
    for (size_t i = 0; i < ARRAY_SIZE(flags) && r == -EINVAL; i++) {
        struct io_uring_params p = {.flags = flags[i] | IORING_SETUP_CQSIZE,
                                    .cq_entries = COMPLETIONS};
        r = io_uring_queue_init_params(SUBMISSIONS, &u->ring, &p);
        u->completes_in_enter = i == 0;
    }
    if (r < 0)
        return r;
    if (!(u->ring.features & IORING_FEAT_NODROP) || !(u->ring.features & IORING_FEAT_EXT_ARG)) {
        io_uring_queue_exit(&u->ring);
        return -ENOSYS; /* before 5.11 */
    }
    return 0;
}

/* A filter may allow the ring to be made, and refuse its use. */
static int try_ring(struct world_uring *u)
{
    struct io_uring_cqe *cqe;
    struct __kernel_timespec second = {.tv_sec = 1};
    io_uring_prep_nop(io_uring_get_sqe(&u->ring));
    int r = io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &second, NULL);
    if (r < 0)
        return r;
    io_uring_cqe_seen(&u->ring, cqe);
    return 0;
}

struct world *world_uring_open(int *error)
{
    /* valgrind (3.19) runs one thread at a time and does not know that io_uring_enter waits:
     * our workers would never run. Nor does it see what the kernel writes into buffers. */
    if (RUNNING_ON_VALGRIND) {
        *error = -ENOSYS;
        return NULL;
    }
    struct world_uring *u = xnew(struct world_uring);
    u->world = (struct world){
        .name = "io_uring",
        .now_ns = posix_now_ns,
        .wall_us = posix_wall_us,
        .random = posix_random,
        .perform = uring_perform,
        .turn = uring_turn,
    };
    *error = make_ring(u);
    if (*error == 0) {
        *error = try_ring(u);
        if (*error == 0)
            u->workers = workers_new(error);
        if (u->workers)
            return &u->world;
        io_uring_queue_exit(&u->ring);
    }
    free(u);
    return NULL;
}

void world_uring_close(struct world *w)
{
    struct world_uring *u = uring_of(w);
    assert(!u->in_flight);
    io_uring_queue_exit(&u->ring);
    workers_free(u->workers);
    free(u);
}
