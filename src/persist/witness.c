/* What a file or a device can tell of who has written it. See witness.h. */
#include "persist/witness.h"

#include "persist/device.h"
#include "rt/clock.h"
#include "rt/io.h"

#include <fcntl.h>
#include <gnutls/crypto.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/ioctl.h>

#ifndef FS_IOC_GETFSUUID /* since Linux 6.9 */
struct tide_fsuuid {
    uint8_t length;
    uint8_t uuid[16];
};
#define FS_IOC_GETFSUUID _IOR(0x15, 0, struct tide_fsuuid)
#else
#define tide_fsuuid fsuuid2
#endif

/* A file's times move in ticks: of the kernel's clock, or of whole seconds (two, on some). A write
 * in the tick in which we look would not be seen. */
enum { TICK_MS = 12, COARSE_TICK_MS = 2100, TRIES = 5 };
/* What a clock may be off between a file system's time and ours within one tick. */
#define SLACK_NS (2 * TICK_MS * UINT64_C(1000000))
/* The start of a boot is known to 10 ms, and clocks are set early in a boot. */
#define BOOT_SLACK_NS (2 * NSEC_PER_SEC)

static uint64_t time_ns(const struct statx_timestamp *t)
{
    return t->tv_sec < 0 ? 0 : (uint64_t)t->tv_sec * NSEC_PER_SEC + t->tv_nsec;
}

/* Zeroes where nothing is known that lasts longer than a boot. */
static int take_filesystem(int fd, struct witness *w)
{
    struct tide_fsuuid uuid = {0};
    struct statfs fs;

    if (io_ioctl(fd, FS_IOC_GETFSUUID, &uuid) == 0) {
        memcpy(w->filesystem, &uuid.uuid, sizeof w->filesystem);
        return 0;
    }
    int r = io_fstatfs(fd, &fs);
    if (r < 0)
        return r;
    /* Others make it of the device's number. */
    if (fs.f_type == EXT4_SUPER_MAGIC || fs.f_type == BTRFS_SUPER_MAGIC)
        memcpy(w->filesystem, &fs.f_fsid, sizeof fs.f_fsid);
    return 0;
}

static int take_file(int fd, struct witness *w)
{
    struct statx st;
    int r = 0;

    for (unsigned i = 0; i < TRIES; i++) {
        r = io_fstatx(fd, &st);
        if (r < 0)
            return r;
        w->inode = st.stx_ino;
        w->birth_ns = st.stx_mask & STATX_BTIME ? time_ns(&st.stx_btime) : 0;
        w->size_bytes = st.stx_size;
        uint64_t mtime = time_ns(&st.stx_mtime), ctime = time_ns(&st.stx_ctime);
        bool same = i && mtime == w->mtime_ns && ctime == w->ctime_ns;
        w->mtime_ns = mtime;
        w->ctime_ns = ctime;
        uint64_t last = max_u64(mtime, ctime), now = clock_wall_us() * 1000;
        uint64_t tick = (st.stx_ctime.tv_nsec ? TICK_MS : COARSE_TICK_MS) * UINT64_C(1000000);
        if (same || now > last + tick || now < last) /* a clock that was set back says nothing */
            break;
        r = sleep_until(clock_after_ns(last + tick - now));
        if (r < 0)
            return r;
    }
    return take_filesystem(fd, w);
}

/* The beginning of its SHA-256. */
static int take_name(const char *name, uint8_t ret[16])
{
    uint8_t digest[32];

    if (gnutls_hash_fast(GNUTLS_DIG_SHA256, name, strlen(name), digest) < 0)
        return -EIO;
    memcpy(ret, digest, 16);
    return 0;
}

static int take_device(int fd, const struct stat *st, struct witness *w)
{
    CLEANUP(memory_freep) char *name = device_name(st);
    uint64_t size;

    /* What others have written may be in the page cache yet, and not be counted. */
    int r = io_fsync(fd);
    if (r < 0)
        return r;
    w->inode = st->st_rdev;
    if (io_ioctl(fd, BLKGETSIZE64, &size) == 0)
        w->size_bytes = size;
    if (name && (r = take_name(name, w->filesystem)) < 0)
        return r;
    w->birth_ns = device_sequence(fd);
    w->counted = device_written(st, &w->sectors);
    return 0;
}

int witness_take(int fd, struct witness *ret)
{
    struct stat st;

    *ret = (struct witness){0};
    int r = io_fstat(fd, &st);
    if (r == 0)
        r = io_boot_id(ret->boot);
    if (r < 0)
        return r;
    if (S_ISREG(st.st_mode)) {
        ret->kind = WITNESS_FILE;
        return take_file(fd, ret);
    }
    if (S_ISBLK(st.st_mode)) {
        ret->kind = WITNESS_DEVICE;
        return take_device(fd, &st, ret);
    }
    return 0;
}

