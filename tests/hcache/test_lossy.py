"""Rows that are stored in eight bits: how they lie, how far off they come back, and on which rows projectors work."""

from __future__ import annotations

import pytest
import torch

from sglang_hcache.lossy import LossyCode, LossyProjector
from sglang_hcache.model import Unsupported

WIDTH = 64
# Half a step of the largest magnitude, as `triton_kernels.quantize` derives it, and bf16's own rounding.
WORST = {"int8": 1 / 254, "fp8_e4m3": 1 / 16}


@pytest.mark.parametrize("code", WORST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_close(code: str, dtype: torch.dtype) -> None:
    rows = (torch.randn(3, 17, WIDTH) * torch.logspace(-3, 3, 17)[:, None]).to(dtype)
    lossy = LossyCode(code, WIDTH, dtype)
    encoded = lossy.encode(rows)
    assert encoded.shape == (3, 17, lossy.row_bytes)
    assert lossy.row_bytes == WIDTH + 4
    for layer in range(3):
        back = lossy.decode(encoded[layer])
        assert back.dtype == dtype
        wanted = rows[layer].double()
        off = (back.double() - wanted).abs() / wanted.abs().amax(1, keepdim=True)
        assert 0 < off.max() <= WORST[code] * (1 + 2**-14) + torch.finfo(dtype).eps
        assert not torch.equal(back, rows[layer])


def test_a_part_of_the_rows_is_decoded_by_itself() -> None:
    lossy = LossyCode("int8", WIDTH, torch.float32)
    encoded = lossy.encode(torch.randn(1, 20, WIDTH))[0]
    assert torch.equal(lossy.decode(encoded[5:9]), lossy.decode(encoded)[5:9])
    assert lossy.decode(encoded[:0]).shape == (0, WIDTH)


def test_a_projector_works_on_decoded_rows() -> None:
    seen = list[torch.Tensor]()

    class Recorder:
        def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
            seen.extend([rows, positions, slots])

    lossy = LossyCode("int8", WIDTH, torch.float32)
    encoded, places = lossy.encode(torch.randn(1, 4, WIDTH))[0], torch.arange(4)
    LossyProjector(Recorder(), lossy).project(0, encoded, places, places + 1)
    assert torch.equal(seen[0], lossy.decode(encoded))
    assert torch.equal(seen[1], places)
    assert torch.equal(seen[2], places + 1)


def test_a_width_without_room_for_a_scale() -> None:
    with pytest.raises(Unsupported, match="--hcache-lossy"):
        LossyCode("int8", 66, torch.float32)
