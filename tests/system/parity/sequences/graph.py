"""Nodes: blockdev-add of each driver, blockdev-del, blockdev-reopen, block_resize, queries."""

from ..table import disk, image, nbd_server, null, sequence

ADD, DEL, REOPEN = "blockdev-add", "blockdev-del", "blockdev-reopen"
FILE = {"driver": "file", "filename": "$DIR/x.qcow2"}


@sequence(image("x"))
def add_arguments(t):
    """blockdev-add: driver and the options that every node has."""
    t(ADD)
    t(ADD, driver="nosuch", node_name="n")
    t(ADD, driver="", node_name="n")
    t(ADD, driver=1, node_name="n")
    t(ADD, driver=None, node_name="n")
    t(ADD, node_name="n")
    t(ADD, driver="null-co")
    for name in ("", "1a", "a b", "#a", "-a", "a/b", "ä", "x" * 32, 1, None):
        t(ADD, driver="null-co", node_name=name)
    for name in ("a", "A-1.b_c", "x" * 31):
        t(ADD, driver="null-co", node_name=name)
    t(ADD, driver="null-co", node_name="a")
    t(ADD, driver="null-co", node_name="n", nosuch=1)
    for option, values in (("read-only", ("on", 1, None)), ("auto-read-only", ("yes",)),
                           ("force-share", (1, "true")), ("discard", ("", "nosuch", 1, True)),
                           ("detect-zeroes", ("nosuch", 0, True)),
                           ("cache", (1, "x", {"nosuch": 1}, {"direct": "on"}, {"no-flush": 1}, [])),
                           ("size", ("1", 1.5, "1M", 1 << 63)), ("read-zeroes", ("on", 1)),
                           ("latency-ns", (-1, "x"))):
        for value in values:
            t(ADD, {"driver": "null-co", "node-name": "n", option: value})
            t(DEL, node_name="n")
    t(ADD, driver="null-co", node_name="zero", size=0)
    t(ADD, driver="null-co", node_name="odd", size=1000)
    t(ADD, driver="null-co", node_name="big", size=(1 << 63) - 1)
    t(ADD, driver="null-co", node_name="dz", size=1 << 20, detect_zeroes="unmap", discard="unmap")
    t(ADD, driver="null-co", node_name="dz2", size=1 << 20, detect_zeroes="unmap")
    t(ADD, driver="null-co", node_name="dz3", size=1 << 20, detect_zeroes="on")
    t(ADD, driver="null-co", node_name="c", size=1 << 20, cache={"direct": True, "no-flush": True})
    t(ADD, driver="null-co", node_name="ro", size=1 << 20, read_only=True)
    t(ADD, driver="null-co", node_name="aro", size=1 << 20, auto_read_only=True)
    t(ADD, driver="null-co", node_name="fs", size=1 << 20, force_share=True)
    t(ADD, driver="null-co", node_name="fsro", size=1 << 20, force_share=True, read_only=True)
    t.nodes()


@sequence(image("x", "raw"), image("odd", "raw", size="1000"))
def add_file(t):
    """The driver file: options and errors."""
    go = {"driver": "file", "node-name": "f", "filename": "$DIR/x.raw"}
    t(ADD, driver="file", node_name="f")
    for name in ("$DIR/nosuch", "", "$DIR", "/dev/nosuch/x", 1, None, "$DIR/x.raw/y"):
        t(ADD, {**go, "filename": name})
    for option, values in (("aio", ("nosuch", 1, "native")), ("locking", ("nosuch", True)),
                           ("drop-cache", ("x", 1)), ("x-check-cache-dropped", (1,)),
                           ("aio-max-batch", ("x",)),
                           ("nosuch", (1,)), ("size", (1,)), ("offset", (0,))):
        for value in values:
            t(ADD, {**go, option: value})
    t(ADD, go)
    t(ADD, {**go, "node-name": "g"})
    t(ADD, {**go, "node-name": "h", "read-only": True})
    t(ADD, {**go, "node-name": "i", "force-share": True})
    t(ADD, {**go, "node-name": "k", "force-share": True, "read-only": True})
    t(ADD, {**go, "node-name": "odd", "filename": "$DIR/odd.raw"})
    t(ADD, {**go, "node-name": "cache", "filename": "$DIR/odd.raw", "read-only": True,
            "cache": {"no-flush": True}})
    for more in ({"aio": "threads"}, {"locking": "on"}, {"locking": "off"}, {"locking": "auto"},
                 {"discard": "unmap"}, {"detect-zeroes": "on"}, {"drop-cache": False},
                 {"auto-read-only": True}, {"aio-max-batch": 8}):
        t(DEL, node_name="f")
        t(ADD, {**go, **more})
    t.nodes()


