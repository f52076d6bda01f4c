"""Runs the real SGLang server and talks to it: what the demo, the benches and the end-to-end tests share.

    model = make_model(tmp / "llama", ModelSpec("llama"))
    with Server(model, ["--max-total-tokens", "4096", "--page-size", "64"], log=tmp / "server.log") as server:
        answer = server.generate(random_prompt(700, seed=1), max_new_tokens=16)

Only the standard library is used towards the server, so timings hold no client framework.
"""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil

from bench.models import FIRST_PLAIN_ID, ModelSpec, make_model

__all__ = [
    "Answer",
    "Difference",
    "ModelSpec",
    "Request",
    "RequestFailed",
    "Server",
    "ServerDied",
    "compare",
    "make_model",
    "on_accelerator",
    "random_prompt",
]

HOST = "127.0.0.1"
POLL_S = 0.2  # between two looks at a starting or stopping server
LOG_TAIL_LINES = 60
CPU_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mem-fraction-static", "0.2"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)
ACCELERATOR_ARGS = ("--mem-fraction-static", "0.3")


class ServerDied(RuntimeError):
    """The server ended, or did not answer in time; the message ends with its log's last lines."""


class RequestFailed(RuntimeError):
    """The server refused a request or broke it off."""


class Progress(Protocol):
    def __call__(self, elapsed_s: float, last_log_line: str) -> None:
        """Called about once a second while the server starts."""


@dataclass(frozen=True)
class Request:
    """One generation. Greedy, and of exactly `max_new_tokens` tokens unless `stop_at_eos`."""

    prompt: Sequence[int] | str
    max_new_tokens: int = 16
    logprobs: bool = True  # of the output; costs a little time a token
    logprobs_from: int | None = None  # prompt position; SGLang takes no position from here on out of a cache
    cache_salt: str | None = None
    extra_key: str | None = None
    stream: bool = True  # without it there is no time to first token
    stop_at_eos: bool = False


@dataclass(frozen=True)
class Answer:
    output_ids: tuple[int, ...]
    output_logprobs: tuple[float, ...]  # natural logarithm, one an output token; empty from `chat`
    input_logprobs: tuple[float, ...]  # of the prompt after position `logprobs_from`; empty if not asked for
    text: str
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were not prefilled
    cached_device: int  # of these, found in the KV pool
    cached_host: int  # of these, brought back from a tier below
    ttft_s: float  # seconds from sending to the first token; the whole time if not streamed
    total_s: float  # seconds from sending to the last token
    finish_reason: str  # "length", "stop", "abort"


@dataclass(frozen=True)
class Difference:
    """How far two answers to one prompt are apart."""

    same_tokens: bool
    first_token_apart: int | None  # index in the output
    logprob: float  # largest absolute difference over the input and the output before `first_token_apart`


def compare(a: Answer, b: Answer) -> Difference:
    """Compares log-probabilities where both answers have seen the same tokens."""
    if len(a.input_logprobs) != len(b.input_logprobs):
        raise ValueError("the answers hold log-probabilities from different positions on")
    pairs = itertools.zip_longest(a.output_ids, b.output_ids)
    apart = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    left = (*a.input_logprobs, *a.output_logprobs[:apart])
    right = (*b.input_logprobs, *b.output_logprobs[:apart])
    largest = max((abs(x - y) for x, y in zip(left, right, strict=True)), default=0.0)
    return Difference(same_tokens=apart is None, first_token_apart=apart, logprob=largest)


