"""Backups through the monitor against a model of the disk: random histories of writes, backups in
each mode, cancels, pauses, failures, restarts; and two backups of one node that end together."""

import os
import random
import threading

from tidemark_testlib import (
    Daemon, QMPError, check_image, compare, connect, create_image, nbd_uri, qemu_img, wait_until,
)

MiB = 1 << 20
SIZE = 6 * MiB + 3 * 512
SEED = int(os.environ.get("TEST_SEED", "20261120"))


class World:
    """A disk behind NBD, and what it must hold."""

    def __init__(self, directory, seed):
        self.dir = directory
        self.rng = random.Random(seed)
        self.content = bytearray(SIZE)
        self.image = create_image(directory / "disk.qcow2", size=SIZE)
        self.sock = directory / "nbd.sock"
        self.serial = 0
        self.chain = None       # the newest consistent increment
        self.start()

    def start(self):
        self.daemon = Daemon(
            "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={self.image}",
            "--nbd-server", f"addr.type=unix,addr.path={self.sock}",
            "--export", "nbd,id=e,node-name=disk,name=disk,writable=on", directory=self.dir)
        self.qmp = self.daemon.qmp
        self.nbd = connect(nbd_uri(self.sock, "disk"))

    def stop(self, how="term"):
        self.nbd.shutdown()
        self.daemon.stop(how)

    def write(self, times=None):
        for _ in range(times or self.rng.randint(1, 5)):
            offset = self.rng.randrange(SIZE)
            length = min(SIZE - offset, 1 + self.rng.randrange(1 << self.rng.randint(1, 18)))
            if self.rng.random() < 0.2:
                self.nbd.zero(length, offset)
                data = bytes(length)
            else:
                data = self.rng.randbytes(length)
                self.nbd.pwrite(data, offset)
            self.content[offset:offset + length] = data

    def target(self, backing=None):
        self.serial += 1
        node = f"t{self.serial}"
        path = self.dir / f"{node}.qcow2"
        create_image(path, size=SIZE, cluster_size=self.rng.choice(["4k", "64k", "1M"]),
                     **({"backing_file": backing, "backing_fmt": "qcow2"} if backing else {}))
        self.open_target(node, path)
        return node, path

    def open_target(self, node, path):
        self.qmp.execute("blockdev-add", driver="qcow2", node_name=node, backing=None,
                         file={"driver": "file", "filename": str(path)})

    def close_target(self, node):
        self.qmp.execute("blockdev-del", node_name=node)

    def begin(self, node, **arguments):
        """Starts a backup; what the disk holds at its instant."""
        instant = bytes(self.content)
        self.qmp.events.clear()  # of an earlier job of this name
        self.qmp.execute("blockdev-backup", job_id="j", device="disk", target=node,
                         auto_dismiss=False, **arguments)
        return instant

    def conclude(self):
        """Lets the job end; its error or None."""
        self.qmp.wait_job("j", "concluded")
        error = self.qmp.job("j").get("error")
        self.qmp.execute("job-dismiss", id="j")
        return error

    def verb(self, command, **arguments):
        """On job j, which may have ended."""
        try:
            self.qmp.execute(command, **arguments)
        except QMPError as error:
            assert "in state '" in error.desc or "was not paused" in error.desc, error

    def annoy(self):
        """What a client may do to a slow job, and guests meanwhile."""
        for _ in range(self.rng.randint(0, 3)):
            self.write(1)
            what = self.rng.randrange(4)
            if what == 0:
                self.verb("job-pause", id="j")
                self.write(1)
                self.verb("job-resume", id="j")
            elif what == 1:
                self.verb("block-job-set-speed", device="j", speed=self.rng.choice([1, MiB]))
            elif what == 2:
                self.qmp.execute("query-block-jobs")
        self.write(1)

    def cancel(self):
        """True when it was in time."""
        self.verb("job-cancel", id="j")
        return self.conclude() is not None

    def check(self, path, instant):
        raw = f"{path}.raw"
        qemu_img("convert", "-U", "-O", "raw", path, raw)
        with open(raw, "rb") as file:
            found = file.read()
        os.unlink(raw)
        assert len(found) == len(instant)
        assert found == instant, next(i for i in range(SIZE) if found[i] != instant[i])

    def finish(self, node, path, instant):
        self.verb("block-job-set-speed", device="j", speed=0)
        error = self.conclude()
        assert error is None, error
        self.close_target(node)
        self.check(path, instant)

    # -- steps of a history

    def full(self):
        """Begins a chain: clear and backup in one transaction."""
        node, path = self.target()
        instant = bytes(self.content)
        kind = "clear" if self.qmp.bitmaps("disk").get("b") else "add"
        more = {"persistent": True} if kind == "add" else {}
        self.qmp.events.clear()
        self.qmp.transaction(
            (f"block-dirty-bitmap-{kind}", {"node": "disk", "name": "b", **more}),
            ("blockdev-backup", {"job-id": "j", "device": "disk", "target": node, "sync": "full",
                                 "auto-dismiss": False, "speed": 1}))
        self.annoy()
        self.finish(node, path, instant)
        self.chain = path

    def increment(self):
        node, path = self.target(self.chain)
        instant = self.begin(node, sync="incremental", bitmap="b", speed=1)
        self.annoy()
        self.finish(node, path, instant)
        self.chain = path

    def cancelled(self):
        """Nothing is lost: the next increment holds all."""
        node, path = self.target(self.chain)
        mode = self.rng.choice(["on-success", "never"])
        instant = self.begin(node, sync="bitmap", bitmap="b", bitmap_mode=mode, speed=1)
        self.annoy()
        in_time = self.cancel()
        self.close_target(node)
        if not in_time and mode == "on-success":
            self.check(path, instant)
            self.chain = path

    def differential(self):
        """never: a backup that leaves the bitmap as it was, and newer writes in it."""
        node, path = self.target(self.chain)
        instant = self.begin(node, sync="bitmap", bitmap="b", bitmap_mode="never", speed=1)
        self.annoy()
        self.finish(node, path, instant)

    def resumed(self):
        """always: cancelled in the middle, then completed onto the same target."""
        node, path = self.target(self.chain)
        self.begin(node, sync="bitmap", bitmap="b", bitmap_mode="always",
                   speed=self.rng.choice([1, 4 * MiB]))
        self.annoy()
        self.cancel()
        self.write()
        instant = self.begin(node, sync="bitmap", bitmap="b", bitmap_mode="always", speed=1)
        self.annoy()
        self.finish(node, path, instant)
        self.chain = path

    def beside(self):
        """Another full backup of the same node at the same time."""
        node, path = self.target(self.chain)
        instant = self.begin(node, sync="incremental", bitmap="b", speed=1)
        self.write()
        other, other_path = self.target()
        other_instant = bytes(self.content)
        self.qmp.execute("blockdev-backup", job_id="k", device="disk", target=other, sync="full",
                         speed=1)
        self.annoy()
        try:
            self.qmp.execute("block-job-set-speed", device="k", speed=0)
        except QMPError as error:
            assert "not found" in error.desc, error
        self.finish(node, path, instant)
        self.qmp.wait_job("k", "null")
        self.close_target(other)
        self.check(other_path, other_instant)
        self.chain = path

    def pending(self):
        """Finalized by hand, or cancelled while pending."""
        node, path = self.target(self.chain)
        instant = self.begin(node, sync="incremental", bitmap="b", auto_finalize=False)
        self.qmp.wait_job("j", "pending")
        self.write()
        if self.rng.random() < 0.5:
            self.qmp.execute("job-finalize", id="j")
            assert self.conclude() is None
            self.close_target(node)
            self.check(path, instant)
            self.chain = path
        else:
            self.qmp.execute("job-cancel", id="j")
            self.conclude()
            self.close_target(node)

    def refused(self):
        """A transaction that fails has changed nothing."""
        node, _ = self.target(self.chain)
        before = self.qmp.bitmaps("disk")
        try:
            self.qmp.transaction(
                ("block-dirty-bitmap-clear", {"node": "disk", "name": "b"}),
                ("blockdev-backup", {"job-id": "j", "device": "disk", "target": node,
                                     "sync": "incremental", "bitmap": "b"}),
                ("abort", {}))
            raise AssertionError("the transaction was not aborted")
        except QMPError as error:
            assert error.desc == "Transaction aborted using Abort action"
        assert self.qmp.bitmaps("disk") == before
        self.close_target(node)

    def restarted(self):
        """A clean end, also with a job under way, keeps the bitmap."""
        if self.rng.random() < 0.5:
            node, _ = self.target(self.chain)
            self.begin(node, sync="incremental", bitmap="b", speed=1)
            self.write()
        self.stop(self.rng.choice(["term", "quit"]))
        self.start()
        self.qmp.execute("query-named-block-nodes")

    def history(self, steps):
        kinds = [self.increment, self.cancelled, self.differential, self.resumed, self.beside,
                 self.pending, self.refused, self.restarted, self.full]
        self.write()
        self.full()
        for _ in range(steps):
            self.write()
            self.rng.choice(kinds)()
            nodes = {n["node-name"] for n in self.qmp.execute("query-named-block-nodes", flat=True)
                     if not n["node-name"].startswith("#")}
            assert nodes == {"disk"}, nodes
            assert list(self.qmp.bitmaps("disk")) == ["b"]
        self.increment()
        self.stop()
        assert check_image(self.image)["corruptions"] == 0


