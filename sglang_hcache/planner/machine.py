"""Rates of a machine: measured by the server, or a GPU's datasheet times the efficiencies below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class LowerTier(NamedTuple):
    """Where pages lie that are not in host memory."""

    name: str  # as a `Resource`
    bytes_per_s: float  # 0: there is none
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """Achievable rates, not those of the datasheet. A rate of `inf`, or a latency of 0, means no cost."""

    name: str
    gemm_flop_per_s: float  # of a forward pass' matrix products, one rank
    projection_flop_per_s: float  # of hidden × [W_k; W_v], one rank
    attention_flop_per_s: float  # one rank
    memory_bytes_per_s: float  # device memory, one rank
    bus_bytes_per_s: float  # host to device, one rank
    ranks: int = 1  # of tensor parallelism
    scatter_bytes_per_s: float = math.inf  # K and V that have been copied, to their slots, one rank
    bus_latency_s: float = 10e-6  # a copy's start: one a layer
    ssd_bytes_per_s: float = 0.0  # all drives; 0: there are none
    ssd_latency_s: float = 100e-6
    remote_bytes_per_s: float = 0.0  # of a store on another host, in the place of drives; 0: there is none
    remote_latency_s: float = 1e-3
    peer_bytes_per_s: float = math.inf  # between ranks, one direction
    streams: bool = False  # the lower tier feeds the running pass layer by layer; else it is read before it starts

    def __post_init__(self) -> None:
        positive = ("gemm_flop_per_s", "projection_flop_per_s", "attention_flop_per_s", "memory_bytes_per_s")
        for name in (*positive, "bus_bytes_per_s", "scatter_bytes_per_s", "peer_bytes_per_s", "ranks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def lower_tier(self) -> LowerTier:
        if self.remote_bytes_per_s:
            return LowerTier("remote", self.remote_bytes_per_s, self.remote_latency_s)
        return LowerTier("ssd", self.ssd_bytes_per_s, self.ssd_latency_s)


@dataclass(frozen=True)
class Gpu:
    """Of NVIDIA's datasheets: dense 16-bit tensor throughput with 32-bit sums, memory, host link, NVLink."""

    flop_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    pcie_generation: int
    nvlink_bytes_per_s: float = 0.0  # one direction; 0: peers talk over PCIe


# Their memory as drivers report it, less what error correction takes; of the A30 as its datasheet has it.
_MIB = 2**20
GPUS = {
    "A100-40": Gpu(312e12, 40960 * _MIB, 1555e9, 4, 300e9),
    "A100-80": Gpu(312e12, 81920 * _MIB, 2039e9, 4, 300e9),
    "H100": Gpu(989e12, 81559 * _MIB, 3350e9, 5, 450e9),
    "H100-PCIe": Gpu(756e12, 81559 * _MIB, 2000e9, 5),
    "H20": Gpu(148e12, 97871 * _MIB, 4000e9, 5, 450e9),
    "H200": Gpu(989e12, 143771 * _MIB, 4800e9, 5, 450e9),
    "B200": Gpu(2250e12, 183359 * _MIB, 8000e9, 5, 900e9),
    "L4": Gpu(121e12, 23034 * _MIB, 300e9, 4),
    "L40S": Gpu(362e12, 46068 * _MIB, 864e9, 4),
    "RTX-4090": Gpu(165.2e12, 24564 * _MIB, 1008e9, 4),
    "A30": Gpu(165e12, 24e9, 933e9, 4, 100e9),
    "A10G": Gpu(70e12, 23028 * _MIB, 600e9, 4),
}

# 16 lanes of 16 or 32 GT/s, 128b/130b.
PCIE_BYTES_PER_S = {4: 31.5e9, 5: 63.0e9}

# Stated, not fitted; docs/planner.md says why.
GEMM_EFFICIENCY = 0.70
ATTENTION_EFFICIENCY = 0.50
MEMORY_EFFICIENCY = 0.80
LINK_EFFICIENCY = 0.80


def machine_of(
    gpu: str,
    *,
    ranks: int = 1,
    drives: int = 0,
    drive_bytes_per_s: float = 0.0,
    bus_bytes_per_s: float | None = None,
    streams: bool = False,
) -> Machine:
    """A machine with a GPU of `GPUS` (else `KeyError`); drives deliver what their datasheet says of large reads."""
    sheet = GPUS[gpu]
    link = LINK_EFFICIENCY * PCIE_BYTES_PER_S[sheet.pcie_generation]
    return Machine(
        name=gpu if ranks == 1 else f"{ranks} × {gpu}",
        ranks=ranks,
        gemm_flop_per_s=GEMM_EFFICIENCY * sheet.flop_per_s,
        projection_flop_per_s=GEMM_EFFICIENCY * sheet.flop_per_s,
        attention_flop_per_s=ATTENTION_EFFICIENCY * sheet.flop_per_s,
        memory_bytes_per_s=MEMORY_EFFICIENCY * sheet.memory_bytes_per_s,
        bus_bytes_per_s=bus_bytes_per_s or link,
        ssd_bytes_per_s=drives * drive_bytes_per_s,
        peer_bytes_per_s=LINK_EFFICIENCY * sheet.nvlink_bytes_per_s or link,
        streams=streams,
    )
