"""x-tidemark-persist: at which level bitmaps are kept, with which sizes, and where."""
import contextlib
import json
import os
import shutil
import subprocess
import time

import pytest
from tidemark_testlib import QMP, Daemon, QMPError, connect, nbd_uri, run_to_exit

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


NO_CHECKPOINTS = {"checkpoint-idle": 0, "checkpoint-period": 0, "checkpoint-amount": 0,
                  "checkpoint-flush": False}


@pytest.fixture
def image(tmp):
    with open(tmp / "a.raw", "wb") as f:
        f.truncate(256 * MiB)
    return tmp / "a.raw"


@pytest.fixture
def start(tmp, tidemarkd):
    """start(IMAGE, OPTIONS) -> a daemon that has it as node "a"."""
    running = []

    def daemon(image, persist=None, driver="file"):
        (tmp / "nbd.sock").unlink(missing_ok=True)
        node = {"driver": "raw", "node-name": "a",
                "file": {"driver": driver, "filename": str(image), "node-name": "af"}}
        if persist is not None:
            node["x-tidemark-persist"] = {"runtime-directory": str(tmp / "run"), **persist}
        running.append(Daemon("--nbd-server", f"addr.type=unix,addr.path={tmp}/nbd.sock",
                              binary=tidemarkd, directory=tmp))
        try:
            running[-1].qmp.execute("blockdev-add", **node)
        except QMPError:
            running[-1].kill()
            raise
        return running[-1]

    yield daemon
    for d in running:
        d.kill()


def write(daemon, tmp, *offsets, flush=False):
    daemon.qmp.execute("block-export-add", **{"type": "nbd", "id": "e", "node-name": "a",
                                              "writable": True})
    nbd = connect(nbd_uri(tmp / "nbd.sock", "a"))
    for offset in offsets:
        nbd.pwrite(b"1" * 512, offset)
    if flush:
        nbd.flush()
    nbd.shutdown()
    daemon.qmp.execute("block-export-del", id="e", mode="hard")
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")


def node(daemon):
    return next(n for n in daemon.qmp.execute("query-named-block-nodes") if n["node-name"] == "a")


def bitmap(daemon):
    return node(daemon)["dirty-bitmaps"][0]


def add(daemon):
    daemon.qmp.execute("block-dirty-bitmap-add", node="a", name="x", persistent=True)


@pytest.mark.parametrize("level, lost, expected", [
    ("process", False, "exact"), ("process", True, "none"),
    ("power", False, "exact"), ("power", True, "superset")])
def test_what_a_level_promises(tmp, image, start, level, lost, expected):
    """Killed; and with the run segments gone, as after a power loss."""
    daemon = start(image, {"level": level, "region-size": 2 * MiB, "budget": 64 * MiB, **NO_CHECKPOINTS})
    add(daemon)
    write(daemon, tmp, 0, 100 * MiB)
    daemon.kill()
    if lost:
        shutil.rmtree(tmp / "run")
    daemon = start(image, {"level": level})
    assert node(daemon)["x-tidemark-recovery"]["state"] == expected
    if expected == "none":
        assert bitmap(daemon)["inconsistent"]
    else:
        assert bitmap(daemon)["count"] == (4 * MiB if lost else 128 * KiB)
    daemon.stop()


def hot(daemon):
    return node(daemon)["x-tidemark-hot-regions"]


@pytest.mark.parametrize("options, counter", [
    ({"checkpoint-idle": 200}, "idle-checkpoints"),
    ({"checkpoint-period": 200}, "period-checkpoints"),
    ({"checkpoint-flush": True}, "flush-checkpoints"),
    ({}, None)])
