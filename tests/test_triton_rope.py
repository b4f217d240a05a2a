"""Triton's RoPE, with and without the cache append, against complex rotations in float64."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model.triton_kernels.rope import rope_, rope_append

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")),
]


def angles(batch: int, rows: int, size: int) -> torch.Tensor:
    positions = torch.randint(0, 4000, (batch, rows))
    return positions[..., None] * 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size // 2))


def tables(angle: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.cat((part, part), -1).to(DEVICE, dtype) for part in (angle.cos(), angle.sin())]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D/2) as complex numbers, times cos + i sin of the tables given."""
    x, cos, sin = x.double().cpu(), cos.double().cpu(), sin.double().cpu()
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    pairs = pairs * torch.complex(cos[..., :half], sin[..., :half])[:, :, None]
    return torch.cat((pairs.real, pairs.imag), -1)


def check(batch, rows, heads, kv_heads, size, v_size, dtype) -> None:
    packed = torch.randn(batch, rows, heads + kv_heads, size, device=DEVICE).to(dtype)
    q, k = packed.split((heads, kv_heads), dim=2)  # strides of a packed projection
    v = torch.randn(batch, rows, kv_heads, v_size, device=DEVICE).to(dtype)
    cos, sin = tables(angles(batch, rows, size), dtype)
    slots = rows + 11
    start = torch.randint(0, slots - rows + 1, (batch,))
    memory = [
        torch.full((batch, kv_heads, slots + 3, n), float("nan"), dtype=dtype, device=DEVICE) for n in (size, v_size)
    ]
    k_cache, v_cache = (m[:, :, :slots] for m in memory)
    out = rope_append(q, k, v, cos, sin, k_cache, v_cache, start.to(DEVICE))
    assert out.dtype == dtype
    assert relative_error(out.cpu(), turned(q, cos, sin)) < BOUNDS[dtype]
    for b, first in enumerate(start.tolist()):
        written = slice(first, first + rows)
        wanted = turned(k, cos, sin)[b].transpose(0, 1)
        assert relative_error(k_cache[b, :, written].cpu(), wanted) < BOUNDS[dtype]
        assert torch.equal(v_cache[b, :, written], v[b].transpose(0, 1))
        for cache in memory:
            assert cache[b].isnan().all(-1).sum().item() == kv_heads * (slots + 3 - rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 64, 80, 256])
def test_rope_append(size: int, dtype: torch.dtype) -> None:
    check(2, 3, 9, 3, size, size, dtype)


@settings(max_examples=10 if DEVICE == "cpu" else 100, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    half=st.integers(1, 40),
    v_size=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(batch: int, rows: int, kv_heads: int, group: int, half: int, v_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    check(batch, rows, kv_heads * group, kv_heads, 2 * half, v_size, torch.float32)


def test_agrees_with_the_pytorch_op() -> None:
    from eagle.model.layers import rope_append as plain

    q, k, v = (torch.randn(2, 3, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    cos, sin = (torch.randn(2, 3, 16, device=DEVICE) for _ in range(2))  # halves that differ, too
    start, caches = torch.tensor([1, 5], device=DEVICE), [torch.zeros(4, 2, 2, 9, 16, device=DEVICE)][0]
    out = rope_append(q, k, v, cos, sin, caches[0], caches[1], start)
    assert relative_error(out, plain(q, k, v, cos, sin, caches[2], caches[3], start)) < 1e-6
    assert relative_error(caches[0], caches[2]) < 1e-6
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype) -> None:
    memory = torch.randn(2, 7, 5, 96, device=DEVICE).to(dtype)
    before, x = memory.clone(), memory.transpose(1, 2)[:, :, :6]  # [2, 5, 6, 96]
    cos, sin = (table.expand(2, -1, -1) for table in tables(angles(1, 5, 96), torch.float32))
    rope_(x, cos, sin)
    assert relative_error(x.cpu(), turned(before.transpose(1, 2)[:, :, :6], cos, sin)) < BOUNDS[dtype]
    assert torch.equal(memory[:, 6], before[:, 6])


def test_a_row_does_not_depend_on_the_others() -> None:
    q, k, v = (torch.randn(1, 5, heads, 32, device=DEVICE).half() for heads in (4, 2, 2))
    cos, sin = tables(angles(1, 5, 32), torch.float16)
    cache = torch.zeros(2, 1, 2, 9, 32, device=DEVICE, dtype=torch.float16)
    zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out = rope_append(q, k, v, cos, sin, *cache, zero)
    alone = cache.clone()
    part = rope_append(*(t[:, 3:4] for t in (q, k, v, cos, sin)), *alone, zero + 8)
    assert torch.equal(part[:, 0], out[:, 3])
    assert torch.equal(alone[..., 8, :], cache[..., 3, :])


def good_arguments() -> list[torch.Tensor]:
    q, k, v = (torch.randn(2, 3, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    cos, sin = tables(angles(2, 3, 16), torch.float32)
    cache = torch.zeros(2, 2, 2, 9, 16, device=DEVICE)
    return [q, k, v, cos, sin, cache[0], cache[1].clone(), torch.tensor([1, 5], device=DEVICE)]


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (0, lambda t: t[:1]),
        (0, lambda t: t.double()),
        (1, lambda t: t[..., :8]),
        (2, lambda t: t[:, :2]),
        (3, lambda t: t[..., :8]),
        (4, lambda t: t[:, :1]),
        (5, lambda t: t[:, :1]),
        (6, lambda t: t.mT.contiguous().mT),
        (7, lambda t: t.int()),
    ],
)
def test_what_does_not_fit_is_named(index: int, change) -> None:
    arguments = good_arguments()
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=r"; got \w+ "):
        rope_append(*arguments)


def test_odd_sizes_are_refused() -> None:
    table = torch.zeros(1, 1, 7, device=DEVICE)
    with pytest.raises(ValueError, match="D even"):
        rope_(torch.zeros(1, 1, 1, 7, device=DEVICE), table, table)


def test_slots_outside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = good_arguments()
    memory = torch.full((2, 2, 12, 16), float("nan"), device=DEVICE)
    arguments[5], arguments[7] = memory[:, :, :9], arguments[7] + 9
    rope_append(*arguments)
    assert memory.isnan().all()
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    with pytest.raises(ValueError, match="9 slots"):
        rope_append(*arguments)


def test_opcheck() -> None:
    arguments = good_arguments()
    torch.library.opcheck(torch.ops.eagle.rope_append.default, tuple(arguments))
    torch.library.opcheck(torch.ops.eagle.rope_.default, (arguments[0], arguments[3], arguments[4]))
