"""x-tidemark-compare: a bitmap that is lost is made anew from the disk and its last backups, while
clients write; the next increment completes the chain. What is read, and what a kill leaves."""

import hashlib
import json
import os
import time

import pytest
from tidemark_testlib import (Daemon, QMPError, check_image, connect, create_image, nbd_uri,
                              qemu_io, sha256_of)
from tidemark_testlib.load import Load, Model

KiB, MiB = 1 << 10, 1 << 20
SIZE = 96 * MiB
GRANULARITY = 64 * KiB


class Disk:
    """One disk, its chain of backups, and what it must hold."""

    def __init__(self, tmp, binary, fmt):
        self.tmp, self.binary, self.fmt = tmp, binary, fmt
        self.image = create_image(tmp / f"disk.{fmt}", fmt, SIZE)
        self.sock = tmp / "nbd.sock"
        self.uri = nbd_uri(self.sock, "disk")
        self.model = Model(SIZE)
        self.base = bytes(SIZE)     # what the last backup holds
        self.chain = []
        self.daemon = None
        self.runtime = tmp / "runtime"

    def start(self):
        node = {"driver": self.fmt, "node-name": "disk", "discard": "unmap",
                "file": {"driver": "file", "filename": str(self.image), "node-name": "file"},
                "x-tidemark-persist": {"checkpoint-idle": 0}}   # what an image has is never exact
        self.sock.unlink(missing_ok=True)
        self.daemon = Daemon("--blockdev", json.dumps(node), "--nbd-server",
                             f"addr.type=unix,addr.path={self.sock}", "--export",
                             "nbd,id=e,node-name=disk,name=disk,writable=on", binary=self.binary,
                             directory=self.tmp, env={"RUNTIME_DIRECTORY": str(self.runtime)})
        return self.daemon.qmp

    def kill(self):
        """After a flush by a client: what is written is there, and nothing else is saved."""
        handle = connect(self.uri)
        handle.flush()
        handle.shutdown()
        self.daemon.kill()

    def lose_bitmaps(self):
        """Another program writes to the image."""
        time.sleep(0.1)     # within the tick of our last write a raw file's times cannot tell
        self.foreign(5 * MiB + 4096, b"\x5f" * 4096)

    def foreign(self, offset, data):
        qemu_io(self.image, f"write -P {data[0]:#x} {offset} {len(data)}", fmt=self.fmt)
        self.model.write(offset, data)

    def write(self, handle, offset, data):
        handle.pwrite(data, offset)
        self.model.write(offset, data)

    def backup(self, qmp, load=None, **arguments):
        path = self.tmp / f"b{len(self.chain)}.qcow2"
        last = self.chain[-1] if self.chain else None
        create_image(path, "qcow2", SIZE,
                     **({"backing_file": last, "backing_fmt": "qcow2"} if last else {}))
        qmp.execute("blockdev-add", driver="qcow2", node_name="target",
                    file={"driver": "file", "filename": str(path)})
        backup = ("blockdev-backup", {"device": "disk", "target": "target", "job-id": "backup",
                                      "bitmap": "b", "bitmap-mode": "on-success", **arguments})
        actions = [backup]
        if not self.chain:
            actions.insert(0, ("block-dirty-bitmap-add",
                               {"node": "disk", "name": "b", "persistent": True,
                                "granularity": GRANULARITY}))
        if load is None:
            qmp.transaction(*actions)
            self.base = self.model.copy()
        else:
            with load.paused():
                qmp.transaction(*actions)
                self.base = self.model.copy()
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED", device="backup")["data"]
        qmp.wait_job("backup", "null")
        qmp.execute("blockdev-del", node_name="target")
        self.chain.append(path)

    def restart(self):
        """What a qcow2 image has of a bitmap before that cannot be lost."""
        self.daemon.stop()
        return self.start()

    def open_chain(self, qmp):
        qmp.execute("blockdev-add", driver="qcow2", node_name="base", read_only=True,
                    file={"driver": "file", "filename": str(self.chain[-1]),
                          "node-name": "base-file"})

    def compare(self, qmp, job="compare", **arguments):
        done = qmp.run_job("x-tidemark-compare", job, device="disk", target="base", bitmap="b",
                           **arguments)
        assert "error" not in done and done["offset"] == done["len"] == SIZE
        assert done["type"] == "x-tidemark-compare"

    def differing(self):
        """Granules in which the disk is not what its last backup holds."""
        now = self.model.copy()
        return [at for at in range(0, SIZE, GRANULARITY)
                if now[at:at + GRANULARITY] != self.base[at:at + GRANULARITY]]

    def check_exact(self, qmp):
        """The bitmap is just what differs."""
        bits = bytearray(SIZE // GRANULARITY // 8)
        for at in self.differing():
            bits[at // GRANULARITY // 8] |= 1 << at // GRANULARITY % 8
        want = hashlib.sha256(bits).hexdigest()
        assert qmp.execute("x-debug-block-dirty-bitmap-sha256", node="disk",
                           name="b")["sha256"] == want

    def check_chain(self):
        assert sha256_of(self.chain[-1]) == hashlib.sha256(self.base).hexdigest()
        for image in self.chain:
            verdict = check_image(image)
            assert not verdict["corruptions"] and not verdict["leaks"]


@pytest.fixture(params=["raw", "qcow2"])
def disk(request, tmp, tidemarkd):
    d = Disk(tmp, tidemarkd, request.param)
    yield d
    if d.daemon is not None and d.daemon.running:
        d.daemon.kill()


def test_the_chain_goes_on_without_a_full_backup(disk):
    qmp = disk.start()
    load = Load(disk.uri, disk.model, clients=2, per_second=200)
    load.wait_written(50)
    disk.backup(qmp, load, sync="full")
    assert load.end() == []
    qmp = disk.restart()
    load = Load(disk.uri, disk.model, clients=2, per_second=200)
    load.wait_written(20)
    disk.backup(qmp, load, sync="bitmap")
    load.wait_written(20)
    assert load.end() == []
    disk.kill()
    disk.lose_bitmaps()

    qmp = disk.start()
    assert qmp.bitmaps("disk")["b"]["inconsistent"]
    with pytest.raises(QMPError, match="inconsistent"):
        disk.backup(qmp, sync="bitmap")
    qmp.execute("blockdev-del", node_name="target")
    os.unlink(disk.tmp / "b2.qcow2")
    disk.open_chain(qmp)
    load = Load(disk.uri, disk.model, clients=2, per_second=200, seed=2)
    load.wait_written(10)
    qmp.execute("x-tidemark-compare", job_id="compare", device="disk", target="base", bitmap="b",
                speed=1)
    shown = qmp.bitmaps("disk")["b"]
    assert shown["busy"] and shown["recording"] and shown["inconsistent"]
    load.wait_written(20)
    qmp.execute("block-job-set-speed", device="compare", speed=0)
    assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED", device="compare")["data"]
    qmp.wait_job("compare", "null")
    shown = qmp.bitmaps("disk")["b"]
    assert shown["recording"] and not shown["busy"] and "inconsistent" not in shown
    assert shown["x-tidemark-last-job"] == "compare"
    assert 0 < shown["count"] < SIZE
    load.wait_written(20)
    qmp.execute("blockdev-del", node_name="base")
    disk.backup(qmp, load, sync="bitmap")
    disk.check_chain()
    assert load.end() == []
    disk.daemon.stop()

    # What was trusted once stays so.
    qmp = disk.start()
    assert "inconsistent" not in qmp.bitmaps("disk")["b"]
    disk.backup(qmp, sync="bitmap")
    disk.check_chain()
    disk.daemon.stop()


def test_at_rest_it_is_exact_and_survives_a_kill(disk):
    qmp = disk.start()
    handle = connect(disk.uri)
    for at in range(0, SIZE, 5 * MiB):
        disk.write(handle, at, os.urandom(MiB))
    disk.backup(qmp, sync="full")
    handle.shutdown()
    disk.restart()
    handle = connect(disk.uri)
    disk.write(handle, 7 * MiB - 512, os.urandom(1024))
    disk.write(handle, 20 * MiB, bytes(MiB))     # data becomes zeroes, in part
    handle.zero(MiB, 25 * MiB)                   # ... and a hole
    disk.model.write(25 * MiB, bytes(MiB))
    disk.write(handle, 33 * MiB, bytes(MiB))     # zeroes where there were zeroes: not different
    handle.shutdown()
    disk.kill()
    disk.lose_bitmaps()

    qmp = disk.start()
    disk.open_chain(qmp)
    disk.compare(qmp)
    disk.check_exact(qmp)
    disk.compare(qmp, job="again", speed=1 << 30)   # of a consistent one
    disk.check_exact(qmp)
    if disk.fmt == "qcow2":
        disk.daemon.stop()
    else:
        disk.kill()
    qmp = disk.start()
    assert "inconsistent" not in qmp.bitmaps("disk")["b"]
    disk.check_exact(qmp)
    disk.backup(qmp, sync="bitmap")
    disk.check_chain()
    disk.daemon.stop()


@pytest.mark.parametrize("cut", ["killed", "cancelled"])
def test_half_a_comparison_is_none(disk, cut):
    qmp = disk.start()
    handle = connect(disk.uri)
    disk.write(handle, 0, os.urandom(8 * MiB))
    disk.backup(qmp, sync="full")
    handle.shutdown()
    disk.restart()
    handle = connect(disk.uri)
    disk.write(handle, 3 * MiB, os.urandom(512))    # or a qcow2 image's own copy is still exact
    handle.shutdown()
    disk.kill()
    disk.lose_bitmaps()

    qmp = disk.start()
    disk.open_chain(qmp)
    qmp.execute("x-tidemark-compare", job_id="compare", device="disk", target="base", bitmap="b",
                speed=1024)
    handle = connect(disk.uri)
    disk.write(handle, MiB, os.urandom(512))
    if cut == "killed":
        disk.kill()
        qmp = disk.start()
        disk.open_chain(qmp)
    else:
        handle.shutdown()
        qmp.execute("block-job-cancel", device="compare")
        qmp.wait_job("compare", "null")
    shown = qmp.bitmaps("disk")["b"]
    assert shown["inconsistent"] and not shown["busy"] and not shown["recording"]
    disk.compare(qmp)
    disk.check_exact(qmp)
    disk.daemon.stop()


def test_a_bitmap_that_is_gone_with_its_file(tmp, tidemarkd):
    """Made and compared in one transaction: one instant."""
    disk = Disk(tmp, tidemarkd, "raw")
    qmp = disk.start()
    handle = connect(disk.uri)
    disk.write(handle, 0, os.urandom(8 * MiB))
    disk.backup(qmp, sync="full")
    disk.write(handle, 9 * MiB, os.urandom(512))
    handle.shutdown()
    disk.kill()
    os.unlink(f"{disk.image}.tide")

    qmp = disk.start()
    assert not qmp.bitmaps("disk")
    disk.open_chain(qmp)
    qmp.transaction(("block-dirty-bitmap-add", {"node": "disk", "name": "b", "persistent": True,
                                                "granularity": GRANULARITY}),
                    ("x-tidemark-compare", {"device": "disk", "target": "base", "bitmap": "b",
                                            "job-id": "compare"}))
    qmp.wait_job("compare", "null")
    disk.check_exact(qmp)
    disk.backup(qmp, sync="bitmap")
    disk.check_chain()
    disk.daemon.stop()


def counters(qmp):
    stats = qmp.execute("query-blockstats", query_nodes=True)
    return {s["node-name"]: (s["stats"]["rd_bytes"], s["stats"]["rd_operations"]) for s in stats
            if s["node-name"] in ("disk", "base")}


def test_holes_on_both_sides_are_not_read(disk):
    qmp = disk.start()
    handle = connect(disk.uri)
    disk.write(handle, 10 * MiB, os.urandom(2 * MiB))    # on both, equal
    disk.write(handle, 50 * MiB, os.urandom(MiB))        # becomes a hole: in the backup alone
    disk.backup(qmp, sync="full")
    handle.zero(MiB, 50 * MiB)
    disk.model.write(50 * MiB, bytes(MiB))
    disk.write(handle, 70 * MiB, os.urandom(3 * MiB))    # on the disk alone
    disk.open_chain(qmp)
    before = counters(qmp)
    disk.compare(qmp)
    read = {node: bytes_ - before[node][0] for node, (bytes_, _) in counters(qmp).items()}
    first = 64 * KiB if disk.fmt == "raw" else 0    # its first block has room from the beginning
    assert read == {"disk": 5 * MiB + first, "base": 3 * MiB}
    disk.check_exact(qmp)
    handle.shutdown()
    disk.daemon.stop()


def test_disks_of_other_sizes(disk):
    """A shorter backup is zeroes behind its end; what a longer one has there is left out."""
    qmp = disk.start()
    handle = connect(disk.uri)
    disk.write(handle, 0, b"\1" * MiB)
    disk.write(handle, SIZE - MiB, b"\2" * 512)
    qmp.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=GRANULARITY)
    for size, dirty in ((SIZE // 2, 1), (SIZE + 4 * MiB, 1), (SIZE - MiB + 512, 0)):
        path = disk.tmp / f"{size}.qcow2"
        create_image(path, "qcow2", size)
        qemu_io(path, f"write -P 1 0 {MiB}", fmt="qcow2")
        if not dirty:
            qemu_io(path, f"write -P 2 {SIZE - MiB} 512", fmt="qcow2")
        if size > SIZE:
            qemu_io(path, f"write -P 3 {SIZE} 4096", fmt="qcow2")
        disk.chain = [path]
        disk.open_chain(qmp)
        disk.compare(qmp)
        assert qmp.bitmaps("disk")["b"]["count"] == dirty * GRANULARITY
        qmp.execute("blockdev-del", node_name="base")
    handle.shutdown()
    disk.daemon.stop()
