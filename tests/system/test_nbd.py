"""The NBD server as its clients see it: libnbd, QEMU's tools, nbdcopy, fio, and bytes by hand."""

import json
import random
import socket
import struct
import subprocess
import time

import nbd
import pytest
from tidemark_testlib import connect, create_image, nbd_uri, qemu_img, qemu_io, sha256_of, wait_until
from tidemark_testlib import rawnbd as raw
from tidemark_testlib.images import run_tool
from tidemark_testlib.nbd import extents
from tidemark_testlib.rawnbd import RawNBD

MiB = 1 << 20


def qcow2(path, node="disk", **more):
    extra = "".join(f",{k.replace('_', '-')}={v}" for k, v in more.items())
    return f"qcow2,node-name={node},file.driver=file,file.filename={path}{extra}"


@pytest.fixture
def served(daemon, tmp):
    """A 64 MiB qcow2 image, writable as "disk": (daemon, socket)."""
    image = create_image(tmp / "disk.qcow2", size="64M")
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", qcow2(image, discard="unmap"),
               "--nbd-server", f"addr.type=unix,addr.path={sock}",
               "--export", "nbd,id=e,node-name=disk,name=disk,writable=on,description=a disk")
    return d, sock


# -- clients that others wrote


def test_nbdinfo_lists_and_describes(served):
    _, sock = served
    info = json.loads(run_tool("nbdinfo", "--no-content", "--json", nbd_uri(sock, "disk")).stdout)
    assert info["protocol"] == "newstyle-fixed" and info["structured"] is True
    e = info["exports"][0]
    assert e["export-name"] == "disk" and e["description"] == "a disk"
    assert e["export-size"] == 64 * MiB and e["is_read_only"] is False
    for can in ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn",
                "can_trim", "can_zero"):
        assert e[can] is True, can
    assert e["contexts"] == ["base:allocation"]
    assert e["block_size_preferred"] == 4096 and e["block_size_maximum"] == 32 * MiB
    listed = json.loads(run_tool("nbdinfo", "--list", "--json", nbd_uri(sock)).stdout)
    assert [x["export-name"] for x in listed["exports"]] == ["disk"]


def test_nbdcopy_in_and_out(served, tmp):
    _, sock = served
    source, back = tmp / "source.raw", tmp / "back.raw"
    rng = random.Random(1)
    with open(source, "wb") as file:
        file.truncate(64 * MiB)
        for _ in range(40):
            file.seek(rng.randrange(0, 63 * MiB))
            file.write(rng.randbytes(rng.randrange(1, 300000)))
        file.truncate(64 * MiB)
    run_tool("nbdcopy", source, nbd_uri(sock, "disk"))
    run_tool("nbdcopy", nbd_uri(sock, "disk"), back)
    assert sha256_of(source, "raw") == sha256_of(back, "raw")
    # The other way round: QEMU's client reads what nbdcopy wrote.
    qemu_img("compare", "-f", "raw", "-F", "raw", source, nbd_uri(sock, "disk"))


def test_qemu_img_converts_over_nbd(served, tmp):
    _, sock = served
    source = create_image(tmp / "source.qcow2", size="64M")
    qemu_io(source, "write -P 0x11 1M 3M", "write -P 0x22 40M 64k", fmt="qcow2")
    qemu_img("convert", "-n", "-f", "qcow2", "-O", "raw", source, nbd_uri(sock, "disk"))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", nbd_uri(sock, "disk"), tmp / "back.qcow2")
    assert sha256_of(source) == sha256_of(tmp / "back.qcow2")
    qemu_io(nbd_uri(sock, "disk"), "read -P 0x11 1M 3M", "read -P 0x22 40M 64k",
            "read -P 0 41M 1M", "discard 1M 1M", "read -P 0 1M 1M", "write -z 2M 64k",
            "read -P 0 2M 64k", "flush", fmt="raw")


