/* Blocks from 64 KiB on in a program with AddressSanitizer, which maps each of them anew with its
 * shadow: in programs that take thousands a second, that is most of the time.
 *
 * Linked with --wrap for what allocates (tests/meson.build), our own code takes such blocks from
 * here. They stay mapped and are poisoned while nobody has them; the one that has rested longest
 * is next. So a use after free, a use beyond either end (there is a poisoned page between two) and
 * a second free end the program as ever, though without the stacks of who took and freed the block.
 * LeakSanitizer does not know them: at the end of the program what is still in use is a leak (a
 * pointer to it somewhere is no excuse). To see stacks, TEST_LARGE_BLOCKS=0 leaves all to the
 * sanitizer. What a library allocates for itself is the sanitizer's always. */
#pragma once

#include <stdbool.h>

/* Blocks that are taken from now on are marked, or not. Returns what was before. */
bool large_blocks_mark(bool on);
/* Frees all that are marked. */
void large_blocks_discard(void);
/* What is in use at the end is no leak: for the simulator, whose machines stay to the end, and
 * which takes back whatever a life has left. */
void large_blocks_stay(void);
