"""The trials of the tree's ops: where a draft's rows lie, top-k over the logits, expansion and re-ranking."""

from __future__ import annotations

import torch

from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.inputs import ancestors
from eagle.bench.kernel_ops.trial import TORCH, Trial, nbytes, relative_error, same
from eagle.model import tree as torch_tree
from eagle.model.ops import WORD_BITS, Candidates, DraftPositions, DraftTree, Frontier, mask_words
from eagle.model.triton_kernels.draft_positions import draft_positions
from eagle.model.triton_kernels.topk import topk_log_softmax
from eagle.model.triton_kernels.tree_decoding import finish_tree, grow_tree


def positions_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """The passes after a step that committed from no token to a whole path."""
    shape, path = case.tree, case.tree.path
    kv_len = torch.randint(path, case.prefix + 1, (1,), device=device)
    count = torch.randint(path + 1, (1,), device=device)

    def check(at: DraftPositions) -> float:
        length, new = int(kv_len), int(count)
        levels = range(shape.depth)
        expected = (
            [length - new],
            [max(0, new - 1)],
            [[length + level * shape.top_k] for level in levels],
            [[length - new + row for row in range(path)] + [length + level for level in levels]],
        )
        for name, out, values in zip(at._fields, at, expected, strict=True):
            same(name, out.cpu(), torch.tensor(values))
        return 0.0

    return Trial(
        run=lambda: draft_positions(kv_len, count, shape),
        rivals={TORCH: lambda: torch_tree.draft_positions(kv_len, count, shape)},
        check=check,
        traffic=nbytes(kv_len, count) + 8 * (2 + shape.depth + path + shape.depth),
        inputs=(kv_len, count),
    )


def topk_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """One level's logits: top_k rows over the vocabulary of the head named by the case's part."""
    vocab, k = case.model.linear(case.part)[0], case.tree.top_k
    logits = (torch.randn(k, vocab, device=device) * 3).to(case.dtype)

    def check(out: tuple[torch.Tensor, torch.Tensor]) -> float:
        wide = logits.double()
        ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        same("ids", out[1], ids)
        return relative_error(out[0], wide.log_softmax(-1).gather(1, ids))

    return Trial(
        run=lambda: topk_log_softmax(logits, k),
        rivals={TORCH: lambda: torch_tree.topk_log_softmax(logits, k)},
        check=check,
        traffic=nbytes(logits),
        inputs=(logits,),
    )


def grow_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A middle level: the children of a full frontier."""
    shape, level = case.tree, (case.tree.depth + 1) // 2
    k = shape.top_k
    candidates = torch_tree.empty_candidates(shape, 1, device)
    words = mask_words(shape.draft_slots)
    frontier = Frontier(
        scores=-torch.rand(1, k, device=device).sort(-1).values * 5,
        tokens=torch.randint(case.model.vocab, (1, k), device=device),
        rows=torch.randint(k, (1, k), device=device),
        words=torch.randint(2**40, (1, k, words), device=device),
    )
    log_probs = -torch.rand(1, k, k, device=device).sort(-1).values * 5
    tokens = torch.randint(case.model.vocab, (1, k, k), device=device)
    if poisoned:
        candidates.scores.fill_(float("nan"))

    def check(new: Frontier) -> float:
        scores = (frontier.scores[0, :, None] + log_probs[0]).flatten().tolist()
        best = sorted(range(k * k), key=lambda i: (-scores[i], i))[:k]
        offset = k + (level - 1) * k * k
        same("scores", new.scores[0].cpu(), torch.tensor([scores[i] for i in best]))
        same("tokens", new.tokens[0], tokens.flatten()[best])
        same("rows", new.rows[0].cpu(), torch.tensor([i // k for i in best]))
        same("frontier_index", candidates.frontier_index[0, level].cpu(), torch.tensor(best) + offset)
        same("candidates", candidates.scores[0, offset : offset + k * k].cpu(), torch.tensor(scores))
        old = frontier.words[0].tolist()
        for row, i in enumerate(best):
            word = list(old[i // k])
            own = level * k + row
            word[own // WORD_BITS] |= 1 << (own % WORD_BITS)
            signed = torch.tensor([w - 2**64 if w >= 2**63 else w for w in word])
            same("words", new.words[0, row].cpu(), signed)
        return 0.0

    return Trial(
        run=lambda: grow_tree(candidates, frontier, level, log_probs, tokens),
        rivals={TORCH: lambda: torch_tree.grow_tree(candidates, frontier, level, log_probs, tokens)},
        check=check,
        traffic=2 * nbytes(log_probs, tokens),
        inputs=(log_probs, tokens),
    )


def finish_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """The candidates of a tree grown from random scores."""
    candidates = _grown(case, device)
    root = torch.randint(case.model.vocab, (1,), device=device)
    nodes = case.tree.total_token
    return Trial(
        run=lambda: finish_tree(candidates, root, nodes),
        rivals={TORCH: lambda: torch_tree.finish_tree(candidates, root, nodes)},
        check=lambda tree: _check_finished(tree, candidates, root, nodes),
        traffic=nbytes(candidates.scores, candidates.tokens, candidates.frontier_index) + 8 * 4 * nodes,
        inputs=(candidates.scores, candidates.tokens, candidates.frontier_index),
    )


def _grown(case: Case, device: torch.device) -> Candidates:
    shape = case.tree
    candidates = torch_tree.empty_candidates(shape, 1, device)
    frontier = None
    for level in range(shape.depth + 1):
        size = (1, 1 if frontier is None else shape.top_k, shape.top_k)
        log_probs = -torch.rand(size, device=device).sort(-1).values * 2
        tokens = torch.randint(case.model.vocab, size, device=device)
        frontier = torch_tree.grow_tree(candidates, frontier, level, log_probs, tokens)
    return candidates


def _check_finished(tree: DraftTree, candidates: Candidates, root: torch.Tensor, nodes: int) -> float:
    scores, frontier = candidates.scores[0].tolist(), candidates.frontier_index[0].tolist()
    k = len(frontier[0])
    kept = sorted(sorted(range(len(scores)), key=lambda c: (-scores[c], c))[: nodes - 1])
    place = {candidate: node for node, candidate in enumerate(kept, start=1)}
    parents, depths = [-1], [0]
    for candidate in kept:
        level = 0 if candidate < k else (candidate - k) // k**2 + 1
        row = (candidate - k) % k**2 // k
        parents.append(0 if level == 0 else place[frontier[level - 1][row]])
        depths.append(level + 1)
    same("tokens", tree.tokens[0], torch.cat((root, candidates.tokens[0][kept])))
    same("parents", tree.parents[0].cpu(), torch.tensor(parents))
    same("depths", tree.depths[0].cpu(), torch.tensor(depths))
    for node, path in enumerate(ancestors(parents)):
        word = sum(1 << above for above in path)
        found = [w % 2**64 for w in tree.words[0, node].tolist()]
        same("words", torch.tensor([sum(w << 64 * i for i, w in enumerate(found)) == word]), torch.tensor([True]))
    return 0.0
