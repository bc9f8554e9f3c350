/* The world as the program sees it: a clock, dice, and descriptors to read and write.
 *
 * This is the seam. rt/clock.h and rt/io.h turn each call into one of the functions below,
 * of the world that the running loop lives in. There are two real ones (io_uring, threads);
 * a simulator is a third: it plugs its own table into loop_run_in(), and then no clock is
 * the kernel's, no random number is new, and no descriptor is a real one. Nothing else in
 * the program reads any of them, which tests/unit/seam.py checks by the objects' symbols. */
#pragma once

#include "rt/io.h"

/* What can be asked of a world. The kinds up to IO_WORKER wait as the task that asks; those
 * after it answer at once, and also outside a loop. */
enum { MAP_TOUCHED_MAX = 4 << 20 }; /* bytes of a mapping that may keep the loop waiting */

enum io_kind {
    /* files: awaited even when the task is cancelled meanwhile */
    IO_OPEN,      /* path, flags, mode */
    IO_READ,      /* fd, buf, length, offset */
    IO_WRITE,     /* fd, buf, length, offset, flags */
    IO_DATASYNC,  /* fd */
    IO_SYNC,      /* fd */
    IO_FALLOCATE, /* fd, flags, offset, length */
    IO_TRUNCATE,  /* fd, offset: the new size */
    IO_FSTAT,     /* fd, ret: struct stat */
    IO_STAT,      /* path, ret: struct stat */
    IO_STATX,     /* fd, or path when it is not NULL; ret: struct statx */
    IO_STATFS,    /* fd, ret: struct statfs */
    IO_SEEK,      /* fd, offset, flags: whence */
    IO_DATA,      /* fd, offset, length, ret: struct range[], flags: how many at most */
    IO_LOCK,      /* fd, flags: type, offset, length */
    IO_LOCK_TEST, /* the same */
    IO_UNLINK,    /* path */
    IO_RENAME,    /* path, path2 */
    IO_LINK,      /* path, path2 */
    IO_MKDIR,     /* path, mode */
    IO_SYNC_DIR,  /* path: of the directory itself */
    IO_IOCTL,     /* fd, request, ret: the argument */
    IO_REALPATH,  /* path, ret: char ** */
    IO_LIST,      /* path, ret: char ** */
    IO_MAP,       /* fd, length, ret: void ** */
    /* what waits for a peer: the world gives up when the task is cancelled */
    IO_RECV,    /* fd, buf, length */
    IO_SEND,    /* fd, buf, length */
    IO_SENDV,   /* fd, buf: struct iovec *, length: how many */
    IO_ACCEPT,  /* fd */
    IO_CONNECT, /* fd, buf: struct sockaddr *, length */
    IO_POLL,    /* fd, flags: events, deadline_ns */
    /* worker threads */
    IO_WORKER, /* fn, ret: its argument */
    /* at once */
    IO_CLOSE,         /* fd */
    IO_UNMAP,         /* buf, length */
    IO_SOCKET,        /* flags, flags2, flags3: domain, type, protocol */
    IO_SOCKETPAIR,    /* ret: int[2] */
    IO_BIND,          /* fd, buf: struct sockaddr *, length */
    IO_LISTEN,        /* fd, flags: backlog */
    IO_SHUTDOWN,      /* fd */
    IO_SETSOCKOPT,    /* fd, flags: level, flags2: name, buf, length */
    IO_GETSOCKOPT,    /* fd, flags: level, flags2: name, ret, ret2: socklen_t * */
    IO_SOCKNAME,      /* fd, ret: struct sockaddr_storage *, ret2: socklen_t * */
    IO_PEERNAME,      /* the same */
    IO_UNLINK_SOCKET, /* path */
    IO_SIGNALS,       /* buf: const int *, length: how many */
};

struct io_op {
    enum io_kind kind;
    int fd;
    int flags, flags2, flags3;
    mode_t mode;
    void *buf; /* what is written is not changed */
    size_t length;
    uint64_t offset;
    uint64_t deadline_ns;
    const char *path, *path2;
    unsigned long request;
    void *ret, *ret2;
    int (*fn)(void *arg);
};

struct world {
    const char *name;
    uint64_t (*now_ns)(struct world *w);
    uint64_t (*wall_us)(struct world *w);
    void (*random)(struct world *w, void *buf, size_t n);

    /* Does OP as the running task, and returns a count, a descriptor or 0, or -errno. */
    int64_t (*perform)(struct world *w, struct io_op *op);

    /* Submits what was asked for, and lets the world move until a task has been woken or
     * DEADLINE_NS has come; with 0 only what has happened by now. False when nobody can
     * ever be woken: no operation is in flight and DEADLINE_NS is NEVER_NS. */
    bool (*turn)(struct world *w, uint64_t deadline_ns);
};

/* As loop_run, in world W, which stays the caller's. */
int loop_run_in(struct world *w, task_fn *main, void *arg);

/* The world of the running loop; outside one, the real one, for its clock, its random
 * numbers and what it answers at once. */
struct world *world_here(void);

/* ---- for worlds: what their perform is made of ---- */

/* Suspends the running task until task_wake(), cancelled or not. */
void task_suspend_uncancelled(void);
/* Lets the others run once, cancelled or not. */
void task_yield_uncancelled(void);
/* For a simulator: the program is killed. No task of the running loop ever runs on, what they
 * hold is not given back, and loop_run_in() returns -EOWNERDEAD. Called by a task it does not
 * return; by the world's turn(), which then returns. */
void loop_die(void);

/* ---- the real worlds ---- */
struct world *world_threads_open(int *error); /* NULL and a negative errno */
void world_threads_close(struct world *w);
struct world *world_uring_open(int *error);
void world_uring_close(struct world *w);
