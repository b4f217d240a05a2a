"""EAGLE-2's draft tree on the device: expansion (sec. 4.1) and re-ranking (sec. 4.2), one launch a call.

Contract. The meaning, the numbering of candidates and the order of ties are those of `eagle.model.tree`: higher score
first, of equal scores the lower candidate. One program serves one sequence, so a sequence's tree depends on no other.
Scores are float32, ids and indices int64, all tensors contiguous; K ≤ 64, C ≤ 8192 candidates, total_token ≤ 256. Every
size comes from the arguments' shapes and nothing is read on the host: safe under CUDA-graph capture.

``finish_tree`` keeps candidate order, so it needs the set of the best and not their ranking: the score of the last one
kept is found bit by bit with 32 counts, ties are cut by a prefix sum, and a prefix sum over the kept numbers the nodes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.ops import WORD_BITS, Candidates, DraftTree, Frontier, mask_words
from eagle.model.triton_kernels.dense import check_dense, check_range
from eagle.model.triton_kernels.order import EMPTY, best_keys, key_ids, key_values, make_keys, order_bits
from eagle.model.triton_kernels.overlap import await_earlier, overlaps
from eagle.model.triton_kernels.rows import check_float

MAX_TOP_K = 64
MAX_CANDIDATES = 8192
MAX_NODES = 256
BITS = tl.constexpr(WORD_BITS)


@triton.jit(do_not_specialize=["level", "offset"])  # one compilation serves every level
def _grow_kernel(
    log_probs,  # [B, R, K] float32
    tokens,  # [B, R, K] int64
    id_map,  # [Vd] int64 or None: the ids that tokens stand for
    scores,  # [B, C] float32, written from ``offset`` on
    candidate_tokens,  # [B, C] int64, written from ``offset`` on
    frontier_index,  # [B, depth, K] int64, row ``level`` is written
    old_scores,  # [B, K] float32; read where HAS_FRONTIER
    old_words,  # [B, K, W] int64; read where HAS_FRONTIER
    new_scores,  # [B, K] float32
    new_tokens,  # [B, K] int64
    new_rows,  # [B, K] int64
    new_words,  # [B, K, W] int64
    count,  # R · K
    offset,
    level,
    depth,
    candidates,
    words,
    HAS_FRONTIER: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < count
    score = tl.load(log_probs + b * count + i, mask=inside, other=0.0)
    if HAS_FRONTIER:
        score += tl.load(old_scores + b * K + i // K, mask=inside, other=0.0)
    token = tl.load(tokens + b * count + i, mask=inside, other=0)
    if id_map is not None:
        token = tl.load(id_map + token, mask=inside, other=0)
    tl.store(scores + b * candidates + offset + i, score, mask=inside)
    tl.store(candidate_tokens + b * candidates + offset + i, token, mask=inside)

    best = best_keys(tl.where(inside, make_keys(score, i), EMPTY), K, BLOCK_K)
    slot = tl.arange(0, BLOCK_K)
    kept = slot < K
    index = tl.where(kept, key_ids(best), 0)
    source = index // K
    tl.store(new_scores + b * K + slot, key_values(best), mask=kept)
    chosen = tl.load(tokens + b * count + index, mask=kept, other=0)
    if id_map is not None:
        chosen = tl.load(id_map + chosen, mask=kept, other=0)
    tl.store(new_tokens + b * K + slot, chosen, mask=kept)
    tl.store(new_rows + b * K + slot, source.to(tl.int64), mask=kept)
    if level < depth:  # the last level has no successor
        tl.store(frontier_index + (b * depth + level) * K + slot, (index + offset).to(tl.int64), mask=kept)

    w = tl.arange(0, BLOCK_W)
    both = kept[:, None] & (w < words)[None, :]
    own = level * K + slot  # the draft-cache slots the new rows will take
    bit = tl.full([BLOCK_K], 1, tl.int64) << (own % BITS).to(tl.int64)
    word = tl.where((own // BITS)[:, None] == w[None, :], bit[:, None], 0)
    if HAS_FRONTIER:
        word |= tl.load(old_words + (b * K + source[:, None]) * words + w[None, :], mask=both, other=0)
    tl.store(new_words + (b * K + slot[:, None]) * words + w[None, :], word, mask=both)


@triton.jit
def _finish_kernel(
    scores,  # [B, C] float32
    candidate_tokens,  # [B, C] int64
    frontier_index,  # [B, depth, K] int64
    root,  # [B] int64
    node_of,  # [B, C] int32, workspace: each candidate's node, 0 if it was not kept
    tokens,  # [B, N] int64
    parents,  # [B, N] int64
    depths,  # [B, N] int64
    words,  # [B, N, W] int64
    candidates,
    depth,
    nodes,
    word_count,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    await_earlier(PDL)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < candidates
    score = tl.load(scores + b * candidates + c, mask=inside, other=0.0)
    key = tl.where(inside, order_bits(score).to(tl.int64) + 2147483648, -1)  # 0 … 2³² - 1, padding below

    # the largest key that at least nodes - 1 candidates reach
    last = tl.full((), 0, tl.int64)
    step = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        reached = tl.sum((key >= last + step).to(tl.int32), 0)
        last = tl.where(reached >= nodes - 1, last + step, last)
        step = step >> 1
    above = (key > last).to(tl.int32)
    tie = (key == last).to(tl.int32)
    kept = (above != 0) | ((tie != 0) & (tl.cumsum(tie, 0) <= nodes - 1 - tl.sum(above, 0)))
    node = tl.where(kept, tl.cumsum(kept.to(tl.int32), 0), 0)
    tl.store(node_of + b * candidates + c, node, mask=inside)

    below_root = c < K
    level = tl.where(below_root, 0, (c - K) // (K * K) + 1)
    row = tl.where(below_root, 0, (c - K) % (K * K) // K)
    token = tl.load(candidate_tokens + b * candidates + c, mask=kept, other=0)
    tl.store(tokens + b * nodes + node, token, mask=kept)
    tl.store(depths + b * nodes + node, (level + 1).to(tl.int64), mask=kept)
    tl.store(tokens + b * nodes, tl.load(root + b))
    tl.store(depths + b * nodes, tl.full((), 0, tl.int64))

    tl.debug_barrier()  # node_of is read by other threads than wrote it
    deep = kept & (level > 0)
    parent_candidate = tl.load(frontier_index + (b * depth + level - 1) * K + row, mask=deep, other=0)
    parent = tl.load(node_of + b * candidates + parent_candidate, mask=deep, other=0)
    tl.store(parents + b * nodes + node, parent.to(tl.int64), mask=kept)
    tl.store(parents + b * nodes, tl.full((), -1, tl.int64))

    tl.debug_barrier()  # and so is parents
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    here = tl.where(n < nodes, n, -1)
    word = tl.zeros([BLOCK_N, BLOCK_W], tl.int64)
    for _ in range(depth + 2):
        there = tl.maximum(here, 0)
        bit = tl.full([BLOCK_N], 1, tl.int64) << (there % BITS).to(tl.int64)
        word |= tl.where((here >= 0)[:, None] & ((there // BITS)[:, None] == w[None, :]), bit[:, None], 0)
        here = tl.load(parents + b * nodes + there, mask=here >= 0, other=-1).to(tl.int32)
    both = (n < nodes)[:, None] & (w < word_count)[None, :]
    tl.store(words + (b * nodes + n[:, None]) * word_count + w[None, :], word, mask=both)


def tree_warps(elements: int) -> int:
    """Warps of a one-program tree kernel over so many keys: one below 256, where a block-wide barrier would cost more
    than it shares out, and about 16 keys a thread beyond."""
    return 1 if elements <= 256 else min(16, max(4, elements // 512))


def _check_ranks(candidates: Candidates) -> None:
    """Raise ValueError unless the sizes that launchers read from the candidates are there."""
    scores, index = candidates.scores, candidates.frontier_index
    if scores.dim() != 2 or index.dim() != 3:
        raise ValueError(
            f"candidates.scores is {tuple(scores.shape)} and frontier_index {tuple(index.shape)}; expected [B, C] and "
            "[B, depth, K]"
        )


def grow_tree(
    candidates: Candidates,
    frontier: Frontier | None,
    level: int,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    id_map: torch.Tensor | None = None,
) -> Frontier:
    """Record one level's children and choose the rows to expand next; `eagle.model.tree.grow_tree` in one launch.

    log_probs: [B, R, K] float32 and tokens: [B, R, K] int64, with R = 1 at level 0 and K at the others. Writes into
    ``candidates``. id_map: [Vd] int64, the target's id of each of the draft's ids that ``tokens`` then holds. Raises
    ValueError for a dtype, device, stride or size outside the module's contract.
    """
    if tokens.dim() != 3:
        raise ValueError(f"tokens is {tuple(tokens.shape)}; expected [B, R, K]")
    _check_ranks(candidates)
    batch, rows, top_k = tokens.shape
    depth, total = candidates.frontier_index.shape[1], candidates.scores.shape[1]
    if not 1 <= top_k <= MAX_TOP_K or rows != (1 if level == 0 else top_k) or not 0 <= level <= depth:
        raise ValueError(
            f"tokens is {tuple(tokens.shape)} at level {level} of {depth}; expected [B, 1, K] at level 0, [B, K, K] "
            f"above it, K at most {MAX_TOP_K}"
        )
    if (frontier is None) != (level == 0):
        raise ValueError(f"level is {level} with {'no' if frontier is None else 'a'} frontier; only level 0 has none")
    words = mask_words(max(1, depth * top_k))
    check_float(log_probs, "log_probs")
    check_dense(log_probs, "log_probs", log_probs, (batch, rows, top_k), torch.float32)
    check_dense(tokens, "tokens", log_probs, (batch, rows, top_k), torch.int64)
    if id_map is not None:
        check_dense(id_map, "id_map", log_probs, (id_map.numel(),), torch.int64)
        check_range(tokens, "tokens", 0, id_map.numel())
    wanted = top_k + depth * top_k**2
    check_dense(candidates.scores, "candidates.scores", log_probs, (batch, wanted), torch.float32)
    check_dense(candidates.tokens, "candidates.tokens", log_probs, (batch, wanted), torch.int64)
    check_dense(candidates.frontier_index, "frontier_index", log_probs, (batch, depth, top_k), torch.int64)
    if frontier is not None:
        check_dense(frontier.scores, "frontier.scores", log_probs, (batch, top_k), torch.float32)
        check_dense(frontier.words, "frontier.words", log_probs, (batch, top_k, words), torch.int64)

    ids = tokens.new_empty((2, batch, top_k))
    new = Frontier(
        scores=log_probs.new_empty((batch, top_k)),
        tokens=ids[0],
        rows=ids[1],
        words=tokens.new_empty((batch, top_k, words)),
    )
    if batch == 0:
        return new
    block = triton.next_power_of_2(rows * top_k)
    pdl = overlaps(log_probs)
    with torch.cuda.device_of(log_probs):
        _grow_kernel[(batch,)](
            log_probs,
            tokens,
            id_map,
            candidates.scores,
            candidates.tokens,
            candidates.frontier_index,
            new.scores if frontier is None else frontier.scores,
            new.words if frontier is None else frontier.words,
            new.scores,
            new.tokens,
            new.rows,
            new.words,
            rows * top_k,
            0 if level == 0 else top_k + (level - 1) * top_k**2,
            level,
            depth,
            total,
            words,
            HAS_FRONTIER=frontier is not None,
            K=top_k,
            BLOCK=block,
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_W=triton.next_power_of_2(words),
            num_warps=tree_warps(block),
            PDL=pdl,
            launch_pdl=pdl,
        )
    return new


def finish_tree(candidates: Candidates, root: torch.Tensor, total_token: int) -> DraftTree:
    """Keep the ``total_token - 1`` best candidates under the root; `eagle.model.tree.finish_tree` in one launch.

    root: [B] int64, the last committed token. Returns N = total_token nodes. Raises ValueError for a dtype, device,
    stride or size outside the module's contract.
    """
    _check_ranks(candidates)
    batch, depth, top_k = candidates.frontier_index.shape
    total = top_k + depth * top_k**2
    if not 1 <= total_token <= min(MAX_NODES, total + 1) or total > MAX_CANDIDATES:
        raise ValueError(
            f"total_token is {total_token} for {total} candidates (depth {depth}, top_k {top_k}); expected 1 to "
            f"{min(MAX_NODES, total + 1)} nodes of at most {MAX_CANDIDATES} candidates"
        )
    scores = candidates.scores
    check_float(scores, "candidates.scores")
    check_dense(scores, "candidates.scores", scores, (batch, total), torch.float32)
    check_dense(candidates.tokens, "candidates.tokens", scores, (batch, total), torch.int64)
    check_dense(candidates.frontier_index, "frontier_index", scores, (batch, depth, top_k), torch.int64)
    check_dense(root, "root", scores, (batch,), torch.int64)
    check_range(candidates.frontier_index, "frontier_index", 0, total)

    nodes, words = total_token, mask_words(total_token)
    tokens, parents, depths = root.new_empty((3, batch, nodes))
    tree = DraftTree(tokens, parents, depths, root.new_empty((batch, nodes, words)))
    if batch == 0:
        return tree
    block = triton.next_power_of_2(total)
    pdl = overlaps(scores)
    with torch.cuda.device_of(scores):
        _finish_kernel[(batch,)](
            scores,
            candidates.tokens,
            candidates.frontier_index,
            root,
            root.new_empty((batch, total), dtype=torch.int32),
            tree.tokens,
            tree.parents,
            tree.depths,
            tree.words,
            total,
            depth,
            nodes,
            words,
            K=top_k,
            BLOCK_C=block,
            BLOCK_N=triton.next_power_of_2(nodes),
            BLOCK_W=triton.next_power_of_2(words),
            num_warps=max(4, tree_warps(block)),
            PDL=pdl,
            launch_pdl=pdl,
        )
    return tree


@torch.library.custom_op("eagle::grow_tree", mutates_args=("scores", "candidate_tokens", "frontier_index"))
def grow_tree_op(
    scores: torch.Tensor,
    candidate_tokens: torch.Tensor,
    frontier_index: torch.Tensor,
    old_scores: torch.Tensor | None,
    old_words: torch.Tensor | None,
    level: int,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    id_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`grow_tree` as a registered operator: the new frontier's scores, tokens, rows and words."""
    candidates = Candidates(scores, candidate_tokens, frontier_index)
    old = None
    if old_scores is not None and old_words is not None:
        old = Frontier(scores=old_scores, tokens=old_words, rows=old_words, words=old_words)
    new = grow_tree(candidates, old, level, log_probs, tokens, id_map)
    return new.scores, new.tokens.clone(), new.rows.clone(), new.words  # an operator's results may not share storage


