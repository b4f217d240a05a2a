"""The decoder's own pieces in plain PyTorch: norms, RoPE with the cache append, SwiGLU, and the linears with these."""

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


def cat_rms_norm(
    first: torch.Tensor,
    first_weight: torch.Tensor,
    second: torch.Tensor,
    second_weight: torch.Tensor,
    first_eps: float,
    second_eps: float,
) -> torch.Tensor:
    """``cat(rms_norm(first, first_weight), rms_norm(second, second_weight))``. [..., K] twice → [..., 2 K]."""
    return torch.cat((rms_norm(first, first_weight, first_eps), rms_norm(second, second_weight, second_eps)), dim=-1)


def draft_input(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    embedding_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    embedding_eps: float,
    hidden_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an EAGLE-3 layer begins with: ``cat_rms_norm(embedding[tokens], hidden[rows])`` and ``hidden[rows]``.

    hidden: [B, R, H]; rows: [B, T] int64, or None for all of ``hidden`` in turn; tokens: [B, T] int64; embedding:
    [V, H], of hidden's dtype; weights: [H]. Returns [B, T, 2 H] and [B, T, H].
    """
    hidden = taken(hidden, rows)
    embedded = embedding[tokens]
    return cat_rms_norm(embedded, embedding_weight, hidden, hidden_weight, embedding_eps, hidden_eps), hidden


def taken(hidden: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows [B, T] int64 of hidden [B, R, H]: [B, T, H]; all of it for None."""
    return hidden if rows is None else hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


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


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """``x @ weight.T + bias``, then ``+ residual``; with ``norm_weight`` of ``rms_norm(x, norm_weight, eps)``.

    x: [..., K]; weight: [N, K], of x's dtype or of one byte a value with ``scale`` [N] float32 (`quantize_weight`);
    bias: [N]; residual: [..., N]; norm_weight: [K]. Returns [..., N].
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    if scale is not None:  # multiplied in float32, rounded to x's dtype; a whole weight in float32 would be large
        wide = weight.to(x.dtype, copy=True)
        weight = torch.mul(wide, scale[:, None], out=wide)
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def gate_up_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """``silu(x @ gate.T) · (x @ up.T)``. weight: [2 I, K], rows of gate and up in turn; bias and scale, [2 I], alike.

    x: [..., K]. Returns [..., I]. The rest is as in `linear`.
    """
    both = linear(x, weight, bias, scale=scale, norm_weight=norm_weight, eps=eps)
    return swiglu(both[..., 0::2], both[..., 1::2])


def linear_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(total, norm_weight, eps), total)`` with ``total = linear(x, weight, bias) + residual``.

    x: [..., K]; weight: [N, K]; residual: [..., N]; norm_weight: [N]. Returns two [..., N].
    """
    total = linear(x, weight, bias, scale=scale, residual=residual)
    return rms_norm(total, norm_weight, eps), total


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
