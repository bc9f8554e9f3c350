/* The tide file itself: making it, opening it, superblocks and the ring. (Areas: tide_area.c.)
 *
 * What is promised here:
 *
 * - A superblock goes into the slot that does not hold the adopted one, with RWF_DSYNC, one at a
 *   time: however it ends, the adopted one is still there, and if it has ended well the new one is
 *   found by whoever opens the file.
 * - A new file is complete and synced under a name of its own before it has the real one, and the
 *   directory is synced before anybody hears of it.
 * - What a crash has torn is never made whole by a later crash.
 * - Room for an extent is durable before a superblock can name it.
 * - After a failed write or sync nothing is reported as durable any more: the outcome is unknown,
 *   and the kernel reports an error of the page cache only once, to whoever asks first. With
 *   O_DIRECT each operation has its own errors; without, whatever syncs takes turns, so that no
 *   second one can be told `done` in place of the first one's error. */
#include "persist/tide_internal.h"

#include "base/broken.h"
#include "base/log.h"
#include "block/driver.h"
#include "rt/clock.h"
#include "rt/io.h"

#include <errno.h>
#include <fcntl.h>
#include <isa-l/mem_routines.h>

/* What a power loss leaves old or new. */
enum { SECTOR = 512 };

#define LOCK_PATIENCE_NS (2 * NSEC_PER_SEC)
#define LOCK_PAUSE_NS (NSEC_PER_SEC / 50)

int tide_outcome(struct tide *t, int r)
{
    if (r < 0 && !BROKEN(tide_failure_forgotten))
        t->failed = true;
    return r < 0 ? r : t->failed ? -EIO : 0;
}

const char *tide_path(const struct tide *t)
{
    return t->path;
}

bool tide_failed(const struct tide *t)
{
    return t->failed;
}

bool tide_read_only(const struct tide *t)
{
    return t->read_only;
}

bool tide_is_doubtful(const struct tide *t)
{
    return t->doubtful;
}

bool tide_is_beside_writer(const struct tide *t)
{
    return t->beside_writer;
}

const struct super *tide_super(const struct tide *t)
{
    return &t->super;
}

static struct tide *tide_new(const char *path, bool read_only)
{
    struct tide *t = xnew(struct tide);
    t->path = xstrdup(path);
    t->fd = -1;
    t->direct = true; /* until a file system refuses */
    t->read_only = read_only;
    mutex_init(&t->superblock);
    mutex_init(&t->durable);
    TAILQ_INIT(&t->writing_areas);
    waitq_init(&t->area_written);
    t->buf = block_buffer(TIDE_SUPER_BYTES + RING_BLOCK);
    return t;
}

void tide_close(struct tide *t)
{
    if (!t)
        return;
    assert(!t->writing_ring && !t->superblock.owner && TAILQ_EMPTY(&t->writing_areas));
    io_close(t->fd);
    super_fini(&t->super);
    free(t->buf);
    free(t->path);
    free(t);
}

/* Writes, durably: with O_DIRECT several at a time, else in turns. */
static int write_durable(struct tide *t, const void *buf, size_t n, uint64_t offset)
{
    assert(!t->read_only);
    if (!t->direct)
        (void)!mutex_lock(&t->durable);
    int sync = BROKEN(tide_decision_not_durable) ? 0 : RWF_DSYNC;
    int r = t->failed ? -EIO : io_pwrite_full(t->fd, buf, n, offset, sync);
    r = tide_outcome(t, r);
    if (!t->direct)
        mutex_unlock(&t->durable);
    return r;
}

/* ---- opening ---- */

/* Opens with O_DIRECT where the file system has it. One that has not may have made the file before
 * it said so: then O_EXCL finds a stale one. */
static int open_file(struct tide *t, const char *path, int flags)
{
    int fd = t->direct ? io_open(path, flags | O_DIRECT, 0600) : -EINVAL;
    if (fd == -EINVAL) {
        t->direct = false;
        fd = io_open(path, flags, 0600);
    }
    t->fd = fd < 0 ? -1 : fd;
    return fd < 0 ? fd : 0;
}

