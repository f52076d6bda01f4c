"""hcache status, against real prefetchers."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache import __version__
from sglang_hcache.cli import status
from sglang_hcache.cli.common import human
from sglang_hcache.cli.main import main
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import endpoint_for
from sglang_hcache.storage.stripe_manifest import write_siblings
from tests.cli.stores import make, run
from tests.prefetch.clients import (
    PATIENCE_S,
    SLOTS,
    child,
    fetched,
    figures,
    prefetchers,
    save,
    supervisor_of,
    tell,
    until,
)
from tests.prefetch.conftest import Join, be_patient
from tests.prefetch.raw import Raw
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT


@pytest.fixture(autouse=True)
def answers_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)
    monkeypatch.setattr(status, "ANSWER_S", PATIENCE_S)


def test_where_none_runs_none_is_started(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--dir", str(directory)]) == 3
    why = f"no prefetcher runs for {directory} (it would be at {endpoint_for([str(directory)]).socket})"
    assert capsys.readouterr().err == f"hcache status: {why}\n"
    assert run(capsys, "status", "--dir", directory) == (3, {"running": False, "error": why})
    assert not prefetchers(directory)
    assert not directory.exists()


def test_pages_of_another_user(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(directory)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    for wait in ([], ["--wait-written"], ["--wait-ended"]):
        assert main(["status", "--dir", str(directory), *wait]) == 3
        assert f"{directory} belongs to root: run this as that user" in capsys.readouterr().err


def test_one_that_is_found_where_only_its_own_environment_has_it(
    directory: Path, join: Join, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours has another XDG_RUNTIME_DIR: then it is one that cannot be seen, but its directory is open."""
    client = join()
    save(client, range(3))
    assert client.flush(PATIENCE_S)
    for wait in ([], ["--wait-written"], ["--wait-ended"]):
        with tempfile.TemporaryDirectory() as other, monkeypatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", other)
            assert main(["status", "--dir", str(directory), *wait]) == 3
            assert f"a process has {directory} open" in capsys.readouterr().err
    assert fetched(client, range(3)) == 3


def test_one_whose_environment_named_no_runtime_directory(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a server of a systemd unit's, where we have a login's."""
    with monkeypatch.context() as patch:
        patch.delenv("XDG_RUNTIME_DIR")
        server = supervisor_of(directory)
        client = server.open(PATIENCE_S)
    assert endpoint_for([str(directory)]).socket != Path(server._endpoint.socket)
    code, report = run(capsys, "status", "--dir", directory)
    assert (code, report["pid"]) == (0, client.prefetcher_pid)
    client.close()
    assert main(["status", "--dir", str(directory), "--wait-ended", "--timeout", str(PATIENCE_S)]) == 0
    assert until(lambda: not prefetchers(directory))


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
    assert (report["version"], report["pages_dirty"]) == (__version__, 0)
    assert (report["quota_bytes"], report["read_bytes_per_s"], report["host_bytes"]) == (None, None, None)
    models: dict[str, Any] = {model["fingerprint"]: model for model in report["models"]}
    assert models.keys() == {FINGERPRINT.hex(), OTHER_FINGERPRINT.hex()}
    model = models[FINGERPRINT.hex()]
    assert (model["about"], model["clients"], model["memory_bytes"]) == ("a/b", 1, SLOTS * LAYOUT.record_bytes)
    assert (model["pages_host"], model["pages_file"], model["pages_dirty"]) == (5, 5, 0)
    assert [volume["state"] for volume in model["volumes"]] == ["ok"]
    assert main(["status", "--dir", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert f"process {client.prefetcher_pid}, version {__version__}, up for " in shown
    assert "\n  0 pages not yet written; limits: the defaults\n" in shown
    assert "2 clients, 2 models, " in shown
    assert "a/b, 1 client\n" in shown
    assert "5 in use, 0 not yet written; 5 in files" in shown
    (volume,) = model["volumes"]
    assert f"{directory}: ok, 5 pages, {human(volume['bytes'])} of {human(volume['quota_bytes'])}\n" in shown
    assert volume["bytes"] >= 5 * LAYOUT.record_bytes
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
        assert "did not answer within 0.3 s" in capsys.readouterr().err
        error = "a prefetcher runs, but did not answer within 0.3 s"
        assert run(capsys, "status", "--dir", directory) == (3, {"running": True, "error": error})
        assert main(["status", "--dir", str(directory), "--wait-written", "--timeout", "0"]) == 3
        assert "did not answer within 0.3 s, after 0 s" in capsys.readouterr().err
    finally:
        os.kill(pid, signal.SIGCONT)


def test_one_of_another_version(
    directory: Path, join: Join, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    join()
    with monkeypatch.context() as patch:
        patch.setattr(m, "VERSION", m.VERSION + 1)
        patch.setattr(m, "PREFIX", b"HC" + bytes((m.VERSION, 0)))
        for wait in ([], ["--wait-written", "--timeout", "0"]):
            assert main(["status", "--dir", str(directory), *wait]) == 3
            assert "but of another version" in capsys.readouterr().err
        assert main(["status", "--dir", str(directory), "--wait-ended", "--timeout", "0"]) == 3
    assert "a prefetcher still runs" in capsys.readouterr().err


def test_what_is_waited_for(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that takes nothing until it is told to; then a client that stays, and that goes."""
    prefetcher = child("write_when_told", directory)
    assert until(endpoint_for([str(directory)]).socket.exists)
    client = supervisor_of(directory).open(PATIENCE_S)
    assert client.prefetcher_pid == prefetcher.pid
    written = ["status", "--dir", str(directory), "--wait-written", "--timeout"]
    ended = ["status", "--dir", str(directory), "--wait-ended", "--timeout"]
    assert main([*written, "0"]) == 0
    save(client, range(3))
    assert until(lambda: figures(client)["pages_dirty"] == 3)
    assert main([*written, "0.3"]) == 3
    assert capsys.readouterr().err == "hcache status: 3 pages not yet written, after 0.3 s\n"
    assert run(capsys, "status", "--dir", directory)[1]["pages_dirty"] == 3
    tell(prefetcher)
    assert run(capsys, *written, PATIENCE_S) == (0, {"running": True})
    assert figures(client)["pages_file"] == 3
    assert main([*ended, "0"]) == 3
    assert "a prefetcher still runs, after 0 s" in capsys.readouterr().err
    client.close()
    assert run(capsys, *ended, PATIENCE_S) == (0, {"running": False})
    assert prefetcher.wait(PATIENCE_S) == 0
    assert main([*written, "0"]) == main([*ended, "0"]) == 0
    with pytest.raises(SystemExit):
        main([*written, "nan"])


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
