"""blkdebug and throttle: their options, good and bad, and jobs over disks that fail or are slow."""

from ..table import disk, image, nbd_server, null, sequence

BLOCK = {"driver": "blkdebug", "node_name": "b"}


def tried(t, **options):
    """Opens, looks and closes; a refusal is repeated by blockdev-del's."""
    t("blockdev-add", **BLOCK, **options)
    t.nodes()
    t("blockdev-del", node_name="b")


# -- blkdebug: options


@sequence(disk("a", "raw", file_node="f"))
def blkdebug_image(t):
    """The image: by name, described, missing, wrong; the node's file name."""
    tried(t, image="a")
    tried(t, image="f")
    tried(t, image={"driver": "null-co", "size": 1 << 20})
    tried(t, image={"driver": "null-co"})
    t("blockdev-add", **BLOCK)
    t("blockdev-add", **BLOCK, file="a")
    t("blockdev-add", **BLOCK, image="nosuch")
    t("blockdev-add", **BLOCK, image=1)
    t("blockdev-add", **BLOCK, image={"driver": "nosuch"})
    t("blockdev-add", **BLOCK, image="a", nosuch=1)
    t("blockdev-add", driver="raw", node_name="r", file={"driver": "blkdebug", "image": "f"})
    t.nodes()


def _sizes(name, values):
    def run(t):
        for value in values:
            tried(t, image="a", **{name: value})
    run.__name__ = f"blkdebug_{name.replace('-', '_')}"
    run.__doc__ = f"blkdebug's {name}: possible and not."
    sequence(disk("a", "raw"))(run)


for _name in ("align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"):
    _sizes(_name, (0, 512, 513, 4096, 3, -1, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40, "512"))


@sequence(disk("a", "raw"))
def blkdebug_sizes_together(t):
    """Each limit is held against the alignment and against the limit that it is a multiple of."""
    tried(t, image="a", align=4096, max_transfer=512)
    tried(t, image="a", align=4096, max_transfer=12288)
    tried(t, image="a", align=4096, opt_write_zero=512)
    tried(t, image="a", opt_write_zero=8192, max_write_zero=4096)
    tried(t, image="a", opt_write_zero=12288, max_write_zero=24576)
    tried(t, image="a", align=4096, opt_discard=512)
    tried(t, image="a", opt_discard=8192, max_discard=4096)
    tried(t, image="a", opt_discard=12288, max_discard=24576)


@sequence(disk("a", "raw"))
def blkdebug_rules(t):
    """Rules: what must be said, and what it may be."""
    for rule in ({}, {"event": "nosuch"}, {"event": 1}, {"event": "none", "nosuch": 1}, "none",
                 {"event": "none", "iotype": "nosuch"}, {"event": "none", "once": 1},
                 {"event": "none", "errno": "EIO"}, {"event": "none", "sector": "1"}):
        t("blockdev-add", **BLOCK, image="a", inject_error=[rule])
    t("blockdev-add", **BLOCK, image="a", inject_error=[])
    t("blockdev-add", **BLOCK, image="a", inject_error={"event": "none"})
    t("blockdev-add", **BLOCK, image="a", set_state=[])
    for rule in ({}, {"event": "none"}, {"new_state": 1}, {"event": "none", "new_state": "2"},
                 {"event": "none", "new_state": 2, "errno": 5}):
        t("blockdev-add", **BLOCK, image="a", set_state=[rule])
    for rule in ({"event": "l2_load"}, {"event": "none", "state": 2}):
        tried(t, image="a", inject_error=[rule])
    for kind in ("read", "write", "write-zeroes", "discard", "block-status"):
        tried(t, image="a", inject_error=[{"event": "write_aio", "iotype": kind}])
    tried(t, image="a", set_state=[{"event": "write_aio", "new_state": 2}])


