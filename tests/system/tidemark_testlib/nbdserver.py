"""An NBD server that does as it is told: it keeps a log, hangs, hangs up, and lies.

    with FakeServer(path, size=MiB, min_block=4096) as server:
        ...                      # server.log: (command, flags, offset, length) in the order of arrival
        server.hang = True       # what arrives from now on is not answered
        server.cut()             # all connections end; new ones are taken

Whoever wants it to lie gives `lie`, a function that gets the connection, the command, its cookie,
offset and length (or data), and returns True if it has answered.
"""

import contextlib
import os
import socket
import struct
import threading
import time

from .rawnbd import (
    CACHE, CHUNK_MAGIC, DISC, ERR_UNKNOWN, ERR_UNSUP, FLUSH, GO, INFO, OPTS_MAGIC, READ, REP_ACK, REP_INFO,
    REP_MAGIC, REP_META, REQUEST_MAGIC, SET_META, STATUS, STRUCTURED, TRIM, WRITE, ZEROES,
)

HAS, READ_ONLY, CAN_FLUSH, CAN_FUA, CAN_TRIM, CAN_ZERO, CAN_CACHE, CAN_FAST = (
    1, 2, 4, 8, 32, 64, 1 << 10, 1 << 11)
ALL = HAS | CAN_FLUSH | CAN_FUA | CAN_TRIM | CAN_ZERO | CAN_CACHE | CAN_FAST
ENOTSUP = 95


class FakeServer:
    def __init__(self, path, size=1 << 20, flags=ALL, min_block=None, max_block=None, lie=None,
                 greeting=None, structured=True):
        self.path, self.size, self.flags = str(path), size, flags
        self.min_block, self.max_block = min_block, max_block
        self.lie, self.greeting, self.structured = lie, greeting, structured
        self.data = bytearray(size)
        self.log, self.connections, self.accepted = [], [], 0
        self.hang = False
        self.lock = threading.Lock()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(8)
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.listener.close()
        self.cut()

    def cut(self):
        for sock in self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.connections = []

    def wait_for(self, command, count=1, timeout=60.0):
        deadline = time.monotonic() + timeout
        while sum(entry[0] == command for entry in self.log) < count:
            assert time.monotonic() < deadline, f"{count} of command {command}: {self.log}"
            time.sleep(0.01)

    # -- connections

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.accepted += 1
                self.connections.append(sock)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with contextlib.suppress(OSError, EOFError), sock:
            if self.greeting is not None:
                sock.sendall(self.greeting)
                time.sleep(60 if self.hang else 0)
                return
            if self.negotiate(sock):
                while self.command(sock):
                    pass

    @staticmethod
    def recv(sock, n):
        data = b""
        while len(data) < n:
            piece = sock.recv(n - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def negotiate(self, sock):
        sock.sendall(struct.pack(">8sQH", b"NBDMAGIC", OPTS_MAGIC, 3))
        self.recv(sock, 4)
        while True:
            _, option, length = struct.unpack(">QII", self.recv(sock, 16))
            data = self.recv(sock, length)

            def reply(kind, payload=b"", option=option):
                sock.sendall(struct.pack(">QIII", REP_MAGIC, option, kind, len(payload)) + payload)
            if option == STRUCTURED and self.structured:
                reply(REP_ACK)
            elif option == SET_META and self.structured:
                reply(REP_META, struct.pack(">I", 7) + b"base:allocation")
                reply(REP_ACK)
            elif option in (GO, INFO):
                name = data[4:4 + struct.unpack(">I", data[:4])[0]]
                if name == b"nosuch":
                    reply(ERR_UNKNOWN)
                    continue
                reply(REP_INFO, struct.pack(">HQH", 0, self.size, self.flags))
                if self.min_block is not None or self.max_block is not None:
                    reply(REP_INFO, struct.pack(">HIII", 3, self.min_block or 1,
                                                max(4096, self.min_block or 1),
                                                self.max_block or 32 << 20))
                reply(REP_ACK)
                return True
            else:
                reply(ERR_UNSUP)

    # -- commands

    def chunk(self, sock, cookie, kind, payload=b"", done=True):
        head = struct.pack(">IHHQI", CHUNK_MAGIC, done, kind, cookie, len(payload))
        with self.lock:
            sock.sendall(head + payload)

    def simple(self, sock, cookie, error=0, payload=b""):
        with self.lock:
            sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + payload)

    def command(self, sock):
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self.recv(sock, 28))
        assert magic == REQUEST_MAGIC
        data = self.recv(sock, length) if kind == WRITE else None
        self.log.append((kind, flags, offset, length))
        if kind == DISC:
            return False
        if self.hang:
            return True
        if self.lie and self.lie(sock, kind, cookie, offset, data if kind == WRITE else length):
            return True
        if kind == READ and self.structured:
            self.chunk(sock, cookie, 1, struct.pack(">Q", offset) + self.data[offset:offset + length])
        elif kind == READ:
            self.simple(sock, cookie, 0, self.data[offset:offset + length])
        elif kind == STATUS:
            self.chunk(sock, cookie, 5, struct.pack(">III", 7, length, 0))
        elif kind == ZEROES and flags & 16 and not self.flags & CAN_FAST:
            self.simple(sock, cookie, ENOTSUP)
        else:
            if kind == WRITE:
                self.data[offset:offset + length] = data
            elif kind == ZEROES:
                self.data[offset:offset + length] = bytes(length)
            else:
                assert kind in (FLUSH, TRIM, CACHE), kind
            self.simple(sock, cookie)
        return True
