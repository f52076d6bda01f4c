"""Capture and open pages on toy modules: what the real server does not make happen on purpose."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_hcache.codec import LossyCodec
from sglang_hcache.device.ring import Ring
from sglang_hcache.device.streams import Event, ImmediateStream
from sglang_hcache.model import AttentionSite
from sglang_hcache.saving.capture import Capture, write_rows
from sglang_hcache.saving.open_pages import OpenPages
from sglang_hcache.storage.layout import ROOT, ChunkLayout, positions
from sglang_hcache.storage.store import LocalStore
from tests.storage.pages import lease

WIDTH, PAGE, LAYERS, ROWS = 8, 16, 2, 40


class Attention(torch.nn.Module):
    def forward(self, positions: torch.Tensor, hidden_states: Any, forward_batch: Any) -> Any:
        return hidden_states


class Sink:
    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.dropped: list[int] = []
        self.calls: list[str] = []

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        self.calls.append("write")
        self.rows = rows.clone()
        return ImmediateStream().record()

    def drop(self, slots: torch.Tensor) -> None:
        self.calls.append("drop")
        self.dropped += slots.tolist()


@pytest.fixture
def modules() -> list[Attention]:
    return [Attention() for _ in range(LAYERS)]


@pytest.fixture
def capture(modules: list[Attention]) -> Capture:
    sites = [AttentionSite(module, module, inspect.signature(module.forward)) for module in modules]
    capture = Capture(sites, rows=ROWS, width=WIDTH, dtype=torch.float32, device="cpu")
    capture.sink = Sink()
    return capture


def forward(capture: Capture, modules: list[Attention], hidden: torch.Tensor, count: int, **after: bool) -> Sink:
    capture.before_forward()
    for layer, module in enumerate(modules):
        module(torch.arange(len(hidden)), hidden_states=hidden + layer, forward_batch=None)
    capture.after_forward(torch.arange(count), torch.arange(count), **{"from_graph": False, **after})
    assert isinstance(capture.sink, Sink)
    return capture.sink


def test_rows_of_every_layer_without_padding(capture: Capture, modules: list[Attention]) -> None:
    hidden = torch.randn(10, WIDTH)
    sink = forward(capture, modules, hidden, count=7)
    assert sink.rows is not None
    assert torch.equal(sink.rows, torch.stack([hidden[:7], hidden[:7] + 1]))


def test_padding_beyond_the_buffer_is_left_out(capture: Capture, modules: list[Attention]) -> None:
    hidden = torch.randn(ROWS + 8, WIDTH)
    sink = forward(capture, modules, hidden, count=ROWS)
    assert sink.rows is not None
    assert torch.equal(sink.rows[0], hidden[:ROWS])


@pytest.mark.parametrize("outbox", [False, True])
def test_more_rows_than_the_buffer_holds_are_dropped(
    outbox: bool, capture: Capture, modules: list[Attention]
) -> None:
    """SGLang prefills a prompt in one forward, however long, where it does so without chunks."""
    if outbox:
        through_an_outbox(capture)
    hidden = torch.randn(ROWS + 3, WIDTH)
    sink = forward(capture, modules, hidden, count=ROWS + 3)
    assert sink.rows is not None
    assert torch.equal(sink.rows, torch.stack([hidden[:ROWS], hidden[:ROWS] + 1]))
    assert sink.dropped == list(range(ROWS, ROWS + 3))
    assert sink.calls == ["write", "drop"], "a page that is dropped in part is not whole"


def test_a_layer_that_was_not_called_drops_the_forward(capture: Capture, modules: list[Attention]) -> None:
    sink = forward(capture, modules[:1], torch.randn(4, WIDTH), count=4)
    assert sink.rows is None
    assert sink.dropped == [0, 1, 2, 3]


def test_another_width_ends_capture_for_good(
    capture: Capture, modules: list[Attention], caplog: pytest.LogCaptureFixture
) -> None:
    forward(capture, modules, torch.randn(4, WIDTH + 1), count=4)
    sink = forward(capture, modules, torch.randn(4, WIDTH), count=4, from_graph=True)
    assert sink.rows is None
    assert len(caplog.messages) == 1
    assert "another width" in caplog.text


QUANTISED = (torch.zeros(4, WIDTH, dtype=torch.int8), torch.ones(1), torch.float32)  # values, scales, what they were


def test_an_input_that_is_quantised_already_is_not_captured(
    capture: Capture, modules: list[Attention], caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang hands attention a tuple then."""
    capture.before_forward()
    for module in modules:
        module(torch.arange(4), hidden_states=QUANTISED, forward_batch=None)
    capture.after_forward(torch.arange(4), torch.arange(4), from_graph=False)
    assert isinstance(capture.sink, Sink)
    assert capture.sink.rows is None
    assert capture.sink.dropped == [0, 1, 2, 3]
    assert len(caplog.messages) == 1
    assert "is quantised" in caplog.text


