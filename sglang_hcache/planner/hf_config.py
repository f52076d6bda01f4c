"""A model's shape from its config.json, whatever its family calls the fields."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_hcache.planner.shape import Latent, ModelShape

QUANTISED = "products of quantised weights are not run beside the forward's"

logger = logging.getLogger(__name__)

# Their MLP has two matrices; all others have a gate.
_PLAIN_MLP = {
    *("opt", "gptj", "gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "falcon", "RefinedWeb", "RefinedWebModel"),
    *("bloom", "mpt", "phi", "starcoder2", "codegen", "arcee", "apertus", "persimmon", "nemotron", "jais2"),
}
_UNEQUAL_LAYERS = ("gemma3n", "gemma4", "llama4")
_ATTENTION = {"full_attention", "attention", "sliding_attention", "chunked_attention"}  # as layers are called
_LINEAR_MODELS = ("mamba", "falcon_mamba", "rwkv", "bailing_hybrid", "bailing_moe_linear")
# Fields of models in which some layers have no attention, or more than that; their configs may lack layer types.
_LINEAR_FIELDS = (
    *("full_attention_interval", "linear_num_key_heads", "linear_attn_config", "hybrid_override_pattern"),
    *("attn_layer_period", "attn_layer_indices", "mamba_d_ssm"),
)
# By the name of the method, or of its algorithm. MXFP4 has a scale of 8 bits for 32 parameters, NVFP4 for 16.
_QUANTIZED_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25, "nvfp4": 4.5, "modelopt_fp4": 4.5}
_TOO_LARGE = 2**31  # for a size of anything


class UnknownConfig(ValueError):
    """The file does not describe a decoder the planner knows; the message says what is missing, in one line."""


def shape_of_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a Hugging Face config; what it leaves out is what transformers takes for it.

    Weights that are not quantised are counted with two bytes an element: SGLang serves checkpoints of 32 bits in 16.
    Raises `UnknownConfig`.
    """
    config = _completed(_text_part(_completed(config)))
    model_type = str(config.get("model_type", ""))
    layer_types = _layer_types(config)
    if model_type.startswith(_LINEAR_MODELS) or any(config.get(field) for field in _LINEAR_FIELDS):
        raise UnknownConfig("layers without attention are not supported")
    if config.get("index_topk"):
        raise UnknownConfig("sparse attention (it has an index_topk) is not supported")
    if unknown := sorted(set(layer_types) - _ATTENTION):
        what = f"it has layers of type {', '.join(map(repr, unknown))}"
        raise UnknownConfig(f"layers without attention, or with a sparse one, are not supported: {what}")
    if model_type.startswith(_UNEQUAL_LAYERS):
        raise UnknownConfig(f"the layers of {model_type} differ in size")
    hidden_size = _size(config, "hidden_size", "n_embd", "d_model")
    query_heads = _size(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    head_dim = _optional(config, "head_dim", "kv_channels") or hidden_size // query_heads
    if not head_dim:
        raise UnknownConfig(f"it has {query_heads} heads of {hidden_size} elements together")
    experts, active, intermediate_size = _mlp(config, model_type, hidden_size)
    windowed_layers, window = _windows(config, layer_types[:layers])
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
        weight_bits=_weight_bits(config),
        tied_embeddings=config.get("tie_word_embeddings") is not False,
    )


def why_not_hidden(config: Mapping[str, Any]) -> str:
    """Say why a server must store K and V of this model, whatever their size; empty if hidden states are possible.

    A config has one set of RoPE parameters for all layers, or one for each layer type.
    """
    config = _completed(_text_part(_completed(config)))
    found = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    found += [value for one in found if isinstance(one, Mapping) for value in one.values()]
    for rotation in (one for one in found if isinstance(one, Mapping)):
        if any(rotation.get(name) in ("longrope", "su") for name in ("type", "rope_type")):
            return "with LongRoPE a token's K depends on the longest prompt of its forward"
        if rotation.get("mrope_section"):
            return "positions of several dimensions (M-RoPE) are not stored"
    return QUANTISED if _quantization(config) else ""


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults of its model type, if transformers is there and knows it."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow
        from transformers.utils import logging as notes
    except ImportError:
        return config
    verbosity = notes.get_verbosity()
    notes.set_verbosity(notes.CRITICAL)
    try:
        return {**config, **CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()}
    except Exception:  # noqa: BLE001  - a wrong value may raise anything there; here it is refused
        return config
    finally:
        notes.set_verbosity(verbosity)


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model that also sees or hears, the part that decodes."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            of_all = ("model_type", "quantization_config", "tie_word_embeddings")
            return {**{field: config[field] for field in of_all if field in config}, **config[key]}
    return config


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    for name in ("layer_types", "layers_block_type", "block_types"):
        if types := config.get(name):
            if isinstance(types, list | tuple) and all(isinstance(one, str) for one in types):
                return list(types)
            raise UnknownConfig(f"{name} is {types!r}, not a list of names")
    return []


def _windows(config: Mapping[str, Any], layer_types: Sequence[str]) -> tuple[int, int]:
    """How many layers see a sliding window, and of how many tokens."""
    windowed = layer_types.count("sliding_attention")
    return (windowed, _size(config, "sliding_window")) if windowed else (0, 0)


def _weight_bits(config: Mapping[str, Any]) -> float:
    """Bits per quantised parameter, the most if they differ; 0 if none is. Only `_QUANTIZED_BITS` includes scales."""
    if not (quantized := _quantization(config)):
        return 0.0
    groups = _part(quantized, "config_groups").values()
    given: list[Any] = [quantized.get("bits"), *(_part(group, "weights").get("num_bits") for group in groups)]
    given += [_QUANTIZED_BITS.get(str(quantized.get(name)).lower()) for name in ("quant_algo", "quant_method")]
    given += [bits for bits in (4, 8) if quantized.get(f"load_in_{bits}bit")]
    known = [float(bits) for bits in given if type(bits) in (int, float) and 1 <= bits <= 64]
    if not known:
        method = quantized.get("quant_method")
        logger.warning("hcache: weights by quant_method %r are counted as if they were not quantised", method)
    return max(known, default=0.0)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its parameters; {} where weights are not quantised."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, Mapping) else {}


def _part(value: Any, name: str) -> Mapping[str, Any]:
    part = value.get(name) if isinstance(value, Mapping) else None
    return part if isinstance(part, Mapping) else {}


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
    """Return all experts, those active for a token, and an expert's size; shared ones count in units of that size."""
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
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _TOO_LARGE:
            raise UnknownConfig(f"{name} is {value!r}, not a size")
        return value
    return 0


def _size(config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if not value:
        raise UnknownConfig(f"it has no {names[0]}")
    return value
