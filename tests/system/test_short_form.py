"""tidemarkd IMAGE...: serve these images, say where, end clean."""

import os
import re
import shutil
import signal
import subprocess
import tempfile

import pytest
from tidemark_testlib import QMP, check_image, connect, create_image, qemu_io

MiB = 1 << 20


@pytest.fixture
def serve(tidemarkd, tmp):
    """serve(ARG...) -> (process, {image: uri}, path of the monitor's socket)"""
    running = []
    # On tmpfs, where run segments are to be: else it says so on stderr.
    where = tempfile.mkdtemp(prefix="tm-short-",
                             dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp)

    def start(*argv):
        process = subprocess.Popen([tidemarkd, *map(str, argv)], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, cwd=tmp,
                                   env={**os.environ, "XDG_RUNTIME_DIR": where})
        running.append(process)
        uris = {}
        for line in process.stdout:
            if line.startswith("QMP: "):
                return process, uris, line[5:].strip()
            name, uri = re.fullmatch(r"(.*): (nbd\+unix:.*)\n", line).groups()
            uris[name] = uri
        process.wait(60)
        return process, uris, None

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
    shutil.rmtree(where)


def test_images_are_served_under_their_names(serve, tmp):
    create_image(tmp / "vm.qcow2", size="8M")
    create_image(tmp / "other vm.raw", fmt="raw", size="4M")
    os.mkdir(tmp / "sub")
    create_image(tmp / "sub/vm.qcow2", size="2M")
    process, uris, qmp_path = serve("vm.qcow2", "other vm.raw", "sub/vm.qcow2")
    assert list(uris) == ["vm.qcow2", "other vm.raw", "sub/vm.qcow2"]
    assert os.stat(os.path.dirname(qmp_path)).st_mode & 0o777 == 0o700
    sizes = {}
    for image, uri in uris.items():
        h = connect(uri)
        sizes[image] = h.get_size()
        h.pwrite(b"x" * 4096, MiB)
        h.shutdown()
    assert sizes == {"vm.qcow2": 8 * MiB, "other vm.raw": 4 * MiB, "sub/vm.qcow2": 2 * MiB}
    qmp = QMP(qmp_path)
    exports = {e["id"]: e["node-name"] for e in qmp.execute("query-block-exports")}
    assert exports == {"vm": "vm", "other-vm": "other-vm", "vm-2": "vm-2"}
    qmp.execute("block-dirty-bitmap-add", node="vm", name="b", persistent=True)
    qmp.execute("quit")
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    assert not os.path.exists(qmp_path) and not os.listdir(os.path.dirname(qmp_path))
    for image, fmt in (("vm.qcow2", "qcow2"), ("other vm.raw", "raw"), ("sub/vm.qcow2", "qcow2")):
        qemu_io(tmp / image, "read -P 0x78 1M 4k", fmt=fmt)
    assert check_image(tmp / "vm.qcow2")["corruptions"] == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_clean(serve, tmp, sig):
    create_image(tmp / "vm.qcow2", size="8M")
    process, uris, qmp_path = serve("vm.qcow2")
    qmp = QMP(qmp_path)
    qmp.execute("block-dirty-bitmap-add", node="vm", name="b", persistent=True)
    h = connect(uris["vm.qcow2"])
    h.pwrite(b"x" * 4096, MiB)
    process.send_signal(sig)
    assert process.wait(60) == 0
    # The bitmap was saved, exact and not in use: opened again, it says what was written.
    process, uris, qmp_path = serve("vm.qcow2")
    bitmap, = QMP(qmp_path).execute("query-named-block-nodes", flat=True)[0]["dirty-bitmaps"]
    assert (bitmap["count"], bitmap["recording"]) == (65536, True) and "inconsistent" not in bitmap


def test_what_cannot_be_served_is_named(serve, tmp):
    process, uris, qmp_path = serve("nosuch.qcow2")
    assert qmp_path is None and process.returncode == 1
    assert process.stderr.read() == ("tidemarkd: Could not open 'nosuch.qcow2': "
                                     "No such file or directory\n")
    create_image(tmp / "vm.qcow2", size="8M")
    first, uris, _ = serve("vm.qcow2")
    second, _, qmp_path = serve("vm.qcow2")
    assert qmp_path is None and second.returncode == 1
    assert "Failed to get" in second.stderr.read()
    connect(uris["vm.qcow2"]).pread(512, 0)
    assert first.poll() is None
