/* Commands about jobs: the verbs in both their forms, and the queries. */
#include "job/mirror.h"
#include "qmp/cmd.h"

#define JOB_VERB(function, verb)                                                                   \
    int function(struct qmp_call *call, struct error *err)                                         \
    {                                                                                              \
        return jobs_do(call->qmp->jobs, json_get_string(call->args, "id", ""), verb, err);         \
    }
JOB_VERB(cmd_job_pause, JOB_VERB_PAUSE)
JOB_VERB(cmd_job_resume, JOB_VERB_RESUME)
JOB_VERB(cmd_job_cancel, JOB_VERB_CANCEL)
JOB_VERB(cmd_job_complete, JOB_VERB_COMPLETE)
JOB_VERB(cmd_job_finalize, JOB_VERB_FINALIZE)
JOB_VERB(cmd_job_dismiss, JOB_VERB_DISMISS)

/* The older form, for block jobs only; two of them call the job `id`, the others `device`. */
#define BLOCK_JOB_VERB(function, verb, key)                                                        \
    int function(struct qmp_call *call, struct error *err)                                         \
    {                                                                                              \
        return jobs_do_block(call->qmp->jobs, json_get_string(call->args, key, ""), verb,          \
                             json_get_bool(call->args, "force", false), err);                      \
    }
BLOCK_JOB_VERB(cmd_block_job_pause, JOB_VERB_PAUSE, "device")
BLOCK_JOB_VERB(cmd_block_job_resume, JOB_VERB_RESUME, "device")
BLOCK_JOB_VERB(cmd_block_job_cancel, JOB_VERB_CANCEL, "device")
BLOCK_JOB_VERB(cmd_block_job_complete, JOB_VERB_COMPLETE, "device")
BLOCK_JOB_VERB(cmd_block_job_finalize, JOB_VERB_FINALIZE, "id")
BLOCK_JOB_VERB(cmd_block_job_dismiss, JOB_VERB_DISMISS, "id")

int cmd_block_job_set_speed(struct qmp_call *call, struct error *err)
{
    return jobs_set_speed(call->qmp->jobs, json_get_string(call->args, "device", ""),
                          json_get_int(call->args, "speed", 0), err);
}

int cmd_query_jobs(struct qmp_call *call, struct error *err)
{
    call->ret = jobs_query(call->qmp->jobs);
    return 0;
}

int cmd_query_block_jobs(struct qmp_call *call, struct error *err)
{
    call->ret = jobs_query_block(call->qmp->jobs);
    return 0;
}

int cmd_blockdev_create(struct qmp_call *call, struct error *err)
{
    return create_job_start(call->qmp->jobs, json_get_string(call->args, "job-id", ""),
                            json_get(call->args, "options"), err);
}

int cmd_block_job_change(struct qmp_call *call, struct error *err)
{
    return jobs_change(call->qmp->jobs, call->args, err);
}

int cmd_blockdev_mirror(struct qmp_call *call, struct error *err)
{
    return mirror_blockdev(call->qmp->jobs, call->args, err);
}

int cmd_drive_mirror(struct qmp_call *call, struct error *err)
{
    return mirror_drive(call->qmp->jobs, call->args, err);
}
