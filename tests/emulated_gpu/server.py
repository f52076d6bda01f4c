"""SGLang's server on the emulated GPU: `python -m tests.emulated_gpu.server`, with the flags of SGLang's own.

SGLang starts its processes anew, and each of them imports this module first. EMULATED_GPU in the environment has
words for what the device is like: `lazy` or `late` (see `device.install`), `unregistered` if no host memory can be
registered, `unordered` if our streams wait for no event, as a control.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1", "SGLANG_ENABLE_WAR_BARRIER": "1"}

from tests.emulated_gpu import device

_LIBRARIES = Path(__file__).parents[2] / ".cache" / "emulated_gpu"
_how = os.environ.get("EMULATED_GPU", "lazy").split()
device.install(device.build(_LIBRARIES), lazy="lazy" in _how, registers="unregistered" not in _how)

if "unordered" in _how:
    from sglang_hcache.device import streams

    setattr(streams.CudaStream, "wait", lambda _stream, _event: None)  # noqa: B010

_all_entry_points = importlib.metadata.entry_points


def _entry_points(**wanted: str) -> Any:
    """With our platform in the place of others."""
    group = "sglang.srt.platforms"
    if wanted.get("group") != group:
        return _all_entry_points(**wanted)
    return [importlib.metadata.EntryPoint("emulated", "tests.emulated_gpu.platform:activate", group)]


importlib.metadata.entry_points = _entry_points  # type: ignore[assignment]

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
