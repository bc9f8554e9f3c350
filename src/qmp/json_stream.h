/* A stream of bytes as JSON messages, as QMP's clients send them.
 *
 * Messages follow each other with or without white space between them. Beyond RFC 8259: strings in
 * single quotes, \' in strings. Integers to 2^64-1 and from -2^63 are exact, others are
 * doubles. A message has at most 64 MiB and 1,024 levels; one that is wrong gives an error in
 * QEMU's words and the stream goes on after it: after a byte that nothing can begin with, at
 * the next bracket, brace, comma, colon or control character, or after 0xFF. */
#pragma once

#include "base/error.h"
#include "base/json.h"

enum {
    JSON_MESSAGE_MAX = 64 << 20, /* bytes without white space */
    JSON_TOKENS_MAX = 2 << 20,
    JSON_DEPTH_MAX = 1024,
};

struct json_stream;

struct json_stream *json_stream_new(void);
void json_stream_free(struct json_stream *s);
DEFINE_CLEANUP(struct json_stream *, json_stream_free, json_stream_freep)

enum json_stream_result {
    JSON_STREAM_MORE,    /* all bytes are used up; there is no whole message yet */
    JSON_STREAM_MESSAGE, /* *VALUE, the caller's; a JSON null is NULL */
    JSON_STREAM_ERROR,   /* *ERR; go on */
};

/* Takes bytes from *BYTES, which moves on, until a message or a mistake is complete. */
enum json_stream_result json_stream_take(struct json_stream *s, const uint8_t **bytes,
                                         const uint8_t *end, struct json_object **value,
                                         struct error *err);
/* The stream is over: what is still incomplete is a mistake or, at the top, a number. */
enum json_stream_result json_stream_end(struct json_stream *s, struct json_object **value,
                                        struct error *err);

/* TEXT is one JSON value: an option of the command line. */
int json_from_text(const char *text, struct json_object **ret, struct error *err);
