/* Commands about the NBD server and exports. */
#include "qmp/cmd.h"
#include "qmp/objects.h"
#include "rt/socket.h"

static int start(struct qmp_call *call, struct json_object *addr, struct error *err)
{
    struct nbd_server_options options = {
        .addr = addr,
        .max_connections =
            (uint32_t)json_get_uint(call->args, "max-connections", NBD_DEFAULT_MAX_CONNECTIONS),
        .handshake_max_seconds = NBD_HANDSHAKE_MAX_SECONDS,
    };
    return nbd_server_start(call->qmp->exports, &options, err);
}

int cmd_nbd_server_start(struct qmp_call *call, struct error *err)
{
    CLEANUP(json_putp)
    struct json_object *addr = socket_address_flatten(json_get(call->args, "addr"));

    /* A number means something to who starts us, nothing to a client. */
    if (!strcmp(json_get_string(addr, "type", ""), "fd") && !nbd_server_running(call->qmp->exports))
        return error_set(err, ENOTSUP, "only QEMU supports file descriptor passing");
    return start(call, addr, err);
}

/* --nbd-server: the same, with the address flat. */
int cmd_nbd_server_option(struct qmp_call *call, struct error *err)
{
    return start(call, json_get(call->args, "addr"), err);
}

int cmd_nbd_server_stop(struct qmp_call *call, struct error *err)
{
    return nbd_server_stop(call->qmp->exports, err);
}

int cmd_nbd_server_add(struct qmp_call *call, struct error *err)
{
    return export_add_legacy(call->qmp->exports, call->args, err);
}

static bool hard(struct qmp_call *call)
{
    return !strcmp(json_get_string(call->args, "mode", "safe"), "hard");
}

int cmd_nbd_server_remove(struct qmp_call *call, struct error *err)
{
    return export_del(call->qmp->exports, json_get_string(call->args, "name", ""), hard(call), err);
}

int cmd_block_export_add(struct qmp_call *call, struct error *err)
{
    const char *iothread = json_get_string(call->args, "iothread", NULL);

    /* One loop has all nodes; an export "in an iothread" is in it, too. */
    if (iothread && !objects_find(call->qmp->objects, iothread, "iothread"))
        return error_set(err, ENOENT, "iothread \"%s\" not found", iothread);
    return export_add(call->qmp->exports, call->args, err);
}

int cmd_block_export_del(struct qmp_call *call, struct error *err)
{
    return export_del(call->qmp->exports, json_get_string(call->args, "id", ""), hard(call), err);
}

int cmd_query_block_exports(struct qmp_call *call, struct error *err)
{
    call->ret = exports_info(call->qmp->exports);
    return 0;
}
