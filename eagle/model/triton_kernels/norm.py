"""RMSNorm: plain, with the residual add, and the draft's two norms with their concatenation, one launch each.

Contract. Inputs are [..., K] with a contiguous last dimension, float16, bfloat16 or float32; weights are [K]. Rounding
is that of `eagle.model.layers`: the mean of squares and the scale in float32, the normalised value rounded to x's
dtype, then multiplied by the weight; the result has the promoted dtype of x and weight. A program owns one row and its
block depends on K alone, so a row's result depends on no other row. Shapes come from the arguments alone and nothing
is read on the host: safe under CUDA-graph capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import as_rows, check_float, check_like, check_vector

MAX_SIZE = 32768
"""Longest row: a program holds it in registers, 32 values a thread at 32 warps; twice that would spill."""


@triton.jit
def normalise(x, weight, k, eps, dtype: tl.constexpr):
    """One row, x: [BLOCK] float32 with zeros beyond k; weight: [BLOCK] float32. ``dtype`` is the row's own."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / k + eps)
    return weight * (x * scale).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x,  # [M, K]
    weight,  # [K]
    out,  # [M, K], contiguous
    k,
    stride,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < k
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = normalise(value, scale, k, eps, x.dtype.element_ty)
    tl.store(out + row * k + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_kernel(
    x,  # [M, K]
    residual,  # [M, K]
    weight,  # [K]
    out,  # [M, K], contiguous
    total,  # [M, K], contiguous
    k,
    x_stride,
    residual_stride,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < k
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * k + at, rounded, mask=inside)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = normalise(rounded.to(tl.float32), scale, k, eps, total.dtype.element_ty)
    tl.store(out + row * k + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _cat_rms_norm_kernel(
    first,  # [M, K]
    first_weight,  # [K]
    second,  # [M, K]
    second_weight,  # [K]
    out,  # [M, 2 K], contiguous
    k,
    first_stride,
    second_stride,
    first_eps,
    second_eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < k
    if half == 0:
        value = tl.load(first + row * first_stride + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(first_weight + at, mask=inside, other=0.0).to(tl.float32)
        eps = first_eps
    else:
        value = tl.load(second + row * second_stride + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(second_weight + at, mask=inside, other=0.0).to(tl.float32)
        eps = second_eps
    normed = normalise(value, scale, k, eps, first.dtype.element_ty)
    tl.store(out + row * 2 * k + half * k + at, normed.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class NormConfig:
    """Launch configuration: one row a program."""

    block: int
    num_warps: int


def norm_config(k: int) -> NormConfig:
    """By the row's length alone, so that a row is always reduced in one order. ValueError beyond MAX_SIZE."""
    if k > MAX_SIZE:
        raise ValueError(f"a row of {k} values; the norm kernels take at most {MAX_SIZE}")
    block = triton.next_power_of_2(k)
    # 16 values a thread: two 16-byte loads of bf16 in flight, and a short reduction
    return NormConfig(block, min(32, max(1, block // 512)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension. x: [..., K]; weight: [K].

    Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    check_float(x, "x")
    rows = as_rows(x, "x")
    check_vector(weight, "weight", x, rows.shape[1])
    config = norm_config(rows.shape[1])
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    if rows.shape[0]:
        pdl = overlaps(x)
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(rows.shape[0],)](
                rows,
                weight,
                out,
                rows.shape[1],
                rows.stride(0),
                eps,
                BLOCK=config.block,
                num_warps=config.num_warps,
                PDL=pdl,
                launch_pdl=pdl,
            )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``. x, residual: [..., K], of one dtype; weight: [K].

    Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    check_float(x, "x")
    check_like(residual, "residual", x, tuple(x.shape), x.dtype)
    rows, added = as_rows(x, "x"), as_rows(residual, "residual")
    m, k = rows.shape
    check_vector(weight, "weight", x, k)
    config = norm_config(k)
    out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = x.new_empty(x.shape)
    if m:
        pdl = overlaps(x)
        with torch.cuda.device_of(x):
            _add_rms_norm_kernel[(m,)](
                rows,
                added,
                weight,
                out,
                total,
                k,
                rows.stride(0),
                added.stride(0),
                eps,
                BLOCK=config.block,
                num_warps=config.num_warps,
                PDL=pdl,
                launch_pdl=pdl,
            )
    return out, total


def cat_rms_norm(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    first_eps: float,
    second_eps: float,
) -> torch.Tensor:
    """``cat(rms_norm(first, first_weight), rms_norm(second, second_weight))``: an EAGLE-3 layer's attention input.

    first (the embedding), second (the hidden state): [..., K], of one dtype; weights: [K], of one dtype. Returns
    [..., 2 K]. Raises ValueError for a dtype, device, stride or size outside the module's contract.
    """
    check_float(first, "first")
    check_like(second, "second", first, tuple(first.shape), first.dtype)
    rows, others = as_rows(first, "first"), as_rows(second, "second")
    m, k = rows.shape
    check_vector(first_weight, "first_weight", first, k)
    check_vector(second_weight, "second_weight", first, k, first_weight.dtype)
    config = norm_config(k)
    dtype = torch.promote_types(first.dtype, first_weight.dtype)
    out = first.new_empty((*first.shape[:-1], 2 * k), dtype=dtype)
    if m:
        pdl = overlaps(first)
        with torch.cuda.device_of(first):
            _cat_rms_norm_kernel[(m, 2)](
                rows,
                first_weight,
                others,
                second_weight,
                out,
                k,
                rows.stride(0),
                others.stride(0),
                first_eps,
                second_eps,
                BLOCK=config.block,
                num_warps=config.num_warps,
                PDL=pdl,
                launch_pdl=pdl,
            )
    return out


_rms_norm_op = torch.library.custom_op(
    "eagle::rms_norm", rms_norm, mutates_args=(), schema="(Tensor x, Tensor weight, float eps) -> Tensor"
)
_add_rms_norm_op = torch.library.custom_op(
    "eagle::add_rms_norm",
    add_rms_norm,
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
)
_cat_rms_norm_op = torch.library.custom_op(
    "eagle::cat_rms_norm",
    cat_rms_norm,
    mutates_args=(),
    schema="(Tensor first, Tensor first_weight, Tensor second, Tensor second_weight, float first_eps, "
    "float second_eps) -> Tensor",
)


@_rms_norm_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@_add_rms_norm_op.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), x.new_empty(x.shape)


@_cat_rms_norm_op.register_fake
def _(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    first_eps: float,
    second_eps: float,
) -> torch.Tensor:
    dtype = torch.promote_types(first.dtype, first_weight.dtype)
    return first.new_empty((*first.shape[:-1], 2 * first.shape[-1]), dtype=dtype)
