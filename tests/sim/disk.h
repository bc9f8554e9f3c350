/* The storage of a simulated machine: two file systems, one on a disk that can lose its power
 * ("/d"), one in memory ("/run", tmpfs), and what the kernel keeps of them.
 *
 * A sector (512 bytes) of a file on the disk has
 *
 *     now         what a read gives: the page cache, or the drive's own cache
 *     durable     what is surely on the medium
 *     versions    what was written since, each of which may have got there alone
 *
 * A sync that succeeds makes durable what was completed before it began. One that fails leaves the
 * pages clean: the medium has any of the versions, or none, and no later sync brings
 * the rest; the page may even be dropped, and then a read gives what the medium has. After a power
 * loss each sector is its durable value or any one version. The size of a file, and what was cut
 * off, are one row of changes, of which a beginning survives; of the changes of a directory since
 * its last sync any subset does. A file without a name and without a user is gone.
 *
 * What is left to chance is asked of choose(): dice, or one by one all that can be. */
#pragma once

#include "base/macros.h"

#include <stdio.h>
#include <sys/queue.h>
#include <sys/stat.h>
#include <sys/statfs.h>

enum { SIM_SECTOR = 512, SIM_BLOCK = 4096, SIM_PATH = 64 };

/* ---- chance ---- */

struct dice {
    uint64_t state;
};
uint64_t dice_next(struct dice *d);
uint64_t dice_below(struct dice *d, uint64_t n);        /* 0..n-1; 0 when n is 0 */
bool dice_percent(struct dice *d, unsigned hundredths); /* of a percent */
static inline bool one_in(struct dice *d, uint64_t n)
{
    return dice_below(d, n) == 0;
}

/* All outcomes of a row of choices, one after the other: the first run takes 0 everywhere, each
 * further one the next in order. Where all that can be is the same there is no choice: a sector
 * is asked for by its contents, not its versions, and one that is cut off not at all. */
struct choices {
    struct {
        uint32_t taken, of;
    } * row;
    size_t n, capacity, at;
    bool exhaustive;
    bool power_goes; /* exhaustive: after the kill; so what is in flight is one more version */
    struct dice *dice;
    /* when by dice: how likely something lands, and whether it is the newest; drawn anew for each
     * crash, so that there are crashes of which nothing survives, and all */
    unsigned lands_percent, newest_percent;
};
void choices_by_dice(struct choices *c, struct dice *d);
uint32_t choose(struct choices *c, uint32_t n);
bool choose_lands(struct choices *c); /* does what was in flight get there? */
uint32_t choose_survivor(struct choices *c, uint32_t versions); /* 0: the durable one */
bool choices_next(struct choices *c);                           /* false: that was the last */
void choices_fini(struct choices *c);

/* ---- files ---- */

/* What a sector holds; zeroes are NULL, always. It is shared, and so never changed: most of what a
 * tide file is made of are zeroes, and what is synced is what was written. */
struct payload {
    size_t users;
    uint8_t bytes[SIM_SECTOR];
};

struct version {
    struct version *newer;
    uint64_t order;
    struct payload *payload;
};

struct sector {               /* that is dirty: it has versions */
    struct version *versions; /* the oldest first */
    bool direct;              /* last written past the page cache */
    uint32_t number;
    TAILQ_ENTRY(sector) link;
};

struct resizing {
    uint64_t order, size;
};

struct lock {
    TAILQ_ENTRY(lock) link;
    const void *owner; /* an open file */
    int type;
    uint64_t start, end;
};

struct times {
    uint64_t mtime_ns, ctime_ns; /* of the wall clock */
};

struct inode {
    TAILQ_ENTRY(inode) link;
    struct store *store;
    uint64_t number, birth_ns;
    bool in_memory; /* on tmpfs: bytes, nothing else */
    unsigned opened;
    uint64_t size, durable_size;
    struct times times, durable_times;
    TAILQ_HEAD(, lock) locks;
    /* on the disk */
    struct payload **now, **durable; /* of each sector */
    struct sector **sectors;         /* NULL: clean */
    size_t n_now, n_durable, n_sectors;
    TAILQ_HEAD(, sector) dirty;
    struct resizing *resizings; /* since the size was durable */
    size_t n_resizings;
    uint8_t *blocks; /* of SIM_BLOCK bytes: BLOCK_* */
    size_t n_blocks;
    uint64_t syncs_failed; /* that had something to make durable */
    uint64_t bad_sector;   /* one more than its number: cannot be read, until it is written */
    /* in memory */
    uint8_t *bytes;
    uint64_t capacity;
    unsigned mapped;
};
enum { BLOCK_HOLE, BLOCK_RESERVED, BLOCK_WRITTEN };

