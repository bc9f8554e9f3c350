"""Disks behind an NBD server: what is asked of it, what happens when it goes away and comes back, and
their bitmaps. qemu-nbd is the server; where a server has to be bad, one of our own."""

import contextlib
import os
import re
import struct
import subprocess
import threading
import time

import nbd
import pytest
from tidemark_testlib import (
    QMP, QMPError, connect, create_image, nbd_uri, qemu_img, quickest, wait_until,
)
from tidemark_testlib import crash, rawnbd
from tidemark_testlib.nbd import META_BASE, extents
from tidemark_testlib.nbdserver import ALL, HAS, READ_ONLY, FakeServer

KiB, MiB = 1 << 10, 1 << 20
SIZE = 64 * MiB


class Server:
    """qemu-nbd on a socket of its own; it can be killed and started again."""

    def __init__(self, directory, image, name="disk", fmt="raw", options=()):
        self.socket = directory / f"{name}.server"
        self.argv = ["qemu-nbd", "-f", fmt, "-x", name, "-t", "-e", "9", "--discard=unmap",
                     "-k", self.socket, *options, image]
        self.name, self.process = name, None
        self.start()

    def start(self):
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.argv)
        wait_until(lambda: self.socket.exists() or self.process.poll() is not None, pace=0.01)
        assert self.process.poll() is None, "qemu-nbd does not start"

    def kill(self):
        self.process.kill()
        self.process.wait()

    def node(self, **more):
        return {"driver": "nbd", "server": {"type": "unix", "path": str(self.socket)},
                "export": self.name, **more}


@pytest.fixture
def server(tmp):
    """server("name", fmt=..., size=...) -> a Server of an image of that name."""
    running = []

    def start(name="disk", fmt="raw", size=SIZE, options=(), image=None, **create):
        image = image or create_image(tmp / f"{name}.{fmt}", fmt, size, **create)
        running.append(Server(tmp, image, name, fmt, options))
        running[-1].image = image
        return running[-1]
    yield start
    for one in running:
        one.kill()


@pytest.fixture
def front(daemon, tmp):
    """front(NODE...) -> (QMP, the address) of a tidemarkd that has these nodes, the last one exported."""
    def start(*nodes, **kwargs):
        sock = tmp / "front.sock"
        sock.unlink(missing_ok=True)
        d = daemon("--nbd-server", f"addr.type=unix,addr.path={sock}", **kwargs)
        for node in nodes:
            d.qmp.execute("blockdev-add", **node)
        d.qmp.execute("block-export-add", type="nbd", id="front", node_name=nodes[-1]["node-name"],
                      name="front", writable=True)
        d.address = nbd_uri(sock, "front")
        return d
    return start


def remote(server, name="disk", **more):
    if isinstance(server, FakeServer):
        return {"driver": "nbd", "node-name": name, "discard": "unmap",
                "server": {"type": "unix", "path": server.path}, **more}
    return server.node(**{"node-name": name, "discard": "unmap", **more})


@pytest.fixture
def fake(tmp):
    """fake(...) -> a FakeServer."""
    with contextlib.ExitStack() as stack:
        yield lambda **kwargs: stack.enter_context(FakeServer(tmp / "fake.server", **kwargs))


# -- requests


def test_requests(server, front):
    """Each kind of request arrives as what it is."""
    s = server()
    d = front(remote(s))
    g = connect(d.address, [META_BASE])
    assert g.get_size() == SIZE
    data = os.urandom(3 * MiB + 512)
    g.pwrite(data, MiB - 512)
    assert g.pread(len(data), MiB - 512) == data
    g.pwrite(b"fua" * 1024, 8 * MiB, nbd.CMD_FLAG_FUA)
    g.zero(MiB, MiB)
    assert g.pread(MiB, MiB) == bytes(MiB)
    g.trim(MiB, 2 * MiB)
    g.cache(MiB, 0)
    g.flush()
    assert extents(g, META_BASE) == extents(connect(nbd_uri(s.socket, "disk"), [META_BASE]), META_BASE)
    assert [flags for _, _, flags in extents(g, META_BASE)[:3]] == [0, 3, 0]  # a hole, zeroes
    big = os.urandom(1 << 16) * 512                            # 32 MiB, the largest request
    g.pwrite(big, 16 * MiB)
    assert g.pread(len(big), 16 * MiB) == big
    with open(s.image, "rb") as file:
        content = file.read()
    assert content[16 * MiB:48 * MiB] == big
    assert content[8 * MiB:8 * MiB + 3072] == b"fua" * 1024


