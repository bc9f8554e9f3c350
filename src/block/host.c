/* What files and devices of the host have in common: descriptors, options, permissions, reading,
 * writing, flushing. The rest is file.c's and host_device.c's.
 *
 *     cache.direct    O_DIRECT; the alignments that it wants are found by trying
 *     cache.no-flush  nothing is ever synced (block/ does not call flush, and FUA means nothing)
 *     auto-read-only  opened for reading, and for writing when a writer comes: see permissions
 *     aio             accepted for QEMU's command lines: how I/O is done is the loop's affair
 *     locking         on, auto: QEMU's image locks (file_locks.c); off: none
 *
 * A sync that fails may have thrown away what it should have written, and the next one would
 * say that all is well. So after the first the node refuses writes and flushes for good. */

#include "block/file.h"

#include "base/broken.h"
#include "rt/io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

/* ---- descriptors ---- */

static struct open_file *handle_new(int fd, int flags)
{
    struct open_file *h = xnew(struct open_file);

    *h = (struct open_file){fd, flags, 1};
    return h;
}

void host_handle_unref(struct open_file *h)
{
    if (--h->users)
        return;
    io_close(h->fd);
    free(h);
}

/* ---- opening ---- */

static int wanted_flags(const struct node *n, unsigned perm)
{
    bool read_only = n->read_only, dynamic = n->auto_read_only, direct = n->cache_direct;
    bool writers = perm & (PERM_WRITE | PERM_WRITE_UNCHANGED | PERM_RESIZE);

    if (n->reopening) {
        read_only = n->reopening->read_only;
        dynamic = n->reopening->auto_read_only;
        direct = n->reopening->cache_direct;
    }
    return (!read_only && (writers || !dynamic) ? O_RDWR : O_RDONLY) | (direct ? O_DIRECT : 0);
}

int host_open_path(const char *path, int flags, mode_t mode, int *ret, struct error *err)
{
    const char *action = flags & O_CREAT ? "create" : "open";
    int fd = io_open(path, flags, mode);

    if (fd == -EINVAL && (flags & O_DIRECT)) {
        int plain = io_open(path, flags & ~O_DIRECT, mode);
        if (plain >= 0) {
            io_close(plain);
            return error_set(err, EINVAL, "Could not %s '%s': filesystem does not support O_DIRECT",
                             action, path);
        }
    }
    if (fd < 0) {
        (void)error_set_errno(err, -fd, "Could not %s '%s'", action, path);
        return fd == -EROFS ? -EACCES : fd;
    }
    *ret = fd;
    return 0;
}

/* Linux opens a device for writing also where it does not let anybody write. */
static int check_writable(int fd, const struct stat *st, int flags, struct error *err)
{
    int read_only = 0;

    if (!(flags & O_RDWR) || !S_ISBLK(st->st_mode))
        return 0;
    int r = io_ioctl(fd, BLKROGET, &read_only);
    if (r == 0 && read_only)
        r = -EACCES;
    return r < 0 ? error_set_errno(err, -r, "The device is not writable") : 0;
}

static bool can_read(int fd, uint8_t *buf, size_t n)
{
    /* Only EINVAL speaks of the alignment. */
    return io_pread(fd, buf, n, 0) != -EINVAL;
}

/* What O_DIRECT wants, of the request (a device tells that itself) and of the memory. */
static int probe_alignment(int fd, struct node_limits *limits, struct error *err)
{
    static const uint32_t sizes[] = {1, 512, 1024, 2048, 4096};
    uint8_t *buf = block_buffer(2 * DIRECT_ALIGN_MAX);
    uint32_t request = 0, memory = 0;
    int sector;

    if (!buf)
        return error_set_errno(err, ENOMEM, "Could not find working O_DIRECT alignment");
    if (io_ioctl(fd, BLKSSZGET, &sector) == 0 && sector >= BLOCK_SECTOR)
        request = (uint32_t)sector;
    for (size_t i = 0; !request && i < ARRAY_SIZE(sizes); i++)
        if (can_read(fd, buf, sizes[i])) /* one byte: the file is empty, or the check is lax */
            request = sizes[i] == 1 ? DIRECT_ALIGN_MAX : sizes[i];
    for (size_t i = 0; !memory && i < ARRAY_SIZE(sizes); i++)
        if (can_read(fd, buf + sizes[i], DIRECT_ALIGN_MAX))
            memory = sizes[i] == 1 ? request : sizes[i];
    free(buf);
    if (!request || !memory)
        return error_set(err, EINVAL, "Could not find working O_DIRECT alignment");
    limits->request_alignment = request;
    limits->memory_alignment = memory;
    return 0;
}

static int set_limits(struct node *n, int fd, int flags, struct error *err)
{
    n->limits.request_alignment = 1;
    n->limits.memory_alignment = 1;
    n->limits.max_transfer = GiB;
    return flags & O_DIRECT ? probe_alignment(fd, &n->limits, err) : 0;
}

