"""Transfers that fail or are short now and then: of segments and of the index, in a real process.

HCACHE_IO_ERRORS: operations of the store, at least, while that happens.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = int(os.environ.get("HCACHE_IO_ERRORS", "500"))
REPOSITORY = Path(__file__).parents[2]
KINDS = ("reads", "writes", "short transfers", "syncs", "allocations")


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler (cc, gcc, clang) for the library that makes transfers fail")
    library = tmp_path_factory.mktemp("errors") / "io_errors.so"
    source = Path(__file__).with_name("io_errors.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("probability", [0.005, 0.05])
def test_failing_transfers_cost_pages_and_nothing_else(tmp_path: Path, preloaded: Path, probability: float) -> None:
    operations = OPERATIONS // 2
    environment = os.environ | {
        "LD_PRELOAD": str(preloaded),
        "HCACHE_ERRORS_UNDER": str(tmp_path),
        "HCACHE_ERRORS_SEED": "1",
    }
    command = [sys.executable, "-m", "tests.storage.child", "survive_errors", str(tmp_path)]
    child = subprocess.run(
        [*command, f"{operations} {probability}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600 + operations,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    report: dict[str, Any] = json.loads(child.stdout)
    injected = dict(zip(KINDS, report["injected"], strict=True))
    during = report["during"]
    print(f"{report['operations']} operations, {report['right']} pages right, damaged: {report['damaged']}")
    print(f"injected: {injected}")
    print(f"counted: { {name: n for name, n in during.items() if n} }")
    print(f"states: {[state.replace(str(tmp_path), '')[:90] for state in report['states']]}")
    assert "Traceback" not in child.stderr
    assert report["right"]
    assert all(injected[kind] for kind in ("reads", "writes", "short transfers", "syncs"))
    assert any(state.startswith("failed: the disk") for state in report["states"])
    assert during["pages_write_failed"]
    assert during["pages_unreadable"]
    if not report["rebuilt"]:  # a rebuilt index may name a page whose write failed
        assert report["damaged"] == 0, "a disk that fails has not damaged a page"
    assert during["pages_unreadable"] <= injected["reads"]
    assert report["recovered"] == ["ok", "ok"]
    assert report["missing"] == [0, 0, 0]
    assert (report["after"]["pages_damaged"], report["after"]["index_rebuilt"]) == (0, 0)
