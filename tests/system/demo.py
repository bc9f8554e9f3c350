#!/usr/bin/python3
"""The main job, end to end, judged by QEMU's tools; scripts/demo builds and runs it.

A qcow2 disk is served over NBD and written without a break by four clients. Meanwhile: a full
backup, three increments, a SIGTERM. Between two runs QEMU's own tools write to the disk and change
the bitmap, and a fourth increment follows; then a SIGKILL, again under load, and a fifth. The
clients keep a model of the disk, in their memory, of what has been answered; they hold still while
a backup command is given, so that the model is the disk at that instant, and go on while the backup
runs.

TIDEMARK=/usr/bin/qemu-storage-daemon runs the same story with QEMU's daemon, up to the SIGKILL: no
bitmap of its survives that.
"""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from tidemark_testlib import (  # noqa: E402
    Daemon, check_image, connect, create_image, find_tidemarkd, nbd_uri, qemu_img, qemu_io,
    sha256_of, temp_dir,
)
from tidemark_testlib.load import BLOCK, Load, Model  # noqa: E402
from tidemark_testlib.nbd import extents  # noqa: E402

MIB = 1 << 20
SIZE = 128 * MIB
GRANULARITY = 65536
BITMAP = "tide"
CONTEXT = f"qemu:dirty-bitmap:{BITMAP}"
started = time.monotonic()


class Wrong(Exception):
    """What was to be shown is not so."""


def say(kind, text):
    print(f"[{time.monotonic() - started:5.1f} s] {kind}: {text}", flush=True)


def ok(text):
    print(f"ok: {text}", flush=True)


def must(condition, text):
    if not condition:
        raise Wrong(text)


def mib(count):
    return f"{count / MIB:.1f} MiB"


