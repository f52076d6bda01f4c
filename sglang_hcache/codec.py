"""Codecs for hidden states: lossless packing, or lossy with eight bits per value and a scale per token."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_hcache.model import Unsupported
from sglang_hcache.restoring.host_pages import Projector
from sglang_hcache.triton_kernels.packing import (
    fits_at,
    pack_rows,
    pack_rows_reference,
    packed_row_bytes,
    unpack_rows,
    unpack_rows_reference,
)
from sglang_hcache.triton_kernels.quantize import (
    dequantize_rows,
    dequantize_rows_reference,
    lossy_row_bytes,
    quantize_rows,
    quantize_rows_reference,
)


class Codec(Protocol):
    """Rows of `width` values as bytes, `row_bytes` each, on any device, on its current stream."""

    name: str  # one of `config.CODEC_CHOICES`
    lossless: bool
    row_bytes: int
    identity: str  # of the same name, row_bytes and identity: what one encodes, the other decodes

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`[layers, n, width]` → uint8 `[layers, n, row_bytes]`, contiguous; layers and rows may be apart."""

    def decode(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """uint8 `[n, row_bytes]` of a layer → `[n, width]`."""

    def decodable(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of the n tokens can be decoded in all layers, of `[layers, n, row_bytes]`."""


class PackedCodec:
    """Three quarters of bf16's bytes, lossless; a row of unusual values may not fit."""

    name = "packed"
    lossless = True

    def __init__(self, usual: torch.Tensor) -> None:
        """usual: see `triton_kernels.packing`; uint8 `[layers, width]`, on the device that rows are encoded on."""
        self._usual = usual
        self._width = usual.shape[1]
        self.row_bytes = packed_row_bytes(self._width)
        self.identity = hashlib.sha256(usual.cpu().numpy().tobytes()).hexdigest()

    @staticmethod
    def check(width: int, dtype: torch.dtype) -> None:
        """Raises Unsupported for rows that it cannot encode."""
        if dtype != torch.bfloat16:
            raise Unsupported(f"--hcache-codec packed is for bfloat16, and this model runs in {dtype}; drop it")
        try:
            packed_row_bytes(width)
        except ValueError as error:
            raise Unsupported(f"--hcache-codec packed: {error}; drop it") from error

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        if rows.device.type == "cpu":
            out.copy_(pack_rows_reference(rows, self._usual))
        else:
            pack_rows(rows, self._usual, out)

    def decode(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        if rows.device.type == "cpu":
            return unpack_rows_reference(rows, self._usual[layer])
        values = torch.empty(rows.shape[0], self._width, dtype=torch.bfloat16, device=rows.device)
        unpack_rows(rows, self._usual[layer], values)
        return values

    def decodable(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        fits: NDArray[np.bool_] = (rows[:, :, fits_at(self._width)] == 0).all(axis=0)
        return fits


class LossyCodec:
    """Eight bits a value, then the row's scale; `triton_kernels.quantize` says how far off what comes back can be."""

    lossless = False
    identity = ""

    def __init__(self, name: str, width: int, dtype: torch.dtype) -> None:
        """name: one of `config.CODEC_CHOICES`. Raises Unsupported for rows that it cannot encode."""
        try:
            self.row_bytes = lossy_row_bytes(width)
        except ValueError as error:
            raise Unsupported(f"--hcache-codec {name}: {error}; drop it") from error
        self.name = name
        self._code, self._width, self._dtype = name.removeprefix("lossy_"), width, dtype

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        if rows.device.type == "cpu":
            out.copy_(quantize_rows_reference(rows, self._code))
        else:
            quantize_rows(rows, out, self._code)

    def decode(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        if rows.device.type == "cpu":
            return dequantize_rows_reference(rows, self._code, self._dtype)
        values = torch.empty(rows.shape[0], self._width, dtype=self._dtype, device=rows.device)
        dequantize_rows(rows, values, self._code)
        return values

    def decodable(self, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.ones(rows.shape[1], np.bool_)


class DecodingProjector:
    """Decodes rows, then passes them to another projector."""

    def __init__(self, projector: Projector, codec: Codec) -> None:
        self._projector = projector
        self._codec = codec

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        self._projector.project(layer, self._codec.decode(layer, rows), positions, slots)
