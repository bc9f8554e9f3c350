/* What a superblock of a tide file says, and its form in bytes (docs/format/tide.md). Pure: no I/O.
 *
 * The superblock is the only place of decisions. Every change of state (a bitmap is added, a
 * backup starts, succeeds, is rolled back, a disk is resized, ...) is made by writing one: what it
 * names holds, what it does not name does not. The ring and the bit areas are data for it.
 *
 * Bytes come from disk: decode checks everything that it gives back. */
#pragma once

#include "base/error.h"
#include "base/macros.h"
#include "persist/witness.h"

#define TIDE_NAME_MAX 1023 /* bytes of a bitmap's name */
#define TIDE_PATH_MAX 4095 /* bytes of a member's path */
#define TIDE_ALIGN 4096    /* of everything that is read and written */
enum { SUPER_DRIVER_BYTES = 32 };
#define TIDE_SUPER_BYTES ((uint64_t)256 * 1024)
#define TIDE_RING_OFFSET (2 * TIDE_SUPER_BYTES)
enum { TIDE_RING_BLOCKS = 64 };
#define TIDE_EXTENTS_OFFSET (TIDE_RING_OFFSET + (uint64_t)TIDE_RING_BLOCKS * TIDE_ALIGN)

enum tide_level {
    TIDE_POWER,   /* bounded superset after a power loss */
    TIDE_PROCESS, /* after a kill only: ring and areas are idle */
};

struct tide_id { /* random, never zero */
    uint8_t bytes[16];
};

/* A set of bits on disk: one of a bitmap's extents, under an epoch. A sector there that says
 * another epoch reads as clean; so does an area whose epoch was never written. */
struct tide_area {
    unsigned extent; /* index below TIDE_EXTENTS */
    uint64_t epoch;  /* 0: there is none */
};

/* What is durable takes at most two (current and successor), so a third is always free for what is
 * to come. Most bitmaps never need more than two. */
enum { TIDE_EXTENTS = 3 };

struct tide_bitmap {
    char *name;
    unsigned granularity_bits;
    bool enabled;      /* records; of a busy one: its successor does */
    bool inconsistent; /* must not be trusted until it is cleared or rebuilt */
    bool based;        /* its base is durable; a crash before makes it inconsistent */
    /* Of a table in doubt, which is written to meanwhile: what it is not if the answer is no. */
    bool only_if_yes;    /* there */
    bool enabled_if_yes; /* enabled */
    uint64_t generation;
    char *last_job; /* that raised the generation; NULL: no job did */
    /* Offsets in the tide file; 0: not allocated (never needed so far; level process). Each has
     * room for the larger size of a disk that is being resized. */
    uint64_t extent[TIDE_EXTENTS];
    struct tide_area current;   /* always there */
    struct tide_area successor; /* in another extent */
};

struct tide_table {
    struct tide_bitmap *items;
    size_t n;
};

/* A member of a group, seen from the others. */
struct tide_member {
    struct tide_id uuid;
    char *path;
};

/* In the first member's file: the group has been committed, and these (itself too) may not all
 * have followed yet; or, UNDECIDED, it has not been so far, and they may be asking. */
struct tide_record {
    struct tide_id group;
    struct tide_member *members;
    size_t n;
    bool undecided;
};

struct super {
    struct tide_id uuid;    /* of the file, for life */
    struct tide_id session; /* of one opening for writing */
    uint64_t sequence;      /* the higher one of two valid superblocks counts */
    bool in_use;            /* false: closed, the areas hold everything */
    enum tide_level level;
    /* Of the node that has the bitmaps: "raw", "qcow2", "file", ...; "raw@OFFSET" of a raw one
     * whose disk is a part of the file, "qcow2/raw@OFFSET" of one over such a part. */
    char driver[SUPER_DRIVER_BYTES];
    uint64_t size_bytes;     /* of the disk */
    uint64_t resizing_bytes; /* being resized to this; equal to size_bytes: it is not */
    unsigned region_bits;    /* a hot region is 1 << this bytes */
    uint32_t slots;          /* of the hot table: TIDE_SLOTS_MIN .. TIDE_SLOTS_MAX */
    uint64_t ring_sequence;  /* of this session's first transaction; clean: of the next one's */
    uint64_t next_epoch;     /* not used so far */
    uint64_t extents_end;    /* where the next extent goes */
    struct witness witness;
    struct tide_table table;

    /* Prepared, when `group` is not zero: if the group was committed, NEXT is the table. */
    struct tide_id group;
    struct tide_member coordinator;
    struct tide_table next;

    struct tide_record *records;
    size_t n_records;
};

