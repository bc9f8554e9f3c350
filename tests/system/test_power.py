"""The power fails: tidemarkd in a virtual machine that is killed, with what its drive had not flushed.

The histories are of tidemark_testlib/crash.py, the machine of guest.py; crash.py runs more of them.
"""
import os

import pytest
from tidemark_testlib.crash import MiB, History
from tidemark_testlib.guest import GuestPlace, NotHere

SEED = int(os.environ.get("TIDEMARK_SEED", "1"))


@pytest.mark.long
@pytest.mark.parametrize("fs, fmt, lives", [("ext4", "raw", 2), ("xfs", "raw", 1),
                                            ("ext4", "device", 1)])
def test_power_lost_at_any_moment(tmp, tidemarkd, fs, fmt, lives):
    if os.environ.get("TIDEMARK_LOOP") == "threads":
        pytest.skip("the order of what reaches a disk is the same with each loop")
    try:
        place = GuestPlace(tmp, fs, "volatile", SEED, tidemarkd)
    except NotHere as why:
        pytest.skip(str(why))
    print(f"repeat it with: tests/system/crash.py --place {fs}-volatile --format {fmt} --seed {SEED} "
          "--verbose")
    history = History(place, SEED, fmt, size=128 * MiB, say=print)
    try:
        history.run(lives)
    except BaseException:
        print(place.said())
        raise
    finally:
        place.close()
    assert history.found.rounds == lives
    print(history.found.table())
