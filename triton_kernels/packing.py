"""Lossless packing of bf16: the exponents of activations are far from uniform, so three bits name most of them.

A page, `[rows, width]` bf16, is packed by itself. Its seven most frequent exponents are its codebook; each value has
a 3-bit code, an entry of the codebook or ESCAPE, and a byte of sign and mantissa. The exponents of escaped values
stand in a list in the values' order, and for every block of 1,024 values it is written down where its part of the
list begins. Each block is thus found and decoded by itself. Every bit pattern comes back as it was.

Little-endian, with V = rows * width values, W = ceil(V / 32) words of codes, B = ceil(V / 1024) blocks, E escapes:

    offset           bytes
    0                4       "HBP1"
    4                4       kind: 0 raw, 1 packed
    8                4       rows
    12               4       width
    16               4       size of all of this in bytes
    20               4       E
    24               7       codebook: exponents of codes 0 to 6
    31               1       0
    32               32 W    bytes of sign (bit 7) and mantissa (bits 6 to 0); 0 after the last value
    32 + 32 W        12 W    code bits 0, then 1, then 2, each W words of 4 bytes; bit i of a word: value 32 w + i
    32 + 44 W        4 B     escapes before the block
    32 + 44 W + 4 B  E       exponents of escaped values

Where this would not be smaller, kind is raw and the values follow the header. A page so takes at most
`packed_bound(rows, width)` = 32 + 2 V bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec

MAGIC = b"HBP1"
RAW, PACKED = 0, 1
ESCAPE = 7
BLOCK = 1024  # values
ALIGNMENT = 16  # bytes; of a page's start
MAX_VALUES = 1 << 28  # of a page: the kernel counts a page's bytes in 32 bits
MAX_PAGES = 65_535  # decoded together: the second extent of a CUDA grid
TILE = 2048  # values a program decodes; whole blocks
NUM_WARPS = 4
_HEADER = struct.Struct("<4s5I7sx")
HEADER_BYTES = _HEADER.size
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: they are the bits of the product's highest byte


class CorruptPage(ValueError):
    """A packed page contradicts itself or what was asked for."""


@dataclass(frozen=True)
class Header:
    kind: int  # RAW or PACKED
    rows: int
    width: int
    size: int  # bytes, this header included
    escapes: int
    codebook: bytes  # exponents of codes 0 to 6; zeros if raw


def packed_bound(rows: int, width: int) -> int:
    """The most bytes that a page of `rows` by `width` values takes."""
    return HEADER_BYTES + 2 * rows * width


def _sections(values: int) -> tuple[int, int, int]:
    """Offsets in bytes of the code bits, of the escapes before each block, and of the escapes."""
    words = -(-values // 32)
    return HEADER_BYTES + 32 * words, HEADER_BYTES + 44 * words, HEADER_BYTES + 44 * words + 4 * -(-values // BLOCK)


# --- packing ---


def pack(values: torch.Tensor) -> torch.Tensor:
    """Packs a page `[rows, width]` bf16, of any strides; returns `[size]` uint8 on the same device.

    Plain PyTorch; on a GPU it waits for the number of escapes. Raises ValueError for another dtype, for other than
    two dimensions, and for more than MAX_VALUES values.
    """
    _require_page(values)
    rows, width = values.shape
    bits = values.contiguous().view(torch.int16).flatten()
    exponents = (bits >> 7).to(torch.uint8)
    counts = torch.bincount(exponents, minlength=256)
    codebook = counts.argsort(descending=True, stable=True)[:ESCAPE]
    escapes = bits.numel() - int(counts[codebook].sum())
    size = _sections(bits.numel())[2] + escapes
    if size >= packed_bound(rows, width):
        header = _HEADER.pack(MAGIC, RAW, rows, width, packed_bound(rows, width), 0, bytes(ESCAPE))
        return torch.cat([_bytes(header, bits.device), bits.view(torch.uint8)])
    codes_of = torch.full((256,), ESCAPE, dtype=torch.uint8, device=bits.device)
    codes_of[codebook] = torch.arange(ESCAPE, dtype=torch.uint8, device=bits.device)
    codes = codes_of.index_select(0, exponents.to(torch.int32))
    escaped = codes == ESCAPE
    header = _HEADER.pack(MAGIC, PACKED, rows, width, size, escapes, bytes(codebook.tolist()))
    return torch.cat(
        [
            _bytes(header, bits.device),
            _padded(((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8), 32),
            _code_bits(_padded(codes, 32)),
            _escapes_before_blocks(escaped),
            exponents[escaped],
        ]
    )


def _code_bits(codes: torch.Tensor) -> torch.Tensor:
    """Three planes of bits of codes `[32 W]` uint8, as bytes `[12 W]`."""
    planes = [((codes >> plane) & 1).view(torch.int64) for plane in range(3)]
    return torch.cat([((plane * _GATHER) >> 56).to(torch.uint8) for plane in planes])


def _escapes_before_blocks(escaped: torch.Tensor) -> torch.Tensor:
    """`[4 B]` uint8 of escapes `[V]` bool."""
    counts = _padded(escaped.to(torch.uint8), BLOCK).view(-1, BLOCK).sum(1, dtype=torch.int32)
    return (counts.cumsum(0, dtype=torch.int32) - counts).view(torch.uint8)


def _padded(values: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % multiple))


def _bytes(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _require_page(values: torch.Tensor) -> None:
    if values.dtype != torch.bfloat16 or values.dim() != 2:
        raise ValueError(f"a page is [rows, width] of bf16, not {tuple(values.shape)} of {values.dtype}")
    if values.numel() > MAX_VALUES:
        raise ValueError(f"a page of {values.numel()} values; at most {MAX_VALUES} are packed together")


# --- unpacking ---


def read_header(packed: torch.Tensor) -> Header:
    """The header of the page at the start of `packed` `[bytes]` uint8. Raises CorruptPage if it cannot be right.

    On a GPU this waits for the page: read a page's header before it is copied there.
    """
    if packed.numel() < HEADER_BYTES:
        raise CorruptPage(f"{packed.numel()} bytes hold no header of {HEADER_BYTES}")
    data = packed[:HEADER_BYTES].cpu().numpy().tobytes()
    magic, kind, rows, width, size, escapes, codebook = _HEADER.unpack(data)
    if magic != MAGIC or data[-1] != 0:
        raise CorruptPage(f"not a packed page: it begins with {magic!r}")
    if kind not in (RAW, PACKED):
        raise CorruptPage(f"kind {kind} is neither raw ({RAW}) nor packed ({PACKED})")
    if rows * width > MAX_VALUES:
        raise CorruptPage(f"{rows} x {width} values; at most {MAX_VALUES} are packed together")
    expected = packed_bound(rows, width) if kind == RAW else _sections(rows * width)[2] + escapes
    if size != expected or size > packed_bound(rows, width):
        raise CorruptPage(f"{rows} x {width} values with {escapes} escapes do not take {size} bytes")
    if kind == PACKED and len(set(codebook)) != ESCAPE:
        raise CorruptPage(f"an exponent has two codes: {codebook.hex()}")
    if kind == RAW and (escapes or any(codebook)):
        raise CorruptPage("a raw page has escapes or a codebook")
    if size > packed.numel():
        raise CorruptPage(f"a page of {size} bytes was cut to {packed.numel()}")
    return Header(kind, rows, width, size, escapes, codebook)


def unpack_reference(packed: torch.Tensor) -> torch.Tensor:
    """The page at the start of `packed` `[bytes]` uint8, as `[rows, width]` bf16 on the same device.

    Raises CorruptPage also where the escapes are not as many, or not where, the codes say.
    """
    header = read_header(packed)
    values = header.rows * header.width
    data = packed[HEADER_BYTES : header.size]
    if header.kind == RAW:
        return data.clone().view(torch.bfloat16).view(header.rows, header.width)
    planes, starts, escapes = (offset - HEADER_BYTES for offset in _sections(values))
    lanes = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (data[planes:starts].view(3, -1, 1) >> lanes & 1).view(3, -1)[:, :values]
    codes = bits[0] | bits[1] << 1 | bits[2] << 2
    escaped = codes == ESCAPE
    if int(escaped.sum()) != header.escapes:
        raise CorruptPage(f"{int(escaped.sum())} values are escaped, the header says {header.escapes}")
    if not torch.equal(data[starts:escapes], _escapes_before_blocks(escaped)):
        raise CorruptPage("the escapes of a block do not begin where the page says")
    codebook = _bytes(header.codebook + b"\0", packed.device)
    exponents = codebook[codes.to(torch.int32)]
    exponents[escaped] = data[escapes:]
    sign_mantissa = data[:values].to(torch.int32)
    whole = (sign_mantissa & 0x80) << 8 | exponents.to(torch.int32) << 7 | sign_mantissa & 0x7F
    return whole.to(torch.int16).view(torch.bfloat16).view(header.rows, header.width)


@triton.jit
def _popcount(word):
    """Set bits of uint32; LLVM knows this idiom."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _unpack_kernel(
    packed,  # *u8: pages
    starts,  # *i64 [pages]: where each begins in `packed`, a multiple of 16
    out,  # *i16: the pages' values
    values,  # of a page
    width,
    out_stride,  # values; used if STRIDED
    STRIDED: tl.constexpr,  # rows of `out` do not follow one another
    TILE: tl.constexpr,  # values a program decodes; a multiple of 1024
):
    """Grid: tiles of a page, pages. With a header that holds, reads nothing beyond the page, whatever follows it."""
    WORDS: tl.constexpr = TILE // 32
    page = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    header = packed + tl.multiple_of(tl.load(starts + page), 16)
    fields = header.to(tl.pointer_type(tl.uint32), bitcast=True)
    word = tile * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    index = word[:, None] * 32 + lane[None, :]
    inside = index < values
    if STRIDED:
        row = index // width
        place = out + (page * (values // width) + row) * out_stride + (index - row * width)
    else:
        place = out + page * values + index
    if tl.load(fields + 1) == 1:
        words = (values + 31) // 32
        planes = fields + 8 + 8 * words + word
        bit0 = tl.load(planes, mask=word < words, other=0)
        bit1 = tl.load(planes + words, mask=word < words, other=0)
        bit2 = tl.load(planes + 2 * words, mask=word < words, other=0)
        shift = lane[None, :].to(tl.uint32)
        code = ((bit0[:, None] >> shift) & 1) | (((bit1[:, None] >> shift) & 1) << 1)
        code = code | (((bit2[:, None] >> shift) & 1) << 2)

        escape_words = bit0 & bit1 & bit2
        count = _popcount(escape_words).to(tl.int32)
        first = tl.load(fields + 8 + 11 * words + tile * (TILE // 1024)).to(tl.int32)
        before = first + tl.cumsum(count, 0) - count
        lower = (tl.full((1, 32), 1, tl.uint32) << shift) - 1
        rank = before[:, None] + _popcount(escape_words[:, None] & lower).to(tl.int32)
        escapes = header + 32 + 44 * words + 4 * ((values + 1023) // 1024)
        listed = (rank >= 0) & (rank < tl.load(fields + 5).to(tl.int32))
        exponent = tl.load(escapes + rank, mask=inside & (code == 7) & listed, other=0).to(tl.uint32)

        book = tl.where(code < 4, tl.load(fields + 6), tl.load(fields + 7))
        exponent = tl.where(code == 7, exponent, (book >> ((code & 3) * 8)) & 0xFF)
        low = tl.load(header + 32 + index, mask=inside, other=0).to(tl.uint32)
        whole = ((low & 0x80) << 8) | (exponent << 7) | (low & 0x7F)
        tl.store(place, whole.to(tl.int16), mask=inside)
    else:
        raw = (header + 32).to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(place, tl.load(raw + index, mask=inside, other=0), mask=inside)


def unpack(packed: torch.Tensor, out: torch.Tensor, starts: torch.Tensor | None = None) -> None:
    """Decodes pages of one shape into `out`, one after the other; bit for bit as `unpack_reference`.

    packed  `[bytes]` uint8, contiguous: pages, each beginning at a multiple of ALIGNMENT
    out     `[pages * rows, width]` bf16; rows may be apart, values of a row may not
    starts  `[pages]` int64 on the same device: where each page begins, in bytes. None: one page, at the start

    Without `starts` the header is read and CorruptPage raised; on a GPU that waits for the page. With `starts`
    nothing is waited for: pages must have passed `check_pages` before they were copied to the GPU. Content is
    not checked, that is for the checksums around it. Raises ValueError for arguments of another shape or kind.
    """
    _require_out(out)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueError(f"packed pages are contiguous [bytes] of uint8, not {tuple(packed.shape)} of {packed.dtype}")
    if packed.data_ptr() % ALIGNMENT:
        raise ValueError(f"packed pages begin at a multiple of {ALIGNMENT} bytes")
    pages = 1 if starts is None else starts.numel()
    if starts is None:
        check_pages(packed, [0], out.shape[0], out.shape[1])
        starts = torch.zeros(1, dtype=torch.int64, device=packed.device)
    if starts.dtype != torch.int64 or starts.dim() != 1 or {starts.device, out.device} != {packed.device}:
        raise ValueError("starts are [pages] of int64, on the device of packed and out")
    if pages > MAX_PAGES:
        raise ValueError(f"{pages} pages; at most {MAX_PAGES} are decoded together")
    if pages == 0 or out.shape[0] % pages:
        raise ValueError(f"{out.shape[0]} rows are not {pages} pages of one shape")
    values = out.numel() // pages
    if values:
        strided = not out.is_contiguous()
        grid = (triton.cdiv(values, TILE), pages)
        _unpack_kernel[grid](
            packed, starts, out.view(torch.int16), values, out.shape[1], out.stride(0), strided, TILE,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def check_pages(packed: torch.Tensor, starts: list[int], rows: int, width: int) -> None:
    """Raises CorruptPage unless a page of `rows` by `width` values begins at each of `starts` in `packed`.

    packed `[bytes]` uint8 on the CPU; only headers are read.
    """
    for start in starts:
        if start < 0 or start % ALIGNMENT:
            raise CorruptPage(f"a page begins at {start}, which is no multiple of {ALIGNMENT} bytes")
        header = read_header(packed[start:])
        if (header.rows, header.width) != (rows, width):
            raise CorruptPage(f"a page of {header.rows} x {header.width} values, {rows} x {width} are wanted")


def _require_out(out: torch.Tensor) -> None:
    if out.dtype != torch.bfloat16 or out.dim() != 2:
        raise ValueError(f"out is [rows, width] of bf16, not {tuple(out.shape)} of {out.dtype}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"the values of a row of out are {out.stride(1)} apart, they must be neighbours")


def compile_specs() -> Iterator[KernelSpec]:
    """The configurations that `unpack` launches."""
    for strided in (False, True):
        yield KernelSpec(
            name="unpack_strided" if strided else "unpack",
            kernel=_unpack_kernel,
            signature={
                "packed": "*u8",
                "starts": "*i64",
                "out": "*i16",
                "values": "i32",
                "width": "i32",
                "out_stride": "i64" if strided else "i32",
            },
            constexprs={"STRIDED": strided, "TILE": TILE},
            num_warps=NUM_WARPS,
            aligned=("packed", "starts", "out", "values", "width", "out_stride"),
        )
