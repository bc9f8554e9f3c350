"""blockdev-mirror: its states, its end with and without the pivot, what is refused, what queries show."""

from ..table import disk, image, nbd_server, null, sequence

DATA = ("write -P 1 0 1M", "write -P 2 2M 300k")


def ask(t, *mask):
    t("query-jobs", mask=mask)
    t("query-block-jobs", mask=mask)


def ready(t, job="j", **more):
    """A mirror, of a to t, that has become ready."""
    t("blockdev-mirror", **{"job_id": job, "device": "a", "target": "t", "sync": "full", **more})
    t.wait_job(job, "ready")


@sequence(disk("a", data=DATA), disk("t"))
def mirror_completes(t):
    """ready, complete, pivot."""
    ready(t)
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    ask(t)
    t.nodes()
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="t")
    t.finish()
    t.content("t.qcow2")


@sequence(disk("a", data=DATA), disk("t"))
def mirror_cancelled_when_ready(t):
    """Without force: completed, nobody moves. With: cancelled."""
    ready(t)
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")
    ready(t)
    t("block-job-cancel", device="j", force=True)
    t.wait_job("j", "null")
    ready(t)
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t.nodes()


@sequence(disk("a", data=DATA), disk("t"),
          mask=["data.offset", "data.len"])
def mirror_cancelled_early(t):
    """Before it is ready every cancel is by force."""
    t("blockdev-mirror", job_id="j", device="a", target="t", sync="full", speed=65536)
    t("job-complete", id="j")
    t("block-job-complete", device="j")
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")


@sequence(disk("a", data=DATA), disk("t"))
def mirror_finalized(t):
    """waiting and pending; finalize and dismiss by hand."""
    ready(t, auto_finalize=False, auto_dismiss=False)
    t("job-finalize", id="j")
    t("job-dismiss", id="j")
    t("job-complete", id="j")
    t.wait_job("j", "pending")
    ask(t)
    t("job-complete", id="j")
    t("job-pause", id="j")
    t("job-finalize", id="j")
    t.wait_job("j", "concluded")
    ask(t)
    t("job-dismiss", id="j")
    ask(t)


@sequence(disk("a", data=DATA), disk("t"), pauses=True)
def mirror_standby(t):
    """A ready job pauses to standby; complete and cancel there."""
    ready(t)
    t("job-pause", id="j")
    t.wait_job("j", "standby")
    ask(t)
    t("job-pause", id="j")
    t("block-job-cancel", device="j")
    t("job-resume", id="j")
    t.wait_job("j", "ready")
    t("job-cancel", id="j")
    t.wait_job("j", "null")


@sequence(disk("a", data=DATA), disk("t"), nbd_server("a"))
def mirror_follows_writes(t):
    """What a guest writes is in the target; after the pivot it writes there."""
    ready(t)
    t.write("a", 0, 65536, 7)
    t.write("a", 3 << 20, 4096, 8)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.write("a", 65536, 65536, 9)
    t.read("a", 0, 1 << 20)
    t.nodes()
    t.finish()
    t.content("t.qcow2")
    t.content("a.qcow2")


@sequence(disk("a", data=DATA), disk("t"), nbd_server("a"))
def mirror_write_blocking(t):
    """copy-mode write-blocking."""
    ready(t, copy_mode="write-blocking")
    t.write("a", 0, 65536, 7)
    t.write("a", (3 << 20) + 512, 512, 8)
    t.nodes()
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.write("a", 65536, 65536, 9)
    t.finish()
    t.content("t.qcow2")
    t.content("a.qcow2")


@sequence(disk("a", data=DATA), disk("t"))
def mirror_sync_none(t):
    """Nothing is copied to begin with."""
    ready(t, sync="none")
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")


@sequence(image("base", data="write -P 3 0 2M"),
          disk("a", data="write -P 1 0 1M", backing_file="base.qcow2", backing_fmt="qcow2"),
          disk("t"))
def mirror_sync_top(t):
    """Only what the top image has."""
    ready(t, sync="top")
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.finish()
    t.content("t.qcow2")


@sequence(image("base", data="write -P 3 0 2M"),
          disk("a", data="write -P 1 0 1M", backing_file="base.qcow2", backing_fmt="qcow2"),
          disk("t", fmt="raw", more="discard=unmap", file_more="discard=unmap"))
def mirror_to_raw(t):
    """A raw target that can be zeroed cheaply."""
    ready(t)
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.finish()
    t.content("t.raw", fmt="raw")


@sequence(disk("a", data=DATA), disk("t", more="discard=unmap", file_more="discard=unmap"))
def mirror_to_unmapping(t):
    """A qcow2 target that can be zeroed cheaply: only what is allocated counts."""
    ready(t)
    ask(t)
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")


