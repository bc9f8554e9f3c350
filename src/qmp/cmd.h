/* The functions behind the table of commands, one a command. Each has its arguments checked, runs
 * in a task, and is not cancelled. 0, or negative with an error. */
#pragma once

#include "qmp/qmp.h"

typedef int qmp_command_fn(struct qmp_call *call, struct error *err);

qmp_command_fn cmd_job_pause, cmd_job_resume, cmd_job_cancel, cmd_job_complete, cmd_job_dismiss,
    cmd_job_finalize, cmd_query_jobs, cmd_query_block, cmd_query_blockstats, cmd_query_block_jobs,
    cmd_block_resize, cmd_drive_backup, cmd_blockdev_backup, cmd_query_named_block_nodes,
    cmd_block_dirty_bitmap_add, cmd_block_dirty_bitmap_remove, cmd_block_dirty_bitmap_clear,
    cmd_block_dirty_bitmap_enable, cmd_block_dirty_bitmap_disable, cmd_block_dirty_bitmap_merge,
    cmd_bitmap_sha256, cmd_block_job_set_speed, cmd_block_job_cancel, cmd_block_job_pause,
    cmd_block_job_resume, cmd_block_job_complete, cmd_block_job_dismiss, cmd_block_job_finalize,
    cmd_blockdev_add, cmd_blockdev_reopen, cmd_blockdev_del, cmd_blockdev_create,
    cmd_nbd_server_start, cmd_nbd_server_add, cmd_nbd_server_remove, cmd_nbd_server_stop,
    cmd_block_export_add, cmd_block_export_del, cmd_query_block_exports, cmd_qmp_capabilities,
    cmd_query_version, cmd_query_commands, cmd_quit, cmd_query_qmp_schema, cmd_object_add,
    cmd_object_del, cmd_qom_list, cmd_qom_get, cmd_qom_set, cmd_transaction, cmd_blockdev_mirror,
    cmd_drive_mirror, cmd_block_job_change, cmd_blockdev_snapshot, cmd_blockdev_snapshot_sync,
    cmd_nbd_server_option, cmd_compare;
