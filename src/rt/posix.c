/* The system calls behind both real worlds, each as one blocking step for a worker thread,
 * as one attempt that does not block, or at once. And the real clock and dice. */
#include "rt/clock.h"
#include "rt/loop.h"
#include "rt/workers.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

/* ---- clock and dice ---- */

uint64_t posix_now_ns(struct world *w)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NSEC_PER_SEC + (uint64_t)t.tv_nsec;
}

uint64_t posix_wall_us(struct world *w)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

void posix_random(struct world *w, void *buf, size_t n)
{
    char *at = buf;
    while (n) {
        ssize_t r = getrandom(at, n, 0);
        if (r < 0 && errno != EINTR)
            rt_panic("getrandom: %s", strerror(errno));
        if (r > 0) {
            at += r;
            n -= (size_t)r;
        }
    }
}

/* ---- files ---- */

#define RETRY(call)                                                                                \
    ({                                                                                             \
        int64_t retry_result;                                                                      \
        do                                                                                         \
            retry_result = (call);                                                                 \
        while (retry_result < 0 && errno == EINTR);                                                \
        retry_result < 0 ? -(int64_t)errno : retry_result;                                         \
    })

static int64_t do_write(const struct io_op *op)
{
    if (!op->flags)
        return RETRY(pwrite(op->fd, op->buf, op->length, (off_t)op->offset));
    struct iovec iov = {op->buf, op->length};
    return RETRY(pwritev2(op->fd, &iov, 1, (off_t)op->offset, op->flags));
}

/* A file that has become shorter in between has no more of it. */
static int64_t do_data(const struct io_op *op)
{
    struct range *ret = op->ret;
    const off_t end = (off_t)(op->offset + op->length);
    off_t at = (off_t)op->offset;
    int n = 0;

    while (n < op->flags && at < end) {
        off_t data = lseek(op->fd, at, SEEK_DATA);
        off_t hole = data < 0 ? data : lseek(op->fd, data, SEEK_HOLE);
        if (hole < 0)
            return errno == ENXIO ? n : -errno;
        if (data >= end)
            break;
        at = hole < end ? hole : end;
        ret[n++] = range_between((uint64_t)data, (uint64_t)at);
    }
    return n;
}

static int64_t do_lock(const struct io_op *op)
{
    struct flock lock = {
        .l_type = (short)op->flags,
        .l_whence = SEEK_SET,
        .l_start = (off_t)op->offset,
        .l_len = (off_t)op->length,
    };
    if (op->kind == IO_LOCK) {
        int64_t r = RETRY(fcntl(op->fd, F_OFD_SETLK, &lock));
        return r == -EACCES ? -EAGAIN : r;
    }
    int64_t r = RETRY(fcntl(op->fd, F_OFD_GETLK, &lock));
    return r < 0 ? r : lock.l_type != F_UNLCK;
}