@sequence(disk("a", "raw"))
def blkdebug_events(t):
    """Every event that QEMU knows may be named."""
    for event in """l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
            l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed
            write_aio write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load reftable_grow
            reftable_update refblock_load refblock_update refblock_update_part refblock_alloc
            refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks refblock_alloc_write_table
            refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes cluster_free flush_to_os flush_to_disk
            pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
            pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write
            cluster_alloc_space none""".split():
        t("blockdev-add", **BLOCK, image="a", set_state=[{"event": event, "new_state": 2}])
        t("blockdev-del", node_name="b")


@sequence(disk("a", "raw"))
def blkdebug_config(t):
    """The configuration file: good ones, and what is refused."""
    texts = {
        "good": '# rules\n\n[inject-error]\nevent = "l2_load"\nerrno = "28"\n[set-state]\nevent = "none"\n'
                'new_state = "2"\n',
        "empty": "", "comment": "# nothing\n", "nosuch-group": '[nosuch]\nevent = "none"\n',
        "nosuch-event": '[inject-error]\nevent = "nosuch"\n', "no-event": '[inject-error]\nerrno = "5"\n',
        "no-group": 'event = "none"\n', "no-spaces": '[inject-error]\nevent="none"\n',
        "no-number": '[inject-error]\nevent = "none"\nerrno = "x"\n',
        "no-switch": '[inject-error]\nevent = "none"\nonce = "1"\n',
        "blanks": "[inject-error]\n \n", "iotype": '[inject-error]\nevent = "none"\niotype = "x"\n',
    }

    def write(where):
        for name, text in texts.items():
            (where / name).write_text(text)
        return True
    t.tool("write", write)
    for name in texts:
        tried(t, image="a", config=f"$DIR/{name}")
    t("blockdev-add", **BLOCK, image="a", config="$DIR/nosuch")
    tried(t, image="a", config="$DIR/good", align=512)


@sequence(disk("a", "raw", file_node="f"), null("n"))
def blkdebug_perms(t):
    """take-child-perms and unshare-child-perms."""
    t("blockdev-add", **BLOCK, image="n", take_child_perms=["nosuch"])
    t("blockdev-add", **BLOCK, image="n", take_child_perms=[])
    t("blockdev-add", **BLOCK, image="n", unshare_child_perms=[])
    t("blockdev-add", **BLOCK, image="n", take_child_perms="write")
    tried(t, image="n", take_child_perms=["write", "consistent-read", "resize", "write-unchanged"])
    t("blockdev-add", **BLOCK, image="n", take_child_perms=["write"], unshare_child_perms=["write"])
    t("blockdev-add", driver="blkdebug", node_name="c", image="n", take_child_perms=["write"])
    t("blockdev-add", driver="blkdebug", node_name="c", image="n")
    t("blockdev-del", node_name="c")
    t("blockdev-del", node_name="b")
    t("blockdev-add", **BLOCK, image="f", unshare_child_perms=["consistent-read"])
    t("blockdev-add", **BLOCK, image="f", unshare_child_perms=["write", "resize"])


@sequence(disk("a", "raw"), disk("o", "raw"))
def blkdebug_reopen(t):
    """What a reopen may say: the same again."""
    rules = [{"event": "l2_load", "errno": 28}]
    t("blockdev-add", **BLOCK, image="a", align=512, inject_error=rules)
    same = {"driver": "blkdebug", "node-name": "b", "image": "a", "align": 512, "inject-error": rules}
    t("blockdev-reopen", options=[same])
    t("blockdev-reopen", options=[{**same, "align": 4096}])
    t("blockdev-reopen", options=[{**same, "image": "o"}])
    t("blockdev-reopen", options=[{**same, "inject-error": [{"event": "l2_load", "errno": 5}]}])
    t("blockdev-reopen", options=[{k: v for k, v in same.items() if k != "align"}])
    t("blockdev-reopen", options=[{**same, "read-only": True}])
    t("blockdev-reopen", options=[{**same, "max-transfer": 512}])
    t.nodes()


