"""What checkpoints of models that also see have beyond those of `bench.models`; and images for them."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerFast

TOKENS = {  # in the order of their ids, after all others
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_break_token": "<|image_break|>",
    "image_end_token": "<|image_end|>",
}
SIDE = 12  # tokens: each image becomes a square of so many
IMAGE_TOKENS = SIDE**2
_PIXELS_OF_A_TOKEN = {"qwen2_5_vl": 28, "lighton_ocr": 8}  # along each side


def config_of(model_type: str, text: Mapping[str, Any], encoder: Mapping[str, Any]) -> Any:
    """text: fields of the part that decodes, whose vocabulary has no tokens of images yet."""
    first = text["vocab_size"]
    ids = {f"{name}_id": first + place for place, name in enumerate(TOKENS)}
    parts = {
        "text_config": {**text, "vocab_size": first + len(TOKENS)},
        "vision_config": dict(encoder),
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    # Of LightOnOCR's projector, which transformers makes without a bias.
    return AutoConfig.for_model(model_type, **ids, **parts, multimodal_projector_bias=False)


def processor(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """With the tokenizer, which has the tokens of images."""
    from transformers import PixtralImageProcessor, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers.models.lighton_ocr import LightOnOcrProcessor

    pixels = _PIXELS_OF_A_TOKEN[model_type]
    if model_type == "qwen2_5_vl":
        area = (SIDE * pixels) ** 2
        images = Qwen2VLImageProcessor(size={"shortest_edge": area, "longest_edge": area})
        return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), tokenizer.chat_template)
    patches = {"height": pixels, "width": pixels}
    images = PixtralImageProcessor(size={"longest_edge": SIDE * pixels}, patch_size=patches)
    return LightOnOcrProcessor(images, tokenizer, pixels // 2, 2, tokenizer.chat_template)


def placeholder(vocab: int) -> list[int]:
    """What stands for an image in a prompt: the second of the three becomes IMAGE_TOKENS of them.

    vocab: without the tokens of images.
    """
    names = list(TOKENS)
    return [vocab + names.index(name) for name in ("vision_start_token", "image_token", "vision_end_token")]


def image_of(seed: int) -> str:
    """A `data:` URI of coloured squares, one a token."""
    colours = random.Random(seed).randbytes(3 * IMAGE_TOKENS)
    side = 8 * SIDE
    squares = Image.frombytes("RGB", (SIDE, SIDE), colours).resize((side, side), Image.Resampling.NEAREST)
    file = io.BytesIO()
    squares.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
