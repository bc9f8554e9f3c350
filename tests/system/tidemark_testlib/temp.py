"""Directories short enough for the name of a Unix socket, gone after the test.

TIDEMARK_KEEP=1 keeps them, to look at what a failed test has left behind.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile


@contextlib.contextmanager
def temp_dir(prefix="tm-"):
    base = os.environ.get("TIDEMARK_TMP", "/tmp")
    path = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    try:
        yield path
    finally:
        if not os.environ.get("TIDEMARK_KEEP"):
            shutil.rmtree(path, ignore_errors=True)
