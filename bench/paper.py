"""What HCache and HybridServe published, against a simulation of their testbeds with this project's planner.

    python -m bench.paper [--json] [--save]

Method: `sglang_hcache.planner` is given the testbeds' shapes and datasheets, and the stated efficiencies of
`constants`, each with its reason; nothing is fitted. Save plans come from `plan_save`, times from the event
simulation. One request at a time: queues would add what the paper does not give. A range's low and high end are
compared with the least and the greatest of the models. A restoration ends before the prompt is prefilled, as the
paper separates the two; all methods restore layer by layer from four drives. `rel_err` is |simulated - published| /
published. `mean_abs_rel_err` leaves out rows that hold by definition. `sensitivity` repeats everything with one
constant changed; `under_load` lets requests come at random, so that they wait for each other.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.report import about, arguments_of, emit
from bench.simulate import Arrival, Method, Restore, simulate
from bench.testbeds import OFFLOADED_MODELS, PAPER_MODELS, REASONS, Constants, histories, paper_costs, paper_machine
from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout, restore_s

GOAL = 0.15
REQUESTS = 400  # under load


@dataclass(frozen=True)
class Row:
    source: str
    figure: str
    end: str  # of a published range; "value" if it is none
    published: float
    simulated: float
    rel_err: float
    note: str = ""
    by_definition: bool = False


def row(source: str, figure: str, end: str, published: float, simulated: float, note: str = "", **more: bool) -> Row:
    return Row(source, figure, end, published, simulated, abs(simulated - published) / published, note, **more)


def paper_layout(costs: Costs, constants: Constants) -> Layout:
    """The paper balances the restoration alone, of the whole context."""
    return plan_save(restoration_only(costs), reference(constants, drives=True), splits=False).layout


def reference(constants: Constants, *, drives: bool) -> Hit:
    tokens = constants.reference_tokens
    return Hit(1, 0, tokens) if drives else Hit(1, tokens)


def restoration_only(costs: Costs) -> Costs:
    return replace(costs, layer_pass_s=0.0, head_s=0.0)


def mean_ttft_s(costs: Costs, hits: list[Hit], method: Method) -> float:
    """Far apart in time, so that none waits for another."""
    return statistics.mean(simulate(costs, [Arrival(1e4 * index, hit) for index, hit in enumerate(hits)], method))


def first_token_rows(constants: Constants) -> Iterator[Row]:
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    stored: dict[str, float] = {}
    for name, (ranks, window) in PAPER_MODELS.items():
        shape = ARCHITECTURES[name]
        costs = paper_costs(shape, paper_machine(constants, ranks=ranks))
        layout = paper_layout(costs, constants)
        stored[name] = shape.layers * shape.kv_bytes / layout.bytes_per_token(shape)
        for trace in ("ShareGPT4", "L-Eval"):
            hits = histories(trace, window, constants)
            ours_s = mean_ttft_s(costs, hits, Method(layout, Restore.ALL, overlaps=constants.overlaps))
            kv = Method(Layout(0, 0, shape.layers), Restore.ALL, overlaps=constants.overlaps)
            ratios.setdefault((trace, "KV offload"), {})[name] = mean_ttft_s(costs, hits, kv) / ours_s
            alone = Method(layout, Restore.NOTHING)
            ratios.setdefault((trace, "recompute"), {})[name] = mean_ttft_s(costs, hits, alone) / ours_s
    published = {
        ("ShareGPT4", "KV offload"): (1.27, 1.90),
        ("ShareGPT4", "recompute"): (2.21, 3.57),
        ("L-Eval", "KV offload"): (1.62, 1.93),
        ("L-Eval", "recompute"): (2.66, 5.73),
    }
    notes = {
        ("ShareGPT4", "KV offload"): "high end: the paper's comes with loads and histories it does not give; "
        "with a mean history of four turns the prompt's prefill, the same for both, dilutes the ratio; load does so "
        "further (`under_load`). 1.90 needs histories longer than the models' windows",
        (
            "L-Eval",
            "recompute",
        ): "the simulated baseline pays attention at the stated efficiency on 16K contexts; the "
        "paper's low end means that OPT-30B (window 2048) recomputes faster, or restores slower, than datasheets say",
    }
    for (trace, baseline), (low, high) in published.items():
        figure, found = f"{trace}: TTFT of {baseline} over HCache's", ratios[trace, baseline]
        yield from ends("HCache", figure, (low, high), found, notes.get((trace, baseline), ""))
    note = "bytes a token of KV offload over HCache's; the layouts follow from the balance at the stated efficiencies"
    yield from ends("HCache", "storage: KV offload over HCache", (1.92, 2.40), stored, note)


def ends(source: str, figure: str, range_: tuple[float, float], found: dict[str, float], note: str) -> Iterator[Row]:
    by_model = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    text = f"{by_model}. {note}" if note else by_model
    yield row(source, figure, "low", range_[0], min(found.values()), text)
    yield row(source, figure, "high", range_[1], max(found.values()), text)


def scheduler_rows(constants: Constants) -> Iterator[Row]:
    gains, against_kv = {}, {}
    for name in ("Llama-2-7B", "Llama-2-13B"):
        shape = ARCHITECTURES[name]
        for kind, gpu, drives in (("I/O-rich", "A30", 0), ("compute-rich", "A100-40", 1)):
            costs = restoration_only(paper_costs(shape, paper_machine(constants, gpu, drives=drives)))
            hit = reference(constants, drives=drives > 0)
            hidden_s = float(restore_s(costs, (0, shape.layers, 0), hit, constants.reference_tokens))
            gains[f"{name} {kind}"] = hidden_s / plan_save(costs, hit, splits=False).seconds
            if kind == "I/O-rich":
                kv_s = float(restore_s(costs, (0, 0, shape.layers), hit, constants.reference_tokens))
                against_kv[name] = hidden_s / kv_s
    note = "over the two models and the two kinds of hardware, which are assumed (see constants)"
    yield from ends("HCache", "scheduler: hidden states alone over the mix", (1.35, 1.64), gains, note)
    by_model = ", ".join(f"{name} {value:.2f}" for name, value in against_kv.items())
    yield row(
        "HCache",
        "I/O-rich hardware without the scheduler: time over KV offload's",
        "value",
        1.13,
        max(against_kv.values()),
        f"the worse of the models: {by_model}",
    )


def decode_rows(constants: Constants) -> Iterator[Row]:
    """Time between tokens of the largest batch of average chats that an A100-40GB holds beside Llama-2-7B."""
    shape = ARCHITECTURES["Llama-2-7B"]
    machine = paper_machine(constants)
    costs = paper_costs(shape, machine)
    context = 4 * (constants.chat_prompt_tokens + constants.chat_answer_tokens)
    kv_bytes = shape.layers * shape.kv_bytes * context
    batch = int((40e9 - shape.layers * shape.layer_weight_bytes - 2 * shape.head_weight_bytes) / kv_bytes)
    step_s = shape.layers * (costs.layer_pass_s + batch * costs.linear_s_per_token) + costs.head_s
    step_s += batch * kv_bytes / machine.memory_bytes_per_s
    saved_bytes = batch * shape.layers * shape.hidden_bytes
    copy_s = saved_bytes / machine.bus_bytes_per_s
    staged_s = max(step_s + saved_bytes / machine.memory_bytes_per_s, copy_s)
    yield row(
        "HCache",
        "time between tokens with two-stage saving over without",
        "at most",
        1.04,
        staged_s / step_s,
        f"batch {batch}: the copy runs beside the step, which it only takes device memory's bandwidth from. The "
        "published value is a bound; kernels and copies that get in each other's way are not modelled",
    )
    direct_s = step_s + saved_bytes / 4096 / (4 * constants.drive_writes_per_s)
    yield row(
        "HCache",
        "time between tokens with direct writes to SSD over without",
        "value",
        1.34,
        direct_s / step_s,
        f"batch {batch}: each sequence and layer writes a row of its own, at the drives' random rate, before the "
        "step ends. What submitting and awaiting a write costs the forward pass is in no datasheet: this is too low",
    )


def offload_rows(constants: Constants) -> Iterator[Row]:
    """Weights and cache in host memory: tokens a second, of the best mix over KV alone."""
    by_gpu = {}
    for gpu in ("RTX-4090", "A100-40"):
        machine = paper_machine(constants, gpu, drives=0)
        found = {}
        for name in OFFLOADED_MODELS:
            shape = ARCHITECTURES[name]
            rates = [offloaded_tokens_per_s(shape, machine, hidden, constants) for hidden in range(shape.layers + 1)]
            found[name] = max(rates) / rates[0]
        by_gpu[gpu] = found
    texts = [f"{gpu}: " + ", ".join(f"{n} {v:.2f}" for n, v in found.items()) for gpu, found in by_gpu.items()]
    yield row(
        "HybridServe",
        "throughput over KV alone",
        "value",
        2.19,
        statistics.geometric_mean(by_gpu[constants.offload_gpu].values()),
        f"geometric mean on the {constants.offload_gpu}. {'; '.join(texts)}. Half the bytes hold twice the batch in "
        "the same host memory, so 2 is the limit of this model; more must come from the baseline's overheads "
        "(bubbles, small batches), which are not modelled. GPU, host memory and lengths are assumed",
    )
    shape = ARCHITECTURES["OPT-30B"]
    yield row(
        "HybridServe",
        "bytes of an activation block over a KV block",
        "value",
        0.5,
        shape.hidden_bytes / shape.kv_bytes,
        "holds for every model without grouped heads",
        by_definition=True,
    )


def offloaded_tokens_per_s(shape: ModelShape, machine: Machine, hidden: int, constants: Constants) -> float:
    """With `hidden` layers cached as activations, in steps of as many sequences as host memory holds."""
    costs = costs_of(shape, machine, offloaded=1.0)
    layout = Layout(0, hidden, shape.layers - hidden)
    free_bytes = constants.host_bytes - shape.layers * shape.layer_weight_bytes - 2 * shape.head_weight_bytes
    cached = free_bytes / layout.bytes_per_token(shape)
    batch = cached / constants.offload_context_tokens
    attention_s = cached * shape.kv_bytes / machine.memory_bytes_per_s
    compute_s = shape.layers * (costs.layer_pass_s + batch * costs.linear_s_per_token + attention_s)
    compute_s += hidden * costs.project_s(cached)
    copies_s = shape.layers * costs.weights_bus_s + cached * (
        layout.hidden * costs.hidden_bus_s_per_token + layout.kv * costs.kv_bus_s_per_token
    )
    return float(batch / max(compute_s, copies_s))


NOT_SIMULATED = {
    "balance bandwidths": "no figure to compare with",
    "SGLang HiCache 6× throughput, -80 % TTFT; vLLM offload 2–22×; Cake 2.6×; Strata 5×; Bidaw 3.58×, 1.83×": "other "
    "systems, whose testbeds and workloads are not modelled",
    "SGLang issues (seconds, all-reduce shares)": "reports of faults, not rates",
}


def rows_of(constants: Constants) -> list[Row]:
    return [
        *first_token_rows(constants),
        *decode_rows(constants),
        *scheduler_rows(constants),
        *offload_rows(constants),
    ]


def mean_error(rows: list[Row]) -> float:
    return statistics.mean(one.rel_err for one in rows if not one.by_definition)


def sensitivity() -> dict[str, float]:
    """The mean error with one constant changed, to show that none was picked for it."""
    found = {}
    for name in (
        "gemm_efficiency",
        "attention_efficiency",
        "memory_efficiency",
        "link_efficiency",
        "reference_tokens",
    ):
        for factor in (0.85, 1.15):
            value = getattr(Constants(), name)
            changed = replace(Constants(), **{name: type(value)(value * factor)})
            found[f"{name} × {factor}"] = mean_error(rows_of(changed))
    found["overlaps"] = mean_error(rows_of(replace(Constants(), overlaps=True)))
    found["offload_gpu A100-40"] = mean_error(rows_of(replace(Constants(), offload_gpu="A100-40")))
    return found


def under_load() -> dict[str, dict[str, float]]:
    """KV offload's mean time to first token over HCache's, when restoring KV keeps its stages so busy."""
    constants, found = Constants(), dict[str, dict[str, float]]()
    for name, (ranks, window) in PAPER_MODELS.items():
        shape = ARCHITECTURES[name]
        costs = paper_costs(shape, paper_machine(constants, ranks=ranks))
        ours = Method(paper_layout(costs, constants), Restore.ALL, overlaps=False)
        kv = Method(Layout(0, 0, shape.layers), Restore.ALL, overlaps=False)
        for trace in ("ShareGPT4", "L-Eval"):
            hits, ratios = histories(trace, window, constants), {}
            for busy in (0.3, 0.5, 0.7):
                chance, at_s, arrivals = random.Random(1), 0.0, []
                for _ in range(REQUESTS):
                    at_s += chance.expovariate(busy / mean_ttft_s(costs, hits, kv))
                    arrivals.append(Arrival(at_s, chance.choice(hits)))
                kv_s, ours_s = (statistics.mean(simulate(costs, arrivals, method)) for method in (kv, ours))
                ratios[f"{busy:.0%} busy"] = kv_s / ours_s
            found[f"{trace}, {name}"] = ratios
    return found


def report() -> dict[str, Any]:
    rows = rows_of(Constants())
    constants: dict[str, Any] = {
        name: {"value": value, "reason": REASONS[name]} for name, value in asdict(Constants()).items()
    }
    constants |= {name: {"reason": reason} for name, reason in REASONS.items() if name not in constants}
    return {
        "mean_abs_rel_err": mean_error(rows),
        "goal": GOAL,
        "rows": [asdict(one) for one in rows],
        "not_simulated": NOT_SIMULATED,
        "constants": constants,
        "sensitivity": sensitivity(),
        "under_load": under_load(),
        **about(__doc__),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    for one in found["rows"]:
        what = f"{one['source']}: {one['figure']} ({one['end']})"
        yield f"{what:<80} {one['published']:6.2f} {one['simulated']:6.2f} {one['rel_err']:7.1%}"
    yield f"mean of the relative errors: {found['mean_abs_rel_err']:.1%} (goal: at most {GOAL:.0%})"
    worst = max(found["sensitivity"].values())
    yield f"with any one constant 15 % lower or higher: at most {worst:.1%}"


def main() -> None:
    arguments = arguments_of(__doc__).parse_args()
    found = report()
    emit(arguments, "paper", found, lines(found))


if __name__ == "__main__":
    main()
