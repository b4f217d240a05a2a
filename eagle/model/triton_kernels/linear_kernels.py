"""The device side of `linear`: the product, and the pass that adds the parts of a split K. Its module is the contract.

The number of rows is never specialised on: one binary serves every M of a tile's height.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eagle.model.triton_kernels.mlp import silu_mul
from eagle.model.triton_kernels.norm import normalise
from eagle.model.triton_kernels.precision import FLOAT32_DOTS
from eagle.model.triton_kernels.widen import finished, widen

LINE = tl.constexpr(128)
"""Bytes of a line of the cache."""


@triton.jit
def _finish(
    total,  # [BLOCK_M, BLOCK_N] float32
    scale,  # [N] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    out,  # [M, N], with SWIGLU [M, N / 2]; contiguous
    rows,  # [BLOCK_M]
    first_col,
    m,
    n,
    residual_stride,
    BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """What follows the sum, with the roundings of the separate ops, and the store."""
    dtype: tl.constexpr = out.dtype.element_ty
    cols = first_col + tl.arange(0, BLOCK_N)
    if scale is not None:
        total = total * tl.load(scale + cols, mask=cols < n, other=0.0)[None, :]
    if bias is not None:
        total = total + tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    value = total.to(dtype).to(tl.float32)
    rows = rows.to(tl.int64)
    if SWIGLU:
        # rows of gate and up alternate in the weight, so a pair's sums lie side by side
        gate, up = tl.split(tl.reshape(value, (value.shape[0], BLOCK_N // 2, 2)))
        value = silu_mul(gate, up, dtype)
        n = n // 2
        cols = first_col // 2 + tl.arange(0, BLOCK_N // 2)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if residual is not None:
        value += tl.load(residual + rows[:, None] * residual_stride + cols[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + rows[:, None] * n + cols[None, :], value.to(dtype), mask=inside)


@triton.jit
def _row_scales(
    x,  # [M, K] at the tile's rows: [BLOCK_M, 1] pointers
    row_inside,  # [BLOCK_M, 1]
    k,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``1 / sqrt(mean(x²) + eps)`` of the tile's rows: [BLOCK_M] float32."""
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=3):
        at = start + tl.arange(0, BLOCK_K)[None, :]
        part = tl.load(x + at, mask=row_inside & (at < k), other=0.0, eviction_policy="evict_last").to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 1) / k + eps)


@triton.jit
def _prefetch(
    weight_rows,  # [BLOCK_N, 1] pointers
    begin,
    end,
    LINES: tl.constexpr,
):
    """Ask L2 for the first lines of the program's rows of the weight, while the kernel that makes x still runs."""
    line: tl.constexpr = LINE // (weight_rows.dtype.element_ty.primitive_bitwidth // 8)
    at = tl.minimum(begin + tl.arange(0, LINES) * line, tl.maximum(end, 1) - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [(weight_rows + at[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["m"])
def product_kernel(
    x,  # [M, K]
    x_copier,  # its descriptor for the copy engine, or None
    weight,  # [N, K]
    copier,  # likewise
    scale,  # [N] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    norm_weight,  # [K] or None
    out,  # [M, N], with SWIGLU [M, N / 2]; contiguous; untouched when K is split
    partial,  # [SPLIT_K, M, N] float32 or None
    m,
    n,
    k,
    x_stride,
    weight_stride,
    residual_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    SWIGLU: tl.constexpr,
    HOPPER: tl.constexpr,
    LINES: tl.constexpr,
):
    # tiles of rows come first in the grid: those that share a piece of the weight run together
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), tl.num_programs(2))
    begin = split * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, k)

    row_inside = (rows < m)[:, None]
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    # columns beyond N read the last row again, which spares the loop a mask; they are not stored
    weight_rows = weight + tl.minimum(cols, n - 1).to(tl.int64)[:, None] * weight_stride
    if HOPPER:
        # what follows may be put in place already; what came before is waited for, but the weight is nobody's result
        tl.extra.cuda.gdc_launch_dependents()
        if LINES > 0:
            _prefetch(weight_rows, begin, end, LINES)
        tl.extra.cuda.gdc_wait()
    if norm_weight is not None:
        row_scale = _row_scales(x_rows, row_inside, k, eps, BLOCK_M, BLOCK_K)[:, None]

    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        x_inside = row_inside if EVEN_K else row_inside & (at < k)[None, :]
        if x_copier is not None:
            left = x_copier.load([tl.program_id(0) * BLOCK_M, start])
        else:
            left = tl.load(x_rows + at[None, :], mask=x_inside, other=0.0, eviction_policy="evict_last")
        here = weight_rows + at[None, :]
        if copier is not None:
            right = copier.load([first_col, start])
        elif EVEN_K:
            right = tl.load(here, eviction_policy="evict_first")
        else:
            right = tl.load(here, mask=(at < k)[None, :], other=0.0, eviction_policy="evict_first")
        if norm_weight is not None:
            gain = tl.load(norm_weight + at, mask=at < k, other=0.0).to(tl.float32)[None, :]
            normed = (left.to(tl.float32) * row_scale).to(left.dtype).to(tl.float32)
            left = (normed * gain).to(left.dtype)
        right = widen(right, left.dtype, HOPPER)
        if SWAP:
            total = tl.dot(right, tl.trans(left), total, input_precision=FLOAT32_DOTS)
            total = finished(total, HOPPER)
        else:
            total = tl.dot(left, tl.trans(right), total, input_precision=FLOAT32_DOTS)

    if SWAP:
        total = tl.trans(total)
    if partial is None:
        _finish(total, scale, bias, residual, out, rows, first_col, m, n, residual_stride, BLOCK_N, SWIGLU)
    else:
        at_rows = split.to(tl.int64) * m + rows
        inside = row_inside & (cols < n)[None, :]
        tl.store(partial + at_rows[:, None] * n + cols[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["m"])
def reduce_kernel(
    partial,  # [SPLIT_K, M, N] float32
    scale,  # [N] float32 or None
    bias,  # [N] or None
    residual,  # [M, N] or None
    out,  # [M, N], with SWIGLU [M, N / 2]; contiguous
    m,
    n,
    residual_stride,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr,
    HOPPER: tl.constexpr,
):
    if HOPPER:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    at = rows.to(tl.int64)[:, None] * n + cols[None, :]
    size = tl.cast(m, tl.int64) * n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial + split * size + at, mask=inside, other=0.0)
    _finish(total, scale, bias, residual, out, rows, first_col, m, n, residual_stride, BLOCK_N, SWIGLU)


@triton.jit(do_not_specialize=["m"])
def add_norm_kernel(
    partial,  # [SPLIT_K, M, N] float32
    scale,  # [N] float32 or None
    bias,  # [N] or None
    residual,  # [M, N]
    norm_weight,  # [N]
    total,  # [M, N], contiguous: the new residual stream
    out,  # [M, N], contiguous: its norm
    m,
    n,
    residual_stride,
    eps,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    if HOPPER:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = total.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    size = tl.cast(m, tl.int64) * n
    value = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLIT_K):
        value += tl.load(partial + split * size + row * n + at, mask=inside, other=0.0)
    if scale is not None:
        value = value * tl.load(scale + at, mask=inside, other=0.0)
    if bias is not None:
        value = value + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    value = value.to(dtype).to(tl.float32)
    value += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)  # ahead of the store, which may alias it
    rounded = value.to(dtype)
    tl.store(total + row * n + at, rounded, mask=inside)
    normed = normalise(rounded.to(tl.float32), gain, n, eps, dtype)
    tl.store(out + row * n + at, normed.to(dtype), mask=inside)
