"""What is read for the requests before one, counted from step to step, is what counting anew would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.request import Request, Wait
from sglang_hcache.queueing.wait_plan import Ahead

PAGES = [bytes([page]) for page in range(12)]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """For pages that others may want, too, of which some are there, which may be more than it waits for."""
    keys = tuple(draw(st.lists(st.sampled_from(PAGES), unique=True, max_size=8)))
    request = Request(keys, Prompt(1, 0), arrived_at=0.0, asked_at=0.0, waits_until=0.0)
    request.there = draw(st.integers(0, len(keys)))
    request.wait = draw(
        st.sampled_from([None, Wait(draw(st.integers(0, len(keys))), pass_s=0.5, beside_s=0.2, tries=False)])
    )
    return request


def awaited_of(request: Request) -> set[bytes]:
    return set() if request.wait is None else set(request.keys[request.there : request.wait.enough])


@given(st.data())
def test_pages_of_all_that_are_ahead_are_counted_once(data: st.DataObject) -> None:
    ahead, queue = Ahead(), data.draw(st.lists(requests(), max_size=5))
    for _ in range(data.draw(st.integers(1, 4), label="steps")):
        ahead.new_step()
        expected, pass_s = set[bytes](), 0.0
        for request in queue:
            if data.draw(st.booleans(), label="asked"):
                assert ahead.pages_read_before(request.keys) == len(expected - set(request.keys))
            assert ahead.pass_s == pass_s
            held = data.draw(st.booleans(), label="held")
            ahead.add(request, held=held)
            if request.wait is not None:
                pass_s += 0.2 if pass_s else 0.5  # weights are read once for all
            expected |= awaited_of(request) if held else set()
        for request in queue:
            request.there = data.draw(st.integers(0, len(request.keys)), label="there")
            request.wait = request.wait or data.draw(
                st.sampled_from([None, Wait(len(request.keys), 0.5, 0.2, False)])
            )
        queue = data.draw(st.permutations(queue))[data.draw(st.integers(0, 2)) :]
        queue += data.draw(st.lists(requests(), max_size=2), label="new")
