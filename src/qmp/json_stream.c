/* Three steps, a byte at a time:
 *
 *     bytes --lexer--> tokens --grammar--> strict JSON --json-c--> tree
 *
 * json-c's tokener alone is not enough: without JSON_TOKENER_STRICT it takes comments, NaN, TRUE
 * and trailing commas, with it no single quotes; it rounds big integers to the nearest it has,
 * replaces duplicate keys silently, cuts a name at \u0000, and its errors are not those that QMP's
 * clients know. So the lexer and the grammar here decide what is right and write it down again in
 * the one form that json-c cannot misunderstand; json-c builds the tree of it, incrementally, when
 * the message is complete.
 *
 * Where a message ends is decided as QEMU decides it: when no brace and no bracket is open, or
 * one was closed too often. A mistake of grammar is told there, and only the first. A byte that
 * fits no token ends the message at once; what follows is skipped up to a likely beginning. */
#include "qmp/json_stream.h"

#include "base/buffer.h"
#include "qmp/unicode.h"

#include <stdio.h>

enum lexer {
    LEX_START,
    LEX_STRING,
    LEX_STRING_ESCAPE,
    LEX_MINUS,
    LEX_ZERO,
    LEX_DIGITS,
    LEX_POINT,
    LEX_FRACTION,
    LEX_EXPONENT,
    LEX_EXPONENT_SIGN,
    LEX_EXPONENT_DIGITS,
    LEX_WORD,
    LEX_SKIP, /* after a mistake */
};

enum token { TOKEN_PUNCTUATION, TOKEN_STRING, TOKEN_INTEGER, TOKEN_FLOAT, TOKEN_WORD };

/* What the grammar waits for. */
enum expect {
    EXPECT_VALUE,
    EXPECT_VALUE_OR_BRACKET, /* after [ */
    EXPECT_KEY_OR_BRACE,     /* after { */
    EXPECT_KEY,              /* after a comma in an object */
    EXPECT_COLON,
    EXPECT_COMMA_OR_BRACE,
    EXPECT_COMMA_OR_BRACKET,
    EXPECT_NOTHING, /* the value is complete */
};

struct level {
    char bracket; /* '{' or '[' */
    bool is_key;  /* this container stands where a key should */
};

struct json_stream {
    enum lexer lexer;
    char quote;
    struct buffer token;  /* the token's bytes so far */
    struct buffer strict; /* the message so far */
    size_t message_bytes, message_tokens;
    size_t keys;
    long braces, brackets; /* open ones; below 0: closed too often */
    enum expect expect;
    struct level levels[JSON_DEPTH_MAX];
    unsigned depth;
    bool wrong; /* the first mistake of grammar is in: */
    struct error error;
    struct json_tokener *tokener;
};

static void message_reset(struct json_stream *s)
{
    if (s->strict.capacity > MiB)
        buffer_fini(&s->strict);
    s->strict.length = 0;
    s->message_bytes = s->message_tokens = s->keys = 0;
    s->braces = s->brackets = 0;
    s->expect = EXPECT_VALUE;
    s->depth = 0;
    s->wrong = false;
    error_clear(&s->error);
}

static void token_reset(struct json_stream *s)
{
    if (s->token.capacity > MiB)
        buffer_fini(&s->token);
    s->token.length = 0;
}

struct json_stream *json_stream_new(void)
{
    struct json_stream *s = xnew(struct json_stream);

    s->tokener = json_tokener_new_ex(JSON_DEPTH_MAX + 1);
    if (!s->tokener)
        abort();
    json_tokener_set_flags(s->tokener, JSON_TOKENER_STRICT);
    message_reset(s);
    return s;
}

void json_stream_free(struct json_stream *s)
{
    json_tokener_free(s->tokener);
    buffer_fini(&s->token);
    buffer_fini(&s->strict);
    free(s);
}

/* ---- grammar ---- */

static void mistake(struct json_stream *s, const char *what)
{
    if (!s->wrong)
        error_set(&s->error, EINVAL, "JSON parse error, %s", what);
    s->wrong = true;
}

static void emit(struct json_stream *s, const void *bytes, size_t n)
{
    if (!s->wrong && buffer_append(&s->strict, bytes, n) < 0) {
        s->wrong = true;
        error_set(&s->error, ENOMEM, "JSON message: out of memory");
    }
}

