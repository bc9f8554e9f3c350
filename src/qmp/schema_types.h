/* The types that commands and events name, and those that tables share; each family has a file. */
#pragma once

#include "qmp/schema.h"

/* schema_job.c */
SCHEMA_DECLARE(JobStatusChangeData);
SCHEMA_DECLARE(IdArg);
SCHEMA_DECLARE(JobInfoList);
SCHEMA_DECLARE(BlockJobInfoList);
SCHEMA_DECLARE(BlockdevSnapshotSync);
SCHEMA_DECLARE(BlockdevSnapshot);
SCHEMA_DECLARE(DriveBackup);
SCHEMA_DECLARE(BlockdevBackup);
SCHEMA_DECLARE(XTidemarkCompare);
SCHEMA_DECLARE(BlockdevMirrorArg);
SCHEMA_DECLARE(DriveMirror);
SCHEMA_DECLARE(BlockJobChangeOptions);
SCHEMA_DECLARE(BlockDirtyBitmapAdd);
SCHEMA_DECLARE(BlockDirtyBitmap);
SCHEMA_DECLARE(BlockDirtyBitmapOrStrList);
SCHEMA_DECLARE(BlockDirtyBitmapMerge);
SCHEMA_DECLARE(BlockDirtyBitmapSha256);
SCHEMA_DECLARE(BlockJobSetSpeedArg);
SCHEMA_DECLARE(BlockJobCancelArg);
SCHEMA_DECLARE(DeviceArg);
SCHEMA_DECLARE(BlockImageCorruptedData);
SCHEMA_DECLARE(BlockIoErrorData);
SCHEMA_DECLARE(BlockJobCompletedData);
SCHEMA_DECLARE(BlockJobEnd);
SCHEMA_DECLARE(BlockJobErrorData);
SCHEMA_DECLARE(BlockJobPendingData);
SCHEMA_DECLARE(TransactionArg);

/* schema_node.c */
SCHEMA_DECLARE(BlockdevDetectZeroesOptions);
SCHEMA_DECLARE(Qcow2CompressionType);
SCHEMA_DECLARE(BlockdevDriver);
SCHEMA_DECLARE(BlockResizeArg);
SCHEMA_DECLARE(BlockdevOptions);
SCHEMA_DECLARE(BlockdevReopenArg);
SCHEMA_DECLARE(XTidemarkPersistOptions);
SCHEMA_DECLARE(BlockdevDelArg);
SCHEMA_DECLARE(BlockdevCreateArg);

/* schema_info.c */
SCHEMA_DECLARE(ImageInfo);
SCHEMA_DECLARE(BlockDeviceIoStatus);
SCHEMA_DECLARE(BlockInfoList);
SCHEMA_DECLARE(QueryBlockstatsArg);
SCHEMA_DECLARE(BlockStats);
SCHEMA_DECLARE(BlockStatsList);
SCHEMA_DECLARE(QueryNamedBlockNodesArg);
SCHEMA_DECLARE(BlockDeviceInfoList);

/* schema_export.c */
SCHEMA_DECLARE(NbdServerStartArg);
SCHEMA_DECLARE(NbdServerAddOptions);
SCHEMA_DECLARE(NbdServerRemoveArg);
SCHEMA_DECLARE(BlockExportOptions);
SCHEMA_DECLARE(BlockExportDelArg);
SCHEMA_DECLARE(BlockExportInfoList);
SCHEMA_DECLARE(NbdServerOptions);
SCHEMA_DECLARE(SocketAddress);

/* schema_control.c */
SCHEMA_DECLARE(QmpCapabilitiesArg);
SCHEMA_DECLARE(VersionInfo);
SCHEMA_DECLARE(CommandInfoList);
SCHEMA_DECLARE(SchemaInfoList);
SCHEMA_DECLARE(ObjectOptions);
SCHEMA_DECLARE(QomListArg);
SCHEMA_DECLARE(ObjectPropertyInfoList);
SCHEMA_DECLARE(QomGetArg);
SCHEMA_DECLARE(QomSetArg);
SCHEMA_DECLARE(MonitorOptions);
