"""Space that no page needs comes back, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_hcache.storage import evictor, sweep
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.directory import Contents, Directory
from sglang_hcache.storage.index import Index, Used
from sglang_hcache.storage.layout import ROOT, seal
from sglang_hcache.storage.paths import bytes_on_disk
from sglang_hcache.storage.quota import Quota
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    OTHER_FINGERPRINT,
    counters,
    fill,
    holds,
    key_of,
    keys_of,
    open_store,
    save,
    segment_files,
    served,
    states,
)
from tests.storage.test_quota import save_prefix

R = LAYOUT.record_bytes
SEGMENT = 8 * R


def open_directory(
    path: Path, fingerprint: bytes = FINGERPRINT, *, segment_bytes: int = SEGMENT, **options: Any
) -> Directory:
    return Directory(path, Contents(LAYOUT, fingerprint, segment_bytes), **({"damage": Damage()} | options))


def write(directory: Directory, fingerprint: bytes, pages: Sequence[int]) -> None:
    """One prefix."""
    records = np.zeros((len(pages), R), np.uint8)
    for record, page in zip(records, pages, strict=True):
        fill(record, page)
        seal(record, LAYOUT, fingerprint, key_of(page), ROOT if page == pages[0] else key_of(page - 1))
    directory.write([(key_of(page), record) for record, page in zip(records, pages, strict=True)])


def read(directory: Directory, pages: Sequence[int]) -> list[int]:
    found, out = [], np.zeros(R, np.uint8)
    for page in pages:
        entry = directory.locate([key_of(page)]).get(key_of(page))
        if entry is not None and directory.read(key_of(page), entry, out):
            assert holds(out, page)
            found.append(page)
    return found


def forget(directory: Directory | Path, pages: Sequence[int]) -> None:
    """As another directory's eviction does."""
    index = directory.index if isinstance(directory, Directory) else Index(directory / "index", FINGERPRINT)
    index.delete_many(index.get_many(keys_of(pages)).items())
    if isinstance(directory, Path):
        index.close()


def kill(directory: Directory) -> None:
    """It lets go of its segments as they are."""
    for held in directory._segments._held:
        held.writer.close()
    directory._segments._held.clear()
    directory.close()


def test_striped_directories_keep_most_of_their_quota_in_use(tmp_path: Path) -> None:
    quota, directories = 200, [tmp_path / "a", tmp_path / "b"]
    store = open_store(*directories, quota_bytes=quota * R, segment_bytes=4 * R)
    chance, written = random.Random(1), 0
    while written < 11 * quota * len(directories):
        pages = range(written, written + chance.randint(5, 40))
        save_prefix(store, pages)
        written = pages.stop
        if written < 2 * quota * len(directories):
            continue
        for volume in store._volumes:
            directory = volume._directory
            assert directory is not None
            used = directory.index.used(FINGERPRINT)
            assert used.pages >= 0.75 * quota
            assert bytes_on_disk(volume.path) <= quota * R
            unnamed = {file.stem for file in segment_files(volume.path)} - used.slots.keys()
            assert len(unnamed - directory._segments.held()) <= 3, "no more than one eviction in the other leaves"
    assert states(store) == ["ok", "ok"]
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_pages_that_another_store_commits_while_room_is_made_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = Damage()
    first = open_directory(tmp_path, damage=damage, quota=Quota(tmp_path, 80 * R, R))
    second = open_directory(tmp_path, OTHER_FINGERPRINT, quota=Quota(tmp_path, 80 * R, R))
    write(first, FINGERPRINT, range(12))  # a full segment, and one of which half is used
    first.index.touch(dict.fromkeys(keys_of(range(12)), 0), 1_000_000_000)
    drop, done = evictor.drop, list[bool]()

    def drop_later(*arguments: Any) -> int:
        if not done:
            write(first, FINGERPRINT, range(100, 104))  # and lets go of the other segment, too
        done.append(True)
        return drop(*arguments)

    monkeypatch.setattr(evictor, "drop", drop_later)
    page = 1000
    while not done:
        write(second, OTHER_FINGERPRINT, [page])
        page += 1
    assert read(first, range(12)) == list(range(4)), "the end of the prefix goes, and what is in the other segment"
    assert read(first, range(100, 104)) == list(range(100, 104))
    assert damage.pages == 0
    first.close()
    second.close()


