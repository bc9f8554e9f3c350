"""The parity table: sequences of steps, run against two daemons, compared after normalising.

A sequence is a function; its argument is a Recorder, called once for each QMP command:

    @sequence(disk("a"), disk("t"))
    def backup_needs_a_target(t):
        t("blockdev-backup", job_id="j", device="a", sync="full")

It runs once on each daemon. Nothing in it may depend on an answer, so that it can also be counted
without a daemon. What each step brought (an answer, an event waited for, an exit status) is
recorded; after the last step the events seen are recorded too, for each job or export in their
order (the order between two jobs is chance and not compared). The two records are then compared.

This file: the sequences' registry, what they can set up, the Recorder.
normal.py: what is removed before comparing. compare.py: the comparison and `differences`.
"""

import importlib
import json
import os
import pathlib
import pkgutil
import shutil
import signal
import socket
import subprocess
import tempfile

from tidemark_testlib import (
    QMP, QSD, Daemon, Exited, LoopDevice, SmallFileSystem, Timeout, connect, create_image, nbd_uri, qemu_img, qemu_io,
    temp_dir, wait_until,
)
from tidemark_testlib.nbd import extents

from . import normal

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 60.0      # seconds for an answer or an event,
IMPATIENCE = 0.5     # and after the first that did not come, so that a poor daemon fails quickly


# -- what a sequence needs before it starts


class Setup:
    """Something on disk, and the options that open it."""

    def prepare(self, where):
        """Makes the files in the directory WHERE."""

    def argv(self):
        return []

    def end(self):
        """Ends what prepare() began."""


_image_cache = {}
_cache_dir = None


def _cached(key, make):
    """Images are made once a run and copied: the table makes the same ones over and over."""
    global _cache_dir
    if _cache_dir is None:
        _cache_dir = tempfile.TemporaryDirectory(prefix="tm-parity-", dir="/tmp")
    if key not in _image_cache:
        path = pathlib.Path(_cache_dir.name) / f"{len(_image_cache)}.img"
        make(path)
        _image_cache[key] = path
    return _image_cache[key]


class image(Setup):
    """An image file $DIR/NAME.FMT. data: qemu-io commands; bitmaps: names given to qemu-img;
    in_use: leaves its bitmaps inconsistent, as a killed daemon does."""

    def __init__(self, name, fmt="qcow2", size="4M", data=(), bitmaps=(), in_use=False, **options):
        self.name, self.fmt, self.size, self.options = name, fmt, size, options
        self.data = [data] if isinstance(data, str) else list(data)
        self.bitmaps, self.in_use = list(bitmaps), in_use

    @property
    def file(self):
        return f"{self.name}.{self.fmt}"

    def prepare(self, where):
        options = dict(self.options)
        if "backing_file" in options:
            options["backing_file"] = where / options["backing_file"]
            self._make(where / self.file, options)
            return
        key = (self.fmt, self.size, tuple(self.data), tuple(self.bitmaps), self.in_use,
               tuple(sorted(options.items())))
        made = _cached(key, lambda path: self._make(path, options))
        subprocess.run(["cp", "--sparse=always", made, where / self.file], check=True)

    def _make(self, path, options):
        create_image(path, self.fmt, self.size, **options)
        for bitmap in self.bitmaps:
            qemu_img("bitmap", "--add", "-f", self.fmt, path, bitmap)
        if self.data:
            qemu_io(path, *self.data, fmt=self.fmt)
        if self.in_use:
            mark_in_use(path)


