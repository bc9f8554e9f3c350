"""query-version, query-commands, query-qmp-schema: what tools probe."""

from ..table import sequence

# What issues 2 and 3 offer of QEMU 7.2. A command of ours that QEMU does not have begins with x-tidemark-.
OFFERED = """block-dirty-bitmap-add block-dirty-bitmap-clear block-dirty-bitmap-disable
block-dirty-bitmap-enable block-dirty-bitmap-merge block-dirty-bitmap-remove block-export-add
block-export-del block-job-cancel block-job-complete block-job-dismiss block-job-finalize
block-job-pause block-job-resume block-job-set-speed block_resize blockdev-add blockdev-backup
blockdev-create blockdev-del blockdev-mirror blockdev-reopen blockdev-snapshot
blockdev-snapshot-sync drive-backup drive-mirror job-cancel job-complete job-dismiss job-finalize
job-pause job-resume nbd-server-add nbd-server-remove nbd-server-start nbd-server-stop
object-add object-del qmp_capabilities query-block query-block-exports query-block-jobs
query-blockstats query-commands query-jobs query-named-block-nodes query-qmp-schema query-version
qom-get qom-list qom-set quit transaction x-debug-block-dirty-bitmap-sha256""".split()

EVENTS = """BLOCK_EXPORT_DELETED BLOCK_IMAGE_CORRUPTED BLOCK_IO_ERROR BLOCK_JOB_CANCELLED
BLOCK_JOB_COMPLETED BLOCK_JOB_ERROR BLOCK_JOB_PENDING BLOCK_JOB_READY JOB_STATUS_CHANGE""".split()

# Members of QEMU's types that belong to features of later issues, or to no disk of ours.
DRIVERS = ("blkdebug", "throttle", "file", "host_device", "raw", "qcow2", "nbd", "null-co", "copy-before-write",
           "snapshot-access")


@sequence()
def query_commands(t):
    """Which of the offered commands are there; which others begin with no x-tidemark-."""
    def look(qmp):
        names = {c["name"] for c in qmp.call("query-commands")["return"]}
        return sorted(names & set(OFFERED))
    t.qmp_value("offered", look)
    t("query-version")


class Schema:
    """query-qmp-schema with its hidden names resolved."""

    def __init__(self, entries):
        self.by_name = {e["name"]: e for e in entries}

    def kind(self, name, depth):
        """A type told by its content: base types by name, enums by values, objects by members."""
        entry = self.by_name.get(name)
        if entry is None:
            return f"unresolved {name}"
        meta = entry["meta-type"]
        if meta == "builtin":
            return entry["json-type"]
        if meta == "array":
            return [self.kind(entry["element-type"], depth)]
        if meta == "enum":
            return "enum"
        if meta == "alternate":
            return {"alternate": sorted(str(self.kind(m["type"], 0)) for m in entry["members"])}
        if depth == 0:
            return "object"
        return self.members(entry, depth - 1)

    def members(self, entry, depth):
        """Members as name -> type, "?" where they may be left out."""
        found = {}
        for member in entry.get("members", []):
            name = member["name"] + ("?" if "default" in member else "")
            found[name] = self.kind(member["type"], depth)
        if "tag" in entry:
            found["(tag)"] = entry["tag"]
        return found

    def variant(self, name, case):
        """The members that CASE adds to a union."""
        for variant in self.by_name[name].get("variants", []):
            if variant["case"] == case:
                return self.members(self.by_name[variant["type"]], 0)
        return None


def schema(qmp):
    return Schema(qmp.call("query-qmp-schema")["return"])


@sequence()
def schema_of_commands(t):
    """The arguments of each offered command, with their types, and which may be left out."""
    for name in OFFERED:
        def look(qmp, name=name):
            s = schema(qmp)
            entry = s.by_name.get(name)
            if entry is None:
                return None
            arguments = s.by_name[entry["arg-type"]]
            return {"meta": entry["meta-type"], "arguments": s.members(arguments, 0),
                    "allow-oob": entry.get("allow-oob", False)}
        t.qmp_value(f"schema-{name}", look)


