from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hcache.storage.layout import (
    ALIGNMENT,
    ROOT,
    ChunkDamaged,
    ChunkLayout,
    Header,
    read_header,
    seal,
    verify,
)
from tests.storage.pages import FINGERPRINT, LAYOUT, OTHER_FINGERPRINT, fill, key_of

USED = [(0, LAYOUT.header_sum_at + 8)] + [
    (LAYOUT.layer_offset(i), LAYOUT.layer_offset(i) + size) for i, size in enumerate(LAYOUT.layer_bytes) if size
]


def sealed(page: int) -> np.ndarray:
    record = np.zeros(LAYOUT.record_bytes, np.uint8)
    fill(record, page)
    seal(record, LAYOUT, FINGERPRINT, key_of(page), key_of(page - 1) if page else ROOT)
    return record


@given(st.integers(1, 300), st.lists(st.integers(0, 20000), min_size=1, max_size=90))
def test_records_are_aligned_and_nothing_overlaps(page_tokens: int, layer_bytes: list[int]) -> None:
    layout = ChunkLayout(page_tokens, tuple(layer_bytes))
    assert layout.header_sum_at + 8 <= layout.header_bytes == layout.layer_offset(0)
    ends = [layout.layer_offset(i) + size for i, size in enumerate(layer_bytes)]
    starts = [*(layout.layer_offset(i) for i in range(layout.n_layers)), layout.record_bytes]
    assert all(end <= start < end + ALIGNMENT for end, start in zip(ends, starts[1:], strict=True))
    assert all(start % ALIGNMENT == 0 for start in starts)


@pytest.mark.parametrize(("page_tokens", "layer_bytes"), [(0, (1,)), (1, ()), (1, (4, -1))])
def test_an_impossible_layout_is_refused(page_tokens: int, layer_bytes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"page_tokens|layer_bytes"):
        ChunkLayout(page_tokens, layer_bytes)


def test_a_sealed_record_is_whole() -> None:
    record = sealed(7)
    verify(record, LAYOUT, FINGERPRINT, key_of(7))
    assert read_header(record[: LAYOUT.header_bytes], LAYOUT) == Header(FINGERPRINT, key_of(7), key_of(6))
    assert read_header(sealed(0), LAYOUT).parent == ROOT


@given(
    st.integers(1, 300),
    st.lists(st.integers(0, 9000), min_size=1, max_size=12),
    st.binary(min_size=32, max_size=32),
    st.data(),
)
def test_records_of_any_layout_are_verified_layer_by_layer(
    page_tokens: int, layer_bytes: list[int], parent: bytes, data: st.DataObject
) -> None:
    layout = ChunkLayout(page_tokens, tuple(layer_bytes))
    record = np.random.default_rng(1).integers(0, 256, layout.record_bytes, np.uint8)
    seal(record, layout, FINGERPRINT, key_of(1), parent)
    verify(record, layout, FINGERPRINT, key_of(1))
    assert read_header(record[: layout.header_bytes], layout).parent == parent
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    if layout.layer_bytes[layer]:
        record[layout.layer_offset(layer)] ^= 1
        with pytest.raises(ChunkDamaged, match=f"layer {layer} "):
            verify(record, layout, FINGERPRINT, key_of(1))


def test_a_record_of_another_schema_is_of_another_layout() -> None:
    record = sealed(7)
    record[8:12] = np.frombuffer((1).to_bytes(4, "little"), np.uint8)
    with pytest.raises(ChunkDamaged, match="another layout"):
        verify(record, LAYOUT, FINGERPRINT, key_of(7))


@pytest.mark.parametrize("region", USED)
def test_every_flipped_byte_is_found(region: tuple[int, int]) -> None:
    record = sealed(7)
    for offset in range(*region):
        record[offset] ^= 0x10
        with pytest.raises(ChunkDamaged):
            verify(record, LAYOUT, FINGERPRINT, key_of(7))
        record[offset] ^= 0x10
    verify(record, LAYOUT, FINGERPRINT, key_of(7))


@pytest.mark.parametrize(
    ("fingerprint", "key", "layout"),
    [
        (OTHER_FINGERPRINT, key_of(7), LAYOUT),
        (FINGERPRINT, key_of(8), LAYOUT),
        (FINGERPRINT, key_of(7), ChunkLayout(6, LAYOUT.layer_bytes)),
        (FINGERPRINT, key_of(7), ChunkLayout(5, (1000, 4096))),
    ],
)
def test_another_page_or_layout_is_refused(fingerprint: bytes, key: bytes, layout: ChunkLayout) -> None:
    with pytest.raises(ChunkDamaged):
        verify(sealed(7), layout, fingerprint, key)
