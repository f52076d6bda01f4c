"""What every command does alike: directories, exit status, and how mistakes are told."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import sglang_hcache
from sglang_hcache.cli import inspect
from sglang_hcache.cli.common import count, explain
from sglang_hcache.cli.main import main
from sglang_hcache.cli.prefetcher import NAMES, configuration, read_file
from sglang_hcache.flags import FlagError, add_cli_args, server_kwargs
from tests.cli.stores import make


def wrong(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said of arguments that cannot be."""
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("given", "said"), [("", "empty path"), (",", "empty path"), ("a,", "empty path")])
def test_an_empty_path_is_not_the_current_directory(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in wrong(capsys, "inspect", "--dir", given)
    assert main(["prefetcher", "--dir", given or ","]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(FlagError, match=said):
        server_kwargs(hcache_dir=given)


def test_a_directory_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for second in ("a", "b/../a", "link"):
        given = f"{tmp_path / 'a'},{tmp_path / second}"
        assert "twice" in wrong(capsys, "inspect", "--dir", given)
        with pytest.raises(FlagError, match="twice"):
            server_kwargs(hcache_dir=given)


def test_a_defect_has_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", "--dir", str(tmp_path)]) == 70
    assert "hcache inspect: this is a defect" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_what_the_system_refuses_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x/segments")

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", "--dir", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "hcache inspect: /x/segments: Permission denied\n"


def test_an_interruption_is_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert main(["inspect", "--dir", str(tmp_path)]) == 130


@pytest.mark.parametrize("command", ["advise --list", "advise Llama-2-7B --gpu H100"])
def test_a_reader_that_has_seen_enough_is_told_nothing(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    arguments = [sys.executable, "-m", "sglang_hcache.cli.main", *command.split()]
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (3, "")


def test_without_a_standard_output_a_command_does_its_work(tmp_path: Path) -> None:
    make(tmp_path)
    command = [sys.executable, "-m", "sglang_hcache.cli.main", "gc", "--dir", str(tmp_path)]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_size_beyond_all_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is too large" in wrong(capsys, "gc", "--to-size", "9" * 400 + "TB")


def test_a_user_without_a_home_names_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that is run as any user: no server starts worse for it, with or without the tier."""

    def nobody(number: int) -> NoReturn:
        raise KeyError(number)

    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    parser = argparse.ArgumentParser()
    add_cli_args(None, parser)
    assert "~/.cache/sglang-hcache" in "".join(parser.format_help().split())
    with pytest.raises(FlagError, match="--hcache-dir has no default, as this user has no home directory"):
        server_kwargs()
    assert server_kwargs(hcache_dir=str(tmp_path / "a"))
    assert main(["inspect"]) == 3
    assert "hcache inspect: --dir has no default, as this user has no home directory" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert sglang_hcache.__version__ in said
    assert sglang_hcache.TESTED_SGLANG in said


def test_words_for_people() -> None:
    assert [count(n, "page") for n in (0, 1, 2)] == ["0 pages", "1 page", "2 pages"]
    assert count(2, "entry", "entries") == "2 entries"
    assert explain(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert explain(OSError(5, "Input/output error"), Path("y")) == "y: Input/output error"
    assert explain(ValueError("it is none"), Path("y")) == "y: it is none"


def configured(path: Path, **options: object) -> str:
    """What a prefetcher says of such a configuration; it must not have made its directory."""
    config = path / "prefetcher.json"
    config.write_text(json.dumps({"dir": [str(path / "pages")], **options}))
    with pytest.raises((OSError, ValueError)) as refused:
        configuration(argparse.Namespace(**(dict.fromkeys(NAMES) | {"config": config})))
    assert not (path / "pages").exists()
    return str(refused.value)


def test_a_prefetcher_makes_nothing_before_all_is_checked(tmp_path: Path) -> None:
    assert "not an address to listen at" in configured(tmp_path, listen="nowhere")
    assert "cannot be read (No such file or directory)" in configured(tmp_path, keys=str(tmp_path / "none"))
    assert "is not a size" in configured(tmp_path, read_limit="fast")


@pytest.mark.parametrize("limit", ["host_limit", "size_limit"])
def test_a_limit_that_holds_no_page(limit: str, tmp_path: Path) -> None:
    assert f"--{limit.replace('_', '-')} 1B is too small" in configured(tmp_path, **{limit: "1B"})


def test_a_table_is_no_text(tmp_path: Path) -> None:
    assert configured(tmp_path, listen={"port": 7}).endswith("listen is not a string")
    assert configured(tmp_path, dir=["a", ["b"]]).endswith("dir is not a string, nor a list of strings")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[1]", "is not a JSON object"),
        ("a.json", '{"dirr": 1, "quota": 2}', "unknown dirr, quota; known are dir, listen"),
        ("a.yaml", "dir: /x", "cannot be parsed as JSON (TOML needs a name in .toml)"),
        ("a.toml", "dir", "cannot be parsed as TOML"),
    ],
)
def test_a_config_file_that_cannot_be_used(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_file(tmp_path / name)


@pytest.mark.parametrize("clients", [["a", "a"], ["a", "server.key_secret"]])
def test_no_key_is_made_before_all_is_checked(
    clients: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for name in clients for word in ("--client", name)]
    assert main(["keygen", str(tmp_path / "keys"), *flags]) == 3
    assert repr(clients[1]) in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


def test_no_key_is_made_where_others_may_enter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clients").mkdir(mode=0o755)
    tmp_path.chmod(0o700)
    assert main(["keygen", str(tmp_path)]) == 3
    assert "is open to other users" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]
