/* Validation: walks the values and their table together.
 *
 * The walk goes through the members of the table, not of the value, so the first mistake in the
 * table's order is reported; unknown members come last, each object for itself. Both are
 * what QEMU's visitors do, and tests compare the words.
 *
 * A mistake is named by its full path ("actions[0].data.node", in keyval "actions.0.data.node"),
 * except where QEMU gives the last name alone: enum values, alternates and the range of narrow
 * integers. */
#include "qmp/schema.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>

/* How deep objects may lie in each other. The deepest that anyone needs is a chain of nodes. */
enum { SCHEMA_DEPTH_MAX = 100 };

SCHEMA_DEFINE(str, STR);
SCHEMA_DEFINE(bool, BOOL);
SCHEMA_DEFINE(number, NUMBER);
SCHEMA_DEFINE(null, NULL);
SCHEMA_DEFINE(any, ANY);
SCHEMA_DEFINE(int, INT, .min = INT64_MIN, .max = INT64_MAX);
SCHEMA_DEFINE(int32, INT, .min = INT32_MIN, .max = INT32_MAX, .ctype = "int32_t");
SCHEMA_DEFINE(int64, INT, .min = INT64_MIN, .max = INT64_MAX);
SCHEMA_DEFINE(uint8, UINT, .max = UINT8_MAX, .ctype = "uint8_t");
SCHEMA_DEFINE(uint16, UINT, .max = UINT16_MAX, .ctype = "uint16_t");
SCHEMA_DEFINE(uint32, UINT, .max = UINT32_MAX, .ctype = "uint32_t");
SCHEMA_DEFINE(uint64, UINT, .max = UINT64_MAX);
SCHEMA_DEFINE(size, SIZE, .max = UINT64_MAX);
SCHEMA_LIST(str);
SCHEMA_LIST(uint64);
SCHEMA_EMPTY(nothing);

/* A container on the way from the root to where we are. */
struct place {
    const struct place *outer;
    const char *name; /* of this container in its parent; NULL in a list and at the root */
    bool list;
    unsigned index; /* in a list: where we are */
    unsigned depth;
};

struct walk {
    enum schema_source source;
    struct error *err;
};

struct path {
    char text[ERROR_TEXT_MAX];
    size_t start;
};

static void path_prepend(struct path *p, const char *s)
{
    size_t n = strlen(s);

    if (n > p->start)
        return;
    p->start -= n;
    memcpy(p->text + p->start, s, n);
}

/* The full name of NAME, a member of AT. */
static const char *path_of(const struct walk *w, struct path *p, const struct place *at,
                           const char *name)
{
    p->start = sizeof p->text - 1;
    p->text[p->start] = '\0';
    for (; at; at = at->outer) {
        if (at->list) {
            char buf[32];
            snprintf(buf, sizeof buf, w->source == SCHEMA_FROM_KEYVAL ? ".%u" : "[%u]", at->index);
            path_prepend(p, buf);
        } else {
            path_prepend(p, name ? name : "<anonymous>");
            path_prepend(p, ".");
        }
        name = at->name;
    }
    if (name)
        path_prepend(p, name);
    else if (p->text[p->start] == '.')
        p->start++;
    else if (!p->text[p->start])
        return "<anonymous>";
    return p->text + p->start;
}

/* BEFORE, the full name of NAME, AFTER. Not inlined: the walk recurses, and the texts are long. */
static int __attribute__((noinline)) fail(struct walk *w, const struct place *at, const char *name,
                                          const char *before, const char *after)
{
    struct path p;
    return error_set(w->err, EINVAL, "%s '%s%s", before, path_of(w, &p, at, name), after);
}

static int fail_type(struct walk *w, const struct place *at, const char *name, const char *expected)
{
    char after[64];
    snprintf(after, sizeof after, "', expected: %s", expected);
    return fail(w, at, name, "Invalid parameter type for", after);
}

static int fail_value(struct walk *w, const struct place *at, const char *name,
                      const char *expected)
{
    char after[64];
    snprintf(after, sizeof after, "' expects %s", expected);
    return fail(w, at, name, "Parameter", after);
}

/* keyval's string, or NULL and an error. */
static const char *keyval_text(struct walk *w, const struct place *at, const char *name,
                               struct json_object *value)
{
    if (json_object_is_type(value, json_type_string))
        return json_object_get_string(value);
    fail(w, at, name, "Parameters", ".*' are unexpected");
    return NULL;
}

