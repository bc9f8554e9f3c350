"""Nodes of the driver nbd: what their options may be, what their names are, and what is said when the
server is not there, or has no such export."""

import subprocess
import time

from ..table import disk, image, sequence


class remote(image):
    """An image $DIR/NAME.raw that qemu-nbd serves on $DIR/NAME.server as export NAME."""

    def __init__(self, name, *options, **kwargs):
        super().__init__(name, "raw", **kwargs)
        self.server_options, self.process = options, None

    def prepare(self, where):
        super().prepare(where)
        socket = where / f"{self.name}.server"
        self.process = subprocess.Popen(
            ["qemu-nbd", "-f", "raw", "-x", self.name, "-t", "-e", "9", "-k", socket,
             *self.server_options, where / self.file])
        while not socket.exists():
            time.sleep(0.01)

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def server(name="x"):
    return {"type": "unix", "path": f"$DIR/{name}.server"}


@sequence(remote("x"))
def nbd_node_options(t):
    """blockdev-add: missing, unknown and wrong arguments; addresses of all kinds."""
    t("blockdev-add", driver="nbd", node_name="n")
    for value in (1, None, "x", {}, {"type": "nosuch"}, {"type": "unix"}, {"type": "inet"},
                  {"type": "inet", "host": "127.0.0.1"}, {"type": "unix", "path": 1},
                  {"type": "inet", "host": "127.0.0.1", "port": 1},
                  {"type": "unix", "path": "$DIR/nosuch.server"},
                  {"type": "inet", "host": "127.0.0.1", "port": "1"},
                  {"type": "inet", "host": "127.0.0.1", "port": "1x"},
                  {"type": "inet", "host": "::1", "port": "1", "ipv6": False, "ipv4": True},
                  {"type": "fd", "str": "nosuch"}):
        t("blockdev-add", driver="nbd", node_name="n", server=value)
    for name, values in (("export", (1, None, "", "nosuch", "y" * 4097)),
                         ("x-dirty-bitmap", (1, "z" * 4097)),
                         ("reconnect-delay", (-1, "1", 1.5, 1 << 32)), ("open-timeout", (-1, "1")),
                         ("filename", ("nbd://x",)), ("host", ("x",)), ("nosuch", (1,))):
        for value in values:
            t("blockdev-add", {"driver": "nbd", "node-name": "n", "server": server(), name: value})
    t("blockdev-add", driver="nbd", node_name="n", open_timeout=1, server=server("nosuch"), export="x")
    t("blockdev-add", driver="raw", node_name="n", file={"driver": "nbd", "server": server()})
    t.nodes()


@sequence(remote("x"))
def nbd_node_names(t):
    """What queries say of remote disks, alone and below others; names of names."""
    t("blockdev-add", driver="nbd", node_name="a", server=server(), export="x")
    t("blockdev-add", driver="raw", node_name="b", file="a")
    t("blockdev-add", driver="raw", node_name="c", read_only=True, offset=65536,
      file={"driver": "nbd", "server": server(), "export": "x", "reconnect-delay": 3})
    t("blockdev-add", driver="nbd", node_name="d", read_only=True, export="x", open_timeout=3,
      x_dirty_bitmap="base:allocation", server={**server(), "abstract": False})
    t("query-named-block-nodes")
    t("query-blockstats", query_nodes=True)
    t("block_resize", node_name="a", size=4 << 20)
    t("block_resize", node_name="a", size=8 << 20)
    t("block_resize", node_name="a", size=1 << 20)
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="b")
    t("blockdev-del", node_name="a")
    t("blockdev-del", node_name="c")
    t.nodes()


@sequence(remote("x"))
def nbd_node_reopen(t):
    """What can be changed: little."""
    x = {"driver": "nbd", "node-name": "a", "server": server(), "export": "x"}
    t("blockdev-add", x)
    for more in ({}, {"read-only": True}, {"read-only": False}, {"reconnect-delay": 2},
                 {"export": "y"}, {"server": server("y")}, {"cache": {"direct": True}},
                 {"detect-zeroes": "on"}, {"x-dirty-bitmap": "z"}):
        t("blockdev-reopen", options=[{**x, **more}])
        t.nodes()
    t("blockdev-reopen", options=[{k: v for k, v in x.items() if k != "export"}])
    t.nodes()


@sequence(remote("x", "-r"))
def nbd_node_read_only(t):
    """An export that is read-only."""
    x = {"driver": "nbd", "node-name": "a", "server": server(), "export": "x"}
    t("blockdev-add", {**x, "auto-read-only": True})
    t.nodes()
    t("blockdev-reopen", options=[{**x, "read-only": False}])
    t("blockdev-del", node_name="a")
    t("blockdev-add", {**x, "read-only": True})
    t.nodes()


@sequence(disk("a"), remote("t"))
def nbd_node_as_a_target(t):
    """A backup onto a remote disk, and by all ways to spell its name."""
    t("blockdev-add", driver="nbd", node_name="t", server=server("t"), export="t")
    t.backup(sync="full")
    t("blockdev-del", node_name="t")
    for target in ("nbd+unix:///t?socket=$DIR/t.server", "nbd:unix:$DIR/t.server:exportname=t",
                   'json:{"driver": "raw", "file.driver": "nbd", "file.server.type": "unix", '
                   '"file.server.path": "$DIR/t.server", "file.export": "t"}'):
        t("drive-backup", job_id="j", device="a", target=target, sync="full", format="raw",
          mode="existing")
        t.wait_job("j")
    t.nodes()
    for target in ("nbd:", "nbd://", "nbd+unix:///t", "nbd+unix:///?sock=x", "nbd+unix://h/t?socket=x",
                   "nbd+foo://x", "nbd:x", "nbd:127.0.0.1:1x", "nbd:unix:$DIR/nosuch:exportname=t",
                   "nbd:unix:$DIR/t.server:exportname=", "nbd:unix:$DIR/t.server",
                   "nbd:127.0.0.1:1:exportname=t", "nbd://127.0.0.1:1/t", "nbd+tcp://127.0.0.1:1/a%20b/c",
                   "nbd://127.0.0.1:1/t?x=1", "nbd://[::1]:1", "nbd:[::1]:1", "nbd://127.0.0.1:99999"):
        t("drive-backup", job_id="j", device="a", target=target, sync="full", format="raw",
          mode="existing")
