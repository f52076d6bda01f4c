"""A bound on reading holds for all readers together, and takes nothing when nothing is read."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from sglang_hcache.storage import rate_limit
from sglang_hcache.storage import store as store_module
from sglang_hcache.storage.fetch import Fetches
from sglang_hcache.storage.rate_limit import RateLimit
from tests.prefetch.clients import until
from tests.storage.pages import LAYOUT, counters, keys_of, open_store, save, served


class Clock:
    """Stands still, and notes how long one would have slept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 100.0, list[float]()
        time_ = SimpleNamespace(monotonic=lambda: self.now, sleep=self.slept.append)
        monkeypatch.setattr(rate_limit, "time", time_)


class Slow(int):
    """A number of bytes that leaves others time to come in between."""

    def __truediv__(self, other: float) -> float:
        time.sleep(0.001)
        return int(self) / other


def test_many_threads_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limit = Clock(monkeypatch), RateLimit(1_000_000)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(limit.take, [Slow(5_000)] * 60))
    assert sorted(clock.slept) == pytest.approx([0.005 * turn for turn in range(1, 61)])


def test_idle_time_is_not_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limit = Clock(monkeypatch), RateLimit(1_000_000)
    limit.take(100_000)
    clock.now += 0.3
    limit.take(100_000)
    assert clock.slept == pytest.approx([0.1, 0.1])


def test_a_limit_too_high_to_matter_lets_everybody_through(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limit = Clock(monkeypatch), RateLimit(1e15)
    for _ in range(10_000):
        limit.take(1)
    assert len(clock.slept) == 10_000
    assert max(clock.slept) < 1e-9


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


def test_what_is_left_out_in_the_meantime_takes_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reader at most has chosen its page: others choose when it is their turn."""
    chosen, go = threading.Semaphore(0), threading.Event()

    def take(_: RateLimit, n_bytes: int) -> None:
        assert n_bytes == LAYOUT.record_bytes
        chosen.release()
        assert go.wait(60)

    monkeypatch.setattr(RateLimit, "take", take)
    store = open_store(tmp_path, read_limit=RateLimit(1e9))
    save(store, range(20))
    assert store.flush(30)
    store.drop_host()
    store.prefetch("not needed any more", keys_of(range(10)))
    assert chosen.acquire(timeout=60)
    assert not chosen.acquire(timeout=0.3)
    store.prefetch("needed", keys_of(range(10, 15)))
    store.release("not needed any more")
    go.set()
    assert len(store.wait("needed", 60).slots) == 5
    assert until(lambda: not counters(store)["pages_reading"])
    assert counters(store)["hits_file"] == 5 + 1, "its own, and one of the others"
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
        bug = Mock(side_effect=RuntimeError("a bug of ours"))
        patch.setattr(owner, name, bug)
        store.prefetch("lost", keys_of(range(16)))
        if name == "take":
            assert store.wait("lost", 60)[:3] == ((), True, True)
        else:
            assert until(lambda: bug.call_count >= 16)
            assert store.progress("lost")[:3] == ((), False, True)
    assert until(lambda: "a bug of ours" in caplog.text)
    assert all(reader.is_alive() for reader in store._readers)
    store.release("lost")
    assert served(store, range(16, 30)) == list(range(16, 30))
    store.close()
    if name != "finish_read":
        assert counters(store)["pages_open"] == 0
