"""Transcripts in documentation: what is sent, typed, answered and printed; parsed and judged.

    ```qmp                                          ```console
    -> {"execute": "query-jobs"}                    $ qemu-img create -q -f qcow2 \\
    <- {"return": [{"id": "b0", ...}]}                  disk.qcow2 16M
    ```                                             ```

In a reply or event `...` in a value's place is any value, at the end of an object or a list any
more members. A line `...` says that the exchange (from one `->` to the next) has brought
JOB_STATUS_CHANGE events that are not shown; without it every event is shown. Events of one job come
in the order shown; two jobs' events may be interleaved otherwise, and an event may come before the
reply. An event's `timestamp` need not be shown. In what a command prints, `...` is any text within
the line.
"""

import json
import re

ANY, REST = "\0any", "\0rest"
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\.\.\.|[{}\[\]:,]')


class Wrong(Exception):
    """The document is not as it should be, or not what came."""


# -- the document


class Block:
    """One fenced block: its language, its text, the line that it begins in."""

    def __init__(self, kind, text, line):
        self.kind, self.text, self.line = kind, text, line


class Exchange:
    """What is sent (None: nothing), and the replies and events that it brings."""

    def __init__(self, line, send=None):
        self.line, self.send = line, send
        self.wants = []     # parsed, in order
        self.gap = False    # there is a line `...`


class Command:
    """A shell command and what it prints."""

    def __init__(self, line, text):
        self.line, self.text, self.prints = line, text, ""


def blocks(document):
    """Every fenced block of a Markdown document."""
    found, kind, begun, text = [], None, 0, []
    for number, line in enumerate(document.splitlines(), 1):
        if kind is None and line.startswith("```"):
            kind, begun, text = line[3:].strip(), number, []
        elif kind is not None and line == "```":
            found.append(Block(kind, "\n".join(text) + "\n", begun))
            kind = None
        elif kind is not None:
            text.append(line)
        elif re.search("```|~~~|<pre", line) or re.match(r"(    |\t).*(->|<-|\$ |[{}])", line):
            raise Wrong(f"line {number}: a block that is not fenced at the margin")
    if kind is not None:
        raise Wrong(f"line {begun}: this block does not end")
    return found


def dead_links(document):
    """Links within the page that lead nowhere."""
    headings = re.findall(r"^#+ (.*)$", document, re.M)
    places = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    return [link for link in re.findall(r"\]\(#([^)]*)\)", document) if link not in places]


def exchanges(block):
    """The exchanges of a qmp block."""
    found = []
    pieces = re.split(r"^(->|<-|\.\.\.$)", block.text, flags=re.M)
    if pieces[0].strip():
        raise Wrong(f"line {block.line + 1}: neither '->' nor '<-'")
    number = block.line + 1
    for arrow, text in zip(pieces[1::2], pieces[2::2]):
        if arrow == "->":
            json.loads(text)        # what is sent is JSON as it stands
            found.append(Exchange(number, text.strip()))
        else:
            if not found:
                found.append(Exchange(number))
            if arrow == "<-":
                found[-1].wants.append(pattern(text))
            elif text.strip():
                raise Wrong(f"line {number}: text after '...'")
            else:
                found[-1].gap = True
        number += text.count("\n")
    for one in found:
        replies = [w for w in one.wants if not is_event(w)]
        if len(replies) != (1 if one.send or "QMP" in one.wants[0] else 0):
            raise Wrong(f"line {one.line}: a command has one reply, an event none")
        if one.gap and not is_event(one.wants[-1]):
            raise Wrong(f"line {one.line}: '...' needs an event that says where it ends")
    return found


def commands(block):
    """The commands of a console block."""
    found, open_line = [], False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if open_line:
            found[-1].text += "\n" + line
        elif line.startswith("$ "):
            found.append(Command(number, line[2:]))
        elif found:
            found[-1].prints += line + "\n"
        else:
            raise Wrong(f"line {number}: no command before this")
        open_line = line.endswith("\\") and not found[-1].prints
    return found