@pytest.mark.parametrize("recorded", [QUANTISED, torch.zeros(4, WIDTH + 1)], ids=["quantised", "another width"])
def test_what_a_graph_has_recorded_ends_capture_before_it_is_replayed(
    recorded: object, capture: Capture, modules: list[Attention]
) -> None:
    """The model is called for that by itself, outside of a forward."""
    modules[1](torch.arange(4), hidden_states=recorded, forward_batch=None)
    sink = forward(capture, modules, torch.randn(4, WIDTH), count=4, from_graph=True)
    assert sink.rows is None
    assert sink.dropped == [0, 1, 2, 3]


def through_an_outbox(capture: Capture) -> None:
    """As on a GPU; what is not written is no number."""
    capture._outbox = Ring(torch.full((4 * LAYERS * 2 * ROWS * WIDTH,), 0xFF, dtype=torch.uint8), ImmediateStream())


# Zeros of both signs, numbers too small to be normal, infinities, and NaNs, quiet and signalling, with payloads.
BITS = [0x8000, 0x0000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0x7FC1, 0xFFFF, 0xFFA5]


@pytest.mark.parametrize("outbox", [False, True])
@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1])  # words of eight bytes, and not
def test_every_bit_of_rows_is_kept(width: int, outbox: bool, modules: list[Attention]) -> None:
    """Read as integers: comparing numbers would not see it."""
    sites = [AttentionSite(module, module, inspect.signature(module.forward)) for module in modules]
    capture = Capture(sites, rows=ROWS, width=width, dtype=torch.bfloat16, device="cpu")
    capture.sink = sink = KeepsRows()
    if outbox:
        through_an_outbox(capture)
    for tokens, count in ((ROWS, 7), (ROWS, ROWS), (ROWS + 3, 5)):
        bits = np.resize(np.array(BITS, np.uint16), (LAYERS, tokens, width)).view(np.int16)
        hidden = torch.from_numpy(bits.copy()).view(torch.bfloat16)
        capture.before_forward()
        for layer, module in enumerate(modules):
            module(torch.arange(tokens), hidden_states=hidden[layer], forward_batch=None)
        capture.after_forward(torch.arange(count), torch.arange(count), from_graph=False)
        assert sink.rows is not None
        assert torch.equal(sink.rows.view(torch.int16), hidden[:, :count].view(torch.int16))


class KeepsRows(Sink):
    """Copied as integers: a copy of its own must not change what the test looks at."""

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        self.rows = rows.view(torch.int16).clone().view(torch.bfloat16)
        return ImmediateStream().record()


@pytest.mark.parametrize(
    "source",
    [
        torch.randn(5, 8),
        torch.randn(5, 8).double(),
        torch.randn(8, 5).T,
        torch.randn(5, 16)[:, 3:11],
        torch.randn(41)[1:].view(5, 8),
    ],
)
def test_rows_of_another_dtype_or_with_gaps_are_written_all_the_same(source: torch.Tensor) -> None:
    target = torch.zeros(5, 8)
    write_rows(target, source)
    assert torch.equal(target, source.float())


