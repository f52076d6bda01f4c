"""A prefetcher's log: to stderr and to a file, neither of which may hold it up."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path

from sglang_hcache.storage.files import make_private

LOG_DATES = "%F %T"
LOG_BYTES = 5_000_000  # of each of two files: this one, and the one before it
LOG_WAIT_S = 2.0  # for what is still to be written when the prefetcher ends, to it and to stderr
LOG_RECORDS = 10_000  # that may wait for each of them; of a terminal that is stopped, or a pipe that nobody reads


def logging_to_stderr() -> contextlib.AbstractContextManager[None]:
    return _logging_by(_Stderr())


def logging_to(path: Path) -> contextlib.AbstractContextManager[None]:
    """Log to a file, too, where one can be had."""
    file = _PrivateFile(path, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    file.setFormatter(logging.Formatter("[%(asctime)s %(process)d] %(message)s", LOG_DATES))
    return _logging_by(file)


@contextlib.contextmanager
def _logging_by(written_by: logging.Handler) -> Iterator[None]:
    """Log through this handler in a thread of its own: a disk or terminal may hang, which must not block us."""
    records = _Records()
    handler, listener = QueueHandler(records), QueueListener(records, written_by)
    logging.getLogger().addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        stopping = threading.Thread(target=listener.stop, daemon=True)
        stopping.start()
        stopping.join(LOG_WAIT_S)


class _PrivateFile(RotatingFileHandler):
    """A file that only this user can read, and one former file beside it; opened by the first record."""

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        make_private(path.parent)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(path, flags, 0o600), "a", encoding="utf-8", errors="replace")


class _Stderr(logging.Handler):
    """Writes to what our stderr was at start; it may be gone together with whoever started us.

    It bypasses `sys.stderr` and takes no lock: at exit Python would wait for a thread that hangs holding either.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fd = sys.stderr.fileno() if sys.stderr else -1
        self.setFormatter(logging.Formatter("[%(asctime)s prefetcher] %(message)s", LOG_DATES))

    def handle(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(OSError):
            os.write(self._fd, f"{self.format(record)}\n".encode(errors="replace"))
        return True


class _Records(queue.SimpleQueue[logging.LogRecord | None]):
    """Those that wait to be written, and None at the end; a record that finds no room is dropped."""

    def put_nowait(self, item: logging.LogRecord | None) -> None:
        if item is None or self.qsize() < LOG_RECORDS:
            super().put_nowait(item)
