"""README's table "How it compares": each row that is in our favour is a test here."""

import json
import struct

import pytest
from tidemark_testlib import (
    Daemon, QMPError, QSD, Exited, compare, connect, create_image, check_image, nbd_uri, qemu_img, qemu_io, sha256_of,
    wait_until,
)

MIB = 1 << 20


def qcow2(path, node):
    return f"qcow2,node-name={node},file.driver=file,file.filename={path}"


def test_several_connections_to_one_monitor_at_once(daemon, tmp):
    d = daemon("--blockdev", "null-co,node-name=n,size=1048576")
    connections = [d.qmp] + [d.new_monitor() for _ in range(3)]
    for one in connections:
        assert one.execute("query-named-block-nodes")[0]["node-name"] == "n"
    connections[1].execute("block-dirty-bitmap-add", node="n", name="b")
    assert "b" in connections[2].bitmaps("n")


def test_what_a_shrink_cut_off_and_a_grow_brought_back_is_in_the_increment(daemon, tmp):
    disk = create_image(tmp / "disk.qcow2", size=8 * MIB)
    qemu_io(disk, "write -P 0x77 0 8M", fmt="qcow2")
    full = create_image(tmp / "full.qcow2", size=8 * MIB)
    increment = create_image(tmp / "inc.qcow2", size=8 * MIB, backing_file=full, backing_fmt="qcow2")
    d = daemon("--blockdev", qcow2(disk, "disk"), "--blockdev", qcow2(full, "full"))
    d.qmp.transaction(
        ("block-dirty-bitmap-add", {"node": "disk", "name": "b"}),
        ("blockdev-backup", {"device": "disk", "target": "full", "job-id": "j", "sync": "full"}))
    d.qmp.wait_job("j", "null")
    d.qmp.execute("blockdev-del", node_name="full")
    d.qmp.execute("block_resize", node_name="disk", size=4 * MIB)
    d.qmp.execute("block_resize", node_name="disk", size=8 * MIB)
    d.qmp.execute("blockdev-add", driver="qcow2", node_name="inc",
                  file={"driver": "file", "filename": str(increment)})
    done = d.qmp.run_job("blockdev-backup", "k", device="disk", target="inc", sync="incremental",
                         bitmap="b")
    assert done["len"] == 4 * MIB and "error" not in done
    d.stop()
    assert compare(disk, increment)
    assert sha256_of(disk) == sha256_of(increment)
    assert not compare(disk, full)


def break_bitmap(path, name):
    """Writes an impossible granularity into the directory's entry of NAME."""
    with open(path, "r+b") as file:
        data = file.read()
        at = struct.unpack_from(">I", data, 100)[0]
        while struct.unpack_from(">I", data, at)[0] != 0x23852875:
            at += 8 + (struct.unpack_from(">I", data, at + 4)[0] + 7) // 8 * 8
        entry = struct.unpack_from(">Q", data, at + 8 + 16)[0]
        while True:
            name_size, extra = struct.unpack_from(">HI", data, entry + 18)
            if data[entry + 24 + extra:entry + 24 + extra + name_size] == name.encode():
                break
            entry += (24 + extra + name_size + 7) // 8 * 8
        file.seek(entry + 17)
        file.write(bytes([200]))


def test_a_bad_bitmap_does_not_keep_the_image_closed(daemon, tmp):
    disk = create_image(tmp / "disk.qcow2", size=8 * MIB)
    for name in ("good", "bad", "other"):
        qemu_img("bitmap", "--add", disk, name)
    qemu_io(disk, "write 1M 64k", fmt="qcow2")
    break_bitmap(disk, "bad")
    with pytest.raises(Exited):
        Daemon("--blockdev", qcow2(disk, "disk"), binary=QSD, directory=tmp)
    d = daemon("--blockdev", qcow2(disk, "disk"))
    bitmaps = d.qmp.bitmaps("disk")
    assert bitmaps["good"]["count"] == 65536 and not bitmaps["good"].get("inconsistent")
    assert "bad" not in bitmaps and "'bad'" in d.stderr
    d.stop()
    # The clean end has written a directory that QEMU takes again.
    verdict = check_image(disk)
    assert not verdict["corruptions"] and not verdict["check-errors"]
    stored = json.loads(qemu_img("info", "--output=json", disk))["format-specific"]["data"]["bitmaps"]
    assert [b["name"] for b in stored] == ["good", "other"]