def pattern(text):
    """JSON with `...` in it, parsed."""
    out, at, last, inside = "", 0, "", []
    for token in TOKEN.finditer(text):
        out += text[at:token.start()]
        at = token.end()
        what = token.group()
        if what == "...":
            if last == ":":
                out += json.dumps(ANY)
            else:
                out += json.dumps(REST) + (": 0" if inside and inside[-1] == "{" else "")
        else:
            out += what
        if what in "{[":
            inside.append(what)
        elif what in "}]":
            inside.pop()
        last = what
    return json.loads(out + text[at:])


# -- judging


def is_event(message):
    return "event" in message


def is_status(message):
    return message.get("event") == "JOB_STATUS_CHANGE"


def subject(event):
    """Whose event it is: events of one subject have an order."""
    data = event.get("data", {})
    if event["event"].startswith("BLOCK_EXPORT"):
        return "export", data.get("id")
    if event["event"].startswith(("JOB_", "BLOCK_JOB_")):
        return "job", data.get("id", data.get("device"))
    return "daemon", None


def difference(want, have, where=""):
    """Where HAVE is not what WANT says, in words; None if it is."""
    if want == ANY:
        return None
    if isinstance(want, dict) and isinstance(have, dict):
        if not where and is_event(want) and "timestamp" not in want:
            have = {key: value for key, value in have.items() if key != "timestamp"}
        for key, value in have.items():
            if key not in want and REST not in want:
                return f"{where}.{key} is {json.dumps(value)} and not shown"
        for key, value in want.items():
            if key == REST:
                continue
            if key not in have:
                return f"{where}.{key} has not come"
            if found := difference(value, have[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(want, list) and isinstance(have, list):
        shown = want[:-1] if want and want[-1] == REST else want
        if len(have) < len(shown) or len(have) > len(shown) and shown is want:
            return f"{where} has {len(have)} members, not {len(shown)}: {json.dumps(have)}"
        for i, value in enumerate(shown):
            if found := difference(value, have[i], f"{where}[{i}]"):
                return found
        return None
    if isinstance(want, bool) is isinstance(have, bool) and want == have:
        return None
    return f"{where} is {json.dumps(have)}, not {json.dumps(want)}"


class Recorded:
    """What an exchange has brought, to be judged (again). A live source has the same functions."""

    def __init__(self, answers, events):
        self.answers, self.events = list(answers), list(events)

    def answer(self):
        if not self.answers:
            raise Wrong("no reply has come")
        return self.answers.pop(0)

    def event(self, whose):
        """The oldest event of that subject."""
        for i, event in enumerate(self.events):
            if subject(event) == whose:
                return self.events.pop(i)
        raise Wrong(f"no event of {whose[0]} {whose[1]} has come")

    def rest(self):
        return self.answers + self.events


def judge(exchange, source):
    """Raises Wrong unless SOURCE brings what is written, and nothing more."""
    try:
        for want in exchange.wants:
            have = source.event(subject(want)) if is_event(want) else source.answer()
            while exchange.gap and is_status(have) and difference(want, have):
                have = source.event(subject(want))
            if found := difference(want, have):
                raise Wrong(f"{found}\nin {json.dumps(have)}")
        for message in source.rest():
            if not (exchange.gap and is_status(message)):
                raise Wrong(f"not shown: {json.dumps(message)}")
    except Wrong as wrong:
        raise Wrong(f"line {exchange.line}: {exchange.send or 'events'}\n{wrong}") from None


def judge_output(command, status, printed):
    """Raises Wrong unless the command has ended well and printed what is written."""
    wanted = "".join(r"[^\n]*" if piece == "..." else re.escape(piece)
                     for piece in re.split(r"(\.\.\.)", command.prints))
    if status != 0 or not re.fullmatch(wanted, printed):
        raise Wrong(f"line {command.line}: {command.text}\nended with status {status} and said\n"
                    f"{printed}instead of\n{command.prints}")
