"""Chunks that the kernel and the copy engine copy are those that torch copies."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sglang_hcache.device.streams import ImmediateStream
from sglang_hcache.restoring import copiers, copy_engine
from sglang_hcache.restoring.copiers import (
    Copier,
    EngineCopier,
    EngineElseKernel,
    IndexCopier,
    KernelCopier,
    copier_of,
)
from sglang_hcache.restoring.copy_engine import AT_ONCE, Attributes, BatchFunction, CopyEngine, NoCopyEngine
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.triton_kernels import rows
from tests.triton_kernels.driver import batch

PAGE_BYTES, DISTANCE, LAYERS, CHUNKS = 320, 512, 4, 9
STREAM = 77


class Stream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    current = Stream(STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    return current


def host_pages() -> HostPages:
    memory = torch.randint(0, 256, (CHUNKS, 4096), dtype=torch.uint8)
    return HostPages(
        memory,
        memory.numpy()[:, :16].view("int32"),
        [StoredLayer(64 + DISTANCE * layer, PAGE_BYTES, torch.uint8, None) for layer in range(LAYERS)],  # type: ignore[arg-type]
    )


COPIERS: dict[str, Callable[[], Copier]] = {
    "kernel": lambda: KernelCopier(programs=3),
    "large kernel": lambda: KernelCopier(programs=1, warps=1),
    "engine": lambda: EngineCopier(CopyEngine(batch)),
    "engine, else kernel": lambda: EngineElseKernel(EngineCopier(CopyEngine(batch))),
}


@pytest.mark.parametrize("layers", [range(1, 2), range(0, 4), range(2, 4)])
@pytest.mark.parametrize("copier", COPIERS)
def test_every_copier_copies_what_torch_copies(copier: str, layers: range, stream: Stream) -> None:
    pages, copiers = host_pages(), [IndexCopier(), COPIERS[copier]()]
    for numbers in ([3, 8], [3, 8, 0, 3], [5, 8, 1]):
        copies = [torch.full((len(layers), len(numbers), PAGE_BYTES), 7, dtype=torch.uint8) for _ in range(2)]
        for each, target in zip(copiers, copies, strict=True):
            each.copy(pages, layers, each.places(pages, numbers), target)
        assert torch.equal(*copies)
        assert torch.equal(copies[0][0, 1], pages.memory[8, 64 + DISTANCE * layers[0] :][:PAGE_BYTES])


def test_parts_of_the_places_copy_parts_of_the_chunks(stream: Stream) -> None:
    """And nothing is written beside the target."""
    pages, copier = host_pages(), EngineCopier(CopyEngine(batch))
    memory = torch.full((5, PAGE_BYTES), 7, dtype=torch.uint8)
    copier.copy(pages, range(3, 4), copier.places(pages, [4, 0, 6, 2, 5])[1:4], memory[1:4][None])
    expected = torch.full_like(memory, 7)
    expected[1:4] = pages.memory[[0, 6, 2], 64 + 3 * DISTANCE :][:, :PAGE_BYTES]
    assert torch.equal(memory, expected)


def test_attributes_lie_as_in_cudas_header() -> None:
    """`CUmemcpyAttributes` of cuda.h 13.0: an enumeration, two locations of an enumeration and an int, flags."""
    assert ctypes.sizeof(Attributes) == 24
    fields = (Attributes.source_order, Attributes.source, Attributes.target, Attributes.flags)
    assert [field.offset for field in fields] == [0, 4, 12, 20]


def test_many_copies_are_several_calls(stream: Stream) -> None:
    asked: list[int] = []

    @BatchFunction
    def counted(*arguments):
        asked.append(arguments[3])
        assert [arguments[5][copy] for copy in range(arguments[3])] == [0] * arguments[3]
        return batch(*arguments)

    source = torch.randint(0, 256, (2 * AT_ONCE + 3, 24), dtype=torch.uint8)
    target = torch.zeros_like(source)
    sources, targets = (each.data_ptr() + 24 * np.arange(len(source)) for each in (source, target))
    CopyEngine(counted).copy(targets, sources, 24, STREAM)
    assert torch.equal(source, target)
    assert asked == [AT_ONCE, AT_ONCE, 3]


def test_a_refusal_says_which_copy(stream: Stream) -> None:
    engine = CopyEngine(batch)
    addresses = np.array([0], np.int64)
    with pytest.raises(NoCopyEngine, match="error 1 at copy 0 of 1"):
        engine.copy(addresses, addresses, 8, STREAM)


# ---- which copier is used ----


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_engine, "_of_driver", lambda: batch)


def test_large_pages_are_for_the_engine(driver: None, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(copier_of(host_pages(), "cpu", ImmediateStream()), KernelCopier)
    monkeypatch.setattr(copiers, "ENGINE_PAGE_BYTES", PAGE_BYTES)
    assert isinstance(copier_of(host_pages(), "cpu", ImmediateStream()), EngineElseKernel)
    assert isinstance(copier_of(host_pages(), "cpu", ImmediateStream(), copy_engine=False), KernelCopier)


def test_an_engine_that_refuses_a_later_call_is_not_asked_again(
    stream: Stream, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel copies the same pages in its place: no load fails."""
    calls = list[int]()

    @BatchFunction
    def tired(*arguments):
        calls.append(arguments[3])
        return batch(*arguments) if len(calls) < 2 else 1

    pages, copier = host_pages(), EngineElseKernel(EngineCopier(CopyEngine(tired)))
    places, layers = copier.places(pages, [7, 1, 4]), range(1, 3)
    wanted = torch.empty(2, 3, PAGE_BYTES, dtype=torch.uint8)
    IndexCopier().copy(pages, layers, torch.tensor([7, 1, 4]), wanted)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            target = torch.zeros_like(wanted)
            copier.copy(pages, layers, places, target)
            assert torch.equal(target, wanted)
    assert len(calls) == 2
    (record,) = caplog.records
    assert "from now on pages are copied by a kernel" in record.getMessage()