static int text_to_int64(const char *text, int64_t *ret)
{
    char *end;

    errno = 0;
    long long v = strtoll(text, &end, 0);
    if (end == text || *end || errno)
        return -EINVAL;
    *ret = v;
    return 0;
}

static int text_to_uint64(const char *text, uint64_t *ret)
{
    char *end;

    errno = 0;
    unsigned long long v = strtoull(text, &end, 0);
    if (end == text || *end || errno)
        return -EINVAL;
    *ret = v;
    return 0;
}

static bool suffix_shift(char c, unsigned *shift)
{
    static const char suffixes[] = "BKMGTPE";
    const char *at = c ? strchr(suffixes, toupper((unsigned char)c)) : NULL;

    if (!at)
        return false;
    *shift = 10 * (unsigned)(at - suffixes);
    return true;
}

int schema_parse_size(const char *text, uint64_t *ret)
{
    const char *digits = text + strspn(text, " \t\n\v\f\r");
    double fraction = 0;
    unsigned shift = 0;
    char *end;

    if (*digits == '+')
        digits++;
    if (!isdigit((unsigned char)*digits))
        return -EINVAL;
    bool hex = digits[0] == '0' && (digits[1] == 'x' || digits[1] == 'X');
    errno = 0;
    uint64_t whole = strtoull(digits, &end, hex ? 16 : 10);
    if (errno)
        return -ERANGE;
    if (!hex && *end == '.') {
        double unit = 0.1;
        for (end++; isdigit((unsigned char)*end); end++, unit /= 10)
            fraction += (*end - '0') * unit;
    }
    if (suffix_shift(*end, &shift))
        end++;
    if (*end || (fraction > 0 && shift == 0))
        return -EINVAL;
    if (shift && whole >> (64 - shift))
        return -ERANGE;
    *ret = (whole << shift) + (uint64_t)(fraction * (double)(UINT64_C(1) << shift) + 0.5);
    return 0;
}

/* Does VALUE hold an integer, and which? Negative ones are told apart by *NEGATIVE. */
static bool whole_number(struct json_object *value, uint64_t *ret, bool *negative)
{
    if (!json_object_is_type(value, json_type_int))
        return false;
    int64_t v = json_object_get_int64(value);
    *negative = v < 0;
    *ret = v < 0 ? (uint64_t)v : json_object_get_uint64(value);
    return true;
}

static int check_int(struct walk *w, const struct schema_type *type, const struct place *at,
                     const char *name, struct json_object *value, struct json_object **ret)
{
    int64_t v;

    if (w->source == SCHEMA_FROM_KEYVAL) {
        const char *text = keyval_text(w, at, name, value);
        if (!text)
            return -EINVAL;
        if (text_to_int64(text, &v) < 0)
            return fail_value(w, at, name, "integer");
    } else {
        uint64_t u;
        bool negative;
        if (!whole_number(value, &u, &negative) || (!negative && u > INT64_MAX))
            return fail_type(w, at, name, "integer");
        v = (int64_t)u;
    }
    if (v < type->min || (v > 0 && (uint64_t)v > type->max))
        return error_set(w->err, EINVAL, "Parameter '%s' expects %s", name ? name : "null",
                         type->ctype);
    *ret = json_object_new_int64(v);
    return 0;
}

static int check_uint(struct walk *w, const struct schema_type *type, const struct place *at,
                      const char *name, struct json_object *value, struct json_object **ret)
{
    uint64_t v;

    if (w->source == SCHEMA_FROM_KEYVAL) {
        const char *text = keyval_text(w, at, name, value);
        if (!text)
            return -EINVAL;
        if (type->kind == SCHEMA_KIND_SIZE) {
            if (schema_parse_size(text, &v) < 0)
                return fail_value(w, at, name, "size");
        } else if (text_to_uint64(text, &v) < 0) {
            return fail_value(w, at, name, "integer");
        }
    } else {
        bool negative; /* taken, and becomes huge: as in QEMU */
        if (!whole_number(value, &v, &negative))
            return fail_value(w, at, name, "uint64");
    }
    if (v > type->max)
        return error_set(w->err, EINVAL, "Parameter '%s' expects %s", name ? name : "null",
                         type->ctype);
    *ret = json_object_new_uint64(v);
    return 0;
}

static bool word_to_bool(const char *word, bool *ret)
{
    static const char *const words[][2] = {
        {"on", "off"}, {"yes", "no"}, {"true", "false"}, {"y", "n"}};

    for (size_t i = 0; i < ARRAY_SIZE(words); i++)
        for (int off = 0; off < 2; off++)
            if (!strcmp(word, words[i][off])) {
                *ret = !off;
                return true;
            }
    return false;
}

