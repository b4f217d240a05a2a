"""Attention of a few new rows over a long cache: decoding, and all nodes of a draft tree at once.

Who sees what is as in `eagle.model.attention`. Row t's keys have logical positions 0 … p: the committed prefix below
``kv_len``, then the row's path, the ancestor at depth i (the i-th set bit of its mask words) at ``kv_len + i``.

Two launches. The *prefix* kernel takes the whole blocks of BLOCK_N positions below ``kv_len``: one program per
(sequence, kv head, split, tile of rows × group heads). The *path* kernel, one program per (sequence, kv head, row),
goes on from the state of the split that holds ``kv_len``, over the remaining blocks, whose keys it gathers in path
order, and then merges the row's splits in split order.

Bit-exact: blocks and splits lie at fixed logical positions, every block goes through `attend_block`, and a row's
blocks, splits and merges come in logical order. So a node over a prefix of c positions at depth d gives the bits that
a single row gives at ``kv_len = c + d`` when the same keys lie contiguously; and a row's bits do not depend on the
other rows, the batch or the cache bound S.

Graph-safe: grids and workspace follow from shapes alone; programs beyond the length return at once. S bounds the
grid. Slots at or beyond ``kv_len`` that no mask bit names are never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.attention_block import attend_block, count_bits, path_node, split_of, split_start
from eagle.model.triton_kernels.attention_config import DecodeConfig, count_splits

LOG2E = 1.4426950408889634


@triton.jit
def _first_position(length, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The block start from which any row of the sequence sees keys; rows sit at ``length`` or later."""
    if HAS_WINDOW:
        return tl.maximum(length - window + 1, 0) // BLOCK_N * BLOCK_N
    return length * 0


