"""Images: in use elsewhere, broken in their headers, holes and zeroes as a guest sees them."""

import shutil
import struct
import subprocess

from ..table import disk, held, image, nbd_server, sequence

ADD = "blockdev-add"


def file_of(name):
    return {"driver": "file", "filename": f"$DIR/{name}"}


@sequence(held("w"), held("r", read_only=True), held("raw", "raw"))
def locks(t):
    """Images that qemu-io has open: for writing and for reading; force-share looks anyway."""
    for name, driver, file in (("w", "qcow2", "w.qcow2"), ("r", "qcow2", "r.qcow2"),
                               ("raw", "raw", "raw.raw")):
        go = {"driver": driver, "node-name": name, "file": file_of(file)}
        t(ADD, go)
        t("blockdev-del", node_name=name)
        t(ADD, {**go, "read-only": True})
        t("blockdev-del", node_name=name)
        t(ADD, {**go, "read-only": True, "force-share": True})
        t("blockdev-del", node_name=name)
        t(ADD, {**go, "file": {**file_of(file), "locking": "off"}})
        t("blockdev-del", node_name=name)
    t(ADD, {"driver": "file", "node-name": "f", "filename": "$DIR/w.qcow2"})
    t("block-dirty-bitmap-add", node="f", name="b")
    t(ADD, {"driver": "qcow2", "node-name": "q", "file": "f"})
    t("blockdev-del", node_name="f")


@sequence(disk("a"), disk("b", more="read-only=on"), disk("c", "raw", more="force-share=on,read-only=on"))
def locks_of_ours(t):
    """What other processes may do with images that we have open."""
    def others(where):
        found = []
        for name, fmt in (("a", "qcow2"), ("b", "qcow2"), ("c", "raw")):
            for argv in (["qemu-io", "-f", fmt, "-c", "length"],
                         ["qemu-io", "-r", "-f", fmt, "-c", "length"],
                         ["qemu-io", "-U", "-r", "-f", fmt, "-c", "length"],
                         ["qemu-img", "info", "-f", fmt], ["qemu-img", "info", "-U", "-f", fmt]):
                done = subprocess.run([*argv, where / f"{name}.{fmt}"], capture_output=True, check=False)
                found.append([name, " ".join(argv), done.returncode])
        return found
    t.tool("others", others)


# What is written where in a good version 3 header; each makes one broken image.
HEADERS = (
    ("magic", [(0, b"QFI\xfa")]), ("version1", [(4, b"\0\0\0\1")]), ("version4", [(4, b"\0\0\0\4")]),
    ("cluster-bits-8", [(20, b"\0\0\0\10")]), ("cluster-bits-22", [(20, b"\0\0\0\x16")]),
    ("cluster-bits-huge", [(20, b"\xff\xff\xff\xff")]),
    ("size-huge", [(24, b"\x7f" + b"\xff" * 7)]), ("crypt-9", [(32, b"\0\0\0\x09")]),
    ("l1-size-huge", [(36, b"\x7f\xff\xff\xff")]), ("l1-size-0", [(36, b"\0\0\0\0")]),
    ("l1-unaligned", [(40, struct.pack(">Q", 0x30001))]),
    ("l1-overflow", [(40, struct.pack(">Q", 0x7fffffffffff0000))]),
    ("refcount-unaligned", [(48, struct.pack(">Q", 0x10001))]),
    ("refcount-overflow", [(48, struct.pack(">Q", 0x7fffffffffff0000))]),
    ("refcount-clusters-0", [(56, b"\0\0\0\0")]), ("refcount-clusters-huge", [(56, b"\x7f\xff\xff\xff")]),
    ("refcount-order-7", [(96, b"\0\0\0\7")]), ("snapshots-huge", [(60, b"\x7f\xff\xff\xff")]),
    ("snapshots-unaligned", [(60, b"\0\0\0\1"), (64, struct.pack(">Q", 0x10001))]),
    ("header-length-8", [(100, b"\0\0\0\10")]), ("header-length-huge", [(100, b"\0\2\0\0")]),
    ("backing-name-huge", [(8, struct.pack(">Q", 112)), (16, b"\0\1\0\0")]),
    ("backing-offset-huge", [(8, struct.pack(">Q", 0x7fffffffffff0000)), (16, b"\0\0\0\4")]),
    ("incompatible-63", [(72, b"\x80" + b"\0" * 7)]), ("incompatible-40", [(72, b"\0\0\1\0\0\0\0\0")]),
    ("compatible-63", [(80, b"\x80" + b"\0" * 7)]), ("autoclear-63", [(88, b"\x80" + b"\0" * 7)]),
    ("dirty", [(72, b"\0" * 7 + b"\1")]), ("corrupt", [(72, b"\0" * 7 + b"\2")]),
    ("dirty-corrupt", [(72, b"\0" * 7 + b"\3")]),
    ("extension-huge", [(112, struct.pack(">II", 0x12345678, 0x7fffffff))]),
    ("extension-beyond", [(112, struct.pack(">II", 0x12345678, 0x10000))]),
)