def test_fio_verifies_with_eight_connections(served, tmp):
    _, sock = served
    job = tmp / "verify.fio"
    job.write_text(f"""[global]
ioengine=nbd
uri={nbd_uri(sock, "disk")}
rw=randrw
rwmixread=30
bsrange=512-64k
blockalign=512
iodepth=16
size=8m
verify=crc32c
verify_backlog=64
verify_fatal=1
verify_state_save=0
randseed=7
""" + "".join(f"[c{i}]\noffset={8 * i}m\n" for i in range(8)))
    done = run_tool("fio", "--output-format=json", job, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    jobs = json.loads(done.stdout[done.stdout.index(b"{"):])["jobs"]
    assert len(jobs) == 8 and all(j["error"] == 0 for j in jobs)
    assert sum(j["write"]["io_bytes"] for j in jobs) > 30 * MiB


def test_random_requests_of_every_kind_agree_with_a_model(served):
    """Reads, writes, zeroes and trims of any alignment, many in flight where they do not overlap."""
    _, sock = served
    rng = random.Random(3)
    disk = bytearray(64 * MiB)
    handles = [connect(nbd_uri(sock, "disk")) for _ in range(3)]
    for step in range(1500):
        h = rng.choice(handles)
        at = rng.randrange(0, 64 * MiB - 1)
        n = min(rng.choice([1, 3, 511, 512, 4096, 5000, 65536, 70001, 300000]), 64 * MiB - at)
        what = rng.choice(["write", "write", "write_fua", "read", "read_df", "zero", "zero_no_hole",
                           "zero_fast", "trim", "cache", "flush"])
        if what.startswith("write"):
            data = rng.randbytes(n)
            h.pwrite(data, at, nbd.CMD_FLAG_FUA if what == "write_fua" else 0)
            disk[at:at + n] = data
        elif what == "read":
            assert h.pread(n, at) == disk[at:at + n], step
        elif what == "read_df":
            assert h.pread_structured(n, at, lambda *a: 0, nbd.CMD_FLAG_DF) == disk[at:at + n], step
        elif what.startswith("zero"):
            flags = {"zero": 0, "zero_no_hole": nbd.CMD_FLAG_NO_HOLE,
                     "zero_fast": nbd.CMD_FLAG_FAST_ZERO}[what]
            try:
                h.zero(n, at, flags)
                disk[at:at + n] = bytes(n)
            except nbd.Error as error:
                # What was refused may have been done in part; nothing else may have changed.
                assert what == "zero_fast" and error.errno == "ENOTSUP", error
                after = h.pread(n, at)
                assert all(a in (0, b) for a, b in zip(after, disk[at:at + n])), step
                disk[at:at + n] = after
        elif what == "trim":
            h.trim(n, at)
            after = h.pread(n, at)
            # What is trimmed may read as anything until written; here: as before, or zeroes.
            assert all(a in (0, b) for a, b in zip(after, disk[at:at + n])), step
            disk[at:at + n] = after
        elif what == "cache":
            h.cache(n, at)
        else:
            h.flush()
    for h in handles:
        for at in range(0, 64 * MiB, 8 * MiB):
            assert h.pread(8 * MiB, at) == disk[at:at + 8 * MiB]
        h.shutdown()


# -- several exports, sockets, removal


def test_several_exports_over_tcp(daemon, tmp):
    a = create_image(tmp / "a.qcow2", size="1M")
    b = create_image(tmp / "b.raw", fmt="raw", size="2M")
    d = daemon("--blockdev", qcow2(a, "a"),
               "--blockdev", f"raw,node-name=b,file.driver=file,file.filename={b}",
               "--nbd-server", "addr.type=inet,addr.host=127.0.0.1,addr.port=0")
    port = next(p for p in listening_ports(d.pid))
    d.qmp.execute("block-export-add", type="nbd", id="ea", **{"node-name": "a"}, writable=True)
    d.qmp.execute("block-export-add", type="nbd", id="eb", **{"node-name": "b"}, name="bee")
    assert {(e["id"], e["node-name"], e["shutting-down"])
            for e in d.qmp.execute("query-block-exports")} == {("ea", "a", False), ("eb", "b", False)}
    ha, hb = connect(nbd_uri(export="a", port=port)), connect(nbd_uri(export="bee", port=port))
    assert (ha.get_size(), hb.get_size()) == (MiB, 2 * MiB)
    assert not ha.is_read_only() and hb.is_read_only()
    with pytest.raises(nbd.Error) as caught:
        hb.set_strict_mode(0)
        hb.pwrite(b"x", 0)
    assert caught.value.errno == "EPERM"
    with pytest.raises(nbd.Error):
        connect(nbd_uri(export="nosuch", port=port))


def listening_ports(pid):
    """Of TCP sockets that the process listens on."""
    import os
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(table).read().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                yield int(words[1].rsplit(":", 1)[1], 16)


def test_removal_safe_and_hard(served):
    d, sock = served
    h = connect(nbd_uri(sock, "disk"))
    with pytest.raises(Exception, match="export 'e' still in use"):
        d.qmp.execute("block-export-del", id="e")
    d.qmp.execute("block-export-del", id="e", mode="hard")
    assert d.qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    with pytest.raises(nbd.Error):
        h.pread(512, 0)
        h.pread(512, 0)
    assert d.qmp.execute("query-block-exports") == []
    d.qmp.execute("nbd-server-stop")
    with pytest.raises(nbd.Error):
        connect(nbd_uri(sock, "disk"))
    d.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(sock)}})
    d.qmp.execute("nbd-server-add", device="disk", writable=True)
    connect(nbd_uri(sock, "disk")).pwrite(b"x" * 512, 0)


