"""A directory that may fail, and come back."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.directory import Contents, Directory
from sglang_hcache.storage.eviction import Keep
from sglang_hcache.storage.files import make_private
from sglang_hcache.storage.index import Index, IndexStillOpen
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.quota import Quota
from sglang_hcache.storage.stripe_manifest import write_siblings

UNREADABLE_S = 600.0  # a record that the disk could not read is not tried again; a page may be stored anew meanwhile
SLOW_S = 2.0  # a call that takes longer may hang: who evicts elsewhere then leaves this directory's index alone

logger = logging.getLogger(__name__)

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space there",
    errno.EDQUOT: "the disk quota is used up: raise it or free space there",
    errno.EFBIG: "files may not grow that large: raise the file size limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: mount it writable",
    errno.EACCES: "this user may not write there: change owner or permissions",
    errno.EPERM: "this user may not write there: change owner or permissions",
    errno.EIO: "the disk reports input/output errors: look at the kernel's log",
    errno.EMFILE: "this process has too many open files: raise the limit (ulimit -n)",
    errno.ENOENT: "the directory or a file in it has been removed: put it back",
}


class Volume:
    """`quota`: bounds what the directory takes of the disk. `retry_s`: how often it is tried again after a failure.

    No method raises for what a disk does: it fails the volume, which then takes no writes until a retry succeeds.

    A failed volume still reads what can be read. `write`, `touch`, `retry` and `close` are for one thread, the rest
    for any.
    """

    def __init__(
        self,
        path: Path,
        contents: Contents,
        *,
        retry_s: float,
        quota: Quota | None = None,
    ) -> None:
        self.path = path
        self.damage = Damage()
        self.quota = quota
        self._contents = contents
        self._retry_s = retry_s
        self._full = False
        self._siblings: Sequence[Volume] | None = None
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._retry_at = 0.0
        self._busy_since: float | None = None  # monotonic
        self.reads_failed = 0
        self._unreadable: dict[tuple[bytes, tuple[str, int]], float] = {}  # key and place → when to try it again
        self._directory: Directory | None = None
        try:
            self._directory = self._open()
        except (OSError, lmdb.Error) as error:
            self._fail(error)

    def stripe_with(self, siblings: Sequence[Volume]) -> None:
        """Say where the other pages of the same prefixes are; until then none is evicted for lack of its parent."""
        self._siblings = siblings
        self._note_siblings()

    @property
    def state(self) -> str:
        failure = self._failure
        return "ok" if failure is None else f"failed: {failure}"

    @property
    def healthy(self) -> bool:
        return self._failure is None

    @property
    def pages(self) -> int:
        directory = self._directory
        return directory.pages if directory else 0

    @property
    def bytes_on_disk(self) -> int:
        """As of the last time that files grew or shrank; 0 without a quota. Looks at no file."""
        return self.quota.used if self.quota else 0

    def locate(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Where those of the pages lie that are here."""
        directory = self._directory
        if directory is None or not keys:
            return {}
        try:
            found = directory.locate(keys)
        except (OSError, lmdb.Error) as error:
            self._fail(error, directory)
            return {}
        if not self._unreadable:
            return found
        now = time.monotonic()
        return {key: entry for key, entry in found.items() if self._unreadable.get((key, entry.place), now) <= now}

    def read(self, key: bytes, entry: Entry, out: Record) -> bool:
        """Read a located page into `out`, uint8 [record_bytes]; False where it cannot be had whole.

        Where the disk fails, the page stays in the index: it is located again after UNREADABLE_S, or elsewhere.
        """
        directory = self._directory
        if directory is None:
            return False
        try:
            return directory.read(key, entry, out)
        except (OSError, lmdb.Error) as error:
            if directory is not self._directory:
                return False  # it has been closed meanwhile
            with self._lock:
                self.reads_failed += 1
                now = time.monotonic()
                self._unreadable = {place: until for place, until in self._unreadable.items() if until > now}
                self._unreadable[key, entry.place] = now + UNREADABLE_S
            self._fail(error, directory)
            return False

    def write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep = list) -> bool:
        """Write sealed records; True once they are durable, False where none of them counts as written.

        `keep`: pages that are not evicted for them.
        """
        directory = self._directory
        if directory is None or not self.healthy:
            return False
        try:
            with self._busy():
                directory.write(pages, keep)
        except (OSError, lmdb.Error) as error:
            self._fail(error, directory)
            return False
        return True

    def touch(self, hits: Mapping[bytes, int]) -> None:
        """Note that pages were used now, so many times each; those that are not here are ignored."""
        directory = self._directory
        if directory is None or not self.healthy or not hits:
            return
        try:
            with self._busy():
                directory.touch(hits)
        except (OSError, lmdb.Error) as error:
            self._fail(error, directory)

    def retry(self) -> bool:
        """To be called often: if it is time, see whether a failed volume works again; True where it has come back.

        It stays open meanwhile, so that it can be read. Only a directory that is lost is closed and opened anew. One
        that works lets go of its files where nothing is written to it for long.
        """
        directory = self._directory
        if self.healthy and directory is not None:
            try:
                with self._busy():
                    if not directory.is_lost():
                        directory.rest()
            except (OSError, lmdb.Error) as error:
                self._fail(error, directory)
        if directory is not None and directory.index.condemned:  # by us or by whoever uses it in this process
            self._fail(lmdb.Error("its index has to be opened anew"), directory)
            self._retry_at = 0.0
        if self.healthy or time.monotonic() < self._retry_at:
            return False
        self._retry_at = time.monotonic() + self._retry_s  # whatever comes of it
        try:
            with self._busy():
                self._revive(directory)
        except IndexStillOpen:
            self._retry_at = 0.0
            return False
        except (OSError, lmdb.Error) as error:
            self._fail(error)
            self._retry_at = time.monotonic() + self._retry_s
            return False
        self._failure, self._full = None, False
        self._note_siblings()
        logger.info("hcache: %s works again; pages are written to it.", self.path)
        return True

    def close(self) -> None:
        directory, self._directory = self._directory, None
        if directory is None:
            return
        try:
            directory.close()
        except (OSError, lmdb.Error) as error:
            logger.warning(
                "hcache: %s could not be tidied up on closing; the next opening does it. (%s)", self.path, error
            )

    def _revive(self, directory: Directory | None) -> None:
        if directory is not None and directory.is_lost():
            self.close()
            directory = None
        if directory is None:
            directory = self._directory = self._open()
        else:
            self._find_limit()
            directory.recover()
        directory.probe()

    def _open(self) -> Directory:
        self._find_limit()
        siblings = self._sibling_indexes
        return Directory(self.path, self._contents, damage=self.damage, quota=self.quota, siblings=siblings)

    def _find_limit(self) -> None:
        if self.quota is not None:
            make_private(self.path)
            self.quota.find_limit(full=self._full)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While it lasts a disk may take its time."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    @property
    def _hangs(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > SLOW_S

    def _note_siblings(self) -> None:
        if self._siblings is not None and self.healthy:
            write_siblings(self.path, [volume.path for volume in self._siblings])

    def _sibling_indexes(self) -> list[Index] | None:
        if self._siblings is None:
            return None
        directories = [volume._directory for volume in self._siblings if volume.healthy and not volume._hangs]
        indexes = [directory.index for directory in directories if directory is not None]
        return indexes if len(indexes) == len(self._siblings) else None

    def _fail(self, error: Exception, directory: Directory | None = None) -> None:
        reason = _explain(error)
        with self._lock:
            if directory is not self._directory and directory is not None:
                return  # an error of a directory that has been closed since
            if self._failure is None:  # others let go of an index soon
                self._retry_at = 0.0 if isinstance(error, IndexStillOpen) else time.monotonic() + self._retry_s
            changed, self._failure = self._failure != reason, reason
            self._full |= _is(error, errno.ENOSPC)
        if changed:
            logger.warning(
                "hcache: %s cannot be used: %s. Pages stay in host memory or go elsewhere; trying again every %g s.",
                self.path,
                reason,
                self._retry_s,
            )


def belong_together(volumes: Sequence[Volume]) -> None:
    """They hold pages of the same prefixes."""
    for volume in volumes:
        volume.stripe_with([other for other in volumes if other is not volume])


def _explain(error: Exception) -> str:
    if isinstance(error, lmdb.MapFullError):
        return "its index is full: delete the directory, or use another one as well"
    advice = next((text for code, text in _ADVICE.items() if _is(error, code)), None)
    return f"{advice} ({error})" if advice else str(error)


def _is(error: Exception, code: int) -> bool:
    """LMDB's errors carry the system's message, not its number."""
    return error.errno == code if isinstance(error, OSError) else os.strerror(code) in str(error)
