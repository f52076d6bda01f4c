from __future__ import annotations

import pytest
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_hcache.model import Unsupported, check_pool


@pytest.mark.parametrize(
    ("component", "message"),
    [(ComponentType.SWA, "add --disable-hybrid-swa-memory"), (ComponentType.MAMBA, "holds FULL, MAMBA state")],
)
def test_a_pool_of_its_own_for_some_layers_is_refused(component: ComponentType, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        check_pool(None, {ComponentType.FULL, component})