@sequence("--blockdev", "driver=null-co,node-name=n,size=1M,read-zeroes=on",
          "--blockdev", "blkdebug,node-name=b,image=n,align=512,inject-error.0.event=none,"
          "inject-error.0.iotype=write,set-state.0.event=pwritev,set-state.0.new_state=2",
          nbd_server("b"))
def blkdebug_on_the_command_line(t):
    """Lists in keyval; a guest's writes fail."""
    t.nodes()
    t.write("b", 0, 4096)
    t.read("b", 0, 4096)
    t.extents("b", "base:allocation")


# -- blkdebug: guests and jobs


def failing(kind, **more):
    """An image whose requests of KIND fail at 2 MiB."""
    return [{"event": "none", "iotype": kind, "sector": 4096, **more}]


@sequence(disk("a", "raw", data="write -P 1 0 4M"), "--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock")
def blkdebug_guest(t):
    """A guest meets errors at one place. (A read that fails ends a client's session in QEMU.)"""
    rules = [*failing("write", errno=28), *failing("write-zeroes"), *failing("discard")]
    t("blockdev-add", driver="blkdebug", node_name="b", image="a", discard="unmap", inject_error=rules)
    t("block-export-add", type="nbd", id="e", node_name="b", name="b", writable=True)
    for at in (0, 2 << 20, (2 << 20) + 512):
        t.write("b", at, 512)
        t.read("b", at, 512)
        t.zero("b", at, 512)
        t.trim("b", at, 512)


SOURCE = disk("a", "raw", data="write -P 1 0 4M")
GO = {"job-id": "j", "sync": "full", "x-perf": {"max-workers": 1}, "auto-dismiss": False}


def source_fails(t, policy, **rule):
    t("blockdev-add", driver="blkdebug", node_name="b", image="a", inject_error=failing("read", **rule))
    t("blockdev-backup", {**GO, "device": "b", "target": "t", **policy})


def target_fails(t, policy, **rule):
    t("blockdev-add", driver="blkdebug", node_name="b", image="t", inject_error=failing("write", **rule))
    t("blockdev-backup", {**GO, "device": "a", "target": "b", **policy})


def _policies(where, fails, option):
    for error in (5, 28):
        for policy in ("report", "ignore", "enospc", "stop", "auto", "nosuch"):
            def run(t, error=error, policy=policy):
                fails(t, {option: policy}, errno=error, once=True)
                if policy == "nosuch":
                    t("query-jobs")
                    return
                stops = policy == "stop" or (policy in ("enospc", "auto") and error == 28)
                if stops:
                    t.wait("BLOCK_JOB_ERROR", device="j")
                    t.settle()
                    t("query-block-jobs", mask=["return[*].io-status"] if policy == "auto" else [])
                    t("block-job-resume", device="j")
                t.wait_job("j")
                t("query-jobs")
                t("query-block-jobs")
                t("job-dismiss", id="j")
                t.content("t.raw", fmt="raw", length=4 << 20) if not stops else None
            run.__name__ = f"error_{error}_at_{where}_{policy}"
            run.__doc__ = f"{option}={policy}, errno {error}, once."
            sequence(SOURCE, disk("t", "raw"))(run)


_policies("source", source_fails, "on-source-error")
_policies("target", target_fails, "on-target-error")


@sequence(SOURCE, disk("t", "raw"))
def error_at_target_twice(t):
    """stop: resumed while the target still fails, the job stops again; then it is cancelled."""
    target_fails(t, {"on-target-error": "stop"})
    for _ in range(2):
        t.wait("BLOCK_JOB_ERROR", device="j")
        t.settle()
        t("block-job-resume", device="j")
    t.wait("BLOCK_JOB_ERROR", device="j")
    t.settle()
    t("block-job-cancel", device="j", force=True)
    t.wait_job("j")
    t("query-jobs")