@sequence()
def schema_of_events(t):
    """The members of each event."""
    for name in EVENTS:
        def look(qmp, name=name):
            s = schema(qmp)
            entry = s.by_name.get(name)
            return entry and {"meta": entry["meta-type"],
                              "members": s.members(s.by_name[entry["arg-type"]], 0)}
        t.qmp_value(f"schema-{name}", look)


@sequence()
def schema_of_unions(t):
    """What each driver, export type and transaction action takes."""
    for command, cases in (("blockdev-add", DRIVERS), ("block-export-add", ("nbd",)),
                           ("object-add", ("iothread", "secret", "throttle-group"))):
        for case in cases:
            def look(qmp, command=command, case=case):
                s = schema(qmp)
                entry = s.by_name.get(command)
                return entry and s.variant(entry["arg-type"], case)
            t.qmp_value(f"union-{command}-{case}", look)

    def member(s, command, name):
        arguments = s.by_name[s.by_name[command]["arg-type"]]
        return next(m["type"] for m in arguments["members"] if m["name"] == name)

    def actions(qmp):
        s = schema(qmp)
        element = s.by_name[member(s, "transaction", "actions")]["element-type"]
        found = {}
        for case in ("abort", "block-dirty-bitmap-add", "block-dirty-bitmap-remove",
                     "block-dirty-bitmap-clear", "block-dirty-bitmap-enable",
                     "block-dirty-bitmap-disable", "block-dirty-bitmap-merge", "blockdev-backup",
                     "blockdev-snapshot", "blockdev-snapshot-sync", "drive-backup"):
            found[case] = s.variant(element, case) is not None
        return found
    t.qmp_value("union-transaction", actions)

    def create(qmp):
        s = schema(qmp)
        options = member(s, "blockdev-create", "options")
        return {driver: s.variant(options, driver) for driver in ("file", "qcow2")}
    t.qmp_value("union-blockdev-create", create)


@sequence()
def schema_of_enums(t):
    """Values of enums that tools probe, in each command that takes them."""
    on_error = ["auto", "enospc", "ignore", "report", "stop"]
    want = {"sync": ["bitmap", "full", "incremental", "none", "top"],
            "bitmap-mode": ["always", "never", "on-success"],
            "copy-mode": ["background", "write-blocking"],
            "mode": ["absolute-paths", "existing"],
            "on-source-error": on_error, "on-target-error": on_error}

    for command in ("blockdev-backup", "drive-backup", "blockdev-mirror", "drive-mirror",
                    "blockdev-snapshot-sync"):
        def look(qmp, command=command):
            s = schema(qmp)
            arguments = s.by_name[s.by_name[command]["arg-type"]]
            found = {}
            for member in arguments["members"]:
                if member["name"] in want:
                    entry = s.by_name[member["type"]]
                    values = entry.get("values") or [m["name"] for m in entry["members"]]
                    found[member["name"]] = [v for v in want[member["name"]] if v in values]
            return found
        t.qmp_value(f"enums-{command}", look)

    def completion(qmp):
        s = schema(qmp)
        arguments = s.by_name[s.by_name["transaction"]["arg-type"]]
        properties = next(m["type"] for m in arguments["members"] if m["name"] == "properties")
        mode = next(m["type"] for m in s.by_name[properties]["members"]
                    if m["name"] == "completion-mode")
        return sorted(s.by_name[mode]["values"])
    t.qmp_value("enums-completion-mode", completion)


@sequence()
def schema_is_well_formed(t):
    """Each type that is named is there, and nothing is there twice."""
    def look(qmp):
        entries = qmp.call("query-qmp-schema")["return"]
        names = [e["name"] for e in entries]
        known = set(names)
        used = set()
        for entry in entries:
            used |= {entry[k] for k in ("arg-type", "ret-type", "element-type") if k in entry}
            used |= {m["type"] for m in entry.get("members", []) if "type" in m}
            used |= {v["type"] for v in entry.get("variants", [])}
        return {"twice": len(names) - len(known), "unknown": sorted(used - known)}
    t.qmp_value("well-formed", look)
