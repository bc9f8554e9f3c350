/* The real world without io_uring: worker threads for files, epoll for what has a peer.
 *
 * Containers often refuse io_uring, so this is no rarity. A read first tries the page cache
 * on the loop's own thread (RWF_NOWAIT); what would touch the disk goes to a worker. Sockets
 * are tried at once; when that would block, the descriptor is armed in epoll for one shot,
 * with the events of all who wait on it. epoll forgets a descriptor that is closed, and its
 * number comes back for another one: so arming takes either answer, "known" or "unknown". */
#include "rt/clock.h"
#include "rt/loop.h"
#include "rt/workers.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { EVENTS_MAX = 256, INLINE_READ_MAX = 256 * 1024 };

struct ready_wait {
    TAILQ_ENTRY(ready_wait) link;
    struct task *task;
    int events;
    int result; /* 0: still waits */
    struct timer timer;
};

struct watch {
    TAILQ_HEAD(, ready_wait) waits;
};

struct world_threads {
    struct world world;
    struct workers *workers;
    int epoll;
    size_t waiting;       /* for readiness */
    struct watch **watch; /* by descriptor */
    size_t watches;
    bool no_pwait2;
};

static struct world_threads *threads_of(struct world *w)
{
    return container_of(w, struct world_threads, world);
}

/* ---- readiness ---- */

static struct watch *watch_of(struct world_threads *t, int fd)
{
    if ((size_t)fd >= t->watches) {
        size_t n = max_u64((uint64_t)fd + 1, t->watches * 2);
        struct watch **more = realloc(t->watch, n * sizeof *more);
        if (!more)
            rt_panic("no memory to watch descriptor %d", fd);
        memset(more + t->watches, 0, (n - t->watches) * sizeof *more);
        t->watch = more;
        t->watches = n;
    }
    if (!t->watch[fd]) {
        t->watch[fd] = xnew(struct watch);
        TAILQ_INIT(&t->watch[fd]->waits);
    }
    return t->watch[fd];
}

static int arm(struct world_threads *t, int fd)
{
    struct ready_wait *r;
    struct epoll_event e = {.events = EPOLLONESHOT, .data.fd = fd};
    TAILQ_FOREACH (r, &t->watch[fd]->waits, link)
        e.events |= (uint32_t)r->events;
    if (epoll_ctl(t->epoll, EPOLL_CTL_MOD, fd, &e) == 0)
        return 0;
    if (errno == ENOENT && epoll_ctl(t->epoll, EPOLL_CTL_ADD, fd, &e) == 0)
        return 0;
    return -errno;
}

static void end_wait(struct world_threads *t, struct watch *watch, struct ready_wait *r, int result)
{
    TAILQ_REMOVE(&watch->waits, r, link);
    t->waiting--;
    r->result = result;
}

struct ready_timer {
    struct ready_wait wait;
    struct world_threads *world;
    struct watch *watch;
};

static void ready_timed_out(struct timer *timer)
{
    struct ready_timer *rt = container_of(timer, struct ready_timer, wait.timer);
    if (!rt->wait.result) {
        end_wait(rt->world, rt->watch, &rt->wait, -ETIMEDOUT);
        task_wake(rt->wait.task);
    }
}

/* The events that came, or -ECANCELED, -ETIMEDOUT, -EBADF. */
static int wait_ready(struct world_threads *t, int fd, int events, uint64_t deadline_ns)
{
    if (fd < 0)
        return -EBADF;
    struct watch *watch = watch_of(t, fd);
    struct ready_timer rt = {
        .wait = {.task = task_self(), .events = events},
        .world = t,
        .watch = watch,
    };
    TAILQ_INSERT_TAIL(&watch->waits, &rt.wait, link);
    t->waiting++;
    int r = arm(t, fd);
    if (r < 0) {
        end_wait(t, watch, &rt.wait, r);
        if (r != -EPERM)
            return r;
        task_yield_uncancelled(); /* a plain file: always ready */
        return events & (POLLIN | POLLOUT);
    }
    timer_set(&rt.wait.timer, deadline_ns, ready_timed_out);
    r = task_suspend();
    timer_clear(&rt.wait.timer);
    if (!rt.wait.result)
        end_wait(t, watch, &rt.wait, r);
    return rt.wait.result;
}

static void became_ready(struct world_threads *t, int fd, uint32_t events)
{
    struct watch *watch = t->watch[fd];
    struct ready_wait *r, *next;
    for (r = TAILQ_FIRST(&watch->waits); r; r = next) {
        next = TAILQ_NEXT(r, link);
        int hit = (int)events & (r->events | POLLERR | POLLHUP);
        if (hit) {
            end_wait(t, watch, r, hit);
            task_wake(r->task);
        }
    }
    if (!TAILQ_EMPTY(&watch->waits))
        arm(t, fd);
}

/* ---- what waits for a peer ---- */

static int64_t stream(struct world_threads *t, const struct io_op *op)
{
    int events = op->kind == IO_RECV || op->kind == IO_ACCEPT ? POLLIN : POLLOUT;
    for (;;) {
        int64_t r = posix_try(op);
        if (r != -EAGAIN) {
            if (r > 0)
                task_yield_uncancelled(); /* a busy peer does not keep us from the others */
            return r;
        }
        r = wait_ready(t, op->fd, events, NEVER_NS);
        if (r < 0)
            return r;
    }
}

