"""Dirty bitmaps: each command with good and bad arguments, and the rules between them."""

from tidemark_testlib import qemu_io

from ..table import disk, image, nbd_server, null, sequence

ADD, REMOVE, CLEAR = "block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-clear"
ENABLE, DISABLE = "block-dirty-bitmap-enable", "block-dirty-bitmap-disable"
MERGE, SHA = "block-dirty-bitmap-merge", "x-debug-block-dirty-bitmap-sha256"


@sequence(disk("a"))
def bitmap_add_arguments(t):
    """block-dirty-bitmap-add: missing, unknown, wrong-typed and out-of-range arguments."""
    t(ADD)
    t(ADD, node="a")
    t(ADD, name="b")
    t(ADD, {})
    t(ADD, node="a", name="b", nosuch=1)
    t(ADD, node="nosuch", name="b")
    t(ADD, node="", name="b")
    t(ADD, node="a", name="")
    t(ADD, node=1, name="b")
    t(ADD, node="a", name=1)
    t(ADD, node=None, name="b")
    t(ADD, node="a", name=["b"])
    t(ADD, node="a", name="b", persistent="true")
    t(ADD, node="a", name="b", persistent=1)
    t(ADD, node="a", name="b", persistent=None)
    t(ADD, node="a", name="b", disabled="yes")
    t(ADD, node="a", name="b", granularity="65536")
    t(ADD, node="a", name="b", granularity=65536.0)
    t(ADD, node="a", name="b", granularity=True)
    t(ADD, node="a", name="b", granularity=[])
    for granularity in (0, 1, 256, 511, 513, 1000, 1 << 32, -512, -(1 << 31), 1 << 63, (1 << 64) - 1):
        t(ADD, node="a", name="b", granularity=granularity)
    t(ADD, node="a", name="good", granularity=512)
    t(ADD, node="a", name="good")
    t(ADD, node="a", name="x" * 1023)
    t(ADD, node="a", name="x" * 1024)
    t(ADD, node="a", name="p" * 1024, persistent=True)
    t(ADD, node="a", name="ümläut/∂ 'q\"")
    t.nodes()


@sequence(disk("a"))
def bitmap_add_granularities(t):
    """Every granularity that a bitmap may have, and how a query shows it."""
    for bits in range(9, 32):
        t(ADD, node="a", name=f"g{bits}", granularity=1 << bits)
    t.nodes()


@sequence(disk("c512", cluster_size=512), disk("c4k", cluster_size=4096),
          disk("c2m", cluster_size=2 << 20), disk("r", "raw"), null("n"))
def bitmap_add_default_granularity(t):
    """Without a granularity: the cluster size, within 4 KiB and 64 KiB; 64 KiB where there is none."""
    for node in ("c512", "c4k", "c2m", "r", "n"):
        t(ADD, node=node, name="b")
    t.nodes()


@sequence(disk("a"), disk("r", "raw"), disk("v2", compat="0.10"), null("n"))
def bitmap_persistent_where(t):
    """persistent: only on qcow2 of version 3."""
    for node in ("a", "r", "v2", "n"):
        t(ADD, node=node, name="p", persistent=True)
        t(ADD, node=node, name="q", persistent=False)
    t(ADD, node="a", name="d", persistent=True, disabled=True)
    t.nodes()


@sequence(disk("a", more="read-only=on"))
def bitmap_add_on_read_only(t):
    """A node that is read-only takes a bitmap, but not a persistent one."""
    t(ADD, node="a", name="b")
    t(ADD, node="a", name="p", persistent=True)
    t(CLEAR, node="a", name="b")
    t(DISABLE, node="a", name="b")
    t(REMOVE, node="a", name="b")


