"""What an installed package has that is no Python module."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_hcache.triton_kernels.tuning import TABLE

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_has_every_module_and_the_measured_table_of_kernels(tmp_path: Path) -> None:
    """Without that, an installed package silently uses cuBLAS for every shape."""
    pytest.importorskip("setuptools", minversion="77")
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    wheels.mkdir()
    for name in ("sglang_hcache", "storage", "triton_kernels"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "triton_kernels" / TABLE.name).write_text('{"entries": []}')
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, wheels], cwd=checkout, check=True, capture_output=True)
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        packed = {name for name in wheel.namelist() if not name.startswith("sglang_hcache-")}
    sources = [*(checkout / "sglang_hcache").rglob("*.py"), *(checkout / "storage").rglob("*.py")]
    sources += (checkout / "triton_kernels").rglob("*.py")
    modules = {str(path.relative_to(checkout)) for path in sources}
    inside = {name if name.startswith("sglang_hcache/") else f"sglang_hcache/{name}" for name in modules}
    assert len(inside) > 100
    assert packed == {*inside, f"sglang_hcache/triton_kernels/{TABLE.name}"}
