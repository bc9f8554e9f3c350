/* Schema: dirty bitmaps, jobs, backups, snapshots, transactions, and the events about them. */
#include "qmp/schema_types.h"

static SCHEMA_ENUM(JobStatus, VALUE("undefined"), VALUE("created"), VALUE("running"),
                   VALUE("paused"), VALUE("ready"), VALUE("standby"), VALUE("waiting"),
                   VALUE("pending"), VALUE("aborting"), VALUE("concluded"), VALUE("null"));

SCHEMA_OBJECT(JobStatusChangeData, REQ("id", str), REQ("status", JobStatus));

SCHEMA_OBJECT(IdArg, REQ("id", str));

static SCHEMA_ENUM(JobType, VALUE("commit"), VALUE("stream"), VALUE("mirror"), VALUE("backup"),
                   VALUE("create"), VALUE("amend"), VALUE("snapshot-load"), VALUE("snapshot-save"),
                   VALUE("snapshot-delete"), VALUE("x-tidemark-compare"));

static SCHEMA_OBJECT(JobInfo, REQ("id", str), REQ("type", JobType), REQ("status", JobStatus),
                     REQ("current-progress", int), REQ("total-progress", int), OPT("error", str));

SCHEMA_LIST(JobInfo);

/* actively-synced is newer QEMU's, as block-job-change, and only a mirror has it. */
static SCHEMA_OBJECT(BlockJobInfo, REQ("type", str), REQ("device", str), REQ("len", int),
                     REQ("offset", int), REQ("busy", bool), REQ("paused", bool), REQ("speed", int),
                     REQ("io-status", BlockDeviceIoStatus), REQ("ready", bool),
                     REQ("status", JobStatus), REQ("auto-finalize", bool),
                     REQ("auto-dismiss", bool), OPT("error", str), OPT("actively-synced", bool));

SCHEMA_LIST(BlockJobInfo);

static SCHEMA_ENUM(MirrorSyncMode, VALUE("top"), VALUE("full"), VALUE("none"), VALUE("incremental"),
                   VALUE("bitmap"));

static SCHEMA_ENUM(BitmapSyncMode, VALUE("on-success"), VALUE("never"), VALUE("always"),
                   VALUE("conditional", .features = SCHEMA_ALIAS, .means = "on-success"));

static SCHEMA_ENUM(BlockdevOnError, VALUE("report"), VALUE("ignore"), VALUE("enospc"),
                   VALUE("stop"), VALUE("auto"));

static SCHEMA_OBJECT(BackupPerf, OPT("use-copy-range", bool), OPT("max-workers", int),
                     OPT("max-chunk", int64));

static SCHEMA_ENUM(NewImageMode, VALUE("existing"), VALUE("absolute-paths"));

SCHEMA_OBJECT(BlockdevSnapshotSync, OPT("device", str), OPT("node-name", str),
              REQ("snapshot-file", str), OPT("snapshot-node-name", str), OPT("format", str),
              OPT("mode", NewImageMode));

SCHEMA_OBJECT(BlockdevSnapshot, REQ("node", str), REQ("overlay", str));

SCHEMA_OBJECT(DriveBackup, OPT("job-id", str), REQ("device", str), REQ("sync", MirrorSyncMode),
              OPT("speed", int), OPT("bitmap", str), OPT("bitmap-mode", BitmapSyncMode),
              OPT("compress", bool, .features = SCHEMA_LATER),
              OPT("on-source-error", BlockdevOnError), OPT("on-target-error", BlockdevOnError),
              OPT("auto-finalize", bool), OPT("auto-dismiss", bool), OPT("filter-node-name", str),
              OPT("x-perf", BackupPerf, .features = SCHEMA_UNSTABLE), REQ("target", str),
              OPT("format", str), OPT("mode", NewImageMode));

SCHEMA_OBJECT(BlockdevBackup, OPT("job-id", str), REQ("device", str), REQ("sync", MirrorSyncMode),
              OPT("speed", int), OPT("bitmap", str), OPT("bitmap-mode", BitmapSyncMode),
              OPT("compress", bool, .features = SCHEMA_LATER),
              OPT("on-source-error", BlockdevOnError), OPT("on-target-error", BlockdevOnError),
              OPT("auto-finalize", bool), OPT("auto-dismiss", bool), OPT("filter-node-name", str),
              OPT("x-perf", BackupPerf, .features = SCHEMA_UNSTABLE), REQ("target", str));

