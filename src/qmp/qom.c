/* qom-list, qom-get, qom-set: objects and their properties under paths, as QEMU shows its own.
 *
 *     /                  the root
 *     /objects           what object-add has made
 *     /objects/ID        one of them; also just "ID", or any end of the path that only one fits
 *
 * A property of an object is an option that it was made with, or its default; a throttle group's
 * are those that it has now. */
#include "qmp/qom.h"

#include "qmp/schema_types.h"

struct property {
    const char *name, *type;
    int64_t initial;
};

/* Each kind's properties in the order in which QEMU lists them. */
static const struct property of_container[] = {{"type", "string"}, {0}};

static const struct property of_iothread[] = {
    {"type", "string"},
    {"thread-pool-min", "int"},
    {"aio-max-batch", "int"},
    {"thread-pool-max", "int", 64},
    {"poll-max-ns", "int", 32768},
    {"poll-grow", "int"},
    {"poll-shrink", "int"},
    {0},
};

static const struct property of_secret[] = {
    {"type", "string"},
    {"iv", "string"},
    {"keyid", "string"},
    {"loaded", "bool", true},
    {"format", "QCryptoSecretFormat"},
    {"file", "string"},
    {"data", "string"},
    {0},
};

static const struct property of_throttle_group[] = {
    {"type", "string"},
    {"x-bps-write-max-length", "int"},
    {"x-iops-total-max-length", "int"},
    {"x-iops-size", "int"},
    {"limits", "ThrottleLimits"},
    {"x-bps-total", "int"},
    {"x-iops-read-max-length", "int"},
    {"x-bps-write", "int"},
    {"x-iops-write-max-length", "int"},
    {"x-bps-read-max", "int"},
    {"x-iops-read-max", "int"},
    {"x-bps-total-max", "int"},
    {"x-bps-read-max-length", "int"},
    {"x-iops-read", "int"},
    {"x-bps-read", "int"},
    {"x-bps-write-max", "int"},
    {"x-iops-total-max", "int"},
    {"x-iops-total", "int"},
    {"x-iops-write", "int"},
    {"x-bps-total-max-length", "int"},
    {"x-iops-write-max", "int"},
    {0},
};

static const struct kind {
    const char *name;
    const struct property *properties;
} kinds[] = {
    {"container", of_container},
    {"iothread", of_iothread},
    {"secret", of_secret},
    {"throttle-group", of_throttle_group},
};

/* ---- finding ---- */

/* What a path leads to. */
struct place {
    enum { ROOT, OBJECTS, OBJECT } what;
    const char *id;
    const struct kind *kind;
};

/* The first part of *PATH, which moves behind it. NULL: the end. */
static char *take_part(const char **path)
{
    *path += strspn(*path, "/");
    size_t n = strcspn(*path, "/");
    const char *start = *path;

    *path += n;
    return n ? xasprintf("%.*s", (int)n, start) : NULL;
}

static bool find_object(struct objects *o, const char *id, struct place *ret)
{
    const char *type = objects_type(o, id, &id);

    for (size_t i = 0; type && i < ARRAY_SIZE(kinds); i++)
        if (!strcmp(kinds[i].name, type)) {
            *ret = (struct place){OBJECT, id, &kinds[i]};
            return true;
        }
    return false;
}

/* Where PATH leads from FROM. */
static bool walk(struct objects *o, struct place from, const char *path, struct place *ret)
{
    for (;;) {
        CLEANUP(memory_freep) char *part = take_part(&path);
        if (!part) {
            *ret = from;
            return true;
        }
        if (from.what == ROOT && !strcmp(part, "objects"))
            from.what = OBJECTS;
        else if (from.what != OBJECTS || !find_object(o, part, &from))
            return false;
    }
}

static bool find(struct objects *o, const char *path, struct place *ret, bool *ambiguous)
{
    struct place root = {ROOT, NULL, &kinds[0]}, objects = {OBJECTS, NULL, &kinds[0]};
    struct place found;
    unsigned n = 0;

    *ambiguous = false;
    if (path[0] == '/')
        return walk(o, root, path, ret);
    if (walk(o, root, path, &found) && ++n)
        *ret = found;
    if (walk(o, objects, path, &found) && ++n)
        *ret = found;
    *ambiguous = n > 1;
    return n == 1;
}

static int not_found(const char *path, struct error *err)
{
    return error_set_class(err, ERROR_DEVICE_NOT_FOUND, ENODEV, "Device '%s' not found", path);
}

