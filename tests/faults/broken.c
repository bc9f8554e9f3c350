/* Which fault is chosen: the environment variable TIDEMARK_BROKEN, read once. Says on standard
 * error when the fault is reached first: a test that fails before that fails for another reason. */
#include "base/broken.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *chosen;
static bool asked, reached;

bool broken(const char *name)
{
    if (!asked) {
        chosen = getenv("TIDEMARK_BROKEN");
        asked = true;
    }
    if (!chosen || strcmp(chosen, name) != 0)
        return false;
    if (!reached)
        fprintf(stderr, "fault %s: reached\n", name);
    reached = true;
    return true;
}
