"""Copying rows of bytes between layouts: pool or staging ↔ chunks, many layers in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec
from sglang_hcache.triton_kernels.checks import require_indices

WORD = 8  # bytes; what is moved is a multiple
_WIDE = 2  # words that a lane moves at once, where offsets and rows are multiples
_WARP_WORDS = 256  # that a warp has on the way
_KV_WARPS = 4  # of a program that moves K and V


@triton.jit(do_not_specialize=["n", "tasks"])
def _copy_rows(
    source,  # words
    offsets,  # int64 [n], bytes
    layer_words: tl.int64,  # from a layer to the next
    target,  # words [layers, n, row]
    n,
    tasks,  # layers × n × pieces
    row: tl.constexpr,  # words
    WORD_BYTES: tl.constexpr,
    WIDE: tl.constexpr,  # words that `begin` is a multiple of
    BLOCK: tl.constexpr,
):
    pieces: tl.constexpr = (row + BLOCK - 1) // BLOCK
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        which = task // pieces
        columns = task % pieces * BLOCK + tl.arange(0, BLOCK)
        mask = columns < row
        begin = tl.load(offsets + which % n) // WORD_BYTES + which // n * layer_words
        words = tl.load(source + tl.multiple_of(begin, WIDE) + columns, mask=mask)
        tl.store(target + which.to(tl.int64) * row + columns, words, mask=mask)


def copy_rows(
    source: torch.Tensor,
    offsets: torch.Tensor,
    target: torch.Tensor,
    *,
    layer_bytes: int = 0,
    programs: int,
    warps: int,
) -> None:
    """Rows of several layers, one after another: row i of layer l lies at `offsets[i] + l · layer_bytes`.

    source: the memory, any dtype, contiguous; on the device, or pinned on the host, which the kernel reads over the
    bus. offsets: int64 `[n]`, bytes, on the device; multiples of 16, as all sizes are. target: `[layers, n, …]`,
    contiguous, on the device. programs: how many blocks of threads share the work, of so many warps: few leave the
    device to others, enough fill the bus. Raises ValueError for sizes that are no multiples of 16, or such offsets.
    """
    layers, n = target.shape[:2]
    if not layers or not n:
        return
    require_indices("offsets", offsets, n)
    row_bytes = target[0, 0].nbytes
    if any(size % (_WIDE * WORD) for size in (row_bytes, layer_bytes, source.nbytes)):
        sizes = f"{row_bytes} bytes, layers {layer_bytes} apart, of {source.nbytes}"
        raise ValueError(f"rows of {sizes}, cannot be copied in pieces of {_WIDE * WORD}")
    row = row_bytes // WORD
    block = _block(row, warps)
    tasks = layers * n * triton.cdiv(row, block)
    _copy_rows[(min(tasks, programs),)](
        _words(source), offsets, layer_bytes // WORD, _words(target), n, tasks,
        row=row, WORD_BYTES=WORD, WIDE=_WIDE, BLOCK=block, num_warps=max(1, block // _WARP_WORDS),
    )  # fmt: skip


def _block(row: int, warps: int) -> int:
    return int(min(_WARP_WORDS * warps, triton.next_power_of_2(row)))


def copy_rows_reference(
    source: torch.Tensor, offsets: torch.Tensor, target: torch.Tensor, *, layer_bytes: int = 0
) -> None:
    """As `copy_rows`, in PyTorch, on any device."""
    memory, row_bytes = source.view(-1).view(torch.uint8), target[0, 0].nbytes
    for layer, rows in enumerate(target.view(torch.uint8).view(*target.shape[:2], row_bytes)):
        for begin, row in zip(offsets.tolist(), rows, strict=True):
            row.copy_(memory[begin + layer * layer_bytes :][:row_bytes])


@triton.jit
def _scatter_kv(
    rows,  # words [n, k_words + v_words]
    slots,  # int64 [n]
    keys,  # words [slots, k_words]
    values,  # words [slots, v_words]
    k_words: tl.constexpr,
    v_words: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: n, blocks of a row."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_k = columns < k_words
    of_v = (columns >= k_words) & (columns < k_words + v_words)
    words = tl.load(rows + index * (k_words + v_words) + columns, mask=of_k | of_v)
    tl.store(keys + slot * k_words + columns, words, mask=of_k)
    tl.store(values + slot * v_words + (columns - k_words), words, mask=of_v)


@triton.jit
def _gather_kv(
    addresses,  # int64 [layers, 2], of K's and V's words: [slots, k_words], [slots, v_words]
    slots,  # int64 [n]
    out,  # words [layers, n, k_words + v_words]
    k_words: tl.constexpr,
    v_words: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that the addresses are multiples of
    BLOCK: tl.constexpr,
):
    """Grid: n, blocks of a row, layers."""
    index, layer = tl.program_id(0).to(tl.int64), tl.program_id(2)
    slot = tl.load(slots + index)
    keys = tl.multiple_of(tl.load(addresses + 2 * layer).to(tl.pointer_type(tl.int64)), ALIGNMENT)
    values = tl.multiple_of(tl.load(addresses + 2 * layer + 1).to(tl.pointer_type(tl.int64)), ALIGNMENT)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_k = columns < k_words
    of_v = (columns >= k_words) & (columns < k_words + v_words)
    words = tl.load(keys + slot * k_words + columns, mask=of_k, other=0)
    words |= tl.load(values + slot * v_words + (columns - k_words), mask=of_v, other=0)
    row = layer * tl.num_programs(0) + index
    tl.store(out + row * (k_words + v_words) + columns, words, mask=of_k | of_v)


def scatter_kv(rows: torch.Tensor, slots: torch.Tensor, buffers: Sequence[torch.Tensor]) -> None:
    """Stored K and V back into the pool: `rows[i]`, K's bytes and then V's, to slot `slots[i]`.

    rows: `[n, …]`, contiguous; slots: int64 `[n]`, all different; buffers: K's and V's, or the one of MLA's latent,
    `[slots, …]`, contiguous. One launch. Raises ValueError for sizes that do not agree, or are no multiples of 8.
    """
    k_words, v_words = _kv_words(buffers)
    _require_rows(rows, slots, k_words, v_words)
    if len(slots):
        block = _kv_block(k_words + v_words)
        _scatter_kv[(len(slots), triton.cdiv(k_words + v_words, block))](
            _words(rows), slots, _words(buffers[0]), _words(buffers[-1]),
            k_words=k_words, v_words=v_words, BLOCK=block, num_warps=_KV_WARPS,
        )  # fmt: skip


class PoolLayers:
    """Where the pool keeps some layers, for a kernel that goes over several of them in one launch.

    layers: for each, its buffers as `scatter_kv` takes them, alike in size. They must stay where they are. Raises
    ValueError for sizes that differ, or are no multiples of 8.
    """

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]]) -> None:
        sizes = {_kv_words(buffers) for buffers in layers}
        if len(sizes) != 1:
            raise ValueError(f"layers of {len(sizes)} sizes, not of one")
        ((self.k_words, self.v_words),) = sizes
        places = [[buffers[0].data_ptr(), buffers[-1].data_ptr()] for buffers in layers]
        self.addresses = torch.tensor(places, dtype=torch.int64, device=layers[0][0].device)
        odd = any(place % (_WIDE * WORD) for place in itertools.chain(*places))
        self._alignment = WORD if odd else _WIDE * WORD

    def gather_kv(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """The inverse of `scatter_kv`: `out[l, i]` = K's bytes and then V's of slot `slots[i]` in layer l of these.

        slots: int64 `[n]`; out `[layers, n, …]`, contiguous, may be pinned memory. One launch. Raises ValueError for
        sizes that do not agree, or another number of layers.
        """
        if len(out) != len(self.addresses):
            raise ValueError(f"room for {len(out)} layers, not for {len(self.addresses)}")
        _require_rows(out[0], slots, self.k_words, self.v_words)
        if len(slots):
            words = self.k_words + self.v_words
            block = _kv_block(words)
            _gather_kv[(len(slots), triton.cdiv(words, block), len(out))](
                self.addresses, slots, _words(out),
                k_words=self.k_words, v_words=self.v_words, ALIGNMENT=self._alignment, BLOCK=block,
                num_warps=_KV_WARPS,
            )  # fmt: skip


def _kv_words(buffers: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Of K and of V in a slot; a latent's, and none."""
    k_bytes, v_bytes = buffers[0][0].nbytes, buffers[1][0].nbytes if len(buffers) == 2 else 0
    if k_bytes % WORD or v_bytes % WORD:
        raise ValueError(f"K and V of {k_bytes} and {v_bytes} bytes cannot be moved in words of {WORD}")
    return k_bytes // WORD, v_bytes // WORD


