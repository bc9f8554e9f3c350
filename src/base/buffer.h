/* Bytes that grow at the end, with a limit, for streams and for text that is put together. */
#pragma once

#include "base/macros.h"

struct buffer {
    uint8_t *data;
    size_t length;   /* bytes in use */
    size_t capacity; /* bytes allocated */
};

void buffer_fini(struct buffer *b); /* frees; the buffer is empty and usable again */

/* Makes room for N more bytes and returns where they go; NULL when memory is short. */
uint8_t *buffer_reserve(struct buffer *b, size_t n);
int buffer_append(struct buffer *b, const void *bytes, size_t n); /* 0 or -ENOMEM */
int buffer_printf(struct buffer *b, const char *fmt, ...) PRINTF(2, 3);
