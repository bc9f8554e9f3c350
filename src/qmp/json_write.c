/* Walks the tree without recursion: a message may be 1,024 levels deep, and a task's stack is
 * small. */
#include "qmp/json_write.h"

#include "qmp/json_stream.h"
#include "qmp/unicode.h"

#include <stdio.h>

#include <math.h>

/* A container that is being written, and what comes next in it. */
struct open {
    struct json_object *container;
    struct lh_entry *member; /* of an object; NULL: at its end */
    size_t index;            /* of an array */
    bool begun;              /* a comma comes before the next */
};

struct writer {
    struct buffer *to;
    bool pretty;
    unsigned depth, capacity;
    struct open *stack;
    bool short_of_memory;
};

static void put(struct writer *w, const char *text, size_t n)
{
    if (buffer_append(w->to, text, n) < 0)
        w->short_of_memory = true;
}

static void put_text(struct writer *w, const char *text)
{
    put(w, text, strlen(text));
}

static void put_string(struct writer *w, const char *s, size_t n)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";

    put(w, "\"", 1);
    while (n) {
        char text[16];
        size_t length, used = 1;
        int32_t code = utf8_decode(s, n, &used);
        const char *at = code > 0 && code < 0x80 ? strchr(from, code) : NULL;

        if (code < 0)
            code = *s ? 0xfffd : 0; /* the replacement character; json-c may hold a real NUL */
        if (at) {
            text[0] = '\\';
            text[1] = to[at - from];
            length = 2;
        } else if (code > 0xffff) {
            length = (size_t)snprintf(text, sizeof text, "\\u%04X\\u%04X",
                                      0xd800 + ((unsigned)(code - 0x10000) >> 10),
                                      0xdc00 + ((unsigned)(code - 0x10000) & 0x3ff));
        } else if (code < 0x20 || code >= 0x7f) {
            length = (size_t)snprintf(text, sizeof text, "\\u%04X", (unsigned)code);
        } else {
            text[0] = (char)code;
            length = 1;
        }
        put(w, text, length);
        s += used;
        n -= used;
    }
    put(w, "\"", 1);
}

static void put_scalar(struct writer *w, struct json_object *value)
{
    char text[64];

    switch (json_object_get_type(value)) {
    case json_type_null:
        put_text(w, "null");
        return;
    case json_type_boolean:
        put_text(w, json_object_get_boolean(value) ? "true" : "false");
        return;
    case json_type_string:
        put_string(w, json_object_get_string(value), (size_t)json_object_get_string_len(value));
        return;
    case json_type_int:
        if (json_object_get_int64(value) < 0)
            snprintf(text, sizeof text, "%lld", (long long)json_object_get_int64(value));
        else
            snprintf(text, sizeof text, "%llu", (unsigned long long)json_object_get_uint64(value));
        break;
    default: {
        double v = json_object_get_double(value);
        if (isfinite(v))
            snprintf(text, sizeof text, "%.17g", v);
        else
            snprintf(text, sizeof text, "%s1e999", v < 0 ? "-" : ""); /* JSON has no infinity */
        break;
    }
    }
    put_text(w, text);
}

static void new_line(struct writer *w)
{
    if (!w->pretty)
        return;
    put_text(w, "\r\n");
    for (unsigned i = 0; i < w->depth; i++)
        put_text(w, "    ");
}

static bool is_container(struct json_object *value)
{
    return json_object_is_type(value, json_type_object) ||
           json_object_is_type(value, json_type_array);
}

static void enter(struct writer *w, struct json_object *value)
{
    bool object = json_object_is_type(value, json_type_object);

    put_text(w, object ? "{" : "[");
    if (w->depth == w->capacity) {
        unsigned capacity = w->capacity ? 2 * w->capacity : 16;
        struct open *stack = reallocarray(w->stack, capacity, sizeof *stack);
        if (!stack) {
            w->short_of_memory = true;
            return;
        }
        w->stack = stack;
        w->capacity = capacity;
    }
    w->stack[w->depth++] = (struct open){
        .container = value,
        .member = object ? json_object_get_object(value)->head : NULL,
    };
}

/* One step in the innermost container. */
static void advance(struct writer *w)
{
    struct open *o = &w->stack[w->depth - 1];
    bool object = json_object_is_type(o->container, json_type_object);
    bool end = object ? !o->member : o->index >= json_object_array_length(o->container);
    struct json_object *value;

    if (end) {
        w->depth--;
        new_line(w);
        put_text(w, object ? "}" : "]");
        return;
    }
    if (o->begun)
        put_text(w, w->pretty ? "," : ", ");
    o->begun = true;
    new_line(w);
    if (object) {
        const char *key = lh_entry_k(o->member);
        value = (struct json_object *)(uintptr_t)lh_entry_v(o->member);
        o->member = o->member->next;
        put_string(w, key, strlen(key));
        put_text(w, ": ");
    } else {
        value = json_object_array_get_idx(o->container, o->index++);
    }
    if (is_container(value))
        enter(w, value);
    else
        put_scalar(w, value);
}

int json_write(struct buffer *to, struct json_object *value, unsigned flags)
{
    struct writer w = {.to = to, .pretty = flags & JSON_WRITE_PRETTY};
    size_t before = to->length;

    if (is_container(value))
        enter(&w, value);
    else
        put_scalar(&w, value);
    while (w.depth && !w.short_of_memory)
        advance(&w);
    free(w.stack);
    if (!w.short_of_memory)
        return 0;
    to->length = before;
    return -ENOMEM;
}
