/* The create job: makes an image, in the background because that may take long. It touches no
 * node of the graph; it cannot be stopped half way, but then counts as cancelled. */
#include "job/driver.h"

#include "block/driver.h"

struct create {
    struct job job;
    struct json_object *options;
};

static struct create *create_of(struct job *j)
{
    return container_of(j, struct create, job);
}

static int create_run(struct job *j, struct error *err)
{
    j->total = 1;
    int r = graph_create(jobs_graph(j->jobs), create_of(j)->options, err);
    j->done = 1;
    return r;
}

static void create_free(struct job *j)
{
    json_object_put(create_of(j)->options);
}

static const struct job_driver create_driver = {
    .type = "create",
    .size = sizeof(struct create),
    .run = create_run,
    .free = create_free,
};

int create_job_start(struct jobs *js, const char *job_id, struct json_object *options,
                     struct error *err)
{
    const char *name = json_get_string(options, "driver", "");
    const struct driver *d = graph_find_driver(jobs_graph(js), name);
    if (!d)
        return error_set(err, ENOENT, "Block driver '%s' not found or not supported", name);
    if (!d->create)
        return error_set(err, ENOTSUP, "Driver does not support blockdev-create");

    struct job *j = NULL;
    struct job_options jo = {.id = job_id, .manual_dismiss = true};
    int r = job_create(js, &create_driver, &jo, &j, err);
    if (r < 0)
        return r;
    create_of(j)->options = json_copy(options);
    job_start(j);
    return 0;
}
