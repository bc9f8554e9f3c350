/* The file driver: a regular file of the host.
 *
 * cache.direct   O_DIRECT; the alignments that it wants are found by trying
 * cache.no-flush nothing is ever synced (block/ does not call flush, and FUA means nothing)
 * auto-read-only the file is opened for reading, and for writing when a writer comes (QEMU's
 * dynamic auto-read-only): the permission check opens the other descriptor and takes the locks
 * there, so that a refusal changes nothing aio            accepted for the sake of QEMU's command
 * lines: how I/O is done is the loop's affair locking        on, auto: QEMU's image locks
 * (file_locks.c); off: none
 *
 * A sync that fails may have thrown away what it should have written, and the next one would
 * say that all is well. So after the first the node refuses writes and flushes for good. */

#include "block/file.h"

#include "base/broken.h"
#include "base/log.h"
#include "rt/io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

enum { DIRECT_ALIGN_MAX = 4096 };

/* ---- descriptors ---- */

static struct open_file *handle_new(int fd, int flags)
{
    struct open_file *h = xnew(struct open_file);

    *h = (struct open_file){fd, flags, 1};
    return h;
}

static void handle_unref(struct open_file *h)
{
    if (--h->users)
        return;
    io_close(h->fd);
    free(h);
}
DEFINE_CLEANUP(struct open_file *, handle_unref, handle_unrefp)

/* The descriptor for the rest of the block. */
#define HANDLE(s)                                                                                  \
    CLEANUP(handle_unrefp) struct open_file *handle = (s)->now;                                    \
    handle->users++

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

static int open_path(const char *path, int flags, mode_t mode, int *ret, struct error *err)
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

static bool can_read(int fd, uint8_t *buf, size_t n)
{
    /* Only EINVAL speaks of the alignment. */
    return io_pread(fd, buf, n, 0) != -EINVAL;
}

