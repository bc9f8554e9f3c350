"""Histories of a disk whose server is killed, or loses its power, at any moment.

    history = History(HostPlace(tmp, tidemarkd), seed=257, fmt="raw")
    history.run(lives=8)            # raises Violation

A *place* is where tidemarkd runs: a process here (HostPlace), or in a virtual machine that loses
its power (guest.py). In it a disk is written over NBD by three clients, and a backup program keeps
two chains of it, in the two ways that such programs have:

    tide    one bitmap, `sync: incremental`; after a crash the generation of the bitmap and its last
            job tell whether a backup whose end was not seen has advanced it: then its target is
            kept, else dropped. Sometimes it begins anew: full backup and clear in one transaction.
    mark-N  a bitmap for each backup, as libvirt's checkpoints: made, and the one before disabled, in
            the transaction of the backup; given up by merging it into the one before.

What must be true after each crash: bitmaps are there, consistent, and as the transactions that were
under way would leave them, wholly or not at all; what the daemon says of its recovery is what has
happened; `tide`, by the NBD server's extents, has what clients were answered since its base, and
beyond that what they were not answered (after a loss of power: and the regions written to); what
they were answered is there (after a loss of power, and in qcow2, whose tables wait for a flush as
QEMU's do: what they had flushed). A qcow2 disk is clean for qemu-img, but for leaks; after a clean
close no tide file is beside it and no bitmap in use. And, with the clients at rest, one more backup
onto each chain makes the chain equal to the disk, judged by qemu-img.

A life ends in one of the ways of ENDS, and only one of them is what a place is about, a *round*: on a host
a SIGKILL whose run segments are there, in a machine a loss of power. The others happen besides, and are
counted apart. After each of them all of the above is looked at; a check is counted where it is made, so
that the summary shows, for each, in how many of the rounds.

A kill is *inside recovery* if it is known that it was: the daemon had the tide file open, and had not yet
told what it has found, or not yet kept it; and the last start, which nobody cuts, had to recover.

At level `process` a kill is as exact, and bitmaps whose run segments are lost are not believed.

The format "device" is raw on a block device (here a loop device, in a machine a drive of its own),
with its tide file in a state directory. Nothing tells whether others have written it after a crash.

In a *foreign* life QEMU opens the crashed image for writing before the daemon is back, or dd changes a
raw one: then nothing is believed, and `tide` is made anew by a comparison with its chain. QEMU's reading
changes nothing.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import tempfile
import threading
import time

from .daemon import QSD, Daemon
from .images import run_tool, wait_for_locks
from .loopdev import LoopDevice
from .nbd import connect, extents, nbd_uri
from .qmp import QMPError

KiB, MiB = 1 << 10, 1 << 20
BLOCK = 4096
GRANULE = 64 * KiB       # of the bitmaps
REGION = 16 * MiB        # how coarse the tide file's hot regions are
CLIENTS = 3
GONE = (EOFError, ConnectionError, BrokenPipeError)


class Violation(Exception):
    """Something that must be true is not."""


def granules(at, length):
    return range(at // GRANULE, (at + length - 1) // GRANULE + 1)


def must(condition, text):
    if not condition:
        raise Violation(text)


# --- the load ------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Writes, trims, zeroes and flushes in its own stripes of the windows; knows which blocks must
    read as what. A block that is not in `now` may hold anything."""

    def __init__(self, number, uri, seed, windows, flushes):
        super().__init__(daemon=True)
        self.rng = random.Random(seed)
        self.uri, self.number, self.windows, self.flushes = uri, number, windows, flushes
        self.ended = False       # asked to
        self.answered = self.written = 0
        self.now = {}            # block -> its bytes, by what was answered
        self.unflushed = set()   # blocks of them that no flush speaks for yet
        self.log = []            # [at, length, when it was begun, when it was answered]
        self.error = None

    def place(self, length):
        """Each window is cut in stripes of 1 MiB, dealt to the clients in turn."""
        start, size = self.rng.choice(self.windows)
        stripes = range(self.number, size // MiB, CLIENTS)
        at = start + self.rng.choice(stripes) * MiB
        return at + BLOCK * self.rng.randint(0, (MiB - length) // BLOCK)

    def run(self):
        import nbd
        try:
            handle = connect(self.uri)
            while not self.ended:
                self.step(handle)
                self.answered += 1
                time.sleep(0.001)
        except (nbd.Error, OSError) as error:
            self.error = error

    def step(self, handle):
        rng = self.rng
        if rng.random() < self.flushes:
            handle.flush()
            self.unflushed.clear()
            return
        length = BLOCK * (rng.randint(1, 16) if rng.random() < 0.9 else rng.randint(16, 256))
        at = self.place(length)
        blocks = range(at // BLOCK, (at + length) // BLOCK)
        for block in blocks:     # from now on either, until it is answered
            self.now.pop(block, None)
        kind = rng.random()
        self.log.append([at, length, time.monotonic(), math.inf])
        if kind < 0.1:
            handle.trim(length, at)
        elif kind < 0.2:
            handle.zero(length, at)
            self.know(blocks, bytes(length))
        else:
            data = rng.randbytes(length)
            handle.pwrite(data, at)
            self.know(blocks, data)
        self.log[-1][3] = time.monotonic()
        self.written += 1

    def know(self, blocks, data):
        for i, block in enumerate(blocks):
            self.now[block] = data[i * BLOCK:(i + 1) * BLOCK]
        self.unflushed.update(blocks)


class Load:
    def __init__(self, uri, seed, windows, flushes):
        self.clients = [Client(n, uri, f"{seed}-{n}", windows, flushes) for n in range(CLIENTS)]
        for client in self.clients:
            client.start()

    def wait_written(self, requests, timeout=90.0):
        deadline = time.monotonic() + timeout
        while sum(c.written for c in self.clients) < requests:
            for client in self.clients:
                must(not client.error, f"a client lost its server: {client.error}")
            must(time.monotonic() < deadline, f"not {requests} writes within {timeout:g} s")
            time.sleep(0.002)

    def end(self):
        for client in self.clients:
            client.ended = True
        for client in self.clients:
            client.join(60)
            must(not client.is_alive(), "a client hangs after its server's end")

    def changed_since(self, sent, answered):
        """Granules written to after an instant between SENT and ANSWERED: surely; at most."""
        surely, most = set(), set()
        for at, length, begun, ended in (w for client in self.clients for w in client.log):
            if begun > answered and ended < math.inf:
                surely.update(granules(at, length))
            if ended > sent:
                most.update(granules(at, length))
        return surely, most

    def touched(self):
        """Blocks that a request was sent for."""
        return {block for client in self.clients for at, length, *_ in client.log
                for block in range(at // BLOCK, (at + length) // BLOCK)}

    def answered(self, flushed_only):
        """What they were answered, block by block; or what of it they have flushed."""
        return {block: data for client in self.clients for block, data in client.now.items()
                if not (flushed_only and block in client.unflushed)}


def check_content(uri, known):
    """The disk has KNOWN, a dict of blocks; read in runs of at most 256 KiB."""
    handle, run = connect(uri), []

    def look():
        data = handle.pread(len(run) * BLOCK, run[0] * BLOCK)
        for i, block in enumerate(run):
            must(data[i * BLOCK:(i + 1) * BLOCK] == known[block],
                 f"what was written to {block * BLOCK}, and answered or flushed, is not there")
    for block in sorted(known):
        if run and (block != run[-1] + 1 or len(run) == 64):
            look()
            run = []
        run.append(block)
    if run:
        look()
    handle.shutdown()


# --- where it runs -------------------------------------------------------------------------------


class HostPlace:
    """tidemarkd as a process here. Its runtime directory is on tmpfs; losing what is in it makes a
    kill look like a loss of power to recovery (with the page cache intact)."""

    power = False    # is a crash a real loss of power?
    slow = False     # was the last end so slow that a write may have come long after the last beat?
    patience = 30.0

    def __init__(self, tmp, binary=None):
        self.tmp, self.binary = pathlib.Path(tmp), binary
        self.loop = None
        base = "/dev/shm" if os.path.isdir("/dev/shm") else tmp
        self.runtime = tempfile.mkdtemp(prefix="tm-run-", dir=base)
        self.daemon = self.qmp = None

    def path(self, name):
        return str(self.tmp / name)

    def uri(self, export):
        return nbd_uri(self.tmp / "nbd.sock", export)

    def device(self, size):
        """The path of a block device that is the disk; made at the first call."""
        if not self.loop:
            (self.tmp / "state").mkdir()
            self.loop = LoopDevice(self.tmp / "disk", size)
        return self.loop.path

    def boot(self):
        for name in ("nbd.sock", "qmp.sock", "stderr.log"):
            (self.tmp / name).unlink(missing_ok=True)
        self.daemon = Daemon("--nbd-server", f"addr.type=unix,addr.path={self.tmp}/nbd.sock",
                             binary=self.binary, directory=self.tmp,
                             env={"RUNTIME_DIRECTORY": self.runtime})
        self.qmp = self.daemon.qmp

    def cut(self):
        """The end, from any thread."""
        self.cut_at = time.monotonic()
        self.daemon.process.send_signal(signal.SIGKILL)

    def recovering(self):
        """Does it have a tide file open?"""
        fds = f"/proc/{self.daemon.pid}/fd"
        for name in os.listdir(fds):
            with contextlib.suppress(OSError):
                if os.readlink(f"{fds}/{name}").endswith(".tide"):
                    return True
        return False

    def after_cut(self, lose):
        """LOSE: and the run segments are gone."""
        status = self.daemon.process.wait(60)
        while self.qmp.pump(10):     # what it had answered
            pass
        self.slow = time.monotonic() - self.cut_at > 0.8
        self.daemon.kill()
        must(status == -9, f"the daemon ended with status {status}: {self.daemon.stderr}")
        if lose:
            for file in pathlib.Path(self.runtime).iterdir():
                file.unlink()

    def stop(self):
        """A clean end, all events of which are read."""
        self.daemon.process.send_signal(signal.SIGTERM)
        while self.qmp.pump(120):
            pass
        self.daemon.wait(120)
        self.daemon.stop()

    @contextlib.contextmanager
    def look(self, name):
        """The file NAME as a block driver of QEMU's tools here."""
        yield {"driver": "file", "filename": self.path(name)}

    @contextlib.contextmanager
    def restored(self, chain):
        """What a restore of CHAIN would give, as an image for QEMU's tools."""
        yield self.path(chain[-1])

    def has(self, name):
        return os.path.exists(self.path(name))

    def leftovers(self):
        return sorted(os.listdir(self.runtime))

    def said(self):
        return self.daemon.stderr if self.daemon else ""

    def close(self):
        if self.daemon:
            self.daemon.kill()
        if self.loop:
            self.loop.close()
        shutil.rmtree(self.runtime, ignore_errors=True)


# --- the backup program and the story ------------------------------------------------------------


BY_DD, BY_QEMU = "dd changed the disk", "QEMU opened it for writing"
ENDS = {
    "killed": "killed, the run segments there",
    "power": "losses of power",
    "closed": "ended cleanly",
    "lost": "killed, the run segments lost",
    "foreign": "killed, and written to by others",
    "slow": "killed too slowly for the witness",
}
CHECKS = {     # what a life's end is followed by
    "exact": "recovered exactly, 0 bytes too many",
    "superset": "a superset, of no more than the regions written to",
    "clean": "told to be clean",
    "none": "not believed",
    "image": "clean for qemu-img check (but for leaks)",
    "content": "had all that clients know of its content",
    "extents": "dirty as far as clients have written",
    "anew": "bitmap made anew by a comparison",
    "tide": "chain and one more increment equal to the disk, by one bitmap",
    "full": "that chain begun anew (the end has cut a full backup)",
    "marks": "chain and one more increment equal to the disk, by a bitmap for each",
    "point": "that chain begun anew",
    "increment": "at least one of the two had its increment",
}
ROUND = {end: (state, "content", "extents", "increment")
         for end, state in (("killed", "exact"), ("power", "superset"))}
CUTS = {       # kills while the disk was opened again
    "verdict": "before its verdict",
    "kept": "before what it found was kept",
    "early": "before it began",
    "asked": "after it was asked to open, nobody knows whether it had begun",
    "late": "after it",
    "nothing": "with nothing to recover",
}
INSIDE = ("verdict", "kept")


class Found:
    """What many histories have seen."""

    def __init__(self):
        self.lives = collections.Counter()      # by ENDS
        self.checks = collections.defaultdict(collections.Counter)     # by ENDS, by CHECKS
        self.cuts = collections.Counter()       # by CUTS
        self.foreign, self.noticed = collections.Counter(), collections.Counter()   # by the program
        self.kept = self.dropped = self.most_added = self.leaks = self.orphans = 0
        self.rebuilt = self.gone = 0

    @property
    def recovery_kills(self):
        return sum(self.cuts[name] for name in INSIDE)

    def whole(self, about, fmt):
        """Has each round of a place been looked at in all ways, and each other writer been noticed?"""
        return self.noticed == self.foreign and all(
            self.checks[about][name] == self.lives[about]
            for name in (*ROUND[about], *(["image"] if fmt == "qcow2" else [])))

    def table(self, about=None):
        """ABOUT: what a place is about, whose checks have a line each."""
        lines = []
        for end, n in sorted(self.lives.items(), key=lambda item: item[0] != about):
            checks = {name: self.checks[end][name] for name in CHECKS
                      if self.checks[end][name] or (end == about and name in ROUND[about])}
            if end == about:
                lines += [f"{n} rounds: {ENDS[end]}",
                          *(f"    {checks[name]} of {n} {CHECKS[name]}" for name in checks)]
            else:
                told = ", ".join(f"{name} {checks[name]}" for name in checks)
                lines.append(f"besides, {n} {ENDS[end]}: {told}")
        inside = ", ".join(f"{self.cuts[name]} {CUTS[name]}" for name in INSIDE)
        others = ", ".join(f"{n} {CUTS[name]}" for name, n in self.cuts.items() if name not in INSIDE)
        lines.append(f"{self.recovery_kills} kills inside recovery: {inside}"
                     f"{f' (not counted: {others})' if others else ''}")
        for who, n in sorted(self.foreign.items()):
            lines.append(f"{n} times {who}: noticed {self.noticed[who]}")
        lines.append(f"{self.rebuilt} bitmaps made anew ({self.gone} were gone); "
                     f"added at most {self.most_added / MiB:g} MiB; of the backups under way "
                     f"{self.kept} had advanced and were kept, {self.dropped} dropped; {self.leaks} leaked "
                     f"clusters; {self.orphans} segments left on tmpfs")
        return "\n".join(lines)


class History:
    def __init__(self, place, seed, fmt="raw", size=None, found=None, say=None, foreign=0.0,
                 level="power"):
        self.level = level
        # (All of a device is read, holes or not, and a machine is slow.)
        size = size or (128 if place.power or fmt == "device" else 256) * MiB
        self.place, self.fmt, self.size = place, "raw" if fmt == "device" else fmt, size
        self.device = place.device(size) if fmt == "device" else None
        self.rng = random.Random(f"crash-{seed}")
        self.found = found or Found()
        self.say = say or (lambda text: None)
        self.count = 0
        self.chain, self.generation, self.pending = [], None, None
        self.marks, self.mark_chain, self.mark_pending = [], [], None
        self.load = None
        self.known = {}          # block -> what it must read as, by all lives
        self.regions = set()     # that recovery may call dirty
        self.possible = set()    # what recovery may say
        self.lost = False        # run segments were, in this life
        self.closed = False      # it ended well
        self.cuts = []           # of the openings after it, by CUTS
        self.last_events = []    # of its end
        self.recovery_kills = 0
        # Seconds within which a recovery is killed as likely as not.
        self.window = 0.3 if place.power else 0.004
        self.share_foreign = foreign    # of the crashes, a foreign writer follows
        # QEMU keeps the bitmaps of a qcow2 image that has been idle for so many milliseconds: never.
        self.idle = 0 if foreign or level == "process" else None
        self.foreign = None      # who has written the disk after this life
        self.disbelieved = False        # no bitmap is believed after it
        self.doubtful = False           # or perhaps none
        self.end = None          # how it ended, by ENDS
        self.dirty = set()       # granules of `tide` when the load began
        self.base = (0.0, 0.0)   # and its base is an instant between these
        self.disk_leaks = 0      # clusters of the disk

    @property
    def qmp(self):
        return self.place.qmp

    # -- small things

    def execute(self, command, **arguments):
        return self.qmp.execute(command, timeout=self.place.patience, **arguments)

    def create(self, **options):
        self.execute("blockdev-create", job_id="create", options=options)
        self.qmp.wait_job("create", timeout=self.place.patience)
        error = self.qmp.job("create").get("error")
        self.execute("job-dismiss", id="create")
        must(not error, f"blockdev-create {options}: {error}")

    def name(self, stem):
        self.count += 1
        return f"{stem}{self.count}"

    def node(self):
        return next(n for n in self.execute("query-named-block-nodes", flat=True)
                    if n["node-name"] == "disk")

    def bitmaps(self):
        return {b["name"]: b for b in self.node().get("dirty-bitmaps", [])}

    # -- the disk

    def make_disk(self):
        if self.device:
            return
        self.create(driver="file", filename=self.place.path("disk"),
                    size=self.size if self.fmt == "raw" else 0)
        if self.fmt != "raw":
            self.execute("blockdev-add", driver="file", node_name="disk-file",
                         filename=self.place.path("disk"))
            self.create(driver=self.fmt, file="disk-file", size=self.size)
            self.execute("blockdev-del", node_name="disk-file")

    def send_open(self):
        disk = {"driver": self.fmt, "node-name": "disk", "discard": "unmap",
                "file": {"driver": "file", "filename": self.place.path("disk")}}
        if self.idle is not None:
            disk["x-tidemark-persist"] = {"checkpoint-idle": self.idle}
        if self.level != "power":
            disk.setdefault("x-tidemark-persist", {})["level"] = self.level
        if self.device:
            disk["file"] = {"driver": "host_device", "filename": self.device}
            disk.setdefault("x-tidemark-persist", {})["state-directory"] = self.place.path("state")
        export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "writable": True}
        return [self.qmp.send("blockdev-add", disk), self.qmp.send("block-export-add", export)]

    def open(self):
        for ident in self.send_open():
            answer = self.qmp.answer(ident, self.place.patience)
            must("error" not in answer, f"opening the disk: {answer}")

    def windows(self):
        """Three or four places of 3 to 6 MiB that this life's clients write to."""
        found = []
        for region in self.rng.sample(range(self.size // REGION), 4 if self.size > 128 * MiB else 3):
            size = self.rng.randint(3, 6) * MiB
            found.append((region * REGION + self.rng.randint(0, (REGION - size) // MiB) * MiB, size))
        return found

    # -- targets and jobs

    def make_target(self, name, backing):
        path = self.place.path(name)
        self.create(driver="file", filename=path, size=0)
        self.execute("blockdev-add", driver="file", node_name=f"{name}-file", filename=path)
        base = {"backing-file": self.place.path(backing), "backing-fmt": "qcow2"} if backing else {}
        self.create(driver="qcow2", file=f"{name}-file", size=self.size, **base)
        self.execute("blockdev-add", driver="qcow2", node_name=name, file=f"{name}-file",
                     backing=None)

    def end_target(self, name):
        self.execute("blockdev-del", node_name=name)
        self.execute("blockdev-del", node_name=f"{name}-file")

    def wait_backup(self, name):
        data = self.qmp.wait_event("BLOCK_JOB_COMPLETED", self.place.patience * 3, device=name)["data"]
        must("error" not in data, f"backup {name}: {data}")
        self.qmp.wait_job(name, "null", self.place.patience)
        return data

    def speed(self):
        return self.rng.choice((0, 0, 64 * MiB, 8 * MiB))

    # -- client one: `tide`

    def begin_chain(self, finish=True):
        """A full backup, and the bitmap begins there."""
        name = self.name("full")
        self.make_target(name, None)
        self.pending = {"kind": "full", "name": name, "generation": self.generation,
                        "sent": time.monotonic(), "answered": math.inf}
        action = (("block-dirty-bitmap-clear", {"node": "disk", "name": "tide"})
                  if self.generation is not None else
                  ("block-dirty-bitmap-add", {"node": "disk", "name": "tide", "persistent": True,
                                              "granularity": GRANULE}))
        self.qmp.transaction(action, ("blockdev-backup", {
            "device": "disk", "target": name, "job-id": name, "sync": "full"}))
        self.pending["answered"] = time.monotonic()
        if finish:
            self.finish()

    def begin_increment(self, finish=True):
        name = self.name("inc")
        self.make_target(name, self.chain[-1])
        self.pending = {"kind": "increment", "name": name, "generation": self.generation,
                        "sent": time.monotonic(), "answered": math.inf}
        self.execute("blockdev-backup", device="disk", target=name, job_id=name, sync="incremental",
                     bitmap="tide", speed=0 if finish else self.speed())
        self.pending["answered"] = time.monotonic()
        if finish:
            self.finish()

    def finish(self):
        """The end of the backup is seen: it is in the chain."""
        pending = self.pending
        self.wait_backup(pending["name"])
        self.seen(pending)

    def seen(self, pending):
        if pending["kind"] == "full":
            self.chain = []
        self.chain.append(pending["name"])
        self.pending = None
        self.rebase(pending)
        self.generation = (self.generation or 0) + 1
        bitmap = self.bitmaps()["tide"]
        must(bitmap["x-tidemark-generation"] == self.generation,
             f"'tide' is {bitmap}, not of generation {self.generation}")
        self.end_target(pending["name"])

    def rebase(self, pending):
        """The base of `tide` is the instant of the backup PENDING."""
        self.dirty, self.base = set(), (pending["sent"], pending["answered"])

    def resolve_tide(self, bitmaps):
        """Has the backup whose end we did not see advanced the bitmap?"""
        must("tide" in bitmaps, f"'tide' is gone: {sorted(bitmaps)}")
        bitmap, pending = bitmaps["tide"], self.pending
        must(bitmap["recording"] and not bitmap["busy"] and not bitmap.get("inconsistent"),
             f"'tide' is back as {bitmap}")
        generation, job = bitmap["x-tidemark-generation"], bitmap.get("x-tidemark-last-job")
        self.pending = None
        if self.closed and self.fmt == "qcow2":
            # The image has no place for it: another one each time, and only the events tell.
            must(generation > self.generation and not job, f"{bitmap} after a clean close")
            self.generation = generation
            pending = pending and {**pending, "generation": generation - (pending["kind"] == "full")}
            if pending and self.was_completed(pending["name"]):
                pending["generation"], job = generation - 1, pending["name"]
        if not pending:
            must(generation == self.generation,
                 f"'tide' is of generation {generation}, was seen at {self.generation}")
        elif pending["kind"] == "full":
            if generation != pending["generation"]:
                self.chain = []      # cleared, and the base's target is not complete
                self.rebase(pending)
                self.found.dropped += 1
        elif job == pending["name"]:
            must(generation == pending["generation"] + 1,
                 f"generation {generation} after {pending}")
            self.chain.append(pending["name"])
            self.rebase(pending)
            self.found.kept += 1
        else:
            must(generation == pending["generation"], f"{bitmap} after {pending}")
            self.found.dropped += 1
        self.generation = generation

    def was_completed(self, job):
        return any(e["event"] == "BLOCK_JOB_COMPLETED" and e["data"]["device"] == job and
                   "error" not in e["data"] for e in self.last_events)

    # -- client two: `mark-N`

    def begin_mark(self, finish=True):
        """A backup since marks[0], and a new mark of its instant."""
        rng, mark, target = self.rng, self.name("mark-"), self.name("point")
        disable = bool(self.marks) and rng.random() < 0.5
        self.make_target(target, self.mark_chain[-1] if self.mark_chain else None)
        node = {"node": "disk"}
        actions = [("block-dirty-bitmap-add", {**node, "name": mark, "persistent": True,
                                               "granularity": GRANULE})]
        if disable:
            actions.append(("block-dirty-bitmap-disable", {**node, "name": self.marks[-1]}))
        job = {"device": "disk", "target": target, "job-id": target, "sync": "full"}
        if self.marks:
            actions += [("block-dirty-bitmap-add", {**node, "name": "since", "disabled": True,
                                                    "granularity": GRANULE}),
                        ("block-dirty-bitmap-merge", {**node, "target": "since",
                                                      "bitmaps": list(self.marks)})]
            job.update(sync="incremental", bitmap="since", speed=0 if finish else self.speed())
        self.mark_pending = {"kind": "backup", "mark": mark, "disable": disable, "target": target,
                             "prev": self.marks[-1] if self.marks else None}
        self.qmp.transaction(*actions, ("blockdev-backup", job))
        if finish:
            self.finish_mark()

    def finish_mark(self):
        pending, old = self.mark_pending, self.marks
        self.wait_backup(pending["target"])
        self.mark_chain.append(pending["target"])
        self.marks = [pending["mark"]]
        self.mark_pending = {"kind": "forget", "marks": old}
        self.end_target(pending["target"])
        if old:
            self.qmp.transaction(*[("block-dirty-bitmap-remove", {"node": "disk", "name": name})
                                   for name in [*old, "since"]])
        self.mark_pending = None

    def begin_unmark(self):
        """The newest mark is given up: what it recorded goes to the one before."""
        mark, into = self.marks[-1], self.marks[-2]
        recording = self.bitmaps()[into]["recording"]
        node = {"node": "disk"}
        self.mark_pending = {"kind": "unmark", "mark": mark, "into": into, "was": recording}
        actions = [] if recording else [("block-dirty-bitmap-enable", {**node, "name": into})]
        self.qmp.transaction(
            *actions, ("block-dirty-bitmap-merge", {**node, "target": into, "bitmaps": [mark]}),
            ("block-dirty-bitmap-remove", {**node, "name": mark}))
        self.marks.pop()
        self.mark_pending = None

    def resolve_marks(self, bitmaps):
        pending, self.mark_pending = self.mark_pending, None
        if pending and pending["kind"] == "backup":
            self.resolve_mark_backup(bitmaps, pending)
        elif pending and pending["kind"] == "forget":
            gone = [name for name in pending["marks"] if name not in bitmaps]
            must(not gone or len(gone) == len(pending["marks"]), f"of {pending} only {gone} are gone")
            for name in pending["marks"]:
                if name in bitmaps:
                    self.execute("block-dirty-bitmap-remove", node="disk", name=name)
        elif pending:
            there = pending["mark"] in bitmaps
            must(bitmaps[pending["into"]]["recording"] == (pending["was"] if there else True),
                 f"{pending} was done in part: {bitmaps}")
            if not there:
                self.marks.pop()
        bitmaps = self.bitmaps()
        for name in self.marks:
            must(name in bitmaps, f"'{name}' is gone: {sorted(bitmaps)}")
            must(not bitmaps[name].get("inconsistent"), f"'{name}' is inconsistent")
        if self.marks:
            must(bitmaps[self.marks[-1]]["recording"], f"'{self.marks[-1]}' does not record")

    def resolve_mark_backup(self, bitmaps, pending):
        """Its target is dropped, whatever it has: nothing tells whether it is complete."""
        mark, prev = pending["mark"], pending["prev"]
        there = mark in bitmaps and not bitmaps[mark].get("inconsistent")
        self.found.dropped += 1
        if prev:
            must(bitmaps[prev]["recording"] == (not pending["disable"] if there else True),
                 f"{pending} was done in part: {bitmaps}")
        if mark in bitmaps and (not there or not prev):
            self.execute("block-dirty-bitmap-remove", node="disk", name=mark)
        elif there:
            self.marks.append(mark)

    # -- after a crash

    def check_recovery(self):
        node = self.node()
        info = node.get("x-tidemark-recovery")
        must(info, f"no x-tidemark-recovery: {node}")
        state, added = info["state"], info["bytes-added"]
        if self.device and state != "clean":
            must(info["witness"] == "none", f"after a crash a device has no witness: {info}")
        self.say(f"recovery: {info}")
        self.end = self.how_it_ended(state)
        self.found.lives[self.end] += 1
        self.found.most_added = max(self.found.most_added, added)
        must(state in self.possible, f"recovery says {info}, not {sorted(self.possible)}")
        self.disbelieved |= state == "none"
        must(bool(info.get("reason")) == (state not in ("clean", "new")), f"recovery says {info}")
        if state == "superset":
            n = sum(b["recording"] for b in node.get("dirty-bitmaps", []))
            must(added <= n * REGION * len(self.regions),
                 f"{added} bytes added to {n} bitmaps; written to: {len(self.regions)} regions")
        else:
            must(added == 0, f"recovery says {info}")
        self.checked(state)
        for cut in self.cuts:
            self.found.cuts[cut if state in ("exact", "superset", "none") else "nothing"] += 1

    def how_it_ended(self, state):
        if self.closed:
            return "closed"
        if self.foreign:
            return "foreign"
        if self.place.power:
            return "power"
        if self.lost:
            return "lost"
        return "slow" if state == "none" else "killed"

    def checked(self, name):
        self.found.checks[self.end][name] += 1

    def look_at_disk(self):
        """QEMU finds nothing wrong with the disk, which is closed."""
        if self.fmt != "qcow2":
            return False
        leaks = self.check_images(["disk"])
        if "clean" in self.possible:
            # What a crash has leaked stays; a clean close leaks nothing.
            must(leaks <= self.disk_leaks, f"{leaks} leaked clusters; {self.disk_leaks} before")
        self.disk_leaks = leaks
        return True

    def look_at_closed(self):
        """After a clean close the image is QEMU's, alone."""
        if self.fmt != "qcow2":
            return
        must(not self.place.has("disk.tide"), "a tide file after a clean close")
        with self.place.look("disk") as file:
            done = run_tool("qemu-img", "info", "-U", "--output=json",
                            "json:" + json.dumps({"driver": "qcow2", "file": file}))
        info = json.loads(done.stdout)["format-specific"]["data"]
        for bitmap in info.get("bitmaps", []):
            must("in-use" not in bitmap["flags"], f"in use after a clean close: {bitmap}")
        names = {bitmap["name"] for bitmap in info.get("bitmaps", [])}
        must({"tide", *self.marks} <= names, f"QEMU sees only the bitmaps {sorted(names)}")

    def observe(self):
        """The granules of `tide`, by the extents that an NBD client is told."""
        self.execute("block-export-add", type="nbd", id="look", node_name="disk", name="look",
                     writable=True, bitmaps=["tide"])
        handle = connect(self.place.uri("look"), ["qemu:dirty-bitmap:tide"])
        found = set()
        for at, length, flags in extents(handle, "qemu:dirty-bitmap:tide"):
            if flags & 1:
                must(at % GRANULE == 0, f"an extent at {at}")
                found.update(granules(at, length))
        handle.shutdown()
        self.execute("block-export-del", id="look", mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", self.place.patience, id="look")
        return found

    def check_extents(self):
        """What clients wrote since the base, and nothing else; after a loss of power, with it
        whole regions that they wrote to."""
        found = self.observe()
        surely, most = self.load.changed_since(*self.base)
        missed = (self.dirty | surely) - found
        must(not missed, f"written since the base of 'tide', and not dirty: granules {sorted(missed)}")
        if self.lost:
            most = most | {g for r in self.regions for g in granules(r * REGION, REGION)}
        added = found - self.dirty - most
        must(not added, f"nobody has written to the dirty granules {sorted(added)}")
        self.dirty, self.base = found, (0.0, 0.0)
        self.checked("extents")

    def come_back(self):
        self.place.boot()
        clean = self.look_at_disk()
        if self.possible == {"clean"}:    # and nobody has opened it since
            self.look_at_closed()
        self.open()
        self.check_recovery()
        if clean:
            self.checked("image")
        bitmaps = self.bitmaps()
        must(not any(b["busy"] for b in bitmaps.values()), f"busy: {bitmaps}")
        if "x" in bitmaps:
            self.execute("block-dirty-bitmap-remove", node="disk", name="x")
        check_content(self.place.uri("disk"), self.known)
        self.checked("content")
        if self.disbelieved or (self.doubtful and bitmaps.get("tide", {}).get("inconsistent")):
            self.begin_anew(bitmaps)
            return
        self.resolve_tide(bitmaps)
        self.resolve_marks(bitmaps)
        self.check_extents()

    def remember(self):
        """What clients know of the disk's content after this life."""
        for block in self.load.touched():
            self.known.pop(block, None)
        after_flush = (self.place.power or self.fmt == "qcow2") and not self.closed
        self.known.update(self.load.answered(after_flush))

    def forget(self, at, length):
        """Somebody else has written there."""
        for block in range(at // BLOCK, (at + length) // BLOCK):
            self.known.pop(block, None)

    # -- other programs

    def read_by_qemu(self):
        """Which is no reason to believe less."""
        for argv in self.rng.sample((["check"], ["info"], ["map"]), self.rng.randint(0, 3)):
            if argv != ["check"] or self.fmt == "qcow2":
                run_tool("qemu-img", *argv, "-f", self.fmt, self.device or self.place.path("disk"),
                         check=False)

    def foreign_writer(self):
        """QEMU has the crashed image open for writing, and mostly writes."""
        path, at = self.place.path("disk"), self.rng.randrange(self.size // GRANULE) * GRANULE
        wait_for_locks(path)
        kind = self.rng.choice(("qemu-io", "qemu-io", "qsd", "qsd", "open"))
        if self.fmt != "qcow2":
            # Its file has only times to tell of it: not within the slack for requests in flight.
            kind = self.rng.choice(("dd", "dd", "dd", "dd", "qemu-io", "qsd"))
            time.sleep(2)
        self.say(f"foreign writer: {kind} at {at}")
        if kind == "qsd":
            sock = self.place.path("foreign.sock")
            with Daemon("--blockdev", json.dumps({"driver": self.fmt, "node-name": "d", "file": {
                            "driver": "file", "filename": path}}),
                        "--nbd-server", f"addr.type=unix,addr.path={sock}",
                        "--export", "type=nbd,id=d,node-name=d,name=d,writable=on",
                        binary=QSD, directory=self.place.tmp) as daemon:
                handle = connect(nbd_uri(sock, "d"))
                handle.pwrite(b"F" * GRANULE, at)
                handle.flush()
                handle.shutdown()
                if self.rng.random() < 0.5:
                    daemon.kill()
        elif kind == "dd":
            run_tool("dd", "if=/dev/urandom", f"of={path}", f"bs={GRANULE}", "count=1",
                     f"seek={at // GRANULE}", "conv=notrunc", "status=none")
        else:
            command = f"write -P 70 {at} {GRANULE}" if kind == "qemu-io" else f"read {at} {GRANULE}"
            run_tool("qemu-io", "-f", self.fmt, "-c", command, path)
        if kind != "open":
            self.forget(at, GRANULE)
        self.foreign = BY_DD if kind == "dd" else BY_QEMU
        self.found.foreign[self.foreign] += 1
        self.disbelieved = True
        self.possible = {"none"}

    def begin_anew(self, bitmaps):
        """Nothing is believed; the bitmap of the chain is made anew, the marks begin again."""
        for name, bitmap in bitmaps.items():
            must(bitmap.get("inconsistent") or name == "x",
                 f"'{name}' is believed after a foreign writer: {bitmap}")
        # Killed once more before the image could name the file that says so: of what only such files
        # have had, nobody knows the names.
        must("tide" in bitmaps or (self.fmt == "qcow2" and self.cuts),
             f"'tide' is gone: {sorted(bitmaps)}")
        if self.foreign:
            self.found.noticed[self.foreign] += 1
        if "tide" not in bitmaps:
            self.execute("block-dirty-bitmap-add", node="disk", name="tide", persistent=True,
                         granularity=GRANULE)
            self.found.gone += 1
        for name in bitmaps:
            if name.startswith("mark-"):
                self.execute("block-dirty-bitmap-remove", node="disk", name=name)
        if self.pending and self.pending["kind"] == "full":
            self.chain = []          # was it cleared? nobody knows
        self.marks, self.mark_chain = [], []
        self.pending = self.mark_pending = None
        node = {"node": "disk", "name": "tide"}
        try:
            self.execute("block-dirty-bitmap-clear", **node)
            must("tide" not in bitmaps, "an inconsistent bitmap was cleared")
        except QMPError as error:
            must("inconsistent" in str(error), f"clearing an inconsistent bitmap: {error}")
        if not self.chain:
            self.execute("block-dirty-bitmap-remove", **node)
            self.generation = None
            self.begin_chain()
            return
        self.execute("blockdev-add", driver="qcow2", node_name="last", read_only=True,
                     file={"driver": "file", "filename": self.place.path(self.chain[-1])})
        compare = ("x-tidemark-compare", {"job-id": "anew", "device": "disk", "target": "last",
                                          "bitmap": "tide"})
        if self.rng.random() < 0.5:
            self.execute("block-dirty-bitmap-remove", **node)
            self.qmp.transaction(("block-dirty-bitmap-add", {**node, "persistent": True,
                                                             "granularity": GRANULE}), compare)
        else:
            self.execute(compare[0], **compare[1])
        self.wait_backup("anew")
        self.execute("blockdev-del", node_name="last")
        bitmap = self.bitmaps()["tide"]
        must(bitmap["recording"] and not bitmap["busy"] and not bitmap.get("inconsistent"),
             f"'tide' is made anew as {bitmap}")
        self.generation = bitmap["x-tidemark-generation"]
        self.dirty, self.base = self.observe(), (0.0, 0.0)
        self.found.rebuilt += 1
        self.checked("anew")

    def compare(self, chain):
        """qemu-img finds the disk and CHAIN equal."""
        with self.place.restored(chain) as image:
            done = run_tool("qemu-img", "compare", "-U", image, self.place.uri("disk"), check=False,
                            timeout=300)
        must(done.returncode == 0, f"chain {chain} against the disk: {done.stdout.decode()}"
             f"{done.stderr.decode()}")

    def verify(self):
        """One more backup onto each chain, nobody writing: the chains equal the disk."""
        chains = ["tide" if self.chain else "full", "marks" if self.marks else "point"]
        if not self.chain:
            self.begin_chain()
        else:
            self.begin_increment()
        self.compare(self.chain)
        self.begin_mark()
        self.compare(self.mark_chain)
        self.check_images(self.chain[-1:] + self.mark_chain[-1:])
        for name in chains:
            self.checked(name)
        if chains != ["full", "point"]:
            self.checked("increment")

    def check_images(self, names):
        """How many clusters are leaked; more is a violation."""
        leaks = 0
        for name in names:
            with self.place.look(name) as file:
                image = {"driver": "qcow2", "file": file, "backing": None}
                done = run_tool("qemu-img", "check", "-U", "--output=json",
                                "json:" + json.dumps(image), check=False)
            must(done.returncode in (0, 3), f"qemu-img check {name}: {done.stdout.decode()}"
                 f"{done.stderr.decode()}")
            leaks += json.loads(done.stdout).get("leaks", 0)
        self.found.leaks += leaks
        return leaks

    # -- a life

    def operation(self):
        """Something under way when the end comes; or seen to its end before."""
        choices = ["nothing", "increment", "increment", "mark", "mark"]
        if self.chain and self.rng.random() < 0.3:
            choices.append("full")
        if len(self.marks) > 1:
            choices += ["unmark", "unmark"]
        kind = self.rng.choice(choices)
        self.say(f"under way: {kind}")
        finish = self.rng.random() < 0.25
        if kind == "increment" and self.chain:
            self.begin_increment(finish)
        elif kind == "mark":
            self.begin_mark(finish)
        elif kind == "full":
            self.begin_chain(finish)
        elif kind == "unmark":
            self.begin_unmark()

    def crash_during(self, call, most, lose):
        """The end comes at a random moment of CALL, or after it. LOSE: what is on tmpfs is lost."""
        delay = self.rng.random() ** 2 * most
        timer = threading.Timer(delay, self.place.cut)
        timer.start()
        with contextlib.suppress(*GONE):
            call()
        timer.join()
        self.place.after_cut(lose)
        self.say(f"crash after {delay * 1000:.0f} ms{', segments lost' if lose else ''}")

    def lose(self):
        """The run segments are gone: what recovery may say from now on."""
        self.lost = True
        if self.level == "power":
            self.possible = (self.possible & {"clean", "none"}) | {"superset"}
        else:
            self.possible = (self.possible & {"clean"}) | {"none"}
            self.doubtful = True

    def live(self, end=None, recovery_kills=None):
        """A life that ends so (one of ENDS; by chance), and what follows it until the disk is open."""
        if not end:
            end = self.rng.choices(("killed", "lost", "closed"), (7, 2, 1))[0]
        windows = self.windows()
        flushes = self.rng.choice((0, 0.003, 0.1))      # of all requests
        self.load = Load(self.place.uri("disk"), self.rng.random(), windows, flushes)
        self.load.wait_written(self.rng.randint(1, 60), self.place.patience * 3)
        self.regions = {start // REGION for start, size in windows}   # of this session
        self.lost = self.disbelieved = self.doubtful = self.closed = False
        self.end, self.foreign, self.cuts = None, None, []
        if end == "closed":
            self.operation()
            self.place.stop()
            self.possible, self.closed = {"clean"}, True
            self.last_events = list(self.qmp.events)
        else:
            # Segments are lost by the kill, or by one of those that follow.
            lose = self.place.power or (end == "lost" and self.rng.random() < 0.6)
            self.crash_during(self.operation, 1.5 if self.place.power else 0.4, lose)
            self.possible = {"exact"}
            if lose:
                self.lose()
                self.disbelieved = self.level == "process"
            if self.place.slow and not self.device:
                self.possible.add("none")
                self.doubtful = True
        self.load.end()
        self.remember()
        if not self.place.power and not self.closed:
            self.read_by_qemu()
            # A raw file has only its times, which need our stamp; it was on tmpfs.
            told = self.fmt == "qcow2" or not (self.lost or self.device)
            if told and self.rng.random() < self.share_foreign:
                self.foreign_writer()
        share = 0.25 if self.place.power else 0.4     # (a machine takes long to boot)
        while self.rng.random() < share if recovery_kills is None else recovery_kills > 0:
            self.kill_in_recovery(self.place.power or (end != "killed" and self.rng.random() < 0.5))
            recovery_kills = recovery_kills and recovery_kills - 1
        self.come_back()

    def kill_in_recovery(self, lose):
        """Once more while the disk is opened, or while what was found is written anew."""
        if self.foreign and self.fmt != "qcow2":
            lose = False    # as for a foreign writer: `witness: none`
        self.recovery_kills += 1
        self.place.boot()
        node = {"node": "disk", "name": "x"}
        opened, _ = self.send_open()
        changes = [self.qmp.send("block-dirty-bitmap-add", {**node, "persistent": True}),
                   self.qmp.send("block-dirty-bitmap-remove", node)]
        begun = self.cut_opening()
        self.place.after_cut(lose)
        cut = self.where_cut(begun, opened, changes)
        self.cuts.append(cut)
        self.say(f"killed {CUTS[cut]}{', segments lost' if lose else ''}")
        self.window *= 0.8 if cut == "late" else 1.3 if cut == "asked" else 1.1
        if lose:
            self.lose()
        if not lose or self.disbelieved or "none" in self.possible:
            # (If it was kept before the kill that no bitmap is believed, none has a set that a
            # segment would have to hold: what the last program knew is known exactly.)
            self.possible = self.possible | {"exact"}

    def cut_opening(self):
        """The end, mostly within the recovery. Had it begun? None: nobody knows."""
        if self.place.power:
            time.sleep(self.rng.random() * self.window)
            self.place.cut()
            return None
        if self.rng.random() < 0.2:
            time.sleep(self.rng.random() ** 2 * 0.03)
        else:
            until = time.monotonic() + 1
            while not self.place.recovering() and time.monotonic() < until:
                pass
            time.sleep(self.rng.random() * self.window)
        begun = self.place.recovering()
        self.place.cut()
        return begun

    def where_cut(self, begun, opened, changes):
        """Of CUTS; by what the daemon that is no more has answered, and what it has logged."""
        answers = [self.qmp.poll_answer(ident) for ident in changes]
        if any(answer and "return" in answer for answer in answers):
            return "late"
        if re.search(r"'disk': \d+ bitmap\(s\) (recovered|are inconsistent)", self.place.said()):
            return "kept"
        if self.qmp.poll_answer(opened):
            return "nothing"
        return "asked" if begun is None else "verdict" if begun else "early"

    def check_leftovers(self):
        """A session that was cut before the tide file named it leaves its segments on tmpfs for
        good; only kills inside recovery do that."""
        left = self.place.leftovers()
        self.found.orphans += len(left)
        must(not left or self.recovery_kills, f"left on tmpfs: {left}")

    def start(self):
        self.place.boot()
        self.make_disk()
        self.open()
        self.begin_chain()
        self.begin_mark()

    def run(self, lives, enough=lambda: False, **life):
        """So many LIVES, or until it is ENOUGH; each is a live(**LIFE)."""
        self.start()
        for number in range(lives):
            self.say(f"--- life {number}")
            self.live(**life)
            self.verify()
            if enough():
                break
        self.place.stop()
        self.place.boot()
        self.possible = {"clean"}
        self.look_at_disk()
        self.look_at_closed()
        self.place.stop()
        self.check_leftovers()
