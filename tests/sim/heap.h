/* The memory of a simulated program: what it allocates from its start until it is killed is
 * taken back at one stroke, whoever held it, without running a line of its code.
 *
 * While "life" is on, malloc() and its kin (of our code and of the libraries that it calls) take
 * from an arena of the life's own; otherwise from the C library. A plain build replaces
 * malloc(): the arena starts anew with each life, at the same address, so that even what depends on
 * addresses repeats. With AddressSanitizer the allocator stays its own, so that it sees every wrong
 * access; its hooks tell us of each allocation, and what is left of a life is freed one by one.
 * Only blocks from 64 KiB on are ours there, too (large_blocks.h).
 * Mappings (the tasks' stacks, big bitmaps) are counted in both: stacks are kept for the next task
 * of any life, the rest is unmapped. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/* True: what is allocated from now on belongs to the life. Returns what was before. */
bool heap_life(bool on);
/* The life is over: all that it still has goes. Life is off. */
void heap_discard(void);
size_t heap_life_bytes(void); /* taken from the arena by this life; 0 with AddressSanitizer */

static inline void heap_restore(bool *was)
{
    heap_life(*was);
}
/* Until the end of the block: memory of the simulated machine, which outlives programs. */
#define HEAP_OF_THE_MACHINE()                                                                      \
    bool heap_was_life __attribute__((cleanup(heap_restore), unused)) = heap_life(false)
