"""hcache gc, export and import of a part of a stripe; what a dry run touches; sizes that cannot be."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.cli import gc
from sglang_hcache.cli.main import main
from sglang_hcache.storage import evictor
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_file import is_sealed
from sglang_hcache.storage.paths import bytes_below, bytes_on_disk
from tests.cli.stores import damage_entry, found, make, run
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    counters,
    key_of,
    keys_of,
    open_store,
    segment_files,
    served,
)
from tests.storage.test_quota import save_prefix


@pytest.fixture
def stripe(tmp_path: Path) -> list[Path]:
    """Two directories with pages that were used long ago."""
    paths = [tmp_path / "s1", tmp_path / "s2"]
    make(*paths)
    for path in paths:
        grow_old(path)
    return paths


def grow_old(path: Path) -> None:
    index = Index(path / "index", FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(40)), 0), now=int(time.time()) - 3600)
    index.close()


def taken(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in segment_files(path))


def content(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_part_of_a_stripe_is_refused(
    stripe: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    every = ",".join(map(str, stripe))
    assert run(capsys, "export", "--all", "--out", out, "--dir", every)[1]["pages"] == 10
    for command in (
        ["gc"],
        ["gc", "--dry-run"],
        ["export", "--all", "--out", str(tmp_path / "x")],
        ["import", str(out)],
    ):
        for i in range(2):
            assert main([*command, "--dir", str(stripe[i])]) == 3
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"together with {stripe[1 - i]}: give --dir {stripe[i]},{stripe[1 - i]}, or delete" in said
    assert not (tmp_path / "x").exists()
    status, report = run(capsys, "gc", "--dir", every)
    assert (status, [one["pages"] for one in report["directories"]]) == (0, [0, 0])
    assert found(*stripe) == list(range(10))


def test_what_an_index_does_not_list_any_more_makes_no_orphans(
    stripe: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    every = ",".join(map(str, stripe))
    (stripe[1] / "index" / "data.mdb").write_bytes(b"\xff" * 10000)
    for options in (["--dry-run"], []):
        status, report = run(capsys, "gc", "--dir", every, *options)
        assert (status, [one["pages"] for one in report["directories"]]) == (0, [0, 0])
    assert found(*stripe) == list(range(10))


def test_a_part_that_is_gone_is_not_asked_for(stripe: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(stripe[1])
    assert run(capsys, "gc", "--dir", stripe[0])[0] == 0


def test_parts_that_do_not_belong_together_any_more(stripe: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (stripe[0] / "stripe.json").unlink()
    assert run(capsys, "gc", "--dir", stripe[0])[1]["directories"][0]["pages"] > 0


def test_pages_whose_parents_are_in_another_directory_are_no_orphans(
    stripe: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def orphans(*paths: Path) -> list[int]:
        directories = run(capsys, "inspect", "--dir", ",".join(map(str, paths)))[1]["directories"]
        return [one["fingerprints"][0]["orphans"] for one in directories]

    assert orphans(*stripe) == [0, 0]
    assert orphans(stripe[1]) != [0], "seen alone they are"


def test_pages_that_go_with_those_of_another_directory_are_foreseen_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stripe = [tmp_path / "a", tmp_path / "b"]
    make(*stripe, pages=range(60), slots=128)
    of_each = ("--to-size", f"{max(map(bytes_on_disk, stripe)) * 2 // 3}B", "--dir", ",".join(map(str, stripe)))
    foreseen, done = (
        sum(one["pages"] for one in run(capsys, "gc", *options, *of_each)[1]["directories"])
        for options in (["--dry-run"], [])
    )
    assert 0 < done <= foreseen <= 1.2 * done
    assert len(found(*stripe, pages=range(60))) == 60 - done


def test_models_that_are_not_used_leave_all_directories(
    stripe: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(capsys, "gc", "--older-than", "10m", "--dir", ",".join(map(str, stripe)))
    assert (status, [one["pages"] for one in report["directories"]]) == (0, [5, 5])
    assert not any(map(segment_files, stripe))


def test_a_model_whose_mark_is_lost_is_left_alone(stripe: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for path in stripe:
        index = Index(path / "index", FINGERPRINT)
        index.delete_many(index.get_many([b""]).items())
        index.close()
    status, report = run(capsys, "gc", "--older-than", "10m", "--dir", ",".join(map(str, stripe)))
    assert (status, [one["pages"] for one in report["directories"]]) == (0, [0, 0])
    assert found(*stripe) == list(range(10))


@pytest.mark.parametrize("then", ["a server", "fsck"])
def test_pages_behind_a_damaged_entry_are_no_orphans(
    then: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    grow_old(tmp_path)
    damage_entry(tmp_path, 3)
    for _ in range(2):
        status, report = run(capsys, "gc", "--dir", tmp_path)
        assert (status, report["directories"][0]["pages"]) == (0, 0)
    if then == "fsck":
        assert run(capsys, "fsck", "--repair", "--dir", tmp_path)[0] == 1
        assert run(capsys, "fsck", "--dir", tmp_path)[0] == 0
    assert found(tmp_path) == list(range(10))


def test_a_dry_run_changes_nothing_also_where_the_index_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    grow_old(tmp_path)
    index = Index(tmp_path / "index", FINGERPRINT)
    index.delete_many(index.get_many([key_of(7)]).items())
    index.close()
    data = tmp_path / "index" / "data.mdb"
    damage_entry(tmp_path, 3)
    before = content(tmp_path)
    status, report = run(capsys, "gc", "--dry-run", "--dir", tmp_path)
    assert content(tmp_path) == before
    (one,) = report["directories"]
    assert (status, one["index_damaged"], one["damaged_entries"]) == (0, True, 1)
    assert (one["pages"], one["orphans"]) == (0, 0), "what is behind a page that is not listed may be no orphan"
    assert main(["gc", "--dry-run", "--dir", str(tmp_path)]) == 0
    assert "the index is damaged (1 damaged entry)" in capsys.readouterr().out
    data.write_bytes(b"\xff" * 10000)
    before = content(tmp_path)
    status, report = run(capsys, "gc", "--dry-run", "--to-size", "1GB", "--dir", tmp_path)
    assert (status, report["directories"][0]["index_damaged"]) == (0, True)
    assert content(tmp_path) == before


def test_a_size_below_that_of_the_index_deletes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    least = bytes_below(tmp_path / "index")
    for options in ([], ["--dry-run"]):
        assert main(["gc", "--to-size", f"{least - 1}B", "--dir", str(tmp_path), *options]) == 3
        assert f"--to-size must be at least {least}B" in capsys.readouterr().err
    assert found(tmp_path) == list(range(10))
    assert run(capsys, "gc", "--to-size", f"{bytes_on_disk(tmp_path)}B", "--dir", tmp_path)[0] == 0
    assert found(tmp_path) == list(range(10))


def test_what_goes_is_freed_in_all_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    options = ["gc", "--dir", ",".join(map(str, directories))]
    make(*directories, pages=range(40))
    before = [taken(directory) for directory in directories]
    target = max(map(bytes_on_disk, directories)) - 8 * LAYOUT.record_bytes
    report = run(capsys, *options, "--to-size", f"{target}B")[1]["directories"]
    assert report[0]["pages"] >= 16
    for directory, was, one in zip(directories, before, report, strict=True):
        assert taken(directory) <= was - 8 * LAYOUT.record_bytes
        assert one["freed_bytes"] >= 8 * LAYOUT.record_bytes
    for directory in directories:
        index = Index(directory / "index", FINGERPRINT)
        index.touch(dict.fromkeys(keys_of(range(40)), 0), now=1_000_000_000)
        index.close()
    assert run(capsys, *options, "--older-than", "1d")[0] == 0
    assert [segment_files(directory) for directory in directories] == [[], []]


def test_records_that_nobody_names_are_freed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, pages=range(20))
    index = Index(tmp_path / "index", FINGERPRINT)
    index.delete_many(index.get_many(keys_of(range(4, 20))).items())
    index.close()
    (segment_files(tmp_path)[0].parent / "00000000000000aa.seg").write_bytes(bytes(8 * LAYOUT.record_bytes))
    assert run(capsys, "gc", "--dir", tmp_path, "--dry-run")[1]["directories"][0]["freed_bytes"] == 0
    assert run(capsys, "gc", "--dir", tmp_path)[1]["directories"][0]["freed_bytes"] >= 24 * LAYOUT.record_bytes
    assert taken(tmp_path) == 4 * LAYOUT.record_bytes
    assert found(tmp_path, pages=range(20)) == list(range(4))


def test_what_a_server_commits_meanwhile_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_store(tmp_path)
    save_prefix(server, range(4))  # of eight records; the server holds the segment
    index = Index(tmp_path / "index", FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(4)), 0), now=1_000_000_000)
    index.close()

    def drop(*arguments: Any) -> int:
        save_prefix(server, range(100, 104))  # it fills the segment and lets go of it
        return evictor.drop(*arguments)

    monkeypatch.setattr(gc, "drop", drop)
    assert run(capsys, "gc", "--dir", tmp_path, "--older-than", "1d")[1]["directories"][0]["pages"] == 4
    server.drop_host()
    assert served(server, [*range(4), *range(100, 104)]) == list(range(100, 104))
    assert counters(server)["pages_damaged"] == 0
    server.close()


@pytest.mark.parametrize("command", [["gc"], ["fsck", "--repair"]])
def test_the_next_opening_need_not_check_what_was_closed_properly(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    assert is_sealed(tmp_path / "index")
    assert run(capsys, *command, "--dir", tmp_path)[0] == 0
    assert is_sealed(tmp_path / "index")
    assert found(tmp_path) == list(range(10))


@pytest.mark.parametrize("command", [["gc"], ["fsck", "--repair"], ["import"]])
def test_what_the_directorys_owner_could_not_open_is_not_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    assert run(capsys, "export", "--all", "--dir", tmp_path / "a", "--out", tmp_path / "out")[0] == 0
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    file = [str(tmp_path / "out")] if command == ["import"] else []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert main([*command, *file, "--dir", str(tmp_path / "a")]) == 3
    assert f"{tmp_path / 'a'} belongs to " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before
    assert run(capsys, "inspect", "--dir", tmp_path / "a")[0] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_roots_look_leaves_a_lock_that_the_server_can_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a volume of root's that a server of another user writes to, too."""
    make(tmp_path / "a")
    for path in [
        tmp_path / "a" / "hcache.lock",
        *(tmp_path / "a" / "segments").rglob("*"),
        tmp_path / "a" / "segments",
    ]:
        os.chown(path, 54321, 54321)
    for _ in range(2):
        assert run(capsys, "inspect", "--dir", tmp_path / "a")[0] == 0
        assert (tmp_path / "a" / "hcache.lock").stat().st_uid == 54321
        (tmp_path / "a" / "hcache.lock").unlink()
