"""Hidden states to K and V: both forms against float64, with every option, into poisoned pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.cublas_epilogue import part_rows
from sglang_hcache.triton_kernels.project_kv import project_kv, takes
from sglang_hcache.triton_kernels.projection import Projection, project_kv_reference
from sglang_hcache.triton_kernels.tuning import SEVERAL_HEADS, Fused, candidates
from tests.triton_kernels.poison import vast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, K_HEADS, V_HEADS, DIM = 160, 3, 2, 64
SMALL = Fused(tokens=32, depth=32, warps=4, stages=2)
FORMS = {"split": None, "fused": SMALL}
# bf16 dots are wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
POISON = 7.0

Pool = tuple[torch.Tensor, torch.Tensor]


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def _projection(dtype: torch.dtype = torch.float32, **changes: Any) -> Projection:
    plain = Projection(
        weight=_random((K_HEADS + V_HEADS) * DIM, WIDTH, seed=1, dtype=dtype) / WIDTH**0.5,
        k_heads=K_HEADS,
        k_dim=DIM,
        v_heads=V_HEADS,
        v_dim=DIM,
    )
    return replace(plain, **changes)


def _angles(rotary_dim: int, positions: int = 512) -> torch.Tensor:
    turns = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.cat((turns.cos(), turns.sin()), dim=-1).to(DEVICE)


def _pool(projection: Projection, slots: int, dtype: torch.dtype) -> Pool:
    p = projection
    shapes = (slots, p.k_heads, p.k_dim), (slots, p.v_heads, p.v_dim)
    keys, values = (torch.full(shape, POISON, device=DEVICE).to(dtype) for shape in shapes)
    return keys, values


def _error_bound(rows: torch.Tensor, projection: Projection, *, rounded: bool) -> torch.Tensor:
    """`[n]`: how far any element of a token's K or V may be off before it is rounded to the pool's dtype.

    A dot product of `width` terms in float32, in any order, is off by at most width · eps32 · Σ|x·w|; the split form
    rounds it once to the rows' dtype. A norm multiplies that by its weight over the root mean square, and the mean's
    own error, at most as large a part of it, comes on top. Turning a pair adds both columns' errors. Everything after
    the dot product is a handful of operations in float32.
    """
    p = projection
    x, w = rows.double(), p.weight.double()
    bias = p.bias.double() if p.bias is not None else torch.zeros(p.columns, dtype=torch.float64, device=DEVICE)
    magnitude = (x.abs() @ w.abs().T + bias.abs()).amax(dim=1)
    error = magnitude * (WIDTH * torch.finfo(torch.float32).eps + rounded * torch.finfo(rows.dtype).eps / 2)
    if p.norm_weight is not None:
        key = (x @ w.T + bias)[:, : p.k_heads * p.k_dim].unflatten(1, (-1, p.norm_weight.numel()))
        gain = key.square().mean(dim=-1).rsqrt().amax(dim=1) * p.norm_weight.double().abs().max()
        mean_error = error / key.square().mean(dim=-1).sqrt().amin(dim=1)
        error = torch.maximum(error, gain * (error + magnitude * mean_error))
        magnitude = torch.maximum(magnitude, gain * magnitude)
    return 2 * (error + 4 * magnitude * torch.finfo(torch.float32).eps) / min(p.k_scale, p.v_scale)


def _check(
    projection: Projection, n: int, form: Fused | None, dtype: torch.dtype, pool_dtype: torch.dtype | None = None
) -> None:
    out = pool_dtype or dtype
    rows = _random(n, WIDTH, seed=2, dtype=dtype)
    slots = torch.randperm(3 * n + 5, generator=torch.Generator().manual_seed(3))[:n].to(DEVICE)
    positions = torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    pool, expected = _pool(projection, 3 * n + 5, out), _pool(projection, 3 * n + 5, torch.float64)

    project_kv(rows, projection, positions, slots, *pool, fused=form)
    project_kv_reference(rows, projection, positions, slots, *expected)

    untouched = torch.ones(3 * n + 5, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    bound = _error_bound(rows, projection, rounded=form is None)[:, None, None]
    step = torch.finfo(out)
    for buffer, want in zip(pool, expected, strict=True):
        got = buffer.double()
        tolerance = bound + (want[slots].abs() + bound) * step.eps / 2 + step.smallest_normal * step.eps / 2
        assert torch.all((got[slots] - want[slots]).abs() <= tolerance)
        assert torch.all(got[untouched] == POISON)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 65])
def test_a_plain_projection(n: int, dtype: torch.dtype, form: str) -> None:
    _check(_projection(dtype), n, FORMS[form], dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": _random((K_HEADS + V_HEADS) * DIM, seed=5)},
    "rope by halves": {"cos_sin": _angles(DIM)},
    "rope by neighbours": {"cos_sin": _angles(DIM), "neox": False},
    "partial rope by halves": {"cos_sin": _angles(16)},
    "partial rope by neighbours": {"cos_sin": _angles(16), "neox": False},
    "norm of each head": {"norm_weight": _random(DIM, seed=6), "eps": 1e-6},
    "norm of each head, rope, bias": {
        "norm_weight": _random(DIM, seed=6),
        "eps": 1e-6,
        "cos_sin": _angles(DIM),
        "bias": _random((K_HEADS + V_HEADS) * DIM, seed=5),
    },
    "scales": {"k_scale": 0.5, "v_scale": 2.0, "cos_sin": _angles(DIM)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, form: str) -> None:
    _check(_projection(**OPTIONS[options]), 65, FORMS[form], torch.float32)


HEADS = Fused(tokens=32, depth=32, warps=4, stages=2, heads=2)


def _even(dim: int = DIM, **changes: Any) -> Projection:
    """Of as many heads as tiles of two can hold."""
    plain = Projection(
        weight=_random(6 * dim, WIDTH, seed=1, dtype=torch.float16) / WIDTH**0.5,
        k_heads=4, k_dim=dim, v_heads=2, v_dim=dim,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize("n", [1, 31, 300])
@pytest.mark.parametrize("options", ["bias", "rope by halves", "scales", "all"])
def test_several_heads_in_a_tile(options: str, n: int) -> None:
    bias = {"bias": _random(6 * DIM, seed=5, dtype=torch.float16)}
    changes = {"bias": bias, "all": bias | OPTIONS["scales"]}.get(options) or OPTIONS[options]
    _check(_even(**changes), n, HEADS, torch.float16)


def test_several_heads_of_the_size_and_the_tile_that_are_served() -> None:
    for form in SEVERAL_HEADS.values():
        _check(_even(128, cos_sin=_angles(128)), 130, form, torch.float16)


@pytest.mark.parametrize(
    "projection",
    [
        _even(neox=False, cos_sin=_angles(DIM)),
        _even(cos_sin=_angles(16)),
        _even(norm_weight=_random(DIM, seed=6)),
        _even(96),
        replace(_even(), k_heads=3, v_heads=3),
        replace(_even(), weight=_even().weight.float()),
        replace(_even(), weight=_random(6 * DIM, WIDTH + 1, seed=1, dtype=torch.float16)[:, :WIDTH]),
    ],
    ids=["neighbours", "partly turned", "normed", "no power of two", "odd heads", "wide", "not aligned"],
)
def test_what_is_not_for_several_heads_is_for_one(projection: Projection) -> None:
    assert not takes(projection, HEADS)
    assert takes(projection, SMALL)
    pool = _pool(projection, 4, torch.float32)
    slots = torch.arange(4, device=DEVICE)
    rows = _random(4, projection.weight.shape[1], seed=2, dtype=projection.weight.dtype)
    with pytest.raises(ValueError, match="not for this projection"):
        project_kv(rows, projection, slots, slots, *pool, fused=HEADS)


def test_candidates_of_a_gpu() -> None:
    assert candidates(128, 90)[0].heads == 2
    assert {form.heads for form in (*candidates(128, 80), *candidates(96, 90), *candidates(256, 90))} == {1}
    assert candidates(264, 90) == ()


def test_a_norm_over_all_heads() -> None:
    projection = _projection(norm_weight=_random(K_HEADS * DIM, seed=7), eps=1e-5, cos_sin=_angles(DIM))
    _check(projection, 65, None, torch.float32)
    with pytest.raises(ValueError, match="not for this projection"):
        _check(projection, 65, SMALL, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [48, 80, 96])
def test_heads_whose_size_is_no_power_of_two(dim: int, form: str) -> None:
    projection = Projection(
        weight=_random(4 * dim, WIDTH, seed=1) / WIDTH**0.5, k_heads=2, k_dim=dim, v_heads=2, v_dim=dim,
        cos_sin=_angles(dim),
    )  # fmt: skip
    _check(projection, 33, FORMS[form], torch.float32)


def test_values_of_another_size_than_keys() -> None:
    weight = _random(2 * 64 + 3 * 32, WIDTH, seed=1) / WIDTH**0.5
    _check(Projection(weight, 2, 64, 3, 32, cos_sin=_angles(64)), 65, None, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_a_pool_of_another_dtype(form: str) -> None:
    _check(_projection(k_scale=0.25, v_scale=0.5), 33, FORMS[form], torch.float32, torch.float16)


@triton.jit
def _cast(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@pytest.mark.parametrize("form", [*FORMS, "several heads"])
@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_pools_in_fp8_hold_the_scaled_values_cast_once(pool_dtype: torch.dtype, form: str) -> None:
    """Against Triton's own cast, which in the interpreter is not PyTorch's: it loses a carry into the exponent."""
    several = form == "several heads"
    projection = (_even if several else _projection)(k_scale=0.25, v_scale=0.5, cos_sin=_angles(DIM))
    rows, slots = _random(32, WIDTH, seed=2, dtype=projection.weight.dtype), torch.randperm(64)[:32].to(DEVICE)
    wide, narrow = _pool(projection, 64, torch.float32), _pool(projection, 64, pool_dtype)
    for pool in (wide, narrow):
        project_kv(rows, projection, slots, slots, *pool, fused=HEADS if several else FORMS[form])
    for values, got in zip(wide, narrow, strict=True):
        expected = torch.empty_like(got)
        for head, out in zip(values.view(-1, DIM), expected.view(-1, DIM), strict=True):
            _cast[(1,)](head, out, SIZE=DIM)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("bias", [None, _random((K_HEADS + V_HEADS) * DIM, seed=5)])
def test_a_small_workspace_is_used_again(bias: torch.Tensor | None) -> None:
    """The split form in three parts is the same as in one, and keeps within the workspace."""
    projection, n = _projection(bias=bias, cos_sin=_angles(DIM), norm_weight=_random(DIM, seed=6), eps=1e-6), 70
    rows, slots, positions = _random(n, WIDTH, seed=2), torch.randperm(n).to(DEVICE), torch.arange(n).to(DEVICE)
    memory = torch.full((34, projection.columns), POISON, device=DEVICE)
    pools = [_pool(projection, n, torch.float32) for _ in range(2)]
    for pool, workspace in zip(pools, (memory[1:33], None), strict=True):
        project_kv(rows, projection, positions, slots, *pool, workspace=workspace)
    assert torch.all(memory[[0, -1]] == POISON)
    for left, right in zip(*pools, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "rows"), [(1, 1), (2048, 2048), (3000, 3000), (3100, 1664), (8192, 2048), (8256, 2176)]
)
def test_parts_of_a_product_are_about_equal(n: int, rows: int) -> None:
    assert part_rows(n) == rows


def test_rows_need_not_be_contiguous() -> None:
    wide = _random(10, 2 * WIDTH, seed=2)
    projection, slots = _projection(), torch.arange(10, device=DEVICE)
    pools = [_pool(projection, 10, torch.float32) for _ in range(2)]
    for pool, rows in zip(pools, (wide[:, :WIDTH], wide[:, :WIDTH].contiguous()), strict=True):
        project_kv(rows, projection, slots, slots, *pool, fused=SMALL)
    for left, right in zip(*pools, strict=True):
        assert torch.equal(left, right)


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each beside another."""
    return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]


