"""Causal attention of many new rows over the cache: prefill, in one launch.

Row t sits in slot ``kv_len + t`` and sees the slots up to its own. One program per (tile of rows, query head,
sequence) runs over the cache in blocks from position 0 (FlashAttention-2, alg. 1). Programs that share keys and values
are neighbours. A row's bits depend on its own position and keys alone. Slots beyond a row's own add nothing, but slots
up to the tile's last row are read: all new rows must be in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.attention_block import attend_block
from eagle.model.triton_kernels.attention_config import PrefillConfig
from eagle.model.triton_kernels.attention_decode import LOG2E


@triton.jit(do_not_specialize=["rows", "slots", "window"])
def _prefill_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    kv_len,  # [B] int64
    out,  # [B, T, Hq, Dv] contiguous
    rows,
    slots,
    window,
    scale,
    softcap,
    q_b,
    q_t,
    q_h,
    k_b,
    k_h,
    k_s,
    v_b,
    v_h,
    v_s,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    query_head = (program % HEADS).to(tl.int64)
    first = (tiles - 1 - program // HEADS % tiles) * BLOCK_M  # the last tiles see most and start first
    b = (program // HEADS // tiles).to(tl.int64)
    head = query_head // GROUP

    length = tl.minimum(tl.load(kv_len + b), slots).to(tl.int32)
    row = first + tl.arange(0, BLOCK_M)
    own = length + row
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    q_at = q + b * q_b + query_head * q_h + row.to(tl.int64)[:, None] * q_t + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)

    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length + first - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(length + tl.minimum(first + BLOCK_M, rows), slots)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_base = k + b * k_b + head * k_h
    v_base = v + b * v_b + head * v_h
    for at in range(begin, end, BLOCK_N):
        position = at + n
        valid = position < end
        slot = position.to(tl.int64)
        k_at = k_base + slot[:, None] * k_s + d[None, :]
        v_at = v_base + slot[:, None] * v_s + dv[None, :]
        k_tile = tl.load(k_at, mask=valid[:, None] & (d[None, :] < SIZE), other=0.0)
        v_tile = tl.load(v_at, mask=valid[:, None] & (dv[None, :] < V_SIZE), other=0.0)
        seen = position[None, :] <= own[:, None]
        if HAS_WINDOW:
            seen = seen & (own[:, None] - position[None, :] < window)
        top, total, acc = attend_block(q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True)

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at = out + ((b * rows + row) * HEADS + query_head)[:, None] * V_SIZE + dv[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (dv[None, :] < V_SIZE))


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: PrefillConfig,
) -> torch.Tensor:
    """Launch the kernel; arguments as for `eagle.model.triton_kernels.attention.attention`, which checks them."""
    batch, rows, heads, size = q.shape
    slots, v_size = k_cache.shape[2], v_cache.shape[3]
    out = q.new_empty(batch, rows, heads, v_size)
    with torch.cuda.device_of(q):
        _prefill_kernel[(triton.cdiv(rows, config.block_m) * heads * batch,)](
            q,
            k_cache,
            v_cache,
            kv_len,
            out,
            rows,
            slots,
            window or 0,
            scale * LOG2E if softcap is None else 2.0 * scale / softcap,
            (softcap or 0.0) * LOG2E,
            *q.stride()[:3],
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            HEADS=heads,
            GROUP=heads // k_cache.shape[1],
            SIZE=size,
            V_SIZE=v_size,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(size)),
            BLOCK_DV=max(16, triton.next_power_of_2(v_size)),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out
