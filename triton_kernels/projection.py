"""What a layer's attention does to its input to get K and V: a description, and the same in PyTorch."""

from __future__ import annotations

import dataclasses

import torch

from sglang_hcache.triton_kernels.tuning import Shape

NO_NORM, HEAD_NORM, FULL_NORM = range(3)  # of K: none, over each head, over all heads


@dataclasses.dataclass(frozen=True)
class Projection:
    """What one layer's attention does to its input to get K and V; N = k_heads · k_dim + v_heads · v_dim.

    weight: `[N, width]`, K's rows first; bias: `[N]`. norm_weight: RMSNorm of K, over each head (`[k_dim]`) or over
    all of them (`[k_heads · k_dim]`); eps is added to the mean square. cos_sin: `[positions, rotary_dim]`, cosines
    then sines, as SGLang's rotary modules keep them; the first rotary_dim columns of a K head are turned, paired by
    halves (NeoX) or with their neighbours (GPT-J). K and V are divided by their scales before they are stored.
    All tensors are contiguous, except that the weight's rows may have gaps between them. Raises ValueError if shapes
    do not fit together, or tensors are not contiguous.
    """

    weight: torch.Tensor
    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    eps: float = 0.0
    cos_sin: torch.Tensor | None = None
    neox: bool = True
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[0] != self.columns or self.weight.stride(1) != 1:
            raise ValueError(f"a weight {list(self.weight.shape)} for {self.columns} columns")
        if self.bias is not None and self.bias.shape != (self.columns,):
            raise ValueError(f"a bias {list(self.bias.shape)} for {self.columns} columns")
        if self.norm_weight is not None and self.norm_weight.numel() not in (self.k_dim, self.k_heads * self.k_dim):
            raise ValueError(f"a norm of {self.norm_weight.numel()} for {self.k_heads} heads of {self.k_dim}")
        if self.k_dim % 2 or self.v_dim % 2 or self.rotary_dim % 2 or self.rotary_dim > self.k_dim:
            raise ValueError(f"heads of {self.k_dim} and {self.v_dim}, {self.rotary_dim} of it turned")
        for name in ("bias", "norm_weight", "cos_sin"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")

    @property
    def columns(self) -> int:
        return self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def rotary_dim(self) -> int:
        return 0 if self.cos_sin is None else self.cos_sin.shape[1]

    @property
    def norm(self) -> int:
        if self.norm_weight is None:
            return NO_NORM
        return HEAD_NORM if self.norm_weight.numel() == self.k_dim else FULL_NORM

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.k_heads, self.v_heads, self.k_dim)


def project_kv_reference(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
) -> None:
    """As `project_kv`, in PyTorch and float64, rounded once, to the buffers' dtype."""
    p = projection
    projected = rows.double() @ p.weight.double().T
    if p.bias is not None:
        projected += p.bias.double()
    key, value = projected.split([p.k_heads * p.k_dim, p.v_heads * p.v_dim], dim=1)
    if p.norm_weight is not None:
        over = key.unflatten(1, (-1, p.norm_weight.numel()))
        inverse = (over.square().mean(dim=-1, keepdim=True) + p.eps).rsqrt()
        key = (over * inverse * p.norm_weight.double()).flatten(1)
    key, value = key.unflatten(1, (p.k_heads, p.k_dim)), value.unflatten(1, (p.v_heads, p.v_dim))
    if p.cos_sin is not None:
        cos, sin = p.cos_sin[positions].double()[:, None].chunk(2, dim=-1)
        turned, stays = key.split([p.rotary_dim, p.k_dim - p.rotary_dim], dim=-1)
        x1, x2 = turned.chunk(2, dim=-1) if p.neox else (turned[..., ::2], turned[..., 1::2])
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        turned = torch.cat((y1, y2), dim=-1) if p.neox else torch.stack((y1, y2), dim=-1).flatten(-2)
        key = torch.cat((turned, stays), dim=-1)
    k_buffer[slots] = (key / p.k_scale).to(k_buffer.dtype)
    v_buffer[slots] = (value / p.v_scale).to(v_buffer.dtype)
