/* Files, sockets and processes' signals: every call waits as a task, none blocks the loop,
 * all return 0 or a count, or -errno. This is the seam: a simulator takes the place of the
 * table behind these functions, and then no descriptor is a real one.
 *
 * Reads and writes of files and sockets may be short, as the kernel's are, unless a function
 * says _full. A buffer is the kernel's until the call returns, cancelled or not; a call
 * that was submitted to a file is not cancelled half way. Calls that wait for a peer (recv,
 * send, accept, connect, poll) are cancellable. A task that is cancelled already, and not
 * shielded, gets -ECANCELED from all of them and nothing has been done; worker_run and what
 * is marked "at once" do their work all the same. */
#pragma once

#include "base/range.h"
#include "rt/task.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>

/* ---- files ---- */
int io_open(const char *path, int flags, mode_t mode); /* the descriptor; O_CLOEXEC is added */
void io_close(int fd);                                 /* at once; -1 is left alone */
ssize_t io_pread(int fd, void *buf, size_t n, uint64_t offset);
ssize_t io_pwrite(int fd, const void *buf, size_t n, uint64_t offset, int rw_flags); /* RWF_DSYNC */
int io_pread_full(int fd, void *buf, size_t n, uint64_t offset); /* end of file reads as zeroes */
int io_pwrite_full(int fd, const void *buf, size_t n, uint64_t offset, int rw_flags);
int io_fdatasync(int fd);
int io_fsync(int fd);
int io_fallocate(int fd, int mode, uint64_t offset, uint64_t length);
int io_ftruncate(int fd, uint64_t size_bytes);
int io_fstat(int fd, struct stat *ret);
int io_stat(const char *path, struct stat *ret);
/* With the time of birth, where the file system knows it (stx_mask has STATX_BTIME). */
int io_statx(const char *path, struct statx *ret);
int io_fstatx(int fd, struct statx *ret);
int io_fstatfs(int fd, struct statfs *ret);
/* SEEK_DATA or SEEK_HOLE from OFFSET; the position, or -ENXIO past the last data. */
int64_t io_seek(int fd, uint64_t offset, int whence);
/* The stretches of WITHIN that have data, in order and cut to it, at most N (then there may be more
 * behind the last): how many, or -errno where the file system cannot tell. */
int io_data(int fd, struct range within, struct range *ret, unsigned n);
/* An open file description lock (F_OFD_SETLK) on [offset, offset+length); TYPE F_RDLCK,
 * F_WRLCK, F_UNLCK. -EAGAIN when another holds it. */
int io_lock(int fd, int type, uint64_t offset, uint64_t length);
/* Is there another's lock that would stop TYPE? 0 no, 1 yes (F_OFD_GETLK). */
int io_lock_test(int fd, int type, uint64_t offset, uint64_t length);
int io_unlink(const char *path);
int io_rename(const char *from, const char *to);
int io_link(const char *from, const char *to); /* -EEXIST rather than replacing */
int io_mkdir(const char *path, mode_t mode);
int io_sync_dir_of(const char *path);                   /* fsync of the directory that holds PATH */
int io_ioctl(int fd, unsigned long request, void *arg); /* on a worker thread */
/* The resolved path (realpath); caller frees *RET. */
int io_realpath(const char *path, char **ret);
/* The names in a directory, in no order, each with a NUL behind it, and after the last an empty
 * one; caller frees *RET. */
int io_list(const char *path, char **ret);
/* The first LENGTH bytes of a file as memory, shared with whoever has it mapped and outliving
 * all of them as the file does. Who maps has reserved its pages (io_fallocate), or a full file
 * system is a SIGBUS later. Up to MAP_TOUCHED_MAX (world.h) they are touched here, not at first
 * use: of more than that most may never be used. */
int io_map(int fd, size_t length, void **ret);
/* Whoever calls need not wait until the pages of a large mapping are free: a thread frees them. */
void io_unmap(void *at, size_t length);

/* ---- this boot of the machine ---- */
enum { BOOT_ID_BYTES = 16 };
int io_boot_id(uint8_t ret[BOOT_ID_BYTES]); /* random, the same until the next boot */
int io_boot_us(uint64_t *ret);              /* when it began, by clock_wall_us(), to 10 ms */

/* ---- sockets, pipes, terminals ---- */
int io_socket(int domain, int type,
              int protocol);   /* at once; so are those up to io_unlink_socket */
int io_socketpair(int ret[2]); /* AF_UNIX, SOCK_STREAM */
int io_bind(int fd, const struct sockaddr *addr, socklen_t length);
int io_listen(int fd, int backlog);
int io_setsockopt(int fd, int level, int name, const void *value, socklen_t length);
int io_getsockopt(int fd, int level, int name, void *value, socklen_t *length);
int io_sockname(int fd, struct sockaddr_storage *ret, socklen_t *length); /* our end */
int io_peername(int fd, struct sockaddr_storage *ret, socklen_t *length); /* the other */
int io_unlink_socket(const char *path); /* its file, for bind and after close */
int io_connect(int fd, const struct sockaddr *addr, socklen_t length);
int io_accept(int fd);
ssize_t io_recv(int fd, void *buf, size_t n); /* 0: end of stream; also for pipes and ttys */
ssize_t io_send(int fd, const void *buf, size_t n);
int io_recv_full(int fd, void *buf, size_t n); /* -ECONNRESET when the stream ends early */
int io_sendv_full(int fd, struct iovec *iov, int count); /* iov is changed */
/* Waits for POLLIN/POLLOUT; the events, or -ETIMEDOUT at DEADLINE_NS (NEVER_NS: no limit). */
int io_poll(int fd, int events, uint64_t deadline_ns);
void io_shutdown(int fd); /* at once, both ways: whoever waits on it ends */

/* ---- signals ---- */
/* Blocks these signals for the whole process (call before threads are made) and returns a
 * descriptor; io_signal_wait waits for the next one and returns its number. */
int io_signal_open(const int *signals, size_t n);
int io_signal_wait(int fd);

/* ---- worker threads ---- */
/* Runs FN(ARG) on a worker thread and returns its result: a pure function over lent
 * buffers, or a call that blocks. Not cancellable. */
int worker_run(int (*fn)(void *arg), void *arg);
