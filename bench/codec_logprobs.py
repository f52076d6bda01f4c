"""What the codecs of hidden states do to log-probabilities, on the real server.

    python -m bench.codec_logprobs [--model CHECKPOINT] [--json] [--prompts N] [--save]

Method: a Llama with random weights (8 layers of 512), asked with random tokens, or --model, which bench/trained.py
can make with trained weights, asked to continue prose, is served without a tier and with one that stores hidden
states as they are, and by each `--hcache-codec` that the dtype allows. Each of N prefixes of 1,024 tokens is
prefilled, evicted by other prompts and asked for again with 40 new tokens, of which the last 8 and the answer's 16
have log- probabilities. Rows: the mean and the largest absolute difference to the server without a tier, over all
positions before two answers part, and the share of answers whose tokens are all equal; `other_prefix`: the same for
the question after another prefix.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Answer, ModelSpec, Request, Server, compare, make_model, random_prompt
from bench.report import about, arguments_of, emit
from bench.trained import text_tokens
from sglang_hcache.config import CODEC_CHOICES

DTYPES = ("float32", "bfloat16")
STORED = {"as they are": None, **{codec: codec for codec in CODEC_CHOICES}}
PREFIX_TOKENS, NEW_TOKENS, POOL_TOKENS = 1024, 40, 1536

Question = tuple[list[int], list[int]]  # a prefix, and what follows


def random_questions(prompts: int) -> list[Question]:
    return [
        (random_prompt(PREFIX_TOKENS, number), random_prompt(NEW_TOKENS, 1000 + number)) for number in range(prompts)
    ]


def questions_of_text(model: Path, prompts: int) -> list[Question]:
    tokens, length = text_tokens(model), PREFIX_TOKENS + NEW_TOKENS
    if len(tokens) < prompts * length:
        sys.exit(f"bench.codec_logprobs: there is text for {len(tokens) // length} prompts only")
    parts = [tokens[number * length :][:length] for number in range(prompts)]
    return [(part[:PREFIX_TOKENS], part[PREFIX_TOKENS:]) for part in parts]


def after_other_prefixes(questions: Sequence[Question]) -> list[Question]:
    prefixes = [prefix for prefix, _ in questions]
    return [(other, new) for other, (_, new) in zip(prefixes[1:] + prefixes[:1], questions, strict=True)]


def asked_again(server: Server, questions: Sequence[Question]) -> list[Answer]:
    """Each prefix in turn, twice; there is room for one, so the second time it has been evicted."""
    for prefix, _ in questions:
        server.generate(prefix, 1)
    prompts = [prefix + new for prefix, new in questions]
    return [server.send(Request(prompt, 16, logprobs_from=len(prompt) - 8)) for prompt in prompts]


def differences(answers: Sequence[Answer], wanted: Sequence[Answer]) -> dict[str, Any]:
    apart, same = [], 0
    for one, other in zip(answers, wanted, strict=True):
        found = compare(one, other)
        same += found.same_tokens
        left, right = ((*a.input_logprobs, *a.output_logprobs[: found.first_token_apart]) for a in (one, other))
        apart += [abs(x - y) for x, y in zip(left, right, strict=True)]
    return {"mean": float(np.mean(apart)), "largest": max(apart), "same_tokens": same / len(wanted)}


def run(trained: Path | None, prompts: int, folder: Path) -> dict[str, Any]:
    rows = list[dict[str, Any]]()
    questions = questions_of_text(trained, prompts) if trained else random_questions(prompts)
    for dtype in DTYPES:
        spec = ModelSpec("llama", hidden_size=512, layers=8, heads=8, dtype=dtype)
        model = trained or make_model(folder / dtype, spec)
        pool = ["--page-size", "64", "--max-total-tokens", str(POOL_TOKENS), "--sleep-on-idle", "--dtype", dtype]
        with Server(model, pool, log=folder / "stock.log") as server:
            wanted = asked_again(server, questions)
            rows.append({"dtype": dtype, "stored": "other_prefix"})
            rows[-1] |= differences(asked_again(server, after_other_prefixes(questions)), wanted)
        for stored, codec in STORED.items():
            if codec == "packed" and dtype != "bfloat16":
                continue
            tier = ["--hicache-backend", "hcache", "--hcache-plan", "always", "--hcache-dir", str(folder / "store")]
            args = [*pool, *tier, "--hcache-representation", "hidden", "--hicache-size", "1"]
            args += ["--hcache-codec", codec] if codec else []
            with Server(model, args, log=folder / "tier.log") as server:
                answers = asked_again(server, questions)
            restored = float(np.mean([answer.cached_host for answer in answers]))
            row = {"dtype": dtype, "stored": stored, "tokens_restored": restored} | differences(answers, wanted)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return {
        "model": trained.name if trained else "random Llama",
        "rows": rows,
        "prompts": prompts,
        **about(__doc__),
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint with trained weights")
    parser.add_argument("--prompts", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hcache-codec-") as folder:
        report = run(arguments.model, arguments.prompts, Path(folder))
    lines = (
        f"{row['dtype']:>9} {row['stored']:>14}: mean {row['mean']:.2e}, largest {row['largest']:.2e}, "
        f"{row['same_tokens']:.0%} of the answers equal"
        for row in report["rows"]
    )
    emit(arguments, "codec_logprobs_trained" if arguments.model else "codec_logprobs", report, lines)


if __name__ == "__main__":
    main()
