/* However a program of random histories dies, it says how to see that again: by a judgement, an
 * assert of src/, a sanitizer's report, a signal, or the patience of who runs it (meson sends
 * SIGTERM). All of them come through here, so what is said is made before. */
#pragma once

#include "base/macros.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

static char again[600]; /* what is said, once; "": between histories there is nothing to repeat */

static void say_again(void)
{
    if (write(STDERR_FILENO, again, strlen(again)) < 0)
        return;
    again[0] = '\0';
}

static void dies_by(int sig)
{
    say_again();
    signal(sig, SIG_DFL);
    raise(sig);
}

void __sanitizer_set_death_callback(void (*fn)(void)) __attribute__((weak));

static void watch_for_death(void)
{
    static const int signals[] = {SIGABRT, SIGTERM, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
        signal(signals[i], dies_by);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(say_again);
}
