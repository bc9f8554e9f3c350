/* Schema: what a node is opened, reopened and made with. The members of a driver stand in
 * QEMU's order; what is marked SCHEMA_LATER is a feature of QEMU that we refuse by name. */
#include "qmp/schema_types.h"

SCHEMA_ENUM(BlockdevDetectZeroesOptions, VALUE("off"), VALUE("on"), VALUE("unmap"));

SCHEMA_ENUM(Qcow2CompressionType, VALUE("zlib"), VALUE("zstd"));

SCHEMA_ENUM(BlockdevDriver, VALUE("copy-before-write"), VALUE("file"), VALUE("snapshot-access"),
            VALUE("null-co"), VALUE("qcow2"), VALUE("raw"), VALUE("blkdebug"),
            LATER("blklogwrites"), LATER("blkreplay"), LATER("blkverify"), LATER("bochs"),
            LATER("cloop"), LATER("compress"), LATER("copy-on-read"), LATER("dmg"), LATER("ftp"),
            LATER("ftps"), LATER("gluster"), LATER("host_cdrom"), VALUE("host_device"),
            LATER("http"), LATER("https"), LATER("io_uring"), LATER("iscsi"), LATER("luks"),
            VALUE("nbd"), LATER("nfs"), LATER("null-aio"), LATER("nvme"), LATER("nvme-io_uring"),
            LATER("parallels"), LATER("preallocate"), LATER("qcow"), LATER("qed"), LATER("quorum"),
            LATER("rbd"), LATER("replication"), LATER("ssh"), VALUE("throttle"), LATER("vdi"),
            LATER("vhdx"), LATER("virtio-blk-vfio-pci"), LATER("virtio-blk-vhost-user"),
            LATER("virtio-blk-vhost-vdpa"), LATER("vmdk"), LATER("vpc"), LATER("vvfat"));

SCHEMA_OBJECT(BlockResizeArg, OPT("device", str), OPT("node-name", str), REQ("size", int));

static SCHEMA_ENUM(BlockdevDiscardOptions, VALUE("ignore"), VALUE("unmap"));

static SCHEMA_OBJECT(BlockdevCacheOptions, OPT("direct", bool), OPT("no-flush", bool));

static SCHEMA_ALTERNATE(BlockdevRef, BRANCH("definition", BlockdevOptions),
                        BRANCH("reference", str));

static SCHEMA_ENUM(OnCbwError, VALUE("break-guest-write"), VALUE("break-snapshot"));

static SCHEMA_OBJECT(BlockdevOptionsCbw, REQ("file", BlockdevRef), REQ("target", BlockdevRef),
                     OPT("bitmap", BlockDirtyBitmap), OPT("on-cbw-error", OnCbwError),
                     OPT("cbw-timeout", uint32));

static SCHEMA_ENUM(OnOffAuto, VALUE("auto"), VALUE("on"), VALUE("off"));

static SCHEMA_ENUM(BlockdevAioOptions, VALUE("threads"), VALUE("native"), VALUE("io_uring"));

static SCHEMA_DEFINE(
    BlockdevOptionsFile, OBJECT,
    MEMBERS(REQ("filename", str), OPT("pr-manager", str, .features = SCHEMA_UNTOLD),
            OPT("locking", OnOffAuto), OPT("aio", BlockdevAioOptions), OPT("aio-max-batch", int),
            OPT("drop-cache", bool),
            OPT("x-check-cache-dropped", bool, .features = SCHEMA_UNSTABLE | SCHEMA_LATER)),
    FEATURES("dynamic-auto-read-only"));

static SCHEMA_OBJECT(BlockdevOptionsNull, OPT("size", int), OPT("latency-ns", uint64),
                     OPT("read-zeroes", bool));

static SCHEMA_ALTERNATE(BlockdevRefOrNull, BRANCH("definition", BlockdevOptions),
                        BRANCH("reference", str), BRANCH("null", null));

