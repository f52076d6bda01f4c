"""hcache export and import: what is said where they cannot do it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from sglang_hcache.cli.bundle import MAGIC, VERSION
from sglang_hcache.cli.main import main
from sglang_hcache.page_hash import page_hash
from sglang_hcache.storage.directory import Directory
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.layout import ROOT, ChunkLayout, seal
from tests.cli.stores import found, make, make_prefix, run
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT, key_of, open_store

SMALL = ChunkLayout(5, (1000,))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.strip()


def bundle(path: Path, **changes: Any) -> Path:
    """A file of one page, whose checksum holds."""
    model = {"fingerprint": FINGERPRINT.hex(), "page_tokens": 5, "layer_bytes": [1000], "about": {}, "pages": 1}
    return of_models(path, [model | changes])


def of_models(path: Path, models: list[dict[str, Any]]) -> Path:
    header = json.dumps({"models": models}).encode()
    record, layout = np.zeros(SMALL.record_bytes, np.uint8), SMALL
    seal(record, layout, FINGERPRINT, key_of(0), ROOT)
    content = struct.pack("<8sII", MAGIC, VERSION, len(header)) + header + record.tobytes()
    path.write_bytes(content + struct.pack("<Q", xxhash.xxh3_64_intdigest(content)))
    return path


@pytest.mark.parametrize("fingerprint", ["", "zz" * 16, "f" * 30, "f" * 34, "f" * 32 + "\n", "F" * 32])
def test_a_bad_fingerprint_is_damage(fingerprint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "import", bundle(tmp_path / "good"), "--dir", tmp_path / "a")[0] == 0
    bad = bundle(tmp_path / "bad", fingerprint=fingerprint)
    assert "its header cannot be read" in said(capsys, "import", bad, "--dir", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "damage"),
    [
        ({"pages": -1}, "its header cannot be read"),
        ({"pages": 0}, "its header cannot be read"),
        ({"pages": 1 << 70}, "its length is wrong"),
        ({"page_tokens": 0}, "its header cannot be read"),
        ({"page_tokens": 1 << 40}, "its header cannot be read"),
        ({"layer_bytes": [1 << 45]}, "its header cannot be read"),
        ({"layer_bytes": [(1 << 32) - 1] * 9}, "its length is wrong"),
        ({"layer_bytes": []}, "its header cannot be read"),
    ],
)
def test_numbers_that_no_export_has_are_damage(
    changes: dict[str, Any], damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert damage in said(capsys, "import", bundle(tmp_path / "bad", **changes), "--dir", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_of_no_model_or_of_one_twice_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"fingerprint": FINGERPRINT.hex(), "page_tokens": 5, "layer_bytes": [1000], "about": {}, "pages": 1}
    for models, damage in (([], "its header cannot be read"), ([model, model], "it names a model twice")):
        assert damage in said(capsys, "import", of_models(tmp_path / "bad", models), "--dir", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_pages_that_are_there_are_not_replaced_by_others_of_the_same_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    error = said(capsys, "import", bundle(tmp_path / "other"), "--dir", tmp_path / "a")
    assert f"has pages of {FINGERPRINT.hex()} with another layout than the file's; nothing is stored" in error
    assert run(capsys, "fsck", "--dir", tmp_path / "a")[0] == 0
    assert found(tmp_path / "a") == list(range(10))
    (tmp_path / "a" / "segments" / FINGERPRINT.hex() / "about.json").unlink()
    assert "about.json is missing" in said(capsys, "import", tmp_path / "other", "--dir", tmp_path / "a")
    assert found(tmp_path / "a") == list(range(10))


def test_only_a_regular_file_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", pages=range(3))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("former")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    export = ["export", "--all", "--dir", tmp_path / "a", "--out"]
    assert said(capsys, *export, tmp_path / "fifo").endswith("fifo: it is not a regular file")
    assert said(capsys, *export, tmp_path / "loop").endswith("loop: it is not a regular file")
    assert said(capsys, *export, "/dev/null").endswith("/dev/null: it is not a regular file")
    assert (tmp_path / "fifo").is_fifo()
    assert run(capsys, *export, tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert run(capsys, "import", tmp_path / "file", "--dir", tmp_path / "b")[1] == {"stored": 3, "present": 0}


def test_pages_that_vanish_meanwhile_are_left_out_with_what_follows_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a server evicts them between the look at its index and the reading."""
    make(tmp_path / "a", pages=range(12))
    make(tmp_path / "a", pages=range(1), fingerprint=OTHER_FINGERPRINT)
    for fingerprint, page in ((FINGERPRINT, 5), (OTHER_FINGERPRINT, 0)):
        index = Index(tmp_path / "a" / "index", fingerprint)
        entry = index.get_many([key_of(page)])[key_of(page)]
        index.close()
        with (tmp_path / "a" / "segments" / fingerprint.hex() / f"{entry.segment}.seg").open("r+b") as file:
            file.seek(entry.slot * LAYOUT.record_bytes)
            file.write(bytes(LAYOUT.record_bytes))
    status, report = run(capsys, "export", "--all", "--dir", tmp_path / "a", "--out", tmp_path / "out")
    assert (status, report["pages"], report["left_out"]) == (0, 5, 8)
    assert run(capsys, "import", tmp_path / "out", "--dir", tmp_path / "b") == (0, {"stored": 5, "present": 0})
    assert found(tmp_path / "b", pages=range(12)) == list(range(5))
    assert main(["export", "--all", "--dir", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    assert "8 pages left out" in capsys.readouterr().out


def test_pages_of_a_model_with_a_draft_are_found_by_their_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bigrams(list[int]):
        is_bigram = True

    prompt = list(range(1000, 1051))
    key = Bigrams(prompt[:-1])
    key.token_ids = prompt  # type: ignore[attr-defined]
    make_prefix(tmp_path / "a", keys=[bytes.fromhex(one) for one in page_hash(key, None, LAYOUT.page_tokens)])
    (tmp_path / "tokens").write_text(json.dumps(prompt))
    export = ["export", "--tokens", tmp_path / "tokens", "--out", tmp_path / "x", "--dir", tmp_path / "a"]
    assert run(capsys, *export)[1]["pages"] == 50 // LAYOUT.page_tokens


def test_a_disk_that_fills_up_half_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a", pages=range(40))
    assert run(capsys, "export", "--all", "--dir", tmp_path / "a", "--out", tmp_path / "out")[0] == 0
    write, calls = Directory.write, list[int]()

    def full(directory: Directory, pages: Any, keep: Any) -> None:
        calls.append(len(pages))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, pages, keep)

    monkeypatch.setattr(Directory, "write", full)
    error = said(capsys, "import", tmp_path / "out", "--dir", tmp_path / "b")
    assert "the disk is full" in error
    assert error.endswith(f"; {calls[0]} pages of it stored")
    monkeypatch.setattr(Directory, "write", write)
    assert len(found(tmp_path / "b", pages=range(40))) == calls[0]


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


def test_tokens_from_stdin(tmp_path: Path) -> None:
    make(tmp_path / "a", pages=range(3))
    options = ["--tokens", "-", "--out", tmp_path / "x", "--dir", tmp_path / "a"]
    command = shlex.join(map(str, [sys.executable, "-m", "sglang_hcache.cli.main", "export", *options]))
    for given, said in (
        ("<<< '[1, 2, 3, 4, 5]'", "nothing is stored of this prompt"),
        ("<&-", "/dev/stdin: No such file or directory"),
    ):
        done = subprocess.run(["bash", "-c", f"{command} {given}"], stderr=subprocess.PIPE, text=True, check=False)
        assert done.stderr.strip().endswith(said)


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
