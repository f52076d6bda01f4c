"""The pages of whole indexes, as arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sglang_hcache.storage.eviction import Floats, Forest, Ints, Mask, values
from sglang_hcache.storage.index import VALUE, Index, Size
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, decode

_NAME = np.dtype([("fingerprint", ">u8", 2), ("key", ">u8"), ("rest", "V24")])


@dataclass(frozen=True)
class Table:
    """One element a page, everywhere. Entries are as they lie in the index: `places` checks them, nothing else."""

    names: list[bytes]  # fingerprint and key
    raw: list[bytes]  # values
    volume: Ints  # which of the indexes has it
    sizes: dict[bytes, Size]  # of the fingerprints that are known to be listed in full

    @classmethod
    def read(cls, indexes: Sequence[Index]) -> Table:
        """Raises lmdb.Error."""
        return cls.join([cls._of(index) for index in indexes])

    @classmethod
    def join(cls, tables: Sequence[Table]) -> Table:
        """One of several, each of one index."""
        counts = np.array([len(table.names) for table in tables], np.int64)
        return cls(
            [name for table in tables for name in table.names],
            [value for table in tables for value in table.raw],
            np.repeat(np.arange(len(tables)), counts),
            {fingerprint: size for table in tables for fingerprint, size in table.sizes.items()},
        )

    @classmethod
    def _of(cls, index: Index) -> Table:
        names, raw = index.raw()
        return cls(names, raw, np.zeros(len(names), np.int64), index.marks())

    @cached_property
    def value(self) -> npt.NDArray[np.void]:
        """`segment`, `slot`, `parent`, `hits` and `last_use` of each page."""
        return np.frombuffer(b"".join(self.raw), VALUE)

    @cached_property
    def _name(self) -> npt.NDArray[np.void]:
        return np.frombuffer(b"".join(self.names), _NAME)

    @cached_property
    def _groups(self) -> tuple[list[bytes], Ints]:
        halves = self._name["fingerprint"].astype(np.uint64)
        mixed = halves[:, 0] ^ (halves[:, 1] * np.uint64(0x9E3779B97F4A7C15))
        _, first, group = np.unique(mixed, return_index=True, return_inverse=True)
        return [self.names[i][:FINGERPRINT_BYTES] for i in first], group.astype(np.int64)

    @property
    def fingerprints(self) -> list[bytes]:
        """All there are; `group` counts in this list."""
        return self._groups[0]

    @property
    def group(self) -> Ints:
        return self._groups[1]

    def of(self, fingerprints: Collection[bytes]) -> Mask:
        """The pages of some of the fingerprints."""
        mask: Mask = np.isin(self.group, [i for i, one in enumerate(self.fingerprints) if one in fingerprints])
        return mask

    def _of_size(self, field: int) -> Ints:
        sizes = [self.sizes.get(fingerprint, Size(0, 0))[field] for fingerprint in self.fingerprints]
        return np.array([*sizes, 0], np.int64)[self.group]

    @cached_property
    def record_bytes(self) -> Ints:
        """0 where it is not known."""
        return self._of_size(0)

    @cached_property
    def forest(self) -> Forest:
        key, parent = self._name["key"].astype(np.uint64), self.value["parent"].astype(np.uint64)
        return Forest.of(self.group, key, parent)

    def worth(self, now: float, forest: Forest | None = None, keep: Collection[bytes] = ()) -> Floats:
        """Value per byte of each page, as in eviction.py. `keep`: keys of pages that must stay."""
        starts = np.frombuffer(b"".join(key[:8] for key in keep), ">u8").astype(np.uint64)
        return values(
            self.forest if forest is None else forest,
            tokens=self._of_size(1),
            record_bytes=self.record_bytes,
            hits=self.value["hits"].astype(np.int64),
            last_use=self.value["last_use"].astype(np.int64),
            now=now,
            keep=np.isin(self._name["key"].astype(np.uint64), starts),
        )

    def segment(self, page: int) -> tuple[bytes, str]:
        """The fingerprint and the name of the segment where a page lies."""
        return self.names[page][:FINGERPRINT_BYTES], self.value["segment"][page].decode("ascii", "replace")

    @cached_property
    def _segments(self) -> tuple[Ints, Ints]:
        text = np.frombuffer(self.value["segment"].tobytes(), ">u8").reshape(-1, 2).astype(np.uint64)
        mixed = (text[:, 0] * np.uint64(0x9E3779B97F4A7C15)) ^ (text[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F))
        mixed ^= (self.group * 1024 + self.volume).astype(np.uint64) * np.uint64(0x165667B19E3779F9)
        _, first, number = np.unique(mixed, return_index=True, return_inverse=True)
        return first.astype(np.int64), number.astype(np.int64)

    @property
    def segment_number(self) -> Ints:
        """A number for each segment file; `segment_example[number]` is one of its pages."""
        return self._segments[1]

    @property
    def segment_example(self) -> Ints:
        return self._segments[0]

    def places(self, chosen: Mask, volume: int) -> list[tuple[bytes, tuple[str, int]]]:
        """Name and place of the chosen pages of one index, as `Index.delete_names` takes them."""
        found = []
        for page in np.flatnonzero(chosen & (self.volume == volume)):
            entry = decode(self.names[page], self.raw[page])
            if entry is not None:
                found.append((self.names[page], entry.place))
        return found
