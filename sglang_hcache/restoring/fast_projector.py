"""The fast projector: the K and V part of known attention modules, computed by our own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel

from sglang_hcache.model import AttentionSite
from sglang_hcache.triton_kernels.epilogue import FP8_SINCE
from sglang_hcache.triton_kernels.project_kv import project_kv, takes
from sglang_hcache.triton_kernels.projection import Projection
from sglang_hcache.triton_kernels.tuning import choose

# In the source of SGLang 0.5.23, these modules make K and V by a fused projection, then apply K's norm (`k_norm`) and
# RoPE where they have them, and nothing else. A self-test is no substitute: a module may do more to some inputs only.
_KNOWN = {
    "sglang.srt.models.gemma.GemmaAttention",
    "sglang.srt.models.llama.LlamaAttention",
    "sglang.srt.models.olmo2.Olmo2Attention",
    "sglang.srt.models.opt.OPTAttention",
    "sglang.srt.models.qwen2.Qwen2Attention",
    "sglang.srt.models.qwen3.Qwen3Attention",
}
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KernelProjector:
    """Runs `project_kv` on the modules' own weights, as they are at each call.

    Raises ValueError for modules that are not known, or a device without Triton.
    """

    name = "kernels"

    def __init__(self, sites: Sequence[AttentionSite], pool: MHATokenToKVPool) -> None:
        if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
            raise ValueError("no device for Triton")
        self._modules = [_Module(site) for site in sites]
        self._keys, self._values = (
            [buffer.view(pool.dtype) for buffer in buffers] for buffers in (pool.k_buffer, pool.v_buffer)
        )
        self._capability = 0
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            self._capability = 10 * major + minor
            if pool.dtype.itemsize == 1 and self._capability < FP8_SINCE:
                raise ValueError(f"a pool in {pool.dtype} on sm_{self._capability}")

    @torch.no_grad()
    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        keys, values = self._keys[layer], self._values[layer]
        projection = self._modules[layer].projection(scaled=keys.dtype != rows.dtype)
        fused = choose(projection.shape, len(rows), self._capability)
        if fused is not None and not takes(projection, fused):
            fused = None
        project_kv(rows, projection, positions, slots, keys, values, fused=fused)


class _Module:
    """What a known attention module does to K and V."""

    def __init__(self, site: AttentionSite) -> None:
        module: Any = site.module
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if kind not in _KNOWN:
            raise ValueError(f"{kind} is not among the known attention modules")
        self._attention = site.attention
        self._qkv: Any = module.qkv_proj
        self._norm: Any = getattr(module, "k_norm", None)
        self._rotary: Any = getattr(module, "rotary_emb", None)
        plain = isinstance(self._qkv, QKVParallelLinear) and type(self._qkv.quant_method) is UnquantizedLinearMethod
        if not plain or self._qkv.skip_bias_add or self._qkv.weight.dtype not in _KERNEL_DTYPES:
            raise ValueError("the projection is not a plain fused one in bf16, fp16 or fp32")
        if self._rotary is not None and not _turns_plainly(self._rotary):
            raise ValueError(f"rotary embedding {type(self._rotary).__name__}")
        self._check_norm()
        self._made_of: tuple[float, ...] = ()
        self._projection: Projection

    def projection(self, *, scaled: bool) -> Projection:
        """Return the module's current projection: weights and scales may be reloaded, the table of angles may grow.

        scaled: whether K and V are divided by their scales, as the pool does when it stores another dtype.
        """
        weight, bias = self._qkv.weight, self._qkv.bias
        angles = self._rotary.cos_sin_cache if self._rotary is not None else None
        norm = self._norm.weight if self._norm is not None else None
        tensors = (0 if tensor is None else tensor.data_ptr() for tensor in (weight, bias, angles, norm))
        scales = self._scales() if scaled else (1.0, 1.0)
        made_of = (*tensors, *scales)
        if made_of != self._made_of:
            self._made_of, self._projection = made_of, self._make(weight, bias, angles, *scales)
        return self._projection

    def _scales(self) -> tuple[float, float]:
        """Return K's and V's scales. A checkpoint's scales are also kept as floats, so the device is not read."""
        attention = self._attention
        found = (attention.k_scale, attention.k_scale_float), (attention.v_scale, attention.v_scale_float)
        k, v = (1.0 if scale is None else float(scale if value is None else value) for scale, value in found)
        return k, v

    def _make(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        angles: torch.Tensor | None,
        k_scale: float,
        v_scale: float,
    ) -> Projection:
        attention, queries = self._attention, self._qkv.q_proj_shard_size
        return Projection(
            weight=weight[queries:],
            bias=None if bias is None else bias[queries:],
            k_heads=attention.tp_k_head_num,
            k_dim=attention.qk_head_dim,
            v_heads=attention.tp_v_head_num,
            v_dim=attention.v_head_dim,
            norm_weight=None if self._norm is None else self._norm.weight,
            eps=0.0 if self._norm is None else self._norm.variance_epsilon,
            cos_sin=angles,
            neox=self._rotary is None or self._rotary.is_neox_style,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def _check_norm(self) -> None:
        norm = self._norm
        if norm is None:
            return
        if type(norm) is not RMSNorm or norm.variance_size_override is not None:
            raise ValueError(f"a norm of K of type {type(norm).__name__}")
        if norm.weight.numel() != self._attention.qk_head_dim and get_parallel().attn_tp_size > 1:
            raise ValueError("a norm over K's heads of all ranks")


def _turns_plainly(rotary: Any) -> bool:
    """Whether scaling, if any, is in the table of angles alone."""
    base = RotaryEmbedding
    return isinstance(rotary, base) and all(
        getattr(type(rotary), method) is getattr(base, method) for method in ("forward_native", "forward_cuda")
    )
