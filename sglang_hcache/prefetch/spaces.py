"""The stores a prefetcher keeps open: one a fingerprint, each with an arena of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sglang_hcache.prefetch.host_memory import available_bytes
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.rate_limit import RateLimit
from sglang_hcache.storage.region import Region
from sglang_hcache.storage.store import LocalStore

LOOK_S = 0.2  # between two looks whether all of a store is written
LOOKS = 4  # at most, at how much memory is free, while promised memory is being taken
MOST_BY_DEFAULT = 0.8  # of what is free goes to one arena whose size nobody has asked for

logger = logging.getLogger(__name__)

Opened = Callable[["Space | str"], None]  # a space, or why there is none


@dataclass
class Space:
    """A store, the shared memory of its arena, and the sessions that use it."""

    store: LocalStore
    region: Region
    made_for: Hello
    sessions: set[int] = field(default_factory=set)

    @property
    def fingerprint(self) -> bytes:
        return self.made_for.fingerprint

    def resize(self, size: int) -> None:
        """Without a session. Raises OSError, ValueError."""
        try:
            self.region.resize(size)
            self.store.resize(size // self.store.layout.record_bytes, self.region.memory)
        finally:
            self.region.settle(self.store.used_behind)


@dataclass
class _Promise:
    """Memory for the arena of a space: open, or being opened or closed."""

    model: dict[str, str]  # whose pages these are; ranks with pages of their own say the same
    size: int
    region: Region | None = None  # once there is one

    @property
    def taken(self) -> int:
        return self.region.taken if self.region else 0


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
        self._closing: dict[bytes, Space] = {}
        self._postponed: list[tuple[Hello, Opened]] = []  # until nothing is being closed any more
        self._promised: dict[bytes, _Promise] = {}
        self._threads: set[threading.Thread] = set()  # each opens or closes a store
        self._hurry = threading.Event()

    def __len__(self) -> int:
        return len(self._open) + len(self._busy)

    def open(self, hello: Hello, opened: Opened) -> None:
        """Call `opened` once the space of the hello's fingerprint is open, or cannot be."""
        if (waiting := self._busy.get(hello.fingerprint)) is not None:
            waiting.append((hello, opened))
            return
        space = self._open.get(hello.fingerprint)
        try:
            if space is None:
                self._open_anew(hello, opened)
            else:
                self._adapt(space, hello)
        except (OSError, ValueError) as error:
            opened(f"its pages cannot be served: {error}")
        except Exception as error:
            logger.exception("hcache: a client's pages cannot be served.")
            opened(f"its pages cannot be served: {error!r}")
        else:
            if space is not None:
                opened(space)

    @property
    def opened(self) -> list[Space]:
        return list(self._open.values())

    @property
    def unwritten(self) -> int:
        """Pages that are still to be written by spaces that are being closed."""
        return sum(space.store.drain() for space in self._closing.values())

    def unused(self) -> list[Space]:
        """The open ones without a session."""
        return [space for space in self._open.values() if not space.sessions]

    def close(self, space: Space) -> None:
        """Nobody uses it any more; whoever asks for it meanwhile waits until it can be opened anew."""
        with contextlib.suppress(RuntimeError):  # no thread can be had now: it stays open
            self._start(self._unmake, space)
            self._retire(space)

    def close_all(self) -> None:
        """Close everything and wait for it; what cannot be written soon is given up.

        Clients may still restore from what they have leased: memory goes with whoever is the last to map it.
        """
        self._hurry.set()
        with ThreadPoolExecutor(max(1, len(self._open))) as threads:  # each may take its full time to write
            for space in self._open.values():
                threads.submit(self._close, space)
        for thread in self._threads:
            thread.join()
        for promise in self._promised.values():
            if promise.region:
                promise.region.close()

    def _open_anew(self, hello: Hello, opened: Opened) -> None:
        room = self._room()
        if self._closing and (self._wish(hello) < hello.host_bytes or room < hello.host_bytes):
            self._postponed.append((hello, opened))  # it may get more, or its share, of the memory that closing frees
            return
        size = self._size_for(hello)
        if size > room:
            raise ValueError(f"{hello.host_bytes} bytes of host memory are asked for, and {max(0, room)} are free")
        in_the_way = self._in_the_way(size)
        self._promised[hello.fingerprint] = _Promise(hello.about, size)
        try:
            self._start(self._make, hello, size, in_the_way)
        except RuntimeError:
            del self._promised[hello.fingerprint]
            raise
        for other in in_the_way:
            self._retire(other)
        self._busy[hello.fingerprint] = [(hello, opened)]

    def _adapt(self, space: Space, hello: Hello) -> None:
        """Give a space the size and write policy its client wishes, unless others use it; pages stay in memory."""
        if space.store.layout != hello.layout or space.made_for.on_file != hello.on_file:
            raise ValueError("another client uses this fingerprint with another layout of pages")
        if space.sessions or hello is space.made_for:
            return
        policy = WritePolicy(hello.write_policy)
        wanted, promise = self._size_for(hello), self._promised[space.fingerprint]
        record_bytes = space.store.layout.record_bytes
        most = promise.size + max(0, self._left()) // record_bytes * record_bytes
        size = min(wanted, most)
        if size < wanted:
            logger.warning("hcache: %s asks for %d bytes of host memory and gets %d.", hello.name, wanted, size)
        if size != promise.size:
            space.resize(size)
            promise.size = size
        space.store.follow(policy)
        space.made_for = hello

    def _wish(self, hello: Hello) -> int:
        """Bytes of host memory that its client wishes: all that it has asked for, or its share of what there is."""
        if not hello.host_share:
            return hello.host_bytes
        room = max(0, self._room())
        return min(
            hello.host_bytes,
            int(hello.host_share * (room + self._taken_by_ranks_of(hello))),
            int(max(hello.host_share, MOST_BY_DEFAULT) * room),
        )

    def _size_for(self, hello: Hello) -> int:
        """What its client wishes, in whole pages. Raises ValueError."""
        record_bytes, wanted = hello.layout.record_bytes, self._wish(hello)
        if wanted < 2 * record_bytes:
            raise ValueError(f"{wanted} bytes of host memory do not hold two pages of {record_bytes}")
        return wanted // record_bytes * record_bytes

    def _taken_by_ranks_of(self, hello: Hello) -> int:
        """What other ranks of the same server have been given: each gets its share of what was there before."""
        unused = {space.fingerprint for space in self.unused()}
        return sum(
            promise.size
            for fingerprint, promise in self._promised.items()
            if promise.model == hello.about and fingerprint not in {hello.fingerprint, *unused, *self._closing}
        )

    def _left(self) -> int:
        """Memory that is free and that nobody has been promised."""
        looks: list[int] = []
        while len(looks) < LOOKS:
            untaken = self._untaken()
            looks.append(available_bytes() - untaken)
            if self._untaken() == untaken:
                break
        return max(looks)  # each is too low by what was taken amid it

    def _untaken(self) -> int:
        """Memory that is promised and still free."""
        return sum(max(0, promise.size - promise.taken) for promise in self._promised.values())

    def _room(self) -> int:
        """What `_left` would be if all unused spaces, which are kept for clients that may return, were closed."""
        return self._left() + sum(self._promised[space.fingerprint].size for space in self.unused())

    def _in_the_way(self, size: int) -> list[Space]:
        """The unused spaces to close so that `size` bytes are free: first those with the fewest pages to write."""
        left, found = self._left(), []
        for space in sorted(self.unused(), key=lambda space: space.store.drain()):
            if left >= size:
                break
            left += self._promised[space.fingerprint].size
            found.append(space)
        return found

    def _start(self, job: Callable[..., None], *arguments: object) -> None:
        """Have a thread do it. Raises RuntimeError where none can be had."""
        thread = threading.Thread(target=job, args=arguments, name="hcache-space")
        thread.start()
        self._threads = {one for one in self._threads if one.is_alive()} | {thread}

    def _retire(self, space: Space) -> None:
        del self._open[space.fingerprint]
        self._busy[space.fingerprint] = []
        self._closing[space.fingerprint] = space

    def _make(self, hello: Hello, size: int, in_the_way: Sequence[Space]) -> None:
        for space in in_the_way:
            self._unmake(space)
        result: Space | str
        try:
            result = "the prefetcher ends" if self._hurry.is_set() else self._made(hello, size)
        except (OSError, ValueError, MemoryError) as error:
            result = f"its pages cannot be served: {error}"
        except Exception as error:
            logger.exception("hcache: a client's pages cannot be served.")
            result = f"its pages cannot be served: {error!r}"
        if isinstance(result, Space) and self._hurry.is_set():  # nobody comes for it any more
            self._close(result, free=True)
        self._later(lambda: self._finished(hello.fingerprint, result))

    def _made(self, hello: Hello, size: int) -> Space:
        policy = WritePolicy(hello.write_policy)
        region = Region.create("hcache", size)
        self._promised[hello.fingerprint].region = region
        try:
            store = LocalStore(
                hello.layout,
                hello.fingerprint,
                size,
                self._directories if hello.on_file else [],
                region=region.memory,
                write_policy=policy,
                quota_bytes=self._quota_bytes,
                read_limit=self._read_limit,
                about=hello.about,
                on_progress=lambda owner: self._progressed(hello.fingerprint, owner),
            )
        except Exception:
            region.free()
            raise
        return Space(store, region, hello)

    def _close(self, space: Space, *, free: bool = False) -> None:
        """free: nobody has a session any more."""
        try:
            if space.store.close() and free:
                space.region.free()  # else a write that hangs would store zeros, if it ever went on
        except Exception:
            logger.exception("hcache: pages were not closed properly; the next opening tidies up.")

    def _unmake(self, space: Space) -> None:
        while space.store.drain() and not self._hurry.wait(LOOK_S):
            pass
        self._close(space, free=True)
        self._later(lambda: self._finished(space.fingerprint, None))

    def _finished(self, fingerprint: bytes, result: Space | str | None) -> None:
        waiting = self._busy.pop(fingerprint)
        self._closing.pop(fingerprint, None)
        if isinstance(result, Space):
            self._open[fingerprint] = result
        elif region := self._promised.pop(fingerprint).region:
            region.close()
        for hello, opened in waiting:
            if result is None or isinstance(result, Space):
                self.open(hello, opened)
            else:
                opened(result)
        if not self._closing:
            postponed, self._postponed = self._postponed, []
            for hello, opened in postponed:
                self.open(hello, opened)
