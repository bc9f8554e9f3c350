/* Schema: exports, the NBD server and the addresses that it listens on. */
#include "qmp/schema_types.h"

static SCHEMA_ENUM(SocketAddressType, VALUE("inet"), VALUE("unix"), VALUE("fd"), LATER("vsock"));

static SCHEMA_OBJECT(InetSocketAddress, REQ("host", str), REQ("port", str), OPT("numeric", bool),
                     OPT("to", uint16), OPT("ipv4", bool), OPT("ipv6", bool),
                     OPT("keep-alive", bool), OPT("mptcp", bool, .features = SCHEMA_LATER));

static SCHEMA_OBJECT(InetSocketAddressWrapper, REQ("data", InetSocketAddress));

static SCHEMA_OBJECT(UnixSocketAddress, REQ("path", str), OPT("abstract", bool),
                     OPT("tight", bool));

static SCHEMA_OBJECT(UnixSocketAddressWrapper, REQ("data", UnixSocketAddress));

static SCHEMA_OBJECT(String, REQ("str", str));

static SCHEMA_OBJECT(StringWrapper, REQ("data", String));

static SCHEMA_UNION(SocketAddressLegacy, "type", MEMBERS(REQ("type", SocketAddressType)),
                    BRANCHES(BRANCH("inet", InetSocketAddressWrapper),
                             BRANCH("unix", UnixSocketAddressWrapper),
                             BRANCH("fd", StringWrapper)));

SCHEMA_OBJECT(NbdServerStartArg, REQ("addr", SocketAddressLegacy),
              OPT("tls-creds", str, .features = SCHEMA_LATER),
              OPT("tls-authz", str, .features = SCHEMA_LATER), OPT("max-connections", uint32));

SCHEMA_OBJECT(NbdServerAddOptions, OPT("name", str), OPT("description", str), REQ("device", str),
              OPT("writable", bool), OPT("bitmap", str));

static SCHEMA_ENUM(BlockExportRemoveMode, VALUE("safe"), VALUE("hard"));

SCHEMA_OBJECT(NbdServerRemoveArg, REQ("name", str), OPT("mode", BlockExportRemoveMode));

static SCHEMA_ENUM(BlockExportType, VALUE("nbd"), LATER("vhost-user-blk"), LATER("fuse"),
                   LATER("vduse-blk"));

static SCHEMA_OBJECT(BlockExportOptionsNbd, OPT("name", str), OPT("description", str),
                     OPT("bitmaps", BlockDirtyBitmapOrStrList), OPT("allocation-depth", bool));

SCHEMA_UNION(BlockExportOptions, "type",
             MEMBERS(REQ("type", BlockExportType), REQ("id", str), OPT("fixed-iothread", bool),
                     OPT("iothread", str), REQ("node-name", str), OPT("writable", bool),
                     OPT("writethrough", bool)),
             BRANCHES(BRANCH("nbd", BlockExportOptionsNbd)));

SCHEMA_OBJECT(BlockExportDelArg, REQ("id", str), OPT("mode", BlockExportRemoveMode));

static SCHEMA_OBJECT(BlockExportInfo, REQ("id", str), REQ("type", BlockExportType),
                     REQ("node-name", str), REQ("shutting-down", bool));

SCHEMA_LIST(BlockExportInfo);

SCHEMA_UNION(SocketAddress, "type", MEMBERS(REQ("type", SocketAddressType)),
             BRANCHES(BRANCH("inet", InetSocketAddress), BRANCH("unix", UnixSocketAddress),
                      BRANCH("fd", String)));

SCHEMA_OBJECT(NbdServerOptions, REQ("addr", SocketAddress),
              OPT("tls-creds", str, .features = SCHEMA_LATER),
              OPT("tls-authz", str, .features = SCHEMA_LATER), OPT("max-connections", uint32));
