"""Restore: chunks in host memory become K and V on the device, layer by layer, ahead of the forward.

Two streams: one copies a few layers' rows of all pages into one half of a staging buffer, while the other projects
the other half into the pool. Needs torch and numpy only, and Triton where chunks are copied by a kernel.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang_hcache.copy_engine import CopyEngine, NoCopyEngine
from sglang_hcache.streams import Event, Stream, current_stream, new_stream

logger = logging.getLogger(__name__)

# Each copy of a batch takes the caller half a microsecond, and the engine as much or more, beside the 1.2 of so many
# bytes on the bus: smaller pages are read by a kernel. `bench.gpu_restore` measures both.
ENGINE_PAGE_BYTES = 64 << 10


@dataclass(frozen=True)
class Staging:
    """How much is copied at once."""

    half_rows: int  # in one half of the buffer; on a GPU they bound its size, on a CPU rows stay in the caches
    together_bytes: int  # layers of a small load are copied together, up to so much

    @classmethod
    def on(cls, device: str) -> Staging:
        if torch.device(device).type == "cpu":
            return cls(half_rows=1024, together_bytes=0)
        return cls(half_rows=8192, together_bytes=4 << 20)  # a launch takes as long as 100 KB on the bus


class Projector(Protocol):
    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write layer `layer`'s K and V of `n` tokens to the pool, on the current stream.

        rows: `[n, width]` as stored, on the device; positions, slots: int64 `[n]`, on the device.
        """


@dataclass(frozen=True)
class StoredLayer:
    """A layer's payload in a record, and what makes K and V of it."""

    offset: int  # bytes from the record's begin
    page_bytes: int
    dtype: torch.dtype
    projector: Projector
    windowed: bool = False  # restored of the last pages of a load only, into slots of its own


@dataclass(frozen=True)
class HostPages:
    """The host tier as restoring reads it."""

    memory: torch.Tensor  # uint8 [slots, record_bytes], on the host
    positions: npt.NDArray[np.int32]  # [slots, page_tokens]
    layers: Sequence[StoredLayer]

    @property
    def page_tokens(self) -> int:
        return int(self.positions.shape[1])


@dataclass(frozen=True)
class Load:
    """One request's accepted load: chunk `chunks[i]` goes to the device slots of its page."""

    rid: str
    chunks: tuple[int, ...]  # slots in the store's memory, leased by `rid`
    device_slots: torch.Tensor  # int64 `[pages × page_tokens]`
    window_slots: torch.Tensor | None = None  # likewise, of its last pages, for windowed layers


class LayerEvents:
    """SGLang's layer counter: the pool's getters ask it to wait until a layer has been restored.

    `reader`: the stream that reads the pool; it waits for an event, and the CPU goes on. With the last of `layers` it
    waits for what is restored after them, too: layers of a draft model, which runs next, and asks for nothing.
    """

    def __init__(self, reader: Stream, layers: int) -> None:
        self._reader = reader
        self._recorded: dict[int, list[Event]] = {}
        self._begins: dict[int, Event] = {}
        self.num_layers = layers  # SGLang reads these two before it replays a graph of a whole prefill
        self.consumer_index = -1
        self._last = -1

    def new_batch(self) -> int:
        self._last += 1
        self._recorded[self._last] = []
        return self._last

    def restored(self, index: int, event: Event) -> None:
        """The next layer of batch `index` is restored at `event`."""
        self._recorded[index].append(event)

    def begin(self, index: int, event: Event) -> None:
        """The stream that restores batch `index` has nothing else to do from `event` on."""
        self._begins[index] = event

    def follow(self, index: int, stream: Stream) -> None:
        """The stream goes on only when batch `index` is restored."""
        if recorded := self._recorded.get(index):
            stream.wait(recorded[-1])

    def is_restored(self, index: int) -> bool:
        recorded = self._recorded.get(index)
        return not recorded or recorded[-1].query()

    def synchronize(self, index: int) -> float | None:
        """Wait until batch `index` is restored; seconds it took from its begin, where anything was."""
        begin, recorded = self._begins.pop(index, None), self._recorded.pop(index, [])
        if not recorded:
            return None
        recorded[-1].synchronize()
        return None if begin is None else begin.elapsed_time(recorded[-1]) / 1000

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        if recorded := self._recorded.get(self.consumer_index):
            self._reader.wait(recorded[layer if layer < self.num_layers - 1 else -1])


