"""What backups accept, and how they end: all combinations in one run, bitmaps that are refused, disabled
ones, a target whose file system is full (a mirror's, too)."""

from ..table import disk, image, nbd_server, sequence, small_disk
from .backup import MODES, SYNCS, starts

SHA = "x-debug-block-dirty-bitmap-sha256"
DRIVE = {"format": "qcow2", "mode": "existing"}


def go(command, **more):
    target = {"target": "t"} if command == "blockdev-backup" else {"target": "$DIR/e.qcow2", **DRIVE}
    return {"job-id": "j", "device": "a", "sync": "full", **target, **more}


def _for_both_commands(name, *setup):
    """Registers the sequence twice: NAME(t, command) for blockdev-backup and for drive-backup."""
    def register(function):
        for command in ("blockdev-backup", "drive-backup"):
            def run(t, command=command):
                function(t, command)
            run.__name__ = f"{command.replace('-', '_')}_{name}"
            run.__doc__ = f"{command}: {function.__doc__}"
            sequence(*setup)(run)
    return register


@_for_both_commands("forty_combinations", disk("a", data="write -P 7 0 128k"), disk("t"), image("e"))
def _(t, command):
    """sync, bitmap and bitmap-mode in all combinations, one after the other; 28 are refused."""
    t("block-dirty-bitmap-add", node="a", name="b")
    for sync in SYNCS:
        for bitmap in (False, True):
            for mode in (None, *MODES):
                t(command, go(command, sync=sync, **{"auto-finalize": False}, **({"bitmap": "b"} if bitmap else {}),
                              **({"bitmap-mode": mode} if mode else {})))
                if starts(sync, bitmap, mode):
                    t.wait_job("j", "running" if sync == "none" else "pending")
                    t("job-cancel", id="j")
                    t.wait_job("j", "null")
    t("query-jobs")
    t.nodes()


GOOD = [(sync, mode) for sync in SYNCS for mode in (None, *MODES) if starts(sync, True, mode)]


def _every_good_one(t, command, device, bitmap):
    """The combinations that a bitmap which allows it is taken in."""
    for sync, mode in GOOD:
        t(command, {**go(command, device=device, sync=sync, bitmap=bitmap, **{"auto-finalize": False}),
                    "job-id": "k", **({"bitmap-mode": mode} if mode else {})})


@_for_both_commands("busy_bitmap", disk("a", data="write -P 7 0 128k"), disk("t"), disk("o"), image("e"))
def _(t, command):
    """a bitmap that another job has, whatever the modes; it is free again after that."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t("blockdev-backup", {"job-id": "j", "device": "a", "target": "o", "sync": "bitmap", "bitmap": "b",
                          "bitmap-mode": "never", "auto-finalize": False})
    t.wait_job("j", "pending")
    _every_good_one(t, command, "a", "b")
    t.nodes()
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t(command, go(command, sync="incremental", bitmap="b"))
    t.wait_job("j", "null")


@_for_both_commands("inconsistent_bitmap", disk("a", bitmaps=["i"], in_use=True), disk("t"), image("e"))
def _(t, command):
    """a bitmap that was in use when its image was left, whatever the modes."""
    _every_good_one(t, command, "a", "i")
    t.nodes()


@_for_both_commands("read_only_bitmap", disk("a", bitmaps=["p"], more="read-only=on"), disk("t"), image("e"))
def _(t, command):
    """a bitmap of a read-only image: taken with `never` alone, and stays as it was."""
    t("block-dirty-bitmap-add", node="a", name="b")     # not stored: anything may be done to it
    for sync, mode in GOOD:
        t(command, go(command, sync=sync, bitmap="p", **({"bitmap-mode": mode} if mode else {})))
        if mode == "never":
            t.wait_job("j", "null")
        t.nodes()
    for sync, mode in GOOD:
        t(command, go(command, sync=sync, bitmap="b", **({"bitmap-mode": mode} if mode else {})))
        t.wait_job("j", "null")
    t.nodes()


@_for_both_commands("disabled_bitmap", disk("a", data="write -P 7 0 128k"), disk("t"), image("e"), nbd_server("a"))
def _(t, command):
    """a disabled bitmap is taken, and nothing is recorded in its stead."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 65536)
    t("block-dirty-bitmap-disable", node="a", name="b")
    for sync, mode in reversed(GOOD):       # `never` first: after the others there is nothing left
        for end in ("job-cancel", "job-finalize"):
            t(command, go(command, sync=sync, bitmap="b", **{"auto-finalize": False},
                          **({"bitmap-mode": mode} if mode else {})))
            t.wait_job("j", "pending")
            t.write("a", 1 << 20, 65536)
            t("query-named-block-nodes", flat=True)
            t("block-dirty-bitmap-enable", node="a", name="b")
            t(end, id="j")
            t.wait_job("j", "null")
            t.write("a", 2 << 20, 65536)
            t.nodes()
            t(SHA, node="a", name="b")


