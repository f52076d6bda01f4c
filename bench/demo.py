"""Two chats that outgrow the KV pool, on the real server: what was restored, how fast, and whether it is right.

    python -m bench.demo        (or `make demo`)

A small Llama with random weights is served with `--hicache-backend hcache` and talked to over HTTP. Hidden states are
stored, whatever would be fastest on this machine (on a CPU, with no bus to save, often K and V). The two
conversations take turns, so each finds a part of its context evicted when it comes back. Then the server is
stopped, started again on the same directory, and the oldest conversation goes on. Each request goes first to
a server without the tier, whose text is what both are told as history. That server is not restarted but
loses its cache, which is all that a restart would do to it.

Model, logs and store are under `.cache/demo/`. The exit status is 1 if an output differs or a server dies.
"""

from __future__ import annotations

import http.client
import os
import random
import shlex
import shutil
import signal
import statistics
import string
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

from bench.harness import (
    Answer,
    ModelSpec,
    RequestFailed,
    Server,
    ServerDied,
    compare,
    disk_bytes,
    make_model,
    on_accelerator,
    random_prompt,
)
from sglang_hcache.config import DEFAULT_PAGE_SIZE

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "demo"
STORE = FOLDER / "store"

BEFORE_RESTART = "AABBABAB"  # whose turn it is
AFTER_RESTART = "A"
QUESTION_CHARS = 120  # of a conversation's messages but the first; a character is a token
ANSWER_TOKENS = 16
TIER_ARGS = (
    *("--hicache-backend", "hcache", "--hcache-dir", str(STORE)),
    *("--hcache-representation", "hidden", "--hcache-plan", "always"),
)
VOCABULARY = 261  # special tokens and bytes: without merges the text of an answer is tokenised as it was generated
SPOKEN = string.ascii_letters + string.digits + string.punctuation + " "
WORDS = (
    "the a one of and to in over under while because river harbour letter engine winter garden window market "
    "captain baker teacher stranger carries opens repairs forgets paints measures old narrow quiet distant"
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PLAIN_UPDATE_S = 10.0  # between two progress lines where they cannot overwrite each other
MAX_WIDTH = 110  # of a line of the shown command


@dataclass(frozen=True)
class Setup:
    """What this machine serves."""

    device: str
    spec: ModelSpec
    document_chars: int  # of a conversation's first message
    pool_tokens: int  # holds one conversation to its end, but not both
    args: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def kv_bytes_per_token(self) -> int:
        spec, item = self.spec, 4 if self.spec.dtype == "float32" else 2
        return 2 * spec.layers * spec.num_kv_heads * spec.head_dim * item


@dataclass(frozen=True)
class Turn:
    conversation: str
    number: int
    message: str
    after_restart: bool

    @property
    def name(self) -> str:
        return f"{self.conversation}{self.number}" + (" after restart" if self.after_restart else "")


@dataclass(frozen=True)
class Row:
    """One turn of the table."""

    turn: Turn
    answer: Answer
    without_tier: Answer

    @property
    def equal(self) -> bool:
        return compare(self.answer, self.without_tier).same_tokens

    def cells(self) -> list[str]:
        answer = self.answer
        prefilled = answer.prompt_tokens - answer.cached_device - answer.cached_host
        counts = (answer.prompt_tokens, answer.cached_device, answer.cached_host, prefilled)
        times = (answer.ttft_s, self.without_tier.ttft_s)
        return [self.turn.name, *(f"{n:,}" for n in counts), *map(_seconds, times), "yes" if self.equal else "NO"]


@dataclass(frozen=True)
class Stored:
    """What the first server left in the store."""

    bytes_on_disk: int
    tokens: int
    form: str  # "hidden" or "kv"


class Failure(RuntimeError):
    """A server cannot start here; or it died or did not do as asked, then the message names its log."""


class Stopped(BaseException):
    """A signal asked the demo to end; its number is the argument."""


class Progress:
    """One line that is overwritten on a terminal; elsewhere, lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._overwrites = stream.isatty()
        self._plain_due_s = 0.0

    def show(self, line: str) -> None:
        """Replaces the line shown before."""
        if self._overwrites:
            columns = shutil.get_terminal_size().columns
            self._write(f"\r\x1b[K{line[: columns - 1]}")
        elif time.monotonic() >= self._plain_due_s:
            self._plain_due_s = time.monotonic() + PLAIN_UPDATE_S
            self._write(f"{line}\n")

    def keep(self, line: str) -> None:
        """Replaces the line shown before, for good."""
        self._plain_due_s = time.monotonic() + PLAIN_UPDATE_S
        self._write(f"\r\x1b[K{line}\n" if self._overwrites else f"{line}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


# ---- the machine and the model ----


def choose_setup() -> Setup:
    """On a GPU bfloat16 is what the kernels take, and equal outputs need SGLang's deterministic mode.

    There prompts are longer, as it prefills those of a CPU in the time of a few launches. Raises Failure where SGLang
    could not start.
    """
    if not on_accelerator():
        spec = ModelSpec("llama", hidden_size=768, layers=6, heads=12, intermediate=2112, vocab=VOCABULARY)
        args = ("--chunked-prefill-size", "1024")
        return Setup(f"CPU, {os.cpu_count()} cores", spec, document_chars=1600, pool_tokens=2560, args=args)
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.cuda.is_available() and CUDA_HOME is None:
        raise Failure(
            "SGLang compiles kernels as it starts: install the CUDA toolkit, or set CUDA_HOME to where it is"
        )
    spec = ModelSpec(
        "llama",
        hidden_size=2048,
        layers=16,
        heads=32,
        intermediate=5632,
        vocab=VOCABULARY,
        dtype="bfloat16",
        max_position_embeddings=16384,
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator()
    return Setup(
        str(name),
        spec,
        document_chars=12800,
        pool_tokens=20480,
        args=("--attention-backend", "triton", "--enable-deterministic-inference"),
        # Else the deterministic mode compiles a product for each number of rows, when that is first seen.
        env={"SGLANG_ENABLE_JIT_DEEPGEMM": "0"},
    )


def speaking_model(directory: Path, spec: ModelSpec) -> Path:
    """A random model that says printable ASCII only, so that its answers survive the way through text."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    make_model(directory, spec)
    marker, weights = directory / "speaks_ascii", directory / "model.safetensors"
    if marker.exists():
        return directory
    tensors = load_file(weights)
    head = tensors["lm_head.weight"]
    spoken = AutoTokenizer.from_pretrained(directory)(SPOKEN, add_special_tokens=False).input_ids
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[spoken] = False
    head[silent] = 0.0  # never the largest logit
    scratch = weights.with_suffix(".new")
    save_file(tensors, scratch, metadata={"format": "pt"})
    os.replace(scratch, weights)
    marker.touch()
    return directory


# ---- the script ----


def script(document_chars: int) -> list[Turn]:
    order = BEFORE_RESTART + AFTER_RESTART
    turns = []
    for index, name in enumerate(order):
        number = order[: index + 1].count(name)
        turns.append(Turn(name, number, _message(name, number, document_chars), index >= len(BEFORE_RESTART)))
    return turns


def _message(conversation: str, number: int, document_chars: int) -> str:
    generator = random.Random(f"{conversation}{number}")
    length = document_chars if number == 1 else QUESTION_CHARS
    text = f"Message {number} of conversation {conversation}:"
    while len(text) < length:
        text += " " + generator.choice(WORDS.split())
    return text[:length]


def messages(turns: Sequence[Turn], index: int, answers: Sequence[Answer]) -> list[dict[str, str]]:
    """The conversation up to and including turn `index`; `answers` are those to the turns before it, or more."""
    history = []
    for turn, answer in zip(turns[:index], answers, strict=False):
        if turn.conversation == turns[index].conversation:
            history.append({"role": "user", "content": turn.message})
            history.append({"role": "assistant", "content": answer.text})
    return [*history, {"role": "user", "content": turns[index].message}]


# ---- the runs ----


@contextmanager
def blaming(server: Server) -> Iterator[None]:
    try:
        yield
    except (ServerDied, RequestFailed, http.client.HTTPException, OSError) as error:
        raise Failure(f"{type(error).__name__}: {error}\nthe server's log is {_relative(server.log)}") from error


def ask(server: Server, conversation: list[dict[str, str]]) -> Answer:
    with blaming(server):
        answer = server.chat(conversation, ANSWER_TOKENS)
        if len(answer.output_ids) != ANSWER_TOKENS:
            raise RequestFailed(f"the answer broke off after {len(answer.output_ids)} of {ANSWER_TOKENS} tokens")
    return answer


class Demo:
    """Both servers get each turn one right after the other, so that a busy machine slows both."""

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup = setup
        self.progress = progress
        self.turns = script(setup.document_chars)
        self._servers: list[Server] = []
        self._model = FOLDER / "model"

    def run(self) -> tuple[list[Row], Stored]:
        shutil.rmtree(STORE, ignore_errors=True)
        self._prepare_model()
        rows: list[Row] = []
        # The tier's default page, so that both servers find the same pages in the pool.
        with self._server("without tier", "--page-size", str(DEFAULT_PAGE_SIZE)) as stock:
            with self._server("with tier", *TIER_ARGS) as tier:
                self._converse(rows, len(BEFORE_RESTART), stock, tier)
                self.progress.show("stopping the server with tier; pages still in memory go to files")
            self.progress.keep(f"server with tier stopped in {tier.stop_s:.0f} s; its store stays")
            disk = disk_bytes(STORE)
            stock.flush_cache()
            with self._server("with tier, restarted", *TIER_ARGS) as tier:
                state = tier.tier_state()
                self._converse(rows, len(self.turns), stock, tier)
                self.progress.show("stopping the servers")
        return rows, Stored(disk, state["pages_file"] * state["page_size"], state["representation"])

    def end(self) -> None:
        """Leaves no process behind, also where stopping a server was itself interrupted."""
        for server in self._servers:
            server.kill()

    def _prepare_model(self) -> None:
        spec = self.setup.spec
        began = time.monotonic()
        self.progress.show(f"making a random Llama: {spec.layers} layers of {spec.hidden_size}, {spec.dtype}")
        speaking_model(self._model, spec)
        size = sum(path.stat().st_size for path in self._model.iterdir())
        self.progress.keep(f"model ready: {_relative(self._model)}, {size / 1e6:,.0f} MB{_took(began)}")

    @contextmanager
    def _server(self, title: str, *args: str) -> Iterator[Server]:
        def starting(elapsed_s: float, last_log_line: str) -> None:
            self.progress.show(f"starting the server {title}: {elapsed_s:.0f} s")

        log = FOLDER / f"{title.replace(', ', '-').replace(' ', '-')}.log"
        common = ("--max-total-tokens", str(self.setup.pool_tokens), "--sleep-on-idle", *self.setup.args)
        server = Server(self._model, (*common, *args), log=log, env=self.setup.env, progress=starting)
        self._servers.append(server)
        environment = [f"{name}={value}" for name, value in self.setup.env.items()]
        self.progress.keep(f"\nserver {title}:\n{_shown([*environment, *server.command()])}")
        with blaming(server), server:
            self.progress.keep(f"up after {server.start_s:.0f} s, log in {_relative(log)}")
            self.progress.show("warming up")
            self._warm_up(server)
            yield server

    def _warm_up(self, server: Server) -> None:
        """A process's first forward and its first restoration are slow, and not what the table compares.

        An unrelated prompt as long as a conversation, then another one that evicts it, and the first one again.
        """
        for seed in (0, 1, 0):
            prompt = random_prompt(self.setup.document_chars + QUESTION_CHARS, seed=seed, vocab=VOCABULARY)
            server.generate(prompt, 2)
        server.flush_cache()

    def _converse(self, rows: list[Row], until: int, stock: Server, tier: Server) -> None:
        """Adds the turns before `until` to `rows`."""
        began, first = time.monotonic(), len(rows)
        for index in range(first, until):
            self.progress.show(f"turn {self.turns[index].name} ({index + 1} of {len(self.turns)})")
            request = messages(self.turns, index, [row.without_tier for row in rows])
            wanted = ask(stock, request)
            rows.append(Row(self.turns[index], ask(tier, request), wanted))
        count = until - first
        self.progress.keep(f"{count} turn{'s' * (count > 1)} answered by both servers{_took(began)}")


# ---- what is printed ----


def report(rows: Sequence[Row], stored: Stored, setup: Setup) -> str:
    return "\n".join([*_table(rows, setup), "", *_summary(rows, stored, setup)])


def _table(rows: Sequence[Row], setup: Setup) -> list[str]:
    spec = setup.spec
    title = f"Llama, {spec.layers} layers of {spec.hidden_size}, {spec.dtype}, on {setup.device}; "
    title += f"KV pool of {setup.pool_tokens:,} tokens; times to the first token"
    head = ["turn", "prompt", "from device", "restored", "prefilled", "with tier", "without", "same output"]
    cells = [head, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_aligned(line, widths) for line in cells]
    return [title, "", lines[0], "-" * len(lines[0]), *lines[1:]]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _summary(rows: Sequence[Row], stored: Stored, setup: Setup) -> list[str]:
    restored = [row for row in rows if row.answer.cached_host]
    tokens = sum(row.answer.cached_host for row in restored)
    from_files = sum(row.answer.cached_host for row in restored if row.turn.after_restart)
    lines = [
        f"{tokens:,} prompt tokens were restored instead of prefilled, {from_files:,} of them after the restart."
    ]
    if restored:
        tier = statistics.median(row.answer.ttft_s for row in restored)
        without = statistics.median(row.without_tier.ttft_s for row in restored)
        lines.append(
            f"Median time to first token of these {len(restored)} turns: {_seconds(tier)} with the tier, "
            f"{_seconds(without)} without ({without / tier:.1f} x)."
        )
    form = "hidden states" if stored.form == "hidden" else "K and V"
    lines.append(
        f"Stored as {form}: {stored.bytes_on_disk / max(stored.tokens, 1):,.0f} bytes a token on disk, index "
        f"included; K and V alone are {setup.kv_bytes_per_token:,}."
    )
    return lines


def complaints(rows: Sequence[Row]) -> list[str]:
    """What must not be: a differing output, or a tier that restored nothing."""
    found = [f"turn {row.turn.name}: {_first_difference(row)}" for row in rows if not row.equal]
    found += [
        f"turn {row.turn.name}: nothing was restored"
        for row in rows
        if row.turn.after_restart and not row.answer.cached_host
    ]
    return found


def _first_difference(row: Row) -> str:
    at = compare(row.answer, row.without_tier).first_token_apart
    return f"the output differs from the run without the tier from token {at} on"


def _shown(command: Sequence[str]) -> str:
    """The command as one types it in the repository's root, a few flags a line, the tier's on the last."""
    words = [_relative(word) for word in command]
    groups = [words[: words.index("-m") + 2]]
    for word in words[len(groups[0]) :]:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    lines = ["  "]
    for group in groups:
        text = shlex.join(group)
        if len(lines[-1]) + len(text) > MAX_WIDTH or group[0] == TIER_ARGS[0]:
            lines.append("     ")
        lines[-1] += f" {text}"
    return " \\\n".join(lines)


def _relative(word: str | Path) -> str:
    return str(word).removeprefix(f"{ROOT}{os.sep}")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.0f} ms"


def _took(began: float) -> str:
    return f" ({time.monotonic() - began:.0f} s)"


# ---- the command ----


def _end(number: int, frame: object) -> NoReturn:
    """Ends the demo, once: taking the server down must not be interrupted."""
    for signal_number in STOP_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    raise Stopped(number)


def main() -> int:
    for number in STOP_SIGNALS:
        signal.signal(number, _end)
    progress = Progress(sys.stdout)
    try:
        setup = choose_setup()
    except Failure as failure:
        progress.keep(f"demo: FAILED: {failure}")
        return 1
    demo = Demo(setup, progress)
    try:
        rows, stored = demo.run()
    except Stopped as stopped:
        demo.end()
        progress.keep("demo: stopped, and so is the server")
        return 128 + int(stopped.args[0])
    except Failure as failure:
        demo.end()
        progress.keep(f"demo: FAILED: {failure}")
        return 1
    progress.keep(f"\n{report(rows, stored, setup)}")
    wrong = complaints(rows)
    for line in wrong:
        progress.keep(f"demo: FAILED: {line}; logs are in {_relative(FOLDER)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
