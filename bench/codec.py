"""The codecs: what packing saves on activations of several kinds, how far lossy codes are off, and how fast it is.

    python -m bench.codec [--model CHECKPOINT] [--json] [--rounds N] [--save]

Method: each kind is a page of 64 tokens by 4,096 values in bf16, drawn from seed 0; packed and unpacked again, every
bit of the rows that fit compared. What is usual is that of 64 other tokens of the same kind, or nothing, if more of
those fit so. `fit` is the share of the rows that fit, and `fit_plain` what it would be of exponents as they are;
packed they take `ratio` of their bytes. `filled` is what would be left of that if a row ended with its last escape.
`entropy` is what an ideal code of the relative exponents would reach, with one distribution a page, and the others
are what other layouts would take of the same page by counting bits, not codecs that exist: fixed codes of 2, 3 and 4
bits beside an escape, and codes of 2 bits whose escapes have codes of 3 bits. Lossy errors are the root mean square
and the largest of the difference over the same of the values. Llama here has random weights (bench/models.py) and is
left out without transformers; its K are before RoPE. Of --model, which bench/trained.py can make with trained
weights, the rows are those of 2,048 tokens of prose, and usual is what is so of 256 random tokens, as in a server;
`tokens_fit` is the share of the tokens that fit in all layers. The CPU's rates are of the PyTorch references, one
thread, raw bytes over the median of the rounds after one that warms up. With a GPU: 256 MiB of raw rows are encoded
and decoded in one launch each with the L2 cold, beside a copy of as many raw bytes from pinned memory in the same
run; medians of CUDA events. What each wrote, into bytes of 0xA5, must be its reference's, bit by bit; else the exit
status is 1.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import DEVICE, about
from bench.report import arguments_of, emit
from sglang_hcache.triton_kernels import packing, quantize

TOKENS, WIDTH = 64, 4096
PROSE_TOKENS, RANDOM_TOKENS = 2048, 256  # of a checkpoint
HEAD_DIM = 128
RAW_ON_GPU = 256 << 20  # bytes; several times the L2
POISON = 0xA5
FLUSHED = 1 << 30  # bytes written before each timing: nothing is in the L2, and the launch does not wait for Python


Kind = tuple[str, torch.Tensor, torch.Tensor]  # a name, rows bf16 `[n, width]`, what is usual in them uint8 `[width]`


def synthetic() -> Iterator[Kind]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def some(share: float) -> torch.Tensor:
        return torch.rand(WIDTH, generator=generator) < share

    base = normal(2 * TOKENS, WIDTH)
    heads = torch.exp(0.7 * normal(WIDTH // HEAD_DIM)).repeat_interleave(HEAD_DIM)
    outliers = torch.where(some(0.003), 60.0, torch.exp(0.3 * normal(WIDTH)))
    heavy = normal(2 * TOKENS, WIDTH) * (4 / (normal(4, 2 * TOKENS, WIDTH) ** 2).sum(0)).sqrt()
    channel_means = 3 * normal(WIDTH) * some(0.1)
    kinds = {
        "normal": base,
        "hidden: channel scales e^N(0, 0.25)": base * torch.exp(0.25 * normal(WIDTH)),
        "hidden: channel scales e^N(0, 0.5)": base * torch.exp(0.5 * normal(WIDTH)),
        "hidden: channel scales e^N(0, 1)": base * torch.exp(normal(WIDTH)),
        "hidden: channel scales e^N(0, 2)": base * torch.exp(2 * normal(WIDTH)),
        "hidden: 0.3 % of channels 60 times larger": base * outliers,
        "hidden: heavy tails (Student's t, 4)": heavy,
        "hidden: token scales e^N(0, 0.5)": base * torch.exp(0.5 * normal(2 * TOKENS, 1)),
        "V: head scales e^N(0, 0.7)": base * heads,
        "K: channel scales e^N(0, 0.8), 10 % with a mean": base * torch.exp(0.8 * normal(WIDTH)) + channel_means,
        "zeros: half of the values": base.relu(),
    }
    noise = torch.randint(-(2**15), 2**15, (2 * TOKENS, WIDTH), generator=generator)
    bits = {"random bits": noise.to(torch.int16).view(torch.bfloat16)}
    for name, values in ({kind: rows.to(torch.bfloat16) for kind, rows in kinds.items()} | bits).items():
        yield name, values[TOKENS:], _usual(values[:TOKENS])


def of_random_llama() -> Iterator[Kind]:
    """The input of the middle layer's attention, K and V, of a Llama with random weights."""
    from bench.models import ModelSpec, make_model

    spec = ModelSpec("llama", hidden_size=512, layers=4, heads=8, intermediate=1024)
    with tempfile.TemporaryDirectory(prefix="hcache-codec-") as folder:
        seen = activations(make_model(Path(folder) / "llama", spec), [_random_tokens(2 * TOKENS, spec.vocab)])[0]
    for name, values in seen.items():
        middle = values[spec.layers // 2]
        yield f"random-weight Llama: {name}", middle[TOKENS:], _usual(middle[:TOKENS])


def of_checkpoint(model: Path) -> tuple[list[Kind], float]:
    """Of some layers' inputs of attention, of all together, and of the middle one's K and V; and `tokens_fit`."""
    from transformers import AutoConfig

    from bench.trained import text_tokens

    vocab = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    prompts = [text_tokens(model)[:PROSE_TOKENS], _random_tokens(RANDOM_TOKENS, vocab)]
    prose, random = activations(model, prompts)
    hidden, usual = prose["hidden"], packing.usual_exponents(random["hidden"])
    layers, name = len(hidden), model.name
    kinds = [(f"{name}: hidden, layer {i}", hidden[i], usual[i]) for i in sorted({0, 1, layers // 2, layers - 1})]
    for other in ("K", "V"):
        middle = prose[other][layers // 2]
        kinds.append((f"{name}: {other}", middle, _usual(random[other][layers // 2])))
    return kinds, float(_fit(hidden, usual).all(0).float().mean())


def activations(model: Path, prompts: Sequence[Sequence[int]]) -> list[dict[str, torch.Tensor]]:
    """For each prompt: the inputs of attention, K before RoPE, and V, bf16 `[layers, tokens, width]`, by name."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str, values: torch.Tensor) -> None:
        seen.setdefault(name, []).append(values[0].to(torch.bfloat16))

    for layer in lm.model.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: note("hidden", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        attention.k_proj.register_forward_hook(lambda _, __, output: note("K", output))
        attention.v_proj.register_forward_hook(lambda _, __, output: note("V", output))
    found = []
    for prompt in prompts:
        seen.clear()
        with torch.inference_mode():
            lm(torch.tensor([list(prompt)]))
        found.append({name: torch.stack(values) for name, values in seen.items()})
    return found


def _usual(rows: torch.Tensor) -> torch.Tensor:
    """By which more of `[n, width]` fit, as `startup.codec_choice` has it for all layers of a model."""
    found = [packing.usual_exponents(rows[None])[0], torch.zeros(rows.shape[1], dtype=torch.uint8)]
    return max(found, key=lambda usual: int(_fit(rows[None], usual[None]).sum()))


def _random_tokens(tokens: int, vocab: int) -> list[int]:
    drawn: list[int] = torch.randint(5, vocab, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return drawn


# --- sizes and errors ---


def packed_sizes(rows: torch.Tensor, usual: torch.Tensor) -> dict[str, float | None]:
    """Packed over raw bytes, measured, and of other layouts, counted."""
    width = rows.shape[1]
    packed = packing.pack_rows_reference(rows[None], usual[None])[0]
    fit = packed[:, packing.fits_at(width)] == 0
    unpacked = packing.unpack_rows_reference(packed[fit], usual)
    if not torch.equal(unpacked.view(torch.int16), rows[fit].view(torch.int16)):
        sys.exit("bench.codec: a row came back changed.")
    exponents = (rows.view(torch.int16) >> 7).to(torch.int64) - usual & 0xFF
    counts = torch.bincount(exponents.flatten(), minlength=256).sort(descending=True).values.double()
    share = counts[counts > 0] / counts.sum()
    of_rows = torch.zeros(len(rows), 256).scatter_add_(1, exponents, torch.ones(exponents.shape))
    escapes = of_rows[fit].sort(1, descending=True).values[:, packing.ESCAPE :].sum(1)
    filled = (packing.fits_at(width) + 1 + float(escapes.mean())) / (2 * width) if fit.any() else None
    bits = {
        "entropy": float(-(share * share.log2()).sum()),
        "codes_2_bits": _escape_bits(counts, 2),
        "codes_3_bits": _escape_bits(counts, 3),
        "codes_4_bits": _escape_bits(counts, 4),
        "codes_2_then_3_bits": 2 + float((3 * counts[3:].sum() + 8 * counts[10:].sum()) / counts.sum()),
    }
    sizes = {"ratio": packed.shape[1] / (2 * width), "fit": float(fit.float().mean())}
    sizes["fit_plain"] = float(_fit(rows[None], torch.zeros_like(usual)[None]).float().mean())
    return sizes | {"filled": filled} | {name: (8 + each) / 16 for name, each in bits.items()}


def _fit(rows: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Which of the rows `[layers, n, width]` fit: bool `[layers, n]`."""
    return packing.pack_rows_reference(rows, usual)[..., packing.fits_at(rows.shape[-1])] == 0


def _escape_bits(counts: torch.Tensor, bits: int) -> float:
    """Bits a value of codes of `bits` with one for escapes, whose exponents take 8 more."""
    return bits + 8 * float(counts[2**bits - 1 :].sum() / counts.sum())


def lossy_errors(page: torch.Tensor) -> dict[str, dict[str, float]]:
    """By code; of rows without NaN and infinity."""
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


def cpu_rates(page: torch.Tensor, usual: torch.Tensor, rounds: int) -> dict[str, float]:
    """GB/s of raw bytes."""
    (packed,) = packing.pack_rows_reference(page[None], usual[None])
    calls: dict[str, Callable[[], object]] = {
        "pack": partial(packing.pack_rows_reference, page[None], usual[None]),
        "unpack": partial(packing.unpack_rows_reference, packed, usual),
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


def gpu_rates(page: torch.Tensor, usual: torch.Tensor, rounds: int) -> tuple[dict[str, float], list[str]]:
    """GB/s of raw bytes, of many copies of `page`; and what wrote other bytes than its reference."""
    host = page.repeat(RAW_ON_GPU // (2 * page.numel()), 1)
    host = host.pin_memory() if DEVICE == "cuda" else host
    source, usual = host.to(DEVICE), usual.to(DEVICE)
    (packed,), out = packing.pack_rows_reference(source[None], usual[None]), torch.empty_like(source)
    made = torch.empty_like(packed)
    works: dict[str, tuple[Callable[[], object], torch.Tensor, torch.Tensor]] = {  # with what it writes, and should
        "pack": (partial(packing.pack_rows, source[None], usual[None], made[None]), made, packed),
        "unpack": (partial(packing.unpack_rows, packed, usual, out), out, source),
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


def measure_checkpoint(model: Path) -> dict[str, Any]:
    kinds, tokens_fit = of_checkpoint(model)
    return {"kinds": sizes_of(kinds), "tokens_fit": tokens_fit, **about(__doc__)}


def sizes_of(kinds: Iterable[Kind]) -> dict[str, Any]:
    sizes = {}
    for name, rows, usual in kinds:
        lossy = {"lossy": lossy_errors(rows)} if rows.isfinite().all() else {}
        sizes[name] = packed_sizes(rows, usual) | lossy
    return sizes


def measure(rounds: int) -> dict[str, Any]:
    kinds = list(synthetic())
    (page,) = (kind[1:] for kind in kinds if kind[0] == "hidden: channel scales e^N(0, 0.5)")
    try:
        kinds += of_random_llama()
    except Exception as error:  # noqa: BLE001  # where transformers is missing, or another than SGLang's
        print(f"the Llama is left out: {type(error).__name__}: {error}", file=sys.stderr)
    torch.set_num_threads(1)
    on_gpu, wrong = gpu_rates(*page, rounds) if torch.cuda.is_available() else (None, [])
    return {
        "kinds": sizes_of(kinds),
        "cpu_gb_s": cpu_rates(*page, rounds),
        "gpu_gb_s": on_gpu,
        "gpu_wrong": wrong,
        "rounds": rounds,
        **about(__doc__),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for name, sizes in report["kinds"].items():
        yield (
            f"{name:>50}: {sizes['ratio']:.3f} of the bytes of {sizes['fit']:.1%} of the rows, "
            f"filled to {sizes['filled'] or 1:.3f} (entropy {sizes['entropy']:.3f}; plain: {sizes['fit_plain']:.1%})"
        )
    if "tokens_fit" in report:
        yield f"{report['tokens_fit']:.2%} of the tokens fit in all layers"
    for where in ("cpu", "gpu"):
        for name, rate in (report.get(f"{where}_gb_s") or {}).items():
            yield f"{where} {name:>46}: {rate:8.2f}{'' if 'over' in name else ' GB/s'}"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a checkpoint, whose activations are packed instead")
    arguments = parser.parse_args()
    if arguments.model is not None:
        report = measure_checkpoint(arguments.model)
        emit(arguments, "codec_trained", report, lines(report))
        return
    report = measure(arguments.rounds)
    emit(arguments, "codec", report, lines(report))
    if report["gpu_wrong"]:
        sys.exit(f"bench.codec: wrong on the GPU: {', '.join(report['gpu_wrong'])}")


if __name__ == "__main__":
    main()
