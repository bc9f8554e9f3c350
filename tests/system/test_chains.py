"""How chains begin and how they grow: bitmaps and backups in one transaction, groups, copies of
bitmaps, snapshots, each under guests that write. What is restored is compared with what the guests
were answered at the instant."""

import contextlib
import random
import threading
import time

import pytest
from tidemark_testlib import (
    QSD, Daemon, QMPError, check_image, compare, connect, create_image, nbd_uri, qemu_img,
)
from tidemark_testlib.images import image_info, map_image
from tidemark_testlib.load import Load, Model
from tidemark_testlib.nbd import extents

MiB = 1 << 20
SIZE = 32 * MiB


def sound(path):
    verdict = check_image(path)
    assert not verdict["leaks"] and not verdict["corruptions"] and not verdict["check-errors"], path


def content(path):
    raw = path.with_suffix(".content")
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", path, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


class Stage:
    """Disks a, b, ... with their guests, over one daemon."""

    def __init__(self, tmp, names="a", **daemon):
        self.tmp, self.names = tmp, names
        self.sock = tmp / "nbd.sock"
        self.images = {name: create_image(tmp / f"{name}.qcow2", size=SIZE) for name in names}
        self.models = {name: Model(SIZE) for name in names}
        self.loads = {}
        argv = ["--nbd-server", f"addr.type=unix,addr.path={self.sock}"]
        for name in names:
            argv += ["--blockdev", f"qcow2,node-name={name},discard=unmap,file.driver=file,"
                                   f"file.filename={self.images[name]}",
                     "--export", f"nbd,id=e-{name},node-name={name},name={name},writable=on"]
        self.daemon = Daemon(*argv, directory=tmp, **daemon)
        self.q = self.daemon.qmp

    def __enter__(self):
        for seed, name in enumerate(self.names):
            self.loads[name] = Load(nbd_uri(self.sock, name), self.models[name], clients=2,
                                    per_second=120, seed=seed)
        self.written(40)
        return self

    def __exit__(self, kind, value, trace):
        if kind is None and self.daemon.running:
            self.end()
        self.daemon.kill()

    def end(self):
        """The guests stop; the disks' last contents."""
        for load in self.loads.values():
            assert not list(load.end())
        self.loads = {}
        self.daemon.stop()
        return {name: model.copy() for name, model in self.models.items()}

    def written(self, more):
        for load in self.loads.values():
            load.wait_written(more)

    @contextlib.contextmanager
    def paused(self):
        """The guests hold still; gives what they have been answered."""
        with contextlib.ExitStack() as stack:
            for load in self.loads.values():
                stack.enter_context(load.paused())
            yield {name: model.copy() for name, model in self.models.items()}

    def target(self, name, backing=None):
        base = {"backing_file": backing, "backing_fmt": "qcow2"} if backing else {}
        path = create_image(self.tmp / f"{name}.qcow2", size=SIZE, **base)
        self.q.execute("blockdev-add", driver="qcow2", node_name=name,
                       file={"driver": "file", "filename": str(path)})
        return path

    def completed(self, *jobs):
        for job in jobs:
            assert "error" not in self.q.wait_event("BLOCK_JOB_COMPLETED", device=job)["data"]
            self.q.wait_job(job, "null")

    def count(self, node, bitmap):
        return self.q.bitmaps(node)[bitmap]["count"]


