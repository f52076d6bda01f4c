from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.hf_config import UnknownConfig, shape_of_config
from sglang_hcache.planner.machine import machine_of
from sglang_hcache.planner.shape import Latent, ModelShape
from tests.hcache.planners import shapes

# The fields that matter of released configs, as they are named there.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "Qwen3-4B": {
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "OPT-30B": {
        "model_type": "opt",
        "ffn_dim": 28672,
        "hidden_size": 7168,
        "num_attention_heads": 56,
        "num_hidden_layers": 48,
        "vocab_size": 50272,
    },
    "GPT-J-6B": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "rotary_dim": 64,
        "vocab_size": 50400,
    },
    "Falcon-7B": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "vocab_size": 65024,
    },
    "Falcon-40B": {
        "model_type": "falcon",
        "hidden_size": 8192,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "vocab_size": 65024,
    },
    "GLM-4-9B": {
        "model_type": "chatglm",
        "ffn_hidden_size": 13696,
        "hidden_size": 4096,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 32,
        "num_layers": 40,
        "padded_vocab_size": 151552,
        "tie_word_embeddings": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_hidden_layers": 34,
            "num_key_value_heads": 4,
            "sliding_window": 1024,
            "vocab_size": 262208,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    },
    "Gemma-3-27B": {  # as it was released: the rest is what transformers takes for granted
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "head_dim": 128,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
        "tie_word_embeddings": False,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "OLMo-7B": {
        "model_type": "olmo",
        "hidden_size": 4096,
        "mlp_hidden_size": 22016,
        "n_heads": 32,
        "n_layers": 32,
        "vocab_size": 50304,
    },
}

# Parameters in billions, without embeddings, as model cards or papers give them (or total less embeddings).
PARAMETERS = {
    "Llama-2-7B": 6.48,
    "Llama-3-8B": 6.98,
    "Llama-3.1-405B": 401.6,
    "Qwen3-8B": 6.95,
    "Qwen3-32B": 31.2,
    "Qwen3-30B-A3B": 29.9,
    "Qwen3-235B-A22B": 234.0,
    "Qwen2.5-7B": 6.53,
    "OPT-30B": 29.6,
    "OPT-66B": 65.2,
    "GPT-J-6B": 5.6,
    "Gemma-7B": 7.75,
    "Gemma-2-9B": 8.32,
    "Phi-4": 13.6,
    "Mixtral-8x7B": 46.4,
    "Mistral-7B": 6.98,
    "Command-R": 32.9,
    "Falcon-40B": 40.8,
    "Yi-34B": 33.5,
    "MiniCPM3-4B": 3.88,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_gives_the_tables_shape(name: str) -> None:
    assert shape_of_config(CONFIGS[name], name) == ARCHITECTURES[name]


def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma-3-4B as it was released names neither heads nor a vocabulary."""
    left_out = {"head_dim", "num_attention_heads", "num_key_value_heads", "vocab_size"}
    text = {field: value for field, value in CONFIGS["Gemma-3-4B"]["text_config"].items() if field not in left_out}
    released = {**CONFIGS["Gemma-3-4B"], "text_config": text}
    assert shape_of_config(released, "Gemma-3-4B") == ARCHITECTURES["Gemma-3-4B"]
    assert shape_of_config({**released, "model_type": "new"}, "Gemma-3-4B") == ARCHITECTURES["Gemma-3-4B"]
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    with pytest.raises(UnknownConfig, match="no num_attention_heads"):
        shape_of_config(released, "Gemma-3-4B")


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_tables_shapes_have_the_published_parameters(name: str) -> None:
    shape = ARCHITECTURES[name]
    assert shape.layers * shape.layer_weight_bytes / 2 == pytest.approx(PARAMETERS[name] * 1e9, rel=0.02)


# Bytes of all files with weights, as they were released.
RELEASED_GB = {
    "Llama-3-70B": 141.1,
    "Llama-3.2-1B": 2.47,
    "Qwen3-4B": 8.04,
    "Gemma-2-9B": 18.5,
    "gpt-oss-20b": 13.8,
    "gpt-oss-120b": 65.2,
    "DeepSeek-V2": 471.5,
    "DeepSeek-V3": 688.6,
    "Kimi-K2": 1029.0,
}


@pytest.mark.parametrize("name", RELEASED_GB)
def test_the_tables_shapes_have_the_released_bytes(name: str) -> None:
    """Of gpt-oss only the experts are quantised, 97 % of the small one's parameters; here all of its layers."""
    rel = 0.08 if name == "gpt-oss-20b" else 0.03
    assert ARCHITECTURES[name].weight_bytes == pytest.approx(RELEASED_GB[name] * 1e9, rel=rel)


def test_the_table_has_many_and_says_how_large_hidden_states_are() -> None:
    assert len(ARCHITECTURES) >= 40

    def ratio(shape: ModelShape) -> float:
        return shape.hidden_bytes / shape.kv_bytes

    assert ratio(ARCHITECTURES["Llama-2-13B"]) == 0.5
    assert ratio(ARCHITECTURES["Gemma-7B"]) == 0.375
    assert ratio(ARCHITECTURES["Llama-3-8B"]) == 2
    assert ratio(ARCHITECTURES["Qwen3-8B"]) == 2
    assert ratio(ARCHITECTURES["DeepSeek-V3"]) > 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', not a size"),
        ({"hidden_size": True}, "not a size"),
        ({"vocab_size": -1}, "not a size"),
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"model_type": "mamba2"}, "without attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "without attention"),
        ({"model_type": "gemma4_text"}, "layers of gemma4_text differ in size"),
        ({"layer_types": 5}, "layer_types is 5, not a list of names"),
        ({"layer_types": [["full_attention"]]}, "not a list of names"),
        ({"hidden_size": 10**400}, "not a size"),
    ],
)
def test_what_is_missing_or_wrong_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownConfig, match=message):
        shape_of_config({**CONFIGS["Llama-2-7B"], **change}, "changed")