@triton.jit(do_not_specialize=["rows", "batch", "slots", "splits", "window"])
def _prefix_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    kv_len,  # [B] int64
    words,  # [B, T, W] int64, unused without HAS_TREE
    states,  # [splits, B, Hkv, T * GROUP, Dv] float32
    stats,  # [2, splits, B, Hkv, T * GROUP] float32: maxima, sums
    rows,
    batch,
    slots,
    splits,
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
    w_b,
    w_t,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Neighbouring programs share keys and values; the far splits, which are the longest, start first.
    height = rows * GROUP
    tiles = tl.cdiv(height, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    pair = program // tiles % (batch * KV_HEADS)
    split = splits - 1 - program // tiles // (batch * KV_HEADS)
    b = (pair // KV_HEADS).to(tl.int64)
    head = (pair % KV_HEADS).to(tl.int64)

    length = tl.minimum(tl.load(kv_len + b), slots).to(tl.int32)
    begin = tl.maximum(split_start(split, UNIT), _first_position(length, window, BLOCK_N, HAS_WINDOW))
    end = tl.minimum(split_start(split + 1, UNIT), length // BLOCK_N * BLOCK_N)
    if begin >= end:
        return

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < height
    row = m // GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    query_head = head * GROUP + m % GROUP
    q_at = q + b * q_b + row.to(tl.int64)[:, None] * q_t + query_head[:, None] * q_h + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)
    if HAS_WINDOW:
        if HAS_TREE:
            own = length + count_bits(words + b * w_b + row.to(tl.int64) * w_t, inside, WORDS) - 1
        else:
            own = length + row

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_base = k + b * k_b + head * k_h
    v_base = v + b * v_b + head * v_h
    for at in range(begin, end, BLOCK_N):
        position = at + n
        slot = position.to(tl.int64)
        k_at = k_base + slot[:, None] * k_s + d[None, :]
        v_at = v_base + slot[:, None] * v_s + dv[None, :]
        if SIZE == BLOCK_D:
            k_tile = tl.load(k_at)
        else:
            k_tile = tl.load(k_at, mask=d[None, :] < SIZE, other=0.0)
        if V_SIZE == BLOCK_DV:
            v_tile = tl.load(v_at)
        else:
            v_tile = tl.load(v_at, mask=dv[None, :] < V_SIZE, other=0.0)
        seen = position[None, :] < length
        if HAS_WINDOW:
            seen = seen & (own[:, None] - position[None, :] < window)
        top, total, acc = attend_block(q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP)

    line = (split.to(tl.int64) * batch * KV_HEADS + pair) * height + m
    tl.store(stats + line, top, mask=inside)
    tl.store(stats + splits.to(tl.int64) * batch * KV_HEADS * height + line, total, mask=inside)
    tl.store(states + line[:, None] * V_SIZE + dv[None, :], acc, mask=inside[:, None] & (dv[None, :] < V_SIZE))


@triton.jit(do_not_specialize=["rows", "batch", "slots", "splits", "window"])
def _path_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    kv_len,  # [B] int64
    words,  # [B, T, W] int64, unused without HAS_TREE
    states,  # [splits, B, Hkv, T * GROUP, Dv] float32, read and written
    stats,  # [2, splits, B, Hkv, T * GROUP] float32, read and written
    out,  # [B, T, Hq, Dv] contiguous
    rows,
    batch,
    slots,
    splits,
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
    w_b,
    w_t,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    V_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):
    TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    first_head = program % TILES * BLOCK_M
    row = program // TILES % rows
    pair = program // TILES // rows
    b = (pair // KV_HEADS).to(tl.int64)
    head = (pair % KV_HEADS).to(tl.int64)

    length = tl.minimum(tl.load(kv_len + b), slots).to(tl.int32)
    row_words = words + b * w_b + row.to(tl.int64) * w_t
    if HAS_TREE:
        count = tl.sum(count_bits(row_words + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1), WORDS), 0)
    else:
        count = row + 1
    end = length + count
    tail = length // BLOCK_N * BLOCK_N  # from this block on, keys are read in path order
    begin = _first_position(length, window, BLOCK_N, HAS_WINDOW)

    m = first_head + tl.arange(0, BLOCK_M)
    inside = m < GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    q_at = q + b * q_b + row.to(tl.int64) * q_t + (head * GROUP + m)[:, None] * q_h + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)

    stride = batch.to(tl.int64) * KV_HEADS * rows * GROUP  # from split to split, in lines
    sums = stats + splits * stride
    line = (pair.to(tl.int64) * rows + row) * GROUP + m
    split = split_of(tail, UNIT)
    held = m < tl.where(tail > tl.maximum(split_start(split, UNIT), begin), GROUP, 0)
    state_mask = inside[:, None] & (dv[None, :] < V_SIZE)
    top = tl.load(stats + split * stride + line, mask=held, other=float("-inf"))
    total = tl.load(sums + split * stride + line, mask=held, other=0.0)
    held_at = states + (split * stride + line)[:, None] * V_SIZE + dv[None, :]
    acc = tl.load(held_at, mask=held[:, None] & state_mask, other=0.0)

    k_base = k + b * k_b + head * k_h
    v_base = v + b * v_b + head * v_h
    stop = tl.minimum(end, slots)
    for at in range(tail, stop, BLOCK_N):
        split = split_of(at, UNIT)
        fresh = at == split_start(split, UNIT)
        top = tl.where(fresh, float("-inf"), top)
        total = tl.where(fresh, 0.0, total)
        acc = tl.where(fresh, 0.0, acc)
        position = at + n
        slot = position
        if HAS_TREE:
            slot = tl.where(position < length, position, length + path_node(row_words, position - length, WORDS))
        valid = (position < end) & (slot < slots)
        slot = slot.to(tl.int64)
        k_at = k_base + slot[:, None] * k_s + d[None, :]
        v_at = v_base + slot[:, None] * v_s + dv[None, :]
        k_tile = tl.load(k_at, mask=valid[:, None] & (d[None, :] < SIZE), other=0.0)
        v_tile = tl.load(v_at, mask=valid[:, None] & (dv[None, :] < V_SIZE), other=0.0)
        seen = valid[None, :]
        if HAS_WINDOW:
            seen = seen & (end - 1 - position[None, :] < window)
        top, total, acc = attend_block(q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP)
        tl.store(stats + split * stride + line, top, mask=inside)
        tl.store(sums + split * stride + line, total, mask=inside)
        state_at = states + (split * stride + line)[:, None] * V_SIZE + dv[None, :]
        tl.store(state_at, acc, mask=state_mask)
    tl.debug_barrier()  # the merge reads what other threads of this program have just stored

    h = first_head + tl.arange(0, MERGE_M)
    h_inside = h < GROUP
    line = (pair.to(tl.int64) * rows + row) * GROUP + h
    best = tl.full([MERGE_M], float("-inf"), tl.float32)
    mass = tl.zeros([MERGE_M], tl.float32)
    mixed = tl.zeros([MERGE_M, BLOCK_DV], tl.float32)
    first = split_of(begin, UNIT)
    last = tl.where(stop > begin, split_of(tl.maximum(stop - 1, 0), UNIT), -1)
    # Groups of splits start at multiples of MERGE_SPLITS, wherever the window lets the first one start.
    for group in range(first // MERGE_SPLITS * MERGE_SPLITS, last + 1, MERGE_SPLITS):
        part = group + tl.arange(0, MERGE_SPLITS)
        stored = ((part >= first) & (part <= last))[:, None] & h_inside[None, :]
        lines = part.to(tl.int64)[:, None] * stride + line[None, :]
        tops = tl.load(stats + lines, mask=stored, other=float("-inf"))
        masses = tl.load(sums + lines, mask=stored, other=0.0)
        outs_mask = stored[:, :, None] & (dv[None, None, :] < V_SIZE)
        outs = tl.load(states + lines[:, :, None] * V_SIZE + dv[None, None, :], mask=outs_mask, other=0.0)
        new_best = tl.maximum(best, tl.max(tops, 0))
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(tops - anchor[None, :])
        fade = tl.exp2(best - anchor)
        mass = tl.fma(mass, fade, tl.sum(weights * masses, 0))
        mixed = tl.fma(mixed, tl.broadcast_to(fade[:, None], mixed.shape), tl.sum(weights[:, :, None] * outs, 0))
        best = new_best
    mixed = mixed / tl.where(mass > 0.0, mass, 1.0)[:, None]
    out_at = out + ((b * rows + row) * KV_HEADS * GROUP + head * GROUP + h)[:, None] * V_SIZE + dv[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=h_inside[:, None] & (dv[None, :] < V_SIZE))


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
    group, splits = q_heads // kv_heads, count_splits(slots, config.unit)
    out = q.new_empty(batch, rows, q_heads, v_size)
    states = torch.empty(splits, batch, kv_heads, rows * group, v_size, dtype=torch.float32, device=q.device)
    stats = torch.empty(2, *states.shape[:-1], dtype=torch.float32, device=q.device)
    words = kv_len if tree_words is None else tree_words
    word_strides = (0, 0) if tree_words is None else tree_words.stride()[:2]
    factor = scale * LOG2E if softcap is None else 2.0 * scale / softcap
    tail = (window or 0, factor, (softcap or 0.0) * LOG2E)
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
        "UNIT": config.unit,
        "BLOCK_N": config.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "BLOCK_DV": max(16, triton.next_power_of_2(v_size)),
    }
    tensors = (q, k_cache, v_cache, kv_len, words, states, stats)
    grid = (triton.cdiv(rows * group, config.prefix_m) * batch * kv_heads * splits,)
    with torch.cuda.device_of(q):
        _prefix_kernel[grid](
            *tensors,
            rows,
            batch,
            slots,
            splits,
            *tail,
            *strides,
            **shared,
            BLOCK_M=config.prefix_m,
            num_warps=config.prefix_warps,
            num_stages=config.stages,
        )
    grid = (triton.cdiv(group, config.path_m) * rows * batch * kv_heads,)
    with torch.cuda.device_of(q):
        _path_kernel[grid](
            *tensors,
            out,
            rows,
            batch,
            slots,
            splits,
            *tail,
            *strides,
            **shared,
            BLOCK_M=config.path_m,
            MERGE_M=min(triton.next_power_of_2(group), config.path_m),
            MERGE_SPLITS=config.merge_splits,
            num_warps=config.path_warps,
            num_stages=1,
        )
    return out
