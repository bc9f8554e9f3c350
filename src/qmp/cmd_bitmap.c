/* Commands about dirty bitmaps, and the other transactions of one action. */
#include "dirty/dirty.h"
#include "job/transaction.h"
#include "qmp/cmd.h"

#define ONE_ACTION(function, name)                                                                 \
    int function(struct qmp_call *call, struct error *err)                                         \
    {                                                                                              \
        return transaction_run_one(call->qmp->graph, call->qmp->jobs, name, call->args, err);      \
    }
ONE_ACTION(cmd_block_dirty_bitmap_add, "block-dirty-bitmap-add")
ONE_ACTION(cmd_block_dirty_bitmap_remove, "block-dirty-bitmap-remove")
ONE_ACTION(cmd_block_dirty_bitmap_clear, "block-dirty-bitmap-clear")
ONE_ACTION(cmd_block_dirty_bitmap_enable, "block-dirty-bitmap-enable")
ONE_ACTION(cmd_block_dirty_bitmap_disable, "block-dirty-bitmap-disable")
ONE_ACTION(cmd_block_dirty_bitmap_merge, "block-dirty-bitmap-merge")
ONE_ACTION(cmd_blockdev_backup, "blockdev-backup")
ONE_ACTION(cmd_drive_backup, "drive-backup")
ONE_ACTION(cmd_blockdev_snapshot, "blockdev-snapshot")
ONE_ACTION(cmd_blockdev_snapshot_sync, "blockdev-snapshot-sync")
ONE_ACTION(cmd_compare, "x-tidemark-compare")

int cmd_transaction(struct qmp_call *call, struct error *err)
{
    return transaction_run(call->qmp->graph, call->qmp->jobs, json_get(call->args, "actions"),
                           json_get(call->args, "properties"), err);
}

int cmd_bitmap_sha256(struct qmp_call *call, struct error *err)
{
    struct dirty_bitmap *bm;
    struct node *n;
    char hex[65];

    GRAPH_LOCKED(call->qmp->graph);
    int r = dirty_lookup(call->qmp->graph, json_get_string(call->args, "node", ""),
                         json_get_string(call->args, "name", ""), &n, &bm, err);
    if (r < 0 || (r = dirty_sha256(bm, hex, err)) < 0)
        return r;
    call->ret = json_object_new_object();
    json_add_string(call->ret, "sha256", hex);
    return 0;
}
