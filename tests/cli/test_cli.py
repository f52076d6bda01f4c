from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sglang_hcache.cli import common
from sglang_hcache.cli.main import main
from sglang_hcache.page_hash import page_hash
from sglang_hcache.storage import locks
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import lock_within
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_file import copy_checked
from sglang_hcache.storage.paths import bytes_on_disk
from tests.cli.stores import found, make, make_prefix, run
from tests.prefetch.clients import until
from tests.storage.child import start_child
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT, key_of, keys_of, open_store, segment_files

REPOSITORY = Path(__file__).parents[2]


def test_it_starts_without_torch_and_sglang() -> None:
    program = (
        "import sys; from sglang_hcache.cli.main import COMMANDS; import importlib\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_fsck_deletes_nothing_because_a_disk_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        status, report = run(capsys, "fsck", "--repair", "--dir", tmp_path)
    assert status == 2
    assert [line for line in report["directories"][0]["problems"] if "cannot read" in line]
    assert report["directories"][0]["repaired"] == 0
    assert found(tmp_path) == list(range(10))


def test_inspect_says_what_is_stored_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, about={"model": "a/b", "dtype": "bfloat16"})
    make(tmp_path, pages=range(100, 104), fingerprint=OTHER_FINGERPRINT)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    status, report = run(capsys, "inspect", "--dir", tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    first, second = report["directories"][0]["fingerprints"]
    assert status == 0
    assert (first["fingerprint"], first["pages"], first["orphans"]) == (FINGERPRINT.hex(), 10, 0)
    assert first["about"] == {"model": "a/b", "dtype": "bfloat16"}
    assert first["bytes"] >= 10 * LAYOUT.record_bytes == 10 * first["record_bytes"]
    assert abs(first["newest_use"] - time.time()) < 100
    assert second["pages"] == 4
    assert main(["inspect", "--dir", str(tmp_path)]) == 0
    assert "a/b, bfloat16" in capsys.readouterr().out


def test_a_directory_that_is_none_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["fsck"], ["gc"], ["export", "--all", "--out", "x"]):
        for path, why in ((tmp_path / "none", "there is no such directory"), (tmp_path, "it has no segments/")):
            assert main([*command, "--dir", str(path)]) == 3
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"{path} holds no cache ({why})" in said


def test_fsck_finds_a_damaged_page_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    assert run(capsys, "fsck", "--dir", tmp_path)[0] == 0
    data = bytearray(segment_files(tmp_path)[0].read_bytes())
    data[LAYOUT.record_bytes + LAYOUT.layer_offset(2) + 7] ^= 1
    segment_files(tmp_path)[0].write_bytes(data)
    (segment_files(tmp_path)[0].parent / "stray").write_text("")
    status, report = run(capsys, "fsck", "--dir", tmp_path)
    assert (status, report["directories"][0]["pages"], len(report["directories"][0]["problems"])) == (2, 9, 2)
    assert run(capsys, "fsck", "--dir", tmp_path, "--repair")[0] == 1
    assert run(capsys, "fsck", "--dir", tmp_path)[0] == 0
    assert len(found(tmp_path)) == 9


def test_fsck_lists_whole_pages_that_the_index_has_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    index = Index(tmp_path / "index", FINGERPRINT)
    index.delete_many(index.get_many([b"", key_of(4)]).items())
    index.close()
    for file in segment_files(tmp_path):
        os.utime(file, (1_500_000_000, 1_500_000_000))
    assert run(capsys, "fsck", "--dir", tmp_path)[0] == 2
    assert run(capsys, "fsck", "--dir", tmp_path, "--repair")[0] == 1
    index = Index(tmp_path / "index", FINGERPRINT)
    assert index.get_many([key_of(4)])[key_of(4)].last_use == 1_500_000_000, "it may have been evicted for its worth"
    index.close()
    assert found(tmp_path) == list(range(10))


def test_repair_is_refused_while_a_server_runs_and_a_check_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_child("write_then_wait", tmp_path, 10) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        assert main(["fsck", "--repair", "--dir", str(tmp_path)]) == 3
        assert "in use" in capsys.readouterr().err
        assert run(capsys, "fsck", "--dir", tmp_path)[0] == 0
        assert run(capsys, "inspect", "--dir", tmp_path)[1]["directories"][0]["fingerprints"][0]["pages"] == 10
        assert child.communicate("go on\n")[0] == "10\n"


def test_of_two_that_read_an_index_nobody_uses_both_check_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    checked = Mock(side_effect=copy_checked)
    monkeypatch.setattr(common, "copy_checked", checked)
    with ThreadPoolExecutor() as pool:
        with common.alone(tmp_path):
            waiting = Mock(side_effect=lock_within)
            monkeypatch.setattr(locks, "lock_within", waiting)
            table = pool.submit(common.read_table, tmp_path, Damage())
            assert until(lambda: waiting.called)
            assert not table.done()
        assert len(table.result().names) == 10
    assert checked.called


