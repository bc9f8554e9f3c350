"""Clients that write over NBD from processes of their own, and a model of what the disk holds.

    disk = Model(256 << 20)
    load = Load(uri, disk, clients=4)
    with load.paused() as p:        # no write is in flight, the model is exact
        before = disk.copy()
        qmp.execute(...)
    ...
    unsure = load.end()             # writes whose answer never came: done, or not, or in part

Each client owns every CLIENTS'th stripe of the disk, so no two writes overlap in flight. The model
never comes from the daemon: it is filled by the clients, after the daemon has answered.
"""

import contextlib
import hashlib
import mmap
import multiprocessing
import random
import signal
import time

from .child import Child

STRIPE = 1 << 20
BLOCK = 512


class Model:
    """What the disk must hold; shared with the clients' processes."""

    def __init__(self, size):
        self.size = size
        self._bytes = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS |
                                mmap.MAP_POPULATE)

    def write(self, offset, data):
        self._bytes[offset:offset + len(data)] = data

    def read(self, offset, length):
        return self._bytes[offset:offset + length]

    def copy(self):
        return bytes(self._bytes)

    def sha256(self):
        return hashlib.sha256(self._bytes).hexdigest()


class Load:
    """CLIENTS processes writing until end(), each PER_SECOND requests of up to MOST bytes."""

    def __init__(self, uri, model, clients=4, per_second=100, most=65536, seed=1):
        self._model = model
        self._stop = multiprocessing.Event()
        self._gates = [multiprocessing.Lock() for _ in range(clients)]
        self._unsure = multiprocessing.SimpleQueue()
        self._done = [multiprocessing.Value("q", 0, lock=False) for _ in range(clients)]
        self._clients = [
            Child(self._client, (uri, n, clients, 1 / per_second, most, seed))
            for n in range(clients)]
        for client in self._clients:
            client.start()

    @property
    def written(self):
        """How many requests have been answered."""
        return sum(n.value for n in self._done)

    def wait_written(self, more, timeout=60.0):
        """Waits for so many more answered requests."""
        want, deadline = self.written + more, time.monotonic() + timeout
        while self.written < want:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the clients wrote {self.written - want + more} of {more}")
            time.sleep(0.01)

    @contextlib.contextmanager
    def paused(self):
        """Between two requests of each client; gives an object whose .seconds it lasted."""
        class Pause:
            seconds = 0.0
        pause = Pause()
        for gate in self._gates:
            if not gate.acquire(timeout=60):
                raise TimeoutError("a client waits for its answer for a minute")
        began = time.monotonic()
        try:
            yield pause
        finally:
            pause.seconds = time.monotonic() - began
            for gate in self._gates:
                gate.release()

    def end(self):
        """Ends the clients (they may have lost their server): the writes that nobody answered,
        as (offset, length)."""
        self._stop.set()
        for client in self._clients:
            client.join(60)
            if client.exitcode != 0:
                raise RuntimeError(f"a client ended with {client.exitcode}")
        unsure = []
        while not self._unsure.empty():
            unsure.append(self._unsure.get())
        return unsure

    def _client(self, uri, number, clients, pace, most, seed):
        import nbd
        from .nbd import connect

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        rng = random.Random(f"{seed}-{number}")
        handle = connect(uri)
        stripes = range(number, self._model.size // STRIPE, clients)
        while not self._stop.is_set():
            # Half of the writes go to a tenth of the disk, as they do on real ones.
            stripe = rng.choice(stripes[:max(1, len(stripes) // 10)] if rng.random() < 0.5
                                else stripes)
            length = BLOCK * rng.randint(1, most // BLOCK)
            offset = stripe * STRIPE + BLOCK * rng.randint(0, (STRIPE - length) // BLOCK)
            zeroes = rng.random() < 0.1
            data = bytes(length) if zeroes else rng.randbytes(length)
            with self._gates[number]:
                try:
                    if zeroes:
                        handle.zero(length, offset)
                    else:
                        handle.pwrite(data, offset)
                except nbd.Error:
                    self._unsure.put((offset, length))
                    return
                self._model.write(offset, data)
            self._done[number].value += 1
            time.sleep(pace)
