"""Draw a token from each row of logits after temperature, top-k and top-p, without sorting the vocabulary.

Contract. The distribution is that of `eagle.model.verify.next_token_probs`, in either order of the filters: top-k keeps
every score equal to the k-th largest; top-p drops, from the lowest score up and among equals from the lowest id up, all
tokens whose running share stays within 1 - p. The token is the first in vocabulary order at which the running share
passes the row's uniform. Each row is drawn by itself, whatever the other rows are.

How. A first launch over (row, chunk) leaves chunk maxima and sums, and the maxima of groups of 64 tokens. Without
filters a second launch finds the chunk by a prefix sum over chunks and the token by one over that chunk, in float64.
With filters a program a row collects the tokens that may survive: those not below the k-th largest group maximum (k
tokens reach it), or those with a share above (1 - p) / V (all rarer ones together hold at most 1 - p). Both cuts are
bounds, never the answer: the exact thresholds are then found among the collected by bits of the score, 32 sums each. A
row with more than 8,192 such tokens is searched in full, several times slower.

Exactness. A token's share is a whole number of 2⁻⁴⁴ of the best token's (rarer ones count 0), so every sum is exact and
in any order; it differs from the PyTorch op by float32's rounding of exp alone. The two may disagree where the uniform,
or 1 - p, lies within about 1e-6 of a token's boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from eagle.model.ops import Sampling
from eagle.model.triton_kernels.order import NO_ID, id_keys, order_bits
from eagle.model.triton_kernels.sampling_search import mass_of, score_at, threshold, weigh

GROUP = tl.constexpr(64)
COLLECTED = 8192
"""Tokens a row may collect. A nucleus of real text has tens to a few thousand; 32 KiB a row."""


@triton.jit
def row_uniform(
    row,
    nodes,
    depths,  # [B, N] int64
    uniforms,  # [B, P] float32; read unless SEEDED
    path,
    seeds,  # [B] int64; read where SEEDED
    offsets,  # [B] int64: output position of the root's successor; read where SEEDED
    SEEDED: tl.constexpr,
):
    """The uniform of the output position that a node's token would take."""
    b = row // nodes
    depth = tl.load(depths + row)
    if SEEDED:
        return tl.rand(tl.load(seeds + b), (tl.load(offsets + b) + depth).to(tl.int32))
    return tl.load(uniforms + b * path + tl.minimum(depth, path - 1))


@triton.jit
def _or_held(
    value,
    held,  # [3] float32, see `Sampling.numbers`, or None
    place: tl.constexpr,
):
    """A setting: of the launch, or read on the device."""
    if held is not None:
        return tl.load(held + place)
    return value


@triton.jit
def _stats_kernel(
    logits,  # [R, V]
    tops,  # [R, chunks] float32, of scores
    sums,  # [R, chunks] float32, of exp(score - top)
    groups,  # [R, groups] float32: maxima of GROUP scores
    held,  # [3] float32 or None: its settings go before the arguments'
    vocab,
    chunks,
    group_count,
    stride,
    scale,  # 1 / temperature
    CHUNK: tl.constexpr,
):
    scale = _or_held(scale, held, 0)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    PER_CHUNK: tl.constexpr = CHUNK // GROUP
    group = chunk * PER_CHUNK + tl.arange(0, PER_CHUNK)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    score = score_at(logits + row * stride, ids, ids < vocab, scale)
    group_top = tl.max(score, 1)
    tl.store(groups + row * group_count + group, group_top, mask=group < group_count)
    top = tl.max(group_top, 0)
    shifted = tl.where(score == float("-inf"), float("-inf"), score - top)
    tl.store(tops + row * chunks + chunk, top)
    tl.store(sums + row * chunks + chunk, tl.sum(tl.sum(tl.exp(shifted), 1), 0))


@triton.jit
def _draw_kernel(
    logits,  # [R, V]
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32
    depths,
    uniforms,
    seeds,
    offsets,
    keys,  # [R] int64: the chosen ids, as keys
    held,  # [3] float32 or None
    vocab,
    chunks,
    stride,
    scale,
    nodes,
    path,
    SEEDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """No filters: the chunk by its share, then the token within it."""
    scale = _or_held(scale, held, 0)
    row = tl.program_id(0).to(tl.int64)
    uniform = row_uniform(row, nodes, depths, uniforms, path, seeds, offsets, SEEDED)
    c = tl.arange(0, BLOCK_C)
    chunk_top = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    chunk_sum = tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0)
    top = tl.max(chunk_top, 0)
    shifted = tl.where(chunk_top == float("-inf"), float("-inf"), chunk_top - top)
    share = chunk_sum.to(tl.float64) * tl.exp(shifted).to(tl.float64)
    passed = tl.cumsum(share, 0)
    level = uniform.to(tl.float64) * tl.max(passed, 0)
    chunk = tl.minimum(tl.sum((passed <= level).to(tl.int32), 0), chunks - 1)
    level -= tl.sum(tl.where(c < chunk, share, 0.0), 0)

    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    score = score_at(logits + row * stride, ids, inside, scale)
    share = tl.exp(tl.where(score == float("-inf"), float("-inf"), score - top)).to(tl.float64)
    likely = inside & (share > 0.0)
    found = tl.min(tl.where(likely & (tl.cumsum(share, 0) > level), ids, NO_ID), 0)
    last = tl.max(tl.where(likely, ids, 0), 0)  # where the two sums of this chunk round apart
    tl.store(keys + row, id_keys(tl.minimum(found, last)))


