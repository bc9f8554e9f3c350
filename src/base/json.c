#include "base/json.h"

struct json_object *json_get(struct json_object *obj, const char *key)
{
    struct json_object *value = NULL;

    if (obj && json_object_is_type(obj, json_type_object))
        json_object_object_get_ex(obj, key, &value);
    return value;
}

bool json_has(struct json_object *obj, const char *key)
{
    return json_get(obj, key) != NULL;
}

const char *json_get_string(struct json_object *obj, const char *key, const char *fallback)
{
    struct json_object *value = json_get(obj, key);
    return value ? json_object_get_string(value) : fallback;
}

bool json_get_bool(struct json_object *obj, const char *key, bool fallback)
{
    struct json_object *value = json_get(obj, key);

    if (!value)
        return fallback;
    if (json_object_is_type(value, json_type_string)) {
        const char *word = json_object_get_string(value);
        return !strcmp(word, "on") || !strcmp(word, "yes") || !strcmp(word, "true") ||
               !strcmp(word, "y");
    }
    return json_object_get_boolean(value);
}

int64_t json_get_int(struct json_object *obj, const char *key, int64_t fallback)
{
    struct json_object *value = json_get(obj, key);
    return value ? json_object_get_int64(value) : fallback;
}

uint64_t json_get_uint(struct json_object *obj, const char *key, uint64_t fallback)
{
    struct json_object *value = json_get(obj, key);
    return value ? json_object_get_uint64(value) : fallback;
}

void json_add(struct json_object *obj, const char *key, struct json_object *value)
{
    json_object_object_add(obj, key, value);
}

void json_add_string(struct json_object *obj, const char *key, const char *value)
{
    json_add(obj, key, json_object_new_string(value));
}

void json_add_bool(struct json_object *obj, const char *key, bool value)
{
    json_add(obj, key, json_object_new_boolean(value));
}

void json_add_int(struct json_object *obj, const char *key, int64_t value)
{
    json_add(obj, key, json_object_new_int64(value));
}

void json_add_uint(struct json_object *obj, const char *key, uint64_t value)
{
    json_add(obj, key, json_object_new_uint64(value));
}

struct json_object *json_copy(struct json_object *obj)
{
    struct json_object *copy = NULL;

    if (obj && json_object_deep_copy(obj, &copy, NULL) < 0)
        abort();
    return copy;
}