@sequence(disk("a", data="write -P 1 0 4M"), image("t"))
def error_in_targets_metadata(t):
    """A qcow2 target whose tables cannot be written."""
    t("blockdev-add", driver="qcow2", node_name="t",
      file={"driver": "blkdebug", "image": {"driver": "file", "filename": "$DIR/t.qcow2"},
            "inject-error": [{"event": "cluster_alloc", "errno": 28, "iotype": "write"}]})
    t("blockdev-backup", {**GO, "device": "a", "target": "t"})
    t.wait_job("j")
    t("query-jobs", mask=["return[*].current-progress"])
    t("job-dismiss", id="j")


# -- throttle


def group(t, name="g", **more):
    t("object-add", qom_type="throttle-group", id=name, **more)


@sequence()
def throttle_group_limits(t):
    """object-add: each limit, and what does not go together."""
    cases = [{}, {"bps-total": 1}, {"bps-total": -1}, {"bps-total": "1"}, {"bps-total": 1, "bps-read": 1},
             {"bps-total": 1, "bps-write": 1}, {"bps-read": 1, "bps-write": 1}, {"iops-total": 1, "iops-read": 1},
             {"iops-read": 1, "iops-write": 1}, {"bps-total": 10, "bps-total-max": 5},
             {"bps-total": 10, "bps-total-max": 20}, {"bps-total-max": 5}, {"bps-total-max-length": 5},
             {"bps-total": 1, "bps-total-max-length": 0}, {"iops-size": 5}, {"iops-size": 5, "iops-read": 1},
             {"bps-total": 10**15}, {"bps-total": 10**15 + 1}, {"iops-write": 10**15 + 1}, {"nosuch": 1},
             {"bps-read": 1, "bps-read-max": 2, "bps-read-max-length": (1 << 32) - 1},
             {"bps-read": 1, "bps-read-max": 2, "bps-read-max-length": 1 << 32},
             {"bps-total": 1, "bps-total-max": 10**14, "bps-total-max-length": 11},
             {"iops-read": 1, "iops-read-max-length": -1}, {"iops-total": 1, "iops-total-max": 1 << 40}]
    for limits in cases:
        group(t, limits=limits)
        t("object-del", id="g")
    group(t, limits=1)
    group(t)
    group(t)
    t("object-del", id="g")


@sequence()
def throttle_group_properties(t):
    """The x- members, alone and beside limits."""
    names = [f"x-{what}-{way}{more}" for what in ("bps", "iops") for way in ("total", "read", "write")
             for more in ("", "-max", "-max-length")] + ["x-iops-size"]
    for name in names:
        for value in (0, 5, -1, 1 << 32, "5"):
            group(t, **{name: value})
            t("object-del", id="g")
    for more in ({"x-bps-total": 1, "x-bps-read": 1}, {"x-bps-total": 10, "limits": {"bps-read": 10}},
                 {"x-iops-total": 10, "limits": {"bps-read": 10}}, {"x-bps-total-max": 5, "limits": {"bps-total": 3}},
                 {"x-bps-total-max": 5, "limits": {"bps-total": 30}}, {"x-nosuch": 1}):
        group(t, **more)
        t("object-del", id="g")


@sequence(disk("a", "raw", file_node="f"))
def throttle_nodes(t):
    """The filter: its group and its file, good, missing, wrong; a group in use."""
    group(t)
    t("object-add", qom_type="iothread", id="i")
    t("blockdev-add", driver="throttle", node_name="t")
    t("blockdev-add", driver="throttle", node_name="t", file="a")
    t("blockdev-add", driver="throttle", node_name="t", throttle_group="g")
    for name in ("nosuch", "i", "", 1):
        t("blockdev-add", driver="throttle", node_name="t", file="a", throttle_group=name)
    t("blockdev-add", driver="throttle", node_name="t", file="nosuch", throttle_group="nosuch")
    t("blockdev-add", driver="throttle", node_name="t", file="a", throttle_group="g", nosuch=1)
    t("blockdev-add", driver="throttle", node_name="t", file="a", throttle_group="g")
    t.nodes()
    t("object-del", id="g")
    t("block_resize", node_name="t", size=8 << 20)
    t("blockdev-add", driver="qcow2", node_name="q", file="t")
    t("blockdev-add", driver="throttle", node_name="u", file="f", throttle_group="g")
    t("blockdev-del", node_name="u")
    t("blockdev-del", node_name="t")
    t("object-del", id="g")


