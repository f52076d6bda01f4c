"""When hidden states are not offered as a way to store a layer, and why."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache import ranks, scheduler_hooks
from sglang_hcache.config import HCacheConfig
from sglang_hcache.model import AttentionSite, Pools
from sglang_hcache.startup import capture_choice, representation, synthetic_forward
from sglang_hcache.startup.representation import Formats, formats_of

PAGE, WIDTH, HEADS, HEAD = 16, 8, 2, 32


class Attention(torch.nn.Module):
    """Cannot be replayed."""

    def __init__(self, rotary: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden_states: torch.Tensor) -> None:
        raise ZeroDivisionError


def formats(
    monkeypatch: pytest.MonkeyPatch, module: torch.nn.Module, *, deterministic: bool = False, first_position: int = 0
) -> tuple[Formats, Any]:
    """Of a model with one layer, whose forward hands rows over, and the capture that takes them."""
    execution = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=deterministic))
    monkeypatch.setattr(representation, "get_exec", lambda: execution, raising=False)
    parallel = SimpleNamespace(tp_rank=0, tp_size=1, attn_tp_size=1)
    for where in (representation, ranks):
        monkeypatch.setattr(where, "get_parallel", lambda: parallel)
    monkeypatch.setattr(representation, "get_lora", lambda: SimpleNamespace(enable_lora=False))
    site = AttentionSite(module, SimpleNamespace(layer_id=0), inspect.signature(module.forward))
    capture: Any = SimpleNamespace(sites=[site], sink=None)

    def prefill(*_: object) -> None:
        positions = torch.arange(first_position, first_position + PAGE)
        capture.sink.write(torch.arange(PAGE, 2 * PAGE), positions, torch.ones(1, PAGE, WIDTH))

    monkeypatch.setattr(synthetic_forward, "prefill_random_prompt", prefill)
    schedule = SimpleNamespace(chunked_prefill_size=4 * PAGE)
    monkeypatch.setattr(synthetic_forward, "get_schedule", lambda: schedule)
    pool = MHATokenToKVPool(4 * PAGE, PAGE, torch.float32, HEADS, HEAD, 1, "cpu", enable_memory_saver=False)
    runner = SimpleNamespace(
        model_config=SimpleNamespace(hidden_size=WIDTH, dtype=torch.float32, model_is_mrope=False, context_len=99),
        max_total_num_tokens=4 * PAGE,
        req_to_token_pool=set(),
        token_to_kv_pool_allocator=SimpleNamespace(size=4 * PAGE, clear=lambda: None),
    )
    return formats_of(runner, capture, Pools(pool, (), PAGE)), capture


def test_a_model_whose_replay_raises_is_served_as_k_and_v(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, capture = formats(monkeypatch, Attention())
    assert found.hidden is None
    assert found.obstacle == "the self-test failed (ZeroDivisionError)"
    assert capture.sink is None
    (record,) = (record for record in caplog.records if "by replay FAILED" in record.message)
    assert record.exc_info is not None, "the log says where"


@pytest.mark.parametrize("deterministic", [False, True])
def test_where_inference_is_deterministic_the_model_projects_by_itself(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As SGLang has resolved it: `--rl-on-policy-target` sets it, too."""
    monkeypatch.setattr(representation, "KernelProjector", lambda *_: SimpleNamespace(name="kernels"))
    with caplog.at_level(logging.INFO):
        formats(monkeypatch, Attention(), deterministic=deterministic)
    tried = {name for name in ("kernels", "replay") if f"by {name} FAILED" in caplog.text}
    assert tried == ({"replay"} if deterministic else {"kernels", "replay"})


GB = 10**9
CAPTURED = 9 * 4 * PAGE // 4 * WIDTH * 4  # bytes: staging and outbox of one layer


