"""The instant of a backup: what it holds is one moment's disk, and never a torn block.

Four writers stamp blocks with counters. Before the command we note, for each block, the last write
that had been answered; after its answer, the last one that had begun. Whatever moment in between
the backup took, each block's stamp must lie between the two.
"""

import array
import ctypes
import multiprocessing
import os
import random
import struct

import pytest
from tidemark_testlib import (
    Daemon, check_image, connect, create_image, find_tidemarkd, nbd_uri, qemu_img, temp_dir,
)
from tidemark_testlib.child import Child

MiB = 1 << 20
BLOCK = 4096
WRITERS = 4
SIZE = 32 * MiB
BLOCKS = SIZE // BLOCK


def stamp(block, counter):
    return struct.pack("<QQ", block, counter) * (BLOCK // 16)


class Stamps:
    """Shared between the writers and the test: for each block, writes begun and writes answered."""

    def __init__(self):
        self.begun = multiprocessing.RawArray(ctypes.c_uint64, BLOCKS)
        self.done = multiprocessing.RawArray(ctypes.c_uint64, BLOCKS)
        self.stop = multiprocessing.RawValue(ctypes.c_bool, False)

    @staticmethod
    def copy(counters):
        return array.array("Q", bytes(counters))


def write_stamps(uri, stamps, writer, seed):
    """Several writes in flight, at most one a block: its stamp never goes back."""
    rng = random.Random(seed * 100 + writer)
    h = connect(uri)
    flying = {}
    while not stamps.stop.value:
        while len(flying) < 8:
            # Half of the writes in a small hot part, so that a chunk is written while it is copied.
            most = BLOCKS // WRITERS if rng.random() < 0.5 else BLOCKS // WRITERS // 16
            block = rng.randrange(most) * WRITERS + writer
            if block in {b for b, _ in flying.values()}:
                continue
            counter = stamps.begun[block] + 1
            stamps.begun[block] = counter
            cookie = h.aio_pwrite(stamp(block, counter), block * BLOCK)
            flying[cookie] = (block, counter)
        h.poll(1000)
        for cookie in [c for c in flying if h.aio_command_completed(c)]:
            block, counter = flying.pop(cookie)
            stamps.done[block] = counter
    for cookie, (block, counter) in flying.items():
        while not h.aio_command_completed(cookie):
            h.poll(1000)
        stamps.done[block] = counter


def verify(path, before, after):
    """The first thing wrong with the backup, or None."""
    raw = f"{path}.raw"
    qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", path, raw)
    with open(raw, "rb") as file:
        content = file.read()
    os.unlink(raw)
    changed = 0
    for block in range(BLOCKS):
        data = content[block * BLOCK:(block + 1) * BLOCK]
        number, counter = struct.unpack_from("<QQ", data)
        if counter == 0 and number == 0:
            if data != bytes(BLOCK):
                return f"block {block} is torn"
        elif number != block or data != stamp(block, counter):
            return f"block {block} is torn or of another place ({number}, {counter})"
        if counter < before[block]:
            return f"block {block}: stamp {counter} is older than {before[block]}, written before"
        if counter > after[block]:
            return f"block {block}: stamp {counter} is newer than {after[block]}, begun after"
        changed += after[block] != before[block]
    return None


def run_backups(binary, directory, count, cluster_size, seed, env=None):
    """COUNT backups under load, a new chain every eighth; the complaint of the first bad one."""
    image = create_image(directory / "disk.qcow2", size=SIZE)
    sock = directory / "nbd.sock"
    d = Daemon("--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image}",
               "--nbd-server", f"addr.type=unix,addr.path={sock}",
               "--export", "nbd,id=e,node-name=disk,name=disk,writable=on",
               binary=binary, directory=directory, env=env)
    with d:
        stamps = Stamps()
        writers = [Child(write_stamps, (nbd_uri(sock, "disk"), stamps, n, seed))
                   for n in range(WRITERS)]
        for writer in writers:
            writer.start()
        try:
            while min(stamps.begun[n] for n in range(WRITERS)) < 2:
                assert all(w.is_alive() for w in writers)
            previous = None
            for number in range(count):
                full = number % 8 == 0
                path = directory / f"b{number}.qcow2"
                create_image(path, size=SIZE, cluster_size=cluster_size,
                             **({} if full else {"backing_file": previous, "backing_fmt": "qcow2"}))
                complaint = one_backup(d.qmp, stamps, path, number, full)
                if complaint:
                    return complaint
                previous = path
        finally:
            stamps.stop.value = True
            for writer in writers:
                writer.join(60)
                assert writer.exitcode == 0, writer.exitcode
    return None


def one_backup(qmp, stamps, path, number, full):
    node, job = f"t{number}", f"j{number}"
    qmp.execute("blockdev-add", driver="qcow2", **{"node-name": node},
                file={"driver": "file", "filename": str(path)}, backing=None)
    action = {"device": "disk", "target": node, "job-id": job, "auto-dismiss": False}
    if full:
        fresh = ({"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "b"}}
                 if number else
                 {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b"}})
        actions = [fresh, {"type": "blockdev-backup", "data": {**action, "sync": "full"}}]
    else:
        actions = [{"type": "blockdev-backup",
                    "data": {**action, "sync": "incremental", "bitmap": "b"}}]
    before = stamps.copy(stamps.done)
    qmp.execute("transaction", actions=actions)
    after = stamps.copy(stamps.begun)
    qmp.wait_job(job, "concluded")
    error = next((j.get("error") for j in qmp.execute("query-jobs") if j["id"] == job), None)
    assert error is None, error
    qmp.execute("job-dismiss", id=job)
    qmp.execute("blockdev-del", **{"node-name": node})
    assert check_image(path)["corruptions"] == 0
    complaint = verify(path, before, after)
    return complaint and f"backup {number} ({'full' if full else 'incremental'}): {complaint}"


@pytest.mark.long
@pytest.mark.parametrize("cluster_size", ["64k", "2M"])
def test_each_backup_is_one_instant(tidemarkd, tmp, cluster_size):
    rounds = int(os.environ.get("TIDEMARK_INSTANT_ROUNDS", "25"))
    complaint = run_backups(tidemarkd, tmp, rounds, cluster_size, seed=len(cluster_size))
    assert complaint is None, complaint


def test_without_the_wait_the_instant_is_lost(tmp, monkeypatch):
    """With a deliberate fault: guest writes do not wait for the save of what they overwrite."""
    binary = os.environ.get("TIDEMARK_BREAKABLE") or os.path.join(
        os.path.dirname(find_tidemarkd()), "../../tests/faults/tidemarkd-breakable")
    if not os.path.exists(binary):
        pytest.skip(f"{binary} is not built")
    monkeypatch.setenv("TIDEMARK_BROKEN", "cbw_without_wait")
    complaint = run_backups(binary, tmp, 200, "64k", seed=3)     # until the first bad one
    assert complaint is not None
    assert "newer" in complaint or "torn" in complaint, complaint
