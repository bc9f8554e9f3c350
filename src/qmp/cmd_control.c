/* Commands about the monitor itself. */
#include "qmp/cmd.h"

/* Which of QEMU's QMP this is: what clients compare versions with. Our own stands beside it. */
enum { LIKE_QEMU_MAJOR = 7, LIKE_QEMU_MINOR = 2, LIKE_QEMU_MICRO = 0 };

struct json_object *qmp_version(void)
{
    struct json_object *version = json_object_new_object();
    struct json_object *qemu = json_object_new_object();

    json_add_int(qemu, "micro", LIKE_QEMU_MICRO);
    json_add_int(qemu, "minor", LIKE_QEMU_MINOR);
    json_add_int(qemu, "major", LIKE_QEMU_MAJOR);
    json_add(version, "qemu", qemu);
    json_add_string(version, "package", "tidemark " TIDEMARK_VERSION);
    return version;
}

int cmd_qmp_capabilities(struct qmp_call *call, struct error *err)
{
    struct json_object *enable = json_get(call->args, "enable");

    if (monitor_negotiated(call->monitor))
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, EALREADY,
                               "Capabilities negotiation is already complete, command ignored");
    /* "oob" is the only one there is */
    monitor_negotiate(call->monitor, enable && json_object_array_length(enable) > 0);
    return 0;
}

int cmd_query_version(struct qmp_call *call, struct error *err)
{
    call->ret = qmp_version();
    return 0;
}

int cmd_query_commands(struct qmp_call *call, struct error *err)
{
    call->ret = json_object_new_array();
    for (const struct schema_command *c = qmp_commands; c->name; c++) {
        struct json_object *one = json_object_new_object();
        json_add_string(one, "name", c->name);
        json_object_array_add(call->ret, one);
    }
    return 0;
}

int cmd_query_qmp_schema(struct qmp_call *call, struct error *err)
{
    call->ret = schema_introspect(qmp_commands, qmp_events);
    return 0;
}

int cmd_quit(struct qmp_call *call, struct error *err)
{
    event_set(&call->qmp->quit);
    return 0;
}