/* What O_DIRECT wants, of the request and of the memory. */
static int probe_alignment(int fd, struct node_limits *limits, struct error *err)
{
    static const uint32_t sizes[] = {1, 512, 1024, 2048, 4096};
    uint8_t *buf = block_buffer(2 * DIRECT_ALIGN_MAX);
    uint32_t request = 0, memory = 0;

    if (!buf)
        return error_set_errno(err, ENOMEM, "Could not find working O_DIRECT alignment");
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

static int file_open(struct node *n, struct json_object *options, struct error *err)
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
    r = open_path(path, flags, 0, &fd, err);
    if (r < 0)
        return r;
    r = io_fstat(fd, &st);
    if (r < 0) {
        r = error_set_errno(err, -r, "Could not stat file");
    } else if (!S_ISREG(st.st_mode)) {
        r = error_set(err, EINVAL, "'%s' driver requires '%s' to be a regular file",
                      n->driver->name, path);
    } else {
        s->dev = st.st_dev;
        s->ino = st.st_ino;
        s->length = n->size_bytes = (uint64_t)st.st_size;
        r = set_limits(n, fd, flags, err);
    }
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

static void file_close(struct node *n)
{
    struct file_state *s = n->state;

    handle_unref(s->now);
    s->now = NULL;
}

/* ---- permissions: the descriptor and the locks follow them ---- */

/* The file again, in another mode. */
static int open_next(struct node *n, int flags, struct error *err)
{
    struct file_state *s = n->state;
    struct node_limits limits;
    struct stat st;
    int fd, r;

    r = open_path(n->filename, flags, 0, &fd, err);
    if (r < 0)
        return r;
    r = io_fstat(fd, &st);
    if (r < 0)
        (void)error_set_errno(err, -r, "Could not stat file");
    else if (st.st_dev != s->dev || st.st_ino != s->ino) /* the name means another by now */
        r = error_set(err, ESTALE, "'%s' is not the file any more that node '%s' has open",
                      n->filename, n->name);
    else if (flags & O_DIRECT)
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
        handle_unref(steal(s->next));
}

static int file_check_perm(struct node *n, unsigned perm, unsigned shared, struct error *err)
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

static void file_commit_perm(struct node *n, unsigned perm, unsigned shared)
{
    struct file_state *s = n->state;

    if (s->next) {
        struct open_file *old = s->now;

        s->now = steal(s->next);
        if (s->use_lock) {
            s->locked_perm = perm;
            s->locked_shared = PERM_ALL & ~shared;
            file_locks_drop(old->fd); /* requests may keep it for a while */
        }
        handle_unref(old);
        /* What others have written while it was not ours may lie in the page cache only, too. */
        if (!BROKEN(first_flush_elided))
            n->write_generation++;
        s->known_data.length = s->known_hole.length = 0; /* nor are its holes where they were */
        if (n->reopening)
            (void)set_limits(n, s->now->fd, s->now->open_flags, NULL);
    }
    file_locks_commit(n, perm, shared);
    s->perm = perm;
    s->shared = shared;
}

static void file_abort_perm(struct node *n)
{
    struct file_state *s = n->state;

    drop_next(s);
    file_locks_abort(n);
}

/* ---- data ---- */

static void forget_hole(struct file_state *s, struct range r)
{
    s->changes++;
    if (range_overlaps(s->known_hole, r))
        s->known_hole.length = 0;
}

static void forget_data(struct file_state *s, struct range r)
{
    s->changes++;
    if (range_overlaps(s->known_data, r))
        s->known_data.length = 0;
}

static int file_read(struct node *n, struct range r, void *buf, unsigned flags)
{
    HANDLE((struct file_state *)n->state);
    uint8_t *at = buf;

    (void)flags;
    while (r.length) {
        ssize_t got = io_pread(handle->fd, at, r.length, r.start);
        if (got < 0)
            return (int)got;
        /* The end of the file; where it is not on a block's end, O_DIRECT cannot go on. */
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

static int file_write(struct node *n, struct range r, const void *buf, unsigned flags)
{
    struct file_state *s = n->state;
    HANDLE(s);
    bool sync = (flags & REQ_FUA) && !n->cache_no_flush && !BROKEN(fua_not_passed_on);
    int result;

    if (s->broken)
        return -EIO;
    forget_hole(s, r);
    result = io_pwrite_full(handle->fd, buf, r.length, r.start, sync ? RWF_DSYNC : 0);
    forget_hole(s, r);
    if (result == 0)
        s->length = max_u64(s->length, range_end(r));
    else if (sync && result == -EIO && !(handle->open_flags & O_DIRECT))
        s->broken = true;
    return result;
}

static bool cannot(int r)
{
    return r == -EOPNOTSUPP || r == -ENOSYS || r == -EINVAL || r == -ENOTTY;
}

/* A hole does not make a file longer. */
static int extend_to(struct file_state *s, int fd, uint64_t end)
{
    int r;

    if (end <= s->length)
        return 0;
    r = io_fallocate(fd, 0, end - 1, 1);
    if (r == 0)
        s->length = max_u64(s->length, end);
    return r;
}

static int punch(struct file_state *s, int fd, struct range r)
{
    int result;

    if (s->no_punch)
        return -ENOTSUP;
    result = io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r.start, r.length);
    if (cannot(result)) {
        s->no_punch = true;
        return -ENOTSUP;
    }
    return result;
}

static int file_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int result = -ENOTSUP;

    if (s->broken)
        return -EIO;
    forget_data(s, r);
    forget_hole(s, r);
    if (flags & REQ_MAY_UNMAP) {
        result = punch(s, handle->fd, r);
        if (result == 0)
            result = extend_to(s, handle->fd, range_end(r));
    }
    if (result == -ENOTSUP && !s->no_zero_range) {
        result = io_fallocate(handle->fd, FALLOC_FL_ZERO_RANGE, r.start, r.length);
        if (cannot(result)) {
            s->no_zero_range = true;
            result = -ENOTSUP;
        }
    }
    if (result == -ENOTSUP && !(flags & REQ_MAY_UNMAP)) {
        /* A hole, and the blocks for it again. */
        result = punch(s, handle->fd, r);
        if (result == 0) {
            result = io_fallocate(handle->fd, 0, r.start, r.length);
            if (cannot(result))
                result = -ENOTSUP;
        }
    }
    if (result == 0)
        s->length = max_u64(s->length, range_end(r));
    forget_data(s, r);
    forget_hole(s, r);
    return result;
}

static int file_discard(struct node *n, struct range r)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int result;

    if (s->broken)
        return -EIO;
    forget_data(s, r);
    result = punch(s, handle->fd, r);
    forget_data(s, r);
    if (result == 0) {
        s->discards_ok++;
        s->discarded_bytes += r.length;
    } else {
        s->discards_failed++;
    }
    return result;
}

static int file_flush(struct node *n)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int r;

    if (s->broken)
        return -EIO;
    r = BROKEN(flush_not_passed_on) ? 0 : io_fdatasync(handle->fd);
    if (r < 0 && !BROKEN(failed_sync_forgotten))
        s->broken = true;
    return r;
}

/* An empty file that grows gets its first block allocated: by reading from it other programs,
 * and we, can find out what O_DIRECT wants, which a hole does not tell everywhere. */