@pytest.mark.parametrize(
    ("wanted", "changes", "captured"),
    [
        ("auto", {}, True),
        ("auto", {"lora": True}, False),
        ("auto", {"mrope": True}, False),
        ("auto", {"width": 2 * HEADS * HEAD}, False),
        ("auto", {"width": 2 * HEADS * HEAD, "ranks": 2}, True),
        ("hidden", {"width": 2 * HEADS * HEAD}, True),
        ("hidden", {"opaque": True}, False),
        ("hidden", {"lora": True}, False),
        ("auto", {"algorithm": "EAGLE"}, True),
        ("auto", {"ranks": 2}, True),
        ("auto", {"ranks": 2, "algorithm": "EAGLE"}, False),
        ("auto", {"norm": HEADS * HEAD}, True),
        ("auto", {"ranks": 2, "norm": HEAD}, True),
        ("auto", {"ranks": 2, "norm": HEADS * HEAD}, False),
        ("auto", {"free": 2 * GB + 5 * CAPTURED}, True),
        ("auto", {"free": 2 * GB + 5 * CAPTURED - 1}, False),
        ("hidden", {"free": 2 * GB + 1}, True),
    ],
    ids=str,
)
def test_what_can_never_be_stored_is_not_captured(
    wanted: str, changes: dict[str, Any], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what would leave a small KV pool. `hidden` is refused later, with the reason."""
    monkeypatch.setattr(representation, "get_lora", lambda: SimpleNamespace(enable_lora=changes.get("lora", False)))
    monkeypatch.setattr(
        representation, "get_spec", lambda: SimpleNamespace(speculative_algorithm=changes.get("algorithm"))
    )
    for where in (representation, capture_choice):
        monkeypatch.setattr(where, "get_parallel", lambda: SimpleNamespace(attn_tp_size=changes.get("ranks", 1)))
    if "free" in changes:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (changes["free"], 20 * GB))
        monkeypatch.setattr(capture_choice, "get_schedule", lambda: SimpleNamespace(mem_fraction_static=0.8))
        monkeypatch.setattr(capture_choice, "all_ranks", bool)
    module = Attention()
    if "norm" in changes:
        module.k_norm = torch.nn.LayerNorm(changes["norm"])
    attention: Any = SimpleNamespace(
        layer_id=0, qk_head_dim=HEAD, v_head_dim=HEAD, tp_k_head_num=HEADS, tp_v_head_num=HEADS
    )
    sites = [AttentionSite(module, attention, inspect.signature(module.forward))]
    monkeypatch.setattr(capture_choice, "attention_sites", lambda _model: [] if changes.get("opaque") else sites)
    monkeypatch.setattr(capture_choice, "Capture", Mock())
    monkeypatch.setattr(scheduler_hooks, "most_rows_of_a_forward", lambda: 4 * PAGE)
    for name in ("runner", "capture", "why_not_captured"):
        monkeypatch.setattr(scheduler_hooks, name, None)
    linker = HCacheConfig(("/nowhere",), representation=wanted).to_linker_config()
    width, mrope = changes.get("width", WIDTH), changes.get("mrope", False)
    model = SimpleNamespace(hidden_size=width, dtype=torch.float32, model_is_mrope=mrope)
    runner: Any = SimpleNamespace(
        is_draft_worker=False,
        server_args=SimpleNamespace(unified_cache_external_linker_config=linker),
        model=module,
        model_config=model,
        device="cpu",
        pre_model_load_memory=10 * GB / (1 << 30),  # another process has the other half
    )
    scheduler_hooks.after_load_model(None, runner)
    assert (scheduler_hooks.capture is not None) is captured
    assert (scheduler_hooks.why_not_captured == "") is captured


def test_a_rotation_by_all_tokens_of_a_forward_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are restored in other company than they were computed in."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * (HEAD // 2),
        "long_factor": [1.0 + 0.5 * i for i in range(HEAD // 2)],
        "original_max_position_embeddings": 128,
    }
    rotary = get_rope(HEAD, HEAD, 1024, 10000, True, scaling, dtype=torch.float32)
    positions, keys = torch.arange(256), torch.randn(256, HEADS * HEAD)
    _, together = rotary(positions, keys.clone(), keys.clone())
    _, alone = rotary(positions[:64], keys[:64].clone(), keys[:64].clone())
    assert not torch.allclose(together[:64], alone)
    formats(monkeypatch, Attention())  # sets the scene
    module = Attention(rotary)
    site = AttentionSite(module, SimpleNamespace(layer_id=0), inspect.signature(module.forward))
    runner = SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=False))
    assert "LongRoPE" in str(representation.why_never_hidden(runner, [site]))


@pytest.mark.parametrize("quantised", [False, True])
def test_quantised_projections_are_not_replayed_beside_a_forward(
    quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of Marlin's products of a layer may not run at once, which the self-test does not show."""
    formats(monkeypatch, Attention())  # sets the scene
    linear = ReplicatedLinear(WIDTH, WIDTH)
    if quantised:
        linear.quant_method = Fp8LinearMethod(Fp8Config())
    module = Attention(linear)
    site = AttentionSite(module, SimpleNamespace(layer_id=0), inspect.signature(module.forward))
    runner = SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=False))
    assert ("quantised" in str(representation.why_never_hidden(runner, [site]))) is quantised


def test_positions_that_a_model_shifts_in_place_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma's do that see: those of a CUDA graph are other memory, so the batch's stay what they were."""
    found, _ = formats(monkeypatch, Attention(), first_position=1)
    assert found.hidden is None
    assert "shifts the positions" in found.obstacle
