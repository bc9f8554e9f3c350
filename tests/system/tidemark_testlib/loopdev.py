"""A block device of our own: a loop device over a file, where this machine lets us have one.

    device = LoopDevice(tmp / "disk", "64M")
    device.path          # "/dev/loop3"
    device.close()       # the file stays
"""

import os
import pathlib
import subprocess

from .images import run_tool
from .smallfs import NotAllowed

LOSETUP = "/usr/sbin/losetup"


class LoopDevice:
    def __init__(self, file, size=None, sector=512, read_only=False):
        """SIZE: the file is made; else it is there."""
        self.file, self.path = pathlib.Path(file), None
        if size:
            run_tool("qemu-img", "create", "-q", "-f", "raw", str(file), str(size))
        options = [*(["-b", str(sector)] if sector != 512 else []), *(["-r"] if read_only else [])]
        try:
            done = subprocess.run([LOSETUP, "-f", "--show", *options, str(file)], capture_output=True,
                                  text=True, check=False)
        except OSError as error:
            raise NotAllowed(f"no loop device: {error}", "loop_device") from None
        self.path = done.stdout.strip()
        if done.returncode or not os.access(self.path, os.R_OK):
            self.close()
            raise NotAllowed(f"no loop device: {done.stderr.strip() or self.path}", "loop_device")

    def refresh(self):
        """The file has another size."""
        subprocess.run([LOSETUP, "-c", self.path], check=True)

    def close(self):
        path, self.path = self.path, None
        if path:
            subprocess.run([LOSETUP, "-d", path], check=False)
