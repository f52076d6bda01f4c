"""The emulated GPU as a platform of SGLang: what would run in CUDA kernels of its own, it does in torch."""

from __future__ import annotations

from typing import Any

import torch

from sglang_hcache.cpu.platform import TorchCpuPlatform


def activate() -> str:
    return f"{__name__}.Platform"


class Platform(TorchCpuPlatform):
    device_name = device_type = "cuda"

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend("torch_native")(_make_attention)

    def is_pin_memory_available(self, device: object = None) -> bool:
        return True

    def get_device(self, device_id: int = 0) -> Any:
        return torch.device("cuda", device_id)

    def set_device(self, device: object) -> None:
        pass

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device("cuda", 0)

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info()
        return free, total


def _make_attention(model_runner: Any) -> object:
    from sglang_hcache.cpu.attention import TorchCpuAttention, attend_to_latents  # imports much of SGLang

    if model_runner.use_mla_backend:
        attend_to_latents()

    class Attention(TorchCpuAttention):
        """Masks and such are made where the rest is."""

        def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.device("cuda"):
                attended: torch.Tensor = super().forward_extend(*args, **kwargs)
            return attended

        def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.device("cuda"):
                attended: torch.Tensor = super().forward_decode(*args, **kwargs)
            return attended

    return Attention(model_runner)
