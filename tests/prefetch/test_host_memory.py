from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import psutil
import pytest

from sglang_hcache.prefetch.host_memory import available_bytes, total_bytes
from sglang_hcache.prefetch.spaces import Space, Spaces
from tests.prefetch.clients import PATIENCE_S, hello

MB = 10**6
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
MACHINE = SimpleNamespace(total=64_000 * MB, available=48_000 * MB)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: MACHINE)


def member_of(system: Path, lines: str) -> None:
    (system / "proc/self").mkdir(parents=True, exist_ok=True)
    (system / "proc/self/cgroup").write_text(lines)


def v2(folder: Path, limit: object, used: int = 0, cached: int = 0, high: object = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cached}\ninactive_file {cached}\nactive_file 0\n")


def v1(folder: Path, limit: int, used: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache {cached}\ntotal_inactive_file {cached}\ntotal_active_file 0\n")


def assert_unbounded(system: Path) -> None:
    assert available_bytes(system) == MACHINE.available
    assert total_bytes(system) == MACHINE.total


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert_unbounded(tmp_path)


def test_a_group_without_a_limit_is_none(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/\n")
    v2(tmp_path / V2, "max", 3 * MB)
    assert_unbounded(tmp_path)
    member_of(tmp_path, "4:memory:/\n")
    v1(tmp_path / V1, 0x7FFFFFFFFFFFF000, 3 * MB)
    assert_unbounded(tmp_path)


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    """Whatever its membership is called outside. Files in memory are no obstacle: the kernel drops them."""
    for path in ("/", "/kubepods/pod1/container2"):
        member_of(tmp_path, f"0::{path}\n")
        v2(tmp_path / V2, 8 * MB, used=5 * MB, cached=2 * MB)
        assert available_bytes(tmp_path) == 5 * MB
        assert total_bytes(tmp_path) == 8 * MB


def test_version_1(tmp_path: Path) -> None:
    member_of(tmp_path, "9:name=systemd:/a\n5:cpu,memory:/docker/1\n0::/b\n")
    v1(tmp_path / V1 / "docker/1", 8 * MB, used=5 * MB, cached=1 * MB)
    v1(tmp_path / V1 / "other", 1 * MB, used=1 * MB)
    assert available_bytes(tmp_path) == 4 * MB
    assert total_bytes(tmp_path) == 8 * MB


def test_the_tightest_of_the_groups_counts(tmp_path: Path) -> None:
    member_of(tmp_path, "0::/slice/scope\n")
    v2(tmp_path / V2 / "slice", 9 * MB, used=6 * MB)
    v2(tmp_path / V2 / "slice/scope", 8 * MB, used=1 * MB)
    assert available_bytes(tmp_path) == 3 * MB
    v2(tmp_path / V2 / "slice/scope", "max", used=1 * MB, high=2 * MB)
    assert available_bytes(tmp_path) == 1 * MB
    assert total_bytes(tmp_path) == 2 * MB


def test_nothing_is_left(tmp_path: Path) -> None:
    v2(tmp_path / V2, 4 * MB, used=5 * MB)
    assert available_bytes(tmp_path) == 0


def test_what_the_kernel_may_not_promise_is_not_taken(tmp_path: Path) -> None:
    """Otherwise whoever touches it is killed."""
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:       16384 kB\nCommitLimit:     8192 kB\nCommitted_AS:    3072 kB\nHugePages_Total:       0\n"
    )
    for mode in ("0", "1"):
        (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
        assert_unbounded(tmp_path)
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text("2\n")
    assert available_bytes(tmp_path) == 5 << 20
    v2(tmp_path / V2, 8 * MB, used=4 * MB)
    assert available_bytes(tmp_path) == 4 * MB


@pytest.mark.parametrize(("free", "fits"), [(-1, False), (0, True)])
def test_a_prefetcher_takes_no_more(free: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`free`: bytes beyond what is asked for."""
    asked = hello(on_file=False)
    monkeypatch.setattr("sglang_hcache.prefetch.spaces.available_bytes", lambda: asked.host_bytes + free)
    jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
    spaces = Spaces([], None, None, later=jobs.put, progressed=lambda *_: None)
    opened: list[Space | str] = []
    spaces.open(asked, opened.append)
    while not opened:
        jobs.get(timeout=PATIENCE_S)()
    spaces.close_all()
    assert [isinstance(one, Space) for one in opened] == [fits]
    assert fits or str(opened[0]).endswith(f"asked for, and {asked.host_bytes - 1} are free")