@pytest.mark.parametrize("at_once", [1, 256])
def test_pages_that_are_committed_between_the_look_at_files_and_their_locks_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(sweep, "AT_ONCE", at_once)
    other = open_directory(tmp_path)
    write(other, FINGERPRINT, range(20))
    forget(other, [0, 1, 8, 9])
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    wasteful = sweep._wasteful

    def then_filled(*arguments: Any, **options: Any) -> list[str]:
        names = wasteful(*arguments, **options)
        write(other, FINGERPRINT, range(20, 24))  # and lets go of the last segment
        return names

    monkeypatch.setattr(sweep, "_wasteful", then_filled)
    assert sweep.sweep(tmp_path, index) == 4 * R
    assert read(other, range(24)) == [*range(2, 8), *range(10, 24)]
    assert len(segment_files(tmp_path)) == 3
    index.close()
    other.close()


def test_what_killed_models_leave_behind_takes_no_room_from_others(tmp_path: Path) -> None:
    for number in range(8):
        killed = open_directory(tmp_path, b"%016d" % number, quota=Quota(tmp_path, 80 * R, R))
        killed._segments.make_room()  # as the first batch does: a segment, a tenth of the quota
        kill(killed)
    assert bytes_on_disk(tmp_path) > 64 * R
    store = open_store(tmp_path, quota_bytes=80 * R, retry_s=0.2)
    save_prefix(store, range(60))
    assert states(store) == ["ok"]
    assert counters(store)["pages_file"] == 60
    assert {file.parent.name for file in segment_files(tmp_path)} == {FINGERPRINT.hex()}
    store.close()


def test_an_opening_reuses_what_a_killed_writer_left(tmp_path: Path) -> None:
    killed = open_directory(tmp_path)
    write(killed, FINGERPRINT, range(12))
    killed._segments.grow()  # a segment without a page
    kill(killed)
    assert len(segment_files(tmp_path)) == 3
    directory = open_directory(tmp_path)
    assert len(segment_files(tmp_path)) == 2
    assert directory._segments.free_records() == 4
    write(directory, FINGERPRINT, range(12, 16))
    assert len(segment_files(tmp_path)) == 2
    assert read(directory, range(16)) == list(range(16))
    directory.close()


def test_gaps_of_larger_segments_are_used_after_the_size_of_segments_shrinks(tmp_path: Path) -> None:
    directory = open_directory(tmp_path, segment_bytes=32 * R)
    write(directory, FINGERPRINT, range(60))
    directory.close()
    forget(tmp_path, range(0, 60, 4))
    directory = open_directory(tmp_path)
    assert directory._segments.free_records() == 15
    write(directory, FINGERPRINT, range(100, 115))
    assert len(segment_files(tmp_path)) == 2
    assert read(directory, range(60)) == [page for page in range(60) if page % 4]
    assert read(directory, range(100, 115)) == list(range(100, 115))
    directory.close()


def test_a_sweep_frees_what_is_not_named_and_leaves_the_rest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(24))
    store.close()
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    assert sweep.sweep(tmp_path, index) == 0
    forget(tmp_path, [0, 3, 4, *range(8, 16), 22, 23])
    assert sweep.sweep(tmp_path, index, unlisted=True) == 13 * R
    assert sum(file.stat().st_blocks * 512 for file in segment_files(tmp_path)) == 11 * R
    assert [file.stat().st_size // R for file in segment_files(tmp_path)].count(6) == 1, "its end is cut off"
    assert len(segment_files(tmp_path)) == 2
    assert sweep.sweep(tmp_path, index) == 0
    index.close()
    store = open_store(tmp_path)
    assert served(store, range(24)) == [1, 2, 5, 6, 7, *range(16, 22)]
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_segments_of_a_fingerprint_that_is_not_listed_go_only_if_asked_for(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(4))
    store.close()
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    assert sweep.sweep(tmp_path, index) == 0
    assert len(segment_files(tmp_path)) == 1
    assert sweep.sweep(tmp_path, index, unlisted=True) == 4 * R
    assert segment_files(tmp_path) == []
    index.close()


def test_a_folder_that_no_model_can_have_is_left_alone(tmp_path: Path) -> None:
    directory = open_directory(tmp_path)
    strange = tmp_path / "segments" / ("AB" * 16) / f"{0:016x}.seg"
    strange.parent.mkdir()
    strange.write_bytes(bytes(R))
    assert sweep.sweep(tmp_path, directory.index, unlisted=True) == 0
    assert strange.exists()
    directory.close()


def test_an_opening_reads_what_the_index_names_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = open_directory(tmp_path, quota=Quota(tmp_path, 80 * R, R))
    write(directory, FINGERPRINT, range(12))
    directory.close()
    used, read = Index.used, list[Used]()

    def noted(index: Index, fingerprint: bytes, former: Used | None = None) -> Used:
        found = used(index, fingerprint, former)
        if found is not former:
            read.append(found)
        return found

    monkeypatch.setattr(Index, "used", noted)
    directory = open_directory(tmp_path, quota=Quota(tmp_path, 80 * R, R))
    assert directory.pages == 12
    assert len(read) == 1
    directory.close()