def test_many_requests_at_once(server, front):
    """Commands of sixteen clients are in flight together, and none waits for another's bytes."""
    d = front(remote(server()))
    handles = [connect(d.address) for _ in range(4)]
    expected, errors = {}, []

    def work(number):
        try:
            handle = handles[number]
            for i in range(100):
                at = (number * 100 + i) * 64 * KiB
                expected[at] = bytes([number + 1, i]) * (16 * KiB)
                handle.pwrite(expected[at], at)
        except nbd.Error as error:
            errors.append(error)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    buffers = {}
    for at in expected:
        buffers[at] = nbd.Buffer(32 * KiB)
        handles[0].aio_pread(buffers[at], at)
    while handles[0].aio_in_flight():
        handles[0].poll(1000)
    # as above: all of them were sent before the first was answered
    for at, data in expected.items():
        assert buffers[at].to_bytearray() == data


def test_odd_size(fake, front):
    """The end of a disk that is no multiple of a sector: zeroes, and zeroes alone can be written."""
    s = fake(size=MiB + 100)
    s.data[:] = b"x" * (MiB + 100)
    g = connect(front(remote(s)).address, [META_BASE])
    assert g.get_size() == MiB + 512
    assert g.pread(512, MiB) == b"x" * 100 + bytes(412)
    g.pwrite(b"y" * 100 + bytes(412), MiB)
    assert g.pread(512, MiB) == b"y" * 100 + bytes(412)
    with pytest.raises(nbd.Error):
        g.pwrite(b"z" * 512, MiB)
    assert extents(g, META_BASE)
    g.trim(512, MiB)
    g.zero(1024, MiB - 512)
    assert g.pread(1024, MiB - 512) == bytes(1024)
    assert len(s.data) == MiB + 100
    assert all(offset + length <= MiB + 100 for _, _, offset, length in s.log)


def test_flags_and_order(fake, front):
    """FUA is passed on as itself, and a flush is asked for after what was answered before it."""
    s = fake()
    g = connect(front(remote(s)).address)
    g.pwrite(b"1" * 4096, 0)
    g.flush()
    g.pwrite(b"1" * 4096, 4096, nbd.CMD_FLAG_FUA)
    g.zero(4096, 8192, nbd.CMD_FLAG_FUA)
    g.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
    g.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
    g.trim(4096, 16384)
    g.cache(4096, 16384)
    g.flush()
    FUA, NO_HOLE, FAST = 1, 2, 16
    assert s.log == [
        (rawnbd.WRITE, 0, 0, 4096), (rawnbd.FLUSH, 0, 0, 0), (rawnbd.WRITE, FUA, 4096, 4096),
        (rawnbd.ZEROES, FUA, 8192, 4096), (rawnbd.ZEROES, NO_HOLE, 8192, 4096),
        (rawnbd.ZEROES, FAST, 8192, 4096), (rawnbd.TRIM, 0, 16384, 4096),
        (rawnbd.CACHE, 0, 16384, 4096), (rawnbd.FLUSH, 0, 0, 0)]


def test_the_first_flush_is_asked_for(fake, front):
    """What a killed program has written may be in the server's cache yet."""
    s = fake()
    g = connect(front(remote(s)).address)
    g.flush()
    g.flush()
    assert s.log == [(rawnbd.FLUSH, 0, 0, 0)]


def test_a_server_that_can_little(fake, front):
    """No FUA: a flush after the write. No zeroes: written out. No structured replies: all is data."""
    s = fake(flags=HAS | 4, structured=False)
    g = connect(front(remote(s)).address, [META_BASE])
    g.pwrite(b"1" * 4096, 0, nbd.CMD_FLAG_FUA)
    g.zero(4096, 0)
    g.trim(4096, 0)
    assert extents(g, META_BASE) == [(0, MiB, 0)]
    assert s.log == [(rawnbd.WRITE, 0, 0, 4096), (rawnbd.FLUSH, 0, 0, 0), (rawnbd.WRITE, 0, 0, 4096)]
    g.pwrite(b"2" * 4096, 4096)
    assert g.pread(8192, 0) == bytes(4096) + b"2" * 4096


