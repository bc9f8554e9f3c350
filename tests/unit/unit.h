/* What every unit test includes: cmocka and the headers that it wants before it. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* after the four above */
#include <cmocka.h>

/* Runs the tests; with an argument on the command line, only those whose name has it as a
 * part (globs are allowed): build/tests/unit/test_bitmap marks_and_clears */
#define UNIT_MAIN(tests)                                                                           \
    int main(int argc, char **argv)                                                                \
    {                                                                                              \
        char unit_filter[512];                                                                     \
        if (argc > 1) {                                                                            \
            snprintf(unit_filter, sizeof unit_filter, "*%s*", argv[1]);                            \
            cmocka_set_test_filter(unit_filter);                                                   \
        }                                                                                          \
        return cmocka_run_group_tests(tests, NULL, NULL);                                          \
    }

#include <stdio.h>