static const struct property *find_property(const struct place *p, const char *name)
{
    const struct property *one = p->kind->properties;

    while (one->name && strcmp(one->name, name))
        one++;
    return one->name ? one : NULL;
}

/* ---- the commands ---- */

static void list_one(struct json_object *list, const char *name, const char *type)
{
    struct json_object *one = json_object_new_object();

    json_add_string(one, "name", name);
    json_add_string(one, "type", type);
    json_object_array_add(list, one);
}

static void list_child(struct json_object *list, const char *name, const char *kind)
{
    CLEANUP(memory_freep) char *type = xasprintf("child<%s>", kind);
    list_one(list, name, type);
}

int qom_list(struct objects *o, const char *path, struct json_object **ret, struct error *err)
{
    struct place p;
    bool ambiguous;

    if (!find(o, path, &p, &ambiguous))
        return ambiguous ? error_set(err, EINVAL, "Path '%s' is ambiguous", path)
                         : not_found(path, err);
    *ret = json_object_new_array();
    for (const struct property *one = p.kind->properties; one->name; one++)
        list_one(*ret, one->name, one->type);
    if (p.what == ROOT)
        list_child(*ret, "objects", "container");
    for (const char *id = NULL; p.what == OBJECTS && (id = objects_next(o, id));)
        list_child(*ret, id, objects_type(o, id, &id));
    return 0;
}

/* The child NAME of a container, as a path. */
static char *child_path(struct objects *o, const struct place *p, const char *name)
{
    const char *id;

    if (p->what == ROOT && !strcmp(name, "objects"))
        return xstrdup("/objects");
    if (p->what == OBJECTS && objects_type(o, name, &id))
        return xasprintf("/objects/%s", name);
    return NULL;
}

static struct json_object *value_of(struct objects *o, const struct place *p,
                                    const struct property *property)
{
    struct json_object *value;

    if (!strcmp(property->name, "type"))
        return json_object_new_string(p->kind->name);
    value = objects_get(o, p->id, property->name);
    if (value)
        return value;
    if (!strcmp(property->type, "int"))
        return json_object_new_int64(property->initial);
    if (!strcmp(property->type, "bool"))
        return json_object_new_boolean(property->initial != 0);
    return json_object_new_string(!strcmp(property->name, "format") ? "raw" : "");
}

static int no_property(const struct place *p, const char *name, struct error *err)
{
    return error_set(err, ENOENT, "Property '%s.%s' not found", p->kind->name, name);
}

int qom_get(struct objects *o, const char *path, const char *name, struct json_object **ret,
            struct error *err)
{
    const struct property *property;
    struct place p;
    bool ambiguous;

    if (!find(o, path, &p, &ambiguous))
        return not_found(path, err);
    CLEANUP(memory_freep) char *child = child_path(o, &p, name);
    property = find_property(&p, name);
    if (!child && !property)
        return no_property(&p, name, err);
    *ret = child ? json_object_new_string(child) : value_of(o, &p, property);
    return 0;
}

int qom_set(struct objects *o, const char *path, const char *name, struct json_object *value,
            struct error *err)
{
    const struct property *property;
    struct place p;
    bool ambiguous;
    int r;

    if (!find(o, path, &p, &ambiguous))
        return not_found(path, err);
    CLEANUP(memory_freep) char *child = child_path(o, &p, name);
    property = find_property(&p, name);
    if (!child && !property)
        return no_property(&p, name, err);
    if (child || p.what != OBJECT || !strcmp(name, "type") || !strcmp(name, "loaded"))
        return error_set(err, EPERM, "Property '%s.%s' is not writable", p.kind->name, name);
    if (!strncmp(name, "x-", 2))
        return error_set(err, EPERM, "Property cannot be set after initialization");

    /* The value is checked as object-add checks it. */
    CLEANUP(json_putp) struct json_object *options = json_object_new_object();
    CLEANUP(json_putp) struct json_object *checked = NULL;
    json_add_string(options, "qom-type", p.kind->name);
    json_add_string(options, "id", p.id);
    json_add(options, name, value ? json_copy(value) : NULL);
    r = schema_check(&schema_ObjectOptions, options, SCHEMA_FROM_JSON, &checked, err);
    return r < 0 ? r : objects_set(o, p.id, name, json_get(checked, name), err);
}
