"""The stores a prefetcher keeps open: one a fingerprint, each with an arena of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sglang_hcache.prefetch.host_memory import available_bytes
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.layout import ChunkLayout
from sglang_hcache.storage.rate import RateLimit
from sglang_hcache.storage.region import Region
from sglang_hcache.storage.store import LocalStore

THREADS = 256  # one for each store that is being opened or closed, and each flush; idle ones are used again
LOOK_S = 0.2  # between two looks whether all of a store is written
SAME_SIZE = 0.1  # a server asks for a little more or less memory than when it was started last

log = logging.getLogger(__name__)

SETTINGS = ("page_tokens", "layer_bytes", "write_policy", "on_file")  # of a hello: what a store cannot change

Opened = Callable[["Space | str"], None]  # a space, or why there is none


@dataclass
class Space:
    """A store, the shared memory of its arena, and the sessions that use it."""

    fingerprint: bytes
    store: LocalStore
    region: Region
    made_for: Hello
    sessions: set[int] = field(default_factory=set)
    parents: dict[int, bytes] = field(default_factory=dict)  # by slot, of the page last committed to it

    def suits(self, hello: Hello) -> bool:
        """Whether it is what would be made for this client."""
        same = all(getattr(hello, name) == getattr(self.made_for, name) for name in SETTINGS)
        return same and abs(hello.host_bytes - self.made_for.host_bytes) <= SAME_SIZE * self.made_for.host_bytes


class Spaces:
    """Opening and closing read and write files, so they are done by threads; everything else by the server's loop.

    `later(job)` must have the loop call `job` soon, from any thread. `progressed` is called with a fingerprint and an
    owner, from any thread.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        quota_bytes: int | None,
        read_limit: RateLimit | None,
        later: Callable[[Callable[[], None]], None],
        progressed: Callable[[bytes, str], None],
    ) -> None:
        self._directories = directories
        self._quota_bytes = quota_bytes
        self._read_limit = read_limit
        self._later = later
        self._progressed = progressed
        self._open: dict[bytes, Space] = {}
        self._busy: dict[bytes, list[tuple[Hello, Opened]]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hcache-space")
        self._hurry = threading.Event()

    def __len__(self) -> int:
        return len(self._open) + len(self._busy)

    def open(self, hello: Hello, opened: Opened) -> None:
        """Call `opened` once the space of the hello's fingerprint is open, or cannot be."""
        space = self._open.get(hello.fingerprint)
        if space is not None and (space.sessions or space.suits(hello)):
            opened(self._fitting(space, hello))
            return
        if space is not None:
            self.close(space)
        if (waiting := self._busy.get(hello.fingerprint)) is not None:
            waiting.append((hello, opened))
        else:
            in_the_way = self.unused() if hello.host_bytes > available_bytes() else []
            self._busy[hello.fingerprint] = [(hello, opened)]
            for other in in_the_way:
                self._retire(other)
            self._threads.submit(self._make, hello, in_the_way)

    @property
    def opened(self) -> list[Space]:
        return list(self._open.values())

    def unused(self) -> list[Space]:
        """The open ones without a session."""
        return [space for space in self._open.values() if not space.sessions]

    def close(self, space: Space) -> None:
        """Nobody uses it any more; whoever asks for it meanwhile waits until it can be opened anew."""
        self._retire(space)
        self._threads.submit(self._unmake, space)

    def in_background(self, work: Callable[[], bool], done: Callable[[bool], None]) -> None:
        """Do what may take long, and then `done` with its result, in the loop."""

        def run() -> None:
            result = work()
            self._later(lambda: done(result))

        self._threads.submit(run)

    def close_all(self) -> None:
        """Close everything and wait for it; what cannot be written soon is given up."""
        self._hurry.set()
        with ThreadPoolExecutor(max(1, len(self._open))) as threads:  # each may take its full time to write
            for space in self._open.values():
                threads.submit(self._close, space)
        self._threads.shutdown()

    def _fitting(self, space: Space, hello: Hello) -> Space | str:
        same = space.store.layout == _layout(hello)
        return space if same else "another client uses this fingerprint with another layout of pages"

    def _retire(self, space: Space) -> None:
        del self._open[space.fingerprint]
        self._busy[space.fingerprint] = []

    def _make(self, hello: Hello, in_the_way: Sequence[Space]) -> None:
        for space in in_the_way:
            self._unmake(space)
        result: Space | str
        try:
            result = self._made(hello)
        except (OSError, ValueError, MemoryError) as error:
            result = f"its pages cannot be served: {error}"
        except Exception as error:
            log.exception("hcache: a client's pages cannot be served.")
            result = f"its pages cannot be served: {error!r}"
        self._later(lambda: self._finished(hello.fingerprint, result))

    def _made(self, hello: Hello) -> Space:
        layout = _layout(hello)
        slots = hello.host_bytes // layout.record_bytes
        if slots < 2:
            raise ValueError(
                f"{hello.host_bytes} bytes of host memory do not hold two pages of {layout.record_bytes}"
            )
        policy = WritePolicy(hello.write_policy)
        free = available_bytes()
        if hello.host_bytes > free:
            raise ValueError(f"{hello.host_bytes} bytes of host memory are asked for, and {free} are free")
        region = Region.create("hcache", slots * layout.record_bytes)
        try:
            store = LocalStore(
                layout,
                hello.fingerprint,
                slots * layout.record_bytes,
                self._directories if hello.on_file else [],
                region=region.memory,
                write_policy=policy,
                quota_bytes=self._quota_bytes,
                read_limit=self._read_limit,
                about=hello.about,
                on_progress=lambda owner: self._progressed(hello.fingerprint, owner),
            )
        except Exception:
            region.close()
            raise
        return Space(hello.fingerprint, store, region, hello)

    def _close(self, space: Space) -> None:
        try:
            space.store.close()
            space.region.free()
            space.region.close()
        except Exception:
            log.exception("hcache: pages were not closed properly; the next opening tidies up.")

    def _unmake(self, space: Space) -> None:
        while space.store.unwritten() and not self._hurry.wait(LOOK_S):
            pass
        self._close(space)
        self._later(lambda: self._finished(space.fingerprint, None))

    def _finished(self, fingerprint: bytes, result: Space | str | None) -> None:
        waiting = self._busy.pop(fingerprint)
        if isinstance(result, Space):
            self._open[fingerprint] = result
        for hello, opened in waiting:
            if result is None or isinstance(result, Space):
                self.open(hello, opened)
            else:
                opened(result)


def _layout(hello: Hello) -> ChunkLayout:
    return ChunkLayout(hello.page_tokens, tuple(hello.layer_bytes))
