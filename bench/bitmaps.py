#!/usr/bin/python3
"""What persistent bitmaps cost a disk that is being written.

One daemon for each number of bitmaps (and level), each with a sparse raw disk of its own; beside them
qemu-storage-daemon, with qcow2, which is where it can keep bitmaps. The same writes go to all by turns,
round after round; medians make the ratio to the daemon of the same kind without bitmaps.

fresh    all over the disk, which starts sparse: most regions are not hot. Each round goes on where the
         last one ended, in other places: all rounds together are one run
warmed   the first GiB, which has been written before: all its regions are hot

Cost is what a write took longer than without bitmaps, in us, the rounds' median; run is the ratio of all
writes of all rounds. commits is the ring's transactions for 1,000 writes; floor is what they take, in us a
write: commits times the time of a durable write of 4 KiB to this disk, the mean, while the same writes go
to another disk without bitmaps. least is that for as many transactions as would do if each carried all
that the depth allows. passed is the writes of 1,000 that were durably dirty already.
"""

import argparse
import json
import mmap
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "system"))

from tidemark_testlib import (  # noqa: E402
    QSD, Daemon, connect, create_image, find_tidemarkd, nbd_uri, temp_dir,
)

MIB = 1 << 20
GIB = 1 << 30
LARGE = 16 * 1024 * GIB - 65536  # what ext4 can hold of 16 TiB
COUNTERS = ("commits", "entered", "passed", "cleaned")
args = None


class Side:
    """One daemon, one disk, so many persistent bitmaps."""

    def __init__(self, tmp, name, qemu, bitmaps, level="power", size=None, nbd=True):
        self.name, self.qemu, self.bitmaps, self.level = name, qemu, bitmaps, level
        self.dir = tmp / name.replace(" ", "-")
        self.dir.mkdir()
        self.binary = QSD if qemu else find_tidemarkd()
        fmt = "qcow2" if qemu else "raw"
        self.image = self.dir / f"disk.{fmt}"
        if qemu:
            create_image(self.image, size=size or args.size * GIB)
        else:
            with open(self.image, "wb") as file:
                file.truncate(size or args.size * GIB)
        sock = self.dir / "nbd.sock"
        self.uri = nbd_uri(sock, "disk")
        self.file = f"driver=file,node-name=file,filename={self.image}"
        self.disk = f"driver={fmt},node-name=disk,file=file"
        if level != "power":
            self.disk += f",x-tidemark-persist.level={level}"
        export = ("--nbd-server", f"addr.type=unix,addr.path={sock}",
                  "--export", "type=nbd,id=exp,node-name=disk,name=disk,writable=on") if nbd else ()
        self.daemon = Daemon("--blockdev", self.file, "--blockdev", self.disk, *export,
                             binary=self.binary, directory=self.dir)
        self.qmp = self.daemon.qmp
        for i in range(bitmaps):
            self.qmp.execute("block-dirty-bitmap-add", node="disk", name=f"b{i}", persistent=True,
                             granularity=65536)

    def counters(self):
        for node in self.qmp.execute("query-named-block-nodes", flat=True):
            if node["node-name"] == "disk":
                return node.get("x-tidemark-hot-regions")
        return None

    def fio(self, rw, block, depth, size, offset, seed):
        """Seconds a write, and what the counters say of a write."""
        before = self.counters()
        done = subprocess.run(
            ["fio", "--name=x", "--ioengine=nbd", f"--uri={self.uri}", f"--rw={rw}", f"--bs={block}",
             f"--iodepth={depth}", f"--size={size}", f"--offset={offset}", "--time_based",
             f"--runtime={args.seconds * 1000:.0f}ms", f"--randseed={seed}", "--randrepeat=0",
             "--norandommap",
             "--output-format=json"],
            capture_output=True, check=True, stdin=subprocess.DEVNULL)
        text = done.stdout.decode()
        job = json.loads(text[text.index("{"):])["jobs"][0]["write"]
        if not job["iops"]:     # a machine that stalled all the time has measured nothing
            return self.fio(rw, block, depth, size, offset, seed)
        after = self.counters()
        moved = {key: after[key] - before[key] for key in COUNTERS} if before and after else {}
        return 1 / job["iops"], job["total_ios"], moved