@sequence(disk("a", bitmaps=["p0", "p1"], more="read-only=on"))
def bitmap_read_only(t):
    """Stored bitmaps of a read-only image may be read, not changed."""
    t.nodes()
    t(CLEAR, node="a", name="p0")
    t(ENABLE, node="a", name="p0")
    t(DISABLE, node="a", name="p0")
    t(REMOVE, node="a", name="p0")
    t(SHA, node="a", name="p0")
    t(ADD, node="a", name="b")
    t(MERGE, node="a", target="b", bitmaps=["p0"])
    t(MERGE, node="a", target="p1", bitmaps=["p0"])
    t(MERGE, node="a", target="p1", bitmaps=["b"])


@sequence(disk("a", bitmaps=["i0", "i1"], in_use=True), disk("t"))
def bitmap_inconsistent(t):
    """A bitmap that was in use when its image was left: shown, and only good for removal."""
    t.nodes()
    t("query-block")
    t(CLEAR, node="a", name="i0")
    t(ENABLE, node="a", name="i0")
    t(DISABLE, node="a", name="i0")
    t(SHA, node="a", name="i0")
    t(ADD, node="a", name="i0")
    t(ADD, node="a", name="b")
    t(MERGE, node="a", target="b", bitmaps=["i0"])
    t(MERGE, node="a", target="i0", bitmaps=["b"])
    t("blockdev-backup", device="a", target="t", sync="incremental", bitmap="i0", job_id="j")
    t("block-export-add", type="nbd", id="e", node_name="a", bitmaps=["i0"])
    t("nbd-server-start", addr={"type": "unix", "data": {"path": "$DIR/nbd.sock"}})
    t("block-export-add", type="nbd", id="e", node_name="a", bitmaps=["i0"])
    t(REMOVE, node="a", name="i0")
    t.nodes()
    t.finish()
    t.bitmaps_on_disk("a.qcow2")


def bad_node_and_name(t, command):
    t(command)
    t(command, node="a")
    t(command, name="b")
    t(command, node="nosuch", name="b")
    t(command, node="a", name="nosuch")
    t(command, node="a", name="")
    t(command, node=1, name="b")
    t(command, node="a", name={})
    t(command, node="a", name="b", more=1)


@sequence(disk("a"))
def bitmap_remove_arguments(t):
    """block-dirty-bitmap-remove: bad arguments, twice, and its bitmap's name again."""
    bad_node_and_name(t, REMOVE)
    t(ADD, node="a", name="b")
    t(REMOVE, node="a", name="b")
    t(REMOVE, node="a", name="b")
    t(ADD, node="a", name="b", persistent=True)
    t(REMOVE, node="a", name="b")
    t.nodes()


@sequence(disk("a"))
def bitmap_clear_arguments(t):
    """block-dirty-bitmap-clear: bad arguments."""
    bad_node_and_name(t, CLEAR)
    t(ADD, node="a", name="b", disabled=True)
    t(CLEAR, node="a", name="b")
    t.nodes()


@sequence(disk("a"))
def bitmap_enable_disable_arguments(t):
    """-enable and -disable: bad arguments, and both twice."""
    bad_node_and_name(t, ENABLE)
    bad_node_and_name(t, DISABLE)
    t(ADD, node="a", name="b")
    t(ENABLE, node="a", name="b")
    t(DISABLE, node="a", name="b")
    t(DISABLE, node="a", name="b")
    t.nodes()
    t(ENABLE, node="a", name="b")
    t.nodes()