static int lock_file(struct tide *t)
{
    uint64_t deadline = clock_after_ns(LOCK_PATIENCE_NS);
    for (;;) {
        int r = io_lock(t->fd, F_WRLCK, 0, 1);
        if (r != -EAGAIN || clock_now_ns() >= deadline)
            return r == -EAGAIN ? -EBUSY : r;
        r = sleep_until(clock_after_ns(LOCK_PAUSE_NS));
        if (r < 0)
            return r;
    }
}

/* Does NAME still mean the file that is open? 1, 0, or an error. */
static int is_named(const struct tide *t, const char *name)
{
    struct stat here, named;
    int r = io_fstat(t->fd, &here);
    if (r == 0)
        r = io_stat(name, &named);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    return here.st_dev == named.st_dev && here.st_ino == named.st_ino;
}

void tide_check_name(struct tide *t)
{
    if (is_named(t, t->path) != 1 && !BROKEN(nameless_tide_goes_on))
        t->failed = true;
}

/* Opens and locks what has the name PATH at the end: a new file may be renamed to it meanwhile. */
static int open_locked(struct tide *t, struct error *err)
{
    struct stat st;
    int r = 0;
    while (r == 0) {
        io_close(t->fd);
        t->fd = -1;
        r = open_file(t, t->path, t->read_only ? O_RDONLY : O_RDWR);
        if (r == 0 && !t->read_only)
            r = lock_file(t);
        if (r == 0)
            r = is_named(t, t->path);
    }
    if (r == -EBUSY)
        return error_set(err, EBUSY, "tide file '%s' is in use by another program", t->path);
    if (r > 0)
        r = io_fstat(t->fd, &st);
    if (r < 0)
        return error_set_errno(err, -r, "opening tide file '%s'", t->path);
    if (!S_ISREG(st.st_mode))
        return error_set(err, EBADMSG, "tide file '%s' is not a regular file", t->path);
    return 0;
}

int tide_read_blocks(struct tide *t, void *buf, size_t n, uint64_t offset, bool *bad)
{
    assert(n % TIDE_ALIGN == 0);
    memset(bad, false, n / TIDE_ALIGN);
    int r = io_pread_full(t->fd, buf, n, offset);
    if (r == 0 || r == -ECANCELED)
        return r;
    for (size_t i = 0; i < n / TIDE_ALIGN; i++) {
        char *to = (char *)buf + i * TIDE_ALIGN;
        r = io_pread_full(t->fd, to, TIDE_ALIGN, offset + i * TIDE_ALIGN);
        if (r == -ECANCELED)
            return r;
        bad[i] = r < 0;
        if (r < 0)
            memset(to, 0, TIDE_ALIGN);
    }
    return 0;
}

/* One slot: 0, -EBADMSG (WHY says), or another error: it cannot be read. */
static int read_slot(struct tide *t, unsigned slot, struct super *s, struct error *why)
{
    int r = io_pread_full(t->fd, t->buf, TIDE_SUPER_BYTES, slot * TIDE_SUPER_BYTES);
    return r < 0 ? error_set_errno(why, -r, "reading it")
                 : super_decode(t->buf, TIDE_SUPER_BYTES, s, why);
}

/* A crash has torn what is in the slot that does not count. The superblock that is written there
 * next, and torn as well, may have just the sectors that it lacks: it would be valid then, and
 * newer than what has been told, and done, in between. So first it loses, durably, the sector that
 * has its checksum, and nothing else that could make it whole. If that fails the file has failed,
 * and nothing more is written to it. */
