"""qcow2 images through the daemon: killed under load, and everything that qemu-img has to say."""

import json
import os
import random
import struct
import subprocess
import threading
import time

import nbd
import pytest
from tidemark_testlib import (
    Daemon, check_image, connect, create_image, nbd_uri, qemu_img, qemu_io,
)

MIB = 1 << 20


def serve(image, tmp, *, extra="", start=True):
    sock = tmp / "nbd.sock"
    if sock.exists():
        sock.unlink()
    return Daemon(
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", f"driver=qcow2,node-name=disk,file=file,discard=unmap{extra}",
        "--nbd-server", f"addr.type=unix,addr.path={sock}",
        "--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on",
        directory=tmp, start=start), nbd_uri(sock, "disk")


class Writer(threading.Thread):
    """Stamps blocks of its own; knows which stamps a flush has made durable."""

    def __init__(self, uri, number, of, size, block, seed):
        super().__init__(daemon=True)
        self.handle = connect(uri)
        self.number, self.of, self.size, self.block = number, of, size, block
        self.random = random.Random(seed)
        self.last = {}        # block: every stamp since its last durable one, that one first
        self.pending = {}
        self.stamp = 0

    def run(self):
        blocks = self.size // self.block
        try:
            while True:
                at = self.random.randrange(blocks // self.of) * self.of + self.number
                if self.random.random() < 0.03:
                    durable = {k: v[-1] for k, v in self.last.items()}
                    self.handle.flush()
                    for k, v in durable.items():
                        stamps = self.last[k]
                        self.last[k] = stamps[stamps.index(v):]
                    continue
                if self.random.random() < 0.1:
                    stamp = 0
                    self.last.setdefault(at, [0]).append(0)
                    self.handle.zero(self.block, at * self.block)
                    continue
                self.stamp += 1
                stamp = self.stamp * 64 + self.number
                self.last.setdefault(at, [0]).append(stamp)
                self.handle.pwrite(struct.pack("<Q", stamp) * (self.block // 8), at * self.block)
        except (nbd.Error, OSError):
            pass   # the server was killed

    def check(self, data):
        for at, stamps in self.last.items():
            got = struct.unpack_from("<Q", data, at * self.block)[0]
            assert got in stamps, f"block {at} holds {got}, written were {stamps[-3:]}"


@pytest.mark.parametrize("cluster,version", [(512, "1.1"), (4096, "1.1"), (65536, "1.1"),
                                             (65536, "0.10"), (2 * MIB, "1.1")])
def test_a_kill_leaves_leaks_at_most(tmp, cluster, version):
    image, base = tmp / "disk.qcow2", tmp / "base.raw"
    size = 24 * MIB
    base.write_bytes(bytes(size // 2))   # shorter than the image
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={version}", "-b",
             base, "-F", "raw", image, str(size))
    for life in range(4):
        extra = ",l2-cache-size=1,refcount-cache-size=1" if life % 2 else ""
        daemon, uri = serve(image, tmp, extra=extra)
        writers = [Writer(uri, i, 4, size, 4096, seed=life * 10 + i) for i in range(4)]
        if life == 0:
            known = {}
        for w in writers:
            w.last = known.get(w.number, {})
            w.stamp = life * 1000000
            w.start()
        time.sleep(0.4 + 0.2 * life)
        daemon.kill(image)
        for w in writers:
            w.join(60)
        checked = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(image)],
                                 capture_output=True, text=True, check=False)
        assert checked.returncode in (0, 3), checked.stdout + checked.stderr
        raw = tmp / "out.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
        data = raw.read_bytes()
        for w in writers:
            w.check(data)
            # what there is now is what the next life starts from
            w.last = {at: [struct.unpack_from("<Q", data, at * 4096)[0]] for at in w.last}
            known[w.number] = w.last
        os.unlink(raw)


def test_info_is_that_of_qemu_img(tmp, daemon):
    for number, options in enumerate(["compat=1.1", "compat=0.10", "lazy_refcounts=on",
                                      "cluster_size=512", "cluster_size=2M"]):
        image = tmp / f"i{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "64M")
        if "0.10" not in options:
            qemu_img("bitmap", "--add", image, "b0")
            qemu_img("bitmap", "--add", "--disable", "-g", "4096", image, "b1")
        theirs = json.loads(qemu_img("info", "--output=json", image))
        d = daemon("--blockdev", f"driver=file,node-name=f{number},filename={image},read-only=on",
                   "--blockdev", f"driver=qcow2,node-name=n{number},file=f{number},read-only=on")
        node = next(n for n in d.qmp.execute("query-named-block-nodes")
                    if n["node-name"] == f"n{number}")
        for key in ("virtual-size", "cluster-size", "format", "format-specific", "dirty-flag"):
            assert node["image"][key] == theirs[key], (options, key)
        d.stop()


@pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
def test_space_taken_ahead_is_given_back(tmp, cluster):
    image = tmp / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, "256M")
    daemon, uri = serve(image, tmp)
    handle = connect(uri)
    for at in range(0, 32 * MIB, MIB):
        handle.pwrite(b"\x5a" * MIB, at)
    handle.flush()
    handle.shutdown()
    daemon.stop()
    check_image(image)
    end = json.loads(qemu_img("check", "--output=json", image))["image-end-offset"]
    assert os.path.getsize(image) <= end + cluster
    qemu_io(image, "read -P 0x5a 0 32M", "read -P 0 32M 224M")


def test_an_entry_at_metadata_is_an_event_and_a_refusal(tmp):
    image = tmp / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "write -P 1 0 64k")
    with open(image, "r+b") as f:
        f.seek(40)
        l1 = struct.unpack(">Q", f.read(8))[0]
        f.seek(l1)
        l2 = struct.unpack(">Q", f.read(8))[0] & ((1 << 56) - 1)
        f.seek(l2)
        f.write(struct.pack(">Q", 1 << 63 | 0x10000))   # the refcount table
    daemon, uri = serve(image, tmp)
    handle = connect(uri)
    with pytest.raises(nbd.Error):
        handle.pwrite(b"\1" * 4096, 0)
    event = daemon.qmp.wait_event("BLOCK_IMAGE_CORRUPTED")["data"]
    assert event == {"device": "", "node-name": "disk", "fatal": True, "offset": 0x10000,
                     "size": 4096,
                     "msg": "Preventing invalid write on metadata (overlaps with refcount table)"}
    with pytest.raises(nbd.Error):
        handle.pread(4096, 0)
    daemon.stop()
    assert "corrupt: true" in qemu_img("info", image)


