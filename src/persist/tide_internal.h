/* Shared by the files that make up tide.h. */
#pragma once

#include "persist/tide.h"
#include "rt/sync.h"

struct tide {
    char *path;
    int fd;
    bool direct; /* O_DIRECT: each operation has the errors of its own */
    bool read_only, beside_writer;
    bool doubtful; /* a superblock, perhaps the newer one, cannot be read */
    bool failed;
    bool writing_ring;
    struct super super; /* the adopted one */
    unsigned slot;      /* where it is */
    uint64_t end;       /* of what was ever allocated */
    uint8_t *buf;       /* a superblock's, then a ring block's */
    struct mutex superblock;
    struct mutex durable; /* buffered: whatever syncs */
    TAILQ_HEAD(, area_write) writing_areas;
    struct waitq area_written;
};

/* R of a write or a sync that has ended; -EIO when another has failed before it was told. */
int tide_outcome(struct tide *t, int r);
/* Reads whole blocks of 4 KiB; those that cannot be read are marked in BAD, which has one entry a
 * block, and are zero. */
int tide_read_blocks(struct tide *t, void *buf, size_t n, uint64_t offset, bool *bad);

/* ---- copies of areas: tide_area.c ---- */

/* The blocks of an area that are to be written, encoded. */
struct area_copy {
    uint64_t extent_offset;
    uint64_t *blocks; /* their indices, ascending */
    size_t n, room;
    uint8_t *bytes; /* n x TIDE_ALIGN */
};

/* The blocks of BITS that hold dirt within the ranges. 0 or -ENOMEM. */
int area_copy_take(struct area_copy *c, const struct tide_id *uuid, uint64_t extent_offset,
                   uint64_t epoch, const struct bitmap *bits, const struct range *ranges, size_t n);
int area_copy_write(const struct area_copy *c, int fd);
void area_copy_fini(struct area_copy *c);