def test_gc_deletes_orphans_old_models_and_what_is_worth_least(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, pages=range(40))
    make(tmp_path, pages=range(100, 110), fingerprint=OTHER_FINGERPRINT)
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(100, 110)), 0), now=int(time.time()) - 40 * 86400)
    index.close()
    index = Index(tmp_path / "index", FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(40)), 0), now=int(time.time()) - 3600)
    index.delete_many(index.get_many([key_of(35)]).items())
    index.close()
    options = ["--dir", tmp_path, "--older-than", "30d"]
    status, report = run(capsys, "gc", *options, "--dry-run")
    assert (status, report["directories"][0]["pages"], report["directories"][0]["orphans"]) == (0, 14, 4)
    assert found(tmp_path, pages=range(40)) == [*range(35), *range(36, 40)]
    before = bytes_on_disk(tmp_path)
    target = before - 20 * LAYOUT.record_bytes
    assert run(capsys, "gc", *options, "--to-size", f"{target}B")[0] == 0
    assert bytes_on_disk(tmp_path) <= target
    kept = found(tmp_path, pages=range(40))
    assert kept == list(range(len(kept)))
    assert 20 < len(kept) < 35
    assert found(tmp_path, pages=range(100, 110), fingerprint=OTHER_FINGERPRINT) == []


def test_a_prefix_travels_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, file = [tmp_path / "a", tmp_path / "b"], tmp_path / "c", tmp_path / "out.hcache"
    prompt = list(range(1000, 1050))
    keys = [bytes.fromhex(key) for key in page_hash(prompt, None, LAYOUT.page_tokens)]
    make_prefix(*source, keys=keys, about={"model": "a/b"})
    make(source[0], pages=range(1), fingerprint=OTHER_FINGERPRINT)
    dirs, tokens = ",".join(map(str, source)), tmp_path / "tokens.json"
    export = ["export", "--dir", dirs, "--tokens", tokens, "--out", file]
    tokens.write_text(json.dumps([*prompt[:38], 7, 7, 7]))
    assert run(capsys, *export)[1]["pages"] == 7
    assert run(capsys, "import", file, "--dir", target) == (0, {"stored": 7, "present": 0})
    assert run(capsys, "import", file, "--dir", target) == (0, {"stored": 0, "present": 7})
    store = open_store(target)
    assert store.contains(keys) == [True] * 7 + [False] * 3
    store.close()
    assert run(capsys, "inspect", "--dir", target)[1]["directories"][0]["fingerprints"][0]["about"] == {
        "model": "a/b"
    }
    tokens.write_text(json.dumps({"tokens": prompt, "count": 50, "max_model_len": 99}))
    assert run(capsys, *export)[1]["pages"] == 10
    assert run(capsys, "import", file, "--dir", target) == (0, {"stored": 3, "present": 7})
    assert run(capsys, "export", "--dir", dirs, "--all", "--out", file)[1]["pages"] == 11


def test_a_damaged_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", pages=range(3))
    file = tmp_path / "out"
    assert run(capsys, "export", "--dir", tmp_path / "a", "--all", "--out", file)[0] == 0
    data = file.read_bytes()
    for damaged in (data[:-1], data[:50], b"", *(data[:at] + b"?" + data[at + 1 :] for at in (0, 20, 9000, -9))):
        file.write_bytes(damaged)
        assert main(["import", str(file), "--dir", str(tmp_path / "b")]) == 3
        assert "nothing is stored" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_an_import_into_what_is_no_directory_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "a", pages=range(3))
    assert run(capsys, "export", "--dir", tmp_path / "a", "--all", "--out", tmp_path / "out")[0] == 0
    assert main(["import", str(tmp_path / "out"), "--dir", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err == f"hcache import: {tmp_path / 'out'}: File exists\n"
    assert not caplog.records


def test_a_file_system_that_is_read_only_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel leaves that of a failing drive, when its pages are wanted elsewhere."""
    stored, exported, opened = tmp_path / "a", tmp_path / "out", os.open
    make(stored)

    def read_only(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(path).is_relative_to(stored):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert run(capsys, "inspect", "--dir", stored)[1]["directories"][0]["fingerprints"][0]["pages"] == 10
    assert run(capsys, "fsck", "--dir", stored)[0] == 0
    assert run(capsys, "export", "--dir", stored, "--all", "--out", exported)[1]["pages"] == 10
    assert main(["fsck", "--repair", "--dir", str(stored)]) == 3


def test_an_empty_or_damaged_index_is_no_reason_to_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    (tmp_path / "index" / "data.mdb").write_bytes(b"\xff" * 10000)
    report = run(capsys, "inspect", "--dir", tmp_path)[1]["directories"][0]
    assert (report["index_damaged"], report["fingerprints"][0]["pages"]) == (True, 0)
    assert main(["inspect", "--dir", str(tmp_path)]) == 0
    assert "the index is damaged" in capsys.readouterr().out
    assert run(capsys, "fsck", "--dir", tmp_path)[0] == 2
    assert run(capsys, "fsck", "--dir", tmp_path, "--repair")[0] == 1
    assert found(tmp_path) == list(range(10))
    (tmp_path / "index" / "data.mdb").unlink()
    assert main(["inspect", "--dir", str(tmp_path)]) == 0
    assert run(capsys, "fsck", "--dir", tmp_path)[0] == 2


def test_keys_that_are_there_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "keys"), "--client", "one"]) == 0
    assert main(["keygen", str(tmp_path / "keys"), "--client", "one"]) == 3
    assert "hcache keygen: " in capsys.readouterr().err
