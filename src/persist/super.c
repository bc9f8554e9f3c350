/* The superblock: what it owns, its bytes, and what must hold of it.
 *
 *     0     8   "TIDEMARK"               112  104  witness (witness.h):
 *     8     4   version, 1               112  4      kind
 *     12    4   CRC32C of the rest       116  4      zero
 *     16    4   length of all this       120  16     boot
 *     20    4   flags                    136  16     file system
 *     24    8   sequence                 152  8      inode
 *     32    16  uuid                     160  8      time of birth
 *     48    16  session                  168  8      size
 *     64    8   size of the disk         176  16     mtime, ctime
 *     72    8   its size to be           192  16     writes, sectors
 *     80    4   region_bits              208  4    bitmaps
 *     84    4   slots                    212  4    bitmaps of the prepared table
 *     88    8   ring_sequence            216  4    commit records
 *     96    8   next_epoch               220  4    zero
 *     104   8   extents_end              224  16   group prepared, or zero
 *                                        240  32   driver
 *     272   bitmaps; if a group is prepared its coordinator and its bitmaps; commit records
 *
 * (docs/format/tide.md has the rest.) Encoding and decoding share one check of what must hold, so
 * that nothing is written that could not be read. */
#include "persist/super.h"

#include "base/cursor.h"
#include "base/range.h"
#include "persist/crc.h"

#include <isa-l/mem_routines.h>

static const uint8_t magic[8] = {'T', 'I', 'D', 'E', 'M', 'A', 'R', 'K'};

enum {
    VERSION = 1,
    CRC_AT = 12,
    LENGTH_AT = 16,
    HEAD = 272,
    BITMAP_HEAD = 56, /* before the name */
    MEMBER_HEAD = 18, /* before the path */
    RECORD_HEAD = 20,
};

enum { SUPER_IN_USE = 1, SUPER_PROCESS = 2, SUPER_FLAGS = 3 };
enum {
    BITMAP_ENABLED = 1,
    BITMAP_INCONSISTENT = 2,
    BITMAP_BASED = 4,
    BITMAP_HAS_JOB = 8,
    BITMAP_ONLY_IF_YES = 16,
    BITMAP_ENABLED_IF_YES = 32,
    BITMAP_FLAGS = 63,
};

#define RECORD_UNDECIDED (UINT32_C(1) << 31)

/* ---- memory ---- */

static void bitmap_fini(struct tide_bitmap *b)
{
    free(b->name);
    free(b->last_job);
}

void tide_table_fini(struct tide_table *t)
{
    for (size_t i = 0; i < t->n; i++)
        bitmap_fini(&t->items[i]);
    free(t->items);
    *t = (struct tide_table){0};
}

void tide_table_copy(struct tide_table *to, const struct tide_table *from)
{
    to->n = from->n;
    to->items = from->n ? xcalloc(from->n, sizeof *to->items) : NULL;
    for (size_t i = 0; i < from->n; i++) {
        to->items[i] = from->items[i];
        to->items[i].name = xstrdup(from->items[i].name);
        if (from->items[i].last_job)
            to->items[i].last_job = xstrdup(from->items[i].last_job);
    }
}

struct tide_bitmap *tide_table_find(struct tide_table *t, const char *name)
{
    for (size_t i = 0; i < t->n; i++)
        if (strcmp(t->items[i].name, name) == 0)
            return &t->items[i];
    return NULL;
}

bool tide_id_equal(const struct tide_id *a, const struct tide_id *b)
{
    return memcmp(a->bytes, b->bytes, sizeof a->bytes) == 0;
}

bool tide_id_none(const struct tide_id *id)
{
    static const struct tide_id none;
    return tide_id_equal(id, &none);
}

static void member_copy(struct tide_member *to, const struct tide_member *from)
{
    *to = *from;
    if (from->path)
        to->path = xstrdup(from->path);
}

static void record_fini(struct tide_record *r)
{
    for (size_t i = 0; i < r->n; i++)
        free(r->members[i].path);
    free(r->members);
}

void super_fini(struct super *s)
{
    tide_table_fini(&s->table);
    tide_table_fini(&s->next);
    free(s->coordinator.path);
    for (size_t i = 0; i < s->n_records; i++)
        record_fini(&s->records[i]);
    free(s->records);
    *s = (struct super){0};
}

