"""Several volumes as one: consecutive pages go to different ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import Record, parent_of
from sglang_hcache.storage.volume import Volume


@dataclass(frozen=True)
class Place:
    """Where a page lies."""

    volume: Volume
    entry: Entry

    def read(self, key: bytes, out: Record) -> bool:
        return self.volume.read(key, self.entry, out)


class Stripe:
    """`locate` from any thread; everything else from one. Nothing raises for what a disk does."""

    def __init__(self, volumes: Sequence[Volume]) -> None:
        self.volumes = tuple(volumes)
        for volume in self.volumes:
            volume.stripe_with([other for other in self.volumes if other is not volume])
        self._turn = 0

    def locate(self, keys: Iterable[bytes]) -> dict[bytes, Place]:
        """Where those of the pages lie that are on file."""
        places: dict[bytes, Place] = {}
        missing = list(keys)
        for volume in self.volumes:
            places |= {key: Place(volume, entry) for key, entry in volume.locate(missing).items()}
            missing = [key for key in missing if key not in places]
        return places

    def write(self, pages: Sequence[tuple[bytes, Record]]) -> set[bytes]:
        """Write sealed records to healthy volumes in turn; the keys of those that none could take."""
        left = list(pages)
        keep = {key for key, _ in pages} | {parent_of(record) for _, record in pages}
        while left and (healthy := [volume for volume in self.volumes if volume.healthy]):
            refused = []
            for i, volume in enumerate(healthy):
                share = left[(i - self._turn) % len(healthy) :: len(healthy)]
                if share and not volume.write(share, keep):
                    refused += share
            self._turn += len(left)
            left = refused
        return {key for key, _ in left}

    def touch(self, keys: Mapping[bytes, int]) -> None:
        """Note that pages were used now, so many times each; those that are not on file are ignored."""
        for volume in self.volumes:
            volume.touch(keys)

    def retry(self) -> None:
        for volume in self.volumes:
            volume.retry()

    def close(self) -> None:
        for volume in self.volumes:
            volume.close()
