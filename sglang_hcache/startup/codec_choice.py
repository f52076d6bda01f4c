"""The codec that the flags name, and what it has to know of the model."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_hcache.codec import Codec, LossyCodec, PackedCodec
from sglang_hcache.config import HCacheConfig
from sglang_hcache.ranks import all_ranks, of_first_rank, taking_turns
from sglang_hcache.saving.capture import Capture
from sglang_hcache.startup.kept import EXPONENTS, Kept
from sglang_hcache.startup.synthetic_forward import captured_prefill
from sglang_hcache.triton_kernels.packing import usual_exponents

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = 256


def codec_of(config: HCacheConfig, runner: Any, capture: Capture | str, page_tokens: int) -> Codec | None:
    """None where none is wanted, or nothing is captured. Raises Unsupported for values that it cannot encode.

    capture: or why there is none. May run the model, on all ranks alike.
    """
    name, model = config.codec, runner.model_config
    if name is None or isinstance(capture, str):
        return None
    if name != PackedCodec.name:
        return LossyCodec(name, model.hidden_size, model.dtype)
    PackedCodec.check(model.hidden_size, model.dtype)
    folder = Path(config.directories[0]) / EXPONENTS
    with taking_turns(folder):  # so that all replicas store the same
        with captured_prefill(runner, capture, page_tokens, _PROMPT_TOKENS) as captured:
            rows = captured.rows
        if not all_ranks(rows is not None):
            return None  # the self-test will say so
        assert rows is not None
        about = {"model": model.model_path, "layers": len(capture.sites), "width": model.hidden_size}
        return PackedCodec(_kept_or_measured(Kept(folder, about), rows))


def _kept_or_measured(kept: Kept, rows: torch.Tensor) -> torch.Tensor:
    """Usual exponents, the same on all ranks, by which most of `rows` fit.

    If there are several, those of an earlier start, whose pages can be used then; or else what is usual in `rows`.
    """
    measured, known = usual_exponents(rows), _read(kept, rows)
    found = ([known] if known is not None else []) + [measured, torch.zeros_like(measured)]
    usual: torch.Tensor = of_first_rank(max(found, key=lambda usual: _fitting(usual, rows)).cpu())
    if known is None or not torch.equal(usual, known.cpu()):
        try:
            kept.write(usual=base64.b64encode(usual.numpy().tobytes()).decode())
        except OSError as error:
            logger.warning("hcache: pages packed now are not found by the next server: %s", error)
    return usual.to(rows.device)


def _read(kept: Kept, rows: torch.Tensor) -> torch.Tensor | None:
    """None where none were kept, or they are damaged."""
    layers, _, width = rows.shape
    try:
        found = np.frombuffer(base64.b64decode((kept.read() or {})["usual"], validate=True), np.uint8)
        return torch.from_numpy(found.reshape(layers, width).copy()).to(rows.device)
    except (KeyError, TypeError, ValueError):
        return None


def _fitting(usual: torch.Tensor, rows: torch.Tensor) -> int:
    """How many tokens can be packed."""
    codec = PackedCodec(usual)
    packed = torch.empty(*rows.shape[:2], codec.row_bytes, dtype=torch.uint8, device=rows.device)
    codec.encode(rows, packed)
    return int(codec.decodable(packed.cpu().numpy()).sum())