static SCHEMA_DEFINE(BlockdevOptionsNbd, OBJECT,
                     MEMBERS(REQ("server", SocketAddress), OPT("export", str),
                             OPT("tls-creds", str, .features = SCHEMA_LATER),
                             OPT("tls-hostname", str, .features = SCHEMA_LATER),
                             OPT("x-dirty-bitmap", str, .features = SCHEMA_UNSTABLE),
                             OPT("reconnect-delay", uint32), OPT("open-timeout", uint32)));

static SCHEMA_ENUM(Qcow2OverlapCheckMode, VALUE("none"), VALUE("constant"), VALUE("cached"),
                   VALUE("all"));

static SCHEMA_OBJECT(Qcow2OverlapCheckFlags, OPT("template", Qcow2OverlapCheckMode),
                     OPT("main-header", bool), OPT("active-l1", bool), OPT("active-l2", bool),
                     OPT("refcount-table", bool), OPT("refcount-block", bool),
                     OPT("snapshot-table", bool), OPT("inactive-l1", bool),
                     OPT("inactive-l2", bool), OPT("bitmap-directory", bool));

static SCHEMA_ALTERNATE(Qcow2OverlapChecks, BRANCH("flags", Qcow2OverlapCheckFlags),
                        BRANCH("mode", Qcow2OverlapCheckMode));

static SCHEMA_ENUM(BlockdevQcow2EncryptionFormat, VALUE("aes"), VALUE("luks"));

static SCHEMA_OBJECT(QCryptoBlockOptions, OPT("key-secret", str));

static SCHEMA_UNION(BlockdevQcow2Encryption, "format",
                    MEMBERS(REQ("format", BlockdevQcow2EncryptionFormat)),
                    BRANCHES(BRANCH("aes", QCryptoBlockOptions),
                             BRANCH("luks", QCryptoBlockOptions)));

static SCHEMA_OBJECT(BlockdevOptionsQcow2, REQ("file", BlockdevRef),
                     OPT("backing", BlockdevRefOrNull), OPT("lazy-refcounts", bool),
                     OPT("pass-discard-request", bool), OPT("pass-discard-snapshot", bool),
                     OPT("pass-discard-other", bool), OPT("overlap-check", Qcow2OverlapChecks),
                     OPT("cache-size", int), OPT("l2-cache-size", int),
                     OPT("l2-cache-entry-size", int), OPT("refcount-cache-size", int),
                     OPT("cache-clean-interval", int),
                     OPT("encrypt", BlockdevQcow2Encryption, .features = SCHEMA_UNTOLD),
                     OPT("data-file", BlockdevRef, .features = SCHEMA_UNTOLD));

static SCHEMA_OBJECT(BlockdevOptionsRaw, REQ("file", BlockdevRef), OPT("offset", int),
                     OPT("size", int));

static SCHEMA_ENUM(
    BlkdebugEvent, VALUE("l1_update"), VALUE("l1_grow_alloc_table"), VALUE("l1_grow_write_table"),
    VALUE("l1_grow_activate_table"), VALUE("l2_load"), VALUE("l2_update"),
    VALUE("l2_update_compressed"), VALUE("l2_alloc_cow_read"), VALUE("l2_alloc_write"),
    VALUE("read_aio"), VALUE("read_backing_aio"), VALUE("read_compressed"), VALUE("write_aio"),
    VALUE("write_compressed"), VALUE("vmstate_load"), VALUE("vmstate_save"), VALUE("cow_read"),
    VALUE("cow_write"), VALUE("reftable_load"), VALUE("reftable_grow"), VALUE("reftable_update"),
    VALUE("refblock_load"), VALUE("refblock_update"), VALUE("refblock_update_part"),
    VALUE("refblock_alloc"), VALUE("refblock_alloc_hookup"), VALUE("refblock_alloc_write"),
    VALUE("refblock_alloc_write_blocks"), VALUE("refblock_alloc_write_table"),
    VALUE("refblock_alloc_switch_table"), VALUE("cluster_alloc"), VALUE("cluster_alloc_bytes"),
    VALUE("cluster_free"), VALUE("flush_to_os"), VALUE("flush_to_disk"), VALUE("pwritev_rmw_head"),
    VALUE("pwritev_rmw_after_head"), VALUE("pwritev_rmw_tail"), VALUE("pwritev_rmw_after_tail"),
    VALUE("pwritev"), VALUE("pwritev_zero"), VALUE("pwritev_done"), VALUE("empty_image_prepare"),
    VALUE("l1_shrink_write_table"), VALUE("l1_shrink_free_l2_clusters"), VALUE("cor_write"),
    VALUE("cluster_alloc_space"), VALUE("none"));