/* A value is complete where one was expected. */
static void value_done(struct json_stream *s, bool is_string)
{
    switch (s->expect) {
    case EXPECT_KEY:
    case EXPECT_KEY_OR_BRACE:
        if (!is_string)
            mistake(s, "key is not a string in object");
        s->keys++;
        s->expect = EXPECT_COLON;
        break;
    default:
        if (!s->depth)
            s->expect = EXPECT_NOTHING;
        else
            s->expect = s->levels[s->depth - 1].bracket == '{' ? EXPECT_COMMA_OR_BRACE
                                                               : EXPECT_COMMA_OR_BRACKET;
        break;
    }
}

static bool value_expected(struct json_stream *s)
{
    switch (s->expect) {
    case EXPECT_VALUE:
    case EXPECT_VALUE_OR_BRACKET:
    case EXPECT_KEY:
    case EXPECT_KEY_OR_BRACE:
        return true;
    case EXPECT_COLON:
        mistake(s, "missing : in object pair");
        return false;
    case EXPECT_COMMA_OR_BRACE:
        mistake(s, "expected separator in dict");
        return false;
    default:
        mistake(s, "expected separator in list");
        return false;
    }
}

static void open_container(struct json_stream *s, char bracket)
{
    if (!value_expected(s))
        return;
    s->levels[s->depth].bracket = bracket;
    s->levels[s->depth].is_key = s->expect == EXPECT_KEY || s->expect == EXPECT_KEY_OR_BRACE;
    s->depth++;
    s->expect = bracket == '{' ? EXPECT_KEY_OR_BRACE : EXPECT_VALUE_OR_BRACKET;
    emit(s, &bracket, 1);
}

static void close_container(struct json_stream *s, char bracket)
{
    bool fits = bracket == '}'
                    ? s->expect == EXPECT_KEY_OR_BRACE || s->expect == EXPECT_COMMA_OR_BRACE
                    : s->expect == EXPECT_VALUE_OR_BRACKET || s->expect == EXPECT_COMMA_OR_BRACKET;

    if (!fits) {
        if (value_expected(s))
            mistake(s, "expecting value");
        return;
    }
    emit(s, &bracket, 1);
    s->depth--;
    s->expect = s->levels[s->depth].is_key ? EXPECT_KEY : EXPECT_VALUE;
    value_done(s, false);
}

static void separator(struct json_stream *s, char c)
{
    if (c == ':' && s->expect == EXPECT_COLON) {
        s->expect = EXPECT_VALUE;
    } else if (c == ',' && s->expect == EXPECT_COMMA_OR_BRACE) {
        s->expect = EXPECT_KEY;
    } else if (c == ',' && s->expect == EXPECT_COMMA_OR_BRACKET) {
        s->expect = EXPECT_VALUE;
    } else {
        if (value_expected(s))
            mistake(s, "expecting value");
        return;
    }
    emit(s, &c, 1);
}

/* ---- tokens ---- */

static int hex4(const char *p, const char *end)
{
    int code = 0;

    for (int i = 0; i < 4; i++, p++) {
        static const char digits[] = "00112233445566778899aAbBcCdDeEfF";
        const char *at = p < end && *p ? strchr(digits, *p) : NULL;
        if (!at)
            return -1;
        code = code << 4 | (int)((at - digits) / 2);
    }
    return code;
}

/* One \ sequence of a string, behind the backslash at *P; the character, or -1 with a mistake. */
static int32_t unescape(struct json_stream *s, const char **p, const char *end)
{
    static const char from[] = "\"'\\/bfnrt", to[] = "\"'\\/\b\f\n\r\t";
    const char *begin = *p - 1;
    char c = *(*p)++;
    const char *at = c ? strchr(from, c) : NULL;

    if (at)
        return to[at - from];
    if (c != 'u') {
        mistake(s, "invalid escape sequence in string");
        return -1;
    }
    int32_t code = hex4(*p, end);
    const char *after = *p + 4 < end + 1 ? *p + 4 : end + 1; /* the quote is there */
    if (code >= 0xd800 && code <= 0xdbff && end - after >= 2 && after[0] == '\\' &&
        after[1] == 'u') {
        int32_t low = hex4(after + 2, end);
        if (low >= 0xdc00 && low <= 0xdfff) {
            code = 0x10000 + ((code & 0x3ff) << 10 | (low & 0x3ff));
            after += 6;
        }
    }
    char utf8[4];
    if (!utf8_encode(utf8, code)) {
        char text[64];
        snprintf(text, sizeof text, "%.*s is not a valid Unicode character", (int)(after - begin),
                 begin);
        mistake(s, text);
        return -1;
    }
    *p = after;
    return code;
}

