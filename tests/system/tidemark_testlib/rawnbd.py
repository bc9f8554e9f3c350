"""NBD by hand, for what no honest client sends: bytes in, bytes out, nothing checked for you."""

import socket
import struct

OPTS_MAGIC = 0x49484156454F5054
REP_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = (
    1, 2, 3, 5, 6, 7, 8, 9, 10)
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (
    (1 << 31) | n for n in (1, 2, 3, 6, 9))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)


class RawNBD:
    """A connection; greet() and go() take it to the transmission phase."""

    def __init__(self, path=None, address=None, timeout=60.0):
        if path is not None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(timeout)
            self.sock.connect(str(path))
        else:
            self.sock = socket.create_connection(address, timeout)
        self.structured = False

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def send(self, data):
        self.sock.sendall(data)

    def recv(self, n):
        data = b""
        while len(data) < n:
            piece = self.sock.recv(n - len(data))
            if not piece:
                raise EOFError(f"{len(data)} of {n} bytes, then the end")
            data += piece
        return data

    def ended(self):
        """True when the server has hung up (what it still sends is thrown away)."""
        try:
            while self.sock.recv(1 << 16):
                pass
            return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    # -- handshake

    def greet(self, flags=3):
        magic, opts, server_flags = struct.unpack(">8sQH", self.recv(18))
        assert magic == b"NBDMAGIC" and opts == OPTS_MAGIC, (magic, opts)
        self.send(struct.pack(">I", flags))
        return server_flags

    def send_option(self, option, data=b"", length=None, magic=OPTS_MAGIC):
        self.send(struct.pack(">QII", magic, option, len(data) if length is None else length) + data)

    def read_option_reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.recv(20))
        assert magic == REP_MAGIC, hex(magic)
        return option, kind, self.recv(length)

    def option(self, option, data=b""):
        """Sends an option and reads its replies up to the ACK or error: [(kind, data), ...]."""
        self.send_option(option, data)
        replies = []
        while True:
            answered, kind, payload = self.read_option_reply()
            assert answered == option, (answered, option)
            replies.append((kind, payload))
            if kind == REP_ACK or kind >> 31:
                return replies

    def negotiate_structured(self):
        assert self.option(STRUCTURED) == [(REP_ACK, b"")]
        self.structured = True

    @staticmethod
    def name(text):
        data = text if isinstance(text, bytes) else text.encode()
        return struct.pack(">I", len(data)) + data

    def go(self, export, infos=()):
        """(size, flags) of the export."""
        data = self.name(export) + struct.pack(">H", len(infos)) + b"".join(
            struct.pack(">H", i) for i in infos)
        replies = self.option(GO, data)
        assert replies[-1][0] == REP_ACK, replies
        info = next(p for k, p in replies if k == REP_INFO and p[:2] == b"\0\0")
        return struct.unpack(">QH", info[2:])

    def set_meta(self, export, *queries):
        data = self.name(export) + struct.pack(">I", len(queries)) + b"".join(
            self.name(q) for q in queries)
        return self.option(SET_META, data)

    # -- transmission

    def request(self, kind, offset=0, length=0, flags=0, cookie=1, payload=b"",
                magic=REQUEST_MAGIC):
        self.send(struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length) + payload)

    def simple_reply(self, n=0):
        magic, error, cookie = struct.unpack(">IIQ", self.recv(16))
        assert magic == SIMPLE_MAGIC, hex(magic)
        return error, cookie, self.recv(n) if not error else b""

    def chunk(self):
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.recv(20))
        assert magic == CHUNK_MAGIC, hex(magic)
        return flags, kind, cookie, self.recv(length)

    def chunks(self):
        """All chunks of the next reply: [(kind, data), ...]."""
        found = []
        while True:
            flags, kind, _, data = self.chunk()
            found.append((kind, data))
            if flags & 1:
                return found
