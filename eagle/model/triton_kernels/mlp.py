"""SwiGLU: ``silu(gate) · up``, from two tensors or from one that holds both.

Contract. Tensors are [..., I] (packed: [..., 2 I], the gate first) with a contiguous last dimension, float16, bfloat16
or float32. Rounding is that of `eagle.model.layers`: SiLU in float32, rounded to the dtype, then multiplied by ``up``.
Elementwise, so no row depends on another; nothing is read on the host: safe under CUDA-graph capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.rows import as_rows, check_float, check_like

BLOCK = 1024
"""Columns a program: 8 values a thread at 4 warps, one 16-byte load of bf16 from each input."""


@triton.jit
def silu_mul(gate, up, dtype: tl.constexpr):
    """``silu(gate) · up`` in float32 with PyTorch's two roundings to ``dtype``; gate, up: float32 of one shape."""
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up


@triton.jit
def _swiglu_kernel(
    gate,  # [M, I]
    up,  # [M, I]
    out,  # [M, I], contiguous
    size,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    left = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    value = silu_mul(left, right, out.dtype.element_ty)
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask=inside)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``. gate, up: [..., I], of one dtype. Returns [..., I].

    Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    check_float(gate, "gate")
    check_like(up, "up", gate, tuple(gate.shape), gate.dtype)
    left, right = as_rows(gate, "gate"), as_rows(up, "up")
    m, size = left.shape
    out = gate.new_empty(gate.shape)
    if m:
        with torch.cuda.device_of(gate):
            _swiglu_kernel[(m, triton.cdiv(size, BLOCK))](
                left, right, out, size, left.stride(0), right.stride(0), BLOCK=BLOCK, num_warps=4
            )
    return out


def swiglu_packed(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` of the two halves of the last dimension. gate_up: [..., 2 I], the gate first. Returns [..., I].

    Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; expected [..., 2 I], the gate and then up")
    half = gate_up.shape[-1] // 2
    return swiglu(gate_up[..., :half], gate_up[..., half:])


_swiglu_op = torch.library.custom_op(
    "eagle::swiglu", swiglu, mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor"
)
_swiglu_packed_op = torch.library.custom_op(
    "eagle::swiglu_packed", swiglu_packed, mutates_args=(), schema="(Tensor gate_up) -> Tensor"
)


@_swiglu_op.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_packed_op.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