def test_stopping_the_server_takes_clients_and_exports_along(served):
    d, sock = served
    handles = [connect(nbd_uri(sock, "disk")) for _ in range(5)]
    d.qmp.execute("nbd-server-stop")
    assert d.qmp.wait_event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    for h in handles:
        with pytest.raises(nbd.Error):
            h.pread(512, 0)
            h.pread(512, 0)
    d.qmp.execute("blockdev-del", **{"node-name": "disk"})


# -- metadata contexts


def test_contexts_base_bitmap_and_depth(daemon, tmp):
    base = create_image(tmp / "base.qcow2", size="16M")
    qemu_io(base, "write -P 1 0 1M", "write -P 1 4M 1M", fmt="qcow2")
    top = create_image(tmp / "top.qcow2", size="16M", backing_file=base, backing_fmt="qcow2")
    qemu_io(top, "write -P 2 512k 1M", "write -z 8M 1M", fmt="qcow2")
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", qcow2(top), "--nbd-server", f"addr.type=unix,addr.path={sock}")
    d.qmp.execute("block-dirty-bitmap-add", node="disk", name="b0")
    d.qmp.execute("block-export-add", type="nbd", id="w", **{"node-name": "disk"}, name="w",
                  writable=True)
    w = connect(nbd_uri(sock, "w"))
    w.pwrite(b"x" * 100, 12 * MiB + 70000)
    w.zero(65536, 13 * MiB)
    w.shutdown()
    d.qmp.execute("block-dirty-bitmap-disable", node="disk", name="b0")
    d.qmp.execute("block-export-add", type="nbd", id="r", **{"node-name": "disk"}, name="r",
                  bitmaps=["b0"], **{"allocation-depth": True})
    contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
    h = connect(nbd_uri(sock, "r"), contexts)
    k = 65536
    assert extents(h, "qemu:dirty-bitmap:b0") == [
        (0, 12 * MiB + k, 0), (12 * MiB + k, k, 1), (12 * MiB + 2 * k, MiB - 2 * k, 0),
        (13 * MiB, k, 1), (13 * MiB + k, 3 * MiB - k, 0)]
    assert extents(h, "qemu:allocation-depth", 2 * MiB) == [
        (0, MiB // 2, 2), (MiB // 2, MiB, 1), (MiB + MiB // 2, MiB // 2, 0)]
    assert extents(h, "base:allocation", 10 * MiB) == [
        (0, MiB + MiB // 2, 0), (MiB + MiB // 2, 5 * MiB // 2, 3), (4 * MiB, MiB, 0),
        (5 * MiB, 5 * MiB, 3)]
    # One extent only, when that is asked for.
    seen = []
    h.block_status(16 * MiB, 0, lambda name, at, e, err: seen.append((name, e)) or 0,
                   nbd.CMD_FLAG_REQ_ONE)
    assert sorted(name for name, _ in seen) == sorted(contexts) and all(len(e) == 2 for _, e in seen)
    # A bitmap that an export shows is in use.
    with pytest.raises(Exception, match="in use"):
        d.qmp.execute("block-dirty-bitmap-remove", node="disk", name="b0")
    h.shutdown()
    mapped = json.loads(run_tool("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json",
                                 nbd_uri(sock, "r")).stdout)
    assert [(m["offset"], m["length"]) for m in mapped if m["type"] == 1] == [
        (12 * MiB + k, k), (13 * MiB, k)]
    d.qmp.execute("block-export-del", id="r")
    d.qmp.wait_event("BLOCK_EXPORT_DELETED")
    d.qmp.execute("block-dirty-bitmap-remove", node="disk", name="b0")


def test_a_bitmap_of_another_node_holds_that_node(daemon, tmp):
    a = create_image(tmp / "a.qcow2", size="1M")
    b = create_image(tmp / "b.qcow2", size="1M")
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", qcow2(a, "a"), "--blockdev", qcow2(b, "b"),
               "--nbd-server", f"addr.type=unix,addr.path={sock}")
    d.qmp.execute("block-dirty-bitmap-add", node="b", name="b0", disabled=True)
    d.qmp.execute("block-export-add", type="nbd", id="e", **{"node-name": "a"},
                  bitmaps=[{"node": "b", "name": "b0"}])
    with pytest.raises(Exception, match="is in use"):
        d.qmp.execute("blockdev-del", **{"node-name": "b"})
    h = connect(nbd_uri(sock, "a"), ["qemu:dirty-bitmap:b0"])
    assert extents(h, "qemu:dirty-bitmap:b0") == [(0, MiB, 0)]
    h.shutdown()
    d.qmp.execute("block-export-del", id="e", mode="hard")
    d.qmp.wait_event("BLOCK_EXPORT_DELETED")
    d.qmp.execute("blockdev-del", **{"node-name": "b"})


def test_queries_for_contexts_by_hand(daemon, tmp):
    image = create_image(tmp / "a.qcow2", size="1M")
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", qcow2(image), "--nbd-server", f"addr.type=unix,addr.path={sock}")
    for name in ("b0", "b1"):
        d.qmp.execute("block-dirty-bitmap-add", node="disk", name=name, disabled=True)
    d.qmp.execute("block-export-add", type="nbd", id="e", **{"node-name": "disk"},
                  bitmaps=["b0", "b1"], **{"allocation-depth": True})

    def listed(*queries):
        data = RawNBD.name("disk") + struct.pack(">I", len(queries)) + b"".join(
            RawNBD.name(q) for q in queries)
        with RawNBD(sock) as c:
            c.greet()
            c.negotiate_structured()
            replies = c.option(raw.LIST_META, data)
            assert replies[-1] == (raw.REP_ACK, b"")
            assert all(p[:4] == b"\0\0\0\0" for k, p in replies[:-1])
            return [p[4:].decode() for k, p in replies[:-1]]

    everything = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0",
                  "qemu:dirty-bitmap:b1"]
    assert listed() == everything
    assert listed("base:") == everything[:1]
    assert listed("qemu:") == everything[1:]
    assert listed("qemu:dirty-bitmap:") == everything[2:]
    assert listed("qemu:dirty-bitmap:b1", "base:allocation") == [everything[0], everything[3]]
    assert listed("qemu:nosuch", "other:thing", "", "x" * 5000) == []
    with RawNBD(sock) as c:
        c.greet()
        assert c.set_meta("disk", "base:allocation")[-1][0] == raw.ERR_INVALID
        c.negotiate_structured()
        assert c.set_meta("nosuch", "base:allocation")[-1][0] == raw.ERR_UNKNOWN
        assert c.set_meta("disk", "base:", "qemu:dirty-bitmap:") == [(raw.REP_ACK, b"")]
        replies = c.set_meta("disk", "qemu:dirty-bitmap:b1", "base:allocation")
        ids = {p[4:].decode(): p[:4] for k, p in replies[:-1]}
        assert len(set(ids.values())) == 2
        c.go("disk")
        c.request(raw.STATUS, 0, MiB)
        chunks = c.chunks()
        assert {d[:4] for k, d in chunks} == set(ids.values())


# -- the handshake, by hand


def test_old_and_new_ways_in(served):
    _, sock = served
    for flags, rest in ((0, 124), (1, 124), (3, 0)):
        with RawNBD(sock) as c:
            assert c.greet(flags) == 3
            c.send_option(raw.EXPORT_NAME, b"disk")
            size, transmission = struct.unpack(">QH", c.recv(10))
            assert size == 64 * MiB and transmission & 1
            assert c.recv(rest) == bytes(rest)
            c.request(raw.READ, 0, 512, cookie=77)
            assert c.simple_reply(512) == (0, 77, bytes(512))
            c.request(raw.DISC)
            assert c.ended()
    with RawNBD(sock) as c:
        c.greet()
        c.send_option(raw.EXPORT_NAME, b"nosuch")
        assert c.ended()
    with RawNBD(sock) as c:
        c.greet(0)  # not fixed newstyle: only EXPORT_NAME is there
        c.send_option(raw.LIST)
        assert c.ended()


def test_options_are_answered_in_turn(served):
    _, sock = served
    with RawNBD(sock) as c:
        c.greet()
        assert c.option(raw.LIST) == [
            (raw.REP_SERVER, RawNBD.name("disk") + b"a disk"), (raw.REP_ACK, b"")]
        assert c.option(raw.LIST, b"x")[-1][0] == raw.ERR_INVALID
        assert c.option(raw.STARTTLS)[-1][0] == raw.ERR_POLICY
        assert c.option(11)[-1][0] == raw.ERR_UNSUP  # extended headers: a later protocol
        assert c.option(99, b"abc" * 1000)[-1][0] == raw.ERR_UNSUP
        assert c.option(raw.GO, RawNBD.name("nosuch") + b"\0\0")[-1][0] == raw.ERR_UNKNOWN
        assert c.option(raw.INFO, RawNBD.name("disk"))[-1][0] == raw.ERR_INVALID
        infos = dict((p[:2], p[2:]) for k, p in c.option(
            raw.INFO, RawNBD.name("disk") + struct.pack(">HHH", 2, 1, 3))[:-1])
        assert infos[b"\0\1"] == b"disk" and infos[b"\0\2"] == b"a disk"
        assert struct.unpack(">III", infos[b"\0\3"])[1:] == (4096, 32 * MiB)
        c.negotiate_structured()
        assert c.option(raw.STRUCTURED)[-1][0] == raw.ERR_INVALID
        assert c.go("disk")[0] == 64 * MiB
        c.request(raw.READ, 0, 0)
        assert c.chunks() == [(0, b"")]
        c.request(raw.READ, 64 * MiB, 1)
        (kind, data), = c.chunks()
        assert kind == 0x8001 and struct.unpack(">I", data[:4]) == (22,) and b"past EOF" in data
    with RawNBD(sock) as c:
        c.greet()
        assert c.option(raw.ABORT) == [(raw.REP_ACK, b"")]
        assert c.ended()


def test_holes_are_told_in_structured_reads(served):
    _, sock = served
    with RawNBD(sock) as c:
        c.greet()
        c.negotiate_structured()
        c.go("disk")
        c.request(raw.WRITE, MiB, 65536, payload=b"z" * 65536)
        assert c.simple_reply()[0] == 0
        c.request(raw.READ, 0, 3 * MiB)
        got = bytearray(b"?" * 3 * MiB)
        kinds = []
        for kind, data in c.chunks():
            kinds.append(kind)
            at, = struct.unpack(">Q", data[:8])
            if kind == 1:
                got[at:at + len(data) - 8] = data[8:]
            else:
                assert kind == 2
                n, = struct.unpack(">I", data[8:])
                got[at:at + n] = bytes(n)
        assert kinds == [2, 1, 2]
        assert got == bytes(MiB) + b"z" * 65536 + bytes(2 * MiB - 65536)


# -- a disk that fails


def test_a_failed_write_is_an_event_and_many_are_one(daemon, tmp):
    image = tmp / "a.raw"
    image.write_bytes(bytes(65536))
    sock = tmp / "nbd.sock"
    d = daemon("--blockdev", f"raw,node-name=disk,file.driver=file,file.filename={image}",
               "--nbd-server", f"addr.type=unix,addr.path={sock}",
               "--export", "nbd,id=e,node-name=disk,name=disk,writable=on",
               prefix=("prlimit", "--fsize=32768"))
    h = connect(nbd_uri(sock, "disk"))
    h.pwrite(b"a" * 4096, 0)
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(nbd.Error):
            h.pwrite(b"b" * 4096, 32768)
    event = d.qmp.wait_event("BLOCK_IO_ERROR")["data"]
    assert event == {"device": "", "node-name": "disk", "operation": "write", "action": "report",
                     "nospace": False, "reason": "File too large"}
    assert h.pread(4096, 0) == b"a" * 4096  # the connection goes on
    h.shutdown()
    d.qmp.execute("query-block")
    assert sum(e["event"] == "BLOCK_IO_ERROR" for e in d.qmp.history) < time.monotonic() - began + 2


# -- limits


def test_connections_are_limited(daemon, tmp):
    image = create_image(tmp / "a.qcow2", size="1M")
    sock = tmp / "nbd.sock"
    daemon("--blockdev", qcow2(image),
           "--nbd-server", f"addr.type=unix,addr.path={sock},max-connections=2",
           "--export", "nbd,id=e,node-name=disk,name=disk")
    first, second = connect(nbd_uri(sock, "disk")), connect(nbd_uri(sock, "disk"))
    with RawNBD(sock, timeout=0.5) as third:
        with pytest.raises(TimeoutError):
            third.recv(1)
        first.shutdown()
        third.sock.settimeout(60)
        third.greet()
        assert third.go("disk")[0] == MiB
    second.shutdown()


@pytest.mark.long
def test_a_slow_handshake_is_cut_off_and_a_slow_client_is_not(served):
    _, sock = served
    with RawNBD(sock) as calm:
        calm.greet()
        calm.go("disk")
        began = time.monotonic()
        with RawNBD(sock) as idle:
            idle.greet()
            assert idle.ended()
        assert 8 < time.monotonic() - began
        calm.request(raw.READ, 0, 512)
        assert calm.simple_reply(512)[0] == 0


def test_a_client_that_does_not_read_stops_only_itself(served):
    d, sock = served
    with RawNBD(sock) as greedy:
        greedy.greet()
        greedy.go("disk")
        greedy.sock.setblocking(False)
        sent = 0
        try:
            for i in range(4000):
                rq = struct.pack(">IHHQQI", raw.REQUEST_MAGIC, 0, raw.READ, i, 0, 4 * MiB)
                sent += greedy.sock.send(rq)
        except BlockingIOError:
            pass
        time.sleep(0.3)
        h = connect(nbd_uri(sock, "disk"))
        h.pwrite(b"a" * 4096, 0)
        assert h.pread(4096, 0) == b"a" * 4096
        with open(f"/proc/{d.pid}/status") as status:
            rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        assert rss < 700 * 1024, f"{rss} KiB"
        h.shutdown()


# -- lies


def mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        how = rng.randrange(4)
        if how == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == 1 and data:
            del data[rng.randrange(len(data)):]
        elif how == 2:
            at = rng.randrange(len(data) + 1)
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif data:
            at = rng.randrange(len(data))
            data[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(data)


def honest_handshake(rng):
    """Client flags and some options, as bytes."""
    name = RawNBD.name("disk")
    options = [
        (raw.LIST, b""), (raw.STRUCTURED, b""), (raw.STARTTLS, b""),
        (raw.INFO, name + struct.pack(">HHH", 2, 1, 3)),
        (raw.LIST_META, name + struct.pack(">I", 1) + RawNBD.name("qemu:")),
        (raw.SET_META, name + struct.pack(">I", 1) + RawNBD.name("base:allocation")),
        (raw.GO, name + struct.pack(">HH", 1, 3)), (raw.EXPORT_NAME, b"disk"), (raw.ABORT, b""),
    ]
    out = struct.pack(">I", 3)
    for option, data in rng.sample(options, rng.randrange(1, 6)):
        out += struct.pack(">QII", raw.OPTS_MAGIC, option, len(data)) + data
    return out


def honest_requests(rng):
    out = b""
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(10)
        at, n = rng.randrange(64 * MiB), rng.choice([0, 1, 512, 4096, 33 * MiB, 0xFFFFFFFF])
        payload = rng.randbytes(n) if kind == raw.WRITE and n <= 4096 else b""
        out += struct.pack(">IHHQQI", raw.REQUEST_MAGIC, rng.choice([0, 0, 1, 4, 8, 255]), kind,
                           rng.randrange(1 << 64), at, n) + payload
    return out


def test_ten_thousand_lies(served):
    """Malformed handshakes and requests end their own connection at the most."""
    d, sock = served
    rng = random.Random(11)
    before = len(list_fds(d.pid))
    for number in range(10000):
        c = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        c.settimeout(60)
        try:
            c.connect(str(sock))
            if number % 2:
                c.sendall(mutate(rng, honest_handshake(rng)))
            else:
                data = RawNBD.name("disk") + b"\0\0"
                c.sendall(struct.pack(">I", 3)
                          + (struct.pack(">QII", raw.OPTS_MAGIC, raw.STRUCTURED, 0)
                             if number % 4 else b"")
                          + struct.pack(">QII", raw.OPTS_MAGIC, raw.GO, len(data)) + data
                          + mutate(rng, honest_requests(rng)))
            if number % 8 == 0:
                c.shutdown(socket.SHUT_WR)
                while c.recv(65536):
                    pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            c.close()
        if number % 1000 == 0:
            assert d.running
            h = connect(nbd_uri(sock, "disk"))
            h.pwrite(b"k" * 512, 32 * MiB)
            assert h.pread(512, 32 * MiB) == b"k" * 512
            h.shutdown()
    h = connect(nbd_uri(sock, "disk"))
    assert h.pread(512, 0) is not None
    h.shutdown()
    wait_until(lambda: len(list_fds(d.pid)) <= before + 4)
    assert subprocess.run(["nbdinfo", "--size", nbd_uri(sock, "disk")],
                          capture_output=True, check=True).stdout.strip() == b"67108864"


def list_fds(pid):
    import os
    return os.listdir(f"/proc/{pid}/fd")
