"""hcache export and import: what is said where they cannot do it."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sglang_hcache.cli.bundle import MAGIC, VERSION
from sglang_hcache.cli.main import main
from tests.cli.stores import make, run
from tests.storage.pages import FINGERPRINT, open_store


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.strip()


def bundle(path: Path, **changes: Any) -> Path:
    """A file of one model without a page, whose checksum holds."""
    model = {"fingerprint": FINGERPRINT.hex(), "page_tokens": 5, "layer_bytes": [1000], "about": {}, "pages": 0}
    header = json.dumps({"models": [model | changes]}).encode()
    content = struct.pack("<8sII", MAGIC, VERSION, len(header)) + header
    path.write_bytes(content + struct.pack("<Q", xxhash.xxh3_64_intdigest(content)))
    return path


@pytest.mark.parametrize("fingerprint", ["", "zz" * 16, "f" * 30, "f" * 34, "f" * 32 + "\n", "F" * 32])
def test_a_bad_fingerprint_is_damage(fingerprint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "import", bundle(tmp_path / "good"), "--dir", tmp_path / "a")[0] == 0
    bad = bundle(tmp_path / "bad", fingerprint=fingerprint)
    assert "its header cannot be read" in said(capsys, "import", bad, "--dir", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_negative_number_of_pages_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = bundle(tmp_path / "bad", pages=-1)
    assert "its header cannot be read" in said(capsys, "import", bad, "--dir", tmp_path / "b")


def test_tokens_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    export = ["export", "--tokens", str(file), "--out", "x", "--dir", str(tmp_path)]
    for text in ("", "[1, 2", "[-1]", "[[1], [2]]", '["a"]', '{"count": 3}', str([1 << 64])):
        file.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(export)
        assert stopped.value.code == 2
        assert f"{file} is neither a list of token ids nor has one (" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(SystemExit):
        main(export)
    assert f"{file}: No such file or directory" in capsys.readouterr().err


def test_tokens_from_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a", pages=range(3))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"[1, 2, 3, 4, 5]")))
    export = ["export", "--tokens", "-", "--out", tmp_path / "x", "--dir", tmp_path / "a"]
    assert said(capsys, *export).endswith("nothing is stored of this prompt")


def test_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(tmp_path / "a").close()
    options = ["--out", tmp_path / "x", "--dir", tmp_path / "a"]
    assert said(capsys, "export", "--all", *options).endswith(f"{tmp_path / 'a'}: nothing is stored")


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", pages=range(3))
    export = ["export", "--all", "--dir", tmp_path / "a", "--out"]
    nowhere = tmp_path / "none" / "x"
    assert said(capsys, *export, nowhere) == f"hcache export: {nowhere}: No such file or directory"
    assert said(capsys, *export, tmp_path) == f"hcache export: {tmp_path}: Is a directory"
    assert said(capsys, *export, "") == "hcache export: .: Is a directory"
    assert said(capsys, "import", nowhere, "--dir", tmp_path / "b") == (
        f"hcache import: {nowhere}: No such file or directory"
    )


def test_one_page_is_no_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", pages=range(1))
    assert main(["export", "--all", "--dir", str(tmp_path / "a"), "--out", str(tmp_path / "x")]) == 0
    assert ": 1 page, " in capsys.readouterr().out
    for expected in ("1 page stored, 0 already there\n", "0 pages stored, 1 already there\n"):
        assert main(["import", str(tmp_path / "x"), "--dir", str(tmp_path / "b")]) == 0
        assert capsys.readouterr().out == expected
