"""The command line of qemu-storage-daemon: good and bad options, exit statuses and texts."""

from tidemark_testlib import wait_until

from ..table import PATIENCE, disk, image, sequence

MON = ("--chardev", "socket,id=m,path=$DIR/m.sock,server=on,wait=off", "--monitor", "m")


@sequence(start=False)
def options_unknown(t):
    """Options that are not there, arguments that are missing, words that are no option."""
    for argv in (["--nosuch"], ["-z"], ["--blockdev"], ["--chardev"], ["--monitor"], ["--object"],
                 ["--export"], ["--nbd-server"], ["--pidfile"], ["--daemonize=yes"], ["--help=x"],
                 ["--block"], ["--nosuch=1"], ["-"]):
        t.run(*argv)
    t.run("--b", "null-co,node-name=n", stays=True)


@sequence(image("x"), image("r", "raw"), start=False)
def blockdev_keyval_errors(t):
    """--blockdev in keyval form: what is refused, and how it is told."""
    for text in ("", "nosuch", "nosuch,node-name=n", "node-name=n", "driver=nosuch", "file",
                 "file,node-name=f", "file,node-name=f,filename=$DIR/nosuch",
                 "null-co,node-name", "null-co,node-name=", "null-co,node-name=1x",
                 "null-co,=x", "null-co,.=x", "null-co,a..b=x", "null-co,nosuch=1", "null-co,cache=x",
                 "null-co,cache.nosuch=on", "null-co,cache.direct=yes", "null-co,size=x",
                 "null-co,node-name=n,size=1M",                  "null-co,node-name=n,size=0x", "null-co,node-name=n,size=1,size=x",
                 "null-co,node-name=n,read-only=maybe", "null-co,node-name=n,discard=nosuch",
                 "null-co,node-name=n,read-only", "null-co,node-name=n,cache.direct=on,cache=x",
                 "qcow2,node-name=q", "qcow2,node-name=q,file=nosuch", "qcow2,node-name=q,file.driver=file",
                 "qcow2,node-name=q,file.driver=file,file.filename=$DIR/r.raw",
                 "qcow2,node-name=q,file.filename=$DIR/x.qcow2",
                 "qcow2,node-name=q,file.driver=file,file.filename=$DIR/x.qcow2,nosuch=1",
                 "qcow2,node-name=q,file.driver=file,file.filename=$DIR/x.qcow2,file.nosuch=1",
                 "null-co,node-name=n,help", "help", "null-co,node-name=n,a.0=x,a.2=y",
                 "null-co,node-name=" + "x" * 40, "null-co", "driver=null-co",
                 "null-co,node-name=n,node-name=m=", "null-co,driver=file,node-name=n"):
        t.run("--blockdev", text)
    t.run("--blockdev", "null-co,node-name=n", "--blockdev", "null-co,node-name=n")


@sequence(start=False)
def blockdev_json_errors(t):
    """--blockdev in JSON form."""
    for text in ("{", "{}", "{'driver': 'null-co'}", '{"driver": "nosuch"}', '{"driver": 1}',
                 '{"driver": "null-co", "node-name": "n", "size": "1"}',
                 '{"driver": "null-co", "node-name": "n", "nosuch": 1}',
                 '{"driver": "null-co", "node-name": "n"} x', "[]", '{"driver": "null-co",}',
                 '{"driver": "null-co", "node-name": "n", "read-only": "on"}'):
        t.run("--blockdev", text)


@sequence(image("x"), image("k,1"), start=False)
def blockdev_forms(t):
    """Good nodes: keyval with its implied key and escapes, JSON, nested, by reference."""
    t.start("--blockdev", "driver=file,node-name=f,filename=$DIR/x.qcow2",
            "--blockdev", "qcow2,node-name=q,file=f,read-only=on,detect-zeroes=on,discard=unmap",
            "--blockdev", "file,filename=$DIR/k,,1.qcow2,node-name=k",
            "--blockdev", '{"driver": "null-co", "node-name": "j", "size": 1048576, "read-only": true}',
            "--blockdev", "{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'null-co', 'size': 512}}",
            "--blockdev", "null-co,node-name=hex,size=0x100000",
            "--blockdev", "null-co,node-name=c,cache.direct=on,cache.no-flush=off,size=1024,latency-ns=0",
            "--blockdev", "node-name=order,size=512,driver=null-co",
            "--blockdev=null-co,node-name=eq,size=512",
            "--blockdev", "null-co,node-name=twice,size=512,size=1024")
    t("query-named-block-nodes", flat=True)
    t("query-block")


