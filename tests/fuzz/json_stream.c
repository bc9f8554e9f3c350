/* QMP's input. Fed whole and byte by byte, a stream must give the same messages and mistakes, and
 * what a message is written as must be read as the same again. */
#include "qmp/json_stream.h"
#include "qmp/json_write.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Appends what the next messages of S are, as text. */
static void tell(struct json_stream *s, const uint8_t *p, const uint8_t *end, struct buffer *out)
{
    for (;;) {
        struct json_object *value = NULL;
        struct error err = ERROR_INIT;
        enum json_stream_result r = json_stream_take(s, &p, end, &value, &err);

        if (r == JSON_STREAM_MORE)
            return;
        if (r == JSON_STREAM_ERROR) {
            buffer_printf(out, "%s\n", err.text);
            continue;
        }
        size_t before = out->length;
        if (json_write(out, value, 0) < 0)
            abort();
        json_object_put(value);
        buffer_append(out, "", 1);
        char *text = (char *)out->data + before;
        struct json_object *again = NULL;
        struct buffer second = {0};
        /* an infinite double is written as a number that is read as one */
        if (json_from_text(text, &again, &err) < 0 || json_write(&second, again, 0) < 0)
            abort();
        if (second.length != out->length - before - 1 || memcmp(second.data, text, second.length))
            abort();
        buffer_fini(&second);
        json_object_put(again);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct json_stream *whole = json_stream_new(), *bytes = json_stream_new();
    struct buffer a = {0}, b = {0};

    tell(whole, data, data + size, &a);
    for (size_t i = 0; i < size; i++)
        tell(bytes, data + i, data + i + 1, &b);
    if (a.length != b.length || (a.length && memcmp(a.data, b.data, a.length)))
        abort();
    buffer_fini(&a);
    buffer_fini(&b);
    json_stream_free(whole);
    json_stream_free(bytes);
    return 0;
}