static void string_token(struct json_stream *s)
{
    const char *p = (const char *)s->token.data + 1;
    const char *end = p + s->token.length - 2;

    if (!value_expected(s))
        return;
    emit(s, "\"", 1);
    while (p < end && !s->wrong) {
        char utf8[8];
        size_t n;
        int32_t code;

        if (*p == '\\') {
            p++;
            code = unescape(s, &p, end);
        } else {
            code = utf8_decode(p, (size_t)(end - p), &n);
            p += n;
            if (code < 0)
                mistake(s, "invalid UTF-8 sequence in string");
        }
        if (code < 0)
            return;
        if (code == '"' || code == '\\') {
            utf8[0] = '\\';
            utf8[1] = (char)code;
            n = 2;
        } else if (code && code < 0x20) {
            n = (size_t)snprintf(utf8, sizeof utf8, "\\u%04x", (unsigned)code);
        } else {
            n = utf8_encode(utf8, code);
        }
        emit(s, utf8, n);
    }
    emit(s, "\"", 1);
    value_done(s, true);
}

static void number_token(struct json_stream *s, bool integer)
{
    const char *text = (const char *)s->token.data; /* ends with a NUL beyond its length */

    if (!value_expected(s))
        return;
    emit(s, text, s->token.length);
    if (integer) {
        /* What fits neither int64 nor uint64 becomes a double, as in QEMU. */
        errno = 0;
        if (*text == '-')
            (void)!strtoll(text, NULL, 10);
        else
            (void)!strtoull(text, NULL, 10);
        if (errno == ERANGE)
            emit(s, ".0", 2);
    }
    value_done(s, false);
}

static void word_token(struct json_stream *s)
{
    const char *word = (const char *)s->token.data;

    if (!value_expected(s))
        return;
    if (strcmp(word, "true") && strcmp(word, "false") && strcmp(word, "null")) {
        char text[1024];
        snprintf(text, sizeof text, "invalid keyword '%s'", word);
        mistake(s, text);
        return;
    }
    emit(s, word, s->token.length);
    value_done(s, false);
}

static size_t count_members(struct json_object *value)
{
    size_t n = 0;

    if (json_object_is_type(value, json_type_object)) {
        json_object_object_foreach(value, key, member)
        {
            (void)key;
            n += 1 + count_members(member);
        }
    } else if (json_object_is_type(value, json_type_array)) {
        size_t length = json_object_array_length(value);
        for (size_t i = 0; i < length; i++)
            n += count_members(json_object_array_get_idx(value, i));
    }
    return n;
}

/* The message is complete, rightly or wrongly. */
static enum json_stream_result message_done(struct json_stream *s, struct json_object **value,
                                            struct error *err)
{
    enum json_stream_result result = JSON_STREAM_ERROR;

    if (!s->wrong && s->expect != EXPECT_NOTHING)
        mistake(s, "premature EOI");
    if (!s->wrong) {
        json_tokener_reset(s->tokener);
        emit(s, "", 1); /* ends a number at the top */
        struct json_object *tree =
            json_tokener_parse_ex(s->tokener, (const char *)s->strict.data, (int)s->strict.length);
        if (json_tokener_get_error(s->tokener) != json_tokener_success) {
            mistake(s, json_tokener_error_desc(json_tokener_get_error(s->tokener)));
        } else if (count_members(tree) != s->keys) {
            mistake(s, "duplicate key");
            json_object_put(tree);
        } else {
            *value = tree;
            result = JSON_STREAM_MESSAGE;
        }
    }
    if (result == JSON_STREAM_ERROR)
        *err = s->error;
    message_reset(s);
    return result;
}

static enum json_stream_result fail(struct json_stream *s, const char *text, struct error *err)
{
    error_set(err, EINVAL, "%s", text);
    message_reset(s);
    return JSON_STREAM_ERROR;
}

/* A whole token has been read. */
static enum json_stream_result token_done(struct json_stream *s, enum token token,
                                          struct json_object **value, struct error *err)
{
    char c = token == TOKEN_PUNCTUATION ? (char)s->token.data[0] : 0;

