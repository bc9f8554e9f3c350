/* The file driver: a regular file of the host. What it shares with devices: host.c. */

#include "block/file.h"

#include "base/broken.h"
#include "base/log.h"
#include "rt/io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

static int look_at_file(struct node *n, int fd, const struct stat *st, struct error *err)
{
    struct file_state *s = n->state;

    (void)fd;
    if (!S_ISREG(st->st_mode))
        return error_set(err, EINVAL, "'%s' driver requires '%s' to be a regular file",
                         n->driver->name, n->filename);
    s->length = n->size_bytes = (uint64_t)st->st_size;
    return 0;
}

static int file_open(struct node *n, struct json_object *options, struct error *err)
{
    return host_open(n, options, look_at_file, err);
}

/* ---- changes ---- */

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

static int file_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int result = -ENOTSUP;

    if (s->broken)
        return -EIO;
    host_forget_data(s, r);
    host_forget_hole(s, r);
    if (flags & REQ_MAY_UNMAP) {
        result = host_punch(s, handle->fd, r);
        if (result == 0)
            result = extend_to(s, handle->fd, range_end(r));
    }
    if (result == -ENOTSUP && !s->no_zero_range) {
        result = io_fallocate(handle->fd, FALLOC_FL_ZERO_RANGE, r.start, r.length);
        if (host_cannot(result)) {
            s->no_zero_range = true;
            result = -ENOTSUP;
        }
    }
    if (result == -ENOTSUP && !(flags & REQ_MAY_UNMAP)) {
        /* A hole, and the blocks for it again. */
        result = host_punch(s, handle->fd, r);
        if (result == 0) {
            result = io_fallocate(handle->fd, 0, r.start, r.length);
            if (host_cannot(result))
                result = -ENOTSUP;
        }
    }
    if (result == 0)
        s->length = max_u64(s->length, range_end(r));
    host_forget_data(s, r);
    host_forget_hole(s, r);
    return result;
}

static int file_discard(struct node *n, struct range r)
{
    struct file_state *s = n->state;
    HANDLE(s);
    int result;

    if (s->broken)
        return -EIO;
    host_forget_data(s, r);
    result = host_punch(s, handle->fd, r);
    host_forget_data(s, r);
    return host_discard_done(s, r, result);
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
    } else if (range_contains(s->known_hole, range_make(r.start, 1)) && !(s->shared & PERM_WRITE)) {
        end = range_end(s->known_hole);
        hole = true;
    } else {
        changes = s->changes;
        if (seek_run(handle->fd, r.start, &hole, &end) < 0)
            return 0; /* host_cannot tell: data */
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
        return error_set_errno(err, -r, "The directory of '%s' host_cannot be flushed", path);
    log_warning(
        "the directory of '%s' host_cannot be flushed: the new file may be lost with the power",
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
    r = host_open_path(path, O_RDWR | O_CREAT, 0644, &fd, err);
    if (r < 0)
        return r;
    r = make_file(fd, options, err);
    io_close(fd); /* and the locks with it */
    return r < 0 || BROKEN(made_name_not_synced) ? r : file_sync_name(path, err);
}

const struct driver driver_file = {
    .name = "file",
    .protocol = "file",
    .takes_path = true,
    .state_size = sizeof(struct file_state),
    .known_options = host_options,
    .open = file_open,
    .close = host_close,
    .read = host_read,
    .write = host_write,
    .write_zeroes = file_write_zeroes,
    .discard = file_discard,
    .flush = host_flush,
    .truncate = file_truncate,
    .status = file_status,
    .check_perm = host_check_perm,
    .commit_perm = host_commit_perm,
    .abort_perm = host_abort_perm,
    .reopen_prepare = host_reopen_prepare,
    .create = file_create,
    .allocated_bytes = host_allocated_bytes,
    .image_info = host_image_info,
    .specific_stats = host_specific_stats,
    .mutable_options = host_mutable,
};
