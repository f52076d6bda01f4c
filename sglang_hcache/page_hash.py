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

    token_ids: a sequence of ids, or a radix key over one, or over its bigrams (each token with the next: a draft
    model's K and V depend on both). A page with an id of more than 32 bits is hashed as 64-bit words behind a tag.
    """
    raw: Sequence[int] = getattr(token_ids, "token_ids", token_ids)
    count = len(token_ids)
    tokens = np.asarray(raw[:count], dtype=np.int64)
    if getattr(token_ids, "is_bigram", False):
        tokens = np.stack((tokens, np.asarray(raw[1 : count + 1], dtype=np.int64)), axis=1)
    narrow, has_wide = tokens.astype("<u4"), tokens > np.iinfo(np.uint32).max  # at once: a page takes little else
    any_wide = bool(has_wide.any())

    def chain(prior: bytes, page: slice) -> bytes:
        wide = any_wide and bool(has_wide[page].any())
        digest = hashlib.sha256(prior)
        digest.update(b"\xff" + tokens[page].tobytes() if wide else narrow[page].data)
        return digest.digest()

    digest = prior_digest or b""
    if page_size is None:
        return chain(digest, slice(None)).hex()
    digests = []
    for start in range(0, len(tokens), page_size):
        digest = chain(digest, slice(start, start + page_size))
        digests.append(digest.hex())
    return digests


def namespace_seed(extra_key: str | None, cache_salt: str | None) -> bytes | None:
    """The digest before a prompt's first page, which keeps namespaces apart as SGLang does; None if it has none."""
    if extra_key is None and cache_salt is None:
        return None
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
        else:
            encoded = part.encode()
            digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()
