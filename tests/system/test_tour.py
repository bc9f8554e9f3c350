"""docs/qmp-tour.md and docs/surviving.md are so: every block is run, in its order, and what comes is
what is written.

A page is one story, with one directory, one shell, one daemon at a time. transcript.py says how
its blocks are read. A page with one value altered must not pass: that is tried with each of them,
on what the run has brought.
"""

import copy
import os
import pathlib
import re
import shlex
import subprocess
import time

import pytest
from tidemark_testlib import QMP, Timeout
from tidemark_testlib import transcript
from tidemark_testlib.daemon import SANITIZER_MARKS
from tidemark_testlib.transcript import ANY, REST, Recorded, Wrong, judge, judge_output

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# And how many alterations of it are tried at least.
PAGES = {"qmp-tour.md": 500, "surviving.md": 250}
PICTURES = ("text",)


class Live(Recorded):
    """What a daemon brings, as it comes; all of it is kept in .seen."""

    def __init__(self, qmp):
        super().__init__([], [])
        self.qmp = qmp
        self.seen = ([], [])

    def answer(self):
        try:
            self.seen[0].append(self.qmp.next_answer())
        except (Timeout, EOFError) as error:
            raise Wrong(str(error)) from None
        return self.seen[0][-1]

    def event(self, whose):
        deadline = time.monotonic() + self.qmp.timeout
        while True:
            self._take()
            try:
                return super().event(whose)
            except Wrong as none:
                if self.qmp.eof or time.monotonic() > deadline:
                    raise Wrong(f"{none}; {self.events}") from None
            self.qmp.pump(0.2)

    def _take(self):
        new = self.qmp.events[:]
        del self.qmp.events[:len(new)]
        self.events += new
        self.seen[1].extend(new)

    def rest(self):
        """What has come and was not asked for; a round trip, so that it has come."""
        try:
            self.qmp.send_text('{"execute": "query-version", "id": "the end"}')
            self.qmp.answer("the end")
        except (EOFError, BrokenPipeError):
            pass
        self._take()
        while self.qmp._answers:
            self.answers.append(self.qmp._answers.pop(0))
            self.seen[0].append(self.answers[-1])
        return super().rest()