static int check_bool(struct walk *w, const struct place *at, const char *name,
                      struct json_object *value, struct json_object **ret)
{
    bool v;

    if (w->source == SCHEMA_FROM_KEYVAL) {
        const char *text = keyval_text(w, at, name, value);
        if (!text)
            return -EINVAL;
        if (!word_to_bool(text, &v))
            return fail_value(w, at, name, "'on' or 'off'");
    } else {
        if (!json_object_is_type(value, json_type_boolean))
            return fail_type(w, at, name, "boolean");
        v = json_object_get_boolean(value);
    }
    *ret = json_object_new_boolean(v);
    return 0;
}

static int check_number(struct walk *w, const struct place *at, const char *name,
                        struct json_object *value, struct json_object **ret)
{
    double v;

    if (w->source == SCHEMA_FROM_KEYVAL) {
        const char *text = keyval_text(w, at, name, value);
        if (!text)
            return -EINVAL;
        char *end;
        v = strtod(text, &end);
        if (end == text || *end || !isfinite(v))
            return fail_type(w, at, name, "number");
    } else {
        if (!json_object_is_type(value, json_type_int) &&
            !json_object_is_type(value, json_type_double))
            return fail_type(w, at, name, "number");
        v = json_object_get_double(value);
    }
    *ret = json_object_new_double(v);
    return 0;
}

static const char *check_text(struct walk *w, const struct place *at, const char *name,
                              struct json_object *value)
{
    if (w->source == SCHEMA_FROM_KEYVAL)
        return keyval_text(w, at, name, value);
    if (json_object_is_type(value, json_type_string))
        return json_object_get_string(value);
    fail_type(w, at, name, "string");
    return NULL;
}

static int check_enum(struct walk *w, const struct schema_type *type, const struct place *at,
                      const char *name, struct json_object *value, struct json_object **ret)
{
    const char *text = check_text(w, at, name, value);

    if (!text)
        return -EINVAL;
    for (const struct schema_value *v = type->values; v->name; v++) {
        if (strcmp(v->name, text))
            continue;
        if (v->features & SCHEMA_LATER)
            return error_set(w->err, ENOTSUP,
                             "Parameter '%s' does not accept value '%s': not supported yet",
                             name ? name : "null", text);
        *ret = json_object_new_string(v->features & SCHEMA_ALIAS ? v->means : v->name);
        return 0;
    }
    return error_set(w->err, EINVAL, "Parameter '%s' does not accept value '%s'",
                     name ? name : "null", text);
}

static int check(struct walk *w, const struct schema_type *type, const struct place *at,
                 const char *name, struct json_object *value, struct json_object **ret);

static int check_list(struct walk *w, const struct schema_type *type, const struct place *at,
                      const char *name, struct json_object *value, struct json_object **ret)
{
    CLEANUP(json_putp) struct json_object *out = json_object_new_array();
    struct place here = {.outer = at, .name = name, .list = true, .depth = at ? at->depth + 1 : 1};

    if (!json_object_is_type(value, json_type_array))
        return fail_type(w, at, name, "array");
    size_t n = json_object_array_length(value);
    for (size_t i = 0; i < n; i++) {
        struct json_object *one = NULL;
        here.index = (unsigned)i;
        int r = check(w, type->element, &here, NULL, json_object_array_get_idx(value, i), &one);
        if (r < 0)
            return r;
        json_object_array_add(out, one);
    }
    *ret = steal(out);
    return 0;
}

const struct schema_type *schema_branch(const struct schema_type *type, const char *name)
{
    for (const struct schema_branch *b = type->branches; b && b->name; b++)
        if (!strcmp(b->name, name))
            return b->type;
    return NULL;
}

/* A switch that is off asks for nothing, so it needs no support. */
static bool switched_off(struct json_object *value)
{
    return json_object_is_type(value, json_type_boolean) && !json_object_get_boolean(value);
}

