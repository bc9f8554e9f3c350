"""The benchmarks, of which README tells people to run one: they run, and measure all that they say."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from tidemark_testlib import QSD

BENCH = pathlib.Path(__file__).parents[2] / "bench"
SERIES = ["4k random read", "4k random write", "1M sequential read", "1M sequential write",
          "full backup", "1 % incremental", "full mirror", "4k random write during a backup"]

pytestmark = pytest.mark.skipif(not (shutil.which(QSD) and shutil.which("fio")),
                                reason="qemu-storage-daemon or fio not installed")


def test_compare_measures_all_its_series(tidemarkd):
    done = subprocess.run(
        [sys.executable, "-B", BENCH / "compare.py", "--rounds", "1", "--seconds", "0.5", "--size", "64", "--json"],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *table, numbers = done.stdout.splitlines()
    values = json.loads(numbers)
    assert sorted(values) == sorted(f"{name}, {side}" for name in SERIES
                                    for side in ("tidemarkd", "qemu"))
    assert all(len(v) == 1 and v[0] > 0 for v in values.values()), values
    assert len(table) == 1 + len(SERIES)
    for name, line in zip(SERIES, table[1:]):   # and its ratio at the end
        assert line.startswith(name)
        ours, theirs = values[f"{name}, tidemarkd"][0], values[f"{name}, qemu"][0]
        assert float(line.split()[-1]) == pytest.approx(ours / theirs, abs=0.006)


def test_bitmaps_measures_each_side(tidemarkd):
    sides = ["none", "eight", "eight process", "qemu none", "qemu eight"]
    done = subprocess.run(
        [BENCH / "bitmaps.py", "--rounds", "1", "--seconds", "0.3", "--size", "4", "--warm", "16",
         "--sides", ",".join(sides), "--only", "4k,depth 32", "--json"],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    rows = ["4k random, depth 32, fresh", "4k random, depth 32, warmed"]
    assert sorted(values) == sorted(f"{row}, {side}" for row in rows for side in sides)
    for name, [[seconds, writes, counters]] in values.items():
        assert seconds > 0 and writes > 0, name
        if name == f"{rows[0]}, eight":     # its regions had to become hot first
            assert counters["commits"] > 0 and counters["entered"] > 0, values
        elif name.endswith("none"):
            assert not any(counters.values()), values
