"""hcache fsck: what does not belong, what it could not check, and the exit status for each."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sglang_hcache.cli import fsck
from sglang_hcache.cli.main import main
from sglang_hcache.storage.about import write_about
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.segment import SegmentReader
from tests.cli.stores import damage_entry, found, make, run
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT, key_of, segment_files


def check(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status, report = run(capsys, "fsck", "--dir", path, *options)
    return status, report["directories"][0]


def test_what_is_not_checked_is_not_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    make(tmp_path, pages=range(100, 103), fingerprint=OTHER_FINGERPRINT)
    (tmp_path / "segments" / OTHER_FINGERPRINT.hex() / "about.json").unlink()
    status, report = check(capsys, tmp_path)
    assert (status, report["pages"], report["problems"], len(report["unchecked"])) == (3, 10, [], 1)
    assert main(["fsck", "--dir", str(tmp_path)]) == 3
    assert capsys.readouterr().out.endswith("10 pages intact, 0 problems, 0 repaired, 1 model not checked\n")
    (tmp_path / "segments" / "stray").touch()
    assert check(capsys, tmp_path)[0] == 2
    assert check(capsys, tmp_path, "--repair")[0] == 3


@pytest.mark.parametrize("change", [("4096", "4086"), ("4096", "12288"), ('"page_tokens": 5', '"page_tokens": 4')])
@pytest.mark.parametrize("with_checksum", [True, False])
def test_no_page_is_deleted_because_about_json_is_damaged(
    change: tuple[str, str], with_checksum: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, about={"model": "a/b"})
    about = tmp_path / "segments" / FINGERPRINT.hex() / "about.json"
    content = about.read_text().replace(*change)
    about.write_text(content if with_checksum else content.replace("checksum", "earlier"))
    for options in ([], ["--repair"]):
        status, report = check(capsys, tmp_path, *options)
        assert (status, report["problems"], len(report["unchecked"])) == (3, [], 1)
    assert found(tmp_path, about={"model": "a/b"}) == list(range(10))
    assert check(capsys, tmp_path)[0] == 0, "the store has written it anew"


def test_no_page_is_deleted_because_about_json_is_anothers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    folder = tmp_path / "segments" / FINGERPRINT.hex()
    write_about(folder, replace(LAYOUT, layer_bytes=(1000, 0, 12288)), {})
    status, report = check(capsys, tmp_path, "--repair")
    assert (status, report["problems"], len(report["unchecked"])) == (3, [], 1)
    assert found(tmp_path) == list(range(10))


def test_about_json_of_an_earlier_version_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, about={"model": "a/b"})
    about = tmp_path / "segments" / FINGERPRINT.hex() / "about.json"
    content = json.loads(about.read_text())
    del content["checksum"]
    about.write_text(json.dumps(content))
    (shown,) = run(capsys, "inspect", "--dir", tmp_path)[1]["directories"][0]["fingerprints"]
    assert (shown["about"], shown["record_bytes"]) == ({"model": "a/b"}, LAYOUT.record_bytes)


def test_what_does_not_belong_beside_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    segments = tmp_path / "segments"
    strange = [segments / "backup", segments / ("AB" * 16), segments / ("0" * 30)]
    for folder in strange:
        folder.mkdir()
    (segments / "notes.txt").touch()
    (segments / ("0" * 32)).touch()
    strange += [segments / "notes.txt", segments / ("0" * 32)]
    status, report = check(capsys, tmp_path)
    assert (status, report["pages"]) == (2, 10)
    assert sorted(report["problems"]) == sorted(f"{path}: does not belong here" for path in strange)
    shown = run(capsys, "inspect", "--dir", tmp_path)[1]["directories"][0]["fingerprints"]
    assert [one["fingerprint"] for one in shown] == [FINGERPRINT.hex()]
    assert check(capsys, tmp_path, "--repair")[0] == 1
    assert check(capsys, tmp_path)[0] == 0
    assert found(tmp_path) == list(range(10))


def test_names_of_files_may_be_any_bytes(tmp_path: Path) -> None:
    make(tmp_path)
    Path(os.fsdecode(bytes(tmp_path / "segments") + b"/\xff")).mkdir()
    command = [sys.executable, "-m", "sglang_hcache.cli.main", "fsck", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert f"{tmp_path}/segments/\\udcff" in done.stdout


def test_pages_whose_folder_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    (tmp_path / "segments" / FINGERPRINT.hex()).rename(tmp_path / "gone")
    status, report = check(capsys, tmp_path)
    assert (status, len(report["problems"])) == (2, 1)
    assert "missing, but the index lists 10 pages in it" in report["problems"][0]
    assert check(capsys, tmp_path, "--repair")[0] == 1
    assert check(capsys, tmp_path)[0] == 0


def test_pages_that_a_server_evicts_meanwhile_are_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, pages=range(8))
    (segment,) = segment_files(tmp_path)
    with segment.open("r+b") as file:
        for record in (1, 3):
            file.seek(record * LAYOUT.record_bytes + LAYOUT.layer_offset(0))
            file.write(os.urandom(8))
    assert len(check(capsys, tmp_path)[1]["problems"]) == 2
    check_pages = fsck._check_pages

    def evict_one(*arguments: Any) -> None:
        check_pages(*arguments)
        index = Index(tmp_path / "index", FINGERPRINT)
        index.delete_many((key, entry) for key, entry in index.entries() if entry.slot == 1)
        index.close()

    monkeypatch.setattr(fsck, "_check_pages", evict_one)
    problems = check(capsys, tmp_path)[1]["problems"]
    assert len(problems) == 1
    assert "record 3: " in problems[0]


def test_pages_that_a_server_writes_meanwhile_are_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a model, which the index does not name yet when it is read."""
    make(tmp_path)
    index = Index(tmp_path / "index", FINGERPRINT)
    entries = index.get_many([b"", *map(key_of, range(10))])
    index.delete_many(entries.items())
    index.close()
    assert check(capsys, tmp_path)[1]["problems"] == [
        f"{tmp_path / 'segments' / FINGERPRINT.hex()}: 10 intact pages not in the index"
    ]
    check_pages = fsck._check_pages

    def name_them(*arguments: Any) -> None:
        check_pages(*arguments)
        index = Index(tmp_path / "index", FINGERPRINT)
        index.put_many(entries.items())
        index.close()

    monkeypatch.setattr(fsck, "_check_pages", name_them)
    status, report = check(capsys, tmp_path)
    assert (status, report["problems"]) == (0, [])


