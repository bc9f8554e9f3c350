#include "qmp/unicode.h"

static bool character(int32_t code)
{
    if (code < 0 || code > 0x10ffff)
        return false;
    if (code >= 0xd800 && code <= 0xdfff)
        return false; /* surrogates */
    return !(code >= 0xfdd0 && code <= 0xfdef) && (code & 0xfffe) != 0xfffe;
}

int32_t utf8_decode(const char *s, size_t n, size_t *length)
{
    static const int32_t least[] = {0, 0, 0x80, 0x800, 0x10000, 0x200000, 0x4000000};
    unsigned char first = n ? (unsigned char)s[0] : 0;
    size_t bytes = 1;

    *length = n ? 1 : 0;
    if (!first)
        return -1;
    if (first < 0x80)
        return first;
    if (first < 0xc0 || first >= 0xfe)
        return -1;
    while (first & (0x80 >> bytes))
        bytes++;
    uint32_t code = first & (0x7fu >> bytes);
    for (; *length < bytes; ++*length) {
        if (*length >= n || ((unsigned char)s[*length] & 0xc0) != 0x80)
            return -1;
        code = code << 6 | ((unsigned char)s[*length] & 0x3f);
    }
    if (!character((int32_t)code))
        return -1;
    if ((int32_t)code < least[bytes] && !(code == 0 && bytes == 2))
        return -1;
    return (int32_t)code;
}

size_t utf8_encode(char buf[4], int32_t code)
{
    uint32_t c = (uint32_t)code;

    if (!character(code))
        return 0;
    if (c && c < 0x80) {
        buf[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        buf[0] = (char)(0xc0 | c >> 6);
        buf[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        buf[0] = (char)(0xe0 | c >> 12);
        buf[1] = (char)(0x80 | (c >> 6 & 0x3f));
        buf[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    buf[0] = (char)(0xf0 | c >> 18);
    buf[1] = (char)(0x80 | (c >> 12 & 0x3f));
    buf[2] = (char)(0x80 | (c >> 6 & 0x3f));
    buf[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}
