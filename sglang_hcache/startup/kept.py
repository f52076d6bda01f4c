"""What a start finds out and keeps for the next one, in files in the first directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.storage.files import write_atomically

# Folders in the first directory, one file a model each.
CALIBRATION = "calibration"  # what was measured
LAYOUTS = "layouts"  # what is stored of each layer
EXPONENTS = "exponents"  # what `--hcache-codec packed` takes for usual


class Kept:
    """A JSON file of values that depend on all of `about`. Damaged, or another's, it is as if it were not there."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self._path = folder / f"{name}.json"
        self._about = about

    def read(self) -> dict[str, Any] | None:
        """Which values are in it is for the caller to see."""
        try:
            found: dict[str, Any] = json.loads(self._path.read_text())
            return found if found["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, **values: Any) -> None:
        """Raises OSError."""
        write_atomically(self._path, json.dumps({"about": self._about, **values}, indent=1).encode())


class KeptLayout:
    """What is stored of each layer of a model: for the next start, and for `hcache doctor`.

    Row sizes are per token and layer; `hidden_bytes`: None if not possible.
    """

    def __init__(
        self, directory: Path, shape: ModelShape, page_tokens: int, *, hidden_bytes: int | None, kv_bytes: int
    ) -> None:
        self._layers = shape.layers
        about = {
            "model": asdict(shape),
            "page_tokens": page_tokens,
            "hidden_bytes": hidden_bytes,
            "kv_bytes": kv_bytes,
        }
        self._kept = Kept(directory / LAYOUTS, about)

    def read(self) -> Layout | None:
        """None where none was kept, or it is damaged."""
        if (found := self._kept.read()) is None:
            return None
        try:
            layout = Layout(0, int(found["hidden"]), int(found["kv"]))
        except (ValueError, KeyError, TypeError):
            return None
        return layout if min(layout.hidden, layout.kv) >= 0 and layout.layers == self._layers else None

    def write(self, layout: Layout) -> None:
        """Raises OSError."""
        self._kept.write(hidden=layout.hidden, kv=layout.kv)
