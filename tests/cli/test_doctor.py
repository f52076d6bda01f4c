"""hcache doctor: rates that a server has kept, in words, and how to be rid of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_hcache.cli.main import main
from sglang_hcache.planner.machine import Machine

MODEL = {
    "name": "small", "layers": 8, "hidden_size": 1024, "query_heads": 16, "kv_heads": 16, "head_dim": 64,
    "intermediate_size": 2816, "vocabulary": 32000,
}  # fmt: skip
ABOUT = {
    "machine": "here", "model": MODEL, "projector": "kernels", "ranks": 1, "rank": 0,
    "page_tokens": 64,
}  # fmt: skip
SLOW_DRIVE = Machine("here", 1e11, 1e13, 1e12, 1e12, 2e10, ssd_bytes_per_s=1e8)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    folder = tmp_path / "calibration"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"about": ABOUT, "rates": vars(SLOW_DRIVE)}))
    return tmp_path


def test_it_says_what_limits(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured)]) == 0
    said = capsys.readouterr().out
    assert f"{measured}: reads " in said
    assert "small, rank 0 of 1, on here" in said
    assert "stores hidden of layers 0-7" in said
    assert "a second drive would give" in said
    assert "drives 0.1 GB/s" in said


def test_json_holds_rates_times_and_limits(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (model,) = report["models"]
    assert model["rates"]["ssd_bytes_per_s"] == 1e8
    assert [row["tokens"] for row in model["times"]["host"]] == [1024, 8192, 65536]
    assert all(row["plan_s"] <= row["recompute_s"] for rows in model["times"].values() for row in rows)
    assert report["drives_bytes_per_s"][str(measured)] > 0


def test_the_layout_of_what_is_stored(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = measured / "layouts"
    folder.mkdir()
    (folder / "another.json").write_text(
        json.dumps({"about": {"model": {}, "page_tokens": 64}, "hidden": 1, "kv": 1})
    )
    (folder / "broken.json").write_text("{")
    (folder / "this.json").write_text(json.dumps({"about": ABOUT, "hidden": 3, "kv": 5}))
    assert main(["doctor", "--dir", str(measured)]) == 0
    assert "stores hidden of layers 0-2, kv of layers 3-7" in capsys.readouterr().out


def test_rates_are_forgotten(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(measured), "--again"]) == 0
    assert "1 forgotten" in capsys.readouterr().out
    assert main(["doctor", "--dir", str(measured)]) == 3
    assert "no server has measured" in capsys.readouterr().err


def test_a_file_that_is_none(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (measured / "calibration" / "b.json").write_text('{"about": {}}')
    assert main(["doctor", "--dir", str(measured)]) == 3
    assert "--again" in capsys.readouterr().err
