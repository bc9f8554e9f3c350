/* What --object and object-add make: things with an id that options refer to. */
#pragma once

#include "base/error.h"
#include "base/json.h"

struct objects;

struct graph;
/* Throttle groups are GRAPH's. */
struct objects *objects_new(struct graph *g);
void objects_free(struct objects *o);

/* OPTIONS is ObjectOptions as the schema passed it. */
int objects_add(struct objects *o, struct json_object *options, struct error *err);
int objects_del(struct objects *o, const char *id, struct error *err);
/* The ids in the order of their making, from NULL to NULL; lent. */
const char *objects_next(struct objects *o, const char *id);
/* The kind of an object, NULL: there is none; *KEPT is its id as it is kept. Both lent. */
const char *objects_type(struct objects *o, const char *id, const char **kept);
/* What it was made with, or what was set since; the caller's. NULL: neither. */
struct json_object *objects_get(struct objects *o, const char *id, const char *property);
/* VALUE (lent) is what object-add would take. */
int objects_set(struct objects *o, const char *id, const char *property, struct json_object *value,
                struct error *err);
/* The options of an object of this type, lent; NULL: there is none. */
struct json_object *objects_find(struct objects *o, const char *id, const char *type);