def test_queries_of_a_latent_may_be_made_of_the_input() -> None:
    latent = shape_of_config({**CONFIGS["DeepSeek-V3"], "q_lora_rank": None}, "changed").latent
    assert latent == Latent(rank=512, rope_dim=64, nope_dim=128, query_rank=0)


@pytest.mark.parametrize(
    ("change", "windowed_layers"),
    [
        ({}, 0),
        ({"layer_types": ["full_attention"] * 36}, 0),
        ({"layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 6, "use_sliding_window": True}, 30),
        ({"model_type": "new", "layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 6}, 30),
        ({"model_type": "new", "layer_types": ["full_attention"] * 36 + ["sliding_attention"] * 3}, 0),
        ({"model_type": "gemma2"}, 18),
        ({"model_type": "gemma3_text"}, 30),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 5}, 29),
        ({"model_type": "cohere2", "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 32}, 4),
    ],
)
def test_layers_that_see_a_window_are_counted(change: dict[str, Any], windowed_layers: int) -> None:
    shape = shape_of_config({**CONFIGS["Qwen3-4B"], "sliding_window": 1024, **change}, "changed")
    assert (shape.windowed_layers, shape.window) == (windowed_layers, 1024 if windowed_layers else 0)


def test_a_window_has_a_size() -> None:
    config = {**CONFIGS["Qwen3-4B"], "layer_types": ["sliding_attention"] * 36}
    for model_type in ("qwen3", "new"):
        with pytest.raises(UnknownConfig, match="no sliding_window"):
            shape_of_config({**config, "model_type": model_type}, "changed")
    assert shape_of_config({**config, "model_type": "gemma2"}, "changed").window == 4096  # as transformers has it


HYBRID: dict[str, dict[str, Any]] = {
    "qwen3_next": {"full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    "nemotron_h": {"hybrid_override_pattern": "M-M-M-M*-M-"},
    "jamba": {"attn_layer_offset": 4, "attn_layer_period": 8, "mamba_d_state": 16},
    "falcon_h1": {"mamba_d_ssm": 3072, "mamba_d_state": 256},
    "kimi_linear": {"linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": ["mamba"] * 31 + ["attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "bailing_moe_linear": {"layer_group_size": 8},
}
SPARSE: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
    "glm_moe_dsa": {"index_topk": 2048},
    "minimax_m3": {"layer_types": ["minimax_m3_sparse"] * 32},
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("model_type", [*HYBRID, *SPARSE])
def test_what_no_server_serves_is_refused(model_type: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers, too, and whether it knows the model type or not."""
    if not known:
        monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    config = {**CONFIGS["Llama-2-7B"], "model_type": model_type, **{**HYBRID, **SPARSE}[model_type]}
    with pytest.raises(UnknownConfig, match="sparse" if model_type in SPARSE else "without attention"):
        shape_of_config(config, "hybrid")


def test_all_of_a_hybrid_may_be_attention() -> None:
    config = {**CONFIGS["Llama-2-7B"], "model_type": "granitemoehybrid", "layer_types": ["attention"] * 32}
    assert shape_of_config(config, "dense").layers == 32


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (None, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": {"num_bits": 16}},
                    "group_1": {"weights": {"num_bits": 8}, "input_activations": None},
                    "group_2": {"weights": None},
                },
            },
            8,
        ),
    ],
)
def test_quantised_weights_are_counted_as_they_are(
    quantization: Any, bits: float, caplog: pytest.LogCaptureFixture
) -> None:
    llama = CONFIGS["Llama-2-7B"]
    shape = shape_of_config({**llama, "quantization_config": quantization}, "quantised")
    assert shape.weight_bits == bits
    assert shape.layer_weight_bytes == int(shape_of_config(llama, "plain").layer_weight_bytes * (bits or 16) / 16)
    assert (shape.hidden_bytes, shape.kv_bytes) == (8192, 16384)
    assert not caplog.records
    gemma = {**CONFIGS["Gemma-3-4B"], "quantization_config": quantization}
    assert shape_of_config(gemma, "around the part that decodes").weight_bits == bits


def test_what_is_quantised_in_an_unknown_way_is_counted_as_if_it_were_not(caplog: pytest.LogCaptureFixture) -> None:
    for quantization in ({"quant_method": "new"}, {"quant_method": "awq", "bits": "four"}):
        shape = shape_of_config({**CONFIGS["Llama-2-7B"], "quantization_config": quantization}, "quantised")
        assert shape.weight_bits == 0
    assert "weights by quant_method 'new' are counted as if" in caplog.messages[0]


def test_an_mlp_may_have_two_matrices() -> None:
    """AFM-4.5B and Apertus-8B: what their model cards say, less embeddings."""
    arcee = {
        "model_type": "arcee",
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "num_attention_heads": 20,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "vocab_size": 128004,
    }
    apertus = {
        "model_type": "apertus",
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 131072,
    }
    for config, billions in ((arcee, 4.62), (apertus, 8.05)):
        assert shape_of_config(config, "model").weight_bytes == pytest.approx(2e9 * billions, rel=0.01)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *sorted({field for config in CONFIGS.values() for field in config}),
    *("layer_types", "layers_block_type", "block_types", "sliding_window", "text_config", "llm_config"),
    *("index_topk", "linear_attn_config", "num_experts", "multi_query", "num_kv_heads", "n_inner", "kv_lora_rank"),
    *("quantization_config", "compression_config", "shared_expert_intermediate_size", "rope_scaling"),
]
QUANTIZATION = st.dictionaries(
    st.sampled_from(["bits", "config_groups", "load_in_4bit", "quant_algo", "quant_method"]),
    JSON | st.dictionaries(st.text(max_size=3), st.dictionaries(st.just("weights"), JSON)),
)


def has_a_shape_or_is_refused(config: dict[str, Any]) -> None:
    try:
        shape = shape_of_config(config, "any")
    except UnknownConfig:
        return
    assert costs_of(shape, machine_of("H100")).prefill_s(64) > 0


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_of_a_field_gives_a_shape_or_is_refused(name: str, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(CONFIGS[name])))
    has_a_shape_or_is_refused({**CONFIGS[name], field: data.draw(st.integers(-2, 40) | JSON)})


@settings(max_examples=500, deadline=None)
@given(
    base=st.sampled_from([{}, *CONFIGS.values()]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    quantization=st.none() | QUANTIZATION,
    layer_types=st.none() | st.lists(st.sampled_from(["full_attention", "sliding_attention"]), max_size=80),
)
def test_whatever_a_config_holds_it_has_a_shape_or_is_refused(
    base: dict[str, Any], changes: dict[str, Any], quantization: Any, layer_types: Any
) -> None:
    config = {**base, "layer_types": layer_types, "quantization_config": quantization, **changes}
    has_a_shape_or_is_refused(config)
    has_a_shape_or_is_refused({"model_type": "gemma3", "text_config": config})


@given(shape=shapes() | st.sampled_from(list(ARCHITECTURES.values())))
def test_a_shape_is_the_same_from_a_file(shape: ModelShape) -> None:
    assert ModelShape(**json.loads(json.dumps(asdict(shape)))) == shape
