"""Time on a machine that may stall for some seconds at any moment: what must come may take long, and
what must be quick is tried more than once."""

import time


def wait_until(what, timeout=60.0, pace=0.02):
    """Waits until WHAT() is true, and gives what it was."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        time.sleep(pace)
    return found


def quickest(work, tries=5):
    """The seconds that WORK() takes, the shortest of some tries."""
    def once():
        began = time.monotonic()
        work()
        return time.monotonic() - began
    return min(once() for _ in range(tries))
