"""Containers whose operations take microseconds each, however much they hold."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Generic, TypeVar

PARTS = 256
NOWHERE, END = -2, -1

V = TypeVar("V")


class SplitDict(Generic[V]):
    """A dictionary in parts, by the last byte of the key: when one has to be copied to grow, it is a part, not all.

    Keys are hashes, so the parts are of about the same size.
    """

    def __init__(self) -> None:
        self._parts: list[dict[bytes, V]] = [{} for _ in range(PARTS)]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, key: bytes) -> V:
        return self._parts[key[-1]][key]

    def __setitem__(self, key: bytes, value: V) -> None:
        self._parts[key[-1]][key] = value

    def __delitem__(self, key: bytes) -> None:
        del self._parts[key[-1]][key]

    def get(self, key: bytes) -> V | None:
        return self._parts[key[-1]].get(key)

    def items(self) -> list[tuple[bytes, V]]:
        """All of them, which takes a while."""
        return [item for part in self._parts for item in part.items()]


class SlotQueue:
    """Slots, each once at most, in an order of their own: a list whose links lie in two arrays, by slot."""

    def __init__(self) -> None:
        self._before = array("i")
        self._after = array("i")
        self._first = self._last = END

    def grow(self, slots: int) -> None:
        """Have room for slots below this number."""
        more = array("i", [NOWHERE]) * (slots - len(self._before))
        self._before.extend(more)
        self._after.extend(more)

    def __contains__(self, slot: int) -> bool:
        return self._before[slot] != NOWHERE

    def first(self) -> int | None:
        return None if self._first == END else self._first

    def append(self, slot: int) -> None:
        """Put a slot that is not in the queue at its end."""
        last, self._last = self._last, slot
        self._before[slot], self._after[slot] = last, END
        if last == END:
            self._first = slot
        else:
            self._after[last] = slot

    def push(self, slot: int) -> None:
        """Put a slot that is not in the queue at its front."""
        first, self._first = self._first, slot
        self._before[slot], self._after[slot] = END, first
        if first == END:
            self._last = slot
        else:
            self._before[first] = slot

    def discard(self, slot: int) -> None:
        """Take a slot out, if it is in."""
        before, after = self._before[slot], self._after[slot]
        if before == NOWHERE:
            return
        if before == END:
            self._first = after
        else:
            self._after[before] = after
        if after == END:
            self._last = before
        else:
            self._before[after] = before
        self._before[slot] = self._after[slot] = NOWHERE

    def __iter__(self) -> Iterator[int]:
        slot = self._first
        while slot != END:
            yield slot
            slot = self._after[slot]
