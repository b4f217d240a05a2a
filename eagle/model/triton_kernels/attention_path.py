"""The rest of decoding attention: each row over its last TAIL keys, then all of the row's states into its output.

One program per (sequence, kv head, row, 16 heads of the group), small enough that each SM holds several. The keys are
gathered in path order. The tail's state goes through memory, to be read back in the layout in which the states are
merged. All before that needs nothing of the prefix kernel, and under programmatic dependent launch (PDL) runs beside
it up to the wait: the prefix kernel lets it start only when everything before the prefix kernel has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eagle.model.triton_kernels.attention_block import count_nodes, first_block, first_position, path_node
from eagle.model.triton_kernels.precision import FLOAT32_DOTS


@triton.jit
def _held(part, h, begin, body, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Which heads [H] have a state from a split: those of the group, where the row's body has a block in it."""
    return h < tl.where(first_block(part, begin, BLOCK_N, SPLITS) < body, GROUP, 0)


@triton.jit
def _add(mass, mixed, anchor, states, stats, sums, line, held, dv, V_SIZE: tl.constexpr):
    """Mix in the states at some lines. mass, anchor, line, held: [H]; mixed: [H, Dv]; dv: [Dv]."""
    share = tl.exp2(tl.load(stats + line, mask=held, other=float("-inf")) - anchor)
    share = share * tl.load(sums + line, mask=held, other=0.0)
    at = states + line[:, None] * V_SIZE + dv[None, :]
    state = tl.load(at, mask=held[:, None] & (dv[None, :] < V_SIZE), other=0.0).to(tl.float32)
    return mass + share, tl.fma(state, tl.broadcast_to(share[:, None], mixed.shape), mixed)


@triton.jit(do_not_specialize=["rows", "batch", "slots", "window", "q_b", "q_t", "q_h", "w_b", "w_t"])
def path_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, Dv]
    kv_len,  # [B] int64
    words,  # [B, T, W] int64, unused without HAS_TREE
    states,  # [SPLITS + 1, B, Hkv, T * GROUP, Dv] float32 or q's dtype; the last split is the tail, written here
    stats,  # [2, SPLITS + 1, B, Hkv, T * GROUP] float32
    out,  # [B, T, Hq, Dv] contiguous
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
    HEADS: tl.constexpr,
    MERGE_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    program = tl.program_id(0)
    first_head = program % TILES * HEADS
    h = first_head + tl.arange(0, HEADS)
    row = program // TILES % rows
    pair = program // TILES // rows
    b = (pair // KV_HEADS).to(tl.int64)
    head = (pair % KV_HEADS).to(tl.int64)
    inside = h < GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, TAIL)

    length = tl.minimum(tl.load(kv_len + b), slots).to(tl.int32)
    row_words = words + b * w_b + row.to(tl.int64) * w_t
    if HAS_TREE:
        count = tl.sum(count_nodes(row_words + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1), WORDS), 0)
    else:
        count = row + 1
    end = length + count
    body = tl.maximum(end - TAIL, 0)
    position = body + n
    slot = position
    if HAS_TREE:
        slot = tl.where(position < length, position, length + path_node(row_words, position - length, WORDS))
    valid = (position < end) & (slot < slots)
    slot = slot.to(tl.int64)
    k_at = k + b * k_b + head * k_h + slot[:, None] * k_s + d[None, :]
    v_at = v + b * v_b + head * v_h + slot[:, None] * v_s + dv[None, :]
    k_tile = tl.load(k_at, mask=valid[:, None] & (d[None, :] < SIZE), other=0.0)
    v_tile = tl.load(v_at, mask=valid[:, None] & (dv[None, :] < V_SIZE), other=0.0)
    q_at = q + b * q_b + row.to(tl.int64) * q_t + (head * GROUP + h)[:, None] * q_h + d[None, :]
    q_tile = tl.load(q_at, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0)

    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=FLOAT32_DOTS) * scale  # [HEADS, TAIL]
    if HAS_SOFTCAP:
        scores = (1.0 - 2.0 / (tl.exp(scores) + 1.0)) * softcap
    seen = valid[None, :]
    if HAS_WINDOW:
        seen = seen & (end - 1 - position[None, :] < window)
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=FLOAT32_DOTS)  # [HEADS, Dv]
    acc = acc * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]

    stride = (batch * KV_HEADS).to(tl.int64) * rows * GROUP  # from split to split, in lines
    sums = stats + (SPLITS + 1) * stride
    line = (pair.to(tl.int64) * rows + row) * GROUP + h
    tail_line = SPLITS * stride + line
    tail_at = states + tail_line[:, None] * V_SIZE + dv[None, :]
    tl.store(stats + tail_line, top, mask=inside)
    tl.store(sums + tail_line, total, mask=inside)
    tl.store(tail_at, acc.to(states.dtype.element_ty), mask=inside[:, None] & (dv[None, :] < V_SIZE))
    tl.debug_barrier()  # other threads of this program read it

    h = first_head + tl.arange(0, MERGE_HEADS)
    inside = h < GROUP
    line = (pair.to(tl.int64) * rows + row) * GROUP + h
    line_mask = inside[:, None] & (dv[None, :] < V_SIZE)
    begin = first_position(length, window, HAS_WINDOW)
    body = tl.minimum(body, slots)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # The compiler's time grows with the cube of how many splits are unrolled: 32 at once took it 5 s, 16 take 1 s.
    CHUNK: tl.constexpr = min(SPLITS, 16)
    best = tl.load(stats + SPLITS * stride + line, mask=inside, other=0.0)
    for first in tl.range(0, SPLITS, CHUNK):
        for i in tl.static_range(CHUNK):
            held = _held(first + i, h, begin, body, GROUP, BLOCK_N, SPLITS)
            best = tl.maximum(best, tl.load(stats + (first + i) * stride + line, mask=held, other=float("-inf")))
    anchor = tl.where(best == float("-inf"), 0.0, best)
    mass = tl.zeros([MERGE_HEADS], tl.float32)
    mixed = tl.zeros([MERGE_HEADS, BLOCK_DV], tl.float32)
    for first in tl.range(0, SPLITS, CHUNK):
        for i in tl.static_range(CHUNK):
            held = _held(first + i, h, begin, body, GROUP, BLOCK_N, SPLITS)
            part_line = (first + i) * stride + line
            mass, mixed = _add(mass, mixed, anchor, states, stats, sums, part_line, held, dv, V_SIZE)
    mass, mixed = _add(mass, mixed, anchor, states, stats, sums, SPLITS * stride + line, inside, dv, V_SIZE)
    mixed = mixed * (1.0 / tl.where(mass > 0.0, mass, 1.0))[:, None]
    out_at = out + ((b * rows + row) * KV_HEADS * GROUP + head * GROUP + h)[:, None] * V_SIZE + dv[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=line_mask)
