"""The job state machine: every verb in every state, on backup and create jobs."""

from ..table import disk, image, null, sequence

def ask(t, *mask):
    t("query-jobs", mask=["return[*].current-progress", *mask])
    t("query-block-jobs", mask=["return[*].offset", *mask])


SLOW = {"speed": 65536, "auto_finalize": False, "auto_dismiss": False}


def slow_backup(t, job="j", **more):
    """A backup held in `running` by its speed."""
    t("blockdev-backup", job_id=job, device="a", target="t", sync="full", **{**SLOW, **more})
    t.wait_job(job, "running")


@sequence()
def verbs_without_job(t):
    """Every verb on a job that is not there, and with bad arguments."""
    for verb in ("job-pause", "job-resume", "job-cancel", "job-complete", "job-dismiss",
                 "job-finalize", "block-job-finalize", "block-job-dismiss"):
        t(verb)
        t(verb, id="nosuch")
        t(verb, id="")
        t(verb, id=1)
        t(verb, id="nosuch", more=1)
        t(verb, device="nosuch")
    for verb in ("block-job-pause", "block-job-resume", "block-job-cancel", "block-job-complete"):
        t(verb)
        t(verb, device="nosuch")
        t(verb, device="")
        t(verb, device=[])
        t(verb, device="nosuch", more=1)
        t(verb, id="nosuch")
    t("block-job-cancel", device="nosuch", force=1)
    t("block-job-cancel", device="nosuch", force=True)
    t("block-job-set-speed")
    t("block-job-set-speed", device="nosuch")
    t("block-job-set-speed", device="nosuch", speed=1)
    t("block-job-set-speed", device="nosuch", speed="1")
    t("block-job-set-speed", device="nosuch", speed=1.5)
    t("block-job-set-speed", speed=1)
    ask(t)


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), pauses=True,
          mask=["BLOCK_JOB_CANCELLED.offset"])
def verbs_on_running(t):
    """running: pause, resume and cancel; no complete, finalize, dismiss."""
    slow_backup(t)
    ask(t)
    for verb in ("job-complete", "job-finalize", "job-dismiss", "job-resume"):
        t(verb, id="j")
    t("block-job-complete", device="j")
    t("block-job-resume", device="j")
    t("block-job-finalize", id="j")
    t("block-job-dismiss", id="j")
    t("block-job-set-speed", device="j", speed=-1)
    t("block-job-set-speed", device="j", speed=32768)
    t("block-job-set-speed", device="j", speed=65536)
    ask(t)
    t("job-cancel", id="j")
    t.wait_job("j")
    t("query-jobs", mask=["return[*].current-progress"])
    t("query-block-jobs", mask=["return[*].offset"])
    t("job-dismiss", id="j")
    ask(t)


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), pauses=True, mask=["BLOCK_JOB_CANCELLED.offset"])
def verbs_on_paused(t):
    """paused by a user: what each verb says, and that a second pause is an error."""
    slow_backup(t)
    t("job-pause", id="j")
    t.wait_job("j", "paused")
    ask(t)
    t("job-pause", id="j")
    t("block-job-pause", device="j")
    for verb in ("job-complete", "job-finalize", "job-dismiss"):
        t(verb, id="j")
    t("block-job-complete", device="j")
    t("block-job-set-speed", device="j", speed=131072)
    ask(t)
    t("block-job-cancel", device="j")
    ask(t)
    t("job-resume", id="j")
    t.wait_job("j", "running")
    t("job-resume", id="j")
    t("block-job-pause", device="j")
    t.wait_job("j", "paused")
    ask(t)
    t("block-job-resume", device="j")
    t.wait_job("j", "running")
    t("job-pause", id="j")
    t.wait_job("j", "paused")
    t("job-cancel", id="j")
    t.wait_job("j")
    t("query-jobs", mask=["return[*].current-progress"])
    t("job-dismiss", id="j")
    t("query-jobs")


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), pauses=True,
          mask=["BLOCK_JOB_CANCELLED.offset"])
