"""An SGLang platform for machines without an accelerator, in pure PyTorch.

SGLang's own CPU platform needs kernels that the wheel from PyPI lacks on most machines. This one answers
every platform question with PyTorch's native operators, so the unpatched server runs anywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

_GPU = Path("/dev/nvidiactl")  # in a container, too, if it has been given one
_HIDDEN = ("", "-1")

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: the name of a class, or None.

    None is returned if there is an accelerator, be it one that torch cannot use, or if the user asks for SGLang's own
    CPU engine.
    """
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    if torch.version.cuda and _GPU.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in _HIDDEN:
        logger.error(
            "hcache: there is an NVIDIA GPU that torch %s cannot use, so no model is served on the CPU instead. "
            "Update its driver, to one for CUDA %s; or, to serve on the CPU, set CUDA_VISIBLE_DEVICES to nothing",
            torch.__version__,
            torch.version.cuda,
        )
        return None
    return "sglang_hcache.cpu.platform.TorchCpuPlatform"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang is untyped here
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def init_backend(self) -> None:
        """Called in each worker before attention backends are made."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend("torch_native")(_make_attention)
        _batches_are_on_the_cpu()
        _speculation().use_pytorch()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "EAGLE3", "STANDALONE")

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        slots_of: Callable[..., torch.Tensor] = _speculation().slots_of
        return slots_of

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False


def _speculation() -> Any:
    from sglang_hcache.cpu import speculation  # imports much of SGLang, as all attention does

    return speculation


def _batches_are_on_the_cpu() -> None:
    """For data-parallel attention: unless its own CPU platform is in use, SGLang takes tokens to be on a GPU."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.model_executor import forward_batch_info

    parallel_state._is_cpu = forward_batch_info._is_cpu = True
    dp_attention.memcpy_func = dp_attention.memcpy_cpu


def _make_attention(model_runner: Any) -> object:
    from sglang_hcache.cpu.attention import TorchCpuAttention, attend_to_latents

    if model_runner.use_mla_backend:
        attend_to_latents()
    return TorchCpuAttention(model_runner)
