from __future__ import annotations

from typing import Any

import pytest

from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.planner.hf_config import UnknownConfig, shape_of_config
from sglang_hcache.planner.shape import Latent, ModelShape

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
        "v_head_dim": 128,
        "vocab_size": 129280,
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


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_tables_shapes_have_the_published_parameters(name: str) -> None:
    shape = ARCHITECTURES[name]
    assert shape.layers * shape.layer_weight_bytes / 2 == pytest.approx(PARAMETERS[name] * 1e9, rel=0.02)


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
        ({"layer_types": ["sliding_attention"] * 30 + ["full_attention"] * 6}, 30),
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
    with pytest.raises(UnknownConfig, match="no sliding_window"):
        shape_of_config({**CONFIGS["Qwen3-4B"], "model_type": "gemma2"}, "changed")
