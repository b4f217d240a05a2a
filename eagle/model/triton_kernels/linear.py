"""The small-M linear: ``y = x @ w.T`` for the few rows of a draft tree, with what surrounds it in a decoder fused.

Contract
- x is [..., K], float16, bfloat16 or float32, the last dimension contiguous; its leading dimensions flatten to M rows.
  The weight is [N, K], K contiguous and rows at any stride, of x's dtype, or int8 / float8_e4m3fn with ``scale`` [N]
  float32 (`quantize_weight`). Sums are float32; float32 dots are of `precision`'s kind.
- Rounding is that of the separate ops: (sum · scale + bias) rounded to the dtype of x; then the residual is added, or
  SwiGLU applied, with their own roundings. A norm before the product rounds as `rms_norm` does (its sum of
  squares runs in another order).
- Batch-invariant: the split of K and the order of sums follow from N, K, dtypes and device alone. Only a tile's height
  follows M: 64 rows; 16 for M ≤ 16 and one-byte or float32 weights on the left of the dot; 128 or 256 for M > 64
  (`linear_config.tall`). A sum takes the same order in each, since the tensor core adds over K alike whatever the tile.
  A row's result depends on no other row, nor on how many there are, for any M.
- Made for a tree or a few: at M ≤ 64 the weight is read once, at 240 rows the products of an 8B model take 1.0 to 1.3 times
  the library's time. Leave prompts to the library.
- K is split where N alone leaves multiprocessors idle: partial sums go to a float32 workspace [split_k, M, N] and a
  second launch adds them in order. There are no atomics.
- Shapes and allocations follow from the arguments' shapes; nothing is read on the host: safe under graph capture.
- On Hopper each launch may begin while the kernel ahead of it still runs (programmatic dependent launch): it asks L2
  for the first lines of its weight, then waits for that kernel's end before it reads or writes anything else.
- The norm before the product (``norm_weight``) spares a tensor, not time: each program norms all of its rows again.
  `linear_add_rms_norm` on the product before was faster at every K measured (576 and 3,072, H100).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from eagle.model.triton_kernels import norm
from eagle.model.triton_kernels.descriptor import aligned, rows_descriptor
from eagle.model.triton_kernels.linear_config import BLOCK_M, LinearConfig, choose, device_traits, tall
from eagle.model.triton_kernels.linear_kernels import add_norm_kernel, product_kernel, reduce_kernel
from eagle.model.triton_kernels.overlap import overlaps
from eagle.model.triton_kernels.quantize import FP8_CAPABILITY, LARGEST
from eagle.model.triton_kernels.rows import as_rows, check_float, check_like, check_vector

FEW_ROWS = 16
"""Up to so many rows take a tile of as many where one-byte or float32 weights stand on the left of the dot: a quarter of
the work, and each sum keeps its order (fp8 8B products at 10 rows: 15 to 30 % faster on an H100)."""

COPIED_ROWS = 48
"""From so many rows on the copy engine brings x: rows that are not there cost it time, and ordinary loads nothing. An
H100's 4096×4096, microseconds at 10, 48 and 60 rows: copied 21.5, 16.7, 16.2, loaded 15.6, 16.5, 16.7; its weight in fp8,
at 48: 11.4 and 13.2."""

REDUCE_M, REDUCE_N = 8, 128
"""Sums a program of the second pass adds: enough programs for one tile of rows, whole lines of every part."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, then ``+ residual``; with ``norm_weight`` of ``rms_norm(x, norm_weight, eps)``.

    x: [..., K]; weight: [N, K]; bias, scale: [N]; residual: [..., N]; norm_weight: [K]. Returns [..., N]. ``config``
    overrides the choice by size. Raises ValueError for what the module's contract excludes.
    """
    config, n = _config(x, weight, config, norm_before=norm_weight is not None), weight.shape[0]
    if residual is not None:
        check_like(residual, "residual", x, (*x.shape[:-1], n), x.dtype)
    out = x.new_empty((*x.shape[:-1], n))
    _run(x, weight, bias, scale, residual, norm_weight, eps, config, out, swiglu=False)
    return out


def gate_up_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """``silu(x @ gate.T) · (x @ up.T)``, for weight [2 I, K] from `pack_gate_up`; bias and scale, [2 I], packed alike.

    x: [..., K]. Returns [..., I]. The rest is as in `linear`.
    """
    config = _config(x, weight, config, norm_before=norm_weight is not None)
    if weight.shape[0] % 2:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected [2 I, K], rows of gate and up in turn")
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    _run(x, weight, bias, scale, None, norm_weight, eps, config, out, swiglu=True)
    return out


def linear_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    config: LinearConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(total, norm_weight, eps), total)`` with ``total = linear(x, weight, bias) + residual``.

    The norm *after* the product; it rides in the pass that adds the partial sums. x: [..., K]; weight: [N, K];
    residual: [..., N]; norm_weight: [N], of x's dtype. Returns two [..., N]. Raises ValueError as `linear` does.
    """
    config, n = _config(x, weight, config, norm_after=True), weight.shape[0]
    check_like(residual, "residual", x, (*x.shape[:-1], n), x.dtype)
    check_vector(norm_weight, "norm_weight", x, n, x.dtype)
    total, out = x.new_empty(residual.shape), x.new_empty(residual.shape)
    partial = _run(x, weight, bias, scale, None, None, 0.0, config, total, swiglu=False, parts_only=True)
    if partial is not None:
        rows, shape = as_rows(residual, "residual"), norm.norm_config(n)
        hopper = overlaps(x)
        with torch.cuda.device_of(x):
            add_norm_kernel[(rows.shape[0],)](
                partial,
                scale,
                bias,
                rows,
                norm_weight,
                total,
                out,
                rows.shape[0],
                n,
                rows.stride(0),
                eps,
                SPLIT_K=config.split_k,
                BLOCK=shape.block,
                HOPPER=hopper,
                num_warps=min(16, 2 * shape.num_warps),
                launch_pdl=hopper,
            )
    return out, total


