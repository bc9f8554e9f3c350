"""Jobs of one transaction with completion-mode grouped: they wait for each other, and end alike.

The order of events between two jobs is chance while they run and is not compared; while a group is
being ended it is not, and `order` records it. What hangs qemu-storage-daemon is in test_jobs.py: a
group of two that is given up before it has started."""

from .. import normal
from ..table import disk, sequence

BADD, BACKUP = "block-dirty-bitmap-add", "blockdev-backup"
DATA = "write -P 1 0 4M"
PAIR = (disk("a", data="write -P 1 0 64k"), disk("b", data=DATA), disk("ta"), disk("tb"))
CUT = ["BLOCK_JOB_CANCELLED.offset"]    # how far the slow one has come
KEEP = {"auto-finalize": False, "auto-dismiss": False}


def ask(t, *mask):
    t("query-jobs", mask=["return[*].current-progress", *mask])
    t("query-block-jobs", mask=["return[*].offset", *mask])


def member(disk_name, **more):
    """The action that backs DISK_NAME up to tDISK_NAME as job jDISK_NAME."""
    more = {key.replace("_", "-"): value for key, value in more.items()}
    return (BACKUP, {"job-id": f"j{disk_name}", "device": disk_name, "target": f"t{disk_name}",
                     "sync": "full", **KEEP, **more})


def slow(disk_name, **more):
    """One that its speed holds in `running`."""
    return member(disk_name, speed=65536, **more)


def grouped(t, *actions):
    t.tx(*actions, completion_mode="grouped")


def order(t, label, first):
    """All events of jobs since the first that FIRST names (an event's label), in their order."""
    def run(qmp):
        qmp.call("query-version")
        names = [f"{normal.subject(e)} {normal.label(e)}" for e in qmp.history
                 if "JOB" in e["event"]]
        names = [n for n in names if "paused" not in n and "running" not in n]
        return names[names.index(first):] if first in names else names
    t.qmp_value(f"order-{label}", run)


def dismiss(t, *jobs, nodes=True, known=()):
    """Waits for their end (KNOWN: it has been seen), and lets them go."""
    for job in jobs:
        if job not in known:
            t.wait_job(job)
    ask(t)
    for job in jobs:
        t("job-dismiss", id=job)
    if nodes:
        t.nodes()


def waiting_pair(t, **more):
    """ja waits for jb, which is slow."""
    grouped(t, member("a", **more), slow("b", **more))
    t.wait_job("ja", "waiting")


def pending(t, *jobs):
    """Their group is ready."""
    for job in jobs:
        t.wait_job(job, "pending")


def every_verb(t, job, but=()):
    """Each verb by both its names, where it is refused."""
    for verb in ("pause", "resume", "complete", "finalize", "dismiss"):
        if verb not in but:
            t(f"job-{verb}", id=job)
            t(f"block-job-{verb}", {"id" if verb in ("finalize", "dismiss") else "device": job})
    if "set-speed" not in but:
        t("block-job-set-speed", device=job, speed=-1)
        t("block-job-set-speed", device=job, speed=1 << 20)


@sequence(*PAIR)
def group_waits(t):
    """waiting: no verb but cancel; node and bitmap are busy. pending: finalize of one is for both."""
    t(BADD, node="a", name="x")
    grouped(t, member("a", bitmap="x", bitmap_mode="on-success"), slow("b"))
    t.wait_job("ja", "waiting")
    ask(t)
    every_verb(t, "ja")
    for verb in ("clear", "enable", "disable", "remove"):
        t(f"block-dirty-bitmap-{verb}", node="a", name="x")
    for node in ("a", "ta"):
        t("blockdev-del", node_name=node)
    t(BACKUP, job_id="k", device="a", target="ta", sync="full")
    t("block-job-finalize", id="jb")
    t("job-dismiss", id="jb")
    t("block-job-set-speed", device="jb", speed=0)
    pending(t, "ja", "jb")
    ask(t)
    every_verb(t, "ja", but=("finalize",))
    every_verb(t, "jb", but=("finalize",))
    t.nodes()
    t("job-finalize", id="ja")
    order(t, "finalized", "jb JOB_STATUS_CHANGE:concluded")
    t.wait_job("ja")
    t.wait_job("jb")
    t("job-finalize", id="jb")
    every_verb(t, "ja", but=("dismiss",))
    t("job-cancel", id="jb")
    dismiss(t, "ja", "jb", known=("ja", "jb"))


def _cancel_waiting(name, doc, verb, arguments):
    def run(t):
        waiting_pair(t)
        t(verb, arguments)
        dismiss(t, "ja", "jb")
    run.__name__, run.__doc__ = name, doc
    sequence(*PAIR, mask=CUT)(run)