static int64_t finish_connect(struct world_threads *t, int fd)
{
    int r = wait_ready(t, fd, POLLOUT, NEVER_NS);
    if (r < 0)
        return r;
    int error = 0;
    socklen_t length = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
        return -errno;
    return -error;
}

static int64_t connect_to(struct world_threads *t, const struct io_op *op)
{
    int flags = fcntl(op->fd, F_GETFL);
    if (flags < 0 || fcntl(op->fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    int64_t r;
    for (;;) {
        r = connect(op->fd, op->buf, (socklen_t)op->length) < 0 ? -errno : 0;
        if (r != -EAGAIN)
            break;
        r = sleep_until(clock_after_ns(NSEC_PER_SEC / 100)); /* AF_UNIX: its queue is full */
        if (r < 0)
            break;
    }
    if (r == -EINPROGRESS || r == -EINTR)
        r = finish_connect(t, op->fd);
    fcntl(op->fd, F_SETFL, flags);
    return r;
}

/* epoll forgets what is closed, and nobody would hear from it again. */
static int64_t close_fd(struct world_threads *t, const struct io_op *op)
{
    if ((size_t)op->fd < t->watches && t->watch[op->fd]) {
        struct watch *watch = t->watch[op->fd];
        struct ready_wait *r;
        while ((r = TAILQ_FIRST(&watch->waits))) {
            end_wait(t, watch, r, -EBADF);
            task_wake(r->task);
        }
    }
    return posix_do(op);
}

/* ---- the table ---- */

static int64_t read_file(struct world_threads *t, struct io_op *op)
{
    if (op->length <= INLINE_READ_MAX) {
        struct iovec iov = {op->buf, op->length};
        ssize_t r = preadv2(op->fd, &iov, 1, (off_t)op->offset, RWF_NOWAIT);
        if (r > 0) {
            task_yield_uncancelled();
            return r;
        }
    }
    return workers_perform(t->workers, op);
}

static int64_t threads_perform(struct world *w, struct io_op *op)
{
    struct world_threads *t = threads_of(w);
    switch (op->kind) {
    case IO_READ:
        return read_file(t, op);
    case IO_RECV:
    case IO_SEND:
    case IO_SENDV:
    case IO_ACCEPT:
        return stream(t, op);
    case IO_CONNECT:
        return connect_to(t, op);
    case IO_POLL:
        return wait_ready(t, op->fd, op->flags, op->deadline_ns);
    case IO_CLOSE:
        return close_fd(t, op);
    default:
        return workers_serve(t->workers, op);
    }
}

static int wait_events(struct world_threads *t, struct epoll_event *events, uint64_t deadline_ns)
{
    uint64_t now = deadline_ns && deadline_ns != NEVER_NS ? posix_now_ns(NULL) : 0;
    uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
    if (deadline_ns && deadline_ns != NEVER_NS && !t->no_pwait2) {
        struct timespec ts = {(time_t)(left / NSEC_PER_SEC), (long)(left % NSEC_PER_SEC)};
        int n = epoll_pwait2(t->epoll, events, EVENTS_MAX, &ts, NULL);
        if (n >= 0 || (errno != ENOSYS && errno != EPERM))
            return n;
        t->no_pwait2 = true;
    }
    int ms = deadline_ns == NEVER_NS ? -1 : (int)min_u64(div_round_up(left, 1000000), 1000000);
    return epoll_wait(t->epoll, events, EVENTS_MAX, ms);
}

static bool threads_turn(struct world *w, uint64_t deadline_ns)
{
    struct world_threads *t = threads_of(w);
    if (!t->waiting && !workers_busy(t->workers)) {
        if (deadline_ns == NEVER_NS)
            return false;
        if (!deadline_ns)
            return true;
    }
    struct epoll_event events[EVENTS_MAX];
    int n = wait_events(t, events, deadline_ns);
    if (n < 0 && errno != EINTR)
        rt_panic("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < n; i++) {
        if (events[i].data.fd == workers_fd(t->workers))
            workers_collect(t->workers, true);
        else
            became_ready(t, events[i].data.fd, events[i].events);
    }
    return true;
}

struct world *world_threads_open(int *error)
{
    struct world_threads *t = xnew(struct world_threads);
    t->world = (struct world){
        .name = "threads",
        .now_ns = posix_now_ns,
        .wall_us = posix_wall_us,
        .random = posix_random,
        .perform = threads_perform,
        .turn = threads_turn,
    };
    t->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (t->epoll < 0) {
        *error = -errno;
        free(t);
        return NULL;
    }
    t->workers = workers_new(error);
    if (t->workers) {
        struct epoll_event e = {.events = EPOLLIN, .data.fd = workers_fd(t->workers)};
        if (epoll_ctl(t->epoll, EPOLL_CTL_ADD, e.data.fd, &e) == 0)
            return &t->world;
        *error = -errno;
        workers_free(t->workers);
    }
    close(t->epoll);
    free(t);
    return NULL;
}

void world_threads_close(struct world *w)
{
    struct world_threads *t = threads_of(w);
    assert(!t->waiting);
    workers_free(t->workers);
    close(t->epoll);
    for (size_t i = 0; i < t->watches; i++)
        free(t->watch[i]);
    free(t->watch);
    free(t);
}
