"""The shared part of decoding attention: every row over its *body*, block by block on the tensor cores.

A row at position p has the body [0, p + 1 - TAIL); the last TAIL keys are `attention_path`'s. One program per (tile of
rows × group heads, kv head, sequence, split) takes the split's blocks in order and leaves a softmax state. Blocks that
all rows see whole need no mask. Around ``kv_len`` each row's own body ends somewhere in a block, and is masked there.

With a tree, a path of more than TAIL nodes has nodes in the row's body. Where these are the nodes 0, 1, … (a chain)
they lie as if committed, and are shared as well. Any other such row leaves the block that holds ``kv_len`` to a turn
of its own: the same block of logical positions, gathered along its path, and masked for all other rows of the tile,
whose states it does not touch. Only trees deeper than TAIL pay for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eagle.model.triton_kernels.attention_block import (
    attend_block,
    count_nodes,
    first_block,
    first_position,
    path_node,
)


@triton.jit
def _gather(k_base, v_base, slot, valid, k_s, v_s, SIZE, V_SIZE, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Keys [N, D] and values [N, Dv] of the slots; zero where not valid."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    slot = slot.to(tl.int64)
    k_at = k_base + slot[:, None] * k_s + d[None, :]
    v_at = v_base + slot[:, None] * v_s + dv[None, :]
    k_tile = tl.load(k_at, mask=valid[:, None] & (d[None, :] < SIZE), other=0.0)
    v_tile = tl.load(v_at, mask=valid[:, None] & (dv[None, :] < V_SIZE), other=0.0)
    return k_tile, v_tile


@triton.jit(do_not_specialize=["rows", "batch", "slots", "window", "w_b"])
def prefix_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    kv_len,  # [B] int64
    words,  # [B, T, W] int64, unused without HAS_TREE
    states,  # [SPLITS + 1, B, Hkv, T * GROUP, Dv] float32 or q's dtype: outputs
    stats,  # [2, SPLITS + 1, B, Hkv, T * GROUP] float32: maxima, sums
    k_copier,  # descriptors of k and v as rows […, D] and [… , Dv] of strides k_s and v_s for the copy engine, or None
    v_copier,
    rows,
    batch,
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
    SPLITS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if PDL:
        # In this order: the path kernel reads keys before its own wait, so what wrote them must have ended.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Neighbouring programs share keys and values.
    height = rows * GROUP
    tiles = tl.cdiv(height, BLOCK_M)
    program = tl.program_id(0)
    tile = program % tiles
    pair = program // tiles % (batch * KV_HEADS)
    split = program // tiles // (batch * KV_HEADS)
    b = (pair // KV_HEADS).to(tl.int64)
    head = (pair % KV_HEADS).to(tl.int64)

    # All loads that nothing precedes go out together.
    stored_length = tl.load(kv_len + b)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < height
    row = m // GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    query_head = head * GROUP + m % GROUP
    q_at = q + b * q_b + row.to(tl.int64)[:, None] * q_t + query_head[:, None] * q_h + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)

    length = tl.minimum(stored_length, slots).to(tl.int32)
    start = first_block(split, first_position(length, window, HAS_WINDOW), BLOCK_N, SPLITS)
    nodes = 64 * WORDS if HAS_TREE else rows  # at most on a row's path
    if start >= tl.minimum(length + nodes - TAIL, slots):
        return
    if HAS_TREE:
        row_words = words + b * w_b + row.to(tl.int64) * w_t
        count = count_nodes(row_words, inside, WORDS)
    else:
        count = tl.minimum(row + 1, rows)
    own = length + count - 1
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_base = k + b * k_b + head * k_h
    v_base = v + b * v_b + head * v_h

    step: tl.constexpr = SPLITS * BLOCK_N
    whole = tl.maximum(length + 1 - TAIL, 0) // BLOCK_N * BLOCK_N
    if k_copier is not None:
        k_line = (b * (k_b // k_s) + head * (k_h // k_s)).to(tl.int32)
        v_line = (b * (v_b // v_s) + head * (v_h // v_s)).to(tl.int32)
    for at in range(start, whole, step):
        position = at + n
        if k_copier is not None:
            k_tile = k_copier.load([k_line + at, 0])
            v_tile = v_copier.load([v_line + at, 0])
        else:
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
        seen = own[:, None] - position[None, :] < window
        top, total, acc = attend_block(
            q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, HAS_WINDOW
        )

    # What is left of the body, masked.
    body = tl.maximum(own + 1 - TAIL, 0)
    shared = body
    if HAS_TREE:
        deep = tl.minimum(tl.maximum(body - length, 0), 64)  # path nodes in the body, for a chain at most 63
        low = (tl.full(deep.shape, 1, tl.int64) << tl.minimum(deep, 63).to(tl.int64)) - 1
        straight = (deep < 64) & ((tl.load(row_words, mask=inside, other=0) & low) == low)
        shared = tl.where(straight, body, length // BLOCK_N * BLOCK_N)
    until = tl.minimum(tl.max(shared, 0), slots)
    edge = start + tl.cdiv(tl.maximum(whole - start, 0), step) * step
    for at in tl.range(edge, until, step, num_stages=1):
        position = at + n
        valid = position < until
        k_tile, v_tile = _gather(k_base, v_base, position, valid, k_s, v_s, SIZE, V_SIZE, BLOCK_D, BLOCK_DV)
        seen = (position[None, :] < shared[:, None]) & valid[None, :]
        if HAS_WINDOW:
            seen = seen & (own[:, None] - position[None, :] < window)
        top, total, acc = attend_block(q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True)
    if HAS_TREE:
        bent = inside & (straight == 0)
        turns = tl.max(bent.to(tl.int32), 0) * ((BLOCK_M + GROUP - 2) // GROUP + 1)
        # A split has at most so many of the blocks between kv_len and the end of the longest path.
        BLOCKS: tl.constexpr = (64 * WORDS + BLOCK_N - 1) // step + 1
        for turn in tl.range(0, turns * BLOCKS, num_stages=1):
            deep_row = tile * BLOCK_M // GROUP + turn // BLOCKS
            mine = tl.where(bent & (row == deep_row), body, 0)
            until = tl.max(mine, 0)
            position = first_block(split, length, BLOCK_N, SPLITS) + turn % BLOCKS * step + n
            deep_words = words + b * w_b + tl.minimum(deep_row, rows - 1).to(tl.int64) * w_t
            slot = tl.where(position < length, position, length + path_node(deep_words, position - length, WORDS))
            valid = (position < until) & (slot < slots)
            k_tile, v_tile = _gather(k_base, v_base, slot, valid, k_s, v_s, SIZE, V_SIZE, BLOCK_D, BLOCK_DV)
            seen = (position[None, :] < mine[:, None]) & valid[None, :]
            if HAS_WINDOW:
                seen = seen & (own[:, None] - position[None, :] < window)
            top, total, acc = attend_block(
                q_tile, k_tile, v_tile, seen, top, total, acc, scale, softcap, HAS_SOFTCAP, True
            )

    line = (split.to(tl.int64) * batch * KV_HEADS + pair) * height + m
    sums = stats + ((SPLITS + 1) * batch * KV_HEADS).to(tl.int64) * height
    tl.store(stats + line, top, mask=inside)
    tl.store(sums + line, total, mask=inside)
    acc = acc * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    acc = acc.to(states.dtype.element_ty)
    tl.store(states + line[:, None] * V_SIZE + dv[None, :], acc, mask=inside[:, None] & (dv[None, :] < V_SIZE))
