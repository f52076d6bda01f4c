"""A bound on how fast files are read, for drives that others need, too."""

from __future__ import annotations

import threading
import time


class RateLimit:
    """Limits reads to `bytes_per_s`, averaged over any longer time, for all who share the object. Thread-safe.

    Hold `turn` from choosing what to read until `take` returns: the choice is then made as late as possible.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.turn = threading.Lock()
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0  # monotonic
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> None:
        """Return when so many bytes may have been read."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + n_bytes / self._bytes_per_s
            wait_s = self._free_at - now
        time.sleep(wait_s)
