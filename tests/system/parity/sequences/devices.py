"""Block devices: driver host_device beside driver file."""

from ..table import image, loop_device, nbd_server, sequence

DEVICE = {"driver": "host_device", "node-name": "d", "filename": "$DIR/a.dev"}


def blockdev(name, more=""):
    return ("--blockdev", f"host_device,node-name={name},filename=$DIR/{name}.dev,discard=unmap{more}")


@sequence(loop_device("a"), image("f", "raw"))
def device_open_refused(t):
    """What each of the two drivers takes, and what it says of the other's."""
    for name in ("$DIR/f.raw", "$DIR", "$DIR/nosuch", "host_device:$DIR/a.dev", "", "/dev/null"):
        t("blockdev-add", {**DEVICE, "filename": name, "node-name": "x", "read-only": True})
    for name in ("$DIR/a.dev", "/dev/null", "host_device:$DIR/a.dev"):
        t("blockdev-add", driver="file", node_name="y", filename=name)
    for more in ({"aio": "native"}, {"aio": "nosuch"}, {"locking": "nosuch"}, {"nosuch": 1},
                 {"filename": None}, {"size": 4096}, {"file": "x"}):
        t("blockdev-add", {**DEVICE, **more})
    t("blockdev-add", driver="host_device", node_name="d")
    t.nodes()


@sequence(loop_device("a"))
def device_names(t):
    """How file names of a device are told: plain, by a format, by json."""
    t("blockdev-add", DEVICE)
    t("blockdev-add", driver="raw", node_name="r", file="d")
    t("blockdev-add", driver="raw", node_name="o", file={**DEVICE, "node-name": "p", "locking": "off"},
      offset=512)
    t("query-named-block-nodes")
    t("query-blockstats", query_nodes=True)
    t("blockdev-del", node_name="d")
    t("blockdev-reopen", options=[{**DEVICE, "read-only": True}])
    t("blockdev-reopen", options=[{**DEVICE, "read-only": True, "driver": "file"}])
    t("blockdev-reopen", options=[{**DEVICE, "filename": "/dev/null"}])
    t("query-named-block-nodes", flat=True)


@sequence(loop_device("a"), *blockdev("a"))
def device_resize(t):
    """A device has the size that it has."""
    for size in (2 << 20, 8 << 20, (4 << 20) + 1, (4 << 20) - 1, 4 << 20, 0, -1):
        t("block_resize", node_name="a", size=size)
        t.nodes()


@sequence(loop_device("a"), *blockdev("a", ",cache.direct=on"), nbd_server("a"))
def device_requests(t):
    """Writes, zeroes, discards, flushes of any alignment."""
    t.write("a", 0, 65536)
    t.write("a", 100 << 10, 1000)
    t.zero("a", 4096, 8192)
    t.zero("a", 20000, 777)
    t.trim("a", 32768, 4096)
    t.read("a", 0, 131072)
    t.extents("a", "base:allocation")


@sequence(loop_device("a", read_only=True))
def device_not_writable(t):
    """The kernel would open it; nobody may write."""
    t("blockdev-add", DEVICE)
    t("blockdev-add", {**DEVICE, "driver": "file"})
    t("blockdev-add", {**DEVICE, "auto-read-only": True})
    t("nbd-server-start", addr={"type": "unix", "data": {"path": "$DIR/nbd.sock"}})
    t("block-export-add", type="nbd", id="e", node_name="d", writable=True)
    t("block-export-add", type="nbd", id="e", node_name="d")
    t("blockdev-add", {**DEVICE, "node-name": "r", "read-only": True})
    t.nodes()


@sequence(loop_device("q", "qcow2"), loop_device("a"),
          "--blockdev", "qcow2,node-name=q,file.driver=host_device,file.filename=$DIR/q.dev",
          *blockdev("a"), nbd_server("q", "a"))
def device_has_qcow2(t):
    """A qcow2 image on a device: bitmaps in it, its size, a backup from one device to another."""
    t.write("q", 65536, 200000)
    t("block-dirty-bitmap-add", node="q", name="b", persistent=True)
    t.write("q", 1 << 20, 65536)
    t("block_resize", node_name="q", size=6 << 20)
    t("block_resize", node_name="q", size=4 << 20)
    t("blockdev-backup", job_id="j", device="q", target="a", sync="full")
    t.wait_job("j", "null")
    t.read("a", 0, 4 << 20)
    t("query-named-block-nodes", flat=True)
    t.finish()
    t.check("q.qcow2")
    t.bitmaps_on_disk("q.qcow2")


@sequence(loop_device("a", size="8M"), loop_device("t", size="8M"), loop_device("s", size="2M"),
          *blockdev("a"), nbd_server("a"))
def device_is_made(t):
    """drive-backup and drive-mirror onto devices, which are there already."""
    t.write("a", 0, 65536)
    to_device = {"job-id": "j", "device": "a", "target": "$DIR/t.dev", "sync": "full"}
    for target in ("$DIR/t.dev", "host_device:$DIR/t.dev"):
        for fmt in ("raw", "qcow2"):
            t("drive-backup", {**to_device, "target": target, "format": fmt})
            t.wait_job("j", "null")
    t("drive-backup", {**to_device, "mode": "existing"})
    t.wait_job("j", "null")
    t("drive-mirror", {**to_device, "format": "raw"})
    t.wait("BLOCK_JOB_READY", device="j")
    t("block-job-complete", device="j")
    t.wait_job("j", "null")
    t("drive-backup", {**to_device, "target": "$DIR/s.dev", "format": "qcow2"})
    t.wait_job("j", "null")
    for target, formats in (("$DIR/s.dev", ("raw", "host_device")),
                            ("host_device:$DIR/nosuch", ("raw", "qcow2", "host_device")),
                            ("/dev/null", ("raw", "host_device", "file")),
                            ("file:$DIR/t.dev", ("raw", "qcow2", "host_device"))):
        for fmt in formats:
            t("drive-backup", {**to_device, "target": target, "format": fmt})
    t("blockdev-create", job_id="c", options={"driver": "host_device", "filename": "$DIR/t.dev",
                                              "size": 4096})
    t("blockdev-create", job_id="c", options={"driver": "file", "filename": "$DIR/t.dev", "size": 4096})
    t.wait_job("c", "concluded")
    t("query-jobs")


@sequence(loop_device("a"), *blockdev("a"))
def device_is_locked(t):
    """QEMU's locks lie on the device's name."""
    t("blockdev-add", {**DEVICE, "node-name": "b"})
    t("nbd-server-start", addr={"type": "unix", "data": {"path": "$DIR/nbd.sock"}})
    t("block-export-add", type="nbd", id="e", node_name="a", writable=True)
    t("blockdev-add", driver="qcow2", node_name="q", file="b")
    t.run("--blockdev", "driver=raw,node-name=r,file.driver=host_device,file.filename=$DIR/a.dev",
          "--blockdev", "driver=raw,node-name=s,file=r", stays=True)
