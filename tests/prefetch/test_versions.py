"""Servers and prefetchers of different versions, as while a node is updated."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.connection import Unavailable
from tests.prefetch.clients import child, line_of, supervisor_of


def test_a_prefetcher_of_another_version_is_named_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = child("join", directory, 0)
    line_of(server)
    monkeypatch.setattr(m, "VERSION", m.VERSION + 1)
    monkeypatch.setattr(m, "PREFIX", b"HC" + bytes((m.VERSION, 0)))
    newer = supervisor_of(directory)
    with caplog.at_level(logging.INFO), pytest.raises(Unavailable) as refused:
        newer.open(1.0)
    newer.close()
    os.close(newer.news)
    said = f"another protocol (version {m.VERSION - 1}, this is version {m.VERSION}): update both sides"
    assert said in str(refused.value)
    assert said in caplog.messages[0], "while it is still tried again"
    server.communicate("\n", timeout=5)
