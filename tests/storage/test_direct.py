from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_hcache.storage.direct import DirectIO, File, aligned, refusal, run_parallel
from sglang_hcache.storage.layout import ALIGNMENT, ChunkDamaged, Record
from sglang_hcache.storage.segment import RUN_BYTES, SegmentReader, SegmentWriter, runs

RECORD_BYTES = 3 * ALIGNMENT
RECORDS = 6


def content(records: int = RECORDS) -> Record:
    return np.random.default_rng(0).integers(0, 256, (records, RECORD_BYTES), np.uint8)


def array_at(n_bytes: int, skew: int) -> Record:
    """As many bytes, so many after an aligned address."""
    return aligned(n_bytes + skew)[skew : skew + n_bytes]


def needs_direct(path: Path) -> DirectIO:
    reason = refusal(path)
    if reason is not None:
        pytest.skip(reason)
    return DirectIO(path)


def write(path: Path, io: DirectIO | None, records: Record) -> None:
    writer = SegmentWriter.create(path, RECORD_BYTES, io)
    writer.grow_to(len(records))
    writer.write(0, list(records))
    writer.sync()
    writer.close()


def is_direct(fd: int) -> bool:
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        flags = next(line.split()[1] for line in lines if line.startswith("flags:"))
    return bool(int(flags, 8) & os.O_DIRECT)


@pytest.mark.parametrize("skew", [0, 1, 8])
@pytest.mark.parametrize("write_direct", [True, False])
@pytest.mark.parametrize("read_direct", [True, False])
def test_direct_and_buffered_give_equal_bytes(
    tmp_path: Path, write_direct: bool, read_direct: bool, skew: int
) -> None:
    io, records = needs_direct(tmp_path), content()
    skewed = array_at(records.size, skew).reshape(records.shape)
    skewed[:] = records
    write(tmp_path / "a.seg", io if write_direct else None, skewed)
    assert (tmp_path / "a.seg").read_bytes() == records.tobytes()
    reader = SegmentReader(tmp_path / "a.seg", RECORD_BYTES, io if read_direct else None)
    for slot in range(RECORDS):
        out = array_at(RECORD_BYTES, skew)
        reader.read(slot, out)
        assert np.array_equal(out, records[slot])


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slot=st.integers(0, RECORDS - 1),
    skew=st.sampled_from([0, 1, 512]),
    length=st.integers(0, RECORD_BYTES),
)
def test_the_start_of_a_record_can_be_read(tmp_path: Path, slot: int, skew: int, length: int) -> None:
    io, records, path = needs_direct(tmp_path), content(), tmp_path / "a.seg"
    if not path.exists():
        write(path, io, records)
    for access in (io, None):
        out = array_at(length, skew)
        SegmentReader(path, RECORD_BYTES, access).read(slot, out)
        assert np.array_equal(out, records[slot, :length])


def test_a_file_is_direct_where_it_can_be(tmp_path: Path) -> None:
    io = needs_direct(tmp_path)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert not is_direct(fd)
    assert File(fd, None).direct is is_direct(fd) is False
    assert File(fd, io).direct is is_direct(fd) is True
    os.close(fd)


@pytest.mark.parametrize("left", [0, 1, 512, ALIGNMENT, RECORD_BYTES - 1])
def test_a_file_that_ends_too_early_is_damaged(tmp_path: Path, left: int) -> None:
    io, path = needs_direct(tmp_path), tmp_path / "a.seg"
    write(path, io, content())
    os.truncate(path, RECORD_BYTES + left)
    for access in (io, None):
        reader = SegmentReader(path, RECORD_BYTES, access)
        reader.read(0, aligned(RECORD_BYTES))
        for out in (aligned(RECORD_BYTES), array_at(left + 1, 1)):
            with pytest.raises(ChunkDamaged, match="too short"):
                reader.read(1, out)


class Refusing:
    """os.preadv or os.pwritev on a file system that refuses direct I/O only when it is done."""

    def __init__(self, operation: Callable[[int, list[memoryview], int], int]) -> None:
        self.operation = operation

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self.operation(fd, buffers, offset)


