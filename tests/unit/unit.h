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
#include <unistd.h>

/* Where files may be that need no disk: in memory, if that can be, flushes cost nothing. */
static inline const char *unit_tmp(void)
{
    return access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
}

/* Whether AddressSanitizer is in: its shadow and red zones make measured memory meaningless. */
#if defined(__SANITIZE_ADDRESS__)
#define UNIT_SANITIZED 1
#elif defined(__has_feature)
#define UNIT_SANITIZED __has_feature(address_sanitizer)
#else
#define UNIT_SANITIZED 0
#endif

/* Leaves the test as skipped, never as passed: what this place does not allow, and why. */
#define UNIT_SKIP(...)                                                                             \
    do {                                                                                           \
        print_message("skipped: " __VA_ARGS__);                                                    \
        print_message("\n");                                                                       \
        skip();                                                                                    \
    } while (0)
