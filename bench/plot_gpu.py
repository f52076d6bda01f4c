"""Plots of `bench.gpu_restore`'s report: restoring against prefill, against its ceilings, and by copier.

python -m bench.plot_gpu [--report FILE] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.gpu_report import COPIERS, KINDS

REPORT = Path(__file__).parent / "results" / "gpu_restore.json"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def times(report: dict[str, Any], model: str) -> Figure:
    """Milliseconds by length: restored as hidden states and as K and V, prefilled, and what the ceilings allow."""
    figure, panel = _panel(f"{model}, {report['machine']['gpu'] or 'CPU'}", "tokens", "ms")
    sections = report["sections"]
    for kind in KINDS:
        rows = [row for row in sections.get(f"{kind}, {model}", {}).get("rows", []) if "ms" in row]
        panel.loglog([row["tokens"] for row in rows], [row["ms"] for row in rows], marker="o", label=kind)
    rows = [row for row in sections.get(f"{KINDS[0]}, {model}", {}).get("rows", []) if "copy_ms" in row]
    for floor in ("copy_ms", "projection_ms"):
        name = f"ceiling: {floor.removesuffix('_ms')}"
        panel.loglog([row["tokens"] for row in rows], [row[floor] for row in rows], linestyle="--", label=name)
    panel.legend()
    return figure


def ratios(report: dict[str, Any]) -> Figure:
    """Restoring over the larger of its ceilings."""
    figure, panel = _panel("restore as hidden states / ceiling", "tokens", "ratio")
    for model in report["comparison"]:
        rows = [row for row in report["sections"].get(f"{KINDS[0]}, {model}", {}).get("rows", []) if "ratio" in row]
        panel.semilogx([row["tokens"] for row in rows], [row["ratio"] for row in rows], marker="o", label=model)
    panel.axhline(1.1, color="grey", linestyle=":")
    panel.legend()
    return figure


def by_copier(report: dict[str, Any]) -> Figure | None:
    """How fast the engine and the kernel let a restore be; None where only torch copied."""
    figure, panel = _panel("restore as hidden states", "tokens", "ms")
    for model, part in itertools.product(report["comparison"], COPIERS):
        section = report["sections"].get(f"{KINDS[0]}, {model}", {}).get(part, {})
        if rows := [row for row in section.get("rows", []) if "ms" in row]:
            panel.loglog([row["tokens"] for row in rows], [row["ms"] for row in rows], label=f"{model}, {part}")
    if not panel.lines:
        return None
    panel.legend()
    return figure


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    figures: dict[str, Figure | None] = {"ratio": ratios(report), "copiers": by_copier(report)}
    figures |= {re.sub(r"\W+", "-", model).lower(): times(report, model) for model in report["comparison"]}
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(folder / f"gpu-{name}.png")
            figure.savefig(files[-1], dpi=120)
    return files


def _panel(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.set(title=title, xlabel=x, ylabel=y)
    return figure, panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT, help="JSON of bench.gpu_restore")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures (default docs/figures)")
    arguments = parser.parse_args()
    for file in draw(json.loads(arguments.report.read_text()), arguments.out):
        print(file)


if __name__ == "__main__":
    main()
