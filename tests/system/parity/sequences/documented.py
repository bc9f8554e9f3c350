"""The examples of QEMU's documents on bitmaps, one by one: what they say, both daemons do.

docs/interop/bitmaps.rst, its push backups and their failures; the same in docs/qmp-tour.md, with
words. (The bitmap modes: backup.py and failing.py; snapshots: snapshot.py; the mirror: mirror.py.)"""

import subprocess

from ..table import disk, image, nbd_server, sequence

ADD, REMOVE, CLEAR, MERGE = (f"block-dirty-bitmap-{verb}" for verb in ("add", "remove", "clear", "merge"))
BACKUP = "blockdev-backup"
DRIVE0 = disk("drive0", data="write -P 1 0 1M")


def create(t, name, backing=None):
    """qemu-img create, as the examples have it."""
    def run(where):
        extra = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        return subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *extra, f"{name}.qcow2",
                               *([] if backing else ["4M"])], cwd=where, check=False).returncode
    t.tool("qemu-img-create", run)


def target(t, name, node="target0", **fault):
    """The image NAME as a node; its writes fail by a rule."""
    file = {"driver": "file", "filename": f"$DIR/{name}.qcow2"}
    if fault:
        file = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
    t("blockdev-add", node_name=node, driver="qcow2", file=file)


def backup(drive="drive0", node="target0", **more):
    """A backup's arguments; the job has the drive's name, as with QEMU's devices."""
    return {"job-id": drive, "device": drive, "target": node, "sync": "full", **more}


def incremental(drive="drive0", node="target0", **more):
    return backup(drive, node, sync="incremental", bitmap="bitmap0", **more)


def anchor(t):
    """A full backup with a bitmap of the same instant."""
    create(t, "drive0.full")
    target(t, "drive0.full")
    t.tx((ADD, {"node": "drive0", "name": "bitmap0"}), (BACKUP, backup()))
    t.wait_job("drive0", "null")
    t("blockdev-del", node_name="target0")


def increment(t, name, backing=None):
    create(t, name, backing)
    target(t, name)
    t(BACKUP, incremental())
    t.wait_job("drive0", "null")
    t.nodes()
    t("blockdev-del", node_name="target0")


@sequence(DRIVE0, nbd_server("drive0"))
def documented_commands(t):
    """Each bitmap command's example; one has a comma too many, and is refused."""
    t.broken('{ "execute": "block-dirty-bitmap-add", "arguments": { "node": "drive0",'
             ' "name": "bitmap0", "persistent": true, } }')
    t(ADD, node="drive0", name="bitmap0", persistent=True)
    t(ADD, node="drive0", name="bitmap1", granularity=32768, disabled=True)
    t.write("drive0", 65536, 512)
    t.nodes()
    t("block-dirty-bitmap-enable", node="drive0", name="bitmap0")
    t("block-dirty-bitmap-disable", node="drive0", name="bitmap0")
    t.write("drive0", 1 << 20, 512)
    t(ADD, node="drive0", name="new_bitmap")
    t(MERGE, node="drive0", target="new_bitmap", bitmaps=["bitmap0"])
    t.nodes()
    t(CLEAR, node="drive0", name="bitmap0")
    t("query-block", {})
    t.nodes()
    t(REMOVE, node="drive0", name="bitmap0")
    t.nodes()
    t.hang_up("drive0")
    t.finish()
    t.bitmaps_on_disk("drive0.qcow2")


@sequence(DRIVE0, nbd_server("drive0"))
def documented_names(t):
    """One name on two nodes; names that a bitmap cannot have."""
    create(t, "other")
    target(t, "other", "drive1")
    for node in ("drive0", "drive1"):
        t(ADD, node=node, name="bitmap0")
    t(ADD, node="drive0", name="")
    t(REMOVE, node="drive1", name="bitmap0")
    t.nodes()


@sequence(DRIVE0, nbd_server("drive0"))
def documented_anchor(t):
    """A new anchor, and the same bitmap reset to another."""
    anchor(t)
    t.write("drive0", 2 << 20, 65536, 2)
    t.nodes()
    create(t, "again")
    target(t, "again")
    t.tx((CLEAR, {"node": "drive0", "name": "bitmap0"}), (BACKUP, backup()))
    t.wait_job("drive0", "null")
    t.nodes()
    t.finish()
    t.content("drive0.full.qcow2", length=4 << 20)
    t.content("again.qcow2", length=4 << 20)


@sequence(DRIVE0, nbd_server("drive0"))
def documented_chain(t):
    """The first increment and the second; the third without a backing file, rebased later."""
    anchor(t)
    t.write("drive0", 2 << 20, 65536, 2)
    increment(t, "drive0.inc0", "drive0.full")
    t.write("drive0", 65536, 65536, 3)
    increment(t, "drive0.inc1", "drive0.inc0")
    t.write("drive0", 3 << 20, 512, 4)
    increment(t, "drive0.inc2")
    t.content("drive0.inc2.qcow2", length=4 << 20)
    t.tool("qemu-img-rebase", lambda where: subprocess.run(
        ["qemu-img", "rebase", "-u", "-b", "drive0.inc1.qcow2", "-F", "qcow2", "drive0.inc2.qcow2"],
        cwd=where, check=False).returncode)
    for name in ("full", "inc0", "inc1", "inc2"):
        t.content(f"drive0.{name}.qcow2", length=4 << 20)


