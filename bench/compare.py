#!/usr/bin/python3
"""tidemarkd and qemu-storage-daemon side by side: the same measurements on equal images.

Both serve a full qcow2 image of their own, through the page cache, on Unix sockets. Each round takes
each measurement from both, by turns first one and then the other first; medians over the rounds
make the ratio (above 1: tidemarkd is the faster). A single number says little on a machine that
others use: look at the spread, which is half of the middle of the rounds.

TIDEMARK names the binary on our side; two times the same shows what noise there is.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "system"))

from tidemark_testlib import (  # noqa: E402
    QSD, Daemon, connect, create_image, find_tidemarkd, nbd_uri, temp_dir,
)

MIB = 1 << 20
GRANULARITY = 65536
args = None


class Side:
    """One daemon with one image."""

    def __init__(self, name, binary, tmp):
        self.name = name
        self.dir = tmp / name
        self.dir.mkdir()
        image = create_image(self.dir / "disk.qcow2", size=args.size * MIB)
        sock = self.dir / "nbd.sock"
        self.uri = nbd_uri(sock, "disk")
        self.daemon = Daemon(
            "--blockdev", f"driver=file,node-name=file,filename={image}",
            "--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={sock}",
            "--export", "type=nbd,id=exp,node-name=disk,name=disk,writable=on",
            binary=binary, directory=self.dir)
        self.qmp = self.daemon.qmp
        self.count = 0
        self.fill()

    def fill(self):
        handle = connect(self.uri)
        for at in range(0, args.size * MIB, MIB):
            handle.pwrite(os.urandom(MIB), at)
        handle.flush()
        handle.shutdown()

    def fio(self, rw, block, depth, requests=None):
        """Bytes a second, for args.seconds or for so many requests."""
        until = ([f"--number_ios={requests}"] if requests else
                 ["--time_based", "--ramp_time=0.5", f"--runtime={args.seconds * 1000:.0f}ms"])
        done = subprocess.run(
            ["fio", "--name=x", "--ioengine=nbd", f"--uri={self.uri}", f"--rw={rw}", f"--bs={block}",
             f"--iodepth={depth}", f"--size={args.size}M", *until, "--randrepeat=1", "--norandommap",
             "--output-format=json"],
            capture_output=True, check=True, stdin=subprocess.DEVNULL)
        text = done.stdout.decode()
        job = json.loads(text[text.index("{"):])["jobs"][0]
        rate = job["read" if "read" in rw else "write"]["bw_bytes"]
        # A machine that stalled all the time has measured nothing.
        return rate or self.fio(rw, block, depth, requests)

    # -- backups

    def start_backup(self, **arguments):
        self.count += 1
        name = f"b{self.count}"
        path = create_image(self.dir / f"{name}.qcow2", size=args.size * MIB)
        self.qmp.execute("blockdev-add", driver="qcow2", node_name=name,
                         file={"driver": "file", "filename": str(path)})
        began = time.monotonic()
        self.qmp.execute("blockdev-backup", job_id=name, device="disk", target=name, **arguments)
        return name, path, began

    def end_backup(self, name, path):
        done = self.qmp.wait_event("BLOCK_JOB_COMPLETED", device=name, timeout=300)["data"]
        ended = time.monotonic()
        if "error" in done:
            raise RuntimeError(f"{self.name}: {done}")
        self.qmp.wait_job(name, "null")
        self.qmp.execute("blockdev-del", node_name=name)
        path.unlink()
        return ended

    def full(self):
        """Disk bytes a second."""
        name, path, began = self.start_backup(sync="full")
        return args.size * MIB / (self.end_backup(name, path) - began)

    def one_percent(self):
        """Increments a second: of every hundredth granule, 4 KiB have been written."""
        self.qmp.execute("block-dirty-bitmap-add", node="disk", name="inc", granularity=GRANULARITY)
        handle = connect(self.uri)
        spent = []
        for _ in range(5):
            for at in range(0, args.size * MIB, 100 * GRANULARITY):
                handle.pwrite(os.urandom(4096), at)
            name, path, began = self.start_backup(sync="incremental", bitmap="inc")
            spent.append(self.end_backup(name, path) - began)
        handle.shutdown()
        self.qmp.execute("block-dirty-bitmap-remove", node="disk", name="inc")
        return 1 / statistics.median(spent)

    def writes_under_backup(self):
        """Bytes a second of 4k random writes, most into chunks that a backup has yet to copy."""
        name, path, _ = self.start_backup(sync="full", speed=MIB)
        rate = self.fio("randwrite", "4k", 16, requests=args.size * MIB // GRANULARITY // 2)
        self.qmp.execute("block-job-set-speed", device=name, speed=0)
        self.end_backup(name, path)
        return rate


    def mirror(self):
        """Disk bytes a second until a full mirror is ready."""
        self.count += 1
        name = f"m{self.count}"
        path = create_image(self.dir / f"{name}.qcow2", size=args.size * MIB)
        self.qmp.execute("blockdev-add", driver="qcow2", node_name=name,
                         file={"driver": "file", "filename": str(path)})
        began = time.monotonic()
        self.qmp.execute("blockdev-mirror", job_id=name, device="disk", target=name, sync="full")
        self.qmp.wait_event("BLOCK_JOB_READY", device=name, timeout=300)
        ended = time.monotonic()
        self.qmp.execute("block-job-cancel", device=name)
        self.end_backup(name, path)
        return args.size * MIB / (ended - began)


MEASUREMENTS = [
    ("4k random read", "MiB/s", MIB, lambda side: side.fio("randread", "4k", 16)),
    ("4k random write", "MiB/s", MIB, lambda side: side.fio("randwrite", "4k", 16)),
    ("1M sequential read", "MiB/s", MIB, lambda side: side.fio("read", "1M", 4)),
    ("1M sequential write", "MiB/s", MIB, lambda side: side.fio("write", "1M", 4)),
    ("full backup", "MiB/s", MIB, Side.full),
    ("1 % incremental", "a second", 1, Side.one_percent),
    ("full mirror", "MiB/s", MIB, Side.mirror),
    ("4k random write during a backup", "MiB/s", MIB, Side.writes_under_backup),
]


def spread(values):
    """Half of the distance between the quartiles, in per cent of the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return 50 * (high - low) / statistics.median(values)


