"""The restore pipeline: what it writes, what may overtake what, and what is left behind by a failure."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_hcache.device.streams import Event, ImmediateStream
from sglang_hcache.restoring import restore
from sglang_hcache.restoring.copiers import IndexCopier
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import Load, Restorer, Staging

PAGE, WIDTH, CHUNKS, SLOTS = 4, 6, 12, 96


class Device:
    """Streams whose work is done later, in any order that their waits allow."""

    def __init__(self) -> None:
        self.queues: list[deque[Callable[[], bool]]] = []
        self.current: list[FakeStream] = []

    def submit(self, work: Callable[[], None]) -> None:
        def run() -> bool:
            work()
            return True

        self.current[-1].queue.append(run)

    def finish(self, chance: random.Random) -> None:
        """Do all that is queued; fails where streams wait for each other."""
        while any(self.queues):
            waiting = [queue for queue in self.queues if queue]
            chance.shuffle(waiting)
            for queue in waiting:
                if queue[0]():
                    queue.popleft()
                    break
            else:
                pytest.fail("streams wait for each other")


@dataclass(eq=False)
class FakeEvent:
    device: Device
    timed: bool
    passed: bool = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.device.finish(random.Random(0))
        assert self.passed

    def elapsed_time(self, end: Event) -> float:
        assert isinstance(end, FakeEvent)
        assert self.timed
        assert end.timed
        return 1.0


@dataclass(eq=False)
class FakeStream:
    device: Device
    queue: deque[Callable[[], bool]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.device.queues.append(self.queue)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.device.current.append(self)
        yield
        self.device.current.pop()

    def record(self, *, timed: bool = False) -> FakeEvent:
        event = FakeEvent(self.device, timed)

        def pass_by() -> bool:
            event.passed = True
            return True

        self.queue.append(pass_by)
        return event

    def wait(self, event: object) -> None:
        assert isinstance(event, FakeEvent)
        self.queue.append(event.query)

    def end_copy(self) -> None:
        pass

    def delay(self) -> None:
        pass

    def keep(self, tensor: torch.Tensor) -> None:
        pass

    def adopt(self) -> None:
        pass


class DeferredCopier(IndexCopier):
    def __init__(self, device: Device) -> None:
        self._device = device
        self.bytes_at_once: list[int] = []

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        self.bytes_at_once.append(target.nbytes)
        self._device.submit(lambda: super(DeferredCopier, self).copy(pages, layers, places, target))


class Pool:
    """A projector that stores twice the rows, and their positions."""

    def __init__(self, layers: int, device: Device | None = None, fails_at: int | None = None) -> None:
        self.rows = torch.full((layers, SLOTS, WIDTH), -1.0)
        self.positions = torch.full((layers, SLOTS), -1)
        self._device = device
        self._fails_at = fails_at

    def clear(self) -> None:
        self.rows.fill_(-1)

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        if layer == self._fails_at:
            raise RuntimeError("no memory")

        def write() -> None:
            self.rows[layer, slots] = 2 * rows
            self.positions[layer, slots] = positions

        if self._device is None:
            write()
        else:
            self._device.submit(write)


def host_pages(pool: Pool, *, uneven: bool = False) -> HostPages:
    layers = len(pool.rows)
    page_bytes = PAGE * WIDTH * 4
    generator = np.random.default_rng(0)
    offsets = [
        64 + layer * (page_bytes + 32) + (16 if uneven and layer == layers - 1 else 0) for layer in range(layers)
    ]
    values = generator.standard_normal((CHUNKS, offsets[-1] + page_bytes)).astype(np.float32)
    memory = torch.from_numpy(generator.integers(0, 256, (CHUNKS, offsets[-1] + page_bytes), np.uint8))
    for offset in offsets:
        memory[:, offset : offset + page_bytes] = torch.from_numpy(values[:, : PAGE * WIDTH].copy()).view(torch.uint8)
        values += 1
    positions = generator.integers(0, 1000, (CHUNKS, PAGE), np.int32)
    return HostPages(memory, positions, [StoredLayer(offset, page_bytes, torch.float32, pool) for offset in offsets])


def some_loads(seed: int, pages: int) -> list[Load]:
    """Two requests that share a chunk, to slots in no order."""
    slots = torch.randperm(SLOTS // PAGE, generator=torch.Generator().manual_seed(seed))[:pages]
    slots = (slots[:, None] * PAGE + torch.arange(PAGE)).flatten()
    chunks = [*np.random.default_rng(seed).permutation(CHUNKS)[: pages - 1].tolist()]
    chunks.append(chunks[0])
    cut = max(1, pages // 3)
    return [
        Load("first", tuple(chunks[:cut]), slots[: cut * PAGE]),
        Load("second", tuple(chunks[cut:]), slots[cut * PAGE :]),
    ]


def expect(pool: Pool, pages: HostPages, loads: list[Load]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, positions = torch.full_like(pool.rows, -1.0), torch.full_like(pool.positions, -1)
    for load in loads:
        for index, chunk in enumerate(load.store_slots):
            slots = load.device_slots[index * PAGE : (index + 1) * PAGE]
            for layer, stored in enumerate(pages.layers):
                payload = pages.memory[chunk, stored.offset : stored.offset + stored.page_bytes].clone()
                rows[layer, slots] = 2 * payload.view(torch.float32).view(PAGE, WIDTH)
                positions[layer, slots] = torch.from_numpy(pages.positions[chunk].astype(np.int64))
    return rows, positions


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("together_bytes", [0, 300, 1 << 20])
@pytest.mark.parametrize("half_rows", [1, 3 * PAGE, 1024])
def test_every_row_lands_in_its_slot_and_nowhere_else(half_rows: int, together_bytes: int, *, uneven: bool) -> None:
    pool, stream = Pool(5), ImmediateStream()
    pages = host_pages(pool, uneven=uneven)
    restorer = Restorer(
        pages, device="cpu", copier=IndexCopier(), copying=stream, projecting=stream, before=[stream],
        events=LayerEvents(stream, 5), staging=Staging(half_rows, together_bytes),
    )  # fmt: skip
    for seed, count in enumerate([2, 7, 11]):
        pool.rows.fill_(-1)
        pool.positions.fill_(-1)
        loads = some_loads(seed, count)
        restorer.run(loads)
        rows, positions = expect(pool, pages, loads)
        assert torch.equal(pool.rows, rows)
        assert torch.equal(pool.positions, positions)


@pytest.mark.parametrize("together_bytes", [0, 1 << 20])
@pytest.mark.parametrize("half_rows", [1, 3 * PAGE, 1024])
def test_of_windowed_layers_only_the_last_pages_are_restored(half_rows: int, together_bytes: int) -> None:
    """Into slots of their own."""
    pool, stream, windowed = Pool(5), ImmediateStream(), (1, 3, 4)
    plain = host_pages(pool)
    layers = [replace(stored, windowed=layer in windowed) for layer, stored in enumerate(plain.layers)]
    pages = replace(plain, layers=layers)
    restorer = Restorer(
        pages, device="cpu", copier=IndexCopier(), copying=stream, projecting=stream, before=[stream],
        events=LayerEvents(stream, 5), staging=Staging(half_rows, together_bytes),
    )  # fmt: skip
    loads = some_loads(seed=3, pages=9)
    in_windows = [
        Load(load.rid, load.store_slots[-2:], torch.arange(first, first + 2 * PAGE))
        for load, first in zip(loads, (20 * PAGE, 4 * PAGE), strict=True)
    ]
    restorer.run(
        [replace(load, window_slots=window.device_slots) for load, window in zip(loads, in_windows, strict=True)]
    )
    for layer in range(5):
        expected = expect(pool, plain, in_windows if layer in windowed else loads)
        assert torch.equal(pool.rows[layer], expected[0][layer])
        assert torch.equal(pool.positions[layer], expected[1][layer])


def deferred(
    pool: Pool, device: Device, staging: Staging
) -> tuple[Restorer, LayerEvents, FakeStream, DeferredCopier]:
    forward = FakeStream(device)
    events, copier = LayerEvents(forward, 4), DeferredCopier(device)
    restorer = Restorer(
        host_pages(pool), device="cpu", copier=copier, copying=FakeStream(device), projecting=FakeStream(device),
        before=[forward], events=events, staging=staging,
    )  # fmt: skip
    return restorer, events, forward, copier


@pytest.mark.parametrize("seed", range(40))
def test_whatever_overtakes_what_the_forward_reads_restored_layers(seed: int) -> None:
    """Two batches are issued at once; then the device does its work in a random order that the streams allow."""
    chance, device = random.Random(seed), Device()
    pool = Pool(4, device)
    staging = Staging(chance.choice([PAGE, 3 * PAGE, 1024]), chance.choice([0, 600, 1 << 20]))
    restorer, events, forward, copier = deferred(pool, device, staging)
    pages = host_pages(Pool(4))
    half_bytes = max(1, staging.half_rows // PAGE) * PAGE * WIDTH * 4
    seen: list[tuple[int, int]] = []
    for batch in range(2):
        loads = some_loads(10 * seed + batch, chance.choice([2, 6, 11]))
        with forward.active():  # the forward before it: its slots may be those that are restored now
            device.submit(pool.clear)
        index = restorer.run(loads)
        events.set_consumer(index)
        wanted, _ = expect(pool, pages, loads)
        for layer in range(4):
            events.wait_until(layer)

            def attend(layer: int = layer, wanted: torch.Tensor = wanted, batch: int = batch) -> None:
                assert torch.equal(pool.rows[layer], wanted[layer])
                seen.append((batch, layer))

            with forward.active():
                device.submit(attend)
    device.finish(chance)
    assert seen == [(batch, layer) for batch in range(2) for layer in range(4)]
    assert max(copier.bytes_at_once) <= half_bytes


def test_the_bus_is_busy_before_positions_and_slots_are_made() -> None:
    device = Device()
    restorer, _, _, copier = deferred(Pool(4, device), device, Staging(1024, 0))

    class Loaded(Load):
        @property
        def device_slots(self) -> torch.Tensor:
            assert copier.bytes_at_once
            return torch.arange(2 * PAGE)

        @device_slots.setter
        def device_slots(self, slots: torch.Tensor) -> None: ...

    restorer.run([Loaded("request", (3, 1), torch.empty(0))])
    assert len(copier.bytes_at_once) == 4


def test_the_time_of_a_batch_counts_its_first_copy() -> None:
    """Also where a copy is done when it is issued."""
    stream, events, begun = ImmediateStream(), LayerEvents(ImmediateStream(), 4), []

    class Copier(IndexCopier):
        def copy(self, *arguments: Any) -> None:
            begun.append(dict(events._begins))
            super().copy(*arguments)

    restorer = Restorer(
        host_pages(Pool(4)), device="cpu", copier=Copier(), copying=stream, projecting=stream, before=[stream],
        events=events, staging=Staging(1024, 0),
    )  # fmt: skip
    index = restorer.run([Load("request", (3, 1), torch.arange(2 * PAGE))])
    assert all(index in begins for begins in begun)
    assert len(begun) == 4


def test_a_large_copy_is_ended_before_its_product_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends it would wait for the product's blocks, and the next copy for that. Small ones are ended together."""
    monkeypatch.setattr(restore, "COPY_BYTES", 5 * PAGE * WIDTH * 4)
    calls: list[str] = []

    class Copying(ImmediateStream):
        def record(self, *, timed: bool = False) -> Event:
            calls.append("record")
            return super().record(timed=timed)

        def end_copy(self) -> None:
            calls.append("end")

    class Copier(IndexCopier):
        def copy(self, *arguments: Any) -> None:
            calls.append("copy")
            super().copy(*arguments)

    stream = ImmediateStream()
    restorer = Restorer(
        host_pages(Pool(4)), device="cpu", copier=Copier(), copying=Copying(), projecting=stream, before=[stream],
        events=LayerEvents(stream, 4), staging=Staging(1024, 0),
    )  # fmt: skip
    ended = ["copy", "end", "record"]
    for pages, expected in ((5, 4 * ended), (4, 2 * ["copy", "record", *ended])):
        calls.clear()
        restorer.run(some_loads(0, pages))
        assert calls == expected


