"""Small random-weight checkpoints whose output depends on every token of the prompt.

A plainly initialised random model answers one token whatever the prompt is, so comparing its output proves
little. Here each parameter is drawn with a gain over its fan-in: attention is peaked on a few dozen positions
anywhere in the prefix, its output weighs as much as the residual stream, and the head spreads the logits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from bench import vision

SCHEMA = 1  # raise it when the same spec gives other weights or another tokenizer
MARKER = "made_by_bench.json"

PAD, BOS, EOS, TURN_START, TURN_END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIALS = (PAD, BOS, EOS, TURN_START, TURN_END)
FIRST_PLAIN_ID = len(SPECIALS)  # token ids from here on are bytes and pairs of letters
LETTERS_BY_FREQUENCY = "etaoinshrdlcumwfgypbvkjxqz"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelSpec:
    """One checkpoint; equal specs and seeds give equal bytes."""

    architecture: str = "llama"  # a key of ARCHITECTURES
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int | None = None  # None: what the architecture is known for (see ARCHITECTURES)
    intermediate: int = 256
    vocab: int = 512
    dtype: str = "float32"  # "float32" or "bfloat16"; also the dtype to serve with
    max_position_embeddings: int = 8192  # tokens
    sharpness: float = 2.5  # standard deviation of the attention scores; larger: fewer positions are attended

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is none of {', '.join(ARCHITECTURES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is neither float32 nor bfloat16")
        if self.hidden_size % self.heads or self.heads % self.num_kv_heads:
            raise ValueError(f"{self.heads} heads must divide hidden_size and be a multiple of kv_heads")
        if self.vocab < FIRST_PLAIN_ID + 256:
            raise ValueError(f"vocab {self.vocab} cannot hold {FIRST_PLAIN_ID} special tokens and 256 bytes")

    @property
    def num_kv_heads(self) -> int:
        if self.kv_heads is not None:
            return self.kv_heads
        return max(1, self.heads // ARCHITECTURES[self.architecture].heads_per_kv_head)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def digest(self, seed: int) -> str:
        text = json.dumps({"schema": SCHEMA, "seed": seed, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Architecture:
    """What a Hugging Face configuration of this family needs beyond the fields that all share."""

    model_type: str
    extra: dict[str, Any]  # fixed fields of the configuration
    intermediate_field: str = "intermediate_size"
    heads_per_kv_head: int = 1
    tied: bool = False  # the family has no head of its own: logits come from the embedding
    vision: dict[str, Any] | None = None  # fields of the encoder of a model that also sees (see bench/vision.py)
    class_name: str | None = None  # where SGLang's is another than transformers'


# For three layers.
_WINDOWED = {"sliding_window": 200, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

_LATENT: dict[str, Any] = {
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "topk_group": 1,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", {}),
    "llama_gqa": Architecture("llama", {}, heads_per_kv_head=2),
    "qwen2": Architecture("qwen2", {}),
    "qwen3": Architecture("qwen3", {}),
    "olmoe": Architecture("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "gemma": Architecture("gemma", {}, tied=True),
    "phi3": Architecture("phi3", {}),
    "stablelm": Architecture("stablelm", {"use_qkv_bias": True}),
    "opt": Architecture("opt", {}, intermediate_field="ffn_dim"),
    "gptj": Architecture("gptj", {"rotary_dim": 16}, intermediate_field="n_inner"),
    "gpt_neox": Architecture("gpt_neox", {}),
    "gemma3": Architecture("gemma3_text", _WINDOWED | {"query_pre_attn_scalar": 32}, heads_per_kv_head=2, tied=True),
    "olmo3": Architecture("olmo3", _WINDOWED),
    "mellum": Architecture(
        "mellum",
        _WINDOWED | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        heads_per_kv_head=2,
    ),
    "qwen2_5_vl": Architecture(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}},
        vision={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
        },
    ),
    "lighton_ocr": Architecture(
        "lighton_ocr",
        {},
        vision={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "head_dim": 32,
            "intermediate_size": 128,
            "patch_size": 4,
            "image_size": 96,
        },
        class_name="LightOnOCRForConditionalGeneration",
    ),
    "deepseek_v2": Architecture(
        "deepseek_v2", _LATENT | {"scoring_func": "softmax", "n_group": 1, "norm_topk_prob": False}
    ),
    "deepseek_v3": Architecture(
        "deepseek_v3",
        _LATENT
        | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 2, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
    ),
}


def make_model(directory: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """Writes the checkpoint and its tokenizer to `directory`, once, and returns `directory`."""

    def write(scratch: Path) -> None:
        _write_checkpoint(scratch, spec, seed)
        tokenizer, family = _tokenizer(spec), ARCHITECTURES[spec.architecture]
        with_tokenizer = tokenizer if family.vision is None else vision.processor(family.model_type, tokenizer)
        with_tokenizer.save_pretrained(scratch)

    return make_once(directory, spec.digest(seed), {"seed": seed, "spec": asdict(spec)}, write)


def make_once(directory: Path, digest: str, about: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """`directory`, filled by `write` unless it is of this `digest`. Raises FileExistsError if it is another's."""
    directory = Path(directory)
    if _made_from(directory) == digest:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        write(scratch)
        (scratch / MARKER).write_text(json.dumps({"digest": digest, **about}))
        _publish(scratch, directory, digest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _made_from(directory: Path) -> str | None:
    try:
        marker: dict[str, str] = json.loads((directory / MARKER).read_text())
    except FileNotFoundError:
        return None
    return marker["digest"]


def _publish(scratch: Path, directory: Path, digest: str) -> None:
    """Renames `scratch` into place; another process that made the same model at the same time wins."""
    if directory.exists() and _made_from(directory) is None:
        raise FileExistsError(f"{directory} exists and is no checkpoint of ours")
    if directory.exists() and _made_from(directory) != digest:
        shutil.rmtree(directory)
    try:
        os.rename(scratch, directory)
    except OSError:
        if _made_from(directory) != digest:
            raise


def _config(spec: ModelSpec) -> Any:
    family = ARCHITECTURES[spec.architecture]
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "pad_token_id": SPECIALS.index(PAD),
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(EOS),
        "tie_word_embeddings": family.tied,
        family.intermediate_field: spec.intermediate,
    }
    if family.vision is not None:
        return vision.config_of(family.model_type, fields | family.extra, family.vision)
    return AutoConfig.for_model(family.model_type, **(fields | family.extra))


