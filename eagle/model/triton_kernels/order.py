"""Keys that sort as (value, then the lower id first): what top-k, argmax and the tree's ranking are built on.

A key is an int64: the value's order-preserving bits above, the complement of its id below, so that one integer maximum
finds the largest value and, among equals, the lowest id. Ids are at most 2³¹ - 2. NaN counts as the largest value, as
in torch.topk and torch.argmax; -0.0 equals 0.0.
"""

from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))
"""Below the key of any value, -inf included."""

EMPTY_HIGH = tl.constexpr(-(2**31))
"""The upper half of EMPTY, below the order bits of any value."""

NO_ID = tl.constexpr(2**31 - 1)
"""Above any id."""


@triton.jit
def order_bits(x):
    """float32 → int32 of the same order."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def id_halves(ids):
    """The int32 lower half of a key."""
    return 0x7FFFFFFF - ids


@triton.jit
def id_keys(ids):
    """The int64 lower half of a key: a key of the id alone."""
    return id_halves(ids).to(tl.int64)


@triton.jit
def make_keys(x, ids):
    """x: float32; ids: int32 of the same shape."""
    return (order_bits(x).to(tl.int64) << 32) | id_keys(ids)


@triton.jit
def key_ids(keys):
    """The int32 ids of keys."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def key_values(keys):
    """The float32 values of keys."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_keys(keys, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The K largest of distinct keys, largest first, in a [BLOCK_K] vector padded with EMPTY."""
    return best_pairs((keys >> 32).to(tl.int32), (keys & 0x7FFFFFFF).to(tl.int32), K, BLOCK_K)


@triton.jit
def best_pairs(high, low, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """`best_keys` of keys in halves, int32 both: the value's order bits, `EMPTY_HIGH` where there is none, and
    `id_halves` below.

    K times two maxima over registers: for K near 10 fewer instructions than a bitonic selection, and a loop that is
    compiled once. Of 32 bits, because a warp finds their maximum in one instruction, and that of 64 in ten shuffles.
    """
    slots = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], EMPTY, tl.int64)
    for i in range(K):
        top = tl.max(high, 0)
        lowest = tl.max(tl.where(high == top, low, -1), 0)
        key = tl.where(top == EMPTY_HIGH, EMPTY, (top.to(tl.int64) << 32) | lowest.to(tl.int64))
        best = tl.where(slots == i, key, best)
        high = tl.where(low == lowest, EMPTY_HIGH, high)  # no two keys have one id
    return best
