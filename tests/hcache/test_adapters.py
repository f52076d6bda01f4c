"""LoRA adapters: whose pages a request finds."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

from sglang_hcache import adapters as module
from sglang_hcache import ranks
from sglang_hcache.adapters import Adapters


@pytest.fixture(autouse=True)
def parallel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    parallel = SimpleNamespace(tp_rank=0, tp_size=1, attn_tp_size=1, nnodes=1)
    monkeypatch.setattr(ranks, "get_parallel", lambda: parallel)
    return parallel


def train(folder: Path, weights: bytes, configuration: str = '{"target_modules": ["q_proj"]}') -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(configuration)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def started(tmp_path: Path, *paths: Path) -> tuple[Adapters, list[str]]:
    """A server that has loaded these at its start; their ids."""
    refs = [LoRARef(LoRARef.deterministic_id(path.name, str(path)), path.name, str(path)) for path in paths]
    adapters = Adapters(tmp_path / "memo", None)
    adapters.loaded_at_start(refs)
    return adapters, [ref.lora_id for ref in refs]


def load(adapters: Adapters, path: Path | str, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Its id."""
    lora_id = uuid.uuid4().hex

    def loading() -> str:
        meanwhile()
        return "SGLang's answer"

    request = LoadLoRAAdapterReqInput(lora_name="x", lora_path=str(path), lora_id=lora_id)
    assert adapters.load(loading, request) == "SGLang's answer"
    return lora_id


def key(adapters: Adapters, lora_id: str, extra_key: str = "") -> str:
    req: Any = SimpleNamespace(lora_id=lora_id, extra_key=extra_key + lora_id)  # as SGLang makes it
    adapters.name_by_content(req)
    return str(req.extra_key)


def test_an_adapter_is_known_by_its_content(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", b"first"), train(tmp_path / "two", b"second")
    adapters, ids = started(tmp_path, one, two)
    first, second = (key(adapters, lora_id) for lora_id in ids)
    assert len({first, second, *ids}) == 4

    adapters, (lora_id,) = started(tmp_path, one.rename(tmp_path / "elsewhere"))
    assert key(adapters, lora_id) == first, "after a restart, under another name, without the other one"
    assert key(adapters, load(adapters, two)) == second, "loaded while it serves"
    assert key(adapters, lora_id, "mine") == f"mine{first}"


def test_one_that_is_trained_again_is_another(tmp_path: Path) -> None:
    keys = set()
    some, more = (json.dumps({"target_modules": ["q_proj"], "r": rank}) for rank in (4, 8))
    for weights, configuration in ((b"first", some), (b"again", some), (b"first", more)):
        adapters, (lora_id,) = started(tmp_path, train(tmp_path / "one", weights, configuration))
        keys.add(key(adapters, lora_id))
        assert key(adapters, load(adapters, tmp_path / "one")) in keys
    assert len(keys) == 3


def test_what_cannot_be_identified_is_never_found_again(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    keys = []
    for _ in range(2):
        adapters, (lora_id,) = started(tmp_path, tmp_path / "empty")
        keys += [key(adapters, lora_id), key(adapters, load(adapters, tmp_path / "empty"))]
    assert len({*keys, lora_id}) == 5
    adapters, _ = started(tmp_path)
    assert key(adapters, "0" * 32) == "0" * 32, "as one that came as tensors"


@pytest.mark.parametrize(
    "configuration", ['{"target_modules": "all-linear"}', '{"target_modules": ["q_proj", "all"]}', "{}", "null", "{"]
)
def test_one_that_does_not_list_its_modules_is_never_found_again(configuration: str, tmp_path: Path) -> None:
    """To which it is applied depends on --lora-target-modules, and on the other adapters."""
    for_all = train(tmp_path / "all", b"weights", configuration)
    adapters, (lora_id,) = started(tmp_path, for_all)
    others, (same_id,) = started(tmp_path, for_all)
    assert lora_id == same_id
    assert key(adapters, lora_id) != key(others, lora_id)
    assert key(adapters, loaded := load(adapters, for_all)) == loaded


def test_one_that_is_written_while_it_is_loaded_keeps_its_id(tmp_path: Path) -> None:
    """Nobody knows which of the two SGLang has read."""
    adapters, _ = started(tmp_path)
    folder = train(tmp_path / "one", b"first")
    lora_id = load(adapters, folder, meanwhile=lambda: train(folder, b"again"))
    assert key(adapters, lora_id) == lora_id


def test_one_that_is_fetched_from_a_hub_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hcache.startup.fingerprint.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--adapter" / "snapshots" / "main"

    def fetch() -> None:
        snapshot.mkdir(parents=True)
        train(snapshot, b"first")

    adapters, (same,) = started(tmp_path, train(tmp_path / "one", b"first"))
    assert key(adapters, load(adapters, "some/adapter", meanwhile=fetch)) == key(adapters, same)


def test_ranks_that_have_others_under_its_name_do_not_call_it_by_content(
    tmp_path: Path, parallel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two nodes: with keys of their own, each would find another prefix."""
    folder = train(tmp_path / "one", b"first")
    alike, _ = started(tmp_path, folder)
    content = key(alike, load(alike, folder))
    parallel.tp_size = parallel.attn_tp_size = parallel.nnodes = 2
    for elsewhere, named in ((content, True), ("another", False), (None, False)):
        gather = Mock(side_effect=lambda value, elsewhere=elsewhere: [value, elsewhere])
        parallel.tp_group = SimpleNamespace(all_gather_object=gather)
        adapters = Adapters(tmp_path / "memo", None)
        lora_id = load(adapters, folder)
        assert key(adapters, lora_id) == (content if named else lora_id)
        assert gather.call_count == 4, "on each rank: what its node has, and whether that is the same, twice"


def test_ranks_with_requests_of_their_own_wait_for_nobody(tmp_path: Path, parallel: SimpleNamespace) -> None:
    """With data-parallel attention they may load it in different steps, and a collective would meet another one."""
    folder = train(tmp_path / "one", b"first")
    adapters, (lora_id,) = started(tmp_path, folder)
    parallel.tp_size, parallel.tp_group = 2, Mock(spec=[])
    assert key(adapters, load(adapters, folder)) == key(adapters, lora_id)


def test_a_hub_is_looked_for_where_sglang_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Mock(return_value="content")
    monkeypatch.setattr(module, "adapter_identity", identity)
    Adapters(tmp_path / "memo", "/cache").loaded_at_start([LoRARef("id", "name", "some/adapter")])
    identity.assert_called_once_with("some/adapter", tmp_path / "memo", cache="/cache")
