from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_hcache.model import LayerGroup, Unsupported, check_pool, draft_pools, layer_groups


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (ComponentType.SWA, "NoneType for sliding windows is not supported; add --disable-hybrid-swa-memory"),
        (ComponentType.MAMBA, "holds FULL, MAMBA state"),
    ],
)
def test_a_pool_that_is_not_known_is_refused(component: ComponentType, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        check_pool(None, {ComponentType.FULL, component})


def test_a_pool_whose_rows_lie_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MHATokenToKVPool(64, 16, torch.float32, 2, 4, 1, "cpu", enable_memory_saver=False)
    assert check_pool(pool, {ComponentType.FULL}) is pool
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    pool = MHATokenToKVPool(64, 16, torch.float32, 2, 4, 1, "cpu", enable_memory_saver=False)
    with pytest.raises(Unsupported, match="layout hnd is not supported; unset SGLANG_USE_HND_KVCACHE"):
        check_pool(pool, {ComponentType.FULL})


def with_windows(full_layers: list[int], windowed_layers: list[int]) -> SWAKVPool:
    return SWAKVPool(
        64, 32, 16, torch.float32, 2, 4,
        swa_attention_layer_ids=windowed_layers, full_attention_layer_ids=full_layers, device="cpu",
    )  # fmt: skip


def test_a_pool_of_its_own_for_layers_with_windows() -> None:
    components = {ComponentType.FULL, ComponentType.SWA}
    pool = with_windows([1, 4], [3, 0, 2])
    assert check_pool(pool, components) is pool
    draft = MHATokenToKVPool(64, 16, torch.float32, 3, 4, 2, "cpu", enable_memory_saver=False)
    full, windowed, drafts = layer_groups(pool, [draft])
    assert full == LayerGroup(pool.full_kv_pool, (1, 4))
    assert windowed == LayerGroup(pool.swa_kv_pool, (3, 0, 2), windowed=True)
    assert drafts == LayerGroup(draft, (5, 6), draft=True)
    assert [full.row_bytes, drafts.row_bytes] == [2 * 2 * 4 * 4, 2 * 3 * 4 * 4]
    with pytest.raises(Unsupported, match="add --disable-hybrid-swa-memory"):
        check_pool(with_windows([], [0, 1]), components)


def test_pools_of_draft_models() -> None:
    """Of layers of the model's own checkpoint, or of another model; SGLang names one kind or the other."""
    own, other = (
        MHATokenToKVPool(64, 16, torch.float32, 2, 4, layers, "cpu", enable_memory_saver=False) for layers in (1, 3)
    )
    params = SimpleNamespace(mtp_draft_device_pools=(own,), sidecar_draft_device_pools=(other,))
    none, chain, windowed = drafting(None, algorithm=None), drafting(1), with_windows([1], [0])
    assert draft_pools(params, chain, own) == (own, other)
    with pytest.raises(Unsupported, match="add --speculative-eagle-topk 1"):
        draft_pools(params, drafting(4), own)
    with pytest.raises(Unsupported, match=r"FROZEN_KV_MTP for it, .*; drop --speculative-algorithm"):
        draft_pools(params, drafting(1, algorithm="FROZEN_KV_MTP"), own)
    with pytest.raises(Unsupported, match="several models at once for it"):
        draft_pools(params, drafting(1, several=True), own)
    with pytest.raises(Unsupported, match="add --disable-hybrid-swa-memory"):
        draft_pools(params, chain, windowed)
    assert (
        draft_pools(SimpleNamespace(mtp_draft_device_pools=(), sidecar_draft_device_pools=()), none, windowed) == ()
    )
    params.sidecar_draft_device_pools = (object(),)
    with pytest.raises(Unsupported, match="a KV pool of type object"):
        draft_pools(params, chain, own)


def drafting(topk: int | None, *, algorithm: str | None = "EAGLE", several: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_algorithm=algorithm, speculative_eagle_topk=topk, enable_multi_layer_eagle=several
    )
