/* What the runtime costs: a switch pair, a spawn, a lock, a 4 KiB read, a round trip through a
 * socket. `ninja -C build bench/bench_rt; build/bench/bench_rt`, with TIDEMARK_CORO and
 * TIDEMARK_LOOP as for the daemon; best of three. The reads are of a file in the current directory:
 * from the page cache, and by O_DIRECT from the disk. */
#include "rt/clock.h"
#include "rt/coro.h"
#include "rt/io.h"
#include "rt/sync.h"
#include "rt/task.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

enum { BLOCK = 4096 };
#define FILE_BYTES (256 * MiB)

static uint64_t best_ns(int (*fn)(uint64_t n), uint64_t n)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 3; i++) {
        uint64_t start = clock_now_ns();
        if (fn(n) < 0)
            return 0;
        best = min_u64(best, clock_now_ns() - start);
    }
    return best;
}

static const char *only;

static void report(const char *what, int (*fn)(uint64_t n), uint64_t n)
{
    if (only && !strstr(what, only))
        return;
    uint64_t ns = best_ns(fn, n);
    if (!ns)
        printf("%-40s not possible here\n", what);
    else
        printf("%-40s %8.1f ns   %9.0f /s\n", what, (double)ns / (double)n,
               (double)n * 1e9 / (double)ns);
    fflush(stdout);
}

/* ---- switches ---- */

static struct coro here, there;

static void answers(void *arg)
{
    for (;;)
        coro_switch(&there, &here);
}

static int switch_pairs(uint64_t n)
{
    while (n--)
        coro_switch(&here, &there);
    return 0;
}

static int yields_n(void *arg)
{
    int r = 0;
    for (uint64_t n = *(uint64_t *)arg; n-- && r == 0;)
        r = task_yield();
    return r;
}

static int yields(uint64_t n)
{
    SCOPE(s);
    n /= 2;
    scope_spawn(&s, yields_n, &n);
    scope_spawn(&s, yields_n, &n);
    return scope_join(&s);
}

static int nothing(void *arg)
{
    return 0;
}

static int spawns(uint64_t n)
{
    while (n) {
        SCOPE(s);
        for (int i = 0; i < 64 && n; i++, n--)
            scope_spawn(&s, nothing, NULL);
        int r = scope_join(&s);
        if (r < 0)
            return r;
    }
    return 0;
}

static int sleeps(uint64_t n)
{
    while (n--) {
        struct event e;
        event_init(&e);
        int r = event_wait_until(&e, 1);
        if (r != -ETIMEDOUT)
            return r;
    }
    return 0;
}

/* ---- reads ---- */

static int fd;
static uint64_t left;

static int reads(void *arg)
{
    uint64_t x = (uint64_t)(uintptr_t)arg;
    void *buf;
    if (posix_memalign(&buf, BLOCK, BLOCK))
        return -ENOMEM;
    int r = 0;
    while (left && r == 0) {
        left--;
        x = x * 6364136223846793005u + 1442695040888963407u;
        r = io_pread_full(fd, buf, BLOCK, (x >> 33) % (FILE_BYTES / BLOCK) * BLOCK);
    }
    free(buf);
    return r;
}

static int read_with(uint64_t n, int depth)
{
    left = n;
    SCOPE(s);
    for (int i = 0; i < depth; i++)
        scope_spawn(&s, reads, (void *)(uintptr_t)(clock_now_ns() + (uint64_t)i));
    return scope_join(&s);
}

static int reads_1(uint64_t n)
{
    return read_with(n, 1);
}

static int reads_32(uint64_t n)
{
    return read_with(n, 32);
}

static int writes(void *arg)
{
    uint64_t x = (uint64_t)(uintptr_t)arg;
    static char buf[BLOCK] __attribute__((aligned(BLOCK)));
    int r = 0;
    while (left && r == 0) {
        left--;
        x = x * 6364136223846793005u + 1442695040888963407u;
        r = io_pwrite_full(fd, buf, BLOCK, (x >> 33) % (FILE_BYTES / BLOCK) * BLOCK, 0);
    }
    return r;
}

