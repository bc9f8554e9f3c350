"""Block devices: driver host_device on loop devices, and what persistent bitmaps need for it.

What qemu-storage-daemon says to the same commands: parity/sequences/devices.py; crashes:
test_crash.py, test_power.py.
"""
import json
import os
import random
import shutil
import subprocess

import pytest
from conftest import not_allowed
from tidemark_testlib import QSD, Daemon, LoopDevice, NotAllowed, QMPError, connect, nbd_uri, qemu_io
from tidemark_testlib.images import run_tool
from tidemark_testlib.nbd import extents

KiB, MiB = 1 << 10, 1 << 20
SIZE = 64 * MiB
GRANULE = 64 * KiB


class Disk:
    """A node "d" on a device, exported, and a daemon that has it."""

    def __init__(self, tmp, tidemarkd, path, fmt="raw"):
        self.tmp, self.binary, self.path, self.fmt = tmp, tidemarkd, path, fmt
        self.daemon = None
        (tmp / "state").mkdir(exist_ok=True)

    def start(self, direct=False, **persist):
        (self.tmp / "nbd.sock").unlink(missing_ok=True)
        node = {"driver": self.fmt, "node-name": "d", "discard": "unmap",
                "file": {"driver": "host_device", "filename": str(self.path), "node-name": "f",
                         "discard": "unmap", "cache": {"direct": direct}},
                "x-tidemark-persist": {"runtime-directory": str(self.tmp / "run"),
                                       "checkpoint-idle": 0, **persist}}
        if not {"tide-file", "level"} & set(persist):
            node["x-tidemark-persist"]["state-directory"] = str(self.tmp / "state")
        self.daemon = Daemon("--nbd-server", f"addr.type=unix,addr.path={self.tmp}/nbd.sock",
                             binary=self.binary, directory=self.tmp)
        self.qmp.execute("blockdev-add", **node)
        self.offer()

    def offer(self, yes=True):
        """An export holds the size."""
        if yes:
            self.qmp.execute("block-export-add", type="nbd", id="d", node_name="d", writable=True)
            return
        self.qmp.execute("block-export-del", id="d", mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="d")

    @property
    def qmp(self):
        return self.daemon.qmp

    def guest(self):
        return connect(nbd_uri(self.tmp / "nbd.sock", "d"))

    def write(self, *offsets):
        guest = self.guest()
        for at in offsets:
            guest.pwrite(b"x" * 4096, at)
        guest.flush()
        guest.shutdown()

    def add(self, name="b"):
        self.qmp.execute("block-dirty-bitmap-add", node="d", name=name, persistent=True,
                         granularity=GRANULE)

    def stop(self):
        self.daemon.stop()

    def kill(self):
        self.daemon.kill()

    def node(self):
        return next(n for n in self.qmp.execute("query-named-block-nodes", flat=True)
                    if n["node-name"] == "d")

    def bitmap(self):
        return self.node()["dirty-bitmaps"][0]

    def recovery(self):
        info = self.node()["x-tidemark-recovery"]
        return info["state"], info.get("witness")

    def dirty(self):
        self.qmp.execute("block-export-add", type="nbd", id="look", node_name="d", name="look", writable=True,
                         bitmaps=["b"])
        context = "qemu:dirty-bitmap:b"
        handle = connect(nbd_uri(self.tmp / "nbd.sock", "look"), [context])
        found = [at for at, _, flags in extents(handle, context) if flags & 1]
        handle.shutdown()
        self.qmp.execute("block-export-del", id="look", mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="look")
        return found


@pytest.fixture
def disk(tmp, tidemarkd, loop_device):
    made = []

    def make(device, fmt="raw"):
        made.append(Disk(tmp, tidemarkd, device.path, fmt))
        return made[-1]

    yield make
    for one in made:
        if one.daemon:
            one.kill()