static SCHEMA_ENUM(BlkdebugIOType, VALUE("read"), VALUE("write"), VALUE("write-zeroes"),
                   VALUE("discard"), VALUE("flush"), VALUE("block-status"));

static SCHEMA_OBJECT(BlkdebugInjectErrorOptions, REQ("event", BlkdebugEvent), OPT("state", int),
                     OPT("iotype", BlkdebugIOType), OPT("errno", int), OPT("sector", int),
                     OPT("once", bool), OPT("immediately", bool));
static SCHEMA_LIST(BlkdebugInjectErrorOptions);

static SCHEMA_OBJECT(BlkdebugSetStateOptions, REQ("event", BlkdebugEvent), OPT("state", int),
                     REQ("new_state", int));
static SCHEMA_LIST(BlkdebugSetStateOptions);

/* Ours: a request that meets it is held up. */
static SCHEMA_OBJECT(XTidemarkDelayOptions, REQ("event", BlkdebugEvent), OPT("state", int),
                     OPT("iotype", BlkdebugIOType), OPT("sector", int), OPT("once", bool),
                     REQ("delay-ns", uint64));
static SCHEMA_LIST(XTidemarkDelayOptions);

static SCHEMA_ENUM(BlockPermission, VALUE("consistent-read"), VALUE("write"),
                   VALUE("write-unchanged"), VALUE("resize"));
static SCHEMA_LIST(BlockPermission);

static SCHEMA_OBJECT(BlockdevOptionsBlkdebug, REQ("image", BlockdevRef), OPT("config", str),
                     OPT("align", int), OPT("max-transfer", int32), OPT("opt-write-zero", int32),
                     OPT("max-write-zero", int32), OPT("opt-discard", int32),
                     OPT("max-discard", int32), OPT("inject-error", BlkdebugInjectErrorOptionsList),
                     OPT("set-state", BlkdebugSetStateOptionsList),
                     OPT("take-child-perms", BlockPermissionList),
                     OPT("unshare-child-perms", BlockPermissionList),
                     OPT("x-tidemark-delay", XTidemarkDelayOptionsList));

static SCHEMA_OBJECT(BlockdevOptionsThrottle, REQ("throttle-group", str), REQ("file", BlockdevRef));

static SCHEMA_OBJECT(BlockdevOptionsGenericFormat, REQ("file", BlockdevRef));

/* Ours: how bitmaps are kept (persist/options.h). */
static SCHEMA_ENUM(XTidemarkPersistLevel, VALUE("off"), VALUE("process"), VALUE("power"));
static SCHEMA_ENUM(XTidemarkNoWitness, VALUE("believe"), VALUE("refuse"), VALUE("distrust"));

SCHEMA_OBJECT(XTidemarkPersistOptions, OPT("level", XTidemarkPersistLevel),
              OPT("region-size", size), OPT("budget", size), OPT("tide-file", str),
              OPT("state-directory", str), OPT("runtime-directory", str),
              OPT("no-witness", XTidemarkNoWitness), OPT("checkpoint-idle", uint32),
              OPT("checkpoint-period", uint32), OPT("checkpoint-amount", size),
              OPT("checkpoint-flush", bool));

