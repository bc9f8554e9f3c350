/* The mirror job: makes a target equal to a disk that guests use, keeps it so, and can put it in
 * the disk's place. */
#pragma once

#include "job/job.h"

/* blockdev-mirror and drive-mirror; ARGS as the schema has passed them. They take graph_lock. */
int mirror_blockdev(struct jobs *js, struct json_object *args, struct error *err) MUST_CHECK;
int mirror_drive(struct jobs *js, struct json_object *args, struct error *err) MUST_CHECK;