def flush_time(tmp):
    """Seconds that a durable write of 4 KiB to a file written before takes: the mean of 200. By O_DIRECT,
    as the ring's are, where there is that."""
    path = tmp / "flush"
    path.write_bytes(bytes(MIB))
    block = mmap.mmap(-1, 4096)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DSYNC | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDWR | os.O_DSYNC)
    try:
        os.fsync(fd)
        began = time.monotonic()
        for i in range(200):
            os.pwrite(fd, block, i % 64 * 4096)
        return (time.monotonic() - began) / 200
    finally:
        os.close(fd)


def busy_flush_time(tmp, side, fio_args):
    """The same while SIDE, which has no bitmaps, is being written."""
    busy = threading.Thread(target=side.fio, args=fio_args)
    busy.start()
    time.sleep(max(0.5, args.seconds / 2))    # until fio has begun
    spent = flush_time(tmp)
    busy.join()
    return spent


ROWS = [
    # name, rw, block, depth, warmed
    ("4k random, depth 1, fresh", "randwrite", "4k", 1, False),
    ("4k random, depth 32, fresh", "randwrite", "4k", 32, False),
    ("4k random, depth 1, warmed", "randwrite", "4k", 1, True),
    ("4k random, depth 32, warmed", "randwrite", "4k", 32, True),
    ("1M sequential, depth 1, fresh", "write", "1M", 1, False),
    ("1M sequential, depth 32, fresh", "write", "1M", 32, False),
    ("1M sequential, depth 1, warmed", "write", "1M", 1, True),
    ("1M sequential, depth 32, warmed", "write", "1M", 32, True),
]