def _config(
    x: torch.Tensor,
    weight: torch.Tensor,
    config: LinearConfig | None,
    *,
    norm_before: bool = False,
    norm_after: bool = False,
) -> LinearConfig:
    if weight.dim() != 2 or x.dim() == 0 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [..., K] and [N, K]")
    if config is not None:
        return config
    device, rows = device_traits(x.device), as_rows(x, "x")
    chosen = choose(*weight.shape, x.dtype, weight.dtype, device, norm_after=norm_after)
    if not all(aligned(tensor, tensor.stride(0)) for tensor in (weight, rows)):
        return replace(chosen, tma=False)  # the same sums, by ordinary loads
    if rows.shape[0] <= BLOCK_M or norm_before:
        return chosen
    return tall(chosen, rows.shape[0], *weight.shape, x.dtype, weight.dtype, device)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    config: LinearConfig,
) -> None:
    check_float(x, "x")
    n, k = weight.shape
    needed = (9, 0) if config.tma else FP8_CAPABILITY if weight.dtype == torch.float8_e4m3fn else (0, 0)
    if x.is_cuda and device_traits(x.device).capability < needed:
        what = "tma=True" if config.tma else f"weight {tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"{what} on {device_traits(x.device).name}; expected compute capability {needed} or higher")
    if weight.device != x.device or (weight.dtype != x.dtype and weight.dtype not in LARGEST):
        found = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        raise ValueError(f"weight is {found}; expected {x.dtype}, int8 or float8_e4m3fn on {x.device}")
    if weight.stride(1) != 1 and k != 1:
        raise ValueError(f"weight {tuple(weight.shape)} has strides {weight.stride()}; expected a contiguous K")
    if (scale is None) == (weight.dtype in LARGEST):
        wanted = "no scale" if scale is not None else f"scale [{n}] float32"
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}; expected {wanted} with it")
    if scale is not None:
        check_vector(scale, "scale", x, n, torch.float32)
    if bias is not None:
        check_vector(bias, "bias", x, n, x.dtype)
    if norm_weight is not None:
        check_vector(norm_weight, "norm_weight", x, k, x.dtype)


