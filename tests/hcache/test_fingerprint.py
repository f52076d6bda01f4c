from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hcache.fingerprint import checkpoint_identity, fingerprint, process_identity


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model-1.safetensors").write_bytes(os.urandom(50_000))
    (folder / "model-2.safetensors").write_bytes(os.urandom(50_000))
    return folder


def flip_one_bit_of_the_weights(folder: Path) -> None:
    weights = folder / "model-2.safetensors"
    content = bytearray(weights.read_bytes())
    content[31_337] ^= 1
    weights.write_bytes(content)


def change_the_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 9}')


def drop_a_file(folder: Path) -> None:
    (folder / "model-2.safetensors").unlink()


@pytest.mark.parametrize("change", [flip_one_bit_of_the_weights, change_the_configuration, drop_a_file])
def test_any_change_is_another_model(change: Callable[[Path], None], checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    before = checkpoint_identity(str(checkpoint), memo)
    change(checkpoint)
    assert checkpoint_identity(str(checkpoint), memo) != before


def test_a_copy_elsewhere_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    memo = tmp_path / "memo.json"
    assert checkpoint_identity(str(copy), memo) == checkpoint_identity(str(checkpoint), memo)


def test_the_memo_saves_reading(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = tmp_path / "memo.json"
    identity = checkpoint_identity(str(checkpoint), memo)
    assert memo.stat().st_mode & 0o777 == 0o600

    def refuse(_path: Path) -> str:
        raise AssertionError("weights are read again")

    monkeypatch.setattr("sglang_hcache.fingerprint.file_digest", refuse)
    assert checkpoint_identity(str(checkpoint), memo) == identity


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", None])
def test_a_damaged_memo_changes_nothing(content: bytes | None, checkpoint: Path, tmp_path: Path) -> None:
    identity = checkpoint_identity(str(checkpoint), tmp_path / "other.json")
    memo = tmp_path / "memo.json"
    if content is None:
        memo.mkdir()
    else:
        memo.write_bytes(content)
    assert checkpoint_identity(str(checkpoint), memo) == identity


def test_no_flipped_bit_of_the_memo_changes_the_identity(checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "memo.json"
    identity = checkpoint_identity(str(checkpoint), memo)
    written = memo.read_bytes()
    for bit in range(0, 8 * len(written), 5):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        memo.write_bytes(damaged)
        assert checkpoint_identity(str(checkpoint), memo) == identity, bit


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weight files"):
        checkpoint_identity(str(tmp_path), tmp_path / "memo.json")


def test_parts_do_not_run_together() -> None:
    assert len(fingerprint([("a", 1)])) == 16
    assert fingerprint([("a", "1"), ("b", "2")]) != fingerprint([("a", "1\nb='2'")])
    assert process_identity() != process_identity()
