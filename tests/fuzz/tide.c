/* The decoders of the tide file. The first byte of the input says of what: 's' a superblock, 'r'
 * blocks of the hot ring, 'a' sectors of a bit area. Each is decoded as it is, and once more with
 * checksums that are right: a fuzzer does not guess them. */
#include "persist/crc.h"
#include "persist/super.h"

#include <endian.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What is understood can be written, and says the same again. */
static void super(const uint8_t *data, size_t size)
{
    struct super s = {0}, again = {0};
    struct error err = ERROR_INIT;
    size_t length, length2;
    if (super_decode(data, size, &s, &err) < 0) {
        if (!err.text[0] || strchr(err.text, '\n'))
            abort();
        return;
    }
    uint8_t *one = calloc(1, TIDE_SUPER_BYTES), *two = calloc(1, TIDE_SUPER_BYTES);
    if (super_encode(&s, one, &length, NULL) < 0 || super_decode(one, length, &again, NULL) < 0 ||
        super_encode(&again, two, &length2, NULL) < 0 || length != length2 ||
        memcmp(one, two, length) != 0)
        abort();
    super_fini(&again);
    super_fini(&s);
    free(one);
    free(two);
}

static void fuzz_super(uint8_t *data, size_t size)
{
    super(data, size);
    if (size < 272)
        return;
    uint32_t used = htole32((uint32_t)size), version = htole32(1);
    memcpy(data, "TIDEMARK", 8);
    memcpy(data + 8, &version, 4);
    memcpy(data + 16, &used, 4);
    uint32_t crc = crc_add(crc_add(CRC_BEGIN, data, 12), data + 16, size - 16);
    crc = htole32(crc_end(crc));
    memcpy(data + 12, &crc, 4);
    super(data, size);
}

static void ring(const uint8_t *data, size_t size, struct ring_block *blocks)
{
    enum { SLOTS = 1024 };
    static uint32_t table[SLOTS];
    struct tide_id session;
    struct error err = ERROR_INIT;
    uint64_t next;
    size_t n = 0;
    if (size < RING_BLOCK)
        return;
    memcpy(session.bytes, data + 16, sizeof session.bytes); /* that of the first one */
    for (size_t at = 0; at + RING_BLOCK <= size && n < TIDE_RING_BLOCKS; at += RING_BLOCK)
        n += ring_decode(data + at, &session, &blocks[n]) == RING_OURS;
    for (unsigned first = 0; first < 2; first++)
        for (unsigned slots = 4; slots <= SLOTS; slots += 510)
            if (ring_rebuild(blocks, n, first, table, slots, &next, &err) < 0) {
                if (!err.text[0] || strchr(err.text, '\n'))
                    abort();
                error_clear(&err);
            }
}

static void fuzz_ring(uint8_t *data, size_t size)
{
    struct ring_block *blocks = calloc(TIDE_RING_BLOCKS + 1, sizeof *blocks);
    ring(data, size, blocks);
    for (size_t at = 0; at + RING_BLOCK <= size; at += RING_BLOCK) {
        uint32_t crc = htole32(crc_end(crc_add(CRC_BEGIN, data + at + 12, RING_BLOCK - 12)));
        memcpy(data + at, "tidering", 8);
        memcpy(data + at + 8, &crc, 4);
    }
    ring(data, size, blocks);
    free(blocks);
}

static void fuzz_area(const uint8_t *data, size_t size)
{
    const struct tide_id uuid = {{1}};
    const uint8_t *payload;
    uint64_t other;
    for (size_t i = 0; (i + 1) * AREA_SECTOR <= size; i++) {
        const uint8_t *sector = data + i * AREA_SECTOR;
        uint8_t again[AREA_SECTOR];
        if (area_decode(sector, &uuid, TIDE_EXTENTS_OFFSET + i * AREA_SECTOR, 1, &payload,
                        &other) != AREA_DATA)
            continue;
        area_encode(again, &uuid, TIDE_EXTENTS_OFFSET + i * AREA_SECTOR, 1, payload);
        if (memcmp(again, sector, AREA_SECTOR) != 0)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1 || size > TIDE_SUPER_BYTES)
        return 0;
    uint8_t *copy = calloc(size - (size > 1), 1); /* of that size: the byte beyond is seen */
    if (!copy)
        return 0;
    memcpy(copy, data + 1, size - 1);
    if (data[0] == 's')
        fuzz_super(copy, size - 1);
    else if (data[0] == 'r')
        fuzz_ring(copy, size - 1);
    else if (data[0] == 'a')
        fuzz_area(copy, size - 1);
    free(copy);
    return 0;
}