def test_the_servers_block_sizes(fake, front):
    """Nothing smaller, nothing larger, nothing that is no multiple arrives."""
    s = fake(size=4 * MiB, min_block=4096, max_block=64 * KiB)
    s.data[:] = os.urandom(4 * MiB)
    model = bytearray(s.data)
    raw = {"driver": "raw", "node-name": "raw", "discard": "unmap", "file": remote(s)}
    g = connect(front(raw).address, [META_BASE])
    for at, length in ((512, 1024), (4096 - 512, 1024), (100 * 512, 300 * KiB), (0, MiB)):
        data = os.urandom(length)
        g.pwrite(data, at)
        model[at:at + length] = data
        assert g.pread(length, at) == data
    g.zero(10240, 512)
    model[512:512 + 10240] = bytes(10240)
    assert s.data == model
    assert extents(g, META_BASE)
    for command, _, offset, length in s.log:
        assert offset % 4096 == 0 and length % 4096 == 0, (command, offset, length)
        assert command in (rawnbd.STATUS, rawnbd.TRIM) or length <= 64 * KiB


def test_read_only(fake, front, daemon):
    s = fake(flags=ALL | READ_ONLY)
    d = daemon()
    with pytest.raises(QMPError, match="without write permission"):
        d.qmp.execute("blockdev-add", **remote(s))
    d.qmp.execute("blockdev-add", **remote(s, auto_read_only=True))
    assert d.qmp.execute("query-named-block-nodes")[0]["ro"]
    with pytest.raises(QMPError, match="Can't reopen read-only NBD mount as read/write"):
        d.qmp.execute("blockdev-reopen", options=[remote(s, **{"auto-read-only": False})])


# -- servers that lie


@pytest.mark.parametrize("lie, says", [
    ({"size": MiB + 512, "min_block": 4096}, "not (a )?multiple of minimum block size"),
    ({"size": 1 << 63}, "."),
    ({"greeting": b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10}, "."),
    ({"greeting": b"NBDMAGIC"}, "."),
    ({"greeting": b""}, "."),
    ({"greeting": struct.pack(">8sQH", b"NBDMAGIC", rawnbd.OPTS_MAGIC, 3) +
                  struct.pack(">QIII", rawnbd.REP_MAGIC, 8, 1, 1 << 31)}, "."),
])
def test_bad_offers(tmp, daemon, lie, says):
    """They are refused with a reason, and the daemon goes on."""
    size = lie.pop("size", MiB)
    d = daemon()
    with FakeServer(tmp / "s", **lie) as s:
        s.size = size
        with pytest.raises(QMPError, match=says) as caught:
            d.qmp.execute("blockdev-add", **remote(s))
        print(caught.value)
    assert d.qmp.execute("query-named-block-nodes") == []


@pytest.mark.parametrize("sizes", [(3000, None), (1 << 20, None), (4096, 512), (512, 100000), (0, 0)])
def test_block_sizes_that_are_none(fake, front, sizes):
    """They are taken for not said."""
    s = fake(min_block=sizes[0], max_block=sizes[1])
    g = connect(front(remote(s)).address)
    g.pwrite(b"x" * 65536, 512)
    assert g.pread(65536, 512) == b"x" * 65536


def lie_longer(s):
    """An extent that is longer than was asked for."""
    def lie(sock, kind, cookie, offset, length):
        if kind == rawnbd.STATUS:
            s.chunk(sock, cookie, 5, struct.pack(">III", 7, 0xfffff000, 3))
        return kind == rawnbd.STATUS
    return lie


def lie_nothing(s):
    """A block status without extents, and a read without data."""
    def lie(sock, kind, cookie, offset, length):
        if kind == rawnbd.STATUS:
            s.chunk(sock, cookie, 0)
        elif kind == rawnbd.READ:
            s.chunk(sock, cookie, 0)
        return kind in (rawnbd.STATUS, rawnbd.READ)
    return lie


