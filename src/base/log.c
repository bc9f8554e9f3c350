#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static const char *program = "tidemark";
static enum log_level threshold = LOG_LEVEL_INFO;

void log_set_program(const char *name)
{
    program = name;
}

void log_set_level(enum log_level least)
{
    threshold = least;
}

void log_line(enum log_level level, const char *fmt, ...)
{
    static const char *const words[] = {"debug: ", "", "warning: ", "error: "};
    char line[4096];
    va_list ap;

    if (level < threshold)
        return;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    fprintf(stderr, "%s: %s%s\n", program, words[level], line);
}
