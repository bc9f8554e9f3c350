/* Schema: what the queries about nodes answer. */
#include "qmp/schema_types.h"

static SCHEMA_OBJECT(SnapshotInfo, REQ("id", str), REQ("name", str), REQ("vm-state-size", int),
                     REQ("date-sec", int), REQ("date-nsec", int), REQ("vm-clock-sec", int),
                     REQ("vm-clock-nsec", int), OPT("icount", int));

static SCHEMA_LIST(SnapshotInfo);

static SCHEMA_ENUM(ImageInfoSpecificKind, VALUE("qcow2"), LATER("vmdk"), LATER("luks"),
                   LATER("rbd"));

static SCHEMA_ENUM(Qcow2BitmapInfoFlags, VALUE("in-use"), VALUE("auto"));

static SCHEMA_LIST(Qcow2BitmapInfoFlags);

static SCHEMA_OBJECT(Qcow2BitmapInfo, REQ("name", str), REQ("granularity", uint32),
                     REQ("flags", Qcow2BitmapInfoFlagsList));

static SCHEMA_LIST(Qcow2BitmapInfo);

static SCHEMA_OBJECT(ImageInfoSpecificQCow2, REQ("compat", str), OPT("data-file", str),
                     OPT("data-file-raw", bool), OPT("extended-l2", bool),
                     OPT("lazy-refcounts", bool), OPT("corrupt", bool), REQ("refcount-bits", int),
                     OPT("bitmaps", Qcow2BitmapInfoList),
                     REQ("compression-type", Qcow2CompressionType));

static SCHEMA_OBJECT(ImageInfoSpecificQCow2Wrapper, REQ("data", ImageInfoSpecificQCow2));

static SCHEMA_UNION(ImageInfoSpecific, "type", MEMBERS(REQ("type", ImageInfoSpecificKind)),
                    BRANCHES(BRANCH("qcow2", ImageInfoSpecificQCow2Wrapper)));

SCHEMA_OBJECT(ImageInfo, REQ("filename", str), REQ("format", str), OPT("dirty-flag", bool),
              OPT("actual-size", int), REQ("virtual-size", int), OPT("cluster-size", int),
              OPT("encrypted", bool), OPT("compressed", bool), OPT("backing-filename", str),
              OPT("full-backing-filename", str), OPT("backing-filename-format", str),
              OPT("snapshots", SnapshotInfoList), OPT("backing-image", ImageInfo),
              OPT("format-specific", ImageInfoSpecific));

static SCHEMA_OBJECT(BlockdevCacheInfo, REQ("writeback", bool), REQ("direct", bool),
                     REQ("no-flush", bool));

static SCHEMA_OBJECT(BlockDirtyInfo, OPT("name", str), REQ("count", int),
                     REQ("granularity", uint32), REQ("recording", bool), REQ("busy", bool),
                     REQ("persistent", bool), OPT("inconsistent", bool),
                     OPT("x-tidemark-generation", int), OPT("x-tidemark-last-job", str));

static SCHEMA_LIST(BlockDirtyInfo);

SCHEMA_ENUM(XTidemarkRecoveryState, VALUE("new"), VALUE("clean"), VALUE("exact"), VALUE("superset"),
            VALUE("none"));

static SCHEMA_OBJECT(XTidemarkDoubt, REQ("group", str), REQ("coordinator", str));

static SCHEMA_OBJECT(XTidemarkRecovery, REQ("state", XTidemarkRecoveryState), OPT("reason", str),
                     REQ("bytes-added", int), OPT("witness", str), OPT("in-doubt", XTidemarkDoubt));

static SCHEMA_OBJECT(XTidemarkHotRegions, REQ("region-size", int), REQ("slots", int),
                     REQ("hot", int), REQ("clean", int), REQ("waiting", int), REQ("commits", int),
                     REQ("entered", int), REQ("cleanings", int), REQ("cleaned", int),
                     REQ("passed", int), REQ("marked", int), REQ("left", int),
                     REQ("idle-checkpoints", int), REQ("period-checkpoints", int),
                     REQ("flush-checkpoints", int), REQ("amount-cleanings", int));