static void void_torn(struct tide *t)
{
    const uint64_t at = t->slot ? 0 : TIDE_SUPER_BYTES;

    if (io_pread_full(t->fd, t->buf, TIDE_ALIGN, at) < 0)
        memset(t->buf, 0, TIDE_ALIGN);
    else if (isal_zero_detect(t->buf, SECTOR) == 0)
        return;
    memset(t->buf, 0, SECTOR);
    if (write_durable(t, t->buf, TIDE_ALIGN, at) < 0)
        log_warning("Tide file '%s': a torn superblock cannot be taken away", t->path);
}

/* The valid superblock of the higher sequence. TORN: what is in the other slot is none. One that
 * cannot be read is no torn one: it may be the newer. */
static int read_super(struct tide *t, bool *torn, struct error *err)
{
    struct super s[2] = {{.sequence = 0}, {.sequence = 0}};
    struct error why[2] = {ERROR_INIT, ERROR_INIT};
    int r[2];
    for (unsigned i = 0; i < 2; i++)
        r[i] = read_slot(t, i, &s[i], &why[i]);

    int result = 0;
    if (r[0] < 0 && r[1] < 0) {
        const bool unread = r[0] != -EBADMSG || r[1] != -EBADMSG;
        result = r[0] == -ECANCELED || r[1] == -ECANCELED ? -ECANCELED
                 : unread                                 ? -ENODATA
                                                          : -EBADMSG;
        error_set(err, -result,
                  "tide file '%s' has no valid superblock: of the first, %s; of the second, %s",
                  t->path, why[0].text, why[1].text);
    } else {
        t->slot = r[0] < 0 || (r[1] == 0 && s[1].sequence > s[0].sequence);
        super_copy(&t->super, &s[t->slot]);
        *torn = r[!t->slot] == -EBADMSG;
        t->doubtful = r[!t->slot] < 0 && !*torn;
        if (r[!t->slot] == -ECANCELED)
            result = error_set_errno(err, ECANCELED, "reading tide file '%s'", t->path);
        else if (t->doubtful && BROKEN(unread_superblock_is_torn))
            t->doubtful = !(*torn = true);
    }
    super_fini(&s[0]);
    super_fini(&s[1]);
    return result;
}

static int open_and_read(struct tide *t, struct error *err)
{
    struct stat st;
    bool torn = false;
    int r = open_locked(t, err);
    if (r < 0)
        return r;
    r = BROKEN(tide_read_unsynced) ? 0 : io_fsync(t->fd);
    if (r == 0 || (t->read_only && (r == -EROFS || r == -EINVAL)))
        r = io_fstat(t->fd, &st);
    /* Its name, too: a program that was killed before it had made it durable has left it, and what
     * had it before would be back after a power loss. Who only reads may act on what it says (a
     * group's other disks do), but perhaps not in its directory. */
    if (r == 0)
        r = io_sync_dir_of(t->path);
    if (t->read_only && (r == -EROFS || r == -EINVAL || r == -EACCES))
        r = 0;
    if (r < 0)
        return error_set_errno(err, -r, "syncing tide file '%s'", t->path);
    r = read_super(t, &torn, err);
    if (r < 0)
        return r;
    /* Asked when the superblock is known, and before its sets are read: who comes later writes
     * another one before anything else. */
    if (t->read_only && t->super.in_use)
        t->beside_writer = io_lock_test(t->fd, F_WRLCK, 0, 1) != 0;
    t->end = t->super.extents_end;
    if ((uint64_t)st.st_size < t->end)
        return error_set(err, EBADMSG, "tide file '%s' has %lld bytes, and its areas end at %llu",
                         t->path, (long long)st.st_size, (unsigned long long)t->end);
    if (torn && !t->read_only && !BROKEN(torn_superblock_left))
        void_torn(t);
    return 0;
}

/* Where a new file is made, beside the one that it is to replace. */
static char *new_name(const struct tide *t)
{
    return xasprintf("%s.new", t->path);
}

/* What a killed program has left goes; -EBUSY: it was not killed. */
static int remove_stale(struct tide *t, const char *name)
{
    int r = open_file(t, name, O_RDWR);
    if (r == 0)
        r = io_lock(t->fd, F_WRLCK, 0, 1);
    if (r == 0)
        r = io_unlink(name);
    io_close(t->fd);
    t->fd = -1;
    return r == -EAGAIN ? -EBUSY : r == -ENOENT ? 0 : r;
}

