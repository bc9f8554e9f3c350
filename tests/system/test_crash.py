"""tidemarkd killed at any moment, and images that others change while it is down.

The histories are of tidemark_testlib/crash.py; crash.py runs more of them, and the one of a seed.
"""
import os
import shutil
import subprocess
import time

import pytest
from conftest import not_allowed
from tidemark_testlib import NotAllowed, QMPError, connect, qemu_img, qemu_io
from tidemark_testlib.crash import KiB, MiB, History, HostPlace, Load

FORMATS = ("raw", "qcow2")
SEED = int(os.environ.get("TIDEMARK_SEED", "1"))


@pytest.fixture(params=FORMATS)
def fmt(request):
    return request.param


@pytest.fixture
def place(tmp, tidemarkd):
    place = HostPlace(tmp, tidemarkd)
    yield place
    place.close()


def history_of(place, seed, fmt, **more):
    try:
        return History(place, seed, fmt, say=print, **more)
    except NotAllowed as error:
        not_allowed(str(error), error.what)


def again(fmt, seed, more=""):
    return f"repeat it with: tests/system/crash.py --format {fmt} --seed {seed} --verbose{more}"


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("fmt", [*FORMATS, "device"])
def test_killed_at_any_moment(place, fmt, number):
    """One history of each format that images have is at level `process`."""
    seed, level = SEED + number, "process" if number and fmt != "device" else "power"
    print(again(fmt, seed, f" --level {level}"))
    history = history_of(place, seed, fmt, level=level)
    history.run(6)
    print(history.found.table("killed"))
    assert history.found.lives["killed"] and history.found.whole("killed", fmt)


@pytest.mark.parametrize("fmt", [*FORMATS, "device"])
def test_killed_again_and_again_inside_recovery(place, fmt):
    """What the first life has left is found by the last one, however often it was cut between."""
    print(again(fmt, SEED))
    history = history_of(place, f"recovery-{SEED}", fmt)
    history.start()
    history.live("lost", recovery_kills=12)
    history.verify()
    place.stop()
    history.check_leftovers()
    print(history.found.table())
    assert history.found.recovery_kills


def test_qemu_writes_between_a_kill_and_the_restart(place, fmt):
    print(again(fmt, SEED) + " --foreign 1")
    history = History(place, f"foreign-{SEED}", fmt, say=print, foreign=1)
    history.start()
    while not history.found.foreign:
        history.live()
    history.verify()
    place.stop()
    print(history.found.table())
    assert history.found.foreign


