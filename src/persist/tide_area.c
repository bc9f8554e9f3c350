/* Bit areas in the tide file: written from a copy, in blocks of 4 KiB (8 sectors, which is what
 * O_DIRECT wants), read by extents that have data.
 *
 * A block is encoded whole from the bitmap, so nothing is read before it is written. In a run of
 * blocks that lie side by side each is a part of one write; runs are written several at a time. */
#include "persist/tide_internal.h"

#include "base/broken.h"
#include "block/driver.h"
#include "rt/io.h"

#include <errno.h>
#include <isa-l/mem_routines.h>
#include <unistd.h>

enum {
    BLOCK_SECTORS = TIDE_ALIGN / AREA_SECTOR,
    BLOCK_PAYLOAD = BLOCK_SECTORS * AREA_PAYLOAD, /* bytes of the serial form */
    RUN_BLOCKS = 256,                             /* in one write */
    WRITERS = 64,                                 /* runs in flight */
    READ_BYTES = 1024 * 1024,
    NEAR_BYTES = 256 * 1024, /* reading a hole is cheaper than another read */
    STRETCHES = 256,         /* asked for at once */
};

/* ---- copies ---- */

static int add_block(struct area_copy *c, uint64_t block)
{
    if (c->n && c->blocks[c->n - 1] >= block)
        return 0; /* the last range ended in it */
    if (c->n == c->room) {
        size_t room = c->room ? 2 * c->room : 64;
        uint64_t *more = realloc(c->blocks, room * sizeof *more);
        if (!more)
            return -ENOMEM;
        c->blocks = more;
        c->room = room;
    }
    c->blocks[c->n++] = block;
    return 0;
}

static void encode_block(uint8_t *to, const struct tide_id *uuid, uint64_t extent_offset,
                         uint64_t epoch, const struct bitmap *bits, uint64_t block)
{
    uint8_t payload[AREA_PAYLOAD];
    for (unsigned i = 0; i < BLOCK_SECTORS; i++) {
        uint64_t index = block * BLOCK_SECTORS + i;
        bitmap_serialise(bits, index * AREA_PAYLOAD, payload, sizeof payload);
        area_encode(to + (size_t)i * AREA_SECTOR, uuid, extent_offset + index * AREA_SECTOR, epoch,
                    payload);
    }
}

int area_copy_take(struct area_copy *c, const struct tide_id *uuid, uint64_t extent_offset,
                   uint64_t epoch, const struct bitmap *bits, const struct range *ranges, size_t n)
{
    const uint64_t granularity = bitmap_granularity(bits);
    const uint64_t span = granularity * BLOCK_PAYLOAD * 8; /* bytes of disk a block */
    const uint64_t size = bitmap_size(bits);

    *c = (struct area_copy){.extent_offset = extent_offset};
    for (size_t i = 0; i < n; i++) {
        uint64_t from = ranges[i].start, end = min_u64(range_end(ranges[i]), size);
        struct range found;
        while (from < end && bitmap_next(bits, from, granularity, &found) && found.start < end) {
            uint64_t block = found.start / span;
            int r = add_block(c, block);
            if (r < 0)
                return r;
            from = (block + 1) * span;
        }
    }
    if (!c->n)
        return 0;
    c->bytes = block_buffer(c->n * TIDE_ALIGN);
    if (!c->bytes)
        return -ENOMEM;
    for (size_t i = 0; i < c->n; i++)
        encode_block(c->bytes + i * TIDE_ALIGN, uuid, extent_offset, epoch, bits, c->blocks[i]);
    return 0;
}

void area_copy_fini(struct area_copy *c)
{
    free(c->blocks);
    free(c->bytes);
    *c = (struct area_copy){0};
}

struct area_writer {
    const struct area_copy *c;
    int fd;
    size_t next;
    int error;
};