def test_a_load_of_nothing_is_no_work() -> None:
    device = Device()
    restorer, events, _, copier = deferred(Pool(4, device), device, Staging(1024, 1 << 20))
    index = restorer.run([Load("request", (), torch.empty(0, dtype=torch.int64))])
    assert events.synchronize(index) is None
    assert not copier.bytes_at_once


def test_a_failure_leaves_nothing_under_way() -> None:
    device = Device()
    pool = Pool(4, device, fails_at=2)
    restorer, events, _, _ = deferred(pool, device, Staging(1024, 0))
    with pytest.raises(RuntimeError, match="no memory"):
        restorer.run(some_loads(0, 5))
    assert not any(device.queues)
    assert not events._recorded, "nor is anything of it remembered"
    assert not events._begins
    pool._fails_at = None
    loads = some_loads(1, 5)
    index = restorer.run(loads)
    assert events.synchronize(index) == 0.001
    rows, _ = expect(pool, host_pages(Pool(4)), loads)
    used = torch.cat([load.device_slots for load in loads])
    assert torch.equal(pool.rows[:, used], rows[:, used])


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_copied_into_memory_that_was_another_tensors_before_that_is_done(seed: int) -> None:
    device, done = Device(), list[str]()
    forward, pool = FakeStream(device), Pool(4, device)
    with forward.active():
        device.submit(lambda: done.append("the other tensor's last kernel"))

    class Noted(DeferredCopier):
        def copy(self, *arguments: Any) -> None:
            device.submit(lambda: done.append("a copy"))
            super().copy(*arguments)

    restorer = Restorer(
        host_pages(pool), device="cpu", copier=Noted(device), copying=FakeStream(device),
        projecting=FakeStream(device), before=[forward], events=LayerEvents(forward, 4), staging=Staging(1024, 0),
    )  # fmt: skip
    restorer.run(some_loads(0, 5))
    device.finish(random.Random(seed))
    assert done == ["the other tensor's last kernel", *4 * ["a copy"]]


