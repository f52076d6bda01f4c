"""Servers and reference answers that tests share. One server runs at a time: an idle one takes a core, too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from bench.harness import Answer, ModelSpec, Server, make_model
from tests.e2e.scenarios import LLAMA, SCENARIOS, SERVER_ARGS

AnyServer = TypeVar("AnyServer", bound=Server)


@dataclass(frozen=True)
class Workshop:
    """Makes models and servers in one folder."""

    folder: Path

    def model(self, spec: ModelSpec) -> Path:
        return make_model(self.folder / "models" / spec.digest(0)[:16], spec)

    def log(self, name: str) -> Path:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        return logs / f"{len(list(logs.iterdir())):02}-{name}.log"

    def stock(self, spec: ModelSpec = LLAMA, args: Sequence[str] = SERVER_ARGS, **options: Any) -> Server:
        """A server without the tier."""
        return Server(self.model(spec), args, log=self.log("stock"), **options)

    def tiered(
        self,
        store: Path,
        spec: ModelSpec = LLAMA,
        args: Sequence[str] = SERVER_ARGS,
        server_class: type[AnyServer] = Server,  # type: ignore[assignment]  # a default for a type variable
        **options: Any,
    ) -> AnyServer:
        """A server with the tier, its files in `store`."""
        tier = ("--hicache-backend", "hcache", "--hcache-dir", str(store))
        return server_class(self.model(spec), (*args, *tier), log=self.log("tiered"), **options)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("e2e"))


@pytest.fixture(scope="session")
def reference_log(workshop: Workshop, reference: dict[str, list[Answer]]) -> str:
    """The log of the server without the tier."""
    return next((workshop.folder / "logs").glob("*-stock.log")).read_text(errors="replace")


@pytest.fixture(scope="session")
def reference(workshop: Workshop) -> dict[str, list[Answer]]:
    """The answers of a server without the tier to every scenario."""
    with workshop.stock() as server:
        return {name: scenario(server) for name, scenario in SCENARIOS.items()}


@pytest.fixture
def fresh_store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def copy_of() -> Callable[[Path, Path], Path]:
    def copy(source: Path, target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(source, target))

    return copy


def tier_state(server: Server, rank: int = 0) -> dict[str, Any]:
    """The tier's own account of itself, from `/server_info`."""
    state: dict[str, Any] = server.server_info()["internal_states"][rank]["hcache"]
    return state
