"""transaction: all or nothing at preparation, in order; groups of jobs."""

from ..table import disk, nbd_server, null, sequence

BADD, BDEL, BCLEAR = "block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-clear"
BENABLE, BDISABLE, BMERGE = ("block-dirty-bitmap-enable", "block-dirty-bitmap-disable",
                             "block-dirty-bitmap-merge")
BACKUP = "blockdev-backup"


@sequence(disk("a"), disk("t"))
def transaction_arguments(t):
    """What is not a transaction."""
    t("transaction")
    for actions in (1, "x", None, {}, [1], [None], [{}], [{"type": "nosuch", "data": {}}],
                    [{"type": "abort"}], [{"data": {}}], [{"type": 1, "data": {}}],
                    [{"type": BADD}], [{"type": BADD, "data": {}}], [{"type": BADD, "data": 1}],
                    [{"type": BADD, "data": {"node": "a"}}],
                    [{"type": BADD, "data": {"node": "a", "name": "b", "nosuch": 1}}],
                    [{"type": BADD, "data": {"node": "a", "name": "b"}, "more": 1}],
                    [{"type": BACKUP, "data": {"device": "a"}}],
                    [{"type": "abort", "data": {"x": 1}}],
                    [{"type": "abort", "data": {}}],
                    [{"type": "eject", "data": {}}], []):
        t("transaction", actions=actions)
    good = [{"type": BADD, "data": {"node": "a", "name": "b"}}]
    for properties in (1, None, [], {"nosuch": 1}, {"completion-mode": "nosuch"},
                       {"completion-mode": 1}, {}):
        t("transaction", actions=good, properties=properties)
        t(BDEL, node="a", name="b")
    t("transaction", actions=good, properties={"completion-mode": "individual"})
    t("transaction", actions=good, nosuch=1)
    t.nodes()


@sequence(disk("a"), disk("b"), nbd_server("a"))
def transaction_of_bitmaps(t):
    """Bitmap actions: each sees those before it; one that fails undoes all."""
    t.tx((BADD, {"node": "a", "name": "x"}), (BADD, {"node": "a", "name": "y", "disabled": True}))
    t.write("a", 0, 65536)
    t.nodes()
    t.tx((BENABLE, {"node": "a", "name": "y"}), (BMERGE, {"node": "a", "target": "y", "bitmaps": ["x"]}),
         (BCLEAR, {"node": "a", "name": "x"}), (BDISABLE, {"node": "a", "name": "x"}))
    t.nodes()
    t.tx((BCLEAR, {"node": "a", "name": "y"}), (BENABLE, {"node": "a", "name": "x"}),
         (BADD, {"node": "a", "name": "z"}), (BMERGE, {"node": "a", "target": "x", "bitmaps": ["y"]}),
         ("abort", {}))
    t.nodes()
    t.tx((BDEL, {"node": "a", "name": "y"}), ("abort", {}))
    t.nodes()
    t.tx((BMERGE, {"node": "a", "target": "x", "bitmaps": ["y"]}), (BCLEAR, {"node": "a", "name": "nosuch"}))
    t.tx((BADD, {"node": "a", "name": "y"}))
    t.tx((BADD, {"node": "a", "name": "w"}), (BADD, {"node": "a", "name": "w"}))
    t.tx((BADD, {"node": "a", "name": "w"}), (BDEL, {"node": "a", "name": "w"}))
    t.tx((BCLEAR, {"node": "a", "name": "x"}), (BMERGE, {"node": "a", "target": "y", "bitmaps": ["x"]}))
    t.nodes()
    t.tx((BADD, {"node": "a", "name": "v"}), (BMERGE, {"node": "b", "target": "v", "bitmaps": ["x"]}))
    t.tx((BADD, {"node": "b", "name": "v"}),
         (BMERGE, {"node": "b", "target": "v", "bitmaps": [{"node": "a", "name": "y"}]}))
    t.tx((BDISABLE, {"node": "a", "name": "x"}), (BENABLE, {"node": "a", "name": "x"}),
         (BDISABLE, {"node": "a", "name": "x"}))
    t.nodes()


@sequence(disk("a"))
def transaction_remove_and_add(t):
    """A bitmap removed and added again in one transaction: each action sees those before it. (QEMU
    removes at commit, so that the name is still taken.)"""
    t(BADD, node="a", name="y")
    t.tx((BDEL, {"node": "a", "name": "y"}), (BADD, {"node": "a", "name": "y", "granularity": 4096}))
    t.nodes()


