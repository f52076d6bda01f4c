"""A ring of memory whose pieces are read later than they are written."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_hcache.device.ring import Ring
from sglang_hcache.device.streams import Event, ImmediateStream


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pytest.fail("the stream waits, not the caller")

    def elapsed_time(self, end: Event) -> float:
        raise NotImplementedError


@pytest.mark.parametrize("seed", range(20))
def test_a_piece_stays_until_it_has_been_read(seed: int) -> None:
    """Pieces of random sizes, read when a random number of others have been taken."""
    chance = random.Random(seed)
    memory = torch.zeros(100 << 8, dtype=torch.uint8)
    copied, waits = 0, 0

    class Sent(_Passed):
        def __init__(self, number: int, place: torch.Tensor) -> None:
            self.number, self.place = number, place

        def query(self) -> bool:
            return self.number < copied

    class Writing(ImmediateStream):
        def wait(self, event: Event) -> None:
            assert isinstance(event, Sent)
            copy(event.number + 1)

    def copy(upto: int) -> None:
        nonlocal copied
        while copied < upto:
            assert torch.equal(sent[copied].place, torch.full_like(sent[copied].place, copied))
            copied += 1

    sent: list[Sent] = []
    ring = Ring(memory, Writing())
    for number in range(200):
        before = copied
        place = ring.take(chance.choice([256, 1000, 7 << 8, 33 << 8, 80 << 8]))
        waits += copied > before
        place.fill_(number)
        sent.append(Sent(number, place))
        ring.sent(sent[-1])
        copy(max(copied, number - chance.randrange(6)))
    copy(200)
    assert waits


def test_where_all_has_been_read_the_same_memory_is_used_again() -> None:
    ring = Ring(torch.zeros(100 << 8, dtype=torch.uint8), ImmediateStream())
    places = set()
    for _ in range(5):
        places.add(ring.take(10 << 8).data_ptr())
        ring.sent(_Passed())
    assert len(places) == 1


def test_small_pieces_behind_a_large_one_wait_for_nothing() -> None:
    class Never(ImmediateStream):
        def wait(self, event: Event) -> None:
            pytest.fail("there is room")

    class UnderWay(_Passed):
        def query(self) -> bool:
            return False

    ring = Ring(torch.zeros(100 << 8, dtype=torch.uint8), Never())
    for size in (80, 5, 5, 5, 5):
        ring.take(size << 8)
        ring.sent(UnderWay())
