/* JSON text as QEMU writes it: ASCII only (\uXXXX), a space after comma and colon. */
#pragma once

#include "base/buffer.h"
#include "base/json.h"

enum { JSON_WRITE_PRETTY = 1 }; /* members on lines of their own, four blanks deep, CRLF */

/* Appends VALUE's text. -ENOMEM when memory is short, and then TO is as before. */
int json_write(struct buffer *to, struct json_object *value, unsigned flags) MUST_CHECK;
