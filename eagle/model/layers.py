"""The decoder's own pieces in plain PyTorch: norms, RoPE with the cache append, SwiGLU, linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eagle.model.kv_cache import kv_append


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension; the mean in float32. Shape and dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """Rotate q and k, append k and v to the cache, return the rotated q.

    q: [B, T, Hq, D]; k, v: [B, T, Hkv, D]; cos, sin: [B, T, D] (both halves filled, as in Llama); k_cache, v_cache:
    [B, Hkv, S, D]; start: [B], the first slot to write. Pairs are (i, i + D/2) (RoFormer, eq. 34, in Llama's layout).
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    q = (q * cos + _rotate_half(q) * sin).to(q.dtype)
    k = (k * cos + _rotate_half(k) * sin).to(k.dtype)
    kv_append(k_cache, k.transpose(1, 2), start)
    kv_append(v_cache, v.transpose(1, 2), start)
    return q


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) · up``."""
    return F.silu(gate) * up


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``. x: [..., K]; weight: [N, K]; bias: [N]. Returns [..., N]."""
    return F.linear(x, weight, bias)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