# -- no space


FULL = (disk("a", "raw", data="write -P 1 0 4M"), small_disk("t"), nbd_server("a"))
PROGRESS = ["return[*].current-progress", "return[*].total-progress", "return[*].offset", "return[*].len"]
# One request at a time: QEMU tells each that fails.
MIRROR = {"job-id": "j", "device": "a", "target": "t", "sync": "full", "buf-size": 1 << 20}
ALONE = {"job-id": "j", "device": "a", "target": "t", "x-perf": {"max-workers": 1}}


@sequence(*FULL)
def no_space_reported(t):
    """ENOSPC ends the job; with room made, the same target is used again."""
    for policy in ({}, {"on-target-error": "report"}, {"on-source-error": "stop"}):
        t("blockdev-backup", {**ALONE, "sync": "full", "auto-dismiss": False, **policy})
        t.wait_job("j")
        t("query-jobs")
        t("query-block-jobs")
        t("job-dismiss", id="j")
    t("blockdev-backup", {**ALONE, "sync": "full"})
    t.wait_job("j", "null")
    t("blockdev-del", node_name="t")
    t.make_room()
    t("blockdev-add", driver="raw", node_name="t", file={"driver": "file", "filename": "$DIR/small/t.raw"})
    t("blockdev-backup", {**ALONE, "sync": "full"})
    t.wait_job("j", "null")


@sequence(*FULL)
def no_space_stopped(t):
    """stop, enospc and auto pause the job with io-status nospace; resumed while it is still full it stops again."""
    for policy in ("stop", "enospc", "auto"):
        t("blockdev-backup", {**ALONE, "sync": "full", "on-target-error": policy})
        t.wait("BLOCK_JOB_ERROR", device="j")
        t.wait_job("j", "paused")
        t("query-block-jobs")
        t("query-jobs")
        t("job-resume", id="j")
        t.wait("BLOCK_JOB_ERROR", device="j")
        t.wait_job("j", "paused")
        t("query-block-jobs")
        t("job-cancel", id="j")
        t.wait_job("j", "null")
    t("blockdev-backup", {**ALONE, "sync": "full", "on-target-error": "stop"})
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t.make_room()
    t("job-resume", id="j")
    t.wait_job("j", "null")


def _no_space_with_bitmap(sync, mode):
    def run(t):
        t("block-dirty-bitmap-add", node="a", name="b")
        t.write("a", 0, 4 << 20)
        t("blockdev-backup", {**ALONE, "sync": sync, "bitmap": "b", "bitmap-mode": mode, "auto-dismiss": False})
        t.wait_job("j")
        t("query-jobs")
        t.nodes()
        t("job-dismiss", id="j")
        t.write("a", 65536, 65536)
        t.nodes()
        t(SHA, node="a", name="b")
        t.make_room()
        t("blockdev-backup", {**ALONE, "sync": "bitmap" if sync == "full" else sync, "bitmap": "b",
                              "bitmap-mode": mode})
        t.wait_job("j", "null")
        t.nodes()
    run.__name__ = f"no_space_{sync}_{mode.replace('-', '_')}"
    run.__doc__ = f"ENOSPC with sync {sync}, bitmap-mode {mode}: the bitmap after it, and after a second run."
    sequence(*FULL)(run)


