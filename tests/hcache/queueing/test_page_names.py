from __future__ import annotations

import gc
import random
from typing import Any

import pytest

from sglang_hcache.page_hash import page_hash
from sglang_hcache.queueing.page_names import KeysOf, Names, PageNames

PAGE = 4


class Req:
    def __init__(self, seed: int) -> None:
        self.tokens = random.Random(seed).sample(range(1000), 40 * PAGE)
        self.hashed = 0

    def names(self, start: int, end: int) -> Names:
        """As SGLang hashes them: the pages behind one, whose own hash it knows."""
        before = page_hash(self.tokens[:start], None, PAGE)
        prior = bytes.fromhex(before[-1]) if before else None
        self.hashed += 1
        found = page_hash(self.tokens[start : start + (end - start) // PAGE * PAGE], prior, PAGE)
        assert isinstance(found, list)
        return found


def looked_up(names: PageNames, req: Any, start: int, end: int) -> Names:
    with names.of(req):
        return names.behind(start, end, PAGE, lambda: req.names(start, end))


def test_they_are_what_sglang_would_hash() -> None:
    """However much of the prompt the device has by then, and however much of it may be used."""
    chance, names, reqs = random.Random(1), PageNames(), [Req(seed) for seed in range(3)]
    for _ in range(500):
        req, start = chance.choice(reqs), PAGE * chance.randrange(40)
        end = chance.randrange(start, 40 * PAGE + 1)
        assert looked_up(names, req, start, end) == req.names(start, end)
        if chance.random() < 0.02:
            names.forget(req)


def test_a_request_that_waits_is_hashed_once() -> None:
    names, req = PageNames(), Req(0)
    for _ in range(3):
        looked_up(names, req, 2 * PAGE, 30 * PAGE)
        looked_up(names, req, 5 * PAGE, 30 * PAGE - 1)
    assert req.hashed == 1
    looked_up(names, req, PAGE, 30 * PAGE)
    assert req.hashed == 2, "the device has lost a page"
    names.forget(req)
    looked_up(names, req, PAGE, 30 * PAGE)
    assert req.hashed == 3


def test_nothing_is_known_of_what_is_asked_for_nobody() -> None:
    """As when it is queued, or retracted."""
    names, req = PageNames(), Req(0)
    with pytest.raises(ZeroDivisionError), names.of(req):
        1 / 0  # noqa: B018
    for _ in range(2):
        assert names.behind(0, 8 * PAGE, PAGE, lambda: req.names(0, 8 * PAGE)) == req.names(0, 8 * PAGE)
    assert req.hashed == 4


def test_what_is_known_goes_with_its_request() -> None:
    names, req = PageNames(), Req(0)
    looked_up(names, req, 0, 8 * PAGE)
    del req
    gc.collect()
    assert not names._known


def test_keys_by_names() -> None:
    names = Req(0).names(0, 10 * PAGE)
    keys, wanted = KeysOf(names), [bytes.fromhex(name) for name in names]
    assert list(keys) == list(keys[:]) == wanted
    assert (keys[0], keys[-1], list(keys[3:5])) == (wanted[0], wanted[-1], wanted[3:5])
    assert wanted[4] in keys
