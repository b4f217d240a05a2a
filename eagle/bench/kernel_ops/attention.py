"""Attention's trials: decoding, trees, chains and prefill over one cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.inputs import ancestors, chain_parents, random_parents, tree_words
from eagle.bench.kernel_ops.trial import TORCH, Trial, nbytes, relative_error
from eagle.model.attention import attention as torch_attention
from eagle.model.attention import visible_slots
from eagle.model.triton_kernels.attention import attention

SPARE_SLOTS = 64
"""Slots of the cache beyond the last row: a run's cache is always longer than what it holds."""


def attention_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """q [1, T, Hq, D] over a cache [1, Hkv, S, D]. Slots that nobody may read are NaN where ``poisoned``."""
    model, form = case.model, case.op.removeprefix("attention_")
    if form == "prefill":
        rows = min(case.prefix, case.prefill_rows)
        start = case.prefix - rows
    else:
        rows, start = (1 if form == "decode" else case.tree.total_token), case.prefix
    held = start + rows
    q = torch.randn(1, rows, model.heads, model.head_size, dtype=case.dtype, device=device)
    shape = (1, model.kv_heads, held + SPARE_SLOTS, model.head_size)
    k, v = (torch.randn(shape, dtype=case.dtype, device=device) for _ in range(2))
    for cache in (k, v):
        cache[:, :, held:] = float("nan") if poisoned else 0.0
    kv_len = torch.tensor([start], dtype=torch.int64, device=device)
    parents = None
    if form in ("tree", "chain"):
        parents = chain_parents(rows) if form == "chain" else random_parents(rows, case.tree.path - 1)
    words = None if parents is None else tree_words(parents, device)
    scale = model.head_size**-0.5
    heads = model.heads * model.head_size
    keys = rows * start + (rows * (rows + 1) // 2 if parents is None else sum(map(len, ancestors(parents))))
    rivals = {TORCH: lambda: torch_attention(q, k, v, kv_len, words, scale=scale)}
    sdpa_q, sdpa_k, sdpa_v = q.transpose(1, 2), k[:, :, :held], v[:, :, :held]
    if form == "prefill":
        bias = causal_lower_right(rows, held)
        rivals["sdpa"] = lambda: F.scaled_dot_product_attention(
            sdpa_q, sdpa_k, sdpa_v, attn_mask=bias, scale=scale, enable_gqa=True
        )
    else:
        # A tree needs an explicit mask; it and the folding of the group into rows are made ahead of the timing.
        group = model.heads // model.kv_heads
        mask = visible_slots(kv_len, rows, held, words)[:, None].repeat(1, 1, group, 1) if words is not None else None
        folded = q.view(1, rows, model.kv_heads, group, -1).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(1, model.kv_heads, group * rows, -1)
        rivals["sdpa"] = lambda: F.scaled_dot_product_attention(folded, sdpa_k, sdpa_v, attn_mask=mask, scale=scale)
    return Trial(
        run=lambda: attention(q, k, v, kv_len, words, scale=scale),
        rivals=rivals,
        check=lambda out: relative_error(out, _reference(q, k, v, start, parents, scale)),
        traffic=nbytes(sdpa_k, sdpa_v) + 2 * nbytes(q),
        flops=4 * keys * heads,
        inputs=(q, k, v),
    )


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, parents: list[int] | None, scale: float
) -> torch.Tensor:
    """Softmax over the visible keys in float64, a query head at a time."""
    rows = q.shape[1]
    seen = torch.ones(rows, start + rows, dtype=torch.bool)
    if parents is None:
        seen = seen.tril(start)
    else:
        seen[:, start:] = False
        for row, path in enumerate(ancestors(parents)):
            seen[row, [start + node for node in path]] = True
    hidden = ~seen.to(q.device)
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[2] // k.shape[1]
    for head in range(q.shape[2]):
        keys, values = (cache[0, head // group, : start + rows].double() for cache in (k, v))
        scores = (q[0, :, head].double() @ keys.T * scale).masked_fill_(hidden, float("-inf"))
        out[0, :, head] = scores.softmax(-1) @ values
    return out
