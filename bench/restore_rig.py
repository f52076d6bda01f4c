"""The real `Restorer` over an arena of random activations, into pools of random weights: to time, and to check."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from bench.exactness import POSITIONS, errors, misplaced, pool_of, projection_of
from bench.gpu import DEVICE, WARM_UP, capability, noise
from bench.toy_model import Model
from sglang_hcache.device.pinning import PinnedMemory
from sglang_hcache.device.streams import current_stream, new_stream
from sglang_hcache.restoring.copiers import Copier
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import Load, Restorer, Staging, restorer_for
from sglang_hcache.triton_kernels.project_kv import project_kv
from sglang_hcache.triton_kernels.rows import scatter_kv
from sglang_hcache.triton_kernels.tuning import choose

PAGE_TOKENS = 64
HEADER_BYTES = 4096
CHECKED_PAGES = 4
SPARE = 1.25  # slots of the pool for each token that is restored: some must stay as they are


class Arena:
    """Shared memory, registered with CUDA, full of normal values: the chunks of whichever model looks at it."""

    def __init__(self, n_bytes: int, dtype: torch.dtype) -> None:
        file = os.memfd_create("bench-arena")
        os.ftruncate(file, n_bytes)
        self.memory = torch.frombuffer(mmap.mmap(file, n_bytes), dtype=torch.uint8)
        os.close(file)
        self.took_s: dict[str, float] = {}
        with self._timed("zero"):
            self.memory.zero_()  # the system finds all pages now, not while CUDA holds its locks
        with self._timed("register"):
            self._registered = PinnedMemory(self.memory[None])  # as a whole: copies go anywhere
        self.pinned = self._registered.pinned
        values = self.memory.view(dtype)
        with self._timed("fill"):
            for part in values.split(min(len(values), 128 << 20)):
                part.copy_(noise(len(part), dtype=dtype))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.took_s[name] = time.perf_counter() - began

    def chunks(self, record_bytes: int) -> torch.Tensor:
        slots = len(self.memory) // record_bytes
        return self.memory[: slots * record_bytes].view(slots, record_bytes)

    def close(self) -> None:
        if DEVICE == "cuda":
            with contextlib.suppress(RuntimeError):  # a device that is lost copies nothing any more
                torch.cuda.synchronize()
        self._registered.release()
        self.pinned = False


class HiddenPool:
    """Each layer's projection, and the pool that it fills."""

    def __init__(self, model: Model, slots: int, dtype: torch.dtype) -> None:
        first = projection_of(model.shape, dtype)
        others = (noise(*first.weight.shape, dtype=dtype, scale=model.shape.width**-0.5) for _ in range(model.layers))
        self.projections = [dataclasses.replace(first, weight=weight) for weight in others]
        self.buffers = [pool_of(model.shape, slots, dtype) for _ in range(model.layers)]
        self._capability = capability()

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        projection = self.projections[layer]
        fused = choose(projection.shape, len(rows), self._capability)
        project_kv(rows, projection, positions, slots, *self.buffers[layer], fused=fused)

    def check(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> dict[str, float]:
        """Against float64: the error of what is in the slots, over that of the forward's own K and V."""
        found = errors(rows, self.projections[layer], positions, *(part[slots] for part in self.buffers[layer]))
        return {"error_ratio": found["ratio"]}


class KVPool:
    """The pool of a model whose K and V are stored."""

    def __init__(self, model: Model, slots: int, dtype: torch.dtype) -> None:
        self.buffers = [pool_of(model.shape, slots, dtype) for _ in range(model.layers)]

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        scatter_kv(rows, slots, self.buffers[layer])

    def check(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> dict[str, float]:
        stored = torch.cat([part[slots].flatten(1) for part in self.buffers[layer]], dim=1)
        return {"differing": float((stored != rows).sum())}


class Took(NamedTuple):
    """Seconds of a restore."""

    device_s: float  # from its issue until the forward could read the last layer
    caller_s: float
    beside_s: float  # of a copy of four bytes to the device, issued right after; 0 on a CPU


class Rig:
    """A model's layers in the arena, as hidden states or K and V, a pool for up to `tokens`, and a restorer."""

    def __init__(self, arena: Arena, model: Model, tokens: int, dtype: torch.dtype, *, kv: bool) -> None:
        self._slots = int(SPARE * tokens) // PAGE_TOKENS * PAGE_TOKENS
        row_bytes = model.kv_row_bytes(dtype) if kv else model.row_bytes(dtype)
        page_bytes = PAGE_TOKENS * row_bytes
        self.bytes_a_token = model.layers * row_bytes
        self.pool = (KVPool if kv else HiddenPool)(model, self._slots, dtype)
        memory = arena.chunks(HEADER_BYTES + model.layers * page_bytes)
        self._pages = HostPages(
            memory,
            np.arange(len(memory) * PAGE_TOKENS, dtype=np.int32).reshape(-1, PAGE_TOKENS) % POSITIONS,
            [StoredLayer(HEADER_BYTES + page_bytes * i, page_bytes, dtype, self.pool) for i in range(model.layers)],
        )
        self._pinned = arena.pinned
        self._random = np.random.default_rng(0)
        if DEVICE == "cuda":
            self._beside, self._small = torch.cuda.Stream(), torch.empty(1, dtype=torch.int32, device=DEVICE)
            self._small_host = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.use()

    @staticmethod
    def bytes_needed(model: Model, tokens: int, dtype: torch.dtype) -> int:
        """On the device, with some room for what the allocator leaves unused."""
        weights = model.layers * model.kv_row_bytes(dtype) * model.shape.width
        return int(1.1 * (SPARE * tokens * model.layers * model.kv_row_bytes(dtype) + weights)) + (2 << 30)

    def use(self, copier: Copier | None = None) -> None:
        """A restorer as the server makes it, or with another copier."""
        self._events = LayerEvents(current_stream(DEVICE), len(self._pages.layers))
        self._restorer = restorer_for(self._pages, DEVICE, None, self._events, pinned=self._pinned, copier=copier)

    def load(self, tokens: int) -> Load:
        """Chunks and pages of the pool in no order; chunks come again where the arena has too few."""
        pages = tokens // PAGE_TOKENS
        repeats = -(-pages // len(self._pages.memory))
        chunks = np.concatenate([self._random.permutation(len(self._pages.memory)) for _ in range(repeats)])[:pages]
        places = torch.randperm(self._slots // PAGE_TOKENS, device=DEVICE)[:pages]
        slots = (places[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=DEVICE)).flatten()
        return Load("bench", tuple(chunks.tolist()), slots)

    def run(self, load: Load) -> Took:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        began = time.perf_counter()
        index = self._restorer.run([load])
        caller_s = time.perf_counter() - began
        if DEVICE == "cpu":
            return Took(caller_s, caller_s, 0.0)
        with torch.cuda.stream(self._beside):
            issued, beside = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            issued.record()
            self._small.copy_(self._small_host, non_blocking=True)
            beside.record()
        self._events.set_consumer(index)
        self._events.wait_until(len(self._pages.layers) - 1)
        end.record()
        torch.cuda.synchronize()
        self._events.synchronize(index)
        return Took(begin.elapsed_time(end) / 1000, caller_s, issued.elapsed_time(beside) / 1000)

    def times(self, tokens: int, rounds: int = 7) -> dict[str, float]:
        loads = itertools.cycle([self.load(tokens) for _ in range(3)])
        took = [self.run(next(loads)) for _ in range(WARM_UP + rounds)][WARM_UP:]
        device = sorted(1e3 * one.device_s for one in took)
        beside = {"beside_ms": 1e3 * statistics.median(one.beside_s for one in took)} if DEVICE == "cuda" else {}
        return beside | {
            "ms": statistics.median(device),
            "fastest_ms": device[0],
            "slowest_ms": device[-1],
            "caller_ms": 1e3 * statistics.median(one.caller_s for one in took),
        }

    def check(self, tokens: int) -> dict[str, float]:
        """Restore once into poisoned pools. Some layers: all slots; and some pages' values against a reference."""
        load = self.load(tokens)
        layers = sorted({0, len(self.pool.buffers) // 2, len(self.pool.buffers) - 1})
        for part in itertools.chain(*(self.pool.buffers[layer] for layer in layers)):
            part.fill_(torch.nan)
        self.run(load)
        found: dict[str, float] = {"unwritten": 0, "strayed": 0}
        for layer in layers:
            for part in self.pool.buffers[layer]:
                unwritten, strayed = misplaced(part, load.device_slots)
                found["unwritten"] += unwritten
                found["strayed"] += strayed
            for name, value in self.pool.check(layer, *self._sample(load, layer)).items():
                found[name] = float(np.maximum(found.get(name, 0.0), value))  # NaN, if one is
        return found

    def _sample(self, load: Load, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, positions and slots of a few of the load's pages, read in the arena."""
        stored = self._pages.layers[layer]
        picked = self._random.permutation(len(load.store_slots))[:CHECKED_PAGES].tolist()
        chunks = [load.store_slots[index] for index in picked]
        payload = self._pages.memory[chunks, stored.offset : stored.offset + stored.page_bytes]
        rows = payload.view(stored.dtype).view(len(picked) * PAGE_TOKENS, -1).to(DEVICE)
        positions = torch.from_numpy(self._pages.positions[chunks].astype(np.int64)).flatten().to(DEVICE)
        return rows, positions, load.device_slots.view(-1, PAGE_TOKENS)[picked].flatten()


class _Nothing:
    """Copies and projects nothing: what is left is the pipeline's own time."""

    indexed_on = DEVICE

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(chunks)

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        pass

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        pass


def pipeline_ms(layers: int, requests: Sequence[int], rounds: int = 50) -> float:
    """The caller's time of `Restorer.run` for a batch with so many pages a request, where nothing is done.

    Rows are small: of larger ones, kernels that end copies would be launched.
    """
    nothing, page_bytes = _Nothing(), PAGE_TOKENS * 2
    pages = HostPages(
        torch.empty(0, dtype=torch.uint8),
        np.zeros((sum(requests), PAGE_TOKENS), np.int32),
        [StoredLayer(page_bytes * layer, page_bytes, torch.bfloat16, nothing) for layer in range(layers)],
    )
    events, ends = LayerEvents(current_stream(DEVICE), layers), list(itertools.accumulate(requests))
    restorer = Restorer(
        pages, device=DEVICE, copier=nothing, copying=new_stream(DEVICE), projecting=new_stream(DEVICE),
        before=[current_stream(DEVICE)], events=events, staging=Staging(half_rows=8192, together_bytes=0),
    )  # fmt: skip
    loads = [
        Load(str(end), tuple(range(end - count, end)), torch.arange(count * PAGE_TOKENS, device=DEVICE))
        for count, end in zip(requests, ends, strict=True)
    ]
    took = []
    for _ in range(WARM_UP + rounds):
        began = time.perf_counter()
        index = restorer.run(loads)
        took.append(time.perf_counter() - began)
        events.synchronize(index)
    return 1e3 * statistics.median(took[WARM_UP:])