@sequence(image("x", "raw"), image("q"))
def add_raw(t):
    """The driver raw: offset and size, its child by reference and nested."""
    child = {"driver": "file", "filename": "$DIR/x.raw"}
    go = {"driver": "raw", "node-name": "r", "file": child}
    t(ADD, driver="raw", node_name="r")
    for file in ("nosuch", "", 1, None, [], {}, {"driver": "nosuch"}, {"driver": "file"},
                 {"driver": "file", "filename": "$DIR/nosuch"}, {**child, "nosuch": 1},
                 {**child, "node-name": "r"}, {"filename": "$DIR/x.raw"}):
        t(ADD, {**go, "file": file})
    for more in ({"offset": "x"}, {"offset": -1}, {"offset": 1}, {"offset": 511}, {"offset": 512},
                 {"offset": 5 << 20}, {"offset": 4 << 20}, {"size": 0}, {"size": 1000},
                 {"size": 1024}, {"size": 5 << 20}, {"size": "1"}, {"size": -1},
                 {"offset": 512, "size": 4 << 20}, {"offset": 1 << 20, "size": 1 << 20},
                 {"backing": None}, {"nosuch": 1}):
        t(ADD, {**go, **more})
        t.nodes()
        t(DEL, node_name="r")
    t(ADD, {"driver": "file", "node-name": "f", "filename": "$DIR/x.raw"})
    t(ADD, {**go, "file": "f"})
    t(ADD, {**go, "node-name": "r2", "file": "f"})
    t(ADD, {**go, "node-name": "r3", "file": "f", "read-only": True})
    t(ADD, {**go, "node-name": "r4", "file": "r"})
    t(ADD, {**go, "node-name": "over-q", "file": {"driver": "file", "filename": "$DIR/q.qcow2"}})
    t(DEL, node_name="f")
    t(DEL, node_name="r")
    t(DEL, node_name="r4")
    t.nodes()


@sequence(image("x"), image("r", "raw"), image("v2", compat="0.10"), image("big", cluster_size="2M", size="1G"))
def add_qcow2(t):
    """The driver qcow2: options, images that are none, nested and referenced files."""
    go = {"driver": "qcow2", "node-name": "q", "file": FILE}
    t(ADD, driver="qcow2", node_name="q")
    t(ADD, {**go, "file": "nosuch"})
    t(ADD, {**go, "file": {"driver": "file", "filename": "$DIR/r.raw"}})
    t(ADD, {**go, "file": {"driver": "null-co", "size": 0}})
    t(ADD, {**go, "file": {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}})
    for option, values in (("lazy-refcounts", ("on", 1)), ("pass-discard-request", (1,)),
                           ("pass-discard-snapshot", (1,)), ("pass-discard-other", (1,)),
                           ("overlap-check", ("nosuch", 1, "none", "cached", "all", {"template": "nosuch"})),
                           ("cache-size", ("x", 1, -1)), ("l2-cache-size", ("x", 1 << 20)),
                           ("l2-cache-entry-size", (1000, 4096, "x")),
                           ("refcount-cache-size", ("x", 1 << 20)),
                           ("cache-clean-interval", ("x", 0)), ("backing", (1, "nosuch", None)),
                           ("nosuch", (1,))):
        for value in values:
            t(ADD, {**go, option: value})
            t(DEL, node_name="q")
    t(ADD, go)
    t(ADD, {**go, "node-name": "q2"})
    t(ADD, {**go, "node-name": "v2", "file": {"driver": "file", "filename": "$DIR/v2.qcow2"}})
    t(ADD, {**go, "node-name": "big", "file": {"driver": "file", "node-name": "bigfile",
                                               "filename": "$DIR/big.qcow2"}, "read-only": True})
    t(ADD, {**go, "node-name": "again", "file": "bigfile"})
    t.nodes()
    t("query-named-block-nodes")


