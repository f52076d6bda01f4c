"""Greedy requests to an SGLang server over HTTP, and what came back as values that can be compared.

Only the standard library is used, so that timings hold no client framework.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.models import FIRST_PLAIN_ID

ANSWER_WAIT_S = 300.0
UPDATE_WAIT_S = 120.0  # of weights
IDLE_WAIT_S = 30.0
FIGURES_WAIT_S = 30.0


class RequestFailed(RuntimeError):
    """The server refused a request or broke it off."""


@dataclass(frozen=True)
class Request:
    """One generation. Greedy, streamed, and of exactly `max_new_tokens` tokens."""

    prompt: Sequence[int]
    max_new_tokens: int = 16
    logprobs: bool = True  # of the output; costs a little time a token
    logprobs_from: int | None = None  # prompt position; SGLang takes no position from here on out of a cache
    cache_salt: str | None = None
    extra_key: str | None = None
    images: Sequence[str] = ()  # as URIs, one for each image token of the prompt


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
    ttft_s: float  # seconds from sending to the first token
    total_s: float  # seconds from sending to the last token
    finish_reason: str  # "length", "stop", "abort"
    verifications: int = 0  # forwards that verified drafts, where the server speculates


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


class Client:
    """Talks to the server at `host`:`port`. Safe to use from several threads: each call has its own connection."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self.host = host

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 16,
        *,
        logprobs: bool = True,
        logprobs_from: int | None = None,
    ) -> Answer:
        return self.send(Request(prompt, max_new_tokens, logprobs, logprobs_from))

    def send(self, request: Request) -> Answer:
        """One request by the native `/generate` endpoint."""
        return self.begin(request)()

    def begin(self, request: Request) -> Callable[[], Answer]:
        """Sends a request, and returns a function that waits for the answer; it measures times as it reads."""
        began = time.monotonic()
        events = self._post("/generate", _generate_body(request), True, ANSWER_WAIT_S)

        def finish() -> Answer:
            ttft_s, last = 0.0, None
            for event in events:
                ttft_s = ttft_s or time.monotonic() - began
                last = event
            if last is None or "error" in last:
                raise RequestFailed(f"/generate answered {last}")
            return _native_answer(last, ttft_s, time.monotonic() - began)

        return finish

    def chat(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> Answer:
        """One streamed request by `/v1/chat/completions`, as a chat application sends it."""
        began = time.monotonic()
        body = _chat_body(messages, max_new_tokens)
        events = self._post("/v1/chat/completions", body, True, ANSWER_WAIT_S)
        answer = _ChatStream()
        for event in events:
            answer.take(event, time.monotonic() - began)
        return answer.finish(time.monotonic() - began)

    def model_info(self) -> dict[str, Any]:
        """What the HTTP server knows by itself, whatever schedulers do."""
        return self._get("/model_info")

    def server_info(self) -> dict[str, Any]:
        """Resolved settings, and per scheduler `internal_states` with the pool's capacity and use."""
        return self._get("/server_info")

    def tier_state(self, rank: int = 0) -> dict[str, Any]:
        """A rank's tier's own account of itself."""
        return self.tier_states()[rank]

    def tier_states(self) -> list[dict[str, Any]]:
        """`tier_state` of all ranks; asks again while figures are old, as a slow prefetcher has not sent new ones."""
        deadline = time.monotonic() + FIGURES_WAIT_S
        while True:
            states = [state["hcache"] for state in self.server_info()["internal_states"]]
            late = any("no answer in" in state["prefetcher"] for state in states)
            if not late or time.monotonic() > deadline:
                return states

    def flush_cache(self) -> None:
        """Empties SGLang's radix tree once the server is idle."""
        status, body = self._request("POST", f"/flush_cache?timeout={IDLE_WAIT_S:g}", None, IDLE_WAIT_S + 10.0)
        if status != 200:
            raise RequestFailed(f"/flush_cache answered {status}: {body.decode(errors='replace')}")

    def update_weights(self, model: Path) -> None:
        """Replaces the weights in place by those of another checkpoint of the same shape."""
        for answer in self._post("/update_weights_from_disk", {"model_path": str(model)}, False, UPDATE_WAIT_S):
            if not answer["success"]:
                raise RequestFailed(f"/update_weights_from_disk: {answer['message']}")

    def hold_weight_session(self) -> None:
        """One in which nothing is loaded: as if the weights were written where they are, by RDMA."""
        for path in ("/begin_weight_update", "/end_weight_update"):
            for answer in self._post(path, {}, False, UPDATE_WAIT_S):
                if not answer["success"]:
                    raise RequestFailed(f"{path}: {answer['message']}")

    def pause(self) -> None:
        """Schedulers make no more batches once they read this; what they are asked later, they answer behind it."""
        next(self._post("/pause_generation", {"mode": "in_place"}, False, ANSWER_WAIT_S))

    def go_on(self) -> None:
        """After a pause."""
        next(self._post("/continue_generation", {}, False, ANSWER_WAIT_S))

    def healthy(self) -> bool:
        """Whether a one-token request comes through; takes a second by SGLang's own design."""
        try:
            return self._request("GET", "/health_generate", None, 30.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _get(self, path: str) -> dict[str, Any]:
        status, body = self._request("GET", path, None, 60.0)
        if status != 200:
            raise RequestFailed(f"{path} answered {status}: {body.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)

    def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        with closing(self._connect(timeout_s)) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def _post(self, path: str, body: dict[str, Any], stream: bool, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Sends now, and returns the answer's events as they arrive; one event where it is not streamed."""
        connection = self._connect(timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        except BaseException:
            connection.close()
            raise
        return self._events(connection, path, stream)

    def _events(self, connection: http.client.HTTPConnection, path: str, stream: bool) -> Iterator[dict[str, Any]]:
        with closing(connection):
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
    body: dict[str, Any] = {
        "input_ids": list(request.prompt),
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": request.max_new_tokens,
            "ignore_eos": True,
        },
        "return_logprob": request.logprobs or request.logprobs_from is not None,
        "logprob_start_len": -1 if request.logprobs_from is None else request.logprobs_from,
        "stream": True,
    }
    optional = {
        "cache_salt": request.cache_salt,
        "extra_key": request.extra_key,
        "image_data": list(request.images) or None,
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def _chat_body(messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> dict[str, Any]:
    return {
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
        verifications=meta.get("spec_verify_ct") or 0,
    )


def _logprobs(entries: list[list[Any]] | None) -> tuple[float, ...]:
    """SGLang's entries are log-probability, token, text; the first of a prompt's has no probability."""
    return tuple(entry[0] for entry in entries or () if entry[0] is not None)


def _server_sent_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.strip()
        if text.startswith(b"data:") and text != b"data: [DONE]":
            yield json.loads(text[len(b"data:") :])
