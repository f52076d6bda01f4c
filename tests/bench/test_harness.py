"""Servers are asked in an order that favours none, and stopped whatever ends a bench."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from bench.harness import Server, in_turn

BENCH = """
import sys
import time
from pathlib import Path
from bench.harness import Server

class Sleeper(Server):
    def command(self):
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    def _wait_until_it_answers(self, began):
        print("started", flush=True)
        time.sleep(60)

with Sleeper(Path("model"), log=Path(sys.argv[1])):
    pass
"""


def test_a_bench_that_is_terminated_leaves_no_server_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BENCH, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "started\n"
        servers = psutil.Process(bench.pid).children()
        bench.terminate()
    assert servers
    assert psutil.wait_procs(servers, timeout=30)[1] == []


def test_leaks_of_memory_pools_are_told_from_what_python_says_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = Server(Path("model"), log=log)
    assert server.reported_leaks() == []
    told = ["pool memory leak detected! available_size=1", "AssertionError: Full Pool Mem Leak Detected! x"]
    log.write_text(
        f"{told[0]}\nPrefill batch\n{told[1]}\n"
        "resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects\n"
    )
    assert server.reported_leaks() == told


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "abcdef"])
def test_each_comes_first_once_and_after_each_other_as_often(names: str) -> None:
    rounds = [in_turn(names, turn) for turn in range(len(names))]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(names)
    if len(names) % 2 == 0:
        follows = Counter(pair for order in rounds for pair in pairwise(order))
        assert follows == {(one, other): 1 for one in names for other in names if one != other}
