"""The testbeds of HCache and HybridServe: hardware, models, lengths, and where each value comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_hcache.planner import machine as machines
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.machine import Machine, machine_of
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit


@dataclass(frozen=True)
class Constants:
    """Each has its reason in `REASONS`."""

    gemm_efficiency: float = machines.GEMM_EFFICIENCY
    attention_efficiency: float = machines.ATTENTION_EFFICIENCY
    memory_efficiency: float = machines.MEMORY_EFFICIENCY
    link_efficiency: float = machines.LINK_EFFICIENCY
    drive_bytes_per_s: float = 6.9e9
    drive_writes_per_s: float = 200e3
    reference_tokens: int = 4096
    chat_prompt_tokens: int = 161
    chat_answer_tokens: int = 338
    question_tokens: int = 64
    host_bytes: float = 256e9
    offload_context_tokens: int = 1024
    offload_gpu: str = "RTX-4090"
    overlaps: bool = False  # the prompt is prefilled while upper layers are restored


REASONS = {
    "gemm_efficiency": "stated: cuBLAS reaches 0.65 to 0.8 of the dense peak in large 16-bit products",
    "attention_efficiency": "stated: FlashAttention-2 reaches 0.5 to 0.7 of the A100's peak, less on paged KV",
    "memory_efficiency": "stated: device memory delivers 0.8 to 0.9 of its datasheet in streaming reads",
    "link_efficiency": "stated: pinned copies over PCIe 4.0 x16 reach about 25 of 31.5 GB/s",
    "drive_bytes_per_s": "HCache's testbed",
    "drive_writes_per_s": "datasheets of data-centre NVMe of that class: 4-KiB random writes",
    "reference_tokens": "stated: the context for which the save plan is made; L-Eval's shortest, Llama-2's window",
    "chat_prompt_tokens": "mean of ShareGPT as the vLLM paper gives it",
    "chat_answer_tokens": "mean of ShareGPT as the vLLM paper gives it",
    "question_tokens": "stated: a question about a long document",
    "host_bytes": "HCache's testbed; stated for HybridServe",
    "offload_context_tokens": "stated for HybridServe",
    "offload_gpu": "stated for HybridServe; a consumer card is what weights are offloaded for",
    "overlaps": "stated: the paper ends the restoration before the prompt is prefilled",
    "GPU datasheets": "sglang_hcache/planner/machine.py; HCache: A100-40GB",
    "I/O-rich hardware": "stated: A30 (half the A100's compute) restoring from host memory",
    "compute-rich hardware": "stated: A100-40GB with one of the drives",
}

PAPER_MODELS = {"Llama-2-7B": (1, 4096), "Llama-2-13B": (1, 4096), "OPT-30B": (4, 2048)}  # ranks, window in tokens
OFFLOADED_MODELS = ("OPT-6.7B", "OPT-13B", "OPT-30B", "OPT-66B")
LEVAL_TOKENS = range(4096, 16385, 1024)


def paper_machine(constants: Constants, gpu: str = "A100-40", *, ranks: int = 1, drives: int = 4) -> Machine:
    made = machine_of(
        gpu,
        ranks=ranks,
        drives=drives,
        drive_bytes_per_s=constants.drive_bytes_per_s,
        streams=True,
    )
    gemm = constants.gemm_efficiency / machines.GEMM_EFFICIENCY
    return replace(
        made,
        gemm_flop_per_s=made.gemm_flop_per_s * gemm,
        projection_flop_per_s=made.projection_flop_per_s * gemm,
        attention_flop_per_s=made.attention_flop_per_s
        * constants.attention_efficiency
        / machines.ATTENTION_EFFICIENCY,
        memory_bytes_per_s=made.memory_bytes_per_s * constants.memory_efficiency / machines.MEMORY_EFFICIENCY,
        bus_bytes_per_s=made.bus_bytes_per_s * constants.link_efficiency / machines.LINK_EFFICIENCY,
        peer_bytes_per_s=made.peer_bytes_per_s * constants.link_efficiency / machines.LINK_EFFICIENCY,
    )


def paper_costs(shape: ModelShape, machine: Machine) -> Costs:
    """HCache's ranks each copy their share of the hidden states, and gather them before they project."""
    costs, ranks = costs_of(shape, machine), machine.ranks
    gather_s = shape.activation_bytes * (ranks - 1) / ranks / machine.peer_bytes_per_s
    return replace(
        costs,
        hidden_bus_s_per_token=costs.hidden_bus_s_per_token / ranks,
        projection_s_per_token=costs.projection_s_per_token + gather_s,
    )


def histories(trace: str, window_tokens: int, constants: Constants) -> list[Hit]:
    """What the requests of a trace restore, and their new tokens."""
    if trace == "L-Eval":
        return [Hit(1, 0, tokens, new_tokens=constants.question_tokens) for tokens in LEVAL_TOKENS]
    turn = constants.chat_prompt_tokens + constants.chat_answer_tokens
    return [
        Hit(1, 0, tokens, new_tokens=constants.chat_prompt_tokens)
        for tokens in range(turn, window_tokens - turn + 1, turn)
    ]
