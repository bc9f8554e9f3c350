/* rt/io.h in terms of the world that the loop lives in, and what is made of several calls:
 * the _full ones, the fsync of a directory, signals. */
#include "rt/io.h"

#include "rt/clock.h"
#include "rt/loop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/signalfd.h>

static int64_t perform(struct io_op *op)
{
    struct world *w = world_here();
    return w->perform(w, op);
}

/* For what waits: nothing is begun for a task that has been cancelled. */
static int64_t perform_waiting(struct io_op *op)
{
    task_check_may_wait("I/O");
    if (task_cancelled())
        return -ECANCELED;
    return perform(op);
}

#define WAITING(...) perform_waiting(&(struct io_op){__VA_ARGS__})
#define AT_ONCE(...) perform(&(struct io_op){__VA_ARGS__})

/* ---- files ---- */

int io_open(const char *path, int flags, mode_t mode)
{
    return (int)WAITING(.kind = IO_OPEN, .path = path, .flags = flags | O_CLOEXEC, .mode = mode);
}

void io_close(int fd)
{
    if (fd >= 0)
        AT_ONCE(.kind = IO_CLOSE, .fd = fd);
}

ssize_t io_pread(int fd, void *buf, size_t n, uint64_t offset)
{
    return WAITING(.kind = IO_READ, .fd = fd, .buf = buf, .length = n, .offset = offset);
}

ssize_t io_pwrite(int fd, const void *buf, size_t n, uint64_t offset, int rw_flags)
{
    return WAITING(.kind = IO_WRITE, .fd = fd, .buf = (void *)buf, .length = n, .offset = offset,
                   .flags = rw_flags);
}

int io_pread_full(int fd, void *buf, size_t n, uint64_t offset)
{
    char *at = buf;
    while (n) {
        ssize_t r = io_pread(fd, at, n, offset);
        if (r < 0)
            return (int)r;
        if (r == 0) {
            memset(at, 0, n);
            return 0;
        }
        at += r;
        offset += (size_t)r;
        n -= (size_t)r;
    }
    return 0;
}

int io_pwrite_full(int fd, const void *buf, size_t n, uint64_t offset, int rw_flags)
{
    const char *at = buf;
    while (n) {
        ssize_t r = io_pwrite(fd, at, n, offset, rw_flags);
        if (r < 0)
            return (int)r;
        if (r == 0)
            return -ENOSPC; /* a device's end */
        at += r;
        offset += (size_t)r;
        n -= (size_t)r;
    }
    return 0;
}

int io_fdatasync(int fd)
{
    return (int)WAITING(.kind = IO_DATASYNC, .fd = fd);
}

int io_fsync(int fd)
{
    return (int)WAITING(.kind = IO_SYNC, .fd = fd);
}

int io_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    return (int)WAITING(.kind = IO_FALLOCATE, .fd = fd, .flags = mode, .offset = offset,
                        .length = length);
}

int io_ftruncate(int fd, uint64_t size_bytes)
{
    return (int)WAITING(.kind = IO_TRUNCATE, .fd = fd, .offset = size_bytes);
}

int io_fstat(int fd, struct stat *ret)
{
    return (int)WAITING(.kind = IO_FSTAT, .fd = fd, .ret = ret);
}

int io_stat(const char *path, struct stat *ret)
{
    return (int)WAITING(.kind = IO_STAT, .path = path, .ret = ret);
}

int io_statx(const char *path, struct statx *ret)
{
    return (int)WAITING(.kind = IO_STATX, .path = path, .ret = ret);
}

int io_fstatx(int fd, struct statx *ret)
{
    return (int)WAITING(.kind = IO_STATX, .fd = fd, .ret = ret);
}

int io_fstatfs(int fd, struct statfs *ret)
{
    return (int)WAITING(.kind = IO_STATFS, .fd = fd, .ret = ret);
}

int64_t io_seek(int fd, uint64_t offset, int whence)
{
    return WAITING(.kind = IO_SEEK, .fd = fd, .offset = offset, .flags = whence);
}

int io_data(int fd, struct range within, struct range *ret, unsigned n)
{
    return (int)WAITING(.kind = IO_DATA, .fd = fd, .offset = within.start, .length = within.length,
                        .ret = ret, .flags = (int)n);
}

