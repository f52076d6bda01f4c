"""What is stored of each layer, kept in the first directory: for the next start, and for `hcache doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from sglang_hcache.config import LAYOUTS, kept_file
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.storage.files import write_atomically


class KeptLayout:
    """The file with a model's layout. Row sizes are per token and layer; `hidden_bytes`: None if not possible."""

    def __init__(
        self, directory: Path, shape: ModelShape, page_tokens: int, *, hidden_bytes: int | None, kv_bytes: int
    ) -> None:
        self._layers = shape.layers
        self._about = {
            "model": asdict(shape),
            "page_tokens": page_tokens,
            "hidden_bytes": hidden_bytes,
            "kv_bytes": kv_bytes,
        }
        self.path = kept_file(directory / LAYOUTS, self._about)

    def read(self) -> Layout | None:
        """None where none was kept, or it is damaged."""
        try:
            found = json.loads(self.path.read_text())
            layout = Layout(0, int(found["hidden"]), int(found["kv"]))
            sound = found["about"] == self._about and min(layout.hidden, layout.kv) >= 0
            return layout if sound and layout.layers == self._layers else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, layout: Layout) -> None:
        """Raises OSError."""
        kept = {"about": self._about, "hidden": layout.hidden, "kv": layout.kv}
        write_atomically(self.path, json.dumps(kept, indent=1).encode())
