"""Copies and the jobs behind them: order, bounds, and jobs that fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sglang_hcache.device.streams import Event, ImmediateStream
from sglang_hcache.saving import copy_out as copy_out_module
from sglang_hcache.saving.copy_out import InlineCopyOut, StreamCopyOut, spread
from tests.prefetch.clients import PATIENCE_S


class HeldEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        assert self.passed.wait(PATIENCE_S)

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


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_out_module, "_LEAST_BYTES", 0)


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
    assert finished.wait(PATIENCE_S)
    assert done == [0, 1, 2]


def test_rows_with_gaps_are_copied_whole(copy_out: StreamCopyOut) -> None:
    tensor = torch.arange(48).view(4, 12)[:, 2:7]
    assert torch.equal(copy_out.to_host(tensor), tensor)


@pytest.mark.parametrize(
    ("tensor", "ends"),
    [(torch.arange(100), 9), (torch.arange(10), 0), (torch.arange(120).view(4, 30)[:, :25], 11), (torch.zeros(0), 0)],
    ids=["large", "small", "with gaps", "empty"],
)
def test_large_rows_let_small_copies_of_others_pass(
    tensor: torch.Tensor, ends: int, copy_out: StreamCopyOut, stream: HeldStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_out_module, "COPY_BYTES", 10 * 8)
    ended: list[None] = []
    monkeypatch.setattr(stream, "end_copy", lambda: ended.append(None))
    assert torch.equal(copy_out.to_host(tensor), tensor)
    assert len(ended) == ends


@pytest.mark.parametrize("rounds", [1, 20])
def test_rows_of_two_forwards_may_wait_always_and_no_more_than_there_is_room_for(
    copy_out: StreamCopyOut, stream: HeldStream, rounds: int
) -> None:
    """Wherever in the memory they begin; and no job finds the rows of another."""
    forward = 1000
    copy_out.expect(forward)
    found: list[torch.Tensor] = []

    def send(number: int, size: int) -> bool:
        host = copy_out.rows_to_host(torch.full((size,), number, dtype=torch.uint8))
        copy_out.submit(lambda: found.append(host.clone()) if host is not None else None)
        return host is not None

    for turn in range(rounds):
        taken = [send(number, forward - turn) for number in range(6)]
        assert taken[:2] == [True, True]
        assert not all(taken)
        stream.pass_all()
        finished = threading.Event()
        copy_out.submit(finished.set)
        stream.pass_all()
        assert finished.wait(PATIENCE_S)
        assert [host.unique().tolist() for host in found] == [[n] for n in range(6) if taken[n]]
        found.clear()


def test_rows_larger_than_a_forward_are_left_out(copy_out: StreamCopyOut) -> None:
    assert copy_out.rows_to_host(torch.zeros(1)) is None
    copy_out.expect(1000)
    assert copy_out.rows_to_host(torch.zeros(10_000)) is None
    assert copy_out.rows_to_host(torch.zeros(0)) is not None


def test_more_room_is_made_once_what_is_under_way_is_done(
    copy_out: StreamCopyOut, stream: HeldStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_out.expect(100)
    rows = copy_out.rows_to_host(torch.ones(25))
    done: list[float] = []
    copy_out.submit(lambda: done.append(float(rows.sum())))  # type: ignore[union-attr]
    drain = copy_out.drain

    def drained() -> None:
        assert not done
        stream.pass_all()
        drain()

    monkeypatch.setattr(copy_out, "drain", drained)
    copy_out.expect(4000)
    assert done == [25.0]
    assert copy_out.rows_to_host(torch.ones(1000)) is not None
    copy_out.submit(lambda: None)


def test_the_memory_is_registered_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[int] = []

    class Pinned:
        def __init__(self, memory: torch.Tensor) -> None:
            self._size = memory.nbytes
            registered.append(self._size)

        def release(self) -> None:
            registered.remove(self._size)

    monkeypatch.setattr(copy_out_module, "PinnedMemory", Pinned)
    copies = StreamCopyOut(HeldStream(), ImmediateStream())
    copies.expect(1 << 20)
    copies.expect(1 << 20)
    (size,) = registered
    assert 3 << 20 <= size < (3 << 20) + 4096
    copies.close()
    assert not registered


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("items", [0, 1, 3, 4, 5, 250])
def test_copies_are_spread_over_few_calls(threads: int, items: int) -> None:
    done: set[int] = set()
    calls: list[int] = []

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().submit(*args, **kwargs)

    if not threads:
        spread(None, done.add, range(items))
    else:
        with Counting(threads) as copying:
            spread(copying, done.add, range(items))
            assert len(calls) <= 4
    assert done == set(range(items))


def test_a_copy_that_fails_is_no_silent_loss() -> None:
    def copy(item: int) -> None:
        if not item:
            raise ZeroDivisionError

    with ThreadPoolExecutor(2) as copying, pytest.raises(ZeroDivisionError):
        spread(copying, copy, [1, 0, 1])


def test_a_failed_job_does_not_end_the_thread(copy_out: StreamCopyOut, stream: HeldStream) -> None:
    finished = threading.Event()
    copy_out.submit(lambda: 1 // 0)  # type: ignore[arg-type]
    copy_out.submit(finished.set)
    stream.pass_all()
    assert finished.wait(PATIENCE_S)


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
    drained.join(PATIENCE_S)
    assert not drained.is_alive()
    assert not done


def test_on_the_cpu_a_job_is_done_at_once() -> None:
    copy_out, done = InlineCopyOut(), []
    tensor = torch.zeros(3)
    assert copy_out.to_host(tensor) is tensor
    assert copy_out.rows_to_host(tensor) is tensor
    copy_out.submit(lambda: done.append(1))
    assert done == [1]
    assert copy_out.record().query()
