"""The trials of the small-M linear: a model's products, one-byte weights, and the fusions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eagle.bench.kernel_cases import WEIGHT_DTYPES, Case
from eagle.bench.kernel_ops.layers import EPS, norm_reference
from eagle.bench.kernel_ops.trial import TORCH, Trial, nbytes, relative_error
from eagle.model import layers as torch_layers
from eagle.model.triton_kernels.linear import gate_up_swiglu, linear, linear_add_rms_norm
from eagle.model.triton_kernels.quantize import dequantize_weight, quantize_weight

CHUNK = 8192
"""Weight rows widened to float64 together."""


def product_reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T`` in float64. x: [M, K]; weight: [N, K]; scale: [N]."""
    wide = x.double()
    parts = []
    for start in range(0, weight.shape[0], CHUNK):
        part = weight[start : start + CHUNK].to(torch.float32).double()
        parts.append(wide @ (part if scale is None else part * scale[start : start + CHUNK, None].double()).T)
    return torch.cat(parts, -1)


def random_linear(n: int, k: int, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x [rows, K] and a weight [N, K] whose product has values near 1."""
    x = torch.randn(rows, k, dtype=dtype, device=device)
    return x, torch.randn(n, k, dtype=dtype, device=device).mul_(k**-0.5)


def linear_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """One product of the model; PyTorch's is the BLAS library's, which is the peak to beat."""
    n, k = case.model.linear(case.part)
    x, weight = random_linear(n, k, case.rows, case.dtype, device)
    return Trial(
        run=lambda: linear(x, weight),
        rivals={TORCH: lambda: F.linear(x, weight)},
        check=lambda out: relative_error(out, product_reference(x, weight)),
        traffic=nbytes(x, weight) + case.rows * n * x.element_size(),
        flops=2 * case.rows * n * k,
        inputs=(x, weight),
    )


def one_byte_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A one-byte weight; the rivals work on the same weight widened ahead of time."""
    n, k = case.model.linear(case.part)
    x, weight = random_linear(n, k, case.rows, case.dtype, device)
    small = quantize_weight(weight, WEIGHT_DTYPES[case.op])
    dense = dequantize_weight(small, case.dtype)
    return Trial(
        run=lambda: linear(x, small.values, scale=small.scale),
        rivals={TORCH: lambda: F.linear(x, dense), "wide weight": lambda: linear(x, dense)},
        check=lambda out: relative_error(out, product_reference(x, *small)),
        traffic=nbytes(x, *small) + case.rows * n * x.element_size(),
        flops=2 * case.rows * n * k,
        inputs=(x, *small),
    )


def swiglu_linear_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """gate, up and SwiGLU in one."""
    n, k = case.model.linear("gate_up")
    x, packed = random_linear(n, k, case.rows, case.dtype, device)
    plain = torch.cat((packed[0::2], packed[1::2]))

    def by_torch() -> torch.Tensor:
        gate, up = F.linear(x, plain).chunk(2, -1)
        return torch_layers.swiglu(gate, up)

    def check(out: torch.Tensor) -> float:
        both = product_reference(x, packed)
        gate, up = both[:, 0::2], both[:, 1::2]
        return relative_error(out, gate / (1 + (-gate).exp()) * up)

    return Trial(
        run=lambda: gate_up_swiglu(x, packed),
        rivals={TORCH: by_torch},
        check=check,
        traffic=nbytes(x, packed) + case.rows * n // 2 * x.element_size(),
        flops=2 * case.rows * n * k,
        inputs=(x, packed),
    )


def linear_norm_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A product, the residual add and the norm that follows."""
    n, k = case.model.linear(case.part)
    x, weight = random_linear(n, k, case.rows, case.dtype, device)
    residual = torch.randn(case.rows, n, dtype=case.dtype, device=device)
    gain = torch.rand(n, dtype=case.dtype, device=device) + 0.5

    def check(out: tuple[torch.Tensor, torch.Tensor]) -> float:
        total = product_reference(x, weight) + residual.double()
        return max(relative_error(out[0], norm_reference(total, gain)), relative_error(out[1], total))

    return Trial(
        run=lambda: linear_add_rms_norm(x, weight, residual, gain, EPS),
        rivals={TORCH: lambda: torch_layers.add_rms_norm(F.linear(x, weight), residual, gain, EPS)},
        check=check,
        traffic=nbytes(x, weight, gain) + 3 * nbytes(residual),
        flops=2 * case.rows * n * k,
        inputs=(x, weight, residual, gain),
    )
