/* Descriptors through the loop: files, sockets, pipes, timers, signals, worker threads. Runs
 * on io_uring and, with TIDEMARK_LOOP=threads, on the thread backend. */
#include "unit.h"

#include "rt/clock.h"
#include "rt/io.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MS ((uint64_t)1000000)

static int run(task_fn *fn)
{
    return loop_run(LOOP_AUTO, fn, NULL);
}

#define IN_LOOP(name)                                                                              \
    static int name##_task(void *arg);                                                             \
    static void name(void **state)                                                                 \
    {                                                                                              \
        assert_int_equal(run(name##_task), 0);                                                     \
    }                                                                                              \
    static int name##_task(void *arg)

/* ---- files ---- */

static char *scratch_dir(void)
{
    static char path[] = "/tmp/tidemark-io-XXXXXX";
    static bool made;
    if (!made) {
        assert_non_null(mkdtemp(path));
        made = true;
    }
    return path;
}

static int remove_dir(void **state)
{
    rmdir(scratch_dir());
    return 0;
}

static void in_dir(char *path, size_t n, const char *name)
{
    snprintf(path, n, "%s/%s", scratch_dir(), name);
}

static int open_scratch(char *path, size_t n)
{
    in_dir(path, n, "file");
    int fd = io_open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    return fd;
}

IN_LOOP(a_file_keeps_what_is_written)
{
    char path[128], buf[10000], back[10000];
    int fd = open_scratch(path, sizeof path);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    for (size_t i = 0; i < sizeof buf; i++)
        buf[i] = (char)(i * 7);
    assert_int_equal(io_pwrite_full(fd, buf, sizeof buf, 5000, 0), 0);
    assert_int_equal(io_pwrite_full(fd, "sync", 4, 100, RWF_DSYNC), 0);
    assert_int_equal(io_fdatasync(fd), 0);
    assert_int_equal(io_fsync(fd), 0);
    assert_int_equal(io_pread(fd, back, sizeof back, 5000), sizeof back);
    assert_memory_equal(buf, back, sizeof buf);
    assert_int_equal(io_pread(fd, back, 100, 14990), 10); /* short at the end */
    assert_int_equal(io_pread(fd, back, 100, 20000), 0);
    memset(back, 1, sizeof back);
    assert_int_equal(io_pread_full(fd, back, 100, 14990), 0); /* zeroes beyond it */
    assert_memory_equal(back, buf + 9990, 10);
    for (int i = 10; i < 100; i++)
        assert_int_equal(back[i], 0);
    assert_int_equal(io_pread_full(fd, back, 4, 100), 0);
    assert_memory_equal(back, "sync", 4);

    struct stat st;
    assert_int_equal(io_fstat(fd, &st), 0);
    assert_int_equal(st.st_size, 15000);
    assert_int_equal(io_ftruncate(fd, MiB), 0);
    assert_int_equal(io_stat(path, &st), 0);
    assert_int_equal(st.st_size, MiB);
    int r = io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192);
    assert_true(r == 0 || r == -EOPNOTSUPP);
    int64_t data = io_seek(fd, 0, SEEK_DATA);
    assert_int_equal(data, 0);
    assert_int_equal(io_seek(fd, MiB, SEEK_DATA), -ENXIO);
    assert_int_equal(io_seek(fd, 0, SEEK_END), MiB);
    struct range stretches[3];
    int n = io_data(fd, range_make(0, MiB), stretches, 3);
    assert_in_range(n, 1, 2);
    assert_int_equal(stretches[0].start, 0);
    if (r == 0 && n == 2) { /* what has been cut out parts them */
        assert_int_equal(range_end(stretches[0]), 4096);
        assert_int_equal(stretches[1].start, 12288);
        assert_int_equal(io_data(fd, range_make(0, MiB), stretches, 1), 1);
        assert_int_equal(io_data(fd, range_make(4096, 8192), stretches, 3), 0);
        assert_int_equal(io_data(fd, range_make(100, 12288), stretches, 3), 2);
        assert_int_equal(stretches[0].start, 100);
        assert_int_equal(range_end(stretches[1]), 12388);
    }
    assert_int_equal(io_data(fd, range_make(2 * MiB, MiB), stretches, 3), 0);

    char other[128], *real = NULL;
    in_dir(other, sizeof other, "other");
    assert_int_equal(io_rename(path, other), 0);
    assert_int_equal(io_sync_dir_of(other), 0);
    char *names = NULL;
    assert_int_equal(io_list(scratch_dir(), &names), 0);
    assert_int_equal(memcmp(names, "other\0", 7), 0);
    free(names);
    assert_int_equal(io_list(other, &names), -ENOTDIR);
    assert_int_equal(io_realpath(other, &real), 0);
    assert_string_equal(real, other);
    free(real);
    assert_int_equal(io_unlink(other), 0);
    assert_int_equal(io_stat(other, &st), -ENOENT);
    assert_int_equal(io_realpath(other, &real), -ENOENT);
    assert_int_equal(io_open(other, O_RDONLY, 0), -ENOENT);
    in_dir(other, sizeof other, "dir");
    assert_int_equal(io_mkdir(other, 0700), 0);
    assert_int_equal(io_mkdir(other, 0700), -EEXIST);
    rmdir(other);
    io_close(fd);
    io_close(-1);
    assert_int_equal(io_pread(fd, back, 1, 0), -EBADF);
    assert_int_equal(io_pwrite(fd, back, 1, 0, 0), -EBADF);
    return 0;
}

IN_LOOP(locks_are_the_open_files)
{
    char path[128];
    int a = open_scratch(path, sizeof path);
    int b = io_open(path, O_RDWR, 0);
    assert_int_equal(io_lock(a, F_RDLCK, 100, 1), 0);
    assert_int_equal(io_lock(b, F_RDLCK, 100, 1), 0);
    assert_int_equal(io_lock(b, F_WRLCK, 100, 1), -EAGAIN);
    assert_int_equal(io_lock_test(b, F_WRLCK, 100, 1), 1);
    assert_int_equal(io_lock_test(b, F_WRLCK, 101, 1), 0);
    assert_int_equal(io_lock_test(a, F_RDLCK, 100, 1), 0);
    assert_int_equal(io_lock(b, F_UNLCK, 100, 1), 0);
    io_close(a);
    assert_int_equal(io_lock_test(b, F_WRLCK, 100, 1), 0);
    io_close(b);
    io_unlink(path);
    return 0;
}

enum { BLOCKS = 512, BLOCK = 4096 };

struct block_job {
    int fd, index;
    unsigned char buf[BLOCK];
};

static int writes_and_reads_a_block(void *arg)
{
    struct block_job *j = arg;
    memset(j->buf, j->index * 31, BLOCK);
    int r = io_pwrite_full(j->fd, j->buf, BLOCK, (uint64_t)j->index * BLOCK, 0);
    memset(j->buf, 0, BLOCK);
    if (r == 0)
        r = io_pread_full(j->fd, j->buf, BLOCK, (uint64_t)j->index * BLOCK);
    for (int i = 0; i < BLOCK; i++)
        assert_int_equal(j->buf[i], (unsigned char)(j->index * 31));
    return r;
}

/* More at once than any ring has room for. */
IN_LOOP(hundreds_of_requests_in_flight)
{
    char path[128];
    int fd = open_scratch(path, sizeof path);
    struct block_job *jobs = xcalloc(BLOCKS, sizeof *jobs);
    {
        SCOPE(s);
        for (int i = 0; i < BLOCKS; i++) {
            jobs[i].fd = fd;
            jobs[i].index = i;
            scope_spawn(&s, writes_and_reads_a_block, &jobs[i]);
        }
        assert_int_equal(scope_join(&s), 0);
    }
    free(jobs);
    io_close(fd);
    io_unlink(path);
    return 0;
}

struct cancelled_read {
    int fd;
    ssize_t before, result, after;
    char buf[BLOCK];
};

static int reads_and_is_cancelled(void *arg)
{
    struct cancelled_read *c = arg;
    c->result = io_pwrite(c->fd, c->buf, BLOCK, 0, RWF_DSYNC);
    c->after = io_pread(c->fd, c->buf, BLOCK, 0);
    SHIELD();
    assert_int_equal(io_pread(c->fd, c->buf, BLOCK, 0), BLOCK);
    return 0;
}

/* What was submitted is awaited; what comes after the cancellation does not begin. */
IN_LOOP(a_file_operation_is_awaited_when_cancelled)
{
    char path[128];
    struct cancelled_read *c = xnew(struct cancelled_read);
    c->fd = open_scratch(path, sizeof path);
    {
        SCOPE(s);
        scope_spawn(&s, reads_and_is_cancelled, c);
        assert_int_equal(task_yield(), 0);
        scope_cancel(&s);
        assert_int_equal(scope_join(&s), 0);
    }
    assert_int_equal(c->result, BLOCK);
    assert_int_equal(c->after, -ECANCELED);
    io_close(c->fd);
    io_unlink(path);
    free(c);
    return 0;
}

/* ---- sockets and pipes ---- */

static int echoes(void *arg)
{
    int fd = *(int *)arg;
    char buf[3000];
    for (;;) {
        ssize_t n = io_recv(fd, buf, sizeof buf);
        if (n <= 0)
            return (int)n;
        struct iovec iov[3] = {{buf, (size_t)n / 2}, {NULL, 0}, {buf + n / 2, (size_t)(n - n / 2)}};
        int r = io_sendv_full(fd, iov, 3);
        if (r < 0)
            return r;
    }
}

static int sends_a_lot(void *arg)
{
    int fd = *(int *)arg;
    char *buf = xcalloc(1, 4 * MiB);
    for (size_t i = 0; i < 4 * MiB; i++)
        buf[i] = (char)(i % 251);
    struct iovec iov[2] = {{buf, 100}, {buf + 100, 4 * MiB - 100}};
    int r = io_sendv_full(fd, iov, 2);
    free(buf);
    return r;
}

static void expect_a_lot(int fd)
{
    char *buf = xcalloc(1, 4 * MiB);
    assert_int_equal(io_recv_full(fd, buf, 4 * MiB), 0);
    for (size_t i = 0; i < 4 * MiB; i++)
        if (buf[i] != (char)(i % 251))
            fail_msg("byte %zu differs", i);
    free(buf);
}

IN_LOOP(four_megabytes_go_through_a_socket_and_back)
{
    int fds[2];
    assert_int_equal(io_socketpair(fds), 0);
    SCOPE(s);
    scope_spawn(&s, echoes, &fds[1]);
    scope_spawn(&s, sends_a_lot, &fds[0]);
    expect_a_lot(fds[0]);
    char c;
    io_shutdown(fds[0]);
    assert_int_equal(scope_join(&s), 0);
    assert_int_equal(io_recv_full(fds[0], &c, 1), -ECONNRESET);
    io_close(fds[0]);
    io_close(fds[1]);
    return 0;
}

IN_LOOP(and_through_a_pipe)
{
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    SCOPE(s);
    scope_spawn(&s, sends_a_lot, &fds[1]);
    expect_a_lot(fds[0]);
    assert_int_equal(scope_join(&s), 0);
    io_close(fds[0]);
    assert_int_equal(io_send(fds[1], "x", 1), -EPIPE); /* and we live */
    io_close(fds[1]);
    return 0;
}

IN_LOOP(a_peer_that_has_gone_is_an_error_not_a_signal)
{
    int fds[2];
    assert_int_equal(io_socketpair(fds), 0);
    io_close(fds[1]);
    assert_int_equal(io_send(fds[0], "x", 1), -EPIPE);
    struct iovec iov = {(char[]){"x"}, 1};
    assert_int_equal(io_sendv_full(fds[0], &iov, 1), -EPIPE);
    io_close(fds[0]);
    return 0;
}

static int accepts_and_echoes(void *arg)
{
    int fd = io_accept(*(int *)arg);
    if (fd < 0)
        return fd;
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    int r = echoes(&fd);
    io_close(fd);
    return r;
}

static void talks(const struct sockaddr *addr, socklen_t length, int listener)
{
    SCOPE(s);
    for (int i = 0; i < 3; i++)
        scope_spawn(&s, accepts_and_echoes, &listener);
    int fd[3];
    for (int i = 0; i < 3; i++) {
        fd[i] = io_socket(addr->sa_family, SOCK_STREAM, 0);
        assert_true(fd[i] >= 0);
        assert_int_equal(io_connect(fd[i], addr, length), 0);
    }
    for (int i = 2; i >= 0; i--) {
        char back[5];
        assert_int_equal(io_send(fd[i], "hello", 5), 5);
        assert_int_equal(io_recv_full(fd[i], back, 5), 0);
        assert_memory_equal(back, "hello", 5);
        io_close(fd[i]);
    }
    assert_int_equal(scope_join(&s), 0);
}

IN_LOOP(clients_connect_by_tcp)
{
    int listener = io_socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    assert_int_equal(io_setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one), 0);
    assert_int_equal(io_bind(listener, (struct sockaddr *)&addr, sizeof addr), 0);
    assert_int_equal(io_listen(listener, 10), 0);
    struct sockaddr_storage name;
    socklen_t length = sizeof name;
    assert_int_equal(io_sockname(listener, &name, &length), 0);
    talks((struct sockaddr *)&name, length, listener);
    io_close(listener);
    int fd = io_socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(io_connect(fd, (struct sockaddr *)&name, length), -ECONNREFUSED);
    io_close(fd);
    return 0;
}