@sequence(disk("a", "raw"), disk("o", "raw"))
def throttle_reopen(t):
    """Another group for a node that is open."""
    group(t)
    group(t, "h", limits={"bps-total": 1 << 20})
    t("blockdev-add", driver="throttle", node_name="t", file="a", throttle_group="g")
    same = {"driver": "throttle", "node-name": "t", "file": "a", "throttle-group": "g"}
    t("blockdev-reopen", options=[same])
    t("blockdev-reopen", options=[{**same, "throttle-group": "nosuch"}])
    t("blockdev-reopen", options=[{k: v for k, v in same.items() if k != "throttle-group"}])
    t("blockdev-reopen", options=[{**same, "throttle-group": "h"}])
    t.nodes()
    t("object-del", id="g")
    t("object-del", id="h")
    t("blockdev-reopen", options=[{**same, "throttle-group": "h", "read-only": True}])
    t.nodes()


@sequence(disk("a", data="write -P 1 0 1M"), image("t"), "--object",
          "throttle-group,id=g,limits.bps-total=100000000,x-iops-total=10000",
          "--blockdev", "throttle,node-name=ta,file=a,throttle-group=g", nbd_server("ta"))
def throttle_guest_and_job(t):
    """A guest and a backup through a group's limits; --object with limits."""
    t("object-del", id="g")
    t.write("ta", 0, 65536)
    t.read("ta", 0, 65536)
    t.extents("ta", "base:allocation")
    t("blockdev-add", driver="qcow2", node_name="t",
      file={"driver": "throttle", "throttle-group": "g",
            "file": {"driver": "file", "filename": "$DIR/t.qcow2"}})
    t.backup(device="ta", target="t")
    t("blockdev-del", node_name="t")
    t.check("t")


@sequence(start=False)
def throttle_command_line(t):
    """--object throttle-group: limits that are refused."""
    for options in ("throttle-group", "throttle-group,id=g,limits.bps-total=x",
                    "throttle-group,id=g,limits.bps-total=-1", "throttle-group,id=g,x-bps-total=1,x-bps-read=1",
                    "throttle-group,id=g,nosuch=1", "throttle-group,id=1"):
        t.run("--object", options)
    t.run("--object", "throttle-group,id=g", "--blockdev",
          "throttle,node-name=t,throttle-group=nosuch,file.driver=null-co")


# -- mirror over disks that fail


MIRROR = {"job-id": "j", "sync": "full", "auto-dismiss": False}


def _mirrors(where, kind, option):
    for policy in ("report", "ignore", "stop"):
        def run(t, policy=policy):
            name = "a" if where == "source" else "t"
            t("blockdev-add", driver="blkdebug", node_name="b", image=name,
              inject_error=failing(kind, errno=28, once=True))
            ends = {"device": "b", "target": "t"} if where == "source" else {"device": "a", "target": "b"}
            t("blockdev-mirror", {**MIRROR, **ends, option: policy})
            if policy == "stop":
                t.wait("BLOCK_JOB_ERROR", device="j")
                t.settle()
                t("block-job-resume", device="j")
            if policy != "report":
                t.wait("BLOCK_JOB_READY", device="j")
                t("block-job-cancel", device="j")
            t.wait_job("j")
            t("query-jobs")
            t("job-dismiss", id="j")
            if policy != "report":
                t.content("t.raw", fmt="raw", length=4 << 20)
        run.__name__ = f"mirror_error_at_{where}_{policy}"
        run.__doc__ = f"A mirror, ENOSPC once, {option}={policy}."
        sequence(SOURCE, disk("t", "raw"))(run)


_mirrors("source", "read", "on-source-error")
_mirrors("target", "write", "on-target-error")
