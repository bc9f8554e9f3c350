/* Of the bitmaps extension's two files. */
#pragma once

enum {
    BITMAP_ENTRY_BYTES = 24,
    BITMAP_FLAG_IN_USE = 1,
    BITMAP_FLAG_AUTO = 2,
    BITMAP_FLAG_EXTRA_COMPATIBLE = 4,
    BITMAP_FLAGS_KNOWN = 7,
    BITMAP_TABLE_ENTRIES_MAX = 0x8000000,
};