@pytest.mark.parametrize("how", ["reopen", "transaction"])
def test_much_metadata_is_flushed_while_the_file_is_quiesced(daemon, tmp, how):
    """Tables far apart are written by several tasks; none of them may wait at the file's gate."""
    image = create_image(tmp / "a.qcow2", size="2G")
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", f"file,node-name=af,filename={image}",
               "--blockdev", "qcow2,node-name=a,file=af",
               "--nbd-server", f"addr.type=unix,addr.path={sock}",
               "--export", "nbd,id=e,node-name=a,name=a,writable=on")
    handle = connect(nbd_uri(sock, "a"))
    for number in range(64):
        handle.pwrite(bytes([number]) * 4096, number * (24 << 20))
    if how == "reopen":
        options = [{"driver": "file", "node-name": "af", "filename": str(image)},
                   {"driver": "qcow2", "node-name": "a", "file": "af", "discard": "unmap"}]
        d.qmp.execute("blockdev-reopen", options=options, timeout=60)
    else:
        d.qmp.transaction(
            ("block-dirty-bitmap-add", {"node": "af", "name": "x"}),
            ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-node-name": "o",
                                        "snapshot-file": str(tmp / "o.qcow2")}))
    for number in range(64):
        assert handle.pread(4096, number * (24 << 20)) == bytes([number]) * 4096
    handle.shutdown()
    d.stop()
    check_image(image)
