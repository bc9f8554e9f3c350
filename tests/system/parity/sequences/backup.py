"""blockdev-backup and drive-backup: arguments, all combinations of sync, bitmap and bitmap-mode."""

from ..table import disk, image, nbd_server, null, sequence

GO = {"job-id": "j", "device": "a", "target": "t", "sync": "full"}
SYNCS = ("full", "top", "none", "incremental", "bitmap")
MODES = ("on-success", "never", "always")


def without(name):
    return {key: value for key, value in GO.items() if key != name}


@sequence(disk("a"), disk("t"))
def backup_arguments(t):
    """blockdev-backup: missing, unknown and wrong-typed arguments."""
    t("blockdev-backup")
    for name in ("device", "target", "sync"):
        t("blockdev-backup", without(name))
        for value in ("nosuch", "", 1, None, [], {}):
            t("blockdev-backup", {**GO, name: value})
    for name, values in (
            ("speed", ("1", -1, 1.5, None, -(1 << 63))),
            ("bitmap", (1, None, "", "nosuch")),
            ("bitmap-mode", (1, "", "nosuch", "on-success", "never", "always")),
            ("compress", ("yes", 1, None)),
            ("on-source-error", ("", "nosuch", 1)),
            ("on-target-error", ("", "nosuch", None)),
            ("auto-finalize", ("no", 0)),
            ("auto-dismiss", ("no", 1)),
            ("filter-node-name", (1, "", "a", "t", "1x", "#x", "x" * 32, "a b")),
            ("x-perf", (1, [], {"nosuch": 1}, {"use-copy-range": 1}, {"max-workers": 0},
                        {"max-workers": -1}, {"max-workers": "8"}, {"max-workers": 1 << 31},
                        {"max-workers": 1 << 40}, {"max-chunk": 1}, {"max-chunk": 4096},
                        {"max-chunk": -1}, {"max-chunk": True})),
            ("nosuch", (1,)), ("format", ("qcow2",)), ("mode", ("existing",))):
        for value in values:
            t("blockdev-backup", {**GO, name: value})
    t("query-jobs")
    t.nodes()


@sequence(disk("a"), disk("t"), nbd_server("a"))
def backup_conditional(t):
    """bitmap-mode conditional, the older word for on-success, is taken by us alone."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 65536)
    t("blockdev-backup", {**GO, "sync": "bitmap", "bitmap": "b", "bitmap-mode": "conditional",
                          "auto-finalize": False})


@sequence(disk("a"), disk("t"), disk("small", size="2M"), disk("ro", more="read-only=on"),
          disk("base"), image("ov", size=None, backing_file="base.qcow2", backing_fmt="qcow2"),
          "--blockdev",
          "qcow2,node-name=ov,file.driver=file,file.filename=$DIR/ov.qcow2,backing=base")
def backup_wrong_nodes(t):
    """Targets that are the source, too small, read-only, below the source; no backing for top."""
    t("blockdev-backup", {**GO, "target": "a"})
    t("blockdev-backup", {**GO, "target": "small"})
    t("blockdev-backup", {**GO, "target": "ro"})
    t("blockdev-backup", {**GO, "device": "ov", "target": "base"})
    t("blockdev-backup", {**GO, "device": "base", "target": "ov"})
    t.wait_job("j", "null")
    t("blockdev-backup", {**GO, "device": "base", "target": "t", "auto-finalize": False})
    t.wait_job("j", "pending")
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t("blockdev-backup", {**GO, "device": "ro", "target": "t", "auto-finalize": False})
    t.wait_job("j", "pending")
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t("query-jobs")


def one_combination(t, sync, bitmap, mode):
    arguments = {**GO, "sync": sync, "auto-finalize": False}
    if bitmap:
        arguments["bitmap"] = "b"
    if mode:
        arguments["bitmap-mode"] = mode
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 1 << 20, 65536)
    t("blockdev-backup", arguments)
    if starts(sync, bitmap, mode):
        if sync == "none":
            t.wait_job("j", "running")
            t.settle()
            t.write("a", 0, 65536)
            t("query-block-jobs")
            t("job-cancel", id="j")
        else:
            t.wait_job("j", "pending")
            t.write("a", 0, 65536)
            t("query-block-jobs")
            t("query-named-block-nodes", flat=True)
            t("job-finalize", id="j")
        t.wait_job("j", "null")
    t("query-named-block-nodes", flat=True)
    t.finish()
    t.content("t.qcow2", length=4 << 20)


def starts(sync, bitmap, mode):
    """QEMU's rules, told again."""
    if not bitmap:
        return mode is None and sync in ("full", "top", "none")
    if sync == "none" or sync == "bitmap" and not mode:
        return False
    if sync == "incremental":
        return mode in (None, "on-success")
    return mode is not None and not (mode == "never" and sync in ("full", "top"))


