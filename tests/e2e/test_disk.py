"""A disk that is full, and a directory that turns read-only, while the server runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import Answer, Server, random_prompt
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import SCENARIOS, assert_equal

Reference = dict[str, list[Answer]]

DISK_BYTES = 600 << 20
RECOVERY_S = 60.0  # a failed directory is tried again every 30 s, when there is something to write


class ServerOnSmallDisk(Server):
    """A server in a mount namespace of its own, with a small file system at `mount_point`."""

    mount_point = Path()

    def command(self) -> list[str]:
        script = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "{self.mount_point}" && exec "$@"'
        return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *super().command()]

    @property
    def disk(self) -> Path:
        """The small file system as seen from outside."""
        scheduler = self.pids("sglang::scheduler")[0]
        return Path(f"/proc/{scheduler}/root") / self.mount_point.relative_to("/")


class ServerBoundByPermissions(Server):
    """A server that permission bits hold back even when root starts it."""

    def command(self) -> list[str]:
        if os.geteuid() != 0:
            return super().command()
        return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *super().command()]


def wait_until(holds: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(1.0)
    return holds()


def volume_state(server: Server) -> str:
    return str(server.tier_state()["volumes"][0]["state"])


def write_something(server: Server, seeds: Iterator[int]) -> None:
    server.generate(random_prompt(300, seed=next(seeds)), 1)


def assert_survives(server: Server, reference: Reference, harm: Callable[[], None], heal: Callable[[], None]) -> None:
    """The server goes on as long as the harm lasts, says so, and writes again once it is healed."""
    seeds = iter(range(5000, 6000))
    harm()
    assert_equal(SCENARIOS["evicted_prefix"](server), reference["evicted_prefix"])
    assert wait_until(lambda: volume_state(server).startswith("failed"), 10.0), server.tier_state()
    assert server.tier_state()["pages_write_failed"] > 0
    assert server.tier_state()["tokens_restored"] > 1000, "the host tier no longer serves"
    heal()

    def recovered() -> bool:
        write_something(server, seeds)
        written = volume_state(server) == "ok" and server.tier_state()["pages_written"] > 0
        return written and "works again" in server.log_text()

    assert wait_until(recovered, RECOVERY_S), server.tier_state()
    log = server.log_text()
    assert log.count("cannot be used") == 1, "said once, and not again at each try"
    assert server.healthy()


def test_a_disk_that_is_full_and_a_directory_that_turns_read_only(
    workshop: Workshop, reference: Reference, tmp_path: Path
) -> None:
    """Of two servers at the same time: most of it is waiting for the next try."""
    mount_point, store = tmp_path / "disk", tmp_path / "store"
    mount_point.mkdir()
    on_small_disk = workshop.tiered_by(ServerOnSmallDisk, mount_point / "store")
    on_small_disk.mount_point = mount_point
    read_only = workshop.tiered_by(ServerBoundByPermissions, store)
    with started_together(on_small_disk, read_only), ThreadPoolExecutor(2) as pool:
        ballast = on_small_disk.disk / "ballast"

        def fill() -> None:
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, DISK_BYTES - (8 << 20))

        def permit(mode: int) -> None:
            for folder in (store / "segments", *(store / "segments").iterdir(), store / "index", store):
                folder.chmod(mode)

        for survival in (
            pool.submit(assert_survives, on_small_disk, reference, harm=fill, heal=ballast.unlink),
            pool.submit(
                assert_survives, read_only, reference, harm=lambda: permit(0o500), heal=lambda: permit(0o700)
            ),
        ):
            survival.result()