int io_lock(int fd, int type, uint64_t offset, uint64_t length)
{
    return (int)WAITING(.kind = IO_LOCK, .fd = fd, .flags = type, .offset = offset,
                        .length = length);
}

int io_lock_test(int fd, int type, uint64_t offset, uint64_t length)
{
    return (int)WAITING(.kind = IO_LOCK_TEST, .fd = fd, .flags = type, .offset = offset,
                        .length = length);
}

int io_unlink(const char *path)
{
    return (int)WAITING(.kind = IO_UNLINK, .path = path);
}

int io_rename(const char *from, const char *to)
{
    return (int)WAITING(.kind = IO_RENAME, .path = from, .path2 = to);
}

int io_link(const char *from, const char *to)
{
    return (int)WAITING(.kind = IO_LINK, .path = from, .path2 = to);
}

int io_mkdir(const char *path, mode_t mode)
{
    return (int)WAITING(.kind = IO_MKDIR, .path = path, .mode = mode);
}

int io_sync_dir_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash)
        return (int)WAITING(.kind = IO_SYNC_DIR, .path = ".");
    if (slash == path)
        return (int)WAITING(.kind = IO_SYNC_DIR, .path = "/");
    CLEANUP(memory_freep) char *dir = xasprintf("%.*s", (int)(slash - path), path);
    return (int)WAITING(.kind = IO_SYNC_DIR, .path = dir);
}

int io_ioctl(int fd, unsigned long request, void *arg)
{
    return (int)WAITING(.kind = IO_IOCTL, .fd = fd, .request = request, .ret = arg);
}

int io_realpath(const char *path, char **ret)
{
    return (int)WAITING(.kind = IO_REALPATH, .path = path, .ret = ret);
}

int io_list(const char *path, char **ret)
{
    return (int)WAITING(.kind = IO_LIST, .path = path, .ret = ret);
}

int io_map(int fd, size_t length, void **ret)
{
    return (int)WAITING(.kind = IO_MAP, .fd = fd, .length = length, .ret = ret);
}

void io_unmap(void *at, size_t length)
{
    if (at)
        AT_ONCE(.kind = IO_UNMAP, .buf = at, .length = length);
}

/* ---- this boot ---- */

/* A small file of the kernel's, as text. */
static int read_text(const char *path, char *buf, size_t size)
{
    int fd = io_open(path, O_RDONLY, 0);
    if (fd < 0)
        return fd;
    ssize_t n = io_pread(fd, buf, size - 1, 0);
    io_close(fd);
    if (n < 0)
        return (int)n;
    buf[n] = '\0';
    return 0;
}

int io_boot_id(uint8_t ret[BOOT_ID_BYTES])
{
    char text[64];
    unsigned digits = 0;
    uint8_t id[BOOT_ID_BYTES] = {0};
    int r = read_text("/proc/sys/kernel/random/boot_id", text, sizeof text);
    if (r < 0)
        return r;
    for (const char *c = text; *c && digits < 2 * BOOT_ID_BYTES; c++) {
        static const char hex[] = "0123456789abcdef";
        const char *at = strchr(hex, *c);
        if (at && *c != '-') {
            id[digits / 2] = (uint8_t)(id[digits / 2] << 4 | (at - hex));
            digits++;
        }
    }
    if (digits != 2 * BOOT_ID_BYTES)
        return -EIO;
    memcpy(ret, id, sizeof id);
    return 0;
}

int io_boot_us(uint64_t *ret)
{
    char text[64];
    unsigned long long seconds = 0;
    unsigned hundredths = 0;
    int r = read_text("/proc/uptime", text, sizeof text);
    if (r < 0)
        return r;
    if (sscanf(text, "%llu.%2u", &seconds, &hundredths) != 2)
        return -EIO;
    uint64_t now = clock_wall_us(), up = seconds * 1000000 + hundredths * UINT64_C(10000);
    *ret = now > up ? now - up : 0;
    return 0;
}

/* ---- sockets, pipes, terminals ---- */

int io_socket(int domain, int type, int protocol)
{
    return (int)AT_ONCE(.kind = IO_SOCKET, .flags = domain, .flags2 = type, .flags3 = protocol);
}

