"""The record of one page: a header, then each layer's payload, each with a checksum of its own.

Header, little endian:

    0    magic          8 bytes
    8    schema         uint32
    12   page_tokens    uint32
    16   fingerprint    16 bytes
    32   key            32 bytes
    64   parent         32 bytes, the key of the page before it in its prefix
    96   n_layers       uint32, then 4 zero bytes
    104  positions      int32[page_tokens]
    ...  (to a multiple of 8)
    ...  layer sums     uint64[n_layers], xxh3_64 of each payload
    ...  header sum     uint64, xxh3_64 of everything before it

Header and payloads start at multiples of 4096 bytes; what lies between them means nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

ALIGNMENT = 4096
SCHEMA_VERSION = 2
KEY_BYTES = 32
ROOT = bytes(KEY_BYTES)  # the parent of a prefix's first page
FINGERPRINT_BYTES = 16

_MAGIC = b"hcchunk\0"
_FIXED = struct.Struct("<8sII16s32s32sI4x")

Record = npt.NDArray[np.uint8]


def erase_header(record: Record) -> None:
    """No header is found in it any more."""
    record[: len(_MAGIC)] = 0


class ChunkDamaged(Exception):
    """A record is not, or not any more, what was written."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ChunkLayout:
    """Where everything lies in a record; the same for all records of a fingerprint.

    Raises ValueError where no record can look like that.
    """

    page_tokens: int
    layer_bytes: tuple[int, ...]  # payload of each layer in a page; 0 where nothing is stored

    def __post_init__(self) -> None:
        if self.page_tokens <= 0:
            raise ValueError(f"page_tokens is {self.page_tokens}, not positive")
        if not self.layer_bytes or min(self.layer_bytes) < 0:
            raise ValueError(f"layer_bytes is {self.layer_bytes}: one size per layer, none negative")

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def header_bytes(self) -> int:
        return self._offsets[0]

    @property
    def record_bytes(self) -> int:
        return self._offsets[-1]

    def layer_offset(self, layer: int) -> int:
        """Byte offset of a layer's payload in the record."""
        return self._offsets[layer]

    def payload(self, record: Record, layer: int) -> Record:
        """View of a layer's payload, uint8 [layer_bytes[layer]]."""
        start = self._offsets[layer]
        return record[start : start + self.layer_bytes[layer]]

    @cached_property
    def sums_at(self) -> int:
        return _round_up(_FIXED.size + 4 * self.page_tokens, 8)

    @cached_property
    def header_sum_at(self) -> int:
        return self.sums_at + 8 * self.n_layers

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        offsets = [_round_up(self.header_sum_at + 8, ALIGNMENT)]
        for size in self.layer_bytes:
            offsets.append(_round_up(offsets[-1] + size, ALIGNMENT))
        return tuple(offsets)


@dataclass(frozen=True)
class Header:
    """Whose record it is."""

    fingerprint: bytes
    key: bytes
    parent: bytes  # ROOT for the first page of a prefix


def positions(records: Record, layout: ChunkLayout) -> npt.NDArray[np.int32]:
    """View of the tokens' positions as the forward saw them; write them before sealing.

    records: [..., record_bytes]; returns int32 [..., page_tokens].
    """
    return records[..., _FIXED.size : _FIXED.size + 4 * layout.page_tokens].view(np.int32)


def parent_of(record: Record) -> bytes:
    """The key of the page before it, as a sealed record says."""
    *_, parent, _ = _FIXED.unpack_from(record[: _FIXED.size].data)
    return bytes(parent)


def seal(record: Record, layout: ChunkLayout, fingerprint: bytes, key: bytes, parent: bytes) -> None:
    """Write the header around `positions`, with the checksums of the payloads as they are now."""
    assert record.shape == (layout.record_bytes,)
    assert len(fingerprint) == FINGERPRINT_BYTES
    assert len(key) == len(parent) == KEY_BYTES
    fixed = _FIXED.pack(_MAGIC, SCHEMA_VERSION, layout.page_tokens, fingerprint, key, parent, layout.n_layers)
    record[: _FIXED.size] = np.frombuffer(fixed, np.uint8)
    record[_FIXED.size + 4 * layout.page_tokens : layout.sums_at] = 0
    _layer_sums(record, layout)[:] = [_sum(layout.payload(record, i)) for i in range(layout.n_layers)]
    _header_sum(record, layout)[0] = _sum(record[: layout.header_sum_at])


def read_header(record: Record, layout: ChunkLayout) -> Header:
    """The header of a record of which at least the first `header_bytes` are there.

    Raises ChunkDamaged where the header does not hold; says nothing about the payloads.
    """
    magic, schema, page_tokens, fingerprint, key, parent, n_layers = _FIXED.unpack_from(record[: _FIXED.size].data)
    if magic != _MAGIC:
        raise ChunkDamaged("no record was written here")
    if (schema, page_tokens, n_layers) != (SCHEMA_VERSION, layout.page_tokens, layout.n_layers):
        raise ChunkDamaged("the header is of another layout")
    if _header_sum(record, layout)[0] != _sum(record[: layout.header_sum_at]):
        raise ChunkDamaged("the header's checksum is wrong")
    return Header(fingerprint, key, parent)


def verify(record: Record, layout: ChunkLayout, fingerprint: bytes, key: bytes) -> None:
    """Raise ChunkDamaged unless the record is this page, whole."""
    header = read_header(record, layout)
    if (header.fingerprint, header.key) != (fingerprint, key):
        raise ChunkDamaged("the record is another page")
    for layer, expected in enumerate(_layer_sums(record, layout).tolist()):
        if _sum(layout.payload(record, layer)) != expected:
            raise ChunkDamaged(f"the checksum of layer {layer} is wrong")


def _layer_sums(record: Record, layout: ChunkLayout) -> npt.NDArray[np.uint64]:
    return record[layout.sums_at : layout.header_sum_at].view(np.uint64)


def _header_sum(record: Record, layout: ChunkLayout) -> npt.NDArray[np.uint64]:
    return record[layout.header_sum_at : layout.header_sum_at + 8].view(np.uint64)


def _sum(data: Record) -> int:
    return xxhash.xxh3_64_intdigest(data.data)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
