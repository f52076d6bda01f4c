"""Sizes are given with their unit, the same way everywhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from sglang_hcache.cli.common import size
from sglang_hcache.cli.main import main
from sglang_hcache.cli.prefetcher import NAMES, configuration


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("500GB", 500 * 10**9),
        ("500G", 500 * 10**9),
        ("1.5 tb", 1_500_000_000_000),
        ("64MiB", 64 << 20),
        ("2Ti", 2 << 40),
        ("3k", 3000),
        ("4096B", 4096),
    ],
)
def test_a_size(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["500", "", "GB", "1.2.3GB", "-1GB", "5 XB", "5iB", "nanGB", "infGB"])
def test_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give a number and a unit, such as 500GB or 2TiB"):
        size(text)


def test_a_bare_number_is_refused_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gc", "--dir", str(tmp_path), "--to-size", "500"])
    assert "--to-size: '500' is not a size: give a number and a unit" in capsys.readouterr().err
    assert main(["prefetcher", "--dir", str(tmp_path), "--size-limit", "500"]) == 2
    assert "--size-limit '500' is not a size: give" in capsys.readouterr().err
    config = tmp_path / "prefetcher.json"
    config.write_text(json.dumps({"dir": str(tmp_path), "read_limit": 500}))
    assert main(["prefetcher", "--config", str(config)]) == 2
    assert "--read-limit '500' is not a size: give" in capsys.readouterr().err
    assert main(["prefetcher", "--dir", str(tmp_path), "--host-limit", "0GB"]) == 2
    assert "--host-limit 0GB is too small" in capsys.readouterr().err


def test_limits_of_a_prefetcher(tmp_path: Path) -> None:
    config = tmp_path / "prefetcher.json"
    config.write_text(json.dumps({"dir": str(tmp_path), "size_limit": "2T", "host_limit": None}))
    given = {"config": config, "read_limit": "1.5GiB"}
    made = configuration(argparse.Namespace(**{**dict.fromkeys(NAMES), **given}))
    assert (made.quota_bytes, made.host_bytes, made.read_bytes_per_s) == (2 * 10**12, None, 3 << 29)
