"""Every verb, by both its names, in each state that a client can hold a job in; see also jobs.py
(running, paused, pending) and groups.py (waiting)."""

from ..table import disk, image, null, sequence

DATA = "write -P 1 0 4M"
KEEP = {"auto_finalize": False, "auto_dismiss": False}
CUT = ["BLOCK_JOB_CANCELLED.offset", "BLOCK_JOB_CANCELLED.len"]


def ask(t, *mask):
    t("query-jobs", mask=mask)
    t("query-block-jobs", mask=mask)


def mirror(t, status="ready", **more):
    t("blockdev-mirror", job_id="j", device="a", target="t", sync="full", **{**KEEP, **more})
    t.wait_job("j", status)


def refused(t, *verbs):
    """These verbs, by both names, where the state does not allow them."""
    for verb in verbs:
        t(f"job-{verb}", id="j")
        t(f"block-job-{verb}", {"id" if verb in ("finalize", "dismiss") else "device": "j"})


def ended(t):
    """Waits for its end and lets it go."""
    t.wait_job("j")
    ask(t, "return[*].current-progress", "return[*].offset", "return[*].len",
        "return[*].total-progress")
    t("job-dismiss", id="j")


@sequence(disk("a", data=DATA), disk("t"), pauses=True)
def verbs_on_ready(t):
    """ready: pause, speed, complete and cancel; no finalize and no dismiss."""
    mirror(t)
    ask(t)
    refused(t, "resume", "finalize", "dismiss")
    for speed in (-1, 65536, 0):
        t("block-job-set-speed", device="j", speed=speed)
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "pending")
    refused(t, "pause", "resume", "complete", "dismiss")
    t("block-job-set-speed", device="j", speed=-1)
    t("block-job-finalize", id="j")
    ended(t)


@sequence(disk("a", data=DATA), disk("t"), pauses=True)
def verbs_on_standby(t):
    """standby: as ready, but for a second pause and a cancel without force."""
    mirror(t)
    t("block-job-pause", device="j")
    t.wait_job("j", "standby")
    ask(t)
    refused(t, "pause", "finalize", "dismiss")
    t("block-job-set-speed", device="j", speed=-1)
    t("block-job-set-speed", device="j", speed=1 << 20)
    t("block-job-cancel", device="j")
    t("block-job-cancel", device="j", force=False)
    ask(t)
    t("block-job-resume", device="j")
    t.wait_job("j", "ready")
    refused(t, "resume")
    t("job-pause", id="j")
    t.wait_job("j", "standby")
    t("block-job-cancel", device="j", force=True)
    ended(t)


def _complete_in_standby(name, verb, key):
    def run(t):
        mirror(t)
        t("job-pause", id="j")
        t.wait_job("j", "standby")
        t(verb, {key: "j"})
        t.settle()
        t("query-jobs")
        t("job-resume", id="j")
        t.wait_job("j", "pending")
        t("job-finalize", id="j")
        ended(t)
        t.nodes()
    run.__name__, run.__doc__ = name, f"{verb} of one in standby: it ends when it is resumed."
    sequence(disk("a", data=DATA), disk("t"))(run)


_complete_in_standby("complete_in_standby", "job-complete", "id")
_complete_in_standby("complete_in_standby_block", "block-job-complete", "device")


def _cancel_ready(name, verb, arguments):
    def run(t):
        for paused in (False, True):
            mirror(t)
            if paused:
                t("job-pause", id="j")
                t.wait_job("j", "standby")
            t(verb, arguments)
            if paused and verb == "block-job-cancel" and not arguments.get("force"):
                t("job-resume", id="j")
                t.wait_job("j", "ready")
                t(verb, arguments)
            if verb == "block-job-cancel" and not arguments.get("force"):
                t.wait_job("j", "pending")      # it ends well, without the pivot
                ask(t)
                t("job-finalize", id="j")
            ended(t)
        t.nodes()
    run.__name__ = name
    run.__doc__ = f"{verb} {arguments} of one that is ready, and in standby."
    sequence(disk("a", data=DATA), disk("t"))(run)


_cancel_ready("cancel_ready", "job-cancel", {"id": "j"})
_cancel_ready("cancel_ready_softly", "block-job-cancel", {"device": "j"})
_cancel_ready("cancel_ready_by_force", "block-job-cancel", {"device": "j", "force": True})


def _cancel_pending_mirror(verb, **arguments):
    def run(t):
        mirror(t)
        t("job-complete", id="j")
        t.wait_job("j", "pending")
        t(verb, dict(arguments))
        ended(t)
        t.nodes()
    run.__name__ = f"cancel_pending_mirror_{verb[:3]}{'_force' if 'force' in arguments else ''}"
    run.__doc__ = f"{verb} of a pending mirror: nobody moves."
    sequence(disk("a", data=DATA), disk("t"))(run)


_cancel_pending_mirror("job-cancel", id="j")
_cancel_pending_mirror("block-job-cancel", device="j")
_cancel_pending_mirror("block-job-cancel", device="j", force=True)


