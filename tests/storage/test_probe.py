"""Trying a drive leaves nothing behind, and gives a rate."""

from pathlib import Path

import pytest

from sglang_hcache.storage.probe import read_bytes_per_s


def test_a_drive_is_tried(tmp_path: Path) -> None:
    assert 1e6 < read_bytes_per_s(tmp_path, n_bytes=8 << 20) < 1e12
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        read_bytes_per_s(tmp_path / "missing")
