/* The host_device driver: a block device of the host (a disk, a partition, a volume), or a
 * character device, which QEMU takes, too. What it shares with files: host.c.
 *
 * Its size is the device's, which others may change; block_resize to that size is how a user tells
 * of it. Nothing is known of holes. Requests that make zeroes or discard go by the kernel's
 * fallocate() and BLKDISCARD, which take the page cache with them; they want whole logical sectors.
 */

#include "block/file.h"

#include "rt/io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* ---- opening ---- */

static int measure(int fd, bool block, uint64_t *ret)
{
    if (block)
        return io_ioctl(fd, BLKGETSIZE64, ret);
    int64_t end = io_seek(fd, 0, SEEK_END);
    if (end < 0)
        return (int)end;
    *ret = (uint64_t)end;
    return 0;
}

static int look_at_device(struct node *n, int fd, const struct stat *st, struct error *err)
{
    struct file_state *s = n->state;
    int sector = BLOCK_SECTOR, r;

    s->block = S_ISBLK(st->st_mode);
    if (!s->block && !S_ISCHR(st->st_mode))
        return error_set(err, EINVAL,
                         "'%s' driver requires '%s' to be either a character or block device",
                         n->driver->name, n->filename);
    r = measure(fd, s->block, &s->length);
    if (r < 0)
        return error_set_errno(err, -r, "Could not refresh total sector count");
    n->size_bytes = s->length;
    if (s->block && io_ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0) {
        n->limits.write_zeroes_alignment = (uint64_t)sector;
        n->limits.discard_alignment = (uint64_t)sector;
    }
    return 0;
}

static int host_device_open(struct node *n, struct json_object *options, struct error *err)
{
    return host_open(n, options, look_at_device, err);
}

/* ---- zeroes, discard ---- */

/* The kernel would refuse parts of sectors, and cut what goes beyond the end. */
static int check_whole(const struct node *n, struct range r)
{
    const struct file_state *s = n->state;

    if (range_end(r) > s->length)
        return -ENOSPC;
    return (r.start | r.length) % n->limits.discard_alignment ? -ENOTSUP : 0;
}

/* Somebody has the device for himself, a file system: he must not have its cache taken away, and
 * plain writes have to do. */
static int unless_held(int r)
{
    return r == -EBUSY ? -ENOTSUP : r;
}

static int host_device_write_zeroes(struct node *n, struct range r, unsigned flags)
{
    struct file_state *s = n->state;
    HANDLE(s);

    if (s->broken)
        return -EIO;
    if (!s->block)
        return -ENOTSUP;
    int result = check_whole(n, r);
    if (result < 0)
        return result;
    result = flags & REQ_MAY_UNMAP ? unless_held(host_punch(s, handle->fd, r)) : -ENOTSUP;
    /* Where the device cannot, the kernel writes zeroes out, which may not be wanted. */
    if (result != -ENOTSUP || (flags & REQ_NO_FALLBACK) || s->no_zero_range)
        return result;
    result =
        io_fallocate(handle->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, r.start, r.length);
    if (host_cannot(result)) {
        s->no_zero_range = true;
        result = -ENOTSUP;
    }
    return unless_held(result);
}

static int host_device_discard(struct node *n, struct range r)
{
    struct file_state *s = n->state;
    HANDLE(s);
    uint64_t span[2] = {r.start, r.length};

    if (s->broken)
        return -EIO;
    int result = s->block && !s->no_discard ? check_whole(n, r) : -ENOTSUP;
    if (result == 0) {
        result = io_ioctl(handle->fd, BLKDISCARD, span);
        if (host_cannot(result)) {
            s->no_discard = true;
            result = -ENOTSUP;
        }
        result = unless_held(result);
    }
    return host_discard_done(s, r, result);
}

static int host_device_flush(struct node *n)
{
    const struct file_state *s = n->state;

    return s->block ? host_flush(n) : 0; /* of characters there is nothing to flush */
}

/* ---- size ---- */

static int host_device_truncate(struct node *n, uint64_t size_bytes, bool exact, struct error *err)
{
    struct file_state *s = n->state;
    HANDLE(s);
    uint64_t now;

    int r = measure(handle->fd, s->block, &now);
    if (r < 0)
        return error_set_errno(err, -r, "Could not refresh total sector count");
    if (size_bytes != now && exact)
        return error_set(err, ENOTSUP, "Cannot resize device files");
    if (size_bytes > now)
        return error_set(err, EINVAL, "Cannot grow device files");
    s->length = now;
    return 0;
}

static uint64_t host_device_measure_length(struct node *n)
{
    return ((const struct file_state *)n->state)->length;
}

const struct driver driver_host_device = {
    .name = "host_device",
    .protocol = "host_device",
    .takes_path = true,
    .grows_by_content = true,
    .state_size = sizeof(struct file_state),
    .known_options = host_options,
    .open = host_device_open,
    .close = host_close,
    .read = host_read,
    .write = host_write,
    .write_zeroes = host_device_write_zeroes,
    .discard = host_device_discard,
    .flush = host_device_flush,
    .truncate = host_device_truncate,
    .measure_length = host_device_measure_length,
    .check_perm = host_check_perm,
    .commit_perm = host_commit_perm,
    .abort_perm = host_abort_perm,
    .reopen_prepare = host_reopen_prepare,
    .allocated_bytes = host_allocated_bytes,
    .image_info = host_image_info,
    .specific_stats = host_specific_stats,
    .mutable_options = host_mutable,
};
