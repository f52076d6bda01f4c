"""How fast a directory's drive is read, by trying."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from sglang_hcache.storage.direct import DirectIO, File, aligned, run_parallel

_PIECE_BYTES = 1 << 20
_DEPTH = 8


def measure_read_rate(directory: Path, *, n_bytes: int = 64 << 20) -> float:
    """Of a file of `n_bytes`, written for this and removed, in pieces of 1 MiB, several at once.

    Past the page cache where the file system allows it; else the figure is the page cache's. Raises OSError.
    """
    buffers = [aligned(_PIECE_BYTES) for _ in range(n_bytes // _PIECE_BYTES)]
    with tempfile.TemporaryFile(dir=directory, buffering=0) as raw:
        fd = raw.fileno()
        file = File(fd, DirectIO(directory))
        for index, buffer in enumerate(buffers):
            buffer[:] = index + 1  # a drive, or what emulates it, may have its own way with zeros
            file.write(index * _PIECE_BYTES, [buffer])
        os.fsync(fd)
        began = time.perf_counter()
        run_parallel([partial(file.read, i * _PIECE_BYTES, buffer) for i, buffer in enumerate(buffers)], _DEPTH)
        return len(buffers) * _PIECE_BYTES / (time.perf_counter() - began)