@sequence(disk("a"), nbd_server("a"))
def transaction_persistent(t):
    """Persistent bitmaps added and removed in transactions that fail and succeed."""
    t.tx((BADD, {"node": "a", "name": "p", "persistent": True}), ("abort", {}))
    t.nodes()
    t.tx((BADD, {"node": "a", "name": "p", "persistent": True}))
    t.write("a", 0, 65536)
    t.tx((BDEL, {"node": "a", "name": "p"}), ("abort", {}))
    t.nodes()
    t.tx((BDEL, {"node": "a", "name": "p"}), (BADD, {"node": "a", "name": "q", "persistent": True}))
    t.nodes()
    t.hang_up("a")
    t.finish()
    t.bitmaps_on_disk("a.qcow2")


@sequence(disk("a", data="write -P 1 0 64k"), disk("b", data="write -P 2 0 64k"), disk("ta"), disk("tb"),
          nbd_server("a", "b"))
def transaction_of_backups(t):
    """The classic: two disks, a backup of each and a new bitmap, at one instant."""
    t.tx((BADD, {"node": "a", "name": "x"}), (BADD, {"node": "b", "name": "x"}),
         (BACKUP, {"job-id": "ja", "device": "a", "target": "ta", "sync": "full", "auto-finalize": False}),
         (BACKUP, {"job-id": "jb", "device": "b", "target": "tb", "sync": "full", "auto-finalize": False}))
    t.wait_job("ja", "pending")
    t.wait_job("jb", "pending")
    t("query-jobs")
    t.write("a", 0, 65536)
    t.nodes()
    t("job-finalize", id="ja")
    t.wait_job("ja", "null")
    t("job-finalize", id="jb")
    t.wait_job("jb", "null")
    t.nodes()
    t.tx((BACKUP, {"job-id": "ja", "device": "a", "target": "ta", "sync": "incremental", "bitmap": "x"}),
         completion_mode="individual")
    t.wait_job("ja", "null")
    t.nodes()
    t.finish()
    t.content("ta.qcow2")
    t.content("tb.qcow2")


@sequence(disk("a"), disk("b"), disk("ta"), disk("tb"), disk("small", size="1M"), nbd_server())
def transaction_that_fails(t):
    """Preparation fails at each place; nothing of the others remains, their events say so."""
    backup = {"job-id": "ja", "device": "a", "target": "ta", "sync": "full"}
    t.tx((BACKUP, backup), ("abort", {}))
    t("query-jobs")
    t.tx((BACKUP, backup), (BACKUP, {**backup, "job-id": "jb", "device": "b", "target": "small"}))
    t.tx((BACKUP, {**backup, "job-id": "jb", "device": "b", "target": "small"}), (BACKUP, backup))
    t.tx((BACKUP, backup), (BACKUP, {**backup, "device": "b", "target": "tb"}))
    t.tx((BACKUP, backup), (BADD, {"node": "nosuch", "name": "x"}))
    t.tx((BADD, {"node": "a", "name": "x"}), (BACKUP, {**backup, "bitmap": "nosuch", "sync": "incremental"}))
    t.tx((BACKUP, {**backup, "job-id": ""}))
    t.nodes()
    t.tx((BADD, {"node": "a", "name": "x"}),
         (BACKUP, {**backup, "bitmap": "x", "sync": "incremental"}), ("abort", {}))
    t.nodes()
    t("query-jobs")


@sequence(disk("a"), disk("ta"), nbd_server("a"))
def transaction_order(t):
    """Actions and a backup of the same bitmap: merge, clear, backup in one step."""
    t(BADD, node="a", name="x")
    t(BADD, node="a", name="y")
    t.write("a", 0, 65536)
    t(BCLEAR, node="a", name="y")
    t.write("a", 1 << 20, 65536)
    t.tx((BADD, {"node": "a", "name": "tmp", "disabled": True}),
         (BMERGE, {"node": "a", "target": "tmp", "bitmaps": ["x"]}),
         (BCLEAR, {"node": "a", "name": "x"}),
         (BACKUP, {"job-id": "j", "device": "a", "target": "ta", "sync": "incremental",
                   "bitmap": "tmp", "auto-finalize": False}))
    t.wait_job("j", "pending")
    t("query-jobs")
    t.nodes()
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.tx((BACKUP, {"job-id": "j", "device": "a", "target": "ta", "sync": "incremental", "bitmap": "y",
                   "auto-finalize": False}),
         (BCLEAR, {"node": "a", "name": "y"}))
    t.nodes()
    t("query-jobs")


