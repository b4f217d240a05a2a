"""A row's bits do not depend on the other rows or on how many there are: linears, norms, SwiGLU, the draft's
input and attention.

On a GPU for every number of rows from 1 to 64, in every dtype; in Triton's interpreter for a few, in float32 and float16.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from eagle.model.tree import ancestor_words
from eagle.model.triton_kernels.attention import attention
from eagle.model.triton_kernels.draft_input import draft_input
from eagle.model.triton_kernels.linear import gate_up_swiglu, linear, linear_add_rms_norm
from eagle.model.triton_kernels.mlp import swiglu
from eagle.model.triton_kernels.norm import add_rms_norm, cat_rms_norm, rms_norm
from eagle.model.triton_kernels.quantize import quantize_weight

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
ROWS = range(1, 65) if HAS_GPU else (1, 2, 17, 64)
ONE_BYTE = [torch.int8, torch.float8_e4m3fn]
K, N = (576, 960) if HAS_GPU else (70, 48)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dots are numpy's, whose library sums in an order that varies with the row's place in the tile;
    a tensor core's does not. So sum along K in order."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a[:, :, None].astype(dtype) * b[None].astype(dtype)).sum(1)

    if not HAS_GPU:
        monkeypatch.setattr(np, "matmul", matmul)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


Rows = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


def check_rows(function: Rows, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """``function`` of tensors [M, width]: one row, alone, is what it is among M - 1 others at any place."""
    row = [normal(1, width, dtype=dtype) for width in widths]
    alone = function(*row)
    alone = alone if isinstance(alone, tuple) else (alone,)
    for rows in ROWS:
        place = int(torch.randint(rows, ()))
        inputs = [normal(rows, width, dtype=dtype, scale=30.0) for width in widths]
        for many, one in zip(inputs, row, strict=True):
            many[place] = one[0]
        found = function(*inputs)
        for part, wanted in zip(found if isinstance(found, tuple) else (found,), alone, strict=True):
            assert torch.isfinite(wanted).all()
            assert torch.equal(part[place], wanted[0]), f"row {place} of {rows}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op", ["plain", "residual", "norm before", "gate_up_swiglu", "gate_up_swiglu, norm", "norm after"]
)
def test_linears(op: str, dtype: torch.dtype) -> None:
    weight, gain, out_gain = normal(N, K, dtype=dtype, scale=K**-0.5), normal(K, dtype=dtype), normal(N, dtype=dtype)
    function, widths = {
        "plain": (lambda x: linear(x, weight), (K,)),
        "residual": (lambda x, r: linear(x, weight, residual=r), (K, N)),
        "norm before": (lambda x: linear(x, weight, norm_weight=gain, eps=EPS), (K,)),
        "gate_up_swiglu": (lambda x: gate_up_swiglu(x, weight), (K,)),
        "gate_up_swiglu, norm": (lambda x: gate_up_swiglu(x, weight, norm_weight=gain, eps=EPS), (K,)),
        "norm after": (lambda x, r: linear_add_rms_norm(x, weight, r, out_gain, EPS), (K, N)),
    }[op]
    check_rows(function, widths, dtype)


@pytest.mark.parametrize("kind", ONE_BYTE, ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_linears_of_one_byte(dtype: torch.dtype, kind: torch.dtype) -> None:
    if kind == torch.float8_e4m3fn and HAS_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 before compute capability 8.9")
    small, gain = quantize_weight(normal(N, K, dtype=dtype, scale=K**-0.5), kind), normal(N, dtype=dtype)
    scale = {"scale": small.scale}
    check_rows(lambda x: linear(x, small.values, **scale), (K,), dtype)
    check_rows(lambda x: gate_up_swiglu(x, small.values, **scale), (K,), dtype)
    check_rows(lambda x, r: linear_add_rms_norm(x, small.values, r, gain, EPS, **scale), (K, N), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], ids=str)
def test_linears_of_an_8b_model(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = shape
    weight = normal(n, k, dtype=dtype, scale=k**-0.5)
    gain = normal(n, dtype=dtype)
    check_rows(lambda x: linear(x, weight), (k,), dtype)
    if n == 28672:
        check_rows(lambda x: gate_up_swiglu(x, weight), (k,), dtype)
    if n == 4096:
        check_rows(lambda x, r: linear_add_rms_norm(x, weight, r, gain, EPS), (k, n), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_swiglu(dtype: torch.dtype) -> None:
    for size in (100, 4096):
        gain, other = normal(size, dtype=dtype), normal(size, dtype=dtype)
        check_rows(lambda x, g=gain: rms_norm(x, g, EPS), (size,), dtype)
        check_rows(lambda x, y, g=gain: add_rms_norm(x, y, g, EPS), (size, size), dtype)
        check_rows(lambda x, y, g=gain, h=other: cat_rms_norm(x, g, y, h, EPS, EPS), (size, size), dtype)
    check_rows(swiglu, (100, 100), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draft_input(dtype: torch.dtype) -> None:
    """Row t is made of row t of the hidden state and of the embedding."""
    turn = torch.arange(65, device=DEVICE)[None]
    for size in (100, 4096):
        gains = normal(size, dtype=dtype), normal(size, dtype=dtype)

        def begun(hidden: torch.Tensor, embedded: torch.Tensor, gains=gains) -> tuple[torch.Tensor, torch.Tensor]:
            at = turn[:, : len(hidden)]
            embedding = F.pad(embedded, (0, 0, 0, 65 - len(embedded)))  # one size, so that a GPU compiles once
            both, total = draft_input(hidden[None], at, at, embedding, *gains, EPS, EPS)
            return both[0], total[0]

        check_rows(begun, (size, size), dtype)


HEADS = [
    ((4, 2, 64), torch.bfloat16),
    ((9, 3, 64), torch.float32),
    ((9, 3, 64), torch.float16),
    ((32, 8, 128), torch.float32),
    ((32, 8, 128), torch.bfloat16),
    ((8, 8, 80), torch.float16),
]
"""On a GPU; a pair costs it four to six compilations."""


@pytest.mark.parametrize(
    ("heads", "dtype"), HEADS if HAS_GPU else [((4, 2, 16), torch.float32), ((4, 2, 16), torch.float16)], ids=str
)
def test_attention(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A row at the end of a path of up to three nodes that lie anywhere in a tree, the rest of it in the prefix: what it
    is alone, with the whole path in the prefix."""
    query_heads, kv_heads, size = heads
    start = 1234 if HAS_GPU else 40
    chain = normal(2, 1, kv_heads, start + 3, size, dtype=dtype)
    query, scale = normal(1, query_heads, size, dtype=dtype), size**-0.5
    alone = attention(query[:, None], *chain, torch.tensor([start + 2], device=DEVICE), scale=scale)[0, 0]
    assert torch.isfinite(alone).all()
    for rows in ROWS if HAS_GPU else (1, 2, 21):
        path = [0, *(torch.randperm(rows - 1)[:2].sort().values + 1).tolist()]
        length = start + 3 - len(path)
        parents = torch.tensor([-1, *(int(torch.randint(node, ())) for node in range(1, rows))])
        for node, parent in zip(path[1:], path[:-1], strict=True):
            parents[node] = parent
        others = normal(2, 1, kv_heads, rows, size, dtype=dtype, scale=5.0)
        others[:, :, :, path] = chain[:, :, :, length:]
        caches = torch.cat((chain[:, :, :, :length], others), 3)
        q = normal(1, rows, query_heads, size, dtype=dtype, scale=5.0)
        q[0, path[-1]] = query[0]
        words = ancestor_words(parents[None], rows).to(DEVICE)
        found = attention(q, *caches, torch.tensor([length], device=DEVICE), words, scale=scale)
        assert torch.equal(found[0, path[-1]], alone), f"tree of {rows}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_rows_of_decoding(dtype: torch.dtype) -> None:
    """As many rows as the decoding route takes; a row is what it is without those after it."""
    rows, start, size = 32, (1234 if HAS_GPU else 40), 16
    caches = normal(2, 1, 2, start + rows, size, dtype=dtype)
    q, length = normal(1, rows, 4, size, dtype=dtype), torch.tensor([start], device=DEVICE)
    whole = attention(q, *caches, length, scale=0.25)
    for fewer in range(1, rows) if HAS_GPU else (13,):
        assert torch.equal(attention(q[:, :fewer], *caches, length, scale=0.25), whole[:, :fewer])