@sequence(image("x"))
def add_later(t):
    """Options that a later issue takes: each is refused by its name."""
    for driver, option, value in (("file", "pr-manager", "nosuch"), ("file", "pr-manager", 1),
                                  ("qcow2", "encrypt", 1), ("qcow2", "encrypt", {"format": "nosuch"}),
                                  ("qcow2", "data-file", "nosuch"), ("qcow2", "data-file", 1)):
        below = FILE if driver == "qcow2" else None
        t(ADD, {"driver": driver, "node-name": "n", option: value,
                **({"file": below} if below else {"filename": "$DIR/x.qcow2"})})


@sequence(image("base", data="write -P 1 0 64k"), image("mid", size=None, backing_file="base.qcow2", backing_fmt="qcow2"),
          image("top", size=None, backing_file="mid.qcow2", backing_fmt="qcow2"),
          image("broken", size="4M"))
def add_chains(t):
    """Backing files: opened by the image's own word, by reference, nested, none at all."""
    top = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "$DIR/top.qcow2"}}
    mid = {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "$DIR/mid.qcow2"}}
    t(ADD, top)
    t.nodes()
    t("query-named-block-nodes")
    t("query-block")
    t(DEL, node_name="top")
    t(ADD, {**top, "backing": None})
    t.nodes()
    t(DEL, node_name="top")
    t(ADD, {**top, "backing": {**mid, "backing": None}})
    t(DEL, node_name="mid")
    t(DEL, node_name="top")
    t.nodes()
    t(ADD, mid)
    t(ADD, {**top, "backing": "mid"})
    t(ADD, {**top, "node-name": "top2", "backing": "mid"})
    t.nodes()
    t(DEL, node_name="mid")
    t("block-dirty-bitmap-add", node="mid", name="b")
    t(DEL, node_name="top")
    t(DEL, node_name="mid")
    t(ADD, {**top, "backing": "top"})
    t(ADD, {**top, "backing": {"driver": "nosuch"}})
    t(ADD, {**top, "backing": {**mid, "nosuch": 1}})
    t.nodes()


@sequence(image("x"))
def add_missing_backing(t):
    """An image whose backing file is gone."""
    def make(where):
        import subprocess
        return subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "gone.qcow2",
                               "-F", "qcow2", where / "o.qcow2", "1M"], check=False).returncode
    t.tool("make", make)
    t(ADD, driver="qcow2", node_name="o", file={"driver": "file", "filename": "$DIR/o.qcow2"})
    t(ADD, driver="qcow2", node_name="o", backing=None, file={"driver": "file", "filename": "$DIR/o.qcow2"})
    t.nodes()


@sequence(image("x"))
def read_only_kinds(t):
    """read-only, auto-read-only and what each allows, on the three layers of a disk."""
    for more, file_more in (({"read-only": True}, {}), ({}, {"read-only": True}),
                            ({"read-only": True}, {"read-only": True}), ({"auto-read-only": True}, {}),
                            ({}, {"auto-read-only": True}), ({"read-only": True}, {"auto-read-only": True}),
                            ({"read-only": False}, {"read-only": True}),
                            ({"force-share": True, "read-only": True}, {}),
                            ({"force-share": True}, {})):
        t(ADD, {"driver": "qcow2", "node-name": "q", "file": {**FILE, "node-name": "f", **file_more}, **more})
        t.nodes()
        t(DEL, node_name="q")


@sequence(disk("a", file_node="af"), disk("b"), disk("t", size="4M"), nbd_server("b"))
def del_rules(t):
    """blockdev-del: unknown nodes, and nodes that something uses."""
    t(DEL)
    t(DEL, node_name="nosuch")
    t(DEL, node_name="")
    t(DEL, node_name=1)
    t(DEL, id="a")
    t(DEL, device="a")
    t(DEL, node_name="a", more=1)
    t(DEL, node_name="af")
    t(DEL, node_name="b")
    t("block-export-del", id="exp-b")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-b")
    t(DEL, node_name="b")
    t(DEL, node_name="b")
    t("block-dirty-bitmap-add", node="a", name="x")
    t(ADD, driver="raw", node_name="over", file="a")
    t(DEL, node_name="a")
    t(DEL, node_name="over")
    t(DEL, node_name="a")
    t.nodes()


