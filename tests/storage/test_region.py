"""Memory that processes share: its size, its content while it is still being taken, and its end."""

import os
import threading
import time

import numpy as np
import pytest

from sglang_hcache.storage.region import Region

SIZE = (70 << 20) + 8192  # two steps and a bit; neither in whole huge pages
TAKEN_S = 30


def _wait_until_taken(region: Region) -> None:
    deadline = time.monotonic() + TAKEN_S
    while os.stat(region.path).st_blocks * 512 < SIZE:
        assert time.monotonic() < deadline, "the region's memory was not taken"
        time.sleep(0.001)


def test_all_memory_is_taken_ahead_of_use_and_no_more() -> None:
    region = Region.create("hcache-test", SIZE)
    _wait_until_taken(region)
    time.sleep(0.1)
    assert os.stat(region.path).st_blocks * 512 == SIZE
    assert not np.frombuffer(region.memory, np.uint8).any()
    region.close()


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
    _wait_until_taken(region)
    for view in views:
        assert np.array_equal(view, expected)
    region.close()
    other.close()


def test_attaching_needs_the_right_size_and_an_open_region() -> None:
    region = Region.create("hcache-test", SIZE)
    with pytest.raises(OSError, match="not 4096"):
        Region.attach(region.path, 4096)
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
    getattr(region, end)()
    taken = os.fstat(watched).st_blocks
    time.sleep(0.2)
    assert os.fstat(watched).st_blocks == taken
    assert taken == 0 or end == "close"
    if end == "free":
        region.close()
    os.close(watched)
