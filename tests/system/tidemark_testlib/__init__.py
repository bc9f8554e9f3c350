"""What every system test needs: daemons, their QMP monitors, and QEMU's tools as witnesses.

    from tidemark_testlib import Daemon, QMP, QMPError, create_image, qemu_io, qemu_img

`tidemarkd` is found by the environment: TIDEMARK names the binary, or TIDEMARK_BUILD a meson
build directory; without both it is build/src/daemon/tidemarkd.
"""

from .daemon import Daemon, DaemonError, Exited, find_tidemarkd, QSD, run_to_exit
from .images import (
    compare, create_image, image_info, check_image, map_image, qemu_img, qemu_io, sha256_of, wait_for_locks,
)
from .loopdev import LoopDevice
from .nbd import connect, nbd_uri
from .qmp import QMP, QMPError, Timeout
from .smallfs import NotAllowed, SmallFileSystem, may_be_skipped
from .temp import temp_dir
from .timing import quickest, wait_until

__all__ = [
    "Daemon", "DaemonError", "Exited", "LoopDevice", "NotAllowed", "QMP", "QMPError", "QSD", "SmallFileSystem",
    "Timeout", "check_image", "compare", "connect", "create_image", "find_tidemarkd", "image_info",
    "map_image", "may_be_skipped", "nbd_uri", "qemu_img", "qemu_io", "quickest", "run_to_exit", "sha256_of",
    "temp_dir", "wait_for_locks", "wait_until",
]
