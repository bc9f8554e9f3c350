/* What happens to a machine besides the program: somebody else writes an image, run segments are
 * lost within a boot, those of an older life come back (a container with a runtime directory of its
 * own, or put back as it once was; a directory that is no tmpfs).
 *
 * Somebody's write must be told where the raw witness can tell it (persist/witness.h): the tide
 * file is closed; or the power has gone since; or the program was killed with no write in flight
 * and has left its stamp. Else the disk is `blind`, and its clients begin anew. */
#include "history.h"

#include "persist/super.h"

#include <limits.h>

enum { SEGMENT_HEADER = 4096 }; /* src/persist/segment.h */

/* ---- somebody else writes ---- */

/* The newest superblock of D's tide file, as the page cache has it. */
static bool read_super(struct history *h, const struct disk *d, struct super *ret)
{
    char path[SIM_PATH + 8];
    uint64_t size;
    bool found = false;

    snprintf(path, sizeof path, "%s.tide", d->path);
    uint8_t *bytes = machine_dump(&h->m, path, &size);
    for (unsigned i = 0; bytes && i < 2 && (i + 1) * TIDE_SUPER_BYTES <= size; i++) {
        struct super s = {0};
        if (super_decode(bytes + i * TIDE_SUPER_BYTES, TIDE_SUPER_BYTES, &s, NULL) < 0 ||
            (found && s.sequence < ret->sequence)) {
            super_fini(&s);
            continue;
        }
        if (found)
            super_fini(ret);
        *ret = s;
        found = true;
    }
    free(bytes);
    return found;
}

/* The stamp of a session is made when its superblock is durable, and before the first write. In
 * between there is none, and only then: then nothing tells. */
static bool was_cut_before_its_stamp(struct history *h, const struct disk *d)
{
    char path[100] = SIM_RUNTIME "/run-";
    uint8_t session[16] = {0};
    struct super s = {0};

    const struct inode *image = store_find(&h->m.store, d->path);
    if (!image || !read_super(h, d, &s))
        return false;
    for (unsigned i = 0; i < sizeof s.uuid.bytes; i++)
        snprintf(path + strlen(path), sizeof path - strlen(path), "%02x", s.uuid.bytes[i]);
    strcat(path, "-stamp");
    struct inode *stamp = store_find(&h->m.store, path);
    bool has = stamp && inode_read(stamp, session, sizeof session, 0) == sizeof session &&
               memcmp(session, s.session.bytes, sizeof session) == 0;
    bool written = image->times.ctime_ns != s.witness.ctime_ns;
    super_fini(&s);
    return !has && !written;
}

/* Does the witness tell what is written now? */
static bool is_told(struct history *h, const struct disk *d, bool closed)
{
    if (h->with_faults || h->clock_set)
        return false;
    return closed || (h->with_runtime && !h->runtime_disturbed && !d->cut_in_flight &&
                      !was_cut_before_its_stamp(h, d));
}

static void somebody_writes(struct history *h, struct disk *d, bool told)
{
    uint64_t size, n = 1 + dice_below(&h->more_dice, 4);
    uint64_t first = dice_below(&h->more_dice, d->model.n - n);
    uint8_t *bytes = machine_dump(&h->m, d->path, &size);

    free(bytes);
    if (!bytes || size != d->size || !model_has_room(&d->model, first, n))
        return;
    HEAP_OF_THE_MACHINE();
    uint32_t stamp = ++h->next_stamp;
    bytes = malloc(n * MODEL_SECTOR);
    assert(bytes);
    for (uint64_t i = 0; i < n; i++)
        stamp_fill(bytes + i * MODEL_SECTOR, stamp);
    uint64_t begun = model_begin(&d->model, first, n, stamp);
    machine_foreign_write(&h->m, d->path, bytes, n * MODEL_SECTOR, first * MODEL_SECTOR);
    /* After a power loss all that there is counts as durable (model_seen). */
    bool syncs = d->left == LEFT_POWERLESS || one_in(&h->more_dice, 2);
    if (syncs) {
        struct inode *i = store_find(&h->m.store, d->path);
        inode_sync(i, store_moment(&h->m.store), true);
    }
    model_end(&d->model, first, n, begun, true, syncs);
    free(bytes);
    d->foreign = true;
    d->blind |= !told;
}

/* ---- a sector goes bad ---- */

/* The block of the ring in which a sector may go, and who reads it can tell: not the newest, unless
 * it cannot be read, and not what follows it, which is where a torn one would be. -1: there is
 * none. */