IN_LOOP(clients_connect_by_unix_socket)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    in_dir(addr.sun_path, sizeof addr.sun_path, "socket");
    int fd = io_socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(io_connect(fd, (struct sockaddr *)&addr, sizeof addr), -ENOENT);
    io_close(fd);
    int listener = io_socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(io_bind(listener, (struct sockaddr *)&addr, sizeof addr), 0);
    assert_int_equal(io_listen(listener, 10), 0);
    talks((struct sockaddr *)&addr, sizeof addr, listener);
    io_close(listener);
    return io_unlink(addr.sun_path);
}

/* ---- cancelling what waits for a peer ---- */

struct waits {
    int fd;
    int kind;
    int64_t result;
};

static int waits_for_a_peer(void *arg)
{
    struct waits *w = arg;
    static char big[8 * 1024 * 1024];
    char buf[10];
    struct iovec iov = {big, sizeof big};
    switch (w->kind) {
    case 0:
        w->result = io_recv(w->fd, buf, sizeof buf);
        break;
    case 1:
        w->result = io_accept(w->fd);
        break;
    case 2:
        w->result = io_poll(w->fd, POLLIN, NEVER_NS);
        break;
    case 3:
        w->result = io_sendv_full(w->fd, &iov, 1);
        break;
    case 4:
        w->result = sleep_until(NEVER_NS);
        break;
    case 5:
        w->result = io_poll(w->fd, POLLIN, clock_after_ns(3600 * NSEC_PER_SEC));
        break;
    }
    return (int)w->result;
}