static SCHEMA_OBJECT(BlockDeviceInfo, REQ("file", str), OPT("node-name", str), REQ("ro", bool),
                     REQ("drv", str), OPT("backing_file", str), REQ("backing_file_depth", int),
                     REQ("encrypted", bool), REQ("detect_zeroes", BlockdevDetectZeroesOptions),
                     REQ("bps", int), REQ("bps_rd", int), REQ("bps_wr", int), REQ("iops", int),
                     REQ("iops_rd", int), REQ("iops_wr", int), REQ("image", ImageInfo),
                     OPT("bps_max", int), OPT("bps_rd_max", int), OPT("bps_wr_max", int),
                     OPT("iops_max", int), OPT("iops_rd_max", int), OPT("iops_wr_max", int),
                     OPT("bps_max_length", int), OPT("bps_rd_max_length", int),
                     OPT("bps_wr_max_length", int), OPT("iops_max_length", int),
                     OPT("iops_rd_max_length", int), OPT("iops_wr_max_length", int),
                     OPT("iops_size", int), OPT("group", str), REQ("cache", BlockdevCacheInfo),
                     REQ("write_threshold", int), OPT("dirty-bitmaps", BlockDirtyInfoList),
                     OPT("x-tidemark-recovery", XTidemarkRecovery),
                     OPT("x-tidemark-hot-regions", XTidemarkHotRegions));

SCHEMA_ENUM(BlockDeviceIoStatus, VALUE("ok"), VALUE("failed"), VALUE("nospace"));

static SCHEMA_OBJECT(BlockInfo, REQ("device", str), OPT("qdev", str), REQ("type", str),
                     REQ("removable", bool), REQ("locked", bool), OPT("inserted", BlockDeviceInfo),
                     OPT("tray_open", bool), OPT("io-status", BlockDeviceIoStatus));

SCHEMA_LIST(BlockInfo);

SCHEMA_OBJECT(QueryBlockstatsArg, OPT("query-nodes", bool));

static SCHEMA_OBJECT(BlockDeviceTimedStats, REQ("interval_length", int),
                     REQ("min_rd_latency_ns", int), REQ("max_rd_latency_ns", int),
                     REQ("avg_rd_latency_ns", int), REQ("min_wr_latency_ns", int),
                     REQ("max_wr_latency_ns", int), REQ("avg_wr_latency_ns", int),
                     REQ("min_flush_latency_ns", int), REQ("max_flush_latency_ns", int),
                     REQ("avg_flush_latency_ns", int), REQ("avg_rd_queue_depth", number),
                     REQ("avg_wr_queue_depth", number));

static SCHEMA_LIST(BlockDeviceTimedStats);

static SCHEMA_OBJECT(BlockLatencyHistogramInfo, REQ("boundaries", uint64List),
                     REQ("bins", uint64List));

static SCHEMA_OBJECT(BlockDeviceStats, REQ("rd_bytes", int), REQ("wr_bytes", int),
                     REQ("unmap_bytes", int), REQ("rd_operations", int), REQ("wr_operations", int),
                     REQ("flush_operations", int), REQ("unmap_operations", int),
                     REQ("rd_total_time_ns", int), REQ("wr_total_time_ns", int),
                     REQ("flush_total_time_ns", int), REQ("unmap_total_time_ns", int),
                     REQ("wr_highest_offset", int), REQ("rd_merged", int), REQ("wr_merged", int),
                     REQ("unmap_merged", int), OPT("idle_time_ns", int),
                     REQ("failed_rd_operations", int), REQ("failed_wr_operations", int),
                     REQ("failed_flush_operations", int), REQ("failed_unmap_operations", int),
                     REQ("invalid_rd_operations", int), REQ("invalid_wr_operations", int),
                     REQ("invalid_flush_operations", int), REQ("invalid_unmap_operations", int),
                     REQ("account_invalid", bool), REQ("account_failed", bool),
                     REQ("timed_stats", BlockDeviceTimedStatsList),
                     OPT("rd_latency_histogram", BlockLatencyHistogramInfo),
                     OPT("wr_latency_histogram", BlockLatencyHistogramInfo),
                     OPT("flush_latency_histogram", BlockLatencyHistogramInfo));

static SCHEMA_OBJECT(BlockStatsSpecificFile, REQ("discard-nb-ok", uint64),
                     REQ("discard-nb-failed", uint64), REQ("discard-bytes-ok", uint64));

static SCHEMA_UNION(BlockStatsSpecific, "driver", MEMBERS(REQ("driver", BlockdevDriver)),
                    BRANCHES(BRANCH("file", BlockStatsSpecificFile),
                             BRANCH("host_device", BlockStatsSpecificFile)));

SCHEMA_OBJECT(BlockStats, OPT("device", str), OPT("qdev", str), OPT("node-name", str),
              REQ("stats", BlockDeviceStats), OPT("driver-specific", BlockStatsSpecific),
              OPT("parent", BlockStats), OPT("backing", BlockStats));

SCHEMA_LIST(BlockStats);

SCHEMA_OBJECT(QueryNamedBlockNodesArg, OPT("flat", bool));

SCHEMA_LIST(BlockDeviceInfo);
