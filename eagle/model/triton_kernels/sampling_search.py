"""The passes of a filtered draw over one row's tokens: scores, whole-number masses, and the search for a threshold.

A row's tokens are the ids on its list where ``listed`` = count, and 0 … count - 1 where it is 0. A key is the score's
order as a whole number from 0 to 2³² - 1; a mass is exp(score - top) in units of 2⁻⁴⁴, so that 262,144 of them fit in an
int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eagle.model.triton_kernels.order import order_bits


@triton.jit
def score_at(
    logits,  # [V], one row
    ids,
    inside,
    scale,
):
    """The float32 scores of ids, -inf outside."""
    return tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32) * scale


@triton.jit
def mass_of(score, inside, top):
    """int64 masses; 0 outside."""
    share = tl.where(score == top, 1.0, tl.exp(score - top))
    return tl.where(inside, (share * 17592186044416.0).to(tl.int64), 0)  # 2⁴⁴


@triton.jit
def threshold(
    logits,  # [V], one row
    ids_list,  # [LIMIT] int32
    listed,
    count,
    need,
    top,
    scale,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key t at which the tokens with keys ≥ t have number (or, WEIGHTED, mass) ≥ need; 0 if none has."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((), 0, tl.int64)
    step = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        total = tl.zeros([BLOCK], tl.int64)
        for start in range(0, count, BLOCK):
            i = start + lane
            inside = i < count
            ids = tl.where(i < listed, tl.load(ids_list + i, mask=i < listed, other=0), i)
            score = score_at(logits, ids, inside, scale)
            key = order_bits(score).to(tl.int64) + 2147483648
            reaches = inside & (key >= found + step)
            if WEIGHTED:
                total += tl.where(reaches, mass_of(score, inside, top), 0)
            else:
                total += reaches.to(tl.int64)
        found = tl.where(tl.sum(total, 0) >= need, found + step, found)
        step = step >> 1
    return found


@triton.jit
def weigh(
    logits,  # [V], one row
    ids_list,  # [LIMIT] int32
    listed,
    count,
    lowest,
    top,
    scale,
    BLOCK: tl.constexpr,
):
    """The mass of the tokens with keys ≥ lowest, and of one token whose key it is (0 if none has it)."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    equal = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        i = start + lane
        inside = i < count
        ids = tl.where(i < listed, tl.load(ids_list + i, mask=i < listed, other=0), i)
        score = score_at(logits, ids, inside, scale)
        key = order_bits(score).to(tl.int64) + 2147483648
        mass = mass_of(score, inside, top)
        total += tl.where(key >= lowest, mass, 0)
        equal = tl.maximum(equal, tl.where(key == lowest, mass, 0))
    return tl.sum(total, 0), tl.max(equal, 0)