static int listening(void)
{
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = io_socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(io_bind(fd, (struct sockaddr *)&addr, sizeof addr), 0);
    assert_int_equal(io_listen(fd, 1), 0);
    return fd;
}

IN_LOOP(waiting_for_a_peer_can_be_cancelled)
{
    for (int round = 0; round < 2; round++) {
        int fds[2], pipes[2], listener = listening();
        assert_int_equal(io_socketpair(fds), 0);
        assert_int_equal(pipe(pipes), 0);
        struct waits w[] = {
            {fds[0], 0}, {listener, 1}, {fds[0], 2},   {fds[1], 3},
            {-1, 4},     {fds[0], 5},   {pipes[0], 0}, {pipes[0], 2},
        };
        w[3].fd = fds[0]; /* its peer does not read */
        SCOPE(s);
        for (size_t i = 0; i < ARRAY_SIZE(w); i++)
            scope_spawn(&s, waits_for_a_peer, &w[i]);
        if (round == 1) /* after they have gone to the kernel; otherwise before */
            assert_int_equal(sleep_until(clock_after_ns(5 * MS)), 0);
        else
            assert_int_equal(task_yield(), 0);
        scope_cancel(&s);
        assert_int_equal(scope_join(&s), 0);
        for (size_t i = 0; i < ARRAY_SIZE(w); i++)
            if (w[i].result != -ECANCELED)
                fail_msg("wait %zu returned %lld", i, (long long)w[i].result);
        for (int i = 0; i < 2; i++) {
            io_close(fds[i]);
            io_close(pipes[i]);
        }
        io_close(listener);
    }
    return 0;
}

