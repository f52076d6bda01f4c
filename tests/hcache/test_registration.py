"""Whose pages a server says its pages are: under which fingerprint, and whether they go to files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_hcache import ranks, registration
from sglang_hcache.config import HCacheConfig
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from sglang_hcache.registration import Registration, warn_of_limits_that_do_not_hold
from sglang_hcache.representation import Formats, Stored
from tests.prefetch.clients import hello

Say = Callable[..., Hello]

MODEL = {"load_format": "auto", "revision": None, "download_dir": None}
LORA: dict[str, object] = {"enable_lora": None, "lora_paths": []}
SERVER = {
    "quantization_param_path": None,
    "json_model_override_args": "{}",
    "nnodes": 1,
    "modelopt_quant": None,
    "enable_tf32_matmul": None,
    "enable_deterministic_inference": False,
    "rl_on_policy_target": None,
    "kt_weight_path": None,
    "modelopt_checkpoint_restore_path": None,
    "rl_quant_profile": None,
    "forward_hooks": None,
}


def checkpoint(folder: Path, weights: bytes, configuration: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / configuration).write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(model, …)`: the hello of a server with one rank, a pool of 2,000 bytes and these arguments."""
    of_first: list[object] = []  # what rank 0 has gathered, for rank 1 after it

    def gather(value: object) -> list[object]:
        if parallel.tp_rank == 0:
            of_first.append(value)
            return [value, value]
        return [of_first.pop(0), value]

    parallel = SimpleNamespace(tp_rank=0, tp_size=1, tp_group=SimpleNamespace(all_gather_object=gather))
    monkeypatch.setattr(ranks, "get_parallel", lambda: parallel)
    monkeypatch.setattr(registration, "get_parallel", lambda: parallel)
    monkeypatch.setattr(registration, "get_schedule", lambda: SimpleNamespace(max_running_requests=8))
    halves = [torch.empty(500, dtype=torch.uint8)] * 2
    pool: Any = SimpleNamespace(dtype=torch.float32, layer_num=2, k_buffer=halves, v_buffer=halves)

    def said(
        model: Path | str,
        *,
        size: int = 1,
        ratio: float = 2.0,
        fraction: float | None = None,
        remote: str | None = None,
        rank: int = 0,
        ranks_in_all: int = 1,
        latent: bool = False,
        **arguments: object,
    ) -> Hello:
        memory = SimpleNamespace(
            hicache_size=size,
            hicache_ratio=ratio,
            hicache_host_memory_fraction=fraction,
            hicache_write_policy="write_through",
        )
        parallel.tp_rank, parallel.tp_size = rank, ranks_in_all
        kv: Any = SimpleNamespace(row_bytes=64, projector_name="copy")
        stored = Stored(Layout(0, 0, 2), Formats(None, "", kv, 64, kv_same_on_all_ranks=latent), "")
        monkeypatch.setattr(registration, "get_memory", lambda: memory)
        monkeypatch.setattr(registration, "get_model", lambda: SimpleNamespace(**{**MODEL, **arguments}))
        monkeypatch.setattr(registration, "get_lora", lambda: SimpleNamespace(**{**LORA, **arguments}))
        return Registration(
            HCacheConfig((str(tmp_path),), prefetcher=remote),
            SimpleNamespace(**{**SERVER, **arguments}),
            SimpleNamespace(model_path=str(model), dtype=torch.float32, quantization=None),
            pool,
            stored,
            page_tokens=64,
            rows_of_a_forward=512,
        ).hello()

    return said


