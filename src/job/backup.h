/* The backup job: see job/backup.c. Used by transactions, which are what starts one. */
#pragma once

#include "job/driver.h"

struct backup_request {
    struct json_object *data; /* BackupCommon: the command's arguments */
    const char *sync;         /* as the command has worked it out from data.sync */
    struct node *source, *target;
    const char *made; /* path of the target if the command has made it; NULL: it was there */
    struct job_group *group;
};
/* A job in state created, held; its copy-before-write filter stands over the source and is
 * quiesced: graph_quiesce_end() for it is the caller's. SOURCE is quiesced. All of QEMU's checks,
 * in its order. On error nothing has changed. */
int backup_create(struct jobs *js, const struct backup_request *rq, struct job **ret,
                  struct error *err) MUST_CHECK;
struct node *backup_filter(struct job *j); /* lent */