    s->braces += (c == '{') - (c == '}');
    s->brackets += (c == '[') - (c == ']');
    if (s->message_bytes + s->token.length + 1 > JSON_MESSAGE_MAX)
        return fail(s, "JSON token size limit exceeded", err);
    if (s->message_tokens + 1 > JSON_TOKENS_MAX)
        return fail(s, "JSON token count limit exceeded", err);
    if (s->braces + s->brackets > JSON_DEPTH_MAX)
        return fail(s, "JSON nesting depth limit exceeded", err);
    s->message_bytes += s->token.length;
    s->message_tokens++;

    if (!s->wrong) {
        if (token == TOKEN_STRING)
            string_token(s);
        else if (token == TOKEN_WORD)
            word_token(s);
        else if (token == TOKEN_INTEGER || token == TOKEN_FLOAT)
            number_token(s, token == TOKEN_INTEGER);
        else if (c == '{' || c == '[')
            open_container(s, c);
        else if (c == '}' || c == ']')
            close_container(s, c);
        else
            separator(s, c);
    }
    if ((s->braces > 0 || s->brackets > 0) && s->braces >= 0 && s->brackets >= 0)
        return JSON_STREAM_MORE;
    return message_done(s, value, err);
}

/* ---- lexer ---- */

static bool digit(uint8_t c)
{
    return c >= '0' && c <= '9';
}

static bool in_string(uint8_t c)
{
    return c >= 0x20 && c < 0xfe;
}

/* A token goes on with this byte, ends with it, ends before it, or cannot be. */
enum step { STEP_ON, STEP_LAST, STEP_BEFORE, STEP_WRONG };

static enum step step(struct json_stream *s, uint8_t c, enum token *token)
{
    enum lexer next;

    switch (s->lexer) {
    case LEX_STRING:
        if (c == (uint8_t)s->quote) {
            *token = TOKEN_STRING;
            return STEP_LAST;
        }
        if (!in_string(c))
            return STEP_WRONG;
        next = c == '\\' ? LEX_STRING_ESCAPE : LEX_STRING;
        break;
    case LEX_STRING_ESCAPE:
        if (!in_string(c))
            return STEP_WRONG;
        next = LEX_STRING;
        break;
    case LEX_MINUS:
        if (!digit(c))
            return STEP_WRONG;
        next = c == '0' ? LEX_ZERO : LEX_DIGITS;
        break;
    case LEX_ZERO:
    case LEX_DIGITS:
        if (s->lexer == LEX_ZERO && digit(c))
            return STEP_WRONG;
        if (digit(c)) {
            next = LEX_DIGITS;
        } else if (c == '.') {
            next = LEX_POINT;
        } else if (s->lexer == LEX_DIGITS && (c == 'e' || c == 'E')) {
            next = LEX_EXPONENT;
        } else {
            *token = TOKEN_INTEGER;
            return STEP_BEFORE;
        }
        break;
    case LEX_POINT:
        if (!digit(c))
            return STEP_WRONG;
        next = LEX_FRACTION;
        break;
    case LEX_FRACTION:
        if (digit(c)) {
            next = LEX_FRACTION;
        } else if (c == 'e' || c == 'E') {
            next = LEX_EXPONENT;
        } else {
            *token = TOKEN_FLOAT;
            return STEP_BEFORE;
        }
        break;
    case LEX_EXPONENT:
    case LEX_EXPONENT_SIGN:
        if (digit(c))
            next = LEX_EXPONENT_DIGITS;
        else if (s->lexer == LEX_EXPONENT && (c == '+' || c == '-'))
            next = LEX_EXPONENT_SIGN;
        else
            return STEP_WRONG;
        break;
    case LEX_EXPONENT_DIGITS:
        if (!digit(c)) {
            *token = TOKEN_FLOAT;
            return STEP_BEFORE;
        }
        next = LEX_EXPONENT_DIGITS;
        break;
    case LEX_WORD:
        if (c < 'a' || c > 'z') {
            *token = TOKEN_WORD;
            return STEP_BEFORE;
        }
        next = LEX_WORD;
        break;
    default: /* LEX_START */
        if (c == '"' || c == '\'') {
            s->quote = (char)c;
            next = LEX_STRING;
        } else if (c == '-') {
            next = LEX_MINUS;
        } else if (digit(c)) {
            next = c == '0' ? LEX_ZERO : LEX_DIGITS;
        } else if (c >= 'a' && c <= 'z') {
            next = LEX_WORD;
        } else if (c && strchr("{}[],:", c)) {
            *token = TOKEN_PUNCTUATION;
            return STEP_LAST;
        } else {
            return STEP_WRONG;
        }
        break;
    }
    s->lexer = next;
    return STEP_ON;
}

