"""Persistent bitmaps of raw images, which live in a tide file beside them."""
import json

import pytest
from tidemark_testlib import Daemon, QMPError, connect, create_image, nbd_uri, qemu_io

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def start(tmp, tidemarkd, image):
    (tmp / "nbd.sock").unlink(missing_ok=True)
    return Daemon("--blockdev", json.dumps({"driver": "raw", "node-name": "a", "file": {
                      "driver": "file", "filename": str(image), "node-name": "af"}}),
                  "--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock",
                  binary=tidemarkd, directory=tmp)


def write(daemon, tmp, *offsets):
    daemon.qmp.execute("block-export-add", **{"type": "nbd", "id": "e", "node-name": "a",
                                              "writable": True})
    nbd = connect(nbd_uri(tmp / "nbd.sock", "a"))
    for offset in offsets:
        nbd.pwrite(b"1" * 512, offset)
    nbd.shutdown()
    daemon.qmp.execute("block-export-del", id="e", mode="hard")
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")


def bitmaps(daemon):
    nodes = daemon.qmp.execute("query-named-block-nodes")
    node = next(n for n in nodes if n["node-name"] == "a")
    return {b["name"]: b for b in node.get("dirty-bitmaps", [])}


def test_a_clear_is_the_first_change_after_a_kill(tmp, tidemarkd):
    """What the transaction keeps for its undo is moved to the new session's segment meanwhile."""
    with open(tmp / "a.raw", "wb") as f:
        f.truncate(256 * MiB)
    daemon = start(tmp, tidemarkd, tmp / "a.raw")
    try:
        daemon.qmp.execute("block-dirty-bitmap-add", node="a", name="x", persistent=True)
        write(daemon, tmp, MiB)
        for end in (daemon.kill, lambda: daemon.stop()):
            end()
            daemon = start(tmp, tidemarkd, tmp / "a.raw")
            daemon.qmp.transaction(("block-dirty-bitmap-clear", {"node": "a", "name": "x"}),
                                   ("block-dirty-bitmap-add", {"node": "a", "name": f"y{daemon.pid}"}))
            assert bitmaps(daemon)["x"]["count"] == 0
            write(daemon, tmp, 2 * MiB)
            assert bitmaps(daemon)["x"]["count"] == 64 * KiB
        daemon.stop()
    finally:
        daemon.kill()


def test_a_clear_that_a_backup_waits_for(tmp, tidemarkd):
    """Cleared, merged into and held by a job in one transaction: the clear is durable at once, and
    the transaction has what was before yet."""
    for name in ("a.raw", "t.raw"):
        with open(tmp / name, "wb") as f:
            f.truncate(64 * MiB)
    daemon = start(tmp, tidemarkd, tmp / "a.raw")
    qmp = daemon.qmp
    try:
        qmp.execute("blockdev-add", driver="raw", node_name="t",
                    file={"driver": "file", "filename": str(tmp / "t.raw")})
        for name in ("x", "y"):
            qmp.execute("block-dirty-bitmap-add", node="a", name=name, persistent=True)
        write(daemon, tmp, MiB)
        qmp.transaction(("block-dirty-bitmap-clear", {"node": "a", "name": "x"}),
                        ("block-dirty-bitmap-merge", {"node": "a", "target": "x", "bitmaps": ["y"]}),
                        ("blockdev-backup", {"device": "a", "target": "t", "job-id": "j",
                                             "sync": "incremental", "bitmap": "x"}))
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        assert bitmaps(daemon)["x"]["count"] == 0
        daemon.stop()
    finally:
        daemon.kill()


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_disk_outgrows_its_areas(tmp, tidemarkd, end):
    """Bitmaps that need thirty times the room in the tide file."""
    image = tmp / "a.raw"
    with open(image, "wb") as f:
        f.truncate(256 * MiB)
    daemon = start(tmp, tidemarkd, image)
    try:
        for name in ("x", "y"):
            daemon.qmp.execute("block-dirty-bitmap-add", node="a", name=name, granularity=512,
                               persistent=True)
        write(daemon, tmp, 200 * MiB)
        daemon.qmp.execute("block_resize", **{"node-name": "a", "size": 8 * GiB})
        write(daemon, tmp, 8 * GiB - 512, 0)
        before = {name: b["count"] for name, b in bitmaps(daemon).items()}
        if end == "killed":
            daemon.kill()
        else:
            daemon.stop()

        daemon = start(tmp, tidemarkd, image)
        after = bitmaps(daemon)
        assert {name: b["count"] for name, b in after.items()} == before
        assert set(after) == {"x", "y"} and min(before.values()) >= 3 * 512
        assert not any(b.get("inconsistent") for b in after.values())
        daemon.stop()
    finally:
        daemon.kill()


def test_nobody_writes_past_a_bitmap(tmp, tidemarkd):
    """An export of the node below, or another program, and a bitmap that records refuse each
    other, whoever came first."""
    image = create_image(tmp / "a.raw", fmt="raw", size="64M")
    daemon = start(tmp, tidemarkd, image)
    qmp = daemon.qmp
    export = {"type": "nbd", "id": "below", "node-name": "af", "writable": True}
    try:
        qmp.execute("block-dirty-bitmap-add", node="a", name="x", persistent=True)
        with pytest.raises(QMPError, match="Permission conflict on node 'af': permissions 'write'"
                                           ".*unshared by node 'a'"):
            qmp.execute("block-export-add", **export)
        assert 'Failed to get "write" lock' in qemu_io(image, "write 0 64k", fmt="raw", check=False)
        with pytest.raises(QMPError, match="Permission conflict on node 'af': permissions 'resize'"):
            qmp.execute("block_resize", node_name="af", size=128 * MiB)
        qmp.execute("block-export-add", **{**export, "writable": False})
        qmp.execute("block-export-del", id="below", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        write(daemon, tmp, MiB)
        assert bitmaps(daemon)["x"]["count"] == 64 * KiB

        qmp.execute("block-dirty-bitmap-disable", node="a", name="x")
        qmp.execute("block-export-add", **export)
        for command in ("enable", "add"):
            with pytest.raises(QMPError, match="Bitmap '.' of node 'a' would miss what others "
                                               "write: Permission conflict on node 'af'"):
                qmp.execute(f"block-dirty-bitmap-{command}", node="a",
                            name="x" if command == "enable" else "y")
        assert list(bitmaps(daemon)) == ["x"] and not bitmaps(daemon)["x"]["recording"]
        qmp.execute("block-export-del", id="below", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("block-dirty-bitmap-enable", node="a", name="x")
        daemon.stop()
    finally:
        daemon.kill()
