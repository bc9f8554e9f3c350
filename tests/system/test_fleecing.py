"""Pull backups as clients make them: libvirt's (sync none onto an overlay, exported with a bitmap) and
qmpbackup's (copy-before-write and snapshot-access, put under the export by blockdev-reopen)."""

import random

from tidemark_testlib import Daemon, check_image, connect, create_image, nbd_uri, qemu_img
from tidemark_testlib.nbd import extents

MiB = 1 << 20
SIZE = 8 * MiB


class Disk:
    """Writes through one export; remembers what must be there."""

    def __init__(self, uri, seed):
        self.nbd = connect(uri)
        self.rng = random.Random(seed)
        self.content = bytearray(SIZE)

    def write(self, times):
        for _ in range(times):
            offset = self.rng.randrange(SIZE - 70000)
            data = self.rng.randbytes(self.rng.randrange(1, 70000))
            self.nbd.pwrite(data, offset)
            self.content[offset:offset + len(data)] = data


def read_all(handle):
    return b"".join(bytes(handle.pread(MiB, at)) for at in range(0, SIZE, MiB))


def start(tmp, *more):
    image = create_image(tmp / "disk.qcow2", size=SIZE)
    sock = tmp / "nbd.sock"
    return Daemon("--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image}",
                  *more, "--nbd-server", f"addr.type=unix,addr.path={sock}", directory=tmp), sock


def test_pull_as_libvirt_does(tidemarkd, tmp):
    daemon, sock = start(tmp)
    with daemon as d:
        q = d.qmp
        q.execute("block-export-add", type="nbd", id="guest", node_name="disk", name="guest",
                  writable=True)
        disk = Disk(nbd_uri(sock, "guest"), 1)
        q.execute("block-dirty-bitmap-add", node="disk", name="check1", persistent=True)
        base = bytes(disk.content)
        disk.write(20)

        # The scratch image, and all of the backup in one transaction.
        scratch = tmp / "scratch.qcow2"
        q.execute("blockdev-create", job_id="create-1",
                  options={"driver": "file", "filename": str(scratch), "size": 0})
        q.wait_job("create-1")
        q.execute("job-dismiss", id="create-1")
        q.execute("blockdev-add", driver="file", node_name="scratch-file", filename=str(scratch))
        q.execute("blockdev-create", job_id="create-2",
                  options={"driver": "qcow2", "file": "scratch-file", "size": SIZE})
        q.wait_job("create-2")
        q.execute("job-dismiss", id="create-2")
        q.execute("blockdev-add", driver="qcow2", node_name="scratch", file="scratch-file",
                  backing="disk")
        instant = bytes(disk.content)
        q.transaction(
            ("block-dirty-bitmap-add", {"node": "disk", "name": "check2", "persistent": True}),
            ("block-dirty-bitmap-add", {"node": "scratch", "name": "pull", "disabled": True,
                                        "persistent": False, "granularity": 65536}),
            ("block-dirty-bitmap-merge", {"node": "scratch", "target": "pull",
                                          "bitmaps": [{"node": "disk", "name": "check1"}]}),
            ("blockdev-backup", {"device": "disk", "job-id": "pull", "target": "scratch",
                                 "sync": "none", "auto-finalize": True, "auto-dismiss": False}))
        q.execute("block-export-add", type="nbd", id="pull", node_name="scratch", name="vda",
                  writable=False, bitmaps=["pull"])

        disk.write(30)
        old = connect(nbd_uri(sock, "vda"), ["base:allocation", "qemu:dirty-bitmap:pull"])
        assert read_all(old) == instant
        disk.write(30)
        assert read_all(old) == instant
        dirty = extents(old, "qemu:dirty-bitmap:pull")
        changed = bytearray(base)
        for offset, length, flags in dirty:
            if flags & 1:
                changed[offset:offset + length] = instant[offset:offset + length]
        assert changed == instant

        old.shutdown()
        q.execute("block-export-del", id="pull", mode="hard")
        q.execute("job-cancel", id="pull")
        q.wait_job("pull")
        q.execute("job-dismiss", id="pull")
        q.execute("blockdev-del", node_name="scratch")
        q.execute("blockdev-del", node_name="scratch-file")
        assert set(q.bitmaps("disk")) == {"check1", "check2"}
        assert read_all(disk.nbd) == disk.content
        disk.nbd.shutdown()
    assert check_image(tmp / "disk.qcow2")["corruptions"] == 0


