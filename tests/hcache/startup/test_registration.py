"""Whose pages a server says its pages are: under which fingerprint, and whether they go to files."""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any
from unittest.mock import Mock

import pytest
import sglang
import torch
import transformers
from sglang.srt.runtime_context import derive_attention_ranks

from sglang_hcache import ranks
from sglang_hcache.config import HCacheConfig
from sglang_hcache.model import Pools
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from sglang_hcache.startup import registration
from sglang_hcache.startup.registration import Registration, warn_of_limits_that_do_not_hold
from sglang_hcache.startup.representation import Formats, LayerFormat, Stored
from tests.hcache.conftest import until
from tests.prefetch.clients import PATIENCE_S, hello

Say = Callable[..., Hello]

MODEL = {"load_format": "auto", "weight_cache_mode": "off", "revision": None, "download_dir": None}
SPECULATION: dict[str, object] = {
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_revision": None,
    "speculative_draft_load_format": None,
    "speculative_draft_model_quantization": None,
    "speculative_draft_kv_cache_dtype": None,
}
SERVER = {
    "quantization_param_path": None,
    "json_model_override_args": "{}",
    "modelopt_quant": None,
    "enable_tf32_matmul": None,
    "enable_deterministic_inference": False,
    "rl_on_policy_target": None,
    "enable_precise_embedding_interpolation": False,
    "flashinfer_mxfp4_moe_precision": "default",
    "enable_w4a4_mxfp4_megamoe": False,
    "speculative_enable_w4a4_mxfp4_megamoe": None,
    "deepep_dispatcher_output_dtype": "auto",
    "flashinfer_a2a_dispatch_type": None,
    "fp8_gemm_runner_backend": "auto",
    "fp4_gemm_runner_backend": "auto",
    "moe_runner_backend": "auto",
    "moe_a2a_backend": "none",
    "model_loader_extra_config": "{}",
    "kt_weight_path": None,
    "modelopt_checkpoint_restore_path": None,
    "rl_quant_profile": None,
    "forward_hooks": None,
    "decrypted_config_file": None,
    "decrypted_draft_config_file": None,
}


def placed(
    rank: int = 0, size: int = 1, *, groups: int = 1, nodes: int = 1, replica: int = 0, replicas: int = 1
) -> Any:
    """A rank's place, as SGLang derives it; `groups` of ranks have an attention of their own each."""
    attn_tp_size = size // groups
    attn_tp_rank, attn_dp_rank = derive_attention_ranks(tp_rank=rank, attn_tp_size=attn_tp_size, attn_cp_size=1)
    return SimpleNamespace(
        tp_rank=rank,
        tp_size=size,
        attn_tp_rank=attn_tp_rank,
        attn_tp_size=attn_tp_size,
        nnodes=nodes,
        dp_size=replicas,
        dp_rank=replica if replicas > 1 else attn_dp_rank if groups > 1 else None,
    )


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

    parallel = placed()
    parallel.tp_group = SimpleNamespace(all_gather_object=gather)
    monkeypatch.setattr(ranks, "get_parallel", lambda: parallel)
    monkeypatch.setattr(registration, "get_parallel", lambda: parallel)
    monkeypatch.setattr(registration, "get_schedule", lambda: SimpleNamespace(max_running_requests=8))
    pool: Any = SimpleNamespace(dtype=torch.float32, layer_num=2, size=32)

    def said(
        model: Path | str,
        *,
        size: int = 1,
        ratio: float = 2.0,
        fraction: float | None = None,
        remote: str | None = None,
        latent: bool = False,
        draft: Path | None = None,
        draft_dtype: torch.dtype = torch.bfloat16,
        encoder: Path | str | None = None,
        place: SimpleNamespace | None = None,
        **arguments: object,
    ) -> Hello:
        memory = SimpleNamespace(
            hicache_size=size,
            hicache_ratio=ratio,
            hicache_host_memory_fraction=fraction,
            hicache_write_policy="write_through",
        )
        vars(parallel).update(vars(place or placed()))
        draft_pool: Any = SimpleNamespace(dtype=draft_dtype)
        kv = LayerFormat(25, torch.uint8, Mock(), "copy")
        groups: Any = [SimpleNamespace(numbers=(0, 1), row_bytes=25, windowed=False, draft=False)]
        if draft:
            groups.append(SimpleNamespace(numbers=(2,), row_bytes=25, windowed=False, draft=True))
        formats = Formats(None, "", kv, 64, kv_same_on_all_ranks=latent, groups=groups)
        stored = Stored(Layout(0, 0, 2), formats, "")
        spec = {**SPECULATION, "speculative_draft_model_path": str(draft), **arguments}
        monkeypatch.setattr(registration, "get_spec", lambda: SimpleNamespace(**spec))
        monkeypatch.setattr(registration, "get_memory", lambda: memory)
        monkeypatch.setattr(registration, "get_model", lambda: SimpleNamespace(**{**MODEL, **arguments}))
        return Registration(
            HCacheConfig((str(tmp_path),), prefetcher=remote),
            SimpleNamespace(**{**SERVER, **arguments}),
            SimpleNamespace(
                model_path=str(model),
                dtype=torch.float32,
                quantization=arguments.get("quantization"),
                hf_config=SimpleNamespace(mm_vision_tower=encoder),
                **{name: arguments.get(name, "auto") for name in ("model_config_parser", "model_impl")},
            ),
            Pools(pool, (draft_pool,) if draft else (), page_tokens=8),
            stored,
            rows_of_a_forward=64,
        ).hello()

    return said