@sequence(disk("a", data=DATA), disk("t"), disk("small", size="1M"))
def mirror_of_other_size(t):
    """Found out by the job itself."""
    t("blockdev-mirror", job_id="j", device="a", target="small", sync="full", auto_dismiss=False)
    t.wait_job("j", "concluded")
    ask(t)
    t("job-dismiss", id="j")


@sequence(disk("a", size="0"), disk("t", size="0"))
def mirror_of_nothing(t):
    """An empty disk is ready at once."""
    ready(t)
    ask(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")


@sequence(disk("a", data=DATA), disk("t"), disk("u", more="read-only=on"),
          image("base"), nbd_server("t"))
def mirror_refused(t):
    """What the command says of its arguments."""
    m = {"device": "a", "target": "t", "job_id": "j", "sync": "full"}
    t("blockdev-mirror")
    for left_out in ("device", "target", "sync"):
        t("blockdev-mirror", **{k: v for k, v in m.items() if k != left_out})
    for more in ({"device": "x"}, {"target": "x"}, {"device": ""}, {"sync": "some"},
                 {"granularity": 511}, {"granularity": 1000}, {"granularity": 128 << 20},
                 {"granularity": -1}, {"buf_size": -1}, {"speed": -1}, {"job_id": "0"},
                 {"copy_mode": "x"}, {"on_source_error": "x"}, {"on_target_error": "x"},
                 {"target": "a"}, {"replaces": "x"}, {"replaces": "t"}, {"filter_node_name": "t"},
                 {"filter_node_name": "0"}, {"target": "u"}, {"device": 1}, {"more": 1},
                 {"unmap": True}):
        t("blockdev-mirror", **{**m, **more})
    t("blockdev-mirror", **m)    # its target is a guest's
    t("query-jobs")


@sequence(disk("a", data=DATA), disk("t"), disk("u"), disk("v"))
def mirror_keeps_others_away(t):
    """What can not be done with the nodes of a ready mirror."""
    ready(t, filter_node_name="f")
    t("blockdev-mirror", job_id="k", device="a", target="u", sync="full")
    t("blockdev-mirror", job_id="k", device="u", target="t", sync="full")
    t("blockdev-mirror", job_id="k", device="u", target="a", sync="full")
    t("blockdev-backup", job_id="k", device="a", target="u", sync="full")
    t("blockdev-backup", job_id="k", device="u", target="t", sync="full")
    t("blockdev-mirror", job_id="j", device="u", target="v", sync="full")
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="t")
    t("blockdev-del", node_name="f")
    t("block_resize", node_name="t", size=8 << 20)
    t("block-export-add", type="nbd", id="e", node_name="t")
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")
    t("blockdev-del", node_name="t")


@sequence(disk("a", data=DATA, file_node="a-file"), disk("t", fmt="raw"))
def mirror_replaces(t):
    """replaces: the source itself is all that can be named here."""
    ready(t, replaces="a")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t("blockdev-mirror", job_id="j", device="a", target="t", sync="full", replaces="a-file")


@sequence(disk("a", data=DATA), disk("t"), disk("u", size="8M"), disk("v", size="4M"),
          "--object", "throttle-group,id=g", "--blockdev",
          "throttle,node-name=over,throttle-group=g,file=a", nbd_server("over"))
def drive_mirror_replaces_below(t):
    """replaces names the disk below the source, which is a filter of the user's: what the guest uses
    stays above, and writes to the target through it."""
    m = {"job_id": "j", "device": "over", "sync": "full"}
    t("blockdev-mirror", **m, target="t", replaces="v")     # another disk
    t("blockdev-mirror", **m, target="u", replaces="a", auto_dismiss=False)
    t.wait_job("j", "concluded")
    ask(t)
    t("job-dismiss", id="j")
    ready(t, device="over", replaces="a")
    t.nodes()
    t("blockdev-del", node_name="a")
    t.write("over", 0, 65536, 7)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t("query-block-exports")
    t.write("over", 65536, 65536, 9)
    t("blockdev-del", node_name="t")
    t("blockdev-del", node_name="a")
    ready(t, device="over", target="v", replaces="t")
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")
    t("drive-mirror", job_id="j", device="over", target="$DIR/new.qcow2", sync="full",
      format="qcow2", node_name="new", replaces="t")
    t.wait_job("j", "ready")
    t("block-job-complete", device="j")
    t.wait_job("j", "null")
    t.nodes()
    t.write("over", 1 << 20, 65536, 5)
    t.finish()
    t.content("a.qcow2")
    t.content("t.qcow2")
    t.content("v.qcow2")
    t.content("new.qcow2")


@sequence(disk("a", data=DATA), disk("t"), nbd_server("a"))
def mirror_shows_its_bitmap(t):
    """The nodes while it runs: its filter and its nameless dirty bitmap."""
    for more in ({}, {"filter_node_name": "f"}, {"granularity": 4096},
                 {"copy_mode": "write-blocking", "granularity": 1048576}):
        ready(t, **more)
        t.nodes()
        t("query-block")
        t("block-job-cancel", device="j", force=True)
        t.wait_job("j", "null")