static void allocate_first_block(int fd, uint64_t size_bytes)
{
    static const uint8_t zeroes[DIRECT_ALIGN_MAX] __attribute__((aligned(DIRECT_ALIGN_MAX)));

    if (size_bytes >= BLOCK_SECTOR) /* only a help: may fail */
        (void)!io_pwrite_full(fd, zeroes, size_bytes < sizeof zeroes ? BLOCK_SECTOR : sizeof zeroes,
                              0, 0);
}

static int resize_file(int fd, uint64_t from, uint64_t to, struct error *err)
{
    int r = to > INT64_MAX ? -EINVAL : io_ftruncate(fd, to);

    if (r < 0)
        return error_set_errno(err, -r, "Could not resize file");
    if (from == 0)
        allocate_first_block(fd, to);
    return 0;
}

static int file_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int r;

    (void)exact; /* a file can have any size */
    s->changes++;
    s->known_data.length = s->known_hole.length = 0;
    r = resize_file(handle->fd, s->length, size_bytes, err);
    if (r < 0)
        return r;
    s->changes++;
    s->length = size_bytes;
    return 0;
}

/* ---- holes ---- */

/* The run that begins at START: hole or data, and its end. Beyond the end of the file: a hole. */
static int seek_run(int fd, uint64_t start, bool *hole, uint64_t *end)
{
    int64_t data = io_seek(fd, start, SEEK_DATA), next;

    if (data == -ENXIO) {
        *hole = true;
        *end = UINT64_MAX;
        return 0;
    }
    if (data < 0)
        return (int)data;
    if ((uint64_t)data > start) {
        *hole = true;
        *end = (uint64_t)data;
        return 0;
    }
    next = io_seek(fd, start, SEEK_HOLE);
    if (next < 0)
        return (int)next;
    *hole = false;
    *end = (uint64_t)next;
    return (uint64_t)next > start ? 0 : -EIO; /* the file changes under us */
}

static int file_status(struct node *n, bool want_zero, struct range r, struct block_status *ret)
{
    struct file_state *s = n->state;
    HANDLE(s);
    uint32_t align = n->limits.request_alignment;
    uint64_t changes, end = 0;
    bool hole = false;

    *ret = (struct block_status){
        .flags = STATUS_DATA | STATUS_OFFSET_VALID, .length = r.length, .map = r.start, .file = n};
    if (!want_zero)
        return 0;
    if (range_contains(s->known_data, range_make(r.start, 1))) {
        end = range_end(s->known_data);
        hole = false;
    } else if (range_contains(s->known_hole, range_make(r.start, 1))) {
        end = range_end(s->known_hole);
        hole = true;
    } else {
        changes = s->changes;
        if (seek_run(handle->fd, r.start, &hole, &end) < 0)
            return 0; /* cannot tell: data */
        if (end > n->size_bytes)
            end = max_u64(n->size_bytes, align_up(r.start + 1, align));
        if (changes == s->changes) {
            if (hole)
                s->known_hole = range_between(r.start, end);
            else
                s->known_data = range_between(r.start, end);
        }
    }
    /* Up to the aligned end of the last block; a block that is partly data is data. */
    end = min_u64(end, range_end(r));
    if (hole && end < range_end(r) && align_down(end, align) > r.start)
        end = align_down(end, align);
    else if (hole && (end & (align - 1)) && end < n->size_bytes)
        hole = false;
    ret->length = min_u64(align_up(end, align), range_end(r)) - r.start;
    if (hole)
        ret->flags = STATUS_ZERO | STATUS_OFFSET_VALID;
    return 0;
}

static uint64_t file_allocated_bytes(struct node *n)
{
    HANDLE((struct file_state *)n->state);
    struct stat st;

    return io_fstat(handle->fd, &st) < 0 ? UINT64_MAX : (uint64_t)st.st_blocks * 512;
}

static void file_image_info(struct node *n, struct json_object *info)
{
    (void)n;
    json_add_bool(info, "dirty-flag", false);
}

static struct json_object *file_specific_stats(struct node *n)
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

static int file_reopen_prepare(struct node *n, struct json_object *options, bool read_only,
                               void **plan, struct error *err)
{
    (void)n;
    (void)options;
    (void)read_only;
    (void)plan;
    (void)err;
    return 0;
}

/* ---- create ---- */

