"""The monitor against clients that are broken, hostile, slow or many."""

import json
import os
import random
import resource
import signal
import socket
import time

from tidemark_testlib import QMP, create_image, qemu_img, wait_until

MIB = 1 << 20


def rss(d):
    """The daemon's resident memory in bytes."""
    with open(f"/proc/{d.process.pid}/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def connect(d):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.connect(str(d.socket))
    s.settimeout(60)
    return s


def lines(s, count):
    """The next COUNT lines of a monitor, as JSON."""
    data = b""
    while data.count(b"\n") < count:
        got = s.recv(1 << 20)
        assert got, f"the monitor closed after {data[-200:]}"
        data += got
    return [json.loads(line) for line in data.split(b"\n")[:count]]


def alive(d):
    q = QMP(d.socket)
    assert q.execute("query-version")["qemu"]["major"] == 7
    q.close()


def test_deep_huge_and_broken_json(daemon):
    d = daemon()
    alive(d)
    before = rss(d)
    s = connect(d)
    lines(s, 1)
    s.sendall(b'{"execute":"qmp_capabilities"}')
    lines(s, 1)
    s.sendall(b"[" * 1024 + b"]" * 1024)
    assert lines(s, 1)[0]["error"]["desc"] == "QMP input must be a JSON object"
    s.sendall(b'{"execute":"query-jobs","id":' + b"[" * 1022 + b"]" * 1022 + b"}")
    assert b'"return": []' in s.recv(1 << 20)   # too deep for Python's own parser
    s.sendall(b"[" * 1025 + b"\xff")
    assert [m["error"]["desc"] for m in lines(s, 2)] == [
        "JSON nesting depth limit exceeded", "JSON parse error, stray '\ufffd'"]
    # a string beyond the limit, and 100 MB of it
    s.sendall(b'{"execute":"')
    for _ in range(100):
        s.sendall(b"x" * MIB)
    s.sendall(b'"}\n{"execute":"query-jobs"}')
    answers = lines(s, 3)
    assert answers[0]["error"]["desc"] == "JSON token size limit exceeded"
    assert answers[-1] == {"return": []}
    # many tokens, the same
    s.sendall(b"[" + b"1," * MIB)
    assert lines(s, 1)[0]["error"]["desc"] == "JSON token count limit exceeded"
    s.close()
    alive(d)
    assert rss(d) < before + 300 * MIB


def test_wrong_types_everywhere(daemon, tmp):
    """Each argument of each command, given each type of JSON: an answer, and no crash."""
    d = daemon()
    q = QMP(d.socket)
    schema = {e["name"]: e for e in q.execute("query-qmp-schema")}
    values = [None, True, 1, -1, 2**64 - 1, 1.5, "", "x", [], [None], {}, {"a": 1}]
    asked = 0
    for name, entry in schema.items():
        if entry["meta-type"] != "command" or name == "quit":
            continue
        for member in schema[entry["arg-type"]]["members"]:
            for value in values:
                q.call(name, {member["name"]: value})
                asked += 1
    assert asked > 500
    assert d.running


def test_nodes_are_not_stacked_without_end(daemon):
    d = daemon("--blockdev", "null-co,node-name=n0,size=1048576")
    for i in range(1, 400):
        answer = d.qmp.call("blockdev-add", {"driver": "raw", "node-name": f"n{i}", "file": f"n{i-1}"})
        if "error" in answer:
            break
    assert answer["error"]["desc"] == "More than 250 nodes on top of each other"
    d.qmp.execute("query-named-block-nodes", flat=True)
    d.qmp.call("block_resize", {"node-name": f"n{i-1}", "size": 2097152})
    d.qmp.execute("block-dirty-bitmap-add", node=f"n{i-1}", name="b")


def test_random_bytes(daemon):
    d = daemon()
    rng = random.Random(int(os.environ.get("TIDEMARK_SEED", "1")))
    words = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\xff", b"\n", b"true", b"1", b"-",
             b'"execute"', b'"qmp_capabilities"', b'"arguments"', b'"id"', b"\\u", b"\xc3"]
    for _ in range(50):
        s = connect(d)
        s.sendall(b"".join(rng.choice(words) for _ in range(rng.randrange(400))))
        s.close()
    alive(d)


def test_many_clients_and_one_that_does_not_read(daemon, tmp):
    d = daemon("--blockdev", "null-co,node-name=n,size=1048576")
    slow = connect(d)
    slow.sendall(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
                 + b'{"execute":"query-qmp-schema"}' * 1000)
    clients = [QMP(d.socket) for _ in range(30)]
    begun = time.monotonic()
    for _ in range(20):
        for q in clients:
            assert len(q.execute("query-named-block-nodes")) == 1
    assert time.monotonic() - begun < 30
    for q in clients:
        q.close()
    slow.close()
    alive(d)


def test_every_client_hears_events(daemon, tmp):
    disk, target = tmp / "a.qcow2", tmp / "t.qcow2"
    create_image(disk, size="1M")
    create_image(target, size="1M")
    d = daemon("--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={disk}",
               "--blockdev", f"qcow2,node-name=t,file.driver=file,file.filename={target}")
    clients = [QMP(d.socket) for _ in range(3)]
    clients[0].execute("blockdev-backup", **{"device": "a", "target": "t", "sync": "full", "job-id": "j"})
    for q in clients:
        q.wait_event("BLOCK_JOB_COMPLETED")
    for q in clients:
        q.close()


def test_a_client_that_goes_does_not_stop_its_command(daemon, tmp):
    """It sends and leaves; what it asked for is done."""
    d = daemon()
    for i in range(20):
        s = connect(d)
        s.sendall(b'{"execute":"qmp_capabilities"}{"execute":"blockdev-add","arguments":'
                  b'{"driver":"null-co","node-name":"n%d"}}' % i)
        lines(s, 2)
        s.close()
    wait_until(lambda: len(d.qmp.execute("query-named-block-nodes")) >= 20)


def test_signals_end_it_clean(daemon, tmp):
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        disk = tmp / f"{sig.name}.qcow2"
        create_image(disk, size="1M")
        d = daemon("--blockdev", f"qcow2,node-name=a,file.driver=file,file.filename={disk}")
        d.qmp.execute("block-dirty-bitmap-add", node="a", name="b", persistent=True)
        d.process.send_signal(sig)
        assert d.process.wait(30) == 0
        assert "in-use" not in qemu_img("info", "--output=json", disk)