@sequence(disk("a", data=DATA), null("t", size=4 << 20))
def mirror_to_null(t):
    """A target that keeps nothing."""
    ready(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()


@sequence(disk("a", data=DATA), disk("r", fmt="raw", data="write -P 5 0 64k"))
def drive_mirror_full(t):
    """A new file, in the source's format or another; it takes the source's place."""
    t("drive-mirror", device="nosuch", target="$DIR/x", sync="full")
    t("drive-mirror", job_id="j", device="a", target="$DIR/new.qcow2", sync="full", node_name="new")
    t.wait_job("j", "ready")
    ask(t)
    t.nodes()
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")
    t("drive-mirror", job_id="j", device="a", target="$DIR/new.raw", sync="full", format="raw",
      replaces="a")
    t("drive-mirror", job_id="j", device="a", target="$DIR/new.raw", sync="full", format="raw")
    t.wait_job("j", "ready")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t("drive-mirror", job_id="j", device="r", target="$DIR/r2", sync="top", unmap=False)
    t.wait_job("j", "ready")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t("drive-mirror", job_id="j", device="r", target="$DIR/nosuch/x", sync="full")
    t("drive-mirror", job_id="j", device="r", target="$DIR/x", sync="full", format="nosuch")
    t("drive-mirror", job_id="j", device="r", target="$DIR/x", sync="full", mode="existing")
    t.finish()
    t.content("new.qcow2")
    t.content("new.raw", fmt="raw")


@sequence(disk("a", data=DATA), disk("u"), image("there", size="2M"), nbd_server("u"))
def drive_mirror_refused(t):
    """What the command says of its arguments: missing, of a wrong type, unknown, out of range."""
    m = {"job_id": "j", "device": "a", "target": "$DIR/x.qcow2", "sync": "full"}
    t("drive-mirror")
    for left_out in ("device", "target", "sync"):
        t("drive-mirror", **{k: v for k, v in m.items() if k != left_out})
    strings = ("job_id", "device", "target", "format", "node_name", "replaces", "sync", "mode",
               "on_source_error", "on_target_error", "copy_mode")
    for name in strings:
        for value in (1, True, None, ["x"], {"x": 1}):
            t("drive-mirror", **{**m, name: value})
    for name in ("speed", "granularity", "buf_size"):
        for value in ("1", True, None, 1.5, [1]):
            t("drive-mirror", **{**m, name: value})
    for name in ("unmap", "auto_finalize", "auto_dismiss"):
        for value in ("on", 1, None, [True]):
            t("drive-mirror", **{**m, name: value})
    for more in ({"more": 1}, {"filter_node_name": "f"}, {"backing": "u"}, {"Device": "a"}):
        t("drive-mirror", **{**m, **more})
    for more in ({"device": ""}, {"device": "nosuch"}, {"sync": "some"}, {"sync": ""},
                 {"mode": "new"}, {"copy_mode": "x"}, {"on_source_error": "x"},
                 {"on_target_error": "x"}, {"format": "nosuch"}, {"format": ""},
                 {"granularity": 511}, {"granularity": 1000}, {"granularity": 128 << 20},
                 {"granularity": -1}, {"granularity": 1 << 32}, {"buf_size": -1},
                 {"buf_size": 1 << 63}, {"speed": -1}, {"speed": 1 << 63}, {"job_id": "0"},
                 {"job_id": ""}, {"node_name": "0"}, {"node_name": "u"}, {"node_name": ""},
                 {"replaces": "a"}, {"replaces": "u", "node_name": "n"},
                 {"replaces": "nosuch", "node_name": "n"}, {"target": "$DIR/nosuch/x"},
                 {"target": "$DIR/nosuch.qcow2", "mode": "existing"},
                 {"target": "$DIR/a.qcow2", "mode": "existing"},
                 {"target": "$DIR/u.qcow2", "mode": "existing"},
                 {"target": ""}, {"target": "nosuch:x"}):
        t("drive-mirror", **{**m, **more})
    t("drive-mirror", **{**m, "target": "$DIR/there.qcow2", "mode": "existing",
                         "auto_dismiss": False})
    t.wait_job("j", "concluded")
    ask(t)
    t("job-dismiss", id="j")
    t("query-jobs")


@sequence(image("base", data="write -P 3 0 2M"), image("t", data="write -P 9 0 3M"),
          disk("a", data="write -P 1 512k 1M", backing_file="base.qcow2", backing_fmt="qcow2"))
def drive_mirror_backing(t):
    """What stands behind the target at the end."""
    for sync, end in (("top", "block-job-cancel"), ("none", "block-job-cancel"),
                      ("full", "block-job-cancel"), ("top", "block-job-complete")):
        t("drive-mirror", job_id="j", device="a", target=f"$DIR/{sync}.qcow2", sync=sync,
          node_name="new")
        t.wait_job("j", "ready")
        t(end, device="j")
        t.wait_job("j", "null")
        t.nodes()
    t.finish()
    for sync in ("top", "full"):
        t.content(f"{sync}.qcow2")


@sequence(image("base", data="write -P 3 0 2M"), image("t", data="write -P 9 0 3M"),
          disk("a", data="write -P 1 512k 1M", backing_file="base.qcow2", backing_fmt="qcow2"))
def drive_mirror_existing(t):
    """A file that is there."""
    t("drive-mirror", job_id="j", device="a", target="$DIR/t.qcow2", sync="full", mode="existing",
      format="qcow2")
    t.wait_job("j", "ready")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.finish()
    t.content("t.qcow2")


@sequence(disk("a", data=DATA), disk("t"))
def mirror_at_the_end(t):
    """The daemon ends while a mirror is ready."""
    ready(t)
    t.finish()


@sequence(disk("a", data=DATA, more="read-only=on"), disk("t", idle=True),
          disk("b", fmt="raw", more="read-only=on"), disk("u", fmt="raw", file_node="u-file"))
def mirror_of_a_read_only_disk(t):
    """What takes the place of a read-only disk becomes read-only, and its file with it."""
    ready(t)
    t("block-job-cancel", device="j")
    t.wait_job("j", "null")
    t.nodes()
    ready(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t("blockdev-mirror", job_id="k", device="a", target="t", sync="full")
    t("blockdev-mirror", job_id="k", device="b", target="u", sync="full", auto_finalize=False)
    t.wait_job("k", "ready")
    t("job-complete", id="k")
    t.wait_job("k", "pending")
    t("job-finalize", id="k")
    t.wait_job("k", "null")
    t.nodes()
    t("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "t", "read-only": False,
                                   "file": {"driver": "file", "filename": "$DIR/t.qcow2"}}])
    t("block-dirty-bitmap-add", node="t", name="b")
    t("blockdev-del", node_name="u")
    t.nodes()


