"""Each sequence of the table is one test: tidemarkd beside qemu-storage-daemon.

TIDEMARK_PARITY=qsd takes qemu-storage-daemon for both sides: what then differs is chance, and a
fault of the table.
"""

import os
import shutil

import pytest
from tidemark_testlib import QSD, NotAllowed, find_tidemarkd, may_be_skipped

from . import compare
from .table import all_sequences, run_sequence

SELF = os.environ.get("TIDEMARK_PARITY") == "qsd"

# One process for all of them: test_each_listed_difference_occurs looks back at the others.
pytestmark = [pytest.mark.skipif(not shutil.which(QSD), reason="qemu-storage-daemon not installed"),
              pytest.mark.xdist_group("parity")]


@pytest.fixture(scope="session")
def wanted():
    return [] if SELF else compare.read_differences()


@pytest.fixture(scope="session")
def subject():
    if SELF:
        return QSD
    path = find_tidemarkd()
    if not os.access(path, os.X_OK):
        pytest.fail(f"{path} is not there: build it, or say TIDEMARK=/path/to/tidemarkd")
    return path


@pytest.mark.parametrize("seq", all_sequences(), ids=lambda s: s.name)
def test_sequence(seq, subject, wanted, request):
    for _ in range(3):      # it has races of its own; a fault that stays is the table's
        try:
            theirs = run_sequence(seq, QSD)
        except NotAllowed as error:
            (pytest.skip if may_be_skipped(error.what) else pytest.fail)(str(error))
        broken = compare.reference_faults(theirs)
        if not broken:
            break
    if broken:
        pytest.fail(f"{seq.name}: qemu-storage-daemon itself fails, take the step out: {broken}",
                    pytrace=False)
    ours = run_sequence(seq, subject)
    found = compare.compare_records(seq.name, theirs, ours)
    left = compare.unlisted(found, wanted)
    request.config.parity_seen = getattr(request.config, "parity_seen", set()) | {seq.name}
    request.config.parity_wanted = wanted
    if left:
        text = "\n".join(str(d) for d in left)
        pytest.fail(f"{seq.module}.{seq.name}: {seq.doc.splitlines()[0] if seq.doc else ''}\n"
                    f"{len(left)} unlisted difference{'s' * (len(left) > 1)}\n{text}", pytrace=False)


def test_each_listed_difference_occurs(wanted, request):
    """Last: a line of `differences` that nothing needs would hide what comes later."""
    seen = getattr(request.config, "parity_seen", set())
    left = compare.unused(wanted, seen, {s.name for s in all_sequences()})
    if left is None:
        pytest.skip("only a run of all sequences can tell")
    if left:
        pytest.fail("no longer occur:\n" + "\n".join(f"parity/differences:{w.number}: {w.line}"
                                                     for w in left), pytrace=False)
