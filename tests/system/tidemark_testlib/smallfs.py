"""A file system that can be full: a tmpfs of some megabytes in a mount namespace of its own, so that
nothing is left behind and no privilege is needed where user namespaces are allowed.

    fs = SmallFileSystem(tmp / "small", "2M")
    daemon(..., prefix=fs.prefix)   # sees it at tmp / "small"
    fs.outside                      # where a test and its tools see the same files
"""

import os
import pathlib
import subprocess

MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo mounted && exec cat'
WAYS = ((("unshare", "-m"), ("-m",)),
        (("unshare", "-U", "-r", "-m"), ("-U", "-m", "--preserve-credentials")))


class NotAllowed(Exception):
    """This machine does not let us have it; the text says what it said, WHAT what was asked for."""

    def __init__(self, text, what="small_fs"):
        super().__init__(text)
        self.what = what


def may_be_skipped(what="small_fs"):
    """False where a test that needs one must not vanish silently (scripts/check)."""
    return what not in os.environ.get("TIDEMARK_REQUIRE", "").split()


class SmallFileSystem:
    def __init__(self, path, size):
        self.path = pathlib.Path(path)
        self.path.mkdir()
        said = []
        for unshare, enter in WAYS:
            # Whoever holds the namespace ends with its standard input, that is with the test.
            self._holder = subprocess.Popen(
                [*unshare, "sh", "-c", MOUNT, "sh", size, str(self.path)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if self._holder.stdout.readline() == b"mounted\n":
                pid = self._holder.pid
                self.prefix = ("nsenter", "-t", str(pid), *enter)
                self.outside = pathlib.Path(f"/proc/{pid}/root{self.path}")
                return
            said.append(self._holder.communicate()[1].decode(errors="replace").strip())
        raise NotAllowed("no file system may be mounted: " + "; ".join(said))

    def fill(self, leave):
        """Takes all but LEAVE bytes by a file `ballast`."""
        found = os.statvfs(self.outside)
        take = found.f_bavail * found.f_bsize - leave
        with open(self.outside / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, take)

    def make_room(self):
        (self.outside / "ballast").unlink()

    def close(self):
        self._holder.communicate()
