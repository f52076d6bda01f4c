"""Restore: chunks in host memory become K and V on the device, layer by layer, ahead of the forward.

Two streams: one copies a few layers' rows of all pages into a staging buffer, as far ahead as that has room, while
the other projects what is there into the pool. Needs torch and numpy only, and Triton where a kernel copies chunks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sglang_hcache.device.ring import ALIGNMENT, Ring
from sglang_hcache.device.streams import COPY_BYTES, Event, Stream, current_stream, new_stream
from sglang_hcache.restoring.copiers import Copier, IndexCopier, copier_of, to_device
from sglang_hcache.restoring.host_pages import HostPages
from sglang_hcache.restoring.layer_events import LayerEvents


@dataclass(frozen=True)
class Staging:
    """How much is copied at once."""

    half_rows: int  # at once, in half of the buffer; on a GPU they bound its size, on a CPU rows stay in the caches
    together_bytes: int  # layers of a small load are copied together, up to so much

    @classmethod
    def on(cls, device: str) -> Staging:
        if torch.device(device).type == "cpu":
            return cls(half_rows=1024, together_bytes=0)
        return cls(half_rows=8192, together_bytes=4 << 20)  # a launch takes as long as 100 KB on the bus


@dataclass(frozen=True)
class Load:
    """One request's accepted load: the chunk in `store_slots[i]` goes to the device slots of its page."""

    rid: str
    store_slots: tuple[int, ...]  # leased by `rid`
    device_slots: torch.Tensor  # int64 `[pages × page_tokens]`
    window_slots: torch.Tensor | None = None  # likewise, of its last pages, for windowed layers


class _Step(NamedTuple):
    """What is copied at once, and then projected."""

    layers: range
    pages: slice
    windowed: bool  # of the pages of windows


class _Copied(NamedTuple):
    """A step's rows, uint8 `[layers, pages, page_bytes]`: in the staging buffer, from the event on."""

    step: _Step
    rows: torch.Tensor
    event: Event