@sequence(disk("a"), disk("b"))
def bitmap_merge_arguments(t):
    """block-dirty-bitmap-merge: bad arguments, names and pairs."""
    t(ADD, node="a", name="x")
    t(ADD, node="a", name="y")
    t(ADD, node="b", name="z")
    t(MERGE)
    t(MERGE, node="a", target="x")
    t(MERGE, node="a", bitmaps=["y"])
    t(MERGE, target="x", bitmaps=["y"])
    t(MERGE, node="nosuch", target="x", bitmaps=["y"])
    t(MERGE, node="a", target="nosuch", bitmaps=["y"])
    t(MERGE, node="a", target="x", bitmaps="y")
    t(MERGE, node="a", target="x", bitmaps=[1])
    t(MERGE, node="a", target="x", bitmaps=[None])
    t(MERGE, node="a", target="x", bitmaps=[[]])
    t(MERGE, node="a", target="x", bitmaps=["nosuch"])
    t(MERGE, node="a", target="x", bitmaps=["y", "nosuch"])
    t(MERGE, node="a", target="x", bitmaps=["y", "y"])
    t(MERGE, node="a", target="x", bitmaps=["x"])
    t(MERGE, node="a", target="x", bitmaps=["z"])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "b", "name": "z"}])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "b", "name": "z"}, "y"])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "b"}])
    t(MERGE, node="a", target="x", bitmaps=[{"name": "z"}])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "b", "name": "z", "more": 1}])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "nosuch", "name": "z"}])
    t(MERGE, node="a", target="x", bitmaps=[{"node": "b", "name": "nosuch"}])
    t(MERGE, node="a", target="x", bitmaps=[{"node": 1, "name": "z"}])
    t(MERGE, node="a", target="x", bitmaps=["y"], more=True)
    t.nodes()


@sequence(disk("a"), disk("small", size="2M"), nbd_server("a"))
def bitmap_merge_counts(t):
    """Merging: counts, several sources, other granularities, other sizes, the source stays."""
    t(ADD, node="a", name="x")
    t.write("a", 0, 65536)
    t(ADD, node="a", name="y", granularity=4096)
    t.write("a", 1 << 20, 4096)
    t(ADD, node="a", name="z", granularity=1 << 20)
    t.write("a", 3 << 20, 512)
    t(ADD, node="a", name="sum", disabled=True)
    t(ADD, node="small", name="s")
    t.nodes()
    t(MERGE, node="a", target="sum", bitmaps=["y"])
    t.nodes()
    t(MERGE, node="a", target="sum", bitmaps=["z", "x"])
    t.nodes()
    t(MERGE, node="a", target="y", bitmaps=["z"])
    t.nodes()
    t(MERGE, node="a", target="sum", bitmaps=[{"node": "small", "name": "s"}])
    t(MERGE, node="small", target="s", bitmaps=[{"node": "a", "name": "sum"}])
    for name in ("x", "y", "z", "sum"):
        t(SHA, node="a", name=name)
    t.nodes()


@sequence(disk("a"), disk("b", "raw"), disk("c", cluster_size="4k"), disk("t"), nbd_server("a", "b", "c"))
def bitmap_merge_from_other_nodes(t):
    """Many sources, from three nodes, of every granularity, onto each of every granularity; onto a
    disabled copy in one transaction with the backup. Equal content has an equal sum."""
    grains = (512, 4096, 65536, 1 << 20, 1 << 31)
    for number, node in enumerate("abc"):
        for grain in grains:
            t(ADD, node=node, name=f"g{grain}", granularity=grain)
        t(ADD, node=node, name="default")
        for at in (512 * (number + 1), 700 * 512 + 65536 * number, (2 << 20) + 4096 * number):
            t.write(node, at, 512 * (1 + 9 * number))
    t.write("c", (4 << 20) - 512, 512)
    everything = [{"node": node, "name": f"g{grain}"} for node in "abc" for grain in grains]
    for grain in grains:
        t(ADD, node="a", name=f"sum{grain}", granularity=grain, disabled=True)
        t(MERGE, node="a", target=f"sum{grain}", bitmaps=everything[:5] + ["default"])
        t(SHA, node="a", name=f"sum{grain}")
        t(MERGE, node="a", target=f"sum{grain}", bitmaps=everything[5:8] + everything[10:13])
        t(SHA, node="a", name=f"sum{grain}")
    for node in "abc":
        for grain in grains:
            t(SHA, node=node, name=f"g{grain}")
    t.nodes()
    t.tx((ADD, {"node": "a", "name": "tmp", "disabled": True, "granularity": 4096}),
         (MERGE, {"node": "a", "target": "tmp", "bitmaps": ["g512", {"node": "b", "name": "g4096"},
                                                           {"node": "c", "name": "default"}]}),
         (CLEAR, {"node": "a", "name": "g512"}),
         (ADD, {"node": "a", "name": "next"}),
         ("blockdev-backup", {"job-id": "j", "device": "a", "target": "t", "sync": "bitmap",
                              "bitmap": "tmp", "bitmap-mode": "never", "auto-finalize": False}))
    t.wait_job("j", "pending")
    t.write("a", 3 << 20, 65536)
    t(SHA, node="a", name="tmp")
    t.nodes()
    t("job-finalize", id="j")
    t.wait_job("j", "null")
    for name in ("tmp", "next", "g512"):
        t(SHA, node="a", name=name)
    t.nodes()