struct name {
    TAILQ_ENTRY(name) link;
    char text[SIM_PATH];
    struct inode *now, *durable; /* NULL: not there */
};
struct naming { /* one change of a directory: one or two names at once */
    TAILQ_ENTRY(naming) link;
    uint64_t order;
    struct {
        struct name *name;
        struct inode *to;
    } set[2];
};
struct dir {
    TAILQ_ENTRY(dir) link;
    char path[SIM_PATH];
    bool in_memory;
    TAILQ_HEAD(, name) names;
    TAILQ_HEAD(, naming) changes; /* not durable yet */
};

struct store {
    TAILQ_HEAD(, dir) dirs;
    TAILQ_HEAD(, inode) inodes;
    uint64_t next_inode, order;
    int64_t free_blocks, free_memory; /* of the disk; bytes of tmpfs */
    uint64_t wall_ns;                 /* the file system's clock, which ticks */
    struct choices *choices;
};

void store_init(struct store *s, struct choices *c);
void store_fini(struct store *s);
/* The program is gone: its descriptors, locks and mappings. */
void store_forget_users(struct store *s);
/* After store_forget_users: what the medium has is what there is; tmpfs is empty. */
void store_lose_power(struct store *s);

/* ---- names; 0 or -errno ---- */
void store_mkdir(struct store *s, const char *path, bool in_memory);
struct dir *store_dir(struct store *s, const char *path); /* of this path */
struct inode *store_find(struct store *s, const char *path);
int store_create(struct store *s, const char *path, bool exclusive, struct inode **ret);
int store_unlink(struct store *s, const char *path);
int store_rename(struct store *s, const char *from, const char *to);
int store_link(struct store *s, const char *from, const char *to);
void store_sync_dir(struct store *s, struct dir *d, uint64_t upto);
void inode_put(struct inode *i); /* one user less */

/* ---- content ---- */
/* UPTO: what was completed before; store->order + 1 at this moment covers everything. */
uint64_t store_moment(struct store *s);
size_t inode_read(struct inode *i, void *buf, size_t n, uint64_t at);
/* What is to be written, cut where the sectors of a file are cut. */
struct parcel;
struct parcel *parcel_new(const void *buf, size_t n, uint64_t at);
void parcel_free(struct parcel *p); /* NULL is allowed */
/* The sectors for which LANDS (NULL: all) says true. Bytes written, or -ENOSPC. */
bool inode_unreadable(const struct inode *i, uint64_t at, uint64_t n);
int64_t inode_write_parcel(struct inode *i, const struct parcel *p, bool direct,
                           struct choices *lands);
int64_t inode_write(struct inode *i, const void *buf, size_t n, uint64_t at, bool direct,
                    struct choices *lands);
int inode_resize(struct inode *i, uint64_t size);
int inode_allocate(struct inode *i, int mode, uint64_t at, uint64_t n); /* fallocate(2) */
int64_t inode_seek(struct inode *i, uint64_t at, int whence);
void inode_sync(struct inode *i, uint64_t upto, bool with_times);
/* Of a write that was synced with it (RWF_DSYNC). */
void inode_sync_range(struct inode *i, uint64_t at, size_t n, uint64_t upto);
void inode_sync_failed(struct inode *i, uint64_t upto);
void inode_stat(struct inode *i, struct statx *ret);
int inode_map(struct inode *i, size_t n, void **ret);
/* The content as it is now, for judges; caller frees. */
uint8_t *inode_dump(struct inode *i, uint64_t *size);

/* What the medium may have if the power goes now, which it does not. WRITES are in flight. Caller
 * frees. */
uint8_t *inode_imagine(const struct inode *i, const struct parcel *const *writes, size_t n_writes,
                       struct choices *c, uint64_t *size);

/* ---- locks: 0 or -EAGAIN; test: 1 is there another's? ---- */
int inode_lock(struct inode *i, const void *owner, int type, uint64_t at, uint64_t n);
int inode_lock_test(struct inode *i, const void *owner, int type, uint64_t at, uint64_t n);
void inode_unlock_all(struct inode *i, const void *owner);
