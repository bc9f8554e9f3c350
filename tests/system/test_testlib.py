"""The plumbing itself, tried on qemu-storage-daemon: it must work before it judges us."""

import _thread
import os
import pathlib
import shutil
import subprocess
import threading

import pytest
from tidemark_testlib import (
    QSD, Daemon, Exited, QMPError, Timeout, check_image, compare, connect, create_image, nbd_uri,
    qemu_io, sha256_of,
)
from tidemark_testlib.child import Child
from tidemark_testlib.nbd import extents

pytestmark = pytest.mark.skipif(not shutil.which(QSD), reason="qemu-storage-daemon not installed")


def qcow2(path, node="disk"):
    return f"qcow2,node-name={node},file.driver=file,file.filename={path}"


def test_a_daemon_starts_answers_and_stops(tmp):
    image = create_image(tmp / "a.qcow2", size="1M")
    with Daemon("--blockdev", qcow2(image), binary=QSD, directory=tmp) as d:
        nodes = d.qmp.execute("query-named-block-nodes", flat=True)
        assert "disk" in [n["node-name"] for n in nodes]
        d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b")
        assert d.qmp.bitmaps("disk")["b"]["count"] == 0
        with pytest.raises(QMPError, match="already exists"):
            d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b")
        d.stop("quit")


def test_a_daemon_that_does_not_start_says_why(tmp):
    with pytest.raises(Exited) as caught:
        Daemon("--blockdev", "nosuchdriver,node-name=x", binary=QSD, directory=tmp)
    assert caught.value.status == 1
    assert "nosuchdriver" in caught.value.stderr


def test_a_job_is_waited_for_and_a_missing_event_is_a_timeout(tmp):
    a = create_image(tmp / "a.qcow2", size="4M")
    b = create_image(tmp / "b.qcow2", size="4M")
    qemu_io(a, "write -P 7 1M 1M", fmt="qcow2")
    with Daemon("--blockdev", qcow2(a, "a"), "--blockdev", qcow2(b, "b"), binary=QSD,
                directory=tmp) as d:
        done = d.qmp.run_job("blockdev-backup", "j", device="a", target="b", sync="full")
        assert done["len"] == done["offset"]
        with pytest.raises(Timeout):
            d.qmp.wait_event("NOSUCH", timeout=0.1)
    assert compare(a, b)
    assert sha256_of(a) == sha256_of(b)
    assert check_image(b)["corruptions"] == 0


def test_nbd(tmp):
    image = create_image(tmp / "a.qcow2", size="4M")
    sock = tmp / "nbd.sock"
    with Daemon("--blockdev", qcow2(image), "--nbd-server", f"addr.type=unix,addr.path={sock}",
                "--export", "nbd,id=e,node-name=disk,name=x,writable=on", binary=QSD,
                directory=tmp):
        handle = connect(nbd_uri(sock, "x"), ["base:allocation"])
        handle.pwrite(b"x" * 65536, 65536)
        assert extents(handle, "base:allocation") == [
            (0, 65536, 3), (65536, 65536, 0), (131072, (4 << 20) - 131072, 3)]
        handle.shutdown()


def test_a_child_of_a_thread_that_python_did_not_start_ends_well(capfd):
    ended, codes = threading.Event(), []

    def start():
        threading.current_thread()  # makes the _DummyThread
        for work in (lambda: 0, lambda: 1 // 0):
            child = Child(work, ())
            child.start()
            child.join(30)
            codes.append(child.exitcode)
        ended.set()
    _thread.start_new_thread(start, ())
    assert ended.wait(60)
    assert codes == [0, 1]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_file_system_that_is_not_allowed_does_not_vanish(tmp):
    """Where nothing may be mounted the tests of a full file system are skipped, or, as in
    scripts/check, fail; never pass."""
    (tmp / "unshare").write_text("#!/bin/sh\necho none of that >&2\nexit 1\n")
    (tmp / "unshare").chmod(0o755)
    for require, word in (("", "1 skipped"), ("small_fs", "1 failed")):
        env = dict(os.environ, PATH=f"{tmp}:{os.environ['PATH']}", TIDEMARK_REQUIRE=require)
        done = subprocess.run(
            ["/usr/bin/python3", "-B", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
             pathlib.Path(__file__).with_name("test_outcomes.py"), "-k", "test_ignore_when_full"],
            env=env, capture_output=True, text=True, check=False)
        assert word in done.stdout and "none of that" in done.stdout, done.stdout + done.stderr
        assert (done.returncode == 0) == (word == "1 skipped")
    check = (pathlib.Path(__file__).parents[2] / "scripts" / "check").read_text()
    assert "export TIDEMARK_REQUIRE=small_fs" in check