def cancel_paused_with_force(t):
    """block-job-cancel of a paused job: refused, but with force."""
    slow_backup(t)
    t("block-job-pause", device="j")
    t.wait_job("j", "paused")
    t("block-job-cancel", device="j", force=False)
    t("block-job-cancel", device="j", force=True)
    t.wait_job("j")
    t("query-jobs", mask=["return[*].current-progress"])
    t("block-job-dismiss", id="j")


@sequence(disk("a"), disk("t"))
def verbs_on_pending(t):
    """pending: finalize and cancel, nothing else."""
    t.backup(end="pending", auto_finalize=False, auto_dismiss=False)
    ask(t)
    for verb in ("job-pause", "job-resume", "job-complete", "job-dismiss"):
        t(verb, id="j")
    for verb in ("block-job-pause", "block-job-resume", "block-job-complete"):
        t(verb, device="j")
    t("block-job-dismiss", id="j")
    t("block-job-set-speed", device="j", speed=1 << 20)
    ask(t)
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="t")
    t("job-finalize", id="j")
    t.wait_job("j")
    ask(t)
    for verb in ("job-pause", "job-resume", "job-complete", "job-finalize", "job-cancel"):
        t(verb, id="j")
    for verb in ("block-job-pause", "block-job-resume", "block-job-complete", "block-job-cancel"):
        t(verb, device="j")
    t("block-job-finalize", id="j")
    t("block-job-set-speed", device="j", speed=1)
    ask(t)
    t("block-job-dismiss", id="j")
    t("job-dismiss", id="j")
    ask(t)


@sequence(disk("a"), disk("t"))
def cancel_pending(t):
    """A pending job that is cancelled: by both verbs, with and without force."""
    for verb, arguments in (("job-cancel", {"id": "j"}), ("block-job-cancel", {"device": "j"}),
                            ("block-job-cancel", {"device": "j", "force": True}),
                            ("block-job-cancel", {"device": "j", "force": False})):
        t.backup(end="pending", auto_finalize=False, auto_dismiss=False)
        t(verb, arguments)
        t.wait_job("j")
        ask(t)
        t("job-dismiss", id="j")


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), mask=["BLOCK_JOB_CANCELLED.offset"])
def cancel_running(t):
    """A running job that is cancelled: by both verbs; twice; one that dismisses itself."""
    for verb, arguments in (("job-cancel", {"id": "j"}), ("block-job-cancel", {"device": "j"}),
                            ("block-job-cancel", {"device": "j", "force": True})):
        slow_backup(t)
        t(verb, arguments)
        t.wait_job("j")
        t(verb, arguments)
        t("query-jobs", mask=["return[*].current-progress"])
        t("job-dismiss", id="j")
    slow_backup(t, auto_dismiss=True)
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t("query-jobs")


@sequence(disk("a"), disk("t"))
def auto_finalize_and_dismiss(t):
    """The four combinations of auto-finalize and auto-dismiss, and what is left after each."""
    for finalize in (True, False):
        for dismiss in (True, False):
            t.backup(end="concluded" if finalize else "pending", auto_finalize=finalize,
                     auto_dismiss=dismiss)
            if not finalize:
                ask(t)
                t("job-finalize", id="j")
                t.wait_job("j")
            if not dismiss:
                ask(t)
                t("job-dismiss", id="j")
            t.wait_job("j", "null")
            ask(t)


@sequence(disk("a"), disk("t"), disk("u"))
def job_ids(t):
    """job-id: missing, not well-formed, in use; and an id may be used again."""
    go = {"device": "a", "target": "t", "sync": "full"}
    for ident in ("", "1a", "a b", "-a", "_a", "#a", "a#b", "a/b", "ä", "x" * 80):
        t("blockdev-backup", {**go, "job-id": ident, "auto-finalize": False})
        if ident == "x" * 80:
            t.wait_job(ident, "pending")
            t("job-cancel", id=ident)
            t.wait_job(ident, "null")
    for ident in ("a", "A-1.b_c", "j"):
        t.backup(ident, end="pending", auto_finalize=False)
        t("blockdev-backup", {**go, "job-id": ident})
        t("blockdev-backup", {**go, "job-id": ident, "target": "u"})
        t("blockdev-create", job_id=ident, options={"driver": "file", "filename": "$DIR/new", "size": 1})
        t("job-finalize", id=ident)
        t.wait_job(ident, "null")
    t("blockdev-backup", {**go, "job-id": 1})
    t("blockdev-backup", {**go, "job-id": None})
    t("query-jobs")


