"""Log-probabilities and ids of the k best logits of each row, in one pass over the logits.

Contract. logits are [R, V] float16, bfloat16 or float32 with a contiguous last dimension, V ≤ 2³¹ - 2 (made for up to
262,144), k ≤ 64. Largest first; of equal logits the lower id comes first. A logit of -inf has log-probability -inf, also
in a row of nothing else; the ids are in range whatever the row holds.

Two launches: programs over (row, chunk of the vocabulary) leave each chunk's k best keys, maximum and sum of
exponentials; one program a row finds the k chunks whose best keys are the largest, and the k best of these chunks' keys:
k keys are larger than any of another chunk. Chunks depend on V alone, so a row's result depends on no other row. Nothing
is read on the host and every size comes from the arguments' shapes: safe under CUDA-graph capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.order import (
    EMPTY,
    EMPTY_HIGH,
    best_keys,
    best_pairs,
    id_halves,
    key_ids,
    key_values,
    order_bits,
)
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import as_rows, check_float

MAX_K = 64


@triton.jit
def _chunk_kernel(
    logits,  # [R, V]
    keys,  # [R, chunks, K] int64, largest first
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32, of exp(logit - top)
    vocab,
    chunks,
    stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.load(logits + row * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    place = row * chunks + chunk
    top = tl.max(x, 0)
    shifted = tl.where(x == float("-inf"), float("-inf"), x - top)  # never -inf - -inf
    tl.store(tops + place, top)
    tl.store(sums + place, tl.sum(tl.exp(shifted), 0))
    best = best_pairs(tl.where(inside, order_bits(x), EMPTY_HIGH), id_halves(ids), K, BLOCK_K)
    slots = tl.arange(0, BLOCK_K)
    tl.store(keys + place * K + slots, best, mask=slots < K)


@triton.jit
def _merge_kernel(
    keys,  # [R, chunks, K] int64
    tops,  # [R, chunks] float32
    sums,  # [R, chunks] float32
    values,  # [R, K] float32
    ids,  # [R, K] int64
    chunks,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    keys += row * chunks * K
    leading = tl.load(keys + c * K, mask=c < chunks, other=EMPTY)
    chunk_top = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    chunk_sum = tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0)
    slots = tl.arange(0, BLOCK_K)
    chosen = key_ids(best_keys(leading, CHOSEN, BLOCK_K)) // CHUNK
    held = (slots < CHOSEN)[:, None] & (slots < K)[None, :]
    theirs = tl.load(keys + chosen[:, None] * K + slots[None, :], mask=held, other=EMPTY)
    top = tl.max(chunk_top, 0)
    shifted = tl.where(chunk_top == float("-inf"), float("-inf"), chunk_top - top)
    log_sum = top + tl.log(tl.sum(chunk_sum * tl.exp(shifted), 0))
    best = best_keys(tl.reshape(theirs, [BLOCK_K * BLOCK_K]), K, BLOCK_K)
    value = key_values(best)
    value = tl.where(value == float("-inf"), value, value - log_sum)
    tl.store(values + row * K + slots, value, mask=slots < K)
    tl.store(ids + row * K + slots, key_ids(best).to(tl.int64), mask=slots < K)


@dataclass(frozen=True)
class TopKConfig:
    """Launch configuration. ``chunk``: vocabulary a program holds in registers."""

    chunk: int
    num_warps: int
    merge_warps: int


def topk_config(vocab: int, k: int) -> TopKConfig:
    """By the vocabulary and k alone, so that a row is always reduced in one order."""
    # The k maxima come one after the other, so a program should hold few logits: 512, by one warp, which needs no
    # barrier, were the fastest or within 3 % of it for ten rows of 16,384 to 128,256 logits (H100).
    chunk = min(512, max(64, triton.next_power_of_2(vocab)))
    return TopKConfig(chunk, 1, 1 if k <= 16 else 4)


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
    chunks, block_k = triton.cdiv(vocab, config.chunk), triton.next_power_of_2(k)
    values = x.new_empty((rows, k), dtype=torch.float32)
    ids = x.new_empty((rows, k), dtype=torch.int64)
    keys = x.new_empty((rows, chunks, k), dtype=torch.int64)
    tops, sums = x.new_empty((2, rows, chunks), dtype=torch.float32)
    if rows == 0:
        return values, ids
    pdl = overlaps(x)
    with torch.cuda.device_of(x):
        _chunk_kernel[(rows, chunks)](
            x,
            keys,
            tops,
            sums,
            vocab,
            chunks,
            x.stride(0),
            K=k,
            BLOCK_K=block_k,
            CHUNK=config.chunk,
            num_warps=config.num_warps,
            PDL=pdl,
            launch_pdl=pdl,
        )
        _merge_kernel[(rows,)](
            keys,
            tops,
            sums,
            values,
            ids,
            chunks,
            K=k,
            CHOSEN=min(k, chunks),
            BLOCK_K=block_k,
            BLOCK_C=triton.next_power_of_2(chunks),
            CHUNK=config.chunk,
            num_warps=config.merge_warps,
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