def main():
    global args
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--seconds", type=float, default=4, help="of each fio run (4)")
    parser.add_argument("--size", type=int, default=1024, help="of the image, in MiB (1024)")
    parser.add_argument("--json", action="store_true", help="print every value as JSON as well")
    args = parser.parse_args()

    with temp_dir(prefix="tidemark-bench-") as tmp:
        sides = []
        try:
            for name, binary in (("tidemarkd", find_tidemarkd()), ("qemu", QSD)):
                sides.append(Side(name, binary, tmp))
            values = {(name, side.name): [] for name, *_ in MEASUREMENTS for side in sides}
            for number in range(args.rounds):
                print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
                for name, _, _, measure in MEASUREMENTS:
                    for side in sides if number % 2 == 0 else sides[::-1]:
                        values[name, side.name].append(measure(side))
        finally:
            for side in sides:
                side.daemon.kill()

    print(f"{'':32} {'tidemarkd':>18} {'qemu-storage-daemon':>20}            ratio")
    for name, unit, scale, _ in MEASUREMENTS:
        ours, theirs = values[name, "tidemarkd"], values[name, "qemu"]
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"{name:32} {a / scale:9.1f} +-{spread(ours):4.1f} % {b / scale:11.1f} "
              f"+-{spread(theirs):4.1f} % {unit:8} {a / b:6.2f}")
    if args.json:
        print(json.dumps({f"{name}, {side}": v for (name, side), v in values.items()}))


if __name__ == "__main__":
    main()