def test_a_tide_file_that_the_image_does_not_name(place):
    """As a kill leaves it between the file and its name in the image, which tells all itself."""
    history = History(place, SEED, "qcow2")
    place.boot()
    history.make_disk()
    history.open()
    history.execute("block-dirty-bitmap-add", node="disk", name="tide", persistent=True,
                    granularity=64 * KiB)
    handle = connect(place.uri("disk"))
    handle.pwrite(b"x" * 4096, 100 * MiB)
    shutil.copy(place.path("disk.tide"), place.path("old.tide"))
    handle.shutdown()
    place.stop()
    assert not place.has("disk.tide")
    os.rename(place.path("old.tide"), place.path("disk.tide"))
    for _ in range(2):      # the second finds the one that the first has made
        place.boot()
        history.open()
        assert history.node()["x-tidemark-recovery"]["state"] in ("clean", "exact")
        assert not history.bitmaps()["tide"].get("inconsistent")
        assert history.observe() == {100 * MiB // (64 * KiB)}
        handle = connect(place.uri("disk"))
        handle.pwrite(b"y" * 4096, 100 * MiB)
        place.cut()
        place.after_cut(lose=False)
    assert len(place.leftovers()) == 2      # a segment, a stamp: not those of the old file


# --- images that others change -------------------------------------------------------------------


def overwrite(path, fmt):
    if fmt == "raw":
        subprocess.run(["dd", "if=/dev/urandom", f"of={path}", "bs=4k", "count=1", "seek=77",
                        "conv=notrunc", "status=none"], check=True)
    else:
        qemu_io(path, "write -P 7 308k 4k", fmt=fmt)


def replace(path, fmt):
    shutil.copy(path, f"{path}.new")
    os.rename(f"{path}.new", path)


def shrink(path, fmt):
    subprocess.run(["qemu-img", "resize", "-q", "-f", fmt, "--shrink", path, "200M"], check=True)


def grow(path, fmt):
    subprocess.run(["qemu-img", "resize", "-q", "-f", fmt, path, "300M"], check=True)


def move_a_copy(path, fmt):
    """The image and what lies beside it, as a restore from another place would bring it."""
    for name in (path, f"{path}.tide"):
        if os.path.exists(name):
            shutil.copy2(name, f"{name}.new")
            os.rename(f"{name}.new", name)


def commit_into(path, fmt):
    """QEMU opens it read-only, and then again for writing: the bit in a qcow2 header stays."""
    qemu_img("create", "-f", "qcow2", "-b", path, "-F", fmt, f"{path}.overlay")
    qemu_io(f"{path}.overlay", "write -P 7 308k 4k", fmt="qcow2")
    qemu_img("commit", f"{path}.overlay")
    os.unlink(f"{path}.overlay")


CHANGES = (overwrite, replace, shrink, grow, move_a_copy, commit_into)


@pytest.mark.parametrize("end", ["killed", "killed_under_load", "stopped"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_image_changed_while_it_was_down(place, fmt, change, end):
    """No bitmap of it is believed, whoever asks; and a new one can begin.

    But a qcow2 image has its witness inside, so that a copy with its times is as good, and after a
    clean end its bitmaps, which QEMU has kept."""
    believed = fmt == "qcow2" and (end == "stopped" or change is move_a_copy)
    history = History(place, SEED, fmt)
    history.idle = 0
    place.boot()
    history.make_disk()
    history.open()
    node = {"node": "disk", "name": "tide"}
    history.execute("block-dirty-bitmap-add", **node, persistent=True, granularity=64 * KiB)
    handle = connect(place.uri("disk"))
    handle.pwrite(b"x" * 4096, 100 * MiB)
    pause = 0.1         # within the tick of our last write a file's times cannot tell
    if end == "stopped":
        handle.shutdown()
        place.stop()
    else:
        load = Load(place.uri("disk"), SEED, [(0, 64 * MiB)], 0.05) if end != "killed" else None
        if load:
            load.wait_written(200)
        if load or fmt == "qcow2":
            pause = 2   # nor within the slack for requests that were in flight
        place.cut()
        place.after_cut(lose=False)
        if load:
            load.end()
    time.sleep(pause)
    change(place.path("disk"), fmt)

    place.boot()
    history.open()
    info = history.node()["x-tidemark-recovery"]
    if believed:
        assert info["state"] == ("clean" if end == "stopped" else "exact"), info
        assert not history.bitmaps()["tide"].get("inconsistent")
        marked = history.observe()
        assert 100 * MiB // (64 * KiB) in marked
        assert change not in (overwrite, commit_into) or 308 // 64 in marked
        place.stop()
        return
    assert info["state"] == "none" and info["reason"] and info.get("witness") != "same", info
    assert history.bitmaps()["tide"]["inconsistent"]
    with pytest.raises(QMPError, match="inconsistent"):
        history.execute("block-dirty-bitmap-clear", **node)
    history.execute("block-dirty-bitmap-remove", **node)
    history.execute("block-dirty-bitmap-add", **node, persistent=True)
    place.cut()
    place.after_cut(lose=False)

    place.boot()
    history.open()
    assert history.node()["x-tidemark-recovery"]["state"] == "exact"
    assert not history.bitmaps()["tide"].get("inconsistent")
    place.stop()
    assert not place.leftovers()
