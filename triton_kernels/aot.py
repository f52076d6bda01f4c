"""Compiles kernels for GPUs that need not be there, and says what they cost.

    python -m sglang_hcache.triton_kernels.aot [MODULE ...] [--capability 80 90 100]

A module with kernels offers `compile_specs()`, an iterator of `KernelSpec`. Printed is one JSON line a spec and
capability. Triton's interpreter takes the place of its compiler in the whole process, so TRITON_INTERPRET must be
unset.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)  # A100; H100 and H200; B200
WARP_SIZE = 32
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class NotCompiled(RuntimeError):
    """A kernel could not be compiled, or its machine code could not be read."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration."""

    name: str  # unique in its module
    kernel: Any  # what `triton.jit` returned
    signature: Mapping[str, str]  # Triton's type of each argument that is no constexpr: "*bf16", "i32", ...
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3  # of software pipelining
    aligned: Sequence[str] = field(default=())  # arguments divisible by 16, as Triton finds at a launch
    capabilities: Sequence[int] = CAPABILITIES  # where there is such a kernel

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def signature_of(kernel: Any, types: Mapping[str, str], constexprs: Collection[str]) -> dict[str, str]:
    """The kernel's arguments that are no constexprs, of what several kernels call by the same names."""
    return {name: types[name] for name in kernel.arg_names if name not in constexprs}


@dataclass(frozen=True)
class Report:
    registers: int  # a thread
    shared_bytes: int  # a program
    spills: int  # bytes of stack a thread; Triton's kernels have no other use for it than spilled registers


def compile_spec(spec: KernelSpec, capability: int) -> Report:
    """Compiles `spec` to machine code for sm_`capability`. Raises NotCompiled."""
    if knobs.runtime.interpret:
        raise NotCompiled("TRITON_INTERPRET is set: Triton's interpreter is in the place of its compiler")
    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned}
    source = ASTSource(spec.kernel, signature, dict(spec.constexprs), attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=spec.options)
    except Exception as error:  # the compiler raises errors of many unrelated classes
        raise NotCompiled(f"{spec.name} for sm_{capability}: {error}") from error
    registers, spills = _resource_usage(compiled.asm["cubin"])
    return Report(registers, compiled.metadata.shared, spills)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as the machine code states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    usage = _USAGE.findall(answer.stdout)
    if len(usage) != 1:
        raise NotCompiled(f"cuobjdump found {len(usage)} kernels: {answer.stdout}{answer.stderr}")
    registers, stack, local = (int(value) for value in usage[0])
    return registers, stack + local


def reports(modules: Sequence[str], capabilities: Sequence[int] = CAPABILITIES) -> Iterator[dict[str, Any]]:
    """One record a configuration and capability, of all `modules`' `compile_specs()`; failures have an `error`."""
    for module in modules:
        for spec in importlib.import_module(module).compile_specs():
            for capability in (each for each in capabilities if each in spec.capabilities):
                record = {"module": module.rpartition(".")[2], "name": spec.name, "capability": capability}
                try:
                    yield record | spec.options | asdict(compile_spec(spec, capability))
                except NotCompiled as error:
                    yield record | {"error": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="default: all kernels of this folder")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    arguments = parser.parse_args()
    for record in reports(arguments.modules or modules_with_kernels(), arguments.capability):
        print(json.dumps(record), flush=True)


def modules_with_kernels() -> list[str]:
    """Full names of the modules of this folder that offer `compile_specs`."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return [
        f"sglang_hcache.triton_kernels.{path.stem}" for path in paths if "\ndef compile_specs(" in path.read_text()
    ]


if __name__ == "__main__":
    main()
