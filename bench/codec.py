"""The codecs: what packing saves on activations of several kinds, how far lossy codes are off, and how fast it is.

    python -m bench.codec [--json] [--rounds N] [--save]

Method: each kind is a page of 64 tokens by 4,096 values in bf16 (a model's: by its own width), drawn from seed 0;
packed and unpacked again, every bit of the rows that fit compared. `fit` is their share; packed they take `ratio` of
their bytes. `filled` is what would be left of that if a row ended with its last escape. `entropy` is what an ideal
code of the exponents would reach, with one distribution a page, and the others are what other layouts would take of
the same page by counting bits, not codecs that exist: fixed codes of 2, 3 and 4 bits beside an escape, codes of 2
bits whose escapes have codes of 3 bits, and codes of 3 bits relative to the median exponent of each channel. Lossy
errors are the root mean square and the largest of the difference over the same of the values. Llama here has random
weights (bench/models.py) and is left out without transformers: its hidden states have no outlier channels that
training makes, and its K are before RoPE. The CPU's rates are of the PyTorch references, one thread, raw bytes over
the median of the rounds after one that warms up. With a GPU: 256 MiB of raw rows are encoded and decoded in one
launch each with the L2 cold, beside a copy of as many raw bytes from pinned memory in the same run; medians of CUDA
events. What each wrote, into bytes of 0xA5, must be its reference's, bit by bit; else the exit status is 1.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import DEVICE, about
from bench.report import arguments_of, emit
from sglang_hcache.triton_kernels import packing, quantize

TOKENS, WIDTH = 64, 4096
HEAD_DIM = 128
RAW_ON_GPU = 256 << 20  # bytes; several times the L2
POISON = 0xA5
FLUSHED = 1 << 30  # bytes written before each timing: nothing is in the L2, and the launch does not wait for Python


def synthetic() -> Iterator[tuple[str, torch.Tensor]]:
    """Name and `[TOKENS, WIDTH]` bf16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def some(share: float) -> torch.Tensor:
        return torch.rand(WIDTH, generator=generator) < share

    def page(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.bfloat16)

    base = normal(TOKENS, WIDTH)
    heads = torch.exp(0.7 * normal(WIDTH // HEAD_DIM)).repeat_interleave(HEAD_DIM)
    yield "normal", page(base)
    yield "hidden: channel scales e^N(0, 0.25)", page(base * torch.exp(0.25 * normal(WIDTH)))
    yield "hidden: channel scales e^N(0, 0.5)", page(base * torch.exp(0.5 * normal(WIDTH)))
    yield "hidden: channel scales e^N(0, 1)", page(base * torch.exp(normal(WIDTH)))
    outliers = torch.where(some(0.003), 60.0, torch.exp(0.3 * normal(WIDTH)))
    yield "hidden: 0.3 % of channels 60 times larger", page(base * outliers)
    heavy = normal(TOKENS, WIDTH) * (4 / (normal(4, TOKENS, WIDTH) ** 2).sum(0)).sqrt()
    yield "hidden: heavy tails (Student's t, 4)", page(heavy)
    yield "hidden: token scales e^N(0, 0.5)", page(base * torch.exp(0.5 * normal(TOKENS, 1)))
    yield "V: head scales e^N(0, 0.7)", page(base * heads)
    channel_means = 3 * normal(WIDTH) * some(0.1)
    yield (
        "K: channel scales e^N(0, 0.8), 10 % with a mean",
        page(base * torch.exp(0.8 * normal(WIDTH)) + channel_means),
    )
    yield "zeros: half of the values", page(base.relu())
    noise = torch.randint(-(2**15), 2**15, (TOKENS, WIDTH), generator=generator)
    yield "random bits", noise.to(torch.int16).view(torch.bfloat16)


def from_random_llama() -> Iterator[tuple[str, torch.Tensor]]:
    """Hidden states after the norm, K and V of the middle layer of a Llama with random weights."""
    from transformers import AutoModelForCausalLM

    from bench.models import ModelSpec, make_model

    spec = ModelSpec("llama", hidden_size=512, layers=4, heads=8, intermediate=1024)
    with tempfile.TemporaryDirectory(prefix="hcache-codec-") as folder:
        model = AutoModelForCausalLM.from_pretrained(make_model(Path(folder) / "llama", spec), dtype=torch.float32)
    layer = model.model.layers[spec.layers // 2]
    seen: dict[str, torch.Tensor] = {}
    modules = {"hidden": layer.input_layernorm, "K": layer.self_attn.k_proj, "V": layer.self_attn.v_proj}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[0]}))
    prompt = torch.randint(5, spec.vocab, (1, 2 * TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(prompt)
    for name, values in seen.items():
        yield f"random-weight Llama: {name}", values[TOKENS:].to(torch.bfloat16)


# --- sizes and errors ---


def packed_sizes(page: torch.Tensor) -> dict[str, float | None]:
    """Packed over raw bytes, measured, and of other layouts, counted."""
    width = page.shape[1]
    packed = packing.pack_rows_reference(page)
    fit = packed[:, packing.fits_at(width)] == 0
    if not torch.equal(packing.unpack_rows_reference(packed[fit]).view(torch.int16), page[fit].view(torch.int16)):
        sys.exit("bench.codec: a row came back changed.")
    escapes = packed[fit, packing.fits_at(width) + 1 :] != 0  # an exponent of 0 that escapes is not counted
    filled = (packing.fits_at(width) + 1 + float(escapes.sum(1).double().mean())) / (2 * width) if fit.any() else None
    exponents = (page.view(torch.int16) >> 7 & 0xFF).to(torch.int64)
    counts = torch.bincount(exponents.flatten(), minlength=256).sort(descending=True).values.double()
    share = counts[counts > 0] / counts.sum()
    relative = (exponents - exponents.median(0).values) & 0xFF
    by_channel = torch.bincount(relative.flatten(), minlength=256).sort(descending=True).values.double()
    bits = {
        "entropy": float(-(share * share.log2()).sum()),
        "codes_2_bits": _escape_bits(counts, 2),
        "codes_3_bits": _escape_bits(counts, 3),
        "codes_4_bits": _escape_bits(counts, 4),
        "codes_2_then_3_bits": 2 + float((3 * counts[3:].sum() + 8 * counts[10:].sum()) / counts.sum()),
        "codes_3_bits_by_channel": _escape_bits(by_channel, 3) + 8 / page.shape[0],
    }
    sizes = {"ratio": packed.shape[1] / (2 * width), "fit": float(fit.float().mean()), "filled": filled}
    return sizes | {name: (8 + each) / 16 for name, each in bits.items()}


def _escape_bits(counts: torch.Tensor, bits: int) -> float:
    """Bits a value of codes of `bits` with one for escapes, whose exponents take 8 more."""
    return bits + 8 * float(counts[2**bits - 1 :].sum() / counts.sum())


def lossy_errors(page: torch.Tensor) -> dict[str, dict[str, float]]:
    """By code; of pages without NaN and infinity."""
    errors = {}
    for code in quantize.CODE_TYPES:
        coded = quantize.quantize_rows_reference(page, code)
        error = quantize.dequantize_rows_reference(coded, code, torch.float32).double() - page.double()
        errors[code] = {
            "rms": float((error.square().mean() / page.double().square().mean()).sqrt()),
            "largest": float(error.abs().max() / page.double().abs().max()),
            "ratio": coded.numel() / (2 * page.numel()),
        }
    return errors


# --- rates ---


def cpu_rates(page: torch.Tensor, rounds: int) -> dict[str, float]:
    """GB/s of raw bytes."""
    packed = packing.pack_rows_reference(page)
    calls: dict[str, Callable[[], object]] = {
        "pack": partial(packing.pack_rows_reference, page),
        "unpack": partial(packing.unpack_rows_reference, packed),
    }
    for code in quantize.CODE_TYPES:
        coded = quantize.quantize_rows_reference(page, code)
        calls[f"quantize_{code}"] = partial(quantize.quantize_rows_reference, page, code)
        calls[f"dequantize_{code}"] = partial(quantize.dequantize_rows_reference, coded, code, page.dtype)
    return {name: 2 * page.numel() / _median_s(call, rounds) / 1e9 for name, call in calls.items()}


def _median_s(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gpu_rates(page: torch.Tensor, rounds: int) -> tuple[dict[str, float], list[str]]:
    """GB/s of raw bytes, of many copies of `page`; and what wrote other bytes than its reference."""
    host = page.repeat(RAW_ON_GPU // (2 * page.numel()), 1)
    host = host.pin_memory() if DEVICE == "cuda" else host
    source = host.to(DEVICE)
    packed, out = packing.pack_rows_reference(source), torch.empty_like(source)
    made = torch.empty_like(packed)
    works: dict[str, tuple[Callable[[], object], torch.Tensor, torch.Tensor]] = {  # with what it writes, and should
        "pack": (partial(packing.pack_rows, source[None], made[None]), made, packed),
        "unpack": (partial(packing.unpack_rows, packed, out), out, source),
        "copy_to_device": (partial(out.copy_, host, non_blocking=True), out, source),
        "copy_on_device": (partial(out.copy_, source), out, source),
    }
    for code in quantize.CODE_TYPES:
        coded = quantize.quantize_rows_reference(source, code)
        codes = torch.empty_like(coded)
        values = quantize.dequantize_rows_reference(coded, code, out.dtype)
        works[f"quantize_{code}"] = (partial(quantize.quantize_rows, source[None], codes[None], code), codes, coded)
        works[f"dequantize_{code}"] = (partial(quantize.dequantize_rows, coded, out, code), out, values)
    rates, wrong = {}, []
    for name, (work, written, expected) in works.items():
        written.view(torch.uint8).fill_(POISON)
        rates[name] = 2 * source.numel() / _median_on_gpu_s(work, rounds) / 1e9
        if not torch.equal(written.view(torch.uint8), expected.view(torch.uint8)):
            wrong.append(name)
    return rates | {"unpack_over_copy_to_device": rates["unpack"] / rates["copy_to_device"]}, wrong


def _median_on_gpu_s(call: Callable[[], object], rounds: int) -> float:
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(rounds + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[3:])


def measure(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    kinds, pages = {}, list(synthetic())
    try:
        pages += from_random_llama()
    except Exception as error:  # noqa: BLE001  # where transformers is missing, or another than SGLang's
        print(f"the Llama is left out: {type(error).__name__}: {error}", file=sys.stderr)
    for name, page in pages:
        kinds[name] = packed_sizes(page) | ({"lossy": lossy_errors(page)} if page.isfinite().all() else {})
    page = dict(synthetic())["hidden: channel scales e^N(0, 0.5)"]
    on_gpu, wrong = gpu_rates(page, rounds) if torch.cuda.is_available() else (None, [])
    return {
        "kinds": kinds,
        "cpu_gb_s": cpu_rates(page, rounds),
        "gpu_gb_s": on_gpu,
        "gpu_wrong": wrong,
        "rounds": rounds,
        **about(__doc__),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for name, sizes in report["kinds"].items():
        yield (
            f"{name:>50}: {sizes['ratio']:.3f} of the bytes of {sizes['fit']:.1%} of the rows, "
            f"filled to {sizes['filled'] or 1:.3f} (entropy {sizes['entropy']:.3f})"
        )
    for where in ("cpu", "gpu"):
        for name, rate in (report[f"{where}_gb_s"] or {}).items():
            yield f"{where} {name:>46}: {rate:8.2f}{'' if 'over' in name else ' GB/s'}"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    report = measure(arguments.rounds)
    emit(arguments, "codec", report, lines(report))
    if report["gpu_wrong"]:
        sys.exit(f"bench.codec: wrong on the GPU: {', '.join(report['gpu_wrong'])}")


if __name__ == "__main__":
    main()
