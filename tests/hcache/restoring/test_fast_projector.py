"""What the kernels are told of an attention module."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.models.llama import LlamaAttention

from sglang_hcache.model import AttentionSite
from sglang_hcache.restoring.fast_projector import _Module

WIDTH, HEADS, HEAD = 16, 2, 8


@pytest.fixture
def module() -> _Module:
    llama: Any = LlamaAttention.__new__(LlamaAttention)
    torch.nn.Module.__init__(llama)
    llama.qkv_proj = QKVParallelLinear(
        WIDTH, HEAD, HEADS, bias=False, params_dtype=torch.float32, parallel_group="replicated"
    )
    llama.attn = RadixAttention(HEADS, HEAD, 1.0, HEADS, 0)
    return _Module(AttentionSite(llama, llama.attn, inspect.signature(llama.forward)))


def load_scales(attention: RadixAttention, k_scale: float, v_scale: float) -> None:
    """As SGLang does it with those of a checkpoint, at start and with each update of the weights."""
    with torch.no_grad():
        attention.k_scale.copy_(k_scale)
        attention.v_scale.copy_(v_scale)
        BaseKVCacheMethod(None).process_weights_after_loading(attention)


def test_scales_of_a_checkpoint_are_followed(module: _Module) -> None:
    attention: Any = module._attention
    BaseKVCacheMethod(None).create_weights(attention)
    for scales in ((0.5, 2.0), (0.25, 2.0), (0.25, 4.0)):
        load_scales(attention, *scales)
        projection = module.projection(scaled=True)
        assert (projection.k_scale, projection.v_scale) == scales
        assert module.projection(scaled=True) is projection, "made once"


def test_scales_of_a_file_are_followed(module: _Module) -> None:
    attention: Any = module._attention
    assert module.projection(scaled=True).k_scale == 1
    attention.k_scale = attention.v_scale = 0.125
    assert module.projection(scaled=True).k_scale == module.projection(scaled=True).v_scale == 0.125


def test_a_pool_of_the_models_dtype_has_no_scales(module: _Module) -> None:
    attention: Any = module._attention
    attention.k_scale = attention.v_scale = 0.125
    assert module.projection(scaled=False).k_scale == 1