@sequence(disk("a", data="write -P 1 0 64k"))
def transaction_drive_backup(t):
    """drive-backup as an action: the file is made. (In QEMU it stays when the transaction fails.)"""
    go = {"job-id": "j", "device": "a", "target": "$DIR/n.qcow2", "sync": "full", "format": "qcow2"}
    t.tx(("drive-backup", go), ("abort", {}))
    t.wait_job("j", "null")
    t.files()
    t("query-jobs")
    t.tx(("drive-backup", go))
    t.wait_job("j", "null")
    t.tx(("drive-backup", {**go, "target": "$DIR/nosuch/n"}))
    t.tx(("drive-backup", {**go, "device": "nosuch"}))
    t.finish()
    t.content("n.qcow2")


GO = {"job-id": "j", "device": "a", "target": "ta", "sync": "full"}


@sequence(disk("a", data="write -P 1 0 1M"), disk("b", data="write -P 2 0 1M"), disk("ta"), disk("tb"),
          nbd_server("a", "b"))
def grouped_actions(t):
    """completion-mode grouped takes backups and abort; the error of every other action, which
    comes before anything else is looked at, and undoes those before it. (Not here: -enable, with
    which qemu-storage-daemon 7.2 crashes.)"""
    t(BADD, node="a", name="x")
    for kind, data in ((BADD, {"node": "a", "name": "y"}), (BDEL, {"node": "a", "name": "x"}),
                       (BCLEAR, {"node": "nosuch", "name": "x"}),
                       (BDISABLE, {"node": "a", "name": "x"}),
                       (BMERGE, {"node": "a", "target": "x", "bitmaps": ["x"]}),
                       ("blockdev-snapshot", {"node": "nosuch", "overlay": "x"}),
                       ("blockdev-snapshot-sync", {"snapshot-file": "x"})):
        t.tx((kind, data), completion_mode="grouped")
        t.tx((BACKUP, GO), (kind, data), completion_mode="grouped")
    t.tx(("abort", {}), completion_mode="grouped")
    t.tx((BACKUP, GO), ("abort", {}), completion_mode="grouped")
    t.tx(completion_mode="grouped")
    t.nodes()
    t("query-jobs")


@sequence(disk("a", data="write -P 1 0 1M"), disk("b", data="write -P 2 0 1M"), disk("ta"), disk("tb"),
          nbd_server("a", "b"))
def grouped_chain_begins(t):
    """How a chain begins in a group: sync=full with a bitmap and on-success."""
    for node in "ab":
        t(BADD, node=node, name="x")
        t.write(node, 65536, 65536, 0x11)
    t.tx(*((BACKUP, {"job-id": f"j{node}", "device": node, "target": f"t{node}", "sync": "full",
                     "bitmap": "x", "bitmap-mode": "on-success", "auto-finalize": False})
           for node in "ab"), completion_mode="grouped")
    t.wait_job("ja", "pending")
    t.wait_job("jb", "pending")
    t.write("a", 1 << 20, 65536, 0x22)
    t.nodes()
    t("job-finalize", id="ja")
    t.wait_job("ja", "null")
    t.wait_job("jb", "null")
    t.nodes()
    t.tx(*((BACKUP, {"job-id": f"j{node}", "device": node, "target": f"t{node}",
                     "sync": "incremental", "bitmap": "x"}) for node in "ab"),
         completion_mode="grouped")
    t.wait_job("ja", "null")
    t.wait_job("jb", "null")
    t.nodes()
    t.finish()
    t.content("ta.qcow2", length=4 << 20)
    t.content("tb.qcow2", length=4 << 20)


@sequence(disk("a"), disk("t"))
def grouped_of_one(t):
    """A group of one job, held."""
    t.tx(("blockdev-backup", {"job-id": "j", "device": "a", "target": "t", "sync": "full",
                              "auto-finalize": False}), completion_mode="grouped")
    t.wait_job("j", "pending")
    t("query-jobs", mask=["*progress"])
    t("job-finalize", id="j")
    t.wait_job("j", "null")
