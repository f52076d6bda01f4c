"""A decoder in plain torch with random weights: what a restore is compared with, and what capture is hooked on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.gpu import DEVICE, noise
from sglang_hcache.triton_kernels.projection import Projection
from sglang_hcache.triton_kernels.tuning import SHAPES, Shape

EPS = 1e-6
CHUNK = 8192  # tokens that a chunked prefill forwards at once

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Model:
    """All heads have keys and values of their own."""

    name: str
    layers: int
    intermediate: int  # of the gated MLP
    shape: Shape

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Of a token's hidden state in one layer."""
        return self.shape.width * dtype.itemsize

    def kv_row_bytes(self, dtype: torch.dtype) -> int:
        return (self.shape.k_heads + self.shape.v_heads) * self.shape.head_dim * dtype.itemsize


MODELS = tuple(
    Model(name, layers, intermediate, SHAPES[name])
    for name, layers, intermediate in (
        ("Llama-2-7B", 32, 11008),
        ("Llama-2-13B", 40, 13824),
        ("Phi-3-mini", 32, 8192),
        ("Gemma-7B", 28, 24576),
    )
)
TINY = Model("tiny", 2, 96, Shape(width=64, k_heads=2, v_heads=2, head_dim=32))


@dataclass(frozen=True)
class Weights:
    """One layer's; a product with any of them keeps the variance."""

    qkv: torch.Tensor  # [3 · heads · dim, width]
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    heads: int

    @classmethod
    def random(cls, model: Model, dtype: torch.dtype) -> Weights:
        shape, inner = model.shape, model.shape.k_heads * model.shape.head_dim
        sizes = {
            "qkv": (3 * inner, shape.width),
            "out": (shape.width, inner),
            "gate_up": (2 * model.intermediate, shape.width),
            "down": (shape.width, model.intermediate),
        }
        made = {name: noise(*size, dtype=dtype, scale=size[1] ** -0.5) for name, size in sizes.items()}
        return cls(**made, heads=shape.k_heads)


class Attention(torch.nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        """hidden `[n, width]`; cos, sin `[n, 1, dim]`; attend: of q, k, v, each `[n, heads, dim]`."""
        query, key, value = (
            F.linear(hidden, self._weights.qkv).view(len(hidden), 3, self._weights.heads, -1).unbind(1)
        )
        attended = attend(_turned(query, cos, sin), _turned(key, cos, sin), value)
        return F.linear(attended.reshape(len(hidden), -1), self._weights.out)


class Layer(torch.nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.attention = Attention(weights)
        self._weights = weights

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:], eps=EPS), cos, sin, attend)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS), self._weights.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self._weights.down)


def angles(cos_sin: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Attention` takes: of both halves of a head, which are turned together."""
    cos, sin = cos_sin[positions].to(dtype)[:, None].chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def _by_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)[None]


class Prefix:
    """Attention over all tokens so far: the chunks of a prompt come one after another."""

    def __init__(self, model: Model, tokens: int, dtype: torch.dtype) -> None:
        heads, dim = model.shape.k_heads, model.shape.head_dim
        self._keys, self._values = (torch.empty(tokens, heads, dim, dtype=dtype, device=DEVICE) for _ in range(2))
        self.length = 0

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        begin, self.length = self.length, self.length + len(query)
        self._keys[begin : self.length], self._values[begin : self.length] = key, value
        with flash():
            attended: torch.Tensor = F.scaled_dot_product_attention(
                _by_heads(query),
                _by_heads(self._keys[: self.length]),
                _by_heads(self._values[: self.length]),
                attn_mask=causal_lower_right(len(query), self.length),
            )
        return attended[0].transpose(0, 1)


class Decoding:
    """Attention of one token a request over `context` others, whose K and V are random; the last is its own."""

    def __init__(self, model: Model, batch: int, context: int, dtype: torch.dtype) -> None:
        heads, dim = model.shape.k_heads, model.shape.head_dim
        self._keys, self._values = (noise(batch, context, heads, dim, dtype=dtype) for _ in range(2))

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self._keys[:, -1], self._values[:, -1] = key, value
        with flash():
            attended: torch.Tensor = F.scaled_dot_product_attention(
                query[:, :, None], self._keys.transpose(1, 2), self._values.transpose(1, 2)
            )
        return attended


def flash() -> contextlib.AbstractContextManager[object]:
    """Flash attention, or an error; on a CPU whatever torch has."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if DEVICE == "cuda" else contextlib.nullcontext()


def forward(
    layers: Sequence[Layer], attends: Sequence[Attend], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    for layer, attend in zip(layers, attends, strict=True):
        x = layer(x, cos, sin, attend)
    return x


def forward_kv(
    rows: torch.Tensor, projection: Projection, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as a forward makes them of its attention's input: product rounded to its dtype, RoPE in float32."""
    p = projection
    key, value = F.linear(rows, p.weight).split([p.k_heads * p.k_dim, p.v_heads * p.v_dim], dim=1)
    key, value = key.unflatten(1, (p.k_heads, p.k_dim)), value.unflatten(1, (p.v_heads, p.v_dim))
    if p.cos_sin is not None:
        key = _turned(key.float(), *angles(p.cos_sin, positions, torch.float32)).to(rows.dtype)
    return key, value
