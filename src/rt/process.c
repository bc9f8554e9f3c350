#include "rt/process.h"

#include <fcntl.h>
#include <limits.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

void process_keep_memory(void)
{
    mallopt(M_MMAP_THRESHOLD, 32 << 20); /* the most that glibc takes */
    mallopt(M_TRIM_THRESHOLD, PROCESS_KEPT_BYTES);
}

/* ---- background ---- */

static int ready_pipe = -1; /* to the parent, which waits for one byte */

static _Noreturn void wait_for_child(pid_t child, int from_child)
{
    char byte;
    ssize_t n;
    int status;

    do
        n = read(from_child, &byte, 1);
    while (n < 0 && errno == EINTR);
    if (n == 1)
        _exit(EXIT_SUCCESS);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    _exit(WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : EXIT_FAILURE);
}

int process_background_begin(struct error *err)
{
    int fds[2];

    if (pipe2(fds, O_CLOEXEC) < 0)
        return error_set_errno(err, errno, "pipe");
    pid_t child = fork();
    if (child < 0) {
        int code = errno;
        close(fds[0]);
        close(fds[1]);
        return error_set_errno(err, code, "fork");
    }
    if (child > 0) {
        close(fds[1]);
        wait_for_child(child, fds[0]);
    }
    close(fds[0]);
    ready_pipe = fds[1];
    setsid();
    umask(027);
    signal(SIGTSTP, SIG_IGN);
    signal(SIGTTOU, SIG_IGN);
    signal(SIGTTIN, SIG_IGN);
    return 0;
}

void process_background_ready(void)
{
    if (ready_pipe < 0)
        return;
    if (chdir("/") < 0)
        _exit(EXIT_FAILURE);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0)
        _exit(EXIT_FAILURE);
    for (int fd = 0; fd <= 2; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    ssize_t n;
    do
        n = write(ready_pipe, "", 1);
    while (n < 0 && errno == EINTR);
    close(ready_pipe);
    ready_pipe = -1;
}

/* ---- pidfile ---- */

static int lock_whole(int fd)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(fd, F_SETLK, &lock) < 0 ? -errno : 0;
}

/* A locked descriptor of the file that PATH names now; somebody may be removing an older one. */
static int open_locked(const char *path, struct error *err)
{
    for (;;) {
        struct stat mine, named;
        int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        if (fd < 0)
            return error_set_errno(err, errno, "Could not create '%s'", path);
        int r = fstat(fd, &mine) < 0 ? -errno : 0;
        if (r < 0) {
            close(fd);
            return error_set_errno(err, -r, "Cannot stat file");
        }
        r = lock_whole(fd);
        if (r < 0) {
            close(fd);
            return error_set_errno(err, -r, "Cannot lock pid file");
        }
        if (!stat(path, &named) && named.st_ino == mine.st_ino && named.st_dev == mine.st_dev)
            return fd;
        close(fd);
    }
}

int pidfile_create(const char *path, char **resolved, struct error *err)
{
    char text[32];
    int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());

    int fd = open_locked(path, err);
    if (fd < 0)
        return error_wrap(err, "cannot create PID file");
    if (ftruncate(fd, 0) < 0 || write(fd, text, (size_t)n) != n) {
        error_set_errno(err, errno ? errno : EIO, "Failed to write pid file");
        unlink(path);
        close(fd);
        return error_wrap(err, "cannot create PID file");
    }
    *resolved = realpath(path, NULL);
    if (!*resolved) {
        int code = errno;
        unlink(path);
        close(fd);
        return error_set_errno(err, code, "cannot resolve PID file path: %s", path);
    }
    return 0; /* the descriptor stays open: it holds the lock while we live */
}

void pidfile_remove(char *resolved)
{
    if (resolved)
        unlink(resolved);
    free(resolved);
}
