"""SwiGLU against scalar arithmetic and the PyTorch op; on the GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import math

import pytest

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model import layers
from eagle.model.triton_kernels.mlp import BLOCK, swiglu, swiglu_packed

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
BF16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")])
DTYPES = [torch.float32, torch.float16, BF16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def by_scalars(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    pairs = zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    return torch.tensor([g / (1 + math.exp(-g)) * u for g, u in pairs], dtype=torch.float64).view(gate.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 2, 96), (3, BLOCK + 5)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = 3 * normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    out = swiglu(gate, up)
    assert out.dtype == dtype
    assert relative_error(out.cpu(), by_scalars(gate, up)) < BOUND[dtype]
    assert torch.equal(swiglu_packed(torch.cat((gate, up), -1)), out)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), size=st.integers(1, 300), half=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 20.0]))
def test_rounds_as_the_pytorch_op(rows: int, size: int, half: bool, scale: float) -> None:
    dtype = torch.float16 if half else torch.float32
    gate, up = scale * normal(rows, size, dtype=dtype), normal(rows, size, dtype=dtype)
    assert relative_error(swiglu(gate, up), layers.swiglu(gate, up)) < (2e-4 if half else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_far_values(dtype: torch.dtype) -> None:
    gate = torch.tensor([-200.0, -90.0, -30.0, 0.0, 90.0, 200.0], device=DEVICE).to(dtype)
    out = swiglu(gate, torch.ones_like(gate))
    assert torch.equal(out[4:], gate[4:])
    assert out[:4].float().abs().max() < 1e-10


def test_a_row_depends_on_no_other_nor_on_what_lies_between() -> None:
    wide = torch.full((5, 60), float("nan"), device=DEVICE)
    wide[:, :48] = torch.randn(5, 48)
    out = swiglu(wide[:, :24], wide[:, 24:48])
    assert torch.equal(out, swiglu_packed(wide[:, :48].contiguous()))
    wide[1:] = float("inf")
    assert torch.equal(swiglu(wide[:1, :24], wide[:1, 24:48])[0], out[0])
    assert torch.equal(swiglu(wide[:, :24], wide[:, 24:48])[0], out[0])


def test_no_rows() -> None:
    assert swiglu_packed(torch.empty(0, 8, device=DEVICE)).shape == (0, 4)


def test_refusals_name_the_shapes() -> None:
    x = torch.randn(2, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"up is \(2, 5\).*expected \(2, 6\)"):
        swiglu(x, x[:, :5])
    with pytest.raises(ValueError, match="float16"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        swiglu_packed(x[:, :5])
    with pytest.raises(ValueError, match=r"gate_up is \(\); expected \[..., 2 I\]"):
        swiglu_packed(x[0, 0])
    with pytest.raises(ValueError, match="contiguous last dimension"):
        swiglu(x.T, x.T)


def test_registered_ops() -> None:
    gate, up = normal(3, 20, dtype=torch.float32), normal(3, 20, dtype=torch.float32)
    torch.library.opcheck(torch.ops.eagle.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.eagle.swiglu_packed.default, (torch.cat((gate, up), -1),))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1536, 14336, 28672])
def test_model_sizes(size: int, dtype: torch.dtype) -> None:
    gate, up = normal(60, size, dtype=dtype), normal(60, size, dtype=dtype)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert relative_error(swiglu(gate, up), expected) < BOUND[dtype]
