/* Of the bitmaps extension's files. */
#pragma once

#include "block/qcow2/bitmaps.h"

struct qcow2;

enum {
    BITMAP_ENTRY_BYTES = 24,
    BITMAP_FLAG_IN_USE = 1,
    BITMAP_FLAG_AUTO = 2,
    BITMAP_FLAG_EXTRA_COMPATIBLE = 4,
    BITMAP_FLAGS_KNOWN = 7,
    BITMAP_TABLE_ENTRIES_MAX = 0x8000000,
};

#define BITMAP_TABLE_RESERVED_MASK ((uint64_t)0xff000000000001fe)
#define BITMAP_TABLE_ALL_ONES ((uint64_t)1)

/* ---- bitmap_directory.c: pure ---- */

PRINTF(2, 3) void qcow2_bitmap_quarantine(struct qcow2_bitmap *b, const char *fmt, ...);
/* Flags of the raw entry from in_use and automatic. */
void qcow2_bitmap_update_raw(struct qcow2_bitmap *b);
/* ENTRY has qcow2_bitmap_entry_bytes(name). */
void qcow2_bitmap_entry_encode(uint8_t *entry, const char *name, uint64_t table_offset,
                               uint32_t table_entries, unsigned granularity_bits, bool in_use,
                               bool automatic);

/* ---- bitmaps.c ---- */

int qcow2_bitmaps_check_writable(struct qcow2 *q, struct error *err);
/* The table of an entry, in host order; each entry checked. */
int qcow2_bitmap_read_table(struct qcow2 *q, const struct qcow2_bitmap *b, uint64_t **ret);
/* What is in the way of LENGTH bytes at OFFSET, the directory aside; NULL: nothing. */
const char *qcow2_bitmap_overlap(struct qcow2 *q, uint64_t offset, uint64_t length);
uint64_t qcow2_bitmap_serial_bytes(uint64_t size_bytes, uint64_t granularity);
