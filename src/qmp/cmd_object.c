/* Commands about objects. */
#include "qmp/cmd.h"
#include "qmp/objects.h"

int cmd_object_add(struct qmp_call *call, struct error *err)
{
    return objects_add(call->qmp->objects, call->args, err);
}

int cmd_object_del(struct qmp_call *call, struct error *err)
{
    return objects_del(call->qmp->objects, json_get_string(call->args, "id", ""), err);
}
