"""Stores that a prefetcher keeps open for nobody in particular."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.spaces import Space, Spaces
from sglang_hcache.storage.store import LocalStore
from tests.prefetch.clients import SLOTS, hello, until
from tests.storage.pages import LAYOUT, OTHER_FINGERPRINT, counters, save, served


class Keeper:
    """Spaces, and the loop that they have their jobs done by."""

    def __init__(self, directory: Path) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.spaces = Spaces([directory], None, None, self.jobs.put, lambda _fingerprint, _owner: None)

    def open(self, hello: Hello) -> Space | str:
        found: list[Space | str] = []
        self.spaces.open(hello, found.append)
        while not found:
            self.jobs.get(timeout=10)()
        return found[0]

    def opened(self, hello: Hello) -> Space:
        space = self.open(hello)
        assert isinstance(space, Space)
        return space


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(tmp_path)
    yield keeper
    keeper.spaces.close_all()


def test_a_space_that_nobody_uses_is_found_again_as_it_was(keeper: Keeper) -> None:
    kept = keeper.opened(hello())
    save(kept.store, range(10))
    assert keeper.opened(hello(host_bytes=(SLOTS + 1) * LAYOUT.record_bytes)) is kept, "about as much as before"
    assert served(kept.store, range(12)) == list(range(10))
    assert counters(kept.store)["hits_file"] == 0


@pytest.mark.parametrize(
    "changes",
    [{"host_bytes": 2 * SLOTS * LAYOUT.record_bytes}, {"write_policy": "write_back"}, {"on_file": False}],
    ids=str,
)
def test_a_client_with_other_wishes_gets_a_store_of_its_own_if_nobody_uses_the_former(
    keeper: Keeper, changes: dict[str, object]
) -> None:
    former = keeper.opened(hello())
    save(former.store, range(10))
    former.sessions.add(1)
    assert keeper.opened(hello(**changes)) is former
    former.sessions.clear()
    other = keeper.opened(hello(**changes))
    assert other is not former
    assert not former.store.alive
    assert other.made_for == hello(**changes)
    assert served(other.store, range(10)) == (list(range(10)) if other.made_for.on_file else [])


def test_spaces_that_nobody_uses_make_room_for_others(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused = keeper.opened(hello(fingerprint=b"u" * 16)), keeper.opened(hello())
    used.sessions.add(1)
    save(unused.store, range(10))
    available = [psutil.virtual_memory().available]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available[0]))
    free, available[0] = available[0], 0
    close = unused.region.close

    def closed() -> None:
        close()
        available[0] = free

    monkeypatch.setattr(unused.region, "close", closed)
    third = keeper.opened(hello(fingerprint=OTHER_FINGERPRINT))
    assert not unused.store.alive
    assert used.store.alive
    available[0] = 0
    third.sessions.add(2)
    assert "are free" in str(keeper.open(hello())), "what is used is not taken away"
    available[0] = free
    assert served(keeper.opened(hello()).store, range(10)) == list(range(10))


def test_those_that_wait_for_their_disks_hold_up_nobody_else(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStore, "unwritten", lambda _store: 1)
    for number in range(8):
        keeper.spaces.close(keeper.opened(hello(fingerprint=b"%016d" % number)))
    assert keeper.opened(hello()).store.alive


def test_memory_of_a_closed_space_is_given_back_at_once(keeper: Keeper) -> None:
    space = keeper.opened(hello())
    save(space.store, range(10))
    memory = space.store.memory
    assert until(lambda: space.store.unwritten() == 0)
    keeper.spaces.close(space)
    assert keeper.opened(hello()) is not space
    assert not memory.any(), "although somebody still refers to it"
