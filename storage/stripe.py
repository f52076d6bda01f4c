"""Several volumes as one: consecutive pages go to different ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sglang_hcache.storage.eviction import Keep
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import Record


class PageFiles(Protocol):
    """Where pages are written to and read from: a `Volume`, or a prefetcher on another host.

    `locate` and `read` from any thread; everything else from one. Nothing raises for what a disk does.
    """

    @property
    def healthy(self) -> bool:
        """Whether it takes pages."""
        ...

    def locate(self, keys: Sequence[bytes]) -> Mapping[bytes, Entry]: ...

    def read(self, key: bytes, entry: Entry, out: Record) -> bool: ...

    def write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep = list) -> bool:
        """False where none of the pages counts as written."""
        ...

    def touch(self, hits: Mapping[bytes, int]) -> None: ...

    def retry(self) -> bool:
        """To be called often; True where it has just become healthy again."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a page lies."""

    volume: PageFiles
    entry: Entry

    def read(self, key: bytes, out: Record) -> bool:
        return self.volume.read(key, self.entry, out)


class Stripe:
    """Which page lies on which volume (from any thread), and which volume gets the next (from one at a time)."""

    def __init__(self, volumes: Sequence[PageFiles]) -> None:
        self.volumes = tuple(volumes)
        self._turn = 0

    @property
    def healthy(self) -> bool:
        """Whether any volume takes pages."""
        return any(volume.healthy for volume in self.volumes)

    def locate(self, keys: Iterable[bytes]) -> dict[bytes, Place]:
        """Where those of the pages lie that are on file."""
        places: dict[bytes, Place] = {}
        missing = list(keys)
        for volume in self.volumes:
            places |= {key: Place(volume, entry) for key, entry in volume.locate(missing).items()}
            missing = [key for key in missing if key not in places]
        return places

    def next(self, behind: Callable[[PageFiles], int] = lambda _volume: 0, most_behind: int = 0) -> PageFiles | None:
        """The volume for the next page: the healthy ones in turn; None where there is none.

        `behind`: pages that a volume has not written yet. One that has over `most_behind` more of them than another
        gets none, so that one that hangs does not collect them all.
        """
        healthy = [volume.healthy for volume in self.volumes]
        least = min((behind(volume) for volume, works in zip(self.volumes, healthy, strict=True) if works), default=0)
        for step in range(len(self.volumes)):
            i = (self._turn + step) % len(self.volumes)
            if healthy[i] and behind(self.volumes[i]) <= least + most_behind:
                self._turn = i + 1
                return self.volumes[i]
        return None
