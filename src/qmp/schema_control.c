/* Schema: the monitor itself - capabilities, version, introspection - and objects. */
#include "qmp/schema_types.h"

static SCHEMA_ENUM(QMPCapability, VALUE("oob"));

static SCHEMA_LIST(QMPCapability);

SCHEMA_OBJECT(QmpCapabilitiesArg, OPT("enable", QMPCapabilityList));

static SCHEMA_OBJECT(VersionTriple, REQ("major", int), REQ("minor", int), REQ("micro", int));

SCHEMA_OBJECT(VersionInfo, REQ("qemu", VersionTriple), REQ("package", str));

static SCHEMA_OBJECT(CommandInfo, REQ("name", str));

SCHEMA_LIST(CommandInfo);

static SCHEMA_ENUM(SchemaMetaType, VALUE("builtin"), VALUE("enum"), VALUE("array"), VALUE("object"),
                   VALUE("alternate"), VALUE("command"), VALUE("event"));

static SCHEMA_ENUM(JSONType, VALUE("string"), VALUE("number"), VALUE("int"), VALUE("boolean"),
                   VALUE("null"), VALUE("object"), VALUE("array"), VALUE("value"));

static SCHEMA_OBJECT(SchemaInfoBuiltin, REQ("json-type", JSONType));

static SCHEMA_OBJECT(SchemaInfoEnumMember, REQ("name", str), OPT("features", strList));

static SCHEMA_LIST(SchemaInfoEnumMember);

static SCHEMA_OBJECT(SchemaInfoEnum, REQ("members", SchemaInfoEnumMemberList),
                     REQ("values", strList, .features = SCHEMA_DEPRECATED));

static SCHEMA_OBJECT(SchemaInfoArray, REQ("element-type", str));

static SCHEMA_OBJECT(SchemaInfoObjectMember, REQ("name", str), REQ("type", str),
                     OPT("default", any), OPT("features", strList));

static SCHEMA_LIST(SchemaInfoObjectMember);

static SCHEMA_OBJECT(SchemaInfoObjectVariant, REQ("case", str), REQ("type", str));

static SCHEMA_LIST(SchemaInfoObjectVariant);

static SCHEMA_OBJECT(SchemaInfoObject, REQ("members", SchemaInfoObjectMemberList), OPT("tag", str),
                     OPT("variants", SchemaInfoObjectVariantList));

static SCHEMA_OBJECT(SchemaInfoAlternateMember, REQ("type", str));

static SCHEMA_LIST(SchemaInfoAlternateMember);

static SCHEMA_OBJECT(SchemaInfoAlternate, REQ("members", SchemaInfoAlternateMemberList));

static SCHEMA_OBJECT(SchemaInfoCommand, REQ("arg-type", str), REQ("ret-type", str),
                     OPT("allow-oob", bool));

static SCHEMA_OBJECT(SchemaInfoEvent, REQ("arg-type", str));

static SCHEMA_UNION(SchemaInfo, "meta-type",
                    MEMBERS(REQ("name", str), REQ("meta-type", SchemaMetaType),
                            OPT("features", strList)),
                    BRANCHES(BRANCH("builtin", SchemaInfoBuiltin), BRANCH("enum", SchemaInfoEnum),
                             BRANCH("array", SchemaInfoArray), BRANCH("object", SchemaInfoObject),
                             BRANCH("alternate", SchemaInfoAlternate),
                             BRANCH("command", SchemaInfoCommand),
                             BRANCH("event", SchemaInfoEvent)));

SCHEMA_LIST(SchemaInfo);