for _sync, _mode in (("full", "on-success"), ("full", "always"), ("incremental", "on-success"),
                     ("bitmap", "on-success"), ("bitmap", "always"), ("bitmap", "never")):
    _no_space_with_bitmap(_sync, _mode)


@sequence(disk("a", "raw", data="write -P 1 0 4M"), small_disk("t", leave=0))
def drive_backup_no_space(t):
    """drive-backup and blockdev-create where not even a header has room: what is said, and left."""
    def left(where):
        return sorted(p.name for p in t.small.fs.outside.iterdir())
    for fmt in ("qcow2", "raw"):
        t("drive-backup", job_id="j", device="a", sync="full", target=f"$DIR/small/x.{fmt}", format=fmt,
          auto_dismiss=False)
        if fmt == "raw":        # it takes no room until it is written
            t.wait_job("j")
        t("query-jobs")
        t.tool("left", left)
        t("blockdev-create", job_id="c", options={"driver": "file", "filename": f"$DIR/small/c.{fmt}", "size": 4 << 20,
                                                  "preallocation": "falloc"})
        t.wait_job("c")
        t("query-jobs")
        t("job-dismiss", id="c")
        t.tool("left", left)


# -- a mirror's target without space


@sequence(*FULL)
def mirror_no_space_reported(t):
    """ENOSPC ends a mirror, before it is ready; with room made, the same target is used again."""
    for policy in ({}, {"on-target-error": "report"}, {"on-source-error": "stop"}):
        t("blockdev-mirror", {**MIRROR, "auto-dismiss": False, **policy})
        t.wait_job("j")
        t("query-jobs", mask=PROGRESS)
        t("query-block-jobs", mask=PROGRESS)
        t("job-dismiss", id="j")
    t.nodes()
    t.make_room()
    t("blockdev-mirror", MIRROR)
    t.wait("BLOCK_JOB_READY", device="j")
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")


@sequence(*FULL)
def mirror_no_space_stopped(t):
    """stop and enospc pause a mirror with io-status nospace; it goes on when it is resumed, stops again
    while there is no room, and can be cancelled."""
    for policy in ("stop", "enospc"):
        t("blockdev-mirror", {**MIRROR, "on-target-error": policy})
        for _ in range(2):
            t.wait("BLOCK_JOB_ERROR", device="j")
            t.wait_job("j", "paused")
            t("query-block-jobs", mask=PROGRESS)
            t("job-pause", id="j")
            t("job-complete", id="j")
            t("block-job-cancel", device="j")
            t("job-resume", id="j")
        t.wait("BLOCK_JOB_ERROR", device="j")
        t.wait_job("j", "paused")
        t("job-cancel", id="j")
        t.wait_job("j", "null")
    t("blockdev-mirror", {**MIRROR, "on-target-error": "stop"})
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t.make_room()
    t("job-resume", id="j")
    t.wait("BLOCK_JOB_READY", device="j")
    t("query-block-jobs")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()


@sequence(disk("a", "raw"), small_disk("t", leave=0), nbd_server("a"))
def mirror_no_space_when_ready(t):
    """A ready mirror whose target takes no more: it is in standby, with its io-status, and guests go on;
    with room made it is resumed, and completes with what was written meanwhile."""
    t("blockdev-mirror", {**MIRROR, "sync": "none", "on-target-error": "stop"})
    t.wait_job("j", "ready")
    t.write("a", 0, 1 << 20, 7)
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "standby")
    t("query-block-jobs", mask=PROGRESS)
    t.write("a", 2 << 20, 65536, 8)
    t.read("a", 0, 3 << 20)
    t.make_room()
    t("job-resume", id="j")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.read("a", 0, 3 << 20)
