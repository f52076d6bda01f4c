"""SGLang's page hash in Python, for machines where its native one cannot be compiled.

SGLang compiles it on first use, which takes a C++ compiler and OpenSSL's headers. The rest of SGLang (its radix
tree in Rust) makes the same hashes by itself, so these must be the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def page_hash(token_ids: Any, prior_digest: bytes | None, page_size: int | None = None) -> str | list[str]:
    """Chained SHA-256 of each page of tokens, as hex; of all tokens at once where `page_size` is None.

    token_ids: a sequence of ids, or a radix key over one. A page with an id of more than 32 bits is hashed as
    64-bit words behind a tag byte. Raises ValueError for a key of bigrams, which only speculative decoding makes.
    """
    if getattr(token_ids, "is_bigram", False):
        raise ValueError("keys of bigrams are not supported")
    raw: Sequence[int] = getattr(token_ids, "token_ids", token_ids)
    tokens = np.asarray(raw[: len(token_ids)], dtype=np.int64)
    digest = prior_digest or b""
    if page_size is None:
        return _chain(digest, tokens).hex()
    digests = []
    for start in range(0, len(tokens), page_size):
        digest = _chain(digest, tokens[start : start + page_size])
        digests.append(digest.hex())
    return digests


def _chain(prior: bytes, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> bytes:
    wide = bool((tokens > np.iinfo(np.uint32).max).any())
    body = b"\xff" + tokens.tobytes() if wide else tokens.astype("<u4").tobytes()
    return hashlib.sha256(prior + body).digest()