def test_histories_agree_with_a_model(tidemarkd, tmp):
    for seed in range(SEED, SEED + int(os.environ.get("TIDEMARK_HISTORIES", "3"))):
        directory = tmp / str(seed)
        directory.mkdir()
        try:
            World(directory, seed).history(14)
        except BaseException:
            print(f"TEST_SEED={seed}")
            raise
        for path in directory.iterdir():
            path.unlink()


def end_together(qmp, how):
    """Two backups of `disk`, which end at nearly the same time, or at the same."""
    jobs = [{"job-id": f"j{n}", "device": "disk", "target": f"t{n}",
             "sync": "none" if how == 1 else "full"} for n in range(2)]
    if how < 2:     # by themselves; cancelled
        for job in jobs:
            qmp.execute("blockdev-backup", **job)
        if how == 1:
            for n in range(2):
                qmp.send("job-cancel", {"id": f"j{n}"})
        return
    if how == 2:    # as a group
        qmp.transaction(*(("blockdev-backup", job) for job in jobs), completion_mode="grouped")
        return
    for job in jobs:    # by hand
        qmp.execute("blockdev-backup", auto_finalize=False, **job)
    for n in range(2):
        qmp.wait_job(f"j{n}", "pending")
    for n in range(2):
        qmp.send("job-finalize", {"id": f"j{n}"})


