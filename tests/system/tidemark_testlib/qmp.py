"""A small QMP client: a stream of JSON values in both directions.

Answers are matched by `id`, so a test may send several commands before it reads. Events are kept,
in their order, until a test asks for them. Every wait has an end: a daemon that says nothing for
TIMEOUT seconds makes the test fail, not hang.
"""

import json
import select
import socket
import time

TIMEOUT = 30.0


class QMPError(Exception):
    """The daemon answered with an error."""

    def __init__(self, command, error):
        super().__init__(f"{command}: {error.get('class')}: {error.get('desc')}")
        self.command = command
        self.error = error
        self.cls = error.get("class")
        self.desc = error.get("desc", "")


class Timeout(Exception):
    """What was waited for did not come."""


class QMP:
    """One connection to a monitor. `negotiate=False` stays in negotiation mode."""

    def __init__(self, path=None, sock=None, negotiate=True, oob=False, timeout=TIMEOUT):
        if sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(str(path))
        self.sock = sock
        self.timeout = timeout
        self.events = []    # not yet asked for, oldest first
        self.history = []   # every event ever seen
        self._answers = []
        self._text = ""
        self._next_id = 0
        self.eof = False
        self.greeting = None
        if negotiate:
            try:
                self.negotiate(oob)
            except BaseException:
                self.close()
                raise

    def negotiate(self, oob=False):
        """The first answer counts, whatever its id: a command that was not understood has none."""
        self.read_greeting()
        self.send("qmp_capabilities", {"enable": ["oob"]} if oob else None)
        answer = self.next_answer()
        if "error" in answer:
            raise QMPError("qmp_capabilities", answer["error"])

    def read_greeting(self):
        self.greeting = self._wait(
            lambda: next((self._answers.pop(i) for i, m in enumerate(self._answers) if "QMP" in m),
                         None), "the greeting")
        return self.greeting

    # -- sending

    def send_text(self, text):
        """Sends TEXT (str or bytes) exactly as it is."""
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def send(self, command, arguments=None, oob=False):
        """Sends a command without waiting; returns the id to give to answer()."""
        self._next_id += 1
        ident = f"c{self._next_id}"
        message = {"exec-oob" if oob else "execute": command, "id": ident}
        if arguments is not None:
            message["arguments"] = arguments
        self.send_text(json.dumps(message))
        return ident

    def answer(self, ident, timeout=None):
        """The whole answer (a dict with `return` or `error`) to the command with this id."""
        def find():
            for i, message in enumerate(self._answers):
                if message.get("id") == ident:
                    return self._answers.pop(i)
            return None
        return self._wait(find, f"the answer to {ident}", timeout)

    def poll_answer(self, ident):
        """The answer to the command with this id if it has been read, else None."""
        return next((message for message in self._answers if message.get("id") == ident), None)

    def next_answer(self, timeout=None):
        """The oldest answer not yet taken, whatever its id."""
        return self._wait(lambda: self._answers.pop(0) if self._answers else None, "an answer",
                          timeout)

    def call(self, command, arguments=None, timeout=None, oob=False):
        """Sends a command, returns its whole answer, error or not."""
        return self.answer(self.send(command, arguments, oob), timeout)

    def execute(self, command, timeout=None, **arguments):
        """Runs a command: its `return`, or QMPError. job_id=... is sent as "job-id"."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        answer = self.call(command, named or None, timeout)
        if "error" in answer:
            raise QMPError(command, answer["error"])
        return answer["return"]

    def transaction(self, *actions, **properties):
        """transaction(("blockdev-backup", {...}), ...)."""
        arguments = {"actions": [{"type": kind, "data": data} for kind, data in actions]}
        if properties:
            arguments["properties"] = {k.replace("_", "-"): v for k, v in properties.items()}
        return self.execute("transaction", **arguments)

    # -- events

    def wait_event(self, name, timeout=None, **data):
        """Takes the oldest event NAME whose data has these members, waiting for it."""
        want = {key.replace("_", "-"): value for key, value in data.items()}

        def find():
            for i, event in enumerate(self.events):
                have = event.get("data", {})
                if event["event"] == name and all(k in have and have[k] == v
                                                  for k, v in want.items()):
                    return self.events.pop(i)
            return None
        return self._wait(find, f"event {name} {want or ''}", timeout)

    def wait_job(self, job, status="concluded", timeout=None):
        """Waits until a JOB_STATUS_CHANGE has said that JOB has this status."""
        return self.wait_event("JOB_STATUS_CHANGE", timeout, id=job, status=status)

    def run_job(self, command, job, timeout=None, **arguments):
        """Starts a block job and waits until it has concluded; the BLOCK_JOB_COMPLETED's data.

        The job dismisses itself unless auto_dismiss=False is among the arguments."""
        self.execute(command, job_id=job, **arguments)
        data = self.wait_event("BLOCK_JOB_COMPLETED", timeout, device=job)["data"]
        self.wait_job(job, "null" if arguments.get("auto_dismiss", True) else "concluded", timeout)
        return data

    def job(self, job):
        """What query-jobs says of JOB, None if it is not there."""
        return next((j for j in self.execute("query-jobs") if j["id"] == job), None)

    def bitmaps(self, node):
        """The dirty bitmaps of NODE by name, as query-named-block-nodes shows them."""
        for info in self.execute("query-named-block-nodes", flat=True):
            if info.get("node-name") == node:
                return {b.get("name"): b for b in info.get("dirty-bitmaps", [])}
        raise KeyError(node)

    # -- receiving

    def pump(self, seconds=0.0):
        """Reads what has arrived, for at most so long. False at the end of the stream."""
        deadline = time.monotonic() + seconds
        while not self.eof:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.sock], [], [], left)[0]:
                return True
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                self.eof = True
            elif self._take(data.decode()):
                return True
        return False

    def _take(self, text):
        """Cuts the text into messages. A value is complete at the latest at a newline."""
        self._text += text
        got = False
        decoder = json.JSONDecoder()
        while True:
            self._text = self._text.lstrip()
            if not self._text:
                return got
            try:
                message, end = decoder.raw_decode(self._text)
            except json.JSONDecodeError:
                return got
            self._text = self._text[end:]
            got = True
            if "event" in message:
                self.events.append(message)
                self.history.append(message)
            else:
                self._answers.append(message)

    def _wait(self, find, what, timeout=None):
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while True:
            found = find()
            if found is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout(f"no {what} within {timeout:g} s; events waiting: "
                              f"{[self._brief(e) for e in self.events]}")
            if not self.pump(left):
                found = find()
                if found is not None:
                    return found
                raise EOFError(f"the monitor closed before {what}")

    @staticmethod
    def _brief(event):
        return (event["event"] + " " +
                json.dumps(event.get("data", {}), sort_keys=True))

    def close(self):
        self.sock.close()
        self.eof = True
