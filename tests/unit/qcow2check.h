/* A check of qcow2 images of our own, quick enough for thousands of cuts a second. */
#pragma once

#include "block/qcow2/qcow2.h"

#include <stdio.h>

/* Are all references counted (leaks are fine), and do the copied bits tell the truth? NULL: yes. */
static inline const char *qcow2_damage(const uint8_t *bytes, uint64_t size)
{
    static char text[256];
    struct qcow2_header h = {0};
    struct error err = ERROR_INIT;
    uint8_t start[QCOW2_HEADER_BYTES] = {0};
    const char *damage = NULL;
    memcpy(start, bytes, min_u64(sizeof start, size));
    if (qcow2_header_decode(start, sizeof start, &h, &err) < 0)
        return "no header";
    uint64_t cs = qcow2_header_cluster_size(&h);
    if (size < cs || qcow2_header_decode_rest(bytes, cs, &h, &err) < 0 ||
        qcow2_header_check(&h, &err) < 0) {
        snprintf(text, sizeof text, "header: %.200s", err.text);
        qcow2_header_fini(&h);
        return text;
    }
    uint64_t n = div_round_up(size, cs);
    uint16_t *refs = calloc(n, 2), *counts = calloc(n, 2);
#define DAMAGE(...)                                                                                \
    do {                                                                                           \
        snprintf(text, sizeof text, __VA_ARGS__);                                                  \
        damage = text;                                                                             \
        goto out;                                                                                  \
    } while (0)
#define REF(off, what)                                                                             \
    do {                                                                                           \
        if ((off) / cs >= n)                                                                       \
            DAMAGE("%s at %#llx is beyond the end %#llx", what, (unsigned long long)(off),         \
                   (unsigned long long)size);                                                      \
        refs[(off) / cs]++;                                                                        \
    } while (0)
#define AT(off) ((off) + 8 <= size ? entry_load(bytes + (off), 0) : 0)
    REF((uint64_t)0, "header");
    for (uint32_t i = 0; i < h.reftable_clusters; i++)
        REF(h.reftable_offset + i * cs, "refcount table");
    for (uint64_t i = 0; i < h.reftable_clusters * cs / 8; i++) {
        uint64_t block = AT(h.reftable_offset + i * 8);
        if (!block)
            continue;
        REF(block, "refcount block");
        for (uint64_t j = 0; j < cs / 2 && i * (cs / 2) + j < n; j++)
            if (block + 2 * j + 2 <= size)
                counts[i * (cs / 2) + j] =
                    (uint16_t)(bytes[block + 2 * j] << 8 | bytes[block + 2 * j + 1]);
    }
    for (uint64_t i = 0; i < div_round_up(h.l1_size * 8ull, cs); i++)
        REF(h.l1_offset + i * cs, "L1 table");
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t i = 0; i < h.l1_size; i++) {
            uint64_t l1e = AT(h.l1_offset + 8 * (uint64_t)i), l2 = l1e & ENTRY_OFFSET_MASK;
            if (!l2)
                continue;
            if (pass == 0)
                REF(l2, "L2 table");
            else if ((l1e & ENTRY_COPIED) && counts[l2 / cs] != 1)
                DAMAGE("L2 table at %#llx is counted %u times", (unsigned long long)l2,
                       counts[l2 / cs]);
            for (uint64_t j = 0; j < cs / 8; j++) {
                uint64_t e = AT(l2 + 8 * j), host = e & ENTRY_OFFSET_MASK;
                if (!host || (e & ENTRY_COMPRESSED))
                    continue;
                if (pass == 0)
                    REF(host, "cluster");
                else if ((e & ENTRY_COPIED) && counts[host / cs] != 1)
                    DAMAGE("cluster at %#llx is counted %u times", (unsigned long long)host,
                           counts[host / cs]);
            }
        }
    if (h.has_bitmaps) {
        for (uint64_t i = 0; i < div_round_up(h.bitmap_directory_bytes, cs); i++)
            REF(h.bitmap_directory_offset + i * cs, "bitmap directory");
        for (uint64_t at = h.bitmap_directory_offset, k = 0; k < h.nb_bitmaps; k++) {
            uint64_t table = AT(at), entries = AT(at + 8) >> 32;
            uint64_t name = AT(at + 16) >> 32 & 0xffff;
            for (uint64_t i = 0; i < div_round_up(entries * 8, cs); i++)
                REF(table + i * cs, "bitmap table");
            for (uint64_t i = 0; i < entries; i++)
                if (AT(table + 8 * i) & ENTRY_OFFSET_MASK)
                    REF(AT(table + 8 * i) & ENTRY_OFFSET_MASK, "bitmap data");
            at += align_up(24 + name, 8);
        }
    }
    for (uint64_t i = 0; i < n; i++)
        if (counts[i] < refs[i])
            DAMAGE("cluster %#llx has %u references and a count of %u",
                   (unsigned long long)(i * cs), refs[i], counts[i]);
out:
#undef DAMAGE
#undef REF
#undef AT
    free(refs);
    free(counts);
    qcow2_header_fini(&h);
    return damage;
}