def lie_zero_length(s):
    def lie(sock, kind, cookie, offset, length):
        if kind == rawnbd.STATUS:
            s.chunk(sock, cookie, 5, struct.pack(">III", 7, 0, 0))
        elif kind == rawnbd.READ:
            s.chunk(sock, cookie, 2, struct.pack(">QI", offset, 0))
        return kind in (rawnbd.STATUS, rawnbd.READ)
    return lie


def lie_outside(s):
    """Data for another place than was asked for."""
    def lie(sock, kind, cookie, offset, length):
        if kind == rawnbd.READ:
            s.chunk(sock, cookie, 1, struct.pack(">Q", offset + length) + bytes(length))
        elif kind == rawnbd.STATUS:
            s.chunk(sock, cookie, 5, struct.pack(">III", 9, length, 0))
        return kind in (rawnbd.STATUS, rawnbd.READ)
    return lie


def lie_cookie(s):
    def lie(sock, kind, cookie, offset, length):
        s.simple(sock, cookie + 1)
        return True
    return lie


def lie_garbage(s):
    def lie(sock, kind, cookie, offset, length):
        sock.sendall(os.urandom(4096))
        return True
    return lie


def lie_huge(s):
    def lie(sock, kind, cookie, offset, length):
        sock.sendall(struct.pack(">IHHQI", rawnbd.CHUNK_MAGIC, 1, 1, cookie, 0xffffffff))
        return True
    return lie


@pytest.mark.parametrize("how", [lie_longer, lie_nothing, lie_zero_length, lie_outside, lie_cookie,
                                 lie_garbage, lie_huge])
def test_bad_answers(fake, front, how):
    """A request that is answered so fails, or is right; the daemon goes on, and when the server has
    come to its senses so does the disk."""
    s = fake()
    s.data[:] = os.urandom(MiB)
    d = front(remote(s))
    g = connect(d.address, [META_BASE])
    s.lie = how(s)
    for _ in range(3):
        with contextlib.suppress(nbd.Error):
            assert g.pread(4096, 8192) == s.data[8192:12288]
        with contextlib.suppress(nbd.Error):
            assert sum(length for _, length, _ in extents(g, META_BASE)) == MiB
        with contextlib.suppress(nbd.Error):
            g.flush()
    s.lie = None
    wait_until(lambda: works(g))
    assert g.pread(4096, 8192) == s.data[8192:12288]


# -- servers that go away


def works(g):
    try:
        g.pread(512, 0)
        return True
    except nbd.Error:
        return False


def test_killed_and_back(server, front):
    """Without reconnect-delay requests fail at once while the server is away; then all is well."""
    s = server()
    d = front(remote(s))
    g = connect(d.address)
    g.pwrite(b"a" * 4096, 0)
    g.flush()
    s.kill()
    began = time.monotonic()
    assert not works(g)
    assert not works(g)
    assert time.monotonic() - began < 60
    with pytest.raises(nbd.Error):
        g.flush() if g.pwrite(b"b" * 4096, 0) else None
    s.start()
    wait_until(lambda: works(g))
    assert g.pread(4096, 0) == b"a" * 4096
    g.pwrite(b"c" * 4096, 0)
    assert g.pread(4096, 0) == b"c" * 4096


def test_a_flush_does_not_speak_for_a_lost_connection(fake, front):
    """What was written before it was lost may have gone with it: one flush fails."""
    s = fake()
    g = connect(front(remote(s)).address)
    g.pwrite(b"a" * 4096, 0)
    s.cut()
    wait_until(lambda: s.accepted >= 2)
    wait_until(lambda: works(g))
    with pytest.raises(nbd.Error):
        g.flush()
    g.pwrite(b"a" * 4096, 0)
    g.flush()
    s.cut()
    wait_until(lambda: s.accepted >= 3)
    wait_until(lambda: works(g))
    g.pwrite(b"a" * 4096, 0)
    g.flush()


def test_each_client_is_told_of_a_lost_connection(fake, front):
    """The one flush that fails may be another client's: who has written is told, too, and once."""
    s = fake()
    d = front(remote(s))
    g, other = connect(d.address), connect(d.address)
    g.pwrite(b"a" * 4096, 0)
    s.cut()
    wait_until(lambda: s.accepted >= 2)
    wait_until(lambda: works(g))
    for client in (other, g):
        with pytest.raises(nbd.Error):
            client.flush()
        client.flush()
    connect(d.address).flush()