_cancel_waiting("group_cancel_waiting", "The waiting one is cancelled.", "job-cancel", {"id": "ja"})
_cancel_waiting("group_cancel_waiting_block", "The same, by its other name.",
                "block-job-cancel", {"device": "ja"})
_cancel_waiting("group_cancel_waiting_force", "The same, by force.",
                "block-job-cancel", {"device": "ja", "force": True})
_cancel_waiting("group_cancel_running", "The running one is cancelled.", "job-cancel", {"id": "jb"})
_cancel_waiting("group_cancel_running_block", "The same, by its other name.",
                "block-job-cancel", {"device": "jb"})


def _cancel_pending(job):
    def run(t):
        grouped(t, member("a"), member("b"))
        pending(t, "ja", "jb")
        t("job-cancel", id=job)
        order(t, "cancelled", "jb JOB_STATUS_CHANGE:aborting")
        dismiss(t, "ja", "jb")
    run.__name__ = f"group_cancel_pending_{job}"
    run.__doc__ = "A member of a pending group is cancelled: both are, in this order."
    sequence(*PAIR)(run)


_cancel_pending("ja")
_cancel_pending("jb")


def _finalize(name, verb, job, a_manual, b_manual):
    def run(t):
        grouped(t, member("a", auto_finalize=not a_manual), member("b", auto_finalize=not b_manual))
        pending(t, "ja", "jb")
        t.settle()
        ask(t)
        t(verb, id=job)
        order(t, "finalized", "jb BLOCK_JOB_COMPLETED")
        dismiss(t, "ja", "jb")
    run.__name__ = f"group_finalize_{name}"
    run.__doc__ = f"{verb} of {job}; by hand: {['ja'] * a_manual + ['jb'] * b_manual}."
    sequence(*PAIR)(run)


_finalize("both_by_a", "job-finalize", "ja", True, True)
_finalize("both_by_b", "block-job-finalize", "jb", True, True)
_finalize("mixed_by_the_automatic", "job-finalize", "ja", False, True)
_finalize("mixed_by_the_manual", "job-finalize", "ja", True, False)


@sequence(*PAIR)
def group_ends_by_itself(t):
    """auto-finalize and auto-dismiss: both, one, none."""
    for a in (True, False):
        for b in (True, False):
            grouped(t, member("a", auto_finalize=True, auto_dismiss=a),
                    member("b", auto_finalize=True, auto_dismiss=b))
            t.wait_job("ja", "null" if a else "concluded")
            t.wait_job("jb", "null" if b else "concluded")
            ask(t)
            t("job-dismiss", id="ja")
            t("job-dismiss", id="jb")


@sequence(disk("a", data=DATA), disk("b", data=DATA), disk("c", data=DATA), disk("ta"), disk("tb"),
          disk("tc"), mask=CUT)
def group_of_three(t):
    """Two wait for the third; then one is cancelled; then all succeed."""
    grouped(t, member("a"), slow("b"), member("c"))
    t.wait_job("ja", "waiting")
    t.wait_job("jc", "waiting")
    ask(t)
    t("job-cancel", id="jc")
    dismiss(t, "ja", "jb", "jc")
    grouped(t, member("a"), slow("b"), member("c"))
    t.wait_job("ja", "waiting")
    t.wait_job("jc", "waiting")
    t("block-job-set-speed", device="jb", speed=0)
    pending(t, "ja", "jb", "jc")
    ask(t)
    t("job-finalize", id="jb")
    order(t, "finalized", "jc BLOCK_JOB_COMPLETED")
    dismiss(t, "ja", "jb", "jc")


@sequence(disk("a", data=DATA), disk("ta"))
def group_of_one(t):
    """A group of one is a job."""
    grouped(t, member("a"))
    pending(t, "ja")
    t("job-finalize", id="ja")
    dismiss(t, "ja")
    grouped(t, member("a"), ("abort", {}))
    ask(t)


@sequence(*PAIR, pauses=True, mask=CUT)
def group_paused(t):
    """A paused member holds the group up; it can be resumed, or be cancelled by its sibling."""
    grouped(t, member("a"), slow("b"))
    t.wait_job("ja", "waiting")
    t("job-pause", id="jb")
    t.wait_job("jb", "paused")
    ask(t)
    t("block-job-set-speed", device="jb", speed=0)
    t("block-job-cancel", device="jb")
    t("job-resume", id="jb")
    pending(t, "ja", "jb")
    t("job-finalize", id="ja")
    dismiss(t, "ja", "jb")
    grouped(t, member("a"), slow("b"))
    t.wait_job("ja", "waiting")
    t("block-job-pause", device="jb")
    t.wait_job("jb", "paused")
    t("job-cancel", id="ja")
    dismiss(t, "ja", "jb")


