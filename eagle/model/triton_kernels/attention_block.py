"""What the attention kernels share: one block of online softmax, the split boundaries, a row's path in the tree.

Every route to an output row calls `attend_block` for the same blocks of logical positions in the same order, so it is
the one place that fixes the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_block(q, k, v, seen, top, total, acc, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Fold one block of keys into the running softmax (FlashAttention-2, alg. 1, in base 2).

    q: [M, D]; k: [N, D]; v: [N, Dv]; seen: broadcasts to [M, N]; top, total: [M]; acc: [M, Dv] float32, not yet divided
    by total. scale: the score's factor times log2(e), or with a soft-cap twice the factor over the cap; softcap: the
    cap times log2(e). A block of which a row sees nothing leaves the row's state as it was.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:
        scores = (1.0 - 2.0 / (tl.exp(scores * scale) + 1.0)) * softcap  # tanh(x) = 1 - 2 / (exp(2x) + 1)
    else:
        scores = scores * scale
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - anchor[:, None])
    fade = tl.exp2(top - anchor)
    # An explicit fma leaves the compiler no choice of what to contract, so every kernel rounds alike.
    total = tl.fma(total, fade, tl.sum(weights, 1))
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def split_start(split, UNIT: tl.constexpr):
    """The first position of a split; the inverse of `split_of`. Boundaries: `attention_config.count_splits`."""
    middle = tl.minimum(tl.maximum(split - 4, 0), 6)
    far = tl.minimum(tl.maximum(split - 10, 0), 12)
    return UNIT * (tl.minimum(split, 4) + 2 * middle + 4 * far + 16 * tl.maximum(split - 22, 0))


@triton.jit
def split_of(position, UNIT: tl.constexpr):
    """The split a position lies in."""
    unit = position // UNIT
    middle = tl.minimum(tl.maximum(unit - 4, 0) // 2, 6)
    far = tl.minimum(tl.maximum(unit - 16, 0) // 4, 12)
    return tl.minimum(unit, 4) + middle + far + tl.maximum(unit - 64, 0) // 16


@triton.jit
def count_bits(words, inside, WORDS: tl.constexpr):
    """How many nodes each row sees. words: [M] pointers to a row's first word; inside: [M], rows to read."""
    bit = tl.arange(0, 64)
    count = tl.zeros(words.shape, tl.int32)
    for w in range(WORDS):
        word = tl.load(words + w, mask=inside, other=0)
        count += tl.sum(((word[:, None] >> bit[None, :]) & 1).to(tl.int32), 1)
    return count


@triton.jit
def path_node(words, rank, WORDS: tl.constexpr):
    """The node of each rank in one row's path: the rank-th set bit (ancestors have increasing numbers).

    words: pointer to the row's words; rank: [N]. Ranks beyond the path give 0.
    """
    bit = tl.arange(0, 64)
    node = tl.zeros(rank.shape, tl.int32)
    passed = 0
    for w in range(WORDS):
        bits = ((tl.load(words + w) >> bit) & 1).to(tl.int32)
        own_rank = passed + tl.cumsum(bits, 0) - bits
        hit = (own_rank[None, :] == rank[:, None]) & (bits[None, :] != 0)
        node += tl.sum(tl.where(hit, (w * 64 + bit)[None, :], 0), 1)
        passed += tl.sum(bits, 0)
    return node
