"""Weights made ready for the small-M linear: rows packed together, gate and up interleaved, one-byte values.

A one-byte weight is `QuantizedWeight(values [N, K], scale [N] float32)` with ``weight ≈ values · scale[:, None]``; both
int8 and float8_e4m3fn values are exact in float16 and bfloat16, so rounding happens here only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The one-byte weight dtypes and the value an output channel's largest weight maps to."""

FP8_CAPABILITY = (8, 9)
"""The least compute capability with float8_e4m3fn."""

ROWS_AT_ONCE = 8192
"""Rows converted together: bounds the float32 copy (a 128k-row head would need twice its own size)."""


class QuantizedWeight(NamedTuple):
    """A weight of one byte a value, with a scale for each output channel."""

    values: torch.Tensor  # [N, K] int8 or float8_e4m3fn
    scale: torch.Tensor  # [N] float32


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """Symmetric rounding to nearest, each row by its largest magnitude. weight: [N, K] float; dtype: int8 or float8_e4m3fn.

    ValueError for another dtype, or a weight that is not 2-D or not finite.
    """
    if dtype not in LARGEST or weight.dim() != 2 or not weight.is_floating_point():
        found = f"{tuple(weight.shape)} {weight.dtype} to {dtype}"
        raise ValueError(f"cannot quantise {found}; expected a float [N, K] to int8 or float8_e4m3fn")
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        wide = weight[part].float()
        peak = wide.abs().amax(dim=1)
        if not peak.isfinite().all():
            raise ValueError(f"cannot quantise {tuple(weight.shape)}: it holds NaN or infinity")
        scale[part] = torch.where(peak == 0, 1.0, peak) / LARGEST[dtype]
        scaled = (wide / scale[part, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
        values[part] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    return QuantizedWeight(values, scale)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """``values · scale`` as [N, K] of ``dtype``."""
    return (weight.values.float() * weight.scale[:, None]).to(dtype)


def pack_rows(*weights: torch.Tensor) -> torch.Tensor:
    """Weights [N_i, K] of one dtype stacked to [ΣN_i, K], so that one launch serves q, k and v (or any that share x).

    Also stacks biases and scales, [N_i] to [ΣN_i]. Views of the result can replace the parts, so nothing is held
    twice. ValueError where K or the dtypes differ.
    """
    if len({(part.shape[1:], part.dtype) for part in weights}) != 1:
        raise ValueError(f"cannot pack {[(tuple(p.shape), p.dtype) for p in weights]}; expected one K and one dtype")
    return torch.cat(weights)


def pack_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up in turn, [I, K] twice to [2 I, K] (biases and scales: [I] twice to [2 I]): row 2i is gate's i.

    Whatever tile a program takes, it holds both of a pair, in neighbouring registers. ``packed[0::2]`` and
    ``packed[1::2]`` are the parts again, as views. ValueError where shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        found = f"{tuple(gate.shape)} {gate.dtype} with {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"cannot pack {found}; expected one shape and one dtype")
    return torch.stack((gate, up), dim=1).flatten(0, 1)
