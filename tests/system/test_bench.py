"""The comparison with qemu-storage-daemon that README tells people to run: it runs, and measures all."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from tidemark_testlib import QSD

COMPARE = pathlib.Path(__file__).parents[2] / "bench" / "compare.py"
SERIES = ["4k random read", "4k random write", "1M sequential read", "1M sequential write",
          "full backup", "1 % incremental", "full mirror", "4k random write during a backup"]

pytestmark = pytest.mark.skipif(not (shutil.which(QSD) and shutil.which("fio")),
                                reason="qemu-storage-daemon or fio not installed")


def test_compare_measures_all_its_series(tidemarkd):
    done = subprocess.run(
        [sys.executable, "-B", COMPARE, "--rounds", "1", "--seconds", "0.5", "--size", "64", "--json"],
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
