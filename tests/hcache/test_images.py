"""By what an image is known, in the tokens that SGLang looks up."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.mm_utils import pad_mm_tokens
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
)

from sglang_hcache import plugin

OFFSETS = (2, 4)  # of its tokens, both inclusive
PROMPT = [1, 2, 0, 0, 0, 3]
SHRUNK, CROPS = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 3, 8, 8)


def looked_up(*, padded: bool = False, **beside: Any) -> tuple[int, ...]:
    """Tokens of a prompt with an image, of which the processor has made these beside what SGLang hashes.

    padded: some processors put the numbers in themselves.
    """
    item = MultimodalDataItem(
        modality=Modality.IMAGE, feature=SHRUNK, offsets=[OFFSETS], model_specific_data={**beside}
    )
    output = MultimodalProcessorOutput(mm_items=[item], input_ids=PROMPT, im_token_id=0)
    if padded:
        item.set_pad_value()
        output.padded_input_ids = output.build_padded_input_ids(PROMPT, [item])
    inputs = MultimodalInputs.from_processor_output(output)
    hooks = {target: hook for target, hook, _ in plugin._serving_hooks()}
    hooks["sglang.srt.managers.schedule_batch.MultimodalInputs.from_processor_output"](inputs, output)
    if padded:
        assert inputs.padded_input_ids is not None
        return tuple(inputs.padded_input_ids)
    return tuple(pad_mm_tokens(array("q", PROMPT), inputs))


@pytest.mark.parametrize("padded", [False, True])
def test_an_image_is_known_by_all_that_is_made_of_it(padded: bool) -> None:
    others = CROPS.clone()
    others[0, 1, 2, 7, 7] += 1
    ways: list[dict[str, Any]] = [
        {"images_crop": CROPS},
        {"images_crop": others},
        {"images_crop": CROPS.to(torch.bfloat16)},
        {"images_crop": CROPS.flatten(1, 2)},
        {"patch_pixel_values": CROPS},
        {"images_crop": CROPS, "patch_pixel_values": others},
        {"images_crop": [CROPS, others]},
        {},
    ]
    found = [looked_up(padded=padded, **way) for way in ways]
    assert len(set(found)) == len(ways)
    assert found == [looked_up(padded=padded, **way) for way in ways], "in another process, too"
    assert looked_up(padded=padded, images_crop=CROPS.numpy()) == found[0]
    assert all(tokens[:2] == (1, 2) and tokens[-1] == 3 for tokens in found)


def test_where_its_parts_are_does_not_count() -> None:
    """Other images of the request may change these, and those before them are to be found."""
    plain = looked_up()
    mask, names = np.ones((1, 4), bool), np.array([None, "a"], object)
    assert looked_up(image_grid_thw=torch.tensor([[1, 4, 4]]), mask=mask, names=names, num_patches=[3]) == plain