def test_two_backups_of_one_node_end_together(tidemarkd, tmp):
    """qemu-storage-daemon 7.2 aborts here within 20 rounds. Each time both end well (or both are
    cancelled); now and then, with the guest at rest, both targets must be the disk."""
    image = create_image(tmp / "disk.qcow2", size=4 * MiB)
    sock = tmp / "nbd.sock"
    targets = [create_image(tmp / f"t{n}.qcow2", size=4 * MiB) for n in range(2)]
    with Daemon("--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={image}",
                "--nbd-server", f"addr.type=unix,addr.path={sock}",
                "--export", "nbd,id=e,node-name=disk,name=disk,writable=on",
                directory=tmp) as d:
        stop, gate = threading.Event(), threading.Lock()
        errors = []
        writes = 0

        def guest():
            nonlocal writes
            rng = random.Random(1)
            h = connect(nbd_uri(sock, "disk"))
            try:
                while not stop.is_set():
                    with gate:
                        h.pwrite(rng.randbytes(4096), rng.randrange(1024) * 4096)
                    writes += 1
            except Exception as error:  # pylint: disable=broad-except
                errors.append(error)

        def one_round(how):
            """Two jobs, and how both have ended."""
            for n in range(2):
                d.qmp.execute("blockdev-add", driver="qcow2", node_name=f"t{n}",
                              file={"driver": "file", "filename": str(targets[n])})
            d.qmp.events.clear()
            end_together(d.qmp, how)
            for n in range(2):
                d.qmp.wait_job(f"j{n}", "null")
                d.qmp.execute("blockdev-del", node_name=f"t{n}")
            ends = sorted((e["data"]["device"], e["event"], e["data"].get("error"))
                          for e in d.qmp.events
                          if e["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"))
            name = "BLOCK_JOB_CANCELLED" if how == 1 else "BLOCK_JOB_COMPLETED"
            assert ends == [("j0", name, None), ("j1", name, None)], f"way {how}"

        reader = connect(nbd_uri(sock, "disk"))
        thread = threading.Thread(target=guest)
        thread.start()
        compared = set()
        try:
            for number in range(200):
                if number % 21:     # each way in its turn
                    one_round(number % 4)
                    if number % 4 == 2:     # a group has one instant
                        assert compare(*targets), f"round {number}"
                    continue
                with gate:
                    one_round(number % 4)
                    disk = reader.pread(4 * MiB, 0)
                if number % 4 != 1:
                    compared.add(number % 4)
                    for target in targets:
                        qemu_img("convert", "-f", "qcow2", "-O", "raw", target, tmp / "raw")
                        assert (tmp / "raw").read_bytes() == disk, f"round {number}: {target}"
            wait_until(lambda: writes > 200 or errors)
        finally:
            stop.set()
            thread.join()
        assert not errors and compared == {0, 2, 3}
        assert {n["node-name"] for n in d.qmp.execute("query-named-block-nodes", flat=True)
                if n["drv"] == "copy-before-write"} == set()


