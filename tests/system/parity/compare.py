"""Two records side by side, and the file `differences`, which says what may differ, and why.

A difference is (sequence, step, path, kind):

    step   the command and its number in the sequence: block-dirty-bitmap-add#3; or events/JOB
    path   where in the answer: error.desc, return[a].dirty-bitmaps[0].count (a list whose
           members have a name is indexed by it), for events their name
    kind   value     both have it, with different values
           missing   only qemu-storage-daemon has it
           extra     only the other one has it
           outcome   one answered, the other failed (or timed out, or died)

A line of `differences` has four patterns, in which * stands for anything, then the reason.
"""

import difflib
import json
import pathlib

from .normal import glob

FILE = pathlib.Path(__file__).resolve().parent / "differences"
NAMES = ("node-name", "id", "name", "device", "job-id", "type", "qdev")


class Difference:
    def __init__(self, sequence, step, path, kind, request, theirs, ours):
        self.sequence, self.step, self.path, self.kind = sequence, step, path, kind
        self.request, self.theirs, self.ours = request, theirs, ours

    def __str__(self):
        lines = [f"{self.sequence}  {self.step}  {self.path}  {self.kind}"]
        if self.request is not None:
            lines.append(f"    step: {json.dumps(self.request)[:600]}")
        if self.kind != "extra":
            lines.append(f"    qemu: {show(self.theirs)}")
        if self.kind != "missing":
            lines.append(f"    ours: {show(self.ours)}")
        return "\n".join(lines)


def show(value):
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) < 1500 else f"{text[:1000]} ... {text[-400:]}"


OUTCOMES = ("return", "error", "TIMEOUT", "monitor", "failed")


def outcome(result):
    """Which kind of result a step brought."""
    if isinstance(result, dict):
        return next((o for o in OUTCOMES if o in result), "other")
    return "other"


def identity(items):
    """The names by which a list's members are told apart, None if there are none."""
    for key in NAMES:
        if items and all(isinstance(i, dict) and isinstance(i.get(key), str) for i in items):
            names = [i[key] for i in items]
            if "drv" in items[0]:       # nodes: those without a name of theirs by what they are
                names = [f"{n}:{i.get('drv')}:{i.get('file')}" if n == "#block" else n
                         for n, i in zip(names, items)]
            if len(set(names)) == len(names):
                return names
    return None


def compare_values(theirs, ours, path):
    """Yields (path, kind, theirs, ours)."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(set(theirs) | set(ours)):
            inner = f"{path}.{key}" if path else key
            if key not in ours:
                yield inner, "missing", theirs[key], None
            elif key not in theirs:
                yield inner, "extra", None, ours[key]
            else:
                yield from compare_values(theirs[key], ours[key], inner)
    elif isinstance(theirs, list) and isinstance(ours, list):
        a, b = identity(theirs), identity(ours)
        if (a and b) or (a and not ours) or (b and not theirs):
            a, b = a or [], b or []
            yield from compare_values(dict(zip(a, theirs)), dict(zip(b, ours)), f"{path}[]")
            common = [name for name in a if name in b]
            other = [name for name in b if name in a]
            if common != other:
                yield f"{path}[order]", "value", common, other
        else:
            for i in range(max(len(theirs), len(ours))):
                inner = f"{path}[{i}]"
                if i >= len(ours):
                    yield inner, "missing", theirs[i], None
                elif i >= len(theirs):
                    yield inner, "extra", None, ours[i]
                else:
                    yield from compare_values(theirs[i], ours[i], inner)
    elif theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
        yield path, "value", theirs, ours


def compare_records(sequence, theirs, ours):
    """All differences of two Records of one sequence."""
    found = []
    their_steps = {s.label: s for s in theirs.steps}
    our_steps = {s.label: s for s in ours.steps}
    for label, step in their_steps.items():
        other = our_steps.get(label)
        if other is None:
            found.append(Difference(sequence, label, "", "missing", step.request, step.result, None))
        elif outcome(step.result) != outcome(other.result):
            found.append(Difference(sequence, label, "", "outcome", step.request, step.result,
                                    other.result))
        else:
            found += [Difference(sequence, label, path, kind, step.request, a, b)
                      for path, kind, a, b in compare_values(step.result, other.result, "")]
    for label, step in our_steps.items():
        if label not in their_steps:
            found.append(Difference(sequence, label, "", "extra", step.request, None, step.result))
    for subject in sorted(set(theirs.events) | set(ours.events)):
        a, b = theirs.events.get(subject, []), ours.events.get(subject, [])
        found += compare_events(sequence, f"events/{subject}", a, b)
    return found


def reference_faults(record):
    """Steps at which the reference crashed or fell silent: the table must not hold such."""
    return [f"{s.label} {show(s.request)}: {show(s.result)}" for s in record.steps
            if isinstance(s.result, dict)
            and ("TIMEOUT" in s.result or "monitor" in s.result or s.label.startswith("died")
                 or "failed" in s.result and not s.label.startswith(("nbd-", "extents"))
                 or (isinstance(s.result.get("exit"), int) and s.result["exit"] < 0
                     and s.request != "kill"))]


def compare_events(sequence, step, a, b):
    found = []
    matcher = difflib.SequenceMatcher(None, [e[0] for e in a], [e[0] for e in b], autojunk=False)
    for op, a0, a1, b0, b1 in matcher.get_opcodes():
        if op == "equal":
            for (name, theirs), (_, ours) in zip(a[a0:a1], b[b0:b1]):
                found += [Difference(sequence, step, f"{name}.{path}", kind, None, x, y)
                          for path, kind, x, y in compare_values(theirs, ours, "")]
        else:
            found += [Difference(sequence, step, name, "missing", None, data, None)
                      for name, data in a[a0:a1]]
            found += [Difference(sequence, step, name, "extra", None, None, data)
                      for name, data in b[b0:b1]]
    return found


class Wanted:
    """A line of `differences`."""

    def __init__(self, number, line):
        words = line.split(None, 4)
        if len(words) < 5:
            raise ValueError(f"{FILE}:{number}: sequence, step, path, kind and reason: {line}")
        self.number, self.line, self.reason = number, line, words[4]
        self.patterns = [glob("" if w == "-" else w) for w in words[:4]]
        self.sequence = words[0]
        self.used = False

    def matches(self, d):
        return all(p.match(v) for p, v in zip(self.patterns, (d.sequence, d.step, d.path, d.kind)))


def read_differences(path=FILE):
    lines = pathlib.Path(path).read_text().splitlines()
    return [Wanted(n, line) for n, line in enumerate(lines, 1)
            if line.strip() and not line.startswith("#")]


def unlisted(found, wanted):
    """The differences that no line allows; marks the lines that were needed."""
    left = []
    for difference in found:
        lines = [w for w in wanted if w.matches(difference)]
        for line in lines:
            line.used = True
        if not lines:
            left.append(difference)
    return left


def unused(wanted, seen, everything):
    """The lines that nothing needed; None when not EVERYTHING was SEEN: only a whole run can tell."""
    return [w for w in wanted if not w.used] if set(seen) >= set(everything) else None
