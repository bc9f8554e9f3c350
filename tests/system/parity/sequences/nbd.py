"""The NBD server and its exports, by their commands; a guest's view of them."""

from ..table import disk, null, nbd_server, sequence

START, STOP = "nbd-server-start", "nbd-server-stop"
ADD, DEL = "block-export-add", "block-export-del"
UNIX = {"type": "unix", "data": {"path": "$DIR/nbd.sock"}}


@sequence(disk("a"))
def server_start_arguments(t):
    """nbd-server-start and -stop: addresses, limits, twice."""
    t(STOP)
    t(START)
    for addr in ({}, 1, "x", [], None, {"type": "nosuch", "data": {}}, {"type": "unix"},
                 {"type": "unix", "data": {}}, {"type": "unix", "data": {"path": 1}},
                 {"type": "unix", "path": "x"},
                 {"type": "unix", "data": {"path": "$DIR/nosuch/x"}},
                 {"type": "unix", "data": {"path": "$DIR/" + "x" * 120}},
                 {"type": "inet", "data": {"host": "127.0.0.1"}},
                 {"type": "inet", "data": {"port": "1"}},
                 {"type": "inet", "data": {"host": "127.0.0.1", "port": 1}},
                 {"type": "inet", "data": {"host": "127.0.0.1", "port": "x"}},
                 {"type": "inet", "data": {"host": "no.such.host.invalid", "port": "1"}},
                 {"type": "inet", "data": {"host": "192.0.2.1", "port": "$PORT"}}):
        t(START, addr=addr, mask=["error.desc"] if "invalid" in str(addr) else [])
    t(START, addr=UNIX, max_connections="x")
    t(START, addr=UNIX, max_connections=-1)
    t(START, addr=UNIX, max_connections=1 << 32)
    t(START, addr=UNIX, nosuch=1)
    t(START, addr=UNIX)
    t(START, addr=UNIX)
    t(STOP)
    t(STOP)
    t(START, addr=UNIX, max_connections=0)
    t(STOP)
    t(START, addr=UNIX, max_connections=2)
    t(STOP)
    t(START, addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "$PORT"}})
    t(STOP)
    t(START, addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "$PORT", "ipv4": True}})
    t(STOP)


@sequence()
def server_start_later(t):
    """TLS, and descriptors, are for a later issue: refused by their names."""
    t(START, addr={"type": "fd", "data": {"str": "nosuch"}})
    t(START, addr={"type": "fd", "data": {"str": "99"}})
    t(START, addr=UNIX, tls_creds="nosuch")
    t(START, addr=UNIX, tls_creds=1)
    t(START, addr=UNIX, tls_authz="nosuch")


@sequence(disk("a"), disk("ro", more="read-only=on"), nbd_server())
def export_arguments(t):
    """block-export-add: missing, unknown, wrong-typed arguments; ids and names twice."""
    go = {"type": "nbd", "id": "e", "node-name": "a"}
    t(ADD)
    for name in ("type", "id", "node-name"):
        t(ADD, {k: v for k, v in go.items() if k != name})
        for value in ("nosuch/", "", 1, None):
            t(ADD, {**go, name: value})
    for name, values in (("name", (1, "", "x" * 4097)), ("description", (1, "x" * 4097)),
                         ("writable", ("on", 1)), ("writethrough", ("on", 1)),
                         ("iothread", ("nosuch", 1, "")), ("fixed-iothread", (1, True)),
                         ("bitmaps", ("b", ["nosuch"], [1], [{"node": "a", "name": "nosuch"}],
                                      [{"node": "nosuch", "name": "b"}], [{}], ["x" * 1024])),
                         ("bitmap", ("b",)), ("allocation-depth", ("on", 1)), ("device", ("a",)),
                         ("nosuch", (1,))):
        for value in values:
            t(ADD, {**go, name: value})
            t(DEL, id="e", mask=["error"] if name != "name" else [])
    t(ADD, go)
    t(ADD, go)
    t(ADD, {**go, "id": "f"})
    t(ADD, {**go, "id": "f", "name": "other"})
    t(ADD, {**go, "id": "w", "node-name": "ro", "name": "w", "writable": True})
    t(ADD, {**go, "id": "r", "node-name": "ro", "name": "r"})
    t(ADD, {**go, "id": "d", "name": "d", "description": "ein Wort", "allocation-depth": True,
            "writethrough": True, "writable": True})
    t("query-block-exports")
    t.nbd_list()
    t("query-block")


@sequence(disk("a"), nbd_server())
def export_ids(t):
    """Ids that are well-formed and not."""
    for ident in ("1", "a b", "#x", "-", "a/b", "ä", "x" * 200, "A-1.b_c"):
        t(ADD, type="nbd", id=ident, node_name="a", name=ident)
    t("query-block-exports")


@sequence(disk("a"), disk("b"), nbd_server("a", "b"))
def export_del(t):
    """block-export-del: modes, unknown ids, an export in use."""
    t(DEL)
    t(DEL, id="nosuch")
    t(DEL, id=1)
    t(DEL, id="exp-a", mode="nosuch")
    t(DEL, id="exp-a", mode=1)
    t(DEL, id="exp-a", nosuch=1)
    t.read("a", 0, 512)
    t("query-block-exports")
    t(DEL, id="exp-a")
    t(DEL, id="exp-a", mode="safe")
    t.read("a", 0, 512)
    t(DEL, id="exp-a", mode="hard")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-a")
    t("query-block-exports")
    t(DEL, id="exp-a")
    t.write("b", 0, 512)
    t.hang_up("b")
    t(DEL, id="exp-b", mode="hard")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-b")
    t("query-block-exports")
    t("blockdev-del", node_name="a")


