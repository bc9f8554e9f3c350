/* A block device as sysfs knows it. See device.h. */
#include "persist/device.h"

#include "rt/io.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

#ifndef BLKGETDISKSEQ /* since Linux 5.15 */
#define BLKGETDISKSEQ _IOR(0x12, 128, uint64_t)
#endif

enum { TEXT_MAX = 4096 };

/* The first line of a file of sysfs; NULL: there is none. */
static char *sys_line(const struct stat *st, const char *name)
{
    char path[96];
    CLEANUP(memory_freep) char *text = xcalloc(TEXT_MAX + 1, 1);

    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s", major(st->st_rdev), minor(st->st_rdev),
             name);
    int fd = io_open(path, O_RDONLY, 0);
    if (fd < 0)
        return NULL;
    ssize_t n = io_pread(fd, text, TEXT_MAX, 0);
    io_close(fd);
    if (n <= 0)
        return NULL;
    text[n] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return *text ? xstrdup(text) : NULL;
}

/* The kernel follows the link of a partition into the directory of its disk. */
static char *line_of(const struct stat *st, bool of_disk, const char *name)
{
    char path[64];

    snprintf(path, sizeof path, "%s%s", of_disk ? "../" : "", name);
    return sys_line(st, path);
}

/* The file is the disk, and OFFSET where in it. */
static char *loop_name(const struct stat *st, bool of_disk)
{
    static const char deleted[] = " (deleted)";
    CLEANUP(memory_freep) char *file = line_of(st, of_disk, "loop/backing_file");
    CLEANUP(memory_freep) char *offset = line_of(st, of_disk, "loop/offset");
    size_t n = file ? strlen(file) : 0;

    if (!file || !offset ||
        (n >= sizeof deleted && !strcmp(file + n + 1 - sizeof deleted, deleted)))
        return NULL;
    return strcmp(offset, "0") ? xasprintf("loop-%s@%s", file, offset) : xasprintf("loop-%s", file);
}

static char *disk_name(const struct stat *st, bool of_disk)
{
    static const struct {
        const char *file, *prefix;
    } names[] = {
        {"dm/uuid", ""},        {"wwid", ""},
        {"device/wwid", ""},    {"serial", "serial-"}, /* virtio */
        {"device/cid", "mmc-"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        CLEANUP(memory_freep) char *name = line_of(st, of_disk, names[i].file);
        if (name)
            return xasprintf("%s%s", names[i].prefix, name);
    }
    return loop_name(st, of_disk);
}

char *device_name(const struct stat *st)
{
    CLEANUP(memory_freep) char *partition = sys_line(st, "partition");
    CLEANUP(memory_freep) char *disk = disk_name(st, partition);

    return disk && partition ? xasprintf("%s-part%s", disk, partition) : steal(disk);
}

/* The sectors of a request are counted before whoever waits for it is told that it has ended, its
 * number in some drivers after that. Where sectors are counted so are requests; so those are
 * enough. */
bool device_written(const struct stat *st, uint64_t *sectors)
{
    CLEANUP(memory_freep) char *partition = sys_line(st, "partition");
    CLEANUP(memory_freep) char *counts = line_of(st, partition, "queue/iostats");
    CLEANUP(memory_freep) char *text = sys_line(st, "stat");
    unsigned long long written, discarded = 0;

    if (!text || (counts && !strcmp(counts, "0")))
        return false;
    if (sscanf(text, "%*u %*u %*u %*u %*u %*u %llu %*u %*u %*u %*u %*u %*u %llu", &written,
               &discarded) < 1)
        return false;
    *sectors = written + discarded;
    return true;
}

uint64_t device_sequence(int fd)
{
    uint64_t sequence = 0;

    return io_ioctl(fd, BLKGETDISKSEQ, &sequence) == 0 ? sequence : 0;
}