class Copier(Protocol):
    indexed_on: str  # device of the places it is given

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        """Where it finds the chunks, int64 `[m]`, on the host; parts of it are given to `copy`."""

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        """Payload of layers of equal size and distance, of chunks at places `[m]`, on the current stream.

        target: uint8 `[len(layers), m, page_bytes]`, on the device.
        """


class IndexCopier:
    """By torch, layer by layer. From memory that is not pinned a GPU copies while the caller waits."""

    indexed_on = "cpu"

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(chunks)

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        for layer, out in zip(layers, target, strict=True):
            stored = pages.layers[layer]
            source = pages.memory[:, stored.offset : stored.offset + stored.page_bytes]
            if out.device.type == "cpu":
                torch.index_select(source, 0, places, out=out)
            else:
                out.copy_(source[places])


class EngineCopier:
    """By the GPU's copy engine, in one call for all pages and layers.

    No multiprocessor takes part: a product that runs beside it has all of them, as its blocks expect.
    """

    indexed_on = "cpu"

    def __init__(self, engine: CopyEngine | None = None) -> None:
        self._engine = engine or CopyEngine()

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        return pages.memory.data_ptr() + torch.tensor(chunks) * pages.memory.shape[1]

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        page_bytes = pages.layers[layers[0]].page_bytes
        offsets = np.array([[pages.layers[layer].offset] for layer in layers])
        sources = (offsets + places.numpy()).reshape(-1)
        targets = target.data_ptr() + page_bytes * np.arange(len(sources))
        self._engine.copy(targets, sources, page_bytes, torch.cuda.current_stream().cuda_stream)


class KernelCopier:
    """In one launch for all pages and layers: the GPU reads pinned memory over the bus.

    programs: blocks of threads that do so, of `warps` each. A block has 2 KiB a warp on the way, and the bus some
    100 KiB (50 GB/s, 2 µs): a few large blocks fill it and leave most multiprocessors alone.
    """

    indexed_on = "cuda"

    def __init__(self, programs: int = 8, warps: int = 16) -> None:
        self._programs, self._warps = programs, warps

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(chunks) * pages.memory.shape[1]

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        from sglang_hcache.triton_kernels.rows import copy_rows

        first = pages.layers[layers[0]]
        copy_rows(
            pages.memory.view(-1)[first.offset :],
            places,
            target,
            layer_bytes=pages.layers[layers[1]].offset - first.offset if len(layers) > 1 else 0,
            programs=self._programs,
            warps=self._warps,
        )


class EngineElseKernel:
    """The engine until it refuses a call; from then on the kernel, so that no load fails for it."""

    indexed_on = "cpu"

    def __init__(self, engine: EngineCopier) -> None:
        self._engine = engine
        self._kernel: KernelCopier | None = None

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        return self._engine.places(pages, chunks)

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        if self._kernel is None:
            try:
                self._engine.copy(pages, layers, places, target)
            except NoCopyEngine as error:
                logger.warning("hcache: from now on pages are copied by a kernel: %s", error)
                self._kernel = KernelCopier()
            else:
                return
        offsets = _to(str(target.device), places - pages.memory.data_ptr())
        self._kernel.copy(pages, layers, offsets, target)


class _Step(NamedTuple):
    """What is copied at once, and then projected."""

    layers: range
    pages: slice
    windowed: bool  # of the pages of windows


class _Copied(NamedTuple):
    """A step's rows, uint8 `[layers, pages, page_bytes]`: in this half of the staging buffer, from the event on."""

    step: _Step
    half: int
    rows: torch.Tensor
    event: Event