SCHEMA_UNION(BlockdevOptions, "driver",
             MEMBERS(REQ("driver", BlockdevDriver), OPT("node-name", str),
                     OPT("discard", BlockdevDiscardOptions), OPT("cache", BlockdevCacheOptions),
                     OPT("read-only", bool), OPT("auto-read-only", bool), OPT("force-share", bool),
                     OPT("detect-zeroes", BlockdevDetectZeroesOptions),
                     OPT("x-tidemark-persist", XTidemarkPersistOptions)),
             BRANCHES(BRANCH("blkdebug", BlockdevOptionsBlkdebug),
                      BRANCH("copy-before-write", BlockdevOptionsCbw),
                      BRANCH("file", BlockdevOptionsFile),
                      BRANCH("host_device", BlockdevOptionsFile), BRANCH("nbd", BlockdevOptionsNbd),
                      BRANCH("null-co", BlockdevOptionsNull), BRANCH("qcow2", BlockdevOptionsQcow2),
                      BRANCH("raw", BlockdevOptionsRaw),
                      BRANCH("snapshot-access", BlockdevOptionsGenericFormat),
                      BRANCH("throttle", BlockdevOptionsThrottle)));

static SCHEMA_LIST(BlockdevOptions);

SCHEMA_OBJECT(BlockdevReopenArg, REQ("options", BlockdevOptionsList));

SCHEMA_OBJECT(BlockdevDelArg, REQ("node-name", str));

static SCHEMA_ENUM(PreallocMode, VALUE("off"), VALUE("metadata"), VALUE("falloc"), VALUE("full"));

static SCHEMA_OBJECT(BlockdevCreateOptionsFile, REQ("filename", str), REQ("size", size),
                     OPT("preallocation", PreallocMode), OPT("nocow", bool),
                     OPT("extent-size-hint", size));

static SCHEMA_ENUM(BlockdevQcow2Version, VALUE("v2"), VALUE("v3"));

static SCHEMA_ENUM(QCryptoBlockFormat, VALUE("qcow"), VALUE("luks"));

static SCHEMA_OBJECT(QCryptoBlockCreateOptionsLUKS, OPT("key-secret", str), OPT("cipher-alg", str),
                     OPT("cipher-mode", str), OPT("ivgen-alg", str), OPT("ivgen-hash-alg", str),
                     OPT("hash-alg", str), OPT("iter-time", int));

static SCHEMA_UNION(QCryptoBlockCreateOptions, "format", MEMBERS(REQ("format", QCryptoBlockFormat)),
                    BRANCHES(BRANCH("qcow", QCryptoBlockOptions),
                             BRANCH("luks", QCryptoBlockCreateOptionsLUKS)));

static SCHEMA_OBJECT(BlockdevCreateOptionsQcow2, REQ("file", BlockdevRef),
                     OPT("data-file", BlockdevRef, .features = SCHEMA_UNTOLD),
                     OPT("data-file-raw", bool, .features = SCHEMA_UNTOLD),
                     OPT("extended-l2", bool, .features = SCHEMA_UNTOLD), REQ("size", size),
                     OPT("version", BlockdevQcow2Version), OPT("backing-file", str),
                     OPT("backing-fmt", BlockdevDriver),
                     OPT("encrypt", QCryptoBlockCreateOptions, .features = SCHEMA_UNTOLD),
                     OPT("cluster-size", size), OPT("preallocation", PreallocMode),
                     OPT("lazy-refcounts", bool), OPT("refcount-bits", int),
                     OPT("compression-type", Qcow2CompressionType));

static SCHEMA_UNION(BlockdevCreateOptions, "driver", MEMBERS(REQ("driver", BlockdevDriver)),
                    BRANCHES(BRANCH("file", BlockdevCreateOptionsFile),
                             BRANCH("qcow2", BlockdevCreateOptionsQcow2)));

SCHEMA_OBJECT(BlockdevCreateArg, REQ("job-id", str), REQ("options", BlockdevCreateOptions));
