"""Plan what to store of a model on given hardware, how long restoring takes, and which upgrade would help most.

Nothing is measured: rates are datasheet values times fixed efficiencies (docs/planner.md), unless given.
Exit status: 0; 2 bad arguments; 3 the model or the GPU is not known or not supported.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Container
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sglang_hcache.cli.architectures import ALIASES, ARCHITECTURES
from sglang_hcache.cli.common import CommandFailed, count, explain, human, print_json
from sglang_hcache.cli.forecast import hit_of, limit, stored_line, times
from sglang_hcache.config import DEFAULT_PAGE_SIZE
from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.hf_config import QUANTISED, UnknownConfig, shape_of_config, why_not_hidden
from sglang_hcache.planner.machine import GPUS, Machine, machine_of
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout

LENGTHS = [1024 << step for step in range(8)]  # tokens
MOST_TOKENS = 1 << 24  # no model takes as many, and planning for more takes seconds
METHODS = ("recompute", "kv", "hidden", "plan")
RESERVED = 0.1  # of the GPUs' memory: activations and CUDA graphs
LEAST_POOL = 0.1  # of it: with less for the KV pool few requests fit
# Of names of the same shape: tuning, precision, a date, v0.1. Other versions are other models.
_SUFFIXES = re.compile(r"[-_](hf|chat|instruct|it|base|v0\.\d|\d{4}|bf16|fp16)$")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a config.json, its folder, or a name such as Llama-2-7B")
    parser.add_argument("--list", action=_List, nargs=0, help="print the known model names, and exit")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--tp", type=_at_least(1), default=1, metavar="N", help="tensor-parallel ranks (default: 1)")
    parser.add_argument(
        "--bus-gb-s",
        type=_rate,
        metavar="GB/S",
        help="host-to-device rate per GPU (default: from its PCIe generation)",
    )
    parser.add_argument(
        "--drives", type=_at_least(0), default=1, metavar="N", help="number of NVMe drives (default: 1)"
    )
    parser.add_argument(
        "--drive-gb-s", type=_rate, default=7.0, metavar="GB/S", help="read rate of one drive (default: 7)"
    )
    parser.add_argument(
        "--offload",
        type=_part,
        default=0.0,
        metavar="PART",
        help="fraction of the weights kept in host memory, 0 to 1",
    )
    parser.add_argument(
        "--weight-bits",
        type=_bits,
        metavar="BITS",
        help="of a parameter of the layers, such as 8 or 4.25 (default: as the model was released)",
    )
    parser.add_argument(
        "--tokens",
        type=_lengths,
        default=[8192],
        metavar="N[,N…]",
        help="prefix lengths to plan for (default: 8k, which is 8192)",
    )
    parser.add_argument(
        "--new-tokens",
        type=_at_least(1),
        default=64,
        metavar="N",
        help="prompt tokens after the prefix (default: 64)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the times to FILE; needs matplotlib")


def run(arguments: argparse.Namespace) -> int:
    shape = find_shape(arguments.model)
    if arguments.weight_bits is not None:
        shape = replace(shape, weight_bits=arguments.weight_bits)
    gpu = find_gpu(arguments.gpu)
    machine = find_machine(gpu, arguments)
    _refuse_what_no_server_serves(shape, machine.ranks)
    not_hidden = find_why_not_hidden(arguments.model) or (QUANTISED if 0 < (arguments.weight_bits or 0) < 16 else "")
    report = advise(shape, machine, arguments, not_hidden=not_hidden)
    report["weights"] = weights(shape, machine.ranks * GPUS[gpu].memory_bytes, arguments.offload)
    if arguments.plot is not None:
        plot(report, arguments.plot)
    if arguments.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def _refuse_what_no_server_serves(shape: ModelShape, ranks: int) -> None:
    kv_heads = shape.query_heads if shape.latent is not None else shape.kv_heads
    if shape.query_heads % ranks or max(ranks, kv_heads) % min(ranks, kv_heads):
        heads = f"{count(shape.query_heads, 'query head')}, {count(kv_heads, 'KV head')}"
        raise CommandFailed(f"--tp {ranks} does not divide the heads of {shape.name}: {heads}")


def find_shape(model: str) -> ModelShape:
    """Raises `CommandFailed`."""
    path = _path_of_config(model)
    if path.is_file():
        try:
            config = _config_at(path)
            return shape_of_config(config, str(config.get("_name_or_path") or path.parent.name or model))
        except (OSError, ValueError) as error:
            raise CommandFailed(explain(error, path)) from error
    names = {name.lower(): shape for name, shape in ARCHITECTURES.items()}
    names |= {name.lower(): ARCHITECTURES[same] for name, same in ALIASES.items()}
    wanted = _known(model, names)
    if wanted in names:
        return names[wanted]
    if path.suffix == ".json" or model.startswith((".", "/", "~")):
        raise CommandFailed(f"{path} does not exist")
    close = dict.fromkeys(names[name].name for name in difflib.get_close_matches(wanted, names, n=6, cutoff=0.4))
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise CommandFailed(
        f"{model!r} is neither a known model nor a file; {hint}`hcache advise --list` prints all names"
    )


def find_why_not_hidden(model: str) -> str:
    """Of a model that `find_shape` has found."""
    path = _path_of_config(model)
    return why_not_hidden(_config_at(path)) if path.is_file() else ""


def _path_of_config(model: str) -> Path:
    path = Path(os.path.expanduser(model))
    return path / "config.json" if path.is_dir() else path


def _config_at(path: Path) -> dict[str, Any]:
    """Raises OSError or ValueError."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise UnknownConfig("it is not a JSON object")
    return config


