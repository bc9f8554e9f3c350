/* The compare job: see job/compare.c. Started by transactions (x-tidemark-compare). */
#pragma once

#include "job/driver.h"

struct compare_request {
    struct json_object *data; /* the command's arguments */
    struct node *disk, *target;
    struct job_group *group;
};
/* A job in state created, held. DISK is quiesced; graph_lock held. On error nothing has changed. */
int compare_create(struct jobs *js, const struct compare_request *rq, struct job **ret,
                   struct error *err) MUST_CHECK;