static int64_t do_sync_dir(const struct io_op *op)
{
    int64_t fd = RETRY(open(op->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd < 0)
        return fd;
    int64_t r = RETRY(fsync((int)fd));
    close((int)fd);
    return r == -EINVAL ? 0 : r; /* a file system whose directories need none */
}

static int64_t do_statx(const struct io_op *op)
{
    unsigned mask = STATX_BASIC_STATS | STATX_BTIME;
    if (op->path)
        return RETRY(statx(AT_FDCWD, op->path, 0, mask, op->ret));
    return RETRY(statx(op->fd, "", AT_EMPTY_PATH, mask, op->ret));
}

static int64_t do_map(const struct io_op *op)
{
    int touch = op->length <= MAP_TOUCHED_MAX ? MAP_POPULATE : 0;
    void *at = mmap(NULL, op->length, PROT_READ | PROT_WRITE, MAP_SHARED | touch, op->fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    *(void **)op->ret = at;
    return 0;
}

static int64_t do_realpath(const struct io_op *op)
{
    char *path = realpath(op->path, NULL);
    if (!path)
        return -errno;
    *(char **)op->ret = path;
    return 0;
}

static int64_t do_list(const struct io_op *op)
{
    DIR *d = opendir(op->path);
    if (!d)
        return -errno;
    char *names = NULL;
    size_t n = 0;
    FILE *to = open_memstream(&names, &n);
    struct dirent *e;
    if (!to) {
        closedir(d);
        return -ENOMEM;
    }
    errno = 0;
    while ((e = readdir(d)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            fwrite(e->d_name, strlen(e->d_name) + 1, 1, to);
    int r = -errno;
    closedir(d);
    fputc('\0', to);
    if (fclose(to) != 0 && r == 0)
        r = -ENOMEM;
    if (r < 0)
        free(names);
    else
        *(char **)op->ret = names;
    return r;
}

/* ---- at once ---- */

bool posix_at_once(enum io_kind kind)
{
    return kind > IO_WORKER;
}

static int64_t do_close(const struct io_op *op)
{
    return close(op->fd) < 0 && errno != EINTR ? -errno : 0; /* closed either way on Linux */
}

static int64_t do_signals(const struct io_op *op)
{
    const int *signals = op->buf;
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < op->length; i++)
        sigaddset(&set, signals[i]);
    int r = pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (r)
        return -r;
    return RETRY(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
}

int64_t posix_do(const struct io_op *op)
{
    int fd = op->fd;
    switch (op->kind) {
    case IO_OPEN:
        return RETRY(open(op->path, op->flags, op->mode));
    case IO_READ:
        return RETRY(pread(fd, op->buf, op->length, (off_t)op->offset));
    case IO_WRITE:
        return do_write(op);
    case IO_DATASYNC:
        return RETRY(fdatasync(fd));
    case IO_SYNC:
        return RETRY(fsync(fd));
    case IO_FALLOCATE:
        return RETRY(fallocate(fd, op->flags, (off_t)op->offset, (off_t)op->length));
    case IO_TRUNCATE:
        return RETRY(ftruncate(fd, (off_t)op->offset));
    case IO_FSTAT:
        return RETRY(fstat(fd, op->ret));
    case IO_STAT:
        return RETRY(stat(op->path, op->ret));
    case IO_STATX:
        return do_statx(op);
    case IO_STATFS:
        return RETRY(fstatfs(fd, op->ret));
    case IO_SEEK:
        return RETRY(lseek(fd, (off_t)op->offset, op->flags));
    case IO_DATA:
        return do_data(op);
    case IO_LOCK:
    case IO_LOCK_TEST:
        return do_lock(op);
    case IO_UNLINK:
    case IO_UNLINK_SOCKET:
        return RETRY(unlink(op->path));
    case IO_RENAME:
        return RETRY(rename(op->path, op->path2));
    case IO_LINK:
        return RETRY(link(op->path, op->path2));
    case IO_MKDIR:
        return RETRY(mkdir(op->path, op->mode));
    case IO_SYNC_DIR:
        return do_sync_dir(op);
    case IO_IOCTL:
        return RETRY(ioctl(fd, op->request, op->ret));
    case IO_REALPATH:
        return do_realpath(op);
    case IO_LIST:
        return do_list(op);
    case IO_MAP:
        return do_map(op);
    case IO_UNMAP:
        return RETRY(munmap(op->buf, op->length));
    case IO_WORKER:
        return op->fn(op->ret);
    case IO_CLOSE:
        return do_close(op);
    case IO_SOCKET:
        return RETRY(socket(op->flags, op->flags2 | SOCK_CLOEXEC, op->flags3));
    case IO_SOCKETPAIR:
        return RETRY(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, op->ret));
    case IO_BIND:
        return RETRY(bind(fd, op->buf, (socklen_t)op->length));
    case IO_LISTEN:
        return RETRY(listen(fd, op->flags));
    case IO_SHUTDOWN:
        return RETRY(shutdown(fd, SHUT_RDWR));
    case IO_SETSOCKOPT:
        return RETRY(setsockopt(fd, op->flags, op->flags2, op->buf, (socklen_t)op->length));
    case IO_GETSOCKOPT:
        return RETRY(getsockopt(fd, op->flags, op->flags2, op->ret, op->ret2));
    case IO_SOCKNAME:
        return RETRY(getsockname(fd, op->ret, op->ret2));
    case IO_PEERNAME:
        return RETRY(getpeername(fd, op->ret, op->ret2));
    case IO_SIGNALS:
        return do_signals(op);
    case IO_RECV:
    case IO_SEND:
    case IO_SENDV:
    case IO_ACCEPT:
    case IO_CONNECT:
    case IO_POLL:
        break; /* these wait for a peer: no thread may block in them */
    }
    return -EOPNOTSUPP;
}

/* ---- one attempt at what waits for a peer ---- */

static bool ready(int fd, int events)
{
    struct pollfd p = {.fd = fd, .events = (short)events};
    return RETRY(poll(&p, 1, 0)) == 1;
}

/* Pipes, terminals, signalfds. We do not make them non-blocking: standard input is shared
 * with whoever started us. A pipe that polls as writable takes PIPE_BUF bytes. */
static int64_t try_stream(const struct io_op *op)
{
    if (op->kind == IO_RECV)
        return ready(op->fd, POLLIN) ? RETRY(read(op->fd, op->buf, op->length)) : -EAGAIN;
    const struct iovec one = {op->buf, op->length};
    const struct iovec *iov = op->kind == IO_SENDV ? op->buf : &one;
    if (!ready(op->fd, POLLOUT))
        return -EAGAIN;
    return RETRY(write(op->fd, iov->iov_base, min_u64(iov->iov_len, PIPE_BUF)));
}

static int64_t try_accept(const struct io_op *op)
{
    int flags = fcntl(op->fd, F_GETFL);
    if (flags >= 0 && !(flags & O_NONBLOCK))
        fcntl(op->fd, F_SETFL, flags | O_NONBLOCK);
    return RETRY(accept4(op->fd, NULL, NULL, SOCK_CLOEXEC));
}

int64_t posix_try(const struct io_op *op)
{
    int64_t r;
    if (op->kind == IO_ACCEPT)
        return try_accept(op);
    if (op->kind == IO_RECV) {
        r = RETRY(recv(op->fd, op->buf, op->length, MSG_DONTWAIT));
    } else if (op->kind == IO_SEND) {
        r = RETRY(send(op->fd, op->buf, op->length, MSG_DONTWAIT | MSG_NOSIGNAL));
    } else {
        struct msghdr message = {.msg_iov = op->buf, .msg_iovlen = min_u64(op->length, IOV_MAX)};
        r = RETRY(sendmsg(op->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL));
    }
    return r == -ENOTSOCK ? try_stream(op) : r;
}

/* ---- outside a loop ---- */

static int64_t outside_perform(struct world *w, struct io_op *op)
{
    if (!posix_at_once(op->kind))
        rt_panic("I/O outside of a loop");
    return posix_do(op);
}

static bool outside_turn(struct world *w, uint64_t deadline_ns)
{
    return false;
}

static struct world outside = {
    .name = "none",
    .now_ns = posix_now_ns,
    .wall_us = posix_wall_us,
    .random = posix_random,
    .perform = outside_perform,
    .turn = outside_turn,
};

struct world *world_here(void)
{
    struct loop *l = loop_here();
    return l ? l->world : &outside;
}
