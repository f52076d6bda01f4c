"""An SGLang platform for machines without an accelerator, in pure PyTorch.

SGLang's own CPU platform needs kernels that the wheel from PyPI lacks on most machines. This one answers
every platform question with PyTorch's native operators, so the unpatched server runs anywhere.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: a class, or None where an accelerator is found."""
    if torch.accelerator.is_available():
        return None
    return "sglang_hcache.cpu_platform.TorchCpuPlatform"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang is untyped here
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False