def test_what_an_interrupted_repair_has_not_found_is_found_by_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    damage_entry(tmp_path, 3)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(fsck, "_repair", Mock(side_effect=KeyboardInterrupt))
        assert main(["fsck", "--repair", "--dir", str(tmp_path)]) == 130
    status, report = check(capsys, tmp_path, "--repair")
    assert (status, report["pages"]) == (1, 10)
    assert found(tmp_path) == list(range(10))


def test_what_could_not_be_checked_is_found_by_the_next_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, about={"model": "a/b"})
    damage_entry(tmp_path, 3)
    about = tmp_path / "segments" / FINGERPRINT.hex() / "about.json"
    content = about.read_bytes()
    about.unlink()
    assert check(capsys, tmp_path, "--repair")[0] == 3
    about.write_bytes(content)
    status, report = check(capsys, tmp_path, "--repair")
    assert (status, report["pages"]) == (1, 10)


def test_a_record_that_the_disk_fails_to_read_is_not_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a page that the index has lost."""
    make(tmp_path)
    (tmp_path / "index" / "data.mdb").write_bytes(b"nothing")
    read = SegmentReader.read

    def fails(reader: SegmentReader, slot: int, out: Record) -> None:
        if slot == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        read(reader, slot, out)

    with monkeypatch.context() as failing:
        failing.setattr(SegmentReader, "read", fails)
        status, report = check(capsys, tmp_path, "--repair")
    assert status == 2
    missing = 10 - report["pages"]
    assert missing > 0
    status, report = check(capsys, tmp_path, "--repair")
    assert (status, report["pages"]) == (1, 10)
    assert found(tmp_path) == list(range(10))


def test_what_was_repaired_is_said_although_another_directory_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "segments" / "stray").touch()
    (tmp_path / "b").mkdir()
    directories = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert main(["fsck", "--repair", "--dir", directories]) == 3
    printed = capsys.readouterr()
    assert "stray: does not belong here" in printed.out
    assert str(tmp_path / "b") in printed.err


@pytest.mark.parametrize("options", [[], ["--repair"]])
def test_evicted_pages_stay_evicted(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their records hold them until something else is written there."""
    make(tmp_path)
    index = Index(tmp_path / "index", FINGERPRINT)
    index.delete_many(index.get_many([key_of(4)]).items())
    index.close()
    status, report = check(capsys, tmp_path, *options)
    assert (status, report["pages"], report["problems"]) == (0, 9, [])
    assert found(tmp_path) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