static int older_block(struct history *h, const uint8_t *bytes, uint64_t size,
                       const struct super *s, bool newest_too)
{
    struct ring_block b;
    uint64_t newest = 0;
    int older[TIDE_RING_BLOCKS], n = 0;

    for (unsigned pass = 0; pass < 2; pass++)
        for (int i = 0; i < TIDE_RING_BLOCKS && size >= TIDE_EXTENTS_OFFSET; i++) {
            const uint8_t *at = bytes + TIDE_RING_OFFSET + (uint64_t)i * RING_BLOCK;
            if (ring_decode(at, &s->session, &b) != RING_OURS)
                continue;
            if (!pass)
                newest = max_u64(newest, b.sequence);
            else if (b.sequence < newest || newest_too)
                older[n++] = i;
        }
    return n ? older[dice_below(&h->bad_dice, (uint64_t)n)] : -1;
}

/* An area that is in use; 0: there is none. */
static uint64_t some_area(struct history *h, const struct super *s)
{
    uint64_t all[64];
    unsigned n = 0;
    for (size_t i = 0; i < s->table.n; i++) {
        const struct tide_bitmap *b = &s->table.items[i];
        const struct tide_area areas[] = {b->current, b->successor};
        for (unsigned k = 0; k < ARRAY_SIZE(areas) && n < ARRAY_SIZE(all); k++)
            if (areas[k].epoch && b->extent[areas[k].extent])
                all[n++] = b->extent[areas[k].extent];
    }
    return n ? all[dice_below(&h->bad_dice, n)] : 0;
}

static void spoil(struct history *h, const struct disk *d)
{
    char path[SIM_PATH + 8];
    uint8_t junk[SIM_SECTOR];
    uint64_t size, at = 0;
    struct super s = {0};

    if (!read_super(h, d, &s))
        return;
    snprintf(path, sizeof path, "%s.tide", d->path);
    uint8_t *bytes = machine_dump(&h->m, path, &size);
    const bool readable = one_in(&h->bad_dice, 2);
    int block = older_block(h, bytes, size, &s, !readable); /* garbage may be what a crash tears */
    bool found = true;
    if (!readable && one_in(&h->bad_dice, 3)) /* garbage would be a torn one */
        at = dice_below(&h->bad_dice, 2) * TIDE_SUPER_BYTES;
    else if (block >= 0 && one_in(&h->bad_dice, 2))
        at = TIDE_RING_OFFSET + (uint64_t)block * RING_BLOCK;
    else
        found = (at = some_area(h, &s)) != 0;
    super_fini(&s);
    free(bytes);
    if (!found || at + SIM_SECTOR > size)
        return;
    HEAP_OF_THE_MACHINE();
    struct inode *i = store_find(&h->m.store, path);
    for (size_t k = 0; k < sizeof junk; k++)
        junk[k] = (uint8_t)dice_next(&h->bad_dice);
    (void)!inode_write(i, junk, sizeof junk, at, true, NULL);
    inode_sync(i, store_moment(&h->m.store), true);
    if (!readable)
        i->bad_sector = at / SIM_SECTOR + 1;
    h->spoiled = true;
    h->m.n_faults++; /* its bitmaps may be lost */
    machine_note(&h->m, "%s: sector %llu is %s", path, (unsigned long long)(at / SIM_SECTOR),
                 readable ? "garbage" : "unreadable");
}

void others_spoil(struct history *h)
{
    h->bad_dice = (struct dice){h->seed ^ 0xbad5ec ^ h->m.events};
    if (!settings.persist || settings.no_faults || settings.exhaustive || !one_in(&h->bad_dice, 12))
        return;
    for (unsigned i = 0; i < h->n_disks; i++)
        spoil(h, &h->disks[i]);
}

/* ---- run segments ---- */

struct saved_file {
    struct saved_file *next;
    char path[SIM_PATH];
    uint8_t *bytes;
    uint64_t size;
};

static void forget_saved(struct history *h)
{
    struct saved_file *f;
    while ((f = h->saved)) {
        h->saved = f->next;
        free(f->bytes);
        free(f);
    }
}