@grow_tree_op.register_fake
def _(
    scores: torch.Tensor,
    candidate_tokens: torch.Tensor,
    frontier_index: torch.Tensor,
    old_scores: torch.Tensor | None,
    old_words: torch.Tensor | None,
    level: int,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    id_map: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, depth, top_k = frontier_index.shape
    shape = (batch, top_k)
    words = tokens.new_empty((*shape, mask_words(max(1, depth * top_k))))
    return log_probs.new_empty(shape), tokens.new_empty(shape), tokens.new_empty(shape), words


@torch.library.custom_op("eagle::finish_tree", mutates_args=())
def finish_tree_op(
    scores: torch.Tensor,
    candidate_tokens: torch.Tensor,
    frontier_index: torch.Tensor,
    root: torch.Tensor,
    total_token: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`finish_tree` as a registered operator: tokens, parents, depths and words of the tree."""
    tree = finish_tree(Candidates(scores, candidate_tokens, frontier_index), root, total_token)
    return tree.tokens.clone(), tree.parents.clone(), tree.depths.clone(), tree.words


@finish_tree_op.register_fake
def _(
    scores: torch.Tensor,
    candidate_tokens: torch.Tensor,
    frontier_index: torch.Tensor,
    root: torch.Tensor,
    total_token: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (root.shape[0], total_token)
    words = root.new_empty((*shape, mask_words(total_token)))
    return root.new_empty(shape), root.new_empty(shape), root.new_empty(shape), words
