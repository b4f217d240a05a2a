"""Attention over the KV cache, causal or by tree, in plain PyTorch.

Who sees what: every row sees the cache slots below ``kv_len`` (the committed prefix). Without a tree, row t sits in
slot ``kv_len + t`` and sees all slots up to its own. With a tree, node n's keys lie in slot ``kv_len + n`` and row t
also sees the nodes whose bit is set in ``tree_words[:, t]``; the row itself must be among them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eagle.model.ops import WORD_BITS


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    tree_words: torch.Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Grouped-query attention of new rows over the cache that already holds their keys.

    q: [B, T, Hq, D]; k_cache: [B, Hkv, S, D]; v_cache: [B, Hkv, S, Dv]; kv_len: [B]; tree_words: [B, T, W] or None.
    window: a row sees only keys less than ``window`` positions back; with a tree, row t must then be node t. softcap:
    scores become ``softcap · tanh(score / softcap)`` (Gemma 2). Returns [B, T, Hq, Dv] in q's dtype.
    """
    batch, rows, q_heads, _ = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    group = q_heads // kv_heads
    seen = visible_slots(kv_len, rows, slots, tree_words, window)
    # The group's heads become further rows: the cache is read once for all of them.
    q = q.view(batch, rows, kv_heads, group, -1).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * rows, -1)
    seen = seen[:, None].repeat(1, 1, group, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen, scale=scale)
    else:
        scores = torch.tanh(q.float() @ k_cache.float().transpose(-1, -2) * (scale / softcap)) * softcap
        scores = scores.masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ v_cache.float()).to(q.dtype)
    return out.view(batch, kv_heads, group, rows, -1).permute(0, 3, 1, 2, 4).reshape(batch, rows, q_heads, -1)


def visible_slots(
    kv_len: torch.Tensor, rows: int, slots: int, tree_words: torch.Tensor | None, window: int | None = None
) -> torch.Tensor:
    """Which cache slots each row sees: bool [B, rows, slots]. Arguments as for `attention`."""
    slot = torch.arange(slots, device=kv_len.device)
    start = kv_len[:, None, None]
    if tree_words is None:
        position = start + torch.arange(rows, device=kv_len.device)[None, :, None]
        seen = slot <= position
        return seen if window is None else seen & (position - slot < window)
    node = slot - kv_len[:, None]  # [B, S]
    inside = (node >= 0) & (node < tree_words.shape[-1] * WORD_BITS)
    node = torch.where(inside, node, 0)
    word = tree_words.gather(-1, (node // WORD_BITS)[:, None].expand(-1, rows, -1))
    ancestor = ((word >> (node % WORD_BITS)[:, None]) & 1).bool() & inside[:, None]
    seen = (slot < start) | ancestor
    if window is None:
        return seen
    depth = ancestor.sum(-1) - 1  # a node's depth is the number of its proper ancestors
    slot_depth = depth.gather(1, node.clamp(max=rows - 1))
    slot_position = torch.where(inside, kv_len[:, None] + slot_depth, slot)[:, None]
    return seen & (start + depth[:, :, None] - slot_position < window)
