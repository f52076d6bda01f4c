"""What a directory notes of those it is used with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_hcache.storage import stripe_manifest
from sglang_hcache.storage.stripe_manifest import NAME, read_siblings
from tests.prefetch.clients import until
from tests.storage.pages import open_store, save, served, states


def test_each_directory_names_the_others(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "link"]
    open_store(*paths).close()
    assert read_siblings(paths[0]) == [tmp_path / "b", tmp_path / "real"]
    assert read_siblings(paths[2]) == paths[:2]
    assert (paths[0] / NAME).stat().st_mode & 0o777 == 0o600
    open_store(paths[0]).close()
    assert read_siblings(paths[0]) == []
    assert read_siblings(paths[1]) == [paths[0], tmp_path / "real"]


def test_a_directory_alone_notes_nothing_and_what_is_noted_stays(tmp_path: Path) -> None:
    open_store(tmp_path / "alone").close()
    assert not (tmp_path / "alone" / NAME).exists()
    paths = tmp_path / "a", tmp_path / "b"
    open_store(*paths).close()
    before = (paths[0] / NAME).stat()
    open_store(*paths).close()
    assert os.path.samestat((paths[0] / NAME).stat(), before)


def test_a_directory_that_comes_back_notes_it(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    store = open_store(tmp_path / "a", tmp_path / "b", retry_s=0.0)
    assert [state == "ok" for state in states(store)] == [True, False]
    assert read_siblings(tmp_path / "a") == [tmp_path / "b"]
    (tmp_path / "b").unlink()
    assert until(lambda: states(store) == ["ok", "ok"])
    store.close()
    assert read_siblings(tmp_path / "b") == [tmp_path / "a"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"siblings": 1}', b'{"siblings": [1]}', b"\xff"])
def test_a_damaged_file_says_nothing_and_is_replaced(content: bytes, tmp_path: Path) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    open_store(*paths).close()
    (paths[0] / NAME).write_bytes(content)
    assert read_siblings(paths[0]) == []
    open_store(*paths).close()
    assert read_siblings(paths[0]) == [paths[1]]


def test_a_file_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(stripe_manifest, "write_atomically", full)
    store = open_store(tmp_path / "a", tmp_path / "b")
    save(store, range(4))
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(4)) == list(range(4))
    assert states(store) == ["ok", "ok"]
    store.close()