static int writes_32(uint64_t n)
{
    left = n;
    SCOPE(s);
    for (int i = 0; i < 32; i++)
        scope_spawn(&s, writes, (void *)(uintptr_t)(clock_now_ns() + (uint64_t)i));
    return scope_join(&s);
}

static int make_file(const char *path)
{
    CLEANUP(memory_freep) char *buf = malloc(MiB);
    int r = 0;
    fd = io_open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || !buf)
        return fd;
    memset(buf, 1, MiB);
    for (uint64_t at = 0; at < FILE_BYTES && r == 0; at += MiB)
        r = io_pwrite_full(fd, buf, MiB, at, 0);
    return r < 0 ? r : io_fsync(fd);
}

/* ---- sockets ---- */

struct end {
    int fd;
    uint64_t n;
};

static int echoes(void *arg)
{
    struct end *e = arg;
    char c[64];
    for (uint64_t i = 0; i < e->n; i++) {
        int r = io_recv_full(e->fd, c, sizeof c);
        if (r == 0)
            r = io_send(e->fd, c, sizeof c) == sizeof c ? 0 : -EIO;
        if (r < 0)
            return r;
    }
    return 0;
}

static int calls(void *arg)
{
    struct end *e = arg;
    char c[64] = {0};
    for (uint64_t i = 0; i < e->n; i++) {
        int r = io_send(e->fd, c, sizeof c) == sizeof c ? 0 : -EIO;
        if (r == 0)
            r = io_recv_full(e->fd, c, sizeof c);
        if (r < 0)
            return r;
    }
    return 0;
}

static int talk(uint64_t n, int pairs)
{
    struct end end[64][2];
    SCOPE(s);
    for (int i = 0; i < pairs; i++) {
        int fds[2];
        int r = io_socketpair(fds);
        if (r < 0)
            return r;
        for (int k = 0; k < 2; k++) {
            end[i][k] = (struct end){fds[k], n / (uint64_t)pairs};
            scope_spawn(&s, k ? echoes : calls, &end[i][k]);
        }
    }
    int r = scope_join(&s);
    for (int i = 0; i < pairs; i++) {
        io_close(end[i][0].fd);
        io_close(end[i][1].fd);
    }
    return r;
}

static int talk_1(uint64_t n)
{
    return talk(n, 1);
}

static int talk_16(uint64_t n)
{
    return talk(n, 16);
}

static int works(uint64_t n)
{
    int r = 0;
    while (n-- && r == 0)
        r = worker_run(nothing, NULL);
    return r;
}

static int bench(void *arg)
{
    printf("switching by %s, loop on %s\n", coro_kind(), loop_backend_name());
    coro_init_host(&here);
    coro_init(&there, answers, NULL);
    report("switch pair", switch_pairs, 5000000);
    coro_fini(&there);
    coro_fini_host(&here);
    report("yield", yields, 5000000);
    report("spawn, run, end", spawns, 2000000);
    report("wait with a deadline in the past", sleeps, 1000000);
    report("worker thread, one at a time", works, 20000);
    report("socket round trip, one", talk_1, 50000);
    report("socket round trip, 16 at once", talk_16, 200000);

    const char *path = "bench-rt.tmp";
    if (only && !strstr("4 KiB read write O_DIRECT page cache", only))
        return 0;
    if (make_file(path) < 0) {
        io_unlink(path);
        return 1;
    }
    report("4 KiB read, page cache, one", reads_1, 100000);
    report("4 KiB read, page cache, 32 at once", reads_32, 300000);
    report("4 KiB write, page cache, 32 at once", writes_32, 100000);
    io_close(fd);
    fd = io_open(path, O_RDWR | O_DIRECT, 0);
    report("4 KiB read, O_DIRECT, one", reads_1, 5000);
    report("4 KiB read, O_DIRECT, 32 at once", reads_32, 50000);
    report("4 KiB write, O_DIRECT, 32 at once", writes_32, 20000);
    io_close(fd);
    return io_unlink(path);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        only = argv[1];
    return loop_run(LOOP_AUTO, bench, NULL) ? 1 : 0;
}
