/* query-qmp-schema: the tables, told in QEMU's shape.
 *
 * Commands and events are named; the types behind them have numbers for names, given in the
 * order in which they are met, so that nobody comes to depend on a type's name. All integers
 * are "int". What is SCHEMA_NOT_SHOWN is not there. */
#include "qmp/schema.h"

enum { TYPES_MAX = 512 };

struct telling {
    const struct schema_type *types[TYPES_MAX]; /* in the order of meeting */
    int numbers[TYPES_MAX];                     /* their names; -1: named otherwise */
    size_t met;
    int next_number;
    struct json_object *out;
};

static bool whole(const struct schema_type *type)
{
    return type->kind == SCHEMA_KIND_INT || type->kind == SCHEMA_KIND_UINT ||
           type->kind == SCHEMA_KIND_SIZE;
}

static bool builtin(const struct schema_type *type)
{
    return type->kind < SCHEMA_KIND_ENUM;
}

static SCHEMA_LIST(int);

/* The type that stands for TYPE, met at least once; *AT its place. */
static const struct schema_type *meet(struct telling *t, const struct schema_type *type, size_t *at)
{
    if (whole(type))
        type = &schema_int;
    else if (type->kind == SCHEMA_KIND_LIST && whole(type->element))
        type = &schema_intList;
    for (*at = 0; *at < t->met; ++*at)
        if (t->types[*at] == type)
            return type;
    assert(t->met < TYPES_MAX);
    t->numbers[t->met] = builtin(type) || type->kind == SCHEMA_KIND_LIST ? -1 : t->next_number++;
    t->types[t->met++] = type;
    return type;
}

/* The name of TYPE in the answer; the caller owns it. */
static char *name_of(struct telling *t, const struct schema_type *type)
{
    size_t at;

    type = meet(t, type, &at);
    if (type->kind == SCHEMA_KIND_LIST) {
        CLEANUP(memory_freep) char *element = name_of(t, type->element);
        return xasprintf("[%s]", element);
    }
    return builtin(type) ? xstrdup(type->name) : xasprintf("%d", t->numbers[at]);
}

static void add_name_of(struct telling *t, struct json_object *to, const char *key,
                        const struct schema_type *type)
{
    CLEANUP(memory_freep) char *name = name_of(t, type);
    json_add_string(to, key, name);
}

static void add_features(struct json_object *to, unsigned flags, const char *const *names)
{
    CLEANUP(json_putp) struct json_object *list = json_object_new_array();

    for (; names && *names; names++)
        json_object_array_add(list, json_object_new_string(*names));
    if (flags & SCHEMA_DEPRECATED)
        json_object_array_add(list, json_object_new_string("deprecated"));
    if (flags & SCHEMA_UNSTABLE)
        json_object_array_add(list, json_object_new_string("unstable"));
    if (json_object_array_length(list))
        json_add(to, "features", steal(list));
}

/* One entry of the answer, to be filled. */
static struct json_object *tell(struct telling *t, const char *name, const char *meta)
{
    struct json_object *one = json_object_new_object();

    json_add_string(one, "name", name);
    json_add_string(one, "meta-type", meta);
    json_object_array_add(t->out, one);
    return one;
}

static void tell_enum(struct json_object *one, const struct schema_type *type)
{
    struct json_object *members = json_object_new_array();
    struct json_object *values = json_object_new_array();

    for (const struct schema_value *v = type->values; v->name; v++) {
        if (v->features & SCHEMA_NOT_SHOWN)
            continue;
        struct json_object *m = json_object_new_object();
        json_add_string(m, "name", v->name);
        add_features(m, v->features, NULL);
        json_object_array_add(members, m);
        json_object_array_add(values, json_object_new_string(v->name));
    }
    json_add(one, "members", members);
    json_add(one, "values", values);
}

static const struct schema_type *tag_type(const struct schema_type *type)
{
    for (const struct schema_member *m = type->members; m->name; m++)
        if (!strcmp(m->name, type->tag))
            return m->type;
    abort();
}

