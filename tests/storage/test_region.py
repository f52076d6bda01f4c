"""Memory that processes share: its size, its content while it is still being taken, and its end."""

import errno
import os
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from sglang_hcache.storage import region as region_module
from sglang_hcache.storage.region import Region, wait_until_taken
from tests.prefetch.clients import until

SIZE = (70 << 20) + 8192  # two steps and a bit; neither in whole huge pages


def _is_taken(region: Region, size: int) -> bool:
    """Whether it comes to take just so much of the system's memory."""
    return until(lambda: region.taken == size)


def _has_settled(region: Region) -> None:
    assert region._settling is not None
    region._settling.join()


def test_all_memory_is_taken_ahead_of_use_and_no_more() -> None:
    region = Region.create("hcache-test", SIZE)
    assert _is_taken(region, SIZE)
    _has_settled(region)
    assert os.stat(region.path).st_blocks * 512 == SIZE
    assert not np.frombuffer(region.memory, np.uint8).any()
    region.close()


def test_another_process_can_wait_until_all_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    region = Region.create("hcache-test", SIZE)
    wait_until_taken(region.path, SIZE, patience_s=60)
    assert region.taken == SIZE
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(region_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    wait_until_taken(region.path, SIZE + 1, patience_s=0.2)  # as where the system has no more
    wait_until_taken("/proc/self/fd/nowhere", SIZE)
    assert 0.2 <= now < 0.3
    region.close()


def test_memory_that_the_system_does_not_give_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with vm.overcommit_memory=2."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    region = Region.create("hcache-test", SIZE)
    _has_settled(region)
    region.close()
    assert [record.message for record in caplog.records] == [
        f"hcache: the system gives 0 bytes of host memory, not {SIZE} (No space left on device): "
        "whoever uses more may be killed."
    ]


def test_what_is_written_while_memory_is_taken_stays() -> None:
    """Memory is moved together while other threads write to it, through two mappings."""
    region = Region.create("hcache-test", SIZE)
    other = Region.attach(region.path, SIZE)
    expected = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)

    def write(memory: np.ndarray, pages: range) -> None:
        for start in pages:
            memory[start : start + 4096] = expected[start : start + 4096]

    views = [np.frombuffer(mapped.memory, np.uint8) for mapped in (region, other)]
    threads = [
        threading.Thread(target=write, args=(view, range(4096 * odd, SIZE, 8192))) for odd, view in enumerate(views)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _is_taken(region, SIZE)
    for view in views:
        assert np.array_equal(view, expected)
    region.close()
    other.close()


def test_attaching_needs_so_much_memory_and_an_open_region() -> None:
    region = Region.create("hcache-test", SIZE)
    with pytest.raises(OSError, match=f"has {SIZE} bytes, not {SIZE + 4096}"):
        Region.attach(region.path, SIZE + 4096)
    region.close()
    with pytest.raises(OSError, match="No such file"):
        Region.attach(region.path, SIZE)


def test_memory_outlives_the_region() -> None:
    region = Region.create("hcache-test", SIZE)
    view = np.frombuffer(region.memory, np.uint8)
    region.close()
    view[:] = 7
    assert view.sum(dtype=np.int64) == 7 * SIZE


@pytest.mark.parametrize("end", ["free", "close"])
def test_what_is_given_back_while_memory_is_taken_stays_given_back(end: str) -> None:
    region = Region.create("hcache-test", 1 << 30)
    watched = os.open(region.path, os.O_RDONLY)
    assert until(lambda: os.fstat(watched).st_blocks)
    getattr(region, end)()
    taken = os.fstat(watched).st_blocks
    _has_settled(region)
    assert os.fstat(watched).st_blocks == taken
    assert taken == 0 or end == "close"
    if end == "free":
        region.close()
    os.close(watched)


def test_a_region_of_another_size_keeps_what_it_holds() -> None:
    step = 32 << 20
    region = Region.create("hcache-test", 2 * step)
    first = np.frombuffer(region.memory, np.uint8)
    first[:] = 1
    used = Mock(return_value=True)

    def resize(size: int) -> np.ndarray:
        region.resize(size)
        region.settle(used)
        return np.frombuffer(region.memory, np.uint8)

    larger = resize(4 * step)
    assert _is_taken(region, 4 * step)
    larger[-1] = first[0] = 2
    assert larger[0] == first[0] == 2, "those who have it mapped as it was see the same"
    assert larger[: 2 * step].min() == 1
    assert not larger[2 * step : -1].any()

    used.reset_mock()
    resize(step)
    assert np.frombuffer(Region.attach(region.path, step).memory, np.uint8)[0] == 2
    assert until(lambda: used.call_count >= 3)
    assert larger[-1] == 2, "what lies behind stays as long as it is used"
    used.return_value = False
    assert _is_taken(region, step)
    assert not larger[step:].any()
    assert larger[0] == 2

    resize(3 * step)
    assert _is_taken(region, 3 * step)
    assert not larger[step:].any()
    region.free()
    assert _is_taken(region, 0)
    region.close()
