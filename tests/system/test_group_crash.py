"""Two disks whose backups end together, and tidemarkd killed at any moment of that.

A backup program keeps one copy of each disk and brings both up to date with grouped incremental
backups. After each kill the bitmaps of both are of the same generation, by the same group's jobs;
a disk that is opened before the one that knows says so, and has its answer when that is opened; and,
with the clients at rest, one more grouped backup makes both copies equal to their disks.
"""
import contextlib
import os
import random
import threading

import pytest
from tidemark_testlib.crash import GONE, KiB, MiB, HostPlace, Load, must
from tidemark_testlib.images import run_tool

SIZE = 64 * MiB
DISKS = ("disk0", "disk1")
SEED = int(os.environ.get("TIDEMARK_SEED", "1"))
ROUNDS = 100 if os.environ.get("TIDEMARK_SOAK") else 8


@pytest.fixture
def place(tmp, tidemarkd):
    place = HostPlace(tmp, tidemarkd)
    yield place
    place.close()


class Pair:
    def __init__(self, place, seed, driver):
        self.place, self.rng, self.driver = place, random.Random(f"pair-{seed}"), driver
        self.count, self.generation = 0, None
        self.doubts = self.moved = self.lost = 0
        self.about = 0.02        # after which a group that is pending has ended as likely as not
        self.jobs = None         # of the group whose end was not seen

    @property
    def qmp(self):
        return self.place.qmp

    def file(self, name):
        return {"driver": "file", "filename": self.place.path(name)}

    def create(self, name, driver="raw"):
        run_tool("qemu-img", "create", "-q", "-f", driver, self.place.path(name), str(SIZE))

    def open(self, name):
        self.qmp.execute("blockdev-add", driver=self.driver, node_name=name, discard="unmap",
                         file=self.file(name))
        self.qmp.execute("block-export-add", type="nbd", id=name, node_name=name, name=name,
                         writable=True)

    def node(self, name):
        return next(n for n in self.qmp.execute("query-named-block-nodes", flat=True)
                    if n["node-name"] == name)

    def bitmap(self, name):
        found = [b for b in self.node(name).get("dirty-bitmaps", []) if b.get("name") == "b"]
        must(found, f"{name} has lost its bitmap")
        return found[0]

    def backup(self, actions=(), **job):
        """Both disks at one instant; the jobs' names."""
        self.count += 1
        names = [f"job{self.count}-{disk}" for disk in DISKS]
        for disk in DISKS:
            self.qmp.execute("blockdev-add", driver="raw", node_name=f"copy-{disk}",
                             x_tidemark_persist={"level": "off"}, file=self.file(f"copy-{disk}"))
        backups = [("blockdev-backup", {"device": disk, "target": f"copy-{disk}", "job-id": name, **job})
                   for disk, name in zip(DISKS, names)]
        self.rng.shuffle(backups)    # any disk may be the first of the group
        self.jobs = names if "bitmap" in job else None
        if actions:
            self.qmp.transaction(*actions, *backups)
        else:
            self.qmp.transaction(*backups, completion_mode="grouped")
        return names

    def finish(self, names):
        for name in names:
            data = self.qmp.wait_event("BLOCK_JOB_COMPLETED", 90, device=name)["data"]
            must("error" not in data, f"{name}: {data}")
            self.qmp.wait_job(name, "null", 30)
        for disk in DISKS:
            self.qmp.execute("blockdev-del", node_name=f"copy-{disk}")

    def increment(self):
        mode = self.rng.choice(("on-success", "always"))
        return self.backup(**{"sync": "bitmap", "bitmap": "b", "bitmap-mode": mode})

    def start(self):
        self.place.boot()
        for disk in DISKS:
            self.create(disk, self.driver)
            self.create(f"copy-{disk}")
            self.open(disk)
        adds = [("block-dirty-bitmap-add", {"node": disk, "name": "b", "persistent": True,
                                            "granularity": 64 * KiB}) for disk in DISKS]
        self.finish(self.backup(adds, sync="full"))
        self.generation = self.bitmap("disk0")["x-tidemark-generation"]

    def live(self):
        """Guests write to both, a group of backups runs, and the end comes."""
        windows = [(self.rng.randrange(0, 50) * MiB, 4 * MiB) for _ in range(2)]
        loads = [Load(self.place.uri(disk), self.rng.random(), windows, 0.01) for disk in DISKS]
        for load in loads:
            load.wait_written(self.rng.randint(1, 40))
        names = self.increment()
        self.at_end = False
        if self.rng.random() < 0.8:       # about when the group ends
            with contextlib.suppress(*GONE):
                self.qmp.wait_job(names[0], "pending", 60)
            delay = self.about * (0.8 + 0.4 * self.rng.random())
            self.at_end = True
        else:
            delay = self.rng.random() * 0.3
        timer = threading.Timer(delay, self.place.cut)
        timer.start()
        with contextlib.suppress(*GONE):
            self.finish(names)
        timer.join()
        self.place.after_cut(self.rng.random() < 0.3)
        for load in loads:
            load.end()

    def check_doubt(self, disk, other):
        """What is said of DISK while OTHER's tide file is not there. True: it is in doubt."""
        doubt = self.node(disk).get("x-tidemark-recovery", {}).get("in-doubt")
        busy = self.bitmap(disk)["busy"]
        must(busy == bool(doubt), f"{disk}: busy {busy}, and in doubt {doubt}")
        if doubt:
            must(doubt["coordinator"] == self.place.path(f"{other}.tide") and len(doubt["group"]) == 32,
                 f"{disk}: {doubt}")
        return bool(doubt)

    def come_back(self):
        first, second = self.rng.sample(DISKS, 2)
        tide = self.place.path(f"{second}.tide")
        away = self.rng.random() < 0.5
        self.place.boot()
        if away:
            os.rename(tide, tide + ".away")
        self.open(first)
        if away:
            self.doubts += self.check_doubt(first, second)
            if self.rng.random() < 0.5:      # and once more
                self.place.cut()
                self.place.after_cut(False)
                self.place.boot()
                self.open(first)
                self.check_doubt(first, second)
            os.rename(tide + ".away", tide)
        self.open(second)
        found = [self.bitmap(disk) for disk in DISKS]
        for disk, bitmap in zip(DISKS, found):
            must(bitmap["recording"] and not bitmap["busy"] and not bitmap.get("inconsistent"),
                 f"the bitmap of {disk} is back as {bitmap}")
        one, two = (bitmap["x-tidemark-generation"] for bitmap in found)
        must(one == two, f"half a group: {found}")
        must(one in (self.generation, self.generation + 1), f"was {self.generation}: {found}")
        jobs = [bitmap.get("x-tidemark-last-job") for bitmap in found]
        if one == self.generation:
            must(jobs != self.jobs, f"not advanced, and {jobs}")
            self.lost += 1
        else:
            must(jobs == self.jobs, f"advanced by {jobs}, not {self.jobs}")
            self.moved += 1
        if self.at_end:
            self.about *= 1.25 if one == self.generation else 0.8
        self.generation = one

    def verify(self):
        self.finish(self.increment())
        self.generation += 1
        for disk in DISKS:
            run_tool("qemu-img", "compare", "-U", "-f", "raw", "-F", "raw",
                     self.place.uri(disk), self.place.path(f"copy-{disk}"))


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_a_group_ends_wholly_or_not_at_all(place, driver):
    print(f"seed {SEED}")
    pair = Pair(place, SEED, driver)
    pair.start()
    for number in range(ROUNDS):
        print("round", number)
        pair.live()
        if place.slow:      # a write may have come long after the last beat: nothing is believed then
            print("the end was slow")
            break
        pair.come_back()
        if number % 2:
            pair.verify()
    else:
        pair.verify()
        place.stop()
    print(f"{pair.moved} groups had ended, {pair.lost} had not; {pair.doubts} times in doubt")
