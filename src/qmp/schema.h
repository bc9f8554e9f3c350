/* The schema: one set of tables that says what every command takes and answers.
 *
 * From the same table come the validation of arguments (with QEMU 7.2's words, so that a
 * client that reads them reads nothing new), the conversion of keyval's strings to typed
 * values, query-qmp-schema and query-commands. Names, types and their order are QEMU's QAPI
 * schema's; the order matters, because of two mistakes the first in the table is reported.
 *
 * A table names only what we do. What QEMU 7.2 takes and we do not is in it too, marked
 * SCHEMA_LATER: it is refused by its name and not shown by introspection. Nothing is ignored. */
#pragma once

#include "base/error.h"
#include "base/json.h"

enum schema_kind {
    SCHEMA_KIND_STR,
    SCHEMA_KIND_BOOL,
    SCHEMA_KIND_NUMBER,
    SCHEMA_KIND_NULL,
    SCHEMA_KIND_ANY,
    SCHEMA_KIND_INT,  /* int64 and narrower */
    SCHEMA_KIND_UINT, /* uint64 and narrower */
    SCHEMA_KIND_SIZE, /* uint64; in keyval also 64k, 1.5G */
    SCHEMA_KIND_ENUM,
    SCHEMA_KIND_LIST,
    SCHEMA_KIND_OBJECT, /* with `tag`, a union: the tag's value chooses a branch */
    SCHEMA_KIND_ALTERNATE,
};

enum {
    SCHEMA_DEPRECATED = 1, /* told by introspection */
    SCHEMA_UNSTABLE = 2,
    SCHEMA_LATER = 4,   /* QEMU takes it, we do not yet */
    SCHEMA_ALIAS = 8,   /* an enum value's other word: taken as `means`, not shown */
    SCHEMA_UNTOLD = 16, /* as LATER, but it is the driver that refuses it: it knows when */
    SCHEMA_NOT_SHOWN = SCHEMA_LATER | SCHEMA_ALIAS | SCHEMA_UNTOLD,
};

struct schema_type;

struct schema_value {
    const char *name;
    unsigned features;
    const char *means; /* SCHEMA_ALIAS: the value's name */
};

struct schema_member {
    const char *name;
    const struct schema_type *type;
    bool optional;
    unsigned features;
};

struct schema_branch {
    const char *name;
    const struct schema_type *type;
};

/* Arrays end with a NULL name. */
struct schema_type {
    enum schema_kind kind;
    const char *name;
    const char *const *features;          /* names for introspection; NULL: none */
    int64_t min;                          /* INT; the C type is in `ctype` */
    uint64_t max;                         /* INT, UINT */
    const char *ctype;                    /* "uint32_t" in errors; NULL: full width */
    const struct schema_value *values;    /* ENUM */
    const struct schema_type *element;    /* LIST */
    const struct schema_member *members;  /* OBJECT */
    const char *tag;                      /* OBJECT: the member that chooses; NULL: none */
    const struct schema_branch *branches; /* of a union, by the tag's value; ALTERNATE */
};

/* How a table is written:
 *
 *     SCHEMA_ENUM(OnOffAuto, VALUE("auto"), VALUE("on"), VALUE("off"));
 *     SCHEMA_OBJECT(Example, REQ("file", BlockdevRef), OPT("locking", OnOffAuto));
 *     SCHEMA_UNION(ExampleOptions, "driver", MEMBERS(REQ("driver", BlockdevDriver)),
 *                  BRANCHES(BRANCH("example", Example)));
 *     SCHEMA_LIST(Example);            -- ExampleList
 */
#define SCHEMA_DECLARE(NAME) extern const struct schema_type schema_##NAME
#define SCHEMA_DEFINE(NAME, KIND, ...)                                                             \
    const struct schema_type schema_##NAME = {                                                     \
        .kind = SCHEMA_KIND_##KIND, .name = #NAME, __VA_ARGS__}
#define VALUE(NAME, ...)                                                                           \
    {                                                                                              \
        .name = NAME, __VA_ARGS__                                                                  \
    }
/* A value that QEMU takes and we do not yet. */
#define LATER(NAME) VALUE(NAME, .features = SCHEMA_LATER)
#define REQ(NAME, TYPE, ...)                                                                       \
    {                                                                                              \
        .name = NAME, .type = &schema_##TYPE, __VA_ARGS__                                          \
    }
