"""What is compiled before the first request."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache.codec import DecodingProjector, LossyCodec
from sglang_hcache.model import layer_groups
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.restoring.projector import KVProjector
from sglang_hcache.startup.representation import Formats, LayerFormat, Stored
from sglang_hcache.startup.start import warm_up

PAGE, WIDTH, HEADS, HEAD, LAYERS = 16, 8, 2, 4, 2
KV_BYTES = 2 * 4 * HEADS * HEAD


class Projector:
    """Fills slots with ones."""

    def __init__(self, pool: MHATokenToKVPool) -> None:
        self._pool = pool
        self.projected: list[torch.Size] = []

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        self.projected.append(rows.shape)
        for buffers in (self._pool.k_buffer, self._pool.v_buffer):
            buffers[layer][slots] = 1


class Codec(LossyCodec):
    def __init__(self) -> None:
        super().__init__("lossy_int8", WIDTH, torch.float32)
        self.encoded_shapes: list[torch.Size] = []

    def encode(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        self.encoded_shapes.append(rows.shape)
        super().encode(rows, out)


def test_a_codec_encodes_and_decodes_before_a_forward_waits_for_it() -> None:
    """And the pool is left as it was."""
    pool = MHATokenToKVPool(4 * PAGE, PAGE, torch.float32, HEADS, HEAD, LAYERS, "cpu", enable_memory_saver=False)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.normal_()
    before = [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]
    codec, projector = Codec(), Projector(pool)
    hidden = LayerFormat(codec.row_bytes, torch.uint8, DecodingProjector(projector, codec), "", codec)
    groups = layer_groups(pool)
    kv = LayerFormat(KV_BYTES, torch.uint8, KVProjector(groups), "copy")
    formats = Formats(hidden, "", kv, KV_BYTES, kv_same_on_all_ranks=False, groups=groups)
    warm_up(Stored(Layout(0, LAYERS, 0), formats, ""), PAGE)
    assert codec.encoded_shapes == [(1, PAGE, WIDTH)]
    assert projector.projected == [(PAGE, WIDTH)]
    for was, buffer in zip(before, (*pool.k_buffer, *pool.v_buffer), strict=True):
        assert torch.equal(was, buffer)