static void record_copy(struct tide_record *to, const struct tide_record *from)
{
    *to = *from;
    to->members = from->n ? xcalloc(from->n, sizeof *to->members) : NULL;
    for (size_t i = 0; i < from->n; i++)
        member_copy(&to->members[i], &from->members[i]);
}

void super_add_record(struct super *s, const struct tide_record *record)
{
    struct tide_record *all = xcalloc(s->n_records + 1, sizeof *all);
    if (s->n_records)
        memcpy(all, s->records, s->n_records * sizeof *all);
    free(s->records);
    s->records = all;
    record_copy(&s->records[s->n_records++], record);
}

void super_drop_record(struct super *s, const struct tide_id *group)
{
    for (size_t i = 0; i < s->n_records; i++) {
        if (!tide_id_equal(&s->records[i].group, group))
            continue;
        record_fini(&s->records[i]);
        s->records[i] = s->records[--s->n_records];
        return;
    }
}

void super_copy(struct super *to, const struct super *from)
{
    *to = *from;
    tide_table_copy(&to->table, &from->table);
    tide_table_copy(&to->next, &from->next);
    member_copy(&to->coordinator, &from->coordinator);
    to->records = from->n_records ? xcalloc(from->n_records, sizeof *to->records) : NULL;
    for (size_t i = 0; i < from->n_records; i++)
        record_copy(&to->records[i], &from->records[i]);
}

/* ---- what must hold ---- */

/* Each check says what is wrong with CODE. Bitmaps are told by their number: a name comes from
 * whoever wrote the file, and a message is one line. */
struct check {
    const struct super *s;
    uint64_t size_bytes; /* the larger of the disk's sizes */
    int code;
    struct error *err;
};

#define REFUSE(c, ...) return error_set((c)->err, (c)->code, __VA_ARGS__)
#define LLU(n) ((unsigned long long)(n))

static int check_text(const struct check *c, const char *what, size_t i, const char *text,
                      size_t max)
{
    size_t n = text ? strnlen(text, max + 1) : 0;
    if (n == 0)
        REFUSE(c, "%s %zu is empty", what, i);
    if (n > max)
        REFUSE(c, "%s %zu has more than %zu bytes", what, i, max);
    return 0;
}

static int check_area(const struct check *c, const char *table, size_t i, const char *what,
                      const struct tide_area *a)
{
    if (a->extent >= TIDE_EXTENTS)
        REFUSE(c, "%s %zu: the %s area is in extent %u, not 0..%d", table, i, what, a->extent,
               TIDE_EXTENTS - 1);
    if (a->epoch >= c->s->next_epoch)
        REFUSE(c, "%s %zu: the %s area's epoch is %llu, and the next one to be used %llu", table, i,
               what, LLU(a->epoch), LLU(c->s->next_epoch));
    return 0;
}

