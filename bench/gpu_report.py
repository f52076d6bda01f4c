"""What the figures of `bench.gpu_restore` say: comparisons, a line for each figure, and a short table of goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.exactness import MOST_ERROR, is_right

# Tokens; shorter restores and products are measured, but have no goal.
RESTORES_FROM, PRODUCTS_FROM = 4096, 1024

COPIERS = ("by engine", "by kernel")
CAPTURES = {"prefill": "3 %", "decode": "1 %", "decode, staged by copies": "1 %"}
KINDS = ("restore hidden", "restore KV", "prefill")


def compare(sections: dict[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """By model: KV's time over hidden's, prefill's over hidden's, and from which length on restoring is faster."""
    found = {}
    for model in models:
        times = {
            kind: {
                row["tokens"]: row["ms"]
                for row in sections.get(f"{kind}, {model}", {}).get("rows", [])
                if "ms" in row
            }
            for kind in KINDS
        }
        hidden = times["restore hidden"]
        rows = [
            {"tokens": n} | {f"{kind} / hidden": times[kind][n] / hidden[n] for kind in KINDS[1:] if n in times[kind]}
            for n in hidden
        ]
        gains = {row["tokens"]: row["prefill / hidden"] for row in rows if "prefill / hidden" in row}
        slower_at = max((n for n, gain in gains.items() if gain <= 1), default=0)
        faster = [n for n in gains if n > slower_at]
        found[model] = {"rows": rows, "restore_faster_from": min(faster, default=None)}
    return found


def table(report: dict[str, Any]) -> Iterator[str]:
    sections = report["sections"]
    if _is_unregistered(report):
        yield "CUDA did not register the arena: nothing was copied as the server copies it"
    for name, part in _parts(sections):
        if stopped := part.get("error") or part.get("skipped"):
            yield f"{name}: {(stopped.splitlines() or [''])[0][:150]}"
    yield from _ceilings(sections)
    for model, forms in _numerics(sections):
        if forms := [form for form in forms if "ratio" in form]:
            bad = sum(form["unwritten"] + form["strayed"] for form in forms)
            worst = max(form["ratio"] for form in forms)
            yield f"numerics, {model}: error / forward's {worst:.3f} (≤ 1.5), {bad} elements missing or strayed"
    overhead = {key: ms for key, ms in sections.get("overhead", {}).items() if key.endswith("_ms")}
    if overhead:
        yield "caller, ms a batch (≤ 1): " + _cells(overhead, ".2f")
    for name, section in sections.items():
        if name.startswith("restore"):
            yield from _restores(name, section)
        if name.startswith("capture"):
            yield from _captures(name, section)
    for model, comparison in report.get("comparison", {}).items():
        for row in comparison["rows"]:
            yield f"{model}, {row['tokens']}: " + _cells({k: v for k, v in row.items() if k != "tokens"}, ".2f")
    yield from goals(report)


def goals(report: dict[str, Any]) -> Iterator[str]:
    """A short table: the worst of what was measured, of all models, beside the goal."""
    sections = report["sections"]
    restores = [
        row["ratio"]
        for name, section in sections.items()
        for row in section.get("rows", [])
        if name.startswith("restore hidden") and "ratio" in row and row["tokens"] >= RESTORES_FROM
    ]
    products = [
        row["ratio"]
        for found in sections.get("projection", {}).values()
        for row in (found.get("rows", []) if isinstance(found, dict) else [])
        if "ratio" in row and row["tokens"] >= PRODUCTS_FROM
    ]
    compared = report.get("comparison", {})
    over_kv = [
        row["restore KV / hidden"]
        for comparison in compared.values()
        for row in comparison["rows"]
        if "restore KV / hidden" in row and row["tokens"] >= RESTORES_FROM
    ]
    errors = [form["ratio"] for _, forms in _numerics(sections) for form in forms if "ratio" in form]
    found = (
        ("project_kv's throughput / the product's", "≥ 0.85", min(products, default=None)),
        ("restore / max(copy, projection)", "≤ 1.10", max(restores, default=None)),
        ("restore as K and V / as hidden states", "≥ 1.9", min(over_kv, default=None)),
        ("error / the forward's own", "≤ 1.5", max(errors, default=None)),
    )
    yield "goal, and the worst measured:"
    for name, goal, worst in found:
        yield f"  {name:42} {goal:7} {'not measured' if worst is None else f'{worst:.2f}'}"
    for name, section in sections.items():
        for kind, goal in CAPTURES.items():
            if name.startswith("capture") and "slow_down" in (part := section.get(kind, {})):
                yield f"  {f'slow-down by capture, {kind}':42} ≤ {goal:5} {100 * part['slow_down']:.2f} %"
    for model, comparison in compared.items():
        tokens = comparison["restore_faster_from"]
        since = "at no length" if tokens is None else f"from {tokens} tokens on"
        yield f"  {f'restoring beats prefill, {model}':42} {'':7} {since}"


def _numerics(sections: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for model, forms in sections.get("numerics", {}).items():
        if isinstance(forms, list):
            yield model, forms


def _parts(sections: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sections, their rows and parts: whatever can fail by itself."""
    for name, section in sections.items():
        yield name, section
        if name == "projection":
            for model, found in section.items():
                if isinstance(found, dict):
                    yield f"{name}, {model}", found
                    for row in found.get("rows", []):
                        yield f"{name}, {model}, {row['tokens']}", row
                        for form in row.get("forms", []):
                            yield f"{name}, {model}, {row['tokens']}, {form['fused'] or 'cuBLAS'}", form
        if name == "numerics":
            for model, forms in _numerics(sections):
                yield from ((f"{name}, {model}, {form['fused'] or 'cuBLAS'}", form) for form in forms)
        for row in section.get("rows", []):
            yield f"{name}, {row['tokens']}", row
        parts = {part: section[part] for part in ("sweep", *COPIERS, *CAPTURES) if part in section}
        yield from _parts({f"{name}, {part}": found for part, found in parts.items()})