@pytest.mark.parametrize("form", [*FORMS, "several heads"])
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("rows", _apart),
        ("rows", lambda rows: rows[:, 32:]),
        ("positions", _apart),
        ("positions", lambda positions: positions[1:]),
        ("slots", _apart),
        ("slots", lambda slots: slots.int()),  # times a stride, beyond int32 in a large pool
        ("k_buffer", _apart),
        ("k_buffer", lambda keys: keys.transpose(0, 1).contiguous().transpose(0, 1)),
        ("v_buffer", lambda values: values[:, 1:]),
    ],
)
def test_what_kernels_would_read_or_write_elsewhere_is_refused(argument: str, change: Any, form: str) -> None:
    several = form == "several heads"
    projection = (_even if several else _projection)(cos_sin=_angles(DIM))
    index = torch.arange(8, device=DEVICE)
    keys, values = _pool(projection, 16, torch.float32)
    arguments = {
        "rows": _random(8, WIDTH, seed=2, dtype=projection.weight.dtype),
        "positions": index,
        "slots": index,
        "k_buffer": keys,
        "v_buffer": values,
    }
    arguments[argument] = change(arguments[argument])
    with pytest.raises(ValueError, match=argument):
        project_kv(projection=projection, **arguments, fused=HEADS if several else FORMS[form])
    assert all(torch.all(buffer == POISON) for buffer in (keys, values))


