"""Lossless packing of bf16: the exponents of activations are far from uniform, so three bits name most of them.

Channels differ in scale, in trained models by orders of magnitude, so exponents are relative, modulo 256, to what is
usual in their channel: `usual_exponents` of some rows, the same whenever these rows are unpacked. Each row is packed
by itself, into three quarters of its bytes. Its seven most frequent relative exponents are its codebook; each value
has a code of 3 bits, an entry of the codebook or ESCAPE, and a byte of sign and mantissa. The exponents of escaped
values stand in a list, in the values' order. Every bit pattern comes back as it was, whatever is said to be usual. A
row with more escapes than the list has room for, an eighth of its values less 8, does not fit: it says so, and cannot
be unpacked.

Little-endian, for a row of w values, w a multiple of 64:

    offset        bytes
    0             w          sign (bit 7) and mantissa (bits 6 to 0)
    w             3 w / 8    code bits 0, then 1, then 2, each w / 32 words; bit i of word j: value 32 j + i
    11 w / 8      7          codebook: relative exponents of codes 0 to 6, the most frequent first
    11 w / 8 + 7  1          0: the row is here; 1: it does not fit
    11 w / 8 + 8  w / 8 - 8  relative exponents of escaped values, then zeros
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec, signature_of
from sglang_hcache.triton_kernels.checks import require_bytes, require_rows

ESCAPE = 7
WIDTH_STEP = 64  # values
TILE = 2048  # values of a row that a program holds at a time
NUM_WARPS = 4
_ALIGNMENT = 16  # bytes; of a row's start


def packed_row_bytes(width: int) -> int:
    """Of a row of `width` values. Raises ValueError where that is no multiple of 64."""
    if width % WIDTH_STEP or width <= 0:
        raise ValueError(f"rows of {width} values cannot be packed: {width} is no multiple of {WIDTH_STEP}")
    return width * 3 // 2


def fits_at(width: int) -> int:
    """Offset of the byte that is 0 if the row is there, and 1 if it did not fit."""
    return width * 11 // 8 + ESCAPE


def usual_exponents(values: torch.Tensor) -> torch.Tensor:
    """The median exponent of each channel, of bf16 `[layers, n, width]`: uint8 `[layers, width]`, n at least 1."""
    middle = (values.shape[1] - 1) // 2  # `median` is not deterministic on a GPU
    of_layers = ((layer.view(torch.int16) >> 7 & 0xFF).sort(0).values[middle] for layer in values)
    return torch.stack([*of_layers]).to(torch.uint8)


def pack_rows_reference(values: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Values `[layers, n, width]` as uint8 `[layers, n, packed_row_bytes(width)]`: as `pack_rows`, in PyTorch."""
    width, rows = values.shape[-1], values.shape[:-1].numel()
    packed = torch.zeros(rows, packed_row_bytes(width), dtype=torch.uint8, device=values.device)
    whole = values.contiguous().view(torch.int16).to(torch.int32)
    exponents = ((whole >> 7) - usual[:, None].to(torch.int32) & 0xFF).view(rows, width)
    bits = whole.view(rows, width)
    counts = torch.zeros(rows, 256, dtype=torch.int32, device=values.device)
    counts.scatter_add_(1, exponents.to(torch.int64), torch.ones_like(exponents))
    codebook = counts.argsort(dim=1, descending=True, stable=True)[:, :ESCAPE]
    of_exponent = torch.full((rows, 256), ESCAPE, dtype=torch.int32, device=values.device)
    of_exponent.scatter_(1, codebook, torch.arange(ESCAPE, dtype=torch.int32, device=values.device).expand(rows, -1))
    codes = of_exponent.gather(1, exponents.to(torch.int64))
    low, planes, book, fit, escapes = _sections(packed)
    low.copy_(bits >> 8 & 0x80 | bits & 0x7F)
    lanes = torch.arange(8, device=values.device)
    for plane in range(3):
        of_bytes = (codes >> plane & 1).view(rows, width // 8, 8)
        planes[:, plane] = (of_bytes << lanes).sum(2)
    book.copy_(codebook)
    escaped = codes == ESCAPE
    fit.copy_(escaped.sum(1) > escapes.shape[1])
    rank = escaped.cumsum(1) - 1
    listed = escaped & (rank < escapes.shape[1])
    row = torch.arange(rows, device=values.device)[:, None].expand_as(rank)
    escapes[row[listed], rank[listed]] = exponents[listed].to(torch.uint8)
    return packed.view(*values.shape[:-1], packed.shape[1])


def unpack_rows_reference(packed: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Rows `[n, packed_row_bytes(width)]` uint8 of a layer, all of which fit, as `[n, width]` bf16: `unpack_rows`."""
    rows, width = packed.shape[0], packed.shape[1] * 2 // 3
    low, planes, book, _, escapes = _sections(packed)
    lanes = torch.arange(8, device=packed.device)
    plane_bits = (planes.to(torch.int32)[..., None] >> lanes & 1).view(rows, 3, width)
    codes = plane_bits[:, 0] | plane_bits[:, 1] << 1 | plane_bits[:, 2] << 2
    escaped = codes == ESCAPE
    named = book.to(torch.int32).gather(1, codes.clamp(max=ESCAPE - 1).to(torch.int64))
    if escapes.shape[1]:
        rank = (escaped.cumsum(1) - 1).clamp(0, escapes.shape[1] - 1)
        named = torch.where(escaped, escapes.to(torch.int32).gather(1, rank), named)
    exponents = named + usual.to(torch.int32) & 0xFF
    whole = (low.to(torch.int32) & 0x80) << 8 | exponents << 7 | low.to(torch.int32) & 0x7F
    return whole.to(torch.int16).view(torch.bfloat16)


def _sections(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views `[rows, …]`: signs and mantissas, code bits `[rows, 3, w / 8]`, codebook, whether it fits, escapes."""
    width = packed.shape[1] * 2 // 3
    fits = fits_at(width)
    planes = packed[:, width : fits - ESCAPE].unflatten(1, (3, width // 8))
    return packed[:, :width], planes, packed[:, fits - ESCAPE : fits], packed[:, fits], packed[:, fits + 1 :]


@triton.jit
def _popcount(word):
    """Set bits of uint32; LLVM knows this idiom."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _pack_kernel(
    values,  # *i16 [layers, rows, width]: bf16's bits
    usual,  # *u8 [layers, width], contiguous
    packed,  # *u8 [layers, rows, 3 / 2 width], contiguous
    width,
    values_layer,  # values from a layer to the next
    values_stride,  # values from a row to the next
    TILE: tl.constexpr,
):
    """Grid: rows, layers."""
    WORDS: tl.constexpr = TILE // 32
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    values += layer * values_layer + row * values_stride
    usual += layer * width
    packed += (layer * tl.num_programs(0) + row) * (width // 2 * 3)
    bins = tl.arange(0, 256)
    counts = tl.where(bins == 0, width - tl.cdiv(width, TILE) * TILE, 0)  # what is read beyond the row is 0
    for start in range(0, width, TILE):
        place = start + tl.arange(0, TILE)
        bits = tl.load(values + place, mask=place < width, other=0).to(tl.int32)
        from_usual = (bits >> 7) - tl.load(usual + place, mask=place < width, other=0).to(tl.int32)
        counts += tl.histogram(from_usual & 0xFF, 256)
    book_low = tl.zeros((), tl.uint32)
    book_high = tl.zeros((), tl.uint32)
    for nth in tl.static_range(7):
        best = tl.max(tl.where(counts < 0, -1, counts * 256 + 255 - bins), 0)  # of equals the lowest
        named = 255 - (best & 255)
        counts = tl.where(bins == named, -1, counts)
        if nth < 4:
            book_low |= named.to(tl.uint32) << (8 * nth)
        else:
            book_high |= named.to(tl.uint32) << (8 * nth - 32)

    words = width // 32
    planes = (packed + width).to(tl.pointer_type(tl.uint32), bitcast=True)
    escapes = packed + width // 8 * 11 + 8
    capacity = width // 8 - 8
    lane = tl.arange(0, 32)
    found = 0  # escapes so far
    for start in range(0, width, TILE):
        word = start // 32 + tl.arange(0, WORDS)
        index = word[:, None] * 32 + lane[None, :]
        inside = index < width
        bits = tl.load(values + index, mask=inside, other=0).to(tl.uint32)
        tl.store(packed + index, (((bits >> 8) & 0x80) | (bits & 0x7F)).to(tl.uint8), mask=inside)
        exponent = ((bits >> 7) - tl.load(usual + index, mask=inside, other=0).to(tl.uint32)) & 0xFF
        code = tl.full((WORDS, 32), 7, tl.uint32)
        for entry in tl.static_range(7):
            book = book_low if entry < 4 else book_high
            code = tl.where(exponent == ((book >> (8 * (entry % 4))) & 0xFF), entry, code)
        for plane in tl.static_range(3):
            plane_word = tl.sum(((code >> plane) & 1) << lane[None, :].to(tl.uint32), 1)
            tl.store(planes + plane * words + word, plane_word, mask=word < words)
        escaped = ((code == 7) & inside).to(tl.int32)
        of_word = tl.sum(escaped, 1)
        before = found + tl.cumsum(of_word, 0) - of_word
        rank = before[:, None] + tl.cumsum(escaped, 1) - escaped
        tl.store(escapes + rank, exponent.to(tl.uint8), mask=(escaped == 1) & (rank < capacity))
        found += tl.sum(of_word, 0)
    for start in range(0, capacity, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(escapes + place, tl.zeros((TILE,), tl.uint8), mask=(place >= found) & (place < capacity))
    header = (escapes - 8).to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(header, book_low)
    tl.store(header + 1, book_high | ((found > capacity).to(tl.uint32) << 24))


@triton.jit
def _unpack_kernel(
    packed,  # *u8 [rows, 3 / 2 width]
    usual,  # *u8 [width]
    out,  # *i16 [rows, width]: bf16's bits
    width,
    out_stride,  # values from a row to the next
    TILE: tl.constexpr,
):
    """Grid: rows. Reads nothing beyond the row, whatever is in it."""
    WORDS: tl.constexpr = TILE // 32
    row = tl.program_id(0).to(tl.int64)
    packed += row * (width // 2 * 3)
    out += row * out_stride
    words = width // 32
    planes = (packed + width).to(tl.pointer_type(tl.uint32), bitcast=True)
    escapes = packed + width // 8 * 11 + 8
    capacity = width // 8 - 8
    header = (escapes - 8).to(tl.pointer_type(tl.uint32), bitcast=True)
    book_low = tl.load(header)
    book_high = tl.load(header + 1)
    lane = tl.arange(0, 32)
    shift = lane[None, :].to(tl.uint32)
    lower = (tl.full((1, 32), 1, tl.uint32) << shift) - 1
    found = 0  # escapes so far
    for start in range(0, width, TILE):
        word = start // 32 + tl.arange(0, WORDS)
        index = word[:, None] * 32 + lane[None, :]
        inside = index < width
        bit0 = tl.load(planes + word, mask=word < words, other=0)
        bit1 = tl.load(planes + words + word, mask=word < words, other=0)
        bit2 = tl.load(planes + 2 * words + word, mask=word < words, other=0)
        code = ((bit0[:, None] >> shift) & 1) | (((bit1[:, None] >> shift) & 1) << 1)
        code = code | (((bit2[:, None] >> shift) & 1) << 2)
        escaped = bit0 & bit1 & bit2
        of_word = _popcount(escaped).to(tl.int32)
        before = found + tl.cumsum(of_word, 0) - of_word
        rank = before[:, None] + _popcount(escaped[:, None] & lower).to(tl.int32)
        listed = inside & (code == 7) & (rank < capacity)
        exponent = tl.load(escapes + rank, mask=listed, other=0).to(tl.uint32)
        book = tl.where(code < 4, book_low, book_high)
        exponent = tl.where(code == 7, exponent, book >> ((code & 3) * 8))
        exponent = (exponent + tl.load(usual + index, mask=inside, other=0).to(tl.uint32)) & 0xFF
        low = tl.load(packed + index, mask=inside, other=0).to(tl.uint32)
        whole = ((low & 0x80) << 8) | (exponent << 7) | (low & 0x7F)
        tl.store(out + index, whole.to(tl.int16), mask=inside)
        found += tl.sum(of_word, 0)


def pack_rows(values: torch.Tensor, usual: torch.Tensor, out: torch.Tensor) -> None:
    """Writes values `[layers, n, width]` bf16 to `out` `[layers, n, packed_row_bytes(width)]` uint8.

    usual: exponents to which those of each layer's channels are relative, uint8 `[layers, width]`. Layers and rows of
    values may be apart, values of a row may not; usual and out are contiguous. On the current stream, in one launch
    and without waiting. Byte `fits_at(width)` of each row says whether it can be unpacked. Raises ValueError
    for other arguments.
    """
    require_rows("values", values, 3, (torch.bfloat16,))
    layers, rows, width = values.shape
    require_bytes("usual exponents", usual, (layers, width), _ALIGNMENT)
    require_bytes("packed rows", out, (layers, rows, packed_row_bytes(width)), _ALIGNMENT)
    if layers and rows:
        bits, strides = values.view(torch.int16), values.stride()[:2]
        _pack_kernel[(rows, layers)](bits, usual, out, width, *strides, TILE=TILE, num_warps=NUM_WARPS)


def unpack_rows(packed: torch.Tensor, usual: torch.Tensor, out: torch.Tensor) -> None:
    """Decodes rows `[n, packed_row_bytes(width)]` uint8 of a layer that fit into `out` `[n, width]` bf16.

    Bit for bit as `unpack_rows_reference`. usual: those they were packed with, uint8 `[width]`. Rows of out may be
    apart, values of a row may not; packed and usual are contiguous. Content is not checked, that is for the checksums
    around it: wrong bytes give wrong values, but no access outside of the row. On the current stream. Raises
    ValueError for arguments of another shape or kind.
    """
    require_rows("out", out, 2, (torch.bfloat16,))
    rows, width = out.shape
    require_bytes("packed rows", packed, (rows, packed_row_bytes(width)), _ALIGNMENT)
    require_bytes("usual exponents", usual, (width,), _ALIGNMENT)
    if rows:
        bits, stride = out.view(torch.int16), out.stride(0)
        _unpack_kernel[(rows,)](packed, usual, bits, width, stride, TILE=TILE, num_warps=NUM_WARPS)


def compile_specs() -> Iterator[KernelSpec]:
    """The configurations that `pack_rows` and `unpack_rows` launch."""
    sizes = {"width": "i32", "values_layer": "i64", "values_stride": "i32", "out_stride": "i32"}
    pointers = {"values": "*i16", "usual": "*u8", "packed": "*u8", "out": "*i16"}
    for name, kernel in (("pack", _pack_kernel), ("unpack", _unpack_kernel)):
        constants = {"TILE": TILE}
        signature = signature_of(kernel, pointers | sizes, constants)
        yield KernelSpec(
            name=f"{name}_rows",
            kernel=kernel,
            signature=signature,
            constexprs=constants,
            num_warps=NUM_WARPS,
            aligned=tuple(signature),
        )