WAYS = ("add", "clear", "drive", "grouped")


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_begins(tidemarkd, tmp, way):
    """Two disks; the full backups, then three increments of both."""
    with Stage(tmp, "ab") as s:
        chain = {name: [] for name in "ab"}
        if way != "add":
            for name in "ab":
                s.q.execute("block-dirty-bitmap-add", node=name, name="x")
            s.written(20)
        actions = []
        for name in "ab":
            path = tmp / f"{name}-0.qcow2"
            go = {"job-id": f"j{name}", "device": name, "sync": "full", "speed": 96 * MiB}
            if way == "drive":
                actions.append(("block-dirty-bitmap-clear", {"node": name, "name": "x"}))
                actions.append(("drive-backup", {**go, "target": str(path), "format": "qcow2"}))
            else:
                path = s.target(f"{name}-0")
                if way == "grouped":
                    go.update({"bitmap": "x", "bitmap-mode": "on-success"})
                else:
                    actions.append((f"block-dirty-bitmap-{way}", {"node": name, "name": "x"}))
                actions.append(("blockdev-backup", {**go, "target": f"{name}-0"}))
            chain[name].append(path)
        properties = {"completion_mode": "grouped"} if way == "grouped" else {}
        with s.paused() as then:
            s.q.transaction(*actions, **properties)
            if way != "grouped":    # nothing that the backup has is in the bitmap
                assert s.count("a", "x") == s.count("b", "x") == 0
        s.written(20)
        s.completed("ja", "jb")
        for name in "ab":
            assert content(chain[name][0]) == then[name]
            if way != "drive":
                s.q.execute("blockdev-del", node_name=f"{name}-0")
        for number in (1, 2, 3):
            s.written(15)
            jobs = []
            for name in "ab":
                chain[name].append(s.target(f"{name}-{number}", chain[name][-1]))
                jobs.append(("blockdev-backup", {
                    "job-id": f"j{name}", "device": name, "target": f"{name}-{number}",
                    "sync": "incremental", "bitmap": "x"}))
            with s.paused() as then:
                s.q.transaction(*jobs, **properties)
            s.completed("ja", "jb")
            for name in "ab":
                assert content(chain[name][-1]) == then[name], (name, number)
                s.q.execute("blockdev-del", node_name=f"{name}-{number}")
        last = s.end()
    for name in "ab":
        assert content(s.images[name]) == last[name]
        for path in [s.images[name], *chain[name]]:
            sound(path)


def test_backups_on_copies_of_bitmaps(tidemarkd, tmp):
    """As libvirt does it: one bitmap a checkpoint, the newest records; a backup since a checkpoint is
    on a disabled copy, merged from it and all that are newer, of several granularities. Each, over
    the disk as it was at its checkpoint, is the disk when it began."""
    with Stage(tmp) as s:
        full = s.target("full")
        with s.paused():
            s.q.transaction(
                ("block-dirty-bitmap-add", {"node": "a", "name": "c0", "granularity": 65536}),
                ("blockdev-backup", {"job-id": "j", "device": "a", "target": "full", "sync": "full"}))
        s.completed("j")
        s.q.execute("blockdev-del", node_name="full")
        bases = [full]
        for number, granularity in ((1, 4096), (2, 1 << 20), (3, 512)):
            s.written(10)
            with s.paused() as then:
                s.q.transaction(
                    ("block-dirty-bitmap-disable", {"node": "a", "name": f"c{number - 1}"}),
                    ("block-dirty-bitmap-add", {"node": "a", "name": f"c{number}",
                                                "granularity": granularity, "persistent": True}))
            raw = tmp / "base.raw"
            raw.write_bytes(then["a"])
            bases.append(tmp / f"base{number}.qcow2")
            qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, bases[-1])
        s.written(10)
        wants = {}
        for since in (3, 2, 1, 0):
            path = s.target(f"since{since}", bases[since])
            with s.paused() as then:
                s.q.transaction(
                    ("block-dirty-bitmap-add", {"node": "a", "name": "tmp", "disabled": True,
                                                "granularity": 4096}),
                    ("block-dirty-bitmap-merge", {
                        "node": "a", "target": "tmp",
                        "bitmaps": [f"c{n}" if n % 2 else {"node": "a", "name": f"c{n}"}
                                    for n in range(since, 4)]}),
                    ("blockdev-backup", {"job-id": "j", "device": "a", "target": f"since{since}",
                                         "sync": "incremental", "bitmap": "tmp"}))
            s.written(5)
            s.completed("j")
            s.q.execute("block-dirty-bitmap-remove", node="a", name="tmp")
            s.q.execute("blockdev-del", node_name=f"since{since}")
            wants[path] = then["a"]
        s.end()
    for path, want in wants.items():
        assert content(path) == want, path
        own = sum(e["length"] for e in map_image(path) if e["depth"] == 0)
        assert 0 < own and (own < SIZE or path.name != "since3.qcow2")     # until that all may have changed
        sound(path)
    for path in (s.images["a"], *bases):
        sound(path)


