"""tidemarkd in a virtual machine that loses its power: a place for the histories of crash.py.

QEMU boots Debian's cloud kernel, by emulation alone, with an initramfs of our own: busybox, the
kernel's modules, tidemarkd with its libraries. The disk, its tide file and the backups are files on
a file system, ext4 or xfs, that the machine mounts at /data; clients come from outside, through
forwarded ports. A disk of format "device" is a second drive of the same kind. Power is lost by SIGKILL of QEMU: the page cache is gone, and with the drive
"volatile" also a part of what the drive had not flushed (volatile.py).

Content is judged by qemu-img out here, which reads the files of the chains through NBD exports.
"""

import contextlib
import glob
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

from .crash import must
from .daemon import QSD, Daemon, find_tidemarkd
from .nbd import nbd_uri
from .qmp import QMP, QMPError

QEMU, BUSYBOX = "/usr/bin/qemu-system-x86_64", "/usr/bin/busybox"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "xfs")
DRIVES = ("volatile", "file")
MKFS = {"ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
        "xfs": ("mkfs.xfs", "-q", "-f")}
FS_BYTES = 4 << 30
QMP_PORT, NBD_PORT = 4444, 10809

INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for m in $(cat /modules/order); do insmod /modules/$m; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
mount -t @FS@ /dev/vda /data || echo "MOUNT FAILED"
mkdir -p /data/state
# Data reaches the drive soon, and without a flush of the drive.
echo 5 > /proc/sys/vm/dirty_writeback_centisecs
echo 5 > /proc/sys/vm/dirty_expire_centisecs
export RUNTIME_DIRECTORY=/run/tidemark
echo READY
@ENV@ /bin/tidemarkd --chardev socket,id=m,host=0.0.0.0,port=4444,server=on,wait=off \\
    --monitor chardev=m --nbd-server addr.type=inet,addr.host=0.0.0.0,addr.port=10809
echo "ENDED $?"
sync
umount /data
poweroff -f
"""


class NotHere(Exception):
    """This machine cannot do it; the text says why."""


def find_kernel():
    """(image, directory of modules) of the newest cloud kernel."""
    found = sorted(glob.glob("/boot/vmlinuz-*cloud*"))
    if not found:
        raise NotHere("no cloud kernel (package linux-image-cloud-amd64)")
    return found[-1], pathlib.Path("/lib/modules") / found[-1].split("vmlinuz-")[1]


def check_machine(binary):
    for path, package in ((QEMU, "qemu-system-x86"), (BUSYBOX, "busybox-static"),
                          ("/usr/sbin/mkfs.xfs", "xfsprogs"), ("/usr/sbin/mkfs.ext4", "e2fsprogs")):
        if not os.path.exists(path):
            raise NotHere(f"no {path} (package {package})")
    if b"__asan_init" in pathlib.Path(binary).read_bytes():
        raise NotHere("a sanitizer in an emulated machine takes too long")
    find_kernel()


def modules_in_order(directory):
    """The files of MODULES and of all that they need, those first that others need."""
    needs, order = {}, []
    for line in (directory / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    builtin = (directory / "modules.builtin").read_text()

    def add(path):
        for other in needs[path]:
            add(other)
        if path not in order:
            order.append(path)
    for name in MODULES:
        paths = [p for p in needs if re.fullmatch(rf".*/{name}\.ko(\..z)?", p)]
        if paths:
            add(paths[0])
        elif f"/{name}.ko" not in builtin:
            raise NotHere(f"the kernel in {directory} has no module {name}")
    # The file system's checksums come by name, not by dependency.
    for extra in [p for p in needs if p.endswith("/crc32c_generic.ko")]:
        if extra not in order:
            order.insert(0, extra)
    return order


class Archive:
    """An initramfs: cpio's format "newc"."""

    def __init__(self, path):
        self.file, self.inode, self.names = open(path, "wb"), 0, set()

    def entry(self, name, mode, data=b"", device=(0, 0)):
        for parent in list(pathlib.PurePath(name).parents)[-2::-1]:
            if str(parent) not in self.names:
                self.entry(str(parent), 0o40755)
        self.names.add(name)
        self.inode += 1
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
        self.file.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    def copy(self, source, name, mode=0o100755):
        self.entry(name, mode, pathlib.Path(source).read_bytes())

    def close(self):
        self.entry("TRAILER!!!", 0)
        self.file.close()


