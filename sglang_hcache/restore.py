"""Restore: chunks in host memory become K and V on the device, layer by layer, ahead of the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_hcache.projector import Projector
from sglang_hcache.storage.contract import ChunkStore
from sglang_hcache.storage.layout import positions as chunk_positions

# Tokens projected at once. On a GPU it bounds what a restore takes; on a CPU, intermediates stay in its caches.
_MAX_ROWS = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Load:
    """One request's accepted load: chunk `chunks[i]` goes to the device slots of its page."""

    rid: str
    chunks: tuple[int, ...]  # slots in the store's memory, leased by `rid`
    device_slots: torch.Tensor  # int64 `[pages × page_tokens]`


class LayerEvents:
    """SGLang's layer counter: the pool's getters ask it to wait until a layer has been restored.

    On a GPU the forward's stream waits for an event and the CPU goes on. On the CPU a restore is complete
    before the forward starts, and there is nothing to wait for.
    """

    def __init__(self) -> None:
        self._events: dict[int, list[torch.cuda.Event]] = {}
        self._consumer = -1
        self._last = -1

    def new_batch(self) -> int:
        self._last += 1
        self._events[self._last] = []
        return self._last

    def record(self, index: int) -> None:
        """The next layer of batch `index` is restored once the current stream has come this far."""
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
            self._events[index].append(event)

    def synchronize(self, index: int) -> None:
        for event in self._events.pop(index, [])[-1:]:
            event.synchronize()

    def set_consumer(self, index: int) -> None:
        self._consumer = index

    def wait_until(self, layer: int) -> None:
        events = self._events.get(self._consumer)
        if events:
            torch.cuda.current_stream().wait_event(events[layer])


class Restorer:
    """Runs the queued loads of a batch together, layer by layer, on a stream of its own where there is one."""

    def __init__(
        self,
        store: ChunkStore,
        projectors: Sequence[Projector],
        *,
        width: int,
        dtype: torch.dtype,
        device: str,
        forward_stream: torch.cuda.Stream | None,
        events: LayerEvents,
    ) -> None:
        layout = store.layout
        self._store = store
        self._projectors = projectors
        self._device = device
        self._max_rows = _MAX_ROWS[torch.device(device).type]
        memory = torch.from_numpy(store.memory).view(dtype)
        self._layer_rows = [
            memory[:, layout.layer_offset(layer) // dtype.itemsize :][:, : layout.page_tokens * width].unflatten(
                1, (layout.page_tokens, width)
            )
            for layer in range(len(projectors))
        ]
        self._stream = torch.cuda.Stream() if device.startswith("cuda") else None
        self._forward_stream = forward_stream
        self._events = events

    def run(self, loads: Sequence[Load]) -> int:
        """Issue the restoration of all loads; returns the batch's index for `events`."""
        index = self._events.new_batch()
        chunks = [chunk for load in loads for chunk in load.chunks]
        host_positions = np.concatenate(
            [chunk_positions(self._store.memory[chunk], self._store.layout) for chunk in chunks]
        )
        chunk_index = torch.tensor(chunks)
        with self._on_stream():
            positions = torch.from_numpy(host_positions.astype(np.int64)).to(self._device)
            slots = torch.cat([load.device_slots for load in loads])
            for layer, projector in enumerate(self._projectors):
                self._restore_layer(layer, projector, chunk_index, positions, slots)
                self._events.record(index)
        return index

    def _restore_layer(
        self,
        layer: int,
        projector: Projector,
        chunks: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        page_tokens = self._store.layout.page_tokens
        step = max(1, self._max_rows // page_tokens)
        for first in range(0, len(chunks), step):
            part = chunks[first : first + step]
            tokens = slice(first * page_tokens, (first + len(part)) * page_tokens)
            rows = self._layer_rows[layer][part].flatten(0, 1).to(self._device)
            projector.project(layer, rows, positions[tokens], slots[tokens])

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        if self._forward_stream is not None:  # a forward under way may still read slots that were freed since
            self._stream.wait_stream(self._forward_stream)
        return torch.cuda.stream(self._stream)
