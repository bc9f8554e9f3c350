"""blockdev-snapshot and blockdev-snapshot-sync: overlays put above nodes in use, alone and in
transactions; what is refused; what becomes of bitmaps.

(Not here, because qemu-storage-daemon 7.2 crashes: undoing a snapshot of an overlay that the same
transaction has made.)"""

from ..table import disk, image, nbd_server, null, sequence

BADD, BMERGE = "block-dirty-bitmap-add", "block-dirty-bitmap-merge"
DATA = ("write -P 1 0 1M", "write -P 2 2M 300k")


def overlay(t, name, file=None, **more):
    """An existing image as a node without backing image."""
    t("blockdev-add", driver="qcow2", node_name=name, backing=None,
      file={"driver": "file", "filename": f"$DIR/{file or name}.qcow2"}, **more)


@sequence(disk("a", data=DATA), image("o"), nbd_server("a"))
def snapshot_under_a_guest(t):
    """The guest moves to the overlay; what it writes goes there."""
    overlay(t, "o")
    t.write("a", 65536, 4096, 0x11)
    t("blockdev-snapshot", node="a", overlay="o")
    t.nodes()
    t("query-named-block-nodes")
    t("query-block-exports")
    t("query-blockstats", query_nodes=True, mask=["*"])
    t.write("a", 131072, 4096, 0x22)
    t.read("a", 0, 262144)
    t("blockdev-snapshot", node="a", overlay="o")
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="o")
    t("blockdev-add", driver="raw", node_name="w", file="a")
    t.hang_up("a")
    t("block-export-del", id="exp-a")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-a")
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="o")
    t("blockdev-del", node_name="a")
    t.finish()
    t.content("o.qcow2")
    t.content("a.qcow2")


@sequence(disk("a", data=DATA), disk("b", "raw"), nbd_server("a", "b"))
def snapshot_sync_under_a_guest(t):
    """The overlay is made; twice, so that there is a chain; of raw, too."""
    t("blockdev-snapshot-sync", node_name="a", snapshot_file="$DIR/s1.qcow2", snapshot_node_name="s1")
    t.nodes()
    t.write("a", 65536, 4096, 0x11)
    t("blockdev-snapshot-sync", node_name="s1", snapshot_file="$DIR/s2.qcow2",
      snapshot_node_name="s2", format="qcow2", mode="absolute-paths")
    t.write("a", 131072, 4096, 0x22)
    t.read("a", 0, 262144)
    t("query-named-block-nodes")
    t("blockdev-snapshot-sync", node_name="b", snapshot_file="$DIR/sb.qcow2", snapshot_node_name="sb")
    t.write("b", 0, 4096, 0x33)
    t.read("b", 0, 262144)
    t.nodes()
    t("blockdev-del", node_name="s2")
    t("blockdev-del", node_name="s1")
    t.finish()
    t.content("s2.qcow2")
    t.content("s1.qcow2")
    t.content("sb.qcow2")


@sequence(disk("a", data=DATA), image("o"), disk("r", "raw"))
def snapshot_without_a_guest(t):
    """A node that only the monitor has: an overlay that nobody has goes again."""
    t("blockdev-snapshot-sync", node_name="a", snapshot_file="$DIR/s1.qcow2", snapshot_node_name="s1")
    t.nodes()
    t("blockdev-snapshot-sync", node_name="a", snapshot_file="$DIR/s2.qcow2", snapshot_node_name="s2")
    t.nodes()
    t("blockdev-snapshot-sync", node_name="r", snapshot_file="$DIR/s3.qcow2", snapshot_node_name="s3")
    overlay(t, "o")
    t("blockdev-snapshot", node="r", overlay="o")
    t.nodes()
    t("blockdev-del", node_name="r")
    t("blockdev-del", node_name="o")
    t("blockdev-del", node_name="r")
    t.finish()
    for name in ("s1", "s2", "s3"):
        t.content(f"{name}.qcow2")


@sequence(disk("a"), disk("r", "raw"), disk("t"), image("o"), image("top", backing_file="o.qcow2", backing_fmt="qcow2"),
          null("n"), nbd_server("t"))
