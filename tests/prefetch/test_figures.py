"""Figures of the prefetcher, as its clients report them."""

from __future__ import annotations

import os
import signal
import time

from sglang_hcache.prefetch.client import ASK_S
from tests.prefetch.clients import save
from tests.prefetch.conftest import Join


def test_a_prefetcher_that_hangs_costs_little_and_is_as_it_was(join: Join) -> None:
    client = join()
    save(client, range(5))
    assert client.flush(30)
    before = client.stats()
    assert before["prefetcher"] == "ok"
    assert before["pages_written"] == 5
    os.kill(client.prefetcher_pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        hung = client.stats()
        assert ASK_S <= time.monotonic() - began < ASK_S + 1.0
    finally:
        os.kill(client.prefetcher_pid, signal.SIGCONT)
    assert str(hung["prefetcher"]).startswith("gone: ")
    assert hung["pages_written"] == 5
    save(client, range(5, 8))
    assert client.flush(30)
    after = client.stats()
    assert after["prefetcher"] == "ok"
    assert after["pages_written"] == 8
