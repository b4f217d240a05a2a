"""One speculative step as a pure sequence of ops over the state. Nothing is read on the host.

draft extend over the tokens the last step committed → ``depth`` expansions → tree → target pass over the tree →
acceptance → compaction → next state. Plain decoding is the same step with an empty tree.
"""

from __future__ import annotations

import torch

from eagle.engine.state import Run, bounded
from eagle.model.drafts import DraftCall, DraftModel
from eagle.model.ops import DecodeState, DraftTree
from eagle.model.tree import empty_candidates, root_only


@torch.no_grad()
def step(run: Run, state: DecodeState, longest: int) -> DecodeState:
    """Advance every running row by 1 … P tokens. longest: host-side bound on ``state.kv_len``."""
    tree = root_only(state.root) if run.draft is None else draft_tree(run, run.draft, state, longest)
    logits, features = run.target.forward(
        tree.tokens,
        run.caches.target,
        state.kv_len,
        depths=tree.depths,
        tree_words=tree.words,
        slots=bounded(longest + run.nodes, run.caches.slots),
    )
    uniforms = None
    if run.uniforms is not None:
        ahead = torch.arange(run.path, device=state.root.device)
        last = run.uniforms.shape[1] - 1
        uniforms = run.uniforms.gather(1, (state.generated[:, None] + ahead).clamp(max=last))
    accepted = run.ops.evaluate_posterior(logits, tree, run.path, run.sampling, uniforms)
    for k, v in run.caches.target.groups:
        nodes, kv_len, count = (t.to(k.device) for t in (accepted.nodes, state.kv_len, accepted.count))
        run.ops.kv_compact(k, v, nodes, kv_len, count)
    return run.ops.update_inputs(state, accepted, None if run.draft is None else features, run.eos)


def draft_tree(run: Run, draft: DraftModel, state: DecodeState, longest: int) -> DraftTree:
    """Extend the draft over the tokens just committed, then grow its tree under the last of them."""
    ops, shape, cache = run.ops, run.shape, run.caches.draft
    batch, path = state.tokens.shape
    start = state.kv_len - state.count
    positions = start[:, None] + torch.arange(path, device=start.device)
    call = DraftCall(ops, cache, start, start, None, positions, bounded(longest + path, cache.slots))
    hidden = draft(draft.fuse(state.features, ops), state.tokens, call)
    last = (state.count - 1).clamp(min=0)
    hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))  # [B, 1, H]

    candidates = empty_candidates(shape, batch, hidden.device)
    frontier = None
    for level in range(shape.depth + 1):
        if level > 0:
            start = state.kv_len + (level - 1) * shape.top_k
            positions = (state.kv_len + level - 1)[:, None].expand(-1, shape.top_k)
            slots = bounded(longest + level * shape.top_k, cache.slots)
            call = DraftCall(ops, cache, start, state.kv_len, frontier.words, positions, slots)
            hidden = hidden.gather(1, frontier.rows[..., None].expand(-1, -1, hidden.shape[-1]))
            hidden = draft(hidden, frontier.tokens, call)
        logits = draft.logits(hidden, ops)
        log_probs, ids = ops.topk_log_softmax(logits.flatten(0, 1), shape.top_k)
        ids = draft.to_target(ids).view(batch, -1, shape.top_k)
        frontier = ops.grow_tree(candidates, frontier, level, log_probs.view_as(ids), ids)
    return ops.finish_tree(candidates, state.root, shape.total_token)