def _require_rows(rows: torch.Tensor, slots: torch.Tensor, k_words: int, v_words: int) -> None:
    require_indices("slots", slots, len(slots))
    if len(rows) != len(slots) or (len(rows) and rows[0].nbytes != (k_words + v_words) * WORD):
        sizes = f"{k_words * WORD} + {v_words * WORD} bytes"
        raise ValueError(f"{len(slots)} slots of {sizes} for rows {list(rows.shape)} {rows.dtype}")


def _kv_block(words: int) -> int:
    return int(min(_WARP_WORDS * _KV_WARPS, triton.next_power_of_2(words)))


def compile_specs() -> Iterator[KernelSpec]:
    """Rows of one block, and of many: K or V of a token, its hidden state, a layer of a page; K and V; a latent."""
    pointers = {"source": "*i64", "offsets": "*i64", "target": "*i64"}
    numbers = {"layer_words": "i64", "n": "i32", "tasks": "i32"}
    for row_bytes, warps in ((256, 16), (8192, 16), (64 * 8192, 4), (64 * 8192, 16)):
        row = row_bytes // WORD
        block = _block(row, warps)
        yield KernelSpec(
            name=f"copy_rows of {row_bytes} bytes by {warps} warps",
            kernel=_copy_rows,
            signature=pointers | numbers,
            constexprs={"row": row, "WORD_BYTES": WORD, "WIDE": _WIDE, "BLOCK": block},
            num_warps=max(1, block // _WARP_WORDS),
            aligned=tuple(pointers),
        )
    pool = {"rows": "*i64", "slots": "*i64", "keys": "*i64", "values": "*i64"}
    several = {"addresses": "*i64", "slots": "*i64", "out": "*i64"}
    kernels: tuple[tuple[str, Any, dict[str, str], dict[str, int]], ...] = (
        ("scatter", _scatter_kv, pool, {}),
        ("gather", _gather_kv, several, {"ALIGNMENT": _WIDE * WORD}),
    )
    for (k_bytes, v_bytes), (name, kernel, signature, more) in itertools.product(
        ((256, 256), (8192, 8192), (1152, 0)), kernels
    ):
        k_words, v_words = k_bytes // WORD, v_bytes // WORD
        yield KernelSpec(
            name=f"{name}_kv of {k_bytes} and {v_bytes} bytes",
            kernel=kernel,
            signature=signature,
            constexprs={"k_words": k_words, "v_words": v_words, "BLOCK": _kv_block(k_words + v_words), **more},
            num_warps=_KV_WARPS,
            aligned=tuple(signature),
        )


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(-1).view(torch.int64)
