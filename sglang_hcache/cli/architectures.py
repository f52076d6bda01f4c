"""Shapes of released models, as their config.json gives them."""

from __future__ import annotations

from sglang_hcache.planner.shape import Latent, ModelShape


def _model(
    name: str,
    layers: int,
    hidden_size: int,
    heads: tuple[int, int, int],
    intermediate_size: int,
    vocabulary: int,
    *,
    gated: bool = True,
    experts: tuple[int, int] = (1, 1),
    latent: Latent | None = None,
    windowed: tuple[int, int] = (0, 0),
    weight_bits: float = 0.0,
    tied: bool = False,
) -> ModelShape:
    """`heads`: of queries, of K and V, elements each; `experts`: all of a layer, those a token passes;
    `windowed`: layers that see a sliding window, and its tokens; `weight_bits`: as it was released, if quantised;
    `tied`: logits are made with the input's embeddings.
    """
    query_heads, kv_heads, head_dim = heads
    return ModelShape(
        name=name,
        layers=layers,
        hidden_size=hidden_size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocabulary=vocabulary,
        gated_mlp=gated,
        experts=experts[0],
        active_experts=experts[1],
        latent=latent,
        windowed_layers=windowed[0],
        window=windowed[1],
        weight_bits=weight_bits,
        tied_embeddings=tied,
    )


