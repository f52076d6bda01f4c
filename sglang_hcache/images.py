"""Images and other non-text input, identified by all that their encoder gets: SGLang hashes one tensor only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import MultimodalProcessorOutput


def after_inputs(inputs: Any, *_args: object, **_kwargs: object) -> None:
    """Make the identity of each item from all of its tensors, before SGLang derives the item's token ids from it.

    A processor may make more of an image than the tensor that SGLang hashes, such as crops beside a shrunk image. The
    new identity also holds in SGLang's own tree and in its cache of embeddings.
    """
    changed = False
    for item in inputs.mm_items:
        if beside := list(_values(item.model_specific_data)):
            digest = hashlib.sha256(repr(item.padding_values()).encode())
            for name, tensor in beside:
                digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            item.set_identity(digest.digest())
            changed = True
    if changed and (padded := inputs.padded_input_ids) is not None:
        inputs.padded_input_ids = MultimodalProcessorOutput.build_padded_input_ids(padded, inputs.mm_items)


def _values(beside: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that say what an image looks like, by name; integers and masks say where its parts are."""
    for name in sorted(beside):
        for tensor in _flat(beside[name]):
            if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.dtype == torch.uint8):
                yield name, tensor


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.float16, np.float32, np.float64):
        yield torch.from_numpy(np.ascontiguousarray(value))
    else:
        yield value