#define OPT(NAME, TYPE, ...)                                                                       \
    {                                                                                              \
        .name = NAME, .type = &schema_##TYPE, .optional = true, __VA_ARGS__                        \
    }
#define BRANCH(NAME, TYPE)                                                                         \
    {                                                                                              \
        .name = NAME, .type = &schema_##TYPE                                                       \
    }
#define MEMBERS(...)                                                                               \
    .members = (const struct schema_member[])                                                      \
    {                                                                                              \
        __VA_ARGS__,                                                                               \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define BRANCHES(...)                                                                              \
    .branches = (const struct schema_branch[])                                                     \
    {                                                                                              \
        __VA_ARGS__,                                                                               \
        {                                                                                          \
            0                                                                                      \
        }                                                                                          \
    }
#define FEATURES(...)                                                                              \
    .features = (const char *const[])                                                              \
    {                                                                                              \
        __VA_ARGS__, NULL                                                                          \
    }

#define SCHEMA_ENUM(NAME, ...)                                                                     \
    SCHEMA_DEFINE(NAME, ENUM, .values = (const struct schema_value[]){__VA_ARGS__, {0}})
#define SCHEMA_OBJECT(NAME, ...) SCHEMA_DEFINE(NAME, OBJECT, MEMBERS(__VA_ARGS__))
#define SCHEMA_EMPTY(NAME)                                                                         \
    SCHEMA_DEFINE(NAME, OBJECT, .members = (const struct schema_member[]){{0}})
#define SCHEMA_UNION(NAME, TAG, ...) SCHEMA_DEFINE(NAME, OBJECT, .tag = TAG, __VA_ARGS__)
#define SCHEMA_ALTERNATE(NAME, ...) SCHEMA_DEFINE(NAME, ALTERNATE, BRANCHES(__VA_ARGS__))
#define SCHEMA_LIST(NAME)                                                                          \
    const struct schema_type schema_##NAME##List = {                                               \
        .kind = SCHEMA_KIND_LIST, .name = #NAME "List", .element = &schema_##NAME}

SCHEMA_DECLARE(str);
SCHEMA_DECLARE(bool);
SCHEMA_DECLARE(number);
SCHEMA_DECLARE(null);
SCHEMA_DECLARE(any);
SCHEMA_DECLARE(int);
SCHEMA_DECLARE(int32);
SCHEMA_DECLARE(int64);
SCHEMA_DECLARE(uint8);
SCHEMA_DECLARE(uint16);
SCHEMA_DECLARE(uint32);
SCHEMA_DECLARE(uint64);
SCHEMA_DECLARE(size);
SCHEMA_DECLARE(strList);
SCHEMA_DECLARE(uint64List);
SCHEMA_DECLARE(nothing); /* the arguments of a command without any */

/* Where the values come from. KEYVAL: every scalar is a string. */
enum schema_source { SCHEMA_FROM_JSON, SCHEMA_FROM_KEYVAL };

/* Checks VALUE (lent) against TYPE and gives a new tree of typed values in *RET: keyval's
 * strings converted, aliases replaced, what is absent left absent. A JSON null is kept as a
 * member without a value. -EINVAL with QEMU's text. */
int schema_check(const struct schema_type *type, struct json_object *value,
                 enum schema_source source, struct json_object **ret, struct error *err);

/* "64k", "1.5G", "0x200": a size as QEMU reads it. 0, -EINVAL or -ERANGE. */
int schema_parse_size(const char *text, uint64_t *ret);

/* The branch of a union or alternate, by name; NULL when there is none. */
const struct schema_type *schema_branch(const struct schema_type *type, const char *name);

/* A command and an event, as their tables have them. */
struct qmp_call;
struct schema_command {
    const char *name;
    const struct schema_type *arguments; /* NULL: none */
    const struct schema_type *answer;    /* NULL: an empty object */
    int (*run)(struct qmp_call *call, struct error *err);
    unsigned features;
    bool allow_oob;
    const char *const *feature_names; /* others, for introspection; NULL: none */
};
struct schema_event {
    const char *name;
    const struct schema_type *data; /* NULL: none */
    unsigned features;
};

/* query-qmp-schema's answer; both tables end with a NULL name. */
struct json_object *schema_introspect(const struct schema_command *commands,
                                      const struct schema_event *events);