def combinations():
    for sync in SYNCS:
        for bitmap in (False, True):
            for mode in (None, *MODES):
                name = f"combination_{sync}_{'b' if bitmap else 'nob'}_{(mode or 'default').replace('-', '_')}"
                yield name, sync, bitmap, mode


@sequence(disk("a", data="write -P 7 0 128k"), disk("t"))
def backup_default_names(t):
    """What a backup without filter-node-name adds to the graph while it runs."""
    t.backup(end="pending", auto_finalize=False)
    t.nodes()
    t("query-named-block-nodes")
    t("query-block")
    t("query-block-jobs")
    t("query-jobs")
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.nodes()


@sequence(disk("a", data="write -P 7 0 1M"), disk("t"), nbd_server("a"))
def backup_filter_named(t):
    """A named filter: queries through it, its bitmaps, and the exports that it takes over."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 65536)
    t.backup(end="pending", auto_finalize=False, filter_node_name="cbw", bitmap="b",
             sync="incremental")
    t("query-block-exports")
    t("block-dirty-bitmap-add", node="cbw", name="x")
    t("block-dirty-bitmap-add", node="a", name="y")
    t.write("a", 1 << 20, 65536)
    t.nodes()
    t("block-dirty-bitmap-remove", node="cbw", name="x")
    t("blockdev-del", node_name="cbw")
    t("block-export-add", type="nbd", id="e2", node_name="a", name="e2")
    t("block-export-add", type="nbd", id="e3", node_name="cbw", name="e3")
    t("query-block-exports")
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t("query-block-exports")
    t.nodes()


@sequence(disk("a"), disk("t"))
def backup_values_taken(t):
    """Good values of every argument, seen in query-block-jobs while the job is pending."""
    for more in ({"speed": 0}, {"speed": (1 << 63) - 1}, {"on-source-error": "auto"},
                 {"on-target-error": "auto"}, {"on-source-error": "report"},
                 {"on-source-error": "ignore"}, {"on-source-error": "enospc"},
                 {"on-source-error": "stop"}, {"on-target-error": "report"},
                 {"on-target-error": "ignore"}, {"on-target-error": "enospc"},
                 {"on-target-error": "stop"}, {"compress": False}, {"auto-dismiss": True},
                 {"filter-node-name": "f"}, {"filter-node-name": "x" * 31}, {"x-perf": {}},
                 {"x-perf": {"use-copy-range": True}}, {"x-perf": {"use-copy-range": False}},
                 {"x-perf": {"max-workers": 1}}, {"x-perf": {"max-workers": 64}},
                 {"x-perf": {"max-chunk": 0}}, {"x-perf": {"max-chunk": 65536}},
                 {"x-perf": {"max-chunk": 1 << 30, "max-workers": 2}}):
        t("blockdev-backup", {**GO, "auto-finalize": False, **more})
        t.wait_job("j", "pending")
        t("query-block-jobs")
        t("job-finalize", id="j")
        t.wait_job("j", "null")


@sequence(disk("a", data="write -P 7 0 128k"), disk("t"), disk("f", "raw"))
def backup_compress(t):
    """compress: to qcow2; a raw target has no compression."""
    t("blockdev-backup", {**GO, "target": "f", "compress": True})
    t("blockdev-backup", {**GO, "compress": True})
    t.wait_job("j", "null", patience=10)     # one of us has no such job


@sequence(disk("base", data="write -P 1 0 1M"),
          image("top", size=None, backing_file="base.qcow2", backing_fmt="qcow2",
                data="write -P 2 512k 64k"),
          "--blockdev",
          "qcow2,node-name=top,file.driver=file,file.filename=$DIR/top.qcow2,backing=base",
          disk("t"), nbd_server("top"))
def backup_of_a_chain(t):
    """sync full and top of an overlay; a bitmap on the overlay; content of the targets."""
    t.backup(device="top", sync="top")
    t("block-dirty-bitmap-add", node="top", name="b")
    t.write("top", 2 << 20, 65536)
    t("query-block")
    t.backup(device="top", sync="incremental", bitmap="b")
    t.backup(device="top", sync="full")
    t.nodes()
    t.finish()
    t.content("t.qcow2", length=4 << 20)


@sequence(disk("a", "raw", data="write -P 3 0 64k"), disk("t", "raw"), disk("q"), null("n", more="read-zeroes=on"))
def backup_other_formats(t):
    """raw to raw, raw to qcow2, null to raw, qcow2 to null."""
    t.backup()
    t.backup(target="q")
    t.backup(device="n", target="t")
    t.backup(device="q", target="n")
    t.nodes()
    t.finish()
    t.content("q.qcow2")
    t.content("t.raw", fmt="raw")


@sequence(disk("a", data="write -P 7 0 128k"), disk("t"), nbd_server("a"))
def backup_rules_of_bitmaps(t):
    """Bitmaps that a backup refuses: disabled is fine, absent and busy are not."""
    t("block-dirty-bitmap-add", node="a", name="d", disabled=True)
    t("block-dirty-bitmap-add", node="t", name="tb")
    t.backup(sync="incremental", bitmap="d", end="pending", auto_finalize=False)
    t.nodes()
    t.write("a", 0, 65536)
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t("blockdev-backup", {**GO, "sync": "incremental", "bitmap": "tb"})
    t("blockdev-backup", {**GO, "sync": "incremental", "bitmap": "nosuch"})


@sequence(disk("a", data="write -P 7 0 128k"), disk("t"), nbd_server("a"))
def backup_bitmap_outcomes(t):
    """The bitmap after success, cancel before and after copying, for each mode."""
    t("block-dirty-bitmap-add", node="a", name="b")
    for mode in MODES:
        for end in ("finalize", "cancel"):
            t.write("a", 0, 65536)
            t.write("a", 1 << 20, 65536)
            t.backup(sync="bitmap", bitmap="b", bitmap_mode=mode, end="pending",
                     auto_finalize=False)
            t.write("a", 2 << 20, 65536)
            t(f"job-{end}", id="j")
            t.wait_job("j", "null")
            t.nodes()
            t("x-debug-block-dirty-bitmap-sha256", node="a", name="b")
            t("block-dirty-bitmap-clear", node="a", name="b")


@sequence(disk("a", data="write -P 7 0 4M"), disk("t", size="4M"), nbd_server("a"),
          mask=["BLOCK_JOB_CANCELLED.offset"])
def backup_cancel_early(t):
    """A backup cancelled while nearly nothing is copied keeps the bitmap, but for guest writes."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 4 << 20)
    for mode in ("on-success", "never"):
        t("blockdev-backup", {**GO, "sync": "bitmap", "bitmap": "b", "bitmap-mode": mode,
                              "speed": 65536})
        t.wait_job("j", "running")
        t("job-cancel", id="j")
        t.wait_job("j", "null")
        t.nodes()