@sequence(start=False)
def chardev_errors(t):
    """--chardev: its own grammar."""
    for text in ("", "socket", "socket,id=c", "socket,id=c,path=$DIR/nosuch/s,server=on,wait=off",
                 "socket,id=c,path=$DIR/s,server=maybe", "nosuch,id=c", "id=c", "stdio",
                 "socket,id=1c,path=$DIR/s,server=on", "socket,id=c,path=$DIR/s",
                 "socket,id=c,host=127.0.0.1", "socket,id=c,port=1", "socket,id=c,fd=nosuch",
                 "socket,id=c,fd=99", "socket,id=c,path=$DIR/s,server=on,wait=off,nosuch=1",
                 "socket,id=c,path=$DIR/s,host=127.0.0.1,port=1", "backend=socket,id=c", "socket,path=$DIR/s",
                 "socket,id=c,path=$DIR/s,server=on,wait=off,reconnect=1",
                 "socket,id=c,host=127.0.0.1,port=$PORT"):
        t.run("--chardev", text)
    t.run("--chardev", "null,id=c", "--chardev", "null,id=c")
    t.run("--chardev", "help", output=False)


@sequence(start=False)
def monitor_errors(t):
    """--monitor: names, modes."""
    for text in ("", "nosuch", "chardev=nosuch", "mode=control", "m,mode=nosuch", "m,pretty=x", "m,nosuch=1",
                 "m,mode=readline"):
        t.run("--chardev", "socket,id=m,path=$DIR/m.sock,server=on,wait=off", "--monitor", text)
    t.run(*MON[:-1], "m,id=", stays=True)
    t.run(*MON, "--monitor", "m")


@sequence(image("x"), start=False)
def object_export_nbd_errors(t):
    """--object, --export and --nbd-server: errors."""
    for text in ("", "nosuch,id=o", "iothread", "iothread,id=", "iothread,id=1", "id=o", "iothread,id=o,nosuch=1",
                 "secret,id=s", "secret,id=s,data=x,file=y", "qom-type=iothread", "iothread,id=o,poll-max-ns=x",
                 '{"qom-type": "iothread"}', '{"qom-type": "nosuch", "id": "o"}', "secret,id=s,file=$DIR/nosuch"):
        t.run("--object", text)
    t.run("--object", "iothread,id=o", "--object", "iothread,id=o")
    node = ("--blockdev", "null-co,node-name=n,size=512")
    for text in ("", "addr.type=unix", "addr.type=nosuch", "addr.type=unix,addr.path=$DIR/nosuch/s",
                 "addr.type=inet,addr.host=127.0.0.1", "addr.path=x", "unix", "addr.type=unix,addr.path=$DIR/s,nosuch=1",
                 "addr.type=unix,addr.path=$DIR/s,max-connections=x", "addr.type=unix,addr.path=$DIR/s,tls-creds=nosuch",
                 "addr=x", '{"addr": {"type": "unix"}}'):
        t.run("--nbd-server", text)
    t.run("--nbd-server", "addr.type=unix,addr.path=$DIR/s", "--nbd-server", "addr.type=unix,addr.path=$DIR/s2")
    server = ("--nbd-server", "addr.type=unix,addr.path=$DIR/nbd.sock")
    t.run("--export", "nbd,id=e,node-name=n")
    t.run(*node, "--export", "nbd,id=e,node-name=n")
    for text in ("", "nbd", "nosuch,id=e,node-name=n", "nbd,id=e", "nbd,node-name=n", "nbd,id=e,node-name=nosuch",
                 "nbd,id=e,node-name=n,writable=maybe", "nbd,id=e,node-name=n,nosuch=1", "nbd,id=1,node-name=n",
                 "nbd,id=e,node-name=n,bitmaps.0=nosuch", "nbd,id=e,node-name=n,bitmap=nosuch",
                 "type=nbd,id=e,node-name=n,name=" + "x" * 300 + ",nosuch=on"):
        t.run(*node, *server, "--export", text)
    t.run(*node, *server, "--export", "nbd,id=e,node-name=n", "--export", "nbd,id=e,node-name=n,name=x")
    t.run(*node, *server, "--export", "nbd,id=e,node-name=n", "--export", "nbd,id=f,node-name=n")
    t.run("--export", "nbd,id=e,node-name=n", *node, *server)


