"""How much of the disk one directory may take."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sglang_hcache.storage.paths import bytes_below, bytes_on_disk, index_folder

BATCH = 20  # a twentieth of the quota is evicted at once
SEGMENTS = 8  # at least so many segments fit in the quota
FILL = 0.9  # of what it takes and what is free, without a wanted limit, or once the disk was full
# Where nobody says, more is left to others, who may need the disk to live; but not where that leaves nearly nothing.
KEEP_PART, KEEP_BYTES = 0.05, 10 * 10**9  # of the file system, whichever is more
LEAST_FILL = 0.25
SLACK = 1 << 20  # for the index to grow


class Quota:
    """`limit`: bytes on disk that a directory's segments, of all fingerprints, and its index may take.

    `wanted`: the limit; None to derive it, when the directory is opened, from what they take plus what is free: all
    but a tenth, a twentieth of the file system, or 10 GB, whichever is most; but a quarter at least. `sharers`: how
    many directories share what is free. Raises ValueError where `wanted` does not hold a few pages of `record_bytes`.
    """

    def __init__(self, path: Path, wanted: int | None, record_bytes: int, sharers: int = 1) -> None:
        self._least = SEGMENTS * record_bytes
        if wanted is not None and wanted < self._least:
            raise ValueError(f"a quota of {wanted} bytes does not hold {SEGMENTS} pages of {record_bytes} bytes")
        self.limit = wanted or 0
        self.used = 0  # bytes, when somebody looked last
        self.evicted = 0  # pages, since the start of the process
        self.evicted_idle_s: float | None = None  # since the last use of those evicted last; median
        self._wanted = wanted
        self._sharers = sharers
        self._path = path

    def find_limit(self, *, full: bool) -> None:
        """Find the limit, before the directory is opened; one that was wanted is lowered where the disk was `full`.

        Raises OSError, ENOSPC where there is no room for a few pages.
        """
        if self._wanted is not None and not full:
            self.limit = self._wanted
            return
        disk = os.statvfs(self._path)
        there_is = bytes_on_disk(self._path) + disk.f_bavail * disk.f_frsize // self._sharers
        limit = FILL * there_is
        if self._wanted is None:
            kept = max(KEEP_PART * disk.f_blocks * disk.f_frsize, KEEP_BYTES) / self._sharers
            limit = max(LEAST_FILL * there_is, min(limit, there_is - kept))
        if limit < self._least:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.limit = int(limit) if self._wanted is None else min(self._wanted, int(limit))

    @property
    def batch(self) -> int:
        return self.limit // BATCH

    def segment_bytes(self, wanted: int) -> int:
        return min(wanted, self.limit // SEGMENTS)

    def excess(self, growth: int) -> int:
        """By how much the quota would be exceeded after growing so much; not positive where it would not."""
        slack = bytes_below(index_folder(self._path)) // 4 + min(SLACK, self.limit // 32)
        self.used = bytes_on_disk(self._path)
        return self.used + growth + slack - self.limit