def find_machine(gpu: str, arguments: argparse.Namespace) -> Machine:
    return machine_of(
        gpu,
        ranks=arguments.tp,
        drives=arguments.drives,
        drive_bytes_per_s=1e9 * arguments.drive_gb_s,
        bus_bytes_per_s=1e9 * arguments.bus_gb_s if arguments.bus_gb_s else None,
    )


def find_gpu(text: str) -> str:
    """A name of `GPUS`. Raises `CommandFailed`."""
    known = {name.lower(): name for name in GPUS}
    name = known.get(text.lower().replace(" ", "-"))
    if name is None:
        raise CommandFailed(f"no GPU {text!r}; known are {', '.join(GPUS)}")
    return name


def advise(
    shape: ModelShape, machine: Machine, arguments: argparse.Namespace, *, not_hidden: str = ""
) -> dict[str, Any]:
    """What `--json` prints. Times are seconds to the first token; `not_hidden`: why no hidden states are stored."""
    costs, new_tokens = costs_of(shape, machine, offloaded=arguments.offload), arguments.new_tokens
    tiers = ["host", "ssd"] if arguments.drives else ["host"]
    planned = {tier: [hit_of(tokens, tier, new_tokens) for tokens in arguments.tokens] for tier in tiers}
    layout, stored_for = Layout(shape.layers, 0, 0), None
    for tier in reversed(tiers):
        layout = plan_save(
            costs,
            *planned[tier],
            layerwise=False,
            mixed=machine.ranks == 1,
            hidden=not not_hidden,
        ).layout
        if layout.hidden + layout.kv:
            stored_for = tier
            break
    return {
        "model": asdict(shape),
        "machine": {name: value if value != float("inf") else None for name, value in asdict(machine).items()},
        "layers": [
            {"representation": kind, "first_layer": first, "last_layer": last}
            for kind, first, last in layout.ranges()
        ],
        "not_hidden": not_hidden or None,
        "planned_for": stored_for,
        "planned_tokens": arguments.tokens,
        "bytes_per_token": {
            "plan": layout.bytes_per_token(shape, machine.ranks),
            "kv": shape.layers * shape.kv_bytes * shape.kv_copies(machine.ranks),
            "hidden": shape.layers * shape.hidden_bytes,
        },
        "times": {
            tier: [times(costs, layout, hit_of(tokens, tier, new_tokens)) for tokens in LENGTHS] for tier in tiers
        },
        "limits": {
            tier: limit(
                shape,
                machine,
                planned[tier],
                tier=tier,
                drives=arguments.drives,
                offloaded=arguments.offload,
                hidden=not not_hidden,
            )
            for tier in tiers
        },
    }


def weights(shape: ModelShape, device_bytes: float, offloaded: float) -> dict[str, Any]:
    """Bytes of weights that the GPUs must hold, their memory, whether it suffices, and what the KV pool can have."""
    needed = shape.weight_bytes - offloaded * shape.layers * shape.layer_weight_bytes
    return {
        "bytes": int(needed),
        "device_bytes": int(device_bytes),
        "fit": needed <= device_bytes,
        "pool_bytes": int(max(0, (1 - RESERVED) * device_bytes - needed)),
    }


