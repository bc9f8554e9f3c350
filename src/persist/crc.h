/* CRC32C (Castagnoli, reflected, as iSCSI has it) in pieces: crc_end(crc_add(crc_add(CRC_BEGIN, a),
 * b)) is that of a and b in a row. */
#pragma once

#include "base/macros.h"

#include <isa-l/crc.h>

#define CRC_BEGIN UINT32_MAX

static inline uint32_t crc_add(uint32_t crc, const void *bytes, size_t n)
{
    return crc32_iscsi((unsigned char *)(uintptr_t)bytes, (int)n, crc);
}

static inline uint32_t crc_end(uint32_t crc)
{
    return ~crc;
}