SCHEMA_OBJECT(XTidemarkCompare, OPT("job-id", str), REQ("device", str), REQ("target", str),
              REQ("bitmap", str), OPT("speed", int), OPT("on-source-error", BlockdevOnError),
              OPT("on-target-error", BlockdevOnError), OPT("auto-finalize", bool),
              OPT("auto-dismiss", bool));

static SCHEMA_ENUM(MirrorCopyMode, VALUE("background"), VALUE("write-blocking"));

/* bitmap and bitmap-mode are Proxmox's, target-is-zero is newer QEMU's. */
SCHEMA_OBJECT(BlockdevMirrorArg, OPT("job-id", str), REQ("device", str), REQ("target", str),
              OPT("replaces", str), REQ("sync", MirrorSyncMode), OPT("bitmap", str),
              OPT("bitmap-mode", BitmapSyncMode), OPT("speed", int), OPT("granularity", uint32),
              OPT("buf-size", int), OPT("on-source-error", BlockdevOnError),
              OPT("on-target-error", BlockdevOnError), OPT("filter-node-name", str),
              OPT("copy-mode", MirrorCopyMode), OPT("auto-finalize", bool),
              OPT("auto-dismiss", bool), OPT("target-is-zero", bool));

SCHEMA_OBJECT(DriveMirror, OPT("job-id", str), REQ("device", str), REQ("target", str),
              OPT("format", str), OPT("node-name", str), OPT("replaces", str),
              REQ("sync", MirrorSyncMode), OPT("bitmap", str), OPT("bitmap-mode", BitmapSyncMode),
              OPT("mode", NewImageMode), OPT("speed", int), OPT("granularity", uint32),
              OPT("buf-size", int), OPT("on-source-error", BlockdevOnError),
              OPT("on-target-error", BlockdevOnError), OPT("unmap", bool),
              OPT("copy-mode", MirrorCopyMode), OPT("auto-finalize", bool),
              OPT("auto-dismiss", bool));

static SCHEMA_OBJECT(BlockJobChangeOptionsMirror, REQ("copy-mode", MirrorCopyMode));

SCHEMA_UNION(BlockJobChangeOptions, "type", MEMBERS(REQ("id", str), REQ("type", JobType)),
             BRANCHES(BRANCH("mirror", BlockJobChangeOptionsMirror)));

SCHEMA_OBJECT(BlockDirtyBitmapAdd, REQ("node", str), REQ("name", str), OPT("granularity", uint32),
              OPT("persistent", bool), OPT("disabled", bool));

SCHEMA_OBJECT(BlockDirtyBitmap, REQ("node", str), REQ("name", str));

static SCHEMA_ALTERNATE(BlockDirtyBitmapOrStr, BRANCH("local", str),
                        BRANCH("external", BlockDirtyBitmap));

SCHEMA_LIST(BlockDirtyBitmapOrStr);

SCHEMA_OBJECT(BlockDirtyBitmapMerge, REQ("node", str), REQ("target", str),
              REQ("bitmaps", BlockDirtyBitmapOrStrList));

SCHEMA_OBJECT(BlockDirtyBitmapSha256, REQ("sha256", str));

SCHEMA_OBJECT(BlockJobSetSpeedArg, REQ("device", str), REQ("speed", int));

SCHEMA_OBJECT(BlockJobCancelArg, REQ("device", str), OPT("force", bool));

SCHEMA_OBJECT(DeviceArg, REQ("device", str));

SCHEMA_OBJECT(BlockImageCorruptedData, REQ("device", str), OPT("node-name", str), REQ("msg", str),
              OPT("offset", int), OPT("size", int), REQ("fatal", bool));

static SCHEMA_ENUM(IoOperationType, VALUE("read"), VALUE("write"));

static SCHEMA_ENUM(BlockErrorAction, VALUE("ignore"), VALUE("report"), VALUE("stop"));

