from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.prefetch import client, connection, remote
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from tests.prefetch.clients import PATIENCE_S, children, prefetchers, supervisor_of, until

Join = Callable[..., PrefetchClient]


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, to a goodbye as well, are waited for, however long a prefetcher takes for them."""
    monkeypatch.setattr(client, "ASK_S", PATIENCE_S)
    monkeypatch.setattr(remote, "LOCATE_S", PATIENCE_S)
    monkeypatch.setattr(connection, "FAREWELL_S", PATIENCE_S)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests about these limits set them themselves."""
    be_patient(monkeypatch)


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for sockets of the test's own; short, as a socket's path may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="hc-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder) / "sglang-hcache"


@pytest.fixture
def directory(tmp_path: Path, runtime: Path) -> Iterator[Path]:
    """A store's directory; no prefetcher may be left behind by whoever has closed all sessions."""
    path = tmp_path / "volume"
    yield path
    for process in children:
        process.kill()
        process.wait()
    children.clear()
    gone = until(lambda: not prefetchers(path))
    for left in prefetchers(path):
        left.kill()
    time.sleep(0 if gone else 0.1)
    assert gone, "a prefetcher was left behind"


@pytest.fixture
def join(directory: Path) -> Iterator[Join]:
    """Opens sessions with the directory's prefetcher; all are closed at the end."""
    opened: list[tuple[LocalSupervisor, PrefetchClient]] = []

    def open_one(**changes: Any) -> PrefetchClient:
        supervisor = supervisor_of(directory, **changes)
        session = supervisor.open(PATIENCE_S)
        opened.append((supervisor, session))
        return session

    yield open_one
    for supervisor, session in opened:
        session.close()
        supervisor.close()
        os.close(supervisor.news)