def test_the_same_server_finds_its_pages_again(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    before, after = say(model), say(model)
    assert before.fingerprint == after.fingerprint
    assert before.on_file
    checkpoint(tmp_path / "model", b"others!")
    assert say(model).fingerprint != before.fingerprint


def served(*paths: Path) -> dict[str, object]:
    """The arguments of a server with these adapters, as SGLang leaves them: an id by name and path."""
    return {
        "enable_lora": True,
        "lora_paths": [SimpleNamespace(lora_id=path.name, lora_path=str(path)) for path in paths],
    }


def test_an_adapter_that_is_trained_again_has_no_pages(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    one = checkpoint(tmp_path / "one", b"adapter", "adapter_config.json")
    two = checkpoint(tmp_path / "two", b"another", "adapter_config.json")
    before = say(model, **served(one, two))
    assert say(model, **served(one, two)).fingerprint == before.fingerprint
    assert before.on_file

    checkpoint(one, b"changed", "adapter_config.json")
    retrained = say(model, **served(one, two)).fingerprint
    checkpoint(one, b"adapter", "adapter_config.json")
    assert say(model, **served(one, two)).fingerprint == before.fingerprint
    (one / "adapter_config.json").write_text('{"lora_alpha": 32}')
    scaled = say(model, **served(one, two)).fingerprint
    fingerprints = {before.fingerprint, retrained, scaled, say(model, **served(two)).fingerprint}
    assert len(fingerprints) == 4


def test_a_lora_server_without_adapters_at_start_keeps_its_pages(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    assert say(model, **served()).on_file
    assert say(model, **served()).fingerprint == say(model, **served()).fingerprint


def test_pages_of_the_same_weights_that_are_computed_with_in_another_way(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    ways: list[dict[str, object]] = [
        {},
        {"modelopt_quant": "fp8"},
        {"enable_tf32_matmul": True},
        {"enable_deterministic_inference": True},
        {"rl_on_policy_target": "fsdp"},
    ]
    assert len({say(model, **way).fingerprint for way in ways}) == len(ways)


@pytest.mark.parametrize(
    "what",
    [
        "no weights",
        "no adapter",
        "dummy weights",
        "weights of another server",
        "weights of experts elsewhere",
        "an id that was never fetched",
    ],
)
def test_what_cannot_be_identified_goes_to_no_file(
    what: str, say: Say, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model: Path | str = checkpoint(tmp_path / "model", b"weights")
    arguments: dict[str, object] = {}
    if what == "no weights":
        model = tmp_path
    elif what == "no adapter":
        arguments = served(tmp_path / "nowhere")
    elif what == "dummy weights":
        arguments = {"load_format": "dummy"}
    elif what == "weights of another server":
        arguments = {"load_format": "remote_instance"}
    elif what == "weights of experts elsewhere":
        arguments = {"kt_weight_path": str(tmp_path)}
    else:
        model = "nobody/never-fetched"
    with caplog.at_level(logging.WARNING):
        first, second = say(model, **arguments), say(model, **arguments)
    assert not first.on_file
    assert first.fingerprint != second.fingerprint
    assert [record.message.count("pages are kept in host memory only") for record in caplog.records] == [1, 1]


def test_ranks_share_the_pages_of_a_latent(say: Say, tmp_path: Path) -> None:
    """K and V are of each rank's own heads; and memory that is shared is asked for once for all."""
    model = checkpoint(tmp_path / "model", b"weights")
    for latent, names, share in ((False, 2, 1), (True, 1, 2)):
        hellos = [say(model, rank=rank, ranks_in_all=2, latent=latent) for rank in range(2)]
        assert len({hello.fingerprint for hello in hellos}) == names
        assert hellos[0].host_bytes == share * 10**9


def asked(hello: Hello) -> tuple[int, float]:
    return hello.host_bytes, hello.host_share


def test_host_memory_by_ratio_fits_the_container(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    monkeypatch.setattr(registration, "total_bytes", lambda: 3000)
    assert asked(say(model, size=0, fraction=0.8)) == (4000, 0.8), "the prefetcher reduces the default ratio"
    assert asked(say(model, size=0, fraction=0.8, ratio=1.0)) == (2000, 0.8)
    assert asked(say(model, size=0, ratio=1.4)) == (2800, 0), "whatever a former server's still holds"
    with pytest.raises(RuntimeError, match=r"--hicache-ratio 1\.6 does not fit"):
        say(model, size=0, ratio=1.6)


def test_with_a_remote_prefetcher_memory_is_the_servers_own(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    monkeypatch.setattr(registration, "available_bytes", lambda: 3000)
    assert asked(say(model, size=0, fraction=0.8, remote="tcp://there:1")) == (2400, 0)


def test_ranks_of_a_node_read_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of eight ranks on two nodes in turn, gathering what all of them would have made."""

    def ask(rank: int, made: list[int]) -> str | None:
        def make() -> str:
            made.append(rank)
            return f"of rank {rank}"

        def gather(value: object) -> list[object]:
            return [f"of rank {other}" if other % 4 == 0 else None for other in range(8)]

        group = SimpleNamespace(all_gather_object=gather)
        monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_rank=rank, tp_size=8, tp_group=group))
        return ranks.of_nodes_first_rank(make, 4)

    made: list[int] = []
    assert [ask(rank, made) for rank in range(8)] == ["of rank 0"] * 4 + ["of rank 4"] * 4
    assert made == [0, 4]


def test_limits_that_lose_to_those_of_a_running_prefetcher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one, that another server has started with a read limit and no bound of the directory."""
    mine = HCacheConfig((str(tmp_path),), directory_bytes=5 * 10**9, read_bytes_per_s=3e9)
    supervisor = LocalSupervisor(mine.directories, None, hello, read_bytes_per_s=2e9)
    store = supervisor.open()
    try:
        warn_of_limits_that_do_not_hold(mine, store.welcome)
        size, rate = (record.getMessage() for record in caplog.records)
        assert size.startswith("hcache: --hcache-dir-size 5 is not in force")
        assert size.endswith("with the default")
        assert rate.startswith("hcache: --hcache-read-limit 3 is not in force")
        assert rate.endswith("with 2")
        caplog.clear()
        warn_of_limits_that_do_not_hold(replace(mine, directory_bytes=None, read_bytes_per_s=2e9), store.welcome)
        warn_of_limits_that_do_not_hold(HCacheConfig(mine.directories), store.welcome)
        assert not caplog.records
    finally:
        store.close()
        supervisor.close()