IN_LOOP(shutdown_ends_who_waits_on_the_socket)
{
    int fds[2];
    assert_int_equal(io_socketpair(fds), 0);
    struct waits w = {fds[0], 0};
    SCOPE(s);
    scope_spawn(&s, waits_for_a_peer, &w);
    assert_int_equal(sleep_until(clock_after_ns(MS)), 0);
    io_shutdown(fds[0]);
    assert_int_equal(scope_join(&s), 0);
    assert_int_equal(w.result, 0);
    io_close(fds[0]);
    io_close(fds[1]);
    return 0;
}

enum { CROWD = 6000 }; /* more than the completion queue has room for */

IN_LOOP(thousands_wait_on_one_socket_and_end_at_once)
{
    int fds[2];
    assert_int_equal(io_socketpair(fds), 0);
    struct waits *w = xcalloc(CROWD, sizeof *w);
    {
        SCOPE(s);
        for (int i = 0; i < CROWD; i++) {
            w[i] = (struct waits){fds[0], 0, -1};
            scope_spawn(&s, waits_for_a_peer, &w[i]);
        }
        assert_int_equal(sleep_until(clock_after_ns(MS)), 0);
        io_shutdown(fds[0]);
        assert_int_equal(scope_join(&s), 0);
    }
    for (int i = 0; i < CROWD; i++)
        assert_int_equal(w[i].result, 0);
    free(w);
    io_close(fds[0]);
    io_close(fds[1]);
    return 0;
}