def test_a_refusal_while_running_falls_back_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    io, records = needs_direct(tmp_path), content()
    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, Refusing(getattr(os, name)))
    with caplog.at_level(logging.WARNING):
        for name in ("a.seg", "b.seg"):
            write(tmp_path / name, io, records)
            reader = SegmentReader(tmp_path / name, RECORD_BYTES, io)
            outs = aligned(records.size).reshape(records.shape)
            run_parallel([partial(reader.read, slot, outs[slot]) for slot in range(RECORDS)], RECORDS)
            assert np.array_equal(outs, records)
    (message,) = caplog.messages
    assert str(tmp_path) in message
    assert "page cache" in message


def test_a_file_system_that_refuses_is_said_once_and_used_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwritev", Refusing(os.pwritev))
        io = DirectIO(tmp_path)
    assert not io.allowed
    write(tmp_path / "a.seg", io, content())
    reader, out = SegmentReader(tmp_path / "a.seg", RECORD_BYTES, io), np.empty(RECORD_BYTES, np.uint8)
    reader.read(1, out)
    assert np.array_equal(out, content()[1])
    assert len(caplog.messages) == 1
    assert not list(tmp_path.glob("tmp*")), "the probe leaves nothing behind"


def test_other_errors_are_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = needs_direct(tmp_path)
    write(tmp_path / "a.seg", io, content())
    reader = SegmentReader(tmp_path / "a.seg", RECORD_BYTES, io)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        reader.read(0, aligned(RECORD_BYTES))


def test_a_directory_that_cannot_be_written_is_not_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing") is None


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return pwritev(fd, [buffers[0][: 2 * ALIGNMENT]], offset)

    for access in (needs_direct(tmp_path), None):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", short)
            write(tmp_path / f"{access is None}.seg", access, content())
        assert (tmp_path / f"{access is None}.seg").read_bytes() == content().tobytes()


@given(st.lists(st.integers(0, 30), unique=True), st.sampled_from([ALIGNMENT, RUN_BYTES // 2, 2 * RUN_BYTES]))
def test_runs_are_consecutive_and_bounded_and_lose_nothing(slots: list[int], record_bytes: int) -> None:
    record = np.broadcast_to(np.uint8(0), (record_bytes,))
    found = list(runs((slot, record) for slot in slots))
    assert [start + i for start, run in found for i in range(len(run))] == slots
    assert all(len(run) == 1 or len(run) * record_bytes <= RUN_BYTES for _, run in found)


def test_jobs_run_at_once_but_no_more_than_asked_for() -> None:
    gate, lock, now, most = threading.Barrier(3), threading.Lock(), 0, 0

    def job() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        gate.wait(30)
        with lock:
            now -= 1

    run_parallel([job] * 9, 3)
    assert most == 3
    run_parallel([], 3)


def test_where_threads_cannot_be_started_it_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    start, done, calls = threading.Thread.start, list[int](), itertools.count()

    def refuse(thread: threading.Thread) -> None:
        if next(calls):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    run_parallel([partial(done.append, i) for i in range(9)], 4)
    assert sorted(done) == list(range(9))


class Jobs(list[Callable[[], object]]):
    """`noted`: whoever ran the job that sets `failed` has come for its next one."""

    def __init__(self, jobs: list[Callable[[], object]], failed: threading.Event) -> None:
        super().__init__(jobs)
        self._left = super().__iter__()
        self.failed, self.noted = failed, threading.Event()

    def __iter__(self) -> Iterator[Callable[[], object]]:
        return self

    def __next__(self) -> Callable[[], object]:
        if self.failed.is_set():
            self.noted.set()
        return next(self._left)


def test_the_first_error_ends_it_when_nothing_is_under_way_any_more() -> None:
    failed, ended, started = threading.Event(), threading.Event(), list[int]()

    def fail() -> None:
        failed.set()
        raise OSError(errno.EIO, "broken")

    def slow() -> None:
        assert jobs.noted.wait(60)
        ended.set()

    jobs = Jobs([slow, fail, *(partial(started.append, i) for i in range(1000))], failed)
    with pytest.raises(OSError, match="broken"):
        run_parallel(jobs, 2)
    assert ended.is_set()
    assert not started