def spread(values):
    """Half of the distance between the quartiles, in per cent of the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return 50 * (high - low) / statistics.median(values)


def touch(side, step, until):
    """A byte-sized reason for every region to be hot."""
    handle = connect(side.uri)
    for at in range(0, until, step):
        handle.pwrite(bytes(4096), at)
    handle.shutdown()


def warm(side):
    """All of it written once, so that only the bitmaps make a difference."""
    handle = connect(side.uri)
    for at in range(0, args.warm * MIB, MIB):
        handle.pwrite(os.urandom(MIB), at)
    handle.shutdown()


def writes(tmp, sides, load):
    """LOAD, a side that is not measured, keeps the disk busy for the floor: what it writes must not be on
    the disk of any that is."""
    rows = [row for row in ROWS if all(word in row[0] for word in args.only.split(","))]
    values = {}
    idle, busy = [], {}
    for side in [*sides, load]:
        warm(side)
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        # where a sequential write goes that must find nothing hot
        place = GIB * (1 + number % (args.size - 2))
        for row, (name, rw, block, depth, warmed) in enumerate(rows):
            if rw == "randwrite":
                size, offset = (f"{args.warm}M", 0) if warmed else (f"{args.size}G", 0)
            else:
                size, offset = f"{args.warm}M", 0 if warmed else place
            idle.append(flush_time(tmp))
            busy.setdefault(name, []).append(
                busy_flush_time(tmp, load, (rw, block, depth, size, offset, number * 100 + row)))
            for side in sides if (number + row) % 2 == 0 else sides[::-1]:
                if warmed and side.bitmaps and not side.qemu:
                    touch(side, 4 * MIB, args.warm * MIB)
                values.setdefault((name, side.name), []).append(
                    side.fio(rw, block, depth, size, offset, number * 100 + row))
    print(f"a durable write of 4 KiB to the idle disk: {statistics.median(idle) * 1e6:.0f} us"
          f" (+-{spread(idle):.0f} %)\n")
    print(f"{'':46} {'us a write':>10} {'':8} {'ratio':>6} {'run':>6} {'cost':>7} {'floor':>7} {'least':>7}"
          f" {'commits':>7} {'entered':>7} {'passed':>7} {'cleaned':>7}")
    for name, _, _, depth, _ in rows:
        flush = statistics.median(busy[name])
        print(f"{name} (a durable write meanwhile: {flush * 1e6:.0f} us)")
        for side in sides:
            base = "qemu none" if side.qemu else "none"
            times = [v[0] for v in values[name, side.name]]
            bases = [v[0] for v in values[name, base]]
            ratio = statistics.median(b / t for b, t in zip(bases, times))
            t = statistics.median(times)
            total = sum(v[1] for v in values[name, side.name])
            run = total / sum(v[0] * v[1] for v in values[name, side.name])
            base_run = sum(v[1] for v in values[name, base]) / sum(v[0] * v[1] for v in values[name, base])
            count = {key: sum(v[2].get(key, 0) for v in values[name, side.name]) / total * 1000
                     for key in COUNTERS}
            cost = (t - statistics.median(bases)) * 1e6 if side.bitmaps else 0
            least = count["entered"] / min(depth, 64)
            print(f"    {side.name:42} {t * 1e6:10.1f} +-{spread(times):4.1f} % {ratio:6.3f}"
                  f" {run / base_run:6.3f} {cost:7.2f} {count['commits'] * flush * 1e3:7.2f}"
                  f" {least * flush * 1e3:7.2f} {count['commits']:7.1f} {count['entered']:7.1f}"
                  f" {count['passed']:7.1f} {count['cleaned']:7.1f}  ({total} writes)")
    if args.json:
        print(json.dumps({f"{name}, {side}": v for (name, side), v in values.items()}))


class Large:
    """A disk of 16 TiB with eight bitmaps, opened and closed by QMP."""

    def __init__(self, tmp, qemu):
        self.qemu = qemu
        self.side = Side(tmp, "16 TiB qemu" if qemu else "16 TiB", qemu, 0, size=LARGE)
        self.qmp = self.side.qmp
        for i in range(8):
            self.qmp.execute("block-dirty-bitmap-add", node="disk", name=f"b{i}", persistent=True,
                             granularity=65536)
        self.write(256)
        self.qmp.execute("block-export-del", id="exp")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="exp")

    def write(self, n):
        handle = connect(self.side.uri)
        for i in range(n):
            handle.pwrite(bytes(4096), LARGE // n * i // 65536 * 65536)
        handle.shutdown()

    def measure(self):
        began = time.monotonic()
        self.qmp.execute("blockdev-del", node_name="disk")
        closed = time.monotonic()
        self.qmp.execute("blockdev-add", driver="qcow2" if self.qemu else "raw", node_name="disk",
                         file="file")
        opened = time.monotonic()
        # the first write, which a session begins with
        self.qmp.execute("block-export-add", type="nbd", id="exp", node_name="disk", name="disk",
                         writable=True)
        began_write = time.monotonic()
        self.write(100)
        wrote = time.monotonic()
        self.qmp.execute("block-export-del", id="exp")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id="exp")
        return closed - began, opened - closed, wrote - began_write


def large(tmp):
    both = {"tidemarkd": Large(tmp, False), "qemu-storage-daemon": Large(tmp, True)}
    values = {name: [] for name in both}
    for number in range(args.rounds + 1):
        for name in list(both) if number % 2 else list(both)[::-1]:
            v = both[name].measure()
            if number:
                values[name].append(v)
    print("\neight bitmaps of a disk of 16 TiB, ms")
    for i, what in enumerate(("close after 100 writes", "open", "first 100 writes")):
        ours, theirs = ([v[i] * 1e3 for v in values[name]] for name in both)
        print(f"{what:32} {statistics.median(ours):8.1f} +-{spread(ours):3.0f} % "
              f"{statistics.median(theirs):8.1f} +-{spread(theirs):3.0f} %  ratio "
              f"{statistics.median(ours) / statistics.median(theirs):.2f}")
    for item in both.values():
        item.side.daemon.kill()


def main():
    global args
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--seconds", type=float, default=1, help="of each fio run (1)")
    parser.add_argument("--size", type=int, default=64, help="of the disk, in GiB (64)")
    parser.add_argument("--warm", type=int, default=1024, help="of the warmed part, in MiB (1024)")
    parser.add_argument("--only", default="", help="only rows with all these words, by commas; "
                        "'open': only opening and closing")
    parser.add_argument("--sides", default="none,one,eight,eight process,qemu none,qemu eight",
                        help="which daemons, by commas")
    parser.add_argument("--json", action="store_true", help="print every value as JSON as well")
    args = parser.parse_args()

    kinds = {"none": (False, 0), "one": (False, 1), "eight": (False, 8),
             "eight process": (False, 8, "process"), "qemu none": (True, 0), "qemu eight": (True, 8)}
    with temp_dir(prefix="tidemark-bench-") as tmp:
        if args.only != "open":
            sides = []
            try:
                for name in args.sides.split(","):
                    sides.append(Side(tmp, name, *kinds[name]))
                sides.append(Side(tmp, "load", *kinds["none"]))
                writes(tmp, sides[:-1], sides[-1])
            finally:
                for side in sides:
                    side.daemon.kill()
        if args.only in ("", "open"):
            large(tmp)


if __name__ == "__main__":
    main()