class disk(image):
    """An image, opened as a node of its name, by the driver of its format over `file`.
    more: options of the node, file_more: of the file node; file_node: its name.
    idle: tidemarkd saves its bitmaps when nobody has written for two seconds, so that they are not in
    use then. Otherwise never, as QEMU does; but blockdev-reopen would have to say so, too."""

    def __init__(self, name, fmt="qcow2", size="4M", more="", file_more="", file_node=None, idle=False,
                 **kwargs):
        super().__init__(name, fmt, size, **kwargs)
        self.more, self.file_more = more, file_more
        self.file_node, self.idle = file_node, idle

    def argv(self):
        options = [f"driver={self.fmt}", f"node-name={self.name}", "file.driver=file",
                   f"file.filename=$DIR/{self.file}"]
        if self.file_node:
            options.append(f"file.node-name={self.file_node}")
        if self.file_more:
            options += [f"file.{option}" for option in self.file_more.split(",")]
        never = "" if self.idle or self.fmt != "qcow2" else "$NEVER_IDLE"
        return ["--blockdev", ",".join(options + ([self.more] if self.more else [])) + never]


class null(Setup):
    """A null-co node: no file, reads as zeroes."""

    def __init__(self, name, size=4 << 20, more="read-zeroes=on"):
        self.name, self.size, self.more = name, size, more

    def argv(self):
        return ["--blockdev", f"null-co,node-name={self.name},size={self.size},{self.more}"]