# --- reading and writing -------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sector", [512, 4096])
def test_what_is_written_is_on_the_device(disk, loop_device, tmp, sector, direct):
    device = loop_device("disk", "16M", sector=sector)
    d = disk(device)
    d.start(direct)
    guest, rng, model = d.guest(), random.Random(1), bytearray(16 * MiB)
    unknown = bytearray(16 * MiB)
    for _ in range(300):
        at = rng.randrange(16 * MiB)
        length = min(rng.choice((1, 511, 512, 4096, 65536, 300000)), 16 * MiB - at)
        if rng.random() < 0.5:
            at, length = at & ~4095, max(length & ~4095, 4096)
        kind = rng.random()
        if kind < 0.6:
            data = rng.randbytes(length)
            guest.pwrite(data, at)
            model[at:at + length] = data
        elif kind < 0.8:
            guest.zero(length, at)
            model[at:at + length] = bytes(length)
        else:
            guest.trim(length, at)
            inside = range(-(-at // sector) * sector, (at + length) // sector * sector)
            unknown[inside.start:inside.stop] = b"\1" * len(inside)
        if kind < 0.8:
            unknown[at:at + length] = bytes(length)
        if rng.random() < 0.1:
            guest.flush()
    guest.flush()
    for at in range(0, 16 * MiB, MiB):
        got = guest.pread(MiB, at)
        on_disk = (tmp / "disk").read_bytes()[at:at + MiB]
        for i in range(0, MiB, 512):
            if not any(unknown[at + i:at + i + 512]):
                assert got[i:i + 512] == model[at + i:at + i + 512], f"at {at + i}"
                assert on_disk[i:i + 512] == model[at + i:at + i + 512], f"flushed, at {at + i}"
    guest.shutdown()
    d.stop()


def test_discards_and_zeroes_give_space_back(disk, loop_device, tmp):
    d = disk(loop_device("disk", SIZE))
    d.start()
    guest = d.guest()
    guest.pwrite(b"x" * (8 * MiB), 0)
    guest.flush()
    full = os.stat(tmp / "disk").st_blocks
    guest.trim(100, 100)                # parts of sectors: the kernel takes none,
    guest.zero(100, 7 * MiB + 100)      # and is asked for whole ones all the same
    guest.trim(4 * MiB, 0)
    guest.zero(2 * MiB, 4 * MiB)
    guest.flush()
    assert os.stat(tmp / "disk").st_blocks <= full - 6 * MiB // 512
    guest.shutdown()
    stats = next(s for s in d.qmp.execute("query-blockstats", query_nodes=True)
                 if s["node-name"] == "f")["driver-specific"]
    assert (stats["driver"], stats["discard-bytes-ok"]) == ("host_device", 4 * MiB)
    d.stop()


def test_a_device_that_fails(disk, loop_device, small_fs):
    """Its errors are told; after a failed flush nothing is believed of it any more."""
    fs = small_fs("16M")
    device = loop_device(fs.outside / "disk", "8M")
    fs.fill(2 * MiB)
    d = disk(device)
    d.start(level="process", **{"tide-file": str(d.tmp / "state" / "t")})
    d.add()
    import nbd
    guest = d.guest()
    with pytest.raises(nbd.Error, match="Input/output error|No space"):
        guest.pwrite(b"x" * (6 * MiB), 0)
        guest.flush()
    fs.make_room()
    for call in (guest.flush, lambda: guest.pwrite(b"x" * 512, 0)):
        with pytest.raises(nbd.Error, match="Input/output error"):
            call()
    assert d.bitmap()["count"] == 6 * MiB
    d.kill()


def test_a_device_that_grows(disk, loop_device, tmp):
    """block_resize to the size that it has; what has grown is dirty. No other size."""
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start()
    d.add()
    d.offer(False)
    with pytest.raises(QMPError, match="Cannot grow device files"):
        d.qmp.execute("block_resize", node_name="d", size=SIZE + MiB)
    d.qmp.execute("block_resize", node_name="d", size=SIZE - MiB)      # QEMU does nothing
    assert d.node()["image"]["virtual-size"] == SIZE
    os.truncate(tmp / "disk", SIZE + 8 * MiB)
    device.refresh()
    with pytest.raises(QMPError, match="Cannot grow device files"):
        d.qmp.execute("block_resize", node_name="d", size=SIZE + 9 * MiB)
    assert d.node()["image"]["virtual-size"] == SIZE
    d.qmp.execute("block_resize", node_name="d", size=SIZE + 8 * MiB)
    assert d.node()["image"]["virtual-size"] == SIZE + 8 * MiB
    d.offer()
    d.write(SIZE + MiB)
    assert d.bitmap()["count"] == 8 * MiB
    d.kill()
    d.start()
    assert d.recovery() == ("exact", "none") and d.bitmap()["count"] == 8 * MiB
    d.stop()


# --- other programs ------------------------------------------------------------------------------


def test_qemu_and_we_keep_each_other_away(disk, loop_device, tmp):
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start()
    d.add()             # a bitmap that records lets nobody else write
    done = run_tool("qemu-io", "-f", "raw", "-c", "write 0 4k", device.path, check=False)
    assert done.returncode and b"lock" in done.stdout + done.stderr
    d.stop()
    node = {"driver": "raw", "node-name": "d",
            "file": {"driver": "host_device", "filename": device.path}}
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", device.path, "32M")
    (tmp / "nbd.sock").unlink(missing_ok=True)
    with Daemon("--blockdev", json.dumps({**node, "driver": "qcow2"}), "--nbd-server",
                f"addr.type=unix,addr.path={tmp}/nbd.sock", "--export",
                "nbd,id=d,node-name=d,writable=on", binary=QSD, directory=tmp):
        second = Daemon(binary=d.binary, directory=tmp)
        try:
            second.qmp.execute("blockdev-add", **node)
            second.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {
                "path": str(tmp / "second.sock")}})
            with pytest.raises(QMPError, match="lock"):
                second.qmp.execute("block-export-add", type="nbd", id="d", node_name="d",
                                   writable=True)
        finally:
            second.stop()


