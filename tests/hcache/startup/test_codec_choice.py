"""The lossless codec is given what is usual in this model, and the same at the next start."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_hcache import ranks
from sglang_hcache.codec import Codec, LossyCodec, PackedCodec
from sglang_hcache.config import HCacheConfig
from sglang_hcache.model import Unsupported
from sglang_hcache.startup import codec_choice
from sglang_hcache.startup.codec_choice import codec_of
from sglang_hcache.startup.kept import EXPONENTS
from sglang_hcache.triton_kernels.packing import usual_exponents

LAYERS, TOKENS, WIDTH, PAGE = 2, 40, 512, 16

Choose = Callable[..., Codec | None]


def rows_of(seed: int, *, steep: bool = True) -> torch.Tensor:
    """Channels of a model's layers, each of its own scale; steep ones fit only by what is usual in each."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp2(torch.randint(-12, 13, (LAYERS, 1, WIDTH), generator=generator)) if steep else 1
    return (torch.randn(LAYERS, TOKENS, WIDTH, generator=generator) * scales).to(torch.bfloat16)


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """The codec of a model whose forward hands these rows over."""
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_rank=0, tp_size=1))

    def chosen(
        rows: torch.Tensor | None, *, codec: str | None = "packed", folder: Path = tmp_path, name: str = "llama"
    ) -> Codec | None:
        @contextlib.contextmanager
        def captured(runner: Any, capture: Any, page_tokens: int, tokens: int) -> Iterator[SimpleNamespace]:
            assert page_tokens == PAGE
            yield SimpleNamespace(rows=rows)

        monkeypatch.setattr(codec_choice, "captured_prefill", captured)
        dtype = rows.dtype if rows is not None else torch.bfloat16
        model = SimpleNamespace(model_path=name, hidden_size=WIDTH, dtype=dtype)
        capture: Any = SimpleNamespace(sites=[None] * LAYERS)
        config = HCacheConfig((str(folder),), codec=codec)
        return codec_of(config, SimpleNamespace(model_config=model), capture, PAGE)

    return chosen


def fitting(codec: Codec | None, rows: torch.Tensor) -> float:
    assert codec is not None
    encoded = torch.empty(*rows.shape[:2], codec.row_bytes, dtype=torch.uint8)
    codec.encode(rows, encoded)
    return float(codec.decodable(encoded.numpy()).mean())


def test_rows_that_do_not_fit_by_themselves_fit_by_what_is_usual(choose: Choose) -> None:
    rows = rows_of(1)
    assert fitting(choose(rows), rows) == 1
    assert fitting(PackedCodec(torch.zeros(LAYERS, WIDTH, dtype=torch.uint8)), rows) == 0


def test_exponents_are_taken_as_they_are_where_more_fits_so(choose: Choose) -> None:
    """Half of the values are zeros: as the channels differ in what is usual, so would the exponents of the zeros."""
    rows = rows_of(1, steep=False).relu()
    assert fitting(PackedCodec(usual_exponents(rows)), rows) == 0
    assert fitting(choose(rows), rows) == 1


def test_the_next_start_has_the_same_codec(choose: Choose) -> None:
    """Though its forward gives slightly other rows: another codec would not find what is stored."""
    rows = rows_of(1)
    first, again = choose(rows), choose(rows * 1.01)
    assert first is not None
    assert again is not None
    assert again.identity == first.identity
    other = choose(rows * 1.01, name="another")
    assert other is not None
    assert other.identity != first.identity


def test_what_is_usual_is_measured_anew_where_what_was_kept_does_not_fit(choose: Choose, tmp_path: Path) -> None:
    """Of other weights at the same place, or damaged."""
    rows, others = rows_of(1), rows_of(2)
    choose(rows)
    assert fitting(choose(others), others) == 1
    (file,) = (tmp_path / EXPONENTS).glob("*.json")
    for damaged in ("{", file.read_text().replace('"usual": "', '"usual": "AAAA')):
        file.write_text(damaged)
        assert fitting(choose(others), others) == 1


def test_a_folder_that_cannot_be_written_is_told_of(
    choose: Choose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    rows = rows_of(1)
    with caplog.at_level(logging.WARNING):
        assert fitting(choose(rows, folder=tmp_path / "file"), rows) == 1
    assert "pages packed now are not found by the next server" in caplog.text


def test_other_codecs_need_no_forward(choose: Choose) -> None:
    assert isinstance(choose(rows_of(1).float(), codec="lossy_int8"), LossyCodec)
    assert choose(rows_of(1), codec=None) is None
    assert choose(None) is None, "nothing was captured, as the self-test says"
    with pytest.raises(Unsupported, match="is for bfloat16"):
        choose(rows_of(1).float())
