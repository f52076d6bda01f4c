"""A model's shape from its config.json, whatever its family calls the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_hcache.planner.shape import Latent, ModelShape

# Their MLP has two matrices; all others have a gate.
_PLAIN_MLP = {
    *("opt", "gptj", "gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "falcon", "RefinedWeb", "RefinedWebModel"),
    *("bloom", "mpt", "phi", "starcoder2", "codegen"),
}
# Without `layer_types`: of so many layers each, the last one sees all tokens and the others a window.
_WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4}
_UNEQUAL_LAYERS = ("gemma3n", "gemma4", "llama4")
_LINEAR = {"mamba", "linear_attention", "recurrent", "conv"}


class UnknownConfig(ValueError):
    """The file does not describe a decoder the planner knows; the message says what is missing, in one line."""


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a Hugging Face config.

    Weights are counted with two bytes an element: SGLang serves checkpoints of 32 bits in 16. Raises `UnknownConfig`.
    """
    config = _text_part(config)
    model_type = str(config.get("model_type", ""))
    layer_types = list(config.get("layer_types") or config.get("layers_block_type") or ())
    if model_type.startswith(("mamba", "rwkv")) or not _LINEAR.isdisjoint(layer_types):
        raise UnknownConfig("layers without attention are not supported")
    if model_type.startswith(_UNEQUAL_LAYERS):
        raise UnknownConfig(f"the layers of {model_type} differ in size")
    hidden_size = _size(config, "hidden_size", "n_embd", "d_model")
    query_heads = _size(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    head_dim = _optional(config, "head_dim", "kv_channels") or hidden_size // query_heads
    experts, active, intermediate_size = _mlp(config, model_type, hidden_size)
    windowed_layers, window = _windows(config, model_type, layers, layer_types)
    latent = _latent(config)
    if latent is not None:
        head_dim = _size(config, "v_head_dim")
    return ModelShape(
        name=name,
        layers=layers,
        hidden_size=hidden_size,
        query_heads=query_heads,
        kv_heads=_kv_heads(config, query_heads),
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocabulary=_size(config, "vocab_size", "padded_vocab_size"),
        gated_mlp=model_type not in _PLAIN_MLP,
        experts=experts,
        active_experts=active,
        latent=latent,
        windowed_layers=windowed_layers,
        window=window,
    )


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model that also sees or hears, the part that decodes."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            return {"model_type": config.get("model_type", ""), **config[key]}
    return config


def _windows(config: Mapping[str, Any], model_type: str, layers: int, layer_types: Sequence[str]) -> tuple[int, int]:
    """How many layers see a sliding window, and of how many tokens."""
    windowed = 0
    if layer_types:
        windowed = layer_types.count("sliding_attention")
    elif pattern := _WINDOW_PATTERNS.get(model_type):
        pattern = _optional(config, "sliding_window_pattern", "_sliding_window_pattern") or pattern
        windowed = layers - layers // pattern
    return (windowed, _size(config, "sliding_window")) if windowed else (0, 0)


def _kv_heads(config: Mapping[str, Any], query_heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return (
        _optional(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or query_heads
    )


def _latent(config: Mapping[str, Any]) -> Latent | None:
    if not (rank := _optional(config, "kv_lora_rank")):
        return None
    rope_dim, nope_dim = _size(config, "qk_rope_head_dim"), _size(config, "qk_nope_head_dim")
    return Latent(rank, rope_dim, nope_dim, query_rank=_optional(config, "q_lora_rank"))


def _mlp(config: Mapping[str, Any], model_type: str, hidden_size: int) -> tuple[int, int, int]:
    """Experts, those a token passes, and the intermediate size of one; shared ones count as so many of that size."""
    dense = _optional(config, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    if not dense and "mlp_hidden_size" in config:
        dense = _size(config, "mlp_hidden_size") // 2  # gate and value together
    if not dense and model_type in _PLAIN_MLP:
        dense = 4 * hidden_size
    experts = _optional(config, "num_local_experts", "num_experts", "n_routed_experts")
    if experts > 1:
        size = _optional(config, "moe_intermediate_size") or dense
        if not size:
            raise UnknownConfig("it has no moe_intermediate_size")
        shared = _optional(config, "n_shared_experts") or round(
            _optional(config, "shared_expert_intermediate_size") / size
        )
        return experts + shared, _size(config, "num_experts_per_tok", "moe_top_k") + shared, size
    if not dense:
        raise UnknownConfig("it has no intermediate_size")
    return 1, 1, dense


def _optional(config: Mapping[str, Any], *names: str) -> int:
    """The first of the fields that is set; 0 if none is."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UnknownConfig(f"{name} is {value!r}, not a size")
        return value
    return 0


def _size(config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if not value:
        raise UnknownConfig(f"it has no {names[0]}")
    return value
