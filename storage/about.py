"""What a fingerprint stands for: a small JSON file beside its segments, for people and tools; the store reads none.

{"layout": {"page_tokens": int, "layer_bytes": [int]}, and strings: what the store's user says of the pages}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sglang_hcache.storage.files import write_atomically
from sglang_hcache.storage.layout import ChunkLayout

NAME = "about.json"


@dataclass(frozen=True)
class About:
    layout: ChunkLayout | None = None
    texts: dict[str, str] = field(default_factory=dict)


def write_about(folder: Path, layout: ChunkLayout, texts: Mapping[str, str]) -> None:
    """Write the file, unless it is there and sound. Raises OSError."""
    if read_about(folder).layout == layout:
        return
    content = {**texts, "layout": {"page_tokens": layout.page_tokens, "layer_bytes": layout.layer_bytes}}
    write_atomically(folder / NAME, msgspec.json.format(msgspec.json.encode(content)))


def read_about(folder: Path) -> About:
    """What the file says; nothing where it is missing or damaged."""
    try:
        content = msgspec.json.decode((folder / NAME).read_bytes(), type=dict[str, object])
        layout = msgspec.convert(content.pop("layout"), ChunkLayout)
    except (OSError, ValueError, KeyError):
        return About()
    return About(layout, {key: value for key, value in content.items() if isinstance(value, str)})