void super_fini(struct super *s); /* frees what it owns; a zeroed one is allowed */
void super_copy(struct super *to, const struct super *from);
struct tide_bitmap *tide_table_find(struct tide_table *t, const char *name); /* NULL: none */
void tide_table_fini(struct tide_table *t);
void tide_table_copy(struct tide_table *to, const struct tide_table *from);
void super_add_record(struct super *s, const struct tide_record *record); /* a copy of it */
void super_drop_record(struct super *s, const struct tide_id *group);
bool tide_id_equal(const struct tide_id *a, const struct tide_id *b);
bool tide_id_none(const struct tide_id *id);

/* The bytes: *LENGTH is a multiple of 4 KiB and at most TIDE_SUPER_BYTES, which BUF has. -ENOSPC
 * when the table does not fit; -EINVAL for what super_decode() would refuse, ERR says what it is.
 */
int super_encode(const struct super *s, void *buf, size_t *length, struct error *err) MUST_CHECK;
/* S gets what BUF says, and is to be super_fini'd. -EBADMSG: no valid superblock, ERR says why. */
int super_decode(const void *buf, size_t length, struct super *s, struct error *err) MUST_CHECK;

/* ---- hot ring ---- */

enum {
    RING_BLOCK = 4096,
    RING_CHANGES = 64,
    RING_SLICE = 880, /* entries of the table in each transaction; all of a smaller one */
    TIDE_SLOTS_MIN = 4,
    TIDE_SLOTS_MAX = (TIDE_RING_BLOCKS - 1) * RING_SLICE, /* a ring holds all and a torn block */
};
#define REGION_NONE UINT32_MAX

/* One transaction: the changes, and a slice of the table as it is after them. */
struct ring_block {
    struct tide_id session;
    uint64_t sequence;
    unsigned n_changes;
    struct ring_change {
        uint16_t slot;
        uint32_t region;
    } changes[RING_CHANGES];
    unsigned slice_first, slice_length; /* wraps round the end of the table */
    uint32_t slice[RING_SLICE];
};
/* The slice that belongs to B->sequence: SLICE entries (or all SLOTS, if those are fewer) of TABLE,
 * from sequence x slice modulo slots on. The table is as it will be after B's changes. */
void ring_slice(struct ring_block *b, const uint32_t *table, unsigned slots, unsigned slice);
void ring_encode(const struct ring_block *b, uint8_t buf[RING_BLOCK]);
/* OTHER: never written, or of another session. BAD: torn or damaged. */
enum ring_state { RING_OURS, RING_OTHER, RING_BAD };
enum ring_state ring_decode(const uint8_t buf[RING_BLOCK], const struct tide_id *session,
                            struct ring_block *ret);
/* How many transactions together hold the whole table of SLOTS entries. */
unsigned ring_full_table(unsigned slots, unsigned slice);
/* The table after the newest of BLOCKS (N of them, any order, all of one session): made of the
 * fewest last ones whose slices are all of it, or of all since FIRST_SEQUENCE, before which it was
 * empty. -EBADMSG: one of those is missing, or there is none, or says what cannot be. *NEXT: the
 * sequence to go on at, which is that of a torn block. Regions are not compared with the disk,
 * which may have been shrunk. */
int ring_rebuild(const struct ring_block *blocks, size_t n, uint64_t first_sequence,
                 uint32_t *table, unsigned slots, uint64_t *next, struct error *err) MUST_CHECK;

/* ---- bit areas ---- */

enum { AREA_SECTOR = 512, AREA_HEADER = 16, AREA_PAYLOAD = AREA_SECTOR - AREA_HEADER };

/* Sector i of an area holds bytes [i x AREA_PAYLOAD, ...) of the bitmap's serial form (bitmap.h).
 * OFFSET is the sector's in the file. The checksum covers it, and the uuid: a sector in the wrong
 * place is none. */
void area_encode(uint8_t sector[AREA_SECTOR], const struct tide_id *uuid, uint64_t offset,
                 uint64_t epoch, const uint8_t payload[AREA_PAYLOAD]);
/* CLEAN: whole, but of another epoch, which *OTHER gets; or never written: all zero, and so is
 * *OTHER. BAD: torn or damaged. *PAYLOAD is set for DATA. */
enum area_state { AREA_DATA, AREA_CLEAN, AREA_BAD };
enum area_state area_decode(const uint8_t sector[AREA_SECTOR], const struct tide_id *uuid,
                            uint64_t offset, uint64_t epoch, const uint8_t **payload,
                            uint64_t *other);
uint64_t area_sectors(uint64_t size_bytes, unsigned granularity_bits);
/* Bytes of the extent of one area for such a bitmap; a multiple of 4 KiB, and not 0. */
uint64_t tide_extent_bytes(uint64_t size_bytes, unsigned granularity_bits);