/* A program that was killed while it made a new file for PATH has left it. */
static void sweep(const char *path)
{
    CLEANUP(tide_closep) struct tide *t = tide_new(path, false);
    CLEANUP(memory_freep) char *name = new_name(t);

    (void)remove_stale(t, name);
}

int tide_open(const char *path, bool read_only, struct tide **ret, struct error *err)
{
    CLEANUP(tide_closep) struct tide *t = tide_new(path, read_only);
    int r = t->buf ? open_and_read(t, err)
                   : error_set_errno(err, ENOMEM, "opening tide file '%s'", path);
    if (r == 0 && !read_only)
        sweep(path);
    if (r == 0)
        *ret = steal(t);
    return r;
}

int tide_unlink(const char *path, struct error *err)
{
    SHIELD();
    int r = io_unlink(path);
    if (r == 0 || r == -ENOENT)
        r = io_sync_dir_of(path);
    return r < 0 ? error_set_errno(err, -r, "removing tide file '%s'", path) : 0;
}

int tide_remove(struct tide *t, struct error *err)
{
    int r = tide_unlink(t->path, err);
    tide_close(t);
    return r;
}

/* ---- the ring is written ---- */

static uint64_t ring_place(const struct ring_block *b, unsigned slots)
{
    unsigned blocks = BROKEN(ring_of_c_blocks) && b->slice_length
                          ? ring_full_table(slots, b->slice_length)
                          : TIDE_RING_BLOCKS;
    return b->sequence % blocks * RING_BLOCK;
}

int tide_write_ring(struct tide *t, const struct ring_block *b)
{
    assert(!t->writing_ring);
    SHIELD();
    uint8_t *buf = t->buf + TIDE_SUPER_BYTES;
    t->writing_ring = true;
    ring_encode(b, buf);
    int r = write_durable(t, buf, RING_BLOCK, TIDE_RING_OFFSET + ring_place(b, t->super.slots));
    t->writing_ring = false;
    return r;
}

/* The first transaction of session S changes nothing; because of it a ring in which there is none
 * of the session is a lost one, and not an empty table. */
static bool has_opening(const struct super *s)
{
    return s->level == TIDE_POWER && s->in_use && !BROKEN(lost_ring_is_empty);
}

static struct ring_block *make_opening(const struct super *s)
{
    struct ring_block *b = xnew(struct ring_block);
    b->session = s->session;
    b->sequence = s->ring_sequence;
    return b;
}

static int open_ring(struct tide *t, const struct super *s)
{
    CLEANUP(memory_freep) struct ring_block *b = make_opening(s);
    return tide_write_ring(t, b);
}

/* ---- what decides ---- */

int tide_sync(struct tide *t)
{
    assert(!t->read_only);
    SHIELD();
    if (!t->direct)
        (void)!mutex_lock(&t->durable);
    int r = tide_outcome(t, t->failed ? -EIO : io_fdatasync(t->fd));
    if (!t->direct)
        mutex_unlock(&t->durable);
    return r;
}

/* What could not be read has been outdone by what the other slot durably holds, and goes: written
 * in full, it can be read again. */
static void settle_doubt(struct tide *t)
{
    t->doubtful = false;
    memset(t->buf, 0, TIDE_SUPER_BYTES);
    if (write_durable(t, t->buf, TIDE_SUPER_BYTES, t->slot ? 0 : TIDE_SUPER_BYTES) < 0)
        log_warning("Tide file '%s': a superblock that cannot be read cannot be taken away",
                    t->path);
}

