"""On the path of a server without a GPU: SGLang's LoRA layers pin memory, which takes a driver."""

from __future__ import annotations

from typing import Any

import torch


def unpinned(make: Any) -> Any:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    return made


for name in ("tensor", "empty", "zeros"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