static int check_bitmap(const struct check *c, const char *table, size_t i,
                        const struct tide_bitmap *b)
{
    int r = check_text(c, table, i, b->name, TIDE_NAME_MAX);
    if (r == 0 && b->granularity_bits - 9 > 31 - 9)
        REFUSE(c, "%s %zu: granularity_bits is %u, not 9..31", table, i, b->granularity_bits);
    if (r == 0 && !b->current.epoch)
        REFUSE(c, "%s %zu has no current area", table, i);
    if (r == 0)
        r = check_area(c, table, i, "current", &b->current);
    if (r == 0)
        r = check_area(c, table, i, "successor", &b->successor);
    if (r == 0 && b->successor.epoch && b->successor.extent == b->current.extent)
        REFUSE(c, "%s %zu: current and successor are both in extent %u", table, i,
               b->current.extent);

    uint64_t bytes = r == 0 ? tide_extent_bytes(c->size_bytes, b->granularity_bits) : 0;
    for (unsigned e = 0; r == 0 && e < TIDE_EXTENTS; e++) {
        uint64_t at = b->extent[e];
        bool used = e == b->current.extent || (b->successor.epoch && e == b->successor.extent);
        if (!at && (!used || c->s->level == TIDE_PROCESS))
            continue;
        if (at % TIDE_ALIGN)
            REFUSE(c, "%s %zu: extent %u begins at %llu, which is not a multiple of %u", table, i,
                   e, LLU(at), TIDE_ALIGN);
        if (at < TIDE_EXTENTS_OFFSET || !range_fits(at, bytes, c->s->extents_end))
            REFUSE(c, "%s %zu: extent %u, %llu bytes at %llu, is not within %llu to %llu", table, i,
                   e, LLU(bytes), LLU(at), LLU(TIDE_EXTENTS_OFFSET), LLU(c->s->extents_end));
    }
    return r;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int check_table(const struct check *c, const char *what, const struct tide_table *t)
{
    for (size_t i = 0; i < t->n; i++) {
        int r = check_bitmap(c, what, i, &t->items[i]);
        if (r < 0)
            return r;
    }
    CLEANUP(memory_freep) const char **names = xcalloc(t->n + 1, sizeof *names);
    CLEANUP(memory_freep) uint64_t *epochs = xcalloc(2 * t->n + 1, sizeof *epochs);
    size_t n_epochs = 0;
    for (size_t i = 0; i < t->n; i++) {
        names[i] = t->items[i].name;
        epochs[n_epochs++] = t->items[i].current.epoch;
        if (t->items[i].successor.epoch)
            epochs[n_epochs++] = t->items[i].successor.epoch;
    }
    qsort(names, t->n, sizeof *names, by_name);
    qsort(epochs, n_epochs, sizeof *epochs, by_number);
    for (size_t i = 1; i < t->n; i++)
        if (strcmp(names[i - 1], names[i]) == 0)
            REFUSE(c, "two %ss of the same name, of %zu bytes", what, strlen(names[i]));
    for (size_t i = 1; i < n_epochs; i++)
        if (epochs[i - 1] == epochs[i])
            REFUSE(c, "two areas of one table have the epoch %llu", LLU(epochs[i]));
    return 0;
}

struct placed {
    struct range at;
    bool next; /* of the prepared table, which may name those of the other */
};

static int by_place(const void *a, const void *b)
{
    const struct placed *x = a, *y = b;
    if (x->at.start != y->at.start)
        return x->at.start < y->at.start ? -1 : 1;
    return (int)x->next - (int)y->next;
}

static size_t collect(const struct check *c, const struct tide_table *t, bool next,
                      struct placed *ret)
{
    size_t n = 0;
    for (size_t i = 0; i < t->n; i++)
        for (unsigned e = 0; e < TIDE_EXTENTS; e++)
            if (t->items[i].extent[e])
                ret[n++] = (struct placed){
                    range_make(t->items[i].extent[e],
                               tide_extent_bytes(c->size_bytes, t->items[i].granularity_bits)),
                    next};
    return n;
}

static int check_extents(const struct check *c)
{
    CLEANUP(memory_freep)
    struct placed *all = xcalloc(TIDE_EXTENTS * (c->s->table.n + c->s->next.n) + 1, sizeof *all);
    size_t n = collect(c, &c->s->table, false, all);
    n += collect(c, &c->s->next, true, all + n);
    qsort(all, n, sizeof *all, by_place);
    for (size_t i = 1; i < n; i++) {
        const struct placed *a = &all[i - 1], *b = &all[i];
        if (a->at.start == b->at.start && a->at.length == b->at.length && a->next != b->next)
            continue;
        if (range_overlaps(a->at, b->at))
            REFUSE(c, "two extents overlap: %llu bytes at %llu, and one at %llu", LLU(a->at.length),
                   LLU(a->at.start), LLU(b->at.start));
    }
    return 0;
}

static int check_member(const struct check *c, const char *what, size_t i,
                        const struct tide_member *m)
{
    if (tide_id_none(&m->uuid))
        REFUSE(c, "%s %zu has no uuid", what, i);
    return check_text(c, what, i, m->path, TIDE_PATH_MAX);
}

/* Bitmaps that are what they are only if the answer is yes stand beside those that then are. */
static int check_ifs(const struct check *c, const char *table, const struct tide_table *t)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->items[i].only_if_yes || t->items[i].enabled_if_yes)
            REFUSE(c, "%s %zu depends on an answer that nobody waits for", table, i);
    return 0;
}

