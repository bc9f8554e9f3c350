/* Has anybody else written the image since we last did? What a file or a device can tell of it.
 *
 *     regular file    file system's uuid (or id, where that lasts), inode, birth time, size, mtime,
 *                     ctime: taken after a sync, once the clock has left mtime's tick
 *     block device    size, its name that lasts (device.h), and the sectors written to it, while
 *                     this boot lasts and the device has not gone meanwhile
 *     anything else   nothing (rbd, nbd): believed, and queries say `witness: none`
 *
 * After a clean close all must be equal. After a crash, the times may have moved by our own last
 * writes: a ctime later than our last stamped write (same boot; segment.h) or than this boot's
 * start (another one) is somebody else's. Without a stamp there is nothing to compare a moved time
 * with. Clocks can be set, so that is a good guess and no proof.
 *
 * A device that has come again, or after a crash, is the same if its name says so; nothing tells
 * what has been written to it. If it has come again within one boot and has no name, it counts as
 * another: the second file behind a loop device's number must not get the bitmaps of the first. */
#pragma once

#include "base/error.h"
#include "base/macros.h"

enum witness_kind { WITNESS_NONE, WITNESS_FILE, WITNESS_DEVICE };

struct witness {
    enum witness_kind kind;
    uint8_t boot[16];       /* boot id of the host when it was taken */
    uint8_t filesystem[16]; /* uuid, or the file system's id in the first 8 bytes; of a device: of
                               its name; zero: none that outlasts a boot */
    uint64_t inode;         /* of a device: its number */
    uint64_t birth_ns;      /* 0: the file system does not know; of a device: device_sequence() */
    uint64_t size_bytes;
    uint64_t mtime_ns, ctime_ns;
    uint64_t counted; /* of a device: 1, if sectors are */
    uint64_t sectors; /* written and discarded */
};

enum witness_verdict {
    WITNESS_SAME,
    WITNESS_UNKNOWN, /* it has none: believed */
    WITNESS_CHANGED,
};

/* A regular file: has it been written since then (wall clock, ns)? */
bool witness_written_since(int fd, uint64_t then_ns);
/* Takes it of the open file FD, which has been synced; waits until the clock has left mtime's tick.
 */
int witness_take(int fd, struct witness *ret) MUST_CHECK;
/* NOW against THEN, that of a clean close. WHY gets the reason of CHANGED. */
enum witness_verdict witness_compare_clean(const struct witness *then, const struct witness *now,
                                           char *why, size_t why_bytes);
/* The same after a crash: THEN was taken at the begin of the session; LAST_WRITE_NS (wall clock):
 * the latest moment at which we can have written, 0 when that is not known. UNKNOWN also when it is
 * needed and not known: within one boot, of a file that has changed since THEN. */
enum witness_verdict witness_compare_crash(const struct witness *then, const struct witness *now,
                                           uint64_t last_write_ns, uint64_t boot_start_ns,
                                           char *why, size_t why_bytes);