bool witness_written_since(int fd, uint64_t then_ns)
{
    struct statx st;

    return io_fstatx(fd, &st) == 0 && S_ISREG(st.stx_mode) &&
           time_ns(&st.stx_mtime) > then_ns + SLACK_NS;
}

/* ---- comparing ---- */

static bool known(const uint8_t id[16])
{
    static const uint8_t none[16];

    return memcmp(id, none, sizeof none) != 0;
}

static enum witness_verdict changed(char *why, size_t why_bytes, const char *what)
{
    snprintf(why, why_bytes, "%s", what);
    return WITNESS_CHANGED;
}

/* Is it the same thing at all? */
static enum witness_verdict compare_identity(const struct witness *then, const struct witness *now,
                                             char *why, size_t why_bytes)
{
    *why = '\0';
    if (then->kind != now->kind)
        return changed(why, why_bytes, "the image is of another kind now");
    if (then->kind == WITNESS_NONE)
        return WITNESS_UNKNOWN;
    if (then->kind == WITNESS_FILE) {
        if (known(then->filesystem) && known(now->filesystem) &&
            memcmp(then->filesystem, now->filesystem, sizeof then->filesystem))
            return changed(why, why_bytes, "the image is on another file system");
        if (then->inode != now->inode ||
            (then->birth_ns && now->birth_ns && then->birth_ns != now->birth_ns))
            return changed(why, why_bytes, "the image is another file");
    }
    return WITNESS_SAME;
}

/* After a crash (not CLEAN) a session may have resized its disk, which the superblock knows of. */
static enum witness_verdict compare_device(const struct witness *then, const struct witness *now,
                                           bool clean, char *why, size_t why_bytes)
{
    bool named = known(then->filesystem) && known(now->filesystem);

    if (named && memcmp(then->filesystem, now->filesystem, sizeof then->filesystem))
        return changed(why, why_bytes, "the image is another device");
    if (clean && then->size_bytes != now->size_bytes)
        return changed(why, why_bytes, "the device has another size");
    if (memcmp(then->boot, now->boot, sizeof then->boot))
        return WITNESS_UNKNOWN; /* numbers and counters begin anew */
    bool again = then->inode != now->inode || then->birth_ns != now->birth_ns;
    if (again && !named)
        return changed(why, why_bytes, "the device may be another: it has gone and come again");
    if (again || !clean || !then->counted || !now->counted)
        return WITNESS_UNKNOWN;
    if (then->sectors != now->sectors)
        return changed(why, why_bytes, "the device has been written to meanwhile");
    return WITNESS_SAME;
}

enum witness_verdict witness_compare_clean(const struct witness *then, const struct witness *now,
                                           char *why, size_t why_bytes)
{
    enum witness_verdict v = compare_identity(then, now, why, why_bytes);

    if (v != WITNESS_SAME)
        return v;
    if (then->kind == WITNESS_DEVICE)
        return compare_device(then, now, true, why, why_bytes);
    if (then->size_bytes != now->size_bytes)
        return changed(why, why_bytes, "the image has another size");
    if (then->mtime_ns != now->mtime_ns || then->ctime_ns != now->ctime_ns)
        return changed(why, why_bytes, "the image has been changed since it was closed");
    return WITNESS_SAME;
}

enum witness_verdict witness_compare_crash(const struct witness *then, const struct witness *now,
                                           uint64_t last_write_ns, uint64_t boot_start_ns,
                                           char *why, size_t why_bytes)
{
    enum witness_verdict v = compare_identity(then, now, why, why_bytes);

    if (v != WITNESS_SAME)
        return v;
    if (then->kind == WITNESS_DEVICE)
        return compare_device(then, now, false, why, why_bytes);

    /* As it was when the session began, whatever the clock has said since. */
    if (now->ctime_ns == then->ctime_ns)
        return WITNESS_SAME;
    bool same_boot = memcmp(then->boot, now->boot, sizeof then->boot) == 0;
    if (!same_boot && now->ctime_ns > boot_start_ns + BOOT_SLACK_NS)
        return changed(why, why_bytes, "the image has been changed since this boot's start");
    if (!same_boot || now->ctime_ns == then->ctime_ns)
        return WITNESS_SAME;
    if (!last_write_ns)
        return WITNESS_UNKNOWN;
    if (now->ctime_ns > last_write_ns + SLACK_NS)
        return changed(why, why_bytes, "the image has been changed since our last write");
    return WITNESS_SAME;
}
