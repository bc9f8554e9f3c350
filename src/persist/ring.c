/* The hot ring's blocks, and the table that they tell.
 *
 *     0     8    "tidering"
 *     8     4    CRC32C of bytes 12 to 4095
 *     12    2    changes, at most 64
 *     14    2    entries of the slice, at most 880
 *     16    16   session
 *     32    8    sequence
 *     40    2    first slot of the slice
 *     42    6    zero
 *     48    512  changes: slot (2), zero (2), region (4; 0xffffffff: it becomes free); those not
 *                used are zero
 *     560   3520 slice: regions (4), 0xffffffff for a free slot; those not used are zero
 *     4080  16   zero
 *
 * Block s of a session is in place s modulo 64, one is in flight at a time, and each carries a
 * slice of the table: so the table is what the last few say, and the one block that a crash can
 * tear is the one after the newest (a session's first, which is empty, is durable before it
 * begins). It is written again with the same sequence: left behind, it would be a hole among the
 * last ones later. A hole there is nothing that a crash makes. */
#include "base/broken.h"
#include "base/cursor.h"
#include "persist/crc.h"
#include "persist/super.h"

#include <isa-l/mem_routines.h>

static const uint8_t magic[8] = {'t', 'i', 'd', 'e', 'r', 'i', 'n', 'g'};
enum { CRC_AT = 8, CRC_FROM = 12, CHANGES_AT = 48, SLICE_AT = 560 };

void ring_slice(struct ring_block *b, const uint32_t *table, unsigned slots, unsigned slice)
{
    b->slice_length = slice < slots ? slice : slots;
    assert(b->slice_length && b->slice_length <= RING_SLICE);
    b->slice_first = (unsigned)(b->sequence % slots * b->slice_length % slots);
    for (unsigned i = 0; i < b->slice_length; i++)
        b->slice[i] = table[(b->slice_first + i) % slots];
    if (BROKEN(ring_without_slices))
        b->slice_length = 0;
}

void ring_encode(const struct ring_block *b, uint8_t buf[RING_BLOCK])
{
    assert(b->n_changes <= RING_CHANGES && b->slice_length <= RING_SLICE &&
           b->slice_first <= UINT16_MAX);
    memset(buf, 0, RING_BLOCK);
    struct out_cursor c = out_cursor_over(buf, RING_BLOCK);
    put_bytes(&c, magic, sizeof magic);
    put_le32(&c, 0);
    put_le16(&c, (uint16_t)b->n_changes);
    put_le16(&c, (uint16_t)b->slice_length);
    put_bytes(&c, b->session.bytes, sizeof b->session.bytes);
    put_le64(&c, b->sequence);
    put_le16(&c, (uint16_t)b->slice_first);

    c = out_cursor_over(buf + CHANGES_AT, SLICE_AT - CHANGES_AT);
    for (unsigned i = 0; i < b->n_changes; i++) {
        put_le16(&c, b->changes[i].slot);
        put_le16(&c, 0);
        put_le32(&c, b->changes[i].region);
    }
    c = out_cursor_over(buf + SLICE_AT, RING_BLOCK - SLICE_AT);
    for (unsigned i = 0; i < b->slice_length; i++)
        put_le32(&c, b->slice[i]);

    uint32_t le_crc = htole32(crc_end(crc_add(CRC_BEGIN, buf + CRC_FROM, RING_BLOCK - CRC_FROM)));
    memcpy(buf + CRC_AT, &le_crc, 4);
}

enum ring_state ring_decode(const uint8_t buf[RING_BLOCK], const struct tide_id *session,
                            struct ring_block *ret)
{
    if (isal_zero_detect((void *)(uintptr_t)buf, RING_BLOCK) == 0)
        return RING_OTHER;
    struct cursor c = cursor_over(buf, RING_BLOCK);
    if (memcmp(get_bytes(&c, sizeof magic), magic, sizeof magic) != 0)
        return RING_BAD;
    if (get_le32(&c) != crc_end(crc_add(CRC_BEGIN, buf + CRC_FROM, RING_BLOCK - CRC_FROM)))
        return RING_BAD;