@sequence(disk("a", data=DATA), disk("t"), nbd_server("a"))
def drive_mirror_and_snapshots(t):
    """A disk that is mirrored takes no snapshot; the target does when it has taken its place, and the
    snapshot can be mirrored, alone and whole."""
    def snapshot(node, overlay):
        t("blockdev-snapshot-sync", node_name=node, snapshot_file=f"$DIR/{overlay}.qcow2",
          snapshot_node_name=overlay)
    ready(t, filter_node_name="f")
    snapshot("a", "o1")
    snapshot("f", "o1")
    snapshot("t", "o1")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    snapshot("t", "o2")
    t.write("a", 0, 65536, 9)
    t("drive-mirror", job_id="j", device="o2", target="$DIR/top.qcow2", sync="top")
    t.wait_job("j", "ready")
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.write("a", 1 << 20, 65536, 8)
    t.read("a", 0, 2 << 20)
    t.nodes()
    t.finish()
    t.content("top.qcow2")


@sequence(disk("a", data=DATA), disk("t"), disk("u"))
def mirror_chained(t):
    """From a to t, and from there to u, which is then mirrored back."""
    ready(t)
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t("blockdev-mirror", job_id="k", device="t", target="u", sync="full")
    t.wait_job("k", "ready")
    t("job-complete", id="k")
    t.wait_job("k", "null")
    t("blockdev-mirror", job_id="l", device="u", target="a", sync="full")
    t.wait_job("l", "ready")
    t("block-job-cancel", device="l")
    t.wait_job("l", "null")
    t.nodes()
    t.finish()
    t.content("u.qcow2")


@sequence(image("base", data="write -P 3 0 2M"),
          disk("a", data="write -P 1 512k 1M", backing_file="base.qcow2", backing_fmt="qcow2"),
          nbd_server("a"))
def drive_mirror_with_a_guest(t):
    """sync none and top with a guest: the source, or its backing image, is behind the target then."""
    for sync, end in (("none", "block-job-cancel"), ("top", "block-job-cancel"),
                      ("none", "block-job-complete")):
        t("drive-mirror", job_id="j", device="a", target=f"$DIR/{sync}.qcow2", sync=sync)
        t.wait_job("j", "ready")
        t.write("a", 65536 * 3, 512, 0x44)
        t.write("a", 0, 65536, 0x45)
        t(end, device="j")
        t.wait_job("j", "null")
        t.write("a", 65536 * 5, 4096, 0x46)
        t.read("a", 0, 1 << 20)
    t.nodes()
    t.finish()
    t.content("none.qcow2")
    t.content("a.qcow2")
