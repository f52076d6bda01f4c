from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_hcache.cpu.attention import TorchCpuAttention

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 256
DRAFTS = 4
RUNNER = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 0, 5, 40, 1000])
@pytest.mark.parametrize("prefixes", [[0], [60], [0, 33, 64]])
def test_is_what_the_stock_backend_computes(prefixes: list[int], window: int | None, dtype: torch.dtype) -> None:
    """The stock method is the reference; output is poisoned, so each row must be written."""
    torch.manual_seed(0)
    extends = [7, 20, 1][: len(prefixes)]
    lengths = [prefix + extend for prefix, extend in zip(prefixes, extends, strict=True)]
    query = torch.randn(sum(extends), HEADS, DIM).to(dtype)
    key, value = (torch.randn(SLOTS, KV_HEADS, DIM).to(dtype) for _ in range(2))
    req_to_token = torch.stack([torch.randperm(SLOTS) for _ in prefixes])
    arguments = (
        *(key, value, req_to_token, torch.arange(len(prefixes))),
        *(torch.tensor(lengths), torch.tensor(prefixes), torch.tensor(extends)),
    )
    outputs = []
    for backend in (TorchNativeAttnBackend, TorchCpuAttention):
        output = torch.full_like(query, torch.nan)
        backend(RUNNER)._run_sdpa_forward_extend(
            query,
            output,
            *arguments,
            scaling=DIM**-0.5,
            enable_gqa=True,
            causal=True,
            sliding_window_size=window,
        )
        outputs.append(output.float())
    assert torch.allclose(outputs[0], outputs[1], atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_drafts_attend_to_those_before_them() -> None:
    """When they are verified SGLang says how long each request was before; the rest is in the number of queries."""
    torch.manual_seed(0)
    lengths = torch.tensor([60, 3])
    query = torch.randn(len(lengths) * DRAFTS, HEADS, DIM)
    key, value = (torch.randn(SLOTS, KV_HEADS, DIM) for _ in range(2))
    req_to_token = torch.stack([torch.randperm(SLOTS) for _ in lengths])
    backend, rows = TorchCpuAttention(RUNNER), torch.arange(len(lengths))
    verified, one_by_one = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    backend._run_sdpa_forward_extend(
        query, verified, key, value, req_to_token, rows, lengths, None, None, enable_gqa=True, causal=True
    )
    for draft in range(DRAFTS):
        backend._run_sdpa_forward_decode(
            query[draft::DRAFTS],
            one_by_one[draft::DRAFTS],
            *(key, value, req_to_token, rows, lengths + draft + 1),
            enable_gqa=True,
        )
    assert torch.allclose(verified, one_by_one, atol=1e-6)
