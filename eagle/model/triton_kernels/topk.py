"""Log-probabilities and ids of the k best logits of each row. The logits are read once, and a few groups of them again.

Contract. logits are [R, V] float16, bfloat16 or float32 with a contiguous last dimension, V ≤ 2³¹ - 2 (made for up to
262,144), k ≤ 64. Largest first; of equal logits the lower id comes first. A logit of -inf has log-probability -inf, also
in a row of nothing else; the ids are in range whatever the row holds.

Two launches. Programs over (row, chunk of the vocabulary) leave the maximum of each group of neighbouring logits, and the
chunk's maximum and sum of exponentials. One program a row then finds the k groups with the largest maxima, and the k best
logits in these: any other group has k larger logits elsewhere. Groups and chunks depend on V and k alone, so a row's
result depends on no other row. Nothing is read on the host and every size comes from the arguments' shapes: safe under
CUDA-graph capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.order import EMPTY_HIGH, best_pairs, id_halves, key_ids, key_values, order_bits
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import as_rows, check_float

MAX_K = 64


@triton.jit
def _group_kernel(
    logits,  # [R, V]
    groups,  # [R, groups] int32: order bits of each group's maximum
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32, of exp(logit - top)
    vocab,
    chunks,
    group_count,
    stride,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = ids < vocab
    x = tl.load(logits + row * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    best = tl.max(tl.where(inside, order_bits(x), EMPTY_HIGH), 1)
    tl.store(groups + row * group_count + group, best, mask=group < group_count)
    top = tl.max(tl.max(x, 1), 0)
    shifted = tl.where(x == float("-inf"), float("-inf"), x - top)  # never -inf - -inf
    tl.store(tops + row * chunks + chunk, top)
    tl.store(sums + row * chunks + chunk, tl.sum(tl.sum(tl.exp(shifted), 1), 0))


@triton.jit
def _select_kernel(
    logits,  # [R, V]
    groups,  # [R, groups] int32
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32
    values,  # [R, K] float32
    ids,  # [R, K] int64
    vocab,
    chunks,
    group_count,
    stride,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    high = tl.load(groups + row * group_count + g, mask=g < group_count, other=EMPTY_HIGH)
    c = tl.arange(0, BLOCK_C)
    chunk_top = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    chunk_sum = tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0)

    slots = tl.arange(0, BLOCK_K)
    chosen = tl.where(slots < CHOSEN, key_ids(best_pairs(high, id_halves(g), CHOSEN, BLOCK_K)), 0)
    candidates = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slots < CHOSEN)[:, None] & (candidates < vocab)
    x = tl.load(logits + row * stride + candidates, mask=inside, other=0.0).to(tl.float32)

    top = tl.max(chunk_top, 0)
    shifted = tl.where(chunk_top == float("-inf"), float("-inf"), chunk_top - top)
    log_sum = top + tl.log(tl.sum(chunk_sum * tl.exp(shifted), 0))
    high = tl.reshape(tl.where(inside, order_bits(x), EMPTY_HIGH), [BLOCK_K * GROUP])
    best = best_pairs(high, tl.reshape(id_halves(candidates), [BLOCK_K * GROUP]), K, BLOCK_K)
    value = key_values(best)
    value = tl.where(value == float("-inf"), value, value - log_sum)
    tl.store(values + row * K + slots, value, mask=slots < K)
    tl.store(ids + row * K + slots, key_ids(best).to(tl.int64), mask=slots < K)


@dataclass(frozen=True)
class TopKConfig:
    """Launch configuration. ``group``: neighbouring logits with one maximum; ``chunk``: logits of one program of the first
    launch, whole groups."""

    group: int
    chunk: int
    num_warps: int
    select_warps: int


def topk_config(vocab: int, k: int) -> TopKConfig:
    """By the vocabulary and k alone, so that a row is always reduced in one order.

    Of 6 to 18 configurations each, for ten rows in bfloat16 and k = 10, these were the fastest or within 5 % of it (one
    H200, microseconds): 5.1 for 16,384 logits, 6.8 for 32,000, 7.9 for 49,152, 10.4 for 128,256, 11.6 for 262,144.
    """
    block_k, group = triton.next_power_of_2(k), 16
    while triton.cdiv(vocab, group) > block_k * group:  # the k maxima come one after the other: few groups, few logits
        group *= 2
    chunk = 512
    while chunk < 4096 and 64 * chunk <= vocab:
        chunk *= 2
    chunk = max(group, min(chunk, triton.next_power_of_2(vocab)))
    lanes = max(block_k * group, triton.next_power_of_2(triton.cdiv(vocab, group)))
    # one warp's maxima need no barrier: 6.8 for 32,000 logits, 7.7 by two, 7.8 by four
    return TopKConfig(group, chunk, max(1, chunk // 512), 1 if lanes <= 1024 else 4 if lanes <= 2048 else 8)


def topk_log_softmax(
    logits: torch.Tensor, k: int, *, config: TopKConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row, largest first, and their ids.

    logits: [R, V]; returns values [R, k] float32 and ids [R, k] int64. Raises ValueError for a dtype, device, stride
    or size outside the module's contract.
    """
    check_float(logits, "logits")
    if logits.dim() != 2:
        raise ValueError(f"logits is {tuple(logits.shape)}; expected [R, V]")
    x = as_rows(logits, "logits")
    rows, vocab = x.shape
    if not 1 <= k <= min(MAX_K, vocab):
        raise ValueError(f"k is {k} for logits {tuple(logits.shape)}; expected 1 to {min(MAX_K, vocab)}")
    config = config or topk_config(vocab, k)
    chunks, groups = triton.cdiv(vocab, config.chunk), triton.cdiv(vocab, config.group)
    values = x.new_empty((rows, k), dtype=torch.float32)
    ids = x.new_empty((rows, k), dtype=torch.int64)
    maxima = x.new_empty((rows, groups), dtype=torch.int32)
    tops, sums = x.new_empty((2, rows, chunks), dtype=torch.float32)
    if rows == 0:
        return values, ids
    pdl = overlaps(x)
    with torch.cuda.device_of(x):
        _group_kernel[(rows, chunks)](
            x,
            maxima,
            tops,
            sums,
            vocab,
            chunks,
            groups,
            x.stride(0),
            GROUP=config.group,
            CHUNK=config.chunk,
            num_warps=config.num_warps,
            PDL=pdl,
            launch_pdl=pdl,
        )
        _select_kernel[(rows,)](
            x,
            maxima,
            tops,
            sums,
            values,
            ids,
            vocab,
            chunks,
            groups,
            x.stride(0),
            K=k,
            CHOSEN=min(k, groups),
            GROUP=config.group,
            BLOCK_K=triton.next_power_of_2(k),
            BLOCK_C=triton.next_power_of_2(chunks),
            BLOCK_G=triton.next_power_of_2(groups),
            num_warps=config.select_warps,
            PDL=pdl,
            launch_pdl=pdl,
        )
    return values, ids


@torch.library.custom_op("eagle::topk_log_softmax", mutates_args=())
def topk_log_softmax_op(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk_log_softmax` as a registered operator."""
    return topk_log_softmax(logits, k)


@topk_log_softmax_op.register_fake
def _(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)