static int check_groups(const struct check *c)
{
    const struct super *s = c->s;
    int r;
    if (tide_id_none(&s->group)) {
        if (s->next.n || s->coordinator.path)
            REFUSE(c, "a table of %zu bitmaps is prepared for no group", s->next.n);
        r = check_ifs(c, "bitmap", &s->table);
    } else {
        r = check_member(c, "coordinator", 0, &s->coordinator);
        if (r == 0)
            r = check_table(c, "prepared bitmap", &s->next);
        if (r == 0)
            r = check_ifs(c, "prepared bitmap", &s->next);
    }
    if (r < 0)
        return r;
    for (size_t i = 0; i < s->n_records; i++) {
        const struct tide_record *rec = &s->records[i];
        if (tide_id_none(&rec->group) || !rec->n)
            REFUSE(c, "commit record %zu of %zu members is of no group, or of nobody", i, rec->n);
        for (size_t k = 0; k < i; k++)
            if (tide_id_equal(&s->records[k].group, &rec->group))
                REFUSE(c, "commit records %zu and %zu are of one group", k, i);
        for (size_t k = 0; k < rec->n; k++) {
            r = check_member(c, "member", k, &rec->members[k]);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

static int check_super(const struct super *s, int code, struct error *err)
{
    const uint64_t size = max_u64(s->size_bytes, s->resizing_bytes);
    const struct check check = {s, size, code, err}, *c = &check;

    if (tide_id_none(&s->uuid) || tide_id_none(&s->session))
        REFUSE(c, "the %s is zero", tide_id_none(&s->uuid) ? "uuid" : "session");
    if (size > INT64_MAX)
        REFUSE(c, "the disk's size is %llu", LLU(size));
    if (s->region_bits < 9 || s->region_bits > 62)
        REFUSE(c, "region_bits is %u, not 9..62", s->region_bits);
    if (div_round_up(size, UINT64_C(1) << s->region_bits) >= REGION_NONE)
        REFUSE(c, "region_bits is %u: too many regions in %llu bytes", s->region_bits, LLU(size));
    if (s->slots < TIDE_SLOTS_MIN || s->slots > TIDE_SLOTS_MAX)
        REFUSE(c, "slots is %u, not %u..%u", s->slots, TIDE_SLOTS_MIN, TIDE_SLOTS_MAX);
    if (s->sequence > INT64_MAX || s->ring_sequence > INT64_MAX || s->next_epoch > INT64_MAX)
        REFUSE(c, "sequence %llu, ring's first %llu, next epoch %llu: not all below 2^63",
               LLU(s->sequence), LLU(s->ring_sequence), LLU(s->next_epoch));
    if (s->extents_end < TIDE_EXTENTS_OFFSET || s->extents_end > INT64_MAX ||
        s->extents_end % TIDE_ALIGN)
        REFUSE(c, "the extents end at %llu", LLU(s->extents_end));
    if (!s->driver[0] || s->driver[sizeof s->driver - 1])
        REFUSE(c, "the driver's name is not one");
    if (s->witness.kind > WITNESS_DEVICE)
        REFUSE(c, "the witness is of kind %u", (unsigned)s->witness.kind);

    int r = check_table(c, "bitmap", &s->table);
    if (r == 0)
        r = check_groups(c);
    return r < 0 ? r : check_extents(c);
}

/* ---- encoding ---- */

static void put_id(struct out_cursor *c, const struct tide_id *id)
{
    put_bytes(c, id->bytes, sizeof id->bytes);
}

static void put_witness(struct out_cursor *c, const struct witness *w)
{
    put_le32(c, (uint32_t)w->kind);
    put_le32(c, 0);
    put_bytes(c, w->boot, sizeof w->boot);
    put_bytes(c, w->filesystem, sizeof w->filesystem);
    put_le64(c, w->inode);
    put_le64(c, w->birth_ns);
    put_le64(c, w->size_bytes);
    put_le64(c, w->mtime_ns);
    put_le64(c, w->ctime_ns);
    put_le64(c, w->counted);
    put_le64(c, w->sectors);
}

static void put_table(struct out_cursor *c, const struct tide_table *t)
{
    for (size_t i = 0; i < t->n; i++) {
        const struct tide_bitmap *b = &t->items[i];
        size_t name = strlen(b->name), job = b->last_job ? strlen(b->last_job) : 0;
        unsigned flags = (b->enabled ? BITMAP_ENABLED : 0) |
                         (b->inconsistent ? BITMAP_INCONSISTENT : 0) |
                         (b->based ? BITMAP_BASED : 0) | (b->last_job ? BITMAP_HAS_JOB : 0) |
                         (b->only_if_yes ? BITMAP_ONLY_IF_YES : 0) |
                         (b->enabled_if_yes ? BITMAP_ENABLED_IF_YES : 0);
        if (job > UINT16_MAX) {
            c->overrun = true; /* as if there were no room for it */
            return;
        }
        put_le16(c, (uint16_t)name);
        put_le16(c, (uint16_t)job);
        put_u8(c, (uint8_t)b->granularity_bits);
        put_u8(c, (uint8_t)flags);
        put_u8(c, (uint8_t)b->current.extent);
        put_u8(c, (uint8_t)b->successor.extent);
        put_le64(c, b->generation);
        for (unsigned e = 0; e < TIDE_EXTENTS; e++)
            put_le64(c, b->extent[e]);
        put_le64(c, b->current.epoch);
        put_le64(c, b->successor.epoch);
        put_bytes(c, b->name, name);
        if (job)
            put_bytes(c, b->last_job, job);
    }
}

static void put_member(struct out_cursor *c, const struct tide_member *m)
{
    size_t n = strlen(m->path);
    put_id(c, &m->uuid);
    put_le16(c, (uint16_t)n);
    put_bytes(c, m->path, n);
}

int super_encode(const struct super *s, void *buf, size_t *length, struct error *err)
{
    int r = check_super(s, EINVAL, err);
    if (r < 0)
        return r;
    const bool prepared = !tide_id_none(&s->group);
    struct out_cursor c = out_cursor_over(buf, TIDE_SUPER_BYTES);
    put_bytes(&c, magic, sizeof magic);
    put_le32(&c, VERSION);
    put_le32(&c, 0);
    put_le32(&c, 0);
    put_le32(&c, (s->in_use ? SUPER_IN_USE : 0) | (s->level == TIDE_PROCESS ? SUPER_PROCESS : 0));
    put_le64(&c, s->sequence);
    put_id(&c, &s->uuid);
    put_id(&c, &s->session);
    put_le64(&c, s->size_bytes);
    put_le64(&c, s->resizing_bytes);
    put_le32(&c, s->region_bits);
    put_le32(&c, s->slots);
    put_le64(&c, s->ring_sequence);
    put_le64(&c, s->next_epoch);
    put_le64(&c, s->extents_end);
    put_witness(&c, &s->witness);
    put_le32(&c, (uint32_t)s->table.n);
    put_le32(&c, (uint32_t)s->next.n);
    put_le32(&c, (uint32_t)s->n_records);
    put_le32(&c, 0);
    put_id(&c, &s->group);
    put_bytes(&c, s->driver, sizeof s->driver);
    assert(c.at == (uint8_t *)buf + HEAD);

    put_table(&c, &s->table);
    if (prepared) {
        put_member(&c, &s->coordinator);
        put_table(&c, &s->next);
    }
    for (size_t i = 0; i < s->n_records; i++) {
        put_id(&c, &s->records[i].group);
        put_le32(&c, (uint32_t)s->records[i].n | (s->records[i].undecided ? RECORD_UNDECIDED : 0));
        for (size_t k = 0; k < s->records[i].n; k++)
            put_member(&c, &s->records[i].members[k]);
    }
    if (c.overrun)
        return error_set(err, ENOSPC, "%zu bitmaps do not fit into a superblock of %llu bytes",
                         s->table.n + s->next.n, LLU(TIDE_SUPER_BYTES));

    size_t used = (size_t)(c.at - (uint8_t *)buf);
    uint32_t le_used = htole32((uint32_t)used);
    memcpy((uint8_t *)buf + LENGTH_AT, &le_used, 4);
    uint32_t crc =
        crc_add(crc_add(CRC_BEGIN, buf, CRC_AT), (uint8_t *)buf + LENGTH_AT, used - LENGTH_AT);
    uint32_t le_crc = htole32(crc_end(crc));
    memcpy((uint8_t *)buf + CRC_AT, &le_crc, 4);
    *length = align_up(used, TIDE_ALIGN);
    memset((uint8_t *)buf + used, 0, *length - used);
    return 0;
}

/* ---- decoding ---- */

static struct tide_id get_id(struct cursor *c)
{
    struct tide_id id = {{0}};
    const uint8_t *p = get_bytes(c, sizeof id.bytes);
    if (p)
        memcpy(id.bytes, p, sizeof id.bytes);
    return id;
}

/* N bytes as a string; NULL when they are not there, or are not one. */
static char *get_text(struct cursor *c, size_t n)
{
    const uint8_t *p = get_bytes(c, n);
    if (!p || memchr(p, '\0', n))
        return NULL;
    char *text = xcalloc(n + 1, 1);
    memcpy(text, p, n);
    return text;
}

static void get_witness(struct cursor *c, struct witness *w)
{
    const uint8_t *p;
    w->kind = (enum witness_kind)get_le32(c);
    get_le32(c);
    if ((p = get_bytes(c, sizeof w->boot)))
        memcpy(w->boot, p, sizeof w->boot);
    if ((p = get_bytes(c, sizeof w->filesystem)))
        memcpy(w->filesystem, p, sizeof w->filesystem);
    w->inode = get_le64(c);
    w->birth_ns = get_le64(c);
    w->size_bytes = get_le64(c);
    w->mtime_ns = get_le64(c);
    w->ctime_ns = get_le64(c);
    w->counted = get_le64(c);
    w->sectors = get_le64(c);
}

static int get_bitmap(struct cursor *c, const char *what, size_t i, struct tide_bitmap *b,
                      struct error *err)
{
    size_t name = get_le16(c), job = get_le16(c);
    b->granularity_bits = get_u8(c);
    unsigned flags = get_u8(c);
    b->enabled = flags & BITMAP_ENABLED;
    b->inconsistent = flags & BITMAP_INCONSISTENT;
    b->based = flags & BITMAP_BASED;
    b->only_if_yes = flags & BITMAP_ONLY_IF_YES;
    b->enabled_if_yes = flags & BITMAP_ENABLED_IF_YES;
    b->current.extent = get_u8(c);
    b->successor.extent = get_u8(c);
    b->generation = get_le64(c);
    for (unsigned e = 0; e < TIDE_EXTENTS; e++)
        b->extent[e] = get_le64(c);
    b->current.epoch = get_le64(c);
    b->successor.epoch = get_le64(c);
    b->name = get_text(c, name);
    if (!b->name)
        return error_set(err, EBADMSG, "%s %zu: its name is not one, or ends beyond the end", what,
                         i);
    if (flags & ~(unsigned)BITMAP_FLAGS || (job && !(flags & BITMAP_HAS_JOB)))
        return error_set(err, EBADMSG, "%s %zu: flags are 0x%x, and its job's id has %zu bytes",
                         what, i, flags, job);
    if (flags & BITMAP_HAS_JOB) {
        b->last_job = get_text(c, job);
        if (!b->last_job)
            return error_set(err, EBADMSG,
                             "%s %zu: its job's id is not one, or ends beyond the end", what, i);
    }
    return 0;
}

/* Room for N things that take at least SIZE bytes each; NULL: there are not so many bytes. */
static void *items_for(const struct cursor *c, uint64_t n, size_t head, size_t size)
{
    return n > cursor_left(c) / head ? NULL : xcalloc(n + 1, size);
}

static int get_table(struct cursor *c, const char *what, uint32_t n, struct tide_table *t,
                     struct error *err)
{
    int r = 0;
    t->items = items_for(c, n, BITMAP_HEAD, sizeof *t->items);
    if (!t->items)
        return error_set(err, EBADMSG, "%u %ss do not fit into %zu bytes", n, what, cursor_left(c));
    while (r == 0 && t->n < n) {
        r = get_bitmap(c, what, t->n, &t->items[t->n], err);
        t->n++; /* also a broken one has memory */
    }
    return r;
}

static int get_member(struct cursor *c, const char *what, struct tide_member *m, struct error *err)
{
    m->uuid = get_id(c);
    m->path = get_text(c, get_le16(c));
    if (!m->path)
        return error_set(err, EBADMSG, "the path of a %s is not one, or ends beyond the end", what);
    return 0;
}

static int get_record(struct cursor *c, struct tide_record *rec, struct error *err)
{
    int r = 0;
    rec->group = get_id(c);
    uint32_t n = get_le32(c);
    rec->undecided = n & RECORD_UNDECIDED;
    n &= ~RECORD_UNDECIDED;
    rec->members = items_for(c, n, MEMBER_HEAD, sizeof *rec->members);
    if (!rec->members)
        return error_set(err, EBADMSG, "%u members of a group do not fit into %zu bytes", n,
                         cursor_left(c));
    while (r == 0 && rec->n < n)
        r = get_member(c, "group's member", &rec->members[rec->n++], err);
    return r;
}

static int get_rest(struct cursor *c, struct super *s, uint32_t bitmaps, uint32_t next,
                    uint32_t records, struct error *err)
{
    int r = get_table(c, "bitmap", bitmaps, &s->table, err);
    if (r == 0 && tide_id_none(&s->group) && next)
        return error_set(err, EBADMSG, "%u bitmaps are prepared for no group", next);
    if (r == 0 && !tide_id_none(&s->group)) {
        r = get_member(c, "coordinator", &s->coordinator, err);
        if (r == 0)
            r = get_table(c, "prepared bitmap", next, &s->next, err);
    }
    if (r < 0)
        return r;
    s->records = items_for(c, records, RECORD_HEAD, sizeof *s->records);
    if (!s->records)
        return error_set(err, EBADMSG, "%u commit records do not fit into %zu bytes", records,
                         cursor_left(c));
    while (r == 0 && s->n_records < records)
        r = get_record(c, &s->records[s->n_records++], err);
    if (r == 0 && (c->overrun || cursor_left(c)))
        return error_set(err, EBADMSG, "%zu bytes follow after the last field", cursor_left(c));
    return r;
}

static int get_super(struct cursor *c, struct super *s, struct error *err)
{
    uint32_t flags = get_le32(c);
    if (flags & ~(uint32_t)SUPER_FLAGS)
        return error_set(err, EBADMSG, "flags are 0x%x, of which 0x%x are unknown", flags,
                         flags & ~(uint32_t)SUPER_FLAGS);
    s->in_use = flags & SUPER_IN_USE;
    s->level = flags & SUPER_PROCESS ? TIDE_PROCESS : TIDE_POWER;
    s->sequence = get_le64(c);
    s->uuid = get_id(c);
    s->session = get_id(c);
    s->size_bytes = get_le64(c);
    s->resizing_bytes = get_le64(c);
    s->region_bits = get_le32(c);
    s->slots = get_le32(c);
    s->ring_sequence = get_le64(c);
    s->next_epoch = get_le64(c);
    s->extents_end = get_le64(c);
    get_witness(c, &s->witness);
    uint32_t bitmaps = get_le32(c), next = get_le32(c), records = get_le32(c);
    get_le32(c);
    s->group = get_id(c);
    const uint8_t *driver = get_bytes(c, sizeof s->driver);
    if (driver)
        memcpy(s->driver, driver, sizeof s->driver);
    int r = get_rest(c, s, bitmaps, next, records, err);
    return r < 0 ? r : check_super(s, EBADMSG, err);
}

int super_decode(const void *buf, size_t length, struct super *ret, struct error *err)
{
    struct cursor c = cursor_over(buf, length);
    if (length < HEAD)
        return error_set(err, EBADMSG, "it ends after %zu bytes", length);
    if (isal_zero_detect((void *)(uintptr_t)buf, HEAD) == 0)
        return error_set(err, EBADMSG, "it was never written");
    if (memcmp(get_bytes(&c, sizeof magic), magic, sizeof magic) != 0)
        return error_set(err, EBADMSG, "it does not begin as one");
    uint32_t version = get_le32(&c), crc = get_le32(&c), used = get_le32(&c);
    if (version != VERSION)
        return error_set(err, EBADMSG, "its version is %u, and this program knows %u", version,
                         VERSION);
    if (used < HEAD || used > length || used > TIDE_SUPER_BYTES)
        return error_set(err, EBADMSG, "its length is %u, not %u..%llu", used, HEAD,
                         LLU(min_u64(length, TIDE_SUPER_BYTES)));
    uint32_t is = crc_end(crc_add(crc_add(CRC_BEGIN, buf, CRC_AT), (const uint8_t *)buf + LENGTH_AT,
                                  used - LENGTH_AT));
    if (crc != is)
        return error_set(err, EBADMSG, "its checksum is %08x, and its bytes' %08x", crc, is);

    struct super s = {0};
    c.end = (const uint8_t *)buf + used;
    int r = get_super(&c, &s, err);
    if (r < 0)
        super_fini(&s);
    else
        *ret = s;
    return r;
}
