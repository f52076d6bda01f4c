"""Where a prefetcher is found, whatever a server's environment names, and whoever tidies up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sglang_hcache.prefetch.endpoint import endpoint_for, is_running
from tests.prefetch.clients import PATIENCE_S, child, fetched, prefetchers, save, supervisor_of, until

WITHOUT = Path(f"/tmp/sglang-hcache-{os.getuid()}")


def somebody_elses(path: Path) -> Path:
    if os.getuid():
        return Path("/")
    path.mkdir()
    os.chown(path, 1000, 1000)
    return path


@pytest.mark.parametrize("which", ["", "absent", "file", "another's", "relative"])
def test_a_runtime_directory_that_is_none_of_ours_is_not_used(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("relative").mkdir()
    named = {"": "", "relative": "relative", "another's": str(somebody_elses(tmp_path / "another's"))}
    monkeypatch.setenv("XDG_RUNTIME_DIR", named.get(which, str(tmp_path / which)))
    assert endpoint_for([str(tmp_path)]).socket.parent == WITHOUT


def test_the_runtime_directory_may_go_and_a_prefetcher_starts_all_the_same(
    directory: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at logout, for servers that stay: those that run, and those to come."""
    session = runtime.parent / "session"
    session.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    running = supervisor_of(directory)
    client = running.open()
    save(client, range(5))
    assert client.flush(PATIENCE_S)
    shutil.rmtree(session)
    other = supervisor_of(directory).open()
    assert other.prefetcher_pid != client.prefetcher_pid
    client.close()
    again = running.open()
    assert again.prefetcher_pid == other.prefetcher_pid
    assert fetched(again, range(10)) == 5
    for one in (other, again):
        one.close()
    running.close()
    assert until(lambda: not prefetchers(directory))
    assert not endpoint_for([str(directory)]).lock.exists()


def test_a_prefetcher_whose_socket_was_removed_leaves_its_place_to_the_next_one(
    directory: Path, runtime: Path
) -> None:
    """As by a program that removes old files from /tmp, but not the lock."""
    former = child("look_often", directory, 0.05)
    endpoint = endpoint_for([str(directory)])
    assert until(endpoint.socket.exists)
    first = supervisor_of(directory).open()
    assert first.prefetcher_pid == former.pid
    endpoint.socket.unlink()
    second = supervisor_of(directory).open()
    assert second.prefetcher_pid != first.prefetcher_pid
    save(first, range(5))
    assert first.flush(PATIENCE_S)
    assert fetched(second, range(10)) == 5
    first.close()
    assert former.wait(PATIENCE_S) == 0
    assert endpoint.socket.exists()
    assert is_running(endpoint)
    second.close()
    assert until(lambda: not prefetchers(directory))
    assert list(runtime.iterdir()) == []
