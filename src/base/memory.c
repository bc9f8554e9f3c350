#include "base/macros.h"

#include <stdarg.h>
#include <stdio.h>

static void out_of_memory(size_t bytes)
{
    fprintf(stderr, "tidemark: out of memory (%zu bytes)\n", bytes);
    abort();
}

void *xcalloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p)
        out_of_memory(n * size);
    return p;
}

char *xstrdup(const char *s)
{
    char *copy = strdup(s);
    if (!copy)
        out_of_memory(strlen(s) + 1);
    return copy;
}

char *xasprintf(const char *fmt, ...)
{
    va_list ap;
    char *s = NULL;

    va_start(ap, fmt);
    int n = vasprintf(&s, fmt, ap);
    va_end(ap);
    if (n < 0)
        out_of_memory(0);
    return s;
}
