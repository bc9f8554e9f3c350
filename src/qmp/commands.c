/* Every command and every event: the one table behind dispatch, query-commands, query-qmp-schema.
 */
#include "qmp/cmd.h"
#include "qmp/schema_types.h"

#define T(NAME) &schema_##NAME
#define NONE NULL

const struct schema_command qmp_commands[] = {
    {"job-pause", T(IdArg), NONE, cmd_job_pause},
    {"job-resume", T(IdArg), NONE, cmd_job_resume},
    {"job-cancel", T(IdArg), NONE, cmd_job_cancel},
    {"job-complete", T(IdArg), NONE, cmd_job_complete},
    {"job-dismiss", T(IdArg), NONE, cmd_job_dismiss},
    {"job-finalize", T(IdArg), NONE, cmd_job_finalize},
    {"query-jobs", NONE, T(JobInfoList), cmd_query_jobs},
    {"query-block", NONE, T(BlockInfoList), cmd_query_block},
    {"query-blockstats", T(QueryBlockstatsArg), T(BlockStatsList), cmd_query_blockstats},
    {"query-block-jobs", NONE, T(BlockJobInfoList), cmd_query_block_jobs},
    {"block_resize", T(BlockResizeArg), NONE, cmd_block_resize},
    {"drive-backup", T(DriveBackup), NONE, cmd_drive_backup, SCHEMA_DEPRECATED},
    {"blockdev-backup", T(BlockdevBackup), NONE, cmd_blockdev_backup},
    {"query-named-block-nodes", T(QueryNamedBlockNodesArg), T(BlockDeviceInfoList),
     cmd_query_named_block_nodes},
    {"block-dirty-bitmap-add", T(BlockDirtyBitmapAdd), NONE, cmd_block_dirty_bitmap_add},
    {"block-dirty-bitmap-remove", T(BlockDirtyBitmap), NONE, cmd_block_dirty_bitmap_remove},
    {"block-dirty-bitmap-clear", T(BlockDirtyBitmap), NONE, cmd_block_dirty_bitmap_clear},
    {"block-dirty-bitmap-enable", T(BlockDirtyBitmap), NONE, cmd_block_dirty_bitmap_enable},
    {"block-dirty-bitmap-disable", T(BlockDirtyBitmap), NONE, cmd_block_dirty_bitmap_disable},
    {"block-dirty-bitmap-merge", T(BlockDirtyBitmapMerge), NONE, cmd_block_dirty_bitmap_merge},
    {"x-debug-block-dirty-bitmap-sha256", T(BlockDirtyBitmap), T(BlockDirtyBitmapSha256),
     cmd_bitmap_sha256, SCHEMA_UNSTABLE},
    {"block-job-set-speed", T(BlockJobSetSpeedArg), NONE, cmd_block_job_set_speed},
    {"block-job-cancel", T(BlockJobCancelArg), NONE, cmd_block_job_cancel},
    {"block-job-pause", T(DeviceArg), NONE, cmd_block_job_pause},
    {"block-job-resume", T(DeviceArg), NONE, cmd_block_job_resume},
    {"block-job-complete", T(DeviceArg), NONE, cmd_block_job_complete},
    {"block-job-dismiss", T(IdArg), NONE, cmd_block_job_dismiss},
    {"block-job-finalize", T(IdArg), NONE, cmd_block_job_finalize},
    {"blockdev-add", T(BlockdevOptions), NONE, cmd_blockdev_add},
    {"blockdev-reopen", T(BlockdevReopenArg), NONE, cmd_blockdev_reopen},
    {"blockdev-del", T(BlockdevDelArg), NONE, cmd_blockdev_del},
    {"blockdev-create", T(BlockdevCreateArg), NONE, cmd_blockdev_create},
    {"nbd-server-start", T(NbdServerStartArg), NONE, cmd_nbd_server_start},
    {"nbd-server-add", T(NbdServerAddOptions), NONE, cmd_nbd_server_add, SCHEMA_DEPRECATED},
    {"nbd-server-remove", T(NbdServerRemoveArg), NONE, cmd_nbd_server_remove, SCHEMA_DEPRECATED},
    {"nbd-server-stop", NONE, NONE, cmd_nbd_server_stop},
    {"block-export-add", T(BlockExportOptions), NONE, cmd_block_export_add},
    {"block-export-del", T(BlockExportDelArg), NONE, cmd_block_export_del},
    {"query-block-exports", NONE, T(BlockExportInfoList), cmd_query_block_exports},
    {"qmp_capabilities", T(QmpCapabilitiesArg), NONE, cmd_qmp_capabilities},
    {"query-version", NONE, T(VersionInfo), cmd_query_version},
    {"query-commands", NONE, T(CommandInfoList), cmd_query_commands},
    {"quit", NONE, NONE, cmd_quit},
    {"query-qmp-schema", NONE, T(SchemaInfoList), cmd_query_qmp_schema},
    {"object-add", T(ObjectOptions), NONE, cmd_object_add},
    {"object-del", T(IdArg), NONE, cmd_object_del},
    {"transaction", T(TransactionArg), NONE, cmd_transaction},
    {0},
};

const struct schema_event qmp_events[] = {
    {"JOB_STATUS_CHANGE", T(JobStatusChangeData)},
    {"BLOCK_IMAGE_CORRUPTED", T(BlockImageCorruptedData)},
    {"BLOCK_IO_ERROR", T(BlockIoErrorData)},
    {"BLOCK_JOB_COMPLETED", T(BlockJobCompletedData)},
    {"BLOCK_JOB_CANCELLED", T(BlockJobEnd)},
    {"BLOCK_JOB_ERROR", T(BlockJobErrorData)},
    {"BLOCK_JOB_READY", T(BlockJobEnd)},
    {"BLOCK_JOB_PENDING", T(BlockJobPendingData)},
    {"BLOCK_EXPORT_DELETED", T(IdArg)},
    {0},
};

/* --nbd-server: as nbd-server-start, but with a flat address. Not a command of its own. */
const struct schema_command qmp_nbd_server_option = {"nbd-server", T(NbdServerOptions), NONE,
                                                     cmd_nbd_server_option};
