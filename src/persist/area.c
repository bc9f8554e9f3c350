/* Sectors of a bit area: 496 bytes of a bitmap's serial form, with what makes them believable.
 *
 *     0    4   CRC32C of: uuid of the file (16), offset of the sector in it (8), bytes 4 to 511 of
 *              the sector
 *     4    4   zero
 *     8    8   epoch
 *     16   496 payload
 *
 * A sector is the unit because it is what a disk writes whole: a torn write leaves each sector as
 * it was or as it was to be, and both are fine. The checksum is looked at before the epoch: a
 * damaged epoch would turn dirty into clean. It tells of the place in the file and not of the
 * extent: what an area has left where now another one lies is not damage, but of another epoch. */
#include "base/broken.h"
#include "persist/crc.h"
#include "persist/super.h"

#include <endian.h>
#include <isa-l/mem_routines.h>

static uint32_t sector_crc(const uint8_t *sector, const struct tide_id *uuid, uint64_t offset)
{
    uint64_t le_offset = htole64(offset);
    uint32_t crc = crc_add(CRC_BEGIN, uuid->bytes, sizeof uuid->bytes);
    crc = crc_add(crc, &le_offset, sizeof le_offset);
    return crc_end(crc_add(crc, sector + 4, AREA_SECTOR - 4));
}

void area_encode(uint8_t sector[AREA_SECTOR], const struct tide_id *uuid, uint64_t offset,
                 uint64_t epoch, const uint8_t payload[AREA_PAYLOAD])
{
    uint64_t le_epoch = htole64(epoch);
    memset(sector, 0, AREA_HEADER);
    memcpy(sector + 8, &le_epoch, 8);
    memcpy(sector + AREA_HEADER, payload, AREA_PAYLOAD);
    uint32_t le_crc = htole32(sector_crc(sector, uuid, offset));
    memcpy(sector, &le_crc, 4);
}

enum area_state area_decode(const uint8_t sector[AREA_SECTOR], const struct tide_id *uuid,
                            uint64_t offset, uint64_t epoch, const uint8_t **payload,
                            uint64_t *other)
{
    uint32_t le_crc;
    uint64_t le_epoch;
    memcpy(&le_crc, sector, 4);
    memcpy(&le_epoch, sector + 8, 8);
    *other = 0;
    if (!le_crc && !le_epoch && isal_zero_detect((void *)(uintptr_t)sector, AREA_SECTOR) == 0)
        return AREA_CLEAN;
    if (le32toh(le_crc) != sector_crc(sector, uuid, offset))
        return AREA_BAD;
    if (le64toh(le_epoch) != epoch && !BROKEN(area_without_epoch)) {
        *other = le64toh(le_epoch);
        return AREA_CLEAN;
    }
    *payload = sector + AREA_HEADER;
    return AREA_DATA;
}

uint64_t area_sectors(uint64_t size_bytes, unsigned granularity_bits)
{
    uint64_t granules = div_round_up(size_bytes, UINT64_C(1) << granularity_bits);
    return div_round_up(div_round_up(granules, 8), AREA_PAYLOAD);
}

uint64_t tide_extent_bytes(uint64_t size_bytes, unsigned granularity_bits)
{
    uint64_t bytes = area_sectors(size_bytes, granularity_bits) * AREA_SECTOR;
    return max_u64(align_up(bytes, TIDE_ALIGN), TIDE_ALIGN);
}
