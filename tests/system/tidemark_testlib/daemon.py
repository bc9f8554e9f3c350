"""tidemarkd, or qemu-storage-daemon, as a child of the test.

A Daemon adds a QMP monitor on a Unix socket to the arguments, starts the program and waits until
the monitor greets (or, without a monitor, until the pidfile is there). stop() asks it to end and
checks how it did: exit status, and no report of a sanitizer on stderr. A test that means the
daemon to die says kill().
"""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import tempfile
import time

from .images import wait_for_locks
from .qmp import QMP, TIMEOUT, QMPError, Timeout

QSD = "/usr/bin/qemu-storage-daemon"
SOURCE_ROOT = pathlib.Path(__file__).resolve().parents[3]
SANITIZER_MARKS = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "runtime error:",
                   "WARNING: MemorySanitizer", "== ERROR SUMMARY", "Assertion `")


def find_tidemarkd():
    """The path of tidemarkd; it need not exist."""
    if os.environ.get("TIDEMARK"):
        return os.environ["TIDEMARK"]
    build = pathlib.Path(os.environ.get("TIDEMARK_BUILD") or SOURCE_ROOT / "build")
    return str(build / "src" / "daemon" / "tidemarkd")


class DaemonError(Exception):
    """The daemon did not start, or did not end as it should."""


class Exited(DaemonError):
    """The daemon ended before it was ready: .status and .stderr say how."""

    def __init__(self, argv, status, stderr):
        super().__init__(f"{' '.join(argv)}\nended with status {status}:\n{stderr}")
        self.status = status
        self.stderr = stderr


class Daemon:
    """with Daemon("--blockdev", "...") as d: d.qmp.execute("query-block")"""

    def __init__(self, *argv, binary=None, directory=None, monitor=True, connect=True,
                 oob=False, env=None, cwd=None, prefix=(), start=True, timeout=30.0,
                 file_size_limit=None):
        self.binary = str(binary or find_tidemarkd())
        self._own_dir = None
        if directory is None:
            self._own_dir = tempfile.TemporaryDirectory(prefix="tm-", dir="/tmp")
            directory = self._own_dir.name
        self.directory = pathlib.Path(directory)
        self.timeout = timeout
        self.socket = self._free_name("qmp", ".sock")
        self.stderr_path = self._free_name("stderr", ".log")
        self.argv = [*prefix, self.binary]
        if monitor:
            self.argv += ["--chardev", f"socket,id=testmon,path={self.socket},server=on,wait=off",
                          "--monitor", "chardev=testmon"]
        self.argv += [str(a) for a in argv]
        self.pidfile = None
        if monitor and self.binary == QSD and "--pidfile" not in self.argv:
            self.pidfile = self._free_name("ready", ".pid")
            self.argv += ["--pidfile", str(self.pidfile)]
        self.monitor = monitor
        self.connect_qmp = connect
        self.oob = oob
        self.env = dict(os.environ, **(env or {}))
        self.cwd = cwd
        self.file_size_limit = file_size_limit   # bytes; writes beyond it fail with EFBIG
        self.process = None
        self.qmp = None
        self._monitors = []
        if start:
            self.start()

    def _free_name(self, stem, suffix):
        number = 0
        while True:
            path = self.directory / f"{stem}{number or ''}{suffix}"
            if not path.exists():
                return path
            number += 1

    # -- start

    def start(self):
        with open(self.stderr_path, "ab") as err:
            limit = self.file_size_limit

            def limited():
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=err,
                                            stderr=err, env=self.env, cwd=self.cwd,
                                            preexec_fn=limited if limit else None)
        try:
            self._wait_for_qsd()
            if self.monitor and self.connect_qmp:
                self.qmp = self.new_monitor(oob=self.oob)
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_for_qsd(self):
        """qemu-storage-daemon 7.2 moves a monitor's socket to a thread of its own while its loop
        starts. Who connects at that moment is read by two threads at once, and what they read is
        mixed up ("exeucte"), so nobody connects before its pidfile is there, and a little later. Where
        it has stalled between the two, new_monitor() connects once more."""
        deadline = time.monotonic() + self.timeout
        while self.pidfile and not self.pidfile.exists() and time.monotonic() < deadline:
            if self.process.poll() is not None:
                return
            time.sleep(0.002)
        if self.pidfile:
            time.sleep(0.01)

    def new_monitor(self, **kwargs):
        """One more connection to the monitor's socket (one at a time is what QEMU's takes)."""
        deadline = time.monotonic() + self.timeout
        while True:
            if self.process.poll() is not None:
                raise Exited(self.argv, self.process.returncode, self.stderr)
            try:
                qmp = QMP(self.socket, timeout=self.timeout / 3 if self.pidfile else TIMEOUT, **kwargs)
                qmp.timeout = TIMEOUT
                self._monitors.append(qmp)
                return qmp
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise Timeout(f"no monitor at {self.socket}: {self.stderr}") from None
                time.sleep(0.005)
            except EOFError:
                # It ended while options were worked on: say how.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(self.timeout)
                if self.process.poll() is not None:
                    raise Exited(self.argv, self.process.returncode, self.stderr) from None
                raise
            except (QMPError, Timeout):
                if not self.pidfile or time.monotonic() > deadline:
                    raise

    # -- what it said

    @property
    def pid(self):
        return self.process.pid

    @property
    def stderr(self):
        try:
            return self.stderr_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def running(self):
        return self.process is not None and self.process.poll() is None

    # -- end

    def wait(self, timeout=None):
        """Waits for its end; the exit status (negative: the signal)."""
        try:
            return self.process.wait(timeout or self.timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DaemonError(f"{self.binary} did not end within {timeout or self.timeout} s; "
                              f"stderr:\n{self.stderr}") from None

    def stop(self, how="term", expect=0, timeout=None):
        """Ends it by SIGTERM ("term"), SIGINT ("int") or the command quit ("quit"), and checks."""
        if self.running:
            if how == "quit":
                self.qmp.execute("quit")
            else:
                self.process.send_signal({"term": signal.SIGTERM, "int": signal.SIGINT}[how])
        status = self.wait(timeout)
        self._close_monitors()
        if status != expect:
            raise DaemonError(f"{self.binary} ended with status {status}, not {expect}; "
                              f"stderr:\n{self.stderr}")
        self.check_stderr()
        return status

    def check_stderr(self):
        text = self.stderr
        for mark in SANITIZER_MARKS:
            if mark in text:
                raise DaemonError(f"{self.binary} said:\n{text}")

    def kill(self, *images):
        """SIGKILL: nothing is saved, nothing is checked. After it QEMU's programs may have IMAGES."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._close_monitors()
        wait_for_locks(*images)

    def _close_monitors(self):
        for qmp in self._monitors:
            qmp.close()
        self._monitors = []

    def cleanup(self):
        if self._own_dir is not None:
            self._own_dir.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        try:
            if kind is None and self.running:
                self.stop()
            elif kind is None and self.process is not None and self.process.returncode != -9:
                self.check_stderr()
            else:
                self.kill()
                if kind is not None and self.stderr:
                    print(f"--- stderr of {self.binary}\n{self.stderr}---")
        finally:
            self.cleanup()


def run_to_exit(*argv, binary=None, env=None, cwd=None, stdin=b"", timeout=30.0):
    """Runs the program until it ends by itself: (status, stdout, stderr). For bad options, --help."""
    done = subprocess.run([str(binary or find_tidemarkd()), *[str(a) for a in argv]], input=stdin,
                          capture_output=True, env=dict(os.environ, **(env or {})), cwd=cwd,
                          timeout=timeout, check=False)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