/* After a mistake: is C where reading may begin anew? */
static bool resynchronises(uint8_t c)
{
    return (c < 0x20 && c != '\t') || c >= 0xfe || (c && strchr("{}[],:", c));
}

static bool token_add(struct json_stream *s, uint8_t c)
{
    /* always with a NUL behind it, which is not counted */
    uint8_t *to = buffer_reserve(&s->token, 2);
    if (!to || s->token.length + 1 > JSON_MESSAGE_MAX)
        return false;
    to[0] = c;
    to[1] = '\0';
    s->token.length++;
    return true;
}

static enum json_stream_result stray(struct json_stream *s, struct error *err)
{
    error_set(err, EINVAL, "JSON parse error, stray '%s'",
              s->token.length ? (char *)s->token.data : "");
    token_reset(s);
    message_reset(s);
    s->lexer = LEX_SKIP;
    return JSON_STREAM_ERROR;
}

enum json_stream_result json_stream_take(struct json_stream *s, const uint8_t **bytes,
                                         const uint8_t *end, struct json_object **value,
                                         struct error *err)
{
    while (*bytes < end) {
        enum token token = TOKEN_PUNCTUATION;
        uint8_t c = **bytes;

        if (s->lexer == LEX_SKIP) {
            if (resynchronises(c))
                s->lexer = LEX_START;
            else
                ++*bytes;
            continue;
        }
        if (s->lexer == LEX_START && c && strchr(" \t\r\n", c)) {
            ++*bytes;
            continue;
        }
        enum step how = step(s, c, &token);
        if (how != STEP_BEFORE) {
            ++*bytes;
            if (!token_add(s, c)) {
                token_reset(s);
                s->lexer = LEX_SKIP;
                return fail(s, "JSON token size limit exceeded", err);
            }
        }
        if (how == STEP_WRONG)
            return stray(s, err);
        if (how == STEP_ON)
            continue;
        s->lexer = LEX_START;
        enum json_stream_result result = token_done(s, token, value, err);
        token_reset(s);
        if (result != JSON_STREAM_MORE)
            return result;
    }
    return JSON_STREAM_MORE;
}

enum json_stream_result json_stream_end(struct json_stream *s, struct json_object **value,
                                        struct error *err)
{
    enum json_stream_result result = JSON_STREAM_MORE;
    enum token token = TOKEN_PUNCTUATION;

    if (s->lexer == LEX_SKIP) {
        s->lexer = LEX_START;
    } else if (s->lexer != LEX_START) {
        if (step(s, 0, &token) == STEP_WRONG)
            return stray(s, err);
        s->lexer = LEX_START;
        result = token_done(s, token, value, err);
        token_reset(s);
    }
    if (result != JSON_STREAM_MORE || !s->message_tokens)
        return result;
    return message_done(s, value, err);
}

int json_from_text(const char *text, struct json_object **ret, struct error *err)
{
    CLEANUP(json_stream_freep) struct json_stream *s = json_stream_new();
    const uint8_t *p = (const uint8_t *)text, *end = p + strlen(text);
    CLEANUP(json_putp) struct json_object *first = NULL;
    struct error first_error = ERROR_INIT;
    enum json_stream_result result;
    bool any = false;

    do {
        struct json_object *value = NULL;
        struct error one = ERROR_INIT;

        result = json_stream_take(s, &p, end, &value, &one);
        if (result == JSON_STREAM_MORE)
            result = json_stream_end(s, &value, &one);
        if (result == JSON_STREAM_MORE)
            break;
        if (any && !first_error.code) {
            json_object_put(value);
            return error_set(err, EINVAL, "Expecting at most one JSON value");
        }
        if (result == JSON_STREAM_ERROR && !any)
            first_error = one;
        if (any)
            json_object_put(value);
        else
            first = value;
        any = true;
    } while (true);
    if (first_error.code)
        return error_set(err, EINVAL, "%s", first_error.text);
    if (!any)
        return error_set(err, EINVAL, "Expecting a JSON value");
    *ret = steal(first);
    return 0;
}