@sequence(image("good"))
def qcow2_headers(t):
    """Broken and odd headers: each is refused, or taken, with QEMU's words."""
    for name, patches in HEADERS:
        def make(where, name=name, patches=patches):
            shutil.copy(where / "good.qcow2", where / f"{name}.qcow2")
            with open(where / f"{name}.qcow2", "r+b") as file:
                for offset, data in patches:
                    file.seek(offset)
                    file.write(data)
            return True
        t.tool(f"make-{name}", make)
        t(ADD, {"driver": "qcow2", "node-name": "n", "file": file_of(f"{name}.qcow2")})
        t(ADD, {"driver": "qcow2", "node-name": "n", "read-only": True,
                "file": file_of(f"{name}.qcow2")})
        t("blockdev-del", node_name="n")


@sequence(image("good", data="write -P 1 0 64k"))
def qcow2_cut_short(t):
    """An image cut short at places of its metadata."""
    for length in (0, 1, 71, 72, 103, 104, 512, 65535, 65536, 131072, 196607, 196608, 262144):
        def make(where, length=length):
            data = (where / "good.qcow2").read_bytes()
            (where / "cut.qcow2").write_bytes(data[:length])
            return True
        t.tool(f"cut-{length}", make)
        t(ADD, {"driver": "qcow2", "node-name": "n", "read-only": True, "file": file_of("cut.qcow2")})
        t("blockdev-del", node_name="n")


@sequence(image("b"), image("a", backing_file="b.qcow2", backing_fmt="qcow2", size=None))
def backing_loop(t):
    """An image that is its own grandparent."""
    def make(where):
        done = subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", where / "a.qcow2",
                               "-F", "qcow2", where / "b.qcow2"], check=False)
        return done.returncode
    t.tool("make", make)
    t(ADD, {"driver": "qcow2", "node-name": "n", "file": file_of("a.qcow2")})
    t(ADD, {"driver": "qcow2", "node-name": "n", "file": file_of("a.qcow2"), "backing": None})


@sequence(disk("q", data=["write -P 1 0 256k"], more="discard=unmap", file_more="discard=unmap"),
          disk("i", data=["write -P 1 0 256k"]), disk("r", "raw", data=["write -P 1 0 256k"],
                                                      more="discard=unmap", file_more="discard=unmap"),
          nbd_server("q", "i", "r"))
def discard_kinds(t):
    """Trims and zeroes where discard is unmap, and where it is ignored."""
    for node in ("q", "i", "r"):
        t.trim(node, 65536, 65536)
        t.zero(node, 131072, 65536)
        t.extents(node, "base:allocation")
        t.read(node, 0, 262144)


@sequence(disk("off", data=["write -P 1 0 256k"]),
          disk("on", data=["write -P 1 0 256k"], more="detect-zeroes=on"),
          disk("un", data=["write -P 1 0 256k"], more="detect-zeroes=unmap,discard=unmap",
               file_more="discard=unmap"),
          disk("run", "raw", data=["write -P 1 0 256k"], more="detect-zeroes=unmap,discard=unmap",
               file_more="discard=unmap"), nbd_server("off", "on", "un", "run"))
def detect_zeroes_kinds(t):
    """A guest that writes zeroes as data."""
    for node in ("off", "on", "un", "run"):
        t.write(node, 65536, 65536, byte=0)
        t.write(node, 200 << 10, 4096, byte=0)
        t.write(node, 1 << 20, 65536, byte=0)
        t.extents(node, "base:allocation")
        t.read(node, 0, 262144)


@sequence(image("base", data=["write -P 1 0 128k", "write -z 1M 64k"]),
          image("top", size=None, backing_file="base.qcow2", backing_fmt="qcow2",
                data=["write -P 2 64k 64k", "write -z 256k 64k"]),
          "--blockdev", "qcow2,node-name=top,file.driver=file,file.filename=$DIR/top.qcow2",
          "--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock",
          "--export", "nbd,id=e,node-name=top,name=top,writable=on,allocation-depth=on")
def chain_as_seen_by_a_guest(t):
    """Allocation and its depth in a chain, before and after writes, zeroes and trims."""
    t.extents("top", "base:allocation")
    t.extents("top", "qemu:allocation-depth")
    t.write("top", 0, 512)
    t.zero("top", 64 << 10, 64 << 10)
    t.trim("top", 256 << 10, 64 << 10)
    t.read("top", 0, 2 << 20)
    t.extents("top", "base:allocation")
    t.extents("top", "qemu:allocation-depth")


@sequence(disk("a"), nbd_server("a"))
def holes_within_clusters(t):
    """A cluster of which a part was never written: QEMU looks for holes in the file below it."""
    t.write("a", 1000, 3000)
    t.write("a", 500 << 10, 70000, byte=7)
    t.extents("a", "base:allocation")


@sequence(disk("small", cluster_size=512, size="1M"), disk("large", cluster_size="2M", size="8M"),
          disk("v2", compat="0.10"), disk("odd", size="1000k"), disk("wide", refcount_bits=16),
          nbd_server("small", "large", "v2", "odd", "wide"))
def qcow2_shapes(t):
    """Cluster sizes and versions: what is written reads back, what is not is a hole; checks clean."""
    for node in ("small", "large", "v2", "odd", "wide"):
        t.write(node, 1000, 3000)
        t.zero(node, 2000, 100000)
        t.write(node, 500 << 10, 70000, byte=7)
        t.trim(node, 510 << 10, 1024)
        t.read(node, 0, 1000 << 10)
    t.nodes()
    t.finish()
    for node in ("small", "large", "v2", "odd", "wide"):
        t.check(f"{node}.qcow2")
