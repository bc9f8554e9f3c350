/* json-c in the few words we need of it: QMP messages and block options are trees of
 * struct json_object. json-c counts references; ownership here is as everywhere:
 * arguments are lent, except that adding a value to an object or array gives it away. */
#pragma once

#include "base/macros.h"

#include <json-c/json.h>

DEFINE_CLEANUP(struct json_object *, json_object_put, json_putp)

/* Looks a member up; NULL when it is absent (a JSON null is absent too). */
struct json_object *json_get(struct json_object *obj, const char *key);
bool json_has(struct json_object *obj, const char *key);

/* A member's value, or the default when it is absent. The type has been checked before
 * (by the schema tables); strings "on"/"off" and digits, as keyval and json: file names
 * carry them, are understood as well. */
const char *json_get_string(struct json_object *obj, const char *key, const char *fallback);
bool json_get_bool(struct json_object *obj, const char *key, bool fallback);
int64_t json_get_int(struct json_object *obj, const char *key, int64_t fallback);
uint64_t json_get_uint(struct json_object *obj, const char *key, uint64_t fallback);

/* Adds a member; each creates the value. json_add steals VALUE. */
void json_add(struct json_object *obj, const char *key, struct json_object *value);
void json_add_string(struct json_object *obj, const char *key, const char *value);
void json_add_bool(struct json_object *obj, const char *key, bool value);
void json_add_int(struct json_object *obj, const char *key, int64_t value);
void json_add_uint(struct json_object *obj, const char *key, uint64_t value);

/* A deep copy; the program ends when memory is short. */
struct json_object *json_copy(struct json_object *obj);
