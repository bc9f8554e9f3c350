"""What the documentation says is so: README's session, the options in the man page."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

from tidemark_testlib import run_to_exit

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMPLETION = ROOT / "completions" / "tidemarkd"


class Session:
    """README's blocks, in their order: a daemon whose terminal is ours, and its guest."""

    def __init__(self, binary, tmp):
        self.tmp = tmp
        (tmp / "bin").mkdir()
        (tmp / "bin" / "tidemarkd").symlink_to(os.path.abspath(binary))
        self.env = dict(os.environ, PATH=f"{tmp / 'bin'}:/usr/bin:/bin")
        self.daemon = None
        self.out = tmp / "terminal"
        self.returns = self.jobs = 0

    def server(self, text):
        lines = text.replace("\\\n", " ").strip().splitlines()
        self.guest("\n".join(lines[:-1]))
        with open(self.out, "wb") as out:
            self.daemon = subprocess.Popen(shlex.split(lines[-1]), cwd=self.tmp, env=self.env,
                                           stdin=subprocess.PIPE, stdout=out, stderr=out)
        self.until(lambda seen: (self.tmp / "nbd.sock").exists() and '"QMP"' in seen)

    def guest(self, text):
        subprocess.run(["bash", "-e", "-c", text], cwd=self.tmp, env=self.env, check=True,
                       stdin=subprocess.DEVNULL, timeout=60)

    def type(self, text):
        self.returns += text.count('"execute"')
        self.jobs += text.count('"job-id"')
        self.daemon.stdin.write(text.encode())
        self.daemon.stdin.flush()
        self.until(lambda seen: seen.count('"return"') >= self.returns and
                   seen.count('"status": "null"') >= self.jobs)

    def until(self, done):
        deadline = time.monotonic() + 30
        while not done(seen := self.out.read_text(errors="replace")):
            assert '"error"' not in seen and time.monotonic() < deadline, seen
            assert self.daemon.poll() is None or '"quit"' in seen or done(seen), seen
            time.sleep(0.02)


def test_the_first_session_of_the_readme(tidemarkd, tmp):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(sh server|sh guest|json)\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 7
    session = Session(tidemarkd, tmp)
    try:
        for kind, block in blocks:
            {"sh server": session.server, "sh guest": session.guest,
             "json": session.type}[kind](block)
            if '"quit"' in block:
                assert session.daemon.wait(30) == 0
    finally:
        if session.daemon:
            session.daemon.kill()
    events = [json.loads(line) for line in session.out.read_text().splitlines()
              if "BLOCK_JOB_COMPLETED" in line]
    assert [e["data"]["len"] >> 20 for e in events] == [1024, 1]
    info = subprocess.run(["qemu-img", "info", tmp / "disk.qcow2"], capture_output=True, text=True,
                          check=True).stdout
    assert "name: tide" in info and "in-use" not in info
    same = subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw",
                           tmp / "monday.qcow2", tmp / "restored.raw"], check=False)
    assert same.returncode == 0


def test_man_page_and_completion_name_every_option(tidemarkd):
    status, out, _ = run_to_exit("--help", binary=tidemarkd)
    assert status == 0
    options = set(re.findall(r"--[a-z][a-z-]+", out))
    assert {"--blockdev", "--export", "--nbd-server"} <= options
    manual = (ROOT / "man" / "tidemarkd.1").read_text().replace("\\-", "-")
    completion = COMPLETION.read_text()
    assert [o for o in options if o not in manual] == []
    assert [o for o in options if o not in completion] == []


def test_man_page_names_every_driver_and_object_type(daemon):
    schema = {e["name"]: e for e in daemon().qmp.execute("query-qmp-schema")}
    manual = (ROOT / "man" / "tidemarkd.1").read_text().replace("\\-", "-")
    for command, option in (("blockdev-add", "--blockdev"), ("object-add", "--object")):
        text = re.search(rf'^\.BR {option} .*?^\.TP$', manual, re.M | re.S).group(0)
        names = {v["case"] for v in schema[schema[command]["arg-type"]]["variants"]}
        assert len(names) > 2
        assert [n for n in names if not re.search(rf"(?<![\w-]){n}(?![\w-])", text)] == []


def test_testing_md_names_every_variable():
    """Of those that tests and scripts look at."""
    looks = re.compile(r'(?:getenv\(|number\(|environ\.get\(|environ\[)"((?:TEST|TIDEMARK)\w*)"'
                       r'|\$\{((?:TEST|TIDEMARK)_\w+)[-:}]')
    found = set()
    for top in ("src/rt", "tests", "scripts"):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and path.suffix in (".c", ".h", ".py", ""):
                found |= {a or b for a, b in looks.findall(path.read_text(errors="replace"))}
    assert {"TEST_SEED", "TIDEMARK_LOOP", "TIDEMARK_TEST_SECONDS"} <= found
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "testing.md").read_text()))
    assert sorted(found - documented) == []


def complete(*words):
    script = f"""
        source {COMPLETION}
        compopt() {{ :; }}
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        _tidemarkd && printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True,
                          check=True)
    return done.stdout.split()


def test_completion():
    assert complete("tidemarkd", "--bl") == ["--blockdev"]
    assert "driver=qcow2,node-name=" in complete("tidemarkd", "--blockdev", "")
    assert complete("tidemarkd", "--chardev", "so") == ["socket,id="]


def test_the_demo(tidemarkd):
    """Done when (a), as a user sees it: each promise is a line."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "system" / "demo.py"],
                          env=dict(os.environ, TIDEMARK=tidemarkd), capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    promises = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(promises) == 8, done.stdout
