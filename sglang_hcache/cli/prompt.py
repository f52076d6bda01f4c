"""A prompt by its tokens, and what its pages are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

import msgspec

from sglang_hcache.cli.common import CommandFailed, explain
from sglang_hcache.page_hash import namespace_seed, page_hash

TOKENS = "a JSON list of token ids, or the answer of /v1/tokenize; - is stdin"

Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Tokenized(msgspec.Struct):
    """The answer of SGLang's `/v1/tokenize`."""

    tokens: list[Token]


class _Bigrams:
    """Each token with the next, as `page_hash` takes them."""

    is_bigram = True

    def __init__(self, tokens: list[int]) -> None:
        self.token_ids = tokens

    def __len__(self) -> int:
        return max(0, len(self.token_ids) - 1)


class Prompt:
    """`seed`: of the namespace where it was asked."""

    def __init__(self, tokens: list[int], seed: bytes | None) -> None:
        self.tokens = tokens
        self._seed = seed

    def keys(self, page_tokens: int) -> tuple[list[bytes], list[bytes]]:
        """Keys of its whole pages, in order: those without a draft model, and those with one, which hash bigrams."""
        return self._keys(self.tokens, page_tokens), self._keys(_Bigrams(self.tokens), page_tokens)

    def _keys(self, tokens: list[int] | _Bigrams, page_tokens: int) -> list[bytes]:
        hashes = page_hash(tokens, self._seed, page_tokens)
        return [bytes.fromhex(one) for one in hashes[: len(tokens) // page_tokens]]


def add_namespace(parser: argparse.ArgumentParser) -> None:
    """What goes with `--tokens`, which each command adds where it belongs."""
    parser.add_argument("--salt", metavar="SALT", help="the cache_salt that the prompt was sent with")
    parser.add_argument("--extra-key", metavar="KEY", help="the extra_key that the prompt was sent with")
    parser.add_argument(
        "--lora", metavar="PATH", help="the LoRA adapter it was sent to: a folder, or a name of the hub"
    )


def prompt_of(arguments: argparse.Namespace) -> Prompt | None:
    """None where there are no tokens."""
    salt, extra_key = arguments.salt or None, arguments.extra_key or None  # SGLang takes "" for none, too
    if arguments.tokens is not None:
        if arguments.lora:
            extra_key = (extra_key or "") + _content_of(arguments.lora)
        return Prompt(arguments.tokens, namespace_seed(extra_key, salt))
    if salt or extra_key or arguments.lora:
        raise CommandFailed("--salt, --extra-key and --lora say which prompt is meant: they go with --tokens")
    return None


def _content_of(adapter: str) -> str:
    """As `adapters` names it in the keys of pages."""
    from sglang_hcache.startup.fingerprint import adapter_identity

    try:
        return adapter_identity(adapter, None)
    except OSError as error:
        raise CommandFailed(f"--lora {adapter}: {error}") from error


def tokens_in(file: str) -> list[int]:
    try:
        data = Path("/dev/stdin" if file == "-" else file).read_bytes()
        prompt = msgspec.json.decode(data, type=list[Token] | Tokenized)
    except OSError as error:
        raise argparse.ArgumentTypeError(explain(error, Path(file))) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{file} is neither a list of token ids nor has one ({error})") from error
    return prompt if isinstance(prompt, list) else prompt.tokens