class Disk:
    """The served image, its model and its backups, over several runs of the daemon."""

    def __init__(self, tmp):
        self.tmp = tmp
        self.path = create_image(tmp / "disk.qcow2", size=SIZE)
        self.model = Model(SIZE)
        self.chain = []
        self.uri = nbd_uri(tmp / "nbd.sock", "disk")
        self.daemon = None

    def serve(self):
        self.daemon = Daemon(
            "--blockdev", f"driver=file,node-name=file,filename={self.path}",
            "--blockdev", "driver=qcow2,node-name=disk,file=file",
            "--nbd-server", f"addr.type=unix,addr.path={self.tmp / 'nbd.sock'}",
            "--export", "type=nbd,id=exp,node-name=disk,name=disk,writable=on", directory=self.tmp)
        return self.daemon.qmp

    def backup(self, load, sync):
        """Backs up while LOAD goes on; proves that the restored backup is the disk of the instant."""
        qmp = self.daemon.qmp
        name = f"{sync}-{len(self.chain)}"
        path = self.tmp / f"{name}.qcow2"
        base = {"backing_file": self.chain[-1], "backing_fmt": "qcow2"} if self.chain else {}
        create_image(path, size=SIZE, **base)
        qmp.execute("blockdev-add", driver="qcow2", node_name=name,
                    file={"driver": "file", "filename": str(path)})
        # Next to no speed until the clients have written into what is still to be copied.
        job = {"device": "disk", "target": name, "job-id": name, "sync": sync, "speed": 1}
        actions = [("blockdev-backup", job)]
        if sync == "full":
            actions.insert(0, ("block-dirty-bitmap-add", {
                "node": "disk", "name": BITMAP, "granularity": GRANULARITY, "persistent": True}))
        else:
            job["bitmap"] = BITMAP
        with load.paused():
            instant = self.model.copy()
            given = time.monotonic()
            qmp.transaction(*actions)
            took = time.monotonic() - given
        before = load.written
        load.wait_written(100)
        qmp.execute("block-job-set-speed", device=name, speed=96 * MIB)
        done = qmp.wait_event("BLOCK_JOB_COMPLETED", device=name, timeout=90)["data"]
        must("error" not in done, f"{name}: {done}")
        qmp.wait_job(name, "null")
        during = load.written - before
        qmp.execute("blockdev-del", node_name=name)
        self.chain.append(path)

        restored = self.tmp / "restored.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, restored)
        with open(restored, "rb") as file:
            theirs = hashlib.sha256(file.read()).hexdigest()
        ours = hashlib.sha256(instant).hexdigest()
        restored.unlink()
        say("backup", f"{name}: copied {mib(done['len'])}; the command took "
            f"{took * 1000:.0f} ms, and the clients wrote {during} times while it ran")
        print(f"    sha256 {ours}  the disk at its instant, by what the clients were answered\n"
              f"    sha256 {theirs}  the backup, restored by qemu-img convert")
        must(ours == theirs, f"{name} is not the disk at its instant")
        return name

    def content(self):
        """The image at rest, read by qemu-img."""
        raw = self.tmp / "disk.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", self.path, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data

    def bits_by_qemu(self):
        """The dirty granules in the image at rest, read by QEMU's own code."""
        sock = self.tmp / "qemu-nbd.sock"
        with subprocess.Popen(["qemu-nbd", "-r", "-f", "qcow2", "-B", BITMAP, "-k", str(sock),
                               str(self.path)], stdin=subprocess.DEVNULL) as server:
            while not sock.exists():
                must(server.poll() is None, "qemu-nbd does not see the bitmap")
                time.sleep(0.01)
            handle = connect(nbd_uri(sock), [CONTEXT])
            found = extents(handle, CONTEXT)
            handle.shutdown()
        return {g for at, length, flags in found if flags & 1
                for g in range(at // GRANULARITY, (at + length - 1) // GRANULARITY + 1)}

    def check(self, path):
        verdict = check_image(path)
        must(not verdict["leaks"] and not verdict["corruptions"] and not verdict["check-errors"],
             f"qemu-img check {path.name}: {verdict}")


def fill(disk):
    """The first content, by two clients that we did not write."""
    qemu_io(disk.uri, "write -P 0x11 0 20M", "write -P 0x22 98M 9M", "write -z 4M 1M", "flush",
            fmt="raw")
    disk.model.write(0, b"\x11" * 20 * MIB)
    disk.model.write(98 * MIB, b"\x22" * 9 * MIB)
    disk.model.write(4 * MIB, bytes(MIB))
    handle = connect(disk.uri)
    for at in range(32 * MIB, 96 * MIB, MIB):
        data = os.urandom(MIB)
        handle.pwrite(data, at)
        disk.model.write(at, data)
    handle.shutdown()


def settle(disk, unsure, flushed=None):
    """After an end, what was on its way is done, or not, or in part; the disk decides. All that had
    been answered must be there; after a kill, all that had been FLUSHED and was not written since."""
    content, model = disk.content(), disk.model
    for offset, length in unsure:
        model.write(offset, content[offset:offset + length])
    for at in range(0, SIZE if flushed else 0, BLOCK):
        now = content[at:at + BLOCK]
        if now != model.read(at, BLOCK):
            must(model.read(at, BLOCK) != flushed[at:at + BLOCK],
                 f"the disk has lost what was flushed at {at}")
            model.write(at, now)
    must(hashlib.sha256(content).hexdigest() == model.sha256(),
         "the disk has not kept what it had answered")
    return content


def written_since_backup(disk, content):
    """The granules in which CONTENT is not what the last backup holds."""
    raw = disk.tmp / "last.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk.chain[-1], raw)
    backup = raw.read_bytes()
    raw.unlink()
    written = {at // GRANULARITY for at in range(0, SIZE, GRANULARITY)
               if content[at:at + GRANULARITY] != backup[at:at + GRANULARITY]}
    must(written, "nothing was written since the last increment")
    return written


def first_run(disk):
    """Full backup and three increments under load, then SIGTERM, still under load."""
    disk.serve()
    fill(disk)
    say("serve", f"{os.path.basename(disk.daemon.binary)} serves a {mib(SIZE)} qcow2 disk; "
        "qemu-io and libnbd have filled some of it, four clients go on writing")
    load = Load(disk.uri, disk.model)
    load.wait_written(100)
    disk.backup(load, "full")
    ok("the full backup, taken under load, equals the disk at its instant")
    for number in (1, 2, 3):
        load.wait_written(100)
        disk.backup(load, "incremental")
        ok(f"increment {number}, taken under load and restored by qemu-img convert, equals the disk "
           "at its instant")
    load.wait_written(100)
    disk.daemon.stop(how="term")
    return load.end()


def after_sigterm(disk, unsure):
    """Nothing was lost: neither a write that was answered, nor a bit."""
    written = written_since_backup(disk, settle(disk, unsure))
    bits = disk.bits_by_qemu()
    must(written <= bits, f"granules {sorted(written - bits)[:9]} changed under a clear bit")
    ok(f"a SIGTERM under load ({len(unsure)} requests in flight) lost no bit: {len(written)} granules "
       f"differ from the last increment, QEMU finds all of them among the {len(bits)} set in "
       f"'{BITMAP}'")
    return bits


def between_runs(disk, bits):
    """QEMU's tools write to the disk and set bits in our bitmap, by themselves and by a merge."""
    def info():
        report = json.loads(qemu_img("info", "--output=json", disk.path))
        return {b["name"]: b["flags"] for b in report["format-specific"]["data"]["bitmaps"]}

    must("in-use" not in info()[BITMAP], f"'{BITMAP}' is still in use")
    qemu_io(disk.path, "write -P 0x51 112M 300k", fmt="qcow2")         # marks it
    qemu_img("bitmap", "--disable", disk.path, BITMAP)
    qemu_img("bitmap", "--add", "-g", "32k", disk.path, "other")
    qemu_io(disk.path, "write -P 0x52 120M 1M", "discard 8M 64k", fmt="qcow2")  # marks the other
    qemu_img("bitmap", "--merge", "other", disk.path, BITMAP)           # and now it too
    qemu_img("bitmap", "--remove", disk.path, "other")
    qemu_img("bitmap", "--enable", disk.path, BITMAP)
    for offset, data in ((112 * MIB, b"\x51" * 300 * 1024), (120 * MIB, b"\x52" * MIB),
                         (8 * MIB, bytes(65536))):
        disk.model.write(offset, data)
        bits.update(range(offset // GRANULARITY, (offset + len(data) - 1) // GRANULARITY + 1))
    must(disk.bits_by_qemu() == bits, "QEMU's tools did not set the bits they should")


def second_run(disk, bits):
    """Our daemon takes up what QEMU has left; the next increment has it."""
    qmp = disk.serve()
    bitmap = qmp.bitmaps("disk")[BITMAP]
    must(bitmap["recording"] and bitmap["persistent"], f"'{BITMAP}' is back as {bitmap}")
    must(bitmap["count"] == len(bits) * GRANULARITY,
         f"'{BITMAP}' is back with {bitmap['count']} bytes, not {len(bits) * GRANULARITY}")
    load = Load(disk.uri, disk.model, seed=2)
    disk.backup(load, "incremental")
    ok("qemu-io and qemu-img bitmap read and changed the same bitmap between two runs; increment 4 "
       "has what they wrote and equals the disk at its instant")
    with load.paused():
        flushed = disk.model.copy()
        handle = connect(disk.uri)
        handle.flush()
        handle.shutdown()
    load.wait_written(100)
    disk.daemon.kill()
    return load.end(), flushed


def after_sigkill(disk, unsure, flushed):
    """The bitmap is there, with all that was written: the next backup is an increment."""
    written = written_since_backup(disk, settle(disk, unsure, flushed))
    qmp = disk.serve()
    bitmap = qmp.bitmaps("disk")[BITMAP]
    must(bitmap["recording"] and not bitmap.get("inconsistent"), f"'{BITMAP}' is back as {bitmap}")
    say("crash", f"SIGKILL under load ({len(unsure)} requests in flight); {len(written)} granules "
        f"differ from the last increment, '{BITMAP}' has {bitmap['count'] // GRANULARITY} set")
    load = Load(disk.uri, disk.model, seed=3)
    disk.backup(load, "incremental")
    must(not load.end(), "a client lost its server")
    disk.daemon.stop(how="quit")
    must(hashlib.sha256(disk.content()).hexdigest() == disk.model.sha256(),
         "the disk at rest is not what the clients wrote")
    ok("after a SIGKILL under load the disk has all that was flushed, the bitmap is usable, and "
       "increment 5 equals the disk at its instant")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.parse_args()
    must(os.access(find_tidemarkd(), os.X_OK), f"{find_tidemarkd()} is not built")
    with temp_dir(prefix="tidemark-demo-") as tmp:
        disk = Disk(tmp)
        try:
            unsure = first_run(disk)
            bits = after_sigterm(disk, unsure)
            between_runs(disk, bits)
            after_sigkill(disk, *second_run(disk, bits))
        finally:
            if disk.daemon and disk.daemon.running:
                disk.daemon.kill()
        for path in [disk.path, *disk.chain]:
            disk.check(path)
        ok(f"qemu-img check is clean on all {1 + len(disk.chain)} files")
    say("done", "the disk, a full backup and five increments; nothing of it is kept")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Wrong as wrong:
        print(f"not ok: {wrong}")
        sys.exit(1)