def failed(report: dict[str, Any]) -> bool:
    """Whether a part did not run to its end, or not as in a server, or what was restored or captured is wrong."""
    return _is_unregistered(report) or any(
        "error" in part or _is_wrong(part) for _, part in _parts(report["sections"])
    )


def _is_unregistered(report: dict[str, Any]) -> bool:
    """Whether there is a GPU that cannot read the arena by itself."""
    return report["machine"]["gpu"] is not None and not report["arena"]["pinned"]


def _is_wrong(part: dict[str, Any]) -> bool:
    if "product" in part and not is_right(part):
        return True
    misplaced = any(part.get(name, 0) for name in ("unwritten", "strayed", "differing"))
    exact = part.get("error_ratio", 0) <= MOST_ERROR and part.get("captured_share", 1) > 0  # and not NaN
    return misplaced or not exact


def _ceilings(sections: dict[str, Any]) -> Iterator[str]:
    ceilings = sections.get("ceilings", {})
    rates = {key.removesuffix("_gb_s"): rate for key, rate in ceilings.items() if key.endswith("_gb_s")}
    if rates:
        yield "GB/s: " + _cells(rates, ".1f")
    for model, rows in ceilings.get("gemm", {}).items():
        yield f"product, TFLOP/s, {model}: " + _cells({row["tokens"]: row["tflop_s"] for row in rows}, ".0f")
    copiers = sections.get("copiers", {})
    if "no_engine" in copiers:
        yield f"no copy engine: {copiers['no_engine']}"
    for page_bytes, found in copiers.get("gb_s", {}).items():
        yield f"pages of {int(page_bytes) >> 10} KiB, GB/s: " + _cells(found, ".1f")
    for model, found in sections.get("projection", {}).items():
        if isinstance(found, dict) and "rows" in found:
            ratios = {row["tokens"]: row["ratio"] for row in found["rows"] if "ratio" in row}
            yield f"project_kv / product (≥ 0.85 from 1,024 on), {model}: " + _cells(ratios, ".2f")


def _restores(name: str, section: dict[str, Any]) -> Iterator[str]:
    if "no_engine" in section:
        yield f"{name}: no copy engine: {section['no_engine']}"
    for part in COPIERS:
        if part in section:
            yield from _restores(f"{name}, {part}", section[part])
    for row in section.get("rows", []):
        if "ms" not in row:
            continue
        ratio = f", ratio {row['ratio']:.2f} (≤ 1.10)" if "ratio" in row else ""
        checks = {key: row[key] for key in ("error_ratio", "differing", "unwritten", "strayed") if key in row}
        rate = f", {row['gb_s']:.1f} GB/s" if "gb_s" in row else ""
        rate += f", four bytes beside it {row['beside_ms']:.2f} ms" if "beside_ms" in row else ""
        yield (
            f"{name}, {row['tokens']}: {row['ms']:.2f} ms, caller {row['caller_ms']:.2f} ms{rate}{ratio}; "
            f"{_cells(checks, '.4g')}"
        )
    if swept := section.get("sweep", {}).get("by_kernel_ms"):
        yield f"{name}, ms by programs x warps of the kernel: " + _cells(swept, ".2f")


def _captures(name: str, section: dict[str, Any]) -> Iterator[str]:
    for kind, goal in CAPTURES.items():
        if "slow_down" in (part := section.get(kind, {})):
            yield (
                f"{name}, {kind}: {100 * part['slow_down']:+.2f} % (≤ {goal}; noise {100 * part['noise']:.2f} %), "
                f"host {part['host_ms']:.1f} ms of {part['captured_ms']:.1f}, "
                f"{100 * part['captured_share']:.0f} % of tokens captured, {part['differing']} elements differ"
            )


def _cells(values: dict[Any, float], form: str) -> str:
    return ", ".join(f"{key}: {value:{form}}" for key, value in values.items())