@sequence(DRIVE0, nbd_server("drive0"))
def documented_busy(t):
    """While a backup runs its bitmap is busy; what is written meanwhile is for the next one."""
    anchor(t)
    t.write("drive0", 2 << 20, 65536, 2)
    create(t, "drive0.inc0", "drive0.full")
    target(t, "drive0.inc0")
    t(BACKUP, incremental(**{"auto-finalize": False}))
    t.wait_job("drive0", "pending")
    t.write("drive0", 3 << 20, 65536, 3)
    t.nodes()
    for verb in ("clear", "enable", "disable", "remove"):
        t(f"block-dirty-bitmap-{verb}", node="drive0", name="bitmap0")
    t("job-finalize", id="drive0")
    t.wait_job("drive0", "null")
    t.nodes()
    t.finish()
    t.content("drive0.inc0.qcow2", length=4 << 20)


@sequence(DRIVE0, nbd_server("drive0"))
def documented_failure(t):
    """No space on the target; the image is deleted and made anew, the command repeated."""
    anchor(t)
    t.write("drive0", 2 << 20, 65536, 2)
    create(t, "drive0.inc0", "drive0.full")
    target(t, "drive0.inc0", event="write_aio", errno=28)
    t(BACKUP, incremental())
    t.wait_job("drive0", "null")
    t("blockdev-del", node_name="target0")
    t.nodes()
    t.write("drive0", 3 << 20, 65536, 3)
    t.tool("rm", lambda where: (where / "drive0.inc0.qcow2").unlink())
    increment(t, "drive0.inc0", "drive0.full")
    t.finish()
    t.content("drive0.inc0.qcow2", length=4 << 20)


@sequence(DRIVE0, nbd_server("drive0"))
def documented_cancel(t):
    """BLOCK_JOB_CANCELLED instead of an error; the bitmap is kept the same way."""
    anchor(t)
    t.write("drive0", 2 << 20, 65536, 2)
    create(t, "drive0.inc0", "drive0.full")
    target(t, "drive0.inc0")
    t(BACKUP, incremental(**{"auto-finalize": False}))
    t.wait_job("drive0", "pending")
    t.write("drive0", 3 << 20, 65536, 3)
    t("block-job-cancel", device="drive0")
    t.wait_job("drive0", "null")
    t.nodes()
    t(BACKUP, incremental())
    t.wait_job("drive0", "null")
    t.nodes()


# Two drives; reads of the second fail at 2 MiB, once.
DRIVES = (DRIVE0, image("drive1", "raw", data="write -P 5 0 1M"),
          "--blockdev", "raw,node-name=drive1,file.driver=blkdebug,file.image.driver=file,"
          "file.image.filename=$DIR/drive1.raw,file.inject-error.0.event=none,"
          "file.inject-error.0.iotype=read,file.inject-error.0.sector=4096,"
          "file.inject-error.0.errno=5,file.inject-error.0.once=on",
          nbd_server("drive0", "drive1"))


def targets(t, suffix, backing=None):
    for number in "01":
        create(t, f"drive{number}.{suffix}", backing and f"drive{number}.{backing}")
        target(t, f"drive{number}.{suffix}", f"target{number}")


def end(t, *nodes):
    for drive in ("drive0", "drive1"):
        t.wait_job(drive, "null")
    t.nodes()
    for node in ("target0", "target1"):
        t("blockdev-del", node_name=node)


def anchors(t):
    targets(t, "full")
    t.tx((ADD, {"node": "drive0", "name": "bitmap0"}), (ADD, {"node": "drive1", "name": "bitmap0"}),
         (BACKUP, backup()), (BACKUP, backup("drive1", "target1")))
    end(t)


def both(t, slow=None, **properties):
    t.tx((BACKUP, incremental(**({"speed": slow} if slow else {}))),
         (BACKUP, incremental("drive1", "target1")), **properties)


@sequence(*DRIVES)
def documented_two_drives(t):
    """Anchors and increments of two drives; an action's type as it is misspelt there."""
    anchors(t)
    t.write("drive0", 2 << 20, 65536, 2)
    t.write("drive1", 3 << 20, 65536, 6)
    targets(t, "inc0", "full")
    t.tx(("blockev-backup", incremental()), (BACKUP, incremental("drive1", "target1")))
    both(t)
    end(t)
    t.finish()
    for drive in "01":
        t.content(f"drive{drive}.inc0.qcow2", length=4 << 20)


@sequence(*DRIVES)
def documented_partial_failure(t):
    """One of two fails: the other's increment counts, and the next one mends the set."""
    anchors(t)
    t.write("drive0", 2 << 20, 65536, 2)
    t.write("drive1", 2 << 20, 65536, 6)
    targets(t, "inc0", "full")
    both(t)
    end(t)
    t.write("drive0", 3 << 20, 65536, 3)
    create(t, "drive0.inc1", "drive0.inc0")
    target(t, "drive0.inc1", "target0")
    create(t, "drive1.inc1", "drive1.full")
    target(t, "drive1.inc1", "target1")
    both(t)
    end(t)
    t.finish()
    for drive in "01":
        t.content(f"drive{drive}.inc1.qcow2", length=4 << 20)


@sequence(*DRIVES, mask=["BLOCK_JOB_CANCELLED.offset"])
def documented_grouped(t):
    """The same in a group: both end, both bitmaps stay; the transaction is issued again."""
    anchors(t)
    t.write("drive0", 2 << 20, 262144, 2)
    t.write("drive1", 2 << 20, 65536, 6)
    targets(t, "inc0", "full")
    both(t, slow=65536, completion_mode="grouped")
    end(t)
    t.write("drive0", 3 << 20, 65536, 3)
    targets(t, "inc0", "full")
    both(t, completion_mode="grouped")
    end(t)
    t.finish()
    for drive in "01":
        t.content(f"drive{drive}.inc0.qcow2", length=4 << 20)
    t.start()
    t.tx((CLEAR, {"node": "drive0", "name": "bitmap0"}), completion_mode="grouped")
