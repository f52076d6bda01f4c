"""Which forwards a planner is told of, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_hcache.queueing.forward_timer import ForwardTimer
from sglang_hcache.queueing.load_planner import RestoreAll


class Device:
    """A stream whose events are numbered in seconds; those before `now` have been reached."""

    def __init__(self) -> None:
        self.recorded = self.now = 0

    def record(self, *, timed: bool = False) -> Any:
        assert timed
        self.recorded += 1
        at = self.recorded
        return SimpleNamespace(at=at, query=lambda: at < self.now, elapsed_time=lambda end: 1000 * (end.at - at))


def batch(*tokens: int, extend: bool = True) -> Any:
    mode = SimpleNamespace(is_extend_without_speculative=lambda: extend)
    return SimpleNamespace(
        forward_mode=mode, extend_seq_lens_cpu=list(tokens), extend_prefix_lens_cpu=[7 for _ in tokens]
    )


def test_a_planner_is_told_of_prefills_once_the_device_is_done_with_them() -> None:
    told = list[tuple[Any, ...]]()
    planner: Any = SimpleNamespace(restores_all=False, prefilled=lambda *of, waited: told.append((*of, waited)))
    device: Any = Device()
    timer = ForwardTimer(planner, device)
    for one, waits in ((batch(3, 4), False), (batch(1, extend=False), False), (batch(5), True)):
        timer.begin(one, waits=waits)
        timer.end()
    assert told == []
    device.now = 3
    timer.begin(batch(1, extend=False), waits=False)
    timer.end()
    assert told == [([3, 4], [7, 7], 1.0, False)]
    device.now = 5
    timer.end()
    assert told[1:] == [([5], [7], 1.0, True)]


def test_where_nothing_is_planned_nothing_is_timed() -> None:
    device: Any = Device()
    timer = ForwardTimer(RestoreAll(16), device)
    timer.begin(batch(3), waits=False)
    timer.end()
    assert device.recorded == 0
