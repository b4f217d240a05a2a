"""Attention of a few new rows over a long cache: decoding, and all nodes of a draft tree at once.

Who sees what is as in `eagle.model.attention`. Row t's keys have logical positions 0 … p: the committed prefix below
``kv_len``, then the row's path, the ancestor at depth i (the i-th set bit of its mask words) at ``kv_len + i``.

Two launches. `attention_prefix` takes each row's body, all but its last TAIL keys, for all rows at once; block j of
BLOCK_N positions belongs to split j mod SPLITS, which balances the splits at every length. `attention_path` takes each
row's last TAIL keys by itself and merges the row's states in split order.

Bit-exact: where the body ends, the blocks and the splits follow from a row's logical position alone; every block of
the body goes through `attend_block`, and a row's blocks, splits and merges come in logical order. So a node over a
prefix of c positions at depth d gives the bits that a single row gives at ``kv_len = c + d`` when the same keys lie
contiguously; and a row's bits do not depend on the other rows, the batch or the cache bound S.

Graph-safe: grids and workspace follow from shapes alone; programs beyond the length return at once. Slots at or
beyond ``kv_len`` that no mask bit names are never read.
"""

from __future__ import annotations

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from eagle.model.triton_kernels.attention_config import PATH_HEADS, DecodeConfig
from eagle.model.triton_kernels.attention_path import path_kernel
from eagle.model.triton_kernels.attention_prefix import prefix_kernel
from eagle.model.triton_kernels.descriptor import aligned, rows_descriptor

LOG2E = 1.4426950408889634


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    tree_words: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: DecodeConfig,
) -> torch.Tensor:
    """Launch both kernels; arguments as for `eagle.model.triton_kernels.attention.attention`, which checks them."""
    batch, rows, q_heads, size = q.shape
    kv_heads, slots, v_size = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = q_heads // kv_heads
    out = q.new_empty(batch, rows, q_heads, v_size)
    state_dtype = q.dtype if config.narrow_states else torch.float32
    states = q.new_empty(config.splits + 1, batch, kv_heads, rows * group, v_size, dtype=state_dtype)
    stats = torch.empty(2, *states.shape[:-1], dtype=torch.float32, device=q.device)
    words = kv_len if tree_words is None else tree_words
    word_strides = (0, 0) if tree_words is None else tree_words.stride()[:2]
    factor = scale * LOG2E if softcap is None else 2.0 * scale / softcap
    sizes = (rows, batch, slots, window or 0, factor, (softcap or 0.0) * LOG2E)
    strides = (*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *word_strides)
    shared = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "SIZE": size,
        "V_SIZE": v_size,
        "WORDS": 1 if tree_words is None else tree_words.shape[-1],
        "HAS_TREE": tree_words is not None,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "SPLITS": config.splits,
        "TAIL": config.tail,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "BLOCK_DV": max(16, triton.next_power_of_2(v_size)),
        "PDL": config.overlap,
    }
    tensors = (q, k_cache, v_cache, kv_len, words, states, stats)
    copiers = (None, None)
    if config.copier and all(map(_copied, (k_cache, v_cache))):
        copiers = tuple(_copier(cache, config.block_n) for cache in (k_cache, v_cache))
    splits = min(config.splits, triton.cdiv(slots, config.block_n))
    with torch.cuda.device_of(q):
        prefix_kernel[(triton.cdiv(rows * group, config.prefix_m) * batch * kv_heads * splits,)](
            *tensors,
            *copiers,
            *sizes,
            *strides,
            **shared,
            BLOCK_M=config.prefix_m,
            num_warps=config.prefix_warps,
            num_stages=config.stages,
            maxnreg=config.prefix_registers,
            launch_pdl=config.overlap,
        )
        path_kernel[(triton.cdiv(group, PATH_HEADS) * rows * batch * kv_heads,)](
            *tensors,
            out,
            *sizes,
            *strides,
            **shared,
            HEADS=PATH_HEADS,
            MERGE_HEADS=min(PATH_HEADS, triton.next_power_of_2(group)),
            num_warps=config.path_warps,
            num_stages=1,
            launch_pdl=config.overlap,
            # Contracting products and sums is the compiler's choice, which may differ between two compilations.
            enable_fp_fusion=False,
        )
    return out


def _copied(cache: torch.Tensor) -> bool:
    """Whether the copy engine can bring blocks of a cache [B, Hkv, S, D] as rows of one matrix."""
    batch, heads, line, last = cache.stride()
    whole = last == 1 and batch % line == 0 and heads % line == 0 and cache.shape[3] <= line
    return whole and aligned(cache, line) and cache.shape[0] * batch // line < 2**31


def _copier(cache: torch.Tensor, block: int) -> TensorDescriptor:
    """A descriptor of the cache's rows [..., D], from the first to the last, for blocks of ``block`` of them."""
    line, extents = cache.stride(2), zip(cache.shape[:3], cache.stride(), strict=False)
    rows = 1 + sum((extent - 1) * (stride // line) for extent, stride in extents)
    return rows_descriptor(cache, rows, line, (block, cache.shape[3]))
