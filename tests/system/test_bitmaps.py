"""Persistent bitmaps in qcow2 images: what we store QEMU reads, what QEMU stores we read; a killed
daemon; images that lie; what QEMU would refuse is not written.

Where tidemarkd and qemu-storage-daemon must do the same, a test runs on both (`program`)."""

import hashlib
import json
import random
import struct
import subprocess
import time

import pytest
from tidemark_testlib import (QMPError, QSD, Daemon, check_image, connect, create_image, nbd_uri,
                              qemu_img, qemu_io, wait_until)
from tidemark_testlib.images import image_info

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40


@pytest.fixture(params=["tidemarkd", "qsd"])
def program(request, tidemarkd):
    return tidemarkd if request.param == "tidemarkd" else QSD


class Bits:
    """A model: a set of dirty granules."""

    def __init__(self, size, granularity):
        self.size, self.granularity, self.dirty = size, granularity, set()

    def mark(self, offset, length):
        self.dirty.update(range(offset // self.granularity,
                                (offset + length - 1) // self.granularity + 1))

    def merge(self, other):
        for i in other.dirty:
            start = i * other.granularity
            self.mark(start, min(other.granularity, self.size - start))

    @property
    def count(self):
        return len(self.dirty) * self.granularity

    @property
    def sha256(self):
        bits = -(-self.size // self.granularity)
        data = bytearray(max(8, -(-bits // 64) * 8))
        for i in self.dirty:
            data[i // 8] |= 1 << i % 8
        return hashlib.sha256(data).hexdigest()


class Session:
    """A daemon with IMAGE as node "a", exported for writing unless read-only."""

    def __init__(self, tmp, binary, image, read_only=False):
        self.image = image
        blockdev = {"driver": "qcow2", "node-name": "a", "read-only": read_only,
                    "file": {"driver": "file", "filename": str(image), "node-name": "af"}}
        # Else it saves them when it has been idle, and QEMU keeps them then.
        self.persist = {} if binary == QSD else {"x-tidemark-persist": {"checkpoint-idle": 0}}
        argv = ["--blockdev", json.dumps({**blockdev, **self.persist})]
        if not read_only:
            sock = tmp / f"nbd{time.monotonic_ns()}.sock"
            argv += ["--nbd-server", f"addr.type=unix,addr.path={sock}", "--export",
                     "nbd,id=e,node-name=a,name=a,writable=on"]
        self.daemon = Daemon(*argv, binary=binary, directory=tmp)
        self.qmp = self.daemon.qmp
        self.nbd = None if read_only else connect(nbd_uri(sock, "a"))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is None and self.daemon.running:
            self.close()
            self.daemon.stop()
        else:
            self.daemon.kill()

    def close(self):
        if self.nbd is not None:
            self.nbd.shutdown()
            self.nbd = None

    def kill(self):
        self.daemon.kill(self.image)
        self.nbd = None

    def info(self):
        nodes = self.qmp.execute("query-named-block-nodes")
        node = next(n for n in nodes if n["node-name"] == "a")
        return {b["name"]: {k: v for k, v in b.items() if not k.startswith("x-tidemark-")}
                for b in node.get("dirty-bitmaps", [])}

    def flags(self):
        """What the image itself says, as the daemon reads it."""
        nodes = self.qmp.execute("query-named-block-nodes")
        node = next(n for n in nodes if n["node-name"] == "a")
        data = node["image"]["format-specific"]["data"]
        return {b["name"]: sorted(b["flags"]) for b in data.get("bitmaps", [])}

    def add(self, name, **more):
        self.qmp.execute("block-dirty-bitmap-add", node="a", name=name, persistent=True, **more)

    def remove(self, name):
        self.qmp.execute("block-dirty-bitmap-remove", node="a", name=name)

    def sha256(self, name):
        return self.qmp.execute("x-debug-block-dirty-bitmap-sha256", node="a",
                                name=name)["sha256"]

    def refusal(self, command, **arguments):
        with pytest.raises(QMPError) as caught:
            self.qmp.execute(command, **arguments)
        return caught.value.desc


def stored(image):
    """name: (granularity, flags) as qemu-img finds them."""
    data = image_info(image)["format-specific"]["data"]
    return {b["name"]: (b["granularity"], sorted(b["flags"])) for b in data.get("bitmaps", [])}


def clean(image):
    verdict = check_image(image)
    return (verdict["corruptions"], verdict["leaks"], verdict["check-errors"]) == (0, 0, 0)


# -- both ways

GRANULARITIES = (512, 4096, 64 * KiB, 1 * MiB)


@pytest.mark.parametrize("cluster", [512, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("direction", ["ours first", "QEMU's first"])
def test_each_reads_the_others_bits(tmp, tidemarkd, cluster, direction):
    size = 24 * MiB + 512
    first, second = (tidemarkd, QSD) if direction == "ours first" else (QSD, tidemarkd)
    image = create_image(tmp / "a.qcow2", size=str(size), cluster_size=cluster)
    rng = random.Random(cluster)
    models = {}
    with Session(tmp, first, image) as s:
        for granularity in GRANULARITIES:
            for disabled in (False, True):
                name = f"g{granularity}{'-off' if disabled else ''}"
                s.add(name, granularity=granularity, disabled=disabled)
                models[name] = Bits(size, granularity)
        s.add("all", granularity=512)
        for _ in range(40):
            length = rng.randrange(1, 100000)
            offset = rng.randrange(size - length)
            s.nbd.pwrite(rng.randbytes(length), offset)
            for name, model in models.items():
                if not name.endswith("-off"):
                    model.mark(offset, length)
        s.nbd.zero(MiB, 20 * MiB)
        for name, model in models.items():
            if not name.endswith("-off"):
                model.mark(20 * MiB, MiB)
        s.qmp.execute("block-dirty-bitmap-merge", node="a", target="g4096-off", bitmaps=["g512"])
        models["g4096-off"].merge(models["g512"])
        s.nbd.zero(size // 2, 0)
        s.nbd.zero(size - size // 2, size // 2)
        for name, model in {**models, "all": Bits(size, 512)}.items():
            if not name.endswith("-off"):
                model.mark(0, size)
            models[name] = model
        s.qmp.execute("block-dirty-bitmap-clear", node="a", name="g65536")
        models["g65536"].dirty.clear()
        s.nbd.pwrite(b"x" * 5000, 3 * MiB)
        models["g65536"].mark(3 * MiB, 5000)
        for name, model in models.items():
            assert s.sha256(name) == model.sha256, name
        kept = s.info()
    assert clean(image)
    assert stored(image) == {name: (model.granularity, [] if name.endswith("-off") else ["auto"])
                             for name, model in models.items()}
    order = [b["name"] for b in image_info(image)["format-specific"]["data"]["bitmaps"]]
    for read_only in (True, False):
        with Session(tmp, second, image, read_only) as s:
            assert s.info() == kept
            for name, model in models.items():
                assert s.sha256(name) == model.sha256, name
            flag = ["in-use"] if second == QSD and not read_only else []   # ours: when one changes
            assert s.flags() == {name: sorted(flag + ([] if name.endswith("-off") else ["auto"]))
                                 for name in models}
    assert clean(image)
    assert [b["name"] for b in image_info(image)["format-specific"]["data"]["bitmaps"]] == order
    with Session(tmp, first, image, True) as s:
        assert s.info() == kept
        assert all(s.sha256(name) == model.sha256 for name, model in models.items())


def test_the_order_in_the_image_is_qemus(tmp, tidemarkd):
    orders = []
    for binary in (tidemarkd, QSD):
        image = create_image(tmp / f"{len(orders)}.qcow2", size="1M")
        with Session(tmp, binary, image) as s:
            for name in "abc":
                s.add(name)
        with Session(tmp, binary, image) as s:
            s.remove("b")
            for name in "xyb":
                s.add(name)
        with Session(tmp, binary, image) as s:
            names = list(s.info())
        data = image_info(image)["format-specific"]["data"]
        orders.append((names, [b["name"] for b in data["bitmaps"]]))
    assert orders[0] == orders[1]


def test_by_turns(tmp, tidemarkd):
    """The same bitmaps through tidemarkd, qemu-storage-daemon, qemu-io and qemu-img."""
    size = 16 * MiB
    image = create_image(tmp / "a.qcow2", size=str(size))
    rng = random.Random(7)
    models = {"a": Bits(size, 64 * KiB), "b": Bits(size, 4096)}
    recording = {"a": True, "b": True}
    with Session(tmp, tidemarkd, image) as s:
        s.add("a")
        s.add("b", granularity=4096)

    def span():
        length = rng.randrange(1, 200) * 512
        offset = rng.randrange((size - length) // 512) * 512
        for name, model in models.items():
            if recording[name]:
                model.mark(offset, length)
        return offset, length

    for turn in range(24):
        kind = turn % 6
        if kind in (0, 2):
            with Session(tmp, tidemarkd if kind == 0 else QSD, image) as s:
                for name, model in models.items():
                    assert s.sha256(name) == model.sha256, (turn, name)
                for _ in range(5):
                    offset, length = span()
                    s.nbd.pwrite(rng.randbytes(length), offset)
        elif kind == 1:
            offset, length = span()
            qemu_io(image, f"write -P {turn + 1} {offset} {length}", fmt="qcow2")
        elif kind == 3:
            name = rng.choice(list(models))
            recording[name] = not recording[name]
            qemu_img("bitmap", "--enable" if recording[name] else "--disable", image, name)
        elif kind == 4:
            qemu_img("bitmap", "--merge", "b", image, "a")
            models["a"].merge(models["b"])
            new = f"n{turn}"
            qemu_img("bitmap", "--add", "-g", "512", image, new)
            models[new], recording[new] = Bits(size, 512), True
        else:
            name = rng.choice(list(models))
            if name in "ab":
                qemu_img("bitmap", "--clear", image, name)
                models[name].dirty.clear()
            else:
                qemu_img("bitmap", "--remove", image, name)
                del models[name], recording[name]
        assert clean(image), turn
        assert set(stored(image)) == set(models)
    with Session(tmp, tidemarkd, image, True) as s:
        assert all(s.sha256(name) == model.sha256 for name, model in models.items())


# -- in use


def test_a_killed_daemon(tmp, program, tidemarkd):
    """tidemarkd's bitmaps are exact, until QEMU opens the image for writing: then nobody has them."""
    image = create_image(tmp / "a.qcow2", size="16M")
    with Session(tmp, program, image) as s:
        s.add("a")
        s.add("off", disabled=True)
        s.nbd.pwrite(b"x" * 4096, 0)
    in_use = {"a": (65536, ["auto", "in-use"]), "off": (65536, ["in-use"])}
    with Session(tmp, program, image) as s:
        assert stored(image) == (in_use if program == QSD else
                                 {"a": (65536, ["auto"]), "off": (65536, [])})
        s.nbd.pwrite(b"y" * 4096, MiB)
        assert stored(image) == in_use
        s.kill()
    assert stored(image) == in_use
    if program == tidemarkd:
        exact = {"a": Bits(16 * MiB, 65536), "off": Bits(16 * MiB, 65536)}
        exact["a"].mark(0, 4096)
        exact["a"].mark(MiB, 4096)
        for read_only in (True, False):     # the second is killed before it changes anything
            with Session(tmp, program, image, read_only) as s:
                assert "2 bitmap(s) recovered exactly: the last program was killed" in s.daemon.stderr
                for name, model in exact.items():
                    assert s.sha256(name) == model.sha256
                    assert s.info()[name]["recording"] == (name == "a")
                s.kill()
        assert stored(image) == in_use
        qemu_io(image, "write -P 5 4M 512", fmt="qcow2")
        assert stored(image) == in_use
    for read_only in (True, False, False):
        with Session(tmp, program, image, read_only) as s:
            info = s.info()["a"]
            assert info == {"name": "a", "count": 0, "granularity": 65536, "recording": False,
                            "busy": False, "persistent": True, "inconsistent": True}
            for verb in ("clear", "enable", "disable"):
                text = "Bitmap 'a' is readonly and cannot be modified" if read_only and \
                    verb == "clear" else "Bitmap 'a' is inconsistent and cannot be used"
                assert s.refusal(f"block-dirty-bitmap-{verb}", node="a", name="a") == text
            if not read_only:
                assert s.refusal("block_resize", **{"node-name": "a", "size": 32 * MiB})
                s.nbd.pwrite(b"z" * 4096, 2 * MiB)
        assert check_image(image)["corruptions"] == 0
        assert set(stored(image)) == {"a", "off"}
    with Session(tmp, program, image) as s:
        s.remove("a")
        assert set(stored(image)) == {"off"}
        s.add("a")
        s.nbd.pwrite(b"z" * 512, 3 * MiB)
    other = QSD if program == tidemarkd else tidemarkd
    with Session(tmp, other, image) as s:
        assert s.info()["a"]["count"] == 65536
        assert s.info()["off"]["inconsistent"]
        s.remove("off")
    assert clean_or_leaks(image)
    assert stored(image) == {"a": (65536, ["auto"])}


def clean_or_leaks(image):
    verdict = check_image(image)
    return verdict["corruptions"] == 0 and verdict["check-errors"] == 0


def test_killed_at_any_time(tmp, tidemarkd):
    """Starts, writes, stops, killed somewhere in between: bitmaps are right, to QEMU right or
    inconsistent."""
    size = 32 * MiB
    image = create_image(tmp / "a.qcow2", size=str(size))
    with Session(tmp, tidemarkd, image) as s:
        for i in range(20):
            s.add(f"b{i}", granularity=4096)
    rng = random.Random(3)
    outcomes = set()
    for turn in range(30):
        copy = tmp / "copy.qcow2"
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        s = Session(tmp, tidemarkd, copy)
        written = []
        for _ in range(20):
            offset = rng.randrange(size // 4096) * 4096
            s.nbd.pwrite(b"w" * 4096, offset)
            written.append(offset)
        s.nbd.flush()
        s.close()
        s.daemon.process.terminate()
        time.sleep(rng.random() * 0.03)
        s.kill()
        assert clean_or_leaks(copy)
        with Session(tmp, QSD if turn % 2 else tidemarkd, copy) as s:
            for i in range(20):
                info = s.info()[f"b{i}"]
                assert turn % 2 or "inconsistent" not in info
                outcomes.add("inconsistent" in info)
                if "inconsistent" not in info:
                    model = Bits(size, 4096)
                    for offset in written:
                        model.mark(offset, 4096)
                    assert s.sha256(f"b{i}") == model.sha256
    assert outcomes == {True, False} or outcomes == {False}


def test_a_stop_under_load_loses_no_bit(tmp, tidemarkd):
    size = 64 * MiB
    image = create_image(tmp / "a.qcow2", size=str(size))
    s = Session(tmp, tidemarkd, image)
    s.add("a")
    writer = subprocess.Popen(
        ["/usr/bin/python3", "-c", f"""
import nbd, random
h = nbd.NBD()
h.connect_uri({nbd_uri(s.daemon.argv[s.daemon.argv.index("--nbd-server") + 1].split("path=")[1], "a")!r})
try:
    while True:
        h.pwrite(b"d" * 65536, random.randrange({size // 65536}) * 65536)
except nbd.Error:
    pass
"""])
    try:
        wait_until(lambda: s.info()["a"]["count"] > 8 * 65536)
        s.close()
        s.daemon.stop()
    finally:
        writer.kill()
        writer.wait()
    assert clean(image)
    with Session(tmp, QSD, image, True) as s:
        count = s.info()["a"]["count"]
    mapped = sum(e["length"] for e in
                 json.loads(qemu_img("map", "--output=json", image)) if e["data"])
    assert 0 < mapped <= count


# -- read-only


def test_lost_on_a_read_only_node(tmp, program):
    image = create_image(tmp / "a.qcow2", size="16M")
    with Session(tmp, program, image, True) as s:
        s.add("a")
        assert s.info()["a"]["persistent"]
        d = s.daemon
    assert d.stderr.endswith(": Lost persistent bitmaps during inactivation of node 'a': "
                             "No write access\n")
    assert stored(image) == {}


def test_stored_ones_on_a_read_only_node(tmp, program):
    image = create_image(tmp / "a.qcow2", size="16M")
    qemu_img("bitmap", "--add", image, "a")
    before = image.read_bytes()
    with Session(tmp, program, image, True) as s:
        readonly = "Bitmap 'a' is readonly and cannot be modified"
        assert s.refusal("block-dirty-bitmap-clear", node="a", name="a") == readonly
        assert s.refusal("block-dirty-bitmap-remove", node="a", name="a") == readonly
        s.qmp.execute("block-dirty-bitmap-disable", node="a", name="a")
        assert s.info()["a"]["recording"] is False
        assert s.flags() == {"a": ["auto"]}
    assert image.read_bytes() == before


def test_reopen(tmp, program):
    image = create_image(tmp / "a.qcow2", size="16M")
    with Session(tmp, program, image) as s:
        s.add("a")
        s.nbd.pwrite(b"x" * 4096, 0)
        s.close()
        s.qmp.execute("block-export-del", id="e")
        s.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e")
        node = {"driver": "qcow2", "node-name": "a", "file": "af", **s.persist}
        s.qmp.execute("blockdev-reopen", options=[{**node, "read-only": True}])
        assert s.flags() == {"a": ["auto"]}
        assert s.info()["a"]["count"] == 65536
        assert s.refusal("block-dirty-bitmap-clear", node="a", name="a") == \
            "Bitmap 'a' is readonly and cannot be modified"
        s.qmp.execute("blockdev-reopen", options=[{**node, "read-only": False}])
        if program != QSD:
            assert s.flags() == {"a": ["auto"]}
            assert stored(image) == {"a": (65536, ["auto"])}
            s.qmp.execute("block-dirty-bitmap-disable", node="a", name="a")
            s.qmp.execute("block-dirty-bitmap-enable", node="a", name="a")
        assert s.flags() == {"a": ["auto", "in-use"]}
        s.qmp.execute("block-dirty-bitmap-clear", node="a", name="a")
    assert clean(image)
    assert stored(image) == {"a": (65536, ["auto"])}


# -- what QEMU would refuse


def test_too_large(tmp, program):
    image = create_image(tmp / "a.qcow2", size=str(4 * TiB))
    with Session(tmp, program, image) as s:
        text = s.refusal("block-dirty-bitmap-add", node="a", name="b", persistent=True,
                         granularity=512)
        assert text == ("Can't make bitmap 'b' persistent in 'a': Too much space will be occupied "
                        "by the bitmap. Use larger granularity")
        s.add("b", granularity=1024)
        s.nbd.pwrite(b"x", 3 * TiB)
    assert clean(image)
    with Session(tmp, QSD, image) as s:
        assert s.info()["b"]["count"] == 1024


def test_names(tmp, program):
    image = create_image(tmp / "a.qcow2", size="1M")
    with Session(tmp, program, image) as s:
        s.add("n" * 1023)
        text = s.refusal("block-dirty-bitmap-add", node="a", name="n" * 1024, persistent=True)
        assert "Name length exceeds maximum (1023 characters)" in text
        s.add("ü \"'\\ \u65e5")
    assert clean(image)
    for binary in (QSD, program):
        with Session(tmp, binary, image) as s:
            assert set(s.info()) == {"n" * 1023, "ü \"'\\ \u65e5"}


def test_version_2_and_raw(tmp, program, tidemarkd):
    """They have no place for bitmaps. tidemarkd's are in tide files beside them, where it has one."""
    image = create_image(tmp / "a.qcow2", size="1M", compat="0.10")
    raw = create_image(tmp / "r.raw", "raw", size="1M")
    nodes = [{"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": str(raw)}}]
    refused = {"a": "Can't make bitmap 'b' persistent in 'a': Cannot store dirty bitmaps in qcow2 v2 files",
               "r": "Can't store persistent bitmaps to r: Operation not supported"}
    if program == tidemarkd:
        refused = {"c": refused["a"].replace("'a'", "'c'")}
        off = create_image(tmp / "c.qcow2", size="1M", compat="0.10")
        nodes.append({"driver": "qcow2", "node-name": "c", "x-tidemark-persist": {"level": "off"},
                      "file": {"driver": "file", "filename": str(off)}})
    with Session(tmp, program, image) as s:
        for node in nodes:
            s.qmp.execute("blockdev-add", **node)
        for node, text in refused.items():
            assert s.refusal("block-dirty-bitmap-add", node=node, name="b", persistent=True) == text
        if program == QSD:
            return
        for node in "ar":
            s.qmp.execute("block-dirty-bitmap-add", node=node, name="b", persistent=True)
        s.nbd.pwrite(b"x" * 512, 0)
        assert sorted(f.name for f in tmp.glob("*.tide")) == ["a.qcow2.tide", "r.raw.tide"]
        s.kill()
    assert clean_or_leaks(image) and stored(image) == {}
    with Session(tmp, program, image) as s:
        assert s.info()["b"] == {"name": "b", "count": 65536, "granularity": 65536, "recording": True,
                                 "busy": False, "persistent": True}


# -- images that lie


class Directory:
    """The bitmap directory of an image, to be spoilt: entries are dicts."""

    def __init__(self, path):
        self.path = path
        self.data = bytearray(path.read_bytes())
        header_length = struct.unpack_from(">I", self.data, 100)[0]
        at = header_length
        while True:
            magic, length = struct.unpack_from(">II", self.data, at)
            assert magic, "no bitmaps extension"
            if magic == 0x23852875:
                break
            at += 8 + (length + 7) // 8 * 8
        self.extension = at + 8
        self.n, _, self.bytes, self.offset = struct.unpack_from(">IIQQ", self.data, self.extension)
        self.entries, at = [], self.offset
        while at < self.offset + self.bytes:
            name_length, extra = struct.unpack_from(">HI", self.data, at + 18)
            name = bytes(self.data[at + 24 + extra:at + 24 + extra + name_length]).decode()
            self.entries.append((name, at))
            at += (24 + extra + name_length + 7) // 8 * 8

    def at(self, name):
        return dict(self.entries)[name]

    def poke(self, at, fmt, value):
        struct.pack_into(fmt, self.data, at, value)
        self.path.write_bytes(self.data)

    def peek(self, at, fmt):
        return struct.unpack_from(fmt, self.data, at)[0]


@pytest.fixture
def three(tmp):
    """An image with bitmaps gd1, bad and gd2, each with a bit."""
    image = create_image(tmp / "a.qcow2", size="16M")
    for name in ("gd1", "bad", "gd2"):
        qemu_img("bitmap", "--add", image, name)
    qemu_io(image, "write -P 1 5M 1M", fmt="qcow2")
    return image


BAD = {
    "table beyond the end": (0, ">Q", 1 << 50), "table unaligned": (0, ">Q", 0x50200),
    "table null": (0, ">Q", 0), "table on the L1 table": (0, ">Q", 0x30000),
    "no entries": (8, ">I", 0), "too many entries": (8, ">I", 0xffffffff),
    "a table of 8192 entries": (8, ">I", 8192),
    "flags": (12, ">I", 0xfffffffc), "type": (16, ">B", 0), "granularity 0": (17, ">B", 0),
    "granularity 32": (17, ">B", 32), "granularity 255": (17, ">B", 255),
    "another's name": (24, ">3s", b"gd1"), "no name": (18, ">H", 0),
    "extra data": (20, ">I", 4), "much extra data": (20, ">I", 0xffffffff),
    "a long name": (18, ">H", 0xffff),
}


@pytest.mark.parametrize("what", BAD)
def test_one_bad_entry(tmp, three, tidemarkd, what):
    """The image opens, the others are usable before and after, and when it is gone all is clean."""
    at, fmt, value = BAD[what]
    directory = Directory(three)
    directory.poke(directory.at("bad") + at, fmt, value)
    ends = what in ("much extra data", "a long name", "no name")  # nobody can say where the next one is
    good = {"gd1"} if ends else {"gd1", "gd2"}
    for turn in range(3):
        with Session(tmp, tidemarkd, three, turn == 0) as s:
            info = s.info()
            assert good <= set(info) <= good | {"bad"}
            assert all(info[name]["count"] == MiB + turn // 2 * 65536 for name in good)
            for name in set(info) - good:
                assert info[name]["inconsistent"] and info[name]["persistent"]
            if turn:
                s.nbd.pwrite(b"x" * 512, turn * 65536 - 512 if turn == 2 else 0)
            if turn == 2:
                for name in set(info) - good:
                    s.remove(name)
        assert turn == 0 or check_image(three)["corruptions"] == 0
    assert set(stored(three)) == good
    with Session(tmp, QSD, three) as s:
        assert all("inconsistent" not in b for b in s.info().values())


@pytest.mark.parametrize("what", ["count 2", "count 4", "bytes - 8", "bytes + 4096", "bytes 0",
                                  "offset in L1", "offset beyond the end"])
def test_a_bad_directory(tmp, three, tidemarkd, what):
    directory = Directory(three)
    at = directory.extension
    if what.startswith("count"):
        directory.poke(at, ">I", int(what[-1]))
    elif what.startswith("bytes"):
        add = {"bytes - 8": -8, "bytes + 4096": 4096, "bytes 0": -directory.bytes}[what]
        directory.poke(at + 8, ">Q", directory.bytes + add)
    else:
        directory.poke(at + 16, ">Q", 0x30000 if "L1" in what else 1 << 50)
    for turn in range(3):
        with Session(tmp, tidemarkd, three, turn == 0) as s:
            info = s.info()
            assert set(info) <= {"gd1", "bad", "gd2"}
            assert all("inconsistent" not in b for b in info.values())
            if turn:
                s.nbd.pwrite(b"x" * 512, 0)
                s.add(f"new{turn}")
                s.remove(f"new{turn}")
    with Session(tmp, tidemarkd, three) as s:
        s.add("new")
    assert check_image(three)["corruptions"] == 0
    with Session(tmp, QSD, three) as s:
        assert "new" in s.info()


def test_cut_anywhere_in_the_directory(tmp, three, tidemarkd):
    """A file that ends in, before or behind directory and tables."""
    whole = three.read_bytes()
    directory = Directory(three)
    tables = [directory.peek(at, ">Q") for _, at in directory.entries]
    ends = {place + extra for place in [directory.offset, *tables]
            for extra in (0, 1, 24, 40, 512, 65536)}
    for end in sorted(e for e in ends if e < len(whole)):
        three.write_bytes(whole[:end])
        try:
            with Session(tmp, tidemarkd, three) as s:
                s.nbd.pwrite(b"x" * 512, 0)
                info = s.info()
        except Exception as error:  # the L1 table may be behind the end, too
            assert "Could not" in str(error) or "could not" in str(error), error
            continue
        assert set(info) <= {"gd1", "bad", "gd2"}
        with Session(tmp, tidemarkd, three) as s:
            for name in s.info():
                s.remove(name)


def test_a_program_without_bitmaps_has_written(tmp, three, program):
    """Autoclear bit 0 is clear: the extension says nothing any more."""
    data = bytearray(three.read_bytes())
    data[95] &= 0xfe
    three.write_bytes(data)
    for read_only in (True, False):
        with Session(tmp, program, three, read_only) as s:
            assert s.info() == {} and s.flags() == {}
            assert "a program lacking bitmap support modified this file, so all bitmaps are now " \
                "considered inconsistent" in s.daemon.stderr
    with Session(tmp, program, three) as s:
        assert s.info() == {} and s.daemon.stderr == ""


def test_as_many_as_may_be(tmp, tidemarkd):
    """65,535 entries: all are there, and not one more. (Unit tests save as many.)"""
    cluster = 4096
    image = create_image(tmp / "a.qcow2", size="1M", cluster_size=cluster)
    qemu_img("bitmap", "--add", image, "x")
    directory = Directory(image)
    table = directory.peek(directory.at("x"), ">Q")
    data = directory.data
    entries = b"".join(struct.pack(">QIIBBHI8s", table, 1, 1, 1, 16, 5, 0, b"%05x" % i)
                       for i in range(65535))
    offset = len(data) + -len(data) % cluster
    data.extend(bytes(offset - len(data)) + entries)
    struct.pack_into(">IIQQ", data, directory.extension, 65535, 0, len(entries), offset)
    refblock = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, 48)[0])[0]
    for i in range(offset // cluster, len(data) // cluster + 1):
        struct.pack_into(">H", data, refblock + 2 * i, 1)
    image.write_bytes(data)
    with Session(tmp, tidemarkd, image) as s:
        for name in ("00000", "0fffe"):  # (a query of all takes our JSON client half a minute)
            assert s.sha256(name) == Bits(MiB, 65536).sha256
        assert s.refusal("block-dirty-bitmap-add", node="a", name="b", persistent=True) == \
            "Can't make bitmap 'b' persistent in 'a': Maximum number of persistent bitmaps is " \
            "already reached"
        s.remove("00000")
        s.add("b")
        s.nbd.pwrite(b"x", 0)
        s.daemon.kill()  # and does not wait for locks: qemu-img would read all of them
    assert Directory(image).n == 65534
