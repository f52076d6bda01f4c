"""The host tier as restoring reads it: where each layer's payload lies in a page, and what makes K and V of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


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