class held(image):
    """An image that another process (qemu-io) has open for writing, or reading, throughout."""

    def __init__(self, name, fmt="qcow2", read_only=False, **kwargs):
        super().__init__(name, fmt, **kwargs)
        self.read_only = read_only
        self.holder = None

    def prepare(self, where):
        super().prepare(where)
        self.holder = subprocess.Popen(
            ["qemu-io", *(["-r"] if self.read_only else []), "-f", self.fmt, where / self.file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.holder.stdin.write(b"length\n")
        self.holder.stdin.flush()
        self.holder.stdout.readline()

    def end(self):
        if self.holder:
            self.holder.kill()
            self.holder.communicate()
            self.holder = None


class nbd_server(Setup):
    """An NBD server on $DIR/nbd.sock, with these nodes exported writable under their names."""

    def __init__(self, *nodes, bitmaps=None):
        self.nodes, self.bitmaps = nodes, bitmaps or {}

    def argv(self):
        argv = ["--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock"]
        for node in self.nodes:
            argv += ["--export", f"nbd,id=exp-{node},node-name={node},name={node},writable=on"]
        return argv


class file_size_limit(Setup):
    """The daemon can write no file beyond so many bytes (EFBIG): the way to errors without help
    from the daemon."""

    def __init__(self, limit):
        self.limit = limit


class small_disk(image):
    """A raw node of its name whose file is in a file system of SPACE bytes (a number and a letter), which
    has room for LEAVE of them: the way to ENOSPC. t.make_room() gives it the rest."""

    def __init__(self, name, space="16M", leave=1 << 20, size="4M"):
        super().__init__(name, "raw", size)
        self.space, self.leave = space, leave
        self.fs = None

    def prepare(self, where):
        self.fs = SmallFileSystem(where / "small", self.space)
        create_image(self.fs.outside / self.file, "raw", self.size)
        self.fs.fill(self.leave)

    def argv(self):
        return ["--blockdev", f"driver=raw,node-name={self.name},file.driver=file,"
                f"file.filename=$DIR/small/{self.file}"]

    def end(self):
        if self.fs:
            self.fs.close()
            self.fs = None


class loop_device(image):
    """A block device with an image on it, $DIR/NAME.dev. SECTOR: bytes of its logical sectors."""

    def __init__(self, name, fmt="raw", size="4M", sector=512, read_only=False, **kwargs):
        super().__init__(name, fmt, size, **kwargs)
        self.sector, self.read_only = sector, read_only
        self.device = None

    def prepare(self, where):
        super().prepare(where)
        if self.fmt != "raw":
            with open(where / self.file, "r+b") as file:
                file.truncate(8 << 20)
        self.device = LoopDevice(where / self.file, sector=self.sector, read_only=self.read_only)
        (where / f"{self.name}.dev").symlink_to(self.device.path)

    def end(self):
        if self.device:
            self.device.close()
            self.device = None


def mark_in_use(path):
    """Sets in_use (and nothing else) in each bitmap of a qcow2 image, by its header."""
    with open(path, "r+b") as f:
        header = f.read(4096)
        at = int.from_bytes(header[100:104], "big")
        while True:
            kind = int.from_bytes(header[at:at + 4], "big")
            size = int.from_bytes(header[at + 4:at + 8], "big")
            if kind == 0x23852875:
                break
            assert kind != 0, f"{path} has no bitmaps"
            at += 8 + (size + 7) // 8 * 8
        number = int.from_bytes(header[at + 8:at + 12], "big")
        entry = int.from_bytes(header[at + 24:at + 32], "big")
        for _ in range(number):
            f.seek(entry)
            fixed = f.read(24)
            f.seek(entry + 12)
            f.write((int.from_bytes(fixed[12:16], "big") | 1).to_bytes(4, "big"))
            name = int.from_bytes(fixed[18:20], "big")
            extra = int.from_bytes(fixed[20:24], "big")
            entry += (24 + name + extra + 7) // 8 * 8


# -- the registry


class Sequence:
    def __init__(self, function, setup, start, mask, pauses, wait_for_exit=True):
        self.name = function.__name__
        self.function = function
        self.module = function.__module__.rsplit(".", 1)[-1]
        self.doc = (function.__doc__ or "").strip()
        self.setup = setup
        self.start = start
        self.mask = mask
        self.pauses = pauses


_sequences = {}


def sequence(*setup, start=True, mask=(), pauses=False):
    """Registers a function as a sequence.

    setup   Setup objects and single options (strings; $DIR is the temporary directory)
    start   False: the steps start the daemon themselves (command lines)
    mask    patterns of paths ("return[*].offset", "BLOCK_JOB_CANCELLED.offset") whose value is
            chance in this sequence
    pauses  True: `paused` events are compared. Otherwise a job's paused-and-on-again is left out:
            QEMU reports internal quiescing so, at moments that are chance.
    """
    def register(function):
        assert function.__name__ not in _sequences, f"two sequences named {function.__name__}"
        _sequences[function.__name__] = Sequence(function, setup, start, tuple(mask), pauses)
        return function
    return register


def all_sequences():
    """Every sequence, in the order of the files and of their lines."""
    from . import sequences
    for module in sorted(m.name for m in pkgutil.iter_modules(sequences.__path__)):
        importlib.import_module(f"{sequences.__name__}.{module}")
    return list(_sequences.values())


# -- the recorder


class Died(Exception):
    """The daemon is gone; the rest of the sequence says nothing."""


class Step:
    """One recorded step. label: command#n, the n-th of that command in its sequence."""

    def __init__(self, label, request, result):
        self.label, self.request, self.result = label, request, result


def dashes(arguments):
    return {key.replace("_", "-"): value for key, value in arguments.items()}


class Recorder:
    """Runs a sequence on one daemon. binary=None: only counts."""

    def __init__(self, seq, binary, where):
        self.seq, self.binary, self.where = seq, binary, where
        self.steps = []
        self.daemon = None
        self.patience = PATIENCE
        self.extra = []
        self._labels = {}
        self._nbd = {}
        self._port = None
        self.events = []
        self.counted = 0

    # ---- bookkeeping

    @property
    def dry(self):
        return self.binary is None

    def _label(self, stem):
        self._labels[stem] = self._labels.get(stem, 0) + 1
        return f"{stem}#{self._labels[stem]}"

    def _record(self, stem, request, result, count=True):
        self.counted += count
        self.steps.append(Step(self._label(stem), request, result))

    def _subst(self, value):
        """$DIR and $PORT in what a step sends."""
        if isinstance(value, str):
            if "$PORT" in value:
                value = value.replace("$PORT", str(self.port))
            never = "" if self.binary == QSD else ",x-tidemark-persist.checkpoint-idle=0"
            value = value.replace("$NEVER_IDLE", never)
            return value.replace("$DIR", str(self.where))
        if isinstance(value, list):
            return [self._subst(v) for v in value]
        if isinstance(value, dict):
            return {self._subst(k): self._subst(v) for k, v in value.items()}
        return value

    @property
    def port(self):
        if self._port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
        return self._port

    # ---- the daemon's life

    def _argv(self):
        argv = []
        for item in self.seq.setup:
            argv += item.argv() if isinstance(item, Setup) else [item]
        return argv

    def prepare(self):
        for item in self.seq.setup:
            if isinstance(item, Setup):
                item.prepare(self.where)

    def start(self, *argv, negotiate=True, count=True):
        """Starts the daemon with these options (none: the sequence's own) and a monitor."""
        request = list(argv)
        argv = self._subst(list(argv) or self._argv())
        if self.dry:
            self._record("start", request, None, count)
            return
        try:
            limit = next((s.limit for s in self.seq.setup if isinstance(s, file_size_limit)), None)
            small = self.small
            self.daemon = Daemon(*argv, binary=self.binary, directory=self.where,
                                 prefix=small.fs.prefix if small else (),
                                 connect=negotiate, timeout=PATIENCE, file_size_limit=limit)
            if not negotiate:
                self.daemon.qmp = self.daemon.new_monitor(negotiate=False)
            self.daemon.qmp.timeout = self.patience
            result = {"started": True}
        except Exited as gone:
            result = {"exit": gone.status, "stderr": gone.stderr}
        except Timeout as timeout:
            result = {"TIMEOUT": str(timeout)}
        self._record("start", request, result, count)
        if "started" not in result:
            raise Died

    @property
    def small(self):
        return next((s for s in self.seq.setup if isinstance(s, small_disk)), None)

    def make_room(self):
        """The full file system of small_disk is full no more."""
        self.tool("make-room", lambda where: self.small.fs.make_room())

    def finish_under_guest(self, how):
        """Ends the daemon while its guests are connected; they are gone after it."""
        guests, self._nbd = self._nbd, {}
        self.finish(how)
        guests.clear()

    def finish(self, how="quit", count=True):
        """Ends the daemon; records its status, stderr and the events so far."""
        if self.dry:
            self._record("finish", how, None, count)
            return
        if self.daemon is None:
            return
        for handle in self._nbd.values():
            handle.shutdown()
        self._nbd = {}
        daemon, self.daemon = self.daemon, None
        result = {}
        try:
            if daemon.running and daemon.qmp and not daemon.qmp.eof:
                daemon.qmp.call("query-version")    # a round trip: all events are here
                self.events += daemon.qmp.history
                if how == "quit" and "error" in daemon.qmp.call("quit"):
                    how = "term"        # capabilities were never negotiated
            if daemon.running and how in ("term", "int"):
                daemon.process.send_signal(signal.SIGTERM if how == "term" else signal.SIGINT)
            if how == "kill":
                daemon.kill()
            result["exit"] = daemon.wait(PATIENCE)
        except Exception as error:
            result["exit"] = f"did not end: {type(error).__name__}"
        daemon.kill()
        result["stderr"] = daemon.stderr
        daemon.stderr_path.unlink()
        self._record("finish", how, result, count)

    def restart(self, *argv, how="quit"):
        self.finish(how)
        self.start(*argv)

    # ---- steps

    def __call__(self, command, arguments=None, oob=False, mask=(), **named):
        """One QMP command. Names are sent with dashes: job_id -> "job-id"."""
        arguments = dashes(named) if arguments is None and named else arguments
        if self.dry:
            return self._record(command, arguments, None)
        def run():
            if isinstance(arguments, dict) and isinstance(arguments.get("actions", []), list):
                # What is waited for now comes after this.
                for data in [arguments, *(a.get("data") for a in arguments.get("actions") or []
                                          if isinstance(a, dict))]:
                    for key in ("job-id", "id", "device"):
                        self._forget(data.get(key) if isinstance(data, dict) else None)
            return self.daemon.qmp.call(command, self._subst(arguments), oob=oob)
        result = self._guard(run)
        result.pop("id", None)
        self._record(command, arguments, normal.masked(result, mask))
        return None

    def tx(self, *actions, mask=(), **properties):
        """A transaction of (type, {data}) pairs."""
        arguments = {"actions": [{"type": kind, "data": dashes(data)} for kind, data in actions]}
        if properties:
            arguments["properties"] = dashes(properties)
        self("transaction", arguments, mask=mask)

    def nodes(self):
        """query-named-block-nodes, the short form."""
        self("query-named-block-nodes", flat=True)

    def raw(self, text, answers=1, label="raw"):
        """Sends TEXT as it is; records so many answers (a list if not one)."""
        if self.dry:
            return self._record(label, text, None)

        def run():
            self.daemon.qmp.send_text(self._subst(text))
            got = [self.daemon.qmp.next_answer() for _ in range(answers)]
            return got[0] if answers == 1 else got
        self._record(label, text, self._guard(run))
        return None

    def broken(self, text):
        """Sends TEXT, then a good command; records the first error and that the command worked.
        (How many errors one broken message makes is each parser's own affair.)"""
        if self.dry:
            return self._record("broken", text, None)

        def run():
            self.daemon.qmp.send_text(text + '{"execute": "query-block-jobs", "id": "on"}')
            first = got = self.daemon.qmp.next_answer()
            while got.get("id") != "on":
                got = self.daemon.qmp.next_answer()
            return {"error": first.get("error"), "after": got}
        self._record("broken", text, self._guard(run))
        return None

    def wait(self, event, patience=None, **data):
        """Waits for an event whose data has these members; they are its request."""
        if self.dry:
            return self._record(f"wait-{event}", data, None)

        def run():
            found = self.daemon.qmp.wait_event(event, patience, **data)
            self._forget(normal.subject(found), before=found)
            return {"came": found["data"]}
        self._record(f"wait-{event}", data, self._guard(run))
        return None

    def _forget(self, subject, before=None):
        """Drops the events of a job or export that are older than what is waited for next."""
        qmp = self.daemon.qmp
        # History knows the order; an event not yet asked for is in both lists.
        at = qmp.history.index(before) if before else len(qmp.history)
        old = {id(e) for e in qmp.history[:at] if normal.subject(e) == subject}
        qmp.events[:] = [e for e in qmp.events if id(e) not in old]

    def wait_job(self, job, status="concluded", patience=None):
        self.wait("JOB_STATUS_CHANGE", patience, id=job, status=status)

    def backup(self, job="j", device="a", target="t", sync="full", end="null", **named):
        """A blockdev-backup that is waited for."""
        self("blockdev-backup", job_id=job, device=device, target=target, sync=sync, **named)
        self.wait_job(job, end)

    def settle(self):
        """Lets the daemon's loop go round: an answer that comes back after what was begun."""
        if not self.dry:
            for _ in range(3):
                self._guard(lambda: self.daemon.qmp.call("query-version"))

    def write(self, node, offset, length, byte=0x55):
        """A guest's write over NBD (export NODE at $DIR/nbd.sock), complete when it returns."""
        self._io("write", node, lambda h: h.pwrite(bytes([byte]) * length, offset),
                 [node, offset, length])

    def zero(self, node, offset, length):
        self._io("zero", node, lambda h: h.zero(length, offset), [node, offset, length])

    def trim(self, node, offset, length):
        self._io("trim", node, lambda h: h.trim(length, offset), [node, offset, length])

    def read(self, node, offset, length):
        """What a guest reads: the bytes' runs as [length, byte]."""
        self._io("read", node, lambda h: runs(h.pread(length, offset)), [node, offset, length])

    def extents(self, node, context):
        """The extents of a metadata context, on a connection of its own."""
        if self.dry:
            return self._record("extents", [node, context], None)

        def run():
            handle = connect(nbd_uri(self.where / "nbd.sock", node), [context])
            try:
                return {"extents": [list(e) for e in extents(handle, context)]}
            finally:
                handle.shutdown()
        self._record("extents", [node, context], self._guard(run))
        return None

    def nbd_list(self):
        """What NBD_OPT_LIST and INFO tell a stranger: names, descriptions, sizes, flags."""
        if self.dry:
            return self._record("nbd-list", None, None)

        def run():
            uri = nbd_uri(self.where / "nbd.sock", "")
            done = subprocess.run(["nbdinfo", "--list", "--json", uri], capture_output=True,
                                  check=False)
            if done.returncode:
                return {"nbdinfo": done.returncode}
            found = json.loads(done.stdout)
            for export in found.get("exports", []):
                export.pop("content", None)
                export.pop("export-size-str", None)
                export["uri"] = normal.text(export.get("uri", ""), self.where)
            return found
        self._record("nbd-list", None, self._guard(run))
        return None

    def _io(self, what, node, work, request):
        if self.dry:
            return self._record(f"nbd-{what}", request, None)

        def run():
            if node not in self._nbd:
                self._nbd[node] = connect(nbd_uri(self.where / "nbd.sock", node))
            result = work(self._nbd[node])
            return {"done": True if result is None else result}
        self._record(f"nbd-{what}", request, self._guard(run))
        return None

    def hang_up(self, node):
        """The guest disconnects."""
        if not self.dry and node in self._nbd:
            self._nbd.pop(node).shutdown()

    def export(self, node):
        """A writable NBD export of a node, under its name, as nbd_server makes them."""
        self("block-export-add", type="nbd", id=f"exp-{node}", node_name=node, name=node,
             writable=True)

    def unexport(self, node):
        """The guest goes, then its export."""
        self.hang_up(node)
        self("block-export-del", id=f"exp-{node}")
        self.wait("BLOCK_EXPORT_DELETED", id=f"exp-{node}")

    def run(self, *argv, stdin=b"", output=False, stays=False):
        """The program with these options alone: how it ends and what it says on stderr.
        STAYS: it is to serve, and is ended when it does."""
        if self.dry:
            return self._record("run", list(argv), None)
        # stdout and stderr of a daemon that forks would stay open: files, not pipes.
        out, err, pid = self.where / "run.out", self.where / "run.err", self.where / "run.pid"
        serve = ["--pidfile", pid] if stays else []
        with open(out, "wb") as o, open(err, "wb") as e:
            child = subprocess.Popen([self.binary, *self._subst(list(argv)), *serve], stdin=subprocess.PIPE,
                                     stdout=o, stderr=e, cwd=self.where)
            if stays:
                wait_until(lambda: pid.exists() or child.poll() is not None)
            try:
                child.communicate(stdin, timeout=0.5 if stays else PATIENCE)
                result = {"exit": child.returncode}
            except subprocess.TimeoutExpired:
                child.terminate()
                result = {"exit": "running", "then": child.wait(PATIENCE)}
        result["stderr"] = err.read_text(errors="replace")
        if output:
            result["stdout"] = out.read_text(errors="replace")
        self._record("run", list(argv), result)
        return None

    def tool(self, label, function):
        """Records what FUNCTION(directory) returns: what a witness says of the files."""
        if self.dry:
            return self._record(label, None, None)
        self._record(label, None, self._guard(lambda: {"says": function(self.where)}))
        return None

    def program(self, label, function):
        """Records what FUNCTION(binary, directory) returns, which starts the program in its own way."""
        if self.dry:
            return self._record(label, None, None)
        self._record(label, None, self._guard(lambda: {"says": function(self.binary, self.where)}))
        return None

    def qmp_value(self, label, function):
        """Records what FUNCTION(qmp) returns: something worked out from answers."""
        if self.dry:
            return self._record(label, None, None)
        self._record(label, None, self._guard(lambda: {"value": function(self.daemon.qmp)}))
        return None

    def check(self, name):
        """qemu-img check of $DIR/NAME, while nobody has it open."""
        def run(where):
            done = subprocess.run(["qemu-img", "check", "--output=json", where / name],
                                  capture_output=True, check=False)
            verdict = json.loads(done.stdout) if done.stdout else {}
            return {"status": done.returncode, "leaks": verdict.get("leaks", 0),
                    "corruptions": verdict.get("corruptions", 0)}
        self.tool("qemu-img-check", run)

    def files(self):
        """The images in $DIR."""
        self.tool("files", lambda where: sorted(p.name for p in where.iterdir()
                                                if p.suffix in (".qcow2", ".raw")))

    def bitmaps_on_disk(self, name):
        """The bitmaps that qemu-img finds in $DIR/NAME."""
        def run(where):
            info = json.loads(qemu_img("info", "--output=json", where / name))
            return info.get("format-specific", {}).get("data", {}).get("bitmaps", [])
        self.tool("qemu-img-bitmaps", run)

    def content(self, name, fmt="qcow2", offset=0, length=1 << 20):
        """The runs of bytes that qemu-img reads in an image."""
        def run(where):
            raw = where / "content.raw"
            qemu_img("convert", "-U", "-f", fmt, "-O", "raw", where / name, raw)
            data = raw.read_bytes()[offset:offset + length]
            raw.unlink()
            return runs(data)
        self.tool("content", run)

    def _guard(self, run):
        """Runs one step; what goes wrong is its result. After the first timeout, less patience."""
        try:
            return run()
        except Timeout:
            self.patience = IMPATIENCE
            if self.daemon and self.daemon.qmp:
                self.daemon.qmp.timeout = self.patience
            result = {"TIMEOUT": True}
        except (EOFError, BrokenPipeError, ConnectionResetError):
            result = {"monitor": "closed"}
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            result = {"failed": normal.text(text, self.where)}
        if "monitor" in result and self.daemon:
            try:        # closed because it died? Then it does so in a moment.
                self.daemon.process.wait(30)
            except subprocess.TimeoutExpired:
                pass
        if self.daemon and self.daemon.process.poll() is not None:
            self._record("died", None, {"exit": self.daemon.process.returncode,
                                        "stderr": self.daemon.stderr})
            raise Died
        return result


def runs(data):
    """[[length, byte], ...] of the bytes, for people to read."""
    found = []
    at = 0
    while at < len(data):
        byte = data[at:at + 1]
        rest = data[at:].lstrip(byte)
        length = len(data) - at - len(rest)
        found.append([length, byte[0]])
        at += length
    return found


class Record:
    """What a sequence brought on one daemon, normalised."""

    def __init__(self, steps, events):
        self.steps, self.events = steps, events


def run_sequence(seq, binary):
    """Runs SEQ on the daemon BINARY (None: counts only) and returns its Record."""
    with temp_dir("tm-p") as where:
        t = Recorder(seq, binary, where)
        try:
            if binary is not None:
                t.prepare()
            if seq.start:
                t.start(count=False)
            seq.function(t)
        except Died:
            pass
        finally:
            try:
                if t.daemon is not None or t.dry:
                    t.finish(count=False)
            finally:
                for item in seq.setup:
                    if isinstance(item, Setup):
                        item.end()
        if t.dry:
            return Record(t.steps, {})
        scrub = normal.Scrubber(where, binary, t._port, seq.mask)
        for step in t.steps:
            step.result = scrub(step.result)
        return Record(t.steps, normal.events_by_subject(t.events, scrub, seq.pauses))


def count_steps(seq):
    """The steps of a sequence, without a daemon (its start and end are not counted)."""
    t = Recorder(seq, None, pathlib.Path("/nonexistent"))
    t._port = 1
    seq.function(t)
    return t.counted
