"""Names of a queued request's pages, which SGLang hashes in every step in which it looks the request up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload
from weakref import WeakKeyDictionary

Names = list[str]


class PageNames:
    """Keeps the names of a request's pages while it waits; for the scheduler's thread.

    A page's name stands for all tokens up to its end, so it is the same from whichever page on names are asked for.
    A request's names are dropped with the request, or once it is in a batch.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, tuple[int, Names]] = WeakKeyDictionary()  # tokens before the first one
        self._req: Any = None

    @contextmanager
    def of(self, req: Any) -> Iterator[None]:
        """Pages that are asked for meanwhile are this request's."""
        self._req = req
        try:
            yield
        finally:
            self._req = None

    def behind(self, start: int, end: int, page_tokens: int, hash_pages: Callable[[], Names]) -> Names:
        """Names of the whole pages between two positions of the prompt; `start` must be the beginning of a page."""
        if self._req is None:
            return hash_pages()
        first_token, names = self._known.get(self._req, (0, []))
        first, last = (start - first_token) // page_tokens, (end - first_token) // page_tokens
        if first < 0 or last > len(names):
            self._known[self._req] = start, (names := hash_pages())
            return names
        return names[first:last]

    def forget(self, req: Any) -> None:
        self._known.pop(req, None)


class KeysOf(Sequence[bytes]):
    """The keys of pages by their names; each is made when it is looked at, as mostly only the first one is."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[bytes]:
        return map(bytes.fromhex, self._names)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        names = self._names[index]
        return bytes.fromhex(names) if isinstance(names, str) else KeysOf(names)