def test_backups_of_one_disk_may_end_together(daemon, tmp):
    disk = create_image(tmp / "disk.qcow2", size=8 * MIB)
    qemu_io(disk, "write -P 0x77 0 8M", fmt="qcow2")
    targets = [create_image(tmp / f"t{n}.qcow2", size=8 * MIB) for n in range(4)]
    d = daemon("--blockdev", qcow2(disk, "disk"),
               *(a for n, t in enumerate(targets) for a in ("--blockdev", qcow2(t, f"t{n}"))))
    for _ in range(5):
        d.qmp.transaction(*(("blockdev-backup", {
            "device": "disk", "target": f"t{n}", "job-id": f"j{n}", "sync": "full"})
            for n in range(4)))
        for n in range(4):
            done = d.qmp.wait_event("BLOCK_JOB_COMPLETED", device=f"j{n}")["data"]
            assert "error" not in done
            d.qmp.wait_job(f"j{n}", "null")
    d.stop()
    for target in targets:
        assert compare(disk, target)


def mirrored(daemon, tmp):
    disk = create_image(tmp / "disk.qcow2", size=8 * MIB)
    target = create_image(tmp / "target.qcow2", size=8 * MIB)
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", qcow2(disk, "disk"), "--blockdev", qcow2(target, "target"),
               "--nbd-server", f"addr.type=unix,addr.path={sock}",
               "--export", "nbd,id=e,node-name=disk,name=disk,writable=on")
    return d, connect(nbd_uri(sock, "disk")), disk, target


def test_a_failed_mirror_from_a_bitmap_is_resumed(daemon, tmp):
    d, guest, disk, target = mirrored(daemon, tmp)
    arguments = {"job_id": "m", "device": "disk", "target": "target", "sync": "bitmap",
                 "bitmap": "b", "bitmap_mode": "always"}
    d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b")
    guest.pwrite(b"x" * (4 * MIB), 0)
    d.qmp.execute("blockdev-mirror", speed=1, buf_size=MIB, **arguments)
    wait_until(lambda: d.qmp.job("m")["current-progress"] >= MIB)     # the first piece, and no more
    guest.pwrite(b"y" * 4096, 6 * MIB)
    d.qmp.execute("job-cancel", id="m")
    d.qmp.wait_job("m", "null")
    left = d.qmp.bitmaps("disk")["b"]["count"]
    assert 0 < left < 4 * MIB    # what was copied need not be copied again
    d.qmp.execute("blockdev-mirror", **arguments)
    d.qmp.wait_event("BLOCK_JOB_READY", device="m")
    d.qmp.execute("block-job-cancel", device="m")
    d.qmp.wait_job("m", "null")
    assert d.qmp.bitmaps("disk")["b"]["count"] == 0
    guest.shutdown()
    d.stop()
    assert compare(disk, target)


def test_guests_go_on_while_a_mirror_is_pending(daemon, tmp):
    d, guest, disk, target = mirrored(daemon, tmp)
    d.qmp.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full",
                  auto_finalize=False)
    d.qmp.wait_event("BLOCK_JOB_READY", device="m")
    d.qmp.execute("job-complete", id="m")
    d.qmp.wait_job("m", "pending")
    guest.pwrite(b"z" * 4096, 4096)
    d.qmp.execute("job-finalize", id="m")
    d.qmp.wait_job("m", "null")
    guest.shutdown()
    d.stop()
    assert compare(disk, target)


def test_a_failed_transaction_leaves_no_file(daemon, tmp):
    disk = create_image(tmp / "disk.qcow2", size=8 * MIB)
    d = daemon("--blockdev", qcow2(disk, "disk"))
    with pytest.raises(QMPError, match="aborted using Abort action"):
        d.qmp.transaction(
            ("drive-backup", {"device": "disk", "job-id": "j", "sync": "full", "format": "qcow2",
                              "target": str(tmp / "backup.qcow2")}),
            *(("blockdev-snapshot-sync", {
                "node-name": below, "snapshot-node-name": above,
                "snapshot-file": str(tmp / f"{above}.qcow2")})
              for below, above in (("disk", "one"), ("one", "two"))),
            ("abort", {}))
    assert sorted(p.name for p in tmp.glob("*.qcow2")) == ["disk.qcow2"]
    assert [n["drv"] for n in d.qmp.execute("query-named-block-nodes")] == ["qcow2", "file"]