@triton.jit
def _draw_filtered_kernel(
    logits,  # [R, V]
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32
    groups,  # [R, groups] float32
    collected,  # [R, LIMIT] int32, workspace
    depths,
    uniforms,
    seeds,
    offsets,
    keys,  # [R] int64: the chosen ids, as keys
    held,  # [3] float32 or None
    vocab,
    chunks,
    group_count,
    stride,
    scale,
    nodes,
    path,
    drop_share,  # 1 - top_p
    top_k,
    SEEDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TOP_K_FIRST: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = _or_held(scale, held, 0)
    drop_share = _or_held(drop_share, held, 1)
    if held is not None:
        top_k = tl.load(held + 2).to(tl.int32)
    row = tl.program_id(0).to(tl.int64)
    uniform = row_uniform(row, nodes, depths, uniforms, path, seeds, offsets, SEEDED)
    logits += row * stride
    collected += row * LIMIT
    c = tl.arange(0, BLOCK_C)
    chunk_top = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    chunk_sum = tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0)
    top = tl.max(chunk_top, 0)

    lowest_key = tl.full((), 0, tl.int64)
    lowest_mass = tl.full((), 0, tl.int64)
    if TOP_K:
        if top_k <= group_count:
            row_groups = groups + row * group_count
            lowest_key = threshold(row_groups, collected, 0, group_count, top_k, top, 1.0, False, BLOCK)
    else:
        shifted = tl.where(chunk_top == float("-inf"), float("-inf"), chunk_top - top)
        total = tl.sum(chunk_sum * tl.exp(shifted), 0)
        lowest_mass = (total * drop_share / vocab * (0.999 * 17592186044416.0)).to(tl.int64)  # a bound, so rounded down

    lane = tl.arange(0, BLOCK)
    masses = tl.zeros([BLOCK], tl.int64)
    count = 0
    for start in range(0, vocab, BLOCK):
        ids = start + lane
        inside = ids < vocab
        score = score_at(logits, ids, inside, scale)
        mass = mass_of(score, inside, top)
        masses += mass
        key = order_bits(score).to(tl.int64) + 2147483648
        keep = inside & (key >= lowest_key) & (mass >= lowest_mass)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(collected + place, ids, mask=keep & (place < LIMIT))
        count += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it
    listed = tl.where(count <= LIMIT, count, 0)
    count = tl.where(count <= LIMIT, count, vocab)

    # the lowest kept key, and how many of the tokens that hold it are dropped, the lowest ids first
    lowest = tl.full((), 0, tl.int64)
    if TOP_K:
        lowest = threshold(logits, collected, listed, count, top_k, top, scale, False, BLOCK)
    dropped = tl.full((), 0, tl.int64)
    if TOP_P:
        if TOP_K and TOP_K_FIRST:
            population, _tie = weigh(logits, collected, listed, count, lowest, top, scale, BLOCK)
        else:
            population = tl.sum(masses, 0)
        spare = (population.to(tl.float64) * drop_share).to(tl.int64)
        cut = threshold(logits, collected, listed, count, population - spare, top, scale, True, BLOCK)
        by_share = cut >= lowest
        lowest = tl.maximum(cut, lowest)
        above, tie = weigh(logits, collected, listed, count, lowest, top, scale, BLOCK)
        left = spare - (population - above)
        dropped = tl.where(by_share & (left > 0), left // tl.maximum(tie, 1), 0)
        total_mass = above - dropped * tie
    else:
        total_mass, _tie = weigh(logits, collected, listed, count, lowest, top, scale, BLOCK)

    level = tl.minimum((uniform.to(tl.float64) * total_mass.to(tl.float64)).to(tl.int64), total_mass - 1)
    passed = tl.full((), 0, tl.int64)
    ties = tl.full((), 0, tl.int64)
    found = tl.full((), 2147483647, tl.int32)
    for start in range(0, count, BLOCK):
        i = start + lane
        inside = i < count
        ids = tl.where(i < listed, tl.load(collected + i, mask=i < listed, other=0), i)
        score = score_at(logits, ids, inside, scale)
        key = order_bits(score).to(tl.int64) + 2147483648
        tie_here = (inside & (key == lowest)).to(tl.int64)
        keep = inside & ((key > lowest) | ((key == lowest) & (ties + tl.cumsum(tie_here, 0) > dropped)))
        mass = tl.where(keep, mass_of(score, inside, top), 0)
        hit = keep & (passed + tl.cumsum(mass, 0) > level)
        found = tl.minimum(found, tl.min(tl.where(hit, ids, NO_ID), 0))
        passed += tl.sum(mass, 0)
        ties += tl.sum(tie_here, 0)
    tl.store(keys + row, id_keys(tl.minimum(found, vocab - 1)))


@triton.jit
def _uniforms_kernel(
    seeds,  # [B] int64
    offsets,  # [B] int64
    out,  # [B, count] float32
    count,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    uniform = tl.rand(tl.load(seeds + b), (tl.load(offsets + b) + i).to(tl.int32))
    tl.store(out + b * count + i, uniform, mask=i < count)


@dataclass(frozen=True)
class DrawConfig:
    """Launch configuration. ``chunk``: tokens of one program of the first launch; ``block``: of one pass of a draw."""

    chunk: int
    stats_warps: int
    block: int
    draw_warps: int


def draw_config(vocab: int) -> DrawConfig:
    """By the vocabulary alone, so that a row is always reduced in one order."""
    chunk = min(4096, max(64, triton.next_power_of_2(vocab)))
    # a filtered draw is one program on one SM: 16 warps to keep its loads in flight, 4 tokens a thread because keys
    # and masses take two registers each
    return DrawConfig(chunk, 8 if chunk >= 2048 else 4, min(2048, chunk), 16 if chunk >= 2048 else 4)


def draw_keys(
    logits: torch.Tensor,
    depths: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor | None,
    seeds: torch.Tensor | None,
    offsets: torch.Tensor | None,
    config: DrawConfig | None = None,
) -> torch.Tensor:
    """The token drawn at each node, as a key of `order`. Arguments as `posterior` has checked them.

    logits: [B, N, V] with rows at one stride; depths: [B, N] int64; uniforms: [B, P] float32, or seeds and offsets:
    [B] int64. Returns [B, N, 1] int64.
    """
    batch, nodes, vocab = logits.shape
    rows, stride = batch * nodes, logits.stride(1)
    config = config or draw_config(vocab)
    chunks, groups = triton.cdiv(vocab, config.chunk), triton.cdiv(vocab, GROUP.value)
    keys = depths.new_empty((batch, nodes, 1))
    tops, sums = logits.new_empty((2, rows, chunks), dtype=torch.float32)
    maxima = logits.new_empty((rows, groups), dtype=torch.float32)
    seeded = seeds is not None
    scale, drop_share, rank = sampling.numbers
    path = 1 if uniforms is None else uniforms.shape[1]
    top_k, top_p = sampling.cuts_rank(vocab), sampling.cuts_share
    chance = (
        depths,
        tops if uniforms is None else uniforms,
        depths if seeds is None else seeds,
        depths if offsets is None else offsets,
    )
    # scores are rounded once, in every kernel alike: a fused multiply-add would give one token two masses
    exact = {"enable_fp_fusion": False}
    with torch.cuda.device_of(logits):
        _stats_kernel[(rows, chunks)](
            logits,
            tops,
            sums,
            maxima,
            sampling.held,
            vocab,
            chunks,
            groups,
            stride,
            scale,
            CHUNK=config.chunk,
            num_warps=config.stats_warps,
            **exact,
        )
        if not (top_k or top_p):
            _draw_kernel[(rows,)](
                logits,
                tops,
                sums,
                *chance,
                keys,
                sampling.held,
                vocab,
                chunks,
                stride,
                scale,
                nodes,
                path,
                SEEDED=seeded,
                CHUNK=config.chunk,
                BLOCK_C=triton.next_power_of_2(chunks),
                num_warps=config.stats_warps,
                **exact,
            )
            return keys
        _draw_filtered_kernel[(rows,)](
            logits,
            tops,
            sums,
            maxima,
            depths.new_empty((rows, COLLECTED), dtype=torch.int32),
            *chance,
            keys,
            sampling.held,
            vocab,
            chunks,
            groups,
            stride,
            scale,
            nodes,
            path,
            drop_share,
            int(rank),
            SEEDED=seeded,
            TOP_K=top_k,
            TOP_P=top_p,
            TOP_K_FIRST=sampling.top_k_first,
            LIMIT=COLLECTED,
            BLOCK_C=triton.next_power_of_2(chunks),
            BLOCK=config.block,
            num_warps=config.draw_warps,
            **exact,
        )
    return keys


def philox_uniforms(seeds: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
    """The uniforms of ``count`` output positions from ``offsets`` on: those a seeded draw takes there.

    seeds, offsets: [B] int64; returns [B, count] float32 in [0, 1).
    """
    out = seeds.new_empty((seeds.shape[0], count), dtype=torch.float32)
    block = 256
    if out.numel():
        with torch.cuda.device_of(seeds):
            _uniforms_kernel[(seeds.shape[0], triton.cdiv(count, block))](seeds, offsets, out, count, BLOCK=block)
    return out
