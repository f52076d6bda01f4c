"""Workloads to replay: who asks when, how much, and which prompts begin alike.

A prompt is a list of blocks: prompts that begin with the same blocks begin with the same tokens. Three workloads are
made from a seed, without any file: `chat`, `agent`, `rag`. Four kinds of traces are read, plain or gzipped:

    mooncake   JSON lines of kvcache-ai/Mooncake, `FAST25-release/traces/*.jsonl`
    agentic    JSON lines of callanjfox/kv-cache-tester: a coding agent's conversation each. `hash_ids` of a request
               may also be runs: `hash_rle`, `[start, count, …]`
    azure      CSV of Azure/AzurePublicDataset, `AzureLLMInferenceTrace_*.csv`; no prompt begins like another
    burstgpt   CSV of HPMLL/BurstGPT; requests of one session, where it names them, follow one another
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import itertools
import json
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from bench.client import random_prompt

_BLOCK = 64  # tokens of a block, where a workload does not say
_MOONCAKE_BLOCK = 512


@dataclass(frozen=True)
class Call:
    """One request."""

    blocks: tuple[int, ...]  # ids of the prompt's blocks, the last of which may be used in part
    input_tokens: int
    output_tokens: int
    pause_s: float = 0.0  # since the answer before it in its session: a person reads, a tool runs


@dataclass(frozen=True)
class Session:
    """Calls that follow one another: each is sent when the one before has been answered."""

    begins_s: float  # from the workload's begin
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Workload:
    name: str
    block_tokens: int
    sessions: tuple[Session, ...]  # in the order in which they begin

    @property
    def calls(self) -> Iterator[Call]:
        return itertools.chain.from_iterable(session.calls for session in self.sessions)

    def prompt(self, call: Call) -> list[int]:
        """Token ids that any vocabulary of 512 or more has."""
        tokens = (random_prompt(self.block_tokens, seed=block) for block in call.blocks)
        return list(itertools.chain.from_iterable(tokens))[: call.input_tokens]

    def first(self, sessions: int, calls: int) -> Workload:
        """The first sessions, and the first calls of each."""
        kept = (replace(session, calls=session.calls[:calls]) for session in self.sessions[:sessions])
        return replace(self, sessions=tuple(kept))

    def shrunk(self, factor: int, longest: int) -> Workload:
        """With prompts and answers shorter by a factor, so that what begins alike still does.

        Sessions end before the first prompt that would then be of more than `longest` tokens.
        """
        block_tokens = max(1, self.block_tokens // factor)

        def shorter(call: Call) -> Call:
            scale = block_tokens / self.block_tokens
            inputs, outputs = round(call.input_tokens * scale), round(call.output_tokens * scale)
            return replace(call, input_tokens=max(1, inputs), output_tokens=max(1, outputs))

        sessions = []
        for session in self.sessions:
            calls = itertools.takewhile(lambda call: call.input_tokens <= longest, map(shorter, session.calls))
            if fitting := tuple(calls):
                sessions.append(replace(session, calls=fitting))
        return Workload(self.name, block_tokens, tuple(sessions))

    def reusable_share(self, capacity_tokens: int | None = None) -> float:
        """Of all prompt tokens, those an ideal prefix cache finds: leading blocks that an earlier prompt had.

        With a capacity, of an LRU of so many tokens that sees the calls of one session after another.
        """
        most = None if capacity_tokens is None else capacity_tokens // self.block_tokens
        prefixes: dict[tuple[int, int], int] = {}  # the prefix before, and a block: the prefix with it
        cached: OrderedDict[int, None] = OrderedDict()
        found = total = 0
        for call in self.calls:
            chain, prefix = [], -1
            for block in call.blocks:
                prefix = prefixes.setdefault((prefix, block), len(prefixes))
                chain.append(prefix)
            leading = sum(1 for _ in itertools.takewhile(cached.__contains__, chain))
            found += min(leading * self.block_tokens, call.input_tokens)
            total += call.input_tokens
            for prefix in reversed(chain):  # one outlives those that continue it
                cached[prefix] = None
                cached.move_to_end(prefix)
            while most is not None and len(cached) > most:
                cached.popitem(last=False)
        return found / total if total else 0.0


# ---- made from a seed ----


def chat(*, sessions: int = 24, turns: int = 6, seed: int = 0) -> Workload:
    """People who come back: a system prompt for all, then turns of very different lengths, minutes apart."""
    chance, names = random.Random(seed), itertools.count()
    system = _take(names, 4)
    made = []
    for begins_s in _arrivals(chance, sessions, mean_s=20.0):
        history, calls = system, list[Call]()
        for _ in range(turns):
            history += _take(names, 1 + min(24, int(chance.expovariate(1 / 4))))  # a question, maybe with a document
            answer = 1 + min(7, int(chance.expovariate(1 / 3)))
            pause_s = chance.expovariate(1 / 60) if calls else 0.0
            calls.append(Call(history, len(history) * _BLOCK, answer * _BLOCK, pause_s))
            history += _take(names, answer)
        made.append(Session(begins_s, tuple(calls)))
    return Workload("chat", _BLOCK, tuple(made))


def agent(*, sessions: int = 12, turns: int = 16, seed: int = 0) -> Workload:
    """Tools in a loop: a long prompt of instructions and tools for all, then short answers and long results."""
    chance, names = random.Random(seed), itertools.count()
    tools = _take(names, 64)
    made = []
    for begins_s in _arrivals(chance, sessions, mean_s=30.0):
        history, calls = tools + _take(names, 8), list[Call]()
        for _ in range(turns):
            pause_s = chance.expovariate(1 / 8) if calls else 0.0
            calls.append(Call(history, len(history) * _BLOCK, 2 * _BLOCK, pause_s))
            history += _take(names, 3 + min(60, int(chance.paretovariate(1.2) * 4)))  # the answer, a tool's result
        made.append(Session(begins_s, tuple(calls)))
    return Workload("agent", _BLOCK, tuple(made))


def rag(*, sessions: int = 160, documents: int = 40, seed: int = 0) -> Workload:
    """Questions on a few documents of a collection, some of which are asked for far more often than others."""
    chance, names = random.Random(seed), itertools.count()
    system = _take(names, 4)
    texts = [_take(names, chance.randint(12, 48)) for _ in range(documents)]
    popularity = [1 / rank for rank in range(1, documents + 1)]
    made = []
    for begins_s in _arrivals(chance, sessions, mean_s=4.0):
        chosen = dict.fromkeys(chance.choices(range(documents), popularity, k=2))  # the best match first
        prompt = system + sum((texts[document] for document in chosen), ()) + _take(names, 1)
        made.append(Session(begins_s, (Call(prompt, len(prompt) * _BLOCK - chance.randrange(32), 2 * _BLOCK),)))
    return Workload("rag", _BLOCK, tuple(made))


def _take(names: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(itertools.islice(names, count))


def _arrivals(chance: random.Random, count: int, mean_s: float) -> Iterator[float]:
    """A Poisson process."""
    return itertools.accumulate(chance.expovariate(1 / mean_s) for _ in range(count))


# ---- read from traces ----


def mooncake(lines: TextIO) -> Workload:
    """Arrivals in milliseconds, blocks of 512 tokens."""
    rows = map(json.loads, filter(str.strip, lines))
    sessions = [
        Session(row["timestamp"] / 1e3, (Call(tuple(row["hash_ids"]), row["input_length"], row["output_length"]),))
        for row in rows
    ]
    return _in_order("mooncake", _MOONCAKE_BLOCK, sessions)


def agentic(lines: TextIO) -> Workload:
    """Conversations that begin one after another; an agent's helpers are sessions beside it.

    Blocks are named within a conversation, and its times start at nought: conversations share no block here, and
    each begins when the one before has had a tenth of its time.
    """
    sessions: list[Session] = []
    begins_s, first_name, block_tokens = 0.0, 0, _BLOCK
    for conversation in map(json.loads, filter(str.strip, lines)):
        block_tokens = conversation["block_size"]
        own = list(_agentic_sessions(conversation["requests"], begins_s, first_name))
        sessions += own
        names = [name for session in own for call in session.calls for name in call.blocks]
        first_name = max(names, default=first_name) + 1
        begins_s += 0.1 * conversation["requests"][-1]["t"]
    return _in_order("agentic", block_tokens, sessions)


def _agentic_sessions(requests: list[dict[str, Any]], begins_s: float, first_name: int) -> Iterator[Session]:
    calls = []
    for request in requests:
        if request["type"] == "subagent":
            yield from _agentic_sessions(request["requests"], begins_s + request["t"], first_name)
        else:
            blocks = tuple(first_name + name for name in _agentic_blocks(request))
            pause_s = float(request.get("think_time") or 0.0)
            calls.append(Call(blocks, request["in"], max(1, request["out"]), pause_s))
    if calls:
        yield Session(begins_s, tuple(calls))


def _agentic_blocks(request: Mapping[str, Any]) -> Iterable[int]:
    if "hash_rle" not in request:
        return list(request["hash_ids"])
    runs = zip(request["hash_rle"][::2], request["hash_rle"][1::2], strict=True)
    return itertools.chain.from_iterable(range(start, start + count) for start, count in runs)


def azure(lines: TextIO) -> Workload:
    names, sessions, first = itertools.count(), [], None
    for row in csv.DictReader(lines):
        at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26])
        first = first or at
        call = _unlike_any(names, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        sessions.append(Session((at - first).total_seconds(), (call,)))
    return _in_order("azure", _BLOCK, sessions)


def burstgpt(lines: TextIO) -> Workload:
    """Sessions where there are any: a request's prompt is the one before, its answer, and what is new."""
    names: Iterator[int] = itertools.count()
    by_session: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for number, row in enumerate(csv.DictReader(lines)):
        by_session[row.get("Session ID") or f"row {number}"].append(row)
    sessions = []
    for rows in by_session.values():
        history: tuple[int, ...] = ()
        calls: list[Call] = []
        ended_s = float(rows[0]["Timestamp"])
        for request in rows:
            tokens, answer = int(request["Request tokens"]), int(request["Response tokens"])
            blocks = -(-tokens // _BLOCK)
            history = history[:blocks] + _take(names, max(0, blocks - len(history)))
            at_s = float(request["Timestamp"])
            if tokens and answer:  # a failed request has no answer
                calls.append(Call(history, tokens, answer, max(0.0, at_s - ended_s)))
            ended_s = at_s + float(request.get("Elapsed time") or 0.0)
        if calls:
            sessions.append(Session(float(rows[0]["Timestamp"]), tuple(calls)))
    return _in_order("burstgpt", _BLOCK, sessions)


def _unlike_any(names: Iterator[int], input_tokens: int, output_tokens: int) -> Call:
    return Call(_take(names, -(-input_tokens // _BLOCK)), input_tokens, max(1, output_tokens))


def _in_order(name: str, block_tokens: int, sessions: Iterable[Session]) -> Workload:
    return Workload(name, block_tokens, tuple(sorted(sessions, key=lambda session: session.begins_s)))


MADE: dict[str, Callable[..., Workload]] = {"chat": chat, "agent": agent, "rag": rag}
READERS: dict[str, Callable[[TextIO], Workload]] = {
    "mooncake": mooncake,
    "agentic": agentic,
    "azure": azure,
    "burstgpt": burstgpt,
}


def workload_of(name: str, *, most_lines: int | None = None) -> Workload:
    """`chat`, `agent`, `rag`, or `KIND=PATH` of a trace, of which the first lines are read. Raises ValueError."""
    if name in MADE:
        return MADE[name]()
    kind, _, path = name.partition("=")
    if kind not in READERS or not path:
        known = (*MADE, *(f"{reader}=PATH" for reader in READERS))
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    raw = Path(path).read_bytes()
    text = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    lines = itertools.islice(io.StringIO(text.decode()), most_lines)
    try:
        return READERS[kind](io.StringIO("".join(lines)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no trace of kind {kind}: {error!r}") from error