def test_a_chain_of_snapshots(tidemarkd, tmp):
    """Overlays made and given, one after the other; each layer is the disk at its instant."""
    with Stage(tmp) as s:
        node, layers = "a", [(s.images["a"], None)]
        for number in range(1, 6):
            path = tmp / f"o{number}.qcow2"
            if number % 2:
                with s.paused() as then:
                    s.q.execute("blockdev-snapshot-sync", node_name=node, snapshot_file=str(path),
                                snapshot_node_name=f"o{number}")
            else:
                create_image(path, size=SIZE, backing_file=layers[-1][0], backing_fmt="qcow2")
                s.q.execute("blockdev-add", driver="qcow2", node_name=f"o{number}", backing=None,
                            file={"driver": "file", "filename": str(path)})
                with s.paused() as then:
                    s.q.execute("blockdev-snapshot", node=node, overlay=f"o{number}")
            layers[-1] = (layers[-1][0], then["a"])
            layers.append((path, None))
            node = f"o{number}"
            assert s.q.execute("query-block-exports")[0]["node-name"] == node
            s.written(25)
        last = s.end()["a"]
    layers[-1] = (layers[-1][0], last)
    for (path, then), (below, _) in zip(layers, [(None, None), *layers]):
        sound(path)
        assert content(path) == then
        if below:
            assert image_info(path)["full-backing-filename"] == str(below)
            assert not compare(path, below)


def test_snapshots_that_nobody_waits_for(tidemarkd, tmp):
    """Writers go on while many overlays come, and while transactions with overlays fail."""
    with Stage(tmp, "ab") as s:
        tops = {"a": "a", "b": "b"}
        for number in range(12):
            actions = [("blockdev-snapshot-sync", {
                "node-name": tops[name], "snapshot-node-name": f"{name}{number}",
                "snapshot-file": str(tmp / f"{name}{number}.qcow2")}) for name in "ab"]
            if number % 2:
                with pytest.raises(QMPError, match="aborted using Abort action"):
                    s.q.transaction(*actions, ("drive-backup", {
                        "job-id": "j", "device": f"a{number}", "sync": "full", "format": "qcow2",
                        "target": str(tmp / "vain.qcow2")}), ("abort", {}))
                for name in (f"a{number}", f"b{number}", "vain"):
                    assert not (tmp / f"{name}.qcow2").exists()
            else:
                s.q.transaction(*actions)
                tops = {name: f"{name}{number}" for name in "ab"}
            s.written(3)
        last = s.end()
    for name in "ab":
        assert content(tmp / f"{tops[name]}.qcow2") == last[name]
        sound(tmp / f"{tops[name]}.qcow2")
        sound(s.images[name])