def _write_checkpoint(directory: Path, spec: ModelSpec, seed: int) -> None:
    import torch

    config = _config(spec)
    sees = ARCHITECTURES[spec.architecture].vision is not None
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = _scale(name, tuple(parameter.shape), spec)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale.centre(parameter) + scale.spread * noise)
    model.to(getattr(torch, spec.dtype)).save_pretrained(directory)
    if (class_name := ARCHITECTURES[spec.architecture].class_name) is not None:
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**written, "architectures": [class_name]}))


@dataclass(frozen=True)
class _Scale:
    """A parameter becomes `gain` times its initial value plus `spread` times unit normal noise."""

    spread: float
    gain: float = 0.0

    def centre(self, initial: Any) -> Any:
        return self.gain * initial


# The first pattern found in a parameter's name decides: gain over the square root of the fan-in.
# Fused projections ("qkv") take the gain of Q and K.
_MATRIX_GAINS: tuple[tuple[str, float | None], ...] = (
    (
        r"\.(q_proj|k_proj|qkv_proj|query_key_value|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.",
        None,
    ),  # None: the square root of the sharpness
    (r"\.v_proj\.", 2.0),
    (r"\.(o_proj|out_proj|attention\.dense)\.", 5.0),
    (r"(lm_head|embed_out)\.", 2.5),
    (r"mlp\.gate\.", 2.0),  # a router of experts
    (r"", 1.2),
)
_EMBEDDING = re.compile(r"(embed_tokens|embed_in|wte)\.")
_POSITION = re.compile(r"embed_positions\.")
_QK_NORM = re.compile(r"\.(q|k)_(norm|layernorm)")
_FINAL_NORM = re.compile(r"^model\.norm\.")


def _scale(name: str, shape: tuple[int, ...], spec: ModelSpec) -> _Scale:
    tied = ARCHITECTURES[spec.architecture].tied
    if _EMBEDDING.search(name):
        return _Scale(1.0 / math.sqrt(spec.hidden_size) if tied else 1.0)
    if tied and _FINAL_NORM.search(name):
        return _Scale(2.5)  # of both signs: else each token would answer itself
    if _POSITION.search(name):
        return _Scale(0.5)
    if _QK_NORM.search(name):
        return _Scale(0.1, math.sqrt(spec.sharpness))
    if len(shape) == 1:
        return _Scale(0.1, 1.0)
    gain = next(gain for pattern, gain in _MATRIX_GAINS if re.search(pattern, name))
    fan_in = math.prod(shape[1:]) if len(shape) > 3 else shape[-1]  # of a convolution, or of a matrix for each expert
    return _Scale((gain or math.sqrt(spec.sharpness)) / math.sqrt(fan_in))


def _tokenizer(spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Byte-level BPE: special tokens, the 256 bytes, then pairs of letters up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(_letter_pairs(), spec.vocab - FIRST_PLAIN_ID - len(alphabet)))
    words = [*SPECIALS, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    of_images = {} if ARCHITECTURES[spec.architecture].vision is None else vision.TOKENS
    tokenizer.add_special_tokens(list(of_images.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=spec.max_position_embeddings,
        model_specific_special_tokens=of_images,
    )


def _letter_pairs() -> Iterator[tuple[str, str]]:
    """Pairs of lower-case letters, pairs of frequent letters first."""
    pairs = itertools.product(range(len(LETTERS_BY_FREQUENCY)), repeat=2)
    for first, second in sorted(pairs, key=lambda pair: (sum(pair), pair)):
        yield LETTERS_BY_FREQUENCY[first], LETTERS_BY_FREQUENCY[second]