static int write_super(struct tide *t, struct super *s, struct error *err)
{
    size_t length;
    const bool doubtful = t->doubtful;

    if (t->failed)
        return error_set(err, EIO, "tide file '%s' has failed before", t->path);
    assert(tide_id_equal(&s->uuid, &t->super.uuid) && s->next_epoch >= t->super.next_epoch);
    /* A superblock that cannot be read may be the next one already. */
    s->sequence = t->super.sequence + (doubtful && !BROKEN(doubt_not_outdone) ? 2 : 1);
    int r = super_encode(s, t->buf, &length, err);
    if (r < 0)
        return error_wrap(err, "writing tide file '%s'", t->path);
    /* Durable before the superblock: from then on a ring without it is not believed. */
    const bool begins = !tide_id_equal(&s->session, &t->super.session) && has_opening(s);
    if (begins && !BROKEN(ring_opened_late))
        r = open_ring(t, s);
    /* Torn over one that cannot be read, it would make that one torn, too, and the older one count.
     * Torn over the older one it leaves none that does. */
    unsigned slot = BROKEN(superblock_same_slot) ? t->slot : !t->slot;
    if (doubtful && !BROKEN(doubt_overwritten))
        slot = t->slot;
    if (r == 0)
        r = write_durable(t, t->buf, length, slot * TIDE_SUPER_BYTES);
    if (r == 0 && begins && BROKEN(ring_opened_late))
        r = open_ring(t, s);
    if (r < 0)
        return error_set_errno(err, -r, "writing the superblock of tide file '%s'", t->path);
    super_fini(&t->super);
    t->super = *s;
    t->slot = slot;
    *s = (struct super){0};
    if (doubtful)
        settle_doubt(t);
    return 0;
}

int tide_write_super(struct tide *t, struct super *s, struct error *err)
{
    SHIELD();
    if (BROKEN(two_superblock_writers))
        return write_super(t, s, err);
    LOCKED(&t->superblock);
    return write_super(t, s, err);
}

/* Makes the file reach to END, with blocks where the file system can promise them. */
static int reserve(int fd, uint64_t at, uint64_t end)
{
    struct stat st;
    int r = io_fallocate(fd, 0, at, end - at);
    if (r != -EOPNOTSUPP && r != -ENOSYS)
        return r;
    r = io_fstat(fd, &st);
    return r < 0 || (uint64_t)st.st_size >= end ? r : io_ftruncate(fd, end);
}

static uint64_t extent_room(const struct super *s, unsigned granularity_bits)
{
    return tide_extent_bytes(max_u64(s->size_bytes, s->resizing_bytes), granularity_bits);
}

/* Moves *AT behind the extent of S's tables that ends last of those that R would overlap. */
static bool step_over(const struct super *s, struct range r, uint64_t *at)
{
    const struct tide_table *const tables[] = {&s->table, &s->next};
    bool stepped = false;
    for (unsigned i = 0; i < ARRAY_SIZE(tables); i++)
        for (size_t k = 0; k < tables[i]->n; k++)
            for (unsigned e = 0; e < TIDE_EXTENTS; e++) {
                const struct tide_bitmap *b = &tables[i]->items[k];
                struct range taken = range_make(b->extent[e], extent_room(s, b->granularity_bits));
                if (b->extent[e] && range_overlaps(taken, r) && range_end(taken) > *at) {
                    *at = range_end(taken);
                    stepped = true;
                }
            }
    return stepped;
}

/* The first room of BYTES that neither the durable superblock nor S knows an extent in. What a
 * bitmap that has been removed had is used again: only its epoch could make it speak. */
static uint64_t find_room(const struct tide *t, const struct super *s, uint64_t bytes)
{
    uint64_t at = TIDE_EXTENTS_OFFSET;
    while (step_over(s, range_make(at, bytes), &at) ||
           step_over(&t->super, range_make(at, bytes), &at))
        continue;
    return at;
}

