/* A bitmap with summaries.
 *
 *   level 2        |1.......|                           one bit: the word below is not zero
 *   level 1        |..1....1|........|  ...
 *   level 0, leaf  |........|........|..1..1.1|  ...    one bit: a granule is dirty
 *
 * Every level is a flat array of 64-bit words; the last one is a single word, and there are
 * at least two levels. The next dirty granule is found by going up to the first word that
 * has something further on, then down along the lowest bits: a few reads, however large the
 * clean stretch between. Nothing sums up runs of ones: looking for a *clean* granule reads the
 * leaf words of the run, which are memory that has been paid for.
 *
 * Memory. Below MAP_FROM bytes all levels are one calloc. Above, one private mapping without
 * reserve: untouched pages cost nothing, a mark has its page given by the kernel on touch and
 * therefore has no error to return. Huge pages are declined, or each lone mark would cost
 * 2 MiB. Clearing everything, or much, gives pages back by MADV_DONTNEED, after which they
 * read as zero again. The leaf comes first, so that its pages start with the mapping; or it
 * is lent (bitmap_new_over), and then only ever written where a word changes.
 *
 * Marking all of 64 TiB does touch all words. A shortcut ("all ones", an inverted form) would
 * have to be undone at the first clear, that is at the first chunk that a job has copied: it
 * would move the cost, not save it, and every function here would pay with a second case.
 *
 * Invariants (bitmap_valid): a bit of level n+1 is set exactly if its word in level n is not
 * zero; no bit at or beyond `bits` is set; dirty_bits counts the bits of the leaf. */
#include "bitmap/bitmap.h"

#include <endian.h>
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    WORD_BITS = 64,
    WORD_SHIFT = 6,
    WORD_BYTES = 8,
    LEVELS_MAX = 10,        /* 2^63 bytes of 512 are 2^54 bits: nine levels */
    MAP_FROM = 128 * 1024,  /* bytes of words from which a mapping is worth it */
    MANY_BYTES = 64 * 1024, /* of leaf, from which their pages are taken or given in one call */
};

#define NONE UINT64_MAX

struct bitmap {
    uint64_t size_bytes;
    uint64_t bits;       /* granules, the last one may be cut by the size */
    uint64_t room_bits;  /* so many fit into the levels; more than `bits` after a shrink */
    uint64_t dirty_bits; /* of them dirty */
    uint64_t *level[LEVELS_MAX];
    uint64_t *block;    /* every level; without the leaf if that is lent */
    size_t block_bytes; /* a multiple of 8 */
    uint8_t levels;
    uint8_t granularity_shift;
    bool mapped; /* block is a mapping, not calloc's */
    bool lent;   /* the leaf is somebody else's */
};

static uint64_t words_for(uint64_t bits, unsigned level)
{
    return bits ? ((bits - 1) >> (WORD_SHIFT * (level + 1))) + 1 : 1;
}

static uint64_t bits_for(uint64_t size_bytes, unsigned shift)
{
    return (size_bytes >> shift) + ((size_bytes & ((UINT64_C(1) << shift) - 1)) != 0);
}

static uint64_t bit_of(uint64_t n)
{
    return UINT64_C(1) << (n % WORD_BITS);
}

/* The bits [first, end) that lie in word W, which they touch. */
static uint64_t mask_in_word(uint64_t w, uint64_t first, uint64_t end)
{
    uint64_t low = w == first / WORD_BITS ? ~UINT64_C(0) << (first % WORD_BITS) : ~UINT64_C(0);
    uint64_t high = w == end / WORD_BITS ? bit_of(end) - 1 : ~UINT64_C(0);
    return low & high;
}

/* gcc without -mpopcnt calls a slow function; whole words are common. */
static unsigned weight(uint64_t word)
{
    if (word == 0)
        return 0;
    if (word == ~UINT64_C(0))
        return WORD_BITS;
    return (unsigned)__builtin_popcountll(word);
}

/* ---- memory ---- */

