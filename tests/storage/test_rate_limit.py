"""A bound on reading holds for all readers together, and takes nothing when nothing is read."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from sglang_hcache.storage import store as store_module
from sglang_hcache.storage.fetch import Fetches
from sglang_hcache.storage.rate_limit import RateLimit
from tests.storage.pages import LAYOUT, counters, keys_of, open_store, save, served


def test_many_threads_share_the_limit() -> None:
    limit, began = RateLimit(1_000_000), time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(limit.take, [5_000] * 60))
    assert 0.3 <= time.monotonic() - began < 3


def test_idle_time_is_not_saved_up() -> None:
    limit = RateLimit(1_000_000)
    time.sleep(0.3)
    began = time.monotonic()
    limit.take(100_000)
    assert time.monotonic() - began >= 0.1


def test_a_limit_too_high_to_matter_lets_everybody_through() -> None:
    limit = RateLimit(1e15)
    for _ in range(10_000):
        limit.take(1)


def test_a_store_reads_no_faster(tmp_path: Path) -> None:
    store = open_store(tmp_path, read_limit=RateLimit(100 * LAYOUT.record_bytes))
    save(store, range(30))
    assert store.flush(30)
    assert served(store, range(30)) == list(range(30)), "memory is not limited"
    store.drop_host()
    began = time.monotonic()
    assert served(store, range(30)) == list(range(30))
    assert time.monotonic() - began >= 0.29
    store.close()


def test_what_is_left_out_in_the_meantime_takes_none_of_it(tmp_path: Path) -> None:
    """One reader at most has chosen its page: others choose when it is their turn."""
    store = open_store(tmp_path, read_limit=RateLimit(10 * LAYOUT.record_bytes))
    save(store, range(20))
    assert store.flush(30)
    store.drop_host()
    began = time.monotonic()
    store.prefetch("not needed any more", keys_of(range(10)))
    time.sleep(0.01)
    store.prefetch("needed", keys_of(range(10, 15)))
    store.release("not needed any more")
    assert len(store.wait("needed", 10).slots) == 5
    assert 0.5 <= time.monotonic() - began < 0.5 + 0.1 + 0.3, "its own, at most one of the others, and noise"
    store.close()


@pytest.mark.parametrize(("owner", "name"), [(RateLimit, "take"), (Fetches, "take_read"), (Fetches, "finish_read")])
def test_a_bug_costs_pages_but_no_reader(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "BUG_PAUSE_S", 0.01)
    store = open_store(tmp_path, read_limit=RateLimit(1e9))
    save(store, range(30))
    assert store.flush(30)
    store.drop_host()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=RuntimeError("a bug of ours")))
        store.prefetch("lost", keys_of(range(16)))
        lost = store.wait("lost", 10.0 if name == "take" else 0.5)
    assert "a bug of ours" in caplog.text
    assert all(reader.is_alive() for reader in store._readers)
    store.release("lost")
    assert served(store, range(16, 30)) == list(range(16, 30))
    store.close()
    if name == "take":
        assert lost == ((), True, True)
        assert counters(store)["pages_open"] == 0