/* As a server ends: shut down, and closed before those who wait for a client have noticed. */
IN_LOOP(a_listener_that_is_closed_ends_its_accepts)
{
    for (int i = 0; i < 2; i++) {
        struct sockaddr_un addr = {.sun_family = AF_UNIX};
        in_dir(addr.sun_path, sizeof addr.sun_path, "socket");
        int fd = i ? io_socket(AF_UNIX, SOCK_STREAM, 0) : listening();
        if (i) {
            assert_int_equal(io_bind(fd, (struct sockaddr *)&addr, sizeof addr), 0);
            assert_int_equal(io_listen(fd, 1), 0);
            assert_int_equal(io_unlink_socket(addr.sun_path), 0);
            assert_int_equal(io_unlink_socket(addr.sun_path), -ENOENT);
        }
        struct waits w = {fd, 1};
        SCOPE(s);
        scope_spawn(&s, waits_for_a_peer, &w);
        assert_int_equal(sleep_until(clock_after_ns(MS)), 0);
        io_shutdown(fd);
        io_close(fd);
        int r = scope_join(&s);
        assert_true(r == -EINVAL || r == -EBADF);
    }
    return 0;
}

/* A descriptor's number comes back for another file; what is known of the old one must not. */
IN_LOOP(descriptors_come_and_go)
{
    for (int i = 0; i < 50; i++) {
        int fds[2];
        assert_int_equal(io_socketpair(fds), 0);
        SCOPE(s);
        scope_spawn(&s, echoes, &fds[1]);
        assert_int_equal(task_yield(), 0);
        char c = 'x';
        assert_int_equal(io_send(fds[0], &c, 1), 1);
        assert_int_equal(io_recv(fds[0], &c, 1), 1);
        io_shutdown(fds[0]);
        assert_int_equal(scope_join(&s), 0);
        io_close(fds[0]);
        io_close(fds[1]);
    }
    return 0;
}

IN_LOOP(poll_tells_events_and_times_out)
{
    int fds[2];
    assert_int_equal(io_socketpair(fds), 0);
    uint64_t start = clock_now_ns();
    assert_int_equal(io_poll(fds[0], POLLIN, start + 10 * MS), -ETIMEDOUT);
    assert_true(clock_now_ns() >= start + 10 * MS);
    assert_int_equal(io_poll(fds[0], POLLIN, 0), -ETIMEDOUT); /* a moment long ago */
    assert_int_equal(io_poll(fds[0], POLLOUT, NEVER_NS), POLLOUT);
    assert_int_equal(io_send(fds[1], "x", 1), 1);
    assert_int_equal(io_poll(fds[0], POLLIN | POLLOUT, NEVER_NS), POLLIN | POLLOUT);
    io_close(fds[1]);
    assert_true(io_poll(fds[0], POLLIN, NEVER_NS) & POLLHUP);
    io_close(fds[0]);
    assert_int_equal(io_poll(fds[0], POLLIN, NEVER_NS), -EBADF);
    return 0;
}