SCHEMA_OBJECT(BlockIoErrorData, REQ("device", str), OPT("node-name", str),
              REQ("operation", IoOperationType), REQ("action", BlockErrorAction),
              OPT("nospace", bool), REQ("reason", str));

SCHEMA_OBJECT(BlockJobCompletedData, REQ("type", JobType), REQ("device", str), REQ("len", int),
              REQ("offset", int), REQ("speed", int), OPT("error", str));

SCHEMA_OBJECT(BlockJobEnd, REQ("type", JobType), REQ("device", str), REQ("len", int),
              REQ("offset", int), REQ("speed", int));

SCHEMA_OBJECT(BlockJobErrorData, REQ("device", str), REQ("operation", IoOperationType),
              REQ("action", BlockErrorAction));

SCHEMA_OBJECT(BlockJobPendingData, REQ("type", JobType), REQ("id", str));

static SCHEMA_ENUM(TransactionActionKind, VALUE("abort"), VALUE("block-dirty-bitmap-add"),
                   VALUE("block-dirty-bitmap-remove"), VALUE("block-dirty-bitmap-clear"),
                   VALUE("block-dirty-bitmap-enable"), VALUE("block-dirty-bitmap-disable"),
                   VALUE("block-dirty-bitmap-merge"), VALUE("blockdev-backup"),
                   VALUE("drive-backup", .features = SCHEMA_DEPRECATED), VALUE("blockdev-snapshot"),
                   LATER("blockdev-snapshot-internal-sync"), VALUE("blockdev-snapshot-sync"),
                   VALUE("x-tidemark-compare"));

static SCHEMA_EMPTY(Abort);

static SCHEMA_OBJECT(AbortWrapper, REQ("data", Abort));

static SCHEMA_OBJECT(BlockDirtyBitmapAddWrapper, REQ("data", BlockDirtyBitmapAdd));

static SCHEMA_OBJECT(BlockDirtyBitmapWrapper, REQ("data", BlockDirtyBitmap));

static SCHEMA_OBJECT(BlockDirtyBitmapMergeWrapper, REQ("data", BlockDirtyBitmapMerge));

static SCHEMA_OBJECT(BlockdevBackupWrapper, REQ("data", BlockdevBackup));

static SCHEMA_OBJECT(BlockdevSnapshotWrapper, REQ("data", BlockdevSnapshot));

static SCHEMA_OBJECT(BlockdevSnapshotSyncWrapper, REQ("data", BlockdevSnapshotSync));

static SCHEMA_OBJECT(DriveBackupWrapper, REQ("data", DriveBackup));

static SCHEMA_OBJECT(XTidemarkCompareWrapper, REQ("data", XTidemarkCompare));

static SCHEMA_UNION(TransactionAction, "type", MEMBERS(REQ("type", TransactionActionKind)),
                    BRANCHES(BRANCH("abort", AbortWrapper),
                             BRANCH("block-dirty-bitmap-add", BlockDirtyBitmapAddWrapper),
                             BRANCH("block-dirty-bitmap-remove", BlockDirtyBitmapWrapper),
                             BRANCH("block-dirty-bitmap-clear", BlockDirtyBitmapWrapper),
                             BRANCH("block-dirty-bitmap-enable", BlockDirtyBitmapWrapper),
                             BRANCH("block-dirty-bitmap-disable", BlockDirtyBitmapWrapper),
                             BRANCH("block-dirty-bitmap-merge", BlockDirtyBitmapMergeWrapper),
                             BRANCH("blockdev-backup", BlockdevBackupWrapper),
                             BRANCH("blockdev-snapshot", BlockdevSnapshotWrapper),
                             BRANCH("blockdev-snapshot-sync", BlockdevSnapshotSyncWrapper),
                             BRANCH("drive-backup", DriveBackupWrapper),
                             BRANCH("x-tidemark-compare", XTidemarkCompareWrapper)));

static SCHEMA_LIST(TransactionAction);

static SCHEMA_ENUM(ActionCompletionMode, VALUE("individual"), VALUE("grouped"));

static SCHEMA_OBJECT(TransactionProperties, OPT("completion-mode", ActionCompletionMode));

SCHEMA_OBJECT(TransactionArg, REQ("actions", TransactionActionList),
              OPT("properties", TransactionProperties));