int io_socketpair(int ret[2])
{
    return (int)AT_ONCE(.kind = IO_SOCKETPAIR, .ret = ret);
}

int io_bind(int fd, const struct sockaddr *addr, socklen_t length)
{
    return (int)AT_ONCE(.kind = IO_BIND, .fd = fd, .buf = (void *)addr, .length = length);
}

int io_listen(int fd, int backlog)
{
    return (int)AT_ONCE(.kind = IO_LISTEN, .fd = fd, .flags = backlog);
}

int io_setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
    return (int)AT_ONCE(.kind = IO_SETSOCKOPT, .fd = fd, .flags = level, .flags2 = name,
                        .buf = (void *)value, .length = length);
}

int io_getsockopt(int fd, int level, int name, void *value, socklen_t *length)
{
    return (int)AT_ONCE(.kind = IO_GETSOCKOPT, .fd = fd, .flags = level, .flags2 = name,
                        .ret = value, .ret2 = length);
}

int io_sockname(int fd, struct sockaddr_storage *ret, socklen_t *length)
{
    return (int)AT_ONCE(.kind = IO_SOCKNAME, .fd = fd, .ret = ret, .ret2 = length);
}

int io_peername(int fd, struct sockaddr_storage *ret, socklen_t *length)
{
    return (int)AT_ONCE(.kind = IO_PEERNAME, .fd = fd, .ret = ret, .ret2 = length);
}

int io_unlink_socket(const char *path)
{
    return (int)AT_ONCE(.kind = IO_UNLINK_SOCKET, .path = path);
}

void io_shutdown(int fd)
{
    AT_ONCE(.kind = IO_SHUTDOWN, .fd = fd);
}

int io_connect(int fd, const struct sockaddr *addr, socklen_t length)
{
    return (int)WAITING(.kind = IO_CONNECT, .fd = fd, .buf = (void *)addr, .length = length);
}

int io_accept(int fd)
{
    return (int)WAITING(.kind = IO_ACCEPT, .fd = fd);
}

ssize_t io_recv(int fd, void *buf, size_t n)
{
    return WAITING(.kind = IO_RECV, .fd = fd, .buf = buf, .length = n);
}

ssize_t io_send(int fd, const void *buf, size_t n)
{
    return WAITING(.kind = IO_SEND, .fd = fd, .buf = (void *)buf, .length = n);
}

int io_recv_full(int fd, void *buf, size_t n)
{
    char *at = buf;
    while (n) {
        ssize_t r = io_recv(fd, at, n);
        if (r < 0)
            return (int)r;
        if (r == 0)
            return -ECONNRESET;
        at += r;
        n -= (size_t)r;
    }
    return 0;
}

int io_sendv_full(int fd, struct iovec *iov, int count)
{
    for (;;) {
        while (count && iov->iov_len == 0) {
            iov++;
            count--;
        }
        if (!count)
            return 0;
        int64_t r = WAITING(.kind = IO_SENDV, .fd = fd, .buf = iov, .length = (size_t)count);
        if (r < 0)
            return (int)r;
        for (size_t sent = (size_t)r; sent;) {
            size_t here = min_u64(sent, iov->iov_len);
            if (here) /* an empty piece may have no address */
                iov->iov_base = (char *)iov->iov_base + here;
            iov->iov_len -= here;
            sent -= here;
            if (!iov->iov_len) {
                iov++;
                count--;
            }
        }
    }
}

int io_poll(int fd, int events, uint64_t deadline_ns)
{
    return (int)WAITING(.kind = IO_POLL, .fd = fd, .flags = events, .deadline_ns = deadline_ns);
}

/* ---- signals, worker threads ---- */

int io_signal_open(const int *signals, size_t n)
{
    return (int)AT_ONCE(.kind = IO_SIGNALS, .buf = (void *)signals, .length = n);
}

int io_signal_wait(int fd)
{
    struct signalfd_siginfo info;
    ssize_t r = io_recv(fd, &info, sizeof info);
    if (r < 0)
        return (int)r;
    return r == sizeof info ? (int)info.ssi_signo : -EIO;
}

int worker_run(int (*fn)(void *arg), void *arg)
{
    task_check_may_wait("a worker");
    return (int)AT_ONCE(.kind = IO_WORKER, .fn = fn, .ret = arg);
}