def snapshot_refused(t):
    """What cannot be an overlay, and what cannot have one."""
    t("blockdev-snapshot")
    t("blockdev-snapshot", node="a")
    t("blockdev-snapshot", overlay="a")
    t("blockdev-snapshot", node=1, overlay="t")
    t("blockdev-snapshot", node="a", overlay="t", nosuch=1)
    t("blockdev-snapshot", node="nosuch", overlay="t")
    t("blockdev-snapshot", node="", overlay="t")
    t("blockdev-snapshot", node="a", overlay="nosuch")
    t("blockdev-snapshot", node="a", overlay="")
    t("blockdev-snapshot", node="a", overlay="a")
    t("blockdev-snapshot", node="a", overlay="t")
    t("blockdev-snapshot", node="a", overlay="r")
    t("blockdev-snapshot", node="a", overlay="n")
    t("blockdev-snapshot", node="n", overlay="a")
    t("blockdev-add", driver="qcow2", node_name="top", file={"driver": "file", "filename": "$DIR/top.qcow2"})
    t("blockdev-snapshot", node="a", overlay="top")
    t("blockdev-add", driver="raw", node_name="w", file="a")
    t("blockdev-snapshot", node="w", overlay="a")
    t("blockdev-snapshot", node="t", overlay="a")
    t("blockdev-add", driver="copy-before-write", node_name="f", file="r", target="a")
    t("blockdev-snapshot", node="t", overlay="f")
    t("blockdev-snapshot", node="r", overlay="f")
    t("blockdev-add", driver="throttle", node_name="f", file="r", throttle_group="g")
    t.nodes()


@sequence(disk("a"), disk("s"), disk("t"))
def snapshot_of_a_cycle(t):
    """An overlay that stands on the node already, and one above that the node stands on."""
    t("blockdev-add", driver="qcow2", node_name="x", file={"driver": "raw", "file": "a"}, backing=None)
    t("blockdev-snapshot", node="a", overlay="a")
    t("blockdev-add", driver="raw", node_name="w", file="s")
    t("blockdev-snapshot", node="w", overlay="s")
    t("blockdev-snapshot", node="s", overlay="t")
    t("query-named-block-nodes")


@sequence(disk("a", data=DATA), disk("r", "raw"), image("o", data="write -P 7 1M 64k"),
          image("plain", "raw"), nbd_server("a", "r"))