@pytest.mark.parametrize("form", [*FORMS, "several heads"])
def test_offsets_in_a_large_pool_are_beyond_int32(form: str) -> None:
    several = form == "several heads"
    projection = (_even if several else _projection)(cos_sin=_angles(DIM))
    rows, positions = _random(4, WIDTH, seed=2, dtype=projection.weight.dtype), torch.arange(4, device=DEVICE)
    few = _pool(projection, 4, torch.float8_e5m2)
    last = 2**31 // (projection.v_heads * DIM) + 4
    many = [vast(last + 1, *buffer.shape[1:], dtype=torch.float8_e5m2) for buffer in few]
    for pool, slots in ((few, positions), (many, last - positions)):
        project_kv(rows, projection, positions, slots, *pool, fused=HEADS if several else FORMS[form])
    for buffer, expected in zip(many, few, strict=True):
        assert torch.equal(buffer[last - 3 :].view(torch.uint8).flip(0), expected.view(torch.uint8))


def test_no_tokens_are_no_work() -> None:
    projection = _projection()
    pool = _pool(projection, 2, torch.float32)
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for form in FORMS.values():
        project_kv(_random(0, WIDTH, seed=0), projection, empty, empty, *pool, fused=form)
    assert all(torch.all(buffer == POISON) for buffer in pool)


@pytest.mark.parametrize(
    "changes",
    [
        {"k_heads": 4},
        {"bias": torch.zeros(3)},
        {"norm_weight": torch.zeros(5)},
        {"cos_sin": torch.zeros(8, 2 * DIM)},
        {"bias": _apart(torch.zeros((K_HEADS + V_HEADS) * DIM))},
        {"norm_weight": _apart(torch.zeros(DIM))},
        {"cos_sin": torch.zeros(8, 2 * DIM)[:, :DIM]},
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"for|turned|contiguous"):
        _projection(**changes)