/* Moves what TYPE knows from IN to OUT. Called for a union and then for its branch. */
static int check_members(struct walk *w, const struct schema_type *type, const struct place *here,
                         struct json_object *in, struct json_object *out)
{
    for (const struct schema_member *m = type->members; m->name; m++) {
        struct json_object *value = NULL;
        struct json_object *typed = NULL;

        if (!json_object_object_get_ex(in, m->name, &value)) {
            if (m->optional)
                continue;
            return fail(w, here, m->name, "Parameter", "' is missing");
        }
        int r = check(w, m->type, here, m->name, value, &typed);
        if (r < 0)
            return r;
        if ((m->features & SCHEMA_LATER) && !switched_off(typed)) {
            json_object_put(typed);
            return fail(w, here, m->name, "Parameter", "' is not supported yet");
        }
        json_object_object_add(out, m->name, typed);
    }
    if (!type->tag)
        return 0;
    const struct schema_type *branch = schema_branch(type, json_get_string(out, type->tag, ""));
    return branch ? check_members(w, branch, here, in, out) : 0;
}

static int check_object(struct walk *w, const struct schema_type *type, const struct place *at,
                        const char *name, struct json_object *value, struct json_object **ret)
{
    CLEANUP(json_putp) struct json_object *out = json_object_new_object();
    struct place here = {.outer = at, .name = name, .depth = at ? at->depth + 1 : 1};

    if (!json_object_is_type(value, json_type_object))
        return fail_type(w, at, name, "object");
    if (here.depth > SCHEMA_DEPTH_MAX)
        return error_set(w->err, EINVAL, "Parameter '%s' lies more than %d levels deep",
                         name ? name : "null", SCHEMA_DEPTH_MAX);
    int r = check_members(w, type, &here, value, out);
    if (r < 0)
        return r;
    json_object_object_foreach(value, key, unused)
    {
        (void)unused;
        if (!json_object_object_get_ex(out, key, NULL))
            return fail(w, &here, key, "Parameter", "' is unexpected");
    }
    *ret = steal(out);
    return 0;
}

/* Which JSON type a branch of an alternate takes. */
static bool branch_takes(const struct schema_type *branch, struct json_object *value)
{
    switch (branch->kind) {
    case SCHEMA_KIND_STR:
    case SCHEMA_KIND_ENUM:
        return json_object_is_type(value, json_type_string);
    case SCHEMA_KIND_BOOL:
        return json_object_is_type(value, json_type_boolean);
    case SCHEMA_KIND_NULL:
        return json_object_is_type(value, json_type_null);
    case SCHEMA_KIND_LIST:
        return json_object_is_type(value, json_type_array);
    case SCHEMA_KIND_OBJECT:
        return json_object_is_type(value, json_type_object);
    default:
        return json_object_is_type(value, json_type_int) ||
               json_object_is_type(value, json_type_double);
    }
}

static int check_alternate(struct walk *w, const struct schema_type *type, const struct place *at,
                           const char *name, struct json_object *value, struct json_object **ret)
{
    for (const struct schema_branch *b = type->branches; b->name; b++)
        if (branch_takes(b->type, value))
            return check(w, b->type, at, name, value, ret);
    return error_set(w->err, EINVAL, "Invalid parameter type for '%s', expected: %s",
                     name ? name : "null", type->name);
}

static int check(struct walk *w, const struct schema_type *type, const struct place *at,
                 const char *name, struct json_object *value, struct json_object **ret)
{
    switch (type->kind) {
    case SCHEMA_KIND_STR: {
        if (!check_text(w, at, name, value))
            return -EINVAL;
        *ret = json_object_get(value);
        return 0;
    }
    case SCHEMA_KIND_BOOL:
        return check_bool(w, at, name, value, ret);
    case SCHEMA_KIND_NUMBER:
        return check_number(w, at, name, value, ret);
    case SCHEMA_KIND_NULL:
        *ret = NULL;
        return json_object_is_type(value, json_type_null) ? 0 : fail_type(w, at, name, "null");
    case SCHEMA_KIND_ANY:
        *ret = json_object_get(value);
        return 0;
    case SCHEMA_KIND_INT:
        return check_int(w, type, at, name, value, ret);
    case SCHEMA_KIND_UINT:
    case SCHEMA_KIND_SIZE:
        return check_uint(w, type, at, name, value, ret);
    case SCHEMA_KIND_ENUM:
        return check_enum(w, type, at, name, value, ret);
    case SCHEMA_KIND_LIST:
        return check_list(w, type, at, name, value, ret);
    case SCHEMA_KIND_OBJECT:
        return check_object(w, type, at, name, value, ret);
    case SCHEMA_KIND_ALTERNATE:
        return check_alternate(w, type, at, name, value, ret);
    }
    abort();
}

int schema_check(const struct schema_type *type, struct json_object *value,
                 enum schema_source source, struct json_object **ret, struct error *err)
{
    struct walk w = {.source = source, .err = err};
    return check(&w, type, NULL, NULL, value, ret);
}