def test_increments_over_snapshots(tidemarkd, tmp):
    """A persistent bitmap of the disk, and one that each overlay gets in the transaction that makes
    it: together they say what has changed since the full backup. QEMU reads them, too."""
    with Stage(tmp) as s:
        full = s.target("full")
        s.q.transaction(
            ("block-dirty-bitmap-add", {"node": "a", "name": "x", "persistent": True}),
            ("blockdev-backup", {"job-id": "j", "device": "a", "target": "full", "sync": "full"}))
        s.completed("j")
        s.q.execute("blockdev-del", node_name="full")
        nodes = ["a"]
        for number in (1, 2):
            s.written(10)
            top = f"o{number}"
            s.q.transaction(
                ("blockdev-snapshot-sync", {"node-name": nodes[-1], "snapshot-node-name": top,
                                            "snapshot-file": str(tmp / f"{top}.qcow2")}),
                ("block-dirty-bitmap-add", {"node": top, "name": "x", "persistent": True}))
            nodes.append(top)
        s.written(10)
        increment = s.target("inc", full)
        with s.paused() as then:
            s.q.transaction(
                ("block-dirty-bitmap-add", {"node": "o2", "name": "tmp", "disabled": True}),
                ("block-dirty-bitmap-merge", {
                    "node": "o2", "target": "tmp",
                    "bitmaps": [{"node": n, "name": "x"} for n in nodes]}),
                ("block-dirty-bitmap-clear", {"node": "o2", "name": "x"}),
                ("blockdev-backup", {"job-id": "j", "device": "o2", "target": "inc",
                                     "sync": "bitmap", "bitmap": "tmp", "bitmap-mode": "never"}))
        s.written(10)
        s.completed("j")
        assert content(increment) == then["a"]
        counts = {n: s.q.bitmaps(n)["x"] for n in nodes}
        assert counts["a"]["count"] > 0 and counts["o1"]["count"] > 0
        with pytest.raises(QMPError, match="readonly and cannot be modified"):
            s.q.execute("block-dirty-bitmap-clear", node="o1", name="x")
        shas = {n: s.q.execute("x-debug-block-dirty-bitmap-sha256", node=n, name="x")["sha256"]
                for n in ("a", "o1")}
        last = s.end()
    top = tmp / "o2.qcow2"
    assert content(top) == last["a"]
    for path in (s.images["a"], tmp / "o1.qcow2", top, increment):
        sound(path)
    with Daemon("--blockdev", f"qcow2,node-name=o2,read-only=on,file.driver=file,"
                              f"file.filename={top}", binary=QSD, directory=tmp) as d:
        images = {node["image"]["filename"].rsplit("/", 1)[-1] if node["drv"] == "qcow2" else "":
                  node for node in d.qmp.execute("query-named-block-nodes")}
        for name in ("a", "o1"):
            found = images[f"{name}.qcow2"]
            assert [b["name"] for b in found["dirty-bitmaps"]] == ["x"]
            assert d.qmp.execute("x-debug-block-dirty-bitmap-sha256", node=found["node-name"],
                                 name="x")["sha256"] == shas[name]


def test_an_overlays_first_bitmap_survives_a_kill(tidemarkd, tmp):
    """Made in the transaction that makes the overlay, it is durable when that is answered."""
    image, top, sock = create_image(tmp / "a.qcow2", size=SIZE), tmp / "o.qcow2", tmp / "nbd.sock"
    with Daemon("--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={image}",
                "--nbd-server", f"addr.type=unix,addr.path={sock}",
                "--export", "nbd,id=e,node-name=a,name=a,writable=on", directory=tmp) as d:
        d.qmp.transaction(
            ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-node-name": "o",
                                        "snapshot-file": str(top)}),
            ("block-dirty-bitmap-add", {"node": "o", "name": "x", "persistent": True}))
        guest = connect(nbd_uri(sock, "a"))
        guest.pwrite(b"x" * 512, 3 * MiB)
        guest.flush()
        d.kill()
    with Daemon("--blockdev", f"qcow2,node-name=o,file.driver=file,file.filename={top}",
                directory=tmp) as d:
        x = d.qmp.bitmaps("o")["x"]
        assert x["count"] == 65536 and x["recording"] and "inconsistent" not in x


def test_no_room_for_one_of_two_overlays(tidemarkd, tmp, small_fs):
    """Both disks go on as before, and neither file stays, not half of it either."""
    small = small_fs("8M")
    with Stage(tmp, "ab", prefix=small.prefix) as s:
        small.fill(320 << 10)
        paths = {name: small.path / f"o{name}.qcow2" for name in "ab"}  # each takes 192 KiB
        with pytest.raises(QMPError, match="No space left on device"):
            s.q.transaction(*(("blockdev-snapshot-sync", {
                "node-name": name, "snapshot-node-name": f"o{name}",
                "snapshot-file": str(paths[name])}) for name in "ab"))
        assert [p.name for p in small.outside.iterdir()] == ["ballast"]
        s.written(10)
        exports = {e["id"]: e["node-name"] for e in s.q.execute("query-block-exports")}
        assert exports == {"e-a": "a", "e-b": "b"}
        last = s.end()
    for name in "ab":
        assert content(s.images[name]) == last[name]


