/* From a request to its answer. */
#include "qmp/objects.h"
#include "qmp/qmp.h"

const struct schema_command *qmp_command_find(const char *name)
{
    for (const struct schema_command *c = qmp_commands; c->name; c++)
        if (!strcmp(c->name, name))
            return c;
    return NULL;
}

static struct json_object *told(const struct error *err)
{
    struct json_object *error = json_object_new_object();

    json_add_string(error, "class", error_class_name(err->class));
    json_add_string(error, "desc", err->text);
    return error;
}

struct json_object *qmp_error_answer(const struct error *err)
{
    struct json_object *answer = json_object_new_object();

    json_add(answer, "error", told(err));
    return answer;
}

/* Runs COMMAND with ARGS, which may be NULL. *RET may stay NULL. */
static int run(struct qmp *q, struct monitor *m, const struct schema_command *command,
               struct json_object *args, enum schema_source source, struct json_object **ret,
               struct error *err)
{
    CLEANUP(json_putp) struct json_object *empty = json_object_new_object();
    CLEANUP(json_putp) struct json_object *typed = NULL;
    struct qmp_call call = {.qmp = q, .monitor = m};

    int r = schema_check(command->arguments ? command->arguments : &schema_nothing,
                         args ? args : empty, source, &typed, err);
    if (r < 0)
        return r;
    call.args = typed;
    {
        SHIELD(); /* a client that goes away does not stop what it began */
        r = command->run(&call, err);
    }
    if (r < 0) {
        json_object_put(call.ret);
        return err->code ? r : error_set_errno(err, -r, "%s", command->name);
    }
    *ret = call.ret;
    return 0;
}

int qmp_execute(struct qmp *q, const struct schema_command *command, struct json_object *args,
                enum schema_source source, struct error *err)
{
    struct json_object *ret = NULL;

    int r = run(q, NULL, command, args, source, &ret, err);
    json_object_put(ret);
    return r;
}

/* The members of a request, their names and types. *NAME is the command, lent. */
static int check_request(struct json_object *request, bool oob_allowed, const char **name,
                         bool *oob, struct json_object **args, struct error *err)
{
    const char *key = NULL;

    json_object_object_foreach(request, member, value)
    {
        bool is_oob = !strcmp(member, "exec-oob") && oob_allowed;

        if (!strcmp(member, "id"))
            continue;
        if (!strcmp(member, "execute") || is_oob) {
            if (!json_object_is_type(value, json_type_string))
                return error_set(err, EINVAL, "QMP input member '%s' must be a string", member);
            if (key)
                return error_set(err, EINVAL, "QMP input member '%s' clashes with '%s'", member,
                                 key);
            key = member;
            *oob = is_oob;
            *name = json_object_get_string(value);
        } else if (!strcmp(member, "arguments")) {
            if (!json_object_is_type(value, json_type_object))
                return error_set(err, EINVAL, "QMP input member 'arguments' must be an object");
            *args = value;
        } else {
            return error_set(err, EINVAL, "QMP input member '%s' is unexpected", member);
        }
    }
    if (!key)
        return error_set(err, EINVAL, "QMP input lacks member 'execute'");
    return 0;
}

static int dispatch(struct qmp *q, struct monitor *m, struct json_object *request,
                    struct json_object **ret, struct error *err)
{
    struct json_object *args = NULL;
    const char *name = NULL;
    bool oob = false;

    int r = check_request(request, monitor_oob(m), &name, &oob, &args, err);
    if (r < 0)
        return r;
    const struct schema_command *command = qmp_command_find(name);
    if (!monitor_negotiated(m) && strcmp(name, "qmp_capabilities"))
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, ENOSYS,
                               "Expecting capabilities negotiation with 'qmp_capabilities'");
    if (!command)
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, ENOSYS,
                               "The command %s has not been found", name);
    if (oob && !command->allow_oob)
        return error_set(err, EINVAL, "The command %s does not support OOB", name);
    return run(q, m, command, args, SCHEMA_FROM_JSON, ret, err);
}

struct json_object *qmp_dispatch(struct qmp *q, struct monitor *m, struct json_object *request)
{
    struct json_object *answer = json_object_new_object(), *ret = NULL, *id = NULL;
    struct error err = ERROR_INIT;
    bool has_id = false;
    int r;

    if (json_object_is_type(request, json_type_object)) {
        has_id = json_object_object_get_ex(request, "id", &id);
        r = dispatch(q, m, request, &ret, &err);
    } else {
        r = error_set(&err, EINVAL, "QMP input must be a JSON object");
    }
    /* in QEMU's order, for eyes that compare */
    if (r >= 0)
        json_add(answer, "return", ret ? ret : json_object_new_object());
    if (has_id)
        json_add(answer, "id", json_object_get(id));
    if (r < 0)
        json_add(answer, "error", told(&err));
    return answer;
}

static void raised(void *opaque, const char *name, struct json_object *data)
{
    qmp_event(opaque, name, data);
}

struct qmp *qmp_new(struct graph *g, struct jobs *js, struct exports *x)
{
    struct qmp *q = xnew(struct qmp);

    q->graph = g;
    q->jobs = js;
    q->exports = x;
    q->objects = objects_new(g);
    TAILQ_INIT(&q->monitors);
    mutex_init(&q->in_band);
    event_init(&q->quit);
    jobs_set_listener(js, raised, q);
    graph_set_event_listener(g, raised, q);
    return q;
}

void qmp_free(struct qmp *q)
{
    assert(TAILQ_EMPTY(&q->monitors));
    jobs_set_listener(q->jobs, NULL, NULL);
    graph_set_event_listener(q->graph, NULL, NULL);
    objects_free(q->objects);
    free(q);
}
