"""EAGLE-2's dynamic draft tree in plain PyTorch: expansion (sec. 4.1) and re-ranking (sec. 4.2).

Candidate c of a tree is numbered as in the reference: the K children of the root first, then for each expanded level
the K children of each of its K frontier rows. Ties in score go to the lower number, so a parent always outranks its
children (a child's cumulative score is never higher) and the pruned set is closed under parents.
"""

from __future__ import annotations

import torch

from eagle.model.ops import WORD_BITS, Candidates, DraftPositions, DraftTree, Frontier, TreeShape, mask_words


def topk_log_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row, largest first, and their ids.

    logits: [R, V] any float dtype; returns values [R, k] float32 and ids [R, k] int64. Raises ValueError for another rank
    and for a k outside 1 … V.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits is {tuple(logits.shape)}; expected [R, V]")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k is {k} for logits {tuple(logits.shape)}; expected 1 to {logits.shape[1]}")
    values, ids = torch.topk(logits, k, dim=-1)
    return values.float() - torch.logsumexp(logits.float(), dim=-1, keepdim=True), ids


def draft_positions(kv_len: torch.Tensor, count: torch.Tensor, shape: TreeShape) -> DraftPositions:
    """Slots and positions of a step's draft passes over ``kv_len`` [B] committed positions, ``count`` [B] of them new.

    The extend runs P rows from the first new position on. Level l's rows come after the committed ones and those of the
    levels before it, all of them at position ``kv_len + l``.
    """
    start, levels = kv_len - count, torch.arange(shape.depth, device=kv_len.device)
    ahead = torch.arange(shape.path, device=kv_len.device)
    return DraftPositions(
        start=start,
        last=(count - 1).clamp(min=0) + shape.path * torch.arange(len(count), device=count.device),
        slots=kv_len + levels[:, None] * shape.top_k,
        rope=torch.cat((start[:, None] + ahead, kv_len[:, None] + levels), dim=1),
    )


def empty_candidates(shape: TreeShape, batch: int, device: torch.device) -> Candidates:
    """Room for one tree's candidates."""
    return Candidates(
        scores=torch.empty(batch, shape.candidates, dtype=torch.float32, device=device),
        tokens=torch.empty(batch, shape.candidates, dtype=torch.int64, device=device),
        frontier_index=torch.empty(batch, shape.depth, shape.top_k, dtype=torch.int64, device=device),
    )


def grow_tree(
    candidates: Candidates,
    frontier: Frontier | None,
    level: int,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    id_map: torch.Tensor | None = None,
) -> Frontier:
    """Record one level's children and choose the rows to expand next.

    level 0: ``log_probs`` and ``tokens`` are [B, 1, K], the root's children, and ``frontier`` is None. Level l ≥ 1:
    they are [B, K, K], the children of ``frontier``'s rows. Writes into ``candidates``; returns the K best children by
    cumulative log-probability as the next frontier. At the last level the result has no successor and is ignored.
    id_map: [Vd] int64, what ``tokens`` are indices of: the target's id of each of the draft's. None: they are the target's.
    """
    if id_map is not None:
        tokens = id_map[tokens]
    batch, rows, top_k = tokens.shape
    depth = candidates.frontier_index.shape[1]
    words = mask_words(max(1, depth * top_k))
    if frontier is None:
        scores, offset = log_probs, 0
        frontier_words = torch.zeros(batch, 1, words, dtype=torch.int64, device=tokens.device)
    else:
        scores, offset = frontier.scores[:, :, None] + log_probs, top_k + (level - 1) * top_k**2
        frontier_words = frontier.words
    scores = scores.reshape(batch, rows * top_k)
    candidates.scores[:, offset : offset + rows * top_k] = scores
    candidates.tokens[:, offset : offset + rows * top_k] = tokens.reshape(batch, rows * top_k)

    best, index = torch.sort(scores, dim=-1, descending=True, stable=True)
    best, index = best[:, :top_k], index[:, :top_k]
    if level < depth:
        candidates.frontier_index[:, level] = index + offset
    source = index // top_k
    own = level * top_k + torch.arange(top_k, device=tokens.device)  # the draft-cache slots the new rows will take
    bits = torch.ones_like(own) << (own % WORD_BITS)
    own_words = torch.where(torch.arange(words, device=own.device) == (own // WORD_BITS)[:, None], bits[:, None], 0)
    return Frontier(
        scores=best,
        tokens=tokens.reshape(batch, -1).gather(1, index),
        rows=source,
        words=frontier_words.gather(1, source[:, :, None].expand(-1, -1, words)) | own_words,
    )


def finish_tree(candidates: Candidates, root: torch.Tensor, total_token: int) -> DraftTree:
    """Keep the ``total_token - 1`` best candidates under the root, in candidate order.

    root: [B], the last committed token. Returns N = total_token nodes.
    """
    batch, depth, top_k = candidates.frontier_index.shape
    kept = torch.sort(candidates.scores, dim=-1, descending=True, stable=True).indices[:, : total_token - 1]
    kept = kept.sort(dim=-1).values
    level = torch.where(kept < top_k, 0, (kept - top_k) // top_k**2 + 1)
    row = torch.where(kept < top_k, 0, (kept - top_k) % top_k**2 // top_k)
    if depth:
        above = (level - 1).clamp(min=0) * top_k + row
        parent_candidate = candidates.frontier_index.view(batch, -1).gather(1, above)
        parents = torch.where(level == 0, 0, torch.searchsorted(kept, parent_candidate) + 1)
    else:
        parents = torch.zeros_like(kept)
    parents = torch.cat((torch.full_like(root[:, None], -1), parents), dim=1)
    return DraftTree(
        tokens=torch.cat((root[:, None], candidates.tokens.gather(1, kept)), dim=1),
        parents=parents,
        depths=torch.cat((torch.zeros_like(root[:, None]), level + 1), dim=1),
        words=ancestor_words(parents, depth + 1),
    )


def ancestor_words(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
    """Mask words of a tree. parents: [B, N] with -1 for the root; returns [B, N, W] int64."""
    nodes = parents.shape[1]
    word_index = torch.arange(mask_words(nodes), device=parents.device)
    node = torch.arange(nodes, device=parents.device).expand_as(parents)
    words = torch.zeros(*parents.shape, len(word_index), dtype=torch.int64, device=parents.device)
    for _ in range(max_depth + 1):
        here = node.clamp(min=0)
        bit = torch.where(node >= 0, torch.ones_like(here) << (here % WORD_BITS), 0)
        words |= torch.where((here // WORD_BITS)[..., None] == word_index, bit[..., None], 0)
        node = torch.where(node >= 0, parents.gather(1, here), -1)
    return words


def root_only(root: torch.Tensor) -> DraftTree:
    """The empty tree: verifying it is plain decoding. root: [B]."""
    column = root[:, None]
    return DraftTree(
        tokens=column,
        parents=torch.full_like(column, -1),
        depths=torch.zeros_like(column),
        words=torch.ones_like(column)[..., None],
    )
