"""What a backup leaves when it fails or is cancelled, seen from a QMP client: the events, the bitmap
chunk by chunk, the target, and that the next run completes it. The target's file system is really
full. (Every cell of the table: tests/unit/test_outcomes.c.)"""

import json

import nbd
import pytest
from tidemark_testlib import QMPError, check_image, connect, create_image, nbd_uri, qemu_img, qemu_io
from tidemark_testlib.nbd import extents

MiB, CHUNK = 1 << 20, 65536
SIZE = 6 * MiB
NO_SPACE = "No space left on device"
ONE_BY_ONE = {"x-perf": {"max-workers": 1, "max-chunk": CHUNK}}


class Stage:
    """A disk `a` (an overlay, written in full), its bitmap `b` with all of it dirty, a guest, and the
    place for a target in a file system with room for a part of it."""

    def __init__(self, daemon, tmp, fs, fmt="raw", command="blockdev-backup"):
        self.tmp, self.fs, self.fmt, self.command = tmp, fs, fmt, command
        create_image(tmp / "base.raw", "raw", SIZE)
        create_image(tmp / "a.qcow2", size=None, backing_file=tmp / "base.raw", backing_fmt="raw")
        self.make_daemon = daemon
        self.start()
        self.qmp.execute("block-dirty-bitmap-add", node="a", name="b", granularity=CHUNK, persistent=True)
        self.now = bytearray(SIZE)
        for at in range(0, SIZE, CHUNK):
            self.write(at, CHUNK, at // CHUNK % 250 + 1)
        self.then = None
        self.make_target()

    def start(self):
        self.daemon = self.make_daemon(
            "--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={self.tmp}/a.qcow2",
            "--nbd-server", f"addr.type=unix,addr.path={self.tmp}/nbd.sock",
            "--export", "nbd,id=guest,node-name=a,name=guest,writable=on", prefix=self.fs.prefix)
        self.qmp = self.daemon.qmp
        self.guest = connect(nbd_uri(self.tmp / "nbd.sock", "guest"))

    # -- the guest

    def write(self, at, length, byte):
        self.guest.pwrite(bytes([byte]) * length, at)
        self.now[at:at + length] = bytes([byte]) * length

    def dirty(self):
        """The chunks that the bitmap says are dirty."""
        self.qmp.execute("block-export-add", type="nbd", id="look", node_name="a", name="look", writable=True,
                         bitmaps=["b"])
        context = "qemu:dirty-bitmap:b"
        handle = connect(nbd_uri(self.tmp / "nbd.sock", "look"), [context])
        found = {chunk for at, length, flags in extents(handle, context) if flags
                 for chunk in range(at // CHUNK, (at + length + CHUNK - 1) // CHUNK)}
        handle.shutdown()
        self.qmp.execute("block-export-del", id="look", mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="look")
        return found

    # -- the target

    @property
    def file(self):
        return self.fs.path / "t"

    def make_target(self):
        """For drive-backup the command makes it, or it is there from the last run."""
        if self.command == "blockdev-backup":
            create_image(self.fs.outside / "t", self.fmt, SIZE)
            self.open_target()

    def open_target(self):
        if self.command == "blockdev-backup":
            self.qmp.execute("blockdev-add", driver=self.fmt, node_name="t",
                             file={"driver": "file", "filename": str(self.file)})

    def close_target(self):
        if self.command == "blockdev-backup":
            self.qmp.execute("blockdev-del", node_name="t")

    def remake_target(self):
        self.close_target()
        (self.fs.outside / "t").unlink()
        self.make_target()

    def content(self):
        """What the target holds; nobody has it open."""
        raw = self.tmp / "content.raw"
        qemu_img("convert", "-f", self.fmt, "-O", "raw", self.fs.outside / "t", raw)
        return raw.read_bytes()

    # -- the job

    def arguments(self, sync, mode, existing=False, **more):
        arguments = {"device": "a", "job-id": "j", "sync": sync, "bitmap": "b", "bitmap-mode": mode,
                     "auto-dismiss": False, **ONE_BY_ONE, **more}
        if self.command == "blockdev-backup":
            arguments["target"] = "t"
        else:
            arguments.update(target=str(self.file), format=self.fmt, mode="existing" if existing else "absolute-paths")
        return arguments

    def begin(self, sync, mode, **more):
        self.qmp.events.clear()
        self.then = bytes(self.now)
        self.qmp.execute(self.command, **self.arguments(sync, mode, **more))

    def conclude(self):
        """The job's last word: its BLOCK_JOB_ event. It is dismissed."""
        self.qmp.wait_job("j", "concluded")
        job = self.qmp.job("j")
        last = [e for e in self.qmp.history if e["data"].get("device") == "j"
                and e["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")][-1]
        assert job.get("error") == last["data"].get("error", "Operation canceled" if "CANC" in last["event"] else None)
        assert self.qmp.bitmaps("a")["b"]["busy"] is False
        self.qmp.execute("job-dismiss", id="j")
        return last

    def status(self):
        return self.qmp.execute("query-block-jobs")[0]


def chunks(data, other):
    """The chunks in which two disks differ."""
    return {at // CHUNK for at in range(0, SIZE, CHUNK) if data[at:at + CHUNK] != other[at:at + CHUNK]}


ALL = set(range(SIZE // CHUNK))
WAYS = (("full", "on-success"), ("full", "always"), ("top", "on-success"), ("top", "always"),
        ("incremental", "on-success"), ("bitmap", "on-success"), ("bitmap", "always"), ("bitmap", "never"))


COMMANDS = ("blockdev-backup", "drive-backup")


@pytest.mark.parametrize("command,sync,mode,fmt", [
    (command, sync, mode, fmt) for command in COMMANDS for sync, mode in WAYS for fmt in ("raw", "qcow2")
    if (command, sync, fmt) != ("drive-backup", "top", "raw")])     # a raw target takes no backing image
def test_no_space(daemon, tmp, small_fs, command, sync, mode, fmt):
    """A really full file system: the events as documented; the bitmap is what the table says; with
    `always` the same target is completed, else it is made anew and the command repeated."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs, fmt, command)
    fs.fill(leave=3 * MiB)
    st.begin(sync, mode)
    error = st.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    assert error["data"] == {"device": "j", "operation": "write", "action": "report"}
    last = st.conclude()
    assert last["event"] == "BLOCK_JOB_COMPLETED"
    assert 0 < last["data"]["offset"] < SIZE
    assert last["data"] == {"type": "backup", "device": "j", "len": SIZE, "offset": last["data"]["offset"],
                            "speed": 0, "error": NO_SPACE}
    st.write(CHUNK + 512, 512, 0xfe)
    st.close_target()
    if mode == "always":
        left = chunks(st.content(), st.then)
        assert len(left) == (SIZE - last["data"]["offset"]) // CHUNK
        assert st.dirty() == left | {1}
    else:
        assert st.dirty() == ALL
    if fmt == "qcow2":
        assert not check_image(fs.outside / "t")["corruptions"]
    st.open_target()

    fs.make_room()
    again = {}
    if mode == "always":
        sync, again = "bitmap", {"existing": True}
    else:
        st.remake_target()
    st.begin(sync, mode, **again)
    assert "error" not in st.conclude()["data"]
    assert st.dirty() == (ALL if mode == "never" else set())
    st.close_target()
    assert st.content() == st.then


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("policy", ("stop", "enospc"))
def test_stop_when_full(daemon, tmp, small_fs, command, policy):
    """The job pauses with its io-status, guests go on; with room made it resumes where it stopped."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs, "raw", command)
    fs.fill(leave=2 * MiB)
    st.begin("bitmap", "on-success", **{"on-target-error": policy})
    error = st.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    assert error["data"] == {"device": "j", "operation": "write", "action": "stop"}
    st.qmp.wait_job("j", "paused")
    stopped = st.status()
    assert stopped["io-status"] == "nospace" and stopped["paused"] and stopped["status"] == "paused"
    assert 0 < stopped["offset"] < SIZE
    assert st.qmp.bitmaps("a")["b"]["busy"]
    # What has been copied is written at will; of what has not, nothing can be saved.
    st.write(0, 512, 0xfe)
    with pytest.raises(nbd.Error, match=NO_SPACE):
        st.guest.pwrite(b"n" * 512, SIZE - CHUNK)
    assert st.guest.pread(CHUNK, SIZE - CHUNK) == st.then[-CHUNK:]
    fs.make_room()
    st.qmp.execute("job-resume", id="j")
    assert st.status()["io-status"] == "ok"
    last = st.conclude()
    assert last["event"] == "BLOCK_JOB_COMPLETED" and last["data"]["offset"] == last["data"]["len"] == SIZE
    assert "error" not in last["data"]
    assert st.dirty() == {0}
    st.close_target()
    assert st.content() == st.then


def test_ignore_when_full(daemon, tmp, small_fs):
    """ignore: it tries again and again, says so each time, can be paused, and ends when there is room."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs)
    fs.fill(leave=2 * MiB)
    st.begin("full", "on-success", **{"on-target-error": "ignore"})
    for _ in range(3):
        error = st.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
        assert error["data"] == {"device": "j", "operation": "write", "action": "ignore"}
    st.qmp.execute("job-pause", id="j")
    st.qmp.wait_job("j", "paused")
    assert st.status()["io-status"] == "ok"
    fs.make_room()
    st.qmp.execute("job-resume", id="j")
    assert "error" not in st.conclude()["data"]
    st.close_target()
    assert st.content() == st.then


def test_ignore_can_be_cancelled(daemon, tmp, small_fs):
    """A job that ignores errors for ever is still cancelled, and keeps what it achieved."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs)
    fs.fill(leave=2 * MiB)
    st.begin("full", "always", **{"on-target-error": "ignore"})
    st.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    st.qmp.execute("job-cancel", id="j")
    assert st.conclude()["event"] == "BLOCK_JOB_CANCELLED"
    st.close_target()
    assert st.dirty() == chunks(st.content(), st.then) != ALL


@pytest.mark.parametrize("mode", ("on-success", "always", "never"))
def test_failed_save(daemon, tmp, small_fs, mode):
    """A guest's write whose old data cannot be saved: its chunk remains, also when it is cancelled."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs)
    fs.fill(leave=2 * MiB)
    st.begin("bitmap", mode, **{"on-target-error": "stop"})
    st.qmp.wait_job("j", "paused")
    with pytest.raises(nbd.Error, match=NO_SPACE):
        st.guest.pwrite(b"n" * 512, SIZE - CHUNK)
    st.write(0, 512, 0xfe)
    st.qmp.execute("job-cancel", id="j")
    assert st.conclude()["event"] == "BLOCK_JOB_CANCELLED"
    st.close_target()
    assert st.dirty() == (chunks(st.content(), st.then) | {0} if mode == "always" else ALL)


@pytest.mark.parametrize("mode", ("on-success", "always"))
@pytest.mark.parametrize("failing", (0, 1))
def test_a_member_of_a_group(daemon, tmp, small_fs, mode, failing):
    """Two disks in a group, one target's file system full: the other is cancelled, in whichever order
    they stand; each bitmap follows its own mode."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs)
    create_image(tmp / "c.qcow2", size=SIZE)
    qemu_io(tmp / "c.qcow2", f"write -P 7 0 {SIZE}", fmt="qcow2")
    create_image(tmp / "u.raw", "raw", SIZE)
    for name, fmt, file in (("c", "qcow2", tmp / "c.qcow2"), ("u", "raw", tmp / "u.raw")):
        st.qmp.execute("blockdev-add", driver=fmt, node_name=name, file={"driver": "file", "filename": str(file)})
    st.qmp.execute("block-dirty-bitmap-add", node="c", name="b", granularity=CHUNK)
    fs.fill(leave=2 * MiB)
    st.then = bytes(st.now)
    actions = [("blockdev-backup", st.arguments("full", mode)),
               ("blockdev-backup", {"device": "c", "target": "u", "job-id": "k", "sync": "full", "bitmap": "b",
                                    "bitmap-mode": mode, "auto-dismiss": False})]
    st.qmp.transaction(*(actions if failing == 0 else reversed(actions)), **{"completion-mode": "grouped"})
    st.qmp.wait_job("k", "concluded")
    last = st.conclude()
    assert last["event"] == "BLOCK_JOB_COMPLETED" and last["data"]["error"] == NO_SPACE
    assert st.qmp.wait_event("BLOCK_JOB_CANCELLED", device="k")["data"]["device"] == "k"
    assert st.qmp.job("k")["error"] == "Operation canceled"
    st.close_target()
    assert st.dirty() == (chunks(st.content(), st.then) if mode == "always" else ALL)
    # k may have copied everything before: that is what it achieved.
    st.qmp.execute("blockdev-del", node_name="u")
    k_left = sum(CHUNK for at in range(0, SIZE, CHUNK)
                 if (tmp / "u.raw").read_bytes()[at:at + CHUNK] != b"\x07" * CHUNK)
    assert st.qmp.bitmaps("c")["b"]["count"] == (k_left if mode == "always" else 0)


@pytest.mark.parametrize("when", ("running", "pending"))
@pytest.mark.parametrize("sync,mode", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_cancelled(daemon, tmp, small_fs, command, sync, mode, when):
    """Cancelled in the middle and in pending, with a guest's writes to what has been copied and to what
    has not; then the same target is completed."""
    st = Stage(daemon, tmp, small_fs("32M"), "qcow2", command)
    st.begin(sync, mode, **({"speed": 1} if when == "running" else {"auto-finalize": False}))
    st.qmp.wait_job("j", when)
    if when == "running":
        while st.status()["offset"] == 0:   # a first piece goes at once
            pass
    for at in (0, 5 * MiB, 5 * MiB + CHUNK - 512):
        st.write(at, 1024, 0xfd)
    assert st.qmp.bitmaps("a")["b"]["busy"]
    with pytest.raises(QMPError, match="currently in use"):
        st.qmp.execute("block-dirty-bitmap-clear", node="a", name="b")
    st.qmp.execute("job-cancel", id="j")
    assert st.conclude()["event"] == "BLOCK_JOB_CANCELLED"
    st.write(3 * MiB, 512, 0xfc)
    written = {at // CHUNK for at in (0, 3 * MiB, 5 * MiB, 5 * MiB + CHUNK)}
    st.close_target()
    left = chunks(st.content(), st.then)
    assert left == set() if when == "pending" else 0 < len(left) < len(ALL)
    assert st.dirty() == (left | written if mode == "always" else ALL)
    st.open_target()
    st.begin("bitmap" if mode == "always" else sync, mode, existing=True)
    assert "error" not in st.conclude()["data"]
    assert st.dirty() == (ALL if mode == "never" else set())
    st.close_target()
    assert st.content() == st.then


@pytest.mark.parametrize("sync,mode", WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_never_started(daemon, tmp, small_fs, command, sync, mode):
    """A transaction that is not committed leaves the bitmap as it was, and nothing running."""
    st = Stage(daemon, tmp, small_fs("16M"), "qcow2", command)
    st.qmp.execute("block-dirty-bitmap-clear", node="a", name="b")
    for at in (0, 3 * MiB):
        st.write(at, 512, 0xfd)
    before = json.dumps(st.qmp.bitmaps("a"))
    with pytest.raises(QMPError, match="Transaction aborted using Abort action"):
        st.qmp.transaction((command, st.arguments(sync, mode)), ("abort", {}))
    assert json.dumps(st.qmp.bitmaps("a")) == before
    assert st.dirty() == {0, 3 * MiB // CHUNK}
    assert st.qmp.execute("query-jobs") == []


@pytest.mark.parametrize("when", ("running", "paused", "pending"))
@pytest.mark.parametrize("sync,mode", WAYS)
def test_the_daemon_ends(daemon, tmp, small_fs, sync, mode, when):
    """SIGTERM cancels the job in whatever state it is; what the bitmap then is, is in the image. The next
    daemon's run completes the target."""
    fs = small_fs("16M")
    st = Stage(daemon, tmp, fs, "qcow2")
    more = {"running": {"speed": 1}, "pending": {"auto-finalize": False}, "paused": {"on-target-error": "stop"}}[when]
    if when == "paused":
        fs.fill(leave=2 * MiB)
    st.begin(sync, mode, **more)
    st.qmp.wait_job("j", when)
    while st.status()["offset"] == 0:
        pass
    st.write(0, 512, 0xfd)
    if when != "paused":
        st.write(5 * MiB, 512, 0xfd)
    st.guest.shutdown()
    st.daemon.stop()
    if when == "paused":
        fs.make_room()
    left = chunks(st.content(), st.then)
    assert (left == set()) == (when == "pending")
    written = {0} if when == "paused" else {0, 5 * MiB // CHUNK}
    st.start()
    assert st.dirty() == (left | written if mode == "always" else ALL)
    st.open_target()
    st.begin("bitmap" if mode == "always" else sync, mode)
    assert "error" not in st.conclude()["data"]
    st.close_target()
    assert st.content() == st.then