/* ---- timers ---- */

static int naps(void *arg)
{
    uint64_t deadline_ns = *(uint64_t *)arg;
    int r = sleep_until(deadline_ns);
    assert_true(clock_now_ns() >= deadline_ns);
    return r;
}

/* (In which order, test_world knows: there nothing but the clock counts.) */
IN_LOOP(nobody_wakes_before_its_deadline)
{
    uint64_t deadline_ns[20];
    uint64_t start = clock_now_ns() + 2 * MS;
    SCOPE(s);
    for (int i = 0; i < 20; i++) {
        deadline_ns[i] = start + (uint64_t)(i * 7 % 20) * MS / 4;
        scope_spawn(&s, naps, &deadline_ns[i]);
    }
    return scope_join(&s);
}

IN_LOOP(an_event_can_be_awaited_until_a_moment)
{
    struct event e;
    event_init(&e);
    uint64_t start = clock_now_ns();
    assert_int_equal(event_wait_until(&e, start + 5 * MS), -ETIMEDOUT);
    assert_true(clock_now_ns() >= start + 5 * MS);
    assert_int_equal(event_wait_until(&e, 0), -ETIMEDOUT);
    event_set(&e);
    assert_int_equal(event_wait_until(&e, 0), 0);
    uint64_t wall = clock_wall_us();
    assert_true(wall > UINT64_C(1600000000) * 1000000);
    return 0;
}

/* ---- worker threads ---- */

struct crew {
    int inside; /* atomic: how many threads are in there now */
    bool go;    /* atomic: let them out */
    pthread_t ran;
};

static int waits_to_be_let_out(void *arg)
{
    struct crew *c = arg;
    c->ran = pthread_self();
    __atomic_add_fetch(&c->inside, 1, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&c->go, __ATOMIC_SEQ_CST))
        usleep(200);
    return 17;
}

static int works(void *arg)
{
    return worker_run(waits_to_be_let_out, arg) == 17 ? 0 : -EIO;
}

/* None of them ends before all are there, and the loop sees that they are. */
IN_LOOP(workers_run_beside_the_loop_and_each_other)
{
    struct crew c = {0};
    SCOPE(s);
    for (int i = 0; i < 4; i++)
        scope_spawn(&s, works, &c);
    while (__atomic_load_n(&c.inside, __ATOMIC_SEQ_CST) < 4)
        assert_int_equal(sleep_until(clock_after_ns(MS / 2)), 0);
    __atomic_store_n(&c.go, true, __ATOMIC_SEQ_CST);
    assert_int_equal(scope_join(&s), 0);
    assert_false(pthread_equal(c.ran, pthread_self()));
    return 0;
}

