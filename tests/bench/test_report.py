"""What a report says of how it came about."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.report import about


def test_the_command_names_files_without_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.touch()
    monkeypatch.setattr(sys, "argv", ["bench", f"agentic={trace}", str(trace), "--name=kept", "--shrink", "2"])
    command = about("Method: this.")["command"]
    assert command.endswith(" agentic=trace.jsonl trace.jsonl --name=kept --shrink 2")
    assert str(tmp_path) not in command
