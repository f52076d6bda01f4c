"""Copies chunks from host memory to the device: by torch, by the GPU's copy engine, or by a kernel.

Needs torch and numpy only, and Triton for the kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from sglang_hcache.device.streams import Stream
from sglang_hcache.restoring.copy_engine import CopyEngine, NoCopyEngine
from sglang_hcache.restoring.host_pages import HostPages

logger = logging.getLogger(__name__)

# Each copy of a batch costs the caller 0.5 µs and the engine at least as much, on top of the 1.2 µs that this many
# bytes take on the bus. Smaller pages are therefore read by a kernel. `bench.gpu_restore` measures both.
ENGINE_PAGE_BYTES = 64 << 10


class Copier(Protocol):
    indexed_on: str  # device of the places it is given

    def places(self, pages: HostPages, chunks: Sequence[int]) -> torch.Tensor:
        """Where it finds the chunks, int64 `[m]`, on the host; parts of it are given to `copy`."""

    def copy(self, pages: HostPages, layers: range, places: torch.Tensor, target: torch.Tensor) -> None:
        """Copy these layers, of equal size and spacing, of the chunks at places `[m]`, on the current stream.

        target: uint8 `[len(layers), m, page_bytes]`, on the device.
        """


class IndexCopier:
    """Copies with torch, layer by layer. On a GPU the caller waits, as the gathered rows are not in pinned memory."""

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
    """Copies with the GPU's copy engine, in a few calls for all pages and layers.

    It occupies no multiprocessor: a matrix product that runs meanwhile has all of them, as its tiling assumes.
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
    """Copies all pages and layers in one launch of a kernel, which reads pinned memory over the bus.

    programs: number of thread blocks, of `warps` warps each. A warp has 2 KiB in flight, and the bus takes about
    100 KiB (50 GB/s × 2 µs): a few large blocks saturate it and leave most multiprocessors free.
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
        offsets = to_device(str(target.device), places - pages.memory.data_ptr())
        self._kernel.copy(pages, layers, offsets, target)


def copier_of(
    pages: HostPages, device: str, stream: Stream, *, copy_engine: bool = True
) -> EngineElseKernel | KernelCopier:
    """Choose the copy engine for large pages, if allowed and available, else the kernel, and try it on a page."""
    if copy_engine and min(layer.page_bytes for layer in pages.layers) >= ENGINE_PAGE_BYTES:
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
    """Copy one layer of each size, so that no request waits for the kernel that is compiled for it."""
    of_each_size = {stored.page_bytes: layer for layer, stored in enumerate(pages.layers)}
    with stream.active():
        places = to_device("cpu" if copier.indexed_on == "cpu" else device, copier.places(pages, [0]))
        for page_bytes, layer in of_each_size.items():
            target = torch.empty(1, 1, page_bytes, dtype=torch.uint8, device=device)
            copier.copy(pages, range(layer, layer + 1), places, target)
    stream.record().synchronize()


def to_device(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """On the device, without a wait."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