static int adds_one(void *arg)
{
    __atomic_add_fetch((int *)arg, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static int adds_one_on_a_worker(void *arg)
{
    return worker_run(adds_one, arg);
}

IN_LOOP(more_work_than_workers)
{
    int sum = 0;
    SCOPE(s);
    for (int i = 0; i < 500; i++)
        scope_spawn(&s, adds_one_on_a_worker, &sum);
    assert_int_equal(scope_join(&s), 0);
    assert_int_equal(sum, 500);
    return 0;
}

static int works_though_cancelled(void *arg)
{
    assert_int_equal(task_yield(), -ECANCELED);
    assert_int_equal(adds_one_on_a_worker(arg), 0);
    return 0;
}

IN_LOOP(a_worker_is_never_cancelled)
{
    int sum = 0;
    SCOPE(s);
    scope_cancel(&s);
    scope_spawn(&s, works_though_cancelled, &sum);
    assert_int_equal(scope_join(&s), 0);
    assert_int_equal(sum, 1);
    return 0;
}

/* ---- signals ---- */

static int waits_for_a_signal(void *arg)
{
    return io_signal_wait(*(int *)arg) == SIGUSR1 ? 0 : -EIO;
}

IN_LOOP(a_signal_wakes_its_task)
{
    int signals[] = {SIGUSR1, SIGUSR2};
    int fd = io_signal_open(signals, 2);
    assert_true(fd >= 0);
    {
        SCOPE(s);
        scope_spawn(&s, waits_for_a_signal, &fd);
        assert_int_equal(sleep_until(clock_after_ns(MS)), 0);
        kill(getpid(), SIGUSR1);
        assert_int_equal(scope_join(&s), 0);
    }
    kill(getpid(), SIGUSR2);
    assert_int_equal(io_signal_wait(fd), SIGUSR2);
    {
        SCOPE(s);
        scope_spawn(&s, waits_for_a_signal, &fd);
        assert_int_equal(sleep_until(clock_after_ns(MS)), 0);
    }
    io_close(fd);
    return 0;
}

/* ---- which backend ---- */

static int compares_backend(void *arg)
{
    return strcmp(loop_backend_name(), arg) ? -EIO : 0;
}

static void the_backend_is_the_chosen_one(void **state)
{
    char *want = getenv("TIDEMARK_LOOP");
    if (want)
        assert_int_equal(loop_run(LOOP_AUTO, compares_backend, want), 0);
    assert_int_equal(loop_run(LOOP_THREADS, compares_backend, (char[]){"threads"}), 0);
    assert_string_equal(loop_backend_name(), "none");
}

/* As a container's filter does: the call is refused with EPERM. */
static int refuse_call(unsigned call)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {ARRAY_SIZE(filter), filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static void the_threads_take_over_where_io_uring_is_refused(void **state)
{
    static const unsigned calls[] = {SYS_io_uring_setup, SYS_io_uring_enter};
    for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
        pid_t child = fork();
        if (child == 0) {
            unsetenv("TIDEMARK_LOOP");
            if (refuse_call(calls[i]))
                _exit(77);
            if (loop_run(LOOP_IO_URING, compares_backend, (char[]){"io_uring"}) >= 0)
                _exit(2);
            _exit(loop_run(LOOP_AUTO, compares_backend, (char[]){"threads"}) ? 3 : 0);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        if (WEXITSTATUS(status) != 77) /* no filters here */
            assert_int_equal(WEXITSTATUS(status), 0);
    }
}

static void *another_loop(void *arg)
{
    *(int *)arg = loop_run(LOOP_AUTO, four_megabytes_go_through_a_socket_and_back_task, NULL);
    return NULL;
}

static void two_loops_in_one_process(void **state)
{
    pthread_t thread[2];
    int result[2] = {-1, -1};
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, another_loop, &result[i]), 0);
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        assert_int_equal(result[i], 0);
    }
}

IN_LOOP(random_bytes_are_not_all_the_same)
{
    unsigned char a[64] = {0}, b[64] = {0};
    random_bytes(a, sizeof a);
    random_bytes(b, sizeof b);
    assert_memory_not_equal(a, b, sizeof a);
    return 0;
}

static bool is_mapped(const char *path)
{
    char line[600];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "r");
    assert_non_null(maps);
    while (fgets(line, sizeof line, maps))
        found |= strstr(line, path) != NULL;
    fclose(maps);
    return found;
}

/* So large that nobody waits until it is gone; but it goes. */
IN_LOOP(a_large_mapping_goes_by_itself)
{
    enum { BYTES = 16 << 20 };
    char path[200], read_back[5] = "";
    void *at = NULL;
    in_dir(path, sizeof path, "large");
    int fd = io_open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(io_fallocate(fd, 0, 0, BYTES), 0);
    assert_int_equal(io_map(fd, BYTES, &at), 0);
    memcpy((char *)at + BYTES - 5, "tide", 5);
    assert_true(is_mapped(path));
    io_unmap(at, BYTES);
    assert_int_equal(io_pread_full(fd, read_back, 5, BYTES - 5), 0);
    assert_string_equal(read_back, "tide");
    for (int i = 0; i < 3000 && is_mapped(path); i++)
        assert_int_equal(sleep_until(clock_after_ns(NSEC_PER_SEC / 100)), 0);
    assert_false(is_mapped(path));
    io_close(fd);
    return 0;
}

