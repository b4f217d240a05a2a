"""The norm kernels against loops in float64 and the PyTorch ops; on the GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model import layers
from eagle.model.triton_kernels.norm import MAX_SIZE, add_rms_norm, cat_rms_norm, norm_config, rms_norm

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")])
DTYPES = [torch.float32, torch.float16, BF16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def rms_by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = x.double().clone()
    for row in out.view(-1, x.shape[-1]):
        row /= (row.dot(row) / len(row) + EPS) ** 0.5
    return out * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17), (2, 3, 64), (5, 1000), (1, 1, 2049)], ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight, other = normal(shape[-1], dtype=dtype), normal(shape[-1], dtype=dtype)
    assert relative_error(rms_norm(x, weight, EPS), rms_by_rows(x, weight)) < BOUND[dtype]
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert relative_error(normed, rms_by_rows(total, weight)) < BOUND[dtype]
    both = cat_rms_norm(x, weight, residual, other, EPS, EPS)
    assert both.shape == (*shape[:-1], 2 * shape[-1])
    assert torch.equal(both[..., : shape[-1]], rms_norm(x, weight, EPS))
    assert torch.equal(both[..., shape[-1] :], rms_norm(residual, other, EPS))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 300), half=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 60.0]))
def test_rounds_as_the_pytorch_op(rows: int, size: int, half: bool, scale: float) -> None:
    dtype = torch.float16 if half else torch.float32
    x, weight = scale * normal(rows, size, dtype=dtype), normal(size, dtype=dtype)
    out, expected = rms_norm(x, weight, EPS), layers.rms_norm(x, weight, EPS)
    assert out.dtype == expected.dtype
    # equal but where the two orders of the float32 sum straddle a rounding boundary
    assert relative_error(out, expected) < (2e-4 if half else 1e-6)


def test_the_two_norms_of_a_draft_may_differ_in_eps() -> None:
    x, weight = normal(2, 24, dtype=torch.float32), normal(24, dtype=torch.float32)
    both = cat_rms_norm(x, weight, x, weight, 1e-5, 10.0)
    assert torch.equal(both[:, :24], rms_norm(x, weight, 1e-5))
    assert torch.equal(both[:, 24:], rms_norm(x, weight, 10.0))


def test_wide_weights_promote_as_in_pytorch() -> None:
    x, weight = normal(3, 40, dtype=torch.float16), normal(40, dtype=torch.float32)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.float32
    assert relative_error(out, layers.rms_norm(x, weight, EPS)) < 2e-4


def test_strided_rows_and_what_lies_between_them() -> None:
    wide = torch.full((2, 3, 50), float("nan"), device=DEVICE)
    wide[..., :20] = torch.randn(2, 3, 20)
    weight = normal(20, dtype=torch.float32)
    x = wide[..., :20]
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
    last = wide[:, -1:, :20]
    assert torch.equal(rms_norm(last, weight, EPS), rms_norm(x, weight, EPS)[:, -1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other(dtype: torch.dtype) -> None:
    x, residual, weight = normal(64, 100, dtype=dtype), normal(64, 100, dtype=dtype), normal(100, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    both = cat_rms_norm(x, weight, residual, weight, EPS, EPS)
    for rows in (1, 2, 7, 63):
        part, other = x[:rows].clone(), residual[:rows].clone()
        part[1:], other[1:] = float("nan"), float("inf")
        assert torch.equal(add_rms_norm(part, other, weight, EPS)[0][0], normed[0])
        assert torch.equal(cat_rms_norm(part, weight, other, weight, EPS, EPS)[0], both[0])
        assert torch.equal(rms_norm(x[-rows:], weight, EPS), rms_norm(x, weight, EPS)[-rows:])
    assert torch.equal(rms_norm(total, weight, EPS), normed)


def test_no_rows() -> None:
    x, weight = torch.empty(2, 0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert rms_norm(x, weight, EPS).shape == (2, 0, 8)
    assert cat_rms_norm(x, weight, x, weight, EPS, EPS).shape == (2, 0, 16)


def test_refusals_name_the_shapes() -> None:
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight is \(7,\).*expected \(8,\)"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        rms_norm(x.T.contiguous().T, weight, EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x, torch.ones(16, device=DEVICE)[::2], EPS)
    with pytest.raises(ValueError, match=r"residual is \(1, 8\)"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="float16"):
        cat_rms_norm(x, weight, x.half(), weight, EPS, EPS)
    with pytest.raises(ValueError, match=str(MAX_SIZE)):
        norm_config(MAX_SIZE + 1)


def test_registered_ops() -> None:
    x, weight = normal(3, 20, dtype=torch.float32), normal(20, dtype=torch.float32)
    torch.library.opcheck(torch.ops.eagle.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(torch.ops.eagle.add_rms_norm.default, (x, x, weight, EPS))
    torch.library.opcheck(torch.ops.eagle.cat_rms_norm.default, (x, weight, x, weight, EPS, EPS))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [576, 4096, 8192, MAX_SIZE])
def test_model_sizes(size: int, dtype: torch.dtype) -> None:
    x, residual, weight = (normal(*s, dtype=dtype) for s in ((60, size), (60, size), (size,)))
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert relative_error(normed, rms_by_rows(total, weight)) < BOUND[dtype]