def print_report(report: dict[str, Any]) -> None:
    model, machine = report["model"], report["machine"]
    bits = f" ({model['weight_bits']:g} bits a weight)" if model["weight_bits"] else ""
    bus = machine["bus_bytes_per_s"] / 1e9
    print(f"{model['name']}{bits} on {machine['name']}, host to device {bus:.1f} GB/s", end="")
    drives = machine["ssd_bytes_per_s"]
    print(f", drives {drives / 1e9:.1f} GB/s" if drives else ", no drives")
    _print_lack_of_memory(**report["weights"])
    for one in report["layers"]:
        print(stored_line(one["representation"], one["first_layer"], one["last_layer"]))
    if report["not_hidden"]:
        print(f"  no hidden states: {report['not_hidden']}")
    sizes = report["bytes_per_token"]
    share = sizes["plan"] / sizes["kv"]
    print(
        f"  {human(sizes['plan'])} a token, {share:.2f} of KV ({human(sizes['kv'])}; hidden {human(sizes['hidden'])})"
    )
    for tier, rows in report["times"].items():
        print(f"\nfrom {'SSD' if tier == 'ssd' else 'host memory'}, ms to the first token")
        print(f"{'tokens':>8}" + "".join(f"{method:>11}" for method in METHODS) + "   restored   on idle")
        for row in rows:
            shown = "".join(f"{1000 * row[method + '_s']:11.1f}" for method in METHODS)
            print(
                f"{row['tokens']:8}{shown}{row['restored_tokens'] / row['tokens']:10.0%}{1000 * row['idle_s']:11.1f}"
            )
        print(report["limits"][tier]["text"])


def _print_lack_of_memory(bytes: int, device_bytes: int, fit: bool, pool_bytes: int) -> None:
    weights, memory = f"its weights ({human(bytes)})", f"the GPUs' memory ({human(device_bytes)})"
    if not fit:
        print(f"  {weights} do not fit in {memory}: raise --tp, or set --offload.")
        print("  The times below assume that they fit.")
    elif pool_bytes < LEAST_POOL * device_bytes:
        left = human(pool_bytes) if pool_bytes else "nothing"
        print(f"  {weights} leave {left} of {memory} for the KV pool: raise --tp, or set --offload.")


def plot(report: dict[str, Any], file: Path) -> None:
    """Raises `CommandFailed`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandFailed("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6 * len(report["times"]), 4.5), layout="constrained")
    axes = figure.subplots(1, len(report["times"]), squeeze=False)[0]
    for panel, (tier, rows) in zip(axes, report["times"].items(), strict=True):
        for method in METHODS:
            style = {"linewidth": 3} if method == "plan" else {"linestyle": "--"}
            panel.loglog([row["tokens"] for row in rows], [row[method + "_s"] for row in rows], label=method, **style)
        panel.set(title=f"from {tier}", xlabel="tokens", ylabel="s to the first token")
        panel.legend()
    figure.suptitle(f"{report['model']['name']} on {report['machine']['name']}")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise CommandFailed(explain(error, file)) from error


def _known(name: str, names: Container[str]) -> str:
    """One of the names, if it is: meta-llama/Llama-2-7b-chat-hf is llama-2-7b."""
    name = name.rstrip("/").split("/")[-1].lower()
    while name not in names and (shorter := _SUFFIXES.sub("", name)) != name:
        name = shorter
    return name


def _at_least(least: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def _lengths(text: str) -> list[int]:
    return [_length(part) for part in text.split(",")]


def _length(text: str) -> int:
    """Tokens, from 8192, or 8k for as many."""
    match = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    tokens = int(match[1]) * (1024 if match[2] else 1) if match else 0
    if not DEFAULT_PAGE_SIZE <= tokens <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens from {DEFAULT_PAGE_SIZE} to {MOST_TOKENS}, such as 8192 or 8k"
        )
    return tokens


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("\n".join(ARCHITECTURES), flush=True)
        parser.exit()


def _number(what: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


_rate = _number("a rate in GB/s", lambda rate: 0 < rate < 1e6)
_bits = _number("a number of bits from 1 to 32", lambda bits: 1 <= bits <= 32)
_part = _number("between 0 and 1", lambda part: 0 <= part <= 1)
