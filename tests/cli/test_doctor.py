"""hcache doctor: rates that a server has kept, in words, and how to be rid of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sglang_hcache
from sglang_hcache.cli.main import main
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.startup.kept import KeptLayout

MODEL: dict[str, Any] = {
    "name": "small", "layers": 8, "hidden_size": 1024, "query_heads": 16, "kv_heads": 16, "head_dim": 64,
    "intermediate_size": 2816, "vocabulary": 32000,
}  # fmt: skip
ABOUT: dict[str, Any] = {
    "machine": "here", "model": MODEL, "projector": "kernels", "ranks": 1, "rank": 0,
    "page_tokens": 64, "version": sglang_hcache.__version__,
}  # fmt: skip
SLOW_DRIVE = Machine("here", 1e11, 1e13, 1e12, 1e12, 2e10, ssd_bytes_per_s=1e8)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    (tmp_path / "calibration").mkdir()
    write_rates(tmp_path, ABOUT)
    return tmp_path


def write_rates(directory: Path, about: Any, name: str = "a", machine: Machine = SLOW_DRIVE) -> None:
    kept = {"about": about, "rates": vars(machine)}
    (directory / "calibration" / f"{name}.json").write_text(json.dumps(kept))


def test_it_says_what_limits(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured)]) == 0
    said = capsys.readouterr().out
    assert f"{measured}: reads " in said
    assert "small, rank 0 of 1, on here" in said
    assert "layers 0–7: hidden states\n" in said
    assert "a second drive would give" in said
    assert "drives 0.1 GB/s" in said


def test_a_prefetcher_on_another_host_is_the_lower_tier(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow_link = replace(SLOW_DRIVE, ssd_bytes_per_s=0.0, remote_bytes_per_s=1e8)
    write_rates(measured, ABOUT | {"prefetcher": "tcp://store:7070"}, machine=slow_link)
    assert main(["doctor", "--dir", str(measured)]) == 0
    said = capsys.readouterr().out
    assert "host to device 20 GB/s, the prefetcher's host 0.1 GB/s\n" in said
    assert "8192 tokens from remote: " in said
    assert "twice the link to the prefetcher's host would give" in said
    assert "second drive" not in said


def test_json_holds_rates_times_and_limits(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured), "--json"]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    (model,) = report["models"]
    assert model["rates"]["ssd_bytes_per_s"] == 1e8
    assert model["rates"]["peer_bytes_per_s"] is None
    assert "Infinity" not in text
    assert report["skipped"] == {}
    assert [row["tokens"] for row in model["times"]["host"]] == [1024, 8192, 65536]
    assert all(row["plan_s"] <= row["recompute_s"] for rows in model["times"].values() for row in rows)
    assert report["drives_bytes_per_s"][str(measured)] > 0


def test_the_layout_of_what_is_stored(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same model there may be others, of other rows."""
    shape = ModelShape(**MODEL)
    KeptLayout(measured, shape, 64, hidden_bytes=1024, kv_bytes=0).write(Layout(0, 1, 7))
    KeptLayout(measured, shape, 32, hidden_bytes=None, kv_bytes=0).write(Layout(0, 2, 6))
    (measured / "layouts" / "broken.json").write_text("{")
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "layers 0–7: hidden states\n" in capsys.readouterr().out
    KeptLayout(measured, shape, 64, hidden_bytes=None, kv_bytes=0).write(Layout(0, 3, 5))
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "layers 0–2: hidden states\n  layers 3–7: KV\n" in capsys.readouterr().out


def test_the_layout_of_several_ranks_is_kept_by_what_one_of_them_stores(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODEL | {"stored_kv_bytes": 4096}
    write_rates(measured, ABOUT | {"ranks": 2, "model": model})
    KeptLayout(measured, ModelShape(**model), 64, hidden_bytes=None, kv_bytes=2048).write(Layout(0, 0, 8))
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "layers 0–7: KV\n" in capsys.readouterr().out
    write_rates(measured, ABOUT | {"ranks": 2, "model": model, "prefetcher": "tcp://host:7400"})
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "layers 0–7: hidden states\n" in capsys.readouterr().out


def test_where_nothing_was_planned_the_smaller_one_is_stored(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rates(measured, ABOUT | {"model": MODEL | {"kv_heads": 4}})
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "layers 0–7: KV\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_where_nothing_was_measured(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(tmp_path), *options]) == 3
    printed = capsys.readouterr()
    assert "no server has measured" in printed.err
    if options:
        assert json.loads(printed.out)["models"] == []


def test_rates_are_forgotten(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured), "--again"]) == 0
    assert "1 forgotten" in capsys.readouterr().out
    assert main(["doctor", "--dir", str(measured)]) == 3
    assert "no server has measured" in capsys.readouterr().err
    assert main(["doctor", "--dir", str(measured), "--again"]) == 3
    assert f"nothing to forget ({measured / 'calibration'})" in capsys.readouterr().err


@pytest.mark.parametrize(
    "about", [{}, ABOUT | {"model": {name: size for name, size in MODEL.items() if name != "layers"}}, []]
)
def test_a_file_that_is_none_is_left_out(about: Any, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rates(measured, about, name="b")
    assert main(["doctor", "--dir", str(measured), "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert len(report["models"]) == 1
    assert list(report["skipped"]) == [str(measured / "calibration" / "b.json")]
    assert f"{measured / 'calibration' / 'b.json'}: left out (" in said.err


def test_what_another_version_has_measured_is_left_out(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rates(measured, ABOUT | {"version": "0.0.1"})
    assert main(["doctor", "--dir", str(measured)]) == 3
    said = capsys.readouterr().err
    assert "left out (measured by version 0.0.1)" in said
    assert "no server has measured" in said


def test_a_drive_that_cannot_be_measured_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--dir", str(tmp_path / "none")]) == 3
    assert f"{tmp_path / 'none'}: cannot be measured (No such file or directory)" in capsys.readouterr().out
    assert main(["doctor", "--dir", str(tmp_path / "none"), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["drives_bytes_per_s"] == {str(tmp_path / "none"): None}