def make_initramfs(path, binary, fs):
    archive = Archive(path)
    for name in ("proc", "sys", "dev", "run", "data", "tmp"):
        archive.entry(name, 0o40755)
    archive.entry("dev/console", 0o20600, device=(5, 1))
    archive.copy(BUSYBOX, "bin/busybox")
    archive.entry("bin/sh", 0o120777, b"busybox")
    archive.copy(binary, "bin/tidemarkd")
    said = subprocess.run(["ldd", binary], capture_output=True, check=True, text=True).stdout
    for library in re.findall(r"(?:=> )?(/\S+) \(0x", said):
        archive.copy(library, library.lstrip("/"))
    directory = find_kernel()[1]
    names = []
    for module in modules_in_order(directory):
        names.append(os.path.basename(module))
        archive.copy(directory / module, f"modules/{names[-1]}", 0o100644)
    archive.entry("modules/order", 0o100644, "\n".join(names).encode())
    env = " ".join(f"{key}={os.environ[key]}" for key in ("TIDEMARK_LOOP", "TIDEMARK_BROKEN")
                   if os.environ.get(key))
    archive.entry("init", 0o100755, INIT.replace("@FS@", fs).replace(
        "@ENV@", env).encode())
    archive.close()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class GuestPlace:
    power = True
    slow = False     # (a loss of power is no end)
    patience = 90.0

    def __init__(self, tmp, fs, drive, seed, binary=None):
        binary = binary or find_tidemarkd()
        check_machine(binary)
        self.tmp, self.drive = pathlib.Path(tmp), drive
        self.rng = random.Random(f"guest-{seed}")
        self.qemu = self.qmp = self.port = None
        self.servers, self.device_bytes = [], 0
        self.looks = self.boots = 0
        self.medium, self.console = self.tmp / "medium", self.tmp / "console.log"
        with open(self.medium, "wb") as file:
            file.truncate(FS_BYTES)
        subprocess.run([*MKFS[fs], str(self.medium)], check=True, env={
            **os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            stdout=subprocess.DEVNULL)
        make_initramfs(self.tmp / "initramfs", binary, fs)

    # -- where things are

    def path(self, name):
        return f"/data/{name}"

    def uri(self, export):
        return nbd_uri(export=export, port=self.port)

    def device(self, size):
        """The path of a drive of its own that is the disk; from the next boot on."""
        self.device_bytes = size
        with open(self.tmp / "disk", "wb") as file:
            file.truncate(size)
        return "/dev/vdb"

    @contextlib.contextmanager
    def look(self, name):
        self.looks += 1
        node = f"look{self.looks}"
        self.qmp.execute("blockdev-add", timeout=self.patience, driver="file", node_name=node,
                         filename=self.path(name), read_only=True)
        self.qmp.execute("block-export-add", type="nbd", id=node, node_name=node, name=node)
        yield {"driver": "nbd", "export": node,
               "server": {"type": "inet", "host": "127.0.0.1", "port": str(self.port)}}
        self.qmp.execute("block-export-del", id=node, mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", self.patience, id=node)
        self.qmp.execute("blockdev-del", timeout=self.patience, node_name=node)

    @contextlib.contextmanager
    def restored(self, chain):
        """By qemu-storage-daemon: in it a chain can be of files that have no names here."""
        with contextlib.ExitStack() as stack:
            argv, below = [], None
            for name in chain:
                file = stack.enter_context(self.look(name))
                image = {"driver": "qcow2", "node-name": f"q{len(argv)}", "file": file,
                         "backing": below, "read-only": True}
                argv += ["--blockdev", json.dumps(image)]
                below = image["node-name"]
            path = self.tmp / "restored.sock"
            path.unlink(missing_ok=True)
            stack.enter_context(Daemon(
                *argv, "--nbd-server", f"addr.type=unix,addr.path={path}", "--export",
                f"type=nbd,id=chain,node-name={below},name=chain", binary=QSD, directory=self.tmp))
            yield nbd_uri(path, "chain")

    # -- power

    def start_drive(self, name):
        """The options of QEMU for the drive whose medium is the file NAME."""
        device = ["-device", f"virtio-blk-pci,drive={name},serial=tidemark-{name},write-cache=on"]
        if self.drive == "file":
            return ["-blockdev", f"driver=file,filename={self.tmp}/{name},cache.direct=on,"
                    f"node-name={name}", *device]
        path = self.tmp / f"{name}.sock"
        path.unlink(missing_ok=True)
        self.servers.append(subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).with_name("volatile.py")), str(path),
             str(self.tmp / name), str(self.rng.random())], stdout=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 30
        while not path.exists():
            must(time.monotonic() < deadline, "the drive does not start")
            time.sleep(0.01)
        return ["-blockdev", f"driver=nbd,server.type=unix,server.path={path},node-name={name}", *device]

    def boot(self):
        drives = self.start_drive("medium")
        if self.device_bytes:
            drives += self.start_drive("disk")
        monitor, self.port = free_port(), free_port()
        self.console.unlink(missing_ok=True)
        # An emulated clock may gain seconds on a busy machine. As if each boot came a minute later,
        # no file of the last one is from the future.
        self.boots += 1
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 60 * self.boots))
        self.qemu = subprocess.Popen(
            [QEMU, "-M", "q35,accel=tcg", "-cpu", "max", "-m", "768", "-smp", "1", "-nodefaults",
             "-no-user-config", "-no-reboot", "-display", "none", "-rtc", f"base={now}", "-kernel", find_kernel()[0],
             "-initrd", str(self.tmp / "initramfs"), "-append",
             "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off no_timer_check",
             "-serial", f"file:{self.console}", *drives,
             "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{monitor}-:{QMP_PORT},"
             f"hostfwd=tcp:127.0.0.1:{self.port}-:{NBD_PORT}",
             "-device", "virtio-net-pci,netdev=net,romfile="],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + self.patience * 2
        while "READY" not in self.said():
            must(self.qemu.poll() is None, "QEMU ended")
            must(time.monotonic() < deadline, "the machine does not boot")
            time.sleep(0.05)
        must("FAILED" not in self.said(), self.said())
        while True:
            try:
                self.qmp = QMP(sock=socket.create_connection(("127.0.0.1", monitor)),
                               timeout=self.patience)
                return
            except (EOFError, ConnectionError):
                must("ENDED" not in self.said(), f"tidemarkd ended: {self.said()}")
                must(time.monotonic() < deadline, "no monitor in the machine")
                time.sleep(0.05)

    def cut(self):
        self.qemu.send_signal(signal.SIGKILL)

    def after_cut(self, lose):
        self.qemu.wait(60)
        while self.qmp.pump(10):     # what was answered
            pass
        must("ENDED" not in self.said(), f"tidemarkd had ended: {self.said()}")
        must("BUG:" not in self.said(), self.said())
        self.end_drive()

    def end_drive(self):
        self.qmp.close()
        servers, self.servers = self.servers, []
        for server in servers:
            said = server.communicate(timeout=60)[0]
            must(server.returncode == 0, f"the drive: {said}")

    def stop(self):
        self.qmp.execute("quit")
        while self.qmp.pump(self.patience * 2):
            pass
        must(self.qemu.wait(self.patience * 2) == 0, "QEMU's end")
        must("ENDED 0" in self.said(), self.said())
        self.end_drive()

    def has(self, name):
        try:
            self.qmp.execute("blockdev-add", driver="file", node_name="has", read_only=True,
                             filename=self.path(name))
        except QMPError as error:
            must("No such file" in str(error), str(error))
            return False
        self.qmp.execute("blockdev-del", node_name="has")
        return True

    def leftovers(self):
        return []

    def said(self):
        try:
            return self.console.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def close(self):
        for process in (self.qemu, *self.servers):
            if process and process.poll() is None:
                process.kill()
                process.wait()