@sequence(image("a"), image("b"),
          "--blockdev", "file,node-name=af,filename=$DIR/a.qcow2",
          "--blockdev", "file,node-name=bf,filename=$DIR/b.qcow2",
          "--blockdev", "qcow2,node-name=a,file=af", null("n"), nbd_server("a"))
def reopen(t):
    """blockdev-reopen: options that may change, those that may not, and bad ones."""
    go = {"driver": "qcow2", "node-name": "a", "file": "af"}
    t(REOPEN)
    t(REOPEN, options={})
    t(REOPEN, options=[{}])
    t(REOPEN, options=[{"driver": "qcow2", "file": "af"}])
    t(REOPEN, options=[{"driver": "qcow2", "node-name": "nosuch", "file": "af"}])
    t(REOPEN, options=[{"driver": "raw", "node-name": "a", "file": "af"}])
    t(REOPEN, options=[{"driver": "qcow2", "node-name": "a"}])
    t(REOPEN, options=[{**go, "file": "nosuch"}])
    t(REOPEN, options=[{**go, "file": {"driver": "file", "filename": "$DIR/a.qcow2"}}])
    t(REOPEN, options=[{**go, "file": {"driver": "file", "node-name": "x", "filename": "$DIR/a.qcow2"}}])
    t(REOPEN, options=[{**go, "nosuch": 1}])
    t(REOPEN, options=[{**go, "backing": "nosuch"}])
    t(REOPEN, options=[go])
    t(REOPEN, options=[go, go])
    t(REOPEN, options=[{**go, "read-only": True}])
    t.nodes()
    t(REOPEN, options=[{**go, "discard": "unmap", "detect-zeroes": "unmap"}])
    t.nodes()
    t(REOPEN, options=[{**go, "detect-zeroes": "unmap"}])
    t(REOPEN, options=[{**go, "cache": {"no-flush": True}}])
    t.nodes()
    t(REOPEN, options=[{**go, "force-share": True}])
    t(REOPEN, options=[{**go, "lazy-refcounts": True}])
    t(REOPEN, options=[go])
    t.unexport("a")
    t("block-dirty-bitmap-add", node="a", name="p", persistent=True)
    t(REOPEN, options=[{**go, "read-only": True}])
    t.nodes()
    t("block-dirty-bitmap-clear", node="a", name="p")
    t("block-dirty-bitmap-add", node="a", name="b")
    t(REOPEN, options=[{**go, "read-only": True},
                       {"driver": "file", "node-name": "af", "filename": "$DIR/a.qcow2", "read-only": True}])
    t.nodes()
    t(REOPEN, options=[{**go, "read-only": False}])
    t(REOPEN, options=[{"driver": "file", "node-name": "af", "filename": "$DIR/a.qcow2"}, go])
    t.nodes()
    t(REOPEN, options=[{"driver": "file", "node-name": "af", "filename": "$DIR/b.qcow2"}])
    t(REOPEN, options=[{"driver": "null-co", "node-name": "n", "size": 8 << 20}])
    t.nodes()


@sequence(image("a", "raw", data="write -P 1 0 4M"), image("b", "raw", data="write -P 2 0 4M"), image("c", "raw", size="8M"),
          "--blockdev", "file,node-name=af,filename=$DIR/a.raw",
          "--blockdev", "file,node-name=bf,filename=$DIR/b.raw",
          "--blockdev", "file,node-name=cf,filename=$DIR/c.raw",
          "--blockdev", "raw,node-name=a,file=af", nbd_server("a"))