static int grow_file(struct tide *t, uint64_t end, struct error *err)
{
    int r = reserve(t->fd, t->end, end);
    if (r < 0)
        return error_set_errno(err, -r, "allocating %llu bytes more of tide file '%s'",
                               (unsigned long long)(end - t->end), t->path);
    if (!t->direct)
        (void)!mutex_lock(&t->durable);
    if (!BROKEN(room_not_durable))
        r = tide_outcome(t, t->failed ? -EIO : io_fsync(t->fd));
    if (!t->direct)
        mutex_unlock(&t->durable);
    if (r < 0)
        return error_set_errno(err, -r, "syncing tide file '%s'", t->path);
    t->end = max_u64(t->end, end);
    return 0;
}

int tide_allocate(struct tide *t, struct super *s, uint64_t bytes, uint64_t *offset,
                  struct error *err)
{
    assert(!t->read_only);
    SHIELD();
    if (t->failed)
        return error_set(err, EIO, "tide file '%s' has failed before", t->path);
    uint64_t at = find_room(t, s, align_up(bytes, TIDE_ALIGN));
    uint64_t end = at + align_up(bytes, TIDE_ALIGN);
    int r = end <= t->end ? 0 : grow_file(t, end, err);
    if (r < 0)
        return r;
    s->extents_end = max_u64(s->extents_end, end);
    *offset = at;
    return 0;
}

/* ---- the ring is read ---- */

/* The blocks of this session that are in BUF; damaged ones, and good ones in a wrong place, are
 * marked in BAD. */
static size_t decode_ring(const struct tide *t, const uint8_t *buf, struct ring_block *blocks,
                          bool *bad)
{
    size_t n = 0;
    for (unsigned i = 0; i < TIDE_RING_BLOCKS; i++) {
        struct ring_block *b = &blocks[n];
        enum ring_state state =
            bad[i] ? RING_BAD : ring_decode(buf + (size_t)i * RING_BLOCK, &t->super.session, b);
        if (state == RING_OURS && b->sequence % TIDE_RING_BLOCKS != i && !BROKEN(ring_of_c_blocks))
            state = RING_BAD;
        bad[i] = state == RING_BAD;
        n += state == RING_OURS;
    }
    return n;
}

int tide_read_ring(struct tide *t, uint32_t *table, uint64_t *next_sequence, struct error *err)
{
    const size_t bytes = TIDE_RING_BLOCKS * RING_BLOCK;
    CLEANUP(memory_freep) uint8_t *buf = block_buffer(bytes);
    CLEANUP(memory_freep)
    struct ring_block *blocks = xcalloc(TIDE_RING_BLOCKS + 1, sizeof *blocks);
    bool bad[TIDE_RING_BLOCKS], unread[TIDE_RING_BLOCKS];
    uint64_t next;

    if (!buf)
        return error_set_errno(err, ENOMEM, "reading tide file '%s'", t->path);
    int r = tide_read_blocks(t, buf, bytes, TIDE_RING_OFFSET, bad);
    if (r < 0)
        return error_set_errno(err, -r, "reading tide file '%s'", t->path);
    memcpy(unread, bad, sizeof unread);
    size_t n = decode_ring(t, buf, blocks, bad);
    r = ring_rebuild(blocks, n, t->super.ring_sequence, table, t->super.slots, &next, err);
    if (r < 0)
        return error_wrap(err, "tide file '%s'", t->path);
    if (unread[next % TIDE_RING_BLOCKS] && !BROKEN(unread_block_is_torn))
        return error_set(
            err, EBADMSG,
            "tide file '%s': transaction %llu of the hot ring, which may be the newest, "
            "cannot be read",
            t->path, (unsigned long long)next);
    /* One is in flight at a time: so one may be torn. The second would have been whole, and newer.
     */
    if (bad[next % TIDE_RING_BLOCKS] && bad[(next + 1) % TIDE_RING_BLOCKS])
        return error_set(err, EBADMSG,
                         "tide file '%s': two blocks of the hot ring are damaged after transaction "
                         "%llu",
                         t->path, (unsigned long long)next - 1);
    *next_sequence = next;
    return 0;
}

/* ---- a new file ---- */

