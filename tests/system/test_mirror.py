"""Mirrors with real guests: several NBD clients write while the disk is copied and while they are moved
to the target; what they have been answered must be there, and the old disk stays as it was left."""

import json
import signal
import subprocess
import time

import nbd
import pytest
from tidemark_testlib import (
    Daemon, QMPError, check_image, connect, create_image, nbd_uri, qemu_img, qemu_io, wait_until,
)
from tidemark_testlib.load import Load, Model
from tidemark_testlib.nbd import extents

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


def test_an_export_with_a_bitmap_is_moved(tidemarkd, tmp):
    """The guest moves, twice, and back, and its export goes on to show the bitmap of the first disk, which stays
    busy and keeps that disk. (qemu-storage-daemon 7.2 aborts when the disk is to go.)"""
    daemon, _, _, _ = start(tmp)
    create_image(tmp / "third.raw", "raw", SIZE)
    context = "qemu:dirty-bitmap:b"
    with daemon as d:
        q = d.qmp
        q.execute("blockdev-add", driver="raw", node_name="third",
                  file={"driver": "file", "filename": str(tmp / "third.raw")})
        q.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        q.execute("block-export-add", type="nbd", id="shows", node_name="disk", name="shows", writable=True,
                  bitmaps=["b"])
        guest = connect(nbd_uri(tmp / "nbd.sock", "shows"), [context])
        guest.pwrite(b"a" * 65536, 65536)
        for n, (device, target) in enumerate([("disk", "target"), ("target", "third")]):
            q.execute("blockdev-mirror", job_id=f"m{n}", device=device, target=target, sync="full")
            q.wait_event("BLOCK_JOB_READY", device=f"m{n}")
            q.execute("job-complete", id=f"m{n}")
            q.wait_job(f"m{n}", "null")
            assert export_node(q, "shows") == target
            guest.pwrite(b"b" * 65536, (3 + n) * 65536)
            assert [e for e in extents(guest, context) if e[2]] == [(65536, 65536, 1)]
            with pytest.raises(QMPError, match="disk.* is in use"):
                q.execute("blockdev-del", node_name="disk")
            with pytest.raises(QMPError, match="Bitmap 'b' is currently in use"):
                q.execute("block-dirty-bitmap-remove", node="disk", name="b")
        assert guest.pread(5 * 65536, 0) == b"".join(bytes([byte]) * 65536 for byte in b"\0a\0bb")
        q.execute("blockdev-mirror", job_id="back", device="third", target="disk", sync="full")
        q.wait_event("BLOCK_JOB_READY", device="back")
        q.execute("job-complete", id="back")
        q.wait_job("back", "null")
        guest.pwrite(b"c" * 65536, 10 * 65536)      # where the bitmap is, and it records
        assert any(at <= 10 * 65536 < at + length for at, length, dirty in extents(guest, context) if dirty)
        guest.shutdown()
        q.execute("block-export-del", id="shows")
        q.wait_event("BLOCK_EXPORT_DELETED", id="shows")
        assert not q.bitmaps("disk")["b"]["busy"]
        q.execute("block-dirty-bitmap-remove", node="disk", name="b")


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
                return instant, q.bitmaps("disk")["b"]["count"]

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

        instant, count = mirror(**increment)
        assert (count > 0) == (mode == "never")
        load.wait_written(60)
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


def fio(uri, tmp):
    """Four clients that write at random and read back what they wrote, until SIGINT; as a process."""
    job = tmp / "verify.fio"
    job.write_text(f"""[global]
ioengine=nbd
uri={uri}
rw=randwrite
bsrange=512-64k
blockalign=512
iodepth=8
size=8m
time_based=1
runtime=3600
rate_iops=400
verify=crc32c
verify_backlog=32
verify_fatal=1
verify_state_save=0
randseed=11
""" + "".join(f"[c{i}]\noffset={16 * i}m\n" for i in range(4)))
    return subprocess.Popen(["fio", "--output-format=json", job], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_fio_verifies_over_pivots(tidemarkd, tmp, mode):
    """Its four clients are moved from disk to disk while they write and read back."""
    daemon, uri, _, _ = start(tmp)
    create_image(tmp / "third.raw", "raw", SIZE)
    with daemon as d:
        q = d.qmp
        q.execute("blockdev-add", driver="raw", node_name="third",
                  file={"driver": "file", "filename": str(tmp / "third.raw")})

        def written(node):
            return next(s["stats"]["wr_bytes"] for s in q.execute("query-blockstats", query_nodes=True)
                        if s["node-name"] == node)

        def see(node):
            """They write to this disk."""
            before = written(node)
            wait_until(lambda: written(node) > before + MiB)

        with fio(uri, tmp) as process:
            see("disk")
            for n, (device, target) in enumerate([("disk", "target"), ("target", "third"),
                                                  ("third", "disk"), ("disk", "target")]):
                q.execute("blockdev-mirror", job_id=f"m{n}", device=device, target=target,
                          sync="full", copy_mode=mode)
                q.wait_event("BLOCK_JOB_READY", device=f"m{n}", timeout=60)
                q.execute("job-complete", id=f"m{n}")
                assert "error" not in q.wait_event("BLOCK_JOB_COMPLETED", device=f"m{n}")["data"]
                q.wait_job(f"m{n}", "null")
                assert export_node(q, "guest") == target
                see(target)
            assert process.poll() is None       # it has seen it all
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert process.returncode in (0, 128), out.decode() + err.decode()
        jobs = json.loads(out[out.index(b"{"):])["jobs"]
        assert len(jobs) == 4 and all(j["error"] == 0 for j in jobs)
        assert all(j["write"]["io_bytes"] > 0 for j in jobs)


def delayed(path, event="none"):
    return {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)},
            "x-tidemark-delay": [{"event": event, "iotype": "write", "delay-ns": 3600 * 10**9}]}


