"""Capture: the input of every layer's attention, copied out of the forward as it runs.

A pre-hook on each attention module has a custom operator copy its input to the same rows of a staging buffer, in
token order, so that CUDA graphs and compiled code hold the same copies as an eager forward. After the forward the
rows go to a sink; padding stays behind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from sglang_hcache.device.ring import ALIGNMENT, Ring
from sglang_hcache.device.streams import Event, current_stream

if TYPE_CHECKING:
    from sglang_hcache.codec import Codec
    from sglang_hcache.model import AttentionSite

logger = logging.getLogger(__name__)

_SPARE = 4  # the outbox has room for a full forward and 1 / _SPARE of another
_UNUSABLE = -1  # in `seen`: a module was called with something other than `[tokens, width]`

_library = torch.library.Library("hcache", "FRAGMENT")
_library.define("stage_rows(Tensor hidden, Tensor(a!) staging, Tensor(b!) seen, int layer) -> ()")


def _stage_rows(hidden: torch.Tensor, staging: torch.Tensor, seen: torch.Tensor, layer: int) -> None:
    """Copy as many leading rows of `hidden` as fit to `staging[layer]`, and set `seen[layer]` to their number.

    hidden `[n, width]`, staging `[layers, rows, width]`, seen int64 `[layers]`, on the CPU, so that a CUDA graph's
    replay does not update it.
    """
    if hidden.shape[1:] != staging.shape[2:]:
        seen[layer] = _UNUSABLE
        return
    rows = min(hidden.shape[0], staging.shape[1])
    write_rows(staging[layer, :rows], hidden[:rows])
    seen[layer] = rows


def write_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)`, but with a kernel wherever the rows consist of 8-byte words.

    torch copies contiguous memory with the copy engine. In a CUDA graph that becomes a memcpy node, whose overhead
    exceeds the time that a decode step's rows take. OR with 0 preserves every bit, even of negative zeros and NaNs.
    """
    plain = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
    if plain and _has_words(source) and _has_words(target):
        torch.bitwise_or(source.view(torch.int64), 0, out=target.view(torch.int64))
    else:
        target.copy_(source)


def _has_words(rows: torch.Tensor) -> bool:
    """Whether rows can be viewed as 8-byte words, so that a kernel moves eight bytes at a time."""
    return not (rows.shape[-1] * rows.itemsize % 8 or rows.storage_offset() * rows.itemsize % 8)


def _stage_nothing(hidden: torch.Tensor, staging: torch.Tensor, seen: torch.Tensor, layer: int) -> None:
    """What the operator returns, for a compiler: nothing."""


_library.impl("stage_rows", _stage_rows, "CompositeExplicitAutograd")
torch.library.register_fake("hcache::stage_rows", _stage_nothing, lib=_library)


class CaptureSink(Protocol):
    """Where captured rows go. Called on the scheduler's thread, right after each forward."""

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        """Take the rows of one forward: `slots` int64 `[n]`, `positions` int64 `[n]`, `rows` `[layers, n, width]`.

        With a codec, rows are uint8 `[layers, n, row_bytes]`. They are complete on the current stream. The caller
        does not overwrite them before the returned event has passed.
        """

    def drop(self, slots: torch.Tensor) -> None:
        """A forward that was not captured has overwritten these device slots: discard what is held of them."""