def _descriptor(x: torch.Tensor, name: str, block: int, block_k: int) -> TensorDescriptor:
    if not aligned(x, x.stride(0)):
        found = f"{tuple(x.shape)} {x.dtype} with row stride {x.stride(0)}"
        raise ValueError(f"{name} is {found}; expected 16-byte alignment of start and rows for tma=True")
    return rows_descriptor(x, x.shape[0], x.stride(0), (block, block_k))


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    config: LinearConfig,
    out: torch.Tensor,
    *,
    swiglu: bool,
    parts_only: bool = False,
) -> torch.Tensor | None:
    """Launch the product and, where K is split, the pass that adds its parts into ``out``.

    Returns the workspace of the parts, or None where there is none; ``parts_only``: leaves ``out`` to the caller.
    """
    _check(x, weight, bias, scale, norm_weight, config)
    rows = as_rows(x, "x")
    (m, k), n, split_k = rows.shape, weight.shape[0], config.split_k
    if m == 0:
        return None
    added = as_rows(residual, "residual") if residual is not None else None
    added_stride = added.stride(0) if added is not None else 0
    partial = x.new_empty((split_k, m, n), dtype=torch.float32) if split_k > 1 or parts_only else None
    # With the weight on the left of the dot a sum's order does not follow the tile's width. That of a norm's squares may.
    low = norm_weight is None and config.swap and weight.element_size() != 2
    block_m = FEW_ROWS if low and m <= FEW_ROWS else config.block_m
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, config.block_n), split_k)
    hopper = overlaps(x)
    with torch.cuda.device_of(x):
        product_kernel[grid](
            rows,
            _descriptor(rows, "x", block_m, config.block_k) if config.tma and m >= COPIED_ROWS else None,
            weight,
            _descriptor(weight, "weight", config.block_n, config.block_k) if config.tma else None,
            scale,
            bias,
            added,
            norm_weight,
            out,
            partial,
            m,
            n,
            k,
            rows.stride(0),
            weight.stride(0),
            added_stride,
            eps,
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            EVEN_K=k % config.block_k == 0,
            SWAP=config.swap,
            SWIGLU=swiglu,
            HOPPER=hopper,
            LINES=config.prefetch,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            launch_pdl=hopper,
        )
        if partial is not None and not parts_only:
            reduce_kernel[(triton.cdiv(m, REDUCE_M), triton.cdiv(n, REDUCE_N))](
                partial,
                scale,
                bias,
                added,
                out,
                m,
                n,
                added_stride,
                SPLIT_K=split_k,
                BLOCK_M=REDUCE_M,
                BLOCK_N=REDUCE_N,
                SWIGLU=swiglu,
                HOPPER=hopper,
                num_warps=4,
                launch_pdl=hopper,
            )
    return partial


_linear_op = torch.library.custom_op(
    "eagle::linear",
    linear,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? residual=None, "
    "Tensor? norm_weight=None, float eps=0.0) -> Tensor",
)
_gate_up_swiglu_op = torch.library.custom_op(
    "eagle::gate_up_swiglu",
    gate_up_swiglu,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None, Tensor? norm_weight=None, "
    "float eps=0.0) -> Tensor",
)
_linear_add_rms_norm_op = torch.library.custom_op(
    "eagle::linear_add_rms_norm",
    linear_add_rms_norm,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor residual, Tensor norm_weight, float eps, Tensor? bias=None, "
    "Tensor? scale=None) -> (Tensor, Tensor)",
)


@_linear_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_gate_up_swiglu_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@_linear_add_rms_norm_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *rest: object, **named: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(residual.shape), x.new_empty(residual.shape)
