/* Modified UTF-8: as UTF-8, but U+0000 is C0 80, so that it fits into a C string. */
#pragma once

#include "base/macros.h"

/* The character at S, which has N bytes; *LENGTH is how many it takes. -1 when it is none
 * (overlong, a surrogate, a noncharacter, cut short); *LENGTH is then what to skip. */
int32_t utf8_decode(const char *s, size_t n, size_t *length);
/* Writes CODE into BUF and returns how many bytes; 0 when it is no character. */
size_t utf8_encode(char buf[4], int32_t code);