static void tell_object(struct telling *t, struct json_object *one, const struct schema_type *type)
{
    struct json_object *members = json_object_new_array();

    for (const struct schema_member *m = type->members; m->name; m++) {
        if (m->features & SCHEMA_NOT_SHOWN)
            continue;
        struct json_object *told = json_object_new_object();
        json_add_string(told, "name", m->name);
        add_name_of(t, told, "type", m->type);
        if (m->optional)
            json_add(told, "default", NULL);
        add_features(told, m->features, NULL);
        json_object_array_add(members, told);
    }
    json_add(one, "members", members);
    if (!type->tag)
        return;
    struct json_object *variants = json_object_new_array();
    for (const struct schema_value *v = tag_type(type)->values; v->name; v++) {
        if (v->features & SCHEMA_NOT_SHOWN)
            continue;
        const struct schema_type *branch = schema_branch(type, v->name);
        struct json_object *told = json_object_new_object();
        json_add_string(told, "case", v->name);
        add_name_of(t, told, "type", branch ? branch : &schema_nothing);
        json_object_array_add(variants, told);
    }
    json_add_string(one, "tag", type->tag);
    json_add(one, "variants", variants);
}

static void tell_alternate(struct telling *t, struct json_object *one,
                           const struct schema_type *type)
{
    struct json_object *members = json_object_new_array();

    for (const struct schema_branch *b = type->branches; b->name; b++) {
        struct json_object *told = json_object_new_object();
        add_name_of(t, told, "type", b->type);
        json_object_array_add(members, told);
    }
    json_add(one, "members", members);
}

static const char *json_type_of(const struct schema_type *type)
{
    switch (type->kind) {
    case SCHEMA_KIND_STR:
        return "string";
    case SCHEMA_KIND_BOOL:
        return "boolean";
    case SCHEMA_KIND_NUMBER:
        return "number";
    case SCHEMA_KIND_NULL:
        return "null";
    case SCHEMA_KIND_ANY:
        return "value";
    default:
        return "int";
    }
}

static void tell_type(struct telling *t, const struct schema_type *type)
{
    CLEANUP(memory_freep) char *name = name_of(t, type);
    struct json_object *one;

    switch (type->kind) {
    case SCHEMA_KIND_ENUM:
        one = tell(t, name, "enum");
        tell_enum(one, type);
        break;
    case SCHEMA_KIND_LIST:
        one = tell(t, name, "array");
        add_name_of(t, one, "element-type", type->element);
        break;
    case SCHEMA_KIND_OBJECT:
        one = tell(t, name, "object");
        tell_object(t, one, type);
        break;
    case SCHEMA_KIND_ALTERNATE:
        one = tell(t, name, "alternate");
        tell_alternate(t, one, type);
        break;
    default:
        one = tell(t, name, "builtin");
        json_add_string(one, "json-type", json_type_of(type));
        break;
    }
    add_features(one, 0, type->features);
}

struct json_object *schema_introspect(const struct schema_command *commands,
                                      const struct schema_event *events)
{
    CLEANUP(memory_freep) struct telling *t = xnew(struct telling);

    t->out = json_object_new_array();
    for (const struct schema_command *c = commands; c->name; c++) {
        struct json_object *one = tell(t, c->name, "command");
        add_name_of(t, one, "arg-type", c->arguments ? c->arguments : &schema_nothing);
        add_name_of(t, one, "ret-type", c->answer ? c->answer : &schema_nothing);
        if (c->allow_oob)
            json_add_bool(one, "allow-oob", true);
        add_features(one, c->features, c->feature_names);
    }
    for (const struct schema_event *e = events; e->name; e++) {
        struct json_object *one = tell(t, e->name, "event");
        add_name_of(t, one, "arg-type", e->data ? e->data : &schema_nothing);
        add_features(one, e->features, NULL);
    }
    for (size_t i = 0; i < t->met; i++)
        tell_type(t, t->types[i]); /* may meet more */
    return t->out;
}