@sequence(disk("a", data="write -P 7 0 128k"), image("e"), nbd_server("a"))
def drive_backup_arguments(t):
    """drive-backup: arguments, modes, formats."""
    go = {"job-id": "j", "device": "a", "target": "$DIR/new.qcow2", "sync": "full", "format": "qcow2"}
    t("drive-backup")
    for name in ("device", "target", "sync"):
        t("drive-backup", {k: v for k, v in go.items() if k != name})
    t("drive-backup", {**go, "device": "nosuch"})
    t("drive-backup", {**go, "sync": "nosuch"})
    t("drive-backup", {**go, "mode": "nosuch"})
    t("drive-backup", {**go, "mode": 1})
    t("drive-backup", {**go, "format": "nosuch"})
    t("drive-backup", {**go, "format": 1})
    t("drive-backup", {**go, "target": "$DIR/nosuch/x"})
    t("drive-backup", {**go, "target": "$DIR/nosuch", "mode": "existing"})
    t("drive-backup", {**go, "target": ""})
    t("drive-backup", {**go, "nosuch": 1})
    t("drive-backup", {**go, "target": "$DIR/a.qcow2"})
    t("drive-backup", {**go, "target": "$DIR/a.qcow2", "mode": "existing"})
    t("drive-backup", {**go, "bitmap": "nosuch", "sync": "incremental"})
    t("drive-backup", {**go, "bitmap-mode": "always"})
    t("drive-backup", go)
    t.wait_job("j", "null")
    t("drive-backup", {**go, "mode": "existing", "target": "$DIR/e.qcow2"})
    t.wait_job("j", "null")
    t("drive-backup", {**go, "mode": "existing", "target": "$DIR/e.qcow2", "format": "raw"})
    t("drive-backup", {**go, "target": "$DIR/raw", "format": "raw"})
    t.wait_job("j", "null")
    t("drive-backup", {**go, "mode": "existing", "target": "$DIR/raw", "format": "raw",
                       "auto-finalize": False})
    t.wait_job("j", "pending")
    t.nodes()
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t("drive-backup", {**go, "target": "$DIR/top.qcow2", "sync": "top"})
    t.wait_job("j", "null")
    t.finish()
    t.content("new.qcow2", length=4 << 20)
    t.content("raw", fmt="raw", length=4 << 20)
    t.check("new.qcow2")


