"""Attention of prompts by the FlashAttention package, where it is installed: a library beside the kernels.

Contract: signature and meaning of `eagle.model.attention.attention` without a tree: row t sits in slot ``kv_len + t`` and
sees the slots up to its own. That is `flash_attn_with_kvcache` over caches of lengths ``kv_len + T`` with its causal mask,
which is aligned to the bottom right. flash-attn 2 (from 2.6 on) and flash-attn 3 document the same meaning of all that is
passed here. Caches are given as transposed views; nothing is copied. Graph-safe: nothing is read on the host.
Batch-invariant as far as the library is with one split of the keys. All new rows must lie in the cache.

Imports neither triton nor FlashAttention until it is called.
"""

from __future__ import annotations

from importlib import import_module

import torch

from eagle.model.triton_kernels.hardware import FlashAttention

DTYPES = (torch.float16, torch.bfloat16)
MAX_SIZE = 256
SIZE_STEP = 8
"""Head sizes that are no multiple of it would have the library copy both caches at every call."""


class FlashPrompts:
    """The attention op for causal prompts, by one FlashAttention package."""

    def __init__(self, package: FlashAttention) -> None:
        """Imports the package; raises ImportError where it can't be."""
        self.package = package
        self._function = import_module(package.module).flash_attn_with_kvcache

    def __call__(
        self,
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
        """q: [B, T, Hq, D] float16 or bfloat16; k_cache, v_cache: [B, Hkv, S, D], in q's dtype; kv_len: [B] int64;
        window, softcap as in the PyTorch op. Returns [B, T, Hq, D]. Raises ValueError for a tree, and for dtypes and head
        sizes that the library does not take.
        """
        _check(q, k_cache, v_cache, tree_words)
        return self._function(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=(kv_len + q.shape[1]).to(torch.int32),
            softmax_scale=scale,
            causal=True,
            # keys up to and including so many positions back; the row's own is one of our window
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            num_splits=1,  # the library would else choose it by the number of rows, and so the order of the sum
        )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, words: torch.Tensor | None) -> None:
    if words is not None:
        raise ValueError(f"tree_words is {tuple(words.shape)}; FlashAttention takes causal rows alone")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, the caches {k.dtype} and {v.dtype}; expected float16 or bfloat16 for all")
    size = q.shape[-1]
    if not (size == k.shape[-1] == v.shape[-1] and size <= MAX_SIZE and size % SIZE_STEP == 0):
        found = f"{size}, {k.shape[-1]} and {v.shape[-1]}"
        raise ValueError(f"head sizes are {found}; expected one, a multiple of {SIZE_STEP} up to {MAX_SIZE}")
