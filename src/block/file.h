/* The drivers' own whose disk is a file or a device of the host, and the locks by which programs
 * that know QEMU's protocol refuse each other. */
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
    bool no_punch, no_zero_range, no_discard; /* the file system or the device cannot */
    bool block;                               /* a block device */
    dev_t dev, rdev;
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

/* ---- host.c: what the drivers share ---- */
enum { DIRECT_ALIGN_MAX = 4096 };

void host_handle_unref(struct open_file *h);
DEFINE_CLEANUP(struct open_file *, host_handle_unref, host_handle_unrefp)
/* The descriptor for the rest of the block. */
#define HANDLE(s)                                                                                  \
    CLEANUP(host_handle_unrefp) struct open_file *handle = (s)->now;                               \
    handle->users++

int host_open_path(const char *path, int flags, mode_t mode, int *ret, struct error *err);
/* Looks at what has been opened as FD: is it of the driver's kind, and how large? */
typedef int host_look_fn(struct node *n, int fd, const struct stat *st, struct error *err);
int host_open(struct node *n, struct json_object *options, host_look_fn *look, struct error *err);
void host_close(struct node *n);
int host_check_perm(struct node *n, unsigned perm, unsigned shared, struct error *err);
void host_commit_perm(struct node *n, unsigned perm, unsigned shared);
void host_abort_perm(struct node *n);
int host_reopen_prepare(struct node *n, struct json_object *options, bool read_only, void **plan,
                        struct error *err);
int host_read(struct node *n, struct range r, void *buf, unsigned flags);
int host_write(struct node *n, struct range r, const void *buf, unsigned flags);
int host_flush(struct node *n);
/* The last answers about holes do not speak of R any more. */
void host_forget_hole(struct file_state *s, struct range r);
void host_forget_data(struct file_state *s, struct range r);
/* The kernel's answer R says that it never will. */
bool host_cannot(int r);
/* -ENOTSUP: from now on always. */
int host_punch(struct file_state *s, int fd, struct range r);
/* Counts it for query-blockstats; returns RESULT. */
int host_discard_done(struct file_state *s, struct range r, int result);
uint64_t host_allocated_bytes(struct node *n);
void host_image_info(struct node *n, struct json_object *info);
struct json_object *host_specific_stats(struct node *n);
extern const char *const host_options[], *const host_mutable[];

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
