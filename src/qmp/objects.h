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
/* The options of an object of this type, lent; NULL: there is none. */
struct json_object *objects_find(struct objects *o, const char *id, const char *type);
