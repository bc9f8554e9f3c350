"""NBD addresses, and connections by libnbd's Python binding."""

import urllib.parse

META_BASE = "base:allocation"


def nbd_uri(socket=None, export="", host="127.0.0.1", port=None):
    """nbd+unix:///EXPORT?socket=PATH, or nbd://HOST:PORT/EXPORT."""
    name = urllib.parse.quote(export, safe="")
    if port is not None:
        return f"nbd://{host}:{port}/{name}"
    return f"nbd+unix:///{name}?socket={urllib.parse.quote(str(socket), safe='/')}"


def connect(uri, contexts=()):
    """A connected handle; CONTEXTS are the metadata contexts to ask for."""
    import nbd
    handle = nbd.NBD()
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle


def extents(handle, context, length=None, offset=0):
    """All (offset, length, flags) of a context, neighbours of the same flags joined."""
    length = handle.get_size() - offset if length is None else length
    found = []
    at, end = offset, offset + length
    while at < end:
        pieces = []

        def take(name, start, entries, err):
            if name == context:
                pieces.extend(zip(entries[0::2], entries[1::2]))
            return 0
        handle.block_status(end - at, at, take)
        if not pieces:
            raise ValueError(f"no extents of {context} at {at}")
        for size, flags in pieces:
            size = min(size, end - at)
            if size and found and found[-1][2] == flags:
                found[-1] = (found[-1][0], found[-1][1] + size, flags)
            elif size:
                found.append((at, size, flags))
            at += size
    return found
