#!/usr/bin/python3
"""Histories of crashes, by number: what scripts/soak runs, and what a failure is repeated with.

    tests/system/crash.py --seed 257              # one history of eight lives
    tests/system/crash.py --rounds 200            # histories until there were so many crashes
    tests/system/crash.py --place xfs-volatile --rounds 50    # losses of power, in a machine
    tests/system/crash.py --format device         # raw on a block device
"""

import argparse
import pathlib
import sys
import time
import traceback

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from tidemark_testlib import NotAllowed, find_tidemarkd, temp_dir  # noqa: E402
from tidemark_testlib.crash import MiB, Found, History, HostPlace  # noqa: E402
from tidemark_testlib.guest import DRIVES, GuestPlace  # noqa: E402

PLACES = ("host", *(f"{fs}-{drive}" for fs in ("ext4", "xfs") for drive in DRIVES))
LIVES = {"host": 8, "guest": 5}


def command(args, seed):
    return (f"TIDEMARK={find_tidemarkd()} tests/system/crash.py --place {args.place} "
            f"--format {args.format} --seed {seed}{' --foreign 1' if args.foreign else ''}")


def one(args, seed, found):
    """One history; True if nothing was wrong."""
    host = args.place == "host"
    with temp_dir("tm-crash-") as tmp:
        place = HostPlace(tmp) if host else GuestPlace(tmp, *args.place.split("-"), seed)
        try:
            history = History(place, seed, args.format, size=(256 if host else 128) * MiB, found=found,
                              foreign=0.3 if args.foreign and host else 0,
                              say=lambda text: print("   ", text, flush=True) if args.verbose else None)
            history.run(LIVES["host" if host else "guest"])
            return True
        except NotAllowed:
            raise
        except Exception:  # also what a broken daemon makes of the client
            print(traceback.format_exc() + place.said() + f"\nrepeat it with: {command(args, seed)}",
                  flush=True)
            return False
        finally:
            place.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--place", default="host", choices=PLACES)
    parser.add_argument("--format", default="raw", choices=("raw", "qcow2", "device"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="go on with the next seeds until then")
    parser.add_argument("--recovery-kills", type=int, default=0, help="at least so many")
    parser.add_argument("--foreign", type=int, default=0,
                        help="at least so many crashes after which QEMU opens the disk for writing")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    if args.foreign and args.format == "device":
        parser.error("nothing tells who has written a device after a crash")
    found, seed, failures, began = Found(), args.seed, 0, time.monotonic()
    while failures < 3 and (found.rounds < args.rounds or
                            found.recovery_kills < args.recovery_kills or
                            found.foreign < args.foreign):
        try:
            failures += not one(args, seed, found)
        except NotAllowed as why:
            print(f"{args.place}, {args.format}: skipped: {why}")
            return 0
        seed += 1
    print(f"{args.place}, {args.format}, {time.monotonic() - began:.0f} s: {failures} failures\n"
          f"{found.table()}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
