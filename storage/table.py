"""The pages of whole indexes, as arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sglang_hcache.storage.eviction import Floats, Forest, Ints, Mask, Numbers, values
from sglang_hcache.storage.index import NAME, VALUE, Index, Rows, Size
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, PARENT_BYTES, Entry, decode

_HALVES = np.dtype([("segment", ">u8", 2), ("rest", f"V{VALUE.itemsize - 16}")])  # of a value

Places = list[tuple[bytes, tuple[str, int]]]  # names, and where these pages lie, as `Index.delete_names` takes them


def starts_of(keys: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """The first PARENT_BYTES of each key, as much as an entry stores of its parent's key."""
    return np.frombuffer(b"".join(key[:PARENT_BYTES] for key in keys), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class Table:
    """One element a page, everywhere; millions of them. Only `entries` and `places` check what is in the index."""

    names: Rows  # fingerprint and key
    value: Rows  # `segment`, `slot`, `parent`, `hits` and `last_use`
    volume: Numbers  # which of the indexes has it
    index_count: int
    sizes: dict[bytes, Size]  # of the fingerprints that are known to be listed in full

    @classmethod
    def read(cls, index: Index) -> Table:
        """Raises lmdb.Error."""
        names, value = index.raw()
        return cls(names, value, np.zeros(len(names), np.int32), 1, index.marks())

    @classmethod
    def join(cls, tables: Sequence[Table]) -> Table:
        """One of several, each of one index."""
        counts = np.array([len(table.names) for table in tables], np.int64)
        return cls(
            np.concatenate([np.empty(0, NAME), *(table.names for table in tables)], dtype=NAME),
            np.concatenate([np.empty(0, VALUE), *(table.value for table in tables)], dtype=VALUE),
            np.repeat(np.arange(len(tables), dtype=np.int32), counts),
            len(tables),
            {fingerprint: size for table in tables for fingerprint, size in table.sizes.items()},
        )

    @cached_property
    def _groups(self) -> tuple[list[bytes], Numbers]:
        halves = self.names["fingerprint"]
        changes = (halves[1:] != halves[:-1]).any(axis=1)  # seldom: each index is sorted
        starts = np.flatnonzero(np.concatenate([[True], changes])[: len(halves)])
        number: dict[bytes, int] = {}
        group = [number.setdefault(self.names[i].tobytes()[:FINGERPRINT_BYTES], len(number)) for i in starts]
        return list(number), np.repeat(np.array(group, np.int32), np.diff([*starts, len(halves)]))

    @property
    def fingerprints(self) -> list[bytes]:
        """All there are; `group` counts in this list."""
        return self._groups[0]

    @property
    def group(self) -> Numbers:
        return self._groups[1]

    def of(self, fingerprints: Collection[bytes]) -> Mask:
        """The pages of some of the fingerprints."""
        mask: Mask = np.isin(self.group, [i for i, one in enumerate(self.fingerprints) if one in fingerprints])
        return mask

    def _of_size(self, field: str) -> Ints:
        sizes = [getattr(self.sizes.get(fingerprint, Size(0, 0)), field) for fingerprint in self.fingerprints]
        return np.array([*sizes, 0], np.int64)[self.group]

    @cached_property
    def record_bytes(self) -> Ints:
        """0 where it is not known."""
        return self._of_size("record_bytes")

    @cached_property
    def forest(self) -> Forest:
        key, parent = self.names["key"].astype(np.uint64), self.value["parent"].astype(np.uint64)
        return Forest.of(self.group, key, parent)

    def worth(self, now: float, forest: Forest | None = None, keep: Iterable[bytes] = ()) -> Floats:
        """Value per byte of each page, as in eviction.py. `keep`: keys of pages that must stay."""
        return values(
            self.forest if forest is None else forest,
            tokens=self._of_size("page_tokens"),
            record_bytes=self.record_bytes,
            hits=self.value["hits"].astype(np.int64),
            last_use=self.value["last_use"].astype(np.int64),
            now=now,
            keep=np.isin(self.names["key"].astype(np.uint64), starts_of(keep)),
        )

    def segment(self, page: int) -> tuple[bytes, str]:
        """The fingerprint and the name of the segment where a page lies."""
        return self.names[page].tobytes()[:FINGERPRINT_BYTES], self.value["segment"][page].decode("ascii", "replace")

    @cached_property
    def _segments(self) -> tuple[Numbers, Numbers]:
        """Names are told apart by a hash of 64 bits, by SplitMix64's and xxHash's factors: sorting text is slow."""
        text = self.value.view(_HALVES)["segment"].astype(np.uint64)
        mixed = (text[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ (text[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F))
        mixed ^= (self.group * np.int64(1024) + self.volume).astype(np.uint64) * np.uint64(0x165667B19E3779F9)
        _, first, number = np.unique(mixed, return_index=True, return_inverse=True)
        return first.astype(np.int32), number.astype(np.int32)

    @property
    def segment_number(self) -> Numbers:
        """A number for each segment file; `segment_example[number]` is one of its pages."""
        return self._segments[1]

    @property
    def segment_example(self) -> Numbers:
        return self._segments[0]

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        """Name and entry of all pages whose entry is sound."""
        return self._entries(range(len(self.names)))

    def places(self, chosen: Mask) -> list[Places]:
        """The names and places of the chosen pages, one list for each index."""
        of_index = (np.flatnonzero(chosen & (self.volume == index)) for index in range(self.index_count))
        return [[(name, entry.place) for name, entry in self._entries(pages)] for pages in of_index]

    def _entries(self, pages: Iterable[int]) -> Iterator[tuple[bytes, Entry]]:
        for page in pages:
            name = self.names[page].tobytes()
            entry = decode(name, self.value[page].tobytes())
            if entry is not None:
                yield name, entry
