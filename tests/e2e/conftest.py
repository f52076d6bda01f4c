"""Servers and reference answers that tests share."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from bench.harness import (
    Answer,
    Launcher,
    ModelSpec,
    Request,
    Server,
    launch,
    make_model,
    on_accelerator,
    random_prompt,
)
from sglang_hcache.cli.inspect import inspect
from tests.e2e.preloaded import NOT_READ_AT_IMPORT, Preloaded
from tests.e2e.scenarios import LLAMA, PREFIX_TOKENS, SCENARIOS, SERVER_ARGS, TIER, tail_logprobs, wait_until

# Servers run side by side: threads that wait for each other at every operation are many times slower on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# For a server that waits for its prefetcher's answers, however slow the machine is.
PATIENT = {"PYTHONPATH": str(Path(__file__).parent / "patient")}

AnyServer = TypeVar("AnyServer", bound=Server)
Told = TypeVar("Told")
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Workshop:
    """Makes models and servers in one folder."""

    folder: Path

    def model(self, spec: ModelSpec) -> Path:
        return make_model(self.folder / "models" / spec.digest(0)[:16], spec)

    def log(self, name: str) -> Path:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{len(list(logs.iterdir())):02}-{name}.log"
        log.touch()  # the next one has another number
        return log

    def stock(
        self, spec: ModelSpec = LLAMA, args: Sequence[str] = SERVER_ARGS, *, env: Environment | None = None
    ) -> Server:
        """A server without the tier."""
        return Server(self.model(spec), args, log=self.log("stock"), env=env)

    def tiered(
        self,
        store: Path | str,
        spec: ModelSpec = LLAMA,
        args: Sequence[str] = SERVER_ARGS,
        *,
        env: Environment | None = None,
    ) -> Server:
        """A server with the tier, its files in `store`, or in several with commas between."""
        return self.tiered_by(Server, store, spec, args, env=env)

    def tiered_by(
        self,
        server_class: type[AnyServer],
        store: Path | str,
        spec: ModelSpec = LLAMA,
        args: Sequence[str] = SERVER_ARGS,
        *,
        env: Environment | None = None,
    ) -> AnyServer:
        return server_class(
            self.model(spec), (*TIER, *args, "--hcache-dir", str(store)), log=self.log("tiered"), env=env
        )


@pytest.fixture(scope="session", autouse=True)
def servers_start_sooner() -> Iterator[None]:
    """Their processes are forks of one, where that makes no difference, as it may with a GPU's driver."""
    if on_accelerator():
        yield
        return
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "seldom_collected"), prepend=os.pathsep)
        preloaded = stack.enter_context(Preloaded())

        def launch_sooner(server: Server, log: int) -> Launcher:
            command, usual = server.command(), [sys.executable, "-m", "sglang.launch_server"]
            if command[: len(usual)] == usual and server.env.keys() <= NOT_READ_AT_IMPORT:
                return preloaded.launch(command[len(usual) :], server.environment(), log)
            return launch(server, log)

        patch.setattr(Server, "launch", launch_sooner)
        yield


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("e2e"))


@pytest.fixture(scope="session")
def reference_log(workshop: Workshop, reference: dict[str, list[Answer]]) -> str:
    """The log of a server without the tier."""
    return min((workshop.folder / "logs").glob("*-stock.log")).read_text(errors="replace")


@dataclass(frozen=True)
class Made:
    """By two servers that started together."""

    reference: dict[str, list[Answer]]
    filled_store: Path


@pytest.fixture(scope="session")
def made(workshop: Workshop) -> Made:
    store = workshop.folder / "store-filled"
    with started_together(workshop.stock(), workshop.tiered(store)) as (stock, tiered):
        tiered.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
        tiered.tier_state()  # comes from the prefetcher behind all pages that have been stored
        tiered.stop()
        return Made({name: scenario(stock) for name, scenario in SCENARIOS.items()}, store)


@pytest.fixture(scope="session")
def reference(made: Made) -> dict[str, list[Answer]]:
    """The answers of a server without the tier to every scenario."""
    return made.reference


@pytest.fixture(scope="session")
def filled_store(made: Made) -> Path:
    """To be copied: a server has filled it with the prefix of `evicted_prefix`, and left on SIGTERM."""
    return made.filled_store


@pytest.fixture
def fresh_store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def store_of(server: Server) -> str | None:
    return dict(itertools.pairwise(server.args)).get("--hcache-dir")


@contextmanager
def started_together(*servers: Server) -> Iterator[tuple[Server, ...]]:
    """Servers that start at the same time, most of which is imports, and are killed at the end."""
    with ExitStack() as stack:
        for number, server in reversed([*enumerate(servers)]):
            server.shares_prefetcher = any(store_of(other) == store_of(server) for other in servers[number + 1 :])
            stack.callback(server.kill)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, servers))
        yield servers


def told_by_all(ask: Callable[[Server], Told], *servers: Server) -> list[Told]:
    """What each of the servers, asked at the same time, says."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(ask, servers))


def sent_together(server: Server, requests: Sequence[Request]) -> list[Answer]:
    """Answers to requests that have all come, with their pages in memory, when a scheduler makes a batch of them."""
    with stopped(server.pids("sglang::scheduler")):
        answers = [begin(server, request) for request in requests]
        server.pause()
    if store_of(server):  # what schedulers tell comes behind the requests and the pause
        wait_until(lambda: server.tier_state()["requests_held_now"] == 0, 60)
    server.go_on()
    return [answer() for answer in answers]


def begin(server: Server, request: Request) -> Callable[[], Answer]:
    """What waits for the answer, when the request has come as far as it can without a scheduler."""
    answer = server.begin(request)
    let_it_come(server)
    return answer


def let_it_come(server: Server) -> None:
    """What has been sent to the HTTP server has passed it after some turns of its event loop."""
    for _ in range(5):
        server.model_info()


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """As by Ctrl-Z."""
    assert pids, "there are none"
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def update_weights(server: Server, model: Path) -> None:
    """And wait until there is a store for the new ones; what is asked for before is not kept."""
    server.update_weights(model)
    wait_for_stores(server)


def wait_for_stores(server: Server) -> None:
    """Of the first rank of each replica, with one for the weights that it has now."""
    wait_until(lambda: all(state["prefetcher"] == "ok" for state in server.tier_states()), 30)


def only_on_disk(server: Server) -> None:
    """Wait until everything is written, then empty device and host memory."""
    wait_until(lambda: server.tier_state()["pages_dirty"] == 0, 30)
    server.flush_cache()


def pages_in(store: Path) -> int:
    """On file."""
    return sum(one["pages"] for one in inspect(store)[0]["fingerprints"])


def nothing_is_held(server: Server) -> bool:
    state = server.tier_state()
    return bool(state["pages_leased"] == state["requests_held_now"] == state["pages_reading"] == 0)
