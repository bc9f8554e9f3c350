"""Backups that fail: the target takes no byte beyond 2 MiB (a limit of the process)."""

from ..table import disk, file_size_limit, nbd_server, sequence

GO = {"job-id": "j", "device": "a", "target": "t", "x-perf": {"max-workers": 1}}
SETUP = (disk("a", "raw", data="write -P 1 0 4M"), disk("t", "raw"), file_size_limit(2 << 20),
         nbd_server("a"))


@sequence(*SETUP)
def fails_without_bitmap(t):
    """A full backup fails in the middle: its events, its error, its end by itself."""
    t("blockdev-backup", {**GO, "sync": "full"})
    t.wait_job("j", "null")
    t("query-jobs")
    t("blockdev-backup", {**GO, "sync": "full", "auto-dismiss": False, "auto-finalize": False})
    t.wait_job("j")
    t("query-jobs")
    t("query-block-jobs")
    for verb in ("job-pause", "job-resume", "job-cancel", "job-complete", "job-finalize"):
        t(verb, id="j")
    t("block-job-cancel", device="j", force=True)
    t("blockdev-del", node_name="t")
    t("job-dismiss", id="j")
    t("blockdev-del", node_name="t")
    t("query-jobs")


def fail_with_bitmap(t, sync, mode):
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 1 << 20)
    t("block-dirty-bitmap-add", node="a", name="whole")
    for offset in (0, 1, 3):        # what lies beyond 2 MiB of the source cannot be written either
        t.write("a", offset << 19, 4096)
    t("block-dirty-bitmap-merge", node="a", target="b", bitmaps=["whole"])
    arguments = {**GO, "sync": sync, "auto-dismiss": False, "bitmap": "b"}
    if mode:
        arguments["bitmap-mode"] = mode
    t("blockdev-backup", arguments)
    t.wait_job("j")
    t("query-jobs")
    t.nodes()
    t("job-dismiss", id="j")
    t.nodes()
    t("x-debug-block-dirty-bitmap-sha256", node="a", name="b")


@sequence(*SETUP)
def fails_full_on_success(t):
    """sync full, a bitmap, on-success: after a failure the bitmap is as it was."""
    fail_with_bitmap(t, "full", "on-success")


@sequence(*SETUP)
def fails_full_always(t):
    """sync full, a bitmap, always: after a failure the bitmap holds what was not copied."""
    fail_with_bitmap(t, "full", "always")


@sequence(disk("a", "raw", data="write -P 1 0 4M"), disk("t"), file_size_limit(2 << 20), nbd_server())
def fails_to_qcow2(t):
    """The same with a qcow2 target, whose metadata has its place in the file, too."""
    t("blockdev-backup", {**GO, "sync": "full", "auto-dismiss": False},
      mask=["error"])
    t.wait_job("j")
    t("query-jobs", mask=["return[*].current-progress"])
    t("job-dismiss", id="j")


# A small file with a stored bitmap that is dirty at 0 and at 12 MiB, where the target cannot be written.
FAR = (disk("a", size="16M", bitmaps=["b"], data=["write -P 1 0 1M", "write -P 2 12M 1M"]),
       disk("t", "raw", size="16M"), file_size_limit(8 << 20), nbd_server("a"))


def fail_far(t, sync, mode):
    t.nodes()
    arguments = {**GO, "sync": sync, "bitmap": "b", "auto-dismiss": False}
    if mode:
        arguments["bitmap-mode"] = mode
    t("blockdev-backup", arguments)
    t.wait_job("j")
    t("query-jobs")
    t.write("a", 2 << 20, 65536)
    t.nodes()
    t("job-dismiss", id="j")
    t("x-debug-block-dirty-bitmap-sha256", node="a", name="b")
    t("blockdev-backup", arguments)
    t.wait_job("j")
    t("query-jobs")
    t.nodes()
    t.finish()
    t.bitmaps_on_disk("a.qcow2")
    t.content("t.raw", fmt="raw", length=16 << 20)


@sequence(*FAR)
def fails_incremental(t):
    """An incremental backup fails: the bitmap is what it was and what was written since."""
    fail_far(t, "incremental", None)


@sequence(*FAR)
def fails_bitmap_on_success(t):
    """sync bitmap, on-success, fails: the same."""
    fail_far(t, "bitmap", "on-success")


@sequence(*FAR)
def fails_bitmap_never(t):
    """sync bitmap, never, fails: the same."""
    fail_far(t, "bitmap", "never")


@sequence(*FAR)
def fails_bitmap_always(t):
    """sync bitmap, always, fails: what was copied is clean, the rest and what was written is dirty."""
    fail_far(t, "bitmap", "always")


@sequence(*FAR)
def fails_by_transaction(t):
    """A failing backup in a transaction with a good bitmap action: individual, so that one stays."""
    t.tx(("block-dirty-bitmap-add", {"node": "a", "name": "n"}),
         ("blockdev-backup", {**GO, "sync": "incremental", "bitmap": "b", "auto-dismiss": False}))
    t.wait_job("j")
    t("query-jobs")
    t.nodes()


@sequence(*SETUP)
def stops_and_resumes(t):
    """on-target-error stop: the job is paused with its io-status; resumed it fails again."""
    t("blockdev-backup", {**GO, "sync": "full", "on-target-error": "stop", "auto-dismiss": False})
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t("query-jobs")
    t("query-block-jobs")
    for verb in ("job-pause", "job-complete", "job-finalize", "job-dismiss"):
        t(verb, id="j")
    t("block-job-cancel", device="j")
    t("job-resume", id="j")
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t("query-block-jobs")
    t("block-job-resume", device="j")
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t("job-cancel", id="j")
    t.wait_job("j")
    t("query-jobs")
    t("job-dismiss", id="j")


@sequence(*SETUP)
def stops_by_enospc(t):
    """on-target-error enospc: another error than ENOSPC is reported, and ends the job."""
    for policy in ("enospc", "report"):
        t("blockdev-backup", {**GO, "sync": "full", "on-target-error": policy,
                              "on-source-error": "stop", "auto-dismiss": False})
        t.wait_job("j")
        t("query-jobs")
        t("job-dismiss", id="j")


@sequence(*FAR)
def guest_write_fails_to_copy(t):
    """sync none: old data that cannot be saved makes the guest's write fail, not the backup."""
    t("blockdev-backup", {**GO, "sync": "none", "auto-dismiss": False})
    t.wait_job("j", "running")
    t.settle()
    t.write("a", 0, 65536)
    t.write("a", 12 << 20, 65536)
    t.read("a", 12 << 20, 65536)
    t("query-jobs")
    t("query-block-jobs")
    t("job-cancel", id="j")
    t.wait_job("j")
    t("query-jobs")
    t("job-dismiss", id="j")
    t.write("a", 12 << 20, 65536)


@sequence(*FAR)
def guest_write_fails_during_backup(t):
    """The same while an incremental backup stands still: its chunk remains, the job fails in the end."""
    t("blockdev-backup", {**GO, "sync": "bitmap", "bitmap": "b", "bitmap-mode": "always",
                          "on-target-error": "stop", "auto-dismiss": False})
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.wait_job("j", "paused")
    t.write("a", 12 << 20, 65536)
    t.write("a", 14 << 20, 65536)
    t.nodes()
    t("job-cancel", id="j")
    t.wait_job("j")
    t("query-jobs")
    t("job-dismiss", id="j")
    t.nodes()
