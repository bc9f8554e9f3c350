"""python3 -m parity COMMAND, in tests/system: looks at the table without pytest.

    list              the sequences and their steps
    count             how many sequences and steps
    show NAME         what qemu-storage-daemon answers (--on PROGRAM: another one)
    diff NAME         all differences of tidemarkd, listed ones too
    summary [NAME]    the unlisted differences, alike ones once
"""

import argparse
import json
import re
import sys

from tidemark_testlib import QSD, find_tidemarkd

from . import compare
from .table import all_sequences, count_steps, run_sequence


def show(record):
    for step in record.steps:
        print(f"{step.label}  {json.dumps(step.request)}")
        print(f"    {json.dumps(step.result, sort_keys=True)}")
    for subject, events in record.events.items():
        print(f"events/{subject}")
        for name, data in events:
            print(f"    {name} {json.dumps(data, sort_keys=True)}")


def summary(table, binary):
    """Runs the table and tells each kind of difference once, with where it was seen first."""
    wanted = compare.read_differences()
    kinds = {}
    for seq in table:
        found = compare.compare_records(seq.name, run_sequence(seq, QSD), run_sequence(seq, binary))
        for d in compare.unlisted(found, wanted):
            path = re.sub(r"\[\d+\]|\[\]\.[^.]*", "[]", d.path)
            key = (d.step.partition("#")[0] if "events/" not in d.step else "events", path, d.kind,
                   str(d.theirs)[:60], str(d.ours)[:60])
            kinds.setdefault(key, []).append(d)
    for found in kinds.values():
        text = "\n".join(line[:300] for line in str(found[0]).splitlines())
        print(f"{len(found)} x {text}")
    print(f"{len(kinds)} kinds, {sum(map(len, kinds.values()))} differences in "
          f"{len({d.sequence for f in kinds.values() for d in f})} sequences")


def main():
    parser = argparse.ArgumentParser(prog="parity", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "count", "show", "diff", "summary"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--on", default=None)
    args = parser.parse_args()
    table = all_sequences()
    if args.names:
        table = [s for s in table if any(n in s.name for n in args.names)]
    if args.command == "count":
        print(f"{len(table)} sequences, {sum(map(count_steps, table))} steps")
    if args.command == "summary":
        summary(table, args.on or find_tidemarkd())
        return 0
    for seq in table:
        if args.command == "list":
            print(f"{count_steps(seq):5}  {seq.module}.{seq.name}  {seq.doc.splitlines()[0] if seq.doc else ''}")
        elif args.command == "show":
            print(f"== {seq.module}.{seq.name}: {seq.doc}")
            show(run_sequence(seq, args.on or QSD))
        elif args.command == "diff":
            found = compare.compare_records(seq.name, run_sequence(seq, QSD),
                                            run_sequence(seq, args.on or find_tidemarkd()))
            wanted = compare.read_differences()
            for difference in found:
                listed = any(w.matches(difference) for w in wanted)
                print(("(listed) " if listed else "") + str(difference))
    return 0


sys.exit(main())