def test_a_power_loss_adds_nothing_after_a_checkpoint(tmp, image, start, options, counter):
    daemon = start(image, {**NO_CHECKPOINTS, **options, "region-size": MiB, "budget": 64 * MiB})
    add(daemon)
    write(daemon, tmp, *range(0, 20 * MiB, MiB), flush=True)
    deadline = time.monotonic() + (60 if counter else 1)
    while time.monotonic() < deadline:
        found = hot(daemon)
        if counter and found["left"] == found["entered"] and found[counter]:
            break       # (one that leaves is not hot any more; it has left when that is durable)
        time.sleep(0.05)
    found = hot(daemon)
    assert found["hot"] == found["entered"] - found["left"] == (0 if counter else 20)
    kinds = ("idle-checkpoints", "period-checkpoints", "flush-checkpoints")
    assert all(bool(found[kind]) == (kind == counter) for kind in kinds), found
    daemon.kill()
    shutil.rmtree(tmp / "run")
    daemon = start(image)
    info = node(daemon)["x-tidemark-recovery"]
    assert info["state"] == "superset" and info["bytes-added"] == (0 if counter else 20 * MiB)
    assert bitmap(daemon)["count"] == (20 * 64 * KiB if counter else 20 * MiB)
    daemon.stop()


def test_bits_of_many_regions_are_written(tmp, image, start):
    daemon = start(image, {**NO_CHECKPOINTS, "region-size": MiB, "budget": 64 * MiB,
                           "checkpoint-amount": 10 * MiB})
    add(daemon)
    write(daemon, tmp, *range(0, 20 * MiB, MiB))
    deadline = time.monotonic() + 60
    while hot(daemon)["marked"] > 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    found = hot(daemon)
    assert found["marked"] <= 10 and found["amount-cleanings"] and found["hot"] == 20
    daemon.stop()


def test_level_process_writes_its_tide_file_twice(tmp, image, start):
    """Before the first change and at the close; meanwhile the file on disk stays as it is."""
    daemon = start(image, {"level": "process"})
    add(daemon)
    write(daemon, tmp, 0)
    before = (tmp / "a.raw.tide").read_bytes()
    write(daemon, tmp, *range(MiB, 200 * MiB, 7 * MiB))
    assert (tmp / "a.raw.tide").read_bytes() == before
    count = bitmap(daemon)["count"]
    daemon.stop()
    daemon = start(image, {"level": "power"})  # the levels read each other's
    assert node(daemon)["x-tidemark-recovery"]["state"] == "clean"
    assert bitmap(daemon)["count"] == count
    write(daemon, tmp, 0, 255 * MiB)
    daemon.kill()
    shutil.rmtree(tmp / "run")
    daemon = start(image, {"level": "process"})
    assert node(daemon)["x-tidemark-recovery"]["state"] == "superset"
    assert bitmap(daemon)["count"] >= count + 64 * KiB
    daemon.stop()


def test_level_off(tmp, tidemarkd, image, start):
    daemon = start(image, {"level": "off"})
    with pytest.raises(QMPError, match="Can't store persistent bitmaps to a"):
        add(daemon)
    daemon.stop()
    daemon = start(image)
    add(daemon)
    daemon.stop()
    refused = "a.raw.tide' has bitmaps of this image, and level 'off'"
    with pytest.raises(QMPError, match=refused):
        start(image, {"level": "off"})
    off = {"driver": "raw", "node-name": "a", "file": "af", "x-tidemark-persist": {"level": "off"}}
    with Daemon(binary=tidemarkd, directory=tmp) as d:   # who only reads may
        d.qmp.execute("blockdev-add", driver="file", filename=str(image), **{"node-name": "af"})
        d.qmp.execute("blockdev-add", **off, **{"read-only": True})
        with pytest.raises(QMPError, match=refused):
            d.qmp.execute("blockdev-reopen", options=[off])
        os.unlink(tmp / "a.raw.tide")
        d.qmp.execute("blockdev-reopen", options=[off])


@pytest.mark.parametrize("where", ["tide-file", "state-directory"])
def test_the_tide_file_is_elsewhere(tmp, image, start, where):
    os.mkdir(tmp / "state")
    place = str(tmp / "state" / "a b.tide") if where == "tide-file" else str(tmp / "state")
    daemon = start(image, {where: place})
    add(daemon)
    write(daemon, tmp, 0)
    daemon.kill()
    assert not (tmp / "a.raw.tide").exists() and len(os.listdir(tmp / "state")) == 1
    link = tmp / "link"
    link.symlink_to(image)
    daemon = start(link, {where: place})
    assert bitmap(daemon)["count"] == 64 * KiB
    daemon.stop()