def reopen_child(t):
    """blockdev-reopen that gives a raw node another file, as fleecing does to insert its filter."""
    go = {"driver": "raw", "node-name": "a", "file": "af"}
    t.read("a", 0, 512)
    t(REOPEN, options=[{**go, "file": "bf"}])
    t.read("a", 0, 512)
    t("blockdev-del", node_name="bf")
    t.nodes()
    t(REOPEN, options=[{**go, "file": "a"}])
    t(REOPEN, options=[{**go, "file": "cf"}])
    t.nodes()
    t(REOPEN, options=[{**go, "offset": 512}])
    t(REOPEN, options=[{**go, "size": 1 << 20}])
    t(REOPEN, options=[go])
    t.nodes()


@sequence(image("a", data="write -P 1 0 1M"), disk("t"),
          "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=$DIR/a.qcow2",
          "--blockdev", "raw,node-name=top,file=disk", nbd_server("top"))
def reopen_inserts_a_filter(t):
    """Fleecing of a disk that is exported: the filter goes under the export's node, and out again."""
    t("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="t")
    t(REOPEN, options=[{"driver": "raw", "node-name": "top", "file": "cbw"}])
    t("blockdev-add", driver="snapshot-access", node_name="snap", file="cbw")
    t("block-export-add", type="nbd", id="exp-snap", node_name="snap", name="snap")
    t.write("top", 0, 65536)
    t.read("snap", 0, 131072)
    t.read("top", 0, 131072)
    t.nodes()
    t.unexport("snap")
    t("blockdev-del", node_name="snap")
    t("blockdev-del", node_name="cbw")
    t(REOPEN, options=[{"driver": "raw", "node-name": "top", "file": "disk"}])
    t("blockdev-del", node_name="cbw")
    t.read("top", 0, 131072)
    t.nodes()


@sequence(disk("a", bitmaps=["p"]), disk("r", "raw"), null("n"), disk("ro", more="read-only=on"),
          disk("v2", compat="0.10"), nbd_server("r"))
def resize(t):
    """block_resize: arguments, growing and shrinking, formats that cannot."""
    t("block_resize")
    t("block_resize", node_name="a")
    t("block_resize", size=1 << 20)
    t("block_resize", node_name="nosuch", size=8 << 20)
    t("block_resize", device="nosuch", size=8 << 20)
    t("block_resize", device="a", node_name="a", size=8 << 20)
    for size in (-1, -512, "8M", 1.5, None, 1 << 63, (1 << 63) - 1, 1000, 1 << 62):
        t("block_resize", node_name="a", size=size)
    t("block_resize", node_name="n", size=8 << 20)
    t("block_resize", node_name="ro", size=8 << 20)
    t("block_resize", node_name="r", size=8 << 20)
    t.unexport("r")
    t("block_resize", node_name="r", size=8 << 20)
    t("block_resize", node_name="r", size=2 << 20)
    t("block_resize", node_name="r", size=0)
    t("block_resize", node_name="v2", size=8 << 20)
    t("block_resize", node_name="v2", size=2 << 20)
    t("block-dirty-bitmap-add", node="r", name="rb")
    t("block_resize", node_name="r", size=4 << 20)
    t("block_resize", node_name="a", size=4 << 20)
    t.nodes()


@sequence(disk("a"))
def resize_by_device(t):
    """A node's name as `device`: ours takes one wherever QEMU takes a device."""
    t("block_resize", device="a", size=8 << 20)


@sequence(disk("a"), nbd_server("a"))
def resize_with_bitmaps(t):
    """Growing and shrinking with bitmaps: what was never written is clean when it comes."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t("block-dirty-bitmap-add", node="a", name="d", disabled=True)
    t("block-dirty-bitmap-add", node="a", name="g", granularity=1 << 20)
    t.write("a", 0, 65536)
    t("block_resize", node_name="a", size=8 << 20)
    t.unexport("a")
    t("block_resize", node_name="a", size=8 << 20)
    t.nodes()
    t("block_resize", node_name="a", size=8 << 20)
    t.export("a")
    t.write("a", 7 << 20, 65536)
    t.nodes()
    t.unexport("a")
    t("block_resize", node_name="a", size=(1 << 20) + 512)
    t.nodes()
    for name in ("b", "d", "g"):
        t("x-debug-block-dirty-bitmap-sha256", node="a", name=name)
    t.finish()
    t.check("a.qcow2")


@sequence(disk("a"), nbd_server("a"))
def resize_with_persistent_bitmap(t):
    """A stored bitmap follows the size over a restart."""
    t("block-dirty-bitmap-add", node="a", name="p", persistent=True)
    t.write("a", 0, 65536)
    t.unexport("a")
    t("block_resize", node_name="a", size=6 << 20)
    t.nodes()
    t.finish()
    t.bitmaps_on_disk("a.qcow2")
    t.check("a.qcow2")
    t.start()
    t.unexport("a")
    t("block_resize", node_name="a", size=7 << 20)
    t.nodes()


@sequence(disk("a", bitmaps=["p"]), nbd_server("a"))
def resize_brings_back(t):
    """Shrunk and grown again: what was cut off is dirty (QEMU loses it: a wanted difference)."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 3 << 20, 65536)
    t.unexport("a")
    t("block_resize", node_name="a", size=2 << 20)
    t.nodes()
    t("block_resize", node_name="a", size=4 << 20)
    t.nodes()
    t("block-dirty-bitmap-clear", node="a", name="b")
    t("block_resize", node_name="a", size=5 << 20)
    t.nodes()


@sequence(disk("a", data="write -P 1 0 4M"), disk("t"), mask=["BLOCK_JOB_CANCELLED.offset"])
def resize_while_backed_up(t):
    """block_resize of a node that a backup reads."""
    t("blockdev-backup", job_id="j", device="a", target="t", sync="full", speed=65536)
    t.wait_job("j", "running")
    t("block_resize", node_name="a", size=8 << 20)
    t("block_resize", node_name="t", size=8 << 20)
    t("job-cancel", id="j")
    t.wait_job("j", "null")
    t("block_resize", node_name="a", size=8 << 20)


@sequence(disk("a"), disk("t", size="4M"), nbd_server())
def copy_before_write(t):
    """copy-before-write and snapshot-access by hand: fleecing."""
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "a", "target": "t"}
    t(ADD, driver="copy-before-write", node_name="cbw")
    t(ADD, driver="copy-before-write", node_name="cbw", file="a")
    t(ADD, driver="copy-before-write", node_name="cbw", target="t")
    t(ADD, {**cbw, "file": "nosuch"})
    t(ADD, {**cbw, "target": "nosuch"})
    t(ADD, {**cbw, "target": "a"})
    t(DEL, node_name="cbw")
    t(ADD, {**cbw, "bitmap": "b"})
    t(ADD, {**cbw, "bitmap": {"node": "a", "name": "nosuch"}})
    t(ADD, {**cbw, "bitmap": {"node": "a"}})
    t(ADD, {**cbw, "on-cbw-error": "nosuch"})
    t(ADD, {**cbw, "on-cbw-error": 1})
    t(ADD, {**cbw, "cbw-timeout": "x"})
    t(ADD, {**cbw, "cbw-timeout": -1})
    t(ADD, {**cbw, "nosuch": 1})
    t(ADD, cbw)
    t(DEL, node_name="t")
    t(ADD, driver="snapshot-access", node_name="sa")
    t(ADD, driver="snapshot-access", node_name="sa", file="t")
    t(DEL, node_name="sa")
    t(ADD, driver="snapshot-access", node_name="sa", file="cbw")
    t.nodes()
    t("block-export-add", type="nbd", id="g", node_name="cbw", name="guest", writable=True)
    t("block-export-add", type="nbd", id="s", node_name="sa", name="snap", writable=True)
    t("block-export-add", type="nbd", id="s", node_name="sa", name="snap")
    t.write("guest", 0, 65536)
    t.read("snap", 0, 131072)
    t.read("guest", 0, 131072)
    t("query-block-exports")
    t.nodes()
    t("query-block")