class Restorer:
    """Runs the queued loads of a batch together, layer by layer.

    Nothing is projected before what was queued on the streams `before` is done, as it may still read the slots;
    copies start at once. Nothing of a call holds up the caller, except for an `IndexCopier` on a GPU.
    """

    def __init__(
        self,
        pages: HostPages,
        *,
        device: str,
        copier: Copier,
        copying: Stream,
        projecting: Stream,
        before: Sequence[Stream],
        events: LayerEvents,
        staging: Staging,
    ) -> None:
        self._pages = pages
        self._device = device
        self._copier = copier
        self._copying, self._projecting, self._before = copying, projecting, before
        self._events = events
        self._half_pages = max(1, staging.half_rows // pages.page_tokens)
        half_bytes = self._half_pages * max(layer.page_bytes for layer in pages.layers)
        self._together_bytes = min(staging.together_bytes, half_bytes)
        self._halves = [torch.empty(half_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._projected: list[Event | None] = [None, None]  # of each half: from here on it may be overwritten

    def run(self, loads: Sequence[Load]) -> int:
        """Issue the restoration of all loads; returns the batch's index for `events`.

        After an error nothing of the batch is under way any more: what it reads may be given back.
        """
        index = self._events.new_batch()
        chunks = [chunk for load in loads for chunk in load.chunks]
        windows = [chunk for load in loads for chunk in self._window(load)]
        try:
            for stream in self._before:
                self._projecting.wait(stream.record())
            self._events.begin(index, self._projecting.record(timed=True))
            copies = self._copies(chunks, windows)
            first = list(itertools.islice(copies, 1))  # the bus is busy while positions and slots are made
            with self._projecting.active():
                positions, slots = self._positions(chunks), torch.cat([load.device_slots for load in loads])
                of_windows = positions, slots
                if windows:
                    window_slots = [load.window_slots for load in loads if load.window_slots is not None]
                    of_windows = self._positions(windows), torch.cat(window_slots)
                for copied in itertools.chain(first, copies):
                    self._project(index, copied, *(of_windows if copied.step.windowed else (positions, slots)))
        except BaseException:
            for stream in (self._copying, self._projecting):
                stream.record().synchronize()
            raise
        return index

    def measure(self, n_pages: int, *, repeats: int) -> tuple[float, float]:
        """Seconds to copy, and to project, the first layer of the store's first pages, each alone; the least of some.

        Overwrites the pool's first slots: only before requests are served.
        """
        n_pages = min(n_pages, self._half_pages, len(self._pages.memory))
        step = _Step(range(1), slice(0, n_pages), windowed=False)
        places = self._places(range(n_pages))
        with self._projecting.active():
            tokens = torch.arange(n_pages * self._pages.page_tokens, device=self._device)
            first = tokens * 0
        copies, projections = [], []
        for _ in range(repeats + 1):
            recorded = [self._copying.record(timed=True)]
            rows = self._copy(0, step, places).rows
            recorded += [self._copying.record(timed=True)]
            self._projecting.wait(recorded[-1])
            recorded += [self._projecting.record(timed=True)]
            stored = self._pages.layers[0]
            with self._projecting.active():
                typed = rows[0].view(stored.dtype).view(len(tokens), -1)
                stored.projector.project(0, typed, first, tokens)
            recorded.append(self._projecting.record(timed=True))
            recorded[-1].synchronize()
            copies.append(recorded[0].elapsed_time(recorded[1]) / 1000)
            projections.append(recorded[2].elapsed_time(recorded[3]) / 1000)
        return min(copies[1:]), min(projections[1:])

    def _window(self, load: Load) -> Sequence[int]:
        """Its chunks that windowed layers are restored of."""
        if load.window_slots is None:
            return ()
        return load.chunks[-(len(load.window_slots) // self._pages.page_tokens) :]

    def _positions(self, chunks: Sequence[int]) -> torch.Tensor:
        host_positions = self._pages.positions[chunks].astype(np.int64).reshape(-1)
        return _to(self._device, torch.from_numpy(host_positions))

    def _places(self, chunks: Sequence[int]) -> torch.Tensor:
        with self._copying.active():
            return _to(self._copier.indexed_on, self._copier.places(self._pages, chunks))

    def _copies(self, chunks: Sequence[int], windows: Sequence[int]) -> Iterator[_Copied]:
        """The batch's steps in order, each issued when it is asked for."""
        places = self._places(chunks)
        of_windows = self._places(windows) if windows else places
        for turn, step in enumerate(self._steps(len(chunks), len(windows))):
            yield self._copy(turn % 2, step, of_windows if step.windowed else places)

    def _steps(self, n_pages: int, n_window_pages: int) -> Iterator[_Step]:
        """In the order of layers; a layer of many pages takes several steps, small ones share a step."""
        first = 0
        while first < len(self._pages.layers):
            windowed = self._pages.layers[first].windowed
            count = n_window_pages if windowed else n_pages
            last = self._last_together(first, count)
            for page in range(0, count, self._half_pages):
                yield _Step(range(first, last), slice(page, min(page + self._half_pages, count)), windowed)
            first = last

    def _last_together(self, first: int, n_pages: int) -> int:
        """Where the layers from the first on end that are copied at once: equal in size and distance, and small."""
        layers, last = self._pages.layers, first + 1
        kind = layers[first].page_bytes, layers[first].windowed
        while last < len(layers) and (last + 1 - first) * n_pages * kind[0] <= self._together_bytes:
            distance = layers[last].offset - layers[last - 1].offset
            alike = (layers[last].page_bytes, layers[last].windowed) == kind
            if not alike or distance != layers[first + 1].offset - layers[first].offset:
                break
            last += 1
        return last

    def _copy(self, half: int, step: _Step, places: torch.Tensor) -> _Copied:
        page_bytes, n_pages = self._pages.layers[step.layers[0]].page_bytes, step.pages.stop - step.pages.start
        shape = (len(step.layers), n_pages, page_bytes)
        rows = self._halves[half][: shape[0] * shape[1] * shape[2]].view(shape)
        if n_pages < len(places):
            places = places[step.pages]
        if (projected := self._projected[half]) is not None:
            self._copying.wait(projected)
        with self._copying.active():
            self._copier.copy(self._pages, step.layers, places, rows)
        return _Copied(step, half, rows, self._copying.record())

    def _project(self, index: int, copied: _Copied, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """On the projecting stream, which is the current one."""
        layers, page_tokens, part = self._pages.layers, self._pages.page_tokens, copied.step.pages
        begin, end, n_tokens = part.start * page_tokens, part.stop * page_tokens, len(positions)
        if end - begin < n_tokens:
            positions, slots = positions[begin:end], slots[begin:end]
        self._projecting.wait(copied.event)
        for place, layer in enumerate(copied.step.layers):
            stored = layers[layer]
            typed = copied.rows[place].view(stored.dtype).view(end - begin, -1)
            stored.projector.project(layer, typed, positions, slots)
            event = self._projecting.record(timed=end == n_tokens and layer == len(layers) - 1)
            if end == n_tokens:
                self._events.restored(index, event)
        self._projected[copied.half] = event


def _to(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """On the device, without a wait."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def restorer_for(
    pages: HostPages,
    device: str,
    forward_stream: torch.cuda.Stream | None,
    events: LayerEvents,
    *,
    pinned: bool,
    engine: bool = True,
    copier: Copier | None = None,
) -> Restorer:
    """A restorer on streams of its own, behind what SGLang's two streams do now.

    pinned: whether the GPU can read the pages' memory by itself. engine: whether its copy engine may. copier: in the
    place of the one that fits these.
    """
    copying = new_stream(device, urgency=2)  # a kernel's few blocks fill the bus, if they are let in
    return Restorer(
        pages,
        device=device,
        copier=copier or (copier_of(pages, device, copying, engine=engine) if pinned else IndexCopier()),
        copying=copying,
        projecting=new_stream(device, urgency=1),
        before=[current_stream(device), current_stream(device, forward_stream)],
        events=events,
        staging=Staging.on(device),
    )


def copier_of(
    pages: HostPages, device: str, stream: Stream, *, engine: bool = True
) -> EngineElseKernel | KernelCopier:
    """The copy engine for large pages, if it may; else the kernel. It has copied one of them."""
    if engine and min(layer.page_bytes for layer in pages.layers) >= ENGINE_PAGE_BYTES:
        try:
            first = EngineCopier()
            _copy_a_page(first, pages, device, stream)
        except NoCopyEngine as error:
            logger.warning("hcache: pages are copied by a kernel, beside which forwards are slower: %s", error)
        else:
            return EngineElseKernel(first)
    kernel = KernelCopier()
    _copy_a_page(kernel, pages, device, stream)
    return kernel


def _copy_a_page(copier: Copier, pages: HostPages, device: str, stream: Stream) -> None:
    """A layer of each size: for each a kernel is compiled, which no request is to wait for."""
    of_each_size = {stored.page_bytes: layer for layer, stored in enumerate(pages.layers)}
    with stream.active():
        places = _to("cpu" if copier.indexed_on == "cpu" else device, copier.places(pages, [0]))
        for page_bytes, layer in of_each_size.items():
            target = torch.empty(1, 1, page_bytes, dtype=torch.uint8, device=device)
            copier.copy(pages, range(layer, layer + 1), places, target)
    stream.record().synchronize()
