"""Processes of a test's own, forked: they share its anonymous memory."""

import multiprocessing
import os
import traceback


class Child(multiprocessing.Process):
    """Runs TARGET(*ARGS) and ends with 0, or with 1 and what went wrong; goes with the test.

    It ends itself. pytest-xdist may run the tests in a thread that Python did not start, and in a
    fork of such a thread Python's own way out fails an assertion and ends with 1 (_DummyThread in
    threading._shutdown, up to Python 3.12)."""

    def __init__(self, target, args):
        super().__init__(target=target, args=args, daemon=True)

    def run(self):
        code = 1
        try:
            super().run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