static int write_runs(void *arg)
{
    struct area_writer *w = arg;
    const struct area_copy *c = w->c;
    SHIELD();
    while (!w->error && w->next < c->n) {
        size_t first = w->next, end = first + 1;
        while (end < c->n && end - first < RUN_BLOCKS && c->blocks[end] == c->blocks[end - 1] + 1)
            end++;
        w->next = end;
        int r = io_pwrite_full(w->fd, c->bytes + first * TIDE_ALIGN, (end - first) * TIDE_ALIGN,
                               c->extent_offset + c->blocks[first] * TIDE_ALIGN, 0);
        if (r < 0)
            w->error = r;
    }
    return 0;
}

int area_copy_write(const struct area_copy *c, int fd)
{
    struct area_writer w = {.c = c, .fd = fd};
    SHIELD();
    SCOPE(writers);
    for (size_t i = 1; i < WRITERS && i < c->n; i++)
        scope_spawn(&writers, write_runs, &w);
    write_runs(&w);
    (void)scope_join(&writers);
    return w.error;
}

/* ---- writing ---- */

struct area_write {
    uint64_t extent_offset;
    TAILQ_ENTRY(area_write) entry;
};

static bool is_being_written(const struct tide *t, uint64_t extent_offset)
{
    const struct area_write *w;
    TAILQ_FOREACH (w, &t->writing_areas, entry)
        if (w->extent_offset == extent_offset)
            return true;
    return false;
}

/* The disk may be larger than the extent has room for, what is written may not. */
static uint64_t written_end(const struct bitmap *bits, const struct range *ranges, size_t n)
{
    uint64_t end = 0;

    for (size_t i = 0; i < n; i++)
        end = max_u64(end, min_u64(range_end(ranges[i]), bitmap_size(bits)));
    return end;
}

int tide_write_area(struct tide *t, uint64_t extent_offset, uint64_t epoch,
                    const struct bitmap *bits, const struct range *ranges, size_t n)
{
    assert(!t->read_only && epoch && epoch < t->super.next_epoch);
    assert(extent_offset >= TIDE_EXTENTS_OFFSET &&
           range_fits(
               extent_offset,
               tide_extent_bytes(written_end(bits, ranges, n), log2_u64(bitmap_granularity(bits))),
               t->end));
    SHIELD();
    while (is_being_written(t, extent_offset) && !BROKEN(area_writes_race))
        (void)!waitq_wait(&t->area_written);
    if (t->failed)
        return -EIO;

    struct area_copy c;
    int r = area_copy_take(&c, &t->super.uuid, extent_offset, epoch, bits, ranges, n);
    if (r == 0 && c.n) {
        struct area_write writing = {.extent_offset = extent_offset};
        TAILQ_INSERT_TAIL(&t->writing_areas, &writing, entry);
        r = tide_outcome(t, area_copy_write(&c, t->fd));
        TAILQ_REMOVE(&t->writing_areas, &writing, entry);
        waitq_wake_all(&t->area_written);
    }
    area_copy_fini(&c);
    return r;
}

/* ---- reading ---- */

struct area_read {
    struct tide *t;
    uint64_t extent_offset, epoch;
    struct bitmap *bits;
    bool mark_bad;
    uint64_t bad_bytes;
};

static void add_payload(struct bitmap *bits, uint64_t first, const uint8_t *payload)
{
    uint64_t old[AREA_PAYLOAD / 8], add[AREA_PAYLOAD / 8];
    if (isal_zero_detect((void *)(uintptr_t)payload, AREA_PAYLOAD) == 0)
        return;
    memcpy(add, payload, sizeof add);
    bitmap_serialise(bits, first, old, sizeof old);
    for (size_t i = 0; i < ARRAY_SIZE(add); i++)
        add[i] |= old[i];
    bitmap_deserialise(bits, first, add, sizeof add);
}