/* All that is to be in it, made before the first wait. */
struct draft {
    uint8_t *head; /* superblocks and ring */
    struct area_copy *areas;
    size_t n_areas;
};

static void draft_fini(struct draft *d)
{
    for (size_t i = 0; i < d->n_areas; i++)
        area_copy_fini(&d->areas[i]);
    free(d->areas);
    free(d->head);
}

static uint64_t place_one(struct super *s, unsigned granularity_bits)
{
    uint64_t at = s->extents_end;
    s->extents_end +=
        tide_extent_bytes(max_u64(s->size_bytes, s->resizing_bytes), granularity_bits);
    return at;
}

static bool is_used(const struct tide_bitmap *b, unsigned extent)
{
    return extent == b->current.extent || (b->successor.epoch && extent == b->successor.extent);
}

static uint64_t epoch_in(const struct tide_bitmap *b, unsigned extent)
{
    return b->current.extent == extent     ? b->current.epoch
           : b->successor.extent == extent ? b->successor.epoch
                                           : 0;
}

/* Where the table has the area that extent E of B, of the prepared one, is: an epoch is one area's.
 * 0: it has not. */
static uint64_t shared_extent(const struct super *s, const struct tide_bitmap *b, unsigned e)
{
    const uint64_t epoch = epoch_in(b, e);

    for (size_t k = 0; epoch && k < s->table.n; k++)
        for (unsigned o = 0; o < TIDE_EXTENTS; o++)
            if (epoch_in(&s->table.items[k], o) == epoch)
                return s->table.items[k].extent[o];
    return 0;
}

/* Gives both tables extents. What the prepared one has in common with the other it keeps in common,
 * which is told by the areas' epochs, and by the offsets that they had. */
static void place(struct super *s, const struct super *before)
{
    bool none = s->level == TIDE_PROCESS && s->in_use;
    s->extents_end = TIDE_EXTENTS_OFFSET;
    for (size_t i = 0; i < s->table.n; i++)
        for (unsigned e = 0; e < TIDE_EXTENTS; e++)
            s->table.items[i].extent[e] = none || !is_used(&s->table.items[i], e)
                                              ? 0
                                              : place_one(s, s->table.items[i].granularity_bits);
    for (size_t i = 0; i < s->next.n; i++)
        for (unsigned e = 0; e < TIDE_EXTENTS; e++) {
            struct tide_bitmap *b = &s->next.items[i];
            const uint64_t was = before->next.items[i].extent[e];
            uint64_t is = shared_extent(s, b, e);
            for (size_t k = 0; was && !is && k < s->table.n; k++)
                for (unsigned o = 0; o < TIDE_EXTENTS; o++)
                    if (before->table.items[k].extent[o] == was)
                        is = s->table.items[k].extent[o];
            b->extent[e] = none || !is_used(b, e) ? 0 : is ? is : place_one(s, b->granularity_bits);
        }
}

static int draft_area(struct draft *d, const struct super *s, const struct tide_bitmap *b,
                      const struct tide_area *a, const struct bitmap *bits)
{
    const struct range all = range_make(0, bits ? bitmap_size(bits) : 0);
    if (!bits || !a->epoch || !b->extent[a->extent])
        return 0;
    return area_copy_take(&d->areas[d->n_areas++], &s->uuid, b->extent[a->extent], a->epoch, bits,
                          &all, 1);
}

static void draft_ring(struct draft *d, const struct super *s, const uint32_t *table)
{
    CLEANUP(memory_freep) struct ring_block *b = make_opening(s);
    unsigned n = table ? ring_full_table(s->slots, RING_SLICE) : has_opening(s);
    for (unsigned i = 0; i < n; i++) {
        b->sequence = s->ring_sequence + i;
        if (table)
            ring_slice(b, table, s->slots, RING_SLICE);
        ring_encode(b, d->head + TIDE_RING_OFFSET + ring_place(b, s->slots));
    }
}