def test_an_image_on_a_server_that_comes_back_older(fake, front, tmp):
    """Its driver does not go on with tables that it has written and the server has lost: what is
    written and flushed then would be found by nobody."""
    image = create_image(tmp / "disk.qcow2", "qcow2", 4 * MiB).read_bytes()
    s = fake(size=2 * MiB)
    s.data[:len(image)] = image
    g = connect(front({"driver": "qcow2", "node-name": "disk", "file": remote(s, "below")}).address)
    g.pwrite(b"a" * 64 * KiB, 0)
    g.flush()
    durable = [bytes(s.data)]

    def dies_of_the_second_flush(sock, kind, cookie, offset, data):
        if kind != rawnbd.FLUSH:
            return False
        durable.append(bytes(s.data))
        if len(durable) < 3:
            return False
        s.lie = None
        s.data[:] = durable[1]             # an entry of a table is not there
        s.cut()
        return True
    s.lie = dies_of_the_second_flush
    g.pwrite(b"b" * 64 * KiB, MiB)
    with pytest.raises(nbd.Error):
        g.flush()
    wait_until(lambda: s.accepted >= 2)
    time.sleep(0.3)
    with contextlib.suppress(nbd.Error):
        g.flush()
    with pytest.raises(nbd.Error):
        g.pwrite(b"b" * 64 * KiB, MiB)
        g.flush()
        (tmp / "after.qcow2").write_bytes(s.data)
        assert "failed" not in subprocess.run(
            ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x62 1M 64k", tmp / "after.qcow2"],
            capture_output=True, text=True).stdout