static void save_segments(struct history *h)
{
    struct dir *d = store_dir(&h->m.store, SIM_RUNTIME);
    struct name *n;
    if (!d || TAILQ_EMPTY(&d->names))
        return;
    forget_saved(h);
    TAILQ_FOREACH (n, &d->names, link) {
        if (!n->now)
            continue;
        struct saved_file *f = xnew(struct saved_file);
        assert(strlen(SIM_RUNTIME) + 1 + strlen(n->text) < SIM_PATH);
        memcpy(f->path, SIM_RUNTIME "/", sizeof SIM_RUNTIME);
        memcpy(f->path + sizeof SIM_RUNTIME, n->text, strlen(n->text) + 1);
        f->bytes = inode_dump(n->now, &f->size);
        f->next = h->saved;
        h->saved = f;
    }
}

/* Words of a session that went on are nobody's to put back: nothing could tell. Their header is
 * that of what is there now. */
static void forget_what_went_on(struct history *h)
{
    struct dir *d = store_dir(&h->m.store, SIM_RUNTIME);
    struct name *n;

    for (struct saved_file *f = h->saved; d && f; f = f->next)
        TAILQ_FOREACH (n, &d->names, link) {
            if (!n->now || strcmp(n->text, f->path + sizeof SIM_RUNTIME))
                continue;
            uint64_t size;
            uint8_t *now = inode_dump(n->now, &size);
            if (size >= SEGMENT_HEADER && f->size >= SEGMENT_HEADER &&
                memcmp(now, f->bytes, SEGMENT_HEADER) == 0)
                f->size = 0;
            free(now);
        }
}

static bool lose_segments(struct history *h)
{
    struct dir *d = store_dir(&h->m.store, SIM_RUNTIME);
    struct name *n;
    bool any = false;
    for (n = d ? TAILQ_FIRST(&d->names) : NULL; n; n = d ? TAILQ_FIRST(&d->names) : NULL) {
        char path[SIM_PATH] = SIM_RUNTIME "/";
        memcpy(path + sizeof SIM_RUNTIME, n->text, strlen(n->text) + 1);
        if (store_unlink(&h->m.store, path) < 0)
            break;
        any = true;
    }
    return any;
}

static void bring_back_segments(struct history *h)
{
    for (const struct saved_file *f = h->saved; f; f = f->next) {
        struct inode *i;
        /* An old stamp says that somebody else wrote: safe, and dull. */
        if (!f->size || strstr(f->path, "-stamp"))
            continue;
        if (store_create(&h->m.store, f->path, true, &i) == 0)
            (void)!inode_write(i, f->bytes, f->size, 0, false, NULL);
    }
}

/* ---- when ---- */

bool others_disturb_segments(struct history *h)
{
    struct dice *more = &h->more_dice;
    bool disturbed = false;
    if (!with_others() || !h->with_runtime)
        return false;
    bool older = h->saved && h->saved_of != h->life_number;
    if (older && one_in(more, 4)) {
        machine_note(&h->m, "run segments of an older life are back");
        forget_what_went_on(h);
        (void)lose_segments(h);
        bring_back_segments(h);
        disturbed = true;
    } else if (one_in(more, 12)) {
        machine_note(&h->m, "the run segments are lost");
        disturbed = lose_segments(h);
        forget_saved(h); /* their session may go on without them */
    }
    if (one_in(more, 2)) {
        save_segments(h);
        h->saved_of = UINT_MAX;
    }
    h->runtime_disturbed |= disturbed;
    for (unsigned i = 0; disturbed && i < h->n_disks; i++) /* the stamp is gone that would tell */
        h->disks[i].blind |= h->disks[i].foreign;
    return disturbed;
}

void others_copy_segments(struct history *h)
{
    if (with_others() && h->with_runtime && one_in(&h->more_dice, 4)) {
        HEAP_OF_THE_MACHINE();
        save_segments(h);
        h->saved_of = h->life_number;
    }
}

void others_between(struct history *h, enum life_end end, bool power)
{
    for (unsigned i = 0; i < h->n_disks; i++) {
        struct disk *d = &h->disks[i];
        if (power && d->foreign)
            d->blind = true; /* nobody has seen it before its traces went */
        if (!with_others() || d->qcow2 || !d->made || !one_in(&h->more_dice, 16))
            continue;
        machine_pass_time(&h->m, NSEC_PER_SEC / 10);
        somebody_writes(h, d, is_told(h, d, end == END_CLEAN || power));
        machine_pass_time(&h->m, NSEC_PER_SEC / 10);
    }
}

void others_while_closed(struct history *h, struct disk *d)
{
    if (one_in(&h->more_dice, 3))
        somebody_writes(h, d, is_told(h, d, true));
}

void others_fini(struct history *h)
{
    forget_saved(h);
}