    unsigned n_changes = get_le16(&c), slice_length = get_le16(&c);
    const uint8_t *id = get_bytes(&c, sizeof ret->session.bytes);
    if (memcmp(id, session->bytes, sizeof session->bytes) != 0)
        return RING_OTHER;
    if (n_changes > RING_CHANGES || slice_length > RING_SLICE)
        return RING_BAD;
    memset(ret, 0, offsetof(struct ring_block, slice));
    ret->session = *session;
    ret->n_changes = n_changes;
    ret->slice_length = slice_length;
    ret->sequence = get_le64(&c);
    ret->slice_first = get_le16(&c);

    c = cursor_over(buf + CHANGES_AT, SLICE_AT - CHANGES_AT);
    for (unsigned i = 0; i < n_changes; i++) {
        ret->changes[i].slot = get_le16(&c);
        get_le16(&c);
        ret->changes[i].region = get_le32(&c);
    }
    c = cursor_over(buf + SLICE_AT, RING_BLOCK - SLICE_AT);
    for (unsigned i = 0; i < slice_length; i++)
        ret->slice[i] = get_le32(&c);
    return RING_OURS;
}

unsigned ring_full_table(unsigned slots, unsigned slice)
{
    return (unsigned)div_round_up(slots, slice < slots ? slice : slots);
}

/* What B says of the table, after which it is of B's sequence. */
static void apply(const struct ring_block *b, uint32_t *table, unsigned slots)
{
    for (unsigned i = 0; i < b->n_changes; i++)
        table[b->changes[i].slot] = b->changes[i].region;
    for (unsigned i = 0; i < b->slice_length; i++)
        table[(b->slice_first + i) % slots] = b->slice[i];
}

static int check_block(const struct ring_block *b, unsigned slots, struct error *err)
{
    unsigned long long s = b->sequence;
    for (unsigned i = 0; i < b->n_changes; i++)
        if (b->changes[i].slot >= slots)
            return error_set(err, EBADMSG, "transaction %llu of the hot ring changes slot %u of %u",
                             s, b->changes[i].slot, slots);
    if (b->slice_length > slots || b->slice_first >= slots)
        return error_set(err, EBADMSG,
                         "transaction %llu of the hot ring holds %u slots from %u on, of %u", s,
                         b->slice_length, b->slice_first, slots);
    return 0;
}

/* Marks what B's slice holds as told; true when now every slot is. */
static bool tell(const struct ring_block *b, uint8_t *told, unsigned *left, unsigned slots)
{
    for (unsigned i = 0; i < b->slice_length; i++) {
        uint8_t *slot = &told[(b->slice_first + i) % slots];
        *left -= !*slot;
        *slot = 1;
    }
    return *left == 0;
}

int ring_rebuild(const struct ring_block *blocks, size_t n, uint64_t first_sequence,
                 uint32_t *table, unsigned slots, uint64_t *next, struct error *err)
{
    /* by their distance from the newest; more than a ring of them are never needed */
    const struct ring_block *last[TIDE_RING_BLOCKS] = {NULL};
    const struct ring_block *newest = NULL;

    for (unsigned i = 0; i < slots; i++)
        table[i] = REGION_NONE;
    for (size_t i = 0; i < n; i++)
        if (blocks[i].sequence >= first_sequence &&
            (!newest || blocks[i].sequence > newest->sequence))
            newest = &blocks[i];
    if (!newest && BROKEN(lost_ring_is_empty)) {
        *next = first_sequence;
        return 0;
    }
    if (!newest)
        return error_set(err, EBADMSG, "the hot ring is lost: it has no transaction from %llu on",
                         (unsigned long long)first_sequence);
    for (size_t i = 0; i < n; i++) {
        uint64_t back = newest->sequence - blocks[i].sequence;
        if (blocks[i].sequence >= first_sequence && back < TIDE_RING_BLOCKS)
            last[back] = &blocks[i];
    }

    CLEANUP(memory_freep) uint8_t *told = xcalloc(slots, 1);
    unsigned left = slots, used = 0;
    for (bool whole = false; !whole; used++) {
        unsigned long long s = newest->sequence - used;
        if (used == TIDE_RING_BLOCKS || !last[used])
            return error_set(err, EBADMSG,
                             "the hot ring has a hole: transaction %llu is missing, the newest is "
                             "%llu",
                             s, (unsigned long long)newest->sequence);
        int r = check_block(last[used], slots, err);
        if (r < 0)
            return r;
        whole = tell(last[used], told, &left, slots) || s == first_sequence;
    }
    while (used--)
        apply(last[used], table, slots);
    *next = newest->sequence + (BROKEN(torn_block_skipped) ? 2 : 1);
    return 0;
}