@sequence(disk("a", data="write -P 1 0 1M"), disk("t", size="4M"), nbd_server())
def copy_before_write_bitmap(t):
    """copy-before-write with a bitmap: only what is dirty may be read of the snapshot."""
    t("block-export-add", type="nbd", id="w", node_name="a", name="a", writable=True)
    t("block-dirty-bitmap-add", node="a", name="b")
    t.write("a", 0, 65536)
    t.hang_up("a")
    t("block-export-del", id="w")
    t.wait("BLOCK_EXPORT_DELETED", id="w")
    t(ADD, driver="copy-before-write", node_name="cbw", file="a", target="t",
      bitmap={"node": "a", "name": "b"}, on_cbw_error="break-snapshot", cbw_timeout=5)
    t(ADD, driver="snapshot-access", node_name="sa", file="cbw")
    t("block-export-add", type="nbd", id="s", node_name="sa", name="snap")
    t.read("snap", 0, 65536)
    t.read("snap", 65536, 65536)
    t.nodes()


@sequence(disk("a"), disk("r", "raw"), nbd_server("a"))
def query_blockstats(t):
    """query-blockstats: with and without query-nodes, and after some requests."""
    t("query-blockstats")
    t("query-blockstats", query_nodes=False)
    t("query-blockstats", query_nodes=True, mask=["*operations", "*bytes", "*merged"])
    t.write("a", 0, 65536)
    t.read("a", 0, 65536)
    t.hang_up("a")
    t("query-blockstats", query_nodes=True, mask=["*operations", "*bytes", "*merged"])
    t("query-blockstats", mask=["*operations", "*bytes", "*merged"])


