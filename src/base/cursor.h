/* Reads foreign bytes once, front to back, and cannot leave the buffer: past the end
 * every get returns 0 and `overrun` stays true. Also writes them, with the same rule. */
#pragma once

#include "base/macros.h"

#include <endian.h>

struct cursor {
    const uint8_t *at;
    const uint8_t *end;
    bool overrun;
};

static inline struct cursor cursor_over(const void *buf, size_t length)
{
    return (struct cursor){.at = buf, .end = (const uint8_t *)buf + length};
}

static inline size_t cursor_left(const struct cursor *c)
{
    return (size_t)(c->end - c->at);
}

/* The next N bytes in place, or NULL and overrun. */
static inline const uint8_t *get_bytes(struct cursor *c, size_t n)
{
    if (c->overrun || cursor_left(c) < n) {
        c->overrun = true;
        return NULL;
    }
    const uint8_t *p = c->at;
    c->at += n;
    return p;
}

#define CURSOR_GET(name, type, convert)                                                            \
    static inline type name(struct cursor *c)                                                      \
    {                                                                                              \
        type v;                                                                                    \
        const uint8_t *p = get_bytes(c, sizeof v);                                                 \
        if (!p)                                                                                    \
            return 0;                                                                              \
        memcpy(&v, p, sizeof v);                                                                   \
        return convert(v);                                                                         \
    }
CURSOR_GET(get_u8, uint8_t, )
CURSOR_GET(get_be16, uint16_t, be16toh)
CURSOR_GET(get_be32, uint32_t, be32toh)
CURSOR_GET(get_be64, uint64_t, be64toh)
CURSOR_GET(get_le16, uint16_t, le16toh)
CURSOR_GET(get_le32, uint32_t, le32toh)
CURSOR_GET(get_le64, uint64_t, le64toh)
#undef CURSOR_GET

struct out_cursor {
    uint8_t *at;
    uint8_t *end;
    bool overrun;
};

static inline struct out_cursor out_cursor_over(void *buf, size_t length)
{
    return (struct out_cursor){.at = buf, .end = (uint8_t *)buf + length};
}

static inline void put_bytes(struct out_cursor *c, const void *bytes, size_t n)
{
    if (c->overrun || (size_t)(c->end - c->at) < n) {
        c->overrun = true;
        return;
    }
    memcpy(c->at, bytes, n);
    c->at += n;
}

#define CURSOR_PUT(name, type, convert)                                                            \
    static inline void name(struct out_cursor *c, type v)                                          \
    {                                                                                              \
        v = convert(v);                                                                            \
        put_bytes(c, &v, sizeof v);                                                                \
    }
CURSOR_PUT(put_u8, uint8_t, )
CURSOR_PUT(put_be16, uint16_t, htobe16)
CURSOR_PUT(put_be32, uint32_t, htobe32)
CURSOR_PUT(put_be64, uint64_t, htobe64)
CURSOR_PUT(put_le16, uint16_t, htole16)
CURSOR_PUT(put_le32, uint32_t, htole32)
CURSOR_PUT(put_le64, uint64_t, htole64)
#undef CURSOR_PUT
