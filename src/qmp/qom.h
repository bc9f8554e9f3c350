/* qom-list, qom-get, qom-set: objects by path. */
#pragma once

#include "qmp/objects.h"

/* An array of ObjectPropertyInfo. */
int qom_list(struct objects *o, const char *path, struct json_object **ret,
             struct error *err) MUST_CHECK;
int qom_get(struct objects *o, const char *path, const char *property, struct json_object **ret,
            struct error *err) MUST_CHECK;
int qom_set(struct objects *o, const char *path, const char *property, struct json_object *value,
            struct error *err) MUST_CHECK;