def test_a_forward_without_a_load_waits_for_nothing() -> None:
    device = Device()
    forward = FakeStream(device)
    events = LayerEvents(forward, 4)
    events.set_consumer(-1)
    events.wait_until(0)
    assert not forward.queue


@pytest.mark.parametrize("seed", range(5))
def test_with_its_last_layer_a_model_waits_for_those_of_its_draft_model(seed: int) -> None:
    """Which has a pool of its own: nothing asks for these."""
    device = Device()
    forward, projecting = FakeStream(device), FakeStream(device)
    events = LayerEvents(forward, 2)
    index = events.new_batch()
    done: list[str] = []

    def queue(stream: FakeStream, what: str) -> None:
        with stream.active():
            device.submit(lambda: done.append(what))

    for restored in ("0", "1", "draft 0", "draft 1"):
        queue(projecting, restored)
        events.restored(index, projecting.record())
    events.set_consumer(index)
    for layer in range(2):
        events.wait_until(layer)
        queue(forward, f"forward of {layer}")
    device.finish(random.Random(seed))
    assert done.index("forward of 0") > done.index("0")
    assert done[-1] == "forward of 1"


def test_a_graph_of_a_whole_prefill_can_wait_for_all_layers() -> None:
    """As SGLang does it: by two attributes of its own counter."""
    device = Device()
    forward = FakeStream(device)
    counter = LayerEvents(forward, 4)
    assert counter.consumer_index < 0
    index = counter.new_batch()
    for _ in range(4):
        counter.restored(index, forward.record())
    forward.queue.clear()
    counter.set_consumer(index)
    assert counter.consumer_index == index
    counter.wait_until(counter.num_layers - 1)
    assert len(forward.queue) == 1