def test_a_group_is_given_up_before_it_starts(tidemarkd, tmp):
    """qemu-storage-daemon 7.2 waits here for ever."""
    for name in ("a", "b", "ta", "tb"):
        create_image(tmp / name, size=MiB)
    with Daemon(*(option for name in ("a", "b", "ta", "tb") for option in
                  ("--blockdev", f"qcow2,node-name={name},file.driver=file,file.filename={tmp / name}")),
                directory=tmp) as d:
        jobs = [("blockdev-backup", {"job-id": f"j{n}", "device": n, "target": f"t{n}",
                                     "sync": "full", "auto-dismiss": False}) for n in "ab"]
        new = tmp / "new.qcow2"
        drive = ("drive-backup", {"job-id": "d", "device": "a", "target": str(new), "sync": "full"})
        for last, text in ((("abort", {}), "Transaction aborted using Abort action"),
                           (drive, "Transaction aborted using Abort action"),
                           (("blockdev-backup", {**jobs[0][1], "job-id": "k", "device": "x"}),
                            "Cannot find device='x' nor node-name='x'")):
            actions = [*jobs, last] + ([("abort", {})] if last is drive else [])
            d.qmp.events.clear()
            try:
                d.qmp.transaction(*actions, completion_mode="grouped")
                raise AssertionError("the transaction was not given up")
            except QMPError as error:
                assert error.desc == text
            assert d.qmp.execute("query-jobs") == []
            for n in "ab":
                assert [e["data"]["status"] for e in d.qmp.events if e["data"].get("id") == f"j{n}"] \
                    == ["created", "aborting", "concluded", "null"]
            assert not new.exists()
        d.qmp.transaction(*jobs, completion_mode="grouped")     # nothing is left in its way
        for n in "ab":
            d.qmp.wait_job(f"j{n}")
