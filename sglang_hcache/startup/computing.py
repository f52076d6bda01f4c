"""What a server computes with the same weights: everything but the checkpoint that its hidden states depend on."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sglang
import torch
import transformers
from sglang.srt.environ import Envs

from sglang_hcache.startup.fingerprint import file_digest

# Flags that change how the model computes.
_FLAGS = (
    *("modelopt_quant", "enable_tf32_matmul", "enable_deterministic_inference", "rl_on_policy_target"),
    *("flashinfer_mxfp4_moe_precision", "enable_w4a4_mxfp4_megamoe", "speculative_enable_w4a4_mxfp4_megamoe"),
    *("deepep_dispatcher_output_dtype", "flashinfer_a2a_dispatch_type"),  # of what is sent to experts
    "enable_precise_embedding_interpolation",  # of an image's positions, in its encoder
)
# Of quantised weights, they and the kind of GPU decide how many bits activations have.
_BACKENDS = ("fp8_gemm_runner_backend", "fp4_gemm_runner_backend", "moe_runner_backend", "moe_a2a_backend")
# Variables of SGLang's that name a format of numbers, or leave something out of the computation.
_CHANGES_VALUES = re.compile(
    r"(FP|BF|TF|F|INT)(4|8|16|32)|W\dA\d|QUANT|DTYPE|_IGNORED_LAYERS|SKIP_SOFTMAX|SIMULATE_\w+_EXPERTS"
)
_MODEL_CODE = "SGLANG_EXTERNAL_MODEL_PACKAGE"  # has classes of its own for models


def computing(server_args: Any, model_config: Any) -> Iterator[tuple[str, object]]:
    """Named parts of a fingerprint. Raises OSError if code of the model cannot be read."""
    yield "code", (sglang.__version__, transformers.__version__)
    if package := os.environ.get(_MODEL_CODE):
        yield "model_code", _code_of(package)
    if model_config.quantization is not None:
        yield "backends", [getattr(server_args, name) for name in _BACKENDS]
        yield "gpu", torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for name in _FLAGS:
        if value := getattr(server_args, name):
            yield name, value
    for name, value in sorted(os.environ.items()):
        if value and _CHANGES_VALUES.search(name) and (name.startswith("SGLANG_") or name in vars(Envs)):
            yield name, _content_of(value)


def _content_of(value: str) -> str:
    """Of the file, where it names one, as SGLang reads some from: their digest."""
    try:
        return file_digest(Path(value)) if Path(value).is_file() else value
    except OSError:  # too long for a name, say
        return value


def _code_of(package: str) -> list[tuple[str, str]]:
    """Each file of a package that SGLang has imported, by its digest."""
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return sorted((str(file.relative_to(folder)), file_digest(file)) for folder in folders for file in _code(folder))


def _code(folder: str) -> Iterator[Path]:
    return (file for file in Path(folder).rglob("*") if file.suffix in (".py", ".so"))
