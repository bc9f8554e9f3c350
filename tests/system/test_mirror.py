"""Mirrors with real guests: several NBD clients write while the disk is copied and while they are moved
to the target; what they have been answered must be there, and the old disk stays as it was left."""

import pytest
from tidemark_testlib import (
    Daemon, check_image, connect, create_image, nbd_uri, qemu_img,
)
from tidemark_testlib.load import Load, Model

MiB = 1 << 20
SIZE = 64 * MiB


def start(tmp, target_format="qcow2", **target_options):
    image = create_image(tmp / "disk.qcow2", size=SIZE)
    target = create_image(tmp / f"target.{target_format}", target_format, SIZE, **target_options)
    sock = tmp / "nbd.sock"
    daemon = Daemon(
        "--blockdev", f"qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={image}",
        "--blockdev", f"{target_format},node-name=target,discard=unmap,file.driver=file,"
                      f"file.filename={target},file.discard=unmap",
        "--nbd-server", f"addr.type=unix,addr.path={sock}",
        "--export", "nbd,id=guest,node-name=disk,name=guest,writable=on", directory=tmp)
    return daemon, nbd_uri(sock, "guest"), image, target


def content(path, fmt):
    raw = path.with_suffix(".content")
    qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def export_node(q, ident):
    return next(e["node-name"] for e in q.execute("query-block-exports") if e["id"] == ident)


def settle(load, model):
    """Ends the load; every write was answered."""
    assert not list(load.end())
    return model.copy()


@pytest.mark.parametrize("options, fmt, target_options", [
    ({}, "qcow2", {}),
    ({}, "raw", {}),
    ({"granularity": 4096, "buf_size": 1 << 20}, "qcow2", {"cluster_size": 1 << 20}),
    ({"copy_mode": "write-blocking"}, "qcow2", {}),
    ({"copy_mode": "write-blocking", "granularity": 1 << 20}, "raw", {}),
])
def test_guests_are_moved(tidemarkd, tmp, options, fmt, target_options):
    daemon, uri, image, target = start(tmp, fmt, **target_options)
    with daemon as d:
        q = d.qmp
        model = Model(SIZE)
        load = Load(uri, model, clients=3, per_second=150)
        load.wait_written(60)
        q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full",
                  **options)
        q.wait_event("BLOCK_JOB_READY", device="m")
        load.wait_written(30)
        q.execute("job-complete", id="m")
        assert "error" not in q.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
        q.wait_job("m", "null")
        assert export_node(q, "guest") == "target"
        load.wait_written(60)
        with load.paused():
            before = model.copy()
            handle = connect(uri)
            read = b"".join(bytes(handle.pread(MiB, at)) for at in range(0, SIZE, MiB))
            assert read == before
        final = settle(load, model)
        q.execute("blockdev-del", node_name="disk")     # nobody's any more
    assert content(target, fmt) == final
    assert content(image, "qcow2") != final
    check_image(image)
    if fmt == "qcow2":
        check_image(target)


def test_completed_without_pivot(tidemarkd, tmp):
    daemon, uri, image, target = start(tmp)
    with daemon as d:
        q = d.qmp
        model = Model(SIZE)
        load = Load(uri, model, clients=3, per_second=150)
        load.wait_written(60)
        q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full")
        q.wait_event("BLOCK_JOB_READY", device="m")
        load.wait_written(30)
        with load.paused():
            instant = model.copy()
            q.execute("block-job-cancel", device="m")
            q.wait_event("BLOCK_JOB_COMPLETED", device="m")
            q.wait_job("m", "null")
        assert export_node(q, "guest") == "disk"
        load.wait_written(30)
        final = settle(load, model)
        q.execute("blockdev-del", node_name="target")
    assert content(target, "qcow2") == instant
    assert content(image, "qcow2") == final


@pytest.mark.parametrize("mode", ["on-success", "always", "never"])
def test_increments_from_a_bitmap(tidemarkd, tmp, mode):
    """The target follows the disk from mirror to mirror; the second one is stopped half way."""
    daemon, uri, image, target = start(tmp)
    with daemon as d:
        q = d.qmp
        model = Model(SIZE)
        load = Load(uri, model, clients=3, per_second=200)

        def mirror(end="block-job-cancel", **more):
            q.execute("blockdev-mirror", job_id="m", device="disk", target="target", **more)
            q.wait_event("BLOCK_JOB_READY", device="m")
            load.wait_written(20)
            with load.paused():
                instant = model.copy()
                q.execute(end, device="m")
                q.wait_event("BLOCK_JOB_COMPLETED", device="m")
                q.wait_job("m", "null")
            return instant

        load.wait_written(60)
        q.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=32768)
        mirror(sync="full")
        load.wait_written(60)
        increment = {"sync": "bitmap", "bitmap": "b", "bitmap_mode": mode}

        q.execute("blockdev-mirror", job_id="m", device="disk", target="target", speed=1 << 18,
                  **increment)
        q.wait_job("m", "running")
        load.wait_written(20)
        assert q.bitmaps("disk")["b"]["busy"]
        q.execute("block-job-cancel", device="m")
        q.wait_event("BLOCK_JOB_CANCELLED", device="m")
        q.wait_job("m", "null")
        assert not q.bitmaps("disk")["b"]["busy"]
        with load.paused():
            assert q.bitmaps("disk")["b"]["count"] > 0

        instant = mirror(**increment)
        with load.paused():
            count = q.bitmaps("disk")["b"]["count"]
        load.wait_written(60)
        if mode != "never":     # few chunks could be written since
            assert count < 40 * 3 * 65536
            with load.paused():
                assert q.bitmaps("disk")["b"]["count"] > 0
        settle(load, model)
        q.execute("blockdev-del", node_name="target")
    assert content(target, "qcow2") == instant


def test_steady_writes_converge(tidemarkd, tmp):
    """Guests that write all the time, and faster than the speed limit: with write-blocking the mirror
    becomes ready nevertheless; changed while it runs."""
    daemon, uri, _, target = start(tmp)
    with daemon as d:
        q = d.qmp
        model = Model(SIZE)
        load = Load(uri, model, clients=4, per_second=400)
        load.wait_written(200)
        q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full",
                  speed=24 * MiB)
        load.wait_written(100)
        q.execute("block-job-change", id="m", type="mirror", copy_mode="write-blocking")
        q.wait_event("BLOCK_JOB_READY", device="m", timeout=60)
        q.execute("job-complete", id="m")
        q.wait_job("m", "null")
        load.wait_written(100)
        final = settle(load, model)
    assert content(target, "qcow2") == final
