"""hcache status, against real prefetchers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.cli import status
from sglang_hcache.cli.main import main
from sglang_hcache.prefetch import messages as m
from sglang_hcache.storage.stripe_manifest import write_siblings
from tests.cli.stores import run
from tests.prefetch.clients import PATIENCE_S, SLOTS, fetched, figures, prefetchers, save
from tests.prefetch.conftest import Join, be_patient
from tests.prefetch.raw import Raw
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT


@pytest.fixture(autouse=True)
def answers_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)
    monkeypatch.setattr(status, "ANSWER_S", PATIENCE_S)


def test_where_none_runs_none_is_started(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--dir", str(directory)]) == 3
    assert capsys.readouterr().err == f"hcache status: no prefetcher runs for {directory}\n"
    assert run(capsys, "status", "--dir", directory) == (3, {"running": False})
    assert not prefetchers(directory)
    assert not directory.exists()


def test_it_says_what_runs_and_takes_nothing(directory: Path, join: Join, capsys: pytest.CaptureFixture[str]) -> None:
    client = join(about={"model": "a/b"})
    join(fingerprint=OTHER_FINGERPRINT)
    save(client, range(5))
    assert client.flush(PATIENCE_S)
    before = figures(client)
    code, report = run(capsys, "status", "--dir", directory)
    assert code == 0
    assert (report["running"], report["pid"], report["clients"]) == (True, client.prefetcher_pid, 2)
    assert 0 < report["uptime_s"] < 600
    models: dict[str, Any] = {model["fingerprint"]: model for model in report["models"]}
    assert models.keys() == {FINGERPRINT.hex(), OTHER_FINGERPRINT.hex()}
    model = models[FINGERPRINT.hex()]
    assert (model["about"], model["clients"], model["memory_bytes"]) == ("a/b", 1, SLOTS * LAYOUT.record_bytes)
    assert (model["pages_host"], model["pages_file"], model["pages_dirty"]) == (5, 5, 0)
    assert [volume["state"] for volume in model["volumes"]] == ["ok"]
    assert main(["status", "--dir", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert f"process {client.prefetcher_pid}, up for " in shown
    assert "2 clients, 2 models, " in shown
    assert "a/b, 1 client\n" in shown
    assert "5 in use, 0 not yet written; 5 in files" in shown
    assert f"{directory}: ok, 5 pages" in shown
    assert figures(client) == before
    assert fetched(client, range(5)) == 5


def test_a_directory_that_cannot_be_used(directory: Path, join: Join, capsys: pytest.CaptureFixture[str]) -> None:
    directory.mkdir()
    (directory / "segments").touch()
    join()
    code, report = run(capsys, "status", "--dir", directory)
    assert (code, report["running"]) == (1, True)
    assert report["models"][0]["volumes"][0]["state"].startswith("failed: ")


def test_one_that_hangs(
    directory: Path, join: Join, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = join().prefetcher_pid
    monkeypatch.setattr(status, "ANSWER_S", 0.3)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert main(["status", "--dir", str(directory)]) == 3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "did not answer within 0.3 s" in capsys.readouterr().err


def test_one_of_another_version(
    directory: Path, join: Join, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    join()
    with monkeypatch.context() as patch:
        patch.setattr(m, "PREFIX", b"HC" + bytes((m.VERSION + 1, 0)))
        assert main(["status", "--dir", str(directory)]) == 3
    assert "but of another version" in capsys.readouterr().err


def test_a_part_of_its_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "segments").mkdir(parents=True)
    write_siblings(tmp_path / "a", [tmp_path / "b"])
    assert main(["status", "--dir", str(tmp_path / "a")]) == 3
    assert f"together with {tmp_path / 'b'}" in capsys.readouterr().err


def test_within_a_session_it_is_a_message_like_others(directory: Path, join: Join) -> None:
    join()
    with Raw(directory) as raw:
        raw.open()
        raw.say(m.Overview())
        assert raw.hear(m.Overviewed).clients == 2
        raw.say(m.Health())
        assert raw.hear(m.Alive).answers == 2