def test_requests_wait_for_the_server(server, front):
    """With reconnect-delay the guest does not see that it was away."""
    s = server()
    d = front(remote(s, **{"reconnect-delay": 60}))
    stop, errors, written = threading.Event(), [], {}

    def guest(number):
        g = connect(d.address)
        i = 0
        try:
            while not stop.is_set():
                at = (number * 100 + i % 100) * 64 * KiB
                data = struct.pack(">II", number, i) * (2 * KiB)
                g.pwrite(data, at)
                written[at] = data
                i += 1
                if i % 10 == 0:
                    g.flush()
        except nbd.Error as error:
            errors.append(error)
    threads = [threading.Thread(target=guest, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for _ in range(3):
        wait_until(lambda: written)
        time.sleep(0.3)
        s.kill()
        time.sleep(0.3)
        s.start()
    time.sleep(1)
    stop.set()
    for t in threads:
        t.join(60)
    assert not errors
    g = connect(d.address)
    for at, data in written.items():
        assert g.pread(len(data), at) == data


def test_requests_wait_so_long(server, front):
    """reconnect-delay is a limit; the server's return after it makes all well."""
    s = server()
    g = connect(front(remote(s, **{"reconnect-delay": 3})).address)
    began = time.monotonic()
    s.kill()

    def fails():
        assert not works(g)
    fails()
    assert 2.5 < time.monotonic() - began < 60
    assert quickest(fails) < 2
    s.start()
    wait_until(lambda: works(g))


def test_another_disk_does_not_come_back(fake, front):
    """A server that offers another size is not taken for the one that went."""
    s = fake()
    d = front(remote(s))
    g = connect(d.address)
    s.size = 2 * MiB
    s.cut()
    wait_until(lambda: s.accepted >= 3)
    assert not works(g)
    s.size = MiB
    wait_until(lambda: works(g))
    assert "has 2097152 bytes now and had 1048576" in d.stderr


def test_opening_waits(tmp, daemon, server):
    """open-timeout is how long a server may take to be there."""
    d = daemon()
    began = time.monotonic()
    node = {"driver": "nbd", "node-name": "n", "open-timeout": 1,
            "server": {"type": "unix", "path": str(tmp / "late.server")}, "export": "late"}
    with pytest.raises(QMPError, match="Failed to connect to"):
        d.qmp.execute("blockdev-add", **node)
    assert 0.5 < time.monotonic() - began < 60
    ident = d.qmp.send("blockdev-add", {**node, "open-timeout": 3600})
    time.sleep(0.5)
    server("late")
    assert d.qmp.answer(ident, 60.0) == {"return": {}, "id": ident}


def test_a_silent_server_stops_no_guest(tmp, front, server):
    """While a node waits for its server to say something, others work; it is given up."""
    d = front(remote(server()))
    g = connect(d.address)
    with FakeServer(tmp / "silent", greeting=b"NBDMAGIC") as silent:
        silent.hang = True

        def guest():
            for i in range(20):
                g.pwrite(bytes([i]) * 512, 0)
                assert g.pread(512, 0) == bytes([i]) * 512
        for _ in range(3):      # the server gets ten seconds
            ident = d.qmp.send("blockdev-add", remote(silent, "silent"))
            took = quickest(guest, 1)
            answer = d.qmp.answer(ident, 60.0)
            assert "Connection timed out" in answer["error"]["desc"]
            if took < 5:
                return
    raise AssertionError(f"the guest waits, at last for {took:g} s")


# -- bitmaps


class RemoteHistory(crash.History):
    """A history (tidemark_testlib/crash.py) of a disk behind qemu-nbd, which outlives the daemon."""

    def make_disk(self):
        path = self.place.tmp / "disk"
        create_image(path, self.fmt, self.size)
        os.truncate(path, 2 * self.size if self.fmt == "qcow2" else self.size)   # it cannot grow
        (self.place.tmp / "state").mkdir()
        self.server = Server(self.place.tmp, path, "remote")

    def send_open(self):
        disk = {"driver": self.fmt, "node-name": "disk", "discard": "unmap",
                "x-tidemark-persist": {"state-directory": self.place.path("state")},
                "file": self.server.node(discard="unmap")}
        export = {"type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "writable": True}
        return [self.qmp.send("blockdev-add", disk), self.qmp.send("block-export-add", export)]

    def look_at_closed(self):
        super().look_at_closed()
        left = os.listdir(self.place.tmp / "state")
        assert left == ([] if self.fmt == "qcow2" else
                        [f"nbd%2Bunix%3A%2F%2F%2Fremote%3Fsocket%3D{quoted(self.server.socket)}.tide"])


def quoted(path):
    return str(path.resolve()).replace("/", "%2F")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_killed_under_load(tmp, tidemarkd, fmt):
    """kill -9 at any moment: bitmaps are exact, or a superset without the run segments, and the
    increments make the chain equal to the disk."""
    place = crash.HostPlace(tmp, tidemarkd)
    history = RemoteHistory(place, os.environ.get("TIDEMARK_SEED", "1"), fmt, say=print)
    try:
        history.run(4)
        if fmt == "raw":
            place.boot()
            history.open()
            assert history.node()["x-tidemark-recovery"]["witness"] == "none"
            place.stop()
        print(history.found.table())
    finally:
        place.close()
        history.server.kill()


@pytest.mark.parametrize("fmt", ["nbd", "raw", "qcow2"])
def test_no_place_for_bitmaps(server, front, tmp, fmt):
    """Without a directory for its tide file a remote disk can have no persistent bitmap, and the error
    says what to do; a qcow2 image keeps its own as QEMU does, and the log says that."""
    image = create_image(tmp / "disk.img", "raw" if fmt == "nbd" else fmt, SIZE)
    os.truncate(image, 2 * SIZE)
    s = server(image=image)
    node = {"driver": fmt, "node-name": "disk", "file": s.node()} if fmt != "nbd" else remote(s)
    d = front(node)
    add = {"node": "disk", "name": "b", "persistent": True}
    if fmt == "qcow2":
        d.qmp.execute("block-dirty-bitmap-add", **{**add, "name": "as-qemu"})
        assert re.search("do not survive a crash: .* is on another machine.*'state-directory'", d.stderr)
    else:
        with pytest.raises(QMPError, match="is on another machine.*'state-directory'"):
            d.qmp.execute("block-dirty-bitmap-add", **add)
        d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b")
    d.qmp.execute("block-export-del", id="front")
    d.qmp.wait_event("BLOCK_EXPORT_DELETED")
    d.qmp.execute("blockdev-del", node_name="disk")
    (tmp / "state").mkdir()
    d.qmp.execute("blockdev-add", **node,
                  **{"x-tidemark-persist": {"state-directory": str(tmp / "state")}})
    d.qmp.execute("block-dirty-bitmap-add", **add)
    assert len(os.listdir(tmp / "state")) == 1


@pytest.mark.parametrize("no_witness", ["believe", "distrust", "refuse"])
def test_no_witness(server, daemon, tmp, no_witness):
    """What another program did to a remote disk cannot be known: the option says what is made of it."""
    s = server()
    (tmp / "state").mkdir()
    node = remote(s, **{"x-tidemark-persist": {"state-directory": str(tmp / "state"),
                                               "no-witness": no_witness}})
    d = daemon()
    d.qmp.execute("blockdev-add", **node)
    d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
    d.stop()
    d = daemon()
    if no_witness == "refuse":
        with pytest.raises(QMPError, match="witness|whether"):
            d.qmp.execute("blockdev-add", **node)
        return
    d.qmp.execute("blockdev-add", **node)
    found = d.qmp.execute("query-named-block-nodes")[0]
    assert found["x-tidemark-recovery"]["witness"] == "none"
    assert found["dirty-bitmaps"][0].get("inconsistent", False) == (no_witness == "distrust")


# -- as a target


def guest_writes(uri, count=40):
    g = connect(uri)
    for i in range(count):
        g.pwrite(os.urandom(64 * KiB), (i * 37 % 900) * 64 * KiB)
    return g


def source(tmp, name="source"):
    image = create_image(tmp / f"{name}.qcow2", size=SIZE)
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(image)}}


def test_mirror_to_a_remote_disk(server, front, tmp):
    """And the guest goes there."""
    s = server("target")
    d = front(remote(s, "target"), source(tmp))
    guest_writes(d.address)
    d.qmp.execute("blockdev-mirror", job_id="m", device="source", target="target", sync="full")
    d.qmp.wait_event("BLOCK_JOB_READY", device="m")
    g = guest_writes(d.address)
    d.qmp.execute("job-complete", id="m")
    assert "error" not in d.qmp.wait_event("BLOCK_JOB_COMPLETED", device="m")["data"]
    d.qmp.wait_job("m", "null")
    g.pwrite(b"after" * 1000, 5 * MiB)
    g.flush()
    read = b"".join(bytes(g.pread(MiB, at)) for at in range(0, SIZE, MiB))
    with open(s.image, "rb") as file:
        assert file.read() == read
    assert read[5 * MiB:5 * MiB + 5000] == b"after" * 1000


def test_chain_on_remote_disks(server, front, tmp):
    """A full backup and an increment onto remote qcow2 images, one behind the other."""
    images = {}
    for name in ("full", "increment"):
        images[name] = create_image(tmp / f"{name}.img", "qcow2", SIZE)
        if name == "increment":
            qemu_img("rebase", "-u", "-f", "qcow2", "-b", images["full"], "-F", "qcow2", images[name])
        os.truncate(images[name], 2 * SIZE)
    servers = {name: server(name, image=images[name]) for name in images}
    d = front(source(tmp))
    guest_writes(d.address)
    for name, bitmap in (("full", False), ("increment", True)):
        backing = {"backing": "full"} if bitmap else {}
        d.qmp.execute("blockdev-add", driver="qcow2", node_name=name, file=servers[name].node(), **backing)
        job = {"job-id": name, "device": "source", "target": name}
        if bitmap:
            d.qmp.execute("blockdev-backup", sync="incremental", bitmap="b", **job)
        else:
            d.qmp.execute("transaction", actions=[
                {"type": "block-dirty-bitmap-add", "data": {"node": "source", "name": "b"}},
                {"type": "blockdev-backup", "data": {"sync": "full", **job}}])
        assert "error" not in d.qmp.wait_event("BLOCK_JOB_COMPLETED", device=name)["data"]
        d.qmp.wait_job(name, "null")
        g = guest_writes(d.address, 20) if not bitmap else None
        assert g or bitmap
    d.qmp.execute("blockdev-del", node_name="increment")
    d.qmp.execute("blockdev-del", node_name="full")
    for s in servers.values():
        s.kill()
    qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", images["increment"], d.address)


@pytest.mark.parametrize("command", ["blockdev-backup", "blockdev-mirror"])
def test_a_hanging_target_is_given_up(fake, front, tmp, command):
    """Cancelled by force, neither the job nor the guest waits for it."""
    s = fake(size=SIZE)
    d = front(remote(s, "target"), source(tmp))
    g = guest_writes(d.address)
    s.hang = True
    d.qmp.execute(command, job_id="j", device="source", target="target", sync="full")
    s.wait_for(rawnbd.WRITE if command == "blockdev-backup" else rawnbd.ZEROES)
    began = time.monotonic()
    d.qmp.execute("block-job-cancel", device="j", force=True)
    d.qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
    d.qmp.wait_job("j", "null")
    g.pwrite(b"x" * 512, 0)
    assert time.monotonic() - began < 60
    s.hang = False
    d.qmp.execute("blockdev-del", node_name="target")


@pytest.mark.parametrize("command", ["blockdev-backup", "blockdev-mirror"])
def test_a_target_that_was_lost_is_no_target(fake, front, tmp, command):
    """What it had been given may have gone with it: the job fails, though the target is back, and though
    the flush that fails has not been the backup's."""
    s = fake(size=SIZE)
    d = front(remote(s, "target"), source(tmp))
    guest_writes(d.address)
    job = {"job_id": "j", "device": "source", "target": "target", "sync": "full"}

    def idle(info):     # a write in flight would end it
        return info["offset"] == info["len"]
    if command == "blockdev-mirror":
        d.qmp.execute(command, **job)
        d.qmp.wait_event("BLOCK_JOB_READY", device="j")
        guest_writes(d.address, 5)
        wait_until(lambda: idle(d.qmp.execute("query-block-jobs")[0]))
    else:
        d.qmp.execute(command, auto_finalize=False, **job)
        d.qmp.wait_event("BLOCK_JOB_PENDING", id="j")
    s.cut()
    wait_until(lambda: s.accepted >= 2)
    if command == "blockdev-backup":     # a mirror lets nobody else at its target
        d.qmp.execute("block-export-add", type="nbd", id="t", node_name="target", name="t", writable=True)
        t = connect(d.address.replace("/front?", "/t?"))
        wait_until(lambda: works(t))
        with pytest.raises(nbd.Error):
            t.flush()
        t.flush()
    d.qmp.execute("job-complete" if command == "blockdev-mirror" else "job-finalize", id="j")
    failed = d.qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")["data"]
    assert "error" in failed, failed
    d.qmp.wait_job("j", "null")


def test_waiting_for_a_lost_target_is_given_up(server, front, tmp):
    s = server("target")
    d = front(remote(s, "target", **{"reconnect-delay": 600}), source(tmp))
    guest_writes(d.address)
    s.kill()
    d.qmp.execute("blockdev-backup", job_id="j", device="source", target="target", sync="full")
    time.sleep(0.5)
    began = time.monotonic()
    d.qmp.execute("block-job-cancel", device="j", force=True)
    d.qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
    d.qmp.wait_job("j", "null")
    assert time.monotonic() - began < 60


def test_short_form(server, tmp, tidemarkd):
    """tidemarkd URI: named after the export, and with a state directory its bitmaps are kept."""
    s = server("vm")
    (tmp / "state").mkdir()
    out = tmp / "out"
    with open(out, "wb") as file:
        process = subprocess.Popen(
            [tidemarkd, "--x-tidemark-persist", f"state-directory={tmp}/state",
             nbd_uri(s.socket, "vm")], stdout=file, env={**os.environ, "RUNTIME_DIRECTORY": str(tmp)})
    try:
        wait_until(lambda: b"QMP: " in out.read_bytes())
        uri, qmp = (line.split(": ", 1)[1] for line in out.read_text().splitlines())
        assert "/vm?" in uri
        QMP(qmp).execute("block-dirty-bitmap-add", node="vm", name="b", persistent=True)
        connect(uri).pwrite(b"x" * 512, 0)
    finally:
        process.terminate()
        assert process.wait(30) == 0
    assert len(os.listdir(tmp / "state")) == 1