@sequence(*PAIR, mask=CUT)
def individual_mode(t):
    """Without a group one job's end is its own."""
    t.tx(member("a"), slow("b"), completion_mode="individual")
    pending(t, "ja")
    ask(t)
    t("job-finalize", id="ja")
    t.wait_job("ja")
    ask(t)
    t("job-cancel", id="jb")
    dismiss(t, "ja", "jb", known=("ja",))
    t.tx(member("a"), slow("b"))
    pending(t, "ja")
    t("job-cancel", id="ja")
    t.wait_job("ja")
    ask(t)
    t("block-job-set-speed", device="jb", speed=0)
    pending(t, "jb")
    t("job-finalize", id="jb")
    dismiss(t, "ja", "jb", known=("ja",))


FAILING = (disk("a", "raw", data=DATA), disk("b", "raw", data=DATA), disk("ta", "raw"),
           disk("u", "raw"))
STOPS = {"on-target-error": "stop", "x-perf": {"max-workers": 1}}


def failing(t, errno=5):
    """A target tb whose first write fails."""
    t("blockdev-add", driver="blkdebug", node_name="tb", image="u",
      inject_error=[{"event": "none", "iotype": "write", "once": True, "errno": errno}])


@sequence(*FAILING, mask=["BLOCK_JOB_CANCELLED.*"])
def group_fails_while_one_runs(t):
    """jb fails, ja is cancelled."""
    failing(t, 28)
    grouped(t, slow("a"), member("b"))
    dismiss(t, "ja", "jb", nodes=False)


@sequence(*FAILING, mask=CUT)
def group_stops(t):
    """jb stops by an error while ja waits; resumed, both succeed; cancelled, both are."""
    for end in ("resume", "cancel"):
        failing(t)
        grouped(t, member("a"), member("b", **STOPS))
        t.wait_job("ja", "waiting")
        t.wait("BLOCK_JOB_ERROR", device="jb")
        t.settle()
        ask(t)
        t("blockdev-del", node_name="tb")
        if end == "resume":
            t("job-resume", id="jb")
            pending(t, "ja", "jb")
            t("job-finalize", id="jb")
        else:
            t("block-job-cancel", device="jb")
            t("block-job-cancel", device="jb", force=True)
        dismiss(t, "ja", "jb", nodes=False)
        t("blockdev-del", node_name="tb")


@sequence(disk("a", data=DATA), disk("b", data=DATA), disk("c", data=DATA), disk("ta"), disk("tb"), mask=CUT)
def group_bitmaps(t):
    """Each member's bitmap: cancelled, it is as if no backup had been issued; finalized, it begins anew."""
    for node in ("a", "b"):
        t(BADD, node=node, name="x")
    on_success = {"bitmap": "x", "bitmap_mode": "on-success"}
    grouped(t, member("a", **on_success), slow("b", **on_success))
    t.wait_job("ja", "waiting")
    t("job-cancel", id="ja")
    dismiss(t, "ja", "jb")
    grouped(t, member("a", **on_success), member("b", **on_success))
    pending(t, "ja", "jb")
    t.nodes()
    t("job-cancel", id="jb")
    dismiss(t, "ja", "jb")
    grouped(t, member("a", **on_success), member("b", **on_success))
    pending(t, "ja", "jb")
    t("job-finalize", id="jb")
    dismiss(t, "ja", "jb")


@sequence(*PAIR, mask=CUT)
def group_at_the_end(t):
    """The program ends while a group waits, and while one is pending."""
    for how in ("quit", "term"):
        waiting_pair(t)
        t.finish(how)
        t.start()
        grouped(t, member("a"), member("b"))
        pending(t, "ja", "jb")
        t.finish(how)
        t.start()
    for name in ("a", "b", "ta", "tb"):
        t.check(f"{name}.qcow2")


@sequence(disk("a", data="write -P 1 0 64k"), disk("b", data=DATA), disk("tb"), mask=CUT)
def group_of_drive_backups(t):
    """drive-backup in a group, beside a blockdev-backup: cancelled, then finalized."""
    drive = ("drive-backup", {"job-id": "ja", "device": "a", "target": "$DIR/new.qcow2",
                              "sync": "full", **KEEP})
    grouped(t, drive, slow("b"))
    t.wait_job("ja", "waiting")
    t("job-cancel", id="jb")
    dismiss(t, "ja", "jb")
    grouped(t, drive, member("b"))
    pending(t, "ja", "jb")
    t("job-finalize", id="ja")
    dismiss(t, "ja", "jb")
    t.finish()
    t.content("new.qcow2")
    t.content("tb.qcow2")