def random_prompt(tokens: int, seed: int, vocab: int = 512) -> list[int]:
    """Token ids of bytes and letter pairs, no special tokens."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_PLAIN_ID, vocab) for _ in range(tokens)]


@functools.cache
def on_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process with all its children, started on entry and gone on exit."""

    def __init__(
        self,
        model: Path,
        args: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 240.0,
        progress: Progress | None = None,
    ) -> None:
        self.model = Path(model)
        self.args = tuple(args)
        self.log = Path(log)
        self.env = dict(env or {})
        self.start_timeout_s = start_timeout_s
        self.progress = progress
        self.port = free_port()
        self.start_s = 0.0  # seconds from launch to the first answered request
        self.stop_s = 0.0  # seconds from the signal until no process is left
        self._launcher: subprocess.Popen[bytes] | None = None

    # -- life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop() if kind is None else self.kill()

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        words += ["--host", HOST, "--port", str(self.port), "--skip-server-warmup"]
        words += ACCELERATOR_ARGS if on_accelerator() else CPU_ARGS
        if "--dtype" not in self.args:
            words += ["--dtype", self._model_dtype()]
        return [*words, *self.args]

    def start(self) -> None:
        if self._launcher is not None:
            raise RuntimeError("the server was started already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self.log.open("wb") as log:
            self._launcher = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._child_environment(),
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(began)
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - began

    def stop(self, timeout_s: float = 60.0) -> int:
        """Asks the launcher to drain and end, as an operator would; kills what is left after `timeout_s`.

        Returns the launcher's exit status, negative where a signal ended it.
        """
        launcher = self._running_launcher()
        if launcher is None:
            return self._reap()
        began = time.monotonic()
        family = self.processes()
        launcher.send_signal(signal.SIGTERM)
        try:
            launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._note(f"the launcher was still there {timeout_s:g} s after SIGTERM: killing it")
        self._kill(family)
        self.stop_s = time.monotonic() - began
        return self._reap()

    def kill(self) -> None:
        """SIGKILL to the launcher and all its descendants at once, as when the machine goes down."""
        began = time.monotonic()
        self._kill(self.processes())
        self._reap()
        self.stop_s = time.monotonic() - began

    def processes(self) -> list[psutil.Process]:
        """The launcher, its descendants and whatever else is in its process group."""
        launcher = self._launcher
        if launcher is None:
            return []
        everyone = psutil.process_iter()
        found = {process.pid: process for process in everyone if _group(process.pid) == launcher.pid}
        if self._running_launcher() is not None:
            with _gone_is_fine():
                root = psutil.Process(launcher.pid)
                found.update({process.pid: process for process in (root, *root.children(recursive=True))})
        return list(found.values())

    def pids(self, title: str) -> list[int]:
        """Processes whose title holds `title`; SGLang's are `sglang::scheduler` and `sglang::detokenizer`."""
        pids = []
        for process in self.processes():
            with _gone_is_fine():
                if title in " ".join(process.cmdline()):
                    pids.append(process.pid)
        return sorted(pids)

    def alive(self) -> bool:
        return self._running_launcher() is not None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    # -- requests

    def generate(
        self,
        prompt: Sequence[int] | str,
        max_new_tokens: int = 16,
        *,
        logprobs: bool = True,
        logprobs_from: int | None = None,
        cache_salt: str | None = None,
        extra_key: str | None = None,
        stream: bool = True,
        timeout_s: float = 300.0,
    ) -> Answer:
        request = Request(prompt, max_new_tokens, logprobs, logprobs_from, cache_salt, extra_key, stream)
        return self.send(request, timeout_s=timeout_s)

    def send(self, request: Request, *, timeout_s: float = 300.0) -> Answer:
        """One request by the native `/generate` endpoint."""
        began = time.monotonic()
        events = self._post("/generate", _generate_body(request), request.stream, timeout_s)
        ttft_s, last = 0.0, None
        for event in events:
            ttft_s = ttft_s or time.monotonic() - began
            last = event
        if last is None or "error" in last:
            raise RequestFailed(f"/generate answered {last}")
        return _native_answer(last, ttft_s, time.monotonic() - began)

    def generate_many(
        self, requests: Sequence[Request], *, concurrency: int | None = None, timeout_s: float = 300.0
    ) -> list[Answer]:
        """Sends all requests, at most `concurrency` at a time, and returns the answers in their order."""
        if not requests:
            return []
        with ThreadPoolExecutor(concurrency or len(requests)) as pool:
            return list(pool.map(lambda request: self.send(request, timeout_s=timeout_s), requests))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int = 16,
        *,
        cache_salt: str | None = None,
        timeout_s: float = 300.0,
    ) -> Answer:
        """One streamed request by `/v1/chat/completions`, as a chat application sends it."""
        began = time.monotonic()
        body = _chat_body(messages, max_new_tokens, cache_salt)
        events = self._post("/v1/chat/completions", body, True, timeout_s)
        answer = _ChatStream()
        for event in events:
            answer.take(event, time.monotonic() - began)
        return answer.finish(time.monotonic() - began)

    def server_info(self) -> dict[str, Any]:
        """Resolved settings, and per scheduler `internal_states` with the pool's capacity and use."""
        return self._get("/server_info")

    def loads(self) -> dict[str, Any]:
        """Running and waiting requests and used tokens, per scheduler (`/v1/loads`)."""
        return self._get("/v1/loads")

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        """Empties SGLang's radix tree once the server is idle."""
        status, body = self._request("POST", f"/flush_cache?timeout={timeout_s:g}", None, timeout_s + 10.0)
        if status != 200:
            raise RequestFailed(f"/flush_cache answered {status}: {body.decode(errors='replace')}")

    def healthy(self) -> bool:
        """Whether a one-token request comes through; takes a second by SGLang's own design."""
        try:
            return self._request("GET", "/health_generate", None, 30.0)[0] == 200
        except OSError:
            return False

    # -- how it is done

    def _model_dtype(self) -> str:
        """SGLang's own choice for a float32 checkpoint is float16."""
        config = json.loads((self.model / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def _child_environment(self) -> dict[str, str]:
        child = {**os.environ, **self.env}
        if "PYTHONDONTWRITEBYTECODE" not in self.env:
            child.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all of SGLang anew
        return child

    def _wait_until_healthy(self, began: float) -> None:
        told = 0.0
        while True:
            elapsed = time.monotonic() - began
            if not self.alive():
                raise ServerDied(f"the server ended after {elapsed:.0f} s\n{self.log_tail()}")
            if elapsed > self.start_timeout_s:
                raise ServerDied(f"no answer within {self.start_timeout_s:g} s\n{self.log_tail()}")
            if self.progress and elapsed - told >= 1.0:
                told = elapsed
                self.progress(elapsed, self.log_tail(1))
            if self._listens() and self.healthy():
                return
            time.sleep(POLL_S)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def _running_launcher(self) -> subprocess.Popen[bytes] | None:
        return self._launcher if self._launcher is not None and self._launcher.poll() is None else None

    def _reap(self) -> int:
        if self._launcher is None:
            return 0
        return self._launcher.wait(30.0)

    def _kill(self, family: list[psutil.Process]) -> None:
        """Kills `family` and every process that joined the group meanwhile, and waits until they are gone."""
        left = {process.pid: process for process in (*family, *self.processes())}
        for process in left.values():
            with _gone_is_fine():
                process.kill()
        _, alive = psutil.wait_procs(list(left.values()), timeout=30.0)
        if survivors := [process for process in alive if _runs(process)]:
            raise RuntimeError(f"processes survive SIGKILL: {survivors}")

    def _note(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(f"[harness] {line}\n")

    def _get(self, path: str) -> dict[str, Any]:
        status, body = self._request("GET", path, None, 60.0)
        if status != 200:
            raise RequestFailed(f"{path} answered {status}: {body.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        with _connection(self.port, timeout_s) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def _post(self, path: str, body: dict[str, Any], stream: bool, timeout_s: float) -> Iterator[dict[str, Any]]:
        """The answer's events as they arrive; one event where it is not streamed."""
        with _connection(self.port, timeout_s) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                reason = response.read().decode(errors="replace")
                raise RequestFailed(f"{path} answered {response.status}: {reason}")
            yield from _server_sent_events(response) if stream else iter([json.load(response)])


class _ChatStream:
    """Puts the chunks of a streamed chat answer together."""

    def __init__(self) -> None:
        self.ttft_s = 0.0
        self.text = ""
        self.finish_reason = ""
        self.usage: dict[str, Any] = {}
        self.extension: dict[str, Any] = {}

    def take(self, event: dict[str, Any], now_s: float) -> None:
        """Adds a chunk that came at `now_s`. SGLang sends the first one when the first token is there."""
        if "error" in event:
            raise RequestFailed(f"the chat request failed: {event['error']}")
        self.usage = event.get("usage") or self.usage
        self.extension.update(event.get("sglext") or {})
        for choice in event.get("choices", ()):
            self.ttft_s = self.ttft_s or now_s
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def finish(self, total_s: float) -> Answer:
        details = self.extension.get("cached_tokens_details") or {}
        return Answer(
            output_ids=tuple((self.extension.get("output_ids") or [[]])[0]),
            output_logprobs=(),
            input_logprobs=(),
            text=self.text,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            cached_tokens=sum(details.get(source, 0) for source in ("device", "host", "storage")),
            cached_device=details.get("device", 0),
            cached_host=details.get("host", 0),
            ttft_s=self.ttft_s or total_s,
            total_s=total_s,
            finish_reason=self.finish_reason,
        )


def _generate_body(request: Request) -> dict[str, Any]:
    field = "text" if isinstance(request.prompt, str) else "input_ids"
    body: dict[str, Any] = {
        field: request.prompt if isinstance(request.prompt, str) else list(request.prompt),
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": request.max_new_tokens,
            "ignore_eos": not request.stop_at_eos,
        },
        "return_logprob": request.logprobs or request.logprobs_from is not None,
        "logprob_start_len": -1 if request.logprobs_from is None else request.logprobs_from,
        "stream": request.stream,
    }
    optional = {"cache_salt": request.cache_salt, "extra_key": request.extra_key}
    return body | {name: value for name, value in optional.items() if value is not None}


def _chat_body(messages: Sequence[Mapping[str, str]], max_new_tokens: int, cache_salt: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "default",
        "messages": [dict(message) for message in messages],
        "temperature": 0.0,
        "max_tokens": max_new_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_cached_tokens_details": True,
        "return_output_ids_in_sglext": True,
    }
    return body | ({"cache_salt": cache_salt} if cache_salt is not None else {})


def _native_answer(event: dict[str, Any], ttft_s: float, total_s: float) -> Answer:
    meta = event["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    output_ids = tuple(event.get("output_ids") or ())
    if len(output_ids) != meta["completion_tokens"]:
        raise RequestFailed("the last event does not hold every output token: is incremental streaming on?")
    return Answer(
        output_ids=output_ids,
        output_logprobs=_logprobs(meta.get("output_token_logprobs")),
        input_logprobs=_logprobs(meta.get("input_token_logprobs")),
        text=event.get("text", ""),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        cached_device=details.get("device", 0),
        cached_host=details.get("host", 0),
        ttft_s=ttft_s,
        total_s=total_s,
        finish_reason=(meta["finish_reason"] or {}).get("type", ""),
    )


def _logprobs(entries: list[list[Any]] | None) -> tuple[float, ...]:
    """SGLang's entries are log-probability, token, text; the first of a prompt's has no probability."""
    return tuple(entry[0] for entry in entries or () if entry[0] is not None)


def _server_sent_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.strip()
        if text.startswith(b"data:") and text != b"data: [DONE]":
            yield json.loads(text[len(b"data:") :])


@contextmanager
def _connection(port: int, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    """A process may end between being found and being asked."""
    with suppress(psutil.NoSuchProcess):
        yield


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