def capture_bytes(layers: int, *, rows: int, width: int, dtype: torch.dtype) -> int:
    """What a `Capture` takes of a GPU's memory."""
    return layers * (2 * rows + rows // _SPARE) * width * dtype.itemsize


class Capture:
    """The staging buffer, `[layers, rows, width]` on the device, and the hooks that fill it.

    On a GPU a forward's rows are moved to an outbox when it ends, and copied to the host from there while the next
    forward fills the staging buffer. The outbox has room for a full forward and some small ones: the scheduler
    issues forwards ahead of the device, when the last one's rows have not been copied yet.
    """

    def __init__(
        self, sites: Sequence[AttentionSite], *, rows: int, width: int, dtype: torch.dtype, device: str
    ) -> None:
        self.sites = tuple(sites)
        self.sink: CaptureSink | None = None
        self._codec: Codec | None = None
        self._staging = torch.empty((len(sites), rows, width), dtype=dtype, device=device)
        self._outbox = self._new_outbox()
        self._seen = torch.zeros(len(sites), dtype=torch.int64)
        self._usable = True
        self._hooks: list[RemovableHandle] = [
            site.module.register_forward_pre_hook(partial(self._stage, index), with_kwargs=True)
            for index, site in enumerate(sites)
        ]

    def keep(self, layers: int, codec: Codec | None = None) -> None:
        """From now on capture only the first `layers` layers, and encode their rows with `codec`, if there is one.

        On a GPU the staging buffer is kept, because CUDA graphs captured earlier go on writing into it.
        """
        for hook in self._hooks[layers:]:
            hook.remove()
        del self._hooks[layers:]
        if layers < len(self._seen) or codec is not self._codec:
            self._seen, self._staging, self._codec = self._seen[:layers], self._staging[:layers], codec
            self._outbox = None  # the old one's memory is free for the new one
            self._outbox = self._new_outbox()
        if not layers:
            self.sink = None
            if self._staging.device.type == "cpu":
                self._staging = self._staging.new_empty(0)

    def _new_outbox(self) -> Ring | None:
        layers, rows = self._staging.shape[:2]
        if self._staging.device.type == "cpu" or not layers:
            return None
        size = layers * (rows + rows // _SPARE) * self._row_bytes + ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, device=self._staging.device)
        return Ring(memory, current_stream(str(memory.device)))

    @property
    def _row_bytes(self) -> int:
        return self._codec.row_bytes if self._codec is not None else self._staging[0, 0].nbytes

    @property
    def forward_bytes(self) -> int:
        """Most bytes that one forward hands to the sink."""
        return self._staging.shape[0] * self._staging.shape[1] * self._row_bytes

    def _stage(self, index: int, _module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        hidden = self.sites[index].hidden_states(args, kwargs)
        if not isinstance(hidden, torch.Tensor):  # quantised already, with its scales
            self._end("is quantised")
            return
        torch.ops.hcache.stage_rows(hidden, self._staging, self._seen, index)

    def before_forward(self) -> None:
        self._note_what_is_unusable()  # a graph may have been captured since
        self._seen.zero_()

    def _note_what_is_unusable(self) -> None:
        """Stop capturing for good after one unusable call: a graph captured with it repeats it unnoticed."""
        if not bool((self._seen != _UNUSABLE).all()):
            self._end("has another width")

    def _end(self, why: str) -> None:
        if self._usable:
            self._usable = False
            logger.warning("hcache: no hidden states are captured from now on: an attention's input %s", why)

    def after_forward(self, slots: torch.Tensor, positions: torch.Tensor, *, from_graph: bool) -> None:
        """Hand the rows of the forward just issued to the sink; of a forward that is too long, only the first rows.

        slots, positions: int64 `[n]`, without padding. from_graph: a graph was replayed. That runs no Python to
        count the rows, so all of them are assumed to be staged.
        """
        if self.sink is None:
            return
        count = min(slots.numel(), self._staging.shape[1])
        self._note_what_is_unusable()
        if not (self._usable and (from_graph or int(self._seen.min()) >= count)):
            self.sink.drop(slots)
            return
        slots, positions, beyond = slots[:count], positions[:count], slots[count:]
        rows, size = self._staging[:, :count], self._staging.shape[0] * count * self._row_bytes
        if self._outbox is not None:
            rows = self._move(rows, self._outbox.take(size))
        elif self._codec is not None:
            rows = self._move(rows, torch.empty(size, dtype=torch.uint8))
        event = self.sink.write(slots, positions, rows)
        if self._outbox is not None:
            self._outbox.sent(event)
        if beyond.numel():
            self.sink.drop(beyond)  # after `write`, to abandon the page that the limit cuts in two

    def _move(self, rows: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Rows in the memory, as they are handed over; complete on the current stream."""
        if self._codec is None:
            moved = memory.view(rows.dtype).view(rows.shape)
            wide = torch.int64 if _has_words(rows) else rows.dtype
            moved.view(wide).copy_(rows.view(wide))
        else:
            moved = memory.view(*rows.shape[:2], self._codec.row_bytes)
            self._codec.encode(rows, moved)
        return moved