static int draft_make(struct draft *d, const struct super *s, const struct bitmap *const *current,
                      const struct bitmap *const *successor, const uint32_t *table,
                      struct error *err)
{
    size_t length;
    int r = -ENOMEM;
    d->head = block_buffer(TIDE_EXTENTS_OFFSET);
    d->areas = xcalloc(2 * s->table.n + 1, sizeof *d->areas);
    if (d->head) {
        memset(d->head, 0, TIDE_EXTENTS_OFFSET);
        r = super_encode(s, d->head, &length, err);
        if (r < 0)
            return r;
        draft_ring(d, s, table);
    }
    for (size_t i = 0; i < s->table.n && r == 0; i++) {
        const struct tide_bitmap *b = &s->table.items[i];
        r = draft_area(d, s, b, &b->current, current ? current[i] : NULL);
        if (r == 0)
            r = draft_area(d, s, b, &b->successor, successor ? successor[i] : NULL);
    }
    return r < 0 ? error_set_errno(err, -r, "copying %zu bitmaps", s->table.n) : 0;
}

/* A new and empty file with a lock of ours. Before it has the lock another may take it for a stale
 * one and remove it; then both try again. */
static int make_file(struct tide *t, const char *name)
{
    for (;;) {
        int r = open_file(t, name, O_RDWR | O_CREAT | O_EXCL);
        if (r == 0) {
            r = io_lock(t->fd, F_WRLCK, 0, 1);
            if (r == 0 && (r = is_named(t, name)) > 0)
                return 0;
            io_close(t->fd);
            t->fd = -1;
        } else if (r == -EEXIST) {
            r = remove_stale(t, name);
        }
        if (r < 0 && r != -EAGAIN)
            return r;
    }
}

static int fill_file(struct tide *t, const struct draft *d)
{
    int r = reserve(t->fd, 0, t->super.extents_end);
    if (r == 0)
        r = io_pwrite_full(t->fd, d->head, TIDE_EXTENTS_OFFSET, 0, 0);
    for (size_t i = 0; i < d->n_areas && r == 0; i++)
        r = area_copy_write(&d->areas[i], t->fd);
    return r < 0 || BROKEN(tide_new_not_synced) ? r : io_fsync(t->fd);
}

static int create_file(struct tide *t, const struct draft *d, struct error *err)
{
    CLEANUP(memory_freep) char *name = new_name(t);
    int r = make_file(t, name);
    if (r == -EBUSY)
        return error_set(err, EBUSY, "'%s' is being made by another program", name);
    if (r == 0)
        r = fill_file(t, d);
    if (r == 0)
        r = io_rename(name, t->path);
    if (r < 0) {
        if (t->fd >= 0)
            (void)io_unlink(name);
        return error_set_errno(err, -r, "making tide file '%s'", t->path);
    }
    r = BROKEN(tide_directory_not_synced) || BROKEN(guard_same_uuid) ? 0 : io_sync_dir_of(t->path);
    if (r < 0)
        return error_set_errno(err, -r,
                               "tide file '%s' is new, or after a power loss may be the old one: "
                               "syncing its directory",
                               t->path);
    return 0;
}

int tide_create(const char *path, struct super *s, const struct bitmap *const *current,
                const struct bitmap *const *successor, const uint32_t *table, struct tide **ret,
                struct error *err)
{
    CLEANUP(tide_closep) struct tide *t = tide_new(path, false);
    struct draft d = {0};
    SHIELD();

    super_copy(&t->super, s);
    t->super.sequence++;
    place(&t->super, s);
    t->end = t->super.extents_end;
    int r = t->buf ? draft_make(&d, &t->super, current, successor, table, err)
                   : error_set_errno(err, ENOMEM, "copying %zu bitmaps", s->table.n);
    r = r < 0 ? error_wrap(err, "making tide file '%s'", path) : create_file(t, &d, err);
    draft_fini(&d);
    if (r < 0)
        return r;
    super_fini(s);
    super_copy(s, &t->super);
    *ret = steal(t);
    return 0;
}