@pytest.mark.parametrize("options, text", [
    ({"level": "hard"}, "Parameter 'level' does not accept value 'hard'"),
    ({"regionsize": 1}, "Parameter 'x-tidemark-persist.regionsize' is unexpected"),
    ({"region-size": 3 * MiB},
     "Parameter 'region-size' is 3145728, not a power of two from 1048576 on"),
    ({"region-size": 4096}, "Parameter 'region-size' is 4096, not a power of two"),
    ({"budget": 0}, "Parameter 'budget' is 0, which is 0 regions of 16777216 bytes, not 4..55440"),
    ({"tide-file": "/x/y", "state-directory": "/x"},
     "Parameters 'tide-file' and 'state-directory' cannot be used together"),
    ({"tide-file": ""}, "Parameter 'tide-file' is empty"),
    ({"state-directory": "/nowhere"}, "directory '/nowhere/': No such file or directory"),
    ({"state-directory": "/dev/shm"}, "is on tmpfs, which is gone with the power: level 'power'"),
    ({"checkpoint-idle": -1}, "Parameter 'checkpoint-idle' expects uint32"),
    ({"checkpoint-flush": "yes"}, "Invalid parameter type for 'x-tidemark-persist.checkpoint-flush'"),
    ({"no-witness": "maybe"}, "Parameter 'no-witness' does not accept value 'maybe'"),
])
def test_refused(image, start, options, text):
    with pytest.raises(QMPError) as e:
        start(image, options)
    assert text in str(e.value)


def test_tmpfs_is_good_enough_for_level_process(tmp, image, start):
    daemon = start(image, {"level": "process", "tide-file": f"/dev/shm/{tmp.name}.tide"})
    add(daemon)
    daemon.qmp.execute("block-dirty-bitmap-remove", node="a", name="x")
    daemon.stop()
    assert not os.path.exists(f"/dev/shm/{tmp.name}.tide")


def test_a_copy_with_its_tide_file(tmp, image, start):
    """Used beside the original, and in the same runtime directory."""
    daemon = start(image)
    add(daemon)
    daemon.kill()
    for end in "", ".tide":
        shutil.copy(f"{image}{end}", f"{tmp}/copy{end}")
    daemon = start(image)
    daemon.qmp.execute("block-dirty-bitmap-clear", node="a", name="x")
    write(daemon, tmp, 0, MiB, 2 * MiB)
    copy = start(tmp / "copy")
    copy.qmp.execute("block-dirty-bitmap-remove", node="a", name="x")
    add(copy)
    with contextlib.suppress(QMPError):
        daemon.qmp.execute("block_resize", **{"node-name": "a", "size": 8 * GiB})
    assert bitmap(daemon)["count"] == 3 * 64 * KiB and bitmap(copy)["count"] == 0
    daemon.kill()


def test_options_do_not_change_while_the_node_is_open(image, start):
    daemon = start(image, {"level": "process"})
    options = {"driver": "raw", "node-name": "a", "file": "af"}
    for persist, text in [({"level": "power"}, "Cannot change the option 'x-tidemark-persist.level'"),
                          (None, "Option 'x-tidemark-persist.")]:
        with pytest.raises(QMPError) as e:
            more = {} if persist is None else {
                "x-tidemark-persist": {"runtime-directory": str(image.parent / "run"), **persist}}
            daemon.qmp.execute("blockdev-reopen", options=[{**options, **more}])
        assert text in str(e.value)
    daemon.stop()


