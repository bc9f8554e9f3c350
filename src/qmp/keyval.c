/* Parsing goes in two passes: first every key fragment, number or name, is a member of an
 * object; when all are in, objects whose members are all numbers become arrays. */
#include "qmp/keyval.h"

#include "base/buffer.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>

enum { FRAGMENT_MAX = 127 };

/* How many bytes of S are a QAPI name (maybe with a downstream prefix __RFQDN_); 0: none. */
static size_t name_length(const char *s)
{
    const char *p = s;

    if (p[0] == '_') {
        if (p[1] != '_')
            return 0;
        p += 2;
        while (isalnum((unsigned char)*p) || *p == '-' || *p == '.')
            p++;
        if (*p++ != '_')
            return 0;
    }
    if (!isalpha((unsigned char)*p))
        return 0;
    while (isalnum((unsigned char)*p) || *p == '-' || *p == '_')
        p++;
    return (size_t)(p - s);
}

/* The number that S is, at most INT_MAX; -1 when it is none. */
static int index_of(const char *s)
{
    unsigned long long n = 0;

    if (!*s || s[strspn(s, "0123456789")])
        return -1;
    for (; *s && n <= INT_MAX; s++)
        n = n * 10 + (unsigned)(*s - '0');
    return n > INT_MAX ? INT_MAX : (int)n;
}

static bool is_help(const char *s, size_t length)
{
    return (length == 4 && !memcmp(s, "help", 4)) || (length == 1 && *s == '?');
}

/* Puts VALUE (NULL: an object, made when it is not there) into CUR; steals VALUE. KEY up to
 * KEY_LENGTH names it in the error. */
static struct json_object *put(struct json_object *cur, const char *fragment,
                               struct json_object *value, const char *key, size_t key_length,
                               struct error *err)
{
    struct json_object *old = json_get(cur, fragment);
    enum json_type wanted = value ? json_type_string : json_type_object;

    if (old && !json_object_is_type(old, wanted)) {
        error_set(err, EINVAL, "Parameters '%.*s.*' used inconsistently", (int)key_length, key);
        json_object_put(value);
        return NULL;
    }
    if (old && !value)
        return old;
    if (!value)
        value = json_object_new_object();
    json_object_object_add(cur, fragment, value);
    return value;
}

/* Up to the next single comma; undoubles. *S moves behind it. */
static struct json_object *take_value(const char **s)
{
    struct buffer text = {0};
    const char *p = *s;

    for (; *p; p++) {
        if (*p == ',' && *++p != ',')
            break;
        buffer_append(&text, p, 1);
    }
    *s = p;
    struct json_object *value =
        json_object_new_string_len(text.data ? (char *)text.data : "", (int)text.length);
    buffer_fini(&text);
    return value;
}

/* Follows KEY's fragments down from CUR, and puts VALUE (stolen) there. */
static int put_path(struct json_object *cur, const char *key, size_t length,
                    struct json_object *value, struct error *err)
{
    const char *s = key, *end = key + length;
    char fragment[FRAGMENT_MAX + 1];
    CLEANUP(json_putp) struct json_object *owned = value;

    for (;;) {
        size_t digits = strspn(s, "0123456789");
        size_t n = s != key && digits ? digits : name_length(s);
        if (!n || (s + n < end && s[n] != '.'))
            return error_set(err, EINVAL, "Invalid parameter '%.*s'", (int)length, key);
        if (n > FRAGMENT_MAX)
            return error_set(err, EINVAL, "Parameter%s '%.*s' is too long",
                             s != key || s + n != end ? " fragment" : "", (int)n, s);
        if (s != key) {
            cur = put(cur, fragment, NULL, key, (size_t)(s - 1 - key), err);
            if (!cur)
                return -EINVAL;
        }
        memcpy(fragment, s, n);
        fragment[n] = '\0';
        s += n;
        if (s >= end || *s != '.')
            break;
        s++;
    }
    return put(cur, fragment, steal(owned), key, length, err) ? 0 : -EINVAL;
}