@sequence(disk("a"), disk("b"), nbd_server("a", "b"))
def server_stop_ends_exports(t):
    """nbd-server-stop deletes the exports; the nodes stay."""
    t.write("a", 0, 65536)
    t(STOP)
    t.wait("BLOCK_EXPORT_DELETED", id="exp-a")
    t.wait("BLOCK_EXPORT_DELETED", id="exp-b")
    t("query-block-exports")
    t(ADD, type="nbd", id="x", node_name="a")
    t.nodes()


@sequence(disk("a"), disk("ro", more="read-only=on"), nbd_server())
def nbd_server_add_remove(t):
    """The older nbd-server-add and -remove."""
    add, remove = "nbd-server-add", "nbd-server-remove"
    t(add)
    t(add, device="nosuch")
    t(add, device=1)
    t(add, device="a", nosuch=1)
    t(add, device="a", bitmap="nosuch")
    t(add, device="a", name=1)
    t(add, device="a", writable="x")
    t(add, device="a", description="x" * 4097)
    t(add, device="a", name="x" * 4097)
    t(add, device="a")
    t(add, device="a")
    t(add, device="a", name="two", writable=True, description="d")
    t(add, device="ro", writable=True)
    t(add, device="ro", name="ro2", writable=True)
    t("block-dirty-bitmap-add", node="a", name="b", disabled=True)
    t(add, device="a", name="three", bitmap="b")
    t("query-block-exports")
    t.nbd_list()
    t(remove)
    t(remove, name="nosuch")
    t(remove, name=1)
    t(remove, name="two", mode="nosuch")
    t(remove, name="two", mode="safe")
    t.wait("BLOCK_EXPORT_DELETED", id="two")
    t.read("three", 0, 512)
    t(remove, name="three")
    t(remove, name="three", mode="hard")
    t.wait("BLOCK_EXPORT_DELETED", id="three")
    t("query-block-exports")


@sequence()
def nbd_server_not_running(t):
    """Exports without a server."""
    t("nbd-server-add", device="a")
    t("nbd-server-remove", name="a")
    t(ADD, type="nbd", id="e", node_name="a")
    t(DEL, id="e")
    t("query-block-exports")


@sequence(disk("a", data=["write -P 1 0 64k", "write -z 128k 64k", "write -P 2 1M 64k",
                      "write -P 3 2M 64k"]), nbd_server())
def nbd_contexts(t):
    """Block status: base:allocation, dirty bitmaps of three granularities, allocation depth."""
    t("block-dirty-bitmap-add", node="a", name="b")
    t("block-dirty-bitmap-add", node="a", name="fine", granularity=512)
    t("block-dirty-bitmap-add", node="a", name="coarse", granularity=1 << 20)
    t("block-dirty-bitmap-add", node="a", name="off", disabled=True)
    t(ADD, type="nbd", id="w", node_name="a", name="a", writable=True)
    t.write("a", 2 << 20, 512)
    t.write("a", 3 << 20, 65536)
    t.hang_up("a")
    t(DEL, id="w")
    t.wait("BLOCK_EXPORT_DELETED", id="w")
    for name in ("b", "fine", "coarse"):
        t("block-dirty-bitmap-disable", node="a", name=name)
    t(ADD, type="nbd", id="e", node_name="a", name="a", allocation_depth=True,
      bitmaps=["b", "fine", {"node": "a", "name": "coarse"}, "off"])
    t.extents("a", "base:allocation")
    t.extents("a", "qemu:allocation-depth")
    for name in ("b", "fine", "coarse", "off", "nosuch"):
        t.extents("a", f"qemu:dirty-bitmap:{name}")
    t.nbd_list()


@sequence(disk("base", data="write -P 1 0 128k"), disk("a", data="write -P 9 64k 64k"), null("n"),
          disk("odd", "raw", size="1000"), nbd_server("a", "n", "odd"))
def nbd_guest(t):
    """A guest's reads and writes: aligned, unaligned, zeroes, trims, the end of the disk."""
    t.nbd_list()
    t.write("a", 0, 65536)
    t.write("a", 1, 3)
    t.write("a", 65535, 2)
    t.read("a", 0, 131072)
    t.zero("a", 100, 1000)
    t.trim("a", 4096, 4096)
    t.read("a", 0, 131072)
    t.read("a", (4 << 20) - 1, 1)
    t.write("n", 0, 512)
    t.read("n", 0, 512)
    t.read("odd", 0, 1000)
    t.write("odd", 990, 10)
    t.read("odd", 0, 1000)
    t.extents("a", "base:allocation")
    t.extents("n", "base:allocation")


@sequence(disk("a", data="write -P 1 0 64k"), disk("b"), disk("ro", more="read-only=on"),
          "--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock,max-connections=1",
          "--export", "nbd,id=e1,node-name=a,name=a,writable=on,description=Hallo",
          "--export", "nbd,id=e2,node-name=ro,name=ro",
          "--export", "type=nbd,id=e3,node-name=b")
def export_by_command_line(t):
    """Exports and a server of the command line."""
    t("query-block-exports")
    t.read("a", 0, 512)
    t("nbd-server-start", addr=UNIX)
    t("query-block")
