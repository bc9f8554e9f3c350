/* Commands about objects. */
#include "qmp/cmd.h"
#include "qmp/qom.h"

int cmd_object_add(struct qmp_call *call, struct error *err)
{
    return objects_add(call->qmp->objects, call->args, err);
}

int cmd_object_del(struct qmp_call *call, struct error *err)
{
    return objects_del(call->qmp->objects, json_get_string(call->args, "id", ""), err);
}

int cmd_qom_list(struct qmp_call *call, struct error *err)
{
    return qom_list(call->qmp->objects, json_get_string(call->args, "path", ""), &call->ret, err);
}

int cmd_qom_get(struct qmp_call *call, struct error *err)
{
    return qom_get(call->qmp->objects, json_get_string(call->args, "path", ""),
                   json_get_string(call->args, "property", ""), &call->ret, err);
}

int cmd_qom_set(struct qmp_call *call, struct error *err)
{
    return qom_set(call->qmp->objects, json_get_string(call->args, "path", ""),
                   json_get_string(call->args, "property", ""), json_get(call->args, "value"), err);
}