def test_the_image_is_not_exchanged(tmp, tidemarkd):
    """Its tide file would tell of what is on another one: of this one it tells nothing."""
    files = [{"driver": "file", "node-name": name, "filename": str(tmp / name)} for name in ("one", "two")]
    for f in files:
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", f["filename"], "1M"], check=True)
    node, top = {"driver": "raw", "node-name": "a", "file": "one"}, {"driver": "raw", "node-name": "top", "file": "a"}
    with Daemon(binary=tidemarkd, directory=tmp) as d:
        for n in [*files, node, top]:
            d.qmp.execute("blockdev-add", **n)
        add(d)
        with pytest.raises(QMPError, match="'a' has, or had, persistent bitmaps.* 'file' of node 'a' cannot"):
            d.qmp.execute("blockdev-reopen", options=[{**node, "file": "two"}])
        d.qmp.execute("blockdev-reopen", options=[node])
        d.qmp.execute("block-dirty-bitmap-remove", node="a", name="x")   # in the tide file is a session
        with pytest.raises(QMPError, match="'a' has, or had, persistent bitmaps"):
            d.qmp.execute("blockdev-reopen", options=[{**node, "file": "two"}])
        for name in "top", "a":
            d.qmp.execute("blockdev-del", **{"node-name": name})
        for n in node, top:
            d.qmp.execute("blockdev-add", **n)
        d.qmp.execute("blockdev-reopen", options=[{**node, "file": "two"}])
        with pytest.raises(QMPError, match="to a: it was opened with another image"):
            add(d)
        d.qmp.execute("blockdev-reopen", options=[node])
        d.qmp.execute("block-dirty-bitmap-add", node="top", name="x", persistent=True)
        with pytest.raises(QMPError, match="'top' has, or had, persistent bitmaps.* 'file' of node 'a' cannot"):
            d.qmp.execute("blockdev-reopen", options=[{**node, "file": "two"}])


def test_others_do_not_take_it(tmp, tidemarkd):
    with Daemon(binary=tidemarkd, directory=tmp) as daemon:
        with pytest.raises(QMPError, match="'null-co' does not support the option 'x-tidemark-persist'"):
            daemon.qmp.execute("blockdev-add", **{"driver": "null-co", "node-name": "n",
                                                  "x-tidemark-persist": {"level": "power"}})


def test_an_image_does_not_say_where_its_tide_file_is(tmp, tidemarkd, image):
    name = "json:" + json.dumps({"driver": "raw", "x-tidemark-persist": {"tide-file": "/x"},
                                 "file": {"driver": "file", "filename": str(image)}})
    code = run_to_exit(name, binary=tidemarkd, env={"XDG_RUNTIME_DIR": str(tmp)})
    assert "'x-tidemark-persist' cannot be a part of a file name" in str(code)


def test_the_short_form(tmp, tidemarkd, image):
    os.mkdir(tmp / "state")
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp)}
    process = subprocess.Popen([tidemarkd, "--x-tidemark-persist",
                                f"process,state-directory={tmp}/state,budget=1G,checkpoint-idle=500,"
                                "checkpoint-flush=off", str(image)],
                               stdout=subprocess.PIPE, text=True, env=env)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        qmp = QMP(lines[1][5:].strip())
        qmp.execute("block-dirty-bitmap-add", node="a", name="x", persistent=True)
        qmp.execute("quit")
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert len(os.listdir(tmp / "state")) == 1 and not (tmp / "a.raw.tide").exists()
    for text, message in [("fast", "Parameter 'level' does not accept value 'fast'"),
                          ("power,budget=x", "Parameter 'budget' expects size"),
                          ("power,speed=1", "Parameter 'speed' is unexpected")]:
        end = run_to_exit("--x-tidemark-persist", text, str(image), binary=tidemarkd)
        assert message in str(end)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs at /dev/shm")
@pytest.mark.parametrize("where, warned", [("disk", True), ("/dev/shm", False)])
def test_a_runtime_directory_that_is_on_disk_is_told_once(tmp, image, start, where, warned):
    directory = tmp / "run" if where == "disk" else f"{where}/{tmp.name}"
    if os.statvfs(tmp).f_fsid == os.statvfs("/dev/shm").f_fsid:
        pytest.skip("the temporary directory is on tmpfs, too")
    daemon = start(image, {"runtime-directory": str(directory)})
    with open(tmp / "b.raw", "wb") as f:
        f.truncate(MiB)
    daemon.qmp.execute("blockdev-add", **{
        "driver": "raw", "node-name": "b", "x-tidemark-persist": {"runtime-directory": str(directory)},
        "file": {"driver": "file", "filename": str(tmp / "b.raw")}})
    for name in ("a", "b"):
        daemon.qmp.execute("block-dirty-bitmap-add", node=name, name="x", persistent=True)
    said = f"The runtime directory '{directory}' is not on tmpfs"
    assert daemon.stderr.count(said) == warned
    daemon.stop()
    shutil.rmtree(directory)
