"""What is told of the speed of drives, on a clock that is set, for pages that come when it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hcache.queueing import read_meter
from sglang_hcache.queueing.read_meter import MEASURED_PAGES, MEASURED_S, ReadMeter
from sglang_hcache.storage.contract import Progress
from tests.storage.pages import keys_of

DEADLINE_S = 1.0


class Drives:
    """Reads what is asked for in turn, each page in as many seconds; and hears what is told of it."""

    def __init__(self, page_s: float) -> None:
        self.now = 0.0
        self.page_s = page_s
        self.told: list[tuple[int, float]] = []
        self.least: list[tuple[int, float]] = []  # that it took
        self.free_at = 0.0
        self.comes_at: dict[bytes, float] = {}
        self._asked: dict[str, tuple[list[bytes], float]] = {}

    def monotonic(self) -> float:
        return self.now

    def read(self, pages: int, seconds: float, *, at_least: bool = False) -> None:
        (self.least if at_least else self.told).append((pages, round(seconds, 6)))

    def ask(self, owner: str, pages: range) -> list[bytes]:
        keys = keys_of(pages)
        for key in keys:
            if key not in self.comes_at:
                self.free_at = self.comes_at[key] = max(self.free_at, self.now) + self.page_s
        self._asked[owner] = keys, self.now
        return keys

    def progress(self, owner: str) -> Progress:
        keys, asked_at = self._asked[owner]
        there = sum(self.comes_at[key] <= min(self.now, asked_at + DEADLINE_S) for key in keys)
        return Progress(tuple(range(there)), there == len(keys) or self.now >= asked_at + DEADLINE_S)

    def took_s(self, owner: str) -> float:
        keys, asked_at = self._asked[owner]
        return min(DEADLINE_S, max(0.0, max(self.comes_at[key] for key in keys) - asked_at))


@pytest.fixture
def drives(monkeypatch: pytest.MonkeyPatch) -> Drives:
    drives = Drives(page_s=0.01)
    monkeypatch.setattr(read_meter, "time", SimpleNamespace(monotonic=drives.monotonic))
    return drives


@pytest.fixture
def meter(drives: Any) -> ReadMeter:
    return ReadMeter(drives, reads_at_once=8)


def begin(meter: ReadMeter, drives: Drives, owner: str, pages: range) -> None:
    meter.begin(owner, drives.ask(owner, pages), asked_at=drives.now, waits_until=drives.now + DEADLINE_S)


def look_at(meter: ReadMeter, drives: Any, now: float, **options: Any) -> list[tuple[int, float]]:
    drives.now = now
    meter.look(drives, **options)
    told: list[tuple[int, float]] = drives.told
    drives.told = []
    return told


def test_it_does_not_matter_when_the_end_is_seen(meter: ReadMeter, drives: Drives) -> None:
    for last in (0.101, 3.0):
        began = drives.now = drives.now + 10
        begin(meter, drives, "a", range(int(began), int(began) + 10))
        assert look_at(meter, drives, began + 0.05) == []
        assert look_at(meter, drives, began + last) == [(10, 0.1)]
        meter.end("a")
        assert look_at(meter, drives, began + last + 1) == []


def test_of_those_that_wait_together_each_page_and_each_second_counts_once(meter: ReadMeter, drives: Drives) -> None:
    """And no second between them, in which no drive had anything to do."""
    begin(meter, drives, "a", range(10))
    drives.now = 0.055
    begin(meter, drives, "b", range(15))  # of which five are in memory
    assert look_at(meter, drives, 0.12) == []
    drives.now = 0.25
    begin(meter, drives, "c", range(20, 25))
    assert look_at(meter, drives, 1.0) == [(20, 0.2)]


def test_it_is_told_while_some_are_waited_for_all_the_time(meter: ReadMeter, drives: Drives) -> None:
    told = []
    for step in range(100):
        begin(meter, drives, str(step), range(4 * step, 4 * step + 4))
        told += look_at(meter, drives, 0.02 * (step + 1))
    assert len(told) == pytest.approx(2.0 / MEASURED_S, abs=1)
    assert {round(seconds / pages, 3) for pages, seconds in told} == {0.01}


def test_a_few_pages_say_nothing(meter: ReadMeter, drives: Drives) -> None:
    begin(meter, drives, "a", range(MEASURED_PAGES - 1))
    assert look_at(meter, drives, 1.0) == []
    begin(meter, drives, "b", range(90, 91))
    assert look_at(meter, drives, 2.0) == []


@pytest.mark.parametrize(("there", "tells"), [(7, False), (8, True)])
def test_while_others_are_under_way_few_say_nothing(
    meter: ReadMeter, drives: Drives, there: int, *, tells: bool
) -> None:
    begin(meter, drives, "a", range(20))
    assert bool(look_at(meter, drives, 0.01 * there + 0.001, leaving=["a"])) is tells


@pytest.mark.parametrize("page_s", [0.3, 3.0])
def test_what_a_deadline_ends_took_at_least_so_long(meter: ReadMeter, drives: Drives, page_s: float) -> None:
    """Else each hit would wait for its deadline: of a drive that hardly delivers there is nothing else to tell."""
    drives.page_s = page_s
    begin(meter, drives, "a", range(10))
    begin(meter, drives, "b", range(10, 20))  # of which the same could be told
    assert look_at(meter, drives, 0.9) == []
    assert look_at(meter, drives, 1.1) == []
    assert drives.least == [(max(1, int(1 / page_s)), DEADLINE_S)]
    meter.end("a")
    assert look_at(meter, drives, 1.2) == []
    assert len(drives.least) == 1


def test_what_comes_within_the_deadline_is_not_late(meter: ReadMeter, drives: Drives) -> None:
    begin(meter, drives, "a", range(3))
    assert look_at(meter, drives, 5.0) == []
    assert drives.least == []
