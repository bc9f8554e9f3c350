#include "base/buffer.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

void buffer_fini(struct buffer *b)
{
    free(b->data);
    *b = (struct buffer){0};
}

uint8_t *buffer_reserve(struct buffer *b, size_t n)
{
    if (n > SIZE_MAX / 2 - b->length)
        return NULL;
    if (b->length + n > b->capacity) {
        size_t capacity = max_u64(max_u64(64, b->capacity * 2), b->length + n);
        uint8_t *data = realloc(b->data, capacity);
        if (!data)
            return NULL;
        b->data = data;
        b->capacity = capacity;
    }
    return b->data + b->length;
}

int buffer_append(struct buffer *b, const void *bytes, size_t n)
{
    uint8_t *to = buffer_reserve(b, n);
    if (!to)
        return -ENOMEM;
    if (n)
        memcpy(to, bytes, n);
    b->length += n;
    return 0;
}

int buffer_printf(struct buffer *b, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    uint8_t *to = buffer_reserve(b, (size_t)n + 1);
    if (!to)
        return -ENOMEM;
    va_start(ap, fmt);
    vsnprintf((char *)to, (size_t)n + 1, fmt, ap);
    va_end(ap);
    b->length += (size_t)n;
    return 0;
}
