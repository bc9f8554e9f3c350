/* Deliberate faults: BROKEN(name) marks a place that a test build can break.
 *
 *     if (!BROKEN(successor_not_merged))
 *         bitmap_merge(to, successor);
 *
 * A test that never fails proves nothing; so each plausible mistake has a name here, and
 * tests/faults/list says which test must find it. In the product BROKEN() is the constant false: no
 * code, no cost, no way to switch it on. Only the objects of tests/faults are compiled with
 * TIDEMARK_BREAKABLE, and there it asks whether NAME is the one chosen for the process. */
#pragma once

#include <stdbool.h>

#ifdef TIDEMARK_BREAKABLE
bool broken(const char *name); /* tests/faults/broken.c */
#define BROKEN(name) broken(#name)
#else
#define BROKEN(name) false
#endif
