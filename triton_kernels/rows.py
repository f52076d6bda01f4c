"""Copying rows of bytes between layouts: pool or staging ↔ chunks, many layers in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec
from sglang_hcache.triton_kernels.checks import require_indices

WORD = 8  # bytes that a lane moves at once; offsets, strides and rows are multiples
_WARP_WORDS = 256  # that a warp has on the way
_KV_WARPS = 4  # of a program of `_move_kv`


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
    BLOCK: tl.constexpr,
):
    pieces: tl.constexpr = (row + BLOCK - 1) // BLOCK
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        which = task // pieces
        columns = task % pieces * BLOCK + tl.arange(0, BLOCK)
        mask = columns < row
        begin = tl.load(offsets + which % n) // WORD_BYTES + which // n * layer_words
        words = tl.load(source + begin + columns, mask=mask)
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
    bus. offsets: int64 `[n]`, bytes, on the device; multiples of 8, as all sizes are. target: `[layers, n, …]`,
    contiguous, on the device. programs: how many blocks of threads share the work, of so many warps: few leave the
    device to others, enough fill the bus. Raises ValueError for sizes that are no multiples of 8, or such offsets.
    """
    layers, n = target.shape[:2]
    if not layers or not n:
        return
    require_indices("offsets", offsets, n)
    row_bytes = target[0, 0].nbytes
    if any(size % WORD for size in (row_bytes, layer_bytes, source.nbytes)):
        sizes = f"{row_bytes} bytes, layers {layer_bytes} apart, of {source.nbytes}"
        raise ValueError(f"rows of {sizes}, cannot be copied in words of {WORD}")
    row = row_bytes // WORD
    block = _block(row, warps)
    tasks = layers * n * triton.cdiv(row, block)
    _copy_rows[(min(tasks, programs),)](
        _words(source), offsets, layer_bytes // WORD, _words(target), n, tasks, row=row, WORD_BYTES=WORD, BLOCK=block,
        num_warps=max(1, block // _WARP_WORDS),
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
def _move_kv(
    rows,  # words [n, k_words + v_words]
    slots,  # int64 [n]
    keys,  # words [slots, k_words]
    values,  # words [slots, v_words]
    k_words: tl.constexpr,
    v_words: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: n, blocks of a row."""
    index = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_k = columns < k_words
    of_v = (columns >= k_words) & (columns < k_words + v_words)
    row = rows + index * (k_words + v_words) + columns
    key = keys + slot * k_words + columns
    value = values + slot * v_words + (columns - k_words)
    if GATHER:
        words = tl.load(key, mask=of_k, other=0) | tl.load(value, mask=of_v, other=0)
        tl.store(row, words, mask=of_k | of_v)
    else:
        words = tl.load(row, mask=of_k | of_v)
        tl.store(key, words, mask=of_k)
        tl.store(value, words, mask=of_v)


def scatter_kv(rows: torch.Tensor, slots: torch.Tensor, buffers: Sequence[torch.Tensor]) -> None:
    """Stored K and V back into the pool: `rows[i]`, K's bytes and then V's, to slot `slots[i]`.

    rows: `[n, …]`, contiguous; slots: int64 `[n]`, all different; buffers: K's and V's, or the one of MLA's latent,
    `[slots, …]`, contiguous. One launch. Raises ValueError for sizes that do not agree, or are no multiples of 8.
    """
    _launch_kv(rows, slots, buffers, gather=False)


def gather_kv(buffers: Sequence[torch.Tensor], slots: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse of `scatter_kv`: `out[i]` = K's bytes and then V's of slot `slots[i]`; out may be pinned memory."""
    _launch_kv(out, slots, buffers, gather=True)


def _launch_kv(rows: torch.Tensor, slots: torch.Tensor, buffers: Sequence[torch.Tensor], *, gather: bool) -> None:
    require_indices("slots", slots, len(slots))
    k_buffer, v_buffer = buffers[0], buffers[-1]
    k_bytes = k_buffer[0].nbytes
    v_bytes = v_buffer[0].nbytes if len(buffers) == 2 else 0
    if len(rows) != len(slots) or (len(rows) and rows[0].nbytes != k_bytes + v_bytes):
        raise ValueError(
            f"{len(slots)} slots of {k_bytes} + {v_bytes} bytes for rows {list(rows.shape)} {rows.dtype}"
        )
    if k_bytes % WORD or v_bytes % WORD:
        raise ValueError(f"K and V of {k_bytes} and {v_bytes} bytes cannot be moved in words of {WORD}")
    if len(slots):
        words = (k_bytes + v_bytes) // WORD
        block = _kv_block(words)
        _move_kv[(len(slots), triton.cdiv(words, block))](
            _words(rows), slots, _words(k_buffer), _words(v_buffer),
            k_words=k_bytes // WORD, v_words=v_bytes // WORD, GATHER=gather, BLOCK=block, num_warps=_KV_WARPS,
        )  # fmt: skip


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
            constexprs={"row": row, "WORD_BYTES": WORD, "BLOCK": block},
            num_warps=max(1, block // _WARP_WORDS),
            aligned=tuple(pointers),
        )
    pool = {"rows": "*i64", "slots": "*i64", "keys": "*i64", "values": "*i64"}
    for (k_bytes, v_bytes), gather in itertools.product(((256, 256), (8192, 8192), (1152, 0)), (False, True)):
        k_words, v_words = k_bytes // WORD, v_bytes // WORD
        sizes = {"k_words": k_words, "v_words": v_words, "BLOCK": _kv_block(k_words + v_words)}
        yield KernelSpec(
            name=f"{'gather' if gather else 'scatter'}_kv of {k_bytes} and {v_bytes} bytes",
            kernel=_move_kv,
            signature=pool,
            constexprs={**sizes, "GATHER": gather},
            num_warps=_KV_WARPS,
            aligned=tuple(pool),
        )


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(-1).view(torch.int64)
