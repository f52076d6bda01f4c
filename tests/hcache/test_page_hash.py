from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.cpp_utils.native_hash import get_native_hash
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import storage_namespace_seed

from sglang_hcache.page_hash import namespace_seed, page_hash

tokens = st.lists(st.one_of(st.integers(0, 2**20), st.integers(0, 2**63 - 1)), max_size=40)


@pytest.fixture(scope="module", autouse=True)
def _native() -> None:
    try:
        get_native_hash([0], None)
    except RuntimeError as error:
        pytest.skip(f"SGLang's native hash cannot be compiled here: {error}")


@settings(deadline=None)
@given(tokens, st.one_of(st.none(), st.binary(min_size=32, max_size=32)), st.sampled_from([None, 1, 4, 16]))
def test_of_bigrams_it_is_sglangs_own_too(token_ids: list[int], prior: bytes | None, page_size: int | None) -> None:
    key = RadixKey(array("q", token_ids), is_bigram=True)
    assert page_hash(key, prior, page_size) == get_native_hash(key, prior, page_size)


@settings(deadline=None)  # the first call loads the native extension
@given(tokens, st.one_of(st.none(), st.binary(min_size=32, max_size=32)), st.sampled_from([None, 1, 4, 16]))
def test_is_sglangs_own(token_ids: list[int], prior: bytes | None, page_size: int | None) -> None:
    assert page_hash(token_ids, prior, page_size) == get_native_hash(token_ids, prior, page_size)


@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
def test_of_a_namespace_it_begins_as_sglangs_own(extra_key: str | None, cache_salt: str | None) -> None:
    seed = namespace_seed(extra_key, cache_salt)
    assert (seed and seed.hex()) == storage_namespace_seed(extra_key, cache_salt)