static int parse_options(struct node *n, struct json_object *options, struct error *err)
{
    struct file_state *s = n->state;
    const char *aio = json_get_string(options, "aio", "threads");
    const char *locking = json_get_string(options, "locking", "auto");

    if (strcmp(aio, "threads") && strcmp(aio, "native") && strcmp(aio, "io_uring"))
        return error_set(err, EINVAL, "invalid parameter value: %s", aio);
    if (!strcmp(aio, "native") && !n->cache_direct)
        return error_set(err, EINVAL,
                         "aio=native was specified, but it requires cache.direct=on, which was not "
                         "specified.");
    if (strcmp(locking, "on") && strcmp(locking, "off") && strcmp(locking, "auto"))
        return error_set(err, EINVAL, "invalid parameter value: %s", locking);
    s->use_lock = strcmp(locking, "off") != 0;
    if (json_has(options, "pr-manager"))
        return error_set(err, ENOTSUP, "'pr-manager' of node '%s' is not supported", n->name);
    return 0;
}

/* LOOK looks at what has been opened: is it of the driver's kind, and how large? */
int host_open(struct node *n, struct json_object *options, host_look_fn *look, struct error *err)
{
    struct file_state *s = n->state;
    const char *path = json_get_string(options, "filename", "");
    struct stat st;
    int flags, fd, r;

    s->shared = PERM_ALL;
    free(n->filename);
    n->filename = xstrdup(path);
    r = parse_options(n, options, err);
    if (r < 0)
        return r;
    if (!strncmp(path, "/dev/fdset/", 11))
        return error_set(err, ENOTSUP, "'%s': file descriptor sets are not supported", path);

    flags = wanted_flags(n, 0);
    r = host_open_path(path, flags, 0, &fd, err);
    if (r < 0)
        return r;
    r = io_fstat(fd, &st);
    if (r < 0)
        (void)error_set_errno(err, -r, "Could not stat file");
    else
        r = check_writable(fd, &st, flags, err);
    if (r == 0) {
        s->dev = st.st_dev;
        s->ino = st.st_ino;
        s->rdev = st.st_rdev;
        r = look(n, fd, &st, err);
    }
    if (r == 0)
        r = set_limits(n, fd, flags, err);
    if (r < 0) {
        io_close(fd);
        return r;
    }
    s->now = handle_new(fd, flags);
    if (!BROKEN(first_flush_elided))
        n->write_generation = 1; /* what a killed program wrote may lie in the page cache only */
    n->write_flags = REQ_FUA;
    n->write_zeroes_flags = REQ_MAY_UNMAP | REQ_NO_FALLBACK;
    return 0;
}

void host_close(struct node *n)
{
    struct file_state *s = n->state;

    host_handle_unref(s->now);
    s->now = NULL;
}

/* ---- permissions: the descriptor and the locks follow them ----
 *
 * As QEMU's dynamic auto-read-only: the check opens the other descriptor and takes the locks there,
 * so that a refusal changes nothing. */

/* A name that udev has made anew is the same device. */
static bool is_same(const struct file_state *s, const struct stat *st)
{
    return S_ISBLK(st->st_mode) || S_ISCHR(st->st_mode)
               ? st->st_rdev == s->rdev
               : st->st_dev == s->dev && st->st_ino == s->ino;
}

/* The file again, in another mode. */
static int open_next(struct node *n, int flags, struct error *err)
{
    struct file_state *s = n->state;
    struct node_limits limits;
    struct stat st;
    int fd, r;

    r = host_open_path(n->filename, flags, 0, &fd, err);
    if (r < 0)
        return r;
    r = io_fstat(fd, &st);
    if (r < 0)
        (void)error_set_errno(err, -r, "Could not stat file");
    else if (!is_same(s, &st)) /* the name means another by now */
        r = error_set(err, ESTALE, "'%s' is not the file any more that node '%s' has open",
                      n->filename, n->name);
    else if ((r = check_writable(fd, &st, flags, err)) == 0 && (flags & O_DIRECT))
        r = probe_alignment(fd, &limits, err);
    if (r < 0) {
        io_close(fd);
        return r;
    }
    s->next = handle_new(fd, flags);
    return 0;
}

static void drop_next(struct file_state *s)
{
    if (s->next)
        host_handle_unref(steal(s->next));
}

int host_check_perm(struct node *n, unsigned perm, unsigned shared, struct error *err)
{
    struct file_state *s = n->state;
    int flags = wanted_flags(n, perm);
    int r = 0;

    assert(!s->next);
    if (flags != s->now->open_flags)
        r = open_next(n, flags, err);
    if (r == 0)
        r = file_locks_prepare(n, perm, shared, err);
    if (r == 0 && s->next && s->use_lock) {
        r = file_locks_copy(s->next->fd, perm, shared, err);
        if (r < 0)
            file_locks_abort(n);
    }
    if (r < 0)
        drop_next(s);
    return r;
}

