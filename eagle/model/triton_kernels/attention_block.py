"""What the attention kernels share: one block of online softmax, where a row's body ends, a row's path in the tree."""

from __future__ import annotations

import triton
import triton.language as tl

from eagle.model.triton_kernels.precision import FLOAT32_DOTS


@triton.jit
def attend_block(q, k, v, seen, top, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Fold one block of keys into the running softmax (FlashAttention-2, alg. 1, in base 2).

    q: [M, D]; k: [N, D]; v: [N, Dv]; seen: broadcasts to [M, N], looked at only if MASKED; top, total: [M]; acc:
    [M, Dv] float32, not yet divided by total. scale > 0: the score's factor times log2(e), or with a soft-cap twice the
    factor over the cap; softcap: the cap times log2(e). A block of which a row sees nothing leaves the row's state as
    it was; a block that a row sees whole gives the same bits masked and unmasked.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=FLOAT32_DOTS)
    if HAS_SOFTCAP:
        scores = (1.0 - 2.0 / (tl.exp(scores * scale) + 1.0)) * softcap  # tanh(x) = 1 - 2 / (exp(2x) + 1)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    # Explicit fmas leave the compiler no choice of what to contract, so every copy of this code rounds alike.
    if HAS_SOFTCAP:
        new_top = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - anchor[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        factor = tl.full(scores.shape, scale, tl.float32)
        weights = tl.exp2(tl.fma(scores, factor, tl.broadcast_to(-anchor[:, None], scores.shape)))
    fade = tl.exp2(top - anchor)
    total = tl.fma(total, fade, tl.sum(weights, 1))
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=FLOAT32_DOTS)
    return new_top, total, acc


@triton.jit
def first_block(split, begin, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """The first position, a block's start, that a split takes at or after ``begin``: block j belongs to split j mod
    SPLITS, a power of two."""
    block = begin // BLOCK_N
    return (block + ((split - block) & (SPLITS - 1))) * BLOCK_N


@triton.jit
def first_position(length, window, HAS_WINDOW: tl.constexpr):
    """The position from which any row of the sequence sees keys; rows sit at ``length`` or later."""
    if HAS_WINDOW:
        return tl.maximum(length - window + 1, 0)
    return length * 0


@triton.jit
def count_bits(x):
    """How many bits are set in each uint64 (sums of pairs, nibbles and bytes, then of all bytes by a product)."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def count_nodes(words, inside, WORDS: tl.constexpr):
    """How many nodes each row sees. words: [M] pointers to a row's first word; inside: [M], rows to read."""
    count = tl.zeros(words.shape, tl.int32)
    for w in range(WORDS):
        count += count_bits(tl.load(words + w, mask=inside, other=0).to(tl.uint64, bitcast=True))
    return count


@triton.jit
def path_node(words, rank, WORDS: tl.constexpr):
    """The node of each rank in one row's path: the rank-th set bit (ancestors have increasing numbers).

    words: pointer to the row's words; rank: [N]. Ranks beyond the path give 0.
    """
    bit = tl.arange(0, 64)
    below = (tl.full([64], 1, tl.uint64) << bit.to(tl.uint64)) - 1
    node = tl.zeros(rank.shape, tl.int32)
    passed = 0
    for w in range(WORDS):
        word = tl.load(words + w + tl.zeros([64], tl.int32)).to(tl.uint64, bitcast=True)
        own_rank = tl.where((word & (below + 1)) != 0, passed + count_bits(word & below), -(1 << 30))
        node += tl.sum(tl.where(own_rank[None, :] == rank[:, None], (w * 64 + bit)[None, :], 0), 1)
        passed += tl.sum((own_rank != -(1 << 30)).to(tl.int32), 0)
    return node
