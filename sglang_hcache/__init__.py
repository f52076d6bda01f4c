"""Hidden-state cache tier for SGLang: evicted prefixes stay restorable in host memory and files."""

from __future__ import annotations

from typing import Any

from sglang_hcache.version import VERSION

__version__ = VERSION
TESTED_SGLANG = ">=0.5.23,<0.5.24"


def server_kwargs(**kwargs: Any) -> dict[str, Any]:
    """Keyword arguments that switch the tier on; see `sglang_hcache.flags.server_kwargs`."""
    from sglang_hcache import flags

    return flags.server_kwargs(**kwargs)
