"""Kernels run in Triton's interpreter where there is no GPU; it must be chosen before they are defined."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("Triton was imported without its interpreter: run tests/triton_kernels by themselves")
    os.environ["TRITON_INTERPRET"] = "1"