class Story:
    """Runs blocks: a shell, and a daemon that the shell's lines start."""

    def __init__(self, binary, tmp):
        self.tmp = tmp
        (tmp / "bin").mkdir()
        (tmp / "bin" / "tidemarkd").symlink_to(os.path.abspath(binary))
        self.env = dict(os.environ, PATH=f"{tmp / 'bin'}:/usr/bin:/bin", LC_ALL="C")
        self.shell = subprocess.Popen(["bash"], cwd=tmp, env=self.env, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.daemon = self.qmp = None
        self.record = []        # (exchange, answers, events) or (command, status, printed)

    def play(self, block):
        """Runs a block and judges it."""
        if block.kind == "qmp":
            for exchange in transcript.exchanges(block):
                self._exchange(exchange)
        elif block.kind == "console":
            for command in transcript.commands(block):
                self._command(command)
        elif block.kind not in PICTURES or re.search(r"->|<-|^\$ |[{}]", block.text, re.M):
            raise Wrong(f"line {block.line}: nobody runs a block of '{block.kind}'")

    def _exchange(self, exchange):
        if "QMP" in exchange.wants[0]:
            if self.qmp:
                self.qmp.close()
            self.qmp = QMP(self.tmp / "qmp.sock", negotiate=False)
        if exchange.send:
            self.qmp.send_text(exchange.send)
        live = Live(self.qmp)
        try:
            judge(exchange, live)
        finally:
            self.record.append((exchange, *live.seen))

    def _command(self, command):
        if command.text.startswith("tidemarkd "):
            return self._start(command)
        out = self.tmp / "printed"
        self.shell.stdin.write(f"{{ {command.text}\n}} >{out} 2>&1 </dev/null; echo $?\n")
        self.shell.stdin.flush()
        status = int(self.shell.stdout.readline())
        self.record.append((command, status, out.read_text()))
        return judge_output(*self.record[-1])

    def _start(self, command):
        """The daemon's own line, which ends with '&'."""
        self.ended()
        *argv, ampersand = shlex.split(command.text.replace("\\\n", " "))
        assert ampersand == "&"
        # Who reads takes less than two seconds from a write to a kill; a machine may stall for longer.
        argv = [re.sub(r"(x-tidemark-persist\.)runtime-directory=run$", r"\g<0>,\1checkpoint-idle=0", a)
                for a in argv]
        with open(self.tmp / "daemon.log", "ab") as log:
            self.daemon = subprocess.Popen(argv, cwd=self.tmp, env=self.env, stdout=log, stderr=log,
                                           stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (self.tmp / "tidemarkd.pid").exists():
            assert self.daemon.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.01)
        self.record.append((command, 0, ""))

    def log(self):
        return (self.tmp / "daemon.log").read_text(errors="replace")

    def ended(self):
        """The daemon, if there was one, has been asked to end, and has ended well."""
        if self.daemon:
            assert self.daemon.wait(30) in (0, -9), self.log()
            assert not any(mark in self.log() for mark in SANITIZER_MARKS), self.log()
            self.daemon = None

    def close(self):
        if self.daemon:
            self.daemon.kill()
            self.daemon.wait()
        self.shell.kill()
        self.shell.communicate()


@pytest.fixture
def story(tidemarkd, tmp):
    running = Story(tidemarkd, tmp)
    yield running
    running.close()


def without_one(value):
    """VALUE with one of what is in it altered, or left out, each in turn."""
    if isinstance(value, dict):
        for key in value:
            rest = {k: v for k, v in value.items() if k != key}
            if (key == REST or REST not in value) and key != "timestamp":
                yield rest
            for other in without_one(value[key]) if key != REST else ():
                yield {**value, key: other}
    elif isinstance(value, list):
        for i, one in enumerate(value):
            if one != REST:
                yield from (value[:i] + [other] + value[i + 1:] for other in without_one(one))
        yield [*value[:-1], {"nosuch": 1}] if value and value[-1] == REST else value + [1]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif value != ANY:
        yield value + "x"


def altered(exchange):
    """The exchange written wrongly, in each way that there is."""
    def other(wants, gap=exchange.gap):
        one = copy.copy(exchange)
        one.wants, one.gap = wants, gap
        return one
    for i, want in enumerate(exchange.wants):
        for wrong in without_one(want):
            yield other(exchange.wants[:i] + [wrong] + exchange.wants[i + 1:])
        if not (exchange.gap and transcript.is_status(want)):
            yield other(exchange.wants[:i] + exchange.wants[i + 1:])
        for j in range(i):
            before = exchange.wants[j]
            if transcript.is_event(want) and transcript.is_event(before) and \
                    transcript.subject(want) == transcript.subject(before):
                swapped = list(exchange.wants)
                swapped[i], swapped[j] = before, want
                yield other(swapped)
    if exchange.gap:
        yield other(exchange.wants, False)


def altered_output(command):
    """What a command prints, each line wrong or missing, one more."""
    lines = command.prints.splitlines(keepends=True)
    for i, line in enumerate(lines):
        for wrong in ([], ["x" + line], [re.sub(r"(\w)(\W*)$", r"\1x\2", line)]):
            one = copy.copy(command)
            one.prints = "".join(lines[:i] + wrong + lines[i + 1:])
            if one.prints != command.prints and line.strip() != "...":
                yield one
    one = copy.copy(command)
    one.prints += "x\n"
    yield one


def passes(step, first, second):
    try:
        if isinstance(step, transcript.Command):
            judge_output(step, first, second)
        else:
            judge(step, Recorded(first, second))
    except Wrong:
        return False
    return True


@pytest.mark.parametrize("name", PAGES)
def test_a_page(story, name):
    """All blocks, then the same with each value altered: none of these may pass."""
    text = (DOCS / name).read_text()
    assert transcript.dead_links(text) == []
    page = transcript.blocks(text)
    for block in page:
        story.play(block)
    story.ended()
    steps = {step.line for step, *_ in story.record}
    for block in page:
        inside = range(block.line, block.line + block.text.count("\n") + 1)
        assert block.kind in PICTURES or steps.intersection(inside), f"line {block.line}: not run"
    tried = 0
    for step, first, second in story.record:
        assert passes(step, first, second), step.line
        wrong = altered_output if isinstance(step, transcript.Command) else altered
        for one in wrong(step):
            assert not passes(one, first, second), (step.line, vars(one), first, second)
            tried += 1
    assert tried > PAGES[name]


WRONG_PAGES = (
    "```qmp\n-> {\"execute\": \"quit\"}\n",                             # does not end
    "```json\n{}\n```\n",                                               # nobody runs it
    "    -> {\"execute\": \"quit\"}\n",                                 # not fenced
    "~~~qmp\n-> {\"execute\": \"quit\"}\n~~~\n",
    "```text\n-> {\"execute\": \"quit\"}\n```\n",                       # called a picture
    "```text\n{\"execute\": \"quit\"}\n```\n",
    "    {\"execute\": \"quit\"}\n",
    "```qmp\n{\"execute\": \"quit\"}\n```\n",                           # neither sent nor received
    "```qmp\n-> {\"execute\": \"quit\"}\n```\n",                        # without a reply
    "```qmp\n-> {\"execute\": \"quit\"}\n...\n<- {\"return\": {}}\n```\n",   # '...' without an end
    "```console\nhello\n```\n",                                         # no command
    "```console\n$ echo hello\n```\n",                                  # prints what is not shown
    "```console\n$ echo hello\nhallo\n```\n",
    "```console\n$ false\n```\n",
)


@pytest.mark.parametrize("page", WRONG_PAGES)
def test_a_wrong_page(story, page):
    """A page that is not as it should be does not pass."""
    with pytest.raises(Wrong):
        for block in transcript.blocks(page):
            story.play(block)


def test_patterns():
    """`...` stands for what it should, and nothing else does."""
    pattern, difference = transcript.pattern, transcript.difference
    some = pattern('{"a": ..., "b": ["...", ...], "c": {"d": 1, ...}}')
    assert difference(some, {"a": [1], "b": ["...", 2, 3], "c": {"d": 1, "e": 2}}) is None
    assert difference(some, {"a": 1, "b": ["..."], "c": {"d": 1}}) is None
    assert difference(some, {"b": ["..."], "c": {"d": 1}}) == ".a has not come"
    assert difference(some, {"a": 1, "b": ["x"], "c": {"d": 1}}) == '.b[0] is "x", not "..."'
    assert difference(some, {"a": 1, "b": ["..."], "c": {"d": True}}) == ".c.d is true, not 1"
    assert difference(pattern('{"return": {}}'), {"return": {}, "id": 1}) == ".id is 1 and not shown"
    assert difference(pattern("[1]"), [1, 2]) and difference(pattern("[1, 2]"), [1])
