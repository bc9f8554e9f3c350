"""Images in use: tidemarkd, QEMU's programs and a second tidemarkd refuse each other, by QEMU's locks
and in QEMU's words; an owner that was killed is waited for."""

import time

import pytest
from tidemark_testlib import QSD, Daemon, Exited, create_image, qemu_io, quickest
from tidemark_testlib.images import run_tool

WRITE = 'Failed to get "write" lock'
SHARED = 'Failed to get shared "write" lock'


def image_options(path, name="q"):
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def image_args(path):
    return ("--blockdev", f"driver=qcow2,node-name=q,file.driver=file,file.filename={path}")


def add(daemon, path, **more):
    """The error's text, or None."""
    answer = daemon.qmp.call("blockdev-add", {**image_options(path), **more})
    return answer.get("error", {}).get("desc")


@pytest.fixture
def image(tmp):
    return create_image(tmp / "disk.qcow2", size="16M")


def test_qemu_s_programs_refuse_what_tidemarkd_has(daemon, image):
    d = daemon(*image_args(image))
    assert WRITE in qemu_io(image, "write 0 64k", check=False)
    info = run_tool("qemu-img", "info", image, check=False)
    assert info.returncode == 1 and SHARED in info.stderr.decode()
    assert f"Is another process using the image [{image}]?" in info.stderr.decode()
    check = run_tool("qemu-img", "check", image, check=False)
    assert check.returncode == 1 and SHARED in check.stderr.decode()
    assert run_tool("qemu-img", "info", "-U", image).returncode == 0
    with pytest.raises(Exited) as refused:
        Daemon(*image_args(image), binary=QSD)
    assert WRITE in refused.value.stderr
    d.stop()
    qemu_io(image, "write 0 64k")


def test_tidemarkd_refuses_what_qemu_has(daemon, image):
    with Daemon(*image_args(image), binary=QSD):
        d = daemon()
        begin = time.monotonic()
        assert add(d, image) == WRITE
        assert 1.5 < time.monotonic() - begin < 20
        assert add(d, image, **{"read-only": True}) == SHARED
        # Looking is allowed to who does not mind that it changes.
        assert add(d, image, **{"read-only": True, "force-share": True}) is None
        assert add(d, image, **{"force-share": True, "node-name": "w"}) == \
            "force-share=on can only be used with read-only images"
        with pytest.raises(Exited) as refused:
            Daemon(*image_args(image), binary=d.binary)
        assert WRITE in refused.value.stderr


def test_two_tidemarkds(daemon, image):
    first = daemon(*image_args(image))
    second = daemon()
    assert add(second, image) == WRITE
    first.qmp.execute("blockdev-del", node_name="q")
    assert add(second, image) is None
    assert add(first, image) == WRITE

    def again():
        assert add(second, image, **{"node-name": "again"}) == WRITE
    # Two nodes of one program: at once, for it will not go away.
    assert quickest(again) < 1.5


def test_readers_share(daemon, image):
    first = daemon()
    second = daemon()
    assert add(first, image, **{"read-only": True}) is None
    assert add(second, image, **{"read-only": True}) is None
    assert run_tool("qemu-io", "-r", "-c", "read 0 64k", image).returncode == 0
    assert WRITE in qemu_io(image, "write 0 64k", check=False)


def test_a_killed_owner_is_waited_for(daemon, image):
    second = daemon()
    for _ in range(10):
        first = daemon(*image_args(image))
        asked = time.monotonic()
        ident = second.qmp.send("blockdev-add", image_options(image))
        time.sleep(0.3)
        first.kill()
        in_time = time.monotonic() - asked < 1.5    # of its two seconds
        if "error" not in second.qmp.answer(ident):
            return
        assert not in_time
    pytest.skip("no owner died in time")


def test_locking_off_takes_none(daemon, image):
    d = daemon()
    options = image_options(image)
    options["file"]["locking"] = "off"
    assert "error" not in d.qmp.call("blockdev-add", options)
    assert run_tool("qemu-img", "info", image).returncode == 0
