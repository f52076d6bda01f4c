from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from sglang_hcache.triton_kernels import packing
from sglang_hcache.triton_kernels.aot import NotCompiled, compile_spec, modules_with_kernels

# A process of its own: in this one Triton's interpreter may be in the place of its compiler.
COMPILER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SPILLING = """
import triton, triton.language as tl
from sglang_hcache.triton_kernels.aot import KernelSpec

@triton.jit
def kernel(values, out, N: tl.constexpr):
    place = tl.arange(0, N)
    x = tl.load(values + place)
    tl.store(out + place, x / tl.sum(x, 0))

def compile_specs():
    yield KernelSpec("spilling", kernel, {"values": "*fp32", "out": "*fp32"}, {"N": 8192}, num_warps=1)
    yield KernelSpec("broken", kernel, {"values": "*fp32", "out": "*fp32"}, {"N": 100})
"""


def run(*arguments: str, path: str = ROOT) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "sglang_hcache.triton_kernels.aot", *arguments]
    environment = COMPILER | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("module", modules_with_kernels())
def test_every_configuration_compiles_and_spills_nothing(module: str) -> None:
    records = run(module)
    assert not [record for record in records if record.get("error")]
    assert not [record for record in records if record["spills"]]
    specs = list(importlib.import_module(module).compile_specs())
    expected = [(spec.name, capability) for spec in specs for capability in spec.capabilities]
    assert sorted((record["name"], record["capability"]) for record in records) == sorted(expected)


def test_spills_and_failures_are_seen(tmp_path: object) -> None:
    with open(f"{tmp_path}/spilling_kernels.py", "w") as file:
        file.write(SPILLING)
    spilling, broken = run("spilling_kernels", "--capability", "90", path=str(tmp_path))
    assert int(str(spilling["spills"])) > 0
    assert "power of 2" in str(broken["error"])


def test_the_interpreter_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotCompiled, match="TRITON_INTERPRET"):
        compile_spec(next(packing.compile_specs()), 90)
