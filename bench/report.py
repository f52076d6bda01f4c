"""What surrounds a bench's figures: its arguments, where and how it measured, the JSON that is printed and kept."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """With what all benches take: `--json` and `--save`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    parser.add_argument("--save", action="store_true", help="write the report to bench/results, and to $OUT")
    return parser


def about(
    doc: str | None, *, machine: dict[str, Any] | None = None, versions: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of a report: machine and versions, with what a bench adds to them, date, and method: what `doc` says of it."""
    return {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count()} | (machine or {}),
        "versions": {"python": platform.python_version()} | (versions or {}),
        "date": datetime.date.today().isoformat(),
        "command": _command(),
        "method": " ".join((doc or "").split("Method: ")[1].split()),
    }


def out_folders() -> list[Path]:
    """$OUT, if set: a folder for results outside of the checkout."""
    return [Path(folder)] if (folder := os.environ.get("OUT")) else []


def save(name: str, report: dict[str, Any], folders: Iterable[Path] | None = None) -> None:
    """As NAME.json in all of the folders: if not said otherwise, bench/results and what `out_folders` says."""
    for folder in [RESULTS, *out_folders()] if folders is None else folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def emit(arguments: argparse.Namespace, name: str | None, report: dict[str, Any], lines: Iterable[str]) -> None:
    """As `arguments_of`'s two want it: saved as NAME (None: it has been), in lines for people, and as JSON, last."""
    if arguments.save and name is not None:
        save(name, report)
    for line in lines:
        print(line)
    if arguments.json:
        print(json.dumps(report))


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command() -> str:
    """As it was called, without the folders of files."""
    spec = sys.modules["__main__"].__spec__
    threads = [f"OMP_NUM_THREADS={count}"] if (count := os.environ.get("OMP_NUM_THREADS")) else []
    arguments = map(_without_folder, sys.argv[1:])
    return shlex.join([*threads, "python", "-m", spec.name if spec else Path(sys.argv[0]).stem, *arguments])


def _without_folder(argument: str) -> str:
    """PATH, or NAME=PATH."""
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if os.path.exists(path) else argument


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