@sequence(disk("a", file_node="af"), image("o", size=None, backing_file="a.qcow2", backing_fmt="qcow2"),
          "--blockdev", "qcow2,node-name=o,file.driver=file,file.filename=$DIR/o.qcow2,backing=a",
          disk("x"), null("n"), nbd_server("x"))
def query_shapes(t):
    """The queries of nodes: named, unnamed, used, unused, exported."""
    t("query-block")
    t("query-named-block-nodes")
    t("query-named-block-nodes", flat=False)
    t("query-named-block-nodes", flat=True)


@sequence()
def throttle_groups_and_objects(t):
    """object-add and object-del: kinds, ids, users."""
    t("object-add")
    t("object-add", qom_type="iothread")
    t("object-add", id="i")
    t("object-add", qom_type="nosuch", id="i")
    t("object-add", qom_type="", id="i")
    t("object-add", qom_type=1, id="i")
    t("object-add", qom_type="iothread", id="")
    t("object-add", qom_type="iothread", id="1x")
    t("object-add", qom_type="iothread", id="a b")
    t("object-add", qom_type="iothread", id=1)
    t("object-add", qom_type="iothread", id="i", nosuch=1)
    t("object-add", qom_type="iothread", id="i")
    t("object-add", qom_type="iothread", id="i")
    t("object-add", qom_type="secret", id="s")
    t("object-add", qom_type="secret", id="s", data="geheim")
    t("object-add", qom_type="secret", id="s2", file="$DIR/nosuch")
    t("object-add", qom_type="secret", id="s3", data="x", file="y")
    t("object-add", qom_type="secret", id="s4", data="!", format="base64")
    t("object-add", qom_type="secret", id="s5", data="Z2VoZWlt", format="base64")
    t("object-add", qom_type="secret", id="s6", data="x", format="nosuch")
    t("object-del")
    t("object-del", id="nosuch")
    t("object-del", id="i")
    t("object-del", id="i")
    t("object-del", id="s")
    t("object-del", id=1)


@sequence(disk("a"), "--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock")
def iothreads(t):
    """An export in an iothread: the object is in use as long as the export."""
    t("object-add", qom_type="iothread", id="io")
    t("block-export-add", type="nbd", id="e", node_name="a", iothread="io")
    t("block-export-add", type="nbd", id="f", node_name="a", name="f", iothread="nosuch")
    t("query-block-exports")
    t("block-export-del", id="e")
    t.wait("BLOCK_EXPORT_DELETED", id="e")
    t("object-del", id="io")
    t("object-add", qom_type="iothread", id="io2", poll_max_ns=1 << 20, poll_grow=2, poll_shrink=2, aio_max_batch=8)
    t("object-add", qom_type="iothread", id="io3", poll_max_ns=-1)
    t("object-add", qom_type="iothread", id="io3", poll_grow="x")
    t("object-add", qom_type="iothread", id="io3", aio_max_batch=1 << 63)
    t("object-del", id="io2")
