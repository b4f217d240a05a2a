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

NO_ID = tl.constexpr(2**31 - 1)
"""Above any id."""


@triton.jit
def order_bits(x):
    """float32 → int32 of the same order."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def id_keys(ids):
    """The int64 lower half of a key: a key of the id alone."""
    return (0x7FFFFFFF - ids).to(tl.int64)


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
    """The K largest of distinct keys, largest first, in a [BLOCK_K] vector padded with EMPTY.

    K maxima over registers: for K near 10 fewer instructions than a bitonic selection, no shuffle of whole tiles, and
    a loop that is compiled once.
    """
    slots = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], EMPTY, tl.int64)
    for i in range(K):
        top = tl.max(keys, 0)
        best = tl.where(slots == i, top, best)
        keys = tl.where(keys == top, EMPTY, keys)
    return best
