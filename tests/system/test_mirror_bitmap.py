"""drive-mirror with a bitmap, over QMP: which chunks it copies, and what it leaves of the bitmap, chunk
by chunk, also when the target's file system is full and when the daemon ends; target-is-zero; what
block-job-change refuses."""

import pytest
from tidemark_testlib import QMPError, connect, create_image, nbd_uri, qemu_img, wait_until
from tidemark_testlib.nbd import extents

CHUNK = 65536
CHUNKS = 128
SIZE = CHUNKS * CHUNK

MODES = {
    "on-success": {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "on-success"},
    "always": {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "always"},
    "never": {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never"},
    "incremental": {"sync": "incremental", "bitmap": "b"},
}


class Disk:
    """A daemon with a disk `disk`, and a guest who writes a chunk at a time."""

    def __init__(self, daemon, tmp, prefix=()):
        self.tmp, self.sock = tmp, tmp / "nbd.sock"
        create_image(tmp / "disk.qcow2", size=SIZE)
        self.make_daemon, self.prefix = daemon, prefix
        self.start()
        self.value = 0

    def start(self):
        self.daemon = self.make_daemon(
            "--blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={self.tmp / 'disk.qcow2'}",
            "--nbd-server", f"addr.type=unix,addr.path={self.sock}",
            "--export", "nbd,id=guest,node-name=disk,name=guest,writable=on", prefix=self.prefix)
        self.q = self.daemon.qmp
        self.guest = connect(nbd_uri(self.sock, "guest"))

    def write(self, *chunks):
        """Something new in each of them, which fills half of it."""
        for chunk in chunks:
            self.value += 1
            self.guest.pwrite(self.value.to_bytes(2, "big") * (CHUNK // 4), chunk * CHUNK + 4096)
        return set(chunks)

    def content(self):
        return bytes(self.guest.pread(SIZE, 0))

    def dirty(self, node="disk"):
        """The chunks that bitmap b names, as a client of NBD sees them."""
        self.q.execute("block-export-add", type="nbd", id="look", node_name=node, name="look",
                       bitmaps=["b"], writable=True)
        context = "qemu:dirty-bitmap:b"
        handle = connect(nbd_uri(self.sock, "look"), [context])
        found = {chunk for start, length, flags in extents(handle, context) if flags
                 for chunk in range(start // CHUNK, (start + length) // CHUNK)}
        handle.shutdown()
        self.q.execute("block-export-del", id="look")
        self.q.wait_event("BLOCK_EXPORT_DELETED", id="look")
        return found

    def busy(self):
        return self.q.bitmaps("disk")["b"]["busy"]


def file_content(path, fmt="qcow2", raw=None):
    raw = raw or path.with_suffix(".content")
    qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
    return raw.read_bytes()


def different(one, two):
    return {c for c in range(CHUNKS) if one[c * CHUNK:][:CHUNK] != two[c * CHUNK:][:CHUNK]}


@pytest.fixture
def mirrored(daemon, tmp):
    """A disk whose bitmap begins with a whole copy in the file `copy`."""
    d = Disk(daemon, tmp)
    d.copy = tmp / "copy.qcow2"
    d.write(*range(0, 64))
    d.q.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=CHUNK)
    d.q.execute("drive-mirror", job_id="first", device="disk", target=str(d.copy), sync="full")
    d.q.wait_event("BLOCK_JOB_READY", device="first")
    d.q.execute("block-job-cancel", device="first")
    d.q.wait_job("first", "null")
    assert d.dirty() == set()
    return d


def begin(d, mode, **more):
    d.q.execute("drive-mirror", job_id="m", device="disk", target=str(d.copy), mode="existing",
                format="qcow2", node_name="new", **MODES[mode], **more)


def begin_and_be_held(d, mode, **more):
    """The first eight chunks go at once; for the next one the speed wants a day."""
    begin(d, mode, buf_size=8 * CHUNK, speed=1, **more)
    wait_until(lambda: d.q.job("m")["current-progress"] == 8 * CHUNK)


def end(d, how, event="BLOCK_JOB_COMPLETED"):
    d.q.execute(how, device="m")
    data = d.q.wait_event(event, device="m")["data"]
    d.q.wait_job("m", "null")
    assert "error" not in data and not d.busy()
    return data


@pytest.mark.parametrize("pivot", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_completed(mirrored, mode, pivot):
    """What was dirty is copied, and what is written until the end; the bitmap keeps what comes after."""
    d = mirrored
    user = d.write(*range(5, 40, 3))
    begin(d, mode)
    d.q.wait_event("BLOCK_JOB_READY", device="m")
    assert d.busy()
    during = d.write(8, 70, 71)     # one once more, two that were clean
    instant = d.content()
    done = end(d, "block-job-complete" if pivot else "block-job-cancel")
    assert done["len"] == done["offset"] == (len(user) + len(during)) * CHUNK
    after = d.write(90)             # to the copy, after a pivot
    expected = user | during if mode == "never" else set()
    assert d.dirty() == expected | (set() if pivot else after)
    if pivot:
        assert d.q.execute("query-block-exports")[0]["node-name"] == "new"
        assert d.content() == instant[:90 * CHUNK] + d.content()[90 * CHUNK:]
    d.daemon.stop()
    copy, disk = file_content(d.copy), file_content(d.tmp / "disk.qcow2")
    assert different(copy, instant) == (after if pivot else set())
    assert different(disk, instant) == (set() if pivot else after)


@pytest.mark.parametrize("mode", MODES)
def test_cancelled_midway_and_resumed(mirrored, mode):
    """`always` keeps what has reached the target, the others nothing; the next run brings the rest."""
    d = mirrored
    user = d.write(*range(5, 45))
    begin_and_be_held(d, mode)
    during = d.write(5, 60)
    end(d, "block-job-cancel", "BLOCK_JOB_CANCELLED")
    lacking = different(file_content(d.copy), d.content())
    assert during <= lacking and user - lacking == set(range(6, 13))
    dirty = d.dirty()
    assert dirty == (lacking if mode == "always" else user | during)

    begin(d, mode)
    d.q.wait_event("BLOCK_JOB_READY", device="m")
    instant = d.content()
    done = end(d, "block-job-cancel")
    assert done["offset"] == len(dirty) * CHUNK     # not a chunk more
    after = d.write(99)
    assert d.dirty() == after | (user | during if mode == "never" else set())
    d.daemon.stop()
    assert different(file_content(d.copy), instant) == set()


class Full:
    """A disk whose bitmap begins with a whole copy in a file system that then has room for some 16 chunks
    more; 30 that are new there are dirty."""

    def __init__(self, daemon, tmp, fs, fmt):
        self.fs, self.fmt, self.tmp = fs, fmt, tmp
        self.d = Disk(daemon, tmp, fs.prefix)
        self.q = self.d.q
        self.d.write(*range(0, 64))
        self.q.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=CHUNK)
        self.q.execute("drive-mirror", job_id="m", device="disk", target=str(fs.path / "copy"), sync="full",
                       format=fmt)
        self.q.wait_event("BLOCK_JOB_READY", device="m")
        end(self.d, "block-job-cancel")
        fs.fill(leave=16 * CHUNK)
        self.user = self.d.write(*range(68, 128, 2))

    def begin(self, mode, **more):
        """One chunk at a time."""
        self.q.events.clear()
        self.q.execute("drive-mirror", job_id="m", device="disk", target=str(self.fs.path / "copy"),
                       mode="existing", format=self.fmt, buf_size=CHUNK, **MODES[mode], **more)

    def content(self):
        return file_content(self.fs.outside / "copy", self.fmt, self.tmp / "content.raw")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["on-success", "always", "never"])
def test_no_space(daemon, tmp, small_fs, mode, fmt):
    """A really full file system: the documented error; `always` keeps what has reached the target, the
    others nothing; with room made the next run brings the rest and not a chunk more."""
    full = Full(daemon, tmp, small_fs("24M"), fmt)
    d, q = full.d, full.q
    full.begin(mode, speed=1)
    q.wait_job("m", "running")
    assert d.busy()
    during = d.write(3, 65)
    q.execute("block-job-set-speed", device="m", speed=0)
    assert q.wait_event("BLOCK_JOB_ERROR", device="m")["data"] == {
        "device": "m", "operation": "write", "action": "report"}
    done = q.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
    q.wait_job("m", "null")
    assert done["error"] == "No space left on device" and 0 < done["offset"] < done["len"]
    lacking = different(full.content(), d.content())
    assert 3 < len(full.user - lacking) < len(full.user) - 3
    dirty = d.dirty()
    assert dirty == (lacking if mode == "always" else full.user | during)
    full.fs.make_room()
    full.begin(mode)
    q.wait_event("BLOCK_JOB_READY", device="m")
    instant = d.content()
    assert end(d, "block-job-cancel")["offset"] == len(dirty) * CHUNK
    assert d.dirty() == (full.user | during if mode == "never" else set())
    assert full.content() == instant


@pytest.mark.parametrize("mode, policy", [("on-success", "stop"), ("always", "enospc"), ("never", "stop")])
def test_stop_when_full(daemon, tmp, small_fs, mode, policy):
    """It waits with its io-status and the bitmap busy, guests go on; with room made it goes on where it
    stopped, and the bitmap is what it is after any completion."""
    full = Full(daemon, tmp, small_fs("24M"), "raw")
    d, q = full.d, full.q
    full.begin(mode, on_target_error=policy)
    assert q.wait_event("BLOCK_JOB_ERROR", device="m")["data"] == {
        "device": "m", "operation": "write", "action": "stop"}
    q.wait_job("m", "paused")
    stopped = q.execute("query-block-jobs")[0]
    assert stopped["io-status"] == "nospace" and d.busy()
    during = d.write(3, 65, 68)
    full.fs.make_room()
    q.execute("job-resume", id="m")
    q.wait_event("BLOCK_JOB_READY", device="m")
    assert q.execute("query-block-jobs")[0]["io-status"] == "ok" and d.busy()
    instant = d.content()
    done = end(d, "block-job-cancel")
    assert done["offset"] - stopped["offset"] < (len(full.user | during)) * CHUNK
    after = d.write(99)
    assert d.dirty() == after | (full.user | during if mode == "never" else set())
    assert full.content() == instant


@pytest.mark.parametrize("when", ["running", "ready", "pending"])
@pytest.mark.parametrize("mode", ["on-success", "always", "never"])
def test_the_daemon_ends(daemon, tmp, mode, when):
    """SIGTERM cancels the mirror in whatever state it is; what the bitmap then is, is in the image, and
    the next daemon's mirror brings the rest."""
    d = Disk(daemon, tmp)
    d.copy = tmp / "copy.qcow2"
    d.write(*range(0, 64))
    d.q.execute("block-dirty-bitmap-add", node="disk", name="b", granularity=CHUNK, persistent=True)
    d.q.execute("drive-mirror", job_id="m", device="disk", target=str(d.copy), sync="full")
    d.q.wait_event("BLOCK_JOB_READY", device="m")
    end(d, "block-job-cancel")
    user = d.write(*range(5, 45))
    d.q.events.clear()
    if when == "running":
        begin_and_be_held(d, mode, auto_finalize=False)
    else:
        begin(d, mode, auto_finalize=False)
        d.q.wait_event("BLOCK_JOB_READY", device="m")
    if when == "pending":
        d.q.execute("job-complete", id="m")
        d.q.wait_job("m", "pending")
    during = d.write(5, 60)
    now = d.content()
    d.guest.shutdown()
    d.daemon.stop()
    lacking = different(file_content(d.copy), now)
    assert (len(lacking) > 10) == (when == "running")
    d.start()
    dirty = d.dirty()
    if mode == "always":
        assert lacking <= dirty <= lacking | during
    else:
        assert dirty == user | during
    assert d.content() == now and d.q.execute("query-jobs") == []
    begin(d, mode)
    d.q.wait_event("BLOCK_JOB_READY", device="m")
    done = end(d, "block-job-cancel")
    assert done["offset"] == len(dirty) * CHUNK
    assert d.dirty() == (user | during if mode == "never" else set())
    d.guest.shutdown()
    d.daemon.stop()
    assert file_content(d.copy) == now


def test_target_is_zero(daemon, tmp):
    """Its word is taken: what is zero in the source is not written; without it all is."""
    d = Disk(daemon, tmp)
    written = d.write(3, 4, 50)
    for word in (True, False):
        target = tmp / f"{word}.raw"
        target.write_bytes(b"\xee" * SIZE)      # the word is not true, which shows who takes it
        d.q.execute("blockdev-add", driver="raw", node_name="target",
                    file={"driver": "file", "filename": str(target)})
        d.q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full",
                    granularity=CHUNK, target_is_zero=word)
        d.q.wait_event("BLOCK_JOB_READY", device="m")
        d.q.execute("block-job-cancel", device="m")
        done = d.q.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
        d.q.wait_job("m", "null")
        d.q.execute("blockdev-del", node_name="target")
        got, disk = target.read_bytes(), d.content()
        left = set(range(CHUNKS)) - written if word else set()
        assert different(got, disk) == left
        assert all(got[c * CHUNK:][:CHUNK] == b"\xee" * CHUNK for c in left)
        assert done["offset"] == (len(written) if word else CHUNKS) * CHUNK


def test_what_block_job_change_refuses(daemon, tmp):
    d = Disk(daemon, tmp)
    q = d.q
    target = create_image(tmp / "target.qcow2", size=SIZE)
    q.execute("blockdev-add", driver="qcow2", node_name="target",
              file={"driver": "file", "filename": str(target)})

    def refused(text, **arguments):
        with pytest.raises(QMPError) as error:
            q.execute("block-job-change", **arguments)
        assert error.value.desc == text
        return error.value.cls

    change = {"id": "m", "type": "mirror", "copy_mode": "write-blocking"}

    def without(name):
        return {k: v for k, v in change.items() if k != name}

    assert refused("Block job 'm' not found", **change) == "DeviceNotActive"
    q.execute("blockdev-mirror", job_id="m", device="disk", target="target", sync="full",
              auto_finalize=False, auto_dismiss=False)
    q.wait_event("BLOCK_JOB_READY", device="m")
    refused("Block job 'n' not found", **{**change, "id": "n"})
    refused("Parameter 'id' is missing", **without("id"))
    refused("Parameter 'type' is missing", **without("type"))
    refused("Parameter 'copy-mode' is missing", **without("copy_mode"))
    refused("Parameter 'copy-mode' does not accept value 'x'", **{**change, "copy_mode": "x"})
    refused("Invalid parameter type for 'copy-mode', expected: string", **{**change, "copy_mode": 1})
    refused("Parameter 'more' is unexpected", **change, more=1)
    refused("Parameter 'type' does not accept value 'x'", **{**change, "type": "x"})
    # Of another type there is nothing to change: its branch of the union is empty.
    refused("Job 'm' is 'mirror' job, not 'backup'", id="m", type="backup")
    q.execute("block-job-change", **{**change, "copy_mode": "background"})     # as it is
    q.execute("block-job-change", **change)
    q.execute("block-job-change", **change)
    refused("Change to copy mode 'background' is not implemented",
            **{**change, "copy_mode": "background"})
    q.execute("block-job-cancel", device="m")
    q.wait_job("m", "pending")
    refused("Job 'm' in state 'pending' cannot accept command verb 'change'", **change)
    q.execute("job-finalize", id="m")
    q.wait_job("m", "concluded")
    refused("Job 'm' in state 'concluded' cannot accept command verb 'change'", **change)
    q.execute("job-dismiss", id="m")

    q.execute("blockdev-backup", job_id="b", device="disk", target="target", sync="full",
              auto_finalize=False)
    q.wait_job("b", "pending")
    refused("Job 'b' in state 'pending' cannot accept command verb 'change'", id="b", type="backup")
    q.execute("job-cancel", id="b")
    q.wait_job("b", "null")
    q.execute("blockdev-backup", job_id="b", device="disk", target="target", sync="none")
    q.wait_job("b", "running")
    refused("Job 'b' is 'backup' job, not 'mirror'", **{**change, "id": "b"})
    refused("Job type does not support change", id="b", type="backup")
    q.execute("job-cancel", id="b")
    q.wait_job("b", "null")
