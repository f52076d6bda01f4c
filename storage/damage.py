"""Counts what was found damaged, and says so once for each file."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

logger = logging.getLogger(__name__)


class Damage:
    """Damage found in one directory since the start of the process. Thread-safe."""

    def __init__(self) -> None:
        self.pages = 0
        self.files = 0
        self.index_rebuilt = 0
        self._reported: set[Path] = set()
        self._lock = threading.Lock()

    def page(self, file: Path, reason: str) -> None:
        """A page that `file` should hold cannot be used, and is forgotten."""
        self.count_pages(1)
        self.file(file, f"{reason}. The page is prefilled again")

    def count_pages(self, pages: int) -> None:
        with self._lock:
            self.pages += pages

    def file(self, file: Path, reason: str) -> None:
        with self._lock:
            if file in self._reported:
                return
            self._reported.add(file)
            self.files += 1
        logger.warning("hcache: %s is damaged: %s. Further damage in it is counted, not logged.", file, reason)

    def rebuilt(self, index: Path, pages: int) -> None:
        with self._lock:
            self.index_rebuilt += 1
        logger.warning(
            "hcache: %s was missing or damaged and was rebuilt from the segment files: %d pages.", index, pages
        )