static int parse_one(struct json_object *root, const char **text, const char *implied_key,
                     bool *help, struct error *err)
{
    const char *s = *text;
    size_t length = strcspn(s, "=,");

    if (length && s[length] != '=') {
        if (is_help(s, length)) {
            *help = true;
            *text = s + length + (s[length] == ',');
            return 0;
        }
        if (implied_key) {
            *text = s + length + (s[length] == ',');
            return put_path(root, implied_key, strlen(implied_key),
                            json_object_new_string_len(s, (int)length), err);
        }
    }
    if (s[length] != '=') {
        /* A bad name is told before the missing '='. */
        CLEANUP(json_putp) struct json_object *scratch = json_object_new_object();
        int r = put_path(scratch, s, length, json_object_new_string(""), err);
        return r < 0
                   ? r
                   : error_set(err, EINVAL, "Expected '=' after parameter '%.*s'", (int)length, s);
    }
    *text = s + length + 1;
    return put_path(root, s, length, take_value(text), err);
}

/* Where we are, for errors: "a.b." */
struct trail {
    const struct trail *outer;
    const char *key;
};

static void trail_text(const struct trail *t, struct buffer *out)
{
    if (!t)
        return;
    trail_text(t->outer, out);
    buffer_printf(out, "%s.", t->key);
}

static int trail_error(const struct trail *t, struct error *err, const char *fmt_head,
                       const char *rest)
{
    struct buffer b = {0};

    trail_text(t, &b);
    buffer_append(&b, "", 1);
    int r = error_set(err, EINVAL, "%s '%s%s", fmt_head, (char *)b.data, rest);
    buffer_fini(&b);
    return r;
}

/* Turns objects of numbers into arrays, from the leaves up. *RET: a new reference to what takes
 * CUR's place. */
static int listify(struct json_object *cur, const struct trail *at, struct json_object **ret,
                   struct error *err)
{
    CLEANUP(json_putp) struct json_object *out = json_object_new_object();
    bool numbers = false, names = false;
    int count = json_object_object_length(cur);

    json_object_object_foreach(cur, key, value)
    {
        struct trail here = {at, key};
        struct json_object *one = NULL;

        if (index_of(key) >= 0)
            numbers = true;
        else
            names = true;
        if (json_object_is_type(value, json_type_object)) {
            int r = listify(value, &here, &one, err);
            if (r < 0)
                return r;
        } else {
            one = json_object_get(value);
        }
        json_object_object_add(out, key, one);
    }
    if (numbers && names)
        return trail_error(at, err, "Parameters", "*' used inconsistently");
    if (!numbers) {
        *ret = steal(out);
        return 0;
    }
    CLEANUP(json_putp) struct json_object *list = json_object_new_array();
    json_object_object_foreach(out, number,
                               element) if (index_of(number) <
                                            count) /* the others leave a gap, found below */
        json_object_array_put_idx(list, (size_t)index_of(number), json_object_get(element));
    for (int i = 0; i < count; i++)
        if (!json_object_array_get_idx(list, (size_t)i)) {
            char rest[32];
            snprintf(rest, sizeof rest, "%d' missing", i);
            return trail_error(at, err, "Parameter", rest);
        }
    *ret = steal(list);
    return 0;
}

int keyval_parse(const char *text, const char *implied_key, bool *help, struct json_object **ret,
                 struct error *err)
{
    CLEANUP(json_putp) struct json_object *root = json_object_new_object();
    bool asked = false;

    while (*text) {
        int r = parse_one(root, &text, implied_key, &asked, err);
        if (r < 0)
            return r;
        implied_key = NULL;
    }
    if (help)
        *help = asked;
    else if (asked)
        return error_set(err, EINVAL, "Help is not available for this option");
    return listify(root, NULL, ret, err);
}