@sequence(image("x", bitmaps=["b"]), start=False)
def everything_at_once(t):
    """A command line with everything."""
    t.start("--object", "iothread,id=io", "--object", '{"qom-type": "secret", "id": "s", "data": "x"}',
            "--blockdev", "file,node-name=f,filename=$DIR/x.qcow2", "--blockdev", "qcow2,node-name=q,file=f",
            "--nbd-server", "addr.type=inet,addr.host=127.0.0.1,addr.port=$PORT,max-connections=3",
            "--export", "nbd,id=e,node-name=q,name=disk,writable=on,bitmaps.0=b",
            "--pidfile", "$DIR/pid", "--chardev", "null,id=other", "--chardev",
            "socket,id=second,path=$DIR/second.sock,server=on,wait=off", "--monitor", "chardev=second,mode=control,pretty=on")
    t("query-block-exports")
    t.nodes()

    def pid(where):
        return {"its": (where / "pid").read_text().strip() == str(t.daemon.pid) if t.daemon else None}
    t.tool("pidfile", pid)
    t.finish("term")
    t.tool("pidfile-gone", lambda where: not (where / "pid").exists())


@sequence(start=False)
def pidfile_errors(t):
    """A pidfile that cannot be written."""
    t.run("--pidfile", "$DIR/nosuch/pid")
    t.run("--pidfile", "$DIR")
    t.run("--pidfile", "")


@sequence(start=False)
def help_and_version(t):
    """--help and --version end with status 0 and say nothing on stderr (the text is each one's own)."""
    t.run("--help")
    t.run("-h")
    t.run("--version")
    t.run("-V")
    t.run("--blockdev", "nosuch", "--help")
    t.run("--nosuch", "--help")
    t.run("--help", "--nosuch")