static int write_out_zeroes(int fd, uint64_t size_bytes, struct error *err)
{
    uint8_t *zeroes = block_buffer(BOUNCE_BYTES);
    int r = zeroes ? 0 : -ENOMEM;

    if (zeroes)
        memset(zeroes, 0, BOUNCE_BYTES);
    for (uint64_t at = 0; r == 0 && at < size_bytes; at += BOUNCE_BYTES)
        r = io_pwrite_full(fd, zeroes, min_u64(BOUNCE_BYTES, size_bytes - at), at, 0);
    free(zeroes);
    if (r < 0)
        return error_set_errno(err, -r, "Could not write zeros for preallocation");
    r = io_fsync(fd);
    return r < 0 ? error_set_errno(err, -r, "Could not flush file to disk") : 0;
}

static int make_size(int fd, const char *preallocation, uint64_t size_bytes, struct error *err)
{
    int r;

    if (!strcmp(preallocation, "off"))
        return resize_file(fd, 0, size_bytes, err);
    if (!strcmp(preallocation, "falloc")) {
        r = size_bytes > INT64_MAX ? -EINVAL : size_bytes ? io_fallocate(fd, 0, 0, size_bytes) : 0;
        if (r < 0)
            return error_set_errno(err, -r, "Could not preallocate new data");
        allocate_first_block(fd, size_bytes);
        return 0;
    }
    if (!strcmp(preallocation, "full")) {
        r = resize_file(fd, 0, size_bytes, err);
        return r < 0 ? r : write_out_zeroes(fd, size_bytes, err);
    }
    return error_set(err, ENOTSUP, "Unsupported preallocation mode: %s", preallocation);
}

/* Nobody else may be using the file; nobody may resize it before we have. */
static int make_file(int fd, struct json_object *options, struct error *err)
{
    int r = file_locks_take(fd, PERM_WRITE | PERM_RESIZE, PERM_ALL & ~PERM_RESIZE, err);

    if (r < 0)
        return r;
    r = io_ftruncate(fd, 0);
    if (r < 0)
        return error_set_errno(err, -r, "Could not resize file");
    if (json_get_bool(options, "nocow", false)) {
        int attributes;
        if (io_ioctl(fd, FS_IOC_GETFLAGS, &attributes) == 0) {
            attributes |= FS_NOCOW_FL;
            (void)io_ioctl(fd, FS_IOC_SETFLAGS, &attributes); /* only faster */
        }
    }
    r = make_size(fd, json_get_string(options, "preallocation", "off"),
                  json_get_uint(options, "size", 0), err);
    if (r < 0)
        (void)!io_ftruncate(fd, 0);
    return r;
}

int file_sync_name(const char *path, struct error *err)
{
    int r = io_sync_dir_of(path);

    if (r == 0)
        return 0;
    /* A file system that has no such thing, or a directory that is not ours to read. */
    if (r != -EINVAL && r != -EACCES)
        return error_set_errno(err, -r, "The directory of '%s' cannot be flushed", path);
    log_warning("the directory of '%s' cannot be flushed: the new file may be lost with the power",
                path);
    return 0;
}

static int file_create(struct graph *g, struct json_object *options, struct error *err)
{
    const char *path = json_get_string(options, "filename", "");
    int fd, r;

    (void)g;
    if (json_get_uint(options, "extent-size-hint", 0) > UINT32_MAX)
        return error_set(err, EINVAL, "Extent size hint is too large");
    r = open_path(path, O_RDWR | O_CREAT, 0644, &fd, err);
    if (r < 0)
        return r;
    r = make_file(fd, options, err);
    io_close(fd); /* and the locks with it */
    return r < 0 || BROKEN(made_name_not_synced) ? r : file_sync_name(path, err);
}

static const char *const file_options[] = {
    "filename",   "aio",        "aio-max-batch",         "locking",
    "pr-manager", "drop-cache", "x-check-cache-dropped", NULL};

static const char *const file_mutable[] = {"drop-cache", "x-check-cache-dropped", NULL};

const struct driver driver_file = {
    .name = "file",
    .protocol = "file",
    .state_size = sizeof(struct file_state),
    .known_options = file_options,
    .open = file_open,
    .close = file_close,
    .read = file_read,
    .write = file_write,
    .write_zeroes = file_write_zeroes,
    .discard = file_discard,
    .flush = file_flush,
    .truncate = file_truncate,
    .status = file_status,
    .check_perm = file_check_perm,
    .commit_perm = file_commit_perm,
    .abort_perm = file_abort_perm,
    .reopen_prepare = file_reopen_prepare,
    .create = file_create,
    .allocated_bytes = file_allocated_bytes,
    .image_info = file_image_info,
    .specific_stats = file_specific_stats,
    .mutable_options = file_mutable,
};