@sequence(disk("a"), disk("small", size="2M"), disk("t"), nbd_server("a"), image("broken", bitmaps=["p"], in_use=True))
def bitmap_merge_that_fails(t):
    """One source of many cannot be merged, or the target cannot take it: all is as it was."""
    t("blockdev-add", driver="qcow2", node_name="broken",
      file={"driver": "file", "filename": "$DIR/broken.qcow2"})
    for name in ("x", "y", "z", "busy"):
        t(ADD, node="a", name=name, granularity=4096)
        t.write("a", 65536 * len(name), 4096)
    t(ADD, node="small", name="s")
    t("blockdev-backup", job_id="j", device="a", target="t", sync="incremental", bitmap="busy",
      auto_finalize=False)
    t.wait_job("j", "pending")
    bad = ("nosuch", "busy", {"node": "small", "name": "s"}, {"node": "broken", "name": "p"},
           {"node": "nosuch", "name": "y"})
    for source in bad:
        for sources in ([source, "y", "z"], ["y", source, "z"], ["y", "z", source]):
            t(MERGE, node="a", target="x", bitmaps=sources)
        t.tx((ADD, {"node": "a", "name": "tmp", "disabled": True}),
             (MERGE, {"node": "a", "target": "tmp", "bitmaps": ["x", "y"]}),
             (MERGE, {"node": "a", "target": "x", "bitmaps": ["z"]}),
             (MERGE, {"node": "a", "target": "x", "bitmaps": ["y", source]}))
        t(SHA, node="a", name="x")
    t(MERGE, node="a", target="busy", bitmaps=["y", "z"])
    t(MERGE, node="broken", target="p", bitmaps=[{"node": "a", "name": "y"}])
    t.nodes()
    t("job-finalize", id="j")
    t.wait_job("j", "null")


@sequence(disk("a"), nbd_server("a"))
def bitmap_marks(t):
    """What marks a bitmap: writes, zeroes and trims, rounded outwards; disabled ones nothing."""
    t(ADD, node="a", name="small", granularity=512)
    t(ADD, node="a", name="large", granularity=1 << 20)
    t(ADD, node="a", name="off", disabled=True)
    t.nodes()
    t.write("a", 0, 512)
    t.nodes()
    t.write("a", 1000 * 512, 3 * 512)
    t.nodes()
    t.zero("a", 2 << 20, 65536)
    t.nodes()
    t.trim("a", 3 << 20, 65536)
    t.nodes()
    t.write("a", 4095 << 10, 1024)
    t.nodes()
    t(SHA, node="a", name="small")
    t(SHA, node="a", name="large")
    t(SHA, node="a", name="off")
    t(CLEAR, node="a", name="small")
    t(ENABLE, node="a", name="off")
    t(DISABLE, node="a", name="large")
    t.write("a", 65536, 65536)
    t.nodes()
    t(CLEAR, node="a", name="large")
    t.nodes()


@sequence(disk("a"))
def bitmap_sha256_arguments(t):
    """x-debug-block-dirty-bitmap-sha256: bad arguments, and an empty bitmap's sum."""
    bad_node_and_name(t, SHA)
    t(ADD, node="a", name="b")
    t(SHA, node="a", name="b")
    t(ADD, node="a", name="c", granularity=1 << 31)
    t(SHA, node="a", name="c")