@sequence(disk("a"), disk("t"))
def job_id_missing(t):
    """A backup without job-id."""
    t("blockdev-backup", device="a", target="t", sync="full", auto_finalize=False)
    t("query-jobs")


@sequence(image("x"))
def create_job_verbs(t):
    """blockdev-create's job: concluded at once, kept until it is dismissed; no block job."""
    t("blockdev-create", job_id="c", options={"driver": "file", "filename": "$DIR/new", "size": 1 << 20})
    t.wait_job("c")
    t("query-jobs")
    t("query-block-jobs")
    for verb in ("job-pause", "job-resume", "job-complete", "job-finalize", "job-cancel"):
        t(verb, id="c")
    t("block-job-dismiss", id="c")
    t("block-job-cancel", device="c")
    t("block-job-set-speed", device="c", speed=1)
    t("blockdev-create", job_id="c", options={"driver": "file", "filename": "$DIR/new2", "size": 1})
    t("job-dismiss", id="c")
    t("job-dismiss", id="c")
    t("query-jobs")
    t("blockdev-create", job_id="c", options={"driver": "file", "filename": "$DIR/nosuch/new", "size": 1})
    t.wait_job("c")
    t("query-jobs")
    t("job-dismiss", id="c")


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), null("n"), mask=["BLOCK_JOB_CANCELLED.offset"])
def set_speed(t):
    """block-job-set-speed: values, and that it lets a slow job finish."""
    slow_backup(t)
    for speed in (-1, 1, 65536, 131072, -(1 << 63), "1", None, True, 1.0, [], {}):
        t("block-job-set-speed", device="j", speed=speed)
        if speed in (1, 65536, 131072):
            t("query-block-jobs", mask=["return[*].offset", "return[*].status", "return[*].busy",
                                        "return[*].paused"])
    t("block-job-set-speed", device="j", speed=(1 << 63) - 1)
    t.wait_job("j", "pending")
    t("query-block-jobs")
    t("job-finalize", id="j")
    t.wait_job("j")
    t("job-dismiss", id="j")


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), mask=["BLOCK_JOB_CANCELLED.offset"])
def quit_cancels_jobs(t):
    """Ending the program with a job running, paused, and pending."""
    slow_backup(t)
    t.finish("quit")
    t.start()
    slow_backup(t)
    t("job-pause", id="j")
    t.finish("term")
    t.start()
    t.backup(end="pending", auto_finalize=False)
    t.finish("quit")
    t.check("t.qcow2")


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), disk("u"), mask=["BLOCK_JOB_CANCELLED.offset"])
def nodes_of_a_running_job(t):
    """What a running backup forbids to do with its nodes."""
    slow_backup(t, filter_node_name="cbw")
    for node in ("a", "t", "cbw"):
        t("blockdev-del", node_name=node)
        t("block_resize", node_name=node, size=8 << 20)
    t("blockdev-backup", job_id="k", device="u", target="t", sync="full")
    t("blockdev-backup", job_id="k", device="a", target="u", sync="full", filter_node_name="cbw")
    t("blockdev-backup", job_id="k", device="t", target="u", sync="full")
    t("blockdev-backup", job_id="k", device="u", target="a", sync="full")
    t("blockdev-add", driver="raw", node_name="over", file="t")
    t("blockdev-add", driver="raw", node_name="over2", file="a")
    t("query-jobs", mask=["return[*].current-progress"])
    t.nodes()
    t("job-cancel", id="j")
    t.wait_job("j")
    t("job-dismiss", id="j")
    t.nodes()
