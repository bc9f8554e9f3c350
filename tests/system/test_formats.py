"""docs/format/segment.md and qcow2-guard.md are so: what a killed daemon has left, read as they say;
and nothing of it is there after a clean end."""

import json
import pathlib
import struct
import time

import pytest
from tidemark_testlib import Daemon, connect, create_image, nbd_uri

KiB, MiB = 1 << 10, 1 << 20
SIZE = 64 * MiB
GUARD = 0x74696465
NAMES = 0x6803f857


class Disk:
    def __init__(self, tmp, binary, fmt):
        self.tmp, self.binary, self.fmt = tmp, binary, fmt
        self.image = create_image(tmp / f"disk.{fmt}", fmt, SIZE)
        self.tide = pathlib.Path(f"{self.image}.tide")
        self.runtime = tmp / "run"

    def start(self):
        (self.tmp / "nbd.sock").unlink(missing_ok=True)
        node = {"driver": self.fmt, "node-name": "disk",
                "file": {"driver": "file", "filename": str(self.image)},
                "x-tidemark-persist": {"runtime-directory": str(self.runtime),
                                       "checkpoint-idle": 0}}
        return Daemon("--blockdev", json.dumps(node), "--nbd-server",
                      f"addr.type=unix,addr.path={self.tmp}/nbd.sock", "--export",
                      "nbd,id=e,node-name=disk,name=disk,writable=on", binary=self.binary,
                      directory=self.tmp)

    def write(self, *offsets):
        handle = connect(nbd_uri(self.tmp / "nbd.sock", "disk"))
        for offset in offsets:
            handle.pwrite(b"x" * 4096, offset)
        handle.shutdown()

    def uuid_and_session(self):
        """Of the newest superblock; the slots' sequences decide."""
        with open(self.tide, "rb") as f:
            slots = [f.read(256 * KiB), f.read(256 * KiB)]
        newest = max((s for s in slots if s.startswith(b"TIDEMARK")),
                     key=lambda s: struct.unpack_from("<Q", s, 24))
        return newest[32:48], newest[48:64]


@pytest.fixture(params=["raw", "qcow2"])
def disk(request, tmp, tidemarkd):
    return Disk(tmp, tidemarkd, request.param)


def test_the_run_segment(disk):
    boot = bytes.fromhex(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
                         .strip().replace("-", ""))
    daemon = disk.start()
    daemon.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True,
                       granularity=64 * KiB)
    disk.write(0, 5 * 64 * KiB, 64 * 64 * KiB)
    daemon.kill()
    uuid, session = disk.uuid_and_session()
    stem = f"run-{uuid.hex()}-"
    names = {path.name for path in disk.runtime.iterdir()}
    assert len(names) == 2 and f"{stem}stamp" in names
    name = (names - {f"{stem}stamp"}).pop()
    assert name.startswith(stem) and (disk.runtime / name).stat().st_mode & 0o777 == 0o600
    epoch = int(name[len(stem):])

    segment = (disk.runtime / name).read_bytes()
    assert segment[:8] == b"tmsegmt1" and segment[8:24] == boot and segment[24:40] == session
    assert struct.unpack_from("<4Q", segment, 40) == (epoch, SIZE, 64 * KiB, epoch ^ (1 << 64) - 1)
    assert segment[72:4096] == bytes(4024)
    words = [1 << 0 | 1 << 5, 1 << 0] + [0] * (SIZE // (64 * KiB) // 64 - 2)
    assert list(struct.unpack_from(f"={len(words)}Q", segment, 4096)) == words

    stamp = (disk.runtime / f"{stem}stamp").read_bytes()
    wall, in_flight = struct.unpack_from("=2Q", stamp, 16)
    assert len(stamp) == 4096 and stamp[:16] == session and stamp[32:] == bytes(4096 - 32)
    assert in_flight == (disk.fmt == "qcow2")   # an image that is in use
    assert 0 <= time.time_ns() - wall < 600 * 10**9

    disk.start().stop()
    assert list(disk.runtime.iterdir()) == []
    assert disk.tide.exists() == (disk.fmt == "raw")


def header(image):
    """Autoclear bits, the extensions in their order, and where they end."""
    data = image.read_bytes()[:64 * KiB]
    length, = struct.unpack_from(">I", data, 100)
    at, found = length, {}
    while True:
        magic, size = struct.unpack_from(">2I", data, at)
        at += 8
        if not magic:
            return struct.unpack_from(">Q", data, 88)[0], found, at
        found[magic] = data[at:at + size]
        at += -(-size // 8) * 8


def test_the_guard(tmp, tidemarkd):
    disk = Disk(tmp, tidemarkd, "qcow2")
    daemon = disk.start()
    daemon.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
    disk.write(0)
    daemon.kill()
    autoclear, extensions, end = header(disk.image)
    assert autoclear >> 63 == 1 and end <= 512
    assert extensions[GUARD] == disk.uuid_and_session()[0]
    names = extensions[NAMES]
    assert bytes([2, 63]) + b"tidemark bitmaps".ljust(46, b"\0") in \
        [names[i:i + 48] for i in range(0, len(names), 48)]

    disk.start().stop()
    autoclear, extensions, end = header(disk.image)
    assert autoclear == 1 and GUARD not in extensions and end <= 512