@sequence(disk("a"), disk("t"), nbd_server("a"), pauses=False)
def bitmap_busy_in_backup(t):
    """A bitmap that a backup uses: every command on it, until the job is finalized."""
    t(ADD, node="a", name="b")
    t(ADD, node="a", name="other")
    t.write("a", 0, 131072)
    t("blockdev-backup", job_id="j", device="a", target="t", sync="incremental", bitmap="b",
      auto_finalize=False, auto_dismiss=False)
    t.wait_job("j", "pending")
    t(ADD, node="a", name="b")
    t(REMOVE, node="a", name="b")
    t(CLEAR, node="a", name="b")
    t(ENABLE, node="a", name="b")
    t(DISABLE, node="a", name="b")
    t(MERGE, node="a", target="b", bitmaps=["other"])
    t(MERGE, node="a", target="other", bitmaps=["b"])
    t(SHA, node="a", name="b")
    t("blockdev-backup", job_id="k", device="a", target="t", sync="incremental", bitmap="b")
    t("block-export-add", type="nbd", id="e", node_name="a", name="two", bitmaps=["b"])
    t.write("a", 1 << 20, 65536)
    t("job-finalize", id="j")
    t.wait_job("j")
    t.nodes()
    t(CLEAR, node="a", name="b")
    t("job-dismiss", id="j")
    t.nodes()


@sequence(disk("a"), disk("t"), nbd_server())
def bitmap_busy_in_export(t):
    """A bitmap that an export shows is busy until the export is gone."""
    t(ADD, node="a", name="b")
    t(ADD, node="a", name="d", disabled=True)
    t("block-export-add", type="nbd", id="w", node_name="a", name="w", writable=True, bitmaps=["b"])
    t("block-export-add", type="nbd", id="e", node_name="a", name="e", bitmaps=["b"])
    t("block-export-add", type="nbd", id="f", node_name="a", name="f", bitmaps=["d"])
    t("block-export-add", type="nbd", id="g", node_name="a", name="g", bitmaps=["d", "b"])
    t.nodes()
    for name in ("b", "d"):
        t(REMOVE, node="a", name=name)
        t(CLEAR, node="a", name=name)
        t(ENABLE, node="a", name=name)
        t(DISABLE, node="a", name=name)
        t(SHA, node="a", name=name)
    t(MERGE, node="a", target="b", bitmaps=["d"])
    t("blockdev-backup", job_id="k", device="a", target="t", sync="incremental", bitmap="b")
    t("query-block-exports")
    t("block-export-del", id="e")
    for export in ("w", "f"):
        t("block-export-del", id=export)
        t.wait("BLOCK_EXPORT_DELETED", id=export)
    t(REMOVE, node="a", name="b")
    t(REMOVE, node="a", name="d")


@sequence(disk("a", size="1M"), nbd_server("a"))
def bitmap_persistence(t):
    """Persistent bitmaps over a restart: kept with counts, disabled ones disabled, removed ones gone."""
    t(ADD, node="a", name="p", persistent=True)
    t(ADD, node="a", name="off", persistent=True, disabled=True)
    t(ADD, node="a", name="fine", persistent=True, granularity=512)
    t(ADD, node="a", name="gone", persistent=True)
    t(ADD, node="a", name="passing")
    t.write("a", 0, 1024)
    t(REMOVE, node="a", name="gone")
    t.nodes()
    for name in ("p", "off", "fine"):
        t(SHA, node="a", name=name)
    t.hang_up("a")
    t.finish()
    t.bitmaps_on_disk("a.qcow2")
    t.check("a.qcow2")
    t.start()
    t.nodes()
    for name in ("p", "off", "fine"):
        t(SHA, node="a", name=name)
    t.write("a", 512 * 1024, 512)
    t(DISABLE, node="a", name="p")
    t(ENABLE, node="a", name="off")
    t.nodes()
    t.hang_up("a")
    t.finish("term")
    t.bitmaps_on_disk("a.qcow2")
    t.check("a.qcow2")
    t.start()
    t.nodes()
    t("block-export-del", id="exp-a")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-a")
    t("blockdev-del", node_name="a")
    t.bitmaps_on_disk("a.qcow2")
    t("blockdev-add", driver="qcow2", node_name="again", file={"driver": "file", "filename": "$DIR/a.qcow2"})
    t.nodes()


