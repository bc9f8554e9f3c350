"""Backups over disks that fail (blkdebug) or are slow (throttle), through the monitor: what the job
says, what the bitmap keeps, that a second run mends what a failed one left."""

import threading
import time

import nbd
import pytest
from tidemark_testlib import (
    QMPError, check_image, connect, create_image, nbd_uri, qemu_img, qemu_io, wait_until,
)

MiB = 1 << 20
SIZE = 8 * MiB
EIO, ENOSPC = 5, 28
TEXTS = {EIO: "Input/output error", ENOSPC: "No space left on device"}
PLACE = 5 * MiB         # where requests fail


def rule(kind, error=EIO, event="none", **more):
    return {"event": event, "iotype": kind, "errno": error, "sector": PLACE // 512, **more}


class Backup:
    """A source `disk` and a target `t`, either of them over blkdebug, and a bitmap."""

    def __init__(self, daemon, tmp, source=(), target=()):
        self.dir = tmp
        self.source_file = create_image(tmp / "disk.raw", "raw", SIZE)
        qemu_io(self.source_file, *(f"write -P {i + 1} {i}M 1M" for i in range(SIZE // MiB)), fmt="raw")
        create_image(tmp / "t.raw", "raw", SIZE)
        self.daemon = daemon("--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock")
        self.qmp = self.daemon.qmp
        self.open("disk", self.source_file, source)
        self.open("t", tmp / "t.raw", target)

    def open(self, name, path, rules=(), **more):
        file = {"driver": "file", "filename": str(path)}
        if rules or more:
            file = {"driver": "blkdebug", "image": file, **({"inject-error": list(rules)} if rules else {}), **more}
        self.qmp.execute("blockdev-add", driver="raw", node_name=name, file=file)

    def reopen_target(self, rules=(), **more):
        self.qmp.execute("blockdev-del", node_name="t")
        self.open("t", self.dir / "t.raw", rules, **more)

    def begin(self, **arguments):
        self.qmp.events.clear()
        self.qmp.execute("blockdev-backup", **{"job-id": "j", "device": "disk", "target": "t", "sync": "full",
                                               "auto-dismiss": False, **arguments})

    def conclude(self):
        """Waits for the end; the job's error or None."""
        self.qmp.wait_job("j", "concluded")
        error = self.qmp.job("j").get("error")
        self.qmp.execute("job-dismiss", id="j")
        return error

    def wait_io_status(self, status):
        """The stopped job shows it once it has paused."""
        def shown():
            job = self.qmp.execute("query-block-jobs")[0]
            return job["io-status"] == status and job["paused"]
        wait_until(shown)

    def bitmap(self, name="b"):
        return self.qmp.bitmaps("disk")[name]

    def is_complete(self):
        self.daemon.stop()
        return (self.dir / "t.raw").read_bytes() == self.source_file.read_bytes()


POLICIES = ("report", "ignore", "enospc", "stop")


@pytest.mark.parametrize("error", (EIO, ENOSPC))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ("source", "target"))
def test_policies(daemon, tmp, where, policy, error):
    """An error, once, at source or target: the event, the job's fate, and what the target holds."""
    rules = [rule("read" if where == "source" else "write", error, once=True)]
    b = Backup(daemon, tmp, **{where: rules})
    b.begin(**{f"on-{where}-error": policy})
    event = b.qmp.wait_event("BLOCK_JOB_ERROR", device="j")["data"]
    action = {"enospc": "stop" if error == ENOSPC else "report"}.get(policy, policy)
    assert event == {"device": "j", "operation": "read" if where == "source" else "write", "action": action}
    if action == "stop":
        b.wait_io_status("nospace" if error == ENOSPC else "failed")
        b.qmp.execute("block-job-resume", device="j")
    assert b.conclude() == (TEXTS[error] if action == "report" else None)
    assert b.is_complete() == (action != "report")


@pytest.mark.parametrize("command", ("blockdev-backup", "blockdev-mirror"))
def test_ignored_for_ever(daemon, tmp, command):
    """A disk that always fails, at once, and a user who ignores that: the monitor is not flooded (a client
    that does not read for a while is not cut off), and the job can be cancelled."""
    b = Backup(daemon, tmp, source=[{"event": "none", "iotype": "read", "immediately": True}])
    began = time.monotonic()
    b.qmp.execute(command, **{"job-id": "j", "device": "disk", "target": "t", "sync": "full", "auto-dismiss": False,
                              "on-source-error": "ignore"})
    b.qmp.wait_event("BLOCK_JOB_ERROR")
    time.sleep(1)
    b.qmp.execute("job-cancel", id="j")
    b.qmp.wait_job("j", "concluded")
    errors = [e for e in b.qmp.history if e["event"] == "BLOCK_JOB_ERROR"]
    assert len(errors) < 100 * (time.monotonic() - began)
    assert errors[0]["data"] == {"device": "j", "operation": "read", "action": "ignore"}


@pytest.mark.parametrize("mode", ("on-success", "always", "never"))
@pytest.mark.parametrize("where", ("source", "target"))
def test_bitmap_after_failure(daemon, tmp, where, mode):
    """A read or a write that fails leaves the bitmap as its mode says; the next run completes the target.
    (A file system that is full: test_outcomes.py.)"""
    rules = [rule("read" if where == "source" else "write", EIO, once=True)]
    b = Backup(daemon, tmp, **{where: rules})
    b.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=65536)
    b.qmp.execute("block-export-add", type="nbd", id="e", node_name="disk", name="disk", writable=True)
    h = connect(nbd_uri(tmp / "nbd.sock", "disk"))
    h.pwrite(b"x" * SIZE, 0)
    before = b.bitmap()["count"]
    assert before == SIZE
    b.begin(sync="bitmap", bitmap="b", **{"bitmap-mode": mode, "x-perf": {"max-workers": 1}})
    assert b.conclude() == TEXTS[EIO]
    after = b.bitmap()["count"]
    assert not b.bitmap()["busy"]
    if mode == "always":        # what was copied before the failure need not be copied again
        assert SIZE - PLACE <= after < before
    else:
        assert after == before
    h.pwrite(b"y" * 65536, 65536)
    h.shutdown()
    b.qmp.execute("block-export-del", id="e")
    b.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e")
    b.begin(sync="bitmap", bitmap="b", **{"bitmap-mode": mode})
    assert b.conclude() is None
    assert b.bitmap()["count"] == (before if mode == "never" else 0)
    assert b.is_complete()


def test_stop_again_and_cancel(daemon, tmp):
    """A job that is resumed into the same error stops again, and can then be cancelled."""
    b = Backup(daemon, tmp, target=[rule("write", ENOSPC)])
    b.begin(**{"on-target-error": "enospc"})
    for _ in range(3):
        b.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
        b.wait_io_status("nospace")
        b.qmp.events.clear()
        b.qmp.execute("block-job-resume", device="j")
    b.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    b.wait_io_status("nospace")
    b.qmp.execute("block-job-cancel", device="j", force=True)
    b.conclude()


def test_failed_copy_before_write(daemon, tmp):
    """The guest's write needs the old data saved, and that fails: the guest is told (QEMU's default,
    break-guest-write), nothing was written, other places work; the job fails there, too."""
    b = Backup(daemon, tmp, target=[rule("write", ENOSPC)])
    b.qmp.execute("block-export-add", type="nbd", id="e", node_name="disk", name="disk", writable=True)
    h = connect(nbd_uri(tmp / "nbd.sock", "disk"))
    b.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=65536)
    b.begin(sync="full", bitmap="b", speed=65536, **{"bitmap-mode": "on-success"})
    with pytest.raises(nbd.Error, match="No space left on device"):
        h.pwrite(b"n" * 512, PLACE)
    assert h.pread(512, PLACE) == bytes([PLACE // MiB + 1]) * 512
    h.pwrite(b"n" * 512, 6 * MiB)
    b.qmp.execute("block-job-set-speed", device="j", speed=0)
    assert b.conclude() == TEXTS[ENOSPC]
    assert 65536 <= b.bitmap()["count"] <= 2 * 65536
    h.shutdown()


@pytest.mark.parametrize("event", (
    "cluster_alloc", "l2_load", "l2_update", "l1_update", "refblock_update_part", "write_aio", "flush_to_disk",
    "refblock_alloc"))
def test_target_qcow2_metadata(daemon, tmp, event):
    """A qcow2 target whose writing fails from some moment on: the job fails, or the target is whole;
    the image is never corrupt; the next backup works."""
    source = create_image(tmp / "disk.raw", "raw", SIZE)
    qemu_io(source, f"write -P 7 0 {SIZE}", fmt="raw")
    target = create_image(tmp / "t.qcow2", size=SIZE)
    d = daemon("--blockdev", f"raw,node-name=disk,file.driver=file,file.filename={source}")
    file = {"driver": "file", "filename": str(target)}
    d.qmp.execute("blockdev-add", driver="qcow2", node_name="t",
                  file={"driver": "blkdebug", "image": file,
                        "inject-error": [{"event": event, "iotype": "flush" if "flush" in event else "write",
                                          "errno": ENOSPC, "once": True}]})
    arguments = {"device": "disk", "target": "t", "sync": "full", "auto-dismiss": False}
    d.qmp.execute("blockdev-backup", **{**arguments, "job-id": "j"})
    d.qmp.wait_job("j", "concluded")
    error = d.qmp.job("j").get("error")
    assert error in (None, TEXTS[ENOSPC])
    d.qmp.execute("job-dismiss", id="j")
    d.qmp.execute("blockdev-del", node_name="t")
    found = check_image(target)
    assert not found.get("corruptions"), found
    if error is None:
        qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target)
    d.qmp.execute("blockdev-add", driver="qcow2", node_name="t", file=file)
    d.qmp.execute("blockdev-backup", **{**arguments, "job-id": "k"})
    d.qmp.wait_job("k", "concluded")
    assert "error" not in d.qmp.job("k")
    d.stop()
    qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target)


def test_delay(daemon, tmp):
    """Our own rule: one write of the target takes half a second, and the job with it."""
    b = Backup(daemon, tmp)
    b.reopen_target(**{"x-tidemark-delay": [{"event": "none", "iotype": "write", "sector": PLACE // 512,
                                             "once": True, "delay-ns": 500_000_000}]})
    began = time.monotonic()
    b.begin()
    assert b.conclude() is None
    assert time.monotonic() - began >= 0.5
    assert b.is_complete()


# -- throttle


def test_guest_keeps_to_the_limit(daemon, tmp):
    """256 KiB a second for writes: 512 KiB take some two seconds. Reads are not held up, not even where
    the next write would have to wait for hours."""
    create_image(tmp / "a.raw", "raw", SIZE)
    d = daemon("--object", "throttle-group,id=g,limits.bps-write=262144",
               "--blockdev", f"throttle,node-name=a,throttle-group=g,file.driver=file,file.filename={tmp}/a.raw",
               "--object", "throttle-group,id=g1,limits.bps-write=1",
               "--blockdev", f"throttle,node-name=b,throttle-group=g1,file.driver=null-co,file.size={SIZE}",
               "--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock",
               "--export", "nbd,id=e,node-name=a,name=a,writable=on",
               "--export", "nbd,id=f,node-name=b,name=b,writable=on")
    h = connect(nbd_uri(tmp / "nbd.sock", "a"))
    began = time.monotonic()
    for at in range(0, MiB // 2, 65536):
        h.pwrite(b"w" * 65536, at)
    assert time.monotonic() - began > 1.2
    slow = connect(nbd_uri(tmp / "nbd.sock", "b"))
    slow.pwrite(b"w" * 65536, 0)
    read = slow.aio_pread(nbd.Buffer(4 * MiB), 0)
    while not slow.aio_command_completed(read):
        assert slow.poll(60000) > 0
    slow.shutdown()
    with pytest.raises(QMPError, match="object 'g' is in use, can not be deleted"):
        d.qmp.execute("object-del", id="g")
    h.shutdown()


def test_slow_target_and_guest(daemon, tmp):
    """A backup to a slow target while the guest writes: it is the disk at its instant, and the bitmap
    has what came later."""
    source = create_image(tmp / "disk.raw", "raw", SIZE)
    qemu_io(source, f"write -P 7 0 {SIZE}", fmt="raw")
    before = source.read_bytes()
    create_image(tmp / "t.raw", "raw", SIZE)
    d = daemon("--object", "throttle-group,id=g,limits.bps-write=4194304",
               "--blockdev", f"raw,node-name=disk,file.driver=file,file.filename={source}",
               "--blockdev", f"throttle,node-name=t,throttle-group=g,file.driver=file,file.filename={tmp}/t.raw",
               "--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock",
               "--export", "nbd,id=e,node-name=disk,name=disk,writable=on")
    d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=65536)
    began = time.monotonic()
    d.qmp.execute("blockdev-backup", **{"job-id": "j", "device": "disk", "target": "t", "sync": "full",
                                        "bitmap": "b", "bitmap-mode": "on-success", "auto-dismiss": False})
    h = connect(nbd_uri(tmp / "nbd.sock", "disk"))
    for at in range(0, SIZE, MiB):
        h.pwrite(b"g" * 4096, at)
    d.qmp.wait_job("j", "concluded", timeout=60)
    assert time.monotonic() - began > 1
    assert "error" not in d.qmp.job("j")
    assert d.qmp.bitmaps("disk")["b"]["count"] == SIZE // MiB * 65536
    h.shutdown()
    d.stop()
    assert (tmp / "t.raw").read_bytes() == before


def test_the_end_does_not_wait_for_limits(daemon, tmp):
    """A byte a second would hold a guest's write for days; SIGTERM does not wait for it."""
    create_image(tmp / "a.raw", "raw", SIZE)
    d = daemon("--object", "throttle-group,id=g,limits.bps-total=1",
               "--blockdev", f"throttle,node-name=a,throttle-group=g,file.driver=file,file.filename={tmp}/a.raw",
               "--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock",
               "--export", "nbd,id=e,node-name=a,name=a,writable=on")
    h = connect(nbd_uri(tmp / "nbd.sock", "a"))
    writer = threading.Thread(target=_write_or_not, args=(h,))
    h.pwrite(b"1" * 4096, 0)
    writer.start()
    time.sleep(0.3)
    d.stop()
    writer.join()


def _write_or_not(h):
    try:
        h.pwrite(b"2" * 4096, 4096)
    except Exception:   # the connection went with the daemon
        pass
