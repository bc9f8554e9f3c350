"""What is chance, or each daemon's own, and is taken out before two records are compared.

    timestamps            removed
    x-tidemark-*          removed: members that QEMU does not have
    versions              numbers and packages become "VERSION"
    #block123             becomes #block
    the directory         $DIR, in any string;  the free port: $PORT
    the program's name    PROG, in what it says on stderr
    measured times        *_ns and actual-size become "#"
    virtual-size          "#" for the file below a qcow2 image: where the clusters lie is free
    order of members      (the comparison is by name)
    order of lists        lists of named things are sorted by their names
"""

import os
import re

MEASURED = re.compile(r"(_time_ns|_time$|^idle_time_ns$|^actual-size$|^wr_highest_offset$)")
SORTED_BY = {
    "query-commands": "name",
}


def text(string, where):
    return string.replace(str(where), "$DIR")


def glob(pattern):
    """Only * is special."""
    return re.compile("".join(".*" if c == "*" else re.escape(c) for c in pattern) + r"\Z")


def masked(value, patterns, path=""):
    """VALUE with "#" for each leaf whose path matches one of the patterns."""
    if not patterns:
        return value
    if isinstance(value, dict):
        return {k: masked(v, patterns, f"{path}.{k}" if path else k) for k, v in value.items()}
    if isinstance(value, list):
        return [masked(v, patterns, f"{path}[{i}]") for i, v in enumerate(value)]
    return "#" if any(glob(p).match(path) for p in patterns) else value


class Scrubber:
    def __init__(self, where, binary, port, mask):
        self.where, self.port, self.mask = str(where), port, mask
        self.program = os.path.basename(binary)
        self.binary = binary

    def __call__(self, value):
        return masked(self._walk(value, None), self.mask)

    def _walk(self, value, key):
        if isinstance(value, dict):
            if "QMP" in value and "version" in value["QMP"]:
                return {"QMP": {"version": shape(value["QMP"]["version"]),
                                "capabilities": sorted(value["QMP"].get("capabilities", []))}}
            if set(value) == {"qemu", "package"}:
                return shape(value)
            if value.get("format") == "file" and str(value.get("filename", "")).endswith(".qcow2"):
                # How long a qcow2 image's file is: where its clusters lie is each daemon's affair.
                value = {**value, "virtual-size": "#"}
            return {k: self._walk(v, k) for k, v in value.items()
                    if k != "timestamp" and not k.startswith("x-tidemark-")}
        if isinstance(value, list):
            return [self._walk(v, key) for v in value]
        if key and MEASURED.search(key) and isinstance(value, int):
            return "#"
        if isinstance(value, str):
            value = value.replace(self.where, "$DIR")
            value = re.sub(r"#block\d+", "#block", value)
            if key == "stderr":
                value = value.replace(self.binary, "PROG")
                value = re.sub(rf"^{re.escape(self.program)}: ", "PROG: ", value, flags=re.M)
                value = re.sub(r"^PROG: GLib: .*\n\s*", "", value, flags=re.M)   # its own trouble
            if self.port is not None:
                value = re.sub(rf"\b{self.port}\b", "$PORT", value)
        return value


def shape(value):
    """A value's shape: its members and the kinds of its leaves."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shape(v) for v in value]
    return type(value).__name__


def subject(event):
    """Whose event it is: the job's, the export's, the node's."""
    data = event.get("data", {})
    return str(data.get("id") or data.get("device") or data.get("node-name") or "")


def label(event):
    """What stands for an event when two lists are laid side by side."""
    status = event.get("data", {}).get("status")
    return event["event"] + (f":{status}" if status else "")


PAUSES = {"JOB_STATUS_CHANGE:paused": "JOB_STATUS_CHANGE:running",
          "JOB_STATUS_CHANGE:standby": "JOB_STATUS_CHANGE:ready"}


def events_by_subject(events, scrub, pauses):
    """{subject: [(label, data), ...]}; a short pause of a job is left out unless PAUSES. Even then
    qemu-storage-daemon's own at the start of a job is left out, which is its filter's insertion."""
    found = {}
    for event in events:
        clean = scrub(event)
        found.setdefault(scrub._walk(subject(event), None), []).append(
            (label(clean), masked(clean.get("data", {}), scrub.mask, event["event"])))
    for name, listed in found.items():
        if not pauses or scrub.program.startswith("qemu-storage-daemon"):
            found[name] = without_pauses(listed, all_of_them=not pauses)
    return found


def without_pauses(listed, all_of_them):
    """Without paused-and-on-again; or only without the one right after a job's start, which is the
    filter's insertion."""
    kept, skip, done = [], None, False
    for entry in listed:
        if entry[0] == "JOB_STATUS_CHANGE:created":     # another job of the same name
            skip, done = None, False
        first = not done and len(kept) >= 2 and kept[-2][0] == "JOB_STATUS_CHANGE:created"
        if entry[0] in PAUSES and (all_of_them or first):
            skip, done = PAUSES[entry[0]], True
        elif skip and entry[0] == skip:
            skip = None
        else:
            kept.append(entry)
    return kept