void host_commit_perm(struct node *n, unsigned perm, unsigned shared)
{
    struct file_state *s = n->state;
    bool forget_others = s->shared & PERM_WRITE;

    if (s->next) {
        struct open_file *old = s->now;

        s->now = steal(s->next);
        if (s->use_lock) {
            s->locked_perm = perm;
            s->locked_shared = PERM_ALL & ~shared;
            file_locks_drop(old->fd); /* requests may keep it for a while */
        }
        host_handle_unref(old);
        if (n->reopening)
            (void)set_limits(n, s->now->fd, s->now->open_flags, NULL);
        forget_others = true;
    }
    /* What others have written while they were let may lie in the page cache only, too; nor are the
     * holes where they were. */
    if (forget_others && !BROKEN(first_flush_elided))
        n->write_generation++;
    if (forget_others) {
        s->changes++;
        s->known_data.length = s->known_hole.length = 0;
    }
    file_locks_commit(n, perm, shared);
    s->perm = perm;
    s->shared = shared;
}

void host_abort_perm(struct node *n)
{
    struct file_state *s = n->state;

    drop_next(s);
    file_locks_abort(n);
}

/* ---- data ---- */

void host_forget_hole(struct file_state *s, struct range r)
{
    s->changes++;
    if (range_overlaps(s->known_hole, r))
        s->known_hole.length = 0;
}

void host_forget_data(struct file_state *s, struct range r)
{
    s->changes++;
    if (range_overlaps(s->known_data, r))
        s->known_data.length = 0;
}

int host_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    HANDLE((struct file_state *)n->state);
    uint8_t *at = buf;

    (void)flags;
    while (r.length) {
        ssize_t got = io_pread(handle->fd, at, r.length, r.start);
        if (got < 0)
            return (int)got;
        /* The end of the file; where it is not on a block's end, O_DIRECT host_cannot go on. */
        if (got == 0 ||
            !range_aligned(range_make(r.start, (uint64_t)got), n->limits.request_alignment)) {
            memset(at + got, 0, r.length - (uint64_t)got);
            return 0;
        }
        at += got;
        r = range_between(r.start + (uint64_t)got, range_end(r));
    }
    return 0;
}

int host_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    struct file_state *s = n->state;
    HANDLE(s);
    bool sync = (flags & REQ_FUA) && !n->cache_no_flush && !BROKEN(fua_not_passed_on);
    int result;

    if (s->broken)
        return -EIO;
    host_forget_hole(s, r);
    result = io_pwrite_full(handle->fd, buf, r.length, r.start, sync ? RWF_DSYNC : 0);
    host_forget_hole(s, r);
    if (result == 0)
        s->length = max_u64(s->length, range_end(r));
    else if (sync && result == -EIO && !(handle->open_flags & O_DIRECT))
        s->broken = true;
    return result;
}

bool host_cannot(int r)
{
    return r == -EOPNOTSUPP || r == -ENOSYS || r == -EINVAL || r == -ENOTTY;
}

int host_punch(struct file_state *s, int fd, struct range r)
{
    int result;

    if (s->no_punch)
        return -ENOTSUP;
    result = io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r.start, r.length);
    if (host_cannot(result)) {
        s->no_punch = true;
        return -ENOTSUP;
    }
    return result;
}

int host_flush(struct node *n)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int r;

    if (s->broken)
        return -EIO;
    r = BROKEN(flush_not_passed_on) ? 0 : io_fdatasync(handle->fd);
    if (r == -EROFS || r == -EBADF || host_cannot(r)) /* nothing that a sync could be of */
        r = n->read_only ? 0 : r;
    if (r < 0 && !BROKEN(failed_sync_forgotten))
        s->broken = true;
    return r;
}

int host_discard_done(struct file_state *s, struct range r, int result)
{
    if (result == 0) {
        s->discards_ok++;
        s->discarded_bytes += r.length;
    } else {
        s->discards_failed++;
    }
    return result;
}

uint64_t host_allocated_bytes(struct node *n)
{
    HANDLE((struct file_state *)n->state);
    struct stat st;

    return io_fstat(handle->fd, &st) < 0 ? UINT64_MAX : (uint64_t)st.st_blocks * 512;
}

void host_image_info(struct node *n, struct json_object *info)
{
    (void)n;
    json_add_bool(info, "dirty-flag", false);
}

struct json_object *host_specific_stats(struct node *n)
{
    const struct file_state *s = n->state;
    struct json_object *stats = json_object_new_object();

    json_add_string(stats, "driver", n->driver->name);
    json_add_uint(stats, "discard-nb-ok", s->discards_ok);
    json_add_uint(stats, "discard-nb-failed", s->discards_failed);
    json_add_uint(stats, "discard-bytes-ok", s->discarded_bytes);
    return stats;
}

/* ---- reopen: what can change goes through the permissions ---- */

int host_reopen_prepare(struct node *n, struct json_object *options, bool read_only, void **plan,
                        struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

const char *const host_options[] = {"filename",   "aio",        "aio-max-batch",         "locking",
                                    "pr-manager", "drop-cache", "x-check-cache-dropped", NULL};

const char *const host_mutable[] = {"drop-cache", "x-check-cache-dropped", NULL};
