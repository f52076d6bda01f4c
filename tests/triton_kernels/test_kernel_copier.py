"""Chunks copied by the kernel are those that torch copies."""

from __future__ import annotations

import pytest
import torch

from sglang_hcache.restore import Copier, HostPages, IndexCopier, KernelCopier, StoredLayer

PAGE_BYTES, DISTANCE, LAYERS, CHUNKS = 320, 512, 4, 9


@pytest.mark.parametrize("layers", [range(1, 2), range(0, 4), range(2, 4)])
def test_the_kernel_copies_what_torch_copies(layers: range) -> None:
    memory = torch.randint(0, 256, (CHUNKS, 4096), dtype=torch.uint8)
    pages = HostPages(
        memory,
        memory.numpy()[:, :16].view("int32"),
        [StoredLayer(64 + DISTANCE * layer, PAGE_BYTES, torch.uint8, None) for layer in range(LAYERS)],  # type: ignore[arg-type]
    )
    copiers: list[Copier] = [IndexCopier(), KernelCopier(programs=3)]
    for numbers in ([3, 8], [3, 8, 0, 3], [5, 8, 1]):
        copies = [torch.full((len(layers), len(numbers), PAGE_BYTES), 7, dtype=torch.uint8) for _ in range(2)]
        for copier, target in zip(copiers, copies, strict=True):
            copier.copy(pages, layers, copier.places(pages, numbers), target)
        assert torch.equal(*copies)
        assert torch.equal(copies[0][0, 1], memory[8, 64 + DISTANCE * layers[0] :][:PAGE_BYTES])
