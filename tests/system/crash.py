#!/usr/bin/python3
"""Histories of crashes, by number: what scripts/soak runs, and what a failure is repeated with.

    tests/system/crash.py --seed 257              # one history of eight lives
    tests/system/crash.py --rounds 200            # histories until there were so many kills
    tests/system/crash.py --place xfs-volatile --rounds 50    # losses of power, in a machine
    tests/system/crash.py --format device         # raw on a block device
    tests/system/crash.py --level process         # exact after a kill, not believed without the segments
    tests/system/crash.py --foreign 20            # until dd has changed (QEMU opened) the image so often

A round is a life that ended as the place is about: on a host by SIGKILL, in a machine by a loss of power.
The table has them first, with how often each check was made; clean ends, kills that took the run segments
with them, and those after which others wrote happen besides, and have their lines below.
"""

import argparse
import pathlib
import sys
import time
import traceback

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from tidemark_testlib import NotAllowed, find_tidemarkd, temp_dir  # noqa: E402
from tidemark_testlib.crash import BY_DD, BY_QEMU, Found, History, HostPlace  # noqa: E402
from tidemark_testlib.guest import DRIVES, GuestPlace  # noqa: E402

PLACES = ("host", *(f"{fs}-{drive}" for fs in ("ext4", "xfs") for drive in DRIVES))
LIVES = {"host": 8, "guest": 5}


def command(args, seed):
    return (f"TIDEMARK={find_tidemarkd()} tests/system/crash.py --place {args.place} "
            f"--format {args.format} --level {args.level} --seed {seed}"
            f"{'' if args.foreign is None else ' --foreign 0'}")


def one(args, seed, found, enough):
    """One history; True if nothing was wrong."""
    host = args.place == "host"
    with temp_dir("tm-crash-") as tmp:
        place = HostPlace(tmp) if host else GuestPlace(tmp, *args.place.split("-"), seed)
        try:
            history = History(place, seed, args.format, found=found,
                              foreign=0 if args.foreign is None else 0.6, level=args.level,
                              say=lambda text: print("   ", text, flush=True) if args.verbose else None)
            history.run(LIVES["host" if host else "guest"], enough)
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
    parser.add_argument("--level", default="power", choices=("power", "process"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0,
                        help="go on until then, with the next seeds after this one")
    parser.add_argument("--recovery-kills", type=int, default=0, help="at least so many")
    parser.add_argument("--foreign", type=int,
                        help="at least so many kills after which dd changes a raw disk, or QEMU opens a "
                             "qcow2 disk for writing; 0: as many as there are in a history")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    host = args.place == "host"
    if args.foreign is not None and (args.format == "device" or not host):
        parser.error("nothing tells who has written a device after a crash, or who a machine's files")
    if args.level == "process" and not host:
        parser.error("level process promises nothing after a loss of power")
    about = "killed" if host else "power"
    found, seed, failures, began = Found(), args.seed, 0, time.monotonic()
    foreign = args.foreign or 0
    wanted = args.rounds or args.recovery_kills or foreign

    def enough():
        return wanted and (found.lives[about] >= args.rounds and
                           found.recovery_kills >= args.recovery_kills and
                           found.foreign[BY_DD if args.format == "raw" else BY_QEMU] >= foreign)
    while failures < 3:
        try:
            failures += not one(args, seed, found, enough)
        except NotAllowed as why:
            print(f"{args.place}, {args.format}: skipped: {why}")
            return 0
        seed += 1
        if not wanted or enough():
            break
    print(f"{args.place}, {args.format}, level {args.level}, {time.monotonic() - began:.0f} s: "
          f"{failures} failures\n{found.table(about)}")
    if not failures and not found.whole(about, args.format):
        print("a round was not looked at in all ways")
        return 1
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
