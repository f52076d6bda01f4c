"""How large the GPU bench is, and what its sections share."""

from __future__ import annotations

import gc
import itertools
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.exactness import CHECKED_TOKENS
from bench.gpu import DEVICE
from bench.restore_rig import Arena
from bench.toy_model import CHUNK, MODELS, TINY, Model

KERNELS = tuple(itertools.product((4, 8, 16, 32), (4, 16)))  # that copy: programs, and warps of each


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    models: tuple[Model, ...]
    dtype: torch.dtype
    tokens: tuple[int, ...]
    checked_tokens: int  # in the kernels' numerics
    arena_bytes: int
    copy_bytes: int  # of one copy among the ceilings
    chunk: int  # tokens of the prefill that is captured
    batch: int
    context: int
    sweep_tokens: int  # of the restores by several kernels


FULL = Scale(
    MODELS, torch.bfloat16, (256, 1024, 4096, 16384, 65536), CHECKED_TOKENS, 16 << 30, 1 << 30, CHUNK, 64, 1024, 16384
)  # fmt: skip
SMALL = Scale((TINY,), torch.float32, (64, 192), 48, 2 << 20, 1 << 16, 64, 8, 32, 64)
if DEVICE == "cuda":  # pragma: no cover
    SMALL = Scale((TINY,), torch.bfloat16, (64, 192, 1024), 48, 64 << 20, 1 << 22, 64, 8, 32, 1024)


@dataclass
class Run:
    """What sections share. They run in order; each has the results of those before it."""

    scale: Scale
    arena: Arena
    deadline: float
    sections: dict[str, Any] = field(default_factory=dict)
    lost: str = ""  # why the device takes no work any more

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def isolated(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the part says, or why it says nothing: its error says nothing of the others."""
        if self.late() or self.lost:
            return {"skipped": self.lost or "out of time"}
        try:
            return part()
        except Exception as error:  # noqa: BLE001
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        finally:
            gc.collect()
            if DEVICE == "cuda":
                self._tidy()

    def _tidy(self) -> None:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # such as an illegal address: every call fails from now on
            self.lost = f"the device is lost: {error}"

    def floors_ms(self, model: Model, tokens: int) -> dict[str, float] | None:
        """The copy's and the projection's least time, of hidden states."""
        ceilings = self.sections.get("ceilings", {})
        if "gemm" not in ceilings:
            return None
        moved = tokens * model.layers * model.row_bytes(self.scale.dtype)
        rows = ceilings["gemm"][model.name]
        at = next((row for row in rows if row["tokens"] >= tokens), rows[-1])
        return {
            "copy_ms": moved / ceilings["registered_gb_s"] / 1e6,
            "projection_ms": at["ms"] * tokens / at["tokens"] * model.layers,
        }