def add_slow(q, how, target):
    if how == "blkdebug":
        q.execute("blockdev-del", node_name="target")
        q.execute("blockdev-add", driver="raw", node_name="slow", file=delayed(target))
    elif how == "qcow2":
        q.execute("blockdev-del", node_name="target")
        q.execute("blockdev-add", driver="qcow2", node_name="slow", file=delayed(target, "write_aio"))
    elif how == "null-co":
        q.execute("blockdev-add", driver="null-co", node_name="slow", size=SIZE,
                  latency_ns=3600 * 10**9)
    else:
        q.execute("object-add", qom_type="throttle-group", id="g", limits={"bps-write": 1})
        q.execute("blockdev-add", driver="throttle", node_name="slow", throttle_group="g",
                  file="target")


def write_that_waits(guest):
    """The cookie and the place of a write that is not answered. A throttled target takes the first
    request at once, whosever it is."""
    for at in range(0, 4 * 65536, 65536):
        cookie = guest.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"b" * 65536)), at)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            if guest.aio_command_completed(cookie):     # says so once
                break
            guest.poll(50)
        else:
            return cookie, at
    raise AssertionError("no write waits for the target")


@pytest.mark.parametrize("how, ends", [("blkdebug", True), ("qcow2", False), ("null-co", False),
                                       ("throttle", True)])
