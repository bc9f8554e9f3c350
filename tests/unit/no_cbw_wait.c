/* Linked into a test, this takes the wait out of copy-before-write (copy/copy.h): a guest's write
 * no longer waits until what it overwrites is saved. Tests of the instant must then fail. */
#include "copy/copy.h"

bool copy_holds_guest_writes(void)
{
    return false;
}