def test_the_same_server_finds_its_pages_again(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    before, after = say(model), say(model)
    assert before.fingerprint == after.fingerprint
    assert before.on_file
    checkpoint(tmp_path / "model", b"others!")
    assert say(model).fingerprint != before.fingerprint


def test_a_draft_model_that_is_trained_again_has_no_pages(say: Say, tmp_path: Path) -> None:
    model, draft = checkpoint(tmp_path / "model", b"weights"), checkpoint(tmp_path / "draft", b"drafts")
    alone, before = say(model), say(model, draft=draft)
    assert say(model, draft=draft).fingerprint == before.fingerprint
    assert before.on_file
    assert say(model, draft=draft, speculative_draft_load_format="safetensors").on_file
    for elsewhere in ("dummy", "presharded"):
        assert not say(model, draft=draft, speculative_draft_load_format=elsewhere).on_file
    others = [
        say(model, draft=draft, speculative_draft_kv_cache_dtype="fp8_e5m2"),
        say(model, draft=draft, speculative_draft_load_format="safetensors"),
        say(model, draft=draft, draft_dtype=torch.float16),  # as many bytes, but other values
    ]
    checkpoint(draft, b"trained")
    others += [alone, before, say(model, draft=draft)]
    assert len({one.fingerprint for one in others}) == len(others)


def test_an_encoder_of_images_that_is_trained_again_has_no_pages(say: Say, tmp_path: Path) -> None:
    """Be it a checkpoint of its own or, by a relative path, a folder of the model's."""
    model = checkpoint(tmp_path / "model", b"weights")
    elsewhere, inside = checkpoint(tmp_path / "clip", b"first"), checkpoint(model / "vit", b"first")
    for encoder, named in ((elsewhere, elsewhere), (inside, "./vit")):
        first = say(model, encoder=named)
        assert first.on_file
        assert say(model, encoder=named).fingerprint == first.fingerprint
        checkpoint(encoder, b"again")
        again = say(model, encoder=named)
        assert again.on_file
        assert again.fingerprint != first.fingerprint
    assert not say(model, encoder="nobody/never-fetched").on_file


def test_pages_of_the_same_weights_that_are_computed_with_in_another_way(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    ways: list[dict[str, object]] = [
        {},
        {"modelopt_quant": "fp8"},
        {"enable_tf32_matmul": True},
        {"enable_deterministic_inference": True},
        {"rl_on_policy_target": "fsdp"},
        {"enable_precise_embedding_interpolation": True},
        {"flashinfer_mxfp4_moe_precision": "bf16"},
        {"enable_w4a4_mxfp4_megamoe": True},
        {"speculative_enable_w4a4_mxfp4_megamoe": True},
        {"deepep_dispatcher_output_dtype": "fp8"},
        {"flashinfer_a2a_dispatch_type": "nvfp4"},
        {"load_format": "pt"},
        {"model_config_parser": "mistral"},
        {"model_impl": "transformers"},
        {"quantization": "modelopt_fp4"},
        {"quantization": "modelopt_fp4", "fp4_gemm_runner_backend": "marlin"},
        {"quantization": "modelopt_fp4", "moe_runner_backend": "marlin"},
    ]
    assert len({say(model, **way).fingerprint for way in ways}) == len(ways)
    plain = say(model).fingerprint
    assert say(model, moe_runner_backend="triton").fingerprint == plain, "of weights that are not quantised"
    assert say(model, model_loader_extra_config='{"num_threads": 8}').fingerprint == plain


def test_quantised_weights_are_computed_with_as_the_gpu_can(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = checkpoint(tmp_path / "model", b"weights"), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda now=capability: now)
        found[capability] = [say(model, quantization=name).fingerprint for name in (None, "modelopt_fp4")]
    plain, quantised = zip(*found.values(), strict=True)
    assert plain[0] == plain[1]
    assert quantised[0] != quantised[1]


@pytest.mark.parametrize("package", [sglang, transformers])
def test_another_version_of_the_models_code_has_no_pages(
    package: ModuleType, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    before = say(model).fingerprint
    monkeypatch.setattr(package, "__version__", "99.0")
    assert say(model).fingerprint != before


def test_a_configuration_that_a_variable_names_is_known_by_what_it_says(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, named = checkpoint(tmp_path / "model", b"weights"), tmp_path / "quant.json"
    monkeypatch.setenv("SGLANG_HUMMING_INPUT_QUANT_CONFIG", str(named))
    named.write_text('{"dtype": "fp8"}')
    before = say(model).fingerprint
    assert say(model).fingerprint == before
    named.write_text('{"dtype": "bf16"}')
    assert say(model).fingerprint != before
    monkeypatch.setenv("SGLANG_HUMMING_INPUT_QUANT_CONFIG", '{"dtype": "bf16"}' + " " * 5000)
    assert say(model).on_file, "what is too long for a name is none"


def test_code_of_models_in_a_package_of_its_own_is_known_by_what_it_says(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, package = checkpoint(tmp_path / "model", b"weights"), tmp_path / "our_models"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "rope.py").write_text("BASE = 10_000\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "our_models")
    before = say(model).fingerprint
    assert say(model).fingerprint == before
    (package / "inner" / "rope.py").write_text("BASE = 50_000\n")
    assert say(model).fingerprint != before


def test_by_its_name_a_model_is_read_in_another_way(say: Say, tmp_path: Path) -> None:
    """SGLang's `auto` goes by the name, and rotates K otherwise."""
    paths = [checkpoint(tmp_path / name, b"weights") for name in ("copy", "Mistral-Large-3", "other-copy")]
    plain, mistral, again = (say(path).fingerprint for path in paths)
    assert plain == again != mistral
    assert say(paths[0], model_config_parser="mistral").fingerprint == mistral


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_FP8_IGNORED_LAYERS",
        "SGLANG_FP4_IGNORED_LAYERS",
        "SGLANG_DEEPEP_BF16_DISPATCH",
        "SGLANG_NIXL_EP_BF16_DISPATCH",
        "SGLANG_HUMMING_USE_F16_ACCUM",
        "SGLANG_HUMMING_INPUT_QUANT_CONFIG",
        "SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16",
        "SGLANG_FORCE_FP8_MARLIN",
        "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR",
        "SGLANG_SIMULATE_UNIFORM_EXPERTS",
        "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS",
        "SGLANG_MORI_DISPATCH_DTYPE",
        "USE_TRITON_W8A8_FP8_KERNEL",
    ],
)
def test_the_environment_decides_how_it_is_computed(
    name: str, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    before = say(model).fingerprint
    monkeypatch.setenv(name, "lm_head")
    assert say(model).fingerprint != before
    monkeypatch.delenv(name)
    monkeypatch.setenv("SGLANG_LOG_REQUEST_HEADERS", "x-request-id")
    monkeypatch.setenv("OTHERS_FP8_KERNEL", "1")
    assert say(model).fingerprint == before


@pytest.mark.parametrize(
    "what",
    [
        "no weights",
        "dummy weights",
        "weights of another server",
        "weights of another process",
        "a dump of former weights",
        "a configuration of another name",
        "weights of experts elsewhere",
        "weights of files that a pattern names",
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
    elif what == "dummy weights":
        arguments = {"load_format": "dummy"}
    elif what == "weights of another server":
        arguments = {"load_format": "remote_instance"}
    elif what == "weights of another process":
        arguments = {"weight_cache_mode": "client"}
    elif what == "a dump of former weights":
        arguments = {"load_format": "presharded"}
    elif what == "a configuration of another name":
        arguments = {"decrypted_config_file": "plain.json"}
    elif what == "weights of experts elsewhere":
        arguments = {"kt_weight_path": str(tmp_path)}
    elif what == "weights of files that a pattern names":
        arguments = {"model_loader_extra_config": '{"pattern": "v1-rank-{rank}.safetensors"}'}
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
        hellos = [say(model, latent=latent, place=placed(rank, 2)) for rank in range(2)]
        assert len({hello.fingerprint for hello in hellos}) == names
        assert hellos[0].host_bytes == share * 10**9


def test_only_a_rank_that_saves_asks_for_slots(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    for latent, grants in ((False, [24, 24]), (True, [24, 0])):
        hellos = [say(model, latent=latent, place=placed(rank, 2)) for rank in range(2)]
        assert [hello.grant for hello in hellos] == grants


@pytest.mark.parametrize("latent", [False, True])
def test_replicas_share_pages(latent: bool, say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    for size in (0, 1):
        places = [placed(rank, 2, replica=replica, replicas=3) for rank in range(2) for replica in range(3)]
        hellos = [say(model, size=size, fraction=0.6, latent=latent, place=place) for place in places]
        names = {hello.fingerprint for hello in hellos}
        assert len(names) == (1 if latent else 2)
        of_one_rank, share = (10**9, 0.0) if size else (4000, 0.1)
        assert {hello.host_bytes for hello in hellos} == {6 // len(names) * of_one_rank}
        assert hellos[0].host_share == pytest.approx(6 // len(names) * share)
    assert [hello.name for hello in hellos] == [f"model replica {i % 3} rank {i // 3}" for i in range(6)]


def test_replicas_whose_weights_are_not_known_keep_to_themselves(say: Say, tmp_path: Path) -> None:
    hellos = [
        say(tmp_path, latent=True, load_format="dummy", place=placed(rank, 2, replica=replica, replicas=2))
        for replica in range(2)
        for rank in range(2)
    ]
    names = [hello.fingerprint for hello in hellos]
    assert names[0] == names[1] != names[2] == names[3]
    assert {hello.host_bytes for hello in hellos} == {2 * 10**9}


def test_ranks_with_an_attention_of_their_own_share_pages(say: Say, tmp_path: Path) -> None:
    """With others, and with a server that has as many ranks as each of their groups."""
    model = checkpoint(tmp_path / "model", b"weights")
    by_itself = say(model)
    hellos = [say(model, place=placed(rank, 2, groups=2)) for rank in range(2)]
    assert {hello.fingerprint for hello in hellos} == {by_itself.fingerprint}
    assert hellos[0].host_bytes == 2 * by_itself.host_bytes
    halves = [say(model, place=placed(rank, 4, groups=2)) for rank in (0, 1, 0, 3)]
    assert halves[0].fingerprint != halves[1].fingerprint == halves[3].fingerprint
    assert halves[0].host_bytes == 2 * by_itself.host_bytes


def test_with_a_remote_prefetcher_a_rank_asks_for_no_others_memory(say: Say, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", b"weights")
    hellos = [say(model, latent=True, remote="tcp://there:1", place=placed(rank, 2)) for rank in range(2)]
    assert {hello.host_bytes for hello in hellos} == {10**9}


@pytest.mark.parametrize(
    ("size", "groups", "nodes", "first"),
    [
        (1, 1, 1, [0]),
        (4, 1, 1, [0]),
        (4, 4, 1, [0, 1, 2, 3]),
        (4, 2, 1, [0, 2]),
        (8, 1, 2, [0, 4]),
        (12, 3, 2, [0, 4, 6, 8]),
    ],
)
def test_one_rank_of_a_node_saves_what_several_compute(
    size: int, groups: int, nodes: int, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_first(rank: int) -> bool:
        monkeypatch.setattr(ranks, "get_parallel", lambda: placed(rank, size, groups=groups, nodes=nodes))
        return ranks.first_of_its_requests()

    assert [rank for rank in range(size) if is_first(rank)] == first


def test_replicas_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "get_parallel", placed)
    inside, leave, waits = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def lock(file: IO[str], operation: int) -> None:
        try:
            flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            waits.set()
            flock(file, operation)

    def first() -> None:
        with ranks.taking_turns(tmp_path / "calibration"):
            inside.set()
            leave.wait(PATIENCE_S)
            order.append("first")

    def second() -> None:
        with ranks.taking_turns(tmp_path / "calibration"):
            order.append("second")

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(PATIENCE_S)
    threads[1].start()
    until(lambda: waits.is_set() or order)
    leave.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == ["first", "second"]


def test_a_server_that_hangs_in_its_turn_keeps_no_other_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ranks, "get_parallel", placed)
    monkeypatch.setattr(ranks, "SAID_S", 0.1)
    monkeypatch.setattr(ranks, "TURN_S", 0.2)
    caplog.set_level(logging.INFO, "sglang_hcache")
    with ranks.taking_turns(tmp_path / "calibration"):
        assert not caplog.records
        with ranks.taking_turns(tmp_path / "calibration"):
            waited, gave_up = (record.message for record in caplog.records)
    assert "waiting for another server" in waited
    assert "cannot be locked (another process has kept a lock" in gave_up


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


def test_host_memory_by_ratio_counts_the_draft_models_pool(say: Say, tmp_path: Path) -> None:
    model, draft = checkpoint(tmp_path / "model", b"weights"), checkpoint(tmp_path / "draft", b"drafts")
    assert asked(say(model, size=0, fraction=0.8, draft=draft)) == (6000, 0.8), "one layer beside two"


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
        place = placed(rank, 8, nodes=2)
        place.tp_group = group
        monkeypatch.setattr(ranks, "get_parallel", lambda: place)
        return ranks.of_nodes_first_rank(make)

    made: list[int] = []
    assert [ask(rank, made) for rank in range(8)] == ["of rank 0"] * 4 + ["of rank 4"] * 4
    assert made == [0, 4]


def test_limits_that_lose_to_those_of_a_running_prefetcher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one, that another server has started with a read limit and no bound of the directory."""
    mine = HCacheConfig((str(tmp_path),), directory_bytes=5 * 10**9, read_bytes_per_s=3e9)
    supervisor = LocalSupervisor(mine.directories, None, hello, read_bytes_per_s=2e9)
    store = supervisor.open()
    try:
        welcome = store.connection.welcome
        warn_of_limits_that_do_not_hold(mine, welcome)
        size, rate = (record.getMessage() for record in caplog.records)
        assert size.startswith("hcache: --hcache-dir-size 5 is not in force")
        assert size.endswith("with the default")
        assert rate.startswith("hcache: --hcache-read-limit 3 is not in force")
        assert rate.endswith("with 2")
        caplog.clear()
        warn_of_limits_that_do_not_hold(replace(mine, directory_bytes=None, read_bytes_per_s=2e9), welcome)
        warn_of_limits_that_do_not_hold(HCacheConfig(mine.directories), welcome)
        assert not caplog.records
    finally:
        store.close()
        supervisor.close()
