"""pytest's setup of the system tests. Run one with /usr/bin/python3 -m pytest tests/system/...

Fixtures: `tmp` (a short temporary directory), `daemon` (a function that starts tidemarkd with
the given arguments and, after the test, stops it and checks its end), `small_fs` (a function that
makes a file system to be full), `loop_device` (a function that makes a block device).
"""

import atexit
import os
import pathlib
import shlex
import shutil
import sys
import tempfile

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import pytest  # noqa: E402
from tidemark_testlib import (  # noqa: E402
    Daemon, LoopDevice, NotAllowed, SmallFileSystem, find_tidemarkd, may_be_skipped, temp_dir,
)

KEPT = ("TIDEMARK", "TIDEMARK_BUILD", "TIDEMARK_PARITY", "TIDEMARK_SEED", "TIDEMARK_LOOP",
        "TIDEMARK_CORO", "TIDEMARK_BREAKABLE", "TIDEMARK_BROKEN", "TIDEMARK_HISTORIES",
        "TIDEMARK_INSTANT_ROUNDS", "TIDEMARK_REQUIRE", "TEST_SEED", "ASAN_OPTIONS",
        "UBSAN_OPTIONS", "LSAN_OPTIONS")


# Run segments on tmpfs, as they are to be: else each daemon says so on stderr.
if os.access("/dev/shm", os.W_OK):
    runtime = tempfile.mkdtemp(prefix="tm-xdg-", dir="/dev/shm")
    os.environ["XDG_RUNTIME_DIR"] = runtime
    atexit.register(shutil.rmtree, runtime, ignore_errors=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than half a minute")
    config.addinivalue_line("markers", "no_tidemarkd: does not need the tidemarkd binary")
    config.addinivalue_line("markers", "xdist_group(name): one process for all of the group")


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no process works on alone at the end."""
    def later(item):
        return not item.get_closest_marker("xdist_group"), not item.get_closest_marker("long")
    items.sort(key=later)


@pytest.fixture
def tmp():
    with temp_dir() as path:
        yield path


@pytest.fixture
def tidemarkd():
    """The path of the binary under test."""
    path = find_tidemarkd()
    if not os.access(path, os.X_OK):
        pytest.fail(f"{path} is not there: build it, or say TIDEMARK=/path/to/tidemarkd")
    return path


def not_allowed(why, what="small_fs"):
    """Skips, or where that is not allowed fails."""
    if may_be_skipped(what):
        pytest.skip(why)
    pytest.fail(f"{why} (TIDEMARK_REQUIRE; scripts/check with TIDEMARK_ALLOW_SKIP=1 skips this)",
                pytrace=False)


@pytest.fixture
def small_fs(tmp):
    """small_fs("2M") -> a file system of that size (SmallFileSystem), to be full."""
    made = []

    def make(size):
        try:
            made.append(SmallFileSystem(tmp / f"small{len(made)}", size))
        except NotAllowed as error:
            not_allowed(str(error))
        return made[-1]

    yield make
    for fs in made:
        fs.close()


@pytest.fixture
def loop_device(tmp):
    """loop_device("disk", "64M") -> a LoopDevice over the file of that name."""
    made = []

    def make(name, *args, **kwargs):
        try:
            made.append(LoopDevice(tmp / name, *args, **kwargs))
        except NotAllowed as error:
            not_allowed(str(error), error.what)
        return made[-1]

    yield make
    for device in made:
        device.close()


@pytest.fixture
def daemon(small_fs, loop_device, tidemarkd, tmp):
    """daemon("--blockdev", ...) -> a running Daemon; all are stopped and checked at the end."""
    running = []

    def start(*argv, **kwargs):
        kwargs.setdefault("directory", tmp)
        kwargs.setdefault("binary", tidemarkd)
        running.append(Daemon(*argv, **kwargs))
        return running[-1]

    yield start
    errors = []
    for one in reversed(running):
        try:
            if one.running:
                one.stop()
            elif one.process.returncode != -9:
                one.check_stderr()
        except Exception as error:  # stop them all before saying so
            errors.append(str(error))
            one.kill()
    assert not errors, "\n".join(errors)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure prints the one command that repeats it."""
    report = (yield).get_result()
    if report.failed:
        env = [f"{key}={shlex.quote(os.environ[key])}" for key in KEPT if os.environ.get(key)]
        root = pathlib.Path(item.config.rootpath)
        name = item.nodeid.split("::", 1)[-1].split("@")[0]     # @: its xdist_group
        where = f"{item.location[0]}::{name}"
        command = " ".join([*env, "/usr/bin/python3 -m pytest", shlex.quote(where)])
        report.sections.append(("repeat it with", f"cd {root} && {command}"))
