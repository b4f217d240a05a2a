"""Attention over the KV cache in Triton: causal prefill, decoding, and draft trees. The PyTorch op's twin.

Contract: signature and meaning of `eagle.model.attention.attention`. Heads' and slots' strides are free (a slice of a
larger cache will do), the last dimension is contiguous. Graph-safe: nothing is read on the host, and grids, workspace
and launch configuration follow from shapes, dtypes and the device. Batch-invariant: a row's bits depend on its own
query, keys and position alone; with a tree, or without one for at most DECODE_ROWS rows, they do not depend on where
in the cache its path lies either (see `attention_decode`).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from eagle.model.ops import WORD_BITS
from eagle.model.triton_kernels.attention_config import decode_config, prefill_config
from eagle.model.triton_kernels.attention_decode import decode_attention
from eagle.model.triton_kernels.attention_prefill import prefill_attention
from eagle.model.triton_kernels.cache_checks import (
    check_device,
    check_floats,
    check_integers,
    check_values,
    debugging,
    require,
)

DECODE_ROWS = 32
"""Without a tree, up to so many rows go the decoding route, which splits the cache over many programs; more rows fill
the device by themselves."""

MAX_SIZE = 256
"""Largest head size: its float32 accumulator takes 128 registers a thread in a [64, 256] tile of 4 warps."""


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    tree_words: torch.Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Grouped-query attention of new rows over the cache that already holds their keys.

    q: [B, T, Hq, D] float16, bfloat16 or float32; k_cache: [B, Hkv, S, D]; v_cache: [B, Hkv, S, Dv], both in q's
    dtype; kv_len: [B] int64; tree_words: [B, T, W] int64 or None; scale: above 0. window, softcap as in the
    PyTorch op. Returns [B, T, Hq, Dv]. Raises ValueError for shapes, dtypes, strides, devices or a scale that do not
    fit, and with EAGLE_DEBUG=1 for lengths or mask bits outside the cache.
    """
    _check(q, k_cache, v_cache, kv_len, tree_words, scale, window, softcap)
    rows, size, v_size = q.shape[1], q.shape[3], v_cache.shape[3]
    capability = _capability(q.device)
    if tree_words is None and rows > DECODE_ROWS:
        config = prefill_config(size, v_size, q.dtype, capability)
        return prefill_attention(q, k_cache, v_cache, kv_len, scale, window, softcap, config)
    kv_heads = k_cache.shape[1]
    group = q.shape[2] // kv_heads
    config = decode_config(rows * group, group, kv_heads, size, v_size, q.dtype, capability)
    return decode_attention(q, k_cache, v_cache, kv_len, tree_words, scale, window, softcap, config)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    words: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    given = {"q": q, "k_cache": k, "v_cache": v, "kv_len": kv_len, "tree_words": words}
    require(q.dim() == k.dim() == v.dim() == 4, "q must be [B, T, Hq, D], the caches [B, Hkv, S, D]", **given)
    batch, rows, heads, size = q.shape
    require(k.shape[:3] == v.shape[:3] and k.shape[0] == batch, "the caches must be [B, Hkv, S, D] with q's B", **given)
    require(k.shape[3] == size, "k_cache must have q's head size", **given)
    require(max(size, v.shape[3]) <= MAX_SIZE, f"head sizes must be at most {MAX_SIZE}", **given)
    require(heads % k.shape[1] == 0, "query heads must be a multiple of kv heads", **given)
    require(min(q.shape) > 0 and min(k.shape) > 0, "no dimension may be empty", **given)
    require(kv_len.shape == (batch,), "kv_len must be [B]", **given)
    require(q.dtype == k.dtype == v.dtype, "q and the caches must have one dtype", **given)
    check_floats(q=q, k_cache=k, v_cache=v)
    check_integers(kv_len=kv_len, tree_words=words)
    check_device(**given)
    if words is not None:
        fits = words.dim() == 3 and words.shape[:2] == (batch, rows) and words.shape[2] > 0
        require(fits, "tree_words must be [B, T, W] with q's B and T", **given)
        require(rows <= WORD_BITS * words.shape[2], "every row needs a mask bit: 64 a word", **given)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None; got {window}")
    if scale <= 0:
        raise ValueError(f"scale must be positive; got {scale}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None; got {softcap}")
    if debugging():
        _check_lengths(kv_len, words, rows, k.shape[2])


def _check_lengths(kv_len: torch.Tensor, words: torch.Tensor | None, rows: int, slots: int) -> None:
    if words is None:
        nodes = torch.full_like(kv_len, rows)
    else:
        bits = (words[..., None] >> torch.arange(WORD_BITS, device=words.device)) & 1  # [B, T, W, 64]
        index = torch.arange(1, words.shape[2] * WORD_BITS + 1, device=words.device)
        nodes = (bits.flatten(2) * index).amax((1, 2))
    fine = (kv_len >= 0) & (kv_len + nodes <= slots)
    check_values(fine, f"kv_len and the new rows must lie in the cache's {slots} slots", kv_len=kv_len, rows=nodes)


@torch.library.custom_op("eagle::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    tree_words: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attention` for torch.compile."""
    return attention(q, k_cache, v_cache, kv_len, tree_words, scale=scale, window=window, softcap=softcap)


@_attention_op.register_fake
def _(q, k_cache, v_cache, kv_len, tree_words, scale, window=None, softcap=None):
    return q.new_empty(*q.shape[:3], v_cache.shape[3])