@sequence(disk("a", data="write -P 7 0 128k"), nbd_server("a"))
def drive_backup_incremental(t):
    """The classic: a full and an incremental backup by file name, the bitmap moves on."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t("drive-backup", job_id="j", device="a", target="$DIR/full.qcow2", sync="full", format="qcow2")
    t.wait_job("j", "null")
    t.write("a", 1 << 20, 65536)
    t("drive-backup", job_id="j", device="a", target="$DIR/inc.qcow2", sync="incremental",
      bitmap="b", format="qcow2", auto_finalize=False)
    t.wait_job("j", "pending")
    t("query-jobs")
    t("query-block-jobs")
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.finish()
    t.content("inc.qcow2", length=4 << 20)


@sequence(disk("a", data="write -P 7 0 1M"), null("t", size=1 << 20))
def backup_sizes_differ(t):
    """Source and target must be of one size."""
    t("blockdev-backup", GO)
    t("query-jobs")


for _name, _sync, _bitmap, _mode in combinations():
    def _register(name, sync, bitmap, mode):
        def combination(t):
            one_combination(t, sync, bitmap, mode)
        combination.__name__ = name
        combination.__doc__ = f"sync {sync}, {'a' if bitmap else 'no'} bitmap, bitmap-mode {mode}."
        sequence(disk("a", data="write -P 7 0 128k"), disk("t"), nbd_server("a"))(combination)
    _register(_name, _sync, _bitmap, _mode)
