"""Figures of the prefetcher, as its clients report them."""

from __future__ import annotations

import os
import signal

import pytest

from sglang_hcache import __version__
from sglang_hcache.prefetch import client as client_module
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.client import ASK_S
from tests.prefetch.clients import PATIENCE_S, save
from tests.prefetch.conftest import Join


def test_a_prefetcher_that_hangs_costs_little_and_is_as_it_was(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    client = join()
    save(client, range(5))
    assert client.flush(PATIENCE_S)
    before = client.stats()
    assert before["prefetcher"] == "ok"
    assert before["pages_written"] == 5
    assert before["prefetcher_version"] == __version__
    waits: list[float] = []
    ask = client.connection.ask

    def asked(message: m.Stats, kind: type[m.Figures], timeout_s: float) -> m.Figures:
        waits.append(timeout_s)
        return ask(message, kind, timeout_s)

    os.kill(client.prefetcher_pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(client_module, "ASK_S", ASK_S)
            patch.setattr(client.connection, "ask", asked)
            hung = client.stats()
    finally:
        os.kill(client.prefetcher_pid, signal.SIGCONT)
    assert waits == [ASK_S]
    assert client.alive
    assert str(hung["prefetcher"]).startswith("gone: ")
    assert hung["pages_written"] == 5
    save(client, range(5, 8))
    assert client.flush(PATIENCE_S)
    after = client.stats()
    assert after["prefetcher"] == "ok"
    assert after["pages_written"] == 8
    assert 0 < float(str(before["prefetcher_uptime_s"])) < float(str(after["prefetcher_uptime_s"])) < 600