static int read_sector(struct area_read *a, const uint8_t *sector, uint64_t index, bool bad,
                       struct error *err)
{
    const uint8_t *payload;
    uint64_t other = 0;
    enum area_state state =
        bad ? AREA_BAD
            : area_decode(sector, &a->t->super.uuid, a->extent_offset + index * AREA_SECTOR,
                          a->epoch, &payload, &other);
    if (state == AREA_DATA) {
        add_payload(a->bits, index * AREA_PAYLOAD, payload);
    } else if (state == AREA_BAD) {
        struct range span = bitmap_serial_span(a->bits, index * AREA_PAYLOAD, AREA_PAYLOAD);
        a->bad_bytes += span.length;
        if (a->mark_bad)
            bitmap_mark(a->bits, span);
    } else if (other >= a->t->super.next_epoch) {
        return error_set(
            err, EBADMSG,
            "tide file '%s': sector %llu of the area at %llu is of epoch %llu, and the "
            "newest superblock there is knows none from %llu on: a newer one is lost",
            a->t->path, (unsigned long long)index, (unsigned long long)a->extent_offset,
            (unsigned long long)other, (unsigned long long)a->t->super.next_epoch);
    }
    return 0;
}

/* Up to N stretches of REST that have data, in whole blocks; what lies between two that are near is
 * read with them. REST becomes what is behind them. */
static unsigned next_data(const struct tide *t, struct range *rest, struct range *ret, unsigned n)
{
    unsigned kept = 0;
    int found = io_data(t->fd, *rest, ret, n);
    if (found < 0) { /* a file system that does not know: all is data */
        ret[0] = *rest;
        *rest = range_between(range_end(*rest), range_end(*rest));
        return 1;
    }
    const uint64_t end = range_end(*rest),
                   from = (unsigned)found == n ? range_end(ret[n - 1]) : end;
    for (int i = 0; i < found; i++) {
        struct range r = range_round_out(ret[i], TIDE_ALIGN);
        if (kept && r.start <= range_end(ret[kept - 1]) + NEAR_BYTES)
            ret[kept - 1] = range_between(ret[kept - 1].start, range_end(r));
        else
            ret[kept++] = r;
    }
    *rest = range_between(min_u64(align_up(from, TIDE_ALIGN), end), end);
    return kept;
}

static int read_stretch(struct area_read *a, uint64_t at, uint64_t stop, uint8_t *buf,
                        struct error *err)
{
    bool bad[READ_BYTES / TIDE_ALIGN];
    const uint64_t sectors = div_round_up(bitmap_serial_length(a->bits), AREA_PAYLOAD);
    for (; at < stop; at += READ_BYTES) {
        size_t n = (size_t)min_u64(stop - at, READ_BYTES);
        int r = tide_read_blocks(a->t, buf, n, at, bad);
        if (r < 0)
            return error_set_errno(err, -r, "reading tide file '%s'", a->t->path);
        for (size_t i = 0; i < n / AREA_SECTOR; i++) {
            uint64_t index = (at - a->extent_offset) / AREA_SECTOR + i;
            if (index >= sectors)
                break;
            r = read_sector(a, buf + i * AREA_SECTOR, index, bad[i / BLOCK_SECTORS], err);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

int tide_read_area(struct tide *t, uint64_t extent_offset, uint64_t epoch, struct bitmap *bits,
                   bool mark_bad, uint64_t *bad_bytes, struct error *err)
{
    struct area_read a = {
        .t = t, .extent_offset = extent_offset, .epoch = epoch, .bits = bits, .mark_bad = mark_bad};
    uint64_t bytes = tide_extent_bytes(bitmap_size(bits), log2_u64(bitmap_granularity(bits)));
    if (extent_offset < TIDE_EXTENTS_OFFSET || extent_offset % TIDE_ALIGN ||
        !range_fits(extent_offset, bytes, t->super.extents_end))
        return error_set(err, EBADMSG, "tide file '%s' has no area of %llu bytes at %llu", t->path,
                         (unsigned long long)bytes, (unsigned long long)extent_offset);

    CLEANUP(memory_freep) uint8_t *buf = block_buffer(READ_BYTES);
    if (!buf)
        return error_set_errno(err, ENOMEM, "reading tide file '%s'", t->path);
    struct range rest = range_make(extent_offset, bytes), data[STRETCHES];
    int r = 0;
    for (unsigned n; r == 0 && !range_empty(rest);) {
        n = next_data(t, &rest, data, STRETCHES);
        for (unsigned i = 0; r == 0 && i < n; i++)
            r = read_stretch(&a, data[i].start, range_end(data[i]), buf, err);
    }
    if (r == 0)
        *bad_bytes = a.bad_bytes;
    return r;
}
