"""One speculative step as a pure sequence of ops over the state. Nothing is read on the host.

draft extend over the tokens the last step committed → ``depth`` expansions → tree → target pass over the tree →
acceptance → compaction → next state. Plain decoding is the same step with an empty tree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from eagle.engine.state import Run, bounded
from eagle.model.drafts import DraftCall, DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.ops import DecodeState, DraftTree
from eagle.model.tree import empty_candidates, root_only


@torch.no_grad()
def step(run: Run, state: DecodeState, longest: int, out: DecodeState | None = None) -> DecodeState:
    """Advance every running row by 1 … P tokens.

    longest: host-side bound on ``state.kv_len``; out: static buffers for the result, ``state`` itself if wanted.
    """
    tree = root_only(state.root) if run.draft is None else draft_tree(run, run.draft, state, longest)
    rows = padded(tree, run.rows)
    logits, features = run.target.forward(
        rows.tokens,
        run.caches.target,
        state.kv_len,
        depths=rows.depths,
        tree_words=rows.words,
        slots=bounded(longest + run.rows, run.caches.slots),
        ops=run.ops,
        row_local=run.row_local,
    )
    uniforms = None
    if run.uniforms is not None:
        ahead = torch.arange(run.path, device=state.root.device)
        last = run.uniforms.shape[1] - 1
        uniforms = run.uniforms.gather(1, (state.generated[:, None] + ahead).clamp(max=last))
    if run.rows != run.nodes:
        logits, features = (part[:, : run.nodes].contiguous() for part in (logits, features))
    accepted = run.ops.evaluate_posterior(logits, tree, run.path, run.sampling, uniforms)
    for k, v in run.caches.target.groups:
        nodes, kv_len, count = (t.to(k.device) for t in (accepted.nodes, state.kv_len, accepted.count))
        run.ops.kv_compact(k, v, nodes, kv_len, count)
    return run.ops.update_inputs(state, accepted, None if run.draft is None else features, run.eos, out=out)


def padded(tree: DraftTree, rows: int) -> DraftTree:
    """The tree with roots added up to ``rows`` nodes; each sees the root alone and nothing sees it."""
    more = rows - tree.tokens.shape[1]
    if more == 0:
        return tree
    return DraftTree(
        tokens=torch.cat((tree.tokens, tree.tokens[:, :1].expand(-1, more)), dim=1),
        parents=F.pad(tree.parents, (0, more)),
        depths=F.pad(tree.depths, (0, more)),
        words=torch.cat((tree.words, tree.words[:, :1].expand(-1, more, -1)), dim=1),
    )


def draft_tree(run: Run, draft: DraftModel | FusedDraft, state: DecodeState, longest: int) -> DraftTree:
    """Extend the draft over the tokens just committed, then grow its tree under the last of them."""
    ops, shape, cache = run.ops, run.shape, run.caches.draft
    batch, path = state.tokens.shape
    at = ops.draft_positions(state.kv_len, state.count, shape)
    angles = draft.rope(at.rope, cache.slots)  # of all passes at once: each op costs a launch
    here = tuple(part[:, :path] for part in angles)
    bound = bounded(longest + path, cache.slots)
    call = DraftCall(ops, cache, at.start, at.start, None, at.rope[:, :path], bound, here)
    hidden = draft(draft.fuse(state.features, ops), state.tokens, call)
    hidden = hidden.flatten(0, 1)[at.last][:, None]  # [B, 1, H]
    logits = draft.logits(hidden, ops)

    target_ids = draft.target_ids
    candidates = empty_candidates(shape, batch, hidden.device)
    frontier = None
    for level in range(shape.depth + 1):
        if level > 0:
            column = slice(path + level - 1, path + level)
            here = tuple(part[:, column].expand(-1, shape.top_k, -1) for part in angles)
            positions = at.rope[:, column].expand(-1, shape.top_k)
            bound = bounded(longest + level * shape.top_k, cache.slots)
            words, slots = frontier.words, at.slots[level - 1]
            call = DraftCall(ops, cache, slots, state.kv_len, words, positions, bound, here)
            hidden, logits = draft.expand(hidden, frontier.tokens, call, frontier.rows)
        log_probs, ids = ops.topk_log_softmax(logits.flatten(0, 1), shape.top_k)
        children = (part.view(batch, -1, shape.top_k) for part in (log_probs, ids))
        frontier = ops.grow_tree(candidates, frontier, level, *children, target_ids)
    return ops.finish_tree(candidates, state.root, shape.total_token)
