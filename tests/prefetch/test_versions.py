"""Servers and prefetchers of different versions, as while a node is updated."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.connection import Unavailable
from sglang_hcache.prefetch.endpoint import endpoint_for
from tests.prefetch.clients import (
    PATIENCE_S,
    child,
    client_of,
    fetched,
    figures,
    hello,
    line_of,
    save,
    supervisor_of,
    until,
)
from tests.prefetch.conftest import Join
from tests.storage.pages import OTHER_FINGERPRINT


def test_a_prefetcher_of_another_version_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one on another host is found at all."""
    server = child("join", directory, 0)
    line_of(server)
    address = endpoint_for([str(directory)]).address
    monkeypatch.setattr(m, "VERSION", m.VERSION + 1)
    monkeypatch.setattr(m, "PREFIX", b"HC" + bytes((m.VERSION, 0)))
    said = rf"another protocol \(version {m.VERSION - 1}, this is version {m.VERSION}\): update both sides"
    with pytest.raises(Unavailable, match=said):
        client_of(address, hello())
    server.communicate("\n", timeout=PATIENCE_S)


def test_servers_of_two_versions_have_a_prefetcher_each_and_share_the_files(
    directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = join()
    save(before, range(20))
    assert before.flush(PATIENCE_S)
    newer = child("be_the_next_versions", directory)
    with monkeypatch.context() as patch:
        patch.setattr(m, "VERSION", m.VERSION + 1)  # all that is different is where it is found
        assert until(endpoint_for([str(directory)]).socket.exists)
        after = supervisor_of(directory).open()
        other = supervisor_of(directory, fingerprint=OTHER_FINGERPRINT).open()
        assert after.prefetcher_pid == newer.pid != before.prefetcher_pid
        assert fetched(after, range(30)) == 20, "what the former has written"
        save(after, range(20, 40))
        save(other, range(10))
        assert after.flush(PATIENCE_S)
        assert other.flush(PATIENCE_S)
        save(before, range(100, 110))
        assert before.flush(PATIENCE_S)
        assert fetched(after, range(100, 120)) == 10
        assert fetched(other, range(20)) == 10
        assert figures(after)["pages_damaged"] == figures(after)["files_damaged"] == 0
        for client in (after, other):
            client.close()
        assert newer.wait(PATIENCE_S) == 0
    assert fetched(before, range(20)) == fetched(before, range(20, 60)) == 20
    assert figures(before)["pages_damaged"] == figures(before)["files_damaged"] == 0