def snapshot_sync_refused(t):
    """Arguments, names, files, formats."""
    go = {"node_name": "a", "snapshot_file": "$DIR/s.qcow2", "snapshot_node_name": "s"}
    t("blockdev-snapshot-sync")
    t("blockdev-snapshot-sync", node_name="a")
    t("blockdev-snapshot-sync", snapshot_file="$DIR/s.qcow2")
    t("blockdev-snapshot-sync", device="nosuch", snapshot_file="$DIR/s.qcow2")
    t("blockdev-snapshot-sync", node_name="nosuch", snapshot_file="$DIR/s.qcow2")
    t("blockdev-snapshot-sync", device="x", node_name="y", snapshot_file="$DIR/s.qcow2")
    t("blockdev-snapshot-sync", node_name="a", snapshot_file="$DIR/s.qcow2")
    t("blockdev-snapshot-sync", **{**go, "snapshot_node_name": "a"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_node_name": ""})
    t("blockdev-snapshot-sync", **{**go, "snapshot_node_name": "1x"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_node_name": "x" * 32})
    t("blockdev-snapshot-sync", **{**go, "mode": "nosuch"})
    t("blockdev-snapshot-sync", **{**go, "mode": 1})
    t("blockdev-snapshot-sync", **{**go, "format": "nosuch"})
    t("blockdev-snapshot-sync", **{**go, "format": ""})
    t("blockdev-snapshot-sync", **{**go, "format": "raw"})
    t("blockdev-snapshot-sync", **{**go, "format": "file"})
    t("blockdev-snapshot-sync", **{**go, "format": "null-co"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": ""})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/nosuch/s.qcow2"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/a.qcow2"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/r.raw"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "nosuch:x"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/nosuch.qcow2", "mode": "existing"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/a.qcow2", "mode": "existing"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/plain.raw", "mode": "existing"})
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/plain.raw", "mode": "existing", "format": "raw"})
    t.nodes()
    t.files()
    t("blockdev-snapshot-sync", **{**go, "snapshot_file": "$DIR/o.qcow2", "mode": "existing"})
    t.nodes()
    t.read("a", 0, 2 << 20)
    t("blockdev-snapshot-sync", node_name="r", snapshot_file="file:$DIR/fr.qcow2",
      snapshot_node_name="fr")
    t.nodes()


@sequence(disk("a", data=DATA), image("small", size="1M"), image("large", size="8M"),
          nbd_server("a"))
def snapshot_of_another_size(t):
    """An export keeps its size; nobody asks whether the overlay has it."""
    t("blockdev-add", driver="raw", node_name="w", file="a")
    for name in ("small", "large"):
        t("blockdev-snapshot-sync", node_name={"small": "a", "large": "small"}[name],
          snapshot_file=f"$DIR/{name}.qcow2", mode="existing", snapshot_node_name=name)
        t.nodes()
        t.nbd_list()
    t.write("a", 3 << 20, 65536, 0x11)
    t.read("a", 0, 4 << 20)


@sequence(disk("a", data=DATA), nbd_server("a"))
def snapshot_sync_with_a_device(t):
    """`device`: QEMU looks among its devices, of which qemu-storage-daemon has none."""
    t("blockdev-snapshot-sync", device="a", snapshot_file="$DIR/s.qcow2", snapshot_node_name="s")


@sequence(disk("a", more="cache.direct=on,discard=unmap,detect-zeroes=unmap", data=DATA),
          disk("b", more="read-only=on"), disk("c", more="auto-read-only=on"),
          disk("d", more="read-only=on,auto-read-only=on,cache.no-flush=on"), nbd_server("a"))
def snapshot_sync_inherits(t):
    """Options that the overlay has from the node."""
    for node in "abcd":
        t("block-export-add", type="nbd", id=f"e-{node}", node_name=node, name=f"e-{node}")
        t("blockdev-snapshot-sync", node_name=node, snapshot_file=f"$DIR/s{node}.qcow2",
          snapshot_node_name=f"s{node}")
    t.nodes()
    t("block-export-add", type="nbd", id="w", node_name="sb", name="w", writable=True)
    t("block-export-add", type="nbd", id="w2", node_name="sc", name="w2", writable=True)


@sequence(disk("a", data=DATA), image("o"), disk("p", data=DATA, bitmaps=["stored"]), image("q"),
          nbd_server("a", "p"))
def snapshot_and_bitmaps(t):
    """Named bitmaps stay where they are, and can be used from there."""
    t(BADD, node="a", name="b")
    t(BADD, node="a", name="d", disabled=True)
    t(BADD, node="p", name="mine", persistent=True)
    t(BADD, node="p", name="late")
    t.write("a", 0, 65536, 0x11)
    t.write("p", 0, 65536, 0x11)
    overlay(t, "o")
    overlay(t, "q")
    t("blockdev-snapshot", node="a", overlay="o")
    t("blockdev-snapshot", node="p", overlay="q")
    t.write("a", 1 << 20, 65536, 0x22)
    t.write("p", 1 << 20, 65536, 0x22)
    t.nodes()
    for node, name in (("a", "b"), ("p", "stored"), ("p", "mine"), ("p", "late")):
        t("x-debug-block-dirty-bitmap-sha256", node=node, name=name)
        t("block-dirty-bitmap-disable", node=node, name=name)
        t("block-dirty-bitmap-enable", node=node, name=name)
        t("block-dirty-bitmap-clear", node=node, name=name)
        t(BADD, node={"a": "o", "p": "q"}[node], name=name)
        t(BMERGE, node={"a": "o", "p": "q"}[node], target=name, bitmaps=[{"node": node, "name": name}])
        t("block-dirty-bitmap-remove", node=node, name=name)
    t(BADD, node="p", name="new", persistent=True)
    t(BADD, node="p", name="newer")
    t.nodes()
    t.hang_up("a")
    t.hang_up("p")
    t.finish()
    t.bitmaps_on_disk("p.qcow2")


@sequence(disk("a", data=DATA), disk("b", data=DATA), image("o"), disk("ta"), nbd_server("a", "b"))
def snapshot_in_a_transaction(t):
    """As libvirt does it: two overlays and new bitmaps at one instant; then a backup of both."""
    overlay(t, "o")
    t(BADD, node="a", name="b", persistent=True)
    t.write("a", 0, 65536, 0x11)
    t.tx(("blockdev-snapshot", {"node": "a", "overlay": "o"}),
         (BADD, {"node": "o", "name": "b", "persistent": True}),
         ("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": "$DIR/s.qcow2",
                                     "snapshot-node-name": "s"}),
         (BADD, {"node": "s", "name": "b"}))
    t.nodes()
    t.write("a", 1 << 20, 65536, 0x22)
    t.write("b", 1 << 20, 65536, 0x22)
    t.nodes()
    t.tx((BADD, {"node": "o", "name": "tmp", "disabled": True}),
         (BMERGE, {"node": "o", "target": "tmp", "bitmaps": ["b", {"node": "a", "name": "b"}]}),
         ("blockdev-backup", {"job-id": "j", "device": "o", "target": "ta", "sync": "incremental",
                              "bitmap": "tmp", "auto-finalize": False}))
    t.wait_job("j", "pending")
    t.nodes()
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.hang_up("a")
    t.hang_up("b")
    t.finish()
    t.content("o.qcow2")
    t.content("s.qcow2")
    t.content("ta.qcow2")
    t.bitmaps_on_disk("a.qcow2")
    t.bitmaps_on_disk("o.qcow2")


@sequence(disk("a", data=DATA), disk("b", data=DATA), image("o"), nbd_server("a", "b"))
def snapshot_undone(t):
    """A transaction that fails after its snapshots: nobody has moved."""
    overlay(t, "o")
    go = ("blockdev-snapshot", {"node": "a", "overlay": "o"})
    sync = ("blockdev-snapshot-sync", {"node-name": "b", "snapshot-file": "$DIR/s.qcow2",
                                       "snapshot-node-name": "s"})
    again = ("blockdev-snapshot-sync", {"node-name": "s", "snapshot-file": "$DIR/s2.qcow2",
                                        "snapshot-node-name": "s2"})
    t.tx(go, ("abort", {}))
    t.nodes()
    t.tx(go, sync, ("abort", {}))
    t.nodes()
    t.tx(go, go)
    t.tx(go, sync, sync)
    t.tx(sync, (BADD, {"node": "s", "name": "x"}), ("block-dirty-bitmap-remove", {"node": "s", "name": "y"}))
    t.tx(("blockdev-snapshot", {"node": "a", "overlay": "nosuch"}), sync)
    t.files()
    t("query-named-block-nodes")
    t.write("a", 0, 65536, 0x11)
    t.write("b", 0, 65536, 0x11)
    t.tx(sync, again)
    t.write("b", 1 << 20, 65536, 0x22)
    t.nodes()
    t.finish()
    t.content("s2.qcow2")
    t.content("a.qcow2")
    t.content("b.qcow2")


@sequence(disk("a"), image("o"), nbd_server("a"))
def snapshot_arguments_in_a_transaction(t):
    """Data of the actions; grouped takes none of them."""
    overlay(t, "o")
    go = ("blockdev-snapshot", {"node": "a", "overlay": "o"})
    sync = ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "$DIR/s.qcow2",
                                       "snapshot-node-name": "s"})
    t.tx(("blockdev-snapshot", {}))
    t.tx(("blockdev-snapshot", {"node": "a"}))
    t.tx(("blockdev-snapshot-sync", {}))
    t.tx(("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "x", "mode": "nosuch"}))
    t.tx(go, completion_mode="grouped")
    t.tx(sync, completion_mode="grouped")
    t.nodes()
    t.tx(go, completion_mode="individual")
    t.nodes()


@sequence(disk("a", data=DATA), disk("ta"), image("o"), image("p"), nbd_server("a"))
def snapshot_beside_jobs(t):
    """Of a disk that is being backed up; of a job's target; of a filter."""
    overlay(t, "o")
    overlay(t, "p")
    t("blockdev-backup", job_id="j", device="a", target="ta", sync="none", filter_node_name="f")
    t("blockdev-snapshot", node="ta", overlay="o")
    t("blockdev-snapshot", node="a", overlay="ta")
    t("blockdev-snapshot", node="f", overlay="o")
    t.nodes()
    t.write("a", 0, 65536, 0x11)
    t.read("a", 0, 131072)
    t("blockdev-snapshot", node="a", overlay="p")
    t.nodes()
    t.write("a", 65536, 65536, 0x22)
    t.read("a", 0, 262144)
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.write("a", 131072, 65536, 0x33)
    t.hang_up("a")
    t.finish()
    t.content("ta.qcow2")


@sequence(disk("a", data=DATA), disk("t"), image("o"), nbd_server("a"))
def snapshot_beside_a_mirror(t):
    """A mirror's source has none; its target may become the overlay of what is below (oVirt)."""
    overlay(t, "o")
    t("blockdev-mirror", job_id="j", device="a", target="t", sync="full", filter_node_name="f")
    t.wait_job("j", "ready")
    t("blockdev-snapshot", node="a", overlay="o")
    t("blockdev-snapshot", node="t", overlay="o")
    t("blockdev-snapshot", node="f", overlay="o")
    t("blockdev-snapshot", node="a", overlay="t")
    t("blockdev-snapshot", node="a", overlay="f")
    t.nodes()
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()


@sequence(image("base", data=DATA), image("copy", data=DATA), disk("a", data="write -P 9 3M 64k", backing_file="base.qcow2", backing_fmt="qcow2"),
          image("t"), nbd_server("a"))
def snapshot_under_a_mirrors_target(t):
    """sync=top to a bare overlay, which gets its copied backing image before the pivot."""
    t("blockdev-add", driver="qcow2", node_name="copy", file={"driver": "file", "filename": "$DIR/copy.qcow2"})
    overlay(t, "t")
    t("blockdev-mirror", job_id="j", device="a", target="t", sync="top")
    t.wait_job("j", "ready")
    t.write("a", 65536, 65536, 0x11)
    t("blockdev-snapshot", node="copy", overlay="t")
    t("query-named-block-nodes", flat=True, mask=["*count"])
    t("job-complete", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t.read("a", 0, 4 << 20)
    t.hang_up("a")
    t.finish()
    t.content("t.qcow2")


@sequence(disk("a", data=DATA), disk("b", data=DATA), disk("ta"), disk("tb"), image("o"), image("p"),
          nbd_server("a", "b"))
def snapshot_and_backup_at_one_instant(t):
    """Both orders: the backup of the disk below its overlay, and the overlay below the filter."""
    overlay(t, "o")
    overlay(t, "p")
    go = {"sync": "full", "auto-finalize": False}
    t.tx(("blockdev-snapshot", {"node": "a", "overlay": "o"}),
         ("blockdev-backup", {**go, "job-id": "ja", "device": "a", "target": "ta"}),
         ("blockdev-backup", {**go, "job-id": "jb", "device": "b", "target": "tb"}),
         ("blockdev-snapshot", {"node": "b", "overlay": "p"}))
    for node in "ab":
        t.wait_job(f"j{node}", "pending")
    for node in "ab":
        t.write(node, 0, 65536, 0x11)
    t.nodes()
    for node in "ab":
        t("job-finalize", id=f"j{node}")
        t.wait_job(f"j{node}", "null")
    t.nodes()
    for node in "ab":
        t.write(node, 65536, 65536, 0x22)
        t.read(node, 0, 1 << 20)
        t.hang_up(node)
    t.finish()
    for name in ("a", "b", "ta", "tb", "o", "p"):
        t.content(f"{name}.qcow2")


@sequence(disk("a", data=DATA, bitmaps=["b"]), disk("t"), image("o"), nbd_server("a"))
def snapshot_while_a_bitmap_is_busy(t):
    """A persistent bitmap that a job has cannot be saved: the disk stays writable below."""
    overlay(t, "o")
    t.write("a", 0, 65536, 0x11)
    t("blockdev-backup", job_id="j", device="a", target="t", sync="incremental", bitmap="b",
      auto_finalize=False)
    t.wait_job("j", "pending")
    t("blockdev-snapshot", node="a", overlay="o")
    t.nodes()
    t.write("a", 1 << 20, 65536, 0x22)
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    t.nodes()
    t("block-dirty-bitmap-clear", node="a", name="b")
    t.hang_up("a")
    t.finish()
    t.bitmaps_on_disk("a.qcow2")


@sequence(disk("a", data=DATA), disk("b", "raw"), disk("c"), image("o"), image("p"), image("q"), nbd_server())
def snapshot_of_filters(t):
    """A filter's node has an overlay as any other."""
    t("object-add", qom_type="throttle-group", id="g")
    t("blockdev-add", driver="throttle", node_name="th", file="a", throttle_group="g")
    t("blockdev-add", driver="blkdebug", node_name="bd", image="b")
    t("blockdev-add", driver="raw", node_name="rw", file="c", size=1 << 20)
    for node in ("th", "bd", "rw"):
        t.export(node)
    for node, name in (("th", "o"), ("bd", "p"), ("rw", "q")):
        overlay(t, name)
        t("blockdev-snapshot", node=node, overlay=name)
        t.write(node, 0, 65536, 0x11)
    t.nodes()
    t("blockdev-snapshot-sync", node_name="o", snapshot_file="$DIR/s.qcow2", snapshot_node_name="s")
    t("blockdev-snapshot-sync", node_name="s", snapshot_file="$DIR/s2.qcow2", snapshot_node_name="s2")
    t.nodes()
    for node in ("th", "bd", "rw"):
        t.hang_up(node)


@sequence(disk("a", data=DATA, file_node="af"), image("o"), image("p", "raw"), nbd_server("a"))
def snapshot_below_a_format(t):
    """The file of a format is a node, too."""
    overlay(t, "o")
    t("blockdev-snapshot", node="af", overlay="o")
    t.nodes()
    t.write("a", 0, 65536, 0x11)
    t.read("a", 0, 131072)


@sequence(disk("a", data=DATA, idle=True), image("o"), image("q"), nbd_server("a"))
def snapshot_reopened(t):
    """What a snapshot has put there can be changed and taken apart by blockdev-reopen."""
    overlay(t, "o")
    t("blockdev-snapshot", node="a", overlay="o")
    o = {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "$DIR/o.qcow2"}}
    a = {"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "$DIR/a.qcow2"}}
    t("blockdev-reopen", options=[o])
    t("blockdev-reopen", options=[{**o, "backing": "a", "read-only": True}])
    t("blockdev-reopen", options=[{**o, "backing": "a"}])
    t("blockdev-reopen", options=[{**a, "read-only": False}])
    t.nodes()
    t("blockdev-reopen", options=[{**a, "read-only": True}])
    t("blockdev-reopen", options=[{**o, "backing": None}])
    t.nodes()
    t("blockdev-del", node_name="a")
    t.read("a", 0, 131072)
    t.nodes()


@sequence(disk("a", data=DATA), *(image(f"o{n}") for n in range(16)), nbd_server("a"))
def snapshot_with_long_names(t):
    """Overlays that record nothing of what is behind them: the chain's name grows, until no image
    can record it."""
    below = "a"
    for n in range(16):
        overlay(t, f"o{n}")
        t("blockdev-snapshot", node=below, overlay=f"o{n}")
        below = f"o{n}"
    t("blockdev-snapshot-sync", node_name=below, snapshot_file="$DIR/s.qcow2",
      snapshot_node_name="s")
    t.nodes()
    t.read("a", 0, 4 << 20)


@sequence(disk("a", data=DATA), disk("b", data=DATA), disk("ta"), disk("tb"), image("o"),
          nbd_server("a", "b"))
def snapshot_and_backup_undone(t):
    """Jobs, bitmaps and overlays of one transaction, undone at each of its actions."""
    overlay(t, "o")
    t(BADD, node="a", name="x")
    t.write("a", 0, 65536, 0x11)
    actions = [
        ("blockdev-snapshot", {"node": "a", "overlay": "o"}),
        (BADD, {"node": "o", "name": "x"}),
        (BMERGE, {"node": "o", "target": "x", "bitmaps": [{"node": "a", "name": "x"}]}),
        ("blockdev-backup", {"job-id": "jo", "device": "o", "target": "ta", "sync": "incremental",
                             "bitmap": "x"}),
        ("blockdev-backup", {"job-id": "jb", "device": "b", "target": "tb", "sync": "full"}),
        ("block-dirty-bitmap-clear", {"node": "a", "name": "x"}),
        ("block-dirty-bitmap-disable", {"node": "a", "name": "x"}),
    ]
    for count in range(1, len(actions) + 1):
        t.tx(*actions[:count], ("block-dirty-bitmap-clear", {"node": "a", "name": "nosuch"}))
        t.nodes()
        t("query-jobs")
    t("x-debug-block-dirty-bitmap-sha256", node="a", name="x")
    t.write("a", 65536, 65536, 0x22)
    t.tx(*actions)
    for job in ("jo", "jb"):
        t.wait_job(job, "null")
    t.nodes()
    t.hang_up("a")
    t.finish()
    for name in ("a", "o", "ta", "tb"):
        t.content(f"{name}.qcow2")