def test_an_engine_that_fails_leaves_it_to_the_kernel(
    driver: None, stream: Stream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copiers, "ENGINE_PAGE_BYTES", PAGE_BYTES)
    stream.cuda_stream = 0
    with caplog.at_level(logging.WARNING):
        assert isinstance(copier_of(host_pages(), "cpu", ImmediateStream()), KernelCopier)
    (record,) = caplog.records
    assert "copied by a kernel" in record.getMessage()
    assert "error 1" in record.getMessage()


def test_no_request_waits_for_the_kernel_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for each size of a layer's page."""
    pages = host_pages()
    larger = dataclasses.replace(pages.layers[0], page_bytes=2 * DISTANCE)
    pages = dataclasses.replace(pages, layers=[*pages.layers[2:], larger])
    copied, original = list[torch.Tensor](), rows.copy_rows

    def copy_rows(source: torch.Tensor, offsets: torch.Tensor, target: torch.Tensor, **how: int) -> None:
        original(source, offsets, target, **how)
        copied.append(target)

    monkeypatch.setattr(rows, "copy_rows", copy_rows)
    copier_of(pages, "cpu", ImmediateStream())
    expected = [pages.memory[0, layer.offset :][: layer.page_bytes] for layer in pages.layers[1:]]
    assert [target.flatten().tolist() for target in copied] == [page.tolist() for page in expected]


class Driver:
    """libcuda of a version, on a device where registered memory has the host's addresses, or not."""

    def __init__(self, version: int, *, addressable: bool) -> None:
        self._version, self._addressable = version, addressable

    def cuGetProcAddress_v2(self, name, found, version, flags, status):
        assert name == b"cuMemcpyBatchAsync"
        if version > self._version:
            return 1
        found._obj.value = ctypes.cast(batch, ctypes.c_void_p).value
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = int(self._addressable)
        return 0


@pytest.mark.parametrize(
    ("driver", "refusal"),
    [
        (Driver(13000, addressable=True), None),
        (Driver(12080, addressable=True), None),
        (Driver(12040, addressable=True), "older than 12.8"),
        (Driver(13000, addressable=False), "other addresses"),
        (object(), "no attribute"),
        (None, "libcuda"),
    ],
)
def test_the_drivers_function(driver: object, refusal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if refusal is not None:
        with pytest.raises(NoCopyEngine, match=refusal):
            CopyEngine()
        return
    source, target = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    targets, sources = (np.array([tensor.data_ptr()]) for tensor in (target, source))
    CopyEngine().copy(targets, sources, 64, STREAM)
    assert torch.equal(source, target)