def test_killed_among_snapshots(tidemarkd, tmp):
    """What is below an overlay that was answered is durable, though no guest has flushed; the rest is
    sound, and at most leaks clusters."""
    rng = random.Random(1)
    with Stage(tmp) as s:
        tops, instants = ["a"], []
        killer = threading.Timer(rng.uniform(0.05, 0.5), s.daemon.process.kill)
        try:
            while True:
                if len(tops) == 3:      # some are there, however slow this machine is
                    killer.start()
                top = f"o{len(tops)}"
                with s.paused() as then:
                    s.q.execute("blockdev-snapshot-sync", node_name=tops[-1],
                                snapshot_node_name=top, snapshot_file=str(tmp / f"{top}.qcow2"))
                instants.append(then["a"])
                tops.append(top)
                want = s.loads["a"].written + 3
                while s.loads["a"].written < want and s.daemon.running:
                    time.sleep(0.005)
        except (EOFError, ConnectionError):
            pass
        killer.join()
        s.daemon.kill()
        s.loads.pop("a").end()
    assert len(tops) > 2
    for top, then in zip(tops, instants):
        assert content(tmp / f"{top}.qcow2") == then, top
    for top in tops:
        assert not check_image(tmp / f"{top}.qcow2")["corruptions"]


@pytest.mark.parametrize("how", ["snapshot", "mirror", "undone", "backup"])
def test_an_export_keeps_the_bitmap_that_it_shows(daemon, tmp, how):
    """The disk below goes elsewhere; the bitmap's node stays as long as a client may read it."""
    for name in ("a", "o"):
        create_image(tmp / f"{name}.qcow2", size=MiB)
    d = daemon("--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock", "--blockdev",
               f"qcow2,node-name=a,file.driver=file,file.filename={tmp}/a.qcow2")
    q = d.qmp
    o = {"driver": "qcow2", "node-name": "o", "file": {"driver": "file",
                                                       "filename": str(tmp / "o.qcow2")}}
    q.call("blockdev-add", {**o, "backing": None})
    q.execute("block-dirty-bitmap-add", node="a", name="x")
    q.execute("block-export-add", type="nbd", id="e", node_name="a", name="e", writable=True,
              bitmaps=["x"])
    uri = nbd_uri(tmp / "nbd.sock", "e")
    handle = connect(uri)
    handle.pwrite(bytes(65536), 65536)
    handle.shutdown()
    if how == "snapshot":
        q.execute("blockdev-snapshot", node="a", overlay="o")
        q.call("blockdev-reopen", {"options": [{**o, "backing": None}]})
    elif how == "undone":
        with pytest.raises(QMPError):
            q.transaction(("blockdev-snapshot", {"node": "a", "overlay": "o"}), ("abort", {}))
    else:
        q.execute(f"blockdev-{how}", job_id="j", device="a", target="o", sync="full")
        if how == "mirror":
            q.wait_event("BLOCK_JOB_READY", device="j")
            q.execute("job-complete", id="j")
        q.wait_job("j", "null")
    used = "a" if how in ("undone", "backup") else "o"
    assert q.execute("query-block-exports")[0]["node-name"] == used
    with pytest.raises(QMPError, match="in use"):
        q.execute("blockdev-del", node_name="a")
    context = "qemu:dirty-bitmap:x"
    handle = connect(uri, [context])
    assert [list(e) for e in extents(handle, context)] == [
        [0, 65536, 0], [65536, 65536, 1], [131072, MiB - 131072, 0]]
    handle.shutdown()
    q.execute("block-export-del", id="e", mode="hard")
    q.wait_event("BLOCK_EXPORT_DELETED", id="e")
    q.execute("blockdev-del", node_name="a")