class Restorer:
    """Runs the queued loads of a batch together, layer by layer.

    Projection waits for the work queued on the streams `before`, which may still read the slots; copies start at
    once. `run` does not block the caller, except with an `IndexCopier` on a GPU.
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
        buffer: torch.Tensor | None = None,
    ) -> None:
        """buffer: of another restorer, of pages of the same layout, that is not used any more."""
        self._pages = pages
        self._device = device
        self._copier = copier
        self._copying, self._projecting, self._before = copying, projecting, before
        self._events = events
        self._half_pages = max(1, staging.half_rows // pages.page_tokens)
        half_bytes = self._half_pages * max(layer.page_bytes for layer in pages.layers)
        self._together_bytes = min(staging.together_bytes, half_bytes)
        if buffer is None:
            buffer = torch.empty(2 * -(-half_bytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8, device=device)
        self.buffer = buffer
        self._ring = Ring(buffer, copying)
        self._not_ended = 0  # bytes copied since the last `end_copy`
        for stream in before:  # their memory may have been another tensor's
            copying.wait(stream.record())

    def run(self, loads: Sequence[Load]) -> int:
        """Issue the restoration of all loads; returns the batch's index for `events`.

        If it raises, nothing of the batch is in flight any more, so what it reads may be released.
        """
        index = self._events.new_batch()
        chunks = [chunk for load in loads for chunk in load.store_slots]
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
            self._events.drop(index)
            raise
        return index

    def measure(self, n_pages: int, *, repeats: int) -> tuple[float, float]:
        """Return the seconds to copy, and to project, `n_pages` pages of the first layer: the least of `repeats`.

        Overwrites the pool's first slots: call it only before requests are served.
        """
        n_pages = min(n_pages, self._half_pages, len(self._pages.memory))
        step = _Step(range(1), slice(0, n_pages), windowed=False)
        places = self._places(range(n_pages))
        with self._projecting.active():
            slots = torch.arange(n_pages * self._pages.page_tokens, device=self._device)
            positions = torch.zeros_like(slots)
        stored, copies, projections = self._pages.layers[0], [], []
        for _ in range(repeats + 1):
            self._copying.delay()
            copying = self._copying.record(timed=True)
            rows = self._copy(step, places).rows
            copied = self._copying.record(timed=True)
            self._projecting.wait(copied)
            self._projecting.delay()
            projecting = self._projecting.record(timed=True)
            with self._projecting.active():
                typed = rows[0].view(stored.dtype).view(len(slots), -1)
                stored.projector.project(0, typed, positions, slots)
            projected = self._projecting.record(timed=True)
            self._ring.sent(projected)
            projected.synchronize()
            copies.append(copying.elapsed_time(copied) / 1000)
            projections.append(projecting.elapsed_time(projected) / 1000)
        return min(copies[1:]), min(projections[1:])

    def _window(self, load: Load) -> Sequence[int]:
        """Its chunks that windowed layers are restored of."""
        if load.window_slots is None:
            return ()
        return load.store_slots[-(len(load.window_slots) // self._pages.page_tokens) :]

    def _positions(self, chunks: Sequence[int]) -> torch.Tensor:
        host_positions = self._pages.positions[chunks].astype(np.int64).reshape(-1)
        return to_device(self._device, torch.from_numpy(host_positions))

    def _places(self, chunks: Sequence[int]) -> torch.Tensor:
        with self._copying.active():
            return to_device(self._copier.indexed_on, self._copier.places(self._pages, chunks))

    def _copies(self, chunks: Sequence[int], windows: Sequence[int]) -> Iterator[_Copied]:
        """The batch's steps in order, each issued when it is asked for."""
        places = self._places(chunks)
        of_windows = self._places(windows) if windows else places
        for step in self._steps(len(chunks), len(windows)):
            yield self._copy(step, of_windows if step.windowed else places)

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
        """Return the end of the layers from `first` on to copy at once: equal in size and spacing, and small."""
        layers, last = self._pages.layers, first + 1
        kind = layers[first].page_bytes, layers[first].windowed
        while last < len(layers) and (last + 1 - first) * n_pages * kind[0] <= self._together_bytes:
            distance = layers[last].offset - layers[last - 1].offset
            alike = (layers[last].page_bytes, layers[last].windowed) == kind
            if not alike or distance != layers[first + 1].offset - layers[first].offset:
                break
            last += 1
        return last

    def _copy(self, step: _Step, places: torch.Tensor) -> _Copied:
        page_bytes, n_pages = self._pages.layers[step.layers[0]].page_bytes, step.pages.stop - step.pages.start
        shape = (len(step.layers), n_pages, page_bytes)
        rows = self._ring.take(math.prod(shape)).view(shape)
        if n_pages < len(places):
            places = places[step.pages]
        with self._copying.active():
            self._copier.copy(self._pages, step.layers, places, rows)
        self._not_ended += rows.nbytes
        if self._not_ended >= COPY_BYTES:  # before the event, or the product that it starts would delay this kernel
            self._copying.end_copy()
            self._not_ended = 0
        return _Copied(step, rows, self._copying.record())

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
        self._ring.sent(event)


def restorer_for(
    pages: HostPages,
    device: str,
    forward_stream: torch.cuda.Stream | None,
    events: LayerEvents,
    *,
    pinned: bool,
    copy_engine: bool = True,
    copier: Copier | None = None,
    buffer: torch.Tensor | None = None,
) -> Restorer:
    """Make a restorer with streams of its own, whose projection waits for SGLang's two streams.

    pinned: whether the GPU can read the pages' memory directly. copy_engine: whether the copy engine may be used.
    copier: overrides the one that these two select. buffer: see `Restorer`.
    """
    copying = new_stream(device, urgency=2)  # a kernel's few blocks fill the bus, if they are let in
    return Restorer(
        pages,
        device=device,
        copier=copier or (copier_of(pages, device, copying, copy_engine=copy_engine) if pinned else IndexCopier()),
        copying=copying,
        projecting=new_stream(device, urgency=1),
        before=[current_stream(device), current_stream(device, forward_stream)],
        events=events,
        staging=Staging.on(device),
        buffer=buffer,
    )
