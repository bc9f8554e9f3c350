/* The file driver's own: a regular file of the host, and the locks by which programs that
 * know QEMU's protocol refuse each other. */
#pragma once

#include "block/internal.h"

#include <sys/stat.h>

/* A descriptor outlives the requests that use it, also when the node has gone on to another. */
struct open_file {
    int fd;
    int open_flags;
    unsigned users; /* requests, and the node */
};

struct file_state {
    struct open_file *now;
    bool use_lock;
    bool broken; /* a sync has failed: what the kernel holds of us is not trusted again */
    bool no_punch, no_zero_range; /* the file system cannot */
    dev_t dev;
    ino_t ino;
    uint64_t length; /* of the file, at least */

    unsigned perm, shared;               /* as committed */
    unsigned locked_perm, locked_shared; /* bytes held on fd; locked_shared: what is not shared */
    struct open_file *next;              /* between check_perm and commit_perm */

    /* The last answers of SEEK_DATA and SEEK_HOLE. Counted so that an answer that was under
     * way during a change is not kept. */
    struct range known_data, known_hole;
    uint64_t changes;
    uint64_t discards_ok, discards_failed, discarded_bytes;
};

/* ---- file.c ---- */
/* The name of a new file is durable; where that cannot be had it is told in the log. */
int file_sync_name(const char *path, struct error *err);

/* ---- file_locks.c ---- */
/* Holds the bytes for PERM and what SHARED leaves out, in addition to what is held, and looks
 * whether anybody minds; for two seconds, if so. On error everything is as before. */
int file_locks_prepare(struct node *n, unsigned perm, unsigned shared, struct error *err);
void file_locks_commit(struct node *n, unsigned perm, unsigned shared);
void file_locks_abort(struct node *n);
/* All bytes of a descriptor that is going away, though requests still use it. */
void file_locks_drop(int fd);
/* The same bytes on another descriptor of the same file. */
int file_locks_copy(int fd, unsigned perm, unsigned shared, struct error *err);
/* For a file that is being made: takes and checks. */
int file_locks_take(int fd, unsigned perm, unsigned shared, struct error *err);
