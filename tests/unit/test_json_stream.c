/* Messages out of bytes, and back into bytes. The answers are qemu-storage-daemon 7.2's. */
#include "qmp/json_stream.h"
#include "qmp/json_write.h"
#include "unit.h"

/* Everything that INPUT is, one line each, as it would be written. */
static void tell(const char *input, size_t length, struct buffer *out)
{
    CLEANUP(json_stream_freep) struct json_stream *s = json_stream_new();
    const uint8_t *p = (const uint8_t *)input, *end = p + length;

    for (;;) {
        CLEANUP(json_putp) struct json_object *value = NULL;
        struct error err = ERROR_INIT;
        enum json_stream_result r = json_stream_take(s, &p, end, &value, &err);

        if (r == JSON_STREAM_MORE)
            break;
        if (r == JSON_STREAM_ERROR)
            assert_int_equal(buffer_append(out, err.text, strlen(err.text)), 0);
        else
            assert_int_equal(json_write(out, value, 0), 0);
        assert_int_equal(buffer_append(out, "\n", 1), 0);
    }
    assert_int_equal(buffer_append(out, "", 1), 0);
}

static void check(const char *input, const char *expected)
{
    struct buffer out = {0};

    tell(input, strlen(input), &out);
    if (strcmp((char *)out.data, expected))
        fail_msg("%s\ngave %s\nnot  %s", input, (char *)out.data, expected);
    buffer_fini(&out);
}

static void messages_need_nothing_between_them(void **state)
{
    check("{}{\"a\":1}[2]3 \"x\"true ", "{}\n{\"a\": 1}\n[2]\n3\n\"x\"\ntrue\n");
    check("  {'a'\t:\r\n'b'}\n", "{\"a\": \"b\"}\n");
    check("{\"a\":", "");
}

static void numbers_are_exact_as_far_as_they_go(void **state)
{
    check("[18446744073709551615,-9223372036854775808,-0,0]",
          "[18446744073709551615, -9223372036854775808, 0, 0]\n");
    check("[18446744073709551616,-9223372036854775809]",
          "[1.8446744073709552e+19, -9.2233720368547758e+18]\n");
    check("[1.0,2.5e3,1E-3]", "[1, 2500, 0.001]\n");
}

static void strings_come_back_as_ascii(void **state)
{
    check("['\\'\"','\\u00e9\xc3\xa9','\\ud83d\\ude00','\\u0000x','\\n\\/\x7f']",
          "[\"'\\\"\", \"\\u00E9\\u00E9\", \"\\uD83D\\uDE00\", \"\\u0000x\", \"\\n/\\u007F\"]\n");
}

static void mistakes_are_told_in_qemus_words(void **state)
{
    check("{\"a\" 1}", "JSON parse error, missing : in object pair\n");
    check("{\"a\":1 2}", "JSON parse error, expected separator in dict\n");
    check("[1 2]", "JSON parse error, expected separator in list\n");
    check("[1,]", "JSON parse error, expecting value\n");
    check("{\"a\":1,}", "JSON parse error, expecting value\n");
    check("{1:2}", "JSON parse error, key is not a string in object\n");
    check("{[1]:2}", "JSON parse error, key is not a string in object\n");
    check("{\"a\":1,\"a\":2}", "JSON parse error, duplicate key\n");
    check("[tru]", "JSON parse error, invalid keyword 'tru'\n");
    check("}", "JSON parse error, expecting value\n");
    check("[\"\\x\"]", "JSON parse error, invalid escape sequence in string\n");
    check("[\"\\ud800\"]", "JSON parse error, \\ud800 is not a valid Unicode character\n");
    check("[\"\xc0\xaf\"]", "JSON parse error, invalid UTF-8 sequence in string\n");
    check("[01]", "JSON parse error, stray '01'\nJSON parse error, expecting value\n");
    check("// x\n[]", "JSON parse error, stray '/'\n[]\n");
    check("[NaN]", "JSON parse error, stray 'N'\nJSON parse error, expecting value\n");
}

static void after_a_mistake_the_stream_goes_on(void **state)
{
    check("{\"a\n{}", "JSON parse error, stray '\"a\n'\n{}\n");
    check("{\"a\":[1,\xff{}", "JSON parse error, stray '\xff'\n{}\n");
    check("{\"a\" 1}{}", "JSON parse error, missing : in object pair\n{}\n");
}

static void messages_have_limits(void **state)
{
    struct buffer in = {0}, out = {0};

    for (int i = 0; i < JSON_DEPTH_MAX; i++)
        buffer_append(&in, "[", 1);
    for (int i = 0; i < JSON_DEPTH_MAX; i++)
        buffer_append(&in, "]", 1);
    tell((char *)in.data, in.length, &out);
    assert_int_equal(out.length, 2 * JSON_DEPTH_MAX + 2);
    in.length = out.length = 0;

    for (int i = 0; i <= JSON_DEPTH_MAX; i++)
        buffer_append(&in, "[", 1);
    tell((char *)in.data, in.length, &out);
    assert_string_equal(out.data, "JSON nesting depth limit exceeded\n");
    in.length = out.length = 0;

    size_t n = JSON_MESSAGE_MAX + 10;
    memset(buffer_reserve(&in, n), 'a', n);
    in.data[0] = '"';
    in.data[n - 1] = '"';
    in.length = n;
    buffer_append(&in, "\n{}", 3);
    tell((char *)in.data, in.length, &out);
    assert_string_equal(out.data, "JSON token size limit exceeded\n{}\n");
    buffer_fini(&in);
    buffer_fini(&out);
}

static void an_option_is_one_value(void **state)
{
    static const struct {
        const char *text, *error;
    } options[] = {
        {"{}", NULL},
        {" 12", NULL},
        {"{", "JSON parse error, premature EOI"},
        {"{\"a", "JSON parse error, stray '\"a'"},
        {"", "Expecting a JSON value"},
        {"{}x", "Expecting at most one JSON value"},
        {"{\"a\":}", "JSON parse error, expecting value"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        CLEANUP(json_putp) struct json_object *value = NULL;
        struct error err = ERROR_INIT;
        int r = json_from_text(options[i].text, &value, &err);
        assert_int_equal(r, options[i].error ? -EINVAL : 0);
        assert_string_equal(err.text, options[i].error ? options[i].error : "");
    }
}

static void pretty_is_four_blanks_deep(void **state)
{
    CLEANUP(json_putp) struct json_object *value = NULL;
    struct error err = ERROR_INIT;
    struct buffer out = {0};

    assert_int_equal(json_from_text("{'a':[1,{}],'b':null}", &value, &err), 0);
    assert_int_equal(json_write(&out, value, JSON_WRITE_PRETTY), 0);
    buffer_append(&out, "", 1);
    assert_string_equal(out.data,
                        "{\r\n    \"a\": [\r\n        1,\r\n        {\r\n        }\r\n    "
                        "],\r\n    \"b\": null\r\n}");
    buffer_fini(&out);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(messages_need_nothing_between_them),
    cmocka_unit_test(numbers_are_exact_as_far_as_they_go),
    cmocka_unit_test(strings_come_back_as_ascii),
    cmocka_unit_test(mistakes_are_told_in_qemus_words),
    cmocka_unit_test(after_a_mistake_the_stream_goes_on),
    cmocka_unit_test(messages_have_limits),
    cmocka_unit_test(an_option_is_one_value),
    cmocka_unit_test(pretty_is_four_blanks_deep),
};
UNIT_MAIN(tests)
