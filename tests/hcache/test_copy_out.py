"""Copies and the jobs behind them: order, bounds, and jobs that fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from sglang_hcache.copy_out import InlineCopyOut, StreamCopyOut
from sglang_hcache.streams import Event, ImmediateStream


class HeldEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(10)

    def elapsed_time(self, end: Event) -> float:
        raise NotImplementedError


class HeldStream(ImmediateStream):
    """Whose events are passed when the test says so."""

    def __init__(self) -> None:
        self.recorded: list[HeldEvent] = []
        self.kept: list[torch.Tensor] = []

    def record(self, *, timed: bool = False) -> HeldEvent:
        self.recorded.append(HeldEvent())
        return self.recorded[-1]

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)

    def pass_all(self) -> None:
        for event in self.recorded:
            event.passed.set()


@pytest.fixture
def stream() -> HeldStream:
    return HeldStream()


@pytest.fixture
def copy_out(stream: HeldStream) -> Iterator[StreamCopyOut]:
    copy_out = StreamCopyOut(stream, ImmediateStream())
    yield copy_out
    with contextlib.suppress(IndexError):
        stream.pass_all()
    copy_out.close()


def test_jobs_wait_for_their_copies_and_keep_their_order(copy_out: StreamCopyOut, stream: HeldStream) -> None:
    done: list[int] = []
    for number in range(3):
        host = copy_out.to_host(torch.full((2, 3), number))
        copy_out.submit(lambda host=host: done.append(int(host[0, 0])))  # type: ignore[misc]
    assert len(stream.kept) == 3
    stream.recorded[1].passed.set()
    assert not done
    stream.recorded[0].passed.set()
    stream.recorded[2].passed.set()
    stream.pass_all()
    finished = threading.Event()
    copy_out.submit(finished.set)
    stream.pass_all()
    assert finished.wait(10)
    assert done == [0, 1, 2]


def test_rows_with_gaps_are_copied_whole(copy_out: StreamCopyOut) -> None:
    tensor = torch.arange(48).view(4, 12)[:, 2:7]
    assert torch.equal(copy_out.to_host(tensor), tensor)


def test_four_forwards_may_wait() -> None:
    forward_bytes = 1 << 30
    copy_out = StreamCopyOut(HeldStream(), ImmediateStream())
    copy_out.expect(forward_bytes)
    for forwards, crowded in enumerate([False, False, False, False, True]):
        copy_out._pending = forwards * forward_bytes
        assert copy_out.crowded is crowded
    copy_out.close()


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
    copy_out = StreamCopyOut(HeldStream(), ImmediateStream())
    copy_out.expect(100)
    readied = taken
    one_runs_one_is_issued_one_is_copied = [torch.empty(100) for _ in range(3)]
    assert taken == readied == len(one_runs_one_is_issued_one_is_copied)
    copy_out.close()


def test_too_much_waiting_memory_makes_it_crowded(copy_out: StreamCopyOut, stream: HeldStream) -> None:
    copy_out._most_pending = 1000
    finished = threading.Event()
    for _ in range(2):
        copy_out.to_host(torch.zeros(500, dtype=torch.uint8))
        copy_out.to_host(torch.zeros(1, dtype=torch.uint8))
        assert not copy_out.crowded
        copy_out.submit(lambda: None)
    assert copy_out.crowded
    copy_out.submit(finished.set)
    stream.pass_all()
    assert finished.wait(10)
    assert not copy_out.crowded


def test_a_failed_job_does_not_end_the_thread(copy_out: StreamCopyOut, stream: HeldStream) -> None:
    finished = threading.Event()
    copy_out.submit(lambda: 1 // 0)  # type: ignore[arg-type]
    copy_out.submit(finished.set)
    stream.pass_all()
    assert finished.wait(10)


def test_after_a_failed_copy_nobody_waits_forever(copy_out: StreamCopyOut, stream: HeldStream) -> None:
    class Lost(HeldEvent):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error")

    stream.record = lambda **_: Lost()  # type: ignore[method-assign]
    done: list[int] = []
    copy_out.to_host(torch.zeros(3))
    copy_out.submit(lambda: done.append(1))
    drained = threading.Thread(target=copy_out.drain, daemon=True)
    drained.start()
    drained.join(10)
    assert not drained.is_alive()
    assert not done
    assert not copy_out.crowded


def test_on_the_cpu_a_job_is_done_at_once() -> None:
    copy_out, done = InlineCopyOut(), []
    tensor = torch.zeros(3)
    assert copy_out.to_host(tensor) is tensor
    copy_out.submit(lambda: done.append(1))
    assert done == [1]
    assert copy_out.record().query()