@sequence(start=False)
def stdio_monitor(t):
    """A monitor on stdin and stdout."""
    t.run("--chardev", "stdio,id=c", "--monitor", "c", output=False,
          stdin=b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
    t.run("--chardev", "stdio,id=c", "--chardev", "stdio,id=d")
    t.run("--chardev", "stdio,id=c,nosuch=1")


@sequence(image("x"), start=False)
def daemonize(t):
    """--daemonize: the parent ends when the daemon is ready, or with its error."""
    t.run("--daemonize", "--blockdev", "nosuch")
    t.run("--daemonize", "--blockdev", "null-co,node-name=n", "--pidfile", "$DIR/pid", *MON)

    def end(where):
        import os
        import signal
        pid = int((where / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
        return [(where / "m.sock").exists(), (where / "pid").exists()]
    t.tool("end", end)


@sequence(disk("a"), disk("b"))
def image_locks(t):
    """An image that another process has open is refused, with QEMU's words."""
    def other(where):
        import subprocess
        done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read 0 512", where / "a.qcow2"],
                              capture_output=True, check=False)
        return [done.returncode, done.stderr.decode().replace(str(where), "$DIR")]
    t.tool("qemu-io", other)

    def shared(where):
        import subprocess
        done = subprocess.run(["qemu-img", "info", "-U", where / "a.qcow2"], capture_output=True, check=False)
        return done.returncode
    t.tool("qemu-img-info", shared)


def talk(stream_in, stream_out):
    """Negotiates, quits, and tells which members the messages had."""
    import json
    kinds = []
    greeting = json.loads(stream_in.readline())
    kinds.append(sorted(greeting))
    stream_out.write(b'{"execute": "qmp_capabilities"}')
    stream_out.flush()
    kinds.append(json.loads(stream_in.readline()))
    stream_out.write(b'{"execute": "quit"}\n')
    stream_out.flush()
    kinds.append(json.loads(stream_in.readline()))
    return kinds


@sequence(start=False)
def chardev_forms(t):
    """A monitor on each kind of chardev: unix and inet servers and clients, an inherited fd, stdio."""
    import socket
    import subprocess

    def run(binary, chardev, **kwargs):
        return subprocess.Popen([binary, "--chardev", chardev, "--monitor", "c"],
                                stderr=subprocess.DEVNULL, **kwargs)

    def over(sock, child):
        with sock, sock.makefile("rb") as reader, sock.makefile("wb") as writer:
            said = talk(reader, writer)
            return [said, child.wait(PATIENCE)]

    def connect(family, address):
        def connected():
            sock = socket.socket(family)
            try:
                sock.connect(address)
                return sock
            except OSError:
                sock.close()
                return None
        return wait_until(connected, pace=0.01)

    def unix_server(options):
        def work(binary, where):
            path = str(where / f"s{len(options)}.sock")
            child = run(binary, f"socket,id=c,path={path},{options}")
            return over(connect(socket.AF_UNIX, path), child)
        return work
    for options in ("server=on,wait=off", "server=on,wait=on", "server=on", "server,nowait", "server"):
        t.program("unix-" + options.replace(",", "-"), unix_server(options))

    def unix_client(binary, where):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(where / "client.sock"))
            listener.listen()
            child = run(binary, f"socket,id=c,path={where}/client.sock")
            return over(listener.accept()[0], child)
    t.program("unix-client", unix_client)

    def inet_server(binary, where):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        child = run(binary, f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off")
        return over(connect(socket.AF_INET, ("127.0.0.1", port)), child)
    t.program("inet-server", inet_server)

    def inet_client(binary, where):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            child = run(binary, f"socket,id=c,host=127.0.0.1,port={listener.getsockname()[1]},server=off")
            return over(listener.accept()[0], child)
    t.program("inet-client", inet_client)

    def inherited(binary, where):
        ours, theirs = socket.socketpair()
        with theirs:
            child = run(binary, f"socket,id=c,fd={theirs.fileno()}", pass_fds=[theirs.fileno()])
        return over(ours, child)
    t.program("fd", inherited)

    def stdio(binary, where):
        child = run(binary, "stdio,id=c", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with child.stdin, child.stdout:
            return [talk(child.stdout, child.stdin), child.wait(PATIENCE)]
    t.program("stdio", stdio)


@sequence(start=False)
def monitor_text(t):
    """The bytes of answers: one line each, CRLF, ASCII; pretty=on spreads them over lines."""
    import json
    import subprocess

    def text(options):
        def work(binary, where):
            done = subprocess.run(
                [binary, "--chardev", "stdio,id=c", "--monitor", f"c,{options}"], check=False,
                input='{"execute": "qmp_capabilities"}{"execute": "nosuch", "id": "\u00e4\u007f/\\""}'
                      '{"execute": "quit"}'.encode(), capture_output=True, timeout=PATIENCE)
            lines = done.stdout.split(b"\n")[1:]       # without the greeting
            return [[line.decode("ascii")[-1:], json.loads(line) if line else None,
                     b"\\u00E4\\u007F/" in line] for line in lines]
        return work
    t.program("plain", text("mode=control"))
    t.program("pretty-off", text("pretty=off"))

    def pretty(binary, where):
        done = subprocess.run(
            [binary, "--chardev", "stdio,id=c", "--monitor", "c,pretty=on"], check=False,
            input=b'{"execute": "qmp_capabilities"}{"execute": "quit"}', capture_output=True,
            timeout=PATIENCE)
        return [b"\r\n" in done.stdout, b"\n    \"QMP\": {\r\n" in done.stdout
                or b"\n    \"QMP\": {\n" in done.stdout]
    t.program("pretty-on", pretty)


@sequence(start=False)
def sigterm_with_a_guest(t):
    """SIGTERM and quit while a guest is connected: the daemon ends at once and well."""
    t.start("--blockdev", "null-co,node-name=n,size=1048576", "--nbd-server",
            "addr.type=unix,addr.path=$DIR/nbd.sock", "--export", "nbd,id=e,node-name=n,name=n,writable=on")
    for how in ("term", "int", "quit"):
        t.write("n", 0, 4096)
        t.finish_under_guest(how)
        t.tool("socket-left", lambda where: (where / "nbd.sock").exists())
        t.start("--blockdev", "null-co,node-name=n,size=1048576", "--nbd-server",
                "addr.type=unix,addr.path=$DIR/nbd.sock", "--export", "nbd,id=e,node-name=n,name=n,writable=on")
