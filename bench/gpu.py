"""What the GPU benches share: timing on the device, its ceilings, what GPU it is. Torch and Triton suffice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from bench import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 2
HEAD_START_CYCLES = 10_000_000  # about five milliseconds


def seconds(work: Callable[[], object], *, rounds: int = 7, calls: int = 1) -> float:
    """Median of the device's time for `work`, each round between two events; on a CPU, the caller's time.

    calls: in a row between the events, so that the device need not wait for the launches of short work.
    """

    def in_a_row() -> None:
        for _ in range(calls):
            work()

    return statistics.median([_once(in_a_row) for _ in range(WARM_UP + rounds)][WARM_UP:]) / calls


def _once(work: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)  # the caller's launches are ahead of the device from the beginning
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1000


def noise(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values on the device."""
    return torch.randn(*shape, dtype=dtype, device=DEVICE) * scale


def host_to_device_gb_s(n_bytes: int) -> float:
    """The copy engine's rate from pinned memory."""
    source = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    target = torch.empty(n_bytes, dtype=torch.uint8, device=DEVICE)
    return n_bytes / seconds(lambda: target.copy_(source, non_blocking=True)) / 1e9


def device_copy_gb_s(n_bytes: int) -> float:
    """Bytes read and bytes written, a second."""
    source, target = (torch.empty(n_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * n_bytes / seconds(lambda: target.copy_(source)) / 1e9


def about(doc: str | None) -> dict[str, Any]:
    """As the other benches' reports have it, and which GPU and what drives it."""
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    return report.about(doc, machine={"gpu": gpu, "capability": capability()}, versions=versions)


def capability() -> int:
    if DEVICE == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