@sequence(disk("a", size="32M", data="write -P 1 0 24M"), disk("t", size="32M"), mask=CUT)
def verbs_on_running_mirror(t):
    """A mirror that is not ready yet, running and paused: every cancel is by force."""
    progress = ("return[*].current-progress", "return[*].offset", "return[*].len",
                "return[*].total-progress")
    for verb, arguments in (("job-cancel", {"id": "j"}), ("block-job-cancel", {"device": "j"}),
                            ("block-job-cancel", {"device": "j", "force": True})):
        mirror(t, "running", speed=65536)
        refused(t, "resume", "complete", "finalize", "dismiss")
        t("job-pause", id="j")
        t.wait_job("j", "paused")
        ask(t, *progress)
        refused(t, "pause", "complete", "finalize", "dismiss")
        if "force" not in arguments:
            t("job-resume", id="j")
            t.wait_job("j", "running")
        t(verb, arguments)
        ended(t)


FAILS = (disk("a", "raw", data=DATA), disk("t", "raw"))


@sequence(*FAILS, mask=[*CUT, "BLOCK_JOB_COMPLETED.offset"], pauses=True)
def verbs_on_stopped(t):
    """Stopped by an error: a pause of its user, who can resume it, or cancel it by force."""
    def go():
        t("blockdev-add", driver="blkdebug", node_name="b", image="t",
          inject_error=[{"event": "none", "iotype": "write", "once": True, "errno": 28}])
        t("blockdev-backup", {"job-id": "j", "device": "a", "target": "b", "sync": "full",
                              "on-target-error": "enospc", "x-perf": {"max-workers": 1},
                              "auto-finalize": False, "auto-dismiss": False})
        t.wait("BLOCK_JOB_ERROR", device="j")
        t.settle()
    progress = ("return[*].current-progress", "return[*].offset")
    go()
    ask(t, *progress)
    refused(t, "pause", "complete", "finalize", "dismiss")
    t("block-job-cancel", device="j")
    t("block-job-set-speed", device="j", speed=1 << 30)
    t("block-job-resume", device="j")
    t.wait_job("j", "pending")
    ask(t)
    t("job-finalize", id="j")
    ended(t)
    t("blockdev-del", node_name="b")
    for verb, arguments in (("job-cancel", {"id": "j"}),
                            ("block-job-cancel", {"device": "j", "force": True})):
        go()
        t(verb, arguments)
        ended(t)
        t("blockdev-del", node_name="b")


@sequence(disk("a", data=DATA), disk("t"), disk("u"), disk("v"), mask=CUT)
def several_jobs(t):
    """Backups of one disk beside each other; what else may begin while they run."""
    def backup(job, target, **more):
        t("blockdev-backup", job_id=job, device="a", target=target, sync="full", speed=65536,
          auto_dismiss=False, **more)
    backup("j", "t", filter_node_name="cbw")
    t.wait_job("j", "running")
    for node in ("a", "cbw"):
        t("blockdev-mirror", job_id="l", device=node, target="v", sync="full")
        t("blockdev-backup", job_id="l", device=node, target=node, sync="full")
    t("blockdev-backup", job_id="l", device="cbw", target="v", sync="full", speed=65536)
    backup("k", "u")
    t.wait_job("k", "running")
    ask(t, "return[*].current-progress", "return[*].offset", "return[*].busy")
    backup("l", "u")
    backup("l", "t")
    t("blockdev-backup", job_id="l", device="t", target="v", sync="full")
    t("blockdev-backup", job_id="l", device="v", target="a", sync="full")
    t("blockdev-mirror", job_id="l", device="t", target="v", sync="full")
    t("blockdev-mirror", job_id="l", device="v", target="u", sync="full")
    t("blockdev-mirror", job_id="l", device="v", target="a", sync="full")
    t("block-dirty-bitmap-add", node="a", name="b")
    backup("l", "v", bitmap="b", bitmap_mode="on-success")
    t.wait_job("l", "running")
    backup("m", "t", bitmap="b", bitmap_mode="on-success")
    t("job-cancel", id="k")
    t.wait_job("k")
    t("job-cancel", id="j")
    t.wait_job("j")
    t("job-cancel", id="l")
    t.wait_job("l")
    for job in "jkl":
        t("job-dismiss", id=job)
    t.nodes()


@sequence(image("x"), null("n", size=4 << 20), disk("t"))
def jobs_of_other_kinds(t):
    """A create job has no block-job verbs, and is not among the block jobs."""
    t("blockdev-create", job_id="c", options={"driver": "file", "filename": "$DIR/new", "size": 1})
    t.wait_job("c")
    for verb in ("pause", "resume", "complete", "finalize", "dismiss", "cancel"):
        t(f"block-job-{verb}", {"id" if verb in ("finalize", "dismiss") else "device": "c"})
    t("block-job-set-speed", device="c", speed=1)
    t("blockdev-backup", job_id="c", device="n", target="t", sync="full")
    t("blockdev-backup", job_id="d", device="n", target="t", sync="full", auto_dismiss=False)
    t.wait_job("d")
    ask(t)
    t("block-job-dismiss", id="c")
    t("job-dismiss", id="c")
    t("block-job-dismiss", id="d")
    ask(t)
