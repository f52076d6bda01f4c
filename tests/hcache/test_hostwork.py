"""Copies and the jobs behind them: order, bounds, and jobs that fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from sglang_hcache.hostwork import InlineWork, StreamWork
from sglang_hcache.lanes import ImmediateLane, Mark


class HeldMark:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(10)

    def elapsed_time(self, end: Mark) -> float:
        raise NotImplementedError


class HeldLane(ImmediateLane):
    """Whose marks are passed when the test says so."""

    def __init__(self) -> None:
        self.marks: list[HeldMark] = []
        self.kept: list[torch.Tensor] = []

    def mark(self, *, timed: bool = False) -> HeldMark:
        self.marks.append(HeldMark())
        return self.marks[-1]

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)

    def pass_all(self) -> None:
        for mark in self.marks:
            mark.passed.set()


@pytest.fixture
def lane() -> HeldLane:
    return HeldLane()


@pytest.fixture
def work(lane: HeldLane) -> Iterator[StreamWork]:
    work = StreamWork(lane, ImmediateLane())
    yield work
    with contextlib.suppress(IndexError):
        lane.pass_all()
    work.close()


def test_jobs_wait_for_their_copies_and_keep_their_order(work: StreamWork, lane: HeldLane) -> None:
    done: list[int] = []
    for number in range(3):
        host = work.to_host(torch.full((2, 3), number))
        work.submit(lambda host=host: done.append(int(host[0, 0])))  # type: ignore[misc]
    assert len(lane.kept) == 3
    lane.marks[1].passed.set()
    assert not done
    lane.marks[0].passed.set()
    lane.marks[2].passed.set()
    lane.pass_all()
    finished = threading.Event()
    work.submit(finished.set)
    lane.pass_all()
    assert finished.wait(10)
    assert done == [0, 1, 2]


def test_rows_with_gaps_are_copied_whole(work: StreamWork) -> None:
    tensor = torch.arange(48).view(4, 12)[:, 2:7]
    assert torch.equal(work.to_host(tensor), tensor)


def test_four_forwards_may_wait() -> None:
    forward_bytes = 1 << 30
    work = StreamWork(HeldLane(), ImmediateLane())
    work.expect(forward_bytes)
    for forwards, crowded in enumerate([False, False, False, False, True]):
        work._pending = forwards * forward_bytes
        assert work.crowded is crowded
    work.close()


def test_pinned_memory_is_ready_for_all_forwards_that_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an allocator that, as torch's, keeps what is given back and takes more only where all of it is in use."""
    free: list[torch.Tensor] = []
    taken = 0

    class Pinned:
        def __init__(self, size: int, **_: object) -> None:
            nonlocal taken
            taken += not free
            self.memory = free.pop() if free else torch.zeros(size)

        def __del__(self) -> None:
            free.append(self.memory)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", Pinned)
    work = StreamWork(HeldLane(), ImmediateLane())
    work.expect(100)
    readied = taken
    one_runs_one_is_issued_one_is_copied = [torch.empty(100) for _ in range(3)]
    assert taken == readied == len(one_runs_one_is_issued_one_is_copied)
    work.close()


def test_too_much_waiting_memory_makes_it_crowded(work: StreamWork, lane: HeldLane) -> None:
    work._most_pending = 1000
    finished = threading.Event()
    for _ in range(2):
        work.to_host(torch.zeros(500, dtype=torch.uint8))
        work.to_host(torch.zeros(1, dtype=torch.uint8))
        assert not work.crowded
        work.submit(lambda: None)
    assert work.crowded
    work.submit(finished.set)
    lane.pass_all()
    assert finished.wait(10)
    assert not work.crowded


def test_a_failed_job_does_not_end_the_thread(work: StreamWork, lane: HeldLane) -> None:
    finished = threading.Event()
    work.submit(lambda: 1 // 0)  # type: ignore[arg-type]
    work.submit(finished.set)
    lane.pass_all()
    assert finished.wait(10)


def test_after_a_failed_copy_nobody_waits_forever(work: StreamWork, lane: HeldLane) -> None:
    class Lost(HeldMark):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error")

    lane.mark = lambda **_: Lost()  # type: ignore[method-assign]
    done: list[int] = []
    work.to_host(torch.zeros(3))
    work.submit(lambda: done.append(1))
    drained = threading.Thread(target=work.drain, daemon=True)
    drained.start()
    drained.join(10)
    assert not drained.is_alive()
    assert not done
    assert not work.crowded


def test_on_the_cpu_a_job_is_done_at_once() -> None:
    work, done = InlineWork(), []
    tensor = torch.zeros(3)
    assert work.to_host(tensor) is tensor
    work.submit(lambda: done.append(1))
    assert done == [1]
    assert work.mark().query()
