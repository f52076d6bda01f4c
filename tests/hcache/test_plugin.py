from __future__ import annotations

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_hcache import plugin


def test_a_hook_that_cannot_be_attached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "sglang.srt.mem_cache.radix_cache.RadixCache.method_of_another_version"
    monkeypatch.setattr(plugin, "_serving_hooks", lambda: [(gone, print, HookType.AFTER)])
    monkeypatch.setattr(plugin, "_page_hash_hook", list)
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    with pytest.raises(RuntimeError, match=r"lacks sglang\.srt\..*method_of_another_version; .* tested with SGLang"):
        plugin._attach_serving_hooks()


def test_what_hooks_call_and_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = "sglang.srt.mem_cache.common._function_of_another_version"
    for name in ("_serving_hooks", "_page_hash_hook"):
        monkeypatch.setattr(plugin, name, list)
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    plugin._attach_serving_hooks()
    monkeypatch.setattr(plugin, "CALLED", (*plugin.CALLED, gone))
    with pytest.raises(RuntimeError, match=f"lacks {gone}; "):
        plugin._attach_serving_hooks()


def test_every_target_exists_in_this_version() -> None:
    import pkgutil

    for target in (*(target for target, _, _ in plugin._serving_hooks()), *plugin.CALLED):
        assert callable(pkgutil.resolve_name(target)), target