def test_push_from_a_fleecing_image_as_qmpbackup_does(tidemarkd, tmp):
    create_image(tmp / "fleece.qcow2", size=SIZE)
    create_image(tmp / "full.qcow2", size=SIZE)
    create_image(tmp / "inc.qcow2", size=SIZE, backing_file=tmp / "full.qcow2",
                 backing_fmt="qcow2")
    # The export stands on a node of its own, so that what is under it can be changed.
    daemon, sock = start(tmp, "--blockdev", "raw,node-name=top,file=disk")
    with daemon as d:
        q = d.qmp
        q.execute("block-export-add", type="nbd", id="guest", node_name="top", name="guest",
                  writable=True)
        disk = Disk(nbd_uri(sock, "guest"), 2)
        disk.write(20)
        instants = {}
        for name in ("full", "inc"):
            more = {}
            if name == "inc":
                more = {"bitmap": {"node": "disk", "name": "b"}}
            create_image(tmp / "fleece.qcow2", size=SIZE)
            q.execute("blockdev-add", driver="qcow2", node_name="fleece",
                      file={"driver": "file", "filename": str(tmp / "fleece.qcow2"),
                            "cache": {"direct": False, "no-flush": True}})
            q.execute("blockdev-add", driver="qcow2", node_name=name, backing=None,
                      file={"driver": "file", "filename": str(tmp / f"{name}.qcow2")})
            q.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk",
                      target="fleece", on_cbw_error="break-snapshot", cbw_timeout=45, **more)
            q.execute("blockdev-reopen",
                      options=[{"driver": "raw", "node-name": "top", "file": "cbw"}])
            q.execute("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
            # Nobody has written since the filter was made: this is its instant.
            instants[name] = bytes(disk.content)
            if name == "full":
                q.execute("block-dirty-bitmap-add", node="disk", name="b")
                q.execute("blockdev-backup", job_id="j", device="snap", target=name, sync="full",
                          speed=1)
            else:
                q.transaction(
                    ("block-dirty-bitmap-add", {"node": "snap", "name": "copy", "disabled": True}),
                    ("block-dirty-bitmap-merge", {"node": "snap", "target": "copy",
                                                  "bitmaps": [{"node": "disk", "name": "b"}]}),
                    ("block-dirty-bitmap-clear", {"node": "disk", "name": "b"}),
                    ("blockdev-backup", {"job-id": "j", "device": "snap", "target": name,
                                         "sync": "bitmap", "bitmap": "copy",
                                         "bitmap-mode": "never", "speed": 1}))
            disk.write(20)
            q.execute("block-job-set-speed", device="j", speed=0)
            done = q.wait_event("BLOCK_JOB_COMPLETED", device="j")["data"]
            assert "error" not in done, done
            q.wait_job("j", "null")
            if name == "inc":
                q.execute("block-dirty-bitmap-remove", node="snap", name="copy")
            q.execute("blockdev-del", node_name="snap")
            q.execute("blockdev-reopen",
                      options=[{"driver": "raw", "node-name": "top", "file": "disk"}])
            for node in ("cbw", "fleece", name):
                q.execute("blockdev-del", node_name=node)
        assert read_all(disk.nbd) == disk.content
        disk.nbd.shutdown()
    for name, instant in instants.items():
        qemu_img("convert", "-O", "raw", tmp / f"{name}.qcow2", tmp / "raw")
        assert (tmp / "raw").read_bytes() == instant, name
        assert check_image(tmp / f"{name}.qcow2")["corruptions"] == 0
