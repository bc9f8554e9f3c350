#!/usr/bin/python3
"""A drive with a volatile write cache, as an NBD server for one client.

    volatile.py SOCKET FILE SEED

What is written stays in memory until the client flushes (or writes with FUA). When the client goes
without a word, as a killed QEMU does, the power is gone: any subset of what was not flushed is on
the medium, FILE, chosen by SEED, also a part of a block of 4 KiB in sectors of 512 bytes. A client
that says goodbye has it all written.
"""

import os
import random
import socket
import struct
import sys

BLOCK, SECTOR = 4096, 512
READ, WRITE, DISC, FLUSH, TRIM = range(5)
FUA = 1
OPT_ABORT, OPT_INFO, OPT_GO = 2, 6, 7
REP_ACK, REP_INFO, REP_UNSUPPORTED = 1, 3, 0x80000001
TRANSMISSION = 1 | 4 | 8     # has flags, flush, FUA


class Drive:
    def __init__(self, path, seed):
        self.fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.cache = {}      # number of a block -> its 4096 bytes
        self.rng = random.Random(f"volatile-{seed}")

    def block(self, number):
        return self.cache.get(number) or bytearray(os.pread(self.fd, BLOCK, number * BLOCK))

    def read(self, at, length):
        data = bytearray(os.pread(self.fd, length, at))
        for number in range(at // BLOCK, (at + length - 1) // BLOCK + 1):
            if number in self.cache:
                start, end = max(at, number * BLOCK), min(at + length, (number + 1) * BLOCK)
                data[start - at:end - at] = self.cache[number][start - number * BLOCK:
                                                               end - number * BLOCK]
        return data

    def write(self, at, data):
        end = at + len(data)
        for number in range(at // BLOCK, (end - 1) // BLOCK + 1):
            first, last = max(at, number * BLOCK), min(end, (number + 1) * BLOCK)
            whole = last - first == BLOCK
            block = bytearray(data[first - at:last - at]) if whole else self.block(number)
            if not whole:
                block[first - number * BLOCK:last - number * BLOCK] = data[first - at:last - at]
            self.cache[number] = block

    def flush(self, numbers=None):
        for number in sorted(self.cache if numbers is None else numbers):
            os.pwrite(self.fd, self.cache.pop(number), number * BLOCK)

    def lose_power(self):
        rng, kept = self.rng, 0
        share = rng.choice((0, 0.1, 0.5, 0.9, 1))
        for number, block in self.cache.items():
            if rng.random() >= share:
                continue
            kept += 1
            for sector in range(0, BLOCK, SECTOR):
                if rng.random() < 0.95:
                    os.pwrite(self.fd, block[sector:sector + SECTOR], number * BLOCK + sector)
        return f"of {len(self.cache)} blocks in the cache {kept} survived"


def receive(sock, length):
    data = bytearray()
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def negotiate(sock, drive):
    sock.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    receive(sock, 4)
    while True:
        _, option, length = struct.unpack(">QII", receive(sock, 16))
        receive(sock, length)

        def reply(kind, data=b""):
            sock.sendall(struct.pack(">QIII", 0x3e889045565a9, option, kind, len(data)) + data)
        if option == OPT_ABORT:
            reply(REP_ACK)
            raise EOFError
        if option not in (OPT_INFO, OPT_GO):
            reply(REP_UNSUPPORTED)
            continue
        reply(REP_INFO, struct.pack(">HQH", 0, drive.size, TRANSMISSION))
        reply(REP_ACK)
        if option == OPT_GO:
            return


def serve(sock, drive):
    while True:
        _, flags, kind, handle, at, length = struct.unpack(">IHHQQI", receive(sock, 28))
        data = b""
        if kind == DISC:
            drive.flush()
            return
        if kind == WRITE:
            drive.write(at, receive(sock, length))
            if flags & FUA:
                drive.flush(range(at // BLOCK, (at + length - 1) // BLOCK + 1))
        elif kind == READ:
            data = drive.read(at, length)
        elif kind == FLUSH:
            drive.flush()
        sock.sendall(struct.pack(">IIQ", 0x67446698, 0 if kind <= FLUSH else 22, handle) + data)


def main(path, file, seed):
    drive = Drive(file, seed)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        sock = listener.accept()[0]
    try:
        negotiate(sock, drive)
        serve(sock, drive)
        print("flushed")
    except (EOFError, ConnectionError):
        print(drive.lose_power())


if __name__ == "__main__":
    main(*sys.argv[1:])