static SCHEMA_ENUM(ObjectType, VALUE("iothread"), VALUE("secret"), LATER("authz-list"),
                   LATER("authz-listfile"), LATER("authz-pam"), LATER("authz-simple"),
                   LATER("can-bus"), LATER("can-host-socketcan"), LATER("colo-compare"),
                   LATER("cryptodev-backend"), LATER("cryptodev-backend-builtin"),
                   LATER("cryptodev-backend-lkcf"), LATER("cryptodev-vhost-user"),
                   LATER("dbus-vmstate"), LATER("filter-buffer"), LATER("filter-dump"),
                   LATER("filter-mirror"), LATER("filter-redirector"), LATER("filter-replay"),
                   LATER("filter-rewriter"), LATER("input-barrier"), LATER("input-linux"),
                   LATER("main-loop"), LATER("memory-backend-epc"), LATER("memory-backend-file"),
                   LATER("memory-backend-memfd"), LATER("memory-backend-ram"), LATER("pef-guest"),
                   LATER("pr-manager-helper"), LATER("qtest"), LATER("rng-builtin"),
                   LATER("rng-egd"), LATER("rng-random"), LATER("secret_keyring"),
                   LATER("sev-guest"), LATER("thread-context"), LATER("s390-pv-guest"),
                   VALUE("throttle-group"), LATER("tls-creds-anon"), LATER("tls-creds-psk"),
                   LATER("tls-creds-x509"), LATER("tls-cipher-suites"), LATER("x-remote-object"),
                   LATER("x-vfio-user-server"));

static SCHEMA_OBJECT(IothreadProperties, OPT("aio-max-batch", int), OPT("thread-pool-min", int),
                     OPT("thread-pool-max", int), OPT("poll-max-ns", int), OPT("poll-grow", int),
                     OPT("poll-shrink", int));

static SCHEMA_ENUM(QCryptoSecretFormat, VALUE("raw"), VALUE("base64"));

static SCHEMA_OBJECT(SecretProperties, OPT("loaded", bool, .features = SCHEMA_DEPRECATED),
                     OPT("format", QCryptoSecretFormat), OPT("keyid", str), OPT("iv", str),
                     OPT("data", str), OPT("file", str));

static SCHEMA_OBJECT(ThrottleLimits, OPT("iops-total", int), OPT("iops-total-max", int),
                     OPT("iops-total-max-length", int), OPT("iops-read", int),
                     OPT("iops-read-max", int), OPT("iops-read-max-length", int),
                     OPT("iops-write", int), OPT("iops-write-max", int),
                     OPT("iops-write-max-length", int), OPT("bps-total", int),
                     OPT("bps-total-max", int), OPT("bps-total-max-length", int),
                     OPT("bps-read", int), OPT("bps-read-max", int),
                     OPT("bps-read-max-length", int), OPT("bps-write", int),
                     OPT("bps-write-max", int), OPT("bps-write-max-length", int),
                     OPT("iops-size", int));

static SCHEMA_OBJECT(ThrottleGroupProperties, OPT("limits", ThrottleLimits),
                     OPT("x-iops-total", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-total-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-total-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-read", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-read-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-read-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-write", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-write-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-write-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-total", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-total-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-total-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-read", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-read-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-read-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-write", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-write-max", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-bps-write-max-length", int, .features = SCHEMA_UNSTABLE),
                     OPT("x-iops-size", int, .features = SCHEMA_UNSTABLE));

SCHEMA_UNION(ObjectOptions, "qom-type", MEMBERS(REQ("qom-type", ObjectType), REQ("id", str)),
             BRANCHES(BRANCH("iothread", IothreadProperties), BRANCH("secret", SecretProperties),
                      BRANCH("throttle-group", ThrottleGroupProperties)));

static SCHEMA_OBJECT(ObjectPropertyInfo, REQ("name", str), REQ("type", str),
                     OPT("description", str), OPT("default-value", any));

SCHEMA_LIST(ObjectPropertyInfo);

SCHEMA_OBJECT(QomListArg, REQ("path", str));

SCHEMA_OBJECT(QomGetArg, REQ("path", str), REQ("property", str));

SCHEMA_OBJECT(QomSetArg, REQ("path", str), REQ("property", str), REQ("value", any));

static SCHEMA_ENUM(MonitorMode, VALUE("readline"), VALUE("control"));

SCHEMA_OBJECT(MonitorOptions, OPT("id", str), OPT("mode", MonitorMode), OPT("pretty", bool),
              REQ("chardev", str));
