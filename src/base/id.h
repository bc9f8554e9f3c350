/* Names that users give to nodes, jobs, exports, objects and character devices: QEMU's rule, a
 * letter, then letters, digits, '-', '.' and '_', all of them ASCII whatever the locale. What
 * a program makes by itself begins with '#', so no user's name can be one of those. */
#pragma once

#include "base/macros.h"

static inline bool id_is_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

static inline bool id_well_formed(const char *id)
{
    if (!id_is_letter(*id))
        return false;
    for (; *id; id++)
        if (!id_is_letter(*id) && !(*id >= '0' && *id <= '9') && !strchr("-._", *id))
            return false;
    return true;
}