IN_LOOP(a_mapped_file_is_the_files_own_memory)
{
    char path[200], other[200], read_back[5] = "";
    void *a = NULL, *b = NULL;
    in_dir(path, sizeof path, "mapped");
    in_dir(other, sizeof other, "linked");
    int fd = io_open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(io_fallocate(fd, 0, 0, 8192), 0);
    assert_int_equal(io_map(fd, 8192, &a), 0);
    assert_int_equal(io_map(fd, 8192, &b), 0);
    memcpy((char *)a + 4096, "tide", 5);
    assert_string_equal((char *)b + 4096, "tide");
    io_unmap(a, 8192);
    assert_int_equal(io_pread_full(fd, read_back, 5, 4096), 0);
    assert_string_equal(read_back, "tide");
    io_unmap(b, 8192);

    struct statx by_fd, by_path;
    struct statfs fs;
    assert_int_equal(io_link(path, other), 0);
    assert_int_equal(io_link(path, other), -EEXIST);
    assert_int_equal(io_fstatx(fd, &by_fd), 0);
    assert_int_equal(io_statx(other, &by_path), 0);
    assert_int_equal(by_fd.stx_ino, by_path.stx_ino);
    assert_int_equal(by_path.stx_nlink, 2);
    assert_int_equal(by_path.stx_size, 8192);
    if (by_fd.stx_mask & STATX_BTIME)
        assert_true(by_fd.stx_btime.tv_sec > 0);
    assert_int_equal(io_fstatfs(fd, &fs), 0);
    assert_true(fs.f_type != 0);
    io_close(fd);
    assert_int_equal(io_unlink(path), 0);
    assert_int_equal(io_unlink(other), 0);
    assert_int_equal(io_statx(other, &by_path), -ENOENT);
    return 0;
}

IN_LOOP(a_boot_has_a_name_and_a_beginning)
{
    uint8_t a[BOOT_ID_BYTES] = {0}, b[BOOT_ID_BYTES] = {1};
    uint64_t since = 0, again = 0;
    assert_int_equal(io_boot_id(a), 0);
    assert_int_equal(io_boot_id(b), 0);
    assert_memory_equal(a, b, sizeof a);
    assert_int_equal(io_boot_us(&since), 0);
    assert_int_equal(io_boot_us(&again), 0);
    assert_true(since > 0 && since <= clock_wall_us());
    assert_true(again - since + 20000 < 40000);
    return 0;
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(a_file_keeps_what_is_written),
    cmocka_unit_test(locks_are_the_open_files),
    cmocka_unit_test(a_mapped_file_is_the_files_own_memory),
    cmocka_unit_test(a_large_mapping_goes_by_itself),
    cmocka_unit_test(a_boot_has_a_name_and_a_beginning),
    cmocka_unit_test(hundreds_of_requests_in_flight),
    cmocka_unit_test(a_file_operation_is_awaited_when_cancelled),
    cmocka_unit_test(four_megabytes_go_through_a_socket_and_back),
    cmocka_unit_test(and_through_a_pipe),
    cmocka_unit_test(a_peer_that_has_gone_is_an_error_not_a_signal),
    cmocka_unit_test(clients_connect_by_tcp),
    cmocka_unit_test(clients_connect_by_unix_socket),
    cmocka_unit_test(waiting_for_a_peer_can_be_cancelled),
    cmocka_unit_test(shutdown_ends_who_waits_on_the_socket),
    cmocka_unit_test(thousands_wait_on_one_socket_and_end_at_once),
    cmocka_unit_test(a_listener_that_is_closed_ends_its_accepts),
    cmocka_unit_test(descriptors_come_and_go),
    cmocka_unit_test(poll_tells_events_and_times_out),
    cmocka_unit_test(nobody_wakes_before_its_deadline),
    cmocka_unit_test(an_event_can_be_awaited_until_a_moment),
    cmocka_unit_test(workers_run_beside_the_loop_and_each_other),
    cmocka_unit_test(more_work_than_workers),
    cmocka_unit_test(a_worker_is_never_cancelled),
    cmocka_unit_test(a_signal_wakes_its_task),
    cmocka_unit_test(the_backend_is_the_chosen_one),
    cmocka_unit_test(the_threads_take_over_where_io_uring_is_refused),
    cmocka_unit_test(two_loops_in_one_process),
    cmocka_unit_test_setup_teardown(random_bytes_are_not_all_the_same, NULL, remove_dir),
};
UNIT_MAIN(tests)
