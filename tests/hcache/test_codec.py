"""Rows in fewer bytes: how they lie, how they come back, which do not, and on which rows projectors work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_hcache.codec import Codec, DecodingProjector, LossyCodec, PackedCodec
from sglang_hcache.model import Unsupported
from sglang_hcache.triton_kernels.packing import usual_exponents

WIDTH = 64


def encoded_by(codec: Codec, rows: torch.Tensor) -> torch.Tensor:
    out = torch.full((*rows.shape[:2], codec.row_bytes), 0xA5, dtype=torch.uint8)
    codec.encode(rows, out)
    return out


# Half a step of the largest magnitude, as `triton_kernels.quantize` derives it, and bf16's own rounding.
WORST = {"lossy_int8": 1 / 254, "lossy_fp8_e4m3": 1 / 16}


@pytest.mark.parametrize("code", WORST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_close(code: str, dtype: torch.dtype) -> None:
    rows = (torch.randn(3, 17, WIDTH) * torch.logspace(-3, 3, 17)[:, None]).to(dtype)
    lossy = LossyCodec(code, WIDTH, dtype)
    encoded = encoded_by(lossy, rows)
    assert encoded.shape == (3, 17, lossy.row_bytes)
    assert lossy.row_bytes == WIDTH + 4
    for layer in range(3):
        back = lossy.decode(layer, encoded[layer])
        assert back.dtype == dtype
        wanted = rows[layer].double()
        off = (back.double() - wanted).abs() / wanted.abs().amax(1, keepdim=True)
        assert 0 < off.max() <= WORST[code] * (1 + 2**-14) + torch.finfo(dtype).eps
        assert not torch.equal(back, rows[layer])


def with_noise(rows: torch.Tensor, layer: int, token: int) -> torch.Tensor:
    """One row becomes bits that do not pack."""
    rows[layer, token] = torch.randint(-(2**15), 2**15, (rows.shape[2],), dtype=torch.int16).view(torch.bfloat16)
    return rows


def test_packed_rows_come_back_as_they_were_or_say_that_they_did_not_fit() -> None:
    rows = with_noise(torch.randn(3, 17, 512).to(torch.bfloat16), layer=1, token=5)
    packed = PackedCodec(usual_exponents(torch.randn(3, 9, 512).to(torch.bfloat16)))
    encoded = encoded_by(packed, rows)
    assert encoded.shape == (3, 17, packed.row_bytes)
    assert packed.row_bytes == 0.75 * 2 * 512
    kept = packed.decodable(encoded.numpy())
    assert np.flatnonzero(~kept).tolist() == [5], "a token goes with any of its layers"
    for layer in range(3):
        back = packed.decode(layer, encoded[layer, kept])
        assert torch.equal(back.view(torch.int16), rows[layer, kept].view(torch.int16))


def test_each_layer_is_decoded_by_its_own_exponents() -> None:
    """With those of other layers other values come out, so such a codec has another identity."""
    rows = torch.randn(2, 9, 512).to(torch.bfloat16) * torch.logspace(-9, 9, 512, base=2.0).to(torch.bfloat16)
    rows[1] = rows[1].flip(1)
    usual = usual_exponents(rows)
    packed, turned = PackedCodec(usual), PackedCodec(usual.flip(0))
    encoded = encoded_by(packed, rows)
    assert packed.decodable(encoded.numpy()).all()
    for layer in range(2):
        assert torch.equal(packed.decode(layer, encoded[layer]), rows[layer])
        assert not torch.equal(turned.decode(layer, encoded[layer]), rows[layer])
    assert packed.identity != turned.identity
    assert packed.identity == PackedCodec(usual.clone()).identity


CODECS: list[Codec] = [
    LossyCodec("lossy_int8", WIDTH, torch.float32),
    PackedCodec(torch.zeros(1, WIDTH, dtype=torch.uint8)),
]


def rows_for(codec: Codec, tokens: int) -> torch.Tensor:
    return torch.ones(1, tokens, WIDTH, dtype=torch.bfloat16 if codec.lossless else torch.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_a_part_of_the_rows_is_decoded_by_itself(codec: Codec) -> None:
    encoded = encoded_by(codec, rows_for(codec, 20) * torch.arange(20)[:, None])[0]
    assert codec.decodable(encoded[None].numpy()).all()
    whole = codec.decode(0, encoded)
    assert torch.equal(codec.decode(0, encoded[5:9]), whole[5:9])
    assert torch.equal(whole[5:9].mean(1), torch.arange(5, 9))
    assert codec.decode(0, encoded[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("codec", CODECS)
def test_a_projector_works_on_decoded_rows(codec: Codec) -> None:
    seen = list[torch.Tensor]()

    class Recorder:
        def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
            seen.extend([rows, positions, slots])

    encoded, places = encoded_by(codec, rows_for(codec, 4))[0], torch.arange(4)
    DecodingProjector(Recorder(), codec).project(0, encoded, places, places + 1)
    assert torch.equal(seen[0], codec.decode(0, encoded))
    assert torch.equal(seen[1], places)
    assert torch.equal(seen[2], places + 1)


@pytest.mark.parametrize(
    ("name", "width", "dtype"),
    [("lossy_int8", 66, torch.float32), ("packed", 96, torch.bfloat16), ("packed", 128, torch.float16)],
)
def test_values_that_a_code_is_not_for(name: str, width: int, dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match=f"--hcache-codec {name}.*drop it"):
        PackedCodec.check(width, dtype) if name == "packed" else LossyCodec(name, width, dtype)
