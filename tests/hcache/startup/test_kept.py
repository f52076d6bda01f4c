"""Files of values for a later start: what is in them, and when they are as if they were not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_hcache.startup.kept import Kept

ABOUT = {"version": "1", "model": {"layers": 3}, "directories": ["/a"]}
NAME = "5bbc4e13dff4f393.json"
CONTENT = """{
 "about": {
  "version": "1",
  "model": {
   "layers": 3
  },
  "directories": [
   "/a"
  ]
 },
 "rates": {
  "first": 1.5
 },
 "more": 2
}"""


def test_files_of_former_starts_are_found_again(tmp_path: Path) -> None:
    """Their names and their content stay as they are, byte by byte."""
    Kept(tmp_path / "new", ABOUT).write(rates={"first": 1.5}, more=2)
    assert (tmp_path / "new" / NAME).read_text() == CONTENT
    found = Kept(tmp_path / "new", ABOUT).read()
    assert found == {"about": ABOUT, "rates": {"first": 1.5}, "more": 2}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'"about"', b"\xff", CONTENT.replace("3", "4").encode()]
)
def test_what_is_damaged_or_anothers_is_not_there(content: bytes, tmp_path: Path) -> None:
    kept = Kept(tmp_path, ABOUT)
    assert kept.read() is None
    (tmp_path / NAME).write_bytes(content)
    assert kept.read() is None
    kept.write(more=2)
    assert kept.read() == {"about": ABOUT, "more": 2}


def test_what_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Kept(tmp_path / "file" / "folder", ABOUT).write(more=2)
