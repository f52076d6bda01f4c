"""Capture: the input of every layer's attention, copied out of the forward as it runs.

A pre-hook on each attention module copies its input to the same rows of a staging buffer, in token order, so
that a captured CUDA graph holds the same copies as an eager forward. After the forward the rows go to a sink.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from sglang_hcache.model import AttentionSite

logger = logging.getLogger(__name__)


class CaptureSink(Protocol):
    """Where captured rows go. Called on the scheduler's thread, right after each forward."""

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows of one forward: `slots` int64 `[n]`, `positions` int64 `[n]`, `rows` `[layers, n, width]`.

        `rows` is the staging buffer: valid until the next forward is issued on the same stream.
        """

    def drop(self, slots: torch.Tensor) -> None:
        """Whatever is held of these device slots is overwritten by a forward that was not captured."""


class Capture:
    """The staging buffer, `[layers, rows, width]` on the device, and the hooks that fill it."""

    def __init__(
        self, sites: Sequence[AttentionSite], *, rows: int, width: int, dtype: torch.dtype, device: str
    ) -> None:
        self.sites = tuple(sites)
        self.sink: CaptureSink | None = None
        self._staging = torch.empty((len(sites), rows, width), dtype=dtype, device=device)
        self._rows_seen = [0] * len(sites)
        self._usable = True  # until a module is called with something other than `[tokens, width]`
        self._hooks: list[RemovableHandle] = [
            site.module.register_forward_pre_hook(partial(self._stage, index), with_kwargs=True)
            for index, site in enumerate(sites)
        ]

    def remove(self) -> None:
        """Take the hooks off. The buffer stays on a GPU: a graph captured before goes on writing into it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._staging.device.type == "cpu":
            self._staging = self._staging.new_empty(0)
        self.sink = None

    def _stage(self, index: int, _module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        hidden = self.sites[index].hidden_states(args, kwargs)
        if hidden.shape[1:] != self._staging.shape[2:]:
            self._usable = False
            return
        # A graph's padding may go beyond the buffer; the rows before it are valid all the same.
        rows = min(hidden.shape[0], self._staging.shape[1])
        self._staging[index, :rows].copy_(hidden[:rows])
        self._rows_seen[index] = rows

    def before_forward(self) -> None:
        self._rows_seen = [0] * len(self.sites)

    def after_forward(self, slots: torch.Tensor, positions: torch.Tensor, *, from_graph: bool) -> None:
        """Hand the rows of the forward that was just issued to the sink.

        slots, positions: int64 `[n]`, without padding. A graph's replay runs no Python, so there the rows are
        taken to be as its capture left them.
        """
        if self.sink is None:
            return
        count = slots.numel()
        complete = from_graph or min(self._rows_seen) >= count
        if self._usable and complete and count <= self._staging.shape[1]:
            self.sink.write(slots, positions, self._staging[:, :count])
        else:
            self.sink.drop(slots)