/* Fills in the levels for bm->bits. LENT: the leaf's words, or NULL. */
static int take_memory(struct bitmap *bm, uint64_t *lent)
{
    uint64_t words = 0;

    bm->levels = 0;
    do {
        if (!(bm->levels == 0 && lent))
            words += words_for(bm->bits, bm->levels);
        bm->levels++;
    } while (bm->levels < 2 || words_for(bm->bits, bm->levels - 1) > 1);
    assert(bm->levels <= LEVELS_MAX);

    bm->room_bits = words_for(bm->bits, 0) * WORD_BITS;
    bm->lent = lent != NULL;
    bm->block_bytes = words * WORD_BYTES;
    bm->mapped = bm->block_bytes >= MAP_FROM;
    if (bm->mapped) {
        void *p = mmap(NULL, bm->block_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            return -ENOMEM;
        madvise(p, bm->block_bytes, MADV_NOHUGEPAGE); /* a kernel without them says EINVAL */
        bm->block = p;
    } else {
        bm->block = calloc(words, WORD_BYTES);
        if (!bm->block)
            return -ENOMEM;
    }

    uint64_t *at = bm->block;
    for (unsigned l = 0; l < bm->levels; l++) {
        if (l == 0 && lent) {
            bm->level[0] = lent;
            continue;
        }
        bm->level[l] = at;
        at += words_for(bm->bits, l);
    }
    return 0;
}

static void give_memory_back(struct bitmap *bm)
{
    if (bm->mapped)
        munmap(bm->block, bm->block_bytes);
    else
        free(bm->block);
}

/* ---- words: the only code that changes bits ---- */

/* The first set bit at or after POS in LEVEL, NONE if there is none. */
static uint64_t find_set(const struct bitmap *bm, unsigned level, uint64_t pos)
{
    unsigned l = level;

    for (;; l++) {
        uint64_t w = pos / WORD_BITS;
        if (l == bm->levels || w >= words_for(bm->bits, l))
            return NONE;
        uint64_t rest = bm->level[l][w] & (~UINT64_C(0) << (pos % WORD_BITS));
        if (rest) {
            pos = w * WORD_BITS + (unsigned)__builtin_ctzll(rest);
            break;
        }
        pos = w + 1;
    }
    while (l > level)
        pos = pos * WORD_BITS + (unsigned)__builtin_ctzll(bm->level[--l][pos]);
    return pos;
}

/* The first clear bit at or after FROM, at most END (<= bits). */
static uint64_t find_clear(const struct bitmap *bm, uint64_t from, uint64_t end)
{
    for (uint64_t w = from / WORD_BITS; w * WORD_BITS < end; w++) {
        uint64_t clear = ~bm->level[0][w];
        if (w == from / WORD_BITS)
            clear &= ~UINT64_C(0) << (from % WORD_BITS);
        if (clear)
            return min_u64(w * WORD_BITS + (unsigned)__builtin_ctzll(clear), end);
    }
    return end;
}

/* The first leaf word at or after W that is not zero. */
static uint64_t next_word(const struct bitmap *bm, uint64_t w)
{
    return find_set(bm, 1, w);
}

static void set_word(struct bitmap *bm, uint64_t w, uint64_t value)
{
    uint64_t old = bm->level[0][w];

    if (old == value)
        return;
    bm->level[0][w] = value;
    bm->dirty_bits += weight(value);
    bm->dirty_bits -= weight(old);
    if (!old) {
        for (unsigned l = 1; l < bm->levels; l++, w /= WORD_BITS) {
            uint64_t before = bm->level[l][w / WORD_BITS];
            bm->level[l][w / WORD_BITS] = before | bit_of(w);
            if (before)
                break;
        }
    } else if (!value) {
        for (unsigned l = 1; l < bm->levels; l++, w /= WORD_BITS)
            if (bm->level[l][w / WORD_BITS] &= ~bit_of(w))
                break;
    }
}

/* The whole pages of a leaf of our own that the bits [first, end) fill, as bytes of the block, when
 * they are many: worth a word to the kernel. */
static bool whole_pages(const struct bitmap *bm, uint64_t first, uint64_t end, uint64_t *from,
                        uint64_t *to)
{
    if (!bm->mapped || bm->lent || (end - first) / 8 < MANY_BYTES)
        return false;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *from = align_up(div_round_up(first, WORD_BITS) * WORD_BYTES, page);
    *to = align_down(end / WORD_BITS * WORD_BYTES, page);
    return *from < *to;
}

static void mark_bits(struct bitmap *bm, uint64_t first, uint64_t end)
{
    if (first >= end)
        return;
#ifdef MADV_POPULATE_WRITE
    uint64_t from, to;
    if (whole_pages(bm, first, end, &from, &to))
        madvise((char *)bm->block + from, to - from, MADV_POPULATE_WRITE);
#endif
    for (uint64_t w = first / WORD_BITS; w <= (end - 1) / WORD_BITS; w++)
        set_word(bm, w, bm->level[0][w] | mask_in_word(w, first, end));
}

static void clear_bits(struct bitmap *bm, uint64_t first, uint64_t end)
{
    if (first >= end)
        return;
    const uint64_t last = (end - 1) / WORD_BITS;
    for (uint64_t w = next_word(bm, first / WORD_BITS); w <= last; w = next_word(bm, w + 1))
        set_word(bm, w, bm->level[0][w] & ~mask_in_word(w, first, end));

    uint64_t from, to;
    if (whole_pages(bm, first, end, &from, &to)) /* zero now */
        madvise((char *)bm->block + from, to - from, MADV_DONTNEED);
}

/* The summaries and the count, from the leaf. The upper levels are zero. */
static void rebuild(struct bitmap *bm)
{
    const uint64_t words = words_for(bm->bits, 0);

    if (bm->bits % WORD_BITS || !bm->bits) {
        uint64_t kept = bm->level[0][words - 1] & (bit_of(bm->bits) - 1);
        if (kept != bm->level[0][words - 1])
            bm->level[0][words - 1] = kept;
    }
    bm->dirty_bits = 0;
    for (uint64_t w = 0; w < words; w++)
        bm->dirty_bits += weight(bm->level[0][w]);
    for (unsigned l = 0; l + 1 < bm->levels; l++)
        for (uint64_t w = 0; w < words_for(bm->bits, l); w++)
            if (bm->level[l][w])
                bm->level[l + 1][w / WORD_BITS] |= bit_of(w);
}

/* ---- life ---- */

static struct bitmap *new_with(uint64_t *lent, uint64_t size_bytes, uint64_t granularity_bytes)
{
    assert(is_power_of_2(granularity_bytes) && granularity_bytes >= BITMAP_GRANULARITY_MIN &&
           granularity_bytes <= BITMAP_GRANULARITY_MAX && size_bytes <= INT64_MAX);

    struct bitmap *bm = calloc(1, sizeof *bm);
    if (!bm)
        return NULL;
    bm->size_bytes = size_bytes;
    bm->granularity_shift = (uint8_t)log2_u64(granularity_bytes);
    bm->bits = bits_for(size_bytes, bm->granularity_shift);
    if (take_memory(bm, lent) < 0) {
        free(bm);
        return NULL;
    }
    return bm;
}

struct bitmap *bitmap_new(uint64_t size_bytes, uint64_t granularity_bytes)
{
    return new_with(NULL, size_bytes, granularity_bytes);
}

struct bitmap *bitmap_new_over(uint64_t *words, uint64_t size_bytes, uint64_t granularity_bytes)
{
    struct bitmap *bm = new_with(words, size_bytes, granularity_bytes);

    if (bm)
        rebuild(bm);
    return bm;
}

struct bitmap *bitmap_new_over_zeroes(uint64_t *words, uint64_t size_bytes,
                                      uint64_t granularity_bytes)
{
    return new_with(words, size_bytes, granularity_bytes);
}

uint64_t bitmap_word_count(uint64_t size_bytes, uint64_t granularity_bytes)
{
    return words_for(bits_for(size_bytes, log2_u64(granularity_bytes)), 0);
}

struct bitmap *bitmap_dup(const struct bitmap *bm)
{
    struct bitmap *copy = bitmap_new(bm->size_bytes, bitmap_granularity(bm));

    if (copy)
        bitmap_merge(copy, bm);
    return copy;
}

void bitmap_free(struct bitmap *bm)
{
    if (!bm)
        return;
    give_memory_back(bm);
    free(bm);
}

void bitmap_swap(struct bitmap *a, struct bitmap *b)
{
    struct bitmap was = *a;

    *a = *b;
    *b = was;
}

int bitmap_move(struct bitmap *bm, uint64_t *words, uint64_t room_bytes)
{
    struct bitmap old = *bm;

    assert(bm->lent);
    bm->bits = max_u64(bits_for(room_bytes, bm->granularity_shift), old.bits);
    if (take_memory(bm, words) < 0) {
        *bm = old;
        return -ENOMEM;
    }
    bm->bits = old.bits;
    rebuild(bm);
    give_memory_back(&old);
    return 0;
}

int bitmap_resize(struct bitmap *bm, uint64_t new_size_bytes)
{
    assert(new_size_bytes <= INT64_MAX);
    const uint64_t bits = bits_for(new_size_bytes, bm->granularity_shift);

    if (bits < bm->bits) {
        clear_bits(bm, bits, bm->bits);
    } else if (bits > bm->room_bits) {
        if (bm->lent)
            return -ENOTSUP;
        struct bitmap old = *bm;
        bm->bits = bits;
        bm->dirty_bits = 0;
        if (take_memory(bm, NULL) < 0) {
            *bm = old;
            return -ENOMEM;
        }
        for (uint64_t w = next_word(&old, 0); w != NONE; w = next_word(&old, w + 1))
            set_word(bm, w, old.level[0][w]);
        give_memory_back(&old);
    }
    bm->bits = bits;
    bm->size_bytes = new_size_bytes;
    return 0;
}

/* ---- bytes of disk ---- */

uint64_t bitmap_size(const struct bitmap *bm)
{
    return bm->size_bytes;
}

uint64_t bitmap_granularity(const struct bitmap *bm)
{
    return UINT64_C(1) << bm->granularity_shift;
}

/* Cut to the size, and so small enough for any arithmetic. */
static struct range cut(const struct bitmap *bm, struct range r)
{
    if (r.start >= bm->size_bytes)
        return range_make(bm->size_bytes, 0);
    return range_make(r.start, min_u64(r.length, bm->size_bytes - r.start));
}

/* One beyond the last bit that R, cut already, touches. */
static uint64_t end_bit(const struct bitmap *bm, struct range r)
{
    return bits_for(range_end(r), bm->granularity_shift);
}

void bitmap_mark(struct bitmap *bm, struct range r)
{
    r = cut(bm, r);
    if (!range_empty(r))
        mark_bits(bm, r.start >> bm->granularity_shift, end_bit(bm, r));
}

void bitmap_clear(struct bitmap *bm, struct range r)
{
    r = cut(bm, r);
    if (range_empty(r))
        return;
    uint64_t end = range_end(r) >> bm->granularity_shift;
    if (range_end(r) == bm->size_bytes)
        end = bm->bits;
    clear_bits(bm, bits_for(r.start, bm->granularity_shift), end);
}

void bitmap_mark_all(struct bitmap *bm)
{
    mark_bits(bm, 0, bm->bits);
}

void bitmap_clear_all(struct bitmap *bm)
{
    if (!bm->dirty_bits && !bm->mapped)
        return;
    if (bm->mapped && !bm->lent && madvise(bm->block, bm->block_bytes, MADV_DONTNEED) == 0)
        bm->dirty_bits = 0;
    else /* EINVAL when our memory is locked */
        clear_bits(bm, 0, bm->bits);
}

bool bitmap_get(const struct bitmap *bm, uint64_t offset)
{
    if (offset >= bm->size_bytes)
        return false;
    const uint64_t bit = offset >> bm->granularity_shift;
    return bm->level[0][bit / WORD_BITS] & bit_of(bit);
}

/* The bytes of the bits [first, end), cut to the size and to what lies at or after FROM. */
static struct range bytes_of(const struct bitmap *bm, uint64_t first, uint64_t end, uint64_t from)
{
    uint64_t stop = end >= bm->bits ? bm->size_bytes : end << bm->granularity_shift;
    return range_between(max_u64(first << bm->granularity_shift, from), stop);
}

/* The first bit after those that [from, from + max) touches. */
static uint64_t end_bit_of_max(const struct bitmap *bm, uint64_t from, uint64_t max)
{
    return end_bit(bm, cut(bm, range_make(from, max)));
}

bool bitmap_next(const struct bitmap *bm, uint64_t from, uint64_t max, struct range *found)
{
    assert(max > 0);
    if (from >= bm->size_bytes)
        return false;

    const uint64_t first = find_set(bm, 0, from >> bm->granularity_shift);
    if (first == NONE)
        return false;
    const uint64_t start = max_u64(first << bm->granularity_shift, from);
    const uint64_t end = find_clear(bm, first, end_bit_of_max(bm, start, max));
    *found = bytes_of(bm, first, end, start);
    found->length = min_u64(found->length, max);
    return true;
}

bool bitmap_next_clean(const struct bitmap *bm, uint64_t from, uint64_t *offset)
{
    if (from >= bm->size_bytes)
        return false;
    const uint64_t bit = find_clear(bm, from >> bm->granularity_shift, bm->bits);
    if (bit >= bm->bits)
        return false;
    *offset = max_u64(bit << bm->granularity_shift, from);
    return true;
}

bool bitmap_status(const struct bitmap *bm, uint64_t from, uint64_t max, uint64_t *length)
{
    assert(from < bm->size_bytes && max > 0);
    const uint64_t bit = from >> bm->granularity_shift;
    const bool dirty = bitmap_get(bm, from);
    uint64_t end =
        dirty ? find_clear(bm, bit, end_bit_of_max(bm, from, max)) : find_set(bm, 0, bit);

    *length = min_u64(bytes_of(bm, bit, end, from).length, max);
    return dirty;
}

bool bitmap_any(const struct bitmap *bm, struct range r)
{
    r = cut(bm, r);
    return !range_empty(r) && find_set(bm, 0, r.start >> bm->granularity_shift) < end_bit(bm, r);
}

uint64_t bitmap_count(const struct bitmap *bm)
{
    return bm->dirty_bits << bm->granularity_shift;
}

uint64_t bitmap_count_range(const struct bitmap *bm, struct range r)
{
    r = cut(bm, r);
    if (range_empty(r))
        return 0;
    const uint64_t first = r.start >> bm->granularity_shift;
    const uint64_t end = end_bit(bm, r);
    const uint64_t last = (end - 1) / WORD_BITS;
    uint64_t bits = 0;

    for (uint64_t w = next_word(bm, first / WORD_BITS); w <= last; w = next_word(bm, w + 1))
        bits += weight(bm->level[0][w] & mask_in_word(w, first, end));

    /* What the outermost granules have outside of R. */
    uint64_t bytes = bits << bm->granularity_shift;
    if (bitmap_get(bm, r.start))
        bytes -= r.start - (first << bm->granularity_shift);
    if (bitmap_get(bm, range_end(r) - 1))
        bytes -= (end << bm->granularity_shift) - range_end(r);
    return bytes;
}

void bitmap_merge(struct bitmap *dst, const struct bitmap *src)
{
    assert(dst->size_bytes == src->size_bytes);
    if (dst->granularity_shift != src->granularity_shift) {
        bitmap_merge_range(dst, src, range_make(0, src->size_bytes));
        return;
    }
    for (uint64_t w = next_word(src, 0); w != NONE; w = next_word(src, w + 1))
        set_word(dst, w, dst->level[0][w] | src->level[0][w]);
}

void bitmap_merge_range(struct bitmap *dst, const struct bitmap *src, struct range r)
{
    struct range run;

    r = cut(dst, cut(src, r));
    while (!range_empty(r) && bitmap_next(src, r.start, r.length, &run)) {
        run = range_intersect(run, r);
        if (range_empty(run))
            break;
        bitmap_mark(dst, run);
        /* The rest of a coarser granule has been marked with it. */
        r = range_between(align_up(range_end(run), bitmap_granularity(dst)), range_end(r));
    }
}

void bitmap_copy(struct bitmap *dst, const struct bitmap *src)
{
    assert(dst != src);
    bitmap_clear_all(dst);
    bitmap_merge(dst, src);
}

/* ---- the serial form ---- */

uint64_t bitmap_serial_length(const struct bitmap *bm)
{
    return div_round_up(bm->bits, 8);
}

/* A chunk of the serial form as bits [first, end), which may be none. */
static uint64_t serial_bits(const struct bitmap *bm, uint64_t first, uint64_t length, uint64_t *end)
{
    const uint64_t total = bitmap_serial_length(bm);

    first = min_u64(first, total);
    length = min_u64(length, total - first);
    *end = min_u64((first + length) * 8, bm->bits);
    return min_u64(first * 8, *end);
}

/* The part of leaf word W that lies in bytes [first, first + length) of the serial form. */
static size_t word_bytes(uint64_t w, uint64_t first, uint64_t length, size_t *skip, uint64_t *at)
{
    uint64_t from = max_u64(w * WORD_BYTES, first);
    uint64_t to = min_u64((w + 1) * WORD_BYTES, first + length);

    *skip = from - w * WORD_BYTES; /* bytes of the word before it */
    *at = from - first;            /* where it is in the buffer */
    return to - from;
}

void bitmap_serialise(const struct bitmap *bm, uint64_t first, void *buf, size_t length)
{
    uint64_t end, begin = serial_bits(bm, first, length, &end);

    memset(buf, 0, length);
    if (begin >= end)
        return;
    const uint64_t last = (end - 1) / WORD_BITS;
    for (uint64_t w = next_word(bm, begin / WORD_BITS); w <= last; w = next_word(bm, w + 1)) {
        uint64_t at, le = htole64(bm->level[0][w]);
        size_t skip, n = word_bytes(w, first, length, &skip, &at);
        memcpy((char *)buf + at, (char *)&le + skip, n);
    }
}

void bitmap_deserialise(struct bitmap *bm, uint64_t first, const void *buf, size_t length)
{
    uint64_t end, begin = serial_bits(bm, first, length, &end);

    if (begin >= end)
        return;
    for (uint64_t w = begin / WORD_BITS; w <= (end - 1) / WORD_BITS; w++) {
        uint64_t at, le = htole64(bm->level[0][w]);
        size_t skip, n = word_bytes(w, first, length, &skip, &at);
        memcpy((char *)&le + skip, (const char *)buf + at, n);
        set_word(bm, w, le64toh(le) & mask_in_word(w, 0, bm->bits));
    }
}

enum bitmap_chunk bitmap_serial_kind(const struct bitmap *bm, uint64_t first, uint64_t length)
{
    uint64_t end, begin = serial_bits(bm, first, length, &end);

    if (begin >= end || find_set(bm, 0, begin) >= end)
        return BITMAP_CHUNK_ZEROES;
    return find_clear(bm, begin, end) == end ? BITMAP_CHUNK_ONES : BITMAP_CHUNK_MIXED;
}

struct range bitmap_serial_span(const struct bitmap *bm, uint64_t first, uint64_t length)
{
    uint64_t end, begin = serial_bits(bm, first, length, &end);

    if (begin >= end)
        return range_make(bm->size_bytes, 0);
    return bytes_of(bm, begin, end, 0);
}

/* ---- looking at it ---- */

uint64_t bitmap_memory(const struct bitmap *bm)
{
    if (!bm->mapped)
        return sizeof *bm + bm->block_bytes;

    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t pages = div_round_up(bm->block_bytes, page);
    uint64_t resident = 0;
    unsigned char in_core[4096];

    for (uint64_t p = 0; p < pages; p += sizeof in_core) {
        uint64_t n = min_u64(pages - p, sizeof in_core);
        if (mincore((char *)bm->block + p * page, n * page, in_core) < 0)
            return sizeof *bm + bm->block_bytes;
        for (uint64_t i = 0; i < n; i++)
            resident += in_core[i] & 1;
    }
    return sizeof *bm + resident * page;
}

bool bitmap_valid(const struct bitmap *bm, const char **broken)
{
    uint64_t count = 0;

    *broken = "the number of granules is not that of the size, or there is no room for them";
    if (bm->bits != bits_for(bm->size_bytes, bm->granularity_shift) || bm->bits > bm->room_bits)
        return false;

    *broken = "a summary bit does not tell whether its word is zero";
    for (unsigned l = 0; l + 1 < bm->levels; l++)
        for (uint64_t w = 0; w < words_for(bm->bits, l); w++)
            if (!(bm->level[l + 1][w / WORD_BITS] & bit_of(w)) != !bm->level[l][w])
                return false;

    *broken = "the highest level is more than one word";
    if (words_for(bm->bits, bm->levels - 1) != 1)
        return false;

    *broken = "a bit beyond the end is set";
    for (unsigned l = 0; l < bm->levels; l++) {
        uint64_t n = l ? words_for(bm->bits, l - 1) : bm->bits;
        uint64_t tail = n / WORD_BITS;
        if (tail < words_for(bm->bits, l) && bm->level[l][tail] & ~(bit_of(n) - 1))
            return false;
    }

    *broken = "the count is not that of the leaf";
    for (uint64_t w = 0; w < words_for(bm->bits, 0); w++)
        count += weight(bm->level[0][w]);
    if (count != bm->dirty_bits)
        return false;

    *broken = NULL;
    return true;
}