def test_a_graph_holds_no_copy_of_the_engines(
    capture: Capture, modules: list[Attention], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`copy_` of contiguous memory would be one."""
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("copy_"))
    hidden = torch.randn(10, WIDTH)
    for layer, module in enumerate(modules):
        module(torch.arange(10), hidden_states=hidden + layer, forward_batch=None)
    assert torch.equal(capture._staging[1, :10], hidden + 1)


def test_rows_that_go_through_an_outbox(capture: Capture, modules: list[Attention]) -> None:
    through_an_outbox(capture)
    for count in (7, ROWS, 1):
        hidden = torch.randn(ROWS, WIDTH)
        sink = forward(capture, modules, hidden, count=count)
        assert sink.rows is not None
        assert torch.equal(sink.rows, torch.stack([hidden[:count], hidden[:count] + 1]))


@pytest.mark.parametrize("outbox", [False, True])
def test_rows_are_handed_over_encoded(outbox: bool, capture: Capture, modules: list[Attention]) -> None:
    codec = LossyCodec("lossy_int8", WIDTH, torch.float32)
    capture.keep(1, codec)
    if outbox:
        through_an_outbox(capture)
    for count in (7, ROWS, 1):
        hidden = torch.randn(ROWS, WIDTH)
        sink = forward(capture, modules, hidden, count=count)
        assert sink.rows is not None
        assert sink.rows.shape == (1, count, codec.row_bytes)
        step = hidden[:count].abs().amax(1, keepdim=True) / 254
        assert ((codec.decode(0, sink.rows[0]) - hidden[:count]).abs() <= step * 1.001).all()


class Decoder(torch.nn.Module):
    """Layers whose work around the attention a compiler can fuse, and change in place."""

    def __init__(self, modules: list[Attention]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(modules)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = torch.relu(hidden) * 2 - 3  # exact, however it is compiled
            hidden = layer(positions, hidden_states=hidden, forward_batch=None)
            hidden.add_(1)
        return hidden


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_captures_what_eager_code_does(
    backend: str, capture: Capture, modules: list[Attention]
) -> None:
    decoder = Decoder(modules)
    compiled = torch.compile(decoder, backend=backend, fullgraph=True, dynamic=True)
    for count in (5, 7, ROWS):
        hidden, results = torch.randint(-9, 9, (count, WIDTH)).float(), []
        for run in (decoder, compiled):
            capture.before_forward()
            with torch.inference_mode():
                output = run(torch.arange(count), hidden.clone())
            capture.after_forward(torch.arange(count), torch.arange(count), from_graph=False)
            assert isinstance(capture.sink, Sink)
            assert capture.sink.rows is not None
            results.append((output, capture.sink.rows))
            capture.sink.rows = None
        (output, rows), (compiled_output, compiled_rows) = results
        assert torch.equal(output, compiled_output)
        assert torch.equal(rows, compiled_rows)
        assert rows.shape == (LAYERS, count, WIDTH)


# ---- open pages ----


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    layout = ChunkLayout(page_tokens=PAGE, layer_bytes=(PAGE * WIDTH,) * LAYERS)
    return LocalStore(layout, bytes(16), 8 * layout.record_bytes, [])


@pytest.fixture
def pages(store: LocalStore) -> OpenPages:
    return OpenPages(store, layers=LAYERS)


def rows(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (LAYERS, count, WIDTH), np.uint8)


def write(pages: OpenPages, first_slot: int, values: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    slots = np.arange(first_slot, first_slot + values.shape[1])
    return pages.write(slots, slots + 1000, values)


def commit(pages: OpenPages, store: LocalStore, page: int, key: bytes) -> bool:
    if (slot := pages.take(page)) is None:
        return False
    store.commit(key, slot, ROOT)
    return True


def held(store: LocalStore, key: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    (slot,) = lease(store, "test", [key])
    record = store.memory[slot]
    return np.stack([store.layout.payload(record, layer).reshape(PAGE, WIDTH) for layer in range(LAYERS)])


def test_a_page_filled_piece_by_piece(pages: OpenPages, store: LocalStore) -> None:
    values = rows(PAGE)
    for start, stop in ((0, 5), (5, 6), (6, PAGE)):
        write(pages, 3 * PAGE + start, values[:, start:stop])
    assert commit(pages, store, 3, bytes(32))
    assert np.array_equal(held(store, bytes(32)), values)
    (slot,) = lease(store, "test", [bytes(32)])
    assert positions(store.memory[slot], store.layout).tolist() == list(range(1048, 1064))


def test_rows_of_several_pages_in_one_forward(pages: OpenPages, store: LocalStore) -> None:
    values = rows(2 * PAGE)
    slots = np.concatenate([np.arange(5 * PAGE, 6 * PAGE), np.arange(2 * PAGE, 3 * PAGE)])
    pages.write(slots, slots, values)
    assert commit(pages, store, 5, b"a" * 32)
    assert commit(pages, store, 2, b"b" * 32)
    assert np.array_equal(held(store, b"a" * 32), values[:, :PAGE])
    assert np.array_equal(held(store, b"b" * 32), values[:, PAGE:])


@pytest.mark.parametrize("sequences", [1, 3, 4, 7])
@pytest.mark.parametrize("threads", [False, True])
def test_a_token_of_each_of_many_sequences(store: LocalStore, sequences: int, threads: bool) -> None:
    """As decoding makes them, behind prefills of different lengths."""
    values = [rows(PAGE, seed=number) for number in range(sequences)]
    filled, chance = [number % 3 for number in range(sequences)], np.random.default_rng(0)
    with ThreadPoolExecutor(4) if threads else contextlib.nullcontext() as copying:
        pages = OpenPages(store, layers=LAYERS, copying=copying)
        for number, tokens in enumerate(filled):
            write(pages, number * PAGE, values[number][:, :tokens])
        while going := [number for number in range(sequences) if filled[number] < PAGE]:
            order = chance.permutation(going).tolist()
            slots = np.array([number * PAGE + filled[number] for number in order])
            new = np.stack([values[number][:, filled[number]] for number in order], axis=1)
            assert pages.write(slots, slots + 1000, new) == len(order)
            for number in order:
                filled[number] += 1
    for number in range(sequences):
        assert commit(pages, store, number, bytes([number]) * 32)
        assert np.array_equal(held(store, bytes([number]) * 32), values[number])
        (slot,) = lease(store, "test", [bytes([number]) * 32])
        first = number * PAGE + 1000
        assert positions(store.memory[slot], store.layout).tolist() == list(range(first, first + PAGE))


def test_drafts_that_were_rejected_are_replaced(pages: OpenPages, store: LocalStore) -> None:
    """Four tokens are verified at once, of which fewer are accepted; the next come right behind these."""
    values = rows(2 * PAGE)
    at = 0
    for accepted in itertools.cycle((1, 3, 4)):
        drafts = rows(4, seed=at)
        drafts[:, :accepted] = values[:, at : at + accepted]
        write(pages, at, drafts)
        if (at := at + accepted) >= PAGE:
            break
    assert commit(pages, store, 0, bytes(32))
    assert np.array_equal(held(store, bytes(32)), values[:, :PAGE])
    assert not commit(pages, store, 1, b"a" * 32)


def test_what_a_rejected_draft_had_filled_is_not_whole(pages: OpenPages, store: LocalStore) -> None:
    write(pages, 0, rows(PAGE))
    write(pages, PAGE - 4, rows(3, seed=1))
    assert not commit(pages, store, 0, bytes(32))


@pytest.mark.parametrize("harm", ["gap", "forget", "name"])
def test_a_page_that_is_not_whole_is_never_committed(harm: str, pages: OpenPages, store: LocalStore) -> None:
    write(pages, 0, rows(8))
    if harm == "gap":
        write(pages, 10, rows(PAGE - 10))
    elif harm == "forget":
        pages.forget(np.arange(PAGE))
    else:
        assert pages.take(0) is None
        assert len(pages) == 0, "it will not be written any more"
    write(pages, 8, rows(8))
    assert not commit(pages, store, 0, bytes(32))
    assert store.contains([bytes(32)]) == [False]
    assert len(pages) == 0
    store.check()


def test_a_page_that_is_used_again_starts_anew(pages: OpenPages, store: LocalStore) -> None:
    write(pages, 0, rows(PAGE, seed=1))
    write(pages, 0, rows(4, seed=2))
    assert not commit(pages, store, 0, bytes(32))
    values = rows(PAGE, seed=3)
    write(pages, 0, values)
    assert commit(pages, store, 0, bytes(32))
    assert np.array_equal(held(store, bytes(32)), values)


def test_tokens_without_a_slot_are_not_kept(pages: OpenPages, store: LocalStore) -> None:
    kept = [write(pages, page * PAGE, rows(PAGE)) for page in range(store.memory.shape[0] + 2)]
    assert kept == [PAGE] * store.memory.shape[0] + [0, 0]
    store.check()