# --- where bitmaps are kept ----------------------------------------------------------------------


def test_a_state_directory_is_needed(disk, loop_device, tmp):
    """Said in one line; a qcow2 image keeps its bitmaps as QEMU does, and that is told."""
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start(level="power")
    with pytest.raises(QMPError) as error:
        d.add()
    assert str(error.value).count("\n") == 0
    assert f"Can't store persistent bitmaps to d: '{device.path}' is a device" in str(error.value)
    assert "'state-directory'" in str(error.value)
    d.stop()
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", device.path, "32M")
    d = disk(device, "qcow2")
    d.start(level="power")
    d.add()
    d.add("c")
    d.stop()
    assert d.daemon.stderr.count("do not survive a crash") == 1
    assert "'state-directory'" in d.daemon.stderr
    d.start()
    assert len(d.node()["dirty-bitmaps"]) == 2
    d.stop()
    assert not os.listdir(tmp / "state")


def test_the_short_form(loop_device, tmp, tidemarkd):
    """tidemarkd /dev/...: raw or qcow2 by its content, bitmaps in the state directory."""
    devices = loop_device("a", SIZE), loop_device("b", SIZE)
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", devices[1].path, "32M")
    (tmp / "state").mkdir()
    daemon = subprocess.Popen(
        [tidemarkd, "--x-tidemark-persist", f"state-directory={tmp}/state",
         *(device.path for device in devices)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RUNTIME_DIRECTORY": str(tmp)})
    try:
        lines = [daemon.stdout.readline() for _ in range(3)]
        sizes = []
        for device, line in zip(devices, lines):
            path, _, uri = line.strip().partition(": ")
            assert path == device.path and f"/{os.path.basename(path)}?" in uri
            handle = connect(uri)
            sizes.append(handle.get_size())
            handle.shutdown()
        assert sizes == [SIZE, 32 * MiB]
        daemon.terminate()
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()


def test_a_disk_keeps_its_tide_file_under_another_number(disk, loop_device, tmp):
    """The name in the state directory is not the device's number."""
    first = loop_device("disk", SIZE)
    d = disk(first)
    d.start()
    d.add()
    d.write(MiB)
    d.stop()
    kept = os.listdir(tmp / "state")
    assert len(kept) == 1 and os.path.basename(first.path) not in kept[0]
    first.close()
    stranger = loop_device("stranger", SIZE)     # takes the number
    second = loop_device("disk")
    assert second.path != stranger.path
    d = disk(stranger)
    d.start()
    assert "dirty-bitmaps" not in d.node()
    d.stop()
    d = disk(second)
    d.start()
    assert d.recovery() == ("clean", "none") and d.dirty() == [MiB]
    d.stop()


# --- has anybody else written? -------------------------------------------------------------------


def write_by_qemu(device):
    qemu_io(device.path, "write -P 7 8M 4k", fmt="raw")


def zero_by_qemu(device):
    qemu_io(device.path, "write -z -u 1M 64k", fmt="raw")


def write_and_stay(device):
    """Somebody has it open: nothing is flushed when the writer closes it."""
    holder = os.open(device.path, os.O_RDONLY)
    subprocess.run(["dd", "if=/dev/urandom", f"of={device.path}", "bs=4k", "count=1", "seek=77",
                    "conv=notrunc", "status=none"], check=True)
    return holder


def discard(device):
    subprocess.run(["/usr/sbin/blkdiscard", "-f", "-o", "1M", "-l", "1M", device.path], check=True)


@pytest.mark.parametrize("writer", [None, write_by_qemu, zero_by_qemu, write_and_stay, discard],
                         ids=lambda w: w and w.__name__)
def test_written_after_a_clean_end(disk, loop_device, writer):
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start()
    d.add()
    d.write(MiB, 20 * MiB)
    d.stop()
    holder = writer(device) if writer else None
    qemu_io(device.path, "read 0 1M", fmt="raw")        # which changes nothing
    d.start()
    if holder:
        os.close(holder)
    if writer:
        assert d.recovery() == ("none", "changed")
        assert d.bitmap()["inconsistent"]
    else:
        assert d.recovery() == ("clean", "same") and d.dirty() == [MiB, 20 * MiB]
    d.stop()


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("rule", ["believe", "distrust", "refuse"])
def test_what_no_witness_does(disk, loop_device, end, rule):
    """After a crash nothing tells, nor when a device has gone and come again."""
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start()
    d.add()
    d.write(MiB)
    getattr(d, end)()
    if end == "stop":
        device.close()
        d.path = loop_device("disk").path
    rule = {"no-witness": rule}
    if "refuse" in rule.values():
        with pytest.raises(QMPError, match="nothing tells whether others have written"):
            d.start(**rule)
        return
    d.start(**rule)
    if "distrust" in rule.values():
        assert d.recovery() == ("none", "none") and d.bitmap()["inconsistent"]
    else:
        assert d.recovery() == ("clean" if end == "stop" else "exact", "none")
        assert d.dirty() == [MiB]
    d.stop()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_another_disk_behind_the_name(disk, loop_device, tmp, end):
    """A tide file that is given by its name is of one disk only."""
    tide = {"tide-file": str(tmp / "state" / "t")}
    device = loop_device("disk", SIZE)
    d = disk(device)
    d.start(**tide)
    d.add()
    d.write(MiB)
    getattr(d, end)()
    number = device.path
    device.close()
    device = loop_device("other", SIZE)
    d.path = device.path
    d.start(**tide)
    assert d.recovery() == ("none", "changed"), (number, d.path)
    assert d.bitmap()["inconsistent"]
    d.stop()


# --- qcow2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [False, True])
def test_qcow2_on_a_device_knows_by_itself(disk, loop_device, tmp, foreign):
    """Killed; its guard is in the image, so nothing need be believed."""
    device = loop_device("disk", SIZE)
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", device.path, "48M")
    d = disk(device, "qcow2")
    d.start()
    d.add()
    d.write(MiB, 20 * MiB)
    assert len(os.listdir(tmp / "state")) == 1
    d.kill()
    done = run_tool("qemu-img", "check", "-f", "qcow2", device.path, check=False)
    assert done.returncode in (0, 3), done.stdout
    if foreign:
        qemu_io(device.path, "write 30M 4k")
    d.start()
    if foreign:
        assert d.recovery() == ("none", "changed") and d.bitmap()["inconsistent"]
        d.stop()
        return
    assert d.recovery() == ("exact", "same") and d.dirty() == [MiB, 20 * MiB]
    guest = d.guest()
    assert guest.pread(4096, 20 * MiB) == b"x" * 4096
    guest.shutdown()
    d.stop()
    assert not os.listdir(tmp / "state")
    assert b"name: b" in run_tool("qemu-img", "info", "-f", "qcow2", device.path).stdout
    assert run_tool("qemu-img", "check", "-f", "qcow2", device.path).returncode == 0


def test_qcow2_on_a_device_that_is_full(disk, loop_device):
    """A guest is told that there is no space, and the image stays whole."""
    import nbd
    device = loop_device("disk", "4M")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", device.path, "64M")
    d = disk(device, "qcow2")
    d.start()
    d.add()
    guest = d.guest()
    with pytest.raises(nbd.Error, match="No space"):
        for at in range(0, 8 * MiB, 64 * KiB):
            guest.pwrite(b"x" * (64 * KiB), at)
    guest.pwrite(b"y" * 4096, 0)
    guest.flush()
    assert guest.pread(4096, 0) == b"y" * 4096
    guest.shutdown()
    d.kill()
    assert run_tool("qemu-img", "check", "-f", "qcow2", device.path, check=False).returncode in (0, 3)


# --- where loop devices are not allowed ----------------------------------------------------------


@pytest.mark.no_tidemarkd
def test_without_loop_devices_it_is_skipped(tmp, monkeypatch):
    monkeypatch.setattr("tidemark_testlib.loopdev.LOSETUP", shutil.which("false"))
    with pytest.raises(NotAllowed, match="no loop device") as error:
        LoopDevice(tmp / "disk", "1M")
    monkeypatch.setenv("TIDEMARK_REQUIRE", "small_fs")
    with pytest.raises(pytest.skip.Exception):
        not_allowed(str(error.value), error.value.what)
    monkeypatch.setenv("TIDEMARK_REQUIRE", "small_fs loop_device")
    with pytest.raises(pytest.fail.Exception):
        not_allowed(str(error.value), error.value.what)
