"""The trials of the ops on the KV cache: append, retrieve, compact, and RoPE with the append."""

from __future__ import annotations

from typing import Any

import torch

from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.trial import TORCH, Trial, nbytes, relative_error, same
from eagle.model import kv_cache as torch_cache
from eagle.model import layers as torch_layers
from eagle.model.triton_kernels.kv_cache import kv_append, kv_compact, kv_retrieve
from eagle.model.triton_kernels.rope import rope_append


def append_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A tree's rows into one layer's keys."""
    cache = _cache(case, device, poisoned)
    before = cache.clone() if poisoned else None
    new = torch.randn(1, cache.shape[1], case.tree.total_token, cache.shape[3], dtype=case.dtype, device=device)
    start = torch.tensor([case.prefix], dtype=torch.int64, device=device)

    def check(_: Any) -> float:
        expected = before.clone()
        expected[0, :, case.prefix : case.prefix + new.shape[2]] = new[0]
        same("the cache", cache.nan_to_num(123.0), expected.nan_to_num(123.0))
        return 0.0

    return Trial(
        run=lambda: kv_append(cache, new, start),
        rivals={TORCH: lambda: torch_cache.kv_append(cache, new, start)},
        check=check,
        traffic=2 * nbytes(new),
        inputs=(cache, new),
    )


def retrieve_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """As many rows as a tree has, from anywhere in the prefix; rows that are not asked for are NaN."""
    cache = _cache(case, device, poisoned=False)
    order = torch.randperm(case.prefix, device=device)
    count = min(case.tree.total_token, case.prefix // 2)
    indices = order[:count][None].contiguous()
    if poisoned:
        cache[0, :, order[count:]] = float("nan")

    def check(out: torch.Tensor) -> float:
        same("the rows", out, torch.stack([cache[0, :, i] for i in indices[0].tolist()], 1)[None])
        return 0.0

    return Trial(
        run=lambda: kv_retrieve(cache, indices),
        rivals={TORCH: lambda: torch_cache.kv_retrieve(cache, indices)},
        check=check,
        traffic=2 * count * nbytes(cache[0, :, 0]),
        inputs=(cache,),
    )


def compact_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """An accepted path of the greatest length, in all layers."""
    model, path = case.model, case.tree.path
    slots = case.prefix + case.tree.total_token + 4
    shape = (model.layers, 1, model.kv_heads, slots, model.head_size)
    k, v = (torch.randn(shape, dtype=case.dtype, device=device) for _ in range(2))
    ranks = torch.randperm(case.tree.total_token - 1, device=device)[: path - 1].sort().values + 1
    nodes = torch.cat((ranks.new_zeros(1), ranks))[None].contiguous()
    kv_len = torch.tensor([case.prefix], dtype=torch.int64, device=device)
    count = torch.tensor([path], dtype=torch.int64, device=device)
    before = (k.clone(), v.clone()) if poisoned else ()

    def check(_: Any) -> float:
        for name, cache, old in zip(("keys", "values"), (k, v), before, strict=True):
            expected = old.clone()
            for step, node in enumerate(nodes[0].tolist()):
                expected[:, :, :, case.prefix + step] = old[:, :, :, case.prefix + node]
            same(name, cache, expected)
        return 0.0

    moved = int((nodes[0] != torch.arange(path, device=device)).sum())
    return Trial(
        run=lambda: kv_compact(k, v, nodes, kv_len, count),
        rivals={TORCH: lambda: torch_cache.kv_compact(k, v, nodes, kv_len, count)},
        check=check,
        traffic=2 * moved * nbytes(k[:, :, :, 0], v[:, :, :, 0]),
        inputs=(k, v),
    )


def rope_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A tree's q, k and v, the angles in float32's cosine and sine rounded to the dtype."""
    model, rows, size = case.model, case.tree.total_token, case.model.head_size
    k_cache, v_cache = _cache(case, device, poisoned), _cache(case, device, poisoned)
    q, k, v = (
        torch.randn(1, rows, heads, size, dtype=case.dtype, device=device)
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    )
    angles = torch.rand(1, rows, size // 2, device=device).repeat(1, 1, 2) * 6.28
    cos, sin = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
    start = torch.tensor([case.prefix], dtype=torch.int64, device=device)

    def turned(x: torch.Tensor) -> torch.Tensor:
        x, c, s = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
        half = size // 2
        low, high = x[..., :half], x[..., half:]
        first = low * c[..., :half] - high * s[..., :half]
        return torch.cat((first, high * c[..., half:] + low * s[..., half:]), -1)

    def check(out: torch.Tensor) -> float:
        written = slice(case.prefix, case.prefix + rows)
        same("the values", v_cache[:, :, written], v.transpose(1, 2))
        key_error = relative_error(k_cache[:, :, written], turned(k).transpose(1, 2))
        return max(relative_error(out, turned(q)), key_error)

    return Trial(
        run=lambda: rope_append(q, k, v, cos, sin, k_cache, v_cache, start),
        rivals={TORCH: lambda: torch_layers.rope_append(q, k, v, cos, sin, k_cache, v_cache, start)},
        check=check,
        traffic=2 * nbytes(q, k, v) + nbytes(cos, sin),
        inputs=(q, k, v, cos, sin, k_cache, v_cache),
    )


def _cache(case: Case, device: torch.device, poisoned: bool) -> torch.Tensor:
    """One layer's keys or values with room for the prefix and a tree, NaN where ``poisoned``."""
    shape = (1, case.model.kv_heads, case.prefix + case.tree.total_token + 4, case.model.head_size)
    if poisoned:
        return torch.full(shape, float("nan"), dtype=case.dtype, device=device)
    return torch.randn(shape, dtype=case.dtype, device=device)