def kill_with_a_bitmap(t):
    t(ADD, node="a", name="p", persistent=True)
    t.write("a", 0, 65536)
    t.hang_up("a")
    t.finish()
    t.start()
    t.write("a", 1 << 20, 65536)
    t.nodes()
    t.finish("kill")
    t.bitmaps_on_disk("a.qcow2")


@sequence(disk("a"), nbd_server("a"))
def bitmap_after_kill(t):
    """A killed daemon leaves its persistent bitmaps in use: to QEMU inconsistent, to tidemarkd exact."""
    kill_with_a_bitmap(t)
    t.start()
    t.nodes()
    t(REMOVE, node="a", name="p")
    t(ADD, node="a", name="p", persistent=True)
    t.nodes()
    t.finish()
    t.check("a.qcow2")


@sequence(disk("a"), nbd_server("a"))
def bitmap_after_kill_and_qemu(t):
    """QEMU writes the image that a killed daemon has left: its bitmap is inconsistent to both."""
    kill_with_a_bitmap(t)
    t.tool("qemu-io",
           lambda where: bool(qemu_io(where / "a.qcow2", "write -P 7 2M 512", fmt="qcow2")))
    t.bitmaps_on_disk("a.qcow2")
    t.start()
    t.nodes()
    t(CLEAR, node="a", name="p")
    t(SHA, node="a", name="p")
    t.write("a", 0, 512)
    t.nodes()
    t(REMOVE, node="a", name="p")
    t(ADD, node="a", name="p", persistent=True)
    t.nodes()
    t.finish()
    t.bitmaps_on_disk("a.qcow2")
    t.check("a.qcow2")


@sequence(disk("base", bitmaps=["pb"]), image("top", size=None, backing_file="base.qcow2", backing_fmt="qcow2"),
          "--blockdev", "qcow2,node-name=top,file.driver=file,file.filename=$DIR/top.qcow2,backing=base")
def bitmap_of_a_chain(t):
    """Each node of a chain has its own bitmaps; a write to the top marks only the top's."""
    t(ADD, node="top", name="tb")
    t(ADD, node="base", name="bb")
    t.nodes()
    t("query-block")
    t(MERGE, node="top", target="tb", bitmaps=[{"node": "base", "name": "pb"}])
    t(CLEAR, node="base", name="pb")
    t(REMOVE, node="base", name="pb")


@sequence(disk("a", file_node="afile"), disk("r", "raw", file_node="rfile"))
def bitmap_on_protocol_node(t):
    """Bitmaps on the nodes below a format; device names are not node names."""
    for node in ("afile", "rfile", "r"):
        t(ADD, node=node, name="b")
        t(ADD, node=node, name="p", persistent=True)
    t.nodes()
    for node in ("afile", "rfile", "r"):
        t(REMOVE, node=node, name="b")


@sequence(disk("a"), disk("t"), nbd_server("a"))
def bitmap_shapes_while_backed_up(t):
    """What queries show of a bitmap while a backup is pending and after each end."""
    t(ADD, node="a", name="b")
    t(ADD, node="a", name="p", persistent=True)
    t.write("a", 0, 65536)
    for mode, end in (("on-success", "job-finalize"), ("always", "job-finalize"),
                      ("never", "job-finalize"), ("on-success", "job-cancel"),
                      ("always", "job-cancel"), ("never", "job-cancel")):
        t("blockdev-backup", job_id="j", device="a", target="t", sync="bitmap", bitmap="b",
          bitmap_mode=mode, auto_finalize=False, filter_node_name="cbw")
        t.wait_job("j", "pending")
        t.write("a", 1 << 20, 65536)
        t.nodes()
        t(end, id="j")
        t.wait_job("j", "null")
        t.nodes()
        t(SHA, node="a", name="b")
        t(CLEAR, node="a", name="b")
        t.write("a", 0, 65536)
