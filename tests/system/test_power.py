"""The power fails: tidemarkd in a virtual machine that is killed, with what its drive had not flushed.

The histories are of tidemark_testlib/crash.py, the machine of guest.py; crash.py runs more of them.
"""
import os

import pytest
from tidemark_testlib.crash import History
from tidemark_testlib.guest import GuestPlace, NotHere

SEED = int(os.environ.get("TIDEMARK_SEED", "1"))


@pytest.mark.long
@pytest.mark.parametrize("fs, fmt, lives, again", [("ext4", "qcow2", 2, 0), ("xfs", "raw", 1, 1),
                                                   ("ext4", "device", 1, 0)])
def test_power_lost_at_any_moment(tmp, tidemarkd, fs, fmt, lives, again):
    """So many LIVES, each of whose openings is cut AGAIN so often; a boot is what takes time here."""
    if os.environ.get("TIDEMARK_LOOP") == "threads":
        pytest.skip("the order of what reaches a disk is the same with each loop")
    try:
        place = GuestPlace(tmp, fs, "volatile", SEED, tidemarkd)
    except NotHere as why:
        pytest.skip(str(why))
    print(f"seed {SEED}; more of it: tests/system/crash.py --place {fs}-volatile --format {fmt} "
          "--rounds 5 --verbose")
    history = History(place, SEED, fmt, say=print)
    try:
        history.run(lives, end="power", recovery_kills=again)
    except BaseException:
        print(place.said())
        raise
    finally:
        place.close()
    print(history.found.table("power"))
    assert history.found.lives["power"] == lives and history.found.whole("power", fmt)