def _gpt_oss(name: str, layers: int, experts: int) -> ModelShape:
    return _model(
        name, layers, 2880, (64, 8, 64), 2880, 201088,
        experts=(experts, 4), windowed=(layers // 2, 128), weight_bits=4.25,
    )  # fmt: skip


_DEEPSEEK = Latent(rank=512, rope_dim=64, nope_dim=128, query_rank=1536)

_ALL = (
    # Every K and V head has one query head: hidden states are half of KV.
    _model("Llama-2-7B", 32, 4096, (32, 32, 128), 11008, 32000),
    _model("Llama-2-13B", 40, 5120, (40, 40, 128), 13824, 32000),
    _model("Qwen1.5-0.5B", 24, 1024, (16, 16, 64), 2816, 151936, tied=True),
    _model("Qwen1.5-1.8B", 24, 2048, (16, 16, 128), 5504, 151936),
    _model("Qwen1.5-4B", 40, 2560, (20, 20, 128), 6912, 151936),
    _model("Qwen1.5-7B", 32, 4096, (32, 32, 128), 11008, 151936),
    _model("Qwen1.5-14B", 40, 5120, (40, 40, 128), 13696, 152064),
    _model("Qwen1.5-72B", 80, 8192, (64, 64, 128), 24576, 152064),
    _model("Gemma-7B", 28, 3072, (16, 16, 256), 24576, 256000, tied=True),
    _model("OLMo-7B", 32, 4096, (32, 32, 128), 11008, 50304),
    _model("OLMo-2-7B", 32, 4096, (32, 32, 128), 11008, 100352),
    _model("OLMo-2-13B", 40, 5120, (40, 40, 128), 13824, 100352),
    _model("OLMo-3-7B", 32, 4096, (32, 32, 128), 11008, 100278, windowed=(24, 4096)),
    _model("Phi-2", 32, 2560, (32, 32, 80), 10240, 51200, gated=False),
    _model("Phi-3-mini", 32, 3072, (32, 32, 96), 8192, 32064),
    _model("StableLM-2-1.6B", 24, 2048, (32, 32, 64), 5632, 100352),
    _model("Baichuan2-7B", 32, 4096, (32, 32, 128), 11008, 125696),
    _model("Baichuan2-13B", 40, 5120, (40, 40, 128), 13696, 125696),
    _model("GPT-J-6B", 28, 4096, (16, 16, 256), 16384, 50400, gated=False),
    _model("OPT-1.3B", 24, 2048, (32, 32, 64), 8192, 50272, gated=False, tied=True),
    _model("OPT-6.7B", 32, 4096, (32, 32, 128), 16384, 50272, gated=False, tied=True),
    _model("OPT-13B", 40, 5120, (40, 40, 128), 20480, 50272, gated=False, tied=True),
    _model("OPT-30B", 48, 7168, (56, 56, 128), 28672, 50272, gated=False, tied=True),
    _model("OPT-66B", 64, 9216, (72, 72, 128), 36864, 50272, gated=False, tied=True),
    _model("Command-R", 40, 8192, (64, 64, 128), 22528, 256000, tied=True),
    # Grouped heads: KV is mostly smaller than hidden states.
    _model("Llama-2-70B", 80, 8192, (64, 8, 128), 28672, 32000),
    _model("Llama-3-8B", 32, 4096, (32, 8, 128), 14336, 128256),
    _model("Llama-3-70B", 80, 8192, (64, 8, 128), 28672, 128256),
    _model("Llama-3.1-8B", 32, 4096, (32, 8, 128), 14336, 128256),
    _model("Llama-3.1-70B", 80, 8192, (64, 8, 128), 28672, 128256),
    _model("Llama-3.1-405B", 126, 16384, (128, 8, 128), 53248, 128256),
    _model("Llama-3.2-1B", 16, 2048, (32, 8, 64), 8192, 128256, tied=True),
    _model("Llama-3.2-3B", 28, 3072, (24, 8, 128), 8192, 128256, tied=True),
    _model("Llama-3.3-70B", 80, 8192, (64, 8, 128), 28672, 128256),
    _model("Qwen1.5-32B", 64, 5120, (40, 8, 128), 27392, 152064),
    _model("Qwen2-7B", 28, 3584, (28, 4, 128), 18944, 152064),
    _model("Qwen2-72B", 80, 8192, (64, 8, 128), 29568, 152064),
    _model("Qwen2.5-0.5B", 24, 896, (14, 2, 64), 4864, 151936, tied=True),
    _model("Qwen2.5-1.5B", 28, 1536, (12, 2, 128), 8960, 151936, tied=True),
    _model("Qwen2.5-3B", 36, 2048, (16, 2, 128), 11008, 151936, tied=True),
    _model("Qwen2.5-7B", 28, 3584, (28, 4, 128), 18944, 152064),
    _model("Qwen2.5-14B", 48, 5120, (40, 8, 128), 13824, 152064),
    _model("Qwen2.5-32B", 64, 5120, (40, 8, 128), 27648, 152064),
    _model("Qwen2.5-72B", 80, 8192, (64, 8, 128), 29568, 152064),
    _model("Qwen3-0.6B", 28, 1024, (16, 8, 128), 3072, 151936, tied=True),
    _model("Qwen3-1.7B", 28, 2048, (16, 8, 128), 6144, 151936, tied=True),
    _model("Qwen3-4B", 36, 2560, (32, 8, 128), 9728, 151936, tied=True),
    _model("Qwen3-8B", 36, 4096, (32, 8, 128), 12288, 151936),
    _model("Qwen3-14B", 40, 5120, (40, 8, 128), 17408, 151936),
    _model("Qwen3-32B", 64, 5120, (64, 8, 128), 25600, 151936),
    _model("Qwen3-30B-A3B", 48, 2048, (32, 4, 128), 768, 151936, experts=(128, 8)),
    _model("Qwen3-235B-A22B", 94, 4096, (64, 4, 128), 1536, 151936, experts=(128, 8)),
    _model("Mistral-7B", 32, 4096, (32, 8, 128), 14336, 32000),
    _model("Mistral-Nemo-12B", 40, 5120, (32, 8, 128), 14336, 131072),
    _model("Mistral-Small-24B", 40, 5120, (32, 8, 128), 32768, 131072),
    _model("Mistral-Large-123B", 88, 12288, (96, 8, 128), 28672, 32768),
    _model("Mixtral-8x7B", 32, 4096, (32, 8, 128), 14336, 32000, experts=(8, 2)),
    _model("Mixtral-8x22B", 56, 6144, (48, 8, 128), 16384, 32768, experts=(8, 2)),
    _model("Gemma-2B", 18, 2048, (8, 1, 256), 16384, 256000, tied=True),
    _model("Gemma-2-2B", 26, 2304, (8, 4, 256), 9216, 256000, windowed=(13, 4096), tied=True),
    _model("Gemma-2-9B", 42, 3584, (16, 8, 256), 14336, 256000, windowed=(21, 4096), tied=True),
    _model("Gemma-2-27B", 46, 4608, (32, 16, 128), 36864, 256000, windowed=(23, 4096), tied=True),
    _model("Gemma-3-4B", 34, 2560, (8, 4, 256), 10240, 262208, windowed=(29, 1024), tied=True),
    _model("Gemma-3-12B", 48, 3840, (16, 8, 256), 15360, 262208, windowed=(40, 1024), tied=True),
    _model("Gemma-3-27B", 62, 5376, (32, 16, 128), 21504, 262208, windowed=(52, 1024), tied=True),
    _model("OLMo-2-32B", 64, 5120, (40, 8, 128), 27648, 100352),
    _model("Phi-3-medium", 40, 5120, (40, 10, 128), 17920, 32064),
    _model("Phi-4", 40, 5120, (40, 10, 128), 17920, 100352),
    _model("Phi-4-mini", 32, 3072, (24, 8, 128), 8192, 200064, tied=True),
    _model("Falcon-7B", 32, 4544, (71, 1, 64), 18176, 65024, gated=False, tied=True),
    _model("Falcon-40B", 60, 8192, (128, 8, 64), 32768, 65024, gated=False, tied=True),
    _model("Yi-6B", 32, 4096, (32, 4, 128), 11008, 64000),
    _model("Yi-34B", 60, 7168, (56, 8, 128), 20480, 64000),
    _model("InternLM2-7B", 32, 4096, (32, 8, 128), 14336, 92544),
    _model("InternLM2-20B", 48, 6144, (48, 8, 128), 16384, 92544),
    _model("StableLM-2-12B", 40, 5120, (32, 8, 160), 13824, 100352),
    _model("Command-R-Plus", 64, 12288, (96, 8, 128), 33792, 256000, tied=True),
    _gpt_oss("gpt-oss-20b", 24, 32),
    _gpt_oss("gpt-oss-120b", 36, 128),
    _model("GLM-4-9B", 40, 4096, (32, 2, 128), 13696, 151552),
    # Multi-head latent attention: the latent is smaller than either.
    _model("DeepSeek-V2", 60, 5120, (128, 128, 128), 1536, 102400, experts=(162, 8), latent=_DEEPSEEK),
    _model("DeepSeek-V2-Lite", 27, 2048, (16, 16, 128), 1408, 102400, experts=(66, 8), latent=Latent(512, 64, 128)),
    _model("DeepSeek-V3", 61, 7168, (128, 128, 128), 2048, 129280, experts=(257, 9), latent=_DEEPSEEK, weight_bits=8),
    _model("Kimi-K2", 61, 7168, (64, 64, 128), 2048, 163840, experts=(385, 9), latent=_DEEPSEEK, weight_bits=8),
    _model("MiniCPM3-4B", 62, 2560, (40, 40, 64), 6400, 73448, latent=Latent(256, 32, 64, 768), tied=True),
)

ARCHITECTURES = {shape.name: shape for shape in _ALL}

# Names of others that are of the same shape, to the byte. DeepSeek-V3.2 is not: its attention is sparse.
ALIASES = {"DeepSeek-V2.5": "DeepSeek-V2", "DeepSeek-V3.1": "DeepSeek-V3", "DeepSeek-R1": "DeepSeek-V3"}
