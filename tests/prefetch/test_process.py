from __future__ import annotations

import resource
import sys

import psutil

from sglang_hcache.prefetch.process import settle
from tests.prefetch.conftest import Join


def test_a_prefetcher_may_open_as_many_files_as_the_system_lets_it(join: Join) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # as most systems have it
    try:
        client = join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert psutil.Process(client.prefetcher_pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)


def test_its_loop_waits_shortly_for_threads_that_compute() -> None:
    interval, limits = sys.getswitchinterval(), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        settle()
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(interval)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