def test_a_target_that_hangs_is_given_up(tidemarkd, tmp, how, ends):
    """Cancelled by force, with a guest's write that waits for the target; and when the daemon ends
    (not with a target that hangs even when it is closed)."""
    daemon, uri, _, target = start(tmp, "raw" if how == "blkdebug" else "qcow2")
    with daemon as d:
        q = d.qmp
        add_slow(q, how, target)
        guest = connect(uri)
        guest.pwrite(b"a" * 65536, 0)
        for n in range(1 + ends):
            q.execute("blockdev-mirror", job_id="m", device="disk", target="slow", sync="full",
                      copy_mode="write-blocking")
            cookie, at = write_that_waits(guest)
            if n == 1:
                break
            q.execute("block-job-cancel", device="m", force=True)
            q.wait_event("BLOCK_JOB_CANCELLED", device="m")
            q.wait_job("m", "null")
            while not guest.aio_command_completed(cookie):
                assert guest.poll(60000) > 0
            assert guest.pread(65536, at) == b"b" * 65536
        if ends:
            d.stop()
        else:
            d.kill()


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_become_holes_or_not(tidemarkd, tmp, unmap):
    """unmap of drive-mirror, seen in the blocks of a file that was full."""
    daemon, uri, _, _ = start(tmp)
    full = tmp / "full.raw"
    full.write_bytes(b"\xee" * (SIZE // 4) + b"\xdd" * (SIZE - SIZE // 4))
    with daemon as d:
        q = d.qmp
        connect(uri).pwrite(b"a" * MiB, 3 * MiB)
        q.execute("drive-mirror", job_id="m", device="disk", target=str(full), sync="full",
                  mode="existing", format="raw", unmap=unmap)
        q.wait_event("BLOCK_JOB_READY", device="m")
        q.execute("block-job-cancel", device="m")
        q.wait_job("m", "null")
    assert full.read_bytes() == bytes(3 * MiB) + b"a" * MiB + bytes(SIZE - 4 * MiB)
    blocks = full.stat().st_blocks * 512
    assert blocks < 2 * MiB if unmap else blocks >= SIZE


def test_an_increment_onto_the_copy_of_before(tidemarkd, tmp):
    """drive-mirror twice: whole, then what has changed since, into the same file and into a new one
    that has it behind."""
    daemon, uri, _, _ = start(tmp)
    rest = b"r" * (SIZE // 2)       # is written once: a change is smaller than the whole
    with daemon as d:
        q = d.qmp
        model = Model(SIZE // 2)
        connect(uri).pwrite(rest, SIZE // 2)
        load = Load(uri, model, clients=3, per_second=150)
        load.wait_written(60)
        q.execute("block-dirty-bitmap-add", node="disk", name="b")

        def mirror(path, **options):
            q.execute("drive-mirror", job_id="m", device="disk", target=str(path), **options)
            q.wait_event("BLOCK_JOB_READY", device="m")
            load.wait_written(20)
            with load.paused():
                q.execute("block-job-cancel", device="m")
                assert "error" not in q.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
                q.wait_job("m", "null")
                return model.copy() + rest

        full, change = tmp / "full.qcow2", tmp / "change.qcow2"
        mirror(full, sync="full", format="qcow2")
        load.wait_written(60)
        first = mirror(full, sync="incremental", bitmap="b", mode="existing", format="qcow2")
        load.wait_written(60)
        create_image(change, size=SIZE, backing_file=full, backing_fmt="qcow2")
        second = mirror(change, sync="incremental", bitmap="b", mode="existing", format="qcow2")
        settle(load, model)
    assert content(full, "qcow2") == first != second
    assert content(change, "qcow2") == second
    assert 0 < change.stat().st_size < full.stat().st_size


@pytest.fixture
def stored(tmp):
    """A disk with data and a stored bitmap that knows of it."""
    image = create_image(tmp / "stored.qcow2", size=SIZE)
    node = f"qcow2,node-name=disk,file.driver=file,file.filename={image},x-tidemark-persist.checkpoint-idle=0"
    sock = tmp / "first.sock"
    with Daemon("--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={sock}",
                "--export", "nbd,id=e,node-name=disk,name=e,writable=on", directory=tmp) as d:
        d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        connect(nbd_uri(sock, "e")).pwrite(b"x" * MiB, 5 * MiB)
    return node, image, create_image(tmp / "target.qcow2", size=SIZE)


def test_which_bitmaps_can_be_used(tidemarkd, tmp, stored):
    """Of a read-only disk for `never` alone; not one in use, nor an inconsistent one."""
    node, image, target = stored
    to = f"qcow2,node-name=target,file.driver=file,file.filename={target}"

    def mirror(q, mode):
        q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="bitmap",
                  bitmap="b", bitmap_mode=mode)

    with Daemon("--blockdev", node + ",read-only=on", "--blockdev", to, directory=tmp) as d:
        q = d.qmp
        for mode in ("on-success", "always"):
            with pytest.raises(QMPError, match="Bitmap 'b' is readonly and cannot be modified"):
                mirror(q, mode)
        mirror(q, "never")
        q.wait_event("BLOCK_JOB_READY", device="m")
        assert q.bitmaps("disk")["b"]["busy"]
        q.execute("job-complete", id="m")
        assert "error" not in q.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
        q.wait_job("m", "null")
        assert q.bitmaps("disk")["b"] == {**q.bitmaps("disk")["b"], "busy": False, "count": MiB}
    assert content(target, "qcow2") == bytes(5 * MiB) + b"x" * MiB + bytes(SIZE - 6 * MiB)

    with Daemon("--blockdev", node, "--blockdev", to, "--nbd-server",
                f"addr.type=unix,addr.path={tmp / 'second.sock'}", directory=tmp) as d:
        q = d.qmp
        q.execute("block-export-add", type="nbd", id="e", node_name="disk", bitmaps=["b"],
                  writable=True)
        with pytest.raises(QMPError, match="Bitmap 'b' is currently in use by another operation"):
            mirror(q, "never")
        q.execute("block-export-del", id="e")
        q.wait_event("BLOCK_EXPORT_DELETED", id="e")
        mirror(q, "on-success")
        q.wait_event("BLOCK_JOB_READY", device="m")
        q.execute("block-job-cancel", device="m")
        q.wait_job("m", "null")
        assert q.bitmaps("disk")["b"]["count"] == 0
        d.kill(image)
    qemu_io(image, "write -P 1 0 512", fmt="qcow2")     # QEMU has no part in what we have written down
    with Daemon("--blockdev", node, "--blockdev", to, directory=tmp) as d:
        with pytest.raises(QMPError, match="Bitmap 'b' is inconsistent and cannot be used"):
            mirror(d.qmp, "never")
